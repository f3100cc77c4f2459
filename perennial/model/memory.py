"""What training holds in a device's memory at its fullest moment, part by part, in closed form and without torch.

An update comes past several moments at which memory can be at its fullest: the loss (everything is kept for the
backward pass, and the head is worked on), the beginning, the last layer and the end of the backward pass, and an
evaluation between updates. `estimate` counts what exists at each of them and takes the largest. What a layer keeps
for its backward pass is listed tensor by tensor in `kept_by_layer`, the one place to correct when a layer's code
changes; tests compare it with what autograd keeps, and the moments with every byte that torch takes and gives back.

On a CPU the measured peak is the largest resident set: it also holds the interpreter with its libraries, and what the
C library's allocator was given back but cannot use for the next tensor. Both are constants below, measured by
`benchmarks/memory.py`. On a GPU it is `torch.cuda.max_memory_allocated`.

Symbols: D width, Q = heads x head_width, S = kv_heads x head_width, F mlp_width, V vocabulary_size, L layers, B rows
of a micro-batch on one process, T sequence length, N = B T tokens; c bytes of a number in products (fp32 4, bf16 2).

Limits: a model through `transformers` is judged by a native one of its size and width, which for plain transformers
came out at 0.6 to 1.9 times the activations that are kept (recurrent layers and capped scores keep several times more);
what torch.compile saves is not counted; figures for a GPU follow the same lists and have not been measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from perennial.core.layout import ROOM_SHARE, Layout
from perennial.core.settings import check
from perennial.model.blocks import BLOCK, keeps_weights, num_scores
from perennial.model.config import ModelConfig
from perennial.model.cost import num_parameters as native_parameters
from perennial.model.foreign import AnyConfig, TransformersConfig, num_parameters
from perennial.model.roles import ROLES

Precision = Literal["fp32", "bf16"]
"""'fp32', or 'bf16': autocast over fp32 weights."""
Device = Literal["cpu", "cuda"]
Checkpointing = Literal["none", "selective", "full"]

_FP32, _BF16, _INT64 = 4, 2, 8

CPU_PROCESS_BYTES = 340 << 20
"""Resident set of a process that has loaded the interpreter, torch and an optimizer, before there is a model."""
GPU_PROCESS_BYTES = 600 << 20
"""Taken on the GPU by CUDA itself: context, kernels, the matrix library's workspace. Assumption: to be measured."""
UNUSABLE_SHARE = {"fp32": 0.47, "bf16": 0.57, "selective": 0.45, "full": 1.05, "spread": 0.45}
"""Freed memory that glibc's allocator holds at the fullest moment, as a share of what an update takes and gives back:
by precision, and so much more with activation checkpointing or a sharded model. Aligned blocks are cut out of larger
ones, so that a freed block is a little too small for the next tensor of its size; gathered layers and layers that are
computed again lie between the others."""
_EVALUATION_TOKENS = (1024, 8192)
"""Least and most tokens of an evaluation's batch while a run trains."""


ALONE = Layout()
"""One process."""


