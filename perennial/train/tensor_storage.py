"""A storage of torch.distributed.checkpoint over safetensors files.

That library plans which process writes which part and, when reading, which parts of which files a process needs. Its
own storage keeps that plan in a pickle; here it follows from the files' headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from perennial.train.tensor_files import Part, read_part, stored_parts, write_file


def save(folder: Path, name: str, tensors: Mapping[str, Tensor], group: Any) -> None:
    """Writes each process's share; what is the same on all is written once. Raises what failed first, on all."""
    try:
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        dcp_save(dict(tensors), storage_writer=_Writer(folder, name), planner=planner, process_group=group)
    except CheckpointException as error:
        raise _first_failure(error) from error


def load(folder: Path, name: str, into: Mapping[str, Tensor], group: Any) -> None:
    """Fills each process's part of the tensors in `into`."""
    try:
        dcp_load(dict(into), storage_reader=_Reader(folder, name), process_group=group)
    except CheckpointException as error:
        raise _first_failure(error) from error


def _first_failure(error: CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0]


@dataclass(frozen=True)
class _File:
    """The file that a process writes, as the coordinating process names it."""

    name: str


class _Writer(StorageWriter):
    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept between two savings."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The folder is there already."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Any plan will do."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Gives a file to each process that has something to write."""
        writing = [number for number, plan in enumerate(plans) if plan.items] or [0]
        names = {
            number: f"{self._name}.safetensors"
            if len(writing) == 1
            else f"{self._name}-{place:05d}-of-{len(writing):05d}.safetensors"
            for place, number in enumerate(writing, 1)
        }
        return [replace(plan, storage_data=_File(names.get(number, ""))) for number, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this process's file, if it has one."""
        done: Future[list[WriteResult]] = Future()
        results: list[WriteResult] = []
        tensors: dict[str, Tensor] = {}
        parts: dict[str, Any] = {}
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
                raise ValueError(f"{item.index.fqn}: only tensors are stored")
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            chunk, whole = item.tensor_data.chunk, item.tensor_data.size
            stored = item.index.fqn
            if chunk.sizes != whole:
                stored = f"{item.index.fqn}@{','.join(map(str, chunk.offsets))}"
                parts[stored] = {"of": item.index.fqn, "from": list(chunk.offsets), "shape": list(whole)}
            tensors[stored] = tensor.detach().cpu()
            results.append(WriteResult(item.index, tensor.numel() * tensor.element_size(), stored))
        if plan.storage_data is not None and plan.storage_data.name:
            write_file(self._folder / plan.storage_data.name, tensors, parts)
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Everything is in the files' headers."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Folders only."""
        return True


class _Reader(StorageReader):
    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._parts: dict[MetadataIndex, Part] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept between two readings."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Collects the files' headers."""
        tensors: dict[str, TensorStorageMetadata] = {}
        where: dict[MetadataIndex, Part] = {}
        for part in stored_parts(self._folder, self._name):
            entry = TensorStorageMetadata(TensorProperties(dtype=part.dtype), part.whole, [])
            tensors.setdefault(part.tensor, entry).chunks.append(ChunkStorageMetadata(part.offset, part.shape))
            where[MetadataIndex(part.tensor, part.offset)] = part
        return Metadata(state_dict_metadata=dict(tensors), storage_data=where)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Remembers where each part lies."""
        self._parts = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Any plan will do."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Any plans will do."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads what the plan asks for."""
        for item in plan.items:
            spans = zip(item.storage_offsets, item.lengths, strict=True)
            target = planner.resolve_tensor(item).detach()
            target.copy_(read_part(self._parts[item.storage_index], tuple(slice(o, o + n) for o, n in spans)))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Folders only."""
        return True
