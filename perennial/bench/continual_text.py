"""The text of a continual-learning experiment: which corpora shift into which, cut out, tokenized and held out.

A shift is spelled OLD:NEW, where both are names of files in one folder; OLD:halves cuts one corpus into two halves of
its titles (no shift at all), and OLD:years into consecutive years (a stream). Documents are split by title where they
have one, so that no book is trained on and validated on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perennial.core.errors import UserError, nearest
from perennial.core.files import write_text

HALVES, YEARS = "halves", "years"
SLICES = 6
"""Years in a stream."""
VALIDATION, STREAM_VALIDATION = "5%", "15%"
"""Shares of the documents that are held out, of a pair and of a stream: a year has few documents."""
STANDARD = ("novels_en:novels_de", "novels_en:peps", "powershell:peps", "novels_en:halves", "peps:years")
"""The shifts of the reproduction: a strong one, two weak ones, none, and a stream."""
_EXPECTED = {"novels_en:novels_de": "strong", "novels_en:peps": "weak", "powershell:peps": "weak"}


@dataclass(frozen=True)
class Piece:
    """A corpus before it is tokenized: a file or folder, or the part of one that `part` names."""

    name: str
    path: Path
    part: str | None = None
    """'half 0', 'half 1' or 'year 2021'; None: all of it."""


@dataclass(frozen=True)
class Shift:
    """What a model learns first and what comes later."""

    name: str
    """Name of its folder: 'novels_en-novels_de'."""
    pieces: tuple[Piece, ...]
    """In the order in which they arrive: two, or the slices of a stream."""
    kind: str
    """'strong', 'weak', 'none', 'stream', or 'measured': by how much worse the parent does on the new text."""

    @property
    def is_stream(self) -> bool:
        """Whether more than one update follows."""
        return len(self.pieces) > 2


@dataclass(frozen=True)
class Prepared:
    """A shift whose corpora are tokenized."""

    shift: Shift
    corpora: dict[str, Path]
    """Name -> prepared corpus, in the order in which they arrive."""
    train_tokens: dict[str, int]
    """Name -> training tokens it has."""


@dataclass(frozen=True)
class Reading:
    """How the files are read."""

    text_field: str = "text"
    split_by: str | None = None
    """Field that keeps documents together; None: 'title' where the records have one, else each by itself."""
    vocabulary_size: int = 4096
    validation: str | None = None
    """Share of the documents that is held out; None: 5%, of the slices of a stream 15%."""
    max_document_bytes: int = 32768


def standard_shifts(folder: Path, names: Iterable[str] = ()) -> list[Shift]:
    """The shifts of these names (all of the reproduction without any) over the files of a folder. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"--corpora {folder}: no such folder; give one with a file per corpus, or --old and --new")
    files = {path.name.split(".")[0]: path for path in sorted(folder.iterdir()) if not path.name.startswith(".")}
    return [_named_shift(name, files, folder) for name in (list(names) or STANDARD)]


def own_shift(old: Path, new: Path) -> Shift:
    """A shift from one file or folder to another."""
    for option, path in (("--old", old), ("--new", new)):
        if not path.exists():
            raise UserError(f"{option} {path}: no such file or folder")
    if old.resolve() == new.resolve():
        raise UserError(f"--old and --new are both {old}; for halves of one corpus use --corpora and NAME:{HALVES}")
    names = [path.name.split(".")[0] for path in (old, new)]
    if names[0] == names[1]:
        names = [f"{names[0]}_old", f"{names[1]}_new"]
    pieces = tuple(Piece(name, path) for name, path in zip(names, (old, new), strict=True))
    return Shift("-".join(names), pieces, "measured")


def _named_shift(name: str, files: dict[str, Path], folder: Path) -> Shift:
    old, colon, new = name.partition(":")
    if not colon or not old or not new or old == new:
        raise UserError(f"--shifts {name}: write OLD:NEW, OLD:{HALVES} or OLD:{YEARS}, such as {', '.join(STANDARD)}")
    for corpus in (old, *(() if new in (HALVES, YEARS) else (new,))):
        if corpus not in files:
            raise UserError(f"--shifts {name}: {folder} has no corpus '{corpus}'.{nearest(corpus, files)}")
    label = name.replace(":", "-")
    if new == HALVES:
        halves = tuple(Piece(f"{old}_{part}", files[old], f"half {i}") for i, part in enumerate("ab"))
        return Shift(label, halves, "none")
    if new == YEARS:
        return Shift(label, (Piece(old, files[old], YEARS),), "stream")
    return Shift(label, (Piece(old, files[old]), Piece(new, files[new])), _EXPECTED.get(name, "measured"))


