"""A GPU is never waited for in a forward or backward pass.

Tensors on the 'meta' device have no numbers: code that reads one, decides by one, or mixes in a tensor of the CPU
fails. They take the same way through the code as tensors on a GPU do.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perennial.model import attention as chosen
from perennial.model.document_attention import BlockedMask
from perennial.model.layerwise import Policy, checkpoint_layers
from perennial.model.transformer import Transformer
from perennial.objectives.next_token import NextToken
from perennial.train.feeding import TorchBatch

from .models import VARIANTS, tiny_config


def causal(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: BlockedMask) -> Tensor:
    """In the place of the kernel, which there is none of for this device; its mask is looked at."""
    assert mask.blocks.kv_indices.device.type == "meta"
    heads = [x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK)]
    return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_read_back(variant: str, documents: bool, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "has_kernel", lambda device_type: device_type == "meta")
    monkeypatch.setattr(chosen, "blocked_attention", causal)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # unknown for this device
    monkeypatch.setattr(torch, "autocast", lambda *given, **named: contextlib.nullcontext())
    model: Any = Transformer(tiny_config(**VARIANTS[variant]), device="meta")
    checkpoint_layers(model, policy)
    inputs = torch.empty(2, 150, dtype=torch.int64, device="meta")
    segments = torch.empty(2, 150, dtype=torch.int32, device="meta") if documents else None
    loss = NextToken(z_loss=1e-4, chunk_tokens=64).loss(model, TorchBatch(inputs, inputs, segments))
    loss.total.backward()
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("read", [bool, Tensor.item, Tensor.tolist, Tensor.nonzero, lambda x: x + torch.ones(1)])
def test_reading_back_would_be_seen(read: Any) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.empty(1, device="meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True])
def test_on_a_gpu(documents: bool) -> None:
    model = Transformer(tiny_config(head_width=16), device="cuda")
    inputs = torch.zeros(2, 150, dtype=torch.int64, device="cuda")
    segments = torch.zeros(2, 150, dtype=torch.int32, device="cuda") if documents else None

    def forward_and_backward() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = NextToken().loss(model, TorchBatch(inputs, inputs, segments))
        loss.total.backward()

    forward_and_backward()  # the first one sets things up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
