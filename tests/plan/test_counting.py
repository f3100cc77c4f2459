"""The closed forms of memory equal what torch holds: what autograd keeps, and every byte taken and given back."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from perennial.core import plugins
from perennial.model import memory
from perennial.model.layerwise import checkpoint_layers
from perennial.model.memory_terms import Training
from perennial.model.transformer import Transformer
from perennial.objectives.next_token import NextToken
from perennial.train import saving
from perennial.train.feeding import TorchBatch
from perennial.train.new_rows import NewRows
from tests.model.models import VARIANTS, tiny_config, tiny_model

SHAPES = [(3, 40, False), (2, 200, True), (1, 600, False)]
"""(rows, length, documents masked): one block of queries, several, and too long to keep the attention weights."""


def autocast(precision: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def kept_bytes(model: Transformer, inputs: torch.Tensor, segments: torch.Tensor | None, precision: str) -> int:
    """Bytes of the distinct storages that autograd keeps, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with keeping, autocast(precision):
        hidden = model(inputs, segments)
    del hidden
    return sum(storage.nbytes() for storage in kept.values())


def held(model: Transformer, training: Training) -> int:
    return memory.activation_bytes(model.config, training) + memory.weight_copy_bytes(model.config, training)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "length", "masked"), SHAPES)
def test_what_autograd_keeps(variant: str, precision: Any, rows: int, length: int, masked: bool) -> None:
    """Tolerance 2%; today every case is equal to the byte."""
    model = tiny_model(**VARIANTS[variant])
    segments = torch.zeros(rows, length, dtype=torch.int32) if masked else None
    counted = kept_bytes(model, torch.zeros(rows, length, dtype=torch.int64), segments, precision)
    training = Training(rows=rows, sequence_length=length, precision=precision, document_mask=masked)
    assert held(model, training) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_autograd_keeps_when_only_new_rows_are_trained(variant: str, precision: Any) -> None:
    model = tiny_model(**VARIANTS[variant])
    NewRows(model, 90, 97)
    counted = kept_bytes(model, torch.zeros(3, 200, dtype=torch.int64), None, precision)
    training = Training(rows=3, sequence_length=200, precision=precision, new_rows=7)
    assert held(model, training) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state(variant: str) -> None:
    """Tolerance 0."""
    model = tiny_model(**VARIANTS[variant])
    optimizer, _ = plugins.build("optimizers", "adamw")
    built = optimizer.build(model.named_parameters(), model.role_of)
    moments = [t for state in built.state.values() for key, t in state.items() if key != "step"]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = sum(t.numel() * t.element_size() for t in moments)
    roles = {
        role: optimizer.state_bytes_per_parameter(role) for role in ("embedding", "head", "matrix", "norm", "bias")
    }
    for declared in (8.0, roles):
        training = Training(rows=1, sequence_length=4, optimizer_bytes=declared)
        assert memory.state_by_kind(model.config, training) == (weights, weights, state)


def live_peak(model: Transformer, training: Training) -> int:
    """The most bytes that torch holds at once during the passes of an update, weights and optimizer state aside."""
    objective = NextToken(chunk_tokens=training.chunk_tokens)
    shape = (training.rows, training.sequence_length)

    def update() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        for _ in range(training.micro_batches):
            ids = torch.randint(0, model.config.vocabulary_size, shape)
            with autocast(training.precision):
                loss = objective.loss(model, TorchBatch(ids, ids, None))
            (loss.total / ids.numel()).backward()

    update()
    return int(statistics.median(_recorded_peak(model, update) for _ in range(3)))


def _recorded_peak(model: Transformer, update: Callable[[], None]) -> int:
    """The most that is held at once; on a busy machine single events may be recorded out of order."""
    for parameter in model.parameters():
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        update()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


DEEP = {"layers": 8, "mlp_width": 256}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "activations count most": ({"mlp_width": 256}, {"rows": 16, "sequence_length": 200}),
    "several micro-batches": ({"layers": 4}, {"rows": 4, "sequence_length": 256, "micro_batches": 3}),
    "long rows": ({"tied_embeddings": True}, {"rows": 2, "sequence_length": 768}),
    "the loss counts most": ({"vocabulary_size": 20_000}, {"rows": 2, "sequence_length": 256}),
    "the head is the embedding": (
        {"vocabulary_size": 20_000, "tied_embeddings": True},
        {"rows": 1, "sequence_length": 64},
    ),
    "gradients count most": ({"width": 256, "mlp_width": 1024, "layers": 4}, {"rows": 1, "sequence_length": 16}),
    "gpt2": ({**VARIANTS["gpt2"], "mlp_width": 256}, {"rows": 8, "sequence_length": 256}),
    "olmo2": (VARIANTS["olmo2"], {"rows": 8, "sequence_length": 256}),
    "gpt_neox": (VARIANTS["gpt_neox"], {"rows": 8, "sequence_length": 256}),
    "qwen3, selective": (
        {**VARIANTS["qwen3"], **DEEP},
        {"rows": 8, "sequence_length": 256, "checkpointing": "selective"},
    ),
    "long rows, selective": (DEEP, {"rows": 2, "sequence_length": 768, "checkpointing": "selective"}),
    "full": (DEEP, {"rows": 8, "sequence_length": 256, "checkpointing": "full"}),
    "full, olmo2": ({**VARIANTS["olmo2"], **DEEP}, {"rows": 4, "sequence_length": 256, "checkpointing": "full"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_fullest_moment(case: str, precision: Any) -> None:
    """Tolerance 10%, the bar of the estimate: what a layer needs for itself is counted in rough."""
    shape, manner = CASES[case]
    model = Transformer(tiny_config(**shape))
    checkpoint_layers(model, manner.get("checkpointing", "none"))
    training = Training(**manner, precision=precision, chunk_tokens=128, evaluates=False)
    found = memory.estimate(model.config, training)
    passing = found.tensors - found.parameters - found.optimizer
    assert passing == pytest.approx(live_peak(model, training), rel=0.10), found


def test_checkpointing_keeps_less() -> None:
    config = tiny_config(layers=8)
    training = Training(rows=4, sequence_length=256)
    kept = [
        memory.activation_bytes(config, replace(training, checkpointing=policy))
        for policy in ("none", "selective", "full")
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[2] < kept[0] / 5


def test_constants_that_belong_to_others() -> None:
    assert memory.COPIED_FROM_BYTES == saving.LARGE_BYTES
    assert memory.COPY_SHARE == saving.SPARE_SHARE
