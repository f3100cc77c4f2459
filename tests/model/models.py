"""Small models for the tests of this folder."""

from __future__ import annotations

from typing import Any

from perennial.model.config import ModelConfig
from perennial.model.transformer import Transformer, initialise

PLAIN = {"norm": "layer", "gated_mlp": False, "activation": "gelu", **dict.fromkeys(("qkv_bias", "output_bias"), True)}
PLAIN["mlp_bias"] = True
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tied_embeddings": True},
    "llama grouped": {"kv_heads": 2, "rope_theta": 500_000.0},
    "llama wide heads": {"head_width": 20, "kv_heads": 1},
    "qwen3": {"qk_norm": "head", "kv_heads": 2},
    "qwen3 wide heads tied": {"qk_norm": "head", "kv_heads": 1, "head_width": 24, "tied_embeddings": True},
    "qwen2": {"family": "qwen2", "qkv_bias": True, "kv_heads": 2},
    "mistral": {"family": "mistral", "kv_heads": 2, "window": 30},
    "olmo2": {"family": "olmo2", "norm_position": "after", "qk_norm": "projection", "kv_heads": 2},
    "smollm3": {"family": "smollm3", "rotary_layers": [True, False], "tied_embeddings": True},
    "gpt_neox": {**PLAIN, "family": "gpt_neox", "parallel_residual": True, "rotary_share": 0.25},
    "gpt2": {**PLAIN, "family": "gpt2", "positions": "learned", "tied_embeddings": True},
}


def tiny_config(**overrides: Any) -> ModelConfig:
    """Two layers of width 64, vocabulary 97."""
    settings = {"vocabulary_size": 97, "width": 64, "layers": 2, "heads": 4, "mlp_width": 96, "initial_std": 0.05}
    return ModelConfig.model_validate({**settings, **overrides})


def tiny_model(seed: int = 0, **overrides: Any) -> Transformer:
    """A tiny model with drawn weights; gains differ from 1 and biases from 0 so that a forgotten one shows."""
    model = initialise(Transformer(tiny_config(**overrides)), seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * parameter.data.new_tensor(range(len(parameter))).sin()
    return model