@dataclass(frozen=True)
class Training:
    """How a model is trained, as far as the memory of one process depends on it."""

    rows: int
    """Rows of a micro-batch on one process."""
    sequence_length: int
    micro_batches: int = 1
    """Micro-batches of an update on one process."""
    precision: Precision = "fp32"
    device: Device = "cpu"
    optimizer_bytes: float | Mapping[str, float] = 8.0
    """Bytes of optimizer state per parameter (AdamW: 8), or that for each role."""
    chunk_tokens: int = 512
    """Tokens whose logits exist at once (the objective's)."""
    document_mask: bool = False
    checkpointing: Checkpointing = "none"
    new_rows: int | None = None
    """Rows of the tables that are all that is trained; None: the whole model is."""
    other_parameters: int = 0
    """Numbers in fp32 of models that are read and not trained (teachers, the parent that a pull draws to), and of the
    importance that a pull gives each weight."""
    teachers: int = 0
    """Models whose predictions are learned from; taken to be as wide as the one that is trained."""
    communication_bytes: int = 0
    """Bytes per parameter that are kept from round to round of a communication, such as DiLoCo's (8)."""
    layout: Layout = ALONE
    evaluates: bool = True
    """Whether validation losses are measured between updates."""
    copies_state: bool = False
    """Whether a checkpoint is written from a copy of weights and optimizer state while training goes on (CPU)."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one process holds at the fullest moment of training, by what they are for."""

    moment: str
    """When that is."""
    parameters: int = 0
    """Weights in fp32, this process's part."""
    gradients: int = 0
    """Those that exist at this moment."""
    optimizer: int = 0
    other_models: int = 0
    """Models that are read and not trained, whole, and what a pull weighs by."""
    weight_copies: int = 0
    """Copies of the matrices in bf16, which autocast makes and the backward pass needs."""
    activations: int = 0
    """Kept by the forward pass for the backward pass."""
    working: int = 0
    """Gradients of activations, and what the layer at work needs for itself."""
    loss: int = 0
    """Hidden states, their gradient, the head's gradient and the chunk of logits that exists at once."""
    rounds: int = 0
    """What workers that train apart keep from one exchange to the next."""
    communication: int = 0
    """Gathered layers and what is sent and received."""
    data: int = 0
    """Tokens of the batch."""
    saving: int = 0
    """Copy of weights and optimizer state from which a checkpoint is written."""
    unusable: int = 0
    """Freed memory that the allocator holds and cannot use (CPU)."""
    process: int = 0
    """Interpreter and libraries on a CPU, the context on a GPU."""

    @property
    def total(self) -> int:
        """The estimate of the peak."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by name of the part."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "moment"}

    @property
    def tensors(self) -> int:
        """What torch's own allocator holds: on a GPU, what `torch.cuda.max_memory_allocated` says."""
        return self.total - self.process - self.unusable - (self.data if self.process else 0)


@dataclass(frozen=True)
class Kept:
    """A tensor that a layer keeps for its backward pass."""

    name: str
    shape: str
    """In the symbols of this file."""
    num_bytes: int
    for_weights: bool = False
    """Needed for nothing but the gradient of a matrix."""


# What a layer keeps


