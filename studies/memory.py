"""How much memory each stage takes on a GPU: computed, for a vision-language model (VLM) of any size.

    python -m studies.memory                                          # Qwen2.5-VL-3B and 7B, the paper's settings
    python -m studies.memory --shape 3b --micro 1 --checkpointing yes
    python -m studies.memory --vlm Qwen/Qwen2.5-VL-3B-Instruct        # of a checkpoint, config.json alone is read

Weights are counted on the real modules, built on torch's meta device: nothing is allocated, no weight is loaded. What
a step leaves in memory follows from the formulas of studies/activations.py. A stage has several moments (forward pass,
backward pass, optimizer, rollout); the table shows the fullest. All is for one rank.

A number is an upper bound in three ways: every row has its full length, every token of it is explained, and several
rows are padded. What is no tensor is left out: CUDA's own memory, and gaps between tensors. So a stage counts as
fitting where it takes nine tenths of a GPU's memory at most. 24 GB are taken as 24e9 bytes, which are 22.4 GiB.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

import common
import stage2_codebook
import stage3_bc
from common import option
from data import DataError, find
from studies.activations import Stages, Work
from studies.cases import SHAPES, Bench, vlm_config
from vlm import VLM

GiB = 2**30
GPUS = (24, 48, 80, 141)  # GB of 1e9 bytes
USABLE = 0.9  # of a GPU's memory


@dataclass
class Config:
    shape: str = option("", f"one of {', '.join(SHAPES)}; empty: 3b and 7b")
    vlm: str = option("", "folder or hub name of another VLM, in place of --shape")
    dtype: str = option("bfloat16", "of forward passes", choices=("float32", "bfloat16"))
    batch: int = option(4, "stages 1 to 3: dialogues a step and rank, of each kind", least=1)
    max_length: int = option(2048, "stages 1 to 3: tokens a dialogue, image included", least=1)
    prompts: int = option(1, "stage 4: prompts a step and rank (its --batch)", least=1)
    group: int = option(8, "stage 4: responses to each prompt", least=2)
    max_prompt: int = option(1024, "stage 4: tokens a prompt, image included", least=1)
    max_new: int = option(1024, "stage 4: tokens a response", least=1)
    codes: int = option(128, "size of the codebook", least=1)
    inverse_blocks: int = option(4, "transformer blocks of the inverse dynamics")
    policy_blocks: int = option(8, "transformer blocks of the policy")
    merges: int = option(2, "merge modules of the world model")
    train_share: float = option(8 / 36, "token: share of the VLM's blocks that train, from the last")
    micro: int = option(0, "most rows in a backward pass; 0: all")
    checkpointing: str = option("no", "token: compute blocks again in the backward pass", choices=("no", "yes"))
    ranks: int = option(4, "GPUs; several keep the memory in which they exchange gradients", least=1)
    out: str = option("", "a JSON file for all numbers; empty: none")


# --------------------------------------------------------------------------------------------------------- the weights
@dataclass
class Weights:
    """Bytes of one stage's weights."""

    frozen: int
    trained: int  # float32
    reference: int
    casts: int  # trained matrices once more, in the dtype of forward passes


def weights_of(modules, dtype, reference=None):
    """Of real modules. A tensor that they share counts once, and not in the reference."""

    def tensors(modules):
        return {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}

    own = tensors(modules)
    frozen, trained = (sum(t.nbytes for t in own.values() if t.requires_grad == trains) for trains in (False, True))
    copied = sum(t.nbytes for k, t in tensors([reference] if reference else []).items() if k not in own)
    cast = {id(w): w.numel() * dtype.itemsize for m in modules for w in cast_matrices(m)}
    return Weights(frozen, trained, copied, 0 if dtype == torch.float32 else sum(cast.values()))


def cast_matrices(module):
    """The trained ones of linear layers; but LM head and `Stack.out` multiply in their own way."""
    for name, m in module.named_modules():
        if (
            isinstance(m, nn.Linear)
            and m.weight.requires_grad
            and name.split(".")[-1] not in ("out", "head", "lm_head")
        ):
            yield m.weight


def all_weights(bench):
    """{stage: Weights} of the models of a benchmark."""
    dtype, vlm, latent, found = bench.place.dtype, bench.vlm, bench.latent, {}
    latent.train_only("projector")
    found["1"] = weights_of([vlm, latent.projector], dtype)
    latent.train_only(*stage2_codebook.trainable_parts("b"))
    found["2"] = weights_of([vlm, *(getattr(latent, part) for part in stage2_codebook.PARTS)], dtype)
    for phase in ("clone", "adapt"):
        latent.train_only(*stage3_bc.trainable_parts(phase))
        found[f"3 {phase}"] = weights_of([vlm, latent], dtype)
    found["3 SFT"] = weights_of([bench.token_vlm], dtype)
    found["4 latent"] = weights_of([vlm, bench.speaking], dtype, bench.reference("latent"))
    found["4 token"] = weights_of([bench.token_vlm], dtype, bench.reference("token"))
    return found


def model_of(stage):
    """'4 latent' of '4 latent rollout'."""
    return " ".join(stage.split()[:2])


def fullest(work, weights):
    """{stage: {column: bytes at its fullest moment, total: their sum, moment: its name}}"""
    found = {}
    for stage, moments in Stages(work).all(weights).items():
        w, m = weights[model_of(stage)], max(moments, key=lambda m: m.activations + m.gradients + m.caches)
        row = {"frozen": w.frozen, "trained": w.trained, "reference": w.reference, "gradients": m.gradients}
        row |= {"optimizer": 2 * w.trained, "caches": m.caches, "activations": m.activations}  # AdamW's two moments
        found[stage] = row | {"total": sum(row.values()), "moment": m.name}
    return found


