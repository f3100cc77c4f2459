"""From a recipe to plain numbers: corpora and lineage are opened, amounts, presets and `replay` worked out.

The result is `resolved.json`, every value explicit, with a hash; it is the only thing that the loop reads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perennial.core import lineage as lineages
from perennial.core import plugins
from perennial.core.amounts import Amount, human
from perennial.core.errors import UserError, nearest
from perennial.core.settings import Settings, check, raise_problems, stable_hash
from perennial.data.corpus import Corpus
from perennial.data.mixture import StageOrder
from perennial.data.replay import SourceSpec, replay_sources
from perennial.model.config import ModelConfig
from perennial.model.cost import flops_per_token
from perennial.train.recipe import (
    REPLAY,
    STAND_INS,
    BatchSettings,
    Recipe,
    SpikeSettings,
    StageSettings,
    shares,
)


class ResolvedStage(Settings):
    """A stage with every number explicit."""

    name: str
    tokens: int
    updates: int
    flops: float
    sources: list[dict[str, Any]]
    """SourceSpecs; offsets count what the parent consumed, not yet what earlier stages of this run will have."""
    schedule: dict[str, Any]
    rate_before: float | None
    """Learning rate at which the parent, or the stage before, ended."""
    rate_start: float
    rate_peak: float
    rate_end: float
    optimizer: dict[str, Any]
    optimizer_state: str
    objective: dict[str, Any]


class Resolved(Settings):
    """What a run will do, every value explicit: the content of resolved.json."""

    name: str
    recipe_hash: str
    seed: int
    parent: dict[str, str] | None
    """{'path', 'checkpoint'} of the checkpoint to start from."""
    model: dict[str, Any]
    parameters: int
    flops_per_token: int
    tokens: int
    flops: float
    corpora: dict[str, dict[str, Any]]
    """name -> {path, fingerprint, tokenizer, role: 'new' | 'old' | 'other'}; all are evaluated."""
    stages: list[ResolvedStage]
    batch: BatchSettings
    precision: str
    clip: float | None
    document_mask: bool
    compile: bool
    evaluation_every_tokens: int | None
    evaluation_tokens: int | None
    checkpoint_every_tokens: int | None
    checkpoint_keep: int
    spikes: SpikeSettings
    tensorboard: bool


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a run starts from, as far as files tell."""

    path: Path
    lineage: lineages.Lineage
    config: ModelConfig
    tokenizer: str


def resolve(
    recipe: Recipe, *, base: Path, precision: str, measure: Callable[[ModelConfig, Recipe], float] | None = None
) -> Resolved:
    """Turns a recipe into plain numbers.

    `base` is the folder that relative paths start from; `precision` is what 'auto' means on this machine; `measure`
    returns training tokens per second and is called only when a budget is a time. Raises UserError.
    """
    parent = _parent(recipe, base)
    corpora = _open_corpora(recipe, base, parent)
    config = parent.config if parent else _new_model(recipe, corpora)
    length = recipe.batch.sequence_length
    if length > config.context:
        how = "" if parent else ", or raise the context (model.options.context)"
        raise UserError(
            f"batch.sequence_length {length} is longer than the model's context of {config.context} tokens; "
            f"lower it{how}"
        )
    per_token = flops_per_token(config, length)
    speed = measure(config, recipe) if measure and any(s.budget.unit == "seconds" for s in recipe.stages) else None
    stages: list[ResolvedStage] = []
    for stage in recipe.stages:
        before = stages[-1].rate_end if stages else (parent.lineage.rate if parent else None)
        peaks = [*([parent.lineage.peak] if parent else []), *(s.rate_peak for s in stages)]
        stages.append(
            _resolve_stage(recipe, stage, parent, corpora, per_token, speed, before, max(peaks, default=None))
        )
    _check_repetition(recipe, stages, corpora)
    total = sum(s.tokens for s in stages)
    data: dict[str, Any] = {
        "name": recipe.name,
        "seed": recipe.seed,
        "parent": {"path": str(parent.path), "checkpoint": parent.lineage.checkpoint} if parent else None,
        "model": config.model_dump(mode="json"),
        "parameters": _parameters(config),
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
        "evaluation_every_tokens": _span_tokens(recipe.evaluation.every, total),
        "evaluation_tokens": None if recipe.evaluation.tokens.unit == "share" else int(recipe.evaluation.tokens.value),
        "checkpoint_every_tokens": _span_tokens(recipe.checkpoints.every, total),
        "checkpoint_keep": recipe.checkpoints.keep,
        "spikes": recipe.spikes.model_dump(mode="json"),
        "tensorboard": recipe.tensorboard,
    }
    resolved = Resolved(recipe_hash="", **data)
    return resolved.model_copy(update={"recipe_hash": recipe_hash(resolved)})


