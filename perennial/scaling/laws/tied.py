"""Loss of model size and tokens with one exponent for both, for tables of few runs.

Formula: L = E + A / N^alpha + B / D^alpha. L nats per token, N parameters, D training tokens.
Source: Gadre et al. 2024, "Language models scale reliably with over-training and on downstream tasks",
    arXiv 2403.08540, section 2 (in the coordinates of `over_training`, which is this law in FLOPs and tokens per
    parameter); Muennighoff et al. 2023, arXiv 2305.16264, appendix A ties the exponents as well.
Limits: implies that the best model size grows as the square root of compute.
"""

from __future__ import annotations

from typing import Any, ClassVar

from perennial.scaling import two_terms
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns
from perennial.scaling.laws.chinchilla import Chinchilla


class Tied(Chinchilla):
    """Four coefficients."""

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {}
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = two_terms.TIED
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {"E": 1.8, "A": 150.0, "B": 280.0, "alpha": 0.267},
            "inputs": {"parameters": (1e7, 7e9), "tokens": (2e8, 1e12)},
        },
        {
            "settings": {},
            "coefficients": {"E": 1.1, "A": 900.0, "B": 2500.0, "alpha": 0.45},
            "inputs": {"parameters": (1e5, 1e8), "tokens": (1e6, 1e9)},
        },
    ]

    def starts(self, table: Columns) -> list[Coefficients]:
        return [*two_terms.tied_starts(table)]
