"""The frozen vision-language model: its states h, and the LM head's log-probabilities. Plumbing; the method is in
model.py.

    h       the VLM's hidden state at each position, after its last block and final norm    (B, T, D)
    log p   of next tokens, from the LM head; `log_probs` is the ONE definition of what is sampled and scored

Letters: B batch, G group, N = B * G rows, T time, S = keys that can be seen (earlier ones and these), M = explained
tokens of a batch in one row, D width, V vocabulary, k of top-k.
"""

import copy
import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText, PretrainedConfig
from transformers.utils import logging as hf_logging

from data import DataError, check_type, find
from packed_linear import Packed, PackedLinear, pack, product

hf_logging.disable_progress_bar()  # one bar a run is enough


# ------------------------------------------------------------------------------------------------- masks and positions
def visible(mask_BS, T):
    """Which of S keys each of the last T positions may attend to -> (B, 1, T, S) bool: the real ones up to itself.

    A padded query sees itself, so that its softmax is not empty."""
    S = mask_BS.shape[1]
    at = torch.arange(S - T, S, device=mask_BS.device)[:, None]
    key = torch.arange(S, device=mask_BS.device)
    return ((key <= at) & mask_BS[:, None, None, :]) | (key == at)


def positions_of(mask_BS, T):
    """The last T positions' numbers among the real tokens of their row, from 0 -> (B, T)."""
    return (mask_BS.cumsum(1) - 1)[:, -T:].clamp(min=0)


# -------------------------------------------------------------------------------------------------------------- the VLM
class OneBlock:
    """The part of a cache that belongs to one block, as far as the block's attention uses it."""

    def __init__(self, k, v):
        self.k, self.v = k, v

    def update(self, k, v, *_, **__):
        self.k = k if self.k is None else torch.cat((self.k, k), 2)
        self.v = v if self.v is None else torch.cat((self.v, v), 2)
        return self.k, self.v


class Recomputed:
    """A block of the VLM with gradient checkpointing. With a cache, its keys and values are inputs and outputs of the
    block: what is computed again must not be appended again. (The library's own checkpointing does without a cache.)"""

    def forward(self, hidden, past_key_values=None, **rest):
        inner, cached = super().forward, past_key_values is not None
        if not torch.is_grad_enabled():
            return inner(hidden, past_key_values=past_key_values, **rest)

        def run(hidden, k, v):  # lives until the backward pass; the whole cache must not live as long
            cache = OneBlock(k, v) if cached else None
            out = inner(hidden, past_key_values=cache, **rest)
            return (out, cache.k, cache.v) if cached else (out, None, None)

        if not cached:
            return checkpoint(run, hidden, None, None, use_reentrant=False)[0]
        layer = past_key_values.layers[self.self_attn.layer_idx]
        out, k, v = checkpoint(run, hidden, layer.keys, layer.values, use_reentrant=False)
        if not layer.is_initialized:
            layer.lazy_initialization(k, v)
        layer.keys, layer.values = k, v
        return out


def load_model(name, dtype):
    """-> the model of a folder or hub name, every tensor of it there; of a configuration with random weights.

    Code that lies beside a checkpoint is never run. DataError says why a checkpoint does not load."""
    if isinstance(name, PretrainedConfig):
        return AutoModelForImageTextToText.from_config(name, dtype=dtype)
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            find(name), dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except DataError:
        raise
    except Exception as e:  # whatever a broken folder makes the library raise
        reason = str(e).strip().partition("\n")[0][:200]
        raise DataError(f"--vlm {name}: not a loadable checkpoint of a vision-language model ({reason})") from None
    for fault, cure in (("missing_keys", "would be random"), ("mismatched_keys", "has another shape")):
        if info[fault]:
            raise DataError(
                f"--vlm {name}: the tensor '{min(map(str, info[fault]))}' {cure}; the checkpoint is damaged"
            )
    broken = next((n for n, p in model.named_parameters() if not torch.isfinite(p).all()), None)
    if broken:
        raise DataError(f"--vlm {name}: the tensor '{broken}' holds numbers that are not finite")
    return model


