"""A number of a plan with where it comes from: own runs, a published law by its name, or a default."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["own runs", "published", "default", "given", "counted", "assumed", "unknown"]
"""'given': by the user or the recipe that was asked for; 'counted': from files or in closed form; 'unknown': the data
cannot tell, and the value is None."""


@dataclass(frozen=True)
class Number:
    """One number of a plan."""

    name: str
    value: float | str | None
    unit: str
    kind: Kind
    source: str

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @property
    def text(self) -> str:
        """'2.31 nats/token', or 'cannot know'."""
        if self.value is None:
            return "cannot know"
        value = self.value if isinstance(self.value, str) else f"{self.value:.4g}"
        return f"{value} {self.unit}".strip()
