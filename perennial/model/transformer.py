"""The network: one decoder-only transformer, described by its configuration, with Llama's parameter names.

Shapes: B rows, T positions, D width, H query heads, G key-value heads, K head width, F feed-forward width, V
vocabulary.

Numbers: parameters and the residual stream stay in the parameters' dtype (fp32 in training); under autocast the
products take bf16 inputs, norms and rotary turns are computed in fp32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perennial.core.errors import UserError
from perennial.core.seeds import derive
from perennial.model import roles
from perennial.model.attention import AttentionMask, attention, attention_mask
from perennial.model.cache import KeyValueCache, LayerCache
from perennial.model.config import Activation, ModelConfig
from perennial.model.operations import compute_dtype, layer_norm, products, rms_norm, rotate, silu_gated_mlp
from perennial.model.placement import assign
from perennial.model.rope import rotary_table


class Linear(nn.Linear):
    """A matrix whose weight (and bias, if it has one) is left to `initialise`.

    Drawing torch's default first would cost time and, on the meta device, import its compiler (75 MB).
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        """Leaves the weight as it is."""


class Embedding(nn.Embedding):
    """An embedding whose weight is left to `initialise`, as in `Linear`."""

    def reset_parameters(self) -> None:
        """Leaves the weight as it is."""


class RmsNorm(nn.Module):
    """Root-mean-square norm with a gain per channel."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)


class LayerNorm(nn.Module):
    """Norm of mean and variance with a gain and a bias per channel."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.epsilon)


def _norm(config: ModelConfig, size: int) -> RmsNorm | LayerNorm:
    return (RmsNorm if config.norm == "rms" else LayerNorm)(size, config.norm_epsilon)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class SelfAttention(nn.Module):
    """Grouped-query attention; rotary positions, norms of queries and keys and biases where the configuration says."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, H, G, K = config.width, config.heads, config.kv_heads, config.head_width
        self.head_width = K
        self.is_rotary = config.is_rotary(layer)
        self.q_proj = Linear(D, H * K, bias=config.qkv_bias)
        self.k_proj = Linear(D, G * K, bias=config.qkv_bias)
        self.v_proj = Linear(D, G * K, bias=config.qkv_bias)
        self.o_proj = Linear(H * K, D, bias=config.output_bias)
        normed = {"none": None, "head": (K, K), "projection": (H * K, G * K)}[config.qk_norm]
        self.norms_heads = config.qk_norm == "head"
        self.q_norm = RmsNorm(normed[0], config.norm_epsilon) if normed else None
        self.k_norm = RmsNorm(normed[1], config.norm_epsilon) if normed else None

    def forward(
        self, x_BTD: Tensor, table: Tensor | None, mask: AttentionMask, cache: LayerCache | None = None
    ) -> Tensor:
        q, k, v = _projected(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        if self.q_norm is not None and self.k_norm is not None and not self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q_BTHK, k_BTGK, v_BTGK = (projected.unflatten(-1, (-1, self.head_width)) for projected in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None and self.norms_heads:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if self.is_rotary and table is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, table), rotate(k_BTGK, table)
        if cache is not None:
            k_BTGK, v_BTGK = cache.extended(k_BTGK, v_BTGK)
        out_BTHK = attention(q_BTHK, k_BTGK, v_BTGK, mask)
        return _projected(out_BTHK.flatten(2), self.o_proj)[0]


def _projected(x_BTD: Tensor, *projections: nn.Linear) -> tuple[Tensor, ...]:
    """What each of the projections makes of x."""
    if all(_is_plain(projection) for projection in projections):
        return products(x_BTD, *(projection.weight for projection in projections))
    return tuple(projection(x_BTD) for projection in projections)


def _is_plain(projection: nn.Linear) -> bool:
    """Whether it is its weight and nothing else: no bias, no adapter in its place and no hook on it."""
    has_hooks = projection._forward_hooks or projection._forward_pre_hooks
    return type(projection) is Linear and projection.bias is None and not has_hooks


class Mlp(nn.Module):
    """Feed-forward part: down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate.

    Source: Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202, section 2.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, F_, bias = config.width, config.mlp_width, config.mlp_bias
        self.gate_proj = Linear(D, F_, bias=bias) if config.gated_mlp else None
        self.up_proj = Linear(D, F_, bias=bias)
        self.down_proj = Linear(F_, D, bias=bias)
        self.is_swiglu = config.gated_mlp and config.activation == "silu"
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.is_swiglu and self.gate_proj is not None:
            matrices = (self.gate_proj, self.up_proj, self.down_proj)
            if all(_is_plain(matrix) for matrix in matrices):
                return silu_gated_mlp(x_BTD, *(matrix.weight for matrix in matrices))
        up = self.up_proj(x_BTD)
        inner = self.activation(up) if self.gate_proj is None else self.activation(self.gate_proj(x_BTD)) * up
        out_BTD: Tensor = self.down_proj(inner)
        return out_BTD


