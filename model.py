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

import contextlib
import inspect
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageTextToText, DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging as hf_logging

from data import Batch, DataError

hf_logging.disable_progress_bar()  # one bar a run is enough


# ---------------------------------------------------------------------------------------------------- the VLM
class Packed(tuple):
    """(version, weight in oneDNN's own layout). It cannot be copied: a copied layer packs its own."""
    def __deepcopy__(self, memo):
        return Packed((None, None))


class PackedLinear(nn.Linear):
    """nn.Linear, whose product with few rows, without gradients, in float32 on a CPU, runs in oneDNN on a weight that was packed once.

    In a decoding step that is about twice as fast as BLAS, and equal up to rounding. Only for a weight that does not change: one
    that is frozen (its version counter tells if it was loaded anew), or, within `nothing_trains`, any (optimizers need not count)."""
    enabled = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
    packed, still = Packed((None, None)), None

    def forward(self, x):
        few = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32 and x.numel() <= 128 * x.shape[-1]
        version = PackedLinear.still if self.weight.requires_grad else (self.weight.data_ptr(), self.weight._version)
        if version is None or not few or not self.enabled or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        if self.packed[0] != version:
            self.packed = Packed((version, torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 8)))
        return torch.ops.mkldnn._linear_pointwise(x, self.packed[1], self.bias, "none", [], "")


@contextlib.contextmanager
def nothing_trains():
    """Promises that no weight changes inside: those that train are packed once, anew for each use of this."""
    PackedLinear.still = object()
    try:
        yield
    finally:
        PackedLinear.still = None


def pack(module):
    """Give every nn.Linear in `module` the faster product, where it is faster: not for small weights."""
    for m in module.modules():
        if type(m) is nn.Linear and m.weight.numel() >= 2 ** 17:
            m.__class__ = PackedLinear


class VLM(nn.Module):
    """Any Hugging Face image-text-to-text model, frozen: h = f_VLM(x), and the LM head."""

    def __init__(self, name, device="cpu", dtype=torch.float32):
        """name: a folder or hub name, or a configuration (random weights, for the benchmark)."""
        super().__init__()
        load = AutoModelForImageTextToText.from_config if isinstance(name, PretrainedConfig) else AutoModelForImageTextToText.from_pretrained
        try:
            self.model = load(name, dtype=dtype).to(device).eval().requires_grad_(False)
        except (OSError, ValueError, SafetensorError) as e:
            reason = str(e).strip().partition("\n")[0]
            raise DataError(f"--vlm {name}: not a loadable checkpoint ({reason})") from None
        self.body, self.head = self.model.base_model, self.model.get_output_embeddings()
        self.text = getattr(self.body, "language_model", self.body)
        pack(self)
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

    def forward(self, batch, cache=None, positions=None):
        """h_BTD for a whole batch. Positions and token types are explicit: without them the model is silently wrong."""
        position_ids = (positions or self.positions(batch))[0]
        return self._body(input_ids=batch.ids_BT, attention_mask=batch.mask_BT.long(), position_ids=position_ids,
                          pixel_values=batch.pixels, image_grid_thw=batch.grids, mm_token_type_ids=self._types(batch),
                          past_key_values=cache, use_cache=cache is not None)

    def extend(self, ids_NT, mask_NS, deltas_N1, cache):
        """h_NTD of T more tokens a row. mask_NS covers the cache and these tokens; None: no padding anywhere."""
        T, S = ids_NT.shape[1], cache.get_seq_length() + ids_NT.shape[1]
        if mask_NS is None:
            pos_NT = torch.arange(S - T, S, device=ids_NT.device) + deltas_N1
        else:
            pos_NT = positions_of(mask_NS, T) + deltas_N1
        pos = pos_NT.expand(3, -1, -1) if hasattr(self.body, "get_rope_index") else pos_NT
        see = None if mask_NS is None else visible(mask_NS, T)  # ready-made: the library looks at a plain mask's values each step
        return self._body(input_ids=ids_NT, attention_mask=see, position_ids=pos, past_key_values=cache, use_cache=True)


# ------------------------------------------------------------------------------------- transformer blocks and cache
class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).to(x.dtype)


