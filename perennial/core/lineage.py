"""Lineage: what a checkpoint remembers of how it was made, from its first ancestor to now.

Stored as `perennial/lineage.json` inside the checkpoint folder. One `StageRecord` per stage of training, oldest first,
across all runs that led here; the evaluation is that of the last run, before and after.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perennial.core.errors import UserError
from perennial.core.files import read_json
from perennial.core.settings import Settings, check, raise_problems

FORMAT = 1
STATE_FOLDER = "perennial"
LINEAGE_FILE = "lineage.json"


class StageRecord(Settings):
    """One stage as it really went; a stage that is still going on is recorded up to its checkpoint."""

    run: str
    stage: str
    recipe_hash: str
    parent: str | None
    """Id of the checkpoint that the stage's run started from; None when it started from random weights."""
    seed: int
    tokens: int
    """Target tokens trained on in this stage."""
    complete: bool
    """False when the checkpoint was taken in the middle of the stage."""
    flops: float
    seconds: float
    """Wall time spent training (forward, backward, update); both include updates that a rollback threw away."""
    sequence_length: int
    batch_tokens: int
    micro_batch: int | None = None
    clip: float | None = 1.0
    document_mask: bool = False
    precision: str
    schedule: dict[str, Any]
    rate_start: float
    rate_peak: float
    rate_end: float
    """Learning rate of the last update that was made."""
    optimizer: dict[str, Any]
    objective: dict[str, Any]
    sources: list[dict[str, Any]]
    """SourceSpecs with the `rows`, `tokens` and `epochs` drawn, and the `skipped` draws, which only `rows` counts."""
    skipped_rows: list[tuple[int, int]] = []
    """Stretches of rows of the stage passed over after a loss spike."""


class Lineage(Settings):
    """Everything a continuation needs to know about a checkpoint."""

    format: int = FORMAT
    checkpoint: str
    """Id: the first 16 hex digits of the sha256 over the weight files."""
    stages: list[StageRecord]
    evaluation: dict[str, Any] = {}
    """{'before': {corpus: measures}, 'after': {...}} of the last run; 'base' holds the parent's own numbers."""
    corpora: dict[str, dict[str, Any]] = {}
    """Every corpus ever consumed: name -> {path, fingerprint, tokenizer}."""
    environment: dict[str, Any] = {}

    @property
    def tokens(self) -> int:
        """Tokens trained on since the first ancestor."""
        return sum(s.tokens for s in self.stages)

    @property
    def flops(self) -> float:
        """Training FLOPs spent since the first ancestor."""
        return sum(s.flops for s in self.stages)

    @property
    def rate(self) -> float:
        """The learning rate at which training stopped."""
        return self.stages[-1].rate_end if self.stages else 0.0

    @property
    def peak(self) -> float:
        """The highest learning rate that this model ever saw."""
        return max((s.rate_peak for s in self.stages), default=0.0)

    def runs(self) -> list[list[StageRecord]]:
        """The stages grouped by run, oldest first."""
        groups: list[list[StageRecord]] = []
        for stage in self.stages:
            if groups and groups[-1][0].run == stage.run and groups[-1][0].recipe_hash == stage.recipe_hash:
                groups[-1].append(stage)
            else:
                groups.append([stage])
        return groups


def read(checkpoint: Path) -> Lineage:
    """The lineage of a checkpoint folder. Raises UserError when it has none or another format."""
    path = checkpoint / STATE_FOLDER / LINEAGE_FILE
    if not path.is_file():
        raise UserError(
            f"{checkpoint}: this checkpoint has no lineage ({STATE_FOLDER}/{LINEAGE_FILE}), so its data, learning rate "
            "and compute are unknown, and this version continues only checkpoints that have one."
        )
    data = read_json(path, "lineage")
    if data.get("format") != FORMAT:
        raise UserError(f"{path}: format {data.get('format')!r}; this version of Perennial reads format {FORMAT}")
    lineage, problems = check(Lineage, data)
    raise_problems(problems, str(path))
    assert lineage is not None
    return lineage


def checkpoints_of(run: Path) -> list[Path]:
    """The finished checkpoints of a run folder, oldest first."""
    folder = run / "checkpoints"
    found = [p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name))


def newest_checkpoint(path: Path) -> Path:
    """`path` when it is a checkpoint, else the newest checkpoint of the run folder `path`. Raises UserError."""
    if (path / "config.json").is_file() or (path / STATE_FOLDER / LINEAGE_FILE).is_file():
        return path
    found = checkpoints_of(path)
    if not found:
        what = (
            "no such folder" if not path.exists() else "neither a checkpoint (config.json) nor a run with checkpoints"
        )
        raise UserError(f"{path}: {what}")
    return found[-1]
