"""All stages after each other through their command lines: what they leave behind, resume, refusals, two ranks."""

import json

import numpy as np
import pytest
import torch
from helpers import VLM_FLAG, cut_off, same_weights, weights

import answers
import checkpoint
import common
import evaluate
import stage1_projector
import stage2_codebook
import stage3_bc
import stage4_latent_rl
from data import DataError


# ------------------------------------------------------------------------------------------------ from end to end
def test_all_stages_leave_a_finished_run_and_a_log_of_every_step(runs):
    for name, steps in (("1", 2), ("2", 4), ("3", 4), ("sft", 2), ("4", 2), ("4t", 2)):
        state = checkpoint.read_state(runs / name)
        assert state["finished"] and state["step"] == steps
        assert [r["step"] for r in common.read_metrics(runs / name)] == list(range(1, steps + 1))


def test_each_stage_changes_only_its_own_parts_of_the_one_before(runs):
    """What comes out of stage 4 is stage 1's projector as stage 2 left it, stage 3's codebook, and its own policy; the
    inverse dynamics is not there: RL has no use for it."""
    two, three, before, four = (weights(runs / k) for k in ("2", "3", "loud", "4"))
    assert set(two) < set(three) == set(before)
    assert set(four) == {k for k in three if not k.startswith("inverse")}
    moved = {k.split(".")[0] for k in two if not torch.equal(two[k], three[k])}
    assert moved == {"inverse", "quantiser", "world"}
    assert {k.split(".")[0] for k in four if not torch.equal(before[k], four[k])} == {"policy"}
    assert {k.split(".")[0] for k in two} == {"projector", "inverse", "quantiser", "world"}
    sft, rl = weights(runs / "sft"), weights(runs / "4t")
    assert set(sft) == set(rl) and not any(torch.equal(sft[k], rl[k]) for k in sft)


def test_all_stages_and_the_evaluation_run(runs, world, tmp_path):
    models = ["--sft", f"{runs}/sft", "--bc", f"{runs}/3", "--token", f"{runs}/4t", "--latent", f"{runs}/4"]
    few = [*VLM_FLAG, "--data", str(world), "--limit", "2", "--diversity-prompts", "2", "--max-new", "8"]
    more = ["--codebook", f"{runs}/2", "--samples", "2", "--group", "2", "--out", str(tmp_path)]
    evaluate.main([*few, *models, *more])
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["rows"]) == ["Prompt", "SFT", "BC latent", "GRPO token", "GRPO latent"]
    for name in ("curves.png", "codes.png", "examples.md", "table.md"):
        assert (tmp_path / name).stat().st_size > 0
    styles, used = json.loads((world / "styles.json").read_text()), results["codes"]["text-only data"]
    assert set(used) == {*styles, "all else"} and all(len(counts) == 16 for counts in used.values())
    task_b = ["--task", "b", "--prompt", "no", "--samples", "1", "--group", "3", "--out", f"{tmp_path}/b"]
    evaluate.main([*few, "--latent", f"{runs}/4", *task_b])
    rows = json.loads((tmp_path / "b" / "results.json").read_text())["rows"]
    assert list(rows) == ["GRPO latent"] and len(rows["GRPO latent"]["LS2"]["dimensions"]) == 5
    drawn = json.loads((tmp_path / "b" / "diversity.json").read_text())["GRPO latent"]
    assert [len(group) for group in drawn] == [3, 3]


def test_a_bad_held_out_row_is_left_out_before_step_0(flags, runs, world, tmp_path, capsys):
    """Stage 2 needs its last rows at its very end: a bad one must not cost the run."""
    rows = (world / "text.jsonl").read_text().splitlines()
    (tmp_path / "text.jsonl").write_text("\n".join([*rows, json.dumps({"messages": []})]) + "\n")
    some = ["--text", f"{tmp_path}/text.jsonl", "--projector", f"{runs}/1", "--steps-a", "1", "--steps-b", "1"]
    stage2_codebook.main([*flags.book, *some, "--out", f"{tmp_path}/2"])
    assert checkpoint.read_state(tmp_path / "2")["val"]["text"]["val_vlm"] > 0
    assert f"row {len(rows) + 1}" in capsys.readouterr().out
    with pytest.raises(DataError, match=f"row {len(rows) + 1}"):
        stage2_codebook.main([*flags.book, *some, "--strict", "yes", "--out", f"{tmp_path}/strict"])
    assert not (tmp_path / "strict").exists()