def visible(mask_BS, T):
    """Which of S keys each of the last T positions may attend to -> (B, 1, T, S) bool: the real ones up to itself.

    A padded query sees itself, so that its softmax is not empty."""
    S = mask_BS.shape[1]
    at, key = torch.arange(S - T, S, device=mask_BS.device)[:, None], torch.arange(S, device=mask_BS.device)
    return ((key <= at) & mask_BS[:, None, None, :]) | (key == at)


def positions_of(mask_BS, T):
    """The last T positions' numbers among the real tokens of their row, from 0 -> (B, T)."""
    return (mask_BS.cumsum(1) - 1)[:, -T:].clamp(min=0)


class RoomyLayer(DynamicLayer):
    """Keys and values of one block. What comes after the prompt is written into memory allocated once, `room` tokens long:
    a step copies nothing. The prompt's own pass stays differentiable and costs no room."""

    def __init__(self, room):
        super().__init__()
        self.room, self.k_room, self.v_room = room, None, None

    def update(self, k, v, *_, **__):
        if not self.is_initialized:
            return super().update(k, v)
        old, more = self.keys.shape[2], k.shape[2]
        if self.k_room is None:
            self.k_room, self.v_room = (x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (k, v))
            self.k_room[:, :, :old], self.v_room[:, :, :old] = self.keys, self.values
        self.k_room[:, :, old:old + more], self.v_room[:, :, old:old + more] = k, v
        self.keys, self.values = self.k_room[:, :, :old + more], self.v_room[:, :, :old + more]
        return self.keys, self.values


def roomy_cache(blocks, room):
    """A cache for `blocks` blocks and `room` tokens, for the VLM and for our own stacks."""
    return Cache(layers=[RoomyLayer(room) for _ in range(blocks)])


class Block(nn.Module):
    """Pre-norm transformer block with the VLM's own width and head layout: grouped-query attention, rope, SwiGLU."""

    def __init__(self, width, heads, kv_heads, inner):
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.qkv, self.o = nn.Linear(width, (heads + 2 * kv_heads) * self.size), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x_BTD, turn, see=None, cache=None, index=0):
        """turn: (B, 1, T, head size / 2), rope as complex numbers. see: (B, 1, T, S) bool, which keys a query may attend to;
        None: plain causal."""
        B, T, _ = x_BTD.shape

        qkv = self.qkv(self.norm1(x_BTD)).view(B, T, -1, self.size).transpose(1, 2)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), 1)
        pairs = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2)))  # rope turns each pair of neighbours
        q, k = torch.view_as_real(pairs * turn).flatten(-2).to(v.dtype).split((self.heads, self.kv_heads), 1)
        if cache is not None:
            k, v = cache.update(k, v, index)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=see, is_causal=see is None and T > 1, enable_gqa=True)
        x_BTD = x_BTD + self.o(y.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.gate_up(self.norm2(x_BTD)).chunk(2, -1)
        return x_BTD + self.down(F.silu(gate) * up)


class Stack(nn.Module):
    """Blocks + norm + linear: contexts (B, T, D) -> logits over the codes (B, T, K), causal. Inverse dynamics and policy."""

    def __init__(self, blocks, codes, width, heads, kv_heads, inner, theta):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, inner) for _ in range(blocks))
        self.norm, self.out = RMSNorm(width), nn.Linear(width, codes)
        size = width // heads
        self.register_buffer("freq", theta ** -(torch.arange(0, size, 2) / size), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 if not name.endswith(("o.weight", "down.weight")) else 0.02 / math.sqrt(2 * blocks))

    def forward(self, e_BTD, mask_BS=None, cache=None):
        """mask_BS bool: the real tokens among those in the cache, if there is one, and these; None: no padding that matters
        (behind a causal mask, right padding is never seen). With a cache the new positions are appended to it."""
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
    """x <- x + W3( silu(W1 [x; c]) * (W2 [x; c]) ), no bias. W3 starts at 0, so that the world model starts at the VLM.

    W [x; c] is W_x x + W_c c, and there are only K different c: `tables` works out W_c C once for all of them."""

    def __init__(self, width, inner):
        super().__init__()
        self.w1_x, self.w1_c, self.w2_x, self.w2_c = (nn.Linear(width, inner, bias=False) for _ in range(4))
        self.w3 = nn.Linear(inner, width, bias=False)
        for w in (self.w1_x, self.w1_c, self.w2_x, self.w2_c):
            nn.init.uniform_(w.weight, -(2 * width) ** -0.5, (2 * width) ** -0.5)  # torch's own for 2 D inputs
        nn.init.zeros_(self.w3.weight)

    def tables(self, codes_KD):
        """-> (W1_c C, W2_c C), each (K, inner)."""
        return self.w1_c(codes_KD), self.w2_c(codes_KD)

    def forward(self, x, c1, c2):
        """x (..., D); c1, c2 (..., inner): the rows of the tables that belong to each position's action."""
        return x + self.w3(F.silu(self.w1_x(x) + c1) * (self.w2_x(x) + c2))


