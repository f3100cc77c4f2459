"""Small runs on the user's own text that tell a planner what a large run will do: `perennial plan --calibrate`.

Two small copies of the model (see `plan.small_copies`) are trained on the old text and updated on the new at several
shares of old text; a few further runs vary peak and length. Speed and gradient noise are measured beside. Every run
has a folder of its own next to the file, and a finished one is not made again, so that the same command goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from perennial.bench.calibration_measures import losses_before, noise_of, speed_of
from perennial.bench.calibration_runs import Setting, Task, all_runs
from perennial.core.amounts import human, human_seconds
from perennial.core.errors import UserError
from perennial.data.corpus import Corpus
from perennial.evals.shift import Shift
from perennial.model.config import ModelConfig
from perennial.model.cost import num_parameters
from perennial.model.foreign import num_parameters as parameters_of
from perennial.plan import calibration as files
from perennial.plan.calibration import Calibration, MeasuredSpeed
from perennial.plan.small_copies import copies
from perennial.train import origin
from perennial.train.starting import read_parent

if TYPE_CHECKING:
    from perennial.train.starting import Parent

MOST_ROW_TOKENS = 512
"""Rows of the copies are no longer: attention over long rows costs what more tokens would tell better."""

SPEED_SAMPLES = 3
"""How often the speed is measured: once before the small runs, whose sizes it decides, and the rest after them."""


def calibrate(task: Task, *, say: Callable[[str], None] = print) -> Calibration:
    """Works off the small runs and writes the file; stopped, it goes on when called again. Raises UserError."""
    import torch

    from perennial.core.environment import tune_process, usable_cores
    from perennial.train.precision import native_precision

    tune_process()
    parent = read_parent(task.checkpoint) if task.checkpoint is not None else None
    old = _old_text(task, parent)
    opened = {name: Corpus.open(path) for name, path in {**task.data, **old}.items()}
    setting = _of_parent(task, parent, old) if parent else _of_new_model(task, opened)
    if setting.tokens < 2 * setting.length:
        words = f"{human(setting.tokens, 'tokens')} are too few for runs of rows of {setting.length} tokens"
        raise UserError(f"--data: {words}; give more text")
    setting = replace(setting, fingerprints={name: corpus.fingerprint for name, corpus in opened.items()})
    shift, old_before = losses_before(setting, parent)
    if parent:
        setting = replace(setting, how=_continuation(setting, shift))
    speed = speed_of(setting, parent, say)
    sizes = copies(
        setting.config,
        length=setting.length,
        past=setting.past,
        tokens=setting.tokens,
        flops=60 * task.minutes * speed["flops_per_second"],
    )
    rows, folders = all_runs(setting, sizes, parent is not None, say)
    speed = speed_of(setting, parent, say, samples=SPEED_SAMPLES)  # the first one was minutes ago
    found = Calibration(
        checkpoint=parent.lineage.checkpoint if parent else None,
        corpora=setting.fingerprints,
        continuation=setting.how,
        shift=shift,
        old_before=old_before,
        runs=rows,
        speed=MeasuredSpeed(
            flops_per_second=speed["flops_per_second"],
            parameters=round(speed["parameters"]),
            threads=min(torch.get_num_threads(), usable_cores()),
            precision=native_precision(torch.device("cpu")),
            memory_bytes=speed["memory_bytes"],
            planned_memory_bytes=speed["planned_memory_bytes"],
        ),
        noise_batch_tokens=noise_of(folders, setting),
    )
    files.write(found, task.out)
    return found


def _old_text(task: Task, parent: Parent | None) -> dict[str, Path]:
    """The old text that was named, else that of the lineage. Raises UserError when a model has none."""
    if parent is None or task.old:
        return dict(task.old)
    places = {name: Path(facts["path"]) for name, facts in parent.lineage.corpora.items()}
    found = {name: path for name, path in places.items() if path.is_dir()}
    if not found:
        raise UserError("--replay: what the model was trained on is not known; name old text as --replay NAME=PATH")
    return found


def _of_new_model(task: Task, opened: Mapping[str, Corpus]) -> Setting:
    """A new model of the size that was named, or of the smallest."""
    config = ModelConfig.from_preset(task.size or "1m", next(iter(opened.values())).vocabulary_size)
    parameters = num_parameters(config).total
    tokens = task.tokens or float(sum(corpus.train.num_tokens for corpus in opened.values()))
    length = min(MOST_ROW_TOKENS, origin.row_tokens(config.context, tokens, "cpu"))
    return Setting(
        task=task,
        config=config,
        past=0.0,
        tokens=tokens,
        length=length,
        batch_tokens=float(length * origin.batch_rows(tokens, length)),
        peak=origin.estimated_peak(parameters),
        final_share=0.1,
        parameters=parameters,
        optimizer="adamw",
        old=dict(task.old),
    )


def _of_parent(task: Task, parent: Parent, old: dict[str, Path]) -> Setting:
    """The manner of the parent's last stage; for a model from elsewhere that of its first update."""
    lineage, config = parent.lineage, parent.config
    last = lineage.stages[-1] if lineage.stages else None
    longest = last.sequence_length if last else config.context or MOST_ROW_TOKENS
    new_tokens = float(sum(Corpus.open(path).train.num_tokens for path in task.data.values()))
    tokens = task.tokens or min(new_tokens, float(lineage.tokens))
    length = min(longest if last else origin.row_tokens(longest, tokens, "cpu"), MOST_ROW_TOKENS)
    return Setting(
        task=task,
        config=config,
        past=float(lineage.tokens),
        tokens=tokens,
        length=length,
        batch_tokens=float(last.batch_tokens if last else length * origin.batch_rows(tokens, length)),
        peak=lineage.peak,
        final_share=min(1.0, lineage.rate / lineage.peak) if lineage.peak else 0.1,
        parameters=parameters_of(config),
        optimizer=last.optimizer if last else "adamw",
        old=old,
    )


def _continuation(setting: Setting, shift: Shift | None) -> str:
    """The way of continuing that would be chosen for the model itself."""
    from perennial.train.continuing import derive

    task, parent = setting.task, setting.task.checkpoint
    assert parent is not None
    known = {facts["fingerprint"] for facts in read_parent(parent).lineage.corpora.values()}
    is_known = all(setting.fingerprints[name] in known for name in setting.old)
    return derive(
        parent,
        task.data,
        budget=f"{setting.tokens:.15g} tokens",
        base=Path.cwd(),
        name="asked",
        stand_ins={} if is_known else setting.old,
        shift=lambda: shift,
    ).continuation


def summary(found: Calibration) -> str:
    """What was measured, for people."""
    lines = [f"{len(found.runs)} runs, {human_seconds(sum(run.seconds for run in found.runs))} of training"]
    for run in found.runs:
        losses = ", ".join(f"{name} {value:.3f}" for name, value in (("old", run.old), ("new", run.new)) if value)
        lines.append(f"  {run.name}: {human(run.parameters)} parameters, {human(run.tokens, 'tokens')}: {losses}")
    speed, mebibyte = found.speed, 2.0**20
    lines.append(
        f"speed: {speed.flops_per_second:.3g} FLOPs/s with {human(speed.parameters)} parameters, {speed.threads} "
        f"threads, {speed.precision}; memory {speed.memory_bytes / mebibyte:.0f} MiB, "
        f"planned {speed.planned_memory_bytes / mebibyte:.0f}"
    )
    if found.noise_batch_tokens is not None:
        lines.append(f"gradient noise scale: {human(found.noise_batch_tokens, 'tokens')}")
    return "\n".join(lines)
