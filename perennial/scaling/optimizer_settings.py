"""How learning rate, initialisation and weight decay carry over to a wider, deeper or longer-trained model.

Symbols: m = width / base width, m_L = layers / base layers; B tokens per update, D training tokens, eta peak learning
rate, lambda weight decay (AdamW subtracts eta * lambda * weight).
"""

from __future__ import annotations

from dataclasses import dataclass

from perennial.core.errors import UserError


@dataclass(frozen=True)
class Transfer:
    """Factors on the settings of a tuned base model that keep them right for a larger one; 1.0 leaves them."""

    hidden_learning_rate: float
    """Of matrices inside the layers; embedding, norms and biases keep theirs."""
    hidden_initial_std: float
    """Standard deviation of those matrices' initial weights."""
    hidden_weight_decay: float
    """Keeps learning rate x weight decay, and so AdamW's time scale, as it was."""
    output_multiplier: float
    """On the logits."""
    residual_multiplier: float
    """On what each branch adds to the residual stream."""
    adam_epsilon: float


def transfer(width_ratio: float, layers_ratio: float = 1.0) -> Transfer:
    """Settings of a model that is wider (and deeper) than the one they were tuned on; both ratios above 0.

    muP: with width m times the base, the learning rate and initial variance of hidden matrices fall by m, so do the
    logits; attention scores are divided by the head's width instead of its root. CompleteP for depth: branches of a
    model m_L times deeper are scaled by 1 / m_L, Adam's epsilon by 1 / (m m_L), and the hidden weight decay grows by m.

    Source: Yang et al. 2022, "Tensor Programs V", arXiv 2203.03466, table 8; Dey et al. 2025, "Don't be lazy:
        CompleteP enables compute-efficient deep transformers", arXiv 2505.01618, table 1 (alpha = 1).
    Limits: carries over width and depth, not the number of tokens: combine with a law of tokens (`learning_rate`).
    """
    if width_ratio <= 0 or layers_ratio <= 0:
        raise UserError(f"ratios of width and layers must be above 0, not {width_ratio:g} and {layers_ratio:g}")
    return Transfer(
        hidden_learning_rate=1 / width_ratio,
        hidden_initial_std=width_ratio**-0.5,
        hidden_weight_decay=width_ratio,
        output_multiplier=1 / width_ratio,
        residual_multiplier=1 / layers_ratio,
        adam_epsilon=1 / (width_ratio * layers_ratio),
    )


def timescale(*, batch: float, tokens: float, learning_rate: float, weight_decay: float) -> float:
    """tau = B / (eta lambda D): the share of the run over which AdamW averages its updates.

    Source: Wang & Aitchison 2024, "How to set AdamW's weight decay as you scale model and dataset size",
        arXiv 2405.13698, section 3.
    """
    return batch / (learning_rate * weight_decay * tokens)


def weight_decay_for(share: float, *, batch: float, tokens: float, learning_rate: float) -> float:
    """The weight decay whose time scale is this share of the run: lambda = B / (eta tau D)."""
    return batch / (learning_rate * share * tokens)
