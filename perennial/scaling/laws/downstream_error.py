"""Average error of downstream tasks from the validation loss: an exponential that levels off.

Formula: error = epsilon - k * exp(-gamma * L). L nats per token on a fixed validation set; error a share, 0 to 1.
Source: Gadre et al. 2024, "Language models scale reliably with over-training and on downstream tasks",
    arXiv 2403.08540, Eq. 5 and section 4.
Limits: holds for the average over many tasks; a single task is far noisier. epsilon, k and gamma belong to one
    validation set and one list of tasks. Fit with at least one model that is clearly better than chance.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Input, Law, column


class DownstreamError(Law):
    """Loss in, average error out."""

    INPUTS: ClassVar[tuple[Input, ...]] = (Input("loss", "nats/token", "validation loss of the model"),)
    TARGET: ClassVar[Input] = Input("error", "share", "average top-1 error over the tasks")
    COEFFICIENTS: ClassVar[tuple[Coefficient, ...]] = (
        Coefficient("epsilon", "share", 0.05, 2.0, True, "error of a model without any skill"),
        Coefficient("k", "share", 1e-6, 1e6, True, "weight of what a lower loss gains"),
        Coefficient("gamma", "token/nat", 1e-3, 20.0, True, "how fast the gain grows as the loss falls"),
    )
    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {
            "settings": {},
            "coefficients": {"epsilon": 0.857, "k": 2.206, "gamma": 0.715},
            "inputs": {"loss": (1.8, 4.5)},
        },
    ]
    PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {
        "gadre_2024_17_tasks": {
            "coefficients": {"epsilon": 0.857, "k": 2.206, "gamma": 0.715},
            "source": "refit of Gadre et al. 2024, arXiv 2403.08540, RedPajama models, C4 loss, average of 17 tasks",
        },
        "gadre_2024_46_tasks": {
            "coefficients": {"epsilon": 0.761, "k": 1.323, "gamma": 0.891},
            "source": "refit of Gadre et al. 2024, arXiv 2403.08540, RedPajama models, C4 loss, average of 46 tasks",
        },
    }
    RESIDUAL: ClassVar = "linear"

    def predict(self, inputs: Columns, coefficients: Coefficients) -> np.ndarray:
        """epsilon - k exp(-gamma L)."""
        return coefficients["epsilon"] - coefficients["k"] * np.exp(-coefficients["gamma"] * column(inputs, "loss"))

    def gradient(self, inputs: Columns, coefficients: Coefficients) -> dict[str, np.ndarray]:
        """By epsilon, k and gamma."""
        loss = column(inputs, "loss")
        fall = np.exp(-coefficients["gamma"] * loss)
        return {"epsilon": np.ones_like(loss), "k": -fall, "gamma": coefficients["k"] * loss * fall}

    def starts(self, table: Columns) -> list[Coefficients]:
        """Straight-line estimates of epsilon and k for several gammas."""
        loss, error = column(table, "loss"), column(table, "error")
        found: list[Coefficients] = []
        for gamma in (0.3, 0.7, 1.5, 3.0):
            design = np.stack([np.ones_like(loss), -np.exp(-gamma * loss)], axis=1)
            epsilon, k = np.linalg.lstsq(design, error, rcond=None)[0]
            found.append({"epsilon": max(float(epsilon), 0.05), "k": max(float(k), 1e-6), "gamma": gamma})
        return found
