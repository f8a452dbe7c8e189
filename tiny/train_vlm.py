"""Train the embedded default: a real Qwen2.5-VL checkpoint, small enough to ship, that sees and speaks the tiny world.

It plays the part of Qwen2.5-VL-3B. It is pretrained in general form: on image dialogues (world.general_messages; half
are plain, half have a role or a user's situation) and on the rich text-only data. It never sees a demonstration of a
task, a held-out phrase, a held-out person or a test scene. The loss is the next-token loss on the assistant's words,
and on all words of a story.

    python tiny/train_vlm.py --out tiny/vlm --steps 5000         # goes on from <out>.train if it was cut off
    python tiny/train_vlm.py --out tiny/vlm --evaluate           # accuracy on unseen scenes, by kind of question
    python tiny/train_vlm.py --init tiny/vlm --out runs/vlm --steps 2500 --lr 1e-3      # go on from a checkpoint
"""

import argparse
import json
import math
import random
import re
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast, Qwen2_5_VLConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Processor  # noqa: E402
from tiny import world as W  # noqa: E402
from tiny.judge import claims, is_true, scores  # noqa: E402

CONTROL = "endoftext im_start im_end vision_start vision_end vision_pad image_pad video_pad"
SPECIAL = [f"<|{name}|>" for name in CONTROL.split()]
# Qwen2.5-VL's chat format: ChatML, a default system message, and vision tokens in the place of an image
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 28 * 28, "longest_edge": 280 * 420},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


# ------------------------------------------------------------------------------------------- tokenizer, model, data
def make_tokenizer(out, vocabulary=2048):
    """Byte-level BPE: any text can be encoded; nothing is unknown.

    Its merges are learnt on the world's own text and, so that other English stays short too, on the language reference
    that comes with every Python."""
    from pydoc_data.topics import topics

    rng = random.Random("tokenizer")
    rows = [W.text_record(rng) for _ in range(6000)]
    texts = [r.get("text") or "\n".join(m["role"] + "\n" + m["content"] for m in r["messages"]) for r in rows]
    texts += ["You are a helpful assistant."] * 100
    texts += re.sub(r"[^A-Za-z ,.;:'\n]+", " ", "\n".join(topics[k] for k in sorted(topics))).split("\n")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
        padding_side="left",
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(IMAGES, indent=2))
    return tokenizer


def make_model(tokenizer, width=128, blocks=6):
    """Random weights in Qwen2.5-VL's architecture, in the proportions of the 3B model; about 2 million parameters."""
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    eos, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32 // 2,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    vision = dict(
        depth=3,
        hidden_size=96,
        intermediate_size=288,
        num_heads=3,
        out_hidden_size=width,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=112,
        fullatt_block_indexes=[1, 2],
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    config.eos_token_id, config.pad_token_id = eos, pad
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, pad
    return model


class Pool:
    """A few thousand seen scenes, drawn and turned into pixels once. Each step draws new questions about them."""

    def __init__(self, processor, size):
        rng = random.Random("vlm scenes")
        scenes = W.scenes(rng)
        self.scenes = [next(scenes) for _ in range(size)]
        out = [processor.images(images=[W.draw_scene(s, rng)], return_tensors="pt") for s in self.scenes]
        self.pixels = torch.stack([o["pixel_values"] for o in out]).half()
        self.grid = out[0]["image_grid_thw"]

    def batch(self, processor, size, rng):
        examples = []
        for n in rng.sample(range(len(self.scenes)), size):
            record = {"id": n, "images": [], "messages": W.general_messages(self.scenes[n], rng)}
            examples.append(processor.example(record, pixels=(self.pixels[n].float(), self.grid)))
        return processor.collate(examples)


def text_batch(processor, size, rng):
    rows = [{"id": "", "images": []} | W.text_record(rng) for _ in range(size)]
    return processor.collate([processor.example(r) for r in rows])


