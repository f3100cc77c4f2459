"""The small runs of a calibration: their recipes, their folders, and what each has measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perennial.bench.continual_grid import EVENTS, finished
from perennial.core import records
from perennial.core.errors import UserError
from perennial.core.settings import stable_hash
from perennial.model.cost import num_parameters
from perennial.model.foreign import AnyConfig
from perennial.plan.calibration import MeasuredRun
from perennial.plan.small_copies import Copy, SmallRun, runs
from perennial.train import origin
from perennial.train.recipe import EvaluationSettings

EVALUATION_TOKENS = int(EvaluationSettings().tokens.value)
"""As in every recipe: on other documents of the same corpus a loss can differ by several percent."""
BATCH_EXPONENT = 0.5
"""Of tokens; the critical batch grows like tokens^0.47 (Zhang et al. 2024, arXiv 2410.21676)."""


@dataclass(frozen=True)
class Task:
    """What to calibrate for."""

    checkpoint: Path | None
    """None: a new model."""
    data: Mapping[str, Path]
    """Prepared corpora of new text."""
    old: Mapping[str, Path]
    """Prepared corpora of old text."""
    out: Path
    """The calibration file; the runs lie beside it, in a folder of its name."""
    tokens: float | None = None
    """Of the update that is planned; None: one pass over the new text, at most as long as the past."""
    size: str | None = None
    """Preset of a new model."""
    minutes: float = 10.0

    @property
    def work(self) -> Path:
        """Folder of the runs."""
        return self.out.with_suffix(".runs")


@dataclass(frozen=True)
class Setting:
    """What all small runs have in common."""

    task: Task
    config: AnyConfig
    """Of the model that they are copies of."""
    past: float
    """Tokens that it has seen."""
    tokens: float
    """Of the update that is planned."""
    length: int
    batch_tokens: float
    """Of the model's own updates."""
    peak: float
    final_share: float
    """Rate at which the model was left, over its peak."""
    parameters: int
    optimizer: Any
    old: dict[str, Path]
    how: str | None = None
    """Name of the continuation."""
    fingerprints: dict[str, str] = field(default_factory=dict)


def all_runs(
    setting: Setting, sizes: Sequence[Copy], has_parent: bool, say: Callable[[str], None]
) -> tuple[list[MeasuredRun], list[Path]]:
    """Trains what is not finished yet; rows of the file and the folders of the copies' own training."""
    planned = runs(has_parent)
    bases: dict[int, Path] = {}
    rows: list[MeasuredRun] = []
    done, total = 0, len(planned) + (len(sizes) if has_parent else 0)
    for run in planned:
        size = sizes[run.copy]
        if has_parent and run.copy not in bases:
            done += 1
            data = _base_recipe(setting, size)
            bases[run.copy] = _trained(setting, f"{('small', 'large')[run.copy]}-base", data, (done, total), say)
            rows.append(_row(bases[run.copy], setting, size, SmallRun(run.copy, 1.0, 0.0), "base"))
        done += 1
        name = run.name + ("-long" if run.tokens > 1 else "")
        data = _update_recipe(setting, size, run, bases[run.copy]) if has_parent else _new_recipe(setting, size, run)
        folder = _trained(setting, name, data, (done, total), say)
        kind = "rate" if run.peak_factor != 1.0 else ("update" if has_parent else "scratch")
        rows.append(_row(folder, setting, size, run, kind))
    return rows, list(bases.values())


def _trained(
    setting: Setting, name: str, recipe: dict[str, Any], place: tuple[int, int], say: Callable[[str], None]
) -> Path:
    """The folder of a finished run. Raises UserError when it was stopped."""
    from perennial.train.recipe import parse_recipe
    from perennial.train.run import start

    key = stable_hash({**recipe, "corpora": setting.fingerprints, "parent": recipe.get("parent", "").split("/")[-3:]})
    folder = setting.task.work / f"{name}-{key[:8]}"
    if finished(folder) is None:
        say(f"calibrate: run {place[0]} of {place[1]}: {name}, {recipe['stages'][0]['budget']}")
        result = start(parse_recipe(recipe, source=name), folder, base=setting.task.work, quiet=True)
        if not result["complete"] or result.get("asked_to_stop"):
            raise UserError("stopped; the same command goes on")
    return folder


def batch_rows(setting: Setting, tokens: float) -> int:
    """Rows of a batch, so that the model's own batch lies on one power law with those of its copies."""
    wanted = setting.batch_tokens * (tokens / setting.tokens) ** BATCH_EXPONENT
    updates = min(origin.MIN_UPDATES, setting.tokens / setting.batch_tokens)
    return max(1, round(min(wanted, tokens / updates) / setting.length))


def _common(setting: Setting, tokens: float) -> dict[str, Any]:
    rows = batch_rows(setting, tokens)
    return {
        "batch": {"sequences": rows, "sequence_length": setting.length},
        "evaluation": {"tokens": f"{EVALUATION_TOKENS} tokens", "every": None},
        "checkpoints": {"every": None, "keep": 1},
    }


