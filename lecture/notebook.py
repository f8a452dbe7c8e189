# %% [markdown]
# # Latent-action reinforcement learning, in ten parts
#
# Everything here runs from the files of the repository: the tiny vision-language model `tiny/vlm`, the trained
# agent `tiny/agent`, and pictures that `tiny/world.py` draws on the fly. Nothing is downloaded, and nothing long is
# trained. All maths comes from the files of the method; a cell only calls it. Each part has a small computation, a
# figure and a question. What the words mean: [README](../README.md), [docs/words.md](../docs/words.md). Figures are
# also saved in `runs/lecture/figures`.

# %%
# ruff: noqa: E402
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "stage4_latent_rl.py").exists())
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)  # Jupyter begins in the notebook's folder

import numpy as np
import torch
from matplotlib.figure import Figure

import checkpoint
import common
import stage3_bc
from data import Processor, uniforms
from model import LatentModel, Projector, entropy, straight_through_gumbel
from plots import COLOURS, PARTS, STYLE_COLOURS
from rewards import load_judge, reward
from rollout import action_logits, decode, rollout, sampled_logp, token_states
from stage2_codebook import validate
from stage4_latent_rl import ALGORITHMS, group_advantages, k3, policy_loss, token_weights
from tiny import world
from vlm import log_probs, next_token_loss

torch.manual_seed(0)
torch.set_num_threads(1)
CPU = common.Place(torch.device("cpu"), torch.float32, 0, 1)
VLM_NAME, AGENT = "tiny/vlm", ROOT / "tiny" / "agent"
processor = Processor(VLM_NAME)
never = torch.tensor(processor.never_sampled)


def load(run, needed=common.SPEAKING):
    """-> the latent model of one run of the shipped agent, nothing of which trains."""
    tensors, state = checkpoint.load(AGENT / run, "--run", ["stage3_bc", "stage4_latent_rl"], VLM_NAME)
    latent = common.build_latent(vlm, state["arch"], tensors, AGENT / run, needed)
    return latent.requires_grad_(False)


vlm = common.VLM(VLM_NAME)
cloned = load("stage3", ("projector", "inverse", "quantiser", "world", "policy"))  # before RL
tuned = load("rl_latent")  # after RL


def show(fig, name):
    """Save a figure, and display it where a notebook runs; elsewhere say where it is, which ends the part."""
    path = ROOT / "runs" / "lecture" / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(str(path)))
    else:
        print(f"[part {name.partition('-')[0]}: {path.relative_to(ROOT)}]\n")


def example(record, scene=None, prompt_only=False, rng=random):
    """A record of the tiny world, with its picture drawn now -> Example."""
    record = {"images": [], "id": "drawn"} | record
    if scene is None:
        return processor.example(record, prompt_only)
    out = processor.images(images=[world.draw_scene(scene, rng)], return_tensors="pt")
    return processor.example(record, prompt_only, (out["pixel_values"], out["image_grid_thw"]))


def task_examples(count, seed, prompt_only=False):
    """Dialogues of task A, role play about a picture."""
    rng, roles = random.Random(seed), world.task_roles()[0]
    drawn = [world.task_record(roles[k % len(roles)], rng) for k in range(count)]
    return [example(record, scene, prompt_only, rng) for record, scene in drawn]


def text_examples(count, seed):
    """Text-only dialogues: rich, without a picture."""
    rng = random.Random(seed)
    return [example(world.text_record(rng)) for _ in range(count)]


def axes_of(width=7, height=3.2, columns=1):
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(1, columns)


# %% [markdown]
# ## 1. Why tokens are a poor action space
#
# Token-level RL chooses each token from the whole vocabulary V. A response of m tokens is one of |V|^m. The
# codebook has K = 128 codes, so there are K^m sequences of codes. But how free is a choice really? The exponential
# of the entropy says how many equally likely choices would be as undecided.

# %%
prompt = processor.collate(task_examples(4, seed=1, prompt_only=True), left=True)
settings = {"group": 8, "temperature": 1.0, "never": never, "eos": processor.eos_id, "pad": processor.pad_id}
draws = uniforms(0, [(k,) for k in range(32)], 48)
with torch.no_grad():
    by_code = rollout(vlm, cloned, prompt, draws, **settings)
    by_token = rollout(vlm, None, prompt, draws, **settings)
    _, H_code = sampled_logp(cloned.policy, by_code)
    _, H_token = sampled_logp(vlm, by_token, never=never)

