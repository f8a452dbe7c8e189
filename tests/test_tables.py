"""The study of the tables: its plan is fair and complete, its queue resumes, its tables are means over seeds."""

import json
from pathlib import Path

import pytest

from data import DataError
from stage4_latent_rl import ALGORITHMS
from studies import runs, tables

SCORES = {1: 1.0, 2: 2.0, 3: 6.0}  # by seed: mean 3, standard deviation sqrt((4 + 1 + 9) / 2) = 2.646
SAME, OTHER = ["a red star"] * 2, ["a red star", "two blue rings"]  # diversity 1, and more than 2


def flag(job, name):
    return job.command[job.command.index(name) + 1]


def test_the_plan_gives_both_sides_the_same():
    jobs = runs.plan(tables.Config(tables="123456"))
    assert all(need in jobs for job in jobs.values() for need in job.needs)
    assert all(folder == job.folder == flag(job, "--out") for folder, job in jobs.items())

    def budget(job):
        return [flag(job, f) for f in ("--prompts", "--loss-type", "--lr", "--steps", "--seed")]

    rl = [job for job in jobs.values() if job.command[0] == "stage4_latent_rl.py"]
    token = [job for job in rl if flag(job, "--actions") == "token"]
    full = [job for job in rl if flag(job, "--init").split("/")[-2] == "full"]
    assert len(token) == len(full) == (len(ALGORITHMS) + 2) * 2 * 3  # algorithms and lower rates, tasks, seeds
    assert sorted(map(budget, token)) == sorted(map(budget, full))
    assert len(rl) == len(ALGORITHMS) * 2 * 2 * 3 + 3 * 2 * 3 + 6 * 3 + 2 * 2 * 2 * 3  # tables 1, 2, 5 and 6
    evaluations = [job for job in jobs.values() if job.command[0] == "evaluate.py"]
    assert len(evaluations) == len(rl) + 6
    assert {flag(job, "--task") for job in evaluations} == {"a", "b"}  # never the validation sets
    assert not {flag(job, "--seed") for job in jobs.values()} & {"0", "7"}  # settings were chosen with these


def test_a_run_reads_only_what_it_waits_for():
    for job in runs.plan(tables.Config(tables="123456")).values():
        read = [x for x in job.command if x.startswith("runs/tables/") and x != job.folder]
        assert sorted(read) == sorted(job.needs)


def fake(run, status=0):
    """A command that finishes the run in this folder, or fails; it leaves an x each time that it has finished."""
    code = f"import pathlib, sys; p = pathlib.Path({str(run)!r}); {status} and sys.exit({status}); "
    return ["-c", code + "(p / 'results.json').write_text('1'); open(p / 'ran', 'a').write('x')"]


def test_the_queue_resumes_and_names_what_failed(tmp_path):
    a, b, c = (str(tmp_path / name) for name in "abc")
    jobs = {
        c: runs.Job(c, fake(c), [a, b]),
        a: runs.Job(a, fake(a), []),
        b: runs.Job(b, fake(b, status=3), [a]),
    }
    with pytest.raises(DataError, match="b: stopped with exit status 3; see .*log.txt"):
        runs.run_all(jobs, 2)
    assert runs.finished(a) and not runs.finished(b) and not runs.finished(c)
    jobs[b] = runs.Job(b, fake(b), [a])
    told = []
    runs.run_all(jobs, 2, lambda done: told.append(set(done)))
    assert told == [{a}, {a, b}, {a, b, c}]
    runs.run_all(jobs, 2)
    assert [(tmp_path / name / "ran").read_text() for name in "abc"] == ["x", "x", "x"]  # each once
    assert [len((tmp_path / name / "seconds.txt").read_text().split()) for name in "abc"] == [1, 2, 1]


def test_an_unknown_table_is_refused_before_anything_runs():
    with pytest.raises(DataError, match="--tables 18: there is no table 8"):
        tables.main(["--tables", "18"])


