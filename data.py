"""Records on disk -> token batches with images.

A record is a dict {"id", "images": [paths], "messages": [{"role", "content"}]}; text-only rows have no images; a row may
be {"text": ...} instead, or LLaVA-style {"image", "conversations": [{"from", "value"}]}. `<image>` in a message marks an
image's place. Other fields ("facts" of the tiny world, "character" of MMRole) are kept for the judge.

Files are JSON Lines or JSON arrays. The order of work: `Records` (a file, indexed, checked) -> `Processor.example`
(token ids, which of them are responses, pixels) -> `Processor.collate` (a padded `Batch`); `batches` yields them forever
in an order that depends on (seed, epoch) alone, so that a resumed run and any number of ranks see the same data.

    python data.py --mmrole FOLDER --out runs/real/data     # MMRole, raw or preprocessed, -> this record format
"""

import argparse
import itertools
import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer


class DataError(ValueError):
    """Bad input; the message names the file, the row and the cure. The scripts print it without a traceback."""


# ------------------------------------------------------------------------------------------------------ records
def normalise(row, where):
    """One row in any of the formats above -> {"id", "images", "messages" or "text", ...}; raises DataError."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a record must be a JSON object, this is a {type(row).__name__}")
    record = {k: v for k, v in row.items() if k not in ("image", "conversations")}
    if "messages" not in row and isinstance(row.get("conversations"), list):
        names = {"human": "user", "gpt": "assistant"}
        turns = [
            (t.get("from") or t.get("role"), t.get("value", t.get("content"))) if isinstance(t, dict) else ("?", t)
            for t in row["conversations"]
        ]
        record["messages"] = [{"role": names.get(str(who), str(who)), "content": text} for who, text in turns]
    images = row.get("images") or row.get("image") or []
    record["images"] = images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(p, str) for p in images):
        raise DataError(f"{where}: 'images' must be a list of paths, this is {str(images)[:80]}")
    if isinstance(record.get("text"), str) and record["text"].strip() and "messages" not in record:
        if images:
            raise DataError(f"{where}: a 'text' row cannot have an image; write it as 'messages'")
        return record
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: no messages; a record needs 'messages', 'conversations' or 'text'")
    for m in messages:
        if (
            not isinstance(m, dict)
            or m.get("role") not in ("system", "user", "assistant")
            or not isinstance(m.get("content"), str)
        ):
            raise DataError(
                f"{where}: a message needs role system, user or assistant and a string 'content', this is {str(m)[:80]}"
            )
    marks = sum(m["content"].count("<image>") for m in messages)
    if record["images"] and not marks:  # no mark: the image comes before the first question
        k = next((k for k, m in enumerate(messages) if m["role"] == "user"), None)
        if k is None:
            raise DataError(f"{where}: has an image but no user message to put it in")
        messages = [
            m | {"content": "<image>" * len(record["images"]) + m["content"]} if j == k else m
            for j, m in enumerate(messages)
        ]
        record["messages"] = messages
    elif marks != len(record["images"]):
        raise DataError(f"{where}: {marks} <image> marks but {len(record['images'])} images; make them equal")
    return record


class Records:
    """A file of records, read row by row when asked: a text corpus of any size costs 16 B a row, its place and its size.

    sizes: bytes of each row on disk (characters, in a JSON array): what is known of its length without reading it."""

    def __init__(self, path, limit=None):
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path}: no such file; `python tiny/world.py` writes the default data")
        with open(self.path, "rb") as f:
            self.rows = None
            if self.path.suffix == ".json":
                try:
                    self.rows = json.load(f)
                except ValueError as e:  # bad JSON or bad UTF-8
                    raise DataError(f"{path}: not JSON ({e}); JSON Lines files must end in .jsonl") from None
                if not isinstance(self.rows, list):
                    raise DataError(f"{path}: must hold a JSON array of records")
                self.rows = self.rows[:limit]
                self.sizes = np.array([len(str(row)) for row in self.rows])
            else:
                offset, offsets = 0, []
                for line in f:
                    if line.strip():
                        offsets.append(offset)
                    offset += len(line)
                self.sizes = np.diff(np.array(offsets + [offset], dtype=np.int64))[:limit]
                self.offsets = np.array(offsets[:limit], dtype=np.int64)
        if not len(self):
            raise DataError(f"{path}: holds no record")

    def __len__(self):
        return len(self.offsets) if self.rows is None else len(self.rows)

    def __getitem__(self, i):
        where = f"{self.path}, row {i + 1}"
        if self.rows is None:
            with open(self.path, "rb") as f:
                f.seek(self.offsets[i])
                try:
                    row = json.loads(f.readline())
                except ValueError as e:  # bad JSON or bad UTF-8
                    raise DataError(f"{where}: not JSON ({e})") from None
        else:
            row = self.rows[i]
        record = normalise(row, where)
        record["images"] = [str(self.path.parent / p) for p in record["images"]]
        return record | {"where": where}


# ----------------------------------------------------------------------------------------------------- examples
@dataclass
class Example:
    """One record as tokens. ids (T,) int64; response (T,) bool: the tokens that are to be learnt, EOS included."""

    ids: np.ndarray
    response: np.ndarray
    pixels: torch.Tensor | None  # (patches, channels), all images of the record
    grids: torch.Tensor | None  # (images, 3): t, h, w in patches
    record: dict


@dataclass
class Batch:
    """Padded examples. Right-padded for training, left-padded for generation.

    ids_BT int64; mask_BT bool, True at real tokens; response_BT bool; images_B int64, the number of images of a row.
    """

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    response_BT: torch.Tensor
    images_B: torch.Tensor
    pixels: torch.Tensor | None
    grids: torch.Tensor | None
    records: list

    @property
    def paired_B(self):
        """bool, True where the row has an image."""
        return self.images_B > 0

    @property
    def padded(self):
        """Does any row have padding? (Waits for the device.)"""
        return not bool(self.mask_BT.all())

    def rows(self, part):
        """The rows `part` (a slice) with their images."""
        before, inside = int(self.images_B[: part.start].sum()), int(self.images_B[part].sum())
        pixels = grids = None
        if inside:
            patches = self.grids.prod(-1)
            first, count = int(patches[:before].sum()), int(patches[before : before + inside].sum())
            pixels, grids = self.pixels[first : first + count], self.grids[before : before + inside]
        ids, mask, response = self.ids_BT[part], self.mask_BT[part], self.response_BT[part]
        return Batch(ids, mask, response, self.images_B[part], pixels, grids, self.records[part])

    def to(self, device):
        return replace(
            self, **{k: v.to(device, non_blocking=True) for k, v in vars(self).items() if torch.is_tensor(v)}
        )


class Processor:
    """Tokenizer + image processor of a checkpoint: records -> Examples -> Batches."""

    def __init__(self, vlm, max_length=512, max_pixels=280 * 420, loss_on="response"):
        """loss_on: 'response' (the paper's L_inverse, without the release's prompt tokens) or 'all' text."""
        self.tokenizer = AutoTokenizer.from_pretrained(vlm)
        size = {"shortest_edge": 28 * 28, "longest_edge": max_pixels}
        self.images = AutoImageProcessor.from_pretrained(vlm, size=size)
        self.max_length, self.loss_on = max_length, loss_on
        self.config = AutoConfig.from_pretrained(vlm)
        self.image_id = self.config.image_token_id
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_id)
        self.vision_ids = {self.image_id, self.config.vision_start_token_id, self.config.vision_end_token_id}
        self.eos, self.eos_id = self.tokenizer.eos_token, self.tokenizer.eos_token_id
        self.pad_id = self.tokenizer.pad_token_id
        self.special = set(self.tokenizer.all_special_tokens) | {
            t.content for t in self.tokenizer.added_tokens_decoder.values()
        }
        # EOS stays; every other special token (image and vision tokens among them) must never be sampled
        self.never_sampled = sorted(set(self.tokenizer.added_tokens_decoder) - {self.eos_id})

    def example(self, record, prompt_only=False, pixels=None):
        """-> Example. With prompt_only, everything up to the last answer, ready to generate it.
        pixels: (pixels, grids) where the caller has them already; else the record's images are opened.

        Raises DataError if an image does not open, the text holds a control token, or (prompt_only) it is too long."""
        where = record.get("where", record.get("id", "record"))
        for text in [record["text"]] if "text" in record else [m["content"] for m in record["messages"]]:
            if any(s in text for s in self.special):
                raise DataError(f"{where}: the text holds a control token of the tokenizer; remove it")
        pixels, grids = pixels or self._pixels(record["images"], where)
        merge = self.images.merge_size**2
        counts = iter([] if grids is None else (grids.prod(-1) // merge).tolist())
        ids, response = [], []
        for text, learnt in self._pieces(record, prompt_only, where):
            parts = text.split(self.image_token)
            for k, part in enumerate(parts):
                new = self.tokenizer(part, add_special_tokens=False)["input_ids"]
                new = ([self.image_id] * next(counts) if k else []) + new
                ids += new
                response += [learnt] * len(new)
        if prompt_only and len(ids) > self.max_length:
            raise DataError(
                f"{where}: the prompt has {len(ids)} tokens, the limit is {self.max_length}; shorten it or raise the limit"
            )
        ids, response = np.array(ids[: self.max_length]), np.array(response[: self.max_length], dtype=bool)
        if (ids == self.image_id).sum() * merge != (0 if grids is None else grids.prod(-1).sum()):
            raise DataError(
                f"{where}: {self.max_length} tokens are too few for its images; raise --max-length or lower --max-pixels"
            )
        if not prompt_only:  # an image is never learnt, not even inside an answer
            response = (response | (self.loss_on == "all")) & ~np.isin(ids, list(self.vision_ids))
        if not prompt_only and not response[1:].any():
            raise DataError(
                f"{where}: no answer to learn within {self.max_length} tokens; raise --max-length or drop the record"
            )
        return Example(ids, response, pixels, grids, record)

    def _pixels(self, paths, where):
        if not paths:
            return None, None
        try:
            images = [Image.open(p).convert("RGB") for p in paths]
            out = self.images(images=images, return_tensors="pt")
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ) as e:  # all that PIL and the processor raise
            raise DataError(f"{where}: an image does not open ({e}); fix the path or drop the record") from None
        return out["pixel_values"], out["image_grid_thw"]

    def _pieces(self, record, prompt_only, where):
        """Yield (text, is it a response), rendered by the checkpoint's own chat template; a response ends with EOS."""
        if "text" in record:
            if not prompt_only:
                yield record["text"] + self.eos, True
                return
            yield record["text"], False
            return
        messages = [m | {"content": self._content(m["content"])} for m in record["messages"]]
        answers = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
        if not answers:
            raise DataError(f"{where}: no assistant message; there is nothing to learn or to compare with")
        done = 0
        for k in answers:
            prompt = self._render(messages[:k], True)
            if prompt_only and k == answers[-1]:
                yield prompt[done:], False
                return
            full = self._render(messages[: k + 1], False)
            assert full.startswith(prompt), "the chat template does not extend its own prefix"
            end = full.index(self.eos, len(prompt)) + len(self.eos)
            yield prompt[done:], False
            yield full[len(prompt) : end], True
            done = end

    def _content(self, text):
        parts = text.split("<image>")
        if len(parts) == 1:
            return text
        return [
            p
            for k, t in enumerate(parts)
            for p in ([{"type": "image"}] if k else []) + ([{"type": "text", "text": t}] if t else [])
        ]

    def _render(self, messages, generate):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)

    def collate(self, examples, left=False):
        """Examples -> Batch padded to its longest row; `left` for generation."""
        B, T = len(examples), max(len(e.ids) for e in examples)
        ids = torch.full((B, T), self.pad_id)
        mask, response = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
        for b, e in enumerate(examples):
            s = slice(T - len(e.ids), T) if left else slice(0, len(e.ids))
            ids[b, s], mask[b, s], response[b, s] = torch.from_numpy(e.ids), True, torch.from_numpy(e.response)
        pictures = [e for e in examples if e.pixels is not None]
        return Batch(
            ids,
            mask,
            response,
            torch.tensor([0 if e.grids is None else len(e.grids) for e in examples]),
            torch.cat([e.pixels for e in pictures]) if pictures else None,
            torch.cat([e.grids for e in pictures]) if pictures else None,
            [e.record for e in examples],
        )

    def text_view(self, batch):
        """The same dialogues with the images left out, and how their tokens line up.

        -> (Batch (B, S) without image tokens, index_BS: position in `batch` of each text token, after_BS bool: text
        tokens behind the row's first image). Positions, masks and responses are re-made for the shorter rows. Tokens
        before the image do not count in L_t2vt and L_vt2t: there e^VT = e^T by causality."""
        keep_BT = batch.mask_BT & ~torch.isin(
            batch.ids_BT, torch.tensor(sorted(self.vision_ids), device=batch.ids_BT.device)
        )
        index_BS = torch.argsort(~keep_BT, dim=1, stable=True)[
            :, : int(keep_BT.sum(1).max())
        ]  # kept tokens first, in order
        real_BS = keep_BT.gather(1, index_BS)
        seen_BT = (batch.ids_BT == self.image_id).cumsum(1) > 0
        ids_BS = batch.ids_BT.gather(1, index_BS).masked_fill(~real_BS, self.pad_id)
        view = Batch(
            ids_BS,
            real_BS,
            batch.response_BT.gather(1, index_BS) & real_BS,
            torch.zeros_like(batch.images_B),
            None,
            None,
            batch.records,
        )
        return view, index_BS, seen_BT.gather(1, index_BS) & real_BS


