"""Many processes: who computes which rows, who holds which part of the model, and what they add up.

A model lies on a mesh of replicate x shard x tensor processes. Processes that differ in 'replicate' hold the same
numbers, those that differ in 'shard' each hold a slice of every tensor (FSDP2), those that differ in 'tensor' divide
the large matrices between them and read the same rows. Every process computes its rows' loss divided by the count of
all rows, and gradients are summed; so the result is that of one process up to the order of additions (and, under
'bf16' with shards, up to the rounding of the layers' gains and biases, which are then gathered in bf16 as well).

Source: Li et al. 2020, PyTorch Distributed, arXiv 2006.15704; Zhao et al. 2023, PyTorch FSDP, arXiv 2304.11277;
    Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053, section 3 (tensor parallelism).
Limits: tensor parallelism divides the layers' matrices of native models; embedding, head and loss are computed by
    every process of a 'tensor' group. Models through transformers are sharded, not divided.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from perennial.core.layout import Layout
from perennial.model.layerwise import layers_of
from perennial.model.placement import local_part, mesh_of
from perennial.model.through_transformers import AnyModel
from perennial.model.transformer import Transformer
from perennial.train.feeding import Feeder
from perennial.train.meeting import fresh_store
from perennial.train.watchdog import exchange_limit

ALONE = Layout()
"""One process with all of the model."""
CLIP_SLACK = 1e-6
"""What torch adds to a norm before it divides the limit by it."""


@dataclass(frozen=True)
class World:
    """This process among all: its rank, how many there are, its device and its place in the mesh."""

    rank: int
    size: int
    device: torch.device
    layout: Layout = ALONE
    mesh: Any = None
    """The DeviceMesh of 'replicate', 'shard' and 'tensor'; None for one process alone."""

    @property
    def is_main(self) -> bool:
        """True on the one process that writes the records and talks."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """True on one of the processes that read the same rows: its losses and counts are those that are added up."""
        return self.rank % self.layout.tensor == 0

    @property
    def worker(self) -> int:
        """Which copy of the model this process holds, or a part of."""
        return self.rank // (self.layout.shards * self.layout.tensor)

    @property
    def data_rank(self) -> int:
        """Which part of each batch this process reads."""
        return self.rank // self.layout.tensor

    @property
    def data_size(self) -> int:
        """How many parts each batch has."""
        return self.size // self.layout.tensor


def join_world() -> World:
    """Joins the process group that `torchrun` describes in the environment; a world of one without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        # gloo beside nccl: numbers that live on the host, and checkpoints, do not wait for the GPU's queue
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        limit = exchange_limit()
        if store := fresh_store(int(os.environ["RANK"]), size, limit):
            dist.init_process_group(backend, timeout=limit, store=store, rank=int(os.environ["RANK"]), world_size=size)
        else:
            dist.init_process_group(backend, timeout=limit)
    return World(dist.get_rank() if size > 1 else 0, size, device, Layout(replicas=size))


def leave_world(world: World) -> None:
    """Ends the process group, if there is one."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def device_bytes(device: torch.device, per_machine: int, machine_bytes: int | None) -> float | None:
    """Memory that one process can use: that of its GPU, or its share of the machine's."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return None if machine_bytes is None else machine_bytes / per_machine


