"""common.py: the command line made from a Config, ranks' normalisers, schedules, checkpoints, the log."""

import json
from dataclasses import asdict, dataclass

import pytest
import torch
from helpers import CPU, TINY, shell, weights

import checkpoint
import common
import stage1_projector
import stage2_codebook
import stage3_bc
import stage4_latent_rl
from common import option, parse_config
from data import DataError


@dataclass
class Config:
    lr: float = option(1e-3, "peak learning rate, 10% warm-up", paper=1e-4)
    mean: str = option("skip", "which mean", choices=("skip", "mlp"), paper="mlp")
    batch_size: int = option(12, "rows a step", least=1, paper=4)
    steps: int = option(7, "how many")
    out: str = option("runs/here", "folder")
    dry: str = option("no", "whether to stop before the first step", choices=("no", "yes"))


def refused(capsys, *argv):
    """What the command line says when it refuses these flags."""
    with pytest.raises(SystemExit) as e:
        parse_config(Config, "doc", list(argv))
    assert e.value.code == 2
    return capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- command line
def test_without_flags_a_config_has_its_defaults():
    assert parse_config(Config, "doc", []) == Config(1e-3, "skip", 12, 7, "runs/here", "no") == Config()


def test_a_yes_needs_no_word():
    for flags in (["--dry"], ["--dry", "yes"], ["--dry", "--steps", "7"]):
        assert parse_config(Config, "doc", flags).dry == "yes"
    assert parse_config(Config, "doc", ["--dry", "no"]).dry == "no"


def test_flags_have_their_field_s_type():
    cfg = parse_config(Config, "doc", ["--lr", "2", "--batch-size", "3", "--mean", "mlp", "--out", "5", "--steps", "0"])
    assert cfg == Config(2.0, "mlp", 3, 0, "5") and type(cfg.lr) is float


def test_help_shows_the_text_the_default_and_the_paper_s_value(capsys):
    with pytest.raises(SystemExit) as e:
        parse_config(Config, "What this script does.", ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and "What this script does." in said
    assert "--lr FLOAT peak learning rate, 10% warm-up (default: 0.001; paper: 0.0001)" in said
    assert "--mean {skip,mlp} which mean (default: skip; paper: mlp)" in said
    assert "--batch-size INT rows a step (default: 12; paper: 4)" in said
    assert "--steps INT how many (default: 7)" in said
    assert "--preset {none,paper}" in said


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mean", "other"], "invalid choice: 'other'"),
        (["--preset", "ours"], "invalid choice: 'ours'"),
        (["--batch-size", "0"], "--batch-size: 0 is too small, it must be at least 1"),
        (["--steps", "-1"], "--steps: -1 is too small, it must be at least 0"),
        (["--lr", "-0.5"], "--lr: -0.5 is too small, it must be at least 0"),
        (["--lr", "inf"], "--lr: inf is not a finite number"),
        (["--lr", "-inf"], "--lr"),
        (["--lr", "nan"], "--lr: nan is not a finite number"),
        (["--lr", "much"], "invalid float value: 'much'"),
        (["--steps", "1.5"], "invalid int value: '1.5'"),
        (["--stpes", "3"], "unrecognized arguments: --stpes"),
        (["--batch", "3"], "unrecognized arguments: --batch"),  # no flag is cut short
    ],
)
def test_bad_flags_are_refused_by_name(capsys, flags, message):
    assert message in refused(capsys, *flags)


def test_preset_paper_takes_every_paper_value_and_leaves_the_rest():
    assert parse_config(Config, "doc", ["--preset", "paper"]) == Config(1e-4, "mlp", 4, 7, "runs/here")
    assert parse_config(Config, "doc", ["--preset", "none"]) == Config()


@pytest.mark.parametrize("first", [["--preset", "paper"], ["--lr", "0.5", "--steps", "9"]])
def test_a_flag_wins_over_the_preset_in_either_order(first):
    preset, flags = ["--preset", "paper"], ["--lr", "0.5", "--steps", "9"]
    argv = first + (flags if first == preset else preset)
    assert parse_config(Config, "doc", argv) == Config(0.5, "mlp", 4, 9, "runs/here")


def test_a_flag_wins_over_the_preset_even_with_the_default_s_value():
    cfg = parse_config(Config, "doc", ["--lr", "0.001", "--preset", "paper"])
    assert cfg.lr == 1e-3 and cfg.mean == "mlp"


def test_a_config_without_paper_values_has_no_preset(capsys):
    @dataclass
    class Plain:
        steps: int = option(7, "how many")

    assert parse_config(Plain, "doc", ["--steps", "8"]) == Plain(8)
    with pytest.raises(SystemExit):
        parse_config(Plain, "doc", ["--preset", "paper"])
    assert "unrecognized arguments" in capsys.readouterr().err


