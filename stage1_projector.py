"""Stage 1: the cross-modal projector P (text -> image-text) and its way back P' (image-text -> text).

Learnt on paired data alone: the same dialogue is encoded with its image (e^VT) and without it (e^T), and for each text
token behind the image

    L_t2vt = 1/2 ( ||(e^VT - mu)/sigma||^2 + sum_d log sigma_d^2 ),   (mu, sigma) = P(e^T)
    L_vt2t = the same with target e^T and P'(e^VT)                         L_proj1 = L_t2vt + L_vt2t

Departures from the paper and its release: mu = x + MLP(x) starts at the identity (--mean mlp for the paper's mu = MLP(x)). The
text view leaves the image tokens out (the release keeps the placeholders), and tokens before the image do not count, since
there e^VT = e^T. Schedule as in the paper: linear, 10% warm-up.

    python stage1_projector.py --out runs/stage1
    torchrun --nproc-per-node 4 stage1_projector.py --vlm Qwen/Qwen2.5-VL-3B-Instruct --batch 4 --max-length 2048 --out runs/3b/stage1
"""

from dataclasses import asdict, dataclass

import torch

import common
from data import Processor, Records, batches
from model import VLM, Projector


@dataclass
class Config:
    vlm: str = "tiny/vlm"                   # folder or hub name of the frozen vision-language model
    paired: str = "runs/world/paired.jsonl" # image-text records
    out: str = "runs/stage1"                # folder of this run
    mean: str = "skip"                      # skip | mlp: mu = x + MLP(x), or the paper's mu = MLP(x)
    steps: int = 300                        # optimizer steps
    batch: int = 16                         # dialogues a step and rank (paper: 4)
    lr: float = 1e-3                        # peak learning rate (paper: 1e-3)
    max_length: int = 512                   # tokens a dialogue, image included (paper: 2048)
    max_pixels: int = 117600                # images are scaled down to this many pixels (paper: 280 * 420)
    seed: int = 0                           # seed of weights and data order
    save_every: int = 100                   # steps between checkpoints


def projector_loss(projector, vlm, processor, batch, h_BTD):
    """h_BTD: the VLM's states of the paired batch.
    -> (L_proj1 and the squared errors of P and of the identity, all per counted token, summed, and the count)."""
    view, index_BS, after_BS = processor.text_view(batch)
    with torch.no_grad():
        h_T = vlm(view)
        h_VT = h_BTD.gather(1, index_BS[..., None].expand(-1, -1, h_T.shape[-1]))
    loss = projector.paired_loss(h_VT, h_T, after_BS)
    with torch.no_grad():
        error = ((projector.P.mean(h_T) - h_VT)[after_BS] ** 2).mean(-1).sum()
        identity = ((h_T - h_VT)[after_BS] ** 2).mean(-1).sum()
    return loss, error, identity, after_BS.sum()


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    device, rank, ranks = common.setup(cfg.seed)
    processor = Processor(cfg.vlm, cfg.max_length, cfg.max_pixels)
    records = Records(cfg.paired)
    vlm = VLM(cfg.vlm, device, common.vlm_dtype(device))
    projector = Projector(vlm.config.hidden_size, cfg.mean == "skip").to(device)
    optimizer = common.adamw(projector.parameters(), cfg.lr)
    start = 0
    if saved := common.resume(cfg.out, "stage1_projector", asdict(cfg)):
        tensors, state, extra = saved
        start = state["step"]
        projector.load_state_dict({k.removeprefix("projector."): v for k, v in tensors.items()})
        optimizer.load_state_dict(extra["optimizer"])
    common.report(projector.parameters(), vlm)

    def loss_fn(projector, batch):
        with torch.no_grad():
            h_BTD = vlm(batch)
        loss, error, identity, count = projector_loss(projector, vlm, processor, batch, h_BTD)
        return loss * common.share(count), error, identity, count

    objective, refused = common.wrap(projector, loss_fn), set()
    stream = batches(records, processor, cfg.batch, cfg.seed, start * cfg.batch * ranks, rank, ranks, refused=refused)
    log = common.Log(cfg.out, "stage 1: projector", start, cfg.steps)
    for step in range(start, cfg.steps):
        rate = min((step + 1) / (0.1 * cfg.steps), (cfg.steps - step) / (0.9 * cfg.steps))
        optimizer.param_groups[0]["lr"] = cfg.lr * rate
        with common.autocast(device):
            loss, error, identity, count = objective(next(stream).to(device))
        loss.backward()
        optimizer.step(), optimizer.zero_grad(set_to_none=True)
        error, identity, count = common.total(torch.stack([error.float(), identity.float(), count.float()]))
        log(step + 1, ("proj_nll", "mse", "mse_identity"), proj_nll=loss, mse=error / count, mse_identity=identity / count,
            refused=len(refused))
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            common.save(cfg.out, step + 1, {f"projector.{k}": v for k, v in projector.state_dict().items()},
                        {"stage": "stage1_projector", "finished": step + 1 == cfg.steps, "config": asdict(cfg)}, optimizer)
    log.close()


if __name__ == "__main__":
    common.run(main)
