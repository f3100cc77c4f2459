"""Text before and after each document, put into the rows when they are read: metadata, or a template around the text.

A row stays the window of the stream that its position says. Within it, every part of a document (its beginning, or
what goes on from the row before) is opened by the document's prefix, and its end is followed by the suffix; what then
no longer fits at the end of the row is left out. So the corpus is prepared once, stages with and without such text go
through it in one order, and the row remains a pure function of its position.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perennial.core.errors import UserError, nearest
from perennial.core.progress import Progress
from perennial.data.corpus import Corpus, Split
from perennial.data.loader import Batch
from perennial.data.mixture import Rows
from perennial.data.packing import IGNORED, document_segments
from perennial.data.tokenizers.engine import ReferenceEngine
from perennial.data.tokenizers.folder import TokenizerFolder

Ids = NDArray[np.int64]


def fields_of(template: str) -> list[str]:
    """The names in braces, in order. ValueError for a template that cannot be filled in, such as one with '{'."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template!r}: {error}; write braces that are text twice: {{{{ and }}}}") from None
    names = [name for _, name, _, _ in parts if name is not None]
    if wrong := [name for name in names if not name.isidentifier()]:
        raise ValueError(f"{template!r}: '{{{wrong[0]}}}' must be the plain name of a field in braces")
    return names


def metadata_of(corpus: Corpus) -> list[str]:
    """The metadata fields that were kept when the corpus was prepared."""
    settings = corpus.manifest["settings"]
    split_by = settings.get("split_by")
    return [*settings.get("metadata_fields", []), *([split_by] if split_by else [])]


def check_fields(template: str, corpora: Sequence[Corpus], *, besides: Iterable[str] = ()) -> None:
    """Raises UserError unless some corpus has every field of the template (`besides` are always there)."""
    wanted = [name for name in fields_of(template) if name not in set(besides)]
    if any(set(wanted) <= set(metadata_of(corpus)) for corpus in corpora):
        return
    kept = sorted({field for corpus in corpora for field in metadata_of(corpus)})
    missing = next((name for name in wanted if name not in kept), wanted[0])
    there = f"they keep: {', '.join(kept)}" if kept else "they keep none"
    raise UserError(
        f"template {template!r}: no corpus of the mixture has the metadata field '{missing}' ({there}); keep it with "
        f"`perennial prepare --metadata-field {missing}`.{nearest(missing, kept)}"
    )


def filled(template: str, metadata: Mapping[str, Any]) -> str | None:
    """The template with its fields filled in; None when the document has not all of them."""
    values = {name: metadata.get(name) for name in fields_of(template)}
    return None if None in values.values() else template.format_map(values)


@dataclass(frozen=True)
class Wrapping:
    """The ids before and after each document of a split; a document without its own has none."""

    ends: Ids
    """End of each document in the stream, its separator included."""
    texts: list[tuple[Ids, Ids]]
    """The different (prefix, suffix) that there are."""
    which: NDArray[np.int32]
    """Which of them each document has."""


NOTHING: tuple[Ids, Ids] = (np.empty(0, np.int64), np.empty(0, np.int64))


def wrapping(
    split: Split,
    tokenizer: TokenizerFolder,
    render: Callable[[Mapping[str, Any]], tuple[str, str] | None],
    *,
    quiet: bool = True,
) -> Wrapping:
    """What `render` makes of every document's metadata, as ids: (text before, text after), or None for neither.

    Raises UserError for a text that the tokenizer encodes with the id that ends documents.
    """
    numbers: dict[tuple[str, str] | None, int] = {None: 0}
    which = np.empty(split.num_documents, np.int32)
    progress = Progress("text around documents", total=split.num_documents, unit="documents", quiet=quiet)
    for number, document in enumerate(split.documents()):
        which[number] = numbers.setdefault(render(document.get("metadata", {})), len(numbers))
        if number % 10_000 == 0:
            progress.update(number)
    progress.close()
    engine = ReferenceEngine(tokenizer.for_encoding(), "text around documents")
    flat = [text for pair in list(numbers)[1:] for text in pair or ()]
    ids, stops = engine.encode_batch(flat) if flat else (np.empty(0, np.uint32), np.empty(0, np.uint64))
    if (ids == split.separator_id).any():
        raise UserError(f"{split.path}: text around documents is encoded with the id that ends documents; change it")
    parts = np.split(ids.astype(np.int64), stops[:-1].astype(np.int64)) if flat else []
    texts = [NOTHING, *zip(parts[::2], parts[1::2], strict=True)]
    return Wrapping(split.document_ends().astype(np.int64), texts, which)


