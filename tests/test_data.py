"""data.py: records, examples, the text view, samplers, MMRole; every error names the file and the row."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError, Processor, Records, batches, convert_mmrole, index_batches, index_stream, short_profile

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def processor():
    return Processor(str(ROOT / "tiny" / "vlm"), max_length=400)


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (84, 56), "red").save(tmp_path / "a.png")
    Image.new("RGB", (56, 56), "blue").save(tmp_path / "b.png")
    Image.new("RGB", (1500, 5), "red").save(tmp_path / "wide.png")  # the processor takes no side 200 times the other
    return tmp_path


def write(folder, *rows, name="r.jsonl"):
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def say(*texts):
    return [{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(texts)]


def test_images_become_a_quarter_as_many_tokens_as_patches(processor, folder):
    e = processor.example(Records(write(folder, {"images": ["a.png", "b.png"], "messages": say("one <image> two <image>?", "Yes.")}))[0])
    # 84 x 56 pixels are 6 x 4 patches of 14, 6 tokens; 56 x 56 are 16 patches, 4 tokens
    assert e.grids.tolist() == [[1, 4, 6], [1, 4, 4]] and len(e.pixels) == 40
    runs = "".join("i" if t == processor.image_id else "." for t in e.ids).strip(".").split(".")
    assert [len(r) for r in runs if r] == [6, 4]


def test_response_is_the_answers_and_their_eos_only(processor, folder):
    e = processor.example(Records(write(folder, {"messages": say("What?", "First answer.", "And?", "Second one!")}))[0])
    assert processor.tokenizer.decode(e.ids[e.response]) == "First answer.<|im_end|>Second one!<|im_end|>"
    assert processor.tokenizer.decode(e.ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
        "First answer.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nSecond one!<|im_end|>")


def test_prompt_only_ends_where_the_last_answer_begins(processor, folder):
    e = processor.example(Records(write(folder, {"messages": say("What?", "First answer.", "And?", "Second one!")}))[0], prompt_only=True)
    text = processor.tokenizer.decode(e.ids)
    assert text.endswith("And?<|im_end|>\n<|im_start|>assistant\n") and "First answer." in text and "Second" not in text


def test_loss_on_all_leaves_out_the_vision_tokens_alone(folder):
    everything = Processor(str(ROOT / "tiny" / "vlm"), loss_on="all")
    e = everything.example(Records(write(folder, {"images": ["a.png"], "messages": say("<image>What?", "It.")}))[0])
    assert (~e.response).sum() == 6 + 2  # six image tokens, vision start and end


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_an_image_inside_an_answer_is_not_learnt(folder, loss_on):
    p = Processor(str(ROOT / "tiny" / "vlm"), loss_on=loss_on)
    e = p.example(Records(write(folder, {"images": ["a.png"], "messages": say("Draw.", "Here <image> it is.")}))[0])
    assert (e.ids == p.image_id).sum() == 6 and not np.isin(e.ids[e.response], sorted(p.vision_ids)).any()
    assert p.tokenizer.decode(e.ids[e.response]).endswith("Here  it is.<|im_end|>")


def test_a_list_of_images_may_be_one_path(folder):
    for row in ({"images": "a.png"}, {"image": ["a.png"]}):
        assert Records(write(folder, row | {"messages": say("<image>?", "Red.")}))[0]["images"] == [str(folder / "a.png")]


def test_other_forms_of_records(processor, folder):
    llava = {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]}
    array = folder / "r.json"
    array.write_text(json.dumps([llava, {"text": "Once upon a time."}, {"images": ["a.png"], "messages": say("no mark", "Red.")}]))
    r = Records(array)
    assert [m["role"] for m in r[0]["messages"]] == ["user", "assistant"] and r[0]["images"] == [str(folder / "a.png")]
    e = processor.example(r[1])
    assert processor.tokenizer.decode(e.ids) == "Once upon a time.<|im_end|>" and e.response.all() and e.pixels is None
    assert r[2]["messages"][0]["content"] == "<image>no mark"


def test_padding_sides(processor, folder):
    r = Records(write(folder, {"messages": say("Hi", "Yes.")}, {"messages": say("Hi hi hi hi", "No, no, no.")}))
    examples = [processor.example(r[i]) for i in range(2)]
    right, left = processor.collate(examples), processor.collate(examples, left=True)
    n = len(examples[0].ids)
    assert n < right.ids_BT.shape[1]
    assert right.mask_BT[0, :n].all() and not right.mask_BT[0, n:].any() and (right.ids_BT[0, n:] == processor.pad_id).all()
    assert left.mask_BT[0, -n:].all() and not left.mask_BT[0, :-n].any()
    assert torch.equal(right.ids_BT[0, :n], left.ids_BT[0, -n:]) and left.images_B.tolist() == [0, 0]


def test_text_view_leaves_the_image_out_and_lines_up(processor, folder):
    r = Records(write(folder, {"images": ["a.png"], "messages": say("Before <image> behind?", "Red it is.")},
                      {"images": ["b.png"], "messages": say("<image>What now?", "Blue.")}, {"messages": say("No image here?", "None at all, friend.")}))
    batch = processor.collate([processor.example(r[i]) for i in range(3)])
    view, index_BS, after_BS = processor.text_view(batch)
    assert not torch.isin(view.ids_BT, torch.tensor(sorted(processor.vision_ids))).any()
    assert view.images_B.tolist() == [0, 0, 0] and view.pixels is None
    for b in range(3):
        n = int(view.mask_BT[b].sum())
        dropped = 0 if b == 2 else int(batch.grids[b].prod()) // 4 + 2
        assert n == int(batch.mask_BT[b].sum()) - dropped
        assert torch.equal(view.ids_BT[b, :n], batch.ids_BT[b][index_BS[b, :n]])
        assert (index_BS[b, 1:n] > index_BS[b, :n - 1]).all()
        decode = processor.tokenizer.decode
        assert decode(view.ids_BT[b][view.response_BT[b]]) == decode(batch.ids_BT[b][batch.response_BT[b]])
    counted = processor.tokenizer.decode(view.ids_BT[0][after_BS[0]])
    assert counted.startswith(" behind?") and counted.endswith("Red it is.<|im_end|>")
    assert not after_BS[2].any()  # nothing comes behind an image that is not there


@pytest.mark.parametrize("row, message", [
    ({"id": 1}, "r.jsonl, row 2: no messages"),
    ("{broken", "r.jsonl, row 2: not JSON"),
    ([1], "row 2: a record must be a JSON object"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "row 2: a message needs role"),
    ({"images": ["a.png"], "messages": say("<image><image>", "x")}, "row 2: 2 <image> marks but 1 images"),
    ({"images": ["none.png"], "messages": say("<image>?", "x")}, "row 2: an image does not open"),
    ({"images": ["r.jsonl"], "messages": say("<image>?", "x")}, "row 2: an image does not open"),
    ({"images": ["wide.png"], "messages": say("<image>?", "x")}, "row 2: an image does not open"),
    ({"images": [None], "messages": say("<image>?", "x")}, "row 2: 'images' must be a list of paths"),
    ({"images": ["a.png"], "text": "a caption"}, "row 2: a 'text' row cannot have an image"),
    ({"messages": 5}, "row 2: no messages"),
    ({"conversations": ["hi", "there"]}, "row 2: a message needs role"),
    ({"messages": say("<|image_pad|>", "x")}, "row 2: the text holds a control token"),
    ({"messages": say("no answer")}, "row 2: no assistant message"),
    ({"messages": say("word " * 500, "x")}, "row 2: no answer to learn within 400 tokens"),
])
def test_a_bad_row_is_named(processor, folder, row, message):
    records = Records(write(folder, {"messages": say("Hi", "Yes.")}, row))
    processor.example(records[0])
    with pytest.raises(DataError, match=message):
        processor.example(records[1])


def test_files_that_cannot_be_read(folder):
    with pytest.raises(DataError, match="none.jsonl: no such file"):
        Records(folder / "none.jsonl")
    with pytest.raises(DataError, match="r.jsonl: holds no record"):
        Records(write(folder))
    (folder / "x.json").write_text("{")
    with pytest.raises(DataError, match="x.json: not JSON"):
        Records(folder / "x.json")


def test_a_row_that_is_not_utf8_is_named(folder):
    (folder / "l.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')  # Latin-1
    with pytest.raises(DataError, match="l.jsonl, row 1: not JSON"):
        Records(folder / "l.jsonl")[0]


def test_a_prompt_longer_than_the_limit_is_named(processor, folder):
    records = Records(write(folder, {"messages": say("word " * 500, "x")}))
    with pytest.raises(DataError, match=r"row 1: the prompt has \d+ tokens, the limit is 400; shorten it or raise the limit"):
        processor.example(records[0], prompt_only=True)


def test_each_epoch_is_a_permutation_and_resume_goes_on():
    stream = index_stream(10, seed=3)
    drawn = [int(next(stream)) for _ in range(30)]
    epochs = [drawn[k:k + 10] for k in (0, 10, 20)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    later = index_stream(10, seed=3, start=17)
    assert [int(next(later)) for _ in range(13)] == drawn[17:]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json"])
def test_batches_are_of_one_length_and_of_every_row(folder, name):
    lengths = np.random.default_rng(0).permutation(64) * 10
    rows = [{"id": k, "messages": say("Hi", "x" * int(n))} for k, n in enumerate(lengths)]
    records = Records(write(folder, *rows) if name == "r.jsonl" else write(folder, json.dumps(rows), name=name))
    stream = index_batches(records, size=4, seed=5, window=8)
    drawn = [[int(next(stream)) for _ in range(4)] for _ in range(32)]  # two epochs, two windows in each
    for epoch in (drawn[:16], drawn[16:]):
        assert sorted(sum(epoch, [])) == list(range(64))
        for window in (epoch[:8], epoch[8:]):  # one window's batches do not overlap in length, and are not in that order
            spans = [(min(lengths[b]), max(lengths[b])) for b in window]
            assert all(a[1] < b[0] for a, b in zip(sorted(spans), sorted(spans)[1:])) and spans != sorted(spans)
    later = index_batches(records, size=4, seed=5, start=44, window=8)
    assert [int(next(later)) for _ in range(20)] == sum(drawn, [])[44:64]


def test_ranks_and_resume_see_the_same_rows_also_with_refused_ones(processor, folder):
    rows = [{"id": k, "messages": say("Hi", f"Yes {k}.")} for k in range(9)]
    rows[4] = {"id": 4, "messages": say("no answer")}
    records = Records(write(folder, *rows))
    def ids(count, **kw):
        stream = batches(records, processor, seed=0, **kw)
        return [[r["id"] for r in next(stream).records] for _ in range(count)]
    refused = set()
    one = sum(ids(6, size=4, refused=refused), [])
    assert len(refused) == 1 and "row 5: no assistant message" in min(refused) and 4 not in one
    ranks = [sum(ids(6, size=2, rank=r, world=2, refused=set()), []) for r in range(2)]
    assert [x for pair in zip(*ranks) for x in pair] == one
    assert sum(ids(3, size=4, start=12, refused=set()), []) == one[12:]
    with pytest.raises(DataError, match="row 5"):
        ids(3, size=4)


# -------------------------------------------------------------------------------------------------------- MMRole
def raw_mmrole(root):
    """Twenty dialogues in the raw layout, one without an answer, half of the images missing; and two out of distribution."""
    for d in ("dialogues/in-distribution/comment", "dialogues/out-of-distribution", "profiles/in-distribution/detailed_profiles",
              "profiles/out-of-distribution/detailed_profiles", "images/Set"):
        (root / d).mkdir(parents=True)
    profile = {"introduction": "A long tale of a life. " * 40, "personality": "Kind.", "catchphrase": "Onwards!", "experience": "x", "relationship": "y"}
    for split, name in (("in", 'Ann_"A"_Lee'), ("out-of", "Bo")):
        (root / f"profiles/{split}-distribution/detailed_profiles/{name}.json").write_text(json.dumps(profile))
    def dialogue(k, who, image):
        return {"id": f"{who}-{k}", "image": image, "conversations": [
            {"from": "human", "value": f"What is it, {k}?"}, {"role": who, "value": f"First {k}."},
            {"from": "human", "value": "And then?"}, {"role": who, "value": f"Second {k}."}]}
    Image.new("RGB", (56, 56), "red").save(root / "images/Set/0.png")
    rows = [dialogue(k, 'Ann "A" Lee', "Set/0.png" if k % 2 else "COCO/1.jpg") for k in range(20)]
    rows.append({"id": "mute", "image": "Set/0.png", "conversations": [{"from": "human", "value": "Hello?"}]})
    (root / "dialogues/in-distribution/comment/Ann.json").write_text(json.dumps(rows))
    (root / "dialogues/out-of-distribution/comment.json").write_text(json.dumps([dialogue(k, "Bo", "COCO/2.jpg") for k in range(2)]))


def ready_mmrole(root):
    """The same in the preprocessed layout."""
    def dialogue(k, who, image):
        return {"id": f"{who}-{k}", "image_path": image, "character_role": who, "character_profile": {who: {"introduction": "Tall.", "personality": "Kind."}},
                "original_roles": ["human", who], "conversations": [
                    {"role": "user", "content": f"What is it, {k}?"}, {"role": "assistant", "content": f"First {k}."},
                    {"role": "user", "content": "And then?"}, {"role": "assistant", "content": f"Second {k}."}]}
    Image.new("RGB", (56, 56), "red").save(root / "0.png")
    rows = [dialogue(k, "Ann", "0.png" if k % 2 else "gone.jpg") for k in range(20)]
    rows.append(dialogue(20, "Ann", "0.png") | {"conversations": [{"role": "user", "content": "Hello?"}]})
    (root / "conversations-train-comment.json").write_text(json.dumps(rows))
    (root / "conversations-OODtest-comment.json").write_text(json.dumps([dialogue(k, "Bo", "gone.jpg") for k in range(2)]))


@pytest.mark.parametrize("layout", [raw_mmrole, ready_mmrole])
def test_mmrole(layout, tmp_path, processor):
    (tmp_path / "in").mkdir()
    layout(tmp_path / "in")
    counts = convert_mmrole(tmp_path / "in", tmp_path / "out")
    assert counts["refused"] == {"id: no answer": 1}
    # 20 usable dialogues of two answers: 10 demonstrations, 8 prompts, 2 tests; 18 for pretraining
    sizes = {k: v["records"] for k, v in counts.items() if k != "refused"}
    assert sizes["paired"] + sizes["text"] == 18
    assert {k: sizes[k] for k in sizes if k.startswith("task")} == {"task_demos": 20, "task_prompts": 16, "task_id": 4, "task_ood": 4}
    assert counts["paired"]["with image"] == sizes["paired"] and counts["text"]["with image"] == 0 and counts["task_ood"]["with image"] == 0
    files = {k: Records(tmp_path / "out" / f"{k}.jsonl") for k in sizes}
    dialogues = {k: {f[i]["messages"][-1]["content"].split()[-1] for i in range(len(f))} for k, f in files.items() if k != "task_ood"}
    assert not dialogues["task_demos"] & dialogues["task_prompts"] and not dialogues["task_id"] & (dialogues["paired"] | dialogues["text"])
    with_image = 0
    for f in files.values():
        for i in range(len(f)):
            with_image += processor.example(f[i]).pixels is not None
            system, user = f[i]["messages"][:2]
            assert f[i]["character"] in system["content"] and len(user["content"].encode()) < 500 and "Kind." in user["content"]
    assert with_image == sum(v["with image"] for k, v in counts.items() if k != "refused")
    second = next(r for r in map(files["task_demos"].__getitem__, range(20)) if r["messages"][-1]["content"].startswith("Second"))
    k = second["messages"][-1]["content"].split()[-1]
    assert f"First {k}" in second["messages"][1]["content"] and second["messages"][1]["content"].endswith("And then?")


def refusals(tmp_path, *rows):
    """The reasons for which the converter refuses in-distribution rows that stand beside the twenty good ones."""
    ready_mmrole(tmp_path)
    path = tmp_path / "conversations-train-comment.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:20] + list(rows)))
    counts = convert_mmrole(tmp_path, tmp_path / "out")
    assert counts["paired"]["records"] + counts["text"]["records"] == 18
    return counts["refused"]


@pytest.mark.parametrize("change, reason", [
    ({"conversations": None}, "not a dialogue"),
    ({"conversations": say("", "x")}, "empty turn"),
    ({"conversations": [{"role": "user", "content": "x"}, {"role": "Cid", "content": "x"}]}, "unknown speaker or no text"),
    ({"conversations": [{"role": "user", "content": "x"}, {"content": "x"}]}, "unknown speaker or no text"),
    ({"conversations": say("a", "b")[::-1]}, "does not begin with the human"),
    ({"conversations": say("a", "b") + say("c", "d")[1:]}, "two turns of one speaker in a row"),
    ({"character_profile": {}}, "no profile of the character"),
    ({"id": "again"}, "the same dialogue twice"),
])
def test_each_dialogue_is_used_or_refused_with_a_reason(tmp_path, change, reason):
    ready_mmrole(tmp_path)
    row = json.loads((tmp_path / "conversations-train-comment.json").read_text())[3]
    assert refusals(tmp_path, row | change) == {f"id: {reason}": 1}


def test_a_profile_is_cut_at_a_word_and_within_the_limit():
    text = short_profile({"introduction": "several " * 99, "personality": "words " * 99, "catchphrase": "Onwards!"}, 200)
    lines = [line.split(": ") for line in text.splitlines()]
    assert [name for name, _ in lines] == ["Introduction", "Personality", "Catchphrase"] and len(text) <= 200
    assert set(lines[0][1].split()) == {"several"} and set(lines[1][1].split()) == {"words"} and lines[2][1] == "Onwards!"
    full = {f: "x " * 500 for f in ("introduction", "personality", "catchphrase")}
    assert all(len(short_profile(full, n)) <= n for n in range(150, 300))  # line breaks count as well
    # Chinese has no spaces: 'Introduction: ' is 14 bytes and a character 3, so 100 - 15 bytes hold 28 and the early space
    text = short_profile({"introduction": "甲 " + "乙" * 500, "personality": "a", "catchphrase": "b"}, 300)
    assert text.splitlines()[0] == "Introduction: 甲 " + "乙" * 27 and len(text.encode()) <= 300


def test_the_raw_layout_needs_both_distributions(tmp_path):
    raw_mmrole(tmp_path)
    (tmp_path / "dialogues/out-of-distribution/comment.json").unlink()
    with pytest.raises(DataError, match="not MMRole; it needs dialogues/"):
        convert_mmrole(tmp_path, tmp_path / "out")


def test_the_command_ends_with_one_line_and_status_2(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "data.py", "--mmrole", tmp_path / "none", "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {tmp_path / 'none'}: not MMRole")


def test_not_mmrole(tmp_path):
    with pytest.raises(DataError, match="not MMRole; it needs dialogues/"):
        convert_mmrole(tmp_path, tmp_path / "out")


def test_the_real_data_set(tmp_path, processor):
    if "MMROLE" not in os.environ:
        pytest.skip("set MMROLE to the folder of the data set to try the real thing")
    counts = convert_mmrole(os.environ["MMROLE"], tmp_path)
    total = counts["paired"]["records"] + counts["text"]["records"] + sum(counts["refused"].values())
    assert total > 0 and counts["paired"]["records"] > 0
    f = Records(tmp_path / "task_ood.jsonl")
    assert all(len(processor.example(f[i]).ids) for i in np.arange(len(f)))
