"""Qwen3: Llama with a norm over each query and key head, and windows in some layers where asked for."""

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


class Qwen3(Family):
    """Source: Yang et al. 2025, Qwen3 Technical Report, arXiv 2505.09388, section 2."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"head_dim": 24},
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        {"num_key_value_heads": 1},
    ]
    architecture: ClassVar[str] = "Qwen3ForCausalLM"
    keys: ClassVar[dict[str, str]] = LLAMA_KEYS
    defaults: ClassVar[dict[str, Any]] = {
        **LLAMA_DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }

    def read(self, entries: Entries) -> dict[str, Any]:
        """As Llama, with the norms of queries and keys."""
        found = read_like_llama(entries)
        bias = entries.get("attention_bias", False)
        kind = {"qk_norm": "head", "qkv_bias": bias, "output_bias": bias, "family": "qwen3"}
        return {**found, **kind, **windows(entries, found["layers"], from_layer(entries))}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """config.json; `head_dim` is always spelled out."""
        bias = {"attention_bias": config.qkv_bias}
        return {**write_like_llama(config), "head_dim": config.head_width, **bias, **write_windows(config)}

    def tensors(self, config: ModelConfig) -> list[Stored]:
        """Under the names that our own parameters have."""
        norms = ("self_attn.q_norm.weight", "self_attn.k_norm.weight", *PRE_NORMS)
        return llama_tensors(config, [*projections(config), *norms])
