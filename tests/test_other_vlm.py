"""Each type of VLM that --vlm takes, small and with random weights; and the types that it refuses by name.

What the code does with a model depends on its architecture alone, so random weights are enough. The tests of the tiny
VLM (a Qwen2.5-VL) that are imported here run once for each type."""
# ruff: noqa: F401

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import CODES, ROOT, TINY, Flags, close, draws, generate, louder, question, shake, weights
from test_rollout import (
    test_latent_rollout_is_scored_by_what_sampled_it,
    test_token_rollout_is_scored_by_what_sampled_it,
)
from test_vlm import (
    test_image_and_its_order_reach_the_text,
    test_positions_by_hand,
    test_right_padding,
    test_step_by_step_equals_one_full_pass,
)
from transformers import AutoConfig, AutoModelForImageTextToText

import common
import stage1_projector
import stage2_codebook
import stage3_bc
import stage4_latent_rl
from data import KINDS, DataError, Processor
from model import LatentModel
from vlm import VLM

# What differs from the tiny VLM's configuration: of the vision part, of the text part, of the image processor.
TYPES = {
    "qwen2_5_vl": (
        {"depth": 3, "hidden_size": 96, "intermediate_size": 192, "num_heads": 3, "out_hidden_size": 128}
        | {"fullatt_block_indexes": [1, 2]},
        {"tie_word_embeddings": False},  # as the real 7B; the tiny VLM's is tied
        {},
    ),
    "qwen2_vl": (
        {"depth": 3, "embed_dim": 96, "hidden_size": 128, "mlp_ratio": 2, "num_heads": 3},
        {"tie_word_embeddings": False},  # as the real 7B
        {},
    ),
    "qwen3_vl": (
        {"depth": 3, "hidden_size": 96, "intermediate_size": 192, "num_heads": 3, "out_hidden_size": 128}
        | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        # heads wider than the width / their number, as in the real 4B
        {"head_dim": 48, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [10, 7, 7]}},
        {"patch_size": 16},
    ),
}
REFUSED = ("llava", "llava_next", "llava_onevision", "idefics3", "smolvlm", "glm4v", "qwen3_vl_moe", "qwen3_5", "qwen2")


def write_checkpoint(kind, out):
    """A folder for --vlm: random weights, and the tiny VLM's tokenizer."""
    vision, text, images = TYPES[kind]
    tiny = AutoConfig.from_pretrained(TINY)
    text = tiny.text_config.to_dict() | {"model_type": f"{kind}_text"} | text
    ids = {f"{k}_token_id": getattr(tiny, f"{k}_token_id") for k in ("image", "video", "vision_start", "vision_end")}
    ids["tie_word_embeddings"] = text["tie_word_embeddings"]
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    shake(AutoModelForImageTextToText.from_config(config), 0.03).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(f"{TINY}/{name}", out)
    settings = json.loads((ROOT / "tiny" / "vlm" / "preprocessor_config.json").read_text()) | images
    (out / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module", params=TYPES)
def folder(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    write_checkpoint(request.param, out)
    return str(out)


@pytest.fixture(scope="module")
def vlm(folder):
    return VLM(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return Processor(folder)


@pytest.fixture(scope="module")
def never(processor):
    return torch.tensor(processor.never_sampled)


@pytest.fixture(scope="module")
def latent(vlm):
    torch.manual_seed(0)
    return shake(LatentModel(vlm.config, CODES, 2, 2)).requires_grad_(False)


@pytest.fixture(scope="module")
def prompts(processor):
    return [question(processor, 1, 0), question(processor, 2), question(processor, 3, 0, 56)]


# ------------------------------------------------------------------------------------- against the library's own
def library_inputs(batch, image_id):
    """What the library's own processor would give its model."""
    inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT.long()}
    if batch.pixels is not None:
        inputs |= {"pixel_values": batch.pixels, "image_grid_thw": batch.grids}
    return inputs | {"mm_token_type_ids": (batch.ids_BT == image_id).int()}


@torch.no_grad()
@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 2), slice(0, 1)], ids=["mixed", "text", "image"])
def test_the_logits_are_those_of_the_librarys_model(vlm, folder, processor, prompts, rows):
    """A model of its own, which works its positions out itself."""
    batch = processor.collate(prompts[rows], left=True)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    want = model(**library_inputs(batch, processor.image_id)).logits
    got = vlm.head(vlm(batch))
    assert want[batch.mask_BT].std() > 0.1
    close(got[batch.mask_BT], want[batch.mask_BT], 1e-5)


