"""What an optimizer is: named parameters in, one object with groups, a step and a named state out.

`build` returns something that works like a `torch.optim.Optimizer`: it has `param_groups`, `state`, `step()` and
`zero_grad()`. Each group carries `role`, `names` (beside `params`, in the same order) and `rate_multiplier`. State is
allocated when it is built, so that memory is known before the first step, and travels by parameter name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from pydantic import BeforeValidator, Field

from perennial.core.errors import UserError, nearest
from perennial.core.settings import Settings

if TYPE_CHECKING:
    import torch

    class Stepper(Protocol):
        """The part of `torch.optim.Optimizer` that training uses."""

        param_groups: list[dict[str, Any]]
        state: Any

        def step(self) -> Any:
            """Updates every parameter that has a gradient."""

        def zero_grad(self, set_to_none: bool = True) -> None:
            """Drops the gradients."""


ROLES = ("matrix", "stack", "embedding", "head", "norm", "bias")
"""What a parameter is for; a head tied to the embedding is one parameter, with the role 'embedding'.

A 'stack' is a tensor of more than two dimensions: many matrices in one, such as a layer's experts, or a convolution.
"""

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class WeightDecay(Settings):
    """Decoupled weight decay of each role: a step multiplies the weights by 1 - rate * decay."""

    matrix: NotNegative = 0.1
    """Of the layers' matrices."""
    stack: NotNegative = 0.1
    """Of tensors that hold many matrices, such as experts."""
    embedding: NotNegative = 0.0
    """Of the token embedding; rows of rare tokens would shrink between their few gradients."""
    head: NotNegative = 0.1
    """Of an output head with its own weights."""
    norm: NotNegative = 0.0
    """Of the norms' gains."""
    bias: NotNegative = 0.0
    """Of biases."""


class RateMultiplier(Settings):
    """Factor on the schedule's rate for each role; 0 freezes it."""

    matrix: NotNegative = 1.0
    """Of the layers' matrices."""
    stack: NotNegative = 1.0
    """Of tensors that hold many matrices, such as experts."""
    embedding: NotNegative = 1.0
    """Of the token embedding."""
    head: NotNegative = 1.0
    """Of an output head with its own weights."""
    norm: NotNegative = 1.0
    """Of the norms' gains."""
    bias: NotNegative = 1.0
    """Of biases."""


def _decay_of_matrices(value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return {"matrix": value, "stack": value, "head": value} if is_number else value


DecayByRole = Annotated[WeightDecay, BeforeValidator(_decay_of_matrices)]
"""Weight decay by role; a single number is that of matrices, stacks of them and head, the usual meaning."""


class Optimizer(Settings, ABC):
    """Settings of an update rule, and what is made of them for a model's parameters."""

    EXAMPLES: ClassVar[list[dict[str, Any]]]

    roles: ClassVar[tuple[str, ...]] = ROLES
    """The roles it can take."""

    @abstractmethod
    def build(
        self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], role_of: Callable[[str], str]
    ) -> Stepper:
        """The optimizer of these parameters, at rate 0, its state allocated.

        Raises UserError for a parameter that it cannot take.
        """

    @abstractmethod
    def state_bytes_per_parameter(self, role: str) -> float:
        """Bytes of state per fp32 parameter of a role; a few bytes per tensor come on top."""


def parameters_by_role(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    role_of: Callable[[str], str],
    roles: tuple[str, ...] = ROLES,
) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
    """Every parameter under exactly one role, in the order of `roles`; roles without any are left out.

    Raises UserError for an unknown role, a name or a parameter that comes twice, and when there is nothing to train.
    """
    found: dict[str, list[tuple[str, torch.nn.Parameter]]] = {role: [] for role in roles}
    names_by_id: dict[int, str] = {}
    for name, parameter in named_parameters:
        role = role_of(name)
        if role not in found:
            hint = nearest(role, roles)
            raise UserError(f"parameter '{name}' has the role '{role}'; the roles are {', '.join(roles)}.{hint}")
        if name in names_by_id.values():
            raise UserError(f"two parameters have the name '{name}'")
        if id(parameter) in names_by_id:
            raise UserError(f"one parameter is given twice, as '{names_by_id[id(parameter)]}' and as '{name}'")
        names_by_id[id(parameter)] = name
        found[role].append((name, parameter))
    if not names_by_id:
        raise UserError("there are no parameters to train")
    return {role: members for role, members in found.items() if members}


