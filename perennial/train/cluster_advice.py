"""What a person could mend before a run is spread over these processes and machines, from a report of measurements.

The report is that of `cluster_checks`; nothing here needs torch or another process.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from perennial.core.amounts import human_bytes

SLOW_LINK = 125e6
"""Bytes per second, 1 Gbit/s: below it, exchanging the gradients of 100 M parameters takes more than 3 s."""

UNEVEN_LINK = 0.5
"""Share of the median link below which a link is named although it is fast enough by itself."""

MOST_CLOCK_SECONDS = 1.0
"""Clocks that differ by more confuse the order of records and the age of files."""

SLOW_FOLDER_SECONDS = 1.0
"""A file that others see later than this comes from a cached network folder."""

_SHOWN_LINKS = 12


def advice(report: Mapping[str, Any]) -> list[str]:
    """What a person could mend, most important first."""
    ranks = report["ranks"]
    return [
        *_different_versions(ranks),
        *_unshared_folder(ranks),
        *_slow_links(report["links"]),
        *_wrong_clocks(report["clocks"]),
        *_uneven_machines(ranks),
        *_threads(ranks),
        *_little_room(ranks),
    ]


def _different_versions(ranks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for name in ranks[0]["versions"]:
        values = sorted({str(r["versions"][name]) for r in ranks})
        if len(values) > 1:
            where = [f"{v} on {_named([r['rank'] for r in ranks if str(r['versions'][name]) == v])}" for v in values]
            yield f"{name} differs: {', '.join(where)}; make it the same everywhere"


def _unshared_folder(ranks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if ranks[0]["folder_seen_seconds"] is None:
        yield "rank 0 cannot write into the folder: choose one that it may write to (--folder)"
        return
    blind = [r for r in ranks if r["folder_seen_seconds"] is None]
    for machine in sorted({r["machine"] for r in blind}):
        yield (
            f"machine {machine} does not see what machine 0 writes into the folder: the run folder, the corpora and "
            "the parent must lie on a file system that all machines share, at the same path"
        )
    late = [r for r in ranks if (r["folder_seen_seconds"] or 0) > SLOW_FOLDER_SECONDS]
    for machine in sorted({r["machine"] for r in late}):
        seconds = max(r["folder_seen_seconds"] for r in late if r["machine"] == machine)
        yield f"machine {machine} sees new files only after {seconds:.1f} s: mount the folder without caching of names"


def _slow_links(links: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not links:
        return
    median = statistics.median(link["bytes_per_second"] for link in links)
    for link in sorted(links, key=lambda k: k["bytes_per_second"]):
        rate = link["bytes_per_second"]
        if rate >= SLOW_LINK and rate >= UNEVEN_LINK * median:
            return
        compared = f" (the median link: {_per_second(median)})"
        yield (
            f"the link from machine {link['from']} to machine {link['to']} carries {_per_second(rate)}{compared}, and "
            "every update waits for the slowest link: mend it, leave one of the two out, or exchange less often (more "
            "tokens in a batch)"
        )


def _wrong_clocks(clocks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for clock in clocks:
        if abs(clock["offset_seconds"]) > MOST_CLOCK_SECONDS + clock["error_seconds"]:
            way = "ahead of" if clock["offset_seconds"] > 0 else "behind"
            yield (
                f"the clock of machine {clock['machine']} is {abs(clock['offset_seconds']):.1f} s {way} that of "
                "machine 0: let a time service (chrony, systemd-timesyncd) set both"
            )


def _uneven_machines(ranks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    devices = sorted({r["device"] for r in ranks})
    if len(devices) > 1:
        where = [f"{d} on {_named([r['rank'] for r in ranks if r['device'] == d])}" for d in devices]
        yield f"the devices differ: {', '.join(where)}; every update takes as long as the slowest"
    counts = {machine: len(of) for machine, of in _by_machine(ranks)}
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{count} on machine {machine}" for machine, count in counts.items())
        yield f"the machines run different numbers of processes: {each}"


def _threads(ranks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for machine, of in _by_machine(ranks):
        threads, cores = sum(r["threads"] for r in of), of[0]["cores"]
        better = max(1, cores // len(of))
        if threads > cores and of[0]["threads"] > better:
            yield (
                f"machine {machine}: {len(of)} processes with {of[0]['threads']} threads each share {cores} cores: "
                f"set OMP_NUM_THREADS={better}"
            )
        elif len(of) > cores:
            yield f"machine {machine}: {len(of)} processes share {cores} cores: start no more than {cores}"
        elif of[0]["device"] == "cpu" and of[0]["threads"] < better:
            yield f"machine {machine} computes with {threads} of {cores} cores: set OMP_NUM_THREADS={better}"
    if any((r["OMP_WAIT_POLICY"] or "").upper() != "PASSIVE" for r in ranks):
        yield "set OMP_WAIT_POLICY=PASSIVE: waiting threads spin otherwise, and take cores from the other processes"


def _little_room(ranks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for machine, of in _by_machine(ranks):
        memory = of[0]["memory_available_bytes"]
        if memory is not None and memory < len(of) << 30:
            yield f"machine {machine} has {human_bytes(memory)} of memory free; each of {len(of)} processes needs 1 GiB"
        if (disk := min(r["disk_free_bytes"] for r in of)) < 5 << 30:
            yield f"machine {machine} has {human_bytes(disk)} free there: a checkpoint takes 12 bytes a parameter"


def _by_machine(ranks: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
    ordered = sorted(ranks, key=lambda r: (r["machine"], r["rank"]))
    return ((machine, list(of)) for machine, of in groupby(ordered, key=lambda r: r["machine"]))


def _named(ranks: Sequence[int]) -> str:
    """'rank 3', 'ranks 0-3' or 'ranks 0, 2, 5'."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    is_row = list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    return f"ranks {ranks[0]}-{ranks[-1]}" if is_row else f"ranks {', '.join(map(str, ranks))}"


