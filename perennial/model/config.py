"""The shape of a model: everything that fixes its parameters and its function, and nothing about training."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from perennial.core.errors import UserError
from perennial.core.settings import Settings, check, raise_problems
from perennial.model import presets


class ModelConfig(Settings):
    """A decoder of Llama's kind: RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

    # width and heads stand first: a default that is derived needs every field before it to be valid
    width: int = Field(gt=0)
    """Size of the residual stream."""
    heads: int = Field(gt=0)
    """Query heads per layer."""
    kv_heads: int = Field(default_factory=lambda data: data["heads"], gt=0)
    """Key and value heads per layer, each shared by heads / kv_heads query heads. Default: one for every query head."""
    head_width: int = Field(default_factory=lambda data: data["width"] // data["heads"], gt=0)
    """Size of one head; even, because rotary positions turn pairs. Default: width / heads."""
    layers: int = Field(gt=0)
    vocabulary_size: int = Field(gt=0)
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    mlp_width: int = Field(gt=0)
    """Inner size of the feed-forward part, usually 8/3 to 4 times the width."""
    context: int = Field(default=2048, gt=0)
    """Longest row in tokens."""
    rope_theta: float = Field(default=10_000.0, gt=0, allow_inf_nan=False)
    """Base of the rotary wavelengths, 2 pi to about 2 pi rope_theta positions; larger for longer contexts."""
    norm_epsilon: float = Field(default=1e-5, gt=0, lt=1)
    """Added to the mean square inside every norm."""
    qk_norm: bool = False
    """Norm over each query and key head before the rotary turn, as in Qwen3: keeps attention scores in bounds."""
    tied_embeddings: bool = False
    """The output head is the embedding, transposed."""
    initial_std: float = Field(default=0.02, gt=0, lt=1)
    """Standard deviation of fresh weights."""

    @model_validator(mode="before")
    @classmethod
    def _no_default_from_a_wrong_value(cls, data: Any) -> Any:
        """Keeps the list of problems short: where width or heads is wrong itself, nothing is derived from it."""
        if isinstance(data, dict) and not (_is_positive(data.get("width")) and _is_positive(data.get("heads"))):
            return {"kv_heads": 1, "head_width": 2, **data}
        return data

    @model_validator(mode="after")
    def _dimensions_fit(self) -> ModelConfig:
        problems = []
        if self.width % self.heads and ("head_width" not in self.model_fields_set or not self.qk_norm):
            why = "" if self.qk_norm else " (Llama's format asks for it; qk_norm with head_width lifts that)"
            problems.append(f"width {self.width} must be a multiple of heads {self.heads}{why}")
        if self.heads % self.kv_heads:
            problems.append(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.head_width % 2:
            problems.append(f"head_width {self.head_width} must be even")
        if problems:
            raise ValueError("; ".join(problems))
        return self

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


def _is_positive(value: Any) -> bool:
    try:
        return float(value) > 0 and float(value).is_integer()
    except (TypeError, ValueError, OverflowError):
        return False
