"""Loss when data are repeated: each further epoch is worth less than the one before.

Formula: L = E + A / N'^alpha + B / D'^beta, D' = U + U r (1 - exp(-R / r)), R = D / U - 1 repeats;
    N' = M + M s (1 - exp(-(N / M - 1) / s)), M = min(N, the size for which U tokens are the best number);
    r ('repeat_decay') and s ('size_decay') say after how many repeats the value is used up. L nats per token, N
    parameters, D tokens, U unique tokens.
Source: Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", arXiv 2305.16264, section 3.1, Eq. 5-7.
Differs: all seven coefficients can be found together; with A, B, E, alpha, beta fixed to the published C4 fit
    (`fixed`), as in the source, r is not identified by the source's own runs.
Limits: loss never rises with epochs, so there is no number of epochs too many; see `repeat_penalty`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from perennial.scaling import two_terms
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column


class Repeated(Law):
    """Seven coefficients: the five of `chinchilla` and two rates at which repetition loses its value."""

    INPUTS: ClassVar[tuple[Input, ...]] = (two_terms.PARAMETERS, two_terms.TOKENS, two_terms.UNIQUE)
    TARGET: ClassVar[Input] = two_terms.LOSS
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        *two_terms.MAIN,
        two_terms.REPEAT_DECAY,
        Coefficient(
            "size_decay",
            "1",
            0.05,
            1e9,
            True,
            "the same for size beyond what the unique tokens can feed",
            vanishing="high",
        ),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {
                "E": 1.8,
                "A": 300.0,
                "B": 2000.0,
                "alpha": 0.32,
                "beta": 0.36,
                "repeat_decay": 15.0,
                "size_decay": 5.0,
            },
            "inputs": {"parameters": (1e7, 9e9), "tokens": (1e8, 9e11), "unique_tokens": (1e8, 2e10)},
        },
    ]
    PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {
        "muennighoff_2023": {
            "coefficients": {
                "E": 1.869143,
                "A": 520.8255,
                "B": 1487.744,
                "alpha": 0.3526596,
                "beta": 0.3526596,
                "repeat_decay": 15.388,
                "size_decay": 5.310,
            },
            "source": "Muennighoff et al. 2023, arXiv 2305.16264, section 5 and appendix A (C4)",
        },
    }

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """E + A / N'^alpha + B / D'^beta."""
        c = coefficients
        size, tokens = column(inputs, "parameters"), column(inputs, "tokens")
        unique = np.minimum(column(inputs, "unique_tokens"), tokens) if "unique_tokens" in inputs else tokens
        fed = np.minimum(size, fed_size(unique, c))
        useful_size = saturating(fed, size / fed - 1, c["size_decay"])
        useful_tokens = saturating(unique, tokens / unique - 1, c["repeat_decay"])
        return c["E"] + c["A"] * useful_size ** -c["alpha"] + c["B"] * useful_tokens ** -c["beta"]

    def starts(self, table: Columns) -> list[Coefficients]:
        """The plain law's starts, each with several rates."""
        rates = ((15.0, 5.0), (5.0, 50.0), (25.0, 1e8))
        return [
            {**start, "repeat_decay": r, "size_decay": s} for start in two_terms.starts(table)[:4] for r, s in rates
        ]

    def refusal(self, table: Columns) -> str | None:
        return two_terms.refusal(table) or two_terms.refusal_of_repeats(table)

    def compute(self, inputs: Columns) -> np.ndarray:
        return two_terms.compute(inputs)


def saturating(first: np.ndarray, repeats: np.ndarray, decay: float) -> np.ndarray:
    """first * (1 + decay * (1 - exp(-repeats / decay))): what the first and its repeats are worth together."""
    return first * (1 - decay * np.expm1(-repeats / decay))


def fed_size(unique: np.ndarray, c: Coefficients) -> np.ndarray:
    """The size N for which `unique` tokens are the compute-optimal number, shape (rows,).

    There alpha A / N^alpha = beta B / D^beta, hence N = (alpha A D^beta / (beta B))^(1 / alpha).
    """
    ratio = np.log(c["alpha"] * c["A"] / (c["beta"] * c["B"])) + c["beta"] * np.log(unique)
    return np.exp(np.minimum(ratio / c["alpha"], 600.0))
