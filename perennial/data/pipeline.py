"""The preparation pipeline: documents in, deduplicated and split, token shards out, in bounded memory.

A reader thread parses, filters and digests; the caller's thread drops duplicates and writes; the tokenizer works beside
both. What is in flight is a few batches, whatever the size of the corpus. `State` is all that a later run needs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, PlainSerializer, field_validator

from perennial.core import plugins
from perennial.core.amounts import Amount, human, parse
from perennial.core.errors import UserError
from perennial.core.settings import Settings
from perennial.data.dedup import DigestIndex, Journal
from perennial.data.documents import Document, Fields, Position, content_digest, cut, is_blank
from perennial.data.filters.base import Filter
from perennial.data.prefetch import Prefetch
from perennial.data.shards import AppendFile, SplitState, SplitWriter
from perennial.data.sources import AUTO, BEGINNING, Input, Place, documents, printable
from perennial.data.splits import SPLITS, TRAIN, split_of
from perennial.data.tokenizers.engine import Encoded, Engine, Sample, first_difference, pick
from perennial.data.tokenizers.folder import TokenizerFolder

DROPPED = "dropped.jsonl"
_BLOCK_BYTES = 1 << 20
"""Text that the reader thread hands over at a time."""
_BATCH_BYTES = 4 << 20
"""Text that is tokenized at a time; the engines lose speed below, memory grows above."""
_DOCUMENT_COST_BYTES = 256
"""What a document counts besides its text, so that tiny ones do not pile up."""
_COMMIT_SECONDS = 5.0
"""At most so much work is lost to a kill; the syncs of one commit take some 10 ms."""
_BLOCKS_AHEAD = 8
_BATCHES_AHEAD = 2

Progress = Callable[[int, int, str], None]
"""Called often, with bytes read, bytes in all (both as they lie on disk) and a note; the callee throttles."""


def _component(kind: str) -> BeforeValidator:
    def build(data: Any) -> Any:
        component, problems = plugins.build(kind, data)
        if problems:
            raise ValueError("; ".join(problem.text({}) for problem in problems))
        return component

    return BeforeValidator(build)


_AnyFilter = Annotated[Filter, _component("filters"), PlainSerializer(plugins.dump)]


class PrepareSettings(Settings):
    """What to prepare, and how."""

    name: str = Field(min_length=1)
    """What mixtures and reports call the corpus."""
    inputs: list[str] = Field(min_length=1)
    """Files and folders."""
    tokenizer: str
    """A folder with tokenizer.json: a checkpoint's, or one trained here."""
    reader: Any = AUTO
    """'auto' (by suffix), or a reader: its name, or a mapping with 'name' and its settings."""
    text_field: str = "text"
    """Field (column) that holds the text."""
    id_field: str | None = None
    """Field that identifies a document; None: file name and line."""
    metadata_fields: list[str] = []
    """Fields to keep beside the tokens."""
    validation: Annotated[Amount, BeforeValidator(lambda value: parse(value, ("share",)))] = Amount(0.01, "share")
    """Share of the documents that is held out."""
    split_by: str | None = None
    """Metadata field whose value decides the split (all chapters of a book on one side); None: the document's text."""
    against: list[str] = []
    """Prepared corpora; documents that one of them has are dropped."""
    filters: list[_AnyFilter] = []
    """Documents for which one gives a reason are dropped."""
    max_document_bytes: int = Field(default=1 << 20, ge=64, le=64 << 20)
    """Longer documents are cut at paragraph ends. Encoding one can take 200 times its size in memory (tokenizers)."""
    shard_tokens: int = Field(default=1 << 28, ge=1)
    """A shard is full when the next document would take it over this many tokens."""

    @field_validator("reader")
    @classmethod
    def _build_reader(cls, reader: Any) -> Any:
        if reader == AUTO:
            return reader
        component, problems = plugins.build("readers", reader)
        if problems:
            raise ValueError("; ".join(problem.text({}) for problem in problems))
        return component

    @field_validator("validation")
    @classmethod
    def _at_most_half(cls, share: Amount) -> Amount:
        if not 0 < share.value <= 0.5:
            raise ValueError(f"{share} must be above 0% and at most 50%")
        return share

    @field_validator("split_by")
    @classmethod
    def _not_blank(cls, field_name: str | None) -> str | None:
        if field_name == "":
            raise ValueError("name a metadata field, or leave it out to split by document")
        return field_name

    def fields(self) -> Fields:
        """The fields to read from each record."""
        wanted = [*self.metadata_fields, *([self.split_by] if self.split_by else [])]
        return Fields(self.text_field, self.id_field, tuple(dict.fromkeys(wanted)))

    def resolved(self) -> dict[str, Any]:
        """JSON-ready, every value explicit."""
        reader = self.reader if self.reader == AUTO else plugins.dump(self.reader)
        return {**self.model_dump(mode="json", exclude={"reader"}), "reader": reader}


