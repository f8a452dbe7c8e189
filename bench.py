"""What a step costs: ours against the straightforward way, latent actions against tokens, on random weights of any shape.

Every line is a ratio of two things run in turns in one process (A B A B ...; medians of --reps after a warm-up). Peak memory is measured
in a process of its own: all that the models and the step take, beyond the interpreter and its libraries. Nothing is downloaded.

The straightforward way (`plain_*` below) is the one that the paper's release and most first versions take: rows padded to the
maximum length, twice the rows' own here (MMRole's dialogues of 350 to 600 tokens fill less than a third of the paper's 2,048; a line
without that padding stands beside it); float32 logits over the whole vocabulary at every position; each loss with its own pass through the VLM;
placeholders kept in the text view; the world model run where nothing reads it; in RL, every copy of a prompt encoded, growing
caches, a look at the device for each token, and log-probabilities from a fresh pass through the whole VLM.

    python bench.py                                        # CPU, both shapes -> runs/bench/results.json, table.md, growth.png
    python bench.py --device cuda --shape 3b               # Qwen2.5-VL-3B's shape, random weights
"""

import contextlib
import copy
import json
import math
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Qwen2_5_VLConfig

import common
import stage2_codebook
import stage3_bc
import stage4_latent_rl
from data import Batch, DataError, Processor
from model import VLM, LatentModel, PackedLinear, entropy, gaussian_nll, log_probs, next_token_loss, rollout, sample, straight_through_gumbel

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclass
class Config:
    device: str = ""                     # cpu or cuda; empty: cuda where there is one
    shape: str = ""                      # cpu | second | 3b | tiny; empty: cpu and second, or 3b on cuda
    reps: int = 7                        # timed runs of each side
    threads: int = 2                     # CPU threads
    out: str = "runs/bench"              # folder for results.json, table.md, growth.png
    only: str = ""                       # one case, once: prints its peak memory (how the benchmark calls itself)
    vocab: int = 0                       # another vocabulary than the shape's


@dataclass
class Shape:
    """A model and a workload. The image is in pixels; rows and prompts are in tokens, the image's included."""
    width: int
    blocks: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    vision: tuple          # depth, width
    inverse: int
    policy: int
    merges: int
    train: int             # blocks that the token-level baseline trains
    rows: int              # paired rows a step, and as many text-only rows
    row: int
    prompt: int
    prompts: int = 1
    group: int = 8
    new: int = 64
    image: tuple = (84, 56)


SHAPES = {
    # Qwen2.5-VL-3B with the paper's 8 policy, 4 inverse and 2 merge blocks, a quarter as deep and as wide (a merge more, rounded up)
    "cpu": Shape(512, 9, 8, 2, 1376, 16384, (2, 128), inverse=1, policy=2, merges=1, train=2, rows=2, row=128, prompt=96),
    "second": Shape(256, 6, 4, 2, 512, 8192, (2, 64), inverse=4, policy=8, merges=2, train=2, rows=4, row=160, prompt=160),
    "3b": Shape(2048, 36, 16, 2, 11008, 151936, (32, 1280), inverse=4, policy=8, merges=2, train=8, rows=4, row=600, prompt=512, new=512,
                image=(420, 280)),
    "tiny": Shape(64, 3, 4, 2, 96, 512, (2, 32), inverse=1, policy=1, merges=1, train=1, rows=2, row=40, prompt=24, new=6),
}


