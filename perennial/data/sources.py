"""Where the text comes from: the files below the inputs, which reader takes each, and their documents as one stream."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.core.files import sha256
from perennial.core.settings import raise_problems
from perennial.data.documents import FILE_START, Document, Fields, Position
from perennial.data.readers.base import Reader, absent_field

AUTO = "auto"
AnyReader = Reader | str | dict[str, Any]
"""'auto' (by suffix), a reader's name, a mapping with 'name' and its settings, or a reader."""
CHECKSUM_BYTES = 4 << 30
"""Inputs up to this size are known by their contents as well: reading them once more takes seconds."""
_METADATA_CHECK_DOCUMENTS = 1000
_SKIPPED_FOLDERS = ("__pycache__",)


class InputFile(NamedTuple):
    """One file to read."""

    path: Path
    name: str
    """What ids begin with: the path below the input folder, or the file's own name."""
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Input:
    """One of the settings' inputs: a file or a folder, the reader for it, and what it held when it was surveyed."""

    path: Path
    reader: Reader
    num_files: int
    num_bytes: int
    listing: str
    """sha256 over name, size and modification time of every file."""

    def files(self) -> Iterator[InputFile]:
        """The files, in sorted order, one at a time: a folder may hold millions."""
        if self.path.is_file():
            yield _input_file(self.path, self.path.name)
        else:
            yield from (file for file in _walk(self.path, "") if self.reader.matches(file.name))

    def contents(self) -> str | None:
        """sha256 over name and sha256 of every file, which a copy shares; None above `CHECKSUM_BYTES`."""
        if self.num_bytes > CHECKSUM_BYTES:
            return None
        digest = hashlib.sha256()
        for file in self.files():
            digest.update(f"{file.name}\0{sha256(file.path)}\n".encode())
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        facts = {"path": str(self.path), "reader": plugins.dump(self.reader), "files": self.num_files}
        return {**facts, "bytes": self.num_bytes, "listing": self.listing, "contents": self.contents()}


class Place(NamedTuple):
    """A place in the whole stream of documents: files that are done, and how far the next one is."""

    file: int = 0
    position: Position = FILE_START
    done_bytes: int = 0
    """Bytes on disk of the files that are done."""
    checked: int = 0
    """Documents looked at for metadata fields that none of them has."""
    fields: tuple[str, ...] = ()
    """The metadata fields that were found in these."""


BEGINNING = Place()


def survey(paths: Sequence[str | Path], reader: AnyReader) -> list[Input]:
    """Looks at every file of the inputs.

    Raises UserError for what is missing, empty or of no known format.
    """
    if not paths:
        raise UserError("inputs: at least one file or folder is needed")
    if reader == AUTO:
        return [_survey(Path(path), None) for path in paths]
    built, problems = plugins.build("readers", reader, ("reader",))
    raise_problems(problems, "inputs")
    return [_survey(Path(path), built) for path in paths]


def _survey(path: Path, reader: Reader | None) -> Input:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    chosen = reader or _choose_reader(path)
    unknown = Input(path, chosen, 0, 0, "")
    digest, num_files, num_bytes = hashlib.sha256(), 0, 0
    for file in unknown.files():
        digest.update(f"{file.name}\0{file.size}\0{file.modified_ns}\n".encode())
        num_files += 1
        num_bytes += file.size
    if num_files == 0:
        raise UserError(f"{path}: no file in this folder is for the reader '{plugins.name_of(chosen)}'")
    if num_bytes == 0:
        raise UserError(f"{path}: is empty")
    return Input(path, chosen, num_files, num_bytes, digest.hexdigest())


def _choose_reader(path: Path) -> Reader:
    readers: dict[str, Reader] = {name: plugins.load("readers", name)() for name in plugins.names("readers")}
    counts = dict.fromkeys(readers, 0)
    for file in [_input_file(path, path.name)] if path.is_file() else _walk(path, ""):
        for name, reader in readers.items():
            counts[name] += reader.matches(file.name)
    found = [name for name, count in counts.items() if count]
    if len(found) == 1:
        return readers[found[0]]
    choices = ", ".join(readers)
    if not found:
        if path.is_dir() and not any(True for _ in _walk(path, "")):
            raise UserError(f"{path}: the folder is empty")
        what = "the name does not say the format" if path.is_file() else "no file in this folder has a known suffix"
        raise UserError(f"{path}: {what}; say how to read it with 'reader' (one of {choices}, or a dotted name)")
    held = ", ".join(f"{counts[name]} for '{name}'" for name in found)
    raise UserError(
        f"{path}: the folder holds files for several readers ({held}); say which with 'reader', or name the files"
    )


def _walk(folder: Path, prefix: str) -> Iterator[InputFile]:
    """The files below a folder, sorted by name in each, without hidden ones; links to folders are not followed."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
    except PermissionError:
        raise UserError(f"{folder}: no permission to read this folder") from None
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in _SKIPPED_FOLDERS:
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.is_file():
            yield _input_file(Path(entry.path), prefix + entry.name)


def _input_file(path: Path, name: str) -> InputFile:
    facts = path.stat()
    return InputFile(path, printable(name), facts.st_size, facts.st_mtime_ns)


def printable(name: str) -> str:
    """A file name as Unicode text: bytes in it that are not UTF-8 are spelled out."""
    return name.encode("utf-8", "backslashreplace").decode()


def documents(inputs: Sequence[Input], fields: Fields, start: Place = BEGINNING) -> Iterator[tuple[Document, Place]]:
    """Every document from `start` on, each with the place behind it. Raises UserError for a file without any."""
    place, number = start, 0
    for source in inputs:
        for file in source.files():
            number += 1
            if number <= place.file:
                continue
            is_empty = place.position == FILE_START
            for document, position in source.reader.read(file.path, file.name, fields, place.position):
                is_empty = False
                place = _moved(place, position, document, fields, file, source.reader)
                yield document, place
            if is_empty and file.path == source.path:
                raise UserError(f"{file.path}: is empty: there is no document in it")
            if number == sum(source.num_files for source in inputs):
                _check_metadata(place, fields, file, source.reader)
            place = place._replace(file=number, position=FILE_START, done_bytes=place.done_bytes + file.size)


def _moved(
    place: Place, position: Position, document: Document, fields: Fields, file: InputFile, reader: Reader
) -> Place:
    """The place behind the document."""
    if place.checked == _METADATA_CHECK_DOCUMENTS or len(place.fields) == len(fields.metadata) or document.problem:
        return place._replace(position=position)
    found = tuple(field for field in fields.metadata if field in place.fields or field in document.metadata)
    place = place._replace(position=position, checked=place.checked + 1, fields=found)
    if place.checked == _METADATA_CHECK_DOCUMENTS:
        _check_metadata(place, fields, file, reader)
    return place


def _check_metadata(place: Place, fields: Fields, file: InputFile, reader: Reader) -> None:
    """Raises UserError when none of the first documents has a metadata field: it is misspelt, not optional."""
    missing = [field for field in fields.metadata if field not in place.fields]
    if missing and place.checked:
        raise UserError(f"{file.path}: {absent_field('metadata_fields', missing[0], reader.fields(file.path))}")
