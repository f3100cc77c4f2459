"""Run a recipe, or resume a run folder."""

from __future__ import annotations

import argparse

from perennial.cli._launch import add_launch, launch_settings

HELP = "run a recipe, or resume a run folder"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file (.yaml), or an existing run folder to resume")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="change a setting, as in stages.0.budget='2M tokens'; of a run folder only parallel.*, for this start",
    )
    parser.add_argument("--out", metavar="RUN", help="run folder (default: runs/<name of the recipe>)")
    add_launch(parser)
    parser.add_argument("--dry-run", action="store_true", help="validate and print what would be done, then stop")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Trains; exit code 130 when stopped by a signal with everything saved."""
    from pathlib import Path

    from perennial.core.errors import UserError
    from perennial.train import launch
    from perennial.train.recipe import read
    from perennial.train.resolved import describe
    from perennial.train.run import changed_parallel, plan, read_resolved, start, train
    from perennial.train.workers import rank

    path, launched = Path(args.recipe), launch_settings(args)
    if path.is_dir() and args.out:
        raise UserError(f"{path}: a run folder is resumed as it is; overrides and --out belong to a recipe file")
    recipe = None if path.is_dir() else read(path, args.overrides)
    if args.dry_run:
        if recipe:
            resolved = plan(recipe, base=path.parent, processes=args.processes)
        else:
            resolved = read_resolved(path)
            resolved = resolved.model_copy(update={"parallel": changed_parallel(resolved, args.overrides)})
        print(resolved.model_dump_json(indent=2) if args.json else describe(resolved))
        return 0
    folder = path if recipe is None else Path(args.out or Path("runs") / recipe.name)
    if launched:
        if recipe is None:
            code, output = launch.train(folder, args.overrides, **launched, as_json=args.json)
        else:
            code, output = launch.start(recipe, folder, base=path.parent, **launched, as_json=args.json)
        print(output, end="")
        return code
    if recipe is None:
        result = train(folder, parallel=args.overrides, quiet=args.json)
    else:
        result = start(recipe, folder, base=path.parent, quiet=args.json)
    if rank() == 0:
        from perennial.cli._outcome import show_foretold

        show_foretold(result, folder, as_json=args.json)
    return 0 if result["complete"] else 130
