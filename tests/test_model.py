"""model.py: the caches, the rollout and its log-probabilities, no leak of the future, and each formula by hand."""

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

import model
from data import DataError, Example, Processor
from model import (VLM, Gaussian, HeadLogProbs, LatentModel, Projector, action_logits, entropy, gaussian_nll, head_log_probs,
                   log_probs, next_token_loss, rollout, roomy_cache, sample, straight_through_gumbel, token_states, uniforms)
from tiny.world import chat, draw_scene, random_question, random_scene

TINY = Path(__file__).resolve().parents[1] / "tiny" / "vlm"
CODES = 16


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def shake(module, size=0.1):
    """Move every parameter off its initial value, so that no zero or one hides a mistake."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=g) * size)
    return module


# ----------------------------------------------------------------------------------------------------- fixtures
@pytest.fixture(scope="module")
def vlm():
    return VLM(TINY)


@pytest.fixture(scope="module")
def processor():
    return Processor(TINY)


@pytest.fixture(scope="module")
def latent(vlm):
    torch.manual_seed(0)
    return shake(LatentModel(vlm.config, CODES, inverse_blocks=2, policy_blocks=2)).requires_grad_(False)


@pytest.fixture(scope="module")
def prompts(processor):
    """Three prompts of different lengths: one image, text alone, two images of different sizes."""
    return [prompt(processor, 1, 0), prompt(processor, 2, None, system="You are Mara the baker."), prompt(processor, 3, 0, 56)]


def pixels_of(processor, rng, extras):
    images = []
    for extra in extras:
        image = draw_scene(random_scene(rng), rng)
        images.append(image.resize((84 + extra, 84)))
    out = processor.images(images=images, return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


def prompt(processor, seed, *extras, system=None, prompt_only=True):
    """A question about drawn scenes, one for each of `extras` (pixels added to its width; None: no image)."""
    rng = random.Random(seed)
    extras = [x for x in extras if x is not None]
    _, _, question = random_question(random_scene(rng), rng)
    record = {"images": [], "messages": chat("<image>" * len(extras) + question, "There is a small red star on the left.", system)}
    return processor.example(record, prompt_only, pixels_of(processor, rng, extras) if extras else None)


def extend(example, tokens):
    """The same example with more tokens behind it, as one sequence."""
    ids = np.concatenate((example.ids, np.asarray(tokens)))
    return Example(ids, np.zeros(len(ids), bool), example.pixels, example.grids, example.record)


def alone(e):
    """The example as a batch of one, made by hand and not by `collate`."""
    return model.Batch(torch.from_numpy(e.ids)[None], torch.ones(1, len(e.ids), dtype=torch.bool),
                       torch.zeros(1, len(e.ids), dtype=torch.bool), torch.tensor([0 if e.grids is None else len(e.grids)]),
                       e.pixels, e.grids, [e.record])


def generate(vlm, latent, processor, examples, u, **kw):
    return rollout(vlm, latent, processor.collate(examples, left=True), u,
                   **({"never": torch.tensor(processor.never_sampled), "eos": -1, "pad": processor.pad_id} | kw))


def rows(n, length, seed=0):
    return uniforms(seed, [(k,) for k in range(n)], length)


def bias_head(vlm, ids, size):
    """Lift the LM head's logits of these ids to the row's highest + `size`, until the handle is removed."""
    def hook(_, __, out):
        return out.index_fill(-1, torch.tensor(ids), 0) + F.one_hot(torch.tensor(ids), out.shape[-1]).sum(0) * (out.amax(-1, keepdim=True) + size)
    return vlm.head.register_forward_hook(hook)


# ------------------------------------------------------------------------------------------- caches and padding
@torch.no_grad()
@pytest.mark.parametrize("at_once, roomy", [(1, True), (1, False), (5, True), (5, False), (2, True)])
def test_vlm_step_by_step_equals_one_full_pass(vlm, processor, prompts, at_once, roomy):
    group, steps = 2, 5
    more = torch.from_numpy(np.random.default_rng(0).integers(100, 2000, (len(prompts) * group, steps)))
    batch = processor.collate(prompts, left=True)
    assert len(set(batch.mask_BT.sum(1).tolist())) == 3 and batch.images_B.tolist() == [1, 0, 2]
    cache = roomy_cache(6, batch.ids_BT.shape[1] + steps) if roomy else DynamicCache(config=vlm.config)
    states = [vlm(batch, cache).repeat_interleave(group, 0)]
    cache.batch_repeat_interleave(group)
    deltas = vlm.positions(batch)[1].repeat_interleave(group, 0)
    mask = torch.cat((batch.mask_BT.repeat_interleave(group, 0), torch.ones_like(more, dtype=torch.bool)), 1)
    for t in range(0, steps, at_once):
        new = more[:, t:t + at_once]
        states.append(vlm.extend(new, mask[:, :batch.ids_BT.shape[1] + t + new.shape[1]], deltas, cache))
    stepped = torch.cat(states, 1)

    longer = [extend(prompts[n // group], more[n]) for n in range(len(more))]
    full = processor.collate(longer, left=True)
    assert torch.equal(full.mask_BT, mask)
    close(stepped[mask], vlm(full)[mask])
    for n, e in enumerate(longer):  # and each row alone, without padding, gives the same
        close(stepped[n, -len(e.ids):], vlm(alone(e))[0])


@torch.no_grad()
def test_without_padding_no_mask_is_needed(vlm, latent, processor, prompts):
    for e in prompts:
        batch, more = processor.collate([e]), torch.tensor([[300, 400, 500]])
        out = []
        for masked in (True, False):
            cache, policy_cache, L = roomy_cache(6, len(e.ids) + 3), roomy_cache(2, len(e.ids) + 3), len(e.ids)
            h = vlm(batch, cache)
            got, mask = [h, latent.policy(h, batch.mask_BT if masked else None, policy_cache)], torch.ones(1, L + 3, dtype=torch.bool)
            for t, n in ((0, 1), (1, 2)):  # one token, then two at once
                seen = mask[:, :L + t + n] if masked else None
                got.append(vlm.extend(more[:, t:t + n], seen, vlm.positions(batch)[1], cache))
                got.append(latent.policy(got[-1], seen, policy_cache))
            out.append(got)
        for a, b in zip(*out):
            close(a, b)


@torch.no_grad()
def test_vlm_right_padding(vlm, processor, prompts):
    h = vlm(processor.collate(prompts))
    for b, e in enumerate(prompts):
        close(h[b, :len(e.ids)], vlm(alone(e))[0])


@torch.no_grad()
def test_image_and_its_order_reach_the_text(vlm, processor, prompts):
    """Pixels of row b go to row b: swapping the two images of a prompt moves its last state."""
    e = prompt(processor, 5, 0, 0)
    half = len(e.pixels) // 2
    swapped = replace(e, pixels=torch.cat((e.pixels[half:], e.pixels[:half])))
    assert (vlm(alone(e))[0, -1] - vlm(alone(swapped))[0, -1]).abs().max() > 1e-3


def test_positions_by_hand(vlm, processor, prompts):
    """Left-padded row with one image of 3 x 3 tokens behind k text tokens: (time, row, column) start at k, text goes on at k + 3."""
    batch = processor.collate(prompts, left=True)
    positions, deltas = vlm.positions(batch)
    ids = prompts[0].ids
    k, n = int((ids == processor.image_id).argmax()), len(ids)
    assert (ids == processor.image_id).sum() == 9
    behind = list(range(k + 3, k + 3 + n - k - 9))
    for axis, image in zip(positions, ([k] * 9, [k + i // 3 for i in range(9)], [k + i % 3 for i in range(9)])):
        assert axis[0, -n:].tolist() == list(range(k)) + image + behind
        assert axis[1, -len(prompts[1].ids):].tolist() == list(range(len(prompts[1].ids)))
    assert deltas[:2, 0].tolist() == [behind[-1] + 1 - n, 0]


@torch.no_grad()
def test_batch_without_pixels(vlm, processor):
    texts = [prompt(processor, 8), prompt(processor, 9, system="You are Odo the monk, a friend of the sea.")]
    batch = processor.collate(texts, left=True)
    assert batch.pixels is None and batch.grids is None and not batch.paired_B.any()
    h = vlm(batch)
    for b, e in enumerate(texts):
        close(h[b, -len(e.ids):], vlm(alone(e))[0])


@pytest.fixture
def stack(latent):
    return latent.policy


@torch.no_grad()
def test_policy_step_by_step_equals_one_full_pass(stack):
    torch.manual_seed(1)
    B, G, L, T = 3, 2, 7, 4
    mask = torch.arange(L) >= torch.tensor([0, 3, 5])[:, None]
    e_BLD, e_NTD = torch.randn(B, L, 128), torch.randn(B * G, T, 128)
    cache = roomy_cache(len(stack.blocks), L + T)
    logits = [stack(e_BLD, mask, cache).repeat_interleave(G, 0)]
    cache.batch_repeat_interleave(G)
    mask_N = torch.cat((mask.repeat_interleave(G, 0), torch.ones(B * G, T, dtype=torch.bool)), 1)
    logits += [stack(e_NTD[:, t:t + 1], mask_N[:, :L + t + 1], cache) for t in range(T)]
    full = stack(torch.cat((e_BLD.repeat_interleave(G, 0), e_NTD), 1), mask_N)
    close(torch.cat(logits, 1)[mask_N], full[mask_N])
    assert full[mask_N].std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True])
def test_stack_padding(stack, left):
    torch.manual_seed(2)
    lengths, T = (4, 9, 6), 9
    e = [torch.randn(n, 128) for n in lengths]
    padded, mask = torch.full((3, T, 128), 3.0), torch.zeros(3, T, dtype=torch.bool)
    for b, x in enumerate(e):
        s = slice(T - len(x), T) if left else slice(0, len(x))
        padded[b, s], mask[b, s] = x, True
    logits = stack(padded, mask if left else None)  # right padding needs no mask
    assert logits.isfinite().all()
    for b, x in enumerate(e):
        close(logits[b, mask[b]], stack(x[None])[0])


# -------------------------------------------------------------------------------------------------- no leak
@torch.no_grad()
@pytest.mark.parametrize("image", [True, False])
def test_nothing_before_a_token_knows_it_but_its_action_does(vlm, latent, processor, image):
    e = prompt(processor, 4, 0 if image else None, prompt_only=False)
    t = len(e.ids) - 5
    other = replace(e, ids=e.ids.copy())
    other.ids[t + 1] = 300 if e.ids[t + 1] != 300 else 301
    a, tables = (torch.arange(len(e.ids)) % CODES)[None], latent.world.tables(latent.codebook.weight)
    out = []
    for batch in (alone(e), alone(other)):
        x = latent.context(vlm(batch), batch.paired_B)
        out.append((x, latent.policy(x), latent.world(x, a, tables), latent.infer_actions(x)))
    for x, y in zip(*out):
        assert x.abs().max() > 0.1 and x.isfinite().all()
    for x, y in zip(out[0][:3], out[1][:3]):
        close(x[:, :t + 1], y[:, :t + 1], 1e-6)
        assert (x[:, t + 1] - y[:, t + 1]).abs().max() > 1e-3
    close(out[0][3][:, :t], out[1][3][:, :t], 1e-6)
    assert (out[0][3][:, t] - out[1][3][:, t]).abs().max() > 1e-3  # a_t explains x_{t+1}
    assert out[0][3].shape == (1, len(e.ids) - 1, CODES)          # the last position has no action


@torch.no_grad()
def test_context_is_h_with_an_image_and_projected_without(vlm, latent, processor, prompts):
    batch = processor.collate(prompts)
    h = vlm(batch)
    e = latent.context(h, batch.paired_B)
    assert torch.equal(e[[0, 2]], h[[0, 2]])
    first, _, last = latent.projector.P.mlp
    mu = h[1] + torch.tanh(h[1] @ first.weight.T + first.bias) @ last.weight.T + last.bias
    close(e[1], mu)
    assert (e[1] - h[1]).abs().max() > 0.1
    close(latent.context(h[1:2], batch.paired_B[1:2])[0], mu)
    assert torch.equal(latent.context(h[:1], batch.paired_B[:1]), h[:1])


# -------------------------------------------------------------------------------------------------- world model
@torch.no_grad()
def test_world_model_starts_at_the_vlm(vlm, processor, prompts):
    torch.manual_seed(3)
    batch = processor.collate(prompts)
    e = vlm(batch)[batch.mask_BT]
    a, codes = torch.arange(len(e)) % CODES, 3 * torch.randn(CODES, e.shape[1])
    plain = vlm.head(e)
    world = LatentModel(vlm.config, CODES, 1, 1).world
    close(vlm.head(world(e, a, world.tables(codes))), plain)
    normed = e / (e ** 2).mean(-1, keepdim=True).sqrt()
    for output, start in (("norm", normed), ("release", normed - e)):
        world = LatentModel(vlm.config, CODES, 1, 1, world_output=output).world
        y = world(e, a, world.tables(codes))
        close(y, start)
        assert (vlm.head(y) - plain).abs().max() > 0.5


@torch.no_grad()
def test_shaken_world_model_listens_to_its_code(latent):
    torch.manual_seed(4)
    e = torch.randn(1, 1, 128).expand(1, CODES, 128)
    y = latent.world(e, torch.arange(CODES)[None], latent.world.tables(latent.codebook.weight))
    assert torch.cdist(y[0], y[0]).add(torch.eye(CODES) * 9).min() > 0.01


def test_world_model_is_the_formula_with_the_code_beside_the_context(latent):
    """x + W3(silu(W1 [x; c]) * (W2 [x; c])), written out with [x; c]; actions as numbers and as one-hot rows; gradients, too."""
    torch.manual_seed(11)
    world = latent.world.requires_grad_(True)
    e, codes, a = torch.randn(7, 128, requires_grad=True), torch.randn(CODES, 128, requires_grad=True), torch.arange(7)
    hot = F.one_hot(a, CODES).float().requires_grad_(True)
    x = e
    for m in world.merges:
        xc = torch.cat((x, hot @ codes), -1)
        w1, w2 = torch.cat((m.w1_x.weight, m.w1_c.weight), 1), torch.cat((m.w2_x.weight, m.w2_c.weight), 1)
        x = x + (F.silu(xc @ w1.T) * (xc @ w2.T)) @ m.w3.weight.T
    plain = world.norm.weight * x / (x ** 2).mean(-1, keepdim=True).add(1e-6).sqrt() * (e ** 2).mean(-1, keepdim=True).add(1e-6).sqrt()
    weights, outward = [e, codes, hot, *world.parameters()], torch.randn(7, 128)
    want = torch.autograd.grad((plain * outward).sum(), weights)
    ours = world(e, hot, world.tables(codes))
    close(ours, plain)
    close(world(e, a, world.tables(codes)), plain)
    for g, w in zip(torch.autograd.grad((ours * outward).sum(), weights), want):
        assert w.abs().max() > 1e-3
        close(g, w, 1e-3 * w.abs().max().item())
    world.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------ rollout
@torch.no_grad()
@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 0), (0.7, 8)])
def test_latent_rollout_is_scored_by_what_sampled_it(vlm, latent, processor, prompts, temperature, top_k):
    G, T = 2, 9
    u = rows(6, T)
    r = generate(vlm, latent, processor, prompts, u, group=G, temperature=temperature, top_k=top_k)
    assert r.tokens_NT.shape == (6, T) and r.mask_NT.all() and r.actions_NT.unique().numel() > 4
    logp = log_probs(action_logits(latent.policy, r), temperature, top_k)
    close(logp.gather(-1, r.actions_NT[..., None])[..., 0], r.logp_NT)
    assert (r.logp_NT < -0.01).any()
    # the contexts it kept are those of one full pass; the actions are the draws; the tokens are f_world's arg max
    L = r.prompt.ids_BT.shape[1]
    full = processor.collate([extend(prompts[n // G], r.tokens_NT[n]) for n in range(6)], left=True)
    e = latent.context(vlm(full), full.paired_B)
    close(r.e_BLD.repeat_interleave(G, 0)[full.mask_BT[:, :L]], e[:, :L][full.mask_BT[:, :L]])
    close(r.e_NTD[:, :-1], e[:, L:-1])
    by_hand = sample(log_probs(latent.policy(e, full.mask_BT)[:, L - 1:-1], temperature, top_k).flatten(0, 1), u.flatten())
    assert torch.equal(by_hand.view(6, T), r.actions_NT)
    logits = vlm.head(latent.world(e[:, L - 1:-1], r.actions_NT, latent.world.tables(latent.codebook.weight)))
    logits[..., processor.never_sampled] = -math.inf
    assert torch.equal(logits.argmax(-1), r.tokens_NT)


@torch.no_grad()
@pytest.mark.parametrize("temperature, top_k", [(2.0, 0), (0.7, 8)])
def test_token_rollout_is_scored_by_what_sampled_it(vlm, processor, prompts, temperature, top_k):
    """Rows with one, none and two images: token_states must give each row of a group its own prompt."""
    never = torch.tensor(processor.never_sampled)
    handle = bias_head(vlm, processor.never_sampled, 0.0)
    try:
        r = generate(vlm, None, processor, prompts, rows(6, 6, seed=1), group=2, temperature=temperature, top_k=top_k,
                     actions="token")
        logits = vlm.head(token_states(vlm, r))
    finally:
        handle.remove()
    logp = log_probs(logits, temperature, top_k, never)
    close(logp.gather(-1, r.tokens_NT[..., None])[..., 0], r.logp_NT)
    unbanned = log_probs(logits, temperature, top_k).gather(-1, r.tokens_NT[..., None])[..., 0]
    assert (unbanned - r.logp_NT).abs().max() > 1e-3  # the ban matters here
    assert r.actions_NT is None and r.logp_NT.min() < -0.01


@torch.no_grad()
@pytest.mark.parametrize("actions", ["latent", "token"])
def test_a_prompt_alone_and_in_a_padded_batch(vlm, latent, processor, prompts, actions):
    u = rows(3, 7, seed=2)
    together = generate(vlm, latent, processor, prompts, u, actions=actions)
    for b, e in enumerate(prompts):
        single = generate(vlm, latent, processor, [e], u[b:b + 1], actions=actions)
        assert torch.equal(single.tokens_NT[0], together.tokens_NT[b])
        if actions == "latent":
            assert torch.equal(single.actions_NT[0], together.actions_NT[b])
        close(single.logp_NT[0], together.logp_NT[b])


@torch.no_grad()
@pytest.mark.parametrize("actions", ["latent", "token"])
def test_group_rows_differ_by_their_uniforms_alone(vlm, latent, processor, prompts, actions):
    u = rows(4, 8, seed=3)
    u = torch.stack((u[0], u[0], u[1], u[2], u[3], u[3]))
    r = generate(vlm, latent, processor, prompts[:2], u, group=3, actions=actions, temperature=3.0)
    drawn = r.tokens_NT if actions == "token" else r.actions_NT
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(r.tokens_NT[0], r.tokens_NT[1])
    assert torch.equal(drawn[4], drawn[5]) and torch.equal(r.tokens_NT[4], r.tokens_NT[5])
    assert not torch.equal(drawn[1], drawn[2]) and not torch.equal(drawn[3], drawn[4])


@torch.no_grad()
def test_temperature_0_takes_the_most_likely_action(vlm, latent, processor, prompts):
    a = generate(vlm, latent, processor, prompts, rows(3, 5, seed=4), temperature=0)
    b = generate(vlm, latent, processor, prompts, rows(3, 5, seed=5), temperature=0)
    assert torch.equal(a.actions_NT, b.actions_NT)
    assert torch.equal(a.actions_NT, action_logits(latent.policy, a).argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("actions, top_k", [("latent", 0), ("token", 0), ("token", 4)])
def test_never_sampled_ids_never_occur(vlm, latent, processor, prompts, actions, top_k):
    u, never = rows(3, 6, seed=6), processor.never_sampled
    handle = bias_head(vlm, never, 100.0)
    try:
        banned = generate(vlm, latent, processor, prompts, u, actions=actions, top_k=top_k)
        free = generate(vlm, latent, processor, prompts[1:2], u[:1], actions=actions, top_k=top_k,
                        never=torch.tensor([], dtype=torch.long))
    finally:
        handle.remove()
    assert not torch.isin(banned.tokens_NT, torch.tensor(never)).any()
    assert torch.isin(free.tokens_NT, torch.tensor(never)).all()  # the bias alone would have brought them
    assert processor.image_id in never and processor.eos_id not in never


@torch.no_grad()
@pytest.mark.parametrize("actions", ["latent", "token"])
def test_stops_at_eos(vlm, latent, processor, prompts, actions):
    u, T = rows(6, 12, seed=7), 12
    kw = dict(group=2, actions=actions, temperature=2.0)
    free = generate(vlm, latent, processor, prompts, u, **kw)
    # a token that some row meets in its middle serves as EOS; until then nothing may change
    first = {int(x): [(row == x).nonzero()[0, 0].item() if (row == x).any() else T for row in free.tokens_NT] for x in free.tokens_NT.unique()}
    eos = max(first, key=lambda x: (len(set(first[x])), -sum(first[x])))
    assert min(first[eos]) < T - 1 and len(set(first[eos])) > 1
    r = generate(vlm, latent, processor, prompts, u, eos=eos, **kw)
    length = r.tokens_NT.shape[1]
    assert length == T or max(first[eos]) < length
    ends = torch.tensor(first[eos])[:, None]
    want = torch.arange(length) <= ends
    assert torch.equal(r.mask_NT, want)
    assert torch.equal(r.tokens_NT, torch.where(want, free.tokens_NT[:, :length], processor.pad_id))
    assert (r.logp_NT[~want] == 0).all()
    if actions == "latent":
        logp = log_probs(action_logits(latent.policy, r), 2.0).gather(-1, r.actions_NT[..., None])[..., 0]
    else:
        logp = log_probs(vlm.head(token_states(vlm, r)), 2.0, 0, torch.tensor(processor.never_sampled)).gather(-1, r.tokens_NT[..., None])[..., 0]
    close(logp[want], r.logp_NT[want])


@torch.no_grad()
def test_rollout_ends_early_when_all_rows_have(vlm, latent, processor, prompts):
    u = rows(1, 12, seed=8)
    free = generate(vlm, latent, processor, prompts[:1], u)
    r = generate(vlm, latent, processor, prompts[:1], u, eos=int(free.tokens_NT[0, 0]))
    assert r.mask_NT.sum() == 1 and r.tokens_NT.shape[1] < 12
    logp = log_probs(action_logits(latent.policy, r)).gather(-1, r.actions_NT[..., None])[..., 0]
    close(logp[r.mask_NT], r.logp_NT[r.mask_NT])


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


def test_log_probs_by_hand():
    logits = torch.tensor([math.log(4), math.log(1), math.log(9), math.log(16)])
    close(log_probs(logits).exp(), torch.tensor([4, 1, 9, 16]) / 30, 1e-6)
    close(log_probs(logits, 0.5).exp(), torch.tensor([16, 1, 81, 256]) / 354, 1e-6)  # temperature 1/2 squares them
    close(log_probs(logits, 2.0, 2, torch.tensor([3])).exp(), torch.tensor([2, 0, 3, 0]) / 5, 1e-6)  # roots; 16 banned, 1 cut


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
    assert len({tuple(x.tolist()) for x in torch.cat((u, uniforms(4, [(5, 1), (5, 2), (6, 1)], 50)))}) == 6
    assert u.dtype == torch.float32 and (u >= 0).all() and (u < 1).all() and 0.3 < u.mean() < 0.7


# ---------------------------------------------------------------------------------------------------- formulas
def test_gumbel_forward_is_one_hot_and_gradient_that_of_the_softmax(monkeypatch):
    torch.manual_seed(6)
    logits, tau = torch.randn(4, 50, 8, requires_grad=True), 2.0
    u, outward = torch.rand(4, 50, 8), torch.randn(4, 50, 8)
    monkeypatch.setattr(model.torch, "rand_like", lambda x: u.clone())
    y = straight_through_gumbel(logits, tau)
    noisy = logits.detach() - torch.log(-torch.log(u))
    assert torch.equal(y.detach(), F.one_hot(noisy.argmax(-1), 8).float())  # exactly: no 0.9999999
    (y * outward).sum().backward()
    s = torch.exp(noisy / tau)
    s = s / s.sum(-1, keepdim=True)
    close(logits.grad, s * (outward - (outward * s).sum(-1, keepdim=True)) / tau, 1e-6)


def test_gumbel_draws_softmax_of_the_logits():
    torch.manual_seed(7)
    n = 40000
    for tau in (0.5, 2.0):  # the temperature shapes the gradient, never the draw
        y = straight_through_gumbel(torch.tensor([0.0, math.log(3)]).expand(1, n, 2), tau)
        assert abs(y[..., 1].mean() - 0.75) < 3 * math.sqrt(0.75 * 0.25 / n)


def test_gaussian_nll_by_hand():
    # differences (1, 2), log-variances (0, ln 4), so variances (1, 4): (1/1 + 4/4 + 0 + ln 4) / 2 = 1 + ln 2
    # difference (0, 3), log-variances (-ln 2, 0), variances (1/2, 1):  (0 + 9 - ln 2) / 2; a signed, not an absolute, ln 2
    mu = torch.tensor([[[5.0, -1.0], [2.0, 2.0], [0.0, 0.0]]])
    target = mu + torch.tensor([[[1.0, 2.0], [0.0, 3.0], [70.0, 70.0]]])
    logvar = torch.tensor([[[0.0, math.log(4)], [-math.log(2), 0.0], [0.5, 0.5]]])
    nll = gaussian_nll(target, mu, logvar, torch.tensor([[True, True, False]]))
    assert nll.item() == pytest.approx(1 + math.log(2) + (9 - math.log(2)) / 2, abs=1e-5)
    assert gaussian_nll(target, mu, logvar, torch.tensor([[True, False, False]])).item() == pytest.approx(1 + math.log(2), abs=1e-5)


def test_log_variance_stays_within_one():
    torch.manual_seed(8)
    p = Gaussian(8)
    with torch.no_grad():
        p.logvar[2].weight.mul_(20)
        logvar = p(torch.randn(2, 50, 8))[1]
        raw = p.logvar(torch.randn(2, 50, 8))
    assert raw.abs().max() > 2 and logvar.abs().max() <= 1 and logvar.min() < -0.5 and logvar.max() > 0.5


def test_projector_skip():
    torch.manual_seed(10)
    x = torch.randn(2, 3, 8)
    assert torch.equal(Gaussian(8)(x)[0], x)  # starts at the identity
    plain = Gaussian(8, skip=False)           # the paper's form
    first, _, last = plain.mlp
    close(plain(x)[0], torch.tanh(x @ first.weight.T + first.bias) @ last.weight.T + last.bias, 1e-6)
    assert plain(x)[0].abs().max() > 0.05


def normal_nll(target, mu, logvar, mask):
    """The same loss from torch's Normal, whose constant D/2 log 2 pi is taken off."""
    nll = -torch.distributions.Normal(mu, (logvar / 2).exp()).log_prob(target) - 0.5 * math.log(2 * math.pi)
    return nll.sum(-1)[mask].sum()


