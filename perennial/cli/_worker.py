"""One of the processes that `--processes N` starts: a command line that reports its end instead of printing it.

What it says on the way goes to standard error as always. What it prints, its error and its exit code go to the process
that started it (see `perennial.train.workers`), which tells them once.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perennial.cli.main import execute, foreseen
from perennial.train import workers
from perennial.train.workers import Outcome


def main() -> int:
    """Runs the command line of this process; returns 0 unless the other processes have to be ended as well."""
    folder = workers.folder_of_this_start()
    assert folder is not None, "started by hand"
    if workers.final(folder) or workers.is_stopping(folder):  # starting again does not change this
        return 0
    workers.end_with_parent()
    workers.announce(folder)
    if workers.rank() == 0 and workers.attempt() > 0:
        _tell_restart(folder)
    printed = io.StringIO()
    code, is_final, message = 0, True, ""
    with _interrupted_by_signals():
        try:
            with contextlib.redirect_stdout(printed):
                code = execute(sys.argv[1:])
        except BaseException as error:
            code, is_final, message = _explained(error, folder)
    sys.stderr.flush()
    outcome = Outcome(workers.rank(), workers.attempt(), code, is_final, message, printed.getvalue())
    workers.report(folder, outcome)
    return code if message else 0


def _explained(error: BaseException, folder: Path) -> tuple[int, bool, str]:
    """(exit code, whether a new start would end the same way, message) of what ended the command."""
    if isinstance(error, KeyboardInterrupt) and not workers.is_stopping(folder):
        return 1, False, "stopped, because another process failed: connection closed"
    found = foreseen(error)
    return (1, False, workers.trace_of(error)) if found is None else (found[0], True, found[1].removeprefix("error: "))


def _tell_restart(folder: Path) -> None:
    before = workers.attempt() - 1
    at_most = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "?")
    why = workers.crash(folder, before).splitlines()
    text = why[0] if len(why) == 1 else f"{why[0]} {why[-1].strip()}"
    again = "all go on from the newest checkpoint"
    print(f"{text}; {again} (restart {before + 1} of at most {at_most})", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Lets SIGTERM end the command in order until training begins, which handles it by itself."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
