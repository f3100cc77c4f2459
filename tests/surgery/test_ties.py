"""TIES: trim, elect, merge as published, by another computation; the parent from lineage; the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perennial.cli.main import main
from perennial.core import lineage as lineages
from perennial.core.errors import UserError
from perennial.core.lineage import newest_checkpoint
from perennial.model.huggingface import load_model, save_model
from perennial.surgery.ties import edge_of, merged_change
from perennial.train.continuing import continue_run
from perennial.train.merging import Ties, merge, to_text
from perennial.train.merging_search import Search
from perennial.train.recipe import parse_recipe
from perennial.train.run import start
from perennial.train.stored_weights import _loaded, stored_weights
from tests.commands import answer


def as_published(changes: np.ndarray, density: float) -> np.ndarray:
    """Algorithm 1 on whole task vectors (models, values), number by number."""
    number = changes.shape[1]
    kept = max(1, round(density * number))
    trimmed = np.zeros_like(changes)
    for row, change in zip(trimmed, changes, strict=True):
        for place in sorted(range(number), key=lambda place, of=change: -abs(of[place]))[:kept]:
            row[place] = change[place]
    merged = np.zeros(number, changes.dtype)
    for place in range(number):
        mass = {sign: sum(v for v in trimmed[:, place] if np.sign(v) == sign) for sign in (1, -1)}
        if mass[1] + mass[-1] != 0:
            elected = 1 if mass[1] > -mass[-1] else -1
            merged[place] = mass[elected] / sum(np.sign(trimmed[:, place]) == elected)
    return merged


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 1.0])
def test_it_is_what_was_published(density: float) -> None:
    changes = np.random.default_rng(3).normal(size=(4, 300)) ** 3
    tensors = [torch.tensor(change, dtype=torch.float32) for change in changes]
    # a model of two parameters: the edge is one for both, not one for each
    edges = [edge_of(lambda t=t: iter([t[:100].view(10, 10), t[100:]]), density) for t in tensors]
    parts = [merged_change([t[:100].view(10, 10) for t in tensors], edges)]
    parts.append(merged_change([t[100:] for t in tensors], edges))
    found = torch.cat([part.flatten() for part in parts]).numpy()
    wanted = as_published(np.stack([t.numpy() for t in tensors]), density)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)


def test_the_edge_is_exactly_the_kth_largest() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(5000, generator=generator) * torch.logspace(-30, 5, 5000)
    for kept in (1, 7, 2500, 5000):
        wanted = values.abs().sort(descending=True).values[kept - 1]
        assert edge_of(lambda: iter(values.split(777)), kept / 5000) == float(wanted)
    assert edge_of(lambda: iter([torch.zeros(8)]), 0.5) == 0.0
    assert edge_of(lambda: iter([torch.tensor(-3.0)]), 0.5) == 3.0


def test_signs_that_cancel_leave_the_parent() -> None:
    """The example of the paper's figure: opposite signs, one outvoted, and one that nobody changed."""
    changes = [torch.tensor([1.0, -4.0, 0.0, 2.0]), torch.tensor([-1.0, 1.0, 0.0, 3.0])]
    assert merged_change(changes, [0.0, 0.0]).tolist() == [0.0, -4.0, 0.0, 2.5]