def prepare_shift(
    shift: Shift, work: Path, reading: Reading, *, say: Callable[[str], None] = print, quiet: bool = False
) -> Prepared:
    """Cuts out, tokenizes (by a tokenizer trained on the first piece), deduplicates, splits; once per work folder."""
    from perennial.core.progress import Progress
    from perennial.data.corpus import Corpus
    from perennial.data.prepare import PrepareSettings, prepare
    from perennial.data.tokenizers.train import train_tokenizer

    shift = _with_slices(shift, reading)
    texts = {piece.name: _cut_out(piece, work / "text", reading, say) for piece in shift.pieces}
    first = shift.pieces[0].name
    tokenizer = work / "tokenizers" / first
    if not (tokenizer / "tokenizer.json").exists():
        say(f"tokenizer: byte-level BPE, {reading.vocabulary_size} tokens, trained on {first}")
        train_tokenizer(
            [texts[first]], tokenizer, vocabulary_size=reading.vocabulary_size, text_field=reading.text_field
        )
    corpora: dict[str, Path] = {}
    for name, text in texts.items():
        split_by = reading.split_by or ("title" if "title" in _fields_of(text) else None)
        settings = PrepareSettings.model_validate(
            {
                "name": name,
                "inputs": [str(text)],
                "tokenizer": str(tokenizer),
                "text_field": reading.text_field,
                "metadata_fields": [split_by] if split_by else [],
                "split_by": split_by,
                "validation": reading.validation or (STREAM_VALIDATION if shift.is_stream else VALIDATION),
                "max_document_bytes": reading.max_document_bytes,
                "against": [str(path) for path in corpora.values()],
            }
        )
        folder = work / "corpora" / first / name
        with Progress(f"prepare {name}", unit="bytes", quiet=quiet) as line:
            prepare(settings, folder, progress=line)
        corpora[name] = folder
    opened = {name: Corpus.open(folder) for name, folder in corpora.items()}
    for name, corpus in opened.items():
        if corpus.validation.num_tokens == 0:
            raise UserError(f"{name}: nothing is left to validate on; give more text, or documents with other titles")
    return Prepared(shift, corpora, {name: corpus.train.num_tokens for name, corpus in opened.items()})


def _fields_of(path: Path) -> list[str]:
    """The fields of the records in a file or folder; none where the format has no records."""
    from perennial.data.sources import AUTO, survey

    (source,) = survey([path], AUTO)
    return source.reader.fields(next(source.files()).path)


def _with_slices(shift: Shift, reading: Reading) -> Shift:
    """A stream with its years, chosen from the text; another shift as it is. Raises UserError."""
    whole = shift.pieces[0]
    if whole.part != YEARS:
        return shift
    if "year" not in _fields_of(whole.path):
        raise UserError(f"{whole.path}: a stream of years needs records with a field 'year'")
    sizes: Counter[int] = Counter()
    for text, metadata in _records(whole.path, reading, "year"):
        year = str(metadata.get("year") or "")
        if year.isdigit():
            sizes[int(year)] += len(text.encode())
    years = fullest_years(sizes)
    return Shift(shift.name, tuple(Piece(f"{whole.name}_{y}", whole.path, f"year {y}") for y in years), shift.kind)


def fullest_years(sizes: Mapping[int, int], count: int = SLICES) -> list[int]:
    """Of all runs of `count` years in a row, the one whose leanest year holds most; ties go to the most in all.

    sizes: bytes of text by year. Raises UserError when no run of years has text throughout.
    """
    runs = [list(range(first, first + count)) for first in sizes]
    runs = [years for years in runs if all(sizes.get(year) for year in years)]
    if not runs:
        raise UserError(f"a stream needs text in {count} years in a row; there is some in {sorted(sizes)}")
    return max(runs, key=lambda years: (min(sizes[y] for y in years), sum(sizes[y] for y in years), -years[0]))


def _cut_out(piece: Piece, folder: Path, reading: Reading, say: Callable[[str], None]) -> Path:
    """The file that holds the piece: its own, or a part of it written as JSON lines (once)."""
    if piece.part is None:
        return piece.path
    target = folder / f"{piece.name}.jsonl"
    if target.exists():
        return target
    kind, value = piece.part.split()
    group = "year" if kind == "year" else reading.split_by or "title"
    has_title = "title" in _fields_of(piece.path)
    if kind == "half" and group not in _fields_of(piece.path):
        raise UserError(f"{piece.path}: halves are cut by title; name the field that groups documents by --split-by")
    kept = dict.fromkeys([group, *(["title"] if has_title else [])])
    lines = [
        json.dumps({reading.text_field: text, **metadata}, ensure_ascii=False)
        for text, metadata in _records(piece.path, reading, *kept)
        if (str(metadata.get("year")) == value if kind == "year" else half_of(str(metadata.get(group))) == int(value))
    ]
    if not lines:
        raise UserError(f"{piece.path}: no document belongs to {piece.part}")
    say(f"text: {piece.name}, {len(lines):,} documents")
    write_text(target, "\n".join(lines) + "\n")
    return target


def half_of(title: str) -> int:
    """0 or 1, by a hash of the title: which half it falls in does not depend on the others."""
    return hashlib.blake2b(title.encode(), digest_size=1).digest()[0] % 2


def _records(path: Path, reading: Reading, *metadata: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(text, metadata) of every document of a file or folder that can be read."""
    from perennial.data.documents import Fields
    from perennial.data.sources import AUTO, documents, survey

    for document, _ in documents(survey([path], AUTO), Fields(reading.text_field, None, metadata)):
        if document.problem is None:
            yield document.text, document.metadata
