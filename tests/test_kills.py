"""Kills at any moment: the same command again ends where the run would have ended. `make test-all` has the storms."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import storm
from helpers import ROOT, TINY, shell, torchrun
from storm import Run

import checkpoint
from tiny.world import write_world

KILLS = 20  # of each stage and side, on one rank and on two
PARTS = ("projector", "codebook", "policy", "sft", "latent", "token")
BAD = json.dumps({"messages": []}) + "\n"


@pytest.fixture(scope="module")
def context():
    return storm.server()


@pytest.fixture(scope="module")
def commands(runs, tmp_path_factory):
    """{part: (module, flags)}: all that trains, a few steps each, on data in which some rows cannot be used."""
    out = tmp_path_factory.mktemp("parts")
    write_world(out, seed=0, paired=24, text=40, demos=12, prompts=8, tests=4)
    for name in ("paired", "text", "task_demos", "task_prompts"):
        rows = (out / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (out / f"{name}.jsonl").write_text("".join([rows[0], BAD, *rows[1:4], BAD, *rows[4:]]))
    vlm, every = ["--vlm", TINY], ["--save-every", "1"]
    paired = [*vlm, "--paired", f"{out}/paired.jsonl"]
    both = [*paired, "--text", f"{out}/text.jsonl"]
    book = [*both, "--codes", "16", "--inverse-blocks", "1", "--policy-blocks", "1", "--batch", "3", "--val", "4"]
    demos = ["--demos", f"{out}/task_demos.jsonl", "--batch-adapt", "3"]
    rl = [*vlm, "--prompts", f"{out}/task_prompts.jsonl", "--judge", "helpers:letters", "--batch", "2", "--group", "2"]
    rl += ["--max-new", "8", "--steps", "8", "--val", f"{out}/task_id.jsonl", "--eval-every", "3"]
    book += ["--window", "3", "--projector", f"{runs}/1", "--steps-a", "4", "--steps-b", "4"]
    clone = [*both, *demos, "--batch", "3", "--init", f"{runs}/2", "--steps-clone", "4", "--steps-adapt", "4"]
    sft = [*vlm, "--actions", "token", *demos, "--steps-adapt", "8"]
    return {
        "projector": ("stage1_projector", [*paired, "--batch", "3", "--steps", "12", *every]),
        "codebook": ("stage2_codebook", [*book, "--save-every", "2"]),
        "policy": ("stage3_bc", [*clone, *every]),
        "sft": ("stage3_bc", [*sft, "--save-every", "2"]),
        "latent": ("stage4_latent_rl", [*rl, "--resample", "1", "--init", f"{runs}/loud", *every]),
        "token": ("stage4_latent_rl", [*rl, "--actions", "token", "--init", f"{runs}/sft", "--save-every", "2"]),
    }


@pytest.fixture(scope="module")
def undisturbed(commands, tmp_path_factory):
    """undisturbed(ranks): the folder of all parts' runs, undisturbed, in processes that were started as users do."""
    done = {}

    def runs(ranks):
        if ranks not in done:
            out = done[ranks] = tmp_path_factory.mktemp(f"undisturbed-{ranks}")
            work = [(module, [*flags, "--out", f"{out}/{part}"]) for part, (module, flags) in commands.items()]
            (out / "work.json").write_text(json.dumps(work))
            argv = ["tests/storm.py", f"{out}/work.json"]
            torchrun(argv, ranks) if ranks > 1 else shell(*argv)
        return done[ranks]

    return runs


@pytest.fixture(scope="module")
def calm(context, commands, tmp_path_factory):
    """calm(part, ranks, *more flags): a finished Run that nothing disturbed, beside those that are killed."""
    done = {}

    def run(part, ranks, *more):
        if (part, ranks, more) not in done:
            module, flags = commands[part]
            done[part, ranks, more] = Run(context, module, [*flags, *more], tmp_path_factory.mktemp(part) / "x", ranks)
            done[part, ranks, more].finish()
        return done[part, ranks, more]

    return run


def survive(name, run, reference, kills, seed, whole=None):
    """A storm, told on the console. Kills must have hit runs at work, and nothing may differ."""
    began = time.monotonic()
    fell, finished, different = storm.storm(run, kills, reference, seed, whole)
    where, seconds = ", ".join(f"{v} {k}" for k, v in sorted(fell.items())), time.monotonic() - began
    print(f"{name}: {kills} kills ({where}), {finished} finished runs, {seconds:.0f} s, differences: {different or 0}")
    assert fell.total() == kills and fell["training"] + fell["saving"] > 0
    assert not different


