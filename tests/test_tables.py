"""tables.py: the plan of the runs is fair and complete, the queue resumes, the tables are means over seeds, and README shows the committed ones."""

import json
from pathlib import Path

import pytest

import tables
from data import DataError


def test_the_plan_gives_both_sides_the_same():
    cfg = tables.Config(tables="123456")
    jobs = tables.plan(cfg)
    assert all(need in jobs for _, needs in jobs.values() for need in needs)
    assert all(command[command.index("--out") + 1] == n for n, (command, _) in jobs.items())
    rl = [c for c, _ in jobs.values() if c[0] == "stage4_latent_rl.py"]

    def budget(command):
        return tuple(command[command.index(f) + 1] for f in ("--prompts", "--loss-type", "--lr", "--steps", "--seed"))
    token = [c for c in rl if "token" in c]
    full = [c for c in rl if c[c.index("--init") + 1].split("/")[-2] == "full"]
    assert len(token) == len(full) == (4 + 2) * 2 * 3 and sorted(map(budget, token)) == sorted(map(budget, full))
    assert len(rl) == 48 + 3 * 2 * 3 + 6 * 3 + 2 * 2 * 2 * 3  # tables 1, 2, 5 and 6
    assert sum(c[0] == "evaluate.py" for c, _ in jobs.values()) == len(rl) + 6
    tests = {t for c, _ in jobs.values() if c[0] == "evaluate.py" for t in [c[c.index("--task") + 1]]}
    assert tests == {"a", "b"}  # never the validation sets
    assert all(c[c.index("--seed") + 1] not in ("0", "7") for c, _ in jobs.values())


def job(out, then="0"):
    code = f"import pathlib, sys; p = pathlib.Path({str(out)!r}); (p / 'results.json').write_text('1') if {then} == 0 else sys.exit({then}); open(p / 'ran', 'a').write('x')"
    return ["-c", code]


def test_the_queue_resumes_and_names_what_failed(tmp_path):
    a, b, c = (str(tmp_path / n) for n in "abc")
    jobs = {c: (job(c), [a, b]), a: (job(a), []), b: (job(b, "3"), [a])}
    with pytest.raises(DataError, match="b: stopped with exit status 3; see .*log.txt"):
        tables.run_all(jobs, 2)
    assert tables.finished(a) and not tables.finished(b) and not tables.finished(c)
    jobs[b] = (job(b), [a])
    told = []
    tables.run_all(jobs, 2, lambda done: told.append(set(done)))
    assert told == [{a}, {a, b}, {a, b, c}]
    tables.run_all(jobs, 2)
    assert [(tmp_path / n / "ran").read_text() for n in "abc"] == ["x", "x", "x"]  # each once


