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
