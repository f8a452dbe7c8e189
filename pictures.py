"""A picture file -> an upright RGB picture with 8 bits a channel, near the size that the VLM needs.

The rules, in the order in which they are applied (docs/data.md has them in words):
    it is a regular file, in one of FORMATS, of at most `max_decode` pixels; else PictureError, before decoding
    a large picture is brought near the size that the VLM needs, a JPEG already while it is decoded
    of an animation the first frame counts
    16-bit grey is divided by 257, its full range; 32-bit pixels have no known range and are refused
    what is transparent is put on white; palettes, CMYK and so on become RGB
    the orientation that a camera wrote (EXIF) is applied
An RGB or grey picture of up to LARGE pixels that stands upright comes out as it is, bit for bit."""

import os
import stat
import warnings

import numpy as np
from PIL import ExifTags, Image

# Not all that Pillow knows: EPS and WMF are programs that draw, an icon (ICO, ICNS) may hold another, larger picture
# than its header says, and the rest is not met in data sets. TGA has no signature of its own and comes last.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "DDS", "TGA")
MAX_DECODE = 50_000_000  # pixels; 200 MB while they are decoded
LARGE = 2**20  # pixels; what has more is brought near the size that the VLM needs before the processor resizes it
SHORTEST = 64  # pixels; no side is reduced below that, twice the least side that the processor makes
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# `max_decode` is asked before anything is decoded; Pillow's warning about large pictures would only repeat it
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class PictureError(ValueError):
    """A picture that cannot be used; the message has the path and the reason."""


def load(path, max_decode, max_pixels):
    """-> PIL image of mode RGB. max_decode: pixels of the file's own size; max_pixels: what the processor resizes to.

    Raises PictureError, whatever is wrong. Pillow's decoders raise anything for broken files: OSError, SyntaxError,
    ValueError, RuntimeError (AVIF), NotImplementedError (DDS), struct.error, IndexError, MemoryError."""
    with _opened(path, max_decode) as picture:
        try:
            return _prepared(picture, near_size(picture.size, max_pixels))
        except Exception as e:
            raise PictureError(f"{path}: {_words(e)}") from None


def size(path, max_decode, max_pixels):
    """-> (width, height) of what `load` gives, before it is turned upright. Reads the header; nothing is decoded."""
    with _opened(path, max_decode) as picture:
        return near_size(picture.size, max_pixels)


def near_size(size, max_pixels):
    """(width, height) of a file's picture -> the size that it is brought to before the processor resizes it.

    A large picture keeps 4 pixels for each one that the processor makes (2 along each side), so that its bicubic
    resampling still averages over detail. What would not become half as wide by that is left as it is."""
    width, height = size
    if width * height <= LARGE:
        return size
    scale = max((4 * max_pixels / (width * height)) ** 0.5, SHORTEST / min(size))
    return (round(width * scale), round(height * scale)) if scale <= 0.5 else size


def _opened(path, max_decode):
    """-> the opened, not yet decoded picture, a context manager."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError) as e:
        raise PictureError(f"{path}: {_words(e)}") from None
    if not regular:  # to open a pipe would wait for its writer, for ever
        raise PictureError(f"{path}: not a regular file")
    try:
        picture = Image.open(path, formats=FORMATS)
    except Exception as e:
        raise PictureError(f"{path}: {_words(e)}") from None
    width, height = picture.size
    if width * height > max_decode:
        picture.close()
        raise PictureError(f"{path}: {width} x {height} pixels are more than the limit of {max_decode}")
    return picture


def _words(error):
    """Pillow's reason in one short line, without the path, which stands there already."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"none of the formats {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def _prepared(picture, size):
    shrinks = size != picture.size
    # where the picture lies in what a JPEG decoder makes at 1/2, 1/4 or 1/8 of its size; the last pixels may jut out
    drafted = picture.draft(None, size) if shrinks else None
    picture.load()
    turn = TURNS.get(_orientation(picture))
    out = _with_8_bits(picture)
    if shrinks:
        out = out.resize(size, Image.Resampling.BICUBIC, box=drafted and drafted[1], reducing_gap=2.0)
    if out.mode == "RGBA":
        out = Image.alpha_composite(Image.new("RGBA", out.size, "white"), out)
    if out.mode != "RGB":
        out = out.convert("RGB")
    return out.transpose(turn) if turn is not None else out


def _with_8_bits(picture):
    """-> a picture of mode L, RGB or RGBA: the modes that can be resized."""
    # PPM's 16 bits come as mode I, scaled to 65535 by Pillow
    if picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PPM"):
        values = np.asarray(picture).clip(0, 65407).astype(np.uint16)  # the last 128 round down to 255 as well
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # + 128: to the nearest
    if picture.mode in ("I", "F"):
        raise PictureError("32-bit pixels have no known range; convert it to 8 bits a channel")
    wanted = ("RGBA",) if picture.has_transparency_data else ("L", "RGB")
    return picture if picture.mode in wanted else picture.convert(wanted[-1])


def _orientation(picture):
    """The EXIF tag, 1 to 8. A broken EXIF block does not spoil the picture: it counts as upright."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
