"""rollout.py: caches and decoders, sampling, both rollouts and their log-probabilities, rows of a rollout."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import LAYERS, bias_head, close, draws, extend, generate, picked

import vlm as vlm_module
from data import Batch, uniforms
from rollout import (
    Rollout,
    action_logits,
    decode,
    roomy_cache,
    sample,
    sampled_logp,
    token_states,
)
from vlm import log_probs

BOTH = pytest.mark.parametrize("actions", ["latent", "token"])


def agent(latent, actions):
    """What `rollout` takes as its latent model."""
    return latent if actions == "latent" else None


def model_of(vlm, latent, actions):
    return latent.policy if actions == "latent" else vlm


# --------------------------------------------------------------------------------------- caches and decoders
@torch.no_grad()
def test_policy_step_by_step_equals_one_full_pass(latent):
    torch.manual_seed(1)
    B, G, L, T = 3, 2, 7, 4
    mask = torch.arange(L) >= torch.tensor([0, 3, 5])[:, None]
    e_BLD, e_NTD = torch.randn(B, L, 128), torch.randn(B * G, T, 128)
    cache = roomy_cache(len(latent.policy.blocks), L + T)
    logits = [latent.policy(e_BLD, mask, cache).repeat_interleave(G, 0)]
    cache.batch_repeat_interleave(G)
    mask_N = torch.cat((mask.repeat_interleave(G, 0), torch.ones(B * G, T, dtype=torch.bool)), 1)
    logits += [latent.policy(e_NTD[:, t : t + 1], mask_N[:, : L + t + 1], cache) for t in range(T)]
    full = latent.policy(torch.cat((e_BLD.repeat_interleave(G, 0), e_NTD), 1), mask_N)
    close(torch.cat(logits, 1)[mask_N], full[mask_N])
    assert full[mask_N].std() > 0.1


@torch.no_grad()
def test_without_padding_no_mask_is_needed(vlm, latent, processor, prompts):
    more = torch.tensor([[300, 400, 500]])
    for e in prompts:
        batch, L, out = processor.collate([e]), len(e.ids), []
        for masked in (True, False):
            cache, policy_cache = roomy_cache(LAYERS, L + 3), roomy_cache(2, L + 3)
            h, mask = vlm(batch, cache), torch.ones(1, L + 3, dtype=torch.bool)
            got = [h, latent.policy(h, batch.mask_BT if masked else None, policy_cache)]
            for t, n in ((0, 1), (1, 2)):  # one token, then two at once
                seen = mask[:, : L + t + n] if masked else None
                got.append(vlm.extend(more[:, t : t + n], seen, vlm.positions(batch)[1], cache))
                got.append(latent.policy(got[-1], seen, policy_cache))
            out.append(got)
        for a, b in zip(*out):
            close(a, b)


# ----------------------------------------------------------------------------------------------------- sampling
def test_sample_draws_the_distribution():
    torch.manual_seed(5)
    N, logits = 20000, 2 * torch.randn(12)
    for top_k, never in ((0, None), (5, None), (5, torch.tensor([0, int(logits.argmax()), 11]))):
        logp = log_probs(logits, 0.7, top_k, never)
        drawn = sample(logp.expand(N, -1), (torch.arange(N) + 0.5) / N)
        count = torch.bincount(drawn, minlength=12)
        close(count / N, logp.exp(), 1.5 / N + 1e-5)  # one stratum too many or too few, and rounding
        assert (count[logp == -math.inf] == 0).all()
        assert (logp > -math.inf).sum() == (top_k or 12)


@pytest.mark.parametrize("size", [6, 150000])
def test_sample_at_the_edges_of_the_unit_interval(size):
    p = torch.zeros(size)
    u = torch.tensor([0.0, 0.49, 0.51, 0.99, float(np.nextafter(np.float32(1), np.float32(0)))])
    for half in (0.5, 0.499999, 0.500001):  # rounding may leave a sum a little below or above 1
        p[2] = p[size - 3] = half
        assert sample(p.log().expand(5, -1), u).tolist() == [2, 2, size - 3, size - 3, size - 3]


def test_uniforms_depend_on_seed_and_row_alone():
    u = uniforms(3, [(5, 1), (5, 2), (6, 1)], 50)
    assert torch.equal(uniforms(3, [(6, 1)], 50)[0], u[2])
    assert torch.equal(uniforms(3, [(5, 2), (9, 9), (5, 1)], 50)[[2, 0]], u[:2])
    other = uniforms(4, [(5, 1), (5, 2), (6, 1)], 50)
    assert len({tuple(x.tolist()) for x in torch.cat((u, other))}) == 6
    assert u.dtype == torch.float32 and (u >= 0).all() and (u < 1).all() and 0.3 < u.mean() < 0.7


# -------------------------------------------------------------------------------------------------- the rollouts
@torch.no_grad()
@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 0), (0.7, 8)])
def test_latent_rollout_is_scored_by_what_sampled_it(vlm, latent, processor, prompts, temperature, top_k):
    G, T = 2, 9
    u = draws(6, T)
    r = generate(vlm, latent, processor, prompts, u, group=G, temperature=temperature, top_k=top_k)
    assert r.tokens_NT.shape == (6, T) and r.mask_NT.all() and r.actions_NT.unique().numel() > 4
    logp = log_probs(action_logits(latent.policy, r), temperature, top_k)
    close(picked(logp, r.actions_NT), r.logp_NT)
    assert (r.logp_NT < -0.01).any()
    # the contexts it kept are those of one full pass
    L = r.prompt.ids_BT.shape[1]
    full = processor.collate([extend(prompts[n // G], r.tokens_NT[n]) for n in range(6)], left=True)
    e, real = latent.context(vlm(full), full.paired_B), full.mask_BT[:, :L]
    close(r.e_BLD.repeat_interleave(G, 0)[real], e[:, :L][real])
    close(r.e_NTD[:, :-1], e[:, L:-1])
    # the actions are the draws
    logp = log_probs(latent.policy(e, full.mask_BT)[:, L - 1 : -1], temperature, top_k)
    assert torch.equal(sample(logp.flatten(0, 1), u.flatten()).view(6, T), r.actions_NT)
    # the tokens are f_world's arg max
    logits = vlm.head(latent.speak(e[:, L - 1 : -1], r.actions_NT))
    logits[..., processor.never_sampled] = -math.inf
    assert torch.equal(logits.argmax(-1), r.tokens_NT)


@torch.no_grad()
@pytest.mark.parametrize("temperature, top_k", [(2.0, 0), (0.7, 8)])
def test_token_rollout_is_scored_by_what_sampled_it(vlm, processor, prompts, never, temperature, top_k):
    """Rows with one, none and two images: token_states must give each row of a group its own prompt."""
    handle = bias_head(vlm, processor.never_sampled, 0.0)
    shape = {"temperature": temperature, "top_k": top_k}
    try:
        r = generate(vlm, None, processor, prompts, draws(6, 6, seed=1), group=2, **shape)
        logits = vlm.head(token_states(vlm, r))
    finally:
        handle.remove()
    close(picked(log_probs(logits, temperature, top_k, never), r.tokens_NT), r.logp_NT)
    unbanned = picked(log_probs(logits, temperature, top_k), r.tokens_NT)
    assert (unbanned - r.logp_NT).abs().max() > 1e-3  # the ban matters here
    assert r.actions_NT is None and r.logp_NT.min() < -0.01


@torch.no_grad()
@BOTH
def test_a_prompt_alone_and_in_a_padded_batch(vlm, latent, processor, prompts, actions):
    u = draws(3, 7, seed=2)
    together = generate(vlm, agent(latent, actions), processor, prompts, u)
    for b, e in enumerate(prompts):
        single = generate(vlm, agent(latent, actions), processor, [e], u[b : b + 1])
        assert torch.equal(single.tokens_NT[0], together.tokens_NT[b])
        if actions == "latent":
            assert torch.equal(single.actions_NT[0], together.actions_NT[b])
        close(single.logp_NT[0], together.logp_NT[b])


@torch.no_grad()
@BOTH
def test_group_rows_differ_by_their_uniforms_alone(vlm, latent, processor, prompts, actions):
    u = draws(4, 8, seed=3)
    u = torch.stack((u[0], u[0], u[1], u[2], u[3], u[3]))
    r = generate(vlm, agent(latent, actions), processor, prompts[:2], u, group=3, temperature=3.0)
    drawn = r.tokens_NT if actions == "token" else r.actions_NT
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(r.tokens_NT[0], r.tokens_NT[1])
    assert torch.equal(drawn[4], drawn[5]) and torch.equal(r.tokens_NT[4], r.tokens_NT[5])
    assert not torch.equal(drawn[1], drawn[2]) and not torch.equal(drawn[3], drawn[4])


@torch.no_grad()
def test_temperature_0_takes_the_most_likely_action(vlm, latent, processor, prompts):
    a = generate(vlm, latent, processor, prompts, draws(3, 5, seed=4), temperature=0)
    b = generate(vlm, latent, processor, prompts, draws(3, 5, seed=5), temperature=0)
    assert torch.equal(a.actions_NT, b.actions_NT)
    assert torch.equal(a.actions_NT, action_logits(latent.policy, a).argmax(-1))


@torch.no_grad()
def test_temperature_0_takes_the_most_likely_token(vlm, processor, prompts):
    a = generate(vlm, None, processor, prompts, draws(3, 5, seed=4), temperature=0)
    b = generate(vlm, None, processor, prompts, draws(3, 5, seed=5), temperature=0)
    logits = vlm.head(token_states(vlm, a))
    logits[..., processor.never_sampled] = -math.inf
    assert torch.equal(a.tokens_NT, b.tokens_NT) and torch.equal(a.tokens_NT, logits.argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("actions, top_k", [("latent", 0), ("token", 0), ("token", 4)])
def test_never_sampled_ids_never_occur(vlm, latent, processor, prompts, actions, top_k):
    u, never = draws(3, 6, seed=6), processor.never_sampled
    none = torch.tensor([], dtype=torch.long)
    handle = bias_head(vlm, never, 100.0)
    try:
        banned = generate(vlm, agent(latent, actions), processor, prompts, u, top_k=top_k)
        free = generate(vlm, agent(latent, actions), processor, prompts[1:2], u[:1], top_k=top_k, never=none)
    finally:
        handle.remove()
    assert not torch.isin(banned.tokens_NT, torch.tensor(never)).any()
    assert torch.isin(free.tokens_NT, torch.tensor(never)).all()  # the bias alone would have brought them
    assert processor.image_id in never and processor.eos_id not in never


def first_places(tokens_NT):
    """{token: the place in each row where it first stands; behind the end where it does not}."""
    T = tokens_NT.shape[1]
    rows = tokens_NT.tolist()
    return {x: [row.index(x) if x in row else T for row in rows] for x in {y for row in rows for y in row}}


@torch.no_grad()
@BOTH
def test_stops_at_eos(vlm, latent, processor, prompts, never, actions):
    u, T = draws(6, 12, seed=7), 12
    settings = {"group": 2, "temperature": 2.0}
    free = generate(vlm, agent(latent, actions), processor, prompts, u, **settings)
    # a token that some row meets in its middle serves as EOS; until then nothing may change
    first = first_places(free.tokens_NT)
    eos = max(first, key=lambda x: (len(set(first[x])), -sum(first[x])))
    assert min(first[eos]) < T - 1 and len(set(first[eos])) > 1
    told = []
    settings["ended"] = lambda n, tokens: told.append((n, tokens))
    r = generate(vlm, agent(latent, actions), processor, prompts, u, eos=eos, **settings)
    length = r.tokens_NT.shape[1]
    rows = enumerate(zip(free.tokens_NT.tolist(), first[eos]))
    assert sorted(told) == [(n, row[:end]) for n, (row, end) in rows if end < T]  # once each, and without EOS
    assert length == T or max(first[eos]) < length
    want = torch.arange(length) <= torch.tensor(first[eos])[:, None]
    assert torch.equal(r.mask_NT, want)
    assert torch.equal(r.tokens_NT, torch.where(want, free.tokens_NT[:, :length], processor.pad_id))
    assert (r.logp_NT[~want] == 0).all()
    if actions == "latent":
        logp = picked(log_probs(action_logits(latent.policy, r), 2.0), r.actions_NT)
    else:
        logp = picked(log_probs(vlm.head(token_states(vlm, r)), 2.0, 0, never), r.tokens_NT)
    close(logp[want], r.logp_NT[want])


@torch.no_grad()
def test_rollout_ends_early_when_all_rows_have(vlm, latent, processor, prompts):
    u = draws(1, 12, seed=8)
    free = generate(vlm, latent, processor, prompts[:1], u)
    r = generate(vlm, latent, processor, prompts[:1], u, eos=int(free.tokens_NT[0, 0]))
    assert r.mask_NT.sum() == 1 and r.tokens_NT.shape[1] < 12
    logp = picked(log_probs(action_logits(latent.policy, r)), r.actions_NT)
    close(logp[r.mask_NT], r.logp_NT[r.mask_NT])


def test_decode_ends_before_eos():
    words = ["see", "the", "sea", "<eos>", "<pad>"]
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(words[i] for i in ids))
    tokens_NT = torch.tensor([[0, 1, 2], [2, 3, 4], [3, 4, 4]])
    mask_NT = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    roll = SimpleNamespace(tokens_NT=tokens_NT, mask_NT=mask_NT)
    assert decode(tokenizer, roll, 3) == ["see the sea", "sea", ""]


# ------------------------------------------------------------------------------------- rows and their scores
def numbers(*shape):
    return torch.arange(math.prod(shape)).view(shape)


def hand_made_batch():
    """Three rows of no, one and two images, which have 4, 8 and 16 patches: patch k is the number k."""
    grids = torch.tensor([[1, 2, 2], [1, 2, 4], [1, 4, 4]])
    pixels = torch.arange(28.0)[:, None]
    images_B, mask_BT = torch.tensor([0, 1, 2]), torch.ones(3, 5, dtype=torch.bool)
    mask_BT[1, 0] = False
    draws, records = [(0,), (1,), (2,)], ["a", "b", "c"]
    return Batch(numbers(3, 5), mask_BT, numbers(3, 5) > 6, images_B, pixels, grids, records, draws)


@pytest.mark.parametrize(
    "part, images, patches, records",
    [
        (slice(0, 1), [0], None, "a"),
        (slice(1, 2), [1], range(0, 4), "b"),
        (slice(2, 3), [2], range(4, 28), "c"),
        (slice(0, 2), [0, 1], range(0, 4), "ab"),
        (slice(1, 3), [1, 2], range(0, 28), "bc"),
        (slice(2, 9), [2], range(4, 28), "c"),  # a last part may be shorter
    ],
)
def test_rows_of_a_batch_keep_their_own_images(part, images, patches, records):
    rows = hand_made_batch().rows(part)
    assert rows.images_B.tolist() == images and rows.records == list(records)
    assert torch.equal(rows.ids_BT, numbers(3, 5)[part]) and torch.equal(rows.response_BT, numbers(3, 5)[part] > 6)
    assert rows.mask_BT[:, 0].tolist() == [r != "b" for r in records]
    if patches is None:
        assert rows.pixels is None and rows.grids is None
    else:
        assert rows.pixels[:, 0].tolist() == list(patches)
        assert rows.grids.prod(-1).tolist() == [n for n, r in ((4, "b"), (8, "c"), (16, "c")) if r in records]


def hand_made_rollout(latent):
    """Two responses to each of the three prompts above; every tensor counts up."""
    kept = {"actions_NT": numbers(6, 3), "e_BLD": numbers(3, 5, 2), "e_NTD": numbers(6, 3, 2)} if latent else {}
    return Rollout(hand_made_batch(), 2, numbers(6, 3), numbers(6, 3) % 3 < 2, -numbers(6, 3), **kept)


@pytest.mark.parametrize("latent", [True, False])
@pytest.mark.parametrize("part, prompts", [((0, 2), (0, 1)), ((2, 6), (1, 3)), ((0, 6), (0, 3)), ((4, 8), (2, 3))])
def test_rows_of_a_rollout_are_whole_groups(latent, part, prompts):
    whole, part, prompts = hand_made_rollout(latent), slice(*part), slice(*prompts)
    rows = whole.rows(part)
    assert rows.group == 2 and rows.prompt.records == ["a", "b", "c"][prompts]
    names = ["tokens_NT", "mask_NT", "logp_NT", *(["actions_NT", "e_NTD"] if latent else [])]
    for name in names:
        assert torch.equal(getattr(rows, name), getattr(whole, name)[part])
    if latent:
        assert torch.equal(rows.e_BLD, numbers(3, 5, 2)[prompts])
    else:
        assert rows.e_BLD is rows.e_NTD is rows.actions_NT is None
    assert rows.seen_NS().shape == (len(rows.tokens_NT), 5 + 3 - 1)


def test_what_can_be_seen_by_hand():
    """Prompt and response behind each other, without the response's last token; padding in front is not seen."""
    seen = hand_made_rollout(latent=True).seen_NS()
    response = [True, True]  # of the three tokens' masks 1 1 0, the first two
    padded = [False] + [True] * 4
    full = [True] * 5
    assert seen.tolist() == [p + response for p in (full, full, padded, padded, full, full)]


