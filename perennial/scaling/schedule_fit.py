"""Loss under any learning-rate schedule from a few measured curves, and which schedule promises the lowest.

Curves of one model, corpus, batch and peak rate go in; the law that predicts left-out curves best comes out. Schedules
to choose among are the components of `perennial.schedules` (a stage of as many tokens as updates stands for the run)
and one without a formula: the best that never rises after its warm-up.

Source: Tissue et al. 2024, arXiv 2408.11029, section 4 (any schedule from one or two curves); Luo et al. 2025,
    arXiv 2503.12811, section 5 (the optimised schedule: constant for long, then a fall like (1 - x)^1.5 to about 0).
Limits: a schedule that ends below the lowest rate, or runs longer than the longest curve, is an extrapolation and
    says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.core.settings import raise_problems
from perennial.scaling.curves import CURVE, LOSS, STEP, Rates
from perennial.scaling.fitting import Fit, fit
from perennial.scaling.laws.annealing import Annealing
from perennial.scaling.laws.base import Law
from perennial.scaling.laws.multi_power import MultiPower

Form = Literal["auto", "annealing", "multi_power"]

FAMILIES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "constant": [{}],
    "cosine": [{}],
    "linear": [{}],
    "wsd": [
        {"decay": decay, "decay_shape": shape}
        for decay, shape in itertools.product(("5%", "10%", "20%", "40%"), ("linear", "sqrt"))
    ],
}
"""Settings, besides peak, warm-up and final rate, of the schedules that are compared unless others are named."""
FREE = "free"
"""Name of the schedule without a formula."""
_KNOTS = 32
_FALLS = np.eye(_KNOTS - 1, _KNOTS) - np.eye(_KNOTS - 1, _KNOTS, 1)  # of each knot to the next


@dataclass(frozen=True)
class Curve:
    """One measured run: the rate of every update, and losses at some of them (`steps` updates done), nats per token."""

    rates: Rates
    steps: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class Choice:
    """A schedule and what the law expects of it."""

    name: str
    settings: dict[str, Any]
    """Of the component in `perennial.schedules`; empty for the one without a formula."""
    rates: np.ndarray
    """Of every update, shape (updates,)."""
    loss: float
    """At the end, nats per token."""
    is_extrapolated: bool
    """Whether it leaves the range of rates and updates that was measured."""


@dataclass(frozen=True)
class ScheduleLaw:
    """A fitted law of the loss curve and how well it predicts a curve that it has not seen."""

    fit: Fit
    left_out_error: float | None
    """Mean error on each curve when fitted to the others, % of the loss; None below three curves."""
    num_updates: int
    """Of the longest curve."""
    lowest_rate: float
    """Of the curves' rates after their warm-ups."""
    highest_rate: float

    def predict(self, rates: ArrayLike | Rates, steps: ArrayLike | None = None) -> np.ndarray:
        """Loss after `steps` updates (every one by default) of a run with these rates, shape (steps,)."""
        run = rates if isinstance(rates, Rates) else Rates(np.asarray(rates, dtype=np.float64))
        done = np.arange(1, len(run.values) + 1) if steps is None else np.atleast_1d(np.asarray(steps))
        return self.fit.law.predict(_columns(run, done), self.fit.coefficients)

    def final_loss(self, rates: ArrayLike) -> float:
        """Loss at the end of a run with these rates."""
        return float(self.predict(rates, len(np.asarray(rates)))[0])

    def is_extrapolation(self, rates: np.ndarray) -> bool:
        """Whether a run is longer than the measured ones or leaves their range of rates."""
        after = rates[Rates(rates).warmup_steps - 1 :]
        inside = after.min() >= 0.999 * self.lowest_rate and after.max() <= 1.001 * self.highest_rate
        # a little more than the longest, as the last recorded loss is seldom that of the last update
        return not inside or len(rates) > 1.02 * self.num_updates

    def best_schedule(
        self,
        num_updates: int,
        *,
        peak: float | None = None,
        floor: float | None = None,
        warmup_share: float = 0.01,
        families: Mapping[str, Sequence[Mapping[str, Any]]] = FAMILIES,
        free: bool = True,
    ) -> list[Choice]:
        """Schedules of `num_updates` updates, the lowest predicted final loss first.

        `floor` is the final rate (default: the lowest measured), `peak` the highest (default: as measured). Raises
        UserError for an unknown schedule or setting, and where the curves do not determine the law.
        """
        if not self.fit.identifiable:
            raise UserError(f"not identifiable: {self.fit.reason}; these curves cannot tell which schedule is best")
        peak = self.highest_rate if peak is None else peak
        floor = self.lowest_rate if floor is None else floor
        if num_updates < 2 or not 0 <= floor <= peak or peak <= 0 or not 0 <= warmup_share < 1:
            raise UserError(
                f"no schedule of {num_updates} updates from peak {peak:g} to floor {floor:g} with a warm-up of "
                f"{warmup_share:.1%}: needed are 2 updates or more, 0 <= floor <= peak and a warm-up below 100%"
            )
        choices = []
        for name, variants in families.items():
            for variant in variants:
                settings = {"peak": peak, "warmup": f"{100 * warmup_share:g}%", **variant}
                if "final" in plugins.load("schedules", name).model_fields:
                    settings = {"final": floor, **settings}
                choices.append(self._choice(name, settings, schedule_rates(name, settings, num_updates)))
        if free and choices:
            best = min(choices, key=lambda choice: choice.loss)
            choices.append(self._choice(FREE, {}, self._free_schedule(best.rates, peak, floor)))
        return sorted(choices, key=lambda choice: choice.loss)

    def _choice(self, name: str, settings: dict[str, Any], rates: np.ndarray) -> Choice:
        return Choice(name, settings, rates, self.final_loss(rates), self.is_extrapolation(rates))

    def _free_schedule(self, start: np.ndarray, peak: float, floor: float) -> np.ndarray:
        """The best rates that do not rise after the warm-up of `start`: straight between knots, most at the end."""
        warm, total = Rates(start).warmup_steps, len(start)
        if total - warm < 2:
            return start
        place = warm + (total - warm) * (1 - (1 - np.linspace(0, 1, _KNOTS + 1)) ** 2)
        updates = np.arange(warm + 1, total + 1)

        def rates_of(levels: np.ndarray) -> np.ndarray:
            falling = np.minimum.accumulate(np.clip(levels, floor / peak, 1.0))
            return np.concatenate([start[:warm], peak * np.interp(updates, place, np.append(1.0, falling))])

        first = np.interp(place[1:], np.arange(1, total + 1), start) / peak
        found = minimize(
            lambda levels: 1e3 * self.final_loss(rates_of(levels)),
            first,
            method="SLSQP",
            bounds=[(floor / peak, 1.0)] * _KNOTS,
            constraints={"type": "ineq", "fun": lambda levels: levels[:-1] - levels[1:], "jac": lambda _: _FALLS},
            options={"maxiter": 200, "ftol": 1e-7},
        )
        return min((start, rates_of(found.x)), key=self.final_loss)


