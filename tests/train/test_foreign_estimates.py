"""Estimates of a past that nobody recorded, and how the first update is trained: rules, figures and their limits."""

from __future__ import annotations

import math

import pytest

from perennial.core.amounts import Amount
from perennial.core.errors import UserError
from perennial.model.config import ModelConfig
from perennial.train.origin import (
    MIN_UPDATES,
    PEAKS,
    Machine,
    batch_rows,
    budget_tokens,
    critical_batch_tokens,
    estimated_peak,
    first_manner,
    micro_batch_rows,
    past,
    row_tokens,
    stated_facts,
)
from perennial.train.recipe import ParentFacts

CONFIG = ModelConfig(vocabulary_size=500, width=64, layers=2, heads=2, mlp_width=128, context=2048)


def test_the_peak_follows_the_table_and_is_held_outside() -> None:
    for parameters, peak in PEAKS:
        assert estimated_peak(parameters) == peak
    sizes = [10 ** (6 + i / 20) for i in range(120)]
    peaks = [estimated_peak(size) for size in sizes]
    assert peaks == sorted(peaks, reverse=True)
    assert (estimated_peak(1e6), estimated_peak(1e12)) == (1e-3, 0.6e-4)
    assert estimated_peak(math.sqrt(125e6 * 350e6)) == pytest.approx(math.sqrt(6e-4 * 3e-4), rel=0.01)


def test_what_is_not_stated_is_estimated_and_says_how() -> None:
    facts = past(10**9, ParentFacts())
    assert {name: fact.value for name, fact in facts.items()} == {
        "tokens": 20e9,
        "peak": pytest.approx(2.26e-4, rel=0.02),
        "rate": pytest.approx(facts["peak"].value / 10),
        "flops": 6 * 1e9 * 20e9,
    }
    assert all(fact.is_estimate for fact in facts.values())
    assert "2203.15556" in facts["tokens"].basis
    assert "lower bound" in facts["tokens"].basis
    assert "2005.14165" in facts["peak"].basis


def test_what_is_stated_decides_the_rest() -> None:
    facts = past(10**9, stated_facts(["rate=3e-5", "flops=6e21"]))
    assert (facts["rate"].is_estimate, facts["flops"].is_estimate) == (False, False)
    assert (facts["peak"].value, facts["peak"].is_estimate) == (3e-4, True)
    assert (facts["tokens"].value, facts["tokens"].is_estimate) == (pytest.approx(1e12), True)
    assert past(10**9, stated_facts(["tokens=2T"]))["flops"].value == pytest.approx(1.2e22)


@pytest.mark.parametrize("text", ["tokens=2T", "tokens=2T tokens", "tokens=2e12", "tokens=2_000_000_000_000"])
def test_tokens_need_no_unit_where_the_name_is_one(text: str) -> None:
    assert stated_facts([text]).tokens == Amount(2e12, "tokens")


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["peek=3e-4"], ["--parent 'peek=3e-4'", "tokens, flops, peak, rate", "Did you mean 'peak'?"]),
        (["peak"], ["--parent peak=", "such as peak=3e-4"]),
        (["peak=high"], ["--parent peak=high"]),
        (["peak=0"], ["peak", "greater than 0", "0.0"]),
        (["rate=nan"], ["rate"]),
        (["tokens=2 h"], ["--parent tokens=2 h", "needed here"]),
        (["tokens=0"], ["tokens", "above 0"]),
        (["tokens=-2T"], ["not a finite amount"]),
        (["peak=1e-4", "peak=2e-4"], ["'peak' is given twice"]),
        (["peak=1e-4", "rate=2e-4"], ["rate 0.0002 is above peak 0.0001"]),
    ],
)
def test_facts_that_are_none(texts: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        stated_facts(texts)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert str(error.value).startswith("--parent")


def test_the_critical_batch_is_the_papers() -> None:
    """Zhang et al. 2024, figure 1: 22.91 x (D in millions)^0.47 sequences of 512 tokens."""
    for tokens in (1e8, 1e10):
        assert critical_batch_tokens(tokens) == pytest.approx(512 * 22.91 * (tokens / 1e6) ** 0.47, rel=0.03)


@pytest.mark.parametrize(
    ("tokens", "context", "device", "length", "rows"),
    [
        (10e9, 131072, "cuda", 4096, 256),
        (10e6, 8192, "cpu", 1024, 32),
        (10e6, 300, "cpu", 300, 128),
        (200e3, 256, "cpu", 256, 8),
        (20e3, 4096, "cpu", 256, 1),
        (1e3, 4096, "cpu", 128, 1),
        (1e3, 64, "cpu", 64, 1),
    ],
)
def test_rows_and_batch(tokens: float, context: int, device: str, length: int, rows: int) -> None:
    assert row_tokens(context, tokens, device) == length
    assert batch_rows(tokens, length) == rows
    assert tokens / (rows * length) >= MIN_UPDATES or rows == 1


def test_the_micro_batch_fits_in_half_of_the_memory() -> None:
    few, many = (micro_batch_rows(CONFIG, 64, 128, Machine("cpu", "fp32", free)) for free in (20e6, 1e9))
    assert 1 <= few < many == 64
    assert 64 % few == 0
    assert micro_batch_rows(CONFIG, 64, 128, Machine("cpu", "fp32", 1.0)) == 1
    assert micro_batch_rows(CONFIG, 64, 128, Machine("cpu", "fp32", None)) == 64


def test_the_first_update_is_explained() -> None:
    manner, reasons = first_manner(CONFIG, 10e6, Machine("cpu", "fp32", 1e10))
    assert manner.batch == {"sequences": 32, "sequence_length": 1024, "micro_batch": 32}
    assert (manner.optimizer, manner.optimizer_state, manner.clip) == ("adamw", "reset", 1.0)
    assert [any(word in reason for reason in reasons) for word in ("2410.21676", "fresh state", "--set")] == [True] * 3
    again, _ = first_manner(CONFIG, 10e6, Machine("cpu", "fp32", 1.0), micro_batch=16)
    assert again.batch["micro_batch"] == 16  # what the run began with, whatever is free now


def test_a_budget_in_tokens() -> None:
    assert budget_tokens(Amount(5e6, "tokens"), 1000, "--tokens") == 5e6
    assert budget_tokens(Amount(6e9, "flops"), 1000, "--tokens") == 1e6
    with pytest.raises(UserError, match="--tokens '3 h'.*tokens or FLOPs"):
        budget_tokens(Amount(3.0, "seconds"), 1000, "--tokens '3 h'")
