"""From a few small runs to the losses of a larger one: power laws with priors, fitted in closed form.

Formula: ln(L - E) = w . x + noise, for each value of E (and of e, below) on a grid a Bayesian linear regression; the
    grid's values are weighted by how likely they make the runs. x holds logarithms relative to the middle of the runs.
    new text:  L is the loss at the end; x = 1, ln N, ln D, ln(1 - r), ln(1 - r) ln(C)
    old text:  (L - E) / (L0 - E) instead of L - E, with L0 the parent's loss; x = 1, ln C, ln(r + e), ln(r + e) ln(C),
               ln(D / D0)
    N FLOPs per token over 6, D tokens of the update, D0 of the parent, C = 6 N D, r share of old text in every batch,
    E nats per token that nothing removes, e where replay begins to tell: a share of the batch, the same in every run,
    or a number of replayed tokens, whose share falls with D. Which of the two is for the runs to say.
Source: the terms are those of Hoffmann et al. 2022 (arXiv 2203.15556, Eq. 2) in N and D, of D-CPT (Que et al. 2024,
    arXiv 2406.01375) in the shares, of Bethune et al. 2025 (arXiv 2502.06042) for forgetting with replay; priors of
    the exponents are the spread of published fits: they fade as runs are added.
Limits: one continuation, schedule and batch rule throughout; the further away a run lies, the wider its interval.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtri

LEVEL = 0.8
"""Share of outcomes that an interval means to hold, as in `scaling.fitting`."""
NOISE = 0.004
"""Relative difference of the losses of two runs that differ in the seed. Assumption: small models here differ by 0.3 to
0.5%, published large ones by 0.03%; raised where the runs scatter more."""
FORGETTING_NOISE = 0.02
"""The same of the rise of the old loss, relative to it: what little is replayed decides, and it differs by seed."""
FORM_ERROR = 0.005
"""Relative error that the form of the law adds for every doubling of compute beyond the runs.

Assumption: on 17 published tables, forms of such laws were off by 1% on average and 2.9% at worst, about a decade out.
"""
FIRST_FLOOR, FLOOR_SPREAD = 0.3, 0.25
"""E over the lowest loss seen, before any run tells. Assumption: half in published fits (1.8 of 3 to 4 nats), and small
runs, far above it, fall like a power of compute with hardly a floor."""
_FLOORS = np.linspace(0.0, 0.85, 18)
_ONSETS = 10.0 ** np.arange(-7.0, -1.4, 0.25)
"""The lowest is that of a loss which falls in a line with ln r from shares that no batch can have; measured: 1e-6."""
_FLAT = 10.0  # standard deviation of a coefficient that only the runs decide
_POINTS = ndtri((np.arange(41) + 0.5) / 41)

Side = Literal["new", "old", "scratch"]

PRIORS: dict[Side, tuple[tuple[float, float], ...]] = {
    "new": ((0.0, _FLAT), (-0.25, 0.20), (-0.25, 0.20), (-0.25, 0.15), (0.0, 0.03)),
    "old": ((0.0, _FLAT), (0.0, 0.05), (-0.12, 0.15), (0.0, 0.05), (0.12, 0.10)),
    "scratch": ((0.0, _FLAT), (-0.25, 0.20), (-0.25, 0.20)),
}
"""(mean, standard deviation) of each coefficient.

Exponents of N and D: published fits lie between 0.2 and 0.68; runs of few tokens per parameter look like smaller ones.
Forgetting and size: about the same share at 405M and 9.6B parameters (Ibrahim et al. 2024, arXiv 2403.08763, tables 2
and 4).
"""


@dataclass(frozen=True)
class RunRow:
    """One finished run, or one to be predicted (whose loss is not read)."""

    flops_per_token: float
    tokens: float
    """Of the run itself."""
    share: float = 0.0
    """Of old text in every batch."""
    parent_tokens: float = 0.0
    old_before: float = math.nan
    """The parent's loss on the old text, nats per token."""
    loss: float = math.nan
    """At the end, on the side that is fitted."""

    @property
    def flops(self) -> float:
        """C."""
        return self.flops_per_token * self.tokens


