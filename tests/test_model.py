"""model.py: each equation by hand, no leak of the future, quantisers are interchangeable, what trains."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CODES,
    alone,
    assert_only,
    close,
    names_of,
    no_noise,
    picked,
    question,
    shake,
    shares,
    snapshot,
    take_step,
)

import stage2_codebook
import stage3_bc
from data import Batch, Example, uniforms
from model import (
    Gaussian,
    GumbelQuantiser,
    LatentModel,
    Projector,
    entropy,
    gaussian_nll,
    inverse_loss,
    projector_loss,
    straight_through_gumbel,
)
from rollout import action_logits, rollout

LN = math.log


# -------------------------------------------------------------------------------------------------- projector
def test_gaussian_nll_by_hand():
    # differences (1, 2), log-variances (0, ln 4), variances (1, 4): (1/1 + 4/4 + 0 + ln 4) / 2 = 1 + ln 2
    # differences (0, 3), log-variances (-ln 2, 0), variances (1/2, 1): (0 + 9 - ln 2) / 2; ln 2 keeps its sign
    mu = torch.tensor([[[5.0, -1.0], [2.0, 2.0], [0.0, 0.0]]])
    target = mu + torch.tensor([[[1.0, 2.0], [0.0, 3.0], [70.0, 70.0]]])
    logvar = torch.tensor([[[0.0, LN(4)], [-LN(2), 0.0], [0.5, 0.5]]])
    first, second = 1 + LN(2), (9 - LN(2)) / 2
    both = gaussian_nll(target, mu, logvar, torch.tensor([[True, True, False]]))
    assert both.item() == pytest.approx(first + second, abs=1e-5)
    one = gaussian_nll(target, mu, logvar, torch.tensor([[True, False, False]]))
    assert one.item() == pytest.approx(first, abs=1e-5)


def test_log_variance_stays_within_one():
    torch.manual_seed(8)
    p = Gaussian(8)
    with torch.no_grad():
        p.logvar[2].weight.mul_(20)
        logvar = p(torch.randn(2, 50, 8))[1]
        raw = p.logvar(torch.randn(2, 50, 8))
    assert raw.abs().max() > 2 and logvar.abs().max() <= 1 and logvar.min() < -0.5 and logvar.max() > 0.5


def test_projector_skip():
    torch.manual_seed(10)
    x = torch.randn(2, 3, 8)
    assert torch.equal(Gaussian(8)(x)[0], x)  # starts at the identity
    plain = Gaussian(8, skip=False)  # the paper's form
    first, _, last = plain.mlp
    by_hand = torch.tanh(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    close(plain(x)[0], by_hand, 1e-6)
    assert plain(x)[0].abs().max() > 0.05


def normal_nll(target, mu, logvar, mask):
    """The same loss from torch's Normal, whose constant D/2 log 2 pi is taken off."""
    nll = -torch.distributions.Normal(mu, (logvar / 2).exp()).log_prob(target) - 0.5 * LN(2 * math.pi)
    return nll.sum(-1)[mask].sum()


def test_projector_losses_and_their_mask():
    torch.manual_seed(9)
    p = shake(Projector(8), 0.3)
    h_VT, h_T = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 1, 1, 0]]).bool()
    loss = p.paired_loss(h_VT, h_T, mask)
    close(loss, normal_nll(h_VT, *p.P(h_T), mask) + normal_nll(h_T, *p.P_back(h_VT), mask))
    loss.backward()
    for g in (h_VT.grad, h_T.grad):
        assert (g[~mask] == 0).all() and (g[mask].abs().sum(-1) > 1e-3).all()
    close(p.cycle_loss(h_T, mask), normal_nll(h_T, *p.P_back(p.P.mean(h_T)), mask))


def states_with_and_without(vlm, processor, e):
    """The states of the text tokens behind the first image, encoded with the images and without -> (h_VT, h_T)."""
    text = ~np.isin(e.ids, list(processor.vision_ids))
    behind = (np.cumsum(e.ids == processor.image_id) > 0)[text]
    view = Example(e.ids[text], e.response[text], None, None, e.record)
    with torch.no_grad():
        return vlm(alone(e))[0, text][behind], vlm(alone(view))[0][behind]


