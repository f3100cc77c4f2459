"""The recipe: what a run is asked to do, as typed YAML, and its resolution into one explicit, hashed plan.

`read` validates a whole file and lists every problem with its line. `resolve` opens the corpora and the parent's
lineage and turns amounts, presets and `replay` into plain numbers; the result is `resolved.json`, the only thing that
the loop reads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from perennial.core import lineage as lineages
from perennial.core import plugins
from perennial.core.amounts import Amount, Budget, Span, human, parse
from perennial.core.errors import UserError, nearest
from perennial.core.settings import Loc, Problem, Settings, check, override, raise_problems, read_yaml, stable_hash
from perennial.data.corpus import Corpus
from perennial.data.mixture import StageOrder
from perennial.data.replay import SourceSpec, replay_sources
from perennial.model.config import ModelConfig
from perennial.model.cost import flops_per_token
from perennial.model.presets import PRESETS, shape

REPLAY = "replay"
"""The name under which a mixture asks for what the parent consumed."""


_AmountOrNone = TypeVar("_AmountOrNone", Amount, Amount | None)


def _above_zero(amount: _AmountOrNone, otherwise: str = "") -> _AmountOrNone:
    if amount is not None and amount.value == 0:
        raise ValueError(f"'{amount}' must be above 0{otherwise}")
    return amount


class BatchSettings(Settings):
    """How many tokens one update sees, and how they are cut."""

    sequences: int = Field(default=16, ge=1)
    """Rows per update, over all processes."""
    sequence_length: int = Field(default=256, ge=2)
    """Target tokens per row."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Rows per forward pass on one process; None: all of them at once."""

    @property
    def tokens(self) -> int:
        """Tokens per update."""
        return self.sequences * self.sequence_length


class EvaluationSettings(Settings):
    """When and on how much text the validation losses are measured."""

    every: Span | None = Amount(0.25, "share")
    """Also between start and end: after each such stretch of the run; None: only before, at stage ends and after."""
    tokens: Span = Amount(65536, "tokens")
    """Most validation tokens per corpus; '100%' means all."""
    corpora: dict[str, str] = {}
    """Further prepared corpora to measure, name: path; the run's own and the parent's are always measured."""

    @field_validator("every")
    @classmethod
    def _some(cls, every: Amount | None) -> Amount | None:
        return _above_zero(every, "; null: only before, at stage ends and after")

    @field_validator("tokens")
    @classmethod
    def _some_or_all(cls, tokens: Amount) -> Amount:
        if tokens.unit == "share" and tokens.value != 1:
            raise ValueError(f"'{tokens}': give tokens ('65536 tokens'), or '100%' for all")
        return _above_zero(tokens)


class CheckpointSettings(Settings):
    """When the run is saved and how many checkpoints are kept."""

    every: Span | None = Amount(0.25, "share")
    """After each such stretch of the run; the end of every stage is always saved."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints to keep; ends of stages are kept as well."""

    @field_validator("every")
    @classmethod
    def _some(cls, every: Amount | None) -> Amount | None:
        return _above_zero(every, "; null: at the ends of stages only")


class SpikeSettings(Settings):
    """What to do when the loss jumps far above its recent values."""

    action: Literal["off", "warn", "rollback"] = "warn"
    """'rollback' returns to the last checkpoint and passes over the rows up to the spike."""
    sigmas: float = Field(default=8.0, gt=0)
    """A spike is this many robust standard deviations above the median of the recent losses ..."""
    rise: float = Field(default=0.5, gt=0)
    """... and at least this many nats above it."""
    window: int = Field(default=64, ge=8)
    """Updates that count as recent."""
    max_rollbacks: int = Field(default=3, ge=1)


class ModelSettings(Settings):
    """A new model: a preset, or every dimension by itself (then without `preset`)."""

    preset: str | None = None
    options: dict[str, Any] = {}
    """Fields of the model configuration that differ from the preset, or all of them without one."""


