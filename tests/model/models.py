"""Small models for the tests of this folder."""

from __future__ import annotations

from typing import Any

from perennial.model.config import ModelConfig
from perennial.model.transformer import Transformer, initialise

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tied_embeddings": True},
    "llama grouped": {"kv_heads": 2, "rope_theta": 500_000.0},
    "llama wide heads": {"head_width": 20, "kv_heads": 1},
    "qwen3": {"qk_norm": True, "kv_heads": 2},
    "qwen3 wide heads tied": {"qk_norm": True, "kv_heads": 1, "head_width": 24, "tied_embeddings": True},
}


def tiny_config(**overrides: Any) -> ModelConfig:
    """Two layers of width 64, vocabulary 97."""
    settings = {"vocabulary_size": 97, "width": 64, "layers": 2, "heads": 4, "mlp_width": 96, "initial_std": 0.05}
    return ModelConfig.model_validate({**settings, **overrides})


def tiny_model(seed: int = 0, **overrides: Any) -> Transformer:
    """A tiny model with drawn weights; gains differ from 1 so that a forgotten one shows."""
    model = initialise(Transformer(tiny_config(**overrides)), seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.1 * parameter.data.new_tensor(range(len(parameter))).sin()
    return model
