"""The paper's tables in miniature, on the tiny world: every run, then the mean and standard deviation over seeds.

    table 1   Prompt, SFT, and every RL algorithm with tokens and with latent actions, on task A (tests ID and OOD)
              and task B (LS1 and LS2); beside it the judge's dimensions, and what the RL runs logged
    table 2   latent GRPO: full, without the cycle loss, without the projector, without text-only data
    table 3   rollout diversity, token and latent
    table 4   seconds of a rollout, of an update and of both, latent / token
    table 5   the size of the codebook, and the amount of text-only data (task A)
    table 6   the learning rate of RL
    table 7   a bonus on the use of many codes (task A)
    figure    reward against rollouts

A run is a folder below --out, with its log (studies/runs.py lists them). Two runs go side by side. A finished run is
not made again, an unfinished one goes on where it stopped: after an interruption, give the same command once more.
The tables are written after each seed.

    python -m studies.tables                      # tables 1 to 4 -> docs/results/
    python -m studies.tables --tables 1234567     # all of them
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import checkpoint
import common
from common import option
from data import DataError
from evaluate import TESTS
from plots import COLOURS, smooth
from rewards import load_judge, ngram_embed, rollout_diversity
from stage4_latent_rl import ALGORITHMS
from studies.runs import (
    ABLATIONS,
    AMOUNTS,
    BONUSES,
    LOWER_RATES,
    RATE,
    SIDES,
    folder,
    plan,
    rl_run,
    rollouts_a_step,
    run_all,
)

LABELS = {name: algorithm.label for name, algorithm in ALGORITHMS.items()}
LOGGED = ("reward", "reward_std", "equal_groups", "different", "entropy", "kl", "length")
# Table 5 has two curves, which meet in the full run: 128 codes, all of the text-only data. {row: folder of the variant}
SIZE_FOLDERS = {f"{k} codes": "full" if k == 128 else folder(f"{k} codes") for k in (16, 32, 64, 128, 256)}
AMOUNT_FOLDERS = {
    "no text": folder("without text-only data"),
    **{label: folder(label) for label in AMOUNTS},
    "all of the text": "full",
}


@dataclass
class Config:
    out: str = option("runs/tables", "folder of the runs")
    results: str = option("docs/results", "folder for the tables (Markdown), results.json and the figures")
    data: str = option("runs/world", "the tiny world")
    vlm: str = option("tiny/vlm", "folder of the vision-language model")
    tables: str = option("1234", "which tables' runs to make")
    seeds: int = option(3, "seeds 1, 2, ... of training")
    steps: int = option(100, "RL steps", least=1)
    parallel: int = option(2, "runs side by side, one thread each", least=1)
    embedder: str = option("", "a sentence-embedding folder: table 3 with it, too")
    short: str = option("no", "a few rows a run, to see that all of it works; with --steps 2", choices=("yes", "no"))


# ---------------------------------------------------------------------------------------------- what the runs have left
class Collected:
    """Reads the runs. A run's `name` has {s} where the seed stands; values come as lists, one for each seed."""

    def __init__(self, cfg, seeds=None):
        self.cfg = cfg
        self.seeds = seeds or range(1, cfg.seeds + 1)
        self.embed = load_judge(cfg.embedder).embed if cfg.embedder else None

    def path(self, name, seed):
        return Path(self.cfg.out) / name.format(s=seed)

    def row(self, name, seed, row=None):
        """The one row of an evaluation, or the named one."""
        rows = json.loads((self.path(name, seed) / "results.json").read_text())["rows"]
        return rows[row] if row else next(iter(rows.values()))

    def ratios(self, task, name, row=None, seeds=None):
        """-> {test: judge's ratio by seed}."""
        found = [self.row(name, seed, row) for seed in seeds or self.seeds]
        return {test: [r[test]["ratio"] for r in found] for test in TESTS[task]}

    def both_tasks(self, name, row=None, seeds=None):
        """`ratios` of task A and task B; `name` has {task}, too."""
        a, b = (self.ratios(task, name.replace("{task}", task), row, seeds) for task in "ab")
        return a | b

    def diversity(self, name, embed, row=None):
        """-> mean over prompts, by seed, of the diversity of the responses in the one row, or in the named one."""
        means = []
        for seed in self.seeds:
            drawn = json.loads((self.path(name, seed) / "diversity.json").read_text())
            groups = drawn[row] if row else next(iter(drawn.values()))
            means.append(float(np.mean([rollout_diversity(embed(group)) for group in groups])))
        return means

    def logs(self, name):
        """-> what stage 4 logged, by seed: a list of dicts, one for each step."""
        return [common.read_metrics(self.path(name, seed)) for seed in self.seeds]

    def state(self, name, seed):
        """state.json of the last checkpoint."""
        return checkpoint.read_state(self.path(name, seed))


