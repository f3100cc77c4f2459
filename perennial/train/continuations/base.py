"""What a way of continuing is: from what is known of parent, data and budget to the stages of the update.

A continuation decides data shares, schedule and, where its method asks for it, optimizer, objective and what follows
the run; all else stays as the parent was trained. It sees numbers only, no corpora and no weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator

from perennial.core import plugins
from perennial.core.amounts import Amount, human, parse
from perennial.core.errors import UserError
from perennial.core.lineage import Lineage
from perennial.core.settings import Settings
from perennial.evals.shift import Shift
from perennial.schedules.base import level
from perennial.train import origin
from perennial.train.recipe import REPLAY

Share = Annotated[Amount, BeforeValidator(lambda value: parse(value, ("share",)))]
"""A part of the update, of a rate or of the data: '14%'."""

PEAK_EXPONENT = 0.7
"""The peak of the update is the parent's peak x (update tokens / parent tokens)^0.7, at most the parent's.

Assumption: one line through three published recipes: Ibrahim et al. 300B after 300B at 1x; TiC-LM (Li et al. 2025,
arXiv 2504.02107) 1B after 112B at 1/30; Reuse, Don't Retrain (Parmar et al. 2024, arXiv 2407.07263) 300B after 8T
at 1/10.
"""

ANNEAL, TRUNK, UPDATE = "anneal", "trunk", "update"
"""Names of stages: a decay branch, what it branches off, and an update that is neither."""

_FLAT = {"constant": "peak", "wsd": "peak", "wsd_s": "peak", "infinite": "constant"}
"""Schedules with a stretch that can go on for ever, and the setting that is its rate."""


@dataclass(frozen=True)
class Situation:
    """What is known when an update is planned."""

    lineage: Lineage
    budget: Amount
    """Of the whole update: tokens, FLOPs or time."""
    fresh: tuple[str, ...]
    """Names of the new corpora."""
    replay: float
    """Share of old data in every batch."""
    stand_ins: tuple[str, ...] = ()
    """Names of corpora that stand for the old data; empty: what the lineage says was consumed."""
    shift: Shift | None = None
    """The parent's losses on its own and on the new data; None: not measured."""
    peak: float | None = None
    """The highest learning rate that was asked for."""
    parameters: float = 0.0
    batch_tokens: int = 1
    """Tokens per update."""
    batch_rows: int = 1
    """Rows of an update."""
    fresh_tokens: float | None = None
    """Training tokens that the new corpora have; None while they are still raw text."""
    fresh_shares: tuple[float, ...] = ()
    """The share of these tokens that each of the new corpora has; empty while that is not known."""
    optimizer: Any = "adamw"
    """The parent's."""
    has_moments: bool = True
    """Whether the parent's folder holds an optimizer's state that is kept."""
    option: str = "--recipe"
    """What the continuation was chosen with, for errors."""

    @property
    def tokens(self) -> float:
        """The budget in tokens; of a time, by the speed of the parent's stages; NaN when that is not known."""
        if self.budget.unit == "tokens":
            return self.budget.value
        spent = spent_on(self.lineage)[self.budget.unit]
        return self.lineage.tokens * self.budget.value / spent if spent else math.nan

    @property
    def epochs(self) -> float | None:
        """Passes over the new corpus that is repeated most, as they are drawn alike; None while that is not known."""
        if not self.fresh_tokens or math.isnan(self.tokens):
            return None
        shortest = min(self.fresh_shares, default=1 / len(self.fresh)) * self.fresh_tokens
        return self.tokens * (1 - self.replay) / len(self.fresh) / shortest

    def mixture(self, replay: float | None = None, fresh: Sequence[str] | None = None) -> dict[str, float]:
        """Shares of the new corpora and of the old data; `replay`, `fresh`: others than the situation's."""
        share = self.replay if replay is None else replay
        names = self.fresh if fresh is None else tuple(fresh)
        shares = {name: (1 - share) / len(names) for name in names}
        if share == 0:
            return shares
        if self.stand_ins:
            return {**shares, **{name: share / len(self.stand_ins) for name in self.stand_ins}}
        return {**shares, REPLAY: share}

    def split(self, *shares: float) -> list[str]:
        """The budget in parts, as texts; of tokens in whole updates, so that the parts add up to what one would be."""
        if self.budget.unit != "tokens":
            return [str(Amount(self.budget.value * share, self.budget.unit)) for share in shares]
        updates = math.ceil(self.budget.value / self.batch_tokens - 1e-9)
        if updates < len(shares):
            raise UserError(
                f"--tokens {self.budget}: {updates} updates of {self.batch_tokens} tokens are too few for the "
                f"{len(shares)} stages of this recipe; raise it, or lower the batch with --set batch.sequences=N"
            )
        ends = [round(updates * sum(shares[: i + 1])) for i in range(len(shares))]
        ends = [min(max(end, i + 1), updates - len(shares) + i + 1) for i, end in enumerate(ends)]
        parts = [end - before for end, before in zip(ends, [0, *ends], strict=False)]
        return [str(Amount(float(part * self.batch_tokens), "tokens")) for part in parts]


@dataclass(frozen=True)
class Planned:
    """The stages of an update, and why they are so."""

    stages: list[dict[str, Any]]
    """As in a recipe; optimizer, its state and objective may be left to the parent's manner."""
    reasons: list[str] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    """Settings of the recipe's `evaluation` that the way needs to be seen at work."""


