"""Can a judge be fooled? Its ratio for true answers and for texts that are none, on records of the validation part.

A judge is of use to RL if what is good gets much more than what is cheap. Each text is cut to --max-new tokens, as what
the agents say is.

    python -m studies.smol_judge --vlm runs/smol/vlm --data runs/smol/data --judge FOLDER
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
import evaluate
from common import Everywhere, option
from data import Processor
from rewards import judge_ratio, judgements, load_judge, reference
from speaker import Speaker
from studies.memory import markdown
from vlm import VLM


@dataclass
class Config(Everywhere):
    vlm: str = option("runs/smol/vlm", "folder of the vision-language model")
    data: str = option("runs/smol/data", "folder of the records")
    judge: str = option("rules", "as for evaluate.py")
    rows: int = option(48, "records", least=2)
    batch: int = option(16, "prompts at a time", least=1)
    max_new: int = option(48, "tokens of a text", least=1)
    max_prompt: int = option(192, "longest prompt, tokens", least=1)
    max_pixels: int = option(112 * 112, "images are scaled down to this many pixels", least=1)
    seed: int = option(2000, "seed of sampling")
    out: str = option("", "JSON file for the numbers; '': none")


def question(record):
    """The last line of the last user message: profile and picture stand before it."""
    return record["messages"][-2]["content"].splitlines()[-1]


def profile(record):
    return "\n".join(record["messages"][-2]["content"].replace("<image>", "").splitlines()[:-1])


def other(records, record, right, rng):
    """-> the reference of another record for which right(other) holds, or None."""
    found = [r for r in records if r is not record and reference(r) != reference(record) and right(r)]
    return reference(rng.choice(found)) if found else None


def texts_of(record, records, cut, rng):
    """-> {name: a text in the place of an answer, or None}. cut: a text to its first tokens, `n` of them if given."""
    true, who = reference(record), record["character"]
    words = cut(true).split()
    shuffled = rng.sample(words, len(words))
    return {
        "the reference": cut(true),
        "its second half": cut(true[len(true) // 2 :]),
        "of the character, on something else": other(records, record, lambda r: r["character"] == who, rng),
        "of another character, same question": other(
            records, record, lambda r: r["character"] != who and question(r) == question(record), rng
        ),
        "of another character, another question": other(
            records, record, lambda r: r["character"] != who and question(r) != question(record), rng
        ),
        "one and the same answer to all": reference(records[0]) if record is not records[0] else None,
        "the profile": profile(record),
        "the question": question(record),
        "the character's name": f"{who}.",
        "the reference's words, shuffled": " ".join(shuffled),
        "the reference's beginning, again and again": " ".join([cut(true, 6)] * 12),
        "a full stop": ".",
    }


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    place, judge = common.setup(cfg), load_judge(cfg.judge)
    processor = Processor(cfg.vlm, cfg.max_prompt, cfg.max_pixels, max_decode=cfg.max_decode)
    files = evaluate.Config(data=cfg.data, allow_outside=cfg.allow_outside)
    records = common.usable(evaluate.records_of(files, "task_val", None), processor, cfg, prompt_only=True)
    records = [records[i] for i in range(min(cfg.rows, len(records)))]
    tokenizer, rng = processor.tokenizer, random.Random(cfg.seed)

    def cut(text, n=cfg.max_new):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:n]
        return tokenizer.decode(ids)

    answers = [{k: v and cut(v) for k, v in texts_of(r, records, cut, rng).items()} for r in records]
    vlm, speaker = VLM(cfg.vlm, place.device, place.dtype), Speaker(cfg, processor, place)
    for name, temperature in (("the VLM, greedy", 0.0), ("the VLM, temperature 1", 1.0)):
        said = speaker((vlm, None), records, 1, temperature, 0)
        for found, (one,) in zip(answers, said):
            found[name] = one.text
    rows = {}
    for name in answers[0]:
        some = [(r, found[name]) for r, found in zip(records, answers) if found[name]]
        if not some:
            continue
        entries = judgements(judge, [r for r, _ in some], [text for _, text in some])
        ratios = [judge_ratio(e) for e in entries]
        rows[name] = {"ratio": float(np.mean(ratios)), "std": float(np.std(ratios)), "records": len(some)}
    lines = [[name, f"{r['ratio']:.3f}", f"{r['std']:.3f}", str(r["records"])] for name, r in rows.items()]
    print(markdown(["text in the place of an answer", "ratio", "std over records", "records"], lines))
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    common.run(main)
