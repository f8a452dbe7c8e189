"""The responses that the evaluation judges, drawn in batches. Ranks share the batches; the responses stay the same."""

from dataclasses import dataclass

import torch

from data import uniforms
from ranks import gather
from rollout import decode, rollout


@dataclass
class Response:
    """What one response consists of."""

    text: str
    tokens: list  # up to and with EOS
    codes: list  # of the action behind each token; empty for a token-level model


def responses(tokenizer, roll, eos):
    """Rollout -> [prompt][sample] Response."""
    codes_NT = roll.tokens_NT[:, :0] if roll.actions_NT is None else roll.actions_NT
    rows = zip(decode(tokenizer, roll, eos), roll.tokens_NT.tolist(), codes_NT.tolist(), roll.mask_NT.sum(1).tolist())
    said = [Response(text, tokens[:n], codes[:n]) for text, tokens, codes, n in rows]
    return [said[k : k + roll.group] for k in range(0, len(said), roll.group)]


class Speaker:
    """Draws responses of any model; what is drawn depends on the seed, the test and the prompt's place in it alone."""

    def __init__(self, cfg, processor, place):
        self.cfg, self.processor, self.place = cfg, processor, place
        self.never = torch.tensor(processor.never_sampled, device=place.device)

    def batch(self, model, records, first, group, temperature, salt):
        """`group` responses to each record of a batch, of which the first is number `first` of its file."""
        cfg, processor = self.cfg, self.processor
        prompts = [processor.example(r, prompt_only=True) for r in records]
        rows = [(salt, first + j, g) for j in range(len(records)) for g in range(group)]
        with self.place.autocast():
            roll = rollout(
                *model,
                processor.collate(prompts, left=True).to(self.place.device),
                uniforms(cfg.seed, rows, cfg.max_new).to(self.place.device),
                group=group,
                temperature=temperature,
                never=self.never,
                eos=processor.eos_id,
                pad=processor.pad_id,
            )
        return responses(processor.tokenizer, roll, processor.eos_id)

    def __call__(self, model, records, group, temperature, salt):
        """`group` responses to each record -> [record][sample] Response, on every rank.

        Rank r draws the batches r, r + ranks, ... Batches are not cut: what stands beside a prompt touches the last
        digits of its logits, and the results are to be those of one process."""
        size, ranks = self.cfg.batch, self.place.ranks
        starts = range(0, len(records), size)
        mine = [
            self.batch(model, records[i : i + size], i, group, temperature, salt)
            for i in starts[self.place.rank :: ranks]
        ]
        shares = gather(mine)  # [rank][its batches][record][sample]
        return [said for k in range(len(starts)) for said in shares[k % ranks][k // ranks]]


def texts(said):
    """[record][sample] Response -> the same of their texts."""
    return [[response.text for response in samples] for samples in said]
