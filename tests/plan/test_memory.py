"""Planning memory: the mesh, what fits, and that advice, when it is followed, makes a run fit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.core.layout import Layout, choose_layout
from perennial.model.activations import activation_bytes
from perennial.model.config import ModelConfig
from perennial.model.foreign import TransformersConfig
from perennial.model.memory import estimate, fits_replicated, stand_in, state_by_kind
from perennial.model.memory_terms import Training
from perennial.plan.memory import Run, Stage, layout_of, micro_batch_of, parse_bytes, plan_memory, to_text

GIB = 1 << 30


def a_run(preset: str = "1b", **changes: Any) -> Run:
    """On GPUs, 16 rows of 2048 tokens."""
    optimizer = plugins.build("optimizers", changes.pop("optimizer", "adamw"))[0]
    settings: dict[str, Any] = {
        "config": ModelConfig.from_preset(preset, 32768),
        "stages": (Stage("only", optimizer, None, None),),
        "sequences": 16,
        "sequence_length": 2048,
        "micro_batch": None,
        "precision": "bf16",
        "device": "cuda",
        "limit_bytes": 80e9,
    }
    return Run(**{**settings, **changes})


def test_parts_add_up_and_each_has_its_words() -> None:
    plan = plan_memory(a_run(micro_batch=2))
    memory = plan.stages["only"]
    assert plan.total == memory.total == sum(memory.parts().values())
    text = to_text(plan)
    for name, size in memory.parts().items():
        assert (f"  {name.replace('_', ' ')} " in text) == (size > 0)
    assert plan.to_json()["stages"]["only"]["parts_bytes"] == memory.parts()
    assert plan.fits
    assert "Fits: " in text


def test_the_largest_micro_batch_is_the_largest() -> None:
    run = a_run(micro_batch=1, limit_bytes=40e9)
    largest = plan_memory(run).largest_micro_batch
    assert largest in (1, 2, 4, 8)
    assert plan_memory(replace(run, micro_batch=largest)).fits
    assert not plan_memory(replace(run, micro_batch=2 * largest)).fits


@pytest.mark.parametrize("limit", [12e9, 24e9, 40e9])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_advice_makes_it_fit(limit: float, precision: Any) -> None:
    """What is said to be needed is what a plan with those settings finds."""
    run = a_run(limit_bytes=limit, precision=precision)
    plan = plan_memory(run)
    assert not plan.fits
    assert plan.advice
    for step in plan.advice:
        words, _, devices = step.change.partition(" on ")
        given: dict[str, Any] = dict(word.split("=") for word in words.split())
        changed = replace(
            run,
            micro_batch=int(given.pop("batch.micro_batch", run.sequences)),
            checkpointing=given.pop("activation_checkpointing", run.checkpointing),
            precision=given.pop("precision", run.precision),
            shard=given.pop("parallel.shard", run.shard),
            processes=int(devices.partition(" ")[0] or 1),
        )
        assert not given
        assert plan_memory(changed).fits
        assert plan_memory(changed).total == step.total_bytes


def test_what_never_fits_says_so() -> None:
    plan = plan_memory(a_run("70b", limit_bytes=2e9, sequences=2))
    assert (plan.fits, plan.advice, plan.largest_micro_batch) == (False, (), None)
    assert "smaller model" in to_text(plan)


def test_sharding_divides_the_state_and_tensor_parts_the_matrices() -> None:
    one, eight = (plan_memory(a_run(processes=n, shard="full", micro_batch=1)) for n in (1, 8))
    assert eight.layout == Layout(shards=8)
    for part in ("parameters", "optimizer"):
        assert getattr(eight.stages["only"], part) == pytest.approx(getattr(one.stages["only"], part) / 8, rel=1e-3)
    assert eight.stages["only"].communication > 0
    divided = plan_memory(a_run(processes=2, tensor=2, shard="none", micro_batch=1)).stages["only"]
    whole = one.stages["only"]
    assert whole.parameters / 2 < divided.parameters < 0.6 * whole.parameters
    assert divided.activations < whole.activations


def test_several_processes_keep_their_gradients() -> None:
    """DDP's gradients lie in the buckets that are sent."""
    one, two = (plan_memory(a_run("124m", processes=n)).stages["only"] for n in (1, 2))
    assert one.moment == two.moment
    assert two.gradients == two.parameters > one.gradients


