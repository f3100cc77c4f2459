"""Training new rows first: nothing else moves by a bit, and a resumed run is the run that was not stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perennial.core import lineage, records
from perennial.core.errors import UserError
from perennial.core.lineage import newest_checkpoint
from perennial.data.prepare import PrepareSettings, prepare
from perennial.train.extending import Asked, extend_vocabulary
from perennial.train.recipe import parse_recipe
from perennial.train.run import start, train
from perennial.train.starting import read_parent
from tests.workspace import Workspace

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def base(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model with a head of its own weights, every role decayed."""
    root = tmp_path_factory.mktemp("base")
    recipe = workspace.recipe()
    recipe["model"]["options"]["tied_embeddings"] = False
    start(parse_recipe(recipe), root / "base", base=root, quiet=True)
    return root / "base"


@pytest.fixture(scope="module")
def extended(base: Path, workspace: Workspace) -> Path:
    out = base.parent / "extended"
    extend_vocabulary(base, {"new": workspace.new_text}, out, Asked(add=60), quiet=True)
    return out


@pytest.fixture(scope="module")
def corpus(extended: Path, workspace: Workspace) -> Path:
    """The new text as the extended tokenizer cuts it."""
    settings = {"name": "new", "inputs": [str(workspace.new_text)], "tokenizer": str(extended), "validation": "10%"}
    prepare(PrepareSettings.model_validate(settings), extended.parent / "corpora/new")
    return extended.parent / "corpora/new"


def two_stages(extended: Path, corpus: Path, **changes: Any) -> dict[str, Any]:
    """New rows first, then the whole model; every weight is decayed."""
    decay = dict.fromkeys(("matrix", "embedding", "head", "norm", "bias"), 0.1)
    stage = {
        "budget": "1024 tokens",
        "mixture": {"new": "100%"},
        "schedule": {"name": "constant", "peak": 1e-2},
        "optimizer": {"name": "adamw", "weight_decay": decay},
    }
    return {
        "name": "rows",
        "parent": str(extended),
        "corpora": {"new": str(corpus)},
        "stages": [{**stage, "name": "new-rows", "train": "new_rows"}, {**stage, "name": "all"}],
        "batch": {"sequences": 8, "sequence_length": 32},
        "precision": "fp32",
        "evaluation": {"tokens": "2048 tokens", "every": None},
        "checkpoints": {"every": "512 tokens", "keep": 9},
        **changes,
    }


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(e["tokens"], e["loss"], e["gradient_norm"]) for e in records.read(run / "events.jsonl", "train")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def moments(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "perennial/optimizer.safetensors")


@pytest.fixture(scope="module")
def run(extended: Path, corpus: Path) -> Path:
    folder = extended.parent / "run"
    start(parse_recipe(two_stages(extended, corpus)), folder, base=folder.parent, quiet=True)
    return folder


def test_the_folder_that_is_trained_has_the_parents_weights_and_moments(base: Path, extended: Path) -> None:
    parent = newest_checkpoint(base)
    before, after = weights(parent), weights(extended)
    assert before.keys() == after.keys()
    first, stop = lineage.read(extended).changes[-1]["ids"]
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)] if name in (EMBEDDING, "lm_head.weight") else after[name], tensor)
    kept = moments(extended)
    assert kept.keys() == moments(parent).keys()
    assert torch.equal(kept[f"{EMBEDDING}.exp_avg"][:first], moments(parent)[f"{EMBEDDING}.exp_avg"])
    assert not kept[f"{EMBEDDING}.exp_avg"][first:stop].any()


def test_only_new_rows_change_and_the_moments_of_all_else_are_held(extended: Path, run: Path) -> None:
    first, stop = lineage.read(extended).changes[-1]["ids"]
    middle = run / "checkpoints/1024"
    before, after = weights(extended), weights(middle)
    for name, tensor in before.items():
        if name in (EMBEDDING, "lm_head.weight"):
            others = torch.ones(len(tensor), dtype=torch.bool)
            others[first:stop] = False
            assert torch.equal(after[name][others], tensor[others])
            assert (after[name][first:stop] != tensor[first:stop]).any(dim=1).all()  # decay alone moves every row
        else:
            assert torch.equal(after[name], tensor)
    was, now = moments(extended), moments(middle)
    assert was.keys() == now.keys()
    for key, tensor in was.items():
        table = key.startswith((EMBEDDING, "lm_head.weight"))
        if table and tensor.ndim == 2:
            assert torch.equal(now[key][:first], tensor[:first])
            assert now[key][first:stop].any()
        elif not table:
            assert torch.equal(now[key], tensor)
    step = f"{EMBEDDING}.step"
    assert now[step] == was[step] + 4