@BOTH
def test_rows_of_a_rollout_have_the_scores_they_have_in_the_whole(vlm, latent, processor, prompts, never, actions):
    """Prompts with one, no and two images, of different lengths: each part must read its own."""
    r = generate(vlm, agent(latent, actions), processor, prompts, draws(6, 5, seed=9), group=2)
    scored = model_of(vlm, latent, actions)
    with torch.no_grad():
        logp, H = sampled_logp(scored, r, never=never)
        for part in (slice(0, 2), slice(2, 4), slice(2, 6), slice(4, 6)):
            some, some_H = sampled_logp(scored, r.rows(part), never=never)
            close(some, logp[part])
            close(some_H, H[part])
    close(logp, r.logp_NT)


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 5)])
def test_sampled_logp_and_its_entropy(vlm, latent, processor, prompts, never, actions, temperature, top_k):
    """Both come from the distribution that was sampled; at the token level they are 0 at padding."""
    settings = {"group": 2, "temperature": temperature, "top_k": top_k}
    r = generate(vlm, agent(latent, actions), processor, prompts, draws(6, 5, seed=10), **settings)
    r.mask_NT[1, 3:] = False
    logp, H = sampled_logp(model_of(vlm, latent, actions), r, temperature, never)
    if actions == "latent":
        want = log_probs(action_logits(latent.policy, r), temperature, top_k)
    else:
        want = log_probs(vlm.head(token_states(vlm, r)), temperature, top_k, never)
        assert (logp[1, 3:] == 0).all() and (H[1, 3:] == 0).all()
    close(logp[r.mask_NT], r.logp_NT[r.mask_NT])
    p = want.exp()
    by_hand = -torch.where(p > 0, p * want, 0.0).sum(-1)
    close(H[r.mask_NT], by_hand[r.mask_NT])
    assert 0 < H[r.mask_NT].min() and H.max() <= math.log(top_k or p.shape[-1]) + 1e-5


