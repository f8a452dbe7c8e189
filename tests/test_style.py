"""The lay-out of the code: lengths of files, functions and lines, who imports whom, the legend of dimensions."""

import ast
import re

import pytest
from helpers import ROOT

METHOD = sorted(ROOT.glob("*.py"))
STAGES = [f.stem for f in METHOD if re.match(r"stage\d_", f.name)]
ELSEWHERE = [f for f in ROOT.glob("*/*.py") if f.parent.name != "runs" and f.parent.name[0] != "."]
CODE = METHOD + sorted(f for f in ELSEWHERE if f.parent.name != "tests")
TESTS = sorted((ROOT / "tests").glob("*.py"))


def by_name(files):
    return pytest.mark.parametrize("file", files, ids=lambda f: str(f.relative_to(ROOT)))


def nodes(file, *kinds):
    return [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, kinds)]


def imported(file):
    """The modules and packages that a file imports."""
    names = {a.name for n in nodes(file, ast.Import) for a in n.names}
    names |= {n.module for n in nodes(file, ast.ImportFrom)}
    return {n.split(".")[0] for n in names}


def test_there_is_something_to_look_at():
    assert STAGES == ["stage1_projector", "stage2_codebook", "stage3_bc", "stage4_latent_rl"]
    assert {"convert", "studies", "tests", "tiny"} <= {f.parent.name for f in ELSEWHERE}


@by_name(METHOD)
def test_no_file_of_the_method_has_over_400_lines(file):
    assert len(file.read_text().splitlines()) <= 400


@by_name(CODE)
def test_no_function_has_over_60_lines(file):
    functions = nodes(file, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    long = [(getattr(n, "name", "lambda"), n.end_lineno - n.lineno + 1) for n in functions]
    assert [(name, lines) for name, lines in long if lines > 60] == []


@by_name(CODE + TESTS)
def test_no_line_has_over_120_columns(file):
    lines = enumerate(file.read_text().splitlines(), 1)
    assert [(k, len(line)) for k, line in lines if len(line) > 120] == []


@by_name(CODE + TESTS)
def test_no_conditional_expression_stands_in_another(file):
    inside = [m for n in nodes(file, ast.IfExp) for m in ast.walk(n) if m is not n]
    assert [n.lineno for n in inside if isinstance(n, ast.IfExp)] == []


@by_name(METHOD)
def test_the_method_does_not_know_the_toy_nor_the_studies(file):
    assert not imported(file) & {"tiny", "studies", "convert", "tests"}


@by_name(METHOD)
def test_no_stage_is_imported(file):
    """What two stages need stands in a file of its own; what comes after them reads their checkpoints."""
    assert not imported(file) & set(STAGES)


def legend():
    """The letters that the first page of model.py explains."""
    paragraphs = ast.get_docstring(ast.parse((ROOT / "model.py").read_text())).split("\n\n")
    (found,) = [p for p in paragraphs if p.startswith("Letters at the end of a name")]
    return set(re.findall(r"\b[A-Z]\b", found))


def test_the_legend_is_that_of_the_method():
    assert set("BGTDKV") <= legend()


@by_name(METHOD)
def test_every_dimension_in_a_name_is_in_the_legend(file):
    """h_BTD has the dimensions B, T and D; a digit is a size of its own (e_N1D)."""
    names = {n.id for n in nodes(file, ast.Name)} | {n.arg for n in nodes(file, ast.arg)}
    names |= {n.attr for n in nodes(file, ast.Attribute)}
    lower = {n for n in names if n != n.upper()}  # a constant has no dimensions
    dimensions = {n: re.search(r"_([A-Z][A-Z0-9]*)$", n) for n in lower}
    unknown = {n: m[1] for n, m in dimensions.items() if m and set(m[1]) - legend() - set("0123456789")}
    assert unknown == {}
