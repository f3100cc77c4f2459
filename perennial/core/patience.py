"""Waiting out what passes by itself: a file server that restarts, a disk that is full for a while.

An action that failed is tried again after pauses that double, up to a stated time, with a word about each try. Only
errors that may pass are waited out; every other one is raised at once.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from perennial.core.amounts import human_seconds, parse
from perennial.core.errors import Unreadable, UserError

R = TypeVar("R")

FIRST_PAUSE = 1.0
"""Seconds before the second try; each pause is twice the one before."""
LONGEST_PAUSE = 30.0
PASSING = (errno.EIO, errno.ENOENT, errno.ESTALE, errno.ETIMEDOUT, errno.ENXIO, errno.EAGAIN, errno.EHOSTDOWN)
"""Errors of reading that a file server or a disk under repair gives for a while."""
_VARIABLE = "PERENNIAL_PATIENCE"


def patience_limit(variables: Mapping[str, str] = os.environ) -> float:
    """Seconds that a run waits for what may come back: PERENNIAL_PATIENCE ('5 min'), by default five minutes."""
    text = variables.get(_VARIABLE, "5 min")
    try:
        return parse(text, ("seconds",)).value
    except ValueError as error:
        raise UserError(f"{_VARIABLE}={text}: {error}; '0 s': wait for nothing") from None


def may_come_back(error: Exception) -> bool:
    """Whether what cannot be read may be readable again by itself; content that was changed does not change back."""
    return isinstance(error, Unreadable) or (isinstance(error, OSError) and error.errno in PASSING)


def say_nothing(text: str) -> None:
    """For who wants no word."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for what may pass by itself, and whom to tell.

    Only the pauses count, not how long the tries took: processes that fail together then also give up together.
    """

    seconds: float
    """Pauses from the first failure to giving up; 0: the first failure is final."""
    tell: Callable[[str], None] = say_nothing
    """Called with a line for people before every pause, and when the wait is over."""
    sleep: Callable[[float], None] = time.sleep

    def attempt(self, action: Callable[[], R], *, passes: Callable[[Exception], bool]) -> R:
        """The action's result; it is tried again while `passes(error)` says that the error may go away.

        Raises what the last try raised, a failure to read as Unreadable, with the time that was waited.
        """
        waited, pause = 0.0, FIRST_PAUSE
        while True:
            try:
                result = action()
            except Exception as error:
                if not passes(error):
                    raise
                left = self.seconds - waited
                if left <= 0:
                    raise _given_up(error, waited) from error
                what = _in_words(error).splitlines()[0].rstrip(".")
                wait = min(pause, left)
                self.tell(f"{what}; next try in {human_seconds(max(1, wait))}, giving up in {human_seconds(left)}")
                self.sleep(wait)
                waited, pause = waited + wait, min(2 * pause, LONGEST_PAUSE)
            else:
                if waited:
                    self.tell(f"it works again after {human_seconds(waited)}")
                return result


def _given_up(error: Exception, seconds: float) -> Exception:
    text = _in_words(error) + (f"\nIt was tried again for {human_seconds(seconds)}." if seconds >= 1 else "")
    if isinstance(error, UserError):
        return type(error)(text)
    return Unreadable(text) if isinstance(error, OSError) else error


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: cannot be read: {error.strerror}"
    return str(error)
