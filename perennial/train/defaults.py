"""How training computes on a device unless a recipe says otherwise: `doctor` shows it, every run records it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from perennial.core.environment import bf16_units, can_keep_freed_memory
from perennial.model.blocks import BLOCK, KEEP_UP_TO
from perennial.objectives.next_token import default_chunk
from perennial.train.precision import native_precision

if TYPE_CHECKING:
    import torch


def defaults(device: torch.device) -> dict[str, str]:
    """What was chosen, with the reason where the machine decides it; by name."""
    is_cpu = device.type == "cpu"
    return {
        "threads": _threads(),
        "precision": _precision(device),
        "optimizer": "AdamW, one fused kernel for all tensors of a group",
        "attention": _ATTENTION["cpu" if is_cpu else "gpu"],
        "loss": f"head and cross entropy {default_chunk(device.type)} tokens at a time, never all logits at once",
        "freed memory": _freed_memory() if is_cpu else "kept by torch for the next update",
        "compile": "off; compile: true in a recipe turns it on",
    }


_ATTENTION = {
    "cpu": f"blocks of {BLOCK} queries over what they may see, weights kept for rows up to {KEEP_UP_TO} tokens; "
    "scaled_dot_product_attention when compiled",
    "gpu": "scaled_dot_product_attention, FlexAttention inside documents or a window",
}


def _threads() -> str:
    import torch

    policy = os.environ.get("OMP_WAIT_POLICY", "").upper()
    waiting = "sleep while they wait" if policy == "PASSIVE" else f"wait as OMP_WAIT_POLICY={policy or '(unset)'} says"
    return f"{torch.get_num_threads()} that {waiting}"


def _precision(device: torch.device) -> str:
    found = native_precision(device)
    if device.type != "cpu":
        return f"{found}: the device {'has' if found == 'bf16' else 'does not have'} bf16 units"
    units = bf16_units()
    reason = f"this CPU multiplies bf16 natively ({', '.join(units)})" if units else "this CPU would emulate bf16"
    return f"{found}: {reason}"


def _freed_memory() -> str:
    return "kept by malloc for the next update" if can_keep_freed_memory() else "as the C library handles it"
