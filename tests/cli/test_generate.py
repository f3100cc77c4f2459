"""perennial generate, as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from perennial.cli.main import main
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.model.huggingface import save_model
from tests.model.models import tiny_model
from tests.workspace import Workspace


@pytest.fixture
def folder(workspace: Workspace, tmp_path: Path) -> Path:
    separator = TokenizerFolder.open(workspace.tokenizer).separator_id
    ids = {"eos_token_id": separator, "bos_token_id": separator}
    save_model(tiny_model(vocabulary_size=512, context=64), tmp_path / "model", extra_config=ids)
    TokenizerFolder.open(workspace.tokenizer).copy_to(tmp_path / "model")
    return tmp_path / "model"


def test_greedy_text_is_that_of_transformers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The name of the", return_tensors="pt")
    made = model.generate(**inputs, do_sample=False, max_new_tokens=20, pad_token_id=0)
    expected = tokenizer.decode(made[0], skip_special_tokens=True)
    assert main(["generate", str(folder), "--prompt", "The name of the", "--tokens", "20"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_several_prompts_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(folder), "--prompt", "a", "--prompt", "b", "--temperature", "1", "--seed", "3", "--json"]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert [result["prompt"] for result in first["results"]] == ["a", "b"]
    torch.rand(3)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_what_a_folder_asks_for_and_is_not_done_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.1}))
    assert main(["generate", str(folder), "--tokens", "3"]) == 0
    assert "repetition_penalty 1.1, which is not applied here" in capsys.readouterr().err
    path.write_text(json.dumps({"eos_token_id": "x"}))
    assert main(["generate", str(folder), "--tokens", "3"]) == 2
    assert "eos_token_id 'x' must be an id" in capsys.readouterr().err


def test_the_end_of_text_may_stand_in_the_models_configuration_only(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in GPT-2's folder."""
    before = TokenizerFolder.open(folder).separator_id
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    assert TokenizerFolder.open(folder).separator_id == before
    assert main(["generate", str(folder), "--tokens", "3"]) == 0
    capsys.readouterr()


def test_without_a_prompt_a_document_begins(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "--tokens", "5"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--temperature", "-1"], "temperature -1.0"),
        (["--top-p", "0"], "top_p 0.0"),
        (["--tokens", "0"], "tokens 0"),
        (["--prompt", "word " * 200], "the model's context is 64"),
    ],
)
def test_wrong_options(options: list[str], named: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), *options]) == 2
    assert named in capsys.readouterr().err
