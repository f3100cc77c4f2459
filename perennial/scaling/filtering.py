"""How strictly to filter: pools of falling quality, and which of them to train on for a number of samples.

With little compute the best pool alone wins; with more it is repeated until worse but fresh data are worth more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perennial.core.errors import UserError
from perennial.scaling.laws.quality_repetition import SAMPLE_SCALE


@dataclass(frozen=True)
class Pool:
    """One bucket of data by quality; b and tau as in the law `quality_repetition`."""

    name: str
    unique_samples: float
    b: float
    tau: float


@dataclass(frozen=True)
class Filtering:
    """The pools that are used, and the error expected."""

    pools: tuple[str, ...]
    error: float
    epochs: float


def error_of_pools(pools: Sequence[Pool], samples: float, *, a: float = SAMPLE_SCALE, d: float = 0.1) -> float:
    """Error after `samples` samples of the pools together, each seen equally often.

    b_j is the mean over the pools of b_i (1/2)^{(j-1) / tau_i}, weighted by their size; a scales the samples (the law's
    A is a^-b), d is the error that no data lower, both by default those of the paper, for CLIP.

    Source: Goyal et al. 2024, "Scaling Laws for Data Filtering", arXiv 2404.07177, section 4 (Eq. 8).
    Differs: pools of different sizes count by size; those of the paper are equal.
    """
    unique = sum(pool.unique_samples for pool in pools)
    if not pools or unique <= 0 or samples <= 0:
        raise UserError("an expected error needs one pool or more, unique samples and samples above 0")
    weights = np.array([pool.unique_samples / unique for pool in pools])
    utility, half = np.array([pool.b for pool in pools]), np.array([pool.tau for pool in pools])
    epochs = np.arange(1, int(np.ceil(samples / unique - 1e-9)) + 1)
    exponents = np.array([weights @ (utility * 0.5 ** ((epoch - 1) / half)) for epoch in epochs])
    reached = np.minimum(epochs * unique, samples)
    growth = np.diff(np.log(a * reached), prepend=0.0)
    return float(d + np.exp(-exponents @ growth))


def best_filtering(
    pools: Sequence[Pool], samples: float, *, a: float = SAMPLE_SCALE, d: float = 0.1
) -> list[Filtering]:
    """The pools from the best down to each in turn, the lowest expected error first; `pools` in order of quality."""
    choices = []
    for count in range(1, len(pools) + 1):
        used = pools[:count]
        unique = sum(pool.unique_samples for pool in used)
        error = error_of_pools(used, samples, a=a, d=d)
        choices.append(Filtering(tuple(pool.name for pool in used), error, samples / unique))
    return sorted(choices, key=lambda choice: choice.error)
