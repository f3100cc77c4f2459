"""From the loader's batches to tensors on the device, in pieces of a micro-batch, without the host waiting for it.

On a CPU the tensors are views of the loader's memory. On a GPU a batch is copied into page-locked memory and from there
on a stream of its own, while the GPU still computes the update before; what is queued on the stream that trains waits
for the copy by itself. Page-locked buffers go round in a ring: one is written again only when the copy out of it is
over.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perennial.data.loader import Batch
from perennial.objectives.base import IGNORED


@dataclass(frozen=True)
class TorchBatch:
    """A batch (or a part of one) as tensors: inputs and targets (B, T) int64, segments (B, T) int32 or None."""

    inputs: Tensor
    targets: Tensor
    segments: Tensor | None
    source: NDArray[np.int64] | None = None
    """(B,), on the host, where it decides what is computed: index of each row's source in the stage's mixture."""


_SLOTS = 3
"""Buffers of the ring: one being filled, one being copied, one to spare, so that the host does not wait for a copy."""
_ALIGNMENT = 64
"""Bytes: each tensor in a buffer begins at a multiple of this."""


class Transfers(Protocol):
    """How tensors come from page-locked memory to a device."""

    def page_locked(self, num_bytes: int) -> Tensor:
        """Page-locked memory, uint8."""

    def start(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Starts the copies to the device; the results, for the current stream to use, and their event."""


class CudaTransfers:
    """Copies to a GPU on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def page_locked(self, num_bytes: int) -> Tensor:
        """Page-locked memory, uint8."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def start(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Starts the copies; the current stream waits for them, the host does not."""
        training = torch.cuda.current_stream(self._device)
        arrived = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            copies = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
            arrived.record(self._stream)
        training.wait_event(arrived)
        for copy in copies:
            copy.record_stream(training)  # its memory is not given to a later copy before training is done with it
        return copies, arrived


class _Slot:
    """A page-locked buffer, and the event after which it may be written."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.copied: Any = None


class Feeder:
    """Brings batches to one device. Not to be shared between threads."""

    def __init__(self, device: torch.device, transfers: Transfers | None = None) -> None:
        """`transfers`: how copies are made; by default as the device needs it, and not at all for a CPU."""
        if transfers is None and device.type == "cuda":
            transfers = CudaTransfers(device)
        self._device = device
        self._transfers = transfers
        self._slots = deque(_Slot() for _ in range(_SLOTS))

    def pieces(self, batch: Batch, micro_batch: int, most_rows: int | None = None) -> list[TorchBatch]:
        """The batch in pieces of `micro_batch` rows, the last one possibly smaller; as many as for `most_rows` rows.

        Processes that exchange weights or gradients have to do so equally often: one with fewer rows than others ends
        with a row that does not count.
        """
        rows = len(batch.inputs)
        arrays = [batch.inputs, batch.targets, *([] if batch.segments is None else [batch.segments])]
        inputs, targets, *others = self._moved([torch.from_numpy(array) for array in arrays])
        segments = others[0] if others else None
        pieces = []
        for part in _parts(rows, micro_batch):
            own = None if segments is None else segments[part]
            pieces.append(TorchBatch(inputs[part], targets[part], own, batch.source[part]))
        for _ in range(math.ceil((most_rows or rows) / micro_batch) - len(pieces)):
            nothing = torch.full_like(targets[:1], IGNORED)
            own = None if segments is None else segments[:1]
            pieces.append(TorchBatch(inputs[:1], nothing, own, batch.source[:1]))
        return pieces

    def numbers(self, *values: float) -> Tensor:
        """A few numbers as a float64 tensor on the device."""
        return self._moved([torch.tensor(values, dtype=torch.float64)])[0]

    def _moved(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors on the device: the same ones on a CPU."""
        if self._transfers is None:
            return tensors
        self._slots.rotate(-1)
        slot = self._slots[-1]
        if slot.copied is not None:
            slot.copied.synchronize()
        stops = [0]
        for tensor in tensors:
            stops.append(stops[-1] + math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT)
        if slot.buffer is None or len(slot.buffer) < stops[-1]:
            slot.buffer = self._transfers.page_locked(stops[-1])
        staged = []
        for tensor, start in zip(tensors, stops, strict=False):
            own = slot.buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            staged.append(own.copy_(tensor))
        copies, slot.copied = self._transfers.start(staged)
        return copies


def _parts(rows: int, size: int) -> Iterator[slice]:
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
