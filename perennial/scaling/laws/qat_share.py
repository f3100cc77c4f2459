"""Best share of a run to train quantization-aware, of tokens per byte of the model.

Formula: share = exp(ln S - a / ln S) / S = exp(-a / ln S), S = D / (N * bits / 8): tokens per byte of the quantized
    weights, above 1. D all training tokens, N parameters.
Source: Dremov et al. 2025, "Compute-Optimal Quantization-Aware Training", arXiv 2509.22935, section 4: a = 6.7297 with
    a mean error of the share of 0.091.
Limits: 1 to 6 bits, models up to 1B; the cool-down of the learning rate can be fused with the quantized part.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column

_LEAST = 1.0 + 1e-9  # tokens per byte; below, the share is 0


class QATShare(Law):
    """One coefficient; each row is the best share of one sweep."""

    INPUTS: ClassVar[tuple[Input, ...]] = (
        Input("tokens_per_byte", "tokens/byte", "training tokens per byte of quantized weights"),
    )
    TARGET: ClassVar[Input] = Input("share", "share", "of the training tokens that are quantization-aware")
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        Coefficient("a", "1", 0.01, 100.0, True, "how little of a short run is spent so"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"settings": {}, "coefficients": {"a": 6.7297}, "inputs": {"tokens_per_byte": (10.0, 3000.0)}},
    ]
    PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {
        "dremov_2025": {
            "coefficients": {"a": 6.7297},
            "source": "Dremov et al. 2025, arXiv 2509.22935, section 4; mean error of the share 0.091",
        },
    }
    RESIDUAL: ClassVar[Literal["log", "linear"]] = "linear"

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """exp(-a / ln S)."""
        return np.exp(-coefficients["a"] / np.log(np.maximum(column(inputs, "tokens_per_byte"), _LEAST)))

    def starts(self, table: Columns) -> list[Coefficients]:
        """The mean of what each row says."""
        size = np.log(np.maximum(column(table, "tokens_per_byte"), 1.01))
        said = -size * np.log(np.clip(column(table, "share"), 1e-6, 1 - 1e-6))
        return [{"a": float(np.clip(said.mean(), 0.02, 90.0))}]


def tokens_per_byte(*, tokens: float, parameters: float, bits: float) -> float:
    """S = D / (N * bits / 8)."""
    return tokens / (parameters * bits / 8)
