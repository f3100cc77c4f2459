"""What a family is: a model type's config.json and tensor names, translated both ways.

A family's file is named after its `model_type`. It says nothing about how the model is computed: that is the one
transformer of `perennial.model.transformer`, described by `ModelConfig`. What a config.json asks for and that
transformer does not compute is collected by name, and the model then runs through `transformers` instead.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from perennial.core.settings import Settings

if TYPE_CHECKING:
    from perennial.model.config import ModelConfig


class Entries:
    """The entries of a config.json while a family reads them; collects what is not supported, and remarks."""

    def __init__(self, data: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._values = {**defaults, **data}
        self.problems: list[str] = []
        """What this program's transformer does not compute, in words."""
        self.notes: list[str] = []
        """What a user should know about the way it is trained."""

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or what `transformers` assumes where the file leaves it out; `default` for null."""
        value = self._values.get(key)
        return default if value is None else value

    def has(self, key: str) -> bool:
        """Whether the key is there, be it null."""
        return key in self._values

    def only(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Notes a problem when the key is there with another value than these."""
        value = self.get(key)
        if value is not None and value not in allowed:
            self.problems.append(f"{key} {value!r}; supported: {' or '.join(map(repr, allowed))}")

    def note_dropout(self, *keys: str) -> None:
        """Notes probabilities of dropout above zero, with which Perennial does not train."""
        found = [f"{key} {self.get(key)!r}" for key in keys if self.get(key)]
        if found:
            self.notes.append(f"trained on without dropout, though config.json has {', '.join(found)}")


@dataclass(frozen=True)
class Stored:
    """One tensor of a folder, and the parameters of ours that are in it.

    join: how several parameters lie in it: 'stacked' one after the other along the outputs, or 'by_head' query, key and
    value of each head together. is_transposed: stored (inputs, outputs) instead of (outputs, inputs).
    """

    name: str
    parts: tuple[str, ...]
    join: Literal["none", "stacked", "by_head"] = "none"
    is_transposed: bool = False


class Family(Settings, ABC):
    """A model type of `transformers`: what its files mean. It has no settings of its own."""

    EXAMPLES: ClassVar[list[dict[str, Any]]]
    """Entries of config.json, beside sizes, that the conformance tests try alone and together."""

    architecture: ClassVar[str]
    """The class of `transformers`."""
    defaults: ClassVar[dict[str, Any]]
    """What `transformers` assumes for entries that a config.json leaves out."""
    keys: ClassVar[dict[str, str]]
    """Our field: its entry in config.json, where one is the other."""
    derived: ClassVar[str] = r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq"
    """Names of tensors that follow from the configuration, as old folders store them; they are passed over."""

    @abstractmethod
    def read(self, entries: Entries) -> dict[str, Any]:
        """The fields of ModelConfig (not checked yet) that these entries stand for."""

    @abstractmethod
    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Entries of config.json for a configuration of this family."""

    @abstractmethod
    def tensors(self, config: ModelConfig) -> list[Stored]:
        """Every tensor of a folder."""

    def spelled(self, name: str) -> str:
        """The usual name of a stored tensor; some folders leave out a prefix."""
        return name

    def cannot_express(self, config: ModelConfig) -> list[str]:
        """What of a configuration a folder of this family could not say, in words."""
        fields = type(config).model_fields
        again = {name: f.default for name, f in fields.items() if not f.is_required() and f.default_factory is None}
        entries = Entries(self.write(config), self.defaults)
        again |= self.read(entries)
        lost = [name for name, value in again.items() if not _is_same(getattr(config, name), value)]
        lost_text = ", ".join(f"{name} {getattr(config, name)!r}" for name in lost)
        return entries.problems + ([f"{lost_text}: a folder of family '{config.family}' cannot say so"] if lost else [])


def _is_same(field: Any, value: Any) -> bool:
    """Whether a field has this value, which for settings within settings is given as a mapping."""
    if isinstance(field, Settings) and isinstance(value, Mapping):
        return field.model_dump() == type(field).model_validate(value).model_dump()
    return bool(field == value)


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}
"""Activation in config.json: ours."""


def activation(entries: Entries, key: str = "hidden_act") -> Any:
    """Our name of the activation; a problem when there is none."""
    name = entries.get(key)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        entries.problems.append(f"{key} {name!r}; supported: {', '.join(ACTIVATIONS)}")
        return "silu"
    return ACTIVATIONS[name]


def stored_activation(ours: str) -> str:
    """The name under which an activation is written."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(ours, ours)


