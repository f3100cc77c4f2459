"""`perennial show` on model folders from elsewhere: what they are, what can be done with them, what is unknown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from perennial.cli import main
from perennial.core.errors import UserError
from perennial.model.huggingface import save_model
from perennial.report.model_folder import tokenizer_kind
from perennial.report.show import show, to_text
from tests.model.models import tiny_model

CARD = "---\nlicense: apache-2.0\n---\n# A model\n"


@pytest.fixture
def folder(workspace: Any, tmp_path: Path) -> Path:
    """A native model in bf16 with a tokenizer and a card."""
    path = tmp_path / "a-model"
    save_model(tiny_model(vocabulary_size=520, tied_embeddings=True, kv_heads=2), path, dtype=torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(workspace.tokenizer / name, path / name)
    (path / "README.md").write_text(CARD)
    return path


def changed(folder: Path, **entries: Any) -> Path:
    """The folder with entries of its config.json replaced."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return folder


def test_a_native_model(folder: Path) -> None:
    facts = show(folder)
    model = facts["model"]
    assert (facts["kind"], model["name"], model["model_type"]) == ("model", "a-model", "llama")
    assert model["support"]["through"] == "native"
    total = sum(one.numel() for one in tiny_model(vocabulary_size=520, tied_embeddings=True, kv_heads=2).parameters())
    assert model["parameters"] == {"total": total, "embedding": 520 * 64}
    assert (model["shape"]["vocabulary_size"], model["shape"]["context"], model["shape"]["layers"]) == (520, 2048, 2)
    assert model["shape"]["tied_embeddings"]
    assert model["weights"]["values_by_dtype"] == {"BF16": total}
    assert model["weights"]["bytes"] == (folder / "model.safetensors").stat().st_size
    assert (model["tokenizer"]["kind"], model["tokenizer"]["ids"], model["tokenizer"]["missing_rows"]) == (
        "byte-level BPE",
        512,
        0,
    )
    assert model["license"] == "apache-2.0"
    text = to_text(facts)
    for words in ("LlamaForCausalLM", "BF16", "apache-2.0", "natively", "tied to the output head", "context 2048"):
        assert words in text


def test_every_unknown_is_marked_and_can_be_stated(folder: Path) -> None:
    lines = to_text(show(folder)).splitlines()
    (start,) = [index for index, line in enumerate(lines) if "no lineage" in line]
    past = lines[start + 1 :]
    assert len(past) == 4
    assert all("(estimate): " in line and "Known? --parent " in line for line in past)


def test_shards_are_counted(folder: Path) -> None:
    save_model(tiny_model(vocabulary_size=520, tied_embeddings=True, kv_heads=2), folder, max_shard_bytes=1e5)
    weights = show(folder)["model"]["weights"]
    assert len(weights["files"]) > 1
    assert f"in {len(weights['files'])} files, F32" in to_text(show(folder))


def test_a_model_that_cannot_be_used_is_shown_with_the_reason(folder: Path) -> None:
    facts = show(changed(folder, auto_map={"AutoModel": "own.Model"}))
    assert facts["model"]["support"]["through"] is None
    assert "auto_map" in facts["model"]["support"]["reason"]
    text = to_text(facts)
    assert "can be used   no: " in text
    assert "weights" in text
    assert "past" not in facts


def test_a_model_that_runs_through_transformers(folder: Path, workspace: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="makes the model with transformers (extra: hf)")
    config = transformers.PhiConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.PhiForCausalLM(config).save_pretrained(tmp_path / "phi")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(workspace.tokenizer / name, tmp_path / "phi" / name)
    facts = show(tmp_path / "phi")
    assert facts["model"]["support"]["through"] == "transformers"
    assert "'phi'" in facts["model"]["support"]["reason"]
    assert facts["model"]["parameters"]["total"] == facts["past"]["tokens"]["value"] / 20
    assert "through transformers, not natively: model_type 'phi'" in to_text(facts)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "no tokenizer.json in it"),
    ],
)
def test_what_is_missing_is_a_fact(folder: Path, file: str, words: str) -> None:
    (folder / file).unlink()
    text = to_text(show(folder))
    assert words in text
    assert "can be used   no, not as it is: " in text


def test_a_tokenizer_with_more_ids_than_rows(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    token = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"].append({**token, "id": 522, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    facts = show(folder)
    assert facts["model"]["tokenizer"]["missing_rows"] == 3
    assert "lacks 3 rows" in to_text(facts)
    assert "can be used   no, not as it is: the tokenizer has more ids" in to_text(facts)


@pytest.mark.parametrize(
    ("model", "pre_tokenizer", "kind"),
    [
        ({"type": "BPE"}, {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]}, "byte-level BPE"),
        ({"type": "BPE", "byte_fallback": True}, None, "BPE with byte fallback"),
        ({"type": "Unigram"}, {"type": "Metaspace"}, "Unigram"),
        ({}, None, "BPE"),
    ],
)
def test_kinds_of_tokenizers(model: dict[str, Any], pre_tokenizer: Any, kind: str) -> None:
    assert tokenizer_kind({"model": model, "pre_tokenizer": pre_tokenizer}) == kind


def test_there_are_no_checksums_to_verify(folder: Path) -> None:
    with pytest.raises(UserError, match="has no checksums to verify"):
        show(folder, verify=True)


def test_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["show", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts.keys() == {"kind", "path", "config", "model", "past"}
    assert all(fact["is_estimate"] and fact["basis"] for fact in facts["past"].values())


def test_a_name_from_the_hub(folder: Path, tmp_path: Path) -> None:
    assert show(changed(folder, _name_or_path="org/A-Model"))["model"]["name"] == "org/A-Model"
    assert show(changed(folder, _name_or_path="org/its-base"))["model"]["name"] == "a-model"
    cached = tmp_path / "models--org--name/snapshots/0123abcd"
    cached.parent.mkdir(parents=True)
    shutil.copytree(folder, cached)
    assert show(cached)["model"]["name"] == "org/name"
