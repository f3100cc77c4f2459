"""Predict each next token, and what the parent (or an ensemble) would predict in its place.

Formula: p, p_T: softmax of the student's logits z, and of z / T; q_T: mean over the K teachers of softmax(z_k / T);
    total = sum over counted tokens of (1 - w) * -ln p(target) + w * T^2 * H(q_T, p_T), H(q, p) = -sum_v q_v ln p_v.
    H(q_T, p_T) is KL(q_T || p_T) plus the teachers' entropy, which the student cannot change.
    Gradients: d total / d z_v = (1 - w) * (p_v - [v is the target]) + w * T * (p_T,v - q_T,v).
Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2 (soft
    targets, T^2); Li and Hoiem 2016, "Learning without Forgetting", arXiv 1606.09282, section 3 (the old model as the
    teacher on new data); Lee et al. 2022, "Self-Distillation for Further Pre-training of Transformers", arXiv
    2210.02871, section 4; Kim et al. 2025, "Pre-training under infinite compute", arXiv 2509.14786, section 5 (an
    ensemble back into one model).
Differs: a mean of the teachers' probabilities, as ensembles are evaluated here, and on the text itself instead of text
    that the teachers generate; Lee et al. match hidden states where here predictions are matched. Teachers compute in
    the same step, so nothing is stored, and their logits exist chunk by chunk, as the student's do.
Limits: teachers share the student's vocabulary; each costs a forward pass (counted in the FLOPs) and its weights in
    memory, whole on every process. At weight 1 with the parent as the only teacher there is nothing to learn.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr

from perennial.core.errors import UserError, nearest
from perennial.objectives.base import IGNORED, LossSum, Objective, StageData
from perennial.objectives.next_token import (
    NextToken,
    add_product,
    default_chunk,
    flat_states,
    product_dtype,
    softmax_and_log_sum,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from perennial.objectives.base import LanguageModel, TensorBatch

PARENT = "parent"


class Distillation(Objective):
    """Next tokens mixed with the predictions of one or more teachers; reported is the plain next-token loss."""

    EXAMPLES: ClassVar[list[dict[str, Any]]] = [
        {},
        {"weight": 1.0, "temperature": 2.0},
        {"teacher": ["first", "second"], "weight": 0.3, "temperature": 0.7, "chunk_tokens": 7},
        {"weight": 0.0},
        {"rows": "replay"},
    ]
    FOLDERS: ClassVar[tuple[str, ...]] = ("teacher",)

    rows: Literal["all", "replay"] | Annotated[list[str], Field(min_length=1)] = "all"
    """Which rows the teachers have a part in: 'all', those of 'replay', or those of the corpora named here."""
    teacher: Literal["parent"] | Annotated[list[str], Field(min_length=1)] = "parent"
    """'parent', or a list of checkpoint folders (or run folders: their newest) whose probabilities are averaged."""
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the teachers in the loss; 0 is plain next-token training, 1 learns from the teachers alone."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Logits are divided by it on both sides; above 1 the unlikely tokens count for more."""
    chunk_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens whose logits exist at once, of the student and of one teacher; by default as for `next_token`."""

    _teachers: tuple[Any, ...] = PrivateAttr(default=())
    _taught: frozenset[int] | None = PrivateAttr(default=None)
    """The sources of the stage whose rows are taught; None: all of them."""

    def checkpoints(self) -> list[str]:
        """The teachers."""
        return [PARENT] if self.teacher == PARENT else list(self.teacher)

    def with_models(self, models: Sequence[LanguageModel]) -> Self:
        """The same with its teachers, in the order of `checkpoints`."""
        assert len(models) == len(self.checkpoints())
        given = self.model_copy()
        given._teachers = tuple(models)
        return given

    def check(self, stage: StageData) -> None:
        """Raises UserError where `rows` names a source that the mixture does not have."""
        if self.rows != "all":
            self._sources(stage)

    def share_read(self, stage: StageData) -> float:
        """The weight of the sources that are taught."""
        if self.rows == "all":
            return 1.0
        taught = self._sources(stage)
        weights = [source.weight for source in stage.sources]
        return sum(weights[index] for index in taught) / sum(weights)

    def on_stage(self, stage: StageData) -> Self:
        """The same with the numbers of the sources that are taught."""
        given = self.model_copy()
        given._taught = None if self.rows == "all" else self._sources(stage)
        return given

    def _sources(self, stage: StageData) -> frozenset[int]:
        names = [source.name for source in stage.sources]
        if self.rows == "replay":
            taught = frozenset(i for i, source in enumerate(stage.sources) if source.role == "replay")
            if not taught:
                raise UserError(
                    "objective distillation: rows 'replay': the stage replays nothing; name the corpora that are to be "
                    f"taught ({', '.join(names)}), take 'all', or add 'replay' to the mixture"
                )
            return taught
        for name in self.rows:
            if name not in names:
                hint = nearest(name, [*names, "replay", "all"])
                raise UserError(
                    f"objective distillation: rows: the mixture has no '{name}'; it has: {', '.join(names)}.{hint}"
                )
        return frozenset(names.index(name) for name in self.rows)

    def loss(self, model: LanguageModel, batch: TensorBatch) -> LossSum:
        """Sums over the batch; the teachers first, while nothing is kept for the backward pass yet."""
        import torch

        assert self._teachers, "the teachers were not given"
        plain = NextToken(chunk_tokens=self.chunk_tokens)
        taught, others = self._divided(batch)
        if not taught:
            return plain.loss(model, batch)
        read = _Rows.of(batch, taught) if others else batch
        with torch.no_grad():
            teachers = [(flat_states(teacher, read)[0], teacher.head_weight) for teacher in self._teachers]
        hidden, head = model(batch.inputs, batch.segments), model.head_weight
        states = (hidden[taught] if others else hidden).flatten(0, -2)
        mixing = _Mixing(self.weight, self.temperature, self.chunk_tokens or default_chunk(states.device.type))
        total, nats = _mixed().apply(states, head, read.targets.flatten(), teachers, mixing)
        if others:
            rest = plain.of_states(hidden[others].flatten(0, -2), batch.targets[others].flatten(), head)
            total, nats = total + rest.total, nats + rest.nats
        return LossSum(total, nats, (batch.targets != IGNORED).sum())

    def _divided(self, batch: TensorBatch) -> tuple[list[int], list[int]]:
        """The rows that are taught, and the others; where sources are not known (in a trial) all count as taught."""
        if self._taught is None or batch.source is None:
            return list(range(len(batch.inputs))), []
        sources = batch.source.tolist()
        taught = [row for row, source in enumerate(sources) if source in self._taught]
        return taught, [row for row, source in enumerate(sources) if source not in self._taught]

    def evaluate(self, model: LanguageModel, batch: TensorBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of nats, count) of the next tokens; the teachers have no part in it."""
        return NextToken(chunk_tokens=self.chunk_tokens).evaluate(model, batch)


