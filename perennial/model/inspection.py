"""What a model folder stores, from its files' headers alone: weight files, tensors with shape and type. No torch."""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from perennial.core.errors import UserError
from perennial.core.files import read_json, sha256
from perennial.core.progress import Progress

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
"""What follows the name of a weight file in the name of the index of its shards."""


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as its file's header describes it."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: 'F32', 'BF16', ..."""

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the model's weights, sorted; files that only lie beside them are left out.

    Raises UserError when there are none, or a shard that the index lists is missing.
    """
    for name in (SAFETENSORS, PICKLE):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}{INDEX}"
        if index.is_file():
            return [_shard(folder, file, index.name) for file in sorted(_listed(index))]
    raise UserError(f"{folder}: no weights: neither {SAFETENSORS} nor {SAFETENSORS}{INDEX} is there")


def _listed(index: Path) -> set[str]:
    content = read_json(index, "index of weights")
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(f"{index}: must have a 'weight_map' from tensor names to file names")
    return set(listed.values())


def _shard(folder: Path, file: str, index: str) -> Path:
    if Path(file).name != file or not (folder / file).is_file():
        raise UserError(f"{folder}: {file} is missing; {index} lists it")
    return folder / file


def stored_tensors(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """Name -> shape and type of the tensors in safetensors files; pickles (.bin) would have to be run, and give none.

    Raises UserError for a file that is no whole safetensors file.
    """
    found = {}
    for path in files:
        if path.suffix != ".safetensors":
            continue
        try:
            with safe_open(path, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                    header = tensors.get_slice(name)
                    found[name] = TensorHeader(tuple(header.get_shape()), header.get_dtype())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a whole safetensors file: {error}") from None
    return found


def values_by_dtype(tensors: Mapping[str, TensorHeader]) -> dict[str, int]:
    """Number of stored values of each type, the most frequent first."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += tensor.size
    return dict(counts.most_common())


def raw_config(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises UserError when it is missing or no JSON object."""
    path = folder / "config.json"
    data = read_json(path, "model configuration")
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a model configuration: it must be a JSON object")
    return data


def weights_id(folder: Path) -> str:
    """The first 16 hex digits of the sha256 over the weight files' own; shows progress when that takes a while."""
    files = weight_files(folder)
    sizes = [path.stat().st_size for path in files]
    digests = []
    with Progress("identify weights", total=sum(sizes), unit="bytes", quiet=sum(sizes) < 1 << 29) as line:
        for index, path in enumerate(files):
            line.update(sum(sizes[:index]))
            digests.append(_digest(str(path.resolve()), sizes[index], path.stat().st_mtime_ns))
            line.update(sum(sizes[: index + 1]))
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=1024)
def _digest(path: str, size: int, changed: int) -> str:
    """A file's sha256; asked for again in the same process it is not read again, unless its size or time differ."""
    return sha256(Path(path))
