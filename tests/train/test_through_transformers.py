"""Runs of models that transformers computes: the same loop, records, checkpoints and resume as native ones."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from perennial.core import lineage, records
from perennial.core.errors import UserError
from perennial.core.lineage import newest_checkpoint
from perennial.model.folder_config import load_config
from perennial.model.foreign import TransformersConfig
from perennial.train import loop
from perennial.train.limits import check_memory
from perennial.train.measuring import evaluate_checkpoint
from perennial.train.parallel import World
from perennial.train.recipe import parse_recipe
from perennial.train.resolved import describe
from perennial.train.run import plan, read_resolved, start, tokens_per_second, train
from tests.foreign import CONTEXT, made, stored

transformers = pytest.importorskip("transformers")

PARENTS = {
    "mixtral": ("mixtral: experts", torch.bfloat16),
    "gemma2": ("gemma2: capped logits", None),
    "bloom": ("bloom: relative positions", torch.float16),
}


@pytest.fixture(scope="module")
def parents(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of foreign models with the workspace's tokenizer."""
    from perennial.data.tokenizers.folder import TokenizerFolder

    root = tmp_path_factory.mktemp("parents")
    tokenizer = TokenizerFolder.open(workspace.tokenizer)
    for name, (architecture, dtype) in PARENTS.items():
        stored(made(architecture, tokenizer.vocabulary_size), root / name, dtype)
        tokenizer.copy_to(root / name)
    return {name: root / name for name in PARENTS}


def recipe(workspace: Any, parent: Path, **changes: Any) -> dict[str, Any]:
    """Two stages on the new corpus, the second with Muon."""
    base = {**workspace.recipe(), "name": "update", "parent": str(parent), "corpora": {"new": str(workspace.new)}}
    del base["model"]
    stage = {"mixture": {"new": "100%"}, "schedule": {"name": "cosine", "peak": 5e-3, "warmup": "10%"}}
    first = {**stage, "name": "first", "budget": "2048 tokens"}
    second = {**stage, "name": "second", "budget": "1024 tokens", "optimizer": "muon"}
    return {**base, "stages": [first, second], **changes}


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(e["tokens"], e["loss"], e["gradient_norm"]) for e in records.read(run / "events.jsonl", "train")]


