"""Waiting out what passes by itself: pauses that double, a word each time, and an end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from perennial.core.errors import Unreadable, UserError
from perennial.core.patience import Patience, may_come_back, patience_limit


class Diary:
    """What was told and how long each pause was."""

    def __init__(self, seconds: float) -> None:
        self.words: list[str] = []
        self.pauses: list[float] = []
        self.patience = Patience(seconds, self.words.append, self.pauses.append)


def failing(times: int, error: Exception) -> Callable[[], str]:
    left = [error] * times

    def action() -> str:
        if left:
            raise left.pop()
        return "done"

    return action


def test_what_works_at_once_is_not_spoken_of() -> None:
    diary = Diary(60)
    assert diary.patience.attempt(failing(0, OSError(5, "")), passes=may_come_back) == "done"
    assert (diary.words, diary.pauses) == ([], [])


def test_pauses_double_up_to_a_limit_and_each_is_told() -> None:
    diary = Diary(300)
    assert diary.patience.attempt(failing(8, OSError(5, "Input/output error", "a/b")), passes=may_come_back) == "done"
    assert diary.pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    assert diary.words[0] == "a/b: cannot be read: Input/output error; next try in 1 s, giving up in 5 min 00 s"
    assert diary.words[-1] == "it works again after 2 min 01 s"


@pytest.mark.parametrize("error", [OSError(116, "Stale file handle", "shard"), Unreadable("shard: too short")])
def test_it_gives_up_with_a_clear_error(error: Exception) -> None:
    diary = Diary(10)
    with pytest.raises(Unreadable, match=r"shard: (.|\n)*It was tried again for 10 s"):
        diary.patience.attempt(failing(99, error), passes=may_come_back)
    assert diary.pauses == [1, 2, 4, 3]


@pytest.mark.parametrize("error", [OSError(13, "Permission denied", "x"), UserError("changed"), KeyError("bug")])
def test_what_does_not_pass_is_raised_at_once(error: Any) -> None:
    diary = Diary(60)
    with pytest.raises(type(error)):
        diary.patience.attempt(failing(99, error), passes=may_come_back)
    assert diary.pauses == []


def test_without_patience_the_first_failure_is_final() -> None:
    with pytest.raises(Unreadable, match="^x: cannot be read: gone$"):
        Patience(0).attempt(failing(1, FileNotFoundError(2, "gone", "x")), passes=may_come_back)


def test_the_limit() -> None:
    assert patience_limit({}) == 300
    assert patience_limit({"PERENNIAL_PATIENCE": "2 min"}) == 120
    with pytest.raises(UserError, match="PERENNIAL_PATIENCE=soon"):
        patience_limit({"PERENNIAL_PATIENCE": "soon"})
