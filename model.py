"""The method: every module and equation of it, by hand, on top of the states of a frozen vision-language model
(vlm.py).

    h     f_VLM's last hidden state, after its final norm                                           (B, T, D)
    e     the context e^VT: h where the row has an image, mu of P(h) where it has none              (B, T, D)
    c     a row of the codebook C (K, D): one latent action
    a_t   = f_inverse(e_{t+1}), learnt without labels; the policy pi(a_t | e_{<=t}) must guess it
    x_t+1 ~ f_world(e_t, c_{a_t}): LM head of merge(e_t, c)

Letters at the end of a name are its dimensions: B batch, G group, N = B * G rows, T time, L prompt length, D width, K
codes, V vocabulary, S length of a text-only view, or the keys that an attention can see, M = the explained tokens of
a batch in one row.

ONE definition each of the context (`LatentModel.context`), of the world model (`LatentModel.speak`) and of the
distribution that is sampled and scored (`vlm.log_probs`), used by every stage, by the rollout and by the evaluation.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from packed_linear import pack
from vlm import next_token_loss, positions_of, visible


# ------------------------------------------------------------------ cross-modal projector: text -> image-text and back
class Gaussian(nn.Module):
    """x -> (mu, log sigma^2), two MLPs (Linear(D, D/2) - Tanh - Linear(D/2, D)).

    The log-variance ends in a tanh, so it lies in (-1, 1): the negative log-likelihood of a density has no lower
    bound. As sigma -> 0 at a point that mu fits exactly, it goes to minus infinity, and that one dimension would take
    over the loss.

    skip: mu = x + MLP(x), starting at the identity (ours); otherwise mu = MLP(x), as the paper has it."""

    def __init__(self, width, skip=True):
        super().__init__()
        self.mlp = self._mlp(width)
        self.logvar = self._mlp(width)
        self.skip = skip
        if skip:
            nn.init.zeros_(self.mlp[-1].weight)
            nn.init.zeros_(self.mlp[-1].bias)

    @staticmethod
    def _mlp(width):
        return nn.Sequential(nn.Linear(width, width // 2), nn.Tanh(), nn.Linear(width // 2, width))

    def mean(self, x_BTD):
        return x_BTD + self.mlp(x_BTD) if self.skip else self.mlp(x_BTD)

    def forward(self, x_BTD):
        return self.mean(x_BTD), torch.tanh(self.logvar(x_BTD))


def gaussian_nll(target_BTD, mu_BTD, logvar_BTD, mask_BT):
    """1/2 ( ||(target - mu) / sigma||^2 + sum_d log sigma_d^2 ), summed over D and over the counted tokens.

    The paper prints |log sigma^2|; the negative log-likelihood (up to its constant) has the signed sum."""
    x, mu, logvar = target_BTD.float(), mu_BTD.float(), logvar_BTD.float()
    nll_BT = 0.5 * ((x - mu) ** 2 * torch.exp(-logvar) + logvar).sum(-1)
    return (nll_BT * mask_BT).sum()


class Projector(nn.Module):
    """P: text -> image-text and P': image-text -> text."""

    def __init__(self, width, skip=True):
        super().__init__()
        self.P = Gaussian(width, skip)
        self.P_back = Gaussian(width, skip)

    def paired_loss(self, h_VT_BSD, h_T_BSD, mask_BS):
        """L_t2vt + L_vt2t on aligned states of the same text token with and without the image; summed, not averaged."""
        t2vt = gaussian_nll(h_VT_BSD, *self.P(h_T_BSD), mask_BS)
        vt2t = gaussian_nll(h_T_BSD, *self.P_back(h_VT_BSD), mask_BS)
        return t2vt + vt2t

    def cycle_loss(self, h_T_BTD, mask_BT):
        """L_cycle: P'(mu of P(e^T)) must return e^T; text-only rows, no image needed. Summed."""
        return gaussian_nll(h_T_BTD, *self.P_back(self.P(h_T_BTD)[0]), mask_BT)


def projector_loss(projector, vlm, processor, batch, h_BTD):
    """L_proj1 = L_t2vt + L_vt2t of a paired batch, whose states with the image are h_BTD.

    The same dialogues are encoded once more without their images; text tokens behind the image count.
    -> (L_proj1, squared error a dimension of P and of the identity), all summed over counted tokens."""
    view, index_BS, after_BS = processor.text_view(batch)
    with torch.no_grad():
        h_T = vlm(view)
        h_VT = h_BTD.gather(1, index_BS[..., None].expand(-1, -1, h_T.shape[-1]))
    loss = projector.paired_loss(h_VT, h_T, after_BS)
    with torch.no_grad():
        error = ((projector.P.mean(h_T) - h_VT)[after_BS] ** 2).mean(-1).sum()
        identity = ((h_T - h_VT)[after_BS] ** 2).mean(-1).sum()
    return loss, error, identity