def processes_per_machine(world: World) -> int:
    """How many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def placed(world: World, layout: Layout) -> World:
    """The world with its mesh; every process has to call it."""
    if world.size == 1:
        return world
    from torch.distributed.device_mesh import init_device_mesh

    # It advises to merge the two exchanges of a norm over shards and divided matrices; they are small.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    shape = (layout.replicas, layout.shards, layout.tensor)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard", "tensor"))
    return replace(world, layout=layout, mesh=mesh)


# Spreading a model


class Whole(nn.Module):
    """A model behind one `forward`, within which everything that touches its weights happens.

    Sharding gathers weights when a module's `forward` begins; the loss reads the head's weight after the model's.
    """

    def __init__(self, model: AnyModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """`compute(model, *arguments)`; must return tensors, or tuples of them."""
        return compute(self.model, *arguments)


class Spread:
    """A model on this process's part of the mesh, as training and evaluation call it."""

    def __init__(self, model: AnyModel, world: World, *, precision: str = "fp32", apart: bool = False) -> None:
        """Divides and shards `model` in place, which may still be on the meta device, as the world's layout says.

        apart: replicas are workers that train apart, and gradients are summed within each of them only.
        """
        self.model, self.world = model, world
        self.feeder = Feeder(world.device)
        self.workers = world.layout.replicas if apart else 1
        """How many models are trained, each from its own rows; the same until one differs from the others."""
        self.worker = world.worker if apart else 0
        """Which of them this process holds, or a part of."""
        self._summed_by_hand: list[str] = []
        whole = Whole(model)
        self._is_sharded = world.mesh is not None and world.layout.is_spread
        if self._is_sharded:
            if world.layout.tensor > 1:
                assert isinstance(model, Transformer)
                self._summed_by_hand = _divide(model, world.mesh["tensor"])
            _shard(whole, layers_of(model), world, precision, self.workers)
        self._whole: nn.Module = whole
        self._training: Any = whole

    def start_training(self) -> None:
        """Sets up the summing of gradients for the parameters that are trained from here on."""
        if self._is_sharded or self.workers == self.world.layout.replicas:
            return
        from torch.nn.parallel import DistributedDataParallel

        # Native models use every parameter in every pass; others, experts above all, need not.
        self._training = DistributedDataParallel(
            self._whole,
            process_group=self.world.mesh.get_group("replicate"),
            find_unused_parameters=not isinstance(self.model, Transformer),
            gradient_as_bucket_view=True,
        )

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients stay where they are between updates: in the buckets of DDP, which else are a second set."""
        return self._training is not self._whole and isinstance(self.model, Transformer)

    def train_on(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """`compute(model, *arguments)`, whose backward pass leaves gradients averaged over the processes' own rows.

        Over `data_size` processes; over those of one worker, when workers train apart.
        """
        return self._training(compute, *arguments)

    def measure(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """`compute(model, *arguments)` without gradients. Every process has to call it equally often."""
        result = self._whole(compute, *arguments)
        if self._is_sharded:  # what the root gathered would else stay until the next backward pass
            self._whole.reshard()  # type: ignore[operator]
        return result

    @contextlib.contextmanager
    def summing(self, *, now: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients are summed over replicas after the last one only.

        Over shards they are summed (and cut) after each, because whole gradients would not fit where sharding is
        needed.
        """
        if self._is_sharded:
            layout = self.world.layout
            if layout.shards == 1:
                self._whole.set_requires_gradient_sync(now)  # type: ignore[operator]
            elif layout.replicas > self.workers:
                self._whole.set_requires_all_reduce(now)  # type: ignore[operator]
            yield
        elif self._training is not self._whole and not now:
            with self._training.no_sync():
                yield
        else:
            yield

    def finish_gradients(self) -> None:
        """Sums what a division by heads leaves in parts: gradients of the norms that all heads share."""
        for name in self._summed_by_hand:
            gradient = self.model.get_parameter(name).grad
            if gradient is not None:
                dist.all_reduce(local_part(gradient), group=self.world.mesh.get_group("tensor"))


def _shard(whole: Whole, layers: list[nn.Module], world: World, precision: str, workers: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = world.mesh["replicate", "shard"] if world.layout.replicas > workers else world.mesh["shard"]
    # Under autocast alone every layer's bf16 copy would be kept for the backward pass: half a model on each process.
    rounded = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = rounded if precision == "bf16" and world.layout.shards > 1 else MixedPrecisionPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(whole, mesh=mesh)


def _divide(model: Transformer, mesh: Any) -> list[str]:
    """Divides the layers' matrices by heads and by feed-forward columns; names parameters whose gradients are partial.

    Where queries and keys are normed over all heads at once (OLMo 2) attention stays whole on every process.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    replicated = Replicate()
    once = PrepareModuleInput(input_layouts=(replicated,), desired_input_layouts=(replicated,))
    attention = PrepareModuleInput(
        input_layouts=(replicated, None, None, None), desired_input_layouts=(replicated, None, None, None)
    )
    partial = []
    for number, layer in enumerate(model.model.layers):
        plan: dict[str, Any] = {"mlp": once, "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        if model.config.gated_mlp:
            plan["mlp.gate_proj"] = ColwiseParallel()
        if model.config.qk_norm != "projection":
            plan["self_attn"] = attention
            plan |= {f"self_attn.{letter}_proj": ColwiseParallel() for letter in "qkv"}
            plan["self_attn.o_proj"] = RowwiseParallel()
        parallelize_module(layer, mesh, plan)
        if model.config.qk_norm == "head":
            partial += [f"model.layers.{number}.self_attn.{letter}_norm.weight" for letter in "qk"]
    return partial


# Adding up


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scales the gradients so that their norm over everything, a scalar that is returned, is at most `limit`."""
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(mesh_of(parameter), []).append(parameter)
    norms = [_whole_norm(members) for members in by_mesh.values()]
    total = norms[0] if len(norms) == 1 else torch.stack(norms or [torch.zeros(())]).square().sum().sqrt()
    if total.device.type == "cpu" and total + CLIP_SLACK <= limit:
        return total  # times 1 changes nothing and reads and writes every gradient; on a GPU to ask would be to wait
    for members in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(members, limit, total)
    return total


def _whole_norm(parameters: list[nn.Parameter]) -> Tensor:
    norm: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    whole: Tensor = norm.full_tensor() if mesh_of(norm) is not None else norm
    return whole


def summed(values: Tensor, world: World) -> Tensor:
    """Each number summed over all processes, in place; on the host or the device."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


def sum_values(values: list[float], world: World) -> list[float]:
    """Plain numbers summed over the processes that read different rows."""
    spoken = values if world.speaks else [0.0] * len(values)
    return [float(v) for v in summed(torch.tensor(spoken, dtype=torch.float64), world).tolist()]


def any_of(flag: bool, world: World) -> bool:
    """Whether it is true on any process."""
    return float(summed(torch.tensor([flag], dtype=torch.float64), world)) > 0


def wait_for_all(world: World) -> None:
    """Returns when every process has come here."""
    if world.size > 1:
        dist.barrier()
