"""Each schedule against its published formula, written out a second time here, and its refusals."""

from __future__ import annotations

from math import cos, exp, log, pi, sqrt
from typing import Any

import pytest

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.schedules.base import Schedule

EXACT = 1e-13  # relative: float64 rounding of a few operations


def schedule(name: str, **settings: Any) -> Schedule:
    built, problems = plugins.build("schedules", {"name": name, **settings})
    assert not problems, problems
    return built


def problem(name: str, **settings: Any) -> str:
    built, problems = plugins.build("schedules", {"name": name, **settings})
    assert built is None
    assert len(problems) == 1, problems
    return problems[0].message


def test_constant() -> None:
    s = schedule("constant", peak=1e-3, start=2e-4, warmup="20K tokens")
    assert s.rate(0, 1e5) == 2e-4
    assert s.rate(5_000, 1e5) == pytest.approx(4e-4, rel=EXACT)
    assert s.rate(20_000, 1e5) == s.rate(20_001, 1e5) == s.rate(1e9, 1e5) == 1e-3
    assert schedule("constant", peak=3e-5).rate(0, 1e5) == 3e-5


def test_linear() -> None:
    s = schedule("linear", peak=1e-3, final=1e-4, warmup="10%")
    assert [s.rate(t, 1000) for t in (0, 100, 1000)] == [0, 1e-3, 1e-4]
    assert s.rate(50, 1000) == pytest.approx(5e-4, rel=EXACT)
    assert s.rate(700, 1000) == pytest.approx(1e-3 - 9e-4 * 600 / 900, rel=EXACT)


def test_cosine_is_equation_2_of_ibrahim() -> None:
    peak, final, warm, end = 3e-4, 3e-5, 3e9, 3e11
    s = schedule("cosine", peak=peak, final=final)
    assert [s.rate(t, end) for t in (0, warm, end)] == [0, peak, final]
    assert s.rate(1e9, end) == pytest.approx(peak / 3, rel=EXACT)
    for t in (4e9, 7.7e10, 1.515e11, 2.9e11):
        expected = final + (peak - final) / 2 * (cos(pi * (t - warm) / (end - warm)) + 1)
        assert s.rate(t, end) == pytest.approx(expected, rel=EXACT)
    assert s.rate(1.515e11, end) == pytest.approx((peak + final) / 2, rel=EXACT)  # halfway through the decay
    assert schedule("cosine", peak=peak).rate(end, end) == pytest.approx(peak / 10, rel=EXACT)


def test_rewarm_starts_at_the_parents_rate_and_ends_at_a_tenth_of_the_peak() -> None:
    s = schedule("rewarm", start=3e-5, peak=3e-4, warmup="1%")
    assert s.rate(0, 1e6) == 3e-5
    assert s.rate(5e3, 1e6) == pytest.approx(1.65e-4, rel=EXACT)
    assert s.rate(1e4, 1e6) == 3e-4
    assert s.rate(1e6, 1e6) == pytest.approx(3e-5, rel=EXACT)
    cosine = schedule("cosine", start=3e-5, peak=3e-4, warmup="1%")
    assert all(s.rate(t, 1e6) == cosine.rate(t, 1e6) for t in range(0, 1_000_001, 9973))


def test_inverse_square_root() -> None:
    s = schedule("inverse_square_root", peak=1e-3, final=3e-5, warmup="10K tokens", cooldown="40K tokens")
    assert [s.rate(t, 1e5) for t in (0, 1e4, 1e5)] == [0, 1e-3, 3e-5]
    for t in (2e4, 4e4, 6e4):
        assert s.rate(t, 1e5) == pytest.approx((1e-3 - 3e-5) * sqrt(1e4 / t) + 3e-5, rel=EXACT)
    top = (1e-3 - 3e-5) * sqrt(1e4 / 6e4) + 3e-5
    assert s.rate(7e4, 1e5) == pytest.approx(top + (3e-5 - top) / 4, rel=EXACT)
    endless = schedule("inverse_square_root", peak=1e-3, warmup="10K tokens")
    assert endless.rate(4e6, 1e5) == pytest.approx(1e-3 / 20, rel=EXACT)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", lambda s: 1e-3 + (1e-4 - 1e-3) * s),
        ("sqrt", lambda s: 1e-4 + 9e-4 * (1 - sqrt(s))),
        ("exponential", lambda s: exp(log(1e-3) + s * (log(1e-4) - log(1e-3)))),
        ("inverse", lambda s: 1e-3 / (1 + (1e-3 / 1e-4 - 1) * s)),  # as Levanter writes it
    ],
)
def test_wsd(shape: str, expected: Any) -> None:
    s = schedule("wsd", peak=1e-3, final=1e-4, warmup="1%", decay="10%", decay_shape=shape)
    assert s.phases(1e6) == [("warmup", 0, 1e4), ("stable", 1e4, 9e5), ("decay", 9e5, 1e6)]
    assert s.rate(2.5e3, 1e6) == pytest.approx(2.5e-4, rel=EXACT)
    assert s.rate(1e4, 1e6) == s.rate(5e5, 1e6) == s.rate(9e5, 1e6) == 1e-3
    assert s.rate(1e6, 1e6) == 1e-4
    for share in (0.01, 0.25, 0.5, 0.99):
        assert s.rate(9e5 + share * 1e5, 1e6) == pytest.approx(expected(share), rel=1e-10)


