"""NAME=PATH and 'NAME KEY=VALUE ...' arguments, shared by the commands that take them (not a command itself)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def component(option: str, text: str) -> str | dict[str, Any]:
    """'length min_bytes=200' as a component with its settings; a name alone stays one. Raises UserError."""
    from perennial.core.settings import override

    name, *pairs = text.split() or [""]
    try:
        return override({"name": name}, pairs) if pairs else name
    except UserError as error:
        raise UserError(f"{option} {text!r}: {error}") from None
