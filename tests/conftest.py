"""Shared by the tests: the repository on the import path, a small world on disk, the tiny VLM and what stands on it."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import CODES, TINY, Flags, a_little_trained, louder, question, shake

import stage1_projector
import stage2_codebook
import stage3_bc
import stage4_latent_rl
from data import Processor, Records
from model import LatentModel
from tiny.world import write_world
from vlm import VLM


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder of a world with a few records of each kind."""
    out = tmp_path_factory.mktemp("world")
    write_world(out, seed=0, paired=24, text=40, demos=12, prompts=8, tests=4)
    return out


@pytest.fixture(scope="session")
def vlm():
    """The tiny VLM, frozen. A test that trains a VLM loads its own."""
    return VLM(TINY)


@pytest.fixture(scope="session")
def processor():
    return Processor(TINY)


@pytest.fixture(scope="session")
def never(processor):
    return torch.tensor(processor.never_sampled)


@pytest.fixture(scope="session")
def latent(vlm):
    """A latent model with no parameter at its initial value, which no test trains."""
    torch.manual_seed(0)
    return shake(LatentModel(vlm.config, CODES, inverse_blocks=2, policy_blocks=2)).requires_grad_(False)


@pytest.fixture
def trainee(vlm):
    """A latent model to train, new for each test."""
    torch.manual_seed(0)
    return a_little_trained(LatentModel(vlm.config, CODES, inverse_blocks=1, policy_blocks=1))


@pytest.fixture(scope="session")
def prompts(processor):
    """Three prompts of different lengths: one image, text alone, two images of different sizes."""
    baker = "You are Mara the baker."
    return [question(processor, 1, 0), question(processor, 2, system=baker), question(processor, 3, 0, 56)]


@pytest.fixture(scope="session")
def batch_of(world, processor):
    """batch_of("paired", 3): the first rows of one of the world's files."""

    def batch(name, rows=3):
        records = Records(world / f"{name}.jsonl")
        return processor.collate([processor.example(records[i]) for i in range(rows)])

    return batch


@pytest.fixture(scope="session")
def task_prompts(world, processor):
    """Two prompts of task A, ready to be answered."""
    records = Records(world / "task_prompts.jsonl")
    return [processor.example(records[i], prompt_only=True) for i in range(2)]


@pytest.fixture(scope="session")
def flags(world):
    return Flags(world)


@pytest.fixture(scope="session")
def runs(flags, tmp_path_factory):
    """The folder of all stages' runs, two steps each."""
    out = tmp_path_factory.mktemp("runs")
    stage1_projector.main([*flags.paired, "--steps", "2", "--batch", "4", "--out", f"{out}/1"])
    book = ["--projector", f"{out}/1", "--steps-a", "2", "--steps-b", "2"]
    stage2_codebook.main([*flags.book, *book, "--out", f"{out}/2"])
    clone = ["--init", f"{out}/2", "--steps-clone", "2", "--steps-adapt", "2"]
    stage3_bc.main([*flags.clone, *clone, "--out", f"{out}/3"])
    stage3_bc.main([*flags.sft, "--steps-adapt", "2", "--batch-adapt", "3", "--out", f"{out}/sft"])
    louder(out / "3", out / "loud")
    rl = [*flags.rl, "--steps", "2", "--batch", "2", "--max-new", "10"]
    stage4_latent_rl.main([*rl, "--init", f"{out}/loud", "--out", f"{out}/4"])
    stage4_latent_rl.main([*rl, "--actions", "token", "--init", f"{out}/sft", "--out", f"{out}/4t"])
    return out
