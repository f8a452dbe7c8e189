"""The whole method with 2 codes, 3 tokens and width 2: every number from the hidden state to the updated policy.

Nothing is worked out here: the numbers come from the project's own functions. The VLM alone is replaced, by a table
of three states. `page` writes the numbers down, so that they can be worked out again on paper.

    python lecture/worked_example.py          # writes lecture/worked_example.md
"""

import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import Batch  # noqa: E402
from model import LatentModel, entropy, inverse_loss, straight_through_gumbel  # noqa: E402
from rewards import reward  # noqa: E402
from rollout import rollout_latent, sampled_logp  # noqa: E402
from stage3_bc import bc_loss  # noqa: E402
from stage4_latent_rl import ALGORITHMS, group_advantages, k3, policy_loss, token_losses, token_weights  # noqa: E402
from vlm import log_probs  # noqa: E402

TOKENS = ("red", "blue", "end")
RED, BLUE, END = range(3)  # the prompt is the token "end", which ended what was said before
STATES = ((1.4, 0.2), (0.2, 1.4), (1.0, 1.0))  # e after each token
HEAD = ((3.0, 0.0), (0.0, 3.0), (2.4, 2.4))  # a row for each token
CODES = ((1.0, 0.0), (0.0, 1.0))
MERGE = {
    "w1_x": [[0.5, 0.5]],
    "w1_c": [[0.5, 0.5]],
    "w2_x": [[0.2, 0.0]],
    "w2_c": [[1.0, -1.0]],
    "w3": [[0.7], [-0.7]],
}
INVERSE = ((0.5, -0.5), (0.0, 0.2))
POLICY = ((0.5, -0.1), (0.0, 0.2))
TAU, BONUS = 2.0, 0.001
NOISE = ((0.4, 0.9), (0.5, 0.5))  # u of the two trained positions, for each code
DRAWS = ((0.20, 0.90, 0.50), (0.30, 0.40, 0.70), (0.70, 0.20, 0.50), (0.80, 0.60, 0.95))  # u of four answers
RATE, LOW, BETA, LONGEST = 1.0, 0.2, 0.01, 3


# ------------------------------------------------------------------------------------------------------ the pieces
class TableVLM:
    """In place of the frozen VLM: the state after a token depends on that token alone."""

    def __init__(self):
        self.states, self.text = torch.tensor(STATES), SimpleNamespace(layers=[])
        self.head = nn.Linear(2, 3, bias=False).requires_grad_(False)
        self.head.weight.copy_(torch.tensor(HEAD))

    def positions(self, batch):
        return None, torch.zeros_like(batch.ids_BT[:, :1])

    def __call__(self, batch, cache=None, positions=None):
        return self.states[batch.ids_BT]

    def extend(self, ids_NT, mask_NS, deltas_N1, cache):
        return self.states[ids_NT]

    def scorer(self):
        return self.head


