"""Masks of blocks say exactly what masks in full say; the attention they lead to is the same."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from torch import Tensor

from perennial.model import attention as chosen
from perennial.model.attention import attention, attention_mask
from perennial.model.document_attention import BLOCK, BlockedMask, blocked_attention, blocked_mask, has_kernel, suits

from .models import tiny_model

CPU = torch.device("cpu")


def random_segments(rows: int, length: int, share: float, rises: bool) -> Tensor:
    """Documents that change with a probability of `share` per position; numbered in order, or by any numbers."""
    numbers = torch.cumsum(torch.rand(rows, length) < share, 1).to(torch.int32)
    return numbers if rises else torch.randint(-9, 9, (length + 1,), dtype=torch.int32)[numbers.long()]


def seen_by_kernel(mask: BlockedMask, rows: int) -> Tensor:
    """What the kernel computes, (B, T, T): all of whole blocks, what the test says of partial ones, nothing else."""
    blocks, T = mask.blocks, mask.length
    found = torch.zeros(rows, T, T, dtype=torch.bool)
    positions = torch.arange(T)
    for row in range(rows):
        own = min(row, blocks.kv_indices.shape[0] - 1)
        test = blocks.mask_mod(torch.tensor(row), torch.tensor(0), positions[:, None], positions[None])
        lists = [(blocks.kv_num_blocks, blocks.kv_indices, test)]
        lists += [(blocks.full_kv_num_blocks, blocks.full_kv_indices, torch.ones(T, T, dtype=torch.bool))]
        for number, columns, seen in lists:
            for query in range(number.shape[-1]):
                for key in columns[own, 0, query, : number[own, 0, query]].tolist():
                    part = (slice(query * BLOCK, (query + 1) * BLOCK), slice(key * BLOCK, (key + 1) * BLOCK))
                    assert not found[row][part].any(), "a block is listed twice"
                    found[row][part] = seen[part]
    return found


@pytest.mark.parametrize("seed", range(24))
def test_blocks_are_the_mask_in_full(seed: int) -> None:
    draw = random.Random(seed)
    length, rows = draw.choice([5, 128, 200, 256, 384, 511]), draw.choice([1, 3])
    window = draw.choice([None, 1, 30, 128, 129, 300])
    has_segments = window is None or draw.random() < 0.7
    segments = random_segments(rows, length, draw.choice([0.002, 0.02, 0.2]), draw.random() < 0.6)
    given = segments if has_segments else None
    mask = blocked_mask(length, given, window, CPU)
    expected = chosen._dense_mask(length, given, window, 0, CPU).expand(rows, -1, -1)
    assert torch.equal(seen_by_kernel(mask, rows), expected)
    by_query, by_key = mask.blocks, mask.blocks
    for rows_of, columns_of in (("kv", "q"), ("full_kv", "full_q")):  # both directions list the same pairs
        pairs = listed(getattr(by_query, f"{rows_of}_num_blocks"), getattr(by_query, f"{rows_of}_indices"))
        turned = listed(getattr(by_key, f"{columns_of}_num_blocks"), getattr(by_key, f"{columns_of}_indices"))
        assert pairs == {(row, query, key) for row, key, query in turned}


def listed(number: Tensor, columns: Tensor) -> set[tuple[int, int, int]]:
    """(row of the batch, row, column) of every pair that is listed."""
    return {
        (b, row, column)
        for b in range(number.shape[0])
        for row in range(number.shape[2])
        for column in columns[b, 0, row, : number[b, 0, row]].tolist()
    }


@pytest.mark.parametrize("window", [None, 150])
def test_no_block_is_visited_that_torch_would_skip(window: int | None) -> None:
    """With documents in order, as the loader numbers them, the closed form is as sparse as torch's own search."""
    from torch.nn.attention.flex_attention import create_block_mask

    segments = random_segments(2, 1000, 0.004, rises=True)
    mine = blocked_mask(1000, segments, window, CPU).blocks
    torchs = create_block_mask(mine.mask_mod, 2, None, 1000, 1000, device="cpu")
    for name in ("kv", "full_kv"):
        found, wanted = (
            listed(getattr(m, f"{name}_num_blocks"), getattr(m, f"{name}_indices")) for m in (mine, torchs)
        )
        if name == "kv":  # a block that only a document and the window together leave empty is tested, not skipped
            assert found >= wanted
            assert len(found) <= 1.1 * len(wanted)
        else:
            assert found == wanted


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("length", "window"), [(200, None), (300, 70), (64, 5)])
def test_attention_by_blocks_is_attention_with_the_mask_in_full(length: int, window: int | None, kv_heads: int) -> None:
    """Tolerance 1e-5: fp32, another order of additions."""
    q = torch.randn(2, length, 4, 16)
    k, v = (torch.randn(2, length, kv_heads, 16) for _ in range(2))
    segments = random_segments(2, length, 0.02, rises=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that it is not compiled, which is right on a CPU
        found = attention(q, k, v, blocked_mask(length, segments, window, CPU))
    expected = attention(q, k, v, chosen._dense_mask(length, segments, window, 0, CPU))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_cpu_takes_the_mask_in_full_and_a_gpu_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = random_segments(1, 40, 0.1, rises=True)
    assert not has_kernel("cpu")
    assert isinstance(attention_mask(40, segments, None), Tensor)
    monkeypatch.setattr(chosen, "has_kernel", lambda device_type: True)
    assert isinstance(attention_mask(40, segments, None), BlockedMask)
    assert isinstance(attention_mask(40, None, 7, device=CPU), BlockedMask)
    assert attention_mask(40, None, None, device=CPU) is None
    assert attention_mask(40, None, 40, device=CPU) is None, "a window as long as the row is no window"
    assert isinstance(attention_mask(40, None, 7, device=CPU, is_cached=True), Tensor)
    assert isinstance(attention_mask(4, None, 7, start=36, device=CPU, is_cached=True), Tensor)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 16), (torch.float32, 8)])
