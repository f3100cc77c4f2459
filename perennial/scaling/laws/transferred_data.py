"""Tokens of new data that earlier training is worth: a power law of new tokens and model size.

Formula: D_T = k * N^a * D^b. D_T further tokens of the new domain that a model from scratch would need for the same
    loss, D tokens of the new domain at hand, N parameters without embeddings. D + D_T takes the place of D in a law
    of loss for the new domain (`scaling.continual.effective_tokens`).
Source: Hernandez et al. 2021, "Scaling Laws for Transfer", arXiv 2102.01293, Eq. 1.2.
Differs: the paper counts characters; its constants, not checked here, are for characters of Python code.
Limits: where little new data are at hand; it holds no longer once D_T falls below D.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from perennial.scaling import power_of
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law


class TransferredData(Law):
    """Three coefficients; each row compares one continued run with runs from scratch."""

    INPUTS: ClassVar[tuple[Input, ...]] = (
        power_of.PARAMETERS,
        Input("tokens", "tokens", "of the new domain at hand"),
    )
    TARGET: ClassVar[Input] = Input("transferred", "tokens", "of the new domain that the earlier training is worth")
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        power_of.weight("tokens", "worth at one parameter and one token"),
        power_of.SIZE_EXPONENT,
        power_of.DATA_EXPONENT,
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {"k": 1.9e4, "a": 0.38, "b": 0.18},
            "inputs": {"parameters": (1e7, 1e9), "tokens": (1e5, 1e9)},
        },
    ]
    PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {
        "text_to_python": {
            "coefficients": {"k": 1.9e4, "a": 0.38, "b": 0.18},
            "source": "Hernandez et al. 2021, arXiv 2102.01293, figure 1, in characters; not checked",
        },
        "text_and_code_to_python": {
            "coefficients": {"k": 2.1e5, "a": 0.38, "b": 0.096},
            "source": "Hernandez et al. 2021, arXiv 2102.01293, figure 1, in characters; not checked",
        },
    }

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """k N^a D^b."""
        return power_of.predict(inputs, coefficients)

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> dict[str, np.ndarray]:
        """By k, a and b."""
        return power_of.gradient(inputs, coefficients)

    def starts(self, table: Columns) -> list[Coefficients]:
        """Linear regression in logarithms."""
        return power_of.starts(table, self.TARGET.name, ("parameters", "tokens"))