def test_projector_losses_and_their_mask():
    torch.manual_seed(9)
    p = shake(Projector(8), 0.3)
    h_VT, h_T = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 1, 1, 0]]).bool()
    loss = p.paired_loss(h_VT, h_T, mask)
    close(loss, normal_nll(h_VT, *p.P(h_T), mask) + normal_nll(h_T, *p.P_back(h_VT), mask))
    loss.backward()
    for g in (h_VT.grad, h_T.grad):
        assert (g[~mask] == 0).all() and (g[mask].abs().sum(-1) > 1e-3).all()
    close(p.cycle_loss(h_T, mask), normal_nll(h_T, *p.P_back(p.P.mean(h_T)), mask))


def test_next_token_loss_by_hand():
    head = torch.nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3))
    # logits (0, ln 3, ln 4), probabilities (1, 3, 4) / 8
    y = torch.tensor([0, math.log(3), math.log(4)]).expand(4, 3)
    want = -sum(math.log(k / 8) for k in (3, 1, 4, 3))
    assert next_token_loss(head, y, torch.tensor([1, 0, 2, 1])).item() == pytest.approx(want, abs=1e-5)
    assert next_token_loss(head, 50 * torch.eye(3), torch.tensor([0, 1, 2])).item() < 1e-6
    assert next_token_loss(head, 50 * torch.eye(3), torch.tensor([1, 2, 0])).item() > 50


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("shape", [(1.0, 0, None), (0.7, 5, [3, 8])])
@pytest.mark.parametrize("trains", [True, False])
def test_head_log_probs_in_parts_equal_the_plain_ones(monkeypatch, rows, shape, trains):
    """Values, entropies, and the gradients of the states and of the head, each row with a weight of its own."""
    torch.manual_seed(12)
    head = torch.nn.Linear(6, 11, bias=False)
    monkeypatch.setattr(HeadLogProbs, "LOGITS", 11 * rows)
    temperature, top_k, never = shape
    never = None if never is None else torch.tensor(never)
    y, g = 3 * torch.randn(9, 6), torch.randn(9)
    logp = log_probs(head(y), temperature, top_k, never)
    ids = logp.topk(2).indices[:, 1]  # sampled, so never cut off
    out = []
    for plain in (True, False):
        x = y.clone().requires_grad_(True)
        head.weight.requires_grad_(trains).grad = None
        if plain:
            logp = log_probs(head(x), temperature, top_k, never)
            picked, H = logp.gather(-1, ids[:, None])[:, 0], torch.distributions.Categorical(logits=logp).entropy()
        else:
            picked, H = head_log_probs(head, x, ids, *shape[:2], never)
            assert not H.requires_grad
        (picked * g).sum().backward()
        out.append((picked, H.detach(), x.grad, *([head.weight.grad] if trains else [])))
    for a, b in zip(*out):
        assert a.abs().max() > 0.1
        close(a, b, 1e-5)