vocabulary, codes = vlm.head.weight.shape[0], cloned.quantiser.codes
length = by_token.mask_NT.sum(1).float().mean()
print(f"|V| = {vocabulary}, K = {codes}; a response has {length:.0f} tokens")
print(f"sequences: 10^{length * np.log10(vocabulary):.0f} of tokens, 10^{length * np.log10(codes):.0f} of codes")
for name, roll, H in (("tokens, bare VLM", by_token, H_token), ("codes, cloned policy", by_code, H_code)):
    free, said = H[roll.mask_NT].exp(), decode(processor.tokenizer, roll, processor.eos_id)
    different = np.mean([len(set(said[k : k + 8])) / 8 for k in (0, 8, 16, 24)])
    print(f"{name}: exp(entropy) {free.mean():.2f} on average, {free.max():.1f} at most; {different:.0%} of 8 differ")

fig, axis = axes_of()
for name, roll, H in (("token", by_token, H_token), ("latent", by_code, H_code)):
    axis.plot(np.sort(H[roll.mask_NT].exp().numpy())[::-1], label=name, color=COLOURS[name], linewidth=2)
axis.set(xlabel="steps of 32 responses, the freest first", ylabel="exp(entropy)", title="How free each choice is")
axis.legend()
show(fig, "1-free-choices")

# %% [markdown]
# Three of four token steps are forced: the rest of a word, the rest of a phrase. So |V|^m overstates by far what RL
# has to search. The choices of codes are freer, and yet the answers differ less: many codes say the same token, as
# part 6 shows. (The bare VLM has not seen the task's demonstrations, so it speaks in more forms than the cloned
# policy.) What codes change is what a step of exploration *does*. Another code is another thing that the world
# model knows how to say; another token may be nonsense.
#
# **Question.** A policy gradient with tokens spreads probability over 2,048 scores at each step. Why is the number
# of tokens with a probability above 0.01 a better measure of the search than 2,048?

# %% [markdown]
# ## 2. States
#
# The frozen VLM turns the dialogue up to a token into a vector e, the state. All else is built on it. Here are the
# states at the responses' tokens of some dialogues, in the plane of their two main directions.

# %%
batch = processor.collate(task_examples(12, seed=2))
with torch.no_grad():
    e_BTD = cloned.context(vlm(batch), batch.paired_B)
explained = batch.explained_BT
e_MD, next_M = e_BTD[:, :-1][explained], batch.ids_BT[:, 1:][explained]
words = [processor.tokenizer.decode([t]).strip().lower() for t in next_M]
centred = e_MD - e_MD.mean(0)
_, size, directions = torch.linalg.svd(centred, full_matrices=False)
plane = centred @ directions[:2].T
share = (size[:2] ** 2).sum() / (size**2).sum()
print(f"{len(e_MD)} states of width {e_MD.shape[1]}; two directions hold {share:.0%} of the variance")
unit = torch.nn.functional.normalize(centred, dim=-1)
alike = unit @ unit.T
same = torch.tensor([[a == b for b in words] for a in words]) & ~torch.eye(len(words), dtype=torch.bool)
other = ~same & ~torch.eye(len(words), dtype=torch.bool)
print(f"mean cosine of two states before the same word: {alike[same].mean():.2f}", end=", ")
print(f"before different words: {alike[other].mean():.2f}")

fig, axis = axes_of(7, 4)
axis.scatter(*plane.T, s=12, color="#DDDDDD", label="all else")
for (word, _), colour in zip(Counter(words).most_common(len(STYLE_COLOURS)), STYLE_COLOURS):
    at = [k for k, other_word in enumerate(words) if other_word == word]
    axis.scatter(*plane[at].T, s=22, color=colour, label=word)
axis.set(title="States, coloured by the word that comes next", xticks=[], yticks=[])
axis.legend(fontsize=8, ncols=2)
show(fig, "2-states")

# %% [markdown]
# **Question.** A state is computed before the next word is known. Why do states before the same word lie together,
# and what does that say about how much a code still has to add?

