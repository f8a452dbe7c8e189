"""A real model behind a real server as the judge: `transformers serve` with the tiny VLM, pictures included.

Needs fastapi and uvicorn (`pip install transformers[serving]`), here or in the Python that SERVING_PYTHON names."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from helpers import TINY
from transformers import AutoTokenizer

import common
import evaluate
import stage4_latent_rl

pytest.importorskip("openai", reason="requirements-judge.txt")
PYTHON = os.environ.get("SERVING_PYTHON", sys.executable)
ASKED = """
[dimensions]
Fluency: Is it easy to read?
Image-Text Relevance: Is it about the picture?
[system]
Score two answers, {dimensions}
[user]
{dialogue} A: {answer_a} B: {answer_b} {form}
"""
SAID = "Fluency: A=7, B=6\nImage-Text Relevance: A=5, B=8"


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompt") / "short.txt"
    path.write_text(ASKED)
    return path


@pytest.fixture(scope="module")
def examiner(tmp_path_factory):
    """The folder of the tiny VLM, which answers everything with SAID: it has not learnt to judge, so each token of SAID
    gets a bias behind those before it, larger than any difference of logits."""
    folder = tmp_path_factory.mktemp("examiner") / "vlm"
    shutil.copytree(TINY, folder)
    ids = AutoTokenizer.from_pretrained(TINY)(SAID)["input_ids"]
    ids.append(json.loads((folder / "config.json").read_text())["eos_token_id"])
    biases = [[ids[: k + 1], 1000.0 * (k + 1)] for k in range(len(ids))]
    # the processor of Qwen2.5-VL wants torchvision for videos; this one does the same with texts and pictures alone
    processor = {"processor_class": "PaddleOCRVLProcessor"}
    changes = {
        "generation_config.json": {"sequence_bias": biases},
        "preprocessor_config.json": processor,
        "tokenizer_config.json": processor | {"extra_special_tokens": {"image_token": "<|image_pad|>"}},
    }
    for name, change in changes.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    return folder


@pytest.fixture(scope="module")
def url(examiner, tmp_path_factory):
    if subprocess.run([PYTHON, "-c", "import fastapi, uvicorn"], capture_output=True).returncode:
        pytest.skip("pip install transformers[serving]")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    argv = [PYTHON, "-c", "from transformers.cli.transformers import app; app()", "serve", str(examiner)]
    log = open(tmp_path_factory.mktemp("serve") / "log", "w")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    argv += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(argv, stdout=log, stderr=log, env=env)
    while True:
        assert process.poll() is None, Path(log.name).read_text()[-2000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5)
            break
        except urllib.error.HTTPError:  # it is there; without any model in its cache it has no list of them
            break
        except OSError:
            time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/v1"
    process.kill()
    process.wait()


def asked(url, examiner, prompt):
    flags = {"judge": url, "judge-model": examiner, "judge-prompt": prompt, "judge-parallel": 2, "judge-tokens": 60}
    return [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]


@pytest.mark.all
def test_rl_and_evaluation_with_a_model_as_the_judge(url, examiner, prompt, flags, runs, world, tmp_path, capsys):
    at = flags.rl.index("--judge")
    argv = [*flags.rl[:at], *flags.rl[at + 2 :], *asked(url, examiner, prompt), "--init", f"{runs}/loud"]
    stage4_latent_rl.main([*argv, "--steps", "2", "--batch", "2", "--max-new", "8", "--out", str(tmp_path / "rl")])
    rows = common.read_metrics(tmp_path / "rl")
    assert [row["judge_failed"] for row in rows] == [0, 0]
    # (7 + 5) / (6 + 8) where the response is A, else (6 + 8) / (7 + 5); two prompts a step
    a, b = 12 / 14, 14 / 12
    assert all(min(abs(row["reward"] - r) for r in (a, (a + b) / 2, b)) < 1e-5 for row in rows)
    assert rows[0]["judge_tokens_in"] > 9 * rows[0]["judge_calls"] > 0

    argv = ["--vlm", TINY, "--data", str(world), "--prompt", "no", "--latent", str(tmp_path / "rl"), "--max-new", "6"]
    argv += ["--limit", "2", "--samples", "1", "--diversity-prompts", "1", "--group", "2"]
    evaluate.main([*argv, *asked(url, examiner, prompt), "--out", str(tmp_path / "eval")])
    row = json.loads((tmp_path / "eval" / "results.json").read_text())["rows"]["GRPO latent"]
    assert list(row["ID"]["dimensions"]) == ["Fluency", "Image-Text Relevance"] and "judge_failed" not in row["OOD"]
    assert "judge: 4 calls" in capsys.readouterr().out
    assert torch.isfinite(torch.tensor([row["ID"]["ratio"], row["OOD"]["ratio"]])).all()
