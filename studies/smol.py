"""`make smol-report`: what a finished run of `make smol` shows beyond the table of evaluate.py.

    losses      bare VLM, inferred and random codes on held-out rows, in nats a token and bits a byte; codes in use
    projector   squared error of P on held-out pictures, against the identity; the error of the way there and back
    picture     nats a token with the right picture, another one, none
    speech      of each model at several temperatures: repetition, nats a token under the bare VLM, the judges' ratios
    exposure    how well the cloned policy guesses the codes of true answers, and of its own
    go on       how often a single code leaves the VLM's most likely token as it is
    meanings    the tokens that the ten most used codes raise and lower
    curves      the reward on the validation part before, during and after RL; KL, entropy; seconds; memory
    learnt      the same before RL, at its best and at its end, with more answers, and what each of them gained
    dialogues   six records and what each model says to them
    ablations   stage 2 without the cycle loss, the projector, the text-only data (make smol-ablations)

Written to the run's folder: report.json, report.md, rl.png, and said.json, the answers that it reads.

    python -m studies.smol --run runs/smol --judge smol.judge:judge --likeness FOLDER
    python -m studies.smol --run runs/smol --parts ablations,projector      # these anew, the rest as it stands there
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpoint
import common
import plots
from common import Everywhere, option
from data import DataError
from evaluate import training
from log import read_metrics
from model import LatentModel
from rewards import judge_ratio, judgements, load_judge, reference, reward
from smol.judge import repeated
from speaker import texts
from studies import smol_measures as measures
from studies import smol_pages as pages
from studies.smol_run import FOLDERS, TEMPERATURES, TESTS, Finished, agreement, nats


@dataclass
class Config(Everywhere):
    run: str = option("runs/smol", "folder of the finished run")
    judge: str = option("rules", "as for evaluate.py")
    likeness: str = option("", "folder of a sentence-embedding model, as a second judge of what is said; '': none")
    parts: str = option("", "only these parts, with commas between them; '': all")
    rows: int = option(24, "records of each test that the models answer here", least=2)
    draws: int = option(8, "answers to each prompt of the validation part, for what RL has learnt", least=1)
    contexts: int = option(200, "contexts over which what a code does is averaged", least=1)
    batch: int = option(12, "rows of a forward pass", least=1)
    seed: int = option(2000, "seed of sampling")


# ----------------------------------------------------------------------------------------------------------- speech
def mean_ratio(judge, answers):
    asked, texts = [record for record, _, _ in answers], [text for _, _, text in answers]
    return float(np.nanmean([judge_ratio(entry) for entry in judgements(judge, asked, texts)]))


def speech_row(run, judges, answers):
    """judges: {name: judge}; answers: [(record, tokens, text)] -> the numbers of a row."""
    return {
        "repeated 4-grams": float(np.mean([repeated(tokens) for _, tokens, _ in answers])),
        "nats": nats(run, [run.continued(r, tokens) for r, tokens, _ in answers]),
        "length": float(np.mean([len(tokens) for _, tokens, _ in answers])),
    } | {name: mean_ratio(judge, answers) for name, judge in judges.items()}


def speech(run, judge):
    """-> {model: {temperature: speech_row}}, and the references', cut to as many tokens."""
    tests, decode, judges = run.tests(), run.processor.tokenizer.decode, {"ratio": judge}
    if run.cfg.likeness:
        judges["likeness"] = load_judge(run.cfg.likeness)
    references = [(r, run.reference(r)) for rows in tests.values() for r in rows]
    cut = [(r, tokens, decode(tokens, skip_special_tokens=True)) for r, tokens in references]
    found = {"reference": {"": speech_row(run, judges, cut)}}
    for model, by_temperature in run.said().items():
        found[model] = {}
        for t, said in by_temperature.items():
            answers = [(r, a.tokens, a.text) for test, rows in tests.items() for r, a in zip(rows, said[test])]
            found[model][str(t)] = speech_row(run, judges, answers)
    return found


def exposure(run, judge):
    """-> {'references' or the temperature of its own answers: {agree, bc}} of the cloned policy."""
    latent, tests, said = run.latent("stage3", *LatentModel.parts), run.tests(), run.said()["BC latent"]
    records = [(test, k, r) for test, rows in tests.items() for k, r in enumerate(rows)]
    found = {"references": agreement(run, latent, [run.continued(r, run.reference(r)) for _, _, r in records])}
    for t in TEMPERATURES:
        own = [run.continued(r, said[t][test][k].tokens) for test, k, r in records]
        found[str(t)] = agreement(run, latent, own)
    return found


# --------------------------------------------------------------------------------------------------- RL, cost, answers
SIDES = {"GRPO token": "rl_token", "GRPO latent": "rl_latent"}
LEARNT = len(TESTS)  # in the noise of the answers by which `learnt` judges, behind the numbers of the tests
STARTS = {"GRPO token": "sft", "GRPO latent": "stage3"}


