"""Settings: every problem of a file at once, each with its line and the nearest spelling."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from perennial.core.errors import UserError
from perennial.core.settings import Problem, Settings, check, override, raise_problems, read_yaml, stable_hash


class _Inner(Settings):
    rate: float = Field(default=0.1, gt=0)
    kind: Literal["linear", "cosine"] = "cosine"


class _Outer(Settings):
    name: str
    stages: list[_Inner] = []
    inner: _Inner | None = None


def test_all_problems_at_once_with_lines_and_spelling(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("stages:\n  - rate: 0.5\n  - rate: -1\n    kind: cosin\ninner:\n  rat: 2\n")
    data, lines = read_yaml(path)
    _, problems = check(_Outer, data)
    with pytest.raises(UserError) as caught:
        raise_problems(problems, str(path), lines)
    text = str(caught.value).splitlines()
    assert text[0] == f"{path}: 4 problems"
    assert any(line.strip().startswith("line 3: stages.1.rate: ") and "(got -1)" in line for line in text)
    assert any("line 4: stages.1.kind" in line and "Did you mean 'cosine'?" in line for line in text)
    assert any("line 6: inner.rat: unknown setting 'rat'. Did you mean 'rate'?" in line for line in text)
    assert any("name: is required" in line for line in text)
    numbers = [int(line.split()[1][:-1]) for line in text[1:] if line.strip().startswith("line")]
    assert numbers == sorted(numbers)


def test_no_problem_no_error() -> None:
    raise_problems([], "anything")
    found, problems = check(_Outer, {"name": "a", "stages": [{"rate": "3e-4"}]})
    assert not problems
    assert found is not None
    assert found.stages[0].rate == 3e-4


def test_unknown_setting_without_a_near_one_lists_what_is_allowed() -> None:
    _, problems = check(_Outer, {"name": "a", "zzzzzz": 1})
    assert "Allowed: inner, name, stages." in problems[0].message


def test_problem_is_placed_at_the_nearest_known_line() -> None:
    assert Problem(("a", "b", "c"), "bad").text({("a",): 7}) == "line 7: a.b.c: bad"
    assert Problem((), "bad").text({}) == "bad"


def test_location_prefix() -> None:
    _, problems = check(_Inner, {"rate": 0}, at=("stages", 2))
    assert problems[0].loc == ("stages", 2, "rate")


def test_settings_are_frozen() -> None:
    settings = _Inner()
    with pytest.raises(ValidationError):
        settings.rate = 2.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1, 2", "not valid YAML"),
        ("- a\n- b\n", "must be a mapping of settings, not list"),
        ("", "is empty: there are no settings in it"),
        ("a: 1\nb: 2\na: 3\n", "line 3: not valid YAML: key 'a' is given twice"),
        ("x:\n  a: 1\n  a: 2\n", "line 3: not valid YAML: key 'a' is given twice"),
    ],
)
def test_broken_yaml(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)


def test_missing_and_non_utf8_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(UserError, match="not UTF-8: byte 0xe9 at offset 3"):
        read_yaml(tmp_path / "latin.yaml")


def test_override_leaves_the_original_alone() -> None:
    data = {"stages": [{"budget": "1M tokens"}], "seed": 1}
    changed = override(data, ["stages.0.budget=2M tokens", "seed=7", "model.preset=2m", "flag=true"])
    assert changed == {"stages": [{"budget": "2M tokens"}], "seed": 7, "model": {"preset": "2m"}, "flag": True}
    assert data == {"stages": [{"budget": "1M tokens"}], "seed": 1}
    assert override({"a": [1, 2]}, ["a.1=9"]) == {"a": [1, 9]}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "must look like"),
        ("=3", "must look like"),
        ("a.5=1", "positions 0 to 1"),
        ("a.x=1", "positions"),
        ("b.c=1", "single value"),
    ],
)
def test_bad_overrides(assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        override({"a": [1, 2], "b": 3}, [assignment])


def test_stable_hash_ignores_order_and_nothing_else() -> None:
    assert stable_hash({"a": 1, "b": [1, 2]}) == stable_hash({"b": [1, 2], "a": 1})
    assert len({stable_hash(x) for x in ({"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": None})}) == 6
    assert stable_hash({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
