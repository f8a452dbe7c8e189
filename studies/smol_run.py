"""A finished run of `make smol`, opened: its data, its models, and what its five models say. For studies/smol.py."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint
import common
import evaluate
from data import DataError, Example, Processor
from rewards import reference
from speaker import Response, Speaker
from stage3_bc import bc_loss
from vlm import VLM, next_token_loss

FOLDERS = {"SFT": "sft", "BC latent": "stage3", "GRPO token": "rl_token", "GRPO latent": "rl_latent"}
MODELS = ("Prompt", *FOLDERS)  # as the rows of evaluate.py
TESTS = evaluate.TESTS["a"]
# That of the table (evaluate.py); that of RL. Of actions on the latent side, of tokens on the other.
TEMPERATURES = (0.1, 1.0)
SAID = "said.json"


@dataclass
class Voice:
    """What a Speaker reads of its configuration."""

    batch: int
    max_new: int
    seed: int


class Finished:
    """The run in the folder cfg.run. Models are loaded when they are asked for; only the frozen VLM stays."""

    needed = ("stage1", "stage2", *FOLDERS.values())  # the folders that must hold finished runs

    def __init__(self, cfg, place):
        self.cfg, self.place, self.folder = cfg, place, Path(cfg.run)
        self.data = self.folder / "data"
        self.settings = checkpoint.read_state(self.folder / "rl_latent")["config"]
        self.name = self.settings["vlm"]
        for run in self.needed:
            if not self.state(run)["finished"]:
                raise DataError(f"--run {cfg.run}: {run} is not finished; the command that began it goes on with it")
        limits = (self.settings["max_prompt"], self.settings["max_pixels"])
        self.processor = Processor(self.name, *limits, max_decode=cfg.max_decode)
        self.vlm = VLM(self.name, place.device, place.dtype)
        self.speaker = Speaker(Voice(cfg.batch, self.settings["max_new"], cfg.seed), self.processor, place)

    def state(self, run):
        return checkpoint.read_state(self.folder / run)

    def latent(self, run, *needed):
        """-> the latent model of a run of stages 1 to 4, frozen; `needed`: the parts that it must hold."""
        found = checkpoint.newest(self.folder / run, with_optimizer=False)
        arch = found[1].get("arch") or self.state("stage2")["arch"]
        latent = common.build_latent(self.vlm, arch, found[0], self.folder / run, needed)
        return latent.to(self.place.device).requires_grad_(False)

    def records(self, name, limit=None, only=lambda record: True):
        """-> the first `limit` records of a file (None: all) that pass `only` and can be answered within the run's
        limits."""
        records, found = evaluate.records_of(self.files(), name, None), []
        for i in range(len(records)):
            if len(found) == limit:
                break
            try:
                record = records[i]
                self.processor.check(record, prompt_only=True)
            except DataError:
                continue
            if only(record):
                found.append(record)
        return found

    def files(self):
        """What evaluate.records_of reads of a configuration."""
        return evaluate.Config(data=str(self.data), allow_outside=self.cfg.allow_outside)

    def batches(self, examples):
        """-> Batches of cfg.batch right-padded examples, on the device."""
        size = self.cfg.batch
        parts = (examples[i : i + size] for i in range(0, len(examples), size))
        return (self.processor.collate(part).to(self.place.device) for part in parts)

    def continued(self, record, tokens):
        """A prompt and the tokens of an answer to it, as they were said -> Example."""
        ids = self.processor.example(record, prompt_only=True)
        response = np.arange(len(ids.ids) + len(tokens)) >= len(ids.ids)
        return Example(np.concatenate((ids.ids, tokens)).astype(np.int64), response, ids.pixels, ids.grids, record)

    def reference(self, record):
        """-> the first tokens of the reference, as many as a model may say; EOS where it ends before."""
        ids = self.processor.tokenizer(reference(record), add_special_tokens=False)["input_ids"]
        return [*ids, self.processor.eos_id][: self.settings["max_new"]]

    # ------------------------------------------------------------------------------------------ what the models say
    def tests(self):
        """-> {test: the records that are answered}, the first of each file: nobody has chosen them."""
        return {test: self.records(file, self.cfg.rows) for test, file in TESTS.items()}

    def said(self):
        """-> {model: {temperature: {test: [Response]}}}, one to each record; drawn once, and kept in said.json."""
        path, mine = self.folder / SAID, self.drawn_with()
        kept = json.loads(path.read_text()) if path.is_file() else {}
        if kept.get("drawn_with") != mine:
            kept = {"drawn_with": mine, "models": {name: self.draw(name) for name in MODELS}}
            path.write_text(json.dumps(kept))
        return {
            model: {
                float(temperature): {test: [Response(**r) for r in rows] for test, rows in tests.items()}
                for temperature, tests in by_temperature.items()
            }
            for model, by_temperature in kept["models"].items()
        }

    def drawn_with(self):
        """What the answers depend on, as JSON has it: the settings, and when each model was saved."""
        saved = {run: (checkpoint.latest(self.folder / run) / "state.json").stat().st_mtime for run in FOLDERS.values()}
        return {"saved": saved, "rows": self.cfg.rows, "seed": self.cfg.seed, "max_new": self.settings["max_new"]}

    def draw(self, name):
        """-> {temperature: {test: [response as a dict]}} of one model."""
        model = (self.vlm, None) if name == "Prompt" else self.agent(FOLDERS[name])
        common.say(f"{name}: answers")
        return {
            t: {test: self.answers(model, rows, t, salt) for salt, (test, rows) in enumerate(self.tests().items())}
            for t in TEMPERATURES
        }

    def agent(self, run):
        """-> (VLM, latent model or None) of a run of stage 3 or 4, or of its `best`, as a Speaker takes them."""
        actions = self.state(run)["config"]["actions"]
        return common.load_agent(str(self.folder / run), actions, self.name, self.place)[:2]

    def answers(self, model, records, temperature, salt):
        return [asdict(samples[0]) for samples in self.speaker(model, records, 1, temperature, salt)]


# ----------------------------------------------------------------------------------------------------- states, losses
@torch.no_grad()
def contexts(run, latent, batch):
    """-> the VLM's states h and the contexts e of a batch, (B, T, D) each."""
    with run.place.autocast():
        h_BTD = run.vlm(batch)
        return h_BTD, latent.context(h_BTD, batch.paired_B)