@dataclass(frozen=True)
class _Rows:
    """Some rows of a batch."""

    inputs: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor | None
    source: NDArray[np.int64] | None

    @classmethod
    def of(cls, batch: TensorBatch, rows: list[int]) -> _Rows:
        segments = None if batch.segments is None else batch.segments[rows]
        source = None if batch.source is None else batch.source[rows]
        return cls(batch.inputs[rows], batch.targets[rows], segments, source)


@dataclass(frozen=True)
class _Mixing:
    """The numbers of the loss."""

    weight: float
    temperature: float
    chunk: int


class _Logits:
    """The logits of a model chunk by chunk, in fp32 or wider, each in the memory of the one before."""

    def __init__(self, states: torch.Tensor, head: torch.Tensor | None, rows: int) -> None:
        """`states`: hidden states (N, D) with a head (V, D), or the logits (N, V) themselves without."""
        import torch

        self.states, self.head = states, head
        self.dtype = states.dtype if head is None else product_dtype(states, head)
        self.exact = torch.promote_types(self.dtype, torch.float32)
        width = states.shape[-1] if head is None else len(head)
        self.product: torch.Tensor | None = None
        if head is not None:
            self.head = head.detach().to(self.dtype)
            self.product = torch.empty(rows, width, dtype=self.dtype, device=states.device)
        is_exact = self.product is not None and self.dtype == self.exact
        self._wide = self.product if is_exact else torch.empty(rows, width, dtype=self.exact, device=states.device)

    def of(self, part: slice) -> torch.Tensor:
        """(n, V), to be overwritten at will."""
        import torch

        assert self._wide is not None
        states = self.states[part]
        if self.head is None or self.product is None:
            return self._wide[: len(states)].copy_(states)
        product = torch.mm(states.to(self.dtype), self.head.T, out=self.product[: len(states)])
        return product if self._wide is self.product else self._wide[: len(states)].copy_(product)


_Teachers = Sequence[tuple[Any, Any]]
"""(states, head or None) of each."""


