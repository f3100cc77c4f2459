"""events.jsonl: append-only, robust against a torn line, and each position once after a resume."""

from __future__ import annotations

import errno
import itertools
import json
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from perennial.core import records
from perennial.core.records import NoRoom, Recorder, read


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


class Full(FileIO):
    """A file on a disk that has room for `room` more bytes."""

    room = 1 << 20

    def write(self, data: Any) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = super().write(memoryview(data)[: self.room])
        Full.room -= written
        return written


def test_on_a_full_disk_events_wait_and_no_half_line_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "FileIO", Full)
    path = tmp_path / "events.jsonl"
    recorder = Recorder(path)
    recorder.write("train", tokens=1)
    monkeypatch.setattr(Full, "room", 10)  # a part of the next line
    recorder.write("train", tokens=2)
    recorder.write("train", tokens=3)
    assert [e["tokens"] for e in read(path)] == [1]
    assert path.read_bytes().endswith(b"\n")
    with pytest.raises(NoRoom, match="events.jsonl: the disk is full"):
        recorder.settle()
    monkeypatch.setattr(Full, "room", 1 << 20)
    recorder.write("train", tokens=4)
    recorder.settle()
    assert [e["tokens"] for e in read(path)] == [1, 2, 3, 4]
    recorder.close()


def test_closing_says_that_events_found_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "FileIO", Full)
    recorder = Recorder(tmp_path / "events.jsonl")
    monkeypatch.setattr(Full, "room", 0)
    recorder.write("done", tokens=1)
    with pytest.raises(NoRoom):
        recorder.close()
    recorder.close()


def test_what_tells_of_faults_outlives_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    _write(path, ("train", 1), ("train", 2), ("save_failed", 2), ("set_aside", 2), ("resume", 1), ("train", 2))
    assert [(e["event"], e["tokens"]) for e in read(path)] == [
        ("train", 1), ("save_failed", 2), ("set_aside", 2), ("resume", 1), ("train", 2)
    ]  # fmt: skip
