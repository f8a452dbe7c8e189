"""A trained agent of a run, ready to be asked: what it says, what it preferred, and codes chosen in its place."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

import checkpoint
import common
from data import DataError, Processor, uniforms
from rollout import action_logits, rollout, token_states
from vlm import log_probs

STAGES = {"latent": ("rl_latent", "stage3"), "token": ("rl_token", "sft")}  # of a run, after RL and before it
BEST = 3  # codes and tokens that are shown as preferred
CODES = r"\d{1,9}(?: +\d{1,9})*"


def find_stage(run, actions):
    """-> the folder with checkpoints: `run` itself, or its last stage with such actions. DataError without any."""
    if not Path(run).is_dir():
        raise DataError(f"--run {run}: no such folder; a relative path begins where the program is started")
    for folder in (Path(run), *(Path(run) / name for name in STAGES[actions])):
        if checkpoint.latest(folder):
            return folder
    after, before = STAGES[actions]
    missing = f"has no {after} and no {before}, so there is nothing for --actions {actions}"
    raise DataError(f"--run {run}: {missing}; `make demo` makes both in runs/demo")


class Agent:
    """A trained agent: answers records, and says afterwards what else it could have said."""

    def __init__(self, cfg):
        self.folder, self.place = find_stage(cfg.run, cfg.actions), common.setup(cfg)
        vlm = checkpoint.read_state(self.folder)["config"].get("vlm", "")
        _, self.state = checkpoint.load(self.folder, "--run", ["stage3_bc", "stage4_latent_rl"], vlm)
        trained = self.state["config"]
        if trained["actions"] != cfg.actions:
            raise DataError(f"--run {self.folder}: was trained with --actions {trained['actions']}, not {cfg.actions}")
        self.processor = Processor(vlm, cfg.max_prompt, trained["max_pixels"], max_decode=cfg.max_decode)
        self.vlm, self.latent, _ = common.load_agent(self.folder, cfg.actions, vlm, self.place)
        self.never = torch.tensor(self.processor.never_sampled, device=self.place.device)
        self.codes = self.latent.quantiser.codes if self.latent else 0

    def say(self, record, noise, cfg, speech, steering):
        """Answer one record -> Rollout of one row, up to EOS or to where it was stopped.

        noise: a tuple of integers that the sampling depends on, beside cfg.seed. speech, steering: `heard` and `steer`
        of `rollout_latent`; an agent that chooses tokens has no use for the latter."""
        example = self.processor.example(record, prompt_only=True)
        prompt = self.processor.collate([example], left=True).to(self.place.device)
        u_NT = uniforms(cfg.seed, [noise], cfg.max_new).to(self.place.device)
        settings = {"never": self.never, "eos": self.processor.eos_id, "pad": self.processor.pad_id, "heard": speech}
        if self.latent:
            settings["steer"] = steering
        with self.place.autocast():
            return rollout(self.vlm, self.latent, prompt, u_NT, temperature=cfg.temperature, **settings)

    @torch.no_grad()
    def preferred(self, roll):
        """What stood first in the choice of each token of an answer -> (codes, tokens), each a list over the answer.

        codes[t]: the policy's most likely codes; [] where tokens are the actions. tokens[t]: the world model's most
        likely tokens, given the code that was taken; or those of the VLM. Each [(index, probability)], the most likely
        first. The probabilities are those at temperature 1, without what was forced or banned."""
        with self.place.autocast():
            if self.latent:
                codes = best(log_probs(action_logits(self.latent.policy, roll)[0]))
                e_TD = torch.cat((roll.e_BLD[:, -1:], roll.e_NTD[:, :-1]), 1)[0]
                y_TD = self.latent.speak(e_TD, roll.actions_NT[0])
            else:
                y_TD = token_states(self.vlm, roll)[0]
                codes = [[] for _ in y_TD]
            return codes, best(log_probs(self.vlm.scorer()(y_TD), never=self.never))


def best(logp):
    """Log-probabilities of a row of indices each -> for each row [(index, probability)] of the BEST most likely."""
    p, at = logp.exp().topk(min(BEST, logp.shape[-1]), -1)
    return [list(zip(*row)) for row in zip(at.tolist(), p.tolist())]


# ------------------------------------------------------------------------------------------------------ forced, banned
@dataclass
class Steering:
    """The codes that the user chooses in place of the policy. Called by the rollout before each action."""

    forced: tuple = ()
    first: int = 1  # the token, from 1, at which the forced codes begin
    on: bool = False  # the last one goes on, in later answers as well
    banned: set = field(default_factory=set)

    def code(self, n):
        """-> the forced code of token n, from 1, or None."""
        k = n - self.first
        if not self.forced or k < 0 or (k >= len(self.forced) and not self.on):
            return None
        return self.forced[min(k, len(self.forced) - 1)]

    def __call__(self, t, logits_NK):
        """t from 0; the policy's logits (N, K) -> the same with minus infinity at all codes that must not be taken."""
        code = self.code(t + 1)
        out = set(range(logits_NK.shape[-1])) - {code} if code is not None else self.banned
        at = torch.tensor(sorted(out), dtype=torch.long, device=logits_NK.device)
        return logits_NK.index_fill(-1, at, -torch.inf)

    def force(self, text, codes):
        """'17', '17 17 3', '17*', '17 @6' or 'off'. DataError says what is wrong."""
        if text == "off":
            self.forced = ()
            return
        found = re.fullmatch(rf"({CODES}) *(\*?)(?: *@ *(\d{{1,9}}))?", text)
        if not found or found[3] and not int(found[3]):
            raise DataError(f"/force {text}: give codes as in /force 17, /force 17 17 3, /force 17* or /force 17 @6")
        forced = codes_in(found[1], codes, "/force")
        if both := self.banned & set(forced):
            raise DataError(f"/force {text}: code {min(both)} is banned; /ban off takes that back")
        self.forced, self.on, self.first = tuple(forced), bool(found[2]), int(found[3] or 1)

    def ban(self, text, codes):
        """'17', '17 3' or 'off'. DataError says what is wrong."""
        if text == "off":
            self.banned = set()
            return
        if not re.fullmatch(CODES, text):
            raise DataError(f"/ban {text}: give codes as in /ban 17 or /ban 17 3, or /ban off")
        banned = self.banned | set(codes_in(text, codes, "/ban"))
        if both := banned & set(self.forced):
            raise DataError(f"/ban {text}: code {min(both)} is forced; /force off takes that back")
        if len(banned) == codes:
            raise DataError(f"/ban {text}: no code would be left; /ban off takes all bans back")
        self.banned = banned

    def told_forced(self):
        """-> what is forced, in words."""
        if not self.forced:
            return "nothing is forced"
        codes = " ".join(map(str, self.forced))
        name = f"code {codes}" if len(self.forced) == 1 else f"codes {codes}"
        until = "on in all answers, until /force off" if self.on else "of the next answer; /again answers once more"
        return f"{name} from token {self.first} {until}"

    def told_banned(self):
        """-> what is banned, in words."""
        return f"banned: {', '.join(map(str, sorted(self.banned)))}" if self.banned else "nothing is banned"

    def answered(self):
        """What was forced once is not forced again."""
        if not self.on:
            self.forced = ()


def codes_in(text, codes, command):
    """'17 3' -> [17, 3]; DataError for a number that is no code."""
    found = [int(word) for word in text.split()]
    wrong = [code for code in found if code >= codes]
    if wrong:
        raise DataError(f"{command} {text}: there is no code {wrong[0]}; the codes are 0 to {codes - 1}")
    return found
