"""The runs of a continual-learning experiment as data: what each trains on, from which parent, for which checks.

Two corpora: a base of T tokens on the old one; updates of T tokens on the new one; union, 2 T tokens on both from
random weights (what an update is measured against). A stream: one slice after another, T tokens each.
Runs that differ in one choice share everything else, the order of the data included, so that differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from perennial.core.settings import stable_hash

BATCH = {"sequences": 16, "sequence_length": 128}
OPTIMIZER = "muon"
"""Of both sides; far ahead of AdamW at this size (LOG.md)."""
EVALUATION_TOKENS = 32768
DENSE = "5%"
"""How often runs are evaluated whose early spike is measured; others at the quarters."""
MORE_EPOCHS = 8.0
"""Passes over a corpus that runs may make: small texts of one's own are no reason to refuse the experiment."""


@dataclass(frozen=True)
class Scale:
    """What all runs of one grid have in common."""

    preset: str
    tokens: int
    """Of the base and of one update."""
    peak: float
    seed: int
    evaluation_tokens: int = EVALUATION_TOKENS

    def updates(self, share: float) -> int:
        """`share` of the tokens as a whole number of updates, in tokens."""
        one = math.prod(BATCH.values())
        return max(1, round(self.tokens * share / one)) * one


@dataclass(frozen=True)
class Stage:
    """One stage of a planned run."""

    name: str
    tokens: int
    mixture: Mapping[str, float]
    """Corpus -> share; 'replay' for what the parent saw."""
    schedule: Mapping[str, Any]
    optimizer_state: str = "keep"


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid."""

    name: str
    label: str
    """What it is, for tables."""
    checks: frozenset[str]
    """Which checks need it: 'a' to 'j', 'bar', 'stream', 'sweep', 'table'."""
    stages: tuple[Stage, ...]
    parent: str | None = None
    """Name of the run that it continues."""
    dense: bool = False
    """Evaluated often, to see the early spike."""
    sequences: int = BATCH["sequences"]
    """Rows of an update."""
    choices: Mapping[str, Any] | None = None
    """Choices of `train.continuing.derive`: the stages are then what Perennial decides."""

    @property
    def tokens(self) -> int:
        """Training tokens of the run itself."""
        return sum(stage.tokens for stage in self.stages)


def key_of(
    run: PlannedRun, scale: Scale, corpora: Mapping[str, str], parent_key: str | None, seen: Collection[str] = ()
) -> str:
    """Eight hex digits that stand for everything that decides the run; `corpora`: name -> fingerprint."""
    return stable_hash(
        {
            "recipe": recipe(run, scale, corpora, None if parent_key is None else "parent", seen),
            "choices": dict(run.choices) if run.choices is not None else None,
            "parent": parent_key,
        }
    )[:8]


def recipe(
    run: PlannedRun, scale: Scale, corpora: Mapping[str, str], parent: str | None, seen: Collection[str] = ()
) -> dict[str, Any]:
    """The run as recipe data.

    corpora: name -> path of all corpora of the shift; parent: checkpoint; seen: corpora that ancestors trained on,
    which are evaluated without being named.
    """
    used = {name for stage in run.stages for name in stage.mixture if name in corpora}
    return {
        "name": run.name,
        "seed": scale.seed + (parent is not None),
        **({"parent": parent} if parent is not None else {"model": {"preset": scale.preset}}),
        "corpora": {name: path for name, path in corpora.items() if name in used},
        "stages": [
            {
                "name": stage.name,
                "budget": f"{stage.tokens} tokens",
                "mixture": dict(stage.mixture),
                "schedule": dict(stage.schedule),
                "optimizer": OPTIMIZER,
                "optimizer_state": stage.optimizer_state,
                "max_epochs": MORE_EPOCHS,
            }
            for stage in run.stages
        ],
        "batch": {**BATCH, "sequences": run.sequences},
        **measuring(run, scale, {name: path for name, path in corpora.items() if name not in used | set(seen)}),
    }


def measuring(run: PlannedRun, scale: Scale, further: Mapping[str, str]) -> dict[str, Any]:
    """When and on what a run is evaluated, `further` beside what it and its ancestors train on; its end is saved."""
    return {
        "evaluation": {
            "tokens": f"{scale.evaluation_tokens} tokens",
            "every": DENSE if run.dense else "25%",
            "corpora": dict(further),
        },
        "checkpoints": {"every": None, "keep": 1},
    }


# Schedules


def cosine(peak: float) -> dict[str, Any]:
    """From random weights, as the papers do: to a tenth of the peak."""
    return {"name": "cosine", "peak": peak, "final": peak / 10, "warmup": "5%"}


def straight(peak: float, *, warmup: str = "5%", final: float = 0.0) -> dict[str, Any]:
    """A line down to `final`."""
    return {"name": "linear", "peak": peak, "final": final, "warmup": warmup}


def rewarm(peak: float, final: float, *, warmup: str = "1%") -> dict[str, Any]:
    """Back up from where the parent was left, and down a cosine."""
    return {"name": "rewarm", "start": "parent", "peak": peak, "final": final, "warmup": warmup}


def flat(peak: float, *, warmup: str = "0%") -> dict[str, Any]:
    """One rate."""
    return {"name": "constant", "peak": peak, "warmup": warmup}
