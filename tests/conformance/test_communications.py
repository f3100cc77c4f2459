"""The contract of every communication found, on every one of its EXAMPLES; and diloco's outer step in float64."""

from __future__ import annotations

import contextlib
import importlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from perennial.communications.base import Communication, Rounds, ring_bytes
from perennial.core import plugins

NAMES = plugins.names("communications")
CASES = [(name, i) for name in NAMES for i in range(len(plugins.load("communications", name).EXAMPLES))]
SHAPES = {"matrix": (5, 3), "bias": (5,)}
COUNT = 20
Rule = Callable[[int, int, dict[str, torch.nn.Parameter]], None]
"""Moves a worker's parameters by an update: (worker, update, parameters)."""


class Together:
    """Threads that stand for the workers: `sum` returns when all of them have come."""

    def __init__(self, number: int) -> None:
        self._barrier = threading.Barrier(number, timeout=20)
        self._given: list[torch.Tensor] = [torch.empty(0)] * number

    def sum(self, worker: int, tensor: torch.Tensor) -> None:
        self._given[worker] = tensor.clone()
        self._barrier.wait()
        total = torch.stack(self._given).sum(0)
        self._barrier.wait()
        tensor.copy_(total)


class Member:
    """All workers, as one thread reaches the others."""

    def __init__(self, together: Together, worker: int, number: int) -> None:
        self._together, self._worker, self.number = together, worker, number

    def sum(self, tensor: torch.Tensor) -> None:
        self._together.sum(self._worker, tensor)


