"""From a recipe to plain numbers: corpora and lineage are opened, amounts, presets and `replay` worked out.

The result is `resolved.json`, every value explicit, with a hash; it is the only thing that the loop reads.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perennial.core import lineage as lineages
from perennial.core import plugins
from perennial.core.amounts import Amount, human
from perennial.core.errors import UserError, nearest
from perennial.core.seeds import derive
from perennial.core.settings import Settings, check, raise_problems, stable_hash
from perennial.data.corpus import Corpus
from perennial.data.mixture import StageOrder
from perennial.data.replay import SourceSpec, replay_sources
from perennial.model.config import ModelConfig
from perennial.model.cost import num_parameters as native_parameters
from perennial.model.foreign import (
    AnyConfig,
    TransformersConfig,
    check_document_mask,
    check_rows,
    check_vocabulary,
    flops_per_token,
    notes,
    num_parameters,
    parse_config,
)
from perennial.objectives.base import Objective
from perennial.train.origin import lineage_of
from perennial.train.other_models import PARENT, OtherModel, find_models
from perennial.train.recipe import (
    REPLAY,
    STAND_INS,
    BatchSettings,
    ParallelSettings,
    ParentFacts,
    Recipe,
    SpikeSettings,
    StageSettings,
    shares,
)
from perennial.train.stage_parts import pull_of, stage_data, weighs_by_replay


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
    pull: dict[str, Any] | None = None
    """What draws the weights back to the parent's after every update; None: nothing does."""
    pull_sources: list[dict[str, Any]] = []
    """SourceSpecs of the data that the pull weighs by."""
    models: list[OtherModel] = []
    """Further checkpoints that the objective and the pull read."""
    new_rows: tuple[int, int] | None = None
    """First and last + 1 of the ids whose rows are all that is trained; None: the whole model is."""


