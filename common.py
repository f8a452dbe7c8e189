"""What every script needs and no reader comes for: config -> command line, device and ranks, checkpoints, the log."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from data import DataError
from model import LatentModel
from vlm import VLM


# --------------------------------------------------------------------------------------------------- command line
def option(default, help, *, choices=None, least=0, paper=None):
    """A field of a Config: its default, its --help text, what is allowed, and the paper's value (for --preset
    paper)."""
    meta = {"help": help, "choices": choices, "least": least, "paper": paper}
    return dataclasses.field(default=default, metadata=meta)


def parse_config(cls, doc, argv=None):
    """Command line -> an instance of the dataclass `cls`, whose fields are `option`s. A flag wins over --preset."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    fields = dataclasses.fields(cls)
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
def setup(seed):
    """-> (device, rank, ranks). Under torchrun: nccl on CUDA, gloo on CPU. Seeds differ by rank where noise may."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(seed)  # the same on every rank: equal initial weights
    return device, rank, ranks


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def seed_noise(seed, rank, start, extra):
    """Gumbel noise: its own on each rank. A resumed run goes on with rank 0's saved CPU generator (others: a fresh
    seed)."""
    torch.manual_seed(seed * 1000 + rank + start)
    if extra and rank == 0:
        torch.set_rng_state(extra["rng"])


def vlm_dtype(device):
    """bfloat16 for the frozen VLM on CUDA; float32 on CPU. What trains keeps float32 master weights."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def autocast(device):
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def total(x):
    """Sum of a number or tensor over all ranks -> tensor."""
    x = torch.as_tensor(x).detach().clone()
    if dist.is_initialized():
        x = x.cuda() if dist.get_backend() == "nccl" else x
        dist.all_reduce(x)
    return x


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


