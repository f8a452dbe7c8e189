"""What each code stands for: one HTML page of a finished run, which opens without a network.

The page has the codes in a list and on a map, what each of them does to the next token, where it stood, what an answer
becomes if it is forced at one place, and how often the policy chose it before, during and after RL. docs/atlas.md says
how to read it. The codes are those of stage 3, which RL leaves as they are. All dialogues are rows on which the
codebook was not trained: the last rows of the paired and of the text-only data, which stage 2 holds out, and prompts
of a test that the policy answers.

    python -m studies.atlas                                        # the agent that comes with the repository
    python -m studies.atlas --run runs/demo --out runs/demo/atlas.html
    python -m studies.atlas --run runs/smol --rows 12 --places 40 --answers 6 --dialogues 2 --forced 1 --batch 6
    python -m studies.atlas --also runs/seeds/1/stage3,runs/seeds/2/stage3 --numbers atlas.json    # with more seeds

--also gives finished runs of stage 3 with other seeds: the number for the whole is worked out for each of them."""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint
import common
from common import SPEAKING, Everywhere, option
from data import DataError
from evaluate import read_styles, token_styles
from model import LatentModel
from rollout import rollout_latent
from studies import atlas_measures as measures
from studies import atlas_page
from studies.atlas_measures import Places
from studies.smol_measures import COMMON, arg_max, last_rows
from studies.smol_run import Finished, contexts
from vlm import log_probs

POINTS = 15  # of a code's path through RL
KINDS = ("paired", "text", "before", "after")  # two kinds of data, and the policy's answers before and after RL


@dataclass
class Config(Everywhere):
    run: str = option("tiny/agent", "folder of a finished run: its stage3 and rl_latent")
    out: str = option("runs/atlas.html", "the page")
    paired: str = option("", "file of dialogues with pictures; '': the run's own")
    text: str = option("", "file of text-only dialogues; '': the run's own")
    test: str = option("task_id", "name of the file of prompts that the policy answers, beside the paired data")
    also: str = option("", "finished runs of stage 3 with other seeds, with commas between them")
    numbers: str = option("", "file for the number of the whole, as JSON; '': none")
    rows: int = option(48, "rows from the end of each file; stage 2 holds out 48 by default", least=1)
    places: int = option(600, "tokens of each file at which every code is tried", least=2)
    answers: int = option(48, "prompts that the policy answers", least=1)
    dialogues: int = option(8, "dialogues of each kind in the dialogue view", least=1)
    forced: int = option(3, "prompts in whose answers each code is forced once", least=0)
    temperature: float = option(1.0, "of the actions in the answers; 1: as in RL")
    batch: int = option(16, "rows of a forward pass", least=1)
    seed: int = option(3000, "seed of sampling")


# ----------------------------------------------------------------------------------------------------- run and its data
class Agent(Finished):
    """A finished run, of which stage 3 and latent RL alone are needed; its data; and what its policy says."""

    needed = ("stage3", "rl_latent")

    def __init__(self, cfg, place):
        for name in self.needed:
            if not (Path(cfg.run) / name).is_dir():
                raise DataError(f"--run {cfg.run}: has no folder {name}; give the folder of a finished run")
        super().__init__(cfg, place)
        self.trained = self.state("stage3")["config"]
        self.paths = {kind: getattr(cfg, kind) or self.trained[kind] for kind in ("paired", "text")}
        for kind, path in self.paths.items():
            if not Path(path).is_file():
                raise DataError(f"--{kind}: there is no {path}; make runs/world/world.json draws the tiny world")
        self.data = Path(self.paths["paired"]).parent

    def examples(self, kind):
        """-> the Examples of the last rows of the paired or of the text-only data."""
        return last_rows(self, self.trained, self.paths[kind], self.cfg.rows)

    def prompts(self):
        """-> the first records of the test that can be answered within the limits of RL."""
        return self.records(self.cfg.test, self.cfg.answers)

    def policies(self):
        """-> {"before", "after": latent model} of RL."""
        return {
            "before": self.latent("stage3", *LatentModel.parts),
            "after": self.latent("rl_latent", *SPEAKING),
        }


