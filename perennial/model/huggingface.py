"""Hugging Face model folders in and out: config.json, generation_config.json, model.safetensors or its shards.

A model without QK-norm is a `LlamaForCausalLM`, one with it a `Qwen3ForCausalLM`, so `transformers`, vLLM and
llama.cpp open what is written here as it is. In the other direction, whatever would make the loaded function differ
from the stored one (scaled rotary positions, biases, sliding windows, quantised weights, code of its own) is refused
by name, never ignored. Only safetensors are read: unlike pickles they cannot run code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from perennial.core.errors import UserError, nearest
from perennial.core.files import explain, read_json, write_json
from perennial.core.settings import Problem, check, raise_problems
from perennial.model.config import ModelConfig
from perennial.model.transformer import Transformer

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Family:
    """A model type of transformers, and the values it assumes for what its config.json leaves out."""

    model_type: str
    architecture: str
    defaults: dict[str, Any]


_COMMON = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "initializer_range": 0.02}
_LLAMA = _Family("llama", "LlamaForCausalLM", {**_COMMON, "max_position_embeddings": 2048})
_QWEN3 = _Family("qwen3", "Qwen3ForCausalLM", {**_COMMON, "max_position_embeddings": 32768, "head_dim": 128})
_FAMILIES = {family.model_type: family for family in (_LLAMA, _QWEN3)}

_KEYS = {
    "vocabulary_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "mlp_width": "intermediate_size",
    "context": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "initial_std": "initializer_range",
}
"""Our field: theirs."""

_READABLE = ("F64", "F32", "BF16", "F16")
_DERIVED = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")
"""Old folders store these; they follow from rope_theta."""


# Writing


def save_model(
    model: Transformer,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes the model's files into `folder` (made if absent); other files there are left alone, older weights removed.

    `dtype` None keeps the model's. `extra_config` are further entries of config.json, such as 'eos_token_id' and
    'bos_token_id' (null unless given). Raises UserError when the disk is full or the folder cannot be written.
    """
    tensors = model.state_dict()
    dtype = dtype or next(iter(tensors.values())).dtype
    shards = _in_shards({name: tensor.numel() * dtype.itemsize for name, tensor in tensors.items()}, max_shard_bytes)
    config = _to_json(model.config, dtype, dict(extra_config or {}))
    special = {key: value for key, value in config.items() if key.endswith("_token_id")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
            old.unlink(missing_ok=True)
        write_json(folder / CONFIG, config)
        write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **special})
        for file, names in shards.items():
            _write_shard(folder / file, {name: tensors[name] for name in names}, dtype)
            # safetensors makes files that only their owner can read; give them the rights of any other new file
            (folder / file).chmod((folder / CONFIG).stat().st_mode & 0o777)
        if len(shards) > 1:
            size = sum(tensor.numel() for tensor in tensors.values())
            where = {name: file for file, names in shards.items() for name in names}
            metadata = {"total_parameters": size, "total_size": size * dtype.itemsize}
            write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(where.items()))})
    except OSError as error:
        raise explain(error, folder) from error


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


