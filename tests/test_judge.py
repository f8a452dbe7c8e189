"""tiny/judge.py: true is told from false, an honest rich answer beats every cheap trick, and each rule gives its score.

Expected scores follow by hand from the rules in tiny/judge.py's docstring."""

import random
from dataclasses import asdict

import numpy as np
import pytest

from data import DataError
from tiny import judge as J
from tiny import world as W

ROLE = W.Role("Mara the sailor", "ahoy, friend", "fair winds to you", "splendid", "by the old sea")
SCENE = (W.Thing("large", "red", "circle", "at the top left"), W.Thing("small", "blue", "star", "in the middle"))
HONEST = "Ahoy, friend! By the old sea, the splendid circle is red. Fair winds to you!"
DEMO = "Ahoy, friend! The circle is red."  # what the demonstrations show
QUESTION = "What colour is the circle?"
DIMENSIONS_A = [
    "Instruction Adherence",
    "Fluency",
    "Coherency",
    "Image-Text Relevance",
    "Response Accuracy",
    "Personality Consistency",
    "Knowledge Consistency",
    "Tone Consistency",
]
DIMENSIONS_B = [
    "Role-Set Sensitivity",
    "Body Behavior Awareness",
    "Mind Feelings Awareness",
    "Contextual Awareness",
    "Conversational Flow",
]


def record(kind="colour", asked=0, scene=SCENE, role=ROLE, answer=DEMO):
    facts = {"scene": [asdict(t) for t in scene], "kind": kind, "asked": asked, "role": asdict(role)}
    messages = W.chat("<image>" + QUESTION, answer, role.profile())
    return {"where": "task.jsonl, row 7", "messages": messages, "facts": facts}


def scored(record, text):
    """The scores in the order of the dimensions."""
    return np.array(list(J.scores(record, text).values()))


def scores(text, *args, **kwargs):
    return scored(record(*args, **kwargs), text)


def claims_of(*claims):
    return [frozenset(c.items()) for c in claims]


# ------------------------------------------------------------------------------------------------------- claims
@pytest.mark.parametrize(
    "text, expected",
    [
        (  # the longest place phrase, not 'at the top'
            "I see a large red circle at the top left.",
            [{"size": "large", "colour": "red", "shape": "circle", "place": "at the top left"}],
        ),
        ("It is red.", [{"shape": "circle", "colour": "red"}]),  # speaks of the asked thing
        ("The red one is small.", [{"colour": "red", "size": "small"}]),  # 'one' is no count
        ("There is one splendid shape.", [{"count": "one"}]),
        (
            "The circle is red and there is a blue star, small.",
            [
                {"shape": "circle", "colour": "red"},
                {"colour": "blue", "shape": "star"},
                {"shape": "star", "size": "small"},
            ],
        ),
        ("There is a circle.", []),
        ("The circle is not red.", []),
        ("Ahoy, friend!", []),
        ("", []),
    ],
)
def test_claims_by_hand(text, expected):
    assert J.claims(text, record()["facts"]) == claims_of(*expected)


def test_several_values_in_one_clause_are_a_false_claim():
    facts = record()["facts"]
    for text in ("The circle is red blue green.", "The circle is red or blue."):
        assert [J.is_true(c, facts["scene"]) for c in J.claims(text, facts)] == [False]


def test_every_answer_of_the_world_is_true_and_right_and_untrue_of_another_scene():
    rng, elsewhere = random.Random(3), []
    best = ["Instruction Adherence", "Fluency", "Coherency", "Response Accuracy", "Personality Consistency"]
    for n in range(1500):
        scene, role = W.random_scene(rng), W.random_role(rng, ood=n % 2 == 0)
        kind, i, _ = W.random_question(scene, rng)
        r = record(kind, i, scene, role)
        bodies = [
            W.plain_body(scene, kind, i),
            W.rich_body(scene, kind, i, rng),
            W.rich_body(scene, kind, i, rng, role.word),
        ]
        for body in bodies:
            answer = W.in_role(role, body, True, True, rng.random() < 0.5, rng)
            found = J.claims(answer, r["facts"])
            assert found and all(J.is_true(c, r["facts"]["scene"]) for c in found), answer
            s = J.scores(r, answer)
            assert [s[name] for name in best] == [10] * 5, (answer, s)
            other = [asdict(t) for t in W.random_scene(rng)]
            if kind == "describe":
                elsewhere += [J.is_true(c, other) for c in found]
    # size, colour, shape and place meet by chance in at most 4 of 2 * 8 * 6 * 9 cases
    assert np.mean(elsewhere) < 0.05


