"""The two explaining figures: which state each part reads at each moment, and what the four stages do.

    docs/timeline.png  tokens, states, actions and losses over time; below, where the gradient flows in each stage
    docs/stages.png    the four stages: what comes in, what trains, what stays frozen, what goes out

One unit of the drawings is one pixel at the width of a README; they are saved at twice that, for sharp text.

    python -m studies.figures
"""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.colors import to_hex, to_rgb

import checkpoint
import common
from common import option
from plots import COLOURS, PARTS, blank, box, points

WIDTH = 850
INK, SOFT, FAINT = "#222222", "#666B73", "#B4B8BE"
STYLE = {"ha": "center", "va": "center", "linespacing": 1.2, "zorder": 4}
ROUND = 16  # radius of a state or an action, which are drawn rounder than the parts that compute


@dataclass
class Config:
    out: str = option("docs", "folder for the two figures")


# ------------------------------------------------------------------------------------------------ drawing
def tint(colour, share=0.3):
    """The colour mixed with white: `share` of it is left."""
    return to_hex([1 - share * (1 - c) for c in to_rgb(colour)])


def write(axis, x, y, text, size=13, colour=INK, **more):
    axis.text(x, y, text, size=points(size), color=colour, **STYLE | more)


def arrow(axis, start, end, colour=SOFT, thick=1.3, dashed=False):
    style = {"arrowstyle": "-|>", "mutation_scale": 6 + 2 * thick, "shrinkA": 0, "shrinkB": 0}
    style |= {"color": colour, "linewidth": points(thick), "linestyle": "--" if dashed else "-"}
    axis.annotate("", end, start, arrowprops=style, zorder=2)


def line(axis, xs, ys, colour=SOFT, thick=1.3):
    axis.plot(xs, ys, color=colour, linewidth=points(thick), solid_capstyle="round", zorder=2)


def node(axis, x, y, width, text, kind=None, trains=True, size=13, height=30):
    """A box around (x, y): a part of the method, coloured where it trains and grey where it is frozen; without a
    kind, a state, an action or a loss."""
    if kind is None:
        box(axis, x - width / 2, y - height / 2, width, height, fill="white", edge=INK, radius=ROUND * height / 36)
    else:
        colour = PARTS[kind if trains else "frozen"]
        box(axis, x - width / 2, y - height / 2, width, height, fill=tint(colour), edge=colour, line=1.6)
    write(axis, x, y, text, size)


# ------------------------------------------------------------------------------------------------ the timeline
COLUMN, FIRST, SHOWN = 134, 210, 3  # pixels from token to token, place of x_1, the action whose way is drawn in full
ROWS = {
    "tokens": (62, "tokens"),
    "vlm": (122, "VLM, frozen"),
    "states": (182, "states"),
    "inverse": (246, "inverse dynamics"),
    "policy": (304, "policy"),
    "actions": (372, "latent actions"),
    "codes": (434, "rows of the\ncodebook"),
    "world": (498, "world model"),
    "said": (566, "next token"),
    "loss": (612, "loss"),
}
Y = {name: y for name, (y, _) in ROWS.items()}


def column(t):
    """Place of x_t and e_t. a_t stands between e_t and e_{t+1}, at column(t + 0.5)."""
    return FIRST + COLUMN * (t - 1)


