"""Number formats: fp32, or bf16 autocast over fp32 weights; and what this machine multiplies natively."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch

from perennial.core.environment import bf16_units


def native_precision(device: torch.device) -> str:
    """'bf16' where the device multiplies bf16 in hardware, else 'fp32'.

    A CPU without AVX512-BF16 or AMX emulates bf16 and is slower with it than with fp32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if bf16_units() else "fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context that forward passes run in."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def matmul_rate(precision: str, device: torch.device, *, size: int | None = None, seconds: float = 0.2) -> float:
    """FLOPs per second of a square matrix product: the measured ceiling that MFU is stated against."""
    size = size or (8192 if device.type == "cuda" else 1024)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left = torch.ones(size, size, dtype=dtype, device=device)
    best, until = float("inf"), time.perf_counter() + seconds
    for attempt in range(1000):
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize()
        if attempt:  # the first product pays for set-up
            best = min(best, time.perf_counter() - start)
            if time.perf_counter() > until:
                break
    return 2.0 * size**3 / best