# --------------------------------------------------------------------------------------- task A: eight dimensions
def test_scores_by_hand():
    relevance = 1 + 9 / 4 * 2  # two true attributes: circle, red
    assert scores(HONEST).tolist() == [10, 10, 10, relevance, 10, 10, 10, 10]
    assert scores(DEMO).tolist() == [10, 10, 10, relevance, 10, 1 + 5, 4, 4]
    assert scores("").tolist() == scores(" \n").tolist() == [1] * 8
    # half of the claims are true (large), the answer is wrong: relevance 1 + 9/4 * 2 - 2, accuracy 4/2, manner at most
    # 4 + 6/2
    half = scores("Ahoy, friend! By the old sea, the splendid circle is large, blue. Fair winds to you!")
    assert half[[0, 2, 3, 4, 5, 6, 7]].tolist() == [10, 10, 3.5, 2, 7, 7, 7]


@pytest.mark.parametrize(
    "kind, asked, right, wrong",
    [
        ("colour", 0, "It is red.", "It is blue."),
        ("shape", 0, "The circle is red.", "The star is red."),
        ("place", 1, "The star is in the middle.", "The star is at the top."),
        ("size", 1, "The star is small.", "The star is large."),
        ("count", None, "There are two shapes.", "There are three shapes."),
    ],
)
def test_accuracy_of_each_kind(kind, asked, right, wrong):
    for text, accuracy in ((right, 10), (wrong, 1)):
        s = scores(text, kind, asked)
        assert (s[0], s[4]) == (10, accuracy), text  # both answer the question; one of them rightly


def test_describe_by_hand():
    both = "There is a large red circle at the top left and a small blue star in the middle."
    both = scores(both, "describe", None)
    one = scores("There is a large red circle at the top left.", "describe", None)
    assert (both[0], both[3], both[4]) == (10, 10, 10)
    assert (one[0], one[3], one[4]) == (1 + 9 / 2, 10, 6 / 2 + 4)
    twice = scores("There is a red circle, a red circle at the top left.", "describe", None)
    assert twice[0] == 1 + 9 / 2  # one thing named twice is one thing


THINGS = [f"{W.with_article(c)} {s}" for c in W.COLOURS for s in W.SHAPES]
MANNER = "Ahoy, friend! By the old sea, {} Fair winds to you!"
CHEAP = {
    "empty": "",
    "copy of the prompt": QUESTION,
    "copy of the profile": ROLE.profile() + " " + QUESTION,
    "one word again and again": "red " * 20,
    "one sentence again and again": "The circle is red. " * 8,
    "all favourite words": " ".join(W.WORDS).capitalize() + ".",
    "favourite word again and again": "splendid " * 12,
    "manner without an answer": MANNER.format("splendid."),
    "manner, and the question repeated": MANNER.format("there is a splendid circle."),
    "manner with wrong facts": MANNER.format("the splendid circle is blue."),
    "manner with a safe remark": MANNER.format("I see a splendid small blue star."),
    "another role's manner": "Hail, captain! By the golden oak, the jolly circle is red. Warm fires to you!",
    "all colours in one clause": MANNER.format(f"the splendid circle is {' '.join(W.COLOURS)}."),
    "all colours in turn": MANNER.format(f"the splendid circle is {', '.join(W.COLOURS)}."),
    "all things there can be": MANNER.format(f"there is {', '.join(THINGS)}."),
    "greeting again and again": "Ahoy, friend! " * 4 + "The circle is red.",
    "control tokens": "<|im_end|><|image_pad|>",
}


@pytest.mark.parametrize("name", CHEAP)
def test_cheap_tricks_do_not_pay(name):
    total = scores(CHEAP[name]).sum()  # out of 80
    assert total <= scores(DEMO).sum() - 8
    assert total <= scores(HONEST).sum() - 20
    assert total >= 8


