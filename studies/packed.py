"""What packed text costs: memory of a reader of 1 and of 10 GB, CPU seconds of a row, MB of text packed a CPU second,
and what a second process gains.

    python -m studies.packed --folder runs/packed --out runs/packed.json

The tokens are random, in documents of 1,000; the files are deleted at the end. Seconds are of the processor, not of the
clock, so that other work on the machine does not count; those of two processes are of the clock, and want a machine
with nothing else to do. Memory is what the process holds for itself (RssAnon)."""

import argparse
import json
import os
import re
import shutil
import statistics
import time
from pathlib import Path

import numpy as np

from convert.pack import pack
from data import Processor
from loader import batches
from shards import START, TOKEN, Shards, tokenizer_hash

ROW = 1000  # tokens of a document


def make(folder, gb, tokenizer):
    """gb shards of 1 GB (a thousand million bytes) each."""
    folder.mkdir(parents=True)
    tokens, rng, shards = 250_000_000, np.random.default_rng(0), []
    some = rng.integers(0, 2000, tokens // 10).astype(TOKEN)
    for k in range(gb):
        with open(folder / f"{k}.tokens", "wb") as f:
            for _ in range(10):
                some.tofile(f)
        np.arange(0, tokens + 1, ROW).astype(START).tofile(folder / f"{k}.starts")
        shards.append([str(k), tokens // ROW, tokens])
    (folder / "index.json").write_text(json.dumps({"tokenizer": tokenizer_hash(tokenizer), "shards": shards}))


def held():
    """-> MiB that this process holds for itself."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def read(folder, processor, rows):
    """-> {'mib': what reading so many rows adds to the process's memory, 'ms': CPU milliseconds a row}"""
    before, began = held(), time.process_time()
    shards = Shards(folder, processor)
    stream = batches(shards, processor, 16, 0, refused=set())
    for _ in range(rows // 16):
        next(stream)
    seconds = time.process_time() - began
    return {"documents": len(shards), "mib": held() - before, "ms": 1000 * seconds / rows}


def write_text(target, mb):
    """Rows of 600 words -> MB of their text."""
    rng = np.random.default_rng(0)
    words = Path("README.md").read_text().split()
    size = 0
    with open(target, "w") as f:
        while size < mb * 10**6:
            text = " ".join(rng.choice(words, 600))
            size += len(text)
            f.write(json.dumps({"text": text}) + "\n")
    return size / 10**6


def packing(folder, vlm, mb):
    """-> MB of text that a CPU second packs."""
    size = write_text(folder / "text.jsonl", mb)
    began = time.process_time()
    pack(folder / "text.jsonl", vlm, folder / "packed", say=lambda _: None)
    return size / (time.process_time() - began)


def together(folder, vlm, mb, turns):
    """Pack two files of mb / 2 each, with one process and with two in turns; and two that have a row each, which is
    what the start of two processes takes. -> MB, medians of the seconds of the clock and of the processor (of all
    processes), and the machine's load before."""
    load, size = os.getloadavg()[0], 0
    for name, part in (("much", mb / 2), ("little", 0.001)):
        (folder / name).mkdir()
        made = [write_text(folder / name / f"{k}.jsonl", part) for k in range(2)]
        size = size or sum(made)
    clock, cpu = {"1": [], "2": [], "start": []}, {"1": [], "2": [], "start": []}
    for turn in range(turns):
        for what, corpus, processes in (("1", "much", 1), ("2", "much", 2), ("start", "little", 2)):
            began, used = time.monotonic(), sum(os.times()[:4])
            pack(folder / corpus, vlm, folder / f"{what} {turn}", processes, say=lambda _: None)
            clock[what].append(time.monotonic() - began)
            cpu[what].append(sum(os.times()[:4]) - used)
    found = [{k: statistics.median(v) for k, v in seconds.items()} for seconds in (clock, cpu)]
    return {"mb": size, "turns": turns, "seconds": found[0], "cpu_seconds": found[1], "load": load}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m studies.packed", description=__doc__, allow_abbrev=False)
    parser.add_argument("--folder", required=True, help="is made, filled with 11 GB, and deleted")
    parser.add_argument("--vlm", default="tiny/vlm", help="whose tokenizer packs (default: %(default)s)")
    parser.add_argument("--gb", type=int, nargs="*", default=[1, 10], help="sizes (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=4096, help="documents that are read of each (default: %(default)s)")
    parser.add_argument("--mb", type=int, default=10, help="of text that are packed (default: %(default)s)")
    parser.add_argument("--together", type=int, default=60, help="MB for two processes (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="for that, each (default: %(default)s)")
    parser.add_argument("--out", required=True, help="file of the numbers")
    args = parser.parse_args(argv)
    folder, processor = Path(args.folder), Processor(args.vlm, max_length=512)
    folder.mkdir(parents=True)
    try:
        found = {"processes": together(folder, args.vlm, args.together, args.turns), "reader": {}}
        make(folder / "warm", 1, processor.tokenizer)
        read(folder / "warm", processor, 64)  # so that what libraries allocate once is not counted
        for gb in args.gb:
            make(folder / str(gb), gb, processor.tokenizer)
            found["reader"][str(gb)] = read(folder / str(gb), processor, args.rows)
            shutil.rmtree(folder / str(gb))
        found["mb_per_cpu_second"] = packing(folder, args.vlm, args.mb)
    finally:
        shutil.rmtree(folder)
    found["config"] = {"vlm": args.vlm, "rows": args.rows, "max_length": 512, "machine": "two cores of an AMD EPYC"}
    Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
