"""Has exercise N of lecture/exercises.md been done? Says what it looked at, then PASS or FAIL, and why.

python lecture/check.py 4            # the exit status is 0 for PASS and 1 for FAIL
python lecture/check.py 4 --runs F   # looks for the runs in another folder than runs/lecture
"""

import argparse
import importlib
import json
import math
import random
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import common  # noqa: E402
from data import DataError, Processor  # noqa: E402
from model import LatentModel  # noqa: E402
from speaker import Speaker, texts  # noqa: E402
from stage4_latent_rl import ALGORITHMS, policy_loss  # noqa: E402
from tiny import world  # noqa: E402

CPU = common.Place(torch.device("cpu"), torch.float32, 0, 1)


class NotYet(Exception):
    """The exercise is not done; the message says what is missing."""


def want(done, why):
    if not done:
        raise NotYet(why)


def finished(run, stage):
    """-> (state, log) of a finished run."""
    want(Path(run).is_dir(), f"{run} is not there; run the command of the exercise first")
    state = checkpoint.read_state(run)
    want(state["stage"] == stage, f"{run} is a run of {state['stage']}, not of {stage}")
    want(state["finished"], f"{run} is not finished; give the same command again")
    return state, common.read_metrics(run)


def setting(state, name, value):
    got = state["config"][name]
    want(got == value, f"--{name.replace('_', '-')} was {got}, the exercise wants {value}")
    print(f"looked at: the run's settings. --{name.replace('_', '-')} is {value}")


# ------------------------------------------------------------------------------------------------- one a function
def codes_64(runs):
    run = runs / "ex1"
    state, _ = finished(run, "stage2_codebook")
    tensors, _ = checkpoint.load(run, "--out", ["stage2_codebook"], state["config"]["vlm"])
    shape = tuple(tensors["quantiser.codebook.weight"].shape)
    print(f"looked at: the codebook of {run}. It has {shape[0]} codes of width {shape[1]}")
    want(shape[0] == 64, f"the codebook has {shape[0]} codes, not 64")
    for kind, val in state["val"].items():
        print(f"  held out, {kind}: " + ", ".join(f"{name} {x:.3f}" for name, x in val.items()))


def cispo(runs):
    want("cispo" in ALGORITHMS, "stage4_latent_rl.ALGORITHMS has no 'cispo'")
    bound = 1 + ALGORITHMS["cispo"].clip_high
    ratios, adv = torch.tensor([[0.5, 2.0], [1.5, 9.0]]), torch.tensor([3.0, -1.0])
    logp = torch.log(ratios).requires_grad_()
    how = {"clip_low": 0.2, "clip_high": bound - 1, "beta": 0.0, "max_length": 2}
    policy_loss(logp, torch.zeros(2, 2), None, adv, torch.ones(2, 2), loss_type="cispo", **how).backward()
    by_hand = -ratios.clamp(max=bound) * adv[:, None] / 4
    print(f"looked at: the gradient at ratios {ratios.tolist()} with advantages {adv.tolist()}: {logp.grad.tolist()}")
    why = f"by hand it is {by_hand.tolist()}: -min(ratio, {bound:g}) A / tokens, at every token"
    want(torch.allclose(logp.grad, by_hand, atol=1e-5), why)


def short_answers(runs):
    try:
        judge = importlib.import_module("short_judge").short
    except (ImportError, AttributeError):
        raise NotYet("there is no short_judge.py with a function `short` in the repository's root") from None
    record = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "one two three four"}]}
    said = ["yes", "one two three four", "one two three four five", "a " * 12, "a " * 50]
    got = [entry["Short"] if entry and "Short" in entry else None for entry in judge([record] * 5, said)]
    print(f"looked at: short_judge.short, for answers of 1, 4, 5, 12 and 50 words: {got}")
    by_hand = [(10, 10), (10, 10), (9, 10), (2, 10), (1, 10)]
    want([x and tuple(map(float, x)) for x in got] == by_hand, f"the dimension Short should have the scores {by_hand}")
    state, log = finished(runs / "ex3", "stage4_latent_rl")
    setting(state, "judge", "short_judge:short")
    first, last = log[0]["length"], log[-1]["length"]
    print(f"looked at: the log of {runs / 'ex3'}. Tokens an answer: {first:.1f} at first, {last:.1f} at last")
    want(last < first, "the answers have not become shorter; take more steps")


def no_bonus(runs):
    state, log = finished(runs / "ex4", "stage2_codebook")
    setting(state, "entropy_bonus", 0.0)
    print(f"  entropy, nats: {log[0]['entropy']:.2f} at first, {log[-1]['entropy']:.2f} at last")


def local_mean(runs):
    counts, total, size = (2.0, 6.0), common.total, common.world_size
    common.total, common.world_size = lambda x: torch.tensor(sum(counts)), lambda: 2
    try:
        got = [float(common.share(torch.tensor(n))) for n in counts]
    finally:
        common.total, common.world_size = total, size
    print(f"looked at: common.share on two ranks, of which one holds 2 tokens and the other 6: {got}")
    want(got != [0.25, 0.25], "each sum is multiplied by ranks / all tokens = 2 / 8: that is the mean over all tokens")
    want(torch.allclose(torch.tensor(got), 1 / torch.tensor(counts)), "a local mean multiplies by 1/2 and 1/6")


