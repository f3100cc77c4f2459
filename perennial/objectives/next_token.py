"""Predict each next token: cross entropy, with an optional z-loss that keeps the logits small.

Formula: logits z_v = hidden . W_v; Z = sum_v exp(z_v); nats = ln Z - z_target;
    total = sum over counted tokens of (nats + z_loss * (ln Z)^2).
    Gradients, p_v = exp(z_v) / Z: d total / d z_v = p_v * (1 + 2 * z_loss * ln Z) - [v is the target].
Source: z-loss: Chowdhery et al. 2022, "PaLM: Scaling Language Modeling with Pathways", arXiv 2204.02311, section 5
    (coefficient 1e-4); gradients made chunk by chunk in the forward pass: Hsu et al. 2024, "Liger Kernel: Efficient
    Triton Kernels for LLM Training", arXiv 2410.10989, section 3.2; see also Wijmans et al. 2024, arXiv 2411.09009.
Differs: the chunk is a fixed number of tokens, which on a CPU is chosen to stay in its cache. A model whose logits are
    not hidden . W_v (see `objectives.base`) gives them itself: they exist at once, in the model's dtype, and only what
    is computed from them is made chunk by chunk, in fp32, in the backward pass once more.
Limits: no second derivatives.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from perennial.objectives.base import IGNORED, LossSum, Objective

if TYPE_CHECKING:
    import torch

    from perennial.objectives.base import LanguageModel, TensorBatch

_CPU_CHUNK, _DEVICE_CHUNK = 512, 4096


class NextToken(Objective):
    """The usual objective. The logits of a whole batch never exist at once, where the model allows it."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [{}, {"z_loss": 1e-2}, {"z_loss": 1e-4, "chunk_tokens": 7}]

    z_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Coefficient of (ln Z)^2; 1e-4 in PaLM. Trained on, never reported."""
    chunk_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens whose logits exist at once; by default 512 on a CPU, where it was fastest, and 4096 elsewhere."""

    def loss(self, model: LanguageModel, batch: TensorBatch) -> LossSum:
        """Sums over the batch; with a plain head the gradients are ready when this returns."""
        return self.of_states(*flat_states(model, batch), model.head_weight)

    def of_states(self, states: torch.Tensor, targets: torch.Tensor, head: torch.Tensor | None) -> LossSum:
        """The same from hidden states (N, D) and a head (V, D), or from logits (N, V) without; targets (N,)."""
        chunk = self._chunk(states)
        if head is None:
            total, nats = _of_logits().apply(states, targets, self.z_loss, chunk)
        else:
            total, nats = _of_hidden().apply(states, head, targets, self.z_loss, chunk)
        return LossSum(total, nats, (targets != IGNORED).sum())

    def evaluate(self, model: LanguageModel, batch: TensorBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of nats, count), without gradients and without z-loss."""
        import torch

        with torch.no_grad():
            states, targets = flat_states(model, batch)
            chunk = self._chunk(states)
            if model.head_weight is None:
                nats, _ = _sums_of_logits(states, targets, chunk=chunk)
            else:
                nats, _ = _sums(states, model.head_weight, targets, chunk=chunk)
            return nats, (targets != IGNORED).sum()

    def _chunk(self, states: torch.Tensor) -> int:
        return self.chunk_tokens or default_chunk(states.device.type)


def target_nats(model: LanguageModel, batch: TensorBatch) -> torch.Tensor:
    """-ln p(target) of every target, (N,) in fp32 or wider, 0 where it is IGNORED; without gradients."""
    import torch

    with torch.no_grad():
        states, targets = flat_states(model, batch)
        head = model.head_weight
        dtype = states.dtype if head is None else product_dtype(states, head)
        exact = torch.promote_types(dtype, torch.float32)
        nats = torch.empty(len(targets), dtype=exact, device=states.device)
        rows = default_chunk(states.device.type)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            z = states[part] if head is None else torch.mm(states[part].to(dtype), head.to(dtype).T)
            z, target = z.to(exact), targets[part].clamp(min=0)
            nats[part] = torch.logsumexp(z, dim=-1) - z.gather(1, target.unsqueeze(1)).squeeze(1)
        return nats.masked_fill_(targets == IGNORED, 0.0)


def default_chunk(device_type: str) -> int:
    """Tokens whose logits exist at once on such a device, unless `chunk_tokens` says otherwise."""
    return _CPU_CHUNK if device_type == "cpu" else _DEVICE_CHUNK


def flat_states(model: LanguageModel, batch: TensorBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model returns, hidden states (N, D) or logits (N, V), and the targets (N,)."""
    states = model(batch.inputs, batch.segments)
    return states.flatten(0, -2), batch.targets.flatten()


