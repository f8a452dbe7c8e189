"""The study of costs: the straightforward way gives the same numbers as ours, and the command runs."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import no_noise, shares
from torch.utils._python_dispatch import TorchDispatchMode

import common
import packed_linear
import rollout
import stage2_codebook
import stage3_bc
import vlm
from data import Batch, DataError
from packed_linear import PackedLinear
from studies import bench, straightforward
from studies.cases import SHAPES, Bench, RandomAgent

SHAPE = replace(SHAPES["tiny"], rows=2, prompts=2, group=3)


@pytest.fixture
def b():
    bench, g = Bench(SHAPE, torch.device("cpu")), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in bench.latent.parameters():  # off the initial values, so that no zero hides a mistake
            p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return bench


def gradients(module, loss):
    params = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return torch.cat([x.flatten() for x in found])


def same(ours, plain, module):
    """Equal losses and equal gradients, which are not all 0."""
    a, b = (gradients(module, loss) for loss in (ours, plain))
    assert ours.item() == pytest.approx(plain.item(), abs=1e-5)
    assert b.abs().max() > 1e-4
    torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max().item() + 1e-7, rtol=1e-3)


def cut(batch):
    """Rows of different lengths, so that there is padding in any case."""
    for tensor in (batch.ids_BT, batch.mask_BT, batch.response_BT):
        tensor[1:, -7:] = 0
    return batch


def padded_copy(short, long):
    """The rows of `short` in the longer batch."""
    T = short.ids_BT.shape[1]
    for name in ("ids_BT", "mask_BT", "response_BT"):
        tensor = getattr(long, name)
        tensor[:, :T], tensor[:, T:] = getattr(short, name), 0
    return replace(long, pixels=short.pixels)


# ------------------------------------------------------------------------------------- ours is the straightforward way
@pytest.mark.parametrize("padded", [False, True])
def test_stage2_step_equals_the_straightforward_way(b, monkeypatch, padded):
    """Without the projector's loss, whose text view differs on purpose (no placeholders), and with Gumbel noise that is
    the same everywhere."""
    monkeypatch.setattr(straightforward.torch, "rand_like", lambda x: torch.full_like(x, 0.5))
    monkeypatch.setattr(Batch, "uniforms", no_noise)
    b.latent.train_only(*stage2_codebook.trainable_parts("b"))
    cfg = stage2_codebook.Config(projector_weight=0.0)
    paired, text = (cut(batch) for batch in b.pair(False))
    ours = stage2_codebook.joint_loss(b.latent, b.vlm, b.ids, paired, text, cfg)[0]
    if padded:
        paired, text = (padded_copy(short, long) for short, long in zip((paired, text), b.pair(True)))
    same(ours, straightforward.joint_loss(b.latent, b.vlm, b.ids, paired, text, cfg), b.latent)


def test_stage3_step_equals_the_straightforward_way(b):
    b.latent.train_only("policy")
    given = dict(zip(("paired", "text"), map(cut, b.pair(False))))
    ours = stage3_bc.clone_loss(b.latent, b.vlm, given, shares(*given.values()))[0]
    same(ours, straightforward.clone_loss(b.latent, b.vlm, given), b.latent)


def test_rollout_equals_the_straightforward_way(b):
    b.prompt.ids_BT[0] = b.prompt.ids_BT[0].roll(5)  # one prompt is shorter: padded on the left
    b.prompt.ids_BT[0, :5], b.prompt.mask_BT[0, :5] = 0, False
    roll = b.roll("latent")
    tokens, actions = b.plain_roll()
    assert roll.actions_NT.unique().numel() > 8
    assert torch.equal(roll.actions_NT, actions) and torch.equal(roll.tokens_NT, tokens)


def test_rl_update_equals_the_straightforward_way(b):
    b.latent.train_only("policy")
    policy, roll = b.latent.policy, b.roll("latent")
    roll.mask_NT[0, 3:] = False  # one response that ended early
    ours, _ = rollout.sampled_logp(policy, roll)
    plain = straightforward.action_log_probs(b.vlm, b.latent, policy, roll)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)) * roll.mask_NT
    torch.testing.assert_close(ours[roll.mask_NT], plain[roll.mask_NT], atol=1e-4, rtol=0)
    same((ours * weight).sum(), (plain * weight).sum(), policy)


@pytest.mark.parametrize("ended_early", [False, True])
def test_token_update_reads_a_prompt_once_and_changes_nothing(b, ended_early):
    """The baseline's log-probabilities and gradients equal those of every prompt and response passed whole."""
    token_vlm, roll = b.token_vlm, b.roll("token")
    roll.mask_NT[1, 4:] = not ended_early
    ours, _ = rollout.sampled_logp(token_vlm, roll, never=b.never)
    states_NTD = token_vlm(straightforward.whole(roll))[:, SHAPE.prompt - 1 : -1]
    plain = vlm.log_probs(token_vlm.head(states_NTD), never=b.never).gather(-1, roll.tokens_NT[..., None])[..., 0]
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3)) * roll.mask_NT
    same((ours * weight).sum(), (plain * weight).sum(), token_vlm)


