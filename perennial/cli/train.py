"""Run a recipe, or resume a run folder."""

from __future__ import annotations

import argparse

HELP = "run a recipe, or resume a run folder"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file (.yaml), or an existing run folder to resume")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="change a setting, as in stages.0.budget='2M tokens'",
    )
    parser.add_argument("--out", metavar="RUN", help="run folder (default: runs/<name of the recipe>)")
    parser.add_argument("--dry-run", action="store_true", help="validate and print what would be done, then stop")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Trains; exit code 130 when stopped by a signal with everything saved."""
    import json
    from pathlib import Path

    from perennial.core.errors import UserError
    from perennial.train.recipe import read
    from perennial.train.resolve import describe
    from perennial.train.run import plan, read_resolved, start, train

    path = Path(args.recipe)
    if path.is_dir() and (args.overrides or args.out):
        raise UserError(f"{path}: a run folder is resumed as it is; overrides and --out belong to a recipe file")
    recipe = None if path.is_dir() else read(path, args.overrides)
    if args.dry_run:
        resolved = plan(recipe, base=path.parent) if recipe else read_resolved(path)
        print(resolved.model_dump_json(indent=2) if args.json else describe(resolved))
        return 0
    if recipe is None:
        result = train(path, quiet=args.json)
    else:
        result = start(recipe, Path(args.out or Path("runs") / recipe.name), base=path.parent, quiet=args.json)
    if args.json:
        print(json.dumps(result, indent=2))
    return 0 if result["complete"] else 130
