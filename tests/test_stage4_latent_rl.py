"""stage4_latent_rl.py: advantages, clip, KL and normalisers by hand; what an update trains, and in parts."""

import copy
import importlib
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, ROOT, TINY, assert_only, draws, generate, names_of, snapshot, weights

import checkpoint
import common
import stage4_latent_rl
from answers import Answers, code_use
from common import parse_config
from data import DataError, Records
from rollout import Rollout
from stage4_latent_rl import (
    ALGORITHMS,
    Agent,
    Config,
    group_advantages,
    k3,
    policy_loss,
    summary,
    token_losses,
    token_weights,
    update,
)
from vlm import VLM

LN = math.log
EVERY = pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
BOTH = pytest.mark.parametrize("actions", ["latent", "token"])
PLAIN = {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.0, "max_length": 5}


def test_the_family_is_complete():
    assert list(ALGORITHMS) == ["grpo", "dr_grpo", "dapo", "bnpo"]
    assert {k: a.label for k, a in ALGORITHMS.items()}["dr_grpo"] == "Dr.GRPO"


# ------------------------------------------------------------------------------------------------- advantages
def test_advantages_by_hand():
    # rewards 1, 2, 3, 6: mean 3, deviations -2 -1 0 3, sum of squares 14, unbiased variance 14/3
    r = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])
    deviations = torch.tensor([-2.0, -1.0, 0.0, 3.0])
    for loss_type in ("grpo", "dapo", "bnpo"):
        adv = group_advantages(r, loss_type)
        assert torch.allclose(adv[0], deviations / math.sqrt(14 / 3), atol=1e-5)
        assert (adv[1] == 0).all()
    adv = group_advantages(r, "dr_grpo")
    assert torch.allclose(adv[0], deviations) and (adv[1] == 0).all()
    with pytest.raises(ValueError, match="ppo"):
        group_advantages(r, "ppo")


def test_equal_rewards_give_no_advantage_even_with_rounding():
    r = torch.full((1, 8), 0.1) + torch.tensor([0, 1e-8] * 4)
    assert (group_advantages(r, "grpo") == 0).all()


def test_failed_judgement_is_left_out_of_the_statistics():
    nan = float("nan")
    adv = group_advantages(torch.tensor([[1.0, nan, 3.0], [nan, nan, nan], [nan, 2.0, nan]]), "grpo")
    # mean 2 of the two that are there, unbiased std sqrt(2); a group with one or none has nothing to compare
    want = [[-1 / math.sqrt(2), 0.0, 1 / math.sqrt(2)], [0.0] * 3, [0.0] * 3]
    assert torch.allclose(adv, torch.tensor(want), atol=1e-5)


# ---------------------------------------------------------------------------------------------- token losses
def test_k3_by_hand():
    # d = ln 2: 2 - ln 2 - 1 = 1 - ln 2; d = 0: 0; d = -ln 2: 1/2 + ln 2 - 1; never negative
    got = k3(torch.tensor([0.0, -1.0, 0.0]), torch.tensor([LN(2), -1.0, -LN(2)]))
    assert torch.allclose(got, torch.tensor([1 - LN(2), 0.0, LN(2) - 0.5]))


def one(ratio, adv, **settings):
    """Loss and gradient of one sequence of one token."""
    logp = torch.tensor([[LN(ratio)]], requires_grad=True)
    zeros, ones = torch.zeros(1, 1), torch.ones(1, 1)
    settings = PLAIN | {"max_length": 1} | settings
    loss = policy_loss(logp, zeros, None, torch.tensor([adv]), ones, loss_type="grpo", **settings)
    loss.backward()
    return loss.item(), logp.grad.item()


@pytest.mark.parametrize(
    "ratio, adv, loss, grad",
    [
        (1.0, 2.0, -2.0, -2.0),  # on policy: loss -A, gradient -A
        (1.1, 2.0, -2.2, -2.2),  # inside the clip: -ratio A
        (1.5, 2.0, -2.4, 0.0),  # good and already likelier: clipped at 1.2, no gradient
        (0.5, 2.0, -1.0, -1.0),  # good and less likely: not clipped
        (1.5, -2.0, 3.0, 3.0),  # bad and likelier: not clipped
        (0.5, -2.0, 1.6, 0.0),  # bad and already less likely: clipped at 0.8
    ],
)
def test_clip_cases(ratio, adv, loss, grad):
    assert one(ratio, adv) == (pytest.approx(loss, abs=1e-5), pytest.approx(grad, abs=1e-5))


def test_clip_higher():
    assert one(1.25, 1.0, clip_high=0.28)[0] == pytest.approx(-1.25, abs=1e-5)
    assert one(1.5, 1.0, clip_high=0.28)[0] == pytest.approx(-1.28, abs=1e-5)


