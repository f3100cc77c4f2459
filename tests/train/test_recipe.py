"""Recipes: what is accepted, what is refused and how, and what they resolve to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from perennial.core.amounts import Amount
from perennial.core.errors import UserError
from perennial.train.recipe import parse_recipe, read, shares
from perennial.train.resolve import resolve


def test_every_mistake_is_listed_with_line_and_nearest_spelling(tmp_path: Path, workspace: Any) -> None:
    recipe = workspace.recipe()
    recipe["stages"][0]["schedule"]["peek"] = 1
    recipe["stages"][0]["budget"] = "3 parsecs"
    recipe["btach"] = {"sequences": 4}
    recipe["precision"] = "bf61"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.raises(UserError) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: 4 problems")
    lines = path.read_text().splitlines()
    for key, hint in (("peek", "peak"), ("btach", "batch"), ("bf61", "bf16"), ("3 parsecs", "'2B tokens'")):
        number = next(i for i, line in enumerate(lines, 1) if key in line)
        message = next(m for m in text.splitlines() if key in m)
        assert f"line {number}:" in message
        assert hint in message


def test_contradictions_are_refused(workspace: Any) -> None:
    for changes, words in (
        ({"parent": "x"}, "exactly one of 'parent'"),
        ({"batch": {"sequences": 8, "micro_batch": 3}}, "does not divide"),
        ({"corpora": {}}, "no corpus 'old'"),
    ):
        with pytest.raises(UserError, match=words):
            parse_recipe(workspace.recipe(**changes))


def test_replay_needs_a_parent(workspace: Any) -> None:
    recipe = workspace.recipe()
    recipe["stages"][0]["mixture"] = {"old": "50%", "replay": "50%"}
    with pytest.raises(UserError, match="replay needs a 'parent'"):
        parse_recipe(recipe)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("name: a\nseed: 1\nname: b\n")
    with pytest.raises(UserError, match="line 3.*'name' is given twice"):
        read(path)


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [({"a": "75%", "b": "25%"}, {"a": 0.75, "b": 0.25}), ({"a": 3, "b": 1}, {"a": 0.75, "b": 0.25})],
)
def test_shares(mixture: dict[str, Any], expected: dict[str, float]) -> None:
    assert shares(mixture) == expected


@pytest.mark.parametrize("mixture", [{}, {"a": "50%"}, {"a": "50%", "b": 1}, {"a": 0}, {"a": -1, "b": 2}])
def test_bad_shares(mixture: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        shares(mixture)


def test_budgets_resolve_to_whole_updates(workspace: Any) -> None:
    recipe = workspace.recipe()
    resolved = resolve(parse_recipe(recipe), base=Path(), precision="fp32")
    assert (resolved.stages[0].updates, resolved.tokens) == (12, 3072)
    recipe["stages"][0]["budget"] = f"{resolved.flops:.15g} FLOPs"
    assert resolve(parse_recipe(recipe), base=Path(), precision="fp32").tokens == 3072
    recipe["stages"][0]["budget"] = "10 s"
    timed = resolve(parse_recipe(recipe), base=Path(), precision="fp32", measure=lambda c, r: 300.0)
    assert timed.tokens == 3072  # 10 s at 300 tokens/s, rounded up to updates of 256


def test_too_many_passes_over_a_corpus_are_refused_before_training(workspace: Any) -> None:
    recipe = workspace.recipe()
    recipe["stages"][0]["budget"] = "100M tokens"
    with pytest.raises(UserError, match=r"stage 'pretrain'.*old"):
        resolve(parse_recipe(recipe), base=Path(), precision="fp32")


def test_the_hash_depends_on_what_is_done_not_on_where_it_lies(workspace: Any, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(workspace.old)
    one = resolve(parse_recipe(workspace.recipe()), base=Path(), precision="fp32")
    moved = resolve(
        parse_recipe(workspace.recipe(corpora={"old": str(tmp_path / "elsewhere")})), base=Path(), precision="fp32"
    )
    other = resolve(parse_recipe(workspace.recipe(seed=1)), base=Path(), precision="fp32")
    assert one.recipe_hash == moved.recipe_hash != other.recipe_hash


def test_overrides(tmp_path: Path, workspace: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(workspace.recipe()))
    recipe = read(path, ["stages.0.budget=1K tokens", "seed=7", "batch.micro_batch=4"])
    assert (recipe.stages[0].budget, recipe.seed, recipe.batch.micro_batch) == (Amount(1000, "tokens"), 7, 4)
    for wrong in ("seed", "stages.9.budget=1 s", "seed.x=1"):
        with pytest.raises(UserError, match="override"):
            read(path, [wrong])
