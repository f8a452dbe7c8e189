"""What a step costs: ours against the straightforward way, latent actions against tokens, on random weights.

A line of the table compares two cases. They run in turns in one process (A B A B ...): medians of --reps runs, after
one to warm up. Peak memory is measured in a process of its own: all that the models and the step take, beyond the
interpreter and its libraries. Nothing is downloaded.

studies/straightforward.py says what the straightforward way is. Its rows are padded to the maximum length, here twice
their own. (MMRole's dialogues of 350 to 600 tokens fill less than a third of the paper's 2,048.) A line without that
padding stands beside each line with it.

    python -m studies.bench                              # CPU, two shapes
    python -m studies.bench --device cuda --shape 3b     # Qwen2.5-VL-3B's shape

Both write runs/bench/results.json (all numbers), table.md and growth.png.
"""

import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import common
from common import option
from data import DataError
from plots import COLOURS
from studies.cases import SHAPES, Bench
from studies.straightforward import plain_products

ROOT = Path(__file__).parent.parent
WIDE = 151936  # the vocabulary of Qwen2.5-VL
GiB = 2**30


@dataclass
class Config:
    device: str = option("", "cpu or cuda; empty: cuda where there is one", choices=("", "cpu", "cuda"))
    shape: str = option("", f"one of {', '.join(SHAPES)}; empty: cpu and second, or 3b on cuda")
    reps: int = option(7, "timed runs of each case", least=1)
    threads: int = option(2, "CPU threads", least=1)
    out: str = option("runs/bench", "folder for results.json, table.md, growth.png")
    only: str = option("", "one case, once: prints its peak memory (how the benchmark calls itself)")
    vocab: int = option(0, "another vocabulary than the shape's; 0: the shape's own")


# ------------------------------------------------------------------------------------------------------------ the lines
@dataclass(frozen=True)
class Line:
    """What case A is measured against."""

    text: str
    b: str  # the other case
    target: float | None = None  # for time A / B
    target_memory: float | None = None  # for peak memory A / B


LINES = {  # case A -> its lines
    "stage2": [
        Line("stage 2 joint step, ours / straightforward", "stage2 plain padded", 0.5),
        Line("the same without padding", "stage2 plain"),
    ],
    "stage3": [
        Line("stage 3 step, ours / straightforward", "stage3 plain padded"),
        Line("the same without padding", "stage3 plain"),
    ],
    "rollout": [
        Line("rollout, ours / straightforward", "rollout plain", 0.5),
        Line("rollout, latent / token", "rollout token", 1.13),
        Line("rollout, latent / generate()", "generate"),
    ],
    "update": [
        Line("RL update, ours / straightforward", "update plain"),
        Line("RL update, latent / token", "update token", 0.35),
    ],
    "rl_step": [Line("whole RL step, latent / token", "rl_step token", 1.0, 0.6)],
}


GROWTH = (  # (what grows, the field of Shape, the case)
    ("stage 2 step, tokens a row", "row", "stage2"),
    ("rollout, new tokens", "new", "rollout"),
    ("RL update, new tokens", "new", "update"),
)


def lines(name):
    """The lines of one shape, with its own targets. `wide`: the first shape with Qwen2.5-VL's vocabulary."""
    if name == "wide":
        return {"stage2": [replace(LINES["stage2"][0], target_memory=0.4)]}
    if name != "second":
        return LINES
    own = dict.fromkeys(("stage2 plain padded", "stage3 plain padded", "update plain"), 1 / 3)
    return {a: [Line(x.text, x.b, own.get(x.b)) for x in rivals] for a, rivals in LINES.items() if a != "rl_step"}


# ---------------------------------------------------------------------------------------------------------------- time
def seconds(f, device):
    """What one call takes, by the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(fs, reps, device):
    """Run the functions in turns, reps times after one to warm up -> seconds [function][repetition]."""
    for f in fs:
        f()
    times = [[seconds(f, device) for f in fs] for _ in range(reps)]
    return [list(t) for t in zip(*times)]


def flops(f):
    with plain_products(), FlopCounterMode(display=False) as counter:  # it does not know oneDNN's products
        f()
    return counter.get_total_flops()


def machine(device):
    """-> (FLOP/s of a large matrix product, bytes/s read by a large sum), measured here, in the VLM's dtype."""
    cuda = device.type == "cuda"
    n, numbers = (8192, 2**27) if cuda else (2048, 2**25)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    x = torch.zeros(numbers, device=device)
    product, read = in_turns([lambda: a @ a, lambda: x.sum()], 7, device)
    return 2 * n**3 / min(product), 4 * numbers / min(read)