def small_model():
    """LatentModel with one merge of inner width 1; inverse dynamics and policy are a norm and a linear map."""
    size = {"hidden_size": 2, "intermediate_size": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    blocks = {"inverse_blocks": 0, "policy_blocks": 0, "merges": 1}
    latent = LatentModel(SimpleNamespace(**size), 2, **blocks, project=False, tau=TAU, entropy_bonus=BONUS)
    with torch.no_grad():
        latent.quantiser.codebook.weight.copy_(torch.tensor(CODES))
        for stack, weight in ((latent.inverse, INVERSE), (latent.policy, POLICY)):
            stack.out.weight.copy_(torch.tensor(weight))
            stack.out.bias.zero_()
        for name, weight in MERGE.items():
            getattr(latent.world.merges[0], name).weight.copy_(torch.tensor(weight))
    return latent


class Sentence(Batch):
    """A batch whose noise is given."""

    def uniforms(self, width):
        return torch.tensor(NOISE)


def batch_of(cls, rows, response):
    """Token ids without padding and without images -> a batch."""
    ids_BT = torch.tensor(rows)
    response_BT = torch.tensor(response).bool()
    count = len(rows)
    images_B = torch.zeros(count, dtype=torch.long)
    return cls(ids_BT, torch.ones_like(response_BT), response_BT, images_B, None, None, [{}] * count, [(0,)] * count)


def judge(records, responses):
    """A score of 1, 2 more for each 'red', 2 more if it ends; the reference 'red end' has 5."""
    scores = [1.0 + 2 * text.count("red") + 2 * text.endswith("end") for text in responses]
    return [{"Red": (score, 5.0)} for score in scores]


# ------------------------------------------------------------------------------------------------------ the numbers
def world_numbers(vlm, latent):
    """For each state that speaks and each code: x after the merge, y, the probabilities of red, blue, end."""
    found = {}
    for state in (END, RED, BLUE):
        e_D = vlm.states[state]
        for code in (0, 1):
            merge = latent.world.merges[0]
            c1, c2 = merge.code_part(latent.quantiser.vectors()[code])
            y_D = latent.speak(e_D, torch.tensor(code))
            p_V = log_probs(vlm.head(y_D)).exp()
            found[state, code] = {"s1": merge.w1_x(e_D) + c1, "s2": merge.w2_x(e_D) + c2, "x": merge(e_D, c1, c2)}
            found[state, code] |= {"y": y_D, "logits": vlm.head(y_D), "p": p_V, "says": TOKENS[p_V.argmax()]}
    return found


def keep_outputs(module):
    """-> list that will hold the outputs of the module, each with its gradient."""
    kept = []

    def hook(module, given, out):
        if out.requires_grad:
            out.retain_grad()
            kept.append(out)

    module.register_forward_hook(hook)
    return kept


def inverse_numbers(vlm, latent):
    """Stage 2 on the answer 'red end': the choice, L_inverse, and its gradient at the inverse model's logits."""
    batch = batch_of(Sentence, [[END, RED, END]], [[0, 1, 1]])
    e_BTD, u_MK = vlm(batch), torch.tensor(NOISE)
    kept = keep_outputs(latent.inverse)
    loss = inverse_loss(latent, vlm, e_BTD, batch)
    (loss["nll"] + loss["auxiliary"]).backward()
    logits_MK, g_MK = loss["logits"].detach(), -torch.log(-torch.log(u_MK))
    hard_MK = straight_through_gumbel(logits_MK, u_MK, TAU)
    c_MD = (hard_MK @ latent.quantiser.vectors()).detach().requires_grad_()
    logp_MV = log_probs(vlm.head(latent.speak(e_BTD[0, :-1], c_MD)))
    nll_M = -logp_MV.gather(-1, batch.ids_BT[0, 1:, None])[:, 0]
    nll_M.sum().backward()
    return {
        "batch": batch,
        "e": e_BTD,
        "logits": logits_MK,
        "g": g_MK,
        "soft": torch.softmax((logits_MK + g_MK) / TAU, -1),
        "chosen": hard_MK.argmax(-1),
        "codes": loss["codes"],
        "nll": nll_M.detach(),
        "total": loss["nll"].detach(),
        "entropy": entropy(logits_MK),
        "auxiliary": loss["auxiliary"].detach(),
        "by_c": c_MD.grad,
        "gradient": kept[0].grad[0, 1:],
    }


def cloning_numbers(latent, inverse):
    """Stage 3 on the same sentence: L_bc, and how many codes the policy's arg max hits."""
    loss, hits = bc_loss(latent, inverse["e"], inverse["batch"], inverse["codes"])
    return {"loss": loss.detach(), "hits": int(hits)}


def policy_table(vlm, policy):
    """pi(a | e) at the three states -> (3, 2), a row for each token before."""
    return log_probs(policy(vlm.states[None]))[0].exp().detach()


def group_numbers(vlm, latent):
    """Four answers, drawn by the project's own rollout, and their rewards."""
    prompt = batch_of(Batch, [[END]], [[0]])
    settings = {"never": torch.tensor([], dtype=torch.long), "eos": END, "pad": END}
    roll = rollout_latent(vlm, latent, prompt, torch.tensor(DRAWS), group=len(DRAWS), **settings)
    rows = zip(roll.tokens_NT.tolist(), roll.mask_NT.tolist())
    texts = [" ".join(TOKENS[t] for t, real in zip(tokens, mask) if real) for tokens, mask in rows]
    return roll, texts, torch.from_numpy(reward(judge, [{}], texts))


def one_loss(kind, logp_NT, logp_old_NT, logp_ref_NT, adv_BG, mask_NT):
    """The loss of one algorithm."""
    high = ALGORITHMS[kind].clip_high
    how = {"loss_type": kind, "clip_low": LOW, "clip_high": high, "beta": BETA, "max_length": LONGEST}
    return policy_loss(logp_NT, logp_old_NT, logp_ref_NT, adv_BG.flatten(), mask_NT, **how)


def gradient_by_state(kept, tokens_NT):
    """The loss's gradient at the policy's logits, summed over the actions that were chosen in each state ->
    (3, 2)."""
    first, later_NTK = (x.grad for x in kept)
    found_SK = torch.zeros(3, 2)
    found_SK[END] += first[0, 0]
    return found_SK.index_add(0, tokens_NT[:, :-1].flatten(), later_NTK.flatten(0, 1))


def update_numbers(kind):
    """One algorithm's first update of the policy on the group, and the loss that a second one would begin with."""
    vlm, latent = TableVLM(), small_model()
    roll, texts, r_BG = group_numbers(vlm, latent)
    adv_BG, mask_NT = group_advantages(r_BG, kind), roll.mask_NT
    before_SK, kept = policy_table(vlm, latent.policy), keep_outputs(latent.policy)
    logp_NT, _ = sampled_logp(latent.policy, roll)
    old_NT = logp_NT.detach()
    loss = one_loss(kind, logp_NT, old_NT, old_NT, adv_BG, mask_NT)
    loss.backward()
    out = latent.policy.out
    gradient = {"weight": out.weight.grad.clone(), "bias": out.bias.grad.clone()}
    torch.optim.SGD(out.parameters(), lr=RATE).step()
    with torch.no_grad():
        new_NT, _ = sampled_logp(latent.policy, roll)
        second = one_loss(kind, new_NT, old_NT, old_NT, adv_BG, mask_NT)
    return {
        "roll": roll,
        "texts": texts,
        "r": r_BG[0],
        "adv": adv_BG[0],
        "weights": token_weights(mask_NT, kind, LONGEST),
        "logp": old_NT,
        "loss": loss.detach(),
        "by_state": gradient_by_state(kept, roll.tokens_NT),
        "gradient": gradient,
        "weight": out.weight.detach().clone(),
        "bias": out.bias.detach().clone(),
        "before": before_SK,
        "after": policy_table(vlm, latent.policy),
        "ratio": torch.exp(new_NT - old_NT),
        "k3": k3(new_NT, old_NT),
        "losses": token_losses(
            new_NT, old_NT, old_NT, adv_BG.flatten(), mask_NT, LOW, ALGORITHMS[kind].clip_high, BETA
        ),
        "second": second,
    }


def numbers():
    """-> all numbers of the page."""
    vlm, latent = TableVLM(), small_model()
    inverse = inverse_numbers(vlm, latent)
    found = {"world": world_numbers(vlm, latent), "inverse": inverse, "cloning": cloning_numbers(latent, inverse)}
    return found | {"update": {kind: update_numbers(kind) for kind in ALGORITHMS}}


# --------------------------------------------------------------------------------------------------------- the page
def say(x):
    """A number as the page shows it: four digits behind the point at most, without trailing zeros."""
    text = f"{float(torch.as_tensor(x).detach()):.4f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def vector(x):
    return "(" + ", ".join(say(one) for one in x) + ")"


def matrix(x):
    return "[" + "; ".join(" ".join(say(one) for one in row) for row in x) + "]"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(x if isinstance(x, str) else say(x) for x in row) + " |" for row in lines)