# %% [markdown]
# ## 3. The projector, in two dimensions
#
# Text-only dialogues have no picture, so their states lie elsewhere. The projector P moves them. Here is a world
# that can be drawn: a state has two numbers, and a picture moves it, to the right if its first number is positive
# and to the left if it is negative. `model.Projector` learns that from pairs; P' learns the way back.

# %%
g = torch.Generator().manual_seed(3)
text_state = torch.randn(1, 60, 2, generator=g)
with_picture = text_state + 0.8 * torch.tanh(3 * text_state[..., :1]) * torch.tensor([1.0, 0.3])
with_picture = with_picture + 0.05 * torch.randn(with_picture.shape, generator=g)
torch.manual_seed(0)
projector, mask = Projector(2), torch.ones(1, 60)
optimizer = torch.optim.Adam(projector.parameters(), lr=0.03)
losses = []
for _ in range(300):
    loss = projector.paired_loss(with_picture, text_state, mask) / 60
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
with torch.no_grad():
    mu, logvar = projector.P(text_state)
    moved, still = ((mu - with_picture) ** 2).mean(), ((text_state - with_picture) ** 2).mean()
    cycle = projector.cycle_loss(text_state, mask) / 60
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; squared error with P {moved:.4f}, without {still:.4f}")
print(f"log-variance {logvar.min():.2f} to {logvar.max():.2f}: its tanh keeps it above -1. Cycle loss {cycle:.2f}")

fig, (left, right) = axes_of(9, 3.4, 2)
left.plot(losses, color=PARTS["projector"])
left.set(xlabel="step", title="L_t2vt + L_vt2t")
right.scatter(*with_picture[0].T, s=18, color=COLOURS["latent"], label="with the picture")
right.scatter(*text_state[0].T, s=10, color=PARTS["frozen"], label="text alone")
step = (mu - text_state)[0]
right.quiver(*text_state[0].T, *step.T, angles="xy", scale_units="xy", scale=1, width=0.004, color=PARTS["projector"])
right.set(title="Each arrow: text state -> mu of P")
right.legend(fontsize=8)
show(fig, "3-projector")

# %% [markdown]
# **Question.** The log-variance cannot fall below -1. What would happen to the loss without that bound, if P fitted
# one of the two numbers exactly?

# %% [markdown]
# ## 4. Inverse dynamics, the bottleneck, and the leak
#
# Inverse dynamics sees the *next* state, and so the very token that it has to explain. What keeps it honest is that
# only one of 128 codes gets through. `stage2_codebook.validate` compares the bare VLM, the inferred codes and
# random codes. Then the bottleneck is removed: a free vector, a linear map of the next state, takes the place of
# the code. It learns from 16 other dialogues, and is tested on those of the comparison.

# %%
texts = text_examples(16, seed=4)
val = validate(cloned, vlm, processor, [x.record for x in texts], CPU)
print({name: round(x, 3) for name, x in val.items()})


def steps_of(examples):
    """-> the states before and after each explained token (M, D), and the tokens (M,)"""
    batch = processor.collate(examples)
    with torch.no_grad():
        e_BTD = cloned.context(vlm(batch), batch.paired_B)
    at = batch.explained_BT
    return e_BTD[:, :-1][at], e_BTD[:, 1:][at], batch.ids_BT[:, 1:][at]


def nats_of_leak(now_MD, after_MD, next_M):
    return next_token_loss(vlm.head, cloned.speak(now_MD, leak(after_MD)), next_M) / len(next_M)


others, tested = steps_of(text_examples(16, seed=40)), steps_of(texts)
width = tested[0].shape[-1]
leak = torch.nn.Linear(width, width)
optimizer = torch.optim.Adam(leak.parameters(), lr=3e-3)
learnt, leaked = [], []  # nats a token, on the dialogues that it learns from and on the others
for _ in range(80):
    with torch.no_grad():
        leaked.append(nats_of_leak(*tested).item())
    nll = nats_of_leak(*others)
    optimizer.zero_grad()
    nll.backward()
    optimizer.step()
    learnt.append(nll.item())
