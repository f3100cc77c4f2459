"""Lineage: what a checkpoint remembers of how it was made, from its first ancestor to now.

Stored as `perennial/lineage.json` inside the checkpoint folder. One `StageRecord` per stage of training, oldest first,
across all runs that led here; the evaluation is that of the last run, before and after. A model that began outside of
Perennial has an `Origin`: what is known of that beginning, and what is only estimated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from perennial.core.errors import UserError
from perennial.core.files import read_json
from perennial.core.settings import Settings, check, raise_problems

FORMAT = 1
STATE_FOLDER = "perennial"
LINEAGE_FILE = "lineage.json"
BRANCH = "anneal"
"""The schedule of a decay branch."""
TASKS_FILE = "tasks.json"
"""Results on tasks, measured after the checkpoint was written: {'tasks': {task: {metric: value}}, ...}."""


class StageRecord(Settings):
    """One stage as it really went; a stage that is still going on is recorded up to its checkpoint."""

    run: str
    stage: str
    recipe_hash: str
    parent: str | None
    """Id of the checkpoint that the stage's run started from; None when it started from random weights."""
    seed: int
    tokens: int
    """Target tokens trained on in this stage."""
    complete: bool
    """False when the checkpoint was taken in the middle of the stage."""
    flops: float
    seconds: float
    """Wall time spent training (forward, backward, update); both include updates that a rollback threw away."""
    sequence_length: int
    batch_tokens: int
    micro_batch: int | None = None
    clip: float | None = 1.0
    document_mask: bool = False
    precision: str
    schedule: dict[str, Any]
    rate_start: float
    rate_peak: float
    rate_end: float
    """Learning rate of the last update that was made."""
    optimizer: dict[str, Any]
    objective: dict[str, Any]
    pull: dict[str, Any] | None = None
    """What drew the weights back to the parent's after every update; None: nothing did."""
    models: list[dict[str, Any]] = []
    """Further checkpoints that the stage read, such as teachers: {'name', 'path', 'checkpoint', ...}."""
    sources: list[dict[str, Any]]
    """SourceSpecs with the `rows`, `tokens` and `epochs` drawn, and the `skipped` draws, which only `rows` counts."""
    new_rows: tuple[int, int] | None = None
    """First and last + 1 of the ids whose rows were all that was trained; None: the whole model was."""
    skipped_rows: list[tuple[int, int]] = []
    """Stretches of rows of the stage passed over after a loss spike."""


class Fact(Settings):
    """A number of a model's past, and how far it can be relied on."""

    value: float
    is_estimate: bool
    """False when somebody who knows has stated it."""
    basis: str
    """Who stated it, or the rule and source that it was estimated by."""


class Origin(Settings):
    """What is known, and what is estimated, of a model that was not trained by Perennial."""

    name: str
    model_type: str
    """As in its config.json."""
    weights: str
    """Id: the first 16 hex digits of the sha256 over the weight files, as for checkpoints."""
    license: str | None = None
    """As the model card states it, else the name of the licence file; None: neither is there."""
    parameters: int
    through: Literal["native", "transformers"]
    """What runs the model."""
    parity: dict[str, Any] | None = None
    """{'max_difference', 'tokens', 'dtype'} of the logits against `transformers`; None: not compared."""
    tokens: Fact
    """Tokens that it was trained on before."""
    peak: Fact
    """The highest learning rate before."""
    rate: Fact
    """The learning rate at which training stopped."""
    flops: Fact
    """Training FLOPs spent before."""


