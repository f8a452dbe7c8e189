"""Scenes of named drawings and coloured shapes, with captions and with questions and their answers.

A scene has one to three things (or two to four copies of one) on a plain or busy background of 112 x 112 pixels. All
words are made from what was drawn, so they are true. `cells` says what each of the 4 x 4 image tokens shows.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE, CELL = 112, 28  # pixels of a scene, and of the square that one image token stands for
COLOURS = {
    "red": (214, 40, 40),
    "orange": (244, 140, 6),
    "yellow": (250, 215, 40),
    "green": (46, 150, 60),
    "blue": (35, 90, 210),
    "purple": (130, 50, 170),
    "pink": (250, 140, 190),
    "brown": (120, 72, 36),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "gray": (140, 140, 140),
}
SHAPES = {  # corners in a unit square; a circle has none
    "circle": None,
    "square": [(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)],
    "triangle": [(0.5, 0.03), (0.98, 0.95), (0.02, 0.95)],
    "diamond": [(0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5)],
    "cross": [(0.35, 0), (0.65, 0), (0.65, 0.35), (1, 0.35), (1, 0.65), (0.65, 0.65)]
    + [(0.65, 1), (0.35, 1), (0.35, 0.65), (0, 0.65), (0, 0.35), (0.35, 0.35)],
    "star": [(0.5 + r * np.sin(k * np.pi / 5), 0.52 - r * np.cos(k * np.pi / 5)) for k, r in enumerate([0.5, 0.2] * 5)],
}
NUMBERS = ("no", "one", "two", "three", "four")
SPOTS = {  # where the centre of a thing is, in pixels
    1: {"": [(56, 56)]},
    2: {"across": [(30, 56), (82, 56)], "down": [(56, 30), (56, 82)]},
    3: {"across": [(20, 56), (56, 56), (92, 56)], "down": [(56, 20), (56, 56), (56, 92)]},
    4: {"corners": [(30, 30), (82, 30), (30, 82), (82, 82)]},
}
PLACES = {
    (2, "across"): ("on the left", "on the right"),
    (2, "down"): ("at the top", "at the bottom"),
    (3, "across"): ("on the left", "in the middle", "on the right"),
    (3, "down"): ("at the top", "in the middle", "at the bottom"),
}
MASS = set("clothing food fruit furniture hair music rain rice snow water weather wood bread cash fire fog".split())
SYSTEMS = ("", "", "", "You are a helpful assistant.", "You describe pictures.", None)  # None: the template's own


@dataclass(frozen=True)
class Thing:
    """name: 'cat', or 'red star' for a shape. drawing: its number, None for a shape."""

    name: str
    drawing: int | None = None

    def phrase(self, article="a"):
        """'a cat', 'an apple', 'grapes'; article 'the': 'the cat'."""
        if article == "the":
            return f"the {self.name}"
        last = self.name.split()[-1]
        if (last.endswith("s") and not last.endswith(("ss", "us", "is"))) or last in MASS or last.endswith("ing"):
            return self.name
        return ("an " if self.name[0] in "aeiou" and not self.name.startswith(("uni", "one")) else "a ") + self.name


@dataclass(frozen=True)
class Scene:
    things: tuple  # of Thing, in reading order; copies: one Thing several times
    order: str  # across, down, corners, or nothing for one thing
    background: str  # a colour, or nothing where it is busy

    @property
    def copies(self):
        return len(self.things) > 1 and len(set(self.things)) == 1


# -------------------------------------------------------------------------------------------------------- drawing
def draw_scene(rng, drawings, allowed, shapes=0.25, count=None):
    """-> (Scene, image (SIDE, SIDE, 3) uint8, cells (16,): the Thing that each image token shows, or None).

    allowed: the numbers of the drawings to choose from. shapes: the share of coloured shapes. count: of the things."""
    count = count or rng.choice((1, 1, 1, 2, 2, 3))
    colours = list(COLOURS)
    background = rng.choice(colours) if rng.random() < 0.5 else ""
    free = [c for c in colours if c != background]
    things = []
    while len(things) < count:
        thing = Thing(f"{rng.choice(free)} {rng.choice(list(SHAPES))}")
        if rng.random() >= shapes:
            number = rng.choice(allowed)
            thing = Thing(drawings.names[number], number)
        if thing.name not in [t.name for t in things]:
            things.append(thing)
    if count == 1 and rng.random() < 0.2:
        things = things * rng.choice((2, 3, 4))
    order = rng.choice(list(SPOTS[len(things)]))
    return paint(rng, Scene(tuple(things), order, background), drawings)


def paint(rng, scene, drawings):
    image = draw_background(rng, scene.background)
    count = len(scene.things)
    room = {1: 104, 2: 54, 3: 37, 4: 52}[count]
    along = 1.5 if count in (2, 3) else 1.0  # beside each other, things may be taller than wide
    covers = []
    for thing, (x, y) in zip(scene.things, SPOTS[count][scene.order]):
        size = rng.uniform(0.55, 1) * room * (along if rng.random() < 0.5 else 1)
        sprite = draw_thing(rng, thing, drawings, max(12, round(size)))
        free = max(0, (room - size) / 2)
        x, y = x + rng.uniform(-free, free), y + rng.uniform(-free, free)
        at = (round(x - sprite.width / 2), round(y - sprite.height / 2))
        image.paste(sprite, at, sprite)
        cover = Image.new("L", (SIDE, SIDE))
        cover.paste(sprite.getchannel("A"), at)
        covers.append(np.asarray(cover).reshape(4, CELL, 4, CELL).mean((1, 3)).ravel() / 255)
    most = np.argmax(covers, 0)
    best = np.max(covers, 0)
    ground = Thing(f"{scene.background} background") if scene.background else None
    cells = [scene.things[most[k]] if best[k] > 0.25 else None for k in range(16)]
    cells = [ground if best[k] < 0.02 else cells[k] for k in range(16)]
    return scene, np.asarray(image), cells


def draw_mosaic(rng, drawings, allowed):
    """Four small pictures in one, each of one thing -> (image, cells) as of `draw_scene`: more names to a picture."""
    image, cells = Image.new("RGB", (SIDE, SIDE)), [None] * 16
    half = SIDE // 2
    for number, (left, top) in zip(rng.sample(allowed, 4), ((0, 0), (1, 0), (0, 1), (1, 1))):
        thing, size = Thing(drawings.names[number], number), rng.randint(36, half)
        image.paste(draw_background(rng, rng.choice(["", *COLOURS])).resize((half, half)), (left * half, top * half))
        sprite = draw_thing(rng, thing, drawings, size)
        at = [round(k * half + rng.uniform(0, half - size)) for k in (left, top)]
        image.paste(sprite, at, sprite)
        for row in (0, 1):
            cells[(2 * top + row) * 4 + 2 * left] = cells[(2 * top + row) * 4 + 2 * left + 1] = thing
    return np.asarray(image), cells


def draw_thing(rng, thing, drawings, size):
    if thing.drawing is not None:
        sprite = Image.fromarray(drawings.pixels[thing.drawing])
        if rng.random() < 0.5:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    else:
        colour, shape = thing.name.split()
        big = 4 * size
        sprite = Image.new("RGBA", (big, big))
        pen = ImageDraw.Draw(sprite)
        fill = tuple(int(np.clip(c + rng.uniform(-18, 18), 0, 255)) for c in COLOURS[colour])
        line = None if rng.random() < 0.5 else (0, 0, 0)
        if SHAPES[shape] is None:
            pen.ellipse((2, 2, big - 2, big - 2), fill=fill, outline=line, width=6)
        else:
            pen.polygon([(x * big, y * big) for x, y in SHAPES[shape]], fill=fill, outline=line, width=6)
    sprite = sprite.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC) if rng.random() < 0.3 else sprite
    return sprite.resize((size, size), Image.Resampling.BILINEAR)


def draw_background(rng, colour):
    """A plain background of this colour; without one a busy background: a gradient, patches, lines."""
    if colour:
        return Image.new("RGB", (SIDE, SIDE), shade(rng, COLOURS[colour], 15))
    kind = rng.random()
    small = 2 if kind < 0.35 else rng.choice((4, 8))
    spread = 40 if rng.random() < 0.5 else 110
    base = np.array([rng.uniform(40, 240) for _ in range(3)])
    noise = np.array([[rng.uniform(-spread, spread) for _ in range(3)] for _ in range(small * small)])
    pixels = np.clip(base + noise, 0, 255).reshape(small, small, 3).astype(np.uint8)
    image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.choice((0, 0, 3, 8))):
        box = [rng.uniform(0, SIDE) for _ in range(4)]
        pen.line(box, fill=shade(rng, base, 60), width=rng.choice((1, 2, 4)))
    return image.filter(ImageFilter.GaussianBlur(1)) if rng.random() < 0.3 else image


def shade(rng, colour, spread):
    return tuple(int(np.clip(c + rng.uniform(-spread, spread), 0, 255)) for c in colour)


# ----------------------------------------------------------------------------------------------------------- words
def plural(name):
    head, _, last = name.rpartition(" ")
    if last.endswith(("ss", "us", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("s"):
        pass
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip()


def phrases(scene, places=True):
    """What is there, in words: 'two cats', 'a cat on the left and an apple on the right'."""
    if scene.copies:
        return f"{NUMBERS[len(scene.things)]} {plural(scene.things[0].name)}"
    said = [t.phrase() for t in scene.things]
    if places and len(said) > 1:
        said = [f"{s} {p}" for s, p in zip(said, PLACES[len(said), scene.order])]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"


def caption(scene, rng):
    """A caption of the scene, in one of many forms."""
    what = phrases(scene, rng.random() < 0.7)
    if scene.background and rng.random() < 0.4:
        what += f" on {Thing(scene.background + ' background').phrase()}"
    forms = (
        "This is a picture of {}.",
        "A picture of {}.",
        "The image shows {}.",
        "{}.",
        "I see {}.",
        "We see {} here.",
    )
    said = rng.choice(forms).format(what)
    return said[0].upper() + said[1:]


def question(scene, rng):
    """-> (kind, question, answer). kind: what, count, where, which, colour, background, describe"""
    shapes = [t for t in scene.things if t.drawing is None]
    several = len(scene.things) > 1
    kinds = ["what", "what", "count", "describe"] + ["where", "which"] * 2 * (several and not scene.copies)
    kinds += ["colour"] * 2 * (bool(shapes)) + ["background"] * bool(scene.background)
    return (kind := rng.choice(kinds), *ask(scene, kind, rng))


def ask(scene, kind, rng):
    """-> (question, answer) of this kind about the scene."""
    things, count = scene.things, len(scene.things)
    if kind == "count":
        asked = f"How many {plural(things[0].name)} do you see?" if scene.copies else "How many things do you see?"
        return asked, f"{NUMBERS[count].capitalize()}."
    if kind == "background":
        return "What color is the background?", f"{scene.background.capitalize()}."
    if kind == "colour":
        colour, shape = rng.choice([t for t in things if t.drawing is None]).name.split()
        return f"What color is the {shape}?", f"{colour.capitalize()}."
    if kind in ("where", "which"):
        k = rng.randrange(count)
        place = PLACES[count, scene.order][k]
        if kind == "where":
            return f"Where is {things[k].phrase('the')}?", f"{place[0].upper()}{place[1:]}."
        said = things[k].phrase()
        return f"What is {place}?", f"{said[0].upper()}{said[1:]}."
    if kind == "describe":
        return rng.choice(("Describe the image.", "What do you see?", "Tell me about this picture.")), caption(
            scene, rng
        )
    said = phrases(scene, False)
    asked = rng.choice(("What is this?", "What is in the picture?", "What does the image show?", "Name what you see."))
    return asked, f"{said[0].upper()}{said[1:]}."


def dialogue(scene, rng, turns=2):
    """Messages of one to `turns` questions and answers about the scene, the image in front of the first."""
    messages, asked = [], set()
    for _ in range(rng.randint(1, turns)):
        kind, q, a = question(scene, rng)
        if kind not in asked:
            asked.add(kind)
            messages += [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    messages[0]["content"] = "<image>" + messages[0]["content"]
    system = rng.choice(SYSTEMS)
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def seeded(*key):
    return random.Random(" ".join(map(str, key)))
