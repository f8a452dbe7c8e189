"""Files of records: a row -> a record, or DataError with the reason. docs/data.md has the rules in words.

Files are JSON Lines or JSON arrays. A record is a dict {"id", "images": [paths], "messages": [{"role", "content"}]}.
Text-only records have no images. A row may be {"text": ...} instead, an image with its {"caption": ...}, or LLaVA- and
ShareGPT-style {"image", "system", "conversations": [{"from", "value"}]}. `<image>` in a message marks an image's place.
Other fields ("facts" of the tiny world, "character" of MMRole) are kept for the judge."""

import copy
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROW_BYTES = 2**20  # longest row of a file; a stage reads a few thousand tokens of it at most
DEPTH = 20  # objects and arrays inside each other
OWN_FIELDS = ("id", "text", "messages", "conversations", "image", "images")  # the others are the judge's
DESCRIBE = "Describe the image."  # the question to a caption
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # in 'conversations'; others keep their name


class DataError(ValueError):
    """Bad input; the message names the file, the row and the cure. The scripts print it without a traceback."""


# --------------------------------------------------------------------------------------------------------- rows
def parse(data, where):
    """Bytes -> the JSON value in them. UTF-8 alone, with or without the mark (BOM) that Windows puts in front."""
    try:
        return json.loads(str(data, "utf-8-sig"))
    except ValueError as e:  # bad JSON or bad UTF-8
        raise DataError(f"{where}: not JSON ({e})") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply to be read; make it flat") from None


def check_values(value, where):
    """Refuse what JSON allows and no later step can use: deep nesting, and text that cannot be written as UTF-8.

    Python's own repr, copy and json.dumps end in RecursionError at a depth that varies with the caller's."""
    level = [value]
    for _ in range(DEPTH + 1):
        below = []
        for x in level:
            if isinstance(x, dict):
                below += [*x, *x.values()]
            elif isinstance(x, list):
                below += x
            elif isinstance(x, str) and not x.isascii():
                _check_text(x, where)
        level = below
        if not level:
            return
    raise DataError(f"{where}: nested more than {DEPTH} levels deep; make it flat")


def _check_text(text, where):
    try:
        text.encode()
    except UnicodeEncodeError as e:
        found = f"\\u{ord(text[e.start]):04x}"
        raise DataError(f"{where}: holds {found}, half of a character (a lone surrogate); repair the text") from None


def normalise(row, where):
    """One row in any of the forms above -> {"id", "images", "messages" or "text", ...}; raises DataError.

    A field of ours that is null, blank or an empty list counts as absent: tables written as JSON fill their columns."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a record must be a JSON object, this is a {type(row).__name__}")
    check_values(row, where)
    record = {k: v for k, v in row.items() if k not in OWN_FIELDS or not _is_empty(v)}
    if isinstance(record.get("id"), (dict, list, bool)):
        raise DataError(f"{where}: 'id' must be a string or a number, this is {str(record['id'])[:80]}")
    for group in (("text", "messages", "conversations"), ("image", "images")):
        given = [k for k in group if k in record]
        if len(given) > 1:
            raise DataError(f"{where}: has both '{given[0]}' and '{given[1]}'; keep the one that is to be used")
    images = record.pop("image", record.pop("images", []))
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(p, str) for p in images):
        raise DataError(f"{where}: 'images' must be a list of paths, this is {str(images)[:80]}")
    record["images"] = images
    if "text" in record:
        _check_plain_text(record, where)
        return record
    conversations = record.pop("conversations", None)
    if isinstance(conversations, list):
        record["messages"] = [*_system(record), *map(_llava_message, conversations)]
    if "messages" not in record and isinstance(record.get("caption"), str):
        record["messages"] = _caption(record.pop("caption"), images, where)
    _check_messages(record.get("messages"), where)
    messages = [{"role": m["role"], "content": m["content"]} for m in record["messages"]]
    record["messages"] = _with_image_marks(messages, len(images), where)
    return record


def _is_empty(value):
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _check_plain_text(record, where):
    if not isinstance(record["text"], str):
        raise DataError(f"{where}: 'text' must be a string, this is {str(record['text'])[:80]}")
    if record["images"]:
        raise DataError(f"{where}: a 'text' row cannot have an image; write it as 'messages'")


def _caption(text, images, where):
    """An image's caption as a dialogue."""
    if not images:
        raise DataError(f"{where}: a caption without an image; give its path as 'image'")
    return [{"role": "user", "content": DESCRIBE}, {"role": "assistant", "content": text.replace("<image>", "")}]