def check_kind(name, vlm):
    """Refuse a model that these files would run and get wrong: images that do not reach it, attention that forgets, a
    head that does more than one product."""
    layers = set(getattr(vlm.config, "layer_types", None) or ()) - {"full_attention"}
    shaping = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    faults = {
        "takes no pixel_values or no image_grid_thw": not {"pixel_values", "image_grid_thw"} <= vlm.accepts,
        f"has layers of the type {', '.join(sorted(layers))}": bool(layers),
        "has a bias in its LM head": vlm.head.bias is not None,
        "scales or caps its logits": any(getattr(vlm.config, k, None) not in (None, 1) for k in shaping),
    }
    for fault, found in faults.items():
        if found:
            raise DataError(f"--vlm {name}: {fault}; it must be a vision-language model of Qwen2.5-VL's kind")


class VLM(nn.Module):
    """A Hugging Face image-text-to-text model of a type in data.KINDS, frozen: h = f_VLM(x), and the LM head."""

    def __init__(self, name, device="cpu", dtype=torch.float32):
        """name: a folder or hub name, or a configuration (random weights, for the benchmark)."""
        super().__init__()
        self.model = load_model(name, dtype).to(device).eval().requires_grad_(False)
        check_type(name, self.model.config)
        self.body = self.model.base_model
        self.head = self.model.get_output_embeddings()
        self.text = getattr(self.body, "language_model", self.body)
        pack(self)
        self.config = self.model.config.get_text_config()
        self.accepts = set(inspect.signature(self.body.forward).parameters)
        check_kind(name, self)

    def train_last(self, share):
        """The token-level baseline: unfreeze the last `share` of the blocks, the final norm, embeddings and head.

        They become float32, whatever the rest is in: a small step would be lost in the rounding of bfloat16. What the
        embeddings give is rounded to the rest's dtype, as autocast rounds what a linear layer gives.
        -> the names of the parameters that train (the paper: share 8/36). A tied head is one parameter, named once."""
        count, embeddings = max(1, round(share * len(self.text.layers))), self.model.get_input_embeddings()
        dtype = embeddings.weight.dtype
        if dtype != torch.float32:
            embeddings.register_forward_hook(lambda module, given, x: x.to(dtype))
        for module in (*self.text.layers[-count:], self.text.norm, embeddings, self.head):
            for p in module.float().parameters():
                p.requires_grad_(True)
        return list(self.trained_tensors())

    def recompute_blocks(self):
        """Gradient checkpointing: a block keeps its input for the backward pass, and computes the rest again there."""
        for layer in self.text.layers:
            layer.__class__ = type("Recomputed", (Recomputed, type(layer)), {})

    def reference(self):
        """-> a copy of this VLM as it is now, frozen. What does not train is not copied: both share its tensors."""
        shared = {id(p): p for p in (*self.parameters(), *self.buffers()) if not p.requires_grad}
        return copy.deepcopy(self, shared).requires_grad_(False)

    def trained_tensors(self):
        """{name: parameter} of what trains; the rest of the VLM is the checkpoint given as --vlm."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def positions(self, batch):
        """-> (position ids, rope deltas (B, 1)); multimodal positions (3, B, T) where the model has them."""
        mask_BT = batch.mask_BT.long()
        if hasattr(self.body, "get_rope_index"):
            return self.body.get_rope_index(
                batch.ids_BT,
                mm_token_type_ids=self._types(batch),
                image_grid_thw=batch.grids,
                attention_mask=mask_BT,
            )
        return positions_of(mask_BT, mask_BT.shape[1]), torch.zeros_like(batch.ids_BT[:, :1])

    def forward(self, batch, cache=None, positions=None):
        """h_BTD for a whole batch. Positions and token types are explicit: without them the model is silently wrong."""
        return self._body(
            input_ids=batch.ids_BT,
            attention_mask=batch.mask_BT.long(),
            position_ids=(positions or self.positions(batch))[0],
            pixel_values=batch.pixels,
            image_grid_thw=batch.grids,
            mm_token_type_ids=self._types(batch),
            past_key_values=cache,
            use_cache=cache is not None,
        )

    def extend(self, ids_NT, mask_NS, deltas_N1, cache):
        """h_NTD of T more tokens a row. mask_NS covers the cache and these tokens; None: no padding anywhere."""
        T = ids_NT.shape[1]
        S = cache.get_seq_length() + T
        if mask_NS is None:
            see, pos_NT = None, torch.arange(S - T, S, device=ids_NT.device) + deltas_N1
        else:  # a ready-made mask: the library would look at a plain one's values in each step
            see, pos_NT = visible(mask_NS, T), positions_of(mask_NS, T) + deltas_N1
        if hasattr(self.body, "get_rope_index"):
            pos_NT = pos_NT.expand(3, -1, -1)
        return self._body(
            input_ids=ids_NT, attention_mask=see, position_ids=pos_NT, past_key_values=cache, use_cache=True
        )

    def scorer(self):
        """-> function: states (M, D) -> the LM head's logits (M, V), float32, as `HeadLogProbs` has them.

        For a rollout, in which nothing trains: under autocast the weight is cast once, and not at each token."""
        dtype = product_dtype(self.head.weight, self.head.weight)
        if dtype == torch.float32:
            return self.head  # may be packed
        return head_product(self.head.weight.to(dtype))

    def _types(self, batch):
        return (batch.ids_BT == self.model.config.image_token_id).int()

    def _body(self, **inputs):
        given = {k: v for k, v in inputs.items() if v is not None and k in self.accepts}
        return self.body(**given).last_hidden_state


# ------------------------------------------------------------------------------------ log-probabilities of the LM head
def product_dtype(x, weight):
    """The dtype of the factors of a product: autocast's where it is on, else the weight's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def head_product(weight_VD):
    """-> function: y (M, D) -> W y in float32 (M, V), without gradient. y is rounded to W's dtype, the sums are not.

    A product in bfloat16 would round its result as well: a logit of 16 would stand for all from 15.97 to 16.06. What
    is sampled with such logits has other log-probabilities than what is scored, and an arg max has ties.

    A CPU has no product of bfloat16 factors with a float32 result. So there both become float32, W once for all
    products."""
    low = weight_VD.dtype != torch.float32
    wide = wide_product(weight_VD) if low and not weight_VD.is_cuda else None

    def logits(y_MD):
        y_MD = y_MD.to(weight_VD.dtype)
        with torch.autocast(y_MD.device.type, enabled=False):
            if wide:
                return wide(y_MD.float())
            if low:
                return torch.mm(y_MD, weight_VD.T, out_dtype=torch.float32)
            return F.linear(y_MD, weight_VD)

    return logits


