"""Where a decoder starts: directions of the targets Z (samples by dimensions), found in a second or two.

    svd:         the first right singular vectors of Z - mean, by subspace iteration, as the authors' TruncatedSVD
    dictionary:  the rows of D in   min 1/2 |Z - C D|^2 + penalty * sum(C)   with C >= 0 and rows |d| <= 1,
                 by turns: C by accelerated projected gradient with D fixed, then one row of D after the other

The problem is that of the authors' DictionaryLearning (positive_code=True, alpha=1), which takes over a second a turn
at 1,344 x 4,096. Here the codes of all samples move together, and the only products as wide as Z are Z D^T and C^T Z.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from steer_plugin.training.config import FitConfig

_EXTRA = 10  # directions beyond those asked for: the last ones asked for are then as good as the first
_CODE_STEPS = 30
_ENOUGH = 3e-4  # a turn that lowers the objective by less than this share of it is the last


def directions(vectors: Float[Tensor, "sample d"], config: FitConfig, seed: int) -> Float[Tensor, "component d"]:
    """Directions of the targets for the decoder's first columns: at most `hidden`, none for the start "random".

    They depend on nothing but the arguments; torch's random state is left as it was.
    """
    count = min(config.hidden, *vectors.shape)
    if config.start == "svd":
        return principal(vectors, count, seed)
    if config.start == "dictionary":
        return atoms(vectors, min(config.hidden, vectors.shape[0]), config, seed)[0]
    return vectors[:0]


def principal(vectors: Float[Tensor, "sample d"], count: int, seed: int = 0) -> Float[Tensor, "component d"]:
    """First right singular vectors of the centred rows, the largest entry of each positive."""
    centred = vectors - vectors.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = torch.svd_lowrank(centred, q=min(count + _EXTRA, *vectors.shape), niter=5)[2].T[:count]
    # A singular vector's sign is the library's whim; a fit should not depend on it.
    return found * found.gather(1, found.abs().argmax(1, keepdim=True)).sign()


def atoms(
    vectors: Float[Tensor, "sample d"], count: int, config: FitConfig, seed: int = 0
) -> tuple[Float[Tensor, "component d"], Float[Tensor, "sample component"]]:
    """Dictionary and codes of the rows; starts on samples drawn by the seed."""
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(vectors), generator=draw)[:count]
    dictionary = torch.nn.functional.normalize(vectors[drawn], dim=1)
    codes = vectors.new_zeros(len(vectors), count)
    energy, before = float(vectors.square().sum()) / 2, float("inf")
    for _ in range(config.dictionary_turns):
        gram, match = dictionary @ dictionary.T, vectors @ dictionary.T
        codes = _coded(codes, gram, match - config.dictionary_penalty)
        # The objective, from what is there already.
        now = energy + float((codes * (codes @ gram / 2 - match + config.dictionary_penalty)).sum())
        if before - now <= _ENOUGH * now:
            break
        before = now
        _improve(dictionary, codes, vectors, draw)
    return dictionary, codes


def _coded(
    codes: Float[Tensor, "sample component"],
    gram: Float[Tensor, "component component"],
    pull: Float[Tensor, "sample component"],
) -> Float[Tensor, "sample component"]:
    """Non-negative codes that nearly minimise 1/2 c G c - pull c, from where they were (Nesterov's method)."""
    steepest = float(torch.linalg.eigvalsh(gram)[-1].clamp_min(1e-12))
    keep, gain = torch.eye(len(gram)) - gram / steepest, pull / steepest
    ahead, pace = codes, 1.0
    for _ in range(_CODE_STEPS):
        following = torch.addmm(gain, ahead, keep).clamp_min_(0)
        faster = (1 + math.sqrt(1 + 4 * pace**2)) / 2
        ahead = following + (following - codes) * ((pace - 1) / faster)
        codes, pace = following, faster
    return codes


def _improve(
    dictionary: Float[Tensor, "component d"],
    codes: Float[Tensor, "sample component"],
    vectors: Float[Tensor, "sample d"],
    draw: torch.Generator,
) -> None:
    """Move each atom in turn to its best place given the others; an atom that no code uses becomes a sample."""
    among, wanted = codes.T @ codes, codes.T @ vectors
    for k, used in enumerate(among.diagonal().tolist()):
        if used > 1e-10:
            atom = dictionary[k] + (wanted[k] - among[k] @ dictionary) / used
            dictionary[k] = atom / atom.norm().clamp_min(1)
        else:
            one = vectors[int(torch.randint(len(vectors), (), generator=draw))]
            dictionary[k] = torch.nn.functional.normalize(one, dim=0)
