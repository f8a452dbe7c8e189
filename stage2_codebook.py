"""Stage 2: the codebook of latent actions, learnt without labels by inverse dynamics, and the world model that obeys
it.

    a_t = f_inverse(e_1..e_{t+1}), hard by straight-through Gumbel-softmax (tau 2);  x_{t+1} ~ f_world(e_t, c_{a_t})
    phase a, paired data:               L_inverse = - sum_t log f_world(x_{t+1} | e_t, a_t)
    phase b, paired and text-only data: L_inverse(D^VT) + L_inverse(D^T) + w (L_t2vt + L_vt2t + L_cycle),   w = 1e-5
    and in both an entropy bonus of 1e-3 times the mean entropy of the inverse model's softmax;
    with --usage-bonus u also u times the entropy of its mean over the batch, for the use of many codes (default 0).

The equations stand in model.py (`inverse_loss`, `GumbelQuantiser`, `projector_loss`); here is how they are put
together.

Departures. The gradient of L_inverse does not reach P (so in the release, too): a text-only context is mu of P(h),
detached; P learns from the projector and cycle losses. Only the tokens of responses are explained (--loss-on all for
the release's way). The action at t is counted where the token it explains, x_{t+1}, is. The world model starts at the
VLM's own prediction (--world-output). --without leaves one part out, for the ablation; without text, phase b goes on
with paired data. A code's use is counted over --window steps without Gumbel noise, and logged.

    python stage2_codebook.py --projector runs/stage1 --out runs/stage2
    torchrun --nproc-per-node 4 stage2_codebook.py --preset paper --vlm Qwen/Qwen2.5-VL-3B-Instruct \\
        --paired paired.jsonl --text text.jsonl --projector runs/3b/stage1 --out runs/3b/stage2
"""

from collections import Counter
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

import checkpoint
import common
from common import option
from data import DataError, Processor
from loader import batches
from model import inverse_loss, projector_loss
from shards import open_text
from states import KeepsStates, reader
from vlm import VLM, next_token_loss


@dataclass
class Config(KeepsStates):
    vlm: str = option("tiny/vlm", "folder or hub name of the frozen vision-language model")
    paired: str = option("runs/world/paired.jsonl", "image-text records")
    text: str = option("runs/world/text.jsonl", "text-only records, or a folder of packed text")
    projector: str = option("runs/stage1", "finished run of stage 1")
    out: str = option("runs/stage2", "folder of this run")
    codes: int = option(128, "size of the codebook", least=1, paper=128)
    inverse_blocks: int = option(2, "transformer blocks of the inverse dynamics", paper=4)
    policy_blocks: int = option(2, "transformer blocks of the policy of stage 3", paper=8)
    merges: int = option(2, "merge modules of the world model", paper=2)
    without: str = option(
        "nothing",
        "leave out L_cycle, P (a text context is then h), or the text-only data",
        choices=("nothing", "cycle", "projector", "text"),
    )
    text_rows: int = option(0, "use only so many text-only rows; 0: all")
    world_output: str = option("vlm", "what the LM head reads, see WorldModel", choices=("vlm", "norm", "release"))
    steps_a: int = option(150, "phase a; paper: 220,000 pairs, once, at 16 a step", paper=13750)
    steps_b: int = option(300, "phase b; paper: 300,000 texts, once, at 16 a step", paper=18750)
    batch: int = option(12, "dialogues a step and rank, of each kind; paper: on 4 ranks", least=1, paper=4)
    micro: int = option(0, "most rows in a backward pass; 0: all. Changes memory, not the result")
    lr: float = option(1e-3, "peak learning rate; a: cosine to a tenth, b: 10% warm-up", paper=1e-4)
    clip_norm: float = option(1.0, "gradients are clipped to this norm; 0: they are not")
    tau: float = option(2.0, "temperature of the Gumbel-softmax", above=0.0, paper=2.0)
    entropy_bonus: float = option(1e-3, "weight of the inverse model's mean entropy", paper=1e-3)
    usage_bonus: float = option(0.0, "weight of the entropy of the batch's mean posterior, see usage_entropy")
    projector_weight: float = option(1e-5, "weight of L_t2vt, L_vt2t and L_cycle, which are sums over D", paper=1e-5)
    loss_on: str = option("response", "which tokens are explained", choices=("response", "all"))
    window: int = option(80, "steps over which code use is counted; 80 of 12 are an epoch of the paired data", least=1)
    max_length: int = option(512, "tokens a dialogue, image included", least=1, paper=2048)
    max_pixels: int = option(280 * 420, "images are scaled down to this many pixels", least=1, paper=280 * 420)
    val: int = option(48, "last rows of each file, kept for the losses at the end")
    seed: int = option(0, "seed of weights, noise and data order")
    save_every: int = option(150, "steps between checkpoints", least=1)
    keep: int = option(2, "checkpoints that are kept, the newest", least=1)


