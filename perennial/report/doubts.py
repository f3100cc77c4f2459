"""What looks wrong with an update, judged from its records alone, and what to change next time.

Three signs, each of a finished run that continues a parent:
  late rise      the mean loss on the old corpora rises from one evaluation to the next while the learning rate does
                 not, in the last 40% of the update, by more than 0.5%: forgetting had not levelled off
  much forgotten the mean loss on the old corpora ends more than 7.5% above the parent's, and less than half of the
                 tokens were replayed. Recommended shares left Ibrahim et al. with 2.8% (weak shift) and 7.4% (strong)
  early decay    the learning rate was below a tenth of its peak for more than a fifth of the update, and that stretch
                 gave less than 2% of what was learned on the new corpora
Source: numbers of Ibrahim et al. 2024, arXiv 2403.08763, tables 2 and 3. The thresholds are ours.
Limits: with few evaluations (the default is every quarter) the signs are coarse; they say where to look, not more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perennial.report.comparison import compare
from perennial.report.rows import NEW, OLD, Row, value
from perennial.report.runs import Loss, Run

LATE_SHARE, VISIBLE_RISE = 0.4, 0.005
MUCH_FORGOTTEN, ENOUGH_REPLAY = 0.075, 0.5
LOW_RATE, LONG_SHARE, LITTLE_GAIN = 0.1, 0.2, 0.02


@dataclass(frozen=True)
class Doubt:
    """One sign that a choice was not right."""

    sign: str
    """'late rise', 'much forgotten' or 'early decay'."""
    seen: str
    """What the records show, with figures."""
    advice: str
    """What to change."""


def doubts(row: Row, unit: str) -> list[Doubt]:
    """The signs that a row shows, judged in 'nats_per_token' or 'bits_per_byte'; none for what is not finished."""
    run = row.run
    if run is None or not (row.continued and row.finished):
        return []
    found = [_late_rise(row, run, unit), _much_forgotten(row, unit), _early_decay(row, run, unit)]
    return [doubt for doubt in found if doubt is not None]


def doubts_about(folder: Path) -> list[Doubt]:
    """The signs that the run in a folder shows by itself."""
    comparison = compare([folder])
    return [doubt for row in comparison.rows for doubt in doubts(row, comparison.unit)]


def _late_rise(row: Row, run: Run, unit: str) -> Doubt | None:
    points = [(e.tokens, _mean(e.corpora, row.names(OLD), unit)) for e in run.evaluations]
    known = [(tokens, loss) for tokens, loss in points if loss is not None]
    late = [(tokens, loss) for tokens, loss in known if tokens >= (1 - LATE_SHARE) * row.tokens]
    if len(late) < 2:
        return None
    (before, first), (after, last) = late[-2:]
    if last - first <= VISIBLE_RISE * first or _rate_at(run, after) > _rate_at(run, before):
        return None
    return Doubt(
        "late rise",
        f"the loss on the old data still rose by {last - first:.3f} over the last {(after - before) / row.tokens:.0%} "
        "of the update, though the learning rate no longer rose",
        "replay a larger share, or make the update shorter: forgetting had not levelled off",
    )


def _much_forgotten(row: Row, unit: str) -> Doubt | None:
    forgetting = value(row.forgetting, unit)
    before = _mean(row.before, row.names(OLD), unit)
    share = row.replay_share or 0.0
    if forgetting is None or not before or forgetting <= MUCH_FORGOTTEN * before or share >= ENOUGH_REPLAY:
        return None
    return Doubt(
        "much forgotten",
        f"the loss on the old data ended {forgetting / before:.1%} above the parent's, with {share:.0%} replayed",
        "replay more: recommended shares leave about 3% after a weak shift and 7% after a strong one",
    )


def _early_decay(row: Row, run: Run, unit: str) -> Doubt | None:
    tokens, rates = run.training["tokens"], run.training["rate"]
    low_from = _falls_below(tokens, rates, LOW_RATE)
    gained = value(row.adaptation, unit)
    if low_from is None or gained is None or gained <= 0 or row.tokens - low_from <= LONG_SHARE * row.tokens:
        return None
    points = [(e.tokens, _mean(e.corpora, row.names(NEW), unit)) for e in run.evaluations]
    known = [(at, loss) for at, loss in points if loss is not None]
    if len(known) < 3:
        return None
    there = float(np.interp(low_from, [at for at, _ in known], [loss for _, loss in known]))
    late = there - known[-1][1]
    if late >= LITTLE_GAIN * gained:
        return None
    return Doubt(
        "early decay",
        f"the learning rate was below a tenth of its peak for the last {1 - low_from / row.tokens:.0%} of the update, "
        f"which gave {max(0.0, late) / gained:.1%} of what was learned",
        "decay later, or to a higher rate: those tokens were hardly used",
    )


def _falls_below(tokens: np.ndarray, rates: np.ndarray, share: float) -> float | None:
    """Tokens after which the rate stays below a share of its peak; None when it does not."""
    if not len(rates) or not np.isfinite(rates).any():
        return None
    above = np.flatnonzero(rates >= share * np.nanmax(rates))
    return float(tokens[above[-1]]) if above[-1] < len(rates) - 1 else None


def _rate_at(run: Run, tokens: int) -> float:
    at = np.searchsorted(run.training["tokens"], tokens)
    rates = run.training["rate"]
    return float(rates[min(int(at), len(rates) - 1)]) if len(rates) else 0.0


def _mean(losses: Mapping[str, Loss], names: list[str], unit: str) -> float | None:
    """The mean over the corpora named; None when one of them was not measured."""
    values = [value(losses.get(name), unit) for name in names]
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
