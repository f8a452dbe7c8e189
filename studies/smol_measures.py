"""What studies/smol.py measures about the method: losses, projector, the picture, 'go on', what the codes mean."""

import math

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import common
from data import DataError, Processor
from log import read_metrics
from model import projector_loss
from studies.smol_run import FOLDERS, TEMPERATURES, nats, states

ABLATIONS = {
    "full": "stage2",
    "without the cycle loss": "without_cycle",
    "without the projector": "without_projector",
    "without text-only data": "without_text",
}
COMMON = 20  # a token is shown as raised or lowered only if the answers of the text-only data hold it so often


def held_out(run, kind):
    """-> the Examples of stage 2's held-out rows of a kind, as stage 2 has read them."""
    cfg = run.state("stage2")["config"]
    return last_rows(run, cfg, cfg[kind], cfg["val"])


def last_rows(run, cfg, path, rows):
    """-> the Examples of the last `rows` rows of a file, as a stage with the settings `cfg` reads them."""
    processor = Processor(run.name, cfg["max_length"], cfg["max_pixels"], cfg["loss_on"], run.cfg.max_decode)
    records, found = common.open_records(path, run.cfg), []
    for i in range(max(0, len(records) - rows), len(records)):
        try:
            found.append(processor.example(records[i]))
        except DataError:
            continue
    return found


def loss_table(run):
    """-> {kind: {vlm, inferred, random: [nats a token, bits a byte]}} on stage 2's held-out rows; codes, clone."""
    found, val = {}, run.state("stage2")["val"]
    for kind in val:
        examples = held_out(run, kind)
        tokens = [e.ids[1:][e.response[1:]] for e in examples]
        length = sum(len(run.processor.tokenizer.decode(ids, skip_special_tokens=True).encode()) for ids in tokens)
        bits = sum(map(len, tokens)) / length / math.log(2)
        found[kind] = {
            name: [val[kind][f"val_{name}"], val[kind][f"val_{name}"] * bits] for name in ("vlm", "inferred", "random")
        }
    last, clone = read_metrics(run.folder / "stage2")[-1], read_metrics(run.folder / "stage3")
    names = ("codes_paired", "codes_text", "perplexity_paired", "perplexity_text")
    found["codes"] = {k: last[k] for k in names if k in last}
    found["clone"] = {k: mean_of_last(clone, k) for k in ("agree_paired", "agree_text", "agree_demos")}
    return found


def mean_of_last(rows, name, count=10):
    """The mean of a logged number over the last `count` steps that have it; None without any."""
    values = [row[name] for row in rows if name in row][-count:]
    return float(np.mean(values)) if values else None


def ablation_table(run):
    """-> {variant: {kind: stage 2's held-out losses}} of those that are finished."""
    found = {}
    for label, name in ABLATIONS.items():
        if checkpoint.latest(run.folder / name) and run.state(name)["finished"]:
            found[label] = run.state(name)["val"]
    return found


# ---------------------------------------------------------------------------------------------- projector, picture
def with_picture(run):
    """At most 4 * --rows records with an image that no stage has trained on: of the ID test, then the validation
    part."""
    limit = 4 * run.cfg.rows
    files = ("task_id", "task_val")
    return [r for f in files for r in run.records(f, limit, lambda record: len(record["images"]) == 1)][:limit]


def projector_table(run):
    """-> {run: `projector_errors`} of the runs that train a projector, those that are there."""
    there = [v for v in ("stage1", "stage2", "without_cycle") if checkpoint.latest(run.folder / v)]
    return {v: projector_errors(run, run.latent(v, "projector")) for v in there}


@torch.no_grad()
def projector_errors(run, latent):
    """Squared errors a dimension, on rows that no stage has trained on -> {mse, identity, shift, cycle, square}.

    mse: of mu of P(e^T) to e^VT. identity: of e^T to e^VT. cycle: of P'(mu of P(e^T)) to e^T, on text-only rows.
    square: the mean square of e^T there. shift: how far the picture moves a state, as a share of its length."""
    paired = [run.processor.example(r, prompt_only=True) for r in with_picture(run)]
    text, sums = held_out(run, "text")[: run.cfg.rows], np.zeros(6)
    for batch in run.batches(paired):
        _, error, identity = projector_loss(latent.projector, run.vlm, run.processor, batch, run.vlm(batch))
        sums[:3] += error.item(), identity.item(), run.processor.behind_image(batch).sum().item()
    for batch in run.batches(text):
        h_MD = run.vlm(batch)[batch.mask_BT]
        back_MD = latent.projector.P_back.mean(latent.projector.P.mean(h_MD))
        sums[3:] += ((back_MD - h_MD) ** 2).mean(-1).sum().item(), h_MD.square().mean(-1).sum().item(), len(h_MD)
    mse, identity = sums[:2] / sums[2]
    cycle, square = sums[3:5] / sums[5]
    return {"mse": mse, "identity": identity, "cycle": cycle, "square": square, "shift": math.sqrt(identity / square)}


def seen(record, images):
    """The record with other images in the place of its own, or without any."""
    messages = [
        dict(m, content=m["content"] if images else m["content"].replace("<image>", "")) for m in record["messages"]
    ]
    return {**record, "images": images, "messages": messages}


