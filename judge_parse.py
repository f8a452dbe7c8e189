"""What a language model wrote as a judge -> the scores of two answers, A and B, in every dimension; or None.

Nothing is guessed. A text counts only if each dimension has exactly one score for A and one for B, numbers from 1 to
10. Else the whole judgement has failed, however good the rest looks. What is understood:

    Fluency: A=7, B=8                     labels in either order, with or without 'Answer', bold, bullets, numbers
    Fluency: (7, 8)    Fluency | 7 | 8    a bare pair is A, B, unless the text says '(B, A)'
    | Dimension | B | A |                 a table's columns are those that its head names
    Fluency                               the scores may stand on the lines below the name
      A: 7/10 - clear. B: 8 out of 10
    {"Fluency": {"A": 7, "B": 8}, ...}    JSON: pairs, labels, {"A": {...}, "B": {...}}, or a list of rows

A score may be '8', '8.5', '8/10' or '8 out of 10'. '4/5', '80%', '7-8', '7 or 8' and '8,5' are no scores: what was
meant is not sure. What a model thought aloud in <think>...</think> is left out. A dimension that is scored twice must
have the same scores both times.
"""

import json
import re

LEAST, MOST = 1.0, 10.0  # of a score
NUMBER = r"(?<![\w.,/+\-–−])(\d{1,2}(?:\.\d+)?)"
OF_TEN = r"(?:\s*/\s*10|\s+out\s+of\s+10)?(?:\s+points?)?"
SCORE = NUMBER + OF_TEN + r"(?![\w%/–−]|[.,\-]\d|\s*-\s*\d)"
WHO = r"(?:the\s+)?(?:(?:answer|response|assistant|candidate|score)s?[\s_]*(?:of[\s_]+|for[\s_]+)?)*"
# in prose: a colon or an equals sign before the score, and behind it no word that it would count ('A: 3 dogs')
LABELLED = rf"(?<!\w){WHO}\(?([AB])\)?(?:'s)?(?:\s+score)?\s*[:=]\s*{SCORE}(?!\s*(?:[a-z]|to\b|or\b|–|−))"
BARE = rf"[\s:|=,;\[(\-]*(?:scores?)?[\s:|=,;\])(]*{SCORE}(?:[\s|,;)(]|\band\b|\bvs\b)+{SCORE}[\s|.,;\])]*"
SIDE = rf"{WHO}\(?([AB])\)?(?:'s)?(?:\s+score)?\s*[:=]?\s*\(?{SCORE}\)?"
SIDES = rf"[\s:|=,;\[(\-]*(?:scores?)?[\s:|=,;\](]*{SIDE}(?:[\s|,;.]|\band\b|\bvs\b)+{SIDE}[\s|.,;\])]*"


def parse(text, dimensions):
    """-> {dimension: (score of A, score of B)} for all of `dimensions`, in their order; None if one has no score."""
    text = re.sub(r"<think>.*?</think>", "", text or "", flags=re.S)
    found = _from_json(text, dimensions)
    if found is None:
        found = _from_lines(text, dimensions)
    if any(len(found.get(d, ())) != 1 for d in dimensions):  # none, or several that differ
        return None
    return {d: next(iter(found[d])) for d in dimensions}


def _words(name):
    """A name without what writers vary: case, markup, and what joins its words."""
    return " ".join(re.findall(r"[^\W_]+", str(name).lower()))


def _score(value):
    """A number, or a text that is one score and nothing else -> float; None if it is not, or is out of range."""
    if isinstance(value, str):
        match = re.fullmatch(SCORE, value.strip())
        value = float(match[1]) if match else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if LEAST <= value <= MOST else None


def _pair(a, b):
    """-> {(score of A, score of B)}, or an empty set if one of them is none."""
    a, b = _score(a), _score(b)
    return set() if a is None or b is None else {(a, b)}


# -------------------------------------------------------------------------------------------------------------- JSON
def _from_json(text, dimensions):
    """-> {dimension: set of pairs} of the one JSON value in a text; None if there is none."""
    decoder, values, at = json.JSONDecoder(object_pairs_hook=_no_twins), [], 0
    while (start := re.compile(r"[{\[]").search(text, at)) is not None:
        try:
            value, at = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            at = start.end()
            continue
        rows = _rows(value, {_words(d): d for d in dimensions})
        if rows:
            values.append(rows)
    if not values:
        return None
    return {d: set().union(*(rows.get(d, set()) for rows in values)) for d in dimensions}


