"""The tiny world's judge: scores by rule, from the facts that each record brings (record["facts"]).

It stands in for the judge of the paper, a language model with 235 billion parameters, and has that judge's dimensions:
the eight of MMRole for role play (task A), the five of PCogAlignBench for advice in a situation (task B). A score lies
between 1 and 10: what a rule gives beyond these bounds is cut off. An empty response has 1 in every dimension.


What a response claims, in both tasks
-------------------------------------
A response is cut into clauses, at . , : ; ! ? and at the word 'and'. A clause CLAIMS the size, colour, shape and place
that it names: 'a red circle' claims that something is red and a circle. 'Three shapes' claims a number.

  * A clause that names no shape speaks of the shape that was named last; so does one that opens with 'it'. The first
    clause of this kind speaks of the thing that was asked about. 'The red one' names no shape but speaks for itself.
  * Nothing is claimed by a negated clause, by one that only repeats the question, or by the role's own greeting,
    farewell and saying.
  * A claim is true if one thing of the scene has all that is claimed. Two colours in one clause are never true. A
    number is true if the scene has as many things.
  * A claim made twice counts once.

TRUTH is the share of the claims that are true; it is 0 if there is no claim.
ANSWERED: the claims give exactly one value for what was asked, right or wrong.
To the question 'What do you see?' there is no such value. Here COVER is the number of things that true claims name by
shape and colour, at most one thing a claim. It is divided by the number of things in the scene, or by the number of
claims with shape and colour if that is larger. The question counts as answered if COVER is not 0.


Task A, role play
-----------------
Instruction Adherence     10 if answered. 4 if there are only other claims, or several answers. 1 without a claim.
                          'What do you see?': 1 + 9 COVER.
Fluency                   1, and 9 times the share of pairs of neighbouring words that are known from the world's own
                          answers or from this role's phrases (any colour may stand for another, and so on). -2 without
                          . ! or ? at the end. -2 if a sentence starts without a capital. -3 for odd characters. If more
                          than 1/4 of the triples of neighbouring words are repetitions: -9 times what is above 1/4.
Coherency                 10. -3 for each greeting that is not at the start, each farewell that is not at the end, each
                          clause said before, each word said before in its clause. -4 if two claims about one thing
                          differ. At most 3 without a claim.
Image-Text Relevance      1, and 9/4 more for each attribute of a thing that is told and true, and for a true number; at
                          most 10. Then -2 for each false claim.
Response Accuracy         The right answer: 6 + 4 TRUTH. Any other: 4 TRUTH. 'What do you see?': (6 COVER + 4) TRUTH.
Personality Consistency   1. +5 for the role's greeting at the start. +4 for its farewell at the end. -4 for any other.
Knowledge Consistency     10 for the role's saying once, 2 for more often, 4 for none. 1 for another 'by the ... ...'.
Tone Consistency          10 for the role's favourite word once or twice, each before a size, a colour or a shape. 4 for
                          none, or one that stands elsewhere. 2 for more than two, or for another role's word.

The last three are at most 4 if the question is not answered, and else at most 4 + 6 TRUTH. So manner without a look at
the image does not pay, and neither does a safe remark that dodges the question.


Task B, advice in a situation
-----------------------------
The user is one person at one place. The advice FITS if it has that person's duty, neither the duty nor the name of
another person, and neither another place nor what another place asks for. A negated sentence gives neither the duty
nor what the place asks for.

Role-Set Sensitivity      1. +6 for the duty. +3 for 'as a <person>'. -5 for each duty and each name of another person.
                          At most 4 + 6 TRUTH.
Body Behavior Awareness   4. +4 for what the place asks for. +2 for 'at <place>'. -5 for each other place, and for each
                          thing that another place asks for.
Mind Feelings Awareness   10 for 'stay <feeling>' with this person's feeling and no other. 4 without a feeling. Else 1.
Contextual Awareness      1, and 3 more for each attribute of a thing that is told and true; at most 10. Then -3 for
                          each false claim, each other place, and each thing that another place asks for.
Conversational Flow       Fluency as in task A. -3 for each clause said before, and word said before in its clause. -3
                          unless the advice fits, is all true, and ends with one encouragement.

Body and Mind are at most 4 if the advice does not fit, and else at most 4 + 6 TRUTH. So no manner pays without a look
at image, user and place.
"""

