"""The agent that ships (tiny/agent) and the script that copies it from a run (tiny/ship.py)."""

import json
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, ROOT, TINY

import checkpoint
import common
from data import DataError
from speaker import Speaker
from tiny import ship

AGENT = ROOT / "tiny" / "agent"
ROWS = {"stage3": "BC latent", "rl_latent": "GRPO latent"}  # what docs/examples.md calls them
SHIPPED = sorted(p for p in AGENT.rglob("*") if p.is_file())


def dialogues():
    """docs/examples.md -> [(record, {row of the table: answer})], as a reader would find them there."""
    found = []
    for n, part in enumerate((ROOT / "docs" / "examples.md").read_text().split("\n## Dialogue ")[1:]):
        said = dict(re.findall(r"^- \*+([\w ]+)\*+: (.*)$", part, re.M))
        messages = [{"role": who, "content": said[who]} for who in ("system", "user")]
        messages.append({"role": "assistant", "content": said["reference"]})
        image = str(ROOT / "docs" / f"example-{n}.png")
        found.append(({"id": f"example {n}", "images": [image], "messages": messages}, said))
    return found


@pytest.mark.parametrize("stage", ROWS)
def test_the_shipped_agent_says_what_the_examples_show(stage, processor, monkeypatch):
    monkeypatch.chdir(ROOT)  # the run's own path to the VLM is relative
    vlm, latent, _ = common.load_agent(AGENT / stage, "latent", "tiny/vlm", CPU)
    records, said = zip(*dialogues()[:3])
    speaker = Speaker(SimpleNamespace(seed=0, max_new=64, batch=3), processor, CPU)
    answers = [samples[0].text for samples in speaker((vlm, latent), records, 1, 0, 0)]
    assert answers == [row[ROWS[stage]] for row in said]


def test_all_parts_that_a_page_about_codes_needs_are_there():
    tensors, state = checkpoint.load(AGENT / "stage3", "--run", ["stage3_bc"], TINY)
    assert {name.split(".")[0] for name in tensors} == {"projector", "inverse", "quantiser", "world", "policy"}
    after, _ = checkpoint.load(AGENT / "rl_latent", "--run", ["stage4_latent_rl"], TINY)
    assert all(after[name].equal(tensors[name]) for name in after if not name.startswith("policy."))
    assert tensors["quantiser.codebook.weight"].shape == (state["arch"]["codes"], 128)


def test_what_ships_is_small_and_names_no_machine():
    assert {p.name for p in SHIPPED} == {"weights.safetensors", "state.json"} and len(SHIPPED) == 4
    assert sum(p.stat().st_size for p in SHIPPED) < 10e6
    for path in SHIPPED:
        if path.name != "weights.safetensors":
            assert not re.search(r'"(/|~|[A-Za-z]:\\)', path.read_text()), path


def test_git_does_not_ignore_what_ships():
    names = [str(p.relative_to(ROOT)) for p in SHIPPED]
    ignored = subprocess.run(["git", "check-ignore", "--no-index", *names], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout == ""


def a_run(folder, **config):
    """A finished stage 3 and stage 4 of one tensor each."""
    for stage, step in (("stage3", 2), ("rl_latent", 3)):
        state = {"stage": stage, "finished": True, "config": {"vlm": "tiny/vlm"} | config, "arch": {}}
        tensors = {"policy.x": torch.full((2,), float(step))}
        checkpoint.save(folder / stage, step - 1, tensors, state | {"finished": False})
        checkpoint.save(folder / stage, step, tensors, state, common.adamw(list(tensors.values()), 1.0))
        (folder / stage / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')


def test_a_run_is_copied_without_its_optimizer_and_older_checkpoints(tmp_path):
    a_run(tmp_path / "run")
    ship.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    copied = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    names = ("state.json", "weights.safetensors")
    first, second = ([f"{at}/{n}" for n in names] for at in ("rl_latent/ckpt-000003", "stage3/ckpt-000002"))
    assert copied == [*first, "rl_latent/metrics.jsonl", *second]
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert json.loads((tmp_path / "out" / copied[0]).read_text())["step"] == 3


def test_a_run_with_an_absolute_path_does_not_ship(tmp_path):
    a_run(tmp_path / "run", init="/some/machine")
    with pytest.raises(DataError, match=r"stage3 was made with --init /some/machine; make it again with a relative"):
        ship.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_does_not_ship(tmp_path):
    a_run(tmp_path / "run")
    (tmp_path / "run" / "rl_latent" / "ckpt-000003" / "state.json").unlink()
    with pytest.raises(DataError, match="rl_latent holds no finished stage; run `make demo` first"):
        ship.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
