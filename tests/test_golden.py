"""convert/golden.py: questions are answered by a real process of judge_server.py, and each of them once."""

import pytest
from test_http_judge import KEY, Server
from test_pcogalign import pcogalign, records

from convert.golden import main
from convert.pcogalign import convert_pcogalign

pytest.importorskip("openai", reason="requirements-judge.txt")


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    monkeypatch.delenv("http_proxy", raising=False)
    one = Server(tmp_path)
    yield one
    one.end()


@pytest.fixture
def folder(tmp_path):
    """26 questions, of which every second one has a picture of 84 x 56 pixels, the others one of 56 x 56."""
    pcogalign(tmp_path / "in", golden=False)
    convert_pcogalign(tmp_path / "in", tmp_path / "data")
    return tmp_path


def ask(server, folder, *more):
    queries, out = f"{folder}/data/queries.jsonl", f"{folder}/answers.jsonl"
    main([queries, "--url", server.url, "--model", "m", "--out", out, "--parallel", "3", *more])


def said(folder):
    return {r["id"]: r["golden_response"] for r in records(folder / "answers.jsonl")}


def test_every_question_is_answered_and_the_converter_takes_the_answers(folder, server, capsys):
    """The server repeats the question. Status 500 passes; an answer that is cut off is not kept, and is asked again."""
    with pytest.raises(SystemExit) as e:
        ask(server.begin("ok", "500", "length"), folder)
    assert e.value.code == 2 and "8 of 26 questions have no answer" in capsys.readouterr().err
    assert len(said(folder)) == 18
    ask(server, folder)
    assert "26 answers, 8 of them new" in capsys.readouterr().out
    asked = {r["id"]: r["messages"][1]["content"] for r in records(folder / "data/queries.jsonl")}
    said_of = "Here they are.\n\nYou ask: "
    assert said(folder) == {name: said_of + text.removeprefix("<image>") for name, text in asked.items()}
    assert len(server.answered("ok")) == 26 and len(set(server.answered("ok"))) == 26
    assert {tuple(line) for line in server.lines() if line[0] == "picture"} == {
        ("picture", "84", "56"),
        ("picture", "56", "56"),
    }
    counts = convert_pcogalign(folder / "in", folder / "out", folder / "answers.jsonl")
    assert counts["task_b_demos"]["records"] == 10 and not counts["refused"]


@pytest.mark.parametrize("fault", ["401", "404", "no server"])
def test_what_would_fail_for_all_ends_it_at_once(folder, server, capsys, fault, monkeypatch):
    if fault != "no server":
        server.begin(fault)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    with pytest.raises(SystemExit) as e:
        ask(server, folder)
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1 and f"error: --url {server.url}" in error
    assert KEY not in error and not said(folder)
    assert len(server.lines()) < 26


def test_a_model_that_reasons_needs_its_flag(folder, server, capsys):
    with pytest.raises(SystemExit):
        ask(server.begin("reasoning"), folder)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: --model m: the server refuses (BadRequestError")
    assert "needs --reasoning" in error and len(server.answered("reasoning")) < 26 and not said(folder)
    ask(server, folder, "--reasoning")
    assert len(said(folder)) == 26
