"""Best or critical batch size of model size and tokens: a power law, mostly of tokens.

Formula: batch = k * N^a * D^b tokens. N parameters, D training tokens; by default a = 0.
Source: Li et al. 2025, "Predictable Scale: Part I, Step Law", arXiv 2503.04715, Eq. 1 (best); DeepSeek-AI 2024,
    "DeepSeek LLM", arXiv 2401.02954, section 3.1 (best, of compute); Zhang et al. 2024, "How Does Critical Batch Size
    Scale in Pre-training?", arXiv 2410.21676, section 4 (critical: 20% more tokens than a small batch needs);
    Bergsma et al. 2025, "Power Lines", arXiv 2505.13738 (both).
Limits: of AdamW at its best learning rate. Zhang et al. find that it follows the tokens and not the size; where tokens
    are a fixed multiple of parameters the two cannot be told apart.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from perennial.scaling import power_of
from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law


class BatchSize(Law):
    """Two or three coefficients; each row is the best, or the critical, batch of one sweep."""

    INPUTS: ClassVar[tuple[Input, ...]] = (power_of.PARAMETERS, power_of.TOKENS)
    TARGET: ClassVar[Input] = Input("batch", "tokens", "of one update")
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        power_of.weight("tokens", "batch at one parameter and one token"),
        power_of.SIZE_EXPONENT,
        power_of.DATA_EXPONENT,
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {"follows": "both"},
            "coefficients": {"k": 0.5, "a": 0.2, "b": 0.4},
            "inputs": {"parameters": (2e7, 2e9), "tokens": (1e9, 1e11)},
        },
        {"settings": {}, "coefficients": {"k": 0.58, "b": 0.571}, "inputs": {"tokens": (1e9, 1e11)}},
        {
            "settings": {"follows": "parameters"},
            "coefficients": {"k": 8.5, "a": 0.468},
            "inputs": {"parameters": (8e7, 2e9)},
        },
    ]
    PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {
        "step_law": {
            "coefficients": {"k": 0.58, "b": 0.571},
            "source": "Li et al. 2025, arXiv 2503.04715, Eq. 1: best batch, cosine to 1e-5",
        },
        "step_law_refit": {
            "coefficients": {"k": 0.395, "b": 0.585},
            "source": "refit of the 17 dense sweeps of Li et al. 2025, arXiv 2503.04715: best batch",
        },
        "deepseek": {
            "coefficients": {"k": 0.292 * 6.0**0.3271, "a": 0.3271, "b": 0.3271},
            "source": "DeepSeek-AI 2024, arXiv 2401.02954, section 3.1: 0.292 C^0.3271 with C taken as 6 N D",
        },
        "zhang_critical": {
            "coefficients": {"k": 18.2, "b": 0.468},
            "source": "refit of Zhang et al. 2024, arXiv 2410.21676: critical batch at 20 tokens per parameter",
        },
        "power_lines_best": {
            "coefficients": {"k": 0.0306 * 2048, "b": 0.383},
            "source": "Bergsma et al. 2025, arXiv 2505.13738, constants not checked: best batch",
        },
        "power_lines_critical": {
            "coefficients": {"k": 0.0471 * 2048, "b": 0.462},
            "source": "Bergsma et al. 2025, arXiv 2505.13738, constants not checked: critical batch",
        },
    }

    follows: Literal["tokens", "parameters", "both"] = "tokens"
    """What the batch is a power of."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Those that the batch follows."""
        return tuple(i for i in self.INPUTS if self.follows in (i.name, "both"))

    @property
    def coefficients(self) -> tuple[Coefficient, ...]:
        """k and the exponents of those inputs."""
        wanted = {"k", *(power_of.EXPONENTS[i.name] for i in self.inputs)}
        return tuple(c for c in self.COEFFICIENTS if c.name in wanted)

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """k N^a D^b."""
        return power_of.predict(inputs, coefficients)

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> dict[str, np.ndarray]:
        """By k and the exponents."""
        return power_of.gradient(inputs, coefficients)

    def starts(self, table: Columns) -> list[Coefficients]:
        """Linear regression in logarithms."""
        return power_of.starts(table, self.TARGET.name, tuple(i.name for i in self.inputs))
