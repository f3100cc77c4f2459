"""The contract of every objective found, on every one of its EXAMPLES; and next_token against the plain computation."""

from __future__ import annotations

import functools
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perennial.core import plugins
from perennial.objectives.base import IGNORED, Objective

NAMES = plugins.names("objectives")
CASES = [(name, i) for name in NAMES for i in range(len(plugins.load("objectives", name).EXAMPLES))]
VOCABULARY, WIDTH = 23, 6


class Model(torch.nn.Module):
    """The least that an objective needs: hidden states from token ids, and a head, tied or not."""

    def __init__(self, *, tied: bool, vocabulary: int = VOCABULARY, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Parameter(torch.randn(vocabulary, width))
        self.matrix = torch.nn.Parameter(torch.randn(width, width) * width**-0.5)
        if not tied:
            self.head = torch.nn.Parameter(torch.randn(vocabulary, width))

    @property
    def head_weight(self) -> torch.Tensor:
        return getattr(self, "head", self.embedding)

    def forward(self, inputs: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
        x = torch.nn.functional.linear(self.embedding[inputs], self.matrix)
        return x if segments is None else x * (1 + segments.unsqueeze(-1))


class CappedModel(Model):
    """A model whose logits are not one product: it has no head weight to give, and is called for logits."""

    head_weight = None

    def __init__(self, **sizes: int) -> None:
        super().__init__(tied=False, **sizes)

    def forward(self, inputs: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
        return 9 * torch.tanh(torch.nn.functional.linear(super().forward(inputs, segments), self.head) / 9)


HEADS = {"tied": lambda: Model(tied=True), "own": lambda: Model(tied=False), "logits": CappedModel}


@dataclass
class Batch:
    inputs: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor | None = None

    def rows(self, start: int, stop: int) -> Batch:
        segments = None if self.segments is None else self.segments[start:stop]
        return Batch(self.inputs[start:stop], self.targets[start:stop], segments)


def batch(rows: int = 6, length: int = 5, ignored: float = 0.3) -> Batch:
    torch.manual_seed(1)
    inputs, targets = torch.randint(VOCABULARY, (2, rows, length))
    targets = targets.masked_fill(torch.rand(rows, length) < ignored, IGNORED)
    return Batch(inputs, targets, torch.arange(length).expand(rows, length) // 2)


def settings(name: str, index: int) -> Objective:
    example = plugins.load("objectives", name).EXAMPLES[index]
    objective, problems = plugins.build("objectives", {"name": name, **example})
    assert not problems, problems
    return objective


def ready(name: str, index: int, dtype: torch.dtype = torch.float64) -> Objective:
    """The objective with the further models that it asks for, each different from the one that is trained."""
    objective = settings(name, index)
    models = []
    for number, _ in enumerate(objective.checkpoints()):
        model = (CappedModel() if number % 2 else Model(tied=True)).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * (number + 1) * parameter.sin())
        models.append(model)
    return objective.with_models(models)


def gradients(model: Model) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor], tolerance: float) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "index"), CASES)
@pytest.mark.parametrize("head", HEADS)
def test_any_split_into_micro_batches_gives_the_same_gradient(name: str, index: int, head: str) -> None:
    model, data, objective = HEADS[head]().double(), batch(), ready(name, index)
    count = int((data.targets != IGNORED).sum())
    expected, nats = None, None
    for size in (6, 3, 2, 1):
        parts = [objective.loss(model, data.rows(i, i + size)) for i in range(0, 6, size)]
        for part in parts:
            (part.total / count).backward()
        assert sum(int(part.count) for part in parts) == count
        measured, found = float(sum(part.nats for part in parts)), gradients(model)
        if expected is None:
            expected, nats = found, measured
        assert measured == pytest.approx(nats, rel=1e-12)
        assert_same(found, expected, 1e-12)


@pytest.mark.parametrize(("name", "index"), CASES)
@pytest.mark.parametrize("head", ["own", "logits"])
def test_ignored_targets_contribute_nothing(name: str, index: int, head: str) -> None:
    model, objective = HEADS[head]().double(), ready(name, index)
    data = batch(rows=4, ignored=0.0)
    masked = Batch(data.inputs, data.targets.clone(), data.segments)
    masked.targets[2:] = IGNORED
    whole, part = objective.loss(model, masked), objective.loss(model, data.rows(0, 2))
    assert int(whole.count) == int(part.count) == 10
    assert whole.nats.item() == pytest.approx(part.nats.item(), rel=1e-12)
    assert whole.total.item() == pytest.approx(part.total.item(), rel=1e-12)
    whole.total.backward()
    found = gradients(model)
    part.total.backward()
    assert_same(found, gradients(model), 1e-12)

    masked.targets[:] = IGNORED
    nothing = objective.loss(model, masked)
    nothing.total.backward()
    assert int(nothing.count) == 0
    assert float(nothing.total.detach()) == 0
    assert all(not gradient.any() for gradient in gradients(model))


