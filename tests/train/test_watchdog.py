"""A process that hangs is named, with what it was doing; one that is only slow is waited for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from perennial.core.errors import UserError
from perennial.train.watchdog import EXIT_CODE, Hang, Note, Watchdog, time_limit


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Box:
    """A store in memory."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


def family(size: int, limit: float = 100.0) -> tuple[Clock, list[Watchdog]]:
    clock, box = Clock(), Box()
    notes = [Note(rank, f"host{rank}", 40 + rank, "cpu") for rank in range(size)]
    return clock, [Watchdog(note, size, box, limit=limit, now=clock) for note in notes]


def looks(clock: Clock, watching: list[Watchdog], seconds: float, step: float = 5.0) -> list[Hang | None]:
    """Lets time pass; every one looks at each step. What they saw last."""
    seen: list[Hang | None] = []
    for _ in range(round(seconds / step)):
        clock.seconds += step
        seen = [dog.look() for dog in watching]
    return seen


def test_nothing_is_said_while_all_go_on() -> None:
    clock, dogs = family(3)
    for update in range(1, 30):
        for dog in dogs:
            for phase in ("data", "update", "exchange"):
                dog.enter(phase, update)
        assert looks(clock, dogs, 30) == [None] * 3


def test_a_process_that_stands_still_is_named_with_its_stack() -> None:
    clock, dogs = family(3)
    dogs[1].enter("data", 7)
    for dog in (dogs[0], dogs[2]):
        dog.enter("exchange", 7)
    assert looks(clock, dogs, 100) == [None] * 3
    for hang in looks(clock, dogs, 10):
        assert hang is not None
        assert hang.ranks == [1]
        assert hang.speaker() == 0
        text = str(hang)
        assert "rank 1 (host host1, process 41, cpu) of 3 is behind: update 7, phase 'data', for 1 min" in text
        assert "rank 1 stands at " in text
        assert "waiting for it: ranks 0, 2, update 7, phase 'exchange'" in text


def test_a_process_that_gives_no_sign_of_life_is_named_wherever_it_was() -> None:
    clock, dogs = family(2)
    for dog in dogs:
        dog.enter("update", 3)
        dog.look()
    alive = dogs[1:]  # rank 0 was stopped
    assert looks(clock, alive, 100) == [None]
    (hang,) = looks(clock, alive, 5)
    assert hang is not None
    assert hang.ranks == [0]
    assert hang.speaker() == 1
    assert "update 3, phase 'update'" in str(hang)
    assert "no sign of life for" in str(hang)


def test_a_process_that_never_said_anything_is_named() -> None:
    clock, dogs = family(2)
    dogs[0].enter("data", 1)
    (hang,) = looks(clock, dogs[:1], 120)
    assert hang is not None
    assert hang.ranks == [1]


def test_a_slow_process_is_waited_for() -> None:
    clock, dogs = family(2)
    dogs[0].enter("exchange", 4)
    for phase in ("data", "update"):  # 180 seconds for one update, but never more than 90 in one phase
        dogs[1].enter(phase, 4)
        assert looks(clock, dogs, 90) == [None, None]
    dogs[1].enter("exchange", 4)
    dogs[0].enter("data", 5)
    assert looks(clock, dogs, 5) == [None, None]


def test_when_all_wait_in_the_same_place_all_are_shown() -> None:
    clock, dogs = family(2)
    for dog in dogs:
        dog.enter("exchange", 9)
    seen = looks(clock, dogs, 105)
    assert all(hang is not None and hang.ranks == [] for hang in seen)
    assert "all 2 processes are in the same place" in str(seen[0])
    assert "rank 1 (host host1" in str(seen[0])


def test_long_phases_have_more_time() -> None:
    clock, dogs = family(2)
    dogs[0].enter("save", 9)
    dogs[1].enter("evaluate", 9)
    assert looks(clock, dogs, 295) == [None, None]
    (hang, _) = looks(clock, dogs, 15)
    assert hang is not None
    assert hang.ranks == [1]


def test_evaluating_on_is_progress() -> None:
    clock, dogs = family(2)
    for _ in range(20):
        for dog in dogs:
            dog.enter("evaluate")
        assert looks(clock, dogs, 80) == [None, None]


