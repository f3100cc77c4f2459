"""Loss on one domain after continued training, of model size, tokens and that domain's share of them.

Formula: L = E + A / N^alpha + B * r^eta / D^beta + C / (r + epsilon)^gamma. N parameters, D tokens of the continuation,
    r share of the evaluated domain in them (for the old domain: the replay share), L nats per token.
Source: Que et al. 2024, "D-CPT Law: Domain-specific Continual Pre-Training Scaling Law for Large Language Models",
    arXiv 2406.01375, Eq. 6.
Limits: one law for the old and one for the new domain; nine coefficients, so that E, C and epsilon trade off and only
    the curve between the measured shares is determined. Shares near 0 need a run of their own.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, Literal

import numpy as np
from scipy.optimize import nnls

from perennial.scaling import two_terms
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column


class DomainShare(Law):
    """Nine coefficients; the largest share of replay that pays is read from two such laws."""

    INPUTS: ClassVar[tuple[Input, ...]] = (
        two_terms.PARAMETERS,
        two_terms.TOKENS,
        Input("share", "share", "of the evaluated domain in the training tokens"),
    )
    TARGET: ClassVar[Input] = Input("loss", "nats/token", "on the evaluated domain")
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        *two_terms.MAIN,
        Coefficient("eta", "1", 0.0, 5.0, False, "exponent of the share in the data term", vanishing="low"),
        Coefficient("C", "nats/token", 1e-9, 20.0, True, "weight of too small a share", vanishing="low"),
        Coefficient("epsilon", "share", 1e-6, 1.0, True, "share that counts as none"),
        Coefficient("gamma", "1", 0.01, 10.0, True, "exponent of too small a share"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {
                "E": 1.5,
                "A": 400.0,
                "alpha": 0.34,
                "B": 300.0,
                "beta": 0.3,
                "eta": 0.3,
                "C": 0.05,
                "epsilon": 0.05,
                "gamma": 0.7,
            },
            "inputs": {"parameters": (1e8, 7e9), "tokens": (1e8, 2e10), "share": (0.01, 1.0)},
        },
    ]
    IDENTIFIES: ClassVar[Literal["coefficients", "curve"]] = "curve"

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """E + A / N^alpha + B r^eta / D^beta + C / (r + epsilon)^gamma."""
        size, data, lack = _terms(inputs, coefficients)
        return coefficients["E"] + size + data + lack

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> dict[str, np.ndarray]:
        """By all nine."""
        c, share = coefficients, column(inputs, "share")
        size, data, lack = _terms(inputs, c)
        return {
            "E": np.ones_like(size),
            "A": size / c["A"],
            "alpha": -size * np.log(column(inputs, "parameters")),
            "B": data / c["B"],
            "beta": -data * np.log(column(inputs, "tokens")),
            "eta": data * np.log(np.maximum(share, 1e-300)),
            "C": lack / c["C"],
            "epsilon": -c["gamma"] * lack / (share + c["epsilon"]),
            "gamma": -lack * np.log(share + c["epsilon"]),
        }

    def starts(self, table: Columns) -> list[Coefficients]:
        """The best fits of the four weights, none below 0, over a grid of the rest."""
        loss = column(table, "loss")
        found: list[tuple[float, dict[str, float]]] = []
        grid = itertools.product((0.2, 0.4), (0.2, 0.4), (0.1, 0.5), (0.01, 0.1), (0.3, 1.0))
        for alpha, beta, eta, epsilon, gamma in grid:
            rest = {"alpha": alpha, "beta": beta, "eta": eta, "epsilon": epsilon, "gamma": gamma}
            size, data, lack = _terms(table, {"A": 1.0, "B": 1.0, "C": 1.0, **rest})
            middle = [float(np.exp(np.log(np.maximum(part, 1e-300)).mean())) for part in (size, data, lack)]
            parts = [np.ones_like(loss), size / middle[0], data / middle[1], lack / middle[2]]
            solved, error = nnls(np.stack(parts, axis=1) / loss[:, None], np.ones_like(loss))
            floor = 0.01 * float(loss.min())  # a weight of 0 would have no gradient
            level, *weights = np.maximum(solved, floor).tolist()
            scaled = dict(zip("ABC", (w / m for w, m in zip(weights, middle, strict=True)), strict=True))
            found.append((float(error), {"E": level, **scaled, **rest}))
        found.sort(key=lambda pair: pair[0])
        return [start for _, start in found[:4]]

    def compute(self, inputs: Columns) -> np.ndarray:
        """6 N D."""
        return two_terms.compute(inputs)


def _terms(inputs: Columns, c: Coefficients) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Those of size, of data and of too small a share, shape (rows,)."""
    size, data = two_terms.terms(inputs, c)
    share = column(inputs, "share")
    return size, data * share ** c["eta"], c["C"] * (share + c["epsilon"]) ** -c["gamma"]
