"""The log of a run: a progress bar, metrics.jsonl with a row for each step, and what --log asks for."""

import contextlib
import json
import math
import time
from pathlib import Path

from tqdm import tqdm

import checkpoint
from data import DataError
from tracking import track


class Log:
    """One progress bar with the numbers that matter and out/metrics.jsonl with all of them (rank 0 only).

    A run that goes on from step `start` first drops what was logged after it, so that each step stands in the file
    once. A full disk or a read-only folder is a DataError; a row that is torn by it is dropped later."""

    def __init__(self, out, name, start, steps, cfg=None):
        """cfg: of the stage, whose --log counts; None: that is 'none'."""
        self.rank0, self.path, self.tracker = checkpoint.rank() == 0, Path(out) / "metrics.jsonl", None
        if self.rank0:
            with self.writing():
                Path(out).mkdir(parents=True, exist_ok=True)
                cut_back(self.path, start)
                self.tracker = track(cfg, start, read_metrics(out))
                self.file = open(self.path, "a")
        self.bar = tqdm(
            total=steps, initial=start, desc=name, disable=not self.rank0, mininterval=1.0, dynamic_ncols=True
        )
        self.began = time.time()

    def __call__(self, step, shown=(), **metrics):
        """A number that is not finite is left out: JSON has no word for it. A list of counts goes to the file alone."""
        self.bar.update(step - self.bar.n)
        if self.rank0:
            lists = {k: v for k, v in metrics.items() if isinstance(v, list)}
            row = {k: round(float(v), 6) for k, v in metrics.items() if k not in lists}
            row = {k: v for k, v in row.items() if math.isfinite(v)}
            self.bar.set_postfix_str(" ".join(f"{k} {row[k]:.4g}" for k in shown if k in row), refresh=False)
            row = {"step": step, "seconds": round(time.time() - self.began, 3)} | row
            with self.writing():
                self.file.write(json.dumps(row | lists) + "\n")
                self.file.flush()
                if self.tracker:
                    self.tracker(row)

    @contextlib.contextmanager
    def writing(self):
        try:
            yield
        except OSError as e:
            cure = "make room, and the same command goes on from its last checkpoint"
            raise DataError(f"{self.path}: cannot be written ({e.strerror}); {cure}") from None

    def close(self):
        self.bar.close()
        if self.rank0:
            self.file.close()
            if self.tracker:
                self.tracker.close()


def whole_rows(path):
    """The rows of a metrics.jsonl; a torn one (full disk, power cut) is passed over."""
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            yield row


def cut_back(path, start):
    """Keep the rows up to step `start`, each once; none, not even of step 0, where a run begins anew."""
    if not path.exists():
        return
    rows = {row["step"]: row for row in whole_rows(path) if start and row["step"] <= start}
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(rows[k]) + "\n" for k in sorted(rows)))
    new.replace(path)


def read_metrics(out):
    """metrics.jsonl -> list of dicts, one a step; [] without one. A run's best checkpoint has the run's, up to its
    step."""
    path, last = Path(out).resolve() / "metrics.jsonl", math.inf
    if not path.exists() and path.parent.name == checkpoint.BEST:
        path, last = path.parents[1] / path.name, checkpoint.read_state(out)["step"]
    found = whole_rows(path) if path.exists() else ()
    rows = {row["step"]: row for row in found if row["step"] <= last}
    return [rows[k] for k in sorted(rows)]
