"""Laws of the loss curve: exact sums, any order of rows, jumps, choice of the form and of the best schedule."""

from __future__ import annotations

import numpy as np
import pytest

from perennial.core.errors import UserError
from perennial.scaling.curves import Rates, by_curve
from perennial.scaling.fitting import fit
from perennial.scaling.laws.annealing import Annealing
from perennial.scaling.laws.continued_curve import ContinuedCurve
from perennial.scaling.laws.multi_power import MultiPower
from perennial.scaling.schedule_fit import FREE, Curve, ScheduleLaw, fit_schedule_law, schedule_rates

UPDATES = 600
PEAK = 1e-3
MULTI_POWER = {"L0": 2.4, "A": 0.3, "alpha": 0.5, "B": 300.0, "C": 2.0, "beta": 0.6, "gamma": 0.6}
ANNEALING = {"L0": 2.6, "A": 0.3, "alpha": 0.5, "C": 3.0, "T": 40.0}


def rates(name: str, **settings: object) -> Rates:
    return Rates(schedule_rates(name, {"peak": PEAK, "warmup": "10%", **settings}, UPDATES))


def columns(run: Rates, steps: np.ndarray) -> dict[str, np.ndarray]:
    return {"curve": np.full(len(steps), run, dtype=object), "step": steps}


def measured(law: MultiPower | Annealing, coefficients: dict[str, float], run: Rates) -> Curve:
    steps = np.arange(70, UPDATES + 1, 10)
    return Curve(run, steps, law.predict(columns(run, steps), coefficients))


def three_runs() -> list[Rates]:
    step = np.arange(1, UPDATES + 1)
    halved = PEAK * np.minimum(1, step / 60) * np.where(step < 300, 1.0, 0.3)
    return [rates("cosine", final="10%"), rates("constant"), Rates(halved)]


@pytest.fixture(scope="module")
def fitted() -> ScheduleLaw:
    law = MultiPower()
    return fit_schedule_law([measured(law, MULTI_POWER, run) for run in three_runs()], form="multi_power")


def test_multi_power_is_its_formula_update_by_update() -> None:
    run = Rates(np.array([0.5, 1.0, 1.0, 0.4, 0.2]))
    c = MULTI_POWER
    predicted = MultiPower().predict(columns(run, np.array([3, 5])), c)
    for step, value in zip((3, 5), predicted, strict=True):
        gain, eta = 0.0, np.append(0.0, run.values)
        for k in range(1, step + 1):
            since = eta[k : step + 1].sum()
            gain += (eta[k] - eta[k - 1]) * (1 - (1 + c["C"] * eta[k] ** -c["gamma"] * since) ** -c["beta"])
        assert value == pytest.approx(c["L0"] + c["A"] * eta[: step + 1].sum() ** -c["alpha"] + c["B"] * gain)


def test_annealing_is_its_formula_update_by_update() -> None:
    run = Rates(np.array([0.5, 1.0, 1.0, 0.4, 0.2]))
    c = {**ANNEALING, "T": 4.0}
    momentum = annealed = 0.0
    for k in range(2, 6):  # the rise from 0.5 to 1.0 is the warm-up
        momentum = momentum * 0.75 + (run.values[k - 2] - run.values[k - 1] if k > 2 else 0.0)
        annealed += momentum
    expected = c["L0"] + c["A"] * 3.1 ** -c["alpha"] - c["C"] * annealed
    assert Annealing().predict(columns(run, np.array([5])), c)[0] == pytest.approx(expected)


@pytest.mark.parametrize(("law", "coefficients"), [(MultiPower(), MULTI_POWER), (Annealing(), ANNEALING)])
def test_named_curves_with_rates_say_the_same_as_exact_ones(
    law: MultiPower | Annealing, coefficients: dict[str, float]
) -> None:
    """A table of every tenth update loses little, in any order of its rows."""
    runs = {"a": rates("cosine", final="10%"), "b": rates("constant")}
    steps = np.arange(10, UPDATES + 1, 10)
    order = np.random.default_rng(0).permutation(2 * len(steps))
    table = {
        "curve": np.repeat(list(runs), len(steps))[order],
        "step": np.tile(steps, 2)[order],
        "rate": np.concatenate([run.values[steps - 1] for run in runs.values()])[order],
    }
    exact = np.concatenate([law.predict(columns(run, steps), coefficients) for run in runs.values()])[order]
    assert law.predict(table, coefficients) == pytest.approx(exact, rel=2e-4)


def test_a_rate_of_zero_is_no_problem() -> None:
    run = rates("linear", final=0)
    assert np.isfinite(MultiPower().predict(columns(run, np.array([UPDATES])), MULTI_POWER)).all()
    slopes = MultiPower().gradient(columns(run, np.array([UPDATES])), MULTI_POWER)
    assert all(np.isfinite(slope).all() for slope in slopes.values())