class WorldModel(nn.Module):
    """f_world: y = merge(e_t, c_{a_t}); the logits of x_{t+1} are the VLM's LM head of y.

    output 'vlm' (ours): the merged state is normed back to e's own length, y = g * x * rms(e) / rms(x), so that before
    training y = e and the world model IS the VLM's prediction. The other two exist to be compared (README):
    'norm': y = RMSNorm(x). 'release': y = RMSNorm(x) - e, the formula of the authors' pretraining script."""

    def __init__(self, width, inner, merges=2, output="vlm"):
        super().__init__()
        self.merges, self.norm, self.output = nn.ModuleList(Merge(width, inner) for _ in range(merges)), RMSNorm(width), output

    def tables(self, codes_KD):
        """What the merges make of each code of the codebook: computed once a rollout, or once a training step."""
        return [merge.tables(codes_KD) for merge in self.merges]

    def forward(self, e, a, tables):
        """e (..., D) contexts; a: actions, (...) int64 or one-hot (..., K) floats (straight-through) -> (..., D) for the LM head."""
        x = e
        for merge, (t1, t2) in zip(self.merges, tables):
            c1, c2 = (F.embedding(a, t) if a.dtype == torch.long else a.to(t.dtype) @ t for t in (t1, t2))
            x = merge(x, c1.to(x.dtype), c2.to(x.dtype))
        y = self.norm(x)
        if self.output == "vlm":
            return y * e.float().pow(2).mean(-1, keepdim=True).add(1e-6).sqrt().to(y.dtype)
        return y - e if self.output == "release" else y


class LatentModel(nn.Module):
    """Projector, inverse dynamics, codebook, world model, policy: all that this project trains on the latent side."""

    parts = ("projector", "inverse", "codebook", "world", "policy")

    def __init__(self, config, codes=128, inverse_blocks=4, policy_blocks=8, merges=2, world_output="vlm", skip=True, project=True):
        """config: the VLM's text config; the blocks take over its width, heads and intermediate size. project False: no P (ablation)."""
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        rope = getattr(config, "rope_parameters", None) or {}
        shape = dict(codes=codes, width=D, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
                     inner=inner, theta=rope.get("rope_theta", 1e6))
        self.projector, self.project = Projector(D, skip), project
        self.inverse = Stack(inverse_blocks, **shape)
        self.codebook = nn.Embedding(codes, D)
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
        """e^VT, the one definition: h where the row has an image, mu of P(h) where it is text alone. paired_B None: all have one."""
        if not self.project or paired_B is None:
            return h_BTD
        mu = self.projector.P.mean(h_BTD).to(h_BTD.dtype)
        return torch.where(paired_B[:, None, None], h_BTD, mu)

    def infer_actions(self, e_BTD):
        """Logits of a_t = f_inverse(e_{t+1}) -> (B, T-1, K). The last position has no next token, hence no action."""
        return self.inverse(e_BTD)[:, 1:]


# ------------------------------------------------------------------------------------------ log-probabilities, losses
def log_probs(logits, temperature=1.0, top_k=0, never=None):
    """Log-probabilities of the distribution that is sampled (float32, last axis): after the ban of `never` (indices),
    temperature and top-k. Sampling and scoring both call this, so they cannot differ."""
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    if never is not None:
        logits = logits.index_fill(-1, never, -math.inf)
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], -math.inf)
    return F.log_softmax(logits, -1)


