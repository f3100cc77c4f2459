"""The contract of every optimizer found, on every one of its EXAMPLES."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.optimizers.base import ROLES, Optimizer, export_state, import_state, set_rate

NAMES = plugins.names("optimizers")
CASES = [(name, i) for name in NAMES for i in range(len(plugins.load("optimizers", name).EXAMPLES))]
RATE = 0.02


class Network(torch.nn.Module):
    """A small network with a parameter of every role."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weights(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=generator) * shape[-1] ** -0.5)

        self.embedding = weights(24, 8)
        self.first_matrix, self.second_matrix = weights(16, 8), weights(8, 16)
        self.stack = weights(2, 8, 8)
        self.norm = torch.nn.Parameter(torch.ones(8))
        self.bias = torch.nn.Parameter(torch.zeros(16))
        self.head = weights(4, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding[ids]
        x = x + torch.tanh(x @ self.first_matrix.T + self.bias) @ self.second_matrix.T
        x = x + torch.tanh(x @ self.stack[0]) @ self.stack[1]
        return (x * self.norm) @ self.head.T


def role_of(name: str) -> str:
    return next(role for role in ROLES if name.endswith(role))


def settings(name: str, index: int) -> Optimizer:
    example = plugins.load("optimizers", name).EXAMPLES[index]
    optimizer, problems = plugins.build("optimizers", {"name": name, **example})
    assert not problems, problems
    return optimizer


IDS = torch.arange(24).repeat(2)
TARGETS = torch.sin(torch.arange(24 * 4).float()).reshape(24, 4).repeat(2, 1)


def loss_sum(network: Network, rows: slice = slice(None)) -> torch.Tensor:
    return (network(IDS[rows]) - TARGETS[rows]).square().sum() / IDS.numel()


def step(network: Network, optimizer: Any, rate: float = RATE, parts: int = 1) -> float:
    """One update on the whole batch, its gradient summed over `parts` micro-batches; the loss before it."""
    optimizer.zero_grad()
    size, total = IDS.numel() // parts, 0.0
    for start in range(0, IDS.numel(), size):
        loss = loss_sum(network, slice(start, start + size))
        loss.backward()
        total += loss.item()
    set_rate(optimizer, rate)
    optimizer.step()
    return total


@pytest.mark.parametrize(("name", "index"), CASES)
def test_converges(name: str, index: int) -> None:
    network = Network()
    optimizer = settings(name, index).build(network.named_parameters(), role_of)
    losses = [step(network, optimizer, RATE * (1 - i / 150)) for i in range(150)]
    assert losses[-1] < 0.05 * losses[0], (losses[0], losses[-1])


@pytest.mark.parametrize(("name", "index"), CASES)
def test_continues_bit_identically_from_stored_state(name: str, index: int) -> None:
    straight, resumed = Network(), Network()
    optimizer = settings(name, index).build(straight.named_parameters(), role_of)
    for _ in range(5):
        step(straight, optimizer)
    stored = save(export_state(optimizer)), save(straight.state_dict())
    for _ in range(5):
        step(straight, optimizer)

    again, problems = plugins.build("optimizers", json.loads(json.dumps(plugins.dump(settings(name, index)))))
    assert not problems, problems
    resumed.load_state_dict(load(stored[1]))
    other = again.build(resumed.named_parameters(), role_of)
    kept, fresh = import_state(other, load(stored[0]))
    assert sorted(kept) == sorted(dict(resumed.named_parameters()))
    assert not fresh
    for _ in range(5):
        step(resumed, other)
    for (key, one), two in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), key
    for key, tensor in export_state(optimizer).items():
        assert torch.equal(tensor, export_state(other)[key]), key


@pytest.mark.parametrize(("name", "index"), CASES)
def test_rate_0_changes_no_parameter(name: str, index: int) -> None:
    network = Network()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    optimizer = settings(name, index).build(network.named_parameters(), role_of)
    step(network, optimizer, rate=0.0)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize(("name", "index"), CASES)
