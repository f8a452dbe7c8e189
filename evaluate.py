"""Evaluation: judge ratio on a task's two tests, rollout diversity, codebook usage; table, plots, examples.

Task a is role play (tests: ID, and OOD with held-out roles), task b situated personalisation (LS1, and LS2 with held-out role sets).

One row for each model that is given: Prompt (the VLM as it is), SFT, BC latent (stage 3), and the two sides of RL. For each test
prompt --samples responses are drawn at --temperature; a sample's number is the judge's score of the response over that of the
reference, averaged over dimensions; the table gives the mean over prompts, and +- the standard deviation over the samples.
Diversity: G (G-1) / sum_{i != j} cosine(i, j) over --group responses at temperature 1, averaged over prompts; 1 = all the same.

    python evaluate.py --sft runs/sft --bc runs/stage3 --token runs/rl_token --latent runs/rl --codebook runs/stage2 --out runs/eval
"""

import json
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch

import common
from data import DataError, Processor, Records
from model import VLM, rollout, uniforms
from rewards import judge_ratio, load_judge, ngram_embed, reference, rollout_diversity
from stage4_latent_rl import decode, start_policy
from tiny import world as W

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclass
class Config:
    vlm: str = "tiny/vlm"                # folder or hub name of the vision-language model
    data: str = "runs/world"             # folder with the task's tests and prompts, paired.jsonl, text.jsonl
    task: str = "a"                      # a | b | a_val | b_val: which task's tests, or its validation set
    prompt: str = "yes"                  # yes | no: whether the VLM as it is has a row, too
    sft: str = ""                        # finished run of stage 3 with --actions token
    bc: str = ""                         # finished run of stage 3
    token: str = ""                      # finished run of stage 4 with --actions token
    latent: str = ""                     # finished run of stage 4
    codebook: str = ""                   # finished run of stage 2, for the plot of code usage (needs --bc)
    judge: str = "rules"                 # 'rules' (the tiny world's) or the folder of a sentence-embedding model
    embedder: str = "ngrams"             # embedding for diversity: 'ngrams' (hashed words and word pairs) or a model folder
    out: str = "runs/eval"               # folder for results.json, table.md, examples.md and the plots
    limit: int = 128                     # prompts of each test
    samples: int = 3                     # responses to each prompt
    temperature: float = 0.1             # of actions or tokens, for the judge ratio
    diversity_prompts: int = 32          # RL prompts for the diversity
    group: int = 8                       # responses to each of them
    batch: int = 32                      # prompts at a time
    max_prompt: int = 400                # longest prompt, tokens
    max_new: int = 64                    # longest response, tokens
    max_pixels: int = 117600             # images are scaled down to this many pixels
    seed: int = 1000                     # seed of sampling


TESTS = {"a": {"ID": "task_id", "OOD": "task_ood"}, "b": {"LS1": "task_b_ls1", "LS2": "task_b_ls2"},
         "a_val": {"val": "task_val"}, "b_val": {"val": "task_b_val"}}  # the last two to choose settings on


def respond(vlm, latent, processor, records, cfg, device, group, temperature, salt):
    """-> (texts [record][sample], Rollouts) of every record."""
    never, texts, rolls = torch.tensor(processor.never_sampled, device=device), [], []
    for i in range(0, len(records), cfg.batch):
        part = records[i:i + cfg.batch]
        prompt = processor.collate([processor.example(r, prompt_only=True) for r in part], left=True).to(device)
        u = uniforms(cfg.seed, [(salt, i + j, g) for j in range(len(part)) for g in range(group)], cfg.max_new).to(device)
        with common.autocast(device):
            roll = rollout(vlm, latent, prompt, u, group=group, temperature=temperature, never=never, eos=processor.eos_id,
                           pad=processor.pad_id, actions="token" if latent is None else "latent")
        flat = decode(processor.tokenizer, roll, processor.eos_id)
        texts += [flat[k:k + group] for k in range(0, len(flat), group)]
        rolls.append(roll)
    return texts, rolls


