"""From a recipe to plain numbers: corpora and lineage are opened, amounts, presets and `replay` worked out.

The result is `resolved.json`, every value explicit, with a hash; it is the only thing that the loop reads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from perennial.core import plugins
from perennial.core.amounts import Amount
from perennial.core.errors import UserError
from perennial.core.settings import raise_problems
from perennial.data.replay import SourceSpec
from perennial.model.config import ModelConfig
from perennial.model.cost import num_parameters as native_parameters
from perennial.model.foreign import AnyConfig, check_document_mask, check_rows, flops_per_token, num_parameters
from perennial.objectives.base import Objective
from perennial.train.corpora import Opened, open_corpora
from perennial.train.other_models import PARENT, find_models
from perennial.train.recipe import STAND_INS, Recipe, StageSettings
from perennial.train.resolved import Resolved, ResolvedStage, recipe_hash
from perennial.train.stage_parts import pull_of, stage_data
from perennial.train.stage_sources import check_repetition, pull_sources, stage_sources
from perennial.train.starting import Parent, new_model, read_parent

MOST_TOKENS = 2.0**53
"""Of a stage: what a float counts exactly."""


def resolve(
    recipe: Recipe, *, base: Path, precision: str, measure: Callable[[AnyConfig, Recipe], float] | None = None
) -> Resolved:
    """Turns a recipe into plain numbers.

    `base` is the folder that relative paths start from; `precision` is what 'auto' means on this machine; `measure`
    returns training tokens per second and is called only when a budget is a time. Raises UserError.
    """
    communication = _communication(recipe)
    parent = _parent(recipe, base)
    corpora = open_corpora(recipe, base, parent)
    config = parent.config if parent else _new_config(recipe, corpora)
    length = recipe.batch.sequence_length
    advice = "; lower it" + ("" if parent else ", or raise the context (model.options.context)")
    check_rows(config, length, "batch.sequence_length", advice)
    check_document_mask(config, recipe.document_mask)
    per_token = flops_per_token(config, length)
    speed = measure(config, recipe) if measure and any(s.budget.unit == "seconds" for s in recipe.stages) else None
    stages: list[ResolvedStage] = []
    for stage in recipe.stages:
        whole = [s for s in stages if s.new_rows is None]
        before = whole[-1].rate_end if whole else (parent.lineage.rate if parent else None)
        peaks = [*([parent.lineage.peak] if parent else []), *(s.rate_peak for s in whole)]
        spent = per_token - (_flops_saved(config) if stage.train == "new_rows" else 0)
        read = functools.partial(_other_model, base, parent, stage.name)
        peak = max(peaks, default=None)
        stages.append(_resolve_stage(recipe, stage, parent, config, corpora, read, spent, speed, before, peak))
    check_repetition(recipe, stages, corpora)
    total = sum(s.tokens for s in stages)
    data: dict[str, Any] = {
        "name": recipe.name,
        "seed": recipe.seed,
        "parent": {"path": str(parent.path), "checkpoint": parent.lineage.checkpoint} if parent else None,
        "origin": parent.lineage.origin.model_dump(mode="json") if parent and parent.lineage.origin else None,
        "model": config.model_dump(mode="json"),
        "parameters": num_parameters(config),
        "flops_per_token": per_token,
        "tokens": total,
        "flops": sum(s.flops for s in stages),
        "corpora": {n: c.facts for n, c in corpora.items()},
        "stages": [s.model_dump(mode="json") for s in stages],
        "batch": recipe.batch.model_dump(mode="json"),
        "precision": precision if recipe.precision == "auto" else recipe.precision,
        "clip": recipe.clip,
        "document_mask": recipe.document_mask,
        "compile": recipe.compile,
        "activation_checkpointing": recipe.activation_checkpointing,
        "parallel": recipe.parallel.model_dump(mode="json"),
        "communication": communication,
        "evaluation_every_tokens": _span_tokens(recipe.evaluation.every, total),
        "evaluation_tokens": None if recipe.evaluation.tokens.unit == "share" else int(recipe.evaluation.tokens.value),
        "checkpoint_every_tokens": _span_tokens(recipe.checkpoints.every, total),
        "checkpoint_keep": recipe.checkpoints.keep,
        "spikes": recipe.spikes.model_dump(mode="json"),
        "tensorboard": recipe.tensorboard,
    }
    resolved = Resolved(recipe_hash="", **data)
    return resolved.model_copy(update={"recipe_hash": recipe_hash(resolved)})


def _parent(recipe: Recipe, base: Path) -> Parent | None:
    if recipe.parent is None:
        return None
    return read_parent((base / recipe.parent).resolve(), recipe.parent_facts)


def _new_config(recipe: Recipe, corpora: Mapping[str, Opened]) -> ModelConfig:
    assert recipe.model is not None
    if not recipe.corpora:
        raise UserError("corpora: at least one prepared corpus is needed")
    first = next(iter(corpora.values())).corpus
    return new_model(recipe.model, first.vocabulary_size, f"corpus '{first.name}' ({first.path})")


def _resolve_stage(
    recipe: Recipe,
    stage: StageSettings,
    parent: Parent | None,
    config: AnyConfig,
    corpora: Mapping[str, Opened],
    read: Callable[[str], Parent],
    per_token: float,
    speed: float | None,
    before: float | None,
    peak: float | None,
) -> ResolvedStage:
    schedule, problems = plugins.build("schedules", _with_parent_rates(stage, peak, before))
    raise_problems(problems, f"stage '{stage.name}' schedule")
    optimizer, _ = plugins.build("optimizers", stage.optimizer)
    pull = pull_of(stage)
    sources = stage_sources(recipe, stage, parent, corpora)
    objective, share_read = _objective(recipe, stage, sources, corpora)
    models = find_models(
        [*objective.checkpoints(), *([PARENT] if pull else [])],
        read=read,
        config=config,
        tokenizer=parent.tokenizer if parent else next(iter(corpora.values())).corpus.tokenizer_fingerprint,
        sequence_length=recipe.batch.sequence_length,
        where=f"stage '{stage.name}'",
    )
    forward = {model.name: model.flops_per_token for model in models}
    spent = per_token + share_read * sum(forward[name] for name in objective.checkpoints())
    update_tokens = (stage.sequences or recipe.batch.sequences) * recipe.batch.sequence_length
    wanted = _budget_tokens(stage, spent, speed)
    if wanted > MOST_TOKENS:
        raise UserError(
            f"stage '{stage.name}': a budget of {stage.budget} is {wanted:.3g} tokens, more than the {MOST_TOKENS:.0e} "
            "that can be counted"
        )
    updates = max(1, math.ceil(wanted / update_tokens - 1e-9))
    tokens = updates * update_tokens
    try:
        rates = [schedule.rate(u * update_tokens, tokens) for u in _sampled(updates)]
    except UserError as error:
        raise UserError(f"stage '{stage.name}': schedule: {error}") from None
    return ResolvedStage(
        name=stage.name,
        tokens=tokens,
        updates=updates,
        flops=tokens * spent + (pull.rows * recipe.batch.sequence_length * per_token if pull else 0),
        sources=[s.to_json() for s in sources],
        schedule=plugins.dump(schedule),
        rate_before=before,
        rate_start=schedule.rate(0, tokens),
        rate_peak=max(rates),
        rate_end=schedule.rate(tokens, tokens),
        optimizer=plugins.dump(optimizer),
        optimizer_state=stage.optimizer_state,
        objective=plugins.dump(objective),
        pull=plugins.dump(pull) if pull else None,
        pull_sources=[s.to_json() for s in pull_sources(recipe, stage, pull, parent, corpora)],
        models=models,
        sequences=stage.sequences,
        new_rows=_new_rows(stage, parent) if stage.train == "new_rows" else None,
    )


def _objective(
    recipe: Recipe, stage: StageSettings, sources: list[SourceSpec], corpora: Mapping[str, Opened]
) -> tuple[Objective, float]:
    """The stage's objective, and the share of rows that its teachers read. Raises UserError where it cannot be used."""
    objective: Objective = plugins.build("objectives", stage.objective)[0]
    data = stage_data(
        sources,
        {one.corpus.fingerprint: one.corpus for one in corpora.values()},
        seed=recipe.seed,
        stage=stage.name,
        sequence_length=recipe.batch.sequence_length,
        document_mask=recipe.document_mask,
    )
    try:
        objective.check(data)
        return objective, objective.share_read(data)
    except UserError as error:
        raise UserError(f"stage '{stage.name}': {error}") from None