print("without the bottleneck, 80 steps, the world model as it is, nats a token:", end=" ")
print(
    f"{learnt[0]:.2f} -> {learnt[-1]:.3f} where it learns, {leaked[0]:.2f} -> {leaked[-1]:.3f} on the other dialogues"
)

fig, (left, right) = axes_of(9, 3.2, 2)
bars = {"bare VLM": val["val_vlm"], "random code": val["val_random"], "inferred code": val["val_inferred"]}
bars |= {"free vector": leaked[-1], "free vector,\nwhere it learns": learnt[-1]}
colours = [PARTS[k] for k in ("frozen", "codebook", "inverse", "gradient", "gradient")]
left.bar(list(bars), list(bars.values()), color=colours)
left.margins(y=0.12)
for k, x in enumerate(bars.values()):
    left.text(k, x, f"{x:.2f}", ha="center", va="bottom")
left.set(title="nats a token, text-only dialogues")
left.tick_params(axis="x", labelsize=8)
right.plot(leaked, color=PARTS["gradient"], label="free vector")
right.plot(learnt, color=PARTS["gradient"], linestyle=":", label="where it learns")
right.axhline(val["val_inferred"], color=PARTS["inverse"], linestyle="--", label="inferred code")
right.set(xlabel="step", title="The leak: a free vector learns to spell the token")
right.legend(fontsize=8)
show(fig, "4-leak")

# %% [markdown]
# Where it learns, a linear map is below the codes within 80 steps: the free vector spells the token itself. What it
# has learnt helps less on other dialogues. And above all the policy, which has to do without the next state, could not
# guess a vector that spells one token of 2,048. It can guess one of 128 codes.
#
# **Question.** How many nats can one of 128 codes carry at most? Compare with what the inferred codes save here.

# %% [markdown]
# ## 5. Straight-through Gumbel-softmax, by hand, with three codes
#
# Noise g = -log(-log u) is added to the scores, and the highest sum wins. A code is then chosen as often as softmax
# says. Backward, the gradient is that of softmax((scores + g) / tau).

# %%
scores = torch.tensor([1.0, 0.5, -1.0], requires_grad=True)
u = torch.tensor([0.30, 0.80, 0.60])
g_3 = -torch.log(-torch.log(u))
hard = straight_through_gumbel(scores, u, tau=2.0)
worth = torch.tensor([0.0, 1.0, 3.0])  # suppose that the loss were this sum
(hard * worth).sum().backward()
soft = torch.softmax((scores + g_3).detach() / 2, -1)
print("g          ", [f"{x:.3f}" for x in g_3])
print("scores + g ", [f"{x:.3f}" for x in (scores + g_3)])
print("chosen     ", hard.detach().tolist())
print("soft       ", [f"{x:.3f}" for x in soft])
by_hand = soft * (worth - (soft * worth).sum()) / 2
print("gradient   ", [f"{x:.3f}" for x in scores.grad], " by hand:", [f"{x:.3f}" for x in by_hand])

many = straight_through_gumbel(scores.detach().expand(20000, 3), torch.rand(20000, 3), tau=2.0)
print("share of choices", [f"{x:.3f}" for x in many.mean(0)])
print("softmax(scores) ", [f"{x:.3f}" for x in torch.softmax(scores.detach(), 0)])

fig, (left, right) = axes_of(9, 3.2, 2)
left.bar(np.arange(3) - 0.2, many.mean(0), 0.4, label="share of 20,000 choices", color=PARTS["inverse"])
left.bar(np.arange(3) + 0.2, torch.softmax(scores.detach(), 0), 0.4, label="softmax(scores)", color=PARTS["codebook"])
left.set(title="The noise makes it a draw", xticks=range(3), xlabel="code")
left.legend(fontsize=8)
taus = np.linspace(0.2, 6, 60)
curves = torch.stack([torch.softmax((scores + g_3).detach() / tau, -1) for tau in taus])
for k in range(3):
    right.plot(taus, curves[:, k], label=f"code {k}")
right.axvline(2, color="#999999", linestyle=":")
right.set(xlabel="tau", title="soft, by tau (dotted: the paper's)")
right.legend(fontsize=8)
show(fig, "5-gumbel")

# %% [markdown]
# **Question.** With tau near 0 the soft choice is the hard one. Why would learning then stop?

