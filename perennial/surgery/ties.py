"""TIES: the changes of several children of one parent, small ones trimmed and signs elected, added to the parent.

Formula: t_i = child_i - parent.
    trim   of each t_i the share `density` that is largest in magnitude stays, over all parameters; the rest becomes 0
    elect  s = sign(t_1 + ... + t_K), value by value, of the trimmed changes
    merge  m = mean of those trimmed changes whose sign is s; 0 where s is 0
    result = parent + scale x m
Source: Yadav, Tam, Choshen, Raffel and Bansal 2023, "TIES-Merging: Resolving Interference When Merging Models", arXiv
    2306.01708, section 4. They recommend a density of 20% and a scale of 1 where nothing can be measured.
Differs: of values that are equal at the edge of the density all stay.
Limits: children of one parent only. Task arithmetic (Ilharco et al. 2022, arXiv 2212.04089) up to a scale of 1 / K is a
    plain average with the parent as one of the models. Moments of an optimizer are not merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from perennial.core.errors import UserError

DENSITY, SCALE = 0.2, 1.0
"""What the authors recommend where there is nothing to measure by."""
_HALF_BITS = 16


def check_settings(density: float, scale: float) -> None:
    """Raises UserError for a share that is not above 0 and at most 1, or a scale that is not above 0."""
    if not 0 < density <= 1:
        raise UserError(f"--density {density:.6g}: must be above 0 and at most 100%")
    if not 0 < scale < math.inf:
        raise UserError(f"--scale {scale:g}: must be a number above 0; 0 would be the parent itself")


def edge_of(changes: Callable[[], Iterable[Tensor]], density: float) -> float:
    """The magnitude from which a value stays: exactly the k-th largest of all, k = round(density x number), at least 1.

    `changes` gives the tensors (fp32) anew each time; they are gone through twice, and one is held at a time. The bits
    of floats of one sign are in the order of their values: first the upper half of them is counted, then the lower
    half of those that share the upper half of the value looked for.
    """
    upper = torch.zeros(1 << (_HALF_BITS - 1), dtype=torch.int64)
    for bits in map(_bits, changes()):
        upper += torch.bincount(bits >> _HALF_BITS, minlength=len(upper))
    wanted = max(1, round(density * int(upper.sum())))
    high, above = _place_from_the_top(upper, wanted)
    lower = torch.zeros(1 << _HALF_BITS, dtype=torch.int64)
    for bits in map(_bits, changes()):
        there = bits[bits >> _HALF_BITS == high]
        lower += torch.bincount(there & (len(lower) - 1), minlength=len(lower))
    low, _ = _place_from_the_top(lower, wanted - above)
    found = torch.tensor((high << _HALF_BITS) + low, dtype=torch.int32)
    return float(found.view(torch.float32))


def _bits(change: Tensor) -> Tensor:
    """The magnitudes' bits as integers, flat."""
    return change.float().abs().flatten().view(torch.int32)


def _place_from_the_top(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The highest place down to which there are `wanted` or more, and how many are above it."""
    down_to = counts.flip(0).cumsum(0)
    steps = int(torch.searchsorted(down_to, wanted))
    return len(counts) - 1 - steps, int(down_to[steps] - counts.flip(0)[steps])


def merged_change(changes: Sequence[Tensor], edges: Sequence[float]) -> Tensor:
    """The mean of the trimmed changes of one parameter that have the elected sign; all fp32 and of one shape."""
    trimmed = [change * (change.abs() >= edge) for change, edge in zip(changes, edges, strict=True)]
    elected = torch.stack(trimmed).sum(0).sign()
    total, number = torch.zeros_like(elected), torch.zeros_like(elected)
    for change in trimmed:
        agrees = change.sign() == elected
        total += change * agrees
        number += agrees & (elected != 0)
    return total / number.clamp(min=1)