class HeadLogProbs(torch.autograd.Function):
    """log p(x | y), p = softmax of the LM head's logits W y (as `log_probs` shapes them), without holding all (M, V) of them.

    Works on a few rows at a time, LOGITS numbers in all. The gradient d log p(x) / d y = (W[x] - sum_v p_v W[v]) / temperature is
    worked out in the forward pass, while p is there; backward only scales it. A head that trains (the token-level baseline) needs
    p once more, for d log p(x) / d W = (1[v = x] - p_v) y / temperature."""
    LOGITS = 2 ** 23

    @staticmethod
    def chunk(y, weight, ids, shape):
        """-> (log p(x), p) of these rows."""
        logp = log_probs(F.linear(y, weight), *shape)
        return logp.gather(-1, ids[:, None])[:, 0], logp.exp_()

    @staticmethod
    def forward(ctx, y_MD, weight_VD, ids_M, with_entropy, *shape):
        rows = max(1, HeadLogProbs.LOGITS // len(weight_VD))
        logp_M, H_M = y_MD.new_empty(len(ids_M), dtype=torch.float32), y_MD.new_zeros(len(ids_M), dtype=torch.float32)
        grad_MD = torch.empty_like(y_MD) if ctx.needs_input_grad[0] else None
        for i in range(0, len(ids_M), rows):
            part = slice(i, i + rows)
            logp_M[part], p = HeadLogProbs.chunk(y_MD[part], weight_VD, ids_M[part], shape)
            if with_entropy:
                H_M[part] = torch.special.entr(p).sum(-1)
            if grad_MD is not None:
                grad_MD[part] = (weight_VD[ids_M[part]] - p.to(weight_VD.dtype) @ weight_VD) / shape[0]
        ctx.save_for_backward(grad_MD, *((y_MD, weight_VD, ids_M) if ctx.needs_input_grad[1] else ()))
        ctx.shape, ctx.rows = shape, rows
        ctx.mark_non_differentiable(H_M)
        return logp_M, H_M

    @staticmethod
    def backward(ctx, g_M, _):
        grad_MD, *trains = ctx.saved_tensors
        grad_VD = None
        if trains:
            y_MD, weight_VD, ids_M = trains
            grad_VD = torch.zeros_like(weight_VD)
            for i in range(0, len(ids_M), ctx.rows):
                part = slice(i, i + ctx.rows)
                y = y_MD[part].to(weight_VD.dtype)
                _, p = HeadLogProbs.chunk(y, weight_VD, ids_M[part], ctx.shape)
                g = p.mul_(-g_M[part, None] / ctx.shape[0])
                g[torch.arange(len(g)), ids_M[part]] += g_M[part] / ctx.shape[0]
                grad_VD += g.T @ y
        grad_y = None if grad_MD is None else grad_MD * g_M[:, None].to(grad_MD.dtype)
        return grad_y, grad_VD, None, None, *[None] * len(ctx.shape)


def head_log_probs(head, y_MD, ids_M, temperature=1.0, top_k=0, never=None):
    """-> (log p(ids_M) under `log_probs` of head(y_MD), entropy of p in nats, without gradient), float32 (M,). Differentiable in
    y and in the head's weight."""
    return HeadLogProbs.apply(y_MD, head.weight, ids_M, True, temperature, top_k, never)


def next_token_loss(head, y_MD, ids_M):
    """- sum log softmax(head(y))[x], summed; y_MD: the states of the explained positions alone, ids_M: the tokens that come next."""
    return -HeadLogProbs.apply(y_MD, head.weight, ids_M, False, 1.0, 0, None)[0].sum()


# ------------------------------------------------------------------------------------------------ sampling, rollout
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


@torch.no_grad()
@nothing_trains()
def rollout(vlm, latent, prompt, u_NT, *, group=1, temperature=1.0, top_k=0, never, eos, pad, actions="latent"):
    """Sample `group` responses of at most u_NT.shape[1] tokens for each left-padded prompt.

    latent: at each step a_t ~ policy (or arg max at temperature 0), x_{t+1} = arg max of f_world(e_t, c_{a_t}).
    token:  x_{t+1} ~ the VLM's own distribution. `never`: ids that are never sampled (image and vision tokens, ...).
    A prompt is prefilled once; then its caches (VLM and policy) are repeated for the group."""
    N, T = u_NT.shape
    device, L = prompt.ids_BT.device, prompt.ids_BT.shape[1]
    assert N == len(prompt.ids_BT) * group
    positions = vlm.positions(prompt)
    cache = roomy_cache(len(vlm.text.layers), L + T)
    h_BLD = vlm(prompt, cache, positions)
    cache.batch_repeat_interleave(group)
    deltas_N1 = positions[1].repeat_interleave(group, 0)
    paired_N = None if bool(prompt.paired_B.all()) else prompt.paired_B.repeat_interleave(group)  # asked once, not at each token
    mask_NS = None  # where no prompt is padded, nothing is
    if prompt.padded:
        mask_NS = torch.cat((prompt.mask_BT.repeat_interleave(group, 0), torch.ones(N, T, dtype=torch.bool, device=device)), 1)
    e_BLD, e_N1D, logits_NK, states = None, h_BLD[:, -1:].repeat_interleave(group, 0), None, []
    if actions == "latent":
        tables = latent.world.tables(latent.codebook.weight)
        e_BLD = latent.context(h_BLD, prompt.paired_B)
        policy_cache = roomy_cache(len(latent.policy.blocks), L + T)
        logits_NK = latent.policy(e_BLD, None if mask_NS is None else prompt.mask_BT, policy_cache)[:, -1].repeat_interleave(group, 0)
        policy_cache.batch_repeat_interleave(group)
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
            y_ND = latent.world(e_N1D[:, 0], actions_NT[:, t], tables)
            token_N = vlm.head(y_ND).index_fill_(-1, never, -math.inf).argmax(-1)
        else:
            token_N, logp_NT[:, t] = choose(vlm.head(e_N1D[:, 0]), t, never)
        tokens_NT[:, t], mask_NT[:, t] = torch.where(done_N, pad, token_N), ~done_N
        done_N = done_N | (token_N == eos)
        if t + 1 == T or (t % 4 == 3 and bool(done_N.all())):  # the host looks at the device only every fourth step
            break
        seen_NS = None if mask_NS is None else mask_NS[:, :L + t + 1]
        h_N1D = e_N1D = vlm.extend(tokens_NT[:, t:t + 1], seen_NS, deltas_N1, cache)
        if actions == "latent":
            e_N1D = latent.context(h_N1D, paired_N)
            states.append(e_N1D)
            logits_NK = latent.policy(e_N1D, seen_NS, policy_cache)[:, -1]
    T = t + 1
    e_NTD = None
    if actions == "latent":
        e_NTD = torch.cat(states + [e_N1D.new_zeros(N, 1, e_N1D.shape[-1])], 1)
    return Rollout(prompt, group, tokens_NT[:, :T], mask_NT[:, :T], logp_NT[:, :T] * mask_NT[:, :T],
                   actions_NT[:, :T] if actions == "latent" else None, e_BLD, e_NTD)


def action_logits(policy, roll):
    """pi's logits for every action of a rollout, from the contexts it kept: no pass through the VLM. -> (N, T, K)

    A prompt is read once for its whole group, as in `rollout`: the responses attend to its keys and values."""
    cache, prompt_BL = DynamicCache(), roll.prompt.mask_BT
    first_B1K = policy(roll.e_BLD, prompt_BL if roll.prompt.padded else None, cache)[:, -1:]
    cache.batch_repeat_interleave(roll.group)
    mask_NS = torch.cat((prompt_BL.repeat_interleave(roll.group, 0), roll.mask_NT[:, :-1]), 1)
    return torch.cat((first_B1K.repeat_interleave(roll.group, 0), policy(roll.e_NTD[:, :-1], mask_NS, cache)), 1)


def token_states(vlm, roll):
    """The VLM's states (N, T, D) from which the tokens of a rollout were sampled: one pass through the whole VLM, with gradients
    where it trains. A prompt and its images are read once for the group, as for the latent policy."""
    cache, positions = DynamicCache(config=vlm.config), vlm.positions(roll.prompt)
    first_B1D = vlm(roll.prompt, cache, positions)[:, -1:]
    cache.batch_repeat_interleave(roll.group)
    mask_NS = torch.cat((roll.prompt.mask_BT.repeat_interleave(roll.group, 0), roll.mask_NT[:, :-1]), 1)
    h_NTD = vlm.extend(roll.tokens_NT[:, :-1], mask_NS, positions[1].repeat_interleave(roll.group, 0), cache)
    return torch.cat((first_B1D.repeat_interleave(roll.group, 0), h_NTD), 1)
