"""Parquet tables: one document a row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from perennial.core.errors import UserError
from perennial.data.documents import FILE_START, Document, Fields, Position
from perennial.data.readers.base import Reader, absent_field

_BATCH_BYTES = 4 << 20
_MAX_BATCH_ROWS = 1024


class Parquet(Reader):
    """Reads the text column, the id column and the metadata columns, a few MiB of rows at a time."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"broken": "drop"}]

    def matches(self, relative: str) -> bool:
        """By suffix."""
        return relative.lower().endswith(".parquet")

    def fields(self, path: Path) -> list[str]:
        """The names of the columns."""
        with _open(path) as table:
            return list(table.schema_arrow.names) if table.metadata.num_rows else []

    def read(
        self, path: Path, name: str, fields: Fields, start: Position = FILE_START
    ) -> Iterator[tuple[Document, Position]]:
        """The documents, one per row."""
        with _open(path) as table:
            size = path.stat().st_size
            columns = _columns(path, table, fields)
            num_rows = table.metadata.num_rows
            row, skip, groups = _row_groups_from(table, start.records)
            for batch in _batches(path, table, groups, columns):
                if skip >= batch.num_rows:
                    row, skip = row + batch.num_rows, skip - batch.num_rows
                    continue
                rows = batch.slice(skip)
                row, skip = row + skip, 0
                for document in self._documents(rows, path, name, row, fields):
                    row += 1
                    yield document, Position(row, 0, size * row // num_rows)

    def _documents(self, batch: pa.RecordBatch, path: Path, name: str, row: int, fields: Fields) -> Iterator[Document]:
        names = batch.schema.names
        texts = _texts(batch.column(fields.text))
        identities = batch.column(fields.id).to_pylist() if fields.id else [None] * len(texts)
        metadata = {field: batch.column(field).to_pylist() for field in fields.metadata if field in names}
        for index, text in enumerate(texts):
            number = row + index + 1
            if text is None:
                yield self.reject(
                    path, name, number, f"text is null: field {fields.text!r} (text_field) has no value in this row"
                )
            elif isinstance(text, UnicodeDecodeError):
                yield self.reject(
                    path, name, number, f"not UTF-8: byte 0x{text.object[text.start]:02x} at position {text.start + 1}"
                )
            else:
                identity = f"{name}:{number}" if fields.id is None else str(identities[index])
                found = {field: values[index] for field, values in metadata.items()}
                yield Document(text, identity, found, str(path), number)


def _open(path: Path) -> pq.ParquetFile:
    try:
        # buffer_size reads column chunks piece by piece instead of whole, which keeps large row groups out of memory.
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {error}") from None


def _columns(path: Path, table: pq.ParquetFile, fields: Fields) -> list[str]:
    """The columns to read. Raises UserError for an absent text or id column and for text that is no string."""
    schema = table.schema_arrow
    for setting, field in (("text_field", fields.text), ("id_field", fields.id)):
        if field is not None and field not in schema.names:
            raise UserError(f"{path}: {absent_field(setting, field, schema.names)}")
    kind = schema.field(fields.text).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{path}: field {fields.text!r} (text_field) holds {kind}, not strings")
    wanted = [fields.text, *([fields.id] if fields.id else []), *(f for f in fields.metadata if f in schema.names)]
    return list(dict.fromkeys(wanted))


def _row_groups_from(table: pq.ParquetFile, record: int) -> tuple[int, int, list[int]]:
    """First row of the row group with this record, how many of its rows to pass over, and the groups from there on."""
    first = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if record < first + rows:
            return first, record - first, list(range(group, table.num_row_groups))
        first += rows
    return first, 0, []


def _batches(path: Path, table: pq.ParquetFile, groups: list[int], columns: list[str]) -> Iterator[pa.RecordBatch]:
    for group in groups:
        facts = table.metadata.row_group(group)
        row_bytes = facts.total_byte_size // max(1, facts.num_rows) + 1
        rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // row_bytes))
        try:
            yield from table.iter_batches(batch_size=rows, row_groups=[group], columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged: row group {group + 1} cannot be read: {error}") from None


def _texts(column: pa.Array) -> list[Any]:
    """The strings of a column; None where there is none, the UnicodeDecodeError where bytes are not UTF-8."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_decoded(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | UnicodeDecodeError | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError as error:
        return error