def test_the_next_stage_trains_everything_with_all_the_moments(run: Path, extended: Path) -> None:
    middle, end = weights(run / "checkpoints/1024"), weights(newest_checkpoint(run))
    assert all(not torch.equal(middle[name], end[name]) for name in middle)
    steps = {key: float(value) for key, value in moments(newest_checkpoint(run)).items() if key.endswith(".step")}
    before = float(moments(extended)["model.norm.weight.step"])
    assert steps["model.norm.weight.step"] == before + 4
    assert steps[f"{EMBEDDING}.step"] == before + 8


def test_the_lineage_says_what_was_trained_and_keeps_the_models_own_rate(run: Path, extended: Path) -> None:
    first, stop = lineage.read(extended).changes[-1]["ids"]
    found = lineage.read(run / "checkpoints/1024")
    assert found.stages[-1].new_rows == (first, stop)
    assert found.rate == lineage.read(extended).rate
    assert found.peak == lineage.read(extended).peak
    assert found.changes == lineage.read(extended).changes
    end = lineage.read(newest_checkpoint(run))
    assert end.stages[-1].new_rows is None
    assert end.rate == 1e-2
    resolved = json.loads((run / "resolved.json").read_text(encoding="utf-8"))
    assert resolved["stages"][0]["flops"] < 0.9 * resolved["stages"][1]["flops"]
    assert found.stages[-1].flops == pytest.approx(resolved["stages"][0]["flops"])
    [rows, whole] = records.read(run / "events.jsonl", "stage")
    assert (rows["new_rows"], whole["new_rows"]) == ([first, stop], None)


@pytest.mark.parametrize("stop", [512, 1024, 1536])
def test_a_resumed_run_is_the_same_to_the_bit(stop: int, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "resumed"
    other.mkdir()
    for name in ("recipe.yaml", "resolved.json"):
        (other / name).write_bytes((run / name).read_bytes())
    kept = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps(event) + "\n" for event in kept if event.get("tokens", 0) <= stop and event["event"] != "done"]
    (other / "events.jsonl").write_text("".join(lines), encoding="utf-8")
    shutil.copytree(run / f"checkpoints/{stop}", other / f"checkpoints/{stop}")
    train(other, quiet=True)
    assert losses(other) == losses(run)
    one, two = newest_checkpoint(run), newest_checkpoint(other)
    for read in (weights, moments):
        a, b = read(one), read(two)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_without_moments_of_the_parent_the_rows_start_anew(extended: Path, corpus: Path, tmp_path: Path) -> None:
    recipe = two_stages(extended, corpus)
    recipe["stages"][0]["optimizer_state"] = "reset"
    start(parse_recipe(recipe), tmp_path / "run", base=tmp_path, quiet=True)
    now = moments(tmp_path / "run/checkpoints/1024")
    assert {key.rpartition(".")[0] for key in now} == {EMBEDDING, "lm_head.weight"}
    assert now[f"{EMBEDDING}.step"] == 4
    end = moments(newest_checkpoint(tmp_path / "run"))
    assert (end[f"{EMBEDDING}.step"], end["model.norm.weight.step"]) == (8, 4)


def test_new_rows_need_a_parent_that_has_some(base: Path, corpus: Path, workspace: Workspace, tmp_path: Path) -> None:
    recipe = two_stages(base, workspace.new)
    with pytest.raises(UserError, match=r"stage 'new-rows': train 'new_rows' needs a parent made by .*base.* was not"):
        start(parse_recipe(recipe), tmp_path / "run", base=tmp_path, quiet=True)
    fresh = workspace.recipe()
    fresh["stages"][0]["train"] = "new_rows"
    with pytest.raises(UserError, match="needs a parent made by `perennial vocab extend`"):
        start(parse_recipe(fresh), tmp_path / "run", base=tmp_path, quiet=True)
    fresh["stages"][0]["train"] = "new_row"
    with pytest.raises(UserError, match="Did you mean 'new_rows'"):
        parse_recipe(fresh)
    assert read_parent(newest_checkpoint(base)).lineage.changes == []
