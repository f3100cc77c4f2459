"""House rules that a program can check: docstrings, dead settings, private paths, the tree in the README."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from perennial.core import plugins

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "perennial"
NEEDS_SOURCE = ("schedules", "optimizers", "communications", "pulls", "objectives", "laws", "operators")


def parsed() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def first_line(tree: ast.Module) -> str:
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def components() -> list[tuple[str, str]]:
    return [(kind, name) for kind in plugins.kinds() for name in plugins.names(kind)]


# Docstrings


def test_every_module_says_what_it_is() -> None:
    wrong = []
    for path, tree in parsed().items():
        line = first_line(tree)
        if not (0 < len(line) < 120):
            wrong.append(f"{path.relative_to(ROOT)}: {line!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("kind", "name"), components())
def test_component_docstring(kind: str, name: str) -> None:
    text = ast.get_docstring(ast.parse((plugins.kinds()[kind] / f"{name}.py").read_text(encoding="utf-8"))) or ""
    line = text.partition("\n")[0]
    assert 0 < len(line) < 100, f"the first line is what `perennial list {kind}` shows"
    assert line.endswith((".", "?")) or ":" in line
    if kind in NEEDS_SOURCE:
        assert "Source:" in text


def test_every_public_function_and_class_is_documented() -> None:
    """What a component overrides is documented once, by its contract in base.py; torch documents `forward`."""
    contracts = {n.name for path, tree in parsed().items() if path.name == "base.py" for n in public(tree)}
    wrong = []
    for path, tree in parsed().items():
        for node in public(tree):
            if not ast.get_docstring(node) and node.name not in contracts | {"forward"}:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}")
    assert not wrong, "\n".join(wrong)


def public(scope: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The classes and functions of a module that others can see, and the methods of those classes."""
    for node in scope.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


# Settings


def settings_fields() -> Iterator[tuple[str, str]]:
    """(class, field) of every settings class, found by the names of its bases.

    Left out are classes whose file reads fields by a computed name.
    """
    classes: dict[str, tuple[ast.ClassDef, set[str]]] = {}
    for tree in parsed().values():
        if any(isinstance(n, ast.Call) and _is_computed(n) for n in ast.walk(tree)):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes[node.name] = node, {ast.unparse(b).split(".")[-1] for b in node.bases}
    settings = {"Settings"}
    while added := {n for n, (_, bases) in classes.items() if bases & settings} - settings:
        settings |= added
    for name in sorted(settings & classes.keys()):
        for statement in classes[name][0].body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                field = statement.target.id
                if "ClassVar" not in ast.unparse(statement.annotation) and field != "model_config":
                    yield name, field


def names_read() -> set[str]:
    """Every attribute that is read, and every key that is taken out of a mapping, anywhere in the package."""
    found: set[str] = set()
    for tree in parsed().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                found.add(str(node.slice.value))
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".get", "getattr", "field_validator")):
                found |= {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
    return found


def _is_computed(call: ast.Call) -> bool:
    return ast.unparse(call.func) == "getattr" and not isinstance(call.args[1], ast.Constant)


def test_every_setting_is_read() -> None:
    read = names_read()
    dead = [f"{name}.{field}" for name, field in settings_fields() if field not in read]
    assert not dead, f"nothing reads: {', '.join(dead)}"


# Files


def tracked() -> list[Path]:
    """Every file that is, or would be, in version control."""
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git working tree")
    return [path for name in done.stdout.splitlines() if (path := ROOT / name).is_file()]


def test_no_private_paths_or_names() -> None:
    """Nothing that is true on one machine only."""
    private = [f"/{folder}/" for folder in ("work", "root", "home", "Users")]
    pattern = re.compile("|".join(rf"(?<![\w.~-]){re.escape(p)}" for p in private))
    host = socket.gethostname()
    wrong = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line) or (len(host) > 6 and host in line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


def test_source_is_ascii() -> None:
    paths = [p for folder in ("perennial", "benchmarks", "examples") for p in (ROOT / folder).rglob("*.py")]
    wrong = [str(p.relative_to(ROOT)) for p in paths if not p.read_text(encoding="utf-8").isascii()]
    assert not wrong, ", ".join(wrong)


# What is where


def expected_tree(*, files: bool) -> str:
    """Every folder of the package, or every file too, with the first line of its docstring."""
    lines = []
    for path, tree in parsed().items():
        if path.name == "__init__.py":
            lines.append((path.parent.relative_to(ROOT).as_posix() + "/", first_line(tree)))
        elif files:
            lines.append((path.relative_to(ROOT).as_posix(), first_line(tree)))
    lines.sort()
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


@pytest.mark.parametrize(("page", "files"), [("README.md", False), ("docs/modules.md", True)])
def test_the_trees_are_the_docstrings(page: str, files: bool) -> None:
    """Between the markers <!-- tree --> and <!-- /tree -->, in a code block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = text.split("<!-- tree -->")[1].split("<!-- /tree -->")[0].replace("```text", "").replace("```", "").strip()
    normal = [" ".join(line.split()) for line in found.splitlines()]
    wanted = [" ".join(line.split()) for line in expected_tree(files=files).splitlines()]
    assert normal == wanted, f"put this between the markers of {page}:\n\n{expected_tree(files=files)}\n"
