"""Plain text and source files: one document a file, the whole of a folder in sorted order."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from pydantic import Field

from perennial.core.errors import UserError
from perennial.data.documents import FILE_START, Document, Fields, Position, cut_point
from perennial.data.readers.base import ByteStream, Reader

_PIECE_BYTES = 16 << 20
"""A longer file is read as several documents, cut at blank lines, so that its size does not decide the memory."""

_PROSE = "txt text md markdown rst tex org adoc"
_SOURCE = (
    "c cc cpp cs cu cxx f90 go h hh hpp hs java jl js jsx kt lua ml php pl pm ps1 py pyi pyx r rb rs scala sh sql "
    "swift ts tsx"
)


class Text(Reader):
    """Reads text files; metadata fields are 'path' (below the input folder) and 'folder' (all but its name)."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"glob": ["*.txt", "docs/*"], "broken": "drop"}]

    glob: list[str] = Field(default=[f"*.{suffix}" for suffix in f"{_PROSE} {_SOURCE}".split()], min_length=1)
    """Which files of a folder: patterns for the name, or with a '/' for the path below the folder."""

    def matches(self, relative: str) -> bool:
        """By the patterns; upper and lower case count the same."""
        path = relative.lower()
        name = path.rpartition("/")[2]
        return any(fnmatchcase(path if "/" in pattern else name, pattern.lower()) for pattern in self.glob)

    def fields(self, path: Path) -> list[str]:
        """What a file has besides its text."""
        return ["text", "path", "folder"]

    def read(
        self, path: Path, name: str, fields: Fields, start: Position = FILE_START
    ) -> Iterator[tuple[Document, Position]]:
        """One document, or for a file of more than 16 MiB several, with ids 'name#0', 'name#1' ..."""
        if fields.id is not None:
            raise UserError(
                f"id_field {fields.id!r}: a text file has no fields; its path is its id, so leave id_field out"
            )
        known = {"path": name, "folder": PurePosixPath(name).parent.as_posix()}
        metadata = {field: known[field] for field in fields.metadata if field in known}
        piece, offset = start.records, start.offset
        with ByteStream(path) as stream:
            stream.skip(offset)
            data = stream.read(_PIECE_BYTES + 1)
            is_one = piece == 0 and len(data) <= _PIECE_BYTES
            while data or piece == 0:
                end = len(data) if len(data) <= _PIECE_BYTES else cut_point(data, _PIECE_BYTES, 2 * _PIECE_BYTES)
                piece += 1
                identity = name if is_one else f"{name}#{piece - 1}"
                document = self._document(data[:end], path, name, identity, metadata, piece, offset)
                offset += end
                yield document, Position(piece, offset, offset)
                data = data[end:] + stream.read(end)

    def _document(
        self, data: bytes, path: Path, name: str, identity: str, metadata: dict[str, Any], piece: int, offset: int
    ) -> Document:
        try:
            text = (data.removeprefix(codecs.BOM_UTF8) if offset == 0 else data).decode()
        except UnicodeDecodeError as error:
            where = f"byte 0x{data[error.start]:02x} at offset {offset + error.start}"
            hint = "convert the file to UTF-8, or leave such files out: perennial prepare --reader 'text broken=drop'"
            return self.reject(path, name, piece, f"not UTF-8: {where}; {hint}")
        return Document(text, identity, metadata, str(path), piece)
