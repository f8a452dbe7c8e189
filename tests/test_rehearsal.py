"""docs/gpu_node.md runs as it is written: its commands are read from the page and run one after the other.

    make rehearsal            # with the seconds of each command

What differs from the page stands in SUBSTITUTED and SMALL; what is not run, in NOT_RUN. A few records in each data
set's own form are there in place of what step 3 fetches, with JPEG and PNG pictures, and tests/judge_server.py as a
process in place of the server of step 4. A command that fails makes the rehearsal fail.
"""

import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT
from PIL import Image
from test_captions import img2dataset, n24news
from test_http_judge import KEY, Server
from test_mmrole import raw_mmrole
from test_pcogalign import pcogalign, records
from test_slurm import linked, scripts
from test_wikiweb2m import PAGES, tfrecord

import checkpoint

PAGE = ROOT / "docs" / "gpu_node.md"
MINUTES = 120  # a rehearsal that takes longer counts as hanging

# What stands on the page -> what is run.
SUBSTITUTED = {
    "VLM=Qwen/Qwen2.5-VL-3B-Instruct": "VLM=tiny/vlm",
    "VLM=Qwen/Qwen2.5-VL-7B-Instruct": "VLM=tiny/vlm",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--nproc-per-node 4": "--nproc-per-node 2",
    "--processes 8": "--processes 2",
    "--workers 4": "--workers 1",
    "--val 64": "--val 2",
    'FIT_SFT=""': 'FIT_SFT="--micro 1"',
    'FIT_LATENT=""': 'FIT_LATENT="--micro 4"',
    'FIT_TOKEN=""': 'FIT_TOKEN="--checkpointing yes --micro 4"',
    "JUDGE_URL=http://127.0.0.1:8000/v1": "JUDGE_URL={judge}",
}

# Flags that are put behind those of the page: few steps, short responses.
SMALL = {
    "stage1_projector.py": "--steps 2",
    "stage2_codebook.py": "--steps-a 2 --steps-b 2 --val 2",
    "stage3_bc.py": "--steps-clone 2",
    "stage4_latent_rl.py": "--max-new 6",
    "evaluate.py": "--max-new 6 --diversity-prompts 2",
}

# Step 12 says that steps follow once more. These do, and read the packed text.
AGAIN = "TEXT=data/packed", (6, 7)

NOT_RUN = [
    "python3 -m venv .venv",
    ". .venv/bin/activate",
    "pip install -r requirements.txt -r requirements-judge.txt",
    "python3 -m venv .venv-fetch",
    ".venv-fetch/bin/pip install img2dataset gdown",
    "hf download YanqiDai/MMRole_dataset --repo-type dataset --local-dir fetched/MMRole",
    "wget -P fetched http://images.cocodataset.org/zips/train2017.zip",
    "unzip -q fetched/train2017.zip -d fetched/MMRole/images/COCO",
    "hf download YongqiLi/PCogAlignBench --repo-type dataset --local-dir fetched/PCogAlignBench",
    "wget -P fetched https://storage.googleapis.com/conceptual_12m/cc12m.tsv",
    "(printf 'url\\tcaption\\n'; head -n 30000 fetched/cc12m.tsv) > fetched/cc12m-30000.tsv",
    ".venv-fetch/bin/img2dataset --url_list fetched/cc12m-30000.tsv --input_format tsv --url_col url --caption_col "
    "caption --output_format files --output_folder data/cc12m --image_size 420 --resize_mode keep_ratio",
    ".venv-fetch/bin/gdown 1OS1fXwZ1Vsj70lEQajccyssxQRYp5X9D -O fetched/N24News.zip",
    "unzip -q fetched/N24News.zip -d data/n24news",
    "wget -P fetched https://storage.googleapis.com/gresearch/wit/wikiweb2m/$WIKI",
    ".venv-fetch/bin/img2dataset --url_list fetched/wikiweb2m.tsv --input_format tsv --url_col url --caption_col "
    "caption --output_format files --output_folder data/wikiweb2m --image_size 420 --resize_mode keep_ratio",
    'hf download lmms-lab/LLaVA-NeXT-Data --repo-type dataset --include "llava_next_raw_format/*" --local-dir '
    "fetched/LLaVA",
    "mkdir -p data/llava",
    "for FILE in fetched/LLaVA/llava_next_raw_format/*.tar.gz; do tar -xzf $FILE -C data/llava; done",
    'hf download nvidia/HelpSteer3 --repo-type dataset --include "preference/*" --local-dir fetched/HelpSteer3',
    'hf download cerebras/SlimPajama-627B --repo-type dataset --include "train/chunk1/example_train_??.jsonl.zst" '
    "--local-dir fetched/SlimPajama",
    "zstd -d --rm fetched/SlimPajama/train/chunk1/*.zst",
    "CUDA_VISIBLE_DEVICES=4,5,6,7 vllm serve $JUDGE_MODEL --tensor-parallel-size 4 --port 8000",
]


