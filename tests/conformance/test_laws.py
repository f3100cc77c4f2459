"""The contract of every law found, on every one of its EXAMPLES: what it generates, a fit finds again."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from perennial.core import plugins
from perennial.scaling.fitting import Fit, fit
from perennial.scaling.laws.base import Columns, Law

NAMES = plugins.names("laws")
CASES = [(name, i) for name in NAMES for i in range(len(plugins.load("laws", name).EXAMPLES))]
NOISE = 0.003  # relative, or absolute where the law compares plainly
RESAMPLES, FEW_RESAMPLES = 40, 8  # few for laws whose slopes are left to differences, and for those of many turns


@cache
def example(name: str, index: int) -> tuple[Law, dict[str, float]]:
    component = plugins.load("laws", name)
    entry = component.EXAMPLES[index]
    law, problems = plugins.build("laws", {"name": name, **entry["settings"]})
    assert not problems, problems
    return law, entry["coefficients"]


def table(name: str, index: int, *, noise: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
    law, coefficients = example(name, index)
    generator = np.random.default_rng(seed)
    rows = int(max(80, (law.MIN_ROWS_PER_COEFFICIENT + 8) * len(law.coefficients)))
    inputs = law.draw(type(law).EXAMPLES[index]["inputs"], rows, generator)
    target = law.predict(inputs, coefficients)
    deviation = noise * generator.standard_normal(len(target))
    target = target * np.exp(deviation) if law.RESIDUAL == "log" else target + deviation
    return {**inputs, law.TARGET.name: target}


@cache
def fitted(name: str, index: int, noise: float) -> Fit:
    law, _ = example(name, index)
    columns = table(name, index, noise=noise)
    is_quick = law.IDENTIFIES == "coefficients" and law.gradient(inputs_of(law, columns), example(name, index)[1])
    return fit(law, columns, bootstrap=(RESAMPLES if is_quick else FEW_RESAMPLES) if noise else 0)


def inputs_of(law: Law, columns: Columns) -> dict[str, np.ndarray]:
    return {i.name: columns[i.name] for i in law.inputs if i.name in columns}


@pytest.mark.parametrize(("name", "index"), CASES)
def test_recovers_itself_from_exact_rows(name: str, index: int) -> None:
    law, coefficients = example(name, index)
    found, columns = fitted(name, index, 0.0), table(name, index)
    if law.IDENTIFIES == "coefficients":
        assert found.coefficients == pytest.approx(coefficients, rel=1e-6)
    predicted = law.predict(inputs_of(law, columns), found.coefficients)
    np.testing.assert_allclose(predicted, columns[law.TARGET.name], rtol=1e-6)
    assert found.identifiable, found.reason


@pytest.mark.parametrize(("name", "index"), CASES)
def test_finds_the_truth_within_its_intervals_from_noisy_rows(name: str, index: int) -> None:
    law, coefficients = example(name, index)
    found, columns = fitted(name, index, NOISE), inputs_of(law, table(name, index, noise=NOISE))
    truth, scale = law.predict(columns, coefficients), NOISE
    prediction = found.predict(columns)
    size = np.abs(truth) if law.RESIDUAL == "log" else np.ones_like(truth)
    # At most a few rows may lie outside twice the 80% interval: a fifth of a deviation allows for its resamples.
    room = (prediction.high - prediction.low) / 2 + 0.2 * scale * size
    outside = np.abs(truth - prediction.mean) > 2 * room
    assert outside.mean() < 0.2, f"{outside.mean():.0%} of the rows"
    assert found.noise == pytest.approx(NOISE, rel=0.5)
    if law.IDENTIFIES == "coefficients":
        wide = {n: (b - a, (a + b) / 2) for n, (a, b) in found.intervals.items()}
        missed = [n for n, (width, middle) in wide.items() if abs(coefficients[n] - middle) > 2.5 * width]
        assert not missed, {n: (coefficients[n], found.intervals[n]) for n in missed}


@pytest.mark.parametrize(("name", "index"), CASES)
def test_rows_may_come_in_any_order(name: str, index: int) -> None:
    law, _ = example(name, index)
    columns = table(name, index, noise=NOISE)
    rows = len(columns[law.TARGET.name])
    order = np.random.default_rng(5).permutation(rows)
    shuffled = {n: v[order] for n, v in columns.items()}
    again = fit(law, shuffled, bootstrap=0)
    first = law.predict(inputs_of(law, columns), fitted(name, index, NOISE).coefficients)
    second = law.predict(inputs_of(law, columns), again.coefficients)
    np.testing.assert_allclose(first, second, rtol=1e-4)
    predicted = law.predict(inputs_of(law, shuffled), again.coefficients)
    np.testing.assert_allclose(predicted, second[order], rtol=1e-12)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_same_result_for_the_same_seed(name: str, index: int) -> None:
    law, _ = example(name, index)
    columns = table(name, index, noise=NOISE)
    first, second = (fit(law, columns, bootstrap=3, seed=7) for _ in range(2))
    assert first.coefficients == second.coefficients
    assert (first.samples == second.samples).all()


@pytest.mark.parametrize(("name", "index"), CASES)
def test_warns_outside_its_range(name: str, index: int) -> None:
    law, _ = example(name, index)
    columns = inputs_of(law, table(name, index))
    found = fitted(name, index, 0.0)
    assert not found.predict(columns).warnings
    narrow = replace(found, range={n: (low / 200, low / 100) for n, (low, _) in found.range.items()})
    prediction = narrow.predict(columns)
    assert prediction.warnings
    assert prediction.extrapolation.max() > 1


@pytest.mark.parametrize(("name", "index"), CASES)
def test_gradient_is_the_slope_of_predict(name: str, index: int) -> None:
    law, coefficients = example(name, index)
    columns = inputs_of(law, table(name, index))
    slopes = law.gradient(columns, coefficients)
    if slopes is None:
        pytest.skip("left to finite differences")
    for coefficient, slope in slopes.items():
        step = 1e-5 * max(abs(coefficients[coefficient]), 1e-3)
        ends = [
            law.predict(columns, {**coefficients, coefficient: coefficients[coefficient] + s}) for s in (-step, step)
        ]
        measured = (ends[1] - ends[0]) / (2 * step)
        np.testing.assert_allclose(slope, measured, rtol=2e-4, atol=1e-7 * (1 + np.abs(measured).max()))


@pytest.mark.parametrize("name", NAMES)
def test_component_is_documented_with_units_and_sources(name: str) -> None:
    component = plugins.load("laws", name)
    module = importlib.import_module(component.__module__)
    assert module.__doc__ is not None
    assert len(module.__doc__.splitlines()[0]) < 100
    assert "\nFormula: " in module.__doc__
    assert "\nSource: " in module.__doc__
    assert inspect.getdoc(component)
    law, coefficients = example(name, 0)
    for part in (*law.inputs, law.TARGET, *law.coefficients):
        assert part.unit, part
        assert part.about, part
    assert set(coefficients) == {c.name for c in law.coefficients}
    for entry in component.PUBLISHED.values():
        assert entry["source"]
        assert set(entry["coefficients"]) <= {c.name for c in law.coefficients}
    assert all(field.description for field in component.model_fields.values()), "a setting without its docstring"


@pytest.mark.parametrize("name", NAMES)
def test_same_after_a_round_trip_through_json(name: str) -> None:
    law, _ = example(name, 0)
    again, problems = plugins.build("laws", plugins.dump(law))
    assert not problems, problems
    assert again == law