LLAMA_KEYS = {
    "vocabulary_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
    "context": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "initial_std": "initializer_range",
}
"""Our field: its entry in the config.json of Llama and those that follow it."""

LLAMA_DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}


def read_like_llama(entries: Entries) -> dict[str, Any]:
    """Sizes, activation and rotary positions of a config.json that is spelled as Llama's."""
    entries.note_dropout("attention_dropout")
    found = {ours: entries.get(theirs) for ours, theirs in LLAMA_KEYS.items()}
    # without these, what follows from the others is right: one key head per head, width / heads
    found |= {} if entries.get("num_key_value_heads") is not None else {"kv_heads": found["heads"]}
    found["head_width"] = entries.get("head_dim", _quotient(found["width"], found["heads"]))
    return {**found, "activation": activation(entries), **rotary(entries, found["context"])}


def _quotient(width: Any, heads: Any) -> Any:
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads > 0 else None


def write_like_llama(config: ModelConfig) -> dict[str, Any]:
    """The entries that `read_like_llama` reads."""
    return {
        **{theirs: getattr(config, ours) for ours, theirs in LLAMA_KEYS.items()},
        **({} if config.head_width * config.heads == config.width else {"head_dim": config.head_width}),
        "hidden_act": stored_activation(config.activation),
        "attention_dropout": 0.0,
        **write_rotary(config),
    }


def llama_tensors(config: ModelConfig, layer: Iterable[str]) -> list[Stored]:
    """Embedding, the given tensors of each layer, last norm and head, all under our own names."""
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{number}.{name}" for number in range(config.layers) for name in layer]
    names += ["model.norm.weight", *([] if config.tied_embeddings else ["lm_head.weight"])]
    return [Stored(name, (name,)) for name in names]


def projections(config: ModelConfig) -> list[str]:
    """Names of a Llama layer's matrices and their biases."""
    biased = {"q_proj": config.qkv_bias, "k_proj": config.qkv_bias, "v_proj": config.qkv_bias}
    biased |= {"o_proj": config.output_bias}
    names = []
    for projection, has_bias in biased.items():
        names += [f"self_attn.{projection}.weight", *([f"self_attn.{projection}.bias"] if has_bias else [])]
    for projection in (*(("gate_proj",) if config.gated_mlp else ()), "up_proj", "down_proj"):
        names += [f"mlp.{projection}.weight", *([f"mlp.{projection}.bias"] if config.mlp_bias else [])]
    return names


PRE_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


# Rotary positions

_COMMON_ROTARY = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
_KINDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "original_context": "original_max_position_embeddings",
    },
    "yarn": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}
"""Kind of rotary scaling: our field and its entry."""


def rotary(entries: Entries, context: Any, *, theta_key: str = "rope_theta", share_key: str = "") -> dict[str, Any]:
    """rope_theta, rotary_share, rope_scaling and context, from `transformers` 5's rope_parameters or the older entries.

    `share_key` is the entry of a family in which only a part of each head is turned.
    """
    where = "rope_parameters" if entries.get("rope_parameters") and not entries.get("rope_scaling") else "rope_scaling"
    found = entries.get(where) or {}
    plain = {"rope_theta": entries.get(theta_key, 10_000.0), "context": context}
    if not isinstance(found, Mapping):
        entries.problems.append(f"{where} {found!r}; supported: an object with a rope_type")
        return plain
    plain["rope_theta"] = found.get("rope_theta") or plain["rope_theta"]
    share = found.get("partial_rotary_factor") or entries.get(share_key or "partial_rotary_factor", 1.0)
    if share_key:
        plain["rotary_share"] = share
    elif share != 1.0:
        entries.problems.append(f"partial_rotary_factor {share!r}; supported: 1.0")
    kind = found.get("rope_type") or found.get("type") or "default"
    if not isinstance(kind, str) or kind not in _KINDS:
        entries.problems.append(f"{where} of type {kind!r}; supported: {', '.join(_KINDS)}")
        return plain
    known = {*_COMMON_ROTARY, *_KINDS[kind].values(), *(("mscale", "mscale_all_dim") if kind == "yarn" else ())}
    entries.problems += [f"{where}.{key}" for key in sorted(map(str, found.keys() - known))]
    if (outside := entries.get("original_max_position_embeddings")) is not None:
        found = {**found, "original_max_position_embeddings": outside}  # which transformers gives priority
    return plain if kind == "default" else {**plain, **_scaling(kind, found, context)}


