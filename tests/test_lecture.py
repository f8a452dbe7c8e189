"""lecture/: each check fails before its exercise is done, and passes on the solution; the pages' links and commands."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import test_docs
import torch
from helpers import ROOT, TINY
from test_changing_it import SECTIONS, changes

import checkpoint
import common
import stage2_codebook
import stage3_bc
import stage4_latent_rl
from lecture import check, make_notebook

PAGES = {f"lecture/{p.name}": p for p in sorted((ROOT / "lecture").glob("*.md"))}
SOLUTIONS = (ROOT / "lecture" / "solutions.md").read_text()
ANSWERS = dict(re.findall(r"^## (\d+)\. .*?\n(.*?)(?=^## |\Z)", SOLUTIONS, re.M | re.S))
STAGES = {m.__name__: m for m in (stage2_codebook, stage3_bc, stage4_latent_rl)}


# ---------------------------------------------------------------------------------------------------- the pages
@pytest.mark.parametrize("page", PAGES)
def test_links_and_lines(page, monkeypatch):
    monkeypatch.setitem(test_docs.PAGES, page, PAGES[page])
    test_docs.test_links_lead_somewhere(page)
    test_docs.test_lines_are_short_and_name_no_machine(page)


def commands(text):
    """-> [(module of a stage, its arguments)] of the commands of a page."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    code = "\n".join(block for language, block in blocks if not language).replace("\\\n", " ")
    code = code.replace("--loss-type cispo", "--loss-type grpo")  # cispo is there once the exercise is done
    return [(STAGES[m[1]], m[2].split()) for m in re.finditer(r"(stage[2-4]_\w+)\.py (.*)", code)]


@pytest.mark.parametrize("page, least", [("exercises", 4), ("solutions", 10)])
def test_commands_are_understood(page, least):
    found = commands((ROOT / "lecture" / f"{page}.md").read_text())
    assert len(found) >= least
    for stage, argv in found:
        common.parse_config(stage.Config, "", argv)


def test_every_exercise_has_a_solution_and_a_check():
    exercises = re.findall(r"^## (\d+)\. (.*)", (ROOT / "lecture" / "exercises.md").read_text(), re.M)
    assert exercises == re.findall(r"^## (\d+)\. (.*)", SOLUTIONS, re.M)
    assert [int(n) for n, _ in exercises] == list(range(1, len(check.CHECKS) + 1))


# --------------------------------------------------------------------------------------------------- the checks
@pytest.mark.parametrize("number", range(1, 11))
def test_a_check_fails_before_the_exercise_is_done(number, tmp_path, capsys):
    assert check.main([str(number), "--runs", str(tmp_path)]) == 1
    assert f"FAIL exercise {number}: " in capsys.readouterr().out.splitlines()[-1]


