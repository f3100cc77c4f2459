"""Turn run folders into one self-contained HTML page."""

from __future__ import annotations

import argparse

HELP = "turn run folders into one self-contained HTML page"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders to compare")
    parser.add_argument(
        "--out", metavar="FILE", help="HTML file to write (default: report.html in the first run folder)"
    )
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints the table."""
    import json
    from pathlib import Path

    from perennial.report.comparison import compare
    from perennial.report.page import write_report

    folders = [Path(r) for r in args.runs]
    out = Path(args.out) if args.out else folders[0] / "report.html"
    comparison = compare(folders)
    write_report(comparison, out)
    print(json.dumps(comparison.to_json(), indent=2) if args.json else f"{comparison.text_table()}\n\nreport: {out}")
    return 0
