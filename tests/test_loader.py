"""loader.py: batches that other processes read ahead of time are those that a process reads for itself.

What signals and kills do to workers stands in test_kills.py."""

import json
import multiprocessing
import os
import pickle
import signal

import pytest
import torch
from helpers import cut_off, same_weights, shell
from PIL import Image

import common
import loader
import stage1_projector
import stage2_codebook
import stage3_bc
from data import Batch, DataError, Records
from loader import Reader, batches

TURNS = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A square."}]
GONE = {"image": "gone.jpg", "messages": TURNS}


@pytest.fixture
def folder(tmp_path):
    """r.jsonl: 24 rows, half of them with a JPEG. The images of rows 6 and 8 cannot be used."""
    for k in range(3):
        Image.effect_noise((84 + 28 * k, 56), 50).convert("RGB").save(tmp_path / f"{k}.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:-300])
    rows = [{"id": k, "messages": TURNS} | ({"image": f"{k % 3}.jpg"} if k % 2 else {}) for k in range(24)]
    rows[5], rows[7] = GONE, GONE | {"image": "torn.jpg"}
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def equal(a, b):
    """Bit-equal batches."""
    for (name, x), y in zip(vars(a).items(), vars(b).values(), strict=True):
        if torch.is_tensor(x):
            assert torch.is_tensor(y) and x.dtype == y.dtype and torch.equal(x, y), name
        else:
            assert x == y, name
    return True


def some(folder, processor, count, workers, **kw):
    """-> [(batch, reasons that were known when it came)]"""
    refused = set()
    stream = batches(Records(folder / "r.jsonl"), processor, seed=0, refused=refused, workers=workers, **kw)
    return [(next(stream), frozenset(refused)) for _ in range(count)]


def test_workers_read_what_one_process_reads(folder, processor):
    """Bit for bit and in its order, the reasons of refused rows with the batch that met them; also on ranks."""
    one = some(folder, processor, 10, 0, size=4)
    assert [len(reasons) for _, reasons in one][-1] == 2 and any(b.pixels is not None for b, _ in one)
    for workers in (1, 3):
        found = some(folder, processor, 10, workers, size=4)
        assert all(equal(a, b) for (a, _), (b, _) in zip(one, found))
        assert [reasons for _, reasons in found] == [reasons for _, reasons in one]
    later = some(folder, processor, 4, 2, size=4, start=24)
    assert all(equal(a, b) for (a, _), (b, _) in zip(one[6:], later))
    for rank in range(2):
        alone, with_workers = (some(folder, processor, 5, w, size=2, rank=rank, world=2) for w in (0, 2))
        assert all(equal(a, b) for (a, _), (b, _) in zip(alone, with_workers))
    assert multiprocessing.active_children() == []  # they end with their stream


def test_a_worker_that_is_no_copy_of_this_process_reads_the_same(folder, processor):
    """Where processes are not forked, what reads is handed over in writing."""
    reader, part = Reader(Records(folder / "r.jsonl"), processor, False), [(3, (0, 0, 0)), (2, (0, 0, 1))]
    copied = pickle.loads(pickle.dumps(reader))
    assert equal(reader(part)[0], copied(part)[0]) and isinstance(copied(part)[0], Batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_cannot_be_used_is_the_same_error(folder, processor, workers):
    """Of a missing image and of a torn one, with --strict; and where no row is left."""
    for row, why in ((GONE, "gone.jpg: No such file"), (GONE | {"image": "torn.jpg"}, "torn.jpg: image file is trunc")):
        (folder / "one.jsonl").write_text(json.dumps(row) + "\n")
        records = Records(folder / "one.jsonl")
        with pytest.raises(DataError) as e:
            next(batches(records, processor, size=1, seed=0, workers=workers))
        assert str(e.value).startswith(f"{folder}/one.jsonl, row 1: an image does not open ({folder}/{why}")
        assert "\n" not in str(e.value)
        with pytest.raises(DataError, match="one.jsonl: no row can be used; the first reason: .*row 1: an image does"):
            next(batches(records, processor, size=1, seed=0, refused=set(), workers=workers))
    assert multiprocessing.active_children() == []


def test_a_worker_that_is_killed_is_named_in_one_line(folder, processor):
    stream = batches(Records(folder / "r.jsonl"), processor, size=2, seed=0, refused=set(), workers=2)
    next(stream)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match="^--workers 2: a process that reads rows was ended by a signal .Killed.; "):
        for _ in range(4):  # what had been read by then still comes
            next(stream)
    assert multiprocessing.active_children() == []


def test_a_fault_of_the_code_in_a_worker_is_shown(folder, processor, monkeypatch, capfd):
    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(Reader, "__call__", broken)
    with pytest.raises(DataError, match="--workers 1: a process that reads rows ended with an error, see above"):
        next(batches(Records(folder / "r.jsonl"), processor, size=2, seed=0, workers=1))
    assert "KeyError: 'a bug'" in capfd.readouterr().err


def test_a_process_ends_though_its_stream_does_not(folder):
    """A worker takes no SIGTERM, which Python sends it at its own end, and then waits."""
    code = f"""
import sys; sys.path.insert(0, '.')
from data import Processor, Records
from loader import batches
stream = batches(Records('{folder}/r.jsonl'), Processor('tiny/vlm'), size=2, seed=0, refused=set(), workers=2)
kept = [next(stream)]
kept.append(kept)
print(len(kept[0].records))
"""
    done = shell("-c", code, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


# ------------------------------------------------------------------------------------------------------ the stages
def logged(out):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in common.read_metrics(out)]


def test_the_stages_learn_the_same_with_workers(flags, runs, tmp_path, monkeypatch):
    """To the last bit, also when a run is cut off and goes on with another number of them."""
    used, real = [], loader.ahead
    monkeypatch.setattr(loader, "ahead", lambda *given: used.append(given[-1]) or real(*given))
    for main, argv in (
        (stage1_projector.main, [*flags.paired, "--steps", "2", "--batch", "4"]),
        (stage2_codebook.main, [*flags.book, "--projector", f"{runs}/1", "--steps-a", "2", "--steps-b", "2"]),
        (stage3_bc.main, [*flags.clone, "--init", f"{runs}/2", "--steps-clone", "2", "--steps-adapt", "2"]),
    ):
        out = tmp_path / main.__module__
        cut_off(monkeypatch, main, [*argv, "--workers", "2", "--save-every", "1", "--out", f"{out}"], 1)
        main([*argv, "--workers", "1", "--save-every", "1", "--out", f"{out}"])
        reference = runs / main.__module__[5]
        assert same_weights(out, reference) and logged(out) == logged(reference)
        assert used == sorted(used, reverse=True) and set(used) == {2, 1}
        used.clear()
