"""Noise scale, critical batch, sweeps over learning rate and batch, transfers: against exact synthetic data."""

from __future__ import annotations

import numpy as np
import pytest

from perennial.core.errors import UserError
from perennial.scaling import batch, optimizer_settings, sweeps
from perennial.scaling.laws.batch_size import BatchSize
from perennial.scaling.laws.learning_rate import LearningRate
from perennial.scaling.laws.steps_to_target import StepsToTarget


def test_noise_scale_from_two_norms() -> None:
    """Mean squared norm of a gradient over B tokens is signal + variance / B."""
    signal, variance = 0.02, 5e4
    found = batch.noise_scale(
        small_batch=1e4, small_norm=signal + variance / 1e4, big_batch=1e6, big_norm=signal + variance / 1e6
    )
    assert (found.signal, found.variance) == pytest.approx((signal, variance))
    assert found.batch == pytest.approx(variance / signal)
    drowned = batch.noise_scale(small_batch=1e4, small_norm=1.0, big_batch=1e6, big_norm=0.005)
    assert np.isnan(drowned.batch)
    with pytest.raises(UserError, match="two batch sizes"):
        batch.noise_scale(small_batch=8, small_norm=1, big_batch=8, big_norm=1)


def test_factors_follow_from_steps_to_target() -> None:
    """S = a + b / B is a times the updates factor; S B is b times the tokens factor."""
    coefficients = {"a": 1e3, "b": 2e9}
    size = np.array([1e5, 2e6, 5e6])
    steps = StepsToTarget().predict({"batch": size}, coefficients)
    noise = coefficients["b"] / coefficients["a"]
    assert steps == pytest.approx(1e3 * batch.updates_factor(size, noise))
    assert steps * size == pytest.approx(2e9 * batch.tokens_factor(size, noise))


def test_critical_batch_has_the_overhead_it_says() -> None:
    coefficients = {"a": 1e3, "b": 7e5}
    for overhead in (0.1, 0.2, 0.5):
        found = batch.critical_batch(coefficients, reference=256, overhead=overhead)
        tokens = StepsToTarget().predict({"batch": np.array([256.0, found])}, coefficients) * [256.0, found]
        assert tokens[1] / tokens[0] == pytest.approx(1 + overhead)


def test_fit_critical_batch_finds_the_power_of_size() -> None:
    sizes, batches = np.meshgrid([85.0, 151.0, 302.0, 604.0], [64.0, 256.0, 1024.0, 4096.0], indexing="ij")
    critical = 93.0 * sizes**0.47
    ratio = (critical - 1.2 * 256) / 0.2  # b / a
    steps = 10 * sizes * (1 + ratio / batches)
    table = {"parameters": sizes.ravel(), "batch": batches.ravel(), "steps": steps.ravel()}
    found = batch.fit_critical_batch(table, reference=256)
    assert found.law.coefficients == pytest.approx({"k": 93.0, "a": 0.47}, rel=1e-6)
    assert found.residual < 1e-9
    with pytest.raises(UserError, match="two batch sizes or more"):
        batch.fit_critical_batch({name: values[:1] for name, values in table.items()}, reference=256)


def sweep_table() -> dict[str, np.ndarray]:
    """Paraboloids around the minima of two power laws, in four sweeps."""
    rows = []
    for parameters, tokens in ((1e8, 4e9), (1e8, 2e10), (4e8, 8e9), (1e9, 3e10)):
        best_rate = 1.79 * parameters**-0.713 * tokens**0.307
        best_batch = 0.58 * tokens**0.571
        for rate in best_rate * 2.0 ** np.arange(-3, 4) * 1.1:
            for size in best_batch * 2.0 ** np.arange(-3, 4) * 0.9:
                x, y = np.log(rate / best_rate), np.log(size / best_batch)
                loss = 2.5 * (1 + 0.003 * x * x + 0.004 * y * y - 0.002 * x * y)
                rows.append((parameters, tokens, rate, size, loss))
    names = ("parameters", "tokens", "learning_rate", "batch", "loss")
    return dict(zip(names, np.array(rows).T, strict=True))


def test_fit_lr_batch_finds_both_power_laws() -> None:
    found = sweeps.fit_lr_batch(sweep_table())
    assert found.learning_rate.coefficients == pytest.approx({"k": 1.79, "a": -0.713, "b": 0.307}, rel=1e-6)
    assert found.batch.coefficients == pytest.approx({"k": 0.58, "b": 0.571}, rel=1e-6)
    assert all(minimum.loss == pytest.approx(2.5) for minimum in found.minima.values())


def test_excess_loss_of_a_law() -> None:
    table = sweep_table()
    (parameters, tokens), rows = next(iter(sweeps.sweeps(table)))
    parts = [table[name][rows] for name in ("learning_rate", "batch", "loss")]
    best_rate, best_batch = 1.79 * parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571
    at_best = sweeps.excess_loss(*parts, learning_rate=best_rate, batch=best_batch)
    off = sweeps.excess_loss(*parts, learning_rate=2 * best_rate, batch=best_batch)
    assert abs(at_best) < 1e-4
    assert off - at_best == pytest.approx(0.003 * np.log(2) ** 2, rel=0.1)


@pytest.mark.parametrize(("highest", "problem"), [(0.9, "outside the sweep"), (0.4, "fewer than three rates")])
def test_sweeps_without_a_minimum_are_reported(highest: float, problem: str) -> None:
    """All rates too low: a quadratic may still lead out of the sweep, or have nothing to bend through."""
    table = sweep_table()
    low = table["learning_rate"] < highest * 1.79 * table["parameters"] ** -0.713 * table["tokens"] ** 0.307
    cut = {name: values[low] for name, values in table.items()}
    with pytest.raises(UserError, match=rf"0 of 4 sweeps have a minimum inside.*{problem}"):
        sweeps.fit_lr_batch(cut, tolerance=0.05)


def test_a_quadratic_needs_runs() -> None:
    few = sweeps.sweep_minimum([1e-3, 2e-3], [1e5, 1e5], [3.0, 3.01])
    assert few.problem == "2 runs within 1.0% of the best, 8 needed"
    assert (few.learning_rate, few.loss) == pytest.approx((1e-3, 3.0))


def test_published_laws_of_one_recipe_agree() -> None:
    """The Step Law and its refit are within 35% of each other inside the range of its sweeps."""
    at = {"parameters": np.array([2e8, 1e9]), "tokens": np.array([1e10, 5e10])}
    for law in (LearningRate(), BatchSize()):
        first, second = (
            law.predict(at, law.PUBLISHED[name]["coefficients"]) for name in ("step_law", "step_law_refit")
        )
        assert second / first == pytest.approx(np.ones(2), abs=0.35)


def test_transfer_keeps_what_it_should() -> None:
    wider = optimizer_settings.transfer(4.0)
    assert wider.hidden_learning_rate * wider.hidden_weight_decay == 1
    assert wider.hidden_initial_std**2 * 4 == pytest.approx(1)
    assert wider.residual_multiplier == 1
    deeper = optimizer_settings.transfer(1.0, 3.0)
    assert deeper.residual_multiplier == pytest.approx(1 / 3)
    assert deeper.hidden_learning_rate == 1
    with pytest.raises(UserError, match="above 0"):
        optimizer_settings.transfer(0.0)


def test_weight_decay_and_time_scale_are_inverse() -> None:
    run = {"batch": 5e5, "tokens": 2e10, "learning_rate": 1e-3}
    decay = optimizer_settings.weight_decay_for(0.2, **run)
    assert optimizer_settings.timescale(**run, weight_decay=decay) == pytest.approx(0.2)