def _per_second(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.1f} MB/s"


def in_words(report: Mapping[str, Any], hosts: Sequence[str]) -> str:
    """The report for the screen, with the names of the machines."""
    first = report["ranks"][0]
    versions = ", ".join(f"{name} {value}" for name, value in first["versions"].items() if value)
    total = report["all_reduce"]
    size = f"{report['processes']} processes on {report['machines']} machine{'s' * (report['machines'] > 1)}"
    lines = [f"{size}, by {report['backend']}; {versions}"]
    for machine, of in _by_machine(report["ranks"]):
        memory = of[0]["memory_available_bytes"]
        room = "unknown memory" if memory is None else f"{human_bytes(memory)} of memory free"
        lines.append(
            f"machine {machine} ({hosts[machine]}): {_named([r['rank'] for r in of])}, {of[0]['device']}, "
            f"{of[0]['cores']} cores, {of[0]['threads']} threads each, {room}, "
            f"{human_bytes(of[0]['disk_free_bytes'])} of disk"
        )
    seen = [r["folder_seen_seconds"] for r in report["ranks"]]
    lines.append(
        "folder: not the same for all"
        if None in seen
        else f"folder: the same for all, a new file is seen within {1000 * max(seen):.0f} ms"
    )
    lines.append(
        f"all-reduce: latency {total['latency_us']:.0f} us; of {human_bytes(total['bytes'])}, algorithm "
        f"{_per_second(total['algorithm_bytes_per_second'])}, bus {_per_second(total['bus_bytes_per_second'])}"
    )
    slowest = sorted(report["links"], key=lambda link: link["bytes_per_second"])[:_SHOWN_LINKS]
    for link in slowest:
        speed = f"latency {link['latency_us']:.0f} us, {_per_second(link['bytes_per_second'])}"
        lines.append(f"link from machine {link['from']} to machine {link['to']}: {speed}")
    if len(report["links"]) > len(slowest):
        lines.append(f"and {len(report['links']) - len(slowest)} faster links (--json shows them)")
    for clock in report["clocks"]:
        offset, error = 1000 * clock["offset_seconds"], 1000 * clock["error_seconds"]
        lines.append(f"clock of machine {clock['machine']}: {offset:+.2f} ms, to within {error:.2f} ms")
    found = [f"advice: {text}" for text in report["advice"]]
    return "\n".join([*lines, "", *(found or ["nothing to mend"])])