@dataclass(frozen=True)
class Arrangement:
    """How the new text is put in order before it is trained on."""

    order: str
    """'given' (as named), 'easy' (the parent's likeliest first) or 'hard' (last)."""
    parts: int
    """Parts that a single corpus is cut into, unless the order is the given one."""


class Continuation(Settings, ABC):
    """A named way of continuing; its fields are what `--recipe '{name: NAME, FIELD: VALUE}'` may change."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}]
    USES_PEAK: ClassVar[bool] = False
    """Whether a peak learning rate can be asked for."""
    ON_TRUNK: ClassVar[bool] = False
    """Whether it goes on from before a decay branch, where that checkpoint is still there."""
    SELECTS: ClassVar[bool] = False
    """Whether it takes only a part of the new text, `kept_tokens` of each corpus."""
    AVERAGES: ClassVar[bool] = False
    """Whether the finished run is averaged with its parent."""

    @abstractmethod
    def plan(self, situation: Situation) -> Planned:
        """The stages. Raises UserError when the situation does not allow this way of continuing."""

    def kept_tokens(self, situation: Situation) -> float | None:
        """Tokens of each new corpus to keep, of the documents that the parent finds likeliest; None: all of them."""
        return None

    def arrangement(self) -> Arrangement | None:
        """How the new text is put in order, a stage for each corpus or part; None: it is all drawn from at once."""
        return None


def stage(name: str, budget: str, mixture: dict[str, float], schedule: dict[str, Any], **rest: Any) -> dict[str, Any]:
    """A stage of a recipe, its settings in the order in which they are read."""
    return {"name": name, "budget": budget, "mixture": mixture, "schedule": schedule, **rest}


def spent_on(lineage: Lineage) -> dict[str, float]:
    """Tokens, FLOPs and seconds that the parent has cost.

    The seconds of a model that began elsewhere are those that its FLOPs would have taken in the stages that are known.
    """
    seconds = sum(s.seconds for s in lineage.stages)
    if lineage.origin and lineage.stages:
        seconds *= lineage.flops / sum(s.flops for s in lineage.stages)
    return {"tokens": lineage.tokens, "flops": lineage.flops, "seconds": seconds}


def peak_by_budget(situation: Situation) -> tuple[float, str]:
    """The rate to re-warm to, by the size of the update against the parent's, and why."""
    lineage, amount = situation.lineage, situation.budget
    spent = spent_on(lineage)[amount.unit]
    ratio = min(1.0, amount.value / spent)
    least = lineage.rate if lineage.origin is None else max(lineage.rate, lineage.origin.rate.value)
    reason = (
        f"peak: the parent's {lineage.peak:.3g} x (update / parent)^{PEAK_EXPONENT}, "
        f"{human(amount.value)} / {human(spent, amount.unit)}, not below where it was left"
        + (f" before Perennial ({least:.3g})" if lineage.origin else "")
    )
    return max(least, lineage.peak * ratio**PEAK_EXPONENT), reason


def wanted_peak(situation: Situation) -> tuple[float, list[str]]:
    """The peak that was asked for, else the one by the budget, with the reason."""
    if situation.peak is not None:
        return situation.peak, []
    peak, reason = peak_by_budget(situation)
    return peak, [reason]


def stands_on_trunk(lineage: Lineage) -> bool:
    """Whether training stopped at a rate that can go on for ever: the flat stretch of such a schedule."""
    whole = [s for s in lineage.stages if s.new_rows is None]
    if not whole or whole[-1].schedule.get("name") not in _FLAT:
        return False
    schedule, problems = plugins.build("schedules", whole[-1].schedule)
    if problems:
        return False  # written by another version
    flat = level(getattr(schedule, _FLAT[plugins.name_of(schedule)]), schedule.peak)
    return math.isclose(whole[-1].rate_end, flat, rel_tol=1e-6)


def trunk_rate(situation: Situation) -> float | None:
    """The rate of the trunk that the parent stands on, or was branched off; None when there is none to go back to."""
    lineage = situation.lineage
    if situation.peak is None and (lineage.is_branch or stands_on_trunk(lineage)):
        return lineage.trunk_rate
    return None


def along_trunk(situation: Situation, rate: float, warmup: Amount) -> tuple[dict[str, Any], str]:
    """The schedule of a trunk that goes on at `rate`, and why; a decayed branch rises to it over `warmup`."""
    if not situation.lineage.is_branch:
        return {"name": "constant", "peak": rate}, f"the trunk goes on at {rate:.3g}, where the parent was left"
    schedule = {"name": "constant", "start": "parent", "peak": rate, "warmup": str(warmup)}
    return schedule, f"the parent is a decayed branch; back to its trunk's {rate:.3g} over {warmup}"


def left_at(lineage: Lineage) -> str:
    """Where the parent was left, in words."""
    return f"{lineage.rate:.3g}, where the parent was left{origin.mark_of_rate(lineage)}"


def check_not_zero(situation: Situation, name: str) -> None:
    """Raises UserError for a parent that was decayed to nothing, from where no rate can be kept."""
    if situation.lineage.rate == 0:
        raise UserError(
            f"{situation.option} {name}: the parent was decayed to a learning rate of 0; use rewarm, which raises it"
        )