# ------------------------------------------------------------------------------------------------------------- codebook
def straight_through_gumbel(logits, u, tau=2.0):
    """One-hot of argmax(logits + g), g ~ Gumbel(0, 1), whose gradient is that of softmax((logits + g) / tau).

    u: uniforms in [0, 1), from which g = -log(-log u) is made; logits and u (..., K) float32."""
    u = u.clamp(1e-9, 1 - 1e-7)
    soft = F.softmax((logits - torch.log(-torch.log(u))) / tau, -1)
    hard = F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())  # in this order: (1 + soft) - soft is 0.9999999 at times


def entropy(logits_BTK):
    """H(softmax(logits)) in nats -> (B, T)."""
    logp = F.log_softmax(logits_BTK, -1)
    return -(logp.exp() * logp).sum(-1)


class GumbelQuantiser(nn.Module):
    """From the inverse dynamics' logits to one of K code vectors, with a gradient: straight-through Gumbel-softmax.

    Another quantiser (FSQ, VQ-EMA) is another class with these three methods and `codes`; nothing else looks inside.

    The auxiliary loss is - entropy_bonus * H(softmax(logits)) of each token: a reward for undecided posteriors, so
    that early in training the noise still tries other codes and none dies for want of use. The minus makes a bonus of
    it. It acts on each token's own distribution; it does not by itself spread the USE of the codes, which is the
    entropy of the mean posterior: all tokens could be undecided between the same few codes. Stage 2 therefore logs
    the use apart."""

    def __init__(self, codes, width, tau=2.0, entropy_bonus=1e-3):
        super().__init__()
        self.codebook = nn.Embedding(codes, width)
        self.codes, self.tau, self.entropy_bonus = codes, tau, entropy_bonus

    def vectors(self):
        """-> (K, D), the code vectors."""
        return self.codebook.weight

    def choose(self, logits):
        """-> codes (...) int64, without noise."""
        return logits.argmax(-1)

    def forward(self, logits_MK, u_MK):
        """u_MK: uniforms in [0, 1), the noise.

        -> (code vectors (M, D) drawn with noise, codes (M,) chosen without, auxiliary loss summed over M)."""
        c_MD = straight_through_gumbel(logits_MK, u_MK, self.tau) @ self.vectors()
        return c_MD, self.choose(logits_MK), -self.entropy_bonus * entropy(logits_MK).sum()


# ---------------------------------------------------------------------------------------------------------- world model
class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).to(x.dtype)


class Merge(nn.Module):
    """x <- x + W3( silu(W1 [x; c]) * (W2 [x; c]) ), no bias. W3 starts at 0, so that the world model starts at the VLM.

    W [x; c] is W_x x + W_c c. There are only K different c, so `code_part` can be worked out for all of them at
    once."""

    def __init__(self, width, inner):
        super().__init__()
        self.w1_x, self.w1_c, self.w2_x, self.w2_c = (nn.Linear(width, inner, bias=False) for _ in range(4))
        self.w3 = nn.Linear(inner, width, bias=False)
        for w in (self.w1_x, self.w1_c, self.w2_x, self.w2_c):
            nn.init.uniform_(w.weight, -((2 * width) ** -0.5), (2 * width) ** -0.5)  # torch's own for 2 D inputs
        nn.init.zeros_(self.w3.weight)

    def code_part(self, c):
        """c (..., D) -> (W1_c c, W2_c c), each (..., inner)."""
        return self.w1_c(c), self.w2_c(c)

    def forward(self, x, c1, c2):
        """x (..., D); c1, c2 (..., inner): the code's part."""
        return x + self.w3(F.silu(self.w1_x(x) + c1) * (self.w2_x(x) + c2))


