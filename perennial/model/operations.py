"""Norms, the rotary turn, products with weights and the gated feed-forward part.

Each is torch's plain formula, and beside it, for eager execution on a CPU, an autograd function of the same result
with fewer passes over memory and less kept for the backward pass: torch has fused kernels for these on a GPU, and its
compiler makes them, but on a CPU a norm costs about ten passes forward and backward, autocast keeps a rounded copy of
every weight, and a gated feed-forward part keeps two of its inner values that are quick to make again. Second
derivatives go through the plain formula.

Shapes: B rows, T positions, D width (any size), H heads, K head width, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def runs_by_hand(*tensors: Tensor) -> bool:
    """Whether the CPU functions below apply: eager execution on a CPU, of plain tensors (not distributed ones)."""
    return not torch.compiler.is_compiling() and all(
        tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter) for tensor in tensors
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products of `x`: autocast's where it is on (it leaves fp64 alone), else that of `x`."""
    device = x.device.type
    if device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def rms_norm(x_BTD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, in fp32 or wider.

    The result is in `compute_dtype(x)`: under autocast it is rounded once here instead of once in every product it
    enters.
    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, arXiv 1910.07467, equation 4.
    """
    if runs_by_hand(x_BTD, weight_D):
        normed: Tensor = _RmsNormOnCpu.apply(x_BTD, weight_D, epsilon, compute_dtype(x_BTD))[0]
        return normed
    return _rms_norm(x_BTD, weight_D, epsilon).to(compute_dtype(x_BTD))


def _rms_norm(x_BTD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    return F.rms_norm(x_BTD.to(dtype), weight_D.shape, weight_D.to(dtype), epsilon)


class _RmsNormOnCpu(torch.autograd.Function):
    """With r = (mean(x^2) + epsilon)^-1/2: y = x r w; dw = sum(dy x r); dx = dy w r - x r^3 mean(dy w x)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        r = length.square().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        return (x * r).mul_(weight).to(dtype), r

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, float, torch.dtype], output: tuple[Tensor, Tensor]
    ) -> None:
        x, weight, ctx.epsilon, _ = inputs
        ctx.dtype = x.dtype
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, r = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for
            y = _rms_norm(x, weight, ctx.epsilon)
            dx, d_weight = torch.autograd.grad(y, (x, weight), dy.to(y.dtype), create_graph=True)
            return dx, d_weight, None, None
        size = x.shape[-1]
        x, w, dy_wide = x.to(r.dtype), weight.to(r.dtype), dy.to(r.dtype)
        dyx = (dy_wide * x).reshape(-1, size)
        mean = torch.mv(dyx, w).view(r.shape).div_(size)
        d_weight = torch.mv(dyx.t(), r.reshape(-1))
        dx = dy_wide * w if dy_wide is dy else dy_wide.mul_(w)
        dx = dx.mul_(r).addcmul_(x, mean.mul_(r.pow(3)), value=-1)
        return dx.to(ctx.dtype), d_weight.to(weight.dtype), None, None