import re
from collections import Counter
from functools import lru_cache
from random import Random

import numpy as np

from data import DataError
from rewards import reference
from tiny import world as W

NEEDED = {"role play": {"scene", "kind", "asked", "role"}, "situation": {"scene", "person", "place"}}  # facts of a task
VALUES = {"size": W.SIZES, "colour": W.COLOURS, "shape": W.SHAPES, "place": W.PLACES}
ATTRIBUTE = {value: attribute for attribute, values in VALUES.items() for value in values}
PLACES = sorted((p + r"\b" for p in W.PLACES), key=len, reverse=True)  # 'at the top left' is tried before 'at the top'
TOKEN = re.compile("|".join(PLACES) + r"|[a-z']+|\S")
BREAKS = {*".,:;!?", "and"}
NEGATIONS = {"not", "never", "nor", "neither", "without", "isn't", "aren't"}
ANY_GREETING = re.compile("|".join(W.GREETINGS))
ANY_FAREWELL = re.compile("|".join(W.FAREWELLS))
OPENINGS = sorted({g.split(",")[0] for g in W.GREETINGS})
LIKE_GREETING_OR_FAREWELL = re.compile(r"\b(?:" + "|".join(OPENINGS) + r"|to you)\b")


# ------------------------------------------------------------------------------------------------------- judging
def judge(records, responses):
    """The judge, as rewards.py describes it -> [{dimension: (score of the response, score of the reference)}], by row.

    The dimensions are those of each record's task. A reference is scored once for all rows that share its record.
    Raises DataError for a record without the facts of its task."""
    references = {}
    for record in records:
        if id(record) not in references:
            references[id(record)] = scores(record, reference(record))
    out = []
    for record, response in zip(records, responses, strict=True):
        ours, theirs = scores(record, response), references[id(record)]
        out.append({name: (ours[name], theirs[name]) for name in ours})
    return out


def scores(record, text):
    """-> {dimension: score in [1, 10]} of one response. Raises DataError for a record without the facts of its task."""
    facts = checked_facts(record)
    reading, rules = TASKS[facts.get("task", "role play")]
    text = " ".join(text.split())
    if not text:
        return dict.fromkeys(rules, 1.0)
    response = reading(text, facts)
    return {name: float(min(max(rule(response), 1), 10)) for name, rule in rules.items()}


def checked_facts(record):
    """-> record["facts"], if the rules of its task can be applied to them."""
    where, facts = record.get("where"), record.get("facts")
    task = facts.get("task", "role play") if isinstance(facts, dict) else "role play"
    cure = "use the tiny world's task files, or another judge"
    if task not in NEEDED:
        raise DataError(f"{where}: no rules for the task {task!r}, only for {' and '.join(NEEDED)}; {cure}")
    if not isinstance(facts, dict) or not NEEDED[task] <= set(facts):
        needed = ", ".join(sorted(NEEDED[task]))
        raise DataError(f"{where}: no 'facts' with {needed}, which the rule judge needs; {cure}")
    return facts


# ------------------------------------------------------------------------------------------------------- claims
def tokens(text):
    """-> lower-case words, punctuation marks, and place phrases ('at the top left') as one token."""
    return TOKEN.findall(" ".join(text.lower().split()))


def clauses(text):
    """-> lists of tokens between punctuation marks and 'and'."""
    out = [[]]
    for t in tokens(text):
        if t in BREAKS:
            out.append([])
        else:
            out[-1].append(t)
    return [c for c in out if c]


def given(facts):
    """-> the (attribute, value) that the question itself tells: {('shape', 'star')} of 'What colour is the star?'."""
    if facts.get("asked") is None:
        return frozenset()
    known = "colour" if facts["kind"] == "shape" else "shape"
    return frozenset({(known, facts["scene"][facts["asked"]][known])})