def product_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype in which matrices are multiplied: autocast's, as a linear layer would."""
    import torch

    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _sums(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    chunk: int,
    z_loss: float = 0.0,
    grad_hidden: torch.Tensor | None = None,
    grad_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats, (ln Z)^2) summed over counted tokens; adds the gradients of `total` to the tensors given.

    hidden (N, D), weight (V, D), targets (N,). Matrix products in `product_dtype`, the rest in fp32 or wider.
    """
    import torch

    dtype = product_dtype(hidden, weight)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    rows = max(1, min(chunk, len(targets)))
    # Buffers are reused over the chunks: fresh pages would cost more than the arithmetic.
    product = torch.empty(rows, len(weight), dtype=dtype, device=hidden.device)
    logits = product if dtype == exact else torch.empty_like(product, dtype=exact)
    nats = torch.zeros((), dtype=exact, device=hidden.device)
    squares = torch.zeros_like(nats)
    with torch.autocast(hidden.device.type, enabled=False):
        weight = weight.to(dtype)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            states, target = hidden[part].to(dtype), targets[part].unsqueeze(1)
            counted = target != IGNORED
            target = target.where(counted, 0)
            z = torch.mm(states, weight.T, out=product[: len(states)])
            z = z if logits is product else logits[: len(states)].copy_(z)
            z_target = z.gather(1, target)
            p, log_z = softmax_and_log_sum(z)
            nats += ((log_z - z_target) * counted).sum()
            if z_loss:
                squares += (log_z.square() * counted).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad_z = _grad_logits(p, log_z, target, z_loss)
            grad_z = grad_z if dtype == exact else product[: len(states)].copy_(grad_z)
            # Ignored rows are struck out of the narrow factors (D wide), not of the logits (V wide).
            if grad_hidden is not None:
                grad_hidden[part] = torch.mm(grad_z, weight).mul_(counted)
            if grad_weight is not None:
                add_product(grad_weight, grad_z.T, states * counted)
    return nats, squares


def _sums_of_logits(
    logits: torch.Tensor, targets: torch.Tensor, *, chunk: int, z_loss: float = 0.0, grad: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_sums` where the model gives the logits (N, V); fills `grad` (N, V), when given, with those of `total`."""
    import torch

    exact = torch.promote_types(logits.dtype, torch.float32)
    rows = max(1, min(chunk, len(targets)))
    wide = torch.empty(rows, logits.shape[-1], dtype=exact, device=logits.device)
    nats = torch.zeros((), dtype=exact, device=logits.device)
    squares = torch.zeros_like(nats)
    with torch.autocast(logits.device.type, enabled=False):
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            target = targets[part].unsqueeze(1)
            z = wide[: len(target)].copy_(logits[part])
            counted = target != IGNORED
            target = target.where(counted, 0)
            z_target = z.gather(1, target)
            p, log_z = softmax_and_log_sum(z)
            nats += ((log_z - z_target) * counted).sum()
            if z_loss:
                squares += (log_z.square() * counted).sum()
            if grad is not None:
                grad[part] = _grad_logits(p, log_z, target, z_loss).mul_(counted)
    return nats, squares


def softmax_and_log_sum(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(p, ln Z) of logits (N, V); p may lie where they were, ln Z is (N, 1)."""
    import torch

    largest = z.amax(dim=-1, keepdim=True)
    # torch's kernel for a CPU reads an element before it writes it; for others nothing is known.
    p = torch.softmax(z, dim=-1, out=z if z.device.type == "cpu" else None)
    # The largest share is at least 1 / V, so its logarithm is safe where that of the target's may not be.
    return p, largest - p.amax(dim=-1, keepdim=True).log()


def _grad_logits(p: torch.Tensor, log_z: torch.Tensor, target: torch.Tensor, z_loss: float) -> torch.Tensor:
    """Turns p into the gradient of `total` with respect to the logits, in place."""
    if z_loss:
        p *= 1 + 2 * z_loss * log_z
    return p.scatter_(1, target, p.gather(1, target) - 1)  # not scatter_add_: its order is not fixed on GPUs


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, in one pass where the dtypes allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


@functools.cache
def _of_hidden() -> Any:
    """The autograd function for a plain head; made on first use, because recipes are validated without torch."""
    import torch
    from torch.autograd.function import once_differentiable

    class HeadAndCrossEntropy(torch.autograd.Function):
        """(total, nats) of hidden states, head and targets."""

        @staticmethod
        def forward(
            ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, z_loss: float, chunk: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            wanted = ctx.needs_input_grad
            exact = torch.promote_types(weight.dtype, torch.float32)
            grad_hidden = torch.empty_like(hidden) if wanted[0] else None
            grad_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
            nats, squares = _sums(
                hidden,
                weight,
                targets,
                chunk=chunk,
                z_loss=z_loss,
                grad_hidden=grad_hidden,
                grad_weight=grad_weight,
            )
            ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
            ctx.mark_non_differentiable(nats)
            return nats + z_loss * squares, nats

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad_total: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
            grads = [None if grad is None else grad * grad_total for grad in ctx.saved_tensors]
            return (*grads, None, None, None)

    return HeadAndCrossEntropy


@functools.cache
def _of_logits() -> Any:
    """The autograd function for logits that the model gives; made on first use, as above."""
    import torch
    from torch.autograd.function import once_differentiable

    class CrossEntropy(torch.autograd.Function):
        """(total, nats) of logits; keeps nothing but them, so that the softmax is made twice and stored never."""

        @staticmethod
        def forward(
            ctx: Any, logits: torch.Tensor, targets: torch.Tensor, z_loss: float, chunk: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            ctx.save_for_backward(logits, targets)
            ctx.z_loss, ctx.chunk = z_loss, chunk
            nats, squares = _sums_of_logits(logits, targets, chunk=chunk, z_loss=z_loss)
            ctx.mark_non_differentiable(nats)
            return nats + z_loss * squares, nats

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad_total: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
            logits, targets = ctx.saved_tensors
            grad = torch.empty_like(logits)
            _sums_of_logits(logits, targets, chunk=ctx.chunk, z_loss=ctx.z_loss, grad=grad)
            return grad.mul_(grad_total), None, None, None

    return CrossEntropy
