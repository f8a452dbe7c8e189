"""convert/wikiweb2m.py: a TFRecord of pages, written here byte by byte as its formats are published, becomes a list."""

import csv
import gzip
import re
import struct

import pytest

from convert.wikiweb2m import main

COLUMNS = ("section_image_url", "section_image_mime_type", "section_image_clean_ref_desc")


# ----------------------------------------------------------------------------- tensorflow/core/example/*.proto
def number(n):
    """A varint."""
    out = bytearray()
    while n > 127:
        out.append(n % 128 + 128)
        n //= 128
    return bytes(out) + bytes([n])


def message(*parts):
    """A protobuf message of (number of a field, bytes)."""
    return b"".join(number(8 * field + 2) + number(len(data)) + data for field, data in parts)


def texts(values):
    """Feature { BytesList bytes_list = 1 { repeated bytes value = 1 } }"""
    return message((1, message(*((1, v.encode()) for v in values))))


def numbers(values):
    """Feature { Int64List int64_list = 3 { repeated int64 value = 1 [packed] } }"""
    return message((3, message((1, b"".join(map(number, values))))))


def entries(features, wrap):
    """map<string, X>: an entry has the key as field 1 and X as field 2."""
    return message(*((1, message((1, name.encode()), (2, wrap(feature)))) for name, feature in features.items()))


def page(title, sections):
    """SequenceExample { Features context = 1; FeatureLists feature_lists = 2 }. sections: [[(url, kind, caption)]]"""
    context = {"page_title": texts([title]), "page_contains_images": numbers([1])}
    lists = {"section_title": [texts([f"{title} {k}"]) for k in range(len(sections))]}
    lists["section_index"] = [numbers([k, 300]) for k in range(len(sections))]
    for k, name in enumerate(COLUMNS):
        lists[name] = [texts([image[k] for image in images]) for images in sections]
    features = entries(lists, lambda found: message(*((1, feature) for feature in found)))
    return message((1, entries(context, bytes)), (2, features))


def tfrecord(path, pages):
    """uint64 length, uint32 checksum, bytes, uint32 checksum, for each record; under gzip. (No checksum is read.)"""
    body = b"".join(struct.pack("<QI", len(p), 1) + p + struct.pack("<I", 2) for p in pages)
    path.write_bytes(gzip.compress(body))
    return str(path)


PAGES = [
    page("Cactus", [[], [("u/1.jpg", "image/jpeg", 'The "red"\tone.\n'), ("u/2.svg", "image/svg+xml", "A map.")]]),
    page("Empty", []),
    page("Moss", [[("u/3.png", "image/png", "Mousse é.")], [("u/4.jpg", "image/jpeg", " ")]]),
    page("Again", [[("u/1.jpg", "image/jpeg", "Once more."), ("u/5.jpg", "image/jpeg", "A " + "long " * 60 + "one.")]]),
]
WANT = [["u/1.jpg", 'The "red" one.'], ["u/3.png", "Mousse é."], ["u/5.jpg", "A " + "long " * 60 + "one."]]


def listed(path):
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.reader(f, delimiter="\t"))


@pytest.mark.parametrize("limit", [0, 2])
def test_pictures_with_captions_are_listed_once(tmp_path, capsys, limit):
    files = [tfrecord(tmp_path / f"wikiweb2m-train.tfrecord.gz-0000{k}", PAGES[k::2]) for k in (0, 1)]
    main([*files, "--out", f"{tmp_path}/w.tsv", "--limit", str(limit)])
    assert listed(tmp_path / "w.tsv") == [["url", "caption"], *WANT[: limit or 3]]
    assert f"w.tsv: {limit or 3} pictures" in capsys.readouterr().out


def test_a_section_whose_lists_differ_in_length_is_passed_over(tmp_path):
    lists = {COLUMNS[0]: [texts(["u/1.jpg", "u/2.jpg"])], COLUMNS[1]: [texts(["image/jpeg"] * 2)]}
    lists[COLUMNS[2]] = [texts(["of which one?"])]
    odd = message((2, entries(lists, lambda found: message(*((1, feature) for feature in found)))))
    main([tfrecord(tmp_path / "x", [odd, PAGES[2]]), "--out", f"{tmp_path}/w.tsv"])
    assert listed(tmp_path / "w.tsv")[1:] == [WANT[1]]


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda path: path.unlink(), "cannot be read .*fetch it again"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "cannot be read .*fetch it again"),
        (
            lambda path: path.write_bytes(gzip.compress(struct.pack("<QI", 99, 1) + b"short")),
            "cannot be read .a record",
        ),
        (lambda path: path.write_bytes(b"no gzip"), "cannot be read .*fetch it again"),
        (lambda path: tfrecord(path, [b"\x0a\xff"]), "its records are no pages of WikiWeb2M"),
        (lambda path: tfrecord(path, [page("None", [[]])]), "no picture with a caption"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, capsys, damage, reason):
    tfrecord(tmp_path / "x", PAGES)
    damage(tmp_path / "x")
    with pytest.raises(SystemExit) as end:
        main([f"{tmp_path}/x", "--out", f"{tmp_path}/w.tsv"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert re.match(f"error: {tmp_path}/x: {reason}", error)
