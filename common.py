"""What every script needs and no reader comes for: config -> command line, device and ranks, checkpoints, the log."""

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import checkpoint
from checkpoint import say, world_size
from data import DataError, Records, scan
from model import LatentModel
from pictures import MAX_DECODE
from records import refusals
from vlm import VLM

DTYPES = ("auto", "float32", "bfloat16")


# --------------------------------------------------------------------------------------------------- command line
def option(default, help, *, choices=None, least=0, above=None, paper=None):
    """A field of a Config: its default, its --help text, what is allowed, and the paper's value (for --preset
    paper)."""
    meta = {"help": help, "choices": choices, "least": least, "above": above, "paper": paper}
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass
class Everywhere:
    """Settings of every script that have nothing to do with the method; a script's Config comes after them."""

    max_decode: int = option(MAX_DECODE, "largest image file that is opened, in pixels", least=1)
    allow_outside: str = option("no", "take images that lie outside the folder of their records", choices=("no", "yes"))
    strict: str = option(
        "no", "stop at the first row that cannot be used, instead of leaving it out", choices=("no", "yes")
    )
    dtype: str = option("auto", "of forward passes; auto: bfloat16 on CUDA, float32 on a CPU", choices=DTYPES)
    timeout: int = option(30, "minutes that a rank waits for the others before the run ends", least=1)


def parse_config(cls, doc, argv=None):
    """Command line -> an instance of the dataclass `cls`, whose fields are `option`s. A flag wins over --preset."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    everywhere = {f.name for f in dataclasses.fields(Everywhere)}
    fields = sorted(dataclasses.fields(cls), key=lambda f: f.name in everywhere)  # the method's settings first
    paper = {f.name: f.metadata["paper"] for f in fields if f.metadata["paper"] is not None}
    if paper:
        text = "paper: every field below with a paper value takes it"
        parser.add_argument("--preset", choices=["none", "paper"], default="none", help=f"{text} (default: none)")
    for f in fields:
        known = f"default: {f.default}" + (f"; paper: {paper[f.name]}" if f.name in paper else "")
        parser.add_argument(
            "--" + f.name.replace("_", "-"),
            type=type(f.default),
            default=f.default,
            choices=f.metadata["choices"],
            metavar=None if f.metadata["choices"] else type(f.default).__name__.upper(),
            help=f"{f.metadata['help']} ({known})".replace("%", "%%"),
        )
    if parser.parse_known_args(argv)[0].__dict__.get("preset") == "paper":
        parser.set_defaults(**paper)
    values = vars(parser.parse_args(argv))
    values.pop("preset", None)
    for f in fields:
        check_number(parser, f, values[f.name])
    return cls(**values)


def check_number(parser, f, value):
    """Refuse a number that is too small for the field, or not finite."""
    flag, least = f"argument --{f.name.replace('_', '-')}", f.metadata["least"]
    if isinstance(value, str):
        return
    if not math.isfinite(value):
        parser.error(f"{flag}: {value} is not a finite number")
    if f.metadata["above"] is not None and value <= f.metadata["above"]:
        parser.error(f"{flag}: {value} is too small, it must be above {f.metadata['above']}")
    if value < least:
        parser.error(f"{flag}: {value} is too small, it must be at least {least}")


def run(main):
    """Run a script's main; bad input becomes one line on stderr and exit status 2."""
    try:
        main()
    except DataError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ device and ranks