def layer_norm(x_BTD: Tensor, weight_D: Tensor, bias_D: Tensor, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last dimension, in fp32 or wider.

    The result is in `compute_dtype(x)`, as for `rms_norm`. torch's own kernel is fused on a CPU too.
    Source: Ba et al. 2016, Layer Normalization, arXiv 1607.06450, equation 4.
    """
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    normed = F.layer_norm(x_BTD.to(dtype), weight_D.shape, weight_D.to(dtype), bias_D.to(dtype), epsilon)
    return normed.to(compute_dtype(x_BTD))


def rotate(x_BTHK: Tensor, table: Tensor) -> Tensor:
    """Turns the pairs (i, i + R/2) of every head by their position's angles; computed in the table's dtype.

    R is the table's last dimension; what a head has beyond it is left as it is.
    """
    turned_width = table.shape[-1]
    if turned_width < x_BTHK.shape[-1]:
        return torch.cat((rotate(x_BTHK[..., :turned_width], table), x_BTHK[..., turned_width:]), dim=-1)
    if runs_by_hand(x_BTHK, table):
        turned: Tensor = _RotateOnCpu.apply(x_BTHK.transpose(-3, -2), table.transpose(-3, -2), 1.0)
        return turned.transpose(-3, -2)  # each head's positions lie together, as attention wants them
    first, second = x_BTHK.chunk(2, dim=-1)
    return (x_BTHK * table[0] + torch.cat((second, first), dim=-1) * table[1]).to(x_BTHK.dtype)


class _RotateOnCpu(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so nothing but the table is kept. `sense` is 1 or -1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, table: Tensor, sense: float) -> Tensor:
        wide = x.to(table.dtype).contiguous()  # one dtype for all that follows is faster than converting on the way
        is_copy = x.dtype != table.dtype or not x.is_contiguous()
        first, second = wide.chunk(2, dim=-1)
        swapped = torch.cat((second, first), dim=-1)
        turned = wide.mul_(table[0]) if is_copy else wide * table[0]
        return turned.addcmul_(swapped, table[1], value=sense).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _, table, ctx.sense = inputs
        ctx.save_for_backward(table)

    @staticmethod
    def backward(ctx: Any, d_turned: Tensor) -> tuple[Tensor, None, None]:
        (table,) = ctx.saved_tensors
        # Back in the order of positions, as the product that made x wants its gradient.
        dx: Tensor = _RotateOnCpu.apply(d_turned.transpose(-3, -2), table.transpose(-3, -2), -ctx.sense)
        return dx.transpose(-3, -2), None, None


def products(x_BTD: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x W' for each of the weights (any size, D), in `compute_dtype(x)`."""
    x_BTD = x_BTD.to(compute_dtype(x_BTD))
    if runs_by_hand(x_BTD, *weights):
        made: tuple[Tensor, ...] = _ProductsOnCpu.apply(x_BTD, *weights)
        return made
    return _products(x_BTD, *weights)


def _products(x_BTD: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(F.linear(x_BTD, weight.to(x_BTD.dtype)) for weight in weights)


class _ProductsOnCpu(torch.autograd.Function):
    """y_i = x W_i': dW_i = dy_i' x, dx = sum of dy_i W_i, added up inside the products."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return _products(x, *weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for
            return _wanted_grads(ctx, _products(x, *weights), dys)
        x_flat = x.reshape(-1, x.shape[-1])
        dx, d_weights = None, []
        for dy, weight, wanted in zip(dys, weights, ctx.needs_input_grad[1:], strict=True):
            dy_flat = dy.reshape(-1, dy.shape[-1])
            d_weights.append(torch.mm(dy_flat.t(), x_flat).to(weight.dtype) if wanted else None)
            if ctx.needs_input_grad[0]:
                narrow = weight.to(dy.dtype)
                dx = torch.mm(dy_flat, narrow) if dx is None else dx.addmm_(dy_flat, narrow)
        return None if dx is None else dx.view(x.shape), *d_weights


def _wanted_grads(ctx: Any, outputs: tuple[Tensor, ...], d_outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of the plain formula, itself differentiable, of those saved tensors that the caller asked for."""
    wanted = [tensor for tensor, is_wanted in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False) if is_wanted]
    grads = iter(torch.autograd.grad(outputs, wanted, d_outputs, create_graph=True))
    return tuple(next(grads) if is_wanted else None for is_wanted in ctx.needs_input_grad)


def silu_gated_mlp(x_BTD: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)), in `compute_dtype(x)`.

    Source: Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202, equation 6 (SwiGLU).
    """
    x_BTD = x_BTD.to(compute_dtype(x_BTD))
    if runs_by_hand(x_BTD, gate_FD, up_FD, down_DF):
        out: Tensor = _SiluGatedMlpOnCpu.apply(x_BTD, gate_FD, up_FD, down_DF)[0]
        return out
    return _silu_gated_mlp(x_BTD, gate_FD, up_FD, down_DF)[0]


def _silu_gated_mlp(x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and what it is made of: gate(x) and up(x)."""
    gate, up = _products(x, gate_FD, up_FD)
    return F.linear(F.silu(gate) * up, down_DF.to(x.dtype)), gate, up


class _SiluGatedMlpOnCpu(torch.autograd.Function):
    """With a = silu(g) and h = a u: y = h W'; dh = dy W; du = dh a; dg = dh u silu'(g). Keeps x, g and u."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _silu_gated_mlp(x, gate_FD, up_FD, down_DF)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        x, gate_FD, up_FD, down_DF, gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for
            return _wanted_grads(ctx, _silu_gated_mlp(x, gate_FD, up_FD, down_DF)[:1], (dy,))
        wants_x, wants_gate, wants_up, wants_down = ctx.needs_input_grad
        dy, x_flat, gate, up = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (dy, x, gate, up))
        activated = F.silu(gate)
        d_down = torch.mm(dy.t(), activated * up).to(down_DF.dtype) if wants_down else None
        d_inner = torch.mm(dy, down_DF.to(dy.dtype))
        d_up = activated.mul_(d_inner)
        d_gate = torch.ops.aten.silu_backward(d_inner.mul_(up), gate)
        d_gate_FD = torch.mm(d_gate.t(), x_flat).to(gate_FD.dtype) if wants_gate else None
        d_up_FD = torch.mm(d_up.t(), x_flat).to(up_FD.dtype) if wants_up else None
        if not wants_x:
            return None, d_gate_FD, d_up_FD, d_down
        dx = torch.mm(d_gate, gate_FD.to(dy.dtype)).addmm_(d_up, up_FD.to(dy.dtype))
        return dx.view(x.shape), d_gate_FD, d_up_FD, d_down
