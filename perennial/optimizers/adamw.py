"""Adam with decoupled weight decay, in torch's fused form: the usual choice.

Formula: m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; W = W (1 - rate * decay) - rate * m' / (sqrt(v') + epsilon),
    where m' = m / (1 - b1^t), v' = v / (1 - b2^t); g gradient, t number of steps.
Source: Loshchilov and Hutter 2017, "Decoupled Weight Decay Regularization", arXiv 1711.05101, algorithm 2;
    betas, epsilon and decay as in Ibrahim et al. 2024, arXiv 2403.08763, section 5.
Differs: embedding, norms and biases are not decayed by default; a single number for `weight_decay` changes that of
    matrices, stacks of them and head only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from perennial.optimizers.base import (
    DecayByRole,
    Fraction,
    Optimizer,
    RateMultiplier,
    WeightDecay,
    groups_by_role,
    parameters_by_role,
)

if TYPE_CHECKING:
    import torch

    from perennial.optimizers.base import Stepper


class AdamW(Optimizer):
    """First and second moment of every parameter: 8 bytes each."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {},
        {"beta1": 0.8, "beta2": 0.98, "weight_decay": 0.2},
        {"weight_decay": {"embedding": 0.1}, "rate_multiplier": {"head": 0.5, "embedding": 2.0}},
    ]

    beta1: Fraction = 0.9
    """Memory of the gradient's mean."""
    beta2: Fraction = 0.95
    """Memory of the gradient's square."""
    epsilon: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """Added to the root of the square."""
    weight_decay: DecayByRole = WeightDecay()
    """Decay by role; a single number is that of matrices, stacks and head."""
    rate_multiplier: RateMultiplier = RateMultiplier()
    """Factor on the rate, by role."""

    def build(
        self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], role_of: Callable[[str], str]
    ) -> Stepper:
        """torch's fused AdamW with one group per role."""
        members = parameters_by_role(named_parameters, role_of)
        groups = groups_by_role(members, self.weight_decay, self.rate_multiplier)
        return fused_adamw(groups, beta1=self.beta1, beta2=self.beta2, epsilon=self.epsilon)

    def state_bytes_per_parameter(self, role: str) -> float:
        """Two moments of 4 bytes."""
        return 8.0


def fused_adamw(groups: list[dict[str, Any]], *, beta1: float, beta2: float, epsilon: float) -> torch.optim.AdamW:
    """torch's AdamW on one kernel per group, with its state allocated as its first step would."""
    import torch

    # fused on the CPU too: the loop over tensors takes 4 times as long there, foreach 6 times.
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=epsilon, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
    return optimizer