def tokens_and_states(axis):
    """x_1 .. x_5, the VLM, e_1 .. e_5, and the line from each state down to the world model."""
    for y, text in ROWS.values():
        write(axis, 12, y, text, 13, ha="left", weight="bold")
    for first, last, text in ((1, 2, "prompt"), (3, 5, "response")):
        write(axis, (column(first) + column(last)) / 2, 18, text, 13, SOFT)
        line(axis, [column(first) - 34, column(last) + 34], [32, 32], SOFT, 1)
    for t in range(1, 6):
        x = column(t)
        if t < 5:  # nothing is said after x_5
            line(axis, [x, x], [Y["states"], Y["world"]], SOFT if t == SHOWN else FAINT, 1.5)
            arrow(axis, (x, Y["world"]), (x + COLUMN / 2 - 38, Y["world"]), SOFT if t == SHOWN else FAINT, 1.5)
        arrow(axis, (x, Y["tokens"]), (x, Y["vlm"] - 16))
        arrow(axis, (x, Y["vlm"]), (x, Y["states"] - 19))
        box(axis, x - 30, Y["tokens"] - 18, 60, 36, fill=tint(SOFT, 0.25) if t < 3 else "white", edge=INK)
        write(axis, x, Y["tokens"], f"$x_{t}$", 18)
        node(axis, x, Y["states"], 60, f"$e_{t}$", None, size=18, height=36)
    node(axis, column(3), Y["vlm"], 4 * COLUMN + 80, "reads the image, if any, and $x_1$ to $x_t$", "frozen", False)
    for name, note in (
        ("states", "without an image:\nthe mean of $P$(state)"),
        ("actions", "$a_t$ explains $x_{t+1}$"),
        ("said", "the VLM's LM head"),
        ("loss", r"$L_\mathrm{inverse}$ is the sum"),
    ):
        write(axis, 12, Y[name] + 11, note, 11.5, SOFT, ha="left", va="top")


def readers(axis):
    """What the inverse dynamics and the policy read to name the action SHOWN: the states up to the end of each bar."""
    left, at = column(1) - 32, column(SHOWN + 0.5)
    inverse = f"learning: names $a_{SHOWN}$ from $e_1$ to $e_{SHOWN + 1}$, so it has seen $x_{SHOWN + 1}$"
    policy = f"talking: names $a_{SHOWN}$ from $e_1$ to $e_{SHOWN}$ alone"
    for kind, last, text in (("inverse", SHOWN + 1, inverse), ("policy", SHOWN, policy)):
        right = column(last) + 32
        node(axis, (left + right) / 2, Y[kind], right - left, text, kind)
        for t in range(1, last + 1):
            arrow(axis, (column(t), Y[kind] - 28), (column(t), Y[kind] - 16), PARTS[kind], 2)
    arrow(axis, (at + 9, Y["inverse"] + 15), (at + 9, Y["actions"] - 19), PARTS["inverse"], 2.4)
    line(axis, [column(SHOWN) + 33, at - 9], [Y["policy"]] * 2, PARTS["policy"], 2.4)
    arrow(axis, (at - 9, Y["policy"] - 1), (at - 9, Y["actions"] - 19), PARTS["policy"], 2.4)


def actions_to_tokens(axis):
    """From each action over its row of the codebook and the world model to the token that it explains."""
    for t in range(1, 5):
        x, nxt = column(t + 0.5), column(t + 1)
        way = (INK, 2) if t == SHOWN else (FAINT, 1.5)
        arrow(axis, (x, Y["actions"]), (x, Y["codes"] - 17), *way)
        arrow(axis, (x, Y["codes"]), (x, Y["world"] - 18), *way)
        arrow(axis, (x + 20, Y["world"]), (nxt - 16, Y["said"] - 18), *way)
        node(axis, x, Y["actions"], 54, f"$a_{t}$", None, size=18, height=36)
        node(axis, x, Y["codes"], 60, f"$c_{{a_{t}}}$", "codebook", size=18, height=32)
        node(axis, x, Y["world"], 74, "merge", "world", height=34)
        box(axis, nxt - 38, Y["said"] - 17, 76, 34, fill="white", edge=INK)
        write(axis, nxt, Y["said"], f"$p(x_{t + 1})$", 15)
        if t == 1:
            write(axis, nxt, Y["loss"], "prompt:\nnot counted", 12, SOFT)
        else:
            write(axis, nxt, Y["loss"] - 3, rf"$-\log\,p(x_{t + 1})$", 14.5)
    x = column(5) + COLUMN / 2
    box(axis, x - 27, Y["actions"] - 18, 54, 36, fill="white", edge=SOFT, radius=ROUND, dashed=True)
    write(axis, x, Y["actions"], "none", 13, SOFT)
    write(axis, x + 27, Y["codes"] + 2, "no token is left\nto explain", 12, SOFT, ha="right")