# ------------------------------------------------------------------------------------------------ from page to script
def steps():
    """-> {number of a step of the page: its code}"""
    text = PAGE.read_text().partition("\n## The commands\n")[2].partition("\n## ")[0]
    parts = re.split(r"^\*\*(\d+)\. ", text, flags=re.M)[1:]
    return {int(n): "".join(re.findall(r"^    (.*\n)", part, re.M)) for n, part in zip(parts[::2], parts[1::2])}


def put(text, old, new):
    assert old in text, f"{PAGE.name} has no '{old}' any more; the rehearsal must follow"
    return text.replace(old, new)


def script(judge):
    """-> what bash runs: the page's code, but for NOT_RUN, SUBSTITUTED and SMALL."""
    code = {n: re.sub(r"\\\n\s*", "", part) for n, part in steps().items()}
    assert list(code) == list(range(1, 13))
    text = "".join(code.values()) + AGAIN[0] + "\n" + "".join(code[n] for n in AGAIN[1])
    for command in NOT_RUN:
        text = put("\n" + text, f"\n{command}\n", "\n")
    for old, new in SUBSTITUTED.items():
        text = put(text, old, new.format(judge=judge))
    return with_flags(text)


def with_flags(text):
    """SMALL behind the flags of each command, which is a line."""
    for name, flags in SMALL.items():
        text = re.sub(rf"^(.* {re.escape(name)} .*)$", rf"\1 {flags}", text, flags=re.M)
    return text


