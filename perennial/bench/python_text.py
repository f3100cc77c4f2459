"""Real text that every machine has: the documentation (old) and the source code (new) of this Python installation.

Old is prose: the docstrings of the standard library and of the installed packages, and the language reference that
`pydoc` shows; examples, tables and signatures are left out. New is the code of the same files with the docstrings taken
out, so that going from old to new is a real shift. Documents are cut to at most 8 KB; all documents of a module share
the field `module`. The same installation gives the same text.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import os
import platform
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perennial.core import files
from perennial.core.progress import Progress

TARGET_BYTES = 8_000_000
"""Text of each kind: some 2M tokens, about what one of the demo's runs takes on two cores."""
DOCUMENT_BYTES = 8000
_MIN_DOCUMENT_BYTES = 400
_MIN_PROSE_SHARE = 0.12
"""Share of a package's file between triple quotes from which it is worth parsing; standard library files always are."""
_MAX_FILE_BYTES = 400_000
_MAX_LINE = 1000
"""Files with longer lines are data rather than code."""
_SKIPPED_FOLDERS = {"test", "tests", "testing", "encodings", "_vendor", "pydoc_data", "site-packages", "dist-packages"}
_GENERATED = re.compile(r"auto-?\s?generated|generated (by|from)|do not (edit|modify)", re.IGNORECASE)
_STDLIB = "standard library"
_RECORD = "sources.json"
_Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def extract(
    out: Path,
    *,
    target_bytes: int = TARGET_BYTES,
    roots: list[tuple[str, Path]] | None = None,
    quiet: bool = False,
) -> dict[str, Path]:
    """Writes old.jsonl and new.jsonl (id, module, text) into `out` and returns {'old': path, 'new': path}.

    Does nothing when they are there already; sources.json, written last, says what they hold. `roots` are (name,
    folder) pairs in place of the standard library and the installed packages.
    """
    paths = {"old": out / "old.jsonl", "new": out / "new.jsonl"}
    if (out / _RECORD).exists():
        return paths
    texts = {kind: _Text(target_bytes) for kind in paths}
    seen: set[bytes] = set()
    with Progress("text", total=2 * target_bytes, unit="bytes", quiet=quiet) as progress:
        for module, found in _topics() if roots is None else ():
            texts["old"].add("pydoc topics", module, _joined(_unseen(found, seen), "\n\n"))
        for package, module, source in _sources(_installed() if roots is None else roots):
            tree = parse(source)
            if tree is None:
                continue
            texts["old"].add(package, module, _joined(_unseen(prose(tree), seen), "\n\n"))
            texts["new"].add(package, module, code(tree, source.split("\n")))
            progress.update(sum(min(t.size, target_bytes) for t in texts.values()))
            if all(t.size >= target_bytes for t in texts.values()):
                break
    for kind, path in paths.items():
        files.write_text(path, "".join(texts[kind].lines))
    facts = {kind: {"documents": len(t.lines), "bytes": t.size, "packages": t.packages} for kind, t in texts.items()}
    files.write_json(out / _RECORD, {"python": platform.python_version(), **facts})
    return paths


@dataclass
class _Text:
    """The documents of one kind so far; takes no more when it is full."""

    target: int
    lines: list[str] = field(default_factory=list)
    packages: dict[str, int] = field(default_factory=dict)
    size: int = 0

    def add(self, package: str, module: str, documents: Iterable[str]) -> None:
        """Takes in a module's documents."""
        if self.size >= self.target:
            return
        for index, text in enumerate(documents):
            size = len(text.encode())
            if size < _MIN_DOCUMENT_BYTES:
                continue
            record = {"id": f"{module}#{index}", "module": module, "text": text}
            self.lines.append(json.dumps(record, ensure_ascii=False) + "\n")
            self.size += size
            self.packages[package] = self.packages.get(package, 0) + size


# Where the text comes from


def _installed() -> list[tuple[str, Path]]:
    """The standard library, then every installed package that has its own folder: (name, folder)."""
    roots = [(_STDLIB, Path(sysconfig.get_path("stdlib")))]
    for site in dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib")):
        folders = sorted(p for p in Path(site).iterdir() if (p / "__init__.py").is_file())
        roots += [(p.name, p) for p in folders if p.name not in _SKIPPED_FOLDERS]
    return roots


def _sources(roots: list[tuple[str, Path]]) -> Iterator[tuple[str, str, str]]:
    """(package, module, source) of the first root, then of the others in turn, so that no package takes it all."""
    yield from _package(*roots[0], min_share=0.0)
    others = [_package(name, folder, min_share=_MIN_PROSE_SHARE) for name, folder in roots[1:]]
    for group in itertools.zip_longest(*others):
        yield from (found for found in group if found is not None)


def _package(name: str, folder: Path, min_share: float) -> Iterator[tuple[str, str, str]]:
    """(package, module, source) of a package's files that are worth parsing, in an order that mixes its subpackages."""
    found: list[tuple[bytes, str, Path]] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS and f.isidentifier()]
        for file in names:
            path = Path(parent, file)
            if file.endswith(".py") and file != "conftest.py":
                parts = ["" if name == _STDLIB else name, *path.relative_to(folder).with_suffix("").parts]
                module = ".".join(p for p in parts if p and p != "__init__")
                found.append((hashlib.blake2b(module.encode(), digest_size=8).digest(), module, path))
    for _, module, path in sorted(found):
        source = _read(path)
        if source is not None and sum(map(len, source.split('"""')[1::2])) >= min_share * len(source):
            yield name, module, source


