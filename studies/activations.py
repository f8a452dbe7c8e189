"""What a step of each stage holds in memory beside weights and optimizer: formulas, in bytes.

`Formula` says what one part of a model leaves behind; `Stages` puts the parts together, in the order in which a step
comes to them. Each term is a tensor that a line of code makes. tests/test_memory.py holds the formulas to what the real
steps allocate. studies/memory.py makes tables of them.

Letters as in model.py; I: width inside the MLPs, C: width of the keys of one token, c: bytes of a number in the dtype
of forward passes. n: tokens that pass; keys: keys, in all rows together, that these tokens see. `Kept` is what autograd
holds for the backward pass.

Left out is what is small: the image encoder, which never trains and is done before the text begins, token ids, and
losses.
"""

from dataclasses import dataclass

import torch

from studies.cases import Shape
from vlm import HeadLogProbs


@dataclass(frozen=True)
class Work:
    """What one rank does at once: sizes of the models and of the batches (`shape`), and how they are computed."""

    shape: Shape
    dtype: torch.dtype = torch.bfloat16
    micro: int = 0
    checkpointing: bool = False
    ranks: int = 1
    padded: bool = True  # batches of several rows
    explained: float = 1.0  # share of the tokens of a dialogue
    cuda: bool = True  # the kernels of a CPU, on which the tests measure, hold other things


