"""Every figure and page that an evaluation draws: learning curves, use of the codes, example dialogues.

The colours of all figures of the project stand here, once: a colour means the same in each of them.
The figures are made without a window and without a global state of matplotlib, so they also work on a machine
without a screen.
"""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import checkpoint
import common
from rewards import reference

# The models that are compared. From the palette of Okabe and Ito, whose colours stay apart for colour-blind readers.
COLOURS = {
    "Prompt": "#999999",  # grey: the VLM as it is
    "SFT": "#009E73",  # green: fine-tuned tokens
    "BC latent": "#56B4E9",  # light blue: the cloned policy, before RL
    "token": "#E69F00",  # orange: RL over tokens
    "latent": "#0072B2",  # blue: RL over latent actions
}
# The parts of the latent side and the roles of lines, in the explaining figures.
PARTS = {
    "frozen": "#9AA0A6",  # grey: takes part, does not change
    "projector": "#7A8B2A",  # olive
    "inverse": "#7A4FA3",  # purple
    "codebook": "#D9B310",  # yellow
    "world": "#C8648F",  # rose
    "policy": COLOURS["latent"],  # what RL over latent actions trains
    "gradient": "#C1121F",  # red: where the gradient flows
}
# What codes stand for, in the order of DATA/styles.json; light grey is left for all other tokens.
STYLE_COLOURS = ("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#AA4499", "#882255", "#44AA99")
ALL_ELSE, ALL_ELSE_COLOUR = "all else", "#DDDDDD"
# Single codes, the most frequent first: light enough for black text. Rarer codes take the greys in turn.
CODE_COLOURS = (
    *("#8EC6F0", "#FFC069", "#9ADBA5", "#F4A6A0", "#CDB4F0", "#F2E36B"),
    *("#F5A9D0", "#8FDDD3", "#D9B38C", "#B9D66B", "#A9B8F5", "#E3C1C9"),
)
END = "‹end›"  # how EOS is shown
CODE_GREYS = ("#D4D4D4", "#E8E8E8", "#C2C2C2")


def colour_of(row):
    """Colour of a row of the table: 'SFT', or 'GRPO latent' by its side."""
    return COLOURS[row] if row in COLOURS else COLOURS[row.split()[-1]]