def test_projector_loss_compares_a_dialogue_with_itself_without_its_images(vlm, processor):
    """One row has text before its image, one has two images. Each row is encoded alone, by hand."""
    rows = [
        question(processor, 21, 0, system="You are Odo the monk.", prompt_only=False),
        question(processor, 22, 0, 28, prompt_only=False),
    ]
    torch.manual_seed(13)
    width = vlm.config.hidden_size
    projector, batch = shake(Projector(width), 0.02), processor.collate(rows)
    with torch.no_grad():
        h_BTD = vlm(batch)
    loss, error, identity = projector_loss(projector, vlm, processor, batch, h_BTD)
    pairs = [states_with_and_without(vlm, processor, e) for e in rows]
    h_VT, h_T = (torch.cat(states) for states in zip(*pairs))
    every = torch.ones(len(h_T), dtype=torch.bool)
    want = normal_nll(h_VT, *projector.P(h_T), every) + normal_nll(h_T, *projector.P_back(h_VT), every)
    assert processor.behind_image(batch).sum() == len(h_T) and loss.item() == pytest.approx(want.item(), rel=1e-4)
    assert identity.item() == pytest.approx(((h_T - h_VT) ** 2).sum().item() / width, rel=1e-3)
    assert error.item() == pytest.approx(((projector.P.mean(h_T) - h_VT) ** 2).sum().item() / width, rel=1e-3)
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in projector.parameters()) and not error.requires_grad


# --------------------------------------------------------------------------------------------------- codebook
def test_gumbel_forward_is_one_hot_and_gradient_that_of_the_softmax():
    torch.manual_seed(6)
    logits, tau = torch.randn(4, 50, 8, requires_grad=True), 2.0
    u, outward = torch.rand(4, 50, 8), torch.randn(4, 50, 8)
    y = straight_through_gumbel(logits, u, tau)
    noisy = logits.detach() - torch.log(-torch.log(u))
    assert torch.equal(y.detach(), F.one_hot(noisy.argmax(-1), 8).float())  # exactly: no 0.9999999
    (y * outward).sum().backward()
    s = torch.exp(noisy / tau)
    s = s / s.sum(-1, keepdim=True)
    close(logits.grad, s * (outward - (outward * s).sum(-1, keepdim=True)) / tau, 1e-6)


def test_gumbel_draws_softmax_of_the_logits():
    torch.manual_seed(7)
    n = 40000
    for tau in (0.5, 2.0):  # the temperature shapes the gradient, never the draw
        y = straight_through_gumbel(torch.tensor([0.0, LN(3)]).expand(n, 2), torch.rand(n, 2), tau)
        assert abs(y[..., 1].mean() - 0.75) < 3 * math.sqrt(0.75 * 0.25 / n)


def test_entropy_by_hand():
    close(entropy(torch.full((2, 3, 16), 0.7)), torch.full((2, 3), LN(16)), 1e-5)
    # probabilities 1/4 and 3/4: (ln 4) / 4 + 3/4 ln(4/3)
    want = LN(4) / 4 + 0.75 * LN(4 / 3)
    assert entropy(torch.tensor([[[0.0, LN(3)]]])).item() == pytest.approx(want, abs=1e-6)


def test_quantiser_gives_rows_of_the_codebook_and_codes_without_noise():
    torch.manual_seed(14)
    q, logits = GumbelQuantiser(8, 5), torch.randn(200, 8)
    c_MD, codes_M, _ = q(logits, torch.rand_like(logits))
    row_MK = (c_MD[:, None] == q.codebook.weight).all(-1)
    assert (row_MK.sum(1) == 1).all()  # exactly one row each, bit for bit
    assert (row_MK.int().argmax(1) != codes_M).any()  # the vectors are drawn, the codes are not
    assert codes_M.tolist() == [max(range(8), key=row.__getitem__) for row in logits.tolist()]
    assert torch.equal(q.choose(logits), codes_M) and codes_M.dtype == torch.int64
    assert q.codes == 8 and q.vectors() is q.codebook.weight


def test_quantiser_s_auxiliary_loss_by_hand():
    q = GumbelQuantiser(2, 5, entropy_bonus=0.5)
    logits = torch.tensor([[0.0, LN(3)], [1.0, 1.0]], requires_grad=True)
    auxiliary = q(logits, torch.rand_like(logits))[2]
    # entropies (ln 4) / 4 + 3/4 ln(4/3) and ln 2, summed; a bonus is a negative loss
    want = -0.5 * (LN(4) / 4 + 0.75 * LN(4 / 3) + LN(2))
    assert auxiliary.item() == pytest.approx(want, abs=1e-6)
    auxiliary.backward()  # a step against the gradient makes the first row less decided
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1] and logits.grad[1].abs().max() < 1e-6


