"""Model folders that cannot be continued: exit code 2, one clear error before any text is prepared, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.model.huggingface import save_model
from tests.cli.test_bad_input import Refused, refused  # noqa: F401  # a fixture
from tests.model.models import tiny_model
from tests.workspace import Workspace

Spoil = Callable[[Path], Any]


@pytest.fixture
def model(workspace: Workspace, tmp_path: Path) -> Path:
    """A folder as it comes from elsewhere, in three shards."""
    folder = tmp_path / "model"
    save_model(tiny_model(vocabulary_size=512, context=64), folder, max_shard_bytes=160_000)
    TokenizerFolder.open(workspace.tokenizer).copy_to(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def entries(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def no_weights(folder: Path) -> None:
    for path in [*shards(folder), folder / "model.safetensors.index.json"]:
        path.unlink()


def pickles_only(folder: Path) -> None:
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not read")


def nan_weights(folder: Path) -> None:
    path = shards(folder)[0]
    stored = load_file(path)
    next(iter(stored.values())).view(-1)[7] = torch.nan
    save_file(stored, path, metadata={"format": "pt"})


def cut_off(folder: Path) -> None:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-1000])


def larger_tokenizer(folder: Path) -> None:
    spoil_tokenizer(folder, lambda content: content["model"]["vocab"].update(more=700))


def spoil_tokenizer(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


BAD: dict[str, tuple[Spoil, list[str], list[str]]] = {
    "no weights": (no_weights, [], ["no weights: neither model.safetensors nor"]),
    "only pickles": (pickles_only, [], ["no weights", "pytorch_model.bin", "perennial convert", "--pickled"]),
    "a shard missing": (lambda f: shards(f)[1].unlink(), [], ["model-00002-of-", "is missing"]),
    "a shard cut off": (cut_off, [], ["model-00002-of-", "not a whole safetensors file"]),
    "an index that lists too much": (
        lambda f: index(f, lambda listed: listed.update({"model.x": shards(f)[0].name})),
        [],
        ["index.json", "lists model.x in model-00001-of-", "does not have it"],
    ),
    "an index that lists too little": (
        lambda f: index(f, lambda listed: listed.pop("model.norm.weight")),
        [],
        ["index.json", "does not list model.norm.weight"],
    ),
    "an unknown architecture": (
        lambda f: entries(f, model_type="lama", architectures=["LamaForCausalLM"]),
        [],
        ["config.json", "model_type 'lama'", "Did you mean 'llama'"],
    ),
    "no language model": (
        lambda f: entries(f, model_type="vit", architectures=["ViTModel"]),
        [],
        ["config.json", "vit", "causal"],
    ),
    "a tokenizer larger than the embedding": (larger_tokenizer, [], ["512", "701 ids"]),
    "a longer context": (
        lambda f: None,
        ["--set", "batch.sequence_length=128"],
        ["batch.sequence_length 128 is longer than the model's context of 64"],
    ),
    "custom code": (
        lambda f: entries(f, auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}),
        [],
        ["config.json", "auto_map", "code of its own, which is not run"],
    ),
    "NaN weights": (nan_weights, [], ["has 1 of", "NaN or infinite"]),
    "quantised weights": (
        lambda f: entries(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        [],
        ["quantization_config", "give the folder they were made from"],
    ),
    "a tokenizer of an unknown kind": (
        lambda f: spoil_tokenizer(f, lambda content: content["model"].update(type="Mystery")),
        [],
        ["tokenizer"],
    ),
    "sizes that others refuse": (lambda f: entries(f, hidden_size="64"), [], ["transformers cannot load this model"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), [], ["no tokenizer.json in it"]),
    "no configuration": (lambda f: (f / "config.json").write_text("{"), [], ["config.json"]),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("data", ["corpus", "text"])
def test_a_model_that_cannot_be_continued(
    kind: str,
    data: str,
    model: Path,
    workspace: Workspace,
    refused: Refused,  # noqa: F811
) -> None:
    spoil, options, words = BAD[kind]
    spoil(model)
    path = workspace.new if data == "corpus" else workspace.new_text
    command = ["continue", str(model), "--data", f"new={path}", "--tokens", "1K tokens", "--out", "child", *options]
    error = refused(*command)
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    "kind",
    [
        "no weights",
        "a shard missing",
        "an unknown architecture",
        "custom code",
        "a tokenizer larger than the embedding",
    ],
)
@pytest.mark.parametrize("command", ["generate", "verify", "eval"])
def test_nor_measured(kind: str, command: str, model: Path, workspace: Workspace, refused: Refused) -> None:  # noqa: F811
    spoil, _, words = BAD[kind]
    spoil(model)
    error = refused(command, str(model), *(["--data", f"new={workspace.new}"] if command == "eval" else []))
    for word in words:
        assert word in error


def test_none_of_them_was_spoilt_before(
    model: Path,
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from perennial.cli.main import main

    monkeypatch.chdir(tmp_path)
    data = ["--data", f"new={workspace.new}", "--tokens", "1K tokens", "--out", "child"]
    assert main(["continue", str(model), *data, "--set", "checkpoints.every=100%", "--json"]) == 0
    shutil.rmtree("child")
