"""What training holds in a device's memory at its fullest moment, part by part, in closed form and without torch.

An update comes past several moments at which memory can be at its fullest: the loss (everything is kept for the
backward pass, and the head is worked on), the beginning, the last layer and the end of the backward pass, and an
evaluation between updates. `estimate` counts what exists at each of them and takes the largest. What a layer keeps
for its backward pass is listed in `activations.kept_by_layer`, the one place to correct when a layer's code changes;
tests compare it with what autograd keeps, and the moments with every byte that torch takes and gives back.

On a CPU the measured peak is the largest resident set: it also holds the interpreter with its libraries, and what the
C library's allocator was given back but cannot use for the next tensor. Both are constants below, measured by
`benchmarks/memory.py`. On a GPU it is `torch.cuda.max_memory_allocated`.

Symbols: as in `activations`.

Limits: a model through `transformers` is judged by a native one of its size and width, which for plain transformers
came out at 0.6 to 1.9 times the activations that are kept (recurrent layers and capped scores keep several times more);
what torch.compile saves is not counted; figures for a GPU follow the same lists and have not been measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace

from perennial.core.layout import ROOM_SHARE, Layout
from perennial.core.settings import check
from perennial.model.activations import activation_bytes, by_hand, layer_working, sizes, weight_copy_bytes
from perennial.model.blocks import BLOCK, keeps_weights, num_scores
from perennial.model.config import ModelConfig
from perennial.model.cost import num_parameters as native_parameters
from perennial.model.foreign import AnyConfig, TransformersConfig, num_parameters
from perennial.model.memory_terms import BF16, FP32, INT64, Device, Training
from perennial.model.roles import ROLES

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
    return FP32 * sum(counts.values()), FP32 * gradients, round(state)


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
    rounds = weights // FP32 * training.communication_bytes
    others = FP32 * training.other_parameters
    held = {"parameters": weights, "optimizer": optimizer, "other_models": others, "rounds": rounds}
    moments = _moments(shape, counted, gradients, is_native=is_native)
    fullest = max((Memory(moment, **held, **parts) for moment, parts in moments.items()), key=lambda m: m.total)
    return _with_process(fullest, training, process_bytes)


def _with_process(memory: Memory, training: Training, process_bytes: int | None) -> Memory:
    tokens = training.micro_batches * training.rows * training.sequence_length
    if training.device == "cuda":
        process = GPU_PROCESS_BYTES if process_bytes is None else process_bytes
        return replace(memory, data=2 * 2 * INT64 * tokens, process=process)
    passing = memory.total - memory.parameters - memory.optimizer - memory.other_models - memory.rounds
    share = UNUSABLE_SHARE[training.precision]
    share += UNUSABLE_SHARE.get(training.checkpointing, 0.0)
    share += UNUSABLE_SHARE["spread"] if training.layout.is_spread else 0.0
    return replace(
        memory,
        data=2 * INT64 * tokens,
        saving=memory.parameters + memory.optimizer if training.copies_state else 0,
        unusable=round(share * passing),
        process=CPU_PROCESS_BYTES if process_bytes is None else process_bytes,
    )


def _moments(config: ModelConfig, training: Training, gradients: int, *, is_native: bool) -> dict[str, dict[str, int]]:
    """Bytes by part at each moment that can be the fullest, beside weights and optimizer state."""
    D, F, _, _, N = sizes(config, training)
    c = BF16 if training.precision == "bf16" else FP32
    table, hidden, stream = FP32 * config.vocabulary_size * D, c * N * D, FP32 * N * D
    kept = {
        "weight_copies": weight_copy_bytes(config, training),
        "activations": activation_bytes(config, training) + (0 if is_native else _kept_besides(config, training)),
    }
    layer, matrix = kept["activations"] // config.layers, FP32 * D * F
    of_layer = max(0, gradients - table * (1 if config.tied_embeddings else 2)) // config.layers
    in_backward = kept
    if training.checkpointing != "none":  # autocast's copies go with the forward pass, each layer makes its own again
        in_backward = {**kept, "weight_copies": kept["weight_copies"] // config.layers}
    before = gradients if training.micro_batches > 1 or training.layout.replicas > 1 else 0
    sent = _communication(config, training)
    working = stream + layer_working(config, training)
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
    D, _, _, _, N = sizes(config, training)
    c = BF16 if training.precision == "bf16" else FP32
    table, chunk = config.vocabulary_size * D, min(training.chunk_tokens, N)
    needed = c * N * D + FP32 * table + chunk * (FP32 * config.vocabulary_size + 2 * c * D)
    if training.precision == "bf16":
        needed += 2 * BF16 * table + FP32 * table + BF16 * chunk * config.vocabulary_size
    return needed + training.teachers * (c * N * D + chunk * FP32 * config.vocabulary_size)


def evaluation_tokens(training_tokens: int) -> int:
    """Tokens of an evaluation's batch: as many as a training micro-batch has, so that it needs no more memory."""
    least, most = _EVALUATION_TOKENS
    return min(most, max(least, training_tokens))


def _evaluation(config: ModelConfig, training: Training, gradients: int) -> dict[str, int]:
    """An evaluation's forward pass, which keeps nothing; the gradients of the last update are still there."""
    T, V = training.sequence_length, config.vocabulary_size
    there = replace(training, rows=max(1, evaluation_tokens(training.rows * T) // T))
    D, F, Q, S, N = sizes(config, there)
    c = BF16 if training.precision == "bf16" else FP32
    attention = c * N * (2 * Q + 4 * S)
    if training.device == "cpu":
        scores = num_scores(T) if keeps_weights(T) else 2 * min(BLOCK, T) * T
        attention += c * there.rows * config.heads * scores
    inner = 4 if by_hand(config, there).feed_forward else 3
    layer = (FP32 + c) * N * D + max(inner * c * N * F, attention)
    chunk = min(training.chunk_tokens, N) * V * (FP32 + (BF16 if c == BF16 else 0))
    loss = c * N * D + chunk + (BF16 * V * D if c == BF16 else 0)
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
    c = BF16 if training.precision == "bf16" and layout.shards > 1 else FP32
    layer = (sum(counts.values()) - tables) // config.layers
    root = FP32 * tables * (1 if training.micro_batches == 1 else 2)
    return _Communication(root + c * layer, root + 2 * c * layer, root + (3 * c + FP32) * layer)


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
    return config.layers * 2 * 2 * FP32 * training.rows * training.sequence_length * config.width
