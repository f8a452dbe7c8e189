"""Train the embedded default: a real Qwen2.5-VL checkpoint, small enough to ship, that sees and speaks the tiny world.

It plays the part of Qwen2.5-VL-3B: pretrained in general form on image dialogues (world.general_messages: half plain, half
with a role or a user's situation) and on rich text, never on a downstream task's demonstrations, held-out phrases, held-out
persons or test scenes. Next-token loss on the assistant's words (on stories: on all words).

    python tiny/train_vlm.py --out tiny/vlm --steps 5000         # resumes from <out>.train if it was cut off
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
from rewards import RuleJudge, claims, is_true  # noqa: E402
from tiny import world as W  # noqa: E402

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
# Qwen2.5-VL's chat format: ChatML, a default system message, and vision tokens in the place of an image
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_tokenizer(out, vocabulary=2048):
    """Byte-level BPE: merges learnt on the world's own text and, so that other English stays short too, on the language
    reference that comes with every Python. Any text can be encoded; nothing is unknown."""
    from pydoc_data.topics import topics
    rng = random.Random("tokenizer")
    rows = [W.text_record(rng) for _ in range(6000)]
    texts = [r.get("text") or "\n".join(m["role"] + "\n" + m["content"] for m in r["messages"]) for r in rows]
    english = re.sub(r"[^A-Za-z ,.;:'\n]+", " ", "\n".join(topics[k] for k in sorted(topics)))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts + ["You are a helpful assistant."] * 100 + english.split("\n"), trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        additional_special_tokens=SPECIAL, padding_side="left", chat_template=TEMPLATE)
    tokenizer.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2,
        "size": {"shortest_edge": 28 * 28, "longest_edge": 280 * 420}, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711]}, indent=2))
    return tokenizer


def make_model(tokenizer, width=128, blocks=6):
    """Random weights in Qwen2.5-VL's architecture, all proportions those of the 3B model, about 2 million parameters."""
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    heads = width // 32
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=blocks,
                         num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=4096,
                         rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]),
        vision_config=dict(depth=3, hidden_size=96, intermediate_size=288, num_heads=3, out_hidden_size=width, patch_size=14,
                           spatial_merge_size=2, temporal_patch_size=2, window_size=112, fullatt_block_indexes=[1, 2]),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=True)
    config.eos_token_id, config.pad_token_id = ids["<|im_end|>"], ids["<|endoftext|>"]
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = config.eos_token_id, config.pad_token_id
    return model


class Pool:
    """A few thousand seen scenes, drawn and turned into pixels once; questions about them are drawn afresh each step."""

    def __init__(self, processor, size):
        rng = random.Random("vlm scenes")
        scenes = (s for s in iter(lambda: W.random_scene(rng), None) if not W.unseen(s))
        self.scenes = [next(scenes) for _ in range(size)]
        out = [processor.images(images=[W.draw_scene(s, rng)], return_tensors="pt") for s in self.scenes]
        self.pixels = torch.stack([o["pixel_values"] for o in out]).half()
        self.grid = out[0]["image_grid_thw"]

    def batch(self, processor, size, rng):
        examples = []
        for n in rng.sample(range(len(self.scenes)), size):
            messages = W.general_messages(self.scenes[n], rng)
            examples.append(processor.example({"id": n, "images": [], "messages": messages}, pixels=(self.pixels[n].float(), self.grid)))
        return processor.collate(examples)


def loss_of(model, batch, image_id):
    """Mean next-token cross-entropy over the response tokens; the LM head is applied only where one is explained."""
    h_BTD = model.model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, pixel_values=batch.pixels,
                        image_grid_thw=batch.grids, mm_token_type_ids=(batch.ids_BT == image_id).int()).last_hidden_state
    explained_BT = batch.response_BT[:, 1:]
    return F.cross_entropy(model.lm_head(h_BTD[:, :-1][explained_BT]), batch.ids_BT[:, 1:][explained_BT])


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
    ids = model.generate(input_ids=batch.ids_BT, attention_mask=batch.mask_BT.long(), **look,
                         mm_token_type_ids=(batch.ids_BT == processor.image_id).int(), max_new_tokens=90, do_sample=False)
    return processor.tokenizer.decode(ids[0, batch.ids_BT.shape[1]:], skip_special_tokens=True).strip()


