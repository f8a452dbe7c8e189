"""--val of stage 4: the held-out reward by hand, its noise, the best checkpoint under kills, on two ranks, as a run."""

import copy
import json
import shutil
import zlib

import pytest
import torch
from helpers import TINY, cut_off, letters, same_weights, torchrun, weights

import answers
import checkpoint
import common
import evaluate
import plots
import stage4_latent_rl
from data import DataError
from model import LatentModel
from tiny.world import write_world
from vlm import VLM

BOTH = pytest.mark.parametrize("actions", ["latent", "token"])
SMALL = ["--vlm", TINY, "--batch", "2", "--group", "2", "--max-new", "6", "--lr", "0.02", "--save-every", "1"]


def loud(latent):
    """A latent model whose responses depend on the codes, as those of a trained one do."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for merge in latent.world.merges:
            merge.w3.weight.add_(torch.randn(merge.w3.weight.shape, generator=g) * 0.3)
    return latent


@pytest.fixture(scope="module")
def start(vlm):
    torch.manual_seed(0)
    return loud(LatentModel(vlm.config, 16, inverse_blocks=1, policy_blocks=1))


@pytest.fixture
def run_of(tmp_path, world, vlm, start, monkeypatch):
    """run_of(judge, "one", "--steps", "3"): stage 4 into the folder `one`, from the same weights each time, with three
    held-out prompts -> the rows of its metrics.jsonl."""
    (tmp_path / "images").symlink_to(world / "images")
    rows = (world / "task_val.jsonl").read_text().splitlines()[:3]
    (tmp_path / "val.jsonl").write_text("\n".join(rows) + "\n")

    def run(judge, name, *flags, val=("--val", f"{tmp_path}/val.jsonl", "--eval-every", "1")):
        def agent(run, actions, vlm_name, place):
            if actions == "latent":
                latent = copy.deepcopy(start)
                latent.train_only("policy")
                return vlm, latent, {}
            own = VLM(TINY)
            own.train_last(8 / 36)
            return own, None, {"train_share": 8 / 36}

        judge.costly = True  # these judges count their calls, or fail by plan
        monkeypatch.setattr(common, "load_agent", agent)
        monkeypatch.setattr(stage4_latent_rl, "load_judge", lambda *_: judge)
        places = ["--prompts", f"{world}/task_prompts.jsonl", "--out", f"{tmp_path}/{name}", "--allow-outside", "yes"]
        stage4_latent_rl.main([*SMALL, *places, *val, *flags])
        return rows_of(tmp_path / name)

    run.out = tmp_path
    return run


def rows_of(out):
    """The rows of metrics.jsonl as they stand there, without times; what is no JSON number is an error."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds" and k[:2] != "s_"} for row in lines]


def planned(*evaluations):
    """A judge that gives RL's responses different scores, and in the n-th evaluation the three held-out answers these:
    a number, or None for a failure. The reference has 4. judge.sizes: how many held-out answers it saw at a time."""

    def judge(records, responses):
        if "task_prompts" in records[0]["where"]:
            return [{"Place": (1.0 + k, 4.0)} for k in range(len(responses))]
        judge.sizes.append(len(responses))
        given = [s for scores in evaluations for s in scores][judge.seen :][: len(responses)]
        judge.seen += len(responses)
        return [None if s is None else {"Place": (s, 4.0)} for s in given]

    judge.seen, judge.sizes = 0, []
    return judge


def folders(out):
    return sorted(p.name for p in out.glob("ckpt-*"))


# ------------------------------------------------------------------------------------------------ the held-out reward
def test_the_held_out_reward_by_hand(run_of):
    """The mean over the answers that were judged: 2/4, 6/4 and a failure; 1/4, 2/4, 6/4. Two answers at a
    time, a group."""
    judge = planned((2.0, None, 6.0), (1.0, 2.0, 6.0))
    rows = run_of(judge, "one", "--steps", "1", "--batch", "1")
    assert rows[0] == {"step": 0, "val_reward": 1.0, "val_failed": 1.0}
    assert rows[1]["step"] == 1 and rows[1]["val_reward"] == 0.75 and rows[1]["val_failed"] == 0 and "reward" in rows[1]
    assert judge.sizes == [2, 1, 2, 1]


def test_it_is_evaluated_at_the_start_every_n_steps_and_at_the_end(run_of):
    rows = run_of(planned(*[(4.0,) * 3] * 4), "one", "--steps", "5", "--eval-every", "2")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if "val_reward" in row] == [0, 2, 4, 5]


def test_without_held_out_prompts_nothing_is_evaluated(run_of):
    rows = run_of(planned(), "one", "--steps", "1", val=())
    assert [row["step"] for row in rows] == [1] and "val_reward" not in rows[0]
    assert not (run_of.out / "one" / "best").exists()


