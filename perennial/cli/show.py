"""Say what a path is: a corpus, a checkpoint with its lineage, any Hugging Face model folder, or a run."""

from __future__ import annotations

import argparse

HELP = "say what a corpus, checkpoint, model folder or run is, and what is known of its past"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="prepared corpus, checkpoint, model or run folder")
    parser.add_argument("--verify", action="store_true", help="also check every file against its checksum")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints what the path holds."""
    import json
    from pathlib import Path

    from perennial.report.show import show, to_text

    facts = show(Path(args.path), verify=args.verify)
    print(json.dumps(facts, indent=2) if args.json else to_text(facts))
    return 0
