"""data.py: records, examples, the text view, batches; every error names the file and the row."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY
from PIL import Image

from data import DataError, Processor, Records, find, index_batches, index_stream, scan
from loader import batches
from records import refusals

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


def record(folder, row):
    return Records(write(folder, row))[0]


def say(*texts):
    return [{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(texts)]


FOUR_TURNS = {"messages": say("What?", "First answer.", "And?", "Second one!")}


# ----------------------------------------------------------------------------------------------------- examples


def test_images_become_a_quarter_as_many_tokens_as_patches(processor, folder):
    row = {"images": ["a.png", "b.png"], "messages": say("one <image> two <image>?", "Yes.")}
    e = processor.example(record(folder, row))
    # 84 x 56 pixels are 6 x 4 patches of 14, 6 tokens; 56 x 56 are 16 patches, 4 tokens
    assert e.grids.tolist() == [[1, 4, 6], [1, 4, 4]] and len(e.pixels) == 40
    runs = "".join("i" if t == processor.image_id else "." for t in e.ids).strip(".").split(".")
    assert [len(r) for r in runs if r] == [6, 4]


def test_response_is_the_answers_and_their_eos_only(processor, folder):
    e = processor.example(record(folder, FOUR_TURNS))
    assert processor.tokenizer.decode(e.ids[e.response]) == "First answer.<|im_end|>Second one!<|im_end|>"
    assert processor.tokenizer.decode(e.ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nFirst answer.<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nSecond one!<|im_end|>"
    )


def test_prompt_only_ends_where_the_last_answer_begins(processor, folder):
    e = processor.example(record(folder, FOUR_TURNS), prompt_only=True)
    text = processor.tokenizer.decode(e.ids)
    assert text.endswith("And?<|im_end|>\n<|im_start|>assistant\n") and "First answer." in text and "Second" not in text
    plain = processor.example(record(folder, {"text": "Once upon a time"}), prompt_only=True)
    assert processor.tokenizer.decode(plain.ids) == "Once upon a time" and not plain.response.any()


def test_every_control_token_but_eos_is_never_sampled(processor):
    names = ["endoftext", "im_start", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]
    never = processor.tokenizer.convert_ids_to_tokens(processor.never_sampled)
    assert never == [f"<|{name}|>" for name in names] and processor.eos == "<|im_end|>"


def test_ids_without_a_text_are_never_sampled(tmp_path):
    """A vocabulary that is larger than the tokenizer, as Qwen2.5-VL's is: the rest is filled up."""
    folder = tmp_path / "vlm"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    size = config["text_config"]["vocab_size"]
    config["text_config"]["vocab_size"] = size + 3
    (folder / "config.json").write_text(json.dumps(config))
    more = Processor(folder)
    words = len(more.tokenizer)
    assert set(range(words, size + 3)) <= set(more.never_sampled)
    tiny = set(Processor(TINY).never_sampled)
    assert set(more.never_sampled) - set(range(words, size + 3)) == tiny - set(range(words, size))


@pytest.mark.parametrize("what", ["tokenizer.json", "preprocessor_config.json", "config.json"])
def test_a_folder_without_one_of_its_files_is_named(tmp_path, what):
    shutil.copytree(TINY, tmp_path / "vlm")
    (tmp_path / "vlm" / what).write_text("{")
    with pytest.raises(DataError, match="--vlm .*does not load"):
        Processor(tmp_path / "vlm")


