"""convert/pcogalign.py: the published and the golden files become records; each refusal has its reason."""

import json
import random
import subprocess
import sys

import pytest
from helpers import ROOT, TINY
from PIL import Image

from convert.pcogalign import convert_pcogalign, main
from data import DataError, Processor, Records, scan

NAMES = ("task_b_demos", "task_b_prompts", "task_b_ls1", "task_b_ls2")


def row(k, golden=True, image="images/0.jpg"):
    """A row in the format of the data set."""
    found = {
        "individual_RoleSet": {"Hospital": "Nurse", "Market": "Cook"},
        "query": f"What should I do first, {k}?",
        "image": {"file_path": image},
        "eval_info": {
            "sub_set": "HCMAS",
            "individual": "RS1",
            "location": "Hospital",
            "ImageDesc": "x",
            "EvalHelp": "y",
        },
    }
    return found | ({"golden_response": f"Begin with {k}."} if golden else {})


def pcogalign(root, golden=True, below="."):
    """Twenty training rows and three rows of each test, with a JPEG and a PNG."""
    folder = root / below
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (84, 56), "red").save(folder / "images/0.jpg")
    Image.new("RGB", (56, 56), "blue").save(folder / "images/1.png")
    middle = "-golden" if golden else ""
    numbers = {"HCMAS-test": range(100, 103), "HCSHR-test": range(200, 203), "HCMAS-train": range(20)}
    for name, ks in numbers.items():
        rows = [row(k, golden, f"images/{'1.png' if k % 2 else '0.jpg'}") for k in ks]
        (folder / f"{name.replace('-', middle + '-')}.json").write_text(json.dumps(rows))
    return folder


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sizes(counts):
    return {name: found["records"] for name, found in counts.items() if name != "refused"}


@pytest.mark.parametrize("below", [".", "version_v4"])
def test_the_split_and_a_record_by_hand(tmp_path, below):
    pcogalign(tmp_path / "in", below=below)
    counts = convert_pcogalign(tmp_path / "in", tmp_path / "out")
    assert counts == json.loads((tmp_path / "out/counts.json").read_text()) and counts["refused"] == {}
    assert sizes(counts) == dict(zip(NAMES, (10, 4, 3, 3)))  # 20 rows: 50% and 20%; the tests whole
    rows = {name: records(tmp_path / f"out/{name}.jsonl") for name in NAMES}
    assert rows["task_b_ls1"][1] == {
        "id": "HCMAS-test-2",
        "images": ["images/images/1.png"],
        "role_set": {"Hospital": "Nurse", "Market": "Cook"},
        "eval_info": row(0)["eval_info"],
        "messages": [
            {
                "role": "system",
                "content": 'You are a helpful assistant for a user who is "Nurse at Hospital; Cook at Market".',
            },
            {"role": "user", "content": "<image>What should I do first, 101?"},
            {"role": "assistant", "content": "Begin with 101."},
        ],
    }
    said = {name: [r["messages"][2]["content"] for r in found] for name, found in rows.items()}
    train = said["task_b_demos"] + said["task_b_prompts"]
    assert len(set(train)) == 14 and set(train) <= {f"Begin with {k}." for k in range(20)}
    assert train != sorted(train, key=lambda text: int(text[11:-1]))  # shuffled


def test_the_shuffle_is_that_of_seed_42(tmp_path):
    pcogalign(tmp_path / "in")
    convert_pcogalign(tmp_path / "in", tmp_path / "out", val=6)
    order = [f"HCMAS-train-{n}" for n in range(1, 21)]
    random.Random(42).shuffle(order)
    names = ("task_b_demos", "task_b_prompts", "task_b_val")
    assert [r["id"] for name in names for r in records(tmp_path / f"out/{name}.jsonl")] == order
    with pytest.raises(DataError, match="--val 7: the split leaves 6 rows unused"):
        convert_pcogalign(tmp_path / "in", tmp_path / "out", val=7)


def test_every_record_can_be_read_with_its_picture(tmp_path):
    pcogalign(tmp_path / "in")
    convert_pcogalign(tmp_path / "in", tmp_path / "out")
    processor = Processor(TINY, 400)
    for name in NAMES:
        found = scan(Records(tmp_path / f"out/{name}.jsonl"), processor, decode=True)
        assert not found.refused and len(found.usable) >= 3


