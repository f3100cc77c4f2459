"""Starts a command as N processes of this machine under torchrun, and tells how they ended as if they were one.

torchrun (`torch.distributed.launcher`) starts the processes and, after a crash of one of them, starts all again: a run
then goes on from its newest checkpoint. It knows only success and failure, so how a process ended comes to here by way
of `workers`: an error is raised once, with its own type; bad input is not started again; a request to stop is passed on
and waited for, however long saving takes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from perennial.core.amounts import human_bytes
from perennial.core.environment import memory_bytes, usable_cores, with_variables
from perennial.core.errors import TrainingStopped, UserError
from perennial.model.memory import CPU_PROCESS_BYTES
from perennial.train import continuing, workers
from perennial.train.recipe import Recipe, fewest_rows
from perennial.train.run import changed_parallel, make_run, read_resolved, undone_on_error

WORKER = "perennial.cli._worker"
"""Module that each process runs, with the command line as its arguments."""

DEFAULT_RESTARTS = 3
"""torchrun's own default in its Python interface: enough for a machine that hiccups, few enough to see a real bug."""

_STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")

_Result = TypeVar("_Result")


def check_launch(processes: int, max_restarts: int | None = None) -> None:
    """Raises UserError for a number of processes or restarts that cannot be started here."""
    if processes < 1:
        raise UserError(f"--processes {processes}: must be 1 or more")
    if max_restarts is not None and max_restarts < 0:
        raise UserError(f"--max-restarts {max_restarts}: must be 0 or more")
    if workers.under_torchrun():
        raise UserError(
            f"--processes {processes}: this is already one of {workers.world_size()} processes that torchrun started; "
            "leave it out"
        )
    import torch

    devices = torch.cuda.device_count()
    if 0 < devices < processes:
        raise UserError(f"--processes {processes}: each needs a GPU of its own, and this machine has {devices}")
    total = memory_bytes()["total"]
    if not devices and total is not None and processes * CPU_PROCESS_BYTES > total:
        raise UserError(
            f"--processes {processes}: at most {total // CPU_PROCESS_BYTES}; each takes "
            f"{human_bytes(CPU_PROCESS_BYTES)} before it has a model, and this machine has {human_bytes(total)} of "
            f"memory and {usable_cores()} cores"
        )


def run_processes(arguments: Sequence[str], *, processes: int, max_restarts: int = DEFAULT_RESTARTS) -> tuple[int, str]:
    """Runs `perennial ARGUMENTS` as that many processes; returns the exit code of rank 0 and what it printed.

    Ctrl-C and SIGTERM reach every process as a request to save and stop. Raises what the command raised: UserError
    for bad input, TrainingStopped when training could not go on or crashed more than `max_restarts` times.
    """
    check_launch(processes, max_restarts)
    with tempfile.TemporaryDirectory(prefix="perennial-") as name:
        folder = Path(name)
        variables = {**_variables(processes), workers.FOLDER_VARIABLE: name}
        with with_variables(variables), _passing_signals_on(folder), _without_logging():
            ended = _run_agent(list(arguments), folder, processes, max_restarts)
        return _told(folder, ended, max_restarts)


def start(
    recipe: Recipe, folder: Path, *, base: Path, processes: int, max_restarts: int = DEFAULT_RESTARTS, as_json: bool
) -> tuple[int, str]:
    """Makes the run folder, or finds it made, and trains in it; returns as `train` does."""
    workers.check_rows(processes, sequences=fewest_rows(recipe), tensor=recipe.parallel.tensor)
    with undone_on_error(folder):
        apart(make_run, recipe, folder, base=base, processes=processes)
        return train(folder, processes=processes, max_restarts=max_restarts, as_json=as_json)