class Lineage(Settings):
    """Everything a continuation needs to know about a checkpoint."""

    format: int = FORMAT
    checkpoint: str
    """Id: the first 16 hex digits of the sha256 over the weight files."""
    stages: list[StageRecord]
    evaluation: dict[str, Any] = {}
    """{'before': {corpus: measures}, 'after': {...}} of the last run; 'base' holds the parent's own numbers."""
    corpora: dict[str, dict[str, Any]] = {}
    """Every corpus ever consumed: name -> {path, fingerprint, tokenizer}; 'stands_in' marks one that was named in the
    place of unknown data of the model's beginning."""
    environment: dict[str, Any] = {}
    origin: Origin | None = None
    """What came before the first stage; None when that began with random weights."""
    changes: list[dict[str, Any]] = []
    """Operations on the model that are not training, oldest first: {'operation': 'vocab extend', ...}."""

    @property
    def tokens(self) -> int:
        """Tokens trained on since the first ancestor, those before the first stage included."""
        return sum(s.tokens for s in self.stages) + (round(self.origin.tokens.value) if self.origin else 0)

    @property
    def flops(self) -> float:
        """Training FLOPs spent since the first ancestor, those before the first stage included."""
        return sum(s.flops for s in self.stages) + (self.origin.flops.value if self.origin else 0.0)

    @property
    def rate(self) -> float:
        """The learning rate at which training of the whole model stopped."""
        if whole := [s for s in self.stages if s.new_rows is None]:
            return whole[-1].rate_end
        return self.origin.rate.value if self.origin else 0.0

    @property
    def is_branch(self) -> bool:
        """Whether this is a decay branch, by the schedule of its last stage: the trunk goes on from before it."""
        return bool(self._branch())

    @property
    def trunk_rate(self) -> float:
        """The learning rate before the decay branch that this is; where training stopped when it is none."""
        branch = self._branch()
        return branch[0].rate_start if branch else self.rate

    @property
    def branch_tokens(self) -> int:
        """Tokens trained on since the trunk was left; 0 when this is no branch."""
        return sum(s.tokens for s in self._branch())

    def _branch(self) -> list[StageRecord]:
        """The last stages with a schedule of a branch, oldest first."""
        whole = [s for s in self.stages if s.new_rows is None]
        number = next((i for i, s in enumerate(reversed(whole)) if s.schedule.get("name") != BRANCH), len(whole))
        return whole[len(whole) - number :]

    @property
    def peak(self) -> float:
        """The highest learning rate that this model ever saw."""
        rates = [s.rate_peak for s in self.stages if s.new_rows is None]
        return max(rates + ([self.origin.peak.value] if self.origin else []), default=0.0)

    def runs(self) -> list[list[StageRecord]]:
        """The stages grouped by run, oldest first."""
        groups: list[list[StageRecord]] = []
        for stage in self.stages:
            if groups and groups[-1][0].run == stage.run and groups[-1][0].recipe_hash == stage.recipe_hash:
                groups[-1].append(stage)
            else:
                groups.append([stage])
        return groups


def has_lineage(checkpoint: Path) -> bool:
    """Whether a folder says how it was made; a model from elsewhere does not."""
    return (checkpoint / STATE_FOLDER / LINEAGE_FILE).is_file()


def read(checkpoint: Path) -> Lineage:
    """The lineage of a checkpoint folder; results on tasks that lie beside it are its evaluation's 'tasks'.

    Raises UserError when it has none or another format.
    """
    path = checkpoint / STATE_FOLDER / LINEAGE_FILE
    if not has_lineage(checkpoint):
        raise UserError(
            f"{checkpoint}: this checkpoint has no lineage ({STATE_FOLDER}/{LINEAGE_FILE}), so its data, learning rate "
            "and compute are unknown."
        )
    data = read_json(path, "lineage")
    if data.get("format") != FORMAT:
        raise UserError(f"{path}: format {data.get('format')!r}; this version of Perennial reads format {FORMAT}")
    lineage, problems = check(Lineage, data)
    raise_problems(problems, str(path))
    assert lineage is not None
    if tasks := _tasks(checkpoint):
        return lineage.model_copy(update={"evaluation": {**lineage.evaluation, "tasks": tasks}})
    return lineage


def _tasks(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / STATE_FOLDER / TASKS_FILE
    if not path.is_file():
        return {}
    data = read_json(path, "file of task results")
    if not isinstance(data, dict) or not isinstance(data.get("tasks"), dict):
        raise UserError(f"{path}: not a file of task results: it has no 'tasks'")
    return dict(data["tasks"])


def checkpoints_of(run: Path) -> list[Path]:
    """The finished checkpoints of a run folder, oldest first."""
    folder = run / "checkpoints"
    found = [p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name))


def newest_checkpoint(path: Path) -> Path:
    """`path` when it is a checkpoint, else the newest checkpoint of the run folder `path`. Raises UserError."""
    if (path / "config.json").is_file() or has_lineage(path):
        return path
    found = checkpoints_of(path)
    if not found:
        what = (
            "no such folder" if not path.exists() else "neither a checkpoint (config.json) nor a run with checkpoints"
        )
        raise UserError(f"{path}: {what}")
    return found[-1]
