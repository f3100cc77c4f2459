"""Training loss, smoothed, against tokens and against FLOPs."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from perennial.report.charts import Frame, Line, line_chart, smooth
from perennial.report.markup import legend
from perennial.report.rows import Comparison
from perennial.report.sections.base import Section
from perennial.report.sections.curves import left_out, tokens_label, update_marks, wide

HALF_LIFE_SHARE = 0.01
"""The weights of the moving average halve over this share of a run's tokens."""
_EARLY = 0.1


class Training(Section):
    """The loss on the batches themselves; it depends on the mixture, so it does not rank runs."""

    POSITION: ClassVar[int] = 60
    TITLE: ClassVar[str] = "Training loss"

    def render(self, comparison: Comparison) -> str:
        figures = "".join(_figure(comparison, axis, name) for axis, name in (("tokens", "tokens"), ("flops", "FLOPs")))
        if not figures:
            return ""
        words = (
            "Mean cross-entropy of the batches as they came, in nats per token, as a moving average whose weights "
            f"halve over {HALF_LIFE_SHARE:.0%} of the run. Runs with different mixtures see different text, so this "
            "shows whether training went well, not which model is better."
        )
        return f'<p>{words}</p>{legend(comparison)}<div class="charts">{figures}</div>'


def _figure(comparison: Comparison, axis: str, name: str) -> str:
    lines = []
    tops = []
    for index, row, run in comparison.runs:
        if axis == "flops" and left_out(comparison, row):
            continue
        good = np.isfinite(run.training["loss"])
        tokens, loss = run.training["tokens"][good], run.training["loss"][good]
        loss = smooth(tokens, loss, HALF_LIFE_SHARE * row.tokens)
        x = tokens + comparison.start(row) if axis == "tokens" else run.training["flops"][good]
        lines.append(Line(row.label, x, loss, index))
        tops += [float(loss[tokens >= (0 if row.continued else _EARLY * row.tokens)].max(initial=0.0))]
    frame = Frame(
        key=f"training/{axis}",
        title=f"Training loss against {name}",
        x_label=tokens_label(comparison) if axis == "tokens" else "FLOPs of the run",
        y_label="nats/token",
        x_unit=axis,
        log_x=not (axis == "tokens" and comparison.along_lineage) and wide(lines),
        top=max(tops) if tops and max(tops) > 0 else None,
        marks=update_marks(comparison) if axis == "tokens" else (),
    )
    svg = line_chart(lines, frame)
    caption = f"Training loss <small>nats/token against {name}</small>"
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>" if svg else ""
