"""What a user may get wrong, through the command lines of the stages: one clear line, or it works."""

import json
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, cut_off, weights
from transformers import Qwen2Config, Qwen2ForCausalLM

import checkpoint
import common
import evaluate
import stage1_projector
import stage2_codebook
import stage3_bc
import stage4_latent_rl
from data import DataError, Processor
from vlm import VLM, check_kind


# --------------------------------------------------------------------------------------------------------- the VLM
def of_text_alone(folder):
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=2048, num_hidden_layers=1, **sizes)).save_pretrained(folder)


def without_template(folder):
    for file in folder.glob("chat_template*"):
        file.unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": None}))


@pytest.mark.parametrize(
    "change, message",
    [
        (of_text_alone, "its model type is 'qwen2'; the types that work are qwen2_vl, "),
        (without_template, "its tokenizer has no chat template"),
    ],
)
def test_a_vlm_of_another_kind_is_refused(tmp_path, change, message):
    shutil.copytree(TINY, tmp_path / "vlm")
    change(tmp_path / "vlm")
    with pytest.raises(DataError, match=f"--vlm .*{message}"):
        Processor(str(tmp_path / "vlm"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"accepts": {"pixel_values"}}, "takes no pixel_values or no image_grid_thw"),
        ({"config": SimpleNamespace(layer_types=["full_attention", "sliding_attention"])}, "type sliding_attention"),
        ({"config": SimpleNamespace(final_logit_softcapping=30.0)}, "scales or caps its logits"),
        ({"config": SimpleNamespace(logit_scale=0.5)}, "scales or caps its logits"),
        ({"head": torch.nn.Linear(2, 2)}, "has a bias in its LM head"),
    ],
)
def test_a_vlm_that_would_run_and_be_wrong_is_refused(vlm, change, message):
    parts = {"accepts": vlm.accepts, "config": vlm.config, "head": vlm.head}
    check_kind("odd", SimpleNamespace(**parts))
    with pytest.raises(DataError, match=f"--vlm odd: .*{message}"):
        check_kind("odd", SimpleNamespace(**parts | change))


def test_a_folder_on_disk_asks_no_network(monkeypatch, tmp_path):
    asked = []

    def ask(*args, **_):
        asked.append(args)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    monkeypatch.setattr(socket.socket, "connect", ask)
    Processor(TINY)
    VLM(TINY)
    (tmp_path / "empty").mkdir()
    for name in (f"{tmp_path}/empty", f"{tmp_path}/nowhere", "tiny/nothing"):
        with pytest.raises(DataError):
            Processor(name)
    assert asked == []
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("huggingface.co", 443))


