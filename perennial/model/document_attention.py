"""Attention held inside documents or a window on a GPU, without a mask of T x T: only blocks of it that are not empty.

A row of T positions is cut into blocks of 128. Each pair of a block of queries and a block of keys is empty (skipped),
whole (no test at all) or partial (tested element by element inside the kernel), which is told from the first and last
position of the blocks and the smallest and largest document number in them. So a mask takes (T / 128)^2 numbers per
row, is made on the device by a few small kernels, and nothing waits for the device.

The kernel is torch's FlexAttention. Why not `torch.nn.attention.varlen`, flash attention over documents laid end to
end: it takes only 16-bit types, and the number of documents of a batch decides its shapes, so that each forward pass
would wait for the device or launch as many programs as the batch could have documents. FlexAttention takes any type,
windows and documents together, in shapes that do not change. Rows without documents or windows need neither: torch's
own causal kernels have them.

Source: Dong et al. 2024, Flex Attention, arXiv 2412.05496, sections 3 and 4 (block masks).
Limits: head widths of 16 to 256 in 16 or 32 bits; other heads and second derivatives take the mask in full.

Shapes: B rows, T positions, H query heads, G key-value heads, K head width, N = ceil(T / 128) blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Positions per block: FlexAttention's own default, and the size that its kernels are tuned for."""
_WIDTHS = range(16, 257)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class BlockedMask:
    """Where queries may look, by blocks; made once in a forward pass and shared by all layers with its window."""

    blocks: BlockMask
    length: int
    """T."""
    segments_BT: Tensor | None
    """The document of each position; None when only the window limits what is seen."""
    window: int | None
    """How many of the last positions are seen, a position's own included."""


@functools.cache
def has_kernel(device_type: str) -> bool:
    """Whether masks of blocks are of use: on GPUs for which torch's compiler can make kernels."""
    if device_type != "cuda":
        return False
    from torch.utils._triton import has_triton

    return bool(has_triton())


def is_seen(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Whether the positions `query` may look at the positions `key`, bool, in the shape the two broadcast to."""
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def blocked_mask(length: int, segments_BT: Tensor | None, window: int | None, device: torch.device) -> BlockedMask:
    """The mask of whole rows: only the same document (of any numbering), only the last `window` positions."""
    from torch.nn.attention.flex_attention import BlockMask

    some, every = _kinds(length, segments_BT, window, device)
    partial, whole = some & ~every, some & every
    blocks = BlockMask(
        (length, length),
        *_listed(partial),
        *_listed(whole),
        *_listed(partial.mT),
        *_listed(whole.mT),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_element(segments_BT, window),
    )
    return BlockedMask(blocks, length, segments_BT, window)


def _kinds(length: int, segments_BT: Tensor | None, window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """(may have a seen pair, has only seen pairs) of each block of queries and of keys, bool (B or 1, 1, N, N).

    Two blocks may share a document when the ranges of their numbers meet: exact where numbers rise along the row.
    """
    first = torch.arange(0, length, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp(max=length - 1)
    is_complete = last - first == BLOCK - 1
    # The nearest and the farthest pair of positions, query minus key.
    nearest, farthest = first[:, None] - last, last[:, None] - first
    some, every = farthest >= 0, (nearest >= 0) & is_complete[:, None] & is_complete
    if window is not None:
        some, every = some & (nearest < window), every & (farthest < window)
    if segments_BT is None:
        return some[None, None], every[None, None]
    low, high = _ranges(segments_BT)
    meet = (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])
    are_one = (low == high)[:, :, None] & (low == high)[:, None, :] & (low[:, :, None] == low[:, None, :])
    return (some & meet)[:, None], (every & are_one)[:, None]


def _ranges(segments_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest document number of each block, (B, N)."""
    missing = -segments_BT.shape[1] % BLOCK
    padded = torch.cat((segments_BT, segments_BT[:, -1:].expand(-1, missing)), dim=1).unflatten(1, (-1, BLOCK))
    return padded.amin(-1), padded.amax(-1)


def _listed(marked: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns each row marks, and the columns, marked ones first and in order; int32, as kernels read them."""
    number = marked.to(torch.int32)
    columns = torch.argsort(number, dim=-1, descending=True, stable=True)
    return number.sum(-1, dtype=torch.int32), columns.to(torch.int32).contiguous()


def _element(segments_BT: Tensor | None, window: int | None) -> Callable[..., Tensor]:
    """The test of one pair of positions in a partial block, which the kernel takes in."""

    def element(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = is_seen(query, key, window)
        return seen if segments_BT is None else seen & (segments_BT[row, query] == segments_BT[row, key])

    return element


def suits(q_BTHK: Tensor) -> bool:
    """Whether the kernel can take these queries."""
    return q_BTHK.dtype in _DTYPES and q_BTHK.shape[-1] in _WIDTHS


def blocked_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: BlockedMask) -> Tensor:
    """Softmax-weighted values, shape (B, T, H, K), over what the mask lets each query see.

    In a compiled layer the kernel is compiled with it, else by itself. On a CPU, where there is no backward pass, the
    result is torch's plain formula, for tests.
    """
    from torch.nn.attention.flex_attention import flex_attention

    is_plain = torch.compiler.is_compiling() or q_BTHK.device.type == "cpu"
    kernel: Any = flex_attention if is_plain else _compiled()
    q_BHTK, k_BGTK, v_BGTK = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    is_grouped = q_BTHK.shape[2] != k_BTGK.shape[2]
    out_BHTK: Tensor = kernel(q_BHTK, k_BGTK, v_BGTK, block_mask=mask.blocks, enable_gqa=is_grouped)
    return out_BHTK.transpose(1, 2)


@functools.cache
def _compiled() -> Any:
    """FlexAttention compiled once for the process; uncompiled it would make the scores in full."""
    from torch._inductor import config
    from torch.nn.attention.flex_attention import flex_attention

    # So that selective checkpointing sees what was compiled as one operator, whose result it keeps.
    option = "wrap_inductor_compiled_regions"
    return torch.compile(flex_attention, options={option: True} if hasattr(config, option) else None)
