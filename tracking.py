"""The numbers of metrics.jsonl in TensorBoard or in Weights & Biases as well (--log). The file stays the source.

A run that goes on hands over the file's rows again, and then its own: so what was lost in between is there, and so are
the steps from before --log was given. TensorBoard is told to forget what it had; Weights & Biases takes no step twice.
The packages are optional, and are imported only if they are asked for."""

import importlib
import uuid
from dataclasses import asdict
from pathlib import Path

from records import DataError

TRACKERS = ("none", "tensorboard", "wandb")


def track(cfg, start, rows):
    """-> what takes each further row, {"step": n, name: number}, by __call__, and `close`. None for --log none.

    start: the step that the run goes on from. rows: of metrics.jsonl, up to there. Rank 0 alone may call it."""
    if cfg is None or cfg.log == "none":
        return None
    tracker = TensorBoard(cfg) if cfg.log == "tensorboard" else Wandb(cfg, start)
    for row in rows:
        tracker({k: v for k, v in row.items() if not isinstance(v, list)})
    return tracker


def package(name, needed):
    """-> the module `name`, which the package `needed` brings."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise DataError(f"--log {needed}: needs the package {needed}: pip install {needed} ({e})") from None


class TensorBoard:
    """Event files in OUT/tensorboard."""

    def __init__(self, cfg):
        # purge_step 0: of what earlier files of the folder hold nothing counts, the rows are handed over again
        writer = package("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.writer = writer(Path(cfg.out) / "tensorboard", purge_step=0)

    def __call__(self, row):
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self):
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, whose id is kept in OUT/wandb.id. A run that begins anew has a new one."""

    def __init__(self, cfg, start):
        wandb, file = package("wandb", "wandb"), Path(cfg.out) / "wandb.id"
        if not start or not file.exists():
            file.write_text(uuid.uuid4().hex[:16])
        settings = {"dir": cfg.out, "name": cfg.out, "config": asdict(cfg), "settings": wandb.Settings(console="off")}
        try:
            self.run = wandb.init(id=file.read_text(), resume="allow", **settings)
        except Exception as e:  # no key, no network, no such project
            why = str(e).strip().partition("\n")[0][:200]
            raise DataError(f"--log wandb: cannot begin ({why}); see `wandb login`, or WANDB_MODE=offline") from None

    def __call__(self, row):
        if row["step"] >= self.run.step:  # it has the earlier ones
            self.run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"], commit=True)

    def close(self):
        self.run.finish()
