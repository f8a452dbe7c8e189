"""Evaluation: the judge's ratio on a task's tests, the diversity of rollouts, and how the codebook is used.

Task a is role play: its tests are ID (roles as in training) and OOD (held-out roles). Task b is situated
personalisation: its tests are LS1 and LS2 (held-out sets of roles). --tests NAME=file,NAME=file names any others, each
a column of the table. The table has one row for each model that is given: Prompt (the VLM as it is), SFT, BC latent
(stage 3), and RL over tokens and over latent actions (stage 4).

Ratio: for each test prompt --samples responses are drawn at --temperature. A response counts as the judge's score of
it over the judge's score of the reference, averaged over the dimensions. The table gives the mean over prompts and
samples, +- the standard deviation over samples. What the judge failed on is left out and counted ('judge_failed').

Diversity: G (G-1) / sum_{i != j} cosine(i, j) over --group responses to a prompt at temperature 1, averaged over
prompts. 1 = all the same. It depends on the embedding, so compare it within one --embedder only.

Codes: how often each code was inferred, by what the token was about (DATA/styles.json: {name: [words]}, if there is
such a file), on paired data, on text-only data, and in the latent policy's own responses.

Written to --out: results.json, table.md, diversity.json (the groups of responses, for any other embedding), and what
plots.py draws: curves.png, codes.png, examples.md.

Under torchrun the ranks share the drawing, a batch of --batch prompts at a time. Rank 0 does all the rest: it reads,
judges and writes. The results are those of one process.

    python evaluate.py --sft runs/sft --bc runs/stage3 --token runs/rl_token --latent runs/rl \\
        --codebook runs/stage2 --out runs/eval
    torchrun --nproc-per-node 4 evaluate.py --vlm Qwen/Qwen2.5-VL-3B-Instruct --data data --batch 8 \\
        --sft runs/3b/sft --latent runs/3b/rl_latent --out runs/3b/eval
"""

import json
import re
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import checkpoint
import common
import plots
from common import option
from data import DataError, Processor
from judge_http import Judging, patience, spent, tell
from ranks import gather
from rewards import (
    EmbeddingJudge,
    check_reference,
    foresee,
    judge_ratio,
    judgements,
    load_judge,
    ngram_embed,
    rollout_diversity,
)
from speaker import Speaker, texts
from vlm import VLM

# a_val and b_val: the validation sets, to choose settings on
TESTS = {
    "a": {"ID": "task_id", "OOD": "task_ood"},
    "b": {"LS1": "task_b_ls1", "LS2": "task_b_ls2"},
    "a_val": {"val": "task_val"},
    "b_val": {"val": "task_b_val"},
}


@dataclass
class Config(Judging):
    vlm: str = option("tiny/vlm", "folder or hub name of the vision-language model")
    data: str = option("runs/world", "folder with the task's tests and prompts, paired and text (.jsonl or .json)")
    task: str = option("a", "which task's tests, or its validation set", choices=tuple(TESTS))
    tests: str = option("", "any tests in place of the task's: NAME=file,NAME=file")
    prompts: str = option("", "RL prompts for the diversity; '': those of the task, or of the last of --tests")
    prompt: str = option("yes", "whether the VLM as it is has a row, too", choices=("yes", "no"))
    sft: str = option("", "finished run of stage 3 with --actions token")
    bc: str = option("", "finished run of stage 3")
    token: str = option("", "finished run of stage 4 with --actions token")
    latent: str = option("", "finished run of stage 4")
    codebook: str = option("", "finished run of stage 2, for the use of the codes (needs --bc)")
    embedder: str = option("ngrams", "for diversity: 'ngrams' (hashed words and word pairs) or a model folder")
    out: str = option("runs/eval", "folder for results.json, table.md, examples.md and the plots")
    limit: int = option(128, "prompts of each test", least=1)
    samples: int = option(3, "responses to each prompt", least=1)
    temperature: float = option(0.1, "of actions or tokens, for the judge's ratio")
    diversity_prompts: int = option(32, "RL prompts for the diversity", least=1)
    group: int = option(8, "responses to each of them", least=2)
    batch: int = option(32, "prompts at a time", least=1)
    max_prompt: int = option(400, "longest prompt, tokens", least=1)
    max_new: int = option(64, "longest response, tokens", least=1)
    max_pixels: int = option(280 * 420, "images are scaled down to this many pixels", least=1)
    seed: int = option(1000, "seed of sampling")


# ------------------------------------------------------------------------------------------------ data and models
def records_of(cfg, name, limit):
    """-> at most `limit` records of NAME.jsonl or NAME.json, whichever is there."""
    return common.open_records(file_of(cfg, name), cfg, limit)


