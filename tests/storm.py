"""Runs of the stages that are killed at any moment, and run again with the same command until they are finished.

Each process of a run forks from a server that has imported torch and the stages and has computed nothing. Such a start
takes a fifth of a second, an ordinary one five seconds.

    python tests/storm.py WORK.json     # undisturbed: [[module, flags], ...], one after the other; also under torchrun
"""

import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkpoint  # noqa: E402
import common  # noqa: E402

for needed in ("stage1_projector", "stage2_codebook", "stage3_bc", "stage4_latent_rl", "helpers"):
    import_module(needed)
for loaded_late in ("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "torch.utils.serialization"):
    import_module(loaded_late)
IMPORTED_BY = os.getpid()
LONGEST = 300  # seconds that a run may take; on a quiet machine it takes a few


# -------------------------------------------------------------------------------------------------- inside a process
def child(module, argv, env, note, die):
    """What a process does: main of a stage. Its words go to NOTE.txt, what it has reached to NOTE.events."""
    if os.getpid() == IMPORTED_BY:
        raise RuntimeError("the server has not imported the stages")
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # of its workers, as users have it; this process has another
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process would leave behind
    said = os.open(f"{note}.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    watch(os.open(f"{note}.events", os.O_CREAT | os.O_APPEND | os.O_WRONLY), die)
    common.run(lambda: import_module(module).main(argv))


def watch(events, die):
    """Write '.' at each row of the log, '(' and ')' around each save. die: (number of the save, how, its argument)."""
    log, save, number = common.Log.__call__, checkpoint.save, itertools.count(1)

    def logged(*args, **kw):
        log(*args, **kw)
        os.write(events, b".")

    def saved(*args, **kw):
        os.write(events, b"(")
        if die and next(number) == die[0]:
            die[1](events, die[2])
        save(*args, **kw)
        sys.settrace(None)
        os.write(events, b")")

    common.Log.__call__, checkpoint.save = logged, saved


IN_SAVE = (checkpoint.save.__code__, checkpoint.write.__code__)
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def at_point(events, k):
    """Die at the k-th point (from 0) inside the save that begins now: in front of each line of `save` and `write`, and
    of each change of the file system in what they call. Each point that is passed writes 'p'."""
    points = itertools.count()

    def point():
        if next(points) == k:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(events, b"p")

    def line(_, event, __):
        if event == "line":
            point()
        return line

    def audit(event, _):
        if event in CHANGES and sys.gettrace():
            point()

    sys.addaudithook(audit)
    sys.settrace(lambda frame, *_: line if frame.f_code in IN_SAVE else None)


def at_byte(_, n):
    """Die in the middle of a write: of the first file that would be longer than n bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


# ---------------------------------------------------------------------------------------------------- from outside
def server():
    """-> the context whose processes fork from the server, which is ready."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)  # for the server, which is told of no other
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["storm"])
    first = context.Process(target=os.getpid)
    first.start()
    first.join()
    return context


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def join(processes, seconds):
    """Wait for them, at most so long -> have all of them ended?"""
    end, left = time.monotonic() + seconds, list(processes)
    while left and time.monotonic() < end:
        wait([p.sentinel for p in left], max(0.0, end - time.monotonic()))
        left = [p for p in left if p.exitcode is None]
    return not left


@dataclass
class Run:
    """A command: main of `module` with the flags `argv`, on so many ranks, in the folder `out`."""

    context: object
    module: str
    argv: list
    out: Path
    ranks: int = 1
    seconds: float | None = None  # that the last `finish` took

    def start(self, die=None):
        """-> its processes. die: what rank 0 dies of, see `watch`."""
        port, processes = free_port(), []
        for rank in range(self.ranks):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "MASTER_PORT": port}
            env = {k: str(v) for k, v in env.items()} | {"MASTER_ADDR": "127.0.0.1"} if self.ranks > 1 else {}
            self.file("events", rank).unlink(missing_ok=True)
            given = (self.module, [*self.argv, "--out", str(self.out)], env, f"{self.out}.{rank}", die)
            processes.append(self.context.Process(target=child, args=given))
            processes[-1].start()
            die = None
        return processes

    def file(self, name, rank):
        return Path(f"{self.out}.{rank}.{name}")

    def events(self, rank=0):
        file = self.file("events", rank)
        return file.read_text() if file.exists() else ""

    def reached(self):
        """-> what rank 0 did last: 'starting', 'training' or 'saving'."""
        last = self.events()[-1:]
        if not last:
            return "starting"
        return "saving" if last in "(p" else "training"

    def elsewhere(self, out):
        """-> the same command with another folder."""
        return replace(self, out=Path(out))

    def die(self, die):
        """Run it until rank 0 has died so, see `watch`. The others are ended."""
        processes = self.start(die)
        ended = join(processes[:1], LONGEST)
        self.kill(processes, [])
        assert ended and processes[0].exitcode < 0, f"{self.out}: it should have died"

    def until_it_trains(self, processes):
        """Wait for rank 0's first row of the log."""
        while not self.events() and any(p.exitcode is None for p in processes):
            time.sleep(0.002)

    def check_ended(self, processes):
        if any(p.exitcode for p in processes):
            said = "".join(self.file("txt", k).read_text()[-2000:] for k in range(self.ranks))
            raise AssertionError(f"{self.out.name}: exit status {[p.exitcode for p in processes]}\n{said}")

    def finish(self):
        """Run it until it is finished -> seconds."""
        began, processes = time.monotonic(), self.start()
        if not join(processes, LONGEST):
            for p in processes:
                p.kill()
            join(processes, LONGEST)
        self.check_ended(processes)
        self.seconds = time.monotonic() - began
        return self.seconds

    def kill(self, processes, victims):
        """SIGKILL some; the others get SIGTERM and then SIGKILL, as from torchrun. -> was any of them killed?"""
        for p in victims:
            p.kill()
        join(victims, LONGEST)
        for p in processes:
            p.terminate()
        if not join(processes, 1):
            for p in processes:
                p.kill()
            join(processes, LONGEST)
        return any(p.exitcode == -signal.SIGKILL for p in victims)

    def step(self):
        """-> the newest checkpoint's step (0: there is none). DataError if it is damaged."""
        newest = checkpoint.latest(self.out)
        return checkpoint.read(newest, True)[1]["step"] if newest else 0