def _write_shard(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    ready = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(ready, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _to_json(config: ModelConfig, dtype: torch.dtype, extra: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json."""
    family = _QWEN3 if config.qk_norm else _LLAMA
    data: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{theirs: getattr(config, ours) for ours, theirs in _KEYS.items()},
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # where transformers before 5 and other readers look
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),  # as above
    }
    if config.qk_norm:
        data |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.layers}
    else:
        data |= {"mlp_bias": False}
    if twice := data.keys() & extra.keys():
        raise ValueError(f"extra_config must not give {', '.join(sorted(twice))}: the model's configuration does")
    return {**data, "bos_token_id": None, "eos_token_id": None, **extra}


# Reading


def load_config(folder: Path) -> ModelConfig:
    """The shape of the model in a folder. Raises UserError that lists everything that is not supported or not valid."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    data = read_json(path, "model configuration")
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a JSON object, not {type(data).__name__}")
    if problems := _unsupported(data):
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"{path}: this model is not supported:\n{lines}")
    family = _FAMILIES[data["model_type"]]
    given = {key: value for key, value in data.items() if value is not None}
    values = {ours: {**family.defaults, **given}.get(theirs) for ours, theirs in _KEYS.items()}
    settings = {key: value for key, value in values.items() if value is not None}
    settings |= {"rope_theta": _rope_theta(data), "qk_norm": family is _QWEN3}
    config, wrong = check(ModelConfig, settings)
    raise_problems([Problem(tuple(_KEYS.get(str(at), at) for at in p.loc), p.message) for p in wrong], str(path))
    assert config is not None
    return config


def _rotary(data: Mapping[str, Any]) -> Any:
    """The entry that holds rotary settings: transformers 5's, or the older one."""
    return data.get("rope_parameters") or data.get("rope_scaling") or {}


def _rope_theta(data: Mapping[str, Any]) -> Any:
    return _rotary(data).get("rope_theta") or data.get("rope_theta") or 10_000.0


def _unsupported(data: Mapping[str, Any]) -> list[str]:
    """What in a config.json asks for a function that this network does not compute, in words."""
    model_type = str(data.get("model_type"))
    if model_type not in _FAMILIES:
        return [f"model_type {model_type!r}; supported: {', '.join(_FAMILIES)}.{nearest(model_type, _FAMILIES)}"]
    found = []
    architecture = _FAMILIES[model_type].architecture
    if data.get("architectures") not in (None, [architecture]):
        found.append(f"architectures {data['architectures']!r}; supported for {model_type}: ['{architecture}']")
    if data.get("auto_map"):
        found.append("auto_map: the folder brings code of its own, which is not run")
    for key in ("quantization_config", "compression_config"):
        if data.get(key):
            found.append(f"{key}: quantised weights; give the folder they were made from")
    for key in ("attention_bias", "mlp_bias", "attention_dropout"):
        if data.get(key):
            found.append(f"{key} {data[key]!r}; supported: {'0.0' if key == 'attention_dropout' else 'false'}")
    if data.get("hidden_act", "silu") not in ("silu", "swish"):
        found.append(f"hidden_act {data['hidden_act']!r}; supported: 'silu'")
    return found + _unsupported_positions(data) + _unsupported_windows(data)


def _unsupported_positions(data: Mapping[str, Any]) -> list[str]:
    rotary = _rotary(data)
    name = "rope_parameters" if data.get("rope_parameters") else "rope_scaling"
    if not isinstance(rotary, Mapping):
        return [f"{name} {rotary!r}; supported: plain rotary positions (rope_type 'default')"]
    kind = rotary.get("rope_type") or rotary.get("type") or "default"
    if kind != "default":
        return [f"{name} of type {kind!r}; supported: plain rotary positions (rope_type 'default')"]
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    found = [f"{name}.{key}" for key in sorted(rotary.keys() - known)]
    share = rotary.get("partial_rotary_factor", data.get("partial_rotary_factor")) or 1.0
    return found + ([f"partial_rotary_factor {share!r}; supported: 1.0"] if share != 1.0 else [])


def _unsupported_windows(data: Mapping[str, Any]) -> list[str]:
    """Attention limited to a window, where a layer really uses it. Llama has none, whatever its config says."""
    if data["model_type"] != _QWEN3.model_type:
        return []
    if layer_types := data.get("layer_types"):
        kinds = layer_types if isinstance(layer_types, list) else [layer_types]
        other = sorted({str(kind) for kind in kinds} - {"full_attention"})
        return [f"layer_types with {', '.join(other)}; supported: full_attention"] if other else []
    if not data.get("use_sliding_window"):
        return []
    window, first = data.get("sliding_window", 4096), data.get("max_window_layers", 28)
    layers = data.get("num_hidden_layers")
    if window is None or (isinstance(first, int) and isinstance(layers, int) and first >= layers):
        return []
    return [f"use_sliding_window with a window of {window} from layer {first} on; supported: full attention"]


def load_model(folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Transformer:
    """The model in a folder, its weights converted to `dtype` on `device` one tensor at a time.

    Raises UserError for a configuration that is not supported, for missing files, for tensors that are missing, not
    expected or of another shape, and for weights that are not finite.
    """
    config = load_config(folder)
    model = Transformer(config, device="meta", dtype=dtype)
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    files = _files_by_tensor(folder)
    _check_names(folder, expected.keys(), files.keys(), tied=config.tied_embeddings)
    for path in sorted(set(files.values())):
        with _opened(path) as tensors:
            for name in sorted(name for name in expected if files[name] == path):
                stored = _read(tensors, path, name, expected[name])
                _set_parameter(model, name, stored.to(device=device, dtype=dtype, copy=True))
    if config.tied_embeddings and "lm_head.weight" in files:
        _check_really_tied(model, files["lm_head.weight"], expected["model.embed_tokens.weight"])
    return model


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    """Where each stored tensor is, from the single file or the index. Raises UserError when the index is wrong."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():
        with _opened(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)
    if not index.is_file():
        pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pth")) + sorted(folder.glob("*.pt"))
        hint = f" Pickled weights ({pickles[0].name}) are not read: convert them to safetensors." if pickles else ""
        raise UserError(f"{folder}: no weights: neither {WEIGHTS} nor {INDEX} is there.{hint}")
    content = read_json(index, "index of weights")
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(f"{index}: must have a 'weight_map' from tensor names to file names")
    for file in sorted(set(listed.values())):
        _check_shard(folder, file, {name for name, its_file in listed.items() if its_file == file})
    return {name: folder / file for name, file in listed.items()}


def _check_shard(folder: Path, file: str, listed: set[str]) -> None:
    path = folder / file
    if Path(file).name != file or path.suffix != ".safetensors":
        raise UserError(f"{folder / INDEX}: {file!r} is not the name of a safetensors file in this folder")
    if not path.is_file():
        raise UserError(f"{folder}: {file} is missing; {INDEX} lists {len(listed)} tensors in it")
    with _opened(path) as tensors:
        present = set(tensors.keys())
    if absent := listed - present:
        raise UserError(f"{folder / INDEX}: lists {_some(absent)} in {file}, which does not have it")
    if unlisted := present - listed:
        raise UserError(f"{folder / INDEX}: does not list {_some(unlisted)}, which is in {file}")


def _check_names(folder: Path, expected: Iterable[str], stored: Iterable[str], *, tied: bool) -> None:
    missing = set(expected) - set(stored)
    extra = {name for name in set(stored) - set(expected) if not _DERIVED.fullmatch(name)}
    if tied:
        extra -= {"lm_head.weight"}
    if missing:
        hint = " Is tie_word_embeddings meant to be true?" if missing == {"lm_head.weight"} else ""
        raise UserError(f"{folder}: the weights lack {_some(missing)}, which {CONFIG} asks for.{hint}")
    if extra:
        raise UserError(f"{folder}: the weights have {_some(extra)}, which {CONFIG} has no place for")


def _check_really_tied(model: Transformer, path: Path, shape: list[int]) -> None:
    with _opened(path) as tensors:
        head = _read(tensors, path, "lm_head.weight", shape)
    embedding = model.head_weight
    if not torch.equal(head.to(embedding.device, embedding.dtype), embedding.detach()):
        raise UserError(
            f"{path}: lm_head.weight differs from the embedding, though {CONFIG} ties them (tie_word_embeddings)"
        )


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from None


def _read(tensors: Any, path: Path, name: str, shape: list[int]) -> Tensor:
    """A stored tensor, checked for its shape and type before it is read, and for NaN and infinity after."""
    header = tensors.get_slice(name)
    if header.get_shape() != shape:
        raise UserError(f"{path}: {name} has shape {header.get_shape()}, but {CONFIG} asks for {shape}")
    if header.get_dtype() not in _READABLE:
        raise UserError(f"{path}: {name} is stored as {header.get_dtype()}; supported: {', '.join(_READABLE)}")
    tensor: Tensor = tensors.get_tensor(name)
    if not bool(torch.isfinite(tensor).all()):
        number = int((~torch.isfinite(tensor)).sum())
        raise UserError(f"{path}: {name} has {number} of {tensor.numel()} weights that are NaN or infinite")
    return tensor


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(value))


def _some(names: Iterable[str]) -> str:
    """The first three names, and how many more."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more
