"""What a calibration has measured on this machine and on the user's own text: the file, and what it says of peaks.

`perennial plan --calibrate` makes the file (see `bench.calibration`); plans read it. Runs are of small copies of the
model that is to be continued, so that laws through them say what the model itself will do (see `own_runs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from perennial.core.errors import UserError
from perennial.core.files import read_json, write_json
from perennial.core.settings import Settings, check, raise_problems
from perennial.evals.shift import Shift
from perennial.plan.transfer import NOISE

FORMAT = 1


class MeasuredRun(Settings):
    """One finished small run; losses in nats per token, the mean over the corpora of a side."""

    name: str
    kind: Literal["base", "update", "rate", "scratch"]
    """The small copy's own training; an update of it; an update at another peak; a new model."""
    parameters: int
    flops_per_token: float
    tokens: float
    share: float = 0.0
    """Of old text in every batch."""
    parent_tokens: float = 0.0
    peak_factor: float = 1.0
    """Peak learning rate over the one that the rule gives."""
    old_before: float | None = None
    old: float | None = None
    new: float | None = None
    seconds: float
    """Wall time of training, evaluation and saving."""
    tokens_per_second: float
    """Of the median update."""


class MeasuredSpeed(Settings):
    """Training speed of the model itself, or of the largest copy where the model does not fit."""

    flops_per_second: float
    """By the closed form of `model.cost`, whole updates included."""
    parameters: int
    """Of the model that was timed."""
    threads: int
    precision: str
    memory_bytes: float
    """The most that a process with nothing else held."""
    planned_memory_bytes: float


class Calibration(Settings):
    """A calibration file."""

    format: int = FORMAT
    checkpoint: str | None
    """Id of the checkpoint that it is for; None: for new models."""
    corpora: dict[str, str]
    """Name -> fingerprint of the corpora, new and old."""
    continuation: str | None = None
    """The way of continuing that the updates were made in."""
    shift: Shift | None = None
    """The checkpoint's losses on the old and the new text."""
    old_before: float | None = None
    """The checkpoint's own loss on the old text, nats per token."""
    runs: list[MeasuredRun]
    speed: MeasuredSpeed
    noise_batch_tokens: float | None = None
    """Gradient noise scale in tokens, of the largest copy; None: it drowned."""


def write(calibration: Calibration, path: Path) -> None:
    """Writes the file, whole or not at all."""
    write_json(path, calibration.model_dump(mode="json"))


def read(path: Path) -> Calibration:
    """Reads the file. Raises UserError for another format, or for what is no calibration."""
    data = read_json(path, "calibration")
    if not isinstance(data, dict) or not {"runs", "speed", "corpora"} <= data.keys():
        raise UserError(f"--calibration {path}: not a calibration; `perennial plan --calibrate` makes one")
    if data.get("format") != FORMAT:
        raise UserError(
            f"--calibration {path}: format {data.get('format')!r}; this version of Perennial reads format {FORMAT}. "
            "Calibrate again."
        )
    found, problems = check(Calibration, data)
    raise_problems(problems, f"--calibration {path}")
    assert found is not None
    return found


@dataclass(frozen=True)
class PeakAdvice:
    """The peak learning rate of the lowest loss, as a multiple of the rule's, and what it changes."""

    factor: float
    note: str
    new_ratio: float = 1.0
    """New loss at that peak over that at the rule's."""
    old_ratio: float = 1.0
    """The same of the old loss, at the share of the sweep."""


def best_peak(calibration: Calibration) -> PeakAdvice | None:
    """From runs that differ in the peak alone: the minimum of a parabola in its logarithm; None without such runs.

    A gain within the noise between runs is no reason to leave the rule's peak.
    """
    tried = [run for run in calibration.runs if run.kind == "rate"]
    if not tried:
        return None
    same = _place(tried[0])
    tried += [run for run in calibration.runs if run.kind in ("update", "scratch") and _place(run) == same]
    tried.sort(key=lambda run: run.peak_factor)
    factors = np.log([run.peak_factor for run in tried])
    losses = [_average(run) for run in tried]
    shown = ", ".join(f"{loss:.3f} at {run.peak_factor:g}x" for run, loss in zip(tried, losses, strict=True))
    words = f"on a small copy the mean of old and new loss is {shown}"
    if len(tried) < 3:
        return PeakAdvice(1.0, words)
    curve = np.polyfit(factors, losses, 2)
    at = float(np.clip(-curve[1] / (2 * curve[0]), factors[0], factors[-1])) if curve[0] > 0 else 0.0
    if curve[0] <= 0:
        at = float(factors[int(np.argmin(losses))])
    gain = float(np.polyval(curve, 0.0) - np.polyval(curve, at))
    if gain < NOISE * losses[0]:
        return PeakAdvice(1.0, f"{words}: no better one")
    edge = "; the best may lie beyond" if at in (factors[0], factors[-1]) else ""
    changes = {side: _change(tried, side, factors, at) for side in ("new", "old")}
    return PeakAdvice(float(np.exp(at)), words + edge, changes["new"], changes["old"])


def _change(tried: Sequence[MeasuredRun], side: str, factors: np.ndarray, at: float) -> float:
    """Loss of a side at a peak over that at the rule's; 1 where it is not known."""
    losses = [getattr(run, side) for run in tried]
    if None in losses:
        return 1.0
    curve = np.polyfit(factors, np.log(losses), 2)
    return float(np.exp(np.polyval(curve, at) - np.polyval(curve, 0.0)))


def _place(run: MeasuredRun) -> tuple[float, float, float]:
    return run.flops_per_token, run.tokens, run.share


def _average(run: MeasuredRun) -> float:
    losses = [loss for loss in (run.old, run.new) if loss is not None]
    return sum(losses) / len(losses)


def mismatches(
    calibration: Calibration, checkpoint: str | None, corpora: Mapping[str, str], continuation: str
) -> list[str]:
    """In what a calibration was made for something else: the checkpoint's id, name -> fingerprint of the corpora."""
    lines = []
    if checkpoint is not None and continuation != calibration.continuation:
        lines.append(f"the calibration continued by {calibration.continuation}, this plan does by {continuation}")
    if checkpoint != calibration.checkpoint:
        lines.append("the calibration was made for another model: its losses before, and so the old ones after, differ")
    known = set(calibration.corpora.values())
    lines += [
        f"the calibration was made without corpus '{name}'; what it says is of other text"
        for name, fingerprint in corpora.items()
        if fingerprint not in known
    ]
    return lines
