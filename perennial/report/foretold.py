"""What a plan foretold of a run beside what the run measured: each number, how far off, and why some have no answer.

The recipe in the run folder carries the predictions (`core.predictions`). Compared is only what is of the same thing:
losses on the same validation text, times on the device that was planned for, and nothing of a run that is another one
than was planned, or that has not reached its end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from perennial.core.amounts import human, human_bytes, human_seconds
from perennial.core.predictions import (
    COMPUTING,
    PredictedLoss,
    PredictedNumber,
    Predictions,
    changed_parts,
)
from perennial.core.settings import check
from perennial.report.runs import RECIPE, Run, progress_text, read_run

NATS, FLOPS = "nats/token", "FLOPs"
_NAMES = {"old": "Old loss", "new": "New loss", "all": "Loss"}


@dataclass(frozen=True)
class Foretold:
    """One number that was predicted, and what came of it."""

    name: str
    unit: str
    predicted: PredictedNumber
    measured: float | None
    """None where it was not measured, or not of the same thing."""
    why_not: str = ""
    """Why it cannot be compared; '' where it can."""
    side: str = ""
    """Of a loss: 'old', 'new' or 'all'."""

    @property
    def difference(self) -> float | None:
        """Measured over predicted, less 1."""
        if self.measured is None or self.why_not or self.predicted.value == 0:
            return None
        return self.measured / self.predicted.value - 1

    @property
    def is_inside(self) -> bool | None:
        """Whether what was measured lies in the interval; None without one, or without a comparison."""
        low, high = self.predicted.low, self.predicted.high
        if self.measured is None or self.why_not or low is None or high is None:
            return None
        return low <= self.measured <= high

    def text(self, value: float) -> str:
        """A value of this number for people."""
        if self.unit == "s":
            return human_seconds(value) if value >= 10 else f"{value:.2g} s"
        if self.unit == "bytes":
            return human_bytes(value)
        if self.unit == "tokens":
            return human(value)
        return f"{value:.3f}" if self.unit == NATS else f"{value:.3g}"

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "unit": self.unit,
            "predicted": self.predicted.model_dump(mode="json", exclude={"corpora"}),
            "measured": self.measured,
            "difference": self.difference,
            "is_inside": self.is_inside,
            "why_not": self.why_not,
        }


@dataclass(frozen=True)
class Outcome:
    """All that was foretold of a run."""

    predictions: Predictions | None
    """None where they cannot be read."""
    numbers: tuple[Foretold, ...]
    notes: tuple[str, ...]
    """What holds of all of them, such as that the recipe was changed."""

    def line(self) -> str:
        """'old loss 4.512 [4.4, 4.6], measured 4.540 (+0.6%, inside); time ...', or why nothing is compared."""
        parts = []
        for one in self.numbers:
            if one.difference is None or one.measured is None:
                continue
            place = {True: ", inside", False: ", outside", None: ""}[one.is_inside]
            low, high = one.predicted.low, one.predicted.high
            interval = f" [{one.text(low)}, {one.text(high)}]" if low is not None and high is not None else ""
            parts.append(
                f"{one.name} {one.text(one.predicted.value)}{interval}, {one.text(one.measured)} "
                f"({one.difference:{'+.1%' if abs(one.difference) < 1 else '+.0%'}}{place})"
            )
        return "; ".join([*parts, *self.notes])


def outcome(run: Run) -> Outcome | None:
    """What was foretold of a run and what it measured; None for a run whose recipe has no predictions."""
    found, problem = _predictions(run.recipe)
    if problem:
        return Outcome(None, (), (problem,))
    if found is None:
        return None
    changed = changed_parts(found, run.resolved) if run.resolved else []
    others = [part for part in changed if part != COMPUTING]
    notes = []
    if others:
        notes.append(
            f"the recipe was changed after it was planned ({', '.join(others)}): the predictions are of another run, "
            "and nothing is compared"
        )
    elif changed:
        notes.append(
            "how the run is computed was changed after it was planned (micro-batch, evaluations or what the backward "
            "pass keeps): time and memory are not compared"
        )
    if not run.finished:
        notes.append(f"{progress_text(run)}: what depends on the end is not compared")
    why = "the recipe was changed" if others else "" if run.finished else "the run has not reached its end"
    numbers = [_loss(run, side, loss, why) for side, loss in found.losses.items()]
    return Outcome(found, (*numbers, *_costs(run, found, why, bool(others), bool(changed))), tuple(notes))


def outcome_of(folder: Path) -> Outcome | None:
    """The same of a run folder, whose records are read only where its recipe has predictions. Raises UserError."""
    recipe = folder / RECIPE
    if not recipe.is_file() or "predictions" not in recipe.read_text(encoding="utf-8"):
        return None
    return outcome(read_run(folder))


def _predictions(recipe: str) -> tuple[Predictions | None, str]:
    """(those in the text of a recipe, what is wrong with them)."""
    try:
        data = yaml.safe_load(recipe) or {}
    except yaml.YAMLError as error:
        return None, f"the recipe cannot be read: {str(error).splitlines()[0]}"
    block = data.get("predictions") if isinstance(data, dict) else None
    if block is None:
        return None, ""
    found, problems = check(Predictions, block, ("predictions",))
    if problems:
        return None, f"the predictions of the recipe cannot be read: {problems[0].text({})}"
    return found, ""


def _loss(run: Run, side: str, predicted: PredictedLoss, why: str) -> Foretold:
    measured = [run.after[corpus] for corpus in predicted.corpora if corpus in run.after]
    known = [loss.nats_per_token for loss in measured if loss.nats_per_token is not None]
    value = sum(known) / len(known) if known and len(known) == len(predicted.corpora) else None
    if not why and value is None:
        missing = [corpus for corpus in predicted.corpora if corpus not in run.after]
        why = f"not measured on {', '.join(missing) or 'all of its text'}"
    if not why:
        why = _other_text(run, predicted)
    name = f"{_NAMES[side]} ({', '.join(predicted.corpora)})"
    return Foretold(name, NATS, predicted, value, why, side)


def _other_text(run: Run, predicted: PredictedLoss) -> str:
    """Why a loss is not of the text that was predicted; '' when it is."""
    for corpus, tokens in predicted.corpora.items():
        measured = run.after[corpus].tokens
        if tokens is not None and measured and measured != tokens:
            return (
                f"predicted for {tokens:,} validation tokens of {corpus}, measured on {measured:,}: other documents, "
                "whose loss may differ by several percent"
            )
    return ""


def _costs(run: Run, predictions: Predictions, why: str, is_other: bool, is_changed: bool) -> list[Foretold]:
    costs = predictions.costs
    other_run = "the recipe was changed" if is_other else ""
    computing = other_run or ("how it is computed was changed" if is_changed else "")
    machine = computing or _other_machine(run, predictions)
    seconds = run.wall_seconds if run.finished else None
    memory = run.training["memory_bytes"][np.isfinite(run.training["memory_bytes"])]
    peak = float(memory.max()) if len(memory) else None
    found = [
        Foretold("Tokens", "tokens", costs.tokens, float(run.tokens), why),
        Foretold(FLOPS, "", costs.flops, run.flops, why),
        Foretold("Time", "s", costs.seconds, seconds, machine or why),
    ]
    if costs.memory_bytes is not None:
        words = machine or ("" if peak is not None else "not measured")
        found.append(Foretold("Memory per device", "bytes", costs.memory_bytes, peak, words))
    if costs.energy_kwh is not None:
        found.append(Foretold("Energy, kWh", "", costs.energy_kwh, None, "a run does not measure it"))
    return found


def _other_machine(run: Run, predictions: Predictions) -> str:
    """Why times and memory are not those of the device that was planned for; '' when they are."""
    costs = predictions.costs
    names = _devices(run.environment)
    planned = f"{costs.devices} x {costs.device}"
    if not any(_words(costs.device) <= _words(name) for name in names):
        return f"planned for {planned}, ran on {', '.join(names)}"
    if run.processes != costs.devices:
        return f"planned for {planned}, ran in {run.processes} process{'es' * (run.processes > 1)}"
    return ""


def _devices(environment: Mapping[str, Any]) -> Sequence[str]:
    """Names of the accelerators that a run saw, or 'cpu'."""
    return list(dict.fromkeys(str(d.get("name", "")) for d in environment.get("devices") or [])) or ["cpu"]


def _words(name: str) -> set[str]:
    """The words of a device's name, of which drivers write more than data sheets: 'NVIDIA A100-SXM4-40GB'."""
    return set(re.findall(r"[a-z0-9]+", name.lower()))
