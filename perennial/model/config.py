"""The shape of a model: everything that fixes its parameters and its function, and nothing about training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.core.settings import Settings, check, raise_problems
from perennial.model import presets

Size = Annotated[int, Field(gt=0, lt=2**31)]

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"]
"""'gelu_tanh' is GELU's tanh approximation, 'quick_gelu' x sigmoid(1.702 x), 'relu2' the square of ReLU."""


class RopeScaling(Settings):
    """How rotary wavelengths are stretched for rows longer than those a model was first trained on; see `rope`."""

    kind: Literal["linear", "dynamic", "llama3", "yarn"]
    factor: float = Field(ge=1, allow_inf_nan=False)
    """How many times longer the context becomes."""
    original_context: Size | None = None
    """Longest row before stretching; all kinds but 'linear' need it."""
    low_frequency_factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """llama3: waves that turn fewer times than this in the original context are stretched in full ..."""
    high_frequency_factor: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """... and those that turn more often than this not at all."""
    beta_fast: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    """yarn: waves that turn more often than this in the original context are left as they are ..."""
    beta_slow: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """... and those that turn fewer times than this stretched in full."""
    attention_factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """yarn: factor on queries and keys."""
    truncate: bool = True
    """yarn: the borders between the three kinds of waves fall on whole dimensions."""

    @model_validator(mode="after")
    def _complete(self) -> RopeScaling:
        if self.kind != "linear" and self.original_context is None:
            raise ValueError(f"original_context is needed for kind '{self.kind}'")
        if self.kind == "llama3" and self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError("high_frequency_factor must be above low_frequency_factor")
        return self