def test_one_batch_is_its_micro_batches(name: str, index: int) -> None:
    whole, parted = Network().double(), Network().double()
    for network, parts in ((whole, 1), (parted, 6)):
        optimizer = settings(name, index).build(network.named_parameters(), role_of)
        for _ in range(3):
            step(network, optimizer, parts=parts)
    for key, tensor in whole.state_dict().items():
        # Muon orthogonalises in bf16: a last-bit difference of the gradient may show up as one bf16 rounding.
        torch.testing.assert_close(parted.state_dict()[key], tensor, rtol=0, atol=3 * RATE * 1e-2)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_state_is_allocated_by_build_and_as_large_as_declared(name: str, index: int) -> None:
    network = Network()
    component = settings(name, index)
    optimizer = component.build(network.named_parameters(), role_of)
    before = {key: (tensor.shape, tensor.dtype) for key, tensor in export_state(optimizer).items()}
    step(network, optimizer)
    after = export_state(optimizer)
    assert before == {key: (tensor.shape, tensor.dtype) for key, tensor in after.items()}
    for parameter_name, parameter in network.named_parameters():
        measured = sum(t.numel() * t.element_size() for k, t in after.items() if k.startswith(f"{parameter_name}."))
        declared = component.state_bytes_per_parameter(role_of(parameter_name)) * parameter.numel()
        assert declared <= measured <= declared + 16, (parameter_name, measured, declared)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_every_parameter_is_in_exactly_one_group(name: str, index: int) -> None:
    network = Network()
    component = settings(name, index)
    optimizer = component.build(network.named_parameters(), role_of)
    grouped = [n for group in optimizer.param_groups for n in group["names"]]
    assert sorted(grouped) == sorted(dict(network.named_parameters()))
    for group in optimizer.param_groups:
        assert group["role"] in component.roles
        assert all(role_of(n) == group["role"] for n in group["names"])
        assert [id(dict(network.named_parameters())[n]) for n in group["names"]] == [id(p) for p in group["params"]]
    assert set(component.roles) == set(ROLES), "a role that the optimizer does not handle"
    set_rate(optimizer, 0.5)
    assert all(group["lr"] == 0.5 * group["rate_multiplier"] for group in optimizer.param_groups)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_fit_no_group_are_refused(name: str) -> None:
    component = settings(name, 0)
    matrix, bias = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3))
    with pytest.raises(UserError, match=r"'x' has the role 'matrx'.*Did you mean 'matrix'"):
        component.build([("x", matrix)], lambda _: "matrx")
    with pytest.raises(UserError, match="given twice, as 'a_matrix' and as 'b_matrix'"):
        component.build([("a_matrix", matrix), ("b_matrix", matrix)], role_of)
    with pytest.raises(UserError, match="have the name 'a_matrix'"):
        component.build([("a_matrix", matrix), ("a_matrix", torch.nn.Parameter(torch.ones(2, 2)))], role_of)
    with pytest.raises(UserError, match="no parameters"):
        component.build([], role_of)
    component.build([("a_matrix", matrix), ("a_bias", bias)], role_of)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_weights_are_decayed_by_role(name: str, index: int) -> None:
    network = Network()
    component = settings(name, index)
    optimizer = component.build(network.named_parameters(), role_of)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_rate(optimizer, RATE)
    optimizer.step()
    for key, tensor in network.state_dict().items():
        role = role_of(key)
        shrink = 1 - RATE * getattr(component.rate_multiplier, role) * getattr(component.weight_decay, role)
        torch.testing.assert_close(tensor, before[key] * shrink, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_component_is_documented_and_carries_examples(name: str) -> None:
    component = plugins.load("optimizers", name)
    module = importlib.import_module(component.__module__)
    assert module.__doc__ is not None
    assert len(module.__doc__.splitlines()[0]) < 100
    assert "\nSource: " in module.__doc__
    assert "\nFormula" in module.__doc__
    assert len(component.EXAMPLES) >= 2
    assert all(field.description for field in component.model_fields.values()), "a setting without its docstring"


# What is particular to storing state, and to Muon


def trained(name: str) -> tuple[Network, Any]:
    network = Network()
    optimizer = settings(name, 0).build(network.named_parameters(), role_of)
    for _ in range(3):
        step(network, optimizer)
    return network, optimizer


@pytest.mark.parametrize(("parent", "child"), [("adamw", "muon"), ("muon", "adamw")])
def test_a_parent_may_continue_with_another_optimizer(parent: str, child: str) -> None:
    network, optimizer = trained(parent)
    stored = load(save(export_state(optimizer)))
    other = settings(child, 0).build(network.named_parameters(), role_of)
    with pytest.raises(UserError, match=r"first_matrix.*is missing"):
        import_state(other, stored)
    assert all(not tensor.any() for tensor in export_state(other).values()), "a refused import changed something"
    kept, fresh = import_state(other, stored, strict=False)
    assert sorted(kept) == ["bias", "embedding", "head", "norm", "stack"]
    assert sorted(fresh) == ["first_matrix", "second_matrix"]
    assert torch.equal(export_state(other)["head.exp_avg"], stored["head.exp_avg"])
    assert export_state(other)["head.step"] == 3
    before = loss_sum(network).item()
    for _ in range(20):
        step(network, other, rate=0.005)
    assert loss_sum(network).item() < before


def test_strict_import_names_what_does_not_fit() -> None:
    _, optimizer = trained("adamw")
    stored = dict(export_state(optimizer))
    stored["head.exp_avg"] = torch.zeros(5, 8)
    stored["norm.step"] = stored["norm.step"].double()
    stored["extra.step"] = torch.zeros(())
    _, other = trained("adamw")
    with pytest.raises(UserError) as refused:
        import_state(other, stored)
    for words in ("head.exp_avg has shape (5, 8), not (4, 8)", "norm.step is torch.float64", "extra.step belongs"):
        assert words in str(refused.value)
    kept, fresh = import_state(other, stored, strict=False)
    assert fresh == ["head"]
    assert len(kept) == 6


def test_adamw_equals_the_formula_in_float64() -> None:
    network = Network().double()
    optimizer = settings("adamw", 0).build(network.named_parameters(), role_of)
    weight = network.head.detach().clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for t in range(1, 6):
        step(network, optimizer)
        assert network.head.grad is not None
        gradient = network.head.grad
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        update = first / (1 - 0.9**t) / ((second / (1 - 0.95**t)).sqrt() + 1e-8)
        weight = weight * (1 - RATE * 0.1) - RATE * update
        torch.testing.assert_close(network.head.detach(), weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(32, 12), (64, 16), (16, 64)])
