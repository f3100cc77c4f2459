"""Learning rates of whole runs, update by update: what the laws of the loss curve read.

The rows of a table are points of curves: the run's name, the updates done, the rate of the last of them. A run may
also be given exactly, as `Rates` in place of its name; otherwise the rates between two rows lie on a straight line, and
those before the first row on a line from 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.signal import lfilter

from perennial.core.errors import UserError
from perennial.scaling.laws.base import Columns, Input, column

CURVE = Input("curve", "name", "name of the run, or its `Rates`; one run, where it is not given", True, must_vary=False)
STEP = Input("step", "updates", "updates done, 1 or more")
RATE = Input("rate", "1/update", "learning rate of the last update; not needed with `Rates`", True, must_vary=False)
LOSS = Input("loss", "nats/token", "loss at that update")

_LONGEST_BLOCK = 24  # updates: the loss of runs of 24,000 is then right to 6e-5, at its end to 2e-5
_FEWEST_BLOCKS = 200
_MOST_UPDATES = 100_000_000


@dataclass(frozen=True, eq=False)
class Rates:
    """The learning rate of every update of one run, shape (updates,); equal only to itself."""

    values: np.ndarray
    _annealed: dict[float, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or values.min() < 0:
            raise UserError("the rates of a run must be one or more finite numbers of 0 or more, one per update")
        if values.max() <= 0:
            raise UserError("the rates of a run are all 0: it does not train")
        object.__setattr__(self, "values", values)

    @cached_property
    def sums(self) -> np.ndarray:
        """Sum of the rates up to and with each update, shape (updates,)."""
        return np.cumsum(self.values)

    @cached_property
    def changes(self) -> np.ndarray:
        """Change of the rate at each update, shape (updates,); the first is the rise from 0."""
        return np.diff(self.values, prepend=0.0)

    @cached_property
    def warmup_steps(self) -> int:
        """Updates of the first rise: before the first one whose rate does not exceed the one before."""
        stays = np.flatnonzero(self.changes[1:] <= 0)
        return int(stays[0]) + 1 if len(stays) else len(self.values)

    @cached_property
    def blocks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(change, rate, sum before) of each short stretch of updates in which the rate changes, shape (blocks,).

        Rate and sum are means over the stretch, weighted by how much the rate changes where: a jump keeps its place.
        A law that sums over all changes so far reads these, up to 24 times fewer.
        """
        moved = np.flatnonzero(self.changes)
        width = min(_LONGEST_BLOCK, max(1, len(moved) // _FEWEST_BLOCKS))
        first = np.flatnonzero(np.diff(moved // width, prepend=-1))
        weight = np.abs(self.changes[moved])
        total = np.add.reduceat(weight, first)
        rate = np.add.reduceat(weight * self.values[moved], first) / total
        before = np.add.reduceat(weight * (self.sums - self.values)[moved], first) / total
        return np.add.reduceat(self.changes[moved], first), rate, before

    def held_until(self, num_updates: int) -> Rates:
        """The same run, gone on at its last rate where it is shorter than `num_updates`."""
        missing = num_updates - len(self.values)
        return self if missing <= 0 else Rates(np.pad(self.values, (0, missing), mode="edge"))

    def annealed(self, memory: float) -> tuple[np.ndarray, np.ndarray]:
        """How far the rate has fallen, remembered for about `memory` updates and summed, and its derivative by memory.

        Both of shape (updates,), in rate x updates. The rise of the warm-up does not count; later rises do, negatively.
        """
        if memory in self._annealed:
            return self._annealed[memory]
        keep = 1 - 1 / memory
        falls = -self.changes
        falls[: self.warmup_steps] = 0.0
        momentum = lfilter([1.0], [1.0, -keep], falls)
        by_keep = lfilter([0.0, 1.0], [1.0, -keep], momentum)
        self._annealed.clear()  # a search comes back to the last memory only
        self._annealed[memory] = np.cumsum(momentum), np.cumsum(by_keep) / memory**2
        return self._annealed[memory]


def by_curve(inputs: Columns) -> Iterator[tuple[Rates, np.ndarray, np.ndarray]]:
    """(rates, updates done, places in the table) of each run; the last two of shape (rows of the run,), integers.

    A run that is asked for past its end goes on at its last rate. Raises UserError for a step below 1, and for a run
    without rates.
    """
    steps = np.rint(column(inputs, STEP.name)).astype(np.int64)
    labels = np.broadcast_to(inputs.get(CURVE.name, np.zeros(len(steps))), (len(steps),))
    keys = np.array([id(label) if isinstance(label, Rates) else str(label) for label in labels.tolist()])
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    for index, start in enumerate(first.tolist()):
        places, label = np.flatnonzero(group == index), labels[start]
        done = steps[places]
        if done.min() < 1 or done.max() > _MOST_UPDATES:
            wrong = done.min() if done.min() < 1 else done.max()
            raise UserError(f"step {wrong} must lie between 1 and {_MOST_UPDATES:,}")
        rates = label if isinstance(label, Rates) else _between_rows(inputs, label, done, places)
        yield rates.held_until(int(done.max())), done, places


def with_rates(inputs: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Each row's run as `Rates` between its rows, and whether the row lies past the warm-up; shape (rows,) each.

    The rates are then built once, not at every prediction.
    """
    labels = np.empty(len(inputs[STEP.name]), dtype=object)
    is_past = np.zeros(len(labels), dtype=bool)
    for rates, steps, places in by_curve(inputs):
        labels[places] = [rates] * len(places)
        is_past[places] = steps >= rates.warmup_steps
    return labels, is_past


def refusal(table: Columns) -> str | None:
    """What rates that never fall leave unknown, or None."""
    falls = any((rates.changes[: int(steps.max())] < 0).any() for rates, steps, _ in by_curve(table))
    return None if falls else "no curve in which the rate falls: what a decay gains is unknown"


def _between_rows(inputs: Columns, label: object, steps: np.ndarray, places: np.ndarray) -> Rates:
    if RATE.name not in inputs:
        raise UserError(f"the table has no column '{RATE.name}': the loss of curve {label!r} depends on its rates")
    order = np.argsort(steps, kind="stable")
    known, rates = steps[order], column(inputs, RATE.name)[places][order]
    return Rates(np.interp(np.arange(1, known[-1] + 1), np.append(0, known), np.append(0.0, rates)))


def draw_curves(
    ranges: Mapping[str, tuple[float, float]], num_rows: int, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Points of three runs (held, cosine and halved midway) inside the ranges of step and rate, for tests of laws."""
    first, last = (round(end) for end in ranges[STEP.name])
    low, high = ranges[RATE.name]
    done = np.arange(1, last + 1) / last
    shapes = (np.ones(last), (1 + np.cos(np.pi * done)) / 2, np.where(done < 0.5, 1.0, 0.5))
    warmup = np.minimum(1.0, 20 * done)
    runs = [Rates(warmup * (low + (high - low) * shape)) for shape in shapes]
    labels = np.empty(num_rows, dtype=object)
    labels[:] = [runs[i] for i in generator.integers(0, len(runs), num_rows).tolist()]
    return {CURVE.name: labels, STEP.name: generator.integers(first, last + 1, num_rows).astype(np.float64)}