def test_quantiser_s_gradients_reach_codebook_and_logits():
    torch.manual_seed(15)
    q, logits, outward = GumbelQuantiser(4, 3), torch.randn(30, 4, requires_grad=True), torch.randn(30, 3)
    c_MD = q(logits, torch.rand_like(logits))[0]
    (c_MD * outward).sum().backward()
    drawn = torch.cdist(c_MD.detach(), q.codebook.weight.detach()).argmin(1)
    by_code = torch.stack([outward[drawn == k].sum(0) for k in range(4)])
    close(q.codebook.weight.grad, by_code, 1e-5)
    assert (logits.grad.abs().amax(1) > 0).all()


class SignQuantiser(torch.nn.Module):
    """Finite scalar quantisation with two levels: the signs of two logits, so four codes; no codebook, no noise."""

    codes = 4

    def __init__(self, width):
        super().__init__()
        self.up = torch.nn.Linear(2, width, bias=False)

    def vectors(self):
        return self.up(torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]]))

    def choose(self, logits):
        return ((logits[..., :2] > 0) * torch.tensor([1, 2])).sum(-1)

    def forward(self, logits_MK, _):
        soft = torch.tanh(logits_MK[:, :2])
        hard = torch.where(soft > 0, 1.0, -1.0)
        return self.up(hard + soft - soft.detach()), self.choose(logits_MK), 0.1 * (soft**2).sum()


@pytest.fixture
def with_signs(vlm):
    """A latent model with the other quantiser in its place."""
    torch.manual_seed(0)
    m = shake(LatentModel(vlm.config, SignQuantiser.codes, 1, 1), 0.02)
    m.quantiser = SignQuantiser(vlm.config.hidden_size)
    return m


def test_the_other_quantiser_s_codes_are_its_vectors():
    torch.manual_seed(16)
    q = SignQuantiser(6)
    vectors, codes, _ = q(torch.randn(50, 4), torch.rand(50, 4))
    assert codes.unique().numel() == 4
    close(vectors, q.vectors()[codes], 1e-5)


@pytest.mark.parametrize("phase", ["a", "b"])
def test_another_quantiser_trains_in_stage_2(with_signs, vlm, processor, batch_of, phase):
    trained = stage2_codebook.trainable_parts(phase)
    with_signs.train_only(*trained)
    before, text = snapshot(vlm, with_signs), batch_of("text") if phase == "b" else None
    cfg = stage2_codebook.Config()
    loss, metrics = stage2_codebook.joint_loss(with_signs, vlm, processor, batch_of("paired"), text, cfg)
    assert all(len(used_K) == 4 for name, used_K in metrics.items() if name.startswith("used"))
    take_step(loss, vlm, with_signs)
    # two of the four logits are not read: their weights have gradient 0, and those of the rest move
    assert_only(before, (vlm, with_signs), names_of(with_signs, *trained))


@pytest.mark.parametrize("phase", ["clone", "adapt"])
def test_another_quantiser_trains_in_stage_3(with_signs, vlm, batch_of, phase):
    trained = stage3_bc.trainable_parts(phase)
    with_signs.train_only(*trained)
    before = snapshot(vlm, with_signs)
    if phase == "clone":
        given = {"paired": batch_of("paired"), "text": batch_of("text")}
        loss, _ = stage3_bc.clone_loss(with_signs, vlm, given, shares(*given.values()))
    else:
        demos = batch_of("task_demos")
        loss, _ = stage3_bc.adapt_loss(with_signs, vlm, demos, *shares(demos))
    take_step(loss, vlm, with_signs)
    assert_only(before, (vlm, with_signs), names_of(with_signs, *trained))


def test_another_quantiser_rolls_out(with_signs, vlm, processor, prompts, never):
    settings = {"never": never, "eos": -1, "pad": processor.pad_id}
    u_NT = uniforms(0, [(0,), (1,), (2,)], 4)
    r = rollout(vlm, with_signs, processor.collate(prompts, left=True), u_NT, **settings)
    assert r.actions_NT.max() < 4
    with torch.no_grad():
        logp = F.log_softmax(action_logits(with_signs.policy, r), -1)
    close(picked(logp, r.actions_NT), r.logp_NT)


