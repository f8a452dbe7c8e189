"""Stage 4: reinforcement learning of the policy over latent actions; everything else stays frozen.

Each step: 1. roll out G responses to each of B prompts; 2. score them, r = sum of the judge's scores / sum of the
reference's; 3. A = group_advantages(r); 4. one update of pi on the ACTION log-probabilities with policy_loss. The
contexts e kept by the rollout are all that the update reads: no pass through the VLM. `--actions token` is the
baseline: the same algorithms, prompts, group, judge and number of rollouts on the TOKEN log-probabilities of the
VLM's last blocks, final norm, embeddings and head.

With ratio = exp(logp - logp_old), s = min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), and the k3 estimator
kl = exp(logp_ref - logp) - (logp_ref - logp) - 1 of KL(pi || pi_ref), the per-token loss is l = -s + beta kl. logp_old
is what the first update on a rollout computes, not what the rollout logged while it sampled: there the same weights
give slightly other numbers in bfloat16. So with one update the ratio is exactly 1. The algorithms are

    grpo     A = (r - mean) / std of the group    mean over sequences of the mean over tokens of l    (arXiv 2402.03300)
    dr_grpo  A = r - mean                         sum of l / (N * max_length)                         (arXiv 2503.20783)
    dapo     A = (r - mean) / std, clip_high .28,
             groups with equal rewards left out   sum of l / tokens of the global batch               (arXiv 2503.14476)
    bnpo     A = (r - mean) / std                 sum of l / tokens of the local batch                (method of TRL)

Departures. Log-probabilities are those of the very distribution that was sampled: with --top-k, policy and reference
are both renormalised over the codes or tokens that could be chosen then (the release samples the top 32 codes and
scores all 128). Each algorithm keeps its own advantage and normaliser (the release divides all of them by the
standard deviation). DAPO's dynamic sampling is off by default, so that every algorithm has the same number of
rollouts; --resample N draws groups with equal rewards again, at most N times and for the same prompts (DAPO goes on to
other prompts until the batch is full). DAPO's overlong penalty is not used, and its KL term is kept (--beta 0 removes
it). A judge's failure is left out of its group's statistics and counted, never a mean.

    python stage4_latent_rl.py --init runs/stage3 --out runs/rl
    python stage4_latent_rl.py --actions token --init runs/sft --out runs/rl_token
    torchrun --nproc-per-node 4 stage4_latent_rl.py --preset paper --vlm Qwen/Qwen2.5-VL-3B-Instruct \\
        --prompts prompts.jsonl --judge http://host:8000/v1 --judge-model NAME --init runs/3b/stage3 --out runs/3b/rl
"""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

import checkpoint
import common
from answers import Answers, HeldOut, answerable, code_use, equal_groups, summary
from common import option
from data import DataError, Processor, index_stream
from judge_http import Judging, over_ranks, patience, spent, tell
from rewards import load_judge
from rollout import sampled_logp


# ------------------------------------------------------------------------------------------- the algorithms' maths
def per_sequence(mask_NT, rows, tokens, max_length):
    """Mean over sequences of the mean over their tokens: a token of a short response weighs more."""
    return mask_NT / mask_NT.sum(1, keepdim=True).clamp(min=1) / rows


def constant_length(mask_NT, rows, tokens, max_length):
    """Sum over tokens / (N * max_length): a token weighs the same in a short and in a long response."""
    return mask_NT / (rows * max_length)


def global_tokens(mask_NT, rows, tokens, max_length):
    """Mean over all tokens of the global batch."""
    return mask_NT / tokens


def local_tokens(mask_NT, rows, tokens, max_length):
    """Mean over the tokens of this rank's batch: the one normaliser that is local, as its authors have it."""
    return mask_NT / mask_NT.sum().clamp(min=1)


def clipped(logp, ratio, adv, clip_low, clip_high):
    """PPO's surrogate: min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)."""
    return torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)