class StageSettings(Settings):
    """One stretch of training with its own data, schedule, optimizer and objective."""

    name: str
    budget: Budget
    """Tokens ('2B tokens'), compute ('1e18 FLOPs') or time ('3 h', measured at the start and then fixed)."""
    mixture: dict[str, float | str]
    """Corpus name: share ('95%') or relative weight (19). 'replay' stands for what the parent consumed."""
    schedule: Any
    optimizer: Any = "adamw"
    optimizer_state: Literal["keep", "reset"] = "keep"
    """Whether the moments of the stage before, or of the parent, are carried on."""
    objective: Any = "next_token"
    surgery: list[Any] = []
    max_epochs: float = Field(default=4.0, gt=0)
    """Most passes over any corpus; asking for more is an error. Muennighoff et al. 2023 (arXiv 2305.16264): up to 4."""

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not name or not all(c.isalnum() or c in "-_." for c in name):
            raise ValueError(f"{name!r}: use letters, digits, '-', '_' and '.'")
        return name

    @field_validator("budget")
    @classmethod
    def _something(cls, budget: Amount) -> Amount:
        return _above_zero(budget)

    @field_validator("surgery")
    @classmethod
    def _no_operators_yet(cls, surgery: list[Any]) -> list[Any]:
        if surgery:
            raise ValueError("this version has no surgery operators; leave the list empty")
        return surgery

    @field_validator("mixture")
    @classmethod
    def _shares(cls, mixture: dict[str, float | str]) -> dict[str, float | str]:
        shares(mixture)
        return mixture


class Recipe(Settings):
    """A complete run as data."""

    name: str
    seed: int = Field(default=0, ge=0)
    parent: str | None = None
    """Checkpoint to start from (or a run folder: its newest); exactly one of `parent` and `model` is given."""
    model: ModelSettings | None = None
    corpora: dict[str, str] = {}
    """Prepared corpora by name: folder. Paths are relative to the recipe's own folder."""
    moved: dict[str, str] = {}
    """Where the parent's corpora lie now, when not where the lineage says: name: folder."""
    stages: list[StageSettings] = Field(min_length=1)
    batch: BatchSettings = BatchSettings()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 means autocast with fp32 weights; 'auto' takes bf16 where the machine multiplies it natively."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm; None: no clipping."""
    document_mask: bool = False
    """True: attention never crosses a document's border."""
    compile: bool = False
    """Compile the model with torch.compile; pays off only in runs of tens of minutes."""
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    spikes: SpikeSettings = SpikeSettings()
    tensorboard: bool = False
    """Also write TensorBoard files to the run folder (needs the 'track' extra)."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = []
        if (self.parent is None) == (self.model is None):
            problems.append("give exactly one of 'parent' (continue a checkpoint) and 'model' (start anew)")
        if self.batch.micro_batch and self.batch.sequences % self.batch.micro_batch:
            problems.append(
                f"batch.micro_batch {self.batch.micro_batch} does not divide batch.sequences {self.batch.sequences}"
            )
        stage_names = [s.name for s in self.stages]
        problems += [f"two stages are called '{n}'" for n in sorted(set(stage_names)) if stage_names.count(n) > 1]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def shares(mixture: Mapping[str, float | str]) -> dict[str, float]:
    """Mixture entries as shares that add up to 1. ValueError for mixed kinds, or percentages that do not make 100%."""
    if not mixture:
        raise ValueError("a mixture needs at least one corpus")
    texts = {k: v for k, v in mixture.items() if isinstance(v, str)}
    if texts and len(texts) != len(mixture):
        raise ValueError("give shares ('95%') for all corpora of a mixture or weights (19) for all, not both")
    values = {k: parse(v, ("share",)).value for k, v in texts.items()} if texts else dict(mixture)
    total = sum(float(v) for v in values.values())
    if any(float(v) <= 0 or not math.isfinite(float(v)) for v in values.values()):
        raise ValueError("every share must be above 0; leave a corpus out instead of giving it 0")
    if texts and abs(total - 1) > 1e-6:
        raise ValueError(f"the shares add up to {total:.4%}, not 100%")
    return {k: float(v) / total for k, v in values.items()}


def read(path: Path, assignments: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file with `key=value` overrides applied. Raises one UserError that lists every problem."""
    data, lines = read_yaml(path)
    return parse_recipe(override(data, assignments or []), source=str(path), lines=lines)


