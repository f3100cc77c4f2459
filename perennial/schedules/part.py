"""A stretch of another schedule, so that stages with other data or objectives share one curve.

Formula: with whole = T / (last - first), rate(t) = R(first * whole + t, whole), R the other schedule; t, T (horizon) in
    tokens, first and last shares of the whole. Parts that follow each other meet: one ends at R(last * whole) and the
    next starts there.
Source: none of its own. It is what switching data under a running schedule needs: Parmar et al. 2024, "Reuse, Don't
    Retrain", arXiv 2407.07263 (second blend from a fifth of the rate on); Gao et al. 2025, MeCo, arXiv 2501.01956
    (metadata left out in the last tenth).
Limits: lengths that the other schedule has in tokens are tokens of the whole, not of the part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import field_validator, model_validator

from perennial.core import plugins
from perennial.core.amounts import Amount, Span
from perennial.schedules.base import Piece, Schedule

_START, _END = Amount(0.0, "share"), Amount(1.0, "share")


class Part(Schedule):
    """From `first` to `last` of the way through the schedule `of`."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"of": {"name": "cosine", "peak": 1e-3}, "last": "71%"},
        {"of": {"name": "cosine", "peak": 1e-3}, "first": "71%"},
        {"of": {"name": "wsd", "peak": 1e-3, "warmup": "10%"}, "first": "5%", "last": "95%"},
        {"of": {"name": "wsd_s", "peak": 1e-3, "cycles": 3}, "first": "20%", "last": "80%"},
        {"of": {"name": "constant", "peak": 1e-3}, "first": "20%", "last": "80%"},
    ]

    of: Any
    """The other schedule: name and settings."""
    first: Span = _START
    """Where the part begins, as a share of the whole."""
    last: Span = _END
    """Where it ends, as a share of the whole."""

    @field_validator("of")
    @classmethod
    def _built(cls, of: Any) -> Any:
        schedule, problems = plugins.build("schedules", of)
        if problems:
            raise ValueError("; ".join(".".join(map(str, (*p.loc, p.message))) for p in problems))
        return plugins.dump(schedule)

    @model_validator(mode="after")
    def _check(self) -> Part:
        for name, span in (("first", self.first), ("last", self.last)):
            if span.unit != "share" or span.value > 1:
                raise ValueError(f"{name} {span}: must be a share of the whole, up to 100%")
        if self.first.value >= self.last.value:
            raise ValueError(f"first {self.first} must be below last {self.last}")
        return self

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The other schedule; built once, because a rate is asked for at every update."""
        built, _ = plugins.build("schedules", self.of)
        assert isinstance(built, Schedule)
        return built

    def pieces(self, horizon: float) -> list[Piece]:
        """The phases of the other schedule that lie in the part, the outer ones cut."""
        whole = horizon / (self.last.value - self.first.value)
        begin, end = self.first.value * whole, self.last.value * whole
        inside = [p for p in self.schedule.pieces(whole) if min(p.stop, end) > max(p.start, begin)]
        starts = [0.0, *(piece.start - begin for piece in inside[1:])]
        return [
            Piece(piece.name, start, stop, _shifted(piece, begin, end))
            for piece, start, stop in zip(inside, starts, [*starts[1:], horizon], strict=True)
        ]

    def restarts(self, horizon: float) -> tuple[float, ...]:
        """Those of the other schedule that lie inside the part."""
        whole = horizon / (self.last.value - self.first.value)
        moved = (place - self.first.value * whole for place in self.schedule.restarts(whole))
        return tuple(place for place in moved if 0 < place < horizon)


def _shifted(piece: Piece, begin: float, end: float) -> Callable[[float], float]:
    """The rate of a piece by the position in the part; beyond a border by a rounding it is the border's."""
    first, last = max(piece.start, begin), min(piece.stop, end)
    return lambda t: piece.rate(min(max(begin + t, first), last if math.isfinite(last) else begin + t))
