"""bench.py: the straightforward way gives the same numbers as ours, and the command runs."""

import copy
import json
from dataclasses import replace

import pytest
import torch

import bench
import common
import model
import stage2_codebook
import stage3_bc
import stage4_latent_rl
from bench import SHAPES, Bench

SHAPE = replace(SHAPES["tiny"], rows=2, prompts=2, group=3)


@pytest.fixture
def b():
    bench = Bench(SHAPE, torch.device("cpu"))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in bench.latent.parameters():  # off the initial values, so that no zero hides a mistake
            p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return bench


def gradients(module, loss):
    params = [p for p in module.parameters() if p.requires_grad]
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)])


def same(ours, plain, module):
    a, b = (gradients(module, loss) for loss in (ours, plain))
    assert ours.item() == pytest.approx(plain.item(), abs=1e-5)
    assert b.abs().max() > 1e-4
    torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max().item() + 1e-7, rtol=1e-3)


@pytest.mark.parametrize("padded", [False, True])
def test_stage2_step_equals_the_straightforward_way(b, monkeypatch, padded):
    """Without the projector's loss, whose text view differs on purpose (no placeholders), and with Gumbel noise that is the same everywhere."""
    monkeypatch.setattr(model.torch, "rand_like", lambda x: torch.full_like(x, 0.5))
    b.latent.train_only(*stage2_codebook.trainable_parts("b"))
    cfg = stage2_codebook.Config(projector_weight=0.0)
    (paired, text), (paired_long, text_long) = (map(cut, b.pair(False))), b.pair(True)
    if padded:
        for short, long in ((paired, paired_long), (text, text_long)):
            T = short.ids_BT.shape[1]
            for name in ("ids_BT", "mask_BT", "response_BT"):
                getattr(long, name)[:, :T], getattr(long, name)[:, T:] = getattr(short, name), 0
            long.pixels = short.pixels
    else:
        paired_long, text_long = paired, text
    ours = stage2_codebook.joint_loss(b.latent, b.vlm, b.ids, paired, text, cfg)[0]
    same(ours, bench.plain_joint_loss(b.latent, b.vlm, b.ids, paired_long, text_long, cfg), b.latent)


def cut(batch):
    """Rows of different lengths, so that there is padding in any case."""
    for name in ("ids_BT", "mask_BT", "response_BT"):
        getattr(batch, name)[1:, -7:] = 0
    return batch


def test_stage3_step_equals_the_straightforward_way(b):
    b.latent.train_only("policy")
    given = dict(zip(("paired", "text"), map(cut, b.pair(False))))
    ours = stage3_bc.latent_loss(b.latent, b.vlm, "clone", given, stage3_bc.Config())[0]
    same(ours, bench.plain_bc_loss(b.latent, b.vlm, given), b.latent)


def test_rollout_equals_the_straightforward_way(b):
    b.prompt.ids_BT[0] = b.prompt.ids_BT[0].roll(5)  # one prompt is shorter: padded on the left
    b.prompt.ids_BT[0, :5], b.prompt.mask_BT[0, :5] = 0, False
    roll = b.roll("latent")
    tokens, actions = bench.plain_rollout(b.vlm, b.latent, b.prompt, b.u_NT, **b.kw)
    assert roll.actions_NT.unique().numel() > 8
    assert torch.equal(roll.actions_NT, actions) and torch.equal(roll.tokens_NT, tokens)


def test_rl_update_equals_the_straightforward_way(b):
    b.latent.train_only("policy")
    roll = b.roll("latent")
    roll.mask_NT[0, 3:] = False  # one response that ended early
    cfg = stage4_latent_rl.Config()
    ours, _ = stage4_latent_rl.sampled_logp(b.latent.policy, roll, cfg, b.never)
    plain = bench.plain_logp(b.vlm, b.latent, b.latent.policy, roll)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)) * roll.mask_NT
    torch.testing.assert_close(ours[roll.mask_NT], plain[roll.mask_NT], atol=1e-4, rtol=0)
    same((ours * weight).sum(), (plain * weight).sum(), b.latent.policy)


@pytest.mark.parametrize("ended_early", [False, True])
def test_token_update_reads_a_prompt_once_and_changes_nothing(b, ended_early):
    """The baseline's log-probabilities and gradients equal those of every prompt and response passed whole."""
    vlm, roll = b.token_vlm, b.roll("token")
    roll.mask_NT[1, 4:] = not ended_early
    ours, _ = stage4_latent_rl.sampled_logp(vlm, roll, stage4_latent_rl.Config(actions="token"), b.never)
    both, L = bench.copies(roll.prompt, SHAPE.group), SHAPE.prompt
    batch = replace(both, ids_BT=torch.cat((both.ids_BT, roll.tokens_NT), 1), mask_BT=torch.cat((both.mask_BT, roll.mask_NT), 1))
    logp = model.log_probs(vlm.head(vlm(batch)[:, L - 1:-1]), never=b.never).gather(-1, roll.tokens_NT[..., None])[..., 0]
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3)) * roll.mask_NT
    same((ours * weight).sum(), (logp * weight).sum(), vlm)


