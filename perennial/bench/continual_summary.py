"""The summary of a grid: one table of all recipes per shift and size, the checks, and the records behind them."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from perennial.bench.continual_checks import FAIL, NOT_JUDGED, NOT_RUN, PASS, Check
from perennial.bench.continual_grid import EVENTS, Node
from perennial.bench.continual_measures import Measured, Results
from perennial.core.amounts import human, human_seconds
from perennial.core.files import write_json, write_text
from perennial.core.statistics import Interval, mean_interval

LOSSES = ("old", "new", "average", "old_area", "new_area")
"""Columns with one value per seed, in nats per token: at the end, and the mean height of the curves."""
BASES = ("base", "trunk")


def table_of(results: Results, labels: dict[str, str]) -> list[dict[str, Any]]:
    """One row per run name that at least one seed finished, as plain data; intervals are [estimate, low, high]."""
    measures: dict[str, Callable[[Measured], float]] = {
        "old": lambda run: run.loss(results.old),
        "new": lambda run: run.loss(results.new),
        "average": results.average,
        "old_area": lambda run: run.area(results.old),
        "new_area": lambda run: run.area(results.new),
    }
    rows = []
    for name, by_seed in results.runs.items():
        runs = [by_seed[seed] for seed in sorted(by_seed)]
        row: dict[str, Any] = {"run": name, "label": labels.get(name, name), "seeds": sorted(by_seed)}
        known = [run for run in runs if set(results.corpora) <= run.after.keys()]
        if not known:
            continue
        for column, value in measures.items():
            row[column] = _numbers(mean_interval([value(run) for run in known]))
        for column, sign, corpora in (("forgetting", 1, results.old), ("adaptation", -1, results.new)):
            changes = [
                sign * (run.loss(corpora) - results.runs["base"][run.seed].loss(corpora))
                for run in known
                if run.seed in results.runs.get("base", {})
            ]
            row[column] = _numbers(mean_interval(changes)) if changes and name not in BASES else None
        row |= {"tokens": runs[0].tokens, "flops": runs[0].flops, "seconds": _mean([run.seconds for run in runs])}
        rows.append(row)
    return rows


def _numbers(interval: Interval) -> list[float | None]:
    bounds = (interval.low, interval.high)
    return [interval.estimate, *(bound if math.isfinite(bound) else None for bound in bounds)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def not_run(places: Iterable[tuple[str, str]]) -> str:
    """One sentence for (letter, shift) of all checks that were not run; empty without any."""
    by_shift: dict[str, dict[str, None]] = {}
    for letter, shift in places:
        by_shift.setdefault(shift, {})[letter] = None
    told = "; ".join(f"{', '.join(letters)} ({shift})" for shift, letters in by_shift.items())
    return f"Not run: {told}." if told else ""


def verdict_text(verdict: str, *, sure: bool, reason: str) -> str:
    """'pass', 'fail, not sure', 'not judged: nothing was forgotten (...)'."""
    if reason:
        return f"{verdict}: {reason}"
    return verdict if sure else f"{verdict}, not sure"


def checks_text(checks: Sequence[Check]) -> str:
    """The checks as Markdown: verdict, effect with its interval, and the papers' number beside it."""
    lines = [
        "| check | shift | what | verdict | effect | wanted | papers |",
        "|---|---|---|---|---|---|---|",
    ]
    for check in checks:
        if check.verdict == NOT_RUN:
            continue
        verdict = verdict_text(check.verdict, sure=check.sure, reason=check.reason)
        effect = check.effect.text() if check.effect else "-"
        cells = (check.letter, check.shift, check.statement, verdict, effect, check.wanted, check.paper)
        lines.append(f"| {' | '.join(cells)} |")
    kinds = (PASS, FAIL, NOT_JUDGED, NOT_RUN)
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in kinds}
    left = not_run((check.letter, check.shift) for check in checks if check.verdict == NOT_RUN)
    told = [f"{count} {verdict}" for verdict, count in counts.items() if count or verdict != NOT_JUDGED]
    total = ", ".join(told) + "."
    return "\n".join([*lines, "", total, *([left] if left else [])])


def table_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table of recipes as Markdown; mean over seeds +- half of the 95 % interval."""
    lines = [
        "| recipe | old loss | new loss | average | area old | area new | tokens | FLOPs | wall | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["label"], *(_cell(row[column]) for column in LOSSES)]
        cells += [human(row["tokens"]), f"{row['flops']:.3g}", human_seconds(row["seconds"]), str(len(row["seeds"]))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(numbers: Sequence[float | None]) -> str:
    estimate, low, high = numbers
    if low is None or high is None:
        return f"{estimate:.3f}"
    return f"{estimate:.3f} +- {(high - low) / 2:.3f}"


def summary_text(tables: dict[str, list[dict[str, Any]]], checks: Sequence[Check], peaks: dict[str, Any]) -> str:
    """Everything as one Markdown page."""
    parts = ["# Continual pre-training, measured", ""]
    parts += ["Losses in nats per token on held-out text; mean over seeds +- half of the 95 % interval.", ""]
    if checks:
        parts += ["## Checks", "", checks_text(checks), ""]
    for title, rows in tables.items():
        if rows:
            parts += [f"## {title}", "", table_text(rows), ""]
    for where, found in peaks.items():
        tried = ", ".join(f"{peak:g}: {loss:.4f}" for peak, loss in found["tried"].items())
        parts += [f"Peak of {where}: {found['peak']:g}" + (f" (average loss of union at {tried})" if tried else "")]
    return "\n".join(parts) + "\n"


def keep_records(nodes: Sequence[Node], folder: Path, work: Path, files: dict[str, str | dict[str, Any]]) -> None:
    """Writes what proves the runs (recipe, resolved recipe, events), and `files`, without weights and places.

    WORK stands for the work folder in every text. Each shift and size has its own folder with one per seed.
    """
    for node in nodes:
        if node.is_done:
            target = folder / node.shift / node.scale.preset / f"seed{node.scale.seed}" / node.folder.name
            target.mkdir(parents=True, exist_ok=True)
            for name in ("recipe.yaml", "resolved.json"):
                write_text(target / name, _nameless((node.folder / name).read_text(encoding="utf-8"), work))
            with gzip.GzipFile(target / f"{EVENTS}.gz", "wb", mtime=0) as file:
                file.write(_nameless((node.folder / EVENTS).read_text(encoding="utf-8"), work).encode())
    for name, content in files.items():
        if isinstance(content, str):
            write_text(folder / name, content)
        else:
            write_json(folder / name, content)


def _nameless(text: str, work: Path) -> str:
    return text.replace(str(work.resolve()), "WORK").replace(str(work), "WORK")
