"""What a judge writes -> scores: texts of many shapes that count, and texts that must not."""

import json

import pytest

from judge_parse import parse

NAMES = ["Fluency", "Tone Consistency"]
WANTED = {"Fluency": (7.0, 8.0), "Tone Consistency": (6.0, 9.0)}
TABLE = "|---|---|---|\n| Fluency | 7 | 8 |\n| **Tone Consistency** | 6/10 | 9/10 |"
GOOD = {
    "as asked": "Fluency: A=7, B=8\nTone Consistency: A=6, B=9",
    "windows line ends": "Fluency: A=7, B=8\r\nTone Consistency: A=6, B=9\r\n",
    "bold, of ten": "**Fluency**: A: 7/10, B: 8/10\n**Tone Consistency:** A: 6/10; B: 9 out of 10",
    "swapped": "1. Fluency: B=8, A=7\n2. Tone Consistency: (6, 9)",
    "a table": "| Dimension | A | B |\n" + TABLE,
    "a table, swapped": "| Dimension | Answer B | Answer A | why |\n|---|---|---|---|\n| Fluency | 8 | 7 | 3 typos |\n"
    "| Tone Consistency | 9 | 6 | fine |",
    "a table without a head": "| Fluency | 7 | 8 |\n| Tone Consistency | 6 | 9 |",
    "headings": "Sure!\n\n### Fluency\nA: 7 - clear, but 2 typos.\nB: 8\n\n### Tone Consistency\n- **Answer A**: 6/10\n"
    "- **Answer B**: 9/10\n\nOverall: A: 5, B: 9",
    "json": '```json\n{"Fluency": {"A": 7, "B": 8}, "Tone Consistency": [6, 9]}\n```',
    "json by side": '{"A": {"fluency": 7, "tone_consistency": 6}, "B": {"Fluency": 8, "Tone consistency": "9/10"}}',
    "json rows": '[{"dimension": "Fluency", "A": 7, "B": 8}, {"name": "Tone Consistency", "score_b": 9, "score_a": 6}]',
    "json inside": '{"scores": {"Fluency": {"Answer A": 7.0, "B": 8}, "Tone Consistency": {"B": 9, "A": 6}}}',
    "thinking": "<think>Fluency: A=1, B=1</think>Fluency: 7, 8\nTone-Consistency: [Scores]: (6, 9)",
    "reasons": "Fluency: Answer A scores well. A: 7, B: 8. B has 2 dogs.\nTone Consistency - A 6, B 9",
    "sums": "fluency: A=7, B=8\nTONE CONSISTENCY: A = 6.0 , B = 9.0\nTotal: A=13, B=17",
    "said twice": "Fluency: A=7, B=8\nTone Consistency: A=6, B=9\n\nFluency: A=7, B=8",
    "prose before": "Fluency is fine in both.\n\nFluency: A=7, B=8\nTone Consistency: A=6, B=9",
    "pairs": "Fluency: 7/10, 8/10\nTone Consistency: 6/10 vs 9/10",
    "parentheses": "- Fluency: A (7), B (8)\n- Tone Consistency (A: 6, B: 9)",
    "another order": "Tone Consistency: A=6, B=9\nFluency: A=7, B=8",
    "one more dimension": "Fluency: A=7, B=8\nHumour: A=1, B=1\nTone Consistency: A=6, B=9",
}
REST = "\nTone Consistency: A=6, B=9"
BAD = {
    "nothing": "",
    "a refusal": "I cannot judge this.",
    "a missing row": "Fluency: A=7, B=8",
    "a missing side": "Fluency: A=7" + REST,
    "an empty side": "Fluency: A=7, B=" + REST,
    "an empty cell": "| Dimension | A | B |\n| Fluency | 7 | |\n| Tone Consistency | 6 | 9 |",
    "a side twice": "Fluency: A=7, A=8" + REST,
    "above 10": "Fluency: A=7, B=11" + REST,
    "0": "Fluency: A=0, B=8" + REST,
    "negative": "Fluency: A=-7, B=8" + REST,
    "a range": "Fluency: A=7-8, B=8" + REST,
    "a range in words": "Fluency: A=7 to 8, B=8" + REST,
    "a choice": "Fluency: A=7 or 8, B=8" + REST,
    "a fraction or a pair": "Fluency: 7/8" + REST,
    "of five": "Fluency: A=4/5, B=3/5" + REST,
    "of a hundred": "Fluency: A=7/100, B=8/100" + REST,
    "percent": "Fluency: A=70%, B=80%" + REST,
    "a half": "Fluency: A=7½, B=8" + REST,
    "a decimal comma": "Fluency: A=7,5, B=8" + REST,
    "in words": "Fluency: A=seven, B=eight" + REST,
    "counts in prose": "Fluency: A has 7 typos, B has 8" + REST,
    "counts behind a colon": "Fluency: A: 7 dogs, B: 8 dogs" + REST,
    "three numbers": "Fluency: 7, 8, 9" + REST,
    "numbers run together": "Fluency: 78" + REST,
    "two verdicts": "Fluency: A=7, B=8" + REST + "\nFluency: A=6, B=8",
    "the other order said": "Scores as (B, A):\nFluency: (7, 8)\nTone Consistency: (6, 9)",
    "json without a row": '{"Fluency": {"A": 7, "B": 8}}',
    "json, a key twice": '{"Fluency": {"A": 7, "B": 8, "A": 2}, "Tone Consistency": [6, 9]}',
    "json, a bool": '{"Fluency": {"A": true, "B": 8}, "Tone Consistency": [6, 9]}',
    "json, not a number": '{"Fluency": {"A": NaN, "B": 8}, "Tone Consistency": [6, 9]}',
    "json, three": '{"Fluency": [7, 8, 9], "Tone Consistency": [6, 9]}',
    "json, cut off": '{"Fluency": {"A": 7, "B": 8}, "Tone Consistency": {"A": 6,',
    "names missing": "[Scores]: (7, 8)\n[Scores]: (6, 9)",
    "only thought": "<think>Fluency: A=7, B=8" + REST + "</think>",
}


@pytest.mark.parametrize("shape", GOOD)
def test_what_counts(shape):
    assert parse(GOOD[shape], NAMES) == WANTED


@pytest.mark.parametrize("shape", BAD)
def test_what_does_not(shape):
    assert parse(BAD[shape], NAMES) is None


@pytest.mark.parametrize("shape", GOOD)
def test_a_text_that_is_cut_off_never_has_other_scores(shape):
    """Cut at any place, a text has the right scores or none. Inside a number nobody could tell: so an answer that was
    cut off at the longest length counts as failed, see test_http_judge.py."""
    text = GOOD[shape].replace("8", "10")
    wanted = {"Fluency": (7.0, 10.0), "Tone Consistency": (6.0, 9.0)}
    cuts = [n for n in range(len(text)) if not (text[:n][-1:].isdigit() and text[n].isdigit())]
    found = [parse(text[:n], NAMES) for n in (*cuts, len(text))]
    assert all(scores in (None, wanted) for scores in found)
    assert found[-1] == wanted


def test_scores_of_all_dimensions_of_the_prompts_are_read():
    names = [f"Dimension {c}" for c in "abcdefgh"]
    wanted = {name: (1.0 + k, 10.0 - k) for k, name in enumerate(names)}
    lines = "\n".join(f"{name}: A={a}, B={b}" for name, (a, b) in wanted.items())
    assert parse(lines, names) == parse(json.dumps(wanted), names) == wanted
