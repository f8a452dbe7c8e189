"""Every module of the method, by hand, on top of a frozen Hugging Face vision-language model.

Legend: B batch, G group, N = B * G rows, T time, L prompt length, D width, K codes, V vocabulary.

    h     f_VLM's last hidden state, after its final norm                                  (B, T, D)
    e     the context e^VT: h where the row has an image, mu of P(h) where it has none     (B, T, D)
    c     a row of the codebook C (K, D): one latent action
    a_t   = f_inverse(e_{t+1}), learnt without labels; the policy pi(a_t | e_{<=t}) must guess it
    x_t+1 ~ f_world(e_t, c_{a_t}): LM head of merge(e_t, c)

ONE definition each of the context (`LatentModel.context`), of the world model (`WorldModel.forward`) and of the distribution
that is sampled and scored (`log_probs`), used by every stage, by the rollout and by the evaluation.
"""

import inspect
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageTextToText, DynamicCache
from transformers.utils import logging as hf_logging

from data import Batch, DataError

hf_logging.disable_progress_bar()  # one bar a run is enough


# ---------------------------------------------------------------------------------------------------- the VLM
class VLM(nn.Module):
    """Any Hugging Face image-text-to-text model, frozen: h = f_VLM(x), and the LM head."""

    def __init__(self, name, device="cpu", dtype=torch.float32):
        super().__init__()
        try:
            self.model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(device).eval().requires_grad_(False)
        except (OSError, ValueError, SafetensorError) as e:
            reason = str(e).strip().partition("\n")[0]
            raise DataError(f"--vlm {name}: not a loadable checkpoint ({reason})") from None
        self.body, self.head = self.model.base_model, self.model.get_output_embeddings()
        self.text = getattr(self.body, "language_model", self.body)
        self.config = self.model.config.get_text_config()
        self.accepts = set(inspect.signature(self.body.forward).parameters)

    def train_last(self, share):
        """The token-level baseline: unfreeze the last `share` of the blocks, the final norm, embeddings and head.

        -> the names of the parameters that train (the paper: share 8/36). A tied head is one parameter, named once."""
        count = max(1, round(share * len(self.text.layers)))
        for module in (*self.text.layers[-count:], self.text.norm, self.model.get_input_embeddings(), self.head):
            for p in module.parameters():
                p.requires_grad_(True)
        return [n for n, p in self.model.named_parameters() if p.requires_grad]

    def positions(self, batch):
        """-> (position ids, rope deltas (B, 1)); multimodal positions (3, B, T) where the model has them."""
        if hasattr(self.body, "get_rope_index"):
            return self.body.get_rope_index(batch.ids_BT, mm_token_type_ids=self._types(batch), image_grid_thw=batch.grids,
                                            attention_mask=batch.mask_BT.long())
        return (batch.mask_BT.long().cumsum(1) - 1).clamp(min=0), torch.zeros_like(batch.ids_BT[:, :1])

    def _types(self, batch):
        return (batch.ids_BT == self.model.config.image_token_id).int()

    def _body(self, **inputs):
        return self.body(**{k: v for k, v in inputs.items() if v is not None and k in self.accepts}).last_hidden_state

    def forward(self, batch, cache=None):
        """h_BTD for a whole batch. Positions and token types are explicit: without them the model is silently wrong."""
        return self._body(input_ids=batch.ids_BT, attention_mask=batch.mask_BT.long(), position_ids=self.positions(batch)[0],
                          pixel_values=batch.pixels, image_grid_thw=batch.grids, mm_token_type_ids=self._types(batch),
                          past_key_values=cache, use_cache=cache is not None)

    def step(self, ids_N1, mask_NS, deltas_N1, cache):
        """h_N1D of one more token a row; mask_NS covers the prompt and everything generated, this token included."""
        pos_N1 = mask_NS.sum(1, keepdim=True) - 1 + deltas_N1
        pos = pos_N1.expand(3, -1, -1) if hasattr(self.body, "get_rope_index") else pos_N1
        return self._body(input_ids=ids_N1, attention_mask=mask_NS.long(), position_ids=pos, past_key_values=cache, use_cache=True)


# ------------------------------------------------------------------------------------- transformer blocks and cache
class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class KVCache:
    """Keys and values of one stack, allocated once: (blocks, 2, rows, kv heads, length, head size)."""

    def __init__(self, stack, rows, length, like):
        b = stack.blocks[0]
        self.kv = like.new_zeros(len(stack.blocks), 2, rows, b.kv_heads, length, b.size)
        self.mask_NS = torch.zeros(rows, length, dtype=torch.bool, device=like.device)
        self.filled = 0

    def repeat(self, group):
        self.kv, self.mask_NS = self.kv.repeat_interleave(group, 2), self.mask_NS.repeat_interleave(group, 0)


