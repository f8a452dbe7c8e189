"""plots.py: one table of colours, curves and drawings from hand-made numbers; the two explaining figures."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

import plots
import stage2_codebook
import stage3_bc
from studies import figures

ROOT = Path(__file__).resolve().parent.parent


def has_colour(path, colour):
    """Is there a pixel of just this colour in the picture?"""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return bool((pixels == np.round(np.array(to_rgb(colour)) * 255).astype(np.uint8)).all(1).any())


# ------------------------------------------------------------------------------------------------ colours
def test_each_row_has_its_colour_in_every_figure():
    rows = ("Prompt", "SFT", "BC latent", "GRPO token", "GRPO latent")
    assert len({plots.colour_of(row) for row in rows}) == 5
    assert plots.colour_of("DAPO latent") == plots.colour_of("latent") == plots.COLOURS["latent"]
    for path in (ROOT / "evaluate.py", *(ROOT / "studies").glob("*.py")):  # nobody draws with colours of their own
        assert not re.search(r"""["'](tab:|C\d["'])""", path.read_text()), path


def test_the_commonest_codes_have_colours_of_their_own():
    many = len(plots.CODE_COLOURS)
    colours = plots.code_colours([7] * 3 + list(range(100, 100 + many)) + [5, 5])
    assert list(colours)[:2] == [7, 5] and len(colours) == many + 2
    assert len({colours[code] for code in list(colours)[:many]}) == many
    assert {colours[code] for code in list(colours)[many:]} <= set(plots.CODE_GREYS)


# ------------------------------------------------------------------------------------------------ curves, usage
def test_smooth_by_hand():
    # 6 steps in 3 parts: the mean of the last 2; before the first step stands its own value
    assert plots.smooth(np.array([2.0, 4, 6, 8, 0, 0]), 3).tolist() == [2, 3, 5, 7, 4, 0]


def test_a_curve_without_a_step_is_drawn_without_a_line(tmp_path):
    """A short run of DAPO in which all groups have equal rewards updates nothing: it has a reward and no entropy."""
    (tmp_path / "ckpt-000001").mkdir()
    state = {"step": 1, "stage": "stage4_latent_rl", "finished": True, "config": {"batch": 1, "group": 2}}
    (tmp_path / "ckpt-000001" / "state.json").write_text(json.dumps(state))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 1.0}) + "\n")
    plots.draw_curves({"DAPO latent": tmp_path}, tmp_path / "curves.png")
    assert has_colour(tmp_path / "curves.png", plots.COLOURS["latent"])


