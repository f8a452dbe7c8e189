"""README.md and docs/: every number comes from a file in docs/results/, links lead somewhere, lines are short.

PYTHONPATH=. python tests/test_docs.py      # after a new run: writes the tables and numbers of docs/results/ into the
                                            # pages
"""

import ast
import json
import math
import re
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from judge_http import Judging
from states import KeepsStates

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
PAGES = {str(p.relative_to(ROOT)): p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEST_FILES = sorted((ROOT / "tests").glob("test_*.py"))
SAID = ("docs/examples.md", "docs/smol_dialogues.md")  # made by evaluate.py and studies/smol.py: what models said
WRITTEN = [page for page in PAGES if page not in SAID]
ALGORITHMS = ("GRPO", "Dr.GRPO", "DAPO", "BNPO")
TESTS = ("ID", "OOD", "LS1", "LS2")


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


# ---------------------------------------------------------------------------------------------- how numbers look
def spread(values, digits=3):
    """mean ± standard deviation over seeds."""
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):.{digits}f}"


def lead(values, digits=2):
    """A difference with its sign, and with its standard deviation where there are several values."""
    text = f"{np.mean(values):+.{digits}f}"
    if not float(text):
        text = text[1:]  # 0.00 has no sign
    return text if np.size(values) == 1 else f"{text} ± {np.std(values, ddof=1):.{digits}f}"


def markdown(head, rows):
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def names(seeds):
    """[1, 2, 3] -> 'seeds 1 to 3'."""
    return f"seeds {seeds[0]} to {seeds[-1]}"


# ------------------------------------------------------------------------------------------------------ the tables
def ratio_table(rows, column=None, key=None, digits=3):
    """{row: {test: [by seed]}} -> Markdown with the average of the tests, and one more column if the rows have it."""
    key = key if key in next(iter(rows.values())) else None
    tests = [t for t in TESTS if t in next(iter(rows.values()))]
    lines = []
    for name, row in rows.items():
        average = np.mean([row[t] for t in tests], 0)
        more = [spread(row[key], digits)] if key else []
        lines.append([name, *(spread(row[t]) for t in tests), spread(average), *more])
    return markdown(["row", *tests, "average", *([column] if key else [])], lines)


def results_tables(R):
    """{name: Markdown} of the tables of results.json; each of them is also a file docs/results/NAME.md."""
    out = {"table1": ratio_table(R["table1"]), "table6": ratio_table(R["table6"], "KL at the end", "KL", 2)}
    for name in ("table2", "table5"):
        out[name] = ratio_table(R[name], "held-out text, nats", "text, nats")
    parts = []
    for task, test in (("A", "OOD"), ("B", "LS2")):
        rows = R["dimensions"][test]
        lines = [[name, *(spread(v, 1) for v in row.values())] for name, row in rows.items()]
        parts.append(markdown([f"task {task}, {test}", *rows["reference"]], lines))
    out["dimensions"] = "\n\n".join(parts)
    logged = list(next(iter(R["training"].values())))[1:]
    lines = [[name, *(spread(v, 2) for v in row.values())] for name, row in R["training"].items()]
    out["training"] = markdown(["last 20 steps", "reward, first 5", *logged], lines)
    lines = []
    for name, row in R["table3"].items():
        ratio = np.divide(row["latent"], row["token"])
        lines.append([name, spread(row["token"]), spread(row["latent"]), spread(ratio, 2)])
    out["table3"] = markdown(["8 rollouts of a prompt, by embedding", "token", "latent", "latent / token"], lines)
    head, lines = list(R["table7"]["full"]), []
    for name, row in R["table7"].items():
        lines.append([name, *(spread(v, 0 if k in ("codes", "perplexity") else 3) for k, v in row.items())])
    out["table7"] = markdown(["row", *head], lines)
    lines = [[name, *(spread(column, 2) for column in np.transpose(by_seed))] for name, by_seed in R["table4"].items()]
    out["table4"] = markdown(["latent / token", "rollout", "update", "both"], lines)
    return out


def bench_table(rows):
    def cell(value, target=None):
        text = "" if value is None else f"{value:.2f}"
        return text if target is None else f"{text} (<= {target:.2f})"

    lines = []
    for r in rows:
        a, b = [x / 2**30 for x in r["peak"]] or (None, None)
        times = [f"{x:.3f}" for x in r["seconds"]] + [cell(r["ratio"], r["target"])]
        memory = [cell(a), cell(b), cell(a and a / b, r["target_memory"])]
        lines.append([r["shape"], r["line"], *times, *memory])
    head = ["A, s", "B, s", "time A / B (target)", "A, GiB", "B, GiB", "memory A / B (target)"]
    return markdown(["shape", "line, A / B", *head], lines)


def demo_table(rows):
    head = ["row", "ID", "OOD", "diversity", "reward, start", "reward, end", "rollout, s", "update, s"]
    lines = []
    for name, r in rows.items():
        ratios = [f"{r[t]['ratio']:.3f} ± {r[t]['std']:.3f}" for t in ("ID", "OOD")]
        training = [f"{r[k]:.3f}" if k in r else "" for k in ("reward_start", "reward_end", "s_rollout", "s_update")]
        lines.append([name, *ratios, f"{r['diversity']:.3f}", *training])
    return markdown(head, lines)


