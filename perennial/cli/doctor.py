"""Look at this machine: what it computes with and how fast, what is installed, and what to mend."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from perennial.cli._launch import add_processes, examine_together, is_one_of_many

HELP = "look at this machine: speed, memory, packages, and what to mend"

_OPTIONAL = ("fastokens", "transformers", "tensorboard")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_processes(parser)
    parser.add_argument(
        "--folder",
        metavar="PATH",
        help="with --processes or under torchrun: the folder that all machines should share (default: this one)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints what was found, then every advice."""
    import json

    if args.processes is not None or args.folder is not None or is_one_of_many():
        return examine_together(args.processes, args.folder, as_json=args.json)
    facts = examine()
    print(json.dumps(facts, indent=2) if args.json else _text(facts))
    return 0


def examine() -> dict[str, Any]:
    """The environment, measured speed, free memory and disk, optional packages, and `advice` (a list of texts)."""
    import shutil

    import torch

    from perennial.core.environment import environment, memory_bytes, package_version, tune_process
    from perennial.train.defaults import defaults
    from perennial.train.precision import matmul_rate, native_precision

    tune_process()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts: dict[str, Any] = {
        **environment(),
        "precision": native_precision(device),
        "defaults": defaults(device),
        "matmul_flops_per_second": {p: matmul_rate(p, device, seconds=0.3) for p in ("fp32", "bf16")},
        "memory_available_bytes": memory_bytes()["available"],
        "disk_free_bytes": shutil.disk_usage(".").free,
        "packages": {name: package_version(name) for name in _OPTIONAL},
    }
    return {**facts, "advice": advice(facts)}


def advice(facts: dict[str, Any]) -> list[str]:
    """What a person could mend, most important first."""
    found = []
    memory, rates = facts["memory_available_bytes"], facts["matmul_flops_per_second"]
    if memory is not None and memory < 2 << 30:
        found.append("less than 2 GiB of memory is available: training even a small model needs about 1 GiB")
    if facts["disk_free_bytes"] < 5 << 30:
        found.append(
            "less than 5 GiB is free on this disk: the demo needs about 1 GiB, a checkpoint 12 bytes a parameter"
        )
    if facts["threads"]["torch"] < facts["cores"]:
        found.append(
            f"torch computes with {facts['threads']['torch']} of {facts['cores']} cores: OMP_NUM_THREADS limits it"
        )
    if facts["threads"].get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        found.append("OMP_WAIT_POLICY=ACTIVE lets waiting threads spin; on a shared machine unset it")
    if facts["precision"] == "fp32" and rates["bf16"] > 1.2 * rates["fp32"]:
        found.append(
            "bf16 multiplies faster than fp32 here although the hardware does not report it: try precision: bf16"
        )
    if not facts["devices"] and Path("/proc/driver/nvidia").exists():
        found.append("there is an NVIDIA GPU, but this torch cannot use it: install a CUDA build of the same version")
    if facts["packages"]["fastokens"] is None:
        found.append("fastokens is not installed: preparing corpora is some 30 times faster with it, where it is exact")
    return found


def _text(facts: dict[str, Any]) -> str:
    from perennial.core.amounts import human, human_bytes

    def size(num_bytes: int | None) -> str:
        return "unknown" if num_bytes is None else human_bytes(num_bytes)

    rates = ", ".join(f"{p} {human(rate, 'FLOPs/s')}" for p, rate in facts["matmul_flops_per_second"].items())
    devices = ", ".join(f"{d['name']} ({size(d['memory_bytes'])})" for d in facts["devices"]) or "none"
    threads = ", ".join(f"{name} {value}" for name, value in facts["threads"].items())
    rows = {
        "perennial": f"{facts['perennial']} {facts['commit'] or ''}".strip(),
        "python": f"{facts['python']} on {facts['system']}",
        "libraries": f"torch {facts['torch']}, numpy {facts['numpy']}",
        "processor": f"{facts['cpu']}, {facts['cores']} cores",
        "threads": threads,
        "GPUs": devices,
        "matmul": f"{rates}; trains in {facts['precision']} unless told otherwise",
        "memory": f"{size(facts['memory_available_bytes'])} available of {size(facts['memory_bytes'])}",
        "disk": f"{size(facts['disk_free_bytes'])} free here",
        "optional": ", ".join(f"{name} {version or '-'}" for name, version in facts["packages"].items()),
    }
    lines = [f"{name:<10} {value}" for name, value in rows.items()]
    lines += ["", "unless a recipe says otherwise, training takes"]
    lines += [f"  {name:<13}{choice}" for name, choice in facts["defaults"].items()]
    lines += ["", *(f"advice: {text}" for text in facts["advice"])] if facts["advice"] else ["", "nothing to mend"]
    return "\n".join(lines)
