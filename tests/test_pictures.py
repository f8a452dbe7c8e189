"""pictures.py: what becomes of each kind of picture, and what is refused before it does harm."""

import functools
import json
import os
import signal
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

import pictures
from data import DataError, Processor, Records, scan
from pictures import PictureError

VLM = os.path.join(os.path.dirname(os.path.dirname(__file__)), "tiny", "vlm")
NEEDED = 280 * 420  # pixels that the processor resizes to
avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")


@pytest.fixture(scope="module")
def processor():
    return Processor(VLM, max_length=400)


def load(path, max_decode=pictures.MAX_DECODE, max_pixels=NEEDED):
    return pictures.load(str(path), max_decode, max_pixels)


def pixel(path, at=(0, 0)):
    return load(path).getpixel(at)


@functools.cache
def scene(width, height):
    """A picture with gradients, noise and sharp edges, the same each time."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [np.sin(x / 37 + y / 91), np.cos(x / 53 - y / 29), np.sin((x * y) ** 0.5 / 45)]
    rgb = 127 + 90 * np.stack(waves, -1) + np.random.default_rng(0).normal(0, 6, (height, width, 3))
    rgb[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 20)
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def png_header(width, height, data=b""):
    """A PNG that says how large it is and has hardly any pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


class Limit:
    """`with Limit(seconds)`: a test that hangs fails."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __enter__(self):
        def stop(*_):
            raise TimeoutError(f"longer than {self.seconds} s")

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(self.seconds)

    def __exit__(self, *_):
        signal.alarm(0)


# ------------------------------------------------------------------------------------------- what stays as it is
def test_the_pictures_of_the_tiny_world_stay_as_they_are_bit_for_bit(processor, world):
    records = Records(world / "paired.jsonl")
    for i in range(len(records)):
        (path,) = records[i]["images"]
        plain = processor.images(images=[Image.open(path).convert("RGB")], return_tensors="pt")
        assert torch.equal(processor.example(records[i]).pixels, plain["pixel_values"])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "grey.png", "grey.jpg"])
def test_ordinary_pictures_stay_as_they_are_bit_for_bit(tmp_path, name):
    picture = scene(1024, 1024)  # LARGE pixels, not more
    (picture.convert("L") if "grey" in name else picture).save(tmp_path / name)
    assert load(tmp_path / name).tobytes() == Image.open(tmp_path / name).convert("RGB").tobytes()


# --------------------------------------------------------------------------------------------------- orientation
CORNERS = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]]
# where the first row and the first column of the stored picture belong when it is upright (the EXIF standard)
STORED = {1: [], 2: [2], 3: [3], 4: [4], 5: [5], 6: [8], 7: [7], 8: [6]}


def corners(size=(96, 64)):
    """Red, green, blue and white quarters."""
    out = Image.new("RGB", size)
    for row, colours in enumerate(CORNERS):
        for column, colour in enumerate(colours):
            w, h = size[0] // 2, size[1] // 2
            out.paste(colour, (column * w, row * h, (column + 1) * w, (row + 1) * h))
    return out


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff", pytest.param("avif", marks=avif)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_that_a_camera_wrote_is_applied(tmp_path, kind, orientation):
    stored = corners()
    for turn in STORED[orientation]:  # the inverse of what a viewer has to do
        stored = stored.transpose(pictures.TURNS[turn])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{kind}", exif=exif)
    upright = load(tmp_path / f"a.{kind}")
    assert upright.size == (96, 64)
    found = [[upright.getpixel((24 + 48 * c, 16 + 32 * r)) for c in (0, 1)] for r in (0, 1)]
    assert np.abs(np.subtract(found, CORNERS)).max() < 12, found  # of 255; JPEG and AVIF are not exact


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_a_broken_exif_block_counts_as_upright(tmp_path, kind):
    for exif in (b"MM\0*\0\0", b"MMxx\0\0\0\x08", b"II*\0", b"MM\0*\xff\xff\xff\xff", bytes(range(80))):
        corners().save(tmp_path / f"a.{kind}", exif=b"Exif\0\0" + exif)
        assert load(tmp_path / f"a.{kind}").size == (96, 64)


# ------------------------------------------------------------------------------------------------ modes of pixels
@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_16_bit_grey_is_scaled(tmp_path, name):
    ramp = np.arange(65536).astype(np.uint16).reshape(256, 256)
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 256 256 65535\n" + ramp.astype(">u2").tobytes())
    else:
        Image.fromarray(ramp).save(tmp_path / name)
    out = np.asarray(load(tmp_path / name))
    assert (out == (ramp / 257).round()[..., None]).all()  # clipped, all but the first few would be white


def test_32_bit_pixels_are_refused(tmp_path):
    for kind in (np.int32, np.float32):
        Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / "a.tiff")
        with pytest.raises(PictureError, match="32-bit pixels have no known range; convert it"):
            load(tmp_path / "a.tiff")


def test_what_is_transparent_is_put_on_white(tmp_path):
    red, clear = (255, 0, 0), (255, 0, 0, 0)
    Image.new("RGBA", (4, 4), clear).save(tmp_path / "clear.png")
    Image.new("RGBA", (4, 4), (*red, 128)).save(tmp_path / "half.png")
    Image.new("RGBA", (4, 4), (*red, 255)).save(tmp_path / "opaque.png")
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "la.png")
    Image.new("RGB", (4, 4), red).save(tmp_path / "key.png", transparency=red)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, *red])
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "palette.gif", transparency=1)
    white = (255, 255, 255)
    # half: 255 * 127 / 255 of the white below shine through
    expected = {"clear": white, "half": (255, 127, 127), "opaque": red, "la": white, "key": white, "palette": red}
    assert {name: pixel(tmp_path / f"{name}.png") for name in expected} == expected
    assert pixel(tmp_path / "palette.gif") == white


def test_other_modes_become_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.tiff")
    Image.new("1", (8, 8), 1).save(tmp_path / "one.png")
    assert pixel(tmp_path / "cmyk.tiff") == (255, 0, 0)
    assert np.abs(np.subtract(pixel(tmp_path / "cmyk.jpg"), (255, 0, 0))).max() < 4
    assert pixel(tmp_path / "one.png") == (255, 255, 255)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff", pytest.param("avif", marks=avif)])
def test_of_an_animation_the_first_frame_counts(tmp_path, kind):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:])
    assert np.abs(np.subtract(pixel(tmp_path / f"a.{kind}"), (255, 0, 0))).max() < 12


# ---------------------------------------------------------------------------------------------------- large pictures
@pytest.mark.parametrize("name", ["a.jpg", "grey.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize(
    "size, max_pixels, expected", [((1600, 1200), NEEDED, (792, 594)), ((1501, 1003), 9408, (237, 159))]
)
def test_a_large_picture_is_brought_near_the_needed_size_at_little_error(tmp_path, name, size, max_pixels, expected):
    picture = scene(*size)
    (picture.convert("L") if "grey" in name else picture).save(tmp_path / name, quality=90)
    near = load(tmp_path / name, max_pixels=max_pixels)
    assert near.size == expected  # 792 * 594 are 470,448 pixels: 4 * NEEDED are 470,400
    full = Image.open(tmp_path / name).convert("RGB")
    images = Processor(VLM, max_pixels=max_pixels).images
    a, b = (images(images=[x], return_tensors="pt") for x in (near, full))
    assert a["image_grid_thw"].tolist() == b["image_grid_thw"].tolist()
    levels = (a["pixel_values"] - b["pixel_values"]).abs() * 255 * 0.27  # 0.27: the processor's division, about
    assert levels.mean() < 0.4 and levels.max() < 16  # of 255; found are 0.2 to 0.33 and 1 to 12


def test_how_far_a_picture_is_reduced():
    near = pictures.near_size
    assert near((1024, 1024), 100) == (1024, 1024) and near((1025, 1024), 100) == (64, 64)  # no side gets below 64
    assert near((4000, 3000), 9408) == (224, 168)  # 224 * 168 are 4 * 9408 pixels
    assert near((4000, 3000), 750_000) == (2000, 1500) and near((4000, 3000), 750_001) == (4000, 3000)  # not by half
    assert near((20000, 100), 9408) == (20000, 100) and near((20000, 128), 9408) == (10000, 64)


def test_transparent_and_turned_large_pictures(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    corners((2000, 1200)).save(tmp_path / "a.jpg", exif=exif)
    out = load(tmp_path / "a.jpg", max_pixels=9408)
    assert out.size == (150, 250)  # sqrt(4 * 9408 / 2.4 million) is almost 1/8
    assert np.abs(np.subtract(out.getpixel((37, 62)), CORNERS[1][0])).max() < 12  # turned right: blue is top left
    Image.new("RGBA", (2000, 1200), (255, 0, 0, 128)).save(tmp_path / "half.png")
    assert load(tmp_path / "half.png", max_pixels=9408).getpixel((9, 9)) == (255, 127, 127)


@pytest.mark.parametrize("size", [(1, 1), (100, 1), (84, 56), (1023, 7), (1999, 1111), (3001, 2003), (5000, 300)])
def test_the_header_tells_the_number_of_tokens(tmp_path, processor, size):
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", size, "red").save(tmp_path / name)
        path = str(tmp_path / name)
        assert pictures.size(path, pictures.MAX_DECODE, NEEDED) == load(path).size
        pixels, grids = processor._pixels([path], "here")
        assert [int(grids.prod()) // 4] == processor._image_tokens([path], "here")


def test_the_extreme_shapes(tmp_path, processor):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    Image.new("RGB", (20000, 1), "red").save(tmp_path / "line.png")
    assert processor._pixels([str(tmp_path / "dot.png")], "here")[1].tolist() == [[1, 2, 2]]  # 28 x 28 pixels, 1 token
    for read in (processor._pixels, processor._image_tokens):
        with pytest.raises(DataError, match="here: an image does not open .*aspect ratio must be smaller than 200"):
            read([str(tmp_path / "line.png")], "here")


# -------------------------------------------------------------------------------------------------------- refusals
def test_the_limit_on_pixels_is_asked_before_decoding(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png_header(8000, 8000))
    message = "a.png: 8000 x 8000 pixels are more than the limit of 50000000"
    for read in (pictures.load, pictures.size):
        with pytest.raises(PictureError, match=message):
            read(str(tmp_path / "a.png"), pictures.MAX_DECODE, NEEDED)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # Pillow's own limit may be gone
    (tmp_path / "a.png").write_bytes(png_header(60000, 60000))
    with pytest.raises(PictureError, match="60000 x 60000 pixels are more than"):
        load(tmp_path / "a.png")
    scene(300, 200).save(tmp_path / "b.png")
    assert load(tmp_path / "b.png", max_decode=60000).size == (300, 200)
    with pytest.raises(PictureError, match="300 x 200 pixels are more than the limit of 59999"):
        load(tmp_path / "b.png", max_decode=59999)


def test_what_is_no_regular_file_is_not_even_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    paths = {str(tmp_path / name): "not a regular file" for name in ("pipe.png", "folder.png")}
    paths |= {"/dev/zero": "not a regular file", str(tmp_path / "none.png"): "No such file", "a\0b": "null"}
    paths["x" * 5000] = "too long"
    for path, message in paths.items():
        with Limit(5), pytest.raises(PictureError, match=message):  # a pipe without a writer would wait for ever
            load(path)


@avif
def test_a_broken_avif_is_a_picture_error(tmp_path):
    scene(200, 200).save(tmp_path / "a.avif")
    data = bytearray((tmp_path / "a.avif").read_bytes())
    at = data.index(b"mdat") + 4  # the boxes before it, which `Image.open` reads, stay whole
    data[at : at + 8] = bytes(8)
    (tmp_path / "a.avif").write_bytes(data)
    with pytest.raises(PictureError, match="a.avif: Failed to decode frame 0"):  # Pillow: RuntimeError
        load(tmp_path / "a.avif")


def test_a_dds_of_unknown_pixels_is_a_picture_error(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.dds")
    data = bytearray((tmp_path / "a.dds").read_bytes())
    data[80:88] = struct.pack("<I4s", 4, b"????")  # DDS_PIXELFORMAT: flags (a code follows), the code
    (tmp_path / "a.dds").write_bytes(data)
    with pytest.raises(PictureError, match="a.dds: "):  # Pillow: NotImplementedError
        load(tmp_path / "a.dds")


def test_a_torn_picture_is_refused_when_it_is_decoded(tmp_path, processor):
    scene(300, 200).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "torn.jpg").write_bytes(data[: len(data) // 2])
    say = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Red."}]
    rows = [json.dumps({"images": [f"{name}.jpg"], "messages": say}) + "\n" for name in ("whole", "torn")]
    (tmp_path / "r.jsonl").write_text("".join(rows))
    records = Records(tmp_path / "r.jsonl")
    assert scan(records, processor).usable.tolist() == [0, 1]  # the header is whole
    found = scan(records, processor, decode=True)
    assert found.usable.tolist() == [0] and "row 2: an image does not open" in found.refused[1]


def test_formats_that_are_programs_or_hide_their_size_are_refused(tmp_path):
    scene(64, 64).save(tmp_path / "a.ico")
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("a.ico", "a.eps"):
        with pytest.raises(PictureError, match="none of the formats PNG, JPEG"):
            load(tmp_path / name)
