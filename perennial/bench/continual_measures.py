"""What the finished runs of a grid say: losses on the old and the new text, curves, cost; one value per seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from perennial.bench.continual_grid import EVENTS, Node, finished
from perennial.core import records
from perennial.core.statistics import Interval, mean_interval

EARLY = 0.3
"""Share of a run in which its first spike is looked for."""


@dataclass(frozen=True)
class Measured:
    """One finished run in numbers. Losses in nats per token on held-out text."""

    name: str
    seed: int
    before: dict[str, float]
    after: dict[str, float]
    curve: list[tuple[int, dict[str, float]]]
    """(tokens of the run, losses) at every evaluation."""
    bits_per_byte: dict[str, float]
    tokens: int
    flops: float
    seconds: float
    stage_ends: list[dict[str, float]]
    """Losses at the end of each stage."""

    def loss(self, corpora: Iterable[str]) -> float:
        """Mean over the corpora at the end; each counts the same."""
        values = [self.after[name] for name in corpora]
        return sum(values) / len(values)

    def area(self, corpora: Sequence[str]) -> float:
        """Mean height of the loss curve over the run (trapezoids), mean over the corpora."""
        total = 0.0
        for (x0, y0), (x1, y1) in zip(self.curve, self.curve[1:], strict=False):
            total += (x1 - x0) * sum((y0[name] + y1[name]) / 2 for name in corpora) / len(corpora)
        span = self.curve[-1][0] - self.curve[0][0] if self.curve else 0
        return total / span if span else self.loss(corpora)

    def spike(self, corpus: str) -> float:
        """How far the loss rose above its start early in the run; 0 when it did not."""
        until = self.curve[0][0] + EARLY * (self.curve[-1][0] - self.curve[0][0])
        return max(losses[corpus] for at, losses in self.curve if at <= until) - self.curve[0][1][corpus]


def measure(node: Node) -> Measured:
    """The numbers of a finished run, from its records."""
    done = finished(node.folder)
    assert done is not None, node.folder
    evaluations = records.read(node.folder / EVENTS, "evaluation")
    unique = {event["tokens"]: event for event in evaluations}
    last_of_stage = {event["stage"]: _nats(event["corpora"]) for event in evaluations}
    return Measured(
        name=node.run.name,
        seed=node.scale.seed,
        before=_nats(done["evaluation"].get("before", {})),
        after=_nats(done["evaluation"]["after"]),
        curve=[(at, _nats(event["corpora"])) for at, event in sorted(unique.items())],
        bits_per_byte={name: values["bits_per_byte"] for name, values in done["evaluation"]["after"].items()},
        tokens=done["tokens"],
        flops=done["flops"],
        seconds=sum(done["seconds"].values()),
        stage_ends=list(last_of_stage.values()),
    )


def _nats(corpora: dict[str, Any]) -> dict[str, float]:
    return {name: float(values["nats_per_token"]) for name, values in corpora.items()}


def over(value: float, whole: float) -> float:
    """The ratio, or 0 where there is nothing to divide by."""
    return value / whole if abs(whole) > 1e-9 else 0.0


@dataclass(frozen=True)
class Results:
    """All finished runs of one shift at one size: name -> seed -> numbers."""

    shift: str
    kind: str
    """'strong', 'weak', 'none' or 'stream'."""
    preset: str
    old: tuple[str, ...]
    new: tuple[str, ...]
    runs: dict[str, dict[int, Measured]]

    @property
    def corpora(self) -> tuple[str, ...]:
        """Old and new."""
        return (*self.old, *self.new)

    def has(self, *names: str) -> bool:
        """Whether at least one seed finished all of these runs."""
        return bool(self.seeds(*names))

    def seeds(self, *names: str) -> list[int]:
        """The seeds that finished all of these runs."""
        sets = [set(self.runs.get(name, {})) for name in names]
        return sorted(set.intersection(*sets)) if sets else []

    def effect(self, of: Callable[..., float], *names: str) -> Interval | None:
        """The mean over seeds, with its interval, of a number worked out from these runs of one seed."""
        values = [of(*(self.runs[name][seed] for name in names)) for seed in self.seeds(*names)]
        return mean_interval(values) if values else None

    def forgotten_share(self, run: Measured, reference: Measured, base: Measured) -> float:
        """What a run forgot as a share of what the reference forgot; 0 where that forgot nothing."""
        return over(self.forgetting(run, base), self.forgetting(reference, base))

    def forgetting(self, run: Measured, base: Measured) -> float:
        """Rise of the old loss over the base's."""
        return run.loss(self.old) - base.loss(self.old)

    def average(self, run: Measured) -> float:
        """Old and new loss, every corpus the same."""
        return run.loss(self.corpora)
