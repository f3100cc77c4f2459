"""Loss on a domain of its share in continued training: an exponential that levels off.

Formula: L(r) = c + exp(k * r + b). r share of the evaluated domain in the training tokens (for the old domain: the
    replay share), L nats per token on that domain; k < 0 where its own data help.
Source: Ye et al. 2024, "Data Mixing Laws", arXiv 2403.16952, section 5.2 (continual pre-training: the critical share
    that keeps the old loss); the same form, for two domains, as `mixture`.
Limits: one model, number of tokens and schedule. With three shares it fits always and says nothing of its error.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column


class Replay(Law):
    """Three coefficients from runs that differ in nothing but the replay share."""

    INPUTS: ClassVar[tuple[Input, ...]] = (Input("share", "share", "of the evaluated domain in the training tokens"),)
    TARGET: ClassVar[Input] = Input("loss", "nats/token", "on one domain after the same number of updates")
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        Coefficient("c", "nats/token", 1e-3, 20.0, True, "loss at which it levels off"),
        Coefficient("k", "1", -400.0, 400.0, False, "how fast the share tells"),
        Coefficient("b", "1", -400.0, 400.0, False, "ln of what is above c without data of its own", vanishing="low"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {"c": 2.9, "k": -9.0, "b": -1.2},
            "inputs": {"share": (0.0, 0.5)},
        },
        {
            "settings": {},
            "coefficients": {"c": 2.2, "k": -2.5, "b": 0.4},
            "inputs": {"share": (0.1, 1.0)},
        },
    ]
    MIN_ROWS_PER_COEFFICIENT: ClassVar[float] = 4 / 3

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """c + exp(k r + b)."""
        return coefficients["c"] + _above(inputs, coefficients)

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> dict[str, np.ndarray]:
        """By c, k and b."""
        above = _above(inputs, coefficients)
        return {"c": np.ones_like(above), "k": above * column(inputs, "share"), "b": above}

    def starts(self, table: Columns) -> list[Coefficients]:
        """Straight-line fits of c and exp(b) for several k, the best first."""
        share, loss = column(table, "share"), column(table, "loss")
        found = []
        for k in (-100.0, -40.0, -15.0, -6.0, -2.0, -0.7, 0.7, 2.0, 6.0):
            design = np.stack([np.ones_like(share), np.exp(k * share)], axis=1)
            solved = np.linalg.lstsq(design, loss, rcond=None)[0]
            if solved[1] > 0 and solved[0] > 0:
                error = float(np.sum((design @ solved - loss) ** 2))
                found.append((error, {"c": float(solved[0]), "k": k, "b": float(np.log(solved[1]))}))
        level = float(loss.min())
        fallback = {"c": level, "k": -1.0, "b": float(np.log(max(1e-6, np.ptp(loss))))}
        return [start for _, start in sorted(found, key=lambda pair: pair[0])[:3]] or [fallback]


def _above(inputs: Columns, c: Coefficients) -> np.ndarray:
    return np.exp(np.clip(c["k"] * column(inputs, "share") + c["b"], -100.0, 100.0))