# ------------------------------------------------------------------------------------------------------------ the cases
def test_plain_products_are_packed_again_afterwards():
    with pytest.raises(KeyError), straightforward.plain_products():
        assert not PackedLinear.enabled
        raise KeyError
    assert PackedLinear.enabled == packed_linear.AVAILABLE


@pytest.mark.parametrize("actions", ["latent", "token"])
@pytest.mark.parametrize("fused", [False, True])
def test_every_rollout_is_sampled_from_the_updated_weights(monkeypatch, actions, fused):
    """After an update the next rollout's log-probabilities are those of the new policy, whatever the optimizer tells of
    its steps."""
    monkeypatch.setattr(common, "adamw", lambda params, lr: torch.optim.AdamW(params, lr=1e-2, fused=fused))
    b = Bench(replace(SHAPE, vocab=4096), torch.device("cpu"))  # with a head that is packed
    assert type(b.vlm.head) is PackedLinear
    learn, last = b.learner(actions), None
    net = b.latent.policy if actions == "latent" else b.token_vlm
    for _ in range(3):
        roll = b.roll(actions)
        with torch.no_grad():
            logp, _ = rollout.sampled_logp(net, roll, never=b.never)
        torch.testing.assert_close(logp, roll.logp_NT, atol=1e-4, rtol=0)
        assert last is None or (logp - last).abs().max() > 1e-2
        last = logp
        learn(roll)


def test_the_benchmarks_agent_trains_what_stage_4_trains(b):
    """The policy's parameters alone; the reference is a frozen copy."""
    agent = RandomAgent(b, "latent")
    assert {id(p) for p in agent.step_weights.params} == {id(p) for p in b.latent.policy.parameters()}
    assert [p.requires_grad for p in b.latent.parameters()].count(True) == len(agent.step_weights.params)
    assert not any(p.requires_grad for p in agent.reference.parameters())
    assert "token_vlm" not in vars(b)  # not built, so that the latent side's memory is its own


# --------------------------------------------------------------------------------------------------------------- memory
class Largest(TorchDispatchMode):
    """Numbers in the largest new tensor."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out) and not out._is_view() and func is not torch.ops.aten.t.default:
            self.size = max(self.size, out.numel())
        return out


def test_memory_of_the_loss_does_not_grow_with_the_vocabulary(monkeypatch):
    """The largest tensor that the loss makes, forward and backward; the gradient of the states has 1,200 numbers."""
    monkeypatch.setattr(vlm.HeadLogProbs, "LOGITS", 4096)
    for vocabulary in (512, 2048):
        head = torch.nn.Linear(4, vocabulary, bias=False).requires_grad_(False)
        y_MD, ids_M = torch.randn(300, 4, requires_grad=True), torch.randint(vocabulary, (300,))
        with Largest() as largest:
            vlm.next_token_loss(head, y_MD, ids_M).backward()
        assert 1200 <= largest.size <= 4096
    with Largest() as largest:
        torch.nn.functional.cross_entropy(head(y_MD), ids_M).backward()
    assert largest.size == 300 * 2048  # what the plain loss holds


# ---------------------------------------------------------------------------------------------------------- the command
def test_peak_memory_is_measured_in_a_process_of_its_own():
    jobs = [("tiny", "rl_step", 2**16), ("tiny", "no such case", 0)]
    apart = bench.apart(bench.Config(device="cpu"), jobs)
    assert apart[jobs[0]] > 2**24  # the embeddings alone have as many bytes
    assert apart[jobs[1]] is None


def test_the_command_writes_table_results_and_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "apart", lambda cfg, jobs: {job: 2**20 for job in jobs})
    monkeypatch.setattr(bench, "WIDE", 1024)
    flags = {"shape": "tiny", "reps": 1, "threads": 1, "device": "cpu", "out": tmp_path}
    bench.main([x for flag, value in flags.items() for x in (f"--{flag}", str(value))])
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["rows"]) == 11
    assert all(row["ratio"] > 0 and None not in row["peak"] for row in results["rows"])
    assert (tmp_path / "growth.png").stat().st_size > 1000
    assert (tmp_path / "table.md").read_text().count("\n") == 13


def test_wrong_flags_are_refused():
    with pytest.raises(DataError, match="--shape huge: choose one of cpu"):
        bench.main(["--device", "cpu", "--shape", "huge"])
    if not torch.cuda.is_available():
        with pytest.raises(DataError, match="no CUDA device"):
            bench.main(["--device", "cuda"])
