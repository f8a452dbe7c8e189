"""Text corpora -> packed text, for stages 2 and 3 (--text FOLDER). shards.py says what the files hold.

    python -m convert.pack CORPUS --vlm Qwen/Qwen2.5-VL-3B-Instruct --out packed --processes 8

CORPUS is a file, or a folder with files at any depth: JSON Lines with `text` (.jsonl, .json.gz, .jsonl.gz: a row is a
document) and plain text (.txt, .txt.gz: a file is a document). Each file becomes a shard of its own, under its name.

A shard is written under another name, then renamed. The same command again goes on where it was cut off: a shard whose
file still has its size and time is not made again. Files are shared out over processes; no file is held in memory.

A row that is no document is left out: the console says how many, and the first three kinds of reasons. --strict yes
stops at the first instead."""

import argparse
import gzip
import json
import multiprocessing
import os
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from data import Processor
from records import DataError, normalise, parse, refusals
from shards import START, TOKEN, tokenizer_hash

LONGEST = 2**26  # bytes of a row, or of a plain file that has no line end
TOGETHER = 64  # documents that are tokenised at once
KEPT = 1000  # reasons of a file that are kept


def sources(corpus):
    """-> [(shard's name, path)] in the order of their names. DataError where there is nothing to pack."""
    corpus = Path(corpus)
    found = [corpus] if corpus.is_file() else sorted(p for p in corpus.rglob("*") if p.is_file())
    squeezed = next((p for p in found if p.suffix in (".zst", ".bz2", ".xz", ".parquet")), None)
    if squeezed:
        raise DataError(
            f"{squeezed}: cannot be read; turn it into JSON Lines first, plain or as .gz (zstd -d for .zst)"
        )
    text = [p for p in found if kind(p)]
    if not text:
        raise DataError(f"{corpus}: no text; give a .jsonl or .txt, plain or as .gz, or a folder with some")
    root = corpus.parent if corpus.is_file() else corpus
    return [(p.relative_to(root).as_posix(), p) for p in text]


def kind(path):
    """-> 'rows', 'plain' or ''"""
    name = path.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")) or path.name.endswith(".json.gz"):
        return "rows"
    return "plain" if name.endswith(".txt") else ""


def pieces(path):
    """Yield the lines of a file of rows, or about a MiB of plain text up to a line end: tokens that cross such a border
    are cut there. None is much longer than LONGEST. DataError where a .gz is torn."""
    before = 2**20 if kind(path) == "plain" else 0
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
        while True:
            try:
                line = f.read(before) + f.readline(LONGEST + 1)
            except (EOFError, gzip.BadGzipFile, zlib.error) as e:
                raise DataError(f"the .gz is torn ({e})") from None
            if not line:
                return
            yield line


def documents(path, refused, special):
    """Yield (is it the beginning of a document, text). refused: the list that takes the reasons."""
    n = 0
    try:
        for n, line in enumerate(pieces(path), 1):
            where = f"{path}, row {n}"
            try:
                if len(line) > LONGEST + 2**20:
                    raise DataError(f"{where}: longer than {LONGEST} bytes; cut it into shorter rows")
                if line.strip() or kind(path) == "plain":
                    text = row_text(line, where) if kind(path) == "rows" else plain_text(line, where)
                    if any(s in text for s in special):
                        raise DataError(f"{where}: the text holds a control token of the tokenizer; remove it")
                    yield n == 1 or kind(path) == "rows", text
            except DataError as e:
                refused.append(str(e))
    except DataError as e:
        refused.append(f"{path}, row {n + 1}: {e}; what stands before it is used")


def row_text(line, where):
    record = normalise(parse(line, where), where)
    if "text" not in record:
        raise DataError(f"{where}: has no 'text'; give dialogues to the stages as records")
    return record["text"]


def plain_text(line, where):
    try:
        return str(line, "utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: not UTF-8 ({e})") from None


class Writer:
    """The three files of a shard. They get their names when they are whole, the .json last."""

    def __init__(self, target, eos):
        self.target, self.eos, self.tokens, self.documents = target, eos, 0, 0
        target.parent.mkdir(parents=True, exist_ok=True)
        self.files = {end: open(f"{target}.{end}.new", "wb") for end in ("tokens", "starts")}
        self.open = False

    def add(self, begins, ids):
        if begins:
            self.end()
            np.array([self.tokens], START).tofile(self.files["starts"])
            self.documents, self.open = self.documents + 1, True
        self._put(ids)

    def end(self):
        """Put EOS behind the last document."""
        if self.open:
            self._put([self.eos])
        self.open = False

    def _put(self, ids):
        np.array(ids, TOKEN).tofile(self.files["tokens"])
        self.tokens += len(ids)

    def close(self, state):
        self.end()
        np.array([self.tokens], START).tofile(self.files["starts"])
        for end, file in self.files.items():
            file.close()
            os.replace(f"{self.target}.{end}.new", f"{self.target}.{end}")
        write_json(f"{self.target}.json", state | {"documents": self.documents, "tokens": self.tokens})