def test_packed_product_is_the_plain_one_and_follows_its_weight():
    torch.manual_seed(0)
    holder = torch.nn.ModuleList([torch.nn.Linear(512, 300), torch.nn.Linear(8, 8)])
    model.pack(holder)
    big, small = holder
    assert type(big) is model.PackedLinear and type(small) is torch.nn.Linear
    x = torch.randn(2, 5, 512)
    big.requires_grad_(False)
    for change in (lambda: None, lambda: big.weight.mul_(-2), lambda: big.load_state_dict({"weight": torch.ones(300, 512), "bias": torch.zeros(300)})):
        with torch.no_grad():
            change()
            torch.testing.assert_close(big(x), x @ big.weight.T + big.bias, atol=1e-3, rtol=0)
            torch.testing.assert_close(copy.deepcopy(big)(x), big(x), atol=0, rtol=0)
    big.requires_grad_(True)
    big(x).sum().backward()  # with gradients, torch's own
    torch.testing.assert_close(big.weight.grad, x.sum((0, 1)).expand(300, 512), atol=1e-3, rtol=0)
    for fused in (False, True):  # a fused step does not move the version counter
        with torch.no_grad(), model.nothing_trains():
            before = big(x)
        torch.optim.AdamW([big.weight], lr=0.1, fused=fused).step()
        with torch.no_grad(), model.nothing_trains():
            assert (big(x) - before).abs().max() > 0.5
            torch.testing.assert_close(big(x), x @ big.weight.T + big.bias, atol=1e-2, rtol=0)
        with torch.no_grad():
            torch.testing.assert_close(big(x), x @ big.weight.T + big.bias, atol=1e-2, rtol=0)


@pytest.mark.parametrize("actions", ["latent", "token"])
@pytest.mark.parametrize("fused", [False, True])
def test_every_rollout_is_sampled_from_the_updated_weights(monkeypatch, actions, fused):
    """After an update the next rollout's log-probabilities are those of the new policy, whatever the optimizer tells of its steps."""
    monkeypatch.setattr(common, "adamw", lambda params, lr: torch.optim.AdamW(params, lr=1e-2, fused=fused))
    b = Bench(replace(SHAPE, vocab=4096), torch.device("cpu"))  # with a head that is packed
    assert type(b.vlm.head) is model.PackedLinear
    learn, net = b.learner(actions), b.latent.policy if actions == "latent" else b.token_vlm
    cfg, last = stage4_latent_rl.Config(actions=actions), None
    for _ in range(3):
        roll = b.roll(actions)
        with torch.no_grad():
            logp, _ = stage4_latent_rl.sampled_logp(net, roll, cfg, b.never)
        torch.testing.assert_close(logp, roll.logp_NT, atol=1e-4, rtol=0)
        assert last is None or (logp - last).abs().max() > 1e-2
        last = logp
        learn(roll)


def test_memory_of_the_loss_does_not_grow_with_the_vocabulary(monkeypatch):
    """The largest tensor that the loss makes, forward and backward, beyond the gradient of the states."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            fresh = torch.is_tensor(out) and not out._is_view() and func is not torch.ops.aten.t.default
            Largest.size = max(Largest.size, out.numel() if fresh else 0)
            return out

    monkeypatch.setattr(model.HeadLogProbs, "LOGITS", 4096)
    for vocabulary in (512, 2048):
        head, y = torch.nn.Linear(4, vocabulary, bias=False).requires_grad_(False), torch.randn(300, 4, requires_grad=True)
        ids = torch.randint(vocabulary, (300,))
        Largest.size = 0
        with Largest():
            model.next_token_loss(head, y, ids).backward()
        assert 1200 <= Largest.size <= 4096
    Largest.size = 0
    with Largest():
        torch.nn.functional.cross_entropy(head(y), ids).backward()
    assert Largest.size == 300 * 2048  # what the plain loss holds


def test_the_command_writes_table_results_and_plot(tmp_path, monkeypatch):
    apart = bench.apart(bench.Config(device="cpu"), [("tiny", "rl_step", 2 ** 16), ("tiny", "no such case", 0)])
    assert apart["tiny", "rl_step", 2 ** 16] > 2 ** 24 and apart["tiny", "no such case", 0] is None  # the embeddings alone have as many bytes
    monkeypatch.setattr(bench, "apart", lambda cfg, jobs: {j: 2 ** 20 for j in jobs})
    monkeypatch.setattr(bench, "WIDE", 1024)
    bench.main(["--shape", "tiny", "--reps", "1", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["rows"]) == 11 and all(r["ratio"] > 0 and None not in r["peak"] for r in results["rows"])
    assert (tmp_path / "growth.png").stat().st_size > 1000 and (tmp_path / "table.md").read_text().count("\n") == 13
    if not torch.cuda.is_available():
        with pytest.raises(common.DataError, match="no CUDA device"):
            bench.main(["--device", "cuda"])