def test_wsd_s_in_the_setting_of_levanter() -> None:
    # Minima at 300 and 700 of 1000, no warm-up, each decay a tenth of its cycle, down to a tenth of the peak.
    s = schedule("wsd_s", peak=1e-3, final="10%", cycles=["300 tokens", "700 tokens"], warmup="0%", decay="10%")
    assert s.phases(1000) == [
        ("stable 1", 0, 270),
        ("decay 1", 270, 300),
        ("stable 2", 300, 660),
        ("decay 2", 660, 700),
        ("stable 3", 700, 970),
        ("decay 3", 970, 1000),
    ]
    assert s.restarts(1000) == (300, 700)
    assert s.rate(300, 1000) == pytest.approx(1e-4, rel=EXACT)  # the checkpoint of the cycle is the decayed one
    assert s.rate(300.001, 1000) == 1e-3  # and the next update is back at the peak
    assert s.rate(680, 1000) == pytest.approx(1e-3 / (1 + 9 * 0.5), rel=EXACT)
    assert s.rate(1000, 1000) == pytest.approx(1e-4, rel=EXACT)


def test_wsd_s_with_a_number_of_cycles_splits_the_stage_evenly() -> None:
    s = schedule("wsd_s", peak=1e-3, cycles=4, warmup="5%", decay="20%", decay_shape="linear", final=0)
    assert s.restarts(1000) == (250, 500, 750)
    assert s.phases(1000)[:3] == [("warmup", 0, 50), ("stable 1", 50, 200), ("decay 1", 200, 250)]
    assert s.rate(225, 1000) == pytest.approx(5e-4, rel=EXACT)
    assert s.rate(1000, 1000) == 0


@pytest.mark.parametrize("shape", ["cosine", "inverse_square_root"])
def test_infinite_with_the_values_of_the_405m_model(shape: str) -> None:
    s = schedule("infinite", peak=3e-4, constant=1.65e-4, final=3e-5, cooldown_shape=shape)
    end = 3e11
    assert [name for name, _, _ in s.phases(end)] == ["warmup", "cooldown", "constant", "anneal"]
    assert [stop / end for _, _, stop in s.phases(end)] == pytest.approx([0.01, 0.61, 0.86, 1.0])
    assert [s.rate(share * end, end) for share in (0, 0.01, 0.7, 0.85, 1)] == [0, 3e-4, 1.65e-4, 1.65e-4, 3e-5]
    for n in (0.1, 0.3, 0.5):  # share of the stage since the end of the warm-up; the cooldown lasts 0.6
        if shape == "cosine":
            expected_rate = 1.65e-4 + (3e-4 - 1.65e-4) / 2 * (cos(pi * n / 0.6) + 1)
        else:
            h = [1 / sqrt(1 + 10 * x) - 1 for x in (n / 0.6, 1)]
            expected_rate = 3e-4 + (1.65e-4 - 3e-4) / h[1] * h[0]
        assert s.rate((0.01 + n) * end, end) == pytest.approx(expected_rate, rel=1e-10)
    for n in (0.88, 0.93, 0.99):
        assert s.rate(n * end, end) == pytest.approx(1.65e-4 * (3e-5 / 1.65e-4) ** ((n - 0.86) / 0.14), rel=1e-10)
    assert schedule("infinite", peak=3e-4).rate(0.7 * end, end) == pytest.approx(1.65e-4, rel=EXACT)


