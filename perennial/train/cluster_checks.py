"""Checks of the processes, machines and links that a run would be spread over, for `perennial doctor`.

Every process measures, rank 0 collects: one report of numbers, with advice (see `cluster_advice`). A machine is what
torchrun calls a node; in the report it has a number, and its name is kept apart so that a record names nobody.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import perennial
from perennial.core.environment import git_commit, memory_bytes, tune_process, usable_cores
from perennial.core.errors import UserError
from perennial.core.progress import Progress
from perennial.train import workers
from perennial.train.cluster_advice import advice
from perennial.train.meeting import fresh_store

_CONNECT_SECONDS, _SEEN_SECONDS = 60.0, 5.0
_ENOUGH_SECONDS = 0.25  # what one transfer should last to be measured well
_SIZES = (1 << 20, 8 << 20, 64 << 20)  # bytes


def examine(folder: Path) -> tuple[dict[str, Any], list[str]] | None:
    """Measures together with all other processes; on rank 0 (report, names of the machines), elsewhere None.

    folder: the place that the machines should share. Raises UserError when the processes do not find each other.
    """
    tune_process()
    device = torch.device("cuda", workers.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    control = _join(device)
    try:
        with Progress("checks", total=5, quiet=workers.rank() > 0) as line:
            line.update(0, "versions, devices, memory")
            ranks = _gathered(rank_facts(device, folder), control)
            leads = leaders([r["machine"] for r in ranks])
            line.update(1, "is the folder the same for all")
            seen = _gathered(_see_token(folder, control), control)
            line.update(2, "all-reduce")
            all_reduce = _all_reduce_speed(device)
            line.update(3, f"links between {len(leads)} machines")
            links = [link for found in _gathered(_measure_links(leads, device), control) for link in found]
            line.update(4, "clocks")
            clocks = _measure_clocks(leads, control)
            hosts = _gathered(socket.gethostname(), control)
            line.update(5, "done")
    finally:
        dist.destroy_process_group()
    if workers.rank() > 0:
        return None
    report: dict[str, Any] = {
        "processes": len(ranks),
        "machines": len(leads),
        "backend": "nccl" if device.type == "cuda" else "gloo",
        "ranks": [{**facts, "folder_seen_seconds": s} for facts, s in zip(ranks, seen, strict=True)],
        "all_reduce": all_reduce,
        "links": links,
        "clocks": clocks,
    }
    return {**report, "advice": advice(report)}, [hosts[rank] for rank in leads]


def rank_facts(device: torch.device, folder: Path) -> dict[str, Any]:
    """What this process runs on and with."""
    place = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    return {
        "rank": workers.rank(),
        "machine": int(os.environ.get("GROUP_RANK", "0")),
        "versions": {
            "python": platform.python_version(),
            "perennial": perennial.__version__,
            "commit": git_commit(),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else None,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "memory_available_bytes": memory_bytes()["available"],
        "disk_free_bytes": shutil.disk_usage(place).free,
    }


def leaders(machines: Sequence[int]) -> list[int]:
    """The lowest rank of each machine, where machines[rank] is a number from 0 up."""
    return [machines.index(machine) for machine in sorted(set(machines))]


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Every pair of `count` things once, in rounds in which nothing occurs twice (the circle of a tournament)."""
    seats: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


# Measuring


def _join(device: torch.device) -> Any:
    """Joins all processes; returns a group on the CPU for what is said about the measurements."""
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        limit, rank, size = timedelta(seconds=_CONNECT_SECONDS), workers.rank(), workers.world_size()
        store = fresh_store(rank, size, limit)
        place = {} if store is None else {"store": store, "rank": rank, "world_size": size}
        dist.init_process_group(backend, timeout=limit, **place)
        control = dist.new_group(backend="gloo") if device.type == "cuda" else dist.group.WORLD
        dist.barrier(group=control)
    except (RuntimeError, TimeoutError) as error:
        raise UserError(
            f"the processes did not find each other: {str(error).strip().splitlines()[0]}\nMachines must reach each "
            "other on every port. Where a machine has several networks, name the one to use in GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME."
        ) from error
    return control


