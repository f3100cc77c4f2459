"""Whether a run fits: its memory on each device part by part, the largest micro-batch, what to lower if it does not.

Everything is counted by `model.memory` without a device and without torch; all devices of a mesh hold the same.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from perennial.core.amounts import human, human_bytes
from perennial.core.environment import memory_bytes
from perennial.core.errors import UserError
from perennial.core.layout import Layout, choose_layout, divisors
from perennial.model.config import ModelConfig
from perennial.model.foreign import AnyConfig, check_divisible, num_parameters
from perennial.model.memory import Memory, copies_while_saving, estimate, optimizer_bytes, state_by_kind
from perennial.model.memory_terms import Checkpointing, Device, Precision, Training
from perennial.objectives.next_token import default_chunk

GPUS_PER_MACHINE = 8
"""Assumption where nobody says how many processes run on one machine."""

_WHERE_FROM = {
    "parameters": "4 bytes each, fp32",
    "gradients": "4 bytes each, those that exist at this moment",
    "optimizer": "what the optimizer declares per parameter of each role",
    "other_models": "teachers, the parent that a pull draws to, what it weighs by: 4 bytes each",
    "weight_copies": "the layers' matrices once more in bf16 (autocast)",
    "activations": "kept for the backward pass: listed per layer in docs/memory.md",
    "working": "gradients of activations and what the layer at work needs",
    "loss": "hidden states, their gradient, the head's gradient, one chunk of logits",
    "rounds": "what a communication keeps from one exchange to the next",
    "communication": "gathered layers, embedding and head; buffers to send from",
    "data": "ids of the batch and its targets",
    "saving": "a copy of weights and moments while a checkpoint is written",
    "unusable": "freed memory that the allocator holds and cannot use: measured share",
    "process": "interpreter, torch and its libraries: measured constant",
}
_ON_GPU = {"process": "CUDA's context and libraries: a constant, not measured"}


@dataclass(frozen=True)
class Stage:
    """What of a stage decides about memory."""

    name: str
    optimizer: Any
    """The optimizer component: it says how many bytes of state each role has."""
    chunk_tokens: int | None
    new_rows: int | None
    other_parameters: int = 0
    """Numbers of models that are read and not trained, and of a pull's importance."""
    teachers: int = 0
    """Models whose predictions are learned from."""


@dataclass(frozen=True)
class Run:
    """A run, as far as its memory depends on it."""

    config: AnyConfig
    stages: tuple[Stage, ...]
    sequences: int
    """Rows per update, over all processes."""
    sequence_length: int
    micro_batch: int | None
    """Rows per forward pass on one process; None: all of them at once."""
    precision: Precision
    device: Device
    document_mask: bool = False
    checkpointing: Checkpointing = "none"
    shard: str = "auto"
    shard_size: int | None = None
    tensor: int = 1
    communication_bytes: int = 0
    """Bytes per parameter that the communication keeps."""
    processes: int = 1
    per_machine: int | None = None
    limit_bytes: float | None = None
    """Memory that one process may use; None where nobody says."""
    saves_during: bool = True
    """Whether checkpoints are written while training goes on."""


@dataclass(frozen=True)
class Step:
    """What to change so that a run fits, and what each device then holds."""

    change: str
    """Settings as the command line takes them."""
    total_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs on each device, and whether that is there."""

    run: Run
    layout: Layout
    stages: dict[str, Memory]
    """By name of the stage."""
    largest_micro_batch: int | None
    """Most rows at once that fit, of those that a batch can be cut into; None: not even one, or no limit is known."""
    advice: tuple[Step, ...]
    """What to change so that the run fits: on the same devices, on more of them; empty when it fits as it is."""

    @property
    def fullest(self) -> str:
        """Name of the stage that needs most."""
        return max(self.stages, key=lambda name: self.stages[name].total)

    @property
    def total(self) -> int:
        """Bytes per device at the fullest moment of all stages."""
        return self.stages[self.fullest].total

    @property
    def fits(self) -> bool | None:
        """Whether that is there; None when nobody says how much there is."""
        return None if self.run.limit_bytes is None else self.total <= self.run.limit_bytes

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data, sizes in bytes."""
        run = self.run
        return {
            "parameters": num_parameters(run.config),
            "is_native": isinstance(run.config, ModelConfig),
            "device": run.device,
            "processes": run.processes,
            "mesh": asdict(self.layout),
            "precision": run.precision,
            "activation_checkpointing": run.checkpointing,
            "sequence_length": run.sequence_length,
            "micro_batch": micro_batch_of(run, self.layout),
            "stages": {
                name: {"moment": memory.moment, "total_bytes": memory.total, "parts_bytes": memory.parts()}
                for name, memory in self.stages.items()
            },
            "total_bytes": self.total,
            "limit_bytes": run.limit_bytes,
            "fits": self.fits,
            "largest_micro_batch": self.largest_micro_batch,
            "advice": [asdict(step) for step in self.advice],
        }


