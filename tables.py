"""The paper's tables in miniature, on the tiny world: every run, two side by side, then mean and standard deviation over seeds.

    table 1   Prompt, SFT, {GRPO, Dr.GRPO, DAPO, BNPO} x {token, latent} on tasks A (ID, OOD) and B (LS1, LS2)
    table 2   latent GRPO: full, without the cycle loss, without the projector, without text-only data
    table 3   rollout diversity, token and latent        table 4   seconds of a rollout, an update and a step, latent / token
    table 5   size of the codebook; amount of text-only data (task A)
    table 6   the learning rate of RL
    figure    reward against rollouts

Beside them: the judge's dimensions, and what the RL runs logged. A run is a folder under --out with its log; a finished one is not run again, an
unfinished one goes on where it was. The tables are written after each seed.

    python tables.py                      # tables 1 to 4
    python tables.py --tables 123456      # all of them
"""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np

import common
from data import DataError
from evaluate import TESTS, smooth
from rewards import load_judge, ngram_embed, rollout_diversity

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ALGORITHMS = {"grpo": "GRPO", "dr_grpo": "Dr.GRPO", "dapo": "DAPO", "bnpo": "BNPO"}
RATE = "1e-3"  # of both sides, chosen on the validation sets with seed 7
LOWER_RATES = ("1e-4", "3e-4")
ABLATIONS = {"without the cycle loss": ["--without", "cycle"], "without the projector": ["--without", "projector"],
             "without text-only data": ["--without", "text"]}
SIZES = {f"{k} codes": ["--codes", str(k)] for k in (16, 32, 64, 256)}
AMOUNTS = {"1/4 of the text": ["--text-rows", "900"], "1/2 of the text": ["--text-rows", "1800"]}  # of 3,600 that a run reads


@dataclass
class Config:
    out: str = "runs/tables"             # folder of the runs
    results: str = "results"             # folder for the tables (Markdown), results.json and the figure
    data: str = "runs/world"             # the tiny world
    vlm: str = "tiny/vlm"                # folder of the vision-language model
    tables: str = "1234"                 # which tables' runs to make
    seeds: int = 3                       # seeds 1, 2, ... of training
    steps: int = 100                     # RL steps
    parallel: int = 2                    # runs side by side, one thread each
    embedder: str = ""                   # a sentence-embedding folder: table 3 with it, too
    short: str = "no"                    # yes | no: two steps of everything, to see that it runs


# ----------------------------------------------------------------------------------------------------------- the runs
def tasks_of(cfg):
    """-> {task: (demonstrations, prompts)}"""
    return {t: (f"{cfg.data}/task{b}_demos.jsonl", f"{cfg.data}/task{b}_prompts.jsonl") for t, b in (("a", ""), ("b", "_b"))}


def folder(variant):
    return variant.replace(" ", "_").replace("/", "-")