def mmrole_tables(real):
    files = ("paired", "text", "task_demos", "task_prompts", "task_id", "task_ood")
    head = ["file", "paired", "text", "demonstrations", "RL prompts", "ID test", "OOD test"]
    lines = [[k, *(f"{real['records'][f][k]:,}" for f in files)] for k in ("records", "with image")]
    logs, val = real["logs"], real["codebook_val"]

    def change(run, key, what):
        first, last = logs[run]["first"], logs[run]["last"]
        return [what, f"{first[key]:.2f}" if key in first else "", f"{last[key]:.2f}"]

    losses = [
        change("stage1", "mse", "1: squared error of mu of P(e^T) to e^VT, a dimension"),
        change("stage1", "mse_identity", "1: the same of e^T itself"),
        change("stage2", "nll_paired", "2: L_inverse, paired data"),
        change("stage2", "nll_text", "2: L_inverse, text-only data (from phase b on)"),
        ["2: held-out text-only rows, the bare VLM", "", f"{val['text']['val_vlm']:.2f}"],
        ["2: the same rows, inferred codes", "", f"{val['text']['val_inferred']:.2f}"],
        ["2: the same rows, random codes", "", f"{val['text']['val_random']:.2f}"],
        change("clone", "bc_paired", "3: L_bc, paired data"),
        change("clone", "bc_text", "3: L_bc, text-only data"),
        change("sft", "nll", "3: SFT, the token side"),
    ]
    ratios = [[name, *(f"{row[t]['ratio']:.3f}" for t in ("ID", "OOD"))] for name, row in real["rows"].items()]
    return [
        markdown(head, lines),
        markdown(["stage and loss", "first step", "last step"], losses),
        markdown(["judge ratio", "ID", "OOD"], ratios),
    ]


def codebook_table(choices):
    said = {
        "vlm": ["merged state at e's own length (ours)", "`--world-output vlm`"],
        "norm": ["RMSNorm of the merged state", "`--world-output norm`"],
        "release": ["norm(x) - e, the release's pretraining", "`--world-output release`"],
        "mlp": ["ours, with the paper's projector mean MLP(x)", "stage 1 with `--mean mlp`"],
    }
    lines = []
    for name, words in said.items():
        val = choices["codebook"][name]["val"]
        pairs = [f"{v['val_inferred']:.3f} / {v['val_random']:.3f}" for v in (val["paired"], val["text"])]
        lines.append(words + pairs)
    head = ["what the LM head reads", "command", "paired: inferred / random", "text-only: inferred / random"]
    return markdown(head, lines)


def settings_table(choices):
    columns = ("latent A", "latent B", "token A", "token B")
    lines = []
    for change, row in choices["rl_settings"]["changes"].items():
        lines.append([change, *(f"{row[c]:.3f}" if c in row else "" for c in columns)])
    return markdown(["change", *columns], lines)


def memory_tables(found):
    """Of 3B and 7B: GiB of each stage, and with which settings it fits on which GPU."""
    from studies.memory import fits_table, rows_table

    tables = [(rows_table(name, size["rows"]), fits_table(name, size["fits"])) for name, size in found.items()]
    return [table for pair in tables for table in pair]


def smol_rows():
    """{model: its numbers}: the table of `make smol`, of README.md and docs/smol.md."""
    found = read("smol")
    speech, sides = found["report"]["speech"], found["report"]["curves"]
    for name, row in found["rows"].items():
        numbers = {f"{t}, {kind}": row[t]["ratio"] for t, kind in (("ID", "judge ratio"), ("OOD", "judge ratio"))}
        numbers |= {"diversity": row["diversity"], "likeness": speech[name]["0.1"]["likeness"]}
        side = sides.get(name, {})
        numbers |= {k: side.get(v) for k, v in (("rollout, s", "s_rollout"), ("update, s", "s_update"))}
        yield name, numbers


SHORT = ["ID, judge ratio", "OOD, judge ratio", "diversity", "rollout, s", "update, s"]  # columns, for the README


def smol_table(columns):
    lines = []
    for name, numbers in smol_rows():
        lines.append([name, *("" if numbers[c] is None else f"{numbers[c]:.2f}" for c in columns)])
    return markdown(["row", *columns], lines)


def smol_tables():
    from studies.smol_pages import PAGES as PARTS

    found = read("smol")
    earlier, rates = found["earlier"], []
    for side, by_rate in earlier["rates"].items():
        for rate, rewards in by_rate.items():
            missing = len(earlier["steps"]) - len(rewards)
            rates.append([side, rate, *(f"{x:.3f}" for x in rewards), *[""] * missing])
    head = ["reward", "rate", *(f"step {k}" for k in earlier["steps"])]
    fooled = [
        [name, f"{r['ratio']:.2f}", f"{earlier['judge'][name]['ratio']:.2f}"] for name, r in found["judge"].items()
    ]
    report = [PARTS[part](found["report"][part]) for part in PARTS if part in found["report"] and part != "dialogues"]
    whole = ["ID, judge ratio", "OOD, judge ratio", "likeness", "diversity", "rollout, s", "update, s"]
    parts = [block for text in report for block in text.split("\n\n") if block.startswith("|")]
    judged = markdown(["text in the place of an answer", "judge ratio", "without the third direction"], fooled)
    return [smol_table(whole), judged, markdown(head, rates), *parts, *former_tables(found)]


def former_tables(found):
    """What was learnt with other settings: learning rates, and two prompts a step. And what bfloat16 and kept states
    save."""
    former = found["former"]
    rates = []
    for side, by in found["tries"].items():
        for rate, r in by.items():
            shown = [f"{r[k]:.{digits}f}" for k, digits in (("before", 3), ("after", 3), ("kl", 2))]
            rates.append([side, rate, str(r["prompts"]), str(r["steps"]), *shown])
    runs = {"this run": found["rows"]} | {name: run["rows"] for name, run in former.items()}
    ratios = [
        [name, *(f"{rows[name][test]['ratio']:.2f}" for test in ("ID", "OOD") for rows in runs.values())]
        for name in found["rows"]
    ]
    ways = list(found["speed"]["stage 1"])
    speed = [[part, *(f"{by[way]:.2f}" for way in ways)] for part, by in found["speed"].items()]
    return [
        markdown(["side", "rate", "prompts a step", "steps", "reward before", "reward after", "KL"], rates),
        markdown(["row", *(f"{test}, {name}" for test in ("ID", "OOD") for name in runs)], ratios),
        markdown(["part", *ways], speed),
    ]


