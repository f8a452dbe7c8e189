"""Packed text: documents as token ids on disk, read one at a time. convert/pack.py writes them.

    FOLDER/NAME.tokens    uint32, little-endian: the ids of all documents of a source file, each with EOS behind it
    FOLDER/NAME.starts    uint64, little-endian: where each document begins, in tokens, and the end of the last
    FOLDER/NAME.json      what this shard was made of
    FOLDER/index.json     {"tokenizer": its hash, "shards": [[name, documents, tokens], ...]}, written last

A row is a document. Of one that is longer than --max-length a window is read, at an offset that is drawn each time. A
window never reaches into another document. Nothing is held in memory but 24 bytes a shard: a document costs a read of
16 bytes and one of its window. np.memmap reads the files as well, but its pages would count as the process's own."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

import common
from data import noise
from records import DataError

TOKEN, START = np.dtype("<u4"), np.dtype("<u8")


def tokenizer_hash(tokenizer):
    """-> hex digest over all that decides which ids a text becomes: vocabulary, merges, rules, and the id of EOS."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {k: v for k, v in rules.items() if k not in ("truncation", "padding")}  # of the last call
    return hashlib.sha256(f"{json.dumps(rules, sort_keys=True)} {tokenizer.eos_token_id}".encode()).hexdigest()


def open_text(path, cfg, processor, limit=None):
    """-> the Shards of a folder, or the Records of a file, of which at most `limit` rows count."""
    if not os.path.isdir(path):
        return common.open_records(path, cfg, limit)
    return Shards(path, processor).only(slice(0, limit))


class Shards:
    """Packed text in the place of Records. DataError if the folder is none, is unfinished or of another tokenizer."""

    def __init__(self, folder, processor):
        self.path, self.limit, self.known = Path(folder), processor.max_length, len(processor.tokenizer)
        try:
            index = json.loads((self.path / "index.json").read_bytes())
            self.names = [name for name, _, _ in index["shards"]]
            documents = np.array([n for _, n, _ in index["shards"]], dtype=np.int64)
        except FileNotFoundError:
            cure = "finish it with the same `python -m convert.pack`"
            raise DataError(f"{folder}: no packed text (it has no index.json); {cure}") from None
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(f"{folder}/index.json: cannot be used ({e}); pack the text again") from None
        if index["tokenizer"] != tokenizer_hash(processor.tokenizer):
            raise DataError(f"{folder}: was packed with another tokenizer than that of --vlm; pack the text again")
        self.before = np.concatenate([[0], np.cumsum(documents)])  # documents in earlier shards
        self.numbers = range(int(self.before[-1]))
        if not len(self):
            raise DataError(f"{folder}: holds no document")

    def only(self, rows):
        """-> these Shards with no rows but the given ones: a slice, or an array of row numbers."""
        part = object.__new__(Shards)
        part.__dict__ |= self.__dict__
        part.numbers = self.numbers[rows] if isinstance(rows, slice) else [self.numbers[i] for i in rows]
        return part

    def __len__(self):
        return len(self.numbers)

    def sizes_of(self, rows):
        """-> int64: how many tokens of each of these rows are read at most."""
        return np.array([min(self.limit, self._place(int(i))[2]) for i in rows])

    def __getitem__(self, i):
        """-> row i from its document's first token on."""
        return self._record(i, 0.0)

    def drawn(self, i, draw):
        """-> row i, a window of it at an offset that depends on `draw`, a tuple of integers from 0, alone."""
        return self._record(i, float(noise((*draw, 1), 1)))

    def _record(self, i, u):
        """-> {"id", "where", "images", "ids": int64, the window at the share u of all its places}."""
        name, first, size = self._place(i)
        offset = int(u * (max(0, size - self.limit) + 1))
        ids = self._read(f"{name}.tokens", TOKEN, first + offset, min(size, self.limit))
        where = f"{self.path / name}, document {self.numbers[i] + 1} of the folder"
        if ids.max() >= self.known:
            raise DataError(f"{where}: its ids are none of the tokenizer's; delete the shard and pack the text again")
        return {"id": self.numbers[i], "where": where, "images": [], "ids": ids.astype(np.int64)}

    def _place(self, i):
        """-> (shard's name, the first token of row i there, its tokens)."""
        k = int(np.searchsorted(self.before, self.numbers[i], side="right")) - 1
        found = self._read(f"{self.names[k]}.starts", START, int(self.numbers[i] - self.before[k]), 2)
        if found[0] >= found[1]:  # a document has an EOS at least
            raise DataError(f"{self.path / self.names[k]}.starts: is damaged; delete it and pack the text again")
        return self.names[k], int(found[0]), int(found[1] - found[0])

    def _read(self, name, dtype, first, count):
        try:
            found = np.fromfile(self.path / name, dtype, count, offset=first * dtype.itemsize)
        except OSError as e:
            raise DataError(f"{self.path / name}: cannot be read ({e.strerror})") from None
        if len(found) < count:
            raise DataError(f"{self.path / name}: is cut off; delete it and pack the text again")
        return found