@dataclass(frozen=True)
class Estimate:
    """A loss with the interval that holds 80% of outcomes, nats per token."""

    mean: float
    low: float
    high: float

    def times(self, factor: float) -> Estimate:
        """Scaled."""
        return Estimate(self.mean * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Onset:
    """Where replay begins to tell."""

    share: float
    """Of old text; with `in_tokens` of an update as long as the reference's."""
    in_tokens: bool = False

    def of(self, row: RunRow, reference: RunRow) -> float:
        """The share in a run."""
        return self.share * reference.tokens / row.tokens if self.in_tokens else self.share


@dataclass(frozen=True)
class _Member:
    """One value of the grid with its regression."""

    floor: float
    onset: Onset
    mean: np.ndarray
    covariance: np.ndarray
    noise: float


@dataclass(frozen=True)
class RunLaw:
    """A fitted law of one side; predicts with an interval that grows with the distance from the runs."""

    side: Side
    members: tuple[_Member, ...]
    weights: np.ndarray
    reference: RunRow
    num_runs: int
    residual: float
    """Root mean square of predicted less measured loss, relative."""
    flops: tuple[float, float]
    """Least and most compute of the runs."""

    def predict(self, row: RunRow) -> Estimate:
        """The loss of a run; a mixture over the grid, its mean and quantiles."""
        values, weights = [], []
        for member, weight in zip(self.members, self.weights.tolist(), strict=True):
            x = features(self.side, row, self.reference, member.onset)
            spread = math.sqrt(float(x @ member.covariance @ x))
            logs = float(member.mean @ x) + spread * _POINTS
            logs = np.clip(logs, -20.0, 20.0)
            values.append(member.floor + np.exp(logs) * _scale(self.side, row, member.floor))
            weights.append(np.full(len(_POINTS), weight / len(_POINTS)))
        losses, mass = np.concatenate(values), np.concatenate(weights)
        scatter = float(self.weights @ np.array([member.noise for member in self.members]))
        form = FORM_ERROR * math.log2(self.times_outside(row))
        rise = math.log(float(mass @ losses) / row.old_before) if self.side == "old" else 0.0
        noise = (
            math.hypot(scatter, form, FORGETTING_NOISE * rise) * float(mass @ losses) * float(-ndtri((1 - LEVEL) / 2))
        )
        low, middle, high = _quantiles(losses, mass, ((1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2))
        return Estimate(middle, middle - math.hypot(middle - low, noise), middle + math.hypot(high - middle, noise))

    def times_outside(self, row: RunRow) -> float:
        """How many times the compute of the largest run (or the inverse below the smallest)."""
        low, high = self.flops
        return max(1.0, row.flops / high, low / row.flops)


def fit_runs(side: Side, rows: Sequence[RunRow]) -> RunLaw:
    """The law through the runs; one run is enough for an answer, whose interval then is the priors'."""
    assert rows
    reference = _middle(rows)
    lowest = min(min(row.loss, row.old_before if side == "old" else row.loss) for row in rows)
    onsets = [Onset(0.0)]
    if side == "old":
        onsets = [Onset(share, in_tokens) for share in _ONSETS.tolist() for in_tokens in (False, True)]
    members, evidence, residuals = [], [], []
    for share, onset in itertools.product(_FLOORS.tolist(), onsets):
        member, score, residual = _regress(side, rows, reference, share * lowest, onset)
        members.append(member)
        evidence.append(score - 0.5 * ((share - FIRST_FLOOR) / FLOOR_SPREAD) ** 2)
        residuals.append(residual)
    weights = np.exp(np.array(evidence) - max(evidence))
    weights /= weights.sum()
    flops = [row.flops for row in rows]
    residual = math.sqrt(float(weights @ np.array(residuals) ** 2))
    return RunLaw(side, tuple(members), weights, reference, len(rows), residual, (min(flops), max(flops)))


def _regress(
    side: Side, rows: Sequence[RunRow], reference: RunRow, floor: float, onset: Onset
) -> tuple[_Member, float, float]:
    """The regression for one value of the grid, its log evidence, and its relative residual."""
    design = np.array([features(side, row, reference, onset) for row in rows])
    loss = np.array([row.loss for row in rows])
    scale = np.array([_scale(side, row, floor) for row in rows])
    target = np.log((loss - floor) / scale)
    means, spreads = np.array(PRIORS[side]).T
    prior = np.diag(spreads**2)
    noise = NOISE
    moved = FORGETTING_NOISE * np.abs(np.log(loss / [row.old_before for row in rows])) if side == "old" else 0.0
    for _ in range(2):  # the second time with the scatter that the first has found
        errors = (noise**2 + moved**2) * (loss / (loss - floor)) ** 2
        total = design @ prior @ design.T + np.diag(errors)
        gain = prior @ design.T @ np.linalg.inv(total)
        mean = means + gain @ (target - design @ means)
        covariance = prior - gain @ design @ prior
        predicted = floor + np.exp(design @ mean) * scale
        residual = float(np.sqrt(np.mean((predicted / loss - 1) ** 2)))
        spare = len(rows) - design.shape[1]
        scatter = residual * math.sqrt(len(rows) / spare) if spare > 0 else NOISE
        noise = max(NOISE, scatter)
    difference = target - design @ means
    errors = (NOISE**2 + moved**2) * (loss / (loss - floor)) ** 2
    total = design @ prior @ design.T + np.diag(errors)
    _, size = np.linalg.slogdet(total)
    score = -0.5 * float(difference @ np.linalg.solve(total, difference)) - 0.5 * float(size)
    score -= float(np.log(loss - floor).sum())  # the density of L, not of its logarithm
    return _Member(floor, onset, mean, covariance, noise), score, residual


def features(side: Side, row: RunRow, reference: RunRow, onset: Onset) -> np.ndarray:
    """x of a run, shape (coefficients,), relative to the reference."""
    size = math.log(row.flops_per_token / reference.flops_per_token)
    tokens = math.log(row.tokens / reference.tokens)
    if side == "scratch":
        return np.array([1.0, size, tokens])
    if side == "new":
        fresh = math.log(1 - min(row.share, 0.99))
        return np.array([1.0, size, tokens, fresh, fresh * (size + tokens)])
    replayed = math.log((row.share + onset.of(row, reference)) / (0.05 + onset.share))
    drawn = math.log(
        (row.tokens / max(row.parent_tokens, 1.0)) / (reference.tokens / max(reference.parent_tokens, 1.0))
    )
    return np.array([1.0, size + tokens, replayed, replayed * (size + tokens), drawn])


def _scale(side: Side, row: RunRow, floor: float) -> float:
    """What the reducible loss is a multiple of: 1, or the parent's reducible loss on its own text."""
    return row.old_before - floor if side == "old" else 1.0


def _middle(rows: Sequence[RunRow]) -> RunRow:
    """The geometric mean of the runs."""

    def mean(values: Sequence[float]) -> float:
        return math.exp(sum(math.log(max(v, 1.0)) for v in values) / len(values))

    return RunRow(
        mean([r.flops_per_token for r in rows]),
        mean([r.tokens for r in rows]),
        parent_tokens=mean([r.parent_tokens for r in rows]),
    )


def _quantiles(values: np.ndarray, weights: np.ndarray, shares: Sequence[float]) -> list[float]:
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) - weights[order] / 2
    return [float(np.interp(share, reached, values[order])) for share in shares]
