"""evaluate.py: scores, table and counts by hand, failed judgements, the whole evaluation on hand-made runs."""

import ast
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, TINY, launch, shake

import checkpoint
import evaluate
import speaker
from data import DataError
from model import LatentModel
from rollout import Rollout
from vlm import VLM

SCORES = {"good": {"A": (8.0, 4.0), "B": (6.0, 6.0)}, "poor": {"A": (2.0, 4.0), "B": (3.0, 6.0)}, "fail": None}


def judge(records, responses):
    """Ratios 1.5 for 'good' and 0.5 for 'poor'; fails on 'fail'."""
    return [SCORES[text] for text in responses]


# ------------------------------------------------------------------------------------------------ scores
def test_score_by_hand():
    got = evaluate.score(judge, [{}, {}], [["good", "good"], ["poor", "good"]])
    # samples: (1.5 + 0.5) / 2 = 1 and (1.5 + 1.5) / 2 = 1.5; their standard deviation is 0.5 / sqrt(2)
    assert got == {
        "ratio": pytest.approx(1.25),
        "std": pytest.approx(0.5 / 2**0.5),
        "dimensions": {"A": [pytest.approx(6.5), 4.0], "B": [pytest.approx(5.25), 6.0]},
    }


def test_a_failed_judgement_is_in_no_mean_and_is_counted():
    got = evaluate.score(judge, [{}, {}], [["good", "poor"], ["poor", "fail"]])
    # samples: 1 and 0.5, the latter of one response; dimension A: (8 + 2 + 2) / 3
    assert (
        got["judge_failed"] == 1 and got["ratio"] == pytest.approx(0.75) and got["std"] == pytest.approx(0.5 / 2**0.5)
    )
    assert got["dimensions"] == {"A": [pytest.approx(4), 4], "B": [pytest.approx(4), 6]}
    json.dumps(got, allow_nan=False)


def test_a_sample_that_failed_everywhere_is_left_out():
    got = evaluate.score(judge, [{}], [["good", "fail"]])
    assert got["ratio"] == 1.5 and got["std"] is None and got["judge_failed"] == 1
    json.dumps(got, allow_nan=False)


def test_a_judge_that_always_fails_is_an_error():
    with pytest.raises(DataError, match="task_id.jsonl, row 1: the judge failed on all 2"):
        evaluate.score(judge, [{"where": "task_id.jsonl, row 1"}], [["fail", "fail"]])


def test_one_sample_has_no_deviation():
    got = evaluate.score(judge, [{}], [["poor"]])
    assert got["ratio"] == 0.5 and got["std"] is None and "judge_failed" not in got


def test_table_text():
    rows = {
        "SFT": {"ID": {"ratio": 1.0, "std": None}, "OOD": {"ratio": 0.98765, "std": 0.01}, "diversity": 1.5},
        "GRPO latent": {
            "ID": {"ratio": 1.2, "std": 0.0},
            "OOD": {"ratio": 1.1, "std": 0.0},
            "diversity": 1.25,
            "reward_start": 0.9,
            "reward_end": 1.3,
            "s_rollout": 0.5,
            "s_update": 0.25,
        },
    }
    assert evaluate.table(rows, ["ID", "OOD"]).splitlines() == [
        "| row | ID | OOD | diversity | reward, start | reward, end | rollout, s | update, s |",
        "|---|---|---|---|---|---|---|---|",
        "| SFT | 1.000 | 0.988 ± 0.010 | 1.500 |  |  |  |  |",
        "| GRPO latent | 1.200 ± 0.000 | 1.100 ± 0.000 | 1.250 | 0.900 | 1.300 | 0.500 | 0.250 |",
    ]


