"""convert/pack.py and shards.py: a corpus becomes token shards; a reader finds each document, and holds none."""

import gzip
import json
import tracemalloc

import numpy as np
import pytest
from helpers import TINY, cut_off, same_weights

import shuffle
import stage1_projector
import stage2_codebook
import stage3_bc
from convert import pack as packing
from convert.pack import main, pack
from data import DataError, Processor, Records
from loader import batches
from shards import Shards, tokenizer_hash

LONG = " ".join(f"word {k}" for k in range(300))
ROWS = [{"text": "A page."}, {"text": "Another é."}, {"text": LONG, "meta": {"set": "C4"}}]


@pytest.fixture(scope="module")
def processor():
    return Processor(TINY, max_length=64)


def lines(*rows):
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)


def corpus(folder):
    """Three documents as rows, two as rows in a .gz, one plain file: six documents in three files."""
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_text(lines(*ROWS))
    (folder / "sub/b.jsonl.gz").write_bytes(gzip.compress(lines({"text": "Fourth."}, {"text": "Fifth."}).encode()))
    (folder / "sub/c.txt").write_text("First line.\n\nLast line.\n")
    return folder


def ids_of(processor, text):
    return processor.tokenizer(text + processor.eos, add_special_tokens=False)["input_ids"]


def quiet(*args, **kw):
    return pack(*args, say=lambda _: None, **kw)


def test_every_document_is_found_with_the_tokens_of_its_text(tmp_path, processor):
    index = quiet(corpus(tmp_path / "in"), TINY, tmp_path / "out")
    assert [(name, n) for name, n, _ in index["shards"]] == [("a.jsonl", 3), ("sub/b.jsonl.gz", 2), ("sub/c.txt", 1)]
    texts = [r["text"] for r in ROWS] + ["Fourth.", "Fifth.", "First line.\n\nLast line.\n"]
    assert sum(tokens for _, _, tokens in index["shards"]) == sum(len(ids_of(processor, t)) for t in texts)
    shards = Shards(tmp_path / "out", processor)
    assert [shards[i]["ids"].tolist() for i in range(6)] == [ids_of(processor, t)[:64] for t in texts]
    mapped = np.memmap(tmp_path / "out/a.jsonl.tokens", "<u4", "r")
    assert mapped[: len(ids_of(processor, texts[0]))].tolist() == ids_of(processor, texts[0])
    assert "out/sub/c.txt, document 6 of the folder" in shards[5]["where"]
    (tmp_path / "r.jsonl").write_text(lines(*ROWS))
    records = Records(tmp_path / "r.jsonl")
    for i in range(3):  # what a stage learns of a packed row is what it learns of the row
        packed, plain = processor.example(shards[i]), processor.example(records[i])
        assert packed.ids.tolist() == plain.ids.tolist() and packed.response.tolist() == plain.response.tolist()


def test_windows_of_a_long_document_begin_anywhere_and_stay_in_it(tmp_path, processor):
    quiet(corpus(tmp_path / "in"), TINY, tmp_path / "out")
    shards, whole = Shards(tmp_path / "out", processor), ids_of(processor, LONG)
    begins = set()
    for n in range(40):
        ids = shards.drawn(2, (0, 1, n))["ids"].tolist()
        begins |= {k for k in range(len(whole) - 63) if whole[k : k + 64] == ids}
        assert len(ids) == 64 and ids == shards.drawn(2, (0, 1, n))["ids"].tolist()
    assert len(begins) > 30 and max(begins) > len(whole) * 0.8
    assert shards.drawn(0, (0, 1, 5))["ids"].tolist() == ids_of(processor, "A page.")
    assert shards.sizes_of(np.array([2, 0])).tolist() == [64, len(ids_of(processor, "A page."))]


def test_batches_resume_and_share_out_to_ranks(tmp_path, processor):
    quiet(corpus(tmp_path / "in"), TINY, tmp_path / "out")
    shards = Shards(tmp_path / "out", processor)

    def ids(steps, size, **more):
        stream = batches(shards, processor, size, 3, refused=set(), **more)
        return [row[row != processor.pad_id].tolist() for _ in range(steps) for row in next(stream).ids_BT]

    whole = ids(6, 4)
    assert ids(4, 4, start=8) == whole[8:]
    two = [ids(6, 2, rank=rank, world=2) for rank in range(2)]
    assert [row for pair in zip(*two) for row in pair] == whole


