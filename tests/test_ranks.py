"""ranks.py: one rank that fails ends all of them, its own error is what one reads, and the same command goes on."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, launch, same_weights

import checkpoint
import common
import ranks
import stage1_projector
from data import DataError


# ------------------------------------------------------------------------------------------------ one process
def test_words_about_another_rank():
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:8908."
    late = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv"
    assert "has ended" in ranks.lost(RuntimeError(gloo)) and "--timeout" in ranks.lost(RuntimeError(late))
    assert "has ended" in ranks.lost(torch.distributed.DistBackendError("ncclRemoteError: A call failed"))
    # a rank's own errors: nothing is hidden
    for e in (RuntimeError("shapes do not match"), ConnectionResetError("Connection reset by peer"), KeyError("gloo")):
        assert ranks.lost(e) is None
    assert ranks.lost(torch.distributed.DistBackendError("NCCL error: unhandled cuda error")) is None


def test_on_one_process_a_bug_keeps_its_traceback_and_bad_input_is_one_line(capsys):
    def bug():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        ranks.run(bug)

    def bad():
        raise DataError("rows.jsonl, row 7: bad")

    with pytest.raises(SystemExit) as e:
        ranks.run(bad)
    assert e.value.code == 2 and capsys.readouterr().err == "error: rows.jsonl, row 7: bad\n"


def test_who_leaves_when(monkeypatch, capsys):
    """torchrun calls the rank that leaves first the root cause: one that has lost another leaves after it. Rank 0
    leaves first if the input is bad for all."""

    def fail(e):
        raise e

    def left(rank, e):
        """-> what this rank does after its main has raised e."""
        events = []
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(ranks.time, "sleep", lambda seconds: seconds and events.append(f"wait {seconds}"))
        monkeypatch.setattr(ranks.os, "_exit", lambda status: fail(SystemExit(status)))
        with pytest.raises(SystemExit) as end:
            ranks.run(lambda: fail(e))
        return [*events, end.value.code]

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert left(0, DataError("bad")) == [2] and left(1, DataError("bad")) == ["wait 2", 2]
    assert left(1, KeyError("a bug")) == [1]
    assert left(0, RuntimeError("gloo/transport/tcp/pair.cc:553] Connection closed by peer")) == ["wait 5", 1]
    assert "error: rank 0: bad\n" in capsys.readouterr().err


def test_gather_of_one_process():
    assert ranks.gather([1, "a"]) == [[1, "a"]]


def test_the_timeout_is_in_minutes(monkeypatch):
    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: given.update(t=timeout))
    common.setup(stage1_projector.Config(timeout=7))
    assert given["t"].total_seconds() == 7 * 60


# ------------------------------------------------------------------------------------------------ faults
@pytest.fixture(scope="module")
def eight_steps(flags, runs):
    """{script: flags without --out}: eight steps, a checkpoint after every second."""
    few = ["--steps", "8", "--save-every", "2"]
    return {
        "stage1_projector": [*flags.paired, *few, "--batch", "2"],
        "stage4_latent_rl": [*flags.rl, *few, "--init", f"{runs}/loud", "--batch", "1", "--max-new", "8"],
    }


def work(folder, runs, **more):
    (folder / "work.json").write_text(json.dumps({"runs": runs} | more))
    return ["tests/faulty.py", f"{folder}/work.json"]


def root_cause(said):
    """The rank that torchrun's report calls the root cause."""
    return int(re.search(r"Root Cause.*?rank +: (\d+)", said, re.DOTALL)[1])


def assert_one_rank_failed(done, rank, own, ranks=2):
    """The rank's own words once, a line of each other rank, and no traceback of theirs."""
    said = done.stderr
    assert done.returncode != 0 and root_cause(said) == rank, said
    assert not own or said.splitlines().count(own) == 1, said
    told = re.findall(r"^rank (\d+): stops, because another rank has ended; .+$", said, re.MULTILINE)
    assert sorted(map(int, told)) == [r for r in range(ranks) if r != rank], said
    assert "by peer" not in said and "[rank" not in said
    assert said.count("Traceback") == 1 + ("Traceback" in own)  # one is torchrun's own


