"""Loss when data are repeated, with a penalty on epochs and on parameters per unique token.

Formula: L = E + A / N^alpha + B / D'^beta + P R^k (N / U)^m, R = D / U - 1 repeats, D' = U + U r (1 - exp(-R / r)).
    L nats per token, N parameters, D tokens, U unique tokens; r is 'repeat_decay', P 'penalty', k and m its exponents.
Source: the data term is that of Muennighoff et al. 2023, arXiv 2305.16264, Eq. 5; the penalty is fitted to the 182 and
    231 runs published with it, where it lowers the objective by 22 to 41%.
Limits: needs runs of many epochs, some of them too many; from runs of 8 epochs or fewer the penalty cannot be told.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from perennial.scaling import two_terms
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column


class RepeatPenalty(Law):
    """Nine coefficients; unlike `repeated` it has a best number of epochs."""

    INPUTS: ClassVar[tuple[Input, ...]] = (two_terms.PARAMETERS, two_terms.TOKENS, two_terms.UNIQUE)
    TARGET: ClassVar[Input] = two_terms.LOSS
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        *two_terms.MAIN,
        two_terms.REPEAT_DECAY,
        Coefficient(
            "penalty",
            "nats/token",
            1e-9,
            10.0,
            True,
            "loss added after one repeat at one parameter per token",
            vanishing="low",
        ),
        Coefficient("k", "1", 0.05, 3.0, False, "exponent of the number of repeats"),
        Coefficient("m", "1", 0.05, 3.0, False, "exponent of parameters per unique token"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {
                "E": 2.0,
                "A": 500.0,
                "B": 9000.0,
                "alpha": 0.338,
                "beta": 0.43,
                "repeat_decay": 12.0,
                "penalty": 0.06,
                "k": 0.5,
                "m": 0.7,
            },
            "inputs": {"parameters": (1e7, 9e9), "tokens": (1e8, 9e10), "unique_tokens": (1e8, 2e10)},
        },
    ]

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """E + A / N^alpha + B / D'^beta + P R^k (N / U)^m."""
        c = coefficients
        size, tokens = column(inputs, "parameters"), column(inputs, "tokens")
        unique = np.minimum(column(inputs, "unique_tokens"), tokens) if "unique_tokens" in inputs else tokens
        repeats = tokens / unique - 1
        useful = unique * (1 - c["repeat_decay"] * np.expm1(-repeats / c["repeat_decay"]))
        penalty = c["penalty"] * repeats ** c["k"] * (size / unique) ** c["m"]
        return c["E"] + c["A"] * size ** -c["alpha"] + c["B"] * useful ** -c["beta"] + penalty

    def starts(self, table: Columns) -> list[Coefficients]:
        """The plain law's starts, each with a weak and a strong penalty."""
        guesses = ((50.0, 0.05, 0.4, 0.7), (10.0, 0.01, 0.8, 0.4), (1e3, 0.1, 0.3, 1.0))
        return [
            {**start, "repeat_decay": r, "penalty": p, "k": k, "m": m}
            for start in two_terms.starts(table)[:4]
            for r, p, k, m in guesses
        ]

    def refusal(self, table: Columns) -> str | None:
        return two_terms.refusal(table) or two_terms.refusal_of_repeats(table)

    def compute(self, inputs: Columns) -> np.ndarray:
        return two_terms.compute(inputs)
