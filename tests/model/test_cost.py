"""Closed forms equal what is counted: parameters, FLOPs, training state, what autograd saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from perennial.model import cost
from perennial.model.blocks import blocks, num_scores
from perennial.model.config import ModelConfig
from perennial.model.presets import PRESETS
from perennial.model.roles import role_of
from perennial.model.transformer import Transformer
from tests.model.models import VARIANTS, tiny_config, tiny_model


def counted_by_role(model: Transformer) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        counts[role_of(name)] = counts.get(role_of(name), 0) + parameter.numel()
    return counts


def by_role(config: ModelConfig) -> dict[str, int]:
    parameters = cost.num_parameters(config)
    roles = {"embedding": parameters.embedding, "head": parameters.head, "matrix": parameters.matrix}
    roles |= {"norm": parameters.norm, "bias": parameters.bias}
    return {role: count for role, count in roles.items() if count}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_presets(name: str) -> None:
    config = ModelConfig.from_preset(name, 4096)
    assert counted_by_role(Transformer(config, device="meta")) == by_role(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_of_variants(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    model = Transformer(config, device="meta")
    assert counted_by_role(model) == by_role(config)
    assert cost.num_parameters(config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 30])
def test_flops(variant: str, length: int) -> None:
    """The counter knows torch's plain attention, which computes all T x T scores; nothing is executed."""
    config = tiny_config(**VARIANTS[variant])
    model = Transformer(config, device="meta")
    inputs = torch.zeros(2, length, dtype=torch.int64, device="meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        logits = model.logits(model(inputs))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    tokens = inputs.numel()
    assert forward.get_total_flops() == tokens * cost.forward_flops_per_token(config, length)
    assert forward.get_total_flops() + backward.get_total_flops() == tokens * cost.flops_per_token(config, length)


def test_six_n_is_training_without_attention() -> None:
    config = ModelConfig.from_preset("124m", 32768)
    norms = cost.num_parameters(config).norm
    assert cost.six_n_flops_per_token(config) == cost.flops_per_token(config, 0) + 6 * norms
    assert cost.six_n_flops_per_token(config) < cost.flops_per_token(config, 2048)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_bytes(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    for parameter in model.parameters():
        if parameter.grad is None:  # the head takes no part in the hidden states
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    counted = [list(model.parameters()), [p.grad for p in model.parameters() if p.grad is not None], moments]
    expected = tuple(sum(t.numel() * t.element_size() for t in tensors) for tensors in counted)
    assert cost.state_bytes(model.config, 8) == expected
    assert (
        cost.state_bytes(model.config, dict.fromkeys(("embedding", "head", "matrix", "norm", "bias"), 8.0)) == expected
    )


def saved_bytes(model: Transformer, inputs: torch.Tensor, segments: torch.Tensor | None, precision: str) -> int:
    """Bytes of the distinct storages that autograd keeps, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with keeping, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(inputs, segments)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "length", "masked"), [(3, 40, False), (2, 200, True), (1, 600, False)])
def test_activation_bytes(variant: str, precision: Any, rows: int, length: int, masked: bool) -> None:
    """Tolerance 0. Rows of 40, 200 and 600 tokens: one block, several, and too long to keep the attention weights."""
    model = tiny_model(**VARIANTS[variant])
    segments = torch.zeros(rows, length, dtype=torch.int32) if masked else None
    counted = saved_bytes(model, torch.zeros(rows, length, dtype=torch.int64), segments, precision)
    assert counted == cost.activation_bytes(
        model.config, rows=rows, sequence_length=length, precision=precision, document_mask=masked
    )


def test_training_memory_is_the_sum_of_its_parts() -> None:
    config = ModelConfig.from_preset("10m", 4096)
    settings: dict[str, Any] = {"rows": 8, "sequence_length": 256, "optimizer_bytes": 8, "chunk_tokens": 512}
    wide = cost.training_memory(config, precision="fp32", **settings)
    narrow = cost.training_memory(config, precision="bf16", **settings)
    assert wide.weights == wide.gradients == wide.optimizer // 2 == 4 * cost.num_parameters(config).total
    assert wide.total == wide.weights + wide.gradients + wide.optimizer + wide.activations + wide.loss
    assert narrow.activations < wide.activations
    assert cost.training_memory(config, precision="fp32", device="cuda", **settings).activations < wide.activations


@pytest.mark.parametrize("length", [1, 127, 128, 129, 1000])
def test_blocks_cover_a_row_once(length: int) -> None:
    cut = blocks(length)
    assert [start for start, _ in cut] == [0, *(stop for _, stop in cut[:-1])]
    assert cut[-1][1] == length
    assert length * (length + 1) / 2 <= num_scores(length) <= length * length