# ------------------------------------------------------------------------------------------------------ samplers
def order(n, seed, epoch):
    """The epoch's permutation of n rows; the same on every rank."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def index_stream(n, seed, start=0):
    """Row numbers forever, a fresh permutation each epoch, from the start-th draw on (to resume)."""
    epoch, k = divmod(start, n)
    while True:
        yield from order(n, seed, epoch)[k:]
        epoch, k = epoch + 1, 0


def index_batches(records, size, seed, start=0, window=16):
    """Row numbers forever, `size` at a time of about the same length, so that a batch has little padding: `window` batches are
    drawn at once, their rows sorted by their size on disk and cut into batches, and those come in random order."""
    first, skip = divmod(start, window * size)
    stream = index_stream(len(records), seed, first * window * size)
    for k in itertools.count(first):
        drawn = np.array([next(stream) for _ in range(window * size)])
        drawn = drawn[np.argsort(records.sizes[drawn], kind="stable")].reshape(window, size)
        yield from np.random.default_rng([seed, k, 1]).permutation(drawn).flatten()[skip:]
        skip = 0


def batches(records, processor, size, seed, start=0, rank=0, world=1, refused=None):
    """Yield Batches of `size` rows of alike length for this rank, forever. `start`: rows drawn so far by all ranks together.

    A row that cannot be used is replaced by the next one of the file that can, and its reason goes into the set `refused` (without
    a set it is raised): which row stands in depends on the row alone, so that resume and ranks change nothing."""
    picked = []
    for n, i in enumerate(index_batches(records, size * world, seed, start)):
        if n % world == rank:
            picked.append(usable(records, processor, int(i), refused))
        if len(picked) == size:
            yield processor.collate(picked)
            picked = []


def usable(records, processor, i, refused):
    """The Example of row i, or of the first row after it that can be used."""
    for k in range(len(records)):
        try:
            return processor.example(records[(i + k) % len(records)])
        except DataError as e:
            if refused is None:
                raise
            refused.add(str(e))
    raise DataError(f"{records.path}: no row can be used; the first reason: {min(refused)}")


# -------------------------------------------------------------------------------------------------------- MMRole
PROFILE_FIELDS = ("introduction", "personality", "catchphrase", "relationship", "experience")


def mmrole_rows(folder):
    """-> ([(split 'id' or 'ood', row)] of every dialogue, {file name: profile}, empty where the rows have theirs).

    Reads the raw layout (dialogues/, profiles/, images/) or the preprocessed files conversations-{train,OODtest}-comment.json.
    Raises DataError where the folder has neither or a file cannot be read."""

    def load(path, kind):
        try:
            value = json.loads(path.read_bytes())
        except ValueError as e:
            raise DataError(f"{path}: not JSON ({e})") from None
        if not isinstance(value, kind):
            raise DataError(f"{path}: must hold a JSON {'array of dialogues' if kind is list else 'object'}")
        return value

    raw = [("id", p) for p in sorted((folder / "dialogues/in-distribution/comment").glob("*.json"))]
    raw += [("ood", p) for p in sorted((folder / "dialogues/out-of-distribution").glob("comment*.json"))]
    ready = [(s, folder / f"conversations-{f}-comment.json") for s, f in (("id", "train"), ("ood", "OODtest"))]
    raw = raw if {s for s, _ in raw} == {"id", "ood"} else []
    if not raw and not all(p.is_file() for _, p in ready):
        raise DataError(
            f"{folder}: not MMRole; it needs dialogues/in-distribution/comment/*.json, dialogues/out-of-distribution/"
            "comment.json and profiles/, or conversations-train-comment.json and conversations-OODtest-comment.json"
        )
    profiles = (
        {p.stem: load(p, dict) for p in sorted(folder.glob("profiles/*/detailed_profiles/*.json"))} if raw else {}
    )
    return [(split, row) for split, path in raw or ready for row in load(path, list)], profiles


def mmrole_dialogue(row, folder, profiles):
    """A row of either layout -> (id, [its image, if it is on disk], character, profile, turns [(is it the human, text)]).

    A speaker is under 'from' or 'role': human, user, assistant or the character's name. DataError says why it is refused."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise DataError("not a dialogue")
    said = [(t.get("from") or t.get("role"), t.get("value", t.get("content")) or "") for t in turns]
    if not all(isinstance(x, str) and x for x, _ in said) or not all(isinstance(text, str) for _, text in said):
        raise DataError("unknown speaker or no text")
    said = [(who, text.replace("<image>", "").strip()) for who, text in said]
    turns = [(who in ("human", "user"), text) for who, text in said]
    answered = [k for k, (human, text) in enumerate(turns) if not human and text]
    if not answered:
        raise DataError("no answer")
    turns = turns[: answered[-1] + 1]
    if not all(text for _, text in turns):
        raise DataError("empty turn")
    if not turns[0][0]:
        raise DataError("does not begin with the human")
    if any(a[0] == b[0] for a, b in zip(turns, turns[1:])):
        raise DataError("two turns of one speaker in a row")
    names = {who for who, _ in said} - {"human", "user", "assistant"}
    character = row.get("character_role") or next(iter(names), None)
    if not isinstance(character, str) or names - {character}:
        raise DataError("unknown speaker or no text")
    profile = row.get("character_profile") or {}
    profile = (profile.get(character) if isinstance(profile, dict) else None) or profiles.get(
        character.replace(" ", "_")
    )
    if not isinstance(profile, dict) or not short_profile(profile, 400):
        raise DataError("no profile of the character")
    image = str(row.get("image") or row.get("image_path") or "")
    images = [str(p.resolve()) for p in (folder / "images" / image, folder / image) if p.is_file()][:1]
    return str(row.get("id")), images, character, profile, turns


