"""smol/: scenes and what is said of them, the naming loss by hand, and that training moves nothing but the tower."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, close
from safetensors.torch import load_file
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from smol import make_vlm, scenes, train_vision
from smol.drawings import Drawings, with_view_box
from smol.scenes import Scene, Thing, ask, caption, dialogue, draw_mosaic, draw_scene, phrases, plural, seeded
from smol.teacher import whiten

NAMES = ["cat", "apple", "bus", "grapes", "tree", "house", "fish", "boat"]


@pytest.fixture(scope="module")
def drawings():
    """A full square of a colour of its own for each name."""
    pixels = np.full((len(NAMES), 96, 96, 4), 255, np.uint8)
    for k in range(len(NAMES)):
        pixels[k, ..., :3] = (30 * k, 255 - 30 * k, 128)
    return Drawings(pixels, NAMES, ["noto"] * len(NAMES), ["seen"] * 6 + ["picture", "name"])


@pytest.fixture(scope="module")
def file(drawings, tmp_path_factory):
    path = tmp_path_factory.mktemp("drawings") / "drawings.npz"
    meta = {"names": drawings.names, "styles": drawings.styles, "parts": drawings.parts}
    np.savez(path, pixels=drawings.pixels, meta=json.dumps(meta))
    return path


# --------------------------------------------------------------------------------------------------------- scenes
def test_words_by_hand():
    cat, star = Thing("cat", 0), Thing("red star")
    both = Scene((cat, star), "across", "blue")
    assert phrases(both) == "a cat on the left and a red star on the right"
    assert phrases(Scene((star, Thing("apple", 1), cat), "down", "")) == (
        "a red star at the top, an apple in the middle and a cat at the bottom"
    )
    assert phrases(Scene((cat,) * 3, "across", "")) == "three cats"
    assert [plural(w) for w in ("bus", "cherry", "toy box", "grapes")] == ["buses", "cherries", "toy boxes", "grapes"]
    assert Thing("grapes", 3).phrase() == "grapes" and Thing("unicorn", 3).phrase() == "a unicorn"
    rng = seeded(0)
    assert ask(both, "colour", rng) == ("What color is the star?", "Red.")
    assert ask(both, "background", rng) == ("What color is the background?", "Blue.")
    assert ask(both, "count", rng) == ("How many things do you see?", "Two.")
    places = {ask(both, "where", rng) for _ in range(20)}
    assert places == {("Where is the cat?", "On the left."), ("Where is the red star?", "On the right.")}
    which = {ask(both, "which", rng) for _ in range(20)}
    assert which == {("What is on the left?", "A cat."), ("What is on the right?", "A red star.")}


def test_scenes_show_what_is_said(drawings):
    """The middle of each thing's spot has its colour, and the image token there has its name."""
    found = set()
    for k in range(300):
        scene, image, cells = draw_scene(seeded(k), drawings, list(range(6)), shapes=0)
        assert image.shape == (112, 112, 3) and len(cells) == 16
        count = len(scene.things)
        for thing, (x, y) in zip(scene.things, scenes.SPOTS[count][scene.order]):
            near = {tuple(image[y + dy, x + dx]) for dy in range(-9, 10, 3) for dx in range(-9, 10, 3)}
            assert tuple(drawings.pixels[thing.drawing, 0, 0, :3]) in near
        named = {c.name for c in cells if c and not c.name.endswith("background")}
        assert named <= {t.name for t in scene.things}
        assert scene.background or not any(c and c.name.endswith("background") for c in cells)
        found |= {(count, scene.order, scene.copies)}
        said = caption(scene, seeded(k)).lower()
        assert all(t.name in said or plural(t.name) in said for t in scene.things)
    assert {(1, "", False), (2, "across", False), (3, "down", False), (4, "corners", True)} <= found


