"""Copy the end of a finished run's latent side to where it ships: what chat, evaluation and pages need, no more.

    RUN/stage3     -> OUT/stage3      projector, inverse dynamics, codebook, world model, policy before RL
    RUN/rl_latent  -> OUT/rl_latent   projector, codebook, world model, policy after RL

OUT has the lay-out of RUN, so whatever takes the one takes the other. The newest checkpoint of each stage is taken:
weights and state, without the optimizer. RL's log comes with it: it says how often each code was used at each step.

    make demo && python tiny/ship.py --run runs/demo --out tiny/agent
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint  # noqa: E402
import common  # noqa: E402
from data import DataError  # noqa: E402

STAGES = ("stage3", "rl_latent")


def finished(folder):
    """-> (tensors, state) of a finished stage's newest checkpoint.

    Raises DataError without one, and where the state names an absolute path: what ships must fit every machine."""
    found = checkpoint.newest(folder, with_optimizer=False)
    if found is None or not found[1]["finished"]:
        raise DataError(f"--run: {folder} holds no finished stage; run `make demo` first")
    tensors, state, _ = found
    for name, value in state["config"].items():
        if isinstance(value, str) and Path(value).is_absolute():
            raise DataError(f"--run: {folder} was made with --{name} {value}; make it again with a relative path")
    return tensors, state


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/demo", help="folder of a finished `make demo`")
    parser.add_argument("--out", default="tiny/agent", help="folder to write to")
    args = parser.parse_args(argv)
    stages = {name: finished(Path(args.run) / name) for name in STAGES}
    for name, (tensors, state) in stages.items():
        checkpoint.save(Path(args.out) / name, state["step"], tensors, state, keep=1)
        if name == "rl_latent":
            shutil.copy(Path(args.run) / name / "metrics.jsonl", Path(args.out) / name)
        print(f"{args.out}/{name}: step {state['step']}, {sum(x.numel() for x in tensors.values()):,} numbers")


if __name__ == "__main__":
    common.run(main)
