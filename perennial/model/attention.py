"""Causal attention, optionally held inside documents or a window; one function, whatever kernel the device has.

Shapes: B rows, T positions, H query heads, G key-value heads, R = H / G, K head width. Scores are q.k / sqrt(K).

In eager mode on a CPU the products are batched matrix products over blocks of queries that skip the future: forward and
backward over rows of 256 tokens, torch's fused CPU kernel takes 2.3 times as long in bf16 and 1.3 times in fp32 (Zen 4,
two threads). Elsewhere it is torch's scaled_dot_product_attention, which on a GPU is a flash kernel for rows that are
only causal; held inside documents or a window, a GPU takes FlexAttention (`document_attention` says why).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perennial.model.blocks import blocks, keeps_weights
from perennial.model.document_attention import (
    BlockedMask,
    blocked_attention,
    blocked_mask,
    has_kernel,
    is_seen,
    suits,
)
from perennial.model.operations import runs_by_hand

_FLASH = (torch.bfloat16, torch.float16)
"""What flash kernels take."""

AttentionMask = Tensor | BlockedMask | None
"""What `attention_mask` makes and `attention` takes. None: every query sees all the past."""


def attention_mask(
    length: int,
    segments_BT: Tensor | None,
    window: int | None,
    *,
    start: int = 0,
    device: torch.device | None = None,
    is_cached: bool = False,
) -> AttentionMask:
    """Where queries at positions `start` to `start + length` may look, for all layers that have this window.

    segments: only the same document. window: only the last `window` positions, their own included, as Jiang et al.
    2023 (Mistral 7B, arXiv 2310.06825, section 2) have it. A bool tensor (B or 1, T, start + T), on a GPU its
    blocks; with a cache, where rows have a new length at every call, it is always the tensor.
    """
    stop = start + length
    is_narrow = window is not None and window < stop
    if segments_BT is None and not is_narrow and (start == 0 or length == 1):
        return None
    window = window if is_narrow else None
    if segments_BT is not None:
        assert start == 0, "documents are told apart in training, where nothing is cached"
        device = segments_BT.device
    if device is not None and has_kernel(device.type) and not is_cached:
        return blocked_mask(length, segments_BT, window, device)
    return _dense_mask(length, segments_BT, window, start, device)


def _dense_mask(
    length: int, segments_BT: Tensor | None, window: int | None, start: int, device: torch.device | None
) -> Tensor:
    queries = torch.arange(start, start + length, device=device)[:, None]
    seen = is_seen(queries, torch.arange(start + length, device=device), window)[None]
    return seen if segments_BT is None else seen & (segments_BT[:, :, None] == segments_BT[:, None, :])


def attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: AttentionMask) -> Tensor:
    """Softmax-weighted values, shape (B, T, H, K). `mask` is `attention_mask`'s; S > T keys when some were cached.

    Source: Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762, section 3.2.1; Ainslie et al. 2023, GQA,
    arXiv 2305.13245, section 2.2, for key-value heads that R query heads share.
    """
    if isinstance(mask, BlockedMask):
        if suits(q_BTHK):
            return blocked_attention(q_BTHK, k_BSGK, v_BSGK, mask)
        mask = _dense_mask(mask.length, mask.segments_BT, mask.window, 0, q_BTHK.device)
    is_whole = q_BTHK.shape[1] == k_BSGK.shape[1]
    if is_whole and runs_by_hand(q_BTHK):
        return _in_blocks(q_BTHK, k_BSGK, v_BSGK, mask)
    is_grouped = q_BTHK.shape[2] != k_BSGK.shape[2]
    if is_grouped and q_BTHK.device.type != "cpu" and q_BTHK.dtype not in _FLASH:
        # Only flash kernels share keys; without this, 32 bits would take the plain formula with all scores in memory.
        shared_by, is_grouped = q_BTHK.shape[2] // k_BSGK.shape[2], False
        k_BSGK, v_BSGK = (x.repeat_interleave(shared_by, dim=2) for x in (k_BSGK, v_BSGK))
    out_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None],
        is_causal=mask is None and is_whole,
        enable_gqa=is_grouped,
    )
    return out_BHTK.transpose(1, 2)


def _in_blocks(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask_BTT: Tensor | None) -> Tensor:
    """Heads that share keys lie side by side, N = B G and M = T R (position first), so that keys are never repeated."""
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    q_NMK = q_BTHK.view(B, T, G, H // G, K).permute(0, 2, 1, 3, 4).reshape(B * G, T * (H // G), K)
    k_NTK, v_NTK = (x.transpose(1, 2).reshape(B * G, T, K) for x in (k_BTGK, v_BTGK))
    out_NMK = _AttentionOnCpu.apply(q_NMK, k_NTK, v_NTK, mask_BTT)[0]
    return out_NMK.view(B, G, T, H // G, K).permute(0, 2, 1, 3, 4).reshape(B, T, H, K)


class _AttentionOnCpu(torch.autograd.Function):
    """P = softmax(S): dV = P' dO, dP = dO V', dS = P (dP - sum(dP P)), dQ = dS K / sqrt(K), dK = dS' Q / sqrt(K)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q_NMK: Tensor, k_NTK: Tensor, v_NTK: Tensor, mask_BTT: Tensor | None) -> tuple[Tensor, ...]:
        out_NMK = torch.empty_like(q_NMK)
        kept = []
        for start, stop, rows in _blocks(q_NMK, k_NTK):
            weights = _weights(q_NMK, k_NTK, mask_BTT, start, stop, rows)
            out_NMK[:, rows] = torch.bmm(weights, v_NTK[:, :stop])
            if keeps_weights(k_NTK.shape[1]):
                kept.append(weights)
        return out_NMK, *kept

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: tuple[Tensor, ...]
    ) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        q, k, v, mask_BTT, *kept = ctx.saved_tensors
        if d_out is None:
            return None, None, None, None
        if torch.is_grad_enabled():  # a second derivative is asked for
            every = slice(0, q.shape[1])
            out = torch.bmm(_weights(q, k, mask_BTT, 0, k.shape[1], every), v)
            return *torch.autograd.grad(out, (q, k, v), d_out, create_graph=True), None
        d_out = d_out.contiguous()
        scale, dq, dk, dv = q.shape[-1] ** -0.5, torch.empty_like(q), None, None
        for start, stop, rows in reversed(_blocks(q, k)):  # the last one sees all the keys
            weights = kept.pop() if kept else _weights(q, k, mask_BTT, start, stop, rows)
            d_weights = torch.bmm(d_out[:, rows], v[:, :stop].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            dv = _plus_product(dv, weights.transpose(1, 2), d_out[:, rows])
            dq[:, rows] = torch.bmm(d_scores, k[:, :stop]).mul_(scale)
            dk = _plus_product(dk, d_scores.transpose(1, 2), q[:, rows])
        return dq, None if dk is None else dk.mul_(scale), dv, None


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """The batched product, added to the first rows of `total` where there is one."""
    if total is None:
        return torch.bmm(left, right)
    total[:, : left.shape[1]].baddbmm_(left, right)
    return total


def _blocks(q_NMK: Tensor, k_NTK: Tensor) -> list[tuple[int, int, slice]]:
    """First position and end of each block of queries, and its rows in M."""
    length = k_NTK.shape[1]
    shared_by = q_NMK.shape[1] // length
    return [(start, stop, slice(start * shared_by, stop * shared_by)) for start, stop in blocks(length)]


def _weights(q_NMK: Tensor, k_NTK: Tensor, mask_BTT: Tensor | None, start: int, stop: int, rows: slice) -> Tensor:
    """Attention weights of the queries at positions `start` to `stop` over the keys before `stop`."""
    q, k_transposed, size = q_NMK[:, rows], k_NTK[:, :stop].transpose(1, 2), stop - start
    scores = torch.baddbmm(q.new_empty(()), q, k_transposed, beta=0, alpha=q.shape[-1] ** -0.5)
    if mask_BTT is None:  # only the block's own positions can lie in the future
        future = torch.full((size, size), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
        # View as (N, positions, R, keys); adding takes a third of the time of filling where a mask is set.
        scores.view(len(q), size, -1, stop)[..., start:].add_(future[:, None])
    else:
        hidden = ~mask_BTT[:, None, start:stop, None, :stop]
        shape = (len(mask_BTT), len(q) // len(mask_BTT), size, q.shape[1] // size, stop)
        scores.view(shape).masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, dim=-1)
