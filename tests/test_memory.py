"""The study of memory: its formulas against what the real steps allocate, its counts of weights, its tables."""

import gc
import json
import weakref
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import CODES, ROOT, TINY, shares
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import common
import model
import stage2_codebook
import stage3_bc
import stage4_latent_rl
from data import DataError
from rollout import rollout
from studies import memory
from studies.activations import Formula, Stages, Work
from studies.cases import SHAPES, Bench, RandomAgent
from studies.memory import GiB, Weights, all_weights, on_meta
from studies.straightforward import plain_products

BF16 = common.Place(torch.device("cpu"), torch.bfloat16, 0, 1)
EXPLAINED = 0.6  # of the tokens of a row, in the benchmark's batches
TOLERANCE = 0.07


# --------------------------------------------------------------------------------------------------------- measuring
class Live(TorchDispatchMode):
    """Bytes of the tensors that were made inside and still live: now, and at the peak."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for x in tree_leaves(out):
            if torch.is_tensor(x) and x.untyped_storage()._cdata not in given:
                self.add(x.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.sizes:
            return

        def gone(_):
            del self.sizes[key]
            self.now -= size

        self.sizes[key] = weakref.ref(storage, gone)
        self.now += size


def stored(*modules):
    """Bytes of the different storages of modules, by what of them trains."""
    found = {}
    for m in modules:
        for x in (*m.parameters(), *m.buffers()):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(found.values())


class Agent(RandomAgent):
    """Stage 4's agent on the models of a benchmark, as stage 4 loads them."""

    def __init__(self, bench, actions, micro):
        bench.latent.train_only("policy")
        super().__init__(bench, actions)
        self.cfg.micro = micro
        if actions == "latent":
            self.model = bench.speaking.policy
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.step_weights = common.Stepper(trained, 1e-5, 1.0)


def objective_of(stage, b):
    """-> (what trains, its loss as a stage passes it to common.gradients, how many batches it is given)."""
    latent, vlm, ids, cfg = b.latent, b.vlm, b.ids, stage2_codebook.Config()
    kinds = ("paired", "text")

    def projector(latent, given, norms):
        with torch.no_grad():
            h_BTD = vlm(given[0])
        return model.projector_loss(latent.projector, vlm, ids, given[0], h_BTD)[0] * norms[0], {}

    return {
        "1": (latent, projector, 1),
        "2": (latent, lambda m, given, norms: stage2_codebook.joint_loss(m, vlm, ids, *given, cfg, norms), 2),
        "3 clone": (latent, lambda m, given, norms: stage3_bc.clone_loss(m, vlm, dict(zip(kinds, given)), norms), 2),
        "3 adapt": (latent, lambda m, given, norms: stage3_bc.adapt_loss(m, vlm, *given, *norms), 1),
        "3 SFT": (b.token_vlm, lambda m, given, norms: stage3_bc.sft_loss(m, *given, *norms), 1),
    }[stage]


TRAINED = {
    "1": ("projector",),
    "2": stage2_codebook.trainable_parts("b"),
    "3 clone": stage3_bc.trainable_parts("clone"),
    "3 adapt": stage3_bc.trainable_parts("adapt"),
}


def pad(batch, left=False):
    """The last token of every row but the first becomes padding; left: the first one."""
    at = 0 if left else -1
    for x in (batch.ids_BT, batch.mask_BT, batch.response_BT):
        x[1:, at] = 0
    return batch


def step_of(stage, b, work):
    """-> the real step of a stage as a function, up to the optimizer's part."""
    micro = work.micro
    if stage.startswith("4"):
        actions = stage.split()[1]
        vlm, latent = (b.vlm, b.speaking) if actions == "latent" else (b.token_vlm, None)

        def roll():
            with b.place.autocast():
                return rollout(vlm, latent, b.prompt, b.u_NT, **b.settings())

        if stage.endswith("rollout"):
            return roll
        agent, given, adv_N = Agent(b, actions, micro), roll(), b.advantages()
        agent.step_weights = lambda records: torch.zeros(())
        objective, every = common.wrap(agent.model, agent.logp), torch.ones_like(adv_N, dtype=torch.bool)
        return lambda: stage4_latent_rl.update(agent, objective, given, adv_N, every)
    trained, loss_fn, kinds = objective_of(stage, b)
    if stage in TRAINED:
        trained.train_only(*TRAINED[stage])
    given = [pad(batch) if work.padded else batch for batch in b.pair(False)][:kinds]
    norms = stage2_codebook.normalisers(b.ids, *given) if stage == "2" else shares(*given)
    objective = common.wrap(trained, loss_fn)
    return lambda: common.gradients(b.place, objective, given, norms, micro)