def rl(side, algorithm, task="{task}", rate=RATE):
    """The name of a full RL run, for any seed (and for any task)."""
    return rl_run("{s}", side, algorithm, task, rate)


# -------------------------------------------------------------------------------------------------------- Markdown
def spread(values, digits=3):
    """mean ± standard deviation over seeds."""
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):.{digits}f}"


def markdown(head, rows):
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines) + "\n"


def test_rows(rows, column=None, values=None, digits=3):
    """{row: {test: values by seed}} -> Markdown, with the average of the tests, and perhaps one more column.

    column: its head; values: {row: values by seed}."""
    tests = list(next(iter(rows.values())))
    head, lines = ["row", *tests, "average"], []
    for name, row in rows.items():
        average = np.mean([row[test] for test in tests], 0)
        lines.append([name, *(spread(row[test]) for test in tests), spread(average)])
        if column:
            lines[-1].append(spread(values[name], digits))
    return markdown(head + [column] if column else head, lines)


# ----------------------------------------------------- the tables; each -> (what results.json holds, Markdown)
def table1(c):
    rows = {"Prompt": c.both_tasks("{s}/start_{task}", "Prompt", [1])}
    for name in ("SFT", "BC latent"):
        rows[name] = c.both_tasks("{s}/start_{task}", name)
    for algorithm, label in LABELS.items():
        for side in SIDES:
            rows[f"{label} {side}"] = c.both_tasks(rl(side, algorithm) + "_eval")
    return rows, test_rows(rows)


def dimensions(c):
    """The judge's dimensions on the harder test of each task, scores out of 10: where a side gains."""
    found, text = {}, ""
    for task, test in (("a", "OOD"), ("b", "LS2")):
        start = "{s}/start_" + task
        runs = {"SFT": (start, "SFT"), "BC latent": (start, "BC latent")}
        runs |= {f"GRPO {side}": (rl(side, "grpo", task) + "_eval", None) for side in SIDES}
        scores = {}  # {row: {dimension: (score, the reference's score)} by seed}
        for name, (run, row) in runs.items():
            scores[name] = [c.row(run, seed, row)[test]["dimensions"] for seed in c.seeds]
        reference = {d: [pair[1]] for d, pair in scores["SFT"][0].items()}
        rows = {n: {d: [seed[d][0] for seed in by_seed] for d in reference} for n, by_seed in scores.items()}
        found[test] = {"reference": reference} | rows
        lines = [[name, *(spread(values, 1) for values in row.values())] for name, row in found[test].items()]
        text += markdown([f"task {task.upper()}, {test}", *reference], lines) + "\n"
    return found, text


def training(c, last=20):
    """What stage 4 logged, mean of the last steps; and the reward of the first five."""

    def mean(logs, key, steps):
        return [float(np.mean([step[key] for step in log[steps] if key in step])) for log in logs]

    rows = {}
    for task in "ab":
        for algorithm, label in LABELS.items():
            for side in SIDES:
                logs = c.logs(rl(side, algorithm, task))
                row = {"reward, start": mean(logs, "reward", slice(5))}
                row |= {key: mean(logs, key, slice(-last, None)) for key in LOGGED}
                rows[f"{label} {side}, task {task.upper()}"] = row
    lines = [[name, *(spread(values, 2) for values in row.values())] for name, row in rows.items()]
    return rows, markdown([f"last {last} steps", "reward, first 5", *LOGGED], lines)


def with_codebook(c, folders, tasks):
    """{row: folder of the variant} -> GRPO's ratios, and how well the codebook explains text that it has not read.

    The latter is stage 2's loss, in nats a token, with the actions that the inverse dynamics finds."""
    rows, nats = {}, {}
    for name, v in folders.items():
        rows[name] = {}
        for task in tasks:
            rows[name] |= c.ratios(task, "{s}/" + f"{v}/grpo_{task}_eval")
        states = [c.state("{s}/" + f"{v}/stage2", seed) for seed in c.seeds]
        nats[name] = [state["val"]["text"]["val_inferred"] for state in states]
    found = {name: row | {"text, nats": nats[name]} for name, row in rows.items()}
    return found, test_rows(rows, "held-out text, nats", nats)


def table2(c):
    return with_codebook(c, {v: folder(v) for v in ("full", *ABLATIONS)}, "ab")