class Wrapper:
    """An arrangement of rows (`data.loader`): puts text around the documents of every source."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        tokenizer: TokenizerFolder,
        render: Callable[[Mapping[str, Any]], tuple[str, str] | None],
        *,
        counts_all: bool,
        document_mask: bool,
        quiet: bool = True,
    ) -> None:
        """`corpora` by source; the rest as for `wrapping` and `wrap`. Reads the metadata of all documents."""
        of = {c.fingerprint: wrapping(c.train, tokenizer, render, quiet=quiet) for c in corpora}
        self._wrappings = [of[corpus.fingerprint] for corpus in corpora]
        self._separator_id = corpora[0].separator_id
        self._counts_all, self._document_mask = counts_all, document_mask

    def __call__(self, batch: Batch, rows: Rows, first_row: int) -> Batch:
        """The batch with that text."""
        return wrap(
            batch,
            rows,
            self._wrappings,
            separator_id=self._separator_id,
            counts_all=self._counts_all,
            document_mask=self._document_mask,
        )


def wrap(
    batch: Batch,
    rows: Rows,
    wrappings: Sequence[Wrapping],
    *,
    separator_id: int,
    counts_all: bool,
    document_mask: bool,
) -> Batch:
    """The rows with the text around their documents; `wrappings` by source.

    counts_all: targets within that text count; else they are IGNORED. Writes into the arrays of the batch.
    """
    of = rows.stretches
    opened: list[tuple[int, int]] = []
    first_of_row = np.searchsorted(of.row, np.arange(len(batch.targets) + 1))
    for row in range(len(batch.targets)):
        stretches = slice(first_of_row[row], first_of_row[row + 1])
        columns, tokens = of.column[stretches], batch.targets[row].copy()
        before = batch.inputs[row, columns]  # of each stretch the token that is stored before it
        written = _Row(batch.inputs[row], batch.targets[row], separator_id)
        pieces = _pieces_of_row(
            [wrappings[source] for source in rows.stretch_source[stretches]],
            np.split(tokens, columns[1:]),
            of.start[stretches],
            before,
        )
        for piece in pieces:
            if written.place > 0:
                opened.append((row, written.place))
            if not written.add(piece, counts_all):
                break
        written.fill()
    if not document_mask:
        return batch
    places = np.array(opened, np.int64).reshape(-1, 2).T
    return replace(batch, segments=document_segments(batch.inputs, separator_id, (places[0], places[1])))


@dataclass(frozen=True)
class _Piece:
    """A part of a document that lies in a row, and what goes around it."""

    prefix: Ids
    body: Ids
    suffix: Ids
    end: Ids
    """The separator, where the document ends here."""
    before: int
    """The token that is stored before it."""


def _pieces_of_row(sources: Sequence[Wrapping], stretches: Sequence[Ids], starts: Ids, before: Ids) -> Iterable[_Piece]:
    """The parts of documents in a row that is made of these stretches, end to end."""
    for source, tokens, start, token in zip(sources, stretches, starts.tolist(), before.tolist(), strict=True):
        yield from _pieces(source, tokens, start, token)


def _pieces(source: Wrapping, tokens: Ids, start: int, before: int) -> Iterable[_Piece]:
    """The parts of documents in a stretch whose first token is the stream's number `start`."""
    stop = start + len(tokens)
    document = int(np.searchsorted(source.ends, start, side="right"))
    place = start
    while place < stop:
        end = int(source.ends[document])
        until = min(end, stop)
        prefix, suffix = source.texts[source.which[document]]
        part = tokens[place - start : until - start]
        begins = place == (int(source.ends[document - 1]) if document else 0)
        if until == end and until - place == 1 and not begins:  # nothing but the separator is left of it
            yield _Piece(NOTHING[0], part[:-1], NOTHING[1], part, before)
        elif until == end:
            yield _Piece(prefix, part[:-1], suffix, part[-1:], before)
        else:
            yield _Piece(prefix, part, NOTHING[1], NOTHING[1], before)
        place, document, before = until, document + 1, int(part[-1])


class _Row:
    """A row that is written from its beginning on; what does not fit is left out."""

    def __init__(self, inputs: Ids, targets: Ids, separator_id: int) -> None:
        self._inputs, self._targets, self._separator_id = inputs, targets, separator_id
        self.place = 0

    def add(self, piece: _Piece, counts_all: bool) -> bool:
        """Puts a piece behind what is there; False when the row is full, or has no room for more than the prefix."""
        room = len(self._targets) - self.place
        if len(piece.prefix) >= room:
            return False
        ids = np.concatenate([piece.prefix, piece.body, piece.suffix, piece.end])[:room]
        stop = self.place + len(ids)
        targets, inputs = self._targets[self.place : stop], self._inputs[self.place : stop]
        inputs[0] = self._separator_id if len(piece.prefix) else piece.before
        inputs[1:] = ids[:-1]
        targets[:] = ids
        if not counts_all:
            targets[: len(piece.prefix)] = IGNORED
            behind = len(piece.prefix) + len(piece.body)
            targets[behind : behind + len(piece.suffix)] = IGNORED
        self.place = stop
        return stop < len(self._targets)

    def fill(self) -> None:
        """Ends the row with what does not count."""
        self._inputs[self.place :] = self._separator_id
        self._targets[self.place :] = IGNORED
