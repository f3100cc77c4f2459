"""What a schedule is: the learning rate at every position of a stage, counted in tokens.

A schedule is a row of pieces (warm-up, stable, decay ...), each with a start, a stop and its own curve. The update that
takes a stage from position p to p + b uses `rate(p + b)`; `rate(0)` is where the stage starts and `rate(horizon)` where
it ends, both exact, so that a stage which starts at its parent's last rate continues it without a jump.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainSerializer, PlainValidator

from perennial.core.amounts import Amount, human, parse
from perennial.core.errors import UserError
from perennial.core.settings import Settings

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A learning rate, 0 or more."""

Peak = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""The highest learning rate of a schedule."""


def _read_level(value: Any) -> float | Amount:
    if isinstance(value, Amount) or (isinstance(value, str) and "%" in value):
        return parse(value, ("share",))
    try:
        rate = float(value)
    except (TypeError, ValueError):
        rate = math.nan
    if isinstance(value, bool) or not math.isfinite(rate) or rate < 0:
        raise ValueError(f"must be a rate of 0 or more (3e-5, say) or a share of the peak ('10%', say), not {value!r}")
    return rate


Level = Annotated[
    float | Amount,
    PlainValidator(_read_level),
    PlainSerializer(lambda level: str(level) if isinstance(level, Amount) else level),
]
"""A learning rate below the peak: a rate (3e-5), or a share of the peak ('10%')."""

Shape = Literal["linear", "cosine", "sqrt", "exponential", "inverse", "inverse_square_root"]


@dataclass(frozen=True)
class Piece:
    """One phase of a schedule: where it lies, in tokens, and its rate at a position inside."""

    name: str
    start: float
    stop: float  # math.inf where the phase has no end of its own
    rate: Callable[[float], float]


class Schedule(Settings, ABC):
    """The learning rate of a stage: a pure function of the tokens consumed and of the stage's horizon."""

    EXAMPLES: ClassVar[list[dict[str, Any]]]

    @property
    def needs_horizon(self) -> bool:
        """Whether the rate depends on the length of the stage; if not, any horizon will do, even infinity."""
        return True

    @abstractmethod
    def pieces(self, horizon: float) -> list[Piece]:
        """The phases from position 0 on, without gaps; one of length 0 counts as absent.

        Raises UserError when they do not fit into the horizon.
        """

    def restarts(self, horizon: float) -> tuple[float, ...]:
        """The positions, in tokens, right after which the rate jumps on purpose."""
        return ()

    def rate(self, tokens: float, horizon: float) -> float:
        """The rate of the update that ends at position `tokens`; past the end, the last rate."""
        assert tokens >= 0, tokens
        present = self._present(horizon)
        for piece in present:
            if tokens <= piece.stop:
                return piece.rate(tokens)
        return present[-1].rate(present[-1].stop)

    def phases(self, horizon: float) -> list[tuple[str, float, float]]:
        """(name, start, stop), in tokens, of each phase. Raises UserError when they do not fit."""
        inside = (piece for piece in self._present(horizon) if piece.start < horizon)
        return [(piece.name, piece.start, min(piece.stop, horizon)) for piece in inside]

    def _present(self, horizon: float) -> list[Piece]:
        if self.needs_horizon and not (0 < horizon < math.inf):
            raise UserError(f"a schedule needs the length of its stage: more than 0 tokens and finite, not {horizon}")
        return [piece for piece in self.pieces(horizon) if piece.stop > piece.start]


