"""Qwen2.5-VL-3B and 7B at their true sizes, on the meta device: counts of parameters, what trains in each stage, and a
place for every tensor of a checkpoint. Nothing is downloaded: the configurations are written out as published.

Letters: D width, C width of the keys of one token, V vocabulary."""

import json

import pytest
import torch
from safetensors.torch import save_file

import stage2_codebook
import stage3_bc
from model import LatentModel
from studies import memory
from studies.cases import SHAPES
from vlm import VLM

VISION = {
    "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
    "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112, "temporal_patch_size": 2,
    "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
}  # fmt: skip
COMMON = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu",
    "initializer_range": 0.02, "max_position_embeddings": 128000, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "use_cache": True, "use_sliding_window": False, "sliding_window": 32768, "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "transformers_version": "4.41.2",
}  # fmt: skip
SIZES = {
    "3b": {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2}
    | {"intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True, "max_window_layers": 70},
    "7b": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    | {"intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False, "max_window_layers": 28},
}


def published(size, **small):
    """config.json as the checkpoint has it; small: other sizes of the text model."""
    config = COMMON | SIZES[size] | small
    return config | {"vision_config": VISION | {"out_hidden_size": config["hidden_size"]}}


def written(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module", params=SIZES)
def models(request, tmp_path_factory):
    """-> (size, the frozen VLM, the VLM of the token side, the latent model with the paper's blocks), all on meta."""
    folder = tmp_path_factory.mktemp(request.param)
    config, _ = memory.from_checkpoint(written(folder, published(request.param)))
    with torch.device("meta"):
        vlm, token_vlm = (VLM(config, "meta", torch.bfloat16) for _ in range(2))
        latent = LatentModel(vlm.config, codes=128, inverse_blocks=4, policy_blocks=8, merges=2)
    token_vlm.train_last(8 / 36)
    return request.param, vlm, token_vlm, latent


def count(module, trained=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


# ------------------------------------------------------------------------------------------------ counted by hand
def block(D, C, inner):
    """q, k and v with biases, o; gate, up and down; two norms."""
    return (D + 1) * (D + 2 * C) + D * D + 3 * D * inner + 2 * D


def numbers(size):
    s = SIZES[size]
    D, inner, V = s["hidden_size"], s["intermediate_size"], s["vocab_size"]
    return D, D // s["num_attention_heads"] * s["num_key_value_heads"], inner, V


def vision(D):
    """Patches of 2 x 14 x 14 x 3 numbers; blocks with biases but in the norms; the merger of four patches."""
    one = 3 * 1280 * 1281 + 1280 * 1281 + 2 * 3420 * 1281 + 1280 * 3421 + 2 * 1280
    return 1176 * 1280 + 32 * one + 1280 + 5120 * 5121 + D * 5121


def test_the_vlm_has_as_many_parameters_as_published(models):
    size, vlm, _, _ = models
    D, C, inner, V = numbers(size)
    heads = 1 if size == "3b" else 2
    by_hand = vision(D) + SIZES[size]["num_hidden_layers"] * block(D, C, inner) + D + heads * V * D
    assert count(vlm) == by_hand and count(vlm.body.visual) == vision(D)
    assert round(by_hand / 1e9, 3) == {"3b": 3.755, "7b": 8.292}[size]
    assert round(vision(2048) / 1e9, 3) == 0.669
    assert not any(p.requires_grad for p in vlm.parameters()) and all(p.is_meta for p in vlm.parameters())


def test_the_head_is_the_embedding_in_3b_alone(models):
    size, vlm, token_vlm, _ = models
    for v in (vlm, token_vlm):
        assert (v.head.weight is v.model.get_input_embeddings().weight) == (size == "3b")


def test_the_shapes_of_the_studies_are_those_of_the_checkpoints(models, tmp_path):
    """The tables of memory are made without a checkpoint; with one they are the same."""
    size, vlm, _, _ = models
    config, shape = memory.from_checkpoint(written(tmp_path, published(size)))
    own = memory.vlm_config(SHAPES[size]).get_text_config()
    assert [getattr(shape, k) for k in ("width", "blocks", "heads", "kv_heads", "inner", "vocab", "tied")] == [
        getattr(SHAPES[size], k) for k in ("width", "blocks", "heads", "kv_heads", "inner", "vocab", "tied")
    ]
    rope = vlm.config.rope_parameters
    assert rope["mrope_section"] == own.rope_parameters["mrope_section"] == [16, 24, 24]
    assert rope["rope_theta"] == own.rope_parameters["rope_theta"] == 1e6 and vlm.config.rms_norm_eps == 1e-6
    assert [config.image_token_id, config.vision_start_token_id, config.vision_end_token_id] == [151655, 151652, 151653]


def test_the_latent_side_has_as_many_parameters_as_in_the_paper(models):
    """617 million in the policy's blocks and 225 million in the two merges, at 3B."""
    size, _, _, latent = models
    D, C, inner, _ = numbers(size)
    end = D + 128 * (D + 1)  # norm, and a linear layer to the codes
    assert count(latent.policy) == 8 * block(D, C, inner) + end
    assert count(latent.inverse) == 4 * block(D, C, inner) + end
    assert count(latent.world.merges) == 2 * 5 * D * inner and count(latent.quantiser) == 128 * D
    if size == "3b":
        assert [round(count(m) / 1e6) for m in (latent.policy, latent.world.merges)] == [617, 225]


# --------------------------------------------------------------------------------------------- what trains, by name
STAGES = {
    "1": ("projector",),
    "2 a": ("inverse", "quantiser", "world"),
    "2 b": ("inverse", "quantiser", "world", "projector"),
    "3 clone": ("policy",),
    "3 adapt": ("policy", "inverse", "quantiser", "world"),
    "4 latent": ("policy",),
}


def test_what_trains_on_the_latent_side(models):
    """Whole parts of the latent model, each stage its own; and nothing of the VLM."""
    _, vlm, _, latent = models
    asked = {"1": ("projector",), "4 latent": ("policy",)}  # written out in these two stages
    asked |= {f"2 {phase}": stage2_codebook.trainable_parts(phase) for phase in "ab"}
    asked |= {f"3 {phase}": stage3_bc.trainable_parts(phase) for phase in ("clone", "adapt")}
    for stage, parts in STAGES.items():
        latent.train_only(*asked[stage])
        trained = {n for n, p in latent.named_parameters() if p.requires_grad}
        assert trained == {n for n, _ in latent.named_parameters() if n.split(".")[0] in parts}, stage
        assert not any(p.requires_grad for p in vlm.parameters())


def test_what_trains_on_the_token_side(models):
    """The last 8 of 36 blocks, or 6 of 28, the final norm, the embeddings and the head; float32, the rest bfloat16."""
    size, _, vlm, _ = models
    D, C, inner, V = numbers(size)
    blocks, heads = {"3b": (range(28, 36), 1), "7b": (range(22, 28), 2)}[size]
    starts = tuple(f"model.language_model.layers.{k}." for k in blocks)
    starts += ("model.language_model.norm.", "model.language_model.embed_tokens.", "lm_head.")
    named = dict(vlm.model.named_parameters())
    trained = {n for n in named if named[n].requires_grad}
    assert trained == {n for n in named if n.startswith(starts)}
    assert trained == {n for n in named if named[n].dtype == torch.float32}
    assert count(vlm, trained=True) == len(blocks) * block(D, C, inner) + D + heads * V * D


# ------------------------------------------------------------------------------------- a place for every tensor
def layout(config):
    """-> the names of the tensors in the published files: those of the years before the library's version 5."""
    parts = [f"attn.{m}.{x}" for m in ("qkv", "proj") for x in ("weight", "bias")]
    parts += [f"mlp.{m}_proj.{x}" for m in ("gate", "up", "down") for x in ("weight", "bias")]
    parts += ["norm1.weight", "norm2.weight"]
    names = ["visual.patch_embed.proj.weight", "visual.merger.ln_q.weight"]
    names += [f"visual.merger.mlp.{k}.{x}" for k in (0, 2) for x in ("weight", "bias")]
    names += [f"visual.blocks.{k}.{part}" for k in range(config["vision_config"]["depth"]) for part in parts]
    parts = [f"self_attn.{m}_proj.{x}" for m in "qkv" for x in ("weight", "bias")] + ["self_attn.o_proj.weight"]
    parts += [f"mlp.{m}_proj.weight" for m in ("gate", "up", "down")]
    parts += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    names += [f"model.layers.{k}.{part}" for k in range(config["num_hidden_layers"]) for part in parts]
    names += ["model.embed_tokens.weight", "model.norm.weight"]
    return names + ([] if config["tie_word_embeddings"] else ["lm_head.weight"])


def now(name):
    """The name of such a tensor in the library's model."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.") if name.startswith("model.") else name


def test_every_tensor_of_the_checkpoint_has_its_place(models):
    """As many tensors as the published files have, and each parameter is one of them."""
    size, vlm, _, _ = models
    names = layout(published(size))
    assert len(names) == {"3b": 824, "7b": 729}[size]
    assert {now(name) for name in names} == set(dict(vlm.model.named_parameters()))


@pytest.mark.parametrize("size", SIZES)
def test_a_checkpoint_in_the_published_layout_loads_whole(size, tmp_path):
    """As deep as the true one and narrow: every number in the files is in the model, under the name of its place."""
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    config = published(size, vocab_size=300, rope_scaling=rope, **small)
    config["vision_config"] |= {"hidden_size": 32, "num_heads": 2, "intermediate_size": 20}
    config |= {"image_token_id": 299, "video_token_id": 298, "vision_start_token_id": 297, "vision_end_token_id": 296}
    found, _ = memory.from_checkpoint(written(tmp_path, config))
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in VLM(found, "meta").model.named_parameters()}
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shapes[now(name)], generator=g) for name in layout(config)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    vlm = VLM(str(tmp_path))
    loaded = dict(vlm.model.named_parameters())
    assert len(loaded) == len(tensors) and all(torch.equal(loaded[now(name)], x) for name, x in tensors.items())
    assert torch.equal(vlm.head.weight, tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]))
