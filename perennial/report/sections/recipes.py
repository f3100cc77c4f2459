"""The recipes as they were given, and resolved with every value explicit."""

from __future__ import annotations

import json
from typing import ClassVar

from perennial.report.markup import escape
from perennial.report.rows import Comparison
from perennial.report.runs import Run
from perennial.report.sections.base import Section


class Recipes(Section):
    """Folded away until asked for."""

    POSITION: ClassVar[int] = 130
    TITLE: ClassVar[str] = "Recipes"

    def render(self, comparison: Comparison) -> str:
        return "".join(
            _folded(f"{escape(row.label)} <small>recipe.yaml</small>", run.recipe, _resolved(run))
            for _, row, run in comparison.runs
            if run.recipe or run.resolved
        )


def _resolved(run: Run) -> str:
    if not run.resolved:
        return ""
    return _folded("resolved.json <small>every value explicit</small>", json.dumps(run.resolved, indent=2))


def _folded(title: str, text: str, below: str = "") -> str:
    body = f'<pre tabindex="0">{escape(text.rstrip())}</pre>' if text else ""
    return f"<details><summary>{title}</summary>{body}{below}</details>"
