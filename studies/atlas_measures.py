"""The maths of studies/atlas.py: what every code does to the next token, which codes say the same, a map of them.

Letters: K codes, M places (a place is a token of an answer, with all that stands before it), V vocabulary, D width,
S checkpoints. The greedy token of a code at a place is the most likely next token once the code is put there."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from vlm import log_probs

SAME = 0.9  # two codes say the same if their greedy tokens are equal at so large a share of the places
WAYS = ("vlm", "any", "code")  # the bare VLM; the world model, its code not known; the world model with the code


@dataclass
class Places:
    """M places: the VLM's states h and the contexts e before the tokens, the tokens x, their codes, log pi, and the
    most likely tokens under the bare VLM."""

    h_MD: torch.Tensor
    e_MD: torch.Tensor
    ids_M: torch.Tensor
    codes_M: torch.Tensor
    logpi_MK: torch.Tensor
    vlm_M: torch.Tensor

    def pick(self, index):
        """-> the Places at `index`, a tensor of numbers or a slice."""
        return Places(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def join(parts):
    """Some Places -> all of them, one after the other."""
    return Places(*(torch.cat([getattr(p, name) for p in parts]) for name in Places.__dataclass_fields__))


def evenly(places, most):
    """-> at most `most` of the places, at equal distances."""
    n = len(places.ids_M)
    return places.pick(torch.linspace(0, n - 1, min(most, n)).long())


@dataclass
class Effects:
    """What every code does at M places; see `effects`. Nats; float64, and int64 for the tokens."""

    tokens_KM: np.ndarray  # greedy tokens
    mean_KV: np.ndarray  # of log p with the code less log p of the bare VLM, over the places
    std_KV: np.ndarray  # its standard deviation over the places: how much the effect depends on the context
    alike_KK: np.ndarray  # sum_v sqrt(p_i p_j), mean over the places: 1 where two codes mean the same
    nats: dict  # {way: (M,)} - log p of the token that came
    entropy: dict  # {way: (M,)} of the next token's distribution
    right: dict  # {way: (M,) bool} whether the most likely token is the one that came


def every_code(run, latent):
    """-> function: a context (D,) -> the logits (K, V) of the next token after each of the codes."""
    speak, logits_of = latent.speaker(), run.vlm.scorer()
    codes_K = torch.arange(latent.quantiser.codes, device=run.place.device)

    def of(e_D):
        with run.place.autocast():
            return logits_of(speak(e_D.expand(len(codes_K), -1), codes_K)).float()

    return of


def greedy(logits_KV, never):
    """-> (K,) the tokens that a rollout would say: the arg max without those that are never said."""
    return logits_KV.index_fill(-1, never, -math.inf).argmax(-1)


@torch.no_grad()
def effects(run, latent, places, never):
    """-> Effects. One place at a time, so that no more than K times V numbers are held.

    'any' is the next token when the code is not known: sum_k pi(k) f_world(x | e, k), pi the policy's probabilities."""
    of, logits_of = every_code(run, latent), run.vlm.scorer()
    K, V, device = latent.quantiser.codes, len(run.vlm.head.weight), run.place.device
    sum_KV, square_KV = (torch.zeros(K, V, dtype=torch.float64, device=device) for _ in range(2))
    alike_KK, tokens = torch.zeros(K, K, dtype=torch.float64, device=device), []
    found = {name: {way: [] for way in WAYS} for name in ("nats", "entropy", "right")}
    M = len(places.ids_M)
    for m in range(M):
        logits_KV = of(places.e_MD[m])
        logp_KV = log_probs(logits_KV)
        with run.place.autocast():
            vlm_V = log_probs(logits_of(places.h_MD[m : m + 1]))[0]
        change_KV, root_KV = logp_KV - vlm_V, (logp_KV / 2).exp()
        sum_KV += change_KV
        square_KV += change_KV.square()
        alike_KK += root_KV @ root_KV.T
        tokens.append(greedy(logits_KV, never))
        any_V = torch.logsumexp(places.logpi_MK[m][:, None] + logp_KV, 0)
        for way, logp_V in zip(WAYS, (vlm_V, any_V, logp_KV[places.codes_M[m]])):
            found["nats"][way].append(-float(logp_V[places.ids_M[m]]))
            found["entropy"][way].append(float(torch.special.entr(logp_V.exp()).sum()))
            found["right"][way].append(bool(logp_V.argmax() == places.ids_M[m]))
    mean_KV = sum_KV / M
    std_KV = (square_KV / M - mean_KV**2).clamp(min=0).sqrt()
    arrays = {name: {way: np.array(x) for way, x in by_way.items()} for name, by_way in found.items()}
    return Effects(
        torch.stack(tokens, 1).cpu().numpy(), *(x.cpu().numpy() for x in (mean_KV, std_KV, alike_KK / M)), **arrays
    )


# ------------------------------------------------------------------------------------------------ codes against codes
def agreement(tokens_KM):
    """-> (K, K): the share of places at which two codes have the same greedy token; 1 if there are no places."""
    if not tokens_KM.shape[1]:
        return np.ones((len(tokens_KM), len(tokens_KM)))
    return np.array([(tokens_KM == row).mean(1) for row in tokens_KM])


