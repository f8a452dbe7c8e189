"""Stage 4: reinforcement learning of the policy over latent actions; everything else stays frozen.

Each step: 1. roll out G responses to each of B prompts; 2. score them, r = sum of the judge's scores / sum of the reference's;
3. A = group_advantages(r); 4. one update of pi on the ACTION log-probabilities with policy_loss. The contexts e kept by the
rollout are all that the update reads: no pass through the VLM. `--actions token` is the baseline: the same algorithms, prompts,
group, judge and number of rollouts on the TOKEN log-probabilities of the VLM's last blocks, final norm, embeddings and head.

With ratio = exp(logp - logp_old), s = min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), and the k3 estimator
kl = exp(logp_ref - logp) - (logp_ref - logp) - 1 of KL(pi || pi_ref), the per-token loss is l = -s + beta kl, and

    grpo     A = (r - mean) / std of the group    mean over sequences of the mean over tokens of l    (arXiv 2402.03300)
    dr_grpo  A = r - mean                         sum of l / (N * max_length)                         (arXiv 2503.20783)
    dapo     A = (r - mean) / std, clip_high .28,
             groups with equal rewards left out   sum of l / tokens of the global batch               (arXiv 2503.14476)
    bnpo     A = (r - mean) / std                 sum of l / tokens of the local batch                (method of TRL)

Departures. Log-probabilities are those of the very distribution that was sampled (the release samples the top 32 codes and scores
all 128). Each algorithm keeps its own advantage and normaliser (the release divides all of them by the standard deviation).
Left-out groups are not re-drawn (DAPO's dynamic sampling), so that every algorithm has the same number of rollouts; DAPO's
overlong penalty is not used, and its KL term is kept (--beta 0 removes it). A judge's failure is left out of its group's statistics and counted, never a mean.

    python stage4_latent_rl.py --init runs/stage3 --out runs/rl
    python stage4_latent_rl.py --actions token --init runs/sft --out runs/rl_token
    torchrun --nproc-per-node 4 stage4_latent_rl.py --vlm Qwen/Qwen2.5-VL-3B-Instruct --init runs/3b/stage3 --batch 1 --lr 1e-6 \\
        --max-prompt 1024 --max-new 1024 --out runs/3b/rl
"""

import copy
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

import common
from data import DataError, Processor, Records, index_stream
from model import VLM, action_logits, head_log_probs, log_probs, rollout, token_states, uniforms
from rewards import load_judge, reward
from stage3_bc import vlm_tensors


@dataclass
class Config:
    actions: str = "latent"                  # latent | token: what the policy chooses
    loss_type: str = "grpo"                  # grpo | dr_grpo | dapo | bnpo: see above
    vlm: str = "tiny/vlm"                    # folder or hub name of the vision-language model
    init: str = "runs/stage3"                # finished run of stage 3 (token: of stage 3 with --actions token)
    prompts: str = "runs/world/task_prompts.jsonl"  # records; the last assistant message is the reference
    judge: str = "rules"                     # 'rules' (the tiny world's) or the folder of a sentence-embedding model
    out: str = "runs/rl"                     # folder of this run
    steps: int = 100                         # rollouts of batch * group responses, one update each
    batch: int = 8                           # prompts a step and rank (paper: 4 in all)
    group: int = 8                           # responses to each prompt (paper: 8)
    lr: float = 1e-3                         # constant learning rate (paper: 1e-6)
    beta: float = 0.01                       # weight of the KL to the policy that RL started from
    clip_low: float = 0.2                    # the ratio is clipped from below at 1 - clip_low
    clip_high: float = 0.0                   # and from above at 1 + clip_high; 0: 0.28 for dapo, else 0.2
    updates: int = 1                         # updates per rollout (paper: 1)
    micro: int = 0                           # rows per backward pass, 0: all; changes memory, not the result
    temperature: float = 1.0                 # of sampling (actions, or tokens)
    top_k: int = 0                           # sample from the k most likely only, 0: all
    max_prompt: int = 400                    # longest prompt, tokens (paper: 1024)
    max_new: int = 64                        # longest response, tokens (paper: 1024)
    max_pixels: int = 117600                 # images are scaled down to this many pixels (paper: 280 * 420)
    seed: int = 0                            # seed of sampling and of the prompts' order
    save_every: int = 50                     # steps between checkpoints