# ----------------------------------------------------------------------------------------------- the command line
@pytest.mark.parametrize("module", [stage1_projector, stage2_codebook, stage3_bc, stage4_latent_rl, evaluate])
def test_an_out_that_is_no_folder_is_refused_before_the_work(module, world, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for out, message in (("", "--out: is empty; give a folder"), ("file", "--out file: cannot be written")):
        with pytest.raises(DataError, match=message):
            module.main(["--vlm", TINY, "--out", out, *(["--data", str(world)] if module is evaluate else [])])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_teaches_nothing_is_refused(flags, runs, tmp_path):
    out = ["--out", f"{tmp_path}/x"]
    with pytest.raises(DataError, match="nothing would be learnt"):
        stage2_codebook.main([*flags.book, "--projector", f"{runs}/1", "--steps-a", "0", "--steps-b", "0", *out])
    with pytest.raises(DataError, match="nothing would be learnt"):
        stage3_bc.main([*flags.sft, "--steps-adapt", "0", *out])
    with pytest.raises(DataError, match="--val 24: .*paired.jsonl has 24 rows, so none would be left"):
        stage2_codebook.main([*flags.book, "--projector", f"{runs}/1", "--val", "24", *out])
    assert checkpoint.latest(tmp_path / "x") is None


@pytest.mark.parametrize("flag", ["--tau", "--temperature", "--lr"])
@pytest.mark.parametrize("value", ["0", "inf", "nan"])
def test_numbers_that_make_other_numbers_infinite_are_refused(capsys, flag, value):
    """A learning rate of 0 is finite: a run may be there to look."""
    module = stage2_codebook if flag == "--tau" else stage4_latent_rl
    if (flag, value) == ("--lr", "0"):
        assert common.parse_config(module.Config, "", [flag, value]).lr == 0
        return
    with pytest.raises(SystemExit):
        module.main([flag, value])
    assert f"argument {flag}" in capsys.readouterr().err


@pytest.mark.parametrize("actions, init", [("latent", "loud"), ("token", "sft")])
def test_a_response_may_have_one_token(flags, runs, tmp_path, actions, init):
    some = ["--actions", actions, "--init", f"{runs}/{init}", "--steps", "1", "--batch", "2", "--max-new", "1"]
    stage4_latent_rl.main([*flags.rl, *some, "--out", str(tmp_path)])
    (row,) = common.read_metrics(tmp_path)
    assert row["length"] == 1 and row["entropy"] > 0 and row["logp_gap_max"] < 1e-5


def test_a_seed_may_have_any_length(flags, tmp_path):
    for name, seed in (("a", "9" * 30), ("b", "9" * 29 + "8")):
        more = ["--steps", "1", "--batch", "2", "--seed", seed, "--out", f"{tmp_path}/{name}"]
        stage1_projector.main([*flags.paired, *more])
    a, b = (common.read_metrics(tmp_path / k)[0]["proj_nll"] for k in "ab")
    assert a != b


# ----------------------------------------------------------------------------------------------------- refused rows
def test_the_console_and_the_checkpoint_say_which_rows_were_refused(world, tmp_path, monkeypatch, capsys):
    """Also if the run was cut off after it had met them, each once."""
    rows = (world / "text.jsonl").read_text().splitlines()[:4]
    bad = [json.dumps({"messages": []}), "no JSON"]
    (tmp_path / "demos.jsonl").write_text("\n".join([*rows[:2], *bad, *rows[2:]]))
    demos = ["--demos", f"{tmp_path}/demos.jsonl", "--batch-adapt", "8", "--steps-adapt", "12", "--save-every", "6"]
    argv = ["--vlm", TINY, "--actions", "token", *demos, "--out", f"{tmp_path}/x"]
    cut_off(monkeypatch, stage3_bc.main, argv, 6)
    stage3_bc.main(argv)
    reasons = checkpoint.read_state(tmp_path / "x")["refused"]["demos"]
    assert len(reasons) == 2 and "row 3: no messages" in reasons[0] and "row 4: not JSON" in reasons[1]
    counts = [row["refused"] for row in common.read_metrics(tmp_path / "x")]
    assert counts == sorted(counts) and counts[-1] == 2
    said = capsys.readouterr().out
    assert "2 of 6 rows cannot be used" in said and "row 3: no messages" in said and "row 4: not JSON" in said


# ---------------------------------------------------------------------------------------------- runs that lack parts
def spoilt(run, out, kept):
    """A finished run without the tensors whose names `kept` refuses."""
    state = checkpoint.read_state(run)
    checkpoint.save(out, state["step"], {k: v for k, v in weights(run).items() if kept(k)}, state)


def test_a_run_without_some_tensors_is_refused_by_the_next_stage(flags, runs, tmp_path):
    rl = [*flags.rl, "--steps", "1", "--max-new", "2", "--out", f"{tmp_path}/x"]
    spoilt(runs / "3", tmp_path / "3", lambda name: not name.startswith("policy"))
    with pytest.raises(DataError, match=f"{tmp_path}/3: lacks .* tensors, 'policy"):
        stage4_latent_rl.main([*rl, "--init", f"{tmp_path}/3"])
    gone = sorted(weights(runs / "sft"))[0]
    spoilt(runs / "sft", tmp_path / "sft", lambda name: name != gone)
    with pytest.raises(DataError, match=f"{tmp_path}/sft: '{gone}' is in the run or in the VLM, but not in both"):
        stage4_latent_rl.main([*rl, "--actions", "token", "--init", f"{tmp_path}/sft"])
    spoilt(runs / "1", tmp_path / "1", lambda name: "P_back" not in name)
    with pytest.raises(DataError, match=f"{tmp_path}/1: lacks .* tensors, 'projector.P_back"):
        stage2_codebook.main([*flags.book, "--projector", f"{tmp_path}/1", "--out", f"{tmp_path}/x"])


def test_a_run_that_lacks_tensors_or_its_optimizer_does_not_go_on(flags, tmp_path, monkeypatch):
    out = tmp_path / "x"
    argv = [*flags.paired, "--steps", "2", "--batch", "2", "--save-every", "1", "--out", str(out)]
    cut_off(monkeypatch, stage1_projector.main, argv, 1)
    shutil.copytree(out, tmp_path / "whole")
    (out / "ckpt-000001" / "optimizer.pt").unlink()
    with pytest.raises(DataError, match="ckpt-000001: damaged .*optimizer.pt"):
        stage1_projector.main(argv)
    shutil.copy(tmp_path / "whole" / "ckpt-000001" / "optimizer.pt", out / "ckpt-000001")
    kept = {k: v for k, v in weights(out).items() if "P_back" not in k}
    checkpoint.save_file(kept, out / "ckpt-000001" / "weights.safetensors")
    with pytest.raises(DataError, match="lacks .* tensors, 'P_back"):
        stage1_projector.main(argv)