class Formula:
    """Parts of the models."""

    def __init__(self, work):
        s = work.shape
        self.work, self.s, self.c = work, s, work.dtype.itemsize
        self.D, self.I, self.V, self.K = s.width, s.inner, s.vocab, s.codes
        self.C = s.width // s.heads * s.kv_heads
        self.norm = 4 if work.cuda else 8  # our RMSNorm keeps its input in float32; on a CPU the normed one as well

    # ------------------------------------------------------------------------------------------------------------ kept
    def vlm_block(self, n, keys, masked, trains):
        """Of a block of the VLM that gradients pass."""
        D, c = self.D, self.c
        kept = n * (2 * 4 * D + 2 * c * D + 3 * c * self.I)  # inputs of norms, float32; q, result; gate, silu, up
        kept += keys * 2 * c * (D if masked else self.C)  # under a mask the library repeats the keys for all heads
        if trains:
            inputs = 5 if c < 4 else 2  # of q, k, v, gate, up: autocast makes a copy for each
            kept += n * ((2 + inputs) * c * D + c * self.I)  # normed states; input of down
        return kept

    def own_block(self, n, keys=0, masked=False):
        """Of a block of inverse dynamics or policy. keys: of a cache; 0: there is none."""
        D, C, c = self.D, self.C, self.c
        kept = n * (2 * self.norm * D + 3 * c * D + 4 * c * self.I)  # norms; inputs of qkv, o, gate_up; MLP
        kept += n * c * (D + C)  # q and k after rope
        if not keys:
            return kept + n * c * (D + 2 * C)  # v, as a part of qkv
        return kept + keys * 2 * c * (D if masked and self.work.cuda else C)

    def stack_end(self, n):
        """Behind the blocks of inverse dynamics or policy: final norm, logits."""
        return n * ((self.norm + 4) * self.D + 4 * self.K)

    def stack(self, n, blocks):
        """Of all of inverse dynamics or policy, without a cache, on contexts that need no gradient."""
        first = 0 if self.work.cuda else 4 * self.D * n  # a CPU keeps no input for a gradient that nobody needs
        return blocks * self.own_block(n) + self.stack_end(n) - first

    def world(self, n):
        """Of quantiser and world model; and the gradient of its states, which the LM head works out at once."""
        c, merges = self.c, self.s.merges
        return n * (4 * merges * c * self.I + (self.norm + (2 + merges) * c) * self.D + (3 * 4 + c) * self.K)

    def gaussian(self, n):
        """Of one direction of the projector: hidden states, tanh; difference, its square, 1 / sigma^2."""
        return n * self.D * (2 * self.c + 3 * 4)

    def token_end(self, n, scored):
        """Behind the VLM's blocks where they train: final norm; the scored states and their gradients, float32."""
        return n * (4 + self.c) * self.D + scored * 2 * 4 * self.D

    def mask(self, rows, queries, keys):
        """What attention makes of a mask of bits."""
        return rows * queries * keys * self.c

    # ---------------------------------------------------------------------------------------------- held for a moment
    def vlm_passing(self, n, masked_keys=0):
        """A block of the VLM without gradients at its widest: in the MLP, or with keys repeated for all heads."""
        c, D = self.c, self.D
        return max(n * c * (3 * self.I + 4 * D), masked_keys * 2 * c * D + n * c * 4 * D)

    def own_passing(self, n, masked_keys=0):
        """A block of ours likewise; what attention took is held until the block's end."""
        c, D, C = self.c, self.D, self.C
        attention = c * (4 * D + 2 * C) + (4 if c == 4 else 4 + c) * (D + C)  # states, qkv; q and k before rope, after
        repeated = masked_keys * 2 * c * D if self.work.cuda else 0
        return n * attention + max(n * c * 4 * self.I, repeated)

    def own_backward(self, n):
        """Behind inverse dynamics or policy: gradients of three states in float32."""
        return n * 3 * 4 * self.D

    def mlp_backward(self, n):
        """In the MLP of a block of the VLM: two gradients of its width, and two of the states."""
        return n * 2 * self.c * (self.I + self.D)

    def likelihood(self, n):
        """The Gaussian's sums: target, mu and what is made of them, float32."""
        return n * self.D * 4 * (4 if self.c == 4 else 6)

    # --------------------------------------------------------------------------------------------------------- LM head
    def some_logits(self, n):
        """Of as many rows as `HeadLogProbs` takes at a time."""
        return 4 * min(n * self.V, max(HeadLogProbs.LOGITS, self.V))

    def head(self, n, trains=False):
        """n states are scored: logits and log-probabilities of some; the weight as the product takes it."""
        return 2 * self.some_logits(n) + self.float_head() + (self.cast_head() if trains else 0)

    def cast_head(self):
        """A head that trains, in the dtype of forward passes."""
        return self.c * self.V * self.D if self.c < 4 else 0

    def float_head(self):
        """A CPU has no product of bfloat16 numbers with float32 sums."""
        return 0 if self.work.cuda or self.c == 4 else 4 * self.V * self.D

    def token_head(self, n):
        """Backward through a head that trains: gradient of the states; of the weight, a sum over some rows a time."""
        some, weight = self.some_logits(n), self.V * self.D
        product = self.c * weight + (self.c * some // 4 if self.c < 4 else 0)  # of probabilities, cast, and states
        return 4 * self.D * n + self.cast_head() + self.float_head() + 4 * weight + some + max(product, some)


class Blocks:
    """Kept of all blocks of a VLM, of which the last ones train.

    frozen, trained: of one block of each kind; given: of its input alone, which is all that --checkpointing keeps."""

    def __init__(self, work, w, frozen, trained, given):
        s = work.shape
        if work.checkpointing:
            self.kept, self.again = s.blocks * given, trained + w.casts // s.train  # again: of one block
            self.frozen = (s.blocks - s.train) * given + frozen  # still kept when all trained blocks are done
        else:
            self.frozen = (s.blocks - s.train) * frozen
            self.kept, self.again = self.frozen + s.train * trained, 0


@dataclass
class Moment:
    """Bytes that are held at one moment of a step, beside weights and optimizer."""

    name: str
    activations: int
    gradients: int
    caches: int = 0


class Stages(Formula):
    """The moments of each stage that may be the fullest one. `w`: the Weights of the stage, see studies/memory.py."""

    def part(self, rows):
        """-> rows in one backward pass."""
        return min(rows, self.work.micro or rows)

    def before(self, w, rows=0):
        """Gradients before a backward pass: of earlier parts of the step. Several ranks keep the memory in which they
        exchange them, between steps too."""
        return w.trained if self.part(rows) < rows or self.work.ranks > 1 else 0

    def step(self, w, rows, kept, forward, backward, last, gradients=None, caches=0, again=False):
        """The moments of a training step.

        kept: at the end of the forward pass. forward, backward, last: fullest moment of the forward pass, of the
        backward pass, and of its rest, when it has passed all weights once; what is kept included. gradients: those
        there are by then, by default all. again: blocks are computed again, and weights cast again with them."""
        before, casts = self.before(w, rows), 0 if again else w.casts
        yield Moment("forward", w.casts + max(kept, forward), before, caches)
        yield Moment("backward", casts + backward, before, caches)
        yield Moment("end of backward", casts + last, w.trained if gradients is None else gradients, caches)
        yield Moment("optimizer", 0, w.trained, caches)

    def twice(self, w, rows):
        """Gradients in the middle of a backward pass, of weights that a step uses twice: those of the first half wait
        to be added, in the dtype in which they were computed."""
        return self.before(w, rows) + w.trained - w.casts

    # --------------------------------------------------------------------------------------------------- stages 1 to 3
    def dialogues(self):
        """-> (n: tokens of a backward pass, of one kind of data; S: those outside of images; M: explained ones)."""
        width, height = (size // 28 for size in self.s.image)  # a token stands for 28 x 28 pixels
        rows = self.part(self.s.rows)
        n = rows * self.s.row
        return n, n - rows * (width * height + 2), round(self.work.explained * n)

    def stage1(self, w):
        n, S, _ = self.dialogues()
        with_image, pair = self.c * self.D * n, 2 * self.c * self.D * S  # states
        kept = with_image + pair + 2 * self.gaussian(S)
        forward = max(with_image + self.vlm_passing(n), kept + self.likelihood(S))
        return self.step(w, self.s.rows, kept, forward, kept + self.own_backward(S), kept // 2)

    def stage2(self, w):
        n, S, M = self.dialogues()
        states = 2 * self.c * self.D * n  # h and e
        one = states + self.stack(n, self.s.inverse) + self.world(M)  # of paired, and of text-only data
        kept = 2 * one + 3 * self.c * self.D * S + 3 * self.gaussian(S)
        forward = max(one + self.vlm_passing(n), 2 * one + self.head(M), kept + self.likelihood(n))
        back = self.own_backward(n)
        return self.step(w, self.s.rows, kept, forward, kept + back, one + back, self.twice(w, self.s.rows))

    def clone(self, w):
        n, _, _ = self.dialogues()
        one = self.c * self.D * n + self.stack(n, self.s.policy)
        forward = one + max(self.vlm_passing(n), self.own_passing(n))  # the second one's states, and its teacher
        back = self.own_backward(n)
        twice = self.twice(w, self.s.rows)
        return self.step(w, self.s.rows, 2 * one, forward, 2 * one + back, one + back, twice)

    def adapt(self, w):
        n, _, M = self.dialogues()
        inverse = self.c * self.D * n + self.stack(n, self.s.inverse) + self.world(M)
        kept = inverse + self.stack(n, self.s.policy)
        backward = kept + self.own_backward(n)
        return self.step(w, self.s.rows, kept, inverse + self.head(M), backward, self.own_block(n))

    def sft(self, w):
        s, (n, _, M) = self.s, self.dialogues()
        rows = self.part(s.rows)
        masked = self.work.padded and rows > 1
        mask = self.mask(rows, s.row, s.row) if masked else 0
        frozen, trained = (self.vlm_block(n, n, masked, trains) + mask for trains in (False, True))
        blocks, end = Blocks(self.work, w, frozen, trained, self.c * self.D * n), self.token_end(n, M)
        forward = blocks.kept + end + self.head(M, trains=True)
        backward = blocks.kept + max(end + self.token_head(M), blocks.again + self.vlm_backward(s.rows, n))
        last = blocks.frozen + self.mlp_backward(n)
        gradients = self.before(w, s.rows) or w.trained - self.untied()  # those of the embeddings come last
        again = self.work.checkpointing
        return self.step(w, s.rows, blocks.kept + end, forward, backward, last, gradients, again=again)

    def untied(self):
        """A matrix of the vocabulary, float32, if embeddings and LM head have one each."""
        return 0 if self.s.tied else 4 * self.V * self.D

    def vlm_backward(self, rows, n):
        """In the last block of the VLM, where it trains, while the LM head's gradient waits for that of the embeddings.
        One that is not tied is added at once, if there is something to add it to."""
        waits = self.s.tied or self.part(rows) == rows
        return self.mlp_backward(n) + (4 * self.V * self.D if waits else 0)

    # --------------------------------------------------------------------------------------------------------- stage 4
    def responses(self):
        """-> (rows of a backward pass; tokens of their prompts, each read once; of the responses; keys; whether the
        prompts are padded)."""
        s = self.s
        rows = self.part(s.prompts * s.group)
        n1, n2, keys = -(-rows // s.group) * s.prompt, rows * s.new, rows * (s.prompt + s.new)
        return rows, n1, n2, keys, self.work.padded and n1 > s.prompt

    def update_latent(self, w):
        s, (rows, n1, n2, keys, padded) = self.s, self.responses()
        mask = self.mask(rows, s.new, s.prompt + s.new)
        prompt = s.policy * self.own_block(n1, n1, padded) + self.stack_end(n1)
        kept = prompt + s.policy * (self.own_block(n2, keys, True) + mask) + self.stack_end(n2)
        cache, back = s.policy * keys * 2 * self.C * self.c, self.own_backward(max(n1, n2))
        reference = cache + mask + self.own_passing(max(n1, n2), keys)
        last = prompt + cache + back  # the keys' gradients wait for those of the prompt
        contexts = s.prompts * (s.prompt + s.group * s.new) * self.c * self.D
        every = s.prompts * s.group
        twice = self.twice(w, every)
        return self.step(w, every, kept, kept + reference, kept + back, last, twice, contexts)

    def update_token(self, w):
        s, c, (rows, n1, n2, keys, padded) = self.s, self.c, self.responses()
        mask, one_cache = self.mask(rows, s.new, s.prompt + s.new), keys * 2 * self.C * c
        frozen, trained = (self.vlm_block(n1, n1, padded, trains) for trains in (False, True))
        prompt = Blocks(self.work, w, frozen, trained, c * self.D * n1)
        frozen, trained = (self.vlm_block(n2, keys, True, trains) + mask for trains in (False, True))
        response = Blocks(self.work, w, frozen, trained, c * self.D * n2 + rows * s.prompt * 2 * self.C * c)
        kept, end = prompt.kept + response.kept, self.token_end(n1 + n2, n2)
        reference = s.blocks * one_cache + mask + self.vlm_passing(max(n1, n2), keys)
        forward = kept + end + max(self.head(n2, trains=True), reference)
        every = s.prompts * s.group
        backward = kept + max(end + self.token_head(n2), response.again + self.vlm_backward(every, n2))
        waiting = response.frozen + s.train * one_cache  # the keys' gradients, for those of the prompt
        last = prompt.kept + max(waiting, prompt.again) + self.mlp_backward(max(n1, n2))
        again = self.work.checkpointing  # each pass casts weights of its own, and its gradients become float32 at once
        gradients = self.twice(w, every) + (w.casts if again else 0)
        gradients -= self.untied() if self.before(w, every) else 0  # an LM head is used once, at the end
        return self.step(w, every, kept + end, forward, backward, last, gradients, again=again)

    def rollout(self, w, actions):
        """The prompt passes the VLM, then the policy; the responses grow in caches with room for all of them."""
        s, c = self.s, self.c
        latent, rows, n = actions == "latent", s.prompts * s.group, s.prompts * s.prompt
        token, state = 2 * self.C * c, c * self.D  # key and value of a token in one block; its context
        tables = s.merges * self.K * 2 * self.I * c if latent else self.cast_head()  # see LatentModel.speaker
        fixed, gradients = w.casts + tables + self.float_head(), self.before(w)
        yield Moment("prompt", fixed + self.vlm_passing(n), gradients, s.blocks * n * token)
        blocks, contexts = s.blocks, 0
        if latent:
            read = s.blocks * rows * s.prompt * token + s.policy * n * token
            yield Moment("prompt", fixed + n * state + self.own_passing(n), gradients, read)
            blocks, contexts = s.blocks + s.policy, (n + 2 * rows * s.new) * state  # each token's; all of them in one
        few = max(rows * s.prompt * token, 3 * 4 * rows * self.V)  # a block's old cache, or logits
        caches = blocks * rows * (s.prompt + s.new) * token + contexts
        yield Moment("response", fixed + few, gradients, caches)

    def all(self, weights):
        """weights: {stage: Weights} -> {stage: its moments}; both parts of stage 4 have the same weights."""
        return {
            "1": list(self.stage1(weights["1"])),
            "2": list(self.stage2(weights["2"])),
            "3 clone": list(self.clone(weights["3 clone"])),
            "3 adapt": list(self.adapt(weights["3 adapt"])),
            "3 SFT": list(self.sft(weights["3 SFT"])),
            "4 latent rollout": list(self.rollout(weights["4 latent"], "latent")),
            "4 latent update": list(self.update_latent(weights["4 latent"])),
            "4 token rollout": list(self.rollout(weights["4 token"], "token")),
            "4 token update": list(self.update_token(weights["4 token"])),
        }