def table3(c):
    embeddings = {"words and word pairs": ngram_embed}
    if c.embed:
        embeddings["sentence-embedding model"] = c.embed
    rows = {}
    for kind, embed in embeddings.items():
        for task in "ab":
            where, start = f"task {task.upper()}, {kind}", "{s}/start_" + task
            of_row = {"token": "SFT", "latent": "BC latent"}
            rows[f"before RL, {where}"] = {s: c.diversity(start, embed, row) for s, row in of_row.items()}
            for algorithm, label in LABELS.items():
                runs = {side: rl(side, algorithm, task) + "_eval" for side in SIDES}
                rows[f"{label}, {where}"] = {side: c.diversity(run, embed) for side, run in runs.items()}
    lines = []
    for name, row in rows.items():
        quotient = np.divide(row["latent"], row["token"])
        lines.append([name, spread(row["token"]), spread(row["latent"]), spread(quotient, 2)])
    return rows, markdown(["8 rollouts of a prompt, by embedding", "token", "latent", "latent / token"], lines)


def table4(c):
    """-> {row: (rollout, update, both), latent / token, by seed}, from each run's median step."""
    rows = {}
    for task in "ab":
        for algorithm, label in LABELS.items():
            seconds = {}  # {side: (seeds, 3)}
            for side in SIDES:
                logs = c.logs(rl(side, algorithm, task))
                parts = [[np.median([step[k] for step in log]) for log in logs] for k in ("s_rollout", "s_update")]
                seconds[side] = np.stack([*parts, np.sum(parts, 0)], 1)
            rows[f"{label}, task {task.upper()}"] = (seconds["latent"] / seconds["token"]).tolist()
    lines = [[name, *(spread(column, 2) for column in np.transpose(row))] for name, row in rows.items()]
    return rows, markdown(["latent / token", "rollout", "update", "both"], lines)


def table5(c):
    return with_codebook(c, SIZE_FOLDERS | AMOUNT_FOLDERS, "a")


def table6(c):
    """With the KL to the start over the last 20 steps, mean of the two tasks: how far a rate has moved the policy."""
    rows, kl = {}, {}
    for rate in (*LOWER_RATES, RATE):
        for side in SIDES:
            name = f"GRPO {side}, {rate}"
            rows[name] = c.both_tasks(rl(side, "grpo", rate=rate) + "_eval")
            a, b = (c.logs(rl(side, "grpo", task, rate)) for task in "ab")
            last_steps = [log_a[-20:] + log_b[-20:] for log_a, log_b in zip(a, b)]
            kl[name] = [float(np.mean([step["kl"] for step in steps])) for steps in last_steps]
    found = {name: row | {"KL": kl[name]} for name, row in rows.items()}
    return found, test_rows(rows, "KL at the end", kl, 2)


def table7(c, last=20):
    """The use of codes at the end of stage 2, on text-only data; held-out text as in table 2; the share of different
    texts in a group over the first and the last steps of RL; ratios and diversity after it."""
    rows = {}
    for name in ("full", *BONUSES):
        v = "{s}/" + folder(name)
        book, log = c.logs(f"{v}/stage2"), c.logs(f"{v}/grpo_a")
        rows[name] = {
            "codes": [run[-1]["codes_text"] for run in book],
            "perplexity": [run[-1]["perplexity_text"] for run in book],
            "held-out text, nats": [c.state(f"{v}/stage2", s)["val"]["text"]["val_inferred"] for s in c.seeds],
            "different, first": [float(np.mean([step["different"] for step in run[:last]])) for run in log],
            "different, last": [float(np.mean([step["different"] for step in run[-last:]])) for run in log],
            "diversity": c.diversity(f"{v}/grpo_a_eval", ngram_embed),
        } | c.ratios("a", f"{v}/grpo_a_eval")
    head, digits = list(rows["full"]), {"codes": 0, "perplexity": 0}
    lines = [[name, *(spread(row[k], digits.get(k, 3)) for k in head)] for name, row in rows.items()]
    return rows, markdown(["row", *head], lines)


def rewards(c):
    """The reward of every step of the RL runs -> {panel: {side: [steps] by seed}}."""
    curves = {}
    for task in "ab":
        for algorithm, label in LABELS.items():
            panel = curves[f"{label}, task {task.upper()}"] = {}
            for side in SIDES:
                logs = c.logs(rl(side, algorithm, task))
                panel[side] = np.array([[step["reward"] for step in log] for log in logs]).round(3).tolist()
    return curves