# ------------------------------------------------------------------------------------------------ world model
@torch.no_grad()
def test_world_model_starts_at_the_vlm(vlm, processor, prompts):
    torch.manual_seed(3)
    batch = processor.collate(prompts)
    e = vlm(batch)[batch.mask_BT]
    a, plain = torch.arange(len(e)) % CODES, vlm.head(e)
    close(vlm.head(LatentModel(vlm.config, CODES, 1, 1).speak(e, a)), plain)
    normed = e / (e**2).mean(-1, keepdim=True).sqrt()
    for output, start in (("norm", normed), ("release", normed - e)):
        y = LatentModel(vlm.config, CODES, 1, 1, world_output=output).speak(e, a)
        close(y, start)
        assert (vlm.head(y) - plain).abs().max() > 0.5


@torch.no_grad()
def test_shaken_world_model_listens_to_its_code(latent):
    torch.manual_seed(4)
    e = torch.randn(1, 1, 128).expand(1, CODES, 128)
    y = latent.speak(e, torch.arange(CODES)[None])
    assert torch.cdist(y[0], y[0]).add(torch.eye(CODES) * 9).min() > 0.01


def world_by_hand(world, e, c):
    """x <- x + W3(silu(W1 [x; c]) * (W2 [x; c])), written out with [x; c]; then the norm, at e's own length."""
    x = e
    for m in world.merges:
        xc = torch.cat((x, c), -1)
        w1, w2 = torch.cat((m.w1_x.weight, m.w1_c.weight), 1), torch.cat((m.w2_x.weight, m.w2_c.weight), 1)
        x = x + (F.silu(xc @ w1.T) * (xc @ w2.T)) @ m.w3.weight.T
    rms_x, rms_e = ((v**2).mean(-1, keepdim=True).add(1e-6).sqrt() for v in (x, e))
    return world.norm.weight * x / rms_x * rms_e


