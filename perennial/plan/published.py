"""What others have measured of replay and repetition: priors for plans without own runs, relative and wide.

Replay: Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train Large Language Models", arXiv
    2403.08763, table 2 (405M parameters, 300B tokens, then 300B English or 200B German). The old loss is over that of
    the parent (2.17), the new one over that of an update without replay; 25% of the weak shift is read off between its
    neighbours.
Repetition: Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", arXiv 2305.16264.
Limits: nobody has published how these change with the share of the update in all training; hence the wide intervals.
"""

from __future__ import annotations

import math

from perennial.plan.transfer import Estimate

SOURCE = "Ibrahim et al. 2024, arXiv 2403.08763, table 2"
SHARES = (0.0, 0.01, 0.05, 0.10, 0.25, 0.50)
"""Shares of old text that a plan compares."""
_WEAK_OLD = (0.124, 0.041, 0.028, 0.018, 0.005, -0.005)
_WEAK_NEW = (0.0, 0.0, 0.004, 0.004, 0.010, 0.016)
_STRONG_OLD = (0.641, 0.304, 0.184, 0.134, 0.074, 0.032)
_STRONG_NEW = (0.0, 0.009, 0.009, 0.018, 0.045, 0.099)
_SPREAD = 0.6
"""Assumption: half as much to 1.6 times as much, for other sizes and texts."""

FREE_EPOCHS = 4.0
"""Passes that are worth nearly as much as new text (Muennighoff et al., section 5)."""
MOST_EPOCHS = 16.0
"""Passes beyond which nothing is gained (Muennighoff et al., section 5; Kim et al. 2025, arXiv 2509.14786)."""
REPEAT_DECAY = 15.388
"""R_D* of Muennighoff et al.; its own runs do not determine it well: 6.6 to anything (LAWS: bootstrap)."""
REPEAT_SOURCE = "Muennighoff et al. 2023, arXiv 2305.16264: 4 passes are nearly as good as new text, 16 the most"


def forgetting(share: float, kind: str) -> Estimate:
    """Rise of the old loss over the parent's, relative; `kind` of shift: 'weak', 'strong' or 'unknown'."""
    return _relative(share, kind, _WEAK_OLD, _STRONG_OLD)


def cost_of_replay(share: float, kind: str) -> Estimate:
    """Rise of the new loss over that without replay, relative."""
    return _relative(share, kind, _WEAK_NEW, _STRONG_NEW)


def value_of_epochs(epochs: float) -> float:
    """What so many passes over a text are worth, in passes over as much new text: 1 + r (1 - exp(-(e - 1) / r))."""
    if epochs <= 1:
        return epochs
    return 1 + REPEAT_DECAY * -math.expm1(-(epochs - 1) / REPEAT_DECAY)


def _relative(share: float, kind: str, weak: tuple[float, ...], strong: tuple[float, ...]) -> Estimate:
    values = {"weak": _between(share, weak), "strong": _between(share, strong)}
    if kind in values:
        middle = values[kind]
        return Estimate(middle, middle - _SPREAD * abs(middle) - 0.005, middle + _SPREAD * abs(middle) + 0.005)
    low, high = sorted(values.values())
    middle = (low + high) / 2
    return Estimate(middle, low - _SPREAD * abs(low) - 0.005, high + _SPREAD * abs(high) + 0.005)


def _between(share: float, values: tuple[float, ...]) -> float:
    """On a straight line in ln(share + 0.1%) between the shares of the table."""
    places = [math.log(s + 1e-3) for s in SHARES]
    at = math.log(min(share, SHARES[-1]) + 1e-3)
    for left, right, low, high in zip(places, places[1:], values, values[1:], strict=False):
        if at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return values[-1]
