"""The answers of one RL step: rolled out, judged, drawn again where a group teaches nothing, and summed up."""

import time

import numpy as np
import torch

import checkpoint
import common
from data import uniforms
from rewards import reward
from rollout import decode, rollout


def equal_groups(adv_BG):
    """-> bool (B,): the groups whose rewards are all equal, or of which fewer than two responses were judged."""
    return (adv_BG.abs() < 1e-6).all(1)


class Answers:
    """Responses to the prompts of a step, and their rewards.

    advantages: (B, G) rewards -> (B, G). `seconds` says how long the last step's rollouts and judgements took."""

    def __init__(self, agent, processor, prompts, judge, advantages):
        self.agent, self.processor, self.prompts, self.judge = agent, processor, prompts, judge
        self.advantages, self.seconds = advantages, {}
        cfg, never = agent.cfg, agent.never
        self.settings = {"group": cfg.group, "temperature": cfg.temperature, "top_k": cfg.top_k, "never": never}
        self.settings |= {"eos": processor.eos_id, "pad": processor.pad_id}

    def draw(self, step, rows, *again):
        """Answer the prompts `rows` once -> (Rollout, texts, rewards (B, G)).

        The noise of a response depends on the seed, the step, its prompt and its place in the group; `again`: and on
        which extra draw this is."""
        cfg, place = self.agent.cfg, self.agent.place
        began = time.perf_counter()
        records = [self.prompts[i] for i in rows]
        examples = [self.processor.example(r, prompt_only=True) for r in records]
        prompt = self.processor.collate(examples, left=True).to(place.device)
        noise = [(step, i, g, *again) for i in rows for g in range(cfg.group)]
        with place.autocast():
            u_NT = uniforms(cfg.seed, noise, cfg.max_new).to(place.device)
            roll = rollout(self.agent.vlm, self.agent.latent, prompt, u_NT, **self.settings)
        texts = decode(self.processor.tokenizer, roll, self.processor.eos_id)
        rolled = time.perf_counter()
        r_BG = torch.from_numpy(reward(self.judge, records, texts)).to(place.device)
        self.seconds["s_rollout"] += rolled - began
        self.seconds["s_judge"] += time.perf_counter() - rolled
        return roll, texts, r_BG

    def collect(self, step, rows):
        """-> (Rollout, texts, rewards (B, G), advantages (B, G), number of groups that were drawn again).

        Dynamic sampling: a group whose rewards are all equal teaches nothing. It is drawn again with fresh noise, up
        to cfg.resample times."""
        self.seconds, group, resampled = {"s_rollout": 0.0, "s_judge": 0.0}, self.agent.cfg.group, 0
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
