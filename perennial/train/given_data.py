"""What `continue` is given as data: raw text, which is prepared first, or corpora that are prepared already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perennial.core.errors import UserError
from perennial.core.lineage import has_lineage
from perennial.core.progress import Progress
from perennial.core.settings import check, raise_problems
from perennial.data.corpus import Corpus


def check_given(checkpoint: Path, data: Mapping[str, Path]) -> None:
    """Raises UserError for a damaged checkpoint, and for data that are neither text nor corpora of its tokenizer.

    A model from elsewhere is loaded and compared with `transformers`, by one process.
    """
    from perennial.train.checkpoint import verify
    from perennial.train.measuring import open_for

    verify(checkpoint)
    for name, path in data.items():
        if (path / "resolved.json").is_file() or (path / "model.safetensors").is_file():
            raise UserError(f"{name}={path}: this is a run or a checkpoint, not text or a prepared corpus")
        if not path.exists() and not _is_being_prepared(path):
            raise UserError(f"{name}={path}: no such file or folder")
    open_for(checkpoint, {n: p for n, p in data.items() if is_prepared(p) or _is_being_prepared(p)})
    if not has_lineage(checkpoint) and os.environ.get("RANK", "0") == "0":
        from perennial.evals.parity import checked_parity  # it loads torch, which deriving a recipe does without

        checked_parity(checkpoint)


def is_prepared(path: Path) -> bool:
    """Whether a path is a finished prepared corpus."""
    return (path / "manifest.json").is_file()


def _is_being_prepared(path: Path) -> bool:
    return path.suffix == ".partial" or path.with_name(f"{path.name}.partial").exists()


def prepared(
    name: str,
    path: Path,
    *,
    checkpoint: Path,
    out: Path,
    text_field: str,
    validation: str,
    against: list[Path],
    quiet: bool,
) -> Path:
    """`path` when it is a prepared corpus; else its text prepared into OUT/corpora/NAME with the parent's tokenizer.

    `against`: corpora whose documents are left out of it. Raises UserError.
    """
    from perennial.data.prepare import PrepareSettings, prepare

    if is_prepared(path):
        return path
    asked = {
        "name": name,
        "inputs": [str(path)],
        "tokenizer": str(checkpoint),
        "text_field": text_field,
        "validation": validation,
        "against": [str(p) for p in against],
        **_cut_like(against),
    }
    settings, problems = check(PrepareSettings, asked)
    raise_problems(problems, f"preparing {name}={path}")
    assert settings is not None
    folder = out / "corpora" / name
    with Progress(f"prepare {name}", unit="bytes", quiet=quiet) as line:
        prepare(settings, folder, progress=line)
    return folder


def prepared_data(
    data: Mapping[str, Path], stand_ins: Mapping[str, Path], old: Mapping[str, Path], how: Mapping[str, Any]
) -> tuple[dict[str, Path], dict[str, Path]]:
    """(what stands in for old data, the new data) as prepared corpora; `how`: further arguments of `prepared`.

    Documents of the `old` corpora are left out, in the new data those of the stand-ins too.
    """
    replayed = {n: prepared(n, p, against=list(old.values()), **how) for n, p in stand_ins.items()}
    known = [*old.values(), *replayed.values()]
    return replayed, {n: prepared(n, p, against=known, **how) for n, p in data.items()}


def _cut_like(corpora: list[Path]) -> dict[str, Any]:
    """The size at which the parent's documents were cut: duplicates are found part by part."""
    for path in corpora:
        settings = Corpus.open(path).manifest.get("settings", {})
        if "max_document_bytes" in settings:
            return {"max_document_bytes": settings["max_document_bytes"]}
    return {}
