"""WSD in cycles on one run: decay for a usable checkpoint, then straight back to the peak.

Formula: cycles end at E_1 < ... < E_n = T. Warm-up start + (peak - start) * t / W for t <= W, inside the first cycle.
    In cycle i: peak until E_i - D_i, then with s = (t - (E_i - D_i)) / D_i and the default shape "inverse"
    1 / (1/peak + (1/final - 1/peak) * s); the other shapes are those of `wsd`. Right after E_i the rate is the peak.
    t, W (warm-up), D_i (decay), E_i, T (horizon) in tokens.
Source: Wen et al. 2024, "Understanding Warmup-Stable-Decay Learning Rates: A River Valley Loss Landscape Perspective",
    arXiv 2410.05192 (WSD-Simplified): no re-warm, the decay is 10% of the cycle and ends at peak / 10.
Limits: the optimizer's state must be kept through the decays; the jumps at the cycle ends are declared in `restarts`.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, ClassVar, Literal

from pydantic import PlainSerializer, PlainValidator, model_validator

from perennial.core.amounts import Amount, Span, human, parse
from perennial.core.errors import UserError
from perennial.schedules.base import (
    Level,
    Peak,
    Piece,
    Rate,
    Schedule,
    check_order,
    check_reachable,
    check_shares,
    glide,
    hold,
    lengths,
    level,
)


def _read_cycles(value: Any) -> int | tuple[Amount, ...]:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, (list, tuple)) and value:
        ends = tuple(parse(end, ("tokens", "share")) for end in value)
        pairs = itertools.pairwise(ends)
        if not ends[0].value or any(a.unit == b.unit and a.value >= b.value for a, b in pairs):
            raise ValueError(f"the ends of the cycles must be above 0 and rise, not {', '.join(map(str, ends))}")
        return ends
    raise ValueError(f"must be a number of cycles, 1 or more, or their ends (['30%', '70%'], say), not {value!r}")


Cycles = Annotated[
    int | tuple[Amount, ...],
    PlainValidator(_read_cycles),
    PlainSerializer(lambda cycles: cycles if isinstance(cycles, int) else [str(end) for end in cycles]),
]


class WSDS(Schedule):
    """One branch, several usable checkpoints: the compute of every decay is kept."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"peak": 1e-3, "cycles": 3},
        {"peak": 1e-3, "cycles": 1, "decay": "100%", "warmup": "0%"},
        {"peak": 1e-3, "cycles": ["30%", "70%"], "warmup": "0%"},
        {"peak": 1e-3, "cycles": ["20K tokens", "100%"], "warmup": "5K tokens", "decay": "2K tokens", "final": 1e-5},
        {"peak": 1e-3, "cycles": 2, "decay_shape": "linear", "final": 0},
        {"peak": 1e-3, "cycles": 2, "decay": "0%"},
    ]

    peak: Peak
    """The rate of the stable stretches."""
    cycles: Cycles
    """How many cycles of equal length, or their ends (tokens, or shares of the stage); the last is the stage's end."""
    final: Level = Amount(0.1, "share")
    """Rate at the end of every cycle."""
    start: Rate = 0.0
    """Rate at position 0, when there is a warm-up."""
    warmup: Span = Amount(0.01, "share")
    """Length of the rise from start to peak: tokens, or a share of the stage."""
    decay: Span = Amount(0.1, "share")
    """Length of each decay: tokens, or a share of its cycle."""
    decay_shape: Literal["linear", "exponential", "sqrt", "inverse"] = "inverse"
    """The curve of each decay."""

    @model_validator(mode="after")
    def _check(self) -> WSDS:
        check_shares(warmup=self.warmup)
        check_shares(decay=self.decay)
        check_order(final=level(self.final, self.peak), peak=self.peak)
        check_reachable("decay_shape", self.decay_shape, level(self.final, self.peak))
        return self

    def ends(self, horizon: float) -> list[float]:
        """Where each cycle ends, in tokens; the last at the horizon. Raises UserError when they do not fit."""
        if isinstance(self.cycles, int):
            return [horizon * i / self.cycles for i in range(1, self.cycles)] + [horizon]
        ends = [end.of(horizon) for end in self.cycles]
        if any(b <= a for a, b in itertools.pairwise(ends)) or ends[-1] > horizon:
            listed = ", ".join(str(end) for end in self.cycles)
            raise UserError(f"cycles {listed} do not rise up to the end of a stage of {human(horizon, 'tokens')}")
        return ends if ends[-1] == horizon else [*ends, horizon]

    def restarts(self, horizon: float) -> tuple[float, ...]:
        """The end of every cycle but the last."""
        falls = self.decay.value > 0 and level(self.final, self.peak) < self.peak
        return tuple(self.ends(horizon)[:-1]) if falls else ()

    def pieces(self, horizon: float) -> list[Piece]:
        """Warm-up, then stable and decay of each cycle."""
        (warm,) = lengths(horizon, warmup=self.warmup)
        pieces = [glide("warmup", 0, warm, self.start, self.peak)]
        begin, final = 0.0, level(self.final, self.peak)
        for number, end in enumerate(self.ends(horizon), 1):
            decay = self.decay.of(end - begin)
            stable = max(begin, warm) if number == 1 else begin
            if stable + decay > end * (1 + 1e-9):
                taken = f"warmup {self.warmup} and decay {self.decay} do" if number == 1 else f"decay {self.decay} does"
                raise UserError(f"{taken} not fit into cycle {number}, which has {human(end - begin, 'tokens')}")
            turn = max(stable, end - decay)
            pieces.append(hold(f"stable {number}", stable, turn, self.peak))
            pieces.append(glide(f"decay {number}", turn, end, self.peak, final, self.decay_shape))
            begin = end
        return pieces