def test_heads_that_the_kernel_cannot_take_have_the_mask_in_full(dtype: torch.dtype, width: int) -> None:
    q = torch.randn(1, 40, 2, width, dtype=dtype, requires_grad=True)
    assert not suits(q)
    segments = random_segments(1, 40, 0.1, rises=True)
    attention(q, q, q, blocked_mask(40, segments, None, CPU)).sum().backward()
    found, q.grad = q.grad, None
    attention(q, q, q, attention_mask(40, segments, None)).sum().backward()
    assert q.grad is not None
    assert torch.equal(found, q.grad)


@pytest.mark.parametrize("overrides", [{}, {"family": "mistral", "kv_heads": 2, "window": 30}])
def test_a_model_gives_the_same_with_blocks(overrides: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask goes through the layers, compiled or not; a compiled layer takes it in without a break in its graph."""
    model = tiny_model(**overrides).requires_grad_(False)
    inputs, segments = torch.randint(97, (2, 150)), random_segments(2, 150, 0.03, rises=True)
    expected = model(inputs, segments)
    monkeypatch.setattr(chosen, "has_kernel", lambda device_type: True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(model(inputs, segments), expected, rtol=0, atol=1e-4)
        for layer in model.model.layers:
            layer.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(model(inputs, segments), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(model(inputs, segments.roll(11, 1)), model(inputs, segments.roll(11, 1)))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("width", [16, 64, 128])
def test_forward_and_backward_on_a_gpu(width: int, window: int | None, dtype: torch.dtype, tolerance: float) -> None:
    """Against the mask in full in fp64. bf16: 8 bits of a value of up to 4; fp32: products may be TF32."""
    device = torch.device("cuda")
    segments = random_segments(2, 1000, 0.01, rises=True).to(device)
    tensors = [torch.randn(2, 1000, heads, width, device=device) for heads in (4, 2, 2, 4)]
    *exact, d_out = (x.to(dtype).double().requires_grad_() for x in tensors)
    near = [x.detach().to(dtype).requires_grad_() for x in exact]
    mask = attention_mask(1000, segments, window)
    assert isinstance(mask, BlockedMask)
    found = blocked_attention(near[0], near[1], near[2], mask)
    expected = attention(exact[0], exact[1], exact[2], chosen._dense_mask(1000, segments, window, 0, device))
    found.backward(d_out.to(dtype))
    expected.backward(d_out)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(near, exact, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.gpu
def test_making_a_mask_waits_for_nothing() -> None:
    segments = random_segments(4, 2048, 0.01, rises=True).cuda()
    attention_mask(2048, segments, 512)  # the first call sets things up
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_mask(2048, segments, 512)
    finally:
        torch.cuda.set_sync_debug_mode("default")