@dataclasses.dataclass
class Place:
    """Where a process computes: its device, the number format of its forward passes, its rank among the ranks."""

    device: torch.device
    dtype: torch.dtype
    rank: int
    ranks: int

    def autocast(self):
        """Around a forward pass alone, never around an optimizer step: the cache of cast weights would not notice it.

        The frozen VLM is kept in `dtype`. What trains keeps float32 weights, and is cast here."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def setup(cfg):
    """-> Place. Under torchrun: nccl on CUDA, gloo on CPU; seeds the initial weights, equal on every rank.

    cfg.dtype 'auto' is bfloat16 on CUDA and float32 on a CPU."""
    rank, ranks = checkpoint.rank(), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=cfg.timeout))
    torch.manual_seed(cfg.seed)
    auto = "bfloat16" if cuda else "float32"
    return Place(device, getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype), rank, ranks)


def seed_noise(seed, rank, start, going_on):
    """Gumbel noise: its own on each rank. A resumed run goes on with rank 0's saved CPU generator (others: a fresh
    seed)."""
    torch.manual_seed(seed * 1000 + rank + start)
    if going_on and rank == 0:
        torch.set_rng_state(going_on["rng"])


def total(x):
    """Sum of a number or tensor over all ranks -> tensor."""
    x = torch.as_tensor(x).detach().clone()
    if dist.is_initialized():
        x = x.cuda() if dist.get_backend() == "nccl" else x
        dist.all_reduce(x)
    return x


def mean_over_ranks(metrics):
    """{name: this rank's number} -> {name: its mean over all ranks}. A loss times `share` becomes the global mean."""
    if not metrics or not dist.is_initialized():
        return metrics
    sums = total(torch.stack([torch.as_tensor(v).detach().float() for v in metrics.values()]))
    return dict(zip(metrics, sums / world_size()))


def share(count):
    """1 / (this rank's part of the normaliser): local sum * share(count), averaged over ranks, is the global mean.

    Why global: each rank (and each micro-batch) holds responses of other lengths. A mean of local means would weigh a
    token more where few tokens happen to stand beside it, and the same data cut in another way would give another
    gradient."""
    return world_size() / total(count).float().clamp(min=1)


class Objective(nn.Module):
    """A loss as a module, so that DDP can average the gradients of whatever in `module` requires one."""

    def __init__(self, module, loss):
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, *args):
        return self.loss(self.module, *args)


def wrap(module, loss):
    """Objective, in DistributedDataParallel where there are ranks. DDP AVERAGES over ranks: see `share`."""
    objective = Objective(module, loss)
    if not dist.is_initialized():
        return objective
    # DDP must not see the frozen parameters, nor broadcast them
    frozen = [n for n, p in objective.named_parameters() if not p.requires_grad]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, frozen)
    return nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False)


# ------------------------------------------------------------------------------------------------------- optimizer
def adamw(params, lr):
    """The one optimizer of every stage."""
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)


def cosine(done):
    """Factor of the learning rate, from 1 to a tenth; done: share of the steps, in [0, 1)."""
    return 0.55 + 0.45 * math.cos(math.pi * done)


def warmup(done, steps, part):
    """Factor of the learning rate that rises to 1 over the first `part` of the steps."""
    return min(1.0, (done + 1 / steps) / part)


class Stepper:
    """From gradients to weights: AdamW, clipping, and a guard. A gradient that is not finite never reaches the weights.

    Such a step is left out and counted in `skipped`; after PATIENCE of them in a row the run stops. Every rank
    decides the same, because the gradients are the average over ranks by then."""

    PATIENCE = 5

    def __init__(self, params, lr, clip_norm):
        self.params, self.clip_norm = list(params), clip_norm
        self.optimizer = adamw(self.params, lr)
        self.skipped = self.in_a_row = 0

    def rate(self, lr):
        self.optimizer.param_groups[0]["lr"] = lr

    def __call__(self, records=()):
        """Clip the gradient's norm (clip_norm 0: do not), step, forget the gradient. -> the norm before clipping.

        records: those of the batch, to be named if the run has to stop."""
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.clip_norm or math.inf)
        if torch.isfinite(norm):
            self.optimizer.step()
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.in_a_row == self.PATIENCE:
            ids = ", ".join(str(r.get("id", r.get("where", "?"))) for r in records)
            cure = "lower --lr, or look at the records of the last batch"
            raise DataError(
                f"{self.PATIENCE} gradients in a row are not finite; {cure} ({ids[:300]}); the checkpoint is whole"
            )
        return norm


# ------------------------------------------------------------------------------------------------------------ words
def report(trainable, *modules):
    frozen = sum(p.numel() for m in modules for p in m.parameters() if not p.requires_grad)
    say(f"trainable {sum(p.numel() for p in trainable):,} parameters, frozen {frozen:,}")


# --------------------------------------------------------------------------------------------------- models of a run
def build_latent(vlm, arch, tensors, where, needed):
    """LatentModel of a checkpoint: its architecture and the parts it holds, of which `needed` must be there."""
    latent = LatentModel(vlm.config, **arch)
    checkpoint.load_into(latent, tensors, where, needed)
    return latent


def part_tensors(latent, parts):
    return {n: p for n, p in latent.state_dict().items() if n.split(".")[0] in parts}