def write_json(path, value):
    Path(f"{path}.new").write_text(json.dumps(value, indent=1))
    os.replace(f"{path}.new", path)


processor = None  # of a process that packs


def begin(vlm):
    global processor
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what runs in parallel
    processor = Processor(vlm)


def made_of(path, tokenizer):
    found = path.stat()
    return {"size": found.st_size, "time": found.st_mtime_ns, "tokenizer": tokenizer}


def pack_file(path, target, state, strict):
    """Make the shard of a file -> its state."""
    refused, waiting = [], []
    writer = Writer(target, processor.eos_id)

    def flush():
        if waiting:
            found = processor.tokenizer([text for _, text in waiting], add_special_tokens=False)["input_ids"]
            for (begins, _), ids in zip(waiting, found):
                writer.add(begins or not writer.documents, ids)
        waiting.clear()

    for document in documents(path, refused, processor.special):
        if strict and refused:
            raise DataError(refused[0])
        waiting.append(document)
        if len(waiting) == TOGETHER or len(document[1]) > 2**20:
            flush()
    if strict and refused:
        raise DataError(refused[0])
    flush()
    writer.close(state | {"refused": len(refused), "reasons": refused[:KEPT]})


def read_state(target):
    try:
        return json.loads(Path(f"{target}.json").read_bytes())
    except (OSError, ValueError):
        return {}


def packed(work, vlm, processes):
    """Make the shards of `work`, {name: arguments of pack_file}. Yield each name when its shard is there."""
    if processes == 1:
        for name, job in work.items():
            pack_file(*job)
            yield name
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=begin, initargs=(vlm,)) as pool:
        jobs = {pool.submit(pack_file, *job): name for name, job in work.items()}
        for job in as_completed(jobs):
            if job.exception():
                pool.shutdown(cancel_futures=True)
            job.result()
            yield jobs[job]


def pack(corpus, vlm, out, processes=1, strict=False, say=print):
    """Write the packed text of a corpus under `out` -> what index.json has."""
    out, files = Path(out), sources(corpus)
    begin(vlm)
    tokenizer = tokenizer_hash(processor.tokenizer)
    states = {name: made_of(path, tokenizer) for name, path in files}
    (out / "index.json").unlink(missing_ok=True)  # it names what may be about to change
    todo = [(name, path) for name, path in files if not states[name].items() <= read_state(out / name).items()]
    if len(todo) < len(files):
        say(f"{len(files) - len(todo)} of {len(files)} shards are there already")
    work = {name: (path, out / name, states[name], strict) for name, path in todo}
    for name in packed(work, vlm, processes):
        found = read_state(out / name)
        say(f"{name}: {found['documents']:,} documents, {found['tokens']:,} tokens")
    shards = []
    for name, path in files:
        found = read_state(out / name)
        shards.append([name, found["documents"], found["tokens"]])
        if found["reasons"]:
            say(refusals(path, found["documents"] + found["refused"], found["reasons"]))
    if not sum(n for _, n, _ in shards):
        raise DataError(f"{corpus}: no document can be used")
    index = {"tokenizer": tokenizer, "shards": shards}
    write_json(out / "index.json", index)
    return index


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m convert.pack", description="Text corpora -> token shards.", allow_abbrev=False
    )
    parser.add_argument("corpus", help="a .jsonl or .txt file, plain or as .gz, or a folder with some")
    parser.add_argument("--vlm", default="tiny/vlm", help="whose tokenizer is used (default: %(default)s)")
    parser.add_argument("--out", required=True, help="folder to write; the same one goes on")
    parser.add_argument("--processes", type=int, default=1, help="that pack at the same time (default: %(default)s)")
    parser.add_argument("--strict", choices=("no", "yes"), default="no", help="stop at the first bad row")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"argument --processes: {args.processes} is too small, it must be at least 1")
    try:
        index = pack(args.corpus, args.vlm, args.out, args.processes, args.strict == "yes")
    except (DataError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    documents, tokens = (sum(column) for column in list(zip(*index["shards"]))[1:])
    print(f"{args.out}: {len(index['shards'])} shards, {documents:,} documents, {tokens:,} tokens")


if __name__ == "__main__":
    main()
