"""Loss on old data after training on new, of size, tokens and the share of old data mixed in.

Formula: L = L_start + A * D^beta / ((1 + B * p) * N)^alpha. L_start loss before, D tokens of the new training, p share
    of pre-training data among them, N parameters; L nats per token.
Source: Bethune et al. 2025, "Scaling Laws for Forgetting during Finetuning with Pretraining Data Injection",
    arXiv 2502.06042, Eq. 3: 1% of old data prevents most forgetting; fitted from 41M to 1.3B parameters.
Differs: written after descriptions of the paper.
Limits: fine-tuning, 0.3M to 30M new tokens; for long continuations prefer `domain_share` or `replay`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from perennial.scaling import two_terms
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column


class Forgetting(Law):
    """Four coefficients; forgetting falls with size and with any old data."""

    INPUTS: ClassVar[tuple[Input, ...]] = (
        two_terms.PARAMETERS,
        Input("tokens", "tokens", "of the new training"),
        Input("replay_share", "share", "of old data among them"),
        Input("start_loss", "nats/token", "on old data before", must_vary=False),
    )
    TARGET: ClassVar[Input] = Input("loss", "nats/token", "on old data after")
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        Coefficient("A", "nats/token", 1e-12, 1e12, True, "weight of forgetting", ("alpha", "parameters")),
        Coefficient("alpha", "1", 0.01, 3.0, False, "exponent of size"),
        Coefficient("beta", "1", 0.01, 3.0, False, "exponent of new tokens"),
        Coefficient("B", "1", 1e-2, 1e7, True, "times that old data make a model larger, per share"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {"A": 30.0, "alpha": 0.5, "beta": 0.3, "B": 800.0},
            "inputs": {
                "parameters": (4e7, 2e9),
                "tokens": (3e5, 3e7),
                "replay_share": (0.0, 0.05),
                "start_loss": (2.5, 3.5),
            },
        },
    ]

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """L_start + A D^beta / ((1 + B p) N)^alpha."""
        return column(inputs, "start_loss") + _forgotten(inputs, coefficients)

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> dict[str, np.ndarray]:
        """By all four."""
        c, forgotten, held = coefficients, _forgotten(inputs, coefficients), _held(inputs, coefficients)
        share = column(inputs, "replay_share")
        return {
            "A": forgotten / c["A"],
            "alpha": -forgotten * np.log(held),
            "beta": forgotten * np.log(column(inputs, "tokens")),
            "B": -c["alpha"] * forgotten * share * column(inputs, "parameters") / held,
        }

    def starts(self, table: Columns) -> list[Coefficients]:
        """Linear regressions of the logarithm of what was forgotten, for several B."""
        forgotten = column(table, "loss") - column(table, "start_loss")
        rows = forgotten > 0
        guess = {"A": 1.0, "alpha": 0.4, "beta": 0.3, "B": 100.0}
        if rows.sum() < 3:
            return [guess]
        found = []
        for weight in (10.0, 100.0, 1e3, 1e4):
            held = _held(table, {"B": weight})[rows]
            design = np.stack([np.ones(int(rows.sum())), -np.log(held), np.log(column(table, "tokens")[rows])], axis=1)
            solved, *_ = np.linalg.lstsq(design, np.log(forgotten[rows]), rcond=None)
            error = float(np.sum((design @ solved - np.log(forgotten[rows])) ** 2))
            level, alpha, beta = solved.tolist()
            found.append((error, {"A": float(np.exp(level)), "alpha": alpha, "beta": beta, "B": weight}))
        return [start for _, start in sorted(found, key=lambda pair: pair[0])[:2]]


def _held(inputs: Columns, c: Coefficients) -> np.ndarray:
    return (1 + c["B"] * column(inputs, "replay_share")) * column(inputs, "parameters")


def _forgotten(inputs: Columns, c: Coefficients) -> np.ndarray:
    return c["A"] * column(inputs, "tokens") ** c["beta"] * _held(inputs, c) ** -c["alpha"]
