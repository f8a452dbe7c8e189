"""stage2_codebook.py: what trains in each phase and ablation, code use by hand, the losses on held-out rows."""

import math

import pytest
import torch
from helpers import CODES, CPU, assert_only, names_of, no_noise, snapshot, take_step

from data import Batch, DataError, Records
from model import LatentModel, inverse_loss
from stage2_codebook import Config, Usage, joint_loss, main, trainable_parts, usage_entropy, validate
from vlm import log_probs

PHASES = [("a", "nothing"), ("b", "nothing"), ("b", "cycle"), ("b", "projector"), ("b", "text")]


@pytest.mark.parametrize("phase, without", PHASES)
def test_only_the_phase_s_parts_train(trainee, vlm, processor, batch_of, phase, without):
    listed = trainee.train_only(*trainable_parts(phase, without))
    with_P = phase == "b" and without in ("nothing", "cycle")
    want = names_of(trainee, "inverse", "quantiser", "world", *(["projector"] if with_P else []))
    assert listed == want
    before = snapshot(vlm, trainee)
    text = batch_of("text") if phase == "b" and without != "text" else None
    loss, _ = joint_loss(trainee, vlm, processor, batch_of("paired"), text, Config(without=without))
    take_step(loss, vlm, trainee)
    assert_only(before, (vlm, trainee), want)


def test_ablations_leave_out_what_they_name(trainee, vlm, processor, batch_of, monkeypatch):
    monkeypatch.setattr(Batch, "uniforms", no_noise)
    paired, text = batch_of("paired"), batch_of("text")

    def loss(**settings):
        with torch.no_grad():
            return joint_loss(trainee, vlm, processor, paired, text, Config(**settings))

    def close(a, b):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)

    full, m = loss(projector_weight=0.1)
    bare = full - 0.1 * (m["proj"] + m["cycle"])
    close(loss(projector_weight=0.0)[0], bare)
    close(loss(projector_weight=0.1, without="cycle")[0], bare + 0.1 * m["proj"])
    trainee.project = False  # as --without projector builds it
    plain, names = loss(projector_weight=0.1, without="projector")
    h = vlm(text)
    assert trainee.context(h, text.paired_B) is h and not {"proj", "cycle"} & set(names)
    trainee.project = True
    assert (trainee.context(h, text.paired_B) - h).abs().max() > 1e-3 and abs(plain - bare) > 1e-4


def test_each_kind_of_data_has_its_own_mean(trainee, vlm, processor, batch_of, monkeypatch):
    """L = mean over the paired tokens + mean over the text tokens, bonus included; in phase a the first one alone."""
    monkeypatch.setattr(Batch, "uniforms", no_noise)
    paired, text = batch_of("paired"), batch_of("text", 2)
    cfg, means = Config(projector_weight=0.0), []
    with torch.no_grad():
        both, metrics = joint_loss(trainee, vlm, processor, paired, text, cfg)
        first = joint_loss(trainee, vlm, processor, paired, None, cfg)[0]
        for batch in (paired, text):
            inverse = inverse_loss(trainee, vlm, trainee.context(vlm(batch), batch.paired_B), batch)
            means.append((inverse["nll"] + inverse["auxiliary"]) / batch.explained_BT.sum())
            name = "used_paired" if batch is paired else "used_text"
            assert torch.equal(metrics[name], torch.bincount(inverse["codes"], minlength=CODES))
    torch.testing.assert_close(both, sum(means))
    torch.testing.assert_close(first, means[0])
    assert metrics["nll_text"] > means[1]  # the bonus is not in the logged loss


def test_the_inverse_loss_does_not_reach_the_projector(trainee, vlm, processor, batch_of):
    trainee.train_only(*trainable_parts("b"))
    cfg = Config(projector_weight=0.0)
    joint_loss(trainee, vlm, processor, batch_of("paired"), batch_of("text"), cfg)[0].backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in trainee.projector.parameters())
    assert all(p.grad is not None for p in trainee.inverse.parameters())