def atlas_tables():
    """What the codes of the demo's agent do, by seed."""
    seeds, kinds = read("atlas")["seeds"], {"paired": "paired", "text": "text-only"}
    said = {"nats": "nats", "entropy": "entropy", "right": "share of places where it is the most likely one"}
    ways, lines = ("vlm", "any", "code"), []
    for kind, name in kinds.items():
        for key, what in said.items():
            lines.append([f"{name}, {what}", *(spread([s[kind][key][way] for s in seeds]) for way in ways)])
    head = ["next token", "bare VLM", "world model, code unknown", "world model, code known"]
    rows = {
        "codes": "codes",
        "used": "inferred at least once in the held-out rows",
        "groups": "really different",
        "groups open": "really different, places alone where not all codes say the same",
    }
    counts = [[what, spread([s["codes"][key] for s in seeds], 0)] for key, what in rows.items()]
    several = {
        "different": "tokens that all codes can say at one place",
        "open": "places where not all codes say the same",
    }
    for kind, name in kinds.items():
        counts += [[f"{what}, {name}", spread([x[kind][key] for x in seeds], 2)] for key, what in several.items()]
    return [markdown(head, lines), markdown(["codebook", "number"], counts)]


def atlas_texts():
    """Sentences of docs/atlas.md."""
    found = read("atlas")
    first, share = found["seeds"][0], found["share"]
    paired, text = first["paired"], first["text"]
    places = paired["places"] + text["places"]
    several, opened = (sum(x["places"] * x[name] for x in (paired, text)) for name in ("different", "open"))
    change = np.subtract(share["after"], share["before"])
    up, down = change.argmax(), change.argmin()
    shares = [f"code {k} from {share['before'][k]:.1%} of its tokens to {share['after'][k]:.1%}" for k in (up, down)]
    return [
        f"{places} places",
        f"the next token costs {paired['nats']['vlm']:.2f} nats under the bare VLM and "
        f"{paired['nats']['code']:.2f} nats with the code; on text-only data it is {text['nats']['vlm']:.2f} and "
        f"{text['nats']['code']:.2f}",
        f"costs {text['nats']['any']:.2f} nats on text-only data, more than under the bare VLM",
        f"At {1 - opened / places:.0%} of the places all {first['codes']['codes']} codes lead to the same token, "
        f"and at the others to {(several - places + opened) / opened:.1f} different ones by the mean",
        f"its most frequent token at {first['codes']['favourite']:.0%} of the places",
        f"RL raises {shares[0]}",
        f"lowers {shares[1]}",
    ]


def tables():
    """{page: Markdown tables that it shows}"""
    choices = read("choices")
    return {
        "README.md": [demo_table(read("demo")["rows"]), smol_table(SHORT)],
        "docs/results.md": [
            *(t for text in results_tables(read("results")).values() for t in text.split("\n\n")),
            codebook_table(choices),
        ],
        "docs/cost.md": [bench_table(read("bench")["rows"])],
        "docs/mmrole.md": mmrole_tables(read("real")),
        "docs/choices.md": [settings_table(choices)],
        "docs/gpu_node.md": memory_tables(read("memory")),
        "docs/smol.md": smol_tables(),
        "docs/atlas.md": atlas_tables(),
    }


# ------------------------------------------------------------------------------------------------ numbers in prose
class Found:
    """What the sentences say about results.json, by seed where it depends on the seed."""

    def __init__(self, R):
        self.R = R

    def average(self, table, row, tests=TESTS):
        return np.mean([self.R[table][row][t] for t in tests], 0)

    def ahead(self, algorithms=ALGORITHMS, tests=TESTS):
        """Latent less token in table 1, mean of the algorithms and tests."""
        rows = [[self.average("table1", f"{a} {side}", tests) for a in algorithms] for side in ("latent", "token")]
        return np.mean(np.subtract(*rows), 0)

    def change(self, table, a, b, tests=TESTS):
        """Row a less row b, mean of the tests."""
        return self.average(table, a, tests) - self.average(table, b, tests)

    def diversity(self, before):
        """Latent / token of the rows before or after RL, lowest and highest."""
        rows = [v for k, v in self.R["table3"].items() if k.startswith("before") == before]
        means = [np.mean(np.divide(row["latent"], row["token"])) for row in rows]
        return f"{min(means):.2f} to {max(means):.2f}"


def claims():
    """Sentences of docs/results.md: the paper's claims, with the numbers found here."""
    R = read("results")
    f, one = Found(R), {a: np.mean(Found(R).ahead([a])) for a in ALGORITHMS}
    ahead = {test: lead(f.ahead(tests=[test])) for test in TESTS}
    time = np.array([np.mean(v, 0) for v in R["table4"].values()])  # (rows, 3)
    cost = [f"{low:.2f} to {high:.2f}" for low, high in zip(time.min(0), time.max(0))]
    rate = "GRPO {}, 1e-4".format
    advice = f.change("table2", "full", "without text-only data", ("LS1", "LS2"))
    text = f.change("table2", "full", "without text-only data")
    return [
        f"as a mean of the four algorithms, is {lead(f.ahead())} over {names(R['seeds']['table1'])}",
        f"{lead(one['GRPO'])} (GRPO), {lead(one['Dr.GRPO'])} (Dr.GRPO), {lead(one['DAPO'])} (DAPO) and "
        f"{lead(one['BNPO'])} (BNPO)",
        f"At the learning rate 1e-4 it is {lead(np.mean(f.change('table6', rate('latent'), rate('token'))))}",
        f"On LS2 it is: the lead there is {ahead['LS2']}",
        f"On OOD the lead is {ahead['OOD']}, on ID {ahead['ID']}, on LS1 {ahead['LS1']}",
        f"after RL {f.diversity(False)} times, before RL {f.diversity(True)} times",
        f"the average falls by {np.mean(text):.2f}, and that of task B's two tests by {np.mean(advice):.2f}",
        f"changes by {lead(np.mean(f.change('table2', 'without the cycle loss', 'full')))} without the one and by "
        f"{lead(np.mean(f.change('table2', 'without the projector', 'full')))} without the other",
        f"a rollout costs {cost[0]} times, the update {cost[1]} times, and both together {cost[2]} times",
    ]


