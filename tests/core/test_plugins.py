"""Components by file name: found without being imported; a user's own by dotted name; wrong names refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from perennial.core import plugins
from perennial.core.errors import UserError

MINE = '''"""My filter."""
from perennial.data.filters.base import Filter
from perennial.data.filters.length import Length  # imported here, but not defined here


class Mine(Filter):
    """Leaves out texts above a height."""

    height: float = 1.0

    def reason(self, document):
        return "too high" if len(document.text) > self.height else None
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's own package on the Python path, under a name that no other test uses."""
    name = f"package_{tmp_path.name}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]


def test_kinds_and_names_are_the_files() -> None:
    assert {"schedules", "optimizers", "objectives", "readers", "filters"} <= set(plugins.kinds())
    for kind, folder in plugins.kinds().items():
        assert plugins.names(kind) == sorted({p.stem for p in folder.glob("*.py")} - {"__init__", "base"})


def test_descriptions_are_read_without_importing() -> None:
    before = set(sys.modules)
    descriptions = plugins.describe("optimizers")
    assert "adamw" in descriptions
    assert all(descriptions.values())
    assert not {m for m in set(sys.modules) - before if m.startswith("perennial.optimizers")}


def test_unknown_kind_and_name() -> None:
    with pytest.raises(UserError, match="Did you mean 'schedules'"):
        plugins.names("schedule")
    with pytest.raises(UserError, match="Did you mean 'cosine'"):
        plugins.load("schedules", "cosin")


def test_every_component_loads_and_is_found_again_by_its_name() -> None:
    for kind in ("schedules", "readers", "filters"):
        for name in plugins.names(kind):
            component = plugins.load(kind, name)
            assert plugins.name_of(component) == name


def test_build_and_dump_round_trip() -> None:
    for example in plugins.load("schedules", "cosine").EXAMPLES:
        component, problems = plugins.build("schedules", {"name": "cosine", **example})
        assert not problems
        data = plugins.dump(component)
        assert data["name"] == "cosine"
        again, problems = plugins.build("schedules", data)
        assert not problems
        assert again == component
        assert plugins.build("schedules", component) == (component, [])


def test_build_collects_problems_instead_of_raising() -> None:
    component, problems = plugins.build("schedules", {"name": "cosine", "peek": 1}, at=("stages", 0, "schedule"))
    assert component is None
    assert any("Did you mean 'peak'" in p.message and p.loc == ("stages", 0, "schedule", "peek") for p in problems)
    for bad in (None, 3, {}, {"peak": 1.0}, ["cosine"]):
        component, problems = plugins.build("schedules", bad)
        assert component is None
        assert "name" in problems[0].message
    component, problems = plugins.build("schedules", "cosin")
    assert component is None
    assert problems[0].loc == ("name",)


def test_a_dotted_name_loads_a_users_own_module(package: Path) -> None:
    (package / "mine.py").write_text(MINE)
    name = f"{package.name}.mine"
    component, problems = plugins.build("filters", {"name": name, "height": 2.0})
    assert not problems
    assert component.height == 2.0
    assert plugins.dump(component) == {"name": name, "height": 2.0}
    assert plugins.build("filters", plugins.dump(component)) == (component, [])


def test_a_users_module_that_is_not_there(package: Path) -> None:
    with pytest.raises(UserError, match=rf"no module '{package.name}\.other'"):
        plugins.load("filters", f"{package.name}.other")
    with pytest.raises(UserError, match="no module 'no_such_package'"):
        plugins.load("filters", "no_such_package.mine")


def test_a_users_module_that_needs_what_is_not_installed_says_so(package: Path) -> None:
    (package / "broken.py").write_text("import a_library_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_missing"):
        plugins.load("filters", f"{package.name}.broken")


@pytest.mark.parametrize(
    ("content", "number"),
    [
        (MINE + MINE.replace("Mine", "Other"), 2),
        ("from perennial.data.filters.length import Length\n", 0),
        (MINE.replace("Mine", "_Mine"), 0),
    ],
)
def test_a_module_defines_exactly_one_component(package: Path, content: str, number: int) -> None:
    (package / "some.py").write_text(content)
    with pytest.raises(UserError, match=rf"exactly one .* it has {number}"):
        plugins.load("filters", f"{package.name}.some")


def test_a_component_that_lacks_a_part_of_its_contract_is_refused(package: Path) -> None:
    (package / "unfinished.py").write_text(MINE.replace("def reason", "def raison"))
    component, problems = plugins.build("filters", f"{package.name}.unfinished")
    assert component is None
    assert "reason" in problems[0].message
