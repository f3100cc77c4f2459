"""Killed processes: the run goes on from its last checkpoint by itself, and ends with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from perennial.core import records
from perennial.core.files import sha256
from perennial.core.lineage import newest_checkpoint
from tests.workspace import Workspace

RESTARTS = 3
SLOW = """
import os, sys, time
from perennial.cli.main import main
from perennial.data.loader import Loader
at = Loader.at
def slow(self, row, count, **which):
    if os.environ["RANK"] == "1" and row < 60 * count:
        time.sleep(0.03)
    return at(self, row, count, **which)
Loader.at = slow
sys.exit(main())
"""
"""The command line, with one process that waits for its data in the first 60 updates."""


class Launched:
    """`perennial train` as two processes of torchrun."""

    def __init__(self, recipe: Path, run: Path, *, program: Sequence[str] = ("-m", "perennial"), **variables: str):
        self.run, self._log = run, run.with_suffix(".log")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        launcher += ["--max-restarts", str(RESTARTS)]
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                [*launcher, *program, "train", str(recipe), "--out", str(run)],
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
                stdout=log,
                stderr=log,
            )

    def losses(self) -> list[tuple[int, float, float]]:
        """(tokens, loss, gradient norm) of every update."""
        events = records.read(self.run / "events.jsonl", "train")
        return [(e["tokens"], e["loss"], e["gradient_norm"]) for e in events]

    def pid(self, rank: int) -> int | None:
        """The process id of a rank that is alive."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in children:
            try:
                if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    return int(child)
            except OSError:
                continue  # it has just ended
        return None

    def wait_for(self, condition: Callable[[], Any], seconds: float = 120) -> None:
        """Returns when it holds."""
        until = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < until, self.log()
            time.sleep(0.01)

    def kill(self, rank: int, *, starts: int, updates: int) -> None:
        """kill -9 of a rank, once so many starts and updates have been made."""
        begun = ("run", "resume")
        self.wait_for(lambda: len(records.read(self.run / "events.jsonl", *begun)) == starts)
        self.wait_for(lambda: len(self.losses()) >= updates)
        pid = self.pid(rank)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def log(self) -> str:
        """What has been printed."""
        return self._log.read_text(errors="replace")

    def finish(self, seconds: float = 120) -> int:
        """Waits for the end; the exit code."""
        return self.process.wait(seconds)

    def end(self) -> None:
        """Kills what is left."""
        for pid in (self.pid(0), self.pid(1), self.process.pid) if self.process.poll() is None else ():
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture(scope="module")
def recipe(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough to be killed in: 400 updates, saved after every 40."""
    given = workspace.recipe(checkpoints={"every": "10240 tokens", "keep": 2}, evaluation={"every": None})
    given["stages"][0] |= {"budget": "102400 tokens", "max_epochs": 1000}
    path = tmp_path_factory.mktemp("elastic") / "recipe.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.timeout(400)
def test_killed_processes_go_on_by_themselves(recipe: Path, tmp_path: Path) -> None:
    straight, killed = Launched(recipe, tmp_path / "straight"), None
    try:
        assert straight.finish() == 0, straight.log()
        killed = Launched(recipe, tmp_path / "killed")
        killed.kill(1, starts=1, updates=100)
        killed.kill(0, starts=2, updates=250)
        assert killed.finish() == 0, killed.log()
    finally:
        for launched in (straight, killed):
            if launched is not None:
                launched.end()
    resumed = records.read(killed.run / "events.jsonl", "resume")
    assert len(resumed) == 2
    assert all(event["tokens"] % 10240 == 0 and event["tokens"] > 0 for event in resumed)
    assert len(straight.losses()) == 400
    assert killed.losses() == straight.losses()
    ends = [newest_checkpoint(launched.run) for launched in (straight, killed)]
    tensors = [{str(p.relative_to(end)): sha256(p) for p in end.rglob("*.safetensors")} for end in ends]
    assert tensors[0] == tensors[1]
    assert "model.safetensors" in tensors[0]


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.timeout(400)
@pytest.mark.slow
def test_a_slow_rank_is_named_and_so_is_a_hung_one_and_the_run_goes_on(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    here = {"PYTHONPATH": str(Path(__file__).parents[2]), "PERENNIAL_TIMEOUT": "3 s"}
    launched = Launched(recipe, tmp_path / "hung", program=[str(tmp_path / "slow.py")], **here)
    stopped = None
    try:
        launched.wait_for(lambda: len(launched.losses()) >= 80)
        stopped = launched.pid(1)
        assert stopped is not None
        os.kill(stopped, signal.SIGSTOP)
        launched.wait_for(lambda: "hang: rank 1 (host" in launched.log())
        os.kill(stopped, signal.SIGKILL)  # torchrun would do so, half a minute later
        assert launched.finish() == 0, launched.log()
    finally:
        launched.end()
    assert f"process {stopped}, cpu) of 2 is behind" in launched.log()
    timed = [e for e in records.read(launched.run / "events.jsonl", "train") if "straggler_seconds" in e][:6]
    assert [event["step"] for event in timed] == [10, 20, 30, 40, 50, 60]
    assert [(event["straggler"], event["straggler_cause"]) for event in timed] == [(1, "data")] * 6
    assert all(event["straggler_seconds"] > 0.2 for event in timed)
    assert [event["behind"][0]["rank"] for event in records.read(launched.run / "events.jsonl", "hang")] == [1]
    assert len(launched.losses()) == 400
