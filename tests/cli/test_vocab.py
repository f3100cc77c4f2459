"""`perennial vocab extend`: a whole folder that opens everywhere, trained rows on request, one error for bad input."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perennial.cli import main
from perennial.core import lineage
from perennial.core.files import verify_manifest
from perennial.core.lineage import newest_checkpoint
from perennial.model.huggingface import save_model
from perennial.train import checkpoint
from perennial.train.recipe import parse_recipe
from perennial.train.run import start
from tests.data import foreign_tokenizers as foreign
from tests.foreign import ARCHITECTURES
from tests.model.models import tiny_model
from tests.workspace import Workspace


@dataclass(frozen=True)
class Place:
    """A model with a lineage, a Hugging Face folder without, and text in another language."""

    root: Path
    base: Path
    foreign: Path
    text: Path


@pytest.fixture(scope="module")
def place(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("vocab")
    start(parse_recipe(workspace.recipe()), root / "base", base=root, quiet=True)
    text = root / "el.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in foreign.GREEK_TEXTS), encoding="utf-8")
    foreign.qwen2(root / "foreign")
    save_model(tiny_model(vocabulary_size=704, family="qwen2", qkv_bias=True), root / "foreign", dtype=torch.bfloat16)
    (root / "foreign/README.md").write_text("---\nlicense: mit\n---\n\n# A model\n", encoding="utf-8")
    return Place(root, root / "base", root / "foreign", text)


def call(*arguments: Any) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main.main([str(a) for a in ("vocab", "extend", *arguments)])
    return code, out.getvalue(), error.getvalue()


def extend(model: Path, out: Path, place: Place, *more: Any, add: int = 50) -> tuple[int, str, str]:
    return call(model, "--data", f"el={place.text}", "--add", add, "--out", out, *more)


def test_the_result_is_a_whole_folder_with_the_parents_past(place: Place, workspace: Workspace, tmp_path: Path) -> None:
    code, out, error = extend(place.base, tmp_path / "out", place)
    assert code == 0, error
    parent = newest_checkpoint(place.base)
    assert "50 tokens with the ids 512 to 561; tables of 512 rows have 1024 now (multiple of 512 kept)" in out
    assert "el (held out)" in out or "el (learned from)" in out
    assert "old (old)" in out  # the corpus that the lineage names
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    verify_manifest(tmp_path / "out", checkpoint.MANIFEST, "checkpoint")
    found = lineage.read(tmp_path / "out")
    assert found.stages == lineage.read(parent).stages
    assert found.evaluation == {}
    [change] = found.changes
    assert (change["operation"], change["parent"]) == ("vocab extend", lineage.read(parent).checkpoint)
    assert (change["added"], change["ids"], change["rows"]) == (50, [512, 562], [512, 1024])
    code = main.main(["show", str(tmp_path / "out")])
    assert code == 0
    moments = load_file(tmp_path / "out/perennial/optimizer.safetensors")
    assert moments["model.embed_tokens.weight.exp_avg"].shape[0] == 1024


def test_a_folder_from_elsewhere_keeps_everything_else(place: Place, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    code, out, error = extend(place.foreign, tmp_path / "out", place, "--init", "position", "--json")
    assert code == 0, error
    result = json.loads(out)
    assert result["ids"] == [703, 753]
    assert (result["rows"], result["rows_multiple_of"]) == ([704, 768], 64)
    before, after = (load_file(f / "model.safetensors") for f in (place.foreign, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        is_table = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name][:703] if is_table else after[name], tensor[:703] if is_table else tensor)
    assert (tmp_path / "out/README.md").read_text(encoding="utf-8").startswith("---\nlicense: mit\n")
    found = lineage.read(tmp_path / "out")
    assert found.origin is not None
    assert found.stages == []
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = foreign.GREEK_TEXTS[0][:300]
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    assert tokenizer.decode(ids["input_ids"][0]) == text
    assert max(ids["input_ids"][0]) >= 703
    generated = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] == ids["input_ids"].shape[1] + 3


def test_spare_rows_are_used_first_and_pad_to_is_obeyed(place: Place, tmp_path: Path) -> None:
    code, out, _ = extend(place.foreign, tmp_path / "one", place, add=1)
    assert code == 0
    assert "tables of 704 rows have 704 now (multiple of 64 kept: spare rows were enough)" in out
    code, out, _ = extend(place.foreign, tmp_path / "two", place, "--pad-to", 100, add=1)
    assert "tables of 704 rows have 800 now" in out
    assert json.loads((tmp_path / "two/config.json").read_text())["vocab_size"] == 800


def test_kept_text_is_cut_as_before(place: Place, workspace: Workspace, tmp_path: Path) -> None:
    code, out, error = extend(
        place.base, tmp_path / "out", place, "--keep", f"old={workspace.old_text}", "--json", "--init", "zero_mean"
    )
    assert code == 0, error
    kept = json.loads(out)["fertility"]["old (kept)"]
    assert kept["recut_words"] == 0
    assert kept["before"] == kept["after"]


def test_contexts_are_read_in_the_new_text(place: Place, tmp_path: Path) -> None:
    code, out, error = extend(place.base, tmp_path / "out", place, "--init", "contexts", "--json")
    assert code == 0, error
    assert json.loads(out)["tokens_with_contexts"] > 30
    mean = extend(place.base, tmp_path / "mean", place, "--json")
    assert mean[0] == 0
    one, other = (load_file(tmp_path / f / "model.safetensors")["model.embed_tokens.weight"] for f in ("out", "mean"))
    assert torch.equal(one[:512], other[:512])
    assert not torch.allclose(one[512:562], other[512:562])


def test_new_rows_are_trained_first_and_the_same_command_goes_on(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--train-rows", "2K", "--validation", "20%", "--json")
    from perennial.train import extending

    real = extending.start

    def stopped(*given: Any, **more: Any) -> dict[str, Any]:
        from perennial.train.run import make_run

        make_run(given[0], given[1], base=more["base"])
        return {"complete": False, "tokens": 0}

    monkeypatch.setattr(extending, "start", stopped)
    code, out, error = extend(place.base, tmp_path / "out", place, *arguments)
    assert code == 130, error
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(extending, "start", real)
    code, out, error = extend(place.base, tmp_path / "out", place, *arguments, add=40)
    assert code == 2
    assert "out.work: holds the work of another command (differs in: add)" in error
    code, out, error = extend(place.base, tmp_path / "out", place, *arguments)
    assert code == 0, error
    result = json.loads(out)
    assert result["complete"] is True
    verify_manifest(tmp_path / "out", checkpoint.MANIFEST, "checkpoint")
    found = lineage.read(tmp_path / "out")
    first, stop = found.changes[-1]["ids"]
    assert found.stages[-1].new_rows == (first, stop)
    assert found.stages[-1].tokens >= 2000
    before, after = (load_file(f / "model.safetensors") for f in (newest_checkpoint(place.base), tmp_path / "out"))
    for name, tensor in before.items():
        is_table = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(after[name][:first] if is_table else after[name], tensor)
    # The result is a parent like any other, and what was seen before the extension can be replayed.
    data = f"el={tmp_path}/out.work/run/corpora/el"
    more = ("--replay", "10%", "--tokens", "1K tokens", "--out", str(tmp_path / "on"))
    code = main.main(["continue", str(tmp_path / "out"), "--data", data, *more])
    assert code == 0
    assert [s.new_rows is None for s in lineage.read(newest_checkpoint(tmp_path / "on")).stages] == [True, False, True]


# Bad input


def test_one_clear_error_each(place: Place, workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n', encoding="utf-8")
    shutil.copytree(place.foreign, tmp_path / "no-tokenizer")
    (tmp_path / "no-tokenizer/tokenizer.json").unlink()
    cases = [
        (extend(place.base, tmp_path / "out", place, add=0), "--add 0: at least 1 token"),
        (extend(place.base, tmp_path / "out", place, add=10**6), r"--add 1000000: the new text"),
        (extend(place.base, tmp_path / "there", place), "there: exists already"),
        (extend(tmp_path / "no-tokenizer", tmp_path / "out", place), "no tokenizer.json"),
        (extend(tmp_path / "nothing", tmp_path / "out", place), "nothing: no such folder"),
        (extend(place.base, tmp_path / "out", place, "--init", "contekts"), "Did you mean 'contexts'"),
        (extend(place.base, tmp_path / "out", place, "--pad-to", 0), "--pad-to 0: at least 1"),
        (extend(place.base, tmp_path / "out", place, "--train-rows", "2 h"), "--train-rows"),
        (extend(place.base, tmp_path / "out", place, "--train-rows", "0"), "--train-rows '0': must be above 0"),
        (extend(place.base, tmp_path / "out", place, "--keep", "en=gone.txt"), "--keep en=gone.txt: no such file"),
        (
            call(
                place.base, "--data", f"new={workspace.new}", "--add", 5, "--out", tmp_path / "out", "--train-rows", 9
            ),
            "this corpus is cut by the old tokenizer; --train-rows needs the raw text",
        ),
        (call(place.base, "--data", "de", "--add", 5, "--out", tmp_path / "out"), "--data 'de' must look like"),
        (
            call(place.base, "--data", f"de={tmp_path}/empty.jsonl", "--add", 5, "--out", tmp_path / "out"),
            "empty.jsonl: there is no text in it",
        ),
    ]
    for (code, _, error), message in cases:
        assert code == 2, message
        assert message in error
        assert error.count("error:") == 1
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]


def test_an_embedding_smaller_than_the_tokenizer_is_an_error(place: Place, tmp_path: Path) -> None:
    foreign.qwen2(tmp_path / "small")
    save_model(tiny_model(vocabulary_size=600), tmp_path / "small")
    code, _, error = extend(tmp_path / "small", tmp_path / "out", place)
    assert code == 2
    assert "has 703 ids; the model needs a row for each" in error


def test_a_tokenizer_of_another_kind_is_an_error(place: Place, tmp_path: Path) -> None:
    foreign.wordpiece(tmp_path / "wordpiece")
    save_model(tiny_model(), tmp_path / "wordpiece")
    code, _, error = extend(tmp_path / "wordpiece", tmp_path / "out", place)
    assert code == 2
    assert "a WordPiece tokenizer cannot be extended" in error


def test_a_model_that_runs_through_transformers_is_refused_by_name(place: Place, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = ARCHITECTURES["bloom: relative positions"]
    config = transformers.AutoConfig.for_model(made.model_type, vocab_size=704, **made.entries)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(place.foreign / name, tmp_path / "bloom" / name)
    code, _, error = extend(tmp_path / "bloom", tmp_path / "out", place)
    assert code == 2
    assert "BloomForCausalLM is run through transformers" in error