def picture_table(run):
    """-> nats a token of the references' beginnings under the bare VLM, with the right picture, another one, none."""
    records = with_picture(run)
    another = records[1:] + records[:1]
    views = {
        "right": [seen(r, r["images"]) for r in records],
        "another": [seen(r, other["images"]) for r, other in zip(records, another)],
        "none": [seen(r, []) for r in records],
    }
    found = {k: nats(run, [run.continued(r, run.reference(r)) for r in rows]) for k, rows in views.items()}
    return found | {"records": len(records)}


# ------------------------------------------------------------------------------------------------- what a code does
@torch.no_grad()
def go_on_table(run):
    """How far a code can leave the VLM alone: on the VLM's own answers at the table's temperature, the share of
    positions whose most likely token is the bare VLM's.

    -> {model: {code, share, context}}. code: the one that does so most often on the first half of the records; share:
    how often it does on the other half; context: how often e in the place of h does, without any code. Those differ
    on text-only rows, where e is mu of P(h)."""
    tests, said = run.tests(), run.said()["Prompt"][TEMPERATURES[0]]
    pairs = [(r, a.tokens) for test in tests for r, a in zip(tests[test], said[test])]
    examples = [run.continued(r, tokens) for r, tokens in pairs[::2] + pairs[1::2]]
    first, total = sum(len(tokens) for _, tokens in pairs[::2]), sum(len(tokens) for _, tokens in pairs)
    some_M = torch.linspace(0, total - 1, min(2 * run.cfg.contexts, total)).long()
    first, found = int((some_M < first).sum()), {}
    for name in ("BC latent", "GRPO latent"):
        latent = run.latent(FOLDERS[name], "world", "projector", "quantiser")
        both = [states(run, latent, batch) for batch in run.batches(examples)]
        h_MD, e_MD = (torch.cat(x)[some_M] for x in list(zip(*both))[:2])
        logits_of, speak = run.vlm.scorer(), latent.speaker()
        wanted_M = arg_max(logits_of, h_MD)
        same = [
            arg_max(logits_of, speak(e_MD, torch.full_like(wanted_M, k))) == wanted_M
            for k in range(latent.quantiser.codes)
        ]
        same_KM = torch.stack(same).float()
        code = int(same_KM[:, :first].mean(1).argmax())
        context = (arg_max(logits_of, e_MD) == wanted_M).float().mean()
        found[name] = {"code": code, "share": float(same_KM[code, first:].mean()), "context": float(context)}
        found[name]["any code"] = float(same_KM[:, first:].amax(0).mean())  # is there one that says the VLM's token?
    return found


def arg_max(logits_of, y_MD, rows=64):
    """The most likely token of each state (M,), a few rows of logits at a time."""
    return torch.cat([logits_of(y_MD[i : i + rows]).argmax(-1) for i in range(0, len(y_MD), rows)])


@torch.no_grad()
def meanings(run, most=10, shown=8):
    """What the most used codes do to the next token -> [{code, share, raised, lowered, said}], text-only held-out rows.

    raised, lowered: tokens whose log p, in the mean over contexts, rises and falls most against the bare VLM when the
    code is put there, among those that the data often has. said: the tokens that it stood for most often."""
    latent = run.latent("stage2", "world", "projector", "quantiser", "inverse")
    found = [states(run, latent, batch) for batch in run.batches(held_out(run, "text"))]
    h_MD, e_MD, ids_M, used_M = (torch.cat(x) for x in zip(*found))
    some = torch.linspace(0, len(ids_M) - 1, min(run.cfg.contexts, len(ids_M))).long()
    before_V, weight = mean_log_p(run, h_MD[some]), run.vlm.head.weight
    often_V = torch.bincount(ids_M, minlength=len(weight)) >= min(COMMON, 1 + len(ids_M) // 200)
    share_K, found = torch.bincount(used_M, minlength=latent.quantiser.codes) / len(used_M), []
    for code in share_K.topk(most).indices.tolist():
        y_MD = latent.speak(e_MD[some], torch.full_like(some, code))
        change_V = mean_log_p(run, y_MD) - before_V
        up = change_V.masked_fill(~often_V, -math.inf).topk(shown).indices
        down = change_V.masked_fill(~often_V, math.inf).topk(shown, largest=False).indices
        row = {"code": code, "share": float(share_K[code])}
        for name, tokens in (("raised", up), ("lowered", down), ("said", most_often(ids_M[used_M == code], shown))):
            row[name] = [run.processor.tokenizer.decode([t]) for t in tokens.tolist()]
        found.append(row)
    return found


def most_often(ids_M, count):
    """-> the `count` most frequent of these tokens, or all where they are fewer."""
    tokens, times = ids_M.unique(return_counts=True)
    return tokens[times.argsort(descending=True, stable=True)[:count]]


def mean_log_p(run, y_MD, rows=64):
    """-> (V,): log p of every token, the mean over contexts."""
    logits_of = run.vlm.scorer()
    parts = (F.log_softmax(logits_of(y_MD[i : i + rows]), -1).sum(0) for i in range(0, len(y_MD), rows))
    return sum(parts) / len(y_MD)