# ------------------------------------------------------------------------------------- tables of runs made up by hand
def write_json(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_evaluation(folder, rows, tests, base):
    """Ratios base, base + 1 on the two tests; SFT and the token side always say the same."""
    scores = {t: {"ratio": base + k, "dimensions": {"Tone": [base, 9.0]}} for k, t in enumerate(tests)}
    write_json(folder / "results.json", {"rows": dict.fromkeys(rows, scores)})
    alike = {row: row == "SFT" or folder.parent.name == "token" for row in rows}
    write_json(folder / "diversity.json", {row: [SAME, SAME] if alike[row] else [OTHER, OTHER] for row in rows})


def write_rl(folder, side, kl=None):
    """Three steps, whose logged numbers are 1, 2, 3 (KL: `kl` at each); a latent rollout takes 2 s, a token one 1 s."""
    seconds = {"s_rollout": 2.0, "s_update": 1.0} if side == "latent" else {"s_rollout": 1.0, "s_update": 2.0}
    steps = [dict.fromkeys(tables.LOGGED, k) | {"step": k} | seconds for k in (1, 2, 3)]
    if kl is not None:
        steps = [step | {"kl": kl} for step in steps]
    state = {"step": 3, "stage": "stage4_latent_rl", "finished": True, "config": {"batch": 2, "group": 4}}
    write_json(folder / "ckpt-000003" / "state.json", state)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def write_seed(out, seed, x):
    """All runs of a seed, whose ratios are x or, with another rate x / 2, with another codebook x - 1."""
    for task, tests in tables.TESTS.items():
        if task not in "ab":
            continue
        write_evaluation(out / f"{seed}/start_{task}", ("Prompt", "SFT", "BC latent"), tests, x)
        for side in runs.SIDES:
            for algorithm in tables.LABELS:
                run = out / runs.rl_run(seed, side, algorithm, task)
                write_rl(run, side)
                write_evaluation(run.with_name(run.name + "_eval"), ["row"], tests, x)
            for rate in runs.LOWER_RATES:
                run = out / runs.rl_run(seed, side, "grpo", task, rate)
                write_rl(run, side, kl=x)
                write_evaluation(run.with_name(run.name + "_eval"), ["row"], tests, x / 2)
        for variant in (*runs.ABLATIONS, *runs.SIZES, *runs.AMOUNTS):
            run = out / runs.rl_run(seed, "latent", "grpo", task, variant=variant)
            write_evaluation(run.with_name(run.name + "_eval"), ["row"], tests, x - 1)
    for variant in ("full", *runs.ABLATIONS, *runs.SIZES, *runs.AMOUNTS):
        state = {"step": 1, "stage": "stage2_codebook", "finished": True, "config": {}}
        state["val"] = {"text": {"val_inferred": 10 * x}}
        write_json(out / f"{seed}/{runs.folder(variant)}/stage2/ckpt-000001/state.json", state)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    for seed, x in SCORES.items():
        write_seed(out, seed, x)
    cfg = tables.Config(out=str(out), results=str(out / "results"), tables="123456")
    return tables.Collected(cfg)


def test_table_1_and_what_stands_beside_it(made_up):
    rows, text = tables.table1(made_up)
    assert rows["GRPO latent"] == {"ID": [1, 2, 6], "OOD": [2, 3, 7], "LS1": [1, 2, 6], "LS2": [2, 3, 7]}
    assert rows["Prompt"]["ID"] == [1]  # of one seed
    assert "| DAPO token | 3.000 ± 2.646 | 4.000 ± 2.646 | 3.000 ± 2.646 | 4.000 ± 2.646 | 3.500 ± 2.646 |" in text
    assert "| Prompt | 1.000 | 2.000 | 1.000 | 2.000 | 1.500 |" in text
    assert text.count("\n") == 2 + 3 + 2 * len(ALGORITHMS)
    rows, text = tables.dimensions(made_up)
    assert rows["LS2"]["GRPO token"] == {"Tone": [1, 2, 6]}
    assert "| reference | 9.0 |\n| SFT | 3.0 ± 2.6 |" in text
    rows, text = tables.training(made_up, last=2)
    assert rows["DAPO token, task B"] == {"reward, start": [2.0] * 3} | dict.fromkeys(tables.LOGGED, [2.5] * 3)
    assert "| 2.50 ± 0.00 |" in text


def test_tables_2_and_5_of_codebooks(made_up):
    _, text = tables.table2(made_up)
    ratios = "2.000 ± 2.646 | 3.000 ± 2.646"
    assert f"| without the cycle loss | {ratios} | {ratios} | 2.500 ± 2.646 | 30.000 ± 26.458 |" in text
    rows, text = tables.table5(made_up)
    assert f"| 1/2 of the text | {ratios} | 2.500 ± 2.646 | 30.000 ± 26.458 |" in text
    assert text.count("\n") == 2 + 5 + 4
    assert rows["128 codes"] == rows["all of the text"]


def test_table_3_of_diversity(made_up):
    rows, _ = tables.table3(made_up)
    for row in ("before RL, task A, words and word pairs", "BNPO, task B, words and word pairs"):
        assert rows[row]["token"] == pytest.approx([1, 1, 1])
        assert min(rows[row]["latent"]) > 2


def test_table_4_of_seconds(made_up):
    rows, text = tables.table4(made_up)
    assert rows["DAPO, task A"] == [[2.0, 0.5, 1.0]] * 3
    assert "| Dr.GRPO, task B | 2.00 ± 0.00 | 0.50 ± 0.00 | 1.00 ± 0.00 |" in text


def test_table_6_of_learning_rates(made_up):
    rows, text = tables.table6(made_up)
    assert rows["GRPO latent, 3e-4"]["KL"] == [1, 2, 6]
    assert rows["GRPO latent, 3e-4"]["ID"] == [0.5, 1, 3] and rows["GRPO token, 1e-3"]["ID"] == [1, 2, 6]
    ratios = "1.500 ± 1.323 | 2.500 ± 1.323"
    assert f"| GRPO token, 1e-4 | {ratios} | {ratios} | 2.000 ± 1.323 | 3.00 ± 2.65 |" in text


def test_the_report_writes_tables_and_figures_of_the_finished_seeds(made_up):
    out = Path(made_up.cfg.results)
    tables.report(made_up.cfg, range(1, 3))
    results = json.loads((out / "results.json").read_text())
    assert results["made"][0]["seeds"] == results["seeds"]["table1"] == [1, 2]
    assert results["table1"]["SFT"]["ID"] == [1, 2]
    written = {file.stem for file in out.glob("*.md")}
    assert written == {f"table{k}" for k in range(1, 7)} | {"dimensions", "training"}
    assert written < set(results)
    assert results["rewards"]["BNPO, task B"]["latent"] == [[1, 2, 3]] * 2
    for figure in ("rewards.png", "coverage.png"):
        assert (out / figure).stat().st_size > 10000
