"""What a calibration has measured on this machine and on the user's own text: the file, and the laws through it.

`perennial plan --calibrate` makes the file (see `bench.calibration`); plans read it. Runs are of small copies of the
model that is to be continued, so that laws through them say what the model itself will do (see `transfer`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from perennial.core.errors import UserError
from perennial.core.files import read_json, write_json
from perennial.core.settings import Settings, check, raise_problems
from perennial.plan.transfer import NOISE, RunLaw, RunRow, Side, fit_runs

FORMAT = 1
FARTHEST = 50.0
"""Runs of this many times more compute than the largest measured one are no longer predicted.

Assumption: the exponents of small runs hold for a few doublings; after 50-fold their errors add up to more than the
effects that a plan decides about.
"""


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
    shift: tuple[float, float] | None = None
    """The checkpoint's bits per byte on (the old, the new) text."""
    old_before: float | None = None
    """The checkpoint's own loss on the old text, nats per token."""
    runs: list[MeasuredRun]
    speed: MeasuredSpeed
    noise_batch_tokens: float | None = None
    """Gradient noise scale in tokens, of the largest copy; None: it drowned."""


@dataclass(frozen=True)
class OwnLaws:
    """Laws through the runs of a calibration."""

    new: RunLaw | None
    old: RunLaw | None
    reason: str = ""
    """Why a side has none."""


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


def own_laws(
    calibration: Calibration | None, ledger: Sequence[Mapping[str, Any]] = (), parent_tokens: float = 0.0
) -> OwnLaws:
    """The laws of both sides through all runs of a calibration and of a ledger; for new models only the new side.

    Runs of a ledger are taken to continue parents of `parent_tokens`, which it does not record.
    """
    runs = calibration.runs if calibration else []
    updates = [run for run in runs if run.kind == "update"]
    scratch = [run for run in runs if run.kind == "scratch"]
    new_rows = [_row(run, run.new) for run in updates or scratch if run.new is not None]
    old_rows = [_row(run, run.old) for run in updates if run.old is not None and run.old_before is not None]
    new_rows += [_ledger_row(row, parent_tokens) for row in ledger if row["role"] == "new"]
    old_rows += [_ledger_row(row, parent_tokens) for row in ledger if row["role"] == "old" and row["loss_before"]]
    if len(new_rows) < 2:
        reason = "one run only" if new_rows else ("no calibration" if calibration is None else "no run has finished")
        return OwnLaws(None, None, reason)
    side: Side = "scratch" if scratch and not updates else "new"
    old = fit_runs("old", old_rows) if len(old_rows) > 1 else None
    return OwnLaws(fit_runs(side, new_rows), old, "" if old else "no run has old text")


def _ledger_row(row: Mapping[str, Any], parent_tokens: float) -> RunRow:
    return RunRow(
        flops_per_token=float(row["flops"]) / float(row["tokens"]),
        tokens=float(row["tokens"]),
        share=float(row["replay"]),
        parent_tokens=parent_tokens,
        old_before=float(row["loss_before"] or math.nan),
        loss=float(row["loss"]),
    )


def read_ledger(path: Path, domains: Collection[str]) -> list[dict[str, Any]]:
    """The rows of a ledger that continue a parent, on these domains. Raises UserError for what is no ledger."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [row for row in rows if row["parent"] and row["domain"] in domains and _ledger_row(row, 1.0)]
    except OSError as error:
        raise UserError(f"--ledger {path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--ledger {path}: not a ledger ({error}); `perennial laws ledger` makes one") from None


def _row(run: MeasuredRun, loss: float | None) -> RunRow:
    return RunRow(
        run.flops_per_token,
        run.tokens,
        run.share,
        run.parent_tokens,
        math.nan if run.old_before is None else run.old_before,
        math.nan if loss is None else loss,
    )


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
