"""Decay a stable checkpoint into a model to deploy: a branch, while the trunk can go on from where it stands."""

from __future__ import annotations

import argparse

HELP = "decay a stable checkpoint into a model, as a branch off its trunk"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint, or a run folder (its newest checkpoint that is no branch)"
    )
    parser.add_argument("--tokens", required=True, metavar="N", help="budget: '200M tokens', '1e17 FLOPs' or '1 h'")
    parser.add_argument("--out", required=True, metavar="RUN", help="run folder to make (or to resume)")
    parser.add_argument(
        "--final", default="0%", metavar="RATE|SHARE", help="rate at the end, or share of the trunk's (default: 0%%)"
    )
    parser.add_argument(
        "--shape", default="sqrt", metavar="NAME", help="sqrt (default), linear, cosine, exponential or inverse"
    )
    parser.add_argument(
        "--moved", action="append", default=[], metavar="NAME=PATH", help="where a corpus of the trunk lies now"
    )
    parser.add_argument("--seed", type=int, help="default: the trunk's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the derived recipe"
    )
    parser.add_argument("--dry-run", action="store_true", help="derive and print the recipe and its effect, then stop")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Derives the branch's recipe, writes it into the run folder, and runs it."""
    import json
    import shlex
    import sys
    from pathlib import Path

    import yaml

    from perennial.cli._names import named_paths
    from perennial.train.annealing import anneal_run
    from perennial.train.resolved import describe
    from perennial.train.workers import rank

    result = anneal_run(
        Path(args.checkpoint),
        out=Path(args.out),
        dry_run=args.dry_run,
        command=shlex.join(["perennial", *sys.argv[1:]]),
        quiet=args.json,
        budget=args.tokens,
        final=args.final,
        shape=args.shape,
        moved=named_paths("--moved", args.moved),
        seed=args.seed,
        settings=args.set,
    )
    if args.dry_run:
        resolved = result.pop("resolved")
        if args.json:
            print(json.dumps({**result, "resolved": resolved.model_dump(mode="json")}, indent=2))
        else:
            reasons = "".join(f"# {reason}\n" for reason in result["reasons"])
            print(reasons + yaml.safe_dump(result["recipe"], sort_keys=False))
            print(describe(resolved))
        return 0
    if args.json and rank() == 0:
        print(json.dumps(result, indent=2))
    return 0 if result["result"]["complete"] else 130
