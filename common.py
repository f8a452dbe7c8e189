"""What every script needs and no reader comes for: config -> command line, device and ranks, checkpoints, the log."""

import argparse
import contextlib
import dataclasses
import inspect
import json
import os
import re
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


# --------------------------------------------------------------------------------------------------- command line
def parse_config(cls, doc, argv=None):
    """Command line -> an instance of the dataclass `cls`. The comment on a field's line is its --help text."""
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in dataclasses.fields(cls):
        kind = {"str": str, "int": int, "float": float}[f.type if isinstance(f.type, str) else f.type.__name__]
        text = comments.get(f.name, "").replace("%", "%%")
        choices = re.match(r"(\w+(?: \| \w+)+)", text)  # a comment 'grpo | dapo: ...' lists what is allowed
        parser.add_argument("--" + f.name.replace("_", "-"), type=kind, default=f.default, help=f"{text} (default: {f.default})",
                            choices=choices[1].split(" | ") if choices else None, metavar=None if choices else kind.__name__.upper())
    values = vars(parser.parse_args(argv))
    for name, value in values.items():
        least = 1 if name.startswith(("batch", "group", "codes", "max_", "save_every", "window", "updates")) or name == "steps" else 0
        if not isinstance(value, str) and not value >= least:
            parser.error(f"argument --{name.replace('_', '-')}: {value} is too small, it must be at least {least}")
    return cls(**values)


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


def seed_noise(seed, rank, start, extra):
    """Gumbel noise: its own on each rank. A resumed run goes on with rank 0's saved CPU generator (other ranks: a fresh seed)."""
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


class Objective(nn.Module):
    """A loss as a module, so that DDP can average the gradients of whatever in `module` requires one."""

    def __init__(self, module, loss):
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, *args):
        return self.loss(self.module, *args)


def adamw(params, lr):
    """The one optimizer of every stage."""
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)


def wrap(module, loss):
    """Objective, in DistributedDataParallel where there are ranks. DDP AVERAGES over ranks, so a loss that is to be a
    mean over the global count is local sum * ranks / global count: `share` below."""
    objective = Objective(module, loss)
    if not dist.is_initialized():
        return objective
    # DDP must not see the frozen parameters, nor broadcast them
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        objective, [n for n, p in objective.named_parameters() if not p.requires_grad])
    return nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False)


def share(count):
    """1 / (this rank's part of the normaliser): local sum * share(count), averaged over ranks, is the global mean."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return ranks / total(count).float().clamp(min=1)


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
    found = sorted(Path(out).glob("ckpt-*/state.json"))
    return found[-1].parent if found else None


def load(out, flag, stages, vlm):
    """-> (tensors, state) of a FINISHED run of one of `stages` on this VLM; DataError names what is missing and the cure."""
    folder = latest(out)
    if folder is None:
        raise DataError(f"{flag} {out or '(not given)'}: no checkpoint there; run {stages[0]}.py --out {out or 'FOLDER'} first")
    state = json.loads((folder / "state.json").read_text())
    if state["stage"] not in stages:
        raise DataError(f"{flag} {out}: is a checkpoint of {state['stage']}, needed is one of {' or '.join(stages)}")
    if not state["finished"]:
        raise DataError(f"{flag} {out}: unfinished ({state['stage']} stopped at step {state['step']}); run it again with the same --out to finish it")
    if Path(state["config"]["vlm"]).resolve() != Path(vlm).resolve():
        raise DataError(f"{flag} {out}: was trained with --vlm {state['config']['vlm']}, not {vlm}; give the same one")
    return load_file(folder / "weights.safetensors"), state


def resume(out, stage, config):
    """-> (tensors, state, optimizer state) of an earlier run in the same folder, or None. Refuses another config."""
    folder = latest(out)
    if folder is None:
        return None
    state = json.loads((folder / "state.json").read_text())
    if state["stage"] != stage:
        raise DataError(f"--out {out}: holds a run of {state['stage']}; choose another folder")
    changed = [k for k, v in config.items() if state["config"].get(k) != v]
    if changed:
        raise DataError(f"--out {out}: holds a run with another --{changed[0].replace('_', '-')} "
                        f"({state['config'].get(changed[0])}); choose another folder or delete it")
    extra = torch.load(folder / "optimizer.pt", weights_only=True) if (folder / "optimizer.pt").exists() else None
    return load_file(folder / "weights.safetensors"), state, extra


def build_latent(vlm, arch, tensors):
    """LatentModel of a checkpoint: its architecture and whichever parts it holds."""
    latent = LatentModel(vlm.config, **arch)
    latent.load_state_dict(tensors, strict=False)
    return latent


def part_tensors(latent, parts):
    return {n: p for n, p in latent.state_dict().items() if n.split(".")[0] in parts}


# ------------------------------------------------------------------------------------------------------- the log
class Log:
    """One progress bar with the numbers that matter and out/metrics.jsonl with all of them (rank 0 only)."""

    def __init__(self, out, name, start, steps):
        self.rank0 = int(os.environ.get("RANK", 0)) == 0
        self.bar = tqdm(total=steps, initial=start, desc=name, disable=not self.rank0, mininterval=1.0, dynamic_ncols=True)
        Path(out).mkdir(parents=True, exist_ok=True)
        self.file = open(Path(out) / "metrics.jsonl", "a") if self.rank0 else None
        self.began = time.time()

    def __call__(self, step, shown=(), **metrics):
        self.bar.update(1)
        if self.rank0:
            row = {k: round(v.item() if torch.is_tensor(v) else float(v), 6) for k, v in metrics.items()}
            self.bar.set_postfix_str(" ".join(f"{k} {row[k]:.4g}" for k in shown if k in row), refresh=False)
            self.file.write(json.dumps({"step": step, "seconds": round(time.time() - self.began, 3)} | row) + "\n")
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
