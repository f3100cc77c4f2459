"""Qwen2, Qwen2.5: Llama with biases on queries, keys and values, and windows where asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from perennial.model.families.base import (
    LLAMA_DEFAULTS,
    LLAMA_KEYS,
    PRE_NORMS,
    Entries,
    Family,
    Stored,
    from_layer,
    llama_tensors,
    projections,
    read_like_llama,
    windows,
    write_like_llama,
    write_windows,
)

if TYPE_CHECKING:
    from perennial.model.config import ModelConfig


class Qwen2(Family):
    """Source: Yang et al. 2024, Qwen2 Technical Report, arXiv 2407.10671, section 2.2."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"tie_word_embeddings": True},
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
        {"num_key_value_heads": 1},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e6,
            }
        },
    ]
    architecture: ClassVar[str] = "Qwen2ForCausalLM"
    keys: ClassVar[dict[str, str]] = LLAMA_KEYS
    defaults: ClassVar[dict[str, Any]] = {
        **LLAMA_DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }

    def read(self, entries: Entries) -> dict[str, Any]:
        """As Llama; the biases are always there."""
        found = read_like_llama(entries)
        return {**found, "qkv_bias": True, **windows(entries, found["layers"], from_layer(entries)), "family": "qwen2"}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """config.json."""
        return {**write_like_llama(config), **write_windows(config)}

    def tensors(self, config: ModelConfig) -> list[Stored]:
        """Under the names that our own parameters have."""
        return llama_tensors(config, [*projections(config), *PRE_NORMS])
