"""Documents packed into rows: targets are the stream itself, a separator among the inputs opens the next document.

A split is one stream of tokens in which every document is followed by a separator. Row w of T tokens has the targets
stream[w*T : (w+1)*T] and as inputs the token before each target (the separator before the first of all), so that rows
are full and every stored token is a target exactly once, however documents and rows lie to each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = -100
"""Target id that no loss counts."""


def document_segments(inputs: NDArray[np.int64], separator_id: int, starts: Any = None) -> NDArray[np.int32]:
    """Number of the document that each input (B, T) belongs to, counted from 0 or 1 within its row.

    Attention that stays inside a segment never crosses a document's border. `starts` (anything that indexes inputs)
    are further places where a segment begins: those where a row goes on with another stretch of the corpus.
    """
    opens = inputs == separator_id
    if starts is not None:
        opens[starts] = True
    return np.cumsum(opens, axis=1, dtype=np.int32)


def pack(
    stream: NDArray[np.int64], sequence_length: int, separator_id: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(inputs, targets) of shape (B, T) in which every token of `stream` is a target once; the last row is padded.

    Padding has the target -100, which no loss counts, and separators as inputs.
    """
    num_rows = -(-len(stream) // sequence_length)
    targets = np.full(num_rows * sequence_length, IGNORED, np.int64)
    inputs = np.full(num_rows * sequence_length, separator_id, np.int64)
    targets[: len(stream)] = stream
    inputs[1 : len(stream)] = stream[:-1]
    return inputs.reshape(num_rows, sequence_length), targets.reshape(num_rows, sequence_length)
