"""Let a checkpoint go on with a text."""

from __future__ import annotations

import argparse

HELP = "let a checkpoint go on with a text"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="any model folder, or a run folder (its newest checkpoint)"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to go on with, several times for several texts (default: the beginning of a document)",
    )
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="most tokens to add (default: 100)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token each time (default); 1 as learned"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="SHARE", help="draw from the likeliest tokens that make up this"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of the arithmetic (default: fp32)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints each prompt and what follows as it comes."""
    import json
    import sys
    from pathlib import Path

    from perennial.core.lineage import newest_checkpoint
    from perennial.evals.generation import Writer

    writer = Writer(newest_checkpoint(Path(args.checkpoint)), precision=args.precision)
    if writer.not_applied:
        told = ", ".join(f"{key} {value}" for key, value in writer.not_applied.items())
        print(f"note: generation_config.json has {told}, which is not applied here", file=sys.stderr)
    results = []
    for prompt in args.prompt or [""]:
        pieces = []
        settings = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
        for piece in writer.write(prompt, tokens=args.tokens, **settings):
            pieces.append(piece)
            if not args.json:
                print(prompt + piece if len(pieces) == 1 else piece, end="", flush=True)
        results.append({"prompt": prompt, "text": "".join(pieces)})
        if not args.json:
            print("" if pieces else prompt)
    if args.json:
        print(json.dumps({"checkpoint": args.checkpoint, **settings, "results": results}, indent=2))
    return 0