def test_kl_enters_with_beta_and_padding_is_ignored():
    logp = torch.tensor([[0.0, float("-inf")]])
    ref, mask = torch.tensor([[LN(2), 123.0]]), torch.tensor([[1, 0]])
    got = policy_loss(logp, logp, ref, torch.zeros(1), mask, loss_type="grpo", **PLAIN | {"beta": 0.5})
    assert got.item() == pytest.approx(0.5 * (1 - LN(2)))


# ------------------------------------------------------------------------------------------------ normalisers
def test_normalisers_by_hand():
    """Two sequences of 1 and 3 tokens, ratio 1, advantages 4 and -2, beta 0: token losses -4 | 2 2 2."""
    zeros, mask, adv = torch.zeros(2, 3), torch.tensor([[1, 0, 0], [1, 1, 1]]), torch.tensor([4.0, -2.0])

    def loss(kind, **settings):
        return policy_loss(zeros, zeros, zeros, adv, mask, loss_type=kind, **PLAIN, **settings).item()

    assert loss("grpo") == pytest.approx((-4 + 2) / 2)  # means of -4 and of 2
    assert loss("dr_grpo") == pytest.approx((-4 + 6) / 10)  # sum 2 over N * max_length = 10
    assert loss("dapo", num_tokens=8) == pytest.approx(2 / 8)  # 8 tokens on all ranks together
    assert loss("bnpo") == pytest.approx(2 / 4)  # 4 tokens here


WEIGHTS = {  # of two sequences with 1 and 3 tokens, max_length 5
    "grpo": [[1 / 2, 0, 0], [1 / 6, 1 / 6, 1 / 6]],  # 1 / (N * own tokens)
    "dr_grpo": [[1 / 10, 0, 0], [1 / 10, 1 / 10, 1 / 10]],  # 1 / (N * max_length)
    "dapo": [[1 / 4, 0, 0], [1 / 4, 1 / 4, 1 / 4]],  # 1 / tokens
    "bnpo": [[1 / 4, 0, 0], [1 / 4, 1 / 4, 1 / 4]],
}
ELSEWHERE = {  # the same rank where the global batch has 4 rows and 8 tokens
    "grpo": [[1 / 4, 0, 0], [1 / 12, 1 / 12, 1 / 12]],
    "dr_grpo": [[1 / 20, 0, 0], [1 / 20, 1 / 20, 1 / 20]],
    "dapo": [[1 / 8, 0, 0], [1 / 8, 1 / 8, 1 / 8]],
    "bnpo": WEIGHTS["bnpo"],  # local, whatever the others have
}


@EVERY
def test_token_weights_by_hand(loss_type):
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    here = token_weights(mask, loss_type, 5)
    assert torch.allclose(here, torch.tensor(WEIGHTS[loss_type])) and here.dtype == torch.float32
    there = token_weights(mask, loss_type, 5, rows=4, tokens=8)
    assert torch.allclose(there, torch.tensor(ELSEWHERE[loss_type]))


@EVERY
def test_a_row_that_is_left_out_has_no_weight_and_counts_nowhere(loss_type):
    """Three rows, of which the last takes no part: the weights of the others are those of two rows."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]]).bool()
    got = token_weights(mask, loss_type, 5, rows=2, tokens=4)
    assert torch.allclose(got, torch.tensor(WEIGHTS[loss_type] + [[0.0, 0, 0]]))
    nothing = token_weights(torch.zeros(2, 3).bool(), loss_type, 5, rows=1, tokens=1)
    assert (nothing == 0).all()


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_ranks_weigh_tokens_as_one_process_does(loss_type):
    """Two ranks of two rows; gradients are averaged over ranks, so each takes half of the global counts."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
    whole = token_weights(mask, loss_type, 5)
    ranks = [token_weights(mask[k : k + 2], loss_type, 5, rows=4 / 2, tokens=9 / 2) for k in (0, 2)]
    assert torch.allclose(torch.cat(ranks) / 2, whole)


# -------------------------------------------------------------------------------- the loss in another's words
LENGTHS, MAX_LENGTH, BETA = (2, 5, 1, 4), 6, 0.3
LOW, HIGH = 0.2, 0.28


def random_batch():
    """Four responses of different lengths, ratios on both sides of the clip -> logp, old, ref, adv, mask."""
    torch.manual_seed(0)
    old = -torch.rand(4, 5) - 0.5
    logp, ref = old + 0.4 * torch.randn(4, 5), old + 0.4 * torch.randn(4, 5)
    adv = torch.tensor([1.5, -0.5, 0.7, -2.0])
    return logp, old, ref, adv, torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def plain_token_loss(logp, old, ref, adv):
    """One token, from the equations at the top of the stage."""
    ratio = math.exp(logp - old)
    s = min(ratio * adv, max(1 - LOW, min(1 + HIGH, ratio)) * adv)
    kl = math.exp(ref - logp) - (ref - logp) - 1
    return -s + BETA * kl


