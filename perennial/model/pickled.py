"""Pickled weights (pytorch_model.bin), opened so that nothing in them is run; only on request (`--pickled`).

A pickle is a program that builds objects. torch runs it with `weights_only`, where it can build tensors and plain
containers and nothing else; the files are mapped into memory, so that tensors are read when they are asked for.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perennial.core.errors import UserError
from perennial.model.storage import STORABLE, check_listed, pointer_hint, read_index

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class PickledTensors:
    """The tensors in pytorch_model.bin, or in the shards that its index lists."""

    folder: Path
    files: tuple[Path, ...]
    _tensors: Mapping[str, Tensor]
    twins: Mapping[str, str]
    """Tensors that are the same memory as an earlier one: name -> name of that one. They are among the names too."""

    @classmethod
    def open(cls, folder: Path) -> PickledTensors:
        """Opens them. Raises UserError when there are none, or they hold anything but tensors by name."""
        paths = [folder / PICKLE]
        if (folder / PICKLE).is_file():
            tensors = _load(folder / PICKLE)
        elif (folder / PICKLE_INDEX).is_file():
            tensors, index = {}, read_index(folder / PICKLE_INDEX, "bin")
            paths = [folder / file for file in index]
            for file, listed in index.items():
                shard = _load(folder / file)
                check_listed(folder / PICKLE_INDEX, file, listed, shard.keys())
                tensors |= shard
        else:
            raise UserError(f"{folder}: no pickled weights: neither {PICKLE} nor {PICKLE_INDEX} is there")
        return cls(folder, tuple(paths), tensors, _twins(tensors))

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order in which they were pickled."""
        return tuple(self._tensors)

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor."""
        return list(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self._tensors[name].dtype

    def read_unchecked(self, name: str) -> Tensor:
        """A tensor. Its memory may be the mapped file, read when it is first touched."""
        return self._tensors[name]


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors in one pickle."""
    try:
        # files from before torch 1.6 are no zip archives and cannot be mapped
        is_mapped = zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about newer kinds of pickles, to the authors of torch
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:  # whatever a damaged program for building objects may raise
        raise UserError(f"{path}: {_reason(error)}{pointer_hint(path)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold tensors by name, not a {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: must hold tensors by name; {name!r} is a {type(tensor).__name__}")
        if problem := _problem(tensor):
            raise UserError(f"{path}: {name} {problem}")
    return {name: tensor.detach() for name, tensor in content.items()}


def _reason(error: Exception) -> str:
    """Why torch did not open a pickle. Its own words for one that asks for code recommend to run it nevertheless."""
    if wanted := re.search(r"GLOBAL (\S+)", str(error)):
        return f"refused: it holds more than weights: it asks for {wanted[1]}, and building that could run any code"
    if isinstance(error, pickle.UnpicklingError):
        unknown = re.search(r"Unsupported \w+ \d+", str(error))
        return f"not a file of pickled weights{f': {unknown[0].lower()}' if unknown else ''}"
    first = re.split(r"\n|\. ", str(error))[0]
    return f"not a whole file of pickled weights: {first or type(error).__name__}"


def _problem(tensor: Tensor) -> str | None:
    """Why a tensor cannot be stored, in words."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return "is not a plain tensor (it is sparse, quantised or without values)"
    if tensor.dtype not in STORABLE:
        return f"is of type {str(tensor.dtype).removeprefix('torch.')}, which is not supported"
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return f"claims {tensor.numel()} values, but has memory for fewer"
    return None


def _twins(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    first: dict[tuple[Any, ...], str] = {}
    twins = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        earlier = first.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), name)
        if earlier != name:
            twins[name] = earlier
    return twins
