"""What makes `make smol` quick: the seconds of a step in float32, in bfloat16, and with the frozen VLM's states kept.

Each stage of a finished run takes a few steps more, with that run's own settings, from where it began. The states are
kept in one run and read in the next; the seconds are the second one's. Seconds are of the clock, a median over steps,
the first one left out, with one thread: nothing else should run on that core.

    python -m studies.smol_speed --run runs/smol --out runs/smol/speed.json
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import checkpoint
import common
from data import DataError

STEPS = 7
# name: (script, folder of the finished run, settings for STEPS steps of this part)
PARTS = {
    "stage 1": ("stage1_projector", "stage1", {"steps": STEPS}),
    "stage 2, with pictures": ("stage2_codebook", "stage2", {"steps_a": STEPS, "steps_b": 0, "val": 4}),
    "stage 2, with text": ("stage2_codebook", "stage2", {"steps_a": 0, "steps_b": STEPS, "val": 4}),
    "stage 3, cloning": ("stage3_bc", "stage3", {"steps_clone": STEPS, "steps_adapt": 0}),
}


def take(script, settings):
    """Run a stage in a process of its own -> the median seconds of its steps."""
    flags = [x for name, value in settings.items() for x in ("--" + name.replace("_", "-"), str(value))]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, f"{script}.py", *flags], env=env, capture_output=True, text=True)
    if done.returncode:
        raise DataError(f"{script}.py ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    rows = common.read_metrics(settings["out"])
    return statistics.median(b["seconds"] - a["seconds"] for a, b in zip(rows, rows[1:]))


def measure(run, part, work):
    """-> {way: seconds of a step} of one part."""
    script, folder, few = PARTS[part]
    settings = checkpoint.read_state(run / folder)["config"] | few
    kept = {"dtype": "bfloat16", "states": str(work / "states")}
    ways = {"float32": {"dtype": "float32", "states": ""}, "bfloat16": {"dtype": "bfloat16", "states": ""}}
    ways |= {"to be kept": kept, "bfloat16, states kept": kept}
    found = {way: take(script, settings | change | {"out": str(work / way)}) for way, change in ways.items()}
    shutil.rmtree(work)
    found.pop("to be kept")  # it computes them, as the run without any does
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/smol", type=Path, help="folder of the finished run")
    parser.add_argument("--out", default="runs/smol/speed.json", type=Path, help="file to write")
    args = parser.parse_args(argv)
    found = {}
    for part in PARTS:
        found[part] = measure(args.run, part, args.run / "speed")
        print(part, found[part], flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    common.run(main)