def test_what_looks_like_a_path_and_is_none_is_not_looked_up(tmp_path):
    for name in ("tiny/vlmx", "./vlm", "/nowhere/vlm", str(tmp_path / "vlm")):
        with pytest.raises(DataError, match="no such folder"):
            find(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        find(tmp_path / "file")
    assert find("someone/a-model-on-the-hub") == "someone/a-model-on-the-hub"


def test_loss_on_all_leaves_out_the_vision_tokens_alone(folder):
    everything = Processor(str(ROOT / "tiny" / "vlm"), loss_on="all")
    e = everything.example(record(folder, {"images": ["a.png"], "messages": say("<image>What?", "It.")}))
    assert (~e.response).sum() == 6 + 2  # six image tokens, vision start and end


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_an_image_inside_an_answer_is_not_learnt(folder, loss_on):
    p = Processor(str(ROOT / "tiny" / "vlm"), loss_on=loss_on)
    e = p.example(record(folder, {"images": ["a.png"], "messages": say("Draw.", "Here <image> it is.")}))
    assert (e.ids == p.image_id).sum() == 6 and not np.isin(e.ids[e.response], sorted(p.vision_ids)).any()
    assert p.tokenizer.decode(e.ids[e.response]).endswith("Here  it is.<|im_end|>")


def test_a_list_of_images_may_be_one_path(folder):
    for row in ({"images": "a.png"}, {"image": ["a.png"]}):
        assert record(folder, row | {"messages": say("<image>?", "Red.")})["images"] == [str(folder / "a.png")]


def test_other_forms_of_records(processor, folder):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    llava = {"id": 1, "image": "a.png", "conversations": turns}
    unmarked = {"images": ["a.png", "b.png"], "messages": [{"role": "system", "content": "x"}, *say("no mark", "Red.")]}
    array = folder / "r.json"
    array.write_text(json.dumps([llava, {"text": "Once upon a time."}, unmarked]))
    r = Records(array)
    assert r[0]["messages"] == say("<image>\nWhat?", "Red.") and r[0]["images"] == [str(folder / "a.png")]
    e = processor.example(r[1])
    assert processor.tokenizer.decode(e.ids) == "Once upon a time.<|im_end|>" and e.response.all() and e.pixels is None
    assert [m["content"] for m in r[2]["messages"]] == ["x", "<image><image>no mark", "Red."]


def test_rows_of_a_file_are_found_behind_blank_lines_and_up_to_a_limit(folder):
    lines = ['{"text": "a"}', "", " ", '{"text": "bcd"}', '{"text": "e"}']
    path = write(folder, *lines)
    records = Records(path, limit=2)
    assert [records[i]["text"] for i in range(len(records))] == ["a", "bcd"]
    # 13 characters and the line end, the two blank lines of 1 and 2; 15 characters and the line end
    assert records.sizes.tolist() == [14 + 3, 16]


# ------------------------------------------------------------------------------------------------------ batches
def test_padding_sides(processor, folder):
    r = Records(write(folder, {"messages": say("Hi", "Yes.")}, {"messages": say("Hi hi hi hi", "No, no, no.")}))
    examples = [processor.example(r[i]) for i in range(2)]
    right, left = processor.collate(examples), processor.collate(examples, left=True)
    n = len(examples[0].ids)
    assert n < right.ids_BT.shape[1]
    assert right.mask_BT[0, :n].all() and not right.mask_BT[0, n:].any()
    assert (right.ids_BT[0, n:] == processor.pad_id).all()
    assert left.mask_BT[0, -n:].all() and not left.mask_BT[0, :-n].any()
    assert torch.equal(right.ids_BT[0, :n], left.ids_BT[0, -n:]) and left.images_B.tolist() == [0, 0]


def three(processor, folder):
    """-> Examples with 6 image tokens, 4 image tokens, and none."""
    rows = [
        {"images": ["a.png"], "messages": say("Before <image> behind?", "Red it is.")},
        {"images": ["b.png"], "messages": say("<image>What now?", "Blue.")},
        {"messages": say("No image here?", "None at all, friend.")},
    ]
    records = Records(write(folder, *rows))
    return [processor.example(records[i]) for i in range(3)]


def test_some_rows_of_a_batch_have_their_own_images(processor, folder):
    a, b, none = three(processor, folder)
    batch = processor.collate([none, a, none, b])
    part = batch.rows(slice(1, 3))
    assert torch.equal(part.ids_BT, batch.ids_BT[1:3]) and torch.equal(part.mask_BT, batch.mask_BT[1:3])
    assert torch.equal(part.response_BT, batch.response_BT[1:3]) and part.images_B.tolist() == [1, 0]
    assert torch.equal(part.pixels, a.pixels) and torch.equal(part.grids, a.grids)
    assert part.records == [a.record, none.record]
    last = batch.rows(slice(3, 4))
    assert torch.equal(last.pixels, b.pixels) and torch.equal(last.grids, b.grids)
    assert batch.rows(slice(2, 3)).pixels is None


def test_text_view_leaves_the_image_out_and_lines_up(processor, folder):
    batch = processor.collate(three(processor, folder))
    view, index_BS, after_BS = processor.text_view(batch)
    assert not torch.isin(view.ids_BT, torch.tensor(sorted(processor.vision_ids))).any()
    assert view.images_B.tolist() == [0, 0, 0] and view.pixels is None
    for b in range(3):
        n = int(view.mask_BT[b].sum())
        dropped = 0 if b == 2 else int(batch.grids[b].prod()) // 4 + 2
        assert n == int(batch.mask_BT[b].sum()) - dropped
        assert torch.equal(view.ids_BT[b, :n], batch.ids_BT[b][index_BS[b, :n]])
        assert (index_BS[b, 1:n] > index_BS[b, : n - 1]).all()
        decode = processor.tokenizer.decode
        assert decode(view.ids_BT[b][view.response_BT[b]]) == decode(batch.ids_BT[b][batch.response_BT[b]])
    counted = processor.tokenizer.decode(view.ids_BT[0][after_BS[0]])
    assert counted.startswith(" behind?") and counted.endswith("Red it is.<|im_end|>")
    assert not after_BS[2].any()  # nothing comes behind an image that is not there


# ------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "row, message",
    [
        ({"id": 1}, "r.jsonl, row 2: no messages"),
        ("{broken", "r.jsonl, row 2: not JSON"),
        ([1], "row 2: a record must be a JSON object"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "row 2: a message needs role"),
        ({"images": ["a.png"], "messages": say("<image><image>", "x")}, "row 2: 2 <image> marks but 1 images"),
        (
            {"images": ["a.png"], "messages": [{"role": "system", "content": "x"}, *say("?", "x")[1:]]},
            "row 2: has an image but no user message",
        ),
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
        (
            {"images": ["a.png"], "messages": say("word " * 500 + "<image>", "x")},
            "row 2: 400 tokens are too few for its",
        ),
    ],
)
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
    (folder / "x.json").write_text("{}")
    with pytest.raises(DataError, match="x.json: must hold a JSON array"):
        Records(folder / "x.json")


