"""What a law file of one's own says of a checkpoint: what its size reaches anew, and where its numbers are used.

A law of loss by size and tokens tells what a new model of the same size reaches, on the new text alone and on
everything (`retraining`); a law of forgetting tells the old loss where no own updates do. Neither tells the loss on new
text after an update: what a parent is worth there is no part of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from perennial.core.errors import UserError
from perennial.core.plugins import name_of
from perennial.plan.numbers import Number
from perennial.plan.parts import Facts
from perennial.plan.transfer import Estimate
from perennial.scaling.asking import law_of
from perennial.scaling.choosing import Blend
from perennial.scaling.fitting import Fit
from perennial.scaling.table import is_of_runs

OTHER_LEVEL = 0.05
"""A law that is this far off the parent's own loss, and outside its interval, is one of other text.

Assumption: schedules and batches of one's own runs change a loss by less, tokenizers and text by more.
"""
_PARENT, _ALONE, _RETRAINING = "the parent", "a new model on the new text alone", "retraining"
_FORGETTING = {"parameters", "tokens", "replay_share", "start_loss"}


@dataclass(frozen=True)
class LawFile:
    """A law with the name of its file."""

    name: str
    fitted: Fit | Blend

    @property
    def source(self) -> str:
        """'law.json: auto through 12 runs'."""
        form = "auto" if isinstance(self.fitted, Blend) else name_of(self.fitted.law)
        return f"law file {self.name}: {form} through {self.fitted.num_rows} runs"

    @property
    def is_of_size(self) -> bool:
        """Whether it gives the loss of a new model by size and tokens."""
        return is_of_runs(law_of(self.fitted))

    @property
    def is_of_forgetting(self) -> bool:
        """Whether it gives the old loss after an update."""
        return {i.name for i in law_of(self.fitted).inputs} == _FORGETTING

    def loss(self, **inputs: float) -> tuple[Estimate, tuple[str, ...]]:
        """(loss, in what it lies outside the law's runs). Raises UserError where the law must not be asked."""
        read = {i.name for i in law_of(self.fitted).inputs}
        found = self.fitted.predict({name: [value] for name, value in inputs.items() if name in read})
        return Estimate(float(found.mean[0]), float(found.low[0]), float(found.high[0])), tuple(found.warnings)


@dataclass(frozen=True)
class LawSays:
    """What a law file adds to a plan."""

    numbers: tuple[Number, ...] = ()
    retraining: Estimate | None = None
    notes: tuple[str, ...] = ()
    """What a user must not miss."""
    unknown: tuple[str, ...] = ()
    """Why it could not be used for something, a sentence each."""


def asked(law: LawFile | None, facts: Facts, old_before: float | None, share: float, tokens: float) -> LawSays:
    """What the law says of a checkpoint and its update on `tokens` tokens, a `share` of them old.

    old_before: the parent's loss on old text, where it is known.
    """
    if law is None:
        return LawSays()
    if law.is_of_forgetting:
        return LawSays(unknown=_unused_forgetting(law, facts, old_before, share, tokens))
    if law.is_of_size:
        return _of_size(law, facts, old_before, share, tokens)
    read = ", ".join(i.name for i in law_of(law.fitted).inputs)
    return LawSays(
        unknown=(
            f"{law.name} cannot be used for a checkpoint: its law reads {read}, and a plan can ask laws of size and "
            "tokens (`perennial laws fit`) or of forgetting (--form forgetting)",
        )
    )


def forgotten(law: LawFile, facts: Facts, old_before: float, share: float, tokens: float) -> Estimate:
    """The old loss after an update by a law of forgetting. Raises UserError where it must not be asked."""
    inputs = {"parameters": float(facts.parameters), "tokens": tokens, "replay_share": share}
    return law.loss(**inputs, start_loss=old_before)[0]


def _unused_forgetting(
    law: LawFile, facts: Facts, old_before: float | None, share: float, tokens: float
) -> tuple[str, ...]:
    """For what a law of forgetting is not used, and why."""
    lines = [f"{law.name} is a law of forgetting: it tells the old loss, not what retraining reaches"]
    try:
        if old_before is None:
            lines = [f"{law.name} cannot be used: it needs the parent's loss on old text, which is not recorded"]
        else:
            forgotten(law, facts, old_before, share, tokens)
    except UserError as error:
        lines = [f"{law.name} cannot be used for the old loss: {error}"]
    return tuple(lines)


def _of_size(law: LawFile, facts: Facts, old_before: float | None, share: float, tokens: float) -> LawSays:
    """What a law of size and tokens says of the parent, of the new text alone, and of everything."""
    old_unique = sum(text.tokens for text in facts.texts if text.is_old) or facts.parent_tokens
    places = {
        _PARENT: (facts.parent_tokens, old_unique),
        _ALONE: (tokens * (1 - share), facts.fresh_tokens),
        _RETRAINING: (facts.parent_tokens + tokens, facts.fresh_tokens + old_unique),
    }
    said: dict[str, Estimate] = {}
    unknown: list[str] = []
    outside: dict[str, None] = {}
    for what, (seen, unique) in places.items():
        inputs = {"parameters": float(facts.parameters), "tokens": seen, "unique_tokens": min(unique, seen)}
        try:
            said[what], warnings = law.loss(**inputs)
            outside |= dict.fromkeys(f"{law.name}, {what}: {line}" for line in warnings)
        except UserError as error:
            unknown.append(f"{law.name} cannot be used for {what}: {error}")
    level, is_other = _level(said.get(_PARENT), old_before)
    retraining = said.get(_RETRAINING)
    if retraining is not None and is_other:
        unknown.append(f"{law.name} was not used for what retraining reaches: {level}")
        retraining = None
    numbers = [
        Number(f"loss of {what}", round(said[what].mean, 4), "nats/token", "own runs", f"{law.source}; {note}")
        for what, note in ((_PARENT, level), (_ALONE, "of this size and as many tokens, on text such as the law's"))
        if what in said
    ]
    return LawSays(tuple(numbers), retraining, tuple(outside), tuple(unknown))


def _level(parent: Estimate | None, old_before: float | None) -> tuple[str, bool]:
    """How the law's loss for the parent compares with the measured one, and whether it is of other text."""
    if parent is None or old_before is None:
        return "not checked, as the parent's own loss is not known", False
    words = f"{parent.mean:.3f} [{parent.low:.3f}, {parent.high:.3f}] by the law, {old_before:.3f} measured"
    is_inside = parent.low <= old_before <= parent.high
    if is_inside or abs(parent.mean / old_before - 1) <= OTHER_LEVEL:
        return words, False
    return f"{words}, so that it is a law of other text or settings", True