def test_muon_update_is_nearly_orthogonal_with_the_rms_of_adamw(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.zeros(shape))
    optimizer = settings("muon", 0).build([("a_matrix", weight)], role_of)
    weight.grad = torch.randn(shape)
    set_rate(optimizer, 1.0)
    optimizer.step()
    # Five Newton-Schulz steps leave the singular values of a well-conditioned matrix between 0.68 and 1.2, not at 1.
    values = torch.linalg.svdvals(weight.detach() / (0.2 * max(shape) ** 0.5))
    assert values.min() > 0.6
    assert values.max() < 1.25
    assert 0.14 < weight.detach().square().mean().sqrt() < 0.24


def test_muon_refuses_what_it_cannot_take() -> None:
    muon = settings("muon", 0)
    with pytest.raises(UserError, match="matrices only; parameter 'a_matrix' has shape"):
        muon.build([("a_matrix", torch.nn.Parameter(torch.ones(2, 3, 4)))], role_of)
    for nesterov in (True, False):
        half = plugins.build("optimizers", {"name": "muon", "nesterov": nesterov})[0]
        with pytest.raises(UserError, match=r"momentum in fp32, parameter 'a_matrix' is torch\.bfloat16"):
            half.build([("a_matrix", torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16)))], role_of)
    with pytest.raises(UserError, match="nothing to do"):
        muon.build([("a_bias", torch.nn.Parameter(torch.ones(2)))], role_of)


def test_one_number_is_the_decay_of_matrices_and_head() -> None:
    component, _ = plugins.build("optimizers", {"name": "adamw", "weight_decay": 0.3})
    decayed = {"matrix": 0.3, "stack": 0.3, "head": 0.3}
    assert component.weight_decay.model_dump() == {**dict.fromkeys(ROLES, 0), **decayed}
    _, problems = plugins.build("optimizers", {"name": "adamw", "weight_decay": {"haed": 0.3}, "beta1": 1.0})
    messages = " ".join(problem.message for problem in problems)
    assert "Did you mean 'head'" in messages
    assert "less than 1" in messages
