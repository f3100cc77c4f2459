"""Loss of model size and tokens: an irreducible part, a term for size, a term for data.

Formula: L = E + A / N^alpha + B / D^beta. L nats per token, N parameters, D training tokens.
Source: Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", arXiv 2203.15556, section 3.3 and
    Eq. 10; coefficients of Besiroglu et al. 2024, "Chinchilla Scaling: A replication attempt", arXiv 2404.10102.
Limits: tokens count as seen once; see `repeated` for several epochs. Exponents differ from corpus to corpus.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from perennial.scaling import two_terms
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law


class Chinchilla(Law):
    """Five coefficients; the form that the others refine."""

    INPUTS: ClassVar[tuple[Input, ...]] = (two_terms.PARAMETERS, two_terms.TOKENS)
    TARGET: ClassVar[Input] = two_terms.LOSS
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = two_terms.MAIN
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
            "inputs": {"parameters": (5e7, 2e10), "tokens": (5e8, 5e11)},
        },
        {
            "settings": {},
            "coefficients": {"E": 0.9, "A": 20.0, "B": 1500.0, "alpha": 0.21, "beta": 0.47},
            "inputs": {"parameters": (1e5, 1e8), "tokens": (1e6, 1e9)},
        },
    ]
    PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {
        "besiroglu_2024": {
            "coefficients": {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
            "source": "Besiroglu et al. 2024, arXiv 2404.10102, section 4",
        },
        "hoffmann_2022": {
            "coefficients": {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
            "source": "Hoffmann et al. 2022, arXiv 2203.15556, Eq. 10; inconsistent with the paper's own runs",
        },
        "muennighoff_2023": {
            "coefficients": {"E": 1.869143, "A": 520.8255, "B": 1487.744, "alpha": 0.3526596, "beta": 0.3526596},
            "source": "Muennighoff et al. 2023, arXiv 2305.16264, appendix A (C4)",
        },
    }

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """E + A / N^alpha + B / D^beta."""
        size, data = two_terms.terms(inputs, coefficients)
        return coefficients["E"] + size + data

    def starts(self, table: Columns) -> list[Coefficients]:
        return [*two_terms.starts(table)]

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> Mapping[str, np.ndarray]:
        return two_terms.gradient(inputs, coefficients)

    def refusal(self, table: Columns) -> str | None:
        return two_terms.refusal(table)

    def compute(self, inputs: Columns) -> np.ndarray:
        return two_terms.compute(inputs)