def test_a_row_that_is_not_utf8_is_named(folder):
    (folder / "l.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')  # Latin-1
    with pytest.raises(DataError, match="l.jsonl, row 1: not JSON"):
        Records(folder / "l.jsonl")[0]


def test_a_prompt_longer_than_the_limit_is_named(processor, folder):
    records = Records(write(folder, {"messages": say("word " * 500, "x")}))
    message = r"row 1: the prompt has \d+ tokens, the limit is 400; shorten it or raise the limit"
    with pytest.raises(DataError, match=message):
        processor.example(records[0], prompt_only=True)


# ------------------------------------------------------------------------------------------------------ samplers
def test_each_epoch_is_a_permutation_and_resume_goes_on():
    stream = index_stream(10, seed=3)
    drawn = [int(next(stream)) for _ in range(30)]
    epochs = [drawn[k : k + 10] for k in (0, 10, 20)]
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
        for window in (epoch[:8], epoch[8:]):  # its batches do not overlap in length, and are not in that order
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


def test_a_file_of_which_no_row_can_be_used(processor, folder):
    records = Records(write(folder, {"messages": say("no answer")}, {"messages": say("none")}))
    with pytest.raises(DataError, match="r.jsonl: no row can be used; the first reason: .*row 1: no assistant message"):
        next(batches(records, processor, size=1, seed=0, refused=set()))


# ------------------------------------------------------------------------------------------- what a row may be
GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "a caption", **GOOD}, "has both 'text' and 'messages'; keep the one"),
        ({"conversations": [{"from": "human", "value": "?"}], **GOOD}, "has both 'messages' and 'conversations'"),
        ({"image": "a.png", "images": ["b.png"], **GOOD}, "has both 'image' and 'images'"),
        ({"messages": GOOD["messages"][1:]}, "the assistant speaks first; put the user's"),
        ({"messages": say("Hi", " ")}, "an answer is empty"),
        ({"text": "half \ud83d of a smile"}, r"holds \\ud83d, half of a character"),
        ({"messages": say("Hi", "\udc80")}, r"holds \\udc80, half of a character"),
        ({"facts": {"\ud800": 1}, **GOOD}, r"holds \\ud800, half of a character"),
        ({"text": 5}, "'text' must be a string"),
        ({"text": None}, "no messages; a record needs"),
        ({"id": {"a": 1}, **GOOD}, "'id' must be a string or a number"),
        ({"images": False, **GOOD}, "'images' must be a list of paths"),
        ({"images": "a\0.png", **GOOD}, "an image has no possible path"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "a message needs role"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "a message needs role"),
        ({"messages": [{"role": "user", "content": None}]}, "a message needs role"),
        ({"messages": ["Hi"]}, "a message needs role"),
        ('{"text": "x"', "not JSON"),
        ('{"text": NaN}', "'text' must be a string"),
        ('{"id": ' + "9" * 5000 + "}", "not JSON"),
        ('{"text": "x"} {"text": "y"}', "not JSON"),
        ('{"a": ' + "[" * 30 + "]" * 30 + ', "text": "x"}', "nested more than 20 levels deep"),
        ('{"a": ' + "[" * 10**5 + "]" * 10**5 + ', "text": "x"}', "nested too deeply"),
        ({"text": "x " * 2**19}, "longer than 1048576 bytes; cut it"),
        ({"images": ["a.png"] * 401, **GOOD}, "401 images, the limit is 400 tokens"),
    ],
)
def test_each_kind_of_bad_row_has_its_reason_before_any_step(processor, folder, row, message):
    records = Records(write(folder, {"text": "good"}, row, {"text": "good"}))
    found = scan(records, processor)
    assert found.usable.tolist() == [0, 2] and list(found.refused) == [1]
    with pytest.raises(DataError, match=f"r.jsonl, row 2: {message}"):
        processor.example(records[1])


