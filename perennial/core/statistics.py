"""What a handful of seeds can tell: means with intervals, paired differences, a verdict in words.

Student-t intervals for means, an expanded percentile bootstrap for anything else. numpy and the standard library only.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perennial.core.errors import UserError

_NORMAL = statistics.NormalDist()


@dataclass(frozen=True)
class Interval:
    """An estimate, and the interval that covers the truth with the stated confidence."""

    estimate: float
    low: float
    high: float
    confidence: float
    count: int
    """How many values it rests on; with one the interval is infinite."""

    def text(self, digits: int = 3) -> str:
        """'2.412 (95% interval 2.405 to 2.419, n = 5)'."""
        if self.count == 1:
            return f"{self.estimate:.{digits}f} (one value, no interval)"
        bounds = f"{self.confidence * 100:.4g}% interval {self.low:.{digits}f} to {self.high:.{digits}f}"
        return f"{self.estimate:.{digits}f} ({bounds}, n = {self.count})"


@dataclass(frozen=True)
class Verdict:
    """Whether the second of two variants is better than the first, judged on the same seeds."""

    decision: str
    """'better', 'worse', 'equal' (nearer than the margin, surely) or 'undecided'."""
    difference: Interval
    """Second minus first."""
    p_value: float
    """How likely a mean difference this far from 0, either way, would be if there were none; 1 with one pair."""
    text: str
    """The same as one sentence."""


def t_tail(t: float, degrees: int) -> float:
    """The probability that a Student-t variable with so many degrees of freedom exceeds t.

    Formula: with theta = atan(t / sqrt(degrees)), c = cos(theta), P(|T| < t) =
        even degrees  sin(theta) * (1 + 1/2 c^2 + (1*3)/(2*4) c^4 + ... up to c^(degrees - 2))
        odd degrees   2/pi * (theta + sin(theta) * (c + 2/3 c^3 + (2*4)/(3*5) c^5 + ... up to c^(degrees - 2)))
    Source: Abramowitz and Stegun 1964, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4.
    """
    if t < 0:
        return 1 - t_tail(-t, degrees)
    theta = math.atan2(t, math.sqrt(degrees))
    is_odd = degrees % 2
    term = math.cos(theta) if is_odd else 1.0
    total = 0.0
    for k in range(is_odd, degrees - 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (k + 1) / (k + 2)
    inside = math.sin(theta) * total
    return (1 - (2 / math.pi * (theta + inside) if is_odd else inside)) / 2


@functools.lru_cache(maxsize=256)
def t_quantile(probability: float, degrees: int) -> float:
    """The value that a Student-t variable stays below with this probability; by bisection on `t_tail`."""
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"needed: a probability inside (0, 1) and 1 degree or more, not {probability} and {degrees}")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while t_tail(high, degrees) > 1 - probability:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, degrees) > 1 - probability else (low, middle)
    return high


def mean_interval(values: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """The mean of one value per seed, with its Student-t interval: mean +- t * s / sqrt(n)."""
    sample = _sample(values)
    count, mean = len(sample), float(sample.mean())
    if count == 1:
        return Interval(mean, -math.inf, math.inf, confidence, 1)
    half = t_quantile((1 + confidence) / 2, count - 1) * float(sample.std(ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, confidence, count)


def paired_interval(first: ArrayLike, second: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """The mean of second - first over the same seeds, with its interval; what seeds share cancels out."""
    return mean_interval(_differences(first, second), confidence=confidence)


def paired_p_value(first: ArrayLike, second: ArrayLike) -> float:
    """The two-sided p-value of the paired t-test that there is no difference; 1 with one pair."""
    differences = _differences(first, second)
    mean, count = float(differences.mean()), len(differences)
    if count == 1 or mean == 0:
        return 1.0
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    return min(1.0, 2 * t_tail(abs(mean) / error, count - 1)) if error else 0.0


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], float | np.floating[Any]] = np.mean,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """An interval for any statistic of a sample, from resampling it with replacement.

    Formula: quantiles of the resampled statistic at alpha and 1 - alpha, alpha = Phi(-sqrt(n / (n - 1)) * t), t the
        Student quantile: wider than plain percentiles, which cover too little for small n.
    Source: Hesterberg 2015, "What Teachers Should Know about the Bootstrap", arXiv 1411.5279 (expanded percentile).
    Limits: needs about 10 values or more; statistics of extremes (a maximum, say) are not covered by any bootstrap.
    """
    sample = _sample(values)
    count = len(sample)
    estimate = float(statistic(sample))
    if count == 1:
        return Interval(estimate, -math.inf, math.inf, confidence, 1)
    chosen = np.random.default_rng(seed).integers(count, size=(resamples, count))
    resampled = np.array([float(statistic(sample[row])) for row in chosen])
    tail = _NORMAL.cdf(-math.sqrt(count / (count - 1)) * t_quantile((1 + confidence) / 2, count - 1))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high), confidence, count)


def verdict(
    first: ArrayLike,
    second: ArrayLike,
    *,
    names: tuple[str, str] = ("the first", "the second"),
    quantity: str = "loss",
    lower_is_better: bool = True,
    margin: float = 0.0,
    confidence: float = 0.95,
    digits: int = 4,
) -> Verdict:
    """Judges second against first, one value each per seed; differences within `margin` do not matter.

    'equal' when the whole interval of the difference lies within the margin; else 'better' or 'worse' when it leaves
    out 0; else 'undecided'. The chance of a wrong 'better' or 'worse' where there is no difference is 1 - confidence.
    """
    difference = paired_interval(first, second, confidence=confidence)
    p_value = paired_p_value(first, second)
    if -margin <= difference.low and difference.high <= margin:
        decision = "equal"
    elif difference.low <= 0 <= difference.high:
        decision = "undecided"
    else:
        decision = "better" if (difference.estimate < 0) == lower_is_better else "worse"
    sentence = {
        "better": f"{names[1]} is better than {names[0]}",
        "worse": f"{names[1]} is worse than {names[0]}",
        "equal": f"{names[1]} and {names[0]} are equal within {margin:g}",
        "undecided": f"no difference between {names[1]} and {names[0]} can be told from these seeds",
    }[decision]
    measured = f"{quantity} differs by {difference.estimate:+.{digits}f}"
    if difference.count == 1:
        return Verdict(decision, difference, p_value, f"{sentence}: {measured}, one seed")
    bounds = f"{difference.low:+.{digits}f} to {difference.high:+.{digits}f}"
    basis = f"{confidence * 100:.4g}% interval {bounds}, p = {p_value:.2g}, {difference.count} paired seeds"
    return Verdict(decision, difference, p_value, f"{sentence}: {measured} ({basis})")


def _sample(values: ArrayLike) -> NDArray[np.float64]:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample) or not np.isfinite(sample).all():
        raise UserError(f"statistics need a list of one or more finite numbers, not {values!r}")
    return sample


def _differences(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    one, two = _sample(first), _sample(second)
    if len(one) != len(two):
        raise UserError(f"paired values must come in pairs, one of each per seed, not {len(one)} and {len(two)}")
    return two - one
