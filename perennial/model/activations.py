"""What the layers of a model keep for the backward pass and need while it runs, tensor by tensor, in closed form.

Symbols: D width, Q = heads x head_width, S = kv_heads x head_width, F mlp_width, V vocabulary_size, L layers, B rows
of a micro-batch on one process, T sequence length, N = B T tokens; c bytes of a number in products (fp32 4, bf16 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from perennial.model.blocks import BLOCK, keeps_weights, num_scores
from perennial.model.config import ModelConfig
from perennial.model.memory_terms import BF16, FP32, INT64, Training


@dataclass(frozen=True)
class Kept:
    """A tensor that a layer keeps for its backward pass."""

    name: str
    shape: str
    """In the symbols of this file."""
    num_bytes: int
    for_weights: bool = False
    """Needed for nothing but the gradient of a matrix."""


def kept_by_layer(config: ModelConfig, training: Training) -> list[Kept]:
    """Every tensor that one layer's forward pass keeps for its backward pass, its weights aside.

    Without checkpointing. Tensor parallelism divides what has heads or feed-forward columns (`sizes`).
    """
    D, F, Q, S, N = sizes(config, training)
    rows, T = training.rows, training.sequence_length
    c = BF16 if training.precision == "bf16" else FP32
    heads, alone = Q // config.head_width, by_hand(config, training)
    scale, scale_shape = (1, "N") if config.norm == "rms" else (2, "N x 2")
    stream = FP32 if config.norm_position == "before" else c
    kept = [
        Kept("stream that the first norm reads", "N x D", stream * N * D),
        Kept("scale of the first norm", scale_shape, FP32 * scale * N),
        Kept("what q, k and v are made of", "N x D", c * N * D, for_weights=not alone.inputs),
        Kept("queries, keys, values", "N x (Q + 2 S)", c * N * (Q + 2 * S)),
        Kept("output of the heads", "N x Q", c * N * Q, for_weights=not alone.output),
        Kept("scale of the second norm", scale_shape, FP32 * scale * N),
        Kept("what the feed-forward part reads", "N x D", c * N * D, for_weights=not alone.feed_forward),
    ]
    if not config.parallel_residual:
        kept.append(Kept("stream that the second norm reads", "N x D", stream * N * D))
    if config.qk_norm != "none":
        scales = (heads + config.kv_heads * heads // config.heads) if config.qk_norm == "head" else 2
        kept.append(Kept("queries and keys before their norm", "N x (Q + S)", c * N * (Q + S)))
        kept.append(Kept("scales of the norms of queries and keys", "N x heads", FP32 * scales * N))
    if training.device == "cuda":
        kept.append(Kept("log of each query's sum", "N x heads", FP32 * N * heads))
    elif keeps_weights(T):
        kept.append(Kept("attention weights", "B x heads x scores", c * rows * heads * num_scores(T)))
    kept.append(Kept("gate and up" if config.gated_mlp else "up", "N x F each", c * N * F * (1 + config.gated_mlp)))
    if not alone.feed_forward:
        if config.gated_mlp:
            kept.append(Kept("activated gate", "N x F", c * N * F))
        kept.append(Kept("what is projected down", "N x F", c * N * F, for_weights=True))
    return kept


@dataclass(frozen=True)
class ByHand:
    """Which parts of a layer run as functions of their own on a CPU (`operations`), which keep less than torch's."""

    inputs: bool
    """The projections to queries, keys and values."""
    output: bool
    """The projection of the heads' output."""
    feed_forward: bool


def by_hand(config: ModelConfig, training: Training) -> ByHand:
    """Matrices without biases, and the gated feed-forward part with SiLU."""
    on_cpu = training.device == "cpu"
    is_swiglu = config.gated_mlp and config.activation == "silu" and not config.mlp_bias
    return ByHand(on_cpu and not config.qkv_bias, on_cpu and not config.output_bias, on_cpu and is_swiglu)