def given_page():
    m = {name: matrix(weight) for name, weight in MERGE.items()}
    rows = [[t, vector(e), vector(h)] for t, e, h in zip(TOKENS, STATES, HEAD)]
    return f"""# One worked example, from the hidden state to the updated policy

Two codes, three tokens, vectors of width 2. Take a pencil: every number below can be worked out again from the ones
above it. They are rounded to four digits, so your last digit may differ. `python lecture/worked_example.py` wrote
this page. The numbers come from the functions that the stages use; their names stand in brackets. A test works them
out once more, without these functions.

## 0. What is given

The **tokens** are red, blue and end. An answer is over when it says end. The prompt here is nothing but the token
end of whatever was said before.

The **state** e is what the frozen vision-language model makes of the dialogue so far, one vector a token. Here it
depends on the last token alone, and is read from a table. The **LM head** H turns a vector y into a score for each
token, H y.

{table(["token", "state e after it", "its row of H"], rows)}

Every state has the *root mean square* (rms) 1: the square root of the mean of its squared entries. So the norms in
front of the two linear maps below change nothing.

- **Codebook**: code 0 is c = {vector(CODES[0])}, code 1 is c = {vector(CODES[1])}.
- **Inverse dynamics**: scores of the two codes for the step that led to state e: A e, with A = {matrix(INVERSE)}.
- **World model**: y from e and c by the weights {m["w1_x"]} and {m["w1_c"]} (W1), {m["w2_x"]} and {m["w2_c"]} (W2),
  {m["w3"]} (W3); a semicolon begins a new row.
- **Policy**: scores of the two codes in state e: W e + b, with W = {matrix(POLICY)} and b = (0, 0).

In the real model inverse dynamics and policy have transformer blocks in front of the linear map, and so see the
states of all tokens so far. The last linear map, the codebook, the world model and all losses are the same.
"""


