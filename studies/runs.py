"""The runs behind the tables: which there are, what their folders are called, and the queue that makes them.

A run is one call of a script, into a folder of its own. Seed s has below --out

    s/stage1                        the projector
    s/VARIANT/stage2, clone         a codebook and its cloned policy; VARIANT: `full`, an ablation, a size, an amount
    s/VARIANT/adapt_TASK            the clone, adapted to task a or b
    s/sft_TASK                      the baseline's counterpart: the vision-language model, fine-tuned on the same
    s/start_TASK                    evaluation of what RL starts from
    s/VARIANT/ALGORITHM_TASK        RL with latent actions
    s/token/ALGORITHM_TASK          RL with tokens
    ..._RATE                        one of these two with a lower learning rate
    ..._eval                        the evaluation of an RL run
"""

import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import checkpoint
import common
import stage4_latent_rl
from data import DataError

RATE = "1e-3"  # learning rate of RL on both sides, chosen on the validation sets with seed 7
LOWER_RATES = ("1e-4", "3e-4")
SIDES = ("token", "latent")

# Variants of the codebook: label -> flags of stage 2. A full run has 128 codes and reads 3,600 rows of text.
ABLATIONS = {
    "without the cycle loss": {"without": "cycle"},
    "without the projector": {"without": "projector"},
    "without text-only data": {"without": "text"},
}
SIZES = {f"{k} codes": {"codes": k} for k in (16, 32, 64, 256)}
BONUSES = {"usage bonus 0.1": {"usage_bonus": 0.1}}
AMOUNTS = {"1/4 of the text": {"text_rows": 900}, "1/2 of the text": {"text_rows": 1800}}

TASK_FILES = {"a": "task", "b": "task_b"}  # how the names of a task's files begin
SHORT = {  # --short yes: flags that make a script quick
    "stage1_projector": {"steps": 2, "batch": 2},
    "stage2_codebook": {"steps_a": 1, "steps_b": 1, "batch": 2, "val": 2},
    "stage3_bc": {"batch": 2, "batch_adapt": 2},
    "stage4_latent_rl": {"batch": 2, "group": 2, "max_new": 6},
    "evaluate": {"limit": 2, "diversity_prompts": 2, "group": 2, "max_new": 6},
}


# ------------------------------------------------------------------------------------------------------- folders
def folder(variant):
    """'1/4 of the text' -> '1-4_of_the_text'."""
    return variant.replace(" ", "_").replace("/", "-")


def rl_run(seed, side, algorithm, task, rate=RATE, variant="full"):
    """The name of an RL run. `side`: latent or token; the token side has no codebook, so no variant."""
    owner = "token" if side == "token" else folder(variant)
    suffix = "" if rate == RATE else f"_{rate}"
    return f"{seed}/{owner}/{algorithm}_{task}{suffix}"


# ---------------------------------------------------------------------------------------------------------- plan
@dataclass(frozen=True)
class Job:
    """One run."""

    folder: str
    command: list  # of str: the script and its flags
    needs: list  # the folders of the runs that must be finished before


def path(cfg, name):
    return str(Path(cfg.out) / name)


def new_job(cfg, name, script, needs=(), **flags):
    """A run called `name` that needs those called `needs`. Flags as in Python: steps_clone=300 is --steps-clone 300."""
    flags = {"vlm": cfg.vlm, "out": path(cfg, name)} | flags
    if cfg.short == "yes":
        flags |= SHORT[script]
    command = [f"{script}.py"]
    for flag, value in flags.items():
        command += ["--" + flag.replace("_", "-"), str(value)]
    return Job(path(cfg, name), command, [path(cfg, n) for n in needs])


def plan(cfg, seeds=None):
    """-> {folder: Job} in the order in which they are wanted. `seeds`: those to plan for; None: 1 to cfg.seeds."""
    jobs = []
    for seed in range(1, cfg.seeds + 1) if seeds is None else seeds:
        jobs += pretraining(cfg, seed)
        for task in TASK_FILES:
            jobs += starts(cfg, seed, task)
            for variant in variants(cfg.tables):
                if task == "a" or variant not in SIZES | AMOUNTS | BONUSES:  # tables 5 and 7 are of task A alone
                    jobs += reinforcement(cfg, seed, task, variant)
    return {j.folder: j for j in jobs}


def variants(tables):
    """-> {label: flags of stage 2} of the codebooks that these tables need."""
    wanted = {"full": {}}
    if "2" in tables or "5" in tables:
        wanted |= ABLATIONS
    if "5" in tables:
        wanted |= SIZES | AMOUNTS
    if "7" in tables:
        wanted |= BONUSES
    return wanted


def demonstrations(cfg, task):
    return f"{cfg.data}/{TASK_FILES[task]}_demos.jsonl"


def adapt_steps(cfg):
    return 2 if cfg.short == "yes" else 75


