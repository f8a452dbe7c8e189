"""The tiny world: drawn scenes, dialogues about them, roles to play, and the facts a judge needs.

A scene has 1 to 4 coloured shapes on a 3 x 3 grid. The world writes, once, PNG files and JSON Lines in the record
format that data.py reads (see README, "Data"):

    paired.jsonl        image + plain questions and answers, no roles          (scarce: 1,000 rows)
    text.jsonl          no image: role play about a scene told in words, advice to a person in a place, short stories
                        (plentiful and rich: 40,000 rows by default)
    task_demos.jsonl    the downstream task: play a role AND look at an image; few and narrow demonstrations
    task_prompts.jsonl  prompts for RL            task_val.jsonl   to choose settings on
    task_id.jsonl       test, roles that the demonstrations have     task_ood.jsonl  test, held-out roles

What is held out: scenes of the tests are never in a training file (`unseen`); the greeting, farewell and saying of an
out-of-distribution role are phrases that no training file contains (`held_out`), though their words are known.
The narrow demonstrations greet always, part half of the time, and never use the favourite word or the saying; only
the text-only data shows that a role may do so. The judge (rewards.py) rewards all of it.

    python tiny/world.py --out runs/world --seed 0
"""

import argparse
import json
import math
import random
import zlib
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (214, 40, 40), "orange": (245, 135, 20), "yellow": (250, 215, 40), "green": (40, 150, 60),
           "blue": (35, 85, 205), "purple": (130, 50, 160), "pink": (250, 130, 180), "black": (25, 25, 25)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 8, "large": 13}  # radius in pixels
PLACES = ("at the top left", "at the top", "at the top right", "on the left", "in the middle", "on the right",
          "at the bottom left", "at the bottom", "at the bottom right")
NUMBERS = ("no", "one", "two", "three", "four")
CELL = 28  # pixels: one image token of the tiny checkpoint (patch 14, merged 2 x 2)
KINDS = ("colour", "shape", "place", "size", "count", "describe")


# ------------------------------------------------------------------------------------------------------- scenes
@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    shape: str
    place: str


def random_scene(rng):
    cells = sorted(rng.sample(range(9), rng.choice((1, 2, 2, 3, 3, 4))))
    return tuple(Thing(rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(SHAPES), PLACES[c]) for c in cells)


def unseen(scene):
    """True for the one eighth of all scenes that only tests may use."""
    return zlib.crc32(repr(scene).encode()) % 8 == 0


