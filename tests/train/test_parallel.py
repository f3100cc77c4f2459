"""Many processes compute what one computes: losses, gradient norms, evaluations, weights; in every layout of the mesh.

Tolerances: fp32 sums in another order, over 12 updates at a high rate: 1e-4 in losses, 1e-3 of a gradient norm.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perennial.core import records
from perennial.core.layout import Layout
from perennial.core.lineage import checkpoints_of, newest_checkpoint
from perennial.train import checkpoint
from perennial.train.recipe import ParallelSettings, parse_recipe
from perennial.train.run import start, train
from tests.train.many_runs import run_all
from tests.workspace import Workspace

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "replicas": {"shard": "none"},
        "shards": {"shard": "full"},
        "tensor": {"tensor": 2},
    },
    4: {
        "replicas": {"shard": "none"},
        "shards": {"shard": "full"},
        "hybrid": {"shard": "hybrid", "shard_size": 2},
        "shards and tensor": {"shard": "full", "tensor": 2},
        "replicas and tensor": {"shard": "none", "tensor": 2},
    },
}
CASES = [(processes, name) for processes, layouts in LAYOUTS.items() for name in layouts]


def model(**changes: Any) -> dict[str, Any]:
    """Two key-value heads, so that two processes can divide them."""
    shape = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 64, "context": 64}
    return {"options": {**shape, **changes}}


def recipe(workspace: Workspace, **changes: Any) -> dict[str, Any]:
    """Rows that neither 4 nor 3 divides, in micro-batches."""
    asked = workspace.recipe(model=model(qk_norm="head"), **changes)
    asked["checkpoints"] = {"every": "1024 tokens", "keep": 3}
    return {**asked, "batch": {"sequences": 6, "sequence_length": 32, "micro_batch": 1}}


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return records.read(run / "events.jsonl", kind)


def assert_close(run: Path, one: Path) -> None:
    seen, wanted = events(run, "train"), events(one, "train")
    assert [e["tokens"] for e in seen] == [e["tokens"] for e in wanted]
    assert [e["loss"] for e in seen] == pytest.approx([e["loss"] for e in wanted], abs=1e-4)
    assert [e["gradient_norm"] for e in seen] == pytest.approx([e["gradient_norm"] for e in wanted], rel=1e-3)
    for a, b in zip(events(run, "evaluation"), events(one, "evaluation"), strict=True):
        assert a["corpora"]["old"]["tokens"] == b["corpora"]["old"]["tokens"]
        assert a["corpora"]["old"]["nats_per_token"] == pytest.approx(b["corpora"]["old"]["nats_per_token"], abs=1e-4)
    a, b = (load_file(newest_checkpoint(folder) / "model.safetensors") for folder in (run, one))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], atol=2e-3) for name in a)


def cut_back(run: Path, copy: Path, tokens: int) -> Path:
    """A copy of a run as it was when the checkpoint at `tokens` was its newest."""
    shutil.copytree(run, copy)
    for path in checkpoints_of(copy):
        if int(path.name) > tokens:
            shutil.rmtree(path)
    assert checkpoints_of(copy), f"{run} has kept no checkpoint up to {tokens}"
    lines = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["event"] != "done" and line.get("tokens", 0) <= tokens]
    (copy / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return copy


MIDDLE = 1152
"""Tokens of six updates."""
ONWARD: dict[int, list[tuple[str, dict[str, Any]]]] = {
    4: [("one", {"parallel.shard": "full"})],
    2: [
        ("4 shards and tensor", {"parallel.shard": "none", "parallel.tensor": 1}),
        ("4 hybrid", {"parallel.shard": "none", "parallel.shard_size": "null", "parallel.tensor": 2}),
    ],
}
"""Processes -> runs of another number that they go on with from the middle, and what changes."""


@pytest.fixture(scope="module")
def runs(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, and every layout on 4 and on 2; some gone on with from the middle by another number (`ONWARD`)."""
    folder = tmp_path_factory.mktemp("parallel")
    start(parse_recipe(recipe(workspace)), folder / "one", base=Path(), quiet=True)
    start(parse_recipe(recipe(workspace, precision="bf16")), folder / "one bf16", base=Path(), quiet=True)
    for processes in (4, 2):
        layouts = LAYOUTS[processes]
        asked: list[dict[str, Any]] = [
            {"out": str(folder / f"{processes} {name}"), "recipe": recipe(workspace, parallel=parallel)}
            for name, parallel in layouts.items()
        ]
        if processes == 2:
            sharded = recipe(workspace, parallel=layouts["shards"])
            asked.append({"out": str(folder / "2 behind"), "recipe": sharded, "behind": True})
            narrow = recipe(workspace, parallel=layouts["shards"], precision="bf16")
            asked.append({"out": str(folder / "2 bf16"), "recipe": narrow})
        for name, changes in ONWARD[processes]:
            copy = cut_back(folder / name, folder / f"{name} then {processes}", MIDDLE)
            texts = [f"{key}={value}" for key, value in changes.items()]
            asked.append({"out": str(copy), "recipe": None, "parallel": texts})
        run_all(asked, processes, folder)
    return folder


