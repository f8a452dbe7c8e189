"""What is frozen and what trains: number formats, shared tensors, memory that is not kept, steps in parts."""

import pytest
import torch
from helpers import CODES, CPU, TINY, draws, generate, shares
from torch._subclasses import FakeTensorMode

import common
import model
import stage4_latent_rl
from model import attend, projector_loss
from stage2_codebook import Config, joint_loss, normalisers
from stage3_bc import adapt_loss, clone_loss, sft_loss
from vlm import VLM

BF16 = common.Place(torch.device("cpu"), torch.bfloat16, 0, 1)


# --------------------------------------------------------------------------------------------------- number formats
def test_what_trains_of_the_vlm_is_float32_and_the_rest_is_not():
    vlm = VLM(TINY, dtype=torch.bfloat16)
    trained = set(vlm.train_last(8 / 36))
    assert {n for n, p in vlm.model.named_parameters() if p.dtype == torch.float32} == trained
    assert vlm.head.weight is vlm.model.get_input_embeddings().weight


def test_the_states_stay_in_bfloat16_when_the_embeddings_are_float32(batch_of):
    """Else the keys and values of every block, and the caches, would be twice as large."""
    vlm, seen = VLM(TINY, dtype=torch.bfloat16), []
    vlm.train_last(8 / 36)
    for layer in vlm.text.layers:
        layer.self_attn.k_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    vlm.text.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    with BF16.autocast():
        vlm(batch_of("paired", 2))
    # the blocks that train have float32 norms in front; the frozen ones get what the embeddings give
    assert set(seen[:-1]) == {torch.bfloat16}


def test_the_reference_shares_what_does_not_train():
    vlm = VLM(TINY)
    trained = {f"model.{n}" for n in vlm.train_last(8 / 36)}
    reference = vlm.reference()
    own, copied = dict(vlm.named_parameters()), dict(reference.named_parameters())
    assert {n for n in own if own[n].data_ptr() != copied[n].data_ptr()} == trained
    assert all(torch.equal(own[n], copied[n]) for n in own) and not any(p.requires_grad for p in copied.values())
    assert reference.head.weight is reference.model.get_input_embeddings().weight
    with torch.no_grad():
        for n in trained:
            own[n] += 1
    assert not any(torch.equal(own[n], copied[n]) for n in trained)


@pytest.mark.parametrize("actions", ["latent", "token"])
def test_in_bfloat16_rl_keeps_float32_for_what_trains_alone(runs, processor, task_prompts, never, actions):
    """The KL starts at exactly 0, and three updates move the policy: nothing is lost in the rounding."""
    init = f"{runs}/{'loud' if actions == 'latent' else 'sft'}"
    cfg = stage4_latent_rl.Config(actions=actions, vlm=TINY, init=init, updates=3, lr=1e-5)
    agent = stage4_latent_rl.Agent(cfg, BF16, never)
    linear = [m for m in (agent.vlm if actions == "token" else agent.latent.world).modules() if hasattr(m, "weight")]
    frozen = [m.weight for m in linear if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad]
    assert frozen and all(w.dtype == torch.bfloat16 for w in frozen)
    assert all(p.dtype == torch.float32 for p in agent.step_weights.params)
    assert agent.latent is None or not hasattr(agent.latent, "inverse")
    with BF16.autocast():
        roll = generate(agent.vlm, agent.latent, processor, task_prompts, draws(4, 8), group=2)
    with torch.no_grad(), BF16.autocast():
        (logp, _), start = agent.logp(agent.model, roll), agent.reference_logp(roll)
    assert torch.equal(logp, start)
    before = [p.detach().clone() for p in agent.step_weights.params]
    seesaw, every = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.ones(4, dtype=torch.bool)
    metrics = stage4_latent_rl.update(agent, common.wrap(agent.model, agent.logp), roll, seesaw, every)
    assert metrics["kl"] > 0
    moved = [(p != b).float().mean() for p, b in zip(agent.step_weights.params, before)]
    assert sum(share > 0.9 for share in moved) > 0.7 * len(moved)


# ------------------------------------------------------------------------------------------------- fast attention
def test_with_a_mask_cuda_gets_as_many_key_heads_as_query_heads(monkeypatch):
    """Its fast kernels take a mask or grouped heads, not both. (Shapes alone: no GPU is needed.)"""
    given = []

    def attention(q, k, v, **settings):
        given.append((k.shape[1], v.shape[1], settings["enable_gqa"]))
        return q

    monkeypatch.setattr(model.F, "scaled_dot_product_attention", attention)
    for device in ("cuda", "cpu"):
        with FakeTensorMode():
            q, k = torch.empty(2, 8, 4, 16, device=device), torch.empty(2, 2, 4, 16, device=device)
            attend(q, k, k, torch.ones(2, 1, 4, 4, dtype=torch.bool, device=device), False)
            attend(q, k, k, None, True)
    assert given == [(8, 8, False), (2, 2, True), (2, 2, True), (2, 2, True)]