# ------------------------------------------------------------------------------------------- the algorithms' maths
def group_advantages(reward_BG, loss_type):
    """Advantages within each group: (B, G) rewards -> (B, G), float32.

    r - mean, divided by the group's standard deviation (unbiased, + 1e-6) except in dr_grpo. A group whose rewards are all
    equal gives 0. NaN marks a failed judgement: left out of mean and standard deviation, advantage 0."""
    if loss_type not in ("grpo", "dr_grpo", "dapo", "bnpo"):
        raise ValueError(f"unknown loss_type {loss_type!r}")
    r, valid = reward_BG.float(), ~torch.isnan(reward_BG)
    n = valid.sum(1, keepdim=True)
    mean = torch.where(valid, r, 0.0).sum(1, keepdim=True) / n.clamp(min=1)
    adv = torch.where(valid, r - mean, 0.0)
    if loss_type == "dr_grpo":
        return adv
    std = ((adv ** 2).sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    equal = adv.abs().amax(1, keepdim=True) < 1e-6  # rounding must not be blown up to an advantage
    return torch.where(equal, 0.0, adv / (std + 1e-6))


def k3(logp, logp_ref):
    """Estimate of KL(pi || pi_ref) from samples of pi, >= 0: exp(d) - d - 1, d = logp_ref - logp."""
    d = logp_ref - logp
    return torch.exp(d) - d - 1


def policy_loss(logp_NT, logp_old_NT, logp_ref_NT, adv_N, mask_NT, *, loss_type, clip_low, clip_high, beta, max_length, num_tokens=None):
    """The clipped surrogate with a KL penalty -> scalar to minimise.

    logp, logp_old, logp_ref: (N, T) log-probabilities of what was sampled under the policy that trains, the one that sampled
    and the reference (logp_ref may be None where beta is 0); adv (N,); mask (N, T), 1 at sampled tokens up to and with EOS.
    grpo: mean over sequences of the mean over tokens; dr_grpo: sum / (N * max_length); dapo: sum / num_tokens, the global
    token count (by default this batch's); bnpo: sum / tokens of this batch."""
    mask = mask_NT.to(logp_NT.dtype)
    # padding may hold anything: make it 0 before exp, or inf * 0 would be nan
    logp, logp_old = (torch.where(mask_NT.bool(), x, 0.0) for x in (logp_NT, logp_old_NT))
    ratio, adv = torch.exp(logp - logp_old), adv_N[:, None]
    loss_NT = -torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    if beta:
        loss_NT = loss_NT + beta * k3(logp, torch.where(mask_NT.bool(), logp_ref_NT, 0.0))
    loss_N = (loss_NT * mask).sum(1)
    if loss_type == "grpo":
        return (loss_N / mask.sum(1).clamp(min=1)).mean()
    if loss_type == "dr_grpo":
        return loss_N.sum() / (len(loss_N) * max_length)
    if loss_type == "dapo":
        return loss_N.sum() / (mask.sum() if num_tokens is None else num_tokens)
    if loss_type == "bnpo":
        return loss_N.sum() / mask.sum().clamp(min=1)
    raise ValueError(f"unknown loss_type {loss_type!r}")


# ----------------------------------------------------------------------------------------------------- one RL step
def take(roll, rows):
    """The rows (a slice of whole groups) of a rollout: for updates in micro-batches."""
    b = slice(rows.start // roll.group, rows.stop // roll.group)
    p = roll.prompt
    images = [int(p.images_B[:i].sum()) for i in (b.start, min(b.stop, len(p.images_B)))]
    grids = None if p.grids is None else p.grids[images[0]:images[1]]
    pixels = None if p.pixels is None else p.pixels[int(p.grids[:images[0]].prod(-1).sum()):int(p.grids[:images[1]].prod(-1).sum())]
    if grids is not None and not len(grids):
        grids = pixels = None
    prompt = type(p)(p.ids_BT[b], p.mask_BT[b], p.response_BT[b], p.images_B[b], pixels, grids, p.records[b])
    cut = {k: None if getattr(roll, k) is None else getattr(roll, k)[rows] for k in ("tokens_NT", "mask_NT", "logp_NT", "actions_NT", "e_NTD")}
    return type(roll)(prompt, roll.group, e_BLD=None if roll.e_BLD is None else roll.e_BLD[b], **cut)


def sampled_logp(model, roll, cfg, never):
    """log-probabilities (N, T) of what a rollout sampled, under `model` (policy or VLM), and the entropy (N, T)."""
    if roll.actions_NT is not None:
        logp_NTK = log_probs(action_logits(model, roll), cfg.temperature, cfg.top_k)
        H_NT = torch.special.entr(logp_NTK.detach().exp()).sum(-1)
        return logp_NTK.gather(-1, roll.actions_NT[..., None])[..., 0], H_NT
    mask_NT = roll.mask_NT  # the head runs only where a token was sampled
    logp_M, H_M = head_log_probs(model.head, token_states(model, roll)[mask_NT], roll.tokens_NT[mask_NT], cfg.temperature, cfg.top_k, never)
    zeros_NT = torch.zeros_like(roll.logp_NT)
    return zeros_NT.masked_scatter(mask_NT, logp_M), zeros_NT.masked_scatter(mask_NT, H_M)


def update(objective, reference, optimizer, params, roll, adv_N, keep_N, cfg, never, clip_high):
    """cfg.updates optimizer steps on one rollout -> metrics. Rows with keep_N False take no part in any mean."""
    mask_NT = roll.mask_NT & keep_N[:, None]
    kept, tokens = common.total(keep_N.sum()).float(), common.total(mask_NT.sum()).float()
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    metrics, local_tokens = {}, mask_NT.sum()
    size = cfg.micro or len(mask_NT)
    for _ in range(cfg.updates):
        sums = torch.zeros(3, device=mask_NT.device)
        for i in range(0, len(mask_NT), size):
            rows = slice(i, min(i + size, len(mask_NT)))
            part, mask, keep = take(roll, rows) if size < len(mask_NT) else roll, mask_NT[rows], keep_N[rows]
            logp, H = objective(part)
            logp_ref = None
            if cfg.beta:
                with torch.no_grad():
                    logp_ref, _ = sampled_logp(reference, part, replace(cfg, top_k=0), never)  # its top k may be others: never -inf
            loss = policy_loss(logp[keep], part.logp_NT[keep], None if logp_ref is None else logp_ref[keep], adv_N[rows][keep], mask[keep],
                               loss_type=cfg.loss_type, clip_low=cfg.clip_low, clip_high=clip_high, beta=cfg.beta,
                               max_length=cfg.max_new, num_tokens=(tokens / ranks).clamp(min=1)) if keep.any() else (logp * 0).sum()
            # policy_loss is a mean over this part's rows (grpo, dr_grpo) or tokens (bnpo); give it its weight in the whole
            weight = {"grpo": keep.sum() * ranks / kept.clamp(min=1), "dr_grpo": keep.sum() * ranks / kept.clamp(min=1),
                      "dapo": 1.0, "bnpo": mask.sum() / local_tokens.clamp(min=1)}[cfg.loss_type]
            (loss * weight).backward()
            with torch.no_grad():
                ratio = torch.exp(logp - part.logp_NT)[mask]
                clipped = (ratio < 1 - cfg.clip_low) | (ratio > 1 + clip_high)
                kl = k3(logp, logp_ref)[mask].sum() if logp_ref is not None else torch.zeros(())
                sums += torch.stack([kl.to(sums), H[mask].sum(), clipped.sum().float()])
        metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step(), optimizer.zero_grad(set_to_none=True)
        metrics |= dict(zip(("kl", "entropy", "clip_share"), common.total(sums) / tokens.clamp(min=1)))
    return metrics


def decode(tokenizer, roll, eos):
    """Rollout -> texts, without EOS."""
    return [tokenizer.decode([t for t, m in zip(row, mask) if m and t != eos])
            for row, mask in zip(roll.tokens_NT.tolist(), roll.mask_NT.tolist())]


def start_policy(cfg, device):
    """-> (vlm, latent or None, arch) of a finished stage 3, or of a stage 4 (evaluation)."""
    tensors, before = common.load(cfg.init, "--init", ["stage3_bc", "stage4_latent_rl"], cfg.vlm)
    if before["config"]["actions"] != cfg.actions:
        raise DataError(f"--init {cfg.init}: was trained with --actions {before['config']['actions']}, not {cfg.actions}")
    if cfg.actions == "token":
        vlm = VLM(cfg.vlm, device, torch.float32)
        vlm.model.load_state_dict(tensors, strict=False)
        return vlm, None, before["arch"]
    vlm = VLM(cfg.vlm, device, common.vlm_dtype(device))
    return vlm, common.build_latent(vlm, before["arch"], tensors).to(device).requires_grad_(False), before["arch"]


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    device, rank, ranks = common.setup(cfg.seed)
    clip_high = cfg.clip_high or (0.28 if cfg.loss_type == "dapo" else 0.2)
    if cfg.micro % cfg.group:
        raise DataError(f"--micro {cfg.micro}: must be a multiple of --group {cfg.group}")
    processor, prompts, judge = Processor(cfg.vlm, cfg.max_prompt, cfg.max_pixels), Records(cfg.prompts), load_judge(cfg.judge)
    common.check(processor, prompts)
    vlm, latent, arch = start_policy(cfg, device)
    never = torch.tensor(processor.never_sampled, device=device)
    if cfg.actions == "token":
        reference, model = copy.deepcopy(vlm).requires_grad_(False), vlm
        vlm.train_last(arch["train_share"])
    else:
        reference, model = copy.deepcopy(latent.policy), latent.policy
        latent.train_only("policy")
    params = [p for p in model.parameters() if p.requires_grad]
    common.report(params, vlm, *([] if latent is None else [latent]))
    optimizer = common.adamw(params, cfg.lr)
    start = 0
    if saved := common.resume(cfg.out, "stage4_latent_rl", asdict(cfg)):
        (vlm.model if latent is None else latent).load_state_dict(saved[0], strict=False)
        optimizer.load_state_dict(saved[2]["optimizer"])
        start = saved[1]["step"]
    objective = common.wrap(model, lambda model, roll: sampled_logp(model, roll, cfg, never))
    order = index_stream(len(prompts), cfg.seed, start * cfg.batch * ranks)
    log = common.Log(cfg.out, f"stage 4: {cfg.loss_type} {cfg.actions}", start, cfg.steps)

    for step in range(start, cfg.steps):
        began = time.perf_counter()
        rows = [int(next(order)) for _ in range(cfg.batch * ranks)][rank::ranks]
        records = [prompts[i] for i in rows]
        prompt = processor.collate([processor.example(r, prompt_only=True) for r in records], left=True).to(device)
        u_NT = uniforms(cfg.seed, [(step, i, g) for i in rows for g in range(cfg.group)], cfg.max_new).to(device)
        with common.autocast(device):
            roll = rollout(vlm, latent, prompt, u_NT, group=cfg.group, temperature=cfg.temperature, top_k=cfg.top_k, never=never,
                           eos=processor.eos_id, pad=processor.pad_id, actions=cfg.actions)
        texts = decode(processor.tokenizer, roll, processor.eos_id)
        rolled = time.perf_counter()
        r_BG = torch.from_numpy(reward(judge, records, texts)).to(device)
        judged = time.perf_counter()
        adv_BG = group_advantages(r_BG, cfg.loss_type)
        failed_BG, equal_B = torch.isnan(r_BG), (adv_BG.abs() < 1e-6).all(1)
        keep_BG = ~failed_BG & ~(equal_B[:, None] & (cfg.loss_type == "dapo"))
        with common.autocast(device):
            metrics = update(objective, reference, optimizer, params, roll, adv_BG.flatten(), keep_BG.flatten(), cfg, never, clip_high)
        if device.type == "cuda":
            torch.cuda.synchronize()
        updated = time.perf_counter()
        r = torch.nan_to_num(r_BG)
        n = common.total((~failed_BG).sum()).clamp(min=1)
        spread = torch.from_numpy(np.nanstd(r_BG.cpu().numpy(), axis=1)).mean()
        different = sum(len(set(texts[k:k + cfg.group])) for k in range(0, len(texts), cfg.group)) / len(texts)
        log(step + 1, ("reward", "reward_std", "equal_groups", "entropy", "kl", "length"), reward=common.total(r.sum()) / n,
            reward_std=common.total(spread) / ranks, equal_groups=common.total(equal_B.float().mean()) / ranks,
            different=common.total(torch.tensor(different, device=device)) / ranks,
            judge_failed=common.total(failed_BG.sum()), length=common.total(roll.mask_NT.sum(1).float().mean()) / ranks,
            truncated=common.total((~(roll.tokens_NT == processor.eos_id).any(1)).float().mean()) / ranks,
            s_rollout=rolled - began, s_judge=judged - rolled, s_update=updated - judged, **metrics)
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            tensors = vlm_tensors(vlm) if latent is None else common.part_tensors(latent, latent.parts)
            common.save(cfg.out, step + 1, tensors, {"stage": "stage4_latent_rl", "finished": step + 1 == cfg.steps,
                                                     "config": asdict(cfg), "arch": arch}, optimizer)
    log.close()


if __name__ == "__main__":
    common.run(main)
