"""law.json: a fitted law with everything it takes to predict again, and the version of that form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import perennial
from perennial.core import files, plugins
from perennial.core.errors import UserError
from perennial.core.files import read_json, write_json
from perennial.scaling.choosing import Blend, Member
from perennial.scaling.fitting import Fit

FORMAT = "perennial law"
VERSION = 1
_NAMES = ("coefficients", "objective", "mape", "active_bounds", "identifiable", "reason", "num_rows", "noise", "level")


def save(path: Path, fitted: Fit | Blend, *, table: dict[str, Any] | None = None) -> None:
    """Writes a law file, whole or not at all; `table` says what it was fitted to."""
    head = {"format": FORMAT, "version": VERSION, "written_by": f"perennial {perennial.__version__}"}
    write_json(path, {**head, "table": table or {}, "law": to_json(fitted)})


def check_place(path: Path, tables: Sequence[Path]) -> None:
    """Raises UserError where a law cannot be saved, or would overwrite a table or any other file that is no law."""
    files.check_place(path, tables)
    if path.exists() and not _may_go(path):
        raise UserError(f"{path}: is there already and is no law file; name another, or remove it first")


def _may_go(path: Path) -> bool:
    """Whether a file is a law file of any version, or empty."""
    if not path.is_file():
        return False
    try:
        data = read_json(path) if path.stat().st_size else {"format": FORMAT}
    except UserError:
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


def load(path: Path) -> Fit | Blend:
    """The law in a file. Raises UserError for anything but a law file of this version."""
    data = read_json(path, "law file")
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path}: not a law file; `perennial laws fit ... --out law.json` writes one")
    if data.get("version") != VERSION:
        raise UserError(
            f"{path}: a law file of version {data.get('version')!r}; this perennial reads version {VERSION}. "
            "Fit the table again with `perennial laws fit`"
        )
    try:
        return from_json(data["law"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: the law file is damaged: {type(error).__name__}: {error}") from None


def to_json(fitted: Fit | Blend) -> dict[str, Any]:
    """The law as JSON-ready data."""
    if isinstance(fitted, Fit):
        plain = {name: vars(fitted)[name] for name in _NAMES}
        return {
            "law": plugins.dump(fitted.law),
            **plain,
            "is_relative": fitted.is_relative,
            "intervals": {name: list(pair) for name, pair in fitted.intervals.items()},
            "range": {name: list(pair) for name, pair in fitted.range.items()},
            "samples": [[float(f"{x:.12g}") for x in row] for row in fitted.samples.tolist()],
        }
    members = [
        {"name": m.name, "weight": m.weight, "left_out_mape": list(m.left_out_mape), "fit": to_json(m.fit)}
        for m in fitted.members
    ]
    plain = {name: vars(fitted)[name] for name in ("mape", "left_out_mape", "stray", "reach")}
    return {"members": members, **plain}


def from_json(data: dict[str, Any]) -> Fit | Blend:
    """What `to_json` wrote."""
    if "members" in data:
        members = [
            Member(str(m["name"]), _fit(m["fit"]), float(m["weight"]), tuple(m["left_out_mape"]))
            for m in data["members"]
        ]
        return Blend(tuple(members), data["mape"], data["left_out_mape"], data["stray"], data["reach"])
    return _fit(data)


def _fit(data: dict[str, Any]) -> Fit:
    law, problems = plugins.build("laws", data["law"])
    if problems:
        raise ValueError(problems[0].message)
    return Fit(
        law=law,
        intervals={name: (pair[0], pair[1]) for name, pair in data["intervals"].items()},
        range={name: (pair[0], pair[1]) for name, pair in data["range"].items()},
        samples=np.array(data["samples"], dtype=np.float64).reshape(-1, len(law.coefficients)),
        is_relative=bool(data["is_relative"]),
        **{name: data[name] for name in _NAMES},
    )
