"""Checkpoints: folders that are whole or not there, and runs that go on after any interruption.

    OUT/ckpt-STEP/weights.safetensors   what was trained
    OUT/ckpt-STEP/state.json            stage, step, finished, config, number of ranks, peak memory
    OUT/ckpt-STEP/optimizer.pt          state of the optimizer, and what else a stage goes on from
    OUT/best                            with a held-out reward: the best checkpoint so far, a folder of the same form
    OUT/metrics.jsonl                   the log; a run that goes on cuts it back to the checkpoint's step
    OUT/lock                            held by the process that writes here; the system frees it when that process ends

Nothing that is loaded can run code: safetensors, JSON, and torch.load with weights_only=True.
"""

import fcntl
import json
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import DataError

BEST = "best"
# memory, time and place alone
MAY_CHANGE = ("out", "save_every", "keep", "micro", "checkpointing", "timeout", "states", "states_gib")
MAY_CHANGE += ("workers", "log")
MAY_CHANGE += ("judge_key", "judge_parallel", "judge_timeout", "judge_retries", "judge_fail", "judge_cache")
MAY_CHANGE += ("judge_price_in", "judge_price_out", "judge_reasoning")  # a model takes one kind of request alone


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    if rank() == 0:
        tqdm.write(text)


# -------------------------------------------------------------------------------------------------------- write
def save(out, step, tensors, state, optimizer=None, extra=None, keep=2):
    """Write out/ckpt-STEP, whole or not at all: it is filled under another name, then renamed.

    The newest `keep` checkpoints stay. extra: tensors, numbers and lists that the stage needs to go on. Rank 0
    writes, the others wait. A full disk or a read-only folder is a DataError; the checkpoints from before stay."""
    failed = None
    if rank() == 0:
        try:
            write(Path(out), step, tensors, {"ranks": world_size(), "peak_gib": peak_gib()} | state, optimizer, extra)
            found = checkpoints(out)
            later = [p for p in found if number(p) > step]  # damaged: the run has gone back behind them
            for old in later + found[len(later) + keep :]:
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError, RuntimeError) as e:  # torch.save reports a full disk as a RuntimeError
            failed = DataError(
                f"--out {out}: the checkpoint of step {step} cannot be written ({first_line(e)}); make room"
            )
    if dist.is_initialized():
        dist.barrier()
    if failed:
        raise failed


def peak_gib():
    """The most memory that this process has held so far, in GiB: on the GPU if there is one, else on the host."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


def name_of(step):
    return f"ckpt-{step:06d}"


def write(out, step, tensors, state, optimizer, extra):
    new, name = out / "ckpt.new", out / name_of(step)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, new / "weights.safetensors")
    if optimizer is not None:
        going_on = {"optimizer": optimizer.state_dict(), "extra": extra}
        torch.save(going_on, new / "optimizer.pt")
    (new / "state.json").write_text(json.dumps({"step": step} | state, indent=1))
    shutil.rmtree(name, ignore_errors=True)
    new.rename(name)


def open_folder(out, flag="--out"):
    """Make a folder and see that it can be written to, before the work whose results go there. DataError if not."""
    if not str(out).strip():
        raise DataError(f"{flag}: is empty; give a folder")
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as e:
        raise DataError(f"{flag} {out}: cannot be written ({first_line(e)}); choose another folder") from None


# --------------------------------------------------------------------------------------------------------- read
def first_line(e):
    return str(e).strip().partition("\n")[0][:200]


def checkpoints(out):
    """-> the folders of the run's checkpoints, the newest first. They are sorted by number: 1000000 comes after
    999999."""
    found = [p for p in Path(out).glob("ckpt-*") if re.fullmatch(r"ckpt-\d+", p.name)]
    return sorted(found, key=number, reverse=True)


def number(folder):
    """-> the step of a checkpoint's folder."""
    return int(folder.name[5:])


def latest(out):
    """-> the folder of the newest checkpoint of a run, or None."""
    found = checkpoints(out)
    return found[0] if found else None


def read_state(out):
    """-> state.json of the newest checkpoint that has a readable one."""
    for folder in checkpoints(out):
        try:
            return check_state(json.loads((folder / "state.json").read_text()), folder)
        except (OSError, ValueError):
            continue
    raise DataError(f"{out}: no readable checkpoint there")


def check_state(state, folder):
    missing = [k for k in ("step", "stage", "finished", "config") if not isinstance(state, dict) or k not in state]
    if missing:
        raise DataError(f"{folder}/state.json: has no '{missing[0]}'")
    return state