def score(judge, records, texts):
    """-> {'ratio', 'std' over samples, 'dimensions': mean score of the model and of the reference for each}."""
    samples = len(texts[0])
    references = judge(records, [reference(r) for r in records])
    scores = np.stack([judge(records, [t[s] for t in texts]) for s in range(samples)])  # (S, N, dimensions)
    ratios = np.stack([judge_ratio(s, references) for s in scores]).mean(1)
    return {"ratio": float(ratios.mean()), "std": float(ratios.std(ddof=1)) if samples > 1 else None,
            "dimensions": {d: [float(scores[..., k].mean()), float(references[:, k].mean())] for k, d in enumerate(judge.dimensions_of(records))}}


def training(run):
    """Reward at the start and the end, and median seconds, from a stage 4's metrics."""
    rows = common.read_metrics(run)
    k = max(1, min(10, len(rows) // 4))
    return {"reward_start": float(np.mean([r["reward"] for r in rows[:k]])), "reward_end": float(np.mean([r["reward"] for r in rows[-k:]])),
            "s_rollout": float(np.median([r["s_rollout"] for r in rows])), "s_update": float(np.median([r["s_update"] for r in rows]))}


def table(rows, tests):
    lines = [f"| row | {' | '.join(tests)} | diversity | reward, start | reward, end | rollout, s | update, s |", "|---|---|---|---|---|---|---|---|"]
    for name, r in rows.items():
        cells = [f"{r[t]['ratio']:.3f}" + (f" ± {r[t]['std']:.3f}" if r[t]["std"] is not None else "") for t in tests]
        cells += [f"{r['diversity']:.3f}"]
        cells += [f"{r[k]:.3f}" if k in r else "" for k in ("reward_start", "reward_end", "s_rollout", "s_update")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def smooth(y, parts):
    """Mean of the last len(y) / parts values, at every step."""
    k = max(1, len(y) // parts)
    return np.convolve(np.pad(y, (k - 1, 0), mode="edge"), np.ones(k) / k, "valid")


def plot_curves(runs, path):
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for name, run in runs.items():
        rows = common.read_metrics(run)
        config = json.loads((common.latest(run) / "state.json").read_text())["config"]
        x = np.array([r["step"] for r in rows]) * config["batch"] * config["group"]
        for axis, key in zip(axes, ("reward", "entropy", "kl")):
            y = np.array([r[key] for r in rows])
            line, = axis.plot(x, smooth(y, 20), label=name)
            axis.plot(x, y, color=line.get_color(), alpha=0.2, linewidth=0.8)
            axis.set(xlabel="rollouts", title={"reward": "reward (response / reference)", "entropy": "entropy, nats",
                                               "kl": "KL to the start (k3), nats"}[key])
    axes[0].legend()
    fig.tight_layout(), fig.savefig(path, dpi=110), plt.close(fig)


STYLES = {"favourite words": W.WORDS, "sayings": [x.removeprefix("by the ") for x in W.SAYINGS], "greetings": W.GREETINGS,
          "farewells": [x.removesuffix(" to you") for x in W.FAREWELLS], "what is seen": W.COLOURS | dict.fromkeys((*W.SHAPES, *W.SIZES, *W.NUMBERS)),
          "all else": ()}


def token_styles(tokenizer):
    """(V,) index into STYLES of every token: the first whose words it is part of."""
    words = [{w for phrase in phrases for w in re.findall("[a-z]+", phrase.lower())} for phrases in STYLES.values()]
    texts = [tokenizer.decode([i]).strip().lower() for i in range(len(tokenizer))]
    return torch.tensor([next((k for k, ws in enumerate(words) if t in ws), len(words) - 1) for t in texts])


def count_codes(a_M, ids_M, styles_V, codes):
    """(styles, codes) how often each code stood where a token of each style was said."""
    return torch.bincount(styles_V[ids_M.cpu()] * codes + a_M.cpu(), minlength=len(STYLES) * codes).view(-1, codes).numpy()


@torch.no_grad()
def code_usage(vlm, latent, processor, records, device, styles_V, size=16):
    """count_codes of the inferred action of every response token."""
    counts = 0
    for i in range(0, len(records), size):
        batch = processor.collate([processor.example(r) for r in records[i:i + size]]).to(device)
        explained = batch.response_BT[:, 1:]
        with common.autocast(device):
            a = latent.infer_actions(latent.context(vlm(batch), batch.paired_B)).argmax(-1)[explained]
        counts = counts + count_codes(a, batch.ids_BT[:, 1:][explained], styles_V, latent.codebook.num_embeddings)
    return counts


def plot_usage(usage, path):
    fig, axes = plt.subplots(len(usage), 1, figsize=(10, 1.9 * len(usage)), sharex=True)
    order = np.argsort(-usage["text-only data"].sum(0))
    for axis, (name, counts) in zip(axes, usage.items()):
        share, p = counts / max(counts.sum(), 1), counts.sum(0) / max(counts.sum(), 1)
        below = np.cumsum(share, 0) - share
        for k, style in reversed(list(enumerate(STYLES))):
            axis.bar(np.arange(len(p)), share[k, order], 0.9, below[k, order], label=style, color=f"C{k}" if k < len(STYLES) - 1 else "lightgrey")
        perplexity = np.exp(-(p * np.log(p + 1e-12)).sum())
        axis.set_title(f"{name}: {int((p > 0).sum())} of {len(p)} codes used, perplexity {perplexity:.1f}", fontsize=9)
        axis.set_ylabel("share")
    axes[0].legend(fontsize=7, ncols=3)
    axes[0].set_xlim(-1, max(np.flatnonzero(c.sum(0)[order]).max(initial=0) for c in usage.values()) + 1)
    axes[-1].set_xlabel("code, ordered by use in the text-only data; colour: what the code stood for")
    fig.tight_layout(), fig.savefig(path, dpi=110), plt.close(fig)


def examples(out, records, answers, rolls, name):
    """examples.md: each dialogue's image, what is in it, what each model says, and the actions that the latent policy took."""
    lines = ["# Example dialogues (held-out roles; first sample of each model)", ""]
    for n, record in enumerate(records):
        for path in record["images"]:
            shutil.copy(path, out / f"example-{n}{Path(path).suffix}")
            lines += [f"![image](example-{n}{Path(path).suffix})", ""]
        if "facts" in record:
            seen = "; ".join(f"{t['size']} {t['colour']} {t['shape']} {t['place']}" for t in record["facts"]["scene"])
            lines += [f"In the image: {seen}.", ""]
        lines += [f"- **{m['role']}**: {m['content']}" for m in record["messages"][:-1]]
        lines += [f"- *reference*: {reference(record)}"]
        lines += [f"- *{row}*: {texts[n][0]}" for row, texts in answers.items()]
        if rolls:
            k = n * rolls[0].group
            taken = rolls[0].actions_NT[k][rolls[0].mask_NT[k]].tolist()
            lines += [f"- actions of {name}: " + " ".join(map(str, taken))]
        lines.append("")
    (out / "examples.md").write_text("\n".join(lines))


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    device, _, _ = common.setup(cfg.seed)
    out, data = Path(cfg.out), Path(cfg.data)
    judge, embed = load_judge(cfg.judge), ngram_embed if cfg.embedder == "ngrams" else load_judge(cfg.embedder).embed
    processor = Processor(cfg.vlm, cfg.max_prompt, cfg.max_pixels)
    tests = TESTS[cfg.task]
    files = {k: Records(data / f"{f}.jsonl", limit=cfg.limit) for k, f in tests.items()}
    files["prompts"] = Records(data / f"task{'_b' if cfg.task[0] == 'b' else ''}_prompts.jsonl", limit=cfg.diversity_prompts)
    for f in files.values():
        common.check(processor, f)
    files = {k: [f[i] for i in range(len(f))] for k, f in files.items()}
    wanted = {"Prompt": ("token", None if cfg.prompt == "yes" else ""), "SFT": ("token", cfg.sft), "BC latent": ("latent", cfg.bc),
              "RL token": ("token", cfg.token), "RL latent": ("latent", cfg.latent)}
    rows, answers, drawn, last_rolls = {}, {}, {}, []
    for name, (actions, run) in wanted.items():
        if run == "":
            continue
        began = time.time()
        if run is None:
            vlm, latent = VLM(cfg.vlm, device, common.vlm_dtype(device)), None
        else:
            vlm, latent, _ = start_policy(SimpleNamespace(init=run, actions=actions, vlm=cfg.vlm), device)
            if name.startswith("RL"):
                name = name.replace("RL", common.load(run, "--" + actions, ["stage4_latent_rl"], cfg.vlm)[1]["config"]["loss_type"].upper())
        row = {"run": run or cfg.vlm}
        for salt, test in enumerate(tests):
            texts, rolls = respond(vlm, latent, processor, files[test], cfg, device, cfg.samples, cfg.temperature, salt)
            row[test] = score(judge, files[test], texts) | {"length": float(np.mean([r.mask_NT.sum(1).float().mean().item() for r in rolls]))}
        answers[name], last_rolls = texts, rolls if latent is not None else last_rolls
        texts, _ = respond(vlm, latent, processor, files["prompts"], cfg, device, cfg.group, 1.0, 2)
        row["diversity"], drawn[name] = float(np.mean([rollout_diversity(embed(t)) for t in texts])), texts
        if run in (cfg.token, cfg.latent):
            row |= training(run)
        rows[name] = row
        common.say(f"{name}: " + ", ".join(f"{t} {row[t]['ratio']:.3f}" for t in tests) + f", diversity {row['diversity']:.3f} ({time.time() - began:.0f} s)")
    out.mkdir(parents=True, exist_ok=True)
    results = {"rows": rows, "config": asdict(cfg), "torch": torch.__version__, "device": str(device)}
    curves = {n: r["run"] for n, r in rows.items() if "reward_end" in r}
    if curves:
        plot_curves(curves, out / "curves.png")
    if cfg.codebook:
        if not cfg.bc:
            raise DataError("--codebook: needs --bc as well, whose policy and codes are plotted")
        tensors, state = common.load(cfg.codebook, "--codebook", ["stage2_codebook"], cfg.vlm)
        vlm = VLM(cfg.vlm, device, common.vlm_dtype(device))
        latent = common.build_latent(vlm, state["arch"], tensors).to(device)
        usage, styles_V = {}, token_styles(processor.tokenizer)
        for name, file in (("paired data", "paired.jsonl"), ("text-only data", "text.jsonl")):
            records = Records(data / file, limit=200)
            usage[name] = code_usage(vlm, latent, processor, [records[i] for i in range(len(records))], device, styles_V)
        if last_rolls:
            taken, said = (torch.cat([getattr(r, k)[r.mask_NT] for r in last_rolls]) for k in ("actions_NT", "tokens_NT"))
            usage[f"policy after RL, {list(tests)[-1]} test"] = count_codes(taken, said, styles_V, state["arch"]["codes"])
        plot_usage(usage, out / "codes.png")
        results["codes"] = {k: dict(zip(STYLES, v.tolist())) for k, v in usage.items()}
        results["codebook_val"] = state["val"]
    examples(out, files[list(tests)[-1]][:6], answers, last_rolls, list(rows)[-1])
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "diversity.json").write_text(json.dumps(drawn, indent=1))  # the groups of responses, for any other embedding
    (out / "table.md").write_text(table(rows, tests) + "\n")
    print(table(rows, tests))


if __name__ == "__main__":
    common.run(main)
