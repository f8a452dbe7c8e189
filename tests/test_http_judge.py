"""The judge behind a server, against real processes: tests/judge_server.py answers well, badly, late, or not at all."""

import json
import multiprocessing
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, launch, same_weights
from PIL import Image

import checkpoint
import common
import evaluate
import judge_http
import stage4_latent_rl
from data import DataError
from judge_http import Cache, HttpJudge
from judge_request import Prompt, data_url, refuses_limits
from rewards import judgements, load_judge

pytest.importorskip("openai", reason="requirements-judge.txt")
KEY = "secret-key-1"


class Server:
    """A process of judge_server.py on a port of its own; `begin` starts it again there."""

    def __init__(self, folder):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.log, self.process, self.url = folder / "server.log", None, f"http://127.0.0.1:{self.port}/v1"

    def begin(self, *faults, seconds=0.0):
        self.end()
        before = self.lines().count(["begins"])
        argv = [sys.executable, "tests/judge_server.py", str(self.port), str(self.log), ",".join(faults) or "ok"]
        self.process = subprocess.Popen([*argv, str(seconds)], cwd=ROOT)
        while self.lines().count(["begins"]) == before:
            time.sleep(0.02)
        return self

    def end(self):
        if self.process:
            self.process.kill()
            self.process.wait()

    def lines(self):
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def answered(self, how="ok"):
        """-> the hashes of the requests that were answered so."""
        return [line[0] for line in self.lines() if line[1:] == [how]]


@pytest.fixture
def server(tmp_path):
    one = Server(tmp_path)
    yield one
    one.end()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    monkeypatch.delenv("http_proxy", raising=False)


def config(out, **changed):
    flags = {"out": str(out), "judge_model": "m", "judge_timeout": 1.0, "judge_retries": 2}
    cfg = judge_http.Judging()
    cfg.__dict__.update(flags | changed)
    return cfg


def record(question="What is it?", answer="A small red star.", images=()):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"where": "task.jsonl, row 7", "images": list(images), "messages": turns}


RECORDS = [record(f"Question {k}?", f"Answer number {k}") for k in range(6)]
TEXTS = ["a", "ab ab", "the cat sat on the mat", "The quick brown fox.", "jumps over the dog", "xyz"]