def smooth(y, parts):
    """Mean of the last len(y) / parts values, at every step; y (steps,) -> (steps,)."""
    if not len(y):
        return y
    k = max(1, len(y) // parts)
    return np.convolve(np.pad(y, (k - 1, 0), mode="edge"), np.ones(k) / k, "valid")


# ------------------------------------------------------------------------------------------------ learning curves
CURVES = {"reward": "reward (response / reference)", "entropy": "entropy, nats", "kl": "KL to the start (k3), nats"}


def draw_curves(runs, path):
    """Reward, entropy and KL against rollouts. runs: {row of the table: folder of a stage 4}. Thin: every step. Points:
    the held-out reward, where a run has one."""
    fig = Figure(figsize=(12, 3.4), layout="constrained")
    axes = fig.subplots(1, 3)
    for name, run in runs.items():
        rows = common.read_metrics(run)
        config = checkpoint.read_state(run)["config"]
        for axis, key in zip(axes, CURVES):
            there = [r for r in rows if key in r]  # a step without any judgement has no reward
            rollouts = np.array([r["step"] for r in there]) * config["batch"] * config["group"]
            y = np.array([r[key] for r in there])
            axis.plot(rollouts, y, color=colour_of(name), alpha=0.25, linewidth=0.8)
            axis.plot(rollouts, smooth(y, 20), color=colour_of(name), linewidth=2, label=name)
        if held_out := [(r["step"], r["val_reward"]) for r in rows if "val_reward" in r]:
            steps, y = np.transpose(held_out)
            x = steps * config["batch"] * config["group"]
            axes[0].plot(x, y, "o", color=colour_of(name), markersize=5, label=f"{name}, held out")
    for axis, (_, title) in zip(axes, CURVES.items()):
        axis.set(xlabel="rollouts", title=title)
        axis.grid(alpha=0.25)
    axes[0].legend()
    fig.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------------------ use of the codes
def perplexity(share):
    """exp of the entropy: how many codes, used equally often, would be as hard to guess. share (K,), of sum 1."""
    return float(np.exp(-(share * np.log(share + 1e-12)).sum()))


def draw_usage(usage, order_by, path):
    """How often each code stood for a token of each style.

    usage: {data: {style: counts of the K codes}}; order_by: the data by whose use the codes are ordered."""
    fig = Figure(figsize=(10, 1.2 + 1.7 * len(usage)), layout="constrained")
    axes = fig.subplots(len(usage), 1, sharex=True, squeeze=False)[:, 0]
    order = np.argsort(-np.sum(list(usage[order_by].values()), 0), kind="stable")
    furthest = 0
    for axis, (name, counts) in zip(axes, usage.items()):
        counts_SK = np.array(list(counts.values()))[:, order]
        share_SK = counts_SK / max(counts_SK.sum(), 1)
        p = share_SK.sum(0)
        below = np.cumsum(share_SK, 0) - share_SK
        for k, style in enumerate(counts):
            colour = ALL_ELSE_COLOUR if style == ALL_ELSE else STYLE_COLOURS[k % len(STYLE_COLOURS)]
            axis.bar(np.arange(len(p)), share_SK[k], 0.9, below[k], label=style, color=colour)
        axis.set_title(f"{name}: {(p > 0).sum()} of {len(p)} codes used, perplexity {perplexity(p):.1f}", fontsize=10)
        axis.set_ylabel("share")
        furthest = max(furthest, np.flatnonzero(p).max(initial=0))
    axes[0].set_xlim(-1, furthest + 1)
    axes[-1].set_xlabel(f"code, ordered by use in the {order_by}")
    if len(usage[order_by]) > 1:
        axes[-1].set_xlabel(f"code, ordered by use in the {order_by}; colour: what the code stood for")
        axes[0].legend(fontsize=8, ncols=3)
    fig.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------------------ examples
# Sizes of the drawings in pixels at the width of a README; saved at twice that, for sharp text.
WIDTH, FONT, CODE_FONT, CHARACTER = 900, 14, 11, 14 * 0.602  # the width of a letter of DejaVu Sans Mono is 0.602 em
BOX, PITCH, MARGIN, PADDING, NARROWEST = 40, 54, 8, 4, 28


def code_colours(codes):
    """{code: colour}: the most frequent codes get colours of their own, all others greys."""
    colours = {}
    for n, (code, _) in enumerate(Counter(codes).most_common()):
        rare = n - len(CODE_COLOURS)
        colours[code] = CODE_COLOURS[n] if rare < 0 else CODE_GREYS[rare % len(CODE_GREYS)]
    return colours


def spoken(tokenizer, tokens, codes, eos):
    """[(text of the token, code of its action)] of one response; EOS is called END."""
    return [(END if t == eos else tokenizer.decode([t]), a) for t, a in zip(tokens, codes)]


def place(steps):
    """[(text, code)] -> [(x, y, width, shown text, code)] in pixels, wrapped to WIDTH, and the height of all.

    A leading space is a gap before the box; a line is broken only at such a gap, unless one word is too long."""
    words = []  # boxes that stay together
    for text, code in steps:
        shown = text.strip().replace("\n", "↵") or "␣"
        width = max(NARROWEST, len(shown) * CHARACTER + 2 * PADDING)
        if not words or text[:1].isspace() or text == END:
            words.append([])
        words[-1].append((width, shown, code))
    boxes, x, y = [], MARGIN, MARGIN
    for word in words:
        if x > MARGIN and x + sum(box[0] for box in word) > WIDTH - MARGIN:
            x, y = MARGIN, y + PITCH
        for width, shown, code in word:
            if x > MARGIN and x + width > WIDTH - MARGIN:
                x, y = MARGIN, y + PITCH
            boxes.append((x, y, width, shown, code))
            x += width + 2
        x += CHARACTER
    return boxes, y + BOX + MARGIN


def blank(width, height):
    """-> (figure, axis) whose unit is one pixel at 100 dots an inch; y grows downwards."""
    fig = Figure(figsize=(width / 100, height / 100))
    axis = fig.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.axis("off")
    return fig, axis


def points(pixels):
    """A font size or line width, from pixels at 100 dots an inch to points."""
    return pixels * 0.72


def box(axis, x, y, width, height, *, fill, edge="none", radius=5, line=1.2, dashed=False, layer=3):
    """A box with round corners; x, y: its upper left corner; layer: what has a higher one lies above it."""
    style = f"round,pad=0,rounding_size={radius}"
    patch = FancyBboxPatch((x, y), width, height, style, facecolor=fill, edgecolor=edge, linewidth=points(line))
    patch.set(linestyle="--" if dashed else "-", zorder=layer)
    axis.add_patch(patch)


def draw_actions(steps, colours, path):
    """Each token of an answer in a box, the code of its action below it.

    steps: [(text, code)]; colours: {code: colour}. The width is that of a README."""
    boxes, height = place(steps)
    fig, axis = blank(WIDTH, height)
    middle = {"ha": "center", "va": "center", "zorder": 4}
    for x, y, width, shown, code in boxes:
        box(axis, x, y, width, BOX, fill=colours[code])
        at = x + width / 2
        axis.text(at, y + 13, shown, size=points(FONT), family="DejaVu Sans Mono", **middle)
        axis.text(at, y + 30, code, size=points(CODE_FONT), family="DejaVu Sans", color="#333333", **middle)
    fig.savefig(path, dpi=200)


def in_image(record):
    """What is in the image, where the record knows it ('facts' of the tiny world), else ''."""
    scene = (record.get("facts") or {}).get("scene") or []
    return "; ".join(" ".join(str(value) for value in thing.values()) for thing in scene)


def dialogue(out, n, record, said):
    """Lines of Markdown of one dialogue; its images are copied to `out`. said: {row of the table: response}."""
    lines = ["", f"## Dialogue {n + 1}", ""]
    for k, image in enumerate(record["images"]):
        name = f"example-{n}{'' if k == 0 else f'-{k}'}{Path(image).suffix}"
        shutil.copy(image, out / name)
        lines += [f"![Image of dialogue {n + 1}]({name})", ""]
    if in_image(record):
        lines += [f"In the image: {in_image(record)}.", ""]
    lines += [f"- **{m['role']}**: {m['content']}" for m in record["messages"][:-1]]
    lines += [f"- *reference*: {reference(record)}"]
    return lines + [f"- *{row}*: {text}" for row, text in said.items()]


def write_examples(out, test, records, answers, latent=None):
    """examples.md: each dialogue's images, what each model says, and a drawing of the latent side's actions.

    answers: {row of the table: a response to each record}; latent: None, or (row, [(text, code)] for each record)."""
    lines = ["# Example dialogues", "", f"From the {test} test; of each model its first response."]
    if latent:
        row, spoken_by_record = latent
        colours = code_colours(code for steps in spoken_by_record for _, code in steps)
        lines += [
            f"The drawings show the response of {row}. A box is a token; the number in it is the code of the latent",
            "action that produced it. A code has the same colour all over the page; rare codes are grey.",
        ]
    for n, record in enumerate(records):
        lines += dialogue(out, n, record, {name: texts[n] for name, texts in answers.items()})
        if latent:
            file = f"example-{n}-actions.png"
            draw_actions(spoken_by_record[n], colours, out / file)
            alt = " ".join(f"{text.strip()} {code}" for text, code in spoken_by_record[n])
            alt = alt.translate(str.maketrans("[]\n", "() "))
            lines += ["", f"![The tokens of {row}, each with its action: {alt}]({file})"]
    (out / "examples.md").write_text("\n".join(lines) + "\n")
