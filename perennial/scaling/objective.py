"""What a fit minimises: the Huber loss of a law's residuals, in coordinates in which the search is easy.

Formula: F(theta) = sum_i w_i * huber(r_i) + sum_j k_j * (theta_j - t_j)^2, r_i = ln predicted_i - ln target_i (or the
    plain difference for laws with RESIDUAL 'linear'), huber(r) = r^2 / 2 for |r| <= delta, else
    delta * (|r| - delta / 2). theta_j is the logarithm of a positive coefficient, or the coefficient; where it belongs
    to a term A / x^alpha, theta = ln A - alpha * mean(ln x): the logarithm of the term at the middle of the table.
Source: Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", arXiv 2203.15556, section D.2 (the
    loss, delta = 1e-3); Besiroglu et al. 2024, "Chinchilla Scaling: A replication attempt", arXiv 2404.10102,
    section 4 (sum instead of mean, so that the search does not stop early).
Differs: centred coordinates; one start then finds what took a grid of 4500. BFGS with a dense matrix instead of
    L-BFGS: there are less than twenty coefficients, and no call of it wakes the threads of a linear algebra library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from perennial.scaling.laws.base import Coefficient, Coefficients, Columns, Law, column

_SCALE = 1e8  # 1 / F below which changes of F are compared with a fixed number instead of F itself
_TOLERANCE = 1e-10  # relative change of F that counts as none
_PATIENCE = 3  # such steps in turn end a search
_MOST_HALVINGS = 12
_ENOUGH = 1e-4  # of the fall that the slope promises (Armijo)
_FAR = 60.0  # bound of a centred logarithm: exp(60) nats is out of any question
_AT_BOUND = 1e-6  # relative to the width of the bounds
_HOPELESS = 1e100  # F where a prediction is not a number
_STEP = 6e-6  # of central differences: the cube root of the precision of float64


class Objective:
    """F and its gradient for one law and table; `fixed` coefficients keep their value."""

    def __init__(
        self,
        law: Law,
        inputs: Columns,
        target: np.ndarray,
        *,
        delta: float,
        fixed: Coefficients | None = None,
        ridge: Mapping[str, tuple[float, float]] | None = None,
        residual: Literal["log", "linear"] | None = None,
    ) -> None:
        self.law, self.inputs, self.delta = law, inputs, delta
        self.is_log = (residual or law.RESIDUAL) == "log"
        self.target = np.log(target) if self.is_log else np.asarray(target, dtype=np.float64)
        self.weights = np.ones(len(target))
        self.fixed = dict(fixed or {})
        self.free: Sequence[Coefficient] = [c for c in law.coefficients if c.name not in self.fixed]
        self.names = [c.name for c in self.free]
        self.middle = {
            c.name: float(np.log(column(inputs, c.partner[1])).mean()) for c in law.coefficients if c.partner
        }
        self.bounds = [_working_bounds(c) for c in self.free]
        self.limits = np.array(self.bounds).reshape(-1, 2).T
        self._places = [  # of each exponent that stands in a term, and of that term's coefficient
            (self.names.index(c.partner[0]), self.names.index(c.name), c.partner[0])
            for c in self.free
            if c.partner and c.partner[0] in self.names
        ]
        self.ridge = [
            (self.names.index(name), self._scaled(name, value), strength)
            for name, (value, strength) in (ridge or {}).items()
            if name in self.names
        ]

    def natural(self, theta: np.ndarray) -> dict[str, float]:
        """The coefficients at a point of the search."""
        plain = {c.name: t for c, t in zip(self.free, theta.tolist(), strict=True)}
        for c in self.free:
            if c.log and not c.partner:
                plain[c.name] = float(np.exp(plain[c.name]))
        plain |= self.fixed
        for c in self.free:
            if c.partner:
                plain[c.name] = float(np.exp(min(700.0, plain[c.name] + plain[c.partner[0]] * self.middle[c.name])))
        return {c.name: plain[c.name] for c in self.law.coefficients}

    def working(self, coefficients: Coefficients) -> np.ndarray:
        """The point of the search at given coefficients, moved inside the bounds."""
        theta = []
        for c in self.free:
            value = float(coefficients[c.name])
            value = float(np.log(max(value, 1e-300))) if c.log else value
            if c.partner:
                value -= float({**coefficients, **self.fixed}[c.partner[0]]) * self.middle[c.name]
            theta.append(value)
        return np.clip(np.array(theta), *self.limits)

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        """Predicted less measured, shape (rows,), in the logarithm where the law says so."""
        return self._compared(self.law.predict(self.inputs, self.natural(theta))) - self.target

    def value(self, theta: np.ndarray) -> float:
        """F."""
        with np.errstate(all="ignore"):
            residuals = self.residuals(theta)
            bounded = np.minimum(np.maximum(residuals, -self.delta), self.delta)
            total = float((self.weights * bounded) @ (residuals - 0.5 * bounded))
        total += sum(strength * (theta[index] - wanted) ** 2 for index, wanted, strength in self.ridge)
        return total if np.isfinite(total) else _HOPELESS

    def value_and_gradient(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """F and dF/dtheta."""
        residuals, jacobian = self._residuals_and_jacobian(theta)
        bounded = np.minimum(np.maximum(residuals, -self.delta), self.delta)  # np.clip takes four times as long
        with np.errstate(all="ignore"):
            gradient = (self.weights * bounded) @ jacobian
            value = float((self.weights * bounded) @ (residuals - 0.5 * bounded))
        for index, wanted, strength in self.ridge:
            off = theta[index] - wanted
            value += strength * off * off
            gradient[index] += 2 * strength * off
        if not np.isfinite(value) or not np.isfinite(gradient).all():
            return _HOPELESS, np.zeros_like(theta)
        return value, gradient

    def minimise(self, start: np.ndarray, *, max_steps: int = 600) -> tuple[np.ndarray, float]:
        """The nearest minimum inside the bounds, and F there: BFGS that begins with the Gauss-Newton curvature.

        Coefficients at a bound that F pushes outwards stay there; the others move.
        """
        low, high = self.limits
        theta = np.clip(start, low, high)
        curvature = self.curvature(theta)
        value, gradient = self.value_and_gradient(theta)
        idle = 0
        for _ in range(max_steps):
            moving = ~(((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0)))
            step = np.zeros_like(theta)
            step[moving] = -_solve(curvature[np.ix_(moving, moving)], gradient[moving])
            if not gradient @ step < 0:
                break
            found = self._along(theta, value, gradient, step)
            if found is None:
                if idle:
                    break
                idle, curvature = _PATIENCE - 1, self.curvature(theta)  # a last try with fresh curvature
                continue
            taken, lower, new_gradient = found[0] - theta, found[1], found[2]
            idle = idle + 1 if value - lower <= _TOLERANCE * max(value, 1 / _SCALE) else 0
            curvature = _updated(curvature, taken, new_gradient - gradient)
            theta, value, gradient = found
            if idle >= _PATIENCE:
                break
        return theta, value

    def _along(
        self, theta: np.ndarray, value: float, gradient: np.ndarray, step: np.ndarray
    ) -> tuple[np.ndarray, float, np.ndarray] | None:
        """The first point along a step, halved or so each time, where F falls enough; None when there is none."""
        share = 1.0
        for _ in range(_MOST_HALVINGS):
            candidate = np.clip(theta + share * step, *self.limits)
            expected = gradient @ (candidate - theta)
            lower, slope = self.value_and_gradient(candidate)
            if lower <= value + _ENOUGH * min(expected, 0.0) and lower < value:
                return candidate, lower, slope
            bend = lower - value - expected
            share *= min(0.5, max(0.1, -expected / (2 * bend))) if bend > 0 and lower < _HOPELESS else 0.1
        return None

    def curvature(self, theta: np.ndarray) -> np.ndarray:
        """Gauss-Newton approximation of the second derivatives of F, shape (free, free), positive definite."""
        residuals, jacobian = self._residuals_and_jacobian(theta)
        with np.errstate(all="ignore"):
            weights = self.weights * self.delta / np.maximum(np.abs(residuals), self.delta)
            result = np.nan_to_num((jacobian.T * weights) @ jacobian, posinf=_HOPELESS, neginf=-_HOPELESS)
        for index, _, strength in self.ridge:
            result[index, index] += 2 * strength
        values, vectors = np.linalg.eigh(result)
        return (vectors * np.maximum(values, 1e-10 * max(values.max(), 1e-12))) @ vectors.T

    def polish(self, theta: np.ndarray, iterations: int = 40) -> tuple[np.ndarray, float]:
        """A few damped Gauss-Newton steps with Huber weights: exact data end at the precision of float64."""
        low, high = self.limits
        best, damping = self.value(theta), 1e-3
        for _ in range(iterations):
            residuals, jacobian = self._residuals_and_jacobian(theta)
            weights = self.weights * self.delta / np.maximum(np.abs(residuals), self.delta)
            gradient = (weights * residuals) @ jacobian
            curvature = (jacobian.T * weights) @ jacobian
            for index, value, strength in self.ridge:
                gradient[index] += 2 * strength * (theta[index] - value)
                curvature[index, index] += 2 * strength
            moving = ~(((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0)))
            if not moving.any():
                break
            curvature = curvature[np.ix_(moving, moving)]
            diagonal = np.maximum(curvature.diagonal(), 1e-300)
            step = np.zeros_like(theta)
            damped = curvature + damping * np.diag(diagonal)
            step[moving] = -_solve(damped, gradient[moving])
            candidate = np.clip(theta + step, low, high)
            found = self.value(candidate)
            if found < best:
                stalled = best - found <= 1e-14 * best and np.abs(candidate - theta).max() < 1e-12
                theta, best, damping = candidate, found, damping / 10
                if stalled or best == 0:
                    break
            else:
                damping *= 10
                if damping > 1e6:
                    break
        return theta, best

    def active_bounds(self, theta: np.ndarray) -> dict[str, str]:
        """{coefficient: 'low' or 'high'} of those that the search left at a bound."""
        found = {}
        for c, t, (low, high) in zip(self.free, theta.tolist(), self.bounds, strict=True):
            room = _AT_BOUND * (high - low)
            if t - low <= room or high - t <= room:
                found[c.name] = "low" if t - low <= room else "high"
        return found

    def _compared(self, predicted: np.ndarray) -> np.ndarray:
        if not self.is_log:
            return predicted
        with np.errstate(all="ignore"):
            return np.log(np.maximum(predicted, 1e-300))

    def _residuals_and_jacobian(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        coefficients = self.natural(theta)
        with np.errstate(all="ignore"):
            slopes = self.law.gradient(self.inputs, coefficients)
            if slopes is None:
                return self.residuals(theta), self._by_differences(theta)
            predicted = self.law.predict(self.inputs, coefficients)
            inverse = 1.0 / np.maximum(predicted, 1e-300) if self.is_log else 1.0
            jacobian = np.empty((len(self.free), len(predicted)))
            for index, c in enumerate(self.free):
                jacobian[index] = slopes[c.name] * ((coefficients[c.name] if c.log else 1.0) * inverse)
            for at, of, exponent in self._places:
                # The centred logarithm of A is kept where the exponent moves, so that A moves with it.
                chain = self.middle[self.names[of]] * (coefficients[exponent] if self.free[at].log else 1.0)
                jacobian[at] += chain * jacobian[of]
        return self._compared(predicted) - self.target, jacobian.T

    def _scaled(self, name: str, value: float) -> float:
        return float(np.log(value)) if self.free[self.names.index(name)].log else value

    def _by_differences(self, theta: np.ndarray) -> np.ndarray:
        columns = []
        for index in range(len(theta)):
            step = np.zeros_like(theta)
            step[index] = _STEP * max(1.0, abs(theta[index]))
            columns.append((self.residuals(theta + step) - self.residuals(theta - step)) / (2 * step[index]))
        return np.nan_to_num(np.array(columns).T, posinf=1e100, neginf=-1e100)


def _solve(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.solve(matrix, vector)
    except np.linalg.LinAlgError:
        return np.linalg.lstsq(matrix, vector, rcond=None)[0]


def _updated(curvature: np.ndarray, step: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The BFGS update by a step and the change of the gradient, damped so that the result stays positive definite.

    Source: Nocedal and Wright 2006, "Numerical Optimization", 2nd edition, procedure 18.2.
    """
    pushed = curvature @ step
    along = float(step @ pushed)
    if not along > 0:
        return curvature
    matched = float(step @ change)
    share = 1.0 if matched >= 0.1 * along else 0.9 * along / (along - matched)
    mixed = share * change + (1 - share) * pushed
    return curvature - np.outer(pushed, pushed) / along + np.outer(mixed, mixed) / float(step @ mixed)


def _working_bounds(c: Coefficient) -> tuple[float, float]:
    if c.partner:
        return -_FAR, _FAR
    if c.log:
        return float(np.log(max(c.low, 1e-300))), float(np.log(c.high))
    return c.low, c.high
