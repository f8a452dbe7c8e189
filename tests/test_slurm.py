"""examples/node.slurm: its shell runs, with scripts in place of Slurm's commands that note what they are asked."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, TINY

import checkpoint
import common
import stage1_projector
import stage2_codebook
import stage3_bc

SCRIPTS = {"stage1_projector.py": stage1_projector, "stage2_codebook.py": stage2_codebook, "stage3_bc.py": stage3_bc}
SRUN = """echo "srun $*" >> log
trap 'echo "told" >> log; sleep 0.3; echo "saved" >> log; exit 143' TERM
case "$*" in
    *"$FAILS"*) exit 3 ;;
    *"$WAITS"*) echo "waits" >> log; for k in $(seq 600); do sleep 0.05; done ;;
esac
"""
SCONTROL = """[ "$1" != show ] || { echo node1; echo node2; exit; }
echo "scontrol $*" >> log
"""


def scripts(folder, **texts):
    """Write Slurm's commands, and an environment that is active already."""
    for name, text in (texts | {".venv/bin/activate": ""}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)


def linked(folder):
    """A folder with the repository's files, as links, in which data and runs are its own."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in {name.split("/")[0] for name in names if name}:
        (folder / name).symlink_to(ROOT / name)
    return folder


class Job:
    def __init__(self, folder, nodes=1, fails="nothing", waits="nothing"):
        self.log = folder / "log"
        scripts(folder, srun=SRUN, scontrol=SCONTROL)
        for task, name in (("mmrole", "task"), ("pcogalign", "task_b")):
            (folder / "data" / task).mkdir(parents=True)
            (folder / f"data/{task}/{name}_demos.jsonl").write_text("{}\n" * 160)
        slurm = {"SLURM_NNODES": str(nodes), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
        env = os.environ | slurm | {"FAILS": fails, "WAITS": waits, "PATH": f"{folder}:{os.environ['PATH']}"}
        script = ["bash", ROOT / "examples/node.slurm"]
        self.process = subprocess.Popen(script, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)

    def lines(self):
        return self.log.read_text().splitlines() if self.log.exists() else []

    def until(self, line):
        end = time.monotonic() + 60
        while line not in self.lines():
            assert time.monotonic() < end and self.process.poll() is None, self.lines()
            time.sleep(0.01)

    def ended(self):
        """-> (exit status, [the words of each stage's command], all other lines)"""
        _, error = self.process.communicate(timeout=60)
        assert not error
        stages = [line.split() for line in self.lines() if line.startswith("srun")]
        return self.process.returncode, stages, [line for line in self.lines() if not line.startswith("srun")]


def flags(words):
    """The words of a stage's command -> (torchrun's part, the stage's Config)."""
    (at,) = [k for k, word in enumerate(words) if word in SCRIPTS]
    return words[:at], common.parse_config(SCRIPTS[words[at]].Config, "", words[at + 1 :])


@pytest.mark.parametrize("nodes, batch", [(1, 2), (2, 1)])
def test_all_stages_run_in_order_with_16_dialogues_a_step(tmp_path, nodes, batch):
    status, stages, others = Job(tmp_path, nodes).ended()
    assert status == 0 and others == []
    commands = [flags(words) for words in stages]
    start = f"srun torchrun --nnodes {nodes} --nproc-per-node 8 --shutdown-timeout 300 --rdzv-id 7 "
    start += "--rdzv-backend c10d --rdzv-endpoint node1:20007"
    assert all(" ".join(words) == start for words, _ in commands)
    outs = ["stage1", "stage2", "clone", "mmrole/adapted", "mmrole/sft", "pcogalign/adapted", "pcogalign/sft"]
    assert [cfg.out for _, cfg in commands] == [f"runs/3b/{out}" for out in outs]
    assert {cfg.batch for _, cfg in commands[:3]} == {cfg.batch_adapt for _, cfg in commands[3:]} == {batch}
    assert {cfg.workers for _, cfg in commands} == {4}
    assert {cfg.steps_adapt for _, cfg in commands[3:]} == {30}  # three times 160 demonstrations
    assert commands[5][1].demos == "data/pcogalign/task_b_demos.jsonl"


def test_when_its_time_is_up_the_stage_saves_and_the_job_is_queued_again(tmp_path):
    job = Job(tmp_path, waits="stage2_codebook")
    job.until("waits")
    job.process.send_signal(signal.SIGUSR1)
    status, stages, others = job.ended()
    assert status == 0 and len(stages) == 2
    assert others == ["waits", "told", "saved", "scontrol requeue 7"]


def test_a_stage_that_fails_ends_the_job(tmp_path):
    status, stages, others = Job(tmp_path, fails="stage2_codebook").ended()
    assert status == 3 and len(stages) == 2 and others == []


@pytest.mark.all
def test_two_nodes_find_each_other_by_the_rendezvous(world, tmp_path):
    """The job's first stage on two nodes, which are two torchruns of one process each on this machine."""
    folder = linked(tmp_path)
    scripts(folder, srun='"$@" & "$@"; STATUS=$?; wait $! && exit $STATUS', scontrol="echo localhost")
    (folder / "data").symlink_to(world)
    text = (ROOT / "examples/node.slurm").read_text().partition("\nstage stage2")[0]
    text = text.replace("--nproc-per-node 8", "--nproc-per-node 1").replace(
        "--batch $BATCH", "--batch $BATCH --steps 2"
    )
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "x", "VLM": TINY}
    path = f"{folder}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    env = os.environ | slurm | {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", text], cwd=folder, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    state = checkpoint.read_state(folder / "runs/3b/stage1")
    assert state["finished"] and state["ranks"] == 2 and state["config"]["batch"] == 1
