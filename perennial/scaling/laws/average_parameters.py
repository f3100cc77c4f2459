"""Loss of a model that grows or is pruned while it trains: Chinchilla's law of its average size.

Formula: L = E + A / Nbar^alpha + B / D^beta, Nbar = (1 / D) * integral of N(t) dt over the training tokens: the mean
    number of active parameters (`average`). Compute is 6 Nbar D; L nats per token.
Source: Jin et al. 2025, "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense
    Scaling Laws", arXiv 2501.12486, Eq. 3; pruning between 25% and 75% of the compute is close to the best.
Limits: weights that are pruned or added gradually, not all at the very end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from perennial.core.errors import UserError
from perennial.scaling import two_terms
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column

_AVERAGE = "average_parameters"


class AverageParameters(Law):
    """Five coefficients, as of `chinchilla`; one fit for dense, sparse and growing models."""

    INPUTS: ClassVar[tuple[Input, ...]] = (
        Input(_AVERAGE, "parameters", "active parameters, averaged over the training tokens"),
        two_terms.TOKENS,
    )
    TARGET: ClassVar[Input] = two_terms.LOSS
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        two_terms.IRREDUCIBLE,
        Coefficient("A", "nats/token", 0.0, np.inf, True, "weight of the size term", ("alpha", _AVERAGE)),
        two_terms.DATA_WEIGHT,
        two_terms.SIZE_EXPONENT,
        two_terms.DATA_EXPONENT,
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
            "inputs": {_AVERAGE: (2e7, 5e9), "tokens": (5e8, 2e11)},
        },
    ]

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """E + A / Nbar^alpha + B / D^beta."""
        size, data = two_terms.terms(_renamed(inputs), coefficients)
        return coefficients["E"] + size + data

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> dict[str, np.ndarray]:
        """By all five."""
        return two_terms.gradient(_renamed(inputs), coefficients)

    def starts(self, table: Columns) -> list[Coefficients]:
        """As for `chinchilla`."""
        return [*two_terms.starts(_renamed(table))]

    def refusal(self, table: Columns) -> str | None:
        """As for `chinchilla`."""
        return two_terms.refusal(_renamed(table))

    def compute(self, inputs: Columns) -> np.ndarray:
        """6 Nbar D."""
        return two_terms.compute(_renamed(inputs))


def average(points: Sequence[tuple[float, float]]) -> float:
    """Nbar of a run from (tokens trained, active parameters), straight lines between, first at 0 tokens.

    A jump is two points at the same tokens. Raises UserError for points out of order or fewer than two.
    """
    tokens, sizes = np.array(points, dtype=np.float64).reshape(-1, 2).T
    if len(tokens) < 2 or (np.diff(tokens) < 0).any() or tokens[-1] <= tokens[0]:
        raise UserError("the average size of a run needs two or more points (tokens, parameters), in order of tokens")
    return float(np.trapezoid(sizes, tokens) / (tokens[-1] - tokens[0]))


def _renamed(inputs: Columns) -> dict[str, np.ndarray]:
    return {**inputs, "parameters": column(inputs, _AVERAGE)}
