"""Broken input of every kind, seeded: an example or a DataError comes out. `make test-all` runs all of fuzz.py."""

import subprocess
import sys
import warnings

import fuzz
import pytest

from data import Processor

GROWTH = 100  # MB; what the caches of libraries may take after the first fifth of the items


@pytest.fixture(scope="module")
def processor():
    return Processor(str(fuzz.ROOT / "tiny" / "vlm"), max_length=400)


def check(report):
    """Both outcomes were met, nothing hung, nothing grew."""
    assert any("accepted" in k for k in report) and any("refused" in k for k in report), report
    assert report["slowest"] < fuzz.LIMIT and report["grown"] < GROWTH, report


@pytest.mark.parametrize("kind", fuzz.RECORDS)
def test_mutated_records(processor, tmp_path, kind):
    check(fuzz.fuzz_records(processor, tmp_path, kind, 200, seed=0))


def test_mutated_pictures(processor, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about broken EXIF blocks
        check(fuzz.fuzz_pictures(processor, tmp_path, 200, seed=0))


@pytest.mark.parametrize("layout", ["raw", "ready"])
def test_mutated_mmrole(tmp_path, layout):
    check(fuzz.fuzz_mmrole(tmp_path, layout, 100, seed=0))


@pytest.mark.all
def test_five_thousand_of_each():
    done = subprocess.run(
        [sys.executable, "tests/fuzz.py"], cwd=fuzz.ROOT, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(fuzz.RECORDS) + 3
