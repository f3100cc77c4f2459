"""The section on tasks: scores side by side, and what is said of the parent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from perennial.core.records import Recorder
from perennial.report.comparison import compare
from perennial.report.page import render

from .synthetic import BATCH, Written, demo
from .test_page import checked, words

TOKENS = 40 * BATCH


def result(value: float, stderr: float | None = 0.03, **changes: Any) -> dict[str, Any]:
    metrics = {"acc": {"value": value, "stderr": stderr, "higher_is_better": True}}
    return {"metrics": metrics, "examples": 200, "of": 200, "examples_id": "a", "harness": "lm-eval 1.0", **changes}


def against(checkpoint: str, difference: float, low: float, high: float) -> dict[str, Any]:
    facts = {"value": 0.4, "stderr": 0.03, "difference": difference, "low": low, "high": high, "verdict": "better"}
    return {"checkpoint": checkpoint, "metrics": {"acc": facts}}


def record(run: Written, tokens: int = TOKENS, **tasks: dict[str, Any]) -> None:
    recorder = Recorder(run.folder / "events.jsonl")
    recorder.write("tasks", tokens=tokens, checkpoint=run.checkpoint, tasks=tasks)
    recorder.close()


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Written]:
    return demo(tmp_path, TOKENS)


def section(runs: dict[str, Written], *names: str) -> str:
    """The section's HTML, from a page that is well formed."""
    page = render(compare([runs[name].folder for name in names]))
    checked(page)
    found = re.search(r'<section id="tasks".*?</section>', page, re.DOTALL)
    return found[0] if found else ""


def lines(html: str) -> list[str]:
    return [words(row) for row in re.findall(r"<tr>.*?</tr>", html.partition("<tbody>")[2])]


def test_what_was_compared_example_by_example(runs: dict[str, Written]) -> None:
    record(runs["c"], capitals=result(0.46, against=against(runs["base"].checkpoint, 0.06, 0.02, 0.1)))
    html = section(runs, "base", "c")
    assert lines(html) == [
        "capitalsacc \u2191200" + "0.400 \u00b1 0.030" + "0.460 \u00b1 0.030" + "+0.060 (+0.020 to +0.100)"
    ]
    assert '<span class="good">+0.060</span>' in html
    assert "lm-eval 1.0" in html
    assert "one by one" not in html


def test_what_was_measured_one_by_one(runs: dict[str, Written]) -> None:
    record(runs["base"], capitals=result(0.4), rolling=result(0.4, examples_id="b"))
    record(runs["c"], capitals=result(0.45), rolling=result(0.6), own=result(0.5, examples=50))
    html = section(runs, "base", "c")
    half = 1.96 * 0.03 * 2**0.5
    capitals, rolling, own = lines(html)
    assert f"+0.050 (\u2212{half - 0.05:.3f} to +{0.05 + half:.3f})" in capitals
    assert "Parent" not in html  # it has a column of its own
    assert "one by one" in html
    assert rolling.count("0.600") == 1
    assert "+0.200" not in rolling
    assert "other examples or with other prompts" in html
    assert "50 of 200" in own
    assert 'class="good"' not in html


def test_a_comparison_with_another_than_the_parent_is_no_change(runs: dict[str, Written]) -> None:
    record(runs["c"], capitals=result(0.46, against=against("somebody else", 0.06, 0.02, 0.1)))
    html = section(runs, "base", "c")
    assert "0.460" in html
    assert "+0.060" not in html
    assert "Change" not in html


def test_the_newest_measurement_counts(runs: dict[str, Written]) -> None:
    record(runs["c"], capitals=result(0.1, None))
    record(runs["c"], capitals=result(0.2, None))
    record(runs["c"], tokens=BATCH, capitals=result(0.3, None))
    record(runs["b"], tokens=BATCH, capitals=result(5432.1, None), **{"<b>": result(0.3)})
    html = section(runs, "base", "b", "c")
    assert "0.200" in html
    assert "0.100" not in html
    assert "5,432" in html
    assert "before the end of the run" in html
    assert "&lt;b&gt;" in html


def test_without_results_there_is_no_section(runs: dict[str, Written]) -> None:
    assert section(runs, "base", "c") == ""
