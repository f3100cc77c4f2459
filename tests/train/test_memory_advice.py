"""What is said when memory runs out: figures, and changes that by the same count do fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from perennial.core.errors import UserError
from perennial.model.config import ModelConfig
from perennial.model.foreign import TransformersConfig
from perennial.model.memory import estimate
from perennial.model.memory_terms import Training
from perennial.train import loop, memory_advice
from perennial.train.memory_advice import Facts, advice, asked_bytes, explained, explanation, is_out_of_memory
from perennial.train.parallel import World
from perennial.train.recipe import parse_recipe
from perennial.train.run import plan, start

GIB = 1 << 30


def facts(capacity: float | None, *, layers: int = 16, rows: int = 32, seen: float = 0.0, **training: Any) -> Facts:
    """A model of about 1 B parameters (16 layers) on a GPU of `capacity` GiB that ran out of memory."""
    shape = {"vocabulary_size": 32000, "width": 2048, "heads": 32, "kv_heads": 8, "mlp_width": 8192, "context": 8192}
    config = ModelConfig.model_validate({**shape, "layers": layers})
    how = Training(rows=rows, sequence_length=4096, precision="bf16", device="cuda", chunk_tokens=4096)
    how = Training(**{**vars(how), **training})
    there = None if capacity is None else round(capacity * GIB)
    return Facts(config, how, 64, there, round((seen or capacity or 1) * GIB), 2 * GIB)


def test_fewer_rows_first_and_they_fit() -> None:
    given = facts(80)
    lines = advice(given)
    assert [line.split("=")[0] for line in lines] == ["batch.micro_batch", *["activation_checkpointing"] * 2]
    rows = int(re.match(r"batch.micro_batch=(\d+) instead of 32: needs about", lines[0])[1])  # type: ignore[index]
    for number, fits in ((rows, True), (rows + 1, False)):
        changed = Training(**{**vars(given.training), "rows": number, "micro_batches": -(-64 // number)})
        assert (estimate(given.config, changed).total <= 0.95 * 80 * GIB) is fits
    assert "a row's activations take" in lines[0]
    assert "The update is the same" in lines[0]
    assert re.search(r"activations of a micro-batch of 32 fall from [\d.]+ GiB to [\d.]+ GiB", lines[2])


def test_what_should_have_fitted_is_scaled_to_what_was_seen() -> None:
    """The count says 40 GiB or so, yet 81 were not enough: half the rows or fewer are advised, not the same number."""
    given = facts(80, rows=8, seen=79)
    assert estimate(given.config, given.training).total < 0.95 * 80 * GIB
    rows = int(advice(given)[0].removeprefix("batch.micro_batch=").split()[0])
    assert rows < 8
    assert memory_advice.needed_bytes(given, given.training) == pytest.approx(81 * GIB, rel=0.01)


def test_less_is_kept_where_one_row_is_left() -> None:
    lines = advice(facts(24, rows=1, sequence_length=8192))
    assert all(line.startswith("activation_checkpointing=") for line in lines)
    assert not any("micro_batch=" in line for line in lines)


def test_shorter_rows_or_more_processes_where_nothing_else_helps() -> None:
    lines = advice(facts(22, rows=1, sequence_length=8192 * 4, checkpointing="full"))
    assert [line.split("=")[0] for line in lines] == ["batch.sequence_length", "parallel.shard"]
    assert "batch.sequence_length=" in lines[0]
    lines = advice(facts(40, layers=100, rows=4))
    assert [line.split(" with")[0] for line in lines] == ["parallel.shard=full on 4 processes"]
    assert re.search(r"weights, gradients and optimizer state take [\d.]+ GiB here", lines[0])
    assert advice(facts(0.5)) == ["a smaller model, or a device with more memory"]


def test_capacity_that_nobody_says() -> None:
    assert advice(facts(None, rows=8)) == ["batch.micro_batch=4, or activation_checkpointing=full"]


def test_the_explanation_has_the_figures() -> None:
    text = explanation(facts(80, seen=78.5))
    assert text.startswith("out of memory: this GPU held 78.5 GiB of 80.0 GiB, and 2.0 GiB more were asked for.\n")
    assert "micro-batches of 32 x 4096 tokens with activation_checkpointing none" in text
    for part in ("activations", "optimizer", "parameters"):
        assert re.search(rf"{part} [\d.]+ GiB", text)


def test_models_of_transformers_get_advice() -> None:
    config = TransformersConfig(
        why="",
        model_type="bloom",
        architecture="BloomForCausalLM",
        vocabulary_size=32000,
        context=None,
        width=2048,
        layers=16,
        heads=32,
        head_width=64,
        attention_layers=16,
        tied_embeddings=True,
        parameters_by_role={"embedding": 65_000_000, "matrix": 800_000_000},
        head_parameters=65_000_000,
        settings={},
    )
    given = facts(40)
    assert advice(Facts(config, given.training, 64, given.capacity_bytes, given.peak_bytes, None))


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), 2.5 * GIB),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1000 bytes. Error"), 1000),
        (MemoryError(), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), None),
    ],
)
def test_errors_that_mean_it(error: BaseException, found: float | None) -> None:
    assert is_out_of_memory(error)
    assert asked_bytes(str(error)) == found
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_a_run_says_it(workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(session: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(loop, "run", fail)
    with pytest.raises(UserError, match="out of memory: this machine held .* and 1.0 GiB more were asked for") as told:
        start(parse_recipe(workspace.recipe()), tmp_path / "run", base=Path(), quiet=True)
    assert "What helps, the cheapest first:\n" in str(told.value)
    assert not (tmp_path / "run" / memory_advice.SNAPSHOT).exists(), "there is no GPU to look into"


def test_a_gpu_leaves_a_snapshot(workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = plan(parse_recipe(workspace.recipe()), base=Path())
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda max_entries: asked.append(max_entries))
    monkeypatch.setattr(memory_advice, "_capacity_and_peak", lambda world: (80 * GIB, 79 * GIB))
    world = World(0, 1, torch.device("cuda"))

    def run_out() -> str:
        with pytest.raises(UserError) as told, explained(tmp_path, resolved, world):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return str(told.value)

    text = run_out()
    assert str(tmp_path / memory_advice.SNAPSHOT) in text
    assert "PERENNIAL_MEMORY_HISTORY=1" in text
    assert (tmp_path / memory_advice.SNAPSHOT).read_bytes() == b"snapshot"
    assert asked == [], "history costs time, and is kept only when asked for"
    monkeypatch.setenv("PERENNIAL_MEMORY_HISTORY", "1")
    assert "PERENNIAL_MEMORY_HISTORY" not in run_out()
    assert asked == [100_000]
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_a_snapshot_that_fails_does_not_hide_the_advice(
    workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", fail)
    monkeypatch.setattr(memory_advice, "_capacity_and_peak", lambda world: (80 * GIB, 79 * GIB))
    resolved = plan(parse_recipe(workspace.recipe()), base=Path())
    with (
        pytest.raises(UserError, match="out of memory") as told,
        explained(tmp_path, resolved, World(1, 2, torch.device("cuda"))),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert "Snapshot" not in str(told.value)


def test_other_errors_pass(tmp_path: Path) -> None:
    nothing: Any = None
    world = World(0, 1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="something else"), explained(tmp_path, nothing, world):
        raise RuntimeError("something else")


@pytest.mark.gpu
def test_memory_that_runs_out_on_a_gpu(workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(session: Any) -> None:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    monkeypatch.setattr(loop, "run", fail)
    with pytest.raises(UserError, match="out of memory: this GPU held"):
        start(parse_recipe(workspace.recipe()), tmp_path / "run", base=Path(), quiet=True)
    assert (tmp_path / "run" / memory_advice.SNAPSHOT).stat().st_size > 0


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux's count of pages")
def test_mapped_text_is_no_memory_in_use(tmp_path: Path) -> None:
    """64 MiB that are mapped and read count for less than 4, the same size that is allocated for all of it."""
    (tmp_path / "text").write_bytes(b"x" * (64 << 20))
    program = f"""
import numpy, torch
from perennial.train.limits import library_pages, memory_bytes
library_pages()
cpu = torch.device("cpu")
begun = memory_bytes(cpu)
text = numpy.memmap({str(tmp_path / "text")!r}, mode="r")
assert int(text[::512].sum()) > 0
print((memory_bytes(cpu) - begun) >> 20)
filled = numpy.ones(64 << 20, numpy.uint8)
print((memory_bytes(cpu) - begun) >> 20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    mapped, allocated = map(int, done.stdout.split())
    assert mapped < 4
    assert 60 <= allocated < 72
