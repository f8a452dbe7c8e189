"""What every script needs and no reader comes for: config -> command line, device and ranks, checkpoints, the log."""

import argparse
import contextlib
import dataclasses
import datetime
import math
import os
from collections import Counter

import torch
import torch.distributed as dist
from torch import nn

import checkpoint
from checkpoint import say, world_size
from data import DataError, Records, scan
from log import Log as Log
from log import read_metrics as read_metrics
from model import LatentModel
from pictures import MAX_DECODE
from ranks import gather
from ranks import run as run
from records import refusals
from tracking import TRACKERS
from vlm import VLM

DTYPES = ("auto", "float32", "bfloat16")


# --------------------------------------------------------------------------------------------------- command line
def option(default, help, *, choices=None, least=0, above=None, paper=None):
    """A field of a Config: its default, its --help text, what is allowed, and the paper's value (for --preset
    paper)."""
    meta = {"help": help, "choices": choices, "least": least, "above": above, "paper": paper}
    return dataclasses.field(default=default, metadata=meta)


def log_option():
    return option("none", "where the numbers of metrics.jsonl go as well", choices=TRACKERS)


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
    fields = sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__)  # the script's own first
    paper = {f.name: f.metadata["paper"] for f in fields if f.metadata["paper"] is not None}
    if paper:
        text = "paper: every field below with a paper value takes it"
        parser.add_argument("--preset", choices=["none", "paper"], default="none", help=f"{text} (default: none)")
    for f in fields:
        known = f"default: {f.default}" + (f"; paper: {paper[f.name]}" if f.name in paper else "")
        switch = f.metadata["choices"] == ("no", "yes")  # --strict alone says --strict yes
        parser.add_argument(
            "--" + f.name.replace("_", "-"),
            type=type(f.default),
            default=f.default,
            choices=f.metadata["choices"],
            **({"nargs": "?", "const": "yes"} if switch else {}),
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


def setup(cfg, backend=None, patience=0):
    """-> Place. Seeds the initial weights, equal on every rank. backend: of the ranks' process group under torchrun, by
    default nccl on CUDA and gloo on a CPU. patience: seconds that a rank waits for the others beyond cfg.timeout.

    cfg.dtype 'auto' is bfloat16 on CUDA and float32 on a CPU."""
    rank, ranks = checkpoint.rank(), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if ranks > 1 and not dist.is_initialized():
        backend = backend or ("nccl" if cuda else "gloo")
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=cfg.timeout, seconds=patience))
    torch.manual_seed(cfg.seed % 2**63)  # torch takes no larger one
    auto = "bfloat16" if cuda else "float32"
    return Place(device, getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype), rank, ranks)


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
    # gradients lie in the memory in which they are exchanged; else there would be two of each
    ranks = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    return nn.parallel.DistributedDataParallel(objective, **ranks)


def exchanging(objective, last):
    """A context for forward and backward pass: with ranks, gradients are exchanged once a step, in its last part."""
    return contextlib.nullcontext() if last or not dist.is_initialized() else objective.no_sync()


def gradients(place, objective, given, norms, micro=0):
    """Forward and backward passes of one step, over parts of at most `micro` rows (0: all in one).

    objective(batches, norms) -> (loss, metrics), all of them sums over tokens times a norm. given: batches with equally
    many rows. norms: see `share`, of the whole step, so that the parts add up to it and `micro` changes memory alone.
    -> {name: its sum over the parts}, the loss among them; the gradients are in the parameters."""
    rows, sums = len(given[0].ids_BT), Counter()
    size = micro or rows
    for start in range(0, rows, size):
        with exchanging(objective, last=start + size >= rows):
            with place.autocast():
                loss, metrics = objective([batch.rows(slice(start, start + size)) for batch in given], norms)
            loss.backward()
        for name, value in ({"loss": loss} | metrics).items():
            sums[name] = sums[name] + value.detach()
    return dict(sums)


# ------------------------------------------------------------------------------------------------------- optimizer
def adamw(params, lr):
    """The one optimizer of every stage. On CUDA the fused kernel, which makes no tensors as large as the weights."""
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=all(p.is_cuda for p in params))


def cosine(done):
    """Factor of the learning rate, from 1 to a tenth; done: share of the steps, in [0, 1)."""
    return 0.55 + 0.45 * math.cos(math.pi * done)


