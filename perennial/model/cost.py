"""What a model costs, in closed form and without torch: parameters, FLOPs per token, bytes of training memory.

Convention for FLOPs: a product of (m, k) and (k, n) is 2 m k n; only matrix products count (projections,
feed-forward, attention scores and their sum of values, output head; looking up an embedding is free); attention is
counted in full, T keys for each of T queries, although half of the scores are masked, as PaLM's appendix B and
torch's counter do; the backward pass costs twice the forward pass. So MFU stated with these FLOPs compares with what
others publish.

Memory is what an eager PyTorch step holds at its fullest, everything counted as if it existed at once.
Limits: what the framework itself takes (50 to 100 MB on a CPU) and what the allocator holds back are not in it; with
glibc's default settings a process was seen to grow to 1.5 to 1.8 times these figures.

Symbols: D width, Q = heads x head_width, S = kv_heads x head_width, F mlp_width, V vocabulary_size, L layers, T
sequence length, N tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from perennial.model.blocks import keeps_weights, num_scores
from perennial.model.config import ModelConfig

Precision = Literal["fp32", "bf16"]
"""'fp32', or 'bf16': autocast over fp32 weights."""
Device = Literal["cpu", "cuda"]

_FP32, _BF16, _INT64 = 4, 2, 8


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
    matrix = 2 * D * Q + 2 * D * S + (3 if config.gated_mlp else 2) * D * F
    norm = 2 * D + {"none": 0, "head": 2 * config.head_width, "projection": Q + S}[config.qk_norm]
    bias = config.qkv_bias * (Q + 2 * S) + config.output_bias * D
    bias += config.mlp_bias * ((2 if config.gated_mlp else 1) * F + D)
    shifts = D if config.norm == "layer" else 0
    return Parameters(
        embedding=table + (config.context * D if config.positions == "learned" else 0),
        head=0 if config.tied_embeddings else table,
        matrix=L * matrix,
        norm=L * norm + D,
        bias=L * (bias + 2 * shifts) + shifts,
    )


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """2 x matrix parameters + 2 D V for the head + 4 Q T per layer for attention.

    Source: Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B. Differs: with the head, without the embedding.
    """
    head = config.vocabulary_size * config.width
    attention = 4 * config.heads * config.head_width * sequence_length
    return 2 * (num_parameters(config).matrix + head) + config.layers * attention


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Training FLOPs per token: three times the forward pass."""
    return 3 * forward_flops_per_token(config, sequence_length)


def six_n_flops_per_token(config: ModelConfig) -> int:
    """The rule of thumb 6 N, for comparison; N is every parameter but the embedding, with the head even when tied.

    Source: Kaplan et al. 2020, Scaling Laws for Neural Language Models, arXiv 2001.08361, section 2.1.
    """
    return 6 * (num_parameters(config).non_embedding + config.vocabulary_size * config.width)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device, by what they hold."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Saved by the forward pass for the backward pass."""
    loss: int
    """Hidden states, their gradient, the head's gradient and the chunk of logits that exists at once."""

    @property
    def total(self) -> int:
        """The sum: an upper bound of the step's peak without the framework's own memory, as not all exist at once."""
        return sum(asdict(self).values())


def training_memory(
    config: ModelConfig,
    *,
    rows: int,
    sequence_length: int,
    precision: Precision,
    optimizer_bytes: float | Mapping[str, float],
    chunk_tokens: int,
    document_mask: bool = False,
    device: Device = "cpu",
) -> TrainingMemory:
    """Memory of one micro-batch of `rows` rows: fp32 weights and gradients, optimizer state, activations and the loss.

    `optimizer_bytes` is the optimizer's state per parameter (8 for AdamW), or that for each role. `chunk_tokens` is
    the objective's: how many tokens' logits exist at once.
    """
    weights, gradients, optimizer = state_bytes(config, optimizer_bytes)
    activations = activation_bytes(
        config,
        rows=rows,
        sequence_length=sequence_length,
        precision=precision,
        document_mask=document_mask,
        device=device,
    )
    loss = loss_bytes(config, tokens=rows * sequence_length, precision=precision, chunk_tokens=chunk_tokens)
    return TrainingMemory(weights, gradients, optimizer, activations, loss)


