"""When memory runs out: what took it, what to lower and by how much, and a snapshot of a GPU's memory to look into.

What training holds is counted in closed form (`model.memory`). It did not fit, so where the count says that it should
have, everything that grows with the batch is taken to be larger by the same factor, and advice is worked out with that.

Which code took which block is known only to the allocator, and only if it notes a stack at every allocation, which
costs a few microseconds each, thousands of times in an update. So it does when PERENNIAL_MEMORY_HISTORY=1 is set, and
else a snapshot has the sizes and places of the blocks without who took them, at no cost.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from perennial.core import plugins
from perennial.core.amounts import human_bytes
from perennial.core.environment import memory_bytes as machine_memory_bytes
from perennial.core.errors import UserError
from perennial.core.layout import Layout
from perennial.model.activations import activation_bytes
from perennial.model.config import ModelConfig
from perennial.model.foreign import AnyConfig, num_parameters, parse_config
from perennial.model.memory import GPU_PROCESS_BYTES, Memory, estimate, optimizer_bytes, stand_in
from perennial.model.memory_terms import Checkpointing, Training
from perennial.objectives.next_token import default_chunk
from perennial.train.parallel import World, device_bytes, processes_per_machine
from perennial.train.resolved import Resolved, ResolvedStage

SNAPSHOT = "memory_snapshot.pickle"
"""File in the run folder; pytorch.org/memory_viz shows it. It is never read here."""
HISTORY = "PERENNIAL_MEMORY_HISTORY"
"""Environment variable: 1 notes where each block of a GPU's memory was taken."""

_HISTORY_ENTRIES = 100_000
"""Allocations that are remembered: the last few updates."""
_USABLE_SHARE = 0.95
"""Advice aims at this share of the memory that is there: the rest is lost between blocks."""