# -------------------------------------------------------------------------------------------- gradient checkpointing
def bytes_kept(loss_of):
    """-> (loss, bytes of the different tensors kept for the backward pass)."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = loss_of()
    return loss, sum(kept.values())


@pytest.mark.parametrize("place", [CPU, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["SFT", "token RL"])
def test_checkpointing_keeps_less_and_changes_nothing(batch_of, processor, task_prompts, place, what):
    """Token RL reads each prompt once for its group, through a cache: what is computed again is not appended again."""
    gradients, kept = [], []
    for again in (False, True):
        vlm = VLM(TINY, dtype=place.dtype)
        if not gradients:
            with torch.no_grad(), place.autocast():
                roll = generate(vlm, None, processor, task_prompts, draws(6, 20), group=3)
            demos = batch_of("task_demos", 3)
        vlm.train_last(8 / 36)
        if again:
            vlm.recompute_blocks()

        def loss_of():
            with place.autocast():
                if what == "SFT":
                    return sft_loss(vlm, demos, *shares(demos))[0]  # noqa: B023
                return stage4_latent_rl.sampled_logp(vlm, roll)[0].sum()  # noqa: B023

        before = sum(p.untyped_storage().nbytes() for p in vlm.parameters())
        loss, memory = bytes_kept(loss_of)
        loss.backward()
        kept.append(memory - before)
        gradients.append({n: p.grad for n, p in vlm.trained_tensors().items()})
    assert all(torch.allclose(gradients[0][n], g, rtol=1e-4, atol=1e-6) for n, g in gradients[1].items())
    assert all(g.abs().max() > 0 for g in gradients[1].values())
    assert kept[1] < 0.5 * kept[0]


# ------------------------------------------------------------------------------------------------- steps in parts
def losses_of(name, trainee, vlm, processor, batch_of):
    """-> (what trains, loss_fn, the step's batches, their norms) of a stage."""
    demos, paired, text = batch_of("task_demos", 4), batch_of("paired", 4), batch_of("text", 4)
    if name == "stage 1":
        trainee.train_only("projector")
        norm = common.share(processor.behind_image(paired).sum())
        loss_fn = lambda latent, given, norms: (  # noqa: E731
            projector_loss(latent.projector, vlm, processor, given[0], vlm(given[0]))[0] * norms[0],
            {},
        )
        return trainee, loss_fn, [paired], [norm]
    if name == "stage 2":
        trainee.train_only("projector", "inverse", "quantiser", "world")
        cfg = Config(projector_weight=1e-2)
        loss_fn = lambda latent, given, norms: joint_loss(latent, vlm, processor, *given, cfg, norms)  # noqa: E731
        return trainee, loss_fn, [paired, text], normalisers(processor, paired, text)
    if name == "clone":
        trainee.train_only("policy")
        kinds = ("paired", "text")
        loss_fn = lambda latent, given, norms: clone_loss(latent, vlm, dict(zip(kinds, given)), norms)  # noqa: E731
        return trainee, loss_fn, [paired, text], shares(paired, text)
    if name == "adapt":
        trainee.train_only("policy", "inverse", "quantiser", "world")
        return trainee, lambda latent, given, norms: adapt_loss(latent, vlm, *given, *norms), [demos], shares(demos)
    vlm = VLM(TINY)
    vlm.train_last(8 / 36)
    return vlm, lambda vlm, given, norms: sft_loss(vlm, *given, *norms), [demos], shares(demos)


@pytest.mark.parametrize("name", ["stage 1", "stage 2", "clone", "adapt", "SFT"])
def test_a_step_in_parts_has_the_same_gradient(name, trainee, vlm, processor, batch_of):
    """Four rows of different lengths in one, two and four backward passes: gradients and metrics to 1e-5."""
    trained, loss_fn, given, norms = losses_of(name, trainee, vlm, processor, batch_of)
    objective, found = common.wrap(trained, loss_fn), []
    for micro in (0, 2, 1):
        metrics = common.gradients(CPU, objective, given, norms, micro)
        gradient = {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
        found.append((metrics, gradient))
        trained.zero_grad(set_to_none=True)
    whole_metrics, whole = found[0]
    size = sum(g.norm() ** 2 for g in whole.values()).sqrt()
    assert size > 0
    for metrics, gradient in found[1:]:
        assert set(gradient) == set(whole) and set(metrics) == set(whole_metrics)
        apart = sum((gradient[n] - g).norm() ** 2 for n, g in whole.items()).sqrt()
        assert apart < 1e-5 * size
        for key, value in whole_metrics.items():
            torch.testing.assert_close(metrics[key].double(), value.double(), rtol=1e-5, atol=1e-6)


def test_ranks_exchange_gradients_with_the_last_part_alone(monkeypatch):
    """DDP's no_sync is entered for all parts but the last."""
    monkeypatch.setattr(common.dist, "is_initialized", lambda: True)

    class Ranks:
        def no_sync(self):
            return "apart"

    assert common.exchanging(Ranks(), last=False) == "apart" and common.exchanging(Ranks(), last=True) != "apart"


def test_the_noise_of_a_row_depends_on_its_draw_alone(batch_of):
    """Not on the other rows of its batch, nor on their lengths."""
    batch = batch_of("paired", 4)
    batch.draws = [(7, 0, n) for n in range(4)]
    counts = batch.explained_BT.sum(1).tolist()
    whole = batch.uniforms(CODES).split(counts)
    for b in range(4):
        assert torch.equal(batch.rows(slice(b, b + 1)).uniforms(CODES), whole[b])
    assert len({u[0, 0].item() for u in whole}) == 4
    batch.draws = [(7, 1, n) for n in range(4)]
    assert not torch.equal(batch.uniforms(CODES), torch.cat(whole))
