"""A Hugging Face folder copied into a new one: other shards, another type, or safetensors instead of pickles.

The tensors keep their names and all other files that belong to the model come along, so that it works for every
architecture. Weights in other formats and code stay behind, and a checkpoint's training state, which is of no use
without the very weights that it was saved with.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perennial.core import files, lineage
from perennial.core.errors import UserError
from perennial.model.inspection import weights_id
from perennial.model.pickled import PickledTensors
from perennial.model.storage import FLOATS, StoredTensors, number_not_finite, write_tensors

CONFIG = "config.json"

_LEFT_OUT = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|h5|hdf5|keras|msgpack|ot|npz|gguf|ggml|onnx|onnx_data|tflite|mlmodel"
    r"|distcp|nemo|py|pyc|so|ipynb)",
    re.IGNORECASE,
)
"""Names of weights in other formats, and of code."""
_MANIFEST = f"{lineage.STATE_FOLDER}/{files.MANIFEST}"
_MADE_ANEW = [_MANIFEST, *(f"{lineage.STATE_FOLDER}/{name}" for name in (lineage.LINEAGE_FILE, lineage.TASKS_FILE))]

_DTYPE_KEYS = ("dtype", "torch_dtype")
"""Where transformers looks, and where it looked before version 5."""
_COMPUTED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|masked_bias)")
"""Stored in old folders though they follow from the configuration; in a shorter type they would be other numbers."""

Reporter = Callable[[float, float], None]
"""Is told the bytes done and the bytes in all."""


def convert(
    source: Path,
    out: Path,
    *,
    pickled: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    report: Reporter | None = None,
) -> dict[str, Any]:
    """Copies the model folder `source` to `out`, which must not exist, and returns the facts about it.

    pickled: read pytorch_model.bin or its shards instead of safetensors. dtype: store floats as this type (None: as
    they are). Memory: no more than a shard. Raises UserError for a folder that is not whole, values that are too large
    for `dtype`, and a disk that is full; `out` is whole or absent.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already; choose another place, or delete it")
    source = lineage.newest_checkpoint(source)
    config = files.read_json(source / CONFIG, "model configuration")
    if not isinstance(config, dict):
        raise UserError(f"{source / CONFIG}: must be a JSON object, not {type(config).__name__}")
    weights = PickledTensors.open(source) if pickled else StoredTensors.open(source)
    twins = weights.twins if isinstance(weights, PickledTensors) and weights.twins and _is_tied(source, config) else {}
    if (source / _MANIFEST).is_file():
        files.verify_manifest(source, _MANIFEST, "checkpoint")
    types = {name: _type_of(name, weights.dtype(name), dtype) for name in weights.names if name not in twins}
    if dtype is not None:
        _refuse_quantised(source, config, weights)
    facts: dict[str, Any] = {"source": str(source), "out": str(out), "stored_once": dict(twins), "not_finite": {}}
    partial = out.with_name(f"{out.name}.partial")
    try:
        if partial.exists():
            files.remove_tree(partial)
        facts |= _copy_files(source, partial, set(weights.files))
        _write(weights, types, partial, max_shard_bytes, facts, report)
        if dtype is not None:
            named = config if any(config.get(key) for key in _DTYPE_KEYS) else config | dict.fromkeys(_DTYPE_KEYS, "?")
            files.write_json(partial / CONFIG, _with_dtype(named, _in_words(dtype)))
        if lineage.has_lineage(source):
            _write_lineage(source, partial, dtype)
        for path in partial.rglob("*"):
            files.sync(path)
        files.publish(partial, out)
    except OSError as error:
        raise files.explain(error, out) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return facts


def parse_size(text: str) -> float:
    """'5GB' in bytes; K, M, G and T are powers of 1000. Raises UserError for anything else, a bare number included."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])B\s*", text, re.IGNORECASE)
    size = float(match[1]) * 1000 ** ("KMGT".index(match[2].upper()) + 1) if match else 0.0
    if size <= 0:
        raise UserError(f"{text!r} is not a size; write it like 5GB or 500MB")
    return size


def _type_of(name: str, stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The type to store a tensor in: masks, positions and the like keep theirs."""
    is_converted = wanted is not None and stored in FLOATS and not _COMPUTED.fullmatch(name)
    return wanted if is_converted and wanted is not None else stored