def plan(cfg, seeds=None):
    """-> {folder: (command, folders it needs)} in the order in which they are wanted; `seeds` None: all of them."""
    out, jobs = Path(cfg.out), {}
    few = {} if cfg.short == "no" else {
        "stage1_projector": ["--steps", "2", "--batch", "2"], "stage2_codebook": ["--steps-a", "1", "--steps-b", "1", "--batch", "2", "--val", "2"],
        "stage3_bc": ["--batch", "2", "--batch-adapt", "2"], "stage4_latent_rl": ["--batch", "2", "--group", "2", "--max-new", "6"],
        "evaluate": ["--limit", "2", "--diversity-prompts", "2", "--group", "2", "--max-new", "6"]}

    def add(name, script, *flags, needs=()):
        jobs[str(out / name)] = ([f"{script}.py", "--vlm", cfg.vlm, "--out", str(out / name), *map(str, flags), *few.get(script, [])], [str(out / n) for n in needs])

    pretrain = ["--paired", f"{cfg.data}/paired.jsonl"]
    text = ["--text", f"{cfg.data}/text.jsonl"]
    clone_steps, adapt_steps = ((300, 75) if cfg.short == "no" else (2, 2))
    for s in range(1, cfg.seeds + 1) if seeds is None else seeds:
        seed = ["--seed", s]
        add(f"{s}/stage1", "stage1_projector", *pretrain, *seed)
        variants = {"full": []} | (ABLATIONS if set("25") & set(cfg.tables) else {}) | (SIZES | AMOUNTS if "5" in cfg.tables else {})
        for variant, flags in variants.items():
            v = folder(variant)
            add(f"{s}/{v}/stage2", "stage2_codebook", *pretrain, *text, *seed, "--projector", out / f"{s}/stage1", *flags, needs=[f"{s}/stage1"])
            add(f"{s}/{v}/clone", "stage3_bc", *pretrain, *text, *seed, "--init", out / f"{s}/{v}/stage2", "--steps-clone", clone_steps, "--steps-adapt", 0,
                "--demos", tasks_of(cfg)["a"][0], needs=[f"{s}/{v}/stage2"])
        for task, (demos, prompts) in tasks_of(cfg).items():
            add(f"{s}/sft_{task}", "stage3_bc", "--actions", "token", "--demos", demos, "--steps-adapt", adapt_steps, *seed)
            add(f"{s}/start_{task}", "evaluate", "--task", task, "--data", cfg.data, "--prompt", "yes" if s == 1 else "no",
                "--sft", out / f"{s}/sft_{task}", "--bc", out / f"{s}/full/adapt_{task}", "--seed", 1000 + s, needs=[f"{s}/sft_{task}", f"{s}/full/adapt_{task}"])
            for variant in variants:
                v = folder(variant)
                if task == "b" and variant in SIZES | AMOUNTS:
                    continue
                add(f"{s}/{v}/adapt_{task}", "stage3_bc", "--demos", demos, "--init", out / f"{s}/{v}/clone", "--steps-adapt", adapt_steps, *seed, needs=[f"{s}/{v}/clone"])
                runs = [(algorithm, RATE, "") for algorithm in (ALGORITHMS if variant == "full" else ["grpo"])]
                runs += [("grpo", lr, f"_{lr}") for lr in LOWER_RATES if "6" in cfg.tables and variant == "full"]
                for algorithm, lr, suffix in runs:
                    for side in ("token", "latent") if variant == "full" else ["latent"]:
                        init = f"{s}/{v}/adapt_{task}" if side == "latent" else f"{s}/sft_{task}"
                        name = f"{s}/{v if side == 'latent' else 'token'}/{algorithm}_{task}{suffix}"
                        add(name, "stage4_latent_rl", "--actions", side, "--init", out / init, "--prompts", prompts, "--loss-type", algorithm,
                            "--lr", lr, "--steps", cfg.steps, *seed, needs=[init])
                        add(f"{name}_eval", "evaluate", "--task", task, "--data", cfg.data, "--prompt", "no", f"--{side}", out / name, "--seed", 1000 + s, needs=[name])
    return jobs


def finished(run):
    if (Path(run) / "results.json").exists():
        return True
    state = common.latest(run)
    return state is not None and json.loads((state / "state.json").read_text())["finished"]


