"""What a law is: a formula from inputs to a target, with coefficients that a fit can find.

A law is a pure function of columns (one value per row, natural units: parameters, tokens, FLOPs, nats per token) and of
named coefficients. It knows nothing of tables, files or optimisers: `perennial.scaling.fitting.fit` finds the
coefficients of any law, and says when the rows cannot tell them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from perennial.core.settings import Settings

Columns = Mapping[str, np.ndarray]
"""One array of shape (rows,) per name; float64, but for labels such as the name of a curve."""

Coefficients = Mapping[str, float]
"""One number per coefficient, natural units."""


@dataclass(frozen=True)
class Input:
    """One column that a law reads."""

    name: str
    unit: str
    about: str
    optional: bool = False
    """Whether the law also predicts without it."""
    must_vary: bool = True
    """Whether a table in which it has one value throughout cannot identify the law."""


@dataclass(frozen=True)
class Coefficient:
    """One number that a fit finds, with the bounds outside of which it has no meaning."""

    name: str
    unit: str
    low: float
    high: float
    log: bool
    """Whether it is positive and found on a logarithmic scale."""
    about: str
    partner: tuple[str, str] | None = None
    """(exponent, input) when it stands in a term coefficient / input^exponent: the fit then works with the size of that
    term at the middle of the table, which is far better determined than the coefficient itself."""
    vanishing: Literal["", "low", "high"] = ""
    """The bound at which an effect is absent: an answer, not a sign that the rows cannot tell."""


class Law(Settings, ABC):
    """A formula with coefficients. Fields, if any, are settings that are chosen, not fitted."""

    INPUTS: ClassVar[tuple[Input, ...]]
    TARGET: ClassVar[Input]
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]]
    EXAMPLES: ClassVar[list[dict[str, Any]]]
    """For the conformance suite: {"settings": {...}, "coefficients": {...}, "inputs": {name: (low, high)}}."""
    PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {}
    """Coefficients from the literature: {name: {"coefficients": {...}, "source": "author year, arXiv id, place"}}."""
    RESIDUAL: ClassVar[Literal["log", "linear"]] = "log"
    """Whether a fit compares logarithms of the target (errors are relative) or the target itself."""
    IDENTIFIES: ClassVar[Literal["coefficients", "curve"]] = "coefficients"
    """Whether rows without noise determine the coefficients, or only what is predicted from them."""
    MIN_ROWS_PER_COEFFICIENT: ClassVar[float] = 1.0
    """Rows that a fit needs for each coefficient it finds; below, it says 'not identifiable'."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The columns this law reads; overridden where they depend on the settings."""
        return self.INPUTS

    @property
    def coefficients(self) -> tuple[Coefficient, ...]:
        """What a fit finds; overridden where it depends on the settings (one per domain, say)."""
        return self.COEFFICIENTS

    @abstractmethod
    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """The target for each row, shape (rows,), natural units. Rows may come in any order."""

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> Mapping[str, np.ndarray] | None:
        """Derivative of `predict` by each coefficient, shape (rows,) each; None leaves it to finite differences."""
        return None

    def starts(self, table: Columns) -> list[Coefficients]:
        """Where a search may begin, best guess first; `table` holds the inputs and the target."""
        return []

    def ridge(self) -> Mapping[str, tuple[float, float]]:
        """{coefficient: (value, strength)}: the objective grows by strength * (ln c - ln value)^2, or without ln."""
        return {}

    def refusal(self, table: Columns) -> str | None:
        """Why this table cannot identify the law, in a few words ('one model size'), or None."""
        return None

    def compute(self, inputs: Columns) -> np.ndarray | None:
        """What a prediction's distance from the table is measured by (FLOPs), shape (rows,); None: each input."""
        return None

    def draw(
        self, ranges: Mapping[str, tuple[float, float]], num_rows: int, generator: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Random inputs inside `ranges`, for tests: uniform in the logarithm where the range is positive."""
        drawn = {}
        for name, (low, high) in ranges.items():
            uniform = generator.random(num_rows)
            drawn[name] = low * (high / low) ** uniform if low > 0 else low + (high - low) * uniform
        return drawn


def published(law: Law, name: str) -> tuple[dict[str, float], str]:
    """(coefficients, source) of a published fit of this law."""
    entry = law.PUBLISHED[name]
    return dict(entry["coefficients"]), str(entry["source"])


def column(inputs: Columns, name: str) -> np.ndarray:
    """One input as float64, shape (rows,)."""
    return np.asarray(inputs[name], dtype=np.float64)


def first_missing(inputs: Columns, wanted: Sequence[Input]) -> str | None:
    """The name of the first needed column that is not there."""
    return next((i.name for i in wanted if not i.optional and i.name not in inputs), None)
