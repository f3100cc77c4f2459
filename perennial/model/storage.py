"""Safetensors files of a model folder, in and out: checked before they are read, and never held in memory twice.

A folder has one `model.safetensors`, or shards and an index that says which tensor is in which. Nothing here knows what
the tensors mean. Only safetensors are read: unlike pickles they cannot run code.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perennial.core.environment import usable_cores
from perennial.core.errors import UserError
from perennial.core.files import read_json, write_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5e9
"""Weights beyond this are split into several files."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Type in a file's header: torch's."""
_FLOATS = ("F64", "F32", "BF16", "F16")
"""Those that weights can be read from; the shorter ones are quantised, and mean nothing without their scales."""

STORABLE = frozenset(DTYPES.values())
"""What can be stored and is copied as it is."""
FLOATS = frozenset(DTYPES[name] for name in _FLOATS)
"""What can be converted to one another."""

_PIECE_BYTES = 1 << 20
"""Small enough that a piece is still in the processor's cache when it is checked and converted."""
_THREADED_BYTES = 4 << 20
"""Tensors from this size on are read by several threads; for smaller ones starting them costs more than it saves."""
_MAX_THREADS = 4
"""A few threads fill the way to memory. Assumption: not measured on more than two cores."""


@dataclass(frozen=True)
class _Entry:
    """Where a tensor's bytes lie, and what they are."""

    path: Path
    type: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    num_bytes: int


# Reading


