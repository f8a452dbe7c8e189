"""lecture/worked_example.md: its numbers, worked out once more in plain numpy, without a function of the project."""

import numpy as np
import pytest
from helpers import ROOT

from lecture import worked_example as W

PAGE = (ROOT / "lecture" / "worked_example.md").read_text()
E = np.array([(1.4, 0.2), (0.2, 1.4), (1.0, 1.0)])  # states after red, blue, end
H = np.array([(3.0, 0.0), (0.0, 3.0), (2.4, 2.4)])
RED, BLUE, END = 0, 1, 2
ANSWERS = ([(0, RED), (1, END)], [(0, RED), (0, RED), (1, END)], [(1, BLUE), (0, END)], [(1, BLUE)] * 3)
REWARDS = np.array([5, 7, 3, 1]) / 5


@pytest.fixture(scope="module")
def n():
    return W.numbers()


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def near(a, b, atol=2e-5):
    a = a.detach().numpy() if hasattr(a, "detach") else a
    np.testing.assert_allclose(a, b, atol=atol, rtol=0)


def speak(e, c):
    """The world model by its formula -> probabilities of red, blue, end."""
    s1, s2 = 0.5 * (e.sum() + c.sum()), 0.2 * e[0] + c[0] - c[1]
    u = s1 / (1 + np.exp(-s1)) * s2
    x = e + np.array([0.7, -0.7]) * u
    y = x * np.sqrt((e**2).mean() / (x**2).mean())
    return softmax(H @ y)


def test_the_page_is_what_the_script_writes():
    assert W.page() == PAGE


def test_world_model(n):
    said = {}
    for (state, code), found in n["world"].items():
        p = speak(E[state], np.eye(2)[code])
        near(found["p"], p)
        said[state, code] = ("red", "blue", "end")[p.argmax()]
        assert found["says"] == said[state, code]
    assert len(said) == 6 and said[END, 0] == "red" and said[BLUE, 0] == "end"


def test_inverse_dynamics_and_its_straight_through_gradient(n):
    i, u, tau = n["inverse"], np.array([(0.4, 0.9), (0.5, 0.5)]), 2
    scores = np.array([(0.5 * 1.4 - 0.5 * 0.2, 0.2 * 0.2), (0.0, 0.2)])
    noisy = scores - np.log(-np.log(u))
    near(i["logits"], scores)
    assert i["chosen"].tolist() == noisy.argmax(-1).tolist() == [1, 1]
    assert i["codes"].tolist() == scores.argmax(-1).tolist() == [0, 1]
    steps = ((END, RED), (RED, END))
    near(i["nll"], [-np.log(speak(E[b], np.eye(2)[1])[a]) for b, a in steps])
    near(i["total"], -np.log(speak(E[END], np.eye(2)[1])[RED]) - np.log(speak(E[RED], np.eye(2)[1])[END]))
    p = softmax(scores)
    H_M = -(p * np.log(p)).sum(-1)
    near(i["entropy"], H_M)
    near(i["auxiliary"], -0.001 * H_M.sum(), 1e-7)
    soft, d = softmax(noisy / tau), 1e-5
    for k, (before, after) in enumerate(steps):
        c = np.eye(2)[1]
        change = [
            np.log(speak(E[before], c - x)[after]) - np.log(speak(E[before], c + x)[after]) for x in d * np.eye(2)
        ]
        v = np.array(change) / (2 * d)  # the loss's gradient by the code vector, by differences
        near(i["by_c"][k], v, 1e-3)
        bonus = 0.001 * p[k] * (np.log(p[k]) + H_M[k])  # of -0.001 H by the scores
        near(i["gradient"][k], soft[k] * (v - soft[k] @ v) / tau + bonus, 1e-3)


def test_policy_and_cloning(n):
    p = softmax(E @ np.array(W.POLICY).T)
    near(n["update"]["grpo"]["before"], p)
    near(n["cloning"]["loss"], -np.log(p[END, 0]) - np.log(p[RED, 1]))
    assert n["cloning"]["hits"] == (p[END, 0] > 0.5) + (p[RED, 1] > 0.5) == 1


def advantages(kind):
    adv = REWARDS - REWARDS.mean()
    return adv if kind == "dr_grpo" else adv / np.sqrt((adv**2).sum() / 3)


def weight(kind, answer):
    return {"grpo": 1 / (4 * len(answer)), "dr_grpo": 1 / (4 * 3)}.get(kind, 1 / 10)


def after_one_step(kind):
    """W, b after one step of gradient descent on weight * A * log pi; its gradient at the scores, by state."""
    W_KD, b_K = np.array(W.POLICY), np.zeros(2)
    by_W, by_b, by_state = np.zeros((2, 2)), np.zeros(2), np.zeros((3, 2))
    for adv, answer in zip(advantages(kind), ANSWERS):
        state = END
        for code, token in answer:
            pull = weight(kind, answer) * adv * (softmax(W_KD @ E[state]) - np.eye(2)[code])
            by_state[state] += pull
            by_W, by_b, state = by_W + np.outer(pull, E[state]), by_b + pull, token
    return W_KD - by_W, b_K - by_b, by_state


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_group_and_first_update(n, kind):
    x = n["update"][kind]
    assert x["texts"] == ["red end", "red red end", "blue end", "blue blue blue"]
    near(x["r"], REWARDS)
    near(x["adv"], advantages(kind))
    near(x["loss"], 0)
    new_W, new_b, by_state = after_one_step(kind)
    near(x["by_state"], by_state)
    near(x["weight"], new_W)
    near(x["bias"], new_b)
    near(x["after"], softmax(E @ new_W.T + new_b))


@pytest.mark.parametrize("kind, high", [("grpo", 1.2), ("dr_grpo", 1.2), ("dapo", 1.28), ("bnpo", 1.2)])
def test_second_update(n, kind, high):
    new_W, new_b, _ = after_one_step(kind)
    old, new, loss = softmax(E @ np.array(W.POLICY).T), softmax(E @ new_W.T + new_b), 0
    for k, (adv, answer) in enumerate(zip(advantages(kind), ANSWERS)):
        state = END
        for t, (code, token) in enumerate(answer):
            ratio = new[state, code] / old[state, code]
            k3 = 1 / ratio - 1 + np.log(ratio)
            s = min(ratio * adv, min(max(ratio, 0.8), high) * adv)
            near(n["update"][kind]["ratio"][k, t], ratio)
            near(n["update"][kind]["k3"][k, t], k3)
            near(n["update"][kind]["losses"][k, t], -s + 0.01 * k3)
            loss, state = loss + weight(kind, answer) * (-s + 0.01 * k3), token
    near(n["update"][kind]["second"], loss)
