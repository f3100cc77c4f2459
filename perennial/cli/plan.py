"""Say before a run starts what it will need. This version plans memory (--memory); budgets come later."""

from __future__ import annotations

import argparse

HELP = "say what a run will need: its memory on each device, and whether it fits"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file (.yaml), or a run folder")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="change a setting, as in batch.micro_batch=4"
    )
    parser.add_argument("--memory", action="store_true", help="plan memory: part by part, per device")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes, one per GPU (default: 1)")
    parser.add_argument("--per-machine", type=int, metavar="N", help="processes on each machine (default: all, GPUs 8)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where the machine has a GPU")
    parser.add_argument("--memory-limit", metavar="SIZE", help="of one device, such as 80GB (default: this machine's)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, sizes in bytes")


def run(args: argparse.Namespace) -> int:
    """Prints the plan; exit code 0 whether it fits or not."""
    import json
    from pathlib import Path

    from perennial.cli._memory import run_of
    from perennial.core.errors import UserError
    from perennial.plan.memory import plan_memory, to_text
    from perennial.train.recipe import read

    if not args.memory:
        raise UserError("plan: this version plans memory only; say --memory")
    for name in ("processes", "per_machine"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    path = Path(args.recipe)
    path = path / "recipe.yaml" if path.is_dir() else path
    plan = plan_memory(run_of(read(path, args.overrides), path.parent, args))
    print(json.dumps(plan.to_json(), indent=2) if args.json else to_text(plan))
    return 0
