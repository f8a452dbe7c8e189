"""convert/mmrole.py: both layouts become records of whole dialogues and of answers; each refusal has its reason."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from convert.mmrole import convert_mmrole, main, short_profile
from data import DataError, Processor, Records

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def processor():
    return Processor(str(ROOT / "tiny" / "vlm"), max_length=400)


def say(*texts):
    return [{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(texts)]


def raw_mmrole(root):
    """Twenty dialogues as published, half of the images missing, and one without an answer; two out of distribution."""
    profiles = {"in": 'Ann_"A"_Lee', "out-of": "Bo"}
    profile = {"introduction": "A long tale of a life. " * 40, "personality": "Kind.", "catchphrase": "Onwards!"}
    for split, name in profiles.items():
        folder = root / f"profiles/{split}-distribution/detailed_profiles"
        folder.mkdir(parents=True)
        (folder / f"{name}.json").write_text(json.dumps(profile | {"experience": "x", "relationship": "y"}))

    def dialogue(k, who, image):
        turns = [
            {"from": "human", "value": f"What is it, {k}?"},
            {"role": who, "value": f"First {k}."},
            {"from": "human", "value": "And then?"},
            {"role": who, "value": f"Second {k}."},
        ]
        return {"id": f"{who}-{k}", "image": image, "conversations": turns}

    (root / "images/Set").mkdir(parents=True)
    Image.new("RGB", (56, 56), "red").save(root / "images/Set/0.png")
    rows = [dialogue(k, 'Ann "A" Lee', "Set/0.png" if k % 2 else "COCO/1.jpg") for k in range(20)]
    rows.append({"id": "mute", "image": "Set/0.png", "conversations": [{"from": "human", "value": "Hello?"}]})
    (root / "dialogues/in-distribution/comment").mkdir(parents=True)
    (root / "dialogues/in-distribution/comment/Ann.json").write_text(json.dumps(rows))
    (root / "dialogues/out-of-distribution").mkdir()
    rows = [dialogue(k, "Bo", "COCO/2.jpg") for k in range(2)]
    (root / "dialogues/out-of-distribution/comment.json").write_text(json.dumps(rows))


def ready_mmrole(root):
    """The same in the preprocessed layout."""

    def dialogue(k, who, image):
        return {
            "id": f"{who}-{k}",
            "image_path": image,
            "character_role": who,
            "character_profile": {who: {"introduction": "Tall.", "personality": "Kind."}},
            "original_roles": ["human", who],
            "conversations": say(f"What is it, {k}?", f"First {k}.", "And then?", f"Second {k}."),
        }

    Image.new("RGB", (56, 56), "red").save(root / "0.png")
    rows = [dialogue(k, "Ann", "0.png" if k % 2 else "gone.jpg") for k in range(20)]
    rows.append(dialogue(20, "Ann", "0.png") | {"conversations": say("Hello?")})
    (root / "conversations-train-comment.json").write_text(json.dumps(rows))
    rows = [dialogue(k, "Bo", "gone.jpg") for k in range(2)]
    (root / "conversations-OODtest-comment.json").write_text(json.dumps(rows))


@pytest.mark.parametrize("layout", [raw_mmrole, ready_mmrole])
def test_both_layouts_are_split_by_whole_dialogues(layout, tmp_path, processor):
    (tmp_path / "in").mkdir()
    layout(tmp_path / "in")
    counts = convert_mmrole(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out/counts.json").read_text()) == counts
    assert counts.pop("refused") == {"id: no answer": 1}
    # 20 usable dialogues of two answers: 10 demonstrations, 8 prompts, 2 tests; 18 for pretraining
    sizes = {k: v["records"] for k, v in counts.items()}
    assert sizes.pop("paired") + sizes.pop("text") == 18
    assert sizes == {"task_demos": 20, "task_prompts": 16, "task_id": 4, "task_ood": 4}
    assert counts["paired"]["with image"] == counts["paired"]["records"]
    assert counts["text"]["with image"] == counts["task_ood"]["with image"] == 0
    files = {}
    for name in counts:
        f = Records(tmp_path / "out" / f"{name}.jsonl")
        files[name] = [f[i] for i in range(len(f))]
    of = {name: {r["messages"][-1]["content"].split()[-1] for r in rows} for name, rows in files.items()}  # dialogues
    assert not of["task_demos"] & of["task_prompts"]
    assert not of["task_id"] & (of["paired"] | of["text"])
    with_image = 0
    for r in sum(files.values(), []):
        with_image += processor.example(r).pixels is not None
        system, user = r["messages"][:2]
        assert r["character"] in system["content"] and "Kind." in user["content"]
        assert len(user["content"].encode()) < 500
    assert with_image == sum(v["with image"] for v in counts.values())


def test_a_validation_part_comes_from_the_prompts_alone(tmp_path):
    """Its dialogues are in no other file; demonstrations and tests stay as they are without it, row for row."""
    ready_mmrole(tmp_path)
    convert_mmrole(tmp_path, tmp_path / "without")
    counts = convert_mmrole(tmp_path, tmp_path / "out", val=3)
    rows = {
        name: {p.stem: p.read_text().splitlines() for p in (tmp_path / name).glob("*.jsonl")}
        for name in ("without", "out")
    }
    assert "task_val" not in rows["without"] and counts["task_val"]["records"] == 6
    for name in ("task_demos", "task_id", "task_ood"):
        assert rows["out"][name] == rows["without"][name]
    assert rows["out"]["task_prompts"] + rows["out"]["task_val"] == rows["without"]["task_prompts"]

    def dialogues(*names):
        return {json.loads(line)["messages"][-1]["content"].split()[-1] for n in names for line in rows["out"][n]}

    assert len(dialogues("task_val")) == 3
    assert not dialogues("task_val") & dialogues("paired", "text", "task_demos", "task_prompts", "task_id")
    with pytest.raises(DataError, match="--val 8"):
        convert_mmrole(tmp_path, tmp_path / "out", val=8)


def test_records_by_hand(tmp_path):
    ready_mmrole(tmp_path)
    convert_mmrole(tmp_path, tmp_path / "out")
    lines = [line for p in (tmp_path / "out").glob("*.jsonl") for line in p.read_text().splitlines()]
    rows = {row["id"]: row for row in map(json.loads, lines)}
    system = {"role": "system", "content": "Play the role of Bo."}
    profile = "Introduction: Tall.\nPersonality: Kind.\n"
    first = [system, *say(profile + "What is it, 1?", "First 1.")]
    second = [system, *say(profile + "User: What is it, 1?\nBo: First 1.\nAnd then?", "Second 1.")]
    assert rows["Bo-1-1"] == {"id": "Bo-1-1", "images": [], "character": "Bo", "messages": first}
    assert rows["Bo-1-3"]["messages"] == second
    whole = [r for r in rows.values() if len(r["messages"]) == 5]
    assert len(whole) == 18  # those of Ann, some with the image
    for r in whole:
        k = r["id"].removeprefix("Ann-")
        mark = "<image>" if int(k) % 2 else ""
        assert r["images"] == ["images/0.png"] * len(mark[:1])
        asked = say(f"{mark}{profile}What is it, {k}?", f"First {k}.", "And then?", f"Second {k}.")
        assert r["messages"] == [{"role": "system", "content": "Play the role of Ann."}, *asked]


def refusals(folder, *rows):
    """The reasons for which the converter refuses in-distribution rows that stand beside the twenty good ones."""
    path = folder / "conversations-train-comment.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:20] + list(rows)))
    counts = convert_mmrole(folder, folder / "out")
    assert counts["paired"]["records"] + counts["text"]["records"] == 18
    return counts["refused"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"conversations": None}, "not a dialogue"),
        ({"conversations": say("", "x")}, "empty turn"),
        (
            {"conversations": [{"role": "user", "content": "x"}, {"role": "Cid", "content": "x"}]},
            "unknown speaker or no text",
        ),
        ({"conversations": [{"role": "user", "content": "x"}, {"content": "x"}]}, "unknown speaker or no text"),
        ({"conversations": say("a", "b")[::-1]}, "does not begin with the human"),
        ({"conversations": say("a", "b") + say("c", "d")[1:]}, "two turns of one speaker in a row"),
        ({"character_profile": {}}, "no profile of the character"),
        ({"id": "again"}, "the same dialogue twice"),
        ({"image_path": ["0.png"]}, "the image is no path"),
        ({"character_profile": {"Ann": {"introduction": "<image>"}}}, "an <image> mark in the name or profile"),
        ({"image_path": "../0.png"}, "the image lies outside the folder"),
        ({"image_path": "/etc/passwd"}, "the image lies outside the folder"),
        (
            {"conversations": say("half \ud83d of a smile", "b")},
            "the row: holds \\ud83d, half of a character (a lone surrogate); repair the text",
        ),
        ({"x": json.loads("[" * 30 + "]" * 30)}, "the row: nested more than 20 levels deep; make it flat"),
    ],
)
def test_each_dialogue_is_used_or_refused_with_a_reason(tmp_path, change, reason):
    ready_mmrole(tmp_path)
    row = json.loads((tmp_path / "conversations-train-comment.json").read_text())[3]
    assert refusals(tmp_path, row | change) == {f"id: {reason}": 1}


def test_an_image_name_that_no_disk_can_have_is_an_image_that_is_not_there(tmp_path):
    ready_mmrole(tmp_path)
    path = tmp_path / "conversations-train-comment.json"
    rows = json.loads(path.read_text())
    names = ["x" * 5000, "x/" * 3000, "a\0b", "0.png/below", ""]
    new = [row | {"image_path": name} for row, name in zip(rows[1::2], names)]
    path.write_text(json.dumps(rows[::2] + new + rows[11::2]))
    counts = convert_mmrole(tmp_path, tmp_path / "out")
    used = counts["paired"]["records"] + counts["text"]["records"] + counts["task_id"]["records"] // 2
    assert used == 20 and counts["refused"] == {"id: no answer": 1}
    rows = [r for p in (tmp_path / "out").glob("*.jsonl") for r in map(json.loads, p.read_text().splitlines())]
    assert {r["id"].split("-")[1] for r in rows if r["images"]} <= {"11", "13", "15", "17", "19"}


def test_images_are_put_beside_the_records(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    raw_mmrole(tmp_path / "in")
    for out in ("linked", "copied", "in"):
        if out == "copied":  # as on a disk that has no hard links
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
        for _ in range(2):  # the second time they are there already
            convert_mmrole(tmp_path / "in", tmp_path / out)
        records = Records(tmp_path / out / "paired.jsonl")
        (image,) = records[0]["images"]
        assert image == str(tmp_path / out / "images/Set/0.png") and Image.open(image).size == (56, 56)
        assert os.stat(image).st_nlink == (1 if out == "copied" else 2)


def test_a_row_that_is_no_object_is_refused(tmp_path):
    ready_mmrole(tmp_path)
    assert refusals(tmp_path, "x", 5) == {"id: not a dialogue": 2}


def test_a_profile_is_cut_at_a_word_and_within_the_limit():
    profile = {"introduction": "several " * 99, "personality": "words " * 99, "catchphrase": "Onwards!"}
    text = short_profile(profile, 200)
    lines = [line.split(": ") for line in text.splitlines()]
    assert [name for name, _ in lines] == ["Introduction", "Personality", "Catchphrase"] and len(text) <= 200
    assert set(lines[0][1].split()) == {"several"} and set(lines[1][1].split()) == {"words"}
    assert lines[2][1] == "Onwards!"
    full = {f: "x " * 500 for f in ("introduction", "personality", "catchphrase")}
    assert all(len(short_profile(full, n)) <= n for n in range(150, 300))  # line breaks count as well


def test_a_chinese_profile_is_cut_at_any_character():
    # 'Introduction: ' is 14 bytes and a character 3, so 100 - 15 bytes hold 28 and the early space
    text = short_profile({"introduction": "甲 " + "乙" * 500, "personality": "a", "catchphrase": "b"}, 300)
    assert text.splitlines()[0] == "Introduction: 甲 " + "乙" * 27 and len(text.encode()) <= 300


def test_folders_that_are_not_mmrole(tmp_path):
    with pytest.raises(DataError, match="not MMRole; it needs dialogues/"):
        convert_mmrole(tmp_path, tmp_path / "out")
    (tmp_path / "half").mkdir()
    raw_mmrole(tmp_path / "half")
    (tmp_path / "half/dialogues/out-of-distribution/comment.json").unlink()  # the layout needs both distributions
    with pytest.raises(DataError, match="not MMRole; it needs dialogues/"):
        convert_mmrole(tmp_path / "half", tmp_path / "out")


def test_files_that_cannot_be_used_are_named(tmp_path):
    ready_mmrole(tmp_path)
    test = tmp_path / "conversations-OODtest-comment.json"
    test.write_text("[]")
    with pytest.raises(
        DataError, match="no usable dialogue in the out-of-distribution part; refused: {'id: no answer': 1}"
    ):
        convert_mmrole(tmp_path, tmp_path / "out")
    test.write_text("{}")
    with pytest.raises(DataError, match="OODtest-comment.json: must hold a JSON array of dialogues"):
        convert_mmrole(tmp_path, tmp_path / "out")
    test.write_text("[")
    with pytest.raises(DataError, match="OODtest-comment.json: not JSON"):
        convert_mmrole(tmp_path, tmp_path / "out")


def test_the_command(tmp_path, capsys):
    ready_mmrole(tmp_path)
    main([str(tmp_path), "--out", str(tmp_path / "out"), "--profile-bytes", "40"])
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out/counts.json").read_text())
    # 40 bytes: the introduction may have 40 // 2 - 15 < 21 and is left out, the personality 40 - 14
    record = Records(tmp_path / "out/task_ood.jsonl")[0]
    assert record["messages"][1]["content"].startswith("Personality: Kind.\nWhat is it")


def test_the_command_ends_with_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "convert.mmrole", tmp_path / "none", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {tmp_path / 'none'}: not MMRole")


def test_the_real_data_set(tmp_path, processor):
    if "MMROLE" not in os.environ:
        pytest.skip("set MMROLE to the folder of the data set to try the real thing")
    counts = convert_mmrole(os.environ["MMROLE"], tmp_path)
    total = counts["paired"]["records"] + counts["text"]["records"] + sum(counts["refused"].values())
    assert total > 0 and counts["paired"]["records"] > 0
    f = Records(tmp_path / "task_ood.jsonl")
    assert all(len(processor.example(f[i]).ids) for i in range(len(f)))