def test_infinite_goes_on_from_its_constant_phase() -> None:
    first = schedule("infinite", peak=3e-4, warmup="10K tokens", cooldown="30K tokens", anneal="0%")
    second = schedule("infinite", peak=3e-4, warmup="0%", cooldown="0%", anneal="14%")
    assert not first.needs_horizon
    assert second.rate(0, 1e5) == first.rate(9e4, 9e4) == first.rate(1e12, 9e4)


def test_a_tenth_of_the_peak_may_be_written_as_a_share() -> None:
    assert schedule("wsd", peak=2e-3, final="10%").rate(1e5, 1e5) == 2e-4
    assert schedule("cosine", peak="2e-3", final="2e-4").rate(1e5, 1e5) == 2e-4  # YAML 1.1 reads 2e-3 as a text


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("wsd", {"peak": 1e-3, "warmup": "60%", "decay": "50%"}, ["warmup 60%", "decay 50%", "110%"]),
        ("linear", {"peak": 1e-3, "warmup": "120%"}, ["warmup 120%", "100%"]),
        ("infinite", {"peak": 1e-3, "warmup": "30%"}, ["warmup 30%", "cooldown 60%", "anneal 14%"]),
        ("inverse_square_root", {"peak": 1e-3, "warmup": "0%"}, ["warmup", "time scale"]),
        ("inverse_square_root", {"peak": 1e-3, "warmup": "50%", "cooldown": "51%"}, ["warmup 50%", "cooldown 51%"]),
        ("cosine", {"peak": 1e-3, "final": 2e-3}, ["final 0.002", "peak 0.001"]),
        ("cosine", {"peak": 1e-3, "final": "110%"}, ["final", "peak"]),
        ("infinite", {"peak": 1e-3, "constant": 1e-5}, ["final 0.0001", "constant 1e-05"]),
        ("infinite", {"peak": 1e-3, "final": 0}, ["anneal", "never reaches"]),
        ("infinite", {"peak": 1e-3, "timescale": 3}, ["timescale 3", "cosine"]),
        ("wsd", {"peak": 1e-3, "final": 0, "decay_shape": "exponential"}, ["decay_shape", "never reaches"]),
        ("wsd_s", {"peak": 1e-3, "cycles": 0}, ["1 or more"]),
        ("wsd_s", {"peak": 1e-3, "cycles": ["70%", "30%"]}, ["rise"]),
        ("wsd_s", {"peak": 1e-3}, ["required"]),
        ("rewarm", {"peak": 1e-3}, ["required"]),
        ("constant", {"peak": -1.0}, ["greater than 0"]),
        ("constant", {"peak": float("nan")}, ["nan"]),
        ("cosine", {"peak": 1e-3, "final": -1e-5}, ["0 or more", "-1e-05"]),
        ("cosine", {"peak": 1e-3, "final": "3e9 tokens"}, ["'10%'"]),
        ("cosine", {"peak": 1e-3, "warmup": 0.01}, ["unit"]),
        ("cosine", {"peak": 1e-3, "warmpu": "1%"}, ["'warmup'"]),
    ],
)
def test_contradictions_are_refused_by_name(name: str, settings: dict[str, Any], words: list[str]) -> None:
    message = problem(name, **settings)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("wsd", {"warmup": "80K tokens", "decay": "30%"}, ["warmup 80000 tokens", "decay 30%", "100K tokens", "110K"]),
        ("cosine", {"warmup": "2M tokens"}, ["warmup 2000000 tokens", "100K tokens"]),
        ("wsd_s", {"cycles": ["20K tokens", "300K tokens"]}, ["20000 tokens", "300000 tokens", "100K tokens"]),
        ("wsd_s", {"cycles": 10, "warmup": "8%", "decay": "5K tokens"}, ["warmup 8%", "decay 5000 tokens", "cycle 1"]),
        ("wsd_s", {"cycles": ["50K tokens", "52K tokens"], "decay": "3K tokens"}, ["decay 3000 tokens", "cycle 2"]),
    ],
)
def test_lengths_that_do_not_fit_the_stage_are_refused(name: str, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        schedule(name, peak=1e-3, **settings).phases(1e5)
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize("horizon", [0.0, -1.0, float("inf"), float("nan")])
def test_a_horizon_is_needed(horizon: float) -> None:
    with pytest.raises(UserError, match="length of its stage"):
        schedule("cosine", peak=1e-3).rate(0, horizon)