def plain_loss(loss_type, rows=(0, 1, 2, 3)):
    logp, old, ref, adv, _ = random_batch()
    sequences = []
    for n in rows:
        places = [(n, t) for t in range(LENGTHS[n])]
        sequences.append([plain_token_loss(*(x[p].item() for x in (logp, old, ref)), adv[n].item()) for p in places])
    every = [loss for tokens in sequences for loss in tokens]
    if loss_type == "grpo":
        return sum(sum(tokens) / len(tokens) for tokens in sequences) / len(sequences)
    if loss_type == "dr_grpo":
        return sum(every) / (len(sequences) * MAX_LENGTH)
    return sum(every) / len(every)  # dapo, bnpo


@EVERY
def test_policy_loss_is_the_straightforward_formula(loss_type):
    settings = {"clip_low": LOW, "clip_high": HIGH, "beta": BETA, "max_length": MAX_LENGTH}
    logp, old, ref, adv, mask = random_batch()
    ratio = (logp - old).exp()[mask]
    assert (ratio < 1 - LOW).any() and (ratio > 1 + HIGH).any()
    got = policy_loss(logp, old, ref, adv, mask, loss_type=loss_type, **settings)
    assert got.item() == pytest.approx(plain_loss(loss_type), rel=1e-5)


@EVERY
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_loss_of_the_whole_is_the_sum_of_its_parts(loss_type, size):
    """Values and gradients, with the weights of the whole."""
    settings = {"clip_low": LOW, "clip_high": HIGH, "beta": BETA, "max_length": MAX_LENGTH, "loss_type": loss_type}
    logp, old, ref, adv, mask = random_batch()
    logp.requires_grad_(True)
    weights = token_weights(mask, loss_type, MAX_LENGTH)
    (whole_gradient,) = torch.autograd.grad(policy_loss(logp, old, ref, adv, mask, **settings), logp)
    parts = []
    for k in range(0, 4, size):
        s = slice(k, k + size)
        parts.append(policy_loss(logp[s], old[s], ref[s], adv[s], mask[s], weights_NT=weights[s], **settings))
    assert sum(parts).item() == pytest.approx(plain_loss(loss_type), rel=1e-5)
    (gradient,) = torch.autograd.grad(sum(parts), logp)
    assert torch.allclose(gradient, whole_gradient, atol=1e-7) and gradient.abs().max() > 0.01


def test_the_loss_is_the_weighted_sum_of_the_token_losses():
    logp, old, ref, adv, mask = random_batch()
    losses = token_losses(logp, old, ref, adv, mask, LOW, HIGH, BETA)
    assert (losses[~mask] == 0).all()
    for n, length in enumerate(LENGTHS):
        for t in range(length):
            want = plain_token_loss(*(x[n, t].item() for x in (logp, old, ref, adv[:, None].expand(4, 5))))
            assert losses[n, t].item() == pytest.approx(want, rel=1e-4)


# --------------------------------------------------------------------------------------------------- an update
@pytest.fixture
def agent_of(trainee, vlm, never, monkeypatch):
    """agent_of("latent", beta=0.1): an Agent on the shared VLM, or on a VLM of its own that trains."""

    def agent(actions="latent", **settings):
        parts = (vlm, trainee) if actions == "latent" else (VLM(TINY), None)
        if actions == "latent":
            trainee.train_only("policy")
        else:
            parts[0].train_last(8 / 36)
        arch = {"train_share": 8 / 36}
        monkeypatch.setattr(common, "load_agent", lambda *_: (*parts, arch))
        return Agent(Config(actions=actions, **settings), CPU, never)

    return agent


@pytest.fixture
def roll_of(processor, task_prompts):
    """roll_of(agent): two responses to each of two prompts."""

    def roll(agent, **settings):
        settings = {"group": 2, "eos": processor.eos_id} | settings
        return generate(agent.vlm, agent.latent, processor, task_prompts, draws(4, 12), **settings)

    return roll


def objective_of(agent):
    return common.wrap(agent.model, agent.logp)


ALL = torch.ones(4, dtype=torch.bool)


@BOTH
@EVERY
def test_only_the_policy_or_the_last_blocks_train(agent_of, roll_of, actions, loss_type):
    agent = agent_of(actions, loss_type=loss_type, beta=0.01)
    if actions == "token":
        modules = (agent.vlm, agent.reference)
        want = ["model." + n for n in agent.vlm.trained_tensors()]
        assert len(want) == 14
    else:
        modules = (agent.vlm, agent.latent, agent.reference)
        want = names_of(agent.latent, "policy")
    roll, before = roll_of(agent), snapshot(*modules)
    adv = group_advantages(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), loss_type).flatten()
    update(agent, objective_of(agent), roll, adv, ALL)
    assert_only(before[:-1], modules[:-1], want)
    assert_only(before[-1:], modules[-1:], [])  # the reference stays where RL began


