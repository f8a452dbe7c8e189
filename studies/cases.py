"""Models, data and cases of the benchmark, which studies/bench.py times: any size, random weights, no downloads."""

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLConfig

import common
import stage2_codebook
import stage3_bc
import stage4_latent_rl
from data import Batch, Processor
from model import LatentModel
from rollout import rollout
from studies import straightforward
from vlm import VLM, next_token_loss


@dataclass
class Shape:
    """The size of a vision-language model (VLM), of the latent side, and of their work."""

    width: int  # of the VLM
    blocks: int
    heads: int
    kv_heads: int
    inner: int  # width inside the MLPs
    vocab: int
    vision: tuple  # blocks, width and inner width of the image encoder
    inverse: int  # blocks of the inverse dynamics
    policy: int  # blocks of the policy
    merges: int  # of the world model
    train: int  # blocks of the VLM that the token-level baseline trains
    rows: int  # paired rows a training step, and as many text-only rows
    row: int  # tokens a row, the image's included
    prompt: int  # tokens a prompt, the image's included
    prompts: int = 1  # in a rollout
    group: int = 8  # responses to each prompt
    new: int = 64  # tokens a response
    image: tuple = (84, 56)  # pixels
    tied: bool = True  # the LM head is the embedding
    codes: int = 128  # in the codebook


SHAPES = {  # line by line: the VLM, what trains, the work
    # Qwen2.5-VL-3B with the paper's blocks (`3b` below), a quarter as deep and as wide; a merge more, rounded up
    "cpu": Shape(
        **{"width": 512, "blocks": 9, "heads": 8, "kv_heads": 2, "inner": 1376, "vocab": 16384},
        **{"vision": (2, 128, 256), "inverse": 1, "policy": 2, "merges": 1, "train": 2},
        **{"rows": 2, "row": 128, "prompt": 96},
    ),
    # the paper's blocks on a small VLM
    "second": Shape(
        **{"width": 256, "blocks": 6, "heads": 4, "kv_heads": 2, "inner": 512, "vocab": 8192, "vision": (2, 64, 128)},
        **{"inverse": 4, "policy": 8, "merges": 2, "train": 2},
        **{"rows": 4, "row": 160, "prompt": 160},
    ),
    "3b": Shape(
        **{"width": 2048, "blocks": 36, "heads": 16, "kv_heads": 2, "inner": 11008, "vocab": 151936},
        **{"vision": (32, 1280, 3420), "inverse": 4, "policy": 8, "merges": 2, "train": 8},
        **{"rows": 4, "row": 600, "prompt": 512, "new": 512, "image": (420, 280)},
    ),
    "7b": Shape(
        **{"width": 3584, "blocks": 28, "heads": 28, "kv_heads": 4, "inner": 18944, "vocab": 152064, "tied": False},
        **{"vision": (32, 1280, 3420), "inverse": 4, "policy": 8, "merges": 2, "train": 6},
        **{"rows": 4, "row": 600, "prompt": 512, "new": 512, "image": (420, 280)},
    ),
    "tiny": Shape(
        **{"width": 64, "blocks": 3, "heads": 4, "kv_heads": 2, "inner": 96, "vocab": 512, "vision": (2, 32, 64)},
        **{"inverse": 1, "policy": 1, "merges": 1, "train": 1},
        **{"rows": 2, "row": 40, "prompt": 24, "new": 6},
    ),
}


def vlm_config(shape):
    """A Qwen2.5-VL of that shape; its control tokens are the last four ids of the vocabulary."""
    half, (depth, vision_width, vision_inner) = shape.width // shape.heads // 2, shape.vision
    time, height = half // 4, half * 3 // 8  # parts of rope that turn with time, height and width
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [time, height, half - time - height]}
    text = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": shape.tied,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    vision = {
        "depth": depth,
        "hidden_size": vision_width,
        "intermediate_size": vision_inner,
        "num_heads": 4 if vision_width < 512 else 16,
        "out_hidden_size": shape.width,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": list(range(depth // 4, depth, max(1, depth // 4))),
    }
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    control = {name: shape.vocab - 1 - k for k, name in enumerate(names)}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape.tied, **control)


class Ids(Processor):
    """The ids that `Processor.text_view` needs, without a tokenizer."""

    def __init__(self, config):
        self.image_id, self.pad_id = config.image_token_id, 0
        self.vision_ids = {config.image_token_id, config.vision_start_token_id, config.vision_end_token_id}


