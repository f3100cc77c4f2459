"""The contract of a reader: the documents of one file, in order, from any position, in bounded memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

from perennial.core.errors import UserError, nearest
from perennial.core.settings import Settings
from perennial.data.documents import FILE_START, Document, Fields, Position

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class Reader(Settings, ABC):
    """Reads files of one format. A reader holds no state: positions are handed out with the documents."""

    EXAMPLES: ClassVar[list[dict[str, Any]]]
    """Settings with which the conformance tests build the reader."""

    broken: Literal["error", "drop"] = "error"
    """A record that cannot be read: 'error' stops and says where; 'drop' leaves it out and logs it."""

    @abstractmethod
    def matches(self, relative: str) -> bool:
        """Whether a file (its path below the input folder, with '/') is of this format."""

    @abstractmethod
    def fields(self, path: Path) -> list[str]:
        """The names of the fields in the file's first record, for messages and checks; [] when it has no record."""

    @abstractmethod
    def read(
        self, path: Path, name: str, fields: Fields, start: Position = FILE_START
    ) -> Iterator[tuple[Document, Position]]:
        """The documents from `start` on, each with the position behind it. `name` begins the default ids."""

    def reject(self, path: Path, name: str, line: int, problem: str) -> Document:
        """A UserError for a record that cannot be read, or (broken: drop) the document that stands for it."""
        if self.broken == "error":
            raise UserError(f"{path}:{line}: {problem}")
        return Document("", f"{name}:{line}", {}, str(path), line, problem.partition(":")[0])


class ByteStream:
    """The bytes of a file, decompressed by its suffix (.gz, .zst), with the position on disk; torn files are errors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        compression = _COMPRESSIONS.get(path.suffix.lower())
        try:
            self._file = pa.OSFile(str(path))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except PermissionError:
            raise UserError(f"{path}: no permission to read it") from None
        self._stream = pa.CompressedInputStream(self._file, compression) if compression else self._file

    def read(self, num_bytes: int) -> bytes:
        """The next bytes: `num_bytes` of them, fewer only at the end of the file."""
        pieces = []
        while num_bytes > 0:
            try:
                piece = self._stream.read(num_bytes)
            except OSError as error:
                if error.errno is not None:
                    raise
                where = f"{self._path}: the compressed file is cut off or damaged"
                raise UserError(f"{where} (after {self.consumed} of its bytes: {error})") from None
            if not piece:
                break
            pieces.append(piece)
            num_bytes -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def skip(self, num_bytes: int) -> None:
        """Passes over bytes, by seeking where the file is not compressed."""
        if self._stream is self._file:
            self._file.seek(num_bytes, 1)
            return
        while num_bytes > 0:
            num_bytes -= len(self.read(min(num_bytes, 1 << 20))) or num_bytes

    @property
    def consumed(self) -> int:
        """Bytes of the file on disk read so far."""
        return int(self._file.tell())

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        self._file.close()


def absent_field(setting: str, field: str, present: Sequence[str]) -> str:
    """'no field 'txt' ...': what to say when a record lacks the field that a setting names."""
    there = f"its fields are {', '.join(map(repr, present))}" if present else "it has no fields"
    return f"no field {field!r} ({setting}): {there}.{nearest(field, present)}"
