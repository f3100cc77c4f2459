"""What a model folder's config.json says, and whether native code or `transformers` runs the model; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.core.files import read_json
from perennial.core.settings import Problem, check, raise_problems
from perennial.model.config import ModelConfig
from perennial.model.families.base import Entries, Family
from perennial.model.foreign import AnyConfig

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"


@dataclass(frozen=True)
class FolderConfig:
    """What a folder's config.json says, and how the model is run."""

    config: AnyConfig
    entries: dict[str, Any]
    """All of config.json."""
    why_not_native: str = ""
    """Empty for a model that is read natively."""
    notes: tuple[str, ...] = ()
    """What a user should know about how it is trained."""


def read_config(folder: Path) -> FolderConfig:
    """The shape of the model in a folder, native where possible. Raises UserError that lists all that is not valid."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    path = folder / CONFIG
    entries = read_json(path, "model configuration")
    if not isinstance(entries, dict):
        raise UserError(f"{path}: must be a JSON object, not {type(entries).__name__}")
    _refuse(path, entries)
    model_type = str(entries.get("model_type"))
    if model_type not in plugins.names("families"):
        return _through_transformers(folder, entries, f"model_type {model_type!r} has no native code")
    family = plugins.load("families", model_type)()
    read = Entries(entries, family.defaults)
    settings = family.read(read)
    if read.problems:
        return _through_transformers(folder, entries, "; ".join(read.problems))
    config, wrong = check(ModelConfig, {key: value for key, value in settings.items() if value is not None})
    raise_problems(_in_their_words(wrong, family), str(path))
    assert config is not None
    return FolderConfig(config, entries, notes=tuple(read.notes))


def load_config(folder: Path) -> AnyConfig:
    """The shape of the model in a folder, as `read_config` finds it. Raises UserError."""
    return read_config(folder).config


def _through_transformers(folder: Path, entries: dict[str, Any], why: str) -> FolderConfig:
    from perennial.model import through_transformers

    try:
        return FolderConfig(through_transformers.read_config(folder, why), entries, why_not_native=why)
    except UserError as error:
        if why in str(error):
            raise
        raise UserError(f"{error}\nNative code cannot run this model either: {why}.") from None


def _refuse(path: Path, entries: Mapping[str, Any]) -> None:
    """Raises UserError for what neither native code nor `transformers` may or can train."""
    found = []
    if entries.get("auto_map"):
        found.append("auto_map: the folder brings code of its own, which is not run")
    for key in ("quantization_config", "compression_config"):
        if entries.get(key):
            found.append(f"{key}: quantised weights; give the folder they were made from")
    model_type, given = str(entries.get("model_type")), entries.get("architectures")
    if model_type in plugins.names("families"):
        architecture = plugins.load("families", model_type).architecture
        if given is not None and given != [architecture]:
            found.append(f"architectures {given!r}; supported for {model_type}: ['{architecture}']")
    if found:
        lines = "\n".join(f"  {problem}" for problem in found)
        raise UserError(f"{path}: this model is not supported:\n{lines}")


def _in_their_words(problems: list[Problem], family: Family) -> list[Problem]:
    """The problems with the entries of config.json in place of our fields."""
    return [Problem(tuple(family.keys.get(str(at), at) for at in p.loc), p.message) for p in problems]
