"""The average of models' weights: between a parent and its child, or a soup of stages.

Formula: w = sum of a_i w_i with a_i >= 0 that add up to 1, element by element in fp32. On a line between two models
    the share a of the second goes from 0 to 1; a greedy soup begins with the best model and takes in each further one,
    in the order of their scores, that makes the equal average of all taken better.
Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT), arXiv 2109.01903, section 3 (the
    line); Wortsman et al. 2022, "Model soups", arXiv 2203.05482, recipe 1 (the greedy soup).
Limits: only models with a common ancestor lie in one basin; the average of others is worse than each of them. Moments
    of an optimizer are not averaged: they belong to a place where the model no longer is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from perennial.core.errors import UserError

Weights = Mapping[str, Tensor]
"""Parameters by name, all of one model; each may be read from a file only when it is asked for."""


@torch.no_grad()
def weighted_mean(models: Sequence[Weights], shares: Sequence[float], name: str) -> Tensor:
    """One parameter of the average of models, in fp32; a share of 0 leaves one out, one of 1 copies it to the bit."""
    taken = [(weights, share) for weights, share in zip(models, shares, strict=True) if share > 0]
    if len(taken) == 1:
        return taken[0][0][name].float()
    first, share = taken[0]
    mean = first[name].float() * share
    for weights, share in taken[1:]:
        mean.add_(weights[name].float(), alpha=share)
    return mean


def normalised(shares: Sequence[float], number: int) -> list[float]:
    """Shares that add up to 1. Raises UserError unless there are `number` of them, none below 0 and one above."""
    listed = ",".join(f"{share:g}" for share in shares)
    if len(shares) != number:
        raise UserError(f"--weights {listed}: {len(shares)} weights for {number} models; give one for each")
    if any(not math.isfinite(share) or share < 0 for share in shares) or sum(shares) == 0:
        raise UserError(f"--weights {listed}: each must be a number of 0 or more, and one above 0")
    return [share / sum(shares) for share in shares]


def line(points: int) -> list[list[float]]:
    """The shares of two models at `points` evenly spaced places from the first to the second."""
    if points < 2:
        raise UserError(f"--points {points}: at least 2 are needed, the two models themselves")
    return [[1 - i / (points - 1), i / (points - 1)] for i in range(points)]


def greedy_soup(number: int, score: Callable[[list[float]], float]) -> list[float]:
    """The shares of a greedy soup of `number` models; `score` of shares is better when lower."""

    def equal(members: Sequence[int]) -> list[float]:
        return [1 / len(members) if i in members else 0.0 for i in range(number)]

    alone = sorted(range(number), key=lambda i: score(equal([i])))
    taken, best = [alone[0]], score(equal([alone[0]]))
    for candidate in alone[1:]:
        found = score(equal([*taken, candidate]))
        if found < best:
            taken, best = [*taken, candidate], found
    return equal(taken)
