"""GPT-2: LayerNorm, learned positions, biases everywhere, the embedding as the head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from perennial.model.families.base import Entries, Family, Stored, activation, stored_activation

if TYPE_CHECKING:
    from perennial.model.config import ModelConfig

_KEYS = {
    "vocabulary_size": "vocab_size",
    "width": "n_embd",
    "layers": "n_layer",
    "heads": "n_head",
    "context": "n_positions",
    "norm_epsilon": "layer_norm_epsilon",
    "tied_embeddings": "tie_word_embeddings",
    "initial_std": "initializer_range",
}


class Gpt2(Family):
    """Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.3.

    Matrices are stored transposed, with queries, keys and values one after the other in one of them.
    """

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"n_inner": 80},
        {"activation_function": "relu"},
        {"tie_word_embeddings": False},
        {"reorder_and_upcast_attn": True},
    ]
    architecture: ClassVar[str] = "GPT2LMHeadModel"
    keys: ClassVar[dict[str, str]] = _KEYS
    defaults: ClassVar[dict[str, Any]] = {
        "activation_function": "gelu_new",
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.1),
    }
    derived: ClassVar[str] = r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"

    def read(self, entries: Entries) -> dict[str, Any]:
        """Its own spelling of sizes; scaled in the usual way or not at all."""
        entries.note_dropout("attn_pdrop", "embd_pdrop", "resid_pdrop")
        entries.only("scale_attn_weights", (True,))
        entries.only("scale_attn_by_inverse_layer_idx", (False,))
        entries.only("add_cross_attention", (False,))
        found = {ours: entries.get(theirs) for ours, theirs in _KEYS.items()}
        width, heads = found["width"], found["heads"]
        fits = isinstance(width, int) and isinstance(heads, int) and heads > 0
        return {
            **found,
            "kv_heads": heads,
            "head_width": width // heads if fits else None,
            "mlp_width": entries.get("n_inner", 4 * width if fits else None),
            "norm": "layer",
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
            "gated_mlp": False,
            "activation": activation(entries, "activation_function"),
            "positions": "learned",
            "family": "gpt2",
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """config.json."""
        return {
            **{theirs: getattr(config, ours) for ours, theirs in _KEYS.items()},
            "n_inner": config.mlp_width,
            "n_ctx": config.context,
            "activation_function": stored_activation(config.activation),
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        }

    def tensors(self, config: ModelConfig) -> list[Stored]:
        """The family's own names."""
        found = [
            Stored("transformer.wte.weight", ("model.embed_tokens.weight",)),
            Stored("transformer.wpe.weight", ("model.embed_positions.weight",)),
        ]
        for number in range(config.layers):
            found += _layer(f"transformer.h.{number}", f"model.layers.{number}")
        for kind in ("weight", "bias"):
            found.append(Stored(f"transformer.ln_f.{kind}", (f"model.norm.{kind}",)))
        return found + ([] if config.tied_embeddings else [Stored("lm_head.weight", ("lm_head.weight",))])

    def spelled(self, name: str) -> str:
        """The folders of the first GPT-2 models name their tensors without the prefix."""
        return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _layer(theirs: str, ours: str) -> list[Stored]:
    found = []
    for kind in ("weight", "bias"):
        is_matrix = kind == "weight"
        parts = tuple(f"{ours}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
        found += [
            Stored(f"{theirs}.ln_1.{kind}", (f"{ours}.input_layernorm.{kind}",)),
            Stored(f"{theirs}.attn.c_attn.{kind}", parts, "stacked", is_matrix),
            Stored(f"{theirs}.attn.c_proj.{kind}", (f"{ours}.self_attn.o_proj.{kind}",), "none", is_matrix),
            Stored(f"{theirs}.ln_2.{kind}", (f"{ours}.post_attention_layernorm.{kind}",)),
            Stored(f"{theirs}.mlp.c_fc.{kind}", (f"{ours}.mlp.up_proj.{kind}",), "none", is_matrix),
            Stored(f"{theirs}.mlp.c_proj.{kind}", (f"{ours}.mlp.down_proj.{kind}",), "none", is_matrix),
        ]
    return found
