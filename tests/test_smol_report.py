"""studies/smol.py: the report of a finished run, here of the tiny world's; its numbers by hand where they have one."""

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CODES, CPU, alone, close

import common
from data import DataError
from model import LatentModel
from rewards import load_judge
from speaker import Response
from studies import smol, smol_speed
from studies import smol_measures as measures
from studies.smol_run import MODELS, SAID, Finished, agreement, nats

PLACES = {"stage1": "1", "stage2": "2", "stage3": "3", "sft": "sft", "rl_token": "4t", "rl_latent": "4"}


@pytest.fixture(scope="module")
def folder(runs, world, tmp_path_factory):
    """The session's runs under the names of `make smol`."""
    out = tmp_path_factory.mktemp("smol")
    for name, run in PLACES.items():
        (out / name).symlink_to(runs / run)
    (out / "data").symlink_to(world)
    return out


def settings(folder, *more):
    return ["--run", str(folder), "--rows", "2", "--contexts", "20", *more]


@pytest.fixture(scope="module")
def report(folder):
    smol.main(settings(folder))
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def run(folder, report):
    return Finished(common.parse_config(smol.Config, "", settings(folder)), CPU)


@pytest.fixture(scope="module")
def examples(run):
    """The references to four prompts, of different lengths, cut as answers are."""
    records = [r for rows in run.tests().values() for r in rows]
    return [run.continued(r, run.reference(r)) for r in records]


def by_hand(run, example):
    """-> (summed nats of the response, its tokens), from the logits of the row alone."""
    batch = alone(example)
    logp_TV = torch.log_softmax(run.vlm.head(run.vlm(batch))[0], -1)
    at = [t for t in range(1, len(example.ids)) if example.response[t]]
    return -sum(float(logp_TV[t - 1, example.ids[t]]) for t in at), len(at)


def test_every_part_is_reported(report, folder):
    assert list(report) == list(smol.PARTS)
    page = (folder / "report.md").read_text()
    assert "nan" not in page and all(f"| {model} |" in page for model in MODELS)
    assert (folder / "rl.png").stat().st_size > 0
    assert all(gib > 0.1 for gib in report["curves"]["peak_gib"].values())


def test_parts_are_made_anew_one_by_one(report, folder):
    path = folder / "report.json"
    old = report["picture"] | {"none": 123.0}
    path.write_text(json.dumps(report | {"losses": {}, "picture": old}))
    smol.main(settings(folder, "--parts", "losses,ablations"))
    assert json.loads(path.read_text()) == report | {"picture": old}
    path.write_text(json.dumps(report))
    with pytest.raises(DataError, match="no 'loses'"):
        smol.main(settings(folder, "--parts", "loses"))
    with pytest.raises(DataError, match="make smol"):
        smol.main(["--run", f"{folder}/data"])


def test_in_bfloat16_every_part_says_nearly_the_same(report, folder, tmp_path):
    """A real run on a CPU with bfloat16 reports in it, too. The answers are other ones, so only what does not hang on
    them is compared."""
    place = common.Place(torch.device("cpu"), torch.bfloat16, 0, 1)
    for path in filter(Path.is_dir, folder.iterdir()):
        (tmp_path / path.name).symlink_to(path)
    run, judge = Finished(common.parse_config(smol.Config, "", settings(tmp_path)), place), load_judge("rules")
    found = {part: make(run, judge) for part, make in smol.PARTS.items()}
    assert found["picture"] == pytest.approx(report["picture"], rel=0.02)
    for name, row in found["projector"].items():
        rounding = 2**-16 * row["square"]  # the square of a rounding to bfloat16
        assert row == pytest.approx(report["projector"][name], rel=0.05, abs=rounding)
    assert found["picture"] != report["picture"] and found["projector"] != report["projector"]
    assert found["losses"] == report["losses"] and found["ablations"] == report["ablations"]


def test_answers_are_drawn_again_when_a_model_is_newer(folder, run, monkeypatch):
    kept = (folder / SAID).read_text()
    monkeypatch.setattr(Finished, "draw", lambda self, name: {0.1: {"ID": [], "OOD": []}})
    assert run.said()["SFT"][0.1]["ID"]  # as they were drawn
    state = folder / "rl_token" / "ckpt-000002" / "state.json"
    os.utime(state, (0, 0))
    assert run.said()["SFT"] == {0.1: {"ID": [], "OOD": []}}
    os.utime(state, (1, 1))
    (folder / SAID).write_text(json.dumps(json.loads(kept) | {"drawn_with": run.drawn_with()}))


# ---------------------------------------------------------------------------------------------------------- by hand
def test_the_nats_of_a_text_are_those_of_its_tokens(run, examples):
    sums, counts = zip(*(by_hand(run, e) for e in examples))
    assert nats(run, examples) == pytest.approx(sum(sums) / sum(counts), abs=1e-4)