def fit_schedule_law(curves: Sequence[Curve], *, form: Form = "auto", bootstrap: int = 0, seed: int = 0) -> ScheduleLaw:
    """Fits a law of the loss curve; 'auto' takes the one that predicts left-out curves best.

    Leave the rows of the warm-up out of the curves. Raises UserError for curves that do not fit together.
    """
    for curve in curves:
        if len(curve.steps) != len(curve.losses) or not len(curve.steps):
            raise UserError(f"a curve has {len(curve.steps)} steps and {len(curve.losses)} losses; one loss per step")
    if not curves:
        raise UserError("no curves: at least one run with its rates and losses is needed")
    forms: dict[str, Law] = {"annealing": Annealing(), "multi_power": MultiPower()}
    tried = [forms[form]] if form != "auto" else list(forms.values()) if len(curves) >= 3 else [Annealing()]
    errors = [_left_out_error(law, curves, seed) for law in tried]
    best = min(range(len(tried)), key=lambda index: errors[index] or 0.0)
    after = [curve.rates.values[curve.rates.warmup_steps - 1 :] for curve in curves]
    return ScheduleLaw(
        fit=fit(tried[best], _table(curves), bootstrap=bootstrap, seed=seed),
        left_out_error=errors[best],
        num_updates=max(int(curve.steps.max()) for curve in curves),
        lowest_rate=float(min(rates.min() for rates in after)),
        highest_rate=float(max(rates.max() for rates in after)),
    )


def schedule_rates(name: str, settings: Mapping[str, Any], num_updates: int) -> np.ndarray:
    """The rate of every update under a component of `perennial.schedules`, shape (updates,). Raises UserError."""
    schedule, problems = plugins.build("schedules", {"name": name, **settings})
    raise_problems(problems, f"schedule '{name}'")
    return np.array([schedule.rate(float(done), float(num_updates)) for done in range(1, num_updates + 1)])


def _left_out_error(law: Law, curves: Sequence[Curve], seed: int) -> float | None:
    if len(curves) < 3:
        return None
    errors = []
    for index, curve in enumerate(curves):
        rest = [other for place, other in enumerate(curves) if place != index]
        coefficients = fit(law, _table(rest), bootstrap=0, seed=seed).coefficients
        predicted = law.predict(_columns(curve.rates, curve.steps), coefficients)
        errors.append(float(np.mean(np.abs(predicted / curve.losses - 1))))
    return 100 * float(np.mean(errors))


def _columns(rates: Rates, steps: np.ndarray) -> dict[str, np.ndarray]:
    labels = np.empty(len(steps), dtype=object)
    labels[:] = rates
    return {CURVE.name: labels, STEP.name: np.asarray(steps, dtype=np.float64)}


def _table(curves: Sequence[Curve]) -> dict[str, np.ndarray]:
    parts = [{**_columns(curve.rates, curve.steps), LOSS.name: np.asarray(curve.losses)} for curve in curves]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