@BOTH
def test_evaluations_differ_by_the_policy_alone(run_of, monkeypatch, actions):
    """The same noise in each evaluation, of no training step, and another one for another seed. Before RL the same
    answers each time: a gradient of 0 (the judge finds all equal) leaves the policy where it was."""
    noise, real, texts = [], answers.uniforms, []

    def uniforms(seed, rows, length):
        noise.append((seed, tuple(rows)))
        return real(seed, rows, length)

    monkeypatch.setattr(answers, "uniforms", uniforms)

    def equal(records, responses):
        if "val.jsonl" in records[0]["where"]:
            texts.extend(responses)
        return [{"Place": (4.0, 4.0)} for _ in responses]

    run_of(equal, "one", "--steps", "2", "--beta", "0", "--batch", "1", "--actions", actions)
    held_out = [rows for _, rows in noise if rows[0][0] == answers.HELD_OUT]
    assert held_out == [((answers.HELD_OUT, 0, 0), (answers.HELD_OUT, 1, 0)), ((answers.HELD_OUT, 2, 0),)] * 3
    assert len(noise) == len(held_out) + 2  # the rest are the two steps
    assert texts[:3] == texts[3:6] == texts[6:] and len(set(texts)) > 1
    run_of(equal, "two", "--steps", "1", "--seed", "1", "--actions", actions)
    assert texts[9:12] != texts[:3]


@BOTH
def test_it_does_not_touch_the_training(run_of, actions):
    plain = run_of(letters, "plain", "--steps", "2", "--actions", actions, val=())
    with_val = run_of(letters, "val", "--steps", "2", "--actions", actions)
    assert same_weights(run_of.out / "plain", run_of.out / "val")
    assert [{k: v for k, v in row.items() if k[:4] != "val_"} for row in with_val[1:]] == plain


# -------------------------------------------------------------------------------------------------- the best checkpoint
def test_the_best_checkpoint_is_kept_beside_the_newest(run_of, capsys):
    """Held-out rewards 1/2, 3/4, 3/4, 1/4: the first of two equal ones."""
    judge = planned((2.0,) * 3, (3.0,) * 3, (3.0,) * 3, (1.0,) * 3)
    run_of(judge, "one", "--steps", "3", "--keep", "3")
    out = run_of.out / "one"
    assert folders(out) == ["ckpt-000001", "ckpt-000002", "ckpt-000003"] and folders(out / "best") == ["ckpt-000001"]
    state = checkpoint.read_state(out / "best")
    assert (state["step"], state["val_reward"], state["finished"]) == (1, 0.75, True)
    saved = checkpoint.load_file(out / "ckpt-000001" / "weights.safetensors")
    best = weights(out / "best")
    assert set(best) == set(saved) and all(torch.equal(best[k], saved[k]) for k in best)
    assert not same_weights(out, out / "best")
    said = capsys.readouterr()
    assert f"best held-out reward: 0.7500, after step 1; its checkpoint is in {out}/best" in said.out + said.err
    run_of(planned((2.0,) * 3, (3.0,) * 3, (1.0,) * 3), "two", "--steps", "2", "--keep", "1")
    assert folders(run_of.out / "two") == ["ckpt-000002"] and folders(run_of.out / "two" / "best") == ["ckpt-000001"]


def test_what_rl_starts_from_may_be_the_best(run_of, start):
    run_of(planned((2.0,) * 3, (1.0,) * 3), "one", "--steps", "1")
    best = weights(run_of.out / "one" / "best")
    assert checkpoint.read_state(run_of.out / "one" / "best")["step"] == 0
    assert all(torch.equal(best[f"policy.{k}"], x) for k, x in start.policy.state_dict().items())


def test_an_evaluation_that_fails_throughout_changes_no_best(run_of, capsys):
    judge = planned((2.0,) * 3, (None,) * 3, (1.0,) * 3)
    rows = run_of(judge, "one", "--steps", "2")
    assert "val_reward" not in rows[1] and rows[1]["val_failed"] == 3 and rows[2]["val_reward"] == 0.25
    assert checkpoint.read_state(run_of.out / "one" / "best")["step"] == 0
    run_of(planned((None,) * 3, (None,) * 3), "two", "--steps", "1")
    said = capsys.readouterr()
    assert not (run_of.out / "two" / "best").exists() and "there is no best checkpoint" in said.out + said.err


def saves(monkeypatch, run, stop=None):
    """Run, and end right behind the `stop`-th call of checkpoint.save. -> the number of calls."""
    real, calls = checkpoint.save, []

    def save(*args, **kw):
        calls.append(1)
        real(*args, **kw)
        if len(calls) == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "save", save)
        try:
            run()
        except KeyboardInterrupt:
            assert stop
    return len(calls)


