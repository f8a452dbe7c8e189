"""Drawings with names, from public packages, rendered once: what the vision tower learns to name.

    python -m smol.drawings --packages runs/smol/packages --out runs/smol/drawings.npz

The packages (see README.md for their licences), unpacked below --packages:

    noto, noto-v1, fluent-emoji, fluent-emoji-flat, twemoji, emojione     emoji in six styles, as icons.json
    openclipart                                                           drawings by many hands, each an SVG

Kept are things, animals, people, faces and places: no flags, letters, signs and symbols, and one skin tone. Names are
in English and in lower case. Some names are held out with all their drawings, and of the others some drawings are.
"""

import argparse
import io
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import common
from records import DataError

SIZE = 96  # pixels of a drawing's longer side
STYLES = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "twemoji", "emojione")
KINDS = (  # categories of noto that are kept; the other styles keep the same names
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Travel & Places",
)
NO_NAME = re.compile(r"skin-tone|flag|button|keycap|-oclock|-thirty|backhand|mark$|-sign|^regional|^(white|black)-")
FOLDERS = (
    "animals buildings clothing computer/hardware education food household music office people plants recreation "
    "science tools toys transportation/vehicles transportation/boating transportation/aviation weather"
).split()
NO_TITLE = {"untitled", "clipart", "icon", "logo", "template", "title", "new", "simple", "drawing", "image"}
UNITS = {"": 1.0, "px": 1.0, "pt": 96 / 72, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96.0}


@dataclass
class Drawings:
    """N drawings: pixels (N, SIZE, SIZE, 4) uint8 RGBA, centred; name, style and part ('seen', 'picture', 'name') of
    each. 'picture': held out, but its name is seen in other styles. 'name': the name itself is held out."""

    pixels: np.ndarray
    names: list
    styles: list
    parts: list

    def of(self, part):
        """-> the numbers of the drawings of a part."""
        return [i for i, p in enumerate(self.parts) if p == part]


def load(file):
    with np.load(file) as f:
        meta = json.loads(str(f["meta"]))
        return Drawings(f["pixels"], meta["names"], meta["styles"], meta["parts"])


# ------------------------------------------------------------------------------------------------------- rendering
def render(svg):
    """SVG text -> RGBA (SIZE, SIZE, 4) uint8, what is drawn cut out and centred; None if nothing is."""
    import resvg_py  # only this needs it, and training does not

    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIZE)
    except ValueError:
        return None
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    scale = SIZE / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return np.asarray(canvas)


def with_view_box(svg):
    """An SVG that gives its size in points or millimetres and has no viewBox -> one that has it."""
    head = re.search(r"<svg\b[^>]*>", svg)
    if not head or "viewBox" in head[0]:
        return svg
    sizes = [re.search(rf'\b{side}="([\d.]+)([a-z]*)"', head[0]) for side in ("width", "height")]
    if None in sizes or any(s[2] not in UNITS for s in sizes):
        return svg
    width, height = (float(s[1]) * UNITS[s[2]] for s in sizes)
    bare = re.sub(r'\b(width|height)="[^"]*"', "", head[0])
    return svg.replace(head[0], bare[:-1].rstrip("/") + f' viewBox="0 0 {width} {height}">', 1)


# ---------------------------------------------------------------------------------------------------------- sources
def emoji(folder, allowed=None):
    """-> [(name, svg)] of a package of icons. allowed: the names to keep; None: those of noto's KINDS."""
    icons = json.loads((folder / "icons.json").read_text())
    if allowed is None:
        kinds = json.loads((folder / "metadata.json").read_text())["categories"]
        allowed = {n for kind in KINDS for n in kinds[kind] if not NO_NAME.search(n)}
    out = []
    for name in sorted(set(icons["icons"]) & allowed):
        icon = icons["icons"][name]
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        out.append((name.replace("-", " "), f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'))
    return out, allowed


def clip_art(folder):
    """-> [(name, svg)] of openclipart, those with a title of one to three plain words."""
    out = []
    for part in FOLDERS:
        for file in sorted((folder / part).rglob("*.svg")):
            svg = file.read_text(encoding="utf-8", errors="replace")
            title = re.search(r"<dc:title>([^<]*)</dc:title>", svg)
            name = re.sub(r"[\s_-]*\d*$", "", title[1].strip().lower().replace("_", " ")) if title else ""
            if re.fullmatch(r"[a-z]{3,}( [a-z]{2,}){0,2}", name) and not NO_TITLE & set(name.split()):
                out.append((name, with_view_box(svg)))
    return out


def collect(packages):
    """-> [(name, style, svg)] of all packages. DataError names one that is missing."""
    found, allowed = [], None
    for style in STYLES:
        folder = packages / style
        if not (folder / "icons.json").is_file():
            raise DataError(f"--packages {packages}: has no {style}/icons.json; make vision fetches it")
        icons, allowed = emoji(folder, allowed)
        found += [(name, style, svg) for name, svg in icons]
    folder = packages / "openclipart"
    if not folder.is_dir():
        raise DataError(f"--packages {packages}: has no openclipart; make vision fetches it")
    return found + [(name, "openclipart", svg) for name, svg in clip_art(folder)]


def part_of(name, style, held_out):
    """Which part a drawing belongs to, the same at every call. held_out: names."""
    if name in held_out:
        return "name"
    return "picture" if random.Random(f"{name} {style}").random() < 0.04 else "seen"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", default="runs/smol/packages", type=Path, help="folder of the unpacked packages")
    parser.add_argument("--out", default="runs/smol/drawings.npz", type=Path, help="file to write")
    args = parser.parse_args(argv)
    found = collect(args.packages)
    emoji_names = sorted({name for name, style, _ in found if style == "noto"})
    held_out = set(random.Random("held-out names").sample(emoji_names, len(emoji_names) // 15))
    pixels, names, styles, parts = [], [], [], []
    for name, style, svg in tqdm(found, desc="rendering", unit="drawing", mininterval=1):
        image = render(svg)
        if image is not None:
            pixels.append(image)
            names.append(name)
            styles.append(style)
            parts.append(part_of(name, style, held_out))
    meta = json.dumps({"names": names, "styles": styles, "parts": parts})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, pixels=np.stack(pixels), meta=meta)
    sizes = {part: parts.count(part) for part in ("seen", "picture", "name")}
    print(f"{len(names)} drawings of {len(set(names))} names in {len(set(styles))} styles; parts: {sizes}")


if __name__ == "__main__":
    common.run(main)
