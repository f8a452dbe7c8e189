"""Mutated records, pictures and MMRole rows: whatever comes in, what comes out is an example or a DataError.

    python tests/fuzz.py            # 5,000 of each kind of records, 5,000 pictures, 5,000 rows of each MMRole layout
    python tests/fuzz.py --count 200 --seed 1

The mutations are seeded. Each item has a limit of time, kept by a thread of faulthandler: a hang inside a C library
ends the process with a traceback. Printed: counts of what was accepted and refused, the slowest item, and how much the
process grew after the first fifth of the items."""

import argparse
import copy
import faulthandler
import io
import json
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, features

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from convert.mmrole import convert_mmrole  # noqa: E402
from data import DataError, Processor, Records, scan  # noqa: E402

LIMIT = 10  # seconds for one item

# -------------------------------------------------------------------------------------------------------- mutations
JUNK = [None, True, 0, -1, 1e308, 10**30, [], {}, [[]], [None], {"role": "user"}, {"from": "gpt", "value": "x"}]
JUNK += ["", " ", "x", "<image>", "<image>" * 3, "<|im_end|>", "\ud83d", "\udc80\ud800", "\0", "é" * 300, "甲乙"]
JUNK += ["a.png", "../a.png", "/etc/passwd", "torn.png", "x" * 5000, "word " * 600, "user", "assistant", "system"]
JUNK += [json.loads("[" * 40 + "]" * 40)]


def junk(rng, instead_of=None):
    """Anything; instead of text mostly other text, which gets further."""
    strings = isinstance(instead_of, str) and rng.random() < 0.7
    return copy.deepcopy(rng.choice([x for x in JUNK if isinstance(x, str) or not strings]))


def places(value):
    """Every (container, key) inside a JSON value."""
    found, todo = [], [value]
    while todo:
        at = todo.pop()
        if not isinstance(at, (dict, list)):
            continue
        keys = list(at) if isinstance(at, dict) else range(len(at))
        found += [(at, key) for key in keys]
        todo += [at[key] for key in keys]
    return found


def mutated_value(value, rng):
    """One to three changes of the structure: a value becomes junk, goes, comes twice, moves, or changes its name."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = places(value)
        if not found:
            return junk(rng)
        (at, key), (other, name) = rng.choice(found), rng.choice(found)
        change = rng.randrange(7)
        if change <= 2:
            at[key] = junk(rng, at[key])
        elif change == 3:
            del at[key]
        elif change == 4 and isinstance(at, list):
            at.insert(key, at[key])
        elif change == 5 and isinstance(at, dict):
            at[rng.choice(("text", "messages", "image", "images", "id", "role", "conversations", "x"))] = at.pop(key)
        else:
            at[key] = copy.deepcopy(other[name])
    return value


def mutated_bytes(data, rng, head=64):
    """A few flipped bits, replaced bytes, a cut, a hole or a doubled piece; half of them near the beginning."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not data:
            break
        k = rng.randrange(min(head, len(data)) if rng.random() < 0.5 else len(data))
        change = rng.randrange(6)
        if change <= 1:
            data[k] ^= 1 << rng.randrange(8)
        elif change == 2:
            data[k : k + 4] = rng.randbytes(min(4, len(data) - k))
        elif change == 3:
            data[k : k + 2] = rng.choice((b"\0\0", b"\xff\xff", b"\x7f\xff", b"\x80\0"))
        elif change == 4:
            del data[k : k + rng.choice((1, 20, 200, len(data)))]
        else:
            data[k:k] = data[k : k + rng.randrange(1, 200)]
    return bytes(data)


# ------------------------------------------------------------------------------------------------------------ kinds
SAY = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A star."}]
RECORDS = {
    "messages": {"id": "a", "images": ["a.png"], "messages": SAY + [m | {"content": "And?"} for m in SAY]},
    "llava": {
        "id": 1,
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}],
    },
    "text": {"id": "t", "text": "Once upon a time there was a star.", "facts": {"colour": ["red", 1]}},
}


