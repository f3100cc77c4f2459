"""Checkpoints on tasks of lm-evaluation-harness: measured, compared example by example, and kept with the checkpoint.

Results lie in CHECKPOINT/perennial/tasks.json, from where the lineage takes them, and in a `tasks` event of the run
that the checkpoint belongs to. They hold no date: the same measurement gives the same bytes.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perennial.core import files
from perennial.core import lineage as lineages
from perennial.core.environment import tune_process
from perennial.core.errors import UserError
from perennial.core.progress import Progress
from perennial.core.records import Recorder
from perennial.core.statistics import Interval, bootstrap_interval, mean_interval, paired_interval, t_quantile
from perennial.evals import harness
from perennial.evals.harness import Metric, Options, Scores
from perennial.evals.task_files import TaskFile, is_path, read_task_file, split_arguments
from perennial.model.inspection import weights_id

FORMAT = 1
BETTER, WORSE, DIFFERENT, NONE_SHOWN = "better", "worse", "different", "no difference shown"
_EVENTS = "events.jsonl"
_MANIFEST = f"{lineages.STATE_FOLDER}/{files.MANIFEST}"
_CONFIDENCE = 0.95
_RESAMPLES = 1000
_SLOW = ("bleu", "chrf", "chrf++", "ter")
_SLOW_RESAMPLES = 100  # as many as the harness takes for these: each goes through all texts again


def evaluate_tasks(
    checkpoint: Path,
    tasks: Sequence[str],
    *,
    against: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    precision: str = "auto",
    online: bool = False,
    allow_code: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Scores of a checkpoint: {'checkpoint', 'harness', 'tasks': {name: result}, 'kept': paths, 'notes': sentences}.

    tasks: names of the harness's tasks and paths of task files, also several with commas. against: a checkpoint, such
    as the parent, that is measured too; each result then has the difference over the same examples. online: lets the
    harness download. allow_code: lets task files run their Python. precision: 'auto' is fp32 on a CPU and as stored on
    a GPU. Raises UserError for bad input, before anything is measured where that is possible.
    """
    for name, given, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if given is not None and given < least:
            raise UserError(f"{name} {given}: at least {least} is needed")
    wanted = read_tasks(tasks, allow_code=allow_code)
    options = Options(limit, num_fewshot, batch_size, precision, allow_code, online, quiet)
    version = harness.version()
    folders = {"checkpoint": checkpoint, **({"against": against} if against else {})}
    for folder in folders.values():
        _check_folder(folder)
    _read_kept(checkpoint)
    tune_process()
    stream = sys.stderr
    Progress("eval", quiet=quiet, stream=stream).note(f"eval: loading {harness.PACKAGE} {version}")
    with harness.surroundings(options), tempfile.TemporaryDirectory(prefix="perennial-tasks-") as cache:
        opened = harness.Tasks(wanted, options, Path(cache))
        measured = {label: harness.measure(folder, opened, options, label, stream) for label, folder in folders.items()}
        del opened  # lets go of the data in the folder that is deleted now
        told = {"harness": f"{harness.PACKAGE} {version}", "precision": harness.precision_of(options)}
    base = measured["against"][0] if against else None
    found = results(measured["checkpoint"][0], base, told, _identity(against) if against else None)
    kept, notes = keep(checkpoint, found)
    warned = dict.fromkeys(note for _, notes_of_one in measured.values() for note in notes_of_one)
    return {
        "checkpoint": str(checkpoint),
        **({"against": str(against)} if against else {}),
        **told,
        "tasks": found,
        "kept": [str(path) for path in kept],
        "notes": [*_fewshot_notes(found, num_fewshot), *warned, *notes],
    }


def read_tasks(tasks: Sequence[str], *, allow_code: bool = False) -> list[TaskFile | str]:
    """The task files, read and checked, and the names. Raises UserError, also where the harness is not installed."""
    wanted = [read_task_file(Path(t), allow_code=allow_code) if is_path(t) else t for t in split_arguments(tasks)]
    harness.version()
    return wanted


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a model folder (config.json is missing)")
    if (folder / _MANIFEST).is_file():
        files.verify_manifest(folder, _MANIFEST, "checkpoint")


def _identity(folder: Path) -> str:
    """The checkpoint's id from its lineage, or worked out from its weights in the same way."""
    if lineages.has_lineage(folder):
        return lineages.read(folder).checkpoint
    return weights_id(folder)


def _fewshot_notes(found: Mapping[str, Any], asked: int | None) -> list[str]:
    other = [name for name, facts in found.items() if asked is not None and facts["num_fewshot"] not in (asked, None)]
    return [f"{name} has its own number of examples in the prompt and keeps it." for name in other]


# From scores to results

_Intervals = dict[tuple[str, str], Interval | None]
"""(task, metric) -> its interval; None where the harness's aggregation gives none."""


