"""Fitting laws of loss: the blend, intervals, priors, refusals, allocation, isoFLOP budgets and law files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perennial.core.errors import UserError
from perennial.scaling import law_file
from perennial.scaling.allocation import cheapest, closed_form, optimal
from perennial.scaling.choosing import Blend, fit_loss_law
from perennial.scaling.fitting import Fit, deviations, fit, resample
from perennial.scaling.isoflop import fit_isoflop
from perennial.scaling.laws.chinchilla import Chinchilla
from perennial.scaling.laws.repeat_penalty import RepeatPenalty
from perennial.scaling.laws.repeated import Repeated
from perennial.scaling.laws.tied import Tied
from perennial.scaling.objective import Objective
from perennial.scaling.two_terms import starts

TRUTH = Chinchilla.EXAMPLES[0]["coefficients"]
RANGES = {"parameters": (5e7, 2e9), "tokens": (1e9, 1e11)}


def runs(rows: int = 40, *, noise: float = 0.003, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    inputs = Chinchilla().draw(RANGES, rows, generator)
    loss = Chinchilla().predict(inputs, TRUTH) * np.exp(noise * generator.standard_normal(rows))
    return {**inputs, "loss": loss}


@pytest.fixture(scope="module")
def blend() -> Blend:
    found = fit_loss_law(runs(), bootstrap=20)
    assert isinstance(found, Blend)
    return found


@pytest.fixture(scope="module")
def single() -> Fit:
    return fit(Chinchilla(), runs(), bootstrap=30)


def test_blend_foretells_larger_runs(blend: Blend) -> None:
    large = {"parameters": np.array([1e10]), "tokens": np.array([1e12])}
    prediction = blend.predict(large)
    assert prediction.mean[0] == pytest.approx(Chinchilla().predict(large, TRUTH)[0], rel=0.02)
    assert prediction.run_low[0] < prediction.low[0] < prediction.mean[0] < prediction.high[0] < prediction.run_high[0]
    assert prediction.extrapolation[0] > 10
    assert sum(m.weight for m in blend.members) == pytest.approx(1)
    assert blend.left_out_mape is not None
    assert all(len(m.left_out_mape) == 2 for m in blend.members)


def test_blend_of_few_rows_has_equal_weights() -> None:
    found = fit_loss_law(runs(7), bootstrap=0)
    assert isinstance(found, Blend)
    assert found.left_out_mape is None
    assert len({m.weight for m in found.members}) == 1


def test_repeated_data_are_judged_by_their_own_laws() -> None:
    truth = RepeatPenalty.EXAMPLES[0]
    inputs = RepeatPenalty().draw(truth["inputs"], 60, np.random.default_rng(0))
    table = {**inputs, "loss": RepeatPenalty().predict(inputs, truth["coefficients"])}
    found = fit_loss_law(table, bootstrap=0)
    assert isinstance(found, Blend)
    assert found.best.name == "repeat_penalty"
    assert len(found.best.left_out_mape) == 3


def test_without_repeats_the_laws_of_repetition_are_the_plain_one() -> None:
    inputs = Chinchilla().draw(RANGES, 20, np.random.default_rng(0))
    endless = {**TRUTH, "repeat_decay": 15.0, "size_decay": 1e9}
    plain = Chinchilla().predict(inputs, TRUTH)
    np.testing.assert_allclose(
        Repeated().predict({**inputs, "unique_tokens": inputs["tokens"]}, endless), plain, rtol=1e-6
    )
    assert fit(Repeated(), {**inputs, "loss": plain}, bootstrap=0).reason == "no column of unique tokens"


def test_units_do_not_matter() -> None:
    table = runs(300)
    scaled = {**table, "parameters": table["parameters"] / 1e6, "tokens": table["tokens"] / 1e9}
    first, second = (fit(Chinchilla(), t, bootstrap=0).coefficients for t in (table, scaled))
    assert {n: second[n] for n in ("E", "alpha", "beta")} == pytest.approx(
        {n: first[n] for n in ("E", "alpha", "beta")}, rel=1e-6
    )


def test_an_outlier_hardly_moves_the_fit() -> None:
    table = runs(60, noise=0.001)
    spoilt = {**table, "loss": np.where(np.arange(60) == 10, table["loss"] * 1.3, table["loss"])}
    inputs = {"parameters": np.array([1e10]), "tokens": np.array([1e11])}
    first, second = (fit(Chinchilla(), t, bootstrap=0).predict(inputs).mean[0] for t in (table, spoilt))
    assert second == pytest.approx(first, rel=0.003)


def test_a_ridge_fades_as_rows_grow() -> None:
    pulled = [
        fit(Chinchilla(), runs(rows, seed=3), ridge={"alpha": (0.6, 0.01)}, bootstrap=0).coefficients["alpha"]
        for rows in (8, 80, 2000)
    ]
    away = [abs(alpha - TRUTH["alpha"]) for alpha in pulled]
    assert away[0] > away[1] > away[2]
    assert away[2] < 0.02


def test_intervals_are_as_wide_as_estimates_scatter() -> None:
    fits = [fit(Tied(), runs(40, noise=0.01, seed=seed), bootstrap=20) for seed in range(16)]
    scatter = np.std([f.coefficients["alpha"] for f in fits])
    width = np.mean([np.ptp(f.intervals["alpha"]) for f in fits]) / (2 * deviations(0.8))
    assert width == pytest.approx(scatter, rel=0.4)


def test_resampling_leaves_the_objective_as_it_was() -> None:
    table = runs(40, noise=0.01)
    objective = Objective(Tied(), table, table["loss"], delta=1e-3)
    theta = objective.working({"E": 1.8, "A": 500.0, "B": 2000.0, "alpha": 0.35})
    before = objective.value(theta)
    assert resample(objective, theta, 2, np.random.default_rng(0)).shape == (2, 4)
    assert objective.value(theta) == before


def test_refuses_to_extrapolate_what_rows_cannot_tell() -> None:
    table = runs()
    one_size = {**table, "parameters": np.full(40, 1e8)}
    found = fit(Chinchilla(), one_size, bootstrap=0)
    assert not found.identifiable
    assert "one value of parameters" in found.reason
    assert found.predict({"parameters": 1e8, "tokens": 1e10}).mean[0] > 0
    with pytest.raises(UserError, match="not identifiable"):
        found.predict({"parameters": 1e9, "tokens": 1e10})
    flat = fit(Chinchilla(), {**table, "loss": 2.0 + 3e4 * table["parameters"] ** -2.0 + 1e-9}, bootstrap=0)
    assert "bound" in flat.reason


def test_odd_tables_are_refused() -> None:
    with pytest.raises(UserError, match="no column 'tokens'"):
        fit(Chinchilla(), {"parameters": [1e8], "loss": [2.0]})
    with pytest.raises(UserError, match="row 2: loss -1"):
        fit(Chinchilla(), {"parameters": [1e8, 2e8], "tokens": [1e9, 1e9], "loss": [2.0, -1.0]})
    with pytest.raises(UserError, match="Did you mean 'chinchilla'"):
        fit_loss_law(runs(), form="chinchila")


def test_starts_lie_near_the_truth() -> None:
    best = starts(runs(noise=0.0))[0]
    predicted = Chinchilla().predict(runs(noise=0.0), best)
    np.testing.assert_allclose(predicted, runs(noise=0.0)["loss"], rtol=0.05)


def test_optimum_is_the_closed_form(single: Fit) -> None:
    found = optimal(single, 1e21)
    size, tokens = closed_form(single.coefficients, 1e21)
    assert found.parameters == pytest.approx(size, rel=1e-4)
    assert found.tokens == pytest.approx(tokens, rel=1e-4)
    assert found.near_optimal[0] < found.parameters < found.near_optimal[1]
    assert found.parameters_interval[0] < found.parameters < found.parameters_interval[1]


def test_limits_and_inference_make_models_smaller(single: Fit) -> None:
    best = optimal(single, 1e21)
    assert optimal(single, 1e21, max_parameters=1e9).parameters == pytest.approx(1e9, rel=1e-3)
    assert optimal(single, 1e21, inference_tokens=1e11).parameters < best.parameters
    assert optimal(single, 1e21, unique_tokens=1e9).epochs == pytest.approx(best.tokens / 1e9, rel=1e-6)
    size, _, flops = cheapest(single, best.loss)
    assert flops == pytest.approx(1e21, rel=1e-3)
    assert size == pytest.approx(best.parameters, rel=0.03)
    assert cheapest(single, best.loss, inference_tokens=1e12)[0] < size
    for impossible in (lambda: optimal(single, 0), lambda: optimal(single, 10.0), lambda: cheapest(single, 0.5)):
        with pytest.raises(UserError):
            impossible()


def test_blend_allocates_too(blend: Blend) -> None:
    found = optimal(blend, 1e20)
    assert found.parameters == pytest.approx(closed_form(TRUTH, 1e20)[0], rel=0.5)
    assert found.warnings == ()


def test_isoflop_budgets_give_the_exponent() -> None:
    budgets = np.repeat([1e19, 1e20, 1e21], 9)
    size = np.concatenate([closed_form(TRUTH, c)[0] * 2.0 ** np.linspace(-2, 2, 9) for c in (1e19, 1e20, 1e21)])
    loss = Chinchilla().predict({"parameters": size, "tokens": budgets / 6 / size}, TRUTH)
    found = fit_isoflop(budgets, size, loss, bootstrap=10)
    assert found.exponent == pytest.approx(TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"]), abs=0.005)
    with pytest.raises(UserError, match="not identifiable"):
        fit_isoflop(budgets[:9], size[:9], loss[:9])


def test_law_files_predict_the_same(tmp_path: Path, blend: Blend, single: Fit) -> None:
    at = {"parameters": np.array([3e8, 1e10]), "tokens": np.array([1e10, 1e12])}
    for name, fitted in (("blend", blend), ("single", single)):
        path = tmp_path / f"{name}.json"
        law_file.save(path, fitted)
        first, second = fitted.predict(at), law_file.load(path).predict(at)
        for part in ("mean", "low", "high", "run_low", "run_high"):
            np.testing.assert_allclose(getattr(first, part), getattr(second, part), rtol=1e-9)
        assert first.warnings == second.warnings


def test_law_files_that_are_refused(tmp_path: Path, single: Fit) -> None:
    path = tmp_path / "law.json"
    law_file.save(path, single)
    data = json.loads(path.read_text())
    for change, words in (
        ({"version": 99}, "version 99; this perennial reads version 1"),
        ({"format": "x"}, "not a law file"),
        ({"law": {}}, "damaged"),
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(UserError, match=words):
            law_file.load(path)


def test_a_fit_without_resamples_predicts_its_mean(single: Fit) -> None:
    bare = replace(single, samples=single.samples[:0])
    prediction = bare.predict({"parameters": 1e9, "tokens": 1e10})
    assert prediction.low[0] == prediction.mean[0] == prediction.high[0]
