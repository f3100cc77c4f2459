"""A budget in, a recipe with predictions out; or what memory a recipe needs. What only plans loads no torch."""

from __future__ import annotations

import argparse

HELP = "plan a run for a budget: recipe, cost and predicted losses; or the memory that a recipe needs"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    words = "checkpoint or run folder to continue, or 'none' for a new model; with --memory a recipe or run folder"
    parser.add_argument("model", nargs="?", metavar="CHECKPOINT", help=words)
    words = "with --memory: change a setting, as in batch.micro_batch=4"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=words)
    words = "new text: a prepared corpus, or raw text, whose size is estimated"
    parser.add_argument("--data", action="append", metavar="NAME=PATH", help=words)
    words = "old text, or a share of it ('25%%') that is not to be chosen; both may be given"
    parser.add_argument("--replay", action="append", metavar="SHARE|NAME=PATH", help=words)
    words = "'20B tokens', '3e20 FLOPs', '8 h on 1 x H200' or '$500 at $2.5/h on 8 x H100'"
    parser.add_argument("--budget", metavar="AMOUNT", help=words)
    words = "file to write, ready for `perennial train` (.yaml); with --calibrate the calibration (.json)"
    parser.add_argument("--out", metavar="FILE", help=words)
    parser.add_argument("--calibration", metavar="FILE", help="what --calibrate has measured")
    words = "law of your own runs, made by `perennial laws fit`: the size of a new model; what retraining would reach"
    parser.add_argument("--laws", metavar="FILE", help=words)
    parser.add_argument("--ledger", metavar="FILE", help="your finished updates, gathered by `perennial laws ledger`")
    parser.add_argument("--recipe", metavar="NAME", help="one of `perennial list continuations` (default: chosen)")
    parser.add_argument("--sizes", metavar="NAMES", help="of a new model: presets to choose from, such as 1m,4m,10m")
    words = "run the checkpoint on old and new text, as `continue` does: where no --calibration and no --replay SHARE "
    words += "decides the replay, how far they lie apart does"
    parser.add_argument("--measure-shift", action="store_true", help=words)
    words = "what is known of the past of a model from elsewhere, such as tokens=2T or peak=3e-4"
    parser.add_argument("--parent", action="append", default=[], metavar="FACT=VALUE", help=words)
    words = "change a setting of the recipe, as in batch.sequences=32"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=words)
    parser.add_argument("--mfu", type=float, metavar="SHARE", help="share of a device's peak that training reaches")
    parser.add_argument("--energy", action="store_true", help="also say the energy")
    parser.add_argument("--text-field", default="text", help="field with the text in raw .jsonl or .parquet data")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, sizes in bytes")
    group = parser.add_argument_group("calibrate: small runs on your own text, minutes on a CPU")
    group.add_argument("--calibrate", action="store_true", help="measure instead of planning; goes on where it stopped")
    group.add_argument("--minutes", type=float, default=10.0, help="about how long all runs may take (default: 10)")
    group = parser.add_argument_group("memory of a recipe")
    group.add_argument("--memory", action="store_true", help="plan memory: part by part, per device")
    group.add_argument("--processes", type=int, default=1, metavar="N", help="processes, one per GPU (default: 1)")
    words = "processes on each machine (default: all, GPUs 8)"
    group.add_argument("--per-machine", type=int, metavar="N", help=words)
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where the machine has a GPU")
    group.add_argument("--memory-limit", metavar="SIZE", help="of one device, such as 80GB (default: this machine's)")


def run(args: argparse.Namespace) -> int:
    """Prints the plan; exit code 0 whether it fits or not."""
    from perennial.core.errors import UserError

    if args.model is None:
        raise UserError("plan: name a checkpoint, 'none' for a new model, or with --memory a recipe")
    if args.memory:
        return _memory(args)
    from perennial.cli._plan import calibrate, check_options, plan_for, write_recipe
    from perennial.cli._plan_new import new_model_plan

    check_options(args)
    if args.calibrate:
        return calibrate(args)
    import json

    plan = new_model_plan(args) if args.model == "none" else plan_for(args)
    if args.out and not args.dry_run:
        write_recipe(plan, args)
    if args.json:
        print(json.dumps(plan.to_json(), indent=2))
    else:
        from perennial.plan.words import to_text

        print(to_text(plan))
    return 0


def _memory(args: argparse.Namespace) -> int:
    """What a recipe needs on each device."""
    import json
    from pathlib import Path

    from perennial.cli._memory import run_of
    from perennial.core.errors import UserError
    from perennial.plan.memory import plan_memory, to_text
    from perennial.train.recipe import read

    for name in ("processes", "per_machine"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    path = Path(args.model)
    path = path / "recipe.yaml" if path.is_dir() else path
    plan = plan_memory(run_of(read(path, args.overrides), path.parent, args))
    print(json.dumps(plan.to_json(), indent=2) if args.json else to_text(plan))
    return 0
