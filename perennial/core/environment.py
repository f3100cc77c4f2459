"""The machine and software that a result was made with; no names of hosts or people."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import perennial

_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


def prepare_threads() -> None:
    """Asks OpenMP threads to sleep while they wait. Works only before torch is imported; a value already set stays.

    By default waiting threads spin, and on a machine that other work shares each of them takes a core from it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def tune_process() -> None:
    """Thread count and memory handling for tensor work; call it before the first tensor is made."""
    _limit_threads()
    _keep_freed_memory()


def _limit_threads() -> None:
    """Lets torch use no more threads than this process has cores (a container's share of a large machine, say)."""
    import torch

    cores = usable_cores()
    if torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def _keep_freed_memory() -> None:
    """Asks glibc's malloc to keep large freed blocks for the next tensors instead of giving them back each time.

    Training frees and asks for the same sizes at every update; fresh pages cost a fault and zeroing each. Affects this
    process only; does nothing where the C library is another one.
    """
    if can_keep_freed_memory():
        import ctypes

        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD in malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 1 << 30)


def can_keep_freed_memory() -> bool:
    """Whether the C library is glibc, whose malloc `tune_process` asks to keep what is freed."""
    return sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"


def usable_cores() -> int:
    """Cores that this process may use: its CPU affinity, and a container's quota where there is one."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        cores = os.cpu_count() or 1
    quota = _cgroup_value("cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def memory_bytes() -> dict[str, int | None]:
    """Memory of the machine or container in bytes: {'total', 'available'}; None where the system does not say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # Windows
        return {"total": None, "available": None}
    total: int = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = _field(_PROC / "meminfo", "MemAvailable")
    available = int(found.split()[0]) * 1024 if found else None
    limit, used = _cgroup_value("memory.max"), _cgroup_value("memory.current")
    if limit.isdigit() and used.isdigit():
        total = min(total, int(limit))
        free = max(0, int(limit) - int(used))
        available = free if available is None else min(available, free)
    return {"total": total, "available": available}


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    found = _field(_PROC / "cpuinfo", "model name")
    if not found and sys.platform == "darwin":
        found = _output("sysctl", "-n", "machdep.cpu.brand_string")
    return found or platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None. Does not import it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of the working tree that Perennial runs from, '-dirty' when it has changes; None for an installed copy."""
    root = Path(perennial.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    return _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*") or None


def thread_settings() -> dict[str, Any]:
    """How many threads torch computes with, and the environment variables that decide it."""
    import torch

    variables = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS")
    return {
        "torch": torch.get_num_threads(),
        "cores": usable_cores(),
        **{name: os.environ[name] for name in variables if name in os.environ},
    }


def bf16_units() -> list[str]:
    """What of this CPU multiplies bf16 numbers natively, by the names that processors give them; empty: nothing."""
    import torch

    # Looked up by name: they are private, and a torch for another processor may not have them.
    checks = {"AVX512-BF16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}
    cpu: Any = torch.cpu
    return [unit for unit, check in checks.items() if getattr(cpu, check, bool)()]


def devices() -> list[dict[str, Any]]:
    """Accelerators that torch sees: name and memory in bytes."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": device.name, "memory_bytes": device.total_memory} for device in found]


@contextlib.contextmanager
def with_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables, for the body and the processes it starts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def environment() -> dict[str, Any]:
    """What every run records of the machine and software it ran on."""
    import torch

    return {
        "perennial": perennial.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": package_version("numpy"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes()["total"],
        "devices": devices(),
        "threads": thread_settings(),
        "bf16_units": bf16_units(),
        "keeps_freed_memory": can_keep_freed_memory(),
    }


def _field(path: Path, name: str) -> str:
    """The value of the first 'name : value' line of a file, or ''."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _cgroup_value(name: str) -> str:
    try:
        return (_CGROUP / name).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