# -------------------------------------------------------------------------------- a run that was cut off goes on
def assert_goes_on(monkeypatch, main, argv, out, after):
    """Cut off after the checkpoint of each of these steps, the run ends as if it had not been."""
    main([*argv, "--out", f"{out}/whole"])
    for step in after:
        cut = [*argv, "--out", f"{out}/cut-{step}"]
        cut_off(monkeypatch, main, cut, step)
        assert not checkpoint.read_state(out / f"cut-{step}")["finished"]
        main(cut)
        assert same_weights(out / "whole", out / f"cut-{step}"), step


def test_stage_1_goes_on(flags, tmp_path, monkeypatch):
    argv = [*flags.paired, "--steps", "4", "--batch", "3", "--save-every", "2"]
    assert_goes_on(monkeypatch, stage1_projector.main, argv, tmp_path, [2])


def test_stage_2_goes_on(flags, runs, tmp_path, monkeypatch):
    """In phase a, between the phases, in phase b."""
    argv = [*flags.book, "--projector", f"{runs}/1", "--steps-a", "2", "--steps-b", "3", "--save-every", "1"]
    assert_goes_on(monkeypatch, stage2_codebook.main, argv, tmp_path, [1, 2, 4])


def test_stage_3_goes_on(flags, runs, tmp_path, monkeypatch):
    """While cloning, between cloning and adaptation, in adaptation."""
    argv = [*flags.clone, "--init", f"{runs}/2", "--steps-clone", "2", "--steps-adapt", "2", "--save-every", "1"]
    assert_goes_on(monkeypatch, stage3_bc.main, argv, tmp_path, [1, 2, 3])


def test_sft_goes_on(flags, tmp_path, monkeypatch):
    argv = [*flags.sft, "--steps-adapt", "2", "--batch-adapt", "3", "--save-every", "1"]
    assert_goes_on(monkeypatch, stage3_bc.main, argv, tmp_path, [1])


@pytest.mark.parametrize("actions, init", [("latent", "loud"), ("token", "sft")])
def test_stage_4_goes_on(flags, runs, tmp_path, monkeypatch, actions, init):
    some = ["--steps", "3", "--batch", "2", "--max-new", "8", "--save-every", "1"]
    argv = [*flags.rl, *some, "--actions", actions, "--init", f"{runs}/{init}"]
    assert_goes_on(monkeypatch, stage4_latent_rl.main, argv, tmp_path, [1])


def test_every_response_has_draws_of_its_own(flags, runs, tmp_path, monkeypatch):
    """Eight prompts, four a step: every prompt once in two steps, and other draws when it comes again."""
    rows, real = [], answers.uniforms

    def uniforms(seed, some, length):
        rows.append(some)
        return real(seed, some, length)

    monkeypatch.setattr(answers, "uniforms", uniforms)
    some = ["--steps", "4", "--batch", "4", "--max-new", "2", "--init", f"{runs}/loud", "--out", str(tmp_path)]
    stage4_latent_rl.main([*flags.rl, *some])
    for first, second in (rows[:2], rows[2:]):
        assert sorted(i for _, i, _ in first + second) == [i for i in range(8) for _ in range(2)]
    assert len({row for step in rows for row in step}) == 4 * 4 * 2


@pytest.mark.parametrize(
    "loss_type, want",
    [
        ("grpo", [True, True, False, True, True, True]),  # a failed judgement is left out
        ("dapo", [True, True, False, False, False, False]),  # and so is a group with equal rewards
    ],
)
def test_which_responses_take_part_in_the_update(flags, runs, tmp_path, monkeypatch, loss_type, want):
    rewards, kept = np.array([[1, 2, np.nan], [3, 3, 3]], dtype=np.float32), []
    monkeypatch.setattr(answers, "reward", lambda *_: rewards)
    monkeypatch.setattr(stage4_latent_rl, "update", lambda *given: kept.append(given[-1].tolist()) or {})
    some = ["--steps", "1", "--batch", "2", "--group", "3", "--max-new", "2", "--loss-type", loss_type]
    stage4_latent_rl.main([*flags.rl, *some, "--init", f"{runs}/loud", "--out", str(tmp_path)])
    assert kept == [want]


# --------------------------------------------------------------------------------------------- ablations, clones
@pytest.fixture
def read(monkeypatch):
    """Which files stage 3 reads, and how many rows of them."""
    seen, real = [], stage3_bc.batches

    def batches(records, *args, **settings):
        seen.append((records.path.stem, len(records)))
        return real(records, *args, **settings)

    monkeypatch.setattr(stage3_bc, "batches", batches)
    return seen


