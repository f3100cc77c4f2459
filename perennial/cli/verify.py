"""Compare two model folders: weights, tokenizer, logits on real text; or native code with transformers on one."""

from __future__ import annotations

import argparse

HELP = "compare two model folders: weights, tokenizer, logits on real text"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("first", metavar="A", help="model folder, or a run folder (its newest checkpoint)")
    parser.add_argument(
        "second", metavar="B", nargs="?", help="another one (default: A as run natively and by transformers)"
    )
    parser.add_argument("--text", metavar="FILE", help="text to compare on (default: a paragraph in several scripts)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints what agrees and what does not; exits with 1 when the two are not the same."""
    import json
    from pathlib import Path

    from perennial.core.errors import UserError
    from perennial.core.lineage import newest_checkpoint
    from perennial.evals.parity import SAMPLE
    from perennial.evals.verification import to_text, verify

    text = SAMPLE
    if args.text:
        try:
            text = Path(args.text).read_text(encoding="utf-8")[:100_000]
        except UnicodeDecodeError as error:
            raise UserError(f"--text {args.text}: not UTF-8 text: {error}") from None
        if not text.strip():
            raise UserError(f"--text {args.text}: there is no text in it")
    second = newest_checkpoint(Path(args.second)) if args.second else None
    result = verify(newest_checkpoint(Path(args.first)), second, text=text, quiet=args.json)
    print(json.dumps(result, indent=2) if args.json else to_text(result))
    return 0 if result["same"] else 1
