"""The example of docs/chat.md: a talk with the agent that ships, as text in the page and as the picture docs/chat.svg.

python -m studies.chat_page
"""

import io
import re
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

import common
from agent import Agent
from chat import Config as ChatConfig
from chat import Screen, Talk
from common import option

TYPED = ("What colour is the ring?", "/why", "/force 49 @6", "/again", "/force 25 @5", "/again")
COLUMNS = 112
# of the picture: pixels of a character and a line, and colours
WIDTH, HEIGHT, MARGIN, BACK, FRONT, PROMPT = 8.4, 19, 14, "#16191d", "#d8dee4", "#7ee787"
FONT = "DejaVu Sans Mono, Menlo, Consolas, monospace"
LEVELS = (0, 95, 135, 175, 215, 255)  # of a colour cube of 6 x 6 x 6, number 16 to 231 of a terminal's colours


@dataclass
class Config:
    page: str = option("docs/chat.md", "page whose first block of text is replaced")
    picture: str = option("docs/chat.svg", "file of the picture")


def session():
    """Type TYPED into a new talk -> what a terminal with colours would get."""
    screen = Screen(io.StringIO())
    screen.colours = True
    talk = Talk(ChatConfig(), Agent(ChatConfig()), screen)
    for line in TYPED:
        screen.write(f"> {line}")
        talk.take(line)
    return screen.out.getvalue()


def lines_of(text):
    """Text with colours -> lines of at most COLUMNS characters, each a list of (character, number of its colour)."""
    lines = []
    for line in text.splitlines():
        cells, colour = [], None
        for code, word in re.findall(r"\x1b\[([\d;]+)m|([^\x1b]+)", line):
            if code:
                colour = int(code.split(";")[-1]) or None
            cells += [(c, colour) for c in word]
        while len(cells) > COLUMNS:
            at = max(k for k in range(COLUMNS) if cells[k] == (" ", None))
            lines.append(cells[:at])
            cells = cells[at + 1 :]
        lines.append(cells)
    return lines


def plain(lines):
    return "\n".join("".join(c for c, _ in cells).rstrip() for cells in lines)


def rgb(colour):
    """Number of a terminal's colour, from 16 -> '#rrggbb'."""
    if colour > 231:
        return "#" + f"{8 + 10 * (colour - 232):02x}" * 3
    cube = divmod(colour - 16, 36)
    return "#" + "".join(f"{LEVELS[k]:02x}" for k in (cube[0], *divmod(cube[1], 6)))


def svg(lines):
    """-> the picture of a terminal. Each run of one colour has its place, so any font of fixed width will do."""
    width, height = COLUMNS * WIDTH + 2 * MARGIN, len(lines) * HEIGHT + 2 * MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height}" viewBox="0 0 {width:g} {height}"'
        f' font-family="{FONT}" font-size="14" xml:space="preserve">',
        f'<rect width="100%" height="100%" rx="8" fill="{BACK}"/>',
    ]
    for n, cells in enumerate(lines):
        y, x = MARGIN + n * HEIGHT, MARGIN
        typed = [c for c, _ in cells[:2]] == [">", " "]
        for colour, run in groupby(cells, lambda cell: cell[1]):
            text = "".join(c for c, _ in run)
            front = PROMPT if typed else FRONT
            if colour:
                front = "#000000"
                box = f'width="{len(text) * WIDTH:.1f}" height="{HEIGHT - 2}" fill="{rgb(colour)}"'
                out.append(f'<rect x="{x:.1f}" y="{y + 1}" {box} rx="2"/>')
            # blanks are left to x: a viewer may drop them
            for found in re.finditer(r"\S+", text):
                at, word = x + found.start() * WIDTH, found[0]
                length = f'textLength="{len(word) * WIDTH:.1f}"'
                out.append(f'<text x="{at:.1f}" y="{y + 14}" fill="{front}" {length}>{escape(word)}</text>')
            x += len(text) * WIDTH
    return "\n".join([*out, "</svg>"]) + "\n"


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    lines = lines_of(session())
    Path(cfg.picture).write_text(svg(lines))
    page = Path(cfg.page)
    block = f"```text\n{plain(lines)}\n```"
    page.write_text(re.sub(r"```text\n.*?```", lambda _: block, page.read_text(), count=1, flags=re.S))


if __name__ == "__main__":
    common.run(main)
