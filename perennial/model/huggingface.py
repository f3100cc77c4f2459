"""Hugging Face model folders in and out: what is written back is what was read, but for what training changed.

A folder of a family in `families`, whose config.json asks for nothing that our transformer does not compute, is read
natively. Every other causal model is run through `transformers` (`through_transformers`). Nothing that would make the
loaded function differ from the stored one is ever ignored, and code that a folder brings is never run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.core.files import explain, write_json
from perennial.model.config import ModelConfig
from perennial.model.families.base import Entries, Family, Stored
from perennial.model.folder_config import CONFIG, GENERATION_CONFIG, FolderConfig, read_config
from perennial.model.storage import StoredTensors, some, write_tensors
from perennial.model.transformer import Source, Transformer

if TYPE_CHECKING:
    from perennial.model.through_transformers import TransformersModel


# Reading


def load_model(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer | TransformersModel:
    """The model in a folder, its weights converted to `dtype` on `device` piece by piece.

    Raises UserError for a configuration that is not supported, for missing files, for tensors that are missing, not
    expected or of another shape, and for weights that are not finite.
    """
    found = read_config(folder)
    if isinstance(found.config, ModelConfig):
        return _load_native(folder, found, torch.device(device), dtype)
    from perennial.model import through_transformers

    return through_transformers.load(folder, found.config, device=device, dtype=dtype)


def _load_native(folder: Path, found: FolderConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    config = found.config
    assert isinstance(config, ModelConfig)
    family = plugins.load("families", config.family)()
    files = StoredTensors.open(folder)
    spelled = {family.spelled(name): name for name in files.names}
    wanted = {one.name: one for one in family.tensors(config)}
    head = _head_name(family, config)
    _check_names(folder, wanted, spelled, family.derived, head=head, is_tied=config.tied_embeddings)
    model = Transformer(config, device="meta", dtype=dtype)
    order = {name: place for place, name in enumerate(files.names)}
    staging = _Staging()
    for name in sorted(wanted, key=lambda name: order[spelled[name]]):
        for part, value in _parameters(files, spelled[name], wanted[name], model, device, dtype, staging):
            _set_parameter(model, part, value)
    kept = [*wanted, head] if config.tied_embeddings and head in spelled else list(wanted)
    if len(kept) > len(wanted):
        _check_really_tied(files, spelled[head], model)
    names = {name: spelled[name] for name in kept}
    model.source = Source(found.entries, {name: files.dtype(stored) for name, stored in names.items()}, names)
    return model


class _Staging:
    """Memory for one stored tensor after another, taken once: what is freed between parameters stays as holes."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def tensor(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor of this shape; the one before it must not be used any more."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if len(self._buffer) < num_bytes:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        return self._buffer[:num_bytes].view(dtype).view(shape)


def _head_name(family: Family, config: ModelConfig) -> str:
    """The stored name of an output head with weights of its own."""
    untied = config.model_copy(update={"tied_embeddings": False})
    return next(one.name for one in family.tensors(untied) if one.parts == ("lm_head.weight",))


def _check_names(
    folder: Path, expected: Iterable[str], stored: Iterable[str], derived: str, *, head: str, is_tied: bool
) -> None:
    missing = set(expected) - set(stored)
    extra = {name for name in set(stored) - set(expected) if not re.fullmatch(derived, name)}
    extra -= {head} if is_tied else set()
    if missing:
        hint = " Is tie_word_embeddings meant to be true?" if missing == {head} else ""
        raise UserError(f"{folder}: the weights lack {some(missing)}, which {CONFIG} asks for.{hint}")
    if extra:
        raise UserError(f"{folder}: the weights have {some(extra)}, which {CONFIG} has no place for")


def _parameters(
    files: StoredTensors,
    name: str,
    stored: Stored,
    model: Transformer,
    device: torch.device,
    dtype: torch.dtype,
    staging: _Staging,
) -> Iterable[tuple[str, Tensor]]:
    """Our parameters that lie in one stored tensor, in memory of their own."""
    ours = [model.get_parameter(part) for part in stored.parts]
    if stored.join == "none" and not stored.is_transposed:
        value = torch.empty(ours[0].shape, dtype=dtype, device=device)
        files.read_into(name, value)
        yield stored.parts[0], value
        return
    tensor = staging.tensor(_joined(stored, ours, model.config.heads).shape, _kept_type(files.dtype(name)))
    files.read_into(name, tensor)
    for part, like, value in zip(stored.parts, ours, _split(stored, tensor, ours, model.config.heads), strict=True):
        out = torch.empty(like.shape, dtype=dtype, device=device)
        yield part, out.copy_(value)


def _kept_type(dtype: torch.dtype) -> torch.dtype:
    """The type to read a stored tensor in: its own, if it is one of floats (others are refused when they are read)."""
    return dtype if dtype.is_floating_point else torch.float32