@pytest.mark.parametrize(("name", "index"), CASES)
@pytest.mark.parametrize("head", ["own", "logits"])
def test_uniform_logits_give_the_logarithm_of_the_vocabulary(name: str, index: int, head: str) -> None:
    model, data, objective = HEADS[head](), batch(), ready(name, index, torch.float32)
    with torch.no_grad():
        model.head.zero_()
    loss = objective.loss(model, data)
    assert loss.nats.item() / int(loss.count) == pytest.approx(math.log(VOCABULARY), rel=1e-6)


@pytest.mark.parametrize(("name", "index"), CASES)
@pytest.mark.parametrize("head", ["tied", "logits"])
def test_evaluate_is_the_reported_loss_without_gradients(name: str, index: int, head: str) -> None:
    model, data, objective = HEADS[head](), batch(), ready(name, index, torch.float32)
    loss, (nats, count) = objective.loss(model, data), objective.evaluate(model, data)
    assert loss.total.requires_grad
    assert not loss.nats.requires_grad
    assert not nats.requires_grad
    assert nats.item() == pytest.approx(loss.nats.item(), rel=1e-6)
    assert int(count) == int(loss.count)
    assert loss.nats.dtype == nats.dtype == torch.float32
    assert loss.total.shape == nats.shape == ()


@pytest.mark.parametrize(("name", "index"), CASES)
@pytest.mark.parametrize("head", ["own", "logits"])
def test_gradient_is_the_derivative(name: str, index: int, head: str) -> None:
    model, data, objective = HEADS[head]().double(), batch(rows=3), ready(name, index)

    def total(embedding: torch.Tensor, matrix: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        given = {"model.embedding": embedding, "model.matrix": matrix, "model.head": head}
        return torch.func.functional_call(Wrapper(model, objective), given, (data,))

    inputs = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    assert torch.autograd.gradcheck(total, inputs, fast_mode=True)


class Wrapper(torch.nn.Module):
    """The objective's total as a module, so that its parameters can be swapped for others."""

    def __init__(self, model: Model, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, data: Batch) -> torch.Tensor:
        return self.objective.loss(self.model, data).total


@pytest.mark.parametrize(("name", "index"), CASES)
def test_same_after_a_round_trip_through_json(name: str, index: int) -> None:
    objective = settings(name, index)
    again, problems = plugins.build("objectives", json.loads(json.dumps(plugins.dump(objective))))
    assert not problems
    assert again == objective


@pytest.mark.parametrize("name", NAMES)
def test_component_is_documented_and_carries_examples(name: str) -> None:
    component = plugins.load("objectives", name)
    module = importlib.import_module(component.__module__)
    assert module.__doc__ is not None
    assert len(module.__doc__.splitlines()[0]) < 100
    assert "\nSource: " in module.__doc__
    assert "\nFormula: " in module.__doc__
    assert len(component.EXAMPLES) >= 2
    assert all(field.description for field in component.model_fields.values()), "a setting without its docstring"


# next_token against the plain computation


def plainly(model: Model, data: Batch, z_loss: float) -> torch.Tensor:
    """The objective's total as one would write it, with all logits at once."""
    states = model(data.inputs, data.segments)
    product = states if model.head_weight is None else torch.nn.functional.linear(states, model.head_weight)
    logits = product.flatten(0, 1).float()
    targets = data.targets.flatten()
    log_z = torch.logsumexp(logits, dim=-1)
    nats = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return nats + z_loss * (log_z.square() * (targets != IGNORED)).sum()


def next_token(**given: Any) -> Objective:
    objective, problems = plugins.build("objectives", {"name": "next_token", **given})
    assert not problems, problems
    return objective


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 30, None])
def test_equals_the_plain_computation_in_fp32(head: str, z_loss: float, chunk_tokens: int | None) -> None:
    model, data = HEADS[head](), batch()
    expected = plainly(model, data, z_loss)
    (expected / 7).backward()
    wanted = gradients(model)
    loss = next_token(z_loss=z_loss, chunk_tokens=chunk_tokens).loss(model, data)
    (loss.total / 7).backward()
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5)
    assert_same(gradients(model), wanted, 1e-5)
    if z_loss == 0:
        assert loss.nats.item() == loss.total.item()


