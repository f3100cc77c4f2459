"""Muon for the layers' matrices, AdamW for everything else, as one optimizer on one learning rate.

Formula, for a matrix W of m x n: B = momentum B + (1 - momentum) g; u = (1 - momentum) g + momentum B (nesterov), or B;
    O = the nearest (semi-)orthogonal matrix to u, by Newton-Schulz steps in bf16;
    W = W (1 - rate * decay) - rate * 0.2 sqrt(max(m, n)) O, whose update has about the RMS of AdamW's, so that
    rates and decays tuned for AdamW carry over. Embedding, head, norms, biases and stacks of matrices: see `adamw`.
Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
    kellerjordan.github.io/posts/muon;
    Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2 (the RMS factor).
Differs: torch.optim.Muon, used here, averages the gradient (lerp) where the first source adds it up; O does not
    depend on the scale.
Limits: matrices are 2-D and at least fp32 (torch's Muon takes its momentum's dtype from the gradient, and in torch 2.13
    normalises a bf16 momentum in place without nesterov); Newton-Schulz in bf16 rounds differently on other hardware
    by about 1.5% of an update. Fused projections (several matrices stored as one) would be orthogonalised together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from perennial.core.errors import UserError
from perennial.optimizers.adamw import fused_adamw
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


class Muon(Optimizer):
    """Orthogonalised updates for matrices: fewer steps to the same loss, half of AdamW's state."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {},
        {"nesterov": False, "momentum": 0.9, "weight_decay": 0.0},
        {"newton_schulz_steps": 3, "rate_multiplier": {"matrix": 0.5}, "weight_decay": {"norm": 0.01}},
    ]

    momentum: Fraction = 0.95
    """Memory of a matrix's gradient."""
    nesterov: bool = True
    """Whether the newest gradient counts once more."""
    newton_schulz_steps: int = Field(default=5, ge=1, le=20)
    """Steps of the orthogonalisation; 5 bring the singular values to about 0.7 to 1.2."""
    beta1: Fraction = 0.9
    """AdamW: memory of the gradient's mean."""
    beta2: Fraction = 0.95
    """AdamW: memory of the gradient's square."""
    epsilon: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """AdamW: added to the root of the square."""
    weight_decay: DecayByRole = WeightDecay()
    """Decay by role; a single number is that of matrices, stacks and head. Muon needs it more than AdamW does."""
    rate_multiplier: RateMultiplier = RateMultiplier()
    """Factor on the rate, by role."""

    def build(
        self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], role_of: Callable[[str], str]
    ) -> Stepper:
        """Both optimizers as one. Raises UserError unless there are matrices, all 2-D and fp32 or wider."""
        import torch

        members = parameters_by_role(named_parameters, role_of)
        groups = groups_by_role(members, self.weight_decay, self.rate_multiplier)
        matrices = [group for group in groups if group["role"] == "matrix"]
        others = [group for group in groups if group["role"] != "matrix"]
        if not matrices:
            raise UserError("muon has nothing to do: the model has no parameter with the role 'matrix'; use adamw")
        for name, parameter in members["matrix"]:
            _check_matrix(name, parameter)
        muon = torch.optim.Muon(
            matrices,
            lr=0.0,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.newton_schulz_steps,
            adjust_lr_fn="match_rms_adamw",
        )
        for _, parameter in members["matrix"]:
            muon.state[parameter] = {
                "momentum_buffer": torch.zeros_like(parameter, memory_format=torch.preserve_format)
            }
        adamw = [fused_adamw(others, beta1=self.beta1, beta2=self.beta2, epsilon=self.epsilon)] if others else []
        return _Together([muon, *adamw])

    def state_bytes_per_parameter(self, role: str) -> float:
        """One momentum of 4 bytes for matrices, two moments for the rest."""
        return 4.0 if role == "matrix" else 8.0


def _check_matrix(name: str, parameter: torch.nn.Parameter) -> None:
    if parameter.ndim != 2:
        raise UserError(f"muon takes matrices only; parameter '{name}' has shape {tuple(parameter.shape)}")
    if not parameter.is_floating_point() or parameter.element_size() < 4:
        raise UserError(
            f"muon keeps its momentum in fp32, parameter '{name}' is {parameter.dtype}: "
            "keep the weights in fp32 (bf16 autocast is fine) or use adamw"
        )


class _Together:
    """Several optimizers with different parameters behind the face of one."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts
        self.param_groups: list[dict[str, Any]] = [group for part in parts for group in part.param_groups]
        # The parts' own entries, not copies: what is imported here reaches them.
        self.state: dict[Any, dict[str, Any]] = {key: entry for part in parts for key, entry in part.state.items()}

    def step(self) -> None:
        """Steps every part."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of every part."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)
