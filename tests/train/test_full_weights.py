"""Checkpoints of a model that is stored in 16 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from perennial.core.errors import UserError
from perennial.core.lineage import STATE_FOLDER
from perennial.model.huggingface import load_model, save_model
from perennial.train.full_weights import load_full_weights, save_full_weights
from tests.model.models import tiny_model


def stored_short(tmp_path: Path) -> Path:
    save_model(tiny_model(), tmp_path / "short", dtype=torch.bfloat16)
    return tmp_path / "short"


def test_what_bf16_cannot_hold_is_kept_beside_it(tmp_path: Path) -> None:
    model = load_model(stored_short(tmp_path))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-4 * torch.randn_like(parameter)  # lost in bf16
    save_model(model, tmp_path / "next")
    save_full_weights(model, model.stored_dtypes.values(), tmp_path / "next" / STATE_FOLDER)
    rounded = load_model(tmp_path / "next")
    assert set(rounded.stored_dtypes.values()) == {torch.bfloat16}
    assert not torch.equal(rounded.head_weight, model.head_weight)
    load_full_weights(rounded, tmp_path / "next")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, rounded.get_parameter(name))


def test_nothing_is_written_where_nothing_is_lost(tmp_path: Path) -> None:
    save_full_weights(tiny_model(), [], tmp_path)
    save_full_weights(tiny_model(), [torch.float32], tmp_path)
    assert list(tmp_path.iterdir()) == []
    load_full_weights(tiny_model(), tmp_path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_full_weights(tiny_model(layers=3), [torch.bfloat16], tmp_path / STATE_FOLDER)
    with pytest.raises(UserError, match=r"is not of the model beside it: model\.layers\.2\."):
        load_full_weights(tiny_model(), tmp_path)