def _scaling(kind: str, found: Mapping[str, Any], context: Any) -> dict[str, Any]:
    """rope_scaling and the context that it gives."""
    values = {ours: found[theirs] for ours, theirs in _KINDS[kind].items() if found.get(theirs) is not None}
    scaling: dict[str, Any] = {"kind": kind, **values}
    if kind == "dynamic":  # stretches as far as a row is long, so config.json holds the original context
        scaling["original_context"] = context
        if isinstance(context, int) and _is_number(values.get("factor")):
            return {"rope_scaling": scaling, "context": math.floor(context * values["factor"])}
    elif kind != "linear":
        scaling.setdefault("original_context", context)
    if kind == "yarn":
        scaling |= _yarn_factors(found, scaling["original_context"], context)
    return {"rope_scaling": scaling}


def _yarn_factors(found: Mapping[str, Any], original: Any, context: Any) -> dict[str, Any]:
    """Factor and attention factor where they are left to follow from other entries.

    Source: Peng et al. 2023, YaRN, arXiv 2309.00071, section 3.4: attention is scaled by 0.1 ln(factor) + 1.
    """
    factor = found.get("factor")
    if factor is None and isinstance(original, int) and isinstance(context, int) and original > 0:
        factor = context / original
    if found.get("attention_factor") is not None or not _is_number(factor):
        return {} if factor is None else {"factor": factor}

    def stretch(mscale: Any) -> float:
        assert factor is not None
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 and _is_number(mscale) else 1.0

    scale, all_dimensions = found.get("mscale"), found.get("mscale_all_dim")
    both = bool(scale and all_dimensions)
    return {"factor": factor, "attention_factor": stretch(scale) / stretch(all_dimensions) if both else stretch(1.0)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9


def write_rotary(config: ModelConfig, *, shares: bool = False) -> dict[str, Any]:
    """The entries that `rotary` reads; rope_theta also where `transformers` before 5 and other readers look."""
    scaling, context = config.rope_scaling, config.context
    parameters: dict[str, Any] = {"rope_type": scaling.kind if scaling else "default", "rope_theta": config.rope_theta}
    if shares:
        parameters["partial_rotary_factor"] = config.rotary_share
    if scaling:
        parameters |= {theirs: getattr(scaling, ours) for ours, theirs in _KINDS[scaling.kind].items()}
        if scaling.kind == "dynamic" and scaling.original_context:
            context = scaling.original_context
    return {"rope_parameters": parameters, "rope_theta": config.rope_theta, "max_position_embeddings": context}


# Sliding windows


def windows(entries: Entries, layers: Any, is_windowed: Callable[[int], bool]) -> dict[str, Any]:
    """window and window_layers of Qwen2 and those that follow it.

    `is_windowed` says it of each layer where there are no layer_types but use_sliding_window.
    """
    size, kinds = entries.get("sliding_window"), entries.get("layer_types")
    if not isinstance(layers, int) or not 0 < layers < 100_000 or size is None:
        return {}
    if kinds is None:
        if not entries.get("use_sliding_window"):
            return {}
        kinds = ["sliding_attention" if is_windowed(number) else "full_attention" for number in range(layers)]
    if not isinstance(kinds, list) or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        entries.problems.append(f"layer_types {kinds!r}; supported: full_attention and sliding_attention")
        return {}
    chosen = [kind == "sliding_attention" for kind in kinds]
    if not any(chosen):
        return {}
    if not entries.get("use_sliding_window"):  # transformers then has no window, whatever layer_types say
        entries.problems.append("layer_types with sliding_attention, but use_sliding_window is not true")
        return {}
    return {"window": size, "window_layers": None if all(chosen) else chosen}


def from_layer(entries: Entries) -> Callable[[int], bool]:
    """Whether a layer lies at or above max_window_layers."""
    first = entries.get("max_window_layers")
    return lambda number: isinstance(first, int) and number >= first


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The entries that `windows` reads."""
    if config.window is None:
        return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.layers}
    kinds = [config.window_of(number) is not None for number in range(config.layers)]
    return {
        "use_sliding_window": True,
        "sliding_window": config.window,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention" if is_windowed else "full_attention" for is_windowed in kinds],
    }