@torch.no_grad()
def states(run, latent, batch):
    """Of the explained tokens of a batch: the VLM's states h (M, D) before them, the contexts e (M, D), the tokens (M,)
    and the codes inferred from them (M,), which mean nothing where the run has no inverse dynamics."""
    at, (h_BTD, e_BTD) = batch.explained_BT, contexts(run, latent, batch)
    with run.place.autocast():
        codes_BT = latent.infer_codes(e_BTD)
    return h_BTD[:, :-1][at], e_BTD[:, :-1][at], batch.ids_BT[:, 1:][at], codes_BT[at]


@torch.no_grad()
def nats(run, examples):
    """-> mean nats a response token of these examples under the frozen VLM."""
    total = count = 0
    for batch in run.batches(examples):
        at = batch.explained_BT
        with run.place.autocast():
            total += float(next_token_loss(run.vlm.head, run.vlm(batch)[:, :-1][at], batch.ids_BT[:, 1:][at]))
        count += int(at.sum())
    return total / count


@torch.no_grad()
def agreement(run, latent, examples):
    """How well the policy guesses the inferred codes of these responses -> {agree: share of equal codes, bc: nats}."""
    hits = loss = count = 0
    for batch in run.batches(examples):
        with run.place.autocast():
            e_BTD = latent.context(run.vlm(batch), batch.paired_B)
            bc, right = bc_loss(latent, e_BTD, batch, latent.infer_codes(e_BTD)[batch.explained_BT])
        hits, loss, count = hits + int(right), loss + float(bc), count + int(batch.explained_BT.sum())
    return {"agree": hits / count, "bc": loss / count}
