"""events.jsonl: append-only, robust against a torn line, and each position once after a resume."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from perennial.core.records import Recorder, read


def _write(path: Path, *events: tuple[str, int]) -> None:
    recorder = Recorder(path, now=itertools.count().__next__)
    for event, tokens in events:
        recorder.write(event, tokens=tokens)
    recorder.close()


def test_events_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    recorder = Recorder(path, now=lambda: 12.34567)
    recorder.write("train", tokens=128, loss=2.5, sources={"new": {"rows": 3}})
    assert read(path) == [
        {"event": "train", "tokens": 128, "loss": 2.5, "sources": {"new": {"rows": 3}}, "time": 12.346}
    ]
    recorder.close()
    recorder.close()
    assert path.read_text().endswith("\n")


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    recorder = Recorder(None)
    recorder.write("train", tokens=1)
    recorder.close()
    assert list(tmp_path.iterdir()) == []


def test_values_that_json_has_no_word_for_are_written_as_texts(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    recorder = Recorder(path)
    recorder.write("spike", loss=float("nan"), parts=[float("inf"), {"x": -float("inf")}], ok=1.5)
    recorder.close()
    found = json.loads(path.read_text())
    assert (found["loss"], found["parts"], found["ok"]) == ("nan", ["inf", {"x": "-inf"}], 1.5)


def test_a_torn_line_is_passed_over_and_cut_off_on_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    _write(path, ("train", 1), ("train", 2))
    with open(path, "a") as file:
        file.write('{"event": "train", "tok')
    assert [e["tokens"] for e in read(path)] == [1, 2]
    _write(path, ("train", 3))
    assert [e["tokens"] for e in read(path)] == [1, 2, 3]


def test_a_file_that_is_only_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event"')
    assert read(path) == []
    _write(path, ("train", 3))
    assert [e["tokens"] for e in read(path)] == [3]


def test_missing_file_is_no_events(tmp_path: Path) -> None:
    assert read(tmp_path / "events.jsonl") == []


def test_a_resume_supersedes_what_comes_after_its_position(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    _write(path, ("run", 0), ("train", 10), ("checkpoint", 10), ("train", 20), ("train", 30))
    _write(path, ("resume", 10), ("train", 20), ("train", 30), ("train", 40))
    assert [e["tokens"] for e in read(path, "train")] == [10, 20, 30, 40]
    assert [e["event"] for e in read(path)].count("resume") == 1
    _write(path, ("rollback", 20), ("train", 30))
    assert [e["tokens"] for e in read(path, "train")] == [10, 20, 30]
    assert [e["event"] for e in read(path, "resume", "rollback")] == ["resume", "rollback"]


def test_a_restart_supersedes_everything(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    _write(path, ("run", 0), ("train", 10), ("restart", 0), ("run", 0), ("train", 10))
    assert [e["event"] for e in read(path)] == ["restart", "run", "train"]


def test_filter_by_type(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    _write(path, ("run", 0), ("train", 1), ("evaluation", 1))
    assert [e["event"] for e in read(path, "run", "evaluation")] == ["run", "evaluation"]