@dataclass(frozen=True)
class StoredTensors:
    """The tensors stored in a folder. Opening reads the headers only; no file stays open.

    The safetensors library checks the files, but tensors are read by plain reads at the offsets that the header gives.
    The library maps files into memory: their pages count as the process's own beside the tensors made of them, up to
    twice the weights, and a file that is cut while it is mapped kills the process instead of raising an error.
    """

    folder: Path
    _entries: Mapping[str, _Entry]

    @classmethod
    def open(cls, folder: Path) -> StoredTensors:
        """The tensors in `folder`, the headers of all files and the index checked against each other.

        Raises UserError when there are no weights, a shard is missing or damaged, or the index is wrong.
        """
        if not folder.is_dir():
            raise UserError(f"{folder}: no such model folder")
        if (folder / WEIGHTS).is_file():
            return cls(folder, _header(folder / WEIGHTS))
        if not (folder / INDEX).is_file():
            raise UserError(f"{folder}: no weights: neither {WEIGHTS} nor {INDEX} is there.{_hint(folder)}")
        entries: dict[str, _Entry] = {}
        for file, listed in read_index(folder / INDEX, "safetensors").items():
            shard = _header(folder / file)
            check_listed(folder / INDEX, file, listed, shard.keys())
            entries |= shard
        return cls(folder, entries)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, file by file in the order of their bytes: the order in which reading is fastest."""
        return tuple(self._entries)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors as they are stored."""
        return sum(entry.num_bytes for entry in self._entries.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(sorted({entry.path for entry in self._entries.values()}))

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor."""
        return list(self._entries[name].shape)

    def path(self, name: str) -> Path:
        """The file that has a tensor."""
        return self._entries[name].path

    def dtype(self, name: str) -> torch.dtype:
        """The type that a tensor is stored in, integers included. Raises UserError for one that is not known here."""
        entry = self._entries[name]
        if entry.type not in DTYPES:
            raise UserError(f"{entry.path}: {name} is stored as {entry.type}; supported: {', '.join(DTYPES)}")
        return DTYPES[entry.type]

    def read(self, name: str, *, shape: list[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of floats in memory of its own, in the type that it is stored in or in `dtype`.

        Raises UserError when its shape is not `shape`, it is not of floats, it has NaN or infinite values, or values
        that are infinite in `dtype` only.
        """
        self._check(name, shape)
        out = torch.empty(self.shape(name), dtype=dtype or self.dtype(name))
        self._fill(name, out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        """Fills `out` (floats of any type on any device, contiguous) with a tensor, in pieces of 1 MiB.

        Raises UserError as `read` does.
        """
        self._check(name, list(out.shape))
        if not out.is_contiguous() or not out.is_floating_point():
            raise ValueError(f"{name}: must be read into a contiguous tensor of floats, not {out.dtype}")
        self._fill(name, out)

    def read_unchecked(self, name: str) -> Tensor:
        """A tensor of any type, integers and truth values too, in memory of its own; its values are not looked at."""
        entry = self._entries[name]
        out = torch.empty(entry.shape, dtype=self.dtype(name))
        with _opened(entry.path) as file:
            _read_bytes(file, _bytes_of(out), entry.offset)
        return out

    def _check(self, name: str, shape: list[int] | None) -> None:
        entry = self._entries[name]
        if shape is not None and list(entry.shape) != shape:
            raise UserError(f"{entry.path}: {name} has shape {list(entry.shape)}, but config.json asks for {shape}")
        if entry.type not in _FLOATS:
            raise UserError(f"{entry.path}: {name} is stored as {entry.type}; supported: {', '.join(_FLOATS)}")

    def _fill(self, name: str, out: Tensor) -> None:
        entry = self._entries[name]
        not_finite, too_large = _fill(entry, out.detach().view(-1))
        number = f"{not_finite or too_large} of {out.numel()} weights"
        if not_finite:
            raise UserError(f"{entry.path}: {name} has {number} that are NaN or infinite")
        if too_large:
            raise UserError(f"{entry.path}: {name} has {number} that are too large for {_in_words(out.dtype)}")


def _header(path: Path) -> dict[str, _Entry]:
    """The tensors of a file in the order of their bytes. Raises UserError unless the file is whole."""
    try:
        # checks all that there is to check: length of the file, no holes or overlaps, sizes that follow from the shapes
        with safe_open(path, framework="pt", device="cpu") as file:
            names = set(file.keys())
        with open(path, "rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            content = json.loads(raw.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}{pointer_hint(path)}") from None
    entries = {}
    for name in sorted(names, key=lambda name: (content[name]["data_offsets"], name)):
        first, last = content[name]["data_offsets"]
        shape = tuple(content[name]["shape"])
        entries[name] = _Entry(path, content[name]["dtype"], shape, 8 + length + first, last - first)
    return entries


def pointer_hint(path: Path) -> str:
    """What to do about a file that only stands for the real one, as after `git clone` without Git LFS."""
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(64).startswith(b"version https://git-lfs")
    except OSError:
        return ""
    return ". It is a pointer of Git LFS; fetch the file itself with `git lfs pull`" if is_pointer else ""


def read_index(index: Path, suffix: str) -> dict[str, set[str]]:
    """The files that an index lists and the names of the tensors in each. Raises UserError unless all are there."""
    content = read_json(index, "index of weights")
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(f"{index}: must have a 'weight_map' from tensor names to file names")
    files: dict[str, set[str]] = {}
    for name, file in listed.items():
        files.setdefault(file, set()).add(name)
    for file in sorted(files):
        if Path(file).name != file or not file.endswith(f".{suffix}"):
            raise UserError(f"{index}: {file!r} is not the name of a {suffix} file in this folder")
    present = {path.name for path in index.parent.iterdir()}
    for file, names in sorted(files.items()):
        if file not in present:
            raise UserError(f"{index.parent}: {file} is missing; {index.name} lists {len(names)} tensors in it")
    return dict(sorted(files.items()))


def check_listed(index: Path, file: str, listed: Set[str], present: Set[str]) -> None:
    """Raises UserError unless a file has exactly the tensors that the index lists."""
    if absent := listed - present:
        raise UserError(f"{index}: lists {some(absent)} in {file}, which does not have it")
    if unlisted := present - listed:
        raise UserError(f"{index}: does not list {some(unlisted)}, which is in {file}")


def _hint(folder: Path) -> str:
    """What to do about a folder that has weights of another kind."""
    if shards := sorted(folder.glob("*.safetensors")):
        return f" There is {shards[0].name}, but no index that says what belongs to it."
    if pickles := sorted(path for end in ("bin", "pth", "pt") for path in folder.glob(f"*.{end}")):
        return (
            f" Pickled weights ({pickles[0].name}) are not read: convert them to safetensors with "
            f"`perennial convert {folder} --pickled --out DIR`."
        )
    return ""


def _fill(entry: _Entry, out: Tensor) -> tuple[int, int]:
    """Fills `out` (flat) with a tensor of floats, and checks every piece while it is in cache.

    Returns how many of its values are not finite, and how many more are infinite in the type of `out`.
    """
    stored = DTYPES[entry.type]
    can_overflow = _has_larger_values(stored, out.dtype)
    step = _PIECE_BYTES // stored.itemsize
    of_thread = threading.local()

    def fill_piece(start: int) -> tuple[int, int]:
        target = out[start : start + step]
        piece = target
        if out.dtype != stored or out.device.type != "cpu":
            if not hasattr(of_thread, "buffer"):
                of_thread.buffer = torch.empty(step, dtype=stored)
            piece = of_thread.buffer[: len(target)]
        _read_bytes(file, _bytes_of(piece), entry.offset + start * stored.itemsize)
        with torch.inference_mode(out.is_inference()):  # a mode of the caller's thread that this one does not have
            if piece is not target:
                target.copy_(piece)
            bad = number_not_finite(piece)
            return bad, number_not_finite(target) - bad if can_overflow else 0

    starts = range(0, len(out), step)
    with _opened(entry.path) as file:
        if entry.num_bytes < _THREADED_BYTES:
            counts = list(map(fill_piece, starts))
        else:
            with ThreadPoolExecutor(min(_MAX_THREADS, usable_cores())) as threads:
                counts = list(threads.map(fill_piece, starts))
    return sum(count[0] for count in counts), sum(count[1] for count in counts)


def number_not_finite(values: Tensor) -> int:
    """How many of some floats are NaN or infinite. Their sum is finite only if all are, and quicker to have."""
    if bool(torch.isfinite(values.sum())):
        return 0
    return int((~torch.isfinite(values)).sum())


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """The file, to read from; errors of the system while it is open are UserErrors that name it."""
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _read_bytes(file: FileIO, out: memoryview, offset: int) -> None:
    """Fills `out` from an offset in the file on. Several threads may do so at once."""
    done = 0
    while done < len(out):
        number = os.preadv(file.fileno(), [out[done:]], offset + done)
        if number == 0:
            raise UserError(f"{file.name}: was cut while it was being read")
        done += number


def some(names: Iterable[str]) -> str:
    """The first three names, and how many more."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


# Writing


def write_tensors(
    folder: Path,
    tensors: Mapping[str, tuple[list[int], torch.dtype]],
    get: Callable[[str], Tensor],
    *,
    max_shard_bytes: float = MAX_SHARD_BYTES,
    process: int = 0,
    processes: int = 1,
) -> None:
    """Writes `tensors` (name: shape and type to store) into `folder`, one file or shards and their index.

    `get` gives a tensor by its name; it is asked and converted when its shard's turn has come, so that no more than one
    shard is held. Older weights in `folder` are removed first. Raises UserError for values that are infinite only in
    the type to store, and OSError when a file cannot be written. Of several processes each writes every
    `processes`-th file, into a folder without older weights.
    """
    sizes = {name: _num_bytes(shape, dtype) for name, (shape, dtype) in tensors.items()}
    shards = _in_shards(sizes, max_shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    if processes == 1:
        for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
            old.unlink(missing_ok=True)
    for number, (file, names) in enumerate(shards.items()):
        if number % processes == process:
            _write_shard(folder / file, {name: tensors[name] for name in names}, get)
    if len(shards) > 1 and process == 0:
        where = {name: file for file, names in shards.items() for name in names}
        number = sum(_num_bytes(shape, torch.uint8) for shape, _ in tensors.values())
        metadata = {"total_parameters": number, "total_size": sum(sizes.values())}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(where.items()))})


def share_of(
    tensors: Mapping[str, tuple[list[int], torch.dtype]], max_shard_bytes: float, process: int, processes: int
) -> set[str]:
    """The names of the tensors that `write_tensors` would ask for on one of several processes."""
    sizes = {name: _num_bytes(shape, dtype) for name, (shape, dtype) in tensors.items()}
    shards = list(_in_shards(sizes, max_shard_bytes).values())
    return {name for names in shards[process::processes] for name in names}


def _num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _in_shards(sizes: Mapping[str, int], max_bytes: float) -> dict[str, list[str]]:
    """File names and the tensors in each, filled in order; a tensor larger than `max_bytes` has a file of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _write_shard(
    path: Path, tensors: Mapping[str, tuple[list[int], torch.dtype]], get: Callable[[str], Tensor]
) -> None:
    ready: dict[str, Tensor] = {}
    memories: set[int] = set()
    for name, (shape, dtype) in tensors.items():
        tensor = _converted(name, get(name), dtype)
        if list(tensor.shape) != shape:
            raise ValueError(f"{name}: has shape {list(tensor.shape)}, not {shape}")
        memory = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if memory in memories else tensor  # safetensors refuses what shares memory
        memories.add(memory)
    path.touch()
    rights = path.stat().st_mode & 0o777
    try:
        save_file(ready, path, metadata={"format": "pt"})
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(rights)  # safetensors makes files that only their owner can read; these are like any other new file


def _converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor on the CPU, contiguous, in `dtype`."""
    tensor = tensor.detach()
    stored = tensor.to("cpu", dtype).contiguous()
    if _has_larger_values(tensor.dtype, dtype):
        lost = number_not_finite(stored) - number_not_finite(tensor)
        if lost:
            largest = f"{torch.finfo(dtype).max:.6g}"
            raise UserError(
                f"{name} has {lost} of {tensor.numel()} weights that are too large for {_in_words(dtype)} "
                f"(the largest is {largest}); store it as bfloat16 or float32"
            )
    return stored


def _has_larger_values(one: torch.dtype, other: torch.dtype) -> bool:
    both_floats = one.is_floating_point and other.is_floating_point
    return both_floats and torch.finfo(one).max > torch.finfo(other).max


def _in_words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
