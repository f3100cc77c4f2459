"""OLMo 2: Llama with norms on what each part adds, and over all queries and all keys of a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from perennial.model.families.base import (
    LLAMA_DEFAULTS,
    LLAMA_KEYS,
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


class Olmo2(Family):
    """Source: OLMo team 2025, 2 OLMo 2 Furious, arXiv 2501.00656, section 2.1."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}},
    ]
    architecture: ClassVar[str] = "Olmo2ForCausalLM"
    keys: ClassVar[dict[str, str]] = LLAMA_KEYS
    defaults: ClassVar[dict[str, Any]] = {**LLAMA_DEFAULTS, "rms_norm_eps": 1e-5}

    def read(self, entries: Entries) -> dict[str, Any]:
        """As Llama, with its own places of norms."""
        bias = entries.get("attention_bias", False)
        kind = {"norm_position": "after", "qk_norm": "projection", "family": "olmo2"}
        return {**read_like_llama(entries), **kind, "qkv_bias": bias, "output_bias": bias}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """config.json."""
        return {**write_like_llama(config), "attention_bias": config.qkv_bias}

    def tensors(self, config: ModelConfig) -> list[Stored]:
        """Under the names that our own parameters have."""
        places = ("post_attention_layernorm", "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        return llama_tensors(config, [*projections(config), *(f"{place}.weight" for place in places)])
