"""An optimizer's state in safetensors files: all of it, or one part from each of many processes.

    optimizer.safetensors                     all in one file, or
    optimizer-00001-of-00002.safetensors      one file a process
        header: tensors, and {"parts": {stored name: {"of": name, "from": [row, column], "shape": [whole shape]}}}

What W processes wrote any other number of them reads (`tensor_storage` has what happens between processes). Nothing
is pickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perennial.core.errors import UserError
from perennial.model.storage import DTYPES


@dataclass(frozen=True)
class Part:
    """A piece of a tensor, or all of it, in a file."""

    tensor: str
    """Name of the whole."""
    whole: torch.Size
    offset: torch.Size
    """Where in the whole it begins."""
    shape: torch.Size
    dtype: torch.dtype
    path: Path
    stored: str
    """Its name in the file."""


def save_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor], *, group: Any = None) -> None:
    """Writes tensors, of which each process may hold a part, into `folder`/`name`[-n-of-m].safetensors.

    Every process of `group` has to call it (None: this one alone). Raises OSError when a file cannot be written.
    """
    if group is None:
        write_file(folder / f"{name}.safetensors", {n: t.detach().cpu() for n, t in tensors.items()}, {})
        return
    from perennial.train import tensor_storage

    tensor_storage.save(folder, name, tensors, group)


def load_tensors(folder: Path, name: str, into: Mapping[str, Tensor], *, group: Any = None) -> None:
    """Fills the tensors of `into`, each whole or a process's part, from what `save_tensors` wrote.

    Every process of `group` has to call it. Raises UserError for a damaged file.
    """
    if group is not None:
        from perennial.train import tensor_storage

        tensor_storage.load(folder, name, into, group)
        return
    for part in stored_parts(folder, name):
        if part.tensor in into:
            window = tuple(slice(o, o + n) for o, n in zip(part.offset, part.shape, strict=True))
            into[part.tensor][window].copy_(read_part(part, tuple(slice(0, n) for n in part.shape)))


def stored_parts(folder: Path, name: str) -> list[Part]:
    """Everything that `save_tensors` wrote; none when there is no such file. Raises UserError for a damaged file."""
    found = []
    for path in _files(folder, name):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                placed = json.loads((file.metadata() or {}).get("parts", "{}"))
                for stored in file.keys():  # noqa: SIM118  # not a mapping
                    header = file.get_slice(stored)
                    shape, dtype = torch.Size(header.get_shape()), DTYPES[header.get_dtype()]
                    facts = placed.get(stored, {"of": stored, "from": [0] * len(shape), "shape": shape})
                    whole, offset = torch.Size(facts["shape"]), torch.Size(facts["from"])
                    found.append(Part(facts["of"], whole, offset, shape, dtype, path, stored))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: not a whole safetensors file: {error}") from None
    return found


def read_part(part: Part, window: tuple[slice, ...]) -> Tensor:
    """A window of a stored part."""
    with safe_open(part.path, framework="pt", device="cpu") as file:
        value: Tensor = file.get_slice(part.stored)[window] if window else file.get_tensor(part.stored)
    return value


def write_file(path: Path, tensors: dict[str, Tensor], parts: Mapping[str, Any]) -> None:
    """Writes one file; `parts` as in its header. Raises OSError."""
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            path,
            metadata={"parts": json.dumps(parts)} if parts else None,
        )
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def _files(folder: Path, name: str) -> list[Path]:
    """The one file, or all of a set. Raises UserError when some of a set are missing."""
    whole = folder / f"{name}.safetensors"
    if whole.is_file():
        return [whole]
    files = sorted(folder.glob(f"{name}-?????-of-?????.safetensors"))
    if files:
        number = int(files[0].stem.rpartition("-")[2])
        if len(files) != number:
            raise UserError(f"{folder}: has {len(files)} of the {number} files {name}-*.safetensors")
    return files