# The paper's settings: 220,000 pairs and 300,000 texts, each once, 16 a step on four ranks; 4 prompts a step of RL.
IMAGES = {"max_length": 2048, "max_pixels": 280 * 420}
PAPER = {
    stage1_projector: {"mean": "mlp", "steps": 13750, "batch": 4, "lr": 1e-3} | IMAGES,
    stage2_codebook: {"codes": 128, "inverse_blocks": 4, "policy_blocks": 8, "merges": 2}
    | {"steps_a": 13750, "steps_b": 18750, "batch": 4, "lr": 1e-4}
    | {"tau": 2.0, "entropy_bonus": 1e-3, "projector_weight": 1e-5}
    | IMAGES,
    stage3_bc: {"steps_clone": 18750, "batch": 4, "lr": 1e-4, "lr_adapt": 5e-5, "train_share": 8 / 36}
    | {"tau": 2.0, "entropy_bonus": 1e-3}
    | IMAGES,
    stage4_latent_rl: {"batch": 1, "group": 8, "lr": 1e-6, "beta": 0.01, "clip_low": 0.2, "updates": 1}
    | {"temperature": 1.0, "max_prompt": 1024, "max_new": 1024, "max_pixels": 280 * 420},
}


@pytest.mark.parametrize("stage", PAPER, ids=lambda s: s.__name__)
def test_preset_paper_of_a_stage_has_the_paper_s_settings(stage):
    cfg = parse_config(stage.Config, stage.__doc__, ["--preset", "paper"])
    assert asdict(cfg) == asdict(stage.Config()) | PAPER[stage]


@pytest.mark.parametrize("stage", PAPER, ids=lambda s: s.__name__)
def test_every_stage_explains_its_flags(stage, capsys):
    with pytest.raises(SystemExit) as e:
        parse_config(stage.Config, stage.__doc__, ["--help"])
    said = capsys.readouterr().out
    assert e.value.code == 0 and "--preset" in said
    assert all("--" + name.replace("_", "-") in said for name in asdict(stage.Config()))


@pytest.mark.parametrize(
    "stage, flags, message",
    [
        (stage4_latent_rl, ["--loss-type", "ppo"], "invalid choice: 'ppo'"),
        (stage4_latent_rl, ["--group", "0"], "--group: 0 is too small"),
        (stage2_codebook, ["--without", "images"], "invalid choice: 'images'"),
    ],
)
def test_a_stage_refuses_bad_flags(capsys, stage, flags, message):
    with pytest.raises(SystemExit) as e:
        stage.main(flags)
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_errors_of_a_script_are_one_clear_line(tmp_path):
    """Exit status 2 and no traceback, for a bad flag and for bad data."""
    missing = ["--vlm", "tiny/vlm", "--paired", f"{tmp_path}/none.jsonl", "--out", f"{tmp_path}/x"]
    for flags, message in ((["--stpes", "3"], "unrecognized arguments: --stpes"), (missing, "none.jsonl")):
        done = shell("stage1_projector.py", *flags)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


# ----------------------------------------------------------------------------------------- ranks and optimizer
def test_normaliser_of_one_process_is_the_count():
    assert common.share(torch.tensor(4)).item() == 0.25
    assert common.share(torch.tensor(0)).item() == 1.0  # nothing to count: no division by 0
    assert common.total(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0] and common.world_size() == 1


def test_schedules_by_hand():
    # cosine: from 1 over 0.55 in the middle to 0.1; at a third of the way 0.55 + 0.45 / 2
    assert [common.cosine(d) for d in (0, 1 / 3, 0.5, 1)] == pytest.approx([1, 0.775, 0.55, 0.1])
    # warm-up over the first fifth of 10 steps: half at the first step, whole at the second
    assert [common.warmup(s / 10, 10, 0.2) for s in range(4)] == pytest.approx([0.5, 1, 1, 1])


@pytest.mark.parametrize("clip, moved", [(1.0, [-0.6, -0.8]), (10.0, [-3.0, -4.0]), (0.0, [-3.0, -4.0])])
def test_a_step_clips_the_whole_gradient(clip, moved):
    """The gradient (3, 4) has norm 5. Clip 0 clips nothing."""
    p = torch.nn.Parameter(torch.zeros(2))
    (p * torch.tensor([3.0, 4.0])).sum().backward()
    step_weights = common.Stepper([p], 1.0, clip)
    step_weights.optimizer = torch.optim.SGD([p], lr=1.0)
    norm = step_weights()
    assert norm.item() == 5.0 and p.tolist() == pytest.approx(moved, abs=1e-5) and p.grad is None


# ------------------------------------------------------------------------------------------------ checkpoints
STATE = {"stage": "stage2_codebook", "finished": True, "config": {"vlm": TINY, "batch": 3}}


def test_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"w": torch.ones(2)}, STATE)

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(DataError, match="disk full"):
        checkpoint.save(tmp_path, 2, {"w": torch.zeros(2)}, STATE)
    assert checkpoint.latest(tmp_path).name == "ckpt-000001" and torch.equal(weights(tmp_path)["w"], torch.ones(2))


