"""Help answers at once: a fraction of a second of work, and none of the heavy libraries."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from perennial.cli.main import commands, load

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "pydantic", "pyarrow", "tokenizers", "matplotlib", "transformers", "yaml", "rich")
LIMIT_SECONDS = 0.6
"""Twice the promise of 0.3 s, in seconds of processor time, so that a busy machine does not decide the outcome."""


def _run(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A new process and the processor time it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "import sys\n"
        "from perennial.cli.main import main\n"
        f"code = main({list(arguments)!r})\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'loaded: {loaded}' if loaded else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_is_quick_and_lists_every_command() -> None:
    runs = [_run("--help") for _ in range(3)]
    for done, _ in runs:
        assert done.returncode == 0, done.stderr
        for name in commands():
            assert f"\n  {name} " in done.stdout
    assert statistics.median(seconds for _, seconds in runs) < LIMIT_SECONDS


@pytest.mark.parametrize("command", commands())
def test_help_of_a_command_is_quick(command: str) -> None:
    done, seconds = _run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: perennial {command}")
    assert seconds < LIMIT_SECONDS


def test_errors_of_the_command_line_are_quick_too() -> None:
    done, seconds = _run("trian")
    assert done.returncode == 2
    assert "Did you mean 'train'?" in done.stderr
    assert seconds < LIMIT_SECONDS


@pytest.mark.parametrize("command", commands())
def test_a_command_file_is_thin_and_complete(command: str) -> None:
    module = load(command)
    assert module.HELP.isascii()
    assert "\n" not in module.HELP
    assert len(module.HELP) < 100
    assert callable(module.arguments)
    assert callable(module.run)
    assert module.__file__ is not None
    assert len(Path(module.__file__).read_text(encoding="utf-8").splitlines()) <= 120


def test_the_width_of_a_terminal_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "COLUMNS", "40")
    done, _ = _run("prepare", "--help")
    assert done.returncode == 0
