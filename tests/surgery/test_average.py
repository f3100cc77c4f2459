"""Averages of weights: exact at the ends, in fp32, searched on a line or as a soup, with a lineage that names parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from perennial.core import lineage as lineages
from perennial.core.errors import UserError
from perennial.core.lineage import newest_checkpoint
from perennial.model.huggingface import load_model
from perennial.surgery.average import greedy_soup, line, normalised, weighted_mean
from perennial.train.continuing import continue_run, derive
from perennial.train.measuring import evaluate_checkpoint
from perennial.train.merging import merge, to_text
from perennial.train.merging_search import Search
from perennial.train.recipe import parse_recipe
from perennial.train.run import start


def test_the_mean_is_exact_at_the_ends_and_fp32_between() -> None:
    first, second = ({"w": torch.tensor([1.0, 3.0], dtype=torch.bfloat16) * k} for k in (1, 3))
    assert torch.equal(weighted_mean([first, second], [1.0, 0.0], "w"), first["w"].float())
    between = weighted_mean([first, second], [0.25, 0.75], "w")
    assert between.dtype == torch.float32
    assert between.tolist() == [2.5, 7.5]


def test_shares_and_lines() -> None:
    assert normalised([1, 3], 2) == [0.25, 0.75]
    assert line(3) == [[1, 0], [0.5, 0.5], [0, 1]]
    for shares, words in (([1.0], "1 weights for 2"), ([-1.0, 2.0], "0 or more"), ([0.0, 0.0], "above 0")):
        with pytest.raises(UserError, match=words):
            normalised(shares, 2)
    with pytest.raises(UserError, match="--points 1"):
        line(1)


def test_a_greedy_soup_takes_what_helps() -> None:
    values = [1.0, -1.2, 9.0]  # the mean of the first two is nearest to 0
    assert greedy_soup(3, lambda shares: abs(sum(s * v for s, v in zip(shares, values, strict=True)))) == [0.5, 0.5, 0]


@pytest.fixture(scope="module")
def family(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A parent, two children, and a stranger of another shape."""
    folder = tmp_path_factory.mktemp("family")
    few = {"checkpoints": {"every": None, "keep": 1}, "evaluation": {"tokens": "512 tokens", "every": None}}
    recipe = workspace.recipe(**few)
    start(parse_recipe(recipe), folder / "parent", base=Path(), quiet=True)
    for seed, name in ((5, "child"), (6, "sibling")):
        how: dict[str, Any] = {"replay": "0%", "how": "rewarm", "seed": seed, "peak": 5e-3}
        data, settings = {"new": workspace.new}, ["evaluation.tokens=512 tokens"]
        continue_run(
            folder / "parent", data, budget="2K tokens", out=folder / name, settings=settings, quiet=True, **how
        )
    recipe["model"]["options"] = {**recipe["model"]["options"], "layers": 1}
    recipe["stages"][0]["budget"] = "256 tokens"
    start(parse_recipe(recipe), folder / "stranger", base=Path(), quiet=True)
    return {name: folder / name for name in ("parent", "child", "sibling", "stranger")}


def test_a_search_finds_the_best_place_and_the_folder_is_a_model(
    workspace: Any, family: dict[str, Path], tmp_path: Path
) -> None:
    corpora = {"old": workspace.old, "new": workspace.new}
    search = Search(corpora, points=3, max_tokens=1024)
    result = merge([family["parent"], family["child"]], tmp_path / "merged", search=search, quiet=True)
    assert [row["weights"] for row in result["table"]] == line(3)
    best = min(result["table"], key=lambda row: row["score"])
    assert result["chosen"] == best["weights"]
    how: dict[str, Any] = {"max_tokens": 1024, "sequence_length": 32, "precision": "fp32"}
    measured = evaluate_checkpoint(tmp_path / "merged", corpora, **how)["corpora"]
    for name in corpora:
        assert measured[name]["nats_per_token"] == pytest.approx(best["losses"][name], rel=1e-5)
    assert "<- chosen" in to_text(result)
    old_only = Search(corpora, {"old": 1.0}, points=3, max_tokens=1024)
    kept = merge([family["parent"], family["child"]], tmp_path / "kept", search=old_only, quiet=True)
    assert kept["chosen"] == min(kept["table"], key=lambda row: row["losses"]["old"])["weights"]


def test_the_lineage_names_the_parts_and_a_run_goes_on_from_it(
    workspace: Any, family: dict[str, Path], tmp_path: Path
) -> None:
    models = [family["child"], family["sibling"]]
    merge(models, tmp_path / "soup", weights=[1, 3], quiet=True)
    soup = lineages.read(tmp_path / "soup")
    change = soup.changes[-1]
    assert change["operation"] == "merge"
    assert change["optimizer_state"] == "not carried"
    assert [(p["name"], p["weight"]) for p in change["parts"]] == [("2048", 0.25), ("2048", 0.75)]
    assert [s.run for s in soup.stages] == ["base", "child", "sibling"]
    assert not list((tmp_path / "soup/perennial").glob("optimizer*"))
    weights = [dict(load_model(newest_checkpoint(m)).named_parameters()) for m in models]
    for name, value in load_model(tmp_path / "soup").named_parameters():
        assert torch.allclose(value, 0.25 * weights[0][name] + 0.75 * weights[1][name], atol=1e-7)
    derived = derive(
        tmp_path / "soup", {"more": workspace.new}, budget="512 tokens", base=Path(), name="n", replay="0%"
    )
    assert start(derived.recipe, tmp_path / "next", base=Path(), quiet=True)["complete"]


def test_models_that_do_not_fit_are_refused(workspace: Any, family: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"cannot be averaged: they are other models \(layers 2 and 1\)"):
        merge([family["parent"], family["stranger"]], out)
    with pytest.raises(UserError, match="at least two"):
        merge([family["parent"]], out)
    with pytest.raises(UserError, match="--prefer odl.*Did you mean 'old'"):
        merge([family["parent"], family["child"]], out, search=Search({"old": workspace.old}, {"odl": 1.0}))
    assert not out.exists()


def test_average_is_a_way_of_continuing(workspace: Any, family: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    choices = {"how": "average", "replay": "0%", "settings": ["evaluation.tokens=512 tokens"]}
    result = continue_run(family["parent"], {"new": workspace.new}, budget="1K tokens", out=run, quiet=True, **choices)
    assert len(result["averaged"]["table"]) == 11
    assert lineages.read(run / "averaged").changes[-1]["operation"] == "merge"
    assert json.loads((run / "averaged/config.json").read_text())["model_type"] == "llama"
