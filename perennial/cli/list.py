"""List the components of a kind: schedules, optimizers, objectives, readers, filters ..."""

from __future__ import annotations

import argparse

HELP = "list the components of a kind, such as schedules"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("kind", nargs="?", metavar="KIND", help="such as schedules; without it, the kinds are listed")
    parser.add_argument("--json", action="store_true", help="print name and description as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints one line per component, or per kind."""
    import json

    from perennial.core import plugins

    found = (
        plugins.describe(args.kind) if args.kind else {kind: ", ".join(plugins.names(kind)) for kind in plugins.kinds()}
    )
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    width = max(map(len, found), default=0)
    for name, text in found.items():
        print(f"{name:<{width}}  {text}")
    return 0