def run_all(jobs, parallel, after=lambda done: None):
    """Run what is not finished, as soon as what it needs is; `after` is told what is done, at the start and then each time that a run ends.
    Raises DataError at the first failure, which leaves all others' work in place."""
    left = {n: job for n, job in jobs.items() if not finished(n)}
    done, total, began, lock = {n for n in jobs if n not in left}, len(left), time.time(), threading.Lock()

    def run(name):
        Path(name).mkdir(parents=True, exist_ok=True)
        start = time.time()
        with open(Path(name) / "log.txt", "a") as log:
            code = subprocess.run([sys.executable, *left[name][0]], stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        with open(Path(name) / "seconds.txt", "a") as f:  # a line for each time it was started
            f.write(f"{time.time() - start:.1f}\n")
        with lock:
            common.say(f"{(time.time() - began) / 60:6.1f} min  {len(done) + len(left) - total + 1:4d}  {name}")
        if code:
            raise DataError(f"{name}: stopped with exit status {code}; see {name}/log.txt, then run tables.py again: it goes on from here")
        return name

    with ThreadPoolExecutor(parallel) as pool:
        running, waiting = set(), list(left)
        after(done)
        while waiting or running:
            ready = [n for n in waiting if all(d in done for d in left[n][1])][:parallel - len(running)]
            waiting = [n for n in waiting if n not in ready]
            running |= {pool.submit(run, n) for n in ready}
            finished_now, running = wait(running, return_when=FIRST_COMPLETED)
            done |= {f.result() for f in finished_now}
            after(done)


# --------------------------------------------------------------------------------------------------------- the tables
class Collected:
    """What the runs have left, by seed."""

    def __init__(self, cfg, seeds=None):
        self.cfg, self.out = cfg, Path(cfg.out)
        self.seeds = seeds or range(1, cfg.seeds + 1)
        self.embed = load_judge(cfg.embedder).embed if cfg.embedder else None

    def read(self, name, file="results.json"):
        return json.loads((self.out / name / file).read_text())

    def row(self, name, row=None):
        """The one row of an evaluation, or the named one."""
        rows = self.read(name)["rows"]
        return rows[row] if row else next(iter(rows.values()))

    def log(self, name, s):
        """What stage 4 logged, a dict for each step."""
        return common.read_metrics(self.out / name.format(s=s))

    def tests(self, task, name, row=None, seeds=None):
        """-> {test: [ratio of each seed]}; `name` has a {s}."""
        return {t: [self.row(name.format(s=s), row)[t]["ratio"] for s in seeds or self.seeds] for t in TESTS[task]}

    def diversity(self, name, embed, row=None):
        """Mean over prompts, for each seed, of the one row of an evaluation, or of the named one."""
        drawn = [self.read(name.format(s=s), "diversity.json") for s in self.seeds]
        return [float(np.mean([rollout_diversity(embed(g)) for g in (d[row] if row else next(iter(d.values())))])) for d in drawn]


def side(which, algorithm, task):
    """The folder of an RL run, with {s} for the seed."""
    return "{s}/" + ("full" if which == "latent" else "token") + f"/{algorithm}_{task}"


def spread(values, digits=3):
    """mean ± standard deviation over seeds."""
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def markdown(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head)] + ["| " + " | ".join(r) + " |" for r in rows]) + "\n"


def test_rows(rows, column=None, values=None, digits=3):
    """{name: {test: [values by seed]}} -> Markdown, with the average of the tests and, if named, one more column, {name: [values by seed]}."""
    tests = list(next(iter(rows.values())))
    more = {n: [spread(values[n], digits)] if column else [] for n in rows}
    return markdown(["row", *tests, "average", *([column] if column else [])],
                    [[n, *(spread(v[t]) for t in tests), spread(np.mean([v[t] for t in tests], 0)), *more[n]] for n, v in rows.items()])


def table1(c):
    rows = {"Prompt": c.tests("a", "1/start_a", "Prompt", [1]) | c.tests("b", "1/start_b", "Prompt", [1])}
    for name in ("SFT", "BC latent"):
        rows[name] = c.tests("a", "{s}/start_a", name) | c.tests("b", "{s}/start_b", name)
    for algorithm, label in ALGORITHMS.items():
        for which in ("token", "latent"):
            rows[f"{label} {which}"] = {t: v for task in "ab" for t, v in c.tests(task, side(which, algorithm, task) + "_eval").items()}
    return rows, test_rows(rows)


def with_codebook(c, variants, tasks):
    """{label: folder} -> rows of GRPO's tests, and how well the codebook explains held-out text (stage 2; nats a token)."""
    rows, nats = {}, {}
    for label, v in variants.items():
        rows[label] = {t: x for task in tasks for t, x in c.tests(task, "{s}/" + f"{v}/grpo_{task}_eval").items()}
        nats[label] = [json.loads((common.latest(c.out / f"{s}/{v}/stage2") / "state.json").read_text())["val"]["text"]["val_inferred"] for s in c.seeds]
    return {n: v | {"text, nats": nats[n]} for n, v in rows.items()}, test_rows(rows, "held-out text, nats", nats)


def table2(c):
    return with_codebook(c, {v: folder(v) for v in ("full", *ABLATIONS)}, "ab")


