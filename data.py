"""Records on disk -> token batches with images.

A record is a dict {"id", "images": [paths], "messages": [{"role", "content"}]}. Text-only records have no images. A row
may be {"text": ...} instead, or LLaVA-style {"image", "conversations": [{"from", "value"}]}. `<image>` in a message
marks an image's place. Other fields ("facts" of the tiny world, "character" of MMRole) are kept for the judge.

Files are JSON Lines or JSON arrays. The order of work:
    Records            a file, indexed; a row is read and checked when it is asked for
    Processor.example  a record -> token ids, which of them are to be learnt, pixels
    Processor.collate  examples -> a padded Batch
    batches            Batches forever. Their order depends on (seed, epoch) alone, so that a resumed run and any number
                       of ranks see the same data.

Letters in names: B rows of a batch, T tokens, S tokens without those of the image."""

import itertools
import json
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
    """One row in any of the forms above -> {"id", "images", "messages" or "text", ...}; raises DataError."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a record must be a JSON object, this is a {type(row).__name__}")
    record = {k: v for k, v in row.items() if k not in ("image", "conversations")}
    if "messages" not in row and isinstance(row.get("conversations"), list):
        record["messages"] = [_llava_message(turn) for turn in row["conversations"]]
    images = row.get("images") or row.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(p, str) for p in images):
        raise DataError(f"{where}: 'images' must be a list of paths, this is {str(images)[:80]}")
    record["images"] = images
    if isinstance(record.get("text"), str) and record["text"].strip() and "messages" not in record:
        if images:
            raise DataError(f"{where}: a 'text' row cannot have an image; write it as 'messages'")
        return record
    _check_messages(record.get("messages"), where)
    record["messages"] = _with_image_marks(record["messages"], len(images), where)
    return record


def _llava_message(turn):
    """A turn of 'conversations' as a message. The role '?' makes _check_messages refuse what is no turn."""
    if not isinstance(turn, dict):
        return {"role": "?", "content": turn}
    who = str(turn.get("from") or turn.get("role"))
    role = {"human": "user", "gpt": "assistant"}.get(who, who)
    return {"role": role, "content": turn.get("value", turn.get("content"))}


def _check_messages(messages, where):
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: no messages; a record needs 'messages', 'conversations' or 'text'")
    for m in messages:
        known = isinstance(m, dict) and m.get("role") in ("system", "user", "assistant")
        if not known or not isinstance(m.get("content"), str):
            needed = "role system, user or assistant and a string 'content'"
            raise DataError(f"{where}: a message needs {needed}, this is {str(m)[:80]}")


def _with_image_marks(messages, images, where):
    """The messages with one <image> mark for each image. Without any mark the images come before the first question."""
    marks = sum(m["content"].count("<image>") for m in messages)
    if images and not marks:
        first = next((k for k, m in enumerate(messages) if m["role"] == "user"), None)
        if first is None:
            raise DataError(f"{where}: has an image but no user message to put it in")
        marked = messages[first] | {"content": "<image>" * images + messages[first]["content"]}
        return [*messages[:first], marked, *messages[first + 1 :]]
    if marks != images:
        raise DataError(f"{where}: {marks} <image> marks but {images} images; make them equal")
    return messages


class Records:
    """A file of records, read row by row when asked: a corpus of any size costs 16 bytes a row, its place and its size.

    sizes: bytes of each row on disk (characters, in a JSON array): what is known of its length without reading it."""

    def __init__(self, path, limit=None):
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path}: no such file; `python tiny/world.py` writes the default data")
        if self.path.suffix == ".json":
            self.rows = self._array()[:limit]
            self.sizes = np.array([len(str(row)) for row in self.rows])
        else:
            self.rows = None
            bounds = self._line_bounds()
            self.offsets, self.sizes = bounds[:-1][:limit], np.diff(bounds)[:limit]
        if not len(self):
            raise DataError(f"{path}: holds no record")

    def _array(self):
        try:
            rows = json.loads(self.path.read_bytes())
        except ValueError as e:  # bad JSON or bad UTF-8
            raise DataError(f"{self.path}: not JSON ({e}); JSON Lines files must end in .jsonl") from None
        if not isinstance(rows, list):
            raise DataError(f"{self.path}: must hold a JSON array of records")
        return rows

    def _line_bounds(self):
        """-> int64: where each line that is not blank begins, and the end of the file."""
        offset, starts = 0, []
        with open(self.path, "rb") as f:
            for line in f:
                if line.strip():
                    starts.append(offset)
                offset += len(line)
        return np.array([*starts, offset], dtype=np.int64)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        where = f"{self.path}, row {i + 1}"
        record = normalise(self._line(i, where) if self.rows is None else self.rows[i], where)
        record["images"] = [str(self.path.parent / p) for p in record["images"]]
        return record | {"where": where}

    def _line(self, i, where):
        with open(self.path, "rb") as f:
            f.seek(self.offsets[i])
            try:
                return json.loads(f.readline())
            except ValueError as e:  # bad JSON or bad UTF-8
                raise DataError(f"{where}: not JSON ({e})") from None


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
    pixels and grids: those of all rows one after the other, None if no row has an image."""

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
        tensors = {k: v for k, v in vars(self).items() if torch.is_tensor(v)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors.items()})


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
        added = self.tokenizer.added_tokens_decoder  # the control tokens, beside the words
        self.special = set(self.tokenizer.all_special_tokens) | {t.content for t in added.values()}
        # Generation never samples a control token. An image or vision token announces pixels that are not there, and
        # the next forward pass would break. <|im_start|> and the like would open a new turn inside the answer. The
        # rest (padding, tool calls, ...) is no word that an answer could contain. Only EOS stays: it ends the answer.
        self.never_sampled = sorted(set(added) - {self.eos_id})

    def example(self, record, prompt_only=False, pixels=None):
        """-> Example. With prompt_only, everything up to the last answer, ready to generate it.
        pixels: (pixels, grids) where the caller has them already; else the record's images are opened.

        Raises DataError if an image does not open, the text holds a control token, or (prompt_only) it is too long."""
        where = record.get("where", record.get("id", "record"))
        for text in [record["text"]] if "text" in record else [m["content"] for m in record["messages"]]:
            if any(s in text for s in self.special):
                raise DataError(f"{where}: the text holds a control token of the tokenizer; remove it")
        pixels, grids = pixels or self._pixels(record["images"], where)
        image_tokens = [] if grids is None else (grids.prod(-1) // self.images.merge_size**2).tolist()
        ids, response = self._tokens(self._pieces(record, prompt_only, where), image_tokens)
        limit = self.max_length
        if prompt_only and len(ids) > limit:
            raise DataError(
                f"{where}: the prompt has {len(ids)} tokens, the limit is {limit}; shorten it or raise the limit"
            )
        ids, response = ids[:limit], response[:limit]
        if (ids == self.image_id).sum() != sum(image_tokens):
            raise DataError(
                f"{where}: {limit} tokens are too few for its images; raise --max-length or lower --max-pixels"
            )
        if not prompt_only:
            # an image is never learnt, not even inside an answer: it is no token that is ever sampled
            response = (response | (self.loss_on == "all")) & ~np.isin(ids, list(self.vision_ids))
            if not response[1:].any():  # no state stands before the first token to predict it
                raise DataError(
                    f"{where}: no answer to learn within {limit} tokens; raise --max-length or drop the record"
                )
        return Example(ids, response, pixels, grids, record)

    def _tokens(self, pieces, image_tokens):
        """[(text, is it a response)], tokens of each image -> ids (T,) int64, response (T,) bool.

        The chat template writes one image token for an image; the VLM wants as many as it has merged patches."""
        ids, response, counts = [], [], iter(image_tokens)
        for text, learnt in pieces:
            for k, part in enumerate(text.split(self.image_token)):
                new = [self.image_id] * next(counts) if k else []
                new += self.tokenizer(part, add_special_tokens=False)["input_ids"]
                ids += new
                response += [learnt] * len(new)
        return np.array(ids), np.array(response, dtype=bool)

    def _pixels(self, paths, where):
        if not paths:
            return None, None
        errors = OSError, SyntaxError, ValueError, Image.DecompressionBombError  # of PIL and the processor
        try:
            images = [Image.open(p).convert("RGB") for p in paths]
            out = self.images(images=images, return_tensors="pt")
        except errors as e:
            raise DataError(f"{where}: an image does not open ({e}); fix the path or drop the record") from None
        return out["pixel_values"], out["image_grid_thw"]

    def _pieces(self, record, prompt_only, where):
        """Yield (text, is it a response), rendered by the checkpoint's own chat template; a response ends with EOS."""
        if "text" in record:
            if prompt_only:
                yield record["text"], False
            else:
                yield record["text"] + self.eos, True
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
        """Text with <image> marks -> the list of parts that chat templates take; other text as it is."""
        pieces = text.split("<image>")
        if len(pieces) == 1:
            return text
        parts = []
        for k, piece in enumerate(pieces):
            if k:
                parts.append({"type": "image"})
            if piece:
                parts.append({"type": "text", "text": piece})
        return parts

    def _render(self, messages, generate):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)

    def collate(self, examples, left=False):
        """Examples -> Batch padded to its longest row; `left` for generation."""
        B, T = len(examples), max(len(e.ids) for e in examples)
        ids_BT = torch.full((B, T), self.pad_id)
        mask_BT, response_BT = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
        for b, e in enumerate(examples):
            at = slice(T - len(e.ids), T) if left else slice(0, len(e.ids))
            ids_BT[b, at], response_BT[b, at] = torch.from_numpy(e.ids), torch.from_numpy(e.response)
            mask_BT[b, at] = True
        images_B = torch.tensor([0 if e.grids is None else len(e.grids) for e in examples])
        pictures = [e for e in examples if e.pixels is not None]
        pixels = torch.cat([e.pixels for e in pictures]) if pictures else None
        grids = torch.cat([e.grids for e in pictures]) if pictures else None
        return Batch(ids_BT, mask_BT, response_BT, images_B, pixels, grids, [e.record for e in examples])

    def text_view(self, batch):
        """The same dialogues with the images left out, and how their tokens line up.

        -> (Batch (B, S) without image tokens, index_BS: position in `batch` of each text token, after_BS bool: text
        tokens behind the row's first image). The shorter rows have positions, masks and responses of their own. Tokens
        before the image do not count in L_t2vt and L_vt2t: there e^VT = e^T by causality."""
        vision_ids = torch.tensor(sorted(self.vision_ids), device=batch.ids_BT.device)
        keep_BT = batch.mask_BT & ~torch.isin(batch.ids_BT, vision_ids)
        longest = int(keep_BT.sum(1).max())
        index_BS = torch.argsort(~keep_BT, dim=1, stable=True)[:, :longest]  # kept tokens first, in order
        real_BS = keep_BT.gather(1, index_BS)
        seen_BT = (batch.ids_BT == self.image_id).cumsum(1) > 0
        ids_BS = batch.ids_BT.gather(1, index_BS).masked_fill(~real_BS, self.pad_id)
        response_BS = batch.response_BT.gather(1, index_BS) & real_BS
        view = Batch(ids_BS, real_BS, response_BS, torch.zeros_like(batch.images_B), None, None, batch.records)
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
    """Row numbers forever, `size` at a time of about the same length, so that a batch has little padding.

    `window` batches are drawn at once. Their rows are sorted by their size on disk and cut into batches, and those come
    in random order: sorted batches would make training go from short texts to long ones again and again."""
    first, skip = divmod(start, window * size)
    stream = index_stream(len(records), seed, first * window * size)
    for k in itertools.count(first):
        drawn = np.array([next(stream) for _ in range(window * size)])
        drawn = drawn[np.argsort(records.sizes[drawn], kind="stable")].reshape(window, size)
        yield from np.random.default_rng([seed, k, 1]).permutation(drawn).flatten()[skip:]
        skip = 0


def batches(records, processor, size, seed, start=0, rank=0, world=1, refused=None):
    """Yield Batches of `size` rows of similar length for rank `rank` of `world`, forever.

    start: rows drawn so far by all ranks together. A row that cannot be used is replaced by the next one of the file
    that can, and its reason goes into the set `refused` (without a set it is raised). Which row stands in depends on
    the row alone, so that resume and ranks change nothing."""
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