def by_hand(records, texts):
    """What the server's rule, the count of letters, gives the response and the reference."""
    both = [(text, r["messages"][-1]["content"]) for r, text in zip(records, texts)]
    return [tuple(float(min(10, 1 + len(set(x)) // 3)) for x in pair) for pair in both]


def assert_by_hand(entries, records=RECORDS, texts=TEXTS):
    names = Prompt("prompts/mmrole.txt").dimensions
    assert entries == [dict.fromkeys(names, pair) for pair in by_hand(records, texts)]


# -------------------------------------------------------------------------------------------------------- requests
@pytest.mark.parametrize(
    "name, dimensions",
    [
        (
            "mmrole",
            "Instruction Adherence, Fluency, Coherency, Image-Text Relevance, Response Accuracy, "
            "Personality Consistency, Knowledge Consistency, Tone Consistency",
        ),
        (
            "pcogalign",
            "Role-Set Sensitivity, Body Behavior Awareness, Mind Feelings Awareness, Contextual Awareness, "
            "Conversational Flow",
        ),
    ],
)
def test_the_prompts_have_the_dimensions_of_the_benchmarks(name, dimensions):
    prompt = Prompt(f"prompts/{name}.txt")
    assert prompt.dimensions == dimensions.split(", ")
    (system, user), _ = prompt.messages(record(), "A {answer_b} star.", ["data:1", "data:2"])
    assert [p["type"] for p in user["content"]] == ["image_url", "image_url", "text"]
    text = user["content"][-1]["text"]
    assert "User: What is it?" in text and "A small red star." in text
    assert "A {answer_b} star." in text  # what an answer says is no blank
    assert "#" not in text + system["content"] and text.count("A=..., B=...") == len(prompt.dimensions)


def test_the_reference_is_not_in_the_dialogue():
    (_, user), _ = Prompt("prompts/mmrole.txt").messages(record(), "A moon.", [])
    before, _, rest = user["content"][0]["text"].partition("</dialogue>")
    assert "red star" not in before and "red star" in rest


def test_half_of_the_prompts_have_the_response_first_and_a_group_stands_in_one_place():
    prompt = Prompt("prompts/mmrole.txt")
    records = [record(f"Question {k}?") for k in range(400)]
    first = [prompt.messages(r, "one", [])[1] for r in records]
    assert 160 < sum(first) < 240  # four standard deviations of a fair coin
    assert first == [prompt.messages(r, "another", [])[1] for r in records]
    (_, user), is_a = prompt.messages(records[0], "one", [])
    assert f"<answer_{'A' if is_a else 'B'}>\none\n" in user["content"][0]["text"]


def test_a_picture_is_scaled_down_and_not_up(tmp_path):
    Image.new("RGB", (400, 200), "red").save(tmp_path / "a.png")
    assert data_url(str(tmp_path / "a.png"), 10**6, 100 * 50).startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("[system]\na\n[user]\nb", r"no part \[dimensions\]"),
        ("[dimensions]\nFluency\n[system]\na\n[user]\n{dimensions}{dialogue}{answer_a}{answer_b}{form}", "a colon"),
        ("[dimensions]\nA: x\na: y\n[system]\na\n[user]\n{dimensions}{dialogue}{answer_a}{answer_b}{form}", "its own"),
        ("[dimensions]\nA: x\n[system]\na\n[user]\n{dimensions}{dialogue}{answer_a}{form}", "answer_b"),
        (None, "cannot be read"),
    ],
)
def test_a_file_of_prompts_that_cannot_serve_is_refused(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "p.txt").write_text(text)
    with pytest.raises(DataError, match=f"^--judge-prompt .*p.txt: .*{reason}"):
        Prompt(str(tmp_path / "p.txt"))


# ---------------------------------------------------------------------------------------------------- the faults
def test_scores_are_those_of_the_server_on_the_right_side(server, tmp_path):
    server.begin()
    judge = HttpJudge(server.url, config(tmp_path, judge_price_in=2.0, judge_price_out=5.0))
    assert_by_hand(judge(RECORDS, TEXTS))
    sides = [judge.prompt.messages(r, "", [])[1] for r in RECORDS]
    assert len(set(sides)) == 2  # both places were tried
    spent = judge.spent()
    assert (spent["judge_calls"], spent["judge_tokens_in"], spent["judge_tokens_out"]) == (6, 600, 60)
    assert spent["judge_cost"] == pytest.approx((600 * 2 + 60 * 5) / 1e6)


def test_the_picture_is_in_the_request(server, tmp_path):
    server.begin()
    Image.new("RGB", (400, 200), "red").save(tmp_path / "a.png")
    judge = HttpJudge(server.url, config(tmp_path, judge_pixels=100 * 50))
    judge([record(images=[tmp_path / "a.png"])], ["A star."])
    assert ["picture", "100", "50"] in server.lines()


FAULTS = ["429", "500", "garbage", "few", "length", "half", "close", "slow", "json", "text"]


def test_a_fault_that_passes_changes_no_score(server, tmp_path):
    server.begin(*FAULTS)
    records, texts = [record(f"Question {k}?") for k in range(10)], [TEXTS[k % 6] for k in range(10)]
    assert_by_hand(HttpJudge(server.url, config(tmp_path))(records, texts), records, texts)
    assert [len(server.answered(fault)) for fault in FAULTS] == [1] * 10
    assert len(server.answered()) == len(set(server.answered())) == 10


def test_a_judgement_that_fails_is_none_and_is_not_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(judge_http, "TRIES", 1)
    server.begin("ok", "few")
    judge = HttpJudge(server.url, config(tmp_path, judge_parallel=1))
    entries = judgements(judge, RECORDS, TEXTS)
    assert [entry is None for entry in entries] == [False, True] * 3
    assert_by_hand([e for e in entries if e], RECORDS[::2], TEXTS[::2])
    assert_by_hand(judge(RECORDS, TEXTS))  # asked again now, and the others are not
    assert len(server.answered()) == len(set(server.answered())) == 6


def test_equal_rows_are_one_call(server, tmp_path):
    server.begin()
    judge = HttpJudge(server.url, config(tmp_path))
    assert_by_hand(judge(RECORDS[:1] * 3, TEXTS[:1] * 3), RECORDS[:1] * 3, TEXTS[:1] * 3)
    assert len(server.answered()) == 1


def test_what_was_foreseen_is_asked_once_and_early(server, tmp_path):
    server.begin(seconds=0.2)
    judge = HttpJudge(server.url, config(tmp_path))
    judge.foresee(RECORDS, TEXTS)
    while len(server.answered()) < 6:
        time.sleep(0.02)
    assert_by_hand(judge(RECORDS, TEXTS))
    assert len(server.answered()) == 6


def test_parallel_is_how_many_calls_there_are_at_once(server, tmp_path):
    server.begin("slow")  # nobody is answered for 3 seconds
    judge = HttpJudge(server.url, config(tmp_path, judge_parallel=4, judge_timeout=10.0))
    judge.foresee(RECORDS, TEXTS)
    while len(server.answered("slow")) < 4:
        time.sleep(0.02)
    time.sleep(0.3)
    assert len(server.answered("slow")) == 4


# ------------------------------------------------------------------------------------------------- refused, ended
@pytest.mark.parametrize(
    "faults, changed, reason",
    [
        (["401"], {}, "refuses .AuthenticationError.*put the right key into the environment variable OPENAI_API_KEY"),
        (None, {}, "no server answers there .APIConnectionError"),
        (["ok"], {"judge_model": ""}, "give --judge-model"),
        (["ok"], {"judge_prompt": "no/such.txt"}, "cannot be read"),
        (["ok"], {"judge_cache": "no/such/folder/judge.sqlite"}, "--judge-cache no/such.*cannot be used"),
    ],
)
def test_what_cannot_work_is_one_line_before_the_run(server, tmp_path, faults, changed, reason):
    if faults:
        server.begin(*faults)
    with pytest.raises(DataError, match=reason) as e:
        load_judge(server.url, config(tmp_path, **changed))
    assert KEY not in str(e.value) and "\n" not in str(e.value)


def test_a_wrong_key_is_named_by_its_variable_and_never_shown(server, tmp_path, monkeypatch):
    server.begin()
    monkeypatch.setenv("MY_KEY", "another-key-2")  # the server repeats it in its error
    with pytest.raises(DataError, match="environment variable MY_KEY") as e:
        HttpJudge(server.url, config(tmp_path, judge_key="MY_KEY"))
    assert "another" not in str(e.value)


@pytest.mark.parametrize("url", ["http://me:pw@127.0.0.1/v1", "http://127.0.0.1/v1?key=abc", "http:///v1"])
def test_a_url_with_a_key_or_without_a_host_is_refused(tmp_path, url):
    with pytest.raises(DataError, match="^--judge") as e:
        load_judge(url, config(tmp_path))
    assert "pw" not in str(e.value) and "abc" not in str(e.value)


def test_a_model_that_is_not_there_ends_the_run_at_once(server, tmp_path):
    server.begin("404")
    with pytest.raises(DataError, match="--judge-model m must be on the server") as e:
        HttpJudge(server.url, config(tmp_path, judge_parallel=1))(RECORDS, TEXTS)
    assert len(server.answered("404")) == 1 and KEY not in str(e.value)


def test_a_model_that_reasons_needs_its_flag(server, tmp_path):
    """It refuses `temperature` and `max_tokens`: the first call says so, and what to do."""
    server.begin("reasoning")
    with pytest.raises(DataError, match="refuses .BadRequestError.*max_tokens.* needs --judge-reasoning yes"):
        HttpJudge(server.url, config(tmp_path, judge_parallel=1))(RECORDS, TEXTS)
    assert len(server.answered("reasoning")) == 1
    assert_by_hand(HttpJudge(server.url, config(tmp_path, judge_reasoning="yes"))(RECORDS, TEXTS))


class Refused(Exception):
    status_code = 400


@pytest.mark.parametrize(
    "said, refuses",
    [
        ("Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value.", True),
        ("Unsupported parameter: 'max_tokens' is not supported with this model.", True),
        ("'max_tokens' is too large: 1024. This model's maximum context length is 4096 tokens.", False),
        ("Unsupported parameter: 'messages[0].role' does not support 'system' with this model.", False),
    ],
)
def test_a_refused_field_is_told_from_a_refused_prompt(said, refuses):
    assert refuses_limits(Refused(said)) == refuses
    assert not refuses_limits(ValueError(said))


def test_too_many_failures_of_the_last_end_the_run(server, tmp_path, monkeypatch):
    monkeypatch.setattr(judge_http, "TRIES", 1)
    monkeypatch.setattr(judge_http, "WINDOW", 4)
    server.begin("ok", "ok", "garbage")
    cfg = config(tmp_path, judge_parallel=1, judge_fail=0.25)
    assert [e is None for e in HttpJudge(server.url, cfg)(RECORDS[:3], TEXTS[:3])] == [False, False, True]
    server.begin("garbage")
    with pytest.raises(DataError, match="2 of the last 2 judgements failed, the last one: 'Here they are") as e:
        HttpJudge(server.url, cfg)([record(f"New {k}") for k in range(4)], TEXTS[:4])
    assert "the same command goes on" in str(e.value)
    assert len(server.answered("garbage")) == 3  # the rest was not asked any more


# ------------------------------------------------------------------------------------------------------ the cache
def test_answers_are_kept_by_model_and_request_over_processes(server, tmp_path):
    server.begin()
    HttpJudge(server.url, config(tmp_path))(RECORDS, TEXTS)
    again = HttpJudge(server.url, config(tmp_path))
    assert_by_hand(again(RECORDS, TEXTS))
    assert again.spent()["judge_calls"] == 0 and again.spent()["judge_cached"] == 6
    HttpJudge(server.url, config(tmp_path, judge_model="n"))(RECORDS[:1], TEXTS[:1])
    HttpJudge(server.url, config(tmp_path, judge_prompt="prompts/pcogalign.txt"))(RECORDS[:1], TEXTS[:1])
    assert len(server.answered()) == len(set(server.answered())) == 8


def test_a_file_that_is_no_cache_is_named(server, tmp_path):
    server.begin()
    (tmp_path / "x").write_text("no database, " * 100)
    with pytest.raises(DataError, match="--judge-cache .*x: cannot be used .file is not a database"):
        HttpJudge(server.url, config(tmp_path, judge_cache=str(tmp_path / "x")))


def write(path, name, rows, told):
    cache = Cache(path)
    for k in range(rows):
        cache.put(f"{name}-{k}", "m", "answer", 1, 2, 0.5)
        os.write(told, f"{k}\n".encode())


def test_several_processes_write_one_file_and_a_kill_loses_nothing(tmp_path):
    path, fork = str(tmp_path / "c"), multiprocessing.get_context("fork")
    out, told = os.pipe()
    null = os.open(os.devnull, os.O_WRONLY)
    calm = [fork.Process(target=write, args=(path, name, 40, null)) for name in "ab"]
    killed = fork.Process(target=write, args=(path, "k", 10**9, told))
    for process in (*calm, killed):
        process.start()
    os.close(told)
    with open(out) as file:
        said = [next(file) for _ in range(30)]
        killed.kill()
        said += [line for line in file if line.endswith("\n")]
    for process in (*calm, killed):
        process.join()
    assert [p.exitcode for p in (*calm, killed)] == [0, 0, -9]
    with sqlite3.connect(path) as file:
        keys = {key for (key,) in file.execute("SELECT key FROM answers")}
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert {f"{name}-{k}" for name in "ab" for k in range(40)} <= keys
    assert {f"k-{int(k)}" for k in said} <= keys


# ------------------------------------------------------------------------------------------------------ mixes
def test_a_mix_with_a_server_weighs_means(server, tmp_path):
    server.begin()
    mix = load_judge(f"{server.url}:3,helpers:letters:1", config(tmp_path))
    texts = ["abc", "abcdefghi"]  # letters: 1 + 3 / 3 = 2, and 1 + 9 / 3 = 4, each over 5
    ours = [(3 * 2 + 2) / 4, (3 * 4 + 4) / 4]  # the server counts in the same way
    theirs = [(3 * min(10, 1 + len(set(r["messages"][-1]["content"])) // 3) + 5) / 4 for r in RECORDS[:2]]
    assert mix(RECORDS[:2], texts) == [{"Mix": pair} for pair in zip(ours, theirs)]
    assert mix.costly and mix.spent()["judge_calls"] == 2


# ------------------------------------------------------------------------------------------------------ whole runs
def rl(flags, runs, server, out, *more):
    argv = [*flags.rl, "--init", f"{runs}/loud", "--out", str(out), "--steps", "3", "--batch", "2", "--max-new", "10"]
    at = argv.index("--judge")
    argv[at : at + 2] = ["--judge", server.url, "--judge-model", "m", "--judge-timeout", "1", "--judge-retries", "2"]
    return [*argv, "--save-every", "1", *more]


def test_rl_ends_with_the_same_weights_whatever_the_server_does(server, flags, runs, tmp_path):
    """All faults in turn; the server dies in the run, which stops, and goes on when the server is back."""
    stage4_latent_rl.main(rl(flags, runs, server.begin(), tmp_path / "calm"))
    calm = server.answered()
    assert len(calm) == len(set(calm)) > 4
    server.log.unlink()

    out = tmp_path / "faulty"
    argv = rl(flags, runs, server, out, "--judge-fail", "0", "--judge-parallel", "3")
    server.begin("429", "garbage", "few", "500", "half", "die")
    with pytest.raises(DataError, match="judgements failed, the last one: APIConnectionError"):
        stage4_latent_rl.main(argv)
    assert server.process.wait() == 1
    before = checkpoint.latest(out)
    server.begin("slow", "close", "ok")
    stage4_latent_rl.main(argv)
    assert same_weights(tmp_path / "calm", out)
    assert before is None or before.name != "ckpt-000003"
    assert sorted(server.answered()) == sorted(set(calm))  # each paid once, none made up
    rows = common.read_metrics(out)
    assert [r["judge_failed"] for r in rows] == [0, 0, 0] and rows[-1]["judge_calls"] > 0
    assert KEY not in (checkpoint.latest(out) / "state.json").read_text() + (out / "metrics.jsonl").read_text()
    assert KEY.encode() not in (out / "judge.sqlite").read_bytes()


def test_a_group_that_is_drawn_again_is_judged_alone_and_counted_once(server, flags, runs, tmp_path, monkeypatch):
    """Two prompts, and the scores of one of them are equal at first. It alone is drawn again, with other noise, and the
    judge is asked for the new responses: about some while others are still being rolled out, about each once."""
    server.begin()
    calls, early = [], []
    real_call, real_foresee = HttpJudge.__call__, HttpJudge.foresee

    def call(self, records, texts):
        calls.append([(r["id"], text) for r, text in zip(records, texts)])
        entries = real_call(self, records, texts)
        if len(calls) == 1:  # the second prompt's group of four is equal, and one judgement failed
            entries[4:] = [dict(entries[4]), None, dict(entries[4]), dict(entries[4])]
        return entries

    def foresee(self, records, texts):
        early.append(len(texts))
        return real_foresee(self, records, texts)

    monkeypatch.setattr(HttpJudge, "__call__", call)
    monkeypatch.setattr(HttpJudge, "foresee", foresee)
    argv = rl(flags, runs, server, tmp_path, "--resample", "1")
    for flag, value in {"--steps": "1", "--group": "4", "--max-new": "24"}.items():
        argv[argv.index(flag) + 1] = value
    stage4_latent_rl.main([*argv, "--temperature", "2"])

    first, second = calls
    (row,) = common.read_metrics(tmp_path)
    assert len(first) == 8 and {name for name, _ in second} == {first[4][0]} and len(second) == 4
    assert row["resampled"] == 1 and row["judge_failed"] == 0  # what failed was drawn again
    assert len(set(second) - set(first)) > 1  # other noise, other responses
    asked = set(first) | set(second)
    assert len(server.answered()) == len(set(server.answered())) == len(asked) == row["judge_calls"]
    assert row["judge_cached"] == len(set(first) & set(second))  # what was said before is in the file
    assert row["judge_tokens_in"] == 100 * len(asked)
    assert 8 in early and 4 in early and early.count(1) > 0  # whole batches, and single rows before them


@pytest.mark.all
def test_a_killed_run_pays_for_nothing_twice(server, flags, runs, tmp_path):
    argv = [sys.executable, "stage4_latent_rl.py", *rl(flags, runs, server, tmp_path / "rl", "--judge-parallel", "1")]
    server.begin(seconds=0.2)
    run = subprocess.Popen(argv, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "tests"})
    while len(server.answered()) < 3 and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -9
    done = subprocess.run(argv, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answered = server.answered()
    assert len(answered) - len(set(answered)) <= 1  # at most the one call that was in flight
    assert "answers from the file" in done.stdout + done.stderr


def test_the_evaluation_asks_the_server_and_says_what_it_cost(server, flags, runs, world, tmp_path, capsys):
    server.begin()
    argv = ["--vlm", flags.rl[1], "--data", str(world), "--prompt", "no", "--bc", f"{runs}/loud", "--max-new", "6"]
    argv += ["--limit", "2", "--samples", "2", "--diversity-prompts", "1", "--group", "2", "--out", str(tmp_path / "e")]
    evaluate.main([*argv, "--judge", server.url, "--judge-model", "m", "--judge-price-in", "10000"])
    row = json.loads((tmp_path / "e" / "results.json").read_text())["rows"]["BC latent"]
    assert list(row["ID"]["dimensions"]) == Prompt("prompts/mmrole.txt").dimensions
    assert np.isfinite(row["OOD"]["ratio"]) and "judge_failed" not in row["ID"]
    calls = len(server.answered())
    assert f"judge: {calls} calls" in (said := capsys.readouterr().out) and f"cost {calls:.2f}" in said


def test_ranks_wait_longer_for_a_slow_judge(monkeypatch):
    cfg = config("x", judge="http://h/v1", judge_parallel=4, judge_timeout=50.0, judge_retries=1, timeout=1)
    assert judge_http.patience(cfg, 9) == 3 * 2 * 2 * 60  # rounds, tries, calls a try, seconds with the pause
    assert judge_http.patience(config("x"), 9) == 0
    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(common.dist, "init_process_group", lambda backend, timeout: given.update(s=timeout.seconds))
    common.setup(stage4_latent_rl.Config(timeout=1), patience=720)
    assert given == {"s": 60 + 720}


@pytest.mark.all
def test_a_slow_judge_is_no_dead_rank(server, flags, runs, tmp_path):
    """The judge takes over a minute for one rank's responses. The other waits, though --timeout is a minute."""
    server.begin(seconds=-25)
    argv = rl(flags, runs, server, tmp_path / "rl", "--timeout", "1", "--judge-parallel", "1")
    for flag, value in {"--judge-timeout": "60", "--steps": "1", "--batch": "1", "--group": "4"}.items():
        argv[argv.index(flag) + 1] = value
    (tmp_path / "work.json").write_text(json.dumps({"runs": [["stage4_latent_rl", argv]]}))
    done = launch(["tests/faulty.py", str(tmp_path / "work.json")], seconds=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert common.read_metrics(tmp_path / "rl")[0]["judge_seconds"] > 70
