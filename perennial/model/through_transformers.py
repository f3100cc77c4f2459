"""Every causal architecture that `transformers` knows and the network here does not, run through `transformers`.

The model offers what the native one does, so that the same loop trains it, and the folder is read and written in its
own format: the same tensors, names and types, and config.json as it was.

Limits: dropout stays off, as in native models; attention crosses documents within a row; the router's auxiliary
losses of a mixture of experts are not added to the loss; what a model does besides reading tokens (images, sound) is
left as it is. Code that a folder brings is never run, and `huggingface` refuses such folders before they come here.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perennial.core.errors import UserError, nearest
from perennial.core.files import read_json, write_json
from perennial.model.folder_config import GENERATION_CONFIG
from perennial.model.foreign import TransformersConfig, check_document_mask, check_rows
from perennial.model.inspection import raw_config
from perennial.model.placement import gathered
from perennial.model.storage import StoredTensors, some
from perennial.model.transformer import Source, Transformer

CONFIG = "config.json"

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "context_length")
_EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_EXPERTS_PER_TOKEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k")

_DERIVED = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|(attn|attention)\.bias|masked_bias|causal_mask)$"
)
"""Old folders store these; they follow from the configuration, and `transformers` makes them anew."""
_OTHER_ATTENTION = re.compile("linear|lightning|cross", re.IGNORECASE)
"""Attention whose cost does not grow with the length of the row, or that looks at something else."""

_PROBE_TOKENS = 12


# The model


class TransformersModel(nn.Module):
    """A model of `transformers` behind the face of the native one.

    `network` is the model of `transformers`. It stays in evaluation mode, whatever mode this module is in: that is
    what switches off dropout of every kind, noise in routers and skipped layers. `source` is the folder that it was
    read from: its config.json, and which tensors it has, by the names used there, in what types.
    """

    def __init__(
        self,
        network: Any,
        config: TransformersConfig,
        source: Source,
        *,
        has_plain_head: bool,
        generation_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.source = source
        self.generation_config = generation_config
        self._has_plain_head = has_plain_head
        self._options = _options(network.base_model if has_plain_head else network)
        self._roles = {f"network.{name}": role for name, role in parameter_roles(network).items()}
        self.train(self.training)

    def train(self, mode: bool = True) -> TransformersModel:
        """Sets the mode of this module only: the network's would switch dropout on."""
        super().train(mode)
        self.network.eval()
        return self

    @property
    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """The type of each tensor in the folder that the model was read from."""
        return self.source.dtypes

    def role_of(self, name: str) -> str:
        """The role of the parameter of this name. Raises ValueError for a name that is none of them."""
        if name not in self._roles:
            raise ValueError(f"parameter '{name}' has no role: the model has no such parameter")
        return self._roles[name]

    def forward(self, inputs_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) after the last norm, or logits (B, T, V) where `head_weight` is None.

        `inputs_BT` int64. Raises UserError for a row longer than the context and for `segments_BT` other than None.
        """
        check_document_mask(self.config, segments_BT is not None)
        check_rows(self.config, inputs_BT.shape[1], "a row of")
        if self._has_plain_head:
            return self.network.base_model(input_ids=inputs_BT, **self._options).last_hidden_state
        return self.network(input_ids=inputs_BT, **self._options).logits

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token (..., V), unnormalised, from what `forward` returns."""
        weight = self.head_weight
        return hidden if weight is None else F.linear(hidden, weight)

    @property
    def head_weight(self) -> Tensor | None:
        """The (V, D) weight of the output head; None where the logits are not its product with the hidden states."""
        return self.network.get_output_embeddings().weight if self._has_plain_head else None


AnyModel = Transformer | TransformersModel
"""What the loop trains."""


