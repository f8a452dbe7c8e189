"""Trains a small Qwen2.5-VL vision tower for a frozen language model, on drawings with names.

    python -m smol.make_vlm --vision random --out runs/smol/start
    python -m smol.drawings
    python -m smol.train_vision --vlm runs/smol/start --out runs/smol/tower          # make vision does all of it

Two phases. The language model never changes.

    naming     Without the language model's blocks, so it is quick. An image token learns to lie near the embedding of
               the words for what it shows: y_t the tower's output at token t, centred, n_t the mean embedding of the
               words' tokens, centred:   L = - log softmax_n( s cos(y_t, n) )[n_t]   over all names, s learnt.
               A token that shows background learns the words 'green background'.
    captions   The language model reads the image tokens, and the gradient of its next-token loss goes back through its
               frozen blocks: on captions, and on dialogues of questions and answers in its chat format.

Reported on held-out drawings and on held-out names, see `measure`. The tower is written in bfloat16.
"""

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

import common
from data import Example, Processor
from smol import scenes
from smol.drawings import load
from vlm import VLM, next_token_loss

PARTS = ("seen", "picture", "name")  # drawings trained on; held-out drawings of seen names; held-out names
CHAT = 0.2  # share of dialogues; the rest are captions
MOSAICS = 0.7  # of phase naming: share of pictures that are four small ones
GROUND = 0.2  # weight of a token that shows background, against 1 of one that shows a thing
KEPT = 4  # drawings of one name in one style, at most


# ------------------------------------------------------------------------------------------------------------ data
class Data:
    """Scenes as examples and batches for the VLM."""

    def __init__(self, vlm_folder, file):
        self.processor = Processor(vlm_folder, 400, scenes.SIDE**2)
        self.drawings = load(file)
        self.numbers = {part: self.usable(part) for part in PARTS}
        p = self.processor
        start, end = p.config.vision_start_token_id, p.config.vision_end_token_id
        self.image_ids = [start, *[p.image_id] * 16, end]

    def usable(self, part):
        """-> numbers of this part's drawings, without what has no common English name: every word of a clip art's name
        is a token of its own; an emoji's has three words at most, and 'woman farmer' is left to 'farmer'."""
        encode, seen, out = self.processor.tokenizer.encode, Counter(), []
        for i in self.drawings.of(part):
            name, style = self.drawings.names[i], self.drawings.styles[i]
            words = name.split()
            common = len(words) <= 3 and words[0] not in ("man", "woman", "men", "women")
            if style == "openclipart":
                common = all(len(encode(" " + w, add_special_tokens=False)) == 1 for w in words)
            seen[name, style] += 1
            if common and seen[name, style] <= KEPT:
                out.append(i)
        return out

    def scene(self, rng, part="seen", **kind):
        return scenes.draw_scene(rng, self.drawings, self.numbers[part], **kind)

    def pixels(self, images):
        """list of (SIDE, SIDE, 3) uint8 -> [(patches, channels)], [grids (1, 3)]"""
        out = self.processor.images(images=images, return_tensors="pt")
        return out["pixel_values"].chunk(len(images)), out["image_grid_thw"].split(1)

    def caption(self, text, pixels, grids, image=True):
        """The image, then the caption, without chat: every token of the caption is learnt, and its end."""
        ids = self.processor.tokenizer.encode(text, add_special_tokens=False) + [self.processor.eos_id]
        before = self.image_ids if image else self.image_ids[:1]
        both = np.array(before + ids)
        response = np.arange(len(both)) >= len(before)
        return Example(both, response, pixels if image else None, grids if image else None, {"id": text})

    def chat(self, messages, pixels, grids):
        return self.processor.example({"id": "", "images": [], "messages": messages}, pixels=(pixels, grids))

    def pictures(self, key, size):
        """`size` pictures for phase naming -> (pixels, grids, cells of all in one row); drawn from the key alone."""
        rng, images, cells = scenes.seeded(*key), [], []
        for k in range(size):
            if k < MOSAICS * size:
                image, names = scenes.draw_mosaic(rng, self.drawings, self.numbers["seen"])
            else:
                _, image, names = self.scene(rng)
            images.append(image)
            cells += names
        pixels, grids = self.pixels(images)
        return torch.cat(pixels), torch.cat(grids), cells

    def batches(self, key, size):
        """A batch of captions and one of dialogues, which are longer, about `size` scenes; drawn from the key alone."""
        rng = scenes.seeded(*key)
        made = [self.scene(rng) for _ in range(size)]
        captions, dialogues = [], []
        for k, ((scene, _, _), pixels, grids) in enumerate(zip(made, *self.pixels([image for _, image, _ in made]))):
            if k < CHAT * size:
                dialogues.append(self.chat(scenes.dialogue(scene, rng, 1), pixels, grids))
            else:
                captions.append(self.caption(scenes.caption(scene, rng), pixels, grids))
        return [self.processor.collate(examples) for examples in (captions, dialogues)]


