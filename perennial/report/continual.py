"""The page of a continual-learning grid: verdicts, the frontier of forgetting against adaptation, all recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perennial import __version__
from perennial.bench.continual_checks import FAIL, NOT_RUN, PASS
from perennial.bench.continual_summary import not_run, verdict_text
from perennial.core.files import write_text
from perennial.report.charts import Line
from perennial.report.frontier import Point, frontier_chart
from perennial.report.markup import Column, amount, escape, flops, seconds, swatch, table
from perennial.report.style import SHEET

_VERDICTS = {PASS: "good", FAIL: "bad"}
_LADDERS = (("replay-", "replay, 0 to 50%"), ("peak-", "peak, 0.1 to 2 x"))
"""Runs that differ in one number are joined by a line: beginning of their names, and what changes along it."""


def write_page(summary: Mapping[str, Any], out: Path) -> Path:
    """Writes the page for `bench.continual.Outcome.to_json()` and returns its path."""
    write_text(out, render(summary))
    return out


def render(summary: Mapping[str, Any]) -> str:
    """The whole page as text; needs nothing else, no network and no script."""
    blocks = [_checks(summary["checks"])] if summary["checks"] else []
    for index, (title, rows) in enumerate(summary["tables"].items()):
        if rows:
            blocks.append(f"<section><h2>{escape(title)}</h2>{_frontier(rows, index)}{_recipes(rows)}</section>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Continual pre-training - Perennial report</title>\n<style>{SHEET}</style>\n</head>\n<body>\n"
        '<div class="wrap">\n<header class="top"><span class="brand">Perennial report</span></header>\n<main>\n'
        f"<h1>Continual pre-training, measured</h1>\n{_facts(summary)}\n{''.join(blocks)}\n</main>\n"
        f"<footer>Made by Perennial {escape(__version__)} from the records of the runs alone.</footer>\n"
        "</div>\n</body>\n</html>\n"
    )


def _facts(summary: Mapping[str, Any]) -> str:
    manifest = summary["manifest"]
    peaks = "; ".join(f"{where}: peak {found['peak']:g}" for where, found in summary["peaks"].items())
    state = f"{manifest['done']} of {len(manifest['runs'])} runs done"
    return f'<p class="facts">{state} &middot; {escape(peaks)} &middot; losses in nats per token on held-out text</p>'


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    left = not_run((check["check"], check["shift"]) for check in checks if check["verdict"] == NOT_RUN)
    checks = [check for check in checks if check["verdict"] != NOT_RUN]
    names = [escape(check["check"]) for check in checks]
    columns = [
        Column("What", [escape(check["statement"]) for check in checks], text=True, wrap=True),
        Column("Shift", [escape(check["shift"]) for check in checks], text=True, wrap=True),
        Column("Verdict", [_verdict(check) for check in checks], text=True, wrap=True),
        Column("Effect", [_interval(_effect(check)) for check in checks]),
        Column("Wanted", [escape(check["wanted"]) for check in checks], text=True, wrap=True),
        Column("Papers", [escape(check["paper"]) for check in checks], text=True, wrap=True),
    ]
    found = table(("Check", names), columns) if checks else ""
    note = f'<p class="facts">{escape(left)}</p>' if left else ""
    return f"<section><h2>Checks</h2>{found}{note}</section>"


def _verdict(check: Mapping[str, Any]) -> str:
    words = escape(verdict_text(check["verdict"], sure=check["sure"], reason=check["reason"]))
    color = _VERDICTS.get(check["verdict"])
    return f'<span style="color:var(--{color})">{words}</span>' if color else words


def _effect(check: Mapping[str, Any]) -> list[float | None] | None:
    return None if check["effect"] is None else [check["effect"], *check["interval"]]


def _interval(numbers: Sequence[float | None] | None, digits: int = 3) -> str:
    """'0.013 &plusmn; 0.004', or a dash."""
    if numbers is None or numbers[0] is None:
        return "&ndash;"
    estimate, low, high = numbers
    half = "" if low is None or high is None else f" &plusmn; {(high - low) / 2:.{digits}f}"
    return f"{estimate:.{digits}f}{half}"


def _named(index: int, label: str) -> str:
    return f'<span class="run long">{swatch(index)}<span class="name">{escape(label)}</span></span>'


def _recipes(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [_named(index, row["label"]) for index, row in enumerate(rows)]
    ends, areas = "At the end", "Area under the curve"
    columns = [
        *(Column(word, [_interval(row[word.lower()]) for row in rows], ends) for word in ("Old", "New", "Average")),
        Column("Old", [_interval(row["old_area"]) for row in rows], areas),
        Column("New", [_interval(row["new_area"]) for row in rows], areas),
        Column("Tokens", [amount(row["tokens"]) for row in rows]),
        Column("FLOPs", [flops(row["flops"]) for row in rows]),
        Column("Wall", [seconds(row["seconds"]) for row in rows]),
        Column("Seeds", [str(len(row["seeds"])) for row in rows]),
    ]
    return table(("Recipe", names), columns)


def _frontier(rows: Sequence[Mapping[str, Any]], index: int) -> str:
    """Adaptation over forgetting: up and to the left is better."""
    known = [(i, row) for i, row in enumerate(rows) if row["forgetting"] and row["adaptation"]]
    points = [Point(row["label"], row["forgetting"][0], row["adaptation"][0], i) for i, row in known]
    ladders: list[Line] = []
    for beginning, words in _LADDERS:
        steps = [(i, row) for i, row in known if row["run"].startswith(beginning)]
        if len(steps) > 1:
            x = np.array([row["forgetting"][0] for _, row in steps])
            y = np.array([row["adaptation"][0] for _, row in steps])
            ladders.insert(0, Line(words, x, y, steps[0][0]))
    chart = frontier_chart(
        points,
        key=f"frontier-{index}",
        x_label="forgetting: rise of the old loss over the annealed base, nats (left is better)",
        y_label="adaptation: fall of the new loss, nats (up is better)",
        paths=ladders,
    )
    return f'<div class="charts">{chart}</div>' if chart else ""
