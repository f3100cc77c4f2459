"""In, no update, out: the checkpoint that a run begins with holds its parent's tensors, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perennial.core import plugins
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.train import session
from perennial.train.recipe import parse_recipe
from perennial.train.run import start
from tests.model.test_families import made_by_transformers
from tests.workspace import Workspace


def stored(folder: Path) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {
        name: (tensor.dtype, list(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())
        for name, tensor in found.items()
    }


@pytest.mark.parametrize("family", plugins.names("families"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_lost_on_the_way(
    family: str, dtype: torch.dtype, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With action 'rollback' a run saves before its first update, so that there is something to return to."""
    monkeypatch.setattr(session, "matmul_rate", lambda precision, device: 1e11)
    folder = tmp_path / "model"
    made_by_transformers(family, {"vocab_size": 512}).to(dtype).save_pretrained(folder, max_shard_size="60KB")
    TokenizerFolder.open(workspace.tokenizer).copy_to(folder)
    changes: dict[str, Any] = {
        "parent": str(folder),
        "corpora": {"new": str(workspace.new)},
        "stages": [
            {"name": "a", "budget": "256 tokens", "mixture": {"new": 1}, "schedule": {"name": "constant", "peak": 1e-2}}
        ],
        "spikes": {"action": "rollback"},
        "checkpoints": {"keep": 9},
    }
    recipe = {key: value for key, value in workspace.recipe(**changes).items() if key != "model"}
    start(parse_recipe(recipe), tmp_path / "run", base=Path(), quiet=True)
    before, first, last = (stored(path) for path in (folder, *(tmp_path / "run/checkpoints" / n for n in ("0", "256"))))
    assert first == before
    assert {name: kind[:2] for name, kind in last.items()} == {name: kind[:2] for name, kind in before.items()}
    assert all(last[name][2] != before[name][2] for name in before if name.endswith("embed_tokens.weight"))
    written = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "run/checkpoints/0")]
    assert written[0] == written[1]
