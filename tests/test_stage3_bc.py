"""stage3_bc.py: what trains in each phase, the cloning loss by hand, the schedule of adaptation."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, assert_only, names_of, no_noise, shares, snapshot, take_step

import common
from data import Batch
from model import inverse_loss
from stage3_bc import adapt_loss, adapt_rate, bc_loss, clone_loss, context_of, sft_loss, trainable_parts
from vlm import VLM, log_probs


@pytest.mark.parametrize("phase", ["clone", "adapt"])
def test_only_the_phase_s_parts_train(trainee, vlm, batch_of, phase):
    listed = trainee.train_only(*trainable_parts(phase))
    want = names_of(trainee, "policy", *(["inverse", "quantiser", "world"] if phase == "adapt" else []))
    assert listed == want
    before = snapshot(vlm, trainee)
    if phase == "clone":
        given = {"paired": batch_of("paired"), "text": batch_of("text")}
        loss, _ = clone_loss(trainee, vlm, given, shares(*given.values()))
    else:
        demos = batch_of("task_demos")
        loss, _ = adapt_loss(trainee, vlm, demos, *shares(demos))
    take_step(loss, vlm, trainee)
    assert_only(before, (vlm, trainee), want)


def test_sft_trains_only_the_last_blocks_norm_embeddings_and_head(batch_of):
    vlm = VLM(TINY)
    listed = vlm.train_last(8 / 36)
    parts = (".layers.5.", "language_model.norm", "embed_tokens", "lm_head")
    assert all(any(part in n for part in parts) for n in listed)
    before = snapshot(vlm)
    demos = batch_of("task_demos")
    take_step(sft_loss(vlm, demos, *shares(demos))[0], vlm)
    assert_only(before, (vlm,), ["model." + n for n in listed])


def test_bc_loss_by_hand():
    """Two codes. Positions 1 and 2 explain the tokens 2 and 3, which are of the response; position 0 does not count."""
    p = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.9, 0.1], [0.5, 0.5]]])
    latent = SimpleNamespace(policy=lambda e: p.log())
    batch = SimpleNamespace(explained_BT=torch.tensor([[False, True, True]]))
    loss, hits = bc_loss(latent, None, batch, torch.tensor([1, 1]))
    assert loss.item() == pytest.approx(-math.log(0.75) - math.log(0.1), rel=1e-5)
    assert hits == 1


@torch.no_grad()
def test_clone_loss_is_a_mean_for_each_kind_of_data(trainee, vlm, batch_of):
    """- log pi of f_inverse's most likely code, without noise, token by token."""
    given, want = {"paired": batch_of("paired"), "text": batch_of("text", 2)}, {}
    for name, batch in given.items():
        e_BTD = trainee.context(vlm(batch), batch.paired_B)
        logp_BTK, inferred_BTK = log_probs(trainee.policy(e_BTD)), trainee.inverse(e_BTD)
        found = []
        for b, t in batch.response_BT[:, 1:].nonzero().tolist():
            found.append(-logp_BTK[b, t, inferred_BTK[b, t + 1].argmax()].item())
        want[name] = sum(found) / len(found)
    loss, metrics = clone_loss(trainee, vlm, given, shares(*given.values()))
    assert loss.item() == pytest.approx(want["paired"] + want["text"], rel=1e-5)
    assert {k: metrics[f"bc_{k}"].item() for k in want} == pytest.approx(want, rel=1e-5)
    assert all(0 <= metrics[f"agree_{k}"] <= 1 for k in want)


@torch.no_grad()
def test_adapt_loss_is_cloning_plus_the_inverse_loss(trainee, vlm, batch_of, monkeypatch):
    monkeypatch.setattr(Batch, "uniforms", no_noise)
    batch = batch_of("task_demos")
    loss, metrics = adapt_loss(trainee, vlm, batch, *shares(batch))
    inverse = inverse_loss(trainee, vlm, context_of(trainee, vlm, batch), batch)
    count = batch.explained_BT.sum()
    cloned = clone_loss(trainee, vlm, {"demos": batch}, shares(batch))[0]
    want = cloned + (inverse["nll"] + inverse["auxiliary"]) / count
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(metrics["nll"], inverse["nll"] / count)


def test_the_inverse_model_runs_once_in_adaptation(trainee, vlm, batch_of):
    ran = []
    handle = trainee.inverse.register_forward_hook(lambda *_: ran.append(1))
    demos = batch_of("task_demos")
    adapt_loss(trainee, vlm, demos, *shares(demos))
    handle.remove()
    assert len(ran) == 1


def test_cloning_and_adaptation_leave_the_contexts_alone(trainee, vlm, batch_of):
    trainee.requires_grad_(True)
    text = batch_of("text")
    adapt_loss(trainee, vlm, text, *shares(text))[0].backward()
    assert all(p.grad is None for p in trainee.projector.parameters())


def test_the_rate_of_adaptation():
    """100 steps: three warm up, then the cosine."""
    rate = adapt_rate(100)
    assert [rate(s / 100) for s in range(3)] == pytest.approx([1 / 3, 2 / 3, common.cosine(0.02)])
    assert rate(0.5) == pytest.approx(0.55) and rate(1.0) == pytest.approx(0.1)
