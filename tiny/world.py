"""The tiny world: drawn scenes, dialogues about them, roles to play, users to advise, and the facts that a judge needs.

A scene has 1 to 4 coloured shapes on a grid of 3 x 3 cells. This script draws scenes as PNG files and writes dialogues
about them as JSON Lines, in the record format that data.py reads (docs/data.md). It writes:

    paired.jsonl         images with plain questions and answers, without roles. Scarce: 1,000 rows.
    text.jsonl           no images: role play about a scene told in words, advice to users, short stories.
                         Plentiful and rich: 40,000 rows by default.
    styles.json          which words belong to which part of a role's manner, for the plot of what each code stands for
    world.json           the counts below; written last, so that it says that the world is complete

  Task A, role play (after MMRole): play a role AND look at an image.
    task_demos.jsonl     demonstrations, few and narrow
    task_prompts.jsonl   prompts for RL
    task_val.jsonl       prompts to choose settings on
    task_id.jsonl        test with roles that the demonstrations have
    task_ood.jsonl       test with held-out roles
  Task B, advice in a situation (after PCogAlignBench): the user has one job at one place and another job at another.
    task_b_demos, task_b_prompts, task_b_val       as for task A
    task_b_ls1.jsonl     test with role sets that the demonstrations have
    task_b_ls2.jsonl     test with held-out role sets

Task B in detail. A role set is two persons at two places: 'a nurse at the hospital and a cook at the market'. The user
says which of the two they are now. Good advice has four things: the duty of that person, the feeling of that person,
what the place asks for, and a thing of the image to start with.

What is held out. The scenes of the tests are in no training file (`unseen`). A held-out role has a greeting, a farewell
and a saying that no training file contains (`held_out`), though their single words do occur. The persons in LS2's role
sets appear beside an image only in LS2. What these persons need stands in the text-only data alone.

The demonstrations are narrow. In task A they always greet and say farewell half of the time; the favourite word and the
saying never come. In task B they always give duty and thing, and half of the time what the place asks for; feeling and
encouragement never come. Only the text-only data shows all of these. The judge (tiny/judge.py) rewards all of them.

    python tiny/world.py --out runs/world --seed 0
"""

import argparse
import json
import math
import random
import re
import zlib
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 135, 20),
    "yellow": (250, 215, 40),
    "green": (40, 150, 60),
    "blue": (35, 85, 205),
    "purple": (130, 50, 160),
    "pink": (250, 130, 180),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 8, "large": 13}  # radius in pixels
PLACES = (
    *("at the top left", "at the top", "at the top right"),
    *("on the left", "in the middle", "on the right"),
    *("at the bottom left", "at the bottom", "at the bottom right"),
)
BANDS = ((200, 228, 255), (255, 246, 226), (206, 242, 190))  # behind the three rows: sky, wall, grass
PANELS = (1.0, 0.87, 0.74)  # brightness of the three columns: the light comes from the left
NUMBERS = ("no", "one", "two", "three", "four")
CELL = 28  # pixels: one image token of the tiny checkpoint (patch 14, merged 2 x 2)
KINDS = ("colour", "shape", "size", "count", "describe")  # no 'Where is the star?', see tiny/README.md


# ------------------------------------------------------------------------------------------------------- scenes
@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    shape: str
    place: str


def random_scene(rng):
    """-> tuple of 1 to 4 Things, in the order of their cells."""
    cells = sorted(rng.sample(range(9), rng.choice((1, 2, 2, 3, 3, 4))))
    return tuple(
        Thing(rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(SHAPES), PLACES[c]) for c in cells
    )


def unseen(scene):
    """True for the one eighth of all scenes that only tests may use."""
    return zlib.crc32(repr(scene).encode()) % 8 == 0


def scenes(rng, test=False):
    """Random scenes forever: those that only tests may use, or all others."""
    while True:
        scene = random_scene(rng)
        if unseen(scene) == test:
            yield scene