def moody(before=(), after=()):
    """A judge with a number of its own for each text. Of the held-out answers, those before the first step get the
    lowest, and those after it the highest."""

    def score(text):
        return 3.0 + zlib.crc32(text.encode()) % 50 / 10

    def judge(records, responses):
        scores = {text: score(text) for text in responses}
        if "val.jsonl" in records[0]["where"]:
            judge.texts += responses
            scores |= {text: 2.0 for text in before} | {text: 9.0 for text in after}
        return [{"Mood": (scores[text], 4.0)} for text in responses]

    judge.texts = []
    return judge


@pytest.mark.parametrize("actions, save_every", [("latent", "1"), ("latent", "2"), ("token", "2")])
def test_a_run_that_is_cut_off_ends_with_the_same_best(run_of, monkeypatch, actions, save_every):
    """Behind each checkpoint that is written, the best ones included. After the first step the policy gets worse. With
    --save-every 2 the best one is newer than what the run goes on from."""
    flags = ["--steps", "2", "--actions", actions, "--save-every", save_every, "--temperature", "2", "--lr", "0.05"]
    first = moody()
    run_of(first, "first", *flags, "--steps", "1")
    judge = moody(first.texts[:3], first.texts[3:])
    count = saves(monkeypatch, lambda: run_of(judge, "whole", *flags))
    whole, rows = run_of.out / "whole", rows_of(run_of.out / "whole")
    best = checkpoint.read_state(whole / "best")
    written = 2 // int(save_every)
    assert best["step"] == 1 and count == written + 2  # before the first step, and after it
    for stop in range(1, count):
        cut = run_of.out / "cut"
        assert saves(monkeypatch, lambda: run_of(judge, "cut", *flags), stop) == stop  # noqa: B023
        assert run_of(judge, "cut", *flags) == rows, stop
        assert same_weights(whole, cut) and same_weights(whole / "best", cut / "best"), stop
        assert checkpoint.read_state(cut / "best") | {"config": 0} == best | {"config": 0}, stop
        shutil.rmtree(cut)


def test_a_best_of_other_settings_is_refused(run_of, monkeypatch):
    """It was cut off before its first checkpoint, so nothing else tells that the run is another one."""
    run = lambda *flags: run_of(letters, "one", "--steps", "2", *flags)  # noqa: E731
    saves(monkeypatch, run, 1)
    assert folders(run_of.out / "one") == [] and folders(run_of.out / "one" / "best") == ["ckpt-000000"]
    with pytest.raises(DataError, match="one/best: holds a run with another --seed"):
        run("--seed", "3")


def test_a_checkpoint_that_was_just_written_stays(tmp_path):
    """Also where one of a later step lies there, which the run could not go on from."""
    state = {"stage": "stage4_latent_rl", "finished": True, "config": {}}
    for step in (7, 5):
        checkpoint.save(tmp_path, step, {"w": torch.ones(1)}, state, keep=1)
    assert folders(tmp_path) == ["ckpt-000005"]