def vlm_config(s):
    """A Qwen2.5-VL of that shape; its control tokens are the last ids of the vocabulary."""
    half, depth = s.width // s.heads // 2, s.vision[0]
    return Qwen2_5_VLConfig(
        text_config=dict(vocab_size=s.vocab, hidden_size=s.width, intermediate_size=s.inner, num_hidden_layers=s.blocks,
                         num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, max_position_embeddings=32768, tie_word_embeddings=True,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]},
                         bos_token_id=None, eos_token_id=None, pad_token_id=0),
        vision_config=dict(depth=depth, hidden_size=s.vision[1], intermediate_size=s.vision[1] * 2, num_heads=4 if s.vision[1] < 512 else 16,
                           out_hidden_size=s.width, patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=112,
                           fullatt_block_indexes=list(range(depth // 4, depth, max(1, depth // 4)))),
        image_token_id=s.vocab - 1, video_token_id=s.vocab - 2, vision_start_token_id=s.vocab - 3, vision_end_token_id=s.vocab - 4,
        tie_word_embeddings=True)


class Ids(Processor):
    """The ids that `Processor.text_view` needs, without a tokenizer."""

    def __init__(self, config):
        self.image_id, self.pad_id = config.image_token_id, 0
        self.vision_ids = {config.image_token_id, config.vision_start_token_id, config.vision_end_token_id}


# ----------------------------------------------------------------------------------------- the straightforward way
@contextlib.contextmanager
def plain_products():
    """Every product by torch's own nn.Linear."""
    before, PackedLinear.enabled = PackedLinear.enabled, False
    yield
    PackedLinear.enabled = before


def plain_world(world, e, c):
    x = e
    for m in world.merges:
        c = c.to(x.dtype)  # W [x; c] in two parts: the cost of one product with 2 D columns
        x = x + m.w3(F.silu(m.w1_x(x) + m.w1_c(c)) * (m.w2_x(x) + m.w2_c(c)))
    y = world.norm(x)
    return y * e.float().pow(2).mean(-1, keepdim=True).add(1e-6).sqrt().to(y.dtype)


def plain_inverse_loss(latent, vlm, batch, cfg):
    """L_inverse and the entropy bonus, a mean over explained tokens, with the logits of every position."""
    with torch.no_grad():
        h_BTD = vlm(batch)
        e_BTD = latent.context(h_BTD, batch.paired_B)
    logits_BTK, explained = latent.infer_actions(e_BTD), batch.response_BT[:, 1:]
    c_BTD = straight_through_gumbel(logits_BTK, cfg.tau) @ latent.codebook.weight
    logits_BTV = vlm.head(plain_world(latent.world, e_BTD[:, :-1], c_BTD)).float()
    nll_BT = F.cross_entropy(logits_BTV.transpose(1, 2), batch.ids_BT[:, 1:], reduction="none")
    return ((nll_BT - cfg.entropy_bonus * entropy(logits_BTK)) * explained).sum() / explained.sum(), h_BTD


def plain_joint_loss(latent, vlm, ids, paired, text, cfg):
    loss = plain_inverse_loss(latent, vlm, paired, cfg)[0]
    nll, h_BTD = plain_inverse_loss(latent, vlm, text, cfg)
    view = replace(paired, ids_BT=paired.ids_BT.masked_fill(paired.ids_BT == ids.image_id, ids.pad_id), images_B=0 * paired.images_B, pixels=None, grids=None)
    with torch.no_grad():
        h_VT, h_T = vlm(paired), vlm(view)
    P = latent.projector
    proj = (gaussian_nll(h_VT, *P.P(h_T), paired.mask_BT) + gaussian_nll(h_T, *P.P_back(h_VT), paired.mask_BT)) / paired.mask_BT.sum()
    return loss + nll + cfg.projector_weight * (proj + P.cycle_loss(h_BTD, text.mask_BT) / text.mask_BT.sum())


def plain_bc_loss(latent, vlm, given):
    loss = 0.0
    for batch in given.values():
        with torch.no_grad():
            a_star = latent.infer_actions(latent.context(vlm(batch), batch.paired_B)).argmax(-1)
            e_BTD = latent.context(vlm(batch), batch.paired_B)
        logits_BTK, explained = latent.policy(e_BTD)[:, :-1], batch.response_BT[:, 1:]
        vlm.head(plain_world(latent.world, e_BTD[:, :-1], latent.codebook(logits_BTK.argmax(-1)))).float()  # the forward pass has it
        loss = loss + (F.cross_entropy(logits_BTK.transpose(1, 2), a_star, reduction="none") * explained).sum() / explained.sum()
    return loss


def copies(batch, group):
    """Each row `group` times, images included."""
    def rep(x):
        return None if x is None else x.repeat_interleave(group, 0)
    patches = None if batch.grids is None else [int(g.prod()) for g in batch.grids]  # one image a row in this benchmark
    pixels = None if batch.pixels is None else torch.cat([x for x in batch.pixels.split(patches) for _ in range(group)])
    return Batch(rep(batch.ids_BT), rep(batch.mask_BT), rep(batch.response_BT), rep(batch.images_B), pixels, rep(batch.grids), [])


@torch.no_grad()
def plain_rollout(vlm, latent, prompt, u_NT, *, group, never, eos, pad):
    batch = copies(prompt, group)
    cache, policy_cache, mask_NS = DynamicCache(config=vlm.config), DynamicCache(), batch.mask_BT
    e_NTD = latent.context(vlm(batch, cache), batch.paired_B)
    deltas_N1, tokens, actions, done_N = vlm.positions(batch)[1], [], [], torch.zeros(len(u_NT), dtype=torch.bool, device=u_NT.device)
    for t in range(u_NT.shape[1]):
        a_N = sample(log_probs(latent.policy(e_NTD, mask_NS, policy_cache)[:, -1]), u_NT[:, t])
        logits_NV = vlm.head(plain_world(latent.world, e_NTD[:, -1], latent.codebook(a_N))).float()
        logits_NV[:, never] = -math.inf
        tokens.append(torch.where(done_N, pad, logits_NV.argmax(-1))), actions.append(a_N)
        done_N = done_N | (tokens[-1] == eos)
        if done_N.all():
            break
        mask_NS = torch.cat((mask_NS, torch.ones_like(mask_NS[:, :1])), 1)
        e_NTD = latent.context(vlm.extend(tokens[-1][:, None], mask_NS, deltas_N1, cache), batch.paired_B)
    return torch.stack(tokens, 1), torch.stack(actions, 1)


def plain_logp(vlm, latent, policy, roll):
    """log pi of the sampled actions from a pass of every prompt and response, whole, through the VLM and the policy."""
    both, L = copies(roll.prompt, roll.group), roll.prompt.ids_BT.shape[1]
    ids, mask = (torch.cat(x, 1) for x in ((both.ids_BT, roll.tokens_NT), (both.mask_BT, roll.mask_NT)))
    batch = replace(both, ids_BT=ids, mask_BT=mask)
    with torch.no_grad():
        e_NTD = latent.context(vlm(batch), batch.paired_B)
    return log_probs(policy(e_NTD, mask)[:, L - 1:-1]).gather(-1, roll.actions_NT[..., None])[..., 0]


# ------------------------------------------------------------------------------------------------------- the cases
class Bench:
    """Models, data and cases of one shape; a case builds only what it needs."""

    def __init__(self, shape, device):
        torch.manual_seed(0)
        self.s, self.device, self.config = shape, device, vlm_config(shape)
        self.ids, self.never = Ids(self.config), torch.arange(shape.vocab - 4, shape.vocab, device=device)
        self.kw = dict(never=self.never, eos=-1, pad=0, group=shape.group)  # no EOS: every response has full length
        self.u_NT = torch.rand(shape.prompts * shape.group, shape.new, device=device)

    @cached_property
    def vlm(self):
        return VLM(self.config, self.device, common.vlm_dtype(self.device))

    @cached_property
    def latent(self):
        s = self.s
        latent = LatentModel(self.vlm.config, 128, s.inverse, s.policy, s.merges).to(self.device)
        for m in latent.world.merges:
            torch.nn.init.normal_(m.w3.weight, std=0.02)
        return latent

    @cached_property
    def token_vlm(self):
        vlm = VLM(self.config, self.device, torch.float32)
        vlm.train_last(self.s.train / self.s.blocks)
        return vlm

    def batch(self, rows, length, image, padded=None, response=0.6):
        """Random rows; `response`: the share of each row that is a response. padded: the length they are padded to."""
        s, T = self.s, padded or length
        ids, (w, h) = torch.randint(1, s.vocab - 4, (rows, T)), (x // 14 for x in s.image)
        real = (torch.arange(T) < length).expand(rows, T).clone()
        pixels = grids = None
        if image:
            n = w * h // 4
            ids[:, 1:n + 3] = torch.tensor([self.config.vision_start_token_id] + [self.config.image_token_id] * n + [self.config.vision_end_token_id])
            pixels, grids = torch.randn(rows * w * h, 1176), torch.tensor([[1, h, w]] * rows)
        learnt = real & (torch.arange(T) >= length * (1 - response))
        return Batch(ids.masked_fill(~real, 0), real, learnt, torch.full((rows,), int(image)), pixels, grids, [None] * rows).to(self.device)

    def pair(self, padded):
        return [self.batch(self.s.rows, self.s.row, image, self.s.row * (2 if padded else 1)) for image in (True, False)]

    def optimizer(self, module):
        return common.adamw([p for p in module.parameters() if p.requires_grad], 1e-5)

    def trainer(self, module, loss):
        """-> one training step: loss, backward, clip, AdamW."""
        optimizer = self.optimizer(module)

        def step():
            with common.autocast(self.device):
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step(), optimizer.zero_grad(set_to_none=True)
        return step

    def stage2(self, plain=False, padded=False):
        self.latent.train_only(*stage2_codebook.trainable_parts("b"))
        (paired, text), cfg = self.pair(padded), stage2_codebook.Config()
        if plain:
            return self.trainer(self.latent, lambda: plain_joint_loss(self.latent, self.vlm, self.ids, paired, text, cfg))
        return self.trainer(self.latent, lambda: stage2_codebook.joint_loss(self.latent, self.vlm, self.ids, paired, text, cfg)[0])

    def stage3(self, plain=False, padded=False):
        self.latent.train_only(*stage3_bc.trainable_parts("clone"))
        given, cfg = dict(zip(("paired", "text"), self.pair(padded))), stage3_bc.Config()
        if plain:
            return self.trainer(self.latent, lambda: plain_bc_loss(self.latent, self.vlm, given))
        return self.trainer(self.latent, lambda: stage3_bc.latent_loss(self.latent, self.vlm, "clone", given, cfg)[0])

    @cached_property
    def prompt(self):
        return self.batch(self.s.prompts, self.s.prompt, True)

    def roll(self, actions):
        vlm, latent = (self.vlm, self.latent) if actions == "latent" else (self.token_vlm, None)
        with common.autocast(self.device):
            return rollout(vlm, latent, self.prompt, self.u_NT, actions=actions, **self.kw)

    def rollout(self, actions="latent"):
        return lambda: self.roll(actions)

    def rollout_plain(self):
        def run():
            with common.autocast(self.device):
                return plain_rollout(self.vlm, self.latent, self.prompt, self.u_NT, **self.kw)
        return run

    def generate(self):
        """The library's own sampling of as many tokens."""
        p = self.prompt
        return lambda: self.token_vlm.model.generate(
            input_ids=p.ids_BT, attention_mask=p.mask_BT.long(), pixel_values=p.pixels, image_grid_thw=p.grids, do_sample=True, top_k=0,
            mm_token_type_ids=(p.ids_BT == self.config.image_token_id).int(), max_new_tokens=self.s.new, min_new_tokens=self.s.new,
            num_return_sequences=self.s.group, pad_token_id=0)

    def learner(self, actions):
        """-> a function that updates once on a rollout, as stage 4 does."""
        if actions == "latent":
            self.latent.train_only("policy")
        model = self.latent.policy if actions == "latent" else self.token_vlm
        reference, optimizer = copy.deepcopy(model).requires_grad_(False), self.optimizer(model)
        cfg = stage4_latent_rl.Config(actions=actions, group=self.s.group, max_new=self.s.new)
        adv_N = torch.linspace(-1, 1, len(self.u_NT), device=self.device)
        objective = common.wrap(model, lambda model, roll: stage4_latent_rl.sampled_logp(model, roll, cfg, self.never))

        def learn(roll):
            with common.autocast(self.device):
                stage4_latent_rl.update(objective, reference, optimizer, optimizer.param_groups[0]["params"], roll, adv_N,
                                        torch.ones_like(adv_N, dtype=torch.bool), cfg, self.never, 0.2)
        return learn

    def update(self, actions="latent"):
        roll, learn = self.roll(actions), self.learner(actions)
        return lambda: learn(roll)

    def update_plain(self):
        self.latent.train_only("policy")
        roll, reference = self.roll("latent"), copy.deepcopy(self.latent.policy).requires_grad_(False)
        adv_N = torch.linspace(-1, 1, len(self.u_NT), device=self.device)

        def loss():
            with torch.no_grad():
                ref = plain_logp(self.vlm, self.latent, reference, roll)
            return stage4_latent_rl.policy_loss(plain_logp(self.vlm, self.latent, self.latent.policy, roll), roll.logp_NT, ref, adv_N, roll.mask_NT,
                                                loss_type="grpo", clip_low=0.2, clip_high=0.2, beta=0.01, max_length=self.s.new)
        return self.trainer(self.latent.policy, loss)

    def rl_step(self, actions="latent"):
        learn = self.learner(actions)
        return lambda: learn(self.roll(actions))

    def head_loss(self, plain=False, rows=1024):
        """The loss of the LM head alone, forward and backward, on 1,024 states."""
        y, ids = torch.randn(rows, self.s.width, device=self.device), torch.randint(self.s.vocab, (rows,), device=self.device)
        head = torch.nn.Linear(self.s.width, self.s.vocab, bias=False, device=self.device).requires_grad_(False)
        y.requires_grad_(True)
        if plain:
            return lambda: F.cross_entropy(head(y).float(), ids, reduction="sum").backward()
        return lambda: next_token_loss(head, y, ids).backward()

    def case(self, name):
        """'stage2 plain padded' -> the case as a function without arguments."""
        return {
            "stage2": self.stage2, "stage2 plain": lambda: self.stage2(True), "stage2 plain padded": lambda: self.stage2(True, True),
            "stage3": self.stage3, "stage3 plain": lambda: self.stage3(True), "stage3 plain padded": lambda: self.stage3(True, True),
            "rollout": self.rollout, "rollout plain": self.rollout_plain, "rollout token": lambda: self.rollout("token"), "generate": self.generate,
            "update": self.update, "update plain": self.update_plain, "update token": lambda: self.update("token"),
            "rl_step": self.rl_step, "rl_step token": lambda: self.rl_step("token"),
            "head_loss": self.head_loss, "head_loss plain": lambda: self.head_loss(True)}[name]()

    def ready(self, name):
        """The case, which the straightforward way and the library's generate() run with torch's own products."""
        f = self.case(name)
        if "plain" not in name and name != "generate":
            return f

        def run():
            with plain_products():
                f()
        return run


# case A -> what it is measured against: (line of the table, case B, target of the time A / B, of the memory A / B)
LINES = {
    "stage2": [("stage 2 joint step, ours / straightforward", "stage2 plain padded", 0.5, None), ("the same without padding", "stage2 plain", None, None)],
    "stage3": [("stage 3 step, ours / straightforward", "stage3 plain padded", None, None), ("the same without padding", "stage3 plain", None, None)],
    "rollout": [("rollout, ours / straightforward", "rollout plain", 0.5, None), ("rollout, latent / token", "rollout token", 1.13, None),
                ("rollout, latent / generate()", "generate", None, None)],
    "update": [("RL update, ours / straightforward", "update plain", None, None), ("RL update, latent / token", "update token", 0.35, None)],
    "rl_step": [("whole RL step, latent / token", "rl_step token", 1.0, 0.6)]}
WIDE = 151936  # the vocabulary of Qwen2.5-VL


def lines(name):
    """The lines of one workload, with its own targets."""
    if name == "wide":
        return {"stage2": [(*LINES["stage2"][0][:3], 0.4)]}
    if name != "second":
        return LINES
    own = {"stage2 plain padded": 1 / 3, "stage3 plain padded": 1 / 3, "update plain": 1 / 3}
    return {a: [(what, b, own.get(b), None) for what, b, _, _ in rivals] for a, rivals in LINES.items() if a != "rl_step"}


# ----------------------------------------------------------------------------------------------------- measurement
def seconds(f, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(fs, reps, device):
    """Run the functions in turns, reps times after one warm-up -> seconds [function][repetition]."""
    for f in fs:
        f()
    times = [[seconds(f, device) for f in fs] for _ in range(reps)]
    return [list(t) for t in zip(*times)]


def flops(f):
    with plain_products(), FlopCounterMode(display=False) as counter:  # it does not know oneDNN's
        f()
    return counter.get_total_flops()


def machine(device):
    """-> (FLOP/s of a large matrix product, bytes/s read by a large sum), measured here, in the VLM's dtype."""
    dtype = common.vlm_dtype(device)
    n = 8192 if device.type == "cuda" else 2048
    a, x = torch.randn(n, n, device=device, dtype=dtype), torch.zeros(2 ** 27 if device.type == "cuda" else 2 ** 25, device=device)
    product, read = in_turns([lambda: a @ a, lambda: x.sum()], 7, device)
    return 2 * n ** 3 / min(product), 4 * len(x) / min(read)


def resident(key):
    """Bytes of this process: key VmRSS now, VmHWM at its peak (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024


def peak_memory(shape, device, case):
    """Peak bytes of building and running a case twice, in this process; of the head's loss: beyond its weight and states."""
    Bench(SHAPES["tiny"], device).ready(case)()  # loads every library that the case needs
    loss_alone = case.startswith("head_loss")
    if device.type == "cuda":
        f = Bench(shape, device).ready(case)
        before = torch.cuda.memory_allocated() if loss_alone else 0
        torch.cuda.reset_peak_memory_stats()
        f(), f()
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    f = Bench(shape, device).ready(case)
    before = resident("VmRSS") if loss_alone else before
    if loss_alone:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    f(), f()
    return resident("VmHWM") - before


def apart(cfg, jobs):
    """[(shape name, case, vocabulary or 0)] -> {job: peak bytes}, each in its own process; None where it does not fit or cannot be measured."""
    def run(job):
        command = [sys.executable, __file__, "--device", cfg.device, "--threads", "1", "--shape", job[0], "--only", job[1], "--vocab", str(job[2])]
        done = subprocess.run(command, capture_output=True, text=True)
        return int(done.stdout.split()[-1]) if done.returncode == 0 else None
    with ThreadPoolExecutor(1 if cfg.device == "cuda" else 2) as pool:
        return dict(zip(jobs, pool.map(run, jobs)))


def measure(name, shape, device, reps):
    """Every line of one workload -> list of rows. A case and its rivals run in turns."""
    bench, rows, (matmul, read) = Bench(shape, device), [], machine(device)
    weights = sum(p.numel() * p.element_size() for m in (bench.vlm.text, bench.vlm.head) for p in m.parameters())
    for a, rivals in lines(name).items():
        fs = [bench.ready(c) for c in (a, *(r[1] for r in rivals))]
        mine, *others = [statistics.median(t) for t in in_turns(fs, reps, device)]
        for (what, b, target, target_memory), other in zip(rivals, others):
            rows.append({"shape": name, "line": what, "a": a, "b": b, "seconds": [mine, other], "ratio": mine / other,
                         "target": target, "target_memory": target_memory})
            common.say(f"{name}: {what}: {mine:.3f} s / {other:.3f} s = {mine / other:.2f}")
        if a == "rollout":
            rows[-1]["tokens_per_second"] = len(bench.u_NT) * shape.new / mine
            rows[-1]["share_of_floor"] = shape.new * weights / read / mine  # reading the VLM's weights once a token / the time it took
        elif name != "wide":
            rows[-1]["share_of_matmul"] = flops(fs[0]) / mine / matmul
    return rows


def growth(shape, device):
    """Seconds of a stage 2 step, a rollout and an RL update over three sizes each."""
    out = {}
    for what, sizes, field in (("stage 2 step, tokens a row", (1, 2, 4), "row"), ("rollout, new tokens", (1, 2, 4), "new"), ("RL update, new tokens", (1, 2, 4), "new")):
        base = getattr(shape, field) // 2
        benches = [Bench(replace(shape, **{field: base * k}), device) for k in sizes]
        fs = [b.case({"sta": "stage2", "rol": "rollout", "RL ": "update"}[what[:3]]) for b in benches]
        out[what] = {base * k: statistics.median(t) for k, t in zip(sizes, in_turns(fs, 3, device))}
    return out


def plot(grown, memory, path):
    fig, axes = plt.subplots(1, 4, figsize=(13, 3))
    for axis, (what, points) in zip(axes, grown.items()):
        x = list(points)
        axis.plot(x, list(points.values()), "o-")
        axis.plot([0, x[-1]], [0, points[x[-1]]], ":", color="grey")
        axis.set(title=what, ylabel="seconds", xlim=0, ylim=0)
    for name, points in memory.items():
        axes[3].plot(list(points), [v / 2 ** 30 for v in points.values()], "o-", label=name)
    axes[3].set(title="LM-head loss, vocabulary", ylabel="GiB beyond weights and states", xlim=0, ylim=0)
    axes[3].legend()
    fig.tight_layout(), fig.savefig(path, dpi=110), plt.close(fig)


def table(rows):
    def cell(value, target):
        return "" if value is None else f"{value:.2f}" + ("" if target is None else f" (<= {target:.2f})")
    lines = ["| shape | line, A / B | A, s | B, s | time A / B (target) | A, GiB | B, GiB | memory A / B (target) |", "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        m = [None if x is None else x / 2 ** 30 for x in r["peak"] or (None, None)]
        ratio = None if None in m else m[0] / m[1]
        lines.append(f"| {r['shape']} | {r['line']} | {r['seconds'][0]:.3f} | {r['seconds'][1]:.3f} | {cell(r['ratio'], r['target'])} | {cell(m[0], None)} "
                     f"| {cell(m[1], None)} | {cell(ratio, r['target_memory'])} |")
    return "\n".join(lines)


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    cfg.device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: there is no CUDA device here; leave it out to measure the CPU")
    device = torch.device(cfg.device)
    names = [cfg.shape] if cfg.shape else ["3b"] if cfg.device == "cuda" else ["cpu", "second"]
    if unknown := set(names) - set(SHAPES):
        raise DataError(f"--shape {unknown.pop()}: choose one of {', '.join(SHAPES)}")
    torch.set_num_threads(cfg.threads)
    shapes = {n: replace(SHAPES[n], vocab=cfg.vocab or SHAPES[n].vocab) for n in names}
    first = names[0]
    if cfg.only:
        print(peak_memory(shapes[first], device, cfg.only))
        return
    began, rows, out = time.time(), [], Path(cfg.out)
    if shapes[first].vocab < WIDE:
        shapes["wide"] = replace(shapes[first], vocab=WIDE)
    for name, shape in shapes.items():
        rows += measure(name, shape, device, cfg.reps)
    grown = growth(shapes[first], device)
    own, sizes = shapes[first].vocab, (WIDE // 8, WIDE // 2, WIDE)
    for r in rows:
        r["jobs"] = [(first, c, WIDE if r["shape"] == "wide" else own) for c in (r["a"], r["b"])] if r["shape"] != "second" else []
    jobs = [j for r in rows for j in r["jobs"]] + [(first, c, v) for c in ("head_loss", "head_loss plain") for v in sizes]
    peaks = apart(cfg, list(dict.fromkeys(jobs)))
    for r in rows:
        r["peak"] = [peaks[j] for j in r.pop("jobs")]
    memory = {label: {v: peaks[first, c, v] or 0 for v in sizes} for label, c in (("ours", "head_loss"), ("straightforward", "head_loss plain"))}
    out.mkdir(parents=True, exist_ok=True)
    results = {"rows": rows, "growth": grown, "head_loss_bytes": memory, "config": asdict(cfg), "shapes": {n: asdict(s) for n, s in shapes.items()},
               "torch": torch.__version__, "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "seconds": time.time() - began}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "table.md").write_text(table(rows) + "\n")
    plot(grown, memory, out / "growth.png")
    print(table(rows))


if __name__ == "__main__":
    common.run(main)
