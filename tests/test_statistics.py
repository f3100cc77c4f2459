"""Statistics against printed tables, and coverage on data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from perennial.core.errors import UserError
from perennial.core.statistics import (
    bootstrap_interval,
    mean_interval,
    paired_interval,
    paired_p_value,
    t_quantile,
    t_tail,
    verdict,
)

TABLE = [  # probability, degrees of freedom, quantile: the usual printed table of Student's t
    (0.975, 1, 12.706),
    (0.975, 2, 4.303),
    (0.975, 3, 3.182),
    (0.975, 4, 2.776),
    (0.975, 9, 2.262),
    (0.975, 10, 2.228),
    (0.975, 30, 2.042),
    (0.975, 120, 1.980),
    (0.95, 1, 6.314),
    (0.95, 5, 2.015),
    (0.995, 2, 9.925),
    (0.995, 7, 3.499),
    (0.9995, 3, 12.924),
    (0.9, 8, 1.397),
]


@pytest.mark.parametrize(("probability", "degrees", "quantile"), TABLE)
def test_t_quantile_is_that_of_the_table(probability: float, degrees: int, quantile: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(quantile, abs=5.1e-4)
    assert t_quantile(1 - probability, degrees) == pytest.approx(-t_quantile(probability, degrees))
    assert t_tail(t_quantile(probability, degrees), degrees) == pytest.approx(1 - probability, rel=1e-8)


def test_t_tail_in_closed_form() -> None:
    for t in (0.0, 0.3, 1.0, 7.5):
        assert t_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-12)
        assert t_tail(t, 2) == pytest.approx(0.5 - t / math.sqrt(2 + t * t) / 2, rel=1e-10)
        assert t_tail(-t, 5) == pytest.approx(1 - t_tail(t, 5))
    assert t_tail(1.959964, 100_000) == pytest.approx(0.025, rel=1e-3)  # nearly normal


def test_mean_interval_by_hand() -> None:
    interval = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert (interval.estimate, interval.count) == (3.0, 5)
    assert (interval.low, interval.high) == (pytest.approx(3 - half), pytest.approx(3 + half))
    assert interval.text(2) == "3.00 (95% interval 1.04 to 4.96, n = 5)"
    one = mean_interval([2.0])
    assert one.low == -math.inf
    assert one.high == math.inf
    assert one.text() == "2.000 (one value, no interval)"


def test_paired_interval_cancels_what_the_seeds_share() -> None:
    first = np.array([1.0, 5.0, 9.0])
    interval = paired_interval(first, first - [0.1, 0.2, 0.3])
    assert interval.estimate == pytest.approx(-0.2)
    assert interval.high - interval.low == pytest.approx(2 * 4.302653 * 0.1 / math.sqrt(3))
    assert paired_p_value(first, first - [0.1, 0.2, 0.3]) == pytest.approx(2 * t_tail(0.2 / (0.1 / math.sqrt(3)), 2))


@pytest.mark.parametrize("count", [3, 5, 10])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_mean_interval_covers_at_the_stated_rate(count: int, confidence: float) -> None:
    trials, generator = 4000, np.random.default_rng(count)
    samples = generator.normal(7.0, 2.0, size=(trials, count))
    intervals = [mean_interval(sample, confidence=confidence) for sample in samples]
    covered = sum(interval.low <= 7.0 <= interval.high for interval in intervals) / trials
    assert covered == pytest.approx(confidence, abs=4 * math.sqrt(confidence * (1 - confidence) / trials))


@pytest.mark.parametrize("count", [10, 20])
def test_bootstrap_interval_covers_at_the_stated_rate(count: int) -> None:
    trials, generator = 400, np.random.default_rng(count)
    covered = 0
    for sample in generator.normal(7.0, 2.0, size=(trials, count)):
        interval = bootstrap_interval(sample, resamples=500)
        covered += interval.low <= 7.0 <= interval.high
    assert 0.92 <= covered / trials <= 0.98  # binomial noise of 400 trials is 0.011


def test_bootstrap_interval_of_another_statistic() -> None:
    sample = np.random.default_rng(0).exponential(size=200)
    interval = bootstrap_interval(sample, np.median)
    assert interval.low < math.log(2) < interval.high
    assert interval.estimate == np.median(sample)
    assert interval == bootstrap_interval(sample, np.median), "the same seed gives the same interval"
    assert interval != bootstrap_interval(sample, np.median, seed=1)


def test_verdict_has_the_stated_false_positive_rate_on_null_data() -> None:
    trials, generator = 2000, np.random.default_rng(3)
    decisions = []
    for _ in range(trials):
        shared = generator.normal(size=5)
        decisions.append(verdict(shared + generator.normal(size=5), shared + generator.normal(size=5)).decision)
    wrong = sum(decision != "undecided" for decision in decisions) / trials
    assert wrong == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / trials))
    assert abs(decisions.count("better") - decisions.count("worse")) < 60


def test_verdict_in_words() -> None:
    first, second = [2.00, 2.10, 2.20], [1.90, 2.01, 2.11]
    judged = verdict(first, second, names=("adamw", "muon"), quantity="validation loss", digits=3)
    assert judged.decision == "better"
    assert judged.p_value < 0.05
    assert judged.text == (
        "muon is better than adamw: validation loss differs by -0.093 "
        "(95% interval -0.108 to -0.079, p = 0.0013, 3 paired seeds)"
    )
    assert verdict(second, first).decision == "worse"
    assert verdict(first, second, lower_is_better=False, quantity="accuracy").decision == "worse"
    assert verdict(first, [2.01, 2.05, 2.24]).decision == "undecided"
    assert verdict(first, [2.001, 2.101, 2.1995], margin=0.01).decision == "equal"
    assert verdict(first, second, margin=0.01).decision == "better"
    assert verdict(first, first).decision == "equal"
    alone = verdict([2.0], [1.0])
    assert alone.decision == "undecided"
    assert alone.text.endswith("one seed")


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [[1.0, 2.0]]])
def test_samples_that_are_none_are_refused(values: list[float]) -> None:
    with pytest.raises(UserError, match="finite numbers"):
        mean_interval(values)


def test_unpaired_values_are_refused() -> None:
    with pytest.raises(UserError, match="not 2 and 3"):
        paired_interval([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="inside"):
        t_quantile(1.0, 3)
