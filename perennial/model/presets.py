"""Model shapes by size. The name counts every parameter but the embedding and the output head.

How the shapes were chosen. Vocabulary is left out of the name because it is the user's choice and would make up most
of a small model. Up to '750m' every head is 64 wide and has its own keys and values; small models are shallow,
because on a CPU few large products are faster than many small ones, and the ratio of width to depth grows from 32 to
64. From '1b' on, 8 key-value heads serve all query heads and a head is 128 wide ('1b': 64), as in the Llama 3 family.
The feed-forward width is then the multiple of 32 that brings the count to within 5% of the name; that puts it between
2.4 and 4 times the width.

Up to '1b' the output head shares the embedding's weights. `context` is a default only, the longest row a model is
trained on; the shapes do not depend on it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from perennial.core.errors import UserError, nearest


@dataclass(frozen=True)
class Shape:
    """What a preset fixes; everything else is `ModelConfig`'s default."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    context: int
    tied_embeddings: bool


PRESETS: dict[str, Shape] = {
    "1m": Shape(128, 4, 2, 2, 480, 1024, True),
    "2m": Shape(192, 4, 3, 3, 608, 1024, True),
    "4m": Shape(256, 5, 4, 4, 704, 1024, True),
    "10m": Shape(384, 6, 6, 6, 928, 1024, True),
    "25m": Shape(512, 8, 8, 8, 1344, 2048, True),
    "50m": Shape(640, 10, 10, 10, 1728, 2048, True),
    "124m": Shape(768, 16, 12, 12, 2304, 2048, True),
    "350m": Shape(1024, 24, 16, 16, 3392, 2048, True),
    "750m": Shape(1536, 24, 24, 24, 4736, 4096, True),
    "1b": Shape(2048, 16, 32, 8, 8192, 4096, True),
    "3b": Shape(3072, 30, 24, 8, 8192, 4096, False),
    "8b": Shape(4096, 36, 32, 8, 14336, 8192, False),
    "13b": Shape(5120, 48, 40, 8, 13824, 8192, False),
    "70b": Shape(8192, 80, 64, 8, 28672, 8192, False),
}


def shape(name: str) -> dict[str, Any]:
    """The settings of a preset. Raises UserError, with the nearest name, when there is none of that name."""
    if name not in PRESETS:
        raise UserError(f"no model preset '{name}'; there are: {', '.join(PRESETS)}.{nearest(name.lower(), PRESETS)}")
    return asdict(PRESETS[name])
