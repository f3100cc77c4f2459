"""Change a model's vocabulary: tokens for a new language or domain, with rows for them."""

from __future__ import annotations

import argparse

HELP = "add tokens for a new language or domain to a model (vocab extend)"

_DESCRIPTION = """\
Add tokens for a new language or domain to a model's BPE or Unigram tokenizer, and rows for them to the model.

Old ids stay, text without a new token is cut as before, and all other weights are the same to the bit. The result is a
complete Hugging Face folder; train it with `perennial continue`, or its new rows first with --train-rows."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    extend = actions.add_parser(
        "extend", help=HELP, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    extend.add_argument("model", metavar="MODEL_DIR", help="model folder, or a run folder (its newest checkpoint)")
    extend.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="text of the new language or domain, raw or a prepared corpus; repeatable",
    )
    extend.add_argument("--add", type=int, required=True, metavar="N", help="number of tokens to add")
    extend.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist")
    extend.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="old text that must be cut exactly as before; takes fewer pairs, so the new text gains less; repeatable",
    )
    extend.add_argument(
        "--init",
        default="mean",
        metavar="NAME",
        help="what new rows start as: mean of the pieces (default), position, contexts or zero_mean",
    )
    extend.add_argument(
        "--pad-to", type=int, metavar="N", help="make the rows a multiple of N (default: of what they are one of now)"
    )
    extend.add_argument("--train-rows", metavar="TOKENS", help="train the new rows first, all else frozen: '1M tokens'")
    extend.add_argument(
        "--validation", default="5%", metavar="SHARE", help="share of documents --train-rows holds out (default: 5%%)"
    )
    extend.add_argument("--text-field", default="text", help="field with the text in .jsonl and .parquet files")
    extend.add_argument(
        "--reader",
        default="auto",
        metavar="'NAME KEY=VALUE ...'",
        help="how to read the texts (default: by their suffix); see: perennial list readers",
    )
    extend.add_argument("--seed", type=int, default=0, help="for rows that are drawn (default: 0)")
    extend.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Extends the vocabulary and says what that does to texts."""
    import json
    from pathlib import Path

    from perennial.cli._names import component, named_paths
    from perennial.data.tokenizers.extend import TextReading
    from perennial.train.extending import Asked, extend_vocabulary, to_text

    asked = Asked(
        add=args.add,
        keep=named_paths("--keep", args.keep),
        init=args.init,
        pad_to=args.pad_to,
        seed=args.seed,
        reading=TextReading(reader=component("--reader", args.reader), text_field=args.text_field),
    )
    data, out = named_paths("--data", args.data), Path(args.out)
    how = {"train_rows": args.train_rows, "validation": args.validation, "quiet": args.json}
    result = extend_vocabulary(Path(args.model), data, out, asked, **how)
    print(json.dumps(result, indent=2, ensure_ascii=False) if args.json else to_text(result))
    return 0 if result.get("complete", True) else 130
