"""The contract of every pull found, on every one of its EXAMPLES: a step is the exact one, and nothing overshoots."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch

from perennial.core import plugins
from perennial.pulls.base import Pull
from perennial.train.pulling import Pulling

NAMES = plugins.names("pulls")
CASES = [(name, i) for name in NAMES for i in range(len(plugins.load("pulls", name).EXAMPLES))]


class Weights(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.matrix = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
        self.gain = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))


def settings(name: str, index: int, **changes: Any) -> Pull:
    example = plugins.load("pulls", name).EXAMPLES[index]
    pull, problems = plugins.build("pulls", {"name": name, **example, **changes})
    assert not problems, problems
    return pull


def squares(num_rows: int) -> dict[str, torch.Tensor]:
    """Squared gradients as a model would have them, with a weight that none ever reached."""
    assert num_rows > 0
    torch.manual_seed(num_rows)
    found = {name: torch.rand_like(weight) * 1e-6 for name, weight in Weights(0).state_dict().items()}
    found["matrix"][0, 0] = 0.0
    return found


@pytest.mark.parametrize(("name", "index"), CASES)
def test_a_step_is_the_minimum_of_distance_and_penalty(name: str, index: int) -> None:
    pull, model, parent, rate = settings(name, index), Weights(1), Weights(2), 0.03
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    importance = pull.importance(squares)
    Pulling(model, parent, pull, importance).after_step(rate)
    for key, weight in model.named_parameters():
        anchor = dict(parent.named_parameters())[key].detach()
        factor = torch.ones_like(anchor) if importance is None else importance[key]
        expected = anchor + (before[key] - anchor) / (1 + rate * pull.strength * factor)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_importance_is_1_on_average_and_never_negative(name: str, index: int) -> None:
    importance = settings(name, index).importance(squares)
    if importance is not None:
        values = torch.cat([tensor.flatten() for tensor in importance.values()])
        assert float(values.mean()) == pytest.approx(1)
        assert float(values.min()) >= 0


@pytest.mark.parametrize(("name", "index"), CASES)
def test_nothing_happens_at_rate_0_or_when_the_step_was_called_off(name: str, index: int) -> None:
    pull, model, parent = settings(name, index), Weights(1), Weights(2)
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    pulling = Pulling(model, parent, pull, pull.importance(squares))
    pulling.after_step(0.0)
    pulling.after_step(0.1, unless=torch.ones((), dtype=torch.float64))
    assert all(torch.equal(weight.detach(), before[key]) for key, weight in model.named_parameters())
    pulling.after_step(0.1, unless=torch.zeros((), dtype=torch.float64))
    assert not torch.equal(model.gain.detach(), before["gain"])


@pytest.mark.parametrize("name", NAMES)
def test_the_strongest_pull_stays_finite_and_never_overshoots(name: str) -> None:
    pull, model, parent = settings(name, 0, strength=1e12), Weights(1), Weights(2)
    Pulling(model, parent, pull, pull.importance(squares)).after_step(1.0)
    assert float((model.gain - parent.gain).abs().max().detach()) < 1e-6
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


@pytest.mark.parametrize(("name", "index"), CASES)
def test_same_after_a_round_trip_through_json(name: str, index: int) -> None:
    pull = settings(name, index)
    again, problems = plugins.build("pulls", json.loads(json.dumps(plugins.dump(pull))))
    assert not problems
    assert again == pull
    assert bool(pull.rows) == bool(pull.mixture)


@pytest.mark.parametrize("name", NAMES)
def test_component_is_documented_and_carries_examples(name: str) -> None:
    component = plugins.load("pulls", name)
    text = importlib.import_module(component.__module__).__doc__ or ""
    assert len(text.splitlines()[0]) < 100
    assert "\nSource: " in text
    assert "\nFormula: " in text
    assert len(component.EXAMPLES) >= 2
    assert all(field.description for field in component.model_fields.values()), "a setting without its docstring"


@pytest.mark.parametrize(
    "wrong",
    [{"name": "l2"}, {"name": "l2", "strength": 0}, {"name": "fisher", "strength": 1, "data": {}}, {"name": "l3"}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    assert plugins.build("pulls", wrong)[1]