@dataclass(frozen=True)
class Algorithm:
    """What sets one member of GRPO's family apart."""

    label: str  # its name in tables
    weights: Callable  # of the token losses in the loss, see `token_weights`
    by_std: bool = True  # advantages are divided by the group's standard deviation
    clip_high: float = 0.2  # the ratio is clipped from above at 1 + clip_high
    surrogate: Callable = clipped  # what is maximised at each token, the KL apart
    equal_groups: bool = True  # groups whose rewards are all equal take part (with advantage 0, so with their KL alone)


ALGORITHMS = {
    "grpo": Algorithm("GRPO", per_sequence),
    "dr_grpo": Algorithm("Dr.GRPO", constant_length, by_std=False),
    "dapo": Algorithm("DAPO", global_tokens, clip_high=0.28, equal_groups=False),
    "bnpo": Algorithm("BNPO", local_tokens),
}


def algorithm(loss_type):
    if loss_type not in ALGORITHMS:
        raise ValueError(f"unknown loss_type {loss_type!r}")
    return ALGORITHMS[loss_type]


def group_advantages(reward_BG, loss_type):
    """Advantages within each group: (B, G) rewards -> (B, G), float32.

    r - mean, divided by the group's standard deviation (unbiased, + 1e-6) except in dr_grpo. A group whose rewards
    are all equal gives 0. NaN marks a failed judgement: left out of mean and standard deviation, advantage 0."""
    by_std = algorithm(loss_type).by_std
    r, valid = reward_BG.float(), ~torch.isnan(reward_BG)
    n = valid.sum(1, keepdim=True)
    mean = torch.where(valid, r, 0.0).sum(1, keepdim=True) / n.clamp(min=1)
    adv = torch.where(valid, r - mean, 0.0)
    if not by_std:
        return adv
    std = ((adv**2).sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    equal = adv.abs().amax(1, keepdim=True) < 1e-6  # rounding must not be blown up to an advantage
    return torch.where(equal, 0.0, adv / (std + 1e-6))


def k3(logp, logp_ref):
    """Estimate of KL(pi || pi_ref) from samples of pi, >= 0: exp(d) - d - 1, d = logp_ref - logp."""
    d = logp_ref - logp
    return torch.exp(d) - d - 1


def token_losses(logp_NT, logp_old_NT, logp_ref_NT, adv_N, mask_NT, clip_low, clip_high, beta, surrogate=clipped):
    """l = -surrogate + beta kl at each sampled token, 0 at padding -> (N, T)."""
    # padding may hold anything: make it 0 before exp, or inf * 0 would be nan
    mask_NT = mask_NT.bool()
    logp, logp_old = (torch.where(mask_NT, x, 0.0) for x in (logp_NT, logp_old_NT))
    ratio, adv = torch.exp(logp - logp_old), adv_N[:, None]
    loss_NT = -surrogate(logp, ratio, adv, clip_low, clip_high)
    if beta:
        loss_NT = loss_NT + beta * k3(logp, torch.where(mask_NT, logp_ref_NT, 0.0))
    return torch.where(mask_NT, loss_NT, 0.0)


def token_weights(mask_NT, loss_type, max_length, rows=None, tokens=None):
    """The weight of each token's loss -> (N, T) float32, 0 at padding; the loss is the weighted sum.

    rows, tokens: how many the global batch has; by default those of this one. With the weights of the whole rollout,
    a part of its rows gives its part of the loss: micro-batches, and ranks, change nothing."""
    mask = mask_NT.float()
    rows = len(mask) if rows is None else rows
    tokens = mask.sum().clamp(min=1) if tokens is None else tokens
    return algorithm(loss_type).weights(mask, rows, tokens, max_length)


def policy_loss(
    logp_NT,
    logp_old_NT,
    logp_ref_NT,
    adv_N,
    mask_NT,
    *,
    loss_type,
    clip_low,
    clip_high,
    beta,
    max_length,
    num_tokens=None,
    weights_NT=None,
):
    """The clipped surrogate with a KL penalty -> scalar to minimise.

    logp, logp_old, logp_ref: (N, T) log-probabilities of what was sampled under the policy that trains, the one that
    sampled and the reference (logp_ref may be None where beta is 0); adv (N,); mask (N, T), 1 at sampled tokens up to
    and with EOS. num_tokens: tokens of the global batch (dapo; by default this batch's). weights_NT: `token_weights`,
    where they are known already, as for a part of a rollout."""
    if weights_NT is None:
        weights_NT = token_weights(mask_NT, loss_type, max_length, tokens=num_tokens)
    surrogate = algorithm(loss_type).surrogate
    loss_NT = token_losses(logp_NT, logp_old_NT, logp_ref_NT, adv_N, mask_NT, clip_low, clip_high, beta, surrogate)
    return (loss_NT * weights_NT).sum()


# ------------------------------------------------------------------------------------------------------- the settings
@dataclass
class Config(Judging):
    actions: str = option("latent", "what the policy chooses", choices=("latent", "token"))
    loss_type: str = option("grpo", "the algorithm, see above", choices=tuple(ALGORITHMS))
    vlm: str = option("tiny/vlm", "folder or hub name of the vision-language model")
    init: str = option("runs/stage3", "finished run of stage 3 (token: of stage 3 with --actions token)")
    prompts: str = option("runs/world/task_prompts.jsonl", "records; the last assistant message is the reference")
    out: str = option("runs/rl", "folder of this run")
    val: str = option("", "held-out prompts, to evaluate RL on and to keep the best checkpoint by; '': none")
    eval_every: int = option(25, "steps between evaluations on --val", least=1)
    steps: int = option(100, "rollouts of batch * group responses, one update each", least=1)
    batch: int = option(8, "prompts a step and rank; paper: on 4 ranks", least=1, paper=1)
    group: int = option(8, "responses to each prompt; each learns from the others", least=2, paper=8)
    lr: float = option(1e-3, "constant learning rate", paper=1e-6)
    clip_norm: float = option(1.0, "gradients are clipped to this norm; 0: they are not")
    beta: float = option(0.01, "weight of the KL to the policy that RL started from", paper=0.01)
    clip_low: float = option(0.2, "the ratio is clipped from below at 1 - clip_low", paper=0.2)
    clip_high: float = option(0.0, "and from above at 1 + clip_high; 0: the algorithm's own, 0.28 for dapo, else 0.2")
    resample: int = option(0, "extra draws, at most, for the groups whose rewards are all equal; 0: none")
    updates: int = option(1, "updates per rollout", least=1, paper=1)
    micro: int = option(0, "most rows per backward pass; 0: all. Changes memory, not the result")
    checkpointing: str = option("no", "token: compute blocks again in the backward pass", choices=("no", "yes"))
    temperature: float = option(1.0, "of sampling actions, or tokens; 0 would try nothing", least=0.01, paper=1.0)
    top_k: int = option(0, "sample from the k most likely only; 0: all")
    max_prompt: int = option(400, "longest prompt, tokens", least=1, paper=1024)
    max_new: int = option(64, "longest response, tokens", least=1, paper=1024)
    max_pixels: int = option(280 * 420, "images are scaled down to this many pixels", least=1, paper=280 * 420)
    seed: int = option(0, "seed of sampling and of the prompts' order")
    log: str = common.log_option()
    save_every: int = option(50, "steps between checkpoints", least=1)
    keep: int = option(2, "checkpoints that are kept, the newest", least=1)


SILENT_STEPS = 3  # so many steps in a row without any judgement end a run


# --------------------------------------------------------------------------------------------------------- one RL step
class Agent:
    """What rolls out and what trains: the policy (latent) or the VLM's last blocks (token), and the reference."""

    def __init__(self, cfg, place, never):
        self.cfg, self.place, self.never = cfg, place, never
        self.vlm, self.latent, self.arch = common.load_agent(cfg.init, cfg.actions, cfg.vlm, place)
        if self.latent is None:
            self.model, self.reference = self.vlm, self.vlm.reference()
            if cfg.checkpointing == "yes":
                self.vlm.recompute_blocks()
        else:
            reference = copy.deepcopy(self.latent.policy).requires_grad_(False)
            self.model, self.reference = self.latent.policy, common.settle(reference, place.dtype)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.step_weights = common.Stepper(trained, cfg.lr, cfg.clip_norm)
        common.report(trained, self.vlm, *([] if self.latent is None else [self.latent]))

    def logp(self, model, roll):
        """`sampled_logp` under the distribution that sampled."""
        return sampled_logp(model, roll, self.cfg.temperature, self.never)

    @torch.no_grad()
    def reference_logp(self, roll):
        """The same under the reference. None if beta is 0."""
        if not self.cfg.beta:
            return None
        return self.logp(self.reference, roll)[0]

    def resume(self):
        """-> the step from which to go on."""
        cfg = self.cfg
        saved = checkpoint.resume(cfg.out, "stage4_latent_rl", asdict(cfg), may_grow=("steps",))
        if not saved:
            return 0
        tensors, state, going_on = saved
        if self.latent is None:
            common.load_trained(self.vlm, tensors, self.arch["train_share"], cfg.out)
        else:
            checkpoint.load_into(self.latent, tensors, cfg.out)
        self.step_weights.load_state_dict(going_on["optimizer"])
        return state["step"]

    def contents(self, step):
        """-> (tensors, state) of a checkpoint after `step` steps."""
        cfg = self.cfg
        if self.latent is None:
            tensors = self.vlm.trained_tensors()
        else:
            tensors = common.part_tensors(self.latent, self.latent.parts)
        state = {"stage": "stage4_latent_rl", "finished": step == cfg.steps, "config": asdict(cfg), "arch": self.arch}
        return tensors, state

    def save(self, step):
        checkpoint.save(self.cfg.out, step, *self.contents(step), self.step_weights, keep=self.cfg.keep)


def micro_batches(rows, group, micro):
    """-> slices of at most `micro` rows (0: all), of whole groups where one fits, else each inside one group: a prompt
    is read once for all of its rows in a slice."""
    if not micro:
        return [slice(0, rows)]
    if micro >= group:
        size = micro // group * group
        return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
    starts = range(0, rows, group)
    return [slice(i + k, i + min(k + micro, group)) for i in starts for k in range(0, group, micro)]


def update(agent, objective, roll, adv_N, keep_N):
    """cfg.updates optimizer steps on one rollout -> metrics. Rows with keep_N False take no part in any mean.

    Where no rank keeps a row there is nothing to learn, so no step, which would move by old momentum alone -> {}"""
    cfg, ranks = agent.cfg, common.world_size()
    clip_high = cfg.clip_high or algorithm(cfg.loss_type).clip_high
    mask_NT = roll.mask_NT & keep_N[:, None]
    rows, tokens = (common.total(x.sum()).float() for x in (keep_N, mask_NT))
    if rows == 0:
        return {}
    # DDP averages over ranks, so a rank's normalisers are the global ones / ranks
    weights_NT = token_weights(mask_NT, cfg.loss_type, cfg.max_new, rows / ranks, tokens / ranks)
    logp_old_NT, parts = torch.zeros_like(roll.logp_NT), micro_batches(len(mask_NT), roll.group, cfg.micro)
    for turn in range(cfg.updates):
        sums = torch.zeros(3, device=mask_NT.device)
        for part in parts:
            some, mask = roll.rows(part), mask_NT[part]
            with common.exchanging(objective, last=part is parts[-1]):
                with agent.place.autocast():
                    (logp, H), logp_ref = objective(some), agent.reference_logp(some)
                if turn == 0:  # the ratio is exactly 1; the rollout's own logp comes from other kernels, see logp_gap
                    logp_old_NT[part] = logp.detach()
                loss = policy_loss(
                    logp,
                    logp_old_NT[part],
                    logp_ref,
                    adv_N[part],
                    mask,
                    loss_type=cfg.loss_type,
                    clip_low=cfg.clip_low,
                    clip_high=clip_high,
                    beta=cfg.beta,
                    max_length=cfg.max_new,
                    weights_NT=weights_NT[part],
                )
                loss.backward()
            with torch.no_grad():
                ratio = torch.exp(logp - logp_old_NT[part])[mask]
                clipped = (ratio < 1 - cfg.clip_low) | (ratio > 1 + clip_high)
                kl = torch.zeros_like(logp) if logp_ref is None else k3(logp, logp_ref)
                sums += torch.stack([kl[mask].sum(), H[mask].sum(), clipped.sum().float()])
        norm = agent.step_weights(roll.prompt.records)
        kl, entropy, clip_share = common.total(sums) / tokens
    gap_NT = torch.where(mask_NT, (logp_old_NT - roll.logp_NT).abs(), 0.0)
    gaps = {"logp_gap": common.total(gap_NT.sum()) / tokens, "logp_gap_max": largest(gap_NT.max())}
    return {"grad_norm": norm, "kl": kl, "entropy": entropy, "clip_share": clip_share} | gaps


def largest(x):
    """The largest of a number over all ranks -> tensor: each rank writes its own into one place of a sum."""
    places = torch.zeros(common.world_size(), device=x.device)
    places[dist.get_rank() if dist.is_initialized() else 0] = x
    return common.total(places).max()


def give_up(agent, start, step):
    """The judge has been silent since `step`, and nothing has moved: save that, and raise DataError."""
    if step > start:
        agent.save(step)
    why = f"no response of {SILENT_STEPS} steps in a row got a score that can be used, so nothing can be learnt"
    raise DataError(f"--judge {agent.cfg.judge}: {why}; mend the judge, and the same command goes on from step {step}")


def train(cfg, guard, place):
    processor = Processor(cfg.vlm, cfg.max_prompt, cfg.max_pixels, max_decode=cfg.max_decode)
    judge = load_judge(cfg.judge, cfg)
    prompts = answerable(cfg.prompts, cfg, processor, judge)
    val_prompts = answerable(cfg.val, cfg, processor, judge) if cfg.val else None
    never = torch.tensor(processor.never_sampled, device=place.device)
    agent = Agent(cfg, place, never)
    start = agent.resume()
    objective = common.wrap(agent.model, agent.logp)
    order = index_stream(len(prompts), cfg.seed, start * cfg.batch * place.ranks)
    answers = Answers(agent, processor, prompts, judge, lambda r_BG: group_advantages(r_BG, cfg.loss_type))
    held_out = HeldOut(agent, processor, val_prompts, judge) if cfg.val else None
    log, silent = common.Log(cfg.out, f"stage 4: {cfg.loss_type} {cfg.actions}", start, cfg.steps, cfg), 0
    if held_out and start == 0:
        log(0, **held_out(0))

    for step in range(start, cfg.steps):
        rows = [int(next(order)) for _ in range(cfg.batch * place.ranks)][place.rank :: place.ranks]
        roll, texts, r_BG, adv_BG, resampled = answers.collect(step, rows)
        began = time.perf_counter()
        equal_B1 = equal_groups(adv_BG)[:, None]
        keep_BG = ~torch.isnan(r_BG) & (~equal_B1 | algorithm(cfg.loss_type).equal_groups)
        metrics = update(agent, objective, roll, adv_BG.flatten(), keep_BG.flatten())
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = answers.spent | answers.seconds | {"s_update": time.perf_counter() - began}

        metrics |= summary(r_BG, adv_BG, roll, texts, processor.eos_id) | code_use(roll, agent.latent) | seconds
        if held_out and held_out.due(step + 1):
            metrics |= held_out(step + 1)
        metrics |= {"skipped": agent.step_weights.skipped, "resampled": common.total(resampled)}
        log(step + 1, ("reward", "reward_std", "equal_groups", "entropy", "kl", "length"), **metrics)
        silent = 0 if "reward" in metrics else silent + 1
        if silent == SILENT_STEPS:
            log.close()
            give_up(agent, start, step + 1 - silent)
        if guard.asked() or step + 1 == cfg.steps or (step + 1) % cfg.save_every == 0:
            agent.save(step + 1)
            guard.leave_if_asked()
    log.close()
    tell(over_ranks(spent(judge)))
    if held_out:
        held_out.tell()


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    place = common.setup(cfg, patience=patience(cfg, cfg.batch * cfg.group * (1 + cfg.resample)))
    with checkpoint.Guard(cfg.out) as guard:
        train(cfg, guard, place)


if __name__ == "__main__":
    common.run(main)
