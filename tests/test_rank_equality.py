"""One, two and four ranks with the same global batch: the same losses and the same moves of the weights.

Every stage, both sides, four algorithms, steps in parts (--micro), dialogues of different lengths, ranks on which no
token counts. What is compared is how far the weights moved, relative to the move: a step is so small that weights
themselves would be alike whatever happened."""

import importlib
import json

import pytest
import torch
from helpers import torchrun, weights

import common

GLOBAL = 4  # rows a step of all ranks together
IN_TURN = """
import importlib, json, sys
import torch.distributed as dist
sys.path[:0] = [".", "tests"]
for stage, flags in json.load(open(sys.argv[1])):
    importlib.import_module(stage).main(flags)
dist.destroy_process_group()
"""
STAGES = ("projector", "codebook", "policy", "sft")
RL = [f"{loss} {side}" for side in ("latent", "token") for loss in ("grpo", "dr_grpo", "dapo", "bnpo")]


class Work:
    """All runs: {name: (module, flags without those for the rows, the flags for the rows, flags of a run that goes
    nowhere)}."""

    def __init__(self, flags, runs, world):
        stage1 = [*flags.paired[:2], "--paired", mixed_rows(world), "--steps", "3"]
        book = [*flags.book, "--projector", f"{runs}/1", "--steps-a", "2", "--steps-b", "2"]
        clone = [*flags.clone, "--init", f"{runs}/2", "--steps-clone", "2", "--steps-adapt", "2"]
        sft = [*flags.sft, "--steps-adapt", "3"]
        rl = [*flags.rl, "--group", "4", "--steps", "3", "--max-new", "8"]
        one = ["--steps-clone", "1", "--steps-adapt", "0", "--lr", "0"]
        self.all = {
            "projector": ("stage1_projector", stage1, ["--batch"], ["--steps", "1", "--lr", "0"]),
            "codebook": ("stage2_codebook", book, ["--batch"], ["--steps-a", "1", "--steps-b", "0", "--lr", "0"]),
            "policy": ("stage3_bc", clone, ["--batch", "--batch-adapt"], one),
            "sft": ("stage3_bc", sft, ["--batch-adapt"], ["--steps-adapt", "1", "--lr-adapt", "0"]),
        }
        for name in RL:
            loss, side = name.split()
            init, rate = (f"{runs}/loud", "1e-3") if side == "latent" else (f"{runs}/sft", "1e-4")
            own = ["--actions", side, "--init", init, "--loss-type", loss, "--lr", rate]
            self.all[name] = ("stage4_latent_rl", [*rl, *own], ["--batch"], ["--steps", "1", "--lr", "0"])

    def command(self, name, ranks, out, micro=0, nowhere=False):
        """-> (module, flags) of a run on so many ranks, into out/name."""
        module, argv, rows, still = self.all[name]
        size = [x for flag in rows for x in (flag, str(GLOBAL // ranks))]
        last = still if nowhere else []
        return module, [*argv, *size, "--micro", str(micro), *last, "--out", f"{out}/{name}"]


def mixed_rows(world):
    """A file in which every other row has no image: with one row a rank, some ranks then count no token in stage 1."""
    paired, text = ((world / f"{name}.jsonl").read_text().splitlines()[:12] for name in ("paired", "text"))
    path = world / "mixed.jsonl"
    path.write_text("\n".join(line for pair in zip(paired, text) for line in pair) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def work(flags, runs, world):
    return Work(flags, runs, world)


@pytest.fixture(scope="module")
def alone(work, tmp_path_factory):
    """alone(name): (the run of one rank, one that ends where it began), made when they are asked for."""
    folders = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("start")

    def run(name):
        for out, nowhere in zip(folders, (False, True)):
            if not (out / name).exists():
                module, argv = work.command(name, 1, out, nowhere=nowhere)
                importlib.import_module(module).main(argv)
        return [out / name for out in folders]

    return run


def launch(work, out, ranks, micro):
    """All runs, one launch, since starting takes longer than running."""
    (out / "in_turn.py").write_text(IN_TURN)
    (out / "work.json").write_text(json.dumps([work.command(name, ranks, out, micro) for name in work.all]))
    torchrun([f"{out}/in_turn.py", f"{out}/work.json"], ranks)
    return out


@pytest.fixture(scope="module")
def two(work, tmp_path_factory):
    return launch(work, tmp_path_factory.mktemp("two"), 2, micro=1)


@pytest.fixture(scope="module")
def four(work, tmp_path_factory):
    return launch(work, tmp_path_factory.mktemp("four"), 4, micro=0)


TOSSED = 10  # of more than 60,000 weights


def far(tensors):
    return sum(x.double().norm() ** 2 for x in tensors).sqrt().item()


def far_but_few(tensors):
    """The same without the TOSSED largest numbers. Adam divides a gradient by its own size, so where it is nothing but
    rounding a weight takes a whole step to either side. That happens to a few of them, and not to the same ones each
    time."""
    x = torch.cat([x.double().flatten() for x in tensors])
    return x.abs().sort().values[:-TOSSED].norm().item()


def moved_and_apart(name, alone, many):
    """-> how far one rank moved the weights, and how far from it the others ended, both over all tensors."""
    one, still = (weights(run) for run in alone(name))
    two = weights(many / name)
    assert set(one) == set(two)
    return far(one[k] - still[k] for k in one), far_but_few([one[k] - two[k] for k in one])


def logged(run):
    """What a run logged, without the seconds; a list as one number for each place in it."""
    rows = common.read_metrics(run)
    for row in rows:
        row |= {f"use {k}": count for k, count in enumerate(row.pop("use", ()))}
    return [{k: v for k, v in row.items() if k != "seconds" and not k.startswith("s_")} for row in rows]


def assert_alike(name, alone, many):
    """The same moves of the weights, to a thousandth, and the same numbers in the log."""
    moved, apart = moved_and_apart(name, alone, many)
    assert moved > 0.05 and apart < 1e-3 * moved
    for one, two in zip(logged(alone(name)[0]), logged(many / name), strict=True):
        assert one == pytest.approx(two, rel=1e-5, abs=1e-5)


def assert_bnpo(name, alone, many):
    """It divides by the tokens of each rank's own batch, as its authors have it: another gradient, of the same data."""
    moved, apart = moved_and_apart(name, alone, many)
    assert moved > 0.05 and 0.01 * moved < apart < moved
    one, two = (logged(run)[0] for run in (alone(name)[0], many / name))
    same = ("reward", "judge_failed", "equal_groups", "length", "truncated", "kl", "entropy")
    assert {k: one[k] for k in same} == pytest.approx({k: two[k] for k in same}, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", [*STAGES, *RL])
def test_two_ranks_that_take_a_step_in_parts_equal_one(name, alone, two):
    (assert_bnpo if name.startswith("bnpo") else assert_alike)(name, alone, two)


@pytest.mark.all
@pytest.mark.parametrize("name", [*STAGES, *RL])
def test_four_ranks_equal_one(name, alone, four):
    (assert_bnpo if name.startswith("bnpo") else assert_alike)(name, alone, four)


def test_in_the_runs_compared_the_judge_fails_and_some_tokens_count_nowhere(alone):
    """Else the comparison would not see a rank that has nothing to say."""
    for side in ("latent", "token"):
        assert max(row["judge_failed"] for row in logged(alone(f"grpo {side}")[0])) > 0
    dropped = [row["equal_groups"] for row in logged(alone("dapo latent")[0])]
    assert max(dropped) > 0 or max(row["truncated"] for row in logged(alone("dapo latent")[0])) > 0
