"""Two folders side by side, and native code against transformers: what is the same and what is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perennial.cli.main import main
from perennial.core.errors import UserError
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.evals import parity
from perennial.evals.verification import verify
from perennial.model.huggingface import load_model, save_model
from perennial.model.transformer import Transformer
from tests.model.models import tiny_model
from tests.workspace import Workspace

pytest.importorskip("transformers")


@pytest.fixture
def folder(workspace: Workspace, tmp_path: Path) -> Path:
    """A tiny Qwen3 with a tokenizer."""
    save_model(tiny_model(qk_norm="head", vocabulary_size=512), tmp_path / "model")
    TokenizerFolder.open(workspace.tokenizer).copy_to(tmp_path / "model")
    return tmp_path / "model"


def copy_of(folder: Path, **changes: Any) -> Path:
    """A copy of a folder in which some tensors are changed: name=function."""
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    stored = load_file(other / "model.safetensors")
    for name, change in changes.items():
        stored[name.replace("__", ".")] = change(stored[name.replace("__", ".")])
    save_file(stored, other / "model.safetensors", metadata={"format": "pt"})
    return other


def test_a_copy_is_the_same(folder: Path) -> None:
    found = verify(folder, copy_of(folder), quiet=True)
    assert found["same"]
    assert found["weights"]["identical"] == 25
    assert found["weights"]["different"] == found["weights"]["unmatched"] == 0
    assert found["logits"]["max_difference"] == 0
    assert found["logits"]["by"] == "transformers"
    assert found["tokenizer"]["decodes_to_the_text"] == [True, True]
    assert [part["same"] for part in found["native"]] == [True, True]
    assert found["native"][0]["max_difference"] < 1e-5


def test_one_changed_weight_is_named(folder: Path) -> None:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 4] += 0.5
        return tensor

    found = verify(folder, copy_of(folder, model__layers__1__mlp__up_proj__weight=change), quiet=True)
    assert not found["same"]
    (worst,) = found["weights"]["most_different"]
    assert worst["name"] == "model.layers.1.mlp.up_proj.weight"
    assert worst["max_difference"] == pytest.approx(0.5)
    assert found["logits"]["max_difference"] > found["logits"]["limit"]


def test_rounding_to_bf16_is_shown_as_a_difference_of_type(folder: Path) -> None:
    short = folder.with_name("short")
    shutil.copytree(folder, short)
    save_model(load_model(folder), short, dtype=torch.bfloat16)
    found = verify(folder, short, quiet=True)
    assert found["weights"]["different"] == 25
    assert found["weights"]["most_different"][0]["dtypes"] == ["float32", "bfloat16"]
    assert not found["logits"]["same"]


def test_a_weight_that_no_token_of_the_text_uses_is_still_a_difference(folder: Path) -> None:
    used = set(parity.sample_ids(folder)[0].tolist())
    unused = next(token for token in range(512) if token not in used)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[unused] = 1000.0
        return tensor

    found = verify(folder, copy_of(folder, model__embed_tokens__weight=change), quiet=True)
    assert found["logits"]["same"]
    assert not found["weights"]["same"]
    assert not found["same"]


def test_a_window_is_compared_beyond_its_length_or_said_not_to_be(workspace: Workspace, tmp_path: Path) -> None:
    for window, length in ((300, 332), (3000, 256)):
        folder = tmp_path / str(window)
        save_model(tiny_model(family="mistral", window=window, vocabulary_size=512, context=4096), folder)
        TokenizerFolder.open(workspace.tokenizer).copy_to(folder)
        found = parity.parity(folder)
        assert found is not None
        assert found["same"]
        assert found["tokens"] == length
        assert found["not_reached"] == ([] if length > window else [window])
        assert ("beyond 3000 are not reached" in parity.in_words(found)) == (window == 3000)


def test_a_longer_vocabulary_is_compared_on_what_both_have(folder: Path) -> None:
    model = load_model(folder)
    wider = Transformer(model.config.model_copy(update={"vocabulary_size": 520}))
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat((state[name], torch.ones(8, 64)))
    wider.load_state_dict(state)
    other = folder.with_name("wider")
    shutil.copytree(folder, other)
    save_model(wider, other)
    found = verify(folder, other, quiet=True)
    assert found["logits"]["vocabulary"] == 512
    assert found["logits"]["same"]
    assert found["weights"]["different"] == 2
    assert found["weights"]["most_different"][0]["max_difference"] is None


def test_another_tokenizer_is_seen(folder: Path) -> None:
    other = copy_of(folder)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:50]
    (other / "tokenizer.json").write_text(json.dumps(content))
    found = verify(folder, other, quiet=True)
    assert not found["same"]
    assert not found["tokenizer"]["same"]
    assert found["tokenizer"]["tokens"][1] > found["tokenizer"]["tokens"][0]
    assert found["logits"]["same"]


def test_a_mistake_in_native_code_is_found_at_import(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these is a real way of getting a conversion wrong; none may pass."""
    assert parity.checked_parity(folder)["same"]

    def swapped(model: Transformer) -> None:
        attention = model.model.layers[0].self_attn
        attention.k_proj.weight.data = attention.k_proj.weight.data.roll(16, 0)  # heads in another order

    def interleaved(model: Transformer) -> None:
        attention = model.model.layers[0].self_attn
        for weight in (attention.q_proj.weight, attention.k_proj.weight):  # pairs (2i, 2i + 1) instead of (i, i + K/2)
            weight.data = weight.data.unflatten(0, (4, 2, 8)).transpose(1, 2).flatten(0, 2)

    def without_gain(model: Transformer) -> None:
        model.model.norm.weight.data.fill_(1.0)

    for mistake in (swapped, interleaved, without_gain):

        def load(folder: Path, mistake: Any = mistake) -> Transformer:
            model = load_model(folder)
            assert isinstance(model, Transformer)
            mistake(model)
            return model

        parity._parity_of.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(parity, "load_model", load)
            with pytest.raises(UserError, match="does not give the logits that transformers gives"):
                parity.checked_parity(folder)


def test_no_number_is_no_agreement() -> None:
    ours = torch.zeros(3, 5)
    assert not parity.difference(ours * torch.nan, ours)["same"]


def test_what_runs_through_transformers_is_not_compared_with_itself(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    config = transformers.OPTConfig(vocab_size=97, max_position_embeddings=64, word_embed_proj_dim=32, **sizes)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    assert parity.parity(tmp_path) is None
    assert parity.sample_ids(tmp_path).shape == (1, 64)


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = copy_of(folder, lm_head__weight=lambda tensor: tensor + 1e-3)
    assert main(["verify", str(folder)]) == 0
    assert "within the" in capsys.readouterr().out
    assert main(["verify", str(folder), str(other)]) == 1
    out = capsys.readouterr().out
    assert "lm_head.weight: 0.001" in out
    assert out.endswith("DIFFERENT\n")
    (tmp_path / "text.txt").write_text("A short text.")
    assert main(["verify", str(folder), str(folder), "--text", str(tmp_path / "text.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["logits"]["tokens"] == found["tokenizer"]["tokens"][0] < 20
    (tmp_path / "empty.txt").write_text("  ")
    assert main(["verify", str(folder), "--text", str(tmp_path / "empty.txt")]) == 2
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
