"""The answers of one RL step: rolled out, judged, drawn again where a group teaches nothing, and summed up. And the
answers to held-out prompts, which say what the best checkpoint is."""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import checkpoint
import common
from data import uniforms
from judge_http import over_ranks, spent
from rewards import check_reference, foresee, reward
from rollout import decode, rollout

HELD_OUT = 2**32 - 1  # in the noise of held-out answers, in the place of the step: no run has so many


def answerable(path, cfg, processor, judge):
    """-> the records of a file that can be answered and judged, all read before step 0."""
    also = partial(check_reference, judge)
    return common.usable(common.open_records(path, cfg), processor, cfg, prompt_only=True, also=also)


def equal_groups(adv_BG):
    """-> bool (B,): the groups whose rewards are all equal, or of which fewer than two responses were judged."""
    return (adv_BG.abs() < 1e-6).all(1)


class Answers:
    """Responses to the prompts of a step, and their rewards.

    advantages: (B, G) rewards -> (B, G). group: responses to a prompt, by default those of RL. `seconds` says how long
    the last step's rollouts and judgements took, `spent` what a judge that keeps count has spent on it."""

    def __init__(self, agent, processor, prompts, judge, advantages=None, group=None):
        self.agent, self.processor, self.prompts, self.judge = agent, processor, prompts, judge
        self.advantages, self.group = advantages, group or agent.cfg.group
        self.seconds, self.spent = {"s_rollout": 0.0, "s_judge": 0.0}, {}
        cfg, never = agent.cfg, agent.never
        self.settings = {"group": self.group, "temperature": cfg.temperature, "top_k": cfg.top_k, "never": never}
        self.settings |= {"eos": processor.eos_id, "pad": processor.pad_id}

    def draw(self, step, rows, *again):
        """Answer the prompts `rows` once -> (Rollout, texts, rewards (B, G))."""
        roll, records, texts = self.say(step, rows, *again)
        rolled = time.perf_counter()
        r_BG = torch.from_numpy(reward(self.judge, records, texts)).to(self.agent.place.device)
        self.seconds["s_judge"] += time.perf_counter() - rolled
        return roll, texts, r_BG

    def say(self, step, rows, *again):
        """-> (Rollout, records, texts). A judge that works on its own is asked about a response soon after its end.

        The noise of a response depends on the seed, the step, its prompt and its place in the group; `again`: and on
        which extra draw this is."""
        cfg, place = self.agent.cfg, self.agent.place
        began = time.perf_counter()
        records = [self.prompts[i] for i in rows]
        examples = [self.processor.example(r, prompt_only=True) for r in records]
        prompt = self.processor.collate(examples, left=True).to(place.device)
        noise = [(step, i, g, *again) for i in rows for g in range(self.group)]

        def ended(n, tokens):
            foresee(self.judge, [records[n // self.group]], [self.processor.tokenizer.decode(tokens)])

        early = {"ended": ended} if hasattr(self.judge, "foresee") else {}
        with place.autocast():
            u_NT = uniforms(cfg.seed, noise, cfg.max_new).to(place.device)
            roll = rollout(self.agent.vlm, self.agent.latent, prompt, u_NT, **self.settings, **early)
        texts = decode(self.processor.tokenizer, roll, self.processor.eos_id)
        foresee(self.judge, [record for record in records for _ in range(self.group)], texts)
        self.seconds["s_rollout"] += time.perf_counter() - began
        return roll, records, texts

    def collect(self, step, rows):
        """-> (Rollout, texts, rewards (B, G), advantages (B, G), number of groups that were drawn again).

        Dynamic sampling: a group whose rewards are all equal teaches nothing. It is drawn again with fresh noise, up
        to cfg.resample times."""
        self.seconds, group, resampled = {"s_rollout": 0.0, "s_judge": 0.0}, self.group, 0
        before = spent(self.judge)
        roll, texts, r_BG = self.draw(step, rows)
        for again in range(1, self.agent.cfg.resample + 1):
            at = equal_groups(self.advantages(r_BG)).nonzero()[:, 0].tolist()
            if not at:
                break
            more, more_texts, r_BG[at] = self.draw(step, [rows[b] for b in at], again)
            places = [b * group + g for b in at for g in range(group)]
            roll = roll.put(places, more, self.processor.pad_id)
            for n, text in zip(places, more_texts):
                texts[n] = text
            resampled += len(at)
        self.spent = over_ranks({name: n - before[name] for name, n in spent(self.judge).items()})
        return roll, texts, r_BG, self.advantages(r_BG), resampled


def summary(r_BG, adv_BG, roll, texts, eos):
    """What stage 4 logs of a step's responses, means over all ranks -> metrics; no reward where none was judged."""
    ranks, group = checkpoint.world_size(), r_BG.shape[1]
    failed_BG = torch.isnan(r_BG)
    reward_sum, judged = (common.total(x.sum()) for x in (r_BG.nan_to_num(), ~failed_BG))
    std_B = np.nanstd(r_BG[~failed_BG.all(1)].cpu().numpy(), axis=1)  # of the groups that have a judgement
    std_sum, judged_groups = (common.total(x) for x in (float(std_B.sum()), len(std_B)))
    groups = [texts[k : k + group] for k in range(0, len(texts), group)]
    ended_N = (roll.tokens_NT == eos).any(1)
    means = {
        "equal_groups": equal_groups(adv_BG).float().mean(),
        "different": torch.tensor(sum(len(set(g)) for g in groups) / len(texts), device=r_BG.device),
        "length": roll.mask_NT.sum(1).float().mean(),
        "truncated": (~ended_N).float().mean(),
    }
    metrics = {"judge_failed": common.total(failed_BG.sum())} | {k: common.total(v) / ranks for k, v in means.items()}
    if judged > 0:
        metrics |= {"reward": reward_sum / judged, "reward_std": std_sum / judged_groups}
    return metrics


def code_use(roll, latent):
    """-> {"use": how often each code was chosen in a step's responses, a list of K counts over all ranks}; {} without
    codes."""
    if latent is None:
        return {}
    codes_M = roll.actions_NT[roll.mask_NT]
    return {"use": common.total(torch.bincount(codes_M, minlength=latent.quantiser.codes)).tolist()}


class HeldOut:
    """The reward on prompts that RL does not practise on, one answer to each, and the run's best checkpoint by it.

    The answers are sampled as those of RL, since that is the policy whose reward RL raises. Their noise depends on the
    seed and the prompt alone, so two evaluations of a run differ by the policy alone.

    The best checkpoint lies in OUT/best, and nothing but that folder says which it is. A run that goes on from an
    earlier checkpoint finds it there, evaluates the same policies again, and ends with the same best."""

    def __init__(self, agent, processor, prompts, judge):
        self.agent, self.prompts = agent, prompts
        self.answers = Answers(agent, processor, prompts, judge, group=1)
        self.folder = Path(agent.cfg.out) / checkpoint.BEST
        _, run = agent.contents(0)
        found = checkpoint.resume(self.folder, run["stage"], run["config"], ("steps",), with_optimizer=False)
        self.best = (found[1]["val_reward"], found[1]["step"]) if found else None

    def due(self, step):
        """Is the policy after `step` steps to be evaluated?"""
        return step % self.agent.cfg.eval_every == 0 or step == self.agent.cfg.steps

    def __call__(self, step):
        """Evaluate the policy after `step` steps and keep it if it is the best so far -> metrics."""
        reward_sum, judged, failed = self.sums().tolist()
        metrics, words = {"val_failed": failed}, "no answer got a score that can be used"
        if judged:
            metrics["val_reward"] = value = reward_sum / judged
            words = f"{value:.4f}"
            if self.best is None or value > self.best[0]:
                self.keep(step, value)
                words += ", the best so far"
        common.say(f"held-out reward after step {step}: {words}")
        return metrics

    def keep(self, step, value):
        """Write the best checkpoint. It counts as finished whatever becomes of the run: it may be used at any time."""
        tensors, state = self.agent.contents(step)
        checkpoint.save(self.folder, step, tensors, state | {"finished": True, "val_reward": value}, keep=1)
        self.best = value, step

    def sums(self):
        """-> the sum of the rewards, how many there are, and how many failed, over all ranks, float64 (3,).

        As many answers at a time as RL draws. The ranks take such batches in turn: what is padded beside what does
        not depend on their number, and so no result does."""
        cfg, place, n = self.agent.cfg, self.agent.place, len(self.prompts)
        size = cfg.batch * cfg.group
        sums = torch.zeros(3, dtype=torch.float64)
        starts = range(place.rank * size, n, place.ranks * size)
        said = [self.answers.say(HELD_OUT, range(first, min(first + size, n)))[1:] for first in starts]
        for records, texts in said:  # a server has judged the first ones meanwhile
            r_B1 = torch.from_numpy(reward(self.answers.judge, records, texts)).double()
            failed_B1 = torch.isnan(r_B1)
            sums += torch.stack([r_B1.nan_to_num().sum(), (~failed_B1).sum(), failed_B1.sum()])
        return common.total(sums)

    def tell(self):
        """Say which checkpoint is the best, and where it lies."""
        if self.best is None:
            common.say("there is no best checkpoint: no held-out answer got a score that can be used")
        else:
            value, step = self.best
            common.say(f"best held-out reward: {value:.4f}, after step {step}; its checkpoint is in {self.folder}")