class Worker:
    """A model and its communication in progress."""

    def __init__(self, settings: Communication, member: Member, worker: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.worker = worker
        self.parameters = {
            name: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
            for name, shape in SHAPES.items()
        }
        self.rounds: Rounds = settings.start(self.parameters, member)
        self.sent: list[int] = []

    def train(self, rule: Rule, first: int, stop: int, *, last: int = 0) -> Worker:
        """Updates `first` to `stop` (exclusive), counted from 1; `last`: that of the stage."""
        for number in range(first, stop):
            with torch.no_grad():
                rule(self.worker, number, self.parameters)
            self.sent.append(self.rounds.after_update(number, last=number == last))
        return self

    def values(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


def settings(name: str, index: int = 0, **changes: Any) -> Communication:
    example = plugins.load("communications", name).EXAMPLES[index]
    found, problems = plugins.build("communications", {"name": name, **example, **changes})
    assert not problems, problems
    assert isinstance(found, Communication)
    return found


def workers(found: Communication, number: int, *, dtype: torch.dtype = torch.float32) -> list[Worker]:
    together = Together(number)
    return [Worker(found, Member(together, worker, number), worker, dtype) for worker in range(number)]


def all_train(members: list[Worker], rule: Rule, first: int, stop: int, *, last: int = 0) -> None:
    with ThreadPoolExecutor(len(members)) as pool:
        list(pool.map(lambda member: member.train(rule, first, stop, last=last), members))


def apart(worker: int, number: int, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Another step for each worker and update."""
    generator = torch.Generator().manual_seed(100 * worker + number)
    for parameter in parameters.values():
        parameter.sub_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.1)


def alike(worker: int, number: int, parameters: dict[str, torch.nn.Parameter]) -> None:
    """The same step for all workers."""
    apart(0, number, parameters)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rule_of(found: Communication) -> Rule:
    """Workers that do not train apart make equal updates."""
    return apart if found.trains_apart else alike


@pytest.mark.parametrize(("name", "index"), CASES)
def test_workers_hold_one_model_when_a_stage_ends(name: str, index: int) -> None:
    found = settings(name, index)
    members = workers(found, 3)
    all_train(members, rule_of(found), 1, COUNT + 1, last=COUNT)
    values = [member.values() for member in members]
    assert same(values[0], values[1])
    assert same(values[1], values[2])
    assert not same(values[0], workers(found, 1)[0].values())
    for member in members:
        with member.rounds.common() as own:
            assert same(member.values(), values[0])
            assert not own


@pytest.mark.parametrize(("name", "index"), CASES)
def test_common_is_the_same_for_all_and_put_back(name: str, index: int) -> None:
    found = settings(name, index)
    members = workers(found, 2)
    all_train(members, rule_of(found), 1, 2)
    shared = []
    for member in members:
        before = member.values()
        with contextlib.suppress(RuntimeError), member.rounds.common() as own:
            shared.append(member.values())
            assert not own or same({name: tensor.clone() for name, tensor in own.items()}, before)
            raise RuntimeError
        assert same(member.values(), before)
    assert same(*shared)


@pytest.mark.parametrize(("name", "index"), CASES)
@pytest.mark.parametrize("cut", [3, 7])
def test_goes_on_to_the_bit_from_what_was_saved(name: str, index: int, cut: int) -> None:
    """Also by way of JSON, and from the middle of a round."""
    found = settings(name, index)
    straight, resumed = workers(found, 2), workers(plugins.build("communications", _dumped(found))[0], 2)
    all_train(straight, rule_of(found), 1, cut)
    together = Together(2)
    for number, (member, other) in enumerate(zip(straight, resumed, strict=True)):
        with member.rounds.common() as own, torch.no_grad():
            kept = {name: tensor.clone() for name, tensor in own.items()}
            shared = {name: tensor.clone() for name, tensor in member.rounds.shared_state().items()}
            for key, parameter in other.parameters.items():
                parameter.copy_(member.parameters[key])
        other.rounds = found.start(other.parameters, Member(together, number, 2))
        other.rounds.load(shared, kept)
    all_train(straight, rule_of(found), cut, COUNT + 1, last=COUNT)
    all_train(resumed, rule_of(found), cut, COUNT + 1, last=COUNT)
    assert same(straight[0].values(), resumed[0].values())
    assert straight[0].sent[cut - 1 :] == resumed[0].sent


def _dumped(found: Communication) -> Any:
    return json.loads(json.dumps(plugins.dump(found)))


@pytest.mark.parametrize(("name", "index"), CASES)
def test_holds_as_much_as_it_declares(name: str, index: int) -> None:
    found = settings(name, index)
    member = workers(found, 1)[0].train(rule_of(found), 1, 3)
    own = {parameter.data_ptr() for parameter in member.parameters.values()}
    kept = [value for held in vars(member.rounds).values() if isinstance(held, dict) for value in held.values()]
    held_bytes = sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor.data_ptr() not in own)
    parameters = sum(parameter.numel() for parameter in member.parameters.values())
    assert held_bytes == found.state_bytes_per_parameter * parameters


@pytest.mark.parametrize(("name", "index"), CASES)
def test_equal_workers_are_one_worker(name: str, index: int) -> None:
    """The mean of equal numbers is exact, in fp32 and in bf16 halves; one worker sends nothing."""
    found = settings(name, index)
    one, two = workers(found, 1), workers(found, 2)
    all_train(one, alike, 1, COUNT + 1, last=COUNT)
    all_train(two, alike, 1, COUNT + 1, last=COUNT)
    assert same(one[0].values(), two[1].values())
    assert sum(one[0].sent) == 0
    assert sum(two[0].sent) > 0


@pytest.mark.parametrize("name", NAMES)
def test_component_is_documented_and_carries_examples(name: str) -> None:
    component = plugins.load("communications", name)
    module = importlib.import_module(component.__module__)
    assert module.__doc__ is not None
    for word in ("\nSource: ", "\nFormula", "\nLimits: "):
        assert word in module.__doc__
    assert component.EXAMPLES
    assert all(field.description for field in component.model_fields.values()), "a setting without its docstring"


# The rest is particular to one


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("rate", "momentum"), [(0.7, 0.9), (1.0, 0.0), (0.4, 0.3)])
def test_diloco_equals_the_formula_in_float64(nesterov: bool, rate: float, momentum: float) -> None:
    """Three workers, rounds of four updates and a last one of three."""
    chosen: dict[str, Any] = {"inner_updates": 4, "outer_rate": rate, "outer_momentum": momentum, "nesterov": nesterov}
    members = workers(settings("diloco", **chosen), 3, dtype=torch.float64)
    model = members[0].values()
    memory = {name: torch.zeros_like(value) for name, value in model.items()}
    for first, stop in ((1, 5), (5, 9), (9, 12)):
        moved = []
        for worker in range(3):
            own = {name: torch.nn.Parameter(value.clone()) for name, value in model.items()}
            with torch.no_grad():
                for number in range(first, stop):
                    apart(worker, number, own)
            moved.append({name: model[name] - parameter.detach() for name, parameter in own.items()})
        for name in model:
            step = sum(m[name] for m in moved) / 3
            memory[name] = momentum * memory[name] + step
            outer = step + momentum * memory[name] if nesterov else memory[name]
            model[name] = model[name] - rate * outer
    all_train(members, apart, 1, 12, last=11)
    for name, value in members[2].values().items():
        torch.testing.assert_close(value, model[name], rtol=1e-12, atol=1e-13)


def test_diloco_sends_once_in_a_round_what_gradients_send_every_time() -> None:
    """In a ring each process sends (W - 1) / W of the payload twice; bf16 is half of fp32."""
    size = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    for number in (2, 4):
        summed, diloco = workers(settings("every_update"), number), workers(settings("diloco"), number)
        half = workers(settings("diloco", payload="bf16"), number)
        for members in (summed, diloco, half):
            all_train(members, alike, 1, 61, last=60)
        assert sum(summed[0].sent) == 60 * ring_bytes(4 * size, number)
        assert [n for n, sent in enumerate(diloco[0].sent, 1) if sent] == [30, 60]
        assert sum(diloco[0].sent) == 2 * ring_bytes(4 * size, number)
        assert sum(half[0].sent) == 2 * ring_bytes(2 * size, number)
    assert ring_bytes(4 * size, 2) == 4 * size
    assert ring_bytes(1000, 4) == 1500


def test_diloco_forgets_its_momentum_when_asked() -> None:
    members = workers(settings("diloco", inner_updates=1), 1)
    all_train(members, apart, 1, 4)
    state = members[0].rounds.shared_state()
    assert all(tensor.any() for tensor in state.values())
    members[0].rounds.forget()
    assert not any(tensor.any() for tensor in state.values())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"name": "dilocco"}, "Did you mean 'diloco'"),
        ({"name": "diloco", "inner_update": 5}, "Did you mean 'inner_updates'"),
        ({"name": "diloco", "inner_updates": 0}, "greater than or equal to 1"),
        ({"name": "diloco", "outer_momentum": 1.0}, "less than 1"),
        ({"name": "diloco", "outer_rate": 0}, "greater than 0"),
        ({"name": "diloco", "payload": "fp16"}, "'fp32' or 'bf16'"),
        ({"name": "every_update", "inner_updates": 30}, "inner_updates"),
    ],
)
def test_bad_settings_are_named(asked: dict[str, Any], message: str) -> None:
    _, problems = plugins.build("communications", asked)
    assert message in str(problems)