def draw_scene(scene, rng):
    """-> PIL image of 84 x 84 pixels; the light and the position in the cell vary a little with `rng`.

    The shapes hang before a folding screen. Its top is sky, its middle wall, its bottom grass. Each of its three panels
    is darker than the one to its left, so every cell has a background of its own."""
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
    else:  # star: ten corners, far from and near to the centre in turn
        radii = [r if k % 2 == 0 else 0.42 * r for k in range(10)]
        angles = [k * math.pi / 5 for k in range(10)]
        pen.polygon([(x + d * math.sin(a), y - d * math.cos(a)) for d, a in zip(radii, angles)], fill=fill)


# -------------------------------------------------------------------------------------------------------- roles
def _list(text):
    return tuple(text.split(", "))


GREETINGS = [
    f"{a}, {b}"
    for a, b in product(
        _list("ahoy, hail, hello, greetings, good day, welcome, well met, hey, howdy, rejoice, hark, peace"),
        _list(
            "friend, traveller, sailor, neighbour, comrade, stranger, captain, dear guest, young one, my lord, "
            "partner, scholar"
        ),
    )
]
FAREWELLS = [
    f"{a} {b} to you"
    for a, b in product(
        _list("fair, safe, warm, calm, bright, quiet, swift, kind, merry, soft, good, sweet"),
        _list("winds, roads, fires, waters, mornings, evenings, dreams, harvests, journeys, seasons, songs, tides"),
    )
]
SAYINGS = [
    f"by the {a} {b}"
    for a, b in product(
        _list("old, silver, deep, silent, northern, hidden, ancient, broken, golden, frozen, holy, lonely"),
        _list("sea, moon, lantern, mountain, oak, river, drum, anchor, crown, bell, hearth, forge"),
    )
]
WORDS = _list(
    "splendid, marvellous, curious, humble, mighty, gentle, grand, dreadful, charming, peculiar, noble, jolly, gloomy, "
    "delightful, fierce, elegant, rustic, precious, dazzling, modest, quaint, glorious, wondrous, sturdy, cosy, "
    "solemn, cheerful, strange, handsome, fine, lovely, famous"
)
FIRST_NAMES = _list(
    "Mara, Odo, Tess, Bram, Ilse, Finn, Greta, Hugo, Nell, Otto, Pia, Rolf, Sana, Tomas, Una, Viktor, Wren, Yara, "
    "Zeno, Alma, Basil, Cleo, Dara, Edda"
)
TRADES = _list(
    "sailor, baker, knight, monk, smith, gardener, painter, miller, hunter, weaver, poet, shepherd, mason, piper, "
    "tailor, healer"
)


@dataclass(frozen=True)
class Role:
    name: str
    greeting: str
    farewell: str
    word: str  # the favourite word
    saying: str

    def profile(self):
        """-> the system message that tells the model which role to play."""
        return (
            f"You are {self.name}. Greeting: {capital(self.greeting)}. Farewell: {capital(self.farewell)}. "
            f"Favourite word: {self.word}. Saying: {self.saying}."
        )


def held_out(phrase):
    """True for the one sixth of all greetings, farewells and sayings that only out-of-distribution roles have."""
    return zlib.crc32(phrase.encode()) % 6 == 0


def _phrases(pool, ood):
    return [p for p in pool if held_out(p) == ood]


def random_role(rng, ood=False):
    """-> Role; with `ood` its greeting, farewell and saying are held-out ones."""
    return Role(
        name=f"{rng.choice(FIRST_NAMES)} the {rng.choice(TRADES)}",
        greeting=rng.choice(_phrases(GREETINGS, ood)),
        farewell=rng.choice(_phrases(FAREWELLS, ood)),
        word=rng.choice(WORDS),
        saying=rng.choice(_phrases(SAYINGS, ood)),
    )


def task_roles():
    """-> (24 in-distribution roles, 8 out-of-distribution roles) of the role-play task; always the same ones."""
    rng = random.Random("task roles")
    return [random_role(rng) for _ in range(24)], [random_role(rng, ood=True) for _ in range(8)]


