"""One model from several: the average of their weights, with shares given or searched for, or their changes by TIES."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "average the weights of models, with given shares or by a search, or merge their changes by TIES"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="model folders, or run folders (their newest checkpoint)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--weights", metavar="A,B,...", help="share of each model (default: all equal)")
    parser.add_argument(
        "--search",
        action="append",
        metavar="NAME=CORPUS",
        help="prepared corpus whose validation loss decides, such as old=... and new=...; repeatable",
    )
    parser.add_argument("--points", type=int, default=11, metavar="N", help="places that a search tries (default: 11)")
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
    ties = parser.add_argument_group("changes of several children of one parent (TIES)")
    ties.add_argument("--ties", action="store_true", help="trim small changes, elect signs, add the mean to the parent")
    ties.add_argument("--density", metavar="SHARE", help="share of each model's changes that stays (default: 20%%)")
    words = "what their mean is multiplied by; with --search the largest that is tried, from 0 (default: 1)"
    ties.add_argument("--scale", type=float, metavar="X", help=words)
    ties.add_argument("--parent", metavar="MODEL", help="what the models began as (default: by their lineage)")


def run(args: argparse.Namespace) -> int:
    """Writes the average and prints the table of the search."""
    import json
    from pathlib import Path

    from perennial.cli._names import named_paths
    from perennial.core.errors import UserError
    from perennial.train.merging import merge, to_text
    from perennial.train.merging_search import Search

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
    result = merge(models, Path(args.out), weights=weights, search=search, ties=_ties(args), quiet=args.json)
    print(json.dumps(result, indent=2) if args.json else to_text(result))
    return 0


def _number(text: str) -> tuple[str, float]:
    from perennial.core.errors import UserError

    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UserError(f"--prefer {text!r} must look like NAME=SHARE, such as --prefer old=0.5") from None


def _ties(args: argparse.Namespace) -> Any:
    """The settings of TIES, None where it is not asked for. Raises UserError for one of them without it."""
    from pathlib import Path

    from perennial.core.amounts import parse
    from perennial.core.errors import UserError
    from perennial.train.merging import Ties

    given = {key: vars(args)[key] for key in ("density", "scale", "parent") if vars(args)[key] is not None}
    if not args.ties:
        if given:
            raise UserError(f"--{next(iter(given))} belongs to --ties, which is not given")
        return None
    try:
        density = {"density": parse(given["density"], ("share",)).value} if "density" in given else {}
    except ValueError as error:
        raise UserError(f"--density: {error}") from None
    parent = {"parent": Path(given["parent"])} if "parent" in given else {}
    return Ties(**{**given, **density, **parent})