def _split(stored: Stored, tensor: Tensor, like: list[nn.Parameter], heads: int) -> list[Tensor]:
    """The parts of a stored tensor, each in the layout of ours (views where possible)."""
    tensor = tensor.t() if stored.is_transposed else tensor
    if stored.join == "by_head":
        parts = tensor.unflatten(0, (heads, len(like), -1)).unbind(1)
        return [part.flatten(0, 1) for part in parts]
    return list(tensor.split([part.shape[0] for part in like]))


def _joined(stored: Stored, parts: list[nn.Parameter] | list[Tensor], heads: int) -> Tensor:
    """The stored tensor that our parameters make up; the reverse of `_split`."""
    if stored.join == "by_head":
        tensor = torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)
    else:
        tensor = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return tensor.t() if stored.is_transposed else tensor


def _check_really_tied(files: StoredTensors, name: str, model: Transformer) -> None:
    embedding = model.head_weight.detach()
    head = files.read(name, shape=list(embedding.shape))
    if not torch.equal(head.to(embedding.device, embedding.dtype), embedding):
        raise UserError(
            f"{files.path(name)}: {name} differs from the embedding, though {CONFIG} ties them (tie_word_embeddings)"
        )


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(value))


# Writing


def save_model(
    model: Transformer | TransformersModel,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes the model's files into `folder` (made if absent); other files there are left alone, older weights removed.

    A model that was read from a folder keeps that folder's config.json (but for what changed in the model) and the type
    of each of its tensors; `dtype` stores all in one type instead. `extra_config` are further entries of config.json,
    such as 'eos_token_id' and 'bos_token_id' (null unless given), where the folder that was read has none of that name.
    Raises UserError when the disk is full or the folder cannot be written, and for weights that are too large for the
    type they are stored in.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not isinstance(model, Transformer):
            from perennial.model import through_transformers

            through_transformers.save(model, folder, dtype=dtype, max_shard_bytes=max_shard_bytes)
            return
        _save_native(model, folder, dtype, max_shard_bytes, dict(extra_config or {}))
    except OSError as error:
        raise explain(error, folder) from error


def _save_native(
    model: Transformer, folder: Path, dtype: torch.dtype | None, max_shard_bytes: float, extra: dict[str, Any]
) -> None:
    config, heads = model.config, model.config.heads
    family = plugins.load("families", config.family)()
    wanted = {stored.name: stored for stored in family.tensors(config)}
    shapes = Transformer(config, device="meta")
    parameters = dict(model.named_parameters())
    source = model.source or Source()
    head = _head_name(family, config)
    if config.tied_embeddings and head in source.names:  # stored twice where it was found twice
        wanted[head] = Stored(head, ("model.embed_tokens.weight",))
    spelled = {source.names.get(name, name): stored for name, stored in wanted.items()}
    tensors = {
        name: (
            list(_joined(stored, [shapes.get_parameter(part) for part in stored.parts], heads).shape),
            dtype or _narrower(source.dtypes.get(stored.name), parameters[stored.parts[0]].dtype),
        )
        for name, stored in spelled.items()
    }
    entries = _entries(model, family, dtype, extra)
    write_json(folder / CONFIG, entries)
    special = {key: value for key, value in entries.items() if key.endswith("_token_id")}
    write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **special})
    with torch.no_grad():
        write_tensors(
            folder,
            tensors,
            lambda name: _joined(spelled[name], [parameters[part] for part in spelled[name].parts], heads),
            max_shard_bytes=max_shard_bytes,
        )


def _narrower(stored: torch.dtype | None, present: torch.dtype) -> torch.dtype:
    """The type to store in: as it was found, but never wider than what is there to store."""
    return present if stored is None or stored.itemsize > present.itemsize else stored


def _entries(model: Transformer, family: Family, dtype: torch.dtype | None, extra: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json."""
    config = model.config
    written = family.write(config)
    if model.source is None:
        dtype = dtype or model.head_weight.dtype
        data = {"architectures": [family.architecture], "model_type": config.family, **written, "use_cache": True}
        data |= _dtype_entries(dtype)
        if twice := data.keys() & extra.keys():
            names = ", ".join(sorted(twice))
            raise ValueError(f"extra_config must not give {names}: the model's configuration does")
        return {**data, **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")), **extra}
    found = dict(model.source.entries)
    before = family.write(_config_of(family, found))
    found |= {key: value for key, value in written.items() if key not in before or value != before[key]}
    found |= _dtype_entries(dtype) if dtype else {}
    assert _config_of(family, found) == config, "config.json must say what the model is"
    return {**found, **{key: value for key, value in extra.items() if key not in found}}


def _dtype_entries(dtype: torch.dtype) -> dict[str, str]:
    """The entry of `transformers` 5 and the older one."""
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, "torch_dtype": name}


def _config_of(family: Family, entries: Mapping[str, Any]) -> ModelConfig:
    settings = family.read(Entries(entries, family.defaults))
    return ModelConfig(**{key: value for key, value in settings.items() if value is not None})
