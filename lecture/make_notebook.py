"""lecture/notebook.py -> lecture/notebook.ipynb. A cell begins at a line `# %%`, a text cell at `# %% [markdown]`.

python lecture/make_notebook.py
"""

import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent


def cells(script):
    """-> [(is it text, its source)]"""
    found = []
    for cell in re.split(r"^# %%", script, flags=re.M)[1:]:
        mark, _, body = cell.partition("\n")
        text = "markdown" in mark
        found.append((text, re.sub(r"^# ?", "", body.strip("\n"), flags=re.M) if text else body.strip("\n")))
    return found


def notebook(script):
    """-> the notebook as a dict, without outputs."""
    made = []
    for k, (text, source) in enumerate(cells(script)):
        cell = {"cell_type": "markdown" if text else "code", "id": f"cell-{k}", "metadata": {}}
        made.append(
            cell | ({} if text else {"execution_count": None, "outputs": []}) | {"source": source.splitlines(True)}
        )
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def text_of(script):
    return json.dumps(notebook(script), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (HERE / "notebook.ipynb").write_text(text_of((HERE / "notebook.py").read_text()))
    print("wrote lecture/notebook.ipynb")
