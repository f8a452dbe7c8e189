"""smol/make_vlm.py: a chat model in the body of Qwen2.5-VL says what it said; its tokens, template and refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TINY, close, shake
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

from data import DataError, Processor
from smol import make_vlm
from vlm import VLM

PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = dict(vocab_size=2048, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=2042)
FREE = {"<|vision_start|>": "<reponame>", "<|vision_end|>": "<file_sep>"}
FREE |= {"<|image_pad|>": "<filename>", "<|video_pad|>": "<gh_stars>"}  # as SmolLM2 has them, unused
OTHER = {name: f"<other_{k}>" for k, name in enumerate(FREE)}


def language_model(folder, kind="llama", names=FREE, rope=None, **more):
    """A small chat model with random weights, without any token of images -> its folder."""
    shutil.copytree(
        TINY, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "*.jinja", "pre*", "gen*")
    )
    for file in Path(folder).glob("*.json"):
        text = file.read_text()
        for name, other in names.items():
            text = text.replace(json.dumps(name), json.dumps(other))
        file.write_text(text)
    (folder / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    rope = rope or {"rope_type": "default", "rope_theta": 7e4}
    make, model = (LlamaConfig, LlamaForCausalLM) if kind == "llama" else (Qwen2Config, Qwen2)
    torch.manual_seed(0)
    shake(model(make(rope_parameters=rope, **SIZES | more))).save_pretrained(folder)
    return folder


def assembled(tmp_path, **kind):
    """-> (folder of the language model, folder of the VLM made of it)."""
    lm, out = language_model(tmp_path / "lm", **kind), tmp_path / "vlm"
    make_vlm.main(["--lm", str(lm), "--vision", "random", "--out", str(out)])
    return lm, out


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_it_says_what_the_language_model_says(tmp_path, kind, tied):
    lm_folder, folder = assembled(tmp_path, kind=kind, tie_word_embeddings=tied)
    lm, vlm = AutoModelForCausalLM.from_pretrained(lm_folder).eval(), VLM(str(folder))
    ids = torch.randint(0, 2040, (3, 40), generator=torch.Generator().manual_seed(1))
    close(vlm.model(input_ids=ids).logits, lm(ids).logits, 1e-5)
    prompt = AutoTokenizer.from_pretrained(lm_folder)("What is a small red star?", return_tensors="pt").input_ids
    say = dict(max_new_tokens=20, do_sample=False, pad_token_id=2040)
    assert vlm.model.generate(prompt, **say).tolist() == lm.generate(prompt, **say).tolist()


@pytest.mark.parametrize("names", [FREE, OTHER], ids=["free tokens", "new tokens"])
def test_a_dialogue_with_an_image_is_read_and_answered(tmp_path, names):
    _, folder = assembled(tmp_path, names=names)
    processor, vlm = Processor(str(folder)), VLM(str(folder))
    messages = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A red star."}]
    image = torch.randint(0, 256, (112, 112, 3), dtype=torch.uint8).numpy()
    out = processor.images(images=[image], return_tensors="pt")
    example = processor.example(
        {"id": "", "images": [], "messages": messages}, pixels=(out["pixel_values"], out["image_grid_thw"])
    )
    text = processor.tokenizer.decode(example.ids)
    around = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>What is it?<|im_end|>\n"
    assert text == "<|im_start|>system\nBe kind.<|im_end|>\n" + around + "<|im_start|>assistant\nA red star.<|im_end|>"
    learnt = processor.tokenizer.decode(example.ids[example.response])
    assert learnt == "A red star.<|im_end|>"
    h_BTD = vlm(processor.collate([example]))
    assert h_BTD.shape == (1, len(example.ids), 96) and h_BTD.isfinite().all()
    ids = processor.config.image_token_id, processor.config.vision_start_token_id
    assert not set(names.values()) & set(processor.tokenizer.get_vocab()) or names is OTHER
    rows = vlm.model.get_input_embeddings().num_embeddings
    assert max(ids) < rows
    for config in (vlm.model.config.text_config, vlm.model.generation_config):
        assert max(config.bos_token_id, config.eos_token_id, config.pad_token_id) < rows


def test_the_vocabulary_does_not_grow_where_there_are_free_tokens(tmp_path):
    _, folder = assembled(tmp_path)
    assert VLM(str(folder)).model.get_input_embeddings().num_embeddings == 2048
    assert len(AutoTokenizer.from_pretrained(folder)) == 2048


@pytest.mark.parametrize(
    "what, word",
    [
        (dict(rope={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "rotary"),
        (dict(mlp_bias=True), "feed-forward"),
        (dict(attention_bias=True), "attention"),
        (dict(head_dim=32), "width / heads"),
        (dict(hidden_act="gelu"), "gelu"),
    ],
)
def test_a_model_that_would_not_be_the_same_is_refused(tmp_path, what, word):
    with pytest.raises(DataError, match=word):
        assembled(tmp_path, **what)
    assert not (tmp_path / "vlm" / "model.safetensors").exists()


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a loadable language model"):
        make_vlm.main(["--lm", str(tmp_path), "--vision", "random", "--out", str(tmp_path / "vlm")])
    with pytest.raises(DataError, match="no such folder"):
        make_vlm.main(["--lm", str(tmp_path / "none"), "--vision", "random", "--out", str(tmp_path / "vlm")])


def test_a_tower_is_loaded_and_one_of_another_size_is_refused(tmp_path):
    lm, folder = assembled(tmp_path)
    tower = VLM(str(folder)).body.visual.state_dict()
    marked = {n: torch.full_like(t, 0.25).bfloat16() for n, t in tower.items()}
    save_file(marked, tmp_path / "tower.safetensors")
    args = ["--lm", str(lm), "--out", str(tmp_path / "other"), "--vision", str(tmp_path / "tower.safetensors")]
    make_vlm.main(args)
    assert all((p == 0.25).all() for p in VLM(str(tmp_path / "other")).body.visual.parameters())
    save_file({n: t[:4].contiguous() for n, t in marked.items()}, tmp_path / "tower.safetensors")
    with pytest.raises(DataError, match="another language model or size"):
        make_vlm.main(args)
