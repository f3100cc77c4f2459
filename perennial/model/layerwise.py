"""What is done to each layer of a model by itself: computing it again in the backward pass, and compiling it.

Both put another `forward` in the place of the layer's own and leave the module as it is: names of parameters stay,
copies of the model keep the change, and hooks of others (FSDP2 gathers a layer's weights in one) run around it.
So do this first, spread the model over processes afterwards.

Checkpointing keeps, of what a layer computes, less than the backward pass needs, and computes the rest again there:
    full       keeps what goes into the layer: L times the residual stream, for a third more compute (one more forward
               pass on top of forward and backward, which cost 1 and 2)
    selective  keeps the results of matrix products and of attention too, and computes again only what lies between:
               norms, rotary turns, activations
Gradients are bit for bit those without it: the same kernels run on the same numbers.
Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174, section 4; selective:
    Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models, arXiv 2205.05198, section 5.
Differs: there attention is what is computed again; with flash kernels that keep no scores it is cheaper to keep it.
Limits: the random state is not restored, as no layer draws random numbers (dropout is off everywhere). Under
    'selective' a layer may not write over the result of a product; none of the native layers does, and torch stops
    with an error where a model of transformers should.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from perennial.core.errors import UserError
from perennial.model.through_transformers import AnyModel
from perennial.model.transformer import Transformer

Policy = Literal["none", "selective", "full"]

_KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::_grouped_mm",
    "aten::_scaled_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "flex_attention",
    "inductor_compiled_code",  # FlexAttention compiled by itself, in a layer that is not
)
"""Matrix products and attention, by the names of torch's operators."""


_VARIANTS = 32
"""Most variants of a layer that are compiled, above which torch goes on uncompiled: kinds of layers (with rotary
positions or not, with a window or not) x training or measuring x micro-batches of one, of the same and of any size."""


def layers_of(model: AnyModel) -> list[nn.Module]:
    """The layers that most of a model's parameters are in, in order; empty where there is no list of layers."""
    if isinstance(model, Transformer):
        return list(model.model.layers)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []  # of equals the first, which is the outermost


def checkpoint_layers(model: AnyModel, policy: Policy) -> None:
    """Makes every layer keep only what `policy` says; 'none' leaves the model as it is.

    Raises UserError for a model of transformers in which no layers are found.
    """
    if policy == "none":
        return
    layers = layers_of(model)
    if not layers:
        kind = type(model).__name__ if isinstance(model, Transformer) else model.config.architecture
        raise UserError(f"activation_checkpointing: no list of layers is found in {kind}; leave it at none")
    for layer in layers:
        _set_forward(layer, _recomputed if policy == "full" else _partly_recomputed)


def compile_layers(model: AnyModel, *, backend: str = "inductor") -> None:
    """Compiles every layer, or the whole model where no layers are found. To be called after `checkpoint_layers`.

    Layers of one kind share what is compiled, so that compiling takes as long for one layer as for a hundred.
    """
    import torch._dynamo.config as compiler  # not before somebody compiles: it is 90 MB of code

    compiler.recompile_limit = max(compiler.recompile_limit, _VARIANTS)
    layers = layers_of(model)
    if not layers:
        model.compile(backend=backend)
        return
    compiled: dict[Any, Any] = {}
    for layer in layers:
        own = layer.__dict__.get("forward")
        function = own.__func__ if own is not None else type(layer).forward
        if function not in compiled:
            compiled[function] = torch.compile(function, backend=backend)
        _set_forward(layer, compiled[function])


def _set_forward(layer: nn.Module, function: Callable[..., Any]) -> None:
    """Gives one module another `forward`: a method of it, so that a copy of the module calls its own."""
    layer.forward = MethodType(function, layer)


def _recomputed(layer: nn.Module, *given: Any, **named: Any) -> Any:
    """The forward of a layer of which nothing but what goes in is kept."""
    return _checkpointed(layer, given, named)


def _partly_recomputed(layer: nn.Module, *given: Any, **named: Any) -> Any:
    """The forward of a layer of which the results of products and attention are kept."""
    return _checkpointed(layer, given, named, context_fn=_selective_contexts)


def _checkpointed(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], **options: Any) -> Any:
    forward = type(layer).forward  # looked up now: FSDP2 gives the layer another class
    if not torch.is_grad_enabled():
        return forward(layer, *given, **named)
    return checkpoint(forward, layer, *given, use_reentrant=False, preserve_rng_state=False, **options, **named)


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *given: Any, **named: Any) -> CheckpointPolicy:
    """Keeps the results in `_KEPT`, and batched products unless the result is large for the work that is in it."""
    name = _name(operator)
    is_kept = name in _KEPT or (name == "aten::bmm" and not _is_scores(given[0], given[1]))
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _is_scores(left: Tensor, right: Tensor) -> bool:
    """Whether a batched product sums over its smallest dimension, as queries with keys: T x T numbers of K terms."""
    return left.shape[-1] < min(left.shape[-2], right.shape[-1])


@functools.cache
def _name(operator: Any) -> str:
    """'aten::mm' of the operator itself; variants that write into a given tensor have names of their own."""
    schema = getattr(operator, "_schema", None)
    if schema is None:
        return str(operator.name() if callable(getattr(operator, "name", None)) else operator)
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else str(schema.name)
