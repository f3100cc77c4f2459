"""Let a checkpoint go on with a text, or write text of its own into a file."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perennial.evals.generation import Writer

HELP = "let a checkpoint go on with a text, or write a corpus of its own"


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
    parser.add_argument("--tokens", default="100", metavar="N", help="most tokens to add, such as 1M (default: 100)")
    words = "0 takes the likeliest token each time; 1 as learned (default: 0, with --out 1)"
    parser.add_argument("--temperature", type=float, help=words)
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="SHARE", help="draw from the likeliest tokens that make up this"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of the arithmetic (default: fp32)"
    )
    parser.add_argument(
        "--out",
        metavar="FILE.jsonl",
        help="write documents, --tokens in all, drawn from their beginnings or from the prompts, into this file; the "
        "same command goes on when it was stopped; use: continue --replay self=FILE.jsonl",
    )
    parser.add_argument("--batch", type=int, metavar="N", help="documents written at once with --out (default: 32)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints each prompt and what follows as it comes."""
    import json
    import sys
    from pathlib import Path

    from perennial.core.errors import UserError
    from perennial.core.lineage import newest_checkpoint
    from perennial.evals.generation import Writer
    from perennial.evals.self_text import number_of_tokens

    tokens = number_of_tokens(args.tokens)
    if args.batch is not None and not args.out:
        raise UserError("--batch belongs to --out, which is not given")
    writer = Writer(newest_checkpoint(Path(args.checkpoint)), precision=args.precision)
    if writer.not_applied:
        told = ", ".join(f"{key} {value}" for key, value in writer.not_applied.items())
        print(f"note: generation_config.json has {told}, which is not applied here", file=sys.stderr)
    if args.out:
        return _write_file(args, writer, tokens)
    results = []
    for prompt in args.prompt or [""]:
        pieces = []
        settings = {"temperature": args.temperature or 0.0, "top_p": args.top_p, "seed": args.seed}
        for piece in writer.write(prompt, tokens=tokens, **settings):
            pieces.append(piece)
            if not args.json:
                print(prompt + piece if len(pieces) == 1 else piece, end="", flush=True)
        results.append({"prompt": prompt, "text": "".join(pieces)})
        if not args.json:
            print("" if pieces else prompt)
    if args.json:
        print(json.dumps({"checkpoint": args.checkpoint, **settings, "results": results}, indent=2))
    return 0


def _write_file(args: argparse.Namespace, writer: Writer, tokens: int) -> int:
    import json
    from pathlib import Path

    from perennial.evals.self_text import Sampling, write_text
    from perennial.model.inspection import weights_id

    sampling = Sampling(
        tokens=tokens,
        prompts=tuple(args.prompt or [""]),
        temperature=1.0 if args.temperature is None else args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        batch=32 if args.batch is None else args.batch,
    )
    name = weights_id(writer.folder.path)
    result = write_text(writer, Path(args.out), sampling, name=name, quiet=args.json)
    print(
        json.dumps(result, indent=2) if args.json else "{out}: {documents} documents, {tokens} tokens".format(**result)
    )
    return 0
