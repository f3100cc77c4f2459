"""A minute of the soak: each kind of fault once, and at the end everything is as without them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = ["kill a rank", "stop a rank", "full disk", "damaged checkpoint", "missing shard"]


@pytest.mark.skipif(sys.platform != "linux", reason="the harness reads /proc")
@pytest.mark.timeout(600)
def test_faults_change_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/soak.py", "--size", "tiny", "--updates", "240", "--seed", "1"),
            *("--strikes", "5", "--every", "6", "--faults", *KINDS, "--json", str(tmp_path / "soak.json")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "soak.json").read_text())
    assert record["differences"] == []
    assert sorted(fault["kind"] for fault in record["faults"]) == sorted(KINDS)
    assert record["failed_saves"] >= 1
    assert len(record["set_aside"]) == 1
    assert record["updates_made"] > record["updates"]  # some were lost, and made again