def claims(text, facts):
    """-> the distinct claims in order, each a frozenset of (attribute, value)."""
    text = text.lower()
    if "role" in facts:
        for phrase in ("greeting", "farewell", "saying"):
            text = text.replace(facts["role"][phrase], " . ")
    found, last = [], given(facts)
    for clause in clauses(text):
        if NEGATIONS & set(clause):
            continue
        found += [frozenset({("count", number)}) for number in numbers_of_shapes(clause)]
        claim = {(ATTRIBUTE[t], t) for t in clause if t in ATTRIBUTE}
        named = {a for a, _ in claim}
        of_another = "shape" in named or "one" in clause  # 'the red one' is not what was spoken of last
        if claim and (clause[0] == "it" or not of_another):
            claim |= {(a, v) for a, v in last if a not in named}
        last = frozenset((a, v) for a, v in claim if a == "shape") or last
        if claim and not claim <= given(facts):
            found.append(frozenset(claim))
    return list(dict.fromkeys(found))


def numbers_of_shapes(clause):
    """-> 'two' of 'two shapes' and of 'two splendid shapes', as often as a clause has one."""
    numbers = []
    for k, t in enumerate(clause):
        behind = [u for u in clause[k + 1 : k + 3] if u not in W.WORDS]
        if t in W.NUMBERS and behind[:1] in (["shape"], ["shapes"]):
            numbers.append(t)
    return numbers


def things(claim, scene):
    """-> indices of the scene's things that have all the claim's attributes; [] = a false claim about things."""
    return [i for i, t in enumerate(scene) if all(t.get(a) == v for a, v in claim)]


def is_true(claim, scene):
    counts = {v for a, v in claim if a == "count"}
    if counts:
        return counts == {W.NUMBERS[len(scene)]}
    return bool(things(claim, scene))


def covered(found, scene):
    """COVER: things named by shape and colour in true claims, one claim each / max(things, such claims)."""
    named = [c for c in found if {"shape", "colour"} <= {a for a, _ in c}]
    # the most exact first, so that 'a red star' does not take the place of 'a large red star'
    named.sort(key=len, reverse=True)
    free = set(range(len(scene)))
    for c in named:
        free -= set([i for i in things(c, scene) if i in free][:1])
    return (len(scene) - len(free)) / max(len(scene), len(named))


def contradictory(found, facts):
    """True if claims differ about the asked thing, a place, a shape that the scene has at most once, or the number."""
    shapes = Counter(t["shape"] for t in facts["scene"])

    def names_one_thing(attribute, value):
        if attribute == "shape" and shapes[value] <= 1:
            return True
        return attribute in ("place", "count") or (attribute, value) in given(facts)

    said = {}
    for c in found:
        for about in c:
            if names_one_thing(*about):
                said.setdefault(about, set()).update(c)
    several_values = any(len({a for a, _ in told}) < len(told) for told in said.values())
    several_counts = len({v for c in found for a, v in c if a == "count"}) > 1
    return several_values or several_counts


class Response:
    """What a response says, read against the facts of its record.

    claims: all of them; true: those that are; false: how many are not; told: {(index of the thing, attribute)} of the
    true ones, with None as the index for the number of shapes."""

    def __init__(self, text, facts):
        self.text, self.lower, self.facts, self.scene = text, text.lower(), facts, facts["scene"]
        self.claims = claims(text, facts)
        self.true = [c for c in self.claims if is_true(c, self.scene)]
        self.false = len(self.claims) - len(self.true)
        self.truth = len(self.true) / max(1, len(self.claims))
        self.told = {(None if a == "count" else things(c, self.scene)[0], a) for c in self.true for a, _ in c}


# ---------------------------------------------------------------------------------------------- language, both tasks
def kind_of_word(token):
    """'colour' for 'red', ...: the words of one kind may stand for each other. None for all other words."""
    if token in ATTRIBUTE:
        return ATTRIBUTE[token]
    if token in W.WORDS:
        return "word"
    if token in W.NUMBERS[2:]:
        return "number"
    return None


def pairs(text):
    """-> token pairs of a text, its bounds included; words of one kind that take the same article are one token."""
    out = ["<start>"]
    for t in tokens(text):
        kind = kind_of_word(t)
        article = " an" if t[0] in "aeiou" else ""
        out.append(f"<{kind}{article}>" if kind else t)
    out.append("<end>")
    return list(zip(out, out[1:]))