def test_fit_predicts_unseen_schedules(fitted: ScheduleLaw) -> None:
    assert fitted.left_out_error is not None
    for unseen in (rates("linear", final="10%"), rates("wsd", final="10%", decay="20%")):
        truth = measured(MultiPower(), MULTI_POWER, unseen)
        assert fitted.predict(unseen, truth.steps) == pytest.approx(truth.losses, rel=1e-3)
        assert fitted.final_loss(unseen.values) == pytest.approx(truth.losses[-1], rel=1e-3)


def test_auto_takes_the_form_that_made_the_curves() -> None:
    law = fit_schedule_law([measured(Annealing(), ANNEALING, run) for run in three_runs()])
    assert isinstance(law.fit.law, Annealing)
    assert law.fit.coefficients == pytest.approx(ANNEALING, rel=1e-4)


def test_best_schedule_is_the_lowest_and_never_rises(fitted: ScheduleLaw) -> None:
    choices = fitted.best_schedule(UPDATES, warmup_share=0.1)
    losses = [choice.loss for choice in choices]
    assert losses == sorted(losses)
    assert {choice.name for choice in choices} == {"constant", "cosine", "linear", "wsd", FREE}
    free = next(choice for choice in choices if choice.name == FREE)
    assert free is choices[0]
    assert (np.diff(free.rates[60:]) <= 1e-15).all()
    assert free.rates[-1] >= 0.1 * PEAK * 0.999
    assert free.loss == pytest.approx(fitted.final_loss(free.rates))


def test_extrapolation_is_said(fitted: ScheduleLaw) -> None:
    inside = fitted.best_schedule(UPDATES, warmup_share=0.1, free=False)
    assert not any(choice.is_extrapolated for choice in inside)
    lower = fitted.best_schedule(UPDATES, floor=0.0, warmup_share=0.1, families={"linear": [{}]}, free=False)
    longer = fitted.best_schedule(2 * UPDATES, warmup_share=0.1, families={"linear": [{}]}, free=False)
    assert lower[0].is_extrapolated
    assert longer[0].is_extrapolated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_updates": 1}, "no schedule of 1 updates"),
        ({"num_updates": 100, "floor": 1.0}, "floor"),
        ({"num_updates": 100, "families": {"cosin": [{}]}}, "cosine"),
        ({"num_updates": 100, "families": {"cosine": [{"decay": "10%"}]}}, "unknown setting 'decay'"),
    ],
)
def test_bad_schedules(fitted: ScheduleLaw, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fitted.best_schedule(**arguments)  # type: ignore[arg-type]


def test_curves_without_a_decay_choose_no_schedule() -> None:
    law = fit_schedule_law([measured(Annealing(), ANNEALING, rates("constant"))])
    assert law.fit.reason == "no curve in which the rate falls: what a decay gains is unknown"
    with pytest.raises(UserError, match="cannot tell which schedule is best"):
        law.best_schedule(100)


def test_bad_curves() -> None:
    run = rates("constant")
    with pytest.raises(UserError, match="no curves"):
        fit_schedule_law([])
    with pytest.raises(UserError, match="one loss per step"):
        fit_schedule_law([Curve(run, np.array([1, 2]), np.array([3.0]))])
    with pytest.raises(UserError, match="step 0 must lie between 1 and"):
        list(by_curve(columns(run, np.array([0]))))
    with pytest.raises(UserError, match="no column 'rate'"):
        list(by_curve({"step": np.array([5.0])}))
    for wrong in ([], [0.0, 0.0], [1.0, -1.0], [np.nan]):
        with pytest.raises(UserError, match="rates of a run"):
            Rates(np.array(wrong))


def test_past_its_end_a_run_goes_on_at_its_last_rate() -> None:
    run = rates("cosine", final="10%")
    longer = Rates(np.append(run.values, np.full(100, run.values[-1])))
    steps = np.array([5, UPDATES + 100])
    expected = MultiPower().predict(columns(longer, steps), MULTI_POWER)
    assert MultiPower().predict(columns(run, steps), MULTI_POWER) == pytest.approx(expected, rel=1e-6)


def test_continued_curve_of_several_checkpoints() -> None:
    """The annealing of the checkpoint counts only where checkpoints differ in it."""
    law = ContinuedCurve(memory=40.0, checkpoints="several")
    truth = {"L0": 2.4, "A": 0.4, "alpha": 0.5, "C0": 0.6, "C": 1.5, "B": -0.3, "E": 30.0, "beta": 0.5}
    runs, steps = three_runs(), np.arange(5, UPDATES + 1, 5)
    table = {name: np.concatenate([columns(run, steps)[name] for run in runs]) for name in ("curve", "step")}
    table["rates_before"] = np.repeat([2.0, 2.5, 3.0], len(steps))
    table["falls_before"] = np.repeat([0.0, 0.3, 0.1], len(steps))
    found = fit(law, {**table, "loss": law.predict(table, truth)}, bootstrap=0)
    assert found.coefficients == pytest.approx(truth, rel=1e-5)
    alike = {**table, "falls_before": np.zeros(len(table["step"]))}
    assert law.refusal(alike) == "all checkpoints were annealed alike (set checkpoints: one)"