def _read(path: Path) -> str | None:
    """A source file, or None when it is not UTF-8, too large, generated, or has lines that no person wrote."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            return None
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if _GENERATED.search(source, 0, 1500) or max(map(len, source.splitlines()), default=0) > _MAX_LINE:
        return None
    return source


def _topics() -> Iterator[tuple[str, list[str]]]:
    """The language reference that `pydoc` shows, by topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for name in sorted(topics):
        yield f"topics.{name}", list(paragraphs(topics[name]))


def parse(source: str) -> ast.Module | None:
    """The syntax tree of a source text, or None when this Python cannot parse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the packages' own invalid escapes
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None


# Prose


def prose(tree: ast.Module) -> list[str]:
    """The paragraphs of prose in a module's docstrings, in the order of the file."""
    docstrings = [d for d in map(_docstring, _scopes(tree)) if d is not None]
    docstrings.sort(key=lambda d: d.lineno)
    return [paragraph for d in docstrings for paragraph in paragraphs(str(d.value))]


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a documentation text that are prose; examples, tables, headings and formulas are not."""
    first, _, rest = text.expandtabs().partition("\n")
    block: list[str] = []
    example_indent: int | None = None  # indentation of the line that introduces an example
    in_fence = False
    for line in [*(first.strip() + "\n" + textwrap.dedent(rest)).split("\n"), ""]:
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if stripped.startswith("```"):
            in_fence = not in_fence
            continue
        if in_fence or (stripped and example_indent is not None and indent > example_indent):
            continue
        if stripped:
            example_indent = None
            block.append(line.rstrip())
            continue
        if block:
            last = block[-1]
            if last.endswith("::") or last.lstrip().startswith(".. "):
                example_indent = len(last) - len(last.lstrip())
            if is_prose(block):
                yield textwrap.dedent("\n".join(block)).replace("::", ":")
            block = []


def is_prose(lines: list[str]) -> bool:
    """True for lines that read as sentences: eight words or more, made of letters for the most part."""
    text = " ".join(line.strip() for line in lines)
    if ">>>" in text or text.startswith((".. ", "#", "|", "+-")) or len(text.split()) < 8:
        return False
    letters = sum(map(str.isalpha, text))
    return letters + text.count(" ") >= 0.85 * len(text) and letters >= 3 * text.count(" ")


def _unseen(found: list[str], seen: set[bytes]) -> list[str]:
    """The paragraphs that did not come before: packages repeat the same description of an argument many times."""
    fresh = []
    for paragraph in found:
        digest = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=12).digest()
        if digest not in seen:
            seen.add(digest)
            fresh.append(paragraph)
    return fresh


# Code


def code(tree: ast.Module, lines: list[str]) -> Iterator[str]:
    """The source without its docstrings and its licence header, cut where functions and classes begin."""
    kept: list[str | None] = [line.rstrip() for line in lines]
    starts: set[int] = set()
    for scope in _scopes(tree):
        docstring = _docstring(scope)
        if docstring is not None:
            _take_out(kept, docstring, is_alone=len(scope.body) == 1)
        if not isinstance(scope, ast.Module):
            starts.add(min([scope.lineno, *(d.lineno for d in scope.decorator_list)]) - 1)
    header = next((i for i, line in enumerate(kept) if line is not None and not line.startswith("#")), 0)
    if re.search("licen[sc]e|copyright", "\n".join(line or "" for line in kept[:header]), re.IGNORECASE):
        kept[:header] = [None] * header
    cuts = sorted({0, *starts, len(kept)})
    pieces = ["\n".join(line for line in kept[a:b] if line is not None) for a, b in itertools.pairwise(cuts)]
    for document in _joined([piece for piece in pieces if piece.strip() and not is_table(piece)], "\n"):
        yield re.sub(r"\n{4,}", "\n\n\n", document).strip("\n") + "\n"


def is_table(piece: str) -> bool:
    """True for a long stretch of source that is data: mostly digits, quotes and punctuation."""
    return len(piece) > 2000 and sum(map(str.isalpha, piece)) < 0.4 * (len(piece) - piece.count(" "))


def _take_out(kept: list[str | None], docstring: ast.Constant, *, is_alone: bool) -> None:
    """Drops a docstring's lines, where it has them to itself; leaves `pass` when nothing else is there."""
    assert docstring.end_lineno is not None
    first, last = docstring.lineno - 1, docstring.end_lineno - 1
    before = (kept[first] or "").encode()[: docstring.col_offset]
    after = (kept[last] or "").encode()[docstring.end_col_offset :]
    if before.strip() or after.strip():
        return
    kept[first : last + 1] = [None] * (last + 1 - first)
    if is_alone:
        kept[first] = before.decode() + "pass"


# Both


def _scopes(tree: ast.Module) -> Iterator[_Scope]:
    """The module and every class and function in it; looks into statements only, which spares most of the tree."""
    left: list[Any] = [tree]
    while left:
        node = left.pop()
        if isinstance(node, _Scope):
            yield node
        for name in ("body", "orelse", "handlers", "finalbody"):
            left += getattr(node, name, ())


def _docstring(scope: _Scope) -> ast.Constant | None:
    """The docstring of a module, class or function as a node."""
    first = scope.body[0] if scope.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first.value
    return None


def _joined(pieces: list[str], separator: str) -> Iterator[str]:
    """Pieces put together to documents of at most 8 KB, or of one piece that is longer."""
    document: list[str] = []
    size = 0
    for piece in pieces:
        length = len(piece.encode()) + len(separator)
        if document and size + length > DOCUMENT_BYTES:
            yield separator.join(document)
            document, size = [], 0
        document.append(piece)
        size += length
    if document:
        yield separator.join(document)