def results(
    scores: Sequence[Scores], base: Sequence[Scores] | None, told: Mapping[str, str], base_id: str | None
) -> dict[str, Any]:
    """One result per task, JSON-ready; with the scores of a base, each metric's difference to it, paired by example.

    told: facts that every result repeats. base_id: the id of the base's checkpoint.
    """
    before = {one.task: one for one in base or ()}
    own = _intervals(scores, lambda task, key, metric: _interval(metric))
    old = _intervals(before.values(), lambda task, key, metric: _interval(metric))
    differences = _intervals(scores, lambda task, key, metric: _paired(before.get(task), key, metric))
    found: dict[str, Any] = {}
    for one in scores:
        found[one.task] = {
            "metrics": {
                key: {
                    "value": metric.value,
                    "stderr": _error(own[one.task, key]),
                    "higher_is_better": metric.higher_is_better,
                }
                for key, metric in one.metrics.items()
            },
            "examples": one.examples,
            "of": one.available,
            "examples_id": one.examples_id,
            "num_fewshot": one.num_fewshot,
            "version": one.version,
            "file": one.file.path.name if one.file else None,
            "sha256": one.file.sha256 if one.file else None,
            **told,
        }
        if one.task in before:
            compared = {
                key: {
                    "value": before[one.task].metrics[key].value,
                    "stderr": _error(old[one.task, key]),
                    **_difference(before[one.task].metrics[key], metric, differences[one.task, key]),
                }
                for key, metric in one.metrics.items()
                if key in before[one.task].metrics
            }
            found[one.task]["against"] = {"checkpoint": base_id, "metrics": compared}
    return found


def _intervals(scores: Iterable[Scores], of: Callable[[str, str, Metric], Interval | None]) -> _Intervals:
    """An interval per task and metric; those of groups follow from their tasks'."""
    found: _Intervals = {}
    grouped = []
    for one in scores:
        for key, metric in one.metrics.items():
            if metric.weights:
                grouped.append((one.task, key, metric))
            else:
                found[one.task, key] = of(one.task, key, metric)
    for task, key, metric in grouped:
        found[task, key] = _weighted(metric.weights, {name: found.get((name, key)) for name in metric.weights})
    return found


def _interval(metric: Metric) -> Interval | None:
    """Over examples: Student's t for means, the bootstrap for what is aggregated otherwise (perplexity, F1, BLEU)."""
    if metric.value is None or not metric.examples:
        return None
    contributions = list(metric.examples.values())
    if metric.is_mean:
        return _attempt(lambda: mean_interval(contributions, confidence=_CONFIDENCE))

    def statistic(rows: NDArray[np.float64]) -> float:
        return metric.aggregate([contributions[int(row)] for row in rows])

    return _bootstrapped(len(contributions), statistic, metric)


def _paired(base: Scores | None, key: str, metric: Metric) -> Interval | None:
    """The difference to the base over the same examples; what makes an example easy or hard for both cancels out."""
    other = base.metrics.get(key) if base else None
    if other is None or other.value is None or metric.value is None:
        return None
    shared = [example for example in metric.examples if example in other.examples]
    first, second = ([m.examples[example] for example in shared] for m in (other, metric))
    if not shared:
        return None
    if metric.is_mean:
        return _attempt(lambda: paired_interval(first, second, confidence=_CONFIDENCE))

    def statistic(rows: NDArray[np.float64]) -> float:
        chosen = [int(row) for row in rows]
        return metric.aggregate([second[i] for i in chosen]) - metric.aggregate([first[i] for i in chosen])

    return _bootstrapped(len(shared), statistic, metric)


def _bootstrapped(count: int, statistic: Callable[[NDArray[np.float64]], float], metric: Metric) -> Interval | None:
    resamples = _SLOW_RESAMPLES if getattr(metric.aggregate, "__name__", "") in _SLOW else _RESAMPLES
    rows = np.arange(count)
    return _attempt(lambda: bootstrap_interval(rows, statistic, confidence=_CONFIDENCE, resamples=resamples))


def _attempt(interval: Callable[[], Interval]) -> Interval | None:
    """None for contributions that are no finite numbers, or an aggregation that fails on some resample of them."""
    try:
        return interval()
    except (ArithmeticError, TypeError, ValueError):
        return None


def _weighted(weights: Mapping[str, float], parts: Mapping[str, Interval | None]) -> Interval | None:
    """The weighted sum of independent estimates; None where one of them is not known."""
    known = [(weights[name], part, _error(part)) for name, part in parts.items()]
    if any(part is None or error is None for _, part, error in known):
        return None
    estimate = math.fsum(weight * part.estimate for weight, part, _ in known if part)
    error = math.sqrt(math.fsum((weight * (error or 0)) ** 2 for weight, _, error in known))
    count = sum(part.count for _, part, _ in known if part)
    half = t_quantile((1 + _CONFIDENCE) / 2, count - 1) * error
    return Interval(estimate, estimate - half, estimate + half, _CONFIDENCE, count)


