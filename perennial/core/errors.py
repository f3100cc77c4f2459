"""Errors that are the user's to mend: one clear message, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message names the setting or file, the value, what is allowed and the nearest spelling."""


class Unreadable(UserError):
    """A file cannot be read now, or is shorter than it was; it may come back by itself."""


class TrainingStopped(RuntimeError):
    """Training could not go on (a non-finite loss, say); nothing of the failed step was applied. Exit code 1."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """' Did you mean ...?' for the allowed spelling closest to `word`, or '' when none is close."""
    close = difflib.get_close_matches(str(word), [str(a) for a in allowed], n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
