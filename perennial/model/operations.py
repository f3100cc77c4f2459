"""Norms and the rotary turn.

Each is torch's plain formula, and beside it, for eager execution on a CPU, an autograd function of the same result
with fewer passes over memory: torch has fused kernels for these on a GPU, and its compiler makes them, but on a CPU a
norm costs about ten passes forward and backward. Second derivatives go through the plain formula.

Shapes: B rows, T positions, D width (any size), H heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def runs_by_hand(x: Tensor) -> bool:
    """Whether the CPU functions below apply: eager execution on a CPU."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


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
    if runs_by_hand(x_BTD):
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
        w = weight.to(r.dtype)
        dyx = (dy.to(r.dtype) * x).reshape(-1, size)
        mean = torch.mv(dyx, w).view(r.shape).div_(size)
        d_weight = torch.mv(dyx.t(), r.reshape(-1))
        dx = (dy * w).mul_(r).addcmul_(x.to(r.dtype), mean * r.pow(3), value=-1)
        return dx.to(x.dtype), d_weight.to(weight.dtype), None, None


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
    if runs_by_hand(x_BTHK):
        turned: Tensor = _RotateOnCpu.apply(x_BTHK, table, 1.0)
        return turned
    first, second = x_BTHK.chunk(2, dim=-1)
    return (x_BTHK * table[0] + torch.cat((second, first), dim=-1) * table[1]).to(x_BTHK.dtype)


class _RotateOnCpu(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so nothing but the table is kept. `sense` is 1 or -1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, table: Tensor, sense: float) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((second, first), dim=-1)
        return (x * table[0]).addcmul_(turned, table[1], value=sense).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _, table, ctx.sense = inputs
        ctx.save_for_backward(table)

    @staticmethod
    def backward(ctx: Any, d_turned: Tensor) -> tuple[Tensor, None, None]:
        (table,) = ctx.saved_tensors
        return _RotateOnCpu.apply(d_turned, table, -ctx.sense), None, None