PARTS = ("projector", "inverse", "quantiser", "world")  # of the latent model: what this stage saves


def trainable_parts(phase, without="nothing"):
    parts = ("inverse", "quantiser", "world")
    return parts if phase == "a" or without in ("projector", "text") else parts + ("projector",)


def normalisers(processor, paired, text):
    """What the sums of `joint_loss` are multiplied by, see common.share. `text` None: phase a."""
    counts = {"paired": paired.explained_BT.sum()}
    if text is not None:
        counts |= {"text": text.explained_BT.sum()}
        counts |= {"proj": processor.behind_image(paired).sum(), "cycle": text.mask_BT.sum()}
    return {name: common.share(count) for name, count in counts.items()}


def usage_entropy(logits_MK, norm):
    """H(p) in nats of the mean posterior p = 1/M sum_m softmax(logits_m), over the tokens of all ranks -> scalar.

    It is log K where all codes are used alike, however sure the inverse model is of each token; norm: see common.share.
    Each rank's part is - sum_k q_k log p_k, q its own share of p. That has the gradient of H(p) with log p held fixed,
    because sum_k q_k is constant. The mean of the parts is H(p)."""
    q_K = F.softmax(logits_MK, -1).sum(0) * norm
    p_K = common.total(q_K) / checkpoint.world_size()
    return -(q_K * torch.log(p_K + 1e-12)).sum()


def joint_loss(latent, vlm, processor, paired, text, cfg, norms=None):
    """One step's loss -> (scalar, metrics). `text` None: phase a. norms: `normalisers` of the step of which these rows
    are a part; by default they are all of it.

    In the metrics, used_paired and used_text count how often each code was chosen, without noise: (K,) int64."""
    norms = norms or normalisers(processor, paired, text)
    metrics, loss, h = {}, 0.0, {}
    for name, batch in (("paired", paired), ("text", text)):
        if batch is None:
            continue
        with torch.no_grad():
            h[name] = vlm(batch)
            e_BTD = latent.context(h[name], batch.paired_B)  # detached: L_inverse does not train P
        inverse = inverse_loss(latent, vlm, e_BTD, batch)
        loss = loss + (inverse["nll"] + inverse["auxiliary"]) * norms[name]
        if cfg.usage_bonus:
            loss = loss - cfg.usage_bonus * usage_entropy(inverse["logits"], norms[name])
        metrics[f"nll_{name}"] = inverse["nll"].detach() * norms[name]
        metrics["entropy"] = inverse["entropy"] * norms[name]
        metrics[f"used_{name}"] = torch.bincount(inverse["codes"], minlength=latent.quantiser.codes)
    if text is not None and cfg.without != "projector":
        proj = projector_loss(latent.projector, vlm, processor, paired, h["paired"])[0] * norms["proj"]
        cycle = latent.projector.cycle_loss(h["text"], text.mask_BT) * norms["cycle"]
        loss = loss + cfg.projector_weight * (proj + cycle * (cfg.without != "cycle"))
        metrics |= {"cycle": cycle.detach(), "proj": proj.detach()}
    return loss, metrics


class Usage:
    """How often each code was chosen over the last `window` steps: codes used, and perplexity exp(H(usage))."""

    def __init__(self, window, recent=None):
        """recent: {name: counts (K,) of each of the last steps}, where an earlier run stopped."""
        self.window, self.recent = window, recent or {}

    def __call__(self, used):
        """used: {name: counts (K,) of this step on this rank}. -> {codes_NAME, perplexity_NAME}"""
        out = {}
        for name, count_K in used.items():
            recent = self.recent.setdefault(name, [])
            recent.append(common.total(count_K).float())
            del recent[: -self.window]
            p = sum(recent) / sum(recent).sum()
            out |= {f"codes_{name}": (p > 0).sum(), f"perplexity_{name}": torch.exp(-(p * (p + 1e-12).log()).sum())}
        return out