def _refuse_quantised(source: Path, config: Mapping[str, Any], weights: StoredTensors | PickledTensors) -> None:
    keys = [key for key in ("quantization_config", "compression_config") if config.get(key)]
    types = {name: weights.dtype(name) for name in weights.names}
    short = [name for name, dtype in types.items() if dtype.is_floating_point and dtype not in FLOATS]
    if keys or short:
        why = f"{CONFIG} has {keys[0]}" if keys else f"{short[0]} has 8 bits"
        raise UserError(f"{source}: quantised weights ({why}) cannot be given another type; leave --dtype out")


def _is_tied(source: Path, config: Mapping[str, Any]) -> bool:
    """Whether whoever loads the folder makes one tensor of the embedding and the output head by itself.

    What config.json leaves out is a default of the architecture, which `transformers` knows. Without it nothing is left
    out of the weights: a head too many does no harm, one too few would be drawn at random.
    """
    if (stated := config.get("tie_word_embeddings")) is not None:
        return bool(stated)
    try:
        from transformers import AutoConfig

        return bool(AutoConfig.from_pretrained(source, trust_remote_code=False).tie_word_embeddings)
    except Exception:  # not installed, or an architecture that it does not know
        return False


def _write(
    weights: StoredTensors | PickledTensors,
    types: Mapping[str, torch.dtype],
    folder: Path,
    max_shard_bytes: float,
    facts: dict[str, Any],
    report: Reporter | None,
) -> None:
    """Writes the tensors and completes the facts with their numbers."""
    tensors = {name: (weights.shape(name), dtype) for name, dtype in types.items()}
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensors.values())
    done = 0

    def get(name: str) -> Tensor:
        nonlocal done
        tensor = weights.read_unchecked(name)
        if tensor.dtype in FLOATS and (number := number_not_finite(tensor)):
            facts["not_finite"][name] = number
        done += tensor.numel() * types[name].itemsize
        if report is not None:
            report(done, total)
        return tensor

    write_tensors(folder, tensors, get, max_shard_bytes=max_shard_bytes)
    used = sorted({_in_words(dtype) for dtype in types.values()})
    numbers = {name: sum(torch.Size(s).numel() for s, d in tensors.values() if _in_words(d) == name) for name in used}
    facts |= {"tensors": len(tensors), "values": numbers, "bytes": total}
    facts["files"] = sorted(path.name for path in folder.glob("*.safetensors"))


def _copy_files(source: Path, target: Path, weights: Collection[Path]) -> dict[str, list[str]]:
    """Copies what belongs to the model beside its weights; returns the names of what was carried over and left out."""
    carried, left_out = [], []
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        name = path.relative_to(source)
        if any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            continue  # version control, caches
        if path in weights or path.name.endswith(".index.json") or name.as_posix() in _MADE_ANEW:
            continue
        if _LEFT_OUT.fullmatch(path.name) or name.parts[0] == lineage.STATE_FOLDER:
            left_out.append(name.as_posix())
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
        carried.append(name.as_posix())
    return {"carried": carried, "left_out": left_out}


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with its type, and that of the parts of a model that has several, set to `dtype`."""
    changed = dict(config)
    for key, value in config.items():
        if key in _DTYPE_KEYS and value is not None:
            changed[key] = dtype
        elif key.endswith("_config") and isinstance(value, dict):
            changed[key] = _with_dtype(value, dtype)
    return changed


def _write_lineage(source: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """The lineage of a checkpoint, with the conversion in it, and a manifest of the new folder."""
    found = lineage.read(source)
    change = {"operation": "convert", "checkpoint": found.checkpoint, **({"dtype": _in_words(dtype)} if dtype else {})}
    measured = {key: value for key, value in found.evaluation.items() if key != "tasks"}  # run on the other folder
    update = {"checkpoint": weights_id(folder), "changes": [*found.changes, change], "evaluation": measured}
    complete = found.model_copy(update=update)
    files.write_json(folder / lineage.STATE_FOLDER / lineage.LINEAGE_FILE, complete.model_dump(mode="json"))
    files.write_manifest(folder, {"format": 1}, _MANIFEST)


def _in_words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