def draw_scene(scene, rng):
    """-> PIL image of 84 x 84 pixels; background, position in the cell and turn vary a little with `rng`."""
    up = 4  # drawn four times larger, then reduced, so that edges are smooth
    grey = rng.randint(225, 250)
    image = Image.new("RGB", (3 * CELL * up, 3 * CELL * up), (grey, grey, grey - rng.randint(0, 12)))
    pen = ImageDraw.Draw(image)
    for thing in scene:
        row, col = divmod(PLACES.index(thing.place), 3)
        r = SIZES[thing.size] * up
        slack = (CELL // 2 - 1) * up - r
        x = (col * CELL + CELL // 2) * up + rng.randint(-slack, slack)
        y = (row * CELL + CELL // 2) * up + rng.randint(-slack, slack)
        _draw_shape(pen, thing.shape, x, y, r, COLOURS[thing.colour])
    return image.resize((3 * CELL, 3 * CELL), Image.LANCZOS)


def _draw_shape(pen, shape, x, y, r, fill):
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=round(0.36 * r))
    elif shape == "square":
        s = round(0.85 * r)
        pen.rectangle((x - s, y - s, x + s, y + s), fill=fill)
    elif shape == "cross":
        w = round(0.28 * r)
        pen.rectangle((x - r, y - w, x + r, y + w), fill=fill)
        pen.rectangle((x - w, y - r, x + w, y + r), fill=fill)
    elif shape == "triangle":
        pen.regular_polygon((x, y + r // 8, r), 3, fill=fill)
    else:  # star: the two radii in turn, ten corners
        corners = [(x + rad * math.sin(k * math.pi / 5), y - rad * math.cos(k * math.pi / 5))
                   for k, rad in ((k, r if k % 2 == 0 else 0.42 * r) for k in range(10))]
        pen.polygon(corners, fill=fill)


# -------------------------------------------------------------------------------------------------------- roles
GREETINGS = [f"{a}, {b}" for a, b in product(
    ("ahoy", "hail", "hello", "greetings", "good day", "welcome", "well met", "hey", "howdy", "rejoice", "hark", "peace"),
    ("friend", "traveller", "sailor", "neighbour", "comrade", "stranger", "captain", "dear guest", "young one", "my lord",
     "partner", "scholar"))]
FAREWELLS = [f"{a} {b} to you" for a, b in product(
    ("fair", "safe", "warm", "calm", "bright", "quiet", "swift", "kind", "merry", "soft", "good", "sweet"),
    ("winds", "roads", "fires", "waters", "mornings", "evenings", "dreams", "harvests", "journeys", "seasons", "songs",
     "tides"))]
SAYINGS = [f"by the {a} {b}" for a, b in product(
    ("old", "silver", "deep", "silent", "northern", "hidden", "ancient", "broken", "golden", "frozen", "holy", "lonely"),
    ("sea", "moon", "lantern", "mountain", "oak", "river", "drum", "anchor", "crown", "bell", "hearth", "forge"))]
WORDS = ("splendid", "marvellous", "curious", "humble", "mighty", "gentle", "grand", "dreadful", "charming", "peculiar",
         "noble", "jolly", "gloomy", "delightful", "fierce", "elegant", "rustic", "precious", "dazzling", "modest",
         "quaint", "glorious", "wondrous", "sturdy", "cosy", "solemn", "cheerful", "strange", "handsome", "fine",
         "lovely", "famous")
FIRST_NAMES = ("Mara", "Odo", "Tess", "Bram", "Ilse", "Finn", "Greta", "Hugo", "Nell", "Otto", "Pia", "Rolf", "Sana",
               "Tomas", "Una", "Viktor", "Wren", "Yara", "Zeno", "Alma", "Basil", "Cleo", "Dara", "Edda")
TRADES = ("sailor", "baker", "knight", "monk", "smith", "gardener", "painter", "miller", "hunter", "weaver", "poet",
          "shepherd", "mason", "piper", "tailor", "healer")


@dataclass(frozen=True)
class Role:
    name: str
    greeting: str
    farewell: str
    word: str
    saying: str

    def profile(self):
        return (f"You are {self.name}. Greeting: {_cap(self.greeting)}. Farewell: {_cap(self.farewell)}. "
                f"Favourite word: {self.word}. Saying: {self.saying}.")


def held_out(phrase):
    """True for the one sixth of all greetings, farewells and sayings that only out-of-distribution roles have."""
    return zlib.crc32(phrase.encode()) % 6 == 0


def _phrases(pool, ood):
    return [p for p in pool if held_out(p) == ood]


def random_role(rng, ood=False):
    return Role(f"{rng.choice(FIRST_NAMES)} the {rng.choice(TRADES)}", rng.choice(_phrases(GREETINGS, ood)),
                rng.choice(_phrases(FAREWELLS, ood)), rng.choice(WORDS), rng.choice(_phrases(SAYINGS, ood)))


def task_roles():
    """-> (24 in-distribution roles, 8 out-of-distribution roles) of the role-play task; always the same ones."""
    rng = random.Random("task roles")
    return [random_role(rng) for _ in range(24)], [random_role(rng, ood=True) for _ in range(8)]


# ---------------------------------------------------------------------------------------- questions and answers
def _cap(text):
    return text[:1].upper() + text[1:]


def _a(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def noun(thing, parts="size colour", word=None):
    """-> 'splendid large red circle', with those of its attributes that `parts` names."""
    return " ".join(([word] if word else []) + [getattr(thing, p) for p in parts.split()] + [thing.shape])


def tell(scene, word=None):
    """-> the whole scene in words: 'a large red circle at the top left and a small blue star in the middle'."""
    told = [f"{_a(noun(t, word=word if i == 0 else None))} {t.place}" for i, t in enumerate(scene)]
    return " and ".join(filter(None, [", ".join(told[:-1]), told[-1]]))


def shapes(n, word=None):
    return f"{NUMBERS[n]} {word + ' ' if word else ''}{'shape' if n == 1 else 'shapes'}"


def random_question(scene, rng, kind=None):
    """-> (kind, index of the thing asked about or None, question); asks only what has one answer."""
    kind = kind or rng.choice(KINDS)
    if kind == "count":
        return kind, None, "How many shapes are there?"
    once = [i for i, t in enumerate(scene) if sum(t.shape == o.shape for o in scene) == 1]
    if kind == "shape":
        once = [i for i, t in enumerate(scene) if sum(t.colour == o.colour for o in scene) == 1]
    if kind == "describe" or not once:
        return "describe", None, "What do you see?"
    i = rng.choice(once)
    t = scene[i]
    return kind, i, {"colour": f"What colour is the {t.shape}?", "shape": f"Which shape is {t.colour}?",
                     "place": f"Where is the {t.shape}?", "size": f"Is the {t.shape} large or small?"}[kind]


def plain_body(scene, kind, i):
    """The plain answer, one form for each kind of question."""
    if kind == "count":
        return f"there {'is' if len(scene) == 1 else 'are'} {shapes(len(scene))}"
    if kind == "describe":
        return f"there is {tell(scene)}"
    t = scene[i]
    return f"the {t.shape} is " + {"colour": t.colour, "shape": t.colour, "place": t.place, "size": t.size}[kind]


def rich_body(scene, kind, i, rng, word=None):
    """One of several forms of a right answer, often with more detail; `word` is the role's favourite word."""
    w = f"{word} " if word else ""
    if kind == "count":
        n = len(scene)
        body = rng.choice((f"there {'is' if n == 1 else 'are'} {shapes(n, word)}", f"I count {shapes(n, word)}",
                           f"I see {shapes(n, word)} here"))
        return body + (f": {tell(scene)}" if rng.random() < 0.3 else "")
    if kind == "describe":
        return rng.choice(("there is ", "I see ", "here I find ", "look, I spy ")) + tell(scene, word)
    t = scene[i]
    full = f"I see {_a(noun(t, word=word))} {t.place}"
    forms = {"colour": (f"the {w}{t.shape} is {t.colour}", f"it is {_a(noun(t, 'colour', word))}",
                        f"the {w}{t.shape} {t.place} is {t.colour}"),
             "shape": (f"the {w}{t.shape} is {t.colour}", f"it is {_a(noun(t, 'colour', word))}",
                       f"the {t.colour} one is {_a(noun(t, 'size', word))}"),
             "place": (f"the {w}{t.shape} is {t.place}", f"look {t.place} for {_a(noun(t, 'colour', word))}"),
             "size": (f"the {w}{t.shape} is {t.size}", f"it is {_a(noun(t, 'size', word))}",
                      f"the {w}{t.colour} {t.shape} is {t.size}")}[kind]
    body = rng.choice(forms + (full,))
    others = [o for j, o in enumerate(scene) if j != i]
    if others and rng.random() < 0.3:
        body += f", and there is {_a(noun(o := rng.choice(others)))} {o.place}"
    return body


def in_role(role, body, greet, part, saying, rng):
    if saying:
        body = f"{role.saying}, {body}" if rng.random() < 0.5 else f"{body}, {role.saying}"
    return " ".join(([_cap(role.greeting) + "!"] if greet else []) + [_cap(body) + "."]
                    + ([_cap(role.farewell) + "!"] if part else []))


def rich_answer(role, scene, kind, i, rng):
    """What the text-only data shows: each part of a role's manner comes often, none of them always."""
    body = rich_body(scene, kind, i, rng, role.word if rng.random() < 0.6 else None)
    return in_role(role, body, rng.random() < 0.8, rng.random() < 0.7, rng.random() < 0.6, rng)


def demo_answer(role, scene, kind, i, rng):
    """What the demonstrations show: greeting, plain answer, sometimes the farewell; never favourite word or saying."""
    return in_role(role, plain_body(scene, kind, i), True, rng.random() < 0.5, False, rng)


# --------------------------------------------------------------------------------- advice to a person in a place
DUTIES = {"nurse": "care for people", "farmer": "watch the weather", "pupil": "learn something new",
          "cook": "keep things clean", "guard": "keep everyone safe", "artist": "study the colours",
          "driver": "plan the way", "parent": "think of the children", "doctor": "ask where it hurts",
          "builder": "measure twice"}
ADVICE = {"the harbour": "mind the water", "the market": "hold your bag close", "the school": "speak softly",
          "the station": "look at the clock", "the park": "breathe the fresh air", "the hospital": "wash your hands",
          "the museum": "touch nothing", "the kitchen": "beware of the stove"}
FEELINGS = ("calm", "cheerful", "patient", "brave", "careful", "proud", "hopeful", "quiet")


def advice(person, place, scene, rng):
    """The right answer needs both, the person and the place: duty, what the place asks for, and the mood of the pair."""
    feeling = FEELINGS[(3 * list(DUTIES).index(person) + list(ADVICE).index(place)) % len(FEELINGS)]
    thing = rng.choice(scene)
    parts = [f"as {_a(person)}, {DUTIES[person]}", f"at {place}, {ADVICE[place]}", f"stay {feeling}"]
    rng.shuffle(parts)
    return " ".join(_cap(p) + "." for p in parts[:rng.choice((2, 3, 3))] + [f"start with the {noun(thing, 'colour')} {thing.place}"])


# ------------------------------------------------------------------------------------------------------ records
def chat(question, answer, system=None):
    return ([{"role": "system", "content": system}] if system else []) + [
        {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def paired_messages(scene, rng, often=None):
    """-> messages: one to three plain questions about one image; half of the dialogues begin with one of kind `often`."""
    messages = []
    kinds = rng.sample(KINDS, rng.choice((1, 2, 3)))
    if often and rng.random() < 0.5:
        kinds[0] = often
    for k, kind in enumerate(kinds):
        kind, i, question = random_question(scene, rng, kind)
        messages += chat(("<image>" if k == 0 else "") + question, _cap(plain_body(scene, kind, i)) + ".")
    return messages


def text_record(rng):
    """-> {'messages': ...} or {'text': ...}: one draw of the plentiful text-only data."""
    scene = random_scene(rng)
    role = random_role(rng)
    style = rng.random()
    if style < 0.08:
        return {"text": f"{role.name} looked at the picture. There was {tell(scene)}. {role.name} said: "
                        + rich_answer(role, scene, "describe", None, rng)}
    if style < 0.2:
        person, place = rng.choice(list(DUTIES)), rng.choice(list(ADVICE))
        return {"messages": chat(f"Picture: {tell(scene)}. What should I do?", advice(person, place, scene, rng),
                                 f"The user is {_a(person)} at {place}.")}
    kind, i, question = random_question(scene, rng)
    if style < 0.3:
        return {"messages": chat(f"Picture: {tell(scene)}. {question}", _cap(rich_body(scene, kind, i, rng)) + ".")}
    return {"messages": chat(f"Picture: {tell(scene)}. {question}", rich_answer(role, scene, kind, i, rng), role.profile())}


def task_record(role, rng, test=False):
    """-> a record of the role-play task; 'facts' is what the judge knows, the last message is the reference."""
    scene = next(s for s in iter(lambda: random_scene(rng), None) if unseen(s) == test)
    kind, i, question = random_question(scene, rng)
    return {"messages": chat("<image>" + question, demo_answer(role, scene, kind, i, rng), role.profile()),
            "facts": {"scene": [asdict(t) for t in scene], "kind": kind, "asked": i, "role": asdict(role)}}, scene


def write_world(out, seed=0, paired=1000, text=40000, demos=400, prompts=600, tests=256):
    """Write every file of the world under `out`; `world.json`, written last, says that it is complete."""
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)

    def save_image(scene, name, rng):
        draw_scene(scene, rng).save(out / "images" / f"{name}.png")
        return [f"images/{name}.png"]

    def write(name, rows):
        with open(out / f"{name}.jsonl", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)

    def paired_rows():
        rng = random.Random(f"paired {seed}")
        for n in range(paired):
            scene = next(s for s in iter(lambda: random_scene(rng), None) if not unseen(s))
            yield {"id": f"paired-{n}", "images": save_image(scene, f"paired-{n}", rng), "messages": paired_messages(scene, rng)}

    def task_rows(name, roles, count, test):
        rng = random.Random(f"{name} {seed}")
        for n in range(count):
            record, scene = task_record(roles[n % len(roles)], rng, test)
            yield {"id": f"{name}-{n}", "images": save_image(scene, f"{name}-{n}", rng)} | record

    rng = random.Random(f"text {seed}")
    id_roles, ood_roles = task_roles()
    write("paired", paired_rows())
    write("text", ({"id": f"text-{n}"} | text_record(rng) for n in range(text)))
    write("task_demos", task_rows("task_demos", id_roles, demos, False))
    write("task_prompts", task_rows("task_prompts", id_roles, prompts, False))
    write("task_val", task_rows("task_val", id_roles, tests, False))
    write("task_id", task_rows("task_id", id_roles, tests, True))
    write("task_ood", task_rows("task_ood", ood_roles, tests, True))
    (out / "world.json").write_text(json.dumps({"seed": seed, "paired": paired, "text": text, "demos": demos,
                                                "prompts": prompts, "tests": tests}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the tiny world's images and records.")
    parser.add_argument("--out", default="runs/world", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes, questions and answers")
    args = parser.parse_args()
    write_world(args.out, args.seed)
    print(f"wrote {args.out}")