def load_trained(vlm, tensors, share, where):
    """Copy what a token-level run trained into the VLM; its names must be those that train."""
    own = set(vlm.trained_tensors()) or set(vlm.train_last(share))
    if own != set(tensors):
        odd = sorted(own ^ set(tensors))[0]
        raise DataError(
            f"{where}: '{odd}' is in the run or in the VLM, but not in both; it is of another model or share"
        )
    vlm.model.load_state_dict(tensors, strict=False)


def load_agent(run, actions, vlm_name, place):
    """-> (vlm, latent or None, arch) of a finished stage 3 or 4: what can roll out responses.

    actions 'token': the VLM with the tensors that the run trained. 'latent': the frozen VLM and the latent model."""
    tensors, before = checkpoint.load(run, "--init", ["stage3_bc", "stage4_latent_rl"], vlm_name)
    if before["config"]["actions"] != actions:
        raise DataError(f"--init {run}: was trained with --actions {before['config']['actions']}, not {actions}")
    if actions == "token":
        vlm = VLM(vlm_name, place.device, torch.float32)
        load_trained(vlm, tensors, before["arch"]["train_share"], run)
        vlm.requires_grad_(False)
        return vlm, None, before["arch"]
    vlm = VLM(vlm_name, place.device, place.dtype)
    latent = build_latent(vlm, before["arch"], tensors, run, LatentModel.parts).to(place.device)
    return vlm, latent.requires_grad_(False), before["arch"]


# ------------------------------------------------------------------------------------------------------- the log
class Log:
    """One progress bar with the numbers that matter and out/metrics.jsonl with all of them (rank 0 only).

    A run that goes on from step `start` first drops what was logged after it, so that each step stands in the file
    once."""

    def __init__(self, out, name, start, steps):
        self.rank0, path = checkpoint.rank() == 0, Path(out) / "metrics.jsonl"
        self.bar = tqdm(
            total=steps, initial=start, desc=name, disable=not self.rank0, mininterval=1.0, dynamic_ncols=True
        )
        if self.rank0:
            Path(out).mkdir(parents=True, exist_ok=True)
            cut_back(path, start)
            self.file = open(path, "a")
        self.began = time.time()

    def __call__(self, step, shown=(), **metrics):
        """A number that is not finite is left out: JSON has no word for it."""
        self.bar.update(1)
        if self.rank0:
            row = {k: round(v.item() if torch.is_tensor(v) else float(v), 6) for k, v in metrics.items()}
            row = {k: v for k, v in row.items() if math.isfinite(v)}
            self.bar.set_postfix_str(" ".join(f"{k} {row[k]:.4g}" for k in shown if k in row), refresh=False)
            row = {"step": step, "seconds": round(time.time() - self.began, 3)} | row
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def close(self):
        self.bar.close()
        if self.rank0:
            self.file.close()


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
    """Keep the rows up to step `start`, each once."""
    if not path.exists():
        return
    rows = {row["step"]: row for row in whole_rows(path) if row["step"] <= start}
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(rows[k]) + "\n" for k in sorted(rows)))
    new.replace(path)


def read_metrics(out):
    """metrics.jsonl -> list of dicts, one a step."""
    rows = {row["step"]: row for row in whole_rows(Path(out) / "metrics.jsonl")}
    return [rows[k] for k in sorted(rows)]


# ------------------------------------------------------------------------------------------------------- the data
def open_records(path, cfg, limit=None):
    """Records of a file, under the settings of `Everywhere`."""
    return Records(path, limit, allow_outside=cfg.allow_outside == "yes")


def usable(records, processor, cfg, prompt_only=False):
    """-> the rows that can be used, each read and its images decoded: before step 0, so that nothing breaks later.

    The console says what is refused. DataError if that is everything, or with --strict at the first."""
    found = scan(records, processor, prompt_only, decode=True, strict=cfg.strict == "yes")
    if found.refused:
        say(str(found))
    if not len(found.usable):
        raise DataError(f"{records.path}: no row can be used; the first reason: {next(iter(found.refused.values()))}")
    return records.only(found.usable)


def reasons(cfg):
    """-> where `batches` puts the reasons of refused rows; None: it raises the first (--strict)."""
    return None if cfg.strict == "yes" else set()


def tell_refused(records, refused):
    """Say at the end of a run which rows of a file could not be used, if any."""
    if text := refusals(records.path, len(records), refused or ()):
        say(text)