# ------------------------------------------------------------------------------------------------ the gradients
class Panel:
    """A small drawing of its own: nodes by name, thin arrows for what is computed, red ones for the gradient."""

    width, height = 277, 186

    def __init__(self, axis, x, y, title):
        self.axis, self.x, self.y, self.nodes = axis, x, y, {}
        box(axis, x, y, self.width, self.height, fill="#FBFBFB", edge="#D5D8DC", layer=1)
        write(axis, x + 10, y + 16, title, 13, ha="left", weight="bold")

    def add(self, name, x, y, width, text, kind=None, trains=False):
        self.nodes[name] = (self.x + x, self.y + y, width)
        node(self.axis, self.x + x, self.y + y, width, text, kind, trains, 15 if "L_" in text else 13, 28)

    def note(self, x, y, text, **more):
        write(self.axis, self.x + x, self.y + y, text, 11.5, SOFT, **more)

    def link(self, start, end, aside, *style, **more):
        """A straight arrow from edge to edge of two nodes in a row or a column, moved `aside` from their centres."""
        (x1, y1, w1), (x2, y2, w2) = self.nodes[start], self.nodes[end]
        if y1 == y2:
            sign = 1 if x2 > x1 else -1
            ends = (x1 + sign * w1 / 2, y1 + aside), (x2 - sign * (w2 / 2 + 1), y2 + aside)
        else:
            sign = 1 if y2 > y1 else -1
            ends = (x1 + aside, y1 + sign * 14), (x1 + aside, y2 - sign * 15)
        arrow(self.axis, *ends, *style, **more)

    def forward(self, *names, **more):
        for start, end in zip(names, names[1:]):
            self.link(start, end, -6, **more)

    def gradient(self, *names):
        for start, end in zip(names, names[1:]):
            self.link(start, end, 6, PARTS["gradient"], 3)


def context(panel, projector="$P$", trains=False):
    """The state e: of the VLM, or without an image of P."""
    panel.add("vlm", 30, 94, 44, "VLM", "frozen")
    panel.add("e", 154, 94, 34, "$e$")
    if projector:
        panel.add("P", 94, 94, 44, projector, "projector", trains)
        panel.forward("vlm", "P", "e")
    else:
        panel.forward("vlm", "e")


def loop(panel):
    """The parts of L_inverse, all of which it trains but the LM head."""
    panel.add("inverse", 234, 94, 64, "inverse", "inverse", True)
    panel.add("codebook", 234, 152, 68, "codebook", "codebook", True)
    panel.add("world", 154, 152, 46, "world", "world", True)
    panel.add("head", 98, 152, 38, "head", "frozen")
    panel.add("loss", 35, 152, 60, r"$L_\mathrm{inverse}$")
    panel.forward("e", "inverse", "codebook", "world", "head", "loss")
    panel.forward("e", "world")
    panel.note(217, 122, "$a$")
    panel.gradient("loss", "head", "world", "codebook", "inverse")


def stage1(axis, x, y):
    panel = Panel(axis, x, y, "Stage 1: paired data")
    panel.add("vlm", 32, 106, 46, "VLM", "frozen")
    for row, state, note, part, loss, target in (
        (70, "$e^{T}$", "no image", "$P$", r"$L_\mathrm{t2vt}$", "target $e^{VT}$"),
        (138, "$e^{VT}$", "image", "$P'$", r"$L_\mathrm{vt2t}$", "target $e^{T}$"),
    ):
        arrow(axis, (x + 55, y + 106 + (row - 104) / 4), (x + 76, y + row))
        panel.add(state, 98, row, 42, state)
        panel.add(part, 163, row, 44, part, "projector", True)
        panel.add(loss, 238, row, 58, loss)
        panel.forward(state, part, loss)
        panel.gradient(loss, part)
        panel.note(98, row + 24, note)
        panel.note(238, row + 24, target)


def stage2a(axis, x, y):
    panel = Panel(axis, x, y, "Stage 2a: paired data")
    context(panel, None)
    loop(panel)
    panel.note(10, 50, "the hard choice of a code $a$ lets\nthe gradient straight through", ha="left")


def stage2b(axis, x, y):
    panel = Panel(axis, x, y, "Stage 2b: text-only data as well")
    context(panel, "$P, P'$", True)
    loop(panel)
    panel.add("own", 92, 48, 172, r"$L_\mathrm{t2vt}+L_\mathrm{vt2t}+L_\mathrm{cycle}$")
    panel.link("P", "own", -6)
    panel.gradient("own", "P")
    panel.note(184, 48, "$L_\\mathrm{inverse}$ stops at\n$e$: not into $P$", ha="left")


