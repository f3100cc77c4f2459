"""Two processes continue other people's models as one does: fused and transposed layouts, biases, experts, bf16.

Tolerance: 2e-4 in losses of 8 updates at a high rate, from sums in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perennial.core import records
from perennial.core.lineage import newest_checkpoint
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.train.recipe import parse_recipe
from perennial.train.run import start
from tests.foreign import made, stored
from tests.model.test_families import made_by_transformers
from tests.train.many_runs import run_all
from tests.workspace import Workspace

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

FULL: dict[str, Any] = {"shard": "full"}
DIVIDED: dict[str, Any] = {"tensor": 2}
NOISY = {
    "name": "noisy",
    "budget": "3072 tokens",
    "mixture": {"new": 1},
    "schedule": {"name": "constant", "peak": 1e-6},
}
"""Learns nothing, so that every second loss is above the median."""
TOUCHY = {"action": "rollback", "sigmas": 1e-6, "rise": 1e-3, "window": 8, "max_rollbacks": 99}
CASES: dict[str, tuple[str, torch.dtype, dict[str, Any], dict[str, Any]]] = {
    "sharded, queries, keys and values in one matrix": ("gpt_neox", torch.bfloat16, FULL, {}),
    "divided, queries, keys and values in one matrix": ("gpt_neox", torch.bfloat16, DIVIDED, {}),
    "sharded, transposed and tied": ("gpt2", torch.float32, FULL, {}),
    "divided, transposed and tied": ("gpt2", torch.float32, DIVIDED, {"document_mask": True}),
    "divided, normed over all heads": ("olmo2", torch.float32, DIVIDED, {}),
    "sharded, with rollbacks": ("llama", torch.float32, FULL, {"stages": [NOISY], "spikes": TOUCHY}),
    "sharded, checkpointed": ("qwen3", torch.float32, FULL, {"activation_checkpointing": "full"}),
    "replicated, experts": ("mixtral: experts", torch.float32, {"shard": "none"}, {}),
    "sharded, experts": ("mixtral: experts", torch.bfloat16, FULL, {}),
    "sharded, capped logits": ("gemma2: capped logits", torch.float32, FULL, {}),
}


def recipe(workspace: Workspace, parent: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Two stages, the second with Muon."""
    base = {**workspace.recipe(), "name": "update", "parent": str(parent), "corpora": {"new": str(workspace.new)}}
    del base["model"]
    stage = {"mixture": {"new": "100%"}, "schedule": {"name": "cosine", "peak": 5e-3, "warmup": "10%"}}
    stages = [
        {**stage, "name": "first", "budget": "1280 tokens"},
        {**stage, "name": "second", "budget": "768 tokens", "optimizer": "muon"},
    ]
    return {**base, "stages": stages, "checkpoints": {"every": "256 tokens"}, **changes}


@pytest.fixture(scope="module")
def runs(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by one process and by two."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = TokenizerFolder.open(workspace.tokenizer)
    asked = []
    for name, (kind, dtype, parallel, changes) in CASES.items():
        parent = root / "parents" / name
        if ":" in kind:
            stored(made(kind, tokenizer.vocabulary_size), parent, dtype)
        else:
            made_by_transformers(kind, {"vocab_size": 512}).to(dtype).save_pretrained(parent)
        tokenizer.copy_to(parent)
        wanted = recipe(workspace, parent, changes)
        start(parse_recipe(wanted), root / "one" / name, base=Path(), quiet=True)
        asked.append({"out": str(root / "two" / name), "recipe": {**wanted, "parallel": parallel}})
    run_all(asked, 2, root)
    return root


@pytest.mark.parametrize("name", CASES)
def test_two_processes_continue_a_model_as_one(name: str, runs: Path) -> None:
    one, two = ({kind: _events(runs / who / name, kind) for kind in _KINDS} for who in ("one", "two"))
    assert [e["tokens"] for e in two["train"]] == [e["tokens"] for e in one["train"]]
    assert [e["loss"] for e in two["train"]] == pytest.approx([e["loss"] for e in one["train"]], abs=2e-4)
    assert [e["skipped_rows"] for e in two["rollback"]] == [e["skipped_rows"] for e in one["rollback"]]
    assert bool(one["rollback"]) == ("rollback" in name)
    layout = two["run"][0]["layout"]
    wanted = CASES[name][2]
    assert layout == {
        "replicas": 1 + (wanted == {"shard": "none"}),
        "shards": 1 + (wanted == FULL),
        "tensor": 1 + (wanted == DIVIDED),
    }
    found = [
        {p.name: load_file(p) for p in sorted(newest_checkpoint(runs / w / name).rglob("model*.safetensors"))}
        for w in ("one", "two")
    ]
    assert found[0].keys() == found[1].keys()
    for file, tensors in found[0].items():
        assert {k: (v.shape, v.dtype) for k, v in tensors.items()} == {
            k: (v.shape, v.dtype) for k, v in found[1][file].items()
        }


_KINDS = ("run", "train", "rollback")


def _events(run: Path, kind: str) -> list[dict[str, Any]]:
    return records.read(run / "events.jsonl", kind)
