"""Records on disk -> token batches with images.

The order of work:
    Records            a file, indexed; a row is read and checked when it is asked for (records.py)
    scan               which rows can be used, read before a run needs them (records.py)
    Processor.example  a record -> token ids, which of them are to be learnt, pixels
    Processor.collate  examples -> a padded Batch
    index_batches      the order of the rows. It depends on (seed, epoch) alone, so that a resumed run and any number
                       of ranks see the same data
    batches            Batches forever (loader.py)

Letters in names: B rows of a batch, T tokens, S tokens without those of the image."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import numpy as np
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

import pictures
from records import DataError
from records import Records as Records  # `data` is where everybody takes them from
from records import scan as scan
from shuffle import index_stream as index_stream


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
    pixels and grids: those of all rows one after the other, None if no row has an image. draws: a tuple of integers
    for each row, which its noise depends on."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    response_BT: torch.Tensor
    images_B: torch.Tensor
    pixels: torch.Tensor | None
    grids: torch.Tensor | None
    records: list
    draws: list

    @property
    def paired_B(self):
        """bool, True where the row has an image."""
        return self.images_B > 0

    @property
    def padded(self):
        """Does any row have padding? (Waits for the device.)"""
        return not bool(self.mask_BT.all())

    @property
    def explained_BT(self):
        """bool (B, T-1), True at t where token t+1 is to be learnt: it is explained by what stands before it."""
        return self.response_BT[:, 1:]

    def uniforms(self, width):
        """(M, width) float32 in [0, 1), for the M explained tokens in the order of their rows.

        A row's numbers depend on its draw and on its own tokens alone: not on the rank, the padding, the device, the
        other rows of the batch, or where a run was interrupted."""
        counts = self.explained_BT.sum(1).tolist()
        drawn = [noise(key, (n, width)) for key, n in zip(self.draws, counts, strict=True)]
        return torch.cat(drawn).to(self.ids_BT.device)

    def rows(self, part):
        """The rows `part` (a slice) with their images."""
        before, inside = int(self.images_B[: part.start].sum()), int(self.images_B[part].sum())
        pixels = grids = None
        if inside:
            patches = self.grids.prod(-1)
            first, count = int(patches[:before].sum()), int(patches[before : before + inside].sum())
            pixels, grids = self.pixels[first : first + count], self.grids[before : before + inside]
        ids, mask, response = self.ids_BT[part], self.mask_BT[part], self.response_BT[part]
        return Batch(ids, mask, response, self.images_B[part], pixels, grids, self.records[part], self.draws[part])

    def to(self, device):
        tensors = {k: v for k, v in vars(self).items() if torch.is_tensor(v)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors.items()})


KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # model types that tests/test_other_vlm.py has tried


def check_type(name, config):
    """Refuse a model of a type that was never tried: it would fail in the middle of a run, or be wrong in silence."""
    if config.model_type not in KINDS:
        known = ", ".join(KINDS)
        raise DataError(f"--vlm {name}: its model type is '{config.model_type}'; the types that work are {known}")


def _name(record):
    """What a message calls a record: its file and row, if it came from a file."""
    return record.get("where", record.get("id", "record"))


def find(name, flag="--vlm"):
    """Refuse what looks like a path and is none: it must never be looked up on the hub. -> the name."""
    path = Path(name)
    beside_files = path.parent != Path() and path.parent.is_dir()
    if path.is_file():
        raise DataError(f"{flag} {name}: is a file; give the folder of the checkpoint")
    if not path.exists() and (path.is_absolute() or str(name).startswith((".", "~")) or beside_files):
        raise DataError(f"{flag} {name}: no such folder")
    return name


class Processor:
    """Tokenizer + image processor of a checkpoint: records -> Examples -> Batches."""

    def __init__(self, vlm, max_length=512, max_pixels=280 * 420, loss_on="response", max_decode=pictures.MAX_DECODE):
        """max_length: tokens. max_pixels: of an image, as the VLM gets it. max_decode: pixels of its file, at most.
        loss_on: 'response' (the paper's L_inverse, without the release's prompt tokens) or 'all' text."""
        size = {"shortest_edge": 28 * 28, "longest_edge": max_pixels}
        try:
            self.config = AutoConfig.from_pretrained(find(vlm), trust_remote_code=False)
            check_type(vlm, self.config)
            self.tokenizer = AutoTokenizer.from_pretrained(vlm, trust_remote_code=False)
            self.images = AutoImageProcessor.from_pretrained(vlm, size=size, trust_remote_code=False)
        except DataError:
            raise
        except Exception as e:  # whatever a broken folder makes the library raise
            reason = str(e).strip().partition("\n")[0][:200]
            raise DataError(f"--vlm {vlm}: its config, tokenizer or image processor does not load ({reason})") from None
        if not self.tokenizer.chat_template:
            raise DataError(f"--vlm {vlm}: its tokenizer has no chat template; give a checkpoint that can chat")
        self.max_length, self.max_pixels, self.max_decode, self.loss_on = max_length, max_pixels, max_decode, loss_on
        names = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
        self.image_id, *around = [self._own_token(vlm, name) for name in names]
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_id)
        self.vision_ids = {self.image_id, *around}
        self.eos, self.eos_id = self.tokenizer.eos_token, self.tokenizer.eos_token_id
        self.pad_id = self.tokenizer.pad_token_id
        added = self.tokenizer.added_tokens_decoder  # the control tokens, beside the words
        self.special = set(self.tokenizer.all_special_tokens) | {t.content for t in added.values()}
        # Generation never samples a control token. An image or vision token announces pixels that are not there, and
        # the next forward pass would break. <|im_start|> and the like would open a new turn inside the answer. The
        # rest (padding, tool calls, ...) is no word that an answer could contain. Only EOS stays: it ends the answer.
        # Nor ids at and above the tokenizer's size, which fill up the vocabulary and have no text.
        unused = range(len(self.tokenizer), self.config.get_text_config().vocab_size)
        self.never_sampled = sorted((set(added) | set(unused)) - {self.eos_id})

    def _own_token(self, vlm, name):
        """-> an id that the configuration names. DataError if there is none, or none of the tokenizer."""
        found = getattr(self.config, name, None)
        if not isinstance(found, int) or not 0 <= found < len(self.tokenizer):
            why = f"config.json has no {name} that its tokenizer knows ({found})"
            raise DataError(f"--vlm {vlm}: {why}; give a checkpoint of Qwen2.5-VL's kind")
        return found

    def example(self, record, prompt_only=False, pixels=None):
        """-> Example. With prompt_only, everything up to the last answer, ready to generate it.
        pixels: (pixels, grids) where the caller has them already; else the record's images are opened.

        Raises DataError if an image does not open, the text holds a control token, or (prompt_only) it is too long."""
        where = _name(record)
        pixels, grids = pixels or self._pixels(record["images"], where)
        image_tokens = [] if grids is None else (grids.prod(-1) // self.images.merge_size**2).tolist()
        ids, response = self._encode(record, prompt_only, image_tokens, where)
        return Example(ids, response, pixels, grids, record)

    def check(self, record, prompt_only=False):
        """Raise what `example` would raise, with no more than the header of each image read."""
        where = _name(record)
        self._encode(record, prompt_only, self._image_tokens(record["images"], where), where)

    def _encode(self, record, prompt_only, image_tokens, where):
        """-> ids (T,) int64, response (T,) bool. image_tokens: how many each image takes."""
        if "ids" in record:  # packed text: it was looked at when it was packed
            return record["ids"], np.ones(len(record["ids"]), dtype=bool)
        for text in [record["text"]] if "text" in record else [m["content"] for m in record["messages"]]:
            if any(s in text for s in self.special):
                raise DataError(f"{where}: the text holds a control token of the tokenizer; remove it")
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
        return ids, response

    def _tokens(self, pieces, image_tokens):
        """[(text, is it a response)], tokens of each image -> ids (T,) int64, response (T,) bool.

        The chat template writes one image token for an image; the VLM wants as many as it has merged patches."""
        ids, response, counts = [], [], iter(image_tokens)
        for text, learnt in pieces:
            if len(ids) > self.max_length:  # enough to refuse or to cut; the pieces of n turns cost n * n to render
                break
            for k, part in enumerate(text.split(self.image_token)):
                new = [self.image_id] * next(counts) if k else []
                new += self.tokenizer(part, add_special_tokens=False)["input_ids"]
                ids += new
                response += [learnt] * len(new)
        return np.array(ids), np.array(response, dtype=bool)

    def _pixels(self, paths, where):
        """-> (patches, channels) float32 of all images, and their grids (images, 3); None and None without images."""
        if not paths:
            return None, None
        self._check_number(paths, where)
        try:
            images = [pictures.load(p, self.max_decode, self.max_pixels) for p in paths]
            out = self.images(images=images, return_tensors="pt")
        except ValueError as e:  # PictureError, or the processor's about a side 200 times the other
            raise DataError(f"{where}: an image does not open ({e}); fix the path or drop the record") from None
        return out["pixel_values"], out["image_grid_thw"]

    def _image_tokens(self, paths, where):
        """-> how many tokens each image will take, by the size in its header."""
        self._check_number(paths, where)
        try:
            sizes = [pictures.size(p, self.max_decode, self.max_pixels) for p in paths]
            patches = [self.images.get_number_of_image_patches(height, width) for width, height in sizes]
        except ValueError as e:
            raise DataError(f"{where}: an image does not open ({e}); fix the path or drop the record") from None
        return [n // self.images.merge_size**2 for n in patches]

    def _check_number(self, paths, where):
        """Each image takes a token at least. To decode ten thousand of them first would take all memory."""
        if len(paths) > self.max_length:
            raise DataError(f"{where}: {len(paths)} images, the limit is {self.max_length} tokens; drop the record")

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
            prompt = self._render(messages[:k], True, where)
            if prompt_only and k == answers[-1]:
                yield prompt[done:], False
                return
            full = self._render(messages[: k + 1], False, where)
            end = full.find(self.eos, len(prompt))
            if end < 0 or not full.startswith(prompt):
                raise DataError(f"{where}: the chat template does not extend its own prefix; drop the record")
            end += len(self.eos)
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

    def _render(self, messages, generate, where):
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except jinja2.TemplateError as e:  # many templates refuse two turns of one speaker in a row
            raise DataError(f"{where}: the chat template refuses this dialogue ({e})") from None

    def collate(self, examples, left=False, draws=None):
        """Examples -> Batch padded to its longest row; `left` for generation. draws: by default the rows' numbers."""
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
        draws, records = draws or [(b,) for b in range(B)], [e.record for e in examples]
        return Batch(ids_BT, mask_BT, response_BT, images_B, pixels, grids, records, draws)

    def behind_image(self, batch):
        """-> bool (B, T), True at text tokens behind their row's first image: where the image can matter."""
        seen_BT = (batch.ids_BT == self.image_id).cumsum(1) > 0
        return seen_BT & self._is_text(batch)

    def _is_text(self, batch):
        """-> bool (B, T), True at real tokens that are none of an image."""
        vision_ids = torch.tensor(sorted(self.vision_ids), device=batch.ids_BT.device)
        return batch.mask_BT & ~torch.isin(batch.ids_BT, vision_ids)

    def text_view(self, batch):
        """The same dialogues with the images left out, and how their tokens line up.

        -> (Batch (B, S) without image tokens, index_BS: position in `batch` of each text token, after_BS bool: text
        tokens behind the row's first image). The shorter rows have positions, masks and responses of their own. Tokens
        before the image do not count in L_t2vt and L_vt2t: there e^VT = e^T by causality."""
        keep_BT = self._is_text(batch)
        longest = int(keep_BT.sum(1).max())
        index_BS = torch.argsort(~keep_BT, dim=1, stable=True)[:, :longest]  # kept tokens first, in order
        real_BS = keep_BT.gather(1, index_BS)
        ids_BS = batch.ids_BT.gather(1, index_BS).masked_fill(~real_BS, self.pad_id)
        response_BS = batch.response_BT.gather(1, index_BS) & real_BS
        no_images_B = torch.zeros_like(batch.images_B)
        view = Batch(ids_BS, real_BS, response_BS, no_images_B, None, None, batch.records, batch.draws)
        return view, index_BS, self.behind_image(batch).gather(1, index_BS) & real_BS