def test_code_use_by_hand():
    """Over a window of two steps: what the first step used is forgotten at the third."""
    usage = Usage(window=2)
    one = usage({"text": torch.tensor([2, 2, 0, 0])})
    assert one["codes_text"] == 2 and one["perplexity_text"].item() == pytest.approx(2.0, rel=1e-5)
    two = usage({"text": torch.tensor([0, 0, 4, 0])})
    # use 1/4, 1/4, 1/2: entropy 1/2 ln 4 + 1/2 ln 2 = 3/2 ln 2
    assert two["codes_text"] == 3 and two["perplexity_text"].item() == pytest.approx(2**1.5, rel=1e-5)
    three = usage({"text": torch.tensor([0, 0, 1, 0]), "paired": torch.tensor([1, 1, 1, 1])})
    assert three["codes_text"] == 1 and three["perplexity_text"].item() == pytest.approx(1.0, rel=1e-5)
    assert three["codes_paired"] == 4 and three["perplexity_paired"].item() == pytest.approx(4.0, rel=1e-5)


@torch.no_grad()
def test_held_out_losses_start_at_the_vlm_s_and_are_means_over_tokens(vlm, processor, world):
    """Before training the world model says what the VLM says, whatever the code."""
    torch.manual_seed(0)
    fresh, file = LatentModel(vlm.config, CODES, 1, 1), Records(world / "paired.jsonl")
    records, total, count = [file[i] for i in range(3)], 0.0, 0
    val = validate(fresh, vlm, processor, records, CPU, size=2)
    for record in records:
        batch = processor.collate([processor.example(record)])
        logp = log_probs(vlm.head(vlm(batch)))[0, :-1]
        for t in range(batch.ids_BT.shape[1] - 1):
            if batch.response_BT[0, t + 1]:
                total, count = total - logp[t, batch.ids_BT[0, t + 1]].item(), count + 1
    assert val == {k: pytest.approx(total / count, rel=1e-4) for k in ("val_vlm", "val_inferred", "val_random")}


@torch.no_grad()
def test_held_out_losses_tell_the_inferred_codes_from_random_ones(latent, vlm, processor, world):
    file = Records(world / "text.jsonl")
    val = validate(latent, vlm, processor, [file[i] for i in range(2)], CPU)
    assert len({round(v, 4) for v in val.values()}) == 3


# --------------------------------------------------------------------------------------------------- the usage bonus
def test_the_entropy_of_the_mean_posterior_by_hand():
    """Two tokens, each sure of another code: no entropy of their own, but log 2 in the use of the codes."""
    logits = torch.tensor([[50.0, 0.0, 0.0], [0.0, 50.0, 0.0]])
    assert usage_entropy(logits, 0.5).item() == pytest.approx(math.log(2), rel=1e-5)
    assert usage_entropy(logits[:1], 1.0).item() == pytest.approx(0.0, abs=1e-5)
    assert usage_entropy(torch.zeros(2, 3), 0.5).item() == pytest.approx(math.log(3), rel=1e-5)


def test_the_usage_entropy_is_of_all_ranks_and_has_its_gradient(monkeypatch):
    """Five tokens on one rank and three on another: the mean of their parts is H of all eight, gradients included."""
    torch.manual_seed(3)
    logits = torch.randn(8, 6, requires_grad=True)
    p = torch.softmax(logits, -1).mean(0)
    want = -(p * p.log()).sum()
    (want_gradient,) = torch.autograd.grad(want, logits)
    monkeypatch.setattr("checkpoint.world_size", lambda: 2)
    shares = [2 / 8 * torch.softmax(x, -1).sum(0).detach() for x in logits.split((5, 3))]
    monkeypatch.setattr("common.total", lambda q: sum(shares))
    parts = [usage_entropy(x, 2 / 8) for x in logits.split((5, 3))]
    (gradient,) = torch.autograd.grad(sum(parts) / 2, logits)
    assert (sum(parts) / 2).item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-4, atol=1e-7)


def test_the_usage_bonus_is_for_both_kinds_of_data_and_not_in_parts(trainee, vlm, processor, batch_of, monkeypatch):
    monkeypatch.setattr(Batch, "uniforms", no_noise)
    paired, text, losses = batch_of("paired"), batch_of("text", 2), []
    with torch.no_grad():
        for bonus in (0.0, 0.5):
            losses.append(joint_loss(trainee, vlm, processor, paired, text, Config(usage_bonus=bonus))[0])
        H = 0.0
        for batch in (paired, text):
            logits = trainee.inverse_logits(trainee.context(vlm(batch), batch.paired_B))[batch.explained_BT]
            H += usage_entropy(logits, 1 / len(logits))
    assert (losses[0] - losses[1]).item() == pytest.approx(0.5 * H.item(), rel=1e-3)
    with pytest.raises(DataError, match="--usage-bonus.*leave out --micro"):
        main(["--usage-bonus", "0.1", "--micro", "2"])