def _no_twins(pairs):
    """An object with one key twice has no clear value."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)


def _rows(value, names):
    """A JSON value of one of the known forms -> {dimension: set of pairs}; {} for any other value."""
    if isinstance(value, list):  # [{"dimension": "Fluency", "A": 7, "B": 8}, ...]
        rows = [row for row in value if isinstance(row, dict)]
        named = [(names.get(_words(v)), row) for row in rows for v in row.values() if isinstance(v, str)]
        return _united((d, _sides(row)) for d, row in named if d)
    if not isinstance(value, dict):
        return {}
    sides = {_side(key): v for key, v in value.items()}
    if isinstance(sides.get("A"), dict) and isinstance(sides.get("B"), dict):  # {"A": {"Fluency": 7}, "B": {...}}
        a, b = ({names.get(_words(key)): v for key, v in sides[s].items()} for s in "AB")
        return {d: _pair(a[d], b[d]) for d in a.keys() & b.keys() if d}
    named = [(names.get(_words(key)), v) for key, v in value.items()]
    if any(d for d, _ in named):
        return _united((d, _sides(v)) for d, v in named if d)
    inner = [_rows(v, names) for v in value.values()]  # {"scores": {...}}
    return _united((d, pairs) for rows in inner for d, pairs in rows.items())


def _united(found):
    out = {}
    for d, pairs in found:
        out.setdefault(d, set()).update(pairs)
    return out


def _side(key):
    """'A', 'Answer A', 'score_b' -> 'A' or 'B'; None for any other key."""
    match = re.fullmatch(rf"{WHO}([AB])(?:[\s_]*score)?", str(key).strip(), re.I)
    return match[1].upper() if match else None


def _sides(value):
    """[7, 8] or {"A": 7, "B": 8} -> set of at most one pair."""
    if isinstance(value, list):
        return _pair(*value) if len(value) == 2 else set()
    if not isinstance(value, dict):
        return set()
    sides = [(_side(key), v) for key, v in value.items() if _side(key)]
    return _pair(dict(sides)["A"], dict(sides)["B"]) if sorted(s for s, _ in sides) == ["A", "B"] else set()


# ------------------------------------------------------------------------------------------------------------- lines
def _from_lines(text, dimensions):
    """-> {dimension: set of pairs} of the lines that begin with a dimension's name."""
    lines = [re.sub(r"[*`_]+|<br\s*/?>", " ", line) for line in text.splitlines()]
    reversed_pairs = re.search(r"\(\s*(?:answer\s+)?B\s*[,/|]\s*(?:answer\s+)?A\s*\)", text, re.I)
    named = [_begins(line, dimensions) for line in lines]
    found, columns = {}, None
    for k, (line, (dimension, rest)) in enumerate(zip(lines, named)):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if dimension is None:
            columns = _head(cells) or (columns if "|" in line else None)
            continue
        if columns:
            row = [cells[c] if c < len(cells) else "" for c in columns]
            found.setdefault(dimension, set()).update(_pair(*row))
            continue
        if not re.search(r"\d", rest):
            rest = rest + "\n" + _below(lines[k + 1 :], named[k + 1 :])
        found.setdefault(dimension, set()).update(_scores(rest, reversed_pairs))
    return found


def _begins(line, dimensions):
    """-> (the dimension with whose name a line begins, the rest of the line), or (None, the line)."""
    for d in sorted(dimensions, key=len, reverse=True):
        name = r"[\s\-]*".join(re.findall(r"[^\W_]+", d))
        match = re.match(rf"[\s>#|•+\-\[(\"']*(?:\d{{1,2}}[.)]\s*)?[\s\[(\"']*{name}(?!\w)[\s\])\"']*", line, re.I)
        if match:
            return d, line[match.end() :]
    return None, line


def _head(cells):
    """-> the columns of A and of B, of a table's head; None for any other line."""
    sides = [_side(cell) for cell in cells]
    return (sides.index("A"), sides.index("B")) if sides.count("A") == sides.count("B") == 1 else None


def _below(lines, named):
    """-> the lines below a dimension's name, up to the next name or to an empty line behind them."""
    kept = []
    for line, (dimension, _) in zip(lines, named):
        if dimension or (kept and not line.strip()):
            break
        if line.strip():
            kept.append(line.strip().lstrip("-•+> "))
    return "\n".join(kept)


def _scores(rest, reversed_pairs):
    """What stands behind a dimension's name -> set of at most one pair."""
    if match := re.fullmatch(SIDES, rest, re.I):
        sides = {match[1].upper(): match[2], match[3].upper(): match[4]}
        return _pair(sides["A"], sides["B"]) if len(sides) == 2 else set()
    if match := re.fullmatch(BARE, rest, re.I):
        return set() if reversed_pairs else _pair(match[1], match[2])
    labelled = [(who.upper(), score) for who, score in re.findall(LABELLED, rest, re.I)]
    if sorted(who for who, _ in labelled) != ["A", "B"]:
        return set()
    return _pair(dict(labelled)["A"], dict(labelled)["B"])