# --------------------------------------------------------------------------------- top-k: the support is kept
@torch.no_grad()
@BOTH
def test_a_rollout_keeps_what_it_could_choose_from(vlm, latent, processor, prompts, never, actions):
    """k different indices for each action or token, most likely first, and never a banned one; in parts, too."""
    r = generate(vlm, agent(latent, actions), processor, prompts, draws(6, 5, seed=11), group=2, top_k=4)
    drawn = r.tokens_NT if actions == "token" else r.actions_NT
    assert r.support_NTk.shape == (6, 5, 4) and (r.support_NTk == drawn[..., None]).any(-1).all()
    assert all(len(set(k)) == 4 for row in r.support_NTk.tolist() for k in row)
    assert actions == "latent" or not torch.isin(r.support_NTk, never).any()
    assert torch.equal(r.rows(slice(2, 4)).support_NTk, r.support_NTk[2:4])
    whole = generate(vlm, agent(latent, actions), processor, prompts[:1], draws(1, 3))
    assert whole.support_NTk is None and whole.rows(slice(0, 1)).support_NTk is None


@torch.no_grad()
@BOTH
def test_another_model_is_scored_over_what_the_rollout_could_choose_from(
    vlm, latent, processor, prompts, never, actions
):
    """A support that is not the model's own top k: the softmax over these four logits, and nothing is impossible."""
    r = generate(vlm, agent(latent, actions), processor, prompts, draws(6, 5, seed=12), group=2, temperature=0.7)
    logits = vlm.head(token_states(vlm, r)) if actions == "token" else action_logits(latent.policy, r)
    drawn = r.tokens_NT if actions == "token" else r.actions_NT
    r.support_NTk = torch.cat((drawn[..., None], logits.topk(3, -1, largest=False).indices), -1)
    logp, H = sampled_logp(model_of(vlm, latent, actions), r, 0.7, None)
    want = torch.log_softmax(logits.gather(-1, r.support_NTk) / 0.7, -1)
    close(logp, want[..., 0])
    close(H, -(want.exp() * want).sum(-1))