def short_profile(profile, limit):
    """The fields that make a voice first, each cut at a word so that all together have at most `limit` bytes of UTF-8."""
    fields = [(f, " ".join(str(profile.get(f) or "").split())) for f in PROFILE_FIELDS]
    fields, out = [(f, t) for f, t in fields if t], []
    for k, (f, text) in enumerate(fields):
        room = (limit - sum(len(t.encode()) + 1 for t in out)) // max(1, min(3, len(fields)) - k) - len(f) - 3
        if k < 3 and room > 20:
            cut = text.encode()[:room].decode(errors="ignore")
            if (
                cut != text and text[len(cut)] != " " and max(cut[-1:], text[len(cut)]) < "\u2e80"
            ):  # Chinese has no spaces
                cut = cut.rsplit(" ", 1)[0]
            out.append(f"{f.capitalize()}: {cut}")
    return "\n".join(out)


def convert_mmrole(folder, out, profile_bytes=400):
    """MMRole -> paired, text, task_demos, task_prompts, task_id, task_ood (.jsonl) and counts.json under `out`; -> the counts.

    The paper's split: in-distribution dialogues shuffled with seed 42, the first 50% demonstrations, to 90% RL prompts, the rest the
    in-distribution test; the out-of-distribution file is the other test. paired (image on disk) and text (image elsewhere) are the
    first 90%, whole dialogues: no test dialogue is in them. A task record is one answer: the character in the system message; the
    profile, the dialogue so far and the last question, with the image where it is there, in one user message."""
    out, counts = Path(out), {"refused": Counter()}
    usable = {"id": [], "ood": []}
    rows, profiles = mmrole_rows(Path(folder))
    seen = set()
    for split, row in rows:
        try:
            name, images, who, profile, turns = mmrole_dialogue(row, Path(folder), profiles)
            key = (who, str(row.get("image") or row.get("image_path")), *turns)
            if key in seen:  # else one of the two may be in a test
                raise DataError("the same dialogue twice")
        except DataError as e:
            counts["refused"][f"{split}: {e}"] += 1
            continue
        seen.add(key)
        usable[split].append((name, images, who, short_profile(profile, profile_bytes), turns))
    if not usable["id"] or not usable["ood"]:
        raise DataError(
            f"{folder}: no usable dialogue in the {'out-of' if usable['id'] else 'in'}-distribution part; "
            f"refused: {dict(counts['refused'])}"
        )
    random.Random(42).shuffle(usable["id"])
    n = len(usable["id"])
    parts = {
        "task_demos": usable["id"][: n // 2],
        "task_prompts": usable["id"][n // 2 : n * 9 // 10],
        "task_id": usable["id"][n * 9 // 10 :],
        "task_ood": usable["ood"],
    }

    def message(human, text):
        return {"role": "user" if human else "assistant", "content": text}

    def whole(dialogue):
        name, images, who, profile, turns = dialogue
        first = {"role": "user", "content": "<image>" * len(images) + f"{profile}\n{turns[0][1]}"}
        return {
            "id": name,
            "images": images,
            "character": who,
            "messages": [{"role": "system", "content": f"Play the role of {who}."}, first]
            + [message(*t) for t in turns[1:]],
        }

    def answers(dialogue):
        name, images, who, profile, turns = dialogue
        for k, (human, text) in enumerate(turns):
            if not human:
                so_far = "\n".join(f"{'User' if h else who}: {t}" for h, t in turns[: k - 1])
                question = "<image>" * len(images) + "\n".join(filter(None, [profile, so_far, turns[k - 1][1]]))
                yield {
                    "id": f"{name}-{k}",
                    "images": images,
                    "character": who,
                    "messages": [
                        {"role": "system", "content": f"Play the role of {who}."},
                        message(True, question),
                        message(False, text),
                    ],
                }

    out.mkdir(parents=True, exist_ok=True)
    pretraining = [whole(d) for part in ("task_demos", "task_prompts") for d in parts[part]]
    files = {"paired": [r for r in pretraining if r["images"]], "text": [r for r in pretraining if not r["images"]]}
    files |= {name: [r for d in part for r in answers(d)] for name, part in parts.items()}
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
        )
        counts[name] = {"records": len(rows), "with image": sum(bool(r["images"]) for r in rows)}
    (out / "counts.json").write_text(json.dumps(counts, indent=1))
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Convert MMRole (raw or preprocessed) to this project's records.", allow_abbrev=False
    )
    parser.add_argument("--mmrole", required=True, help="folder of the data set")
    parser.add_argument("--out", default="runs/real/data", help="folder to write")
    parser.add_argument(
        "--profile-bytes", type=int, default=400, help="longest profile in a prompt, bytes of UTF-8 (default: 400)"
    )
    given = parser.parse_args()
    try:
        print(json.dumps(convert_mmrole(given.mmrole, given.out, given.profile_bytes), indent=1))
    except (DataError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
