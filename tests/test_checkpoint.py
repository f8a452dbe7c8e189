"""checkpoint.py: whole or not there, checked when read, one writer, and signals that end a step and not a run."""

import json
import os
import shutil
import signal

import pytest
import torch
from torch import nn

import checkpoint
import common
from checkpoint import Guard, load_into, newest, resume, save
from data import DataError

CONFIG = {"vlm": "tiny/vlm", "steps": 10, "lr": 0.1, "save_every": 2, "keep": 2, "out": "here"}


def state(**more):
    return {"stage": "stage1_projector", "finished": False, "config": CONFIG} | more


def adam(value=0.0):
    p = nn.Parameter(torch.full((2,), value))
    p.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([p])
    optimizer.step()
    return optimizer


def write(out, step, **kw):
    save(out, step, {"w": torch.full((2,), float(step))}, state(**kw), adam(), {"seen": [step]})


# ------------------------------------------------------------------------------------------------------ saving
def test_what_was_saved_comes_back(tmp_path):
    write(tmp_path, 3)
    tensors, was, going_on = newest(tmp_path, True)
    assert tensors["w"].tolist() == [3, 3] and was["step"] == 3 and was["ranks"] == 1
    assert going_on["extra"] == {"seen": [3]} and going_on["optimizer"]["param_groups"]


def test_the_newest_stay_and_are_sorted_by_number(tmp_path):
    for step in (5, 999_999, 1_000_000):
        write(tmp_path, step)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["ckpt-1000000", "ckpt-999999"]
    assert newest(tmp_path, True)[1]["step"] == 1_000_000


WRITES = ("shutil.rmtree", "checkpoint.save_file", "torch.save", "pathlib.Path.write_text", "pathlib.Path.rename")


@pytest.mark.parametrize("where", WRITES)
@pytest.mark.parametrize("before", [True, False])
def test_a_save_that_ends_anywhere_leaves_the_checkpoint_before(tmp_path, monkeypatch, where, before):
    """A kill, or a full disk, at each call that writes: in front of it, or behind it."""
    write(tmp_path, 1)
    module, _, name = where.rpartition(".")
    owner = {"shutil": shutil, "checkpoint": checkpoint, "torch": torch}.get(module, checkpoint.Path)
    real = getattr(owner, name)

    def ends(*args, **kw):
        if not before:
            real(*args, **kw)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(owner, name, ends)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 2)
    tensors, was, _ = newest(tmp_path, True)
    assert was["step"] in ((1,) if before or "rename" not in where else (2,)) and tensors["w"][0] == was["step"]
    write(tmp_path, 2)  # and the next save works
    assert newest(tmp_path, True)[1]["step"] == 2


def test_a_checkpoint_behind_which_the_run_has_gone_back_is_deleted(tmp_path):
    """It was damaged. As one of the newest it would be kept, in place of those that are whole."""
    for step in (2, 4, 6):
        write(tmp_path, step)
    cut(tmp_path / "ckpt-000006" / "weights.safetensors")
    save(tmp_path, 5, {"w": torch.zeros(2)}, state(), adam(), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt-000005"]


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DataError, match="step 2 cannot be written.*No space left"):
        write(tmp_path, 2)
    assert newest(tmp_path, True)[1]["step"] == 1


# ------------------------------------------------------------------------------------------------------ damage
def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bomb_went_off",)


DAMAGE = {
    "cut weights": lambda d: cut(d / "weights.safetensors"),
    "empty weights": lambda d: (d / "weights.safetensors").write_bytes(b""),
    "no weights": lambda d: (d / "weights.safetensors").unlink(),
    "cut state": lambda d: cut(d / "state.json"),
    "empty state": lambda d: (d / "state.json").write_text(""),
    "state of nothing": lambda d: (d / "state.json").write_text("{}"),
    "no state": lambda d: (d / "state.json").unlink(),
    "state is a list": lambda d: (d / "state.json").write_text("[]"),
    "no optimizer": lambda d: (d / "optimizer.pt").unlink(),
    "empty optimizer": lambda d: (d / "optimizer.pt").write_bytes(b""),
    "cut optimizer": lambda d: cut(d / "optimizer.pt"),
    "foreign optimizer": lambda d: torch.save({"a": 1}, d / "optimizer.pt"),
    "code in the optimizer": lambda d: torch.save(Bomb(), d / "optimizer.pt"),
    "nan weights": lambda d: checkpoint.save_file({"w": torch.tensor([float("nan")])}, d / "weights.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, monkeypatch, capsys, damage):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, 1)
    write(tmp_path, 2)
    DAMAGE[damage](tmp_path / "ckpt-000002")
    assert newest(tmp_path, True)[1]["step"] == 1
    said = capsys.readouterr().out + capsys.readouterr().err
    assert "ckpt-000002" in said and "going back to ckpt-000001" in said
    shutil.rmtree(tmp_path / "ckpt-000001")
    with pytest.raises(DataError, match="ckpt-000002.*delete"):
        newest(tmp_path, True)
    assert not (tmp_path / "bomb_went_off").exists()


# ------------------------------------------------------------------------------------------------------ resume
def test_a_run_goes_on_with_settings_that_do_not_matter_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("here", 4)
    same = CONFIG | {"save_every": 1, "keep": 9, "micro": 1, "timeout": 5, "vlm": str(tmp_path / "tiny" / "vlm")}
    same |= {"states": "elsewhere", "states_gib": 3.0}
    assert resume("./here/", "stage1_projector", same)[1]["step"] == 4
    shutil.copytree("here", "moved")
    assert resume("moved", "stage1_projector", CONFIG | {"out": "moved"})[1]["step"] == 4
    longer = CONFIG | {"steps": 11}
    assert resume("here", "stage1_projector", longer, may_grow=("steps",))[1]["step"] == 4
    for other, flag in (({"lr": 0.2}, "--lr"), ({"steps": 9}, "--steps"), ({"vlm": "other"}, "--vlm")):
        with pytest.raises(DataError, match=flag):
            resume("here", "stage1_projector", CONFIG | other, may_grow=("steps",))
    with pytest.raises(DataError, match="--steps"):  # a stage whose schedule depends on it
        resume("here", "stage1_projector", longer)
    with pytest.raises(DataError, match="stage1_projector"):
        resume("here", "stage2_codebook", CONFIG)
    assert resume(tmp_path / "nothing", "stage1_projector", CONFIG) is None


def test_another_number_of_ranks_is_refused_with_the_cure(tmp_path, monkeypatch):
    write(tmp_path, 4)
    monkeypatch.setattr(checkpoint, "world_size", lambda: 2)
    with pytest.raises(DataError, match="with 1 ranks, not 2; torchrun --nproc-per-node 1"):
        resume(tmp_path, "stage1_projector", CONFIG)


def model():
    return nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 1)})


