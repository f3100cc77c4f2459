"""What a run may ask of the machine: how its processes divide the work, and whether the model can fit at all."""

from __future__ import annotations

import functools

import torch

from perennial.core.amounts import human, human_bytes
from perennial.core.environment import memory_bytes as machine_memory_bytes
from perennial.core.errors import UserError
from perennial.core.layout import Layout, choose_layout
from perennial.model.foreign import AnyConfig, check_divisible, num_parameters, state_bytes
from perennial.model.memory import optimizer_bytes, state_by_kind
from perennial.model.memory_terms import Training
from perennial.train.history import component
from perennial.train.parallel import World, device_bytes, processes_per_machine
from perennial.train.resolved import Resolved, ResolvedStage


def layout_for(resolved: Resolved, config: AnyConfig, world: World) -> Layout:
    """Replicas, shards and parts of matrices for these processes. Raises UserError when the model does not divide."""
    here = processes_per_machine(world)
    layout = choose_layout(
        world.size,
        per_machine=here,
        **resolved.parallel.model_dump(),
        needed_bytes=max(_state_needed(config, stage) for stage in resolved.stages),
        device_bytes=device_bytes(world.device, here, machine_memory_bytes()["total"]),
    )
    check_divisible(config, layout)
    return layout


def _state_needed(config: AnyConfig, stage: ResolvedStage) -> int:
    """Bytes of weights, gradients and the stage's optimizer state, on one process that holds all."""
    optimizer = component("optimizers", stage.optimizer)
    per_role = optimizer_bytes(config, optimizer.state_bytes_per_parameter)
    return sum(state_by_kind(config, Training(rows=1, sequence_length=1, optimizer_bytes=per_role)))


def check_processes(sequences: int, processes: int) -> None:
    """Raises UserError when a batch has no row for some of the processes that divide it."""
    if processes > sequences:
        raise UserError(
            f"{processes} processes for batches of {sequences} rows (batch.sequences, or a stage's sequences): each "
            "process needs a row; use fewer"
        )


def check_memory(config: AnyConfig, world: World) -> None:
    """Raises UserError for a model whose weights, gradients and optimizer state cannot fit, whatever is free now."""
    parts = world.layout.shards * world.layout.tensor
    needed = state_bytes(config, 4) / parts  # 4 bytes of optimizer state per parameter at the least
    on_gpu = world.device.type == "cuda"
    there = device_bytes(world.device, 1, machine_memory_bytes()["total"])
    if there is not None and needed > there:
        raise UserError(
            f"model: {human(num_parameters(config))} parameters need at least {human_bytes(needed)} for weights, "
            f"gradients and optimizer state; this {'GPU' if on_gpu else 'machine'} has {human_bytes(there)}. Take a "
            "smaller model."
        )


def memory_bytes(device: torch.device) -> int:
    """Memory in use: peak allocated on a GPU; on a CPU the resident set without the text that is mapped into it.

    Mapped text comes and goes: the system takes its pages back when it needs room, so that no run fails for them.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    pages = _resident_pages()
    if pages is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resident, from_files = pages
    return (resident - max(0, from_files - library_pages())) * resource.getpagesize()


@functools.cache
def library_pages() -> int:
    """Resident pages of files, which are those of libraries when this is first called: before any text is read."""
    pages = _resident_pages()
    return 0 if pages is None else pages[1]


def _resident_pages() -> tuple[int, int] | None:
    """Pages of this process that are in memory, and how many of them are of files; None where Linux is not."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except OSError:
        return None
    return resident, shared