def stages_with(work):
    """The stages that the settings change."""
    if work.checkpointing:
        return RECOMPUTED
    return [stage for stage in STAGES if not (work.micro and stage.endswith("rollout"))]


def measure(work):
    """-> {stage: peak bytes of its real step, beside weights, optimizer and what an earlier part of the step left}"""
    b = Bench(work.shape, torch.device("cpu"), work.dtype)
    if work.padded:
        pad(b.prompt, left=True)
    found = {}
    if work.checkpointing:
        b.token_vlm.recompute_blocks()
    for stage in stages_with(work):
        with plain_products():  # oneDNN's packed weights are on a CPU alone
            step = step_of(stage, b, work)
            with Live() as live:
                left = step()
            found[stage] = live.peak
        del left, step
        for m in (b.latent, b.speaking, b.token_vlm):
            m.zero_grad(set_to_none=True)
        gc.collect()
    return found


# -------------------------------------------------------------------------------- the formulas against what is measured
STAGES = ("1", "2", "3 clone", "3 adapt", "3 SFT", "4 latent rollout", "4 latent update", "4 token rollout",
          "4 token update")  # fmt: skip
RECOMPUTED = ("3 SFT", "4 token update")  # where --checkpointing has a meaning
SIZE = replace(
    SHAPES["tiny"],
    **{"width": 128, "heads": 4, "kv_heads": 2, "inner": 448, "blocks": 4, "train": 1, "vocab": 1000, "codes": 64},
    **{"inverse": 2, "policy": 3, "merges": 2, "rows": 2, "row": 120, "prompt": 90, "new": 40, "group": 4},
)
OTHER = replace(
    SHAPES["tiny"],
    **{"width": 96, "heads": 4, "kv_heads": 1, "inner": 512, "blocks": 5, "train": 2, "vocab": 3000, "tied": False},
    **{"inverse": 1, "policy": 2, "merges": 1, "rows": 4, "row": 90, "prompt": 60, "new": 40, "prompts": 2, "group": 3},
)
LONG = replace(
    SHAPES["tiny"],
    **{"width": 64, "heads": 4, "kv_heads": 2, "inner": 192, "blocks": 2, "train": 1, "vocab": 500, "codes": 32},
    **{"inverse": 1, "policy": 1, "merges": 1, "rows": 2, "row": 300, "prompt": 150, "new": 120, "group": 2},
)
WORKS = {
    "float32": Work(SIZE, torch.float32, padded=False),
    "bfloat16": Work(SIZE, padded=False),
    "a row at a time": Work(SIZE, micro=1, padded=False),
    "checkpointing": Work(SIZE, checkpointing=True, padded=False),
    "long and thin": Work(LONG, padded=True),
    "another size": Work(OTHER, padded=True),
    "another size, float32, two rows": Work(OTHER, torch.float32, micro=2, padded=True),
    "another size, a row at a time, checkpointing": Work(OTHER, micro=1, checkpointing=True, padded=True),
}
WORKS = {name: replace(w, explained=EXPLAINED, cuda=False) for name, w in WORKS.items()}
measured = cache(lambda name: measure(WORKS[name]))


@cache
def weights_for(name):
    return all_weights(Bench(WORKS[name].shape, torch.device("cpu"), WORKS[name].dtype))


def predicted(name):
    """-> {stage: peak bytes beside weights and optimizer}; the contexts of an update were there before it."""
    found = {}
    for stage, moments in Stages(WORKS[name]).all(weights_for(name)).items():
        caches = 1 if stage.endswith("rollout") else 0
        peaks = [m.activations + m.gradients + caches * m.caches for m in moments if m.name != "optimizer"]
        found[stage] = max(peaks)
    return found


def errors(name):
    """-> {stage: relative error of the formula}"""
    sizes = predicted(name)
    return {stage: sizes[stage] / size - 1 for stage, size in measured(name).items()}


@pytest.mark.parametrize("name", WORKS)
def test_the_formula_gives_what_the_real_step_holds_at_its_peak(name):
    assert {stage: e for stage, e in errors(name).items() if not abs(e) < TOLERANCE} == {}


PARTS = [name for name, value in vars(Formula).items() if callable(value) and not name.startswith("_")]


