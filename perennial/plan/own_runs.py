"""Laws through one's own runs: those of a calibration, and finished ones of a ledger as these grow.

Loss on new text: runs on the same text, as every text has a level of its own. Loss on old text: every update that was
measured on one of the old corpora, whatever it learned, because what counts there is how far the loss rises. What
replay costs on new text: runs that differ in the share of old text alone, whatever the text.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from perennial.plan.calibration import Calibration, MeasuredRun
from perennial.plan.transfer import LEVEL, NOISE, Estimate, RunLaw, RunRow, Side, fit_runs
from perennial.scaling.ledger import NEW, OLD, LedgerRun

FARTHEST = 50.0
"""Runs of this many times more compute than the largest measured one are no longer predicted.

Assumption: the exponents of small runs hold for a few doublings; after 50-fold their errors add up to more than the
effects that a plan decides about.
"""
LEAST_RUNS = 4
"""Runs of a ledger from which they take the place of published constants, where no calibration stands beside them.

Assumption: with fewer the priors of `transfer` decide, and these are the published exponents over again.
"""
_COST_PRIOR = (0.08, 0.08)
"""Mean and standard deviation of the exponent k of `ReplayCost`: 0.02 to 0.15 in Ibrahim et al. 2024 (arXiv 2403.08763,
table 2), weak and strong shift."""


@dataclass(frozen=True)
class ReplayCost:
    """What replay costs on new text by one's own runs: the loss grows by (1 - share)^-k."""

    exponent: float
    spread: float
    """Standard deviation of the exponent."""
    num_runs: int

    def rise(self, share: float) -> Estimate:
        """Relative rise of the new loss over an update without old text, with the interval that holds 80%."""
        fresh = -math.log(1 - min(share, 0.99))
        wide = float(-ndtri((1 - LEVEL) / 2)) * math.hypot(self.spread * fresh, NOISE if share else 0.0)
        middle = self.exponent * fresh
        return Estimate(*(math.expm1(value) for value in (middle, middle - wide, middle + wide)))


@dataclass(frozen=True)
class OwnLaws:
    """What one's own runs say; None where they are too few."""

    new: RunLaw | None
    old: RunLaw | None
    reason: str = ""
    """Why the new side has none."""
    old_reason: str = ""
    """Why the old side has none."""
    replay_cost: ReplayCost | None = None
    retrained: tuple[LedgerRun, ...] = ()
    """Runs from random weights on all of the text."""


def own_laws(
    calibration: Calibration | None,
    ledger: Sequence[LedgerRun] = (),
    *,
    new: Collection[str] = (),
    old: Collection[str] = (),
    parent_tokens: float = 0.0,
) -> OwnLaws:
    """The laws through the runs of a calibration and of a ledger; for new models only the new side.

    new, old: names of the text that is planned for. Runs that do not say what their parents had seen are taken to
    continue ones of `parent_tokens`.
    """
    runs = calibration.runs if calibration else []
    updates = [run for run in runs if run.kind == "update"]
    scratch = [run for run in runs if run.kind == "scratch"]
    new_rows = [_row(run, run.new) for run in updates or scratch if run.new is not None]
    old_rows = [_row(run, run.old) for run in updates if run.old is not None and run.old_before is not None]
    own = [run for run in ledger if run.is_update]
    new_rows += [row for run in own for row in _new_rows(run, new, parent_tokens)]
    old_rows += [row for run in own if (row := _old_row(run, old, parent_tokens)) is not None]
    least = 2 if runs else LEAST_RUNS
    side: Side = "scratch" if scratch and not updates else "new"
    return OwnLaws(
        new=fit_runs(side, new_rows) if len(new_rows) >= least else None,
        old=fit_runs("old", old_rows) if len(old_rows) >= least else None,
        reason="" if len(new_rows) >= least else _too_few(len(new_rows), runs, ledger, "on this new text"),
        old_reason="" if len(old_rows) >= least else _too_few(len(old_rows), runs, ledger, "with this old text"),
        replay_cost=replay_cost(own),
        retrained=tuple(run for run in ledger if not run.is_update and {*new, *old} <= run.trained_on),
    )


def replay_cost(runs: Sequence[LedgerRun]) -> ReplayCost | None:
    """The cost of replay by runs that differ in the share of old text alone; None for fewer than `LEAST_RUNS`.

    A regression of ln(loss) on -ln(1 - share) within groups of such runs, with the published exponents as its prior.
    """
    groups: dict[object, list[tuple[float, float]]] = {}
    for run in runs:
        loss = run.mean(NEW, run.losses)
        if loss is not None and math.isfinite(loss) and loss > 0 and run.replay < 1:
            groups.setdefault(_all_but_share(run), []).append((-math.log(1 - run.replay), math.log(loss)))
    told = [np.array(group) for group in groups.values() if len({share for share, _ in group}) > 1]
    number = sum(len(group) for group in told)
    if number < LEAST_RUNS:
        return None
    fresh, losses = np.concatenate([group - group.mean(axis=0) for group in told]).T
    mean, spread = _COST_PRIOR
    precision = 1 / spread**2 + float(fresh @ fresh) / NOISE**2
    exponent = (mean / spread**2 + float(fresh @ losses) / NOISE**2) / precision
    spare = number - len(told) - 1
    residual = losses - exponent * fresh
    scatter = max(NOISE, math.sqrt(float(residual @ residual) / spare)) if spare > 0 else NOISE
    return ReplayCost(exponent, scatter / NOISE / math.sqrt(precision), number)


def _all_but_share(run: LedgerRun) -> tuple[object, ...]:
    """What runs that differ in the share of old text alone have in common."""
    new = frozenset(name for name, role in run.roles.items() if role == NEW)
    return new, run.parent, run.parent_tokens, run.parameters, run.tokens, run.learning_rate, run.schedule


def _new_rows(run: LedgerRun, names: Collection[str], parent_tokens: float) -> list[RunRow]:
    """A row for each of the names that was new to the run."""
    found = [loss for name, loss in run.losses.items() if name in names and run.roles[name] == NEW]
    return [_ledger_row(run, math.nan, loss, parent_tokens) for loss in found if math.isfinite(loss)]


def _old_row(run: LedgerRun, names: Collection[str], parent_tokens: float) -> RunRow | None:
    """The run's old side, where it has one of the names and was measured before and after."""
    if not any(its == OLD and name in names for name, its in run.roles.items()):
        return None
    before, after = run.mean(OLD, run.losses_before), run.mean(OLD, run.losses)
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return None
    return _ledger_row(run, before, after, parent_tokens)


def _ledger_row(run: LedgerRun, old_before: float, loss: float, parent_tokens: float) -> RunRow:
    return RunRow(
        flops_per_token=run.flops / run.tokens,
        tokens=run.tokens,
        share=run.replay,
        parent_tokens=parent_tokens if run.parent_tokens is None else run.parent_tokens,
        old_before=old_before,
        loss=loss,
    )


def _too_few(number: int, runs: Sequence[MeasuredRun], ledger: Sequence[LedgerRun], of: str) -> str:
    """Why there is no law."""
    if runs:
        return "one run only" if number else f"no run of the calibration is {of}"
    if ledger:
        return f"your ledger has {number or 'no'} update{'s' * (number != 1)} {of}, {LEAST_RUNS} are the fewest"
    return "no calibration"


def _row(run: MeasuredRun, loss: float | None) -> RunRow:
    return RunRow(
        run.flops_per_token,
        run.tokens,
        run.share,
        run.parent_tokens,
        math.nan if run.old_before is None else run.old_before,
        math.nan if loss is None else loss,
    )