def between(first: float, last: float, share: float, shape: Shape = "linear", timescale: float = 10.0) -> float:
    """The rate when `share` (0 to 1) of the way from `first` to `last` is done.

    With s = share, progress g(s) runs from 0 to 1 and rate = first * (1 - g) + last * g:
      linear       g = s
      cosine       g = (1 - cos(pi * s)) / 2
      sqrt         g = sqrt(s)
      inverse_square_root   g = h(s) / h(1), h(x) = 1 / sqrt(1 + timescale * x) - 1
    Two are straight lines on another scale, and need both rates above 0:
      exponential  linear in ln(rate)
      inverse      linear in 1 / rate
    """
    # Exact at both ends, whatever the rounding between: the next stage asserts that it starts where this one ended.
    if share <= 0 or share >= 1:
        return first if share <= 0 else last
    if shape == "exponential":
        return float(first ** (1 - share) * last**share)
    if shape == "inverse":
        return 1 / ((1 - share) / first + share / last)
    if shape == "linear":
        progress = share
    elif shape == "cosine":
        progress = (1 - math.cos(math.pi * share)) / 2
    elif shape == "sqrt":
        progress = math.sqrt(share)
    else:
        progress = _recede(share, timescale) / _recede(1, timescale)
    return first * (1 - progress) + last * progress


def _recede(x: float, timescale: float) -> float:
    return 1 / math.sqrt(1 + timescale * x) - 1


def glide(
    name: str, start: float, stop: float, first: float, last: float, shape: Shape = "linear", timescale: float = 10.0
) -> Piece:
    """A phase that leads from one rate to another by one of the shapes of `between`."""
    return Piece(name, start, stop, lambda t: between(first, last, (t - start) / (stop - start), shape, timescale))


def hold(name: str, start: float, stop: float, rate: float) -> Piece:
    """A phase at one rate."""
    return Piece(name, start, stop, lambda _: rate)


def warmup_then_decay(
    horizon: float, *, start: float, peak: float, final: float, warmup: Amount, shape: Shape
) -> list[Piece]:
    """Linear warm-up from `start` to `peak`, then one decay to `final` over the rest of the stage."""
    (warm,) = lengths(horizon, warmup=warmup)
    return [glide("warmup", 0, warm, start, peak), glide("decay", warm, horizon, peak, final, shape)]


def level(value: float | Amount, peak: float) -> float:
    """A `Level` as a rate."""
    return value.of(peak) if isinstance(value, Amount) else value


def is_share(*spans: Amount) -> bool:
    """Whether any of the spans is a share of the stage (a share of 0 needs no stage to be taken of)."""
    return any(span.unit == "share" and span.value > 0 for span in spans)


def lengths(horizon: float, **spans: Amount) -> list[float]:
    """The spans in tokens. Raises UserError that names them when they are longer together than the stage."""
    tokens = [span.of(horizon) if span.value else 0.0 for span in spans.values()]
    if _exceeds(sum(tokens), horizon):
        named = " and ".join(f"{name} {span}" for name, span in spans.items() if span.value)
        needed = human(sum(tokens), "tokens")
        raise UserError(f"{named}: {needed} do not fit into a stage of {human(horizon, 'tokens')}")
    return tokens


def check_shares(**spans: Amount) -> None:
    """Raises ValueError that names the spans when those given as shares add up to more than 100%."""
    shares = {name: span for name, span in spans.items() if is_share(span)}
    total = sum(span.value for span in shares.values())
    if _exceeds(total, 1.0):
        named = " and ".join(f"{name} {span}" for name, span in shares.items())
        raise ValueError(f"{named} make {Amount(total, 'share')} of the stage; 100% is all there is")


def check_order(**levels: float) -> None:
    """Raises ValueError that names two neighbours when rates given from low to high do not rise."""
    for (low, below), (high, above) in itertools.pairwise(levels.items()):
        if below > above:
            raise ValueError(f"{low} {below:g} is above {high} {above:g}; it must not be")


def check_reachable(shape_setting: str, shape: str, final: float) -> None:
    """Raises ValueError when a curve that never reaches 0 is asked to end there."""
    if shape in ("exponential", "inverse") and final <= 0:
        raise ValueError(f"{shape_setting} '{shape}' never reaches a final rate of 0; give a higher one, such as '10%'")


def _exceeds(total: float, whole: float) -> bool:
    return total > whole * (1 + 1e-9)  # shares such as 33.3% + 66.7% may miss their sum by a rounding
