"""Rotary positions: the angle by which each pair of a head is turned at each position, stretched or not.

With pairs i = 0 .. K/2 - 1 of the K turned dimensions and base b, wave i has the frequency f_i = b^(-2i/K) radians per
position. Scaling by a factor s changes the frequencies (and for YaRN the size of queries and keys):
    linear   f_i / s
    dynamic  b grows with the row's length T once it exceeds the original context C: b (s T / C - (s - 1))^(K / (K - 2))
    llama3   waves longer than C / low are divided by s, those shorter than C / high kept, between them a linear blend
    yarn     waves that turn less than beta_slow times in C are divided by s, more than beta_fast times kept, a ramp
             over the dimensions between; queries and keys are multiplied by an attention factor
Source: Su et al. 2021, RoFormer, arXiv 2104.09864, section 3.4; linear: Chen et al. 2023, arXiv 2306.15595, section
    2.2; dynamic and YaRN: Peng et al. 2023, arXiv 2309.00071, sections 3.1 to 3.4; llama3: the released Llama 3.1
    code, as in transformers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from perennial.model.config import ModelConfig, RopeScaling


def rotary_table(config: ModelConfig, length: int, like: Tensor, *, start: int = 0) -> Tensor:
    """cos and signed sin of every angle, shape (2, T, 1, K), in fp32 (fp64 for a fp64 model); positions from `start`.

    K is `config.rotary_width`. Both halves of it hold the same angles, pairs are (i, i + K/2) as in Llama; sin is
    negative in the first. It is made anew in each forward pass, which costs a few microseconds, so there is no cache
    to go stale.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    positions = torch.arange(start, start + length, device=like.device, dtype=dtype)
    angles = positions[:, None] * frequencies(config, start + length, dtype, like.device)
    size = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    cos, sin = angles.cos() * size, angles.sin() * size
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))[:, :, None, :]


def frequencies(config: ModelConfig, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Radians per position of each wave, shape (K/2,), for rows of `length` tokens (which only 'dynamic' looks at)."""
    width, scaling = config.rotary_width, config.rope_scaling
    exponents = torch.arange(0, width, 2, device=device, dtype=dtype) / width
    theta = config.rope_theta
    if scaling is not None and scaling.kind == "dynamic":
        theta *= _growth(scaling, length, width)
    plain = 1.0 / theta**exponents
    if scaling is None or scaling.kind == "dynamic":
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    return _yarn(plain, scaling, theta)


def _growth(scaling: RopeScaling, length: int, width: int) -> float:
    """By how much the base grows for rows longer than the original context."""
    assert scaling.original_context is not None
    if width <= 2:
        return 1.0  # one wave, whose frequency is 1 with any base
    longer = max(length, scaling.original_context) / scaling.original_context
    return float((scaling.factor * longer - (scaling.factor - 1)) ** (width / (width - 2)))


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    assert scaling.original_context is not None
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = scaling.original_context * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def _yarn(plain: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    assert scaling.original_context is not None
    width = 2 * len(plain)

    def dimension(turns: float) -> float:
        """Dimension whose wave turns this often in the original context."""
        assert scaling.original_context is not None
        return width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if low == high else 0  # transformers' way around a division by zero
    stretched = ((torch.arange(len(plain), device=plain.device, dtype=plain.dtype) - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * stretched + plain * (1 - stretched)
