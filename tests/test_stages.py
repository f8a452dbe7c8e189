"""The four stages: what trains and what stays frozen, their maths by hand, resume, ranks, refusals."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import stage1_projector
import stage2_codebook
import stage3_bc
import stage4_latent_rl
from data import DataError, Processor, Records
from model import VLM, LatentModel
from stage4_latent_rl import group_advantages, k3, policy_loss

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tiny" / "vlm")
LN = math.log


# --------------------------------------------------------------------------------------------- the RL maths by hand
def test_advantages_by_hand():
    # rewards 1, 2, 3, 6: mean 3, deviations -2 -1 0 3, sum of squares 14, unbiased variance 14/3
    r = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])
    dev = torch.tensor([-2.0, -1.0, 0.0, 3.0])
    for loss_type in ("grpo", "dapo", "bnpo"):
        adv = group_advantages(r, loss_type)
        assert torch.allclose(adv[0], dev / math.sqrt(14 / 3), atol=1e-5)
        assert (adv[1] == 0).all()
    adv = group_advantages(r, "dr_grpo")
    assert torch.allclose(adv[0], dev) and (adv[1] == 0).all()
    with pytest.raises(ValueError, match="ppo"):
        group_advantages(r, "ppo")


def test_equal_rewards_give_no_advantage_even_with_rounding():
    r = torch.full((1, 8), 0.1) + torch.tensor([0, 1e-8] * 4)
    assert (group_advantages(r, "grpo") == 0).all()


def test_failed_judgement_is_left_out_of_the_statistics():
    nan = float("nan")
    adv = group_advantages(torch.tensor([[1.0, nan, 3.0]]), "grpo")
    # mean 2 of the two that are there, unbiased std sqrt(2)
    assert torch.allclose(adv, torch.tensor([[-1 / math.sqrt(2), 0.0, 1 / math.sqrt(2)]]), atol=1e-5)


def test_k3_by_hand():
    # d = ln 2: 2 - ln 2 - 1 = 1 - ln 2; d = 0: 0; never negative
    assert torch.allclose(k3(torch.tensor([0.0, -1.0]), torch.tensor([LN(2), -1.0])), torch.tensor([1 - LN(2), 0.0]))


def one(ratio, adv, low=0.2, high=0.2):
    lp = torch.tensor([[LN(ratio)]], requires_grad=True)
    loss = policy_loss(lp, torch.zeros(1, 1), None, torch.tensor([adv]), torch.ones(1, 1), loss_type="grpo", clip_low=low, clip_high=high,
                       beta=0.0, max_length=1)
    loss.backward()
    return loss.item(), lp.grad.item()


@pytest.mark.parametrize("ratio, adv, loss, grad", [
    (1.0, 2.0, -2.0, -2.0),     # on policy: loss -A, gradient -A
    (1.1, 2.0, -2.2, -2.2),     # inside the clip: -ratio A
    (1.5, 2.0, -2.4, 0.0),      # good and already likelier: clipped at 1.2, no gradient
    (0.5, 2.0, -1.0, -1.0),     # good and less likely: not clipped
    (1.5, -2.0, 3.0, 3.0),      # bad and likelier: not clipped
    (0.5, -2.0, 1.6, 0.0),      # bad and already less likely: clipped at 0.8
])
def test_clip_cases(ratio, adv, loss, grad):
    got = one(ratio, adv)
    assert got[0] == pytest.approx(loss, abs=1e-5) and got[1] == pytest.approx(grad, abs=1e-5)


def test_clip_higher():
    assert one(1.25, 1.0, high=0.28)[0] == pytest.approx(-1.25, abs=1e-5)
    assert one(1.5, 1.0, high=0.28)[0] == pytest.approx(-1.28, abs=1e-5)


def test_normalisers_by_hand():
    """Two sequences of 1 and 3 tokens, ratio 1, advantages 4 and -2, beta 0: token losses -4 | 2 2 2."""
    lp = torch.zeros(2, 3)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    def loss(kind, **kw):
        return policy_loss(lp, lp, lp, torch.tensor([4.0, -2.0]), mask, loss_type=kind, clip_low=0.2, clip_high=0.2, beta=0.0, max_length=5, **kw).item()
    assert loss("grpo") == pytest.approx((-4 + 2) / 2)         # means of -4 and of 2
    assert loss("dr_grpo") == pytest.approx((-4 + 6) / 10)     # sum 2 over N * max_length = 10
    assert loss("dapo", num_tokens=8) == pytest.approx(2 / 8)  # 8 tokens on all ranks together
    assert loss("bnpo") == pytest.approx(2 / 4)                # 4 tokens here


def test_kl_enters_with_beta_and_padding_is_ignored():
    logp = torch.tensor([[0.0, float("-inf")]])
    ref = torch.tensor([[LN(2), 123.0]])
    got = policy_loss(logp, logp, ref, torch.zeros(1), torch.tensor([[1, 0]]), loss_type="grpo", clip_low=0.2, clip_high=0.2, beta=0.5, max_length=2)
    assert got.item() == pytest.approx(0.5 * (1 - LN(2)))


# ------------------------------------------------------------------------------------------------- frozen is frozen
def snapshot(*modules):
    return [{n: p.detach().clone() for n, p in m.named_parameters()} for m in modules]


def assert_only(before, modules, names):
    """Exactly `names` moved (each at least somewhere), everything else is bit-identical."""
    moved = {n for b, m in zip(before, modules) for n, p in m.named_parameters() if not torch.equal(b[n], p)}
    assert moved == set(names), (moved ^ set(names))


def step(loss, modules, lr=1e-3):
    loss.backward()
    params = [p for m in modules for p in m.parameters() if p.requires_grad]
    torch.optim.AdamW(params, lr=lr, weight_decay=0.0).step()


@pytest.fixture(scope="module")
def parts(world):
    torch.manual_seed(0)
    processor = Processor(TINY, 400)
    vlm = VLM(TINY)
    latent = LatentModel(vlm.config, codes=16, inverse_blocks=1, policy_blocks=1)
    for merge in latent.world.merges:  # as after some training: at exactly 0 the codebook has no gradient yet
        torch.nn.init.normal_(merge.w3.weight, std=0.02)
    for mlp in (latent.projector.P.mlp, latent.projector.P_back.mlp):
        torch.nn.init.normal_(mlp[-1].weight, std=0.02)
    def batch(name, n=3):
        records = Records(world / f"{name}.jsonl")
        return processor.collate([processor.example(records[i]) for i in range(n)])
    return processor, vlm, latent, batch


def names_of(latent, *wanted):
    return [n for n, _ in latent.named_parameters() if n.split(".")[0] in wanted]


@pytest.mark.parametrize("phase, without", [("a", "nothing"), ("b", "nothing"), ("b", "cycle"), ("b", "projector"), ("b", "text")])
def test_stage2_trains_only_its_parts(parts, phase, without):
    processor, vlm, latent, batch = parts
    listed = latent.train_only(*stage2_codebook.trainable_parts(phase, without))
    want = names_of(latent, "inverse", "codebook", "world", *(["projector"] if phase == "b" and without in ("nothing", "cycle") else []))
    assert listed == want
    before = snapshot(vlm, latent)
    text = batch("text") if phase == "b" and without != "text" else None
    loss, _, _ = stage2_codebook.joint_loss(latent, vlm, processor, batch("paired"), text, stage2_codebook.Config(without=without))
    step(loss, (vlm, latent))
    assert_only(before, (vlm, latent), want)


def test_stage2_ablations_leave_out_what_they_name(parts, monkeypatch):
    processor, vlm, latent, batch = parts
    monkeypatch.setattr("model.torch.rand_like", lambda x: torch.full_like(x, 0.5))
    paired, text = batch("paired"), batch("text")
    def loss(**kw):
        with torch.no_grad():
            return stage2_codebook.joint_loss(latent, vlm, processor, paired, text, stage2_codebook.Config(**kw))[:2]
    full, m = loss(projector_weight=0.1)
    bare = full - 0.1 * (m["proj"] + m["cycle"])
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
    close(loss(projector_weight=0.0)[0], bare)
    close(loss(projector_weight=0.1, without="cycle")[0], bare + 0.1 * m["proj"])
    latent.project = False  # as --without projector builds it
    plain, names = loss(projector_weight=0.1, without="projector")
    h = vlm(text)
    assert latent.context(h, text.paired_B) is h and not {"proj", "cycle"} & set(names)
    latent.project = True
    assert (latent.context(h, text.paired_B) - h).abs().max() > 1e-3 and abs(plain - bare) > 1e-4


def test_stage2_inverse_loss_does_not_reach_the_projector(parts):
    processor, vlm, latent, batch = parts
    latent.train_only(*stage2_codebook.trainable_parts("b"))
    latent.zero_grad()
    text = batch("text")
    with torch.no_grad():
        e = latent.context(vlm(text), text.paired_B)
    stage2_codebook.inverse_loss(latent, vlm, e, text, 2.0)[0].backward()
    assert all(p.grad is None for p in latent.projector.parameters())
    assert all(p.grad is not None for p in latent.inverse.parameters())
    latent.zero_grad()


@pytest.mark.parametrize("phase", ["clone", "adapt"])
def test_stage3_trains_only_its_parts(parts, phase):
    _, vlm, latent, batch = parts
    listed = latent.train_only(*stage3_bc.trainable_parts(phase))
    want = names_of(latent, "policy", *(["inverse", "codebook", "world"] if phase == "adapt" else []))
    assert listed == want
    given = {"paired": batch("paired"), "text": batch("text")} if phase == "clone" else {"demos": batch("task_demos")}
    before = snapshot(vlm, latent)
    step(stage3_bc.latent_loss(latent, vlm, phase, given, stage3_bc.Config())[0], (vlm, latent))
    assert_only(before, (vlm, latent), want)


def test_sft_trains_only_the_last_blocks_norm_embeddings_and_head(parts):
    _, _, _, batch = parts
    vlm = VLM(TINY)
    listed = vlm.train_last(8 / 36)
    assert all(".layers.5." in n or "language_model.norm" in n or "embed_tokens" in n or "lm_head" in n for n in listed)
    before = snapshot(vlm)
    step(stage3_bc.sft_loss(vlm, batch("task_demos"))[0], (vlm,))
    assert_only(before, (vlm,), ["model." + n for n in listed])


@pytest.mark.parametrize("actions", ["latent", "token"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_stage4_trains_only_the_policy_or_the_last_blocks(parts, world, actions, loss_type):
    processor, vlm, latent, _ = parts
    cfg = stage4_latent_rl.Config(actions=actions, loss_type=loss_type, beta=0.01)
    never = torch.tensor(processor.never_sampled)
    if actions == "token":
        vlm = VLM(TINY)
        want, model, modules = ["model." + n for n in vlm.train_last(8 / 36)], vlm, (vlm,)
    else:
        want, model, modules = latent.train_only("policy"), latent.policy, (vlm, latent)
        assert want == names_of(latent, "policy")
    roll = make_roll(processor, vlm, latent, world, actions, never)
    before = snapshot(*modules)
    params = [p for p in model.parameters() if p.requires_grad]
    objective = common.wrap(model, lambda m, r: stage4_latent_rl.sampled_logp(m, r, cfg, never))
    adv = group_advantages(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), loss_type).flatten()
    stage4_latent_rl.update(objective, vlm if actions == "token" else latent.policy, torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0), params,
                            roll, adv, torch.ones(4, dtype=torch.bool), cfg, never, 0.2)
    assert_only(before, modules, want)


def test_kl_is_finite_where_the_reference_would_sample_others(parts, world):
    processor, vlm, latent, _ = parts
    cfg, never = stage4_latent_rl.Config(top_k=2), torch.tensor(processor.never_sampled)
    roll = make_roll(processor, vlm, latent, world, "latent", never, top_k=2)
    reference = copy.deepcopy(latent.policy)
    with torch.no_grad():
        reference.out.weight.neg_(), reference.out.bias.neg_()  # the two least likely actions become the reference's top two
    latent.train_only("policy")
    params = list(latent.policy.parameters())
    metrics = stage4_latent_rl.update(lambda r: stage4_latent_rl.sampled_logp(latent.policy, r, cfg, never), reference, torch.optim.SGD(params, lr=0.0),
                                      params, roll, torch.zeros(4), torch.ones(4, dtype=torch.bool), cfg, never, 0.2)
    assert 0 < metrics["kl"] < math.inf and torch.isfinite(metrics["grad_norm"])


def make_roll(processor, vlm, latent, world, actions, never, group=2, top_k=0):
    from model import rollout, uniforms
    records = Records(world / "task_prompts.jsonl")
    prompt = processor.collate([processor.example(records[i], prompt_only=True) for i in range(2)], left=True)
    u = uniforms(0, [(0, i, g) for i in range(2) for g in range(group)], 12)
    return rollout(vlm, latent, prompt, u, group=group, top_k=top_k, never=never, eos=processor.eos_id, pad=processor.pad_id, actions=actions)


@pytest.mark.parametrize("actions", ["latent", "token"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_micro_batches_change_no_gradient(parts, world, actions, loss_type):
    processor, vlm, latent, _ = parts
    never = torch.tensor(processor.never_sampled)
    if actions == "token":
        vlm = VLM(TINY)
        vlm.train_last(8 / 36)
    else:
        latent.train_only("policy")
    model = vlm if actions == "token" else latent.policy
    roll = make_roll(processor, vlm, latent, world, actions, never)
    params = [p for p in model.parameters() if p.requires_grad]
    adv = torch.tensor([-1.0, 1.0, 0.5, -0.5])
    keep = torch.tensor([True, True, True, False])  # and one row left out
    grads = []
    for micro in (0, 2):
        cfg = stage4_latent_rl.Config(actions=actions, loss_type=loss_type, micro=micro)
        objective = common.wrap(model, lambda m, r: stage4_latent_rl.sampled_logp(m, r, cfg, never))
        sgd = torch.optim.SGD(params, lr=0.0)
        sgd.zero_grad = lambda set_to_none=True: None  # keep the gradients to look at
        for p in params:
            p.grad = None
        stage4_latent_rl.update(objective, model, sgd, params, roll, adv, keep, cfg, never, 0.2)
        grads.append(torch.cat([p.grad.flatten() for p in params]))
    assert grads[0].abs().max() > 0
    assert torch.allclose(grads[0], grads[1], atol=1e-5)


# ------------------------------------------------------------------------------------------- the scripts themselves
def files(world):
    return {k: str(world / f"{k}.jsonl") for k in ("paired", "text")}


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """All stages once, two steps each, through their command lines."""
    out, f = tmp_path_factory.mktemp("runs"), files(world)
    demos, prompts = str(world / "task_demos.jsonl"), str(world / "task_prompts.jsonl")
    vlm = ["--vlm", TINY]
    stage1_projector.main(vlm + ["--paired", f["paired"], "--steps", "2", "--batch", "4", "--out", f"{out}/1"])
    stage2_codebook.main(vlm + ["--paired", f["paired"], "--text", f["text"], "--projector", f"{out}/1", "--steps-a", "2", "--steps-b", "2", "--codes", "16",
                          "--inverse-blocks", "1", "--policy-blocks", "1", "--batch", "3", "--val", "4", "--out", f"{out}/2"])
    stage3_bc.main(vlm + ["--paired", f["paired"], "--text", f["text"], "--demos", demos, "--init", f"{out}/2", "--steps-clone", "2", "--steps-adapt", "2",
                    "--batch", "3", "--batch-adapt", "3", "--out", f"{out}/3"])
    stage3_bc.main(vlm + ["--actions", "token", "--demos", demos, "--steps-adapt", "2", "--batch-adapt", "3", "--out", f"{out}/sft"])
    rl = vlm + ["--prompts", prompts, "--steps", "2", "--batch", "2", "--group", "2", "--max-new", "10"]
    stage4_latent_rl.main(rl + ["--init", f"{out}/3", "--out", f"{out}/4"])
    stage4_latent_rl.main(rl + ["--actions", "token", "--init", f"{out}/sft", "--out", f"{out}/4t"])
    return out


def test_all_stages_and_the_evaluation_run(runs, world, tmp_path):
    import evaluate
    for name, steps in (("1", 2), ("2", 4), ("3", 4), ("sft", 2), ("4", 2), ("4t", 2)):
        state = json.loads((common.latest(runs / name) / "state.json").read_text())
        assert state["finished"] and state["step"] == steps
        assert [r["step"] for r in common.read_metrics(runs / name)] == list(range(1, steps + 1))
    evaluate.main(["--vlm", TINY, "--data", str(world), "--sft", f"{runs}/sft", "--bc", f"{runs}/3", "--token", f"{runs}/4t", "--latent", f"{runs}/4",
                   "--codebook", f"{runs}/2", "--limit", "2", "--samples", "2", "--diversity-prompts", "2", "--group", "2", "--max-new", "8", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["rows"]) == ["Prompt", "SFT", "BC latent", "GRPO token", "GRPO latent"]
    for name in ("curves.png", "codes.png", "examples.md", "table.md"):
        assert (tmp_path / name).stat().st_size > 0
    assert all(len(x) == 16 for x in results["codes"]["text-only data"].values()) and set(results["codes"]["text-only data"]) == set(evaluate.STYLES)
    few = ["--limit", "2", "--samples", "1", "--diversity-prompts", "2", "--group", "3", "--max-new", "8"]
    evaluate.main(["--vlm", TINY, "--data", str(world), "--task", "b", "--prompt", "no", "--latent", f"{runs}/4", "--out", f"{tmp_path}/b", *few])
    rows = json.loads((tmp_path / "b" / "results.json").read_text())["rows"]
    assert list(rows) == ["GRPO latent"] and len(rows["GRPO latent"]["LS2"]["dimensions"]) == 5
    drawn = json.loads((tmp_path / "b" / "diversity.json").read_text())["GRPO latent"]
    assert [len(g) for g in drawn] == [3, 3]


def weights(folder):
    from safetensors.torch import load_file
    return load_file(common.latest(folder) / "weights.safetensors")


def cut_off(monkeypatch, main, argv, after):
    """Run, and be cut off right after the checkpoint of step `after`; then run again to the end."""
    real = common.save
    def save(out, step, *rest, **kw):
        real(out, step, *rest, **kw)
        if step == after:
            raise KeyboardInterrupt
    monkeypatch.setattr(common, "save", save)
    with pytest.raises(KeyboardInterrupt):
        main(argv)
    monkeypatch.setattr(common, "save", real)
    main(argv)


def test_a_run_cut_off_ends_as_if_it_had_not_been(world, runs, tmp_path, monkeypatch):
    base = ["--vlm", TINY, "--paired", files(world)["paired"], "--steps", "4", "--batch", "3", "--save-every", "2"]
    stage1_projector.main(base + ["--out", f"{tmp_path}/whole"])
    cut_off(monkeypatch, stage1_projector.main, base + ["--out", f"{tmp_path}/cut"], 2)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    book = ["--vlm", TINY, "--paired", files(world)["paired"], "--text", files(world)["text"], "--projector", f"{runs}/1", "--steps-a", "2", "--steps-b", "3",
            "--codes", "16", "--inverse-blocks", "1", "--policy-blocks", "1", "--batch", "3", "--val", "4", "--save-every", "1"]
    stage2_codebook.main(book + ["--out", f"{tmp_path}/book"])
    for after in (1, 2, 4):  # in phase a, between the phases, in phase b
        cut_off(monkeypatch, stage2_codebook.main, book + ["--out", f"{tmp_path}/book_{after}"], after)
        whole, cut = weights(tmp_path / "book"), weights(tmp_path / f"book_{after}")
        assert all(torch.equal(whole[k], cut[k]) for k in whole), after
    rl = ["--vlm", TINY, "--prompts", str(world / "task_prompts.jsonl"), "--steps", "3", "--batch", "2", "--group", "2", "--max-new", "8", "--save-every", "1",
          "--init", f"{runs}/3"]
    stage4_latent_rl.main(rl + ["--out", f"{tmp_path}/rl"])
    cut_off(monkeypatch, stage4_latent_rl.main, rl + ["--out", f"{tmp_path}/rl_cut"], 1)
    whole, cut = weights(tmp_path / "rl"), weights(tmp_path / "rl_cut")
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


def test_ablated_codebooks_are_cloned_alike_and_tasks_share_a_clone(world, runs, tmp_path, monkeypatch):
    f, read = files(world), []
    book = ["--vlm", TINY, "--paired", f["paired"], "--text", f["text"], "--projector", f"{runs}/1", "--steps-a", "1", "--steps-b", "2", "--codes", "16",
            "--inverse-blocks", "1", "--policy-blocks", "1", "--batch", "3", "--val", "4"]
    clone = ["--vlm", TINY, "--paired", f["paired"], "--text", f["text"], "--demos", str(world / "task_demos.jsonl"), "--batch", "3", "--batch-adapt", "3"]
    real = stage3_bc.batches
    monkeypatch.setattr(stage3_bc, "batches", lambda records, *a, **kw: read.append((records.path.stem, len(records))) or real(records, *a, **kw))
    for name, flags, want in (("no_text", ["--without", "text"], [("paired", 24)]), ("some", ["--text-rows", "7"], [("paired", 24), ("text", 7)]),
                              ("no_projector", ["--without", "projector"], [("paired", 24), ("text", 40)])):
        stage2_codebook.main(book + flags + ["--out", f"{tmp_path}/{name}"])
        keys = set(common.read_metrics(tmp_path / name)[-1])
        assert ("nll_text" in keys) == (name != "no_text") and ("proj" in keys) == (name == "some")
        del read[:]
        stage3_bc.main(clone + ["--init", f"{tmp_path}/{name}", "--steps-clone", "2", "--steps-adapt", "0", "--out", f"{tmp_path}/{name}_clone"])
        assert read == want
    del read[:]
    stage3_bc.main(clone + ["--init", f"{tmp_path}/no_projector_clone", "--steps-adapt", "2", "--out", f"{tmp_path}/adapted"])
    assert read == [("task_demos", 12)]
    state = json.loads((common.latest(tmp_path / "adapted") / "state.json").read_text())
    assert state["finished"] and state["step"] == 2 and state["arch"]["project"] is False
    before, after = weights(tmp_path / "no_projector_clone"), weights(tmp_path / "adapted")
    moved = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert moved == {"policy", "inverse", "codebook", "world"}
    assert all((before[k] - after[k]).abs().max() < 0.01 for k in before)  # it goes on from the clone
    with pytest.raises(DataError, match="is an SFT run"):
        stage3_bc.main(clone + ["--init", f"{runs}/sft", "--out", f"{tmp_path}/x"])


def test_unfinished_missing_and_wrong_runs_are_refused_by_name(runs, world, tmp_path, monkeypatch):
    f = files(world)
    argv = ["--vlm", TINY, "--paired", f["paired"], "--text", f["text"]]
    with pytest.raises(DataError, match="nowhere.*run stage1_projector.py"):
        stage2_codebook.main(argv + ["--projector", f"{tmp_path}/nowhere", "--out", f"{tmp_path}/x"])
    with pytest.raises(DataError, match="stage1_projector, needed is one of stage2_codebook"):
        stage3_bc.main(argv + ["--init", f"{runs}/1", "--out", f"{tmp_path}/x"])
    with pytest.raises(DataError, match="--actions token, not latent"):
        stage4_latent_rl.main(["--vlm", TINY, "--prompts", str(world / "task_prompts.jsonl"), "--init", f"{runs}/sft", "--out", f"{tmp_path}/x"])
    with pytest.raises(DataError, match="was trained with --vlm"):
        stage2_codebook.main(["--vlm", "another", "--projector", f"{runs}/1", "--out", f"{tmp_path}/x"])
    with pytest.raises(DataError, match="--batch"):
        stage1_projector.main(["--vlm", TINY, "--paired", f["paired"], "--steps", "2", "--batch", "5", "--out", f"{runs}/1"])
    real = common.save
    def save(*args, **kw):
        real(*args, **kw)
        raise KeyboardInterrupt
    monkeypatch.setattr(common, "save", save)
    with pytest.raises(KeyboardInterrupt):
        stage1_projector.main(["--vlm", TINY, "--paired", f["paired"], "--steps", "2", "--batch", "2", "--save-every", "1", "--out", f"{tmp_path}/half"])
    with pytest.raises(DataError, match="half: unfinished.*step 1"):
        stage2_codebook.main(argv + ["--projector", f"{tmp_path}/half", "--out", f"{tmp_path}/x"])


def test_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    common.save(tmp_path, 1, {"w": torch.ones(2)}, {"stage": "s", "finished": True, "config": {}})
    def broken(*args):
        raise OSError("disk full")
    monkeypatch.setattr(common, "save_file", broken)
    with pytest.raises(OSError):
        common.save(tmp_path, 2, {"w": torch.zeros(2)}, {"stage": "s", "finished": True, "config": {}})
    assert common.latest(tmp_path).name == "ckpt-000001" and torch.equal(weights(tmp_path)["w"], torch.ones(2))


def shell(*argv, **env):
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def test_command_line_errors_are_one_clear_line(world, tmp_path):
    done = shell("stage1_projector.py", "--stpes", "3")
    assert done.returncode == 2 and "unrecognized arguments: --stpes" in done.stderr and "Traceback" not in done.stderr
    done = shell("stage4_latent_rl.py", "--loss-type", "ppo")
    assert done.returncode == 2 and "invalid choice: 'ppo'" in done.stderr and "Traceback" not in done.stderr
    done = shell("stage4_latent_rl.py", "--group", "0")
    assert done.returncode == 2 and "--group: 0 is too small" in done.stderr and "Traceback" not in done.stderr
    done = shell("stage1_projector.py", "--vlm", "tiny/vlm", "--paired", f"{tmp_path}/none.jsonl", "--out", f"{tmp_path}/x")
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: ") and "none.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


def torchrun(argv, ranks=2):
    done = shell("-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(20000 + os.getpid() % 20000), *argv)
    assert done.returncode == 0, done.stderr[-2000:]


def close(a, b, tol=2e-5):
    return all(torch.allclose(a[k], b[k], atol=tol) for k in a)


def test_two_ranks_equal_one(world, runs, tmp_path):
    base = ["stage1_projector.py", "--vlm", TINY, "--paired", files(world)["paired"], "--steps", "2"]
    torchrun(base + ["--batch", "2", "--out", f"{tmp_path}/two"])
    stage1_projector.main(base[1:] + ["--batch", "4", "--out", f"{tmp_path}/one"])
    assert close(weights(tmp_path / "one"), weights(tmp_path / "two"))
    sft = ["stage3_bc.py", "--vlm", TINY, "--actions", "token", "--demos", str(world / "task_demos.jsonl"), "--steps-adapt", "2", "--lr-adapt", "1e-5"]
    torchrun(sft + ["--batch-adapt", "2", "--out", f"{tmp_path}/sft_two"])
    stage3_bc.main(sft[1:] + ["--batch-adapt", "4", "--out", f"{tmp_path}/sft_one"])
    assert close(weights(tmp_path / "sft_one"), weights(tmp_path / "sft_two"))


@pytest.mark.parametrize("actions, init", [("latent", "3"), ("token", "sft")])
def test_two_ranks_equal_one_in_rl(world, runs, tmp_path, actions, init):
    rl = ["stage4_latent_rl.py", "--vlm", TINY, "--prompts", str(world / "task_prompts.jsonl"), "--steps", "2", "--group", "2", "--max-new", "8",
          "--actions", actions, "--init", f"{runs}/{init}", "--loss-type", "dapo", "--lr", "1e-5"]
    torchrun(rl + ["--batch", "2", "--out", f"{tmp_path}/rl_two"])
    stage4_latent_rl.main(rl[1:] + ["--batch", "4", "--out", f"{tmp_path}/rl_one"])
    assert close(weights(tmp_path / "rl_one"), weights(tmp_path / "rl_two"))
    one, two = (common.read_metrics(tmp_path / k) for k in ("rl_one", "rl_two"))
    assert [r["reward"] for r in one] == pytest.approx([r["reward"] for r in two], abs=1e-5)
