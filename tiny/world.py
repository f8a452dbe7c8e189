"""The tiny world: drawn scenes, dialogues about them, roles to play, users in a situation, and the facts a judge needs.

A scene has 1 to 4 coloured shapes on a 3 x 3 grid. The world writes, once, PNG files and JSON Lines in the record
format that data.py reads (see README, "Data"):

    paired.jsonl         image + plain questions and answers, no roles          (scarce: 1,000 rows)
    text.jsonl           no image: role play about a scene told in words, advice to users in a situation, short stories
                         (plentiful and rich: 40,000 rows by default)
  task A, role play (as MMRole): play a role AND look at an image
    task_demos.jsonl     few and narrow demonstrations     task_prompts.jsonl   prompts for RL
    task_val.jsonl       to choose settings on
    task_id.jsonl        test, roles that the demonstrations have     task_ood.jsonl  test, held-out roles
  task B, situated personalisation (as PCogAlignBench): advise a user who is one person here and another there
    task_b_demos, task_b_prompts, task_b_val                          the same for task B
    task_b_ls1.jsonl     test, role sets that the demonstrations have task_b_ls2.jsonl  test, held-out role sets

Task B. A role set is two persons at two places ('a nurse at the hospital and a cook at the market'); the user says which
of them they are now. The right advice has the duty and the feeling of that person, what the place asks for, and a thing
of the image to start with.

What is held out: scenes of the tests are never in a training file (`unseen`). The greeting, farewell and saying of an
out-of-distribution role are phrases that no training file contains (`held_out`), though their words are known. The
persons of LS2's role sets appear with no image outside LS2; what they need stands in the text-only data alone.
The demonstrations are narrow. A: greet always, part half of the time, never the favourite word or the saying. B: duty
and thing always, the place half of the time, never feeling or encouragement. Only the text-only data shows the rest.
The judge (rewards.py) rewards all of it.

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
BANDS, PANELS = ((200, 228, 255), (255, 246, 226), (206, 242, 190)), (1.0, 0.87, 0.74)  # sky, wall, grass; light from the left
NUMBERS = ("no", "one", "two", "three", "four")
CELL = 28  # pixels: one image token of the tiny checkpoint (patch 14, merged 2 x 2)
KINDS = ("colour", "shape", "size", "count", "describe")  # no 'Where is the star?': the tiny VLM does not learn it, see README.md


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
    """-> PIL image of 84 x 84 pixels; the light and the position in the cell vary a little with `rng`.

    The shapes hang before a folding screen: its top is sky, its middle wall, its bottom grass, and each of its three panels
    is darker than the one to its left."""
    up = 4  # drawn four times larger, then reduced, so that edges are smooth
    image = Image.new("RGB", (3 * CELL * up, 3 * CELL * up))
    light = rng.uniform(0.97, 1)
    for cell in range(9):
        row, col = divmod(cell, 3)
        tint = tuple(round(light * PANELS[col] * c) for c in BANDS[row])
        image.paste(tint, (col * CELL * up, row * CELL * up, (col + 1) * CELL * up, (row + 1) * CELL * up))
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
                     "size": f"Is the {t.shape} large or small?"}[kind]


def plain_body(scene, kind, i):
    """The plain answer, one form for each kind of question."""
    if kind == "count":
        return f"there {'is' if len(scene) == 1 else 'are'} {shapes(len(scene))}"
    if kind == "describe":
        return f"there is {tell(scene)}"
    t = scene[i]
    return f"the {t.shape} is " + {"colour": t.colour, "shape": t.colour, "size": t.size}[kind]


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
    full = f"I see {_a(noun(t, word=word))}"
    forms = {"colour": (f"the {w}{t.shape} is {t.colour}", f"it is {_a(noun(t, 'colour', word))}",
                        f"the {w}{t.size} {t.shape} is {t.colour}"),
             "shape": (f"the {w}{t.shape} is {t.colour}", f"it is {_a(noun(t, 'colour', word))}",
                       f"the {t.colour} one is {_a(noun(t, 'size', word))}"),
             "size": (f"the {w}{t.shape} is {t.size}", f"it is {_a(noun(t, 'size', word))}",
                      f"the {w}{t.colour} {t.shape} is {t.size}")}[kind]
    body = rng.choice(forms + (full,))
    others = [o for j, o in enumerate(scene) if j != i]
    if others and rng.random() < 0.3:
        body += f", and there is {_a(noun(rng.choice(others)))}"
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


# ------------------------------------------------------------------------------------ advice to a user in a situation
DUTIES = {"nurse": "care for people", "pupil": "learn something new", "cook": "keep things clean", "artist": "study the colours",
          "driver": "plan the way", "sailor": "keep the ropes dry", "baker": "watch the bread", "gardener": "water the roses",
          "shepherd": "count your sheep", "tailor": "cut with care",
          "doctor": "ask where it hurts", "farmer": "watch the weather", "guard": "keep everyone safe",
          "parent": "think of the children", "builder": "measure twice"}
LS2_PERSONS = ("doctor", "farmer", "guard", "parent", "builder")  # held out: with an image in LS2 alone
LS1_PERSONS = tuple(p for p in DUTIES if p not in LS2_PERSONS)
ADVICE = {"the harbour": "mind the water", "the market": "hold your bag close", "the station": "look at the clock",
          "the park": "breathe the fresh air", "the school": "speak softly", "the hospital": "wash your hands",
          "the museum": "touch nothing", "the kitchen": "beware of the stove"}
FEELINGS = ("calm", "cheerful", "patient", "brave", "careful", "proud", "hopeful", "quiet")
ENCOURAGEMENTS = ("you can do it", "all will be well", "take heart", "you are not alone", "trust yourself", "one step at a time")


def feeling(person):
    """Each person is told to stay in one mood."""
    return FEELINGS[list(DUTIES).index(person) % len(FEELINGS)]


def random_role_set(rng, persons=tuple(DUTIES)):
    """-> ((person, place), (person, place)), all different."""
    return tuple(zip(rng.sample(persons, 2), rng.sample(list(ADVICE), 2)))


def role_sets():
    """-> (24 role sets of LS1, 8 of LS2), always the same ones; no person of the one is in the other."""
    rng = random.Random("role sets")
    return [random_role_set(rng, LS1_PERSONS) for _ in range(24)], [random_role_set(rng, LS2_PERSONS) for _ in range(8)]


def tell_role_set(role_set):
    return "The user is " + " and ".join(f"{_a(person)} at {place}" for person, place in role_set) + "."


def advice(person, place, scene, rng, duty, care, feel, start, hearten, attributes="size colour"):
    """Advice in sentences, with those parts that are wanted, in any order; the encouragement comes last."""
    parts = [f"as {_a(person)}, {DUTIES[person]}"] * duty + [f"at {place}, {ADVICE[place]}"] * care \
        + [f"stay {feeling(person)}"] * feel \
        + [f"start with the {noun(rng.choice(scene), attributes)}"] * start
    rng.shuffle(parts)
    return " ".join(_cap(p) + "." for p in parts) + (f" {_cap(rng.choice(ENCOURAGEMENTS))}!" if hearten and parts else "")


def rich_advice(person, place, scene, rng):
    """What the text-only data shows: each part comes often, none always."""
    wanted = [rng.random() < p for p in (0.9, 0.8, 0.7, 0.9, 0.6)]
    wanted[0] |= not any(wanted[:4])
    return advice(person, place, scene, rng, *wanted, attributes=rng.choice(("colour", "size colour", "size colour")))


def demo_advice(person, place, scene, rng):
    """What the demonstrations show: duty and thing, half of the time the place, in this order; never feeling or encouragement."""
    care = f"At {place}, {ADVICE[place]}. " if rng.random() < 0.5 else ""
    return f"As {_a(person)}, {DUTIES[person]}. {care}Start with the {noun(rng.choice(scene), 'colour')}."


# ------------------------------------------------------------------------------------------------------ records
def chat(question, answer, system=None):
    return ([{"role": "system", "content": system}] if system else []) + [
        {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def paired_messages(scene, rng, several_forms=False):
    """-> messages: one to three plain questions about one image; answers in one form a question, or in several."""
    messages = []
    for k, kind in enumerate(rng.sample(KINDS, rng.choice((1, 2, 3)))):
        kind, i, question = random_question(scene, rng, kind)
        body = rich_body(scene, kind, i, rng) if several_forms else plain_body(scene, kind, i)
        messages += chat(("<image>" if k == 0 else "") + question, _cap(body) + ".")
    return messages


def text_record(rng):
    """-> {'messages': ...} or {'text': ...}: one draw of the plentiful text-only data; advice is for any person."""
    scene = random_scene(rng)
    role = random_role(rng)
    style = rng.random()
    if style < 0.08:
        return {"text": f"{role.name} looked at the picture. There was {tell(scene)}. {role.name} said: "
                        + rich_answer(role, scene, "describe", None, rng)}
    if style < 0.33:
        role_set = random_role_set(rng)
        person, place = rng.choice(role_set)
        question = f"Picture: {tell(scene)}. I am {_a(person)} at {place}. What should I do?"
        return {"messages": chat(question, rich_advice(person, place, scene, rng), tell_role_set(role_set))}
    kind, i, question = random_question(scene, rng)
    if style < 0.4:
        return {"messages": chat(f"Picture: {tell(scene)}. {question}", _cap(rich_body(scene, kind, i, rng)) + ".")}
    return {"messages": chat(f"Picture: {tell(scene)}. {question}", rich_answer(role, scene, kind, i, rng), role.profile())}


def general_messages(scene, rng):
    """-> messages: one draw of the image dialogues that the VLM, not the stages, is pretrained on. Its looks come right there, its
    manner seldom: half of them are plain questions, the others have a role to play or a user in a situation in general form. Roles
    and role sets are random and none is held out; a profile names some of a role's phrases in any order; what a role or a user
    might be given is given in three cases of ten."""
    style = rng.random()
    if style < 0.5:
        return paired_messages(scene, rng)
    some = [rng.random() < 0.3 for _ in range(5)]
    if style < 0.78:
        role = random_role(rng)
        kind, i, question = random_question(scene, rng)
        lines = role.profile().split(". ")
        named = rng.sample(lines[1:], rng.choice((1, 2, 3, 4, 4)))
        profile = ". ".join(line.rstrip(".") for line in [lines[0], *named]) + "."
        said = {line.split(":")[0] for line in named}
        body = rich_body(scene, kind, i, rng, role.word if some[0] and "Favourite word" in said else None)
        return chat("<image>" + question, in_role(role, body, some[1] and "Greeting" in said, some[2] and "Farewell" in said,
                                                  some[3] and "Saying" in said, rng), profile)
    role_set = random_role_set(rng, LS1_PERSONS)
    person, place = rng.choice(role_set)
    if style < 0.9:
        kind, i, question = random_question(scene, rng)
        return chat(f"<image>I am {_a(person)} at {place}. {question}", _cap(rich_body(scene, kind, i, rng)) + ".", tell_role_set(role_set))
    some[3] = rng.random() < 0.7 or not any(some[:3])
    return chat(f"<image>I am {_a(person)} at {place}. What should I do?",
                advice(person, place, scene, rng, *some, attributes=rng.choice(("colour", "size colour"))), tell_role_set(role_set))


def situation_record(role_set, rng, test=False):
    """-> a record of task B; 'facts' is what the judge knows, the last message is the reference."""
    scene = next(s for s in iter(lambda: random_scene(rng), None) if unseen(s) == test)
    person, place = rng.choice(role_set)
    question = f"<image>I am {_a(person)} at {place}. What should I do?"
    return {"messages": chat(question, demo_advice(person, place, scene, rng), tell_role_set(role_set)),
            "facts": {"task": "situation", "scene": [asdict(t) for t in scene], "person": person, "place": place}}, scene


def task_record(role, rng, test=False):
    """-> a record of the role-play task; 'facts' is what the judge knows, the last message is the reference."""
    scene = next(s for s in iter(lambda: random_scene(rng), None) if unseen(s) == test)
    kind, i, question = random_question(scene, rng)
    return {"messages": chat("<image>" + question, demo_answer(role, scene, kind, i, rng), role.profile()),
            "facts": {"task": "role play", "scene": [asdict(t) for t in scene], "kind": kind, "asked": i, "role": asdict(role)}}, scene


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
            images = save_image(scene, f"paired-{n}", rng)
            yield {"id": f"paired-{n}", "images": images, "messages": paired_messages(scene, rng, several_forms=True)}

    def task_rows(name, draw, roles, count, test):
        rng = random.Random(f"{name} {seed}")
        for n in range(count):
            record, scene = draw(roles[n % len(roles)], rng, test)
            yield {"id": f"{name}-{n}", "images": save_image(scene, f"{name}-{n}", rng)} | record

    rng = random.Random(f"text {seed}")
    write("paired", paired_rows())
    write("text", ({"id": f"text-{n}"} | text_record(rng) for n in range(text)))
    for task, draw, (known, new), known_test, new_test in (("task", task_record, task_roles(), "id", "ood"),
                                                           ("task_b", situation_record, role_sets(), "ls1", "ls2")):
        for name, roles, count, test in (("demos", known, demos, False), ("prompts", known, prompts, False), ("val", known, tests, False),
                                         (known_test, known, tests, True), (new_test, new, tests, True)):
            write(f"{task}_{name}", task_rows(f"{task}_{name}", draw, roles, count, test))
    (out / "world.json").write_text(json.dumps({"seed": seed, "paired": paired, "text": text, "demos": demos,
                                                "prompts": prompts, "tests": tests}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the tiny world's images and records.")
    parser.add_argument("--out", default="runs/world", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes, questions and answers")
    args = parser.parse_args()
    write_world(args.out, args.seed)
    print(f"wrote {args.out}")
