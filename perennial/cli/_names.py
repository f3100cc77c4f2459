"""NAME=PATH arguments, shared by the commands that take them (not a command itself)."""

from __future__ import annotations

from pathlib import Path

from perennial.core.errors import UserError


def named_paths(option: str, values: list[str]) -> dict[str, Path]:
    """'de=corpora/de' texts as {name: path}. Raises UserError for a text without '=' or a name given twice."""
    result: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not name or not path:
            raise UserError(f"{option} {value!r} must look like NAME=PATH, such as {option} new=corpora/new")
        if name in result:
            raise UserError(f"{option}: the name '{name}' is given twice")
        result[name] = Path(path)
    return result
