"""What several test files need: prompts, rollouts, what moved in a step, runs of the scripts."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import checkpoint
import common
from data import Batch, Example, uniforms
from rollout import rollout
from tiny.world import chat, draw_scene, random_question, random_scene

ROOT = Path(__file__).resolve().parent.parent
CPU = common.Place(torch.device("cpu"), torch.float32, 0, 1)  # one process in float32
TINY = str(ROOT / "tiny" / "vlm")
CODES = 16
LAYERS = 6  # blocks of the tiny VLM


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def shake(module, size=0.1):
    """Move every parameter off its initial value, so that no zero or one hides a mistake."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=g) * size)
    return module


def a_little_trained(latent):
    """Move what starts at exactly 0: there the codebook and the log-variances have no gradient yet."""
    for merge in latent.world.merges:
        torch.nn.init.normal_(merge.w3.weight, std=0.02)
    for mlp in (latent.projector.P.mlp, latent.projector.P_back.mlp):
        torch.nn.init.normal_(mlp[-1].weight, std=0.02)
    return latent


# ------------------------------------------------------------------------------------------------ prompts
def pixels_of(processor, rng, extras):
    """Drawn scenes of 84 pixels' height, each `extra` pixels wider than high -> (pixels, grids)."""
    images = []
    for extra in extras:
        image = draw_scene(random_scene(rng), rng)
        images.append(image.resize((84 + extra, 84)))
    out = processor.images(images=images, return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


def question(processor, seed, *extras, system=None, prompt_only=True):
    """A question about drawn scenes, one for each of `extras` (pixels added to its width)."""
    rng = random.Random(seed)
    _, _, asked = random_question(random_scene(rng), rng)
    answer = "There is a small red star on the left."
    record = {"images": [], "messages": chat("<image>" * len(extras) + asked, answer, system)}
    return processor.example(record, prompt_only, pixels_of(processor, rng, extras) if extras else None)


def extend(example, tokens):
    """The same example with more tokens behind it, as one sequence."""
    ids = np.concatenate((example.ids, np.asarray(tokens)))
    return Example(ids, np.zeros(len(ids), bool), example.pixels, example.grids, example.record)


def alone(e):
    """The example as a batch of one, made by hand and not by `collate`."""
    ids_BT = torch.from_numpy(e.ids)[None]
    mask_BT, response_BT = torch.ones_like(ids_BT, dtype=torch.bool), torch.from_numpy(e.response)[None]
    images_B = torch.tensor([0 if e.grids is None else len(e.grids)])
    return Batch(ids_BT, mask_BT, response_BT, images_B, e.pixels, e.grids, [e.record], [(0,)])


def shares(*batches):
    """The norms of these batches, where they are all of a step: 1 / explained tokens each."""
    return [common.share(batch.explained_BT.sum()) for batch in batches]


def no_noise(batch, width):
    """In place of Batch.uniforms: equal noise everywhere, so that the arg max wins."""
    return torch.full((int(batch.explained_BT.sum()), width), 0.5)


# ----------------------------------------------------------------------------------------------- rollouts
def generate(vlm, latent, processor, examples, u, **settings):
    """A rollout of these prompts; without other settings no token ends it."""
    never = torch.tensor(processor.never_sampled)
    settings = {"never": never, "eos": -1, "pad": processor.pad_id} | settings
    return rollout(vlm, latent, processor.collate(examples, left=True), u, **settings)


def draws(n, length, seed=0):
    """Uniforms for n rows."""
    return uniforms(seed, [(k,) for k in range(n)], length)


def bias_head(vlm, ids, size):
    """Lift the LM head's logits of these ids to the row's highest + `size`, until the handle is removed."""

    def hook(_, __, out):
        lifted = F.one_hot(torch.tensor(ids), out.shape[-1]).sum(0) * (out.amax(-1, keepdim=True) + size)
        return out.index_fill(-1, torch.tensor(ids), 0) + lifted

    return vlm.head.register_forward_hook(hook)


def picked(logp_NTK, pick_NT):
    """The log-probabilities of what was picked."""
    return logp_NTK.gather(-1, pick_NT[..., None])[..., 0]


# ------------------------------------------------------------------------------------- what moved in a step
def snapshot(*modules):
    return [{n: p.detach().clone() for n, p in m.named_parameters()} for m in modules]


def assert_only(before, modules, names):
    """Exactly `names` moved (each at least somewhere), everything else is bit-identical."""
    moved = {n for b, m in zip(before, modules) for n, p in m.named_parameters() if not torch.equal(b[n], p)}
    assert moved == set(names), moved ^ set(names)


def take_step(loss, *modules, lr=1e-3):
    loss.backward()
    params = [p for m in modules for p in m.parameters() if p.requires_grad]
    torch.optim.AdamW(params, lr=lr, weight_decay=0.0).step()


def names_of(latent, *parts):
    return [n for n, _ in latent.named_parameters() if n.split(".")[0] in parts]


# -------------------------------------------------------------------------------------- runs of the scripts
def weights(folder):
    return load_file(checkpoint.latest(folder) / "weights.safetensors")


def same_weights(a, b):
    """Bit-identical weights of two runs, and the same names."""
    a, b = weights(a), weights(b)
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def louder(run, out):
    """Save a finished run of stage 3 once more, as `out`, with a world model that listens to its codes. After two
    steps of training it does not yet: all responses to a prompt would be the same, and RL would have no gradient."""
    g, tensors, state = torch.Generator().manual_seed(7), weights(run), checkpoint.read_state(run)
    for name, x in tensors.items():
        if name.startswith("world.merges") and name.endswith("w3.weight"):
            x += 0.3 * torch.randn(x.shape, generator=g)
    checkpoint.save(out, state["step"], tensors, state)


def letters(records, responses):
    """A judge: more different letters are better. It fails on a fifth of the responses."""
    scores = [(min(10.0, 1 + len(set(text)) / 3), 5.0) for text in responses]
    return [None if len(text) % 5 == 0 else {"Letters": s} for text, s in zip(responses, scores)]


letters.costly = True  # so it is not asked about the references, and no row is refused because it fails there


def shell(*argv, timeout=None):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, env=env, timeout=timeout)