def test_kl_is_finite_where_the_reference_would_sample_others(agent_of, roll_of):
    agent = agent_of(top_k=2)
    roll = roll_of(agent, top_k=2)
    with torch.no_grad():  # the two least likely actions become the reference's top two
        agent.reference.out.weight.neg_()
        agent.reference.out.bias.neg_()
    agent.step_weights.optimizer = torch.optim.SGD(agent.step_weights.params, lr=0.0)
    metrics = update(agent, objective_of(agent), roll, torch.zeros(4), ALL)
    assert 0 < metrics["kl"] < math.inf and torch.isfinite(metrics["grad_norm"])


def move(agent, roll, adv, keep, lr=1000.0, log=None):
    """Where one update moves the weights: minus the gradient, times a rate so large that rounding is small beside it.
    The weights are put back."""
    before = [p.detach().clone() for p in agent.step_weights.params]
    agent.step_weights.optimizer = torch.optim.SGD(agent.step_weights.params, lr=lr)
    metrics = update(agent, objective_of(agent), roll, adv, keep)
    if log is not None:
        log.append(metrics)
    with torch.no_grad():
        moved = torch.cat([(p - old).flatten() for p, old in zip(agent.step_weights.params, before)])
        for p, old in zip(agent.step_weights.params, before):
            p.copy_(old)
    return moved


def same_move(a, b):
    """Equal up to a ten-thousandth of the largest part of the move."""
    assert b.abs().max() > 0.1
    return (a - b).abs().max() < 1e-4 * b.abs().max()


@BOTH
@EVERY
def test_micro_batches_change_no_gradient(agent_of, roll_of, actions, loss_type):
    """With one row left out, and another advantage of it in the second update: it must not matter."""
    keep, adv = torch.tensor([True, True, True, False]), torch.tensor([-1.0, 1.0, 0.5, -0.5])
    other = torch.tensor([-1.0, 1.0, 0.5, 9.0])
    agent = agent_of(actions, loss_type=loss_type, clip_norm=0.0)
    roll, moves = roll_of(agent), []
    for micro, given in ((0, adv), (2, other)):
        agent.cfg.micro = micro
        moves.append(move(agent, roll, given, keep))
    assert same_move(moves[1], moves[0])
    assert not same_move(move(agent, roll, adv, ALL), moves[0])  # the row would have mattered


def test_micro_batches_log_the_same(agent_of, roll_of):
    logged = []
    for micro in (0, 2):
        agent = agent_of(micro=micro, beta=0.1)
        agent.step_weights.optimizer = torch.optim.SGD(agent.step_weights.params, lr=0.0)
        with torch.no_grad():
            agent.reference.out.bias.copy_(torch.linspace(-1, 1, 16))
        metrics = update(agent, objective_of(agent), roll_of(agent), torch.tensor([-1.0, 1, 0.5, -0.5]), ALL)
        logged.append({k: v.item() for k, v in metrics.items()})
    assert logged[1] == pytest.approx(logged[0], rel=1e-4)
    assert min(logged[0][k] for k in ("kl", "entropy", "grad_norm")) > 0.01 and logged[0]["clip_share"] == 0


@EVERY
def test_an_update_makes_good_responses_likelier(agent_of, roll_of, loss_type):
    agent = agent_of(loss_type=loss_type, lr=1e-3, beta=0.0)
    roll, adv = roll_of(agent), torch.tensor([1.0, -1.0, 1.0, -1.0])
    update(agent, objective_of(agent), roll, adv, ALL)
    with torch.no_grad():
        gain = ((agent.logp(agent.model, roll)[0] - roll.logp_NT) * roll.mask_NT).sum(1)
    assert (gain * adv > 0).all()


def test_several_updates_are_clipped_against_the_policy_that_sampled(agent_of, roll_of):
    """The second update on one rollout has ratios other than 1, and with a high rate they leave the clip."""
    shares = []
    for updates in (1, 2):
        agent = agent_of(updates=updates, lr=0.05)
        adv = torch.tensor([1.0, -1.0, 1.0, -1.0])
        shares.append(update(agent, objective_of(agent), roll_of(agent), adv, ALL)["clip_share"].item())
    assert shares[0] == 0 and shares[1] > 0.1


# ----------------------------------------------------------------------------------- another member of the family
@pytest.fixture
def with_one_more(tmp_path, monkeypatch):
    """The stage with ONE more entry in ALGORITHMS: the plain sum over tokens, clipped at 1.5."""
    entry = '    "total": Algorithm("Total", lambda mask_NT, rows, tokens, max_length: mask_NT, clip_high=0.5),\n'
    source = (ROOT / "stage4_latent_rl.py").read_text()
    assert source.count("ALGORITHMS = {\n") == 1
    (tmp_path / "stage4_and_one.py").write_text(source.replace("ALGORITHMS = {\n", "ALGORITHMS = {\n" + entry))
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("stage4_and_one")