@pytest.mark.parametrize("depth", [*range(880, 1000, 6), 3000])
def test_nesting_of_any_depth_is_refused_at_any_depth_of_the_caller(folder, depth):
    nested = '{"a": ' + "[" * depth + "]" * depth + ', "text": "x"}'
    records = Records(write(folder, nested))
    with pytest.raises(DataError, match="nested"):
        records[0]
    with pytest.raises(DataError, match="nested"):  # one such row makes an array unreadable, or itself
        Records(write(folder, f"[{nested}]", name="r.json"))[0]


def test_fields_that_are_null_or_blank_count_as_absent(processor, folder):
    empty = {"id": None, "text": None, "conversations": [], "image": "", "images": None}
    learnt = [processor.example(record(folder, row)).ids.tolist() for row in (GOOD, empty | GOOD)]
    assert learnt[0] == learnt[1]
    caption = record(folder, {"text": "caption", "messages": None, "images": []})
    assert processor.tokenizer.decode(processor.example(caption).ids) == "caption<|im_end|>"


def test_other_fields_are_kept_and_those_of_a_message_are_dropped(folder):
    row = {"id": 7, "facts": [None, 1.5], "messages": [m | {"tool_calls": [1], "name": 5} for m in GOOD["messages"]]}
    got = record(folder, row)
    assert got["id"] == 7 and got["facts"] == [None, 1.5] and got["messages"] == GOOD["messages"]