def table_texts():
    """Sentences of docs/results.md about the tables."""
    R = read("results")
    f, dims, logs, seeds = Found(R), R["dimensions"], R["training"], R["seeds"]
    shown = {k: f"{names(v).capitalize()}." for k, v in seeds.items()}
    fits = {side: dims["LS2"][f"GRPO {side}"]["Role-Set Sensitivity"] for side in ("token", "latent")}
    tone = dims["OOD"]["GRPO latent"]["Tone Consistency"]
    behind = [-f.ahead([a], ["ID"])[4] for a in ALGORITHMS]
    kl = {a: np.mean(logs[f"{a} token, task A"]["kl"]) for a in ("Dr.GRPO", "GRPO")}
    length = np.mean([logs[f"Dr.GRPO {side}, task A"]["length"] for side in ("token", "latent")])
    vlm = read("choices")["codebook"]["vlm"]
    nats = vlm["val"]["text"]["val_vlm"]
    sft = [np.mean(R["table3"][f"before RL, task {t}, words and word pairs"]["token"]) for t in "AB"]
    grpo = {side: {k: np.mean(v) for k, v in logs[f"GRPO {side}, task A"].items()} for side in ("token", "latent")}
    four = {k: f.average("table5", k, ("ID", "OOD")) for k in R["table5"]}
    width = {k: np.std(four[k], ddof=1) for k in ("1/4 of the text", "1/2 of the text", "all of the text")}
    small = [f.change("table6", "GRPO latent, 1e-4", "GRPO token, 1e-4", t) for t in (("ID", "OOD"), ("LS1", "LS2"))]
    bonus = {
        k: [np.mean(row[k]) for row in R["table7"].values()] for k in ("held-out text, nats", "codes", "ID", "OOD")
    }
    before = np.mean([R["table1"]["GRPO latent"][t][:3] for t in ("ID", "OOD")])
    old, again, new = (
        np.array(x) for x in (R["table1"]["GRPO latent"]["ID"][:3], read("control")["ID"], R["table7"]["full"]["ID"])
    )
    best = {row: spread(f.average("table6", row)) for row in ("GRPO token, 3e-4", "GRPO latent, 1e-3")}
    return [
        f"Judge ratio. {shown['table1']}",
        f"the dimension for that, is {np.mean(dims['LS2']['SFT']['Role-Set Sensitivity']):.1f}",
        f"falls to {fits['token'][1]:.1f} in seeds 2 and 3 and to {fits['token'][3]:.1f} in seed 4; "
        f"in seeds 1 and 5 it is {fits['token'][0]:.1f} and {fits['token'][4]:.1f}",
        f"the world model as they are, it is {spread(fits['latent'], 1)}",
        f"Tone Consistency on OOD is {tone[4]:.1f}, and {min(tone[:4]):.1f} to {max(tone[:4]):.1f} in the other seeds",
        f"behind on ID by {min(behind):.2f} to {max(behind):.2f} under every algorithm",
        f"responses have about {length:.0f}",
        f"is {kl['Dr.GRPO']:.2f} for tokens, where GRPO's is {kl['GRPO']:.2f}",
        f"harder test of each task. {shown['dimensions']}",
        f"explains the names. {shown['training']}",
        f"mean over {names(seeds['rewards'])}",
        f"The bare VLM has {nats:.3f} nats there",
        f"without any code. {shown['table2']}",
        f"from {vlm['mse_identity']:.2f} a dimension to {vlm['mse']:.2f}",
        f"the paper uses BGE-M3. {shown['table3']}",
        f"after it the diversity is {sft[0]:.2f} on task A and {sft[1]:.2f} on task B",
        f"{grpo['latent']['entropy']:.2f} nats an action against {grpo['token']['entropy']:.2f} nats a token",
        f"{grpo['latent']['different']:.0%} of a group are different, and {grpo['token']['different']:.0%} on",
        f"On text that is about {nats:.2f} nats a token",
        f"128 codes could carry up to {math.log(128):.2f} nats",
        f"median step of each run. {shown['table4']}",
        f"read these rows several times. {shown['table5']}",
        f"is {width['1/4 of the text']:.3f} with a quarter, {width['1/2 of the text']:.3f} with a half and "
        f"{width['all of the text']:.3f} with all of it",
        f"16 codes lose {np.mean(four['128 codes'] - four['16 codes']):.2f} against 128, and 256 gain "
        f"{np.mean(four['256 codes'] - four['128 codes']):.2f}",
        f"The other tables have 1e-3. {shown['table6']}",
        f"ahead by {np.mean(small[0]):.2f} on task A and behind by {-np.mean(small[1]):.2f} on task B",
        f"Task A. {shown['table7']}",
        f"All {bonus['codes'][1]:.0f} codes are in use then, where {bonus['codes'][0]:.0f} were",
        "held-out text needs {1:.3f} nats instead of {0:.3f}".format(*bonus["held-out text, nats"]),
        f"{lead(np.subtract(*bonus['ID'][::-1]))} on ID and {lead(np.subtract(*bonus['OOD'][::-1]))} on OOD",
        f"they are {before - np.mean([bonus['ID'][0], bonus['OOD'][0]]):.2f} lower on average",
        f"came to {again[0]:.3f}, {again[1]:.3f} and {again[2]:.3f} on ID, {np.mean(old - again):.2f} below table 1",
        f"moves by up to {np.ptp([old, again, new], 0).max():.2f} on ID",
        f"{best['GRPO token, 3e-4']} for tokens at 3e-4, and {best['GRPO latent, 1e-3']} for latent actions at 1e-3",
    ]