def kept_of_products(config: ModelConfig, training: Training) -> list[Kept]:
    """What one layer keeps under selective checkpointing: its input, and the results of products and of attention."""
    D, F, Q, S, N = sizes(config, training)
    c = BF16 if training.precision == "bf16" else FP32
    kept = [
        Kept("input of the layer", "N x D", FP32 * N * D),
        Kept("queries, keys, values as projected", "N x (Q + 2 S)", c * N * (Q + 2 * S)),
        Kept("output of the heads", "N x Q", c * N * Q),
        Kept("gate and up" if config.gated_mlp else "up", "N x F each", c * N * F * (2 if config.gated_mlp else 1)),
        Kept("results of the two output projections", "N x 2 D", 2 * c * N * D),
    ]
    if training.device == "cuda":
        kept.append(Kept("log of each query's sum", "N x heads", FP32 * N * Q // config.head_width))
    return kept


def sizes(config: ModelConfig, training: Training) -> tuple[int, int, int, int, int]:
    """(D, F, Q, S, N) on one process, in the symbols of this file."""
    parts = training.layout.tensor
    attention_parts = 1 if config.qk_norm == "projection" else parts
    queries = config.heads * config.head_width // attention_parts
    keys = config.kv_heads * config.head_width // attention_parts
    return config.width, config.mlp_width // parts, queries, keys, training.rows * training.sequence_length


def activation_bytes(config: ModelConfig, training: Training) -> int:
    """Bytes that `Transformer.forward` keeps for the backward pass, copies of the weights aside.

    Once: token ids, what the last norm reads and its scale, the rotary table, the masks.
    """
    D, _, _, _, N = sizes(config, training)
    scale = FP32 * (1 if config.norm == "rms" else 2)
    once = N * (INT64 + FP32 * D + scale) + _mask_bytes(config, training)
    once += FP32 * 2 * training.sequence_length * config.rotary_width if config.positions == "rotary" else 0
    return config.layers * _layer_bytes(config, training) + once


def _layer_bytes(config: ModelConfig, training: Training) -> int:
    """What one layer keeps under the policy of activation checkpointing."""
    if training.checkpointing == "full":
        return FP32 * training.rows * training.sequence_length * config.width  # its input
    if training.checkpointing == "selective":
        return sum(tensor.num_bytes for tensor in kept_of_products(config, training))
    kept = kept_by_layer(config, training)
    return sum(tensor.num_bytes for tensor in kept if training.new_rows is None or not tensor.for_weights)


def _mask_bytes(config: ModelConfig, training: Training) -> int:
    """One byte per pair of positions, for each kind of mask: of each row for documents, else one for windows.

    On a GPU the mask is a list of blocks (FlexAttention): four tables of 4 bytes for each pair of blocks.
    """
    T = training.sequence_length
    size = T * T if training.device == "cpu" else 4 * 4 * math.ceil(T / BLOCK) ** 2
    windows = {config.window_of(number) for number in range(config.layers)}
    if training.document_mask:
        return len(windows) * training.rows * size
    return sum(size for window in windows if window is not None and window < T)


def weight_copy_bytes(config: ModelConfig, training: Training) -> int:
    """Bytes of the layers' matrices in bf16 that the backward pass needs; none where sharding gathers them in bf16.

    What runs by hand on a CPU makes them anew.
    """
    if training.precision != "bf16" or training.layout.shards > 1:
        return 0
    D, F, Q, S, _ = sizes(config, training)
    alone = by_hand(config, training)
    copied = 0 if alone.inputs else D * (Q + 2 * S)
    copied += 0 if alone.output else D * Q
    copied += 0 if alone.feed_forward else D * F * (2 + config.gated_mlp)
    return BF16 * config.layers * copied


def layer_working(config: ModelConfig, training: Training) -> int:
    """What one layer's backward pass needs beyond what was kept for it: the larger of its two parts, fed first.

    Feed-forward part: gradients of its input and of two of its inner tensors, one kept tensor being free by then (by
    hand: three), and in bf16 of a matrix. Attention: gradients of output (two of them), queries, keys and values, and
    of the weights of a block of queries; what the feed-forward part, its norm and the output projection kept is free
    by then. With checkpointing: all that a layer keeps, and the stream between its parts.
    """
    D, F, Q, S, N = sizes(config, training)
    rows, T = training.rows, training.sequence_length
    c = BF16 if training.precision == "bf16" else FP32
    inner = 4 if config.gated_mlp else 2
    rounded = BF16 * D * F if training.precision == "bf16" else 0
    feed_forward = c * N * (D + inner // 2 * F) + rounded
    stream = 0 if config.parallel_residual else (FP32 if config.norm_position == "before" else c) * N * D
    attention = c * N * (2 * Q + 2 * S - inner * F - D) - stream
    if training.device == "cpu":  # those of the block before are let go of when the next ones are there
        size, length = c * rows * config.heads * min(BLOCK, T), T - min(BLOCK, T)
        attention += size * (2 * T + length if keeps_weights(T) else 2 * T + 3 * length)
    again = 0
    if training.checkpointing != "none":  # the layer's tensors are all there once more
        again = _layer_bytes(config, replace(training, checkpointing="none")) - _layer_bytes(config, training)
        again += FP32 * N * D
    return again + max(feed_forward, attention)