def world_page(n):
    rows = []
    for (state, code), x in n["world"].items():
        at = [TOKENS[state], str(code), x["s1"][0], x["s2"][0]]
        rows.append([*at, vector(x["x"]), vector(x["y"]), vector(x["logits"]), vector(x["p"]), x["says"]])
    return f"""
## 1. The world model: what a code says in a state

[`model.Merge`, `model.WorldModel`, reached by `LatentModel.speak`]

    s1 = W1 [e; c]       s2 = W2 [e; c]                     [e; c]: e and c one below the other
    x  = e + W3 (silu(s1) * s2)                             silu(s) = s / (1 + exp(-s))
    y  = x * rms(e) / rms(x)                                y is as long as e
    p(next token) = softmax(H y)

The first line of the table, in full:

    s1 = 0.5 + 0.5 + 0.5 = 1.5       s2 = 0.2 + 1 = 1.2       silu(1.5) * 1.2 = 1.2263 * 1.2 = 1.4716
    x = (1 + 0.7 * 1.4716, 1 - 0.7 * 1.4716)

{table(["after", "code", "s1", "s2", "x", "y", "H y", "p(red, blue, end)", "says"], rows)}

The last column is the most likely token. In a rollout the world model always says that one, so an answer is fixed
by its codes. What a code says depends on the state: code 0 says red at the beginning, but end after blue.
"""


def inverse_page(n):
    i = n["inverse"]
    rows = []
    for k, (before, after) in enumerate(((END, RED), (RED, END))):
        noisy = i["logits"][k] + i["g"][k]
        at = [f"{TOKENS[before]} -> {TOKENS[after]}", vector(STATES[after]), vector(i["logits"][k]), vector(NOISE[k])]
        rows.append([*at, vector(i["g"][k]), vector(noisy), str(int(i["chosen"][k])), vector(i["soft"][k])])
    right = n["world"][END, 0]["p"][RED]
    g = [vector(x) for x in i["by_c"]]
    wrong, end = n["world"][END, 1]["p"][RED], n["world"][RED, 1]["p"][END]
    return f"""
## 2. Inverse dynamics: which code explains a step

[`model.inverse_loss`, `model.straight_through_gumbel`]

A demonstration says *red end*. It has two steps, from end to red and from red to end. Inverse dynamics looks at the
state *after* the step. Noise is added to its scores, and the highest sum wins: with u drawn evenly from 0 to 1, the
noise is g = -log(-log u).

{table(["step", "state after it", "scores A e", "u", "g", "scores + g", "code", "soft"], rows)}

Without noise the codes would be {int(i["codes"][0])} and {int(i["codes"][1])}. The noise of code 1 in the first
step was large, so there the other code is tried. *Soft* is softmax((scores + g) / tau) with tau = {say(TAU)};
forward it is not used.

The world model says with these codes how likely the tokens are that really came. By the table of part 1, red has
the probability {say(wrong)} in the first state with code 1, and end has {say(end)} after red with code 1.

    L_inverse = -log {say(wrong)} - log {say(end)} = {say(i["nll"][0])} + {say(i["nll"][1])} = {say(i["total"])}

With code 0 the first term would have been -log {say(right)} = {say(-right.log())}. The entropies of softmax(A e)
are {say(i["entropy"][0])} and {say(i["entropy"][1])}. The bonus for being undecided subtracts {say(BONUS)} times
their sum, {say(-i["auxiliary"])}.

**Straight through.** Backward, the hard choice is taken for the soft one. Let v be the loss's gradient by the code
vector. By the chain rule through part 1 it is {g[0]} in the first step and {g[1]} in the second. Code k would
change the loss by v_k = v . c_k. Here the codes are the unit vectors, so v_k is the k-th entry of v. Then

    gradient at score k = soft_k (v_k - sum_j soft_j v_j) / tau,      plus the small part of the entropy bonus

which is {vector(i["gradient"][0])} in the first step and {vector(i["gradient"][1])} in the second. A step of
gradient descent goes against it, so it raises the score of code 0 in the first step: *the other code would have
been better*. That was learnt although code 0 was not tried.
"""