def table3(c):
    embeddings = {"words and word pairs": ngram_embed} | ({"sentence-embedding model": c.embed} if c.embed else {})
    rows = {}
    for e, f in embeddings.items():
        for task in "ab":
            rows[f"before RL, task {task.upper()}, {e}"] = {w: c.diversity("{s}/start_" + task, f, n) for w, n in (("token", "SFT"), ("latent", "BC latent"))}
            for algorithm, label in ALGORITHMS.items():
                rows[f"{label}, task {task.upper()}, {e}"] = {w: c.diversity(side(w, algorithm, task) + "_eval", f) for w in ("token", "latent")}
    return rows, markdown(["8 rollouts of a prompt, by embedding", "token", "latent", "latent / token"],
                          [[n, spread(v["token"]), spread(v["latent"]), spread(np.divide(v["latent"], v["token"]), 2)] for n, v in rows.items()])


def table4(c):
    rows = {}
    for task in "ab":
        for algorithm, label in ALGORITHMS.items():
            cost = {w: [[np.median([r[k] for r in c.log(side(w, algorithm, task), s)]) for k in ("s_rollout", "s_update")]
                        for s in c.seeds] for w in ("token", "latent")}
            t, l = (np.array([[a, b, a + b] for a, b in cost[w]]) for w in ("token", "latent"))
            rows[f"{label}, task {task.upper()}"] = (l / t).tolist()
    return rows, markdown(["latent / token", "rollout", "update", "both"], [[n, *(spread(col, 2) for col in np.transpose(v))] for n, v in rows.items()])


def table5(c):
    """Two curves that meet in the full run: 128 codes, all of the text-only data."""
    sizes = {f"{k} codes": "full" if k == 128 else folder(f"{k} codes") for k in (16, 32, 64, 128, 256)}
    amounts = {"no text": folder("without text-only data")} | {v: folder(v) for v in AMOUNTS} | {"all of the text": "full"}
    rows, text = with_codebook(c, sizes | amounts, "a")
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, names in zip(axes, (sizes, amounts)):
        for k, test in enumerate(TESTS["a"]):
            y = np.array([rows[n][test] for n in names])
            axis.errorbar(np.arange(len(names)) + 0.06 * k, y.mean(1), y.std(1, ddof=1) if y.shape[1] > 1 else None, marker="o", capsize=3, label=test)
        axis.set_xticks(range(len(names)), names, fontsize=8)
    axes[0].legend(), axes[0].set_ylabel("latent GRPO, task A")
    fig.tight_layout(), fig.savefig(Path(c.cfg.results) / "coverage.png", dpi=110), plt.close(fig)
    return rows, text


def dimensions(c):
    """The judge's dimensions on the held-out tests: where a side gains. Scores out of 10; {row: {dimension: [by seed]}} for each task."""
    rows, text = {}, ""
    for task, test in (("a", "OOD"), ("b", "LS2")):
        folders = {"SFT": ("{s}/start_" + task, "SFT"), "BC latent": ("{s}/start_" + task, "BC latent")}
        folders |= {f"GRPO {w}": (side(w, "grpo", task) + "_eval", None) for w in ("token", "latent")}
        scores = {n: [c.row(f.format(s=s), row)[test]["dimensions"] for s in c.seeds] for n, (f, row) in folders.items()}
        rows[test] = {n: {d: [x[d][0] for x in by_seed] for d in by_seed[0]} for n, by_seed in scores.items()}
        reference = {d: x[1] for d, x in scores["SFT"][0].items()}
        text += markdown([f"task {task.upper()}, {test}", *reference], [["reference", *(f"{x:.1f}" for x in reference.values())]]
                         + [[n, *(spread(v, 1) for v in x.values())] for n, x in rows[test].items()]) + "\n"
    return rows, text


LOGGED = ("reward", "reward_std", "equal_groups", "different", "entropy", "kl", "length")


def training(c, last=20):
    """What stage 4 logs, mean of the last steps (and the reward of the first ones)."""
    rows = {}
    for task in "ab":
        for algorithm, label in ALGORITHMS.items():
            for which in ("token", "latent"):
                logs = [c.log(side(which, algorithm, task), s) for s in c.seeds]
                rows[f"{label} {which}, task {task.upper()}"] = {"reward, start": [float(np.mean([r["reward"] for r in log[:5]])) for log in logs]} | {
                    k: [float(np.mean([r[k] for r in log[-last:]])) for log in logs] for k in LOGGED}
    return rows, markdown([f"last {last} steps", "reward, first 5", *LOGGED], [[n, *(spread(x, 2) for x in v.values())] for n, v in rows.items()])


