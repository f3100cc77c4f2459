"""Seconds that processes wait for the slowest of them, and for data."""

from __future__ import annotations

import pytest
import torch

from perennial.train import stalls
from perennial.train.stalls import Lately, Stall, Stopwatch, stall

CPU = torch.device("cpu")


def times(*ranks: list[tuple[float, float]]) -> torch.Tensor:
    return torch.tensor(ranks, dtype=torch.float64)


def test_equal_processes_wait_for_nobody() -> None:
    assert stall(times([(0.1, 1.0)] * 3, [(0.1, 1.0)] * 3)).seconds == 0


def test_the_slowest_is_named_with_what_the_others_waited() -> None:
    found = stall(times([(0.0, 1.0)] * 4, [(0.0, 1.5)] * 4, [(0.0, 1.0)] * 4))
    assert found.rank == 1
    assert found.seconds == pytest.approx(4 * 0.5)
    assert found.cause == "compute"


def test_a_process_that_waits_for_data_is_told_from_a_slow_one() -> None:
    found = stall(times([(0.0, 1.0)] * 4, [(0.0, 1.0)] * 4, [(0.8, 1.0)] * 4))
    assert (found.rank, found.cause) == (2, "data")
    assert [found.seconds, found.data_seconds] == pytest.approx([3.2, 3.2])


def test_delays_that_strike_another_process_each_time_are_counted() -> None:
    found = stall(times([(0, 1.0), (0, 2.0)], [(0, 2.0), (0, 1.0)]))
    assert found.seconds == pytest.approx(2.0)


def test_the_progress_line_tells_what_matters_only() -> None:
    lately = Lately()

    def ten(data_seconds: float, stall: Stall | None) -> str:
        return [lately.after(1.0, data_seconds, stall if n == 9 else None) for n in range(10)][-1]

    assert ten(0.0, None) == ""
    assert ten(0.2, None) == ", 20% waiting for data"
    assert lately.after(1.0, 0.0, None) == ", 20% waiting for data"  # until the next ten are done
    assert [lately.after(1.0, 0.0, None) for _ in range(9)][-1] == ""
    assert ten(0.01, Stall(1.0, 3, 0.0)) == ", 10% for rank 3 (compute)"
    assert ten(0.1, Stall(0.9, 3, 0.9)) == ", 10% waiting for data, 9% for rank 3 (data)"
    assert ten(0.0, Stall(0.4, 3, 0.0)) == ""


def test_a_stopwatch_times_until_the_last_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(n) for n in range(1000))
    monkeypatch.setattr(stalls.time, "perf_counter", lambda: next(clock))
    sent: list[torch.Tensor] = []
    marks: list[int] = []

    def gather(own: torch.Tensor) -> torch.Tensor:
        sent.append(own.clone())
        own[0, :, 1] = 4.0  # rank 0
        return own

    watch = Stopwatch(rank=1, size=2, device=CPU, gather=gather, on_last_gradient=lambda: marks.append(1))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    watch.watch(model)
    watch.watch(model)  # another stage
    results = []
    for _ in range(stalls.EVERY):
        watch.begin(0.25)
        next(clock)  # what is exchanged before forward does not count
        for _ in range(2):  # micro-batches: from the first one on, to the last
            model(torch.ones(1, 2)).sum().backward()
        results.append(watch.settle())
    with torch.no_grad():
        model(torch.ones(1, 2))  # an evaluation in between
    assert results[:-1] == [None] * (stalls.EVERY - 1)
    assert sent[0][1].tolist() == [[0.25, 2.0]] * stalls.EVERY
    assert results[-1] == Stall(pytest.approx(1.75 * stalls.EVERY), 0, 0.0)
    assert len(marks) == 2 * stalls.EVERY


def test_updates_that_were_called_off_are_forgotten() -> None:
    watch = Stopwatch(rank=0, size=2, device=CPU, gather=lambda own: own)
    watch.begin(0.1)
    watch.drop()
    assert watch.settle() is None


def test_a_process_alone_times_nothing() -> None:
    watch = Stopwatch(rank=0, size=1, device=CPU, gather=lambda own: own)
    model = torch.nn.Linear(2, 2)
    watch.watch(model)
    for _ in range(2 * stalls.EVERY):
        watch.begin(0.1)
        model(torch.ones(1, 2)).sum().backward()
        assert watch.settle() is None
