"""FLOPs by each count, of dense models and mixtures of experts, recomputed and frozen."""

from __future__ import annotations

import pytest

from perennial.core.errors import UserError
from perennial.model import cost
from perennial.model.config import ModelConfig
from perennial.model.flops import Dimensions, forward_flops_per_token, training_flops

DENSE = Dimensions(width=64, layers=2, heads=4, attention_width=64, key_width=32, mlp_width=160, vocabulary_size=1000)
EXPERTS = Dimensions(
    width=64,
    layers=2,
    heads=4,
    attention_width=64,
    key_width=32,
    mlp_width=160,
    vocabulary_size=1000,
    experts=8,
    active_experts=2,
    shared_experts=1,
)
LENGTH = 128


def test_counts_differ_by_what_they_leave_out() -> None:
    six, causal, full, appendix = (
        forward_flops_per_token(DENSE, LENGTH, count) for count in ("6nd", "causal", "attention", "chinchilla")
    )
    scores = 4 * 2 * 64 * LENGTH
    assert six == 2 * (2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160) + 64_000)
    assert full - six == scores
    assert causal - six == scores / 2
    assert appendix - full == 3 * 2 * 4 * LENGTH + 2 * 64_000


def test_training_is_three_forward_passes_and_6nd() -> None:
    tokens = 1e6
    six = training_flops(DENSE, tokens, LENGTH, count="6nd")
    assert six.model == six.hardware == 6 * (DENSE.active_matrix_parameters + DENSE.head) * tokens


def test_recomputation_and_frozen_weights() -> None:
    plain = training_flops(DENSE, 1.0, LENGTH)
    again = training_flops(DENSE, 1.0, LENGTH, recomputed_share=1.0)
    frozen = training_flops(DENSE, 1.0, LENGTH, frozen_share=1.0)
    assert again.model == plain.model
    assert again.hardware / plain.hardware == pytest.approx(4 / 3)
    assert frozen.model / plain.model == pytest.approx(2 / 3)


def test_experts_cost_what_a_token_meets() -> None:
    expert, attention, router = 3 * 64 * 160, 2 * 64 * (64 + 32), 64 * 8
    assert EXPERTS.matrix_parameters == 2 * (attention + router + 9 * expert)
    assert EXPERTS.active_matrix_parameters == 2 * (attention + router + 3 * expert)
    assert DENSE.matrix_parameters == DENSE.active_matrix_parameters


def test_dimensions_of_a_configuration_are_its_parameters() -> None:
    config = ModelConfig.from_preset("124m", 4096)
    assert cost.dimensions(config).matrix_parameters == cost.num_parameters(config).matrix


@pytest.mark.parametrize(
    ("change", "message"),
    [({"layers": 0}, "layers 0"), ({"active_experts": 9}, "active_experts 9"), ({"shared_experts": -1}, "-1")],
)
def test_impossible_dimensions(change: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Dimensions(**{**vars(EXPERTS), **change})


def test_shares_outside_0_to_1() -> None:
    with pytest.raises(UserError, match=r"recomputed_share 1.5"):
        training_flops(DENSE, 1.0, LENGTH, recomputed_share=1.5)
