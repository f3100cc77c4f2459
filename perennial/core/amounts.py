"""Amounts with units: '2B tokens', '1e18 FLOPs', '3 h', '10%'. A bare number is never guessed at.

Multipliers K, M, B (or G) and T are powers of 1000 and stand before the unit; time is s, min, h or d; a share is a
percentage. Every amount prints back as a text that parses to the same value.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, GetCoreSchemaHandler
from pydantic_core import core_schema

from perennial.core.errors import nearest

_PATTERN = re.compile(r"^\s*([+-]?[\d_,]*\.?\d+(?:[eE][+-]?\d+)?|[+-]?[\d_,]+\.)\s*([A-Za-z%]*)\s*([A-Za-z]*)\s*$")
_MULTIPLIERS = {"": 1.0, "K": 1e3, "k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
_UNITS = {
    **dict.fromkeys(("tokens", "token", "tok"), ("tokens", 1.0)),
    **dict.fromkeys(("flops", "flop"), ("flops", 1.0)),
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("seconds", 1.0)),
    **dict.fromkeys(("min", "minute", "minutes"), ("seconds", 60.0)),
    **dict.fromkeys(("h", "hour", "hours"), ("seconds", 3600.0)),
    **dict.fromkeys(("d", "day", "days"), ("seconds", 86400.0)),
    "%": ("share", 0.01),
}
_EXAMPLES = {"tokens": "'2B tokens'", "flops": "'1e18 FLOPs'", "seconds": "'3 h'", "share": "'10%'"}


@dataclass(frozen=True)
class Amount:
    """A number with its unit: 'tokens', 'flops', 'seconds' or 'share' (1.0 = 100%)."""

    value: float
    unit: str

    def __str__(self) -> str:
        """A text that parses back to this amount."""
        if self.unit == "share":
            return f"{self.value * 100:.12g}%"
        name = {"tokens": "tokens", "flops": "FLOPs", "seconds": "s"}[self.unit]
        return f"{self.value:.15g} {name}"

    def of(self, total: float) -> float:
        """This amount in the unit of `total`: a share is taken of it, anything else is returned as it is."""
        return self.value * total if self.unit == "share" else self.value

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )


def parse(text: Any, units: tuple[str, ...] = ("tokens", "flops", "seconds", "share")) -> Amount:
    """Reads an amount; ValueError when it has no unit, an unknown one, or one that is not in `units`."""
    wanted = " or ".join(_EXAMPLES[u] for u in units)
    if isinstance(text, Amount):
        amount = text
    else:
        match = _PATTERN.match(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"an amount with a unit is needed, such as {wanted}, not {text!r}")
        number = float(match[1].replace("_", "").replace(",", ""))
        amount = _with_unit(number, match[2], match[3], text, wanted)
    if amount.unit not in units:
        raise ValueError(f"{text!r} is in {amount.unit}; needed here: {wanted}")
    if not math.isfinite(amount.value) or amount.value < 0:
        raise ValueError(f"{text!r} is not a finite amount of 0 or more")
    return amount


def _with_unit(number: float, first: str, second: str, text: Any, wanted: str) -> Amount:
    if second:  # '2B tokens': multiplier, then unit
        if first not in _MULTIPLIERS or second.lower() not in _UNITS:
            raise ValueError(f"unit of {text!r} not understood; write it like {wanted}")
        unit, scale = _UNITS[second.lower()]
        return Amount(number * _MULTIPLIERS[first] * scale, unit)
    if first.lower() in _UNITS:
        unit, scale = _UNITS[first.lower()]
        return Amount(number * scale, unit)
    if first in _MULTIPLIERS:
        raise ValueError(f"{text!r} has no unit; write it like {wanted}")
    raise ValueError(f"unit {first!r} of {text!r} not understood; write it like {wanted}.{nearest(first, _UNITS)}")


def _parser(*units: str) -> BeforeValidator:
    return BeforeValidator(lambda value: parse(value, units))


Budget = Annotated[Amount, _parser("tokens", "flops", "seconds")]
"""How much to spend: tokens, FLOPs or time."""

Span = Annotated[Amount, _parser("tokens", "share")]
"""A stretch of training: tokens, or a share of the whole."""


def human(value: float, unit: str = "") -> str:
    """A short figure for people: 1234567 -> '1.23M'. Follows with the unit when one is given."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= limit:
            text = f"{value / limit:.3g}{letter}"
            break
    else:
        text = f"{value:.3g}"
    return f"{text} {unit}".strip()


def human_seconds(seconds: float) -> str:
    """A duration for people: '42 s', '3 min 20 s', '5 h 12 min', '2 d 3 h'."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def human_bytes(num_bytes: float) -> str:
    """A size for people, in powers of 1024: '1.5 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(num_bytes) < 1024 or unit == "TiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError("unreachable")