def storm(run, kills, reference, seed, whole=None):
    """Kill a run so many times, a fifth while it starts, the others while it trains and saves, at random moments; and
    run it again each time. A finished one is thrown away until all kills have been made.

    whole: seconds of a run that nothing disturbs; None: they are measured.
    -> Counter {what rank 0 was doing: kills}, finished runs, what differed from the folder `reference`."""
    rng, fell, finished, different = random.Random(seed), Counter(), 0, set()
    whole, steps = whole or run.finish(), int(checkpoint.latest(reference).name[5:])
    while True:
        before = run.step()
        if before and checkpoint.read_state(run.out)["finished"]:
            finished, different = finished + 1, different | differences(run.out, reference)
            whole *= 0.8  # it was quicker than its kill; the machine may have more time by now
            if fell.total() == kills:
                return fell, finished, different
            shutil.rmtree(run.out)
            before = 0
        if fell.total() == kills:
            run.finish()
            continue
        processes = run.start()
        if rng.random() < 0.2:
            join(processes, rng.uniform(0, whole / 2))
        else:
            run.until_it_trains(processes)  # that is about half of such a short run
            join(processes, rng.uniform(0, whole / 2 * (1 - before / steps)))
        alive = [p for p in processes if p.exitcode is None]
        run.check_ended([p for p in processes if p not in alive])
        if alive and run.kill(processes, rng.sample(alive, rng.randint(1, len(alive)))):
            fell[run.reached()] += 1
            whole *= 1.05
        assert run.step() >= before, "a kill took a checkpoint away"


# ---------------------------------------------------------------------------------------------------------- equality
def equal(a, b):
    """Bit-equal: tensors, and what holds them."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


PLACE = {"config": None, "peak_gib": None}  # of a state: paths and memory


def left_behind(out):
    """-> {what: value} of a finished run: all that must be the same whenever and wherever it was interrupted."""
    found = {}
    for name, newest in (("", checkpoint.latest(out)), ("best ", checkpoint.latest(out / checkpoint.BEST))):
        if newest:
            found[f"{name}state.json"] = json.loads((newest / "state.json").read_text()) | PLACE
            found[f"{name}weights"] = load_file(newest / "weights.safetensors")
    found["optimizer.pt"] = torch.load(checkpoint.latest(out) / "optimizer.pt", weights_only=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k != "seconds" and not k.startswith("s_")} for row in rows]
    found["steps of the log"] = [row["step"] for row in rows]
    for name in sorted({k for row in rows for k in row}):
        found[f"{name} of the log"] = [row.get(name) for row in rows]
    return found


def differences(out, reference):
    """-> names of what is not bit-equal in two finished runs."""
    a, b = left_behind(Path(out)), left_behind(Path(reference))
    return {name for name in a.keys() | b.keys() if name not in a or name not in b or not equal(a[name], b[name])}


if __name__ == "__main__":
    for stage, flags in json.loads(Path(sys.argv[1]).read_text()):
        import_module(stage).main(flags)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
