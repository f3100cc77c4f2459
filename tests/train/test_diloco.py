"""Workers that train apart: the outer step, what is reported, bytes, and going on from the middle of a round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perennial.core.errors import UserError
from perennial.core.lineage import newest_checkpoint
from perennial.train import checkpoint
from perennial.train.apart import workers_of
from perennial.train.recipe import parse_recipe
from perennial.train.run import RESOLVED, make_run, plan, read_resolved, train
from tests.train.many_runs import run_all
from tests.train.test_parallel import cut_back, events, model
from tests.workspace import Workspace

MIDDLE = 1024  # four updates: one into a round of three
UPDATES, INNER = 12, 3


def recipe(workspace: Workspace, communication: Any, **changes: Any) -> dict[str, Any]:
    """12 updates of 8 rows of 32 tokens, saved after each fourth and measured after each sixth."""
    saving = {"every": f"{MIDDLE} tokens", "keep": 5}
    return workspace.recipe(model=model(), communication=communication, checkpoints=saving, **changes)


def diloco(**settings: Any) -> dict[str, Any]:
    return {"name": "diloco", "inner_updates": INNER, **settings}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(newest_checkpoint(run) / "model.safetensors")


def same(run: Path, other: Path) -> bool:
    """Bit by bit, in what was measured and in what was left."""
    keys = ("loss", "gradient_norm", "sent_bytes")
    told = [[[e[key] for key in keys] for e in events(folder, "train")] for folder in (run, other)]
    a, b = weights(run), weights(other)
    measured = [[e["corpora"] for e in events(folder, "evaluation")] for folder in (run, other)]
    return told[0] == told[1] and measured[0] == measured[1] and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def runs(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two workers, some cut back to the middle of a round and gone on with."""
    folder = tmp_path_factory.mktemp("diloco")
    asked = [
        {"out": str(folder / "summed"), "recipe": recipe(workspace, "every_update")},
        {"out": str(folder / "apart"), "recipe": recipe(workspace, diloco())},
        {"out": str(folder / "bf16"), "recipe": recipe(workspace, diloco(payload="bf16"))},
    ]
    run_all(asked, 2, folder)
    for name in ("apart", "summed"):
        cut_back(folder / name, folder / f"{name} resumed", MIDDLE)
    cut_back(folder / "apart", folder / "apart then one", MIDDLE)
    run_all([{"out": str(folder / f"{name} resumed"), "recipe": None} for name in ("apart", "summed")], 2, folder)
    return folder


@pytest.fixture(scope="module")
def grouped(runs: Path, workspace: Workspace) -> Path:
    """The same by two workers of two processes each."""
    spread = {"shard": "hybrid", "shard_size": 2}
    run_all([{"out": str(runs / "groups"), "recipe": recipe(workspace, diloco(), parallel=spread)}], 4, runs)
    cut_back(runs / "groups", runs / "groups resumed", MIDDLE)
    cut_back(runs / "apart", runs / "apart then groups", MIDDLE)
    texts = [f"parallel.{key}={value}" for key, value in spread.items()]
    again = [{"out": str(runs / "groups resumed"), "recipe": None}]
    run_all([*again, {"out": str(runs / "apart then groups"), "recipe": None, "parallel": texts}], 4, runs)
    return runs


def test_a_killed_run_goes_on_to_the_bit_from_the_middle_of_a_round(runs: Path) -> None:
    for name in ("apart", "summed"):
        assert same(runs / name, runs / f"{name} resumed"), name
        assert workers_of(newest_checkpoint(runs / name)) == (0 if name == "summed" else 2)
    own = [load_file(runs / f"apart/checkpoints/{MIDDLE}/perennial/workers/weights-{n}.safetensors") for n in (0, 1)]
    assert any(not torch.equal(own[0][name], own[1][name]) for name in own[0])


def test_a_checkpoint_is_of_the_last_round(runs: Path) -> None:
    """At the end of a stage a round ends: nothing of a worker's own is left but its moments."""
    end = newest_checkpoint(runs / "apart")
    assert not load_file(end / "perennial/workers/weights-0.safetensors")
    checkpoint.verify(end)
    own = [load_file(end / f"perennial/workers/moments-{number}.safetensors") for number in (0, 1)]
    means = load_file(end / "perennial/optimizer.safetensors")
    assert means.keys() == own[0].keys()
    for name, mean in means.items():
        assert torch.allclose(mean, (own[0][name] + own[1][name]) / 2), name


