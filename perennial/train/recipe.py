"""The recipe: what a run is asked to do, as typed YAML; a whole file is validated and every problem listed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from perennial.core import plugins
from perennial.core.amounts import Amount, Budget, Span, parse
from perennial.core.errors import UserError, nearest
from perennial.core.predictions import Predictions
from perennial.core.settings import Loc, Problem, Settings, check, override, raise_problems, read_yaml
from perennial.model.config import ModelConfig
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


class ParallelSettings(Settings):
    """How the model is spread over processes: decides speed and memory, not what is computed."""

    shard: Literal["auto", "none", "full", "hybrid"] = "auto"
    """'none': every process holds the model (DDP); 'full': each holds a part (FSDP2); 'hybrid': the processes of each
    group of `shard_size` share one copy (HSDP); 'auto': by the size of the model and the memory of a device."""
    shard_size: int | None = Field(default=None, ge=2)
    """Processes that share one copy under 'hybrid'; None: those of one machine."""
    tensor: int = Field(default=1, ge=1)
    """Processes that divide each large matrix between them (tensor parallelism) and read the same rows."""

    @model_validator(mode="after")
    def _consistent(self) -> ParallelSettings:
        if self.shard_size is not None and self.shard != "hybrid":
            raise ValueError(f"shard_size {self.shard_size} belongs to shard: hybrid, not to {self.shard}")
        return self


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
    sequences: int | None = Field(default=None, ge=1)
    """Rows of an update in this stage, at most batch.sequences; None: as many. Fewer at first warm the batch up."""
    optimizer: Any = "adamw"
    optimizer_state: Literal["keep", "reset"] = "keep"
    """Whether the moments of the stage before, or of the parent, are carried on."""
    train: Literal["all", "new_rows"] = "all"
    """'new_rows': only the rows that the parent's last `perennial vocab extend` added; all else stays to the bit."""
    objective: Any = "next_token"
    pull: Any = None
    """What draws the weights back to the parent's after every update: 'l2' or 'fisher', with a strength."""
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


class ParentFacts(Settings):
    """What the user knows of the past of a parent that Perennial did not train; the rest is estimated."""

    tokens: Annotated[Amount, BeforeValidator(lambda value: parse(value, ("tokens",)))] | None = None
    """Tokens that it was trained on."""
    flops: Annotated[Amount, BeforeValidator(lambda value: parse(value, ("flops",)))] | None = None
    """Compute that was spent on that."""
    peak: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Its highest learning rate."""
    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The learning rate at which its training stopped."""

    @field_validator("tokens", "flops")
    @classmethod
    def _some(cls, amount: Amount | None) -> Amount | None:
        return _above_zero(amount)

    @model_validator(mode="after")
    def _ordered(self) -> ParentFacts:
        if self.peak is not None and self.rate is not None and self.rate > self.peak:
            raise ValueError(f"rate {self.rate:g} is above peak {self.peak:g}: training cannot stop above its peak")
        return self


class Recipe(Settings):
    """A complete run as data."""

    name: str
    seed: int = Field(default=0, ge=0)
    parent: str | None = None
    """Checkpoint to start from (or a run folder: its newest); exactly one of `parent` and `model` is given."""
    parent_facts: ParentFacts = ParentFacts()
    """Of a parent that Perennial did not train: what its folder does not say, as far as it is known."""
    model: ModelSettings | None = None
    corpora: dict[str, str] = {}
    """Prepared corpora by name: folder. Paths are relative to the recipe's own folder."""
    stand_ins: list[str] = []
    """Those of the corpora that stand for what the parent was trained on: they count as old data, not as new."""
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
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: 'selective' all but the products of matrices and
    attention, 'full' all but the input of each layer; less memory for more time."""
    parallel: ParallelSettings = ParallelSettings()
    communication: Any = "every_update"
    """How processes with copies of the model keep them together: gradients summed on every update, or 'diloco'."""
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    spikes: SpikeSettings = SpikeSettings()
    tensorboard: bool = False
    """Also write TensorBoard files to the run folder (needs the 'track' extra)."""
    predictions: Predictions | None = None
    """What `perennial plan` foretold of this run; it changes nothing, the report shows it beside what was measured."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = []
        if (self.parent is None) == (self.model is None):
            problems.append("give exactly one of 'parent' (continue a checkpoint) and 'model' (start anew)")
        if self.parent is None and self.parent_facts.model_fields_set:
            problems.append("parent_facts needs a 'parent'")
        problems += [
            f"stand_ins: no corpus '{name}' under 'corpora'.{nearest(name, self.corpora)}"
            for name in self.stand_ins
            if name not in self.corpora
        ]
        if self.batch.micro_batch and self.batch.sequences % self.batch.micro_batch:
            problems.append(
                f"batch.micro_batch {self.batch.micro_batch} does not divide batch.sequences {self.batch.sequences}"
            )
        problems += [
            f"stage '{stage.name}': sequences {stage.sequences} is above batch.sequences, {self.batch.sequences}, "
            "which is the largest batch of the run; raise that"
            for stage in self.stages
            if stage.sequences is not None and stage.sequences > self.batch.sequences
        ]
        stage_names = [s.name for s in self.stages]
        problems += [f"two stages are called '{n}'" for n in sorted(set(stage_names)) if stage_names.count(n) > 1]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def fewest_rows(recipe: Recipe) -> int:
    """Rows of the smallest update of the run."""
    return min(stage.sequences or recipe.batch.sequences for stage in recipe.stages)


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
            if stage.get("pull") is not None:
                problems += plugins.build("pulls", stage["pull"], ("stages", index, "pull"))[1]
            problems += _unknown_corpora(data, stage, index)
    if "communication" in data:
        problems += plugins.build("communications", data["communication"], ("communication",))[1]
    problems += _model_problems(data.get("model"))
    raise_problems(problems, source, lines)
    assert recipe is not None
    return recipe


def _without_parent(schedule: Any) -> Any:
    """The schedule with its 'parent' rates filled or left out, to check the rest before they are known."""
    if not isinstance(schedule, dict):
        return schedule
    return {k: STAND_INS.get(k, v) if v == "parent" else v for k, v in schedule.items()}


STAND_INS = {"start": 0.0, "peak": 1.0, "final": 1e-12}
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
