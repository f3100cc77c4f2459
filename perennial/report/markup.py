"""Small pieces of HTML that the sections share: escaped text, figures, run labels, tables, footnotes, bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape as _escape

from perennial.core.amounts import human, human_seconds
from perennial.report.rows import Comparison, Row, value
from perennial.report.runs import Loss
from perennial.report.style import line_style

NONE = '<span class="none" title="not measured">&ndash;</span>'
UNIT_NAMES = {"nats_per_token": "nats/token", "bits_per_byte": "bits/byte"}


def escape(text: object) -> str:
    """Text that is safe inside elements and quoted attributes."""
    return _escape(str(text), quote=True)


def listed(names: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'; not escaped."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# Figures


def loss(number: float | None) -> str:
    """A loss with three decimals."""
    return NONE if number is None else f"{number:.3f}"


def change(number: float | None, *, good: str = "") -> str:
    """A difference with its sign. good: 'low' or 'high' colours it by whether it is good news."""
    if number is None:
        return NONE
    shown = f"{abs(number):.3f}"
    if float(shown) == 0:
        return "0.000"
    text = ("+" if number > 0 else "&minus;") + shown
    if not good:
        return text
    return f'<span class="{"good" if (number < 0) == (good == "low") else "bad"}">{text}</span>'


def percent(share: float | None) -> str:
    """A share as a percentage with a real minus sign; one decimal below 10%."""
    if share is None:
        return NONE
    shown = f"{abs(share):.0%}" if abs(share) >= 0.0995 or share == 0 else f"{abs(share):.1%}"
    return ("&minus;" if share < 0 and shown.strip("0.%") else "") + shown


def amount(number: float | None) -> str:
    """A count such as 1.23M."""
    return NONE if number is None else human(number)


def flops(number: float | None) -> str:
    """FLOPs in powers of ten: 1.60 x 10^13 with a raised exponent."""
    if number is None:
        return NONE
    if number == 0:
        return "0"
    digits, exponent = f"{number:.2e}".split("e")
    return f"{digits}&thinsp;&times;&thinsp;10<sup>{int(exponent)}</sup>"


def seconds(number: float | None) -> str:
    """A duration; tenths below ten seconds."""
    if number is None:
        return NONE
    return f"{number:.1f}&nbsp;s" if number < 9.95 else human_seconds(number).replace(" ", "&nbsp;")


def rate(number: float | None) -> str:
    """A learning rate."""
    return NONE if number is None else f"{number:.3g}"


def in_unit(measured: Loss | None, unit: str) -> str:
    """A loss in the unit, or a dash."""
    return loss(value(measured, unit))


# Runs


def swatch(index: int) -> str:
    """The line of a run as it is drawn in the charts, to put beside its name."""
    style = line_style(index)
    dash = f' stroke-dasharray="{" ".join(f"{2.2 * part:g}" for part in style.dash)}"' if style.dash else ""
    line = f'<line x1="1" y1="6" x2="29" y2="6" style="stroke:var({style.colour})" stroke-width="2.2"{dash}/>'
    return f'<svg width="30" height="12" viewBox="0 0 30 12" aria-hidden="true">{line}</svg>'


def run_label(row: Row, index: int, *, tag: bool = True) -> str:
    """The name of a run with its line and what it is to the others."""
    line = swatch(index) if row.run is not None else '<svg width="30" height="12" aria-hidden="true"></svg>'
    words = {"parent": row.is_base, "reference": row.is_reference, "baseline": row.is_baseline}
    shown = [word for word, holds in words.items() if holds] + ([] if row.finished else ["unfinished"])
    tags = "".join(f' <span class="tag">{word}</span>' for word in shown if tag)
    width = " long" if len(row.label) > 14 else ""
    return f'<span class="run{width}">{line}<span class="name">{escape(row.label)}{tags}</span></span>'


def legend(comparison: Comparison) -> str:
    """Which line is which run."""
    items = "".join(f"<li>{run_label(row, index, tag=False)}</li>" for index, row, _ in comparison.runs)
    return f'<ul class="legend" aria-label="Runs">{items}</ul>'


# Tables


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    header: str
    """HTML."""
    cells: Sequence[str]
    """HTML, one per row."""
    group: str = ""
    """Columns next to each other with the same group share a header above (HTML)."""
    text: bool = False
    """True for words, which are set to the left."""
    wrap: bool = False
    """True for long words, which may take several lines."""


def table(
    first: tuple[str, Sequence[str]],
    columns: Sequence[Column],
    *,
    caption: str = "",
    row_classes: Sequence[str] = (),
    dense: bool = False,
) -> str:
    """A table that scrolls inside its own box; `first` is the header and the cells of the row names."""
    spans = _spans(columns)
    edges = {sum(n for _, n in spans[:i]) for i, (group, _) in enumerate(spans) if i and (group or spans[i - 1][0])}
    head = _head(first[0], columns, spans, edges)
    body = "".join(
        f"<tr{_class(row_classes[i] if i < len(row_classes) else '')}>"
        f'<th scope="row">{name}</th>'
        + "".join(f"<td{_class(_cell(c, k in edges))}>{c.cells[i]}</td>" for k, c in enumerate(columns))
        + "</tr>"
        for i, name in enumerate(first[1])
    )
    title = f"<caption>{caption}</caption>" if caption else ""
    inner = f"<table{_class('dense' if dense else '')}>{title}<thead>{head}</thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" role="region" aria-label="Table, scrolls sideways" tabindex="0">{inner}</div>'


def _spans(columns: Sequence[Column]) -> list[tuple[str, int]]:
    spans: list[tuple[str, int]] = []
    for column in columns:
        if spans and spans[-1][0] == column.group:
            spans[-1] = (column.group, spans[-1][1] + 1)
        else:
            spans.append((column.group, 1))
    return spans


def _head(first: str, columns: Sequence[Column], spans: list[tuple[str, int]], edges: set[int]) -> str:
    grouped = any(group for group, _ in spans)
    top = ""
    if grouped:
        position, cells = 0, []
        for group, span in spans:
            edge = " edge" if position in edges else ""
            scope = ' scope="colgroup"' if group else ' aria-hidden="true"'
            tag = "th" if group else "td"
            cells.append(f'<{tag} class="group{edge}" colspan="{span}"{scope}>{group}</{tag}>')
            position += span
        top = f'<tr><th class="first" scope="col" rowspan="2">{first}</th>{"".join(cells)}</tr>'
    names = "".join(f'<th scope="col"{_class(_cell(c, k in edges))}>{c.header}</th>' for k, c in enumerate(columns))
    return f"{top}<tr>{names}</tr>" if grouped else f'<tr><th class="first" scope="col">{first}</th>{names}</tr>'


def _cell(column: Column, edge: bool) -> str:
    return " ".join(name for name, holds in (("text", column.text), ("wide", column.wrap), ("edge", edge)) if holds)


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


class Footnotes:
    """Collects the footnotes of a section while its table is made, and numbers them in that order."""

    def __init__(self, section: str) -> None:
        self._section = section
        self._notes: list[str] = []

    def mark(self, note: str) -> str:
        """A raised number that leads to this note (HTML); the same note keeps its number."""
        if note not in self._notes:
            self._notes.append(note)
        at = self._notes.index(note) + 1
        return f'<sup><a href="#{self._section}-note-{at}" aria-label="note {at}">{at}</a></sup>'

    def html(self) -> str:
        """The list of notes, or ''."""
        items = "".join(f'<li id="{self._section}-note-{i}">{note}</li>' for i, note in enumerate(self._notes, 1))
        return f'<ol class="notes">{items}</ol>' if items else ""


def bar(parts: Sequence[tuple[float, str, str]], label: str) -> str:
    """A bar of (share of the whole, CSS colour, extra class) parts; `label` says it in words."""
    cells = "".join(
        f'<i style="width:{100 * share:.2f}%;background-color:{colour}"{_class(extra)}></i>'
        for share, colour, extra in parts
        if share > 0
    )
    return f'<div class="bar" role="img" aria-label="{escape(label)}">{cells}</div>'