def wide_product(weight_VD):
    """-> `product` of a weight in float32. Where it is packed and the weight is frozen, it is kept beside the weight as
    long as that does not change: to make it costs as much as to multiply 200 rows by it."""
    if weight_VD.requires_grad or not PackedLinear.enabled:
        return product(weight_VD.float())
    version = weight_VD.data_ptr(), weight_VD._version
    if getattr(weight_VD, "wide", (None,))[0] != version:
        weight_VD.wide = Packed((version, product(weight_VD.float())))
    return weight_VD.wide[1]


def log_probs(logits, temperature=1.0, top_k=0, never=None, support=None):
    """Log-probabilities of the distribution that is sampled (float32, last axis): after the ban of `never` (indices),
    temperature and truncation, minus infinity outside. Sampling and scoring both call this, so they cannot differ.

    Truncation is to the k most likely when something is sampled (top_k; 0: none). When it is scored, it is to the
    very indices that could be sampled then, support (..., k) int64: other weights would rank others highest."""
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    if never is not None:
        logits = logits.index_fill(-1, never, -math.inf)
    if support is None and 0 < top_k < logits.shape[-1]:
        support = logits.topk(top_k, -1).indices
    if support is not None:
        outside = torch.ones_like(logits, dtype=torch.bool).scatter_(-1, support, False)
        logits = logits.masked_fill(outside, -math.inf)
    return F.log_softmax(logits, -1)


def put_p_minus_1(p_MV, ids_M):
    """p[x] <- p[x] - 1, which is minus the sum of the others: near 1 the difference itself would be rounded away."""
    at = torch.arange(len(p_MV)), ids_M
    p_MV[at] = 0
    p_MV[at] = -p_MV.sum(-1)


