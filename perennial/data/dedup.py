"""Exact deduplication: an index of the kept documents' digests, on disk, in memory only as far as its cache.

`Journal` is the index of a corpus in the making. It also holds the progress of the preparation, because the two must
change together: one SQLite transaction records a stretch of documents as kept and as written, or neither.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from perennial.core.errors import UserError
from perennial.data.documents import DIGEST_ALGORITHM

INDEX = "digests.sqlite"
_CACHE_KIB = 64 * 1024
_MAX_VARIABLES = 512
_TABLES = (
    "CREATE TABLE {}digests (digest BLOB PRIMARY KEY) WITHOUT ROWID",
    "CREATE TABLE {}facts (algorithm TEXT)",
)


class DigestIndex:
    """The digests of a finished corpus, opened for reading."""

    def __init__(self, corpus: Path) -> None:
        path = corpus / INDEX
        if not path.is_file():
            raise UserError(f"{corpus}: not a prepared corpus to deduplicate against: it has no {INDEX}")
        try:
            self._connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
            (algorithm,) = self._connection.execute("SELECT algorithm FROM facts").fetchone()
        except (sqlite3.Error, TypeError) as error:
            raise UserError(f"{path}: not a readable index of digests: {error}") from None
        if algorithm != DIGEST_ALGORITHM:
            raise UserError(
                f"{path}: made with '{algorithm}', this version compares by '{DIGEST_ALGORITHM}'; prepare it again"
            )

    def known(self, digests: Sequence[bytes]) -> set[bytes]:
        """Those of the digests that the corpus has."""
        return _known(self._connection, digests)

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()


class Journal:
    """The digests and the progress of a corpus in the making; both become durable together, at `commit`."""

    def __init__(self, path: Path) -> None:
        try:
            self._connection = sqlite3.connect(path, timeout=0.5, isolation_level=None)
            # EXCLUSIVE keeps a second preparation out while this one lives; the lock dies with the process.
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            self._connection.execute("BEGIN IMMEDIATE")
            self._create()
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise UserError(f"{path.parent}: another process is preparing this corpus") from None
            raise

    def _create(self) -> None:
        if not self._connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            for statement in _TABLES:
                self._connection.execute(statement.format(""))
            self._connection.execute("INSERT INTO facts VALUES (?)", (DIGEST_ALGORITHM,))
            self._connection.execute("CREATE TABLE progress (state TEXT)")

    def known(self, digests: Sequence[bytes]) -> set[bytes]:
        """Those of the digests that were added before."""
        return _known(self._connection, digests)

    def add(self, digests: Iterable[bytes]) -> None:
        """Adds digests; lost unless a `commit` follows."""
        self._connection.executemany("INSERT INTO digests VALUES (?)", ((digest,) for digest in digests))

    def progress(self) -> dict[str, Any] | None:
        """The progress at the last commit, or None when there was none."""
        row = self._connection.execute("SELECT state FROM progress").fetchone()
        return json.loads(row[0]) if row else None

    def commit(self, progress: dict[str, Any]) -> None:
        """Makes the digests added so far and this progress durable, as one."""
        self._connection.execute("DELETE FROM progress")
        self._connection.execute("INSERT INTO progress VALUES (?)", (json.dumps(progress),))
        self._connection.execute("COMMIT")
        self._connection.execute("BEGIN IMMEDIATE")

    def export(self, path: Path) -> None:
        """Writes the index of the finished corpus: the same bytes however often the work was interrupted."""
        path.unlink(missing_ok=True)
        self._connection.execute("COMMIT")
        self._connection.execute("ATTACH DATABASE ? AS final", (str(path),))
        self._connection.execute("PRAGMA final.journal_mode = OFF")
        self._connection.execute("PRAGMA final.synchronous = OFF")  # the caller syncs every file at the end
        self._connection.execute("BEGIN IMMEDIATE")
        for statement in _TABLES:
            self._connection.execute(statement.format("final."))
        self._connection.execute("INSERT INTO final.digests SELECT digest FROM main.digests ORDER BY digest")
        self._connection.execute("INSERT INTO final.facts SELECT algorithm FROM main.facts")
        self._connection.execute("COMMIT")
        self._connection.execute("DETACH DATABASE final")
        self._connection.execute("BEGIN IMMEDIATE")

    def close(self) -> None:
        """Closes the file; what was not committed is forgotten."""
        self._connection.close()


def _known(connection: sqlite3.Connection, digests: Sequence[bytes]) -> set[bytes]:
    found: set[bytes] = set()
    for start in range(0, len(digests), _MAX_VARIABLES):
        some = digests[start : start + _MAX_VARIABLES]
        marks = ",".join("?" * len(some))
        found.update(
            row[0] for row in connection.execute(f"SELECT digest FROM digests WHERE digest IN ({marks})", some)
        )
    return found
