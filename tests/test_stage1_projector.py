"""stage1_projector.py: what trains, the learning rate's schedule, what is saved and logged."""

import pytest
import torch
from helpers import TINY, snapshot, weights

import checkpoint
import common
import stage1_projector
from model import Gaussian, Projector


def argv(world, out, *more):
    return ["--vlm", TINY, "--paired", f"{world}/paired.jsonl", "--batch", "2", "--out", str(out), *more]


def test_only_the_projector_trains(world, tmp_path, monkeypatch):
    """Both of its directions move, the VLM stays bit-identical, and nothing else is saved."""
    made, real = [], stage1_projector.VLM

    def load(*args):
        made.append(real(*args))
        made.extend(snapshot(made[0]))
        return made[0]

    monkeypatch.setattr(stage1_projector, "VLM", load)
    stage1_projector.main(argv(world, tmp_path, "--steps", "2"))
    vlm, before = made
    assert not any(p.requires_grad for p in vlm.parameters())
    assert all(torch.equal(before[n], p) for n, p in vlm.named_parameters())
    torch.manual_seed(0)
    start, after = Projector(vlm.config.hidden_size).state_dict(), weights(tmp_path)
    assert set(after) == {f"projector.{n}" for n in start}
    assert all((after[f"projector.{n}"] - x).abs().max() > 1e-5 for n, x in start.items())


def test_the_learning_rate_rises_over_a_tenth_and_falls_to_0(world, tmp_path, monkeypatch):
    """Of 20 steps two warm up (a half, then all of it); the other 18 fall on a line that would reach 0 at step 20."""
    rates, real = [], common.Stepper.__call__

    def step(self, records):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return real(self, records)

    monkeypatch.setattr(common.Stepper, "__call__", step)
    stage1_projector.main(argv(world, tmp_path, "--steps", "20", "--lr", "0.01"))
    assert rates == pytest.approx([0.005, 0.01] + [0.01 * k / 18 for k in range(18, 0, -1)])


@pytest.mark.parametrize("mean, at_the_identity", [("skip", True), ("mlp", False)])
def test_the_first_step_s_error_is_that_of_the_mean_it_starts_from(world, tmp_path, mean, at_the_identity):
    stage1_projector.main(argv(world, tmp_path, "--steps", "1", "--mean", mean))
    (row,) = common.read_metrics(tmp_path)
    assert row["mse_identity"] > 0 and (row["mse"] == row["mse_identity"]) == at_the_identity
    assert row["refused"] == 0
    state = checkpoint.read_state(tmp_path)
    assert state["stage"] == "stage1_projector" and state["finished"] and state["config"]["mean"] == mean


def test_the_paper_s_mean_has_no_skip(world, tmp_path):
    stage1_projector.main(argv(world, tmp_path, "--steps", "1", "--mean", "mlp"))
    loaded = {n.removeprefix("projector.P."): x for n, x in weights(tmp_path).items() if ".P." in n}
    p = Gaussian(128, skip=False)
    p.load_state_dict(loaded)
    x = torch.zeros(1, 1, 128)
    assert (p.mean(x) - x).abs().max() > 1e-3