def test_published_rows_become_queries_and_then_records_with_the_answers(tmp_path, capsys):
    pcogalign(tmp_path / "in", golden=False)
    argv = [str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    main(argv)
    assert "have " + argv[2] + "/queries.jsonl answered" in capsys.readouterr().out
    queries = records(tmp_path / "out/queries.jsonl")
    assert len(queries) == 26 and all(r["messages"][-1]["role"] == "user" for r in queries)
    assert not list((tmp_path / "out").glob("task_*"))
    lines = [json.dumps({"id": r["id"], "golden_response": f"Answer to {r['id']}"}) for r in queries[:-1]]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    main([*argv, "--answers", str(tmp_path / "answers.jsonl")])
    counts = json.loads((tmp_path / "out/counts.json").read_text())
    assert counts["refused"] == {"HCMAS-train: no golden response": 1}
    assert sizes(counts) == dict(zip(NAMES, (9, 4, 3, 3)))  # of 19
    for r in records(tmp_path / "out/task_b_prompts.jsonl"):
        assert r["messages"][-1]["content"] == f"Answer to {r['id']}"
    (tmp_path / "answers.jsonl").write_text(lines[0] + '\n{"id": "x"}')
    with pytest.raises(DataError, match="answers.jsonl, row 2: needs an 'id' and a 'golden_response'"):
        convert_pcogalign(tmp_path / "in", tmp_path / "out", tmp_path / "answers.jsonl")


def test_golden_files_are_preferred(tmp_path):
    folder = pcogalign(tmp_path)
    (folder / "HCMAS-test.json").write_text(json.dumps([row(300, golden=False)]))
    assert sizes(convert_pcogalign(tmp_path, tmp_path / "out"))["task_b_ls1"] == 3


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"individual_RoleSet": {}}, "no set of roles"),
        ({"individual_RoleSet": "Nurse"}, "no set of roles"),
        ({"individual_RoleSet": {"Hospital": 5}}, "no set of roles"),
        ({"query": " <image> "}, "no query"),
        ({"query": None}, "no query"),
        ({"image": {"file_path": "images/gone.jpg"}}, "its image is not there"),
        ({"image": {"file_path": ""}}, "its image is not there"),
        ({"image": {"file_path": "x" * 5000}}, "its image is not there"),
        ({"image": {"file_path": "../0.jpg"}}, "the image lies outside the folder"),
        ({"image": {"file_path": "/etc/passwd"}}, "the image lies outside the folder"),
        ({"image": {}}, "the image is no path"),
        ({"golden_response": " "}, "no golden response"),
        ({"golden_response": None}, "no golden response"),
        ({}, "the same row twice"),
        ({"query": "half \ud83d"}, "the row: holds \\ud83d, half of a character (a lone surrogate); repair the text"),
        ({"x": json.loads("[" * 30 + "]" * 30)}, "the row: nested more than 20 levels deep; make it flat"),
    ],
)
def test_each_row_is_used_or_refused_with_a_reason(tmp_path, change, reason):
    path = pcogalign(tmp_path) / "HCMAS-golden-train.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, rows[3] | change]))
    counts = convert_pcogalign(tmp_path, tmp_path / "out")
    assert counts["refused"] == {f"HCMAS-train: {reason}": 1} and sizes(counts)["task_b_demos"] == 10


def test_a_training_row_that_is_in_a_test_is_refused_and_the_test_stays(tmp_path):
    path = pcogalign(tmp_path) / "HCMAS-golden-train.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), row(100), "x"]))
    counts = convert_pcogalign(tmp_path, tmp_path / "out")
    assert counts["refused"] == {"HCMAS-train: the same row twice": 1, "HCMAS-train: not an object": 1}
    assert sizes(counts)["task_b_ls1"] == 3


def test_files_that_cannot_be_used_are_named(tmp_path):
    folder = pcogalign(tmp_path)
    test = folder / "HCSHR-golden-test.json"
    for text, message in (("{}", "must hold a JSON array"), ("[", "not JSON"), ("[]", "no usable row; refused: {}")):
        test.write_text(text)
        with pytest.raises(DataError, match=f"HCSHR-golden-test.json: {message}"):
            convert_pcogalign(tmp_path, tmp_path / "out")
    test.unlink()
    with pytest.raises(DataError, match="not PCogAlignBench; it needs HCSHR-test.json or HCSHR-golden-test.json"):
        convert_pcogalign(tmp_path, tmp_path / "out")


def test_the_command_ends_with_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "convert.pcogalign", tmp_path / "none", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {tmp_path / 'none'}: not PCogAlignBench")
