"""Stage 3: behaviour cloning of the policy, then adaptation to the task's demonstrations.

    phase clone, paired and text-only data:  L_bc = - sum_t log pi(a*_t | e_{<=t}),  a*_t = argmax of f_inverse (no noise)
    phase adapt, the task's demonstrations:  L_inverse on inverse dynamics, codebook and world model; L_bc on the policy

--init may also be a finished clone (a stage 3 with --steps-adapt 0): then it is only adapted, and several tasks share a clone.
A codebook learnt without text-only data, or with some of its rows, is cloned with the same.

`--actions token` is the baseline's counterpart: supervised fine-tuning (SFT) of the VLM's last blocks, final norm, embeddings
and head on the same demonstrations.

Departures. The release adapts the VLM (not the merges and the codebook, and under another output formula); here the VLM
stays frozen, and everything on the latent side is adapted with the one world model that RL and generation use. One
encoder pass a batch serves teacher and policy. Only the tokens of responses count.

    python stage3_bc.py --init runs/stage2 --out runs/stage3                         # latent
    python stage3_bc.py --actions token --out runs/sft                               # SFT, the baseline
    torchrun --nproc-per-node 4 stage3_bc.py --vlm Qwen/Qwen2.5-VL-3B-Instruct --init runs/3b/stage2 --batch 4 --lr 1e-4 \\
        --max-length 2048 --out runs/3b/stage3
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

import common
from data import DataError, Processor, Records, batches
from model import VLM, next_token_loss
from stage2_codebook import inverse_loss


@dataclass
class Config:
    actions: str = "latent"                  # latent | token: clone and adapt the policy, or fine-tune the VLM
    vlm: str = "tiny/vlm"                    # folder or hub name of the vision-language model
    init: str = "runs/stage2"                # finished run of stage 2, or a finished clone (latent only)
    paired: str = "runs/world/paired.jsonl"  # image-text records for cloning
    text: str = "runs/world/text.jsonl"      # text-only records for cloning
    demos: str = "runs/world/task_demos.jsonl"  # the task's demonstrations
    out: str = "runs/stage3"                 # folder of this run
    steps_clone: int = 300                   # phase clone (latent only)
    steps_adapt: int = 75                    # phase adapt, or SFT; 75 steps of 16 are 3 epochs of 400 demonstrations
    batch: int = 12                          # cloning: dialogues a step and rank, of each kind (paper: 4 and 4)
    batch_adapt: int = 16                    # adaptation and SFT: demonstrations a step and rank
    lr: float = 1e-3                         # cloning, peak, cosine to a tenth (paper: 1e-4)
    lr_adapt: float = 3e-4                   # adaptation and SFT, peak, 3% warm-up, then cosine (paper: 5e-5)
    train_share: float = 0.2222              # token: share of the VLM's blocks that train, from the last (paper: 8 of 36)
    tau: float = 2.0                         # temperature of the Gumbel-softmax in adaptation
    entropy_bonus: float = 1e-3              # weight of the inverse model's mean entropy in adaptation
    loss_on: str = "response"                # response | all: which tokens are explained
    max_length: int = 512                    # tokens a dialogue, image included (paper: 2048)
    max_pixels: int = 117600                 # images are scaled down to this many pixels (paper: 280 * 420)
    seed: int = 0                            # seed of noise and data order
    save_every: int = 150                    # steps between checkpoints


def trainable_parts(phase):
    return ("policy",) if phase == "clone" else ("policy", "inverse", "codebook", "world")


def bc_loss(latent, e_BTD, batch):
    """L_bc = - sum log pi(a*_t | e_{<=t}) over explained tokens -> (sum, hits: policy's arg max is a*, count)."""
    explained = batch.response_BT[:, 1:]
    with torch.no_grad():
        a_star = latent.infer_actions(e_BTD).argmax(-1)[explained]
    logits = latent.policy(e_BTD)[:, :-1][explained]
    return F.cross_entropy(logits, a_star, reduction="sum"), (logits.argmax(-1) == a_star).sum(), explained.sum()


def latent_loss(latent, vlm, phase, given, cfg):
    """-> (scalar, metrics); `given`: {name: Batch}, each with its own mean over its tokens, weight 1."""
    loss, metrics = 0.0, {}
    for name, batch in given.items():
        with torch.no_grad():
            e_BTD = latent.context(vlm(batch), batch.paired_B)
        bc, hits, count = bc_loss(latent, e_BTD, batch)
        norm = common.share(count)
        loss = loss + bc * norm
        metrics |= {f"bc_{name}": (bc * norm).detach(), f"agree_{name}": hits * norm}
        if phase == "adapt":
            nll, bonus, _, _ = inverse_loss(latent, vlm, e_BTD, batch, cfg.tau)
            loss = loss + (nll - cfg.entropy_bonus * bonus) * norm
            metrics["nll"] = (nll * norm).detach()
    return loss, metrics


def sft_loss(vlm, batch):
    """Mean next-token cross-entropy of the VLM on the demonstrations' responses."""
    explained = batch.response_BT[:, 1:]
    nll = next_token_loss(vlm.head, vlm(batch)[:, :-1][explained], batch.ids_BT[:, 1:][explained]) * common.share(explained.sum())
    return nll, {"nll": nll.detach()}


def vlm_tensors(vlm):
    """What the token baseline trained, by name; the rest of the VLM is the checkpoint given as --vlm."""
    return {n: p for n, p in vlm.model.named_parameters() if p.requires_grad}


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    device, rank, ranks = common.setup(cfg.seed)
    is_token = cfg.actions == "token"
    if not is_token:
        tensors, before = common.load(cfg.init, "--init", ["stage2_codebook", "stage3_bc"], cfg.vlm)
        if before["config"].get("actions") == "token":
            raise DataError(f"--init {cfg.init}: is an SFT run; needed is one of stage 2, or a clone")
    processor = Processor(cfg.vlm, cfg.max_length, cfg.max_pixels, cfg.loss_on)
    demos = Records(cfg.demos)
    plan = [("adapt", {"demos": demos}, cfg.batch_adapt, cfg.steps_adapt, cfg.lr_adapt)]
    if is_token:  # what trains needs float32 master weights
        vlm, latent, arch = VLM(cfg.vlm, device, torch.float32), None, {"train_share": cfg.train_share}
        vlm.train_last(cfg.train_share)
    else:
        vlm, arch = VLM(cfg.vlm, device, common.vlm_dtype(device)), before["arch"]
        latent = common.build_latent(vlm, arch, tensors).to(device)
        if before["stage"] == "stage2_codebook":
            clone = {"paired": Records(cfg.paired)}
            if before["config"]["without"] != "text":
                clone["text"] = Records(cfg.text, limit=before["config"]["text_rows"] or None)
            plan.insert(0, ("clone", clone, cfg.batch, cfg.steps_clone, cfg.lr))
    steps, start, extra = sum(p[3] for p in plan), 0, None
    if saved := common.resume(cfg.out, "stage3_bc", asdict(cfg)):
        (vlm.model if is_token else latent).load_state_dict(saved[0], strict=False)
        start, extra = saved[1]["step"], saved[2]
    common.seed_noise(cfg.seed, rank, start, extra)

    log, refused, begin = common.Log(cfg.out, f"stage 3: {'SFT' if is_token else 'policy'}", start, steps), set(), 0
    for phase, files, size, length, peak in plan:
        end = begin + length
        if start < end and length:
            if is_token:
                params = list(vlm_tensors(vlm).values())
                objective = common.wrap(vlm, sft_loss)
            else:
                latent.train_only(*trainable_parts(phase))
                params = [p for p in latent.parameters() if p.requires_grad]
                objective = common.wrap(latent, lambda latent, given, phase=phase: latent_loss(latent, vlm, phase, given, cfg))
            common.report(params, vlm, *([] if is_token else [latent]))
            optimizer = common.adamw(params, peak)
            if extra and begin < start:
                optimizer.load_state_dict(extra["optimizer"])
            drawn = max(0, start - begin) * size * ranks
            stream = {k: batches(f, processor, size, cfg.seed, drawn, rank, ranks, refused=refused) for k, f in files.items()}
            for step in range(max(begin, start), end):
                done = (step - begin) / length
                rate = 0.55 + 0.45 * math.cos(math.pi * done)
                optimizer.param_groups[0]["lr"] = peak * (rate if phase == "clone" else min(rate, (done + 1 / length) / 0.03))
                given = {k: next(s).to(device) for k, s in stream.items()}
                with common.autocast(device):
                    loss, metrics = objective(given["demos"]) if is_token else objective(given)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(params, 1.0)
                optimizer.step(), optimizer.zero_grad(set_to_none=True)
                log(step + 1, ("bc_paired", "bc_text", "bc_demos", "agree_paired", "agree_text", "agree_demos", "nll"), loss=loss,
                    refused=len(refused), **metrics)
                if (step + 1) % cfg.save_every == 0 or step + 1 == end:
                    tensors = vlm_tensors(vlm) if is_token else common.part_tensors(latent, latent.parts)
                    common.save(cfg.out, step + 1, tensors, {"stage": "stage3_bc", "finished": step + 1 == steps, "config": asdict(cfg),
                                                             "arch": arch, "refused": sorted(refused)}, optimizer)
        begin = end
    log.close()


if __name__ == "__main__":
    common.run(main)