def launch(argv, ranks=2, seconds=300):
    """torchrun -> CompletedProcess; a run that hangs is an error after so many seconds."""
    port = str(20000 + os.getpid() % 20000)
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port]
    return shell(*start, *argv, timeout=seconds)


def torchrun(argv, ranks=2):
    done = launch(argv, ranks)
    assert done.returncode == 0, done.stderr[-2000:]


def cut_off(monkeypatch, main, argv, after):
    """Run, and be cut off right after the checkpoint of step `after`."""
    real = checkpoint.save

    def save(out, step, *rest, **kw):
        real(out, step, *rest, **kw)
        if step == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "save", save)
        try:
            main(argv)
        except KeyboardInterrupt:
            return
    raise AssertionError(f"no checkpoint of step {after}")


VLM_FLAG = ["--vlm", TINY]
SMALL = ["--codes", "16", "--inverse-blocks", "1", "--policy-blocks", "1", "--batch", "3", "--val", "4"]


class Flags:
    """The flags of each stage: the VLM, its data, and sizes so small that a step takes no time."""

    def __init__(self, world):
        self.paired = [*VLM_FLAG, "--paired", f"{world}/paired.jsonl"]
        self.both = [*self.paired, "--text", f"{world}/text.jsonl"]
        self.book = [*self.both, *SMALL]
        self.demos = ["--demos", f"{world}/task_demos.jsonl"]
        self.clone = [*self.both, *self.demos, "--batch", "3", "--batch-adapt", "3"]
        self.sft = [*VLM_FLAG, "--actions", "token", *self.demos]
        self.rl = [*VLM_FLAG, "--prompts", f"{world}/task_prompts.jsonl", "--group", "2", "--judge", "helpers:letters"]