def test_entropy_by_hand():
    close(entropy(torch.full((2, 3, 16), 0.7)), torch.full((2, 3), math.log(16)), 1e-5)
    # probabilities 1/4 and 3/4: (ln 4) / 4 + 3/4 ln(4/3)
    want = math.log(4) / 4 + 0.75 * math.log(4 / 3)
    assert entropy(torch.tensor([[[0.0, math.log(3)]]])).item() == pytest.approx(want, abs=1e-6)


# --------------------------------------------------------------------------------------------- what is trained
@pytest.mark.parametrize("parts", [("projector",), ("inverse", "codebook", "world"), ("policy",), ()])
def test_train_only(vlm, parts):
    m = LatentModel(vlm.config, CODES, 1, 1)
    m.train_only("policy", "projector")
    names = m.train_only(*parts)
    assert {n.split(".")[0] for n in names} == set(parts)
    for n, p in m.named_parameters():
        assert p.requires_grad == (n.split(".")[0] in parts) == (n in names)
    assert {n.split(".")[0] for n, _ in m.named_parameters()} == set(LatentModel.parts)


def last_names(body, blocks):
    return {n for n, _ in body.named_parameters() if n.startswith((
        *(f"model.language_model.layers.{k}." for k in blocks), "model.language_model.norm.", "model.language_model.embed_tokens."))}