def test_training_numbers_by_hand(tmp_path):
    rows = [{"step": s, "reward": s / 10, "s_rollout": 2.0, "s_update": float(s)} for s in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    got = evaluate.training(tmp_path)  # 8 steps: the first and the last 2; medians of 1 .. 8
    assert got["reward_start"] == pytest.approx(0.15) and got["reward_end"] == pytest.approx(0.75)
    assert got["s_rollout"] == 2.0 and got["s_update"] == 4.5


# ------------------------------------------------------------------------------------------------ data, codes
def test_records_are_read_from_jsonl_or_json(tmp_path):
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    (tmp_path / "two.json").write_text(json.dumps([row]))
    cfg = evaluate.Config(data=str(tmp_path))
    assert len(evaluate.records_of(cfg, "one", 128)) == 2 and len(evaluate.records_of(cfg, "one", 1)) == 1
    assert evaluate.records_of(cfg, "two", 128)[0]["messages"] == row["messages"]
    with pytest.raises(DataError, match="three.jsonl: no such file"):
        evaluate.records_of(cfg, "three", 128)


class Words:
    """A tokenizer of four words."""

    words = (" Red", "hail", " by", " hail")

    def __len__(self):
        return len(self.words)

    def decode(self, ids):
        return self.words[ids[0]]


def test_codes_are_counted_by_what_the_token_is_about(tmp_path):
    (tmp_path / "styles.json").write_text(json.dumps({"greetings": ["hail, friend"], "seen": ["red", "hail"]}))
    styles = evaluate.read_styles(tmp_path)
    assert evaluate.token_styles(Words(), styles).tolist() == [1, 0, 2, 0]  # the first style that has the word
    count = evaluate.CodeCounter(Words(), styles, codes=3)
    counts = count(torch.tensor([2, 2, 0, 1, 2]), torch.tensor([0, 0, 1, 3, 2]))
    assert count.by_style(counts) == {"greetings": [1, 1, 0], "seen": [0, 0, 2], "all else": [0, 0, 1]}


def test_without_styles_all_tokens_are_alike(tmp_path):
    styles = evaluate.read_styles(tmp_path)
    assert styles == {"all else": []} and evaluate.token_styles(Words(), styles).tolist() == [0] * 4


def test_the_evaluation_knows_neither_the_toy_nor_the_drawing_library():
    tree = ast.parse((ROOT / "evaluate.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not {n.split(".")[0] for n in names} & {"tiny", "matplotlib"}


# ------------------------------------------------------------------------------------------------ all of it
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints as the stages write them, with random weights on the latent side; the metrics of stage 4."""
    out, arch = tmp_path_factory.mktemp("runs"), {"codes": 16, "inverse_blocks": 1, "policy_blocks": 1}
    torch.manual_seed(0)
    vlm = VLM(TINY)
    latent = shake(LatentModel(vlm.config, **arch)).state_dict()
    vlm.train_last(0.2)
    trained, share = vlm.trained_tensors(), {"train_share": 0.2}
    val = {"text": {"val_inferred": 1.0}}
    for name, stage, actions, tensors in (
        ("codebook", "stage2_codebook", "latent", latent),
        ("bc", "stage3_bc", "latent", latent),
        ("sft", "stage3_bc", "token", trained),
        ("rl", "stage4_latent_rl", "latent", latent),
        ("rl_token", "stage4_latent_rl", "token", trained),
    ):
        config = {"vlm": TINY, "actions": actions, "loss_type": "grpo", "batch": 2, "group": 2}
        if stage != "stage4_latent_rl":
            config = {"vlm": TINY, "actions": actions}
        state = {
            "stage": stage,
            "finished": True,
            "config": config,
            "arch": share if actions == "token" else arch,
            "val": val,
        }
        checkpoint.save(out / name, 2, tensors, state)
        if stage == "stage4_latent_rl":
            row = {"reward": 1.0, "entropy": 0.5, "kl": 0.1, "s_rollout": 0.2, "s_update": 0.1}
            lines = [json.dumps({"step": step} | row) for step in (1, 2)]
            (out / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return out


RUNS = {"sft": "sft", "bc": "bc", "token": "rl_token", "latent": "rl", "codebook": "codebook"}
FEW = ["--vlm", TINY, "--limit", "2", "--diversity-prompts", "2", "--group", "2", "--max-new", "8", "--batch", "1"]


def models(runs, *flags):
    """These models' flags, and their values."""
    return [word for flag in flags for word in (f"--{flag}", f"{runs}/{RUNS[flag]}")]


def test_the_whole_evaluation(runs, world, tmp_path):
    evaluate.main([*FEW, "--data", str(world), *models(runs, *RUNS), "--samples", "2", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    rows = results["rows"]
    assert list(rows) == ["Prompt", "SFT", "BC latent", "GRPO token", "GRPO latent"]
    assert list(rows["SFT"]) == ["run", "ID", "OOD", "diversity"]
    assert (
        list(rows["SFT"]["ID"]) == ["ratio", "std", "dimensions", "length"]
        and len(rows["SFT"]["ID"]["dimensions"]) == 8
    )
    assert set(rows["GRPO latent"]) - set(rows["SFT"]) == {"reward_start", "reward_end", "s_rollout", "s_update"}
    assert list(results["codes"]) == ["paired data", "text-only data", "policy after RL, OOD test"]
    styles = json.loads((world / "styles.json").read_text())
    for by_style in results["codes"].values():
        assert list(by_style) == [*styles, "all else"] and len(styles) > 1
        assert all(len(counts) == 16 for counts in by_style.values()) and sum(map(sum, by_style.values())) > 0
    assert results["codebook_val"] == {"text": {"val_inferred": 1.0}}
    for name in ("curves.png", "codes.png", "table.md", "example-1.png", "example-1-actions.png"):
        assert (tmp_path / name).stat().st_size > 0
    page = (tmp_path / "examples.md").read_text()
    assert "the response of GRPO latent" in page and page.count("-actions.png)") == 2


def test_the_other_task_and_a_judge_of_ones_own(runs, world, tmp_path, monkeypatch):
    (tmp_path / "half_judge.py").write_text(
        "def judge(records, responses):\n"
        "    return [None if i % 2 else {'Only': (5.0, 10.0)} for i, _ in enumerate(responses)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    few = [*FEW, "--samples", "1", "--prompt", "no", "--task", "b", "--data", str(world), "--latent", f"{runs}/rl"]
    evaluate.main([*few, "--judge", "half_judge:judge", "--out", f"{tmp_path}/b"])
    rows = json.loads((tmp_path / "b" / "results.json").read_text())["rows"]
    assert list(rows) == ["GRPO latent"] and rows["GRPO latent"]["LS2"]["judge_failed"] == 1
    assert rows["GRPO latent"]["LS2"]["ratio"] == 0.5 and list(rows["GRPO latent"]["LS1"]["dimensions"]) == ["Only"]
    drawn = json.loads((tmp_path / "b" / "diversity.json").read_text())["GRPO latent"]
    assert [len(group) for group in drawn] == [2, 2]


def test_a_judge_that_works_on_its_own_is_told_what_comes(runs, world, tmp_path, monkeypatch):
    """It hears of all responses to both tests, and only of these, before it is asked for the first score."""
    told, asked = [], []

    def judge(records, responses):
        asked.append((len(told), list(zip([r["id"] for r in records], responses))))
        return [{"Only": (5.0, 10.0)}] * len(records)

    judge.foresee = lambda records, responses: told.extend(zip([r["id"] for r in records], responses))
    judge.costly = True
    monkeypatch.setattr(evaluate, "load_judge", lambda *_: judge)
    few = [*FEW, "--samples", "2", "--prompt", "no", "--data", str(world), "--latent", f"{runs}/rl"]
    evaluate.main([*few, "--out", f"{tmp_path}/e"])
    assert asked[0][0] == len(told) == 2 * 2 * 2 and sorted(told) == sorted(x for _, pairs in asked for x in pairs)


def test_any_named_tests_in_place_of_the_tasks(runs, world, tmp_path):
    """A test of each task and a file of one's own, which has no prompts beside it."""
    own = tmp_path / "own.json"
    shutil.copytree(world / "images", tmp_path / "images")
    own.write_text(json.dumps([json.loads(line) for line in (world / "task_val.jsonl").read_text().splitlines()[:3]]))
    flags = ["--vlm", TINY, "--limit", "2", "--group", "2", "--max-new", "8", "--samples", "1", "--prompt", "no"]
    flags += ["--data", f"{tmp_path}/none", "--latent", f"{runs}/rl", "--diversity-prompts", "3"]
    tests = f"ID={world}/task_id.jsonl, LS2={world}/task_b_ls2.jsonl,my own={own}"
    evaluate.main([*flags, "--tests", tests, "--out", f"{tmp_path}/x"])
    row = json.loads((tmp_path / "x" / "results.json").read_text())["rows"]["GRPO latent"]
    assert [len(row[test]["dimensions"]) for test in ("ID", "LS2", "my own")] == [8, 5, 8]  # task A has 8, B has 5
    assert "| row | ID | LS2 | my own | diversity |" in (tmp_path / "x" / "table.md").read_text()
    assert len(json.loads((tmp_path / "x" / "diversity.json").read_text())["GRPO latent"]) == 3  # of the last test
    with_prompts = ["--tests", f"T={own}", "--prompts", f"{world}/task_b_prompts.jsonl"]
    assert evaluate.prompts_of(evaluate.Config(tests=tests)) == own
    evaluate.main([*flags, *with_prompts, "--diversity-prompts", "1", "--out", f"{tmp_path}/y"])
    drawn = json.loads((tmp_path / "y" / "diversity.json").read_text())
    assert [len(groups) for groups in drawn.values()] == [1]


def test_the_same_file_named_by_hand_gives_the_same_numbers(runs, world, tmp_path):
    flags = [*FEW, "--samples", "1", "--prompt", "no", "--latent", f"{runs}/rl"]
    evaluate.main([*flags, "--data", str(world), "--out", f"{tmp_path}/a"])
    named = f"ID={world}/task_id.jsonl,OOD={world}/task_ood.jsonl"
    prompts = f"{world}/task_prompts.jsonl"
    evaluate.main([*flags, "--tests", named, "--prompts", prompts, "--out", f"{tmp_path}/b"])
    rows = [json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in "ab"]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("tests", ["ID", "=x.jsonl", "ID=", "ID=a,ID=b", "prompts=a", "a|b=c", "ID=a,"])
def test_tests_that_are_none_are_refused_by_name(tests):
    with pytest.raises(DataError, match="--tests: '.*' must be NAME=file"):
        evaluate.tests_of(evaluate.Config(tests=tests))


def test_wrong_runs_are_refused_by_flag_before_anything_is_drawn(runs, world, tmp_path):
    flags = [*FEW, "--data", str(world), "--out", f"{tmp_path}/x"]
    with pytest.raises(DataError, match="--latent .*is a checkpoint of stage3_bc"):
        evaluate.main([*flags, "--latent", f"{runs}/bc"])
    with pytest.raises(DataError, match="trained with --actions token, not latent"):
        evaluate.main([*flags, "--prompt", "no", "--bc", f"{runs}/sft"])
    with pytest.raises(DataError, match="--codebook: needs --bc"):
        evaluate.main([*flags, "--codebook", f"{runs}/codebook"])
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate.main([*flags, "--prompt", "no"])
    assert not (tmp_path / "x").exists()


def test_a_score_that_is_none_is_in_no_mean_of_the_evaluation():
    """Infinite or negative: counted as failures, and in no dimension's mean either."""
    bad = {"inf": (math.inf, 1.0), "minus": (-3.0, 1.0)}

    def judge(records, responses):
        return [{"Look": bad.get(text, (3.0, 2.0))} for text in responses]

    got = evaluate.score(judge, [{}, {}], [["good", "inf"], ["good", "minus"]])
    assert got["judge_failed"] == 2 and got["ratio"] == 1.5 and got["dimensions"] == {"Look": [3.0, 2.0]}


def test_a_step_without_a_reward_is_in_neither_end_of_the_training(tmp_path):
    rows = [{"step": k, "s_rollout": 1.0, "s_update": 2.0} | ({"reward": k / 10} if k > 1 else {}) for k in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate.training(tmp_path) == {"reward_start": 0.2, "reward_end": 0.5, "s_rollout": 1.0, "s_update": 2.0}


def test_what_would_stop_it_at_the_end_stops_it_before_anything_is_drawn(runs, world, tmp_path, monkeypatch):
    """A folder that cannot be written to; data that only the use of the codes needs."""
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--out .*/file/x: cannot be written"):
        evaluate.main([*FEW, "--data", str(world), "--out", f"{tmp_path}/file/x"])
    shutil.copytree(world, tmp_path / "data")
    (tmp_path / "data" / "paired.jsonl").unlink()
    flags = ["--bc", f"{runs}/bc", "--codebook", f"{runs}/codebook", "--out", f"{tmp_path}/x"]
    with pytest.raises(DataError, match="paired.jsonl: no such file"):
        evaluate.main([*FEW, "--data", f"{tmp_path}/data", *flags])
    with pytest.raises(DataError, match="--codebook .*is a checkpoint of stage3_bc"):
        evaluate.main([*FEW, "--data", str(world), *flags, "--codebook", f"{runs}/bc"])


# ------------------------------------------------------------------------------------------------ two ranks
def test_responses_by_hand():
    roll = Rollout(
        prompt=None,
        group=2,
        tokens_NT=torch.tensor([[2, 3, 9], [9, 0, 0], [2, 2, 2], [3, 9, 0]]),
        mask_NT=torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool),
        logp_NT=None,
        actions_NT=torch.tensor([[5, 6, 7], [8, 0, 0], [4, 4, 4], [1, 2, 0]]),
    )
    tokenizer = SimpleNamespace(decode=lambda ids: "".join("ab"[i - 2] for i in ids))
    one, two = speaker.responses(tokenizer, roll, eos=9)
    assert one == [speaker.Response("ab", [2, 3, 9], [5, 6, 7]), speaker.Response("", [9], [8])]
    assert two == [speaker.Response("aaa", [2, 2, 2], [4, 4, 4]), speaker.Response("b", [3, 9], [1, 2])]
    assert speaker.texts([one, two]) == [["ab", ""], ["aaa", "b"]]
    assert speaker.responses(tokenizer, replace(roll, actions_NT=None), eos=9)[0][0].codes == []


def on_two_ranks(folder, runs, **more):
    (folder / "work.json").write_text(json.dumps({"runs": [["evaluate", flags] for flags in runs]} | more))
    return launch(["tests/faulty.py", f"{folder}/work.json"])


def files_of(folder):
    """{name: content}, without the one setting that two evaluations have otherwise."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    results = json.loads(found["results.json"])
    return found | {"results.json": results | {"config": results["config"] | {"out": ""}}}


def test_two_ranks_write_the_files_of_one_process(runs, world, tmp_path):
    """Several batches, the last of them shorter; and one batch, so that a rank has none."""
    small = ["--vlm", TINY, "--data", str(world), "--group", "2", "--samples", "2", "--max-new", "8", "--batch", "2"]
    some = [
        [*small, *models(runs, "bc", "latent", "codebook"), "--limit", "3", "--diversity-prompts", "5", "--out"],
        [*small, "--prompt", "no", "--latent", f"{runs}/rl", "--limit", "1", "--diversity-prompts", "2", "--out"],
    ]
    done = on_two_ranks(tmp_path, [[*argv, f"{tmp_path}/two-{k}"] for k, argv in enumerate(some)])
    assert done.returncode == 0, done.stderr[-2000:]
    for k, argv in enumerate(some):
        evaluate.main([*argv, f"{tmp_path}/one-{k}"])
        one, two = (files_of(tmp_path / f"{name}-{k}") for name in ("one", "two"))
        assert set(one) == set(two) and {"examples.md", "table.md", "diversity.json"} < set(one)
        assert [name for name in one if one[name] != two[name]] == []
    said = json.loads((tmp_path / "one-0" / "diversity.json").read_text())["GRPO latent"]
    assert len({text for group in said for text in group}) > 3  # so that another order would be seen


@pytest.mark.all
def test_an_error_on_one_rank_is_one_line(runs, world, tmp_path):
    flags = [*FEW, "--data", str(world), "--latent", f"{runs}/rl", "--out", f"{tmp_path}/x"]
    done = on_two_ranks(tmp_path, [flags], fault=[1, "speaker.rollout", 2, "bad_data"])
    assert done.returncode != 0 and done.stderr.count("row 7: bad") == 1
    assert "error: rank 1: rows.jsonl, row 7: bad\n" in done.stderr
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    assert list((tmp_path / "x").iterdir()) == []