@torch.no_grad()
def validate(latent, vlm, processor, records, place, size=16):
    """Mean nats per response token of these records: the bare VLM; the world model with the inferred actions (no
    noise); with random ones."""
    sums, count = Counter(), 0
    for i in range(0, len(records), size):
        some = records[i : i + size]
        draws = [(i + b,) for b in range(len(some))]
        batch = processor.collate([processor.example(r) for r in some], draws=draws).to(place.device)
        with place.autocast():
            h_BTD = vlm(batch)
            e_BTD, explained = latent.context(h_BTD, batch.paired_B), batch.explained_BT
            e_MD, ids_M = e_BTD[:, :-1][explained], batch.ids_BT[:, 1:][explained]
            a_M = latent.infer_codes(e_BTD)[explained]
            random_M = (batch.uniforms(1)[:, 0] * latent.quantiser.codes).long()
            states = {
                "vlm": h_BTD[:, :-1][explained],
                "inferred": latent.speak(e_MD, a_M),
                "random": latent.speak(e_MD, random_M),
            }
            for name, y_MD in states.items():
                sums[name] += next_token_loss(vlm.head, y_MD, ids_M).item()
        count += int(explained.sum())
    return {f"val_{k}": v / count for k, v in sums.items()}


class Run:
    """What both phases need: the data, the models, the log, and where an earlier run stopped."""

    def __init__(self, cfg, guard, place):
        self.cfg, self.guard, self.place = cfg, guard, place
        projector, before = checkpoint.load(cfg.projector, "--projector", ["stage1_projector"], cfg.vlm)
        self.processor = Processor(cfg.vlm, cfg.max_length, cfg.max_pixels, cfg.loss_on, cfg.max_decode)
        files = {"paired": common.open_records(cfg.paired, cfg), "text": open_text(cfg.text, cfg, self.processor)}
        self.train, self.held_out = self.split(files)
        self.vlm = VLM(cfg.vlm, place.device, place.dtype)
        self.read = reader(self.vlm, cfg)
        same = ("codes", "inverse_blocks", "policy_blocks", "merges", "world_output", "tau", "entropy_bonus")
        self.arch = {k: getattr(cfg, k) for k in same}
        self.arch |= {"skip": before["config"]["mean"] == "skip", "project": cfg.without != "projector"}
        self.latent = common.build_latent(self.vlm, self.arch, projector, cfg.projector, ["projector"])
        del self.latent.policy  # stage 3 makes it
        self.latent.to(place.device)
        self.steps, self.start, self.going_on = cfg.steps_a + cfg.steps_b, 0, None
        self.refused, self.skipped = {kind: common.Refused(cfg) for kind in self.train}, 0
        if saved := checkpoint.resume(cfg.out, "stage2_codebook", asdict(cfg), may_grow=("steps_b",)):
            checkpoint.load_into(self.latent, saved[0], cfg.out, PARTS)
            self.start, self.going_on = saved[1]["step"], saved[2]
            self.refused = {kind: common.Refused(cfg, before) for kind, before in saved[1]["refused"].items()}
            self.skipped = self.going_on["optimizer"]["skipped"]
        self.log = common.Log(cfg.out, "stage 2: codebook", self.start, self.steps, cfg)
        self.usage = Usage(cfg.window, self.going_on and self.going_on["extra"])
        self.streams = self.data()

    def split(self, files):
        """-> (training rows, held-out rows) by kind: the last `val` rows are held out, and read before step 0."""
        cfg, train, held_out = self.cfg, {}, {}
        for kind, f in files.items():
            if cfg.val >= len(f):
                raise DataError(f"--val {cfg.val}: {f.path} has {len(f)} rows, so none would be left to learn from")
            train[kind] = f.only(slice(0, len(f) - cfg.val))
            if cfg.val:
                held_out[kind] = common.usable(f.only(slice(len(f) - cfg.val, None)), self.processor, cfg)
        if cfg.text_rows:
            train["text"] = train["text"].only(slice(0, cfg.text_rows))
        return train, held_out

    def data(self):
        """-> {kind: batches of the training rows, from where the run stopped on}."""
        cfg = self.cfg
        drawn = {"paired": self.start, "text": max(0, self.start - cfg.steps_a)}
        return {
            k: batches(
                self.train[k],
                self.processor,
                cfg.batch,
                cfg.seed,
                drawn[k] * cfg.batch * self.place.ranks,
                self.place.rank,
                self.place.ranks,
                refused=self.refused[k].seen,
                kind=kind,
                workers=cfg.workers,
            )
            for kind, k in enumerate(self.train)
        }

    def next(self, kind):
        return next(self.streams[kind]).to(self.place.device)

    def save(self, step, optimizer):
        """Write a checkpoint; the last one has the losses on the held-out rows."""
        refused = {kind: r.all() for kind, r in self.refused.items()}
        state = {"stage": "stage2_codebook", "finished": step == self.steps, "config": asdict(self.cfg)}
        state |= {"arch": self.arch, "refused": refused}
        if state["finished"]:
            state["val"] = {kind: self.validate(kind) for kind in self.held_out}
        tensors = common.part_tensors(self.latent, PARTS)
        checkpoint.save(self.cfg.out, step, tensors, state, optimizer, self.usage.recent, self.cfg.keep)
        self.guard.leave_if_asked()

    def validate(self, kind):
        held_out = [self.held_out[kind][i] for i in range(len(self.held_out[kind]))]
        val = validate(self.latent, self.read, self.processor, held_out, self.place)
        common.say(f"{kind}: " + ", ".join(f"{k} {v:.3f}" for k, v in val.items()) + " nats a token")
        return val