def warmup(done, steps, part):
    """Factor of the learning rate that rises to 1 over the first `part` of the steps."""
    return min(1.0, (done + 1 / steps) / part)


class Stepper:
    """From gradients to weights: AdamW, clipping, and a guard. A gradient that is not finite never reaches the weights.

    Such a step is left out and counted in `skipped`; after PATIENCE of them in a row the run stops. Every rank
    decides the same, because the gradients are the average over ranks by then. Its state, counts included, is saved and
    loaded as an optimizer's is."""

    PATIENCE = 5

    def __init__(self, params, lr, clip_norm):
        self.params, self.clip_norm = list(params), clip_norm
        self.optimizer = adamw(self.params, lr)
        self.skipped = self.in_a_row = 0

    def rate(self, lr):
        self.optimizer.param_groups[0]["lr"] = lr

    def state_dict(self):
        return self.optimizer.state_dict() | {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict({k: state[k] for k in ("state", "param_groups")})
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

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


SPEAKING = ("projector", "quantiser", "world", "policy")  # the parts of a latent model that a rollout needs


def settle(module, dtype):
    """Frozen weights of linear layers in the dtype of forward passes: autocast would cast them anew at each use.

    `Stack.out` computes in float32, and stays."""
    for name, m in module.named_modules():
        if isinstance(m, nn.Linear) and not m.weight.requires_grad and name.split(".")[-1] != "out":
            m.to(dtype)
    return module


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
    """-> (vlm, latent or None, arch) of a finished stage 3 or 4: what can roll out responses, and go on training.

    actions 'token': the VLM with the tensors that the run trained. 'latent': the frozen VLM and the parts of the latent
    model that speak, of which the policy trains. What trains is float32, all else is in place.dtype."""
    tensors, before = checkpoint.load(run, "--init", ["stage3_bc", "stage4_latent_rl"], vlm_name)
    if before["config"]["actions"] != actions:
        raise DataError(f"--init {run}: was trained with --actions {before['config']['actions']}, not {actions}")
    if actions == "token":
        vlm = VLM(vlm_name, place.device, place.dtype)
        load_trained(vlm, tensors, before["arch"]["train_share"], run)
        return vlm, None, before["arch"]
    vlm = VLM(vlm_name, place.device, place.dtype)
    spoken = {k: v for k, v in tensors.items() if k.split(".")[0] in SPEAKING}
    latent = build_latent(vlm, before["arch"], spoken, run, SPEAKING)
    del latent.inverse  # it only ever explains what was said
    latent.to(place.device).train_only("policy")
    settle(latent, place.dtype)
    return vlm, latent, before["arch"]


# ------------------------------------------------------------------------------------------------------- the data
def open_records(path, cfg, limit=None):
    """Records of a file, under the settings of `Everywhere`."""
    return Records(path, limit, allow_outside=cfg.allow_outside == "yes")


def usable(records, processor, cfg, prompt_only=False, also=None):
    """-> the rows that can be used, each read and its images decoded: before step 0, so that nothing breaks later.

    also: see `scan`. The console says what is refused. DataError if that is everything, or with --strict at the
    first."""
    found = scan(records, processor, prompt_only, decode=True, strict=cfg.strict == "yes", also=also)
    if found.refused:
        say(str(found))
    if not len(found.usable):
        raise DataError(f"{records.path}: no row can be used; the first reason: {next(iter(found.refused.values()))}")
    return records.only(found.usable)


class Refused:
    """Why rows of a file cannot be used: the reasons that all ranks have met, each once, interruptions included."""

    def __init__(self, cfg, before=()):
        """before: those of a checkpoint. seen: the set for `batches` to fill; None: it raises the first (--strict)."""
        self.seen, self.counted = None if cfg.strict == "yes" else set(before), 0

    def all(self):
        """-> sorted list, the same on every rank. All ranks have to ask."""
        if dist.is_initialized() and int(total(len(self.seen or ()))) != self.counted:
            self.seen.update(*(reasons or () for reasons in gather(self.seen)))
            self.counted = world_size() * len(self.seen)
        return sorted(self.seen or ())


def tell_refused(records, refused):
    """Say at the end of a run which rows of a file could not be used, if any."""
    if text := refusals(records.path, len(records), refused.all()):
        say(text)
