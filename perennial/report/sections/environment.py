"""Machine and software that the runs had."""

from __future__ import annotations

from typing import Any, ClassVar

from perennial.core.amounts import human_bytes
from perennial.report.markup import NONE, Column, escape, listed, table
from perennial.report.rows import Comparison
from perennial.report.runs import Run
from perennial.report.sections.base import Section


class Environment(Section):
    """One column for each different environment."""

    POSITION: ClassVar[int] = 120
    TITLE: ClassVar[str] = "Environment"

    def render(self, comparison: Comparison) -> str:
        groups: list[tuple[dict[str, str], list[str]]] = []
        for _, row, run in comparison.runs:
            facts = _facts(run)
            same = next((labels for known, labels in groups if known == facts), None)
            if same is None:
                groups.append((facts, [row.label]))
            else:
                same.append(row.label)
        keys = list(dict.fromkeys(key for facts, _ in groups for key in facts))
        if not keys:
            return ""
        columns = [
            Column(
                "All runs" if len(groups) == 1 else escape(listed(labels)),
                [escape(facts[key]) if key in facts else NONE for key in keys],
                text=True,
                wrap=True,
            )
            for facts, labels in groups
        ]
        return table(("", [escape(key.replace("_", " ")) for key in keys]), columns, dense=True)


def _facts(run: Run) -> dict[str, str]:
    model = {
        "parameters": f"{run.parameters:,}" if run.parameters else None,
        "precision": run.precision or None,
        "processes": run.processes,
    }
    return dict(_flat({**model, **run.environment}))


def _flat(data: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as one list; sizes in bytes are written for people, what is unknown is left out."""
    result = []
    for key, value in data.items():
        if isinstance(value, dict):
            result += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, int) and key.endswith("_bytes"):
            result.append((prefix + key.removesuffix("_bytes"), human_bytes(value)))
        elif value is not None:
            result.append((prefix + key, _words(value)))
    return result


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_words(item) for item in value) or "none"
    if isinstance(value, dict):
        return " ".join(f"{key} {item}" for key, item in _flat(value))
    return str(value)