def optimize(params, optimizer, clip_norm):
    """Clip the gradient's norm (0: do not), step, and forget the gradient. -> the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(params, clip_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ------------------------------------------------------------------------------------------------------------ words
def report(trainable, *modules):
    frozen = sum(p.numel() for m in modules for p in m.parameters() if not p.requires_grad)
    say(f"trainable {sum(p.numel() for p in trainable):,} parameters, frozen {frozen:,}")


def say(text):
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(text)


# --------------------------------------------------------------------------------------------------- checkpoints
def save(out, step, tensors, state, optimizer=None):
    """Write out/ckpt-STEP: weights (safetensors), state.json, optimizer and RNG state. Whole or not at all: it is
    filled under another name, then renamed; older ones are removed afterwards. Rank 0 writes, the others wait."""
    if int(os.environ.get("RANK", 0)) == 0:
        new, name = Path(out) / "ckpt.new", Path(out) / f"ckpt-{step:06d}"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, new / "weights.safetensors")
        if optimizer is not None:
            torch.save({"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, new / "optimizer.pt")
        (new / "state.json").write_text(json.dumps({"step": step} | state, indent=1))
        shutil.rmtree(name, ignore_errors=True)
        new.rename(name)
        for old in Path(out).glob("ckpt-*"):
            if old != name:
                shutil.rmtree(old)
    if dist.is_initialized():
        dist.barrier()


def latest(out):
    """-> the folder of the last checkpoint of a run, or None."""
    found = sorted(Path(out).glob("ckpt-*/state.json"))
    return found[-1].parent if found else None


def read_state(out):
    """-> state.json of the last checkpoint of a run that has one."""
    return json.loads((latest(out) / "state.json").read_text())


def load(out, flag, stages, vlm):
    """-> (tensors, state) of a FINISHED run of one of `stages` on this VLM; DataError names what is missing and the
    cure."""
    folder = latest(out)
    if folder is None:
        cure = f"run {stages[0]}.py --out {out or 'FOLDER'} first"
        raise DataError(f"{flag} {out or '(not given)'}: no checkpoint there; {cure}")
    state = read_state(out)
    if state["stage"] not in stages:
        needed = " or ".join(stages)
        raise DataError(f"{flag} {out}: is a checkpoint of {state['stage']}, needed is one of {needed}")
    if not state["finished"]:
        where = f"{state['stage']} stopped at step {state['step']}"
        raise DataError(f"{flag} {out}: unfinished ({where}); run it again with the same --out to finish it")
    trained_with = state["config"]["vlm"]
    if Path(trained_with).resolve() != Path(vlm).resolve():
        raise DataError(f"{flag} {out}: was trained with --vlm {trained_with}, not {vlm}; give the same one")
    return load_file(folder / "weights.safetensors"), state


def resume(out, stage, config):
    """-> (tensors, state, optimizer state) of an earlier run in the same folder, or None. Refuses another config."""
    folder = latest(out)
    if folder is None:
        return None
    state = read_state(out)
    if state["stage"] != stage:
        raise DataError(f"--out {out}: holds a run of {state['stage']}; choose another folder")
    for name, value in config.items():
        before = state["config"].get(name)
        if before != value:
            flag = f"--{name.replace('_', '-')}"
            raise DataError(
                f"--out {out}: holds a run with another {flag} ({before}); choose another folder or delete it"
            )
    extra = None
    if (folder / "optimizer.pt").exists():
        extra = torch.load(folder / "optimizer.pt", weights_only=True)
    return load_file(folder / "weights.safetensors"), state, extra


def build_latent(vlm, arch, tensors):
    """LatentModel of a checkpoint: its architecture and whichever parts it holds."""
    latent = LatentModel(vlm.config, **arch)
    _, unknown = latent.load_state_dict(tensors, strict=False)
    if unknown:  # a part under another name would stay random, in silence
        raise DataError(f"the checkpoint holds '{unknown[0]}', which the latent model does not; train it anew")
    return latent


def part_tensors(latent, parts):
    return {n: p for n, p in latent.state_dict().items() if n.split(".")[0] in parts}


def load_agent(run, actions, vlm_name, device):
    """-> (vlm, latent or None, arch) of a finished stage 3 or 4: what can roll out responses.

    actions 'token': the VLM with the tensors that the run trained. 'latent': the frozen VLM and the latent model."""
    tensors, before = load(run, "--init", ["stage3_bc", "stage4_latent_rl"], vlm_name)
    if before["config"]["actions"] != actions:
        raise DataError(f"--init {run}: was trained with --actions {before['config']['actions']}, not {actions}")
    if actions == "token":
        vlm = VLM(vlm_name, device, torch.float32)
        vlm.model.load_state_dict(tensors, strict=False)
        return vlm, None, before["arch"]
    vlm = VLM(vlm_name, device, vlm_dtype(device))
    latent = build_latent(vlm, before["arch"], tensors).to(device).requires_grad_(False)
    return vlm, latent, before["arch"]


# ------------------------------------------------------------------------------------------------------- the log
class Log:
    """One progress bar with the numbers that matter and out/metrics.jsonl with all of them (rank 0 only)."""

    def __init__(self, out, name, start, steps):
        self.rank0 = int(os.environ.get("RANK", 0)) == 0
        self.bar = tqdm(
            total=steps, initial=start, desc=name, disable=not self.rank0, mininterval=1.0, dynamic_ncols=True
        )
        Path(out).mkdir(parents=True, exist_ok=True)
        self.file = open(Path(out) / "metrics.jsonl", "a") if self.rank0 else None
        self.began = time.time()

    def __call__(self, step, shown=(), **metrics):
        self.bar.update(1)
        if self.rank0:
            row = {k: round(v.item() if torch.is_tensor(v) else float(v), 6) for k, v in metrics.items()}
            self.bar.set_postfix_str(" ".join(f"{k} {row[k]:.4g}" for k in shown if k in row), refresh=False)
            row = {"step": step, "seconds": round(time.time() - self.began, 3)} | row
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def close(self):
        self.bar.close()


def read_metrics(out):
    """metrics.jsonl -> list of dicts; after a resume the later row of a step counts."""
    rows = {}
    for line in (Path(out) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["step"]] = row
    return [rows[k] for k in sorted(rows)]


def check(processor, records):
    """Encode every prompt once before any training starts: a bad one is named now, not hours later."""
    for i in range(len(records)):
        processor.example(records[i], prompt_only=True)