def test_an_algorithm_is_one_entry(with_one_more, agent_of, roll_of, monkeypatch):
    """One entry brings the choice on the command line, the loss and the update."""
    stage = with_one_more
    cfg = parse_config(stage.Config, stage.__doc__, ["--loss-type", "total"])
    assert cfg.loss_type == "total"
    logp, old, ref, adv, mask = random_batch()
    settings = {"clip_low": LOW, "clip_high": HIGH, "beta": BETA, "max_length": MAX_LENGTH}
    got = stage.policy_loss(logp, old, ref, adv, mask, loss_type="total", **settings)
    assert got.item() == pytest.approx(plain_loss("dapo") * sum(LENGTHS), rel=1e-5)

    agent, high = agent_of(loss_type="total", beta=0.0), []
    roll, before = roll_of(agent), copy.deepcopy(agent.model.state_dict())
    real = stage.policy_loss
    monkeypatch.setattr(stage, "policy_loss", lambda *a, **k: high.append(k["clip_high"]) or real(*a, **k))
    stage.update(agent, objective_of(agent), roll, torch.tensor([1.0, -1.0, 1.0, -1.0]), ALL)
    assert high == [0.5]
    assert any((x - before[n]).abs().max() > 1e-5 for n, x in agent.model.state_dict().items())


@pytest.mark.parametrize("loss_type, flag, want", [("dapo", 0.0, 0.28), ("grpo", 0.0, 0.2), ("dapo", 0.4, 0.4)])
def test_the_upper_clip_is_the_algorithm_s_own_or_the_flag_s(agent_of, roll_of, monkeypatch, loss_type, flag, want):
    agent, high, real = agent_of(loss_type=loss_type, clip_high=flag), [], stage4_latent_rl.policy_loss
    monkeypatch.setattr(stage4_latent_rl, "policy_loss", lambda *a, **k: high.append(k["clip_high"]) or real(*a, **k))
    update(agent, objective_of(agent), roll_of(agent), torch.zeros(4), ALL)
    assert high == [want]


# ------------------------------------------------------------------------------------------------- what is logged
def test_summary_by_hand():
    """Two groups of two: rewards 1 and 3 (said alike), 2 and a failure. EOS is 9; the last response was cut off."""
    r_BG = torch.tensor([[1.0, 3.0], [2.0, float("nan")]])
    tokens_NT = torch.tensor([[5, 9, 0], [5, 9, 0], [6, 7, 9], [6, 7, 8]])
    mask_NT = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()
    roll = Rollout(None, 2, tokens_NT, mask_NT, torch.zeros(4, 3))
    got = summary(r_BG, group_advantages(r_BG, "grpo"), roll, ["five", "five", "six seven", "six seven eight"], 9)
    assert {k: float(v) for k, v in got.items()} == {
        "judge_failed": 1,
        "reward": 2.0,  # of the three that were judged
        "reward_std": 0.5,  # standard deviations 1 and 0
        "equal_groups": 0.5,  # one is left in the second group, so nothing to compare
        "different": 0.75,  # three texts among four
        "length": 2.5,
        "truncated": 0.25,
    }


def test_the_use_of_codes_counts_what_was_said():
    """Codes at padding do not count; a token-level rollout has none."""
    mask_NT = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    roll = Rollout(None, 2, torch.zeros(2, 3).long(), mask_NT, torch.zeros(2, 3), torch.tensor([[3, 0, 1], [3, 3, 0]]))
    latent = SimpleNamespace(quantiser=SimpleNamespace(codes=5))
    assert code_use(roll, latent) == {"use": [2, 0, 0, 3, 0]} and code_use(roll, None) == {}


@pytest.mark.filterwarnings("error")
def test_a_group_that_failed_as_a_whole_is_in_no_mean_of_the_log():
    """Rewards 1 and 3, and a group without any judgement: what is logged stays a number."""
    nan = float("nan")
    r_BG = torch.tensor([[1.0, 3.0], [nan, nan]])
    mask_NT = torch.ones(4, 3).bool()
    roll = Rollout(None, 2, torch.ones(4, 3).long(), mask_NT, torch.zeros(4, 3))
    got = summary(r_BG, group_advantages(r_BG, "grpo"), roll, ["a", "b", "c", "d"], 9)
    assert got["judge_failed"] == 2 and got["reward"] == 2.0 and got["reward_std"] == 1.0


# ------------------------------------------------------------------------------------------ in bfloat16, with top-k
@pytest.fixture(params=["float32", "bfloat16"])
def precision(request, monkeypatch):
    """The test runs twice, the second time as on a GPU: every forward pass under autocast."""
    autocast = lambda _: torch.autocast("cpu", torch.bfloat16, enabled=request.param == "bfloat16")  # noqa: E731
    monkeypatch.setattr(common.Place, "autocast", autocast)
    return request.param


@pytest.fixture
def cast_roll_of(roll_of):
    """roll_of, under the autocast of `precision`."""

    def roll(agent, **settings):
        with CPU.autocast():
            return roll_of(agent, **settings)

    return roll


SEESAW = torch.tensor([1.0, -1.0, 1.0, -1.0])