def groups_by_role(
    members: Mapping[str, list[tuple[str, torch.nn.Parameter]]], decay: WeightDecay, multiplier: RateMultiplier
) -> list[dict[str, Any]]:
    """One group per role, as `torch.optim` takes them; two where parameters are spread over different processes."""
    return [
        {
            "params": [parameter for _, parameter in part],
            "names": [name for name, _ in part],
            "role": role,
            "rate_multiplier": getattr(multiplier, role),
            "weight_decay": getattr(decay, role),
        }
        for role, named in members.items()
        for part in _by_mesh(named)
    ]


def _by_mesh(named: list[tuple[str, torch.nn.Parameter]]) -> list[list[tuple[str, torch.nn.Parameter]]]:
    """The parameters apart by the mesh of processes that they are spread over: one kernel takes those of one mesh."""
    found: dict[Any, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in named:
        found.setdefault(getattr(parameter, "device_mesh", None), []).append((name, parameter))
    return list(found.values())


def set_rate(optimizer: Stepper, rate: float) -> None:
    """Sets the learning rate of the next step: `rate` times each group's multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_multiplier"]


def skips_on_device(optimizer: Stepper) -> bool:
    """Whether a step can be called off by a number on the device (`found_inf`), without the host knowing.

    torch's fused optimizers can.
    """
    import torch

    is_torch = isinstance(optimizer, torch.optim.Optimizer)
    return is_torch and all(group.get("fused") for group in optimizer.param_groups)


def named_states(optimizer: Stepper) -> Iterator[tuple[str, torch.Tensor, dict[str, torch.Tensor]]]:
    """(name, parameter, state tensors by key) of every parameter."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            yield name, parameter, optimizer.state[parameter]


def export_state(optimizer: Stepper) -> dict[str, torch.Tensor]:
    """The whole state as '{parameter name}.{key}' -> tensor; the live tensors, not copies."""
    return {
        f"{name}.{key}": tensor.contiguous()
        for name, _, state in named_states(optimizer)
        for key, tensor in state.items()
    }


def import_state(
    optimizer: Stepper, tensors: Mapping[str, torch.Tensor], *, strict: bool = True
) -> tuple[list[str], list[str]]:
    """Copies an exported state in, by name; returns the parameters that keep their state and the fresh ones.

    strict: raises UserError, with nothing changed, unless names, shapes and dtypes are all the same. Otherwise a
    parameter keeps its state when all of it is there in the right shapes: a run can go on with another optimizer.
    """
    plan: list[tuple[torch.Tensor, torch.Tensor]] = []
    kept: list[str] = []
    fresh: list[str] = []
    problems: list[str] = []
    unused = set(tensors)
    for name, _, state in named_states(optimizer):
        wrong = [_misfit(f"{name}.{key}", own, tensors, strict) for key, own in state.items()]
        unused -= {f"{name}.{key}" for key in state}
        misfits = [problem for problem in wrong if problem]
        problems += misfits
        (fresh if misfits else kept).append(name)
        if not misfits:
            plan += [(own, tensors[f"{name}.{key}"]) for key, own in state.items()]
    problems += [f"{name} belongs to no parameter of this optimizer" for name in sorted(unused)]
    if strict and problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"the optimizer's state does not fit: {'; '.join(problems[:3])}{more}")
    for own, given in plan:
        own.copy_(given)
    return kept, fresh


def _misfit(name: str, own: torch.Tensor, tensors: Mapping[str, torch.Tensor], strict: bool) -> str | None:
    given = tensors.get(name)
    if given is None:
        return f"{name} is missing"
    if given.shape != own.shape:
        return f"{name} has shape {tuple(given.shape)}, not {tuple(own.shape)}"
    if strict and given.dtype != own.dtype:
        return f"{name} is {given.dtype}, not {own.dtype}"
    return None
