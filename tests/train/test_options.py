"""Switches of a recipe that the other tests leave at their default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perennial.core import records
from perennial.core.lineage import newest_checkpoint
from perennial.data.prepare import PrepareSettings, prepare
from perennial.train.recipe import parse_recipe
from perennial.train.run import start


def losses(run: Path) -> list[float]:
    return [e["loss"] for e in records.read(run / "events.jsonl", "train")]


def run_with(workspace: Any, folder: Path, **changes: Any) -> list[float]:
    start(parse_recipe(workspace.recipe(**changes)), folder, base=Path(), quiet=True)
    return losses(folder)


def test_a_document_mask_changes_what_is_seen_and_nothing_else(workspace: Any, tmp_path: Path) -> None:
    short = {"old": str(tmp_path / "short")}  # documents of at most 64 bytes, so that most rows hold several
    settings = PrepareSettings(
        name="short",
        inputs=[str(workspace.old_text)],
        tokenizer=str(workspace.tokenizer),
        max_document_bytes=64,
    )
    prepare(settings, tmp_path / "short")
    plain = run_with(workspace, tmp_path / "plain", corpora=short)
    masked = run_with(workspace, tmp_path / "masked", corpora=short, document_mask=True)
    assert masked[1:] != plain[1:]
    assert masked == pytest.approx(plain, abs=0.1)  # the same rows, in a context that is at most shorter
    sources = [
        records.read(tmp_path / name / "events.jsonl", "consumed")[-1]["sources"] for name in ("plain", "masked")
    ]
    assert sources[0] == sources[1]


def test_bf16_follows_fp32(workspace: Any, tmp_path: Path) -> None:
    """Tolerance 0.05 nats over 12 updates: bf16 keeps 8 bits, and each update starts from the last."""
    exact = run_with(workspace, tmp_path / "fp32")
    rounded = run_with(workspace, tmp_path / "bf16", precision="bf16")
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.05)


def test_qk_norm_and_tied_embeddings_open_as_qwen3(workspace: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="opens the checkpoint with transformers")
    shape = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_width": 64, "context": 64}
    options = {**shape, "qk_norm": "head", "tied_embeddings": True}
    run_with(workspace, tmp_path / "run", model={"options": options})
    opened = transformers.AutoModelForCausalLM.from_pretrained(newest_checkpoint(tmp_path / "run"))
    assert opened.config.model_type == "qwen3"


def test_tensorboard_gets_the_losses(workspace: Any, tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the package tensorboard"
    )
    expected = run_with(workspace, tmp_path / "run", tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(expected, rel=1e-6)
    assert [e.step for e in events.Scalars("train/loss")][-1] == 3072


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # which torch's compiler hides itself
def test_a_compiled_model_trains_the_same(workspace: Any, tmp_path: Path) -> None:
    """Tolerance 1e-4: compiled kernels add in another order."""
    assert run_with(workspace, tmp_path / "compiled", compile=True) == pytest.approx(
        run_with(workspace, tmp_path / "eager"), abs=1e-4
    )


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_activation_checkpointing_changes_no_loss(policy: str, workspace: Any, tmp_path: Path) -> None:
    """Bit for bit, documents told apart or not; the recipe's hash is the same too, so that a run may change it."""
    changed = run_with(workspace, tmp_path / "changed", activation_checkpointing=policy, document_mask=True)
    assert changed == run_with(workspace, tmp_path / "plain", document_mask=True)
    hashes = [records.read(tmp_path / name / "events.jsonl", "run")[0]["recipe_hash"] for name in ("changed", "plain")]
    assert hashes[0] == hashes[1]


@pytest.mark.gpu
def test_a_run_on_a_gpu_learns_and_repeats(workspace: Any, tmp_path: Path) -> None:
    first = run_with(workspace, tmp_path / "one", precision="bf16")
    assert first[-1] < first[0]
    assert run_with(workspace, tmp_path / "two", precision="bf16") == pytest.approx(first, abs=1e-3)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_documents_checkpointing_and_compiling_on_a_gpu(workspace: Any, tmp_path: Path) -> None:
    """Tolerance 1e-2 nats over 12 updates: bf16 kernels that add in another order."""
    shape = {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 128, "context": 64}  # heads of 16
    options = {"model": {"options": shape}, "precision": "bf16", "document_mask": True}
    plain = run_with(workspace, tmp_path / "plain", **options)
    for policy in ("none", "selective", "full"):
        for compiled in (False, True):
            changes = {"activation_checkpointing": policy, "compile": compiled}
            found = run_with(workspace, tmp_path / f"{policy} {compiled}", **options, **changes)
            assert found == pytest.approx(plain, abs=1e-2), changes