# ---------------------------------------------------------------------------------------------------------- figures
def draw(folder):
    """Draw the figures of the results.json in this folder, into it."""
    found = json.loads((Path(folder) / "results.json").read_text())
    draw_rewards(found["rewards"], rollouts_a_step(found["config"]["short"]), Path(folder) / "rewards.png")
    if "table5" in found:
        draw_coverage(found["table5"], Path(folder) / "coverage.png")


def draw_rewards(curves, rollouts, path):
    """The reward of token and latent side against rollouts, a panel for each algorithm and task. rollouts: a step."""
    fig = Figure(figsize=(14, 6), layout="constrained")
    axes = fig.subplots(2, len(curves) // 2, sharex=True, sharey="row")
    for (panel, sides), axis in zip(curves.items(), axes.flat):
        for side, by_seed in sides.items():
            y = np.stack([smooth(np.array(reward), 10) for reward in by_seed])
            x = np.arange(1, y.shape[1] + 1) * rollouts
            axis.plot(x, y.mean(0), color=COLOURS[side], label=side)
            axis.fill_between(x, y.min(0), y.max(0), color=COLOURS[side], alpha=0.2, linewidth=0)
        axis.set_title(panel, fontsize=10)
        axis.grid(alpha=0.25)
    axes[0, 0].legend()
    for axis in axes[:, 0]:
        axis.set_ylabel("reward: mean, range over seeds")
    for axis in axes[1]:
        axis.set_xlabel("rollouts")
    fig.savefig(path, dpi=110)


def draw_coverage(rows, path):
    """Ratio of latent GRPO on task A against the size of the codebook, and against the amount of text-only data."""
    fig = Figure(figsize=(9, 3.4), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    for axis, names in zip(axes, (SIZE_FOLDERS, AMOUNT_FOLDERS)):
        for k, (test, marker, line) in enumerate(zip(TESTS["a"], "os", ("-", "--"))):
            y = np.array([rows[name][test] for name in names])
            deviation = y.std(1, ddof=1) if y.shape[1] > 1 else None
            x = np.arange(len(names)) + 0.06 * k  # side by side, so that both bars are seen
            look = {"marker": marker, "linestyle": line, "color": COLOURS["latent"], "capsize": 3}
            axis.errorbar(x, y.mean(1), deviation, label=test, **look)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("latent GRPO, task A: ratio")
    axes[0].legend()
    fig.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------------- report
MAKERS = {  # what --tables names -> the tables that come with it
    "1": (table1, dimensions, training),
    "2": (table2,),
    "3": (table3,),
    "4": (table4,),
    "5": (table5,),
    "6": (table6,),
    "7": (table7,),
}


def minutes(cfg, runs):
    """What these runs took, by the clock."""
    files = [file for run in runs for file in Path(run).glob("seconds.txt")]
    return round(sum(float(s) for file in files for s in file.read_text().split()) / cfg.parallel / 60, 1)


def report(cfg, seeds):
    """Write tables, figures and results.json of these seeds, whose runs are all there."""
    results, runs, c = Path(cfg.results), plan(cfg, seeds), Collected(cfg, seeds)
    results.mkdir(parents=True, exist_ok=True)
    embedder = Path(cfg.embedder).parent.name  # its package; the rest of the path differs from machine to machine
    made = {"seeds": list(seeds), "tables": cfg.tables, "runs": len(runs), "minutes": minutes(cfg, runs)}
    found = {"config": asdict(cfg) | {"embedder": embedder}, "seeds": {}, "made": [made]}
    for number in cfg.tables:
        for make in MAKERS[number]:
            found[make.__name__], text = make(c)
            found["seeds"][make.__name__] = list(seeds)
            (results / f"{make.__name__}.md").write_text(text)
            print(f"\n{make.__name__}, seeds {', '.join(map(str, seeds))}\n\n{text}")
    found["rewards"], found["seeds"]["rewards"] = rewards(c), list(seeds)
    (results / "results.json").write_text(json.dumps(found, indent=1))
    draw(results)


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    if unknown := set(cfg.tables) - set(MAKERS):
        raise DataError(f"--tables {cfg.tables}: there is no table {min(unknown)}, choose from {''.join(MAKERS)}")
    checkpoint.open_folder(cfg.results, "--results")
    folders = [set(plan(cfg, [seed])) for seed in range(1, cfg.seeds + 1)]
    reported = 0

    def after(done):
        """Report once more when another seed is complete, and all before it."""
        nonlocal reported
        complete = 0
        while complete < cfg.seeds and folders[complete] <= done:
            complete += 1
        if complete > reported:
            reported = complete
            report(cfg, range(1, complete + 1))

    run_all(plan(cfg), cfg.parallel, after)


if __name__ == "__main__":
    common.run(main)
