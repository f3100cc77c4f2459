"""What a run records of its machine: complete, JSON-ready, and without names of hosts or people."""

from __future__ import annotations

import getpass
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import perennial
from perennial.core import environment as environments


def test_environment_is_complete_and_names_nobody() -> None:
    facts = environments.environment()
    assert facts["perennial"] == perennial.__version__
    assert facts["python"] == platform.python_version()
    assert facts["torch"]
    assert facts["numpy"]
    assert 1 <= facts["cores"] <= (os.cpu_count() or 1)
    assert facts["memory_bytes"] is None or facts["memory_bytes"] > 1 << 28
    text = json.dumps(facts)
    words = {socket.gethostname(), str(Path.home())} | ({getpass.getuser()} - {"root"})
    assert not [word for word in words if len(word) > 3 and word in text]


def test_a_containers_limits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "_CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text(f"{1 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 28}\n")
    assert environments.usable_cores() == 1
    memory = environments.memory_bytes()
    assert memory["total"] == 1 << 30
    assert memory["available"] is not None
    assert memory["available"] <= (1 << 30) - (1 << 28)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert environments.usable_cores() == len(os.sched_getaffinity(0))
    assert (environments.memory_bytes()["total"] or 0) > 1 << 28


def test_fields_of_proc_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2GHz\n")
    monkeypatch.setattr(environments, "_PROC", tmp_path)
    assert environments.cpu_model() == "Some CPU @ 2GHz"
    (tmp_path / "cpuinfo").unlink()
    assert environments.cpu_model()


def test_package_versions() -> None:
    assert environments.package_version("numpy")
    assert environments.package_version("no-such-package-anywhere") is None


def test_threads_are_asked_to_sleep_unless_something_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    environments.prepare_threads()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    environments.prepare_threads()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_torch_uses_no_more_threads_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.set_num_threads(2)
    monkeypatch.setattr(environments, "usable_cores", lambda: 1)
    environments.tune_process()
    assert torch.get_num_threads() == 1
    monkeypatch.setattr(environments, "usable_cores", lambda: 64)
    environments.tune_process()
    assert torch.get_num_threads() == 1, "never raised above what was asked for"


def test_git_commit_of_a_working_tree_and_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perennial, "__file__", str(tmp_path / "perennial" / "__init__.py"))
    assert environments.git_commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    commit = environments.git_commit()
    assert commit is not None
    assert len(commit) == 12
    (tmp_path / "file").write_text("two")
    assert environments.git_commit() == f"{commit}-dirty"


def test_importing_it_does_not_load_torch() -> None:
    code = "import sys; from perennial.core import environment; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
