"""smol/judge.py on answers that are none: each gets what an answer off the subject gets, or less."""

import json

import numpy as np
import pytest
import torch
from helpers import TINY

from rewards import judge_ratio, ngram_embed
from smol import judge as smol_judge
from smol.judge import Judge, repeated, without
from studies import smol_judge as study

PROFILE = "You are Bram the mason. Favourite word: jolly."
QUESTION = "How many shapes are there?"
REFERENCE = "Hail, traveller! There are two shapes: a large black ring at the top right and a small blue square."


def record(reference=REFERENCE, profile=PROFILE):
    asked = "\n".join(filter(None, ["<image>" + profile, QUESTION]))
    return {"images": [], "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": reference}]}


@pytest.fixture(scope="module")
def judge(vlm, processor):
    return Judge(ngram_embed, vlm, processor.tokenizer)


def ratios(judge, *texts):
    return [judge_ratio(entry) for entry in judge([record()] * len(texts), list(texts))]


def test_the_reference_has_a_ratio_of_1(judge):
    assert ratios(judge, REFERENCE) == [pytest.approx(1)]


def test_what_is_no_answer_gets_little(judge):
    good, *cheap = ratios(
        judge,
        "Hail, traveller! There are two shapes: a small blue square and a large black ring.",
        QUESTION,
        PROFILE,
        "ring traveller two a large: There square black at small Hail, top and shapes are right the a blue!",
        "Hail, traveller! " * 12,
        "the the the the the the the the the the",
        "",
        " ",
    )
    assert good > 0.6 and max(cheap) < 0.4 * good
    assert cheap[-2:] == [pytest.approx(0.1, abs=0.02)] * 2


def test_what_suits_everybody_is_worth_nothing(vlm, monkeypatch):
    """The usual answers lie in the plane of the first two axes; the reference adds a third one to their mean."""
    e = {"one": [0.6, 0.8, 0, 0, 0], "two": [0.8, 0.6, 0, 0, 0], "general": [0.5**0.5, 0.5**0.5, 0, 0, 0]}
    e |= {REFERENCE: [0.5, 0.5, 0.5**0.5, 0, 0], "particular": [0, 0, 1, 0, 0]}
    e |= {QUESTION: [0, 0, 0, 1, 0], PROFILE: [0, 0, 0, 0, 1]}

    def likeness(usual):
        judge = Judge(lambda texts: np.array([e[text] for text in texts]), vlm, None, usual)
        monkeypatch.setattr(judge, "form", lambda texts: dict.fromkeys(texts, 1.0))
        entries = judge([record()] * 2, ["general", "particular"])
        return [(scores[0] - 1) / 9 for entry in entries for scores in entry.values()]

    assert likeness(()) == [pytest.approx(0.5**0.5)] * 2
    assert likeness(["one", "two"]) == [pytest.approx(0, abs=1e-6), pytest.approx(1)]


def test_the_usual_answers_come_from_all_over_the_file(tmp_path, monkeypatch):
    rows = [record(str(k)) for k in range(9)]
    (tmp_path / "demos.jsonl").write_text("\n".join(map(json.dumps, rows)).replace("<image>", ""))
    monkeypatch.setattr(smol_judge, "COMMON", 3)
    assert smol_judge.usual_answers(str(tmp_path / "demos.jsonl")) == ["0", "4", "8"]
    with pytest.raises(smol_judge.DataError, match="none.jsonl"):
        smol_judge.usual_answers(str(tmp_path / "none.jsonl"))


def test_a_score_by_hand(vlm, monkeypatch):
    """likeness .5, 6 nats of 5 to 7, a fifth of the 4-grams repeated: 1 + 9 * .5 * .5 * .8; the reference 1 + 9."""
    e = {"said": [0.5, 0.75**0.5, 0, 0], REFERENCE: [1.0, 0, 0, 0], QUESTION: [0, 0, 1, 0], PROFILE: [0, 0, 0, 1]}
    judge = Judge(lambda texts: np.array([e[text] for text in texts]), vlm, None)
    ids = {"said": [1, 2, 3, 4, 1, 2, 3, 4], REFERENCE: [5]}
    monkeypatch.setattr(judge, "tokenizer", lambda text, **_: {"input_ids": ids[text]})
    monkeypatch.setattr(judge, "nats", lambda rows: [6.0 if len(row) > 1 else 3.0 for row in rows])
    for _ in range(2):  # the second time, only the answer is embedded anew
        ((name, scores),) = judge([record()], ["said"])[0].items()
        assert scores == (pytest.approx(1 + 9 * 0.5 * 0.5 * 0.8), 10.0)


def test_the_nats_are_those_of_each_text_alone(judge, vlm, processor):
    rows = [processor.tokenizer(text)["input_ids"] for text in (REFERENCE, "Hail!", QUESTION)]
    for ids, found in zip(rows, judge.nats(rows)):
        all_T = torch.tensor([processor.eos_id, *ids])
        logp_TV = torch.log_softmax(vlm.head(vlm.text(input_ids=all_T[None]).last_hidden_state[0]), -1)
        assert found == pytest.approx(-float(logp_TV[range(len(ids)), ids].mean()), abs=1e-4)


def test_repeated_by_hand():
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)  # of five, the last has stood there
    assert repeated([7] * 10) == pytest.approx(6 / 7) and repeated(list(range(9))) == 0
    assert repeated([1, 2, 3]) == 0


def test_without_takes_directions_out():
    e = np.array([3.0, 4.0, 12.0])
    assert without(e, np.array([0.0, 0, 2])) == pytest.approx([0.6, 0.8, 0])
    assert without(e, np.array([1.0, 0, 1]), np.array([0, 0, 1.0])) == pytest.approx([0, 1, 0])
    assert without(e, e).tolist() == [0, 0, 0]


def test_a_record_without_a_profile(judge):
    one = record(profile="")
    assert smol_judge.asked(one) == (QUESTION, "") and smol_judge.asked(record()) == (QUESTION, PROFILE)
    (entry,) = judge([one], [REFERENCE])
    assert judge_ratio(entry) == pytest.approx(1)


def test_the_study_of_a_judge(world, tmp_path, monkeypatch):
    """On the tiny world, with its rules as judge: every kind of text has a row."""
    for name in ("task_val",):
        rows = [json.loads(line) | {"character": f"{k % 2}"} for k, line in enumerate((world / f"{name}.jsonl").open())]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "images").symlink_to(world / "images")
    out = tmp_path / "out.json"
    few = ["--rows", "4", "--max-new", "12", "--max-prompt", "200", "--allow-outside", "yes", "--out", str(out)]
    study.main(["--vlm", TINY, "--data", str(tmp_path), *few])
    found = json.loads(out.read_text())
    assert found["the reference"]["records"] == 4 and "the VLM, greedy" in found
    assert found["a full stop"]["ratio"] < found["the reference"]["ratio"]