def train(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    processes: int,
    max_restarts: int = DEFAULT_RESTARTS,
    as_json: bool,
) -> tuple[int, str]:
    """Starts the run in `folder`, or goes on where it stopped; the exit code, and the result as JSON if asked for.

    overrides: 'parallel.key=value' texts. Raises as `run_processes` does.
    """
    resolved = read_resolved(folder)
    tensor = changed_parallel(resolved, overrides).tensor
    workers.check_rows(processes, sequences=resolved.fewest_rows, tensor=tensor)
    command = ["train", str(folder), *overrides, *(["--json"] if as_json else [])]
    return run_processes(command, processes=processes, max_restarts=max_restarts)


def continue_run(
    checkpoint: Path,
    data: Mapping[str, Path],
    *,
    out: Path,
    processes: int,
    max_restarts: int = DEFAULT_RESTARTS,
    dry_run: bool = False,
    quiet: bool = False,
    **choices: Any,
) -> dict[str, Any]:
    """`continuing.continue_run`, trained by N processes: text is prepared and the run made once, before they start."""
    choices |= {"out": out, "quiet": quiet, "processes": processes}
    if dry_run:
        return continuing.continue_run(checkpoint, data, dry_run=True, **choices)
    with undone_on_error(out):
        made = apart(continuing.continue_run, checkpoint, data, **choices)
        code, output = train(out, processes=processes, max_restarts=max_restarts, as_json=quiet)
        return {**made, "result": json.loads(output) if output else {"complete": code == 0}}


def apart(function: Callable[..., _Result], *arguments: Any, **settings: Any) -> _Result:
    """The result of calling `function` in a process of its own, whose memory and device are free again after it."""
    context = multiprocessing.get_context("spawn")
    end = workers.end_with_parent
    with ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=end) as pool:
        return pool.submit(function, *arguments, **settings).result()


def _run_agent(arguments: list[str], folder: Path, processes: int, max_restarts: int) -> dict[int, int]:
    """Starts the processes and waits for them; exit codes by rank of those that failed in the last attempt."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=max_restarts,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "torchrun")),
        signals_to_handle="SIGQUIT",  # the others ask to save and stop: see _passing_signals_on
    )
    try:
        elastic_launch(config, sys.executable)("-m", WORKER, *arguments)
    except ChildFailedError as error:
        failed = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return {rank: code for rank, code in failed.items() if code != -signal.SIGTERM}  # those torchrun has ended
    return {}


def _told(folder: Path, ended: dict[int, int], max_restarts: int) -> tuple[int, str]:
    """The end of all processes as that of one. Raises UserError and TrainingStopped."""
    outcome = workers.final(folder)
    if outcome is None and workers.is_stopping(folder):
        return 130, ""  # stopped before anything began
    if outcome is None:
        last = max((o.attempt for o in workers.outcomes(folder)), default=0)
        again = f"\n{max_restarts} restarts did not help." if max_restarts else ""
        raise TrainingStopped(f"{workers.crash(folder, last, ended)}{again}")
    if outcome.code == 2 and outcome.message:
        raise UserError(outcome.message)
    if outcome.code == 1 and outcome.message:
        raise TrainingStopped(outcome.message)
    if outcome.message:
        raise KeyboardInterrupt(outcome.message)
    return outcome.code, outcome.output


def _variables(processes: int) -> dict[str, str]:
    """Environment variables for processes that share this machine; what the user has set stays."""
    wanted = {"OMP_NUM_THREADS": str(max(1, usable_cores() // processes)), "OMP_WAIT_POLICY": "PASSIVE"}
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:  # found without the network's name service, and not open to other machines
        wanted["GLOO_SOCKET_IFNAME"] = loopback[0]
    return {name: value for name, value in wanted.items() if name not in os.environ}


@contextlib.contextmanager
def _passing_signals_on(folder: Path) -> Iterator[None]:
    """Passes Ctrl-C, SIGTERM and the end of the terminal on as a request to save and stop; a second Ctrl-C as such."""
    before = {}

    def pass_on(number: int, frame: Any) -> None:
        workers.request_stop(folder, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    for name in _STOP_SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            before[number] = signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _without_logging() -> Iterator[None]:
    """Keeps torchrun's own account of failures off the screen: ours says it once, and in the command's words."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
