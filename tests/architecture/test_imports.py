"""Imports go one way, and what plans or prints help does not load torch."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "perennial"
LAYERS = [
    {"core"},
    {"data", "model", "schedules", "optimizers", "communications", "pulls", "scaling"},
    {"objectives", "surgery", "evals"},
    {"train", "plan"},
    {"bench"},
    {"report"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
WITHOUT_TORCH = (
    *("core", "data", "schedules", "optimizers", "communications", "pulls", "objectives", "scaling"),
    *("plan", "bench", "report", "cli"),
)
WITHOUT_TORCH_TOO = ("model/config.py", "model/cost.py", "model/presets.py", "model/roles.py", "train/recipe.py")


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(tree: ast.AST, *, inside_functions: bool = True) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that is imported; what only type checkers see counts as inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.lineno, node.module or ""
            if node.module == "perennial":
                yield from ((node.lineno, f"perennial.{alias.name}") for alias in node.names)
        elif inside_functions or not _is_deferred(node):
            yield from imports(node, inside_functions=inside_functions)


def _is_deferred(node: ast.AST) -> bool:
    is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    return is_for_types or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


def test_every_folder_has_its_layer() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert folders <= set(LEVEL)


def test_imports_go_one_way() -> None:
    wrong = []
    for path in sources():
        here = path.relative_to(PACKAGE).parts[0]
        if here not in LEVEL:
            continue  # __init__ and __main__
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            parts = name.split(".")
            if parts[0] != "perennial" or len(parts) < 2 or parts[1] not in LEVEL or parts[1] == here:
                continue
            if LEVEL[parts[1]] >= LEVEL[here]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {here} may not import {parts[1]}")
    assert not wrong, "\n".join(wrong)


def _without_torch() -> list[Path]:
    """Everything that must be importable where there is no torch, or no time for it."""
    found = [p for p in sources() if p.relative_to(PACKAGE).parts[0] in WITHOUT_TORCH]
    return found + [PACKAGE / name for name in WITHOUT_TORCH_TOO if (PACKAGE / name).exists()]


def test_no_torch_at_module_level() -> None:
    wrong = []
    for path in _without_torch():
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8")), inside_functions=False):
            if name.split(".")[0] in ("torch", "transformers"):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: imports {name} at module level")
    assert not wrong, "\n".join(wrong)


def test_importing_what_needs_no_torch_does_not_load_it() -> None:
    """Also not by way of another module; all in one new process."""
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in _without_torch()]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name + ' loads torch'\n"
        "    assert 'transformers' not in sys.modules, name + ' loads transformers'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_changes_no_global_state() -> None:
    """Neither the environment, nor random numbers, nor torch's defaults."""
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in sources()]
    code = (
        "import importlib, os, random, sys\n"
        "import numpy, torch\n"
        "def state():\n"
        "    return (dict(os.environ), random.getstate(), numpy.random.get_state()[1].tolist(),\n"
        "            torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(),\n"
        "            torch.are_deterministic_algorithms_enabled(), os.getcwd())\n"
        "before = state()\n"
        f"for name in {[m for m in modules if m != 'perennial.__main__']!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert state() == before, name + ' changes global state when it is imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["utils", "util", "helpers", "misc", "common"])
def test_no_attic(name: str) -> None:
    assert not [p for p in PACKAGE.rglob(f"{name}*") if p.suffix in ("", ".py")]


def test_the_check_sees_a_wrong_import() -> None:
    """The checks above would be worth nothing if they could not fail."""
    tree = ast.parse("import torch\ndef f():\n    from perennial.cli import main\n")
    assert list(imports(tree)) == [(1, "torch"), (3, "perennial.cli")]
    assert list(imports(tree, inside_functions=False)) == [(1, "torch")]
    assert importlib.util.find_spec("perennial") is not None
