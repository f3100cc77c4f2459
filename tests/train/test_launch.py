"""Commands as many processes: one result, one error, one stop, and a new start after a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from perennial.core import records
from perennial.core.errors import TrainingStopped, UserError
from perennial.core.lineage import checkpoints_of
from perennial.train import launch, workers
from perennial.train.recipe import parse_recipe, read
from perennial.train.run import make_run, start, train
from perennial.train.workers import Outcome
from tests.commands import perennial
from tests.workspace import Workspace

FAULTY = """
    import os
    import signal
    import time

    from perennial.core.errors import UserError
    from perennial.objectives.next_token import NextToken


    class Faulty(NextToken):
        def loss(self, model, batch):
            kind, rank, attempt, call = os.environ.get("FAULT", "none:0:0:0").split(":")
            calls = Faulty.__dict__.get("calls", 0) + 1
            Faulty.calls = calls
            here = (os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
            if kind == "slow":
                time.sleep(0.2)
            elif here[0] == rank and attempt in (here[1], "*") and calls == int(call):
                if kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if kind == "input":
                    raise UserError("the disk of process 1 is full of cats")
                raise ZeroDivisionError("a bug")
            return super().loss(model, batch)
"""
"""An objective that goes wrong as the environment variable FAULT, kind:rank:attempt:call, says."""


@pytest.fixture
def faulty(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose objective goes wrong when told to."""
    (tmp_path / "faulty").mkdir()
    (tmp_path / "faulty" / "objective.py").write_text(textwrap.dedent(FAULTY), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = workspace.recipe()
    recipe["stages"][0]["objective"] = "faulty.objective"
    recipe["checkpoints"] = {"every": "512 tokens", "keep": 2}
    path = tmp_path / "faulty.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def losses(folder: Path) -> dict[int, float]:
    """Loss by tokens; of what was done twice the later one."""
    return {e["tokens"]: e["loss"] for e in records.read(folder / "events.jsonl", "train")}


def made(recipe: Path, folder: Path) -> Path:
    """The run folder of a recipe, made here and now."""
    make_run(read(recipe), folder, base=recipe.parent)
    return folder


def test_a_killed_process_costs_a_restart_and_changes_nothing(faulty: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    options = ("--out", out, "--processes", 2, "--max-restarts", 1, "--json")
    done = perennial("train", faulty, *options, FAULT="kill:1:0:6")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["complete"]
    assert "process 1 was killed" in done.stderr
    assert "all go on from the newest checkpoint (restart 1 of at most 1)" in done.stderr
    assert "Traceback" not in done.stderr
    assert [e["tokens"] for e in records.read(out / "events.jsonl", "resume")] == [1024]
    alone = made(faulty, tmp_path / "alone")
    train(alone, quiet=True)
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)


def test_an_error_of_one_process_is_told_once_and_not_tried_again(faulty: Path, tmp_path: Path) -> None:
    done = perennial("train", made(faulty, tmp_path / "run"), "--processes", 2, FAULT="input:1:*:3")
    assert done.returncode == 2
    assert done.stderr.count("the disk of process 1 is full of cats") == 1
    assert done.stderr.splitlines()[-1] == "error: the disk of process 1 is full of cats"
    assert "Traceback" not in done.stderr
    assert "restart" not in done.stderr


@pytest.mark.slow
def test_a_bug_is_told_once_after_the_restarts(faulty: Path, tmp_path: Path) -> None:
    options = ("--processes", 2, "--max-restarts", 1)
    done = perennial("train", made(faulty, tmp_path / "run"), *options, FAULT="bug:1:*:2")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.count("error: process 1 failed:") == 1
    assert "ZeroDivisionError: a bug; all go on from the newest checkpoint (restart 1 of at most 1)" in done.stderr
    assert done.stderr.splitlines()[-2:] == ["ZeroDivisionError: a bug", "1 restarts did not help."]


def interrupted(folder: Path, number: signal.Signals) -> int:
    """Trains with two processes until there is an update, asks them to stop, and returns the tokens that were saved."""
    before = len(losses(folder)) if (folder / "events.jsonl").is_file() else 0
    process = subprocess.Popen(
        [sys.executable, "-m", "perennial", "train", str(folder), "--processes", "2", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "FAULT": "slow:0:0:0"},
    )
    until = time.monotonic() + 60
    while not (folder / "events.jsonl").is_file() or len(losses(folder)) == before:
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(number)
    printed, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert json.loads(printed)["complete"] is False
    saved = int(checkpoints_of(folder)[-1].name)
    assert max(losses(folder)) == saved < 3072
    return saved


def test_a_request_to_stop_saves_and_the_run_goes_on(faulty: Path, tmp_path: Path) -> None:
    folder = made(faulty, tmp_path / "run")
    saved = interrupted(folder, signal.SIGTERM)
    train(folder, quiet=True)  # by one process
    assert [e["tokens"] for e in records.read(folder / "events.jsonl", "resume")] == [saved]
    assert max(losses(folder)) == 3072


@pytest.mark.slow
def test_an_interrupt_stops_and_processes_go_on(faulty: Path, tmp_path: Path) -> None:
    folder = made(faulty, tmp_path / "run")
    saved = interrupted(folder, signal.SIGINT)
    for told in ("resuming", "this run is complete"):
        done = perennial("train", folder, "--processes", 2, "parallel.shard=none")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(told) == 1
    assert [e["tokens"] for e in records.read(folder / "events.jsonl", "resume")] == [saved]


@pytest.mark.slow
def test_continue_prepares_text_once(workspace: Workspace, tmp_path: Path) -> None:
    start(parse_recipe(workspace.recipe()), tmp_path / "base", base=Path(), quiet=True)
    given = ("--data", f"new={workspace.new_text}", "--tokens", "1024", "--out", tmp_path / "update")
    done = perennial("continue", tmp_path / "base", *given, "--processes", 2, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["result"]["complete"]
    assert told["recipe"]["parent"]
    assert (tmp_path / "update" / "corpora" / "new" / "manifest.json").is_file()
    (run,) = records.read(tmp_path / "update" / "events.jsonl", "run")
    assert run["processes"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "0"], "--processes 0: must be 1 or more"),
        (["--processes", "-1"], "--processes -1: must be 1 or more"),
        (["--processes", "99999999"], "--processes 99999999: at most "),
        (["--processes", "9"], "--processes 9: a batch has 8 rows"),
        (["--processes", "2", "--max-restarts", "-1"], "--max-restarts -1: must be 0 or more"),
        (["--max-restarts", "1"], "--max-restarts 1: needs --processes"),
        (["--processes", "2", "parallel.tensor=3"], "must be a multiple of parallel.tensor"),
    ],
)
def test_bad_values_are_told_before_anything_starts(
    workspace: Workspace, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from perennial.cli.main import main

    recipe = tmp_path / "base.yaml"
    recipe.write_text(yaml.safe_dump(workspace.recipe()), encoding="utf-8")
    assert main(["train", str(recipe), "--out", str(tmp_path / "run"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_processes_within_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="already one of 4 processes that torchrun started"):
        launch.check_launch(2)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="needs a GPU of its own, and this machine has 1"):
        launch.check_launch(2)


# What the processes report


def reported(folder: Path, *outcomes: Outcome) -> Path:
    for outcome in outcomes:
        workers.report(folder, outcome)
        (folder / f"{outcome.rank}.pid").write_text("1", encoding="utf-8")
    return folder


def ended(rank: int, code: int, message: str = "", *, final: bool = True, attempt: int = 0) -> Outcome:
    return Outcome(rank, attempt, code, final, message)


def test_an_error_decides_before_a_success(tmp_path: Path) -> None:
    assert workers.final(tmp_path) is None
    reported(tmp_path, ended(0, 0), ended(1, 0))
    assert workers.final(tmp_path) == ended(0, 0)
    bad = ended(1, 2, "bad input")
    reported(tmp_path, bad, ended(0, 1, "Connection closed by peer", final=False))
    assert workers.final(tmp_path) == bad
    with pytest.raises(UserError, match="bad input"):
        launch._told(tmp_path, {}, 3)


def test_a_crash_alone_decides_nothing(tmp_path: Path) -> None:
    reported(tmp_path, ended(0, 1, "Traceback\nValueError: x", final=False))
    assert workers.final(tmp_path) is None
    with pytest.raises(TrainingStopped, match="process 0 failed:\nTraceback\nValueError: x$"):
        launch._told(tmp_path, {}, 0)


def test_the_cause_is_told_and_not_what_followed_from_it(tmp_path: Path) -> None:
    lost = "Traceback\nRuntimeError: [gloo] Connection closed by peer [127.0.0.1]:4"
    reported(tmp_path, ended(0, 1, lost, final=False), ended(2, 1, "Traceback\nValueError: cause", final=False))
    assert workers.crash(tmp_path, 0).startswith("process 2 failed:")
    assert workers.crash(tmp_path, 0, {1: -signal.SIGKILL}).startswith("process 2 failed:")
    reported(tmp_path, ended(2, 1, lost, final=False))
    assert workers.crash(tmp_path, 0, {0: 1, 1: -signal.SIGSEGV}) == "process 1 was killed by SIGSEGV"
    assert "memory runs out" in workers.crash(tmp_path, 0, {1: -signal.SIGKILL})
    assert workers.crash(tmp_path, 0, {1: 70}).startswith("process 1 ended with exit code 70")
    (tmp_path / "1.pid").write_text("1", encoding="utf-8")
    assert workers.crash(tmp_path, 0) == "process 1 was killed, or ended without a word"
    assert workers.crash(tmp_path, 5).startswith("process 0 was killed, or")


def test_a_stop_before_anything_began(tmp_path: Path) -> None:
    workers.request_stop(tmp_path, signal.SIGTERM)
    assert workers.is_stopping(tmp_path)
    assert launch._told(tmp_path, {}, 3) == (130, "")


def test_a_request_to_stop_reaches_only_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(os, "kill", lambda *arguments: sent.append(arguments))
    monkeypatch.setattr(os, "getpgid", lambda pid: 7)
    for rank, pid in enumerate((7, 8)):
        (tmp_path / f"{rank}.pid").write_text(str(pid), encoding="utf-8")
    workers.request_stop(tmp_path, signal.SIGINT)
    assert sent == [(7, signal.SIGINT)]


def test_variables_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "usable_cores", lambda: 8)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert launch._variables(3)["OMP_NUM_THREADS"] == "2"
    assert launch._variables(16)["OMP_NUM_THREADS"] == "1"
    assert launch._variables(3)["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in launch._variables(3)


def test_a_process_that_is_started_again_after_the_end_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from perennial.cli import _worker

    monkeypatch.setenv(workers.FOLDER_VARIABLE, str(tmp_path))
    reported(tmp_path, ended(1, 2, "bad input"))
    assert _worker.main() == 0
    assert len(workers.outcomes(tmp_path)) == 1


def test_torchrun_in_words() -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from perennial.train.torchrun import verdict

    def failed(code: int) -> ProcessFailure:
        return ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="none")

    assert verdict({0: failed(130), 1: failed(130)}) == (130, "stopped")
    assert verdict({0: failed(1), 1: failed(2)})[0] == 2
    code, told = verdict({4: failed(1), 5: failed(-signal.SIGKILL)})
    assert code == 1
    assert told.startswith("process 5 was killed by SIGKILL")
    assert verdict({4: failed(1)})[1].startswith("process 4 failed (exit code 1)")