def table6(c):
    """With the KL to the start over the last 20 steps, mean of the tasks: how far a rate has moved the policy."""
    rows, kl = {}, {}
    for lr in (*LOWER_RATES, RATE):
        for which in ("token", "latent"):
            name, runs = f"GRPO {which}, {lr}", {t: side(which, "grpo", t) + ("" if lr == RATE else f"_{lr}") for t in "ab"}
            rows[name] = {test: v for task, run in runs.items() for test, v in c.tests(task, run + "_eval").items()}
            kl[name] = [float(np.mean([r["kl"] for run in runs.values() for r in c.log(run, s)[-20:]])) for s in c.seeds]
    return rows, test_rows(rows, "KL at the end", kl, 2)


def figure(c, path):
    """Draw it -> the reward of every step, {panel: {side: [[reward] by seed]}}."""
    curves = {}
    fig, axes = plt.subplots(2, 4, figsize=(14, 6), sharex=True, sharey="row")
    for task, line in zip("ab", axes):
        for (algorithm, label), axis in zip(ALGORITHMS.items(), line):
            for which, colour in (("token", "tab:orange"), ("latent", "tab:blue")):
                runs = [c.log(side(which, algorithm, task), s) for s in c.seeds]
                y = np.array([[r["reward"] for r in rows] for rows in runs])
                curves.setdefault(f"{label}, task {task.upper()}", {})[which] = y.round(3).tolist()
                y = np.stack([smooth(v, 10) for v in y])
                state = json.loads((common.latest(c.out / side(which, algorithm, task).format(s=c.seeds[0])) / "state.json").read_text())["config"]
                x = np.arange(1, y.shape[1] + 1) * state["batch"] * state["group"]
                axis.plot(x, y.mean(0), color=colour, label=which)
                axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.2, linewidth=0)
            axis.set_title(f"{label}, task {task.upper()}", fontsize=10)
    axes[0, 0].legend()
    for axis in axes[1]:
        axis.set_xlabel("rollouts")
    for axis in axes[:, 0]:
        axis.set_ylabel("reward: mean, range over seeds")
    fig.tight_layout(), fig.savefig(path, dpi=110), plt.close(fig)
    return curves


def report(cfg, seeds):
    """Tables, figure and results.json of the seeds whose runs are all there."""
    results, c = Path(cfg.results), Collected(cfg, seeds)
    results.mkdir(parents=True, exist_ok=True)
    runs = plan(cfg, seeds)
    seconds = sum(float(x) for n in runs for f in Path(n).glob("seconds.txt") for x in f.read_text().split())
    collected = {"config": asdict(cfg) | {"embedder": Path(cfg.embedder).parent.name}, "seeds": list(seeds), "runs": len(runs),
                 "minutes": round(seconds / cfg.parallel / 60, 1)}
    makers = {"1": (("table1", table1), ("dimensions", dimensions), ("training", training)), "2": (("table2", table2),), "3": (("table3", table3),),
              "4": (("table4", table4),), "5": (("table5", table5),), "6": (("table6", table6),)}
    for name, make in (pair for n in cfg.tables for pair in makers[n]):
        collected[name], text = make(c)
        (results / f"{name}.md").write_text(text)
        print(f"\n{name}, seeds {', '.join(map(str, seeds))}\n\n{text}")
    collected["rewards"] = figure(c, results / "rewards.png")
    (results / "results.json").write_text(json.dumps(collected, indent=1))


def main(argv=None):
    cfg, reported = common.parse_config(Config, __doc__, argv), 0
    jobs_of = [plan(cfg, [s]).keys() for s in range(1, cfg.seeds + 1)]

    def after(done):
        nonlocal reported
        whole = next((s for s, names in enumerate(jobs_of) if not names <= done), cfg.seeds)
        if whole > reported:
            reported = whole
            report(cfg, range(1, whole + 1))

    run_all(plan(cfg), cfg.parallel, after)


if __name__ == "__main__":
    common.run(main)