class Bench:
    """Models, data and cases of one shape. A case is a method: it takes what it needs, which is built when it is first
    used, and returns the function that is to be timed."""

    def __init__(self, shape, device, dtype=None):
        """dtype: of forward passes; by default bfloat16 on CUDA, float32 elsewhere."""
        torch.manual_seed(0)
        self.shape, self.device, self.config = shape, device, vlm_config(shape)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.place = common.Place(device, dtype, 0, 1)
        self.ids = Ids(self.config)
        self.never = torch.arange(shape.vocab - 4, shape.vocab, device=device)
        self.u_NT = torch.rand(shape.prompts * shape.group, shape.new, device=device)

    # -------------------------------------------------------------------------------------------------- models and data
    @cached_property
    def vlm(self):
        return VLM(self.config, self.device, self.place.dtype)

    @cached_property
    def token_vlm(self):
        """The VLM as the token-level baseline trains it."""
        vlm = VLM(self.config, self.device, self.place.dtype)
        vlm.train_last(self.shape.train / self.shape.blocks)
        return vlm

    @cached_property
    def latent(self):
        s = self.shape
        latent = LatentModel(self.vlm.config, s.codes, s.inverse, s.policy, s.merges).to(self.device)
        for merge in latent.world.merges:  # as after training: at their start they do nothing
            torch.nn.init.normal_(merge.w3.weight, std=0.02)
        return latent

    @cached_property
    def speaking(self):
        """The latent model as stage 4 loads it: without the inverse dynamics, and what is frozen in `place.dtype`."""
        latent = copy.deepcopy(self.latent)
        del latent.inverse
        latent.train_only("policy")
        return common.settle(latent, self.place.dtype)

    def reference(self, actions):
        """What stage 4 compares with, of the same tensors where they are frozen anyway."""
        if actions == "token":
            return self.token_vlm.reference()
        return common.settle(copy.deepcopy(self.latent.policy).requires_grad_(False), self.place.dtype)

    @cached_property
    def prompt(self):
        return self.batch(self.shape.prompts, self.shape.prompt, image=True)

    def pair(self, padded):
        """-> a paired and a text-only batch. padded: to twice the rows' length."""
        s = self.shape
        return [self.batch(s.rows, s.row, image, s.row * (2 if padded else 1)) for image in (True, False)]

    def batch(self, rows, length, image, padded_to=None, response=0.6):
        """Random rows; `response`: the share of each row that is a response."""
        config, T = self.config, padded_to or length
        ids_BT = torch.randint(1, self.shape.vocab - 4, (rows, T))
        pixels = grids = None
        if image:
            w, h = (size // 14 for size in self.shape.image)  # in patches; four patches are a token
            placeholders = [config.image_token_id] * (w * h // 4)
            tokens = [config.vision_start_token_id, *placeholders, config.vision_end_token_id]
            ids_BT[:, 1 : len(tokens) + 1] = torch.tensor(tokens)
            pixels, grids = torch.randn(rows * w * h, 1176), torch.tensor([[1, h, w]] * rows)
        at_T = torch.arange(T)
        real_BT = (at_T < length).expand(rows, T).clone()
        response_BT = real_BT & (at_T >= length * (1 - response))
        images_B = torch.full((rows,), int(image))
        ids_BT, draws = ids_BT.masked_fill(~real_BT, 0), [(b,) for b in range(rows)]
        batch = Batch(ids_BT, real_BT, response_BT, images_B, pixels, grids, [None] * rows, draws)
        return batch.to(self.device)

    # ------------------------------------------------------------------------------------------------------------ cases
    def trainer(self, module, loss):
        """-> one training step: loss, backward, clip, AdamW."""
        step_weights = common.Stepper([p for p in module.parameters() if p.requires_grad], 1e-5, 1.0)

        def step():
            with self.place.autocast():
                value = loss()
            value.backward()
            step_weights()

        return step

    def stage2(self, plain=False, padded=False):
        """A step of phase b on a paired and a text-only batch."""
        latent, vlm, cfg = self.latent, self.vlm, stage2_codebook.Config()
        latent.train_only(*stage2_codebook.trainable_parts("b"))
        paired, text = self.pair(padded)
        if plain:
            return self.trainer(latent, lambda: straightforward.joint_loss(latent, vlm, self.ids, paired, text, cfg))
        return self.trainer(latent, lambda: stage2_codebook.joint_loss(latent, vlm, self.ids, paired, text, cfg)[0])

    def stage3(self, plain=False, padded=False):
        """A step of cloning on a paired and a text-only batch."""
        latent, vlm = self.latent, self.vlm
        latent.train_only(*stage3_bc.trainable_parts("clone"))
        given = dict(zip(("paired", "text"), self.pair(padded)))
        if plain:
            return self.trainer(latent, lambda: straightforward.clone_loss(latent, vlm, given))
        norms = [common.share(batch.explained_BT.sum()) for batch in given.values()]
        return self.trainer(latent, lambda: stage3_bc.clone_loss(latent, vlm, given, norms)[0])

    def settings(self):
        """Of a rollout. There is no EOS: every response has its full length."""
        return {"group": self.shape.group, "never": self.never, "eos": -1, "pad": 0}

    def roll(self, actions):
        vlm, latent = (self.vlm, self.latent) if actions == "latent" else (self.token_vlm, None)
        with self.place.autocast():
            return rollout(vlm, latent, self.prompt, self.u_NT, **self.settings())

    def plain_roll(self):
        with self.place.autocast():
            return straightforward.rollout(self.vlm, self.latent, self.prompt, self.u_NT, **self.settings())

    def generate(self):
        """The library's own sampling of as many tokens."""
        p = self.prompt
        inputs = {"input_ids": p.ids_BT, "attention_mask": p.mask_BT.long(), "pixel_values": p.pixels}
        inputs |= {"image_grid_thw": p.grids, "mm_token_type_ids": (p.ids_BT == self.config.image_token_id).int()}
        lengths = {"max_new_tokens": self.shape.new, "min_new_tokens": self.shape.new}
        settings = {"do_sample": True, "top_k": 0, "num_return_sequences": self.shape.group, "pad_token_id": 0}
        return lambda: self.token_vlm.model.generate(**inputs, **lengths, **settings)

    def advantages(self):
        return torch.linspace(-1, 1, len(self.u_NT), device=self.device)

    def learner(self, actions):
        """-> a function that updates once on a rollout, as stage 4 does."""
        agent = RandomAgent(self, actions)
        objective, adv_N = common.wrap(agent.model, agent.logp), self.advantages()

        def learn(roll):
            with self.place.autocast():
                stage4_latent_rl.update(agent, objective, roll, adv_N, torch.ones_like(adv_N, dtype=torch.bool))

        return learn

    def update(self, actions):
        roll, learn = self.roll(actions), self.learner(actions)
        return lambda: learn(roll)

    def plain_update(self):
        vlm, latent, roll, adv_N = self.vlm, self.latent, self.roll("latent"), self.advantages()
        latent.train_only("policy")
        policy, reference = latent.policy, copy.deepcopy(latent.policy).requires_grad_(False)
        settings = {"loss_type": "grpo", "clip_low": 0.2, "clip_high": 0.2, "beta": 0.01, "max_length": self.shape.new}

        def loss():
            with torch.no_grad():
                logp_ref = straightforward.action_log_probs(vlm, latent, reference, roll)
            logp = straightforward.action_log_probs(vlm, latent, policy, roll)
            return stage4_latent_rl.policy_loss(logp, roll.logp_NT, logp_ref, adv_N, roll.mask_NT, **settings)

        return self.trainer(policy, loss)

    def rl_step(self, actions):
        learn = self.learner(actions)
        return lambda: learn(self.roll(actions))

    def head_loss(self, plain=False, rows=1024):
        """The loss of the LM head alone, forward and backward, on 1,024 states."""
        s, device = self.shape, self.device
        y, ids = torch.randn(rows, s.width, device=device), torch.randint(s.vocab, (rows,), device=device)
        head = torch.nn.Linear(s.width, s.vocab, bias=False, device=device).requires_grad_(False)
        y.requires_grad_(True)
        if plain:
            return lambda: F.cross_entropy(head(y).float(), ids, reduction="sum").backward()
        return lambda: next_token_loss(head, y, ids).backward()

    def ready(self, name):
        """The case `name`, see CASES, as a function without arguments.

        The straightforward way and the library's generate() run with torch's own products."""
        f = CASES[name](self)
        if "plain" not in name and name != "generate":
            return f

        def run():
            with straightforward.plain_products():
                f()

        return run


class RandomAgent(stage4_latent_rl.Agent):
    """Stage 4's agent, whose model comes from the benchmark, not from a finished run."""

    def __init__(self, bench, actions):
        self.cfg = stage4_latent_rl.Config(actions=actions, group=bench.shape.group, max_new=bench.shape.new)
        self.never, self.place = bench.never, bench.place
        if actions == "latent":
            bench.latent.train_only("policy")
        self.model = bench.latent.policy if actions == "latent" else bench.token_vlm
        self.reference = bench.reference(actions)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.step_weights = common.Stepper(trained, 1e-5, self.cfg.clip_norm)


CASES = {  # name -> Bench -> the function that is to be timed
    "stage2": lambda b: b.stage2(),
    "stage2 plain": lambda b: b.stage2(plain=True),
    "stage2 plain padded": lambda b: b.stage2(plain=True, padded=True),
    "stage3": lambda b: b.stage3(),
    "stage3 plain": lambda b: b.stage3(plain=True),
    "stage3 plain padded": lambda b: b.stage3(plain=True, padded=True),
    "rollout": lambda b: lambda: b.roll("latent"),
    "rollout plain": lambda b: b.plain_roll,
    "rollout token": lambda b: lambda: b.roll("token"),
    "generate": lambda b: b.generate(),
    "update": lambda b: b.update("latent"),
    "update plain": lambda b: b.plain_update(),
    "update token": lambda b: b.update("token"),
    "rl_step": lambda b: b.rl_step("latent"),
    "rl_step token": lambda b: b.rl_step("token"),
    "head_loss": lambda b: b.head_loss(),
    "head_loss plain": lambda b: b.head_loss(plain=True),
}