@pytest.mark.parametrize("part", PARTS)
def test_a_formula_without_one_of_its_parts_would_not_do(part, monkeypatch):
    """Nor with one part counted twice: it is off by more than the tolerance in some stage."""
    real, worst = getattr(Formula, part), 0
    for times in (0, 2):
        monkeypatch.setattr(Formula, part, lambda *given, times=times, **more: times * real(*given, **more))
        worst = max(worst, *(abs(e) for name in WORKS for e in errors(name).values()))
    assert worst > TOLERANCE


# ------------------------------------------------------------------------------------------------- weights, exactly
def test_the_written_out_sizes_are_those_of_qwen():
    """The numbers of parameters of Qwen2.5-VL-3B-Instruct and 7B-Instruct as published. Nothing is allocated."""
    for name, published in (("3b", 3_754_622_976), ("7b", 8_292_166_656)):
        with torch.device("meta"):
            b = on_meta(memory.vlm_config(SHAPES[name]), SHAPES[name], torch.bfloat16)
            tensors = [*b.vlm.parameters(), *b.latent.parameters(), *b.token_vlm.parameters()]
        assert sum(p.numel() for p in b.vlm.parameters()) == published
        assert all(x.is_meta for x in (*tensors, *b.vlm.buffers(), *b.latent.buffers()))


@pytest.mark.parametrize("actions", ["latent", "token"])
def test_the_weights_of_stage_4_are_those_that_it_loads(runs, never, actions):
    """Counted without loading anything, and as the bytes that a real agent stores, in bfloat16."""
    init = runs / ("loud" if actions == "latent" else "sft")
    arch = checkpoint.read_state(init)["arch"]
    config, shape = memory.from_checkpoint(TINY)
    sizes = {"codes": CODES, "inverse": 1, "policy": 1, "merges": 2, "train": 1}
    assert actions == "token" or [arch[k] for k in ("codes", "policy_blocks")] == [CODES, 1]
    with torch.device("meta"):
        w = all_weights(on_meta(config, replace(shape, **sizes), torch.bfloat16))[f"4 {actions}"]
    agent = stage4_latent_rl.Agent(stage4_latent_rl.Config(actions=actions, vlm=TINY, init=str(init)), BF16, never)
    own = [m for m in (agent.vlm, agent.latent) if m is not None]
    assert stored(*own) == w.frozen + w.trained
    assert stored(*own, agent.reference) == w.frozen + w.trained + w.reference
    assert sum(p.nbytes for p in agent.step_weights.params) == w.trained


@pytest.mark.parametrize("stage", [stage for stage in ("1", "2", "3 clone", "3 adapt", "3 SFT")])
def test_gradients_and_optimizer_are_as_large_as_what_trains(stage):
    """One gradient and two moments, float32, of what trains alone."""
    work = WORKS["bfloat16"]
    b, w = Bench(work.shape, torch.device("cpu"), work.dtype), weights_for("bfloat16")[stage]
    step_of(stage, b, work)()
    trained, _, _ = objective_of(stage, b)
    params = [p for p in trained.parameters() if p.requires_grad]
    assert sum(p.grad.nbytes for p in trained.parameters() if p.grad is not None) == w.trained
    step_weights = common.Stepper(params, 1e-5, 1.0)
    step_weights()
    state = [x for one in step_weights.optimizer.state.values() for x in one.values() if x.dim()]
    assert sum(x.nbytes for x in state) == 2 * w.trained
    assert not any(p.grad is not None for p in params)


def test_on_cuda_the_optimizer_makes_no_tensors_as_large_as_the_weights():
    with FakeTensorMode():
        on_gpu = common.adamw([torch.nn.Parameter(torch.empty(2, device="cuda"))], 1e-3)
    assert on_gpu.param_groups[0]["fused"]
    p = torch.nn.Parameter(torch.ones(1000))
    peaks = {}
    for kernel in ("fused", "foreach"):
        optimizer = torch.optim.AdamW([p], **{kernel: True})
        for _ in range(2):  # the first step makes the two moments
            p.grad = torch.ones(1000)
            with Live() as live:
                optimizer.step()
        peaks[kernel] = live.peak
    assert peaks["fused"] < 100 and peaks["foreach"] >= 4000