class HeadLogProbs(torch.autograd.Function):
    """log p(x | y), p = softmax of the LM head's logits W y (as `log_probs` shapes them), without holding all (M, V)
    of them.

    Works on a few rows at a time, LOGITS numbers in all. The gradient d log p(x) / d y = sum_v (1[v = x] - p_v) W[v] /
    temperature is worked out in the forward pass, while p is there; backward only scales it. The 1 is subtracted before
    the product: in bfloat16 W[x] - sum_v p_v W[v] would be a small difference of two rounded numbers where p is near 1.
    A head that trains (the token-level baseline) needs p once more, for d log p(x) / d W = (1[v = x] - p_v) y /
    temperature. Outside a truncated support p is 0, and so is its part of both gradients."""

    LOGITS = 2**23

    @staticmethod
    def chunk(ctx, y, head, ids, support):
        """-> (log p(x), p) of these rows; head: see `head_product`."""
        temperature, never = ctx.shape
        logp = log_probs(head(y), temperature, 0, never, support)
        return logp.gather(-1, ids[:, None])[:, 0], logp.exp_()

    @staticmethod
    def forward(ctx, y_MD, weight_VD, ids_M, with_entropy, temperature, never, support_Mk):
        rows = max(1, HeadLogProbs.LOGITS // len(weight_VD))
        ctx.shape, ctx.rows, ctx.dtype = (temperature, never), rows, product_dtype(y_MD, weight_VD)
        weight = weight_VD.to(ctx.dtype)
        head = head_product(weight)
        logp_M = y_MD.new_empty(len(ids_M), dtype=torch.float32)
        H_M = torch.zeros_like(logp_M)
        grad_MD = torch.empty_like(y_MD) if ctx.needs_input_grad[0] else None
        for i in range(0, len(ids_M), rows):
            part = slice(i, i + rows)
            support = None if support_Mk is None else support_Mk[part]
            logp_M[part], p = HeadLogProbs.chunk(ctx, y_MD[part], head, ids_M[part], support)
            if with_entropy:
                H_M[part] = torch.special.entr(p).sum(-1)
            if grad_MD is not None:
                put_p_minus_1(p, ids_M[part])
                grad_MD[part] = p.to(ctx.dtype) @ weight / -temperature
        for_weight = (y_MD, weight_VD, ids_M, support_Mk) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(grad_MD, *for_weight)
        ctx.mark_non_differentiable(H_M)
        return logp_M, H_M

    @staticmethod
    def backward(ctx, g_M, _):
        grad_MD, *for_weight = ctx.saved_tensors
        grad_y = None if grad_MD is None else grad_MD * g_M[:, None].to(grad_MD.dtype)
        grad_w = HeadLogProbs.weight_gradient(ctx, g_M, *for_weight) if for_weight else None
        return grad_y, grad_w, None, None, None, None, None

    @staticmethod
    def weight_gradient(ctx, g_M, y_MD, weight_VD, ids_M, support_Mk):
        grad_VD, head = torch.zeros_like(weight_VD), head_product(weight_VD.to(ctx.dtype))
        g_M = g_M / ctx.shape[0]  # the temperature
        for i in range(0, len(ids_M), ctx.rows):
            part = slice(i, i + ctx.rows)
            y = y_MD[part].to(ctx.dtype)
            support = None if support_Mk is None else support_Mk[part]
            _, p = HeadLogProbs.chunk(ctx, y, head, ids_M[part], support)
            put_p_minus_1(p, ids_M[part])
            grad_VD += p.mul_(-g_M[part, None]).to(ctx.dtype).T @ y
        return grad_VD


def head_log_probs(head, y_MD, ids_M, temperature=1.0, never=None, support_Mk=None):
    """-> (log p(ids_M) under `log_probs` of head(y_MD), entropy of p in nats, without gradient), float32 (M,).

    Differentiable in y and in the head's weight."""
    return HeadLogProbs.apply(y_MD, head.weight, ids_M, True, temperature, never, support_Mk)


def next_token_loss(head, y_MD, ids_M):
    """- sum log softmax(head(y))[x]; y_MD: the states of the explained positions alone, ids_M: the tokens that come
    next."""
    return -HeadLogProbs.apply(y_MD, head.weight, ids_M, False, 1.0, None, None)[0].sum()