def _other_model(base: Path, parent: Parent | None, stage: str, name: str) -> Parent:
    """A checkpoint that a stage reads beside the one it trains, by its name."""
    if name != PARENT:
        return read_parent((base / name).resolve())
    if parent is None:
        raise UserError(f"stage '{stage}': it reads the parent's weights, and this run begins without a 'parent'")
    return parent


def _communication(recipe: Recipe) -> dict[str, Any]:
    """The communication with all its settings. Raises UserError for one that a stage cannot be trained with."""
    communication, problems = plugins.build("communications", recipe.communication)
    raise_problems(problems, "communication")
    for stage in recipe.stages:
        if communication.trains_apart and stage.train == "new_rows":
            raise UserError(
                f"communication {plugins.name_of(communication)}: moves all weights, stage '{stage.name}' only those "
                "of new rows; take every_update"
            )
    return plugins.dump(communication)


def _new_rows(stage: StageSettings, parent: Parent | None) -> tuple[int, int]:
    """The ids that the parent's vocabulary was last extended by. Raises UserError when it never was."""
    changes = parent.lineage.changes if parent else []
    ids = [change["ids"] for change in changes if change.get("operation") == "vocab extend"]
    if not ids:
        needed = "needs a parent made by `perennial vocab extend`" + (f"; {parent.path} was not" if parent else "")
        raise UserError(f"stage '{stage.name}': train 'new_rows' {needed}")
    first, stop = ids[-1]
    return first, stop


def _flops_saved(config: AnyConfig) -> int:
    """Per token, when only rows of the tables are trained: the matrices need no gradient of their own."""
    return 2 * native_parameters(config).matrix if isinstance(config, ModelConfig) else 0


def _sampled(updates: int) -> list[int]:
    """Update numbers at which the schedule is looked at for its highest rate: all, or 10,000 of very many."""
    step = max(1, updates // 10_000)
    return [*range(0, updates, step), updates]


def _budget_tokens(stage: StageSettings, per_token: float, speed: float | None) -> float:
    if stage.budget.unit == "tokens":
        return stage.budget.value
    if stage.budget.unit == "flops":
        return stage.budget.value / per_token
    if speed is None:
        raise UserError(f"stage '{stage.name}': a budget in time needs a measurement, which only a real run makes")
    return stage.budget.value * speed


def _with_parent_rates(stage: StageSettings, peak: float | None, before: float | None) -> Any:
    if not isinstance(stage.schedule, dict):
        return stage.schedule
    values = {"peak": peak}
    result = {}
    for key, value in stage.schedule.items():
        if value == "parent" and key in STAND_INS:
            value = values.get(key, before)
            if value is None:
                raise UserError(f"stage '{stage.name}': schedule.{key} 'parent' needs a parent or a stage before")
        result[key] = value
    return result


def _span_tokens(span: Amount | None, total: int) -> int | None:
    return None if span is None else max(1, round(span.of(total)))
