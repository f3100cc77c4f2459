"""`perennial plan --memory`: recipes with new models, parents of both kinds, stages; wrong input; no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from perennial.cli.main import main
from perennial.model.config import ModelConfig
from perennial.model.cost import num_parameters
from tests.workspace import Workspace

STAGE = {
    "name": "only",
    "budget": "1M tokens",
    "mixture": {"text": "100%"},
    "schedule": {"name": "constant", "peak": 1},
}
RECIPE: dict[str, Any] = {
    "name": "planned",
    "model": {"preset": "10m", "options": {"vocabulary_size": 4096}},
    "corpora": {"text": "not/there"},
    "stages": [STAGE],
    "batch": {"sequences": 8, "sequence_length": 256, "micro_batch": 4},
    "precision": "fp32",
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}), encoding="utf-8")
    return path


def planned(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    """What `plan --memory --json` says."""
    assert main(["plan", "--memory", "--json", *map(str, arguments)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_new_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(tmp_path)
    found = planned(capsys, recipe, "--device", "cpu", "--memory-limit", "8GiB")
    parameters = num_parameters(ModelConfig.from_preset("10m", 4096)).total
    parts = found["stages"]["only"]["parts_bytes"]
    assert (found["parameters"], parts["parameters"], parts["optimizer"]) == (
        parameters,
        4 * parameters,
        8 * parameters,
    )
    assert sum(parts.values()) == found["total_bytes"] == found["stages"]["only"]["total_bytes"]
    assert (found["fits"], found["micro_batch"], found["limit_bytes"]) == (True, 4, 8 << 30)
    larger = planned(capsys, recipe, "batch.micro_batch=8", "--device", "cpu", "--memory-limit", "8GiB")
    assert larger["total_bytes"] > found["total_bytes"]


def test_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the issue's order of words too; without --device and --memory-limit it is this machine."""
    recipe = str(written(tmp_path))
    texts = []
    for arguments in ([recipe, "--memory"], ["--memory", recipe]):
        assert main(["plan", *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    for words in ("optimizer", "activations", "total", "1 x 1 x 1 (replicate x shard x tensor)", "Fits: "):
        assert words in texts[0]
    assert main(["plan", recipe, "--memory", "--memory-limit", "350MiB", "--device", "cpu"]) == 0
    assert "Does not fit: 350.0 MiB is there" in capsys.readouterr().out


def test_many_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(tmp_path, parallel={"shard": "full"})
    found = planned(capsys, recipe, "--processes", 4, "--device", "cuda", "--memory-limit", "80GB")
    assert found["mesh"] == {"replicas": 1, "shards": 4, "tensor": 1}
    assert (found["processes"], found["micro_batch"], found["device"]) == (4, 2, "cuda")
    assert found["stages"]["only"]["parts_bytes"]["communication"] > 0


def test_stages_differ_by_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [{**STAGE, "name": name, "optimizer": name} for name in ("adamw", "muon")]
    found = planned(capsys, written(tmp_path, stages=stages), "--device", "cpu")
    adamw, muon = (found["stages"][name]["parts_bytes"]["optimizer"] for name in ("adamw", "muon"))
    assert adamw - muon == 4 * num_parameters(ModelConfig.from_preset("10m", 4096)).matrix
    assert main(["plan", "--memory", str(written(tmp_path, stages=stages))]) == 0
    assert "That is stage 'adamw'; the others need less: muon " in capsys.readouterr().out


def test_the_vocabulary_is_the_first_corpus(
    tmp_path: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {**STAGE, "mixture": {"old": "100%"}}
    settings = {"model": {"preset": "1m"}, "corpora": {"old": str(workspace.old)}, "stages": [stage]}
    found = planned(capsys, written(tmp_path, **settings))
    assert found["parameters"] == num_parameters(ModelConfig.from_preset("1m", 512)).total


def test_parents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that native code reads, one that transformers runs, and one whose vocabulary was extended."""
    import torch

    from perennial.core.lineage import Lineage
    from perennial.model.huggingface import save_model
    from perennial.model.transformer import Transformer
    from tests.foreign import made, stored

    config = ModelConfig(vocabulary_size=300, width=64, layers=2, heads=4, mlp_width=128, context=256)
    save_model(Transformer(config), tmp_path / "native")
    settings: dict[str, Any] = {"model": None, "parent": "native"}
    found = planned(capsys, written(tmp_path, **settings))
    assert (found["is_native"], found["parameters"]) == (True, num_parameters(config).total)

    with torch.random.fork_rng():
        network = made("opt: learned positions")
        stored(network, tmp_path / "foreign")
    batch = {"batch": {"sequences": 8, "sequence_length": 32}}
    found = planned(capsys, written(tmp_path, model=None, parent="foreign", **batch))
    assert (found["is_native"], found["parameters"]) == (False, sum(p.numel() for p in network.parameters()))
    assert main(["plan", "--memory", str(tmp_path / "recipe.yaml")]) == 0
    assert "Run through transformers: activations are those of a native model" in capsys.readouterr().out

    state = tmp_path / "native" / "perennial"
    state.mkdir(exist_ok=True)
    change = {"operation": "vocab extend", "ids": [290, 300]}
    lineage = Lineage(checkpoint="0" * 64, stages=[], changes=[change])
    (state / "lineage.json").write_text(lineage.model_dump_json(), encoding="utf-8")
    rows = written(tmp_path, **settings, stages=[{**STAGE, "train": "new_rows"}])
    parts = planned(capsys, rows)["stages"]["only"]["parts_bytes"]
    assert parts["optimizer"] == 2 * 10 * 64 * 8


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({}, ["--processes", "0"], "--processes 0: must be 1 or more"),
        ({}, ["--memory-limit", "80"], "such as 80GB"),
        ({}, ["--processes", "9"], "9 processes for batch.sequences 8"),
        ({}, ["batch.micro_bach=2"], "Did you mean 'micro_batch'?"),
        ({"model": {"preset": "10m"}}, [], "no such prepared corpus folder"),
        ({"model": {"preset": "10m"}, "corpora": {}}, [], "no corpus 'text'"),
        ({"stages": [{**STAGE, "train": "new_rows"}]}, [], "vocab extend"),
        ({"batch": {"sequences": 1, "sequence_length": 5000}}, [], "longer than the model's context of 1024"),
        ({"parallel": {"tensor": 2}}, ["--processes", "3"], "parallel.tensor 2 does not divide"),
    ],
)
def test_wrong_input(
    changes: dict[str, Any], arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--memory", str(written(tmp_path, **changes)), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_recipe_needs_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(written(tmp_path))]) == 2
    assert "a recipe is planned with --memory" in capsys.readouterr().err


def test_without_torch(tmp_path: Path) -> None:
    recipe = str(written(tmp_path))
    program = (
        "import sys\nfrom perennial.cli.main import main\n"
        f"assert main(['plan', '--memory', {recipe!r}, '--processes', '2']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True)
