"""Token shards in the making: append-only files whose lengths at a commit are all that is needed to go back to it.

One shard is four files: NAME.ds (tokens, little-endian), NAME.ds.index (uint64 end of each document in the shard),
NAME.bytes (uint64 UTF-8 bytes of each document) and NAME.jsonl (its id and metadata). A document lies in one shard.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perennial.core.files import sync

_SUFFIXES = (".ds", ".ds.index", ".bytes", ".jsonl")


class AppendFile:
    """A file that only grows. Opened at a committed length: what a kill left behind it is cut off."""

    def __init__(self, path: Path, length: int = 0) -> None:
        self.path = path
        self._file = FileIO(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), "w")
        try:
            assert self._file.seek(0, os.SEEK_END) >= length, f"{path} is shorter than what was made durable"
            self._file.truncate(length)
            self._file.seek(length)
        except BaseException:
            self._file.close()
            raise
        self.length = length

    def write(self, data: bytes | memoryview) -> None:
        """Appends all of the data."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        self.length += len(view)
        while view:  # a write may take only a part, for one when the disk is about to be full
            view = view[self._file.write(view) :]

    def sync(self) -> None:
        """Makes everything written durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file as it is."""
        self._file.close()


@dataclass
class SplitState:
    """How much of a split has been written; JSON-ready through `vars`."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    shard: int = 0
    """Number of the shard that is being written."""
    shard_tokens: int = 0
    lengths: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_SUFFIXES, 0))
    """Length in bytes of each file of that shard."""


class SplitWriter:
    """Appends documents to the shards of one split."""

    def __init__(self, folder: Path, *, dtype: str, max_shard_tokens: int, state: SplitState) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._max_shard_tokens = max_shard_tokens
        self._state = state
        self._files: dict[str, AppendFile] = {}
        self._full: list[AppendFile] = []
        for path in folder.iterdir():  # shards begun after the last commit
            if int(path.name.split(".")[0]) > state.shard:
                path.unlink()
        self._open()

    def _open(self) -> None:
        for suffix in _SUFFIXES:
            path = self._folder / f"{_name(self._state.shard)}{suffix}"
            self._files[suffix] = AppendFile(path, self._state.lengths[suffix])

    def append(
        self, tokens: NDArray[Any], ends: NDArray[np.uint64], sizes: Sequence[int], lines: Sequence[bytes]
    ) -> None:
        """Appends documents: their tokens with separators, each one's end in them, UTF-8 bytes and metadata line."""
        first, base = 0, 0
        while first < len(ends):
            room = self._max_shard_tokens - self._state.shard_tokens
            last = int(np.searchsorted(ends, np.uint64(base + max(room, 0)), side="right"))
            if last == first and self._state.shard_tokens:
                self._next_shard()
                continue
            last = max(last, first + 1)  # a document longer than a whole shard gets one for itself
            stop = int(ends[last - 1])
            self._write(tokens[base:stop], ends[first:last] - np.uint64(base), sizes[first:last], lines[first:last])
            first, base = last, stop

    def _write(
        self, tokens: NDArray[Any], ends: NDArray[np.uint64], sizes: Sequence[int], lines: Sequence[bytes]
    ) -> None:
        state = self._state
        shard_ends = (ends + np.uint64(state.shard_tokens)).astype("<u8")
        self._files[".ds"].write(np.ascontiguousarray(tokens, self._dtype).data)
        self._files[".ds.index"].write(shard_ends.data)
        self._files[".bytes"].write(np.asarray(sizes, "<u8").data)
        self._files[".jsonl"].write(b"".join(lines))
        state.documents += len(ends)
        state.tokens += len(tokens)
        state.bytes += sum(sizes)
        state.shard_tokens += len(tokens)

    def _next_shard(self) -> None:
        self._full += self._files.values()
        self._state.shard += 1
        self._state.shard_tokens = 0
        self._state.lengths = dict.fromkeys(_SUFFIXES, 0)
        self._open()

    def sync(self) -> SplitState:
        """Makes everything appended durable and returns how much that is."""
        for file in (*self._full, *self._files.values()):
            file.sync()
        for file in self._full:
            file.close()
        self._full = []
        sync(self._folder)
        self._state.lengths = {suffix: file.length for suffix, file in self._files.items()}
        return self._state

    def close(self) -> None:
        """Closes the files as they are."""
        for file in (*self._full, *self._files.values()):
            file.close()


def shard_names(split: str, state: SplitState) -> list[str]:
    """The shards of a split, 'train/00000' and so on: the files' names without their suffixes."""
    return [f"{split}/{_name(number)}" for number in range(state.shard + 1)] if state.documents else []


def _name(number: int) -> str:
    return f"{number:05d}"