@lru_cache(maxsize=None)
def grammar(task):
    """-> every token pair of 6,000 seeded answers of a task: in practice, all that the world can say."""
    rng, known = Random("grammar"), set()
    for n in range(6000):
        demo = n % 4 == 0
        if task == "situation":
            person, place = W.random_role_set(rng)[0]
            speak, about = W.demo_advice if demo else W.rich_advice, (person, place, W.random_scene(rng))
        else:
            scene, role = W.random_scene(rng), W.random_role(rng, ood=n % 2 == 1)
            kind, i, _ = W.random_question(scene, rng)
            speak, about = W.demo_answer if demo else W.rich_answer, (role, scene, kind, i)
        known.update(pairs(speak(*about, rng)))
    return frozenset(known)


def fluency(response):
    text, task, role = response.text, response.facts.get("task", "role play"), response.facts.get("role")
    own = ()
    if role:
        own = set(pairs(f"{role['greeting']}! {role['saying']}, {role['saying']}. {role['farewell']}!"))
    known = np.mean([p in grammar(task) or p in own for p in pairs(text)])
    words = tokens(text)
    threes = Counter(zip(words, words[1:], words[2:]))
    repeated = 1 - len(threes) / max(1, threes.total())  # honest answers repeat a little: 'and a large'
    score = 1 + 9 * known - 9 * max(0, repeated - 0.25)
    no_stop = text[-1] not in ".!?"
    no_capital = bool(re.search(r"(?:^|[.!?]\s+)[a-z]", text))
    odd_characters = bool(re.search(r"[^A-Za-z\s.,:;!?']", text))
    return score - 2 * no_stop - 2 * no_capital - 3 * odd_characters


def repetitions(text):
    """Clauses said before, and words said before in their clause."""
    said = clauses(text)
    return len(said) - len({tuple(c) for c in said}) + sum(len(c) - len(set(c)) for c in said)


# --------------------------------------------------------------------------------------------- task A, role play
class Answer(Response):
    """answered, cover: as at the top of this file. right: the right value was given and no other. manner: the most that
    the three dimensions of manner can have."""

    def __init__(self, text, facts):
        super().__init__(text, facts)
        self.describes = facts["kind"] == "describe"
        if self.describes:
            self.cover = covered(self.claims, self.scene)
            self.answered = self.cover > 0
        else:
            values = {v for c in self.claims if given(facts) <= c for a, v in c if a == facts["kind"]}
            self.answered = len(values) == 1
            self.right = values == {right_value(facts)}
        self.manner = 4 + 6 * self.truth * self.answered


def right_value(facts):
    if facts["kind"] == "count":
        return W.NUMBERS[len(facts["scene"])]
    return facts["scene"][facts["asked"]][facts["kind"]]


def adherence(answer):
    if answer.describes:
        return 1 + 9 * answer.cover
    if answer.answered:
        return 10
    return 4 if answer.claims else 1


def coherency(answer):
    text = answer.lower
    faults = repetitions(answer.text)
    faults += sum(m.start() > 0 for m in ANY_GREETING.finditer(text))
    faults += sum(m.end() < len(text.rstrip(" .!?")) for m in ANY_FAREWELL.finditer(text))
    most = 10 if answer.claims else 3
    return min(10 - 3 * faults - 4 * contradictory(answer.claims, answer.facts), most)


def relevance(answer):
    return min(10, 1 + 9 / 4 * len(answer.told)) - 2 * answer.false


def accuracy(answer):
    if answer.describes:
        return (6 * answer.cover + 4) * answer.truth
    return 4 * answer.truth + 6 * answer.right


def personality(answer):
    role, rest, score = answer.facts["role"], answer.lower.rstrip(" .!?"), 1
    if re.match(re.escape(role["greeting"]) + r"\b", rest):
        rest, score = rest[len(role["greeting"]) :], score + 5
    if re.search(r"\b" + re.escape(role["farewell"]) + "$", rest):
        rest, score = rest[: -len(role["farewell"])], score + 4
    another = bool(LIKE_GREETING_OR_FAREWELL.search(rest))
    return min(answer.manner, score - 4 * another)


def knowledge(answer):
    said = re.findall(r"\bby the [a-z]+ [a-z]+", answer.lower)
    if not said:
        score = 4
    elif set(said) != {answer.facts["role"]["saying"]}:
        score = 1
    else:
        score = 10 if len(said) == 1 else 2
    return min(answer.manner, score)


