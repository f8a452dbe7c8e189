"""convert/captions.py: a folder as img2dataset leaves it becomes records that the stages read."""

import json

import pytest
from helpers import TINY
from PIL import Image

from convert.captions import convert_captions, main
from data import DataError, Processor, Records, scan


def img2dataset(folder):
    """Two shards of four images each: one without a caption, an empty one, one in another encoding, a torn JPEG."""
    for shard in ("00000", "00001"):
        (folder / shard).mkdir(parents=True)
        for k in range(4):
            path = folder / shard / f"{shard}{k:04}.jpg"
            Image.effect_noise((84, 56), 50).convert("RGB").save(path)
            path.with_suffix(".txt").write_text(f"a picture, {k} é\n", encoding="utf-8")
            path.with_suffix(".json").write_text(json.dumps({"key": path.stem, "status": "success"}))
    (folder / "00000/000000001.txt").unlink()
    (folder / "00000/000000002.txt").write_text(" \n")
    (folder / "00001/000010003.txt").write_bytes("é".encode("latin-1"))
    torn = folder / "00001/000010000.jpg"
    torn.write_bytes(torn.read_bytes()[:-300])
    return folder


def test_captions_become_records_and_the_rest_is_counted(tmp_path, capsys):
    main([str(img2dataset(tmp_path))])
    counts = json.loads(capsys.readouterr().out)
    assert counts["records"] == 5
    assert counts["refused"] == {"no caption": 1, "an empty caption": 1, "a caption that is not UTF-8": 1}
    records = Records(tmp_path / "paired.jsonl")
    assert [records[i]["id"] for i in range(5)] == ["000000000", "000000003", "000010000", "000010001", "000010002"]
    assert records[1]["messages"][1] == {"role": "assistant", "content": "a picture, 3 é"}
    found = scan(records, Processor(TINY, 400), decode=True)
    assert found.usable.tolist() == [0, 1, 3, 4] and "an image does not open" in found.refused[2]


def test_folders_without_captions_are_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "x.jpg").touch()
    with pytest.raises(DataError, match=r"no image with a caption beside it .* refused: {'no caption': 1}"):
        convert_captions(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jpg"]
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "none")])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def n24news(folder):
    """The archive of N24News: the fields of its list, one picture that is not there, and a caption that is empty."""
    (folder / "news").mkdir(parents=True)
    (folder / "imgs").mkdir()
    captions = ["Antarctica21&rsquo;s ship.", "A torn picture.", "", "No picture.", "The &ldquo;Kura&rdquo; chain."]
    rows = []
    for k, caption in enumerate(captions):
        name = f"42d25485-0e48-50bf-8d16-94883{k:07}"
        row = {"section": "Travel", "headline": "News", "abstract": "Here.", "caption": caption, "image_id": name}
        row |= {"image_url": f"https://x/{k}.jpg", "article_url": f"https://x/{k}.html", "body": "Long."}
        rows.append(row)
        if k != 3:
            Image.new("RGB", (84, 56), (40 * k, 0, 90)).save(folder / "imgs" / f"{name}.jpg")
    (folder / "news/nytimes_dataset.json").write_text(json.dumps(rows))
    return folder


def test_n24news_becomes_records_in_its_order(tmp_path, capsys):
    main([str(n24news(tmp_path)), "--form", "n24news"])
    assert json.loads(capsys.readouterr().out) == {"records": 3, "refused": {"an empty caption": 1, "no image": 1}}
    records = Records(tmp_path / "paired.jsonl")
    said = [records[i]["messages"][1]["content"] for i in range(3)]
    assert said == ["Antarctica21\u2019s ship.", "A torn picture.", "The \u201cKura\u201d chain."]
    assert scan(records, Processor(TINY, 400), decode=True).usable.tolist() == [0, 1, 2]


@pytest.mark.parametrize("text", [None, "[", '["x"]', '[{"caption": "x"}]'])
def test_no_n24news_is_refused_in_one_line(tmp_path, text):
    n24news(tmp_path)
    news = tmp_path / "news/nytimes_dataset.json"
    news.unlink() if text is None else news.write_text(text)
    with pytest.raises(DataError, match=r"news/nytimes_dataset.json: cannot be read .*; unpack the archive of N24News"):
        convert_captions(tmp_path, "n24news")
    assert not (tmp_path / "paired.jsonl").exists()
