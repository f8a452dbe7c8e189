"""Stage 2: the codebook of latent actions, learnt without labels by inverse dynamics, and the world model that obeys it.

    a_t = f_inverse(e_{t+1}), hard by straight-through Gumbel-softmax (tau 2);  x_{t+1} ~ f_world(e_t, c_{a_t})
    phase a, paired data:               L_inverse = - sum_t log f_world(x_{t+1} | e_t, a_t)
    phase b, paired and text-only data: L_inverse(D^VT) + L_inverse(D^T) + w (L_t2vt + L_vt2t + L_cycle),   w = 1e-5
    and in both an entropy bonus of 1e-3 times the mean entropy of the inverse model's softmax.

Departures. The gradient of L_inverse does not reach P (so in the release, too): a text-only context is mu of P(h),
detached; P learns from the projector and cycle losses. Only the tokens of responses are explained (--loss-on all for the
release's way). The action at t is counted where the token it explains, x_{t+1}, is. The world model starts at the VLM's
own prediction (--world-output). --without leaves one part out, for the ablation; without text, phase b goes on with paired data. A code's use is counted over --window steps without Gumbel noise, and logged.

    python stage2_codebook.py --projector runs/stage1 --out runs/stage2
    torchrun --nproc-per-node 4 stage2_codebook.py --vlm Qwen/Qwen2.5-VL-3B-Instruct --projector runs/3b/stage1 --batch 4 \\
        --inverse-blocks 4 --policy-blocks 8 --lr 1e-4 --max-length 2048 --out runs/3b/stage2
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass

import torch

import common
from data import Processor, Records, batches
from model import VLM, LatentModel, entropy, next_token_loss, straight_through_gumbel
from stage1_projector import projector_loss


@dataclass
class Config:
    vlm: str = "tiny/vlm"                    # folder or hub name of the frozen vision-language model
    paired: str = "runs/world/paired.jsonl"  # image-text records
    text: str = "runs/world/text.jsonl"      # text-only records
    projector: str = "runs/stage1"           # finished run of stage 1
    out: str = "runs/stage2"                 # folder of this run
    codes: int = 128                         # size of the codebook (paper: 128)
    inverse_blocks: int = 2                  # transformer blocks of the inverse dynamics (paper: 4)
    policy_blocks: int = 2                   # transformer blocks of the policy of stage 3 (paper: 8)
    merges: int = 2                          # merge modules of the world model (paper: 2)
    without: str = "nothing"                 # nothing | cycle | projector | text: leave out L_cycle, P (a text context is h), text-only data
    text_rows: int = 0                       # use only so many text-only rows, 0: all
    world_output: str = "vlm"                # vlm | norm | release: what the LM head reads, see WorldModel
    steps_a: int = 150                       # phase a: paired data alone
    steps_b: int = 300                       # phase b: paired and text-only data
    batch: int = 12                          # dialogues a step and rank, of each kind (paper: 4 and 4)
    lr: float = 1e-3                         # peak learning rate (paper: 1e-4); a: cosine to a tenth, b: 10% warm-up
    tau: float = 2.0                         # temperature of the Gumbel-softmax
    entropy_bonus: float = 1e-3              # weight of the inverse model's mean entropy
    projector_weight: float = 1e-5           # weight of L_t2vt, L_vt2t and L_cycle, which are sums over D
    loss_on: str = "response"                # response | all: which tokens are explained
    window: int = 80                         # steps over which code usage is counted; 80 of 12 are an epoch of the paired data
    max_length: int = 512                    # tokens a dialogue, image included (paper: 2048)
    max_pixels: int = 117600                 # images are scaled down to this many pixels (paper: 280 * 420)
    val: int = 48                            # last rows of each file, kept for the losses at the end
    seed: int = 0                            # seed of weights, noise and data order
    save_every: int = 150                    # steps between checkpoints


def trainable_parts(phase, without="nothing"):
    parts = ("inverse", "codebook", "world")
    return parts if phase == "a" or without in ("projector", "text") else parts + ("projector",)


def inverse_loss(latent, vlm, e_BTD, batch, tau):
    """L_inverse and the mean-entropy bonus, both summed over explained tokens.

    -> (loss, entropy, count, codes (M,) chosen without noise at those positions)"""
    explained = batch.response_BT[:, 1:]  # position t is counted where token t+1 is explained: the world model runs only there
    logits_MK = latent.infer_actions(e_BTD)[explained]
    a_MK = straight_through_gumbel(logits_MK, tau)
    y_MD = latent.world(e_BTD[:, :-1][explained], a_MK, latent.world.tables(latent.codebook.weight))
    loss = next_token_loss(vlm.head, y_MD, batch.ids_BT[:, 1:][explained])
    return loss, entropy(logits_MK).sum(), explained.sum(), logits_MK.argmax(-1)


def joint_loss(latent, vlm, processor, paired, text, cfg):
    """One step's loss -> (scalar, metrics). `text` None: phase a."""
    metrics, loss, used, h = {}, 0.0, {}, {}
    for name, batch in (("paired", paired), ("text", text)):
        if batch is None:
            continue
        with torch.no_grad():
            h[name] = vlm(batch)
            e_BTD = latent.context(h[name], batch.paired_B)  # detached: L_inverse does not train P
        nll, bonus, count, used[name] = inverse_loss(latent, vlm, e_BTD, batch, cfg.tau)
        norm = common.share(count)
        loss = loss + (nll - cfg.entropy_bonus * bonus) * norm
        metrics[f"nll_{name}"], metrics["entropy"] = (nll * norm).detach(), (bonus * norm).detach()
        if name == "text" and cfg.without != "projector":
            proj, _, _, count = projector_loss(latent.projector, vlm, processor, paired, h["paired"])
            proj = proj * common.share(count)
            cycle = latent.projector.cycle_loss(h["text"], batch.mask_BT) * common.share(batch.mask_BT.sum())
            loss = loss + cfg.projector_weight * (proj + cycle * (cfg.without != "cycle"))
            metrics |= {"cycle": cycle.detach(), "proj": proj.detach()}
    return loss, metrics, used


