"""What runs by hand on a CPU equals torch's plain formula, keeps less, and gives only the gradients asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perennial.model import operations
from perennial.model.operations import products, rms_norm, rotate, runs_by_hand, silu_gated_mlp

ROWS, LENGTH, WIDTH, INNER = 3, 10, 16, 24


def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, gate, up, down and a norm's gain."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((ROWS, LENGTH, WIDTH), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER), (WIDTH,))
    return tuple(torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


def table(dtype: torch.dtype) -> Tensor:
    """cos and signed sin of some angles, as `rotary_table` has them."""
    angles = torch.arange(LENGTH, dtype=dtype)[:, None] / torch.tensor([1.0, 3.0, 9.0, 27.0], dtype=dtype)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))[:, :, None, :]


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "products": lambda x, gate, up, down, gain: torch.cat(products(x, gate, up, down.t()), dim=-1),
    "silu_gated_mlp": lambda x, gate, up, down, gain: silu_gated_mlp(x, gate, up, down),
    "rms_norm": lambda x, gate, up, down, gain: rms_norm(x, gain, 1e-5),
    "rotate": lambda x, gate, up, down, gain: rotate(x.view(ROWS, LENGTH, 2, 8), table(x.dtype)).flatten(2).square(),
}


def derivatives(function: Callable[..., Tensor], given: tuple[Tensor, ...], order: int) -> list[Tensor]:
    """The result and the gradients of a sum of it, or with order 2 of the sum of the squared gradients."""
    out = function(*given)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    used = [tensor for tensor in given if tensor.requires_grad]
    grads = torch.autograd.grad((out * weights).sum(), used, create_graph=order == 2, allow_unused=True)
    if order == 2:
        total = sum(grad.square().sum() for grad in grads if grad is not None)
        assert isinstance(total, Tensor)
        grads = torch.autograd.grad(total, used, allow_unused=True)
    return [out.detach(), *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("order", [1, 2])
def test_by_hand_equals_the_plain_formula(name: str, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(torch.float64)
    found = derivatives(FUNCTIONS[name], given, order)
    monkeypatch.setattr(operations, "runs_by_hand", lambda *_: False)
    for one, other in zip(found, derivatives(FUNCTIONS[name], given, order), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["products", "silu_gated_mlp"])
def test_under_autocast_results_are_those_of_linear_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(torch.float32)
    exact = derivatives(FUNCTIONS[name], given, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = derivatives(FUNCTIONS[name], given, 1)
    monkeypatch.setattr(operations, "runs_by_hand", lambda *_: False)
    with torch.autocast("cpu", torch.bfloat16):
        plain = derivatives(FUNCTIONS[name], given, 1)
    assert torch.equal(found[0], plain[0]), "the forward pass rounds alike"
    assert all(grad.dtype == torch.float32 for grad in found[1:])
    for own, other, true in zip(found[1:], plain[1:], exact[1:], strict=True):
        assert (own - true).norm() < 1.5 * (other - true).norm() + 1e-6


def test_a_gated_mlp_keeps_its_input_gate_and_up_and_no_copies_of_weights() -> None:
    x, gate, up, down, _ = inputs(torch.float32)
    kept: list[Tensor] = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        silu_gated_mlp(x, gate, up, down)
    own = {weight.data_ptr() for weight in (gate, up, down)}
    new = [tensor for tensor in kept if tensor.data_ptr() not in own]
    assert sum(tensor.nbytes for tensor in new) == 2 * ROWS * LENGTH * (WIDTH + 2 * INNER)


def test_only_gradients_that_are_asked_for_are_made() -> None:
    x, gate, up, down, _ = inputs(torch.float32)
    frozen = gate.detach()
    silu_gated_mlp(x.detach(), frozen, up, down).sum().backward()
    expected = torch.autograd.grad(F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down).sum(), (up, down))
    torch.testing.assert_close((up.grad, down.grad), expected)
    first, _ = products(x, frozen, up.detach())
    first.sum().backward()
    assert x.grad is not None
    assert frozen.grad is None


def test_a_result_may_be_gone_through_twice() -> None:
    given = inputs(torch.float32)
    out = FUNCTIONS["silu_gated_mlp"](*given).sum()
    once = torch.autograd.grad(out, given[:4], retain_graph=True)
    for one, other in zip(once, torch.autograd.grad(out, given[:4]), strict=True):
        assert torch.equal(one, other)


def test_tensors_that_are_more_than_numbers_take_the_plain_formula() -> None:
    class Special(Tensor):
        """Stands for a distributed tensor."""

    plain = torch.ones(2, 2)
    assert runs_by_hand(plain, torch.nn.Parameter(plain))
    assert not runs_by_hand(plain, plain.as_subclass(Special))
    assert not runs_by_hand(plain.to("meta"))
