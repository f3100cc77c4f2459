"""The loss of a model on each document by itself: what perplexity-chosen sub-corpora are chosen by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from perennial.data.packing import IGNORED
from perennial.objectives.next_token import target_nats

Ids = NDArray[np.int64]

_BLOCK_DOCUMENTS = 256
"""Documents that are held and put in order of length at once, so that rows of one batch are about equally long."""


class _Batch:
    """What an objective reads of a batch."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.inputs, self.targets = inputs, targets
        self.segments = self.source = None


def document_losses(
    model: Any,
    documents: Iterable[Ids],
    *,
    length: int,
    separator_id: int,
    device: torch.device,
    batch_tokens: int = 8192,
) -> Iterator[tuple[float, int]]:
    """(nats, tokens) of each document, in order: every token is predicted once, the first from the separator.

    A document longer than `length` is read in rows of that many tokens, each with the token before it as context.
    """
    block: list[Ids] = []
    for ids in documents:
        block.append(ids)
        if len(block) == _BLOCK_DOCUMENTS:
            yield from _of_block(model, block, length, separator_id, device, batch_tokens)
            block = []
    yield from _of_block(model, block, length, separator_id, device, batch_tokens)


def _of_block(
    model: Any, block: list[Ids], length: int, separator_id: int, device: torch.device, batch_tokens: int
) -> Iterator[tuple[float, int]]:
    rows = [(owner, start) for owner, ids in enumerate(block) for start in range(0, len(ids), length)]
    rows.sort(key=lambda row: min(length, len(block[row[0]]) - row[1]))
    nats = np.zeros(len(block))
    first = 0
    while first < len(rows):
        widest = max(1, batch_tokens // length)
        chosen = rows[first : first + widest]
        width = max(min(length, len(block[owner]) - start) for owner, start in chosen)
        inputs = np.full((len(chosen), width), separator_id, np.int64)
        targets = np.full((len(chosen), width), IGNORED, np.int64)
        for row, (owner, start) in enumerate(chosen):
            part = block[owner][start : start + length]
            targets[row, : len(part)] = part
            inputs[row, 0] = block[owner][start - 1] if start else separator_id
            inputs[row, 1 : len(part)] = part[:-1]
        batch = _Batch(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device))
        sums = target_nats(model, batch).view(len(chosen), width).sum(dim=1)
        np.add.at(nats, [owner for owner, _ in chosen], sums.double().cpu().numpy())
        first += len(chosen)
    yield from zip(nats.tolist(), map(len, block), strict=True)