def code_texts():
    """Sentences of docs/results.md about the codes of the demo."""
    demo = read("demo")
    codes = {data: {about: np.array(n) for about, n in found.items()} for data, found in demo["codes"].items()}
    paired, text, after = codes.values()  # inferred on paired and on text-only data; chosen by the policy after RL
    used = [int((sum(found.values()) > 0).sum()) for found in (paired, text)]
    main = {about: text[about].argmax() for about in ("favourite words", "sayings")}
    share = [[found[about][k] / found[about].sum() for about, k in main.items()] for found in (text, after)]
    assert main["favourite words"] != main["sayings"]  # as the page says
    word = main["favourite words"]
    alone = text["favourite words"][word] / sum(text.values())[word]
    val = demo["codebook_val"]["text"]
    return [
        f"{used[0]} on paired data and {used[1]} on text-only data",
        f"needs {val['val_inferred']:.2f} nats a token with the inferred codes and {val['val_random']:.2f} with random",
        f"ones; the bare VLM needs {val['val_vlm']:.2f}",
        f"for {share[0][0]:.0%} of the favourite words, and another one for {share[0][1]:.0%} of the sayings' words",
        f"the policy says {share[1][0]:.0%} and {share[1][1]:.0%} of them with these two",
        f"Of the tokens with the code of the favourite words {alone:.0%} are favourite words",
    ]


def choice_texts():
    """Sentences of docs/results.md and docs/choices.md whose numbers are from choices.json."""
    choices = read("choices")
    runs, rl = choices["codebook"], choices["rl_settings"]
    vlm = [runs["vlm"]["val"][kind]["val_vlm"] for kind in ("paired", "text")]
    kept = rl["changes"]["**learning rate 1e-3, nothing else (kept)**"]
    gains = []
    for row in rl["changes"].values():
        for side in ("latent", "token"):
            if f"{side} A" in row and f"{side} B" in row:
                gains.append(min(row[f"{side} {task}"] - kept[f"{side} {task}"] for task in "AB"))
    compared = [
        f"The bare VLM has {vlm[0]:.3f} on paired rows and {vlm[1]:.3f} on text-only rows",
        f"{runs['release']['first_nll']:.1f} nats in the first step, where ours has {runs['vlm']['first_nll']:.2f}",
        f"stage 1 is {runs['mlp']['mse']:.2f} with it and {runs['vlm']['mse']:.2f} with ours",
        f"without any projection has {runs['vlm']['mse_identity']:.2f}",
    ]
    settings = [
        f"Before RL, task A: SFT {rl['before']['SFT']:.3f}, and the VLM as it is {rl['before']['Prompt']:.3f}",
        f"on both tasks by more than {math.ceil(100 * max(gains)) / 100:.2f}",
    ]
    return compared, settings


def bench_texts():
    bench = read("bench")
    rows = {(r["shape"], r["a"], r["b"]): r for r in bench["rows"]}
    cpu, second = (lambda a, b: rows["cpu", a, b]), (lambda a, b: rows["second", a, b])
    made = cpu("rollout", "generate")
    shares = [cpu(*ab)["share_of_matmul"] for ab in (("stage2", "stage2 plain"), ("stage3", "stage3 plain"))]
    shares.append(cpu("update", "update token")["share_of_matmul"])
    peak = cpu("rollout", "rollout plain")["peak"]
    fast = [1 / second(a, b)["ratio"] for a, b in (("stage2", "stage2 plain padded"), ("stage3", "stage3 plain padded"),
                                                  ("update", "update plain"))]  # fmt: skip
    return [
        f"the median of {bench['config']['reps']} runs",
        f"makes {made['tokens_per_second']:.0f} tokens a second",
        f"That is {made['share_of_floor']:.0%} of what",
        f"do {shares[0]:.0%}, {shares[1]:.0%} and {shares[2]:.0%} of the arithmetic",
        f"of `cpu` costs {cpu('rollout', 'rollout token')['ratio']:.2f} times the token rollout",
        f"On `second` the latent rollout costs {second('rollout', 'rollout token')['ratio']:.1f} times",
        f"stage 2 is {fast[0]:.1f} times as fast, stage 3 {fast[1]:.1f} times, the update {fast[2]:.1f} times",
        f"stage 2 of `cpu` is {1 / cpu('stage2', 'stage2 plain')['ratio']:.1f} times as fast",
        f"It takes {peak[0] / peak[1]:.1f} times the memory",
    ]


def mmrole_texts():
    real = read("real")
    end = real["logs"]["stage2"]["last"]
    return [
        f"Of its {real['records']['dialogues']:,} dialogues {sum(real['records']['refused'].values())} were refused",
        f"about {real['codebook_val']['text']['val_inferred']:.0f} nats a token",
        f"perplexity of {end['perplexity_paired']:.0f} on paired and {end['perplexity_text']:.0f} on text-only data",
    ]


