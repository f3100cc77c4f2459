"""Files that are whole or absent: atomic writes, checksums, manifests.

A folder is written under a temporary name beside its place, synced, given a manifest of hashes last, and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from perennial.core.errors import Unreadable, UserError

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """The file's sha256 in hex; reads in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def relative_to(path: Path, base: Path) -> str:
    """`path` as it is best written in a file that lies in `base`."""
    return os.path.relpath(path, base)


def write_text(path: Path, text: str) -> None:
    """Writes a text file so that readers see the old one or the new one, never a part."""
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise explain(error, path) from error


def check_place(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Raises UserError where `write_text` would fail, or write over one of `inputs`: for long work before it."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give the name of the file to write")
        if path.exists() and any(other.exists() and path.samefile(other) for other in inputs):
            raise UserError(f"{path}: is read as well and would be overwritten; name another file to write")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        temporary = folder / _temporary(path).name
        temporary.touch()  # rights alone do not tell: the system's own folders refuse what they seem to allow
        temporary.unlink()
    except OSError as error:
        explained = explain(error, path)
        if isinstance(explained, UserError):
            raise explained from None
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_json(path: Path, data: Any) -> None:
    """Writes JSON (indented, keys in the given order) as `write_text` does."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str = "file") -> Any:
    """The JSON in a file. Raises UserError that names `what` is missing or broken, Unreadable when that may pass."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Unreadable(f"{path}: no such {what}") from None
    except OSError as error:
        raise Unreadable(f"{path}: not a readable {what}: {error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a readable {what}: {error}") from None


def write_manifest(folder: Path, facts: dict[str, Any] | None = None, at: str = MANIFEST) -> dict[str, Any]:
    """Syncs every file below `folder`, then writes their sizes and sha256 to `folder/at`, last of all."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / at):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest = {**(facts or {}), "files": files}
    write_json(folder / at, manifest)
    return manifest


def verify_manifest(folder: Path, at: str = MANIFEST, what: str = "folder", checksums: bool = True) -> dict[str, Any]:
    """Reads a manifest and checks every file it lists. Raises UserError naming the first missing or changed one.

    That of a file which is missing or shorter than it was is Unreadable.
    """
    manifest: dict[str, Any] = read_json(folder / at, f"{what} manifest")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UserError(f"{folder / at}: not a {what} manifest: it lists no files")
    advice = f"Bring that file back from a copy, or make the {what} again."
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise Unreadable(f"{folder}: the {what} is incomplete: {name} is missing. {advice}")
        size = path.stat().st_size
        if size != facts["bytes"]:
            written = f"has {size} bytes, {facts['bytes']} were written"
            kind = Unreadable if size < facts["bytes"] else UserError
            raise kind(f"{folder}: the {what} is damaged: {name} {written}. {advice}")
        if checksums and sha256(path) != facts["sha256"]:
            changed = "was changed after it was written (sha256 differs)"
            raise UserError(f"{folder}: the {what} is damaged: {name} {changed}. {advice}")
    return manifest


def publish(temporary: Path, final: Path) -> None:
    """Renames a finished folder into its place, durably."""
    for folder in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
        sync(folder)
    os.replace(temporary, final)
    sync(final.parent)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to fill under a temporary name, put into its place when the body ends and removed when it fails.

    What may be left of an earlier try goes first. Raises UserError where `explain` has words for an OSError.
    """
    partial = final.with_name(f"{final.name}.partial")
    if partial.exists():
        remove_tree(partial)
    try:
        partial.mkdir(parents=True)
        yield partial
        publish(partial, final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        explained = explain(error, final) if isinstance(error, OSError) else error
        if explained is error:
            raise
        raise explained from error


def remove_tree(path: Path) -> None:
    """Deletes a folder so that a kill halfway leaves only a temporary name, never half a folder."""
    doomed = path.with_name(f".{path.name}.deleted.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def explain(error: OSError, path: Path) -> UserError | OSError:
    """A full disk, a missing right or a file in the way as a UserError that names the path; others as they are."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{path}: the disk is full; nothing half-written is left. Free some space and run the same command again."
        )
    if error.errno == errno.EFBIG:
        return UserError(
            f"{path}: cannot be written: the limit for the size of a file is reached (see `ulimit -f`); nothing "
            "half-written is left. Raise it and run the same command again."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{path}: cannot be written: {error.strerror}")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UserError(f"{path}: cannot be written: there is a file where it needs a folder")
    return error
