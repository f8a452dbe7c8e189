"""make demo, real and smol: both sides end together, whatever ends one of them. The stages are stood in for by a script
that only notes what happens to it."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

# As a stage does, it takes signals of its own accord: a shell's background jobs are started with Ctrl-C ignored.
STAND_IN = """#!{python} -S
import os, signal, sys, time
if sys.argv[1] == "-c":
    print("{folder}/a judge")
    sys.exit()
name = f"{{sys.argv[1].split('_')[0]}} {{'token' if 'token' in sys.argv else 'latent'}}"
def note(what):
    os.write(log, f"{{name}}: {{what}}\\n".encode())
def leave(number, _):
    note(signal.Signals(number).name)
    time.sleep(0.2)
    note("left")
    sys.exit(128 + number)
log = os.open("{folder}/log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, leave)
end = time.monotonic() + 90
note(f"{{os.getpid()}} " + "|".join(sys.argv[2:]))
while not os.path.exists("{folder}/go on") and time.monotonic() < end:
    if os.path.exists("{folder}/" + name + " fails"):
        sys.exit(3)
    time.sleep(0.01)
"""


DONE = (".venv/ready", ".venv/ready-real", ".venv/ready-smol", "runs/world/world.json")


class Make:
    """`make TARGET` in a process group of its own, as from a terminal."""

    def __init__(self, folder, target, *more):
        self.folder, python = folder, folder / "python"
        python.write_text(STAND_IN.format(python=sys.executable, folder=folder))
        python.chmod(0o755)
        done = [x for name in DONE for x in ("-o", name)]
        command = ["make", "-s", *done, target, f"PY={python}", f"OUT={folder}", *more]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=pipe, stderr=pipe)

    def log(self):
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []

    def until(self, *starts):
        """Wait for lines of the log that start so."""
        end = time.monotonic() + 60
        while not all(any(line.startswith(s) for line in self.log()) for s in starts):
            assert time.monotonic() < end and self.process.poll() is None, self.log()
            time.sleep(0.01)

    def ended(self):
        """-> make's exit status, after the last stand-in has ended: none of them is left."""
        self.process.communicate(timeout=60)
        for pid in {int(x) for line in self.log() for x in line.split(": ")[1].split()[:1] if x.isdigit()}:
            assert not os.path.exists(f"/proc/{pid}"), self.log()
        return self.process.returncode


BOTH = ("stage1 latent", "stage3 token")


@pytest.fixture
def make(tmp_path):
    made = []

    def start(*args):
        made.append(Make(tmp_path, *args))
        return made[-1]

    yield start
    for m in made:
        if m.process.poll() is None:
            os.killpg(m.process.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_both_sides_and_both_are_waited_for(make, number):
    """Ctrl-C goes to all processes of a terminal, the end of a job's time to all of the job."""
    m = make("demo")
    m.until(*BOTH)
    os.killpg(m.process.pid, number)
    assert m.ended() != 0
    assert {f"{side}: {what}" for side in BOTH for what in (number.name, "left")} <= set(m.log())
    assert not any("evaluate" in line for line in m.log())


def test_when_a_stage_fails_the_other_side_is_told_and_waited_for(make, tmp_path):
    m = make("demo")
    m.until(*BOTH)
    (tmp_path / "stage1 latent fails").touch()
    assert m.ended() != 0
    assert {"stage3 token: SIGTERM", "stage3 token: left"} <= set(m.log())


def test_when_the_baseline_fails_its_last_words_are_shown(make, tmp_path):
    m = make("demo")
    m.until(*BOTH)
    (tmp_path / "token.log").write_text("error: why\n")
    (tmp_path / "stage3 token fails").touch()
    time.sleep(0.1)
    (tmp_path / "go on").touch()
    out, _ = m.process.communicate(timeout=60)
    assert m.process.returncode != 0 and b"error: why" in out
    assert not any("evaluate" in line for line in m.log())


@pytest.mark.parametrize("target", ["real", "smol", "tables"])
def test_a_folder_with_a_space_stays_one_word(make, tmp_path, target):
    (tmp_path / "go on").touch()
    (tmp_path / "vlm").mkdir()
    m = make(target, "DATA=some where")
    m.process.communicate(timeout=60)
    judges = [line for line in m.log() if "a judge/model" in line]
    assert judges and all(f"|{tmp_path}/a judge/model" in line for line in judges)


def calls(make):
    """-> {(script or module, side): its flags} of a target that went through."""
    found = {}
    for line in make.log():
        side, _, what = line.partition(": ")
        if what[:1].isdigit():
            words = what.split(" ", 1)[1].split("|")
            found[side] = dict(zip(words[::2], words[1::2]))
    return found


def test_smol_gives_both_sides_the_same_to_do(make, tmp_path):
    """One VLM everywhere; RL differs by side, start and learning rate, and by how much memory it may take."""
    (tmp_path / "go on").touch()
    (tmp_path / "vlm").mkdir()
    m = make("smol", "DATA=x", "DTYPE=bfloat16")
    assert m.ended() == 0
    said = calls(m)
    stages = {f"stage{k} latent" for k in (1, 2, 3, 4)} | {"stage3 token", "stage4 token"}
    assert stages <= set(said)
    assert {said[s]["--vlm"] for s in stages} == {f"{tmp_path}/vlm"}
    assert {said[s]["--dtype"] for s in stages} == {"bfloat16"}
    latent, token = said["stage4 latent"], said["stage4 token"]
    assert latent["--val"].endswith("task_val.jsonl")
    differ = {k for k in latent.keys() | token.keys() if latent.get(k) != token.get(k)}
    assert differ <= {"--actions", "--init", "--out", "--lr", "--micro"}
    assert {said[s]["--max-length"] for s in stages - {"stage4 latent", "stage4 token"}} == {"256"}


def test_smol_s_report_is_a_command_of_its_own(make, tmp_path):
    """It runs nothing else anew, and the run does not wait for it."""
    (tmp_path / "go on").touch()
    (tmp_path / "vlm").mkdir()
    m = make("smol", "DATA=x", "DTYPE=bfloat16")
    assert m.ended() == 0 and not any("studies.smol" in line for line in m.log())
    before = len(m.log())
    m = make("smol-report", "DTYPE=bfloat16")
    assert m.ended() == 0
    (report,) = m.log()[before:]
    assert "studies.smol" in report and "smol.judge:judge" in report and "bfloat16" in report


def test_smol_needs_its_data(make, tmp_path):
    m = make("smol")
    said, _ = m.process.communicate(timeout=60)
    assert m.process.returncode != 0 and b"make smol DATA=<folder>" in said
    assert not any("convert" in line or "stage" in line for line in m.log())


def test_smol_evaluates_again_only_what_is_newer(make, tmp_path):
    """The stand-in writes no checkpoints: they are put there, a minute older or newer than the results."""
    (tmp_path / "go on").touch()
    (tmp_path / "vlm").mkdir()
    run, results = tmp_path / "rl_latent" / "ckpt-000002", tmp_path / "results.json"
    run.mkdir(parents=True)
    counts = []
    for age in (60, -60):
        results.touch()
        os.utime(run, (results.stat().st_mtime - age,) * 2)
        m = make("smol", "DATA=x", "DTYPE=bfloat16")
        assert m.ended() == 0
        counts.append(sum(line.startswith("evaluate") for line in m.log()))
    assert counts == [0, 1]


def test_a_checkpoint_that_was_not_assembled_is_not_used(make, tmp_path):
    """The stand-in ends as if all were well, but leaves no folder: no stage begins."""
    (tmp_path / "go on").touch()
    m = make("smol", "DATA=x", "DTYPE=bfloat16")
    assert m.ended() != 0
    assert any("smol.make_vlm" in line and f"{tmp_path}/vlm.new" in line for line in m.log())
    assert not any(line.startswith("stage") for line in m.log())
