"""A document: one text with its id and where it came from; when two are the same; where a long one is cut."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

DIGEST_ALGORITHM = "blake2b-128 of UTF-8, line ends LF, outer white space stripped, 1"
"""Names `content_digest`; stored with every index of digests, so that one made by another rule is refused."""

_PARAGRAPH_ENDS = (b"\n\n", b"\r\n\r\n", b"\n")


class Document(NamedTuple):
    """One text as a reader found it."""

    text: str
    id: str
    metadata: dict[str, Any]
    file: str
    line: int
    """Line, row or piece in the file, from 1."""
    problem: str | None = None
    """Why the reader could not take it (the text is then empty); such a document is dropped and logged."""


class Fields(NamedTuple):
    """Which fields of a record hold the text, the id and the metadata to keep."""

    text: str = "text"
    id: str | None = None
    """None: the file's name and the line."""
    metadata: tuple[str, ...] = ()


class Position(NamedTuple):
    """How far a file has been read: enough to go on from there."""

    records: int = 0
    """Lines, rows or pieces before this position."""
    offset: int = 0
    """Bytes of (decompressed) content before this position, where the reader counts them."""
    consumed: int = 0
    """Bytes of the file as it lies on disk that have been read, for progress only."""


FILE_START = Position()


def content_digest(utf8: bytes) -> bytes:
    """16 bytes that say which text it is: equal for texts that differ in line ends or in the white space around them.

    Copies of one file differ in that and should count as one; white space inside lines is content (indentation is, in
    source code). A cryptographic digest, because a collision, by chance or on purpose, would lose a document unseen.
    """
    if b"\r" in utf8:
        utf8 = utf8.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return hashlib.blake2b(utf8.strip(), digest_size=16).digest()


def is_blank(text: str) -> bool:
    """Whether there is nothing but white space in the text."""
    return not text or text.isspace()


def cut(text: str, utf8: bytes, max_bytes: int) -> list[str]:
    """The text in parts of at most `max_bytes` UTF-8 bytes, of about equal size, cut where a paragraph or line ends."""
    if len(utf8) <= max_bytes:
        return [text]
    parts, start = [], 0
    while start < len(utf8):
        end = start + cut_point(utf8[start : start + max_bytes + 1], max_bytes, len(utf8) - start)
        parts.append(utf8[start:end].decode())
        start = end
    return parts


def cut_point(utf8: bytes, max_bytes: int, remaining: int) -> int:
    """Where the first part of a text of `remaining` bytes, which begins with `utf8`, ends.

    Blank lines are tried first, then line ends, each nearest below an equal share of the text (not below half of it),
    then above; then any border between characters.
    """
    if remaining <= max_bytes:
        return remaining
    share = -(-remaining // -(-remaining // max_bytes))
    for separator in _PARAGRAPH_ENDS:
        at = utf8.rfind(separator, share // 2, share)
        if at < 0:
            at = utf8.find(separator, share - len(separator), max_bytes)
        if at >= 0:
            return at + len(separator)
    # A character has at most 4 bytes; all but its first match 10xxxxxx.
    return next((end for end in range(share, share - 4, -1) if utf8[end] & 0xC0 != 0x80), share)