class WorldModel(nn.Module):
    """f_world: y = merge(e_t, c_{a_t}); the logits of x_{t+1} are the VLM's LM head of y.

    output 'vlm' (ours): the merged state is normed back to e's own length, y = g * x * rms(e) / rms(x), so that before
    training y = e and the world model IS the VLM's prediction. The other two exist to be compared (docs/results.md):
    'norm': y = RMSNorm(x). 'release': y = RMSNorm(x) - e, the formula of the authors' pretraining script."""

    def __init__(self, width, inner, merges=2, output="vlm"):
        super().__init__()
        self.merges = nn.ModuleList(Merge(width, inner) for _ in range(merges))
        self.norm, self.output = RMSNorm(width), output

    def forward(self, e, code_parts):
        """e (..., D) contexts; code_parts: for each merge its (c1, c2) -> (..., D) for the LM head."""
        x = e
        for merge, (c1, c2) in zip(self.merges, code_parts):
            x = merge(x, c1.to(x.dtype), c2.to(x.dtype))
        y = self.norm(x)
        if self.output == "vlm":
            return y * e.float().pow(2).mean(-1, keepdim=True).add(1e-6).sqrt().to(y.dtype)
        return y - e if self.output == "release" else y


# ----------------------------------------------------------------------------------------- inverse dynamics and policy
def attend(q, k, v, see, causal):
    """Attention with more query heads (B, heads, T, size) than key heads (B, kv heads, S, size); see: a mask or None.

    CUDA's fast kernels take a mask or grouped heads, but not both: the slow one would hold all the (T, S) scores in
    float32. So with a mask the key heads are repeated there."""
    if see is not None and q.is_cuda:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    grouped = k.shape[1] < q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=see, is_causal=causal, enable_gqa=grouped)