def test_cells_are_those_of_the_image_tokens(drawings):
    """Row by row from the top left, as the VLM's image tokens are."""
    scene = Scene((Thing("cat", 0), Thing("bus", 2)), "across", "green")
    _, image, shown = scenes.paint(seeded(1), scene, drawings)
    cells = [c and c.name for c in shown]
    for row in range(4):
        left, right = cells[4 * row : 4 * row + 2], cells[4 * row + 2 : 4 * row + 4]
        assert "bus" not in left and "cat" not in right
    assert "cat" in cells and "bus" in cells
    image, cells = draw_mosaic(seeded(2), drawings, list(range(6)))
    for k, thing in enumerate(cells):
        quarter = image[56 * (k // 8) :, 56 * (k % 4 // 2) :][:56, :56].reshape(-1, 3)
        colour = drawings.pixels[thing.drawing, 0, 0, :3]
        assert (np.abs(quarter.astype(int) - colour).sum(1) < 20).mean() > 0.2


def test_a_scene_depends_on_its_key_alone(drawings):
    one, other = (draw_scene(seeded("a", k), drawings, [0, 1, 2])[1] for k in (1, 2))
    again = draw_scene(seeded("a", 1), drawings, [0, 1, 2])[1]
    assert (one == again).all() and (one != other).any()


def test_dialogues_have_the_image_in_front_of_the_first_question(drawings):
    for k in range(60):
        scene, _, _ = draw_scene(seeded(k), drawings, [0, 1, 2])
        users = [m["content"] for m in dialogue(scene, seeded(k)) if m["role"] == "user"]
        assert users[0].startswith("<image>") and not any("<image>" in u for u in users[1:])


def test_a_drawing_in_millimetres_gets_a_view_box():
    svg = '<svg width="25.4mm" height="50.8mm" id="a"><g/></svg>'
    assert with_view_box(svg) == '<svg   id="a" viewBox="0 0 96.0 192.0"><g/></svg>'
    assert with_view_box('<svg viewBox="0 0 1 1" width="2mm"/>') == '<svg viewBox="0 0 1 1" width="2mm"/>'


# --------------------------------------------------------------------------------------------------------- naming
def test_the_naming_loss_by_hand():
    """Two names at right angles; tokens of length 1: the first along its own name, the second along the other's."""
    names = SimpleNamespace(
        number={"cat": 0, "green background": 1}, centre_D=torch.tensor([0.0, 0.0, 5.0]), length=1.0
    )
    names.directions_KD = torch.eye(3)[:2]
    y_TD = torch.tensor([[1.0, 0, 5], [1.0, 0, 5], [9.0, 9, 9]])
    cells = [Thing("cat", 0), Thing("green background"), None]
    loss, right = train_vision.Names.loss(names, y_TD, cells, torch.tensor(2.0))
    hit, miss = (-math.log(math.exp(s) / (math.exp(0) + math.exp(2))) for s in (2, 0))
    close(loss, torch.tensor((hit + 0.2 * miss) / 1.2), 1e-5)
    assert right == 1  # of the things alone
    longer, _ = train_vision.Names.loss(names, torch.tensor([[2.0, 0, 5], [2.0, 0, 5]]), cells[:2], torch.tensor(2.0))
    close(longer - loss, torch.tensor(0.1 * math.log(2) ** 2), 1e-5)


def test_the_teachers_loss_by_hand(tmp_path):
    """Of the tokens that show a drawing: one along its vector, one at right angles to it."""
    vectors = np.array([[1, 0], [0.6, 0.8]], np.float16)
    np.savez(tmp_path / "teacher.npz", vectors=vectors)
    teacher = train_vision.Teacher(tmp_path / "teacher.npz", 2, "cpu")
    with torch.no_grad():
        teacher.linear.weight.copy_(torch.eye(2))
        teacher.linear.bias.zero_()
    y_TD = torch.tensor([[0.0, 9.0], [3.0, 4.0], [0.0, 2.0], [1.0, 1.0]])
    cells = [None, Thing("bus", 1), Thing("cat", 0), Thing("red star")]
    close(teacher.loss(y_TD, cells), torch.tensor((0 + 1) / 2), 1e-3)


def test_whitened_features_have_the_same_variance_everywhere():
    g = torch.Generator().manual_seed(0)
    x_NC = torch.randn(500, 6, generator=g) * torch.tensor([100.0, 10, 1, 1, 0.1, 0.1]) + 7
    y_NK = whiten(x_NC, 4)
    close(y_NK.norm(dim=-1), torch.ones(500), 1e-5)
    close(y_NK.std(0), torch.full((4,), 0.5), 0.03)  # rows of length 1 over 4 numbers


# ----------------------------------------------------------------------------------------------- the shipped tower
def test_the_shipped_tower_fits_the_assembled_model():
    file = ROOT / "smol" / "vision.safetensors"
    assert file.stat().st_size < 15e6
    found = load_file(file)
    config = Qwen2_5_VLVisionConfig(**make_vlm.TOWER, out_hidden_size=576)
    with torch.device("meta"):
        tower = Qwen2_5_VisionTransformerPretrainedModel(config)
    assert {n: t.shape for n, t in found.items()} == {n: p.shape for n, p in tower.state_dict().items()}
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() and t.float().std() > 0 for t in found.values())


# ------------------------------------------------------------------------------------------------------- training
def trained(file, out, naming=4, captions=2, **more):
    flags = {"vlm": TINY, "drawings": file, "out": out, "naming": naming, "captions": captions} | more
    flags |= {"batch": 4, "batch_naming": 4, "save_every": 2}
    argv = [x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v))]
    train_vision.main(argv)
    return load_file(out.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.npz"
    np.savez(path, vectors=np.random.default_rng(0).normal(size=(len(NAMES), 5)).astype(np.float16))
    return path


@pytest.fixture(scope="module")
def straight(file, teacher, tmp_path_factory):
    return trained(file, tmp_path_factory.mktemp("vision") / "tower", teacher=teacher)


@pytest.mark.parametrize("fails_at", [3, 5], ids=["naming", "captions"])
def test_training_resumes_where_it_stopped(file, teacher, straight, tmp_path, monkeypatch, fails_at):
    """It fails in step 3, of phase naming, or in step 5, of phase captions, and goes on from the checkpoint before
    it: the same tower to the last bit."""
    loss = train_vision.Training.loss

    def killed(self, given):
        if self.step == fails_at - 1:
            raise KeyboardInterrupt
        return loss(self, given)

    monkeypatch.setattr(train_vision, "nats", lambda *_: {})
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(train_vision.Training, "loss", killed)
        trained(file, tmp_path / "tower", teacher=teacher)
    assert torch.load(tmp_path / "tower.train", weights_only=True)["step"] == fails_at - 1
    again = trained(file, tmp_path / "tower", teacher=teacher)
    assert again.keys() == straight.keys() and all(torch.equal(again[n], straight[n]) for n in straight)


def test_only_the_tower_moves(file, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vision, "nats", lambda *_: {})
    made = []
    init = train_vision.Training.__init__

    def kept(self, args):
        init(self, args)
        made.append((self.vlm, {n: p.clone() for n, p in self.vlm.model.named_parameters()}))

    monkeypatch.setattr(train_vision.Training, "__init__", kept)
    tower = trained(file, tmp_path / "tower")
    ((vlm, before),) = made
    moved = {n for n, p in vlm.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(n.startswith("model.visual.") for n in moved)
    assert len(moved) == sum(n.startswith("model.visual.") for n in before)
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in tower.values())


def test_attention_at_once_is_the_librarys(file):
    data, vlm = train_vision.Data(TINY, file), train_vision.VLM(TINY)
    pixels, grids, _ = data.pictures(("a",), 3)
    library = train_vision.image_tokens(vlm, pixels, grids)
    train_vision.attend_at_once(vlm)
    close(train_vision.image_tokens(vlm, pixels, grids), library, 1e-4)