class Resolved(Settings):
    """What a run will do, every value explicit: the content of resolved.json."""

    name: str
    recipe_hash: str
    seed: int
    parent: dict[str, str] | None
    """{'path', 'checkpoint'} of the checkpoint to start from."""
    origin: lineages.Origin | None = None
    """What is known and estimated of an ancestor that Perennial did not train."""
    model: dict[str, Any]
    parameters: int
    flops_per_token: int
    tokens: int
    flops: float
    corpora: dict[str, dict[str, Any]]
    """name -> {path, fingerprint, tokenizer, role: 'new' | 'old' | 'other', stands_in}; all are evaluated."""
    stages: list[ResolvedStage]
    batch: BatchSettings
    precision: str
    clip: float | None
    document_mask: bool
    compile: bool
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    parallel: ParallelSettings = ParallelSettings()
    communication: dict[str, Any] = {"name": "every_update"}
    evaluation_every_tokens: int | None
    evaluation_tokens: int | None
    checkpoint_every_tokens: int | None
    checkpoint_keep: int
    spikes: SpikeSettings
    tensorboard: bool

    @property
    def through(self) -> str:
        """What computes the model: 'native' code, or 'transformers'."""
        return str(self.model.get("through", "native"))


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a run starts from, as far as files tell."""

    path: Path
    lineage: lineages.Lineage
    config: AnyConfig
    tokenizer: str


def resolve(
    recipe: Recipe, *, base: Path, precision: str, measure: Callable[[AnyConfig, Recipe], float] | None = None
) -> Resolved:
    """Turns a recipe into plain numbers.

    `base` is the folder that relative paths start from; `precision` is what 'auto' means on this machine; `measure`
    returns training tokens per second and is called only when a budget is a time. Raises UserError.
    """
    communication = _communication(recipe)
    parent = _parent(recipe, base)
    corpora = _open_corpora(recipe, base, parent)
    config = parent.config if parent else _new_model(recipe, corpora)
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
    _check_repetition(recipe, stages, corpora)
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


def recipe_hash(resolved: Resolved) -> str:
    """What names a resolved recipe: the hash of everything in it but where things lie."""
    left_out: dict[str, Any] = {"recipe_hash": True, "origin": True}  # as before there were origins
    left_out |= {"activation_checkpointing": True, "parallel": True}  # how it is computed, not what
    if resolved.origin:
        left_out["origin"] = {"parity"}  # a measurement, which no two machines need have alike
    data = resolved.model_dump(mode="json", exclude=left_out)
    if data["communication"] == {"name": "every_update"}:  # as before there was a choice
        del data["communication"]
    for stage in data["stages"]:
        if stage["new_rows"] is None:  # as before stages could be limited to them
            del stage["new_rows"]
        for added in ("pull", "pull_sources", "models"):  # as before there were any
            if not stage[added]:
                del stage[added]
    return stable_hash(_without_paths(data))


@dataclass(frozen=True)
class _Opened:
    corpus: Corpus
    role: str
    stands_in: bool = False
    """For data of the parent that are not known."""

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "path": str(self.corpus.path),
            "fingerprint": self.corpus.fingerprint,
            "tokenizer": self.corpus.tokenizer_fingerprint,
            "role": self.role,
            **({"stands_in": True} if self.stands_in else {}),
        }


def _parent(recipe: Recipe, base: Path) -> Parent | None:
    if recipe.parent is None:
        return None
    return read_parent((base / recipe.parent).resolve(), recipe.parent_facts)


def read_parent(path: Path, facts: ParentFacts | None = None) -> Parent:
    """A parent's lineage, configuration and tokenizer, from its folder: a checkpoint, or any model's. Raises UserError.

    `facts`: what the user knows of the past of a model that Perennial did not train.
    """
    from perennial.data.tokenizers.folder import TokenizerFolder
    from perennial.model.folder_config import load_config

    path = lineages.newest_checkpoint(path)
    known = lineages.read(path) if lineages.has_lineage(path) else None
    if known is not None and not known.stages and known.origin is None:
        raise UserError(f"{path}: nothing was trained yet in this checkpoint; take a later one")
    config, tokenizer = load_config(path), TokenizerFolder.open(path)
    check_vocabulary(config, tokenizer.vocabulary_size, "the same folder", str(path))
    return Parent(path, lineage_of(path, config, known, facts or ParentFacts()), config, tokenizer.fingerprint)


def _open_corpora(recipe: Recipe, base: Path, parent: Parent | None) -> dict[str, _Opened]:
    """The run's corpora, the parent's (as far as they can be found) and those only evaluated."""
    opened = {}
    for name, text in recipe.corpora.items():
        stands_in = name in recipe.stand_ins
        opened[name] = _Opened(Corpus.open((base / text).resolve()), "old" if stands_in else "new", stands_in)
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
        is_needed = name in recipe.moved or any(REPLAY in s.mixture or weighs_by_replay(s) for s in recipe.stages)
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
    allowed = {wanted, *(earlier_tokenizers(parent.lineage) if parent else ())}
    for name, one in opened.items():
        if one.corpus.tokenizer_fingerprint not in (allowed if one.role == "old" else {wanted}):
            raise UserError(
                f"corpus '{name}' ({one.corpus.path}) was prepared with another tokenizer "
                f"({one.corpus.tokenizer_fingerprint[:12]}) than {owner} ({str(wanted)[:12]}).{hint}"
            )


def earlier_tokenizers(lineage: lineages.Lineage) -> set[str]:
    """Fingerprints of the tokenizers before the vocabulary was extended: what they cut still means the same."""
    was_extended = any(change.get("operation") == "vocab extend" for change in lineage.changes)
    return {facts["tokenizer"] for facts in lineage.corpora.values()} if was_extended else set()


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


def _resolve_stage(
    recipe: Recipe,
    stage: StageSettings,
    parent: Parent | None,
    config: AnyConfig,
    corpora: dict[str, _Opened],
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
    sources = _sources(recipe, stage, parent, corpora)
    objective = _objective(recipe, stage, sources, corpora)
    models = find_models(
        [*objective.checkpoints(), *([PARENT] if pull else [])],
        read=read,
        config=config,
        tokenizer=parent.tokenizer if parent else next(iter(corpora.values())).corpus.tokenizer_fingerprint,
        sequence_length=recipe.batch.sequence_length,
        where=f"stage '{stage.name}'",
    )
    forward = {model.name: model.flops_per_token for model in models}
    spent = per_token + sum(forward[name] for name in objective.checkpoints())
    updates = max(1, math.ceil(_budget_tokens(stage, spent, speed) / recipe.batch.tokens - 1e-9))
    tokens = updates * recipe.batch.tokens
    try:
        rates = [schedule.rate(u * recipe.batch.tokens, tokens) for u in _sampled(updates)]
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
        pull_sources=[s.to_json() for s in _pull_sources(recipe, stage, pull, parent, corpora)],
        models=models,
        new_rows=_new_rows(stage, parent) if stage.train == "new_rows" else None,
    )


def _objective(
    recipe: Recipe, stage: StageSettings, sources: list[SourceSpec], corpora: dict[str, _Opened]
) -> Objective:
    """The stage's objective. Raises UserError where it cannot be used on the stage's rows."""
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
    except UserError as error:
        raise UserError(f"stage '{stage.name}': {error}") from None
    return objective


def _pull_sources(
    recipe: Recipe, stage: StageSettings, pull: Any, parent: Parent | None, corpora: dict[str, _Opened]
) -> list[SourceSpec]:
    """The sources of the data that a pull weighs by."""
    if pull is None or not pull.mixture:
        return []
    for name in pull.mixture:
        if name not in corpora and name != REPLAY:
            hint = nearest(name, [*corpora, REPLAY])
            raise UserError(f"stage '{stage.name}': pull: no corpus '{name}' under 'corpora'.{hint}")
    return _sources(recipe, stage.model_copy(update={"mixture": pull.mixture}), parent, corpora)


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


def _sources(
    recipe: Recipe, stage: StageSettings, parent: Parent | None, corpora: dict[str, _Opened]
) -> list[SourceSpec]:
    result: list[SourceSpec] = []
    for name, share in sorted(shares(stage.mixture).items()):  # how the file orders them changes nothing
        if name == REPLAY and name not in recipe.corpora:
            assert parent is not None
            if not parent.lineage.stages:
                raise UserError(
                    f"stage '{stage.name}': replay: the data that {parent.path} was trained on are not known; name a "
                    "corpus that stands in for them under 'corpora' and in the mixture"
                )
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
    config = parse_config(resolved.model)
    if isinstance(config, TransformersConfig):
        lines += [f"  {note}" for note in notes(config)]
    if resolved.origin:
        lines.append(f"  began as {resolved.origin.name} ({resolved.origin.model_type}, {resolved.origin.through})")
    if resolved.communication["name"] != "every_update":
        settings = ", ".join(f"{key} {value}" for key, value in resolved.communication.items() if key != "name")
        lines.append(f"  communication {resolved.communication['name']}: {settings}")
    for index, stage in enumerate(resolved.stages):
        mix = ", ".join(f"{s['name']} {s['weight']:.1%}" for s in stage.sources)
        guessed = "by estimate " if rate_is_estimate(resolved, index) else ""
        was = "" if stage.rate_before is None else f" (the model was {guessed}left at {stage.rate_before:.3g})"
        lines.append(f"  stage {stage.name}: {human(stage.tokens, 'tokens')} in {stage.updates} updates of {mix}")
        lines.append(
            f"    {stage.schedule['name']} learning rate: starts at {stage.rate_start:.3g}{was}, "
            f"peak {stage.rate_peak:.3g}, ends at {stage.rate_end:.3g}; {stage.optimizer['name']}, "
            f"state {stage.optimizer_state}"
        )
        if stage.pull:
            settings = ", ".join(f"{key} {value}" for key, value in stage.pull.items() if key != "name")
            lines.append(f"    pulled to the parent by {stage.pull['name']}: {settings}")
        if stage.objective["name"] != "next_token":
            settings = ", ".join(f"{key} {value}" for key, value in stage.objective.items() if key != "name")
            lines.append(f"    objective {stage.objective['name']}: {settings}")
        if stage.new_rows:
            first, stop = stage.new_rows
            lines.append(f"    trains only the rows of the {stop - first} ids from {first} on")
    return "\n".join(lines)


def rate_is_estimate(resolved: Resolved, stage: int) -> bool:
    """Whether the rate before this stage is only estimated: the parent is from elsewhere and nobody stated it."""
    origin, parent = resolved.origin, resolved.parent
    if stage > 0 or origin is None or parent is None:
        return False
    return origin.rate.is_estimate and parent["checkpoint"] == origin.weights


def relative_to(path: Path, base: Path) -> str:
    """`path` as it is best written in a file that lies in `base`."""
    return os.path.relpath(path, base)