def test_with_ranks_gradients_lie_where_they_are_exchanged(tmp_path):
    """Else DDP would hold each of them twice."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = torch.nn.Linear(3, 4)
        objective = common.wrap(layer, lambda layer, x: layer(x).sum())
        objective(torch.ones(2, 3)).backward()
        assert len({p.grad.untyped_storage().data_ptr() for p in layer.parameters()}) == 1
        assert torch.equal(layer.weight.grad, torch.full((4, 3), 2.0))
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------- the tables
ROW = {"frozen": 5 * GiB, "trained": GiB, "reference": 0, "gradients": GiB, "optimizer": 2 * GiB, "caches": 0}


def test_a_stage_fits_with_the_mildest_settings_up_to_nine_tenths_of_the_gpu(monkeypatch):
    """By hand: 24e9 bytes leave 21.6e9. Rows in halves before blocks computed again; both parts of stage 4 count."""
    work, w = Work(replace(SHAPES["tiny"], rows=4, prompts=1, group=8)), Weights(0, 0, 0, 0)
    needs = {(0, False): 43_200_000_001, (4, False): 43_200_000_000, (2, False): 30e9, (1, False): 22e9}
    needs |= {(0, True): 21_600_000_001, (4, True): 21_600_000_000}

    def fullest(work, weights):
        total = needs.get((work.micro, work.checkpointing), 1e9)
        return {"4 token rollout": {"total": 1}, "4 token update": {"total": total}, "2": {"total": total}}

    monkeypatch.setattr(memory, "fullest", fullest)
    found = memory.fits(work, {"4 token": w, "2": w})
    assert {gpu: f["flags"] for gpu, f in found["4 token"].items()} == {
        "24": "--checkpointing yes --micro 4",
        "48": "--micro 4",
        "80": "",
        "141": "",
    }
    assert [f["flags"] for f in found["2"].values()] == [None, "--micro 2", "", ""]  # of 4 rows; no --checkpointing
    assert found["2"]["24"]["total"] == 22e9
    assert memory.fits_table("made up", found).splitlines()[2:] == [
        "| 4 token | `--checkpointing yes --micro 4` | `--micro 4` | yes | yes |",
        "| 2 | no: 20.5 GiB | `--micro 2` | yes | yes |",
    ]


def test_the_table_has_the_fullest_moment_and_its_sum():
    row = ROW | {"activations": 3 * GiB // 2, "total": 21 * GiB // 2, "moment": "backward"}
    (line,) = memory.rows_table("made up", {"2": row}).splitlines()[2:]
    assert line == "| 2 | 5.0 | 1.0 | 0.0 | 1.0 | 2.0 | 0.0 | 1.5 | 10.5 | backward |"


def test_several_ranks_keep_their_gradients_between_steps():
    work, w = WORKS["bfloat16"], weights_for("bfloat16")
    alone, four = (memory.fullest(replace(work, ranks=ranks), w)["4 latent rollout"] for ranks in (1, 4))
    assert alone["gradients"] == 0 and four["gradients"] == w["4 latent"].trained
    assert four["total"] - alone["total"] == w["4 latent"].trained


def test_the_pages_numbers_are_those_of_the_code():
    """docs/results/memory.json: run `python -m studies.memory --out docs/results/memory.json` where this fails."""
    assert json.loads((ROOT / "docs/results/memory.json").read_text()) == memory.compute(memory.Config())


def test_the_command_takes_any_vlm(tmp_path, capsys):
    memory.main(["--vlm", TINY, "--micro", "1", "--out", f"{tmp_path}/memory.json"])
    (found,) = json.loads((tmp_path / "memory.json").read_text()).values()
    shown = capsys.readouterr().out
    assert memory.fits_table(TINY, found["fits"]) in shown and memory.rows_table(TINY, found["rows"]) in shown
    with torch.device("meta"):
        vlm = on_meta(*memory.from_checkpoint(TINY), torch.bfloat16).vlm
    assert found["rows"]["1"]["frozen"] == sum(x.nbytes for x in (*vlm.parameters(), *vlm.buffers()))


BAD = {
    "no such shape": (["--shape", "8b"], None, "choose one of"),
    "no such folder": (["--vlm", "./nowhere"], None, "no such folder"),
    "an empty folder": (["--vlm", "{}"], None, "no configuration that can be used"),
    "a model of text": (["--vlm", "{}"], {"model_type": "llama"}, "Unrecognized configuration class"),
    "sliding windows": (["--vlm", "{}"], "sliding", "has layers of the type sliding_attention"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_computed_is_one_line(what, tmp_path):
    flags, config, reason = BAD[what]
    if config == "sliding":
        config = json.loads((ROOT / "tiny" / "vlm" / "config.json").read_text())
        config["text_config"]["layer_types"] = ["sliding_attention"] * 6
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    flags = [f.format(tmp_path) for f in flags]
    with pytest.raises(DataError) as e:
        memory.main(flags)
    assert str(e.value).startswith(" ".join(flags)) and reason in str(e.value)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400