@BOTH
@pytest.mark.parametrize("top_k, lr", [(40, 1e-3), (4, 0.03)])
def test_top_k_with_several_updates_stays_finite(agent_of, cast_roll_of, precision, actions, top_k, lr):
    """The moved policy ranks others highest than those that it sampled from; what was sampled stays possible."""
    agent = agent_of(actions, top_k=top_k, updates=3, lr=lr, beta=0.01)
    roll = cast_roll_of(agent, top_k=top_k)
    metrics = update(agent, objective_of(agent), roll, SEESAW, ALL)
    assert all(math.isfinite(v) for v in metrics.values()) and metrics["kl"] > 0
    assert all(p.isfinite().all() for p in agent.step_weights.params)


@BOTH
def test_each_update_in_bfloat16_works_on_the_weights_of_the_one_before(
    trainee, agent_of, roll_of, monkeypatch, actions
):
    """Autocast keeps the weights that it has cast as long as it lasts. Around several updates they would be old ones,
    and the policy would seem to stand still."""
    kl, before = [], copy.deepcopy(trainee.state_dict())
    for enabled in (False, True):
        trainee.load_state_dict(before)
        on = lambda _, enabled=enabled: torch.autocast("cpu", torch.bfloat16, enabled=enabled)  # noqa: E731
        monkeypatch.setattr(common.Place, "autocast", on)
        agent = agent_of(actions, updates=3, beta=0.01)
        kl.append(update(agent, objective_of(agent), roll_of(agent), SEESAW, ALL)["kl"].item())
    assert kl[1] == pytest.approx(kl[0], rel=0.1)


@BOTH
def test_with_top_k_the_kl_starts_at_0(agent_of, cast_roll_of, precision, actions):
    agent = agent_of(actions, top_k=4)
    metrics = update(agent, objective_of(agent), cast_roll_of(agent, top_k=4), SEESAW, ALL)
    assert abs(metrics["kl"]) < 1e-6 and metrics["entropy"] > 0.01


# ------------------------------------------------------------------------------------- the ratio, and the rollout's gap
@BOTH
@pytest.mark.parametrize("updates", [1, 2])
def test_the_ratio_starts_at_1_whatever_the_rollout_logged(agent_of, roll_of, actions, updates):
    """Later updates compare with the first one's log-probabilities, too; what the rollout logged is compared apart."""
    agent = agent_of(actions, updates=updates, beta=0.0)
    roll, moved, logged = roll_of(agent), [], []
    tokens = roll.mask_NT.sum().item()
    for wrong in (0.0, 0.5):
        some = copy.copy(roll)
        some.logp_NT = torch.where(roll.mask_NT, roll.logp_NT + wrong, 0.0)
        some.logp_NT[0, 0] += wrong
        moved.append(move(agent, some, SEESAW, ALL, lr=3.0, log=logged))
    assert same_move(*moved) and logged[1]["clip_share"] == logged[0]["clip_share"]
    assert (logged[0]["clip_share"] > 0) == (updates > 1) and logged[0]["logp_gap_max"] < 1e-4
    assert logged[1]["logp_gap"].item() == pytest.approx(0.5 * (tokens + 1) / tokens, abs=1e-4)
    assert logged[1]["logp_gap_max"].item() == pytest.approx(1.0, abs=1e-4)


@BOTH
def test_in_bfloat16_the_ratio_starts_at_exactly_1(agent_of, processor, prompts, monkeypatch, actions):
    """The rollout's log-probabilities come from products of other shapes, and are others after rounding."""
    monkeypatch.setattr(common.Place, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16))
    agent, apart, real = agent_of(actions, temperature=2.0), [], stage4_latent_rl.policy_loss
    record = lambda logp, old, *a, **k: apart.append((logp - old).abs().max()) or real(logp, old, *a, **k)  # noqa: E731
    monkeypatch.setattr(stage4_latent_rl, "policy_loss", record)
    with CPU.autocast():
        roll = generate(agent.vlm, agent.latent, processor, prompts[:2], draws(4, 12), group=2, temperature=2.0)
    metrics = update(agent, objective_of(agent), roll, SEESAW, ALL)
    assert [x.item() for x in apart] == [0.0] and metrics["logp_gap_max"] > metrics["logp_gap"] > 0


# ------------------------------------------------------------------------------------------------- the judge fails
def test_a_step_without_any_judgement_has_no_reward():
    r_BG = torch.full((2, 2), float("nan"))
    roll = Rollout(None, 2, torch.ones(4, 3).long(), torch.ones(4, 3).bool(), torch.zeros(4, 3))
    got = summary(r_BG, group_advantages(r_BG, "grpo"), roll, ["a", "b", "c", "d"], 9)
    assert got["judge_failed"] == 4 and not {"reward", "reward_std"} & set(got)
    assert all(math.isfinite(v) for v in got.values())


