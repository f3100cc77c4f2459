"""Loss of model size and tokens: one exponent for both, their terms summed inside a power.

Formula: L = E + (A / N^alpha + B / D^alpha)^gamma. L nats per token, N parameters, D training tokens.
Source: Caballero et al. 2022, arXiv 2210.14891 (see `gamma`); Gadre et al. 2024, arXiv 2403.08540 (see `tied`).
Differs: as `gamma`, with a tenth of its ridge by default.
Limits: as for `tied`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from perennial.scaling import two_terms
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns
from perennial.scaling.laws.gamma import Gamma


class TiedGamma(Gamma):
    """5 coefficients, one of them held near 1."""

    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (*two_terms.TIED, two_terms.OUTER_EXPONENT)
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {"strength": 0.0},
            "coefficients": {"E": 1.7, "A": 400.0, "B": 900.0, "alpha": 0.33, "gamma": 0.8},
            "inputs": {"parameters": (1e7, 7e9), "tokens": (2e8, 1e12)},
        },
        {
            "settings": {},
            "coefficients": {"E": 1.1, "A": 900.0, "B": 2500.0, "alpha": 0.45, "gamma": 1.0},
            "inputs": {"parameters": (1e5, 1e8), "tokens": (1e6, 1e9)},
        },
    ]

    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-5
    """Of the ridge on ln gamma; 0 leaves gamma free."""

    def starts(self, table: Columns) -> list[Coefficients]:
        return [{**start, "gamma": 1.0} for start in two_terms.tied_starts(table)]
