"""--log: each row of metrics.jsonl reaches TensorBoard or Weights & Biases once, also after a resume.

The tests with the packages themselves are left out where those are not installed."""

import json
import struct
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import cut_off

import common
import stage1_projector
from data import DataError


def config(out, to):
    return stage1_projector.Config(out=str(out), log=to)


def write(out, to, start, *rows):
    """What a run that goes on from step `start` logs; it is then killed, or ends."""
    log = common.Log(out, "a run", start, 9, config(out, to))
    for step, loss in rows:
        log(step, loss=loss)
    return log


# ------------------------------------------------------------------------------------------------- without a package
@pytest.mark.parametrize("to, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_package_that_is_not_there_is_named_in_one_line(flags, tmp_path, monkeypatch, to, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=f"^--log {to}: needs the package {to}: pip install {to} ") as e:
        stage1_projector.main([*flags.paired, "--log", to, "--steps", "1", "--out", f"{tmp_path}/x"])
    assert "\n" not in str(e.value) and list(tmp_path.iterdir()) == []


def test_without_the_flag_there_is_the_file_alone(tmp_path):
    write(tmp_path, "none", 0, (1, 0.5)).close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    with pytest.raises(SystemExit):
        common.parse_config(stage1_projector.Config, "", ["--log", "paper"])


def test_a_list_is_in_the_file_alone(tmp_path, board):
    for start, step in ((0, 1), (1, 2)):  # the second run hands over the first one's row
        log = common.Log(tmp_path, "a run", start, 9, config(tmp_path, "tensorboard"))
        log(step, loss=0.5, use=[step, 0])
        log.close()
    assert [row["use"] for row in common.read_metrics(tmp_path)] == [[1, 0], [2, 0]]
    assert [{point[0] for point in points if point[0] in ("use", "loss")} for _, _, points in board] == [{"loss"}] * 2


@pytest.fixture
def board(monkeypatch):
    """A stand-in for TensorBoard's writer: [(folder, purge_step, [(name, value, step)])] of each that was made."""
    made = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.points = []
            made.append((folder, purge_step, self.points))

        def add_scalar(self, *point):
            self.points.append(point)

        def flush(self):
            self.points.append("flushed")

        def close(self):
            self.points.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    return made


def losses(points):
    return [(step, value) for name, value, step in (p for p in points if len(p) == 3) if name == "loss"]


def test_tensorboard_gets_the_rows_of_the_file(tmp_path, board):
    """Those from before a resume once more: what it had of the folder is purged."""
    write(tmp_path, "tensorboard", 0, (1, 0.5), (2, 0.25), (3, 0.125))
    write(tmp_path, "tensorboard", 2, (3, 0.75)).close()
    (folder, purge, first), (again, purge_again, points) = board
    assert folder == again == tmp_path / "tensorboard" and purge == purge_again == 0
    assert losses(first) == [(1, 0.5), (2, 0.25), (3, 0.125)] and first[-1] == "flushed"
    assert losses(points) == [(1, 0.5), (2, 0.25), (3, 0.75)] and points[-1] == "closed"
    assert {p[0] for p in points if len(p) == 3} == {"loss", "seconds"}


def test_only_rank_0_writes(tmp_path, board, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    write(tmp_path, "tensorboard", 0, (1, 0.5)).close()
    assert board == [] and list(tmp_path.iterdir()) == []


def test_the_flag_may_come_with_a_resume(flags, tmp_path, board, monkeypatch):
    argv = [*flags.paired, "--steps", "2", "--batch", "2", "--save-every", "1", "--out", f"{tmp_path}/x"]
    cut_off(monkeypatch, stage1_projector.main, argv, 1)
    stage1_projector.main([*argv, "--log", "tensorboard"])
    rows = common.read_metrics(tmp_path / "x")
    (_, _, points), wanted = board[0], [(k, v, row["step"]) for row in rows for k, v in row.items() if k != "step"]
    assert len(board) == 1 and [p for p in points if len(p) == 3] == wanted and len(rows) == 2


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for wandb, whose server keeps the steps of each run: {id: [(step, loss)]}. As the real one, it takes
    rising steps alone."""
    kept, asked = {}, []

    class Run:
        def __init__(self, id):
            self.points = kept.setdefault(id, [])

        @property
        def step(self):
            return self.points[-1][0] + 1 if self.points else 0

        def log(self, row, step, commit):
            assert step >= self.step and commit and "step" not in row
            self.points.append((step, row["loss"]))

        def finish(self):
            self.points.append("finished")

    def init(id, resume, **settings):
        asked.append((resume, settings))
        return Run(id)

    stand_in = SimpleNamespace(init=init, Settings=lambda console: console, kept=kept, asked=asked)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def test_wandb_goes_on_with_its_run_and_takes_no_step_twice(tmp_path, wandb):
    write(tmp_path, "wandb", 0, (1, 0.5), (2, 0.25), (3, 0.125))
    write(tmp_path, "wandb", 2, (3, 0.125), (4, 0.75))
    ((name, points),) = wandb.kept.items()
    assert points == [(1, 0.5), (2, 0.25), (3, 0.125), (4, 0.75)] and name == (tmp_path / "wandb.id").read_text()
    resume, settings = wandb.asked[1]
    assert resume == "allow" and settings["dir"] == str(tmp_path) and settings["config"]["lr"] == 1e-3
    points.pop()  # a row that a kill has kept from its server
    write(tmp_path, "wandb", 4, (5, 0.5)).close()
    assert points == [(1, 0.5), (2, 0.25), (3, 0.125), (4, 0.75), (5, 0.5), "finished"]
    write(tmp_path, "wandb", 0, (1, 0.25))  # the run begins anew
    assert len(wandb.kept) == 2 and wandb.kept[(tmp_path / "wandb.id").read_text()] == [(1, 0.25)]


def test_what_wandb_refuses_is_one_line(tmp_path, wandb, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty)\nsee the docs")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(DataError, match="--log wandb: cannot begin .api_key not configured .no-tty..; see `wandb log"):
        write(tmp_path, "wandb", 0)


# ------------------------------------------------------------------------------------------------ with the packages
def test_tensorboard_itself_shows_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, "tensorboard", 0, (1, 0.5), (2, 0.25), (3, 0.125), (4, 1.0))  # killed
    write(tmp_path, "tensorboard", 2, (3, 0.75)).close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 0.5), (2, 0.25), (3, 0.75)]
    assert len(found.Scalars("seconds")) == 3


def records_of(file):
    """The records in a file of wandb's: a log of LevelDB's form, in blocks of 32 KiB, behind 7 bytes."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


def test_wandb_itself_writes_the_rows(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    def history(file):
        for data in records_of(file):
            record = Record.FromString(data)
            if record.HasField("history"):
                yield {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}

    monkeypatch.setenv("WANDB_MODE", "offline")
    for start, rows in ((0, [(1, 0.5), (2, 0.25), (3, 0.125)]), (2, [(3, 0.125), (4, 0.75)])):
        write(tmp_path, "wandb", start, *rows).close()
        time.sleep(1)  # its folders are named by the second
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    wanted, end = [[(1, 0.5), (2, 0.25), (3, 0.125)], [(1, 0.5), (2, 0.25), (3, 0.125), (4, 0.75)]], time.time() + 60
    while (found := [[(row["_step"], row["loss"]) for row in history(f)] for f in files]) != wanted:
        assert time.time() < end, found  # another process writes them
        time.sleep(0.1)
    assert all((tmp_path / "wandb.id").read_text() in f.name for f in files)