def styles():
    """-> {what words are about: the words}: four parts of a role's manner, and what is seen. Some are in several."""
    phrases = {
        "favourite words": WORDS,
        "sayings": [s.removeprefix("by the ") for s in SAYINGS],
        "greetings": GREETINGS,
        "farewells": [f.removesuffix(" to you") for f in FAREWELLS],
        "what is seen": (*COLOURS, *SHAPES, *SIZES, *NUMBERS),
    }
    return {name: list(dict.fromkeys(re.findall("[a-z]+", " ".join(some)))) for name, some in phrases.items()}


# ---------------------------------------------------------------------------------------- questions and answers
def capital(text):
    """'red circle' -> 'Red circle'."""
    return text[:1].upper() + text[1:]


def with_article(phrase):
    """'orange star' -> 'an orange star'."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def noun(thing, parts="size colour", word=None):
    """-> 'splendid large red circle', with those of its attributes that `parts` names."""
    return " ".join(([word] if word else []) + [getattr(thing, p) for p in parts.split()] + [thing.shape])


def tell(scene, word=None):
    """-> the whole scene in words: 'a large red circle at the top left and a small blue star in the middle'."""
    told = [f"{with_article(noun(t, word=word if i == 0 else None))} {t.place}" for i, t in enumerate(scene)]
    return " and ".join(filter(None, [", ".join(told[:-1]), told[-1]]))


def shapes(n, word=None):
    """-> 'two splendid shapes'."""
    return f"{NUMBERS[n]} {word + ' ' if word else ''}{'shape' if n == 1 else 'shapes'}"


def there_are(n, word=None):
    return f"there {'is' if n == 1 else 'are'} {shapes(n, word)}"


def random_question(scene, rng, kind=None):
    """-> (kind, index of the thing asked about or None, question); asks only what has one answer."""
    kind = kind or rng.choice(KINDS)
    if kind == "count":
        return kind, None, "How many shapes are there?"
    known = "colour" if kind == "shape" else "shape"  # the question names the thing by this
    values = [getattr(t, known) for t in scene]
    once = [i for i, v in enumerate(values) if values.count(v) == 1]
    if kind == "describe" or not once:
        return "describe", None, "What do you see?"
    i = rng.choice(once)
    t = scene[i]
    questions = {
        "colour": f"What colour is the {t.shape}?",
        "shape": f"Which shape is {t.colour}?",
        "size": f"Is the {t.shape} large or small?",
    }
    return kind, i, questions[kind]


def plain_body(scene, kind, i):
    """The plain answer, one form for each kind of question."""
    if kind == "count":
        return there_are(len(scene))
    if kind == "describe":
        return f"there is {tell(scene)}"
    t = scene[i]
    return f"the {t.shape} is " + {"colour": t.colour, "shape": t.colour, "size": t.size}[kind]


def rich_body(scene, kind, i, rng, word=None):
    """One of several forms of a right answer, often with more detail; `word` is the role's favourite word."""
    w = f"{word} " if word else ""
    if kind == "count":
        n = len(scene)
        body = rng.choice((there_are(n, word), f"I count {shapes(n, word)}", f"I see {shapes(n, word)} here"))
        return body + (f": {tell(scene)}" if rng.random() < 0.3 else "")
    if kind == "describe":
        return rng.choice(("there is ", "I see ", "here I find ", "look, I spy ")) + tell(scene, word)
    t = scene[i]
    colour = (f"the {w}{t.shape} is {t.colour}", f"it is {with_article(noun(t, 'colour', word))}")
    size = (f"the {w}{t.shape} is {t.size}", f"it is {with_article(noun(t, 'size', word))}")
    forms = {
        "colour": (*colour, f"the {w}{t.size} {t.shape} is {t.colour}"),
        "shape": (*colour, f"the {t.colour} one is {with_article(noun(t, 'size', word))}"),
        "size": (*size, f"the {w}{t.colour} {t.shape} is {t.size}"),
    }
    body = rng.choice((*forms[kind], f"I see {with_article(noun(t, word=word))}"))
    others = [o for j, o in enumerate(scene) if j != i]
    if others and rng.random() < 0.3:
        body += f", and there is {with_article(noun(rng.choice(others)))}"
    return body