# %% [markdown]
# ## 6. The world model: from "is the VLM" to "obeys the code"
#
# A new world model gives back e itself, whatever the code: it *is* the VLM. Training lets the codes in. Scale the
# last matrix of each merge of the trained one by a factor from 0 to 1, and watch how many different next tokens the
# 128 codes say in one state.

# %%
fresh = LatentModel(vlm.config)
first = processor.collate(task_examples(1, seed=6, prompt_only=True), left=True)
with torch.no_grad():
    e_D = cloned.context(vlm(first), first.paired_B)[0, -1]
    every = torch.arange(codes)
    change = (fresh.speak(e_D.expand(codes, -1), every) - e_D).abs().max()
    print(f"new world model: largest |y - e| over all codes {change:.1e}")
    kept = [merge.w3.weight.clone() for merge in cloned.world.merges]
    scales, found, moved = np.linspace(0, 1, 11), [], []
    bare = log_probs(vlm.head(e_D), never=never)
    for scale in scales:
        for merge, w in zip(cloned.world.merges, kept):
            merge.w3.weight.copy_(scale * w)
        logp_KV = log_probs(vlm.head(cloned.speak(e_D.expand(codes, -1), every)), never=never)
        found.append(len(logp_KV.argmax(-1).unique()))
        finite = torch.where(bare.isfinite(), logp_KV - bare, 0.0)
        moved.append(float((logp_KV.exp() * finite).sum(-1).mean()))
    said = logp_KV.argmax(-1)
counts = torch.bincount(said).topk(6)
tokens = [(processor.tokenizer.decode([t]), int(n)) for t, n in zip(counts.indices, counts.values) if n]
print("what the codes say at the beginning of this answer, and how many of them:", tokens)

fig, axis = axes_of()
axis.plot(scales, found, "o-", color=PARTS["world"], label="different tokens among 128 codes")
other = axis.twinx()
other.plot(scales, moved, "s--", color=PARTS["codebook"], label="mean KL to the bare VLM, nats")
axis.set(xlabel="scale of the merges' last matrix", title="From the VLM (0) to the trained world model (1)")
axis.legend(loc="center right", fontsize=8)
other.legend(loc="lower right", fontsize=8)
show(fig, "6-world-model")

# %% [markdown]
# **Question.** All weights of the last matrix are 0 at the start. Then the codebook has no gradient in the first
# step. Which weights have one, and why does learning begin all the same?

# %% [markdown]
# ## 7. Cloning: the policy guesses the code without the look ahead
#
# The labels are the inverse dynamics' codes without noise. What the policy cannot guess is what the state leaves
# open.

# %%
batch = processor.collate(task_examples(12, seed=7))
with torch.no_grad():
    e_BTD = cloned.context(vlm(batch), batch.paired_B)
    codes_M = cloned.infer_codes(e_BTD)[batch.explained_BT]
    loss, hits = stage3_bc.bc_loss(cloned, e_BTD, batch, codes_M)
    logits_MK = cloned.policy(e_BTD)[:, :-1][batch.explained_BT]
    H_M = entropy(logits_MK[None])[0]
right_M = logits_MK.argmax(-1) == codes_M
print(f"L_bc {loss / len(codes_M):.2f} nats a token; log 128 = {np.log(128):.2f} for a blind guess")
print(f"the most likely code is the inferred one at {hits / len(codes_M):.0%} of {len(codes_M)} tokens")
print(f"entropy where it is right {H_M[right_M].mean():.2f} nats, where it is wrong {H_M[~right_M].mean():.2f}")

fig, axis = axes_of(9, 3.2)
row = batch.explained_BT[0].sum()
labels = [processor.tokenizer.decode([t]) for t in batch.ids_BT[0, 1:][batch.explained_BT[0]]]
axis.bar(range(row), H_M[:row], color=[COLOURS["latent"] if x else PARTS["gradient"] for x in right_M[:row]])
axis.set_xticks(range(row), labels, rotation=60, fontsize=8)
axis.set(ylabel="entropy of pi, nats", title="Blue: the policy's most likely code is the inferred one; red: it is not")
show(fig, "7-cloning")