def assert_same_run(one: Path, other: Path) -> None:
    """Losses, evaluations, weights in folder and in full, and the optimizer's state are equal, with tolerance 0."""
    assert losses(one) == losses(other)
    evaluated = [[e["corpora"] for e in records.read(run / "events.jsonl", "evaluation")] for run in (one, other)]
    assert evaluated[0] == evaluated[1]
    files = [sorted(newest_checkpoint(run).rglob("*.safetensors")) for run in (one, other)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    for a, b in zip(*files, strict=True):
        first, second = load_file(a), load_file(b)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def straight(workspace: Any, parents: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs."""
    root = tmp_path_factory.mktemp("straight")
    for name, parent in parents.items():
        start(parse_recipe(recipe(workspace, parent)), root / name, base=Path(), quiet=True)
    return {name: root / name for name in parents}


@pytest.mark.parametrize("name", PARENTS)
def test_it_learns_and_everything_is_recorded_and_marked(name: str, straight: dict[str, Path]) -> None:
    run = straight[name]
    seen = losses(run)
    assert [tokens for tokens, _, _ in seen] == [256 * i for i in range(1, 13)]
    assert seen[-1][1] < seen[0][1] - 0.2
    assert {e["event"] for e in records.read(run / "events.jsonl")} >= {"run", "stage", "train", "evaluation", "done"}
    told = records.read(run / "events.jsonl", "run")[0]
    assert told["through"] == "transformers"
    assert told["environment"]["transformers"] == transformers.__version__
    resolved = read_resolved(run)
    assert resolved.model["through"] == "transformers"
    assert "run through transformers" in describe(resolved)
    origin = lineage.read(newest_checkpoint(run)).origin
    assert origin is not None
    assert origin.through == "transformers"


@pytest.mark.parametrize("name", PARENTS)
def test_a_checkpoint_is_a_folder_like_the_parents(
    name: str, parents: dict[str, Path], straight: dict[str, Path]
) -> None:
    checkpoint = newest_checkpoint(straight[name])
    before, after = (load_file(folder / "model.safetensors") for folder in (parents[name], checkpoint))
    assert {key: tensor.dtype for key, tensor in before.items()} == {key: t.dtype for key, t in after.items()}
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert json.loads((checkpoint / "config.json").read_text()) == json.loads(
        (parents[name] / "config.json").read_text()
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    given = tokenizer("def parse", return_tensors="pt")["input_ids"]
    model.generation_config.eos_token_id = None  # or it might end at once
    assert model.generate(given, max_new_tokens=4, do_sample=False).shape[1] == given.shape[1] + 4


class Cut(BaseException):
    """Like a kill: nothing after it is run."""


@pytest.mark.parametrize(("name", "updates"), [("mixtral", 6), ("gemma2", 11), ("bloom", 3)])
def test_cut_off_and_resumed_equals_uninterrupted(
    workspace: Any,
    parents: dict[str, Path],
    straight: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    updates: int,
) -> None:
    original, made_updates = loop.make_update, []

    def cut(*given: Any, **settings: Any) -> Any:
        if len(made_updates) == updates:
            raise Cut
        made_updates.append(1)
        return original(*given, **settings)

    asked = parse_recipe(recipe(workspace, parents[name]))
    monkeypatch.setattr(loop, "make_update", cut)
    with pytest.raises(Cut):
        start(asked, tmp_path / "run", base=Path(), quiet=True)
    monkeypatch.undo()
    assert train(tmp_path / "run", quiet=True)["complete"]
    assert_same_run(tmp_path / "run", straight[name])


def test_killed_and_resumed_equals_uninterrupted(
    workspace: Any, parents: dict[str, Path], straight: dict[str, Path], tmp_path: Path
) -> None:
    run, path = tmp_path / "run", tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(recipe(workspace, parents["mixtral"])))
    process = subprocess.Popen(
        [sys.executable, "-m", "perennial", "train", str(path), "--out", str(run)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 60
    while not (run / "events.jsonl").is_file() or len(losses(run)) < 6:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert train(run, quiet=True)["complete"]
    assert_same_run(run, straight["mixtral"])


def test_rollback_goes_on_from_the_checkpoints_full_weights(
    workspace: Any, parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = loop.make_update, []

    class NotFinite:
        def finish(self) -> None:
            raise loop.NonFinite("loss nan")

    def once_not_finite(*given: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            model = given[0].model
            with torch.no_grad():
                next(model.parameters()).fill_(7.0)  # must be gone after the rollback
            return NotFinite()
        return original(*given, **settings)

    monkeypatch.setattr(loop, "make_update", once_not_finite)
    asked = recipe(workspace, parents["mixtral"], spikes={"action": "rollback"})
    assert start(parse_recipe(asked), tmp_path / "run", base=Path(), quiet=True)["complete"]
    seen = losses(tmp_path / "run")
    assert [tokens for tokens, _, _ in seen] == [256 * i for i in range(1, 13)]
    assert all(loss < seen[0][1] + 0.5 for _, loss, _ in seen)


def test_it_can_be_continued_again_in_bf16_autocast(workspace: Any, straight: dict[str, Path], tmp_path: Path) -> None:
    asked = recipe(workspace, straight["gemma2"], precision="bf16")
    start(parse_recipe(asked), tmp_path / "run", base=Path(), quiet=True)
    history = lineage.read(newest_checkpoint(tmp_path / "run"))
    assert [stage.precision for stage in history.stages] == ["fp32"] * 2 + ["bf16"] * 2
    assert history.origin is not None


def test_what_it_cannot_do_is_refused_before_anything_is_written(
    workspace: Any, parents: dict[str, Path], tmp_path: Path
) -> None:
    for changes, message in (
        ({"document_mask": True}, "document_mask: true is not available.*mixtral"),
        (
            {"batch": {"sequences": 8, "sequence_length": CONTEXT + 1}},
            f"batch.sequence_length {CONTEXT + 1} is longer than the model's context of {CONTEXT}",
        ),
    ):
        with pytest.raises(UserError, match=message):
            start(parse_recipe(recipe(workspace, parents["mixtral"], **changes)), tmp_path / "run", base=Path())
        assert not (tmp_path / "run").exists()


def test_its_speed_can_be_measured_for_a_budget_in_time(workspace: Any, parents: dict[str, Path]) -> None:
    config = load_config(parents["mixtral"])
    asked = recipe(workspace, parents["mixtral"])
    assert tokens_per_second(config, parse_recipe(asked), seconds=0.1) > 100
    asked["stages"] = [{**asked["stages"][0], "budget": "2 seconds"}]
    assert plan(parse_recipe(asked), base=Path()).tokens > 256


def test_a_model_too_large_for_the_machine_is_refused(parents: dict[str, Path]) -> None:
    config = load_config(parents["mixtral"])
    assert isinstance(config, TransformersConfig)
    check_memory(config, World(0, 1, torch.device("cpu")))
    large = config.model_copy(update={"parameters_by_role": {"stack": 10**13}})
    with pytest.raises(UserError, match="10T parameters need at least"):
        check_memory(large, World(0, 1, torch.device("cpu")))


def test_losses_of_a_folder_can_be_measured(workspace: Any, parents: dict[str, Path]) -> None:
    measured = evaluate_checkpoint(parents["gemma2"], {"new": workspace.new}, max_tokens=2048, precision="fp32")
    assert measured["sequence_length"] == CONTEXT
    assert measured["corpora"]["new"]["nats_per_token"] > 4
    with pytest.raises(UserError, match="document_mask: true is not available"):
        evaluate_checkpoint(parents["gemma2"], {"new": workspace.new}, max_tokens=2048, document_mask=True)