def test_a_template_that_refuses_a_dialogue_or_rewrites_it(folder):
    p = Processor(str(ROOT / "tiny" / "vlm"))
    r = record(folder, GOOD)
    p.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"row 1: the chat template refuses this dialogue \(roles must alternate\)"):
        p.example(r)
    for template in ("{{ messages | length }}<|im_end|>", "{% for m in messages %}{{ m['content'] }}{% endfor %}"):
        p.tokenizer.chat_template = template
        with pytest.raises(DataError, match="row 1: the chat template does not extend its own prefix"):
            p.example(r)


def test_a_dialogue_of_very_many_turns_costs_no_more_than_its_first_tokens(processor, folder):
    r = record(folder, {"messages": say(*["a"] * 2000)})
    rendered = []
    plain = processor._render
    processor._render = lambda *args: rendered.append(1) or plain(*args)
    try:
        assert len(processor.example(r).ids) == 400 and len(rendered) < 200
        with pytest.raises(DataError, match=r"row 1: the prompt has \d+ tokens, the limit is 400"):
            processor.example(r, prompt_only=True)
    finally:
        del processor._render


# -------------------------------------------------------------------------------------- rows of public data sets
def test_rows_as_users_of_public_data_sets_have_them(processor, folder):
    """LLaVA-Pretrain, LLaVA-NeXT, CC12M, ShareGPT and its relatives, SlimPajama: field for field."""
    question, answer = {"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A square."}
    marked = {"from": "human", "value": "Render a clear summary.\n<image>"}
    both = say("What is it?", "A square.")
    rows = [
        {"id": "004539375", "image": "a.png", "conversations": [marked, answer]},
        {"id": "t1", "image": "a.png", "data_source": "sharegpt4v", "conversations": [question, answer]},
        {"image": "a.png", "caption": "a square <PERSON> drew", "url": "http://x", "key": "000000000", "width": 84},
        {"id": "QWJhYvA_0", "conversations": [question, answer]},
        {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "user", "value": "Hi"}, answer]},
        {"system": "Be kind.", "tools": "", "conversations": [question, {"from": "chatgpt", "value": "A square."}]},
        {"text": "A page.", "meta": {"redpajama_set_name": "RedPajamaC4"}},
    ]
    records = Records(write(folder, *rows))
    found = [records[i] for i in range(len(records))]
    system = {"role": "system", "content": "Be kind."}
    assert [r.get("messages") for r in found] == [
        say("Render a clear summary.\n<image>", "A square."),
        say("<image>What is it?", "A square."),
        say("<image>Describe the image.", "a square <PERSON> drew"),
        both,
        [system, *say("Hi", "A square.")],
        [system, *both],
        None,
    ]
    assert found[2]["url"] == "http://x" and found[6]["text"] == "A page."
    assert [len(r["images"]) for r in found] == [1, 1, 1, 0, 0, 0, 0]
    assert scan(records, processor, decode=True).usable.tolist() == list(range(7))