def write_run(folder, stage, flags, log, **state):
    """A finished run of two steps, made by hand."""
    config = vars(common.parse_config(STAGES[stage].Config, "", flags))
    tensors = {"quantiser.codebook.weight": torch.zeros(config.get("codes", 1), 4)}
    checkpoint.save(folder, 2, tensors, {"stage": stage, "finished": True, "config": config} | state)
    rows = [{"step": k + 1, **row} for k, row in enumerate(log)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


VAL = {"val": {"paired": {"val_vlm": 1.0, "val_inferred": 0.9}}}
BOOK = [{"entropy": 4.0, "nll_paired": 9.0}, {"entropy": 3.0, "nll_paired": 5.0}]
RL = [{"entropy": 0.6, "logp_gap_max": 1e-6, "reward": 1.0, "length": 9.0}] * 2
WRONG = {  # the settings of a run that is not the exercise's
    1: ("stage2_codebook", {"ex1": ["--codes", "32"]}),
    4: ("stage2_codebook", {"ex4": []}),
    6: ("stage4_latent_rl", {"ex6": ["--top-k", "3"]}),
    8: ("stage2_codebook", {"ex8": []}),
    9: ("stage4_latent_rl", {"ex9_latent": [], "ex9_token": ["--actions", "token", "--lr", "1e-4"]}),
}


def flags_of(number):
    """{folder: flags} of the solution's commands that write a run."""
    return {argv[argv.index("--out") + 1].split("/")[-1]: argv for _, argv in commands(ANSWERS[str(number)])}


@pytest.mark.parametrize("number", WRONG)
def test_a_check_of_a_run_passes_on_the_solution_alone(number, tmp_path, capsys):
    stage, wrong = WRONG[number]
    log, rest = (BOOK, VAL) if stage == "stage2_codebook" else (RL, {})
    right = flags_of(number)
    for k, flags in enumerate((right, wrong)):
        for name in wrong:
            write_run(tmp_path / str(k) / name, stage, [*flags[name], "--vlm", TINY], log, **rest)
    assert check.main([str(number), "--runs", str(tmp_path / "0")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"PASS exercise {number}"
    assert check.main([str(number), "--runs", str(tmp_path / "1")]) == 1


def test_a_choice_of_two_codes_has_no_more_than_log_2_nats(tmp_path):
    flags = ["--top-k", "2", "--vlm", TINY]
    write_run(tmp_path / "ex6", "stage4_latent_rl", flags, [RL[0] | {"entropy": 0.7}])
    assert check.main(["6", "--runs", str(tmp_path)]) == 1


@pytest.mark.parametrize("section", [ANSWERS[n] for n in ANSWERS if changes(ANSWERS[n])])
def test_the_solutions_find_their_place(section):
    assert len(applied(section, {})) >= 1


def applied(section, files):
    """-> {file: its text after the section's changes}, on top of `files`."""
    files = dict(files)
    for file, hunks in changes(section):
        text = files.get(file, (ROOT / file).read_text() if (ROOT / file).exists() else "")
        for old, new in hunks:
            assert text.count(old) == 1 if old else not text, f"{file}: stands there {text.count(old)} times:\n{old}"
            text = text.replace(old, new) if old else new
        files[file] = text
    return files


@pytest.mark.all
@pytest.mark.parametrize("number, section", [(2, SECTIONS["Another RL algorithm"]), (5, None), (7, None), (3, None)])
def test_a_check_of_the_code_passes_on_the_solution(number, section, tmp_path):
    kept = ("*.py", "lecture", "tiny/*.py", "tests/*.py", "stage*", "prompts")
    for path in {p for pattern in kept for p in ROOT.glob(pattern)}:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
    for file, text in applied(section or ANSWERS[str(number)], {}).items():
        (tmp_path / file).write_text(text)
    if number == 3:
        log = [RL[0], RL[0] | {"length": 8.0}]
        write_run(tmp_path / "runs" / "lecture" / "ex3", "stage4_latent_rl", ["--judge", "short_judge:short"], log)
    done = subprocess.run(
        [sys.executable, "lecture/check.py", str(number)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and f"PASS exercise {number}" in done.stdout, done.stdout + done.stderr


@pytest.mark.all
def test_the_role_of_the_solution_is_played(tmp_path, capsys):
    (role,) = re.findall(r"^```json\n(.*?)^```", ANSWERS["10"], re.M | re.S)
    (tmp_path / "my_role.json").write_text(role)
    assert check.main(["10", "--runs", str(tmp_path)]) == 0
    (tmp_path / "my_role.json").write_text(role.replace("hail, neighbour", "hello, passengers"))
    assert check.main(["10", "--runs", str(tmp_path)]) == 1


# ------------------------------------------------------------------------------------------------- the notebook
NOTEBOOK = ROOT / "lecture" / "notebook.ipynb"


def test_the_notebook_is_made_from_the_script():
    script = (ROOT / "lecture" / "notebook.py").read_text()
    assert make_notebook.text_of(script) == NOTEBOOK.read_text()
    assert sum(cell["cell_type"] == "code" for cell in json.loads(NOTEBOOK.read_text())["cells"]) == 11


def test_each_of_the_ten_parts_has_a_computation_a_figure_and_a_question():
    parts = (ROOT / "lecture" / "notebook.py").read_text().split("# ## ")[1:]
    assert [int(part.split(".")[0]) for part in parts] == list(range(1, 11))
    for part in parts:
        assert "print(" in part and part.count("\nshow(fig, ") == 1 and part.count("**Question.**") == 1


@pytest.mark.all
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """Its code cells, one after the other in one process, in a copy of what is shipped: no run is needed. It begins in
    the notebook's folder, as Jupyter does."""
    for name in ("tiny", "lecture", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    code = ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n\n".join(code))
    done = subprocess.run([sys.executable, "../cells.py"], cwd=tmp_path / "lecture", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "runs" / "lecture" / "figures").glob("*.png"))) == 10


# --------------------------------------------------------------------------------------------------- the slides
SLIDES = ROOT / "lecture" / "slides.html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
COUNT = """<script>window.onload = () => {
  const long = [...document.querySelectorAll("section")].filter(s => s.scrollHeight > s.clientHeight + 1);
  const wide = [...document.querySelectorAll("pre, table, p")].filter(p => p.scrollWidth > p.clientWidth + 1);
  const broken = [...document.images].filter(i => !i.naturalWidth);
  const hidden = [...document.querySelectorAll(".ask")].filter(a => [...a.parentNode.children].some(e => e !== a &&
    e.getBoundingClientRect().bottom > a.getBoundingClientRect().top && e.getBoundingClientRect().height));
  document.title = `long ${long.length} wide ${wide.length} broken ${broken.length} hidden ${hidden.length}`;
}</script>"""


def browse(*flags):
    """Run the browser without a window -> what it prints."""
    safe = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    return subprocess.run([CHROMIUM, *safe, *flags], capture_output=True, text=True, timeout=300).stdout


def test_the_pictures_of_the_slides_are_there():
    text = SLIDES.read_text()
    pictures = re.findall(r'src="([^"]+)"', text)
    assert len(pictures) > 10 and all((SLIDES.parent / x).exists() for x in pictures)
    assert "http" not in text  # nothing is fetched
    slides = (ROOT / "lecture" / "README.md").read_text()
    assert f"24 to {text.count('<section')} " in slides


@pytest.mark.all
@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
def test_the_slides_print_one_page_each_and_nothing_is_cut_off(tmp_path):
    shutil.copytree(ROOT / "lecture", tmp_path / "lecture")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    looked = tmp_path / "lecture" / "looked.html"
    looked.write_text(SLIDES.read_text().replace("</body>", COUNT + "</body>"))
    assert "<title>long 0 wide 0 broken 0 hidden 0</title>" in browse(
        "--virtual-time-budget=5000", "--dump-dom", f"file://{looked}"
    )
    browse("--no-pdf-header-footer", f"--print-to-pdf={tmp_path}/slides.pdf", f"file://{SLIDES}")
    pages = re.findall(rb"/Type\s*/Page\b(?!s)", (tmp_path / "slides.pdf").read_bytes())
    assert len(pages) == SLIDES.read_text().count("<section")
