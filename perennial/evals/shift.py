"""How far new text lies from what a model knows: its loss there against its loss on its own text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

STRONG_SHIFT = 1.25
"""Ratio of the losses on the new and on the old text above which a shift counts as strong.

Assumption: Ibrahim et al. 2024 (arXiv 2403.08763) call Pile -> SlimPajama weak, where a model of the Pile has 2.70 and
2.17 nats per token, a ratio of 1.24; what shifts further than that gets the replay of a strong shift.
"""

_UNITS = {"bits_per_byte": "bits per byte", "nats_per_token": "nats per token"}


class Shift(NamedTuple):
    """A model's loss on the old and on the new text, in the unit in which they are further apart.

    Neither unit serves everywhere: a character of Chinese has three bytes, so a model that knows nothing of it may have
    fewer bits per byte there than on its own English; and a tokenizer that knows nothing of a script cuts it into
    bytes, each of which is easier than a word.
    """

    old: float
    new: float
    unit: str = "bits per byte"
    on_stand_in: bool = False
    """Whether the old text is not what the model was trained on, but what stands for it."""

    @property
    def ratio(self) -> float:
        """New over old."""
        return self.new / self.old

    @property
    def kind(self) -> str:
        """'strong' or 'weak'."""
        return "strong" if self.ratio > STRONG_SHIFT else "weak"


def shift_between(
    losses: Mapping[str, Mapping[str, Any]], old: Collection[str], new: Collection[str], *, on_stand_in: bool = False
) -> Shift:
    """The shift from the corpora `old` to `new`, means over each; losses: corpus -> measures of an evaluation."""

    def mean(names: Collection[str], measure: str) -> float:
        return sum(float(losses[name][measure]) for name in names) / len(names)

    found = [Shift(mean(old, measure), mean(new, measure), unit, on_stand_in) for measure, unit in _UNITS.items()]
    return max(found, key=lambda shift: shift.ratio)
