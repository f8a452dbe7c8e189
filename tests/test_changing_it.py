"""docs/changing_it.md: each block names its file, and finds its place in it once. What it makes is valid Python."""

import ast
import re

import pytest
from helpers import ROOT

PAGE = (ROOT / "docs" / "changing_it.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))


def changes(section):
    """-> [(file, hunks)], a hunk is (old lines, new lines); a new file is one hunk without old lines."""
    found = []
    for match in re.finditer(r"^```(diff|python)\n(.*?)^```", section, re.M | re.S):
        before = section[: match.start()].rstrip().split("\n\n")[-1]
        file = re.findall(r"(?:[Nn]ew file|In) `([\w/]+\.py)`", before)[-1]
        hunks = [("", match[2])]
        if match[1] == "diff":
            parts = [part.splitlines() for part in re.split(r"^@@.*\n", match[2], flags=re.M)[1:]]
            hunks = [["".join(f"{x[1:]}\n" for x in part if x[:1] != sign) for sign in "+-"] for part in parts]
        found.append((file, hunks))
    return found


@pytest.mark.parametrize("section", [name for name, text in SECTIONS.items() if changes(text)])
def test_every_block_finds_its_place(section):
    files = {}
    for file, hunks in changes(SECTIONS[section]):
        path = ROOT / file
        text = files.get(file, path.read_text() if path.exists() else "")
        for old, new in hunks:
            assert text.count(old) == 1 if old else not text, f"{file}: stands there {text.count(old)} times:\n{old}"
            text = text.replace(old, new) if old else new
        files[file] = text
    for text in files.values():
        ast.parse(text)
