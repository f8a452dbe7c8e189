"""Batches of a file's rows, forever: read by this process, or ahead of time by processes of their own (--workers).

Which rows stand in which batch is decided here alone, from (seed, epoch). A worker is told the rows, and hands back
their batch. The batches come in the order in which they were asked for, so that workers change nothing but time."""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
from multiprocessing.util import Finalize

import torch

from data import index_batches
from records import DataError


def batches(records, processor, size, seed, start=0, rank=0, world=1, refused=None, kind=0, workers=0):
    """Yield Batches of `size` rows of similar length for rank `rank` of `world`, forever.

    start: rows drawn so far by all ranks together. A row that cannot be used is replaced by the next one of the file
    that can, and its reason goes into the set `refused` (without a set it is raised). Which row stands in depends on
    the row alone, so that resume and ranks change nothing. The noise of a row depends on the seed, on `kind` (a number
    for each file that a run reads) and on how many rows were drawn before it, which is its step and its place in the
    global batch. workers: processes that make the batches, 0: this one."""
    reader = Reader(records, processor, refused is None)
    asked = parts(records, size, seed, start, rank, world, kind)
    for batch, reasons in ahead(reader, asked, workers) if workers else map(reader, asked):
        if reasons:
            refused.update(reasons)
        if isinstance(batch, DataError):
            raise batch
        yield batch


def parts(records, size, seed, start, rank, world, kind):
    """Yield the rows of each batch of this rank: [(row number, draw)]"""
    part = []
    for n, i in enumerate(index_batches(records, size * world, seed, start), start):
        if n % world == rank:
            part.append((int(i), (seed, kind, n)))
        if len(part) == size:
            yield part
            part = []


class Reader:
    """[(row number, draw)] -> (Batch, or the DataError why there is none; the reasons of the rows refused for it)."""

    def __init__(self, records, processor, strict):
        """strict: the first row that cannot be used is the DataError."""
        self.records, self.processor, self.strict = records, processor, strict

    def __call__(self, part):
        refused = None if self.strict else set()
        try:
            examples = [usable(self.records, self.processor, i, refused, draw) for i, draw in part]
        except DataError as e:
            return e, refused
        return self.processor.collate(examples, draws=[draw for _, draw in part]), refused


def usable(records, processor, i, refused, draw):
    """The Example of row i, or of the first row after it that can be used. draw: see Shards.drawn."""
    for k in range(len(records)):
        try:
            return processor.example(records.drawn((i + k) % len(records), draw))
        except DataError as e:
            if refused is None:
                raise
            refused.add(str(e))
    raise DataError(f"{records.path}: no row can be used; the first reason: {min(refused)}")


# ---------------------------------------------------------------------------------------------------------- workers
def ahead(reader, asked, workers):
    """Yield reader(part) for each part that is asked for, in order. The workers take turns, each is one part ahead.

    They end with this generator, or with this process, however it ends. DataError if one of them dies before."""
    pairs, processes = [], []
    stop = Finalize(None, end_all, (processes,), exitpriority=0)  # at its end Python would wait for them, for ever
    try:
        for _ in range(workers):
            here, there = multiprocessing.Pipe()
            process = multiprocessing.Process(target=work, args=(reader, there, here), daemon=True)
            process.start()
            there.close()  # the worker's own is the only one left: to read from `here` ends when the worker does
            processes.append(process)
            pairs.append((here, process))
            here.send(next(asked))
        for here, process in itertools.cycle(pairs):
            try:
                found = pickle.loads(here.recv_bytes())
                here.send(next(asked))
            except (EOFError, OSError) as e:
                raise DataError(f"--workers {workers}: {fault(process, e)}") from None
            yield found
    finally:
        stop()


def work(reader, end, other):
    """A worker, until the other end of its pipe is closed: when the generator ends, or the process that it is in."""
    other.close()  # a fork has that end as well, and would wait for itself
    for number in (signal.SIGINT, signal.SIGTERM):  # they are meant for the run, which ends its step and saves
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are what runs in parallel
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        while True:
            # plain bytes: tensors in shared memory would need a /dev/shm of their size, which a container may not have
            end.send_bytes(pickle.dumps(reader(end.recv())))


def end_all(processes):
    for process in processes:
        process.kill()
        process.join()


def fault(process, error):
    """What is said of a worker whose batch does not come."""
    process.join(5)
    code = process.exitcode
    why = "ended with an error, see above"
    if code is None:
        why = f"cannot be reached ({error})"
    elif code < 0:
        why = f"was ended by a signal ({signal.strsignal(-code)})"
    cure = "memory may be too small; the same command goes on from the last checkpoint"
    return f"a process that reads rows {why}; {cure}"
