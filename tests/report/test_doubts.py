"""Signs that an update was not chosen well, on records made to show them or not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from perennial.report.doubts import doubts
from perennial.report.page import render
from perennial.report.rows import NEW, OLD, Comparison, Row
from perennial.report.runs import Evaluation, Loss, Run

UNIT = "nats_per_token"
TOKENS = 100_000


def loss(nats: float) -> Loss:
    return Loss(nats, nats / 3)


def update(
    comparison: Comparison, old: list[float], new: list[float], rates: list[float], *, replayed: float = 0.05
) -> Row:
    """A finished update with these losses at even distances, and a rate that goes through these points."""
    model = next(row for row in comparison.rows if row.continued and row.run is not None)
    assert model.run is not None
    at = np.linspace(0, TOKENS, len(old)).round().astype(int)
    evaluations = tuple(
        Evaluation(int(t), 0.0, "during", {"old": loss(a), "new": loss(b)})
        for t, a, b in zip(at, old, new, strict=True)
    )
    positions = np.linspace(1000, TOKENS, len(model.run.training["tokens"]))
    rate = np.interp(positions, np.linspace(0, TOKENS, len(rates)), rates)
    run: Run = replace(
        model.run,
        evaluations=evaluations,
        tokens=TOKENS,
        training={**model.run.training, "tokens": positions, "rate": rate},
    )
    return replace(
        model,
        run=run,
        tokens=TOKENS,
        finished=True,
        roles={"old": OLD, "new": NEW},
        before=evaluations[0].corpora,
        after=evaluations[-1].corpora,
        forgetting=loss(old[-1] - old[0]),
        adaptation=loss(new[0] - new[-1]),
        replay_share=replayed,
    )


FALLING = [5.0, 4.2, 4.0, 3.9, 3.8]
USUAL_RATES = [1e-4, 1e-3, 7e-4, 3e-4, 1e-4]


@pytest.mark.parametrize(
    ("old", "rates", "replayed", "expected"),
    [
        ([3.0, 3.2, 3.1, 3.05, 3.04], USUAL_RATES, 0.05, []),
        ([3.0, 3.0, 3.0, 3.0, 3.01], USUAL_RATES, 0.05, []),  # 0.3% is not seen as a rise
        ([3.0, 3.0, 3.0, 3.05, 3.15], USUAL_RATES, 0.05, ["late rise"]),
        ([3.0, 3.3, 3.0, 3.05, 3.1], [1e-4, 2e-4, 3e-4, 4e-4, 5e-4], 0.05, []),  # rising with the rate
        ([3.0, 3.6, 3.5, 3.4, 3.3], USUAL_RATES, 0.05, ["much forgotten"]),
        ([3.0, 3.6, 3.5, 3.4, 3.3], USUAL_RATES, 0.5, []),  # there is little more to replay
        ([3.0, 3.3, 3.4, 3.5, 3.6], USUAL_RATES, None, ["late rise", "much forgotten"]),
    ],
)
def test_old_data(
    comparison: Comparison, old: list[float], rates: list[float], replayed: float, expected: list[str]
) -> None:
    row = update(comparison, old, FALLING, rates, replayed=replayed)
    assert [doubt.sign for doubt in doubts(row, UNIT)] == expected


@pytest.mark.parametrize(
    ("new", "rates", "expected"),
    [
        ([5.0, 4.2, 4.0, 4.0, 4.0], [1e-4, 1e-3, 5e-5, 1e-5, 1e-5], ["early decay"]),
        ([5.0, 4.2, 4.1, 3.95, 3.8], [1e-4, 1e-3, 5e-5, 1e-5, 1e-5], []),  # it still learned
        ([5.0, 4.2, 4.0, 4.0, 4.0], USUAL_RATES, []),
        ([5.0, 5.0, 5.0, 5.0, 5.1], [1e-4, 1e-3, 5e-5, 1e-5, 1e-5], []),  # nothing was learned at all
        ([5.0, 4.2, 4.0, 4.0, 4.0], [1e-4] * 5, []),  # never above a tenth and then below
    ],
)
def test_the_rate(comparison: Comparison, new: list[float], rates: list[float], expected: list[str]) -> None:
    row = update(comparison, [3.0] * 5, new, rates)
    assert [doubt.sign for doubt in doubts(row, UNIT)] == expected


def test_nothing_is_said_of_what_cannot_be_judged(comparison: Comparison) -> None:
    row = update(comparison, [3.0, 3.3, 3.4, 3.5, 3.6], FALLING, USUAL_RATES)
    assert doubts(replace(row, finished=False), UNIT) == []
    assert doubts(replace(row, continued=False), UNIT) == []
    assert doubts(replace(row, run=None), UNIT) == []
    assert row.run is not None
    unseen = tuple(replace(e, corpora={"new": e.corpora["new"]}) for e in row.run.evaluations)
    blind = replace(row, run=replace(row.run, evaluations=unseen), before={}, forgetting=None)
    assert doubts(blind, UNIT) == []


def test_figures_and_the_page(comparison: Comparison) -> None:
    row = update(comparison, [3.0, 3.0, 3.0, 3.05, 3.15], FALLING, USUAL_RATES)
    found = doubts(row, UNIT)[0]
    assert "rose by 0.100 over the last 25% of the update" in found.seen
    page = render(replace(comparison, rows=(*comparison.rows, replace(row, label="odd"))))
    assert "Where the choice looks wrong" in page
    assert "late rise" in page