class Item(NamedTuple):
    """A document, or a part of one, with all that can be said of it without knowing the others."""

    document: Document
    size: int
    digest: bytes
    split: str
    reason: str | None
    """Why it is dropped, if it is already known."""
    place: Place | None
    """Behind the document; None for a part that others follow."""


def read_ahead(inputs: Sequence[Input], settings: PrepareSettings, start: Place) -> Prefetch[list[Item]]:
    """Starts the reader thread; gives blocks of about 1 MiB of text. To be closed."""
    return Prefetch(_blocks(inputs, settings, start), _BLOCKS_AHEAD)


def _blocks(inputs: Sequence[Input], settings: PrepareSettings, start: Place) -> Iterator[list[Item]]:
    block: list[Item] = []
    room = _BLOCK_BYTES
    for document, place in documents(inputs, settings.fields(), start):
        utf8 = _encoded(document)
        parts = cut(document.text, utf8, settings.max_document_bytes)
        for index, text in enumerate(parts):
            part = document if len(parts) == 1 else document._replace(text=text, id=f"{document.id}#{index}")
            data = utf8 if len(parts) == 1 else text.encode()
            block.append(_item(part, data, settings, place if index == len(parts) - 1 else None))
            room -= len(data) + _DOCUMENT_COST_BYTES
            if room <= 0:
                yield block
                block, room = [], _BLOCK_BYTES
    yield block


def _encoded(document: Document) -> bytes:
    try:
        return document.text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{document.file}:{document.line}: the text is not Unicode: {error.reason}") from None


def _item(document: Document, utf8: bytes, settings: PrepareSettings, place: Place | None) -> Item:
    reason = document.problem or ("empty" if is_blank(document.text) else None)
    for one in settings.filters:
        reason = reason or one.reason(document)
    digest = content_digest(utf8)
    split = TRAIN if reason else split_of(_split_key(document, digest, settings.split_by), settings.validation.value)
    return Item(document, len(utf8), digest, split, reason, place)


def _split_key(document: Document, digest: bytes, split_by: str | None) -> bytes:
    if split_by is None:
        return digest
    value = document.metadata.get(split_by)
    if value is None:
        where = f"{document.file}:{document.line}"
        raise UserError(
            f"{where}: no value for {split_by!r} (split_by), so it cannot be said to which split the document belongs"
        )
    return str(value).encode()


