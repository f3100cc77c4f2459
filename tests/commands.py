"""The command line: within the tests' own process, or as a process of its own."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from perennial.cli.main import main


def answer(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """What the command line says and returns, without the seconds that a process of its own takes to import torch."""
    said, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        code = main([*map(str, arguments)])
    return subprocess.CompletedProcess(arguments, code, said.getvalue(), told.getvalue())


def perennial(*arguments: str | Path, timeout: float = 110, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "perennial", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **variables},
    )
