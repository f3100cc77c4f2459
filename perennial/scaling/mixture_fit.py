"""Best mixture of training domains: one mixture law per validation domain, a weighted sum, and its minimum.

Source: Ye et al. 2024, "Data Mixing Laws", arXiv 2403.16952, sections 3.2 and 4.
Limits: as for the law `mixture`; the minimum is that of the fitted curve and lies where measured mixtures are few.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from perennial.core.errors import UserError
from perennial.scaling.fitting import Fit, as_columns, fit
from perennial.scaling.laws.mixture import Mixture

DELTA = 1e-2
"""Relative error above which a run counts linearly: validation domains differ by far more than run-to-run noise."""


@dataclass(frozen=True)
class MixtureLaw:
    """Fitted laws of every validation domain, and how much each counts."""

    domains: tuple[str, ...]
    """Training domains."""
    fits: dict[str, Fit]
    """By validation domain."""
    weights: dict[str, float]
    """By validation domain; sum 1."""

    def predict(self, shares: ArrayLike) -> dict[str, np.ndarray]:
        """Loss on each validation domain, shape (mixtures,), for shares of shape (mixtures, domains)."""
        rows = np.atleast_2d(np.asarray(shares, dtype=np.float64))
        columns = {name: rows[:, index] for index, name in enumerate(self.domains)}
        return {name: found.law.predict(columns, found.coefficients) for name, found in self.fits.items()}

    def total(self, shares: ArrayLike) -> np.ndarray:
        """Weighted loss over the validation domains, shape (mixtures,)."""
        return np.sum([self.weights[name] * loss for name, loss in self.predict(shares).items()], axis=0)

    def best(self, limits: Mapping[str, tuple[float, float]] | None = None) -> dict[str, float]:
        """The shares with the lowest weighted loss, each inside its limits (default 0 to 1), sum 1.

        An upper limit is what a corpus can give: unique tokens x epochs / training tokens. Raises UserError when no
        mixture lies inside all limits.
        """
        bounds = [(limits or {}).get(name, (0.0, 1.0)) for name in self.domains]
        low, high = np.array(bounds).T
        if (low > high).any() or low.sum() > 1 + 1e-9 or high.sum() < 1 - 1e-9:
            given = ", ".join(f"{name} {a:.3g} to {b:.3g}" for name, (a, b) in zip(self.domains, bounds, strict=True))
            raise UserError(f"no mixture that sums to 1 lies inside the limits: {given}")
        start = low + (1 - low.sum()) * (high - low) / max(float((high - low).sum()), 1e-12)
        found = minimize(
            lambda shares: float(self.total(shares)[0]),
            start,
            method="SLSQP",
            bounds=bounds,
            constraints={"type": "eq", "fun": lambda shares: shares.sum() - 1},
            options={"maxiter": 300, "ftol": 1e-10},
        )
        better = found.x if self.total(found.x)[0] <= self.total(start)[0] else start
        return dict(zip(self.domains, better.tolist(), strict=True))


def fit_mixture_law(
    shares: Mapping[str, ArrayLike],
    losses: Mapping[str, ArrayLike],
    *,
    weights: Mapping[str, float] | None = None,
    bootstrap: int = 0,
    seed: int = 0,
) -> MixtureLaw:
    """One law per validation domain from runs with different mixtures, shape (runs,) each.

    `weights` say how much each validation domain counts (default: all the same). Raises UserError for a weight of a
    domain that has no losses.
    """
    wanted = dict(weights or dict.fromkeys(losses, 1.0))
    if unknown := sorted(set(wanted) - set(losses)):
        raise UserError(f"no losses for validation domain '{unknown[0]}'; there are: {', '.join(losses)}")
    total = sum(wanted.values())
    if total <= 0:
        raise UserError("the weights of the validation domains must sum to more than 0")
    columns = as_columns(shares)
    law = Mixture(domains=tuple(columns))
    fits = {
        name: fit(law, {**columns, "loss": np.asarray(losses[name])}, delta=DELTA, bootstrap=bootstrap, seed=seed)
        for name in wanted
    }
    return MixtureLaw(law.domains, fits, {name: weight / total for name, weight in wanted.items()})
