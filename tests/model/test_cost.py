"""Closed forms equal what is counted: parameters and FLOPs."""

from __future__ import annotations

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
from tests.model.models import VARIANTS, tiny_config


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


@pytest.mark.parametrize("length", [1, 127, 128, 129, 1000])
def test_blocks_cover_a_row_once(length: int) -> None:
    cut = blocks(length)
    assert [start for start, _ in cut] == [0, *(stop for _, stop in cut[:-1])]
    assert cut[-1][1] == length
    assert length * (length + 1) / 2 <= num_scores(length) <= length * length
