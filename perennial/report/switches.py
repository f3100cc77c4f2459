"""What the losses did at each switch of data within a run: before, at the spike and in the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from perennial.report.runs import Evaluation, Run, Stage, read_run


@dataclass(frozen=True)
class Switch:
    """One corpus at one switch; losses in one unit."""

    stage: str
    """The stage that begins with it."""
    corpus: str
    tokens: int
    """Of the run, at the switch."""
    before: float
    """At the last evaluation before the switch."""
    highest: float
    """At the highest evaluation of the stage that begins with it."""
    highest_after: int
    """Tokens from the switch to that."""
    end: float
    """At the last evaluation of that stage."""

    @property
    def spike(self) -> float:
        """How far the loss went above where it was; negative when it only fell."""
        return self.highest - self.before

    @property
    def left(self) -> float:
        """The change over the whole stage."""
        return self.end - self.before


def switches(run: Run, unit: str) -> Iterator[Switch]:
    """Every corpus at every switch of a run, in order, in 'nats_per_token' or 'bits_per_byte'.

    A switch is where a stage draws from other corpora, or in other shares, than the one before it.
    """
    at = 0
    for before, stage in pairwise(run.stages):
        begin, at = at, at + before.tokens
        if _data(before) == _data(stage):
            continue
        earlier = [e for e in run.evaluations if begin < e.tokens <= at]
        later = [e for e in run.evaluations if at < e.tokens <= at + stage.tokens]
        for corpus in earlier[-1].corpora if earlier else ():
            known = [(e.tokens - at, nats) for e in later if (nats := _loss(e, corpus, unit)) is not None]
            left_at = _loss(earlier[-1], corpus, unit)
            if known and left_at is not None:
                after, highest = max(known, key=lambda one: one[1])
                yield Switch(stage.name, corpus, at, left_at, highest, after, known[-1][1])


def greatest(folder: Path) -> str:
    """One line on the highest spike at a switch in the run of a folder; '' for a run without switches or spikes."""
    found = max(switches(read_run(folder), "nats_per_token"), key=lambda switch: switch.spike, default=None)
    if found is None or found.spike <= 0:
        return ""
    return (
        f"highest spike at a switch of data: '{found.corpus}' rose by {found.spike:.3f} nats per token after the "
        f"switch to '{found.stage}'; at the end of that stage {found.left:+.3f}"
    )


def _data(stage: Stage) -> dict[tuple[str, str], float]:
    """What a stage draws from: (corpus, role) -> share."""
    return {(s.fingerprint or s.name, s.role): round(s.weight, 6) for s in stage.sources}


def _loss(evaluation: Evaluation, corpus: str, unit: str) -> float | None:
    measured = evaluation.corpora.get(corpus)
    return None if measured is None else measured.in_unit(unit)
