"""Mistral: Llama without biases, with a window over every layer where one is set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from perennial.model.families.base import (
    LLAMA_DEFAULTS,
    LLAMA_KEYS,
    PRE_NORMS,
    Entries,
    Family,
    Stored,
    llama_tensors,
    projections,
    read_like_llama,
    write_like_llama,
)

if TYPE_CHECKING:
    from perennial.model.config import ModelConfig


class Mistral(Family):
    """Sliding-window attention in all layers. Source: Jiang et al. 2023, Mistral 7B, arXiv 2310.06825, section 2."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"sliding_window": 9},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"head_dim": 24},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ]
    architecture: ClassVar[str] = "MistralForCausalLM"
    keys: ClassVar[dict[str, str]] = LLAMA_KEYS
    # Where the entry is not there, transformers takes 4096; null means no window.
    defaults: ClassVar[dict[str, Any]] = {**LLAMA_DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 8}

    def read(self, entries: Entries) -> dict[str, Any]:
        """As Llama, with the window."""
        if entries.get("layer_types"):
            entries.problems.append("layer_types; supported for mistral: the same window in all layers")
        window = entries.get("sliding_window") if entries.has("sliding_window") else 4096
        return {**read_like_llama(entries), "window": window, "family": "mistral"}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """config.json; `head_dim` and `sliding_window` are always spelled out."""
        return {**write_like_llama(config), "head_dim": config.head_width, "sliding_window": config.window}

    def tensors(self, config: ModelConfig) -> list[Stored]:
        """Under the names that our own parameters have."""
        return llama_tensors(config, [*projections(config), *PRE_NORMS])