def test_each_fault_of_a_file_as_users_have_it_is_one_line_and_the_rows_around_it_are_used(processor, folder):
    Image.effect_noise((84, 56), 50).convert("RGB").save(folder / "c.jpg")
    (folder / "torn.jpg").write_bytes((folder / "c.jpg").read_bytes()[:-300])
    good = json.dumps({"image": "c.jpg", **GOOD})
    faults = {
        '{"image": "gone.jpg", "caption": "x"}': "an image does not open",
        '{"image": "torn.jpg", "caption": "x"}': "an image does not open",
        '{"conversations": []}': "no messages",
        '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "tool", "value": "x"}]}': "a message needs role",
        '{"messages": [{"role": "user", "content': "not JSON",
        '{"text": "caf\xe9"}': "not JSON",  # written in latin-1 below
        json.dumps({"messages": say("word " * 600, "an answer that begins behind the limit")}): "no answer to learn",
    }
    lines = [line for fault in faults for line in (good, fault)] + [good]
    (folder / "r.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    records = Records(folder / "r.jsonl")
    found = scan(records, processor, decode=True)
    assert found.usable.tolist() == list(range(0, 15, 2))
    for row, why in zip(range(1, 15, 2), faults.values()):
        assert f"r.jsonl, row {row + 1}: " in found.refused[row] and why in found.refused[row]
        assert "\n" not in found.refused[row]
        with pytest.raises(DataError, match=f"row {row + 1}: "):
            scan(records, processor, decode=True, rows=[row], strict=True)
    said = str(found).splitlines()
    assert said[0].endswith("7 of 15 rows cannot be used") and len(said) == 5 and "other kinds" in said[4]
    long = record(folder, {"messages": say("Hi", "word " * 600)})
    assert len(processor.example(long).ids) == 400  # an answer that only ends behind the limit is cut there


def test_captions_that_are_none(processor, folder):
    rows = [
        {"caption": "a square"},
        {"image": "a.png", "caption": " "},
        {"image": "a.png", "caption": 5},
        {"image": "none.png", "caption": "a square"},
        {"image": "a.png", "caption": "of the whole set", **GOOD},
    ]
    found = scan(Records(write(folder, *rows)), processor)
    assert found.usable.tolist() == [4]  # where there are messages, a caption is a field like any other
    for row, why in enumerate(("a caption without an image", "an answer is empty", "no messages", "does not open")):
        assert why in found.refused[row]


# ------------------------------------------------------------------------------------------------ files of records
@pytest.mark.parametrize("name", ["r.jsonl", "r.json"])
def test_a_byte_order_mark_and_windows_line_ends(folder, name):
    rows = ['{"text": "a"}', '{"text": "é"}']
    text = "\r\n".join(rows) if name == "r.jsonl" else f"[{', '.join(rows)}]\r\n"
    (folder / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    records = Records(folder / name)
    assert [records[i]["text"] for i in range(len(records))] == ["a", "é"]


def test_files_in_another_encoding_or_torn_at_the_end(processor, folder):
    whole = '{"text": "a"}\n{"text": "bc"}\n'
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        (folder / "r.jsonl").write_bytes(whole.encode(encoding))
        assert not len(scan(Records(folder / "r.jsonl"), processor).usable)
    (folder / "r.jsonl").write_text(whole[:-4])
    found = scan(Records(folder / "r.jsonl"), processor)
    assert found.usable.tolist() == [0] and "r.jsonl, row 2: not JSON" in found.refused[1]
    for content in ("", "\n\n", " \r\n"):
        (folder / "r.jsonl").write_text(content)
        with pytest.raises(DataError, match="r.jsonl: holds no record"):
            Records(folder / "r.jsonl")


def test_a_huge_line_is_never_held_whole(folder):
    with open(folder / "r.jsonl", "wb") as f:
        f.write(b'{"text": "a"}\n{"text": "')
        f.truncate(2**26)  # a hole, which takes no place on disk
    tracemalloc.start()
    records = Records(folder / "r.jsonl")
    assert len(records) == 2 and records[0]["text"] == "a"
    with pytest.raises(DataError, match="row 2: longer than 1048576 bytes"):
        records[1]
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


def test_a_file_that_goes_away(folder):
    records = Records(write(folder, {"text": "a"}))
    (folder / "r.jsonl").unlink()
    with pytest.raises(DataError, match="r.jsonl, row 1: cannot be read"):
        records[0]
    with pytest.raises(DataError, match="no such file"):
        Records(folder / ("x" * 5000))


# -------------------------------------------------------------------------------------- images outside the folder
def test_images_outside_the_folder_need_a_word(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    Image.new("RGB", (56, 56)).save(outside / "a.png")
    (inside / "link.png").symlink_to(outside / "a.png")
    (inside / "links").symlink_to(outside)
    for path in (
        "../out/a.png",
        str(outside / "a.png"),
        "link.png",
        "links/a.png",
        "../in2/a.png",
        "x/../../out/a.png",
    ):
        file = write(inside, {"images": [path], **GOOD})
        with pytest.raises(DataError, match="row 1: the image .*a?.png lies outside .* --allow-outside"):
            Records(file)[0]
        assert Records(file, allow_outside=True)[0]["images"] == [str(inside / path)]
    Image.new("RGB", (56, 56)).save(inside / "b.png")
    (inside / "same.png").symlink_to("b.png")
    (tmp_path / "data").symlink_to(inside)  # the folder itself may be a link
    for path in ("b.png", "./b.png", "x/../b.png", "same.png", str(inside / "b.png")):
        file = write(tmp_path / "data", {"images": [path], **GOOD})
        assert Records(file)[0]["images"] == [str(tmp_path / "data" / path)]


# ------------------------------------------------------------------------------------------------------------ scan
def test_scan_raises_and_accepts_what_example_does(processor, folder):
    rows = [
        {"images": ["a.png"], **GOOD},
        {"images": ["none.png"], **GOOD},
        {"messages": say("no answer")},
        {"messages": say("word " * 500, "x")},
        {"messages": say("<|im_end|>", "x")},
        {"text": "plain"},
    ]
    records = Records(write(folder, *rows))
    for prompt_only in (False, True):
        for i in range(len(records)):
            raised = []
            for read in (processor.check, processor.example):
                try:
                    read(records[i], prompt_only)
                    raised.append(None)
                except DataError as e:
                    raised.append(str(e))
            assert raised[0] == raised[1]
    found = scan(records, processor)
    assert found.usable.tolist() == [0, 5] and found.usable.dtype == np.int64 and list(found.refused) == [1, 2, 3, 4]
    assert scan(records, processor, rows=[2, 5]).usable.tolist() == [5]
    with pytest.raises(DataError, match="row 2: an image does not open"):
        scan(records, processor, strict=True)


@pytest.mark.parametrize("name", ["r.jsonl", "r.json"])
def test_only_the_usable_rows_keep_their_names(processor, folder, name):
    rows = [{"text": "a"}, {"text": 5}, {"text": "ccc"}, {"text": 6}]
    path = write(folder, *rows) if name == "r.jsonl" else write(folder, json.dumps(rows), name=name)
    records = Records(path)
    some = records.only(scan(records, processor).usable)
    assert [some[i]["text"] for i in range(len(some))] == ["a", "ccc"] and some[1]["where"] == f"{path}, row 3"
    assert some.sizes.tolist() == [records.sizes[0], records.sizes[2]] and len(records) == 4
    again = some.only([1])
    assert again[0]["text"] == "ccc" and len(again) == 1
    assert [next(batches(some, processor, 2, 0)).ids_BT.shape[0]] == [2]


def test_the_console_says_how_many_rows_and_why(processor, folder):
    rows = [{"text": "a"}] * 30 + [{"text": 5}] * 4 + [{"id": 1}] + [{"messages": say("x")}] * 3 + ["{"]
    records = Records(write(folder, *rows))
    found = scan(records, processor)
    path = folder / "r.jsonl"
    assert str(found).splitlines() == [
        f"{path}: 9 of 39 rows cannot be used",
        "  row 31: 'text' must be a string, this is 5 (and 3 rows for such a reason)",
        "  row 35: no messages; a record needs 'messages', 'conversations', 'text' or 'caption'",
        "  row 36: no assistant message; there is nothing to learn or to compare with (and 2 rows for such a reason)",
        "  other kinds of reasons: 1",
    ]
    assert str(scan(records, processor, rows=range(30))) == ""
    refused = set()
    stream = batches(records, processor, 13, 0, refused=refused)
    for _ in range(3):
        next(stream)
    assert refusals(path, 39, refused) == str(found)  # as a run sees them, one by one
