"""vlm.py: the VLM step by step and padded, its positions by hand, the LM head's log-probabilities, what trains."""

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LAYERS, TINY, alone, close, extend, picked, question
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

import packed_linear
from data import DataError, Processor
from rollout import roomy_cache
from vlm import VLM, HeadLogProbs, head_log_probs, head_product, log_probs, next_token_loss, positions_of, visible


# ---------------------------------------------------------------------------------------- masks and positions
def test_masks_and_positions_by_hand():
    mask_BS = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    # the last three positions; a padded query would see itself alone
    want = [[[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]], [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]]
    assert visible(mask_BS, 3)[:, 0].int().tolist() == want
    assert visible(mask_BS, 4)[0, 0, 0].tolist() == [True, False, False, False]
    assert positions_of(mask_BS, 4).tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]
    assert positions_of(mask_BS, 2).tolist() == [[1, 2], [2, 3]]


def test_positions_by_hand(vlm, processor, prompts):
    """A left-padded row with one image of 3 x 3 tokens behind k text tokens: time, row and column start at k, and the
    text goes on at k + 3."""
    batch = processor.collate(prompts, left=True)
    positions, deltas = vlm.positions(batch)
    ids = prompts[0].ids
    k, n = int((ids == processor.image_id).argmax()), len(ids)
    assert (ids == processor.image_id).sum() == 9
    behind = list(range(k + 3, k + 3 + n - k - 9))
    image = ([k] * 9, [k + i // 3 for i in range(9)], [k + i % 3 for i in range(9)])
    text = len(prompts[1].ids)
    for axis, inside in zip(positions, image):
        assert axis[0, -n:].tolist() == list(range(k)) + inside + behind
        assert axis[1, -text:].tolist() == list(range(text))
    assert deltas[:2, 0].tolist() == [behind[-1] + 1 - n, 0]


# ------------------------------------------------------------------------------------------ caches and padding
@torch.no_grad()
@pytest.mark.parametrize("at_once, roomy", [(1, True), (1, False), (5, True), (5, False), (2, True)])
def test_step_by_step_equals_one_full_pass(vlm, processor, prompts, at_once, roomy):
    group, steps = 2, 5
    more = torch.from_numpy(np.random.default_rng(0).integers(100, 2000, (len(prompts) * group, steps)))
    batch = processor.collate(prompts, left=True)
    assert len(set(batch.mask_BT.sum(1).tolist())) == 3 and batch.images_B.tolist() == [1, 0, 2]
    L = batch.ids_BT.shape[1]
    cache = roomy_cache(LAYERS, L + steps) if roomy else DynamicCache(config=vlm.config)
    states = [vlm(batch, cache).repeat_interleave(group, 0)]
    cache.batch_repeat_interleave(group)
    deltas = vlm.positions(batch)[1].repeat_interleave(group, 0)
    mask = torch.cat((batch.mask_BT.repeat_interleave(group, 0), torch.ones_like(more, dtype=torch.bool)), 1)
    for t in range(0, steps, at_once):
        new = more[:, t : t + at_once]
        states.append(vlm.extend(new, mask[:, : L + t + new.shape[1]], deltas, cache))
    stepped = torch.cat(states, 1)

    longer = [extend(prompts[n // group], more[n]) for n in range(len(more))]
    full = processor.collate(longer, left=True)
    assert torch.equal(full.mask_BT, mask)
    close(stepped[mask], vlm(full)[mask])
    for n, e in enumerate(longer):  # and each row alone, without padding, gives the same
        close(stepped[n, -len(e.ids) :], vlm(alone(e))[0])


@torch.no_grad()
def test_right_padding(vlm, processor, prompts):
    h = vlm(processor.collate(prompts))
    for b, e in enumerate(prompts):
        close(h[b, : len(e.ids)], vlm(alone(e))[0])


@torch.no_grad()
def test_image_and_its_order_reach_the_text(vlm, processor):
    """Pixels of row b go to row b: swapping the two images of a prompt moves its last state."""
    e = question(processor, 5, 0, 0)
    half = len(e.pixels) // 2
    swapped = replace(e, pixels=torch.cat((e.pixels[half:], e.pixels[:half])))
    assert (vlm(alone(e))[0, -1] - vlm(alone(swapped))[0, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_batch_without_pixels(vlm, processor):
    texts = [question(processor, 8), question(processor, 9, system="You are Odo the monk, a friend of the sea.")]
    batch = processor.collate(texts, left=True)
    assert batch.pixels is None and batch.grids is None and not batch.paired_B.any()
    h = vlm(batch)
    for b, e in enumerate(texts):
        close(h[b, -len(e.ids) :], vlm(alone(e))[0])


# ------------------------------------------------------------------------------------------ log-probabilities
def test_log_probs_by_hand():
    logits = torch.tensor([4.0, 1, 9, 16]).log()
    close(log_probs(logits).exp(), torch.tensor([4, 1, 9, 16]) / 30, 1e-6)
    # temperature 1/2 squares them
    close(log_probs(logits, 0.5).exp(), torch.tensor([16, 1, 81, 256]) / 354, 1e-6)
    # temperature 2 takes roots; 16 is banned, then 1 is not among the top two
    close(log_probs(logits, 2.0, 2, torch.tensor([3])).exp(), torch.tensor([2, 0, 3, 0]) / 5, 1e-6)


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


def plain_log_probs(head, x, ids, temperature, never, support):
    logp = log_probs(head(x), temperature, 0, never, support)
    return logp.gather(-1, ids[:, None])[:, 0], torch.distributions.Categorical(logits=logp).entropy()


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("shape", [(1.0, 0, None), (0.7, 5, [3, 8])])
@pytest.mark.parametrize("trains", [True, False])
def test_head_log_probs_in_parts_equal_the_plain_ones(monkeypatch, rows, shape, trains):
    """Values, entropies, and the gradients of the states and of the head, each row with a weight of its own."""
    torch.manual_seed(12)
    head = torch.nn.Linear(6, 11, bias=False)
    monkeypatch.setattr(HeadLogProbs, "LOGITS", 11 * rows)
    temperature, top_k, never = (*shape[:2], None if shape[2] is None else torch.tensor(shape[2]))
    y, g = 3 * torch.randn(9, 6), torch.randn(9)
    best = log_probs(head(y), temperature, top_k, never).topk(top_k or 11).indices
    ids, shape = best[:, 1], (temperature, never, best if top_k else None)  # sampled, so never cut off
    out = []
    for way in (plain_log_probs, head_log_probs):
        x = y.clone().requires_grad_(True)
        head.weight.requires_grad_(trains).grad = None
        logp, H = way(head, x, ids, *shape)
        assert way is plain_log_probs or not H.requires_grad
        (logp * g).sum().backward()
        out.append((logp, H.detach(), x.grad, *([head.weight.grad] if trains else [])))
    for a, b in zip(*out):
        assert a.abs().max() > 0.1
        close(a, b, 1e-5)


@pytest.mark.parametrize(
    "dtype, scale, sure, most",
    [
        (torch.bfloat16, 0.17, (0.95, 0.999), 0.03),
        (torch.bfloat16, 0.25, (0.9995, 0.99999), 0.03),
        (torch.float32, 0.4, (1 - 1e-6, 1.0), 1e-4),
    ],
)
def test_the_gradients_where_a_token_is_almost_sure(dtype, scale, sure, most):
    """sum_v (1[v = x] - p_v) W[v] is then a small number made of large ones, and rounding must not eat it."""
    torch.manual_seed(18)
    head = torch.nn.Linear(64, 200, bias=False).to(dtype).requires_grad_(dtype == torch.float32)
    with torch.no_grad():
        head.weight.copy_(torch.randn(200, 64))
    ids = torch.arange(20)
    y = (scale * head.weight[ids]).detach().requires_grad_(True)
    logp, _ = head_log_probs(head, y, ids)
    logp.sum().backward()
    y64, w64 = y.detach().double(), head.weight.detach().double()
    others = torch.softmax(y64 @ w64.T, -1).index_put((ids, ids), torch.zeros(20).double())
    assert sure[0] < 1 - others.sum(-1).median() < sure[1]
    minus = others.index_put((ids, ids), -others.sum(-1))  # p - 1[v = x]
    pairs = [(y.grad, -minus @ w64)]
    if head.weight.requires_grad:
        pairs.append((head.weight.grad[:20], (-minus.T @ y64)[:20]))
    for got, want in pairs:
        error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
        assert error.max() < most


# ------------------------------------------------------------------------------------------------ what trains
def last_names(model, blocks):
    """Parameters of these blocks, of the final norm and of the embeddings."""
    inside = [f"layers.{k}." for k in blocks] + ["norm.", "embed_tokens."]
    starts = tuple("model.language_model." + name for name in inside)
    return {n for n, _ in model.named_parameters() if n.startswith(starts)}


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
    folder, tiny = tmp_path / "my-vlm", Path(TINY)
    if damage != "missing":
        folder.mkdir()
    if "weights" in damage:
        (folder / "config.json").write_bytes((tiny / "config.json").read_bytes())
    if damage == "broken weights":
        (folder / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(DataError, match="my-vlm"):
        VLM(folder)


# ------------------------------------------------------------------------------------------- a support that is given
def test_log_probs_over_a_given_support_by_hand():
    logits = torch.tensor([[4.0, 1, 9, 16], [4, 1, 9, 16]]).log()
    got = log_probs(logits, support=torch.tensor([[0, 1], [2, 0]])).exp()
    close(got, torch.tensor([[4 / 5, 1 / 5, 0, 0], [4 / 13, 0, 9 / 13, 0]]), 1e-6)
    # the top k of these logits does not matter then, temperature and ban do: 16 against 9 ** 2 = 81, 1 is banned
    got = log_probs(logits, 0.5, 1, torch.tensor([1]), torch.tensor([[0, 1, 2]] * 2)).exp()
    close(got, torch.tensor([[16 / 97, 0, 81 / 97, 0]] * 2), 1e-6)


@pytest.mark.parametrize("rows", [2, 100])
def test_head_log_probs_over_a_given_support_against_float64(monkeypatch, rows):
    """Values, entropies and both gradients; the support is no top k, and differs from row to row."""
    g = torch.Generator().manual_seed(13)
    monkeypatch.setattr(HeadLogProbs, "LOGITS", 11 * rows)
    W, y, c = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((11, 6), (9, 6), (9,)))
    support = torch.stack([torch.randperm(11, generator=g)[:4] for _ in range(9)])
    ids = support[:, 2]
    W.requires_grad_(True), y.requires_grad_(True)
    want = torch.log_softmax((y @ W.T).gather(1, support) / 0.7, 1)
    want_y, want_W = torch.autograd.grad((want[:, 2] * c).sum(), (y, W))

    head = torch.nn.Linear(6, 11, bias=False)
    head.weight.data.copy_(W.detach())
    x = y.detach().float().requires_grad_(True)
    logp, H = head_log_probs(head, x, ids, 0.7, None, support)
    (logp * c.float()).sum().backward()
    for got, exact in (
        (logp, want[:, 2]),
        (H, -(want.exp() * want).sum(1)),
        (x.grad, want_y),
        (head.weight.grad, want_W),
    ):
        assert exact.abs().max() > 0.1
        close(got.double(), exact, 2e-6)


# ------------------------------------------------------------------------------------------------ in bfloat16
def test_logits_are_not_rounded_to_bfloat16(vlm, latent):
    """The factors are; the LM head's and the policy's logits are float32. What is scored has the same ones."""
    torch.manual_seed(14)
    y, ids = 3 * torch.randn(5, 128), torch.tensor([5, 77, 300, 1000, 9])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, actions = vlm.scorer()(y), latent.policy(y[None])
        logp, _ = head_log_probs(vlm.head, y, ids)
    want = y.bfloat16().double() @ vlm.head.weight.bfloat16().double().T
    assert logits.dtype == actions.dtype == torch.float32
    close(logits.double(), want, 1e-4)
    close(logp, picked(log_probs(logits), ids), 1e-5)
    assert (actions.bfloat16() != actions).float().mean() > 0.9
    close(vlm.scorer()(y), vlm.head(y), 0)


@pytest.mark.parametrize("at_once", [2, 30])
def test_the_gradient_of_a_head_that_trains_has_bfloat16_factors_and_a_float32_sum(monkeypatch, at_once):
    """sum_m (1[v = x] - p_v) y, against float64: each factor is off by up to 1/256, so the sum by less than that."""
    torch.manual_seed(19)
    monkeypatch.setattr(HeadLogProbs, "LOGITS", at_once * 200)
    head, y, ids = torch.nn.Linear(64, 200, bias=False), torch.randn(30, 64), torch.arange(30) % 7
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(head, y, ids)
    loss.backward()
    p = torch.softmax(y.double() @ head.weight.detach().double().T, -1)
    want = (p - torch.nn.functional.one_hot(ids, 200)).T @ y.double()
    error = (head.weight.grad.double() - want).norm() / want.norm()
    assert head.weight.grad.dtype == torch.float32 and 1e-4 < error < 1 / 256


@pytest.mark.skipif(not packed_linear.AVAILABLE, reason="this torch has no packed product")
def test_a_head_in_bfloat16_is_packed_once_for_all_its_products(vlm, monkeypatch):
    """In float32 it is not: there the product is torch's own, as in the demo."""
    packed, real = [], torch.ops.mkldnn._reorder_linear_weight

    def reorder(weight, rows):
        packed.append(weight.shape)
        return real(weight, rows)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", reorder)
    monkeypatch.setattr(HeadLogProbs, "LOGITS", 2 * len(vlm.head.weight))
    y, ids = torch.randn(6, 128), torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        in_parts = next_token_loss(vlm.head, y, ids)
        assert packed == [vlm.head.weight.shape]
        monkeypatch.setattr(HeadLogProbs, "LOGITS", 6 * len(vlm.head.weight))
        close(in_parts, next_token_loss(vlm.head, y, ids), 1e-5)
    next_token_loss(vlm.head, y, ids)
    assert len(packed) == 2


@pytest.mark.skipif(not packed_linear.AVAILABLE, reason="this torch has no packed product")
def test_what_is_kept_of_a_frozen_head_in_bfloat16_follows_its_weight():
    """It is made once as long as the weight stays, anew after a change in place, and each time for one that trains."""
    torch.manual_seed(20)
    weight, y = torch.randn(300, 512).bfloat16(), torch.randn(4, 512).bfloat16()
    for change in (lambda: None, lambda: weight.mul_(-2), lambda: weight.copy_(weight.flip(0))):
        change()
        first = head_product(weight)(y)
        close(first.double(), y.double() @ weight.double().T, 1e-3)
        kept = weight.wide
        close(head_product(weight)(y), first, 0)
        assert weight.wide is kept
    close(head_product(copy.deepcopy(weight))(y), first, 0)
    trained = torch.nn.Parameter(weight.clone())
    head_product(trained)
    assert not hasattr(trained, "wide")


# --------------------------------------------------------------------------------------- a checkpoint that is not whole
def damaged(tmp_path, change):
    """A copy of the tiny checkpoint, one tensor of which went through `change` (None: it is gone)."""
    shutil.copytree(TINY, tmp_path / "vlm")
    file = tmp_path / "vlm" / "model.safetensors"
    tensors = load_file(file)
    name = "layers.0.mlp.gate_proj.weight"
    (own,) = [k for k in tensors if k.endswith("model." + name) and "visual" not in k]
    tensor = change(tensors.pop(own))
    save_file(tensors | ({} if tensor is None else {own: tensor}), file, {"format": "pt"})
    return tmp_path / "vlm", name


@pytest.mark.parametrize("change, why", [(lambda w: None, "would be random"), (lambda w: w / 0 * 0, "not finite")])
def test_a_tensor_that_is_missing_or_not_finite_is_named(tmp_path, change, why):
    folder, name = damaged(tmp_path, change)
    with pytest.raises(DataError, match=f"{name}.*{why}"):
        VLM(folder)


def test_code_beside_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    """An unknown model type with code of its own: the library would ask on standard input, and 'y' would run it."""
    shutil.copytree(TINY, tmp_path / "vlm")
    config = json.loads((tmp_path / "vlm" / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "own.C", "AutoModelForImageTextToText": "own.M"}}
    (tmp_path / "vlm" / "config.json").write_text(json.dumps(config))
    (tmp_path / "vlm" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (VLM, Processor):
        with pytest.raises(DataError):
            load(tmp_path / "vlm")
    assert not (tmp_path / "ran").exists()
