"""The rollout: G responses to each of B prompts, sampled by latent actions or by tokens, and their log-probabilities.

    latent   a_t ~ pi(a | e_{<=t}),  x_{t+1} = arg max of f_world(e_t, c_{a_t})   only the policy is random
    token    x_{t+1} ~ the VLM's own next-token distribution                      the baseline

A prompt is read once; its keys and values are then repeated for its group (`VLMDecoder`, `PolicyDecoder`: prefill,
then steps). The update of stage 4 reads the same rollout once more with gradients (`action_logits`, `token_states`),
by the same decoders. Letters: see model.py; S is the number of keys that can be seen: the prompt's L tokens and those
said so far.
"""

import math
from dataclasses import dataclass, replace

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from data import Batch
from packed_linear import nothing_trains
from vlm import head_log_probs, log_probs


# ---------------------------------------------------------------------------------------------------- caches, decoders
class RoomyLayer(DynamicLayer):
    """Keys and values of one block. What comes after the prompt is written into memory allocated once, `room` tokens
    long: a step copies nothing. The prompt's own pass stays differentiable and costs no room."""

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
        self.k_room[:, :, old : old + more], self.v_room[:, :, old : old + more] = k, v
        self.keys, self.values = self.k_room[:, :, : old + more], self.v_room[:, :, : old + more]
        return self.keys, self.values


def roomy_cache(blocks, room):
    """A cache for `blocks` blocks and `room` tokens, for the VLM and for our own stacks."""
    return Cache(layers=[RoomyLayer(room) for _ in range(blocks)])


class VLMDecoder:
    """The VLM's states of N = B * group rows, a few tokens at a time."""

    def __init__(self, vlm, cache):
        self.vlm, self.cache, self.deltas_N1 = vlm, cache, None

    def prefill(self, prompt, group):
        """-> h_BLD of the prompts, read once; then their keys and values are repeated for the group."""
        positions = self.vlm.positions(prompt)
        h_BLD = self.vlm(prompt, self.cache, positions)
        self.cache.batch_repeat_interleave(group)
        self.deltas_N1 = positions[1].repeat_interleave(group, 0)
        return h_BLD

    def step(self, ids_NT, mask_NS):
        """-> h_NTD of T more tokens; mask_NS: see `VLM.extend`."""
        return self.vlm.extend(ids_NT, mask_NS, self.deltas_N1, self.cache)


class PolicyDecoder:
    """The policy's logits for N = B * group rows, a few contexts at a time."""

    def __init__(self, policy, cache):
        self.policy, self.cache = policy, cache

    def prefill(self, e_BLD, mask_BL, group):
        """-> logits (N, 1, K) of the first action; the prompts' contexts are read once."""
        logits_B1K = self.policy(e_BLD, mask_BL, self.cache)[:, -1:]
        self.cache.batch_repeat_interleave(group)
        return logits_B1K.repeat_interleave(group, 0)

    def step(self, e_NTD, mask_NS):
        """-> logits (N, T, K) after T more contexts."""
        return self.policy(e_NTD, mask_NS, self.cache)


# ------------------------------------------------------------------------------------------------------------ sampling
def sample(logp_NK, u_N):
    """Inverse-CDF sampling: the first index whose cumulative probability exceeds u in [0, 1)."""
    cdf = logp_NK.exp().cumsum(-1)
    pick = torch.searchsorted(cdf, u_N.clamp(max=1 - 1e-6)[:, None] * cdf[:, -1:], right=True)
    return pick[:, 0].clamp(max=logp_NK.shape[-1] - 1)


def choose(logits_NK, u_N, temperature, top_k, never=None):
    """-> (what is sampled, or the arg max at temperature 0, (N,); its log-probability (N,); the top k indices from
    which it was sampled, (N, k) int64, or None without truncation)."""
    logp_NK = log_probs(logits_NK, temperature or 1.0, top_k, never)
    pick_N = logp_NK.argmax(-1) if temperature == 0 else sample(logp_NK, u_N)
    support_Nk = logp_NK.topk(top_k, -1).indices if 0 < top_k < logp_NK.shape[-1] else None
    return pick_N, logp_NK.gather(-1, pick_N[:, None])[:, 0], support_Nk