class Layer(nn.Module):
    """Attention, then feed-forward, each reading the normed residual stream and adding to it.

    With `norm_position` 'after' they read the stream itself, and what they add is normed.
    """

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.norms_after, self.is_parallel = config.norm_position == "after", config.parallel_residual
        self.self_attn = SelfAttention(config, number)
        self.mlp = Mlp(config)
        self.post_attention_layernorm = _norm(config, config.width)
        if self.norms_after:  # under the names that OLMo 2 gives them
            self.post_feedforward_layernorm = _norm(config, config.width)
        else:
            self.input_layernorm = _norm(config, config.width)

    def forward(
        self, x_BTD: Tensor, table: Tensor | None, mask: AttentionMask, cache: LayerCache | None = None
    ) -> Tensor:
        if self.norms_after:
            # rounded once, where autocast would round it for each product
            read_BTD = x_BTD.to(compute_dtype(x_BTD))
            x_BTD = x_BTD + self.post_attention_layernorm(self.self_attn(read_BTD, table, mask, cache))
            read_BTD = x_BTD.to(compute_dtype(x_BTD))
            after_BTD: Tensor = x_BTD + self.post_feedforward_layernorm(self.mlp(read_BTD))
            return after_BTD
        attended = self.self_attn(self.input_layernorm(x_BTD), table, mask, cache)
        if self.is_parallel:
            parallel_BTD: Tensor = x_BTD + attended + self.mlp(self.post_attention_layernorm(x_BTD))
            return parallel_BTD
        x_BTD = x_BTD + attended
        out_BTD: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return out_BTD


class Decoder(nn.Module):
    """Everything but the head; its name in a Llama folder is `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocabulary_size, config.width)
        is_learned = config.positions == "learned"
        self.embed_positions = Embedding(config.context, config.width) if is_learned else None
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.layers))
        self.norm = _norm(config, config.width)

    def forward(self, inputs_BT: Tensor, segments_BT: Tensor | None, cache: KeyValueCache | None = None) -> Tensor:
        config, length, start = self.config, inputs_BT.shape[1], cache.length if cache else 0
        x_BTD = self.embed_tokens(inputs_BT)
        table = None
        if self.embed_positions is not None:
            x_BTD = x_BTD + self.embed_positions.weight[start : start + length]
        else:
            table = rotary_table(config, length, x_BTD, start=start)
        windows = {config.window_of(number) for number in range(config.layers)}
        masks = {
            window: attention_mask(
                length, segments_BT, window, start=start, device=x_BTD.device, is_cached=cache is not None
            )
            for window in windows
        }
        for number, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, table, masks[config.window_of(number)], cache.layers[number] if cache else None)
        hidden_BTD: Tensor = self.norm(x_BTD)
        return hidden_BTD


@dataclass(frozen=True)
class Source:
    """The folder that a model was read from, as far as it decides what is written when the model is saved."""

    entries: dict[str, Any] = field(default_factory=dict)
    """All of its config.json."""
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    """The dtype of each stored tensor, by its usual name in the folder."""
    names: dict[str, str] = field(default_factory=dict)
    """Usual name: the name that the folder has; first GPT-2 folders leave out a prefix."""


class Transformer(nn.Module):
    """The language model: tokens to hidden states, and hidden states to logits.

    The two are separate so that an objective can take the head's product in pieces. Every weight is zero until
    `initialise` draws it or `huggingface.load_model` reads it. Differs: no dropout.
    """

    def __init__(
        self, config: ModelConfig, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        device = torch.get_default_device() if device is None else torch.device(device)
        self.config = config
        self.source: Source | None = None
        with torch.device("meta"):  # no time for values that are written over, and no draw from the global generator
            self.model = Decoder(config)
            head = Linear(config.width, config.vocabulary_size)
            self.lm_head = None if config.tied_embeddings else head
        # One by one: `to_empty` would import torch's decompositions, 36 MB of code that nothing else here needs.
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device)))

    def forward(
        self, inputs_BT: Tensor, segments_BT: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Hidden states (B, T, D) after the last norm; position t sees tokens up to t, of its own segment when given.

        `inputs_BT` int64; `segments_BT` any integer type, equal for tokens of one document. With a `cache` the rows go
        on where it ends, and it grows by them.
        """
        length = inputs_BT.shape[1] + (cache.length if cache else 0)
        if length > self.config.context:
            raise UserError(f"a row of {length} tokens is longer than the model's context of {self.config.context}")
        hidden_BTD: Tensor = self.model(inputs_BT, segments_BT, cache)
        return hidden_BTD

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token (..., V) from hidden states (..., D), unnormalised."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The (V, D) weight of the output head: the embedding when they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """The type of each tensor in the folder that the model was read from; empty for a new model."""
        return self.source.dtypes if self.source else {}

    def role_of(self, name: str) -> str:
        """What the parameter of this name is for, as optimizers ask."""
        return roles.role_of(name)


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> Transformer:
    """Draws every weight anew, in place, the same on every device; returns the model.

    Matrices, embedding and head are normal with `initial_std`; the two projections of each layer that write to the
    residual stream have it divided by sqrt(2 layers), so that the stream's variance at the end does not grow with
    depth; gains are 1, biases 0. Every parameter has a generator of its own, seeded by its name, so that it does not
    depend on the others.
    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.3.
    """
    config = model.config
    for name, parameter in model.named_parameters():
        role = roles.role_of(name)
        if role in ("norm", "bias"):
            assign(parameter, torch.full(parameter.shape, 1.0 if role == "norm" else 0.0))
            continue
        writes_to_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = config.initial_std / math.sqrt(2 * config.layers) if writes_to_stream else config.initial_std
        generator = torch.Generator().manual_seed(derive(seed, "initialise", name))
        assign(parameter, torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
    return model