def file_of(cfg, name):
    path = Path(cfg.data) / f"{name}.json"
    return path if path.is_file() else path.with_suffix(".jsonl")


TAKEN = {"prompts", "paired", "text", "run", "diversity"}  # what else stands beside tests in a row and among files


def tests_of(cfg):
    """-> {test: its file}: those of --tests, else the task's. DataError names a part of --tests that is none."""
    if not cfg.tests:
        return {test: file_of(cfg, name) for test, name in TESTS[cfg.task].items()}
    found = {}
    for part in cfg.tests.split(","):
        name, _, file = map(str.strip, part.partition("="))
        if not re.fullmatch(r"[\w. -]+", name) or not file or name in found or name in TAKEN:
            raise DataError(f"--tests: '{part}' must be NAME=file, each name once and none of {sorted(TAKEN)}")
        found[name] = Path(file)
    return found


def prompts_of(cfg):
    """-> the file of the prompts for the diversity."""
    if cfg.prompts or cfg.tests:
        return Path(cfg.prompts) if cfg.prompts else list(tests_of(cfg).values())[-1]
    return file_of(cfg, "task_b_prompts" if cfg.task.startswith("b") else "task_prompts")


def all_of(records):
    return [records[i] for i in range(len(records))]


def rows_wanted(cfg):
    """-> {row of the table: (what it acts with, its run, or None for the VLM as it is)}; each run is checked first."""
    rows = {"Prompt": ("token", None)} if cfg.prompt == "yes" else {}
    for name, actions, flag, stages in (
        ("SFT", "token", "sft", ["stage3_bc", "stage4_latent_rl"]),
        ("BC latent", "latent", "bc", ["stage3_bc", "stage4_latent_rl"]),
        ("RL token", "token", "token", ["stage4_latent_rl"]),
        ("RL latent", "latent", "latent", ["stage4_latent_rl"]),
    ):
        run = getattr(cfg, flag)
        if run:
            _, state = checkpoint.load(run, f"--{flag}", stages, cfg.vlm)
            if (trained := state["config"]["actions"]) != actions:
                raise DataError(f"--{flag} {run}: was trained with --actions {trained}, not {actions}")
            loss = state["config"].get("loss_type", "")
            rows[name.replace("RL", loss.upper())] = (actions, run)
    if cfg.codebook:
        checkpoint.load(cfg.codebook, "--codebook", ["stage2_codebook"], cfg.vlm)
    if not rows:
        raise DataError("nothing to evaluate; give --sft, --bc, --token or --latent, or --prompt yes")
    return rows


def load_model(cfg, actions, run, place):
    """-> (vlm, latent or None)"""
    if run is None:
        return VLM(cfg.vlm, place.device, place.dtype), None
    return common.load_agent(run, actions, cfg.vlm, place)[:2]


# ------------------------------------------------------------------------------------------------ scores
def score(judge, records, texts):
    """The judge's numbers for texts [record][sample]. DataError if the judge failed on all of them.

    -> {'ratio': mean over records and samples, 'std': over samples or None, 'dimensions': {name: [mean score of the
    responses, of the references]}, and 'judge_failed': how many responses, if any}"""
    samples = len(texts[0])
    entries = [judgements(judge, records, [t[s] for t in texts]) for s in range(samples)]
    judged = [e for row in entries for e in row if e is not None]
    failed = samples * len(records) - len(judged)
    if not judged:
        raise DataError(f"{records[0].get('where')}: the judge failed on all {failed} responses to this file")
    # masked where the judge failed: such a row is in no mean
    ratios_SN = np.ma.masked_invalid([[judge_ratio(e) for e in row] for row in entries])
    ratio_S = ratios_SN.mean(1)
    found = {
        "ratio": float(ratio_S.mean()),
        "std": float(ratio_S.std(ddof=1)) if ratio_S.count() > 1 else None,
        "dimensions": {d: dimension(entries, d) for d in judged[0]},
    }
    return found | ({"judge_failed": failed} if failed else {})


def dimension(entries, name):
    """-> [mean score of the responses, mean score of the references] in one dimension; entries [sample][record]."""
    nothing = (float("nan"), float("nan"))
    scores_SN2 = np.ma.masked_invalid([[nothing if e is None else e[name] for e in row] for row in entries])
    # a reference's scores are averaged over samples first: where the judge repeats itself, it counts once
    return [float(scores_SN2[..., 0].mean()), float(scores_SN2[..., 1].mean(0).mean())]