def readme_texts():
    f = Found(read("results"))
    ahead = {test: lead(f.ahead(tests=[test])) for test in TESTS}
    lost = f.change("table2", "full", "without text-only data")
    rows = read("demo")["elsewhere"]["rows"]
    token, latent = (
        f"{rows[row]['ID']['ratio']:.3f} and {rows[row]['OOD']['ratio']:.3f}" for row in ("GRPO token", "GRPO latent")
    )
    return [
        f"an Intel Xeon had {token} with tokens, {latent} with codes",
        f"mean of the four algorithms, is {lead(f.ahead())}",
        f"{ahead['LS2']} on LS2",
        f"behind on LS1, by {ahead['LS1']}",
        f"the average falls by {np.mean(lost):.2f}",
    ]


def memory_texts():
    """Sentences of docs/gpu_node.md about the tables of memory.json."""
    from test_memory import TOLERANCE

    found = {size: read("memory")[size]["fits"] for size in ("3b", "7b")}

    def held(size, gpu):
        return [stage for stage, on in found[size].items() if on[gpu]["flags"] is not None]

    assert held("3b", "48") == held("7b", "141") == list(found["3b"])  # as the page says
    assert held("3b", "24") == ["1", "2"] and set(found["7b"]) - set(held("7b", "80")) == {"3 adapt"}
    needed = {on["80"]["flags"] for on in found["3b"].values()} | {on["141"]["flags"] for on in found["7b"].values()}
    assert needed == {""}
    fit = "On 80 GB the 3B model needs none. The 7B model needs GPUs of 141 GB, and then none either"
    return [f"they agree within {TOLERANCE:.0%}", fit]


def packed_texts():
    """Sentences of docs/data.md about the reader of packed text and about packing."""
    found = read("packed")
    one, ten, two = found["reader"]["1"], found["reader"]["10"], found["processes"]
    work = two["cpu_seconds"]["2"] - two["cpu_seconds"]["start"]
    more = work / two["cpu_seconds"]["1"]
    return [
        f"adds {one['mib']:.1f} MiB to a process that reads 1 GB of packed text, and {ten['mib']:.1f} MiB to one that "
        f"reads 10 GB ({ten['documents']:,} documents)",
        f"takes {one['ms']:.2f} ms of the processor with 1 GB and {ten['ms']:.2f} ms with 10 GB",
        f"One process packs {found['mb_per_cpu_second']:.1f} MB of text in a second of the processor",
        f"Two processes need {two['cpu_seconds']['start']:.0f} seconds of the processor to start. Then they need "
        f"{more:.2f} times as many for the same {two['mb']:.0f} MB as one does, {more / 2:.2f} times each",
        f"at a load of {two['load']:.0f}",
    ]


def reading_texts():
    """Sentences of docs/cost.md about reading pictures."""
    found = read("reading")
    small, large = found["sizes"]["640x480"], found["sizes"]["1280x960"]
    batch = found["config"]["batch"]
    waits = [batch * size["ms"] for size in (small, large)]
    return [
        f"one of 640 x 480 pixels ({small['kb']:.0f} kB) takes {small['ms']:.1f} ms of the processor",
        f"one of 1280 x 960 pixels ({large['kb']:.0f} kB) {large['ms']:.1f} ms",
        f"these are {small['share']:.0%} and {large['share']:.0%} of the processor's time for a step",
        f"computed to take {found['gpu_ms']:.0f} ms",
        f"its {batch} pictures take {waits[0]:.0f} ms or {waits[1]:.0f} ms to read",
        f"for each second of computing it would wait {waits[0] / found['gpu_ms']:.1f} or "
        f"{waits[1] / found['gpu_ms']:.1f} seconds",
        f"{small['ms_with_workers']:.1f} ms a picture remain",
    ]


