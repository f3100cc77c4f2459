"""Average the weights of models: a parent and its child, or a soup of stages, with shares given or searched for."""

from __future__ import annotations

import argparse

HELP = "average the weights of models, with given shares or by a search"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="two or more model folders, or run folders (their newest checkpoint)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--weights", metavar="A,B,...", help="share of each model (default: all equal)")
    parser.add_argument(
        "--search",
        action="append",
        metavar="NAME=CORPUS",
        help="prepared corpus whose validation loss decides, such as old=... and new=...; repeatable",
    )
    parser.add_argument("--points", type=int, default=11, metavar="N", help="places between two models (default: 11)")
    parser.add_argument(
        "--prefer",
        action="append",
        default=[],
        metavar="NAME=SHARE",
        help="importance of a loss in the search (default: the average of all)",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=65536, metavar="N", help="validation tokens per corpus (default: 65536)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Writes the average and prints the table of the search."""
    import json
    from pathlib import Path

    from perennial.cli._names import named_paths
    from perennial.core.errors import UserError
    from perennial.train.merging import Search, merge, to_text

    if args.prefer and not args.search:
        raise UserError("--prefer belongs to --search, which is not given")
    if args.max_tokens < 1:
        raise UserError(f"--max-tokens {args.max_tokens}: at least 1 is needed")
    search = None
    if args.search:
        corpora = named_paths("--search", args.search)
        prefer = dict(_number(text) for text in args.prefer)
        search = Search(corpora, prefer, points=args.points, max_tokens=args.max_tokens)
    weights = None
    if args.weights:
        try:
            weights = [float(text) for text in args.weights.split(",")]
        except ValueError:
            raise UserError(f"--weights {args.weights}: give numbers with commas between them, as in 0.3,0.7") from None
    models = [Path(model) for model in args.models]
    result = merge(models, Path(args.out), weights=weights, search=search, quiet=args.json)
    print(json.dumps(result, indent=2) if args.json else to_text(result))
    return 0


def _number(text: str) -> tuple[str, float]:
    from perennial.core.errors import UserError

    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UserError(f"--prefer {text!r} must look like NAME=SHARE, such as --prefer old=0.5") from None