def in_role(role, body, greet, part, saying, rng):
    """-> the answer with those parts of the role's manner that are wanted: greeting, farewell, saying."""
    if saying:
        body = f"{role.saying}, {body}" if rng.random() < 0.5 else f"{body}, {role.saying}"
    sentences = [capital(body) + "."]
    if greet:
        sentences.insert(0, capital(role.greeting) + "!")
    if part:
        sentences.append(capital(role.farewell) + "!")
    return " ".join(sentences)


def rich_answer(role, scene, kind, i, rng):
    """What the text-only data shows: each part of a role's manner comes often, none of them always."""
    body = rich_body(scene, kind, i, rng, role.word if rng.random() < 0.6 else None)
    return in_role(role, body, rng.random() < 0.8, rng.random() < 0.7, rng.random() < 0.6, rng)


def demo_answer(role, scene, kind, i, rng):
    """What the demonstrations show: greeting, plain answer, sometimes the farewell; never favourite word or saying."""
    return in_role(role, plain_body(scene, kind, i), True, rng.random() < 0.5, False, rng)


# ------------------------------------------------------------------------------------ advice to a user in a situation
LS1_DUTIES = {
    "nurse": "care for people",
    "pupil": "learn something new",
    "cook": "keep things clean",
    "artist": "study the colours",
    "driver": "plan the way",
    "sailor": "keep the ropes dry",
    "baker": "watch the bread",
    "gardener": "water the roses",
    "shepherd": "count your sheep",
    "tailor": "cut with care",
}
LS2_DUTIES = {  # held out: these persons appear beside an image in LS2 alone
    "doctor": "ask where it hurts",
    "farmer": "watch the weather",
    "guard": "keep everyone safe",
    "parent": "think of the children",
    "builder": "measure twice",
}
DUTIES = LS1_DUTIES | LS2_DUTIES
LS1_PERSONS, LS2_PERSONS = tuple(LS1_DUTIES), tuple(LS2_DUTIES)
ADVICE = {
    "the harbour": "mind the water",
    "the market": "hold your bag close",
    "the station": "look at the clock",
    "the park": "breathe the fresh air",
    "the school": "speak softly",
    "the hospital": "wash your hands",
    "the museum": "touch nothing",
    "the kitchen": "beware of the stove",
}
FEELINGS = _list("calm, cheerful, patient, brave, careful, proud, hopeful, quiet")
ENCOURAGEMENTS = _list(
    "you can do it, all will be well, take heart, you are not alone, trust yourself, one step at a time"
)


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
    return "The user is " + " and ".join(f"{with_article(person)} at {place}" for person, place in role_set) + "."


def who_i_am(person, place, question="What should I do?"):
    """-> what the user says: who and where they are now, and what they want to know."""
    return f"I am {with_article(person)} at {place}. {question}"


def advice(person, place, scene, rng, duty, care, feel, start, hearten, attributes="size colour"):
    """Advice in sentences, with those parts that are wanted, in any order; the encouragement comes last."""
    thing = noun(rng.choice(scene), attributes)  # drawn also if not wanted, so that the draws behind it stay the same
    parts = []
    if duty:
        parts.append(f"as {with_article(person)}, {DUTIES[person]}")
    if care:
        parts.append(f"at {place}, {ADVICE[place]}")
    if feel:
        parts.append(f"stay {feeling(person)}")
    if start:
        parts.append(f"start with the {thing}")
    rng.shuffle(parts)
    sentences = [capital(p) + "." for p in parts]
    if hearten and parts:
        sentences.append(capital(rng.choice(ENCOURAGEMENTS)) + "!")
    return " ".join(sentences)