@dataclass
class _Batch:
    """Documents on their way through the tokenizer, and how the state changes once they are written."""

    kept: dict[str, list[Item]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    dropped: list[tuple[Item, str]] = field(default_factory=list)
    cost: int = 0
    num_read: int = 0
    num_added: int = 0
    place: Place | None = None
    """Behind the batch; None when it ends within a document that was cut."""
    sample: Sample = field(default_factory=Sample)
    """As it is behind the batch."""
    chosen: list[int] = field(default_factory=list)
    encoded: Future[Encoded] | None = None
    compared: Future[Encoded] | None = None

    def add(self, item: Item, reason: str | None) -> None:
        """Takes in the next document."""
        if reason is None:
            self.kept[item.split].append(item)
        else:
            self.dropped.append((item, reason))
        self.cost += item.size + _DOCUMENT_COST_BYTES
        self.num_read += item.place is not None
        self.num_added += item.place is None
        self.place = item.place

    def items(self) -> list[Item]:
        """The kept documents in the order in which they are tokenized."""
        return [item for split in SPLITS for item in self.kept[split]]


@dataclass
class State:
    """All that a preparation has to know to go on; JSON in the journal."""

    identity: dict[str, Any]
    engine: dict[str, str]
    place: Place = BEGINNING
    num_read: int = 0
    num_added: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_length: int = 0
    splits: dict[str, SplitState] = field(default_factory=lambda: {split: SplitState() for split in SPLITS})
    sample: Sample = field(default_factory=Sample)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> State:
        """The inverse of `dataclasses.asdict` and JSON."""
        file, position, done_bytes, checked, fields = data.pop("place")
        splits = {split: SplitState(**state) for split, state in data.pop("splits").items()}
        place = Place(file, Position(*position), done_bytes, checked, tuple(fields))
        sample = Sample(**data.pop("sample"))
        return cls(**data, place=place, splits=splits, sample=sample)

    def note(self) -> str:
        """For the progress display."""
        kept = sum(state.documents for state in self.splits.values())
        tokens = sum(state.tokens for state in self.splits.values())
        return f"{human(kept)} documents, {human(tokens)} tokens"


class EnginesDiffer(Exception):
    """The fast engine was caught with other ids than the reference."""


class Pipeline:
    """One run, from the state it finds to the end of the inputs; `state` is what the last commit recorded, or later."""

    def __init__(
        self,
        settings: PrepareSettings,
        *,
        total_bytes: int,
        tokenizer: TokenizerFolder,
        engine: Engine,
        against: Sequence[tuple[str, DigestIndex]],
        folder: Path,
        journal: Journal,
        state: State,
    ) -> None:
        self._total_bytes, self._tokenizer = total_bytes, tokenizer
        self._journal, self._engine, self.state = journal, engine, state
        self._against = against
        self._dtype = token_dtype(tokenizer.vocabulary_size)
        self._writers = {
            split: SplitWriter(
                folder / split, dtype=self._dtype, max_shard_tokens=settings.shard_tokens, state=state.splits[split]
            )
            for split in SPLITS
        }
        self._dropped = AppendFile(folder / DROPPED, state.dropped_length)
        self._batch = _Batch()
        self._sample = Sample(**asdict(state.sample))
        self._in_flight: deque[_Batch] = deque()
        self._pending: set[bytes] = set()  # digests of documents on their way, which the journal does not have yet
        self._encoder, self._comparer = ThreadPoolExecutor(1, "encode"), ThreadPoolExecutor(1, "compare")
        self._committed_at = time.monotonic()

    def run(self, blocks: Iterable[list[Item]], progress: Progress | None) -> None:
        """Writes every document of the blocks (`read_ahead`, from the state's place) and commits."""
        try:
            for block in blocks:
                self._sort_out(block)
                if progress:
                    done = self.state.place
                    read = min(self._total_bytes, done.done_bytes + done.position.consumed)
                    progress(read, self._total_bytes, self.state.note())
            self._send()
            while self._in_flight:
                self._write(self._in_flight.popleft())
            self._commit()
            if progress:
                progress(self._total_bytes, self._total_bytes, self.state.note())
        finally:
            for pool in (self._encoder, self._comparer):
                pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Closes every file as it is."""
        for writer in self._writers.values():
            writer.close()
        self._dropped.close()

    def _sort_out(self, block: list[Item]) -> None:
        """Drops duplicates and puts the rest into batches."""
        candidates = [item.digest for item in block if item.reason is None]
        seen = self._journal.known(candidates)
        seen.update(self._pending.intersection(candidates))
        elsewhere = [(name, index.known(candidates)) for name, index in self._against]
        for item in block:
            reason = item.reason
            if reason is None and item.digest in seen:
                reason = "duplicate"
            for name, digests in elsewhere:
                if reason is None and item.digest in digests:
                    reason = f"duplicate of {name}"
            if reason is None:
                seen.add(item.digest)
                self._pending.add(item.digest)
            self._batch.add(item, reason)
            if self._batch.cost >= _BATCH_BYTES:
                self._send()

    def _send(self) -> None:
        """Hands the batch to the tokenizer and writes the one that has been with it for longest."""
        batch, self._batch = self._batch, _Batch()
        items = batch.items()
        texts = [item.document.text for item in items]
        if texts:
            batch.encoded = self._encoder.submit(self._engine.encode_batch, texts)
        if self._engine.reference is not None:
            batch.chosen = self._sample.choose(texts, [item.size for item in items], [item.digest for item in items])
            if batch.chosen:
                batch.compared = self._comparer.submit(
                    self._engine.reference.encode_batch, [texts[i] for i in batch.chosen]
                )
        batch.sample = Sample(**asdict(self._sample))
        self._in_flight.append(batch)
        if len(self._in_flight) > _BATCHES_AHEAD:
            self._write(self._in_flight.popleft())

    def _write(self, batch: _Batch) -> None:
        """Appends a batch once it is tokenized; commits when it is time."""
        if batch.encoded is not None:
            self._append(batch, batch.encoded.result())
        for _, reason in batch.dropped:
            self.state.dropped[reason] = self.state.dropped.get(reason, 0) + 1
        self._dropped.write(b"".join(_dropped_line(item.document, reason) for item, reason in batch.dropped))
        self.state.num_read += batch.num_read
        self.state.num_added += batch.num_added
        self.state.sample = batch.sample
        if batch.place is not None:
            self.state.place = batch.place
            if time.monotonic() - self._committed_at >= _COMMIT_SECONDS:
                self._commit()

    def _append(self, batch: _Batch, encoded: Encoded) -> None:
        items = batch.items()
        if batch.compared is not None:
            different = first_difference(pick(encoded, batch.chosen), batch.compared.result())
            if different is not None:
                document = items[batch.chosen[different]].document
                raise EnginesDiffer(
                    f"{self._engine.name} {self._engine.version} gives other ids for document {document.id!r}"
                )
        self._check_ids(items, encoded)
        tokens, ends = with_separators(encoded, self._tokenizer.separator_id, self._dtype)
        first, base = 0, 0
        for split in SPLITS:
            some = batch.kept[split]
            last = first + len(some)
            stop = int(ends[last - 1]) if last else 0
            sizes = [item.size for item in some]
            lines = [_line({"id": item.document.id, "metadata": item.document.metadata}) for item in some]
            self._writers[split].append(tokens[base:stop], ends[first:last] - np.uint64(base), sizes, lines)
            first, base = last, stop
        digests = [item.digest for item in items]
        self._journal.add(digests)
        self._pending.difference_update(digests)

    def _check_ids(self, items: Sequence[Item], encoded: Encoded) -> None:
        """Raises UserError when a text holds the separator, which would end its document in the middle."""
        ids, ends = encoded
        assert not len(ids) or int(ids.max()) < self._tokenizer.vocabulary_size
        places = np.flatnonzero(ids == self._tokenizer.separator_id)
        if len(places):
            document = items[int(np.searchsorted(ends, np.uint64(places[0]), side="right"))].document
            what = "its text is encoded with the id that ends documents, which the tokenizer does not keep for that"
            raise UserError(f"{document.file}:{document.line}: {what}")

    def _commit(self) -> None:
        """Makes everything written so far the state that a later run goes on from."""
        for split, writer in self._writers.items():
            self.state.splits[split] = writer.sync()
        self._dropped.sync()
        self.state.dropped_length = self._dropped.length
        self._journal.commit(asdict(self.state))
        self._committed_at = time.monotonic()


def with_separators(encoded: Encoded, separator_id: int, dtype: str) -> tuple[NDArray[Any], NDArray[np.uint64]]:
    """The ids with a separator behind each text's, and the ends that include it."""
    ids, ends = encoded
    with_ends = np.add(ends, np.arange(1, len(ends) + 1, dtype=np.uint64), dtype=np.uint64)
    tokens = np.empty(len(ids) + len(ends), dtype)
    is_id = np.ones(len(tokens), bool)
    is_id[with_ends - np.uint64(1)] = False
    tokens[is_id] = ids
    tokens[~is_id] = separator_id
    return tokens, with_ends


def _dropped_line(document: Document, reason: str) -> bytes:
    return _line({"id": document.id, "reason": reason, "file": printable(document.file), "line": document.line})


def _line(data: dict[str, Any]) -> bytes:
    return orjson.dumps(data, default=str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)


def token_dtype(vocabulary_size: int) -> str:
    """The smallest type that holds every id: 'uint16' or 'uint32'."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"
