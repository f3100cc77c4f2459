"""Best time scale of AdamW, as a share of the run, of tokens per parameter: a power law.

Formula: tau = B / (learning rate * weight decay * D) = k * (D / N)^e. B tokens per update, D training tokens,
    N parameters; 1 / (learning rate * weight decay) is the number of updates over which AdamW averages.
Source: Bergsma et al. 2025, "Power Lines: Scaling Laws for Weight Decay and Batch Size in LLM Pre-training",
    arXiv 2505.13738; Wang & Aitchison 2024, "How to set AdamW's weight decay as you scale model and dataset size",
    arXiv 2405.13698 (the time scale).
Limits: the published constants are not checked here and belong to one recipe (muP, linear decay to 0, peak tuned). At a
    fixed size and number of tokens the best weight decay grows linearly with the batch.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column


class AdamWTimescale(Law):
    """Two coefficients; each row is the best time scale of one sweep over the weight decay."""

    INPUTS: ClassVar[tuple[Input, ...]] = (Input("tokens_per_parameter", "tokens/parameter", "D / N of the run"),)
    TARGET: ClassVar[Input] = Input("timescale", "share", "of the run over which AdamW averages")
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        Coefficient("k", "share", 1e-9, 1e9, True, "time scale at one token per parameter"),
        Coefficient("e", "1", -3.0, 3.0, False, "exponent of tokens per parameter"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {"k": 1.084, "e": -0.527},
            "inputs": {"tokens_per_parameter": (5.0, 500.0)},
        },
    ]
    PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {
        "power_lines": {
            "coefficients": {"k": 1.084, "e": -0.527},
            "source": "Bergsma et al. 2025, arXiv 2505.13738, constants not checked",
        },
    }

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """k (D / N)^e."""
        return coefficients["k"] * column(inputs, "tokens_per_parameter") ** coefficients["e"]

    def starts(self, table: Columns) -> list[Coefficients]:
        """Linear regression in logarithms."""
        x, y = np.log(column(table, "tokens_per_parameter")), np.log(column(table, "timescale"))
        slope, constant = np.polyfit(x, y, 1) if np.ptp(x) > 0 else (0.0, float(y.mean()))
        return [{"k": float(np.exp(constant)), "e": float(slope)}]