# --------------------------------------------------------------------------------------------- rows inside a group
@pytest.mark.parametrize("part, prompt", [((0, 1), 0), ((1, 2), 0), ((3, 4), 1)])
def test_rows_inside_a_group_have_their_own_prompt(part, prompt):
    rows = hand_made_rollout(latent=True).rows(slice(*part))
    assert rows.group == 1 and rows.prompt.records == ["abc"[prompt]]
    assert torch.equal(rows.tokens_NT, numbers(6, 3)[slice(*part)])
    assert torch.equal(rows.e_BLD, numbers(3, 5, 2)[prompt : prompt + 1])


@pytest.mark.parametrize("part", [(1, 3), (0, 3), (3, 6)])
def test_rows_that_cut_a_group_and_take_others_along_are_refused(part):
    with pytest.raises(ValueError, match="cut a group of 2"):
        hand_made_rollout(latent=True).rows(slice(*part))


@torch.no_grad()
@BOTH
def test_rows_inside_a_group_have_the_scores_they_have_in_the_whole(vlm, latent, processor, prompts, never, actions):
    r = generate(vlm, agent(latent, actions), processor, prompts, draws(9, 5, seed=13), group=3, top_k=4)
    model = model_of(vlm, latent, actions)
    whole = sampled_logp(model, r, never=never)
    for part in (slice(0, 1), slice(1, 3), slice(4, 5), slice(6, 8), slice(8, 9)):
        for some, all_of_it in zip(sampled_logp(model, r.rows(part), never=never), whole):
            close(some, all_of_it[part], 1e-5)


