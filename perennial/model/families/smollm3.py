"""SmolLM3: Llama in which some layers do not turn queries and keys by their positions."""

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
    windows,
    write_like_llama,
    write_windows,
)

if TYPE_CHECKING:
    from perennial.model.config import ModelConfig


class SmolLM3(Family):
    """Layers without positions: Yang et al. 2025, Rope to Nope and Back Again, arXiv 2501.18795, section 3."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {"no_rope_layer_interval": 2},
        {"no_rope_layers": [0, 1]},
        {"tie_word_embeddings": False},
        {"attention_bias": True},
        {"mlp_bias": True},
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "no_rope_layers": [1, 0],
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ]
    architecture: ClassVar[str] = "SmolLM3ForCausalLM"
    keys: ClassVar[dict[str, str]] = LLAMA_KEYS
    defaults: ClassVar[dict[str, Any]] = {
        **LLAMA_DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        "no_rope_layer_interval": 4,
    }

    def read(self, entries: Entries) -> dict[str, Any]:
        """As Llama, with the layers that have positions."""
        found = read_like_llama(entries)
        bias = entries.get("attention_bias", False)
        biases = {"qkv_bias": bias, "output_bias": bias, "mlp_bias": entries.get("mlp_bias", False)}
        turned = _turned(entries, found["layers"])
        has_window = windows(entries, found["layers"], lambda number: turned is not None and not turned[number])
        return {**found, **biases, "rotary_layers": turned, **has_window, "family": "smollm3"}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """config.json; `no_rope_layers` has a 1 for each layer that does have positions, as in transformers."""
        biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
        turned = [int(config.is_rotary(number)) for number in range(config.layers)]
        return {**write_like_llama(config), **biases, "no_rope_layers": turned, **write_windows(config)}

    def tensors(self, config: ModelConfig) -> list[Stored]:
        """Under the names that our own parameters have."""
        return llama_tensors(config, [*projections(config), *PRE_NORMS])


def _turned(entries: Entries, layers: Any) -> list[bool] | None:
    given, every = entries.get("no_rope_layers"), entries.get("no_rope_layer_interval")
    if not isinstance(layers, int) or not 0 < layers < 100_000:
        return None
    if given is None and isinstance(every, int) and every > 0:
        given = [int((number + 1) % every != 0) for number in range(layers)]
    if not isinstance(given, list) or len(given) < layers:
        entries.problems.append(f"no_rope_layers {given!r}; supported: a 0 or 1 for each of {layers} layers")
        return None
    chosen = [bool(turned) for turned in given[:layers]]
    return None if all(chosen) else chosen
