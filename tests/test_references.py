"""Each reference is judged once before a run begins: what the judge cannot score is refused with file and row."""

import json
import math

import pytest
from helpers import TINY

import common
import evaluate
import rewards
import stage4_latent_rl
from answers import answerable
from data import DataError

BAD = {
    "None": None,
    "no dimension": {},
    "nan": {"a": (8.0, math.nan)},
    "infinite": {"a": (8.0, math.inf)},
    "negative": {"a": (8.0, -1.0)},
    "sums to 0": {"a": (8.0, 0.0), "b": (3.0, 0.0)},
}


def record(where="task.jsonl, row 7"):
    question = {"role": "user", "content": "What is it?"}
    return {"where": where, "images": [], "messages": [question, {"role": "assistant", "content": "A star."}]}


# ----------------------------------------------------------------------------------------------------- one reference
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", BAD)
def test_a_reference_without_a_usable_score_is_refused(bad):
    with pytest.raises(DataError, match="^task.jsonl, row 7: the judge has no usable score for the reference"):
        rewards.check_reference(lambda records, responses: [BAD[bad]], record())


def test_it_is_judged_as_a_response_to_its_own_record():
    seen = []
    rewards.check_reference(lambda *given: seen.append(given) or [{"a": (5.0, 5.0)}], record())
    assert seen == [([record()], ["A star."])]


def test_a_judge_that_breaks_off_is_named_in_one_line():
    def judge(records, responses):
        raise ValueError("nothing\nto see")

    with pytest.raises(DataError, match="row 7: the judge breaks off at the reference .ValueError: nothing") as e:
        rewards.check_reference(judge, record())
    assert "\n" not in str(e.value)


def test_what_the_judge_says_of_a_bad_record_is_passed_on():
    with pytest.raises(DataError, match="^task.jsonl, row 7: no 'facts' with asked, kind, role, scene"):
        rewards.check_reference(rewards.load_judge("rules"), record())


def test_a_costly_judge_is_not_asked_but_a_reference_must_be_there():
    def judge(records, responses):
        raise AssertionError("asked")

    judge.costly = True
    rewards.check_reference(judge, record())
    text = {"where": "task.jsonl, row 8", "images": [], "text": "A star."}
    with pytest.raises(DataError, match="task.jsonl, row 8: no assistant message"):
        rewards.check_reference(judge, text)
    assert rewards.EmbeddingJudge.costly


# ------------------------------------------------------------------------------------------------------- a whole file
def fails_on(*rows):
    """A judge that fails on the references of these rows of task_prompts.jsonl and task_id.jsonl."""

    def judge(records, responses):
        judge.seen += [r["where"] for r in records]
        bad = [r["where"].endswith(tuple(f"task_{f}.jsonl, row {n}" for n in rows for f in FILES)) for r in records]
        return [None if b else {"a": (5.0, 5.0)} for b in bad]

    judge.seen = []
    return judge


FILES = ("prompts", "id")


def prompts(world):
    return f"{world}/task_prompts.jsonl"


def test_rows_whose_reference_fails_are_left_out_and_counted(world, processor, capsys):
    judge = fails_on(2, 5)
    left = answerable(prompts(world), common.Everywhere(), processor, judge)
    assert [left[i]["where"][-1] for i in range(len(left))] == list("134678")
    assert [where[-1] for where in judge.seen] == list("12345678")
    said = capsys.readouterr().out
    assert "task_prompts.jsonl: 2 of 8 rows cannot be used" in said and "row 2: the judge has no usable score" in said


def test_strict_stops_at_the_first_and_nothing_left_is_an_error(world, processor):
    with pytest.raises(DataError, match="task_prompts.jsonl, row 2: the judge"):
        answerable(prompts(world), common.Everywhere(strict="yes"), processor, fails_on(2, 5))
    with pytest.raises(DataError, match="no row can be used; the first reason: .* row 1: the judge"):
        answerable(prompts(world), common.Everywhere(), processor, fails_on(*range(1, 9)))


@pytest.mark.parametrize("flag", ["--prompts", "--val"])
def test_stage_4_refuses_before_it_loads_a_model(world, tmp_path, monkeypatch, flag):
    """No row of the file has facts, which the rule judge needs."""
    rows = [json.loads(line) for line in open(prompts(world))]
    rows = [{k: v for k, v in row.items() if k in ("messages", "id")} | {"images": []} for row in rows]
    for row in rows:
        row["messages"] = [m | {"content": m["content"].replace("<image>", "")} for m in row["messages"]]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(stage4_latent_rl, "Agent", None)
    files = ["--prompts", prompts(world), flag, f"{tmp_path}/bare.jsonl", "--out", f"{tmp_path}/rl"]
    with pytest.raises(DataError, match="bare.jsonl: no row can be used; the first reason: .* row 1: no 'facts'"):
        stage4_latent_rl.main(["--vlm", TINY, *files])


def test_the_evaluation_judges_the_references_of_its_tests_alone(world, processor):
    """Nobody judges the responses that are drawn for the diversity."""
    judge = fails_on(2)
    cfg = evaluate.Config(vlm=TINY, data=str(world), limit=3, diversity_prompts=2)
    files = evaluate.load_data(cfg, processor, judge)
    assert {name: len(rows) for name, rows in files.items()} == {"ID": 2, "OOD": 3, "prompts": 2}
    assert len(judge.seen) == 6 and not any("task_prompts" in where for where in judge.seen)