def training(run):
    """Reward at the start and at the end, and median seconds of a rollout and an update, from a stage 4's metrics.

    {} without any: a best checkpoint of step 0, or a copy of a checkpoint that has no log beside it."""
    rows = [r for r in common.read_metrics(run) if r["step"]]  # step 0 is an evaluation alone
    rewards = [r["reward"] for r in rows if "reward" in r]  # not in steps in which the judge failed throughout
    if not rewards:
        return {}
    k = max(1, min(10, len(rewards) // 4))
    return {
        "reward_start": float(np.mean(rewards[:k])),
        "reward_end": float(np.mean(rewards[-k:])),
        "s_rollout": float(np.median([r["s_rollout"] for r in rows])),
        "s_update": float(np.median([r["s_update"] for r in rows])),
    }


def table(rows, tests):
    """{row: numbers} -> a Markdown table."""
    head = ["row", *tests, "diversity", "reward, start", "reward, end", "rollout, s", "update, s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        cells = [name]
        for test in tests:
            std = row[test]["std"]
            cells.append(f"{row[test]['ratio']:.3f}" + ("" if std is None else f" ± {std:.3f}"))
        cells.append(f"{row['diversity']:.3f}")
        for key in ("reward_start", "reward_end", "s_rollout", "s_update"):
            cells.append(f"{row[key]:.3f}" if key in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ use of the codes
def read_styles(data):
    """-> {what words are about: the words}, from DATA/styles.json; {} if there is no such file. 'all else' is last."""
    path = Path(data) / "styles.json"
    return (json.loads(path.read_text()) if path.is_file() else {}) | {plots.ALL_ELSE: []}


def token_styles(tokenizer, styles):
    """-> (V,) int64: of every token, the place in `styles` of the first that has its text as a word; else the last."""
    words = [{w for phrase in phrases for w in re.findall("[a-z]+", phrase.lower())} for phrases in styles.values()]
    texts = [tokenizer.decode([i]).strip().lower() for i in range(len(tokenizer))]
    return torch.tensor([next((k for k, ws in enumerate(words) if t in ws), len(words) - 1) for t in texts])


class CodeCounter:
    """Counts how often each code stood where a token of each style was said."""

    def __init__(self, tokenizer, styles, codes):
        self.names, self.codes = list(styles), codes
        self.styles_V = token_styles(tokenizer, styles)

    def __call__(self, a_M, ids_M):
        """Codes and tokens, (M,) each -> counts (styles, codes)."""
        at_M = self.styles_V[ids_M.cpu()] * self.codes + a_M.cpu()
        return torch.bincount(at_M, minlength=len(self.names) * self.codes).view(-1, self.codes)

    @torch.no_grad()
    def inferred(self, vlm, latent, processor, records, place, size=16):
        """Counts of the inferred code of every response token of the records."""
        counts = 0
        for i in range(0, len(records), size):
            batch = processor.collate([processor.example(r) for r in records[i : i + size]]).to(place.device)
            explained = batch.response_BT[:, 1:]
            with place.autocast():
                a_BT = latent.infer_codes(latent.context(vlm(batch), batch.paired_B))
            counts = counts + self(a_BT[explained], batch.ids_BT[:, 1:][explained])
        return counts

    def by_style(self, counts):
        return dict(zip(self.names, counts.tolist()))


CODEBOOK = ("projector", "inverse", "quantiser")  # the parts that infer codes


def code_usage(cfg, processor, place, files, said):
    """-> ({where: {style: counts of each code}}, what stage 2 measured on held-out data).

    said: the responses of the last latent policy to the last test."""
    tensors, state = checkpoint.load(cfg.codebook, "--codebook", ["stage2_codebook"], cfg.vlm)
    vlm = VLM(cfg.vlm, place.device, place.dtype)
    latent = common.build_latent(vlm, state["arch"], tensors, cfg.codebook, CODEBOOK).to(place.device)
    count = CodeCounter(processor.tokenizer, read_styles(cfg.data), latent.quantiser.codes)
    usage = {}
    for name, file in (("paired data", "paired"), ("text-only data", "text")):
        usage[name] = count.by_style(count.inferred(vlm, latent, processor, files[file], place))
    a_M = torch.tensor([code for samples in said for response in samples for code in response.codes])
    ids_M = torch.tensor([token for samples in said for response in samples for token in response.tokens])
    policy = "policy after RL" if cfg.latent else "cloned policy"
    usage[f"{policy}, {list(tests_of(cfg))[-1]} test"] = count.by_style(count(a_M, ids_M))
    return usage, state["val"]


# ------------------------------------------------------------------------------------------------ all of it
def draw(cfg, speaker, model, files, judge):
    """All responses of one model -> {test, or 'prompts' for the diversity: [record][sample] Response}

    judge: of rank 0, else None. One that works on its own judges a test while the next one is drawn."""
    drawn = {}
    for salt, test in enumerate(tests_of(cfg)):
        drawn[test] = speaker(model, files[test], cfg.samples, cfg.temperature, salt)
        for sample in zip(*texts(drawn[test])):
            foresee(judge, files[test], sample)
    return drawn | {"prompts": speaker(model, files["prompts"], cfg.group, 1.0, 2)}


def numbers(cfg, judge, embed, files, drawn, run):
    """One row of the table, from what was drawn."""
    row = {"run": run or cfg.vlm}
    for test in tests_of(cfg):
        lengths = [len(response.tokens) for samples in drawn[test] for response in samples]
        row[test] = score(judge, files[test], texts(drawn[test])) | {"length": float(np.mean(lengths))}
    row["diversity"] = float(np.mean([rollout_diversity(embed(group)) for group in texts(drawn["prompts"])]))
    if run in (cfg.token, cfg.latent):
        row |= training(run)
    return row


def load_data(cfg, processor, judge):
    """-> {test: records}, under 'prompts' those of the diversity, under 'paired' and 'text' those of --codebook.

    A bad row, and a reference that the judge cannot score, is named before the work begins."""
    files = {test: common.open_records(path, cfg, cfg.limit) for test, path in tests_of(cfg).items()}
    also = {name: partial(check_reference, judge) for name in files}
    files["prompts"] = common.open_records(prompts_of(cfg), cfg, cfg.diversity_prompts)
    found = {name: all_of(common.usable(f, processor, cfg, True, also.get(name))) for name, f in files.items()}
    for name in ("paired", "text") if cfg.codebook else ():
        found[name] = all_of(common.usable(records_of(cfg, name, 200), processor, cfg))
    return found


def write(cfg, results, groups):
    """Files of --out but examples.md. groups: {row: responses for the diversity}"""
    out, rows = Path(cfg.out), results["rows"]
    print(table(rows, tests_of(cfg)))
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "diversity.json").write_text(json.dumps(groups, indent=1))
    (out / "table.md").write_text(table(rows, tests_of(cfg)) + "\n")
    curves = {name: row["run"] for name, row in rows.items() if "reward_end" in row}
    if curves:
        plots.draw_curves(curves, out / "curves.png")
    if "codes" in results:
        plots.draw_usage(results["codes"], "text-only data", out / "codes.png")


def write_examples(cfg, processor, records, answers, name, said):
    """examples.md of the first six records; name, said: the last latent row and its responses, if there is one."""
    shown, latent = records[:6], None
    if said:
        firsts = [samples[0] for samples in said[: len(shown)]]
        latent = name, [plots.spoken(processor.tokenizer, r.tokens, r.codes, processor.eos_id) for r in firsts]
    plots.write_examples(Path(cfg.out), list(tests_of(cfg))[-1], shown, answers, latent)


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    rows = cfg.limit * cfg.samples * len(tests_of(cfg))
    place = common.setup(cfg, "gloo", patience(cfg, rows))  # the ranks exchange responses alone
    if cfg.codebook and not cfg.bc:
        raise DataError("--codebook: needs --bc as well, whose policy and codes are plotted")
    wanted, rank0, files, judge = rows_wanted(cfg), place.rank == 0, None, None
    if rank0:
        checkpoint.open_folder(cfg.out)
    processor = Processor(cfg.vlm, cfg.max_prompt, cfg.max_pixels, max_decode=cfg.max_decode)
    if rank0:
        judge = load_judge(cfg.judge, cfg)
        embed = ngram_embed if cfg.embedder == "ngrams" else EmbeddingJudge(cfg.embedder).embed
        files = load_data(cfg, processor, judge)
    files = gather(files)[0]
    speaker, last = Speaker(cfg, processor, place), list(tests_of(cfg))[-1]

    rows, answers, groups, latent_name, latent_said = {}, {}, {}, None, []
    for name, (actions, run) in wanted.items():
        began = time.time()
        drawn = draw(cfg, speaker, load_model(cfg, actions, run, place), files, judge)
        if not rank0:
            continue
        rows[name] = row = numbers(cfg, judge, embed, files, drawn, run)
        answers[name], groups[name] = [samples[0].text for samples in drawn[last]], texts(drawn["prompts"])
        if actions == "latent":
            latent_name, latent_said = name, drawn[last]
        ratios = ", ".join(f"{test} {row[test]['ratio']:.3f}" for test in tests_of(cfg))
        common.say(f"{name}: {ratios}, diversity {row['diversity']:.3f} ({time.time() - began:.0f} s)")
    if not rank0:
        return

    tell(spent(judge))
    results = {"rows": rows, "config": asdict(cfg), "torch": torch.__version__, "device": str(place.device)}
    if cfg.codebook:
        results["codes"], results["codebook_val"] = code_usage(cfg, processor, place, files, latent_said)
    write(cfg, results, groups)
    write_examples(cfg, processor, files[last], answers, latent_name, latent_said)


if __name__ == "__main__":
    common.run(main)
