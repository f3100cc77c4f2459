"""Components by file name: a plural folder holds `base.py` (the contract) and one file per component.

Nothing is registered. `load("schedules", "cosine")` is the one subclass of the contract that `schedules/cosine.py`
defines; a name with a dot, such as `my_package.my_schedule`, is imported from the user's own path.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from perennial.core.errors import UserError, nearest
from perennial.core.settings import Loc, Problem, check

_ROOT = Path(__file__).parents[1]


def kinds() -> dict[str, Path]:
    """Every kind of component and its folder: 'schedules', 'readers', 'operators' ..."""
    return {base.parent.name: base.parent for base in sorted(_ROOT.rglob("base.py"))}


def names(kind: str) -> list[str]:
    """The components of a kind, by file name. Raises UserError for an unknown kind."""
    folder = kinds().get(kind)
    if folder is None:
        raise UserError(f"'{kind}' is no kind of component; kinds: {', '.join(kinds())}.{nearest(kind, kinds())}")
    return sorted(p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "base"))


def describe(kind: str) -> dict[str, str]:
    """Name and first docstring line of each component of a kind, read without importing it."""
    return {name: _first_line(kinds()[kind] / f"{name}.py") for name in names(kind)}


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.splitlines()[0] if docstring else ""


def load(kind: str, name: str) -> type[Any]:
    """The component class. Raises UserError when there is none of that name or it does not meet the contract."""
    if "." not in name and name not in names(kind):
        raise UserError(
            f"no {kind} component '{name}'; there are: {', '.join(names(kind))}.{nearest(name, names(kind))}"
        )
    package = ".".join(kinds()[kind].relative_to(_ROOT.parent).parts)
    module_name = name if "." in name else f"{package}.{name}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UserError(f"{kind} component '{name}': no module '{error.name}' on the Python path") from None
        raise
    base = importlib.import_module(f"{package}.base")
    contracts = tuple(c for _, c in inspect.getmembers(base, inspect.isclass) if c.__module__ == base.__name__)
    found = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, contracts) and c.__module__ == module.__name__ and not c.__name__.startswith("_")
    ]
    if len(found) != 1:
        raise UserError(
            f"{module_name} must define exactly one {kind} component (a subclass of the contract in {base.__name__}), "
            f"it has {len(found)}"
        )
    lacking = sorted(getattr(found[0], "__abstractmethods__", ()))
    if lacking:
        raise UserError(
            f"{module_name}: {found[0].__name__} lacks what the {kind} contract asks for: {', '.join(lacking)}"
        )
    return found[0]


def build(kind: str, data: Any, at: Loc = ()) -> tuple[Any, list[Problem]]:
    """The component that `data` (a name, or a mapping with `name` and settings) asks for, or None and the problems."""
    if isinstance(data, BaseModel):
        return data, []
    if isinstance(data, str):
        data = {"name": data}
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        return None, [Problem(at, f"must be the name of one of the {kind}, or a mapping with 'name' and its settings")]
    try:
        component = load(kind, data["name"])
    except UserError as error:
        return None, [Problem((*at, "name"), str(error))]
    return check(component, {k: v for k, v in data.items() if k != "name"}, at)


def name_of(component: Any) -> str:
    """The name by which `load` finds this component (or its class) again."""
    module = (component if isinstance(component, type) else type(component)).__module__
    return module.rsplit(".", 1)[1] if module.startswith(f"{_ROOT.name}.") else module


def dump(component: BaseModel) -> dict[str, Any]:
    """The component as JSON-ready data that `build` turns back into it."""
    return {"name": name_of(component), **component.model_dump(mode="json")}
