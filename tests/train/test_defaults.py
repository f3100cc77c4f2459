"""The defaults that `doctor` shows and every run records say what the machine has."""

from __future__ import annotations

import pytest
import torch

from perennial.train import defaults as described
from perennial.train import precision


def test_every_default_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    found = described.defaults(torch.device("cpu"))
    assert found.keys() == {"threads", "precision", "optimizer", "attention", "loss", "freed memory", "compile"}
    assert found["threads"] == f"{torch.get_num_threads()} that sleep while they wait"
    assert "blocks of 128" in found["attention"]
    assert "512 tokens" in found["loss"]


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (["AVX512-BF16"], "bf16: this CPU multiplies bf16 natively (AVX512-BF16)"),
        (["AVX512-BF16", "AMX"], "bf16: this CPU multiplies bf16 natively (AVX512-BF16, AMX)"),
        ([], "fp32: this CPU would emulate bf16"),
    ],
)
def test_precision_follows_the_units_of_the_cpu(
    units: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "bf16_units", lambda: units)
    monkeypatch.setattr(described, "bf16_units", lambda: units)
    assert described.defaults(torch.device("cpu"))["precision"] == expected