# -------------------------------------------------------------------------------------------------- places and answers
@torch.no_grad()
def places_of(run, latent, examples):
    """-> [Places of each example]: its explained tokens, with the codes that were inferred from them."""
    found, logits_of = [], run.vlm.scorer()
    for batch in run.batches(examples):
        at, (h_BTD, e_BTD) = batch.explained_BT, contexts(run, latent, batch)
        with run.place.autocast():
            codes_BT = latent.infer_codes(e_BTD)
            logpi_BTK = log_probs(latent.policy(e_BTD)[:, :-1])
        parts = (h_BTD[:, :-1], e_BTD[:, :-1], batch.ids_BT[:, 1:], codes_BT, logpi_BTK)
        every, counts = [x[at] for x in parts], at.sum(1).tolist()
        with run.place.autocast():
            every.append(arg_max(logits_of, every[0]))
        found += [Places(*row) for row in zip(*(x.split(counts) for x in every))]
    return found


def answered(run, latent, prompts, temperature):
    """-> [Response] of a policy, one to each prompt."""
    return [samples[0] for samples in run.speaker((run.vlm, latent), prompts, 1, temperature, 0)]


def said_places(run, latent, prompts, said):
    """-> ([Example], [Places]) of these answers, with the codes that the policy chose."""
    examples = [run.continued(record, response.tokens) for record, response in zip(prompts, said)]
    places = places_of(run, latent, examples)
    for at, response in zip(places, said):
        at.codes_M = torch.tensor(response.codes, device=at.ids_M.device)
    return examples, places


# ------------------------------------------------------------------------------------------------------ a code, forced
def only(codes_N, at):
    """A `steer` of rollout_latent: row n takes the code codes_N[n] at step `at`, and is free elsewhere."""

    def steer(t, logits_NK):
        if t != at:
            return logits_NK
        forced_NK = torch.full_like(logits_NK, -math.inf)
        return forced_NK.scatter(1, codes_N[:, None], 0.0)

    return steer


def said_with(run, latent, record, codes, at):
    """-> [tokens up to and with EOS] of the greedy answers to a prompt, with each of `codes` forced at step `at`."""
    out, never = [], run.speaker.never
    example = run.processor.example(record, prompt_only=True)
    settings = {"temperature": 0, "never": never, "eos": run.processor.eos_id, "pad": run.processor.pad_id}
    for part in torch.as_tensor(codes, device=run.place.device).split(run.cfg.batch):
        prompt = run.processor.collate([example], left=True).to(run.place.device)
        u_NT = torch.zeros(len(part), run.settings["max_new"], device=run.place.device)  # nothing is drawn
        with run.place.autocast():
            roll = rollout_latent(run.vlm, latent, prompt, u_NT, group=len(part), steer=only(part, at), **settings)
        out += [tokens[:n] for tokens, n in zip(roll.tokens_NT.tolist(), roll.mask_NT.sum(1).tolist())]
    return out


def least_sure(of, places, never):
    """-> the step at which the policy's next token, not its code, has most entropy; of: see `measures.every_code`."""
    rows = [measures.would_say(of(e), p, never) for e, p in zip(places.e_MD, places.logpi_MK)]
    return int(np.argmax([measures.entropy_of([p for _, p, _ in row]) for row in rows]))


def forced(run, latent, records, words, pictures):
    """What the policy's most likely answer becomes if one code is put where the policy was least sure.

    -> [{images, turns, free: the answer without force, at: where, with: [K] the rest of the answer from there on}]"""
    out = []
    for record, said in zip(records, answered(run, latent, records, 0.0)):
        _, (places,) = said_places(run, latent, [record], [said])
        at = least_sure(measures.every_code(run, latent), places, run.speaker.never)
        rows = said_with(run, latent, record, range(latent.quantiser.codes), at)
        row = {"images": [pictures(p) for p in record["images"]], "turns": atlas_page.asked(record), "at": at}
        row |= {"free": [words(t) for t in said.tokens], "code": said.codes[at]}
        out.append(row | {"with": [[words(t) for t in tokens[at:]] for tokens in rows]})
    return out