def test_a_continued_prompt_has_the_tokens_that_were_said(run):
    record = run.tests()["ID"][0]
    prompt = run.processor.example(record, prompt_only=True)
    e = run.continued(record, [5, 6, 7])
    assert (
        e.ids.tolist() == [*prompt.ids.tolist(), 5, 6, 7]
        and e.response.tolist() == [False] * len(prompt.ids) + [True] * 3
    )


def test_a_reference_ends_with_eos_or_is_cut(run):
    record, limit = run.tests()["ID"][0], run.settings["max_new"]

    def answered(text):
        return record | {"messages": [*record["messages"][:-1], {"role": "assistant", "content": text}]}

    ids, short = (run.processor.tokenizer(text)["input_ids"] for text in ("Yes. " * limit, "Yes."))
    assert run.reference(answered("Yes. " * limit)) == ids[:limit]
    assert run.reference(answered("Yes.")) == [*short, run.processor.eos_id]


def test_bits_a_byte_by_hand(run, report):
    """nats a token * tokens / bytes / log 2, of the answers that stage 2 has held out."""
    for kind in ("paired", "text"):
        rows = measures.held_out(run, kind)
        assert len(rows) == run.state("stage2")["config"]["val"]
        tokens = sum(int(e.response.sum()) for e in rows)
        length = sum(len(m["content"].encode()) for e in rows for m in e.record["messages"] if m["role"] == "assistant")
        for nat, bit in report["losses"][kind].values():
            assert bit == pytest.approx(nat * tokens / length / math.log(2), rel=1e-6)
        assert report["losses"][kind]["vlm"][0] == run.state("stage2")["val"][kind]["val_vlm"]


def test_a_policy_that_knows_the_codes_agrees(run, examples):
    """The inverse dynamics itself, one step early, in the place of the policy; then one that is always wrong."""
    latent = run.latent("stage3", *LatentModel.parts)

    class Ahead(torch.nn.Module):
        def forward(self, e_BTD, turn=0):
            return (
                50
                * torch.nn.functional.one_hot(
                    (latent.inverse(e_BTD).argmax(-1).roll(-1, 1) + turn) % CODES, CODES
                ).float()
            )

    latent.policy = Ahead()
    assert agreement(run, latent, examples) == {"agree": 1.0, "bc": pytest.approx(0, abs=1e-5)}
    monkey = latent.policy.forward
    latent.policy.forward = lambda e_BTD: monkey(e_BTD, 1)
    assert agreement(run, latent, examples) == {"agree": 0.0, "bc": pytest.approx(50, abs=1e-3)}


def test_a_world_model_that_does_nothing_goes_on_as_the_vlm(run, monkeypatch):
    """New merges change nothing, whatever the code; without P nor does the context. The trained run is not so."""
    torch.manual_seed(0)
    new = LatentModel(run.vlm.config, CODES, 1, 1, project=False)
    monkeypatch.setattr(Finished, "latent", lambda self, *names: new)
    for row in measures.go_on_table(run).values():
        assert row["share"] == row["context"] == row["any code"] == 1


def test_go_on_finds_the_code_that_leaves_the_vlm_alone(run, monkeypatch):
    """Every code but number 3 says one and the same token."""
    torch.manual_seed(0)
    new = LatentModel(run.vlm.config, CODES, 1, 1, project=False)
    token = run.vlm.head.weight[11] * 100

    def speaker():
        return lambda e_MD, a_M: torch.where((a_M == 3)[:, None], e_MD, token)

    monkeypatch.setattr(new, "speaker", speaker)
    monkeypatch.setattr(Finished, "latent", lambda self, *names: new)
    rows = measures.go_on_table(run)
    assert all(row["code"] == 3 and row["share"] == 1 for row in rows.values())


def test_the_mean_log_p_of_every_token(run, examples):
    y_MD = torch.cat([run.vlm(alone(e))[0] for e in examples])
    mean_V = torch.log_softmax(run.vlm.head(y_MD), -1).mean(0)
    close(measures.mean_log_p(run, y_MD, rows=5), mean_V)


def test_meanings_name_the_tokens_that_a_code_raises_and_lowers(run, monkeypatch):
    """Of two tokens that the data often has, each code raises one, the others stay, and one falls."""
    latent = run.latent("stage2", "world", "projector", "quantiser", "inverse")
    ids = torch.cat([torch.tensor(e.ids[1:][e.response[1:]]) for e in measures.held_out(run, "text")])
    up, down = torch.bincount(ids).topk(2).indices.tolist()
    change_V = torch.zeros(len(run.vlm.head.weight))
    change_V[up], change_V[down], change_V[-1] = 1.0, -1.0, 5.0  # the last is in no answer
    spoken = torch.ones(1, 1)
    monkeypatch.setattr(latent, "speak", lambda e_MD, a_M: spoken)
    monkeypatch.setattr(measures, "mean_log_p", lambda run, y: change_V if y is spoken else torch.zeros_like(change_V))
    monkeypatch.setattr(Finished, "latent", lambda self, *names: latent)
    decode = run.processor.tokenizer.decode
    rows = measures.meanings(run)
    assert len(rows) == 10 and rows[0]["share"] >= rows[1]["share"] > 0
    for row in rows:
        assert (row["raised"][0], row["lowered"][0]) == (decode([up]), decode([down]))


