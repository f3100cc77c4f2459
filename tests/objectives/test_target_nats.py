"""The loss of every target by itself, and of several models by the mean of their probabilities."""

from __future__ import annotations

import pytest
import torch

from perennial.objectives.base import IGNORED
from perennial.objectives.next_token import NextToken, target_nats
from perennial.train.measuring import measure_with_all
from tests.objectives.test_distillation import Batch, Model


@pytest.mark.parametrize("capped", [False, True])
def test_they_add_up_to_the_loss(capped: bool) -> None:
    model, batch = Model(0, capped=capped), Batch()
    nats = target_nats(model, batch)
    expected, _ = NextToken().evaluate(model, batch)
    assert float(nats.sum()) == pytest.approx(float(expected), rel=1e-6)
    assert not nats[batch.targets.flatten() == IGNORED].any()
    assert not nats.requires_grad


def test_an_ensemble_is_the_mean_of_probabilities() -> None:
    models, batch = [Model(seed, capped=seed == 1).double() for seed in range(3)], Batch()
    nats, count = measure_with_all(models)(batch.inputs, batch.targets, None)
    counted = batch.targets != IGNORED
    with torch.no_grad():
        shares = torch.stack([model.logits(batch.inputs).softmax(-1) for model in models]).mean(0)
    expected = -shares[counted].gather(-1, batch.targets[counted].unsqueeze(-1)).log().sum()
    assert float(nats) == pytest.approx(float(expected), rel=1e-12)
    assert int(count) == int(counted.sum())
    alone = [float(measure_with_all([model])(batch.inputs, batch.targets, None)[0]) for model in models]
    assert float(nats) < sum(alone) / 3