def groups(same_KK, order, least=SAME):
    """Codes that say the same -> (K,) the number of each code's group. In the given order a code joins the first group
    whose first code it agrees with at `least`, or begins a group of its own."""
    firsts, group_K = [], np.zeros(len(same_KK), dtype=int)
    for code in order:
        group = next((g for g, first in enumerate(firsts) if same_KK[code, first] >= least), len(firsts))
        if group == len(firsts):
            firsts.append(code)
        group_K[code] = group
    return group_K


def flat_map(alike_KK):
    """Classical multidimensional scaling -> (xy (K, 2), the share of the squared distances that the two axes show).

    The squared distance of two codes is 2 - 2 alike: that of the square roots of their next-token distributions, mean
    over the places (twice the squared Hellinger distance)."""
    K = len(alike_KK)
    centre = np.eye(K) - 1 / K
    values, vectors = np.linalg.eigh(centre @ alike_KK @ centre)
    values = values.clip(0)
    total = max(float(values.sum()), 1e-12)
    return vectors[:, [-1, -2]] * np.sqrt(values[[-1, -2]]), float(values[-2:].sum()) / total


# ------------------------------------------------------------------------------------------------------ code for code
def share(codes, K):
    """Codes (n,) -> (K,) how often each stands among them; zeros if there are none."""
    return np.bincount(np.asarray(codes, dtype=int), minlength=K) / max(len(codes), 1)


def entropy_of(counts):
    """Entropy in nats of the distribution that these counts give; 0 without any."""
    counts = np.asarray(counts, dtype=float)
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(p * np.log(p)).sum()) + 0.0  # no minus before a zero


def favourite(tokens_M):
    """-> (the greedy token that a code has at most places, the share of the places)."""
    tokens, counts = np.unique(tokens_M, return_counts=True)
    return int(tokens[counts.argmax()]), float(counts.max() / counts.sum())


def typical(counts_V, all_V, most):
    """-> at most `most` tokens, the most typical of a code first: those that add most to the KL divergence of its
    tokens (counts_V) from all tokens (all_V). Such a token is frequent with the code and rare without."""
    there = np.flatnonzero(counts_V)
    p, q = counts_V[there] / max(counts_V.sum(), 1), all_V[there] / max(all_V.sum(), 1)
    return there[np.argsort(-p * np.log(p / q), kind="stable")][:most].tolist()


def moved(mean_V, std_V, often_V, count):
    """The tokens that a code raises and lowers most, of those that are `often` in the data.

    -> (raised, lowered), each [(token, mean change of log p, its standard deviation over places)]"""
    often = np.flatnonzero(often_V)
    order = often[np.argsort(mean_V[often], kind="stable")]
    raised = [t for t in order[::-1][:count] if mean_V[t] > 0]
    lowered = [t for t in order[:count] if mean_V[t] < 0]
    return [[(int(t), float(mean_V[t]), float(std_V[t])) for t in part] for part in (raised, lowered)]


def would_say(logits_KV, logpi_K, never):
    """What the codes would say at one place -> [(token, the policy's probability of all codes that say it, [codes])],
    the most probable first."""
    tokens_K, p_K = greedy(logits_KV, never).tolist(), logpi_K.exp().tolist()
    by_token = {}
    for code, (token, p) in enumerate(zip(tokens_K, p_K)):
        entry = by_token.setdefault(token, [0.0, []])
        entry[0] += p
        entry[1].append(code)
    rows = [(token, p, sorted(codes, key=lambda k: -p_K[k])) for token, (p, codes) in by_token.items()]
    return sorted(rows, key=lambda row: -row[1])


# ------------------------------------------------------------------------------------------------- a number for it all
def numbers(found, kinds, used_K):
    """What a whole codebook does. found: Effects; kinds: {kind of data: the slice of its places}; used_K: how often a
    code was inferred.

    -> {kind: {nats, entropy, right: {way: mean over places}, places, different: how many different greedy tokens the
    codes have at one place, by the mean; open: the share of places at which they have more than one}, and of the
    codebook: codes, used, groups: how many (`groups`); groups open: how many if the open places alone count; favourite:
    the share of the places at which a used code has its most frequent greedy token, mean over the used codes}"""
    order = np.argsort(-used_K, kind="stable")
    open_M = (found.tokens_KM != found.tokens_KM[0]).any(0)
    out, used_K = {}, used_K > 0
    for kind, part in kinds.items():
        out[kind] = {
            name: {way: float(x[part].mean()) for way, x in getattr(found, name).items()}
            for name in ("nats", "entropy", "right")
        }
        columns = found.tokens_KM[:, part].T
        out[kind] |= {"places": len(columns), "different": float(np.mean([len(np.unique(c)) for c in columns]))}
        out[kind]["open"] = float(open_M[part].mean())
    out["codes"] = {
        "codes": len(used_K),
        "used": int(used_K.sum()),
        "groups": len(set(groups(agreement(found.tokens_KM), order))),
        "groups open": len(set(groups(agreement(found.tokens_KM[:, open_M]), order))),
        "favourite": float(np.mean([favourite(found.tokens_KM[k])[1] for k in np.flatnonzero(used_K)])),
    }
    return out