# %% [markdown]
# **Question.** Where in the sentence is the policy undecided? Could a larger policy be sure there?

# %% [markdown]
# ## 8. One group of eight answers, through four algorithms
#
# Eight answers of the cloned policy to one prompt, judged by the rules. Then the advantage A of each answer and the
# weight w of each of its tokens, for GRPO, Dr.GRPO, DAPO and BNPO. A token pulls with w A.

# %%
examples = task_examples(1, seed=15, prompt_only=True)
prompt = processor.collate(examples, left=True)
longest = 48
roll = rollout(vlm, cloned, prompt, uniforms(8, [(k,) for k in range(8)], longest), **settings)
answers = decode(processor.tokenizer, roll, processor.eos_id)
r_BG = torch.from_numpy(reward(load_judge("rules"), [examples[0].record], answers))
n_G = roll.mask_NT.sum(1)
for k, text in enumerate(answers):
    print(f"{k + 1}. reward {r_BG[0, k]:.3f}, {n_G[k]} tokens: {text}")
print(f"mean {r_BG.mean():.4f}, standard deviation {r_BG[0].std():.4f}, {int(n_G.sum())} tokens in all")
print(
    f"by hand, answer 1: A = {r_BG[0, 0]:.3f} - {r_BG.mean():.3f}, in all but Dr.GRPO divided by {r_BG[0].std():.3f};"
)
print(f"GRPO w = 1 / (8 * {n_G[0]}), Dr.GRPO w = 1 / (8 * {longest}); DAPO and BNPO w = 1 / {int(n_G.sum())}")

pull = {}  # {algorithm: A, w A of a token, w A of the whole answer}
print("answer    " + "".join(f"{a.label + ' A':>11}{'w A':>10}" for a in ALGORITHMS.values()))
for kind in ALGORITHMS:
    adv_G, w_NT = group_advantages(r_BG, kind)[0], token_weights(roll.mask_NT, kind, longest)
    pull[kind] = (adv_G, w_NT[:, 0] * adv_G, w_NT.sum(1) * adv_G)
for k in range(8):
    print(f"{k + 1:<10}" + "".join(f"{adv[k]:11.3f}{token[k]:10.5f}" for adv, token, _ in pull.values()))

fig, (left, right) = axes_of(10, 3.4, 2)
for j, (kind, (_, token, whole)) in enumerate(pull.items()):
    at = np.arange(8) + 0.2 * (j - 1.5)
    left.bar(at, token, 0.2, label=ALGORITHMS[kind].label)
    right.bar(at, whole, 0.2)
labels = [f"{k + 1}\n{n}" for k, n in enumerate(n_G.tolist())]
left.set(title="Pull of one token: w A", xticks=range(8), xticklabels=labels, xlabel="answer, and its tokens")
right.set(
    title="Pull of the whole answer: sum of w A", xticks=range(8), xticklabels=labels, xlabel="answer, and its tokens"
)
left.legend(fontsize=8)
show(fig, "8-four-algorithms")

# %% [markdown]
# Dr.GRPO pulls less here, because it divides neither by a small standard deviation nor by the real length. AdamW
# does not mind: it divides by the gradient's own size.
#
# **Question.** The worst answer here is also the shortest. Which algorithm pushes hardest against each of its
# tokens? Why do DAPO and BNPO agree here, and when would they not? (`lecture/worked_example.md` does an update on
# paper.)

# %% [markdown]
# ## 9. The update from kept states, and what it saves
#
# The rollout has computed the state of every token. Everything but the policy is frozen, so these states stay
# right, and the update needs no pass through the VLM. Token RL has to run the VLM again, with gradients.

# %%
roll = rollout(vlm, cloned, processor.collate(task_examples(4, seed=9, prompt_only=True), left=True), draws, **settings)
policy = cloned.policy.requires_grad_(True)
adv_N, weights = torch.linspace(-1, 1, 32), token_weights(roll.mask_NT, "grpo", 48)


def seconds(work, times=3):
    """The shortest of several runs."""
    spent = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return min(spent)


def latent_update():
    logp, _ = sampled_logp(policy, roll)
    how = {"loss_type": "grpo", "clip_low": 0.2, "clip_high": 0.2, "beta": 0.0, "max_length": 48}
    policy_loss(logp, logp.detach(), None, adv_N, roll.mask_NT, weights_NT=weights, **how).backward()
    policy.zero_grad()