def test_the_last_checkpoint_replaces_the_one_before(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"w": torch.full((2,), float(step))}, STATE, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt-000002"]
    tensors, state = checkpoint.load(tmp_path, "--init", ["stage2_codebook"], TINY)
    assert 0.1 < state.pop("peak_gib") < 100  # of the process: torch alone takes some tenths
    assert tensors["w"].tolist() == [2.0, 2.0] and state == STATE | {"step": 2, "ranks": 1}
    assert checkpoint.latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stage": "stage3_bc"}, "--init .*: is a checkpoint of stage3_bc, needed is one of stage2_codebook"),
        ({"finished": False}, "unfinished .stage2_codebook stopped at step 7.; run it again with the same --out"),
        ({"config": {"vlm": "another"}}, "was trained with --vlm another, not"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(tmp_path, change, message):
    checkpoint.save(tmp_path, 7, {}, STATE | change)
    with pytest.raises(DataError, match=message):
        checkpoint.load(tmp_path, "--init", ["stage2_codebook"], TINY)


def test_a_missing_run_is_named_with_the_cure(tmp_path):
    with pytest.raises(DataError, match=r"--init .*nowhere: no checkpoint there; run stage2_codebook.py --out"):
        checkpoint.load(tmp_path / "nowhere", "--init", ["stage2_codebook"], TINY)
    with pytest.raises(DataError, match=r"--init \(not given\)"):
        checkpoint.load("", "--init", ["stage2_codebook"], TINY)


def test_resume_goes_on_only_with_the_same_run(tmp_path):
    assert checkpoint.resume(tmp_path, "stage2_codebook", {"batch": 3}) is None
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p], lr=0.5)
    checkpoint.save(tmp_path, 7, {"w": p}, STATE | {"finished": False}, optimizer)
    tensors, state, extra = checkpoint.resume(tmp_path, "stage2_codebook", {"vlm": TINY, "batch": 3})
    assert tensors["w"].tolist() == [1.0, 1.0] and state["step"] == 7
    assert extra["optimizer"]["param_groups"][0]["lr"] == 0.5
    with pytest.raises(DataError, match=r"holds a run with another --batch \(3\)"):
        checkpoint.resume(tmp_path, "stage2_codebook", {"vlm": TINY, "batch": 4})
    with pytest.raises(DataError, match="holds a run of stage2_codebook"):
        checkpoint.resume(tmp_path, "stage3_bc", {"vlm": TINY, "batch": 3})


def test_an_agent_acts_as_it_was_trained(tmp_path):
    checkpoint.save(tmp_path, 7, {}, STATE | {"stage": "stage3_bc", "config": {"vlm": TINY, "actions": "token"}})
    with pytest.raises(DataError, match="--actions token, not latent"):
        common.load_agent(tmp_path, "latent", TINY, CPU)


# ---------------------------------------------------------------------------------------------------- the log
def test_the_log_has_every_number_and_a_resumed_step_counts_once(tmp_path):
    log = common.Log(tmp_path, "a run", 0, 3)
    log(1, ("loss",), loss=torch.tensor(0.5), codes=3)
    log(2, loss=0.25)
    log.close()
    again = common.Log(tmp_path, "a run", 1, 3)  # cut off after step 1 was saved
    again(2, loss=0.125)
    again.close()
    rows = common.read_metrics(tmp_path)
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 0.5), (2, 0.125)]
    assert rows[0]["codes"] == 3 and rows[0]["seconds"] >= 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_bad_input_ends_a_script_with_one_line_and_status_2(capsys):
    def main():
        raise DataError("data.jsonl, row 3: no messages")

    with pytest.raises(SystemExit) as e:
        common.run(main)
    assert e.value.code == 2 and capsys.readouterr().err == "error: data.jsonl, row 3: no messages\n"


def test_bad_rows_are_named_before_training(tmp_path, capsys):
    class Processor:
        def example(self, record, prompt_only):
            assert prompt_only
            if record["text"] == "bad":
                raise DataError(f"{record['where']}: too long")

    def records(*texts):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        return common.open_records(tmp_path / "rows.jsonl", common.Everywhere())

    assert len(common.usable(records("good", "good"), Processor(), common.Everywhere(), True)) == 2
    left = common.usable(records("good", "bad", "fine"), Processor(), common.Everywhere(), True)
    assert [left[i]["text"] for i in range(len(left))] == ["good", "fine"]
    said = capsys.readouterr()
    assert "1 of 3 rows cannot be used" in said.out + said.err and "row 2: too long" in said.out + said.err
    with pytest.raises(DataError, match="row 2: too long"):
        common.usable(records("good", "bad"), Processor(), common.Everywhere(strict="yes"), True)
    with pytest.raises(DataError, match="no row can be used.*too long"):
        common.usable(records("bad"), Processor(), common.Everywhere(), True)


def test_a_log_row_is_plain_json(tmp_path):
    log = common.Log(tmp_path, "a run", 0, 1)
    log(1, loss=torch.tensor(1 / 3))
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.333333