@pytest.mark.parametrize(("processes", "name"), CASES)
def test_many_processes_train_as_one(runs: Path, processes: int, name: str) -> None:
    assert_close(runs / f"{processes} {name}", runs / "one")
    layout = Layout(**events(runs / f"{processes} {name}", "run")[0]["layout"])
    assert layout.replicas * layout.shards * layout.tensor == processes


def test_shards_in_bf16_train_as_one_process_does(runs: Path) -> None:
    """Tolerance 2e-2 nats and 10 % of a gradient norm: gathered gains and biases are rounded to 8 bits."""
    seen, wanted = events(runs / "2 bf16", "train"), events(runs / "one bf16", "train")
    assert [e["loss"] for e in seen] == pytest.approx([e["loss"] for e in wanted], abs=2e-2)
    assert [e["gradient_norm"] for e in seen] == pytest.approx([e["gradient_norm"] for e in wanted], rel=0.1)
    assert [e["loss"] for e in wanted] != [e["loss"] for e in events(runs / "one", "train")]  # bf16 was in effect
    weights = load_file(newest_checkpoint(runs / "2 bf16") / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_checkpoint_is_the_same_kind_of_folder_whoever_wrote_it(runs: Path) -> None:
    for processes, name in CASES:
        newest = newest_checkpoint(runs / f"{processes} {name}")
        checkpoint.verify(newest)
        names = {path.name for path in newest.iterdir()}
        assert names == {path.name for path in newest_checkpoint(runs / "one").iterdir()}
        parts = sorted(path.name for path in (newest / "perennial").glob("optimizer*"))
        shards = events(runs / f"{processes} {name}", "run")[0]["layout"]["shards"]
        tensor = events(runs / f"{processes} {name}", "run")[0]["layout"]["tensor"]
        assert len(parts) == shards * tensor, (processes, name, parts)


def test_what_is_saved_while_training_goes_on_is_the_same(runs: Path) -> None:
    """Tolerance 0, in every checkpoint."""
    for one, other in zip(checkpoints_of(runs / "2 shards"), checkpoints_of(runs / "2 behind"), strict=True):
        files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
        assert len(files) == 3
        assert all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


def test_what_some_processes_saved_any_other_number_goes_on_from(runs: Path) -> None:
    """1 -> 4 sharded, 2 sharded -> 1, 4 sharded and divided -> 2 replicated, 4 hybrid -> 2 divided."""
    for processes, cases in ONWARD.items():
        for name, _ in cases:
            assert_close(runs / f"{name} then {processes}", runs / "one")
            assert events(runs / f"{name} then {processes}", "resume")[0]["tokens"] == MIDDLE
    alone = cut_back(runs / "2 shards", runs / "2 shards then 1", MIDDLE)
    train(alone, quiet=True)
    assert_close(alone, runs / "one")
    assert events(alone, "resume")[0]["tokens"] == MIDDLE


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="shard_size 4 belongs to shard: hybrid"):
        ParallelSettings(shard="full", shard_size=4)
