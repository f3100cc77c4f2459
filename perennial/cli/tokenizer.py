"""Train a tokenizer on your own text."""

from __future__ import annotations

import argparse

HELP = "train a byte-level BPE tokenizer on your own text (tokenizer train)"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser("train", help=HELP, description="Train a byte-level BPE tokenizer and write its folder.")
    train.add_argument("inputs", nargs="+", metavar="INPUT", help="files or folders (.txt .jsonl[.gz|.zst] .parquet)")
    train.add_argument("--vocabulary-size", type=int, required=True, metavar="N", help="number of tokens in all")
    train.add_argument("--out", required=True, metavar="FOLDER", help="folder to write; must not exist")
    train.add_argument("--text-field", default="text", help="field with the text in .jsonl and .parquet files")
    train.add_argument(
        "--reader",
        default="auto",
        metavar="'NAME KEY=VALUE ...'",
        help="how to read the inputs (default: by their suffix); see: perennial list readers",
    )
    train.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Trains, writes the folder and says what is in it."""
    import json
    from pathlib import Path

    from perennial.cli._names import component
    from perennial.core.progress import Progress
    from perennial.data.tokenizers.train import train_tokenizer

    with Progress("tokenizer", unit="bytes", quiet=args.json) as progress:
        folder = train_tokenizer(
            args.inputs,
            Path(args.out),
            vocabulary_size=args.vocabulary_size,
            reader=component("--reader", args.reader),
            text_field=args.text_field,
            progress=progress,
        )
    facts = {
        "tokenizer": str(args.out),
        "vocabulary_size": folder.vocabulary_size,
        "separator_id": folder.separator_id,
        "fingerprint": folder.fingerprint,
    }
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print(f"{args.out}: {folder.vocabulary_size} tokens, documents end with id {folder.separator_id}")
    return 0