def _system(record):
    """The system message of a ShareGPT-style row, which some keep in a field of its own -> [message] or []."""
    text = record.pop("system", None)
    return [] if _is_empty(text) else [{"role": "system", "content": text}]


def _llava_message(turn):
    """A turn of 'conversations' as a message. The role '?' makes _check_messages refuse what is no turn."""
    if not isinstance(turn, dict):
        return {"role": "?", "content": turn}
    who = str(turn.get("from") or turn.get("role"))
    return {"role": ROLES.get(who, who), "content": turn.get("value", turn.get("content"))}


def _check_messages(messages, where):
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: no messages; a record needs 'messages', 'conversations', 'text' or 'caption'")
    for m in messages:
        role = m.get("role") if isinstance(m, dict) else None
        if role not in ["system", "user", "assistant"] or not isinstance(m.get("content"), str):
            needed = "role system, user or assistant and a string 'content'"
            raise DataError(f"{where}: a message needs {needed}, this is {str(m)[:80]}")
        if role == "assistant" and not m["content"].strip():
            raise DataError(f"{where}: an answer is empty; there is nothing to learn or to compare with")
    if messages[0]["role"] == "assistant":
        raise DataError(f"{where}: the assistant speaks first; put the user's or the system's message before it")


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


# ------------------------------------------------------------------------------------------------------- reasons
def refusals(path, rows, reasons):
    """Text for the console: how many of `rows` rows of a file are refused, and the first three kinds of reasons.

    reasons: messages of DataError, 'path, row n: why'. Empty text without any."""
    kinds = {}  # numbers and what stands in brackets differ from row to row
    for reason in sorted(reasons, key=_row_number):
        why = reason.removeprefix(f"{path}, ")
        kinds.setdefault(re.sub(r"row \d+|\(.*|\d+", "", why), []).append(why)
    if not kinds:
        return ""
    lines = [f"{path}: {len(set(reasons))} of {rows} rows cannot be used"]
    for same in list(kinds.values())[:3]:
        lines.append(f"  {same[0]}" + (f" (and {len(same) - 1} rows for such a reason)" if len(same) > 1 else ""))
    if len(kinds) > 3:
        lines.append(f"  other kinds of reasons: {len(kinds) - 3}")
    return "\n".join(lines)


def _row_number(reason):
    found = re.search(r", row (\d+): ", reason)
    return int(found[1]) if found else 0