def recipe_hash(resolved: Resolved) -> str:
    """What names a resolved recipe: the hash of everything in it but where things lie."""
    return stable_hash(_without_paths(resolved.model_dump(mode="json", exclude={"recipe_hash"})))


@dataclass(frozen=True)
class _Opened:
    corpus: Corpus
    role: str

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "path": str(self.corpus.path),
            "fingerprint": self.corpus.fingerprint,
            "tokenizer": self.corpus.tokenizer_fingerprint,
            "role": self.role,
        }


def _parent(recipe: Recipe, base: Path) -> Parent | None:
    if recipe.parent is None:
        return None
    return read_parent((base / recipe.parent).resolve())


def read_parent(path: Path) -> Parent:
    """A parent's lineage, configuration and tokenizer, from its checkpoint folder. Raises UserError."""
    from perennial.data.tokenizers.folder import TokenizerFolder
    from perennial.model.huggingface import load_config

    path = lineages.newest_checkpoint(path)
    if not lineages.read(path).stages:
        raise UserError(f"{path}: nothing was trained yet in this checkpoint; take a later one")
    parent = Parent(path, lineages.read(path), load_config(path), TokenizerFolder.open(path).fingerprint)
    check_vocabulary(parent.config, TokenizerFolder.open(path).vocabulary_size, "the same folder", str(path))
    return parent


def _open_corpora(recipe: Recipe, base: Path, parent: Parent | None) -> dict[str, _Opened]:
    """The run's corpora, the parent's (as far as they can be found) and those only evaluated."""
    opened = {n: _Opened(Corpus.open((base / p).resolve()), "new") for n, p in recipe.corpora.items()}
    known = parent.lineage.corpora if parent else {}
    for name in opened.keys() & known.keys():
        _same_corpus(name, opened[name].corpus, known[name]["fingerprint"])
    opened |= {name: _Opened(corpus, "old") for name, corpus in old_corpora(recipe, base, parent).items()}
    for name, text in recipe.evaluation.corpora.items():
        opened.setdefault(name, _Opened(Corpus.open((base / text).resolve()), "other"))
    _one_tokenizer(opened, parent)
    return opened


def old_corpora(recipe: Recipe, base: Path, parent: Parent | None) -> dict[str, Corpus]:
    """The parent's corpora that the recipe does not name itself: those that are found, or all when it replays them.

    Raises UserError for one that was changed, that is needed and missing, or that the parent does not have.
    """
    known = parent.lineage.corpora if parent else {}
    for name in recipe.moved.keys() - known.keys():
        there = ", ".join(known) or "none"
        raise UserError(f"moved: the parent has no corpus '{name}'; it has: {there}.{nearest(name, known)}")
    found = {}
    for name, facts in known.items():
        path = (base / recipe.moved[name]).resolve() if name in recipe.moved else Path(facts["path"])
        is_needed = name in recipe.moved or any(REPLAY in s.mixture for s in recipe.stages)
        if name not in recipe.corpora and (path.is_dir() or is_needed):
            found[name] = _unchanged(name, path, facts["fingerprint"])
    return found


def _same_corpus(name: str, corpus: Corpus, fingerprint: str) -> None:
    if corpus.fingerprint != fingerprint:
        raise UserError(
            f"corpora: '{name}' is also a corpus of the parent, with other content (fingerprint "
            f"{corpus.fingerprint[:12]}, the parent's {fingerprint[:12]}). Give the new one another name, such as "
            f"'{name}-2'."
        )


def _unchanged(name: str, path: Path, fingerprint: str) -> Corpus:
    try:
        corpus = Corpus.open(path)
    except UserError as error:
        raise UserError(
            f"the parent's corpus '{name}' cannot be read: {error}\nIf it lies elsewhere, say `moved: {{{name}: PATH}}`"
            f" in the recipe or `--moved {name}=PATH`."
        ) from None
    if corpus.fingerprint != fingerprint:
        raise UserError(
            f"{path}: this is not the corpus '{name}' that the parent consumed (fingerprint {corpus.fingerprint[:12]}, "
            f"the lineage says {fingerprint[:12]}). Point to the unchanged one with `moved`, or give it another name."
        )
    return corpus