class Block(nn.Module):
    """Pre-norm transformer block with the VLM's own width and head layout: grouped-query attention, rope, SwiGLU."""

    def __init__(self, width, heads, kv_heads, inner, theta):
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.k, self.v = nn.Linear(width, kv_heads * self.size), nn.Linear(width, kv_heads * self.size)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.register_buffer("freq", theta ** -(torch.arange(0, self.size, 2) / self.size), persistent=False)

    def rotate(self, x_BHTd, pos_BT):
        angle = pos_BT[:, None, :, None].float() * self.freq
        cos, sin = angle.cos().to(x_BHTd.dtype), angle.sin().to(x_BHTd.dtype)
        a, b = x_BHTd.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    def forward(self, x_BTD, pos_BT, see=None, kv=None, filled=0):
        """see: (B, 1, T, S) bool, which keys a query may attend to; None: plain causal."""
        B, T, _ = x_BTD.shape
        n = self.norm1(x_BTD)
        q = self.rotate(self.q(n).view(B, T, self.heads, self.size).transpose(1, 2), pos_BT)
        k = self.rotate(self.k(n).view(B, T, self.kv_heads, self.size).transpose(1, 2), pos_BT)
        v = self.v(n).view(B, T, self.kv_heads, self.size).transpose(1, 2)
        if kv is not None:
            kv[0, :, :, filled:filled + T], kv[1, :, :, filled:filled + T] = k, v
            k, v = kv[:, :, :, :filled + T]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=see, is_causal=see is None, enable_gqa=True)
        x_BTD = x_BTD + self.o(y.transpose(1, 2).reshape(B, T, -1))
        n = self.norm2(x_BTD)
        return x_BTD + self.down(F.silu(self.gate(n)) * self.up(n))


class Stack(nn.Module):
    """Blocks + norm + linear: contexts (B, T, D) -> logits over the codes (B, T, K), causal. Inverse dynamics and policy."""

    def __init__(self, blocks, codes, width, heads, kv_heads, inner, theta):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, inner, theta) for _ in range(blocks))
        self.norm, self.out = RMSNorm(width), nn.Linear(width, codes)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 if not name.endswith(("o.weight", "down.weight")) else 0.02 / math.sqrt(2 * blocks))

    def forward(self, e_BTD, mask_BT=None, cache=None):
        """mask_BT bool: real tokens; needed for left padding only (behind a causal mask, right padding is never seen).

        With a cache the new positions are appended to it; with T > 1 that is a prefill of an empty cache."""
        B, T, _ = e_BTD.shape
        x, see = e_BTD, None
        if cache is not None:
            cache.mask_NS[:, cache.filled:cache.filled + T] = True if mask_BT is None else mask_BT
            mask_BS = cache.mask_NS[:, :cache.filled + T]
            pos_BT = (mask_BS.cumsum(1) - 1)[:, -T:].clamp(min=0)
        elif mask_BT is not None:
            mask_BS, pos_BT = mask_BT, (mask_BT.cumsum(1) - 1).clamp(min=0)
        else:
            mask_BS, pos_BT = None, torch.arange(T, device=x.device).expand(B, T)
        if mask_BS is not None:  # a padded query sees itself, so that its softmax is not empty
            S = mask_BS.shape[1]
            at = torch.arange(S - T, S, device=x.device)[:, None]
            key = torch.arange(S, device=x.device)
            see = ((key <= at) & mask_BS[:, None, None, :]) | (key == at)
        for i, block in enumerate(self.blocks):
            x = block(x, pos_BT, see, None if cache is None else cache.kv[i], 0 if cache is None else cache.filled)
        if cache is not None:
            cache.filled += T
        return self.out(self.norm(x)).float()


