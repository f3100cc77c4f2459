"""Line charts as inline SVG: drawn by matplotlib without global state, coloured by the page's CSS variables.

Colours are written as stand-ins that no chart uses otherwise and replaced by `var(--name)` in the finished SVG, so that
one drawing serves light and dark. The bytes depend on the data alone.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from perennial.core.amounts import human
from perennial.report.markup import escape
from perennial.report.runs import short_id
from perennial.report.style import LIGHT, LineStyle, line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

MAX_POINTS = 600
"""Points drawn per line; a chart is about as many pixels wide."""
_WIDTH, _HEIGHT = 420.0, 262.0  # points; small enough that the text stays readable on a phone
_FONT = 11.0
_STAND_INS = {f"--run-{i + 1}": f"#fe00{i + 1:02x}" for i in range(len(LIGHT))} | {
    "--ink": "#fd0001",
    "--muted": "#fd0002",
    "--grid": "#fd0003",
    "--surface": "#fd0004",
}
_RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


@dataclass(frozen=True)
class Line:
    """One run in a chart."""

    label: str
    x: np.ndarray
    y: np.ndarray
    style: int
    """Position of the run in the comparison; decides colour, dash and marker."""
    markers: bool = False


@dataclass(frozen=True)
class Frame:
    """What surrounds the lines."""

    key: str
    """Unique in the page."""
    title: str
    x_label: str
    y_label: str
    x_unit: str
    """'tokens', 'flops' or 'nats': how the ticks are written."""
    log_x: bool = False
    from_zero: bool = False
    """Whether the vertical axis starts at 0."""
    top: float | None = None
    """Highest value shown; lines leave through the top above it."""
    marks: tuple[tuple[float, str], ...] = ()
    """Vertical lines: position and what happens there."""


def thin(x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` of the points: the lowest and highest of each stretch, so that no peak is lost; ends kept."""
    if len(x) <= limit:
        return x, y
    edges = np.linspace(1, len(x) - 1, (limit - 2) // 2 + 1).astype(int)
    keep = {0, len(x) - 1}
    for start, stop in itertools.pairwise(edges.tolist()):
        part = y[start:stop]
        if len(part):
            keep |= {int(start + part.argmin()), int(start + part.argmax())}
    chosen = np.array(sorted(keep))
    return x[chosen], y[chosen]


def smooth(x: np.ndarray, y: np.ndarray, half_life: float) -> np.ndarray:
    """Exponential moving average over x whose weights halve every `half_life`; unbiased at the start.

    s_i = (sum over j <= i of w_ij y_j) / (sum of w_ij), w_ij = 2^(-(x_i - x_j) / half_life).
    """
    result = np.empty_like(y)
    total = weight = 0.0
    previous = float(x[0]) if len(x) else 0.0
    for index, (at, number) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        keep = 0.5 ** ((at - previous) / half_life) if half_life > 0 else 0.0
        total, weight, previous = total * keep + number, weight * keep + 1.0, at
        result[index] = total / weight
    return result


def line_chart(lines: Sequence[Line], frame: Frame) -> str:
    """An SVG element with title and description, or '' when no line has a point to show."""
    shown = [line for line in (_finite(line) for line in lines) if len(line.x)]
    if not shown:
        return ""
    import matplotlib  # takes most of a second to import; only charts need it
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own matplotlibrc must not change the page
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": frame.key, "font.size": _FONT})
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72)
        axes = figure.add_axes((0.125, 0.175, 0.855, 0.80))
        _draw(axes, shown, frame)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _inline(buffer.getvalue(), frame, _describe(shown, frame))


def _finite(line: Line) -> Line:
    good = np.isfinite(line.x) & np.isfinite(line.y)
    return Line(line.label, line.x[good], line.y[good], line.style, line.markers)


def _draw(axes: Axes, lines: Sequence[Line], frame: Frame) -> None:
    _dress(axes, frame)
    floor = _left_edge(lines) if frame.log_x else 0.0
    for order, line in enumerate(lines):
        style = line_style(line.style)
        x, y = thin(np.maximum(line.x, floor) if frame.log_x else line.x, line.y)
        colour = _STAND_INS[style.colour]
        axes.plot(x, y, color=colour, linewidth=1.7, zorder=3 + order, **_dashes(style), solid_joinstyle="round")
        if line.markers:
            _mark_points(axes, x, y, style, zorder=4 + order)
    low, high = min(float(line.y.min()) for line in lines), max(float(line.y.max()) for line in lines)
    if frame.top is not None:
        high = min(high, frame.top)
    low = 0.0 if frame.from_zero else low
    room = 0.06 * ((high - low) or abs(high) or 1.0)
    axes.set_ylim(low if frame.from_zero else low - room, high + room)
    for position, words in frame.marks:
        axes.axvline(position, color=_STAND_INS["--muted"], linewidth=0.9, dashes=(2, 3), zorder=2)
        axes.annotate(
            words,
            (position, 1.0),
            (5, -9),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=_STAND_INS["--muted"],
            fontsize=_FONT - 1,
        )
    _label_ticks(axes, frame)