def _one_tokenizer(opened: dict[str, _Opened], parent: Parent | None) -> None:
    wanted = parent.tokenizer if parent else next((o.corpus.tokenizer_fingerprint for o in opened.values()), None)
    owner = f"the parent {parent.path}" if parent else f"corpus '{next(iter(opened), '')}'"
    hint = (
        f" Prepare it again with `--tokenizer {parent.path}`." if parent else " Prepare all corpora with one tokenizer."
    )
    for name, one in opened.items():
        if one.corpus.tokenizer_fingerprint != wanted:
            raise UserError(
                f"corpus '{name}' ({one.corpus.path}) was prepared with another tokenizer "
                f"({one.corpus.tokenizer_fingerprint[:12]}) than {owner} ({str(wanted)[:12]}).{hint}"
            )


def _new_model(recipe: Recipe, corpora: dict[str, _Opened]) -> ModelConfig:
    assert recipe.model is not None
    if not recipe.corpora:
        raise UserError("corpora: at least one prepared corpus is needed")
    first = next(iter(corpora.values())).corpus
    settings = {"vocabulary_size": first.vocabulary_size, **recipe.model.options}
    if recipe.model.preset is not None:
        config = ModelConfig.from_preset(recipe.model.preset, **settings)
    else:
        found, problems = check(ModelConfig, settings, ("model", "options"))
        raise_problems(problems, "recipe")
        assert found is not None
        config = found
    check_vocabulary(config, first.vocabulary_size, f"corpus '{first.name}' ({first.path})", "model.options")
    return config


def check_vocabulary(config: ModelConfig, vocabulary_size: int, tokens: str, model: str) -> None:
    """Raises UserError when the model has no row for some of the ids that its tokenizer gives."""
    if vocabulary_size > config.vocabulary_size:
        raise UserError(
            f"{model}: a vocabulary_size of {config.vocabulary_size} does not match the tokenizer of {tokens}, which "
            f"has {vocabulary_size} ids; the model needs a row for each"
        )


def _parameters(config: ModelConfig) -> int:
    from perennial.model.cost import num_parameters

    return num_parameters(config).total


def _resolve_stage(
    recipe: Recipe,
    stage: StageSettings,
    parent: Parent | None,
    corpora: dict[str, _Opened],
    per_token: float,
    speed: float | None,
    before: float | None,
    peak: float | None,
) -> ResolvedStage:
    updates = max(1, math.ceil(_budget_tokens(stage, per_token, speed) / recipe.batch.tokens - 1e-9))
    tokens = updates * recipe.batch.tokens
    schedule, problems = plugins.build("schedules", _with_parent_rates(stage, peak, before))
    raise_problems(problems, f"stage '{stage.name}' schedule")
    optimizer, _ = plugins.build("optimizers", stage.optimizer)
    objective, _ = plugins.build("objectives", stage.objective)
    try:
        rates = [schedule.rate(u * recipe.batch.tokens, tokens) for u in _sampled(updates)]
    except UserError as error:
        raise UserError(f"stage '{stage.name}': schedule: {error}") from None
    return ResolvedStage(
        name=stage.name,
        tokens=tokens,
        updates=updates,
        flops=tokens * per_token,
        sources=[s.to_json() for s in _sources(recipe, stage, parent, corpora)],
        schedule=plugins.dump(schedule),
        rate_before=before,
        rate_start=schedule.rate(0, tokens),
        rate_peak=max(rates),
        rate_end=schedule.rate(tokens, tokens),
        optimizer=plugins.dump(optimizer),
        optimizer_state=stage.optimizer_state,
        objective=plugins.dump(objective),
    )


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