def _options(network: Any) -> dict[str, Any]:
    """No cache of keys and values, and named results: of these, what the network's `forward` takes."""
    taken = inspect.signature(network.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    return {k: v for k, v in {"use_cache": False, "return_dict": True}.items() if takes_any or k in taken}


# Roles


def parameter_roles(network: Any) -> dict[str, str]:
    """The role of each parameter of a model of `transformers` (see `optimizers.base.ROLES`), by its name.

    Tables that are looked up, those of positions too, are 'embedding'; what is stacked in more than two dimensions is
    'stack'; 'matrix' is only what a linear layer or a router multiplies by. Everything else, which acts channel by
    channel or in a way not known here, is 'norm', so that it is neither decayed nor orthogonalised by default.
    """
    embedding = network.get_input_embeddings()
    head = network.get_output_embeddings()
    found: dict[str, str] = {}
    for name, parameter in network.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if parameter is getattr(embedding, "weight", None):
            found[name] = "embedding"
        elif parameter is getattr(head, "weight", None):
            found[name] = "head"
        else:
            found[name] = _role(network.get_submodule(owner), leaf, parameter)
    return found


def _role(module: nn.Module, leaf: str, parameter: nn.Parameter) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embedding"
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    if _is_linear(module) and leaf == "weight":
        return "matrix"
    if "norm" in kind.lower() or sum(size > 1 for size in parameter.shape) < 2:
        return "norm"
    if parameter.ndim > 2:
        return "stack"
    return "matrix" if leaf.endswith(("weight", "proj")) else "norm"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's name for a linear layer


# Configuration


def read_config(folder: Path, why: str) -> TransformersConfig:
    """What is known of the model in a folder; `why` says in words why it is not native. Reads no weights.

    Raises UserError when `transformers` is not there, does not know the configuration or cannot make the model, and for
    one that is not a causal language model.
    """
    settings = raw_config(folder)
    hub_config = _hub_config(folder, settings)
    return _describe(_on_meta(folder, hub_config), hub_config, settings, why)


def _hub_config(folder: Path, settings: Mapping[str, Any]) -> Any:
    """The configuration as an object of `transformers`, checked to be that of a causal language model."""
    path, model_type = folder / CONFIG, settings.get("model_type")
    transformers = _transformers(str(model_type))
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    if not isinstance(model_type, str) or model_type not in known:
        version = transformers.__version__
        raise UserError(
            f"{path}: model_type {model_type!r} is not an architecture that transformers {version} knows."
            f"{nearest(str(model_type), names)}"
        )
    if model_type not in names:
        raise UserError(
            f"{path}: model_type '{model_type}' is not a causal language model.{nearest(model_type, names)}"
        )
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds, the library's own among them
        raise UserError(f"{path}: transformers does not accept this configuration: {_in_a_line(error)}") from None
    _check_causal(path, config, settings)
    return config


def _check_causal(path: Path, config: Any, settings: Mapping[str, Any]) -> None:
    """Raises UserError for a configuration of an encoder, an encoder-decoder or another kind of head."""
    from transformers.models.auto import modeling_auto

    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{path}: an encoder-decoder ({config.model_type}) is not a causal language model")
    is_masked = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_masked and not getattr(config, "is_decoder", False):
        raise UserError(
            f"{path}: this {config.model_type} looks at the future (is_decoder is not true): it is not a causal "
            "language model"
        )
    known = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    expected = (known,) if isinstance(known, str) else tuple(known)
    given = settings.get("architectures") or [*expected]
    if not any(name in expected or str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in given):
        raise UserError(f"{path}: architectures {given!r} is not a causal language model; expected: {expected[0]!r}")


def _on_meta(folder: Path, hub_config: Any) -> Any:
    """The network without memory for its weights, to count them."""
    import transformers

    try:
        with _quiet(), torch.device("meta"):
            network = transformers.AutoModelForCausalLM.from_config(hub_config, dtype=torch.float32)
        has_table = isinstance(getattr(network.get_input_embeddings(), "weight", None), Tensor)
    except Exception as error:  # a configuration can be wrong in ways that only making the model shows
        raise UserError(f"{folder / CONFIG}: transformers cannot make this model: {_in_a_line(error)}") from None
    if not has_table:
        raise UserError(f"{folder / CONFIG}: {type(network).__name__} has no table of token embeddings to go by")
    return network


def _describe(network: Any, hub_config: Any, settings: Mapping[str, Any], why: str) -> TransformersConfig:
    text = hub_config.get_text_config(decoder=True)
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    heads = _positive(text, "num_attention_heads", "num_heads")
    width = _positive(text, "hidden_size", "d_model") or embedding.weight.shape[-1]
    layers = _positive(text, "num_hidden_layers") or 1
    attention_layers = min(_attention_layers(network), layers) if heads else 0
    rows = [module.weight.shape[0] for module in (embedding, head) if hasattr(module, "weight")]
    experts, expert_parameters = _experts(network, text)
    roles: dict[str, int] = {}
    for (_, parameter), role in zip(network.named_parameters(), parameter_roles(network).values(), strict=True):
        roles[role] = roles.get(role, 0) + parameter.numel()
    return TransformersConfig(
        why=why,
        model_type=hub_config.model_type,
        architecture=type(network).__name__,
        vocabulary_size=min(rows),
        context=_context(network, text),
        width=width,
        layers=layers,
        heads=heads if attention_layers else None,
        head_width=(_positive(text, "head_dim") or width // heads) if heads and attention_layers else None,
        attention_layers=attention_layers,
        tied_embeddings=_is_tied(network),
        parameters_by_role=roles,
        head_parameters=head.weight.numel() if head is not None else 0,
        experts=experts,
        experts_per_token=_positive(text, *_EXPERTS_PER_TOKEN_KEYS) if experts else None,
        expert_parameters=expert_parameters,
        settings=_with_finite_numbers(settings),
    )


def _is_tied(network: Any) -> bool:
    head = network.get_output_embeddings()
    return head is not None and head.weight is network.get_input_embeddings().weight


def _positive(config: Any, *names: str) -> int | None:
    """The first of these entries that is a positive whole number."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # where layers differ in it, `transformers` refuses to give one number
            continue
        if type(value) is int and value > 0:
            return value
    return None


def _context(network: Any, text: Any) -> int | None:
    """Longest row: what the configuration says, less the positions that RoBERTa's kind counts past its padding id."""
    context = _positive(text, *_CONTEXT_KEYS)
    for module in network.modules():
        is_table = isinstance(module, nn.Embedding) and module is not network.get_input_embeddings()
        if is_table and module.num_embeddings == context and module.padding_idx is not None:
            return context - module.padding_idx - 1
    return context


def _attention_layers(network: Any) -> int:
    """Layers whose attention looks at the row: the innermost modules of that name."""
    found = {name for name, module in network.named_modules() if "Attention" in type(module).__name__}
    outer = {name[:end] for name in found for end in (place.start() for place in re.finditer(r"\.", name))}
    return sum(not _OTHER_ATTENTION.search(type(network.get_submodule(name)).__name__) for name in found - outer)


def _experts(network: Any, text: Any) -> tuple[int | None, int]:
    """(experts per layer, parameters of all of them); (None, 0) where there are none."""
    number = _positive(text, *_EXPERTS_KEYS)
    if number is None or number == 1:
        return None, 0
    parameters = 0
    for name, parameter in network.named_parameters():
        owner = name.rpartition(".")[0]
        path = [type(network.get_submodule(owner)).__name__, *name.split(".")]
        parameters += parameter.numel() if any(re.search(r"(?<!shared_)experts?$", part, re.I) for part in path) else 0
    return (number, parameters) if parameters else (None, 0)


def _with_finite_numbers(value: Any) -> Any:
    """JSON has no infinity: it is written the way `transformers` does, so that it reads it again."""
    if isinstance(value, dict):
        return {key: _with_finite_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_finite_numbers(inner) for inner in value]
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return value


# Reading


def load(
    folder: Path,
    config: TransformersConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TransformersModel:
    """The model in a folder, of which `read_config` gave `config`; its weights converted to `dtype` on `device`.

    Raises UserError for files and tensors that are missing, not expected or of another shape; for weights that are not
    finite; and for a network that looks at the future or cannot be run on tokens alone.
    """
    settings = raw_config(folder)
    hub_config = _hub_config(folder, settings)
    stored = StoredTensors.open(folder)
    dtypes = {name: stored.dtype(name) for name in stored.names}
    network, info = _from_pretrained(folder, hub_config, dtype, stored)
    _check_names(folder, network, stored, info["missing_keys"])
    _check_shapes(folder, info["mismatched_keys"])
    _check_finite(folder, network)
    _check_tied(folder, network, hub_config)
    network.to(device)
    generation = folder / GENERATION_CONFIG
    return TransformersModel(
        network,
        config,
        Source(settings, {name: dtypes[name] for name in _matched(network, layout(network), stored.names)}),
        has_plain_head=_probe(network, config, str(folder)),
        generation_config=read_json(generation) if generation.is_file() else None,
    )


def from_config(config: TransformersConfig, *, device: torch.device | str = "cpu") -> TransformersModel:
    """The model of a configuration with weights drawn at random, in fp32: to measure what it costs."""
    transformers = _transformers(config.model_type)
    with tempfile.TemporaryDirectory() as folder:  # entries mean what they mean in a file, old spellings included
        write_json(Path(folder) / CONFIG, config.settings)
        hub_config = _hub_config(Path(folder), config.settings)
    with _quiet(), torch.device(device):
        network = transformers.AutoModelForCausalLM.from_config(hub_config, dtype=torch.float32)
    plain = _probe(network, config, "a model of random weights")
    return TransformersModel(network, config, Source(config.settings, layout(network)), has_plain_head=plain)


def _from_pretrained(folder: Path, hub_config: Any, dtype: torch.dtype, stored: StoredTensors) -> tuple[Any, Any]:
    """The network, and what `transformers` says of reading it."""
    import transformers

    try:
        with _quiet():
            auto: Any = transformers.AutoModelForCausalLM
            return auto.from_pretrained(
                folder,
                config=hub_config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are refused below, all at once
                output_loading_info=True,
            )
    except MemoryError:
        raise
    except Exception as error:
        _check_names(folder, _on_meta(folder, hub_config), stored, set())  # the usual cause, which it does not name
        raise UserError(f"{folder}: transformers cannot load this model: {_in_a_line(error)}") from None


def _check_names(folder: Path, network: Any, stored: StoredTensors, missed: set[str]) -> None:
    """Raises UserError unless every tensor of the network is stored and every stored one has a place.

    `transformers` draws at random what is missing and drops what it has no place for; `missed` is what it says of that.
    """
    own = layout(network)
    matched = _matched(network, own, stored.names)
    found = set(matched.values())
    twins = {twin for group in _twins(network) if group & found for twin in group}
    if missing := own.keys() - found - twins - _derivable(network, missed):
        hint = " Is tie_word_embeddings meant to be true?" if missing == {"lm_head.weight"} else ""
        raise UserError(f"{folder}: the weights lack {some(missing)}, which {CONFIG} asks for.{hint}")
    if extra := {name for name in set(stored.names) - matched.keys() if not _DERIVED.search(name)}:
        raise UserError(f"{folder}: the weights have {some(extra)}, which transformers has no place for")


def _derivable(network: Any, missing: set[str]) -> set[str]:
    """Stored names of buffers that a folder may lack: those that `transformers` itself does not miss."""
    buffers = {name: buffer for name, buffer in network.named_buffers() if name in network.state_dict()}
    return set(_stored_names(network, {name: buffer for name, buffer in buffers.items() if name not in missing}))


def layout(network: Any) -> dict[str, torch.dtype]:
    """Names and types of all tensors that the network would be stored as, shared ones under each of their names."""
    return {name: tensor.dtype for name, tensor in _stored_names(network, network.state_dict()).items()}


def _stored_names(network: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names, and in the shapes, that the network's folder has them in."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(network, dict(tensors))


def _matched(network: Any, own: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Which of the network's stored names (`own`) a folder's `names` are: some leave the body's prefix out."""
    prefix, left = f"{network.base_model_prefix}.", set(own)
    found: dict[str, str] = {}
    for spelled in (str, lambda name: prefix + name, lambda name: name.removeprefix(prefix)):
        for name in names:
            if name not in found and spelled(name) in left:
                found[name] = spelled(name)
                left.remove(found[name])
    return found


def _twins(network: Any) -> list[set[str]]:
    """Groups of stored names that stand for one shared tensor."""
    state = network.state_dict(keep_vars=True)
    groups: dict[int, set[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), set()).add(name)
    shared = [names for names in groups.values() if len(names) > 1]
    return [set(_stored_names(network, {name: state[name] for name in names})) for names in shared]


def _check_shapes(folder: Path, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    for name, given, expected in sorted(mismatched):
        raise UserError(f"{folder}: {name} has shape {list(given)}, but {CONFIG} asks for {list(expected)}")


def _check_finite(folder: Path, network: Any) -> None:
    tensors = network.state_dict()
    if all(bool(torch.isfinite(tensor.sum())) for tensor in tensors.values() if tensor.is_floating_point()):
        return
    for name, tensor in _stored_names(network, tensors).items():
        if number := int((~torch.isfinite(tensor)).sum()):
            raise UserError(f"{folder}: {name} has {number} of {tensor.numel()} weights that are NaN or infinite")


def _check_tied(folder: Path, network: Any, hub_config: Any) -> None:
    """Raises UserError for a head that is stored beside the embedding and differs, though the two are to be one."""
    if _is_tied(_on_meta(folder, hub_config)) and not _is_tied(network):
        raise UserError(
            f"{folder}: the head differs from the embedding, though {CONFIG} ties them (tie_word_embeddings)"
        )


# What is measured, because no name tells it


@torch.no_grad()
def _probe(network: Any, config: TransformersConfig, name: str) -> bool:
    """Runs the network on a few tokens; True when its logits are one product with the last hidden states.

    Raises UserError when it cannot be run on tokens alone, gives no finite logits, looks at the future, or changes its
    weights as it runs.
    """
    network.eval()
    device = network.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    length = min(_PROBE_TOKENS, config.context or _PROBE_TOKENS)
    inputs = torch.randint(config.vocabulary_size, (2, length), generator=generator).to(device)
    versions = [parameter._version for parameter in network.parameters()]
    past = slice(0, length // 2)
    other = torch.cat((inputs[:, past], (inputs[:, length // 2 :] + 1) % config.vocabulary_size), dim=1)
    try:
        logits, changed = (network(input_ids=ids, **_options(network)).logits for ids in (inputs, other))
    except Exception as error:
        raise UserError(f"{name}: {config.architecture} cannot be run on tokens alone: {_in_a_line(error)}") from None
    if versions != [parameter._version for parameter in network.parameters()]:
        raise UserError(f"{name}: {config.architecture} changes its own weights as it runs; it cannot be trained here")
    if not bool(torch.isfinite(logits).all()):
        raise UserError(f"{name}: {config.architecture} gives logits that are NaN or infinite")
    if not _is_close(logits[:, past], changed[:, past], 1e-2):
        raise UserError(f"{name}: {config.architecture} looks at the future: it is not a causal language model")
    return _has_plain_head(network, inputs)


def _has_plain_head(network: Any, inputs_BT: Tensor) -> bool:
    """Whether the logits are `last hidden states @ head weight.T` and nothing else.

    What the head sees is made as large as logits of 1000 need, so that a cap shows however small the weights are.
    """
    head, body = network.get_output_embeddings(), network.base_model
    if head is None or body is network or not _is_linear(head) or getattr(head, "bias", None) is not None:
        return False
    inside = {id(parameter) for parameter in (*body.parameters(), head.weight)}
    if any(id(parameter) not in inside for parameter in network.parameters()):
        return False
    seen: list[Tensor] = []

    def enlarge(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        factor = 1000 / F.linear(given[0], head.weight).abs().max().float().clamp(min=1e-6)
        seen.extend((given[0], (given[0] * factor).to(given[0].dtype)))
        return (seen[-1], *given[1:])

    hook = head.register_forward_pre_hook(enlarge)
    try:
        logits = network(input_ids=inputs_BT, **_options(network)).logits
    finally:
        hook.remove()
    hidden = getattr(body(input_ids=inputs_BT, **_options(body)), "last_hidden_state", None)
    if len(seen) != 2 or hidden is None:
        return False
    return _is_close(hidden, seen[0], 1e-3) and _is_close(logits, F.linear(seen[1], head.weight), 1e-3)


def _is_close(one: Tensor, other: Tensor, share: float) -> bool:
    """Whether no difference is above `share` of the median size (20% where one was rounded to 16 bits)."""
    if min(one.dtype.itemsize, other.dtype.itemsize) < 4:
        share = 0.2
    one, other = one.float(), other.float()
    return one.shape == other.shape and bool((one - other).abs().max() <= share * other.abs().median())


# Writing


def folder_content(
    model: TransformersModel, *, dtype: torch.dtype | None = None
) -> tuple[dict[str, tuple[list[int], torch.dtype]], Callable[[str], Tensor], dict[str, Any]]:
    """Weights and config.json as the folder that the model was read from has them, in the same types.

    Shape and type of each tensor, what makes it, and the JSON files. `dtype` stores all floats in one type instead.
    """
    tensors = _stored_names(model.network, model.network.state_dict())
    own = _matched(model.network, tensors, model.stored_dtypes)
    entries = dict(model.source.entries)
    types = model.stored_dtypes
    if dtype is not None:
        types = {name: dtype if found.is_floating_point else found for name, found in types.items()}
        entries |= dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    wanted = {name: (list(tensors[own[name]].shape), found) for name, found in types.items()}
    documents: dict[str, Any] = {CONFIG: entries}
    if model.generation_config is not None:
        documents[GENERATION_CONFIG] = model.generation_config
    return wanted, lambda name: gathered(tensors[own[name]]), documents


# Getting along with the library


def _transformers(model_type: str) -> Any:
    needed = f"model_type '{model_type}' is not native and needs the package transformers"
    try:
        import transformers
    except ImportError:
        raise UserError(f"{needed}: pip install 'perennial[hf]'") from None
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise UserError(f"{needed} from version 5 on, not {transformers.__version__}: pip install -U transformers")
    return transformers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own bars and advice: what matters of it is checked here and said in one message."""
    from transformers.utils import logging

    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
