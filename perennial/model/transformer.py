"""The network: a decoder of Llama's kind, with Llama's parameter names (Qwen3's with QK-norm).

Shapes: B rows, T positions, D width, H query heads, G key-value heads, K head width, F feed-forward width, V
vocabulary.

Numbers: parameters and the residual stream stay in the parameters' dtype (fp32 in training); under autocast the
products take bf16 inputs, norms and rotary turns are computed in fp32 and rounded once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perennial.core.errors import UserError
from perennial.core.seeds import derive
from perennial.model.attention import attention, document_mask
from perennial.model.config import ModelConfig
from perennial.model.operations import rms_norm, rotary_table, rotate
from perennial.model.roles import role_of


class Linear(nn.Linear):
    """A matrix without bias whose weight is left to `initialise`.

    Drawing torch's default first would cost time and, on the meta device, import its compiler (75 MB).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

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


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions and, where asked for, a norm over each query and key head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, H, G, K = config.width, config.heads, config.kv_heads, config.head_width
        self.head_width = K
        self.q_proj = Linear(D, H * K)
        self.k_proj = Linear(D, G * K)
        self.v_proj = Linear(D, G * K)
        self.o_proj = Linear(H * K, D)
        self.q_norm = RmsNorm(K, config.norm_epsilon) if config.qk_norm else None
        self.k_norm = RmsNorm(K, config.norm_epsilon) if config.qk_norm else None

    def forward(self, x_BTD: Tensor, table: Tensor, mask_BTT: Tensor | None) -> Tensor:
        q_BTHK, k_BTGK, v_BTGK = (
            project(x_BTD).unflatten(-1, (-1, self.head_width)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        out_BTHK = attention(rotate(q_BTHK, table), rotate(k_BTGK, table), v_BTGK, mask_BTT)
        projected: Tensor = self.o_proj(out_BTHK.flatten(2))
        return projected


class Mlp(nn.Module):
    """SwiGLU feed-forward part: down(silu(gate(x)) * up(x)).

    Source: Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202, section 2.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.width, config.mlp_width)
        self.up_proj = Linear(config.width, config.mlp_width)
        self.down_proj = Linear(config.mlp_width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out_BTD


class Layer(nn.Module):
    """Attention, then feed-forward, each reading the normed residual stream and adding to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.width, config.norm_epsilon)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RmsNorm(config.width, config.norm_epsilon)
        self.mlp = Mlp(config)

    def forward(self, x_BTD: Tensor, table: Tensor, mask_BTT: Tensor | None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), table, mask_BTT)
        out_BTD: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return out_BTD


class Decoder(nn.Module):
    """Everything but the head; its name in a Llama folder is `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocabulary_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RmsNorm(config.width, config.norm_epsilon)

    def forward(self, inputs_BT: Tensor, segments_BT: Tensor | None) -> Tensor:
        x_BTD = self.embed_tokens(inputs_BT)
        table = rotary_table(inputs_BT.shape[1], self.config.head_width, self.config.rope_theta, like=x_BTD)
        mask_BTT = document_mask(segments_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, table, mask_BTT)
        hidden_BTD: Tensor = self.norm(x_BTD)
        return hidden_BTD


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
        with torch.device("meta"):  # no time for values that are written over, and no draw from the global generator
            self.model = Decoder(config)
            head = Linear(config.width, config.vocabulary_size)
            self.lm_head = None if config.tied_embeddings else head
        # One by one: `to_empty` would import torch's decompositions, 36 MB of code that nothing else here needs.
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device)))

    def forward(self, inputs_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) after the last norm; position t sees tokens up to t, of its own segment when given.

        `inputs_BT` int64; `segments_BT` any integer type, equal for tokens of one document.
        """
        if inputs_BT.shape[1] > self.config.context:
            length, limit = inputs_BT.shape[1], self.config.context
            raise UserError(f"a row of {length} tokens is longer than the model's context of {limit}")
        hidden_BTD: Tensor = self.model(inputs_BT, segments_BT)
        return hidden_BTD

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token (..., V) from hidden states (..., D), unnormalised."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The (V, D) weight of the output head: the embedding when they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> Transformer:
    """Draws every weight anew, in place, the same on every device; returns the model.

    Matrices, embedding and head are normal with `initial_std`; the two projections of each layer that write to the
    residual stream have it divided by sqrt(2 layers), so that the stream's variance at the end does not grow with
    depth; gains are 1. Every parameter has a generator of its own, seeded by its name, so that it does not depend on
    the others.
    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.3.
    """
    config = model.config
    for name, parameter in model.named_parameters():
        if role_of(name) == "norm":
            parameter.fill_(1.0)
            continue
        writes_to_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = config.initial_std / math.sqrt(2 * config.layers) if writes_to_stream else config.initial_std
        generator = torch.Generator().manual_seed(derive(seed, "initialise", name))
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
    return model