@pytest.fixture(scope="module")
def family(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A parent, two children of it, and a child of one of these."""
    folder = tmp_path_factory.mktemp("ties")
    few = {"checkpoints": {"every": None, "keep": 1}, "evaluation": {"tokens": "512 tokens", "every": None}}
    start(parse_recipe(workspace.recipe(**few)), folder / "parent", base=Path(), quiet=True)
    for seed, parent, name in ((5, "parent", "child"), (6, "parent", "sibling"), (7, "child", "grandchild")):
        how: dict[str, Any] = {"replay": "0%", "how": "rewarm", "seed": seed, "peak": 5e-3, "budget": "1K tokens"}
        how["settings"] = ["evaluation.tokens=512 tokens"]
        continue_run(folder / parent, {"new": workspace.new}, out=folder / name, quiet=True, **how)
    return {name: folder / name for name in ("parent", "child", "sibling", "grandchild")}


def parameters(path: Path) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in load_model(newest_checkpoint(path)).named_parameters()}


def test_children_are_merged_with_the_parent_of_their_lineage(family: dict[str, Path], tmp_path: Path) -> None:
    children = [family["child"], family["sibling"]]
    result = merge(children, tmp_path / "merged", ties=Ties(density=0.3, scale=1.5), quiet=True)
    parent, *changed = (parameters(path) for path in (family["parent"], *children))
    flat = [torch.cat([(c[n] - parent[n]).flatten() for n in parent]).numpy() for c in changed]
    wanted = torch.cat([parent[n].flatten() for n in parent]).numpy() + 1.5 * as_published(np.stack(flat), 0.3)
    found = parameters(tmp_path / "merged")
    np.testing.assert_allclose(torch.cat([found[n].flatten() for n in parent]).numpy(), wanted, atol=1e-6)
    assert result["parent"] == str(newest_checkpoint(family["parent"]))
    assert (result["scale"], result["density"], result["warnings"]) == (1.5, 0.3, [])
    change = lineages.read(tmp_path / "merged").changes[-1]
    assert (change["method"], change["density"], change["scale"]) == ("ties", 0.3, 1.5)
    assert change["parent"]["checkpoint"] == lineages.read(newest_checkpoint(family["parent"])).checkpoint
    assert [part["checkpoint"] for part in change["parts"]] == [
        lineages.read(newest_checkpoint(child)).checkpoint for child in children
    ]
    assert "1.5 x the elected mean of 0.3 of the changes of" in to_text(result)


def test_a_search_goes_from_the_parent_to_the_scale(workspace: Any, family: dict[str, Path], tmp_path: Path) -> None:
    search = Search({"old": workspace.old, "new": workspace.new}, points=3, max_tokens=512)
    children = [newest_checkpoint(family["child"]), newest_checkpoint(family["sibling"])]
    result = merge(children, tmp_path / "found", ties=Ties(scale=2.0), search=search, quiet=True)
    assert [row["scale"] for row in result["table"]] == [0.0, 1.0, 2.0]
    best = min(result["table"], key=lambda row: row["score"])
    assert result["chosen"] == result["scale"] == best["scale"]
    assert lineages.read(tmp_path / "found").changes[-1]["search"]["scale"] == best["scale"]
    assert "<- chosen" in to_text(result)


def test_through_the_command_line(family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(family[name]) for name in ("child", "sibling")]
    done = answer("merge", *models, "--ties", "--density", "50%", "--out", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["density"], result["scale"], len(result["parts"])) == (0.5, 1.0, 2)
    again = merge([Path(model) for model in models], tmp_path / "again", ties=Ties(density=0.5), quiet=True)
    assert again["chosen"] == 1.0
    one, other = parameters(tmp_path / "out"), parameters(tmp_path / "again")
    assert all(torch.equal(one[name], other[name]) for name in one)
    for arguments, words in (
        (["--density", "20%"], "--density belongs to --ties"),
        (["--ties", "--density", "0%"], "--density 0: must be above 0 and at most 100%"),
        (["--ties", "--density", "3 h"], "--density"),
        (["--ties", "--scale", "-1"], "--scale -1: must be a number above 0"),
        (["--ties", "--weights", "1,2"], "--weights, --search and --ties"),
    ):
        assert main(["merge", *models, *arguments, "--out", str(tmp_path / "no")]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_parent_that_is_not_one_is_told(family: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no parent in common.*name an ancestor with --parent"):
        merge([family["child"], family["grandchild"]], tmp_path / "out", ties=Ties())
    with pytest.raises(UserError, match="continues no model; name what it began as"):
        merge([family["parent"]], tmp_path / "out", ties=Ties())
    named = Ties(parent=family["parent"])
    merged = merge([family["child"], family["grandchild"]], tmp_path / "out", ties=named, quiet=True)
    assert merged["warnings"] == [], "an ancestor will do"
    warned = merge([family["sibling"]], tmp_path / "odd", ties=Ties(parent=family["child"]), quiet=True)
    assert "did not begin as the parent" in warned["warnings"][0]


def test_weights_are_read_one_at_a_time_and_as_training_left_them(family: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = newest_checkpoint(family["child"])
    lazily, whole = stored_weights(checkpoint), parameters(checkpoint)
    assert set(lazily) == set(whole)
    assert len(lazily) == len(whole)
    assert not isinstance(lazily, dict), "a tensor at a time"
    assert all(torch.equal(lazily[name], whole[name]) for name in whole)
    assert all(torch.equal(_loaded(checkpoint)[name], whole[name]) for name in whole), "what cannot be read so"
    short = tmp_path / "short"
    save_model(load_model(checkpoint), short, dtype=torch.bfloat16)
    assert all(torch.equal(stored_weights(short)[name], whole[name].bfloat16().float()) for name in whole)