# -------------------------------------------------------------------------------------------------------- files
class Records:
    """A file of records, read row by row when asked: a corpus of any size costs 24 bytes a row, its number, its place
    and its size.

    sizes: bytes of each row on disk (characters, in a JSON array): what is known of its length without reading it.
    allow_outside: take images that lie outside the folder of the file. A downloaded file should not name what else is
    on this machine: '../..', an absolute path or a link that leads out is refused without it."""

    def __init__(self, path, limit=None, allow_outside=False):
        self.path, self.allow_outside = Path(path), allow_outside
        self.folder = os.path.join(os.path.realpath(self.path.parent), "")
        if not os.path.isfile(self.path):
            raise DataError(f"{path}: no such file; `python tiny/world.py` writes the default data")
        try:
            if self.path.suffix == ".json":
                self.rows = self._array()
                self.sizes = np.array([len(str(row)) for row in self.rows])[:limit]
            else:
                self.rows = None
                self.offsets = self._line_bounds()
                self.sizes = np.diff(self.offsets)[:limit]
        except OSError as e:
            raise DataError(f"{path}: cannot be read ({e.strerror})") from None
        self.numbers = np.arange(len(self.sizes))
        if not len(self):
            raise DataError(f"{path}: holds no record")

    def only(self, rows):
        """-> these Records with no rows but the given ones (an array of row numbers, from 0). Their names stay."""
        part = copy.copy(self)
        part.numbers, part.sizes = self.numbers[rows], self.sizes[rows]
        return part

    def _array(self):
        try:
            rows = parse(self.path.read_bytes(), self.path)
        except DataError as e:
            raise DataError(f"{e}; JSON Lines files must end in .jsonl") from None
        if not isinstance(rows, list):
            raise DataError(f"{self.path}: must hold a JSON array of records")
        return rows

    def _line_bounds(self):
        """-> int64: where each line that is not blank begins, and the end of the file. No line is held whole."""
        offset, starts, within = 0, [], False
        with open(self.path, "rb", buffering=ROW_BYTES) as f:
            while piece := f.readline(ROW_BYTES):
                if not within and piece.strip():
                    starts.append(offset)
                    within = True
                within = within and not piece.endswith(b"\n")
                offset += len(piece)
        return np.array([*starts, offset], dtype=np.int64)

    def __len__(self):
        return len(self.sizes)

    def sizes_of(self, rows):
        """-> the sizes of these rows, an array of row numbers: what `index_batches` sorts by."""
        return self.sizes[rows]

    def drawn(self, i, draw):
        """-> row i. Nothing in it is drawn, as in packed text (shards.py)."""
        return self[i]

    def __getitem__(self, i):
        n = self.numbers[i]
        where = f"{self.path}, row {n + 1}"
        if self.sizes[i] > ROW_BYTES:
            raise DataError(f"{where}: longer than {ROW_BYTES} bytes; cut it into shorter rows")
        record = normalise(self._line(n, where) if self.rows is None else self.rows[n], where)
        record["images"] = [self._image(p, where) for p in record["images"]]
        return record | {"where": where}

    def _line(self, n, where):
        try:
            with open(self.path, "rb") as f:
                f.seek(self.offsets[n])
                return parse(f.readline(ROW_BYTES), where)
        except OSError as e:
            raise DataError(f"{where}: cannot be read ({e.strerror})") from None

    def _image(self, name, where):
        """-> the path of an image, relative to the folder of the file."""
        path = str(self.path.parent / name)
        if not self.allow_outside:
            try:
                outside = not os.path.realpath(path).startswith(self.folder)
            except (OSError, ValueError) as e:
                raise DataError(f"{where}: an image has no possible path ({e})") from None
            if outside:
                cure = "move it there, or allow it with --allow-outside"
                raise DataError(f"{where}: the image {name[:200]} lies outside the folder of the file; {cure}")
        return path


# --------------------------------------------------------------------------------------------- before the first step
@dataclass
class Scan:
    """What a look at the rows of a file found. usable: int64 row numbers (from 0). refused: {row number: reason}."""

    path: Path
    usable: np.ndarray
    refused: dict

    def __str__(self):
        """For the console: how many rows are refused, and the first three kinds of reasons. Empty without any."""
        return refusals(self.path, len(self.usable) + len(self.refused), self.refused.values())


def scan(records, processor, prompt_only=False, rows=None, decode=False, strict=False, also=None):
    """Read rows before a run needs them -> Scan. rows: numbers from 0; all by default.

    Each row is read, checked, rendered and tokenised; of its images the header is read. decode: decode them as well,
    where nothing may stand in for a row later on. strict: raise the first DataError. also: a function of a record that
    raises a DataError where something else is wrong with it."""
    usable, refused = [], {}
    for i in range(len(records)) if rows is None else rows:
        try:
            record = records[i]
            (processor.example if decode else processor.check)(record, prompt_only)
            if also:
                also(record)
            usable.append(i)
        except DataError as e:
            if strict:
                raise
            refused[int(i)] = str(e)
    return Scan(records.path, np.array(usable, dtype=np.int64), refused)