def cloning_page(n):
    c, p = n["cloning"], n["update"]["grpo"]["before"]
    rows = [
        [TOKENS[s], vector(STATES[s]), vector(torch.tensor(POLICY) @ torch.tensor(STATES[s])), vector(p[s])]
        for s in (END, RED, BLUE)
    ]
    return f"""
## 3. The policy, and behaviour cloning

[`rollout.action_logits`, `vlm.log_probs`; `stage3_bc.bc_loss`]

The policy has to choose the code *before* the step. Its probabilities are softmax(W e + b):

{table(["after", "state e", "W e + b", "pi(code 0), pi(code 1)"], rows)}

Cloning teaches it the codes of inverse dynamics without noise: code 0 in the first state, code 1 after red.

    L_bc = -log {say(p[END, 0])} - log {say(p[RED, 1])} = {say(c["loss"])}

The policy's more likely code is the right one in {c["hits"]} of the 2 steps. We leave it as it is, and go on to RL.
"""


def group_page(n):
    g = n["update"]["grpo"]
    roll, rows = g["roll"], []
    for k, text in enumerate(g["texts"]):
        length = int(roll.mask_NT[k].sum())
        u, codes = DRAWS[k][:length], roll.actions_NT[k, :length].tolist()
        rows.append([str(k + 1), vector(u), " ".join(map(str, codes)), text, g["r"][k] * 5, g["r"][k]])
    kinds = n["update"].items()
    adv = [[ALGORITHMS[kind].label, *(x["adv"][k] for k in range(4))] for kind, x in kinds]
    weight = [[ALGORITHMS[kind].label, *(x["weights"][k, 0] for k in range(4))] for kind, x in kinds]
    answers = [f"answer {k + 1}" for k in range(4)]
    return f"""
## 4. Four answers to one prompt, and their advantages

[`rollout.rollout_latent`, `rewards.reward`]

Each answer begins in the state after end. A number u is drawn from 0 to 1 for each step. Code 0 is taken if u is
below its probability, else code 1. The world model says the token, and the token gives the next state. An answer
has at most {LONGEST} tokens. The judge gives 1 point, 2 more for each red, and 2 more if the answer ends. The
reference *red end* has 5 points; the reward is points / 5.

{table(["answer", "u", "codes", "it says", "points", "reward r"], rows)}

[`stage4_latent_rl.group_advantages`] The mean reward is {say(g["r"].mean())}, the standard deviation
{say(g["r"].std())} (the squares are divided by 3 = 4 - 1). The advantage A is r - mean, and in all but Dr.GRPO it
is divided by the standard deviation.

{table(["advantage A", *answers], adv)}

[`stage4_latent_rl.token_weights`] The loss is a weighted sum over the 10 tokens said. A token's weight depends on
the algorithm: GRPO has 1 / (4 times the tokens of this answer), Dr.GRPO 1 / (4 times {LONGEST}, the most that an
answer may have), DAPO and BNPO 1 / (10 tokens).

{table(["weight of a token", *answers], weight)}

DAPO counts the tokens of all processes, BNPO those of its own. With one process there is no difference. DAPO also
leaves out groups whose rewards are all equal, and clips later, see part 6.
"""


