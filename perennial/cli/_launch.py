"""The options `--processes` and `--max-restarts`, which several commands share."""

from __future__ import annotations

import argparse
from typing import Any


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Declares `--processes`."""
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="run as N processes of this machine, by torchrun: one for each GPU, or for a part of the cores",
    )


def add_launch(parser: argparse.ArgumentParser) -> None:
    """Declares `--processes` and `--max-restarts`."""
    add_processes(parser)
    parser.add_argument(
        "--max-restarts",
        type=int,
        metavar="R",
        help="with --processes: how often all start again, from the newest checkpoint, when one crashes (default: 3)",
    )


def launch_settings(args: argparse.Namespace) -> dict[str, Any]:
    """{'processes', 'max_restarts'} as asked for, empty for this process alone. Raises UserError."""
    from perennial.core.errors import UserError
    from perennial.train.launch import DEFAULT_RESTARTS, check_launch

    if args.processes is None:
        if args.max_restarts is not None:
            raise UserError(f"--max-restarts {args.max_restarts}: needs --processes")
        return {}
    max_restarts = DEFAULT_RESTARTS if args.max_restarts is None else args.max_restarts
    check_launch(args.processes, max_restarts)
    return {"processes": args.processes, "max_restarts": max_restarts}


def is_one_of_many() -> bool:
    """Whether torchrun started this process."""
    from perennial.train.workers import under_torchrun

    return under_torchrun()


def examine_together(processes: int | None, folder: str | None, *, as_json: bool) -> int:
    """Checks N new processes of this machine, or those that torchrun started, and prints what rank 0 found."""
    import json
    from pathlib import Path

    from perennial.core.errors import UserError
    from perennial.train import cluster_advice, cluster_checks, launch

    if processes is not None:
        command = ["doctor", *(["--folder", folder] if folder else []), *(["--json"] if as_json else [])]
        code, output = launch.run_processes(command, processes=processes, max_restarts=0)
        print(output, end="")
        return code
    if not is_one_of_many():
        raise UserError(f"--folder {folder}: is for several processes; add --processes N, or start it with torchrun")
    found = cluster_checks.examine(Path(folder or "."))
    if found is not None:
        report, hosts = found
        print(json.dumps(report, indent=2) if as_json else cluster_advice.in_words(report, hosts))
    return 0