# ------------------------------------------------------------------------------------------------------ projector
class Gaussian(nn.Module):
    """x -> (mu, log sigma^2), two MLPs; the log-variance ends in a tanh, so it lies in (-1, 1).

    skip: mu = x + MLP(x), starting at the identity (ours); otherwise mu = MLP(x), as the paper has it."""

    def __init__(self, width, skip=True):
        super().__init__()
        def mlp():
            return nn.Sequential(nn.Linear(width, width // 2), nn.Tanh(), nn.Linear(width // 2, width))
        self.mlp, self.logvar, self.skip = mlp(), mlp(), skip
        if skip:
            nn.init.zeros_(self.mlp[-1].weight), nn.init.zeros_(self.mlp[-1].bias)

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
        self.P, self.P_back = Gaussian(width, skip), Gaussian(width, skip)

    def paired_loss(self, h_VT_BSD, h_T_BSD, mask_BS):
        """L_t2vt + L_vt2t on aligned states of the same text token with and without the image; summed, not averaged."""
        return (gaussian_nll(h_VT_BSD, *self.P(h_T_BSD), mask_BS) + gaussian_nll(h_T_BSD, *self.P_back(h_VT_BSD), mask_BS))

    def cycle_loss(self, h_T_BTD, mask_BT):
        """L_cycle: P'(mu of P(e^T)) must return e^T; text-only rows, no image needed. Summed."""
        return gaussian_nll(h_T_BTD, *self.P_back(self.P(h_T_BTD)[0]), mask_BT)


# --------------------------------------------------------------------------------------- codebook and world model
def straight_through_gumbel(logits_BTK, tau=2.0):
    """One-hot of argmax(logits + g), g ~ Gumbel(0, 1), whose gradient is that of softmax((logits + g) / tau). float32."""
    u = torch.rand_like(logits_BTK).clamp_(1e-9, 1 - 1e-7)
    soft = F.softmax((logits_BTK - torch.log(-torch.log(u))) / tau, -1)
    hard = F.one_hot(soft.argmax(-1), logits_BTK.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())  # in this order: (1 + soft) - soft is 0.9999999 at times


def entropy(logits_BTK):
    """H(softmax(logits)) in nats -> (B, T)."""
    logp = F.log_softmax(logits_BTK, -1)
    return -(logp.exp() * logp).sum(-1)


class Merge(nn.Module):
    """x <- x + W3( silu(W1 [x; c]) * (W2 [x; c]) ), no bias. W3 starts at 0, so that the world model starts at the VLM."""

    def __init__(self, width, inner):
        super().__init__()
        self.w1, self.w2 = nn.Linear(2 * width, inner, bias=False), nn.Linear(2 * width, inner, bias=False)
        self.w3 = nn.Linear(inner, width, bias=False)
        nn.init.zeros_(self.w3.weight)

    def forward(self, x, c):
        xc = torch.cat((x, c), -1)
        return x + self.w3(F.silu(self.w1(xc)) * self.w2(xc))


class WorldModel(nn.Module):
    """f_world: y = merge(e_t, c_{a_t}); the logits of x_{t+1} are the VLM's LM head of y.

    output 'vlm' (ours): the merged state is normed back to e's own length, y = g * x * rms(e) / rms(x), so that before
    training y = e and the world model IS the VLM's prediction. The other two exist to be compared (README):
    'norm': y = RMSNorm(x). 'release': y = RMSNorm(x) - e, the formula of the authors' pretraining script."""

    def __init__(self, width, inner, merges=2, output="vlm"):
        super().__init__()
        self.merges, self.norm, self.output = nn.ModuleList(Merge(width, inner) for _ in range(merges)), RMSNorm(width), output

    def forward(self, e, c):
        """(..., D) contexts, (..., D) codes -> (..., D) state for the LM head."""
        x = e
        for merge in self.merges:
            x = merge(x, c)
        y = self.norm(x)
        if self.output == "vlm":
            return y * e.float().pow(2).mean(-1, keepdim=True).add(1e-6).sqrt().to(y.dtype)
        return y - e if self.output == "release" else y


class LatentModel(nn.Module):
    """Projector, inverse dynamics, codebook, world model, policy: all that this project trains on the latent side."""

    parts = ("projector", "inverse", "codebook", "world", "policy")

    def __init__(self, config, codes=128, inverse_blocks=4, policy_blocks=8, merges=2, world_output="vlm", skip=True):
        """config: the VLM's text config; the blocks take over its width, heads and intermediate size."""
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        rope = getattr(config, "rope_parameters", None) or {}
        shape = dict(codes=codes, width=D, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
                     inner=inner, theta=rope.get("rope_theta", 1e6))
        self.projector = Projector(D, skip)
        self.inverse = Stack(inverse_blocks, **shape)
        self.codebook = nn.Embedding(codes, D)
        self.world = WorldModel(D, inner, merges, world_output)
        self.policy = Stack(policy_blocks, **shape)

    def train_only(self, *parts):
        """Freeze everything, then unfreeze these parts. -> names of the parameters that train."""
        self.requires_grad_(False)
        for part in parts:
            getattr(self, part).requires_grad_(True)
        return [n for n, p in self.named_parameters() if p.requires_grad]

    def context(self, h_BTD, paired_B):
        """e^VT, the one definition: h where the row has an image, mu of P(h) where it is text alone."""
        if bool(paired_B.all()):
            return h_BTD
        mu = self.projector.P.mean(h_BTD).to(h_BTD.dtype)
        return torch.where(paired_B[:, None, None], h_BTD, mu)

    def infer_actions(self, e_BTD):
        """Logits of a_t = f_inverse(e_{t+1}) -> (B, T-1, K). The last position has no next token, hence no action."""
        return self.inverse(e_BTD)[:, 1:]


def next_token_loss(head, y_BTD, ids_BT, explained_BT):
    """- sum log softmax(head(y_t))[x_{t+1}] over the t where explained_BT is True; summed.

    y_BTD, explained_BT: positions 0..T-2, ids_BT: 0..T-1. The head runs only where a token is explained."""
    return F.cross_entropy(head(y_BTD[explained_BT]).float(), ids_BT[:, 1:][explained_BT], reduction="sum")


# ------------------------------------------------------------------------------------------------ sampling, rollout
def log_probs(logits, temperature=1.0, top_k=0, never=None):
    """Log-probabilities of the distribution that is sampled (float32, last axis): after the ban of `never` (indices),
    temperature and top-k. Sampling and scoring both call this, so they cannot differ."""
    logits = logits.float() / temperature
    if never is not None:
        logits = logits.index_fill(-1, never, -math.inf)
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], -math.inf)
    return F.log_softmax(logits, -1)