# -------------------------------------------------------------------------------------------------- what is read first
def test_bad_held_out_rows_are_refused_before_step_0(run_of, capsys):
    with open(run_of.out / "val.jsonl", "a") as f:
        f.write('{"messages": []}\n')
    run_of(planned((2.0,) * 3, (1.0,) * 3), "one", "--steps", "1")
    said = capsys.readouterr()
    assert "val.jsonl: 1 of 4 rows cannot be used" in said.out + said.err
    with pytest.raises(DataError, match="val.jsonl, row 4"):
        run_of(planned(), "strict", "--steps", "1", "--strict", "yes")
    (run_of.out / "val.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match="val.jsonl: no row can be used"):
        run_of(planned(), "none", "--steps", "1")
    assert not (run_of.out / "strict").exists() and not (run_of.out / "none").exists()


# ----------------------------------------------------------------------------------- on two ranks, and as a run to use
@pytest.fixture(scope="module")
def on_disk(tmp_path_factory, start):
    """A world with seven held-out prompts, and a finished stage 3 to start from."""
    out = tmp_path_factory.mktemp("held_out")
    write_world(out / "world", seed=1, paired=2, text=2, demos=2, prompts=8, tests=7)
    arch = {"codes": 16, "inverse_blocks": 1, "policy_blocks": 1}
    config = {"vlm": TINY, "actions": "latent"}
    state = {"stage": "stage3_bc", "finished": True, "config": config, "arch": arch}
    checkpoint.save(out / "bc", 1, start.state_dict(), state)
    return out


def rl(on_disk, *flags):
    files = ["--prompts", f"{on_disk}/world/task_prompts.jsonl", "--val", f"{on_disk}/world/task_val.jsonl"]
    some = ["--init", f"{on_disk}/bc", "--eval-every", "1", "--judge", "helpers:letters"]
    return [*SMALL, *files, *some, *flags]


RANKED = """
import sys
sys.path[:0] = [".", "tests"]
import common, stage4_latent_rl
common.run(stage4_latent_rl.main)
"""


def test_two_ranks_find_what_one_finds(on_disk, tmp_path):
    """Seven prompts, four at a time: the last part has three. Exactly the same before RL. Later up to rounding, as the
    ranks' gradients are added in another order and one rank has all prompts at a time."""
    (tmp_path / "ranked.py").write_text(RANKED)
    torchrun([f"{tmp_path}/ranked.py", *rl(on_disk, "--steps", "2", "--out", f"{tmp_path}/two")])
    stage4_latent_rl.main(rl(on_disk, "--steps", "2", "--batch", "4", "--out", f"{tmp_path}/four"))
    stage4_latent_rl.main(rl(on_disk, "--steps", "1", "--out", f"{tmp_path}/one"))
    one, two, four = (rows_of(tmp_path / name) for name in ("one", "two", "four"))
    assert two[0] == one[0] and two[0]["val_failed"] > 0
    assert [row["val_failed"] for row in two] == [row["val_failed"] for row in four]
    assert [row["val_reward"] for row in two] == pytest.approx([row["val_reward"] for row in four], abs=1e-5)
    best = [checkpoint.read_state(tmp_path / name / "best") for name in ("two", "four")]
    assert best[0]["step"] == best[1]["step"]


def test_the_best_of_a_run_that_was_cut_off_is_a_run_to_use(on_disk, tmp_path, monkeypatch):
    """The run itself is refused, since it is unfinished; its best is evaluated, and RL goes on from it."""
    out = tmp_path / "rl"
    cut_off(monkeypatch, stage4_latent_rl.main, rl(on_disk, "--steps", "9", "--out", f"{out}"), 3)
    few = ["--vlm", TINY, "--data", f"{on_disk}/world", "--limit", "2", "--diversity-prompts", "2", "--max-new", "6"]
    few += ["--prompt", "no", "--samples", "1", "--group", "2", "--out", f"{tmp_path}/eval"]
    with pytest.raises(DataError, match="unfinished"):
        evaluate.main([*few, "--latent", f"{out}"])
    evaluate.main([*few, "--latent", f"{out}/best"])
    row = json.loads((tmp_path / "eval" / "results.json").read_text())["rows"]["GRPO latent"]
    step = checkpoint.read_state(out / "best")["step"]
    logged = [r["reward"] for r in common.read_metrics(out) if 0 < r["step"] <= step]
    assert ("reward_end" in row) == bool(logged) and row.get("reward_end") == (logged[-1] if logged else None)
    stage4_latent_rl.main(rl(on_disk, "--steps", "1", "--init", f"{out}/best", "--out", f"{tmp_path}/further"))
    assert checkpoint.read_state(tmp_path / "further")["finished"]


def test_the_log_of_a_best_checkpoint_is_the_run_s_up_to_its_step(tmp_path):
    lines = [{"step": k, "reward": k / 10, "s_rollout": 1.0, "s_update": 2.0} for k in (1, 2, 3)]
    lines = [{"step": 0, "val_reward": 0.5}, *lines]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    state = {"stage": "stage4_latent_rl", "finished": True, "config": {}}
    checkpoint.save(tmp_path / "best", 2, {"w": torch.ones(1)}, state)
    assert [row["step"] for row in common.read_metrics(tmp_path / "best")] == [0, 1, 2]
    assert evaluate.training(tmp_path / "best")["reward_end"] == 0.2
    assert evaluate.training(tmp_path)["reward_end"] == 0.3
    shutil.copytree(tmp_path / "best", tmp_path / "copy")
    assert common.read_metrics(tmp_path / "copy") == [] and evaluate.training(tmp_path / "copy") == {}


def test_held_out_rewards_are_points_beside_the_curve(tmp_path, monkeypatch):
    """Also that of step 0, at no rollout; two prompts and four responses a step."""
    lines = [{"step": 0, "val_reward": 0.5}, *({"step": k, "reward": 1.0, "entropy": 1.0, "kl": 0.0} for k in (1, 2))]
    lines[2]["val_reward"] = 0.75
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    config = {"batch": 2, "group": 4}
    checkpoint.save(tmp_path, 2, {}, {"stage": "stage4_latent_rl", "finished": True, "config": config})
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda fig, *_, **__: drawn.append(fig))
    plots.draw_curves({"GRPO latent": tmp_path}, tmp_path / "curves.png")
    points = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].axes[0].lines}
    assert points["GRPO latent, held out"] == [[0, 0.5], [16, 0.75]]