def test_a_picture_is_taken_away_or_changed(run):
    record = measures.with_picture(run)[0]
    assert record["images"] and "<image>" in record["messages"][-2]["content"] + record["messages"][0]["content"]
    none, other = measures.seen(record, []), measures.seen(record, ["x.png"])
    assert none["images"] == [] and not any("<image>" in m["content"] for m in none["messages"])
    assert other["images"] == ["x.png"] and other["messages"] == record["messages"]
    tokens = run.reference(record)
    with_it, without = run.continued(record, tokens), run.continued(none, tokens)
    assert with_it.pixels is not None and without.pixels is None
    assert with_it.ids[with_it.response].tolist() == without.ids[without.response].tolist() == tokens


def test_the_projector_s_errors_are_those_of_stage_1(run, report):
    """A projector that is the identity: its error is the identity's, and the way there and back loses nothing."""
    table = report["projector"]
    assert {"stage1", "stage2"} == set(table) and table["stage1"]["identity"] == table["stage2"]["identity"]
    assert table["stage1"]["mse"] != table["stage1"]["identity"]
    latent = copy.deepcopy(run.latent("stage1", "projector"))
    for mlp in (latent.projector.P.mlp, latent.projector.P_back.mlp):
        torch.nn.init.zeros_(mlp[-1].weight)
        torch.nn.init.zeros_(mlp[-1].bias)
    found = measures.projector_errors(run, latent)
    assert found["mse"] == found["identity"] and found["cycle"] == 0
    close(torch.tensor(found["shift"]), torch.tensor(math.sqrt(found["identity"] / found["square"])), 1e-6)


def test_what_rl_has_learnt_by_hand(run, report, monkeypatch):
    """Three prompts, two answers each: 1 before on average, and 2, 3, 4 at the end."""
    for by in report["learnt"].values():
        assert set(by) == {"before", "end"}  # these runs had no --val, so they have no best
        assert by["before"]["gain"] == by["before"]["error"] == 0 < by["before"]["reward"]
    rewards = {"sft": [[0, 2], [1, 1], [2, 0]], "rl_token": [[2, 2], [3, 3], [5, 3]]}
    rewards |= {"stage3": [[1, 1], [1, 1], [1, math.nan]], "rl_latent": [[1, 3], [math.nan, math.nan], [4, 4]]}
    monkeypatch.setattr(run, "agent", lambda folder: folder)
    monkeypatch.setattr(run, "records", lambda name: ["a", "b", "c"])
    said = lambda model, records, group, *_: [[Response(model, [], [])] * group for _ in records]  # noqa: E731
    monkeypatch.setattr(run, "speaker", said)
    monkeypatch.setattr(smol, "reward", lambda judge, records, texts: np.array(rewards[texts[0]]))
    found = smol.learnt(run, None)
    assert found["GRPO token"] == {
        "before": {"step": 0, "reward": 1, "top": pytest.approx(5 / 3), "gain": 0, "error": 0},
        "end": {"step": 2, "reward": 3, "top": pytest.approx(10 / 3), "gain": 2, "error": pytest.approx(3**-0.5)},
    }
    # the judge failed for all answers to one prompt: two gains are left, 1 and 3, with standard deviation sqrt 2
    end = {"step": 2, "reward": 3, "top": 3.5, "gain": 2, "error": pytest.approx(1)}
    assert found["GRPO latent"]["end"] == end


# --------------------------------------------------------------------------------------------------------- the speed
def test_the_speed_of_each_way_is_that_of_its_own_run(runs, tmp_path, monkeypatch):
    """Kept states are timed when they are read, not when they are written."""
    asked = []

    def take(script, settings):
        asked.append((settings["dtype"], settings["states"], Path(settings["out"]).name))
        Path(settings["out"]).mkdir(parents=True)
        return len(asked)

    monkeypatch.setattr(smol_speed, "take", take)
    monkeypatch.setitem(smol_speed.PARTS, "stage 1", ("stage1_projector", "1", {"steps": 7}))
    place, kept = tmp_path / "here", str(tmp_path / "here" / "states")
    found = smol_speed.measure(runs, "stage 1", place)
    assert found == {"float32": 1, "bfloat16": 2, "bfloat16, states kept": 4} and not place.exists()
    assert asked == [
        ("float32", "", "float32"),
        ("bfloat16", "", "bfloat16"),
        ("bfloat16", kept, "to be kept"),
        ("bfloat16", kept, "bfloat16, states kept"),
    ]


def test_six_dialogues_are_of_different_characters(report):
    found = report["dialogues"]
    assert {r["test"] for r in found} <= {"ID", "OOD"} and all(set(r["said"]) == set(MODELS) for r in found)


def test_a_code_shows_only_tokens_that_it_stood_for():
    ids_M = torch.tensor([7, 7, 7, 2, 5, 5])
    assert measures.most_often(ids_M, 2).tolist() == [7, 5]
    assert measures.most_often(ids_M, 8).tolist() == [7, 5, 2]