def read_again():
    with torch.no_grad():
        token_states(vlm, roll)


logp_NT, _ = sampled_logp(policy, roll)
logp_NT, real = logp_NT.detach(), roll.mask_NT
gap, kl = (logp_NT - roll.logp_NT)[real].abs().max(), k3(logp_NT, roll.logp_NT)[real].max()
print(f"log-probabilities now and while they were sampled differ by {gap:.1e} at most; k3 is {kl:.1e} at most")
spent = {"update from kept states": seconds(latent_update), "the VLM's pass alone that it saves": seconds(read_again)}
kept = sum(x.numel() * 4 for x in (roll.e_BLD, roll.e_NTD)) / 2**20
print({name: f"{x:.2f} s" for name, x in spent.items()}, f"and {kept:.1f} MiB of states kept")
assert action_logits(policy, roll).shape == (*roll.tokens_NT.shape, codes)
policy.requires_grad_(False)

fig, axis = axes_of(7, 2)
axis.barh(list(spent), list(spent.values()), color=[COLOURS["latent"], COLOURS["token"]])
axis.set(xlabel="seconds, 32 responses", title="What an update does, and what it does not have to do")
show(fig, "9-kept-states")

# %% [markdown]
# The tiny VLM has 2.1 million parameters and the policy 0.4 million. With a VLM of 3 billion the saving is larger. The
# paper reports 0.86 times the cost of a token update; `docs/cost.md` says what was measured here.
#
# **Question.** The rollout gets *dearer* with latent actions: policy and world model run at each token. Which of
# the two decides the cost of a training step, and on what does that depend?

# %% [markdown]
# ## 10. What held, and what did not
#
# Five seeds of RL with four algorithms, from `docs/results/results.json`. The lead is the latent side's judge ratio
# less the token side's, mean of the algorithms.

# %%
table = json.loads((ROOT / "docs" / "results" / "results.json").read_text())["table1"]
tests, lead = ("ID", "OOD", "LS1", "LS2"), {}
for test in tests:
    sides = [[table[f"{a.label} {side}"][test] for a in ALGORITHMS.values()] for side in ("latent", "token")]
    lead[test] = np.subtract(*sides).mean(0)  # a number for each seed
lead["mean"] = np.mean([lead[test] for test in tests], 0)
for test, by_seed in lead.items():
    print(f"{test:>5}: {by_seed.mean():+.3f} ± {by_seed.std(ddof=1):.3f}   by seed {np.round(by_seed, 3).tolist()}")

said = {}
for name, latent in (("before RL", cloned), ("after RL", tuned)):
    greedy = rollout(vlm, latent, first, torch.zeros(1, 48), **settings | {"group": 1, "temperature": 0})
    (said[name],) = decode(processor.tokenizer, greedy, processor.eos_id)
    print(f"{name}: {said[name]}")

fig, axis = axes_of()
for k, by_seed in enumerate(lead.values()):
    axis.plot([k] * len(by_seed), by_seed, "o", color=COLOURS["latent"], alpha=0.5)
    axis.plot([k - 0.2, k + 0.2], [by_seed.mean()] * 2, color=COLOURS["latent"], linewidth=3)
axis.axhline(0, color="#999999")
axis.set(xticks=range(len(lead)), xticklabels=list(lead), ylabel="lead of latent actions", title="One point a seed")
show(fig, "10-what-held")

# %% [markdown]
# - **Held.** RL over 128 codes reaches what RL over tokens reaches, though only a small policy trains. The update
#   is cheaper. Text-only data is what teaches the manner. With held-out persons (LS2) the latent side is ahead.
# - **Did not hold.** On the average of the tests the latent side is not ahead. Its rollouts are not more diverse.
#   The projector makes no difference that could be seen.
# - **Why.** Tokens are no poor action space for a VLM that already speaks well: part 1 shows how few choices are
#   free. And 2,048 tokens are far from 151,936. RL over codes never changes the VLM, so it cannot make it forget.
#
# **Question.** Which single experiment would you run to find out whether the paper's claim holds at its own scale?