def _error(interval: Interval | None) -> float | None:
    """The standard error: half the interval, in units of Student's quantile that it was made with."""
    if interval is None or interval.count < 2:
        return None
    return (interval.high - interval.low) / 2 / t_quantile((1 + interval.confidence) / 2, interval.count - 1)


def _difference(base: Metric, metric: Metric, interval: Interval | None) -> dict[str, Any]:
    """{'difference', 'low', 'high', 'verdict'}: of the checkpoint to the base; verdict None without an interval."""
    if interval is None or interval.count < 2:
        plain = None if base.value is None or metric.value is None else metric.value - base.value
        return {"difference": plain, "low": None, "high": None, "verdict": None}
    if interval.low <= 0 <= interval.high:
        verdict = NONE_SHOWN
    elif metric.higher_is_better is None:
        verdict = DIFFERENT
    else:
        verdict = BETTER if (interval.estimate > 0) == metric.higher_is_better else WORSE
    return {"difference": interval.estimate, "low": interval.low, "high": interval.high, "verdict": verdict}


# Keeping them


def keep(checkpoint: Path, found: Mapping[str, Any]) -> tuple[list[Path], list[str]]:
    """Adds results to the checkpoint's and to its run's events; the files written, and what could not be kept.

    A folder without `perennial/` is somebody else's model and stays as it is.
    """
    if not (checkpoint / lineages.STATE_FOLDER).is_dir():
        return [], [f"{checkpoint} has no {lineages.STATE_FOLDER}/ folder, so the results are printed only."]
    path = checkpoint / lineages.STATE_FOLDER / lineages.TASKS_FILE
    try:
        files.write_json(path, {"format": FORMAT, "tasks": dict(sorted({**_read_kept(checkpoint), **found}.items()))})
    except UserError as error:  # the measurement is worth more than the place to keep it
        return [], [f"The results are printed only: {error}"]
    run = _run_of(checkpoint)
    if run is None:
        return [path], []
    with _locked(run) as is_ours:
        if not is_ours:
            return [path], [f"{run} is being trained by another process: no event was written to its {_EVENTS}."]
        recorder = Recorder(run / _EVENTS)
        try:
            recorder.write(
                "tasks", tokens=int(checkpoint.resolve().name), checkpoint=_identity(checkpoint), tasks=found
            )
        finally:
            recorder.close()
    return [path, run / _EVENTS], []


def _read_kept(checkpoint: Path) -> dict[str, Any]:
    """The results kept so far. Raises UserError for a file of another format."""
    path = checkpoint / lineages.STATE_FOLDER / lineages.TASKS_FILE
    if not path.is_file():
        return {}
    data = files.read_json(path, "file of task results")
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("tasks"), dict):
        raise UserError(f"{path}: not a file of task results in format {FORMAT}; move it away to measure anew")
    return dict(data["tasks"])


def _run_of(checkpoint: Path) -> Path | None:
    """The run folder whose checkpoints/<tokens> this is."""
    path = checkpoint.resolve()
    run = path.parent.parent
    return run if path.parent.name == "checkpoints" and path.name.isdigit() and (run / _EVENTS).is_file() else None


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[bool]:
    """Holds the lock under which a run is trained; False when somebody else holds it."""
    if os.name != "posix":
        yield True
        return
    import fcntl

    descriptor = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = True
    except BlockingIOError:
        is_ours = False
    except OSError:  # a file system that knows no locks
        is_ours = True
    try:
        yield is_ours
    finally:
        os.close(descriptor)


# For a person


def to_text(result: Mapping[str, Any]) -> str:
    """The results as a table for a terminal, with what to know about them below."""
    compared = "against" in result
    header = [
        "task",
        "metric",
        "value",
        *(["against", "difference", "95% interval", "verdict"] if compared else []),
        "examples",
    ]
    rows = [header]
    for name, facts in result["tasks"].items():
        of = f" of {facts['of']}" if facts["of"] > facts["examples"] else ""
        before = facts.get("against", {}).get("metrics", {})
        for key, metric in facts["metrics"].items():
            more = _compared_text(before.get(key, {})) if compared else []
            rows.append([name, key.replace(",", ", "), _with_error(metric), *more, f"{facts['examples']}{of}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    kept = [f"kept in {path}" for path in result["kept"]]
    return "\n".join([*lines, *kept, *(f"- {note}" for note in result["notes"])])


def _compared_text(before: Mapping[str, Any]) -> list[str]:
    low, high = before.get("low"), before.get("high")
    return [
        _with_error(before),
        _figure(before.get("difference"), "+"),
        "-" if low is None or high is None else f"{_figure(low, '+')} to {_figure(high, '+')}",
        before.get("verdict") or "-",
    ]


def _with_error(metric: Mapping[str, Any]) -> str:
    error = metric.get("stderr")
    return _figure(metric.get("value")) + (f" +- {_figure(error)}" if error is not None else "")


def _figure(number: float | None, sign: str = "") -> str:
    if number is None:
        return "-"
    return format(number, f"{sign}.4f" if abs(number) < 100 else f"{sign}.4g")