def update_page(n):
    g = n["update"]["grpo"]
    rows = [[TOKENS[s], vector(g["before"][s]), vector(g["by_state"][s])] for s in (END, RED, BLUE)]
    after = [
        [TOKENS[s], g["before"][s, 0], *(x["after"][s, 0] for x in n["update"].values())] for s in (END, RED, BLUE)
    ]
    labels = [ALGORITHMS[kind].label for kind in n["update"]]
    return f"""
## 5. The loss, its gradient, one step

[`stage4_latent_rl.policy_loss`]

    ratio = pi(code) / pi_old(code)                                pi_old: the policy that drew the answers
    s     = min(ratio A, clip(ratio, 1 - {say(LOW)}, 1 + high) A)        high is 0.2, in DAPO 0.28
    k3    = exp(d) - d - 1,  d = log pi_start(code) - log pi(code) pi_start: the policy that RL began with
    loss  = sum over tokens of weight * (-s + {say(BETA)} k3)

In the first update nothing has moved yet. So every ratio is 1, every k3 is 0, and the loss is minus the sum of
weight times A. In GRPO that is -(A1 + A2 + A3 + A4) / 4 = {say(g["loss"])}: the value says nothing, the gradient does.

At ratio 1 the gradient of -s at the scores of the two codes is A (pi - chosen), where *chosen* is (1, 0) for code 0
and (0, 1) for code 1; k3 has gradient 0 there. Answer 1, first step, GRPO: the weight is 0.125, A is
{say(g["adv"][0])}, and pi - chosen is ({say(g["before"][END, 0] - 1)}, {say(g["before"][END, 1])}). The sums over
all tokens said in one state:

{table(["after", "pi", "GRPO: sum of weight A (pi - chosen)"], rows)}

The gradient by W is the sum over the states of (this sum, as a column) times (e, as a row), the one by b is the sum
itself:

    by W = {matrix(g["gradient"]["weight"])}      by b = {vector(g["gradient"]["bias"])}

One step of plain gradient descent with learning rate {say(RATE)} gives what follows. (The stages use AdamW, and
train the norm's weights as well.)

    W = {matrix(g["weight"])}      b = {vector(g["bias"])}

[`vlm.log_probs`] The new probabilities of code 0, under all four algorithms:

{table(["after", "before", *labels], after)}

The sum of the first state is the largest, and it is for code 0, which says red there. After red the sum is for code
1, which ends the answer. And yet code 0 rose there, too: the three states share W and b. A large network is moved
by every state at once in the same way.
"""


def second_page(n):
    g, clip = n["update"]["grpo"], lambda kind: 1 + ALGORITHMS[kind].clip_high
    d, b = n["update"]["dapo"], n["update"]["bnpo"]
    rows = []
    for k, text in enumerate(g["texts"]):
        for t, word in enumerate(text.split()):
            code = str(int(g["roll"].actions_NT[k, t]))
            at = [str(k + 1), word, code, g["logp"][k, t].exp(), g["ratio"][k, t] * g["logp"][k, t].exp()]
            rows.append([*at, g["ratio"][k, t], g["adv"][k], g["k3"][k, t], g["losses"][k, t]])
    second = [[ALGORITHMS[kind].label, x["second"]] for kind, x in n["update"].items()]
    return f"""
## 6. A second update on the same answers: ratio, clip, k3

The default is one update for each group. A second one on the same four answers would begin with these numbers
(GRPO):

{table(["answer", "token", "code", "pi_old", "pi", "ratio", "A", "k3", "-s + 0.01 k3"], rows)}

- Answer 2, first token: the ratio {say(g["ratio"][1, 0])} is above 1.2 and A is above 0. So s = 1.2 A is a
  constant, and it pulls no further.
- Answer 4, first token: the ratio {say(g["ratio"][3, 0])} is below 0.8 and A is below 0. So s = 0.8 A is a
  constant again.
- Answer 3, second token: the ratio {say(g["ratio"][2, 1])} is above 1.2, but A is below 0: the policy has   moved
  the wrong   way. The smaller one of the two products is ratio times A, so the token goes on pulling.

The weighted sums are the losses with which the second update begins. Each algorithm has its own new policy here:

{table(["algorithm", "loss"], second)}

DAPO and BNPO made the same first step. They part here: their ratio of answer 2, second token, is
{say(d["ratio"][1, 1])}. That is above BNPO's bound {say(clip("bnpo"))} and below DAPO's bound {say(clip("dapo"))}.
So this token's loss is {say(b["losses"][1, 1])} in BNPO, where it pulls no further, and {say(d["losses"][1, 1])} in
DAPO, where it still does.
"""


def wrapped(text):
    """Paragraphs and list items at 118 columns; tables, formulas and headings as they are."""
    blocks = re.split(r"\n{2,}", text)
    for k, block in enumerate(blocks):
        if not block.startswith(("|", "#", "    ", "- ")):
            blocks[k] = textwrap.fill(" ".join(block.split()), 118, break_on_hyphens=False)
        if block.startswith("- "):
            items = re.split(r"\n(?=- )", block)
            blocks[k] = "\n".join(textwrap.fill(" ".join(item.split()), 118, subsequent_indent="  ") for item in items)
    return "\n\n".join(blocks).rstrip() + "\n"


def page():
    n = numbers()
    return wrapped(given_page() + "".join(part(n) for part in PARTS))


PARTS = (world_page, inverse_page, cloning_page, group_page, update_page, second_page)

if __name__ == "__main__":
    (ROOT / "lecture" / "worked_example.md").write_text(page())
    print("wrote lecture/worked_example.md")
