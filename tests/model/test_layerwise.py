"""Layers that are computed again, or compiled, give the gradients they gave before; what they keep is less."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import CheckpointPolicy

from perennial.core.errors import UserError
from perennial.model import attention, layerwise
from perennial.model.document_attention import BlockedMask
from perennial.model.huggingface import load_model
from perennial.model.layerwise import Policy, checkpoint_layers, compile_layers, layers_of
from perennial.objectives.next_token import NextToken
from perennial.train.feeding import TorchBatch
from tests.foreign import ARCHITECTURES, CONTEXT, VOCABULARY, made, stored

from .models import VARIANTS, tiny_model

POLICIES: list[Policy] = ["selective", "full"]
IGNORE_TRACING = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
"""What torch's compiler asks of a tensor, and itself hides where warnings are no errors."""


def a_batch(rows: int = 2, length: int = 150, vocabulary: int = 97, documents: bool = False) -> TorchBatch:
    tokens = torch.randint(vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    segments = (torch.arange(length) // 40).expand(rows, -1) if documents else None
    return TorchBatch(tokens[:, :-1], tokens[:, 1:], segments)


def gradients(model: Any, batch: TorchBatch) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    NextToken().loss(model, batch).total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        other = found[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or other is None or torch.equal(gradient, other), name


def kept_bytes(model: Any, batch: TorchBatch) -> int:
    """Memory that a forward pass took and did not give back: what it keeps for the backward pass, and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as counted:
        result = model(batch.inputs, batch.segments)
    del result
    return sum(event.self_cpu_memory_usage for event in counted.key_averages())


@pytest.mark.parametrize(("variant", "documents"), [*((name, False) for name in VARIANTS), ("llama", True)])
def test_gradients_are_the_same_and_less_is_kept(variant: str, documents: bool) -> None:
    model, batch = tiny_model(**VARIANTS[variant]), a_batch(documents=documents)
    expected, kept = gradients(model, batch), [kept_bytes(model, batch)]
    for policy in POLICIES:
        other = copy.deepcopy(model)
        checkpoint_layers(other, policy)
        assert other.state_dict().keys() == model.state_dict().keys()
        assert_equal(gradients(other, batch), expected)
        kept.append(kept_bytes(other, batch))
    assert kept[1] < 0.8 * kept[0]
    assert kept[2] < 0.4 * kept[0]


def test_full_keeps_one_stream_per_layer() -> None:
    """Each layer more: rows x tokens x width x 4 bytes."""
    batch, kept = a_batch(), []
    for layers in (2, 6):
        model = tiny_model(layers=layers)
        checkpoint_layers(model, "full")
        gradients(model, batch)  # what is made once
        kept.append(kept_bytes(model, batch))
    assert kept[1] - kept[0] == pytest.approx(4 * (2 * 150 * 64 * 4), rel=0.01)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_the_same_in_bf16(policy: Policy) -> None:
    model, batch = tiny_model(), a_batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, batch)
        checkpoint_layers(model, policy)
        assert_equal(gradients(model, batch), expected)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("foreign")
    return {name: stored(made(name), root / str(i)) for i, name in enumerate(ARCHITECTURES)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_of_transformers_are_computed_again_too(name: str, folders: dict[str, Path]) -> None:
    model: Any = load_model(folders[name])
    batch = a_batch(length=CONTEXT // 2, vocabulary=VOCABULARY)
    assert len(layers_of(model)) == 2
    expected, kept = gradients(model, batch), kept_bytes(model, batch)
    for policy in POLICIES:
        other = copy.deepcopy(model)
        checkpoint_layers(other, policy)
        assert other.state_dict().keys() == model.state_dict().keys()
        assert_equal(gradients(other, batch), expected)
        assert kept_bytes(other, batch) < kept


def test_what_selective_keeps() -> None:
    """Products and attention of every kind; not products into a given tensor, nor scores, nor what is cheap."""
    from torch._higher_order_ops import inductor_compiled_code
    from torch._higher_order_ops.flex_attention import flex_attention

    def is_kept(operator: Any, *given: Tensor) -> bool:
        return layerwise._policy(None, operator, *given) is CheckpointPolicy.MUST_SAVE

    aten = torch.ops.aten
    kept = [aten.mm.default, aten.addmm.default, aten._scaled_mm.default, flex_attention, inductor_compiled_code]
    kept += [getattr(aten, f"_scaled_dot_product_{kind}_attention").default for kind in ("flash", "efficient", "cudnn")]
    kept += [aten._scaled_dot_product_flash_attention_for_cpu.default, aten._grouped_mm.default]
    assert all(is_kept(operator) for operator in kept)
    assert not any(is_kept(o) for o in (aten.mm.out, aten.baddbmm.default, aten.silu.default, aten.add.Tensor))
    queries, keys, weights = torch.empty(1, 50, 8), torch.empty(1, 8, 50), torch.empty(1, 50, 50)
    assert not is_kept(aten.bmm.default, queries, keys)
    assert is_kept(aten.bmm.default, weights, queries)


def test_a_copy_computes_with_its_own_weights() -> None:
    model, batch = tiny_model(), a_batch()
    checkpoint_layers(model, "full")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_equal(gradients(other, batch), gradients(tiny_model(), batch))


def test_without_gradients_nothing_is_kept() -> None:
    model = tiny_model()
    checkpoint_layers(model, "full")
    with torch.no_grad():
        assert torch.equal(model(a_batch().inputs), tiny_model()(a_batch().inputs))


def test_a_model_without_layers_is_refused() -> None:
    class Network(nn.Module):
        config = type("Config", (), {"architecture": "FlatForCausalLM"})

    with pytest.raises(UserError, match="activation_checkpointing: no list of layers is found in FlatForCausalLM"):
        checkpoint_layers(Network(), "full")  # type: ignore[arg-type]


@IGNORE_TRACING
@pytest.mark.parametrize("policy", ["none", *POLICIES])
def test_compiled_layers_give_the_same(policy: Policy) -> None:
    """Tolerance 1e-5: fp32; compiled layers take torch's own attention. All layers share one compiled function."""
    model, batch = tiny_model(layers=4), a_batch(documents=True)
    expected = gradients(model, batch)
    checkpoint_layers(model, policy)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(model, backend=counter)  # type: ignore[arg-type]
    found = gradients(model, batch)
    assert counter.frame_count == 1, "compiled once for four layers, in one piece"
    assert model.state_dict().keys() == tiny_model(layers=4).state_dict().keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def by_elements(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: BlockedMask) -> Tensor:
    """In the place of a GPU's kernel: all that it reads of the mask, and a backward pass on a CPU."""
    row, position = torch.arange(len(q_BTHK)), torch.arange(q_BTHK.shape[1])
    seen = mask.blocks.mask_mod(row[:, None, None, None], torch.tensor(0), position[:, None], position[None])
    heads = [x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK)]
    out = F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    return out + 0 * mask.blocks.kv_indices.sum()


@IGNORE_TRACING
@pytest.mark.parametrize("policy", ["none", *POLICIES])
def test_masks_of_blocks_go_through_compiled_layers(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: one graph for all layers, and none anew for the masks of the next batch."""
    model, batches = tiny_model(layers=3, kv_heads=2), [a_batch(documents=True), a_batch(length=150, documents=True)]
    expected = [gradients(model, batch) for batch in batches]
    monkeypatch.setattr(attention, "has_kernel", lambda device_type: True)
    monkeypatch.setattr(attention, "blocked_attention", by_elements)
    checkpoint_layers(model, policy)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compile_layers(model, backend=counter)  # type: ignore[arg-type]
    for batch, wanted in zip(batches, expected, strict=True):
        for name, gradient in gradients(model, batch).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@IGNORE_TRACING
def test_layers_of_transformers_are_compiled(folders: dict[str, Path]) -> None:
    model: Any = load_model(folders["phi: a bias in the head"])
    batch = a_batch(length=CONTEXT // 2, vocabulary=VOCABULARY)
    expected = gradients(model, batch)
    checkpoint_layers(model, "full")
    compile_layers(model, backend="eager")
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from perennial.model.layerwise import checkpoint_layers, compile_layers, layers_of
from tests.model.models import tiny_model
from tests.model.test_layerwise import a_batch, gradients

dist.init_process_group("gloo", init_method="file://" + __import__("sys").argv[1], rank=0, world_size=1)
batch, names = a_batch(), list(tiny_model().state_dict())
expected = gradients(tiny_model(), batch)
for policy, compiled in (("full", False), ("selective", False), ("selective", True)):
    model = tiny_model()
    checkpoint_layers(model, policy)
    if compiled:
        compile_layers(model, backend="aot_eager")
    for layer in layers_of(model):
        fully_shard(layer)
    fully_shard(model)
    assert list(model.state_dict()) == names
    for _ in range(2):
        for name, gradient in gradients(model, batch).items():
            torch.testing.assert_close(gradient.full_tensor(), expected[name], rtol=1e-4, atol=1e-5)
dist.destroy_process_group()
"""


def test_layers_are_spread_over_processes_afterwards(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SHARDED, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