# --------------------------------------------------------------------------------------------------------- the rollouts
@dataclass
class Rollout:
    """G responses to each of B prompts (N = B * G rows, row b * G + g). What the RL update needs, nothing more."""

    prompt: Batch  # left-padded prompts, B rows
    group: int
    tokens_NT: torch.Tensor  # sampled tokens, padding after EOS
    mask_NT: torch.Tensor  # bool: tokens up to and with EOS
    logp_NT: torch.Tensor  # of the actions (latent) or of the tokens, under the policy that sampled them
    actions_NT: torch.Tensor | None = None  # codes; None for a token-level rollout
    e_BLD: torch.Tensor | None = None  # contexts of the prompts, kept once a group
    e_NTD: torch.Tensor | None = None  # contexts of the sampled tokens: position t is the state after token t
    support_NTk: torch.Tensor | None = None  # with top-k: the indices that each action or token was sampled from

    def rows(self, part):
        """The rows `part`, a slice of whole groups or inside one group, as a Rollout: for updates in micro-batches."""
        start, stop = part.start, min(part.stop, len(self.tokens_NT))
        prompts = slice(start // self.group, -(-stop // self.group))
        inside = prompts.stop - prompts.start == 1
        if not inside and (start % self.group or stop % self.group):
            raise ValueError(f"rows {start} to {stop} cut a group of {self.group} and take others along")
        group = stop - start if inside else self.group
        names = ("tokens_NT", "mask_NT", "logp_NT", "actions_NT", "e_NTD", "support_NTk")
        cut = {k: None if getattr(self, k) is None else getattr(self, k)[part] for k in names}
        e_BLD = None if self.e_BLD is None else self.e_BLD[prompts]
        return Rollout(self.prompt.rows(prompts), group, e_BLD=e_BLD, **cut)

    def put(self, rows, other, pad):
        """This rollout with other responses in the rows `rows` (a list), those of `other`, to the same prompts."""
        length = max(self.tokens_NT.shape[1], other.tokens_NT.shape[1])
        changed = {}
        for name in ("tokens_NT", "mask_NT", "logp_NT", "actions_NT", "e_NTD", "support_NTk"):
            old, new = getattr(self, name), getattr(other, name)
            if old is not None:
                value = pad if name == "tokens_NT" else 0
                changed[name] = filled(old, length, value).index_copy(
                    0, torch.tensor(rows, device=old.device), filled(new, length, value)
                )
        return replace(self, **changed)

    def seen_NS(self):
        """bool (N, L + T - 1): the real tokens of prompt and response, the last token of a response left out."""
        return torch.cat((self.prompt.mask_BT.repeat_interleave(self.group, 0), self.mask_NT[:, :-1]), 1)


def filled(x_NT, length, value):
    """x (N, T, ...) -> (N, length, ...), with `value` behind."""
    N, T, *rest = x_NT.shape
    return torch.cat((x_NT, x_NT.new_full((N, length - T, *rest), value)), 1)


class Said:
    """What N rows have said so far: tokens up to and with EOS, padding behind it."""

    def __init__(self, prompt, group, length, eos, pad, ended=None, heard=None):
        device, N = prompt.ids_BT.device, len(prompt.ids_BT) * group
        self.eos, self.pad, self.ended, self.heard = eos, pad, ended, heard
        self.tokens_NT = torch.full((N, length), pad, device=device)
        self.mask_NT = torch.zeros(N, length, dtype=torch.bool, device=device)
        self.logp_NT = torch.zeros(N, length, device=device)
        self.done_N = torch.zeros(N, dtype=torch.bool, device=device)
        self.told_N = self.done_N  # rows of which `ended` knows
        self.seen_NS = None  # where no prompt is padded, nothing is
        if prompt.padded:
            response = torch.ones(N, length, dtype=torch.bool, device=device)
            self.seen_NS = torch.cat((prompt.mask_BT.repeat_interleave(group, 0), response), 1)
        self.supports = []  # with top-k
        self.L, self.length = prompt.ids_BT.shape[1], 0

    def add(self, token_N, logp_N, support_Nk, a_N=None):
        """One more token a row, the log-probability of what was sampled (the action, or the token), its support, and
        the action, if there is one.

        -> True when all rows have ended, or whoever listens has heard enough. The host looks at the device for the
        former in every fourth step only."""
        t = self.length
        self.tokens_NT[:, t] = torch.where(self.done_N, self.pad, token_N)
        self.mask_NT[:, t] = ~self.done_N
        self.logp_NT[:, t] = logp_N
        if support_Nk is not None:
            self.supports.append(support_Nk)
        self.done_N = self.done_N | (token_N == self.eos)
        self.length += 1
        if self.ended and t % 4 == 3:
            self.tell()
        if self.heard and self.heard(token_N, a_N):
            return True
        return self.length == self.tokens_NT.shape[1] or (t % 4 == 3 and bool(self.done_N.all()))

    def tell(self):
        """Call `ended` for each row that has ended since the last time, with its tokens up to EOS."""
        rows = (self.done_N & ~self.told_N).nonzero()[:, 0]
        self.told_N = self.done_N
        for n, row in zip(rows.tolist(), self.tokens_NT[rows].tolist()):
            self.ended(n, row[: row.index(self.eos)])

    def last(self):
        """-> (the newest tokens (N, 1), the mask of all that they can see): what a decoder's step takes."""
        seen_NS = None if self.seen_NS is None else self.seen_NS[:, : self.L + self.length]
        return self.tokens_NT[:, self.length - 1 : self.length], seen_NS

    def rollout(self, prompt, group, **kept):
        T = self.length
        mask_NT = self.mask_NT[:, :T]
        kept["support_NTk"] = torch.stack(self.supports, 1) if self.supports else None
        return Rollout(prompt, group, self.tokens_NT[:, :T], mask_NT, self.logp_NT[:, :T] * mask_NT, **kept)


@torch.no_grad()
@nothing_trains()
def rollout_latent(
    vlm, latent, prompt, u_NT, *, group=1, temperature=1.0, top_k=0, never, eos, pad, ended=None, heard=None, steer=None
):
    """At each step a_t ~ policy (or the arg max at temperature 0), then x_{t+1} = arg max of f_world(e_t, c_{a_t}).

    u_NT: uniforms for N = B * group rows and at most T tokens; `never`: ids that are never said. -> Rollout

    ended: called as ended(row, tokens without EOS) soon after a row has said EOS, while others still speak.
    heard: called as heard(tokens (N,), codes (N,)) after each step; if it returns True, the rollout ends there.
    steer: called as steer(t, the policy's logits (N, K)) before the action at t; it is sampled from the logits that
    this returns. To force a code, all others become minus infinity."""
    room = prompt.ids_BT.shape[1] + u_NT.shape[1]
    encoder = VLMDecoder(vlm, roomy_cache(len(vlm.text.layers), room))
    policy = PolicyDecoder(latent.policy, roomy_cache(len(latent.policy.blocks), room))
    speak, logits_of = latent.speaker(), vlm.scorer()
    said = Said(prompt, group, u_NT.shape[1], eos, pad, ended, heard)
    # asked once, not at each token; None: every prompt has an image
    paired_N = None if bool(prompt.paired_B.all()) else prompt.paired_B.repeat_interleave(group)

    e_BLD = latent.context(encoder.prefill(prompt, group), prompt.paired_B)
    logits_N1K = policy.prefill(e_BLD, prompt.mask_BT if prompt.padded else None, group)
    e_N1D = e_BLD[:, -1:].repeat_interleave(group, 0)
    actions, contexts = [], []
    for t in range(u_NT.shape[1]):
        logits_NK = steer(t, logits_N1K[:, -1]) if steer else logits_N1K[:, -1]
        a_N, logp_N, support_Nk = choose(logits_NK, u_NT[:, t], temperature, top_k)
        y_ND = speak(e_N1D[:, 0], a_N)
        token_N = logits_of(y_ND).index_fill_(-1, never, -math.inf).argmax(-1)
        actions.append(a_N)
        if said.add(token_N, logp_N, support_Nk, a_N):
            break
        token_N1, seen_NS = said.last()
        e_N1D = latent.context(encoder.step(token_N1, seen_NS), paired_N)
        logits_N1K = policy.step(e_N1D, seen_NS)
        contexts.append(e_N1D)
    contexts.append(torch.zeros_like(e_N1D))  # nothing comes after the last token
    return said.rollout(prompt, group, actions_NT=torch.stack(actions, 1), e_BLD=e_BLD, e_NTD=torch.cat(contexts, 1))


@torch.no_grad()
@nothing_trains()
def rollout_token(vlm, prompt, u_NT, *, group=1, temperature=1.0, top_k=0, never, eos, pad, ended=None, heard=None):
    """At each step x_{t+1} ~ the VLM's own distribution (or its arg max at temperature 0). Arguments as above. ->
    Rollout. heard gets None in place of the codes."""
    room = prompt.ids_BT.shape[1] + u_NT.shape[1]
    decoder, logits_of = VLMDecoder(vlm, roomy_cache(len(vlm.text.layers), room)), vlm.scorer()
    said = Said(prompt, group, u_NT.shape[1], eos, pad, ended, heard)
    h_N1D = decoder.prefill(prompt, group)[:, -1:].repeat_interleave(group, 0)
    for t in range(u_NT.shape[1]):
        token_N, logp_N, support_Nk = choose(logits_of(h_N1D[:, 0]), u_NT[:, t], temperature, top_k, never)
        if said.add(token_N, logp_N, support_Nk):
            break
        h_N1D = decoder.step(*said.last())
    return said.rollout(prompt, group)


def rollout(vlm, latent, prompt, u_NT, **settings):
    """rollout_latent, or without a latent model rollout_token."""
    if latent is None:
        return rollout_token(vlm, prompt, u_NT, **settings)
    return rollout_latent(vlm, latent, prompt, u_NT, **settings)


def decode(tokenizer, roll, eos):
    """Rollout -> N texts, without EOS."""
    rows = zip(roll.tokens_NT.tolist(), roll.mask_NT.tolist())
    return [tokenizer.decode([t for t, m in zip(row, mask) if m and t != eos]) for row, mask in rows]


# ---------------------------------------------------------------------------------- the log-probabilities of a rollout
def action_logits(policy, roll):
    """pi's logits for every action of a rollout, from the contexts it kept: no pass through the VLM. -> (N, T, K)"""
    decoder = PolicyDecoder(policy, DynamicCache())
    first_N1K = decoder.prefill(roll.e_BLD, roll.prompt.mask_BT if roll.prompt.padded else None, roll.group)
    if roll.tokens_NT.shape[1] == 1:  # a response of one token needs no state but the prompt's
        return first_N1K
    return torch.cat((first_N1K, decoder.step(roll.e_NTD[:, :-1], roll.seen_NS())), 1)


def token_states(vlm, roll):
    """The VLM's states (N, T, D) from which the tokens of a rollout were sampled: one pass through the whole VLM, with
    gradients where it trains. A prompt and its images are read once for the group, as for the latent policy."""
    decoder = VLMDecoder(vlm, DynamicCache(config=vlm.config))
    first_N1D = decoder.prefill(roll.prompt, roll.group)[:, -1:].repeat_interleave(roll.group, 0)
    if roll.tokens_NT.shape[1] == 1:
        return first_N1D
    return torch.cat((first_N1D, decoder.step(roll.tokens_NT[:, :-1], roll.seen_NS())), 1)


def sampled_logp(model, roll, temperature=1.0, never=None):
    """Log-probabilities (N, T) of what a rollout sampled, under `model` (policy or VLM), and the entropy (N, T) in
    nats.

    They come from the distribution that was sampled: after temperature, the ban of `never` (token level only: an
    action has no banned value) and, with top-k, truncation to the indices that the rollout sampled from, whatever
    `model` would choose as its own top k. So every model gives what was sampled a probability above 0, and with top-k
    all that is made from these numbers compares distributions that are renormalised over that one support: the ratio,
    the clip, and the KL to the reference, which is 0 where the policy is the reference. What a policy moves outside
    of the support is not seen."""
    if roll.actions_NT is not None:
        logp_NTK = log_probs(action_logits(model, roll), temperature, support=roll.support_NTk)
        H_NT = torch.special.entr(logp_NTK.detach().exp()).sum(-1)
        return logp_NTK.gather(-1, roll.actions_NT[..., None])[..., 0], H_NT
    mask_NT = roll.mask_NT  # the head runs only where a token was sampled
    y_MD, ids_M = token_states(model, roll)[mask_NT], roll.tokens_NT[mask_NT]
    support_Mk = None if roll.support_NTk is None else roll.support_NTk[mask_NT]
    logp_M, H_M = head_log_probs(model.head, y_MD, ids_M, temperature, never, support_Mk)
    zeros_NT = torch.zeros_like(roll.logp_NT)
    return zeros_NT.masked_scatter(mask_NT, logp_M), zeros_NT.masked_scatter(mask_NT, H_M)
