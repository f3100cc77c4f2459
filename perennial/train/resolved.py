"""What a run will do, every value explicit: the content of resolved.json, its hash, and the same in words."""

from __future__ import annotations

from typing import Any, Literal

from perennial.core import lineage as lineages
from perennial.core.amounts import human
from perennial.core.settings import Settings, stable_hash
from perennial.model.foreign import TransformersConfig, notes, parse_config
from perennial.train.other_models import OtherModel
from perennial.train.recipe import BatchSettings, ParallelSettings, SpikeSettings


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
    sequences: int | None = None
    """Rows of an update; None: those of the run's batch."""
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

    def rows_of(self, stage: ResolvedStage) -> int:
        """Rows of an update in the stage."""
        return stage.sequences or self.batch.sequences

    def batch_tokens_of(self, stage: ResolvedStage) -> int:
        """Tokens of an update in the stage."""
        return self.rows_of(stage) * self.batch.sequence_length

    def tokens_after(self, updates: int) -> int:
        """Tokens of the run's first `updates` updates."""
        tokens = 0
        for stage in self.stages:
            made = min(updates, stage.updates)
            tokens, updates = tokens + made * self.batch_tokens_of(stage), updates - made
        return tokens

    @property
    def fewest_rows(self) -> int:
        """Rows of the smallest update of the run."""
        return min(self.rows_of(stage) for stage in self.stages)

    @property
    def through(self) -> str:
        """What computes the model: 'native' code, or 'transformers'."""
        return str(self.model.get("through", "native"))


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
        for added in ("new_rows", "sequences"):  # as before stages could be limited to them
            if stage[added] is None:
                del stage[added]
        for added in ("pull", "pull_sources", "models"):  # as before there were any
            if not stage[added]:
                del stage[added]
    return stable_hash(_without_paths(data))


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
        rows = f" with {stage.sequences} rows" if stage.sequences else ""
        lines.append(f"  stage {stage.name}: {human(stage.tokens, 'tokens')} in {stage.updates} updates{rows} of {mix}")
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