def smol_texts():
    """Sentences of docs/smol.md about the run of `make smol`."""
    found = read("smol")
    report, rows = found["report"], found["rows"]
    losses, sides, speech = report["losses"], report["curves"], report["speech"]
    text, clone, shift = losses["text"], losses["clone"], report["projector"]["stage2"]
    fixed = {side: [point[1] for point in sides[f"GRPO {side}"]["fixed"]] for side in ("latent", "token")}
    cost = {side: sides[f"GRPO {side}"] for side in fixed}
    gib, picture, met = sides["peak_gib"], report["picture"], report["exposure"]
    latent, token = cost["latent"], cost["token"]
    models = ("Prompt", "GRPO token", "GRPO latent")
    again = {(model, t): speech[model][t]["repeated 4-grams"] for model in models for t in ("0.1", "1.0")}
    go, less = report["go on"]["BC latent"], report["ablations"]
    other, own = "of another character, another question", "the VLM, temperature 1"
    judges = {"now": found["judge"], "earlier": found["earlier"]["judge"]}
    fooled = {(judge, text): row["ratio"] for judge, rows in judges.items() for text, row in rows.items()}
    error = found["judge"][own]["std"] / found["judge"][own]["records"] ** 0.5
    learnt = {side: found["sixteen"][f"GRPO {side}"] for side in fixed}
    moves = {
        side: f"from {x['before']:.3f} to {x['after']:.3f}, a gain of {x['gain']:.3f} ± {x['error']:.3f}"
        for side, x in learnt.items()
    }
    runs = [rows, *(run["rows"] for run in found["former"].values())]
    leads = [run["GRPO latent"][t]["ratio"] - run["GRPO token"][t]["ratio"] for run in runs for t in ("ID", "OOD")]
    apart = max(np.ptp([run[row][test]["ratio"] for run in runs]) for row in rows for test in ("ID", "OOD"))
    easy = {side: found["earlier"]["rates"][side]["1e-4"] for side in fixed}
    return [
        f"costs {text['inferred'][0]:.2f} nats a token with the inferred codes, {text['vlm'][0]:.2f} under the bare "
        f"VLM and {text['random'][0]:.2f} with random codes",
        f"rises by {learnt['latent']['gain']:.3f} ± {learnt['latent']['error']:.3f} with latent actions and by "
        f"{learnt['token']['gain']:.3f} ± {learnt['token']['error']:.3f} with tokens",
        f"By those the latent side rises {moves['latent']}, and the token side {moves['token']}",
        f"The latent side's lead over the token side is between {lead(min(leads))} and {lead(max(leads))}",
        f"A row differs between the runs by up to {apart:.2f}",
        f"by the right character on something else has {fooled['now', 'of the character, on something else']:.2f} with "
        "this judge",
        f"the best of eight answers to a prompt has {report['learnt']['GRPO latent']['before']['top']:.2f}",
        f"of 48 tokens an answer has {found['length']:.1f} on average",
        f"has {fooled['earlier', other]:.2f}, more than the VLM's own answers with {fooled['earlier', own]:.2f}",
        f"such a text has {fooled['now', other]:.2f}",
        f"one by the right character on something else has {fooled['now', 'of the character, on something else']:.2f}",
        f"standard error of such a mean is about {error:.2f}",
        f"rose from {easy['latent'][0]:.3f} to {easy['latent'][-1]:.3f} with latent actions and from "
        f"{easy['token'][0]:.3f} to {easy['token'][-1]:.3f} with tokens",
        f"a little less, {less['without the projector']['text']['val_inferred']:.2f} nats a token instead of "
        f"{less['full']['text']['val_inferred']:.2f}",
        f"worse, {less['without text-only data']['paired']['val_inferred']:.2f} and "
        f"{less['without text-only data']['text']['val_inferred']:.2f} nats",
        f"takes {latent['s_update']:.1f} s with latent actions and {token['s_update']:.1f} s with tokens, a rollout "
        f"{latent['s_rollout']:.1f} s and {token['s_rollout']:.1f} s",
        f"stage 2 held {found['given_back']['stage2']:.1f} GiB and SFT {found['given_back']['sft']:.1f} GiB",
        f"at its peak {gib['rl_latent']:.1f} GiB with latent actions and {gib['rl_token']:.1f} GiB with tokens",
        f"goes from {rows['BC latent']['ID']['ratio']:.2f} before RL to "
        f"{rows['GRPO latent']['ID']['ratio']:.2f} on ID and from {rows['BC latent']['OOD']['ratio']:.2f} to "
        f"{rows['GRPO latent']['OOD']['ratio']:.2f} on OOD",
        f"at temperature 1 from {speech['BC latent']['1.0']['ratio']:.2f} to "
        f"{speech['GRPO latent']['1.0']['ratio']:.2f}",
        f"{again['GRPO latent', '0.1']:.0%} of the 4-grams of an answer are repeated after latent RL, "
        f"{again['GRPO token', '0.1']:.0%} after token RL, and {again['Prompt', '0.1']:.0%} under the bare VLM",
        f"At temperature 1 it is {again['GRPO latent', '1.0']:.0%}, {again['GRPO token', '1.0']:.0%} and "
        f"{again['Prompt', '1.0']:.0%}",
        f"guesses {clone['agree_demos']:.0%} of the codes of the demonstrations",
        f"{met['references']['agree']:.0%} of the codes of true answers, and {met['1.0']['agree']:.0%} of those of its "
        "own at temperature 1",
        f"is {shift['mse']:.2f} a dimension with P and {shift['identity']:.2f} without",
        f"moves a state by {shift['shift']:.0%} of its length",
        f"{picture['right']:.2f} nats a token with the right picture, {picture['another']:.2f} with another one and "
        f"{picture['none']:.2f} with none",
        f"The most faithful code says the VLM's own token in {go['share']:.0%} of the cases",
        f"some code says it in {go['any code']:.0%}",
    ]


def sentences():
    """{page: parts of sentences, with the numbers that they must have}"""
    compared, settings = choice_texts()
    return {
        "README.md": readme_texts(),
        "docs/results.md": claims() + table_texts() + code_texts() + compared,
        "docs/choices.md": settings,
        "docs/cost.md": bench_texts() + reading_texts(),
        "docs/mmrole.md": mmrole_texts(),
        "docs/gpu_node.md": memory_texts(),
        "docs/data.md": packed_texts(),
        "docs/smol.md": smol_texts(),
        "docs/atlas.md": atlas_texts(),
    }


# Numbers with a decimal point that are no results of this project.
TINY, TEMPERATURE = {"2.1"}, {"0.1"}  # millions of parameters of tiny/vlm; of sampling in the evaluation
OTHER_NUMBERS = {
    "README.md": {"2601.07516", "3.11"},  # the paper on arXiv; version of Python
    "docs/results.md": TINY | TEMPERATURE | {"1.15", "1.13", "0.86", "1.08", "1.04"},  # the paper's
    "docs/choices.md": TEMPERATURE | {"0.28"},  # DAPO's upper clip
    "docs/chat.md": TEMPERATURE,
    "docs/cost.md": {"2.13", "1.13"},  # version of torch; the paper's
    "docs/gpu_node.md": TEMPERATURE | {"3.11"},  # version of Python
    "docs/smol.md": TEMPERATURE,
    "docs/mmrole.md": TINY | TEMPERATURE,  # 0.1 is also the least judge ratio
}
DECIMAL = re.compile(r"(?<![\w.])[-+]?\d*\.\d+|\d ±")


# ----------------------------------------------------------------------------------------------------- the checks
def lines_of(page):
    """-> (prose, tables, code) of a page: lists of lines. Tables are kept apart by an empty line."""
    prose, tabled, code, fenced = [], [], [], False
    for line in PAGES[page].read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            code.append(line)
        elif line.startswith("|"):
            tabled.append(line)
        else:
            prose.append(line)
            tabled.append("")
    return prose, tabled, code


def words(text):
    return " ".join(text.split())


