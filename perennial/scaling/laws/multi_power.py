"""Loss along any schedule: a power of the sum of rates, and a power law for each fall of the rate.

Formula: L(t) = L0 + A * S(t)^-alpha + B * sum_{k<=t} (eta_k - eta_{k-1}) * (1 - (1 + C * eta_k^-gamma * S_k(t))^-beta)
    with S_k(t) = sum_{k<=i<=t} eta_i and S = S_1. eta_k rate of update k, eta_0 = 0, so that the rise of the warm-up
    counts in both sums; L in nats per token.
Source: Luo et al. 2025, "A Multi-Power Law for Loss Curve Prediction Across Learning Rate Schedules",
    arXiv 2503.12811, Eq. 1-3; coefficients from the repository of the paper (MIT licence).
Differs: C, beta and gamma are nearly free of size but hardly determined by few curves, so that a weak ridge holds them
    near the published ones; without it the fit is closer and predictions of other schedules worse.
Limits: one model size, corpus, batch and peak. The gain of a final decay comes out 0.1 to 0.6% of the loss too high.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from perennial.scaling.curves import CURVE, LOSS, RATE, STEP, by_curve, draw_curves, refusal
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column

_TYPICAL = {"C": 2.07, "beta": 0.59, "gamma": 0.64}  # of the published fits at three sizes
_SMALLEST_RATE = 1e-12  # stands for a rate of 0, whose power -gamma is infinite and whose sum is 0


def _entry(size: str, **coefficients: float) -> dict[str, Any]:
    return {"coefficients": coefficients, "source": f"Luo et al. 2025, arXiv 2503.12811, repository, {size} parameters"}


class MultiPower(Law):
    """Seven coefficients from about three curves; predicts any other schedule of the same run."""

    INPUTS: ClassVar[tuple[Input, ...]] = (CURVE, STEP, RATE)
    TARGET: ClassVar[Input] = LOSS
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        Coefficient("L0", "nats/token", 1e-3, 20.0, True, "loss that no sum of rates lowers"),
        Coefficient("A", "nats/token x rate^alpha", 1e-6, 1e6, True, "weight of the sum of rates"),
        Coefficient("alpha", "1", 0.01, 3.0, True, "exponent of the sum of rates"),
        Coefficient("B", "nats/token per rate", 1e-3, 1e8, True, "gain by falls of the rate"),
        Coefficient("C", "rate^(gamma - 1)", 1e-4, 1e4, True, "how soon a fall tells"),
        Coefficient("beta", "1", 0.01, 5.0, True, "exponent of what is left of a fall's gain"),
        Coefficient("gamma", "1", 0.01, 3.0, True, "how much sooner a fall tells at a lower rate"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {"strength": 1e-4},
            "coefficients": {"L0": 3.0, "A": 0.5, "alpha": 0.5, "B": 360.0, **_TYPICAL},
            "inputs": {"step": (60, 1000), "rate": (1e-4, 1e-3)},
        },
    ]
    PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {
        "luo_2025_25m": _entry(
            "25M",
            L0=3.04045406,
            A=0.52468604,
            alpha=0.50786857,
            B=363.78751622,
            C=2.06560812,
            beta=0.58279013,
            gamma=0.64142257,
        ),
        "luo_2025_100m": _entry(
            "100M",
            L0=2.6514477,
            A=0.60115152,
            alpha=0.45295811,
            B=437.9464276,
            C=2.13245612,
            beta=0.59785199,
            gamma=0.65523644,
        ),
        "luo_2025_400m": _entry(
            "400M",
            L0=2.37474466,
            A=0.65421216,
            alpha=0.42878731,
            B=523.42464371,
            C=2.02462735,
            beta=0.59350493,
            gamma=0.63472457,
        ),
    }

    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6
    """Ridge on the logarithms of C, beta and gamma around the published values."""

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """L0 + A S^-alpha + B sum of falls."""
        c = coefficients
        sums, gains = np.empty((2, len(inputs[STEP.name])))
        for rates, steps, places in by_curve(inputs):
            change, rate, before = rates.blocks
            sums[places] = rates.sums[steps - 1]
            since = np.maximum(sums[places, None] - before, 0.0)
            pace = c["C"] * np.maximum(rate, _SMALLEST_RATE) ** -c["gamma"]
            gains[places] = (1 - (1 + pace * since) ** -c["beta"]) @ change
        return c["L0"] + c["A"] * sums ** -c["alpha"] + c["B"] * gains

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> dict[str, np.ndarray]:
        """By all seven."""
        c = coefficients
        sums, gains, by_pace, by_beta, by_gamma = np.empty((5, len(inputs[STEP.name])))
        for rates, steps, places in by_curve(inputs):
            change, rate, before = rates.blocks
            rate = np.maximum(rate, _SMALLEST_RATE)
            sums[places] = rates.sums[steps - 1]
            reach = c["C"] * rate ** -c["gamma"] * np.maximum(sums[places, None] - before, 0.0)
            left = (1 + reach) ** -c["beta"]
            slope = c["beta"] * left * reach / (1 + reach)  # by the logarithm of the pace
            gains[places] = (1 - left) @ change
            by_pace[places] = slope @ change
            by_beta[places] = (left * np.log1p(reach)) @ change
            by_gamma[places] = -slope @ (change * np.log(rate))
        powers = sums ** -c["alpha"]
        return {
            "L0": np.ones_like(sums),
            "A": powers,
            "alpha": -c["A"] * powers * np.log(sums),
            "B": gains,
            "C": c["B"] * by_pace / c["C"],
            "beta": c["B"] * by_beta,
            "gamma": c["B"] * by_gamma,
        }

    def starts(self, table: Columns) -> list[Coefficients]:
        """The best straight-line fits of L0, A and B at the typical C, beta and gamma, over a grid of alpha."""
        target = column(table, LOSS.name)
        found = []
        for alpha in (0.3, 0.45, 0.6, 0.9):
            slopes = self.gradient(table, {"L0": 1.0, "A": 1.0, "alpha": alpha, "B": 1.0, **_TYPICAL})
            design = np.stack([slopes[name] for name in ("L0", "A", "B")], axis=1) / target[:, None]
            solved = np.linalg.lstsq(design, np.ones_like(target), rcond=None)[0]
            error = float(np.sum((design @ solved - 1) ** 2))
            level, weight, gain = np.maximum(solved, (0.1, 1e-4, 1.0)).tolist()
            found.append((error, {"L0": level, "A": weight, "alpha": alpha, "B": gain, **_TYPICAL}))
        return [coefficients for _, coefficients in sorted(found, key=lambda pair: pair[0])[:1]]

    def ridge(self) -> Mapping[str, tuple[float, float]]:
        """Towards the published C, beta and gamma."""
        return {name: (value, self.strength) for name, value in _TYPICAL.items()} if self.strength else {}

    def refusal(self, table: Columns) -> str | None:
        """The rate must fall somewhere."""
        return refusal(table)

    def draw(
        self, ranges: Mapping[str, tuple[float, float]], num_rows: int, generator: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Points of three runs."""
        return draw_curves(ranges, num_rows, generator)