def sample(logp_NK, u_N):
    """Inverse-CDF sampling: the first index whose cumulative probability exceeds u in [0, 1)."""
    cdf = logp_NK.exp().cumsum(-1)
    return torch.searchsorted(cdf, (u_N.clamp(max=1 - 1e-6)[:, None] * cdf[:, -1:]), right=True)[:, 0].clamp(max=logp_NK.shape[-1] - 1)


def uniforms(seed, rows, length):
    """(len(rows), length) numbers in [0, 1). Each row's depend on (seed, row) alone, never on the rank or the batch.

    rows: a tuple of integers for each row, e.g. (step, example, sample)."""
    import numpy as np
    return torch.from_numpy(np.stack([np.random.default_rng([seed, *r]).random(length, dtype=np.float32) for r in rows]))


@dataclass
class Rollout:
    """G responses to each of B prompts (N = B * G rows, row b * G + g). What the RL update needs, nothing more."""
    prompt: Batch                     # left-padded prompts, B rows
    group: int
    tokens_NT: torch.Tensor           # sampled tokens, padding after EOS
    mask_NT: torch.Tensor             # bool: tokens up to and with EOS
    logp_NT: torch.Tensor             # of the actions (latent) or of the tokens, under the policy that sampled them
    actions_NT: torch.Tensor | None   # codes; None for a token-level rollout
    e_BLD: torch.Tensor | None        # contexts of the prompts, kept once a group
    e_NTD: torch.Tensor | None        # contexts of the sampled tokens: position t is the state after token t

    def contexts(self):
        """-> (e (N, L+T-1, D), mask (N, L+T-1)): what the policy read; its action t was taken at position L-1+t."""
        e = torch.cat((self.e_BLD.repeat_interleave(self.group, 0), self.e_NTD[:, :-1]), 1)
        return e, torch.cat((self.prompt.mask_BT.repeat_interleave(self.group, 0), self.mask_NT[:, :-1]), 1)