class ModelConfig(Settings):
    """A decoder-only transformer. The defaults are Llama's; the other families differ in the fields further down."""

    # width and heads stand first: a default that is derived needs every field before it to be valid
    width: Size
    """Size of the residual stream."""
    heads: Size
    """Query heads per layer."""
    kv_heads: Size = Field(default_factory=lambda data: data["heads"])
    """Key and value heads per layer, each shared by heads / kv_heads query heads. Default: one for every query head."""
    head_width: Size = Field(default_factory=lambda data: data["width"] // data["heads"])
    """Size of one head. Default: width / heads."""
    layers: Size
    vocabulary_size: Size
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    mlp_width: Size
    """Inner size of the feed-forward part, usually 8/3 to 4 times the width."""
    context: Size = 2048
    """Longest row in tokens."""
    rope_theta: float = Field(default=10_000.0, gt=0, allow_inf_nan=False)
    """Base of the rotary wavelengths, 2 pi to about 2 pi rope_theta positions; larger for longer contexts."""
    norm_epsilon: float = Field(default=1e-5, gt=0, lt=1)
    """Added to the mean square (or variance) inside every norm."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """Norm of queries and keys before the rotary turn: over each head (Qwen3) or all heads at once (OLMo 2)."""
    tied_embeddings: bool = False
    """The output head is the embedding, transposed."""
    initial_std: float = Field(default=0.02, gt=0, lt=1)
    """Standard deviation of fresh weights."""

    # What other families than Llama do
    family: str = "llama"
    """Model type under which Hugging Face folders are written: a file in `families`. Default with qk_norm: qwen3."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm with a gain, or LayerNorm with gain and bias (GPT-2, GPT-NeoX)."""
    norm_position: Literal["before", "after"] = "before"
    """Where a layer's two norms stand: on what attention and feed-forward part read, or on what they add (OLMo 2)."""
    parallel_residual: bool = False
    """Attention and feed-forward part read the same residual stream, side by side (GPT-NeoX)."""
    qkv_bias: bool = False
    """Biases on queries, keys and values (Qwen2, GPT-2, GPT-NeoX)."""
    output_bias: bool = False
    """A bias on attention's output projection."""
    mlp_bias: bool = False
    """Biases in the feed-forward part."""
    gated_mlp: bool = True
    """down(activation(gate(x)) * up(x)); else down(activation(up(x)))."""
    activation: Activation = "silu"
    positions: Literal["rotary", "learned"] = "rotary"
    """'learned': an embedding of each position, added to the tokens' (GPT-2)."""
    rotary_share: float = Field(default=1.0, gt=0, le=1)
    """Share of each head that the rotary turn moves (GPT-NeoX: 0.25)."""
    rope_scaling: RopeScaling | None = None
    rotary_layers: list[bool] | None = None
    """Layers that turn queries and keys; None: all (SmolLM3 leaves out every fourth)."""
    window: Size | None = None
    """A query sees this many positions, its own included; None: the whole past (Mistral 7B v0.1: 4096)."""
    window_layers: list[bool] | None = None
    """Layers in which the window applies; None: all."""

    @model_validator(mode="before")
    @classmethod
    def _no_default_from_a_wrong_value(cls, data: Any) -> Any:
        """Keeps the list of problems short: where width or heads is wrong itself, nothing is derived from it."""
        if isinstance(data, dict) and data.get("qk_norm") == "head":
            data = {"family": "qwen3", **data}
        if isinstance(data, dict) and not (_is_positive(data.get("width")) and _is_positive(data.get("heads"))):
            return {"kv_heads": 1, "head_width": 2, **data}
        return data

    @model_validator(mode="after")
    def _dimensions_fit(self) -> ModelConfig:
        problems = []
        if self.width % self.heads and "head_width" not in self.model_fields_set:
            problems.append(f"width {self.width} must be a multiple of heads {self.heads}, or head_width given")
        if self.heads % self.kv_heads:
            problems.append(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.positions == "rotary" and self.rotary_width % 2:
            what = f"head_width {self.head_width}"
            what += f" x rotary_share {self.rotary_share}" if self.rotary_share < 1 else ""
            problems.append(f"{what} must be even: rotary positions turn pairs")
        if self.positions == "rotary" and self.rotary_width < 2:
            problems.append(f"rotary_share {self.rotary_share} leaves nothing of head_width {self.head_width} to turn")
        for name, chosen in (("rotary_layers", self.rotary_layers), ("window_layers", self.window_layers)):
            if chosen is not None and len(chosen) != self.layers:
                problems.append(f"{name} has {len(chosen)} entries for {self.layers} layers")
        if self.window_layers is not None and self.window is None:
            problems.append("window_layers needs a window")
        if not problems:
            problems = _not_of_its_family(self)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def rotary_width(self) -> int:
        """How much of each head the rotary turn moves, rounded down as `transformers` does."""
        return int(self.head_width * self.rotary_share)

    def is_rotary(self, layer: int) -> bool:
        """Whether this layer turns its queries and keys."""
        return self.positions == "rotary" and (self.rotary_layers is None or self.rotary_layers[layer])

    def window_of(self, layer: int) -> int | None:
        """How many positions a query of this layer sees; None: the whole past."""
        return self.window if self.window_layers is None or self.window_layers[layer] else None

    @classmethod
    def from_preset(cls, name: str, vocabulary_size: int, **overrides: Any) -> ModelConfig:
        """The configuration of a size in `presets`, with some fields replaced. Raises UserError.

        With another width or number of heads, head_width and (where each head had its own) kv_heads follow.
        """
        settings = presets.shape(name)
        if "heads" in overrides and settings["kv_heads"] == settings["heads"]:
            del settings["kv_heads"]
        config, problems = check(cls, {**settings, "vocabulary_size": vocabulary_size, **overrides})
        raise_problems(problems, f"model preset '{name}'")
        if config is None:
            raise UserError(f"model preset '{name}': not valid")
        return config


def _not_of_its_family(config: ModelConfig) -> list[str]:
    """What a Hugging Face folder of the configuration's family could not express: nothing may be lost when saving."""
    try:
        family = plugins.load("families", config.family)()
    except UserError as error:
        return [str(error)]
    return list(family.cannot_express(config))


def _is_positive(value: Any) -> bool:
    try:
        return float(value) > 0 and float(value).is_integer()
    except (TypeError, ValueError, OverflowError):
        return False
