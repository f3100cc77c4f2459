"""What changes while a run trains: model, optimizer, and where it stands. Everything here is in a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from perennial.model.through_transformers import AnyModel

SECONDS = ("train", "data", "evaluate", "save")


@dataclass
class Progress:
    """Where a run stands. Plain numbers; JSON round-trips through `to_json` and `Progress(**data)`."""

    stage: int = 0
    """Index of the current stage."""
    row: int = 0
    """Next row of the stage's order; runs ahead of `stage_tokens` by the rows that were skipped after a spike."""
    stage_tokens: int = 0
    """Tokens trained on in this stage."""
    tokens: int = 0
    """Tokens trained on in this run."""
    updates: int = 0
    flops: float = 0.0
    sent_bytes: int = 0
    """Sent by each process to keep the workers' models together, as the communication counts it."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SECONDS, 0.0))
    """Wall time by what it was spent on: train, data, evaluate, save."""
    stage_seconds: float = 0.0
    stage_flops: float = 0.0
    """Spent in this stage, updates that a rollback threw away included; so are `flops` and the seconds."""
    rate: float = 0.0
    """Learning rate of the last update."""
    skipped_rows: list[list[int]] = field(default_factory=list)
    rollbacks: int = 0
    recent_losses: list[float] = field(default_factory=list)
    finished: list[dict[str, Any]] = field(default_factory=list)
    """Lineage records of this run's finished stages."""
    before: dict[str, Any] = field(default_factory=dict)
    """Evaluation at the start of the run."""
    latest: dict[str, Any] = field(default_factory=dict)
    """The newest evaluation: {'tokens', 'corpora'}."""

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON-ready data."""
        return asdict(self)


@dataclass
class TrainState:
    """The whole state of a run."""

    model: AnyModel
    optimizer: Any
    progress: Progress
