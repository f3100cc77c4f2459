"""The shape of a model: defaults, contradictions, presets."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from perennial.core.errors import UserError
from perennial.core.settings import check
from perennial.model.config import ModelConfig
from perennial.model.cost import num_parameters
from perennial.model.presets import PRESETS

SHAPE = {"vocabulary_size": 97, "width": 64, "layers": 2, "heads": 4, "mlp_width": 96}


def problems(**overrides: Any) -> list[str]:
    _, found = check(ModelConfig, {**SHAPE, **overrides})
    return [problem.text({}) for problem in found]


def test_every_head_has_its_own_keys_and_heads_share_the_width_unless_told_otherwise() -> None:
    config = ModelConfig.model_validate(SHAPE)
    assert (config.kv_heads, config.head_width) == (4, 16)
    assert ModelConfig.model_validate({**SHAPE, "kv_heads": 2, "head_width": 20}).head_width == 20


def test_a_configuration_survives_json() -> None:
    config = ModelConfig.model_validate({**SHAPE, "qk_norm": "head", "kv_heads": 1})
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"heads": 5}, "width 64 must be a multiple of heads 5, or head_width given"),
        ({"heads": 5, "head_width": 12}, "Llama's format asks for"),
        ({"kv_heads": 3}, "heads 4 must be a multiple of kv_heads 3"),
        ({"kv_heads": 8}, "heads 4 must be a multiple of kv_heads 8"),
        ({"head_width": 15}, "head_width 15 must be even"),
        ({"width": 12}, "head_width 3 must be even"),
        ({"layers": 0}, "layers: Input should be greater than 0 (got 0)"),
        ({"initial_std": -1}, "initial_std"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"hidden": 3}, "unknown setting 'hidden'"),
        ({"mlp_widht": 96}, "Did you mean 'mlp_width'?"),
    ],
)
def test_a_wrong_dimension_is_named(overrides: dict[str, Any], expected: str) -> None:
    found = problems(**overrides)
    assert len(found) == 1
    assert expected in found[0]


def test_qk_norm_frees_the_width_from_the_heads() -> None:
    assert problems(heads=5, head_width=12, qk_norm="head") == []
    assert len(problems(heads=5, qk_norm="head")) == 1


@pytest.mark.parametrize("value", ["many", None, -4, 0, 1.5])
def test_what_follows_from_a_wrong_value_is_not_reported_too(value: Any) -> None:
    found = problems(heads=value)
    assert [text.partition(":")[0] for text in found] == ["heads"]


def test_contradictions_are_listed_together() -> None:
    (found,) = problems(heads=3, kv_heads=2, head_width=5, qk_norm="head")
    assert found == "heads 3 must be a multiple of kv_heads 2; head_width 5 must be even: rotary positions turn pairs"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_as_many_parameters_as_its_name_says(name: str) -> None:
    config = ModelConfig.from_preset(name, 4096)
    nominal = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert num_parameters(config).non_embedding == pytest.approx(nominal, rel=0.05)
    assert 2.4 < config.mlp_width / config.width <= 4
    assert config.heads * config.head_width == config.width


def test_presets_take_overrides() -> None:
    config = ModelConfig.from_preset("2m", vocabulary_size=4096, heads=6, qk_norm="head", context=512)
    assert (config.heads, config.kv_heads, config.head_width, config.context) == (6, 6, 32, 512)
    assert ModelConfig.from_preset("1b", 4096, heads=16).kv_heads == 8


def test_a_wrong_preset_or_override_gets_the_nearest_spelling() -> None:
    with pytest.raises(UserError, match="no model preset '2M'.*Did you mean '2m'"):
        ModelConfig.from_preset("2M", 4096)
    with pytest.raises(UserError, match=r"(?s)preset '2m': 1 problem.*Did you mean 'width'"):
        ModelConfig.from_preset("2m", 4096, widht=3)


def test_shapes_and_costs_need_no_torch() -> None:
    code = (
        "import sys, perennial.model.config, perennial.model.cost, perennial.model.presets, perennial.model.roles;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