@pytest.mark.parametrize("page", WRITTEN)
def test_tables_of_results_are_those_of_the_files(page):
    text = PAGES[page].read_text()
    for table in tables().get(page, []):
        assert table in text, f"{page} does not show\n{table}\nRun `PYTHONPATH=. python tests/test_docs.py`."


def test_the_files_of_the_tables_are_those_of_results_json():
    for name, text in results_tables(read("results")).items():
        assert (RESULTS / f"{name}.md").read_text().strip() == text


@pytest.mark.parametrize("page", WRITTEN)
def test_no_other_table_has_a_decimal_number(page):
    shown = [line for table in tables().get(page, []) for line in table.splitlines()]
    for line in lines_of(page)[1]:
        assert line in shown or not DECIMAL.search(line), f"{page}: no result file gives this row: {line}"


@pytest.mark.parametrize("page", WRITTEN)
def test_sentences_have_the_numbers_of_the_files(page):
    text = words(" ".join(lines_of(page)[0]))
    for sentence in sentences().get(page, []):
        assert words(sentence) in text, (
            f"{page} does not say: {sentence}. Run `PYTHONPATH=. python tests/test_docs.py`."
        )


@pytest.mark.parametrize("page", WRITTEN)
def test_no_other_sentence_has_a_decimal_number(page):
    text = words(re.sub(r"\]\([^)]*\)", "]", "\n".join(lines_of(page)[0])))
    for sentence in sorted(sentences().get(page, []), key=len, reverse=True):
        text = text.replace(words(sentence), " ")
    left = set(DECIMAL.findall(text)) - OTHER_NUMBERS.get(page, set())
    assert not left, f"{page}: where do these numbers come from? {sorted(left)}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = PAGES[page].read_text()
    links = re.findall(r"\]\(([^)\s]+)\)|^\[[^]]+\]: (\S+)|src=\"([^\"]+)\"", text, re.M)
    for link in map("".join, links):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = PAGES[page].parent / path if path else PAGES[page]
        assert target.exists(), f"{page}: {link} leads nowhere"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads}, f"{page}: {link}"


@pytest.mark.parametrize("page", WRITTEN)
def test_lines_are_short_and_name_no_machine(page):
    prose, _, code = lines_of(page)
    for line in prose + code:
        assert len(line) <= 120, f"{page}: {line}"
    assert not re.search(r"(^|[\s(`\"'])/(work|tmp|root|home)/", PAGES[page].read_text(), re.M), page


def test_the_readme_is_a_front_door():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_flags_that_exist(page):
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines_of(page)[2]))
    for line in text.splitlines():
        for module, flags in re.findall(r"((?:-m \w+\.\w+|\w+\.py))((?: [^#]*)?)", line.split("#")[0]):
            file = ROOT / (module[3:].replace(".", "/") + ".py" if module.startswith("-m") else module)
            assert file.exists() or module == "world.py", f"{page}: {line}"
            if file.exists() and "class Config" in (source := file.read_text()):
                config = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Config")
                known = {n.target.id for n in config.body if isinstance(n, ast.AnnAssign)} | {"preset", "help"}
                for base in (KeepsStates, Judging):
                    if config.bases and config.bases[0].id == base.__name__:
                        known |= {f.name for f in fields(base)}
                for flag in re.findall(r"--([a-z-]+)", flags):
                    assert flag.replace("-", "_") in known, f"{page}: {module} has no --{flag}"


def rows_of_faults():
    """The rows of docs/faults.md -> [(fault, what happens, test)]"""
    lines = [
        line.strip("|").split(" | ") for line in PAGES["docs/faults.md"].read_text().splitlines() if line[:1] == "|"
    ]
    return [tuple(cell.strip() for cell in line) for line in lines if len(line) == 3 and line[0].strip() != "fault"]


def test_every_fault_names_tests_that_exist():
    known = {f"tests/{p.name}": set(re.findall(r"^def (test_\w+)", p.read_text(), re.M)) for p in TEST_FILES}
    assert len(rows_of_faults()) > 50
    for fault, _, tests in rows_of_faults():
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", tests)
        assert named, f"docs/faults.md: no test shows what happens at: {fault}"
        assert len(named) == tests.count("`") / 2, f"docs/faults.md: not the name of a test: {tests}"
        for file, name in named:
            assert name in known.get(file, ()), f"docs/faults.md: there is no {file}::{name}"


# ------------------------------------------------------------------------------------------------- after a new run
def replace_table(text, table):
    """-> (text with this table in place of those that have its head and its first row's name, their number)"""
    head, line, first = table.splitlines()[:3]
    begin = re.escape(f"{head}\n{line}\n{first.split(' | ')[0]} |")
    return re.subn(rf"{begin}.*\n(\|.*\n)*", lambda match: table + "\n", text)


def replace_sentence(text, sentence):
    """-> (text with this sentence in place of those that differ in numbers and line breaks alone, their number)"""
    parts = sentence.split()
    any_number = [r"[-+]?[\d.,]*\d".join(map(re.escape, re.split(r"[-+]?[\d.,]*\d", part))) for part in parts]

    def filled(match):
        return "".join(part + space for part, space in zip(parts, (*match.groups(), "")))

    return re.subn(r"(\s+)".join(any_number), filled, text)


def write_pages():
    """Write the files of the tables, and put tables and numbers into the pages where older ones stand."""
    for name, text in results_tables(read("results")).items():
        (RESULTS / f"{name}.md").write_text(text + "\n")
    for page in WRITTEN:
        before = text = PAGES[page].read_text()
        todo = [(replace_table, x) for x in tables().get(page, [])]
        todo += [(replace_sentence, x) for x in sentences().get(page, [])]
        for replace, new in todo:
            text, n = replace(text, new)
            if n != 1:
                print(f"{page}: this should stand there once, and stands there {n} times:\n{new}\n")
        if text != before:
            PAGES[page].write_text(text)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    write_pages()