class Usage:
    """How often each code was chosen over the last `window` steps: codes used, and perplexity exp(H(usage))."""

    def __init__(self, codes, window):
        self.codes, self.window, self.recent = codes, window, {}

    def __call__(self, used):
        out = {}
        for name, a in used.items():
            recent = self.recent.setdefault(name, [])
            recent.append(common.total(torch.bincount(a, minlength=self.codes)).float())
            del recent[:-self.window]
            p = sum(recent) / sum(recent).sum()
            out |= {f"codes_{name}": (p > 0).sum(), f"perplexity_{name}": torch.exp(-(p * (p + 1e-12).log()).sum())}
        return out


@torch.no_grad()
def validate(latent, vlm, batch_list):
    """Mean nats per response token: the bare VLM; the world model with the inferred actions (no noise); with random ones."""
    sums, count = Counter(), 0
    for batch in batch_list:
        h_BTD = vlm(batch)
        e_BTD, explained = latent.context(h_BTD, batch.paired_B), batch.response_BT[:, 1:]
        e_MD, ids_M, tables = e_BTD[:, :-1][explained], batch.ids_BT[:, 1:][explained], latent.world.tables(latent.codebook.weight)
        a_M = latent.infer_actions(e_BTD)[explained].argmax(-1)
        random = torch.randint_like(a_M, latent.codebook.num_embeddings)
        for name, y_MD in (("vlm", h_BTD[:, :-1][explained]), ("inferred", latent.world(e_MD, a_M, tables)),
                           ("random", latent.world(e_MD, random, tables))):
            sums[name] += next_token_loss(vlm.head, y_MD, ids_M).item()
        count += int(explained.sum())
    return {f"val_{k}": v / count for k, v in sums.items()}


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    device, rank, ranks = common.setup(cfg.seed)
    projector, before = common.load(cfg.projector, "--projector", ["stage1_projector"], cfg.vlm)
    processor = Processor(cfg.vlm, cfg.max_length, cfg.max_pixels, cfg.loss_on)
    files = {"paired": Records(cfg.paired), "text": Records(cfg.text)}
    vlm = VLM(cfg.vlm, device, common.vlm_dtype(device))
    arch = dict(codes=cfg.codes, inverse_blocks=cfg.inverse_blocks, policy_blocks=cfg.policy_blocks, merges=cfg.merges,
                world_output=cfg.world_output, skip=before["config"]["mean"] == "skip", project=cfg.without != "projector")
    latent = LatentModel(vlm.config, **arch).to(device)
    latent.load_state_dict(projector, strict=False)
    steps, start, extra = cfg.steps_a + cfg.steps_b, 0, None
    if saved := common.resume(cfg.out, "stage2_codebook", asdict(cfg)):
        latent.load_state_dict(saved[0], strict=False)
        start, extra = saved[1]["step"], saved[2]
    common.seed_noise(cfg.seed, rank, start, extra)

    train = {k: Records(f.path, limit=-cfg.val or None) for k, f in files.items()}
    if cfg.text_rows:
        train["text"] = Records(cfg.text, limit=min(cfg.text_rows, len(train["text"])))
    refused = {k: set() for k in files}
    drawn = {"paired": start, "text": max(0, start - cfg.steps_a)}
    stream = {k: batches(train[k], processor, cfg.batch, cfg.seed, drawn[k] * cfg.batch * ranks, rank, ranks,
                         refused=refused[k]) for k in files}
    log, usage = common.Log(cfg.out, "stage 2: codebook", start, steps), Usage(cfg.codes, cfg.window)
    for phase, begin, end in (("a", 0, cfg.steps_a), ("b", cfg.steps_a, steps)):
        if start >= end or begin == end:
            continue
        latent.train_only(*trainable_parts(phase, cfg.without))
        params = [p for p in latent.parameters() if p.requires_grad]
        common.report(params, vlm, latent)
        optimizer = common.adamw(params, cfg.lr)
        if extra and begin < start:
            optimizer.load_state_dict(extra["optimizer"])
        objective = common.wrap(latent, lambda latent, paired, text: joint_loss(latent, vlm, processor, paired, text, cfg))
        for step in range(max(begin, start), end):
            done = (step - begin) / (end - begin)
            rate = 0.55 + 0.45 * math.cos(math.pi * done) if phase == "a" else min(1.0, (done + 1 / (end - begin)) / 0.1)
            optimizer.param_groups[0]["lr"] = cfg.lr * rate
            paired = next(stream["paired"]).to(device)
            text = next(stream["text"]).to(device) if phase == "b" and cfg.without != "text" else None
            with common.autocast(device):
                loss, metrics, used = objective(paired, text)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step(), optimizer.zero_grad(set_to_none=True)
            log(step + 1, ("nll_paired", "nll_text", "codes_paired", "codes_text", "perplexity_text"), loss=loss, **metrics, **usage(used),
                refused_paired=len(refused["paired"]), refused_text=len(refused["text"]))
            last = step + 1 == steps
            if (step + 1) % cfg.save_every == 0 or step + 1 == end:
                state = {"stage": "stage2_codebook", "finished": last, "config": asdict(cfg), "arch": arch, "refused": sorted(set().union(*refused.values()))}
                if last:
                    state["val"] = {}
                    for kind, f in files.items():
                        kept = range(len(f) - cfg.val, len(f))
                        examples = [processor.example(f[i]) for i in kept]
                        val = [processor.collate(examples[i:i + 16]).to(device) for i in range(0, len(examples), 16)]
                        with common.autocast(device):
                            state["val"][kind] = validate(latent, vlm, val)
                        common.say(f"{kind}: " + ", ".join(f"{k} {v:.3f}" for k, v in state["val"][kind].items()) + " nats a token")
                common.save(cfg.out, step + 1, common.part_tensors(latent, ("projector", "inverse", "codebook", "world")), state, optimizer)
    log.close()


if __name__ == "__main__":
    common.run(main)