def test_a_few_kills(calm, tmp_path):
    run = calm("codebook", 2)
    survive("codebook on 2", run.elsewhere(tmp_path / "x"), run.out, kills=2, seed=0, whole=run.seconds)


@pytest.mark.all
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("part", PARTS)
def test_a_storm_of_kills(context, commands, undisturbed, tmp_path, part, ranks):
    """On two ranks one is killed, or both. The run to compare with has been started as users do."""
    run = Run(context, *commands[part], tmp_path / part, ranks)
    survive(f"{part} on {ranks}", run, undisturbed(ranks) / part, KILLS, seed=PARTS.index(part))


# --------------------------------------------------------------------------------------------------- inside a save
@pytest.fixture(scope="module")
def halfway(calm, tmp_path_factory):
    """halfway(ranks): a Run of stage 1 that was killed as its third save began: the next one to save deletes the first
    of its two checkpoints."""
    done = {}

    def run(ranks):
        if ranks not in done:
            done[ranks] = calm("projector", ranks, "--steps", "4").elsewhere(tmp_path_factory.mktemp("halfway") / "x")
            done[ranks].die((3, storm.at_point, 0))
        return done[ranks]

    return run


def die_inside_save(calm, halfway, out, ranks, how, argument):
    """Rank 0 dies inside the save of step 3. No checkpoint is lost or damaged, and the run ends as if nothing was."""
    run = halfway(ranks).elsewhere(out)
    shutil.copytree(halfway(ranks).out, out)
    run.die((1, how, argument))
    assert run.step() in (2, 3)
    run.finish()
    assert not storm.differences(out, calm("projector", ranks, "--steps", "4").out), (how, argument)


@pytest.fixture(scope="module")
def points(halfway, tmp_path_factory):
    """How many points there are inside the save."""
    out = tmp_path_factory.mktemp("points") / "x"
    run = halfway(1).elsewhere(out)
    shutil.copytree(halfway(1).out, out)
    storm.join(run.start((1, storm.at_point, -1)), storm.LONGEST)
    return run.events().count("p")


def some_bytes(n):
    """So many sizes at which a file of this run is torn: its weights have about 265,000 bytes, the optimizer twice."""
    return random.Random(0).sample(range(5000, 500_000), n)


def test_a_kill_at_some_points_inside_save(calm, halfway, points, tmp_path):
    die_inside_save(calm, halfway, tmp_path / "killed", 1, storm.at_point, random.Random(0).randrange(points))
    die_inside_save(calm, halfway, tmp_path / "torn", 1, storm.at_byte, *some_bytes(1))


@pytest.mark.all
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_kill_at_every_point_inside_save(calm, halfway, points, tmp_path, ranks):
    print(f"{points} points inside save, {ranks} ranks")
    assert points > 20
    for k in range(points):
        die_inside_save(calm, halfway, tmp_path / f"{k}", ranks, storm.at_point, k)
    for n in some_bytes(10):
        die_inside_save(calm, halfway, tmp_path / f"torn-{n}", ranks, storm.at_byte, n)


# --------------------------------------------------------------------------------------------------------- signals
ONE_ALONE = pytest.param(signal.SIGTERM, (1,), marks=pytest.mark.all)


@pytest.mark.parametrize("number, told", [(signal.SIGINT, (0, 1)), ONE_ALONE])
def test_a_signal_on_two_ranks_saves_and_ends_both(calm, tmp_path, number, told):
    """Ctrl-C reaches both; a scheduler may tell one alone. Both leave after the same step, with its checkpoint."""
    run = calm("codebook", 2).elsewhere(tmp_path / "x")
    processes = run.start()
    run.until_it_trains(processes)
    for rank in told:
        os.kill(processes[rank].pid, number)
    assert storm.join(processes, storm.LONGEST)
    assert [p.exitcode for p in processes] == [128 + number] * 2
    said, steps = run.file("txt", 0).read_text(), run.events().count(".")
    assert "stopped and saved: the same command goes on from here" in said and "Traceback" not in said
    assert run.step() == steps < 8
    run.finish()
    assert not storm.differences(run.out, calm("codebook", 2).out)


