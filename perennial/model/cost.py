"""What a model costs, in closed form and without torch: parameters and FLOPs per token. Its memory: see `memory`.

Convention for FLOPs: a product of (m, k) and (k, n) is 2 m k n; only matrix products count (projections,
feed-forward, attention scores and their sum of values, output head; looking up an embedding is free); attention is
counted in full, T keys for each of T queries, although half of the scores are masked, as PaLM's appendix B and
torch's counter do; the backward pass costs twice the forward pass. So MFU stated with these FLOPs compares with what
others publish.

Symbols: D width, Q = heads x head_width, S = kv_heads x head_width, F mlp_width, V vocabulary_size, L layers, T
sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass

from perennial.model import flops
from perennial.model.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Number of parameters by role; `head` is 0 when the embedding serves as the head."""

    embedding: int
    """Of tokens, and of positions where they are learned."""
    head: int
    matrix: int
    norm: int
    bias: int

    @property
    def total(self) -> int:
        """Every parameter."""
        return self.embedding + self.head + self.non_embedding

    @property
    def non_embedding(self) -> int:
        """All but embedding and head: what a preset's name counts."""
        return self.matrix + self.norm + self.bias


def num_parameters(config: ModelConfig) -> Parameters:
    """Per layer 2 D Q + 2 D S + 3 D F (without a gate 2 D F) and two norms of D; one last norm; biases where there are.

    Norms over each query and key head have two gains of a head's width, over all of them Q + S.
    """
    D, Q, S = config.width, config.heads * config.head_width, config.kv_heads * config.head_width
    F, L = config.mlp_width, config.layers
    table = config.vocabulary_size * D
    norm = 2 * D + {"none": 0, "head": 2 * config.head_width, "projection": Q + S}[config.qk_norm]
    bias = config.qkv_bias * (Q + 2 * S) + config.output_bias * D
    bias += config.mlp_bias * ((2 if config.gated_mlp else 1) * F + D)
    shifts = D if config.norm == "layer" else 0
    return Parameters(
        embedding=table + (config.context * D if config.positions == "learned" else 0),
        head=0 if config.tied_embeddings else table,
        matrix=dimensions(config).matrix_parameters,
        norm=L * norm + D,
        bias=L * (bias + 2 * shifts) + shifts,
    )


def dimensions(config: ModelConfig) -> flops.Dimensions:
    """The sizes of a configuration's matrix products; `flops` has the other counts of what training costs."""
    return flops.Dimensions(
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        attention_width=config.heads * config.head_width,
        key_width=config.kv_heads * config.head_width,
        mlp_width=config.mlp_width,
        vocabulary_size=config.vocabulary_size,
        gated_mlp=config.gated_mlp,
    )


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """2 x matrix parameters + 2 D V for the head + 4 Q T per layer for attention.

    Source: Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B. Differs: with the head, without the embedding.
    """
    return flops.forward_flops_per_token(dimensions(config), sequence_length, "attention")


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Training FLOPs per token: three times the forward pass."""
    return 3 * forward_flops_per_token(config, sequence_length)


def six_n_flops_per_token(config: ModelConfig) -> int:
    """The rule of thumb 6 N, for comparison; N is every parameter but the embedding, with the head even when tied.

    Source: Kaplan et al. 2020, Scaling Laws for Neural Language Models, arXiv 2001.08361, section 2.1.
    """
    return 6 * (num_parameters(config).non_embedding + config.vocabulary_size * config.width)
