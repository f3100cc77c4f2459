"""Typed settings: the base of every recipe section and component, and one list of all that is wrong with a file.

A settings file is YAML. Validation is pydantic's; this module adds the line of each problem and the nearest spelling.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from perennial.core.errors import UserError, nearest

Loc = tuple[str | int, ...]


class Settings(BaseModel):
    """Frozen, typed settings; unknown keys are errors. Fields are documented by the string under each."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where."""

    loc: Loc
    message: str

    def text(self, lines: Mapping[Loc, int]) -> str:
        """'line 3: stages.0.budget: message'."""
        line = _line_of(self.loc, lines)
        where = ".".join(str(part) for part in self.loc)
        return (f"line {line}: " if line else "") + (f"{where}: " if where else "") + self.message


class _LineLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""


def _mapping_without_twins(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=deep)
        if isinstance(key, (str, int, float, bool)) and key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key if isinstance(key, (str, int, float, bool)) else id(key_node))
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_LineLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_twins)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Loc, int]]:
    """The mapping in a YAML file and the line of each of its entries (1-based). Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        where = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise UserError(f"{path}: not UTF-8: {where}; convert the file to UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        data = yaml.load(text, _LineLoader)
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{path}: {where}not valid YAML: {getattr(error, 'problem', error)}") from None
    if data is None:
        raise UserError(f"{path}: is empty: there are no settings in it")
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a mapping of settings, not {type(data).__name__}")
    lines: dict[Loc, int] = {}
    _note_lines(node, (), lines)
    return data, lines


def _note_lines(node: yaml.Node | None, loc: Loc, lines: dict[Loc, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*loc, key.value)] = key.start_mark.line + 1
            _note_lines(value, (*loc, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*loc, index)] = value.start_mark.line + 1
            _note_lines(value, (*loc, index), lines)


def _line_of(loc: Loc, lines: Mapping[Loc, int]) -> int | None:
    for end in range(len(loc), 0, -1):
        if loc[:end] in lines:
            return lines[loc[:end]]
    return None


def check(model: type[S], data: Any, at: Loc = ()) -> tuple[S | None, list[Problem]]:
    """Validates `data`; returns the settings, or None and every problem found. `at` is put before each location."""
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            loc = tuple(item["loc"])
            problems.append(Problem((*at, *loc), _message(model, loc, item)))
        return None, problems


def _message(model: type[BaseModel], loc: Loc, item: Any) -> str:
    got = item.get("input")
    if item["type"] == "extra_forbidden":
        owner = _model_at(model, loc[:-1])
        allowed = list(owner.model_fields) if owner else []
        hint = nearest(str(loc[-1]), allowed) or (f" Allowed: {', '.join(sorted(allowed))}." if allowed else "")
        return f"unknown setting '{loc[-1]}'.{hint}"
    if item["type"] == "missing":
        return "is required"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "literal_error" and isinstance(got, str):
        allowed = [str(a) for a in _literals(model, loc)]
        return f"{message} (got {got!r}).{nearest(got, allowed)}"
    shown = repr(got) if isinstance(got, (str, int, float, bool, type(None))) else type(got).__name__
    return message if item["type"] == "value_error" else f"{message} (got {shown})"


def _model_at(model: type[BaseModel], loc: Loc) -> type[BaseModel] | None:
    """The settings class that the location `loc` inside `model` refers to."""
    current: Any = model
    for part in loc:
        if isinstance(part, int):  # a place in a list; what the list holds was unwrapped with its field
            continue
        if isinstance(current, type) and issubclass(current, BaseModel):
            if part not in current.model_fields:
                return None
            current = current.model_fields[part].annotation
        else:
            return None
        current = _inner_model(current, current)
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _inner_model(annotation: Any, otherwise: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _inner_model(argument, None)
        if found is not None:
            return found
    return otherwise


def _literals(model: type[BaseModel], loc: Loc) -> tuple[Any, ...]:
    owner = _model_at(model, loc[:-1])
    if owner is None or loc[-1] not in owner.model_fields:
        return ()
    return get_args(owner.model_fields[str(loc[-1])].annotation)


def raise_problems(problems: list[Problem], source: str, lines: Mapping[Loc, int] | None = None) -> None:
    """Raises one UserError that lists all problems, in file order; nothing happens when there are none."""
    if not problems:
        return
    lines = lines or {}
    ordered = sorted(problems, key=lambda p: _line_of(p.loc, lines) or 0)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    raise UserError("\n".join([f"{source}: {count}", *(f"  {p.text(lines)}" for p in ordered)]))


def override(data: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """A copy of `data` with 'a.b.0.c=value' texts applied; values are read as YAML. Raises UserError."""
    result: dict[str, Any] = json.loads(json.dumps(data))
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"override {assignment!r} must look like key=value or section.key=value")
        target: Any = result
        parts = key.split(".")
        for part in parts[:-1]:
            target = _step_into(target, part, assignment)
        last = parts[-1]
        if isinstance(target, list):
            target[_index(target, last, assignment)] = _value(value, assignment)
        else:
            target[last] = _value(value, assignment)
    return result


def _value(text: str, assignment: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        what = getattr(error, "problem", None) or error
        raise UserError(f"override {assignment!r}: the value is not valid YAML: {what}") from None


def _step_into(target: Any, part: str, assignment: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, part, assignment)]
    inner = target.setdefault(part, {})
    if not isinstance(inner, (dict, list)):
        raise UserError(f"override {assignment!r}: '{part}' is a single value, it has no settings inside")
    return inner


def _index(target: list[Any], part: str, assignment: str) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise UserError(f"override {assignment!r}: {part!r} is not one of the positions 0 to {len(target) - 1}")
    return int(part)


def stable_hash(data: Any) -> str:
    """The sha256 of the data's canonical JSON, in hex."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
