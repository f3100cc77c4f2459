"""Models that the native network cannot be: what is known of them without torch, and what one costs, as an estimate.

An architecture that is not native is run through `transformers` (see `through_transformers`). The functions here take
the configuration of any model, native or not, so that what comes after need not ask which it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from perennial.core.errors import UserError
from perennial.core.layout import Layout, divisors, listed
from perennial.core.settings import Settings, check, raise_problems
from perennial.model import cost
from perennial.model.config import ModelConfig

UNLIMITED_CONTEXT = 2048
"""Row length where none is given and the architecture sets no limit (recurrent ones, relative positions)."""


class TransformersConfig(Settings):
    """What is known of a model that is run through `transformers`: counted on its modules, not derived."""

    through: Literal["transformers"] = "transformers"
    """Marks the model, here and in every resolved.json: it is not native."""
    why: str
    """Why it is not native, in words."""
    model_type: str
    """The architecture's name in config.json."""
    architecture: str
    """The class in `transformers` that computes it."""
    vocabulary_size: int = Field(gt=0)
    """Ids that have both a row of the embedding and a logit."""
    context: int | None = Field(gt=0)
    """Longest row in tokens; None where the architecture sets no limit."""
    width: int = Field(gt=0)
    """Size of the residual stream."""
    layers: int = Field(gt=0)
    heads: int | None = Field(gt=0)
    """Query heads per layer; None where there is no attention."""
    head_width: int | None = Field(gt=0)
    """Size of one head."""
    attention_layers: int = Field(ge=0)
    """Layers that have attention."""
    tied_embeddings: bool
    """The output head is the embedding, transposed."""
    parameters_by_role: dict[str, int]
    """Number of parameters of each role (see `optimizers.base.ROLES`)."""
    head_parameters: int = Field(ge=0)
    """Size of the output head, shared with the embedding or not."""
    experts: int | None = Field(default=None, gt=0)
    """Experts of a layer of a mixture of experts; None where there are none."""
    experts_per_token: int | None = Field(default=None, gt=0)
    """How many of them a token goes through."""
    expert_parameters: int = Field(default=0, ge=0)
    """Parameters of all experts of all layers."""
    settings: dict[str, Any]
    """The content of config.json, so that the model can be built without its folder."""

    @property
    def num_parameters(self) -> int:
        """Every parameter, each shared one counted once."""
        return sum(self.parameters_by_role.values())

    @property
    def inactive_parameters(self) -> int:
        """Parameters of the experts that a token does not go through; 0 where nobody says how many it does."""
        if not self.experts or not self.experts_per_token:
            return 0
        return self.expert_parameters - self.expert_parameters * self.experts_per_token // self.experts


AnyConfig = ModelConfig | TransformersConfig


def parse_config(data: Mapping[str, Any]) -> AnyConfig:
    """The configuration that `model_dump` wrote, of whichever kind. Raises UserError."""
    kind: type[ModelConfig] | type[TransformersConfig] = TransformersConfig if "through" in data else ModelConfig
    config, problems = check(kind, dict(data))
    raise_problems(problems, "model configuration")
    if config is None:
        raise UserError("model configuration: not valid")
    return config


def num_parameters(config: AnyConfig) -> int:
    """Every parameter, each shared one counted once."""
    return config.num_parameters if isinstance(config, TransformersConfig) else cost.num_parameters(config).total


def forward_flops_per_token(config: AnyConfig, sequence_length: int) -> int:
    """FLOPs of a forward pass per token: exact for a native model, else an estimate by `cost`'s convention.

    The estimate is 2 x (matrix parameters that a token goes through, and the head) + 4 H K T for each layer with
    attention, as if it looked at the whole row. What else an architecture computes (recurrent states, windows
    that save some of the attention) is not in it; weights that reading tokens does not use (images, sound) are.
    """
    if not isinstance(config, TransformersConfig):
        return cost.forward_flops_per_token(config, sequence_length)
    matrices = sum(config.parameters_by_role.get(role, 0) for role in ("matrix", "stack"))
    attention = 4 * (config.heads or 0) * (config.head_width or 0) * sequence_length
    return 2 * (matrices - config.inactive_parameters + config.head_parameters) + config.attention_layers * attention


def flops_per_token(config: AnyConfig, sequence_length: int) -> int:
    """Training FLOPs per token, three times the forward pass; an estimate unless the model is native."""
    return 3 * forward_flops_per_token(config, sequence_length)


def state_bytes(config: AnyConfig, optimizer_bytes: float) -> int:
    """Bytes of fp32 weights, their gradients and `optimizer_bytes` of optimizer state per parameter."""
    return round(num_parameters(config) * (4 + 4 + optimizer_bytes))


def row_limit(config: AnyConfig) -> int:
    """The longest row that a model is given when nobody says how long: its context."""
    return config.context or UNLIMITED_CONTEXT


def check_rows(config: AnyConfig, sequence_length: int, name: str, advice: str = "") -> None:
    """Raises UserError when rows of `sequence_length` (the setting `name`) are longer than the model's context."""
    if config.context is not None and sequence_length > config.context:
        raise UserError(
            f"{name} {sequence_length} is longer than the model's context of {config.context} tokens{advice}"
        )


def check_vocabulary(config: AnyConfig, vocabulary_size: int, tokens: str, model: str) -> None:
    """Raises UserError when the model has no row for some of the ids that its tokenizer gives."""
    if vocabulary_size > config.vocabulary_size:
        raise UserError(
            f"{model}: a vocabulary_size of {config.vocabulary_size} does not match the tokenizer of {tokens}, which "
            f"has {vocabulary_size} ids; the model needs a row for each"
        )


def check_document_mask(config: AnyConfig, document_mask: bool, name: str = "document_mask") -> None:
    """Raises UserError when attention is to be held inside documents and the model cannot do that."""
    if document_mask and isinstance(config, TransformersConfig):
        raise UserError(
            f"{name}: true is not available for a model that is run through transformers ({config.model_type}); only "
            f"native models can hold attention inside documents. Leave {name} at false."
        )


def notes(config: TransformersConfig) -> list[str]:
    """What to know before training a model that is not native, in sentences."""
    found = [
        f"not native: {config.why}; run through transformers ({config.architecture})",
        "its FLOPs are an estimate",
        "attention crosses documents within a row (document_mask is not available)",
        "dropout is off",
    ]
    if config.experts:
        found.append("the router's auxiliary losses are not added to the loss")
    return found


def check_divisible(config: AnyConfig, layout: Layout) -> None:
    """Raises UserError for a model that cannot be divided between the processes of a 'tensor' group."""
    if layout.tensor == 1:
        return
    if not isinstance(config, ModelConfig):
        raise UserError(f"parallel.tensor {layout.tensor}: a model run through transformers is not divided; use shard")
    for name in ("kv_heads", "heads", "mlp_width"):
        if getattr(config, name) % layout.tensor:
            raise UserError(
                f"parallel.tensor {layout.tensor} does not divide the model's {name}, {getattr(config, name)}; "
                f"allowed: {listed(divisors(math.gcd(config.kv_heads, config.heads, config.mlp_width)))}"
            )
