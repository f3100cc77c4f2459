"""Fitted laws, tables and predictions in words: what `perennial laws` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perennial.core.amounts import human
from perennial.scaling.allocation import Allocation
from perennial.scaling.choosing import Blend
from perennial.scaling.fitting import Fit, Prediction
from perennial.scaling.laws.base import Input
from perennial.scaling.table import Flag

_SHOWN_FLAGS = 5
_ADVICE = {"worse": "; --drop worse keeps the best row of each size and tokens", "outlier": "; see --drop outliers"}
_SHOWN_ROWS = 20
_WILD = 1000
"""Percent of error from which on a form is simply of no use there."""
_PARTS = ("mean", "low", "high", "run_low", "run_high", "extrapolation")


def flag_lines(flags: Sequence[Flag]) -> list[str]:
    """What was odd about the rows, by kind."""
    lines = []
    for kind in dict.fromkeys(flag.kind for flag in flags):
        mine = [flag for flag in flags if flag.kind == kind]
        if mine[0].row is None:
            lines += [f"  {kind}: {flag.text}" for flag in mine]
            continue
        fate = "left out" if mine[0].is_dropped else "kept"
        rows = "1 row" if len(mine) == 1 else f"{len(mine)} rows"
        lines.append(f"  {kind}, {fate}: {rows}{_ADVICE.get(kind, '') if fate == 'kept' else ''}")
        lines += [f"    row {flag.row}: {flag.text}" for flag in mine[:_SHOWN_FLAGS]]
        lines += [f"    and {len(mine) - _SHOWN_FLAGS} more"] if len(mine) > _SHOWN_FLAGS else []
    return lines


def column_line(mapped: Mapping[str, str]) -> str:
    """Which columns were read as what."""
    return "columns: " + ", ".join(f"{meaning} = {column}" for meaning, column in mapped.items())


def law_lines(fitted: Fit | Blend) -> list[str]:
    """Errors and coefficients with their intervals, and what the rows leave open."""
    if isinstance(fitted, Fit):
        noise = f"{fitted.noise:.2%}" if fitted.is_relative else f"{fitted.noise:.3g} {fitted.law.TARGET.unit}"
        lines = [f"error on the rows {fitted.mape:.2f}%, noise of a run {noise}", *_coefficient_lines(fitted)]
    else:
        lines = _blend_lines(fitted)
    if not fitted.identifiable:
        lines.append(f"not identifiable: {fitted.reason}; predictions outside the table's range are refused")
    return lines


def _blend_lines(fitted: Blend) -> list[str]:
    ahead = "none could be left out" if fitted.left_out_mape is None else f"{fitted.left_out_mape:.2f}%"
    lines = [f"error on the rows {fitted.mape:.2f}%, on the largest when they are left out {ahead}", ""]
    for member in fitted.members:
        errors = (
            " and ".join(f"over {_WILD}%" if e >= _WILD else f"{e:.2f}%" for e in member.left_out_mape) or "unknown"
        )
        strength = getattr(member.fit.law, "strength", None)
        name = member.name if strength is None else f"{member.name} (ridge {strength:g})"
        lines.append(f"  {name:<24} weight {member.weight:.2f}, rows {member.fit.mape:.2f}%, left out {errors}")
    return [*lines, "", f"{fitted.best.name}, the heaviest:", *_coefficient_lines(fitted.best.fit)]


def _coefficient_lines(fitted: Fit) -> list[str]:
    lines = []
    for c in fitted.law.coefficients:
        low, high = fitted.intervals[c.name]
        bound = f"  at its {fitted.active_bounds[c.name]} bound" if c.name in fitted.active_bounds else ""
        value = fitted.coefficients[c.name]
        lines.append(f"  {c.name:<14} {value:>12.5g}  80%: {low:.5g} to {high:.5g}  {c.unit}  {c.about}{bound}")
    return lines


def prediction_text(p: Prediction, target: Input) -> str:
    """One row that was predicted, with both intervals and warnings."""
    mean, low, high, run_low, run_high = (_figure(getattr(p, part)[0], target) for part in _PARTS[:5])
    unit = "nats per token" if target.unit == "nats/token" else target.unit
    line = f"{target.name} {mean} {unit}; law 80%: {low} to {high}; a run 80%: {run_low} to {run_high}"
    return "\n".join([line, *(f"  warning: {w}" for w in p.warnings)])


def rows_text(rows: Sequence[Mapping[str, Any]], p: Prediction, target: Input, error: float | None) -> str:
    """Rows of a table that were predicted: at most 20 of them, evenly chosen, and the mean error where measured."""
    names = [name for name in rows[0] if name not in _PARTS]
    lines = ["  ".join(f"{name:>12}" for name in (*names, target.name if error is None else "predicted", "80%"))]
    for index in np.unique(np.linspace(0, len(rows) - 1, min(_SHOWN_ROWS, len(rows))).round().astype(int)).tolist():
        row = rows[index]
        cells = [row[name] if isinstance(row[name], str) else f"{row[name]:.5g}" for name in names]
        span = f"{_figure(row['run_low'], target)} to {_figure(row['run_high'], target)}"
        lines.append("  ".join(f"{cell:>12}" for cell in (*cells, _figure(row["mean"], target), span)))
    lines += [f"{len(rows)} rows; --json has all"] if len(rows) > _SHOWN_ROWS else []
    lines += [f"mean error {error:.2f}%"] if error is not None else []
    return "\n".join([*lines, *(f"  warning: {w}" for w in p.warnings)])


def plain(p: Prediction, row: int = 0) -> dict[str, float]:
    """One row of a prediction as JSON-ready data."""
    return {name: float(getattr(p, name)[row]) for name in _PARTS}


def allocation_text(a: Allocation) -> str:
    """The best run for a budget, and how much the choice matters."""
    low, high = a.parameters_interval
    few, many = a.tokens_per_parameter_interval
    lines = [
        f"{human(a.parameters)} parameters, {human(a.tokens)} tokens, {a.flops:.3g} FLOPs of training",
        f"  loss {a.loss:.4f}, 80%: {a.loss_interval[0]:.4f} to {a.loss_interval[1]:.4f}",
        f"  best size 80%: {human(low)} to {human(high)}; tokens per parameter {a.tokens_per_parameter:.3g} "
        f"({few:.3g} to {many:.3g})",
        f"  within 0.2% of the loss: {human(a.near_optimal[0])} to {human(a.near_optimal[1])} parameters",
    ]
    lines += [f"  {a.epochs:.3g} epochs"] if a.epochs is not None else []
    return "\n".join([*lines, *(f"  warning: {w}" for w in a.warnings)])


def _figure(value: float, target: Input) -> str:
    return f"{value:.4f}" if target.unit == "nats/token" else f"{value:.4g}"