def _gathered(value: Any, control: Any) -> list[Any]:
    """The value of every rank, by rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=control)
    return found


def _see_token(folder: Path, control: Any) -> float | None:
    """Seconds until a file that rank 0 has written in `folder` is seen here; None when it is not."""
    token = [uuid.uuid4().hex]
    dist.broadcast_object_list(token, src=0, group=control)
    path = folder / f".doctor.{token[0]}.tmp"
    try:
        if workers.rank() == 0:
            path.write_text(token[0], encoding="utf-8")
    except OSError:
        pass  # then nobody sees it
    dist.barrier(group=control)
    begun, seen = time.perf_counter(), None
    while seen is None and time.perf_counter() < begun + _SEEN_SECONDS:
        try:
            seen = time.perf_counter() - begun if path.read_text(encoding="utf-8") == token[0] else None
        except OSError:
            time.sleep(0.01)
    dist.barrier(group=control)
    if workers.rank() == 0:
        path.unlink(missing_ok=True)
    return None if seen is None else round(seen, 4)


def _timed(action: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds of `action`."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _slowest(seconds: float, device: torch.device) -> float:
    """The longest of all ranks' times, so that all decide alike."""
    tensor = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def _all_reduce_speed(device: torch.device) -> dict[str, float]:
    """Latency of the smallest all-reduce, and bandwidth of a large one, in bytes per second.

    Algorithm bandwidth: bytes of the tensor / seconds. Bus bandwidth: that x 2 (n - 1) / n, what a link carries when
    the tensor travels round a ring, so that it compares with the hardware whatever n is.

    Source: NVIDIA, nccl-tests, doc/PERFORMANCE.md, section "AllReduce".
    """
    count = dist.get_world_size()
    small = torch.zeros(1, device=device)
    _timed(partial(dist.all_reduce, small), device, 5)  # connections are made at the first
    latency = _slowest(_timed(partial(dist.all_reduce, small), device, 50), device)
    for num_bytes in _SIZES:
        large = torch.zeros(num_bytes // 4, device=device)
        _timed(partial(dist.all_reduce, large), device, 1)
        seconds = _slowest(_timed(partial(dist.all_reduce, large), device, 3), device)
        if seconds > _ENOUGH_SECONDS:
            break
    rate = num_bytes / seconds
    return {
        "latency_us": round(1e6 * latency, 1),
        "bytes": num_bytes,
        "algorithm_bytes_per_second": round(rate),
        "bus_bytes_per_second": round(rate * 2 * (count - 1) / count),
    }


def _measure_links(leads: list[int], device: torch.device) -> list[dict[str, Any]]:
    """Speed of every link that begins at this process, the first of its machine; both directions of a pair count.

    Pairs that share no machine are measured at the same time.
    """
    found = []
    for pairs in rounds(len(leads)):
        for sender, receiver in [*pairs, *(pair[::-1] for pair in pairs)]:
            if workers.rank() == leads[sender]:
                found.append({"from": sender, "to": receiver, **_send_and_time(leads[receiver], device)})
            elif workers.rank() == leads[receiver]:
                _answer(leads[sender], device)
        dist.barrier()
    return found


def _send_and_time(peer: int, device: torch.device) -> dict[str, float]:
    """Half of a round trip, and bytes per second of one large message; tells the peer what comes."""
    small = torch.zeros(1, dtype=torch.float64, device=device)

    def exchange(tensor: torch.Tensor) -> None:
        dist.send(tensor, peer)
        dist.recv(small, peer)

    exchange(small)
    latency = _timed(partial(exchange, small), device, 20) / 2
    for num_bytes in _SIZES:
        dist.send(torch.tensor([float(num_bytes)], dtype=torch.float64, device=device), peer)
        seconds = _timed(partial(exchange, torch.zeros(num_bytes // 4, device=device)), device, 3)
        if seconds > _ENOUGH_SECONDS:
            break
    dist.send(torch.zeros(1, dtype=torch.float64, device=device), peer)
    return {
        "latency_us": round(1e6 * latency, 1),
        "bytes_per_second": round(num_bytes / max(1e-9, seconds - latency)),
    }


def _answer(peer: int, device: torch.device) -> None:
    """The other end of `_send_and_time`."""
    small = torch.zeros(1, dtype=torch.float64, device=device)
    for _ in range(21):
        dist.recv(small, peer)
        dist.send(small, peer)
    while True:
        dist.recv(small, peer)
        num_bytes = int(small)
        if num_bytes == 0:
            return
        large = torch.zeros(num_bytes // 4, device=device)
        for _ in range(3):
            dist.recv(large, peer)
            dist.send(small, peer)


def _measure_clocks(leads: list[int], control: Any) -> list[dict[str, float]]:
    """How far each machine's clock is ahead of the first one's, in seconds, and how sure that is; filled on rank 0.

    offset = its time - (sent + received) / 2, of the quickest of 20 round trips; it errs by half of that at most.

    Source: Cristian 1989, "Probabilistic clock synchronization", Distributed Computing 3, section 3.
    """
    found = []
    message = torch.zeros(1, dtype=torch.float64)
    for machine, lead in list(enumerate(leads))[1:]:
        samples = []
        for _ in range(20):
            if workers.rank() == leads[0]:
                sent = time.time()
                dist.send(message, lead, group=control)
                dist.recv(message, lead, group=control)
                received = time.time()
                samples.append((received - sent, float(message) - (sent + received) / 2))
            elif workers.rank() == lead:
                dist.recv(message, leads[0], group=control)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), leads[0], group=control)
        if samples:
            trip, offset = min(samples)
            found.append({"machine": machine, "offset_seconds": round(offset, 6), "error_seconds": round(trip / 2, 6)})
    return found