def measure(name, shape, device, reps):
    """Every line of one shape -> list of rows, still without memory. A case and its rivals run in turns."""
    bench, rows, (matmul, read) = Bench(shape, device), [], machine(device)
    weights = sum(p.numel() * p.element_size() for m in (bench.vlm.text, bench.vlm.head) for p in m.parameters())
    for a, rivals in lines(name).items():
        fs = [bench.ready(case) for case in (a, *(line.b for line in rivals))]
        mine, *others = [statistics.median(t) for t in in_turns(fs, reps, device)]
        for line, other in zip(rivals, others):
            row = {"shape": name, "line": line.text, "a": a, "b": line.b, "seconds": [mine, other]}
            row |= {"ratio": mine / other, "target": line.target, "target_memory": line.target_memory}
            rows.append(row)
            common.say(f"{name}: {line.text}: {mine:.3f} s / {other:.3f} s = {mine / other:.2f}")
        if a == "rollout":
            rows[-1]["tokens_per_second"] = len(bench.u_NT) * shape.new / mine
            rows[-1]["share_of_floor"] = shape.new * weights / read / mine  # the floor: all weights read once a token
        elif name != "wide":
            rows[-1]["share_of_matmul"] = flops(fs[0]) / mine / matmul
    return rows


def growth(shape, device):
    """Seconds of a step that grows: {what grows: {size: median}}, at half the shape's size, its own, and twice that."""
    found = {}
    for what, field, case in GROWTH:
        sizes = [getattr(shape, field) // 2 * k for k in (1, 2, 4)]
        fs = [Bench(replace(shape, **{field: size}), device).ready(case) for size in sizes]
        found[what] = {size: statistics.median(t) for size, t in zip(sizes, in_turns(fs, 3, device))}
    return found


# -------------------------------------------------------------------------------------------------------------- memory
def resident(key):
    """Bytes of this process, as Linux tells: key VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def peak_memory(shape, device, case):
    """Peak bytes of building and running a case twice, in this process.

    Of the head's loss: beyond its weight and its states, which are the same in any case."""
    Bench(SHAPES["tiny"], device).ready(case)()  # loads every library that the case needs
    loss_alone = case.startswith("head_loss")
    if device.type == "cuda":
        f = Bench(shape, device).ready(case)
        before = torch.cuda.memory_allocated() if loss_alone else 0
        torch.cuda.reset_peak_memory_stats()
        f()
        f()
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    f = Bench(shape, device).ready(case)
    if loss_alone:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    f()
    f()
    return resident("VmHWM") - before


def apart(cfg, jobs):
    """[(shape, case, vocabulary; 0: the shape's)] -> {job: peak bytes}, each measured in a process of its own.

    None where it does not fit, or cannot be measured."""

    def run(job):
        shape, case, vocab = job
        command = [sys.executable, "-m", "studies.bench", "--device", cfg.device, "--threads", "1"]
        command += ["--shape", shape, "--only", case, "--vocab", str(vocab)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return int(done.stdout.split()[-1]) if done.returncode == 0 else None

    with ThreadPoolExecutor(1 if cfg.device == "cuda" else 2) as pool:
        return dict(zip(jobs, pool.map(run, jobs)))


def add_memory(cfg, rows, first, vocab):
    """Give the rows of the first shape, and of `wide`, their "peak": bytes of A and of B; the others get none.

    -> {way: {vocabulary: peak bytes of the LM head's loss}}."""

    def jobs_of(row):
        if row["shape"] not in (first, "wide"):
            return []
        return [(first, case, WIDE if row["shape"] == "wide" else vocab) for case in (row["a"], row["b"])]

    ways, sizes = {"ours": "head_loss", "straightforward": "head_loss plain"}, (WIDE // 8, WIDE // 2, WIDE)
    wanted = [job for row in rows for job in jobs_of(row)]
    wanted += [(first, case, size) for case in ways.values() for size in sizes]
    peaks = apart(cfg, list(dict.fromkeys(wanted)))
    for row in rows:
        row["peak"] = [peaks[job] for job in jobs_of(row)]
    return {way: {size: peaks[first, case, size] or 0 for size in sizes} for way, case in ways.items()}


# -------------------------------------------------------------------------------------------------------------- report
def plot(grown, memory, path):
    fig = Figure(figsize=(13, 3), layout="constrained")
    *axes, last = fig.subplots(1, len(grown) + 1)
    for axis, (what, points) in zip(axes, grown.items()):
        x, y = [int(size) for size in points], list(points.values())
        axis.plot(x, y, "o-", color=COLOURS["latent"])
        axis.plot([0, x[-1]], [0, y[-1]], ":", color="grey")  # growth in proportion
        axis.set(title=what, ylabel="seconds")
    for (way, points), colour in zip(memory.items(), (COLOURS["latent"], "black")):
        x, y = [int(vocab) for vocab in points], [size / GiB for size in points.values()]
        last.plot(x, y, "o-", color=colour, label=way)
    last.set(title="LM-head loss, vocabulary", ylabel="GiB beyond weights and states")
    last.legend()
    for axis in (*axes, last):
        axis.set(xlim=0, ylim=0)
        axis.grid(alpha=0.25)
    fig.savefig(path, dpi=110)


def table(rows):
    """Rows -> Markdown."""

    def cell(value, target=None):
        if value is None:
            return ""
        return f"{value:.2f}" if target is None else f"{value:.2f} (<= {target:.2f})"

    head = "shape | line, A / B | A, s | B, s | time A / B (target) | A, GiB | B, GiB | memory A / B (target)"
    text = [f"| {head} |", "|" + "---|" * 8]
    for row in rows:
        a, b = [None if x is None else x / GiB for x in row["peak"]] or (None, None)
        ratio = None if None in (a, b) else a / b
        cells = [row["shape"], row["line"], *(f"{s:.3f}" for s in row["seconds"]), cell(row["ratio"], row["target"])]
        cells += [cell(a), cell(b), cell(ratio, row["target_memory"])]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def shapes_of(cfg):
    """-> {name: Shape}, the first of which is the one whose memory and growth are measured."""
    names = [cfg.shape]
    if not cfg.shape:
        names = ["3b"] if cfg.device == "cuda" else ["cpu", "second"]
    if unknown := set(names) - set(SHAPES):
        raise DataError(f"--shape {unknown.pop()}: choose one of {', '.join(SHAPES)}")
    shapes = {name: replace(SHAPES[name], vocab=cfg.vocab or SHAPES[name].vocab) for name in names}
    first = shapes[names[0]]
    if first.vocab < WIDE:
        shapes["wide"] = replace(first, vocab=WIDE)
    return shapes


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    cfg.device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: there is no CUDA device here; leave it out to measure the CPU")
    device, shapes, began = torch.device(cfg.device), shapes_of(cfg), time.time()
    first = next(iter(shapes))
    torch.set_num_threads(cfg.threads)
    if cfg.only:
        print(peak_memory(shapes[first], device, cfg.only))
        return
    checkpoint.open_folder(cfg.out)
    rows = [row for name, shape in shapes.items() for row in measure(name, shape, device, cfg.reps)]
    grown = growth(shapes[first], device)
    memory = add_memory(cfg, rows, first, shapes[first].vocab)
    results = {"rows": rows, "growth": grown, "head_loss_bytes": memory, "config": asdict(cfg)}
    results |= {"shapes": {name: asdict(shape) for name, shape in shapes.items()}, "torch": torch.__version__}
    results["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    results["seconds"] = time.time() - began
    out = Path(cfg.out)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "table.md").write_text(table(rows) + "\n")
    plot(grown, memory, out / "growth.png")
    print(table(rows))


if __name__ == "__main__":
    common.run(main)
