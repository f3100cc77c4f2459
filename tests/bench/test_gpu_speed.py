"""The benchmark of one GPU can be tried out without one: what it would do, all of it on a tiny model, and resuming."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_speed.py"


@pytest.fixture
def gpu_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, in an empty folder."""
    specification = importlib.util.spec_from_file_location("gpu_speed", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "gpu_speed", module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    specification.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def test_without_a_gpu_it_says_so(
    gpu_speed: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_speed, "device_memory", lambda device: 0.0)
    assert gpu_speed.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("gpu_speed: no GPU here")
    assert len(printed.splitlines()) == 1


def test_a_dry_run_lists_what_would_be_measured(
    gpu_speed: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_speed, "device_memory", lambda device: 0.0)
    assert gpu_speed.main(["--dry-run", "--contenders", "perennial", "perennial compiled, full"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("matrix products")
    assert [tuple(line.split(" | ")[1:3]) for line in lines[1::2]] == [
        (size, length) for size in ("124m", "1b", "3b") for length in ("2048", "4096")
    ]
    assert list(Path().iterdir()) == []


def test_rows_are_halved_when_memory_runs_out(gpu_speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def worker(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        tried.append(json.loads(command[-1])["rows"])
        if tried[-1] > 4:
            return subprocess.CompletedProcess(command, 1, "", "UserError: out of memory: this GPU held")
        return subprocess.CompletedProcess(command, 0, 'noise\n{"tokens_per_second": 1}', "")

    monkeypatch.setattr(gpu_speed.subprocess, "run", worker)
    job = gpu_speed.Job("perennial", "1b", 2048, 16, 32, 4, 2, "cuda")
    assert gpu_speed.run(job) == {"tokens_per_second": 1, "rows": 4}
    assert tried == [16, 8, 4]


@pytest.mark.slow
def test_a_tiny_run_and_its_second_start(gpu_speed: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--sizes", "tiny", "--updates", "4", "--skip", "2", "--contenders", "perennial"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| tiny | 64 | perennial | 8 |" in done.stdout
    path = Path("gpu_speed.jsonl")
    records = path.read_text()
    assert [json.loads(line)["job"]["contender"] for line in records.splitlines()] == ["matrix products", "perennial"]
    assert json.loads(records.splitlines()[1])["result"]["tokens_per_second"] > 0
    path.write_text(records + '{"key": "cut o')
    assert gpu_speed.main(options) == 0
    assert capsys.readouterr().out == done.stdout
    assert path.read_text() == records + '{"key": "cut o', "nothing is measured twice"