# ---------------------------------------------------------------------------------------------------------- naming
class Names:
    """The classes of phase 'naming': a direction for each name, in the language model's space of embeddings."""

    def __init__(self, vlm, data):
        names = {data.drawings.names[i] for i in data.numbers["seen"]}
        names |= {f"{c} {s}" for c in scenes.COLOURS for s in scenes.SHAPES}
        names |= {f"{c} background" for c in scenes.COLOURS}
        self.number = {name: k for k, name in enumerate(sorted(names))}
        embedding = vlm.model.get_input_embeddings().weight.detach().float()
        encode = data.processor.tokenizer.encode
        rows = [embedding[encode(" " + n, add_special_tokens=False)].mean(0) for n in sorted(names)]
        self.centre_D = torch.stack(rows).mean(0)
        self.length = (torch.stack(rows) - self.centre_D).norm(dim=-1).mean()
        self.directions_KD = F.normalize(torch.stack(rows) - self.centre_D, dim=-1)

    def loss(self, y_TD, cells, scale):
        """y_TD: image tokens of all scenes in one row; cells: the Thing that each shows, or None. -> (loss, share of
        the tokens of things that are named right)."""
        at = [k for k, thing in enumerate(cells) if thing]
        true = torch.tensor([self.number[cells[k].name] for k in at], device=y_TD.device)
        thing = torch.tensor([not cells[k].name.endswith(" background") for k in at], device=y_TD.device)
        y_MD = y_TD[at].float() - self.centre_D
        logits_MK = scale * F.normalize(y_MD, dim=-1) @ self.directions_KD.T
        weight_M = torch.where(thing, 1.0, GROUND)
        nll = (F.cross_entropy(logits_MK, true, reduction="none") * weight_M).sum() / weight_M.sum()
        stretch = (y_MD.norm(dim=-1) / self.length).log().pow(2).mean()  # as long as a word's embedding
        return nll + 0.1 * stretch, (logits_MK.argmax(-1) == true)[thing].float().mean()


class Teacher:
    """Phase 'naming' also: from an image token that shows a drawing, a linear map is to give the drawing's vector of
    teacher.py. L = 1 - cos(W y_t + b, v_t), mean over these tokens."""

    def __init__(self, file, width, device):
        with np.load(file) as f:
            self.vectors_NK = torch.from_numpy(f["vectors"]).float().to(device)
        self.linear = torch.nn.Linear(width, self.vectors_NK.shape[1]).to(device)

    def loss(self, y_TD, cells):
        at = [k for k, thing in enumerate(cells) if thing and thing.drawing is not None]
        v_MK = self.vectors_NK[[cells[k].drawing for k in at]]
        return 1 - F.cosine_similarity(self.linear(y_TD[at]).float(), v_MK, dim=-1).mean()


def image_tokens(vlm, pixels, grids):
    """The tower's output for all images in one row, (tokens, D)."""
    device = vlm.head.weight.device
    return torch.cat(vlm.body.get_image_features(pixels.to(device), grids.to(device)).pooler_output)


