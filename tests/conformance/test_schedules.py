"""The contract of every schedule found, on every one of its EXAMPLES."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import math

import pytest

from perennial.core import plugins
from perennial.schedules.base import Schedule

HORIZONS = (100_000.0, 123_457.0, 3e11)  # examples with lengths in tokens fit into the shortest
CASES = [(name, i) for name in plugins.names("schedules") for i in range(len(plugins.load("schedules", name).EXAMPLES))]


def example(name: str, index: int) -> Schedule:
    schedule, problems = plugins.build("schedules", {"name": name, **plugins.load("schedules", name).EXAMPLES[index]})
    assert not problems, problems
    return schedule


def positions(schedule: Schedule, horizon: float) -> list[float]:
    """An even grid, and both sides of every phase boundary."""
    grid = {horizon * i / 200 for i in range(201)}
    for _, start, stop in schedule.phases(horizon):
        grid |= {start, stop, max(0.0, start - 1e-9 * horizon), min(horizon, start + 1e-9 * horizon)}
    return sorted(grid)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_rate_is_finite_and_never_negative(name: str, index: int) -> None:
    schedule = example(name, index)
    for horizon in HORIZONS:
        for tokens in [*positions(schedule, horizon), horizon * 1.1]:
            rate = schedule.rate(tokens, horizon)
            assert isinstance(rate, float), type(rate)
            assert 0 <= rate < math.inf, (tokens, rate)


def jump_between(schedule: Schedule, horizon: float, low: float, high: float) -> tuple[float, float]:
    """(place, size) of the largest sudden change inside [low, high], by bisection."""
    while high - low > 1e-15 * horizon:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        at_low, at_middle, at_high = (schedule.rate(t, horizon) for t in (low, middle, high))
        low, high = (low, middle) if abs(at_middle - at_low) >= abs(at_high - at_middle) else (middle, high)
    return low, abs(schedule.rate(high, horizon) - schedule.rate(low, horizon))


@pytest.mark.parametrize(("name", "index"), CASES)
def test_jumps_exactly_at_its_declared_restarts(name: str, index: int) -> None:
    schedule = example(name, index)
    for horizon in HORIZONS:
        grid = positions(schedule, horizon)
        scale = max(schedule.rate(t, horizon) for t in grid)
        found = set()
        for low, high in itertools.pairwise(grid):
            if abs(schedule.rate(high, horizon) - schedule.rate(low, horizon)) > 1e-3 * scale:
                place, size = jump_between(schedule, horizon, low, high)
                if size > 1e-3 * scale:
                    found.add(round(place / horizon, 6))
        assert found == {round(t / horizon, 6) for t in schedule.restarts(horizon)}


@pytest.mark.parametrize(("name", "index"), CASES)
def test_phases_tile_the_horizon(name: str, index: int) -> None:
    schedule = example(name, index)
    for horizon in HORIZONS:
        phases = schedule.phases(horizon)
        assert phases[0][1] == 0
        assert phases[-1][2] == horizon
        assert all(start < stop for _, start, stop in phases), "a phase of length 0 is listed"
        assert all(before[2] == after[1] for before, after in itertools.pairwise(phases)), "a gap or an overlap"
        assert len({name for name, _, _ in phases}) == len(phases), "two phases have the same name"


@pytest.mark.parametrize(("name", "index"), CASES)
def test_needs_horizon_is_the_truth(name: str, index: int) -> None:
    schedule = example(name, index)
    at = [0.0, 1.0, 5_000.0, 19_000.0, 20_001.0, 60_000.0, 99_999.0]
    by_horizon = [[schedule.rate(t, horizon) for t in at] for horizon in (100_000.0, 200_000.0, 1e9)]
    if schedule.needs_horizon:
        phases = [schedule.phases(h) for h in (100_000.0, 200_000.0)]
        assert by_horizon[0] != by_horizon[1] or phases[0] != phases[1], "nothing depends on the horizon"
    else:
        assert by_horizon[0] == by_horizon[1] == by_horizon[2]
        assert [schedule.rate(t, math.inf) for t in at] == by_horizon[0]
        assert schedule.restarts(1e5) == schedule.restarts(1e6)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_same_after_a_round_trip_through_json(name: str, index: int) -> None:
    schedule = example(name, index)
    again, problems = plugins.build("schedules", json.loads(json.dumps(plugins.dump(schedule))))
    assert not problems, problems
    assert again == schedule
    assert [again.rate(t, 1e5) for t in (0, 1e3, 5e4, 1e5)] == [schedule.rate(t, 1e5) for t in (0, 1e3, 5e4, 1e5)]


@pytest.mark.parametrize("name", plugins.names("schedules"))
def test_component_is_documented_and_carries_examples(name: str) -> None:
    component = plugins.load("schedules", name)
    module = importlib.import_module(component.__module__)
    assert module.__doc__ is not None
    assert len(module.__doc__.splitlines()[0]) < 100
    assert "\nSource: " in module.__doc__
    assert "\nFormula: " in module.__doc__
    assert len(component.EXAMPLES) >= 2
    assert inspect.getdoc(component)
    assert all(field.description for field in component.model_fields.values()), "a setting without its docstring"