# -------------------------------------------------------------------------------------------------- what fits on a GPU
def milder_first(work, stage):
    """The settings that save memory: fewer rows a pass, halved again and again; then blocks computed again as well."""
    s, again = work.shape, (False, True) if stage in ("3 SFT", "4 token") else (False,)
    rows = s.prompts * s.group if stage.startswith("4") else s.rows
    micros = [0] + [rows >> k for k in range(1, rows.bit_length())]
    return [replace(work, micro=micro, checkpointing=yes) for yes in again for micro in micros]


def flags(work):
    found = ["--checkpointing yes"] if work.checkpointing else []
    return " ".join(found + ([f"--micro {work.micro}"] if work.micro else []))


def fits(work, weights):
    """-> {stage: {GB of a GPU: {flags: the mildest with which it fits, or None; total: bytes then, or the least}}}"""
    found = {}
    for stage in weights:
        tried = []
        for settings in milder_first(work, stage):
            rows = fullest(settings, weights)
            tried.append((max(r["total"] for name, r in rows.items() if model_of(name) == stage), flags(settings)))
        found[stage] = {}
        for gpu in GPUS:
            fitting = [x for x in tried if x[0] <= USABLE * gpu * 1e9]
            total, flag = fitting[0] if fitting else (min(tried)[0], None)
            found[stage][str(gpu)] = {"flags": flag, "total": total}
    return found


# ----------------------------------------------------------------------------------------------------------- the tables
COLUMNS = ("frozen", "trained", "reference", "gradients", "optimizer", "caches", "activations", "total")


def markdown(head, rows):
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def rows_table(name, rows):
    """Markdown: GiB of each stage at its fullest moment."""
    lines = [[stage, *(f"{row[c] / GiB:.1f}" for c in COLUMNS), row["moment"]] for stage, row in rows.items()]
    return markdown([f"{name}, GiB", *COLUMNS, "fullest moment"], lines)


def fits_table(name, fitting):
    """Markdown: with which settings a stage fits on which GPU."""

    def cell(found):
        if found["flags"] is None:
            return f"no: {found['total'] / GiB:.1f} GiB"
        return f"`{found['flags']}`" if found["flags"] else "yes"

    lines = [[stage, *(cell(found[str(gpu)]) for gpu in GPUS)] for stage, found in fitting.items()]
    return markdown([name, *(f"{gpu} GB" for gpu in GPUS)], lines)


# ----------------------------------------------------------------------------------------------------- what is computed
def from_checkpoint(name):
    """-> (configuration, Shape) of a checkpoint, of which config.json alone is read."""
    find(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            text = VLM(config, "meta").config
    except Exception as e:  # whatever a broken folder, or another kind of model, makes the library raise
        lines = str(e).strip().splitlines() or [""]
        reason = lines[-1].strip(": ") if isinstance(e, DataError) else lines[0]  # ours is behind the configuration
        raise DataError(f"--vlm {name}: no configuration that can be used ({reason[:200]})") from None
    size = {"width": text.hidden_size, "blocks": text.num_hidden_layers, "heads": text.num_attention_heads}
    size |= {"kv_heads": text.num_key_value_heads, "inner": text.intermediate_size, "vocab": text.vocab_size}
    return config, replace(SHAPES["3b"], tied=config.tie_word_embeddings, **size)


def shapes_of(cfg):
    """-> {name: (configuration, Shape)}, with the sizes of the work."""
    if cfg.vlm:
        found = {cfg.vlm: from_checkpoint(cfg.vlm)}
    else:
        names = [cfg.shape] if cfg.shape else ["3b", "7b"]
        if unknown := set(names) - set(SHAPES):
            raise DataError(f"--shape {unknown.pop()}: choose one of {', '.join(SHAPES)}")
        found = {name: (vlm_config(SHAPES[name]), SHAPES[name]) for name in names}
    work = {"rows": cfg.batch, "row": cfg.max_length, "prompt": cfg.max_prompt, "new": cfg.max_new}
    work |= {"prompts": cfg.prompts, "group": cfg.group, "image": SHAPES["3b"].image}
    work |= {"inverse": cfg.inverse_blocks, "policy": cfg.policy_blocks, "merges": cfg.merges, "codes": cfg.codes}
    for name, (config, shape) in found.items():
        train = max(1, round(cfg.train_share * shape.blocks))  # as VLM.train_last
        found[name] = config, replace(shape, train=train, **work)
    return found


def on_meta(config, shape, dtype):
    """-> a benchmark whose models have shapes and dtypes, and no memory."""
    bench = Bench(shape, torch.device("meta"), dtype)
    bench.config = config
    return bench


def compute(cfg):
    """-> {name of a VLM: {rows: see `fullest`, fits: see `fits`}}"""
    found, dtype = {}, getattr(torch, cfg.dtype)
    for name, (config, shape) in shapes_of(cfg).items():
        with torch.device("meta"):
            weights = all_weights(on_meta(config, shape, dtype))
        work = Work(shape, dtype, cfg.micro, cfg.checkpointing == "yes", cfg.ranks)
        found[name] = {"rows": fullest(work, weights), "fits": fits(work, weights)}
    return found


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    found = compute(cfg)
    for name, tables in found.items():
        print(f"\n{rows_table(name, tables['rows'])}\n\n{fits_table(name, tables['fits'])}")
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    common.run(main)