def test_waiting_for_a_known_reason_is_no_hang() -> None:
    clock, dogs = family(2)
    dogs[0].enter("exchange", 3)
    dogs[1].enter("data", 3)
    for _ in range(10):
        assert looks(clock, dogs, 60) == [None, None]
        dogs[1].go_on()


def test_the_time_limit() -> None:
    assert time_limit({}) == 600
    assert time_limit({"PERENNIAL_TIMEOUT": "90 s"}) == 90
    assert time_limit({"PERENNIAL_TIMEOUT": "0 s"}) == 0
    with pytest.raises(UserError, match="PERENNIAL_TIMEOUT=5"):
        time_limit({"PERENNIAL_TIMEOUT": "5"})


def test_the_thread_tells_records_and_ends_the_process(capfd: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    hangs: list[Hang] = []
    done = threading.Event()

    def end(code: int) -> None:
        ended.append(code)
        done.set()

    dog = Watchdog(Note(0, "h", 1, "cpu"), 2, Box(), limit=0.4, on_hang=hangs.append, end=end)
    dog.start()
    dog.enter("exchange", 1)
    assert done.wait(20)
    dog.close()
    assert ended == [EXIT_CODE]
    assert hangs[0].ranks == [1]
    told = capfd.readouterr().err
    assert "hang: rank 1 (" in told
    assert "PERENNIAL_TIMEOUT" in told


def test_a_store_that_is_gone_does_not_keep_it_from_ending(capfd: pytest.CaptureFixture[str]) -> None:
    class Gone(Box):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("connection reset")

    done = threading.Event()
    dog = Watchdog(Note(0, "h", 1, "cpu"), 2, Gone(), limit=0.4, end=lambda code: done.set())
    dog.start()
    dog.enter("exchange", 1)
    assert done.wait(20)
    dog.close()
    assert "the processes' store does not answer (connection reset)" in capfd.readouterr().err


def test_a_process_alone_watches_nothing() -> None:
    dog = Watchdog(Note(0, "h", 1, "cpu"), 1, None, limit=0.1)
    before = threading.active_count()
    dog.start()
    dog.enter("update", 1)
    assert threading.active_count() == before
    dog.close()


WORKER = """
import os, sys, time, torch
import torch.distributed as dist
from perennial.train.watchdog import exchange_limit, watch
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", timeout=exchange_limit())
dog = watch(rank, 2, torch.device("cpu"))
dog.start()
print("ready", flush=True)
for update in range(1, 1000):
    dog.enter("data", update)
    time.sleep(0.05)
    if update == 20 and rank == int(sys.argv[1]):
        time.sleep(1000)
    dog.enter("exchange")
    dist.all_reduce(torch.ones(1))
"""


def processes(folder: Path, asleep: int) -> list[subprocess.Popen[str]]:
    """Two gloo processes; the one with the rank `asleep`, if any, falls asleep in its 20th update."""
    script = folder / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PERENNIAL_TIMEOUT": "2 s"}
    shared["PYTHONPATH"] = str(Path(__file__).parents[2])
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(asleep)],
            env={**os.environ, **shared, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def end(running: list[subprocess.Popen[Any]]) -> None:
    for process in running:
        process.kill()
        process.wait(10)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def test_a_stopped_process_is_named_by_the_other(tmp_path: Path) -> None:
    running = processes(tmp_path, asleep=-1)
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        running[1].send_signal(signal.SIGSTOP)
        _, told = running[0].communicate(timeout=25)
        assert running[0].returncode == EXIT_CODE, told
        assert f"hang: rank 1 (host {socket.gethostname()}, process {running[1].pid}, cpu) of 2 is behind" in told
        assert "no sign of life" in told
    finally:
        end(running)


def test_a_process_that_sleeps_is_named_and_shows_where(tmp_path: Path) -> None:
    running = processes(tmp_path, asleep=0)
    try:
        told = [process.communicate(timeout=30)[1] for process in running]
        assert EXIT_CODE in (running[0].returncode, running[1].returncode), told
        assert "rank 0 (" in told[1] + told[0]
        assert "worker.py:14 in <module>" in told[0] + told[1]  # time.sleep(1000)
        assert "phase 'data'" in told[1] + told[0]
    finally:
        end(running)
