"""Amounts with units: what is read, what is refused, and that each prints back as itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.core.amounts import Amount, Budget, Span, human, human_bytes, human_seconds, parse
from perennial.core.settings import Settings, check


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("2B tokens", 2e9, "tokens"),
        ("1.5M tok", 1.5e6, "tokens"),
        ("300k tokens", 3e5, "tokens"),
        ("1_000_000 tokens", 1e6, "tokens"),
        ("1,000 tokens", 1000, "tokens"),
        ("2T tokens", 2e12, "tokens"),
        ("1 token", 1, "tokens"),
        ("1e18 FLOPs", 1e18, "flops"),
        ("1E18flop", 1e18, "flops"),
        ("3 h", 10800, "seconds"),
        ("90 min", 5400, "seconds"),
        ("45s", 45, "seconds"),
        ("2 days", 172800, "seconds"),
        ("10%", 0.1, "share"),
        (" 12.5 % ", 0.125, "share"),
        (".5%", 0.005, "share"),
        ("0 tokens", 0, "tokens"),
    ],
)
def test_reads(text: str, value: float, unit: str) -> None:
    amount = parse(text)
    assert amount.value == pytest.approx(value, rel=1e-15)
    assert amount.unit == unit


@pytest.mark.parametrize("text", [2, 2.0, None, True, [], {}])
@pytest.mark.parametrize("unit", [("tokens",), ("share", "seconds")])
def test_refuses_what_is_no_text(text: object, unit: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="an amount with a unit is needed"):
        parse(text, unit)


WRONG = "2; 2B;; tokens;2B b;3 fortnights;2Q tokens;-1 tokens;nan tokens;1e999 tokens;1 2 tokens;1e tokens;10 % %;0x1 s"


@pytest.mark.parametrize("text", WRONG.split(";"))
def test_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"amount|unit|finite"):
        parse(text)


def test_says_what_is_needed_when_the_unit_is_wrong() -> None:
    with pytest.raises(ValueError, match="'3 h' is in seconds; needed here: '2B tokens' or '10%'"):
        parse("3 h", ("tokens", "share"))


@given(
    st.floats(min_value=0, max_value=1e30, allow_nan=False),
    st.sampled_from(["tokens", "flops", "seconds", "share"]),
)
def test_prints_back_as_itself(value: float, unit: str) -> None:
    once = parse(str(Amount(value, unit)))
    assert once.unit == unit
    assert once.value == pytest.approx(value, rel=1e-11)
    assert str(parse(str(once))) == str(once)


def test_whole_tokens_stay_whole() -> None:
    for number in (1, 999_999_937, 2**49 - 1):
        assert parse(str(Amount(number, "tokens"))).value == number


def test_share_is_taken_of_the_total() -> None:
    assert parse("25%").of(400) == 100
    assert parse("25 tokens").of(400) == 25


class _Both(Settings):
    budget: Budget
    warmup: Span = Amount(0.1, "share")


def test_settings_fields_take_only_their_units() -> None:
    found, problems = check(_Both, {"budget": "2M tokens", "warmup": "5%"})
    assert not problems
    assert found is not None
    assert found.model_dump(mode="json") == {"budget": "2000000 tokens", "warmup": "5%"}
    _, problems = check(_Both, {"budget": "10%", "warmup": "3 h"})
    assert [p.loc for p in problems] == [("budget",), ("warmup",)]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1234567, "1.23M"), (2e9, "2B"), (-5000, "-5K"), (3.5e12, "3.5T")]
)
def test_human(value: float, text: str) -> None:
    assert human(value) == text
    assert human(value, "tokens") == f"{text} tokens"


def test_human_seconds_and_bytes() -> None:
    assert [human_seconds(s) for s in (0.4, 42, 200, 18720, 183600)] == [
        "0 s",
        "42 s",
        "3 min 20 s",
        "5 h 12 min",
        "2 d 3 h",
    ]
    assert [human_bytes(b) for b in (12, 1536, 1610612736)] == ["12 B", "1.5 KiB", "1.5 GiB"]
