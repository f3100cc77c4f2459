"""One JSON object a line: .jsonl or .ndjson, plain or compressed (.gz, .zst)."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import orjson

from perennial.core.errors import UserError
from perennial.data.documents import FILE_START, Document, Fields, Position
from perennial.data.prefetch import Prefetch
from perennial.data.readers.base import ByteStream, Reader, absent_field

_BLOCK_BYTES = 1 << 20
_BLOCKS_AHEAD = 2
_MAX_LINE_BYTES = 1 << 28
"""A longer line is an error, not an attempt to hold it: memory stays bounded whatever the file is."""
_SUFFIXES = tuple(base + compression for base in (".jsonl", ".ndjson") for compression in ("", ".gz", ".zst"))


class Jsonl(Reader):
    """Reads JSON lines; blank lines are passed over."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"broken": "drop"}]

    def matches(self, relative: str) -> bool:
        """By suffix."""
        return relative.lower().endswith(_SUFFIXES)

    def fields(self, path: Path) -> list[str]:
        """The keys of the first object; [] when the first line is none (reading it gives the error)."""
        with ByteStream(path) as stream:
            for lines, _ in _lines(stream, path):
                for line in lines:
                    if line.strip():
                        return _keys(line)
        return []

    def read(
        self, path: Path, name: str, fields: Fields, start: Position = FILE_START
    ) -> Iterator[tuple[Document, Position]]:
        """The documents, one per line that is not blank."""
        number, offset = start.records, start.offset
        with ByteStream(path) as stream:
            stream.skip(offset)
            for lines, consumed in _lines(stream, path):
                for line in lines:
                    size = len(line) + 1
                    if number == 0:
                        line = line.removeprefix(codecs.BOM_UTF8)
                    number += 1
                    offset += size
                    if line and not line.isspace():
                        yield self._document(line, path, name, number, fields), Position(number, offset, consumed)

    def _document(self, line: bytes, path: Path, name: str, number: int, fields: Fields) -> Document:
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            return self.reject(path, name, number, _what_is_wrong(line, error))
        if not isinstance(record, dict):
            return self.reject(path, name, number, f"not a JSON object: the line is {_a(record)}")
        text = record.get(fields.text)
        if not isinstance(text, str):
            if fields.text not in record:
                return self.reject(path, name, number, absent_field("text_field", fields.text, list(record)))
            return self.reject(
                path, name, number, f"text is no string: field {fields.text!r} (text_field) is {_a(text)}"
            )
        identity = f"{name}:{number}"
        if fields.id is not None:
            if fields.id not in record:
                return self.reject(path, name, number, absent_field("id_field", fields.id, list(record)))
            identity = str(record[fields.id])
        metadata = {field: record[field] for field in fields.metadata if field in record}
        return Document(text, identity, metadata, str(path), number)


def _lines(stream: ByteStream, path: Path) -> Iterator[tuple[list[bytes], int]]:
    """Lists of whole lines without their line feeds, each with the bytes of the file read so far."""
    rest = b""
    consumed = 0
    with contextlib.closing(Prefetch(_blocks(stream), _BLOCKS_AHEAD)) as blocks:
        for block, consumed in blocks:
            lines = block.split(b"\n")
            lines[0] = rest + lines[0]
            rest = lines.pop()
            if len(rest) > _MAX_LINE_BYTES:
                limit = f"{_MAX_LINE_BYTES >> 20} MiB"
                raise UserError(f"{path}: holds a line of more than {limit}; there should be one JSON object a line")
            yield lines, consumed
    if rest:
        yield [rest], consumed


def _blocks(stream: ByteStream) -> Iterator[tuple[bytes, int]]:
    """Runs in a thread of its own: decompressing takes as long as all that comes after it."""
    while block := stream.read(_BLOCK_BYTES):
        yield block, stream.consumed


def _keys(line: bytes) -> list[str]:
    try:
        record = orjson.loads(line.removeprefix(codecs.BOM_UTF8))
    except orjson.JSONDecodeError:
        return []
    return list(record) if isinstance(record, dict) else []


def _what_is_wrong(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as where:
        return f"not UTF-8: byte 0x{line[where.start]:02x} at position {where.start + 1} of the line"
    return f"broken JSON: {error.msg} at position {error.pos + 1} of the line"


def _a(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
    }
    return names.get(type(value), "null")
