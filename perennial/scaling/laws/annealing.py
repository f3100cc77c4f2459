"""Loss along any schedule: falls with the sum of rates, and further as the rate is annealed.

Formula: L(s) = L0 + A * S1(s)^-alpha - C * S2(s). S1 = sum_{i<=s} eta_i; S2 = sum_{i<=s} m_i with
    m_i = (1 - 1/T) * m_{i-1} + (eta_{i-1} - eta_i): the fall of the rate, remembered for about T updates.
    eta_i rate of update i, S1 and S2 in rate x updates, L in nats per token.
Source: Tissue, Wang & Wang 2024, "Scaling Law with Learning Rate Annealing", arXiv 2408.11029, Eq. 1 and section 3.
Differs: the memory is fitted (T = 530 to 590 on public curves; the paper sets 1 - 1/T to 0.999); the rise of a warm-up
    is not annealing, so S2 starts after it, and S1 counts the warm-up's own rates.
Limits: one model size, corpus, batch and peak. The gain of a final decay comes out 0.2 to 1.2% of the loss too high.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from perennial.scaling.curves import CURVE, LOSS, RATE, STEP, by_curve, draw_curves, refusal
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column


class Annealing(Law):
    """Five coefficients from one or two curves; predicts any other schedule of the same run."""

    INPUTS: ClassVar[tuple[Input, ...]] = (CURVE, STEP, RATE)
    TARGET: ClassVar[Input] = LOSS
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        Coefficient("L0", "nats/token", 1e-3, 20.0, True, "loss that no sum of rates lowers"),
        Coefficient("A", "nats/token x rate^alpha", 1e-6, 1e6, True, "weight of the sum of rates"),
        Coefficient("alpha", "1", 0.01, 3.0, True, "exponent of the sum of rates"),
        Coefficient("C", "nats/token per rate x update", 1e-6, 1e6, True, "gain by annealing"),
        Coefficient("T", "updates", 2.0, 1e5, True, "how long a fall of the rate goes on to tell"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {"L0": 2.8, "A": 0.5, "alpha": 0.5, "C": 0.75, "T": 100.0},
            "inputs": {"step": (60, 2000), "rate": (1e-4, 1e-3)},
        },
    ]

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """L0 + A S1^-alpha - C S2."""
        sums, falls, _ = _features(inputs, coefficients["T"])
        powers = sums ** -coefficients["alpha"]
        return coefficients["L0"] + coefficients["A"] * powers - coefficients["C"] * falls

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> dict[str, np.ndarray]:
        """By all five."""
        sums, falls, by_memory = _features(inputs, coefficients["T"])
        powers = sums ** -coefficients["alpha"]
        return {
            "L0": np.ones_like(sums),
            "A": powers,
            "alpha": -coefficients["A"] * powers * np.log(sums),
            "C": -falls,
            "T": -coefficients["C"] * by_memory,
        }

    def starts(self, table: Columns) -> list[Coefficients]:
        """The best straight-line fits of L0, A and C over a grid of alpha and T."""
        target = column(table, LOSS.name)
        longest = float(column(table, STEP.name).max())
        found: list[tuple[float, dict[str, float]]] = []
        for memory in np.geomspace(max(2.0, longest / 300), max(4.0, longest / 3), 7).tolist():
            sums, falls, _ = _features(table, memory)
            for alpha in (0.2, 0.35, 0.5, 0.7, 1.0):
                design = np.stack([np.ones_like(sums), sums**-alpha, -falls], axis=1) / target[:, None]
                solved = np.linalg.lstsq(design, np.ones_like(target), rcond=None)[0]
                error = float(np.sum((design @ solved - 1) ** 2))
                level, weight, gain = np.maximum(solved, (0.1, 1e-4, 1e-3)).tolist()
                found.append((error, {"L0": level, "A": weight, "alpha": alpha, "C": gain, "T": memory}))
        found.sort(key=lambda pair: pair[0])
        return [coefficients for _, coefficients in found[:3]]

    def refusal(self, table: Columns) -> str | None:
        """The rate must fall somewhere."""
        return refusal(table)

    def draw(
        self, ranges: Mapping[str, tuple[float, float]], num_rows: int, generator: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Points of three runs."""
        return draw_curves(ranges, num_rows, generator)


def _features(inputs: Columns, memory: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S1, S2 and dS2/dT of each row, shape (rows,)."""
    features = np.empty((3, len(inputs[STEP.name])))
    for rates, steps, places in by_curve(inputs):
        falls, by_memory = rates.annealed(memory)
        features[:, places] = rates.sums[steps - 1], falls[steps - 1], by_memory[steps - 1]
    return features[0], features[1], features[2]