@torch.no_grad()
def test_greedy_answers_are_those_of_the_librarys_model(vlm, folder, processor, prompts, never):
    steps = 8
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    roll = generate(vlm, None, processor, prompts, draws(3, steps), temperature=0)
    settings = {"do_sample": False, "max_new_tokens": steps, "min_new_tokens": steps, "eos_token_id": None}
    settings |= {"suppress_tokens": never.tolist(), "pad_token_id": processor.pad_id}
    out = model.generate(**library_inputs(roll.prompt, processor.image_id), **settings)
    assert roll.tokens_NT.tolist() == out[:, -steps:].tolist()
    assert len(np.unique(roll.tokens_NT)) > 3


# ------------------------------------------------------------------------------------------------- whole runs
def put_vlm(argv, folder):
    return [folder if word == TINY else word for word in argv]


@pytest.mark.all
def test_every_stage_trains_with_it(folder, world, tmp_path):
    """Stages 1 to 3, SFT, latent and token RL, a step or two each; what trains moves, and the checkpoints load."""
    flags, out = Flags(world), tmp_path
    stage1_projector.main([*put_vlm(flags.paired, folder), "--steps", "1", "--batch", "2", "--out", f"{out}/1"])
    book = ["--projector", f"{out}/1", "--steps-a", "1", "--steps-b", "1", "--out", f"{out}/2"]
    stage2_codebook.main([*put_vlm(flags.book, folder), *book])
    clone = ["--init", f"{out}/2", "--steps-clone", "1", "--steps-adapt", "1", "--out", f"{out}/3"]
    stage3_bc.main([*put_vlm(flags.clone, folder), *clone])
    sft = ["--steps-adapt", "1", "--batch-adapt", "2", "--out", f"{out}/sft"]
    stage3_bc.main([*put_vlm(flags.sft, folder), *sft])
    louder(out / "3", out / "loud")
    rl = [*put_vlm(flags.rl, folder), "--steps", "2", "--batch", "2", "--group", "4", "--max-new", "12"]
    stage4_latent_rl.main([*rl, "--init", f"{out}/loud", "--out", f"{out}/rl"])
    stage4_latent_rl.main([*rl, "--actions", "token", "--init", f"{out}/sft", "--out", f"{out}/rl_token"])
    for before, after in (("loud", "rl"), ("sft", "rl_token")):
        a, b = weights(out / before), weights(out / after)
        shared = [name for name in b if name in a]
        assert shared and any(not torch.equal(a[name], b[name]) for name in shared), after
        rows = common.read_metrics(out / after)
        assert [row["step"] for row in rows] == [1, 2] and all(np.isfinite(row["reward"]) for row in rows)
        assert abs(rows[0]["kl"]) < 1e-6  # before the first step policy and reference are one


# ------------------------------------------------------------------------------------------------------ refusals
def test_what_is_taken_is_what_is_tested_here():
    assert set(KINDS) == set(TYPES) and not set(KINDS) & set(REFUSED)


@pytest.mark.parametrize("kind", REFUSED)
def test_another_type_is_refused_by_name_before_anything_is_written(kind, tmp_path, world):
    """Also beside a tokenizer and an image processor that would do."""
    folder = tmp_path / "vlm"
    shutil.copytree(TINY, folder)
    AutoConfig.for_model(kind).save_pretrained(folder)
    message = rf"^--vlm .*vlm: its model type is '{kind}'; the types that work are {', '.join(KINDS)}$"
    with pytest.raises(DataError, match=message):
        stage1_projector.main(["--vlm", str(folder), "--paired", f"{world}/paired.jsonl", "--out", f"{tmp_path}/out"])
    assert not (tmp_path / "out").exists()


def test_the_model_itself_is_refused_as_well():
    """Where no Processor has looked before."""
    config = AutoConfig.for_model("glm4v", text_config={"num_hidden_layers": 1}, vision_config={"depth": 1})
    with torch.device("meta"), pytest.raises(DataError, match="its model type is 'glm4v'"):
        VLM(config, "meta")