def _sums(
    states: torch.Tensor,
    head: torch.Tensor | None,
    targets: torch.Tensor,
    teachers: _Teachers,
    mixing: _Mixing,
    *,
    grad_states: torch.Tensor | None = None,
    grad_head: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(total, nats) summed over counted tokens; fills `grad_states` and adds to `grad_head` the gradients of `total`.

    states (N, D) with head (V, D), or logits (N, V) without; targets (N,).
    """
    import torch

    rows = max(1, min(mixing.chunk, len(targets)))
    weight, temperature = mixing.weight, mixing.temperature
    with torch.autocast(states.device.type, enabled=False):
        student = _Logits(states.detach(), head, rows)
        taught = [_Logits(of.detach(), its_head, rows) for of, its_head in teachers]
        nats = torch.zeros((), dtype=student.exact, device=states.device)
        crossed = torch.zeros_like(nats)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            target = targets[part].unsqueeze(1)
            counted = target != IGNORED
            target = target.where(counted, 0)
            z, q = student.of(part), _mean_probabilities(taught, part, temperature).to(student.exact)
            z_target, expected = z.gather(1, target), torch.linalg.vecdot(q, z).unsqueeze(1)
            softened = z / temperature if temperature != 1 else None
            p, log_z = softmax_and_log_sum(z)
            p_soft, log_z_soft = (p, log_z) if softened is None else softmax_and_log_sum(softened)
            nats += ((log_z - z_target) * counted).sum()
            crossed += ((log_z_soft - expected / temperature) * counted).sum()
            if grad_states is None and grad_head is None:
                continue
            difference = torch.sub(p_soft, q, out=q).mul_(weight * temperature)
            grad_z = p.scatter_(1, target, p.gather(1, target) - 1).mul_(1 - weight).add_(difference)
            _put_gradients(grad_z, counted, student, part, grad_states, grad_head)
    return (1 - weight) * nats + weight * temperature**2 * crossed, nats


def _mean_probabilities(teachers: Sequence[_Logits], part: slice, temperature: float) -> torch.Tensor:
    """Mean of the softmax of the teachers' logits / temperature, (n, V)."""
    mean: Any = None
    for teacher in teachers:
        z = teacher.of(part)
        q, _ = softmax_and_log_sum(z.div_(temperature) if temperature != 1 else z)
        mean = q if mean is None else mean.add_(q)
    return mean if len(teachers) == 1 else mean.div_(len(teachers))


def _put_gradients(
    grad_z: torch.Tensor,
    counted: torch.Tensor,
    student: _Logits,
    part: slice,
    grad_states: torch.Tensor | None,
    grad_head: torch.Tensor | None,
) -> None:
    """From the gradient of a chunk's logits to those of the states and of the head; ignored tokens have none."""
    import torch

    if student.head is None or student.product is None:
        assert grad_states is not None
        grad_states[part] = grad_z.mul_(counted)
        return
    same = student.dtype == student.exact
    grad_z = grad_z if same else student.product[: len(grad_z)].copy_(grad_z)
    if grad_states is not None:
        grad_states[part] = torch.mm(grad_z, student.head).mul_(counted)
    if grad_head is not None:
        add_product(grad_head, grad_z.T, student.states[part].to(student.dtype) * counted)


@functools.cache
def _mixed() -> Any:
    """The autograd function; made on first use, because recipes are validated without torch."""
    import torch
    from torch.autograd.function import once_differentiable

    class Mixed(torch.autograd.Function):
        """(total, nats); with a head the gradients are made in the forward pass, of given logits in the backward."""

        @staticmethod
        def forward(
            ctx: Any,
            states: torch.Tensor,
            head: torch.Tensor | None,
            targets: torch.Tensor,
            teachers: _Teachers,
            mixing: _Mixing,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            ctx.teachers, ctx.mixing = None, mixing
            if head is None:
                ctx.save_for_backward(states, targets)
                ctx.teachers = teachers
                total, nats = _sums(states, None, targets, teachers, mixing)
            else:
                wanted = ctx.needs_input_grad
                exact = torch.promote_types(head.dtype, torch.float32)
                grad_states = torch.empty_like(states) if wanted[0] else None
                grad_head = torch.zeros_like(head, dtype=exact) if wanted[1] else None
                total, nats = _sums(
                    states, head, targets, teachers, mixing, grad_states=grad_states, grad_head=grad_head
                )
                ctx.save_for_backward(grad_states, None if grad_head is None else grad_head.to(head.dtype))
            ctx.mark_non_differentiable(nats)
            return total, nats

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad_total: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
            if ctx.teachers is None:
                grads = [None if grad is None else grad * grad_total for grad in ctx.saved_tensors]
                return (*grads, None, None, None)
            states, targets = ctx.saved_tensors
            grad = torch.empty_like(states)
            _sums(states, None, targets, ctx.teachers, ctx.mixing, grad_states=grad)
            return grad.mul_(grad_total), None, None, None, None

    return Mixed