def test_rows_held_out_are_no_rows_to_learn_from(tmp_path, processor):
    quiet(corpus(tmp_path / "in"), TINY, tmp_path / "out")
    shards = Shards(tmp_path / "out", processor)
    train, held_out = shards.only(slice(0, 4)), shards.only(slice(4, None))
    assert len(train) == 4 and [held_out[i]["id"] for i in range(2)] == [4, 5]
    assert held_out.only(np.array([1]))[0]["id"] == 5 and train.only(slice(0, 2)).sizes_of([1]) > 1


# ------------------------------------------------------------------------------------------------ the order of rows
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_scattered_numbers_are_a_permutation(n):
    found = list(shuffle.scattered(n, 0, 0))
    assert sorted(found) == list(range(n))
    assert list(shuffle.scattered(n, 0, 0, n // 2)) == found[n // 2 :]
    if n == 1000:
        assert found != list(shuffle.scattered(n, 0, 1)) and found != list(shuffle.scattered(n, 1, 0))
        rising = sum(a < b for a, b in zip(found, found[1:]))
        assert 400 < rising < 600 and abs(np.corrcoef(found, range(n))[0, 1]) < 0.1


def test_billions_of_rows_are_shuffled_without_memory(monkeypatch):
    tracemalloc.start()
    stream = shuffle.index_stream(2**33 + 7, seed=0)
    drawn = [next(stream) for _ in range(2000)]
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert len(set(drawn)) == 2000 and max(drawn) > 2**32 and min(drawn) < 2**28
    monkeypatch.setattr(shuffle, "MANY", 5)
    stream = shuffle.index_stream(7, 0)
    two = [[next(stream) for _ in range(7)] for _ in range(2)]
    assert [sorted(epoch) for epoch in two] == [list(range(7))] * 2 and two[0] != two[1]
    resumed = shuffle.index_stream(7, 0, start=10)
    assert [next(resumed) for _ in range(4)] == two[1][3:]


# ------------------------------------------------------------------------------------------------ bad input
def test_bad_rows_are_counted_and_the_first_three_kinds_are_shown(tmp_path, processor):
    folder = tmp_path / "in"
    folder.mkdir()
    bad = ['{"text": "torn', {"text": 5}, {"text": " "}, {"messages": [{"role": "user", "content": "Hi"}]}]
    rows = [{"text": "A."}, *bad, {"text": "<|im_end|>"}, "", {"text": "B."}]
    (folder / "a.jsonl").write_bytes(lines(*rows).encode() + '{"text": "é"}\n'.encode("latin-1"))
    torn = gzip.compress(lines(*[{"text": f"row {k} {np.sin(k)}"} for k in range(2000)]).encode())
    (folder / "b.jsonl.gz").write_bytes(torn[: len(torn) // 2])
    said = []
    index = pack(folder, TINY, tmp_path / "out", say=said.append)
    assert index["shards"][0][1] == 2 and 100 < index["shards"][1][1] < 2000
    text = "\n".join(said)
    assert "a.jsonl: 6 of 8 rows cannot be used" in text and "row 2: not JSON" in text and "other kinds" in text
    assert "the .gz is torn" in text and "what stands before it is used" in text
    shards = Shards(tmp_path / "out", processor)
    assert [shards[i]["ids"].tolist() for i in range(2)] == [ids_of(processor, t) for t in ("A.", "B.")]
    with pytest.raises(DataError, match="a.jsonl, row 2: not JSON"):
        quiet(folder, TINY, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict/index.json").exists()


def test_a_folder_that_is_no_packed_text_is_refused_by_name(tmp_path, processor):
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"no packed text \(it has no index.json\); finish it"):
        Shards(tmp_path, processor)
    quiet(corpus(tmp_path / "in"), TINY, out)
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps(index | {"tokenizer": "another"}))
    with pytest.raises(DataError, match="out: was packed with another tokenizer than that of --vlm"):
        Shards(out, processor)
    (out / "index.json").write_text(json.dumps(index))
    whole = (out / "a.jsonl.tokens").read_bytes()
    (out / "a.jsonl.tokens").write_bytes(b"\xff" * 4 + whole[4:])  # bytes that a disk has spoilt
    with pytest.raises(DataError, match="a.jsonl, document 1 of the folder: its ids are none of the tokenizer's"):
        Shards(out, processor)[0]
    assert len(Shards(out, processor)[1]["ids"])
    starts = (out / "a.jsonl.starts").read_bytes()
    (out / "a.jsonl.starts").write_bytes(starts[:8] + b"\xff" * 8 + starts[16:])
    with pytest.raises(DataError, match="a.jsonl.starts: is damaged; delete it and pack"):
        Shards(out, processor).sizes_of([1])
    (out / "a.jsonl.starts").write_bytes(starts)
    with open(out / "a.jsonl.tokens", "r+b") as f:
        f.truncate(40)
    with pytest.raises(DataError, match="a.jsonl.tokens: is cut off"):
        Shards(out, processor)[2]
    (out / "index.json").write_text("[")
    with pytest.raises(DataError, match="index.json: cannot be used"):
        Shards(out, processor)


def test_the_hash_is_of_the_tokenizer(processor):
    before = tokenizer_hash(processor.tokenizer)
    processor.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=5)  # leaves its settings behind
    assert tokenizer_hash(processor.tokenizer) == before
    other = Processor(TINY).tokenizer
    other.add_tokens(["blorp"])
    assert tokenizer_hash(other) != before


def test_files_that_cannot_be_packed_are_named(tmp_path, capsys):
    (tmp_path / "x.jsonl.zst").touch()
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "x.jsonl.zst: cannot be read; turn it into" in said
    (tmp_path / "x.jsonl.zst").unlink()
    with pytest.raises(DataError, match="no text; give a .jsonl"):
        quiet(tmp_path, TINY, tmp_path / "out")


# ------------------------------------------------------------------------------------------------ going on
def test_the_same_command_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    folder, out = corpus(tmp_path / "in"), tmp_path / "out"
    real, made = packing.pack_file, []

    def pack_file(path, *rest):
        made.append(path.name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return real(path, *rest)

    monkeypatch.setattr(packing, "pack_file", pack_file)
    with pytest.raises(KeyboardInterrupt):
        quiet(folder, TINY, out)
    assert not (out / "index.json").exists()
    index = quiet(folder, TINY, out)
    assert made == ["a.jsonl", "b.jsonl.gz", "b.jsonl.gz", "c.txt"]
    assert index == quiet(folder, TINY, tmp_path / "at once")
    (folder / "a.jsonl").write_text(lines(*ROWS[:2]))  # a file that has changed is packed again
    made[:] = ["x", "y"]
    assert quiet(folder, TINY, out)["shards"][0][1] == 2 and made[2:] == ["a.jsonl"]


def test_two_processes_write_what_one_writes(tmp_path, capsys):
    folder = str(corpus(tmp_path / "in"))
    for processes in ("1", "2"):
        main([folder, "--out", str(tmp_path / processes), "--processes", processes])
    assert "3 shards, 6 documents" in capsys.readouterr().out
    for path in (tmp_path / "1").rglob("*"):
        if path.is_file() and path.suffix != ".json":
            assert path.read_bytes() == (tmp_path / "2" / path.relative_to(tmp_path / "1")).read_bytes()


def test_stages_2_and_3_learn_from_packed_text_and_resume(world, flags, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines(*({"text": f"{k} {LONG}"} for k in range(12))))
    quiet(folder, TINY, tmp_path / "packed")
    stage1_projector.main([*flags.paired, "--steps", "1", "--batch", "2", "--out", f"{tmp_path}/one"])
    argv = [*flags.book, "--text", f"{tmp_path}/packed", "--max-length", "128", "--projector", f"{tmp_path}/one"]
    argv += ["--steps-a", "1", "--steps-b", "3", "--save-every", "2", "--out"]
    stage2_codebook.main([*argv, f"{tmp_path}/whole"])
    cut_off(monkeypatch, stage2_codebook.main, [*argv, f"{tmp_path}/cut"], 2)
    stage2_codebook.main([*argv, f"{tmp_path}/cut"])
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    argv = [*flags.clone, "--text", f"{tmp_path}/packed", "--steps-clone", "1", "--steps-adapt", "0"]
    stage3_bc.main([*argv, "--max-length", "128", "--init", f"{tmp_path}/whole", "--out", f"{tmp_path}/three"])
    assert (tmp_path / "three").is_dir()