def top_k(runs):
    state, log = finished(runs / "ex6", "stage4_latent_rl")
    setting(state, "top_k", 2)
    highest = max(row["entropy"] for row in log)
    gap = max(row["logp_gap_max"] for row in log)
    print(f"looked at: the log. Highest entropy {highest:.3f} nats; highest logp_gap_max {gap:.1e}")
    want(highest <= math.log(2) + 1e-4, "an entropy above log 2 = 0.693: that is not a choice between two codes")


def quantiser(runs):
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    torch.manual_seed(0)
    found = LatentModel(SimpleNamespace(**size), codes=16, inverse_blocks=1, policy_blocks=1).quantiser
    logits = torch.randn(50, 16, requires_grad=True)
    one, codes, _ = found(logits, torch.rand(50, 16))
    two, _, _ = found(logits, torch.rand(50, 16))
    print(f"looked at: LatentModel's quantiser, a {type(found).__name__}, with two draws of the noise")
    want(torch.equal(one, two), "the code vectors change with the noise")
    want(torch.allclose(one, found.vectors()[codes], atol=1e-5), "the code vectors are not those of the codes chosen")
    one.pow(2).sum().backward()
    want(logits.grad is not None and logits.grad.abs().max() > 0, "no gradient reaches the scores")
    print("  the same codes for both draws; they are rows of the codebook; the scores have a gradient")


def release_output(runs):
    state, log = finished(runs / "ex8", "stage2_codebook")
    setting(state, "world_output", "release")
    print(f"  L_inverse, nats a token: {log[0]['nll_paired']:.2f} at first, {log[-1]['nll_paired']:.2f} at last")
    print(f"  the bare VLM on held-out rows: {state['val']['paired']['val_vlm']:.2f}")


def one_rate(runs):
    rows = {}
    for side in ("latent", "token"):
        rows[side], log = finished(runs / f"ex9_{side}", "stage4_latent_rl")
        setting(rows[side], "actions", side)
        rewards = [row["reward"] for row in log if "reward" in row]
        k = max(1, min(5, len(rewards) // 2))
        print(f"  reward: {sum(rewards[:k]) / k:.3f} at first, {sum(rewards[-k:]) / k:.3f} at last, {k} steps each")
    for name in ("lr", "steps", "batch", "group", "loss_type", "beta", "seed", "judge", "prompts"):
        one, two = (rows[side]["config"][name] for side in rows)
        want(one == two, f"--{name.replace('_', '-')} is {one} on one side and {two} on the other")
    print("looked at: the settings of both runs. The rate and all that matters beside it are the same")


def own_role(runs):
    path = runs / "my_role.json"
    want(path.is_file(), f"{path} is not there")
    try:
        role = world.Role(**json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise NotYet(f"{path} does not hold the five strings of a role ({e})") from None
    phrases = (role.greeting, role.farewell, role.saying)
    pools = (*world.GREETINGS, *world.FAREWELLS, *world.SAYINGS)
    known = [phrase for phrase in phrases if phrase in pools and not world.held_out(phrase)]
    want(not known, f"{', '.join(known)}: stands in the training data; choose another phrase")
    said = answers(role)
    for text in said:
        print(f"  {text}")
    parts = (role.greeting, role.farewell, role.saying, role.word)
    counts = [sum(part.lower() in text.lower() for text in said) for part in parts]
    print(f"looked at: {len(said)} answers of tiny/agent/rl_latent. Greeting, farewell, saying, word: {counts}")
    want(counts[0] > len(said) / 2, "fewer than half of the answers have the greeting")


def answers(role):
    """-> what the shipped agent says in this role to four pictures, one question each."""
    rng, records, agent = random.Random(0), [], str(ROOT / "tiny" / "agent" / "rl_latent")
    vlm_name = str(ROOT / "tiny" / "vlm")
    vlm, latent, _ = common.load_agent(agent, "latent", vlm_name, CPU)
    speaker = Speaker(SimpleNamespace(batch=8, seed=0, max_new=64), Processor(vlm_name), CPU)
    with tempfile.TemporaryDirectory() as folder:
        for k in range(4):
            record, scene = world.task_record(role, rng, test=True)
            world.draw_scene(scene, rng).save(f"{folder}/{k}.png")
            records.append(record | {"images": [f"{folder}/{k}.png"]})
        said = speaker((vlm, latent), records, 1, 0, 0)
    return [text for samples in texts(said) for text in samples]


CHECKS = (codes_64, cispo, short_answers, no_bonus, local_mean, top_k, quantiser, release_output, one_rate, own_role)


def check(number, runs):
    """-> whether exercise `number` is done; prints what was looked at."""
    try:
        CHECKS[number - 1](Path(runs))
    except (NotYet, DataError) as e:
        print(f"FAIL exercise {number}: {e}")
        return False
    print(f"PASS exercise {number}")
    return True


def main(argv=None):
    parser = argparse.ArgumentParser(description="Has exercise N of lecture/exercises.md been done?")
    parser.add_argument("number", type=int, choices=range(1, len(CHECKS) + 1), help="of the exercise")
    parser.add_argument("--runs", default=str(ROOT / "runs" / "lecture"), help="folder with the runs ex1, ex3, ...")
    args = parser.parse_args(argv)
    return 0 if check(args.number, args.runs) else 1


if __name__ == "__main__":
    sys.exit(main())