def rich_advice(person, place, scene, rng):
    """What the text-only data shows: each part comes often, none always."""
    wanted = [rng.random() < p for p in (0.9, 0.8, 0.7, 0.9, 0.6)]
    wanted[0] |= not any(wanted[:4])
    return advice(person, place, scene, rng, *wanted, attributes=rng.choice(("colour", "size colour", "size colour")))


def demo_advice(person, place, scene, rng):
    """What the demonstrations show: duty, half of the time what the place asks for, and a thing, in this order."""
    care = f"At {place}, {ADVICE[place]}. " if rng.random() < 0.5 else ""
    thing = noun(rng.choice(scene), "colour")
    return f"As {with_article(person)}, {DUTIES[person]}. {care}Start with the {thing}."


# ------------------------------------------------------------------------------------------------------ records
def chat(question, answer, system=None):
    """-> messages of one question and its answer, after the system message if there is one."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def paired_messages(scene, rng, several_forms=False):
    """-> messages: one to three plain questions about one image; answers in one form a question, or in several."""
    messages = []
    for k, kind in enumerate(rng.sample(KINDS, rng.choice((1, 2, 3)))):
        kind, i, question = random_question(scene, rng, kind)
        body = rich_body(scene, kind, i, rng) if several_forms else plain_body(scene, kind, i)
        messages += chat(("<image>" if k == 0 else "") + question, capital(body) + ".")
    return messages


def text_record(rng):
    """-> {'messages': ...} or {'text': ...}: one draw of the plentiful text-only data; advice is for any person."""
    scene = random_scene(rng)
    role = random_role(rng)
    style = rng.random()
    if style < 0.08:
        said = rich_answer(role, scene, "describe", None, rng)
        return {"text": f"{role.name} looked at the picture. There was {tell(scene)}. {role.name} said: {said}"}
    picture = f"Picture: {tell(scene)}. "
    if style < 0.33:
        role_set = random_role_set(rng)
        person, place = rng.choice(role_set)
        answer = rich_advice(person, place, scene, rng)
        return {"messages": chat(picture + who_i_am(person, place), answer, tell_role_set(role_set))}
    kind, i, question = random_question(scene, rng)
    if style < 0.4:
        return {"messages": chat(picture + question, capital(rich_body(scene, kind, i, rng)) + ".")}
    return {"messages": chat(picture + question, rich_answer(role, scene, kind, i, rng), role.profile())}


def general_messages(scene, rng):
    """-> messages: one draw of the image dialogues that the VLM is pretrained on; the stages never see them.

    Half of them are plain questions. The others have a role to play or a user in a situation, in general form: roles
    and role sets are random, and none is held out. The answers are right about the image. What the role or the user
    would have them say is said in three cases of ten only."""
    style = rng.random()
    if style < 0.5:
        return paired_messages(scene, rng)
    some = [rng.random() < 0.3 for _ in range(5)]
    if style < 0.78:
        return _general_role(scene, rng, *some[:4])
    role_set = random_role_set(rng, LS1_PERSONS)
    person, place = rng.choice(role_set)
    if style < 0.9:
        kind, i, question = random_question(scene, rng)
        answer = capital(rich_body(scene, kind, i, rng)) + "."
        return chat("<image>" + who_i_am(person, place, question), answer, tell_role_set(role_set))
    some[3] = rng.random() < 0.7 or not any(some[:3])
    attributes = rng.choice(("colour", "size colour"))
    answer = advice(person, place, scene, rng, *some, attributes=attributes)
    return chat("<image>" + who_i_am(person, place), answer, tell_role_set(role_set))


def _general_role(scene, rng, word, greet, part, saying):
    """-> messages with a role. Its profile names one to four of its phrases in any order; only these may be said."""
    role = random_role(rng)
    kind, i, question = random_question(scene, rng)
    name, *lines = role.profile().split(". ")
    lines = rng.sample(lines, rng.choice((1, 2, 3, 4, 4)))
    profile = ". ".join(line.rstrip(".") for line in [name, *lines]) + "."
    named = {line.split(":")[0] for line in lines}
    body = rich_body(scene, kind, i, rng, role.word if word and "Favourite word" in named else None)
    manner = greet and "Greeting" in named, part and "Farewell" in named, saying and "Saying" in named
    return chat("<image>" + question, in_role(role, body, *manner, rng), profile)


def task_record(role, rng, test=False):
    """-> (a record of task A, its scene); 'facts' is what the judge knows, the last message is the reference."""
    scene = next(scenes(rng, test))
    kind, i, question = random_question(scene, rng)
    messages = chat("<image>" + question, demo_answer(role, scene, kind, i, rng), role.profile())
    told = [asdict(t) for t in scene]
    facts = {"task": "role play", "scene": told, "kind": kind, "asked": i, "role": asdict(role)}
    return {"messages": messages, "facts": facts}, scene


def situation_record(role_set, rng, test=False):
    """-> (a record of task B, its scene); 'facts' is what the judge knows, the last message is the reference."""
    scene = next(scenes(rng, test))
    person, place = rng.choice(role_set)
    answer = demo_advice(person, place, scene, rng)
    messages = chat("<image>" + who_i_am(person, place), answer, tell_role_set(role_set))
    told = [asdict(t) for t in scene]
    return {
        "messages": messages,
        "facts": {"task": "situation", "scene": told, "person": person, "place": place},
    }, scene


# -------------------------------------------------------------------------------------------------------- files
def write_world(out, seed=0, paired=1000, text=40000, demos=400, prompts=600, tests=256):
    """Write every file of the world under `out`. `paired`, `text`, `demos`, ...: how many rows each such file gets."""
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    _write(out, "paired", _paired_rows(out, seed, paired))
    rng = random.Random(f"text {seed}")
    _write(out, "text", ({"id": f"text-{n}"} | text_record(rng) for n in range(text)))
    tasks = (("task", task_record, task_roles(), "id", "ood"), ("task_b", situation_record, role_sets(), "ls1", "ls2"))
    for task, draw, (known, new), known_test, new_test in tasks:
        for part, roles, count, test in (
            ("demos", known, demos, False),
            ("prompts", known, prompts, False),
            ("val", known, tests, False),
            (known_test, known, tests, True),
            (new_test, new, tests, True),
        ):
            name = f"{task}_{part}"
            _write(out, name, _task_rows(out, name, seed, draw, roles, count, test))
    (out / "styles.json").write_text(json.dumps(styles(), indent=1))
    counts = {"seed": seed, "paired": paired, "text": text, "demos": demos, "prompts": prompts, "tests": tests}
    (out / "world.json").write_text(json.dumps(counts))


def _write(out, name, rows):
    with open(out / f"{name}.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def _save_image(out, name, scene, rng):
    draw_scene(scene, rng).save(out / "images" / f"{name}.png")
    return [f"images/{name}.png"]


def _paired_rows(out, seed, count):
    rng = random.Random(f"paired {seed}")
    for n in range(count):
        scene = next(scenes(rng))
        images = _save_image(out, f"paired-{n}", scene, rng)
        yield {"id": f"paired-{n}", "images": images, "messages": paired_messages(scene, rng, several_forms=True)}


def _task_rows(out, name, seed, draw, roles, count, test):
    rng = random.Random(f"{name} {seed}")  # of its own, so that one file's length changes no other file
    for n in range(count):
        record, scene = draw(roles[n % len(roles)], rng, test)
        yield {"id": f"{name}-{n}", "images": _save_image(out, f"{name}-{n}", scene, rng)} | record


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the tiny world's images and records.")
    parser.add_argument("--out", default="runs/world", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes, questions and answers")
    args = parser.parse_args()
    try:
        write_world(args.out, args.seed)
    except OSError as error:
        parser.exit(2, f"error: --out {args.out}: cannot be written ({error})\n")
    print(f"wrote {args.out}")
