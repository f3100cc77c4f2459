"""Best peak learning rate of model size and tokens: a power law.

Formula: learning rate = k * N^a * D^b. N parameters without embeddings (of a mixture of experts: all of them, not only
    the active ones), D training tokens; the peak of AdamW.
Source: Li et al. 2025, "Predictable Scale: Part I, Step Law", arXiv 2503.04715, Eq. 1 (cosine to 1e-5);
    DeepSeek-AI 2024, "DeepSeek LLM", arXiv 2401.02954, section 3.1 (of compute: a = b).
Limits: tied to its recipe (shape of the layers, schedule, initialisation): on another group's models the Step Law's
    rate is several times too high. Prefer a fit to own sweeps (`scaling.sweeps`); batch sizes carry over better.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from perennial.scaling import power_of
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law


class LearningRate(Law):
    """Three coefficients; each row is the best rate of one sweep."""

    INPUTS: ClassVar[tuple[Input, ...]] = (power_of.PARAMETERS, power_of.TOKENS)
    TARGET: ClassVar[Input] = Input("learning_rate", "1/update", "peak with the lowest final loss")
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        power_of.weight("1/update", "rate at one parameter and one token"),
        power_of.SIZE_EXPONENT,
        power_of.DATA_EXPONENT,
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {"k": 1.79, "a": -0.713, "b": 0.307},
            "inputs": {"parameters": (2e7, 2e9), "tokens": (1e9, 1e11)},
        },
    ]
    PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {
        "step_law": {
            "coefficients": {"k": 1.79, "a": -0.713, "b": 0.307},
            "source": "Li et al. 2025, arXiv 2503.04715, Eq. 1; excess loss 0.08% on its 17 dense sweeps",
        },
        "step_law_refit": {
            "coefficients": {"k": 131.0, "a": -0.835, "b": 0.226},
            "source": "refit of the 17 dense sweeps of Li et al. 2025, arXiv 2503.04715; excess loss 0.08%",
        },
        "deepseek": {
            "coefficients": {"k": 0.3118 * 6.0**-0.125, "a": -0.125, "b": -0.125},
            "source": "DeepSeek-AI 2024, arXiv 2401.02954, section 3.1: 0.3118 C^-0.125 with C taken as 6 N D",
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