@BOTH
def test_without_a_row_there_is_no_step(agent_of, roll_of, actions):
    """AdamW has momentum from the step before, and would move by it."""
    agent = agent_of(actions)
    roll, state = roll_of(agent), lambda: [x["step"].item() for x in agent.step_weights.optimizer.state.values()]
    assert update(agent, objective_of(agent), roll, SEESAW, ALL)["grad_norm"] > 0
    before, steps = snapshot(agent.model), state()
    assert update(agent, objective_of(agent), roll, torch.zeros(4), ~ALL) == {}
    assert_only(before, (agent.model,), [])
    assert state() == steps and all(p.grad is None for p in agent.step_weights.params)


@pytest.fixture
def run_of(tmp_path, world, vlm, trainee, monkeypatch):
    """run_of(judge, "--steps", "3"): stage 4 from the command line -> the rows of metrics.jsonl, read strictly."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    def run(judge, *flags):
        judge.costly = True  # the judges of these tests count their calls: they are not asked about the references
        monkeypatch.setattr(common, "load_agent", lambda *_: (vlm, trainee, {}))
        monkeypatch.setattr(stage4_latent_rl, "load_judge", lambda *_: judge)
        small = ["--batch", "2", "--group", "2", "--max-new", "4", "--temperature", "2"]
        places = ["--vlm", TINY, "--prompts", f"{world}/task_prompts.jsonl", "--out", str(tmp_path), "--judge", "mine"]
        try:
            stage4_latent_rl.main([*places, *small, *flags])
        finally:
            lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
            run.rows = [json.loads(line, parse_constant=refuse) for line in lines]
        return run.rows

    run.out = tmp_path
    return run


def steps_that_fail(*steps):
    """A judge that fails throughout in these calls (1 is the first), and else tells responses apart."""
    calls = []

    def judge(records, responses):
        calls.append(1)
        return [None if len(calls) in steps else {"Place": (1.0 + k, 5.0)} for k in range(len(responses))]

    return judge


def test_a_judge_that_fails_throughout_ends_the_run(run_of, trainee):
    """In one line, three steps later, with a checkpoint of the last step in which something was learnt."""
    start = copy.deepcopy(trainee.policy.state_dict())
    with pytest.raises(DataError, match="--judge mine: no response of 3 steps in a row .* from step 2"):
        run_of(steps_that_fail(3, 4, 5), "--steps", "9")
    assert [("reward" in row, row["judge_failed"]) for row in run_of.rows] == [(True, 0)] * 2 + [(False, 4)] * 3
    state, saved = checkpoint.read_state(run_of.out), weights(run_of.out)
    assert state["step"] == 2 and not state["finished"]
    now = trainee.policy.state_dict()
    assert all(torch.equal(saved[f"policy.{k}"], x) for k, x in now.items())
    assert not torch.equal(now["out.weight"], start["out.weight"])


def test_a_judge_that_fails_now_and_then_does_not_end_the_run(run_of):
    rows = run_of(steps_that_fail(1, 2, 4, 5), "--steps", "6")
    assert ["reward" in row for row in rows] == [False, False, True, False, False, True]
    assert all(("grad_norm" in row) == ("reward" in row) for row in rows)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("bad", [None, {}, {"Place": (math.inf, 5.0)}, {"Place": (1.0, 0.0)}, {"Place": (-1.0, 5.0)}])
def test_a_judge_that_fails_for_a_row_or_a_group(run_of, trainee, loss_type, bad):
    """The first row, and in the second step the whole first group: the rest is learnt from."""
    calls = []

    def judge(records, responses):
        calls.append(1)
        return [bad if k < len(calls) else {"Place": (1.0 + k, 5.0)} for k in range(len(responses))]

    rows = run_of(judge, "--steps", "2", "--loss-type", loss_type)
    assert [row["judge_failed"] for row in rows] == [1, 2]
    assert [row["reward"] for row in rows] == pytest.approx([3 / 5, 3.5 / 5], abs=1e-5)
    assert [row["reward_std"] for row in rows] == pytest.approx([0.05, 0.1], abs=1e-5)  # of 0 and .1; of .1 alone
    assert [row["equal_groups"] for row in rows] == [0.5, 0.5] and all(row["grad_norm"] > 0 for row in rows)
    assert all(p.isfinite().all() for p in trainee.policy.parameters())


# ---------------------------------------------------------------------------------------------- parts of any size
def test_micro_batches_cut_no_group_that_fits():
    """Nine rows in groups of three: at most so many rows a part, in order, none twice."""

    def sizes(micro):
        parts = stage4_latent_rl.micro_batches(9, 3, micro)
        assert [n for part in parts for n in range(9)[part]] == list(range(9))
        return [part.stop - part.start for part in parts]

    assert sizes(0) == [9] and sizes(1) == [1] * 9 and sizes(2) == [2, 1] * 3
    assert sizes(3) == [3] * 3 and sizes(5) == [3] * 3 and sizes(6) == sizes(8) == [6, 3] and sizes(99) == [9]


@BOTH
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_parts_of_a_group_give_the_whole_gradient(agent_of, processor, prompts, actions, micro):
    """Two prompts of different lengths, three responses to each, one of which takes no part."""
    agent = agent_of(actions, clip_norm=0.0, beta=0.1)
    roll = generate(agent.vlm, agent.latent, processor, prompts[:2], draws(6, 8), group=3, eos=processor.eos_id)
    adv, keep = torch.tensor([1.0, -0.5, 0.7, -1.0, 0.3, 2.0]), torch.arange(6) != 1
    whole = move(agent, roll, adv, keep)
    agent.cfg.micro = micro
    parts = move(agent, roll, adv, keep)
    assert (parts - whole).norm() < 1e-5 * whole.norm() and whole.abs().max() > 0.1


@pytest.mark.parametrize("flag, value, least", [("--temperature", "0", "0.01"), ("--group", "1", "2")])
def test_what_cannot_teach_is_refused(capsys, flag, value, least):
    """Without a temperature nothing is tried; a response alone has nothing to be compared with."""
    with pytest.raises(SystemExit):
        parse_config(Config, "", [flag, value])
    assert f"argument {flag}: {float(value) if '.' in least else value} is too small, it must be at least {least}" in (
        capsys.readouterr().err
    )


# -------------------------------------------------------------------------------------------------- drawn again
def equal_at(*equal):
    """A judge for one prompt a call or two, groups of two. equal: for each call the places of the groups that it finds
    equal; what it saw is in judge.seen."""

    def judge(records, responses):
        judge.seen.append(list(responses))
        now = equal[len(judge.seen) - 1]
        return [{"Place": (1.0 if k // 2 in now else 1.0 + k, 5.0)} for k in range(len(responses))]

    judge.seen = []
    return judge


@pytest.fixture
def collected(agent_of, processor, world):
    """collected(judge, resample): the answers to the first two prompts in step 5."""

    def collect(judge, resample, actions="latent"):
        agent = agent_of(actions, resample=resample, group=2, max_new=6, temperature=2.0)
        prompts = Records(world / "task_prompts.jsonl")
        return Answers(agent, processor, prompts, judge, lambda r: group_advantages(r, "dapo")).collect(5, [0, 1])

    return collect


@BOTH
def test_groups_with_equal_rewards_are_drawn_again_alone(collected, actions):
    """The second group twice, the first never; what stands in its place was judged last."""
    once, again = equal_at([1]), equal_at([1], [0], [])
    before, texts, r_BG, _, resampled = collected(once, 0, actions)
    assert resampled == 0 and r_BG[1, 0] == r_BG[1, 1]
    roll, new, r_BG, adv_BG, resampled = collected(again, 5, actions)
    assert resampled == 2 and [len(x) for x in again.seen] == [4, 2, 2]
    assert new[:2] == texts[:2] and new[2:] == again.seen[2] and r_BG[1].tolist() == pytest.approx([0.2, 0.4])
    assert (adv_BG[1] != 0).all()
    T = min(roll.tokens_NT.shape[1], before.tokens_NT.shape[1])
    assert torch.equal(roll.tokens_NT[:2, :T], before.tokens_NT[:2, :T])
    assert len({tuple(x) for x in (texts[2:], *again.seen[1:])}) > 1  # the noise is fresh


@BOTH
def test_a_judge_that_works_on_its_own_is_told_what_it_will_be_asked(collected, actions):
    judge, told = equal_at([1], [0], []), []
    judge.foresee = lambda _, responses: told.extend(responses)
    collected(judge, 5, actions)
    assert set(told) == {text for texts in judge.seen for text in texts}


def test_no_more_than_n_extra_draws(collected):
    judge = equal_at([0, 1], [0, 1], [0])
    assert collected(judge, 2)[-1] == 4 and len(judge.seen) == 3


def test_an_extra_draw_depends_on_its_number_and_not_on_its_neighbours(collected):
    alone, together, later = equal_at([1], []), equal_at([0, 1], []), equal_at([1], [0], [])
    for judge in (alone, together, later):
        collected(judge, 2)
    assert alone.seen[1] == together.seen[1][2:] == later.seen[1] != later.seen[2]


def test_a_run_with_extra_draws_counts_them_and_repeats(run_of, trainee):
    start, runs = copy.deepcopy(trainee.state_dict()), []
    for _ in range(2):
        trainee.load_state_dict(start)
        rows = run_of(equal_at([0], [0], [0], [], [0, 1], []), "--steps", "3", "--resample", "2")
        runs.append([{k: v for k, v in row.items() if k[:2] != "s_" and k != "seconds"} for row in rows])
        shutil.rmtree(run_of.out)
    assert [row["resampled"] for row in runs[0]] == [2, 0, 2] and runs[0] == runs[1]
    assert [row["equal_groups"] for row in runs[0]] == [0.5, 0, 0]