@pytest.mark.parametrize("kind", [functools.partial(Model, tied=False), CappedModel])
def test_under_bf16_autocast_it_is_as_near_to_fp32_as_the_plain_computation(kind: Callable[..., Model]) -> None:
    model = kind(vocabulary=300, width=32)
    torch.manual_seed(2)
    inputs, targets = torch.randint(300, (2, 16, 32))
    data = Batch(inputs, targets)
    plainly(model, data, 0.0).backward()
    exact = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain, loss = plainly(model, data, 0.0), next_token(chunk_tokens=100).loss(model, data)
    plain.backward()
    plain_error = max(float((g - e).norm() / e.norm()) for g, e in zip(gradients(model), exact, strict=True))
    loss.total.backward()
    own = gradients(model)
    error = max(float((g - e).norm() / e.norm()) for g, e in zip(own, exact, strict=True))
    assert 1e-4 < error < 1.5 * plain_error, "bf16 products are expected, and no more rounding than plain ones have"
    assert all(gradient.dtype == torch.float32 for gradient in own)
    assert loss.nats.dtype == torch.float32
    assert loss.nats.item() == pytest.approx(plain.item(), rel=1e-4)


def test_its_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    """Beside what is as large as the head itself, there is one chunk of logits, however many tokens there are."""
    width, chunk, largest = 8, 32, {}

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend(t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    for vocabulary, tokens in ((1000, 256), (1000, 2048), (4000, 2048)):
        model, made = Model(tied=True, vocabulary=vocabulary, width=width), []
        data = Batch(*torch.randint(vocabulary, (2, 1, tokens)))
        with Sizes(), torch.autocast("cpu", torch.bfloat16):
            next_token(chunk_tokens=chunk).loss(model, data).total.backward()
        largest[vocabulary, tokens] = max(made)
    assert largest[1000, 256] == largest[1000, 2048] == 4 * chunk * 1000
    assert largest[4000, 2048] == 4 * chunk * 4000


def test_given_logits_are_kept_once_and_left_as_they_are() -> None:
    given = torch.randn(40, VOCABULARY, requires_grad=True)

    class Giver:
        head_weight = None

        def __call__(self, inputs: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
            return given

    before, saved = given.detach().clone(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = next_token(chunk_tokens=8).loss(Giver(), Batch(torch.zeros(40).long(), torch.arange(40) % VOCABULARY))
    assert [t.data_ptr() for t in saved if t.is_floating_point()] == [given.data_ptr()]
    for _ in range(2):  # the graph may be gone through again
        loss.total.backward(retain_graph=True)
    expected = torch.nn.functional.cross_entropy(
        before.requires_grad_(), torch.arange(40) % VOCABULARY, reduction="sum"
    )
    expected.backward()
    torch.testing.assert_close(given.grad, 2 * before.grad)
    assert torch.equal(given.detach(), before.detach())


def test_sure_and_hopeless_predictions_stay_finite() -> None:
    model = Model(tied=False)
    with torch.no_grad():
        model.head.mul_(1e4)
    data = batch()
    loss = next_token(z_loss=1e-4).loss(model, data)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(g).all() for g in gradients(model))
    expected = plainly(model, data, 0.0)
    assert loss.nats.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_frozen_trunk_or_head_gets_no_gradient() -> None:
    data = batch()
    model = Model(tied=False)
    model.head.requires_grad_(False)
    next_token().loss(model, data).total.backward()
    assert model.head.grad is None
    assert model.matrix.grad is not None
    model = Model(tied=False)
    model.embedding.requires_grad_(False)
    model.matrix.requires_grad_(False)
    next_token().loss(model, data).total.backward()
    assert model.head.grad is not None
    assert model.matrix.grad is None


def test_backward_may_run_twice() -> None:
    model, data = Model(tied=True), batch()
    total = next_token().loss(model, data).total
    total.backward(retain_graph=True)
    once = gradients(model)
    total.backward()
    assert_same(gradients(model), once, 0)


def test_pure_bf16_weights_sum_their_gradient_in_fp32() -> None:
    model, data = Model(tied=False).bfloat16(), batch(rows=400)
    loss = next_token(chunk_tokens=1).loss(model, data)
    loss.total.backward()
    assert loss.nats.dtype == torch.float32
    found = gradients(model)
    next_token().loss(model.float(), data).total.backward()
    assert found[2].dtype == torch.bfloat16
    # Rounding 2000 products of both signs and one sum; summing 2000 times in bf16 would be off by far more.
    assert (found[2].float() - model.head.grad).norm() < 0.02 * model.head.grad.norm()  # type: ignore[union-attr]


def test_settings_out_of_range_are_refused() -> None:
    _, problems = plugins.build("objectives", {"name": "next_token", "z_loss": -1, "chunk_tokens": 0, "zloss": 1})
    assert {problem.loc[0] for problem in problems} == {"z_loss", "chunk_tokens", "zloss"}
    assert any("'z_loss'" in problem.message for problem in problems)
