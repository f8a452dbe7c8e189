"""Stage 1: the cross-modal projector P (text -> image-text) and its way back P' (image-text -> text).

Learnt on paired data alone: the same dialogue is encoded with its image (e^VT) and without it (e^T), and for each text
token behind the image

    L_t2vt = 1/2 ( ||(e^VT - mu)/sigma||^2 + sum_d log sigma_d^2 ),   (mu, sigma) = P(e^T)
    L_vt2t = the same with target e^T and P'(e^VT)                         L_proj1 = L_t2vt + L_vt2t

The equations stand in model.py (`Projector`, `projector_loss`), because stage 2 goes on with them.

Departures from the paper and its release: mu = x + MLP(x) starts at the identity (--mean mlp for the paper's mu =
MLP(x)). The text view leaves the image tokens out (the release keeps the placeholders), and tokens before the image
do not count, since there e^VT = e^T. Schedule as in the paper: linear, 10% warm-up.

    python stage1_projector.py --out runs/stage1
    torchrun --nproc-per-node 4 stage1_projector.py --preset paper --vlm Qwen/Qwen2.5-VL-3B-Instruct \\
        --paired paired.jsonl --out runs/3b/stage1
"""

from dataclasses import asdict, dataclass

import torch

import checkpoint
import common
from common import option
from data import Processor
from loader import batches
from model import Projector, projector_loss
from states import KeepsStates, reader
from vlm import VLM


@dataclass
class Config(KeepsStates):
    vlm: str = option("tiny/vlm", "folder or hub name of the frozen vision-language model")
    paired: str = option("runs/world/paired.jsonl", "image-text records")
    out: str = option("runs/stage1", "folder of this run")
    mean: str = option("skip", "mu = x + MLP(x), or the paper's mu = MLP(x)", choices=("skip", "mlp"), paper="mlp")
    steps: int = option(300, "optimizer steps; paper: 220,000 pairs, once, at 16 a step", least=1, paper=13750)
    batch: int = option(16, "dialogues a step and rank; paper: on 4 ranks", least=1, paper=4)
    micro: int = option(0, "most rows in a backward pass; 0: all. Changes memory, not the result")
    lr: float = option(1e-3, "peak learning rate", paper=1e-3)
    clip_norm: float = option(0.0, "gradients are clipped to this norm; 0: they are not")
    max_length: int = option(512, "tokens a dialogue, image included", least=1, paper=2048)
    max_pixels: int = option(280 * 420, "images are scaled down to this many pixels", least=1, paper=280 * 420)
    seed: int = option(0, "seed of weights and data order")
    save_every: int = option(100, "steps between checkpoints", least=1)
    keep: int = option(2, "checkpoints that are kept, the newest", least=1)


def train(cfg, guard, place):
    processor = Processor(cfg.vlm, cfg.max_length, cfg.max_pixels, max_decode=cfg.max_decode)
    records = common.open_records(cfg.paired, cfg)
    vlm = VLM(cfg.vlm, place.device, place.dtype)
    projector = Projector(vlm.config.hidden_size, cfg.mean == "skip").to(place.device)
    step_weights, start = common.Stepper(projector.parameters(), cfg.lr, cfg.clip_norm), 0
    refused = common.Refused(cfg)
    if saved := checkpoint.resume(cfg.out, "stage1_projector", asdict(cfg), may_grow=("steps",)):
        tensors, state, going_on = saved
        start, refused = state["step"], common.Refused(cfg, state["refused"])
        checkpoint.load_into(projector, {k.removeprefix("projector."): v for k, v in tensors.items()}, cfg.out)
        step_weights.load_state_dict(going_on["optimizer"])
    common.report(step_weights.params, vlm)
    read = reader(vlm, cfg)

    def loss_fn(projector, given, norms):
        (batch,), (norm,) = given, norms
        with torch.no_grad():
            h_BTD = read(batch)
        loss, error, identity = (x * norm for x in projector_loss(projector, read, processor, batch, h_BTD))
        return loss, {"mse": error, "mse_identity": identity}

    objective, drawn = common.wrap(projector, loss_fn), start * cfg.batch * place.ranks
    at = (cfg.batch, cfg.seed, drawn, place.rank, place.ranks)
    stream = batches(records, processor, *at, refused=refused.seen, workers=cfg.workers)
    log = common.Log(cfg.out, "stage 1: projector", start, cfg.steps, cfg)
    for step in range(start, cfg.steps):
        rate = min((step + 1) / (0.1 * cfg.steps), (cfg.steps - step) / (0.9 * cfg.steps))
        step_weights.rate(cfg.lr * rate)
        batch = next(stream).to(place.device)
        norm = common.share(processor.behind_image(batch).sum())
        sums = common.gradients(place, objective, [batch], [norm], cfg.micro)
        step_weights(batch.records)

        metrics, reasons = common.mean_over_ranks(sums), refused.all()
        metrics["proj_nll"] = metrics.pop("loss")
        shown = ("proj_nll", "mse", "mse_identity")
        log(step + 1, shown, **metrics, refused=len(reasons), skipped=step_weights.skipped)
        last = step + 1 == cfg.steps
        if guard.asked() or last or (step + 1) % cfg.save_every == 0:
            tensors = {f"projector.{k}": v for k, v in projector.state_dict().items()}
            state = {"stage": "stage1_projector", "finished": last, "config": asdict(cfg), "refused": reasons}
            checkpoint.save(cfg.out, step + 1, tensors, state, step_weights, keep=cfg.keep)
            guard.leave_if_asked()
    log.close()
    common.tell_refused(records, refused)


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    place = common.setup(cfg)
    with checkpoint.Guard(cfg.out) as guard:
        train(cfg, guard, place)


if __name__ == "__main__":
    common.run(main)