def test_names_and_shapes_are_checked():
    whole = model().state_dict()
    only_a = {k: v for k, v in whole.items() if k.startswith("a")}
    target = model()
    load_into(target, whole, "run")
    assert all(torch.equal(v, whole[k]) for k, v in target.state_dict().items())
    load_into(model(), only_a, "run", needed=["a"])
    with pytest.raises(DataError, match="lacks 2 tensors, 'b.weight'"):
        load_into(model(), only_a, "run", needed=["a", "b"])
    with pytest.raises(DataError, match="lacks 2 tensors"):
        load_into(model(), only_a, "run")
    half = only_a | {"b.bias": whole["b.bias"]}
    with pytest.raises(DataError, match="lacks 1 tensors, 'b.weight'"):  # half a part, though it is not needed
        load_into(model(), half, "run", needed=["a"])
    with pytest.raises(DataError, match="holds 'c'"):
        load_into(model(), whole | {"c": torch.ones(1)}, "run")
    with pytest.raises(DataError, match=r"'a.bias' has the shape \(3,\), not \(2,\)"):
        load_into(model(), whole | {"a.bias": torch.ones(3)}, "run")


# ------------------------------------------------------------------------------------------------------- guard
def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    with Guard(tmp_path), pytest.raises(DataError, match="another process is writing"), Guard(tmp_path):
        pass
    with Guard(tmp_path):
        pass


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"), Guard(tmp_path / "file"):
        pass


def test_a_signal_that_comes_while_a_checkpoint_is_written_waits_for_the_next_step(tmp_path):
    """Another rank may get it a moment later: only what all ranks have agreed on ends them."""
    with Guard(tmp_path) as guard:
        assert not guard.asked()
        os.kill(os.getpid(), signal.SIGINT)
        guard.leave_if_asked()
        assert guard.asked()
        with pytest.raises(SystemExit):
            guard.leave_if_asked()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_a_second_one_the_process(tmp_path, number, status):
    before = signal.getsignal(number)
    with Guard(tmp_path) as guard:
        assert not guard.asked()
        guard.leave_if_asked()
        os.kill(os.getpid(), number)
        assert guard.asked()
        with pytest.raises(SystemExit) as e:
            guard.leave_if_asked()
        assert e.value.code == status
        with pytest.raises(SystemExit) as e:
            os.kill(os.getpid(), number)
        assert e.value.code == status
    assert signal.getsignal(number) is before


# ------------------------------------------------------------------------------------------------------ the log
def test_each_step_stands_once_in_the_log(tmp_path):
    rows = [{"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 2, "a": 3}, {"step": 3, "a": 4}, {"step": 4, "a": 5}]
    torn = "".join(json.dumps(r) + "\n" for r in rows) + '{"step": 5, "a"'
    (tmp_path / "metrics.jsonl").write_text(torn)
    assert [r["a"] for r in common.read_metrics(tmp_path)] == [1, 3, 4, 5]
    log = common.Log(tmp_path, "test", 3, 5)
    log(4, a=6, b=float("nan"), c=float("inf"))
    log.close()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["a"]) for r in written] == [(1, 1), (2, 3), (3, 4), (4, 6)]
    assert "b" not in written[-1] and "c" not in written[-1]


def test_a_log_on_a_full_disk_is_one_clear_line(tmp_path):
    log = common.Log(tmp_path, "test", 0, 2)
    log.file = open("/dev/full", "a")
    with pytest.raises(DataError, match="metrics.jsonl: cannot be written .No space left on device.; make room"):
        log(1, a=1)
    with pytest.raises(OSError):  # what could not be written is still there to be
        log.file.close()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match="metrics.jsonl: cannot be written"):
        common.Log(tmp_path, "test", 0, 2)


# --------------------------------------------------------------------------------------------- not finite steps
def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    p = nn.Parameter(torch.ones(2))
    step_weights = common.Stepper([p], lr=0.1, clip_norm=1.0)

    def step(g):
        p.grad = torch.tensor([1.0, g])
        step_weights([{"id": "row 7"}])
        return p.detach().clone()

    first = step(1.0)
    assert (first < 1).all()
    moments = step_weights.optimizer.state[p]["exp_avg"].clone()
    for bad in (float("nan"), float("inf"), float("-inf"), float("nan")):
        assert torch.equal(step(bad), first)
    assert step_weights.skipped == 4 and torch.equal(step_weights.optimizer.state[p]["exp_avg"], moments)
    assert (step(1.0) < first).all() and step_weights.in_a_row == 0
    for _ in range(4):
        step(float("nan"))
    with pytest.raises(DataError, match="5 gradients in a row are not finite.*row 7"):
        step(float("nan"))
