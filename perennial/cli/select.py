"""Keep the documents of a text that a checkpoint finds likeliest, with the loss of each."""

from __future__ import annotations

import argparse

HELP = "keep the documents of a text that a checkpoint finds likeliest"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("source", metavar="CORPUS", help="prepared corpus (its training part), or raw text")
    parser.add_argument(
        "--by", required=True, metavar="CHECKPOINT", help="model whose loss decides, or a run folder (its newest)"
    )
    parser.add_argument(
        "--keep", default="20%", metavar="SHARE", help="share of the tokens, or '5M tokens' (default: 20%%)"
    )
    words = "choose from a share of a prepared corpus, or '50M tokens' of it, at random (default: all of it)"
    parser.add_argument("--of", metavar="SHARE", help=words)
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="file to write; must not exist")
    parser.add_argument(
        "--which", choices=["lowest", "middle", "highest"], default="lowest", help="which losses (default: lowest)"
    )
    parser.add_argument("--sequence-length", type=int, metavar="T", help="default: as in the checkpoint's training")
    parser.add_argument("--text-field", default="text", help="field with the text in .jsonl and .parquet files")
    parser.add_argument(
        "--reader",
        default="auto",
        metavar="'NAME KEY=VALUE ...'",
        help="reader of raw text (default: by its suffix); see: perennial list readers",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Writes the kept documents and says what they are."""
    import json
    from pathlib import Path

    from perennial.cli._names import component
    from perennial.core.errors import UserError
    from perennial.train.selecting import select, to_text

    if args.sequence_length is not None and args.sequence_length < 1:
        raise UserError(f"--sequence-length {args.sequence_length}: at least 1 is needed")
    result = select(
        Path(args.source),
        Path(args.by),
        Path(args.out),
        keep=args.keep,
        of=args.of,
        which=args.which,
        text_field=args.text_field,
        reader=component("--reader", args.reader),
        sequence_length=args.sequence_length,
        quiet=args.json,
    )
    print(json.dumps(result, indent=2) if args.json else to_text(result))
    return 0
