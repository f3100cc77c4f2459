"""Copy a Hugging Face model folder: other shards, another type, or safetensors instead of pickles."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "copy a model folder as safetensors: re-shard, change the type, read old pickles"
DTYPES = ("bfloat16", "float16", "float32")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("model", metavar="MODEL_DIR", help="Hugging Face folder, checkpoint or run; any architecture")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument(
        "--pickled",
        action="store_true",
        help="read pytorch_model.bin or its shards; nothing in them is run, and one that asks for code is refused",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="store the weights as this type (default: as they are)")
    parser.add_argument("--max-shard", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(args: argparse.Namespace) -> int:
    """Writes the new folder and says what is in it."""
    import json
    from pathlib import Path

    import torch

    from perennial.core.progress import Progress
    from perennial.model.convert import convert, parse_size

    with Progress("convert", unit="bytes", quiet=args.json) as progress:
        facts = convert(
            Path(args.model),
            Path(args.out),
            pickled=args.pickled,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            max_shard_bytes=parse_size(args.max_shard),
            report=progress,
        )
    print(json.dumps(facts, indent=2) if args.json else _text(facts))
    return 0


def _text(facts: dict[str, Any]) -> str:
    from perennial.core.amounts import human_bytes

    values = ", ".join(f"{number:,} values as {dtype}" for dtype, number in facts["values"].items())
    number = len(facts["files"])
    written = facts["files"][0] if number == 1 else f"{number} files"
    lines = [f"{facts['out']}: {facts['tensors']} tensors, {values}, {human_bytes(facts['bytes'])} in {written}"]
    lines += [f"  {name} is the same as {first}, and stored once" for name, first in facts["stored_once"].items()]
    lines += [f"  {name} has {bad:,} values that are NaN or infinite" for name, bad in facts["not_finite"].items()]
    lines.append(f"  carried over: {', '.join(facts['carried'])}")
    if facts["left_out"]:
        lines.append(f"  left out: {', '.join(facts['left_out'])}")
    return "\n".join(lines)
