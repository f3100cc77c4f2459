"""Loss during continued training under any schedule: learning, annealing and the shift of data.

Formula: L(t) = L0 + A * (S0 + S1(t))^-alpha - C0 * F0 - C * S2(t) + B * (1 - (1 + E * S1(t))^-beta).
    S0 and F0: sum of rates, and of remembered falls, of the training before; S1 and S2 the same of the continuation
    (see `annealing`; falls are remembered for `memory` updates). The last term is the shift of domains: B > 0 for the
    old domain, B < 0 for the new one, smaller with more replay. Rates x updates; L in nats per token.
Source: Wang, Tissue et al. 2025, "Learning Dynamics in Continual Pre-Training for Large Language Models",
    arXiv 2505.07796, Eq. 4 to 6.
Differs: written after descriptions of the paper, whose code is not public; the paper has a memory of 1000 updates.
Limits: one model, replay share, batch and corpus. Curves from one checkpoint leave C0 and L0 inseparable: C0 is then
    left out (`checkpoints: one`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from perennial.scaling.curves import CURVE, LOSS, RATE, STEP, by_curve, draw_curves
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column

_BEFORE = "rates_before"
_FALLS_BEFORE = "falls_before"


class ContinuedCurve(Law):
    """Seven or eight coefficients; one fit for the old domain's loss and one for the new domain's."""

    INPUTS: ClassVar[tuple[Input, ...]] = (
        CURVE,
        STEP,
        RATE,
        Input(_BEFORE, "rate x updates", "sum of the rates before the continuation", must_vary=False),
        Input(_FALLS_BEFORE, "rate x updates", "remembered falls before it (`Rates.annealed`)", must_vary=False),
    )
    TARGET: ClassVar[Input] = LOSS
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        Coefficient("L0", "nats/token", 1e-3, 20.0, True, "loss that no sum of rates lowers"),
        Coefficient("A", "nats/token x rate^alpha", 1e-6, 1e6, True, "weight of the sum of rates"),
        Coefficient("alpha", "1", 0.01, 3.0, True, "exponent of the sum of rates"),
        Coefficient("C0", "nats/token per rate x update", 1e-6, 1e6, True, "gain by annealing before"),
        Coefficient("C", "nats/token per rate x update", 1e-6, 1e6, True, "gain by annealing since"),
        Coefficient("B", "nats/token", -20.0, 20.0, False, "size of the shift: what it adds in the end"),
        Coefficient("E", "1/(rate x update)", 1e-4, 1e4, True, "how soon the shift takes place"),
        Coefficient("beta", "1", 0.01, 5.0, True, "exponent of what is left of the shift"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {"memory": 100.0},
            "coefficients": {"L0": 2.4, "A": 0.5, "alpha": 0.5, "C": 0.7, "B": 0.4, "E": 20.0, "beta": 0.6},
            "inputs": {"step": (5, 2000), "rate": (1e-4, 1e-3), _BEFORE: (2.0, 6.0), _FALLS_BEFORE: (0.1, 0.1)},
        },
    ]
    IDENTIFIES: ClassVar[Literal["coefficients", "curve"]] = "curve"

    memory: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 1000.0
    """Updates for which a fall of the rate is remembered."""
    checkpoints: Literal["one", "several"] = "one"
    """Whether all curves continue the same checkpoint."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Falls before only where they can differ."""
        return tuple(i for i in self.INPUTS if i.name != _FALLS_BEFORE or self.checkpoints == "several")

    @property
    def coefficients(self) -> tuple[Coefficient, ...]:
        """C0 only where checkpoints differ."""
        return tuple(c for c in self.COEFFICIENTS if c.name != "C0" or self.checkpoints == "several")

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """L0 + A (S0 + S1)^-alpha - C0 F0 - C S2 + B (1 - (1 + E S1)^-beta)."""
        c = coefficients
        sums, falls = self._features(inputs)
        learned = c["A"] * (column(inputs, _BEFORE) + sums) ** -c["alpha"]
        before = c["C0"] * column(inputs, _FALLS_BEFORE) if self.checkpoints == "several" else 0.0
        return c["L0"] + learned - before - c["C"] * falls + c["B"] * _shifted(sums, c["E"], c["beta"])

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> dict[str, np.ndarray]:
        """By all that there are."""
        c = coefficients
        sums, falls = self._features(inputs)
        total, reach = column(inputs, _BEFORE) + sums, c["E"] * sums
        powers, left = total ** -c["alpha"], (1 + reach) ** -c["beta"]
        slopes = {
            "L0": np.ones_like(sums),
            "A": powers,
            "alpha": -c["A"] * powers * np.log(total),
            "C": -falls,
            "B": 1 - left,
            "E": c["B"] * c["beta"] * left / (1 + reach) * sums,
            "beta": c["B"] * left * np.log1p(reach),
        }
        return slopes | ({"C0": -column(inputs, _FALLS_BEFORE)} if self.checkpoints == "several" else {})

    def starts(self, table: Columns) -> list[Coefficients]:
        """The best straight-line fits of the weights over a grid of alpha, E and beta."""
        sums, falls = self._features(table)
        total, target = column(table, _BEFORE) + sums, column(table, LOSS.name)
        reach = max(float(sums.max()), 1e-12)
        fixed = [column(table, _FALLS_BEFORE) * -1.0] if self.checkpoints == "several" else []
        found: list[tuple[float, dict[str, float]]] = []
        for alpha, pace, beta in itertools.product((0.3, 0.6), (3 / reach, 30 / reach, 300 / reach), (0.3, 1.0)):
            parts = [np.ones_like(sums), total**-alpha, -falls, _shifted(sums, pace, beta), *fixed]
            design = np.stack(parts, axis=1) / target[:, None]
            solved = np.linalg.lstsq(design, np.ones_like(target), rcond=None)[0]
            error = float(np.sum((design @ solved - 1) ** 2))
            level, weight, gain = np.maximum(solved[:3], (0.1, 1e-3, 1e-3)).tolist()
            start = {
                "L0": level,
                "A": weight,
                "alpha": alpha,
                "C": gain,
                "B": float(solved[3]),
                "E": pace,
                "beta": beta,
            }
            if fixed:
                start["C0"] = max(1e-3, float(solved[4]))
            found.append((error, start))
        found.sort(key=lambda pair: pair[0])
        return [start for _, start in found[:4]]

    def refusal(self, table: Columns) -> str | None:
        """Several checkpoints must differ in how far they were annealed."""
        if self.checkpoints == "several" and np.ptp(column(table, _FALLS_BEFORE)) == 0:
            return "all checkpoints were annealed alike (set checkpoints: one)"
        return None

    def draw(
        self, ranges: Mapping[str, tuple[float, float]], num_rows: int, generator: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Points of three runs, each from a checkpoint of its own."""
        others = {name: ends for name, ends in ranges.items() if name in (_BEFORE, _FALLS_BEFORE)}
        return draw_curves(ranges, num_rows, generator) | super().draw(others, num_rows, generator)

    def _features(self, inputs: Columns) -> tuple[np.ndarray, np.ndarray]:
        sums, falls = np.empty((2, len(inputs[STEP.name])))
        for rates, steps, places in by_curve(inputs):
            sums[places] = rates.sums[steps - 1]
            falls[places] = rates.annealed(self.memory)[0][steps - 1]
        return sums, falls


def _shifted(sums: np.ndarray, pace: float, beta: float) -> np.ndarray:
    return 1 - (1 + pace * sums) ** -beta