def evaluate(model, processor, count=300, seed=1, advice=True):
    """Greedy answers about `count` unseen scenes -> {what was asked: share right}.

    '<kind>': to the letter, no system message. 'role <kind>': Response Accuracy 10 under the profile of a held-out role.
    With `advice`, 'duty', 'care', 'feeling', 'thing': this part of task B's advice is there and right, for LS1's and for LS2's
    role sets ('false ...': a wrong one is there; a part may also be missing); 'text ...': the scene told in words."""
    rng, judge, scores = random.Random(f"evaluate {seed}"), RuleJudge(), {}
    scenes = (s for s in iter(lambda: W.random_scene(rng), None) if W.unseen(s))

    def note(name, right):
        scores.setdefault(name, []).append(bool(right))

    for n in range(count):
        scene, kind = next(scenes), W.KINDS[n % len(W.KINDS)]
        kind, i, question = W.random_question(scene, rng, kind)
        said = answer(model, processor, W.chat("<image>" + question, "")[:-1], scene, rng)
        note(kind, said.lower() == W.plain_body(scene, kind, i).lower() + ".")
        role = W.random_role(rng, ood=True)
        facts = {"scene": [asdict(t) for t in scene], "kind": kind, "asked": i, "role": asdict(role)}
        said = answer(model, processor, W.chat("<image>" + question, "", role.profile())[:-1], scene, rng)
        note("role " + kind, judge.scores({"facts": facts}, said)[4] == 10)
        for k, name in enumerate(("LS1", "LS2") if advice else ()):
            role_set = rng.choice(W.role_sets()[k])
            person, place = rng.choice(role_set)
            for mode in ("", "text "):
                ask = f"I am {W._a(person)} at {place}. What should I do?"
                ask = f"Picture: {W.tell(scene)}. {ask}" if mode else "<image>" + ask
                said = answer(model, processor, W.chat(ask, "", W.tell_role_set(role_set))[:-1], None if mode else scene, rng).lower()
                found = claims(said, {"scene": facts["scene"]})
                others = [d for p, d in W.DUTIES.items() if p != person]
                note(f"{mode}{name} duty", W.DUTIES[person] in said and not any(d in said for d in others))
                note(f"{mode}{name} care", W.ADVICE[place] in said)
                note(f"{mode}{name} feeling", f"stay {W.feeling(person)}" in said)
                note(f"{mode}{name} thing", found and all(is_true(c, facts["scene"]) for c in found))
                note(f"{mode}{name} false duty", any(d in said for d in others))
                note(f"{mode}{name} false thing", not all(is_true(c, facts["scene"]) for c in found))
    return {k: round(sum(v) / len(v), 3) for k, v in scores.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="tiny/vlm", type=Path, help="folder of the checkpoint")
    parser.add_argument("--init", type=Path, help="folder of a checkpoint to start from, with its tokenizer; default: from scratch")
    parser.add_argument("--steps", default=5000, type=int, help="optimizer steps")
    parser.add_argument("--paired", default=32, type=int, help="image dialogues a step")
    parser.add_argument("--text", default=16, type=int, help="text-only records a step")
    parser.add_argument("--lr", default=2e-3, type=float, help="peak learning rate; 2%% warm-up, then cosine to a tenth")
    parser.add_argument("--pool", default=16000, type=int, help="drawn scenes")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--evaluate", action="store_true", help="only print the accuracy on unseen scenes")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.evaluate:
        model = AutoModelForImageTextToText.from_pretrained(args.out, dtype=torch.float32).eval()
        return print(json.dumps(evaluate(model, Processor(args.out))))
    args.out.mkdir(parents=True, exist_ok=True)
    if args.init:  # what is new in the world since its tokenizer was made is spelt in a few more pieces
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
            shutil.copy(args.init / name, args.out / name)
        tokenizer = Processor(args.init).tokenizer
        model = AutoModelForImageTextToText.from_pretrained(args.init, dtype=torch.float32)
    else:
        tokenizer = make_tokenizer(args.out)
        model = make_model(tokenizer)
    model.config.save_pretrained(args.out)
    processor = Processor(args.out, max_length=400)
    pool = Pool(processor, args.pool)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    state_file, start, minutes = args.out.with_suffix(".train"), 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        start, minutes = state["step"], state["minutes"]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, vocabulary {len(tokenizer)}, from step {start}", flush=True)
    began, log = time.time(), {}
    for step in range(start, args.steps):
        rng = random.Random(f"vlm {args.seed} {step}")
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / (0.02 * args.steps), 0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        paired = loss_of(model, pool.batch(processor, args.paired, rng), processor.image_id)
        rows = [{"id": "", "images": []} | W.text_record(rng) for _ in range(args.text)]
        text = loss_of(model, processor.collate([processor.example(r) for r in rows]), processor.image_id)
        (paired + text).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(set_to_none=True)
        for name, value in (("paired", paired.item()), ("text", text.item())):
            log[name] = 0.98 * log.get(name, value) + 0.02 * value
        total = minutes + (time.time() - began) / 60
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} " + " ".join(f"{k} {v:.4f}" for k, v in log.items()) + f" minutes {total:.1f}", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "step": step + 1, "minutes": total}, f"{state_file}.new")
            Path(f"{state_file}.new").rename(state_file)
            model.save_pretrained(args.out)
            print("unseen scenes:", json.dumps(evaluate(model.eval(), processor, 30)), flush=True)
            model.train()


if __name__ == "__main__":
    main()