# ---------------------------------------------------------------------------------------------------- parts of the page
def path_of(run, shares):
    """-> {of: whose codes, in words; steps: [...]; share: [K][step]}: how often the responses of RL had each code, by
    its log. A point has the steps since the point before. Without such a log: the answers before and after."""
    rows = [r for r in common.read_metrics(run.folder / "rl_latent") if "use" in r]
    if not rows:
        ends, share_SK = [0, run.state("rl_latent")["step"]], np.stack([shares["before"], shares["after"]])
        return {"of": "In the answers to the prompts of a test.", "steps": ends, "share": share_SK.T.round(5).tolist()}
    parts = np.array_split(np.arange(len(rows)), min(len(rows), POINTS))
    use_SK = np.stack([np.sum([rows[i]["use"] for i in part], 0) for part in parts])
    share_SK = use_SK / use_SK.sum(1, keepdims=True)
    of = f"In the responses that RL has learnt from, about {len(parts[0])} steps to a point."
    return {"of": of, "steps": [rows[part[-1]]["step"] for part in parts], "share": share_SK.T.round(5).tolist()}


def evidence(run, policies, prompts):
    """-> {kind: ([Example], [Places])} of all the dialogues on the page."""
    found = {}
    for kind in ("paired", "text"):
        examples = run.examples(kind)
        found[kind] = examples, places_of(run, policies["before"], examples)
    for kind, latent in policies.items():
        common.say(f"atlas: the policy {kind} RL answers")
        found[kind] = said_places(run, latent, prompts, answered(run, latent, prompts, run.cfg.temperature))
    return found


def dialogues(run, latent, found, words, pictures):
    """-> [dialogue] as the page has them. The first of each kind also say what the other codes would have said."""
    of, out = measures.every_code(run, latent), []
    for kind, (examples, places) in found.items():
        for n, (example, at) in enumerate(zip(examples, places)):
            row = atlas_page.dialogue(kind, example, at, words, pictures)
            if n < run.cfg.dialogues:
                others = [measures.would_say(of(e), p, run.speaker.never) for e, p in zip(at.e_MD, at.logpi_MK)]
                row["others"] = [[[words(t), round(p, 4), codes] for t, p, codes in rows] for rows in others]
            out.append(row)
    return out


