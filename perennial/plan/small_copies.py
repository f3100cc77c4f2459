"""How small the small runs of a calibration are: sizes, tokens and what each is for, within a given time.

Two copies of the model, about 0.48 and 0.24 times as large in FLOPs per token, trained and updated on 0.48 and 0.24
times as many tokens: that is 4 and 17 times less compute. Where even that takes too long both shrink. All proportions
are kept (new tokens to old ones, width to depth, batch rule), so that what is fitted along the copies holds for the
model.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from perennial.core.settings import check
from perennial.model.config import ModelConfig
from perennial.model.cost import flops_per_token
from perennial.model.foreign import AnyConfig
from perennial.model.memory import stand_in

SCALES = (0.24, 0.48)
"""Of FLOPs per token and of tokens, the small copy first."""
SHARES = {0: (0.0, 0.01, 0.05, 0.25, 0.5), 1: (0.0, 0.05, 0.5)}
"""Shares of old text that each copy is updated with."""
USUAL_SHARE = 0.05
PEAK_FACTORS = (0.5, 2.0)
"""Peaks that the small copy also tries, at the usual share."""
LONGER = 2.0
"""The small copy also makes one update of so many times the tokens: it tells size and tokens apart."""
MOST_PAST = 4.0
"""The copies' own training is at most this many times their update: the rest of a long past is not affordable."""
_LEAST = (64, 2)
"""Width and layers of the small copy of a much larger model; the large copy has twice its FLOPs at least."""
_LOOKED_AT = 24
"""Shapes that are worked out exactly, of those that come closest by a rough count."""


@dataclass(frozen=True)
class Copy:
    """One size of copy."""

    config: ModelConfig
    flops_per_token: float
    parent_tokens: float
    tokens: float
    """Of one update."""


@dataclass(frozen=True)
class SmallRun:
    """One update (or, for new models, one training) of a copy."""

    copy: int
    """Place in the list of copies."""
    tokens: float
    share: float
    peak_factor: float = 1.0

    @property
    def name(self) -> str:
        """'small-replay5', 'large-replay50', 'small-replay5-peak2', 'small-replay5-long'."""
        words = f"{('small', 'large')[self.copy]}-replay{100 * self.share:g}"
        return words + (f"-peak{self.peak_factor:g}" if self.peak_factor != 1.0 else "")


def copies(
    config: AnyConfig, *, length: int, past: float, tokens: float, flops: float, scales: tuple[float, ...] = SCALES
) -> list[Copy]:
    """The copies of a model whose update has `tokens` tokens after `past`; all runs together take at most `flops`."""
    whole = config if isinstance(config, ModelConfig) else stand_in(config)
    ratio = min(past / tokens, MOST_PAST)
    full = float(flops_per_token(whole, length))
    units = _units(ratio, scales[0] / scales[1])
    largest = min(scales[1], math.sqrt(flops / (full * tokens * units)))
    least = 0.0
    if whole.width > 4 * _LEAST[0] and whole.layers > 2 * _LEAST[1]:
        least = float(flops_per_token(_with_shape(whole, *_LEAST), length)) / full
    small = max(least, largest * scales[0] / scales[1])
    found = []
    for scale in (small, max(largest, small * scales[1] / scales[0])):
        config_of = shrunk(whole, scale * full, length=length)
        found.append((config_of, float(flops_per_token(config_of, length))))
    longest = min(largest * tokens, flops / (found[1][1] * units))
    lengths = (longest * scales[0] / scales[1], longest)
    return [Copy(c, f, ratio * n, n) for (c, f), n in zip(found, lengths, strict=True)]


def _units(ratio: float, smaller: float) -> float:
    """What all runs cost, in updates of the large copy."""
    extra = len(SHARES[0]) + len(PEAK_FACTORS) + LONGER
    return ratio + len(SHARES[1]) + smaller**2 * (ratio + extra)


def runs(whole: bool = True) -> list[SmallRun]:
    """Tokens as multiples of the copy's update; the cheap runs first. `whole`: with old text in the parent's past."""
    if not whole:
        small = [SmallRun(0, tokens, 0.0) for tokens in (1.0, LONGER)]
        small += [SmallRun(0, 1.0, 0.0, factor) for factor in PEAK_FACTORS]
        return [*small, *(SmallRun(1, tokens, 0.0) for tokens in (1.0, LONGER))]
    small = [SmallRun(0, 1.0, share) for share in SHARES[0]]
    small += [SmallRun(0, 1.0, USUAL_SHARE, factor) for factor in PEAK_FACTORS]
    return [*small, SmallRun(0, LONGER, USUAL_SHARE), *(SmallRun(1, 1.0, share) for share in SHARES[1])]


def shrunk(config: ModelConfig, wanted: float, *, length: int) -> ModelConfig:
    """The configuration of about the same proportions whose FLOPs per token are nearest to `wanted`."""
    full = float(flops_per_token(config, length))
    shape = math.log(config.width / config.layers)
    inner = 6 * (2 + 2 * config.kv_heads / config.heads + 3 * config.mlp_width / config.width)
    places = list(itertools.product(range(16, config.width + 1, 16), range(1, config.layers + 1)))

    def distance(place: tuple[int, int], flops: float) -> float:
        off = abs(math.log(flops / min(wanted, full)))
        return off + 0.1 * abs(math.log(place[0] / place[1]) - shape)

    def rough(place: tuple[int, int]) -> float:
        width, layers = place
        return width * (inner * layers * width + 6 * config.vocabulary_size)

    likely = sorted(places, key=lambda place: distance(place, rough(place)))[:_LOOKED_AT]
    made = [(place, _with_shape(config, *place)) for place in likely or [(config.width, config.layers)]]
    return min(made, key=lambda pair: distance(pair[0], float(flops_per_token(pair[1], length))))[1]


def _with_shape(config: ModelConfig, width: int, layers: int) -> ModelConfig:
    heads = max(1, round(width / config.head_width))
    while width % (2 * heads):
        heads -= 1
    shape = {
        "vocabulary_size": config.vocabulary_size,
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": heads,
        "mlp_width": max(16, round(config.mlp_width / config.width * width / 16) * 16),
        "context": config.context,
        "tied_embeddings": config.tied_embeddings,
    }
    found = check(ModelConfig, shape)[0]
    assert found is not None
    return found