def tone(answer):
    words = tokens(answer.text)
    at = [k for k, t in enumerate(words) if t in W.WORDS]
    behind = [(words[k + 1 : k + 2] or [""])[0] for k in at]
    if len(at) > 2 or any(words[k] != answer.facts["role"]["word"] for k in at):
        score = 2
    elif at and all(describes_a_shape(t) for t in behind):
        score = 10
    else:
        score = 4
    return min(answer.manner, score)


def describes_a_shape(token):
    return token in ("shape", "shapes") or ATTRIBUTE.get(token) in ("size", "colour", "shape")


# -------------------------------------------------------------------------------- task B, advice in a situation
def words_of(text, phrases):
    """-> those of the phrases that the text has, as whole words."""
    return {p for p in phrases if re.search(rf"\b{re.escape(p)}\b", text)}


class Advice(Response):
    """duty, care: the person's duty is there, and what the place asks for. strangers: number of other persons' duties
    and names. elsewhere: number of other places and of things that these ask for. fits: as at the top of this file.
    manner: the most that Body and Mind can have."""

    def __init__(self, text, facts):
        super().__init__(text, facts)
        person, place, text = facts["person"], facts["place"], self.lower
        sentences = re.split(r"[.!?]", text)  # 'never care for people' is no duty
        meant = ". ".join(s for s in sentences if not NEGATIONS & set(tokens(s)))
        self.duty = bool(words_of(meant, [W.DUTIES[person]]))
        self.care = bool(words_of(meant, [W.ADVICE[place]]))
        duties, persons = words_of(text, W.DUTIES.values()), words_of(text, W.DUTIES)
        cares, places = words_of(text, W.ADVICE.values()), words_of(text, W.ADVICE)
        self.strangers = len(duties - {W.DUTIES[person]}) + len(persons - {person})
        self.elsewhere = len(cares - {W.ADVICE[place]}) + len(places - {place})
        self.fits = self.duty and not self.strangers and not self.elsewhere
        self.manner = 4 + 6 * self.truth * self.fits


def role_set(advice):
    as_person = bool(words_of(advice.lower, ["as " + W.with_article(advice.facts["person"])]))
    return min(1 + 6 * advice.duty + 3 * as_person - 5 * advice.strangers, 4 + 6 * advice.truth)


def body(advice):
    at_place = bool(words_of(advice.lower, [f"at {advice.facts['place']}"]))
    return min(4 + 4 * advice.care + 2 * at_place - 5 * advice.elsewhere, advice.manner)


def mind(advice):
    right = W.feeling(advice.facts["person"])
    feelings = words_of(advice.lower, W.FEELINGS)
    if not feelings:
        score = 4
    elif feelings == {right} and words_of(advice.lower, [f"stay {right}"]):
        score = 10
    else:
        score = 1
    return min(score, advice.manner)


def context(advice):
    seen = [a for _, a in advice.told if a != "count"]
    return min(10, 1 + 3 * len(seen)) - 3 * (advice.false + advice.elsewhere)


def flow(advice):
    text = advice.lower
    one = len(words_of(text, W.ENCOURAGEMENTS)) == 1
    closes = one and text.rstrip(" .!?").endswith(tuple(f". {e}" for e in W.ENCOURAGEMENTS))
    whole = closes and advice.fits and advice.truth == 1
    return fluency(advice) - 3 * repetitions(advice.text) - 3 * (not whole)


# --------------------------------------------------------------------------------------------------- the two tasks
TASKS = {  # how a task's responses are read, and a rule for each dimension
    "role play": (
        Answer,
        {
            "Instruction Adherence": adherence,
            "Fluency": fluency,
            "Coherency": coherency,
            "Image-Text Relevance": relevance,
            "Response Accuracy": accuracy,
            "Personality Consistency": personality,
            "Knowledge Consistency": knowledge,
            "Tone Consistency": tone,
        },
    ),
    "situation": (
        Advice,
        {
            "Role-Set Sensitivity": role_set,
            "Body Behavior Awareness": body,
            "Mind Feelings Awareness": mind,
            "Contextual Awareness": context,
            "Conversational Flow": flow,
        },
    ),
}