# -------------------------------------------------------------------------------------------------------- training
def load_vlm(folder):
    return VLM(folder, "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def autocast(vlm):
    return torch.autocast(vlm.head.weight.device.type, torch.bfloat16)


def tower_of(vlm):
    return vlm.body.visual


class AtOnce:
    """The tower's attention over images of one size, all in one call. The library's makes a call for each image."""

    def forward(self, hidden_states, cu_seqlens, position_embeddings, **_):
        T, images = len(hidden_states), len(cu_seqlens) - 1
        q, k, v = self.qkv(hidden_states).view(T, 3, self.num_heads, -1).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        q, k, v = (x.to(v.dtype).view(images, T // images, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(T, -1))


def attend_at_once(vlm):
    for block in tower_of(vlm).blocks:
        block.attn.__class__ = type("AttentionAtOnce", (AtOnce, type(block.attn)), {})


class Steps(Dataset):
    """What each step learns from, by its number alone: made in a process of its own, while the step before runs."""

    def __init__(self, data, args, start):
        self.data, self.args, self.start = data, args, start

    def __len__(self):
        return self.args.naming + self.args.captions - self.start

    def __getitem__(self, k):
        step, args = self.start + k, self.args
        key = "vision", args.seed, step
        if step < args.naming:
            return self.data.pictures(key, args.batch_naming)
        return self.data.batches(key, args.batch)


class Training:
    """The tower, its optimizer, and where an earlier run stopped."""

    def __init__(self, args):
        self.args, self.data = args, Data(args.vlm, args.drawings)
        self.vlm = load_vlm(args.vlm)
        device = self.vlm.head.weight.device
        tower_of(self.vlm).float().requires_grad_(True)
        attend_at_once(self.vlm)
        self.names = Names(self.vlm, self.data)
        self.scale = torch.nn.Parameter(torch.tensor(20.0, device=device))
        self.teacher = Teacher(args.teacher, self.vlm.config.hidden_size, device) if args.teacher else None
        self.params = [*tower_of(self.vlm).parameters(), self.scale]
        if self.teacher:
            self.params += self.teacher.linear.parameters()
        self.optimizer = torch.optim.AdamW(self.params, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
        self.step, self.minutes = 0, 0.0
        self.file = args.out.with_suffix(".train")
        if self.file.exists():
            state = torch.load(self.file, weights_only=True, map_location=device)
            tower_of(self.vlm).load_state_dict(state["tower"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scale.data, self.step, self.minutes = state["scale"], state["step"], state["minutes"]
            if self.teacher:
                self.teacher.linear.load_state_dict(state["teacher"])

    def save(self):
        args, tower = self.args, tower_of(self.vlm).state_dict()
        state = {"tower": tower, "optimizer": self.optimizer.state_dict(), "scale": self.scale.data}
        if self.teacher:
            state["teacher"] = self.teacher.linear.state_dict()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state | {"step": self.step, "minutes": self.minutes}, f"{self.file}.new")
        Path(f"{self.file}.new").rename(self.file)
        save_file({n: t.bfloat16().contiguous() for n, t in tower.items()}, args.out.with_suffix(".safetensors"))

    def rate(self):
        """Each phase: linear warm-up, then cosine to a twentieth."""
        args, naming = self.args, self.step < self.args.naming
        steps, done = (args.naming, self.step) if naming else (args.captions, self.step - args.naming)
        peak = args.lr if naming else args.lr / 4
        return peak * min((done + 1) / min(100, steps), 0.525 + 0.475 * math.cos(math.pi * done / steps))

    def loss(self, given):
        """given: what `Steps` made of this step's number. -> (loss, what the log says)"""
        args = self.args
        if self.step < args.naming:
            pixels, grids, cells = given
            y_TD = image_tokens(self.vlm, pixels, grids)
            loss, right = self.names.loss(y_TD, cells, self.scale)
            told = {"naming": loss.item(), "named_right": right.item()}
            if self.teacher:
                unlike = self.teacher.loss(y_TD, cells)
                loss, told["unlike_teacher"] = loss + args.teacher_weight * unlike, unlike.item()
            return loss, told
        sums = [caption_nll(self.vlm, batch) for batch in given]
        told = {name: nll.item() / count for name, (nll, count) in zip(("caption", "dialogue"), sums)}
        return sum(nll for nll, _ in sums) / sum(count for _, count in sums), told

    def __call__(self):
        args, shown, began = self.args, {}, time.time()
        total = args.naming + args.captions
        given = iter(DataLoader(Steps(self.data, args, self.step), batch_size=None, num_workers=1, prefetch_factor=4))
        while self.step < total:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            with autocast(self.vlm):
                loss, told = self.loss(next(given))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.params, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            for name, value in told.items():
                shown[name] = 0.97 * shown.get(name, value) + 0.03 * value
            if self.step % 25 == 0 or self.step == total:
                minutes = self.minutes + (time.time() - began) / 60
                print(json.dumps({"step": self.step, "minutes": round(minutes, 1)} | rounded(shown)), flush=True)
            if self.step % args.save_every == 0 or self.step in (args.naming, total):
                self.minutes, began = self.minutes + (time.time() - began) / 60, time.time()
                self.save()
                if self.step > args.naming:
                    told = {part: nats(self.vlm, self.data, part, 64) for part in PARTS}
                    print(json.dumps({"step": self.step, "held_out": told}), flush=True)


def rounded(numbers):
    return {k: round(v, 3) for k, v in numbers.items()}


def caption_nll(vlm, batch):
    """-> (sum of the nats of the tokens that are to be learnt, their number)."""
    batch = batch.to(vlm.head.weight.device)
    explained = batch.explained_BT
    y_MD = vlm(batch)[:, :-1][explained]
    return next_token_loss(vlm.head, y_MD, batch.ids_BT[:, 1:][explained]), int(explained.sum())


# ------------------------------------------------------------------------------------------------------ evaluation
@torch.no_grad()
def nats(vlm, data, part, count, size=32):
    """Nats a token of captions of one thing: with the right picture, with another scene's, with none."""
    rng, sums = scenes.seeded("nats", part), Counter()
    made = [data.scene(rng, part, shapes=0, count=1) for _ in range(count)]
    texts = [f"This is a picture of {scenes.phrases(scene)}." for scene, _, _ in made]
    pixels, grids = data.pixels([image for _, image, _ in made])
    for i in range(0, count, size):
        rows = range(i, min(i + size, count))
        for how in ("right", "another", "none"):
            at = [(k + count // 2) % count if how == "another" else k for k in rows]
            examples = [data.caption(texts[k], pixels[j], grids[j], how != "none") for k, j in zip(rows, at)]
            with autocast(vlm):
                nll, tokens = caption_nll(vlm, data.processor.collate(examples))
            sums[how] += nll.item()
            sums[how + " tokens"] += tokens
    return {how: round(sums[how] / sums[how + " tokens"], 3) for how in ("right", "another", "none")}


@torch.no_grad()
def scores(vlm, data, examples, size=40):
    """-> for each example (log-probability of what is to be learnt, whether all of it is the greedy choice)."""
    out = []
    with autocast(vlm):
        logits_of = vlm.scorer()
    for i in range(0, len(examples), size):
        batch = data.processor.collate(examples[i : i + size]).to(vlm.head.weight.device)
        explained = batch.explained_BT
        with autocast(vlm):
            logits_MV = logits_of(vlm(batch)[:, :-1][explained])
        true_M = batch.ids_BT[:, 1:][explained]
        logp = logits_MV.log_softmax(-1).gather(-1, true_M[:, None])[:, 0].split(explained.sum(1).tolist())
        right = (logits_MV.argmax(-1) == true_M).split(explained.sum(1).tolist())
        out += [(p.sum().item(), bool(r.all())) for p, r in zip(logp, right)]
    return out


def named(vlm, data, part, count, of=20):
    """Share of pictures whose own name is the likeliest of 20 names of the same part, each name's likelihood against
    its likelihood with no picture."""
    rng = scenes.seeded("named", part)
    names = sorted({data.drawings.names[i] for i in data.numbers[part]})
    right = 0
    for _ in range(count):
        scene, image, _ = data.scene(rng, part, shapes=0, count=1)
        while scene.copies:
            scene, image, _ = data.scene(rng, part, shapes=0, count=1)
        own = scene.things[0].name
        asked = [own, *rng.sample([n for n in names if n != own], of - 1)]
        texts = [f"This is a picture of {scenes.Thing(n).phrase()}." for n in asked]
        (pixels,), (grids,) = data.pixels([image])
        seen = scores(vlm, data, [data.caption(t, pixels, grids) for t in texts])
        blind = scores(vlm, data, [data.caption(t, pixels, grids, False) for t in texts])
        gain = [s[0] - b[0] for s, b in zip(seen, blind)]
        right += gain[0] == max(gain)
    return right / count


def answered(vlm, data, part, kind, count):
    """Share of questions of this kind, in chat, whose greedy answer is right to the letter."""
    rng, examples = scenes.seeded("answered", part, kind), []
    while len(examples) < count:
        scene, image, _ = data.scene(rng, part)
        several = len(scene.things) > 1 and not scene.copies
        fits = {
            "count": True,
            "background": bool(scene.background),
            "colour": any(t.drawing is None for t in scene.things),
            "where": several,
            "which": several,
            "what": len(scene.things) == 1 and scene.things[0].drawing is not None,
        }
        if fits[kind]:
            asked, answer = scenes.ask(scene, kind, rng)
            messages = [{"role": "user", "content": "<image>" + asked}, {"role": "assistant", "content": answer}]
            (pixels,), (grids,) = data.pixels([image])
            examples.append(data.chat(messages, pixels, grids))
    return sum(right for _, right in scores(vlm, data, examples)) / count


def measure(vlm, data, count):
    """Everything that is reported of a tower -> {measure: {part: number}}."""
    found = {"nats": {part: nats(vlm, data, part, count) for part in PARTS}}
    found["named right of 20"] = {part: named(vlm, data, part, count // 2) for part in PARTS}
    for kind in ("what", "colour", "background", "count", "where", "which"):
        parts = ("seen", "picture") if kind in ("what", "which") else ("picture",)
        found[kind] = {part: answered(vlm, data, part, kind, count) for part in parts}
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--vlm", default="runs/smol/start", help="checkpoint with the language model, of make_vlm")
    add("--drawings", default="runs/smol/drawings.npz", type=Path, help="file of smol.drawings")
    add("--teacher", type=Path, help="file of smol.teacher; without it the names alone teach")
    add("--teacher-weight", default=5.0, type=float, help="weight of the likeness to the teacher's vectors")
    add("--out", default="runs/smol/tower", type=Path, help="file to write, without its ending")
    add("--naming", default=4000, type=int, help="steps of phase naming")
    add("--captions", default=1750, type=int, help="steps of phase captions")
    add("--batch-naming", default=48, type=int, help="scenes a step of phase naming")
    add("--batch", default=16, type=int, help="scenes a step of phase captions")
    add("--lr", default=2e-3, type=float, help="peak learning rate of phase naming; captions: a quarter")
    add("--save-every", default=200, type=int, help="steps between checkpoints")
    add("--seed", default=0, type=int, help="seed of the scenes")
    add("--measure", type=int, default=0, metavar="N", help="only measure the tower at --out, on N scenes a part")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    if not args.measure:
        return Training(args)()
    data, vlm = Data(args.vlm, args.drawings), load_vlm(args.vlm)
    tower_of(vlm).load_state_dict(load_file(args.out.with_suffix(".safetensors")))
    found = measure(vlm, data, args.measure)
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    common.run(main)
