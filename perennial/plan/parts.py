"""What a plan is made of: facts, a choice, the recipe drafted for it, outlooks, costs, alternatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from perennial.core.amounts import human, human_seconds
from perennial.plan.budgets import Budget
from perennial.plan.numbers import Kind, Number
from perennial.plan.transfer import Estimate


@dataclass(frozen=True)
class Text:
    """A corpus as a plan sees it."""

    name: str
    tokens: float
    """Unique training tokens."""
    is_old: bool
    basis: str
    """How they were counted."""
    is_estimate: bool = False


@dataclass(frozen=True)
class Facts:
    """What is known before anything is chosen."""

    model: str
    """The checkpoint, or 'none'."""
    parameters: int
    flops_per_token: float
    texts: tuple[Text, ...]
    parent_tokens: float
    parent_flops: float
    past_is_estimate: bool
    old_losses: Mapping[str, float]
    """The parent's own losses by old corpus, as its lineage has them."""
    batch_tokens: int
    checkpoint: str | None = None
    """Id of the checkpoint."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of the prepared corpora."""
    old_measured_on: Mapping[str, int] = field(default_factory=dict)
    """Validation tokens that each of the old losses was measured on."""

    @property
    def fresh_tokens(self) -> float:
        """Unique tokens of the new text."""
        return sum(text.tokens for text in self.texts if not text.is_old)

    @property
    def replayable_tokens(self) -> float:
        """Different tokens of old text that there are to draw: no more than were seen, or were named."""
        return min(sum(text.tokens for text in self.texts if text.is_old), self.parent_tokens)

    @property
    def old_before(self) -> float | None:
        """Mean of the parent's losses on old text; None when they are not known."""
        return sum(self.old_losses.values()) / len(self.old_losses) if self.old_losses else None


@dataclass(frozen=True)
class Choice:
    """What the planner decides; all else follows from it."""

    tokens: float
    share: float | None = None
    """Of old text; None: as `continue` would."""
    peak_factor: float = 1.0
    """On the peak learning rate of the rule."""
    how: str | None = None
    """Name of the continuation; None: as `continue` would."""
    tokens_bound: str = ""
    """What keeps the tokens below what the budget pays for; empty: nothing."""
    share_bound: str = ""
    """What keeps the share of old text below what was best; empty: nothing."""


@dataclass(frozen=True)
class Stage:
    """What of a drafted stage a plan shows."""

    name: str
    tokens: int
    updates: int
    schedule: str
    warmup_tokens: float
    rate_start: float
    rate_peak: float
    rate_end: float
    optimizer: str
    weight_decay: float | None
    """Of matrices; None: the optimizer has none."""
    epochs: Mapping[str, float]
    """Passes over each corpus."""
    drawn: Mapping[str, float]
    """Tokens of each corpus."""


@dataclass(frozen=True)
class Draft:
    """A recipe for a choice, worked out."""

    recipe: dict[str, Any]
    header: str
    """The reasons as comments, for the top of the file."""
    command: str
    """The same as a command line."""
    reasons: tuple[str, ...]
    continuation: str
    share: float
    share_reason: str
    peak_reason: str
    stages: tuple[Stage, ...]
    flops: float
    batch: str
    evaluated_tokens: float
    """Tokens of all evaluations together."""
    memory_bytes: int | None
    memory_fits: bool | None
    measured_on: Mapping[str, int] = field(default_factory=dict)
    """Validation tokens of each corpus in one evaluation, where the text is prepared."""
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """The recipe with every value explicit, as in resolved.json; empty where text is not prepared."""

    @property
    def tokens(self) -> int:
        """Of all stages."""
        return sum(stage.tokens for stage in self.stages)


Drafter = Callable[[Choice], Draft]
"""Makes a recipe of a choice. Raises UserError when there is none."""


@dataclass(frozen=True)
class Outlook:
    """Predicted losses of one choice; None where the data cannot tell."""

    share: float
    tokens: float
    new: Estimate | None
    old: Estimate | None
    new_change: Estimate | None = None
    """Relative, over an update without old text, where the loss itself cannot be told."""
    old_change: Estimate | None = None
    """Relative, over the parent's loss, where that is not known."""

    @property
    def average(self) -> float | None:
        """Mean of old and new loss."""
        return (self.new.mean + self.old.mean) / 2 if self.new and self.old else None


@dataclass(frozen=True)
class Cost:
    """What a choice costs."""

    tokens: float
    flops: float
    hours: float
    device: str
    energy_kwh: float | None
    money: float | None


@dataclass(frozen=True)
class Alternative:
    """Another choice, what it would bring and how to make it."""

    name: str
    why: str
    command: str
    outlook: Outlook
    cost: Cost


@dataclass(frozen=True)
class Plan:
    """A recipe, what to expect of it, and where every number is from."""

    facts: Facts
    budget: Budget
    draft: Draft
    outlook: Outlook
    curve: tuple[Outlook, ...]
    """Over the shares of `published.SHARES`."""
    best_share: float | None
    """Of the curve, by the mean of old and new loss; None when the losses cannot be told."""
    cost: Cost
    retraining: Cost
    """From random weights on everything, for about the same result."""
    retraining_loss: Estimate | None
    """What that reaches; None for a new model, and where no law can tell."""
    alternatives: tuple[Alternative, ...]
    numbers: tuple[Number, ...]
    warnings: tuple[str, ...]
    unknown: tuple[str, ...]
    """What the data cannot tell, and why."""

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "model": self.facts.model,
            "parameters": self.facts.parameters,
            "corpora": [asdict(text) for text in self.facts.texts],
            "budget": {"text": self.budget.text, "device": self.budget.device.name, "devices": self.budget.count},
            "recipe": self.draft.recipe,
            "command": self.draft.command,
            "continuation": self.draft.continuation,
            "stages": [asdict(stage) for stage in self.draft.stages],
            "share": self.draft.share,
            "outlook": asdict(self.outlook),
            "curve": [asdict(outlook) for outlook in self.curve],
            "best_share": self.best_share,
            "cost": asdict(self.cost),
            "memory_bytes": self.draft.memory_bytes,
            "memory_fits": self.draft.memory_fits,
            "retraining": asdict(self.retraining),
            "retraining_loss": asdict(self.retraining_loss) if self.retraining_loss else None,
            "alternatives": [asdict(alternative) for alternative in self.alternatives],
            "numbers": [number.to_json() for number in self.numbers],
            "warnings": list(self.warnings),
            "unknown": list(self.unknown),
            "reasons": list(self.draft.reasons),
        }


@dataclass(frozen=True)
class NewModel:
    """A new model in the place of a checkpoint."""

    loss_of: Callable[[float], Estimate | None]
    """Of tokens; None where the law does not reach."""
    kind: Kind
    source: str
    """Where the loss is from."""
    size_source: str
    others: tuple[tuple[str, str, Estimate | None, float, float, str], ...] = ()
    """Other sizes: (name, why, loss, tokens, FLOPs, command)."""


def describe_cost(cost: Cost) -> str:
    """'1.2e18 FLOPs, 20M tokens, 3 h 12 min on 1 x H200'."""
    words = (
        f"{cost.flops:.3g} FLOPs, {human(cost.tokens, 'tokens')}, {human_seconds(cost.hours * 3600)} on {cost.device}"
    )
    if cost.energy_kwh is not None:
        words += f", {cost.energy_kwh:.3g} kWh"
    return words + (f", ${cost.money:.2f}" if cost.money is not None else "")