def stage3(axis, x, y, adapt):
    panel = Panel(axis, x, y, "Stage 3, adaptation" if adapt else "Stage 3, cloning")
    context(panel)
    if adapt:
        loop(panel)
    else:
        panel.add("inverse", 234, 94, 64, "inverse", "inverse")
        panel.forward("e", "inverse")
        panel.note(139, 148, "dashed: the arg max of the inverse\ndynamics is the target; no gradient")
    panel.add("policy", 154, 48, 54, "policy", "policy", True)
    panel.add("bc", 234, 48, 42, r"$L_\mathrm{bc}$")
    panel.forward("e", "policy", "bc")
    panel.gradient("bc", "policy")
    panel.link("inverse", "bc", 0, dashed=True)


def stage4(axis, x, y):
    panel = Panel(axis, x, y, "Stage 4: RL")
    context(panel)
    panel.add("policy", 234, 94, 60, "policy", "policy", True)
    panel.add("codebook", 234, 152, 68, "codebook", "codebook")
    panel.add("world", 154, 152, 46, "world", "world")
    panel.add("head", 98, 152, 38, "head", "frozen")
    panel.add("judge", 34, 152, 46, "judge")
    panel.add("rl", 234, 48, 46, r"$L_\mathrm{RL}$")
    panel.forward("e", "policy", "codebook", "world", "head", "judge")
    panel.forward("e", "world")
    panel.forward("policy", "rl")
    panel.gradient("rl", "policy")
    panel.note(217, 122, "$a$")
    panel.note(10, 50, "the judge's reward says which\nactions become likelier", ha="left")


def timeline(path):
    fig, axis = blank(WIDTH, 1084)
    tokens_and_states(axis)
    readers(axis)
    actions_to_tokens(axis)
    write(axis, 12, 668, "Where the gradient flows (red)", 15, weight="bold", ha="left")
    write(axis, 290, 668, "Coloured parts train, grey parts are frozen, thin arrows only compute.", 13, ha="left")
    stage1(axis, 4, 690)
    stage2a(axis, 287, 690)
    stage2b(axis, 570, 690)
    stage3(axis, 4, 884, adapt=False)
    stage3(axis, 287, 884, adapt=True)
    stage4(axis, 570, 884)
    fig.savefig(path, dpi=200)


# ------------------------------------------------------------------------------------------------ the four stages
CHIPS = {"vlm": "VLM", "projector": "projector $P, P'$", "inverse": "inverse dynamics", "codebook": "codebook"}
CHIPS |= {"world": "world model", "policy": "policy"}
ALL = tuple(CHIPS)


@dataclass
class Phase:
    """A column of a room: what comes in, which parts are there, which of them train, the loss."""

    name: str
    data: str
    there: tuple
    trains: tuple
    loss: str


LEARNT = ("inverse", "codebook", "world")
OWN = "$L_\\mathrm{inverse} + w\\,(L_\\mathrm{t2vt}$\n$+\\,L_\\mathrm{vt2t} + L_\\mathrm{cycle})$"
BOTH = r"$L_\mathrm{inverse} + L_\mathrm{bc}$"
PROJECTOR = (Phase("", "paired: image\nand text", ALL[:2], ("projector",), r"$L_\mathrm{t2vt} + L_\mathrm{vt2t}$"),)
CODEBOOK = (
    Phase("phase a", "paired", ALL[:5], LEARNT, r"$L_\mathrm{inverse}$"),
    Phase("phase b", "paired and\ntext-only", ALL[:5], ("projector", *LEARNT), OWN),
)
CLONING = (
    Phase("clone", "paired and\ntext-only", ALL, ("policy",), r"$L_\mathrm{bc}$"),
    Phase("adapt", "the task's\ndemonstrations", ALL, (*LEARNT, "policy"), BOTH),
)
RL = (Phase("", "the task's\nprompts, a judge", ALL, ("policy",), "GRPO, Dr.GRPO,\nDAPO or BNPO"),)
ROOMS = (  # title, folder, what the folder holds, phases
    ("1  Projector", "runs/demo/stage1", "$P, P'$", PROJECTOR),
    ("2  Codebook", "runs/demo/stage2", "$P, P'$, inverse dynamics,\ncodebook, world model", CODEBOOK),
    ("3  Cloning", "runs/demo/stage3", "all five parts", CLONING),
    ("4  RL", "runs/demo/rl_latent", "all five parts", RL),
)
CELL, GAP, ROOM_TOP, ROOM_BOTTOM = 124, 15, 36, 508  # width of a phase, between rooms; their upper and lower edge


