"""Forgetting against adaptation: a chart with one point a run, and which runs another one beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perennial.report.charts import Frame, Line, line_chart
from perennial.report.markup import escape
from perennial.report.style import line_style

_SHAPES = {
    "o": '<circle cx="6" cy="6" r="4.2"/>',
    "s": '<path d="M2.2 2.2h7.6v7.6H2.2z"/>',
    "D": '<path d="M6 .8 11.2 6 6 11.2.8 6z"/>',
    "^": '<path d="M6 1.4 11 10.4H1z"/>',
    "v": '<path d="M6 10.6 1 1.6h10z"/>',
    "P": '<path d="M4.2 1h3.6v3.2H11v3.6H7.8V11H4.2V7.8H1V4.2h3.2z"/>',
    "X": '<path d="M3.5 1 6 3.5 8.5 1 11 3.5 8.5 6 11 8.5 8.5 11 6 8.5 3.5 11 1 8.5 3.5 6 1 3.5z"/>',
    "p": '<path d="M6 .9 11.2 4.7 9.2 10.8H2.8L.8 4.7z"/>',
}
"""The markers of `style.line_style`, drawn by hand for tables."""


@dataclass(frozen=True)
class Point:
    """A run that continued a parent, by what it forgot and what it learned."""

    label: str
    forgetting: float
    """Rise of the loss on the old corpora."""
    adaptation: float
    """Fall of the loss on the new corpora."""
    style: int
    """Decides colour and marker, as of a line."""


def frontier_chart(points: Sequence[Point], *, key: str, x_label: str, y_label: str, paths: Sequence[Line] = ()) -> str:
    """A figure with the points, adaptation over forgetting: up and to the left is better; '' without points.

    paths: lines that join some of them, drawn below.
    """
    dots = [Line(p.label, np.array([p.forgetting]), np.array([p.adaptation]), p.style, markers=True) for p in points]
    frame = Frame(key=key, title="Forgetting against adaptation", x_label=x_label, y_label=y_label, x_unit="nats")
    chart = line_chart([*paths, *dots], frame)
    return f"<figure><figcaption>{escape(y_label)}</figcaption>{chart}</figure>" if chart else ""


def dot(index: int) -> str:
    """The marker of a run as the chart draws it, to put beside its name."""
    style = line_style(index)
    shape = _SHAPES[style.marker]
    return (
        f'<svg width="12" height="12" viewBox="0 0 12 12" aria-hidden="true" style="fill:var({style.colour})">'
        f"{shape}</svg>"
    )


def better_in_both(point: Point, others: Sequence[Point]) -> list[Point]:
    """Those that forgot less and learned more, or one of them with the other equal; none for one on the frontier."""
    return [
        other
        for other in others
        if other.forgetting <= point.forgetting
        and other.adaptation >= point.adaptation
        and (other.forgetting, other.adaptation) != (point.forgetting, point.adaptation)
    ]
