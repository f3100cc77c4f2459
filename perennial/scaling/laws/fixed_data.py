"""Loss when data are fixed and compute is not: of model size, and of ensemble members.

Formula: L = E + A / N^alpha, and for ensembles of K members L = E + A / N^alpha + F / K. N parameters of one member, L
    nats per token at one corpus of U unique tokens; weight decay, epochs and learning rate tuned at each N.
Source: Kim, Kotha, Liang & Hashimoto 2025, "Pre-training under infinite compute", arXiv 2509.14786, sections 3 and 4.
Limits: one corpus. The law holds only where weight decay is tuned (up to 30 times the usual 0.1 at 200M tokens, rising
    with N / U); without, loss has a minimum in N and rises after it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from perennial.scaling import two_terms
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column


class FixedData(Law):
    """Three or four coefficients; E is the loss that the corpus allows at any compute."""

    INPUTS: ClassVar[tuple[Input, ...]] = (
        two_terms.PARAMETERS,
        Input("members", "models", "whose predictions are averaged"),
    )
    TARGET: ClassVar[Input] = two_terms.LOSS
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        Coefficient("E", "nats/token", 1e-3, 20.0, True, "loss of a very large model, or of many"),
        Coefficient("A", "nats/token", 0.0, np.inf, True, "weight of size", ("alpha", "parameters")),
        Coefficient("alpha", "1", 0.01, 4.0, False, "exponent of size"),
        Coefficient("F", "nats/token", 1e-9, 10.0, True, "what a single member loses to very many", vanishing="low"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {"E": 3.43, "A": 0.05 * 1e9**1.02, "alpha": 1.02},
            "inputs": {"parameters": (1.5e8, 1.4e9)},
        },
        {
            "settings": {"ensembles": True},
            "coefficients": {"E": 3.2, "A": 7.0e7, "alpha": 1.0, "F": 0.2},
            "inputs": {"parameters": (1.5e8, 1.4e9), "members": (1.0, 8.0)},
        },
    ]
    PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {
        "kim_2025_200m_tokens": {
            "coefficients": {"E": 3.43, "A": 0.05 * 1e9**1.02, "alpha": 1.02},
            "source": "Kim et al. 2025, arXiv 2509.14786, section 3: 0.05 / N^1.02 + 3.43 with N in billions",
        },
    }

    ensembles: bool = False
    """Whether rows differ in the number of members."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Members only for ensembles."""
        return self.INPUTS if self.ensembles else self.INPUTS[:1]

    @property
    def coefficients(self) -> tuple[Coefficient, ...]:
        """F only for ensembles."""
        return self.COEFFICIENTS if self.ensembles else self.COEFFICIENTS[:3]

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """E + A / N^alpha + F / K."""
        size = coefficients["A"] * column(inputs, "parameters") ** -coefficients["alpha"]
        shared = coefficients["F"] / column(inputs, "members") if self.ensembles else 0.0
        return coefficients["E"] + size + shared

    def starts(self, table: Columns) -> list[Coefficients]:
        """Straight-line fits of the weights for several exponents, the best first."""
        size, loss = column(table, "parameters"), column(table, "loss")
        middle = float(np.exp(np.log(size).mean()))
        found = []
        for alpha in (0.2, 0.4, 0.7, 1.0, 1.5):
            parts = [np.ones_like(loss), (size / middle) ** -alpha]
            parts += [1 / column(table, "members")] if self.ensembles else []
            design = np.stack(parts, axis=1)
            solved = np.linalg.lstsq(design, loss, rcond=None)[0]
            error = float(np.sum((design @ solved - loss) ** 2))
            level, weight, *shared = np.maximum(solved, (0.01, 1e-4, 1e-4)[: len(parts)]).tolist()
            start = {"E": level, "A": weight * middle**alpha, "alpha": alpha}
            found.append((error, start | ({"F": shared[0]} if shared else {})))
        return [start for _, start in sorted(found, key=lambda pair: pair[0])[:2]]

    def refusal(self, table: Columns) -> str | None:
        """Three sizes at least: two lie on any power law."""
        if two_terms.groups(column(table, "parameters")).max() < 2:
            return "fewer than three model sizes"
        return None
