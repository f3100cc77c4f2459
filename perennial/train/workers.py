"""What the processes of one start tell the process that started them, through small files in a folder.

`launch` makes the folder and names it in an environment variable; every process writes there its id and how it ended.
So that the person sees one error once, and so that only what a new start can mend is started again: bad input cannot.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from perennial.core.errors import UserError

FOLDER_VARIABLE = "PERENNIAL_WORKERS"
"""Environment variable with the folder; it is set only in the processes that `launch` starts."""

_STOP = "stop"
_LOST_A_PEER = re.compile(
    r"[Cc]onnection (closed|reset|refused|was)|Broken pipe|[Pp]eer|gloo|Gloo|NCCL|DistBackendError"
)
"""Last line of an error that another process's end caused; it is told only when there is no better one."""

_OUT_OF_MEMORY = " (the system does so when memory runs out)"


@dataclass(frozen=True)
class Outcome:
    """How one process ended: its exit code, what it printed, and the message of its error."""

    rank: int
    attempt: int
    """0 for the first start, 1 after the first restart ..."""
    code: int
    """0 complete, 1 training could not go on, 2 bad input, 130 stopped and saved."""
    is_final: bool
    """False for a crash, after which all are started again; starting again would not change the others."""
    message: str = ""
    output: str = ""
    """What it printed to standard output."""


def folder_of_this_start() -> Path | None:
    """The folder of the start that this process belongs to, or None when `launch` did not start it."""
    found = os.environ.get(FOLDER_VARIABLE)
    return Path(found) if found else None


def under_torchrun() -> bool:
    """Whether torchrun (or `launch`, or another program that sets its variables) started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or world_size() > 1


def rank() -> int:
    """The rank of this process as torchrun gives it, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes torchrun has started, on all machines; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The number of this process on its machine, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def attempt() -> int:
    """How many times torchrun has started all processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def check_rows(processes: int, *, sequences: int, tensor: int) -> None:
    """Raises UserError when a batch of `sequences` rows has none for some processes, `tensor` of which share theirs."""
    if processes % tensor:
        raise UserError(f"--processes {processes}: must be a multiple of parallel.tensor, which is {tensor}")
    if processes // tensor > sequences:
        raise UserError(
            f"--processes {processes}: a batch has {sequences} rows (batch.sequences, or the stage's), and each "
            f"{'process' if tensor == 1 else f'group of {tensor} processes'} needs one; use fewer processes"
        )


def end_with_parent() -> None:
    """Asks Linux to send SIGTERM when the process that started this one is gone, so that nothing goes on unseen."""
    if sys.platform.startswith("linux"):
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def announce(folder: Path) -> None:
    """Writes the id of this process, to which a request to stop will be sent."""
    _write(folder / f"{rank()}.pid", str(os.getpid()))


def report(folder: Path, outcome: Outcome) -> None:
    """Writes how this process ended."""
    _write(folder / f"{outcome.attempt}.{outcome.rank}.json", json.dumps(asdict(outcome)))


def outcomes(folder: Path, of_attempt: int | None = None) -> list[Outcome]:
    """What was reported, by rank; of one attempt, or of all (the last attempt first)."""
    found = [Outcome(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")]
    chosen = [o for o in found if of_attempt is None or o.attempt == of_attempt]
    return sorted(chosen, key=lambda o: (-o.attempt, o.rank))


def final(folder: Path) -> Outcome | None:
    """The outcome that decides the start: an error before a stop before a success, of the lowest rank; or None."""
    order = {2: 0, 1: 1, 130: 2, 0: 3}
    found = [o for o in outcomes(folder) if o.is_final and (o.rank == 0 or o.code in (1, 2))]
    return min(found, key=lambda o: (order.get(o.code, 1), o.rank), default=None)


def crash(folder: Path, of_attempt: int, ended: Mapping[int, int] | None = None) -> str:
    """Why an attempt crashed, in words: an error that no other error caused, else what killed a process.

    ended: exit code by rank as far as torchrun told them, negative for a signal.
    """
    found, codes = outcomes(folder, of_attempt), dict(ended or {})
    errors = [o for o in found if o.message]
    causes = [o for o in errors if not _LOST_A_PEER.search(o.message.strip().rpartition("\n")[2])]
    if not causes:  # torchrun itself kills those that do not end when another has failed
        for number in sorted(number for number, code in codes.items() if code < 0):
            name = signal.Signals(-codes[number]).name
            return f"process {number} was killed by {name}" + (_OUT_OF_MEMORY if name == "SIGKILL" else "")
        for number in sorted((_announced(folder).keys() | codes.keys()) - {o.rank for o in found}):
            if number in codes:
                return f"process {number} ended with exit code {codes[number]}, and said why above if at all"
            return f"process {number} was killed, or ended without a word"
    for outcome in [*causes, *errors]:
        return f"process {outcome.rank} failed:\n{outcome.message.rstrip()}"
    return "a process ended without a word"


def request_stop(folder: Path, number: signal.Signals) -> None:
    """Passes a request to save and stop on to every process, and to those that are only starting."""
    (folder / _STOP).touch()
    for pid in _announced(folder).values():
        try:
            if os.getpgid(pid) == pid:  # each leads a group of its own; another process has taken the id otherwise
                os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def is_stopping(folder: Path) -> bool:
    """Whether `request_stop` was called."""
    return (folder / _STOP).exists()


def trace_of(error: BaseException) -> str:
    """The trace-back of an error as text."""
    return "".join(traceback.format_exception(error))


def _announced(folder: Path) -> dict[int, int]:
    """Process id of every rank."""
    found = {}
    for path in folder.glob("*.pid"):
        found[int(path.stem)] = int(path.read_text(encoding="utf-8"))
    return found


def _write(path: Path, text: str) -> None:
    """Whole or not at all; the folder is a temporary one, so nothing is made durable."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