@pytest.mark.all
def test_signals_at_any_moment_on_two_ranks(calm, tmp_path):
    """However close to a save, a phase's end or the run's: both leave together, or both go on together."""
    rng, run, calm_run, stopped = (
        random.Random(0),
        calm("codebook", 2).elsewhere(tmp_path / "x"),
        calm("codebook", 2),
        0,
    )
    while stopped < KILLS:
        processes = run.start()
        run.until_it_trains(processes)
        storm.join(processes, rng.uniform(0, 0.5))
        alive = all(p.exitcode is None for p in processes)
        for p in processes * alive:
            os.kill(p.pid, signal.SIGINT)
        assert storm.join(processes, storm.LONGEST)
        statuses = {p.exitcode for p in processes}
        assert statuses in ({0}, {130}), run.file("txt", 0).read_text()[-2000:]
        stopped += statuses == {130}
        if checkpoint.read_state(run.out)["finished"]:
            assert not storm.differences(run.out, calm_run.out)
            shutil.rmtree(run.out)


@pytest.mark.all
def test_ctrl_c_under_torchrun(commands, undisturbed, tmp_path):
    """The launcher passes the signal on and waits: both ranks save, and the same command goes on."""
    module, flags = commands["codebook"]
    command = [f"{module}.py", *flags, "--out", f"{tmp_path}/x"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    env, log = os.environ | {"OMP_NUM_THREADS": "1"}, tmp_path / "x" / "metrics.jsonl"
    with subprocess.Popen(
        [*launch, str(storm.free_port()), *command], cwd=ROOT, env=env, stderr=subprocess.STDOUT, stdout=subprocess.PIPE
    ) as launcher:
        while not log.exists() or not log.read_text():
            assert launcher.poll() is None
            time.sleep(0.01)
        launcher.send_signal(signal.SIGINT)
        said = launcher.communicate(timeout=storm.LONGEST)[0].decode()
    assert launcher.returncode and "stopped and saved" in said
    state = checkpoint.read_state(tmp_path / "x")
    assert not state["finished"] and state["step"] == len(log.read_text().splitlines())
    torchrun(command)
    assert not storm.differences(tmp_path / "x", undisturbed(2) / "codebook")


# --------------------------------------------------------------------------------------------------------- workers
def below(process):
    """-> the ids of the processes that this one has started, and that are at work."""
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # any process of the machine may end meanwhile
            state, parent, *_ = (p / "stat").read_text().rpartition(")")[2].split()
            if int(parent) == process.pid and state != "Z":
                found.append(int(p.name))
    return found


def at_work(pid):
    """Does this process still run? One that has ended and is not waited for yet counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids, seconds=30):
    """Have all of them ended, at the latest so many seconds from now?"""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(at_work(pid) for pid in pids):
            return True
        time.sleep(0.01)
    return False


TERMINATED = pytest.param(signal.SIGTERM, 143, marks=pytest.mark.all)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), TERMINATED, (signal.SIGKILL, -9)])
def test_workers_end_with_their_run_and_not_before(calm, tmp_path, number, status):
    """A signal may reach the workers, too, as Ctrl-C at a terminal does. The run saves all the same. After kill -9 of
    the run alone they end by themselves."""
    run = calm("codebook", 1).elsewhere(tmp_path / "x")
    run = replace(run, argv=[*run.argv, "--workers", "1"])
    processes = run.start()
    run.until_it_trains(processes)
    workers = below(processes[0])
    assert len(workers) == 1
    for pid in [processes[0].pid] + workers * (number != signal.SIGKILL):
        os.kill(pid, number)
    assert storm.join(processes, storm.LONGEST) and processes[0].exitcode == status and gone(workers)
    said = run.file("txt", 0).read_text()
    assert ("stopped and saved" in said) == (status > 0) and "error" not in said and "Traceback" not in said
    assert said.count("stopping after this step") == (status > 0)  # by the run alone
    run.finish()
    assert not storm.differences(run.out, calm("codebook", 1).out)


def test_a_run_whose_worker_is_killed_says_so_and_goes_on_with_the_same_command(calm, tmp_path):
    """On two ranks: the other rank ends as well, and its workers."""
    run = calm("codebook", 2).elsewhere(tmp_path / "x")
    run = replace(run, argv=[*run.argv, "--workers", "1"])
    processes = run.start()
    run.until_it_trains(processes)
    workers = [below(p) for p in processes]
    os.kill(workers[1][0], signal.SIGKILL)
    assert storm.join(processes, storm.LONGEST) and [p.exitcode for p in processes] == [1, 2]
    said = run.file("txt", 1).read_text()
    assert "error: rank 1: --workers 1: a process that reads rows was ended by a signal" in said
    assert "Traceback" not in said and gone(sum(workers, []))
    run.finish()
    assert not storm.differences(run.out, calm("codebook", 2).out)
