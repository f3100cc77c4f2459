"""What a run does about damaged checkpoints of its own: it sets them aside and goes on from the one before."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from perennial.core import files
from perennial.core.errors import UserError
from perennial.core.lineage import STATE_FOLDER, checkpoints_of
from perennial.train import checkpoint

SUFFIX = ".damaged"


@dataclass(frozen=True)
class SetAside:
    """A damaged checkpoint under its new name."""

    tokens: int
    name: str
    reason: str


def sound_checkpoints(folder: Path, recipe_hash: str) -> tuple[list[Path], list[SetAside]]:
    """The run's checkpoints, oldest first and the newest of them whole, and those that had to be set aside.

    A damaged one is renamed, never deleted. Raises UserError when the newest is another run's, with the way to go on,
    and OSError when it cannot be read at all: that is no damage.
    """
    aside: list[SetAside] = []
    while saved := checkpoints_of(folder):
        newest = saved[-1]
        _check_own(newest, recipe_hash, saved)
        try:
            checkpoint.verify(newest)
        except UserError as error:
            aside.append(_set_aside(newest, str(error)))
        else:
            break
    return saved, aside


def _check_own(path: Path, recipe_hash: str, saved: list[Path]) -> None:
    """Raises UserError when a checkpoint says that it belongs to another recipe; a broken one says nothing."""
    try:
        state = files.read_json(path / STATE_FOLDER / "state.json", "checkpoint state")
    except UserError:
        return
    if isinstance(state, dict) and state.get("recipe_hash", recipe_hash) != recipe_hash:
        before = f"from the one before it ({saved[-2].name})" if len(saved) > 1 else "from the beginning"
        try:
            checkpoint.verify(path)
            checkpoint.load_progress(path, recipe_hash)
        except UserError as error:
            raise UserError(f"{error}\nTo go on {before}, delete {path}.") from None


def _set_aside(path: Path, reason: str) -> SetAside:
    names = (f"{path.name}{SUFFIX}{f'-{number}' if number > 1 else ''}" for number in range(1, 1 << 30))
    name = next(name for name in names if not path.with_name(name).exists())
    os.replace(path, path.with_name(name))
    files.sync(path.parent)
    return SetAside(int(path.name), name, reason.splitlines()[0])