def loss_of(model, batch, image_id):
    """Mean next-token cross-entropy over the response tokens; the LM head is applied only where one is explained."""
    out = model.model(
        input_ids=batch.ids_BT,
        attention_mask=batch.mask_BT,
        pixel_values=batch.pixels,
        image_grid_thw=batch.grids,
        mm_token_type_ids=(batch.ids_BT == image_id).int(),
    )
    explained_BT = batch.explained_BT
    logits_MV = model.lm_head(out.last_hidden_state[:, :-1][explained_BT])
    return F.cross_entropy(logits_MV, batch.ids_BT[:, 1:][explained_BT])


# --------------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def answer(model, processor, messages, scene=None, rng=None):
    """The greedy answer to a dialogue whose last message is the question."""
    pixels = None
    if scene:
        picture = processor.images(images=[W.draw_scene(scene, rng)], return_tensors="pt")
        pixels = picture["pixel_values"], picture["image_grid_thw"]
    record = {"id": 0, "images": [], "messages": messages + [{"role": "assistant", "content": "-"}]}
    batch = processor.collate([processor.example(record, True, pixels)], left=True)
    look = dict(pixel_values=batch.pixels, image_grid_thw=batch.grids) if scene else {}
    ids = model.generate(
        input_ids=batch.ids_BT,
        attention_mask=batch.mask_BT.long(),
        mm_token_type_ids=(batch.ids_BT == processor.image_id).int(),
        max_new_tokens=90,
        do_sample=False,
        **look,
    )
    return processor.tokenizer.decode(ids[0, batch.ids_BT.shape[1] :], skip_special_tokens=True).strip()


def evaluate(model, processor, count=300, seed=1, advice=True):
    """Greedy answers about `count` unseen scenes -> {what was asked: share right}.

    '<kind>': to the letter, without a system message.
    'role <kind>': Response Accuracy is 10, under the profile of a held-out role.
    With `advice`: 'LS1 duty', 'LS1 care', 'LS1 feeling', 'LS1 thing', and the same for LS2: this part of task B's
    advice is there and right. 'LS1 false ...': a wrong one is there; a part may also be missing. 'text ...': the scene
    is told in words."""
    rng, shares = random.Random(f"evaluate {seed}"), {}

    def note(name, right):
        shares.setdefault(name, []).append(bool(right))

    unseen = W.scenes(rng, test=True)
    for n in range(count):
        scene, kind = next(unseen), W.KINDS[n % len(W.KINDS)]
        kind, i, question = W.random_question(scene, rng, kind)
        said = answer(model, processor, W.chat("<image>" + question, "")[:-1], scene, rng)
        note(kind, said.lower() == W.plain_body(scene, kind, i).lower() + ".")
        role = W.random_role(rng, ood=True)
        facts = {"scene": [asdict(t) for t in scene], "kind": kind, "asked": i, "role": asdict(role)}
        said = answer(model, processor, W.chat("<image>" + question, "", role.profile())[:-1], scene, rng)
        note("role " + kind, scores({"facts": facts}, said)["Response Accuracy"] == 10)
        for sets, name in zip(W.role_sets(), ("LS1", "LS2")) if advice else ():
            role_set = rng.choice(sets)
            person, place = rng.choice(role_set)
            for mode in ("", "text "):
                said = advised(model, processor, scene, role_set, person, place, rng, in_words=mode == "text ")
                for part, right in parts_of_advice(said, facts["scene"], person, place).items():
                    note(f"{mode}{name} {part}", right)
    return {k: round(sum(v) / len(v), 3) for k, v in shares.items()}


def advised(model, processor, scene, role_set, person, place, rng, in_words):
    """The greedy answer, in lower case, to what this person at this place should do; with the image, or in words."""
    ask = W.who_i_am(person, place)
    ask = f"Picture: {W.tell(scene)}. {ask}" if in_words else "<image>" + ask
    messages = W.chat(ask, "", W.tell_role_set(role_set))[:-1]
    return answer(model, processor, messages, None if in_words else scene, rng).lower()