def train_phase(run, phase, begin, end):
    """Phase a or b, from step `begin` (or where the run was cut off) to step `end`."""
    cfg, latent = run.cfg, run.latent
    latent.train_only(*trainable_parts(phase, cfg.without))
    step_weights = common.Stepper([p for p in latent.parameters() if p.requires_grad], cfg.lr, cfg.clip_norm)
    common.report(step_weights.params, run.vlm, latent)
    step_weights.skipped = run.skipped
    if run.going_on and begin < run.start:
        step_weights.load_state_dict(run.going_on["optimizer"])

    def loss_fn(latent, given, norms):
        paired, text = given if len(given) == 2 else (*given, None)
        return joint_loss(latent, run.read, run.processor, paired, text, cfg, norms)

    objective, steps = common.wrap(latent, loss_fn), end - begin
    kinds = ["paired"] if phase == "a" or cfg.without == "text" else ["paired", "text"]
    for step in range(max(begin, run.start), end):
        done = (step - begin) / steps
        rate = common.cosine(done) if phase == "a" else common.warmup(done, steps, 0.1)
        step_weights.rate(cfg.lr * rate)
        given = [run.next(kind) for kind in kinds]
        norms = normalisers(run.processor, *given, *[None] * (2 - len(given)))
        sums = common.gradients(run.place, objective, given, norms, cfg.micro)
        step_weights([record for batch in given for record in batch.records])

        used = {kind: sums.pop(f"used_{kind}") for kind in kinds}
        metrics = common.mean_over_ranks(sums) | run.usage(used)
        metrics |= {f"refused_{k}": len(r.all()) for k, r in run.refused.items()}
        shown = ("nll_paired", "nll_text", "codes_paired", "codes_text", "perplexity_text")
        run.log(step + 1, shown, **metrics, skipped=step_weights.skipped)
        if run.guard.asked() or step + 1 == end or (step + 1) % cfg.save_every == 0:
            run.save(step + 1, step_weights)
    run.skipped = step_weights.skipped


def train(cfg, guard, place):
    run = Run(cfg, guard, place)
    if run.start < cfg.steps_a:
        train_phase(run, "a", 0, cfg.steps_a)
    if run.start < run.steps and cfg.steps_b:
        train_phase(run, "b", cfg.steps_a, run.steps)
    run.log.close()
    for kind, records in run.train.items():
        common.tell_refused(records, run.refused[kind])


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    if not cfg.steps_a + cfg.steps_b:
        raise DataError("--steps-a 0 --steps-b 0: nothing would be learnt; give at least one of them steps")
    if cfg.usage_bonus and cfg.micro:
        raise DataError("--usage-bonus: is of the whole batch, and cannot be worked out in parts; leave out --micro")
    place = common.setup(cfg)
    with checkpoint.Guard(cfg.out) as guard:
        train(cfg, guard, place)


if __name__ == "__main__":
    common.run(main)