def _absolute(corpora: Mapping[str, Path]) -> dict[str, str]:
    return {name: str(path.resolve()) for name, path in corpora.items()}


def _base_recipe(setting: Setting, size: Copy) -> dict[str, Any]:
    """The copy's own training on the old text, as long against its update as the model's was."""
    peak = setting.peak * origin.estimated_peak(num_parameters(size.config).total)
    peak = float(f"{peak / origin.estimated_peak(setting.parameters):.3g}")
    final = f"{100 * setting.final_share:.4g}%"
    schedule = {"name": "cosine", "peak": peak, "final": final, "warmup": "5%"}
    return _pretraining(setting, size, size.parent_tokens, setting.old, schedule, batch_for=size.tokens)


def _new_recipe(setting: Setting, size: Copy, run: SmallRun) -> dict[str, Any]:
    """A new model on all text."""
    peak = run.peak_factor * origin.estimated_peak(num_parameters(size.config).total)
    schedule = {"name": "wsd", "peak": float(f"{peak:.3g}"), "warmup": "5%", "decay": "20%"}
    corpora = {**setting.task.data, **setting.old}
    tokens = run.tokens * size.tokens
    return _pretraining(setting, size, tokens, corpora, schedule, batch_for=tokens)


def _pretraining(
    setting: Setting,
    size: Copy,
    tokens: float,
    corpora: Mapping[str, Path],
    schedule: dict[str, Any],
    *,
    batch_for: float,
) -> dict[str, Any]:
    from perennial.data.corpus import Corpus

    sizes = {name: float(Corpus.open(path).train.num_tokens) for name, path in corpora.items()}
    stage = {
        "name": "pretrain",
        "budget": f"{round(tokens)} tokens",
        "mixture": {name: count / sum(sizes.values()) for name, count in sizes.items()},
        "schedule": schedule,
        "optimizer": setting.optimizer,
        "max_epochs": 64.0,
    }
    options = size.config.model_dump(mode="json", exclude_unset=True)
    return {
        "name": "copy",
        "model": {"options": options},
        "corpora": _absolute(corpora),
        "stages": [stage],
        **_common(setting, batch_for),
    }


def _update_recipe(setting: Setting, size: Copy, run: SmallRun, base: Path) -> dict[str, Any]:
    """The update of a copy, as `continue` would make it."""
    from perennial.core.lineage import newest_checkpoint
    from perennial.train.continuing import derive

    tokens = run.tokens * size.tokens
    common = _common(setting, tokens)
    settings = [f"batch.{key}={value}" for key, value in common["batch"].items()] + ["batch.micro_batch=null"]
    chosen: dict[str, Any] = {
        "budget": f"{round(tokens)} tokens",
        "base": setting.task.work,
        "name": "copy",
        "replay": f"{100 * run.share:g}%",
        "how": setting.how,
        "settings": settings,
    }
    checkpoint = newest_checkpoint(base)
    made = derive(checkpoint, setting.task.data, **chosen)
    if run.peak_factor != 1.0:
        peak = max(_rates(made.recipe.stages, made.parent.lineage.rate, made.parent.lineage.peak))
        made = derive(checkpoint, setting.task.data, peak=float(f"{run.peak_factor * peak:.3g}"), **chosen)
    data = made.recipe.model_dump(mode="json", exclude_unset=True)
    data["parent"] = str(checkpoint.resolve())
    data["corpora"] = _absolute(setting.task.data)
    data["stages"] = [{**stage, "max_epochs": 64.0} for stage in data["stages"]]
    return {**data, "evaluation": common["evaluation"], "checkpoints": common["checkpoints"]}


def _rates(stages: Sequence[Any], rate: float, peak: float) -> list[float]:
    """The highest rates of the stages."""
    named = {"parent": peak}
    found = [stage.schedule.get("peak", rate) for stage in stages]
    return [float(named.get(value, value)) for value in found]


def _row(folder: Path, setting: Setting, size: Copy, run: SmallRun, kind: Any) -> MeasuredRun:
    done = finished(folder)
    assert done is not None
    after, before = done["evaluation"]["after"], done["evaluation"].get("before", {})

    def loss(measured: Mapping[str, Any], names: Mapping[str, Path]) -> float | None:
        values = [float(measured[name]["nats_per_token"]) for name in names if name in measured]
        return sum(values) / len(values) if values else None

    trained = [event["tokens_per_second"] for event in records.read(folder / EVENTS, "train")]
    return MeasuredRun(
        name=folder.name,
        kind=kind,
        parameters=num_parameters(size.config).total,
        flops_per_token=size.flops_per_token,
        tokens=float(done["tokens"]),
        share=run.share,
        parent_tokens=size.parent_tokens if kind in ("update", "rate") else 0.0,
        peak_factor=run.peak_factor,
        old_before=loss(before, setting.old) if kind in ("update", "rate") else None,
        old=loss(after, setting.old),
        new=loss(after, {**setting.task.data, **(setting.old if kind == "scratch" else {})}),
        seconds=float(sum(done["seconds"].values())),
        tokens_per_second=sorted(trained)[len(trained) // 2],
    )