# ---------------------------------------------------------------------------------------------- what would be fetched
def picture(path, size, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def llava(fetched, data):
    """Twelve rows as LLaVA-NeXT has them, half of them with a JPEG, half with a PNG; one row is of text alone."""
    rows = []
    for k in range(12):
        name = f"coco/train2017/{k:012}.jpg" if k % 2 else f"docvqa/{k}.png"
        picture(data / "llava" / name, (84 + k, 56), (20 * k, 90, 200))
        said = [("human", f"<image>\nWhat is shown, {k}?"), ("gpt", f'A field that is called "{k}".')]
        said += [("human", "Is that all?"), ("gpt", "It is.")]
        turns = [{"from": who, "value": text} for who, text in said]
        rows.append({"id": f"{k:012}", "image": name, "conversations": turns, "data_source": "coco"})
    rows.append({"id": "text", "conversations": rows[0]["conversations"][2:], "data_source": "sharegpt"})
    folder = fetched / "LLaVA/llava_next_raw_format"
    folder.mkdir(parents=True)
    (folder / "llava_next_raw_format_processed.json").write_text(json.dumps(rows))


def helpsteer(fetched):
    rows = [
        {
            "domain": "general",
            "language": "english",
            "context": [{"role": "user", "content": f"How are you, {k}?"}],
            "response1": "first",
            "response2": "second",
            "overall_preference": k - 2,
        }
        for k in range(5)
    ]
    (fetched / "HelpSteer3/preference").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (fetched / "HelpSteer3/preference/train.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def slimpajama(fetched):
    folder = fetched / "SlimPajama/train/chunk1"
    folder.mkdir(parents=True)
    for shard in (10, 11):
        rows = [{"text": f"Document {k} of {shard}. " * (k + 1), "meta": {"set": "C4"}} for k in range(10)]
        (folder / f"example_train_{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def fetch(folder):
    """What step 3 would leave behind."""
    fetched, data = folder / "fetched", folder / "data"
    (fetched / "MMRole").mkdir(parents=True)
    raw_mmrole(fetched / "MMRole")
    for k in (1, 2):
        picture(fetched / f"MMRole/images/COCO/{k}.jpg", (84, 84), "blue")
    pcogalign(fetched / "PCogAlignBench", golden=False, below="version_v4")
    img2dataset(data / "cc12m")
    img2dataset(data / "wikiweb2m")
    n24news(data / "n24news")
    tfrecord(fetched / "wikiweb2m-train.tfrecord.gz-00000-of-00005", PAGES)
    llava(fetched, data)
    helpsteer(fetched)
    slimpajama(fetched)


# ------------------------------------------------------------------------------------------------------------ the run
def run(folder, text, **more):
    """Run a bash script in `folder` -> [(seconds, command)]. AssertionError with the last lines if a command fails."""
    began, found, (r, w) = time.time(), [], os.pipe()
    env = os.environ | {"BASH_XTRACEFD": str(w), "OMP_NUM_THREADS": "1"} | more
    env = {name: value for name, value in env.items() if name.lower() != "http_proxy"}  # the server is on this machine
    env["PATH"] = f"{folder}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    with open(folder / "log", "w") as log:
        shell = ["bash", "-eo", "pipefail", "-c", f"PS4='+ $EPOCHREALTIME '; set -x\n{text}"]
        settings = {"cwd": folder, "env": env, "stdout": log, "stderr": log, "start_new_session": True}
        process = subprocess.Popen(shell, pass_fds=[w], **settings)
    os.close(w)
    # torchrun passes SIGTERM on to its processes; with SIGKILL they would stay behind
    alarm = threading.Timer(60 * MINUTES, os.killpg, (process.pid, signal.SIGTERM))
    alarm.start()
    try:
        with open(r) as trace:
            for line in trace:
                if m := re.match(r"\+ ([\d.]+) (.*)", line):  # of the shell itself, not of what stands in $( )
                    finish(found, float(m[1]))
                    found.append([float(m[1]), m[2]])
        finish(found, time.time())
    finally:
        alarm.cancel()
        if sys.exc_info()[0]:  # Ctrl-C
            os.killpg(process.pid, signal.SIGTERM)
    print(f"{time.time() - began:8.1f} s  in all, load {os.getloadavg()[0]:.1f}", flush=True)
    tail = (folder / "log").read_text(errors="replace")[-4000:]
    assert process.wait() == 0, f"failed: {found[-1][1]}\n{tail}"
    return found


def finish(found, now):
    """The last command has ended: its begin becomes its seconds."""
    if found:
        found[-1][0] = now - found[-1][0]
        if found[-1][0] > 0.5:
            print("{:8.1f} s  {}".format(*found[-1]), flush=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = linked(tmp_path_factory.mktemp("rehearsal"))
    fetch(out)
    return out


@pytest.fixture(scope="module")
def server(folder):
    one = Server(folder)
    yield one.begin()
    one.end()


def test_what_is_not_run_and_what_is_changed_stands_on_the_page():
    """Quick: without the run. Nothing that downloads is left."""
    text = script("http://judge")
    left = [
        line for line in text.splitlines() if re.match(r"(\S*/)?(hf|wget|pip|img2dataset|gdown|vllm|unzip|zstd) ", line)
    ]
    assert left == [] and "Qwen/Qwen2.5-VL-3B" not in text
    for name, flags in SMALL.items():
        lines = [line for line in text.splitlines() if f" {name} " in line]
        assert lines and all(line.endswith(flags) for line in lines), name


@pytest.mark.all
def test_the_page_runs_as_it_is_written(folder, server):
    done = run(folder, script(server.url), OPENAI_API_KEY=KEY)
    ran = [command for _, command in done]
    assert sum("stage4_latent_rl.py" in c for c in ran) == 16 and sum("evaluate.py" in c for c in ran) == 8
    for task, tests in (("mmrole", ["ID", "OOD"]), ("pcogalign", ["LS1", "LS2"])):
        check_table((folder / f"runs/3b/{task}/table.md").read_text().splitlines(), tests)
        for run_of in (folder / "runs/3b" / task).glob("*_*"):
            if not run_of.name.startswith("eval"):
                state = checkpoint.read_state(run_of)
                assert state["finished"] and state["ranks"] == 2, run_of
    check_data(folder)
    assert checkpoint.read_state(folder / "runs/7b/stage2")["config"]["text"] == "data/packed"
    pictures = {tuple(line[1:]) for line in server.lines() if line[0] == "picture"}
    assert len(pictures) >= 3  # MMRole's and PCogAlignBench's, as JPEG and as PNG


@pytest.mark.all
def test_the_slurm_file_finds_all_stages_finished(folder):
    """After the page: what examples/node.slurm asks of a stage is what the page asks, or the stage would refuse it."""
    if not (folder / "runs/3b/pcogalign/sft").exists():
        pytest.skip("the page has not run")
    scripts(folder, srun='exec "$@"', scontrol="echo localhost")
    before = {p: p.read_bytes() for p in (folder / "runs/3b").rglob("metrics.jsonl")}
    text = re.sub(r"\\\n\s*", "", (ROOT / "examples/node.slurm").read_text())
    text = with_flags(put(text, "--nproc-per-node 8", SUBSTITUTED["--nproc-per-node 8"]))
    slurm = {"SLURM_NNODES": "1", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost"}
    done = run(folder, text, VLM="tiny/vlm", FIT_SFT="--micro 1", **slurm)
    assert sum(command.startswith("stage ") for _, command in done) == 7
    assert {p: p.read_bytes() for p in (folder / "runs/3b").rglob("metrics.jsonl")} == before


def check_table(lines, tests):
    names = ["Prompt", "SFT", "BC latent"]
    for label in ("GRPO", "DR_GRPO", "DAPO", "BNPO"):
        names += [f"{label} token", f"{label} latent"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:3] == ["row", *tests] and [row[0] for row in cells[2:]] == names
    ratios = [float(cell.split(" ")[0]) for row in cells[2:] for cell in row[1:4]]
    assert all(math.isfinite(x) and x > 0 for x in ratios)


def check_data(folder):
    """How many records there are, by hand, and where their pictures lie."""
    paired, text = (records(folder / f"data/{name}.jsonl") for name in ("paired", "text"))
    assert len(paired) == 5 + 3 + 5 + 12  # of the 8 captions of img2dataset 3 cannot be read, of N24News's 5 two
    assert (folder / "fetched/wikiweb2m.tsv").read_text().count("\n") == 1 + 3
    assert all((folder / "data" / row["image"]).is_file() for row in paired)
    assert {row["image"].split("/")[0] for row in paired} == {"cc12m", "n24news", "wikiweb2m", "llava"}
    assert len(text) == 5 + 20
    assert [row["messages"][-1]["content"] for row in text[:5]] == ["first"] * 3 + ["second"] * 2
    sizes = {p.stem: len(records(p)) for p in (folder / "data").glob("*/task*.jsonl")}
    assert sizes["task_b_demos"] == 10 and sizes["task_b_prompts"] == 4 and sizes["task_b_val"] == 2
    assert sizes["task_demos"] == 20 and sizes["task_prompts"] == 12 and sizes["task_val"] == 4
    assert sizes["task_id"] == sizes["task_ood"] == 4 and sizes["task_b_ls1"] == sizes["task_b_ls2"] == 3