class Watch:
    """Counts, the slowest item, and the growth of the process. `with watch:` around each item."""

    def __init__(self, count):
        self.count, self.done, self.slowest, self.outcomes, self.at_start = count, 0, 0.0, Counter(), 0

    def __enter__(self):
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        self.began = time.perf_counter()

    def __exit__(self, *_):
        faulthandler.cancel_dump_traceback_later()
        self.slowest = max(self.slowest, time.perf_counter() - self.began)
        self.done += 1
        if self.done == max(1, self.count // 5):
            self.at_start = resident()

    def report(self):
        """-> dict: counts, seconds of the slowest item, MB by which the process grew."""
        return dict(self.outcomes) | {"slowest": round(self.slowest, 3), "grown": resident() - self.at_start}


def resident():
    """Memory of this process in MB."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) // 1024 for line in f if line.startswith("VmRSS"))


def outcome(processor, records):
    """Read the only row in every way that a run does. -> 'accepted' or 'refused'; anything but DataError is raised."""
    accepted = 0
    for prompt_only in (False, True):
        try:
            e = processor.example(records[0], prompt_only)
        except DataError as error:
            str(error).encode()  # as the console and state.json will
            continue
        accepted += 1
        assert len(e.ids) <= processor.max_length and (prompt_only or e.response[1:].any())
        assert scan(records, processor, prompt_only).usable.tolist() == [0]  # scan is no stricter
        processor.collate([e])
    return "accepted" if accepted else "refused"


def fuzz_records(processor, folder, kind, count, seed):
    """`count` mutated records of a kind, half of them in their structure, half in their bytes. -> Watch.report()"""
    rng, watch = random.Random(f"{kind} {seed}"), Watch(count)
    Image.new("RGB", (56, 56), "red").save(folder / "a.png")
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:60])
    for n in range(count):
        line = json.dumps(mutated_value(RECORDS[kind], rng) if n % 2 else RECORDS[kind]).encode()
        line = line if n % 2 else mutated_bytes(line, rng, 1000)
        as_array = n % 8 == 1
        path = folder / ("r.json" if as_array else "r.jsonl")
        path.write_bytes(b"[" + line + b"]" if as_array else line)
        with watch:
            try:
                watch.outcomes[outcome(processor, Records(path))] += 1
            except DataError:  # the whole file: empty, or no array
                watch.outcomes["refused"] += 1
    return watch.report()


def pictures_to_mutate():
    """{name: bytes} in every format that is read, and in some that are not."""
    y, x = np.mgrid[0:60, 0:90]
    rgb = Image.fromarray(np.stack([x * 2, y * 4, (x * y) % 256], -1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True}
    ways = {"png": {}, "bmp": {}, "ppm": {}, "ico": {}, "dds": {}, "tga": {}, "jpeg2000": {}, "gif": frames}
    ways |= {"jpeg": {"exif": exif}, "webp": {"exif": exif}, "tiff": {"compression": "tiff_lzw"}}
    ways |= {"png:P": {}, "png:I;16": {}, "png:RGBA": frames, "webp:RGBA": frames, "gif:P": {}, "tiff:L": {}}
    ways |= {"jpeg:CMYK": {}, "jpeg:L": {"progressive": True}, "tiff:CMYK": {"compression": "jpeg"}}
    ways |= {"tga:P": {"compression": "tga_rle"}, "dds:RGBA": {"pixel_format": "DXT5"}}
    ways |= {"avif": {"exif": exif}, "avif:RGBA": frames} if features.check("avif") else {}
    out = {}
    for name, options in ways.items():
        kind, _, mode = name.partition(":")
        picture = rgb.convert("L").convert(mode) if mode == "I;16" else rgb.convert(mode or "RGB")
        if "save_all" in options:
            options = options | {"append_images": [picture.rotate(90)]}
        file = io.BytesIO()
        picture.save(file, kind, **options)
        out[name] = file.getvalue()
    large = io.BytesIO()
    Image.fromarray(np.tile(np.asarray(rgb), (18, 18, 1))).save(large, "jpeg")  # more than LARGE pixels: draft
    return out | {"jpeg:large": large.getvalue()}


def fuzz_pictures(processor, folder, count, seed):
    """`count` mutated pictures, the formats in turn. -> Watch.report() with counts by format"""
    rng, watch = random.Random(f"pictures {seed}"), Watch(count)
    wholes = list(pictures_to_mutate().items())
    (folder / "p.jsonl").write_text(json.dumps({"image": "picture", "messages": SAY}))
    records = Records(folder / "p.jsonl")
    for n in range(count):
        name, whole = wholes[n % len(wholes)]
        (folder / "picture").write_bytes(mutated_bytes(whole, rng))
        with watch:
            watch.outcomes[f"{name.partition(':')[0]} {outcome(processor, records)}"] += 1
    return watch.report()


def mmrole_row(layout, k, who):
    """A good dialogue in one of the two layouts."""
    said = [("human", f"What is it, {k}?"), (who, f"First {k}."), ("human", "And then?"), (who, f"Second {k}.")]
    image = "0.png" if k % 2 else "gone.jpg"
    if layout == "raw":
        return {"id": f"{who}-{k}", "image": image, "conversations": [{"from": w, "value": t} for w, t in said]}
    turns = [{"role": "user" if w == "human" else "assistant", "content": t} for w, t in said]
    profile = {who: {"introduction": "Tall, of old family.", "personality": "Kind."}}
    row = {"id": f"{who}-{k}", "image_path": image, "character_role": who, "character_profile": profile}
    return row | {"conversations": turns}


def fuzz_mmrole(folder, layout, count, seed):
    """`count` conversions in which one row of seven is mutated: it is used or refused, the six others always used."""
    rng, watch = random.Random(f"{layout} {seed}"), Watch(count)
    raw = layout == "raw"
    train = folder / ("dialogues/in-distribution/comment/Ann.json" if raw else "conversations-train-comment.json")
    test = folder / ("dialogues/out-of-distribution/comment.json" if raw else "conversations-OODtest-comment.json")
    for path in (train, test, folder / "images/0.png", folder / "profiles/in/detailed_profiles/Ann.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (56, 56), "red").save(folder / "images/0.png")
    (folder / "profiles/in/detailed_profiles/Ann.json").write_text(json.dumps({"introduction": "Tall, of old family."}))
    good = [mmrole_row(layout, k, "Ann") for k in range(7)]
    test.write_text(json.dumps([mmrole_row(layout, 0, "Ann") | {"id": "ood", "image": "other", "image_path": "other"}]))
    for _ in range(count):
        row = mutated_value(good[3], rng)
        train.write_text(json.dumps(good[:3] + [row] + good[4:]))
        with watch:
            counts = convert_mmrole(folder, folder / "out")
            refused = sum(counts["refused"].values())
            watch.outcomes["refused" if refused else "accepted"] += 1
            demos, prompts = 7 // 2, 7 * 9 // 10 - 7 // 2
            assert refused or counts["paired"]["records"] + counts["text"]["records"] == demos + prompts, row
            for path in sorted((folder / "out").glob("*.jsonl")):
                if path.stat().st_size:
                    records = Records(path)
                    for i in range(len(records)):
                        records[i]["messages"]
    return watch.report()


def main(argv=None):
    parser = argparse.ArgumentParser(description="Mutated records, pictures and MMRole rows.", allow_abbrev=False)
    parser.add_argument("--count", type=int, default=5000, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # Pillow's, about broken EXIF blocks
    processor = Processor(str(ROOT / "tiny" / "vlm"), max_length=400)
    with tempfile.TemporaryDirectory() as folder:
        for kind in RECORDS:
            print(kind, json.dumps(fuzz_records(processor, Path(folder), kind, args.count, args.seed)), flush=True)
        print("pictures", json.dumps(fuzz_pictures(processor, Path(folder), args.count, args.seed)), flush=True)
        for layout in ("raw", "ready"):
            new = Path(folder, layout)
            print("mmrole", layout, json.dumps(fuzz_mmrole(new, layout, args.count, args.seed)), flush=True)


if __name__ == "__main__":
    main()