def test_another_number_of_workers_goes_on_from_the_last_round(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(runs / "apart then one")
    assert "communication diloco: one worker alone, with no other to meet" in capsys.readouterr().err
    assert result["complete"]
    losses = [e["loss"] for e in events(runs / "apart then one", "train")]
    assert losses[:4] == [e["loss"] for e in events(runs / "apart", "train")][:4]
    assert losses[-1] < losses[0]
    assert workers_of(newest_checkpoint(runs / "apart then one")) == 1


def test_bytes_are_those_of_a_ring(runs: Path) -> None:
    """Two workers send half of a sum's bytes twice, which is all of them once."""
    parameters = sum(tensor.numel() for tensor in weights(runs / "apart").values())
    sent = {name: [e["sent_bytes"] for e in events(runs / name, "train")] for name in ("summed", "apart", "bf16")}
    assert sent["summed"] == [4 * parameters * (n + 1) for n in range(UPDATES)]
    assert sent["apart"] == [4 * parameters * ((n + 1) // INNER) for n in range(UPDATES)]
    assert sent["bf16"] == [value // 2 for value in sent["apart"]]


def test_the_loss_told_is_that_of_all_rows(runs: Path) -> None:
    """Before the first update the workers hold one model, so the first losses are equal; both trainings learn."""
    told = {name: [e["loss"] for e in events(runs / name, "train")] for name in ("summed", "apart", "bf16")}
    assert told["apart"][0] == pytest.approx(told["summed"][0], abs=1e-6)
    for losses in told.values():
        assert losses[-1] < losses[0] - 0.3
    assert told["bf16"][-1] == pytest.approx(told["apart"][-1], abs=0.05)


@pytest.mark.slow
def test_a_worker_may_be_a_group_that_shards_its_model(grouped: Path) -> None:
    """Two workers of two processes compute what two of one do, and read what those have saved."""
    losses = {n: [e["loss"] for e in events(grouped / n, "train")] for n in ("apart", "groups", "apart then groups")}
    assert losses["groups"] == pytest.approx(losses["apart"], abs=1e-4)
    assert losses["apart then groups"] == pytest.approx(losses["apart"], abs=1e-4)
    assert same(grouped / "groups", grouped / "groups resumed")
    assert workers_of(newest_checkpoint(grouped / "groups")) == 2
    sent = [events(grouped / name, "train")[-1]["sent_bytes"] for name in ("apart", "groups")]
    assert sent[1] == pytest.approx(sent[0] / 2, rel=0.05)
    a, b = weights(grouped / "apart"), weights(grouped / "groups")
    assert all(torch.allclose(a[name], b[name], atol=2e-3) for name in a)


def test_new_rows_are_not_trained_apart(workspace: Workspace, tmp_path: Path) -> None:
    asked = recipe(workspace, diloco())
    asked["stages"] = [{**asked["stages"][0], "train": "new_rows"}]
    with pytest.raises(UserError, match="communication diloco: moves all weights, stage 'pretrain'"):
        plan(parse_recipe(asked), base=tmp_path)
    with pytest.raises(UserError, match="Did you mean 'diloco'"):
        parse_recipe(recipe(workspace, "dilocco"))


def test_recipes_from_before_there_was_a_choice_keep_their_hash(workspace: Workspace, tmp_path: Path) -> None:
    made = make_run(parse_recipe(recipe(workspace, "every_update")), tmp_path / "run", base=Path())
    path = tmp_path / "run" / RESOLVED
    stored = json.loads(path.read_text())
    del stored["communication"]
    path.write_text(json.dumps(stored))
    assert read_resolved(tmp_path / "run").recipe_hash == made.recipe_hash
    apart = plan(parse_recipe(recipe(workspace, diloco())), base=Path())
    assert apart.recipe_hash != made.recipe_hash
    assert apart.communication["inner_updates"] == INNER
