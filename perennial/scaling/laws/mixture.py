"""Loss on a domain of the training mixture: exponential in the training domains' shares.

Formula: L(r) = c + exp(sum_j t_j * r_j). r_j share of training domain j, all of them, sum 1; L nats per token after the
    same number of updates of the same model. t_j is low for a domain that helps.
Source: Ye et al. 2024, "Data Mixing Laws: Optimizing Data Mixtures by Predicting Language Modeling Performance",
    arXiv 2403.16952, Eq. 7; the overall loss is a weighted sum of validation domains, see `scaling.mixture_fit`.
Differs: the factor k of the paper is exp of a constant added to every t_j, as the shares sum to 1, and is left out.
Limits: one size and length of training; carry it to larger ones by laws of size and tokens fitted to each mixture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import field_validator

from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column

_SUM_TOLERANCE = 1e-3


class Mixture(Law):
    """One coefficient per training domain and one for what no mixture lowers."""

    INPUTS: ClassVar[tuple[Input, ...]] = ()
    TARGET: ClassVar[Input] = Input("loss", "nats/token", "on one validation domain")
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        Coefficient("c", "nats/token", 1e-3, 20.0, True, "loss that no mixture lowers"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {"domains": ("web", "code", "books")},
            "coefficients": {"c": 2.0, "t_web": -0.5, "t_code": 1.0, "t_books": 0.2},
            "inputs": {"web": (0.0, 1.0), "code": (0.0, 1.0), "books": (0.0, 1.0)},
        },
    ]

    domains: tuple[str, ...]
    """Names of the columns with the shares of the training domains: all of them."""

    @field_validator("domains")
    @classmethod
    def _two_or_more(cls, domains: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(domains)) < 2 or len(set(domains)) < len(domains):
            raise ValueError(f"two or more different domains are needed, not {', '.join(domains) or 'none'}")
        return domains

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The share of each domain."""
        return tuple(Input(name, "share", f"share of {name} in the training tokens") for name in self.domains)

    @property
    def coefficients(self) -> tuple[Coefficient, ...]:
        """c, and t of each domain."""
        shares = (Coefficient(f"t_{name}", "1", -50.0, 50.0, False, f"effect of {name}") for name in self.domains)
        return (*self.COEFFICIENTS, *shares)

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """c + exp(t . r)."""
        return coefficients["c"] + self._above(inputs, coefficients)

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> dict[str, np.ndarray]:
        """By c and every t."""
        above = self._above(inputs, coefficients)
        slopes = {f"t_{name}": above * column(inputs, name) for name in self.domains}
        return {"c": np.ones_like(above), **slopes}

    def starts(self, table: Columns) -> list[Coefficients]:
        """Linear regressions of ln(L - c) for several c."""
        loss = column(table, self.TARGET.name)
        shares = np.stack([column(table, name) for name in self.domains], axis=1)
        found: list[Coefficients] = []
        for share in (0.3, 0.6, 0.8, 0.92):
            level = share * float(loss.min())
            damped = shares.T @ shares + 1e-3 * np.eye(len(self.domains))
            effects = np.linalg.solve(damped, shares.T @ np.log(loss - level))
            named = {f"t_{name}": effect for name, effect in zip(self.domains, effects.tolist(), strict=True)}
            found.append({"c": level, **named})
        return found

    def refusal(self, table: Columns) -> str | None:
        """Shares must sum to 1."""
        total = np.sum([column(table, name) for name in self.domains], axis=0)
        worst = int(np.argmax(np.abs(total - 1)))
        if abs(total[worst] - 1) > _SUM_TOLERANCE:
            return f"the shares of row {worst + 1} sum to {total[worst]:.4g}, not 1"
        return None

    def draw(
        self, ranges: Mapping[str, tuple[float, float]], num_rows: int, generator: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Shares that sum to 1, evenly over all mixtures."""
        shares = generator.dirichlet(np.ones(len(ranges)), num_rows)
        return {name: shares[:, index] for index, name in enumerate(ranges)}

    def _above(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        exponent = sum(coefficients[f"t_{name}"] * column(inputs, name) for name in self.domains)
        return np.exp(np.clip(exponent, -100.0, 100.0))