def _dashes(style: LineStyle) -> dict[str, Any]:
    return {"dashes": style.dash} if style.dash else {}


def _mark_points(axes: Axes, x: np.ndarray, y: np.ndarray, style: LineStyle, *, zorder: float) -> None:
    """A marker at every measured point, thinned to about 24, the last one always."""
    step = max(1, len(x) // 24)
    chosen = sorted({*range(0, len(x), step), len(x) - 1})
    axes.plot(
        x[chosen],
        y[chosen],
        linestyle="none",
        marker=style.marker,
        markersize=4.8,
        markerfacecolor=_STAND_INS[style.colour],
        markeredgecolor=_STAND_INS["--surface"],
        markeredgewidth=0.7,
        zorder=zorder,
    )


def _left_edge(lines: Sequence[Line]) -> float:
    """Where a logarithmic axis begins: a little left of the first positive point; points at 0 are drawn there."""
    return 0.7 * min((float(line.x[line.x > 0].min()) for line in lines if (line.x > 0).any()), default=1.0)


def _dress(axes: Axes, frame: Frame) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_STAND_INS["--muted"])
    axes.spines["bottom"].set_linewidth(0.8)
    axes.grid(axis="y", color=_STAND_INS["--grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", which="both", length=0, labelcolor=_STAND_INS["--muted"], pad=5)
    axes.tick_params(axis="x", which="major", length=3.5, color=_STAND_INS["--muted"], width=0.8)
    if frame.log_x:
        axes.set_xscale("log")
    axes.set_xlabel(frame.x_label, color=_STAND_INS["--muted"], labelpad=5)
    axes.margins(x=0.025)


def _label_ticks(axes: Axes, frame: Frame) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

    horizontal: Axis = axes.xaxis
    if frame.log_x:
        low, high = axes.get_xlim()
        horizontal.set_major_locator(FixedLocator(_log_ticks(low, high)))
        horizontal.set_minor_formatter(NullFormatter())
    else:
        horizontal.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    writers: dict[str, Callable[[float], str]] = {"tokens": human, "flops": power_of_ten, "nats": "{:.6g}".format}
    write = writers[frame.x_unit]
    horizontal.set_major_formatter(FuncFormatter(lambda number, _: write(number)))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:.6g}"))


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside the range, with 2 and 5 times them when there are fewer than three."""
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors if low <= f * 10.0**e <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: max(1, len(ticks) // 6)]


def power_of_ten(number: float) -> str:
    """'2x10^13' with a raised exponent and a real multiplication sign."""
    if number <= 0:
        return "0"
    digits, exponent = f"{number:.1e}".split("e")
    raised = "10" + str(int(exponent)).translate(_RAISED)
    return raised if digits == "1.0" else f"{float(digits):g}\u00d7{raised}"


def _describe(lines: Sequence[Line], frame: Frame) -> str:
    parts = [
        f"{line.label}: from {line.y[0]:.4g} to {line.y[-1]:.4g}, highest {line.y.max():.4g}, lowest {line.y.min():.4g}"
        for line in lines
    ]
    return f"{frame.y_label} against {frame.x_label}. {'; '.join(parts)}."


def _inline(svg: str, frame: Frame, description: str) -> str:
    """The SVG element alone, with ids of its own, CSS variables for colours, the page's font and no outside names."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    unique = f"c{short_id(frame.key)}"
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{unique}-\1"', svg)
    svg = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{unique}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{unique}-\1)", svg)
    for name, colour in _STAND_INS.items():
        svg = svg.replace(colour, f"var({name})")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    svg = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    view = re.search(r'viewBox="([^"]+)"', svg)
    assert view is not None, "matplotlib writes a viewBox"
    label = f'role="img" aria-labelledby="{unique}-title {unique}-desc"'
    head = f'<svg viewBox="{view[1]}" {label}><title id="{unique}-title">{escape(frame.title)}</title>'
    head += f'<desc id="{unique}-desc">{escape(description)}</desc>'
    return re.sub(r"^<svg[^>]*>", lambda _: head, svg, count=1).rstrip()