class Block(nn.Module):
    """Pre-norm transformer block with the VLM's own width and head layout: grouped-query attention, rope, SwiGLU."""

    def __init__(self, width, heads, kv_heads, inner):
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.size)
        self.o = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTD, turn, see=None, cache=None, index=0):
        """turn: (B, 1, T, head size / 2), rope as complex numbers. see: (B, 1, T, S) bool, which keys a query may
        attend to; None: plain causal."""
        B, T, _ = x_BTD.shape
        qkv = self.qkv(self.norm1(x_BTD)).view(B, T, -1, self.size).transpose(1, 2)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), 1)
        pairs = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2)))  # rope turns each pair of neighbours
        q, k = torch.view_as_real(pairs * turn).flatten(-2).to(v.dtype).split((self.heads, self.kv_heads), 1)
        if cache is not None:
            k, v = cache.update(k, v, index)
        y = attend(q, k, v, see, causal=see is None and T > 1)
        x_BTD = x_BTD + self.o(y.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.gate_up(self.norm2(x_BTD)).chunk(2, -1)
        return x_BTD + self.down(F.silu(gate) * up)


class Stack(nn.Module):
    """Blocks + norm + linear: contexts (B, T, D) -> logits over the codes (B, T, K), causal. Inverse dynamics and
    policy."""

    def __init__(self, blocks, codes, width, heads, kv_heads, inner, theta):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, inner) for _ in range(blocks))
        self.norm, self.out = RMSNorm(width), nn.Linear(width, codes)
        size = width // heads
        self.register_buffer("freq", theta ** -(torch.arange(0, size, 2) / size), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("o.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * blocks) if into_residual else 0.02)

    def forward(self, e_BTD, mask_BS=None, cache=None):
        """mask_BS bool: the real tokens among those in the cache, if there is one, and these; None: no padding that
        matters (behind a causal mask, right padding is never seen). With a cache the new positions are appended to
        it."""
        T = e_BTD.shape[1]
        old = 0 if cache is None else cache.get_seq_length()
        if mask_BS is None and (not old or T == 1):
            see, pos_BT = None, torch.arange(old, old + T, device=e_BTD.device)[None]
        else:
            mask_BS = e_BTD.new_ones(len(e_BTD), old + T, dtype=torch.bool) if mask_BS is None else mask_BS
            see, pos_BT = visible(mask_BS, T), positions_of(mask_BS, T)
        angle = pos_BT[:, None, :, None].float() * self.freq
        turn, x = torch.polar(torch.ones_like(angle), angle), e_BTD
        for i, block in enumerate(self.blocks):
            x = block(x, turn, see, cache, i)
        with torch.autocast(x.device.type, enabled=False):  # few numbers, but all of the log-probabilities
            return F.linear(self.norm(x).float(), self.out.weight.float(), self.out.bias.float())


# ------------------------------------------------------------------------------------------------------------- together
class LatentModel(nn.Module):
    """Projector, inverse dynamics, codebook, world model, policy: all that this project trains on the latent side."""

    parts = ("projector", "inverse", "quantiser", "world", "policy")

    def __init__(
        self,
        config,
        codes=128,
        inverse_blocks=4,
        policy_blocks=8,
        merges=2,
        world_output="vlm",
        skip=True,
        project=True,
        tau=2.0,
        entropy_bonus=1e-3,
    ):
        """config: the VLM's text config; the blocks take over its width, heads and intermediate size.

        project False: no P, a text context is h itself (ablation). The other arguments are explained at their
        modules."""
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        rope = getattr(config, "rope_parameters", None) or {}
        shape = {
            "codes": codes,
            "width": D,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "inner": inner,
            "theta": rope.get("rope_theta", 1e6),
        }
        self.projector, self.project = Projector(D, skip), project
        self.inverse = Stack(inverse_blocks, **shape)
        self.quantiser = GumbelQuantiser(codes, D, tau, entropy_bonus)
        self.world = WorldModel(D, inner, merges, world_output)
        self.policy = Stack(policy_blocks, **shape)
        pack(self)

    def train_only(self, *parts):
        """Freeze everything, then unfreeze these parts. -> names of the parameters that train."""
        self.requires_grad_(False)
        for part in parts:
            getattr(self, part).requires_grad_(True)
        return [n for n, p in self.named_parameters() if p.requires_grad]

    def context(self, h_BTD, paired_B):
        """e^VT, the one definition: h where the row has an image, mu of P(h) where it is text alone.

        paired_B None: all rows have an image."""
        if not self.project or paired_B is None:
            return h_BTD
        mu = self.projector.P.mean(h_BTD).to(h_BTD.dtype)
        return torch.where(paired_B[:, None, None], h_BTD, mu)

    def inverse_logits(self, e_BTD):
        """Logits of a_t = f_inverse(e_{t+1}) -> (B, T-1, K). The last position has no next token, hence no action.

        The inverse dynamics is a causal stack: at position t+1 it sees e_1..e_{t+1}, and so x_{t+1} itself, the very
        token that a_t must help to predict. That leak is the idea, not a fault. All that gets through is one of K
        codes, too little to spell a token out of V; so the code has to say what the context e_t could not know. And
        the policy, which later stands in its place, sees e_1..e_t alone: it must do without the leak."""
        return self.inverse(e_BTD)[:, 1:]

    def infer_codes(self, e_BTD):
        """-> a_t (B, T-1) int64 = f_inverse(e_{t+1}), without noise."""
        return self.quantiser.choose(self.inverse_logits(e_BTD))

    def speak(self, e, a):
        """f_world: contexts e (..., D) and actions -> states (..., D) whose LM head logits are those of the next token.

        a: codes (...) int64, or code vectors (..., D), through which gradients flow."""
        if a.dtype == torch.long:
            return self.speaker()(e, a)
        return self.world(e, [merge.code_part(a) for merge in self.world.merges])

    def speaker(self):
        """-> `speak` for codes, with the codes' part of the merges worked out once: for a rollout, in which nothing
        trains."""
        tables = [merge.code_part(self.quantiser.vectors()) for merge in self.world.merges]

        def speak(e, a):
            return self.world(e, [(F.embedding(a, t1), F.embedding(a, t2)) for t1, t2 in tables])

        return speak


def inverse_loss(latent, vlm, e_BTD, batch):
    """L_inverse = - sum_t log f_world(x_{t+1} | e_t, a_t), a_t = f_inverse(e_{t+1}).

    Counted where x_{t+1} is a token to be explained (a response); the world model runs only there.
    -> dict: nll and the quantiser's auxiliary loss, both summed over M explained tokens; codes (M,) chosen without
    noise; logits (M, K) of the inverse model; entropy, the sum of its entropies in nats, without gradient."""
    explained = batch.explained_BT  # position t counts where token t+1 is explained
    logits_MK = latent.inverse_logits(e_BTD)[explained]
    c_MD, codes_M, auxiliary = latent.quantiser(logits_MK, batch.uniforms(logits_MK.shape[-1]))
    y_MD = latent.speak(e_BTD[:, :-1][explained], c_MD)
    nll = next_token_loss(vlm.head, y_MD, batch.ids_BT[:, 1:][explained])
    return {
        "nll": nll,
        "auxiliary": auxiliary,
        "codes": codes_M,
        "logits": logits_MK,
        "entropy": entropy(logits_MK.detach()).sum(),
    }