def test_world_model_is_the_formula_with_the_code_beside_the_context(vlm):
    """Actions as codes and as code vectors; values and the gradients of contexts, code vectors and weights."""
    torch.manual_seed(11)
    latent = shake(LatentModel(vlm.config, CODES, 1, 1))
    latent.train_only("world")
    a = torch.arange(7)
    e, c = torch.randn(7, 128, requires_grad=True), latent.quantiser.vectors()[a].clone().requires_grad_(True)
    weights, outward = [e, c, *latent.world.parameters()], torch.randn(7, 128)
    plain = world_by_hand(latent.world, e, c)
    want = torch.autograd.grad((plain * outward).sum(), weights)
    ours = latent.speak(e, c)
    close(ours, plain)
    close(latent.speak(e, a), plain)
    for g, w in zip(torch.autograd.grad((ours * outward).sum(), weights), want):
        assert w.abs().max() > 1e-3
        close(g, w, 1e-3 * w.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("shape", [(6,), (2, 5), (1, 1)])
@pytest.mark.parametrize("output", ["vlm", "norm", "release"])
def test_speak_takes_codes_or_their_vectors(vlm, shape, output):
    torch.manual_seed(17)
    m = shake(LatentModel(vlm.config, CODES, 1, 1, world_output=output))
    e, a = torch.randn(*shape, 128), torch.randint(CODES, shape)
    by_code = m.speak(e, a)
    close(m.speak(e, m.quantiser.vectors()[a]), by_code, 1e-5)
    assert torch.equal(m.speaker()(e, a), by_code) and by_code.shape == e.shape


# ------------------------------------------------------------------------------------------- stacks, contexts
@torch.no_grad()
@pytest.mark.parametrize("left", [False, True])
def test_stack_padding(latent, left):
    torch.manual_seed(2)
    lengths, T = (4, 9, 6), 9
    e = [torch.randn(n, 128) for n in lengths]
    padded, mask = torch.full((3, T, 128), 3.0), torch.zeros(3, T, dtype=torch.bool)
    for b, x in enumerate(e):
        s = slice(T - len(x), T) if left else slice(0, len(x))
        padded[b, s], mask[b, s] = x, True
    logits = latent.policy(padded, mask if left else None)  # right padding needs no mask
    assert logits.isfinite().all()
    for b, x in enumerate(e):
        close(logits[b, mask[b]], latent.policy(x[None])[0])


@torch.no_grad()
def test_context_is_h_with_an_image_and_projected_without(vlm, latent, processor, prompts):
    batch = processor.collate(prompts)
    h = vlm(batch)
    e = latent.context(h, batch.paired_B)
    assert torch.equal(e[[0, 2]], h[[0, 2]])
    first, _, last = latent.projector.P.mlp
    mu = h[1] + torch.tanh(h[1] @ first.weight.T + first.bias) @ last.weight.T + last.bias
    close(e[1], mu)
    assert (e[1] - h[1]).abs().max() > 0.1
    close(latent.context(h[1:2], batch.paired_B[1:2])[0], mu)
    assert torch.equal(latent.context(h[:1], batch.paired_B[:1]), h[:1])
    assert latent.context(h, None) is h  # None: all rows have an image


@torch.no_grad()
@pytest.mark.parametrize("images", [(0,), ()])
def test_nothing_before_a_token_knows_it_but_its_action_does(vlm, latent, processor, images):
    e = question(processor, 4, *images, prompt_only=False)
    t = len(e.ids) - 5
    other = replace(e, ids=e.ids.copy())
    other.ids[t + 1] = 300 if e.ids[t + 1] != 300 else 301
    a, out = (torch.arange(len(e.ids)) % CODES)[None], []
    for batch in (alone(e), alone(other)):
        x = latent.context(vlm(batch), batch.paired_B)
        out.append((x, latent.policy(x), latent.speak(x, a), latent.inverse_logits(x)))
        assert torch.equal(latent.infer_codes(x), out[-1][3].argmax(-1))
    for x in (*out[0], *out[1]):
        assert x.abs().max() > 0.1 and x.isfinite().all()
    for x, y in zip(out[0][:3], out[1][:3]):
        close(x[:, : t + 1], y[:, : t + 1], 1e-6)
        assert (x[:, t + 1] - y[:, t + 1]).abs().max() > 1e-3
    inferred, other_inferred = out[0][3], out[1][3]
    close(inferred[:, :t], other_inferred[:, :t], 1e-6)
    assert (inferred[:, t] - other_inferred[:, t]).abs().max() > 1e-3  # a_t explains x_{t+1}
    assert inferred.shape == (1, len(e.ids) - 1, CODES)  # the last position has no action


@torch.no_grad()
def test_inverse_loss_by_hand(vlm, latent, processor, monkeypatch):
    """Token by token: x_{t+1} is counted where it is of a response, with e_t and the code that sees e_{t+1}."""
    rows = [question(processor, 6, 0, prompt_only=False), question(processor, 7, prompt_only=False)]
    batch = processor.collate(rows)
    monkeypatch.setattr(Batch, "uniforms", no_noise)
    e_BTD = latent.context(vlm(batch), batch.paired_B)
    got = inverse_loss(latent, vlm, e_BTD, batch)
    nll, H, codes = 0.0, 0.0, []
    logits_BTK = latent.inverse(e_BTD)
    for b, row in enumerate(rows):
        for t in range(len(row.ids) - 1):
            if not row.response[t + 1]:
                continue
            p = F.softmax(logits_BTK[b, t + 1], -1)
            codes.append(int(p.argmax()))
            said = F.log_softmax(vlm.head(latent.speak(e_BTD[b, t], torch.tensor(codes[-1]))), -1)
            nll, H = nll - said[row.ids[t + 1]].item(), H - (p * p.log()).sum().item()
    assert got["codes"].tolist() == codes and len(codes) == sum(int(r.response.sum()) for r in rows)
    assert got["nll"].item() == pytest.approx(nll, rel=1e-4)
    assert got["entropy"].item() == pytest.approx(H, rel=1e-4)
    assert got["auxiliary"].item() == pytest.approx(-1e-3 * H, rel=1e-4)


# ------------------------------------------------------------------------------------------------ what trains
@pytest.mark.parametrize("parts", [("projector",), ("inverse", "quantiser", "world"), ("policy",), ()])
def test_train_only(vlm, parts):
    m = LatentModel(vlm.config, CODES, 1, 1)
    m.train_only("policy", "projector")
    names = m.train_only(*parts)
    assert {n.split(".")[0] for n in names} == set(parts)
    for n, p in m.named_parameters():
        assert p.requires_grad == (n.split(".")[0] in parts) == (n in names)
    assert {n.split(".")[0] for n, _ in m.named_parameters()} == set(LatentModel.parts)