def read(folder, with_optimizer):
    """-> (tensors, state, what optimizer.pt holds or None); DataError if a file is missing, cut off or not what it
    should be."""
    try:
        state = check_state(json.loads((folder / "state.json").read_text()), folder)
        tensors = load_file(folder / "weights.safetensors")
        going_on = None
        if with_optimizer:
            going_on = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
            if not isinstance(going_on, dict) or "optimizer" not in going_on:
                raise DataError("optimizer.pt is not one of this project")
    except DataError as e:
        raise DataError(f"{folder}: {e}") from None
    except (OSError, ValueError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as e:
        raise DataError(f"{folder}: damaged ({type(e).__name__}: {first_line(e)})") from None
    broken = [k for k, v in tensors.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise DataError(f"{folder}: '{broken[0]}' holds numbers that are not finite")
    return tensors, state, going_on


def newest(out, with_optimizer):
    """`read` of the newest checkpoint that is not damaged, or None if there is none at all.

    A damaged one is named on the console; if all are damaged, the newest's fault is the DataError."""
    faults = []
    for folder in checkpoints(out):
        try:
            found = read(folder, with_optimizer)
        except DataError as e:
            faults.append(e)
            continue
        for fault in faults:
            say(f"warning: {fault}; going back to {folder.name}")
        return found
    if faults:
        raise DataError(f"{faults[0]}; delete {Path(out)} and run it anew")
    return None


def load(out, flag, stages, vlm):
    """-> (tensors, state) of a FINISHED run of one of `stages` on this VLM; DataError names what is missing and the
    cure."""
    found = newest(out, with_optimizer=False) if out else None
    if found is None:
        cure = f"run {stages[0]}.py --out {out or 'FOLDER'} first"
        raise DataError(f"{flag} {out or '(not given)'}: no checkpoint there; {cure}")
    tensors, state, _ = found
    if state["stage"] not in stages:
        needed = " or ".join(stages)
        raise DataError(f"{flag} {out}: is a checkpoint of {state['stage']}, needed is one of {needed}")
    if not state["finished"]:
        where = f"{state['stage']} stopped at step {state['step']}"
        raise DataError(f"{flag} {out}: unfinished ({where}); run it again with the same --out to finish it")
    trained_with = state["config"]["vlm"]
    if Path(trained_with).resolve() != Path(vlm).resolve():
        raise DataError(f"{flag} {out}: was trained with --vlm {trained_with}, not {vlm}; give the same one")
    return tensors, state


def resume(out, stage, config, may_grow=(), with_optimizer=True):
    """-> (tensors, state, what optimizer.pt holds) of an earlier run in the same folder, or None.

    Refuses another config: what was trained with other settings is another run. MAY_CHANGE may change, so the folder
    may have been moved; the fields `may_grow` may become larger, and a path may be spelled in another way. Refuses
    another number of ranks."""
    found = newest(out, with_optimizer)
    if found is None:
        return None
    state = found[1]
    if state["stage"] != stage:
        raise DataError(f"--out {out}: holds a run of {state['stage']}; choose another folder")
    for name, value in config.items():
        before = state["config"].get(name)
        if name in MAY_CHANGE or same(before, value) or (name in may_grow and value >= before):
            continue
        flag = f"--{name.replace('_', '-')}"
        raise DataError(f"--out {out}: holds a run with another {flag} ({before}); choose another folder or delete it")
    if state.get("ranks", 1) != world_size():
        ranks = state.get("ranks", 1)
        raise DataError(
            f"--out {out}: was begun with {ranks} ranks, not {world_size()}; torchrun --nproc-per-node {ranks}"
        )
    return found


def same(a, b):
    """Equal values, two spellings of one path, or two servers: a judge may move, --judge-model says who it is."""
    if a == b:
        return True
    if all(isinstance(x, str) and x.startswith(("http://", "https://")) and "," not in x for x in (a, b)):
        return True
    return isinstance(a, str) and isinstance(b, str) and bool(a) and bool(b) and Path(a).resolve() == Path(b).resolve()


def load_into(module, tensors, where, needed=None):
    """Copy tensors into a module by name; DataError for a name or a shape that does not fit, or a needed one that is
    missing.

    needed: the top-level parts that must be there, each whole; None: all of them. A part that is not needed may be
    absent, but not half there: what is missing would stay random, in silence."""
    own = module.state_dict()
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise DataError(f"{where}: holds '{unknown[0]}', which this model does not; it is of another version or model")
    there = {k.split(".")[0] for k in tensors}
    missing = [k for k in own if k not in tensors and (needed is None or k.split(".")[0] in there | set(needed))]
    if missing:
        raise DataError(
            f"{where}: lacks {len(missing)} tensors, '{missing[0]}' among them; it is damaged or of another model"
        )
    wrong = [k for k, v in tensors.items() if v.shape != own[k].shape]
    if wrong:
        shapes = f"{tuple(tensors[wrong[0]].shape)}, not {tuple(own[wrong[0]].shape)}"
        raise DataError(f"{where}: '{wrong[0]}' has the shape {shapes}")
    module.load_state_dict(tensors, strict=False)


# ------------------------------------------------------------------------------------------------- interruptions
class Guard:
    """Around a run: one writer for its folder, and Ctrl-C or SIGTERM end the step, save and leave. A context manager.

    The lock is the system's own: it is gone when the process is, whatever ended it. A second signal leaves at once.
    With several ranks all stop after the same step, because they ask each other (`asked`)."""

    def __init__(self, out):
        self.out, self.file, self.before = out, None, {}
        self.signal = self.agreed = 0  # what this process was sent; what all ranks know of

    def __enter__(self):
        self.lock()
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.file:
            self.file.close()
            if os.listdir(self.out) == ["lock"]:  # refused before anything was written: leave no trace
                shutil.rmtree(self.out, ignore_errors=True)

    def lock(self):
        if rank() != 0:
            return
        open_folder(self.out)
        try:
            self.file = open(Path(self.out) / "lock", "w")
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            cure = "wait for it, or choose another folder"
            raise DataError(f"--out {self.out}: another process is writing there; {cure}") from None
        except OSError as e:
            raise DataError(f"--out {self.out}: cannot be written ({first_line(e)})") from None

    def note(self, number, _):
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number
        say("stopping after this step; once more to stop at once")

    def asked(self):
        """Is the run to stop? The same answer on every rank."""
        seen = torch.tensor(self.signal)
        if dist.is_initialized():
            seen = seen.cuda() if dist.get_backend() == "nccl" else seen
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        self.agreed = int(seen)
        return bool(self.agreed)

    def leave_if_asked(self):
        """After the checkpoint is written. A signal that came since `asked` waits for the next step: the other ranks
        may not have it yet, and would wait for this one."""
        if self.agreed:
            say("stopped and saved: the same command goes on from here")
            if dist.is_initialized():
                dist.destroy_process_group()
            sys.exit(128 + self.agreed)