def parts_of_advice(said, scene, person, place):
    """-> {part of the advice: is it there and right}, as `evaluate` names them."""
    found = [is_true(c, scene) for c in claims(said, {"scene": scene})]
    false_duty = any(duty in said for other, duty in W.DUTIES.items() if other != person)
    return {
        "duty": W.DUTIES[person] in said and not false_duty,
        "care": W.ADVICE[place] in said,
        "feeling": f"stay {W.feeling(person)}" in said,
        "thing": bool(found) and all(found),
        "false duty": false_duty,
        "false thing": not all(found),
    }


# ----------------------------------------------------------------------------------------------------- training
def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", default="tiny/vlm", type=Path, help="folder of the checkpoint")
    add("--init", type=Path, help="checkpoint to start from, with its tokenizer; default: random weights")
    add("--steps", default=5000, type=int, help="optimizer steps")
    add("--paired", default=32, type=int, help="image dialogues a step")
    add("--text", default=16, type=int, help="text-only records a step")
    add("--lr", default=2e-3, type=float, help="peak learning rate; 2%% warm-up, then cosine to a tenth")
    add("--pool", default=16000, type=int, help="drawn scenes")
    add("--seed", default=0, type=int, help="seed of the weights and of the draws of each step")
    add("--evaluate", action="store_true", help="only print the accuracy on unseen scenes")
    return parser.parse_args()


def start_model(args):
    """-> the model to train; its tokenizer, image processor and config are written into args.out."""
    args.out.mkdir(parents=True, exist_ok=True)
    if args.init:  # what is new in the world since its tokenizer was made is spelt in a few more pieces
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
            shutil.copy(args.init / name, args.out / name)
        model = AutoModelForImageTextToText.from_pretrained(args.init, dtype=torch.float32)
    else:
        model = make_model(make_tokenizer(args.out))
    model.config.save_pretrained(args.out)
    return model


def learning_rate(args, step):
    """Linear over the first 2% of the steps, then cosine from the peak to a tenth of it."""
    return args.lr * min((step + 1) / (0.02 * args.steps), 0.55 + 0.45 * math.cos(math.pi * step / args.steps))


def train(args):
    model = start_model(args)
    processor = Processor(args.out, max_length=400)
    pool = Pool(processor, args.pool)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    state_file, start, minutes = args.out.with_suffix(".train"), 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, minutes = state["step"], state["minutes"]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{millions:.2f}M parameters, vocabulary {len(processor.tokenizer)}, from step {start}", flush=True)
    began, log = time.time(), {}
    for step in range(start, args.steps):
        rng = random.Random(f"vlm {args.seed} {step}")  # of the step alone, so that a resumed run draws the same
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        paired = loss_of(model, pool.batch(processor, args.paired, rng), processor.image_id)
        text = loss_of(model, text_batch(processor, args.text, rng), processor.image_id)
        (paired + text).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, value in (("paired", paired.item()), ("text", text.item())):
            log[name] = 0.98 * log.get(name, value) + 0.02 * value
        total = minutes + (time.time() - began) / 60
        if (step + 1) % 50 == 0:
            losses = " ".join(f"{k} {v:.4f}" for k, v in log.items())
            print(f"step {step + 1} {losses} minutes {total:.1f}", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(tensors | {"step": step + 1, "minutes": total}, f"{state_file}.new")
            Path(f"{state_file}.new").rename(state_file)
            model.save_pretrained(args.out)
            print("unseen scenes:", json.dumps(evaluate(model.eval(), processor, 30)), flush=True)
            model.train()


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    if args.evaluate:
        model = AutoModelForImageTextToText.from_pretrained(args.out, dtype=torch.float32).eval()
        print(json.dumps(evaluate(model, Processor(args.out))))
    else:
        train(args)


if __name__ == "__main__":
    main()