def pretraining(cfg, seed):
    """Stage 1; then a codebook and its clone for each variant. They do not know the task."""
    data = {"paired": f"{cfg.data}/paired.jsonl"}
    stage1 = f"{seed}/stage1"
    jobs = [new_job(cfg, stage1, "stage1_projector", **data, seed=seed)]
    data["text"] = f"{cfg.data}/text.jsonl"
    for label, flags in variants(cfg.tables).items():
        stage2, clone = f"{seed}/{folder(label)}/stage2", f"{seed}/{folder(label)}/clone"
        projector = path(cfg, stage1)
        jobs += [
            new_job(cfg, stage2, "stage2_codebook", [stage1], **data, seed=seed, projector=projector, **flags),
            new_job(
                cfg,
                clone,
                "stage3_bc",
                [stage2],
                **data,
                seed=seed,
                init=path(cfg, stage2),
                steps_clone=2 if cfg.short == "yes" else 300,
                steps_adapt=0,
                demos=demonstrations(cfg, "a"),
            ),
        ]
    return jobs


def starts(cfg, seed, task):
    """SFT; and the evaluation of what RL starts from.

    The model as it is depends on no seed, so that its row stands in the first evaluation alone."""
    sft, adapted = f"{seed}/sft_{task}", f"{seed}/full/adapt_{task}"
    demos, steps, prompt = demonstrations(cfg, task), adapt_steps(cfg), "yes" if seed == 1 else "no"
    rows = {"prompt": prompt, "sft": path(cfg, sft), "bc": path(cfg, adapted)}
    return [
        new_job(cfg, sft, "stage3_bc", actions="token", demos=demos, steps_adapt=steps, seed=seed),
        evaluation(cfg, f"{seed}/start_{task}", seed, task, [sft, adapted], **rows),
    ]


def reinforcement(cfg, seed, task, variant):
    """The adapted clone of a variant, RL from it, and its evaluation; for the full variant RL from SFT, too."""
    clone, adapted = f"{seed}/{folder(variant)}/clone", f"{seed}/{folder(variant)}/adapt_{task}"
    demos, steps = demonstrations(cfg, task), adapt_steps(cfg)
    jobs = [
        new_job(cfg, adapted, "stage3_bc", [clone], demos=demos, init=path(cfg, clone), steps_adapt=steps, seed=seed)
    ]
    for algorithm, rate in settings(cfg, variant):
        for side in SIDES if variant == "full" else ["latent"]:
            run = rl_run(seed, side, algorithm, task, rate, variant)
            init = adapted if side == "latent" else f"{seed}/sft_{task}"
            jobs += [
                new_job(
                    cfg,
                    run,
                    "stage4_latent_rl",
                    [init],
                    actions=side,
                    init=path(cfg, init),
                    prompts=f"{cfg.data}/{TASK_FILES[task]}_prompts.jsonl",
                    loss_type=algorithm,
                    lr=rate,
                    steps=cfg.steps,
                    seed=seed,
                ),
                evaluation(cfg, f"{run}_eval", seed, task, [run], prompt="no", **{side: path(cfg, run)}),
            ]
    return jobs


def rollouts_a_step(short):
    flags = asdict(stage4_latent_rl.Config())
    if short == "yes":
        flags |= SHORT["stage4_latent_rl"]
    return flags["batch"] * flags["group"]


def settings(cfg, variant):
    """-> [(algorithm, learning rate)] of a variant's RL runs: all that there are for the full one, else GRPO."""
    if variant != "full":
        return [("grpo", RATE)]
    lower = [("grpo", rate) for rate in LOWER_RATES] if "6" in cfg.tables else []
    return [(algorithm, RATE) for algorithm in stage4_latent_rl.ALGORITHMS] + lower


def evaluation(cfg, name, seed, task, needs, **flags):
    """On the tests, never on the validation sets; the seed of sampling is none that trained."""
    return new_job(cfg, name, "evaluate", needs, task=task, data=cfg.data, **flags, seed=1000 + seed)


# --------------------------------------------------------------------------------------------------------- queue
def finished(run):
    """Whether the run in this folder is: an evaluation has left its results, a stage a checkpoint that says so."""
    if (Path(run) / "results.json").exists():
        return True
    return checkpoint.latest(run) is not None and checkpoint.read_state(run)["finished"]


def run_one(job):
    """Run its script with one thread, output to log.txt, time to seconds.txt (a line each time that it was started)
    -> its folder. Raises DataError if the script failed."""
    run = Path(job.folder)
    run.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with open(run / "log.txt", "a") as log:
        command, environment = [sys.executable, *job.command], os.environ | {"OMP_NUM_THREADS": "1"}
        status = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    with open(run / "seconds.txt", "a") as f:
        f.write(f"{time.time() - began:.1f}\n")
    if status:
        cure = f"see {run}/log.txt, then give the same command again: it goes on from here"
        raise DataError(f"{run}: stopped with exit status {status}; {cure}")
    return job.folder


def run_all(jobs, parallel, after=lambda done: None):
    """Run what is not finished of {folder: Job}, each as soon as what it needs is, `parallel` at a time.

    `after` is given the set of finished folders, at the start and whenever a run has ended. Raises DataError at the
    first failure; what the others have done stays."""
    done = {name for name in jobs if finished(name)}
    waiting, running, began = [name for name in jobs if name not in done], set(), time.time()
    with ThreadPoolExecutor(parallel) as pool:
        after(done)
        while waiting or running:
            ready = [name for name in waiting if done.issuperset(jobs[name].needs)]
            for name in ready[: parallel - len(running)]:
                waiting.remove(name)
                running.add(pool.submit(run_one, jobs[name]))
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                name = future.result()
                done.add(name)
                common.say(f"{(time.time() - began) / 60:6.1f} min  {len(done)} of {len(jobs)}  {name}")
            after(done)