@torch.no_grad()
def rollout(vlm, latent, prompt, u_NT, *, group=1, temperature=1.0, top_k=0, never, eos, pad, actions="latent"):
    """Sample `group` responses of at most u_NT.shape[1] tokens for each left-padded prompt.

    latent: at each step a_t ~ policy (or arg max at temperature 0), x_{t+1} = arg max of f_world(e_t, c_{a_t}).
    token:  x_{t+1} ~ the VLM's own distribution. `never`: ids that are never sampled (image and vision tokens, ...).
    A prompt is prefilled once; then its caches (VLM and policy) are repeated for the group."""
    N, T = u_NT.shape
    device, L = prompt.ids_BT.device, prompt.ids_BT.shape[1]
    assert N == len(prompt.ids_BT) * group
    cache = DynamicCache(config=vlm.config)
    h_BLD = vlm(prompt, cache)
    deltas_N1 = vlm.positions(prompt)[1].repeat_interleave(group, 0)
    mask_NS = torch.cat((prompt.mask_BT.repeat_interleave(group, 0), torch.ones(N, T, dtype=torch.bool, device=device)), 1)
    paired_N = prompt.paired_B.repeat_interleave(group)
    cache.batch_repeat_interleave(group)
    e_BLD, e_N1D, logits_NK, states = None, h_BLD[:, -1:].repeat_interleave(group, 0), None, []
    if actions == "latent":
        e_BLD = latent.context(h_BLD, prompt.paired_B)
        policy_cache = KVCache(latent.policy, len(prompt.ids_BT), L + T, e_BLD)
        logits_NK = latent.policy(e_BLD, prompt.mask_BT, policy_cache)[:, -1].repeat_interleave(group, 0)
        policy_cache.repeat(group)
        e_N1D = e_BLD[:, -1:].repeat_interleave(group, 0)
    tokens_NT = torch.full((N, T), pad, device=device)
    actions_NT, logp_NT = torch.zeros_like(tokens_NT), torch.zeros(N, T, device=device)
    mask_NT, done_N = torch.zeros(N, T, dtype=torch.bool, device=device), torch.zeros(N, dtype=torch.bool, device=device)

    def choose(logits, t, banned):
        logp = log_probs(logits, temperature or 1.0, top_k, banned)
        pick = logp.argmax(-1) if temperature == 0 else sample(logp, u_NT[:, t])
        return pick, logp.gather(-1, pick[:, None])[:, 0]

    for t in range(T):
        if actions == "latent":
            actions_NT[:, t], logp_NT[:, t] = choose(logits_NK, t, None)
            y_ND = latent.world(e_N1D[:, 0], latent.codebook(actions_NT[:, t]).to(e_N1D.dtype))
            token_N = vlm.head(y_ND).float().index_fill(-1, never, -math.inf).argmax(-1)
        else:
            token_N, logp_NT[:, t] = choose(vlm.head(e_N1D[:, 0]), t, never)
        tokens_NT[:, t], mask_NT[:, t] = torch.where(done_N, pad, token_N), ~done_N
        done_N = done_N | (token_N == eos)
        if t + 1 == T or (t % 4 == 3 and bool(done_N.all())):  # the host looks at the device only every fourth step
            break
        h_N1D = vlm.step(tokens_NT[:, t:t + 1], mask_NS[:, :L + t + 1], deltas_N1, cache)
        e_N1D = h_N1D
        if actions == "latent":
            e_N1D = latent.context(h_N1D, paired_N)
            states.append(e_N1D)
            logits_NK = latent.policy(e_N1D, None, policy_cache)[:, -1]
    T = t + 1
    e_NTD = None
    if actions == "latent":
        e_NTD = torch.cat(states + [e_N1D.new_zeros(N, 1, e_N1D.shape[-1])], 1)
    return Rollout(prompt, group, tokens_NT[:, :T], mask_NT[:, :T], logp_NT[:, :T] * mask_NT[:, :T],
                   actions_NT[:, :T] if actions == "latent" else None, e_BLD, e_NTD)


def action_logits(policy, roll):
    """pi's logits for every action of a rollout, from the contexts it kept: no pass through the VLM. -> (N, T, K)"""
    e, mask = roll.contexts()
    return policy(e, mask)[:, roll.prompt.ids_BT.shape[1] - 1:]


def token_logits(vlm, roll):
    """The VLM's logits for every token of a rollout -> (N, T, V). Runs the whole VLM, with gradients where it trains."""
    g, p, L = roll.group, roll.prompt, roll.prompt.ids_BT.shape[1]
    pixels, grids = p.pixels, p.grids
    if grids is not None:  # each prompt's images again, group times
        grids_B = grids.split(p.images_B.tolist())
        pixels = torch.cat([x for part in pixels.split([int(b.prod(-1).sum()) for b in grids_B]) for x in [part] * g])
        grids = torch.cat([b for b in grids_B for _ in range(g)])
    ids = torch.cat((p.ids_BT.repeat_interleave(g, 0), roll.tokens_NT[:, :-1]), 1)
    mask = torch.cat((p.mask_BT.repeat_interleave(g, 0), roll.mask_NT[:, :-1]), 1)
    h = vlm(Batch(ids, mask, mask, p.images_B.repeat_interleave(g), pixels, grids, []))
    return vlm.head(h[:, L - 1:]).float()
