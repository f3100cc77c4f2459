"""Charts of fitted laws with their intervals: loss against compute, a curve of one input, curves of runs, or a check.

Laws of size and tokens are drawn at the best size for each budget; laws of one input along it; laws of the loss curve
beside the curves of a table; every other law as predicted against measured, row by row.
"""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perennial.core.errors import UserError
from perennial.core.files import explain
from perennial.scaling.allocation import optimal
from perennial.scaling.choosing import Blend
from perennial.scaling.curves import CURVE, STEP
from perennial.scaling.fitting import Fit, Prediction
from perennial.scaling.laws.base import Columns, Input, column
from perennial.scaling.table import is_of_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".html")
_NUM_BUDGETS = 25
_NUM_PLACES = 100  # along one input
_WIDE = 20.0  # a range of more than this ratio is drawn on a logarithmic axis
_DOTS: dict[str, Any] = {"s": 9, "color": "#333333", "alpha": 0.6, "label": "rows of the table", "zorder": 3}
_BEYOND = 10.0  # how far past the largest run the curve is drawn
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Scaling law</title></head>
<body><img alt="A fitted law, its intervals and the rows of a table" style="max-width:100%"
src="data:image/png;base64,{}"></body></html>
"""


def figure(fitted: Fit | Blend, table: Columns | None = None) -> Figure:
    """The chart that suits the law; `table` holds the columns that it was, or might be, fitted to.

    Raises UserError where matplotlib is not installed, and for a law that can only be drawn beside a table.
    """
    try:
        import matplotlib  # slow to import, and nothing else here needs it
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a plot needs matplotlib: pip install matplotlib") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "perennial"})
        result = Figure(figsize=(7, 4.4), layout="constrained")
        axes = result.add_subplot()
        _draw(axes, fitted, table)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return result


def _draw(axes: Axes, fitted: Fit | Blend, table: Columns | None) -> None:
    if isinstance(fitted, Blend) or is_of_runs(fitted.law):
        _draw_budgets(axes, fitted, table)
    elif len(fitted.law.inputs) == 1 and fitted.law.inputs[0].name in fitted.range:
        _draw_along(axes, fitted, table)
    elif table is None:
        names = ", ".join(i.name for i in fitted.law.inputs)
        raise UserError(f"a law of {names} is drawn beside measured rows: give them with --table")
    elif STEP.name in table:
        _draw_curves(axes, fitted, table)
    else:
        _draw_check(axes, fitted, table)


def _draw_budgets(axes: Axes, fitted: Fit | Blend, table: Columns | None) -> None:
    """Loss against compute, each budget at its best size."""
    low, high = fitted.range["compute"]
    budgets = np.geomspace(low, high * (_BEYOND if fitted.identifiable else 1.0), _NUM_BUDGETS)
    bare = _without_resamples(fitted)  # best sizes are drawn without intervals; the loss there has them
    found = [optimal(bare, float(budget)) for budget in budgets]
    inputs = {"parameters": np.array([f.parameters for f in found]), "tokens": np.array([f.tokens for f in found])}
    _band(axes, budgets, fitted.predict(inputs), "law, best size")
    if table is not None:
        axes.scatter(table["flops"], table["loss"], **_DOTS)
    axes.axvline(high, color="#999999", linewidth=0.8, dashes=(3, 3))
    place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate("largest run", (high, 1), (4, -10), **place, color="#777777", fontsize=8)
    axes.set(xscale="log", xlabel="training compute, FLOPs", ylabel="loss, nats per token")


def _draw_along(axes: Axes, fitted: Fit, table: Columns | None) -> None:
    """The target along the only input, inside its range."""
    only, target = fitted.law.inputs[0], fitted.law.TARGET
    low, high = fitted.range[only.name]
    is_log = low > 0 and high > _WIDE * low
    places = np.geomspace(low, high, _NUM_PLACES) if is_log else np.linspace(low, high, _NUM_PLACES)
    _band(axes, places, fitted.predict({only.name: places}), "law")
    if table is not None:
        axes.scatter(table[only.name], table[target.name], **_DOTS)
    axes.set(xscale="log" if is_log else "linear", xlabel=f"{only.name}, {only.unit}", ylabel=_label(target))


def _draw_curves(axes: Axes, fitted: Fit, table: Columns) -> None:
    """Each run's measured losses, and the law's line through its updates."""
    predicted, steps = fitted.predict(table).mean, column(table, STEP.name)
    keys = np.array([id(label) for label in table[CURVE.name].tolist()])
    for index, key in enumerate(dict.fromkeys(keys.tolist())):
        rows = np.flatnonzero(keys == key)
        rows = rows[np.argsort(steps[rows])]
        first = index == 0
        axes.plot(steps[rows], table["loss"][rows], ".", color="#333333", alpha=0.4, ms=3, label="runs" * first)
        axes.plot(steps[rows], predicted[rows], color="#4477aa", linewidth=1.2, label="law" * first)
    axes.set(xlabel="updates", ylabel=_label(fitted.law.TARGET))


def _draw_check(axes: Axes, fitted: Fit, table: Columns) -> None:
    """Predicted, with the interval of a run, against measured."""
    measured, found = column(table, fitted.law.TARGET.name), fitted.predict(table)
    spread = [found.mean - found.run_low, found.run_high - found.mean]
    ends = [float(measured.min()), float(measured.max())]
    axes.errorbar(
        measured, found.mean, spread, fmt=".", color="#4477aa", alpha=0.6, lw=0.8, label="rows, 80% for a run"
    )
    axes.plot(ends, ends, color="#999999", linewidth=0.8, label="predicted = measured")
    axes.set(xlabel=f"measured {_label(fitted.law.TARGET)}", ylabel=f"predicted {_label(fitted.law.TARGET)}")


def _band(axes: Axes, places: np.ndarray, found: Prediction, label: str) -> None:
    axes.fill_between(places, found.run_low, found.run_high, color="#4477aa", alpha=0.13, linewidth=0)
    axes.fill_between(places, found.low, found.high, color="#4477aa", alpha=0.3, linewidth=0)
    axes.plot(places, found.mean, color="#4477aa", label=f"{label}; 80% for the law and for a run")


def _label(of: Input) -> str:
    return "loss, nats per token" if of.unit == "nats/token" else f"{of.name}, {of.unit}"


def _without_resamples(fitted: Fit | Blend) -> Fit | Blend:
    if isinstance(fitted, Fit):
        return replace(fitted, samples=fitted.samples[:0])
    members = (replace(m, fit=replace(m.fit, samples=m.fit.samples[:0])) for m in fitted.members)
    return replace(fitted, members=tuple(members))


def save_plot(path: Path, fitted: Fit | Blend, table: Columns | None = None) -> None:
    """Writes the chart as PNG, SVG or a page of its own. Raises UserError for another ending."""
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise UserError(f"{path}: a plot ends in {', '.join(FORMATS)}, not '{kind}'")
    buffer = io.BytesIO()
    name = "svg" if kind == ".svg" else "png"
    metadata = {"Date": None} if name == "svg" else None
    figure(fitted, table).savefig(buffer, format=name, dpi=150, metadata=metadata)
    content = buffer.getvalue()
    if kind == ".html":
        content = _PAGE.format(base64.b64encode(content).decode("ascii")).encode("utf-8")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise explain(error, path) from error
