"""The shift between two texts as a model sees it: in the unit in which they are further apart."""

from __future__ import annotations

import pytest

from perennial.evals.shift import Shift, shift_between


def losses(**corpora: tuple[float, float]) -> dict[str, dict[str, float]]:
    """Name -> (bits per byte, nats per token), as an evaluation has them."""
    return {name: {"bits_per_byte": bits, "nats_per_token": nats} for name, (bits, nats) in corpora.items()}


@pytest.mark.parametrize(
    ("new", "unit", "kind"),
    [
        ((1.93, 11.06), "nats per token", "strong"),  # Chinese: three bytes a character
        ((14.4, 4.7), "bits per byte", "strong"),  # cut into bytes by a tokenizer that does not know it
        ((0.8, 4.6), "nats per token", "weak"),
        ((3.0, 4.3), "bits per byte", "weak"),
    ],
)
def test_neither_bytes_nor_tokens_hide_a_shift(new: tuple[float, float], unit: str, kind: str) -> None:
    found = shift_between(losses(old=(2.89, 4.60), new=new), ["old"], ["new"])
    assert (found.unit, found.kind) == (unit, kind)


def test_a_model_that_knows_neither_text_sees_no_shift() -> None:
    found = shift_between(losses(old=(7.0, 6.93), new=(2.0, 6.93)), ["old"], ["new"])
    assert found.ratio == 1.0


def test_several_corpora_count_by_their_means() -> None:
    known = losses(a=(1.0, 2.0), b=(3.0, 4.0), c=(6.0, 1.0))
    assert shift_between(known, ["a", "b"], ["c"], on_stand_in=True) == Shift(2.0, 6.0, "bits per byte", True)
