"""A prepared corpus: token shards on disk, opened as memory maps, with its documents' borders, sizes and metadata.

Layout (written by `perennial prepare`):

    CORPUS/manifest.json              format, name, fingerprint, tokenizer, counts, splits; sizes and sha256 of files
    CORPUS/train/00000.ds             tokens, little-endian uint16 or uint32, each document followed by the separator
    CORPUS/train/00000.ds.index       uint64 end of each document in the shard, separator included
    CORPUS/train/00000.bytes          uint64 UTF-8 bytes of each document's text
    CORPUS/train/00000.jsonl          one line of metadata per document
    CORPUS/validation/...             the same for the documents held out
    CORPUS/tokenizer/                 the tokenizer's files

A split is read as one stream across its shards; no document lies in two of them. Maps are opened when first needed and
are never pickled, so that a corpus can be sent to another process for the price of its manifest. Before a batch is read
the sizes of its shards are looked up: to touch a map beyond the end of its file would end the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import ArrayLike, NDArray

from perennial.core.errors import Unreadable, UserError
from perennial.core.files import MANIFEST, read_json, verify_manifest
from perennial.core.patience import Patience, may_come_back
from perennial.data.packing import pack

FORMAT = 1
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_COUNT = np.dtype("<u8")
_TEXT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet", ".txt", ".md")


class Split:
    """The training or the validation documents of a corpus: one stream of tokens over its shards."""

    def __init__(
        self,
        corpus: Path,
        facts: dict[str, Any],
        *,
        dtype: np.dtype[Any],
        separator_id: int,
        patience: Patience | None = None,
    ) -> None:
        """`facts`: documents, tokens, bytes and shards ('train/00000', ...) from the manifest. Raises UserError.

        patience: for shards that cannot be read for a while; by default none.
        """
        self.num_tokens: int = facts["tokens"]
        self.num_documents: int = facts["documents"]
        self.num_bytes: int = facts["bytes"]
        self.separator_id = separator_id
        self.path = corpus
        self._shards: list[str] = list(facts["shards"])
        self._paths = [str(corpus / f"{shard}.ds") for shard in self._shards]
        self._dtype = dtype
        self._patience = patience or Patience(0.0)
        sizes = [(corpus / f"{shard}.ds").stat().st_size // dtype.itemsize for shard in self._shards]
        self._starts = np.cumsum([0, *sizes], dtype=np.int64)
        self._maps: list[NDArray[Any]] | None = None
        self._mapped: list[tuple[int, int]] = []
        if self._starts[-1] != self.num_tokens:
            raise UserError(f"{corpus}: its shards hold {self._starts[-1]} tokens, the manifest says {self.num_tokens}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}

    def num_rows(self, sequence_length: int) -> int:
        """Full rows of `sequence_length` targets; the tail that fills none is left out."""
        return self.num_tokens // sequence_length

    def tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """The stored tokens from `start` to `stop` (exclusive), across shard borders."""
        assert 0 <= start <= stop <= self.num_tokens, f"tokens {start} to {stop} of {self.num_tokens}"
        self._wait_until_whole(np.array([start]), np.array([stop]))
        result = np.empty(stop - start, np.int64)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        position = start
        while position < stop:
            first, last = int(self._starts[shard]), min(stop, int(self._starts[shard + 1]))
            result[position - start : last - start] = self._arrays()[shard][position - first : last - first]
            position, shard = last, shard + 1
        return result

    def rows(self, row_indices: ArrayLike, sequence_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(inputs, targets), each int64 (n, T), of the rows with these numbers."""
        starts = np.asarray(row_indices, np.int64) * sequence_length
        lengths = np.full(len(starts), sequence_length)
        inputs = np.empty((len(starts), sequence_length), np.int64)
        targets = np.empty_like(inputs)
        places = np.arange(len(starts)) * sequence_length
        self.copy_pairs(starts, lengths, places, inputs=inputs.reshape(-1), targets=targets.reshape(-1))
        return inputs, targets

    def copy_pairs(
        self,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        places: NDArray[np.int64],
        *,
        inputs: NDArray[np.int64],
        targets: NDArray[np.int64],
    ) -> None:
        """Copies stretches of the stream into flat arrays: `lengths[i]` targets from `starts[i]` on to `places[i]` on.

        The input beside each target is the token stored before it. One slice per stretch converts straight from the
        map; gathering all with an index array needs a temporary copy and one pass per shard.
        """
        shards = np.searchsorted(self._starts, starts, side="right") - 1
        local = starts - self._starts[shards]
        self._wait_until_whole(starts, starts + lengths)
        arrays = self._arrays()
        parts = (starts, lengths, places, shards, local)
        for start, length, place, shard, first in zip(*(part.tolist() for part in parts), strict=True):
            tokens, end = arrays[shard], place + length
            if first > 0 and first + length <= len(tokens):
                targets[place:end] = tokens[first : first + length]
                inputs[place:end] = tokens[first - 1 : first + length - 1]
            else:
                targets[place:end] = self.tokens(start, start + length)
                inputs[place + 1 : end] = targets[place : end - 1]
                inputs[place] = self.tokens(start - 1, start)[0] if start else self.separator_id

    def _wait_until_whole(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> None:
        """Returns when the shards of these stretches can be read in full; raises Unreadable when patience ends."""
        first = np.searchsorted(self._starts, np.maximum(starts - 1, 0), side="right") - 1
        last = np.searchsorted(self._starts, np.maximum(stops - 1, 0), side="right") - 1
        shards = set(first.tolist()).union(last.tolist())
        for index in np.flatnonzero(last - first > 1).tolist():
            shards.update(range(first[index], last[index]))
        self._patience.attempt(lambda: self._expect_whole(shards), passes=may_come_back)

    def _expect_whole(self, shards: Iterable[int]) -> None:
        """Raises Unreadable when one is not there in full; one that was put back as another file is mapped anew."""
        self._arrays()
        for shard in shards:
            if self._identity(os.stat(self._paths[shard]), shard) != self._mapped[shard]:  # noqa: PTH116 (is fast)
                self._maps = None
                self._arrays()

    def _identity(self, found: os.stat_result, shard: int) -> tuple[int, int]:
        """What tells a shard's file from another of the same name. Raises Unreadable when its length is wrong."""
        size = int(self._starts[shard + 1] - self._starts[shard]) * self._dtype.itemsize
        if found.st_size != size:
            raise Unreadable(f"{self._paths[shard]}: the shard has {found.st_size} bytes, it should have {size}")
        return found.st_dev, found.st_ino

    def document_ends(self) -> NDArray[np.uint64]:
        """Where each document ends in the stream (exclusive, its separator included)."""
        parts = [
            self._numbers(f"{shard}.ds.index") + np.uint64(start)
            for shard, start in zip(self._shards, self._starts.tolist(), strict=False)
        ]
        return self._one_per_document(parts, "ends")

    def document_bytes(self) -> NDArray[np.uint64]:
        """UTF-8 bytes of each document's text."""
        return self._one_per_document([self._numbers(f"{shard}.bytes") for shard in self._shards], "sizes")

    def documents(self) -> Iterator[dict[str, Any]]:
        """Id and metadata of each document, in stored order."""
        for shard in self._shards:
            with open(self.path / f"{shard}.jsonl", "rb") as file:
                for line in file:
                    yield orjson.loads(line)

    def _numbers(self, name: str) -> NDArray[np.uint64]:
        numbers = self._patience.attempt(lambda: np.fromfile(self.path / name, _COUNT), passes=may_come_back)
        return numbers.astype(np.uint64, copy=False)

    def _one_per_document(self, parts: list[NDArray[np.uint64]], what: str) -> NDArray[np.uint64]:
        numbers = np.concatenate([np.empty(0, np.uint64), *parts])
        if len(numbers) != self.num_documents:
            raise UserError(f"{self.path}: {len(numbers)} {what} of {self.num_documents} documents are stored")
        return numbers

    def _arrays(self) -> list[NDArray[Any]]:
        """The shards' tokens as plain arrays over memory maps (slices of np.memmap itself cost ten times as much)."""
        if self._maps is None:
            opened = [self._map(shard) for shard in range(len(self._shards))]
            self._mapped = [identity for _, identity in opened]
            self._maps = [array for array, _ in opened]
        return self._maps

    def _map(self, shard: int) -> tuple[NDArray[Any], tuple[int, int]]:
        with open(self._paths[shard], "rb") as file:
            found = os.fstat(file.fileno())
            identity = self._identity(found, shard)
            tokens = np.memmap(file, self._dtype, mode="r") if found.st_size else np.empty(0, self._dtype)
            return np.asarray(tokens), identity


class Corpus:
    """A prepared corpus, opened for reading."""

    def __init__(self, path: Path, manifest: dict[str, Any], *, patience: Patience | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.name: str = manifest["name"]
        self.fingerprint: str = manifest["fingerprint"]
        self.tokenizer_fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self.vocabulary_size: int = manifest["tokenizer"]["vocabulary_size"]
        self.separator_id: int = manifest["tokenizer"]["separator_id"]
        dtype, splits = _DTYPES[manifest["dtype"]], manifest["splits"]
        reading: dict[str, Any] = {"dtype": dtype, "separator_id": self.separator_id, "patience": patience}
        self.train = Split(path, splits["train"], **reading)
        self.validation = Split(path, splits["validation"], **reading)

    @classmethod
    def open(cls, path: Path | str, *, checksums: bool = False, patience: Patience | None = None) -> Corpus:
        """Opens the folder and checks the size (on request the sha256) of every file. Raises UserError.

        patience: for shards that cannot be read for a while later on; by default none.
        """
        path = Path(path)
        _expect_manifest(path)
        manifest = read_json(path / MANIFEST, "corpus manifest")
        if not isinstance(manifest, dict) or not {"format", "splits", "tokenizer", "files"} <= manifest.keys():
            raise UserError(f"{path}: not a prepared corpus: its {MANIFEST} describes something else")
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{path}: corpus format {manifest['format']!r}; this version of Perennial reads format {FORMAT}. "
                "Prepare the text again with `perennial prepare`, or read it with the version that wrote it."
            )
        verify_manifest(path, what="prepared corpus", checksums=checksums)
        try:
            return cls(path, manifest, patience=patience)
        except (KeyError, TypeError, FileNotFoundError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: its {MANIFEST} is broken ({what}); prepare the text again") from None


def _expect_manifest(path: Path) -> None:
    """Raises UserError that says what lies at `path` when it is no finished corpus."""
    again = "run the same `perennial prepare` again; it goes on where it stopped"
    if path.suffix == ".partial" and path.is_dir():
        raise UserError(f"{path}: this corpus is still being prepared, or its preparation was interrupted: {again}")
    if (path / MANIFEST).is_file():
        return
    if path.with_name(path.name + ".partial").is_dir():
        raise UserError(f"{path}: the preparation of this corpus was interrupted: {again}")
    if path.is_file() and path.name.endswith(_TEXT_SUFFIXES):
        raise UserError(f"{path}: this is raw text, not a prepared corpus: run `perennial prepare` on it first")
    if not path.is_dir():
        kind = UserError if path.exists() else Unreadable
        raise kind(f"{path}: {'not a' if path.exists() else 'no such'} prepared corpus folder")
    for name, what in (("resolved.json", "a run"), ("config.json", "a model"), ("tokenizer.json", "a tokenizer")):
        if (path / name).is_file():
            raise UserError(f"{path}: this folder is {what} ({name}), not a prepared corpus")
    text = next((p.name for p in sorted(path.rglob("*")) if p.name.endswith(_TEXT_SUFFIXES)), None)
    if text is not None:
        raise UserError(
            f"{path}: this folder holds raw text ({text}), not a prepared corpus: run `perennial prepare` on it first"
        )
    raise Unreadable(f"{path}: not a prepared corpus: it has no {MANIFEST}")  # a file system may not be mounted yet


def evaluation_rows(
    split: Split, sequence_length: int, max_tokens: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Whole documents packed for measuring a loss: inputs and targets (B, T), and the UTF-8 bytes of their text.

    Every token of the chosen documents (separators included) is a target exactly once; the last row is padded with the
    target -100. At most `max_tokens` tokens are taken, None means all of the split; the choice is that of
    `evenly_spread`. Raises UserError when the split is empty.
    """
    ends = split.document_ends().astype(np.int64)
    sizes = split.document_bytes()
    if len(ends) == 0:
        raise UserError(
            f"{split.path}: this split has no documents, so no loss can be measured on it; prepare the corpus with a "
            "larger validation share, or leave it out of the evaluation"
        )
    starts = np.concatenate([[0], ends[:-1]])
    chosen = evenly_spread(ends - starts, max_tokens)
    stream = np.concatenate([split.tokens(int(starts[i]), int(ends[i])) for i in chosen])
    inputs, targets = pack(stream, sequence_length, split.separator_id)
    return inputs, targets, int(sizes[chosen].sum())


def evenly_spread(lengths: NDArray[np.int64], max_tokens: int | None) -> NDArray[np.int64]:
    """Indices of documents, spread over the whole split, with at most `max_tokens` tokens in all; at least one.

    Documents often lie ordered by source file, so a beginning would be one-sided. They are visited in bit-reversed
    order (first, middle, quarters, eighths, ...) and every one that still fits is taken; when none fits, the shortest.
    Limits: when documents are not short against `max_tokens`, the long ones are the ones left out.
    """
    if max_tokens is None or lengths.sum() <= max_tokens:
        return np.arange(len(lengths))
    left, shortest, chosen = max_tokens, int(lengths.min()), []
    order = _bit_reversed(len(lengths))
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length <= left:
            chosen.append(index)
            left -= length
        elif left < shortest:
            break
    return np.array(sorted(chosen) or [int(lengths.argmin())])


def _bit_reversed(size: int) -> NDArray[np.int64]:
    """The numbers 0 to size - 1, each as far from those before it as can be."""
    bits = max(1, (size - 1).bit_length())
    numbers = np.arange(1 << bits)
    reverse = np.zeros_like(numbers)
    for bit in range(bits):
        reverse |= ((numbers >> bit) & 1) << (bits - 1 - bit)
    return reverse[reverse < size]