def test_tables_are_means_and_deviations_over_seeds(tmp_path):
    cfg = tables.Config(out=str(tmp_path), results=str(tmp_path), seeds=3)

    def write(name, row, tests, base):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        rows = {row: {t: {"ratio": base + k, "dimensions": {"Tone": [base, 9.0]}} for k, t in enumerate(tests)}}
        have = tmp_path / name / "results.json"
        rows |= json.loads(have.read_text())["rows"] if have.exists() else {}
        have.write_text(json.dumps({"rows": rows}))
        same, other = ["a red star"] * 2, ["a red star", "two blue rings"]  # diversity 1, and that of different sentences
        have = tmp_path / name / "diversity.json"
        drawn = {row: [same, same] if "token" in name or row == "SFT" else [other, other]}
        have.write_text(json.dumps((json.loads(have.read_text()) if have.exists() else {}) | drawn))

    for s, x in ((1, 1.0), (2, 2.0), (3, 6.0)):  # mean 3, deviation sqrt((4 + 1 + 9) / 2)
        for task, tests in (("a", ("ID", "OOD")), ("b", ("LS1", "LS2"))):
            for row in ("Prompt", "SFT", "BC latent"):
                write(f"{s}/start_{task}", row, tests, x)
            for algorithm in tables.ALGORITHMS:
                for which in ("full", "token"):
                    run = tmp_path / f"{s}/{which}/{algorithm}_{task}"
                    write(f"{s}/{which}/{algorithm}_{task}_eval", "x", tests, x)
                    for lr in tables.LOWER_RATES:
                        write(f"{s}/{which}/{algorithm}_{task}_{lr}_eval", "x", tests, x / 2)
                        other = tmp_path / f"{s}/{which}/{algorithm}_{task}_{lr}"
                        other.mkdir(parents=True)
                        (other / "metrics.jsonl").write_text(json.dumps({"step": 1, "kl": x}) + "\n")
                    run.mkdir(parents=True)
                    (run / "ckpt-000001").mkdir()
                    (run / "ckpt-000001" / "state.json").write_text(json.dumps({"finished": True, "config": {"batch": 2, "group": 4}}))
                    (run / "metrics.jsonl").write_text("".join(json.dumps(dict.fromkeys(tables.LOGGED, k) | {"step": k, "s_rollout": 1.0 + (which == "full"),
                                                                          "s_update": 2.0 - (which == "full")}) + "\n" for k in (1, 2, 3)))
            for variant in ("full", *tables.ABLATIONS, *tables.SIZES, *tables.AMOUNTS):
                v = tables.folder(variant)
                if variant != "full":
                    write(f"{s}/{v}/grpo_{task}_eval", "x", tests, x - 1)
                state = tmp_path / f"{s}/{v}/stage2/ckpt-000001/state.json"
                state.parent.mkdir(parents=True, exist_ok=True)
                state.write_text(json.dumps({"finished": True, "val": {"text": {"val_inferred": 10 * x}}}))
    c = tables.Collected(cfg)
    rows, text = tables.table1(c)
    assert rows["GRPO latent"] == {"ID": [1, 2, 6], "OOD": [2, 3, 7], "LS1": [1, 2, 6], "LS2": [2, 3, 7]} and rows["Prompt"]["ID"] == [1]
    assert "| DAPO token | 3.000 ± 2.646 | 4.000 ± 2.646 | 3.000 ± 2.646 | 4.000 ± 2.646 | 3.500 ± 2.646 |" in text and text.count("\n") == 2 + 11
    rows, text = tables.table2(c)
    assert "| without the cycle loss | 2.000 ± 2.646 | 3.000 ± 2.646 | 2.000 ± 2.646 | 3.000 ± 2.646 | 2.500 ± 2.646 | 30.000 ± 26.458 |" in text
    rows, text = tables.table5(c)
    assert "| 1/2 of the text | 2.000 ± 2.646 | 3.000 ± 2.646 | 2.500 ± 2.646 | 30.000 ± 26.458 |" in text and text.count("\n") == 2 + 5 + 4
    assert rows["128 codes"] == rows["all of the text"] and (tmp_path / "coverage.png").stat().st_size > 10000
    rows, text = tables.table3(c)
    assert rows["BNPO, task B, words and word pairs"]["token"] == pytest.approx([1, 1, 1]) and min(rows["GRPO, task A, words and word pairs"]["latent"]) > 2
    assert rows["before RL, task A, words and word pairs"]["token"] == pytest.approx([1, 1, 1])
    assert min(rows["before RL, task B, words and word pairs"]["latent"]) > 2
    rows, text = tables.table4(c)
    assert "| Dr.GRPO, task B | 2.00 ± 0.00 | 0.50 ± 0.00 | 1.00 ± 0.00 |" in text
    assert "| reference | 9.0 |\n| SFT | 3.0 ± 2.6 |" in tables.dimensions(c)[1]
    rows, text = tables.training(c, last=2)
    assert rows["DAPO token, task B"] == {"reward, start": [2.0] * 3} | dict.fromkeys(tables.LOGGED, [2.5] * 3) and "| 2.50 ± 0.00 |" in text
    rows, text = tables.table6(c)
    assert rows["GRPO latent, 3e-4"]["ID"] == [0.5, 1, 3] and rows["GRPO token, 1e-3"]["ID"] == [1, 2, 6]
    assert "| GRPO token, 1e-4 | 1.500 ± 1.323 | 2.500 ± 1.323 | 1.500 ± 1.323 | 2.500 ± 1.323 | 2.000 ± 1.323 | 3.00 ± 2.65 |" in text
    curves = tables.figure(c, tmp_path / "rewards.png")
    assert curves["BNPO, task B"]["latent"] == [[1, 2, 3]] * 3
    assert (tmp_path / "rewards.png").stat().st_size > 10000


def test_readme_shows_the_committed_tables():
    root = Path(tables.__file__).parent
    made = sorted((root / "results").glob("*.md"))
    assert {f.stem for f in made} >= {"table1", "table2", "table3", "table4"}
    for f in made:
        for part in f.read_text().strip().split("\n\n"):
            assert part in (root / "README.md").read_text(), f"README.md does not show {f.name}"