def chips(axis, x, phase):
    """The parts as they are in one phase, around x: coloured, grey, or dashed where they do not exist yet."""
    for k, (name, text) in enumerate(CHIPS.items()):
        y = ROOM_TOP + 146 + 35 * k
        if name in phase.there:
            node(axis, x, y, CELL - 8, text, name, name in phase.trains, 12.5, 29)
        else:
            box(axis, x - CELL / 2 + 4, y - 14, CELL - 8, 28, fill="white", edge=FAINT, dashed=True)


def room(axis, left, title, folder, holds, phases):
    """One stage. -> its right edge."""
    width = CELL * len(phases) + 12
    box(axis, left, ROOM_TOP, width, ROOM_BOTTOM - ROOM_TOP, fill="#FBFBFB", edge=PARTS["frozen"], line=1.5, layer=1)
    write(axis, left + 10, ROOM_TOP + 19, title, 16, weight="bold", ha="left")
    for y, text in ((46, "comes in"), (348, "loss"), (411, "goes out")):
        write(axis, left + 10, ROOM_TOP + y, text, 12, SOFT, ha="left")
    for k, phase in enumerate(phases):
        x = left + 6 + CELL * (k + 0.5)
        write(axis, x, ROOM_TOP + 66, phase.name, 13, weight="bold")
        write(axis, x, ROOM_TOP + (80 if phase.name else 66), phase.data, 13, va="top", linespacing=1.35)
        write(axis, x, ROOM_TOP + 377, phase.loss, 13.5)
        chips(axis, x, phase)
    write(axis, left + 10, ROOM_TOP + 430, folder, 12.5, ha="left")
    write(axis, left + 10, ROOM_TOP + 440, holds, 12.5, SOFT, ha="left", va="top")
    return left + width


def stages(path):
    fig, axis = blank(WIDTH, 612)
    for x, text, colour in ((8, "trains", PARTS["policy"]), (82, "is frozen", PARTS["frozen"])):
        box(axis, x, 8, 16, 16, fill=tint(colour), edge=colour, line=1.6)
        write(axis, x + 22, 16, text, 13, ha="left")
    box(axis, 174, 8, 16, 16, fill="white", edge=FAINT, dashed=True)
    write(axis, 196, 16, "is not there yet", 13, ha="left")
    write(axis, WIDTH - 6, 16, "Each stage also reads the folder of the one before it.", 13, SOFT, ha="right")
    left = 5
    for k, one in enumerate(ROOMS):
        if k:
            arrow(axis, (left - GAP, ROOM_TOP + 430), (left, ROOM_TOP + 430), INK, 3)
        left = room(axis, left, *one) + GAP
    note = (
        r"$L_\mathrm{inverse}$ comes with a small entropy bonus; the loss of RL, with a KL to the policy at its start."
    )
    write(axis, 8, 528, note, 13, SOFT, ha="left")
    write(axis, 8, 562, "Beside them, the baseline:", 13, ha="left", weight="bold")
    note = "It has no latent actions: the VLM's last blocks, final norm, embeddings and head train."
    write(axis, 8, 594, note, 13, SOFT, ha="left")
    for x, width, text, row in (
        (212, 250, "SFT: runs/demo/sft", "SFT"),
        (490, 354, "RL over tokens: runs/demo/rl_token", "token"),
    ):
        box(axis, x, 547, width, 30, fill=tint(COLOURS[row]), edge=COLOURS[row], line=1.6)
        write(axis, x + width / 2, 562, text)
    arrow(axis, (462, 562), (489, 562), INK, 2)
    fig.savefig(path, dpi=200)


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    out = Path(cfg.out)
    checkpoint.open_folder(cfg.out)
    timeline(out / "timeline.png")
    stages(out / "stages.png")


if __name__ == "__main__":
    common.run(main)