# ------------------------------------------------------------------------------------------------------ samplers
def noise(key, shape):
    """float32 in [0, 1) of this shape, on the CPU; they depend on the key, a tuple of integers from 0, alone."""
    return torch.from_numpy(np.random.default_rng(key).random(shape, dtype=np.float32))


def uniforms(seed, rows, length):
    """(len(rows), length) numbers in [0, 1). Each row's depend on (seed, row) alone, never on the rank or the batch.

    rows: a tuple of integers for each row, e.g. (step, example, sample)."""
    return torch.stack([noise((seed, *row), length) for row in rows])


def index_batches(records, size, seed, start=0, window=16):
    """Row numbers forever, `size` at a time of about the same length, so that a batch has little padding.

    `window` batches are drawn at once. Their rows are sorted by their size on disk and cut into batches, and those come
    in random order: sorted batches would make training go from short texts to long ones again and again."""
    first, skip = divmod(start, window * size)
    stream = index_stream(len(records), seed, first * window * size)
    for k in itertools.count(first):
        drawn = np.array([next(stream) for _ in range(window * size)])
        drawn = drawn[np.argsort(records.sizes_of(drawn), kind="stable")].reshape(window, size)
        yield from np.random.default_rng([seed, k, 1]).permutation(drawn).flatten()[skip:]
        skip = 0
