"""Processor: a checkpoint of another kind is refused in one line, by the flag that names it."""

import json
import shutil

import pytest
from helpers import TINY

from data import DataError, Processor

TOKENS = ("image_token_id", "vision_start_token_id", "vision_end_token_id")


@pytest.fixture
def folder(tmp_path):
    """folder(config): a copy of the tiny VLM's tokenizer and image processor beside another config.json."""

    def write(config):
        out = tmp_path / "vlm"
        shutil.copytree(TINY, out, ignore=shutil.ignore_patterns("*.safetensors"))
        (out / "config.json").write_text(json.dumps(config))
        return str(out)

    return write


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("value", [-1, 2**20, "absent"])
def test_a_token_that_the_tokenizer_does_not_know_is_refused(folder, name, value):
    """Without the field the library puts in that of the real models, which have more tokens."""
    with open(f"{TINY}/config.json") as f:
        config = json.load(f)
    assert isinstance(config.pop(name), int)
    if value != "absent":
        config[name] = value
    with pytest.raises(DataError, match=rf"--vlm .*vlm: config.json has no {name} that its tokenizer knows") as e:
        Processor(folder(config))
    assert "\n" not in str(e.value)
