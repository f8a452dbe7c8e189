"""Shared by the tests: the repository on the import path, and a small world on disk."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    from tiny.world import write_world
    out = tmp_path_factory.mktemp("world")
    write_world(out, seed=0, paired=24, text=40, demos=12, prompts=8, tests=4)
    return out
