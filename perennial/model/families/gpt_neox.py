"""GPT-NeoX, Pythia: LayerNorm, parallel residual, rotary positions in part of each head, biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from perennial.model.families.base import Entries, Family, Stored, activation, rotary, stored_activation, write_rotary

if TYPE_CHECKING:
    from perennial.model.config import ModelConfig

_KEYS = {
    "vocabulary_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "context": "max_position_embeddings",
    "norm_epsilon": "layer_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "initial_std": "initializer_range",
}


class GptNeoX(Family):
    """Source: Black et al. 2022, GPT-NeoX-20B, arXiv 2204.06745, section 2.1; Biderman et al. 2023, Pythia, 2304.01373.

    Query, key and value of a head lie side by side in one stored matrix.
    """

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"use_parallel_residual": False},
        {"attention_bias": False},
        {"tie_word_embeddings": True},
        {"hidden_act": "gelu_fast"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    ]
    architecture: ClassVar[str] = "GPTNeoXForCausalLM"
    keys: ClassVar[dict[str, str]] = _KEYS
    defaults: ClassVar[dict[str, Any]] = {
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10_000,
        "use_parallel_residual": True,
        "attention_bias": True,
    }
    derived: ClassVar[str] = (
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)|gpt_neox\.rotary_emb\.inv_freq"
    )

    def read(self, entries: Entries) -> dict[str, Any]:
        """Its own spelling of sizes and rotary positions."""
        entries.note_dropout("attention_dropout", "hidden_dropout")
        found = {ours: entries.get(theirs) for ours, theirs in _KEYS.items()}
        bias = entries.get("attention_bias")
        width, heads = found["width"], found["heads"]
        fits = isinstance(width, int) and isinstance(heads, int) and heads > 0
        return {
            **found,
            "kv_heads": heads,
            "head_width": width // heads if fits else None,
            "norm": "layer",
            "parallel_residual": entries.get("use_parallel_residual"),
            "qkv_bias": bias,
            "output_bias": bias,
            "mlp_bias": True,
            "gated_mlp": False,
            "activation": activation(entries),
            "family": "gpt_neox",
            **rotary(entries, found["context"], theta_key="rotary_emb_base", share_key="rotary_pct"),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """config.json."""
        return {
            **{theirs: getattr(config, ours) for ours, theirs in _KEYS.items()},
            "hidden_act": stored_activation(config.activation),
            "use_parallel_residual": config.parallel_residual,
            "attention_bias": config.qkv_bias,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "rotary_pct": config.rotary_share,
            "rotary_emb_base": config.rope_theta,
            **write_rotary(config, shares=True),
        }

    def tensors(self, config: ModelConfig) -> list[Stored]:
        """The family's own names."""
        found = [Stored("gpt_neox.embed_in.weight", ("model.embed_tokens.weight",))]
        for number in range(config.layers):
            found += _layer(f"gpt_neox.layers.{number}", f"model.layers.{number}", config)
        for kind in ("weight", "bias"):
            found.append(Stored(f"gpt_neox.final_layer_norm.{kind}", (f"model.norm.{kind}",)))
        return found + ([] if config.tied_embeddings else [Stored("embed_out.weight", ("lm_head.weight",))])


def _layer(theirs: str, ours: str, config: ModelConfig) -> list[Stored]:
    found = []
    for kind in ("weight", "bias"):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found.append(Stored(f"{theirs}.{norm}.{kind}", (f"{ours}.{norm}.{kind}",)))
        if kind == "weight" or config.qkv_bias:
            parts = tuple(f"{ours}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
            found.append(Stored(f"{theirs}.attention.query_key_value.{kind}", parts, "by_head"))
            found.append(Stored(f"{theirs}.attention.dense.{kind}", (f"{ours}.self_attn.o_proj.{kind}",)))
        found.append(Stored(f"{theirs}.mlp.dense_h_to_4h.{kind}", (f"{ours}.mlp.up_proj.{kind}",)))
        found.append(Stored(f"{theirs}.mlp.dense_4h_to_h.{kind}", (f"{ours}.mlp.down_proj.{kind}",)))
    return found