@pytest.mark.parametrize(
    ("settings", "processes", "expected"),
    [
        ({"shard": "none"}, 4, (4, 1, 1)),
        ({"shard": "full"}, 4, (1, 4, 1)),
        ({"shard": "full", "tensor": 2}, 8, (1, 4, 2)),
        ({"shard": "hybrid"}, 16, (2, 8, 1)),
        ({"shard": "hybrid", "shard_size": 2}, 8, (4, 2, 1)),
        ({"shard": "auto", "needed_bytes": 30e9}, 16, (16, 1, 1)),
        ({"shard": "auto", "needed_bytes": 300e9}, 16, (2, 8, 1)),
        ({"shard": "auto", "needed_bytes": 600e9}, 16, (1, 16, 1)),
        ({"shard": "auto", "needed_bytes": 600e9, "device_bytes": None}, 16, (16, 1, 1)),
    ],
)
def test_layouts(settings: dict[str, Any], processes: int, expected: tuple[int, int, int]) -> None:
    defaults = {"shard_size": None, "tensor": 1, "needed_bytes": 0.0, "device_bytes": 80e9, "per_machine": 8}
    layout = choose_layout(processes, **{**defaults, **settings})
    assert (layout.replicas, layout.shards, layout.tensor) == expected
    assert layout.processes == processes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"processes": 3, "tensor": 2}, ["parallel.tensor 2", "allowed: 1, 3"]),
        ({"processes": 3, "tensor": 3}, ["does not divide", "kv_heads"]),
        ({"processes": 6, "shard": "hybrid", "shard_size": 4}, ["shard_size 4", "2, 3, 6"]),
        ({"processes": 32}, ["32 processes", "batch.sequences 16"]),
    ],
)
def test_a_mesh_that_cannot_be(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        plan_memory(a_run(**changes))
    assert all(word in str(error.value) for word in words)


def test_fits_replicated() -> None:
    config, training = ModelConfig.from_preset("1b", 32768), Training(rows=1, sequence_length=128, device="cuda")
    needed = sum(state_by_kind(config, training))
    assert fits_replicated(config, training, 2.01 * needed)
    assert not fits_replicated(config, training, 1.99 * needed)
    assert fits_replicated(config, training, None)


def test_a_batch_that_the_processes_cut_unevenly() -> None:
    run = a_run("124m", processes=3)
    assert micro_batch_of(run, layout_of(run)) == 6


def test_state_copied_for_a_checkpoint_counts_where_it_fits() -> None:
    run = a_run("50m", device="cpu", micro_batch=1, sequence_length=256, limit_bytes=24 * GIB)
    with_copy, without = plan_memory(run), plan_memory(replace(run, saves_during=False))
    state = with_copy.stages["only"].parameters + with_copy.stages["only"].optimizer
    assert with_copy.total - without.total == with_copy.stages["only"].saving == state
    assert plan_memory(replace(run, limit_bytes=2 * GIB)).stages["only"].saving == 0


@pytest.mark.parametrize(
    ("text", "expected"), [("80GB", 80e9), ("1 GiB", GIB), ("74.5GiB", 74.5 * GIB), ("512MB", 512e6), ("7B", 7)]
)
def test_sizes(text: str, expected: float) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["80", "80 gigabytes", "-1GB", "0GB", ""])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(UserError, match="80GB or 74.5GiB"):
        parse_bytes(text)


def test_without_torch() -> None:
    program = (
        "import sys, perennial.plan.memory, perennial.model.memory, perennial.core.layout, perennial.cli.plan;"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_evaluation_can_be_the_fullest_moment() -> None:
    config = ModelConfig.from_preset("10m", 4096)
    training = Training(rows=1, sequence_length=64, device="cpu")
    assert estimate(config, training).moment == "evaluation"
    assert estimate(config, replace(training, evaluates=False)).total < estimate(config, training).total


def test_stand_in_has_the_size() -> None:
    config = TransformersConfig(
        why="test",
        model_type="other",
        architecture="Other",
        vocabulary_size=1000,
        context=512,
        width=128,
        layers=4,
        heads=4,
        head_width=32,
        attention_layers=4,
        tied_embeddings=True,
        parameters_by_role={"embedding": 128_000, "matrix": 800_000, "norm": 1000},
        head_parameters=128_000,
        settings={},
    )
    found = stand_in(config)
    training = Training(rows=1, sequence_length=64)
    whole = state_by_kind(config, training)
    assert whole[0] == 4 * config.num_parameters
    assert sum(state_by_kind(found, training)) == pytest.approx(sum(whole), rel=0.05)
    assert activation_bytes(found, training) > 0