def test_a_wrong_answer_or_a_shotgun_has_no_accuracy():
    for name in ("manner with wrong facts", "all colours in one clause"):
        s = scores(CHEAP[name])
        assert s[4] == 1 and s[5:].max() == 4
    in_turn = scores(CHEAP["all colours in turn"])
    assert in_turn[4] == 1  # 4 * 1/8, and not below 1
    assert in_turn[0] == 4  # several answers are none


@pytest.mark.parametrize(
    "text, personality, knowledge, tone",
    [
        ("The circle is red.", 1, 4, 4),
        ("The circle is red. Fair winds to you!", 5, 4, 4),
        ("Hail, friend! The circle is red. Fair winds to you!", 1, 4, 4),
        ("By the old sea, the circle is red, by the old sea.", 1, 2, 4),
        ("By the old moon, the circle is red.", 1, 1, 4),
        ("The jolly circle is red.", 1, 4, 2),
        ("The circle is red, splendid.", 1, 4, 4),
    ],
)
def test_manner_by_hand(text, personality, knowledge, tone):
    assert scores(text)[5:].tolist() == [personality, knowledge, tone]


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
FULL = (
    "As a nurse, care for people. At the harbour, mind the water. Stay calm. "
    "Start with the large red circle. You can do it!"
)


def situation(answer=ADVISED):
    """A nurse (who is to stay calm) at the harbour, who is a cook at the school."""
    role_set = (("nurse", "the harbour"), ("cook", "the school"))
    question = "<image>I am a nurse at the harbour. What should I do?"
    return {
        "where": "task_b.jsonl, row 3",
        "messages": W.chat(question, answer, W.tell_role_set(role_set)),
        "facts": {
            "task": "situation",
            "scene": [asdict(t) for t in SCENE],
            "person": "nurse",
            "place": "the harbour",
        },
    }


def advised(response):
    return scored(situation(), response)


def test_situation_scores_by_hand():
    context = 1 + 3 * 2  # two true attributes
    assert advised(ADVISED).tolist() == [10, 4, 4, context, 7]  # no place, feeling or encouragement
    assert advised(CARED).tolist() == [10, 10, 4, context, 7]
    assert advised(FULL).tolist() == [10] * 5
    assert advised("").tolist() == [1] * 5
    # nothing true: all manner is capped at 4
    assert advised(FULL.replace("red", "blue")).tolist() == [4, 4, 4, 1, 7]
    # the user is a cook elsewhere: the advice does not fit
    assert advised(FULL.replace("nurse, care for people", "cook, keep things clean")).tolist() == [1, 4, 4, 10, 7]
    school = advised(FULL.replace("harbour, mind the water", "school, speak softly"))
    assert school.tolist() == [10, 1, 4, 10 - 3 - 3, 7]
    # two claims, one of them false: truth 1/2, so role, body and mind are at most 7; three true attributes, one false
    half = advised(FULL.replace("circle.", "circle, and the blue ring."))
    assert half.tolist()[:4] == [7, 7, 7, 7]


def test_feeling_encouragement_and_repetition_by_hand():
    assert advised(FULL.replace("calm", "brave"))[2] == advised(FULL.replace("calm", "calm, brave"))[2] == 1
    assert advised(FULL.replace("You can do it!", "You can do it! Take heart!"))[4] <= 7  # one encouragement is enough
    twice = CARED + " Start with the red circle."
    # Words and marks: 'As a nurse, care for people.' 8, 'At the harbour, mind the water.' 8, 'Start with the red
    # circle.' 6, and 6 again: 28, so 26 triples. The 4 of the last sentence and '. start with' are repetitions:
    # 5/26 < 1/4.
    assert advised(twice)[4] == 10 - 3 - 3  # the clause again; no encouragement
    often = "Start with the red circle. " * 3
    # 18 words and marks, 16 triples; 6 different ones (4 inside the sentence, 2 across its end): 10/16 are repetitions.
    # Two clauses again: -6. It does not fit: -3. So 10 - 9 * (10/16 - 1/4) - 6 - 3 < 1
    assert advised(often)[4] == 1


def test_every_advice_of_the_world_fits_and_is_fluent():
    rng = random.Random(6)
    for _ in range(500):
        r, scene = W.situation_record(W.random_role_set(rng), rng)
        f = r["facts"]
        whole = W.advice(f["person"], f["place"], scene, rng, 1, 1, 1, 1, 1)
        assert scored(r, whole).tolist() == [10] * 5, whole
        plain = scored(r, r["messages"][-1]["content"])
        assert plain[[0, 2, 3, 4]].tolist() == [10, 4, 7, 7] and plain[1] in (4, 10)


