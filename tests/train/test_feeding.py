"""Batches reach the device whole and in order, and page-locked memory is not written before it was read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perennial.data.loader import Batch
from perennial.train.feeding import Feeder

CPU = torch.device("cpu")


class SlowCopy:
    """Copies that are made at the last moment: when somebody waits for their event."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.pairs = pairs

    def synchronize(self) -> None:
        for destination, source in self.pairs:
            destination.copy_(source)
        self.pairs = []


class SlowTransfers:
    """A device whose copies are as late as they may be."""

    def __init__(self) -> None:
        self.started: list[SlowCopy] = []
        self.buffers = 0

    def page_locked(self, num_bytes: int) -> Tensor:
        self.buffers += 1
        return torch.empty(num_bytes, dtype=torch.uint8)

    def start(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        copies = [torch.full_like(tensor, -1) for tensor in tensors]
        self.started.append(SlowCopy(list(zip(copies, tensors, strict=True))))
        return copies, self.started[-1]


def a_batch(number: int, rows: int = 5, length: int = 7, documents: bool = True) -> Batch:
    inputs = np.arange(rows * length, dtype=np.int64).reshape(rows, length) + 1000 * number
    segments = (inputs % 3).astype(np.int32) if documents else None
    return Batch(inputs, inputs + 1, segments, np.zeros(rows, np.int64), np.zeros(rows, np.int64))


def test_on_a_cpu_nothing_is_copied() -> None:
    batch = a_batch(0)
    for piece, start in zip(Feeder(CPU).pieces(batch, 2), (0, 2, 4), strict=True):
        for tensor, array in zip(
            (piece.inputs, piece.targets, piece.segments), (batch.inputs, batch.targets, batch.segments), strict=True
        ):
            assert tensor is not None
            assert array is not None
            assert tensor.data_ptr() == array[start:].ctypes.data
    assert len(piece.inputs) == 1


@pytest.mark.parametrize("documents", [False, True])
def test_pieces_are_the_batch(documents: bool) -> None:
    transfers = SlowTransfers()
    for feeder in (Feeder(CPU), Feeder(CPU, transfers)):
        batch = a_batch(3, documents=documents)
        pieces = feeder.pieces(batch, 2)
        for copy in transfers.started:
            copy.synchronize()
        assert [len(piece.inputs) for piece in pieces] == [2, 2, 1]
        for name in ("inputs", "targets", "segments"):
            array = getattr(batch, name)
            if array is None:
                assert all(getattr(piece, name) is None for piece in pieces)
            else:
                whole = torch.cat([getattr(piece, name) for piece in pieces])
                assert torch.equal(whole, torch.from_numpy(array))
                assert whole.dtype == torch.from_numpy(array).dtype


def test_processes_with_fewer_rows_end_with_rows_that_do_not_count() -> None:
    pieces = Feeder(CPU).pieces(a_batch(0, rows=2), 1, most_rows=4)
    assert [int((piece.targets >= 0).sum()) for piece in pieces] == [7, 7, 0, 0]
    assert all(piece.inputs.shape == (1, 7) for piece in pieces)


def test_a_buffer_is_written_only_when_the_copy_out_of_it_is_over() -> None:
    """With copies that are made when they are waited for, and not before, every batch still arrives as it was."""
    transfers = SlowTransfers()
    feeder = Feeder(CPU, transfers)
    batches = [a_batch(number, rows=1 + number % 4) for number in range(20)]
    arrived = [feeder.pieces(batch, 9)[0] for batch in batches]
    waited_for = [not copy.pairs for copy in transfers.started]
    assert waited_for == [True] * 17 + [False] * 3, "the host waits for nothing newer than it must"
    for copy in transfers.started:
        copy.synchronize()
    for batch, piece in zip(batches, arrived, strict=True):
        assert torch.equal(piece.inputs, torch.from_numpy(batch.inputs))
        assert torch.equal(piece.targets, torch.from_numpy(batch.targets))
    assert transfers.buffers <= 9, "three buffers, each grown a few times"


def test_numbers_reach_the_device() -> None:
    transfers = SlowTransfers()
    found = Feeder(CPU, transfers).numbers(3, 0.5)
    transfers.started[0].synchronize()
    assert found.tolist() == Feeder(CPU).numbers(3, 0.5).tolist() == [3, 0.5]


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait() -> None:
    device = torch.device("cuda")
    feeder = Feeder(device)
    for number in range(3):
        feeder.pieces(a_batch(number), 2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pieces, numbers = feeder.pieces(a_batch(7), 2), feeder.numbers(1, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.cat([piece.inputs for piece in pieces]).cpu(), torch.from_numpy(a_batch(7).inputs))
    assert numbers.tolist() == [1, 2]