# Planning


def plan_memory(run: Run) -> MemoryPlan:
    """Counts a run's memory for the mesh that its settings and number of processes give. Raises UserError."""
    layout = layout_of(run)
    stages = {stage.name: _memory(run, layout, stage) for stage in run.stages}
    found = MemoryPlan(run, layout, stages, _largest_micro_batch(run, layout), ())
    return replace(found, advice=tuple(_advice(run, layout))) if found.fits is False else found


def layout_of(run: Run) -> Layout:
    """The mesh; 'auto' decides by the stage that has the largest state."""
    whole = Layout()
    needed = max(sum(state_by_kind(run.config, _training(run, whole, stage))) for stage in run.stages)
    usual = run.processes if run.device == "cpu" else min(run.processes, GPUS_PER_MACHINE)
    layout = choose_layout(
        run.processes,
        per_machine=run.per_machine or usual,
        shard=run.shard,
        shard_size=run.shard_size,
        tensor=run.tensor,
        needed_bytes=needed,
        device_bytes=run.limit_bytes,
    )
    check_divisible(run.config, layout)
    if layout.replicas * layout.shards > run.sequences:
        raise UserError(f"{run.processes} processes for batch.sequences {run.sequences}: each needs a row; use fewer")
    return layout


def _rows_of_a_process(run: Run, layout: Layout) -> int:
    return -(-run.sequences // (layout.replicas * layout.shards))


def micro_batch_of(run: Run, layout: Layout) -> int:
    """Rows that one process reads at once."""
    rows = _rows_of_a_process(run, layout)
    return min(run.micro_batch or rows, rows)


def _training(run: Run, layout: Layout, stage: Stage) -> Training:
    rows = micro_batch_of(run, layout)
    return Training(
        rows=rows,
        sequence_length=run.sequence_length,
        micro_batches=-(-_rows_of_a_process(run, layout) // rows),
        precision=run.precision,
        device=run.device,
        optimizer_bytes=optimizer_bytes(run.config, stage.optimizer.state_bytes_per_parameter),
        chunk_tokens=stage.chunk_tokens or default_chunk(run.device),
        document_mask=run.document_mask,
        checkpointing=run.checkpointing,
        new_rows=stage.new_rows,
        communication_bytes=run.communication_bytes,
        other_parameters=stage.other_parameters,
        teachers=stage.teachers,
        layout=layout,
    )


def _memory(run: Run, layout: Layout, stage: Stage) -> Memory:
    training = _training(run, layout, stage)
    memory = estimate(run.config, training)
    if run.saves_during and copies_while_saving(memory, run.device, run.limit_bytes):
        return estimate(run.config, replace(training, copies_state=True))
    return memory


def _total(run: Run) -> int:
    layout = layout_of(run)
    return max(_memory(run, layout, stage).total for stage in run.stages)


def _candidates(run: Run, layout: Layout) -> list[int]:
    """Micro-batches that a batch can be cut into, the largest first."""
    rows = _rows_of_a_process(run, layout)
    uneven = [] if run.micro_batch else [rows]  # all at once, when nothing is set
    return [*uneven, *(size for size in reversed(divisors(run.sequences)) if size <= rows)]


def _largest_micro_batch(run: Run, layout: Layout) -> int | None:
    if run.limit_bytes is None:
        return None
    return next((n for n in _candidates(run, layout) if _total(replace(run, micro_batch=n)) <= run.limit_bytes), None)


def _advice(run: Run, layout: Layout) -> Iterator[Step]:
    """The first way to make the run fit, the cheapest first, and then the first with more devices."""
    for changes, changed in _changes(run):
        step = _fitted(changed, changes)
        if step is not None:
            yield step
            break
    for processes in _more_processes(run, layout):
        sharded = replace(run, shard="full", shard_size=None, processes=processes)
        step = _fitted(sharded, ("parallel.shard=full", f"on {processes} devices"))
        if step is not None:
            yield step
            return


def _fitted(run: Run, changes: tuple[str, ...]) -> Step | None:
    """The run with its own micro-batch or else the largest that fits; None where none does."""
    assert run.limit_bytes is not None
    total, layout = _total(run), layout_of(run)
    if total <= run.limit_bytes:
        return Step(" ".join(changes), total)
    largest = _largest_micro_batch(run, layout)
    if largest is None:
        return None
    smaller = replace(run, micro_batch=largest)
    return Step(" ".join((f"batch.micro_batch={largest}", *changes)), _total(smaller))


def _changes(run: Run) -> Iterator[tuple[tuple[str, ...], Run]]:
    """Ways to need less on the same devices, those that cost least time first: settings, and the run with them."""
    policies: dict[Checkpointing, tuple[Checkpointing, ...]] = {
        "none": ("none", "selective", "full"),
        "selective": ("selective", "full"),
        "full": ("full",),
    }
    precisions: tuple[Precision, ...] = ("fp32", "bf16") if run.precision == "fp32" else ("bf16",)
    for precision in precisions:
        for policy in policies[run.checkpointing]:
            changes = [f"activation_checkpointing={policy}"] if policy != run.checkpointing else []
            changes += [f"precision={precision}"] if precision != run.precision else []
            yield tuple(changes), replace(run, checkpointing=policy, precision=precision)


def _more_processes(run: Run, layout: Layout) -> list[int]:
    """Powers of two times what a tensor group needs, above the present number and at most one for each row."""
    numbers = (layout.tensor << power for power in range(1, 14))
    return [n for n in numbers if n > run.processes and n // layout.tensor <= run.sequences]


# This machine


def precision_of_machine(device: Device) -> Literal["fp32", "bf16"]:
    """What `precision: auto` means, as far as it can be told without torch: bf16 on a GPU and where a CPU has it."""
    if device == "cuda":
        return "bf16"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "fp32"
    return "bf16" if re.search(r"\b(avx512_bf16|amx_bf16|amx_tile)\b", flags) else "fp32"


def gpu_bytes() -> list[int]:
    """Memory of each NVIDIA GPU of this machine, as its driver says; empty without one."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    asked = [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) << 20 for line in done.stdout.split("\n") if line.strip().isdigit()]


def limit_of_machine(device: Device, processes: int) -> float | None:
    """Memory that one process may use here: that of a GPU, or a share of the machine's; None when it is not known."""
    if device == "cuda":
        return float(min(gpu_bytes(), default=0)) or None
    total = memory_bytes()["total"]
    return None if total is None else total / processes


_SCALES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SCALES |= {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


def parse_bytes(text: str) -> float:
    """'80GB' or '74.5 GiB' in bytes. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*((?:[KMGT]i?)?)B\s*", text)
    if match is None or float(match[1]) == 0:
        raise UserError(f"--memory-limit {text!r}: give a size above 0 with its unit, such as 80GB or 74.5GiB")
    return float(match[1]) * _SCALES[match[2]]


# Words


def to_text(plan: MemoryPlan) -> str:
    """The plan for people: one table for each device (all hold the same), what fits, and advice."""
    run, memory = plan.run, plan.stages[plan.fullest]
    where = {"cpu": "process on a CPU", "cuda": "GPU"}[run.device]
    lines = [
        f"{human(num_parameters(run.config))} parameters, rows of {run.sequence_length} tokens, micro_batch "
        f"{micro_batch_of(run, plan.layout)}, {run.precision}, activation_checkpointing {run.checkpointing}",
        f"mesh {plan.layout}: {run.processes} x {where}, each holds:",
        "",
    ]
    sources = _WHERE_FROM | (_ON_GPU if run.device == "cuda" else {})
    rows = [(name.replace("_", " "), human_bytes(size), sources[name]) for name, size in memory.parts().items() if size]
    rows.append(("total", human_bytes(memory.total), f"at the fullest moment: {memory.moment}"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines += [f"  {name:<{widths[0]}}  {size:>{widths[1]}}  {source}" for name, size, source in rows]
    others = [f"{name} {human_bytes(m.total)}" for name, m in plan.stages.items() if name != plan.fullest]
    if others:
        lines += ["", f"That is stage '{plan.fullest}'; the others need less: {', '.join(others)}."]
    if not isinstance(run.config, ModelConfig):
        lines += [
            "",
            "Run through transformers: activations are those of a native model of its size, and can be half or twice "
            "as many (recurrent layers: more). Weights, gradients and optimizer state are exact.",
        ]
    return "\n".join([*lines, "", *_verdict(plan)])


def _verdict(plan: MemoryPlan) -> list[str]:
    run = plan.run
    if run.limit_bytes is None:
        return ["What there is to hold it is not known; say it with --memory-limit, such as --memory-limit 80GB."]
    there = human_bytes(run.limit_bytes)
    if plan.fits:
        largest = plan.largest_micro_batch
        return [
            f"Fits: {plan.total / run.limit_bytes:.0%} of {there}. Largest batch.micro_batch that fits: {largest}"
            f" (of at most {_rows_of_a_process(run, plan.layout)} rows that a process reads per update)."
        ]
    lines = [f"Does not fit: {there} is there, {human_bytes(plan.total - run.limit_bytes)} too little."]
    lines += [f"  it would with {step.change}: {human_bytes(step.total_bytes)}" for step in plan.advice]
    state = plan.stages[plan.fullest]
    if not plan.advice:
        lines.append(
            f"  Not even one row fits: weights and optimizer state alone are "
            f"{human_bytes(state.parameters + state.optimizer)}. Take a smaller model, or more devices with a larger "
            "batch.sequences (each needs a row)."
        )
    return lines