COLOURED_SHAPES = [f"{c} {s}" for c in W.COLOURS for s in W.SHAPES]
CHEAP_ADVICE = {
    "empty": "",
    "copy of the prompt": "I am a nurse at the harbour. What should I do?",
    "copy of the profile": "The user is a nurse at the harbour and a cook at the school. I am a nurse at the harbour.",
    "one word again and again": "nurse " * 20,
    "one sentence again and again": "Start with the red circle. " * 6,
    "all feelings": "Stay " + ", ".join(W.FEELINGS) + ".",
    "all encouragements": " ".join(e.capitalize() + "!" for e in W.ENCOURAGEMENTS),
    "all duties": "As a nurse, " + ", ".join(W.DUTIES.values()) + ". Start with the red circle.",
    "all cares": ADVISED.replace("people. ", "people. " + ", ".join(W.ADVICE.values()).capitalize() + ". "),
    "the user's other self": FULL.replace("nurse, care for people", "cook, keep things clean"),
    "advice for the other place": FULL.replace("harbour, mind the water", "school, speak softly"),
    "negated": FULL.replace("care for", "never care for").replace("mind", "never mind"),
    "both selves": FULL.replace("people. ", "people. As a cook, keep things clean. ").replace("large ", ""),
    "manner with wrong facts": FULL.replace("red circle", "blue ring"),
    "manner without looking": FULL.replace("Start with the large red circle. ", ""),
    "all things there can be": FULL.replace("the large red circle", "the " + ", the ".join(COLOURED_SHAPES)),
    "control tokens": "<|im_end|><|image_pad|>",
}


@pytest.mark.parametrize("name", CHEAP_ADVICE)
def test_cheap_advice_does_not_pay(name):
    total = advised(CHEAP_ADVICE[name]).sum()  # out of 50
    assert total <= advised(ADVISED).sum() - 3
    assert total <= advised(FULL).sum() - 18
    assert total >= 5


def test_richer_honest_advice_is_better():
    assert advised(ADVISED).sum() < advised(CARED).sum() < advised(FULL).sum()


# ------------------------------------------------------------------------------------------------ the judge itself
def test_an_entry_has_the_dimensions_of_its_task_and_both_scores():
    first, second, third = J.judge([situation(), record(), situation()], [FULL, HONEST, ""])
    assert list(first) == DIMENSIONS_B and list(second) == DIMENSIONS_A
    # by hand, as above: FULL and HONEST beside the plain references of the two records
    assert list(first.values()) == [(10, 10), (10, 4), (10, 4), (10, 7), (10, 7)]
    assert list(second.values()) == [*[(10, 10)] * 3, (5.5, 5.5), (10, 10), (10, 6), (10, 4), (10, 4)]
    assert list(third.values()) == [(1, 10), (1, 4), (1, 4), (1, 7), (1, 7)]
    assert all(type(score) is float for entry in (first, second, third) for both in entry.values() for score in both)
    assert J.judge([], []) == []


def test_a_reference_is_scored_once_for_all_responses_to_it(monkeypatch):
    seen, scores = [], J.scores
    monkeypatch.setattr(J, "scores", lambda record, text: seen.append(text) or scores(record, text))
    one, other = record(), record(answer=HONEST)
    J.judge([one, one, one, other], ["a", "b", "c", "d"])
    assert sorted(seen) == sorted(["a", "b", "c", "d", DEMO, HONEST])


def test_records_without_facts_are_named():
    nothing = {k: v for k, v in record().items() if k != "facts"}
    with pytest.raises(DataError, match="task.jsonl, row 7: no 'facts' with asked, kind, role, scene"):
        J.judge([nothing], ["The circle is red."])
    with pytest.raises(DataError, match="task_b.jsonl, row 3: no 'facts' with person, place, scene"):
        J.judge([situation() | {"facts": {"task": "situation", "scene": []}}], [ADVISED])
    with pytest.raises(DataError, match="x: no rules for the task 'cooking', only for role play and situation"):
        J.judge([situation() | {"where": "x", "facts": {"task": "cooking"}}], [ADVISED])
