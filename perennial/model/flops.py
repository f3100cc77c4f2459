"""Training FLOPs of any decoder from its plain dimensions, by each of the counts in use; mixtures of experts included.

A product of (m, k) and (k, n) is 2 m k n FLOPs; a backward pass costs twice a forward pass. Per token, with N the
matrix parameters that a token meets and the output head, L layers, Q attention width, T sequence length:
    6nd         6 N
    attention   6 N + 12 L Q T: scores and sums of values over all T keys, masked ones too
    causal      6 N + 6 L Q T: half of them, what a causal kernel computes
    chinchilla  three times the forward pass of Hoffmann et al.: embeddings and softmax counted too
Source: Kaplan et al. 2020, arXiv 2001.08361, section 2.1 (6nd); Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix
    B (attention); Porian et al. 2024, arXiv 2406.19146, section 3 (causal; why the head counts); Hoffmann et al. 2022,
    arXiv 2203.15556, appendix F (chinchilla).
Limits: norms, biases, activations and the optimizer's step are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from perennial.core.errors import UserError

Count = Literal["6nd", "attention", "causal", "chinchilla"]


@dataclass(frozen=True)
class Dimensions:
    """What fixes the matrix products of a decoder; for a mixture of experts the layers' feed-forward parts are many."""

    width: int
    layers: int
    heads: int
    attention_width: int
    """Query heads x head width."""
    key_width: int
    """Key and value heads x head width."""
    mlp_width: int
    """Inner size of the feed-forward part, or of one expert."""
    vocabulary_size: int
    gated_mlp: bool = True
    """Three matrices in the feed-forward part instead of two."""
    experts: int = 1
    """Routed experts of a layer; 1: none, one feed-forward part for every token."""
    active_experts: int = 1
    """Routed experts that a token meets."""
    shared_experts: int = 0
    """Experts that every token meets."""

    def __post_init__(self) -> None:
        sizes = ("width", "layers", "heads", "attention_width", "key_width", "mlp_width", "vocabulary_size", "experts")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be 1 or more")
        if not 1 <= self.active_experts <= self.experts or self.shared_experts < 0:
            raise UserError(
                f"active_experts {self.active_experts} must lie between 1 and experts {self.experts}, "
                f"and shared_experts {self.shared_experts} must be 0 or more"
            )

    @property
    def matrix_parameters(self) -> int:
        """All matrix parameters of the layers, every expert and router: what memory holds."""
        return self.layers * (self._attention + self._router + (self.experts + self.shared_experts) * self._expert)

    @property
    def active_matrix_parameters(self) -> int:
        """Those that one token meets: what compute depends on."""
        met = self.active_experts + self.shared_experts
        return self.layers * (self._attention + self._router + met * self._expert)

    @property
    def head(self) -> int:
        """Parameters of the output head, whether or not it is the embedding."""
        return self.width * self.vocabulary_size

    @property
    def _attention(self) -> int:
        return 2 * self.width * (self.attention_width + self.key_width)

    @property
    def _expert(self) -> int:
        return (3 if self.gated_mlp else 2) * self.width * self.mlp_width

    @property
    def _router(self) -> int:
        return self.width * self.experts if self.experts > 1 else 0


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of a whole training."""

    model: float
    """That the result depends on: what MFU and laws of loss count."""
    hardware: float
    """That the machine carries out, activations computed again included."""


def forward_flops_per_token(dimensions: Dimensions, sequence_length: int, count: Count = "attention") -> int:
    """FLOPs of one token's forward pass in rows of `sequence_length` tokens."""
    d, length = dimensions, sequence_length
    products = 2 * (d.active_matrix_parameters + d.head)
    if count == "6nd":
        return products
    scores = 4 * d.layers * d.attention_width * length
    if count == "causal":
        return products + scores // 2
    softmax = 3 * d.layers * d.heads * length
    return products + scores + (softmax + 2 * d.head if count == "chinchilla" else 0)


def training_flops(
    dimensions: Dimensions,
    tokens: float,
    sequence_length: int,
    *,
    count: Count = "attention",
    recomputed_share: float = 0.0,
    frozen_share: float = 0.0,
) -> TrainingFlops:
    """FLOPs of training on `tokens` tokens.

    `recomputed_share` of the forward pass is computed again in the backward pass: at 1 the machine does 4/3 of the
    model's FLOPs. `frozen_share` of the forward pass goes through weights without a gradient of their own, which saves
    a third of its share: with low-rank adapters on a frozen model about 2/3 of 6 N D is left. Raises UserError for
    shares outside 0 to 1.
    """
    for name, share in (("recomputed_share", recomputed_share), ("frozen_share", frozen_share)):
        if not 0 <= share <= 1:
            raise UserError(f"{name} {share:g} must be a share from 0 to 1")
    forward = tokens * forward_flops_per_token(dimensions, sequence_length, count)
    model = forward * (3 - frozen_share)
    return TrainingFlops(model=model, hardware=model + recomputed_share * forward)