def _sources(
    recipe: Recipe, stage: StageSettings, parent: Parent | None, corpora: dict[str, _Opened]
) -> list[SourceSpec]:
    result: list[SourceSpec] = []
    for name, share in sorted(shares(stage.mixture).items()):  # how the file orders them changes nothing
        if name == REPLAY and name not in recipe.corpora:
            assert parent is not None
            stages = [s.model_dump(mode="json") for s in parent.lineage.stages]
            where = {
                n: str(o.corpus.path) for n, o in corpora.items() if o.role == "old" or n in parent.lineage.corpora
            }
            result += replay_sources(stages, share, recipe.seed, moved=where, max_epochs=stage.max_epochs)
        else:
            corpus = corpora[name].corpus
            seed, offset = _continued(name, corpus, parent, recipe)
            result.append(
                SourceSpec(
                    name=name,
                    corpus=str(corpus.path),
                    fingerprint=corpus.fingerprint,
                    weight=share,
                    role="fresh",
                    seed=seed,
                    offset_rows=offset,
                    max_epochs=stage.max_epochs,
                )
            )
    return result


def _continued(name: str, corpus: Corpus, parent: Parent | None, recipe: Recipe) -> tuple[int, int]:
    """Order seed and rows already drawn: a corpus that the parent was going through goes on where it stopped."""
    seed, offset = recipe.seed, 0
    for stage in parent.lineage.stages if parent else []:
        for source in stage.sources:
            if source["fingerprint"] == corpus.fingerprint and source["role"] == "fresh":
                if stage.sequence_length != recipe.batch.sequence_length:
                    raise UserError(
                        f"corpus '{name}': the parent went through it in rows of {stage.sequence_length} tokens; set "
                        "batch.sequence_length to that to go on without repeating, or use 'replay' for what was seen"
                    )
                seed, offset = source["seed"], source["offset_rows"] + source["rows"]
    return seed, offset


def _check_repetition(recipe: Recipe, stages: list[ResolvedStage], corpora: dict[str, _Opened]) -> None:
    by_fingerprint = {o.corpus.fingerprint: o.corpus for o in corpora.values()}
    drawn: dict[str, int] = {}
    for stage in stages:
        order = stage_order(stage.sources, by_fingerprint, recipe.seed, recipe.batch.sequence_length, stage.name, drawn)
        rows = stage.updates * recipe.batch.sequences
        try:
            order.check_repetition(rows)
        except UserError as error:
            raise UserError(f"stage '{stage.name}': {error}") from None
        for name, count in order.consumed(rows).items():
            drawn[name] = drawn.get(name, 0) + count


def stage_order(
    sources: list[dict[str, Any]],
    corpora: Mapping[str, Corpus],
    seed: int,
    sequence_length: int,
    stage: str,
    drawn: Mapping[str, int],
) -> StageOrder:
    """The order of a stage's rows when `drawn` rows of each source were consumed by earlier stages of the run."""
    from perennial.core.seeds import derive

    specs = [SourceSpec.from_json({**s, "offset_rows": s["offset_rows"] + drawn.get(s["name"], 0)}) for s in sources]
    return StageOrder(specs, corpora, seed=derive(seed, "mixture", stage), sequence_length=sequence_length)


def _span_tokens(span: Amount | None, total: int) -> int | None:
    return None if span is None else max(1, round(span.of(total)))


def _without_paths(data: Any) -> Any:
    """The data without where things lie, so that a moved folder keeps its recipe hash."""
    if isinstance(data, dict):
        return {k: _without_paths(v) for k, v in data.items() if k not in ("path", "corpus")}
    if isinstance(data, list):
        return [_without_paths(v) for v in data]
    return data


def describe(resolved: Resolved) -> str:
    """What the run will do, in a few lines for a person."""
    lines = [
        f"{resolved.name}: {human(resolved.parameters)} parameters, {human(resolved.tokens, 'tokens')}, "
        f"{resolved.flops:.3g} FLOPs, recipe {resolved.recipe_hash[:12]}"
    ]
    for stage in resolved.stages:
        mix = ", ".join(f"{s['name']} {s['weight']:.1%}" for s in stage.sources)
        was = "" if stage.rate_before is None else f" (the model was left at {stage.rate_before:.3g})"
        lines.append(f"  stage {stage.name}: {human(stage.tokens, 'tokens')} in {stage.updates} updates of {mix}")
        lines.append(
            f"    {stage.schedule['name']} learning rate: starts at {stage.rate_start:.3g}{was}, "
            f"peak {stage.rate_peak:.3g}, ends at {stage.rate_end:.3g}; {stage.optimizer['name']}, "
            f"state {stage.optimizer_state}"
        )
    return "\n".join(lines)


def relative_to(path: Path, base: Path) -> str:
    """`path` as it is best written in a file that lies in `base`."""
    return os.path.relpath(path, base)
