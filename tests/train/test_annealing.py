"""Decay branches: on the trunk's own mixture and optimizer, from where it stands to a floor; lineage tells a branch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from perennial.core import lineage as lineages
from perennial.core import records
from perennial.core.errors import UserError
from perennial.core.lineage import newest_checkpoint
from perennial.train.annealing import anneal_run, derive_anneal
from perennial.train.continuing import continue_run
from perennial.train.recipe import parse_recipe
from perennial.train.run import start
from tests.commands import answer


@pytest.fixture(scope="module")
def trunk(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk on old data, whose last update mixed in new data and replay."""
    folder = tmp_path_factory.mktemp("trunk")
    recipe = workspace.recipe(
        checkpoints={"every": None, "keep": 1}, evaluation={"tokens": "512 tokens", "every": None}
    )
    recipe["stages"][0]["schedule"] = {"name": "wsd", "peak": 5e-3, "decay": "0%"}
    start(parse_recipe(recipe), folder / "base", base=Path(), quiet=True)
    data = {"new": workspace.new}
    choices = {"replay": "25%", "how": "constant", "settings": ["evaluation.tokens=512 tokens"]}
    continue_run(folder / "base", data, budget="2560 tokens", out=folder / "trunk", quiet=True, **choices)
    return folder / "trunk"


def test_a_branch_follows_the_trunk(trunk: Path, tmp_path: Path) -> None:
    result = anneal_run(trunk, budget="1024 tokens", out=tmp_path / "branch", final="10%", shape="linear", quiet=True)
    assert result["result"]["complete"]
    before, after = (lineages.read(newest_checkpoint(folder)) for folder in (trunk, tmp_path / "branch"))
    stage, last = after.stages[-1], before.stages[-1]
    assert after.is_branch
    assert not before.is_branch
    assert after.trunk_rate == before.rate == stage.rate_start == 5e-3
    assert after.rate == pytest.approx(5e-4)
    assert stage.optimizer == last.optimizer
    weights = {s["name"]: s["weight"] for s in stage.sources}
    assert weights["new"] == 0.75
    assert sum(weights.values()) == pytest.approx(1)
    fresh = [next(s for s in one.sources if s["name"] == "new") for one in (last, stage)]
    assert fresh[1]["offset_rows"] == fresh[0]["offset_rows"] + fresh[0]["rows"]
    assert fresh[1]["seed"] == fresh[0]["seed"]
    rates = [e["rate"] for e in records.read(tmp_path / "branch/events.jsonl", "train")]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] < 5e-3  # an update counts with the rate at its end


def test_the_floor_is_0_unless_it_is_given_and_the_moments_are_kept(trunk: Path) -> None:
    derived = derive_anneal(newest_checkpoint(trunk), budget="1024", base=Path(), name="b")
    [stage] = derived.recipe.stages
    assert stage.schedule == {"name": "anneal", "start": "parent", "final": "0%", "shape": "sqrt"}
    assert stage.optimizer_state == "keep"
    assert derived.header().startswith("# Derived from the parent's lineage by `perennial anneal`")
    assert not [r for r in derived.reasons if r.startswith("warning")]


def test_what_cannot_be_annealed_is_refused_and_what_gains_little_is_told(
    workspace: Any, trunk: Path, tmp_path: Path
) -> None:
    start(parse_recipe(workspace.recipe()), tmp_path / "cosine", base=Path(), quiet=True)
    decayed = derive_anneal(newest_checkpoint(tmp_path / "cosine"), budget="1024", base=Path(), name="b")
    assert any(r.startswith("warning: the checkpoint stands on no trunk") for r in decayed.reasons)
    anneal_run(trunk, budget="512 tokens", out=tmp_path / "zero", quiet=True)
    with pytest.raises(UserError, match="learning rate of 0 already"):
        derive_anneal(newest_checkpoint(tmp_path / "zero"), budget="512", base=Path(), name="b")
    without = tmp_path / "without"
    shutil.copytree(newest_checkpoint(trunk), without)
    for path in (without / "perennial").glob("optimizer*"):
        path.unlink()
    reasons = derive_anneal(without, budget="512", base=Path(), name="b").reasons
    assert any("no optimizer state" in r for r in reasons)


def test_the_command_plans_and_tells_mistakes(trunk: Path, tmp_path: Path) -> None:
    asked = ["anneal", trunk, "--tokens", "1K", "--out", tmp_path / "b"]
    planned = answer(*asked, "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["resolved"]["stages"][0]["rate_end"] == 0
    assert not (tmp_path / "b").exists()
    for arguments, words in (
        (["--shape", "cosin"], "'cosine'"),
        (["--final", "200%"], "100%"),
        (["--final", "1"], "above"),
    ):
        done = answer(*asked, *arguments)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert not (tmp_path / "b").exists()
