"""What some continuations do around their run: choose a part of the new text before, average with the parent after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perennial.core.amounts import parse
from perennial.train.given_data import prepared

_HELD_OUT = 4
"""Documents that are held out at least."""


def best_part(
    checkpoint: Path, fresh: Mapping[str, Path], share: float | None, how: Mapping[str, Any]
) -> dict[str, Path]:
    """The part of each new corpus that the parent finds likeliest, prepared in the run folder; all without a `share`.

    how: further arguments of `prepared`. What an earlier call has chosen is taken as it is.
    """
    if share is None:
        return dict(fresh)
    from perennial.train.selecting import select

    parts = {}
    for name, path in fresh.items():
        text = how["out"] / "corpora" / f"{name}-best.jsonl"
        if not text.exists():
            select(path, checkpoint, text, keep=f"{share:.6%}", quiet=how["quiet"])
        enough = _validation(text, how["validation"])
        parts[f"{name}-best"] = prepared(f"{name}-best", text, **{**how, "text_field": "text", "validation": enough})
    return parts


def _validation(text: Path, asked: str) -> str:
    """The share to hold out: what was asked for, but of few documents enough to have some."""
    with open(text, "rb") as lines:
        number = sum(1 for _ in lines)
    try:
        share = parse(asked, ("share",)).value
    except ValueError:
        return asked  # told when the text is prepared
    return f"{max(share, min(0.5, _HELD_OUT / max(1, number))):.4%}"


def average_with_parent(
    out: Path, checkpoint: Path, old: Mapping[str, Path], new: Mapping[str, Path], *, quiet: bool = False
) -> dict[str, Any]:
    """Writes OUT/averaged, the average of a finished run and its parent with the lowest mean of old and new losses."""
    from perennial.train.merging import merge
    from perennial.train.merging_search import Search

    target = out / "averaged"
    if target.exists():
        return {"out": str(target)}
    old = {name: path for name, path in old.items() if name not in new}  # one that goes on counts as new
    if not old:
        return merge([checkpoint, out], target, quiet=quiet)
    importance = {**{n: 0.5 / len(old) for n in old}, **{n: 0.5 / len(new) for n in new}}
    return merge([checkpoint, out], target, search=Search({**old, **new}, importance), quiet=quiet)
