"""Faults that a run lived through, and the time that its processes waited for each other, on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

from perennial.report.comparison import compare
from perennial.report.page import render

from .synthetic import BATCH, Draw, Plan, write_run


def page_of(folder: Path, tmp_path: Path, *events: dict[str, object], **train: float) -> str:
    """The text of the page of a run with further events at its middle, and further values in its `train` events."""
    path = folder / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [{**line, **train} if line["event"] == "train" else line for line in lines]
    middle = next(i for i, line in enumerate(lines) if line.get("tokens", 0) > 20 * BATCH)
    path.write_text("".join(json.dumps(x) + "\n" for x in [*lines[:middle], *events, *lines[middle:]]), "utf-8")
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", render(compare([folder])).replace("&nbsp;", " ")))


def written(tmp_path: Path) -> Path:
    plan = Plan("base", {"old": (8.0, 4.5)}, [Draw("old", 1)], 40 * BATCH, (0, 1, 0))
    return write_run(tmp_path, plan).folder


def test_what_the_processes_waited_for_each_other_is_shown(tmp_path: Path) -> None:
    page = page_of(written(tmp_path), tmp_path, straggler_seconds=0.5, straggler=3)
    assert "Waiting for the slowest" in page
    assert "20 s (rank 3)" in page


def test_a_run_of_one_process_waits_for_nobody(tmp_path: Path) -> None:
    assert "Waiting for the slowest" not in page_of(written(tmp_path), tmp_path)


def test_faults_are_listed_with_their_reasons(tmp_path: Path) -> None:
    at = {"tokens": 20 * BATCH, "time": 1.0}
    page = page_of(
        written(tmp_path),
        tmp_path,
        {"event": "save_failed", "reason": "the disk is full", **at},
        {"event": "set_aside", "path": "5.damaged", "reason": "model.safetensors has 3 bytes", **at},
        {"event": "hang", "behind": [{"rank": 1, "phase": "data", "seconds": 612.4}], **at},
        {"event": "hang", "behind": [], **at},
    )
    assert "save failed the disk is full" in page
    assert "set aside model.safetensors has 3 bytes" in page
    assert "the others waited for rank 1 in phase &#x27;data&#x27; for 612 s" in page.replace("'", "&#x27;")
    assert "all processes stood still in the same place" in page
