"""Hugging Face model folders in and out: what is written back is what was read, but for what training changed.

A folder of a family in `families`, whose config.json asks for nothing that our transformer does not compute, is read
natively. Every other causal model is run through `transformers` (`through_transformers`). Nothing that would make the
loaded function differ from the stored one is ever ignored, and code that a folder brings is never run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
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
from perennial.model.placement import assign, gathered, is_spread
from perennial.model.storage import MAX_SHARD_BYTES, StoredTensors, share_of, some, write_tensors
from perennial.model.transformer import Source, Transformer

if TYPE_CHECKING:
    from perennial.model.through_transformers import TransformersModel


# Reading


def load_model(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[Transformer | TransformersModel], None] | None = None,
) -> Transformer | TransformersModel:
    """The model in a folder, its weights converted to `dtype` on `device` piece by piece.

    `prepare` may spread the model over processes before its weights are read: a native one while it is on the meta
    device, so that no process ever holds all of it; one through transformers when it is whole.
    Raises UserError for a configuration that is not supported, for missing files, for tensors that are missing, not
    expected or of another shape, and for weights that are not finite.
    """
    found = read_config(folder)
    if isinstance(found.config, ModelConfig):
        model = Transformer(found.config, device="meta", dtype=dtype)
        if prepare is not None:
            prepare(model)
        return _load_native(folder, found, model, torch.device(device), dtype)
    from perennial.model import through_transformers

    through = through_transformers.load(folder, found.config, device=device, dtype=dtype)
    if prepare is not None:
        prepare(through)
    return through


def reload_weights(model: Transformer | TransformersModel, folder: Path, device: torch.device | str) -> None:
    """Puts the weights in a folder, which was written of this same model, in the place of the present ones."""
    found = read_config(folder)
    if isinstance(model, Transformer):
        _load_native(folder, found, model, torch.device(device), next(model.parameters()).dtype)
        return
    present = dict(model.named_parameters())
    for name, parameter in load_model(folder, device=device).named_parameters():
        assign(present[name], parameter)


def _load_native(
    folder: Path, found: FolderConfig, model: Transformer, device: torch.device, dtype: torch.dtype
) -> Transformer:
    """Fills `model`: parameters on the meta device get memory on `device`, others keep theirs."""
    config = found.config
    assert isinstance(config, ModelConfig)
    family = plugins.load("families", config.family)()
    files = StoredTensors.open(folder)
    spelled = {family.spelled(name): name for name in files.names}
    wanted = {one.name: one for one in family.tensors(config)}
    head = _head_name(family, config)
    _check_names(folder, wanted, spelled, family.derived, head=head, is_tied=config.tied_embeddings)
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
    """Our parameters that lie in one stored tensor, in memory of their own unless they have some already."""
    ours = [model.get_parameter(part) for part in stored.parts]
    is_new = ours[0].is_meta
    if stored.join == "none" and not stored.is_transposed and not is_spread(ours[0]):
        value = torch.empty(ours[0].shape, dtype=dtype, device=device) if is_new else ours[0].detach()
        files.read_into(name, value)
        yield stored.parts[0], value
        return
    shapes = [torch.empty(part.shape, device="meta") for part in ours]
    tensor = staging.tensor(_joined(stored, shapes, model.config.heads).shape, _kept_type(files.dtype(name)))
    files.read_into(name, tensor)
    for part, like, value in zip(stored.parts, ours, _split(stored, tensor, ours, model.config.heads), strict=True):
        yield part, torch.empty(like.shape, dtype=dtype, device=device).copy_(value) if is_new else value


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
    embedding = gathered(model.head_weight)
    head = files.read(name, shape=list(embedding.shape))
    if not torch.equal(head.to(embedding.device, embedding.dtype), embedding):
        raise UserError(
            f"{files.path(name)}: {name} differs from the embedding, though {CONFIG} ties them (tie_word_embeddings)"
        )


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Puts `value` into a parameter's memory, or, where it has none yet, makes it the parameter."""
    module, _, leaf = name.rpartition(".")
    parameter = model.get_parameter(name)
    if parameter.is_meta:
        setattr(model.get_submodule(module), leaf, nn.Parameter(value))
    elif parameter.data_ptr() != value.data_ptr():
        assign(parameter, value)


# Writing


@dataclass(frozen=True)
class FolderContent:
    """What a model's folder will hold, the weights as a recipe for making them from the model's present parameters."""

    tensors: dict[str, tuple[list[int], torch.dtype]]
    """Shape and stored type of each tensor, by its name in the folder."""
    get: Callable[[str], Tensor]
    """Makes a tensor; where the model is spread over processes, all of them have to ask for it."""
    documents: dict[str, Any]
    """The JSON files."""

    def held(self, *, max_shard_bytes: float, process: int, processes: int, copies: bool) -> FolderContent:
        """The same with those tensors in memory that this process is to write; nobody asks for them later.

        `copies`: in memory of their own, whatever becomes of the model.
        """
        mine = share_of(self.tensors, max_shard_bytes, process, processes)
        ready = {}
        for name in self.tensors:
            tensor = self.get(name)
            if name in mine:
                stored = tensor.detach().to("cpu")
                ready[name] = stored.clone() if copies and stored.data_ptr() == tensor.data_ptr() else stored
        return replace(self, get=ready.__getitem__)

    def write(
        self, folder: Path, *, max_shard_bytes: float = MAX_SHARD_BYTES, process: int = 0, processes: int = 1
    ) -> None:
        """Writes the files, or one process's share of them. Raises OSError, and UserError as `write_tensors` does."""
        if process == 0:
            for file, content in self.documents.items():
                write_json(folder / file, content)
        with torch.no_grad():
            write_tensors(
                folder,
                self.tensors,
                self.get,
                max_shard_bytes=max_shard_bytes,
                process=process,
                processes=processes,
            )


def folder_content(
    model: Transformer | TransformersModel,
    *,
    dtype: torch.dtype | None = None,
    extra_config: Mapping[str, Any] | None = None,
) -> FolderContent:
    """What `save_model` writes."""
    if not isinstance(model, Transformer):
        from perennial.model import through_transformers

        tensors, get, documents = through_transformers.folder_content(model, dtype=dtype)
        return FolderContent(tensors, get, documents)
    return _native_content(model, dtype, dict(extra_config or {}))


def save_model(
    model: Transformer | TransformersModel,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
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
        folder_content(model, dtype=dtype, extra_config=extra_config).write(folder, max_shard_bytes=max_shard_bytes)
    except OSError as error:
        raise explain(error, folder) from error


def _native_content(model: Transformer, dtype: torch.dtype | None, extra: dict[str, Any]) -> FolderContent:
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
    special = {key: value for key, value in entries.items() if key.endswith("_token_id")}
    return FolderContent(
        tensors,
        lambda name: _joined(spelled[name], [gathered(parameters[part]) for part in spelled[name].parts], heads),
        {CONFIG: entries, GENERATION_CONFIG: {"_from_model_config": True, **special}},
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