OWN = {
    "kill": "",
    "bad_data": "error: rank {}: rows.jsonl, row 7: bad",
    "bug": "rank {}: Traceback (most recent call last):",
}
FAULTS = [
    ("stage1_projector", 1, "common.total", 9, "kill"),  # in the middle of a step
    ("stage1_projector", 0, "common.total", 9, "kill"),
    ("stage1_projector", 1, "torch.autograd.backward", 3, "bug"),
    ("stage1_projector", 0, "checkpoint.write", 2, "bad_data"),  # while rank 0 saves
    ("stage4_latent_rl", 1, "checkpoint.save", 2, "bug"),
    ("stage4_latent_rl", 0, "common.open_records", 1, "bug"),  # before the first collective operation
    ("stage4_latent_rl", 1, "common.open_records", 1, "kill"),
    ("stage4_latent_rl", 1, "torch.autograd.backward", 3, "kill"),
]


def fail(eight_steps, folder, script, rank, function, call, what, ranks=2):
    run = [script, [*eight_steps[script], "--out", f"{folder}/run"]]
    done = launch(work(folder, [run], fault=[rank, function, call, what]), ranks)
    assert_one_rank_failed(done, rank, OWN[what].format(rank), ranks)
    assert what != "bug" or "KeyError: 'a bug'" in done.stderr
    if function == "common.open_records":
        assert checkpoint.latest(folder / "run") is None
        return
    written = 4 if function == "checkpoint.save" else 2  # rank 0 has written the second one, too
    assert checkpoint.newest(folder / "run", True)[1]["step"] == written


def test_a_rank_that_fails_ends_the_other_and_is_the_one_that_is_heard(eight_steps, tmp_path):
    fail(eight_steps, tmp_path, "stage1_projector", 1, "common.total", 9, "bad_data")


@pytest.mark.all
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: "-".join(map(str, f)))
def test_wherever_and_whichever_rank_fails(eight_steps, tmp_path, fault, ranks):
    fail(eight_steps, tmp_path, *fault, ranks=ranks)


def test_a_run_whose_rank_was_killed_goes_on_with_the_same_command(eight_steps, tmp_path):
    """Rank 1 is killed while rank 0 writes the second checkpoint, which is whole all the same."""
    script = "stage4_latent_rl"
    cut, whole = ([script, [*eight_steps[script], "--out", f"{tmp_path}/{name}"]] for name in ("cut", "whole"))
    done = launch(work(tmp_path, [cut], fault=[1, "checkpoint.save", 2, "kill"]))
    assert_one_rank_failed(done, 1, "")
    assert checkpoint.newest(tmp_path / "cut", True)[1]["step"] == 4
    done = launch(work(tmp_path, [cut, whole]))
    assert done.returncode == 0, done.stderr[-2000:]
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    assert [r["step"] for r in common.read_metrics(tmp_path / "cut")] == list(range(1, 9))


@pytest.mark.all
def test_what_is_wrong_for_all_ranks_is_said_once(eight_steps, tmp_path):
    wrong = ["--paired", f"{tmp_path}/none.jsonl", "--out", f"{tmp_path}/run"]
    done = launch(["stage1_projector.py", *eight_steps["stage1_projector"], *wrong])
    told = [line for line in done.stderr.splitlines() if "none.jsonl" in line]
    assert done.returncode != 0 and len(told) == 1 and told[0].startswith("error: rank 0: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.all
def test_a_rank_that_hangs_ends_the_run_after_the_timeout(eight_steps, tmp_path):
    run = ["stage1_projector", [*eight_steps["stage1_projector"], "--out", f"{tmp_path}/run"]]
    done = launch(work(tmp_path, [run], fault=[1, "common.total", 9, "hang"], seconds=5))
    assert done.returncode != 0 and "Timed out" not in done.stderr
    assert "rank 0: stops, because another rank has not answered for --timeout minutes" in done.stderr
    assert checkpoint.newest(tmp_path / "run", True)[1]["step"] == 2


STOPPED = """
import os, sys
import ranks

class Group:
    def __del__(self):
        os.write(1, b"destroyed")

def main():
    group = Group()
    sys.exit(130)

ranks.run(main)
"""


@pytest.mark.parametrize("count, said", [("2", ""), ("1", "destroyed")])
def test_a_rank_that_is_stopped_waits_for_no_destructor(count, said):
    """That of a process group can wait for ever for a rank that has left."""
    env = os.environ | {"WORLD_SIZE": count, "RANK": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", STOPPED], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (130, said)
