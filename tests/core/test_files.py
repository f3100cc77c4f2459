"""Files that are whole or absent: also when the disk is full, the permission missing, or the process killed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from perennial.core import files
from perennial.core.errors import UserError


def _tree(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"abc")
    (folder / "sub" / "b.bin").write_bytes(b"\0" * 3_000_000)
    return folder


def test_write_text_replaces_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    files.write_text(path, "one")
    files.write_text(path, "zw\u00f6lf")
    assert path.read_text(encoding="utf-8") == "zw\u00f6lf"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize(("number", "message"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full")])
def test_a_full_disk_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    path = tmp_path / "file.txt"
    files.write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=message) as caught:
        files.write_text(path, "new")
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    assert isinstance(files.explain(OSError(errno.EROFS, "read-only"), tmp_path), UserError)
    assert isinstance(files.explain(PermissionError(errno.EACCES, "denied"), tmp_path), UserError)
    error = OSError(errno.EIO, "broken")
    assert files.explain(error, tmp_path) is error


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    data = {"b": [1, 2.5, None], "a": "\u00e4"}
    files.write_json(tmp_path / "x.json", data)
    assert files.read_json(tmp_path / "x.json") == data
    assert list(files.read_json(tmp_path / "x.json")) == ["b", "a"]
    with pytest.raises(UserError, match="no such lineage"):
        files.read_json(tmp_path / "y.json", "lineage")
    (tmp_path / "z.json").write_text('{"a": ')
    with pytest.raises(UserError, match="not a readable lineage"):
        files.read_json(tmp_path / "z.json", "lineage")


def test_manifest_holds_sizes_and_hashes_of_everything(tmp_path: Path) -> None:
    folder = _tree(tmp_path / "f")
    manifest = files.write_manifest(folder, {"format": 1})
    assert manifest["format"] == 1
    assert manifest["files"].keys() == {"a.bin", "sub/b.bin"}
    assert manifest["files"]["a.bin"] == {
        "bytes": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    assert files.verify_manifest(folder) == manifest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "sub" / "b.bin").unlink(), "incomplete: sub/b.bin is missing"),
        (lambda f: (f / "a.bin").write_bytes(b"ab"), "a.bin has 2 bytes, 3 were written"),
        (lambda f: (f / "a.bin").write_bytes(b"abd"), "a.bin was changed"),
        (lambda f: (f / files.MANIFEST).unlink(), "no such corpus manifest"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    folder = _tree(tmp_path / "f")
    files.write_manifest(folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        files.verify_manifest(folder, what="corpus")


def test_without_checksums_only_sizes_count(tmp_path: Path) -> None:
    folder = _tree(tmp_path / "f")
    files.write_manifest(folder)
    (folder / "a.bin").write_bytes(b"abd")
    files.verify_manifest(folder, checksums=False)


def test_publish_moves_the_folder_whole(tmp_path: Path) -> None:
    temporary = _tree(tmp_path / ".f.tmp")
    files.write_manifest(temporary)
    files.publish(temporary, tmp_path / "f")
    assert not temporary.exists()
    files.verify_manifest(tmp_path / "f")


def test_remove_tree_never_leaves_half_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _tree(tmp_path / "f")
    real = files.shutil.rmtree

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise KeyboardInterrupt
        real(path, ignore_errors=True)

    monkeypatch.setattr(files.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        files.remove_tree(folder)
    assert not folder.exists()
    monkeypatch.undo()
    _tree(folder)
    files.remove_tree(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_is_whole_or_absent(tmp_path: Path) -> None:
    final, left = tmp_path / "model", tmp_path / "model.partial"
    left.mkdir()
    (left / "old").write_text("of an earlier try")
    with files.new_folder(final) as partial:
        (partial / "new").write_text("x")
        assert not final.exists()
    assert [path.name for path in final.iterdir()] == ["new"]
    with pytest.raises(ZeroDivisionError), files.new_folder(tmp_path / "other"):
        raise ZeroDivisionError
    with pytest.raises(UserError, match="the disk is full"), files.new_folder(tmp_path / "other"):
        raise OSError(errno.ENOSPC, "no space")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
