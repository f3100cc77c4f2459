"""Distillation against the same computed plainly, and what its settings mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.data.replay import SourceSpec
from perennial.objectives.base import IGNORED, Objective, StageData

VOCABULARY, WIDTH = 31, 8


class Model(torch.nn.Module):
    """Hidden states by a table, and a head; or, capped, the logits themselves."""

    def __init__(self, seed: int, *, capped: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(VOCABULARY, width))
        self.head = torch.nn.Parameter(torch.randn(VOCABULARY, width))
        self.head_weight = None if capped else self.head

    def forward(self, inputs: Tensor, segments: Tensor | None) -> Tensor:
        hidden = self.table[inputs]
        return 4 * torch.tanh(hidden @ self.head.T / 4) if self.head_weight is None else hidden

    def logits(self, inputs: Tensor) -> Tensor:
        states = self(inputs, None)
        return states if self.head_weight is None else states @ self.head.T


class Batch:
    def __init__(self, rows: int = 5, length: int = 7, source: list[int] | None = None) -> None:
        torch.manual_seed(9)
        self.inputs, targets = torch.randint(VOCABULARY, (2, rows, length))
        self.targets = targets.masked_fill(torch.rand(rows, length) < 0.2, IGNORED)
        self.segments = None
        self.source = None if source is None else np.array(source)


def distillation(models: list[Any], **settings: Any) -> Objective:
    teachers = "parent" if len(models) == 1 else [str(number) for number in range(len(models))]
    objective, problems = plugins.build("objectives", {"name": "distillation", "teacher": teachers, **settings})
    assert not problems, problems
    return objective.with_models(models)


def gradients(model: Model) -> list[Tensor]:
    found = [parameter.grad for parameter in (model.table, model.head)]
    model.zero_grad()
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.4, 1.0), (1.0, 1.0), (0.4, 2.5), (1.0, 0.5)])
def test_equals_the_plain_computation(capped: bool, weight: float, temperature: float) -> None:
    """KL divergence by torch itself; it differs by the teachers' entropy, which has no gradient."""
    student, batch = Model(0, capped=capped).double(), Batch()
    teachers = [Model(1).double(), Model(2, capped=True).double(), Model(3, width=3).double()]
    loss = distillation(teachers, weight=weight, temperature=temperature, chunk_tokens=4).loss(student, batch)
    loss.total.backward()
    found = gradients(student)

    counted = batch.targets != IGNORED
    logits = student.logits(batch.inputs)[counted]
    with torch.no_grad():
        q = torch.stack([(t.logits(batch.inputs)[counted] / temperature).softmax(-1) for t in teachers]).mean(0)
    nats = functional.cross_entropy(logits, batch.targets[counted], reduction="sum")
    kl = functional.kl_div((logits / temperature).log_softmax(-1), q, reduction="sum")
    expected = (1 - weight) * nats + weight * temperature**2 * kl
    expected.backward()
    for one, other in zip(found, gradients(student), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    entropy = torch.special.entr(q).sum()
    assert float(loss.total.detach()) == pytest.approx(
        float(expected.detach() + weight * temperature**2 * entropy), rel=1e-10
    )
    assert float(loss.nats) == pytest.approx(float(nats.detach()), rel=1e-12)
    assert int(loss.count) == int(counted.sum())
    assert all(parameter.grad is None for teacher in teachers for parameter in teacher.parameters())


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    student, teacher, batch = Model(0).double(), Model(0).double(), Batch()
    distillation([teacher], weight=1.0, temperature=2.0).loss(student, batch).total.backward()
    assert all(float(gradient.abs().max()) < 1e-12 for gradient in gradients(student))


def test_weight_0_is_next_token() -> None:
    student, batch = Model(0), Batch()
    plain, _ = plugins.build("objectives", "next_token")
    plain.loss(student, batch).total.backward()
    expected = gradients(student)
    distillation([Model(1)], weight=0.0).loss(student, batch).total.backward()
    for one, other in zip(gradients(student), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def stage(**weights: float) -> StageData:
    sources = [
        SourceSpec(name.replace("_", "/"), "", name, weight, "replay" if "_" in name else "fresh", seed=1)
        for name, weight in weights.items()
    ]
    return StageData(5, 7, False, True, corpora=(), sources=tuple(sources))


@pytest.mark.parametrize("rows", ["replay", ["replay/old"]])
@pytest.mark.parametrize("capped", [False, True])
def test_rows_that_are_not_taught_are_plain_next_tokens(rows: Any, capped: bool) -> None:
    """The sums over all rows are those over the taught rows by distillation and over the others without."""
    student, teacher, source = Model(0, capped=capped).double(), Model(1).double(), [0, 1, 1, 0, 1]
    batch = Batch(source=source)
    objective = distillation([teacher], weight=0.6, rows=rows).on_stage(stage(new=0.75, replay_old=0.25))
    loss = objective.loss(student, batch)
    loss.total.backward()
    found = gradients(student)
    plain, _ = plugins.build("objectives", "next_token")
    total = nats = torch.zeros((), dtype=torch.float64)
    for taught in (0, 1):
        part, own = Batch(), [row for row, of in enumerate(source) if of == taught]
        part.inputs, part.targets = batch.inputs[own], batch.targets[own]
        one = (distillation([teacher], weight=0.6) if taught else plain).loss(student, part)
        total, nats = total + one.total, nats + one.nats
    total.backward()
    for one, other in zip(found, gradients(student), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert float(loss.nats) == pytest.approx(float(nats), rel=1e-12)
    assert int(loss.count) == int((batch.targets != IGNORED).sum())


def test_only_taught_rows_cost_a_teacher() -> None:
    teacher, data = Model(1), stage(new=3.0, replay_old=1.0)
    read: list[int] = []
    teacher.register_forward_pre_hook(lambda _, given: read.append(len(given[0])))
    objective = distillation([teacher], rows="replay")
    assert objective.share_read(data) == 0.25
    assert distillation([teacher]).share_read(data) == 1
    for source in ([0, 0, 0], [0, 1, 0]):
        objective.on_stage(data).loss(Model(0), Batch(3, source=source)).total.backward()
    assert read == [1]


@pytest.mark.parametrize(("rows", "message"), [(["nwe"], "Did you mean 'new'"), ("replay", "replays nothing")])
def test_rows_that_the_mixture_does_not_have_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        distillation([Model(1)], rows=rows).check(stage(new=1.0))


def test_bf16_autocast_stays_close() -> None:
    student, batch, objective = Model(0), Batch(8, 32), distillation([Model(1)], weight=0.7)
    objective.loss(student, batch).total.backward()
    exact = gradients(student)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss(student, batch)
    loss.total.backward()
    assert loss.nats.dtype == torch.float32
    for one, other in zip(gradients(student), exact, strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < 0.02


@pytest.mark.parametrize(
    ("given", "at"),
    [
        ({"teacher": []}, "teacher"),
        ({"teacher": "grandparent"}, "teacher"),
        ({"weight": 1.5}, "weight"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_settings_out_of_range_are_refused(given: dict[str, Any], at: str) -> None:
    _, problems = plugins.build("objectives", {"name": "distillation", **given})
    assert problems
    assert all(problem.loc[0] == at for problem in problems)