def cards(run, found, effects, shares, words):
    """-> ([what the page says about a code alone], the share of the map's distances that its axes show).

    found: as from `evidence`; shares: {kind: (K,)}"""
    places = measures.join([at for _, ats in found.values() for at in ats])
    ids_M, V = places.ids_M.cpu(), effects.mean_KV.shape[1]
    all_V = np.bincount(ids_M, minlength=V)
    often_V = all_V >= min(COMMON, 1 + len(ids_M) // 400)
    same_KK, (xy_K2, shown) = measures.agreement(effects.tokens_KM), measures.flat_map(effects.alike_KK)
    styles = read_styles(run.data)
    style_V, out = token_styles(run.processor.tokenizer, styles), []
    for k in range(len(same_KK)):
        mine_M = (places.codes_M == k).cpu()
        counts_V = np.bincount(ids_M[mine_M], minlength=V)
        near = [j for j in np.argsort(-same_KK[k], kind="stable").tolist() if j != k]
        kept = [j for j in near if same_KK[k, j] >= measures.SAME] or near[:3]
        about = torch.bincount(style_V[ids_M[mine_M]], minlength=len(styles)).tolist()
        instead = Counter((x, v) for x, v in zip(ids_M[mine_M].tolist(), places.vlm_M[mine_M].tolist()) if x != v)
        moved = measures.moved(effects.mean_KV[k], effects.std_KV[k], often_V, 8)
        raised, lowered = ([[words(t), round(mean, 2), round(std, 2)] for t, mean, std in part] for part in moved)
        token, at = measures.favourite(effects.tokens_KM[k])
        card = {"share": {kind: round(float(x[k]), 5) for kind, x in shares.items()}, "count": int(mine_M.sum())}
        card["stood"] = [[words(t), int(counts_V[t])] for t in measures.typical(counts_V, all_V, 8)]
        card["turned"] = sum(instead.values())
        card["instead"] = [[words(x), words(v), n] for (x, v), n in instead.most_common(8)]
        card |= {"entropy": round(measures.entropy_of(counts_V), 3), "raised": raised, "lowered": lowered}
        card |= {"about": {name: n for name, n in zip(styles, about) if n}, "favourite": [words(token), round(at, 3)]}
        card |= {"same": [[j, round(float(same_KK[k, j]), 3)] for j in kept], "xy": xy_K2[k].round(4).tolist()}
        out.append(card)
    return out, shown


def whole(run, latent, found):
    """-> (Effects, {kind: the slice of its places}, how often each code was inferred (K,)) on the two kinds of data."""
    kinds, parts, start = {}, [], 0
    for kind in ("paired", "text"):
        parts.append(measures.evenly(measures.join(found[kind][1]), run.cfg.places))
        kinds[kind] = slice(start, start + len(parts[-1].ids_M))
        start = kinds[kind].stop
    codes_M = torch.cat([at.codes_M for kind in kinds for at in found[kind][1]])
    used_K = torch.bincount(codes_M, minlength=latent.quantiser.codes).cpu().numpy()
    return measures.effects(run, latent, measures.join(parts), run.speaker.never), kinds, used_K


def another(run, folder):
    """-> `measures.numbers` of a finished run of stage 3, on the same rows."""
    tensors, state = checkpoint.load(folder, "--also", ["stage3_bc"], run.name)
    latent = common.build_latent(run.vlm, state["arch"], tensors, folder, LatentModel.parts)
    latent.to(run.place.device).requires_grad_(False)
    found = {kind: (None, places_of(run, latent, run.examples(kind))) for kind in ("paired", "text")}
    return measures.numbers(*whole(run, latent, found)) | {"seed": state["config"]["seed"]}


def page_data(run):
    """-> (all that the page shows, {numbers: `measures.numbers` of the run, share: {kind: [K]} of the codes})"""
    words = atlas_page.Words(run.processor.tokenizer, run.processor.eos_id)
    pictures = atlas_page.Pictures(run.cfg.max_decode)
    policies, prompts = run.policies(), run.prompts()
    found = evidence(run, policies, prompts)
    common.say("atlas: trying every code")
    effects, kinds, used_K = whole(run, policies["before"], found)
    chosen = {kind: torch.cat([at.codes_M for at in ats]).cpu() for kind, (_, ats) in found.items()}
    shares = {kind: measures.share(codes_M, len(used_K)) for kind, codes_M in chosen.items()}
    codes, shown = cards(run, found, effects, shares, words)
    numbers = measures.numbers(effects, kinds, used_K) | {"seed": run.trained["seed"]}
    after = policies["after"]
    data = {"run": str(run.cfg.run), "vlm": run.name, "codes": codes, "shown": round(shown, 3)}
    data |= {"path": path_of(run, shares), "numbers": numbers, "same": measures.SAME}
    data["styles"] = list(read_styles(run.data))
    data["dialogues"] = dialogues(run, after, found, words, pictures)
    common.say("atlas: forcing every code")
    data["forced"] = forced(run, after, prompts[: run.cfg.forced], words, pictures)
    found = {"numbers": numbers, "share": {kind: x.round(5).tolist() for kind, x in shares.items()}}
    return data | {"words": words.texts, "images": pictures.urls}, found


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    run = Agent(cfg, common.setup(cfg))
    data, found = page_data(run)
    atlas_page.write(cfg.out, data)
    common.say(f"{cfg.out}: {Path(cfg.out).stat().st_size / 1e6:.1f} MB; open it in a browser")
    seeds = [found["numbers"]] + [another(run, folder) for folder in filter(None, cfg.also.split(","))]
    if cfg.numbers:
        found = {"config": asdict(cfg), "seeds": seeds, "share": found["share"]}
        Path(cfg.numbers).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    common.run(main)
