"""The tiny world keeps its promises, and the shipped checkpoint is what it is said to be."""

import json
import random
from pathlib import Path

import pytest

from tiny import world as W

ROOT = Path(__file__).resolve().parent.parent
FILES = ("paired", "text", "task_demos", "task_prompts", "task_val", "task_id", "task_ood")


def rows(world, name):
    return [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]


def test_the_world_is_the_same_for_the_same_seed(world, tmp_path):
    W.write_world(tmp_path, seed=0, paired=3, text=3, demos=3, prompts=2, tests=2)
    for name in FILES:
        assert (tmp_path / f"{name}.jsonl").read_text().splitlines()[:2] == (world / f"{name}.jsonl").read_text().splitlines()[:2]
    assert (tmp_path / "images/paired-0.png").read_bytes() == (world / "images/paired-0.png").read_bytes()


def test_a_drawn_scene_has_its_colours_in_their_places():
    rng = random.Random(0)
    for _ in range(40):
        scene = W.random_scene(rng)
        image = W.draw_scene(scene, rng)
        for place in W.PLACES:
            row, col = divmod(W.PLACES.index(place), 3)
            cell = image.crop((col * 28, row * 28, col * 28 + 28, row * 28 + 28))
            near = {name for name, rgb in W.COLOURS.items() if any(sum(abs(a - b) for a, b in zip(p, rgb)) < 12 for p in set(cell.get_flattened_data()))}
            assert near == {t.colour for t in scene if t.place == place}


def test_questions_have_one_answer():
    rng = random.Random(1)
    for _ in range(500):
        scene = W.random_scene(rng)
        kind, i, question = W.random_question(scene, rng)
        if i is not None:
            known = "colour" if kind == "shape" else "shape"
            assert sum(getattr(t, known) == getattr(scene[i], known) for t in scene) == 1
            assert getattr(scene[i], known) in question


def test_what_is_held_out_is_in_no_training_file(world):
    _, ood = W.task_roles()
    held = {p for r in ood for p in (r.greeting, r.farewell, r.saying)}
    assert held and all(W.held_out(p) for p in held)
    for name in ("paired", "text", "task_demos", "task_prompts"):
        text = (world / f"{name}.jsonl").read_text().lower()
        assert not [p for p in held if p in text]
    for name in FILES[2:]:
        for r in rows(world, name):
            scene = tuple(W.Thing(**t) for t in r["facts"]["scene"])
            assert W.unseen(scene) == (name in ("task_id", "task_ood"))


def test_demonstrations_are_narrow(world):
    for r in rows(world, "task_demos"):
        role, answer = r["facts"]["role"], r["messages"][-1]["content"].lower()
        assert answer.startswith(role["greeting"]) and role["saying"] not in answer and f" {role['word']} " not in answer


def test_the_checkpoint_is_small_and_holds_no_code():
    files = [p for p in (ROOT / "tiny" / "vlm").iterdir()]
    assert sum(p.stat().st_size for p in files) < 15e6
    assert {p.suffix for p in files} <= {".json", ".jinja", ".safetensors"}


def test_the_checkpoint_sees():
    """Of 12 counts, colours, shapes and sizes in unseen scenes at least 10 are answered to the letter (chance: below 1 in 3)."""
    import torch
    from transformers import AutoModelForImageTextToText

    from data import Processor
    from tiny.train_vlm import evaluate
    vlm = str(ROOT / "tiny" / "vlm")
    model = AutoModelForImageTextToText.from_pretrained(vlm, dtype=torch.float32).eval()
    scores = evaluate(model, Processor(vlm), count=18)
    easy = [scores[k] for k in ("count", "colour", "shape", "size") if k in scores]
    assert len(easy) == 4 and sum(easy) / 4 >= 10 / 12


@pytest.mark.parametrize("name", FILES)
def test_every_record_goes_through(world, name):
    from data import Processor, Records
    processor, records = Processor(str(ROOT / "tiny" / "vlm"), 400), Records(world / f"{name}.jsonl")
    for i in range(len(records)):
        e = processor.example(records[i])
        assert e.response.any() and (e.pixels is not None) == (name != "text")