def kept_by_layer(config: ModelConfig, training: Training) -> list[Kept]:
    """Every tensor that one layer's forward pass keeps for its backward pass, its weights aside.

    Without checkpointing. Tensor parallelism divides what has heads or feed-forward columns (`_parted`).
    """
    D, F, Q, S, N = _sizes(config, training)
    rows, T = training.rows, training.sequence_length
    c = _BF16 if training.precision == "bf16" else _FP32
    heads, by_hand = Q // config.head_width, _by_hand(config, training)
    scale, scale_shape = (1, "N") if config.norm == "rms" else (2, "N x 2")
    stream = _FP32 if config.norm_position == "before" else c
    kept = [
        Kept("stream that the first norm reads", "N x D", stream * N * D),
        Kept("scale of the first norm", scale_shape, _FP32 * scale * N),
        Kept("what q, k and v are made of", "N x D", c * N * D, for_weights=not by_hand.inputs),
        Kept("queries, keys, values", "N x (Q + 2 S)", c * N * (Q + 2 * S)),
        Kept("output of the heads", "N x Q", c * N * Q, for_weights=not by_hand.output),
        Kept("scale of the second norm", scale_shape, _FP32 * scale * N),
        Kept("what the feed-forward part reads", "N x D", c * N * D, for_weights=not by_hand.feed_forward),
    ]
    if not config.parallel_residual:
        kept.append(Kept("stream that the second norm reads", "N x D", stream * N * D))
    if config.qk_norm != "none":
        scales = (heads + config.kv_heads * heads // config.heads) if config.qk_norm == "head" else 2
        kept.append(Kept("queries and keys before their norm", "N x (Q + S)", c * N * (Q + S)))
        kept.append(Kept("scales of the norms of queries and keys", "N x heads", _FP32 * scales * N))
    if training.device == "cuda":
        kept.append(Kept("log of each query's sum", "N x heads", _FP32 * N * heads))
    elif keeps_weights(T):
        kept.append(Kept("attention weights", "B x heads x scores", c * rows * heads * num_scores(T)))
    kept.append(Kept("gate and up" if config.gated_mlp else "up", "N x F each", c * N * F * (1 + config.gated_mlp)))
    if not by_hand.feed_forward:
        if config.gated_mlp:
            kept.append(Kept("activated gate", "N x F", c * N * F))
        kept.append(Kept("what is projected down", "N x F", c * N * F, for_weights=True))
    return kept


@dataclass(frozen=True)
class _ByHand:
    """Which parts of a layer run as functions of their own on a CPU (`operations`), which keep less than torch's."""

    inputs: bool
    """The projections to queries, keys and values."""
    output: bool
    """The projection of the heads' output."""
    feed_forward: bool


def _by_hand(config: ModelConfig, training: Training) -> _ByHand:
    """Matrices without biases, and the gated feed-forward part with SiLU."""
    on_cpu = training.device == "cpu"
    is_swiglu = config.gated_mlp and config.activation == "silu" and not config.mlp_bias
    return _ByHand(on_cpu and not config.qkv_bias, on_cpu and not config.output_bias, on_cpu and is_swiglu)


def kept_of_products(config: ModelConfig, training: Training) -> list[Kept]:
    """What one layer keeps under selective checkpointing: its input, and the results of products and of attention."""
    D, F, Q, S, N = _sizes(config, training)
    c = _BF16 if training.precision == "bf16" else _FP32
    kept = [
        Kept("input of the layer", "N x D", _FP32 * N * D),
        Kept("queries, keys, values as projected", "N x (Q + 2 S)", c * N * (Q + 2 * S)),
        Kept("output of the heads", "N x Q", c * N * Q),
        Kept("gate and up" if config.gated_mlp else "up", "N x F each", c * N * F * (2 if config.gated_mlp else 1)),
        Kept("results of the two output projections", "N x 2 D", 2 * c * N * D),
    ]
    if training.device == "cuda":
        kept.append(Kept("log of each query's sum", "N x heads", _FP32 * N * Q // config.head_width))
    return kept


def _sizes(config: ModelConfig, training: Training) -> tuple[int, int, int, int, int]:
    """(D, F, Q, S, N) on one process."""
    parts = training.layout.tensor
    attention_parts = 1 if config.qk_norm == "projection" else parts
    queries = config.heads * config.head_width // attention_parts
    keys = config.kv_heads * config.head_width // attention_parts
    return config.width, config.mlp_width // parts, queries, keys, training.rows * training.sequence_length


def activation_bytes(config: ModelConfig, training: Training) -> int:
    """Bytes that `Transformer.forward` keeps for the backward pass, copies of the weights aside.

    Once: token ids, what the last norm reads and its scale, the rotary table, the masks.
    """
    D, _, _, _, N = _sizes(config, training)
    scale = _FP32 * (1 if config.norm == "rms" else 2)
    once = N * (_INT64 + _FP32 * D + scale) + _mask_bytes(config, training)
    once += _FP32 * 2 * training.sequence_length * config.rotary_width if config.positions == "rotary" else 0
    return config.layers * _layer_bytes(config, training) + once


def _layer_bytes(config: ModelConfig, training: Training) -> int:
    """What one layer keeps under the policy of activation checkpointing."""
    if training.checkpointing == "full":
        return _FP32 * training.rows * training.sequence_length * config.width  # its input
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
    D, F, Q, S, _ = _sizes(config, training)
    by_hand = _by_hand(config, training)
    copied = 0 if by_hand.inputs else D * (Q + 2 * S)
    copied += 0 if by_hand.output else D * Q
    copied += 0 if by_hand.feed_forward else D * F * (2 + config.gated_mlp)
    return _BF16 * config.layers * copied


# What the process holds all the time


def state_by_kind(config: AnyConfig, training: Training) -> tuple[int, int, int]:
    """Bytes of (weights, all gradients, optimizer state) of one process."""
    counts = _local_counts(config, training.layout)
    trained: Mapping[str, float] = counts
    gradients = sum(counts.values())
    if training.new_rows is not None:  # the tables' gradients are whole, their moments those of the rows
        tables = {"embedding": 1} if config.tied_embeddings else {"embedding": 1, "head": 1}
        trained = dict.fromkeys(tables, training.new_rows * config.width)
        gradients = len(tables) * config.vocabulary_size * config.width
    given = training.optimizer_bytes
    per_role = given if isinstance(given, Mapping) else dict.fromkeys(trained, given)
    state = sum(per_role.get(role, 0.0) * count for role, count in trained.items())
    return _FP32 * sum(counts.values()), _FP32 * gradients, round(state)


def optimizer_bytes(config: AnyConfig, state_bytes_per_parameter: Callable[[str], float]) -> dict[str, float]:
    """Bytes of optimizer state per parameter by role, as an optimizer's method of that name tells them."""
    roles = ROLES if isinstance(config, ModelConfig) else config.parameters_by_role
    return {role: state_bytes_per_parameter(role) for role in roles}


def _local_counts(config: AnyConfig, layout: Layout) -> dict[str, int]:
    """Parameters of each role that one process holds."""
    if isinstance(config, TransformersConfig):
        return {role: math.ceil(count / layout.shards) for role, count in config.parameters_by_role.items()}
    counts = {role: count for role, count in asdict(native_parameters(config)).items() if count}
    if config.qk_norm == "projection":  # attention stays whole
        feed_forward = config.layers * (3 if config.gated_mlp else 2) * config.width * config.mlp_width
        counts["matrix"] -= feed_forward - feed_forward // layout.tensor
    else:
        counts["matrix"] //= layout.tensor
    return {role: math.ceil(count / layout.shards) for role, count in counts.items()}


def fits_replicated(
    config: AnyConfig, training: Training, device_bytes: float | None, *, share: float = ROOM_SHARE
) -> bool:
    """Whether weights, gradients and optimizer state, not sharded, take at most `share` of a device's memory."""
    whole = replace(training, layout=Layout(tensor=training.layout.tensor))
    return device_bytes is None or sum(state_by_kind(config, whole)) <= share * device_bytes


COPIED_FROM_BYTES = 1 << 28
"""State (weights and moments) from which a checkpoint is written from a copy, as in `train.saving`."""
COPY_SHARE = 0.5
"""A copy may take this share of the memory that is free, as in `train.saving`."""


def copies_while_saving(memory: Memory, device: Device, limit_bytes: float | None) -> bool:
    """Whether a run that needs this much would save from a copy, where `limit_bytes` are there."""
    state = memory.parameters + memory.optimizer
    if device != "cpu" or limit_bytes is None:
        return False
    return COPIED_FROM_BYTES <= state <= COPY_SHARE * (limit_bytes - memory.total)


# The fullest moment


def estimate(config: AnyConfig, training: Training, *, process_bytes: int | None = None) -> Memory:
    """What one process holds at the fullest moment of training.

    `process_bytes`: what it held before there was a model, where that was measured.
    """
    is_native = isinstance(config, ModelConfig)
    shape = config if isinstance(config, ModelConfig) else stand_in(config)
    # transformers attends through torch's fused kernel on a CPU too, which keeps what it keeps on a GPU
    counted = training if is_native else replace(training, device="cuda")
    weights, gradients, optimizer = state_by_kind(config, training)
    rounds = weights // _FP32 * training.communication_bytes
    others = _FP32 * training.other_parameters
    held = {"parameters": weights, "optimizer": optimizer, "other_models": others, "rounds": rounds}
    moments = _moments(shape, counted, gradients, is_native=is_native)
    fullest = max((Memory(moment, **held, **parts) for moment, parts in moments.items()), key=lambda m: m.total)
    return _with_process(fullest, training, process_bytes)


def _with_process(memory: Memory, training: Training, process_bytes: int | None) -> Memory:
    tokens = training.micro_batches * training.rows * training.sequence_length
    if training.device == "cuda":
        process = GPU_PROCESS_BYTES if process_bytes is None else process_bytes
        return replace(memory, data=2 * 2 * _INT64 * tokens, process=process)
    passing = memory.total - memory.parameters - memory.optimizer - memory.other_models - memory.rounds
    share = UNUSABLE_SHARE[training.precision]
    share += UNUSABLE_SHARE.get(training.checkpointing, 0.0)
    share += UNUSABLE_SHARE["spread"] if training.layout.is_spread else 0.0
    return replace(
        memory,
        data=2 * _INT64 * tokens,
        saving=memory.parameters + memory.optimizer if training.copies_state else 0,
        unusable=round(share * passing),
        process=CPU_PROCESS_BYTES if process_bytes is None else process_bytes,
    )


def _moments(config: ModelConfig, training: Training, gradients: int, *, is_native: bool) -> dict[str, dict[str, int]]:
    """Bytes by part at each moment that can be the fullest, beside weights and optimizer state."""
    D, F, _, _, N = _sizes(config, training)
    c = _BF16 if training.precision == "bf16" else _FP32
    table, hidden, stream = _FP32 * config.vocabulary_size * D, c * N * D, _FP32 * N * D
    kept = {
        "weight_copies": weight_copy_bytes(config, training),
        "activations": activation_bytes(config, training) + (0 if is_native else _kept_besides(config, training)),
    }
    layer, matrix = kept["activations"] // config.layers, _FP32 * D * F
    of_layer = max(0, gradients - table * (1 if config.tied_embeddings else 2)) // config.layers
    in_backward = kept
    if training.checkpointing != "none":  # autocast's copies go with the forward pass, each layer makes its own again
        in_backward = {**kept, "weight_copies": kept["weight_copies"] // config.layers}
    before = gradients if training.micro_batches > 1 or training.layout.replicas > 1 else 0
    sent = _communication(config, training)
    working = stream + _layer_working(config, training)
    # The head's gradient; where the embedding is the head, it waits until the embedding's is there.
    waiting = table if config.tied_embeddings or not before else 0
    return {
        "loss": {
            **kept,
            "gradients": before,
            "loss": hidden + _loss_bytes(config, training),
            "communication": sent.outside,
        },
        "beginning of the backward pass": {
            **in_backward,
            "gradients": before,
            "loss": 2 * (hidden + table),
            "communication": sent.outside,
        },
        "backward pass of the last layer": {
            **in_backward,
            "gradients": before + matrix,
            "loss": waiting,
            "working": working,
            "communication": sent.first_layer,
        },
        "backward pass of the last layer but one": {
            **in_backward,
            "activations": in_backward["activations"] - layer,
            "gradients": before + matrix if before else matrix + of_layer,
            "loss": waiting,
            "working": working,
            "communication": sent.layers,
        },
        "backward pass of the first layer": {
            "weight_copies": kept["weight_copies"] // config.layers,
            "activations": layer,
            "gradients": before + matrix if before else max(0, gradients - table - of_layer),
            "loss": waiting,
            "working": working,
            "communication": sent.layers,
        },
        "end of the backward pass": {
            "gradients": gradients,
            "loss": table * (1 + bool(before and config.tied_embeddings) + training.layout.is_spread),
            "working": stream,
            "communication": sent.outside,
        },
        **({"evaluation": _evaluation(config, training, gradients)} if training.evaluates else {}),
    }


def _loss_bytes(config: ModelConfig, training: Training) -> int:
    """Gradients of hidden states and head, and what `objectives.next_token` needs for one chunk of tokens.

    A chunk's logits in fp32, in whose place their softmax comes; in bf16 also the product itself, a copy of the head,
    and the chunk's part of the head's gradient, first as it was multiplied and then in fp32. Of each teacher its hidden
    states and a chunk of logits.
    """
    D, _, _, _, N = _sizes(config, training)
    c = _BF16 if training.precision == "bf16" else _FP32
    table, chunk = config.vocabulary_size * D, min(training.chunk_tokens, N)
    needed = c * N * D + _FP32 * table + chunk * (_FP32 * config.vocabulary_size + 2 * c * D)
    if training.precision == "bf16":
        needed += 2 * _BF16 * table + _FP32 * table + _BF16 * chunk * config.vocabulary_size
    return needed + training.teachers * (c * N * D + chunk * _FP32 * config.vocabulary_size)


def _layer_working(config: ModelConfig, training: Training) -> int:
    """What one layer's backward pass needs beyond what was kept for it: the larger of its two parts, fed first.

    Feed-forward part: gradients of its input and of two of its inner tensors, one kept tensor being free by then (by
    hand: three), and in bf16 of a matrix. Attention: gradients of output (two of them), queries, keys and values, and
    of the weights of a block of queries; what the feed-forward part, its norm and the output projection kept is free
    by then. With checkpointing: all that a layer keeps, and the stream between its parts.
    """
    D, F, Q, S, N = _sizes(config, training)
    rows, T = training.rows, training.sequence_length
    c = _BF16 if training.precision == "bf16" else _FP32
    inner = 4 if config.gated_mlp else 2
    rounded = _BF16 * D * F if training.precision == "bf16" else 0
    feed_forward = c * N * (D + inner // 2 * F) + rounded
    stream = 0 if config.parallel_residual else (_FP32 if config.norm_position == "before" else c) * N * D
    attention = c * N * (2 * Q + 2 * S - inner * F - D) - stream
    if training.device == "cpu":  # those of the block before are let go of when the next ones are there
        size, length = c * rows * config.heads * min(BLOCK, T), T - min(BLOCK, T)
        attention += size * (2 * T + length if keeps_weights(T) else 2 * T + 3 * length)
    again = 0
    if training.checkpointing != "none":  # the layer's tensors are all there once more
        again = _layer_bytes(config, replace(training, checkpointing="none")) - _layer_bytes(config, training)
        again += _FP32 * N * D
    return again + max(feed_forward, attention)


def evaluation_tokens(training_tokens: int) -> int:
    """Tokens of an evaluation's batch: as many as a training micro-batch has, so that it needs no more memory."""
    least, most = _EVALUATION_TOKENS
    return min(most, max(least, training_tokens))


def _evaluation(config: ModelConfig, training: Training, gradients: int) -> dict[str, int]:
    """An evaluation's forward pass, which keeps nothing; the gradients of the last update are still there."""
    T, V = training.sequence_length, config.vocabulary_size
    there = replace(training, rows=max(1, evaluation_tokens(training.rows * T) // T))
    D, F, Q, S, N = _sizes(config, there)
    c = _BF16 if training.precision == "bf16" else _FP32
    attention = c * N * (2 * Q + 4 * S)
    if training.device == "cpu":
        scores = num_scores(T) if keeps_weights(T) else 2 * min(BLOCK, T) * T
        attention += c * there.rows * config.heads * scores
    inner = 4 if _by_hand(config, there).feed_forward else 3
    layer = (_FP32 + c) * N * D + max(inner * c * N * F, attention)
    chunk = min(training.chunk_tokens, N) * V * (_FP32 + (_BF16 if c == _BF16 else 0))
    loss = c * N * D + chunk + (_BF16 * V * D if c == _BF16 else 0)
    parts = {
        "gradients": gradients,
        "weight_copies": weight_copy_bytes(config, training),
        "communication": _communication(config, training).first_layer,
    }
    return {**parts, "working": layer} if layer > loss else {**parts, "loss": loss}


@dataclass(frozen=True)
class _Communication:
    """Bytes for what processes exchange, outside the layers and while layers are at work."""

    outside: int
    first_layer: int
    """In the backward pass of the first layer that comes (the last one), when no gradients are being sent yet."""
    layers: int


def _communication(config: ModelConfig, training: Training) -> _Communication:
    """What DDP and FSDP2 hold beside a process's own part of weights and gradients.

    FSDP2: embedding and head, gathered from the forward to the end of the backward pass, with several micro-batches
    twice; the layer at work and the one that arrives; in the backward pass a layer's gradients and the buffer that
    they are sent from. DDP's gradients lie in the buckets that it sends, over several micro-batches too.
    """
    layout = training.layout
    if not layout.is_spread:
        return _Communication(0, 0, 0)
    counts = _local_counts(config, Layout(tensor=layout.tensor))
    tables = counts["embedding"] + counts.get("head", 0)
    c = _BF16 if training.precision == "bf16" and layout.shards > 1 else _FP32
    layer = (sum(counts.values()) - tables) // config.layers
    root = _FP32 * tables * (1 if training.micro_batches == 1 else 2)
    return _Communication(root + c * layer, root + 2 * c * layer, root + (3 * c + _FP32) * layer)


# Models through transformers


def stand_in(config: TransformersConfig) -> ModelConfig:
    """A native model of about the size and width, to judge the memory of what is not native by."""
    heads = config.heads or 1
    tables = config.vocabulary_size * config.width * (1 if config.tied_embeddings else 2)
    inner = num_parameters(config) - config.inactive_parameters - tables
    width = config.head_width or 2 * math.ceil(config.width / heads / 2)
    attention = 4 * config.width * heads * width
    dimensions = {
        "vocabulary_size": config.vocabulary_size,
        "width": config.width,
        "heads": heads,
        "layers": config.layers,
        "mlp_width": max(1, round((inner / config.layers - attention) / config.width / 3), config.width // 2),
        "head_width": width + width % 2,
        "tied_embeddings": config.tied_embeddings,
    }
    found = check(ModelConfig, dimensions)[0]
    assert found is not None
    return found


def _kept_besides(config: ModelConfig, training: Training) -> int:
    """What layers of `transformers` keep on top of native ones: each norm's input and output in fp32 once more."""
    if training.checkpointing == "full":
        return 0
    return config.layers * 2 * 2 * _FP32 * training.rows * training.sequence_length * config.width
