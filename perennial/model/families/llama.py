"""Llama 1 to 3 and what is built like them: SmolLM 1 and 2, TinyLlama, OpenLLaMA, Yi."""

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


class Llama(Family):
    """RMSNorm, rotary positions, SwiGLU, grouped-query attention.

    Source: Touvron et al. 2023, LLaMA, arXiv 2302.13971, section 2.2; Grattafiori et al. 2024, The Llama 3 Herd of
    Models, arXiv 2407.21783, section 3.2.
    """

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"num_key_value_heads": 1},
        {"head_dim": 24},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 500.0,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 500.0,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 500.0,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.3,
                "truncate": False,
            }
        },
    ]
    architecture: ClassVar[str] = "LlamaForCausalLM"
    keys: ClassVar[dict[str, str]] = LLAMA_KEYS
    defaults: ClassVar[dict[str, Any]] = LLAMA_DEFAULTS

    def read(self, entries: Entries) -> dict[str, Any]:
        """Llama's biases stand on all four projections of attention, or on none."""
        found = read_like_llama(entries)
        if _leaves_a_rest(found["width"], found["heads"]):
            entries.problems.append(
                f"hidden_size {found['width']} is no multiple of num_attention_heads {found['heads']}; "
                "Llama's format asks for it"
            )
        bias = entries.get("attention_bias", False)
        biases = {"qkv_bias": bias, "output_bias": bias, "mlp_bias": entries.get("mlp_bias", False)}
        return {**found, **biases, "family": "llama"}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """config.json; `head_dim` is always spelled out."""
        biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
        return {**write_like_llama(config), "head_dim": config.head_width, **biases}

    def tensors(self, config: ModelConfig) -> list[Stored]:
        """Under the names that our own parameters have."""
        return llama_tensors(config, [*projections(config), *PRE_NORMS])


def _leaves_a_rest(width: Any, heads: Any) -> bool:
    return isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads != 0
