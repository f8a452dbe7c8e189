"""A picture file -> an upright RGB picture with 8 bits a channel, near the size that the VLM needs.

The rules, in the order in which they are applied (docs/data.md has them in words):
    it is a regular file, in one of FORMATS, of at most `max_decode` pixels; else PictureError, before decoding
    a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size; another large picture is reduced after decoding
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
            return _prepared(picture, shrink_factor(picture.size, max_pixels))
        except Exception as e:
            raise PictureError(f"{path}: {_words(e)}") from None


def size(path, max_decode, max_pixels):
    """-> (width, height) of what `load` gives, before it is turned upright. Reads the header; nothing is decoded."""
    with _opened(path, max_decode) as picture:
        times = shrink_factor(picture.size, max_pixels)
        return tuple(-(-side // times) for side in picture.size)


def shrink_factor(size, max_pixels):
    """-> 1, 2, 4 or 8: by how much both sides of a picture may be divided.

    At least 4 pixels are left for each one that the processor makes (2 along each side), so that its bicubic
    resampling still averages over real detail."""
    width, height = size
    if width * height <= LARGE:
        return 1
    room = min((width * height / (4 * max_pixels)) ** 0.5, min(size) / SHORTEST)
    return next((times for times in (8, 4, 2) if times <= room), 1)


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


def _prepared(picture, times):
    drafted = None
    if times > 1 and picture.format in ("JPEG", "MPO"):
        drafted = picture.draft(None, tuple(side // times for side in picture.size))
    picture.load()
    turn = TURNS.get(_orientation(picture))
    out = _with_8_bits(picture)
    if times > 1 and not drafted:
        out = out.reduce(times)
    if out.mode == "RGBA":
        out = Image.alpha_composite(Image.new("RGBA", out.size, "white"), out)
    if out.mode != "RGB":
        out = out.convert("RGB")
    return out.transpose(turn) if turn is not None else out


def _with_8_bits(picture):
    """-> a picture of mode L, RGB or RGBA: the modes that can be reduced without a loss."""
    # PPM's 16 bits come as mode I, scaled to 65535 by Pillow
    if picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PPM"):
        values = np.asarray(picture).astype(np.float32) / 257
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise PictureError("32-bit pixels have no known range; convert it to 8 bits a channel")
    if picture.has_transparency_data:
        return picture.convert("RGBA")
    return picture if picture.mode in ("L", "RGB") else picture.convert("RGB")


def _orientation(picture):
    """The EXIF tag, 1 to 8. A broken EXIF block does not spoil the picture: it counts as upright."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