def curves(run, judge):
    """-> {side: [[step, reward on the validation part, KL, entropy]], seconds, GiB}, and rl.png."""
    plots.draw_curves({name: str(run.folder / f) for name, f in SIDES.items()}, run.folder / "rl.png")
    found = {}
    for name, folder in SIDES.items():
        rows = [r for r in read_metrics(run.folder / folder) if "val_reward" in r]
        found[name] = {"fixed": [[r["step"], r["val_reward"], r.get("kl"), r.get("entropy")] for r in rows]}
        found[name] |= training(run.folder / folder)
    folders = ("stage1", "stage2", *FOLDERS.values())
    return found | {"peak_gib": {f: run.state(f).get("peak_gib") for f in folders}}


def learnt(run, judge):
    """The reward on the validation part, cfg.draws answers to each prompt, sampled as in RL, with the same noise for
    every model -> {side: {'before', 'best', 'end': {step, reward, top, gain, error}}}; no 'best' where a run has none.

    top: the reward of the best answer to each prompt. gain: over the reward before RL. error: its standard error, by
    the spread of the prompts' gains."""
    records, found = run.records("task_val"), {}

    def rewards(source):
        said = run.speaker(run.agent(source), records, run.cfg.draws, run.settings["temperature"], LEARNT)
        r_BG = np.ma.masked_invalid(reward(judge, records, sum(texts(said), [])))
        return r_BG.mean(1), {"reward": float(r_BG.mean(1).mean()), "top": float(r_BG.max(1).mean())}

    for name, folder in SIDES.items():
        before_B, row = rewards(STARTS[name])
        found[name] = {"before": {"step": 0} | row | {"gain": 0.0, "error": 0.0}}
        for moment, source in (("best", f"{folder}/{checkpoint.BEST}"), ("end", folder)):
            if checkpoint.latest(run.folder / source) is None:
                continue
            now_B, row = rewards(source)
            gain_B = (now_B - before_B).compressed()  # of the prompts to which both have an answer with a reward
            row |= {"gain": float(gain_B.mean()), "error": float(gain_B.std(ddof=1) / len(gain_B) ** 0.5)}
            found[name][moment] = {"step": run.state(source)["step"]} | row
    return found


def dialogues(run, judge):
    """-> six records, the first of six characters: three with a picture of the ID test, three of the OOD test."""
    tests, said = run.tests(), run.said()
    found = []
    for test, only in (("ID", True), ("OOD", False)):
        characters, rows = set(), [(k, r) for k, r in enumerate(tests[test]) if bool(r["images"]) or not only]
        for k, r in rows:
            if len(characters) == 3 or r.get("character") in characters:
                continue
            characters.add(r.get("character"))
            row = {"test": test, "id": r.get("id"), "images": [Path(p).name for p in r["images"]]}
            row |= {"asked": r["messages"][-2]["content"], "reference": reference(r)}
            row["said"] = {m: {str(t): said[m][t][test][k].text for t in TEMPERATURES} for m in said}
            found.append(row)
    return found


def of_run(function):
    """A measure of the run alone, as a part. Its products are in the run's dtype; those of a judge are never."""

    def part(run, judge):
        with run.place.autocast():
            return function(run)

    return part


PARTS = {
    "losses": of_run(measures.loss_table),
    "projector": of_run(measures.projector_table),
    "picture": of_run(measures.picture_table),
    "speech": speech,
    "exposure": exposure,
    "go on": of_run(measures.go_on_table),
    "meanings": of_run(measures.meanings),
    "curves": curves,
    "learnt": learnt,
    "dialogues": dialogues,
    "ablations": of_run(measures.ablation_table),
}


def parts_wanted(cfg):
    """-> names of parts, in the order of PARTS. DataError for one that is none."""
    wanted = [p.strip() for p in cfg.parts.split(",") if p.strip()] or list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        raise DataError(f"--parts: there is no '{min(unknown)}'; choose from {', '.join(PARTS)}")
    return [p for p in PARTS if p in wanted]


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    wanted, place = parts_wanted(cfg), common.setup(cfg)
    if not (Path(cfg.run) / "rl_latent").is_dir():
        raise DataError(f"--run {cfg.run}: no finished run there; make smol DATA=<folder> makes one")
    run, path = Finished(cfg, place), Path(cfg.run) / "report.json"
    judge = load_judge(cfg.judge)
    report = json.loads(path.read_text()) if path.is_file() else {}
    for part in wanted:
        common.say(f"report: {part}")
        report[part] = PARTS[part](run, judge)
        path.write_text(json.dumps(report, indent=1) + "\n")
    text = "\n\n".join(pages.PAGES[part](report[part]) for part in PARTS if part in report)
    (Path(cfg.run) / "report.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    common.run(main)