def test_train_last_of_the_tied_checkpoint():
    v = VLM(TINY)
    assert not any(p.requires_grad for p in v.parameters())
    names = v.train_last(8 / 36)
    assert set(names) == last_names(v.model, [5]) and len(names) == len(set(names)) == 14
    assert all(p.requires_grad == (n in names) for n, p in v.model.named_parameters())
    assert v.head.weight is v.model.get_input_embeddings().weight


def test_train_last_of_an_untied_checkpoint(tmp_path):
    config = AutoConfig.from_pretrained(TINY)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    v = VLM(tmp_path)
    assert v.head.weight is not v.model.get_input_embeddings().weight
    assert not any(p.requires_grad for p in v.parameters())
    assert set(v.train_last(0.34)) == last_names(v.model, [4, 5]) | {"lm_head.weight"}


@pytest.mark.parametrize("damage", ["missing", "empty", "no weights", "broken weights"])
def test_bad_checkpoint_is_named(tmp_path, damage):
    folder = tmp_path / "my-vlm"
    if damage != "missing":
        folder.mkdir()
    if "weights" in damage:
        (folder / "config.json").write_bytes((TINY / "config.json").read_bytes())
    if damage == "broken weights":
        (folder / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(DataError, match="my-vlm"):
        VLM(folder)
