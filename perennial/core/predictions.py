"""What a plan predicted of a run: the `predictions` of its recipe, and how a run that is another one is noticed.

A planned recipe carries them, so that the run folder has them as well, whatever way the run is started, and they cannot
come apart from what they are of. `fingerprints` say of which run they are: a recipe that was edited after it was
planned has others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from perennial.core.settings import Settings, stable_hash

VERSION = 1
COMPUTING = "computing"
"""The part of a run that decides about time and memory alone."""

Side = Literal["old", "new", "all"]
"""Of a loss: the text that was there before, the new one, or all text of a new model."""


class PredictedNumber(Settings):
    """One number with the interval that holds 80% of outcomes, where there is one, and where it is from."""

    value: float = Field(allow_inf_nan=False)
    low: float | None = Field(default=None, allow_inf_nan=False)
    high: float | None = Field(default=None, allow_inf_nan=False)
    basis: str
    """'own runs: law through 9 runs', 'published: ...', 'counted: ...'."""

    @model_validator(mode="after")
    def _ordered(self) -> PredictedNumber:
        if (self.low is None) != (self.high is None):
            raise ValueError("an interval has both 'low' and 'high'")
        if self.low is not None and self.high is not None and not self.low <= self.value <= self.high:
            raise ValueError(f"low {self.low:g}, value {self.value:g} and high {self.high:g} must be in this order")
        return self


class PredictedLoss(PredictedNumber):
    """A loss at the end in nats per token, the mean over corpora."""

    corpora: dict[str, int | None]
    """Name -> validation tokens of the corpus that the prediction rests on; None: as many as the recipe measures."""


class PredictedShare(Settings):
    """Both losses at one share of old text."""

    share: float = Field(ge=0, le=1)
    old: tuple[float, float, float] | None = None
    """(value, low, high) in nats per token; None: cannot be known."""
    new: tuple[float, float, float] | None = None


class PredictedCosts(Settings):
    """What the run will take; None: not asked for, or not known."""

    tokens: PredictedNumber
    flops: PredictedNumber
    seconds: PredictedNumber
    """Wall time with evaluations."""
    memory_bytes: PredictedNumber | None = None
    """Of each device."""
    energy_kwh: PredictedNumber | None = None
    device: str
    """Name of a device in the planner's table, or 'cpu'."""
    devices: int = Field(ge=1)


class Predictions(Settings):
    """What `perennial plan` predicted of the run of a recipe."""

    version: int
    fingerprints: dict[str, str]
    """Part of the run -> hash of all that decides it, as `fingerprints` gives them."""
    losses: dict[Side, PredictedLoss]
    """Those that could be told."""
    costs: PredictedCosts
    curve: list[PredictedShare] = []
    """The trade-off between old and new text over the shares that were compared."""
    unknown: list[str] = []
    """What the plan could not tell, and why."""

    @field_validator("version")
    @classmethod
    def _known(cls, version: int) -> int:
        if version != VERSION:
            raise ValueError(
                f"predictions of version {version}; this version of Perennial reads version {VERSION}. Plan again, or "
                "leave out the whole block 'predictions': the run does not need it"
            )
        return version


def fingerprints(resolved: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of what decides a run, part by part, from the content of its resolved.json.

    Left out is what predictions do not depend on: names, seeds, where things lie, and a precision that the machine
    chooses.
    """
    parent, batch = resolved.get("parent"), resolved.get("batch") or {}
    stages, corpora = resolved.get("stages") or [], resolved.get("corpora") or {}
    parts = {
        "model": [parent["checkpoint"] if parent else None, resolved.get("model")],
        "text": [
            {name: [facts["fingerprint"], facts.get("role")] for name, facts in corpora.items()},
            [[_source(source) for source in stage["sources"]] for stage in stages],
        ],
        "stages": [[*(stage.get(k) for k in _OF_STAGES), _checkpoints(stage)] for stage in stages],
        "batch": [batch.get("sequences"), batch.get("sequence_length"), *(resolved.get(k) for k in _OF_UPDATES)],
        "evaluation": resolved.get("evaluation_tokens"),
        COMPUTING: [batch.get("micro_batch"), *(resolved.get(k) for k in _OF_COMPUTING)],
    }
    return {name: stable_hash(part)[:16] for name, part in parts.items()}


_OF_STAGES = ("tokens", "sequences", "schedule", "optimizer", "optimizer_state", "objective", "pull", "new_rows")
_OF_UPDATES = ("clip", "document_mask", "communication")
_OF_COMPUTING = (
    *("compile", "activation_checkpointing", "parallel"),
    *("evaluation_every_tokens", "checkpoint_every_tokens"),
)


def _source(source: Mapping[str, Any]) -> list[Any]:
    return [source["name"], source["fingerprint"], source["weight"], source["role"]]


def _checkpoints(stage: Mapping[str, Any]) -> list[Any]:
    """Of further models that the stage reads, such as teachers."""
    return [model.get("checkpoint") for model in stage.get("models") or []]


def changed_parts(predictions: Predictions, resolved: Mapping[str, Any]) -> list[str]:
    """The parts of a run that are not what was planned."""
    now = fingerprints(resolved)
    return [name for name, value in now.items() if predictions.fingerprints.get(name) != value]
