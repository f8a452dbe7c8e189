"""Stage 3: behaviour cloning of the policy, then adaptation to the task's demonstrations.

    clone, paired and text-only data:  L_bc = - sum_t log pi(a*_t | e_{<=t}),  a*_t = argmax of f_inverse (no noise)
    adapt, the task's demonstrations:  L_inverse on inverse dynamics, codebook and world model; L_bc on the policy
    SFT, the same demonstrations:      - sum_t log p_VLM(x_{t+1} | x_{<=t}), supervised fine-tuning

SFT (`--actions token`) is the baseline's counterpart: it trains the VLM's last blocks, final norm, embeddings and head.

--init may also be a finished clone (a stage 3 with --steps-adapt 0): then it is only adapted, and several tasks share a
clone. A codebook learnt without text-only data, or with some of its rows, is cloned with the same.

Departures. The release adapts the VLM (not the merges and the codebook, and under another output formula); here the VLM
stays frozen, and everything on the latent side is adapted with the one world model that RL and generation use. One
encoder pass a batch serves teacher and policy. Only the tokens of responses count.

    python stage3_bc.py --init runs/stage2 --out runs/stage3                         # latent
    python stage3_bc.py --actions token --out runs/sft                               # SFT, the baseline
    torchrun --nproc-per-node 4 stage3_bc.py --preset paper --vlm Qwen/Qwen2.5-VL-3B-Instruct --paired paired.jsonl \\
        --text text.jsonl --demos demos.jsonl --init runs/3b/stage2 --out runs/3b/stage3
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

import checkpoint
import common
from common import option
from data import DataError, Processor
from loader import batches
from model import inverse_loss
from shards import open_text
from states import KeepsStates, reader
from vlm import VLM, next_token_loss


@dataclass
class Config(KeepsStates):
    actions: str = option("latent", "clone and adapt the policy, or fine-tune the VLM", choices=("latent", "token"))
    vlm: str = option("tiny/vlm", "folder or hub name of the vision-language model")
    init: str = option("runs/stage2", "finished run of stage 2, or a finished clone (latent only)")
    paired: str = option("runs/world/paired.jsonl", "image-text records for cloning")
    text: str = option("runs/world/text.jsonl", "text-only records for cloning, or a folder of packed text")
    demos: str = option("runs/world/task_demos.jsonl", "the task's demonstrations")
    out: str = option("runs/stage3", "folder of this run")
    steps_clone: int = option(300, "cloning (latent only); paper: 300,000 texts, once, at 16 a step", paper=18750)
    steps_adapt: int = option(75, "adaptation, or SFT; 75 steps of 16 are 3 epochs of 400 demonstrations")
    batch: int = option(12, "cloning: dialogues a step and rank, of each kind; paper: on 4 ranks", least=1, paper=4)
    batch_adapt: int = option(16, "adaptation and SFT: demonstrations a step and rank", least=1)
    micro: int = option(0, "most rows in a backward pass; 0: all. Changes memory, not the result")
    lr: float = option(1e-3, "cloning, peak, cosine to a tenth", paper=1e-4)
    lr_adapt: float = option(3e-4, "adaptation and SFT, peak, 3% warm-up, then cosine", paper=5e-5)
    clip_norm: float = option(1.0, "gradients are clipped to this norm; 0: they are not")
    train_share: float = option(0.2222, "token: share of the VLM's blocks that train, from the last", paper=8 / 36)
    checkpointing: str = option("no", "token: compute blocks again in the backward pass", choices=("no", "yes"))
    tau: float = option(2.0, "temperature of the Gumbel-softmax in adaptation", above=0.0, paper=2.0)
    entropy_bonus: float = option(1e-3, "weight of the inverse model's mean entropy in adaptation", paper=1e-3)
    loss_on: str = option("response", "which tokens are explained", choices=("response", "all"))
    max_length: int = option(512, "tokens a dialogue, image included", least=1, paper=2048)
    max_pixels: int = option(280 * 420, "images are scaled down to this many pixels", least=1, paper=280 * 420)
    seed: int = option(0, "seed of noise and data order")
    save_every: int = option(150, "steps between checkpoints", least=1)
    keep: int = option(2, "checkpoints that are kept, the newest", least=1)


# ----------------------------------------------------------------------------------------------------------- the losses
def bc_loss(latent, e_BTD, batch, codes_M):
    """L_bc = - sum log pi(a*_t | e_{<=t}) over explained tokens -> (sum, hits: policy's arg max is a*).

    codes_M: a*, the arg max of f_inverse at those tokens, not a sample of it. The inverse model's softmax is kept
    undecided on purpose (noise and entropy bonus): it says how sure the inverse model is, not how often speakers
    choose. A sampled label would teach the policy that blur. The arg max gives like events like labels, and what the
    policy then leaves open is what the context leaves open: several things could be said next."""
    logits_MK = latent.policy(e_BTD)[:, :-1][batch.explained_BT]
    hits = (logits_MK.argmax(-1) == codes_M).sum()
    return F.cross_entropy(logits_MK, codes_M, reduction="sum"), hits


def context_of(latent, vlm, batch):
    """e_BTD, without gradient: neither the VLM nor P trains in this stage."""
    with torch.no_grad():
        return latent.context(vlm(batch), batch.paired_B)


def clone_loss(latent, vlm, given, norms):
    """L_bc -> (scalar, metrics); given: {name: Batch}, each with its own mean over its tokens, weight 1; norms: one for
    each, see common.share."""
    loss, metrics = 0.0, {}
    for (name, batch), norm in zip(given.items(), norms):
        e_BTD = context_of(latent, vlm, batch)
        with torch.no_grad():
            codes_M = latent.infer_codes(e_BTD)[batch.explained_BT]
        bc, hits = bc_loss(latent, e_BTD, batch, codes_M)
        loss = loss + bc * norm
        metrics |= {f"bc_{name}": (bc * norm).detach(), f"agree_{name}": hits * norm}
    return loss, metrics


def adapt_loss(latent, vlm, batch, norm):
    """L_bc + L_inverse on demonstrations -> (scalar, metrics). The inverse dynamics runs once, for both."""
    e_BTD = context_of(latent, vlm, batch)
    inverse = inverse_loss(latent, vlm, e_BTD, batch)
    bc, hits = bc_loss(latent, e_BTD, batch, inverse["codes"])
    loss = bc * norm + (inverse["nll"] + inverse["auxiliary"]) * norm
    nll = (inverse["nll"] * norm).detach()
    return loss, {"bc_demos": (bc * norm).detach(), "agree_demos": hits * norm, "nll": nll}


def sft_loss(vlm, batch, norm):
    """Mean next-token cross-entropy of the VLM on the demonstrations' responses -> (scalar, metrics)."""
    explained = batch.explained_BT
    nll = next_token_loss(vlm.head, vlm(batch)[:, :-1][explained], batch.ids_BT[:, 1:][explained]) * norm
    return nll, {"nll": nll.detach()}


KINDS = ("paired", "text", "demos")  # the files of this stage


def trainable_parts(phase):
    return ("policy",) if phase == "clone" else ("policy", "inverse", "quantiser", "world")


# ----------------------------------------------------------------------------------------------------------- the phases
class Run:
    """What the phases share: data, models, the log, and where an earlier run stopped."""

    def __init__(self, cfg, guard, place):
        self.cfg, self.guard, self.is_token = cfg, guard, cfg.actions == "token"
        self.place = place
        before = self.load_models()
        self.processor = Processor(cfg.vlm, cfg.max_length, cfg.max_pixels, cfg.loss_on, cfg.max_decode)
        self.files = {"demos": common.open_records(cfg.demos, cfg)}
        self.clones = not self.is_token and before["stage"] == "stage2_codebook"
        if self.clones:
            self.files["paired"] = common.open_records(cfg.paired, cfg)
        if self.clones and before["config"]["without"] != "text":
            self.files["text"] = open_text(cfg.text, cfg, self.processor, before["config"]["text_rows"] or None)
        self.steps = cfg.steps_adapt + (cfg.steps_clone if self.clones else 0)
        self.start, self.going_on = 0, None
        self.refused = {kind: common.Refused(cfg) for kind in self.files}
        if saved := checkpoint.resume(cfg.out, "stage3_bc", asdict(cfg), may_grow=("steps_adapt",)):
            if self.is_token:
                common.load_trained(self.vlm, saved[0], cfg.train_share, cfg.out)
            else:
                checkpoint.load_into(self.latent, saved[0], cfg.out)
            self.start, self.going_on = saved[1]["step"], saved[2]
            self.refused = {kind: common.Refused(cfg, before) for kind, before in saved[1]["refused"].items()}
        name = f"stage 3: {'SFT' if self.is_token else 'policy'}"
        self.log = common.Log(cfg.out, name, self.start, self.steps, cfg)

    def load_models(self):
        """self.vlm, self.latent, self.arch -> state of the run given as --init (None for SFT)."""
        cfg, place = self.cfg, self.place
        if self.is_token:
            self.vlm, self.latent = VLM(cfg.vlm, place.device, place.dtype), None
            self.vlm.train_last(cfg.train_share)
            if cfg.checkpointing == "yes":
                self.vlm.recompute_blocks()
            self.arch = {"train_share": cfg.train_share}
            return None
        tensors, before = checkpoint.load(cfg.init, "--init", ["stage2_codebook", "stage3_bc"], cfg.vlm)
        if before["config"].get("actions") == "token":
            raise DataError(f"--init {cfg.init}: is an SFT run; needed is one of stage 2, or a clone")
        self.vlm = VLM(cfg.vlm, place.device, place.dtype)
        self.read = reader(self.vlm, cfg)
        self.arch = before["arch"] | {"tau": cfg.tau, "entropy_bonus": cfg.entropy_bonus}
        needed = ("projector", "inverse", "quantiser", "world")
        self.latent = common.build_latent(self.vlm, self.arch, tensors, cfg.init, needed).to(place.device)
        return before

    def train(self, kinds, size, begin, end, peak, loss_fn, rate):
        """Steps begin..end on `size` rows of each of `kinds`: loss_fn(model, batches, norms), learning rate peak *
        rate(done)."""
        cfg, place, model = self.cfg, self.place, self.vlm if self.is_token else self.latent
        step_weights = common.Stepper([p for p in model.parameters() if p.requires_grad], peak, cfg.clip_norm)
        common.report(step_weights.params, self.vlm, *([] if self.is_token else [self.latent]))
        if self.going_on and begin < self.start:
            step_weights.load_state_dict(self.going_on["optimizer"])
        objective = common.wrap(model, loss_fn)
        first = max(begin, self.start)
        drawn = (first - begin) * size * place.ranks
        at = (size, cfg.seed, drawn, place.rank, place.ranks)
        streams = []
        for k in kinds:
            how = {"refused": self.refused[k].seen, "kind": KINDS.index(k), "workers": cfg.workers}
            streams.append(batches(self.files[k], self.processor, *at, **how))
        for step in range(first, end):
            step_weights.rate(peak * rate((step - begin) / (end - begin)))
            given = [next(s).to(place.device) for s in streams]
            norms = [common.share(batch.explained_BT.sum()) for batch in given]
            sums = common.gradients(place, objective, given, norms, cfg.micro)
            step_weights([r for batch in given for r in batch.records])

            shown = [k for k in sums if k.startswith(("bc", "agree", "nll"))]
            metrics = common.mean_over_ranks(sums) | {"refused": sum(map(len, self.reasons().values()))}
            self.log(step + 1, shown, **metrics, skipped=step_weights.skipped)
            if self.guard.asked() or step + 1 == end or (step + 1) % cfg.save_every == 0:
                self.save(step + 1, step_weights)

    def reasons(self):
        """-> {file: why rows of it were refused so far}"""
        return {kind: r.all() for kind, r in self.refused.items()}

    def save(self, step, optimizer):
        tensors = self.vlm.trained_tensors() if self.is_token else common.part_tensors(self.latent, self.latent.parts)
        state = {"stage": "stage3_bc", "finished": step == self.steps, "config": asdict(self.cfg), "arch": self.arch}
        state |= {"refused": self.reasons()}
        checkpoint.save(self.cfg.out, step, tensors, state, optimizer, keep=self.cfg.keep)
        self.guard.leave_if_asked()


def clone(run):
    """The policy learns to guess the inferred codes, on broad data."""
    run.latent.train_only(*trainable_parts("clone"))
    kinds = [k for k in ("paired", "text") if k in run.files]

    def loss_fn(latent, given, norms):
        return clone_loss(latent, run.read, dict(zip(kinds, given)), norms)

    run.train(kinds, run.cfg.batch, 0, run.cfg.steps_clone, run.cfg.lr, loss_fn, common.cosine)


def adapt_rate(steps):
    """-> the learning rate's factor: 3% warm-up, then cosine."""
    return lambda done: min(common.cosine(done), common.warmup(done, steps, 0.03))


def adapt(run):
    """Inverse dynamics, codebook, world model and policy learn the task's demonstrations."""
    cfg = run.cfg
    run.latent.train_only(*trainable_parts("adapt"))

    def loss_fn(latent, given, norms):
        return adapt_loss(latent, run.read, *given, *norms)

    begin, rate = run.steps - cfg.steps_adapt, adapt_rate(cfg.steps_adapt)
    run.train(["demos"], cfg.batch_adapt, begin, run.steps, cfg.lr_adapt, loss_fn, rate)


def sft(run):
    """The baseline: the VLM's last blocks learn the task's demonstrations."""
    cfg = run.cfg

    def loss_fn(vlm, given, norms):
        return sft_loss(vlm, *given, *norms)

    rate = adapt_rate(cfg.steps_adapt)
    run.train(["demos"], cfg.batch_adapt, 0, run.steps, cfg.lr_adapt, loss_fn, rate)


def train(cfg, guard, place):
    run = Run(cfg, guard, place)
    if not run.steps:
        raise DataError("no steps: nothing would be learnt; give --steps-adapt, or --steps-clone and a run of stage 2")
    if run.is_token and run.start < run.steps:
        sft(run)
    if run.clones and run.start < cfg.steps_clone:
        clone(run)
    if not run.is_token and run.start < run.steps and cfg.steps_adapt:
        adapt(run)
    run.log.close()
    for kind, records in run.files.items():
        common.tell_refused(records, run.refused[kind])


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    if cfg.states and cfg.actions == "token":
        raise DataError("--states: SFT trains the VLM, so no states can be kept; leave it out")
    place = common.setup(cfg)
    with checkpoint.Guard(cfg.out) as guard:
        train(cfg, guard, place)


if __name__ == "__main__":
    common.run(main)