# ----------------------------------------------------------------------------------------------- rows drawn again
@torch.no_grad()
@BOTH
@pytest.mark.parametrize("first, second", [(7, 4), (4, 7)])
def test_rows_that_were_drawn_again_keep_their_scores(vlm, latent, processor, prompts, never, actions, first, second):
    """Two of three prompts are answered once more, in responses of another length and beside other padding."""
    settings = {"group": 2, "top_k": 4, "temperature": 2.0}
    old = generate(vlm, agent(latent, actions), processor, prompts, draws(6, first), **settings)
    old.mask_NT[3, 2:] = False
    new = generate(vlm, agent(latent, actions), processor, prompts[::2], draws(4, second, seed=1), **settings)
    both = old.put([0, 1, 4, 5], new, processor.pad_id)
    assert both.tokens_NT.shape == (6, 7) and both.mask_NT.sum(1).tolist() == [second] * 2 + [first, 2] + [second] * 2
    assert (both.tokens_NT[:, min(first, second) :] == processor.pad_id).any() and both.prompt is old.prompt
    logp, H = sampled_logp(model_of(vlm, latent, actions), both, 2.0, never)
    for places, roll in (([0, 1, 4, 5], new), ([2, 3], old)):
        rows = slice(None) if roll is new else places
        mask, T = roll.mask_NT[rows], roll.mask_NT.shape[1]
        close(logp[places, :T][mask], roll.logp_NT[rows][mask])
        close(both.logp_NT[places, :T][mask], roll.logp_NT[rows][mask], 0)
    assert logp.isfinite().all() and H.isfinite().all()


@BOTH
def test_under_autocast_the_head_is_cast_once_a_rollout(vlm, latent, processor, prompts, monkeypatch, actions):
    """A head that trains is kept in float32: casting it at each token would read all of it twice."""
    cast, real = [], vlm_module.product_dtype

    def product_dtype(x, weight):
        cast.append(weight.shape)
        return real(x, weight)

    monkeypatch.setattr(vlm_module, "product_dtype", product_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        roll = generate(vlm, latent if actions == "latent" else None, processor, prompts[:1], draws(2, 6), group=2)
    assert roll.tokens_NT.shape[1] == 6 and cast.count(vlm.head.weight.shape) == 1
