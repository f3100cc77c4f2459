"""What devices can do at best: dense bf16 FLOPs, memory and power, each with the data sheet that it is from.

`mfu` is the share of that peak which training reaches. It is an assumption until a calibration has measured a machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from perennial.core.environment import usable_cores
from perennial.core.errors import UserError, nearest

GPU_MFU = 0.4
"""Assumption: Llama 3 405B reached 0.38 to 0.43 on H100 (Grattafiori et al. 2024, arXiv 2407.21783, table 4)."""
CORE_FLOPS = 100e9
"""Assumption: fp32 of one core with 512-bit units near 2.3 GHz; a calibration measures it instead."""
CPU_MFU = 0.5
CORE_WATTS = 8.0
"""Assumption: a server CPU of 250 W with 32 cores."""


@dataclass(frozen=True)
class Device:
    """One device of a table, or this machine's CPU."""

    name: str
    kind: Literal["cpu", "cuda"]
    peak_flops: float
    """Dense, bf16 (fp32 on a CPU), per second."""
    memory_bytes: float | None
    """None: what this machine has."""
    watts: float
    """Of the device at full load."""
    source: str
    mfu: float = GPU_MFU
    mfu_source: str = "assumption: Llama 3 405B reached 0.38 to 0.43 on H100 (arXiv 2407.21783, table 4)"

    @property
    def flops_per_second(self) -> float:
        """What training gets out of one device."""
        return self.mfu * self.peak_flops


def _gpu(name: str, teraflops: float, gigabytes: float, watts: float, sheet: str) -> Device:
    return Device(name, "cuda", teraflops * 1e12, gigabytes * 1e9, watts, f"{sheet}, dense bf16")


_TABLE = (
    _gpu("B200", 2250, 180, 1000, "NVIDIA DGX B200 data sheet, 2024"),
    _gpu("H200", 989, 141, 700, "NVIDIA H200 data sheet, 2024"),
    _gpu("H100", 989, 80, 700, "NVIDIA H100 data sheet, SXM, 2023"),
    _gpu("H100-PCIe", 756, 80, 350, "NVIDIA H100 data sheet, PCIe, 2023"),
    _gpu("A100", 312, 80, 400, "NVIDIA A100 data sheet, SXM 80 GB, 2021"),
    _gpu("A100-40GB", 312, 40, 400, "NVIDIA A100 data sheet, SXM 40 GB, 2020"),
    _gpu("L40S", 362, 48, 350, "NVIDIA L40S data sheet, 2023"),
    _gpu("L4", 121, 24, 72, "NVIDIA L4 data sheet, 2023"),
    _gpu("A10", 125, 24, 150, "NVIDIA A10 data sheet, 2021"),
    _gpu("RTX-4090", 165.2, 24, 450, "NVIDIA Ada architecture paper, 2022, fp32 sums"),
    _gpu("RTX-3090", 71, 24, 350, "NVIDIA Ampere GA102 architecture paper, 2020, fp32 sums"),
    _gpu("MI300X", 1307.4, 192, 750, "AMD MI300X data sheet, 2023"),
)
NAMES = (*(device.name for device in _TABLE), "cpu")
"""Devices that a budget may name."""


def find(name: str, mfu: float | None = None) -> Device:
    """A device by name, whatever its case and dashes; `mfu` as given by the user. Raises UserError."""
    by_key = {_key(device.name): device for device in (*_TABLE, cpu())}
    device = by_key.get(_key(name))
    if device is None:
        spelled = nearest(name.upper(), NAMES) or nearest(name.lower(), NAMES)
        raise UserError(f"--budget: no device '{name}' is known; there are: {', '.join(NAMES)}.{spelled}")
    return device if mfu is None else replace(device, mfu=mfu, mfu_source="as given with --mfu")


def cpu() -> Device:
    """This machine's CPU, by its number of cores."""
    cores = usable_cores()
    return Device(
        "cpu",
        "cpu",
        cores * CORE_FLOPS,
        None,
        cores * CORE_WATTS,
        f"assumption: {cores} cores of {CORE_FLOPS / 1e9:g} GFLOP/s each; `perennial plan --calibrate` measures it",
        CPU_MFU,
        f"assumption: {CPU_MFU:g} of a core's peak",
    )


def measured(flops_per_second: float, source: str, *, watts: float | None = None) -> Device:
    """This machine, at the speed that a calibration measured."""
    return replace(
        cpu(), peak_flops=flops_per_second, source=source, mfu=1.0, mfu_source=source, watts=watts or cpu().watts
    )


def _key(name: str) -> str:
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(nvidia|amd|geforce)|(sxm\d?|hbm\d?e?)$", "", key)
