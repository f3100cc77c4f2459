"""Fill in what was cut out of a text: the mixture of denoisers of UL2, for a causal model.

Formula: a row becomes  separator, mode, text with every cut-out span replaced by a sentinel <0>, <1>, ..., then each
    sentinel again with its span, and a last sentinel, separator.  Of a denoiser with span length m and share r: of L
    tokens of text n = round(r L) are cut out, in s = max(1, round(n / m)) spans whose lengths, and the gaps between
    them, are a random partition. Without a span length: a prefix, and its last r L tokens to go on with (no sentinels).
    total = sum over what is filled in (sentinels included) of -ln p(token | row before it). L is the most for which
    this fits into a row; the row's other tokens are left out.
Source: Tay et al. 2022, "UL2: Unifying Language Learning Paradigms", arXiv 2205.05131, section 3.1 (R, S and X
    denoisers, mode tokens); Tay et al. 2022, "Transcending Scaling Laws with 0.1% Extra Compute", arXiv 2210.11399,
    section 3 (UL2R: some thousands of updates behind a causal model's training; half S, a quarter each R and X); the
    partition: Raffel et al. 2019, arXiv 1910.10683, section 3.1.4 (spans of a given mean length).
Differs: attention stays causal over the text too; mode and sentinels are plain text ('[R]', '<0>'), cut by the
    tokenizer as it comes, so that no vocabulary has to be changed - where they are tokens of it (`perennial vocab
    extend`), they take one id each; rows cross documents, as they do without denoising.
Limits: what falls off the end of a row is lost for this epoch: 5 to 30 % of it, by share and span length, and more
    where a sentinel is several ids; needs document_mask: false. Only what is filled in counts, so that an update has
    fewer targets than tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from perennial.core.errors import UserError
from perennial.core.settings import Settings
from perennial.objectives.base import IGNORED, StageData
from perennial.objectives.next_token import NextToken

if TYPE_CHECKING:
    from perennial.data.loader import Arrangement, Batch
    from perennial.data.mixture import Rows

Ids = NDArray[np.int64]


class Denoiser(Settings):
    """One way to cut a text."""

    mode: str
    """Text at the beginning of the row that tells the model which kind it is."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Its share of the rows, relative to the others'."""
    corrupted: Annotated[float, Field(gt=0, lt=1)]
    """Share of the text that is cut out."""
    span: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Mean length of a span in tokens; None: the end of the text, in one piece."""


UL2R = (
    Denoiser(mode="[S]", weight=0.5, corrupted=0.25),
    Denoiser(mode="[R]", weight=0.125, corrupted=0.15, span=3),
    Denoiser(mode="[R]", weight=0.125, corrupted=0.15, span=8),
    Denoiser(mode="[X]", weight=0.0625, corrupted=0.5, span=3),
    Denoiser(mode="[X]", weight=0.0625, corrupted=0.5, span=8),
    Denoiser(mode="[X]", weight=0.0625, corrupted=0.15, span=64),
    Denoiser(mode="[X]", weight=0.0625, corrupted=0.5, span=64),
)
"""The seven denoisers of UL2, weighed as in UL2R."""


class Denoising(NextToken):
    """Next tokens of rows that were cut; validation is measured on plain text as ever."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {},
        {"share": 0.5, "z_loss": 1e-3},
        {"denoisers": [{"mode": "", "weight": 1, "corrupted": 0.3, "span": 2}], "sentinel": "<{n}>"},
    ]

    denoisers: Annotated[tuple[Denoiser, ...], Field(min_length=1)] = UL2R
    """What is done to a row; drawn for each by weight."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the rows that are cut; the others are plain text to be continued."""
    sentinel: str = "<{n}>"
    """Text that stands for span n, counted from 0."""

    @field_validator("sentinel")
    @classmethod
    def _numbered(cls, sentinel: str) -> str:
        if "{n}" not in sentinel:
            raise ValueError(f"{sentinel!r} must hold '{{n}}', the number of the span")
        return sentinel

    def check(self, stage: StageData) -> None:
        """Raises UserError where rows are too short, or attention may not cross documents."""
        if stage.document_mask:
            raise UserError(
                "objective denoising: what is filled in stands behind the whole row, which document_mask would hide "
                "from it; set document_mask: false"
            )
        self._cuts(stage)

    def arrangement(self, stage: StageData) -> Arrangement | None:
        """Cuts each row by a denoiser that depends on the stage's seed and the row's number, as do the cuts."""
        return _Arrangement(
            stage.seed, stage.corpora[0].separator_id, self._cuts(stage), [d.weight for d in self.denoisers], self.share
        )

    def _cuts(self, stage: StageData) -> list[_Cut]:
        """How much text each denoiser takes for a row, and the ids that it adds."""
        tokenizer, length = stage.tokenizer().encoder(), stage.sequence_length
        names = [self.sentinel.replace("{n}", str(number)) for number in range(length // 2 + 2)]
        encoded = [np.array(ids.ids, np.int64) for ids in tokenizer.encode_batch(names, add_special_tokens=False)]
        return [
            _cut(
                denoiser,
                np.array(tokenizer.encode(denoiser.mode, add_special_tokens=False).ids, np.int64),
                encoded,
                length,
            )
            for denoiser in self.denoisers
        ]


@dataclass(frozen=True)
class _Cut:
    """A denoiser for rows of one length."""

    mode: Ids
    sentinels: list[Ids]
    """One for each span and one for the end; none where the end of the text is cut off in one piece."""
    taken: int
    """Tokens of text."""
    cut_out: int
    """How many of them."""


def _cut(denoiser: Denoiser, mode: Ids, sentinels: Sequence[Ids], length: int) -> _Cut:
    """The longest text of which everything fits into a row of `length` targets. Raises UserError when there is none."""
    costs = np.cumsum([0, *(len(sentinel) for sentinel in sentinels)])
    for taken in range(length, 1, -1):
        cut_out = min(max(1, round(denoiser.corrupted * taken)), taken - 1)
        spans = 0
        if denoiser.span is not None:
            spans = min(max(1, round(cut_out / denoiser.span)), cut_out, taken - cut_out)
        marks = int(costs[spans] + costs[spans + 1]) if spans else 0
        if len(mode) + taken + marks + 1 <= length:
            return _Cut(mode, list(sentinels[: spans + 1]) if spans else [], taken, cut_out)
    raise UserError(
        f"objective denoising: rows of {length} tokens (batch.sequence_length) are too short for the denoiser "
        f"'{denoiser.mode}' of {denoiser.corrupted:.0%} in spans of {denoiser.span or 'one piece'}"
    )


class _Arrangement:
    """Rows as read to rows that were cut."""

    def __init__(
        self, seed: int, separator_id: int, cuts: Sequence[_Cut], weights: Sequence[float], share: float
    ) -> None:
        self._seed, self._separator_id, self._cuts, self._share = seed, separator_id, cuts, share
        self._upto = np.cumsum(weights) / math.fsum(weights)

    def __call__(self, batch: Batch, rows: Rows, first_row: int) -> Batch:
        """The batch, row by row; inputs and targets are written anew in their place."""
        for number in range(len(batch.targets)):
            draws = _Draws(self._seed, first_row + number)
            if draws.number() >= self._share:
                continue
            kind = int(np.searchsorted(self._upto, draws.number(), side="right"))
            cut = self._cuts[min(kind, len(self._cuts) - 1)]
            before, filled_in = _divided(batch.targets[number, : cut.taken], cut, draws)
            self._write(batch.inputs[number], batch.targets[number], before, filled_in)
        return replace(batch, segments=None)

    def _write(self, inputs: Ids, targets: Ids, before: Ids, filled_in: Ids) -> None:
        """A row of what is given, which does not count, and what is to be filled in, which does."""
        given, end = len(before), len(before) + len(filled_in) + 1
        inputs[:], targets[:] = self._separator_id, IGNORED
        inputs[1 : given + 1] = before
        inputs[given + 1 : end] = filled_in
        targets[given : end - 1] = filled_in
        targets[end - 1] = self._separator_id


def _divided(text: Ids, cut: _Cut, draws: _Draws) -> tuple[Ids, Ids]:
    """(what is given, what is to be filled in) of a text."""
    kept = len(text) - cut.cut_out
    if not cut.sentinels:
        return np.concatenate([cut.mode, text[:kept]]), text[kept:].copy()
    spans = len(cut.sentinels) - 1
    gaps, lengths = draws.partition(kept, spans), draws.partition(cut.cut_out, spans)
    stops = np.cumsum(np.stack([gaps, lengths], axis=1).reshape(-1))
    parts = np.split(text, stops[:-1])
    given, filled_in = [cut.mode], []
    for number, sentinel in enumerate(cut.sentinels[:-1]):
        given += [parts[2 * number], sentinel]
        filled_in += [sentinel, parts[2 * number + 1]]
    return np.concatenate(given), np.concatenate([*filled_in, cut.sentinels[-1]])


class _Draws:
    """Random numbers of one row: the same for the same seed and row, on every machine."""

    def __init__(self, seed: int, row: int) -> None:
        from perennial.core.seeds import derive

        self._key, self._next = derive(seed, row), 0

    def numbers(self, count: int) -> NDArray[np.float64]:
        """The next ones, of [0, 1)."""
        from perennial.data.order import scramble

        places = np.arange(self._next, self._next + count, dtype=np.uint64)
        self._next += count
        return (scramble(places + np.uint64(self._key)) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def number(self) -> float:
        """The next one."""
        return float(self.numbers(1)[0])

    def partition(self, total: int, parts: int) -> Ids:
        """`total` as a sum of `parts` numbers of at least 1, all ways alike."""
        ends = np.sort(np.argsort(self.numbers(total - 1), kind="stable")[: parts - 1]) + 1
        return np.diff(np.concatenate([[0], ends, [total]]))