def test_curves_are_drawn_in_the_colours_of_their_side(tmp_path):
    for side in ("token", "latent"):
        state = tmp_path / side / "ckpt-000003" / "state.json"
        state.parent.mkdir(parents=True)
        state.write_text(
            json.dumps({"step": 3, "stage": "stage4_latent_rl", "finished": True, "config": {"batch": 2, "group": 4}})
        )
        level = 1.0 if side == "token" else 2.0
        rows = [{"step": s, "reward": level, "entropy": level, "kl": level} for s in (1, 2, 3)]
        rows[1] = {"step": 2}  # the judge failed throughout
        (tmp_path / side / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    plots.draw_curves({f"GRPO {s}": tmp_path / s for s in ("token", "latent")}, tmp_path / "curves.png")
    assert has_colour(tmp_path / "curves.png", plots.COLOURS["token"])
    assert has_colour(tmp_path / "curves.png", plots.COLOURS["latent"])
    assert not has_colour(tmp_path / "curves.png", plots.COLOURS["SFT"])


def test_perplexity_by_hand():
    assert plots.perplexity(np.array([0.25] * 4 + [0.0])) == pytest.approx(4, abs=1e-6)


def test_usage_with_and_without_styles(tmp_path):
    usage = {
        "text-only data": {"seen": [3, 0, 1], "all else": [1, 1, 0]},
        "policy": {"seen": [0, 0, 0], "all else": [0, 2, 0]},
    }
    plots.draw_usage(usage, "text-only data", tmp_path / "two.png")
    assert has_colour(tmp_path / "two.png", plots.STYLE_COLOURS[0])
    plots.draw_usage({"text-only data": {"all else": [1, 2, 3]}}, "text-only data", tmp_path / "one.png")
    assert not has_colour(tmp_path / "one.png", plots.STYLE_COLOURS[0])


# ------------------------------------------------------------------------------------------------ the actions
def test_spoken_has_a_text_and_a_code_for_each_token():
    tokenizer = SimpleNamespace(decode=lambda ids: {5: "A", 6: " red", 8: "By"}[ids[0]])
    assert plots.spoken(tokenizer, [5, 6, 9], [1, 2, 3], eos=9) == [("A", 1), (" red", 2), (plots.END, 3)]
    assert plots.spoken(tokenizer, [8, 9], [7, 1], eos=9) == [("By", 7), (plots.END, 1)]


def test_boxes_stand_side_by_side_with_a_gap_for_a_space():
    boxes, height = plots.place([("Hail", 1), (",", 2), (" friend", 3)])
    (x1, y1, w1, *first), (x2, _, w2, *second), (x3, _, _, *third) = boxes
    assert (first, second, third) == (["Hail", 1], [",", 2], ["friend", 3])
    assert x2 - (x1 + w1) == 2 and x3 - (x2 + w2) == pytest.approx(2 + plots.CHARACTER) and w2 == plots.NARROWEST
    assert height == plots.BOX + 2 * plots.MARGIN and y1 == plots.MARGIN


def test_long_answers_are_wrapped_between_words():
    boxes, height = plots.place([(" trave", 1), ("ller", 2)] * 30)
    lines = sorted({y for _, y, *_ in boxes})
    assert len(lines) > 2 and height == lines[-1] + plots.BOX + plots.MARGIN
    assert all(x + width <= plots.WIDTH - plots.MARGIN for x, _, width, *_ in boxes)
    assert all(first[1] == second[1] for first, second in zip(boxes[::2], boxes[1::2]))  # the two halves of a word
    long, _ = plots.place([("x" * 30, 1)] * 9)  # one word longer than a line
    assert all(x + width <= plots.WIDTH - plots.MARGIN for x, _, width, *_ in long)


def test_the_drawing_of_the_actions_has_its_size_and_colours(tmp_path):
    steps = [("Hail", 3), ("!", 9), (" friend", 3)]
    plots.draw_actions(steps, plots.code_colours(code for _, code in steps), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (2 * plots.WIDTH, 2 * plots.place(steps)[1])
    assert has_colour(tmp_path / "a.png", plots.CODE_COLOURS[0]) and has_colour(
        tmp_path / "a.png", plots.CODE_COLOURS[1]
    )


def test_examples_show_image_answers_and_actions(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "scene.png")
    messages = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A ring."}]
    thing = {"size": "small", "colour": "red", "shape": "ring", "place": "on the left"}
    record = {"messages": messages, "images": [str(tmp_path / "scene.png")], "facts": {"scene": [thing]}}
    out = tmp_path / "out"
    out.mkdir()
    answers = {"SFT": ["A star."], "GRPO latent": ["[A] ring."]}
    plots.write_examples(out, "OOD", [record], answers, ("GRPO latent", [[("[A]", 4), (" ring", 5), (plots.END, 4)]]))
    page = (out / "examples.md").read_text()
    for line in (
        "![Image of dialogue 1](example-0.png)",
        "In the image: small red ring on the left.",
        "- *reference*: A ring.",
    ):
        assert line in page.splitlines()
    assert "- *SFT*: A star." in page and "(A) 4 ring 5" in page and "](example-0-actions.png)" in page
    assert (out / "example-0.png").is_file() and (out / "example-0-actions.png").is_file()
    plots.write_examples(tmp_path, "OOD", [record | {"facts": None, "images": []}], {"SFT": ["A star."]})
    assert "actions" not in (tmp_path / "examples.md").read_text()


# ------------------------------------------------------------------------------------------------ explaining figures
def test_the_figures_are_drawn_for_the_width_of_a_readme(tmp_path):
    figures.main(["--out", str(tmp_path)])
    for name in ("timeline.png", "stages.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width == 2 * figures.WIDTH
        assert has_colour(tmp_path / name, figures.tint(plots.PARTS["policy"]))
    assert has_colour(tmp_path / "timeline.png", plots.PARTS["gradient"])


def test_the_figure_of_the_stages_says_what_the_stages_do():
    phases = {f"{title} {phase.name}": phase for title, _, _, room in figures.ROOMS for phase in room}
    trains = {name: {part.replace("codebook", "quantiser") for part in p.trains} for name, p in phases.items()}
    assert trains == {
        "1  Projector ": {"projector"},
        "2  Codebook phase a": set(stage2_codebook.trainable_parts("a")),
        "2  Codebook phase b": set(stage2_codebook.trainable_parts("b")),
        "3  Cloning clone": set(stage3_bc.trainable_parts("clone")),
        "3  Cloning adapt": set(stage3_bc.trainable_parts("adapt")),
        "4  RL ": {"policy"},
    }
    assert all(set(p.trains) <= set(p.there) for p in phases.values())
