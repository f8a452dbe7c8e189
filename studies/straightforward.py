"""The straightforward way of every costly step, which the benchmark (studies/bench.py) measures ours against.

It is the way that the paper's release and most first versions take:

- float32 logits over the whole vocabulary, and the world model, at every position, read or not;
- each loss with its own pass through the vision-language model (VLM), though the states are the same;
- in the view without the image, placeholders stay where the image was;
- the world model's product W [x; c] for each position anew, though there are only K different codes;
- in RL, every copy of a prompt is encoded, caches grow by a copy at each token, and the loop looks at the device for
  each token; log-probabilities come from a fresh pass of prompt and response, whole, through the VLM.

The maths is the project's own and is called, not copied; tests/test_bench.py shows that values and gradients are equal.
Letters: see model.py.
"""

import contextlib
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from data import Batch
from model import entropy, gaussian_nll, straight_through_gumbel
from packed_linear import PackedLinear
from rollout import sample
from vlm import log_probs


@contextlib.contextmanager
def plain_products():
    """Inside, every product is torch's own."""
    before, PackedLinear.enabled = PackedLinear.enabled, False
    try:
        yield
    finally:
        PackedLinear.enabled = before


# ------------------------------------------------------------------------------------------------------- stages 2 and 3
def world_logits(latent, vlm, e_BTD, c_BTD):
    """Logits (B, T, V), float32, of the next token at every position."""
    return vlm.head(latent.speak(e_BTD, c_BTD)).float()


def inverse_loss(latent, vlm, batch):
    """L_inverse and the entropy bonus, mean over explained tokens -> (scalar, h_BTD)."""
    with torch.no_grad():
        h_BTD = vlm(batch)
        e_BTD = latent.context(h_BTD, batch.paired_B)
    logits_BTK, explained = latent.inverse_logits(e_BTD), batch.explained_BT
    u_BTK = torch.rand_like(logits_BTK)
    c_BTD = straight_through_gumbel(logits_BTK, u_BTK, latent.quantiser.tau) @ latent.quantiser.vectors()
    logits_BTV = world_logits(latent, vlm, e_BTD[:, :-1], c_BTD)
    nll_BT = F.cross_entropy(logits_BTV.transpose(1, 2), batch.ids_BT[:, 1:], reduction="none")
    loss_BT = nll_BT - latent.quantiser.entropy_bonus * entropy(logits_BTK)
    return (loss_BT * explained).sum() / explained.sum(), h_BTD


def without_image(batch, processor):
    """The same rows without their images: padding tokens stand where the placeholders did."""
    ids_BT = batch.ids_BT.masked_fill(batch.ids_BT == processor.image_id, processor.pad_id)
    return replace(batch, ids_BT=ids_BT, images_B=0 * batch.images_B, pixels=None, grids=None)


def joint_loss(latent, vlm, processor, paired, text, cfg):
    """Stage 2, phase b: L_inverse of both kinds of data, L_t2vt + L_vt2t at every position, L_cycle -> scalar."""
    paired_loss, _ = inverse_loss(latent, vlm, paired)
    text_loss, h_BTD = inverse_loss(latent, vlm, text)
    with torch.no_grad():
        h_VT, h_T = vlm(paired), vlm(without_image(paired, processor))
    P, mask_BT = latent.projector, paired.mask_BT
    projector = gaussian_nll(h_VT, *P.P(h_T), mask_BT) + gaussian_nll(h_T, *P.P_back(h_VT), mask_BT)
    cycle = P.cycle_loss(h_BTD, text.mask_BT) / text.mask_BT.sum()
    return paired_loss + text_loss + cfg.projector_weight * (projector / mask_BT.sum() + cycle)


def clone_loss(latent, vlm, given):
    """Stage 3: L_bc, mean over the explained tokens of each of the batches `given` -> scalar.

    Teacher and policy have a pass through the VLM each. The world model's logits are part of the model's forward pass;
    this loss does not read them."""
    loss = 0.0
    for batch in given.values():
        explained = batch.explained_BT
        with torch.no_grad():
            a_BT = latent.infer_codes(latent.context(vlm(batch), batch.paired_B))
            e_BTD = latent.context(vlm(batch), batch.paired_B)
        logits_BTK = latent.policy(e_BTD)[:, :-1]
        world_logits(latent, vlm, e_BTD[:, :-1], latent.quantiser.vectors()[logits_BTK.argmax(-1)])
        bc_BT = F.cross_entropy(logits_BTK.transpose(1, 2), a_BT, reduction="none")
        loss = loss + (bc_BT * explained).sum() / explained.sum()
    return loss


# -------------------------------------------------------------------------------------------------------------- stage 4
def copies(batch, group):
    """Each row `group` times, its one image included."""

    def repeat(x):
        return None if x is None else x.repeat_interleave(group, 0)

    pixels = batch.pixels
    if pixels is not None:
        patches = [int(grid.prod()) for grid in batch.grids]
        pixels = torch.cat([image for image in pixels.split(patches) for _ in range(group)])
    rows = [repeat(x) for x in (batch.ids_BT, batch.mask_BT, batch.response_BT, batch.images_B)]
    return Batch(*rows, pixels, repeat(batch.grids), [], [])


@torch.no_grad()
def rollout(vlm, latent, prompt, u_NT, *, group, never, eos, pad):
    """-> (tokens_NT, actions_NT) of `group` responses to each prompt; the arguments of rollout.rollout_latent."""
    batch, codes_KD = copies(prompt, group), latent.quantiser.vectors()
    cache, policy_cache = DynamicCache(config=vlm.config), DynamicCache()
    e_NTD, mask_NS = latent.context(vlm(batch, cache), batch.paired_B), batch.mask_BT
    deltas_N1, tokens, actions = vlm.positions(batch)[1], [], []
    done_N = torch.zeros(len(u_NT), dtype=torch.bool, device=u_NT.device)
    for t in range(u_NT.shape[1]):
        logits_NK = latent.policy(e_NTD, mask_NS, policy_cache)[:, -1]
        actions.append(sample(log_probs(logits_NK), u_NT[:, t]))
        logits_NV = world_logits(latent, vlm, e_NTD[:, -1], codes_KD[actions[-1]])
        logits_NV[:, never] = -math.inf
        tokens.append(torch.where(done_N, pad, logits_NV.argmax(-1)))
        done_N = done_N | (tokens[-1] == eos)
        if done_N.all():
            break
        mask_NS = torch.cat((mask_NS, torch.ones_like(mask_NS[:, :1])), 1)
        h_N1D = vlm.extend(tokens[-1][:, None], mask_NS, deltas_N1, cache)
        e_NTD = latent.context(h_N1D, batch.paired_B)
    return torch.stack(tokens, 1), torch.stack(actions, 1)


def whole(roll):
    """Every prompt with each of its responses, as one batch."""
    both = copies(roll.prompt, roll.group)
    ids_BT = torch.cat((both.ids_BT, roll.tokens_NT), 1)
    return replace(both, ids_BT=ids_BT, mask_BT=torch.cat((both.mask_BT, roll.mask_NT), 1))


def action_log_probs(vlm, latent, policy, roll):
    """log pi (N, T) of a rollout's actions, from a pass of every prompt and response through the VLM and the policy."""
    batch, L = whole(roll), roll.prompt.ids_BT.shape[1]
    with torch.no_grad():
        e_NTD = latent.context(vlm(batch), batch.paired_B)
    logp_NTK = log_probs(policy(e_NTD, batch.mask_BT)[:, L - 1 : -1])
    return logp_NTK.gather(-1, roll.actions_NT[..., None])[..., 0]