@dataclass(frozen=True)
class Facts:
    """What is known when memory ran out on one process."""

    config: AnyConfig
    training: Training
    sequences: int
    """Rows per update, over all processes."""
    capacity_bytes: int | None
    """Memory that this process could have had; None when nobody says."""
    peak_bytes: int
    """The most that it held."""
    asked_bytes: int | None
    """What was asked for in vain; None when the message does not say."""

    @property
    def device(self) -> str:
        """In words."""
        return "GPU" if self.training.device == "cuda" else "machine"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's or the machine's memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    signs = ("can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def asked_bytes(message: str) -> int | None:
    """How much was asked for, as torch's messages of GPUs and CPUs say; None when they do not."""
    match = re.search(r"tried to allocate ([\d.]+) (bytes|[KMGT]iB)", message, re.IGNORECASE)
    return round(float(match[1]) * _UNITS[match[2]]) if match else None


# Advice


def explanation(facts: Facts) -> str:
    """What happened, what took the memory, and what to change, in lines."""
    training, memory = facts.training, estimate(facts.config, facts.training)
    there = "" if facts.capacity_bytes is None else f" of {human_bytes(facts.capacity_bytes)}"
    asked = f", and {human_bytes(facts.asked_bytes)} more were asked for" if facts.asked_bytes else ""
    parts = {name.replace("_", " "): size for name, size in memory.parts().items() if size}
    held = ", ".join(f"{name} {human_bytes(size)}" for name, size in sorted(parts.items(), key=lambda p: -p[1]))
    return "\n".join(
        [
            f"out of memory: this {facts.device} held {human_bytes(facts.peak_bytes)}{there}{asked}.",
            f"Counted for micro-batches of {training.rows} x {training.sequence_length} tokens with "
            f"activation_checkpointing {training.checkpointing}: {human_bytes(memory.total)} at the fullest moment "
            f"({memory.moment}): {held}.",
            "What helps, the cheapest first:",
            *(f"  {line}" for line in advice(facts)),
        ]
    )


def advice(facts: Facts) -> list[str]:
    """What to change so that training fits, each way by itself, the cheapest first; never empty."""
    if facts.capacity_bytes is None:
        half = max(1, facts.training.rows // 2)
        return [f"batch.micro_batch={half}, or activation_checkpointing=full"]
    lines = [*_fewer_rows(facts), *_less_kept(facts), *_shorter_rows(facts), *_more_processes(facts)]
    return lines or ["a smaller model, or a device with more memory"]


def needed_bytes(facts: Facts, training: Training) -> float:
    """The count for another way of training, what grows with the batch scaled to what was seen here."""
    here, there = estimate(facts.config, facts.training), estimate(facts.config, training)
    seen = max(facts.capacity_bytes or 0, facts.peak_bytes + (facts.asked_bytes or 0))
    factor = max(1.0, (seen - _fixed(here)) / max(1, here.total - _fixed(here)))
    return _fixed(there) + factor * (there.total - _fixed(there))


def _fixed(memory: Memory) -> int:
    """What does not grow with the batch."""
    held = memory.parameters + memory.gradients + memory.optimizer + memory.other_models + memory.rounds
    return held + memory.weight_copies + memory.process


def _fits(facts: Facts, training: Training) -> bool:
    assert facts.capacity_bytes is not None
    return needed_bytes(facts, training) <= _USABLE_SHARE * facts.capacity_bytes


def _cut(facts: Facts, rows: int) -> Training:
    """The same update in micro-batches of `rows` rows."""
    share = -(-facts.sequences // (facts.training.layout.replicas * facts.training.layout.shards))
    return replace(facts.training, rows=rows, micro_batches=-(-share // rows))


def _most_rows(facts: Facts, change: Callable[[Training], Training]) -> int | None:
    """The largest micro-batch that fits, up to the present one, with something else changed too."""
    sizes = range(facts.training.rows, 0, -1)
    return next((rows for rows in sizes if _fits(facts, change(_cut(facts, rows)))), None)


def _fewer_rows(facts: Facts) -> Iterator[str]:
    rows = _most_rows(facts, lambda training: training)
    if rows is None or facts.training.rows == 1:
        return
    rows = min(rows, facts.training.rows - 1)
    one = _activations(facts, replace(facts.training, rows=1))
    yield (
        f"batch.micro_batch={rows} instead of {facts.training.rows}: {_needs(facts, _cut(facts, rows))}; a row's "
        f"activations take {human_bytes(one)}. The update is the same, made in {_cut(facts, rows).micro_batches} pieces"
    )


_COSTS = {"selective": "about a tenth more time", "full": "about a third more time"}


def _less_kept(facts: Facts) -> Iterator[str]:
    now = facts.training.checkpointing
    policies: tuple[Checkpointing, ...] = ("none", "selective", "full")
    for policy in policies[policies.index(now) + 1 :]:
        kept = [_activations(facts, replace(facts.training, checkpointing=each)) for each in (now, policy)]
        rows = _most_rows(facts, functools.partial(replace, checkpointing=policy))
        if rows is None:
            continue
        also = "" if rows == facts.training.rows else f" with batch.micro_batch={rows} (now {facts.training.rows})"
        needs = _needs(facts, replace(_cut(facts, rows), checkpointing=policy))
        yield (
            f"activation_checkpointing={policy} instead of {now}{also}: {needs}; activations of a micro-batch of "
            f"{facts.training.rows} fall from {human_bytes(kept[0])} to {human_bytes(kept[1])}, for {_COSTS[policy]}"
        )


def _shorter_rows(facts: Facts) -> Iterator[str]:
    """Only where not even one row fits with everything computed again: it changes what is trained."""
    least = replace(_cut(facts, 1), checkpointing="full")
    if _fits(facts, least):
        return
    length = facts.training.sequence_length
    for shorter in range((length - 1) // 128 * 128, 0, -128):
        training = replace(least, sequence_length=shorter)
        if _fits(facts, training):
            yield (
                f"batch.sequence_length={shorter} instead of {length}, with batch.micro_batch=1 and "
                f"activation_checkpointing=full: {_needs(facts, training)}. It changes what the model sees at once"
            )
            return


def _more_processes(facts: Facts) -> Iterator[str]:
    """Where weights, gradients and moments leave too little room for one row."""
    least, layout = replace(_cut(facts, 1), checkpointing="full"), facts.training.layout
    if _fits(facts, least):
        return
    state = estimate(facts.config, facts.training)
    held = human_bytes(state.parameters + state.gradients + state.optimizer)
    for shards in (2**power for power in range(1, 11)):
        spread = replace(least, layout=Layout(shards=shards, tensor=layout.tensor))
        if shards > layout.shards and _fits(facts, spread):
            enough = facts.sequences >= shards
            rows = "" if enough else f" and batch.sequences of {shards} or more"
            yield (
                f"parallel.shard=full on {shards * layout.tensor} processes with batch.micro_batch=1 and "
                f"activation_checkpointing=full{rows}: {_needs(facts, spread)} each; weights, gradients and optimizer "
                f"state take {held} here"
            )
            return


def _activations(facts: Facts, training: Training) -> int:
    """What a micro-batch keeps for the backward pass."""
    config = facts.config
    return activation_bytes(config if isinstance(config, ModelConfig) else stand_in(config), training)


def _needs(facts: Facts, training: Training) -> str:
    return f"needs about {human_bytes(needed_bytes(facts, training))}"


# Where it happens


@contextlib.contextmanager
def explained(folder: Path, resolved: Resolved, world: World) -> Iterator[None]:
    """Turns running out of memory in the body into a UserError with advice; other errors pass.

    On a GPU a snapshot of its memory is written into the run's `folder` first.
    """
    on_gpu = world.device.type == "cuda"
    if on_gpu and os.environ.get(HISTORY) == "1":
        torch.cuda.memory._record_memory_history(max_entries=_HISTORY_ENTRIES)
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        text = explanation(_facts(resolved, world, str(error)))
        if on_gpu and (path := _write_snapshot(folder, world.rank)) is not None:
            text += f"\nSnapshot of the memory, for pytorch.org/memory_viz: {path}"
            if os.environ.get(HISTORY) != "1":
                text += f" (with {HISTORY}=1 it also says where each block was taken)"
        raise UserError(text) from error


def _write_snapshot(folder: Path, rank: int) -> Path | None:
    """Writes what the allocator holds into the run folder; None when that fails too."""
    path = folder / (SNAPSHOT if rank == 0 else SNAPSHOT.replace(".", f"_{rank}."))
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.cuda.memory._dump_snapshot(str(temporary))
        temporary.replace(path)
    except Exception:  # whatever it is, the error that matters is the one being told
        temporary.unlink(missing_ok=True)
        return None
    return path


def _facts(resolved: Resolved, world: World, message: str) -> Facts:
    config = parse_config(resolved.model)
    trainings = [_training(resolved, world, config, stage) for stage in resolved.stages]
    training = max(trainings, key=lambda t: estimate(config, t).total)
    capacity, peak = _capacity_and_peak(world)
    return Facts(config, training, resolved.batch.sequences, capacity, peak, asked_bytes(message))


def warning(resolved: Resolved, world: World, config: AnyConfig) -> str | None:
    """What to say before training when the estimate is above what this process can have; an estimate may be wrong."""
    capacity = device_bytes(world.device, processes_per_machine(world), machine_memory_bytes()["total"])
    trainings = [_training(resolved, world, config, stage) for stage in resolved.stages]
    needed = max(estimate(config, training).total for training in trainings)
    if capacity is None or needed <= capacity:
        return None
    return (
        f"memory: each process is estimated to need {human_bytes(needed)}, and can have {human_bytes(capacity)}; "
        "`perennial plan --memory` says what takes it and what to lower"
    )


def _training(resolved: Resolved, world: World, config: AnyConfig, stage: ResolvedStage) -> Training:
    batch, layout = resolved.batch, world.layout
    share = -(-batch.sequences // world.data_size)
    rows = min(batch.micro_batch or share, share)
    optimizer = plugins.build("optimizers", stage.optimizer)[0]
    on_gpu = world.device.type == "cuda"
    weighed = num_parameters(config) if stage.pull_sources else 0
    return Training(
        rows=rows,
        sequence_length=batch.sequence_length,
        micro_batches=-(-share // rows),
        precision="bf16" if resolved.precision == "bf16" else "fp32",
        device="cuda" if on_gpu else "cpu",
        optimizer_bytes=optimizer_bytes(config, optimizer.state_bytes_per_parameter),
        chunk_tokens=stage.objective.get("chunk_tokens") or default_chunk("cuda" if on_gpu else "cpu"),
        document_mask=resolved.document_mask,
        checkpointing=resolved.activation_checkpointing,
        new_rows=None if stage.new_rows is None else stage.new_rows[1] - stage.new_rows[0],
        other_parameters=sum(model.parameters for model in stage.models) + weighed,
        teachers=len(plugins.build("objectives", stage.objective)[0].checkpoints()),
        communication_bytes=plugins.build("communications", resolved.communication)[0].state_bytes_per_parameter,
        layout=Layout(layout.replicas, layout.shards, layout.tensor),
    )


def _capacity_and_peak(world: World) -> tuple[int | None, int]:
    """Memory that this process could have, and the most it held: of its GPU, or its part of the machine's."""
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        others = total - free - torch.cuda.memory_reserved(world.device)  # other processes, and CUDA's own
        peak = int(torch.cuda.max_memory_allocated(world.device)) + GPU_PROCESS_BYTES
        return total - max(0, others - GPU_PROCESS_BYTES), peak
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    there = machine_memory_bytes()["total"]
    return None if there is None else there // here, _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