def parse_recipe(data: dict[str, Any], *, source: str = "recipe", lines: Mapping[Loc, int] | None = None) -> Recipe:
    """Validates recipe data, its components included. Raises one UserError that lists every problem."""
    recipe, problems = check(Recipe, data)
    stages = data.get("stages")
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        if isinstance(stage, dict):
            for key, kind in (("schedule", "schedules"), ("optimizer", "optimizers"), ("objective", "objectives")):
                if key in stage:
                    given = _without_parent(stage[key]) if key == "schedule" else stage[key]
                    problems += plugins.build(kind, given, ("stages", index, key))[1]
            problems += _unknown_corpora(data, stage, index)
    problems += _model_problems(data.get("model"))
    raise_problems(problems, source, lines)
    assert recipe is not None
    return recipe


def _without_parent(schedule: Any) -> Any:
    """The schedule with its 'parent' rates filled or left out, to check the rest before they are known."""
    if not isinstance(schedule, dict):
        return schedule
    return {k: _STAND_INS.get(k, v) if v == "parent" else v for k, v in schedule.items()}


_STAND_INS = {"start": 0.0, "peak": 1.0, "final": 1e-12}
"""Rates that may be 'parent', each with a value that no other check of a schedule objects to."""


def _model_problems(model: Any) -> list[Problem]:
    """What is wrong with a new model's shape, as far as it can be told before the vocabulary is known."""
    preset, options = (model.get("preset"), model.get("options", {})) if isinstance(model, dict) else (None, None)
    if not isinstance(model, dict) or not isinstance(options, dict) or not isinstance(preset, str | None):
        return []  # not there, or a problem of the types around it
    fixed: dict[str, Any] = {}
    if preset is not None:
        try:
            fixed = shape(preset)
        except UserError as error:
            return [Problem(("model", "preset"), str(error))]
        if "heads" in options:
            del fixed["kv_heads"]  # the preset's need not fit, and may follow from the heads
    if not fixed and not options:
        return [Problem(("model",), f"give a preset ({', '.join(PRESETS)}), or the dimensions as 'options'")]
    return check(ModelConfig, {"vocabulary_size": 1, **fixed, **options}, ("model", "options"))[1]


def _unknown_corpora(data: dict[str, Any], stage: dict[str, Any], index: int) -> list[Problem]:
    corpora, mixture = data.get("corpora", {}), stage.get("mixture", {})
    if not isinstance(corpora, dict) or not isinstance(mixture, dict):
        return []
    allowed = [*corpora, REPLAY]
    problems = [
        Problem(("stages", index, "mixture", name), f"no corpus '{name}' under 'corpora'.{nearest(str(name), allowed)}")
        for name in mixture
        if name not in allowed
    ]
    if REPLAY in mixture and data.get("parent") is None and REPLAY not in corpora:
        problems.append(
            Problem(("stages", index, "mixture", REPLAY), "replay needs a 'parent' whose lineage says what it consumed")
        )
    return problems


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
        stages.append(_resolve_stage(recipe, stage, parent, corpora, per_token, speed, before))
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
) -> ResolvedStage:
    updates = max(1, math.ceil(_budget_tokens(stage, per_token, speed) / recipe.batch.tokens - 1e-9))
    tokens = updates * recipe.batch.tokens
    schedule, problems = plugins.build("schedules", _with_parent_rates(stage, parent, before))
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


def _with_parent_rates(stage: StageSettings, parent: Parent | None, before: float | None) -> Any:
    if not isinstance(stage.schedule, dict):
        return stage.schedule
    values = {"peak": parent.lineage.peak if parent else before}
    result = {}
    for key, value in stage.schedule.items():
        if value == "parent" and key in _STAND_INS:
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