def state_bytes(config: ModelConfig, optimizer_bytes: float | Mapping[str, float]) -> tuple[int, int, int]:
    """Bytes of (weights, gradients, optimizer state): 4, 4 and `optimizer_bytes` per parameter."""
    parameters = num_parameters(config)
    counts = asdict(parameters)
    per_role = optimizer_bytes if isinstance(optimizer_bytes, Mapping) else dict.fromkeys(counts, optimizer_bytes)
    state = sum(per_role[role] * count for role, count in counts.items() if count)
    return _FP32 * parameters.total, _FP32 * parameters.total, round(state)


def activation_bytes(
    config: ModelConfig,
    *,
    rows: int,
    sequence_length: int,
    precision: Precision,
    document_mask: bool = False,
    device: Device = "cpu",
) -> int:
    """Bytes that `Transformer.forward` saves for the backward pass; equal to those counted on a CPU.

    With c = 4 bytes (bf16: 2), per token and layer: the residual stream before each of the two norms and the norm's
    scale, 2 (4 D + 4), of LayerNorm two of them; the normed values 2 c D; queries, keys, values and the heads' output
    c (2 Q + 2 S); gate, silu(gate), up and their product 4 c F, without a gate up and its activation 2 c F; with
    QK-norm, queries and keys before it and their scales c (Q + S) + 4 (H + G), or + 8. In a parallel layer both norms
    read one stream; norms on what is added read that, in c bytes, in place of the stream. Attention weights: c per
    score on a CPU when rows are short enough to keep them (see `blocks`), on a GPU the log-sum of each query. Once:
    token ids, the stream before the last norm, the rotary table and the masks. Under
    autocast, bf16 copies of all matrices.
    Assumption: the GPU's fused kernels save the same tensors but for the attention weights; to be counted on a GPU.
    """
    D, Q, S = config.width, config.heads * config.head_width, config.kv_heads * config.head_width
    T, N = sequence_length, rows * sequence_length
    c = _BF16 if precision == "bf16" else _FP32
    scale = _FP32 * (1 if config.norm == "rms" else 2)
    stream = _FP32 * D if config.norm_position == "before" else c * D
    streams = (1 if config.parallel_residual else 2) * stream
    inner = (4 if config.gated_mlp else 2) * config.mlp_width
    per_token = streams + 2 * scale + c * (2 * D + 2 * Q + 2 * S + inner)
    if config.qk_norm != "none":
        norms = config.heads + config.kv_heads if config.qk_norm == "head" else 2
        per_token += c * (Q + S) + _FP32 * norms
    if device == "cpu":
        attention = c * rows * config.heads * num_scores(T) if keeps_weights(T) else 0
    else:
        attention = _FP32 * N * config.heads
    once = N * (_INT64 + _FP32 * D + scale) + _mask_bytes(config, rows, T, document_mask)
    once += _FP32 * 2 * T * config.rotary_width if config.positions == "rotary" else 0
    copies = _BF16 * num_parameters(config).matrix if precision == "bf16" else 0
    return config.layers * (N * per_token + attention) + once + copies


def _mask_bytes(config: ModelConfig, rows: int, T: int, document_mask: bool) -> int:
    """One byte per pair of positions, for each kind of mask: of each row for documents, else one for windows."""
    windows = {config.window_of(number) for number in range(config.layers)}
    if document_mask:
        return len(windows) * rows * T * T
    return sum(T * T for window in windows if window is not None and window < T)


def loss_bytes(config: ModelConfig, *, tokens: int, precision: Precision, chunk_tokens: int) -> int:
    """Bytes of the hidden states and the chunked head and cross entropy (`objectives.next_token`) on top of them.

    With c = 4 bytes (bf16: 2): 2 c D per token for hidden states and their gradient; 4 D V for the head's gradient
    (bf16: 2 D V for its copy too); and for each token of a chunk, V logits and V probabilities in fp32 (bf16: V
    products too).
    """
    table = config.vocabulary_size * config.width
    chunk = min(chunk_tokens, tokens) * config.vocabulary_size
    if precision == "bf16":
        return 2 * _BF16 * tokens * config.width + (_FP32 + _BF16) * table + (2 * _FP32 + _BF16) * chunk
    return 2 * _FP32 * tokens * config.width + _FP32 * table + 2 * _FP32 * chunk
