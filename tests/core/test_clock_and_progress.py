"""Durations by section and the progress line, with a clock of our own: nothing waits."""

from __future__ import annotations

import io

import pytest

from perennial.core.clock import Clock
from perennial.core.progress import Progress


class _Time:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_sections_add_up() -> None:
    time = _Time()
    clock = Clock(now=time)
    for step in (1.0, 2.5):
        with clock.section("train") as spent:
            time.seconds += step
        assert spent.seconds == step
    with clock.section("save"):
        time.seconds += 4
    assert clock.seconds() == {"train": 3.5, "save": 4.0}


def test_a_section_that_raises_is_counted() -> None:
    time = _Time()
    clock = Clock(now=time)

    def fail() -> None:
        with clock.section("data"):
            time.seconds += 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert clock.seconds() == {"data": 2.0}


def test_a_log_gets_a_line_now_and_then() -> None:
    time, stream = _Time(), io.StringIO()
    with Progress("train", total=100, unit="tokens", stream=stream, now=time) as progress:
        for done in range(51):
            progress.update(done)
            time.seconds += 1
    lines = stream.getvalue().splitlines()
    assert lines == [f"train {d}% of 100 tokens, 1 tokens/s, {_left(100 - d)} left" for d in (10, 20, 30, 40, 50)]


def _left(seconds: int) -> str:
    return f"{seconds} s" if seconds < 60 else f"1 min {seconds - 60:02d} s"


def test_a_terminal_is_redrawn_and_left_standing() -> None:
    time, stream = _Time(), _Terminal()
    progress = Progress("train", total=100, unit="tokens", stream=stream, now=time)
    progress.update(10)
    progress.update(11)  # at the same moment: not drawn
    time.seconds += 1
    progress.update(20, "loss 2.5")
    progress.note("saved")
    progress.update(21)
    progress.close()
    text = stream.getvalue()
    assert text.count("\r\x1b[2Ktrain") == 3
    assert "train 20% of 100 tokens, loss 2.5, 8 s left\r\x1b[2Ksaved\n" in text
    assert "11%" not in text
    assert text.endswith("train 21% of 100 tokens, 11 tokens/s, 7 s left\n")


def test_the_rate_counts_from_where_the_job_resumed() -> None:
    time, stream = _Time(), io.StringIO()
    progress = Progress("train", total=1000, stream=stream, now=time)
    progress.update(900)
    time.seconds += 10
    progress.update(950)
    assert stream.getvalue() == "train 95% of 1K, 5/s, 10 s left\n"


def test_the_end_is_shown_once() -> None:
    time, stream = _Time(), io.StringIO()
    with Progress("prepare", unit="bytes", stream=stream, now=time) as progress:
        progress(0, 2048)
        time.seconds += 10
        progress(2048, 2048, "3 documents")
    assert stream.getvalue() == "prepare 100% of 2.05K bytes, 3 documents\n"


def test_a_note_takes_the_place_of_the_last_line() -> None:
    stream = io.StringIO()
    progress = Progress("train", total=10, stream=stream, now=_Time())
    progress.update(10)
    progress.note("done: 10 tokens")
    progress.close()
    assert stream.getvalue() == "done: 10 tokens\n"


def test_quiet_says_nothing() -> None:
    stream = io.StringIO()
    with Progress("train", total=10, quiet=True, stream=stream) as progress:
        progress.update(5)
        progress.note("something")
    assert stream.getvalue() == ""


def test_after_an_error_only_the_error_is_seen() -> None:
    stream = io.StringIO()

    def fail() -> None:
        with Progress("prepare", total=10, stream=stream, now=_Time()) as progress:
            progress.update(5)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert stream.getvalue() == ""