@pytest.mark.parametrize(
    "ablation, want, logged",
    [
        (["--without", "text"], [("paired", 24)], set()),
        (["--text-rows", "7"], [("paired", 24), ("text", 7)], {"nll_text", "proj"}),
        (["--without", "projector"], [("paired", 24), ("text", 40)], {"nll_text"}),
    ],
)
def test_an_ablated_codebook_is_cloned_alike(flags, runs, tmp_path, read, ablation, want, logged):
    book = [*flags.book, "--projector", f"{runs}/1", "--steps-a", "1", "--steps-b", "2", *ablation]
    stage2_codebook.main([*book, "--out", f"{tmp_path}/book"])
    last = common.read_metrics(tmp_path / "book")[-1]
    assert {"nll_text", "proj"} & set(last) == logged and "nll_paired" in last
    clone = ["--init", f"{tmp_path}/book", "--steps-clone", "2", "--steps-adapt", "0"]
    stage3_bc.main([*flags.clone, *clone, "--out", f"{tmp_path}/clone"])
    assert read == want
    state = checkpoint.read_state(tmp_path / "clone")
    assert state["finished"] and state["step"] == 2
    assert state["arch"]["project"] == ("projector" not in ablation)


def test_tasks_share_a_clone(flags, runs, tmp_path, read):
    """A finished clone is only adapted, and ends where the run ends that did both."""
    clone = ["--init", f"{runs}/2", "--steps-clone", "2", "--steps-adapt", "0", "--out", f"{tmp_path}/clone"]
    stage3_bc.main([*flags.clone, *clone])
    del read[:]
    adapt = ["--init", f"{tmp_path}/clone", "--steps-adapt", "2", "--out", f"{tmp_path}/adapted"]
    stage3_bc.main([*flags.clone, *adapt])
    assert read == [("task_demos", 12)]
    state = checkpoint.read_state(tmp_path / "adapted")
    assert state["finished"] and state["step"] == 2
    assert same_weights(tmp_path / "adapted", runs / "3")
    before, after = weights(tmp_path / "clone"), weights(tmp_path / "adapted")
    moved = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert moved == {"policy", "inverse", "quantiser", "world"}
    assert all((before[k] - after[k]).abs().max() < 0.01 for k in before)


# ------------------------------------------------------------------------------------------------------ refusals
def test_wrong_runs_are_refused_by_name(flags, runs, tmp_path):
    out = ["--out", f"{tmp_path}/x"]
    with pytest.raises(DataError, match="nowhere.*run stage1_projector.py"):
        stage2_codebook.main([*flags.both, "--projector", f"{tmp_path}/nowhere", *out])
    with pytest.raises(DataError, match="stage1_projector, needed is one of stage2_codebook"):
        stage3_bc.main([*flags.both, "--init", f"{runs}/1", *out])
    with pytest.raises(DataError, match="is an SFT run"):
        stage3_bc.main([*flags.clone, "--init", f"{runs}/sft", *out])
    with pytest.raises(DataError, match="--actions token, not latent"):
        stage4_latent_rl.main([*flags.rl, "--init", f"{runs}/sft", *out])
    with pytest.raises(DataError, match="was trained with --vlm"):
        stage2_codebook.main(["--vlm", "another", "--projector", f"{runs}/1", *out])
    with pytest.raises(DataError, match="--batch"):
        stage1_projector.main([*flags.paired, "--steps", "2", "--batch", "5", "--out", f"{runs}/1"])
    assert not (tmp_path / "x").exists()


def test_an_unfinished_run_is_refused_by_name(flags, tmp_path, monkeypatch):
    half = [*flags.paired, "--steps", "2", "--batch", "2", "--save-every", "1", "--out", f"{tmp_path}/half"]
    cut_off(monkeypatch, stage1_projector.main, half, 1)
    with pytest.raises(DataError, match="half: unfinished.*step 1"):
        stage2_codebook.main([*flags.both, "--projector", f"{tmp_path}/half", "--out", f"{tmp_path}/x"])


def test_a_finished_stage_is_not_run_again(flags, runs):
    before = (runs / "2" / "metrics.jsonl").read_text()
    book = ["--projector", f"{runs}/1", "--steps-a", "2", "--steps-b", "2"]
    stage2_codebook.main([*flags.book, *book, "--out", f"{runs}/2"])
    assert (runs / "2" / "metrics.jsonl").read_text() == before
