"""`perennial doctor --processes N`: what is measured together, and the advice on it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perennial.cli.main import main
from perennial.train.cluster_advice import advice, in_words
from perennial.train.cluster_checks import leaders, rounds


def test_two_processes_are_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "perennial", "doctor", "--processes", "2", "--folder", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["processes"], report["machines"], report["backend"]) == (2, 1, "gloo")
    assert [r["rank"] for r in report["ranks"]] == [0, 1]
    assert report["all_reduce"]["latency_us"] > 0
    assert report["all_reduce"]["bus_bytes_per_second"] == report["all_reduce"]["algorithm_bytes_per_second"] > 0
    assert all(r["folder_seen_seconds"] < 5 for r in report["ranks"])
    assert report["ranks"][0]["versions"] == report["ranks"][1]["versions"]
    assert report["links"] == report["clocks"] == []
    assert not list(tmp_path.iterdir())  # the token is gone
    assert "Traceback" not in done.stderr


def test_a_folder_without_processes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--folder", "."]) == 2
    assert "add --processes N, or start it with torchrun" in capsys.readouterr().err


def test_every_pair_meets_once() -> None:
    for count in range(1, 9):
        played = rounds(count)
        assert sorted(pair for pairs in played for pair in pairs) == [
            (a, b) for a in range(count) for b in range(a + 1, count)
        ]
        for pairs in played:
            busy = [one for pair in pairs for one in pair]
            assert len(busy) == len(set(busy))


def test_the_first_process_of_each_machine_leads() -> None:
    assert leaders([0, 0, 1, 1, 2]) == [0, 2, 4]
    assert leaders([1, 0, 1, 0]) == [1, 0]


# Advice, on made-up facts


def sound(machines: int = 2, each: int = 2) -> dict[str, Any]:
    """A report with nothing to mend."""
    rank = {
        "versions": {"python": "3.12.1", "torch": "2.13.0", "commit": None},
        "device": "cpu",
        "cores": 8,
        "threads": 8 // each,
        "OMP_WAIT_POLICY": "PASSIVE",
        "memory_available_bytes": 64 << 30,
        "disk_free_bytes": 500 << 30,
        "folder_seen_seconds": 0.01,
    }
    pairs = [(a, b) for a in range(machines) for b in range(machines) if a != b]
    link = {"latency_us": 50.0, "bytes_per_second": 1.2e9}
    clock = {"offset_seconds": 0.002, "error_seconds": 0.001}
    return {
        "processes": machines * each,
        "machines": machines,
        "backend": "gloo",
        "ranks": [{**copy.deepcopy(rank), "rank": r, "machine": r // each} for r in range(machines * each)],
        "all_reduce": {
            "latency_us": 80.0,
            "bytes": 64 << 20,
            "algorithm_bytes_per_second": 6e8,
            "bus_bytes_per_second": 9e8,
        },
        "links": [{"from": a, "to": b, **link} for a, b in pairs],
        "clocks": [{"machine": m, **clock} for m in range(1, machines)],
    }


def only(report: dict[str, Any]) -> str:
    (found,) = advice(report)
    return found


def test_nothing_to_mend() -> None:
    assert advice(sound()) == []
    assert advice(sound(machines=1)) == []


def test_different_versions() -> None:
    report = sound()
    report["ranks"][3]["versions"]["torch"] = "2.12.1"
    assert only(report).startswith("torch differs: 2.12.1 on rank 3, 2.13.0 on ranks 0-2")


def test_a_folder_that_is_not_shared() -> None:
    report = sound()
    for rank in (2, 3):
        report["ranks"][rank]["folder_seen_seconds"] = None
    assert only(report).startswith("machine 1 does not see what machine 0 writes")
    report["ranks"][0]["folder_seen_seconds"] = None
    assert only(report).startswith("rank 0 cannot write into the folder")


def test_a_folder_that_is_seen_late() -> None:
    report = sound()
    report["ranks"][2]["folder_seen_seconds"] = 3.2
    assert only(report).startswith("machine 1 sees new files only after 3.2 s")


def test_slow_links_are_named() -> None:
    report = sound()
    report["links"][0]["bytes_per_second"] = 6.25e6
    assert only(report).startswith(
        "the link from machine 0 to machine 1 carries 6.2 MB/s (the median link: 603.1 MB/s)"
    )
    report = sound(machines=4)
    report["links"][4]["bytes_per_second"] = 4e8  # fast enough alone, slow beside the others
    assert only(report).startswith(
        "the link from machine 1 to machine 2 carries 400.0 MB/s (the median link: 1.20 GB/s), and every update"
    )
    assert "and 8 faster links" in in_words({**sound(machines=5), "advice": []}, ["host"] * 5)


@pytest.mark.parametrize(("offset", "words"), [(2.5, "2.5 s ahead of"), (-90.0, "90.0 s behind")])
def test_a_wrong_clock(offset: float, words: str) -> None:
    report = sound()
    report["clocks"][0]["offset_seconds"] = offset
    assert f"the clock of machine 1 is {words} that of machine 0" in only(report)


def test_uneven_machines() -> None:
    report = sound()
    report["ranks"][1]["device"] = report["ranks"][0]["device"] = "GPU of another year"
    assert only(report).startswith("the devices differ: GPU of another year on ranks 0-1, cpu on ranks 2-3")
    report = sound()
    del report["ranks"][3]
    report["ranks"][2]["threads"] = 8
    assert only(report) == "the machines run different numbers of processes: 2 on machine 0, 1 on machine 1"


def test_threads() -> None:
    report = sound()
    for rank in report["ranks"]:
        rank["threads"] = 8
    assert [text.rpartition(": ")[2] for text in advice(report)] == ["set OMP_NUM_THREADS=4"] * 2
    for rank in report["ranks"]:
        rank["threads"] = 1
    assert "machine 0 computes with 2 of 8 cores: set OMP_NUM_THREADS=4" in advice(report)
    report = sound(machines=1)
    report["ranks"][1]["OMP_WAIT_POLICY"] = None
    assert only(report).startswith("set OMP_WAIT_POLICY=PASSIVE")
    report = sound(machines=1, each=2)
    for rank in report["ranks"]:
        rank.update(cores=1, threads=1)
    assert "2 processes share 1 cores: start no more than 1" in only(report)


def test_little_room() -> None:
    report = sound(machines=1)
    report["ranks"][0]["memory_available_bytes"] = 1 << 30
    report["ranks"][1]["disk_free_bytes"] = 1 << 30
    found = advice(report)
    assert "1.0 GiB of memory free; each of 2 processes needs 1 GiB" in found[0]
    assert "1.0 GiB free there" in found[1]


def test_the_report_in_words() -> None:
    report = sound()
    text = in_words({**report, "advice": ["mend it"]}, ["host-a", "host-b"])
    assert "machine 1 (host-b): ranks 2-3, cpu, 8 cores, 4 threads each" in text
    assert "seen within 10 ms" in text
    assert "clock of machine 1: +2.00 ms, to within 1.00 ms" in text
    assert "link from machine 0 to machine 1: latency 50 us, 1.20 GB/s" in text
    assert text.endswith("advice: mend it")
    assert "host-a" not in json.dumps(report)
