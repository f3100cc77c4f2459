"""How a model is trained, as far as the memory of one process depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from perennial.core.layout import Layout

Precision = Literal["fp32", "bf16"]
"""'fp32', or 'bf16': autocast over fp32 weights."""
Device = Literal["cpu", "cuda"]
Checkpointing = Literal["none", "selective", "full"]

FP32, BF16, INT64 = 4, 2, 8
"""Bytes of a number."""
ALONE = Layout()
"""One process."""


@dataclass(frozen=True)
class Training:
    """How a model is trained, as far as the memory of one process depends on it."""

    rows: int
    """Rows of a micro-batch on one process."""
    sequence_length: int
    micro_batches: int = 1
    """Micro-batches of an update on one process."""
    precision: Precision = "fp32"
    device: Device = "cpu"
    optimizer_bytes: float | Mapping[str, float] = 8.0
    """Bytes of optimizer state per parameter (AdamW: 8), or that for each role."""
    chunk_tokens: int = 512
    """Tokens whose logits exist at once (the objective's)."""
    document_mask: bool = False
    checkpointing: Checkpointing = "none"
    new_rows: int | None = None
    """Rows of the tables that are all that is trained; None: the whole model is."""
    other_parameters: int = 0
    """Numbers in fp32 of models that are read and not trained (teachers, the parent that a pull draws to), and of the
    importance that a pull gives each weight."""
    teachers: int = 0
    """Models whose predictions are learned from; taken to be as wide as the one that is trained."""
    communication_bytes: int = 0
    """Bytes per parameter that are kept from round to round of a communication, such as DiLoCo's (8)."""
    layout: Layout = ALONE
    evaluates: bool = True
    """Whether validation losses are measured between updates."""
    copies_state: bool = False
    """Whether a checkpoint is written from a copy of weights and optimizer state while training goes on (CPU)."""
