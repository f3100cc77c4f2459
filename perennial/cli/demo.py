"""Show the whole main job on real text in minutes."""

from __future__ import annotations

import argparse

HELP = "show the main job, raw text to report, on this machine's own text (or yours) in minutes"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("--minutes", type=float, default=5.0, help="time to spend, about (default: 5)")
    parser.add_argument("--old", metavar="PATH", help="your own old text: folder or file (.txt .jsonl .parquet ...)")
    parser.add_argument("--new", metavar="PATH", help="your own new text")
    parser.add_argument("--text-field", default="text", help="field with the text in .jsonl and .parquet files")
    parser.add_argument("--vocabulary-size", type=int, default=4096, metavar="N", help="tokens (default: 4096)")
    parser.add_argument("--out", default="demo", metavar="FOLDER", help="where everything is written (default: demo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs or resumes the demo and prints its table."""
    import json
    import math
    from pathlib import Path

    from perennial.bench.demo import Demo, run_demo
    from perennial.core.errors import UserError
    from perennial.report.comparison import compare
    from perennial.report.page import write_report

    if (args.old is None) != (args.new is None):
        raise UserError("--old and --new belong together: give both, or neither for the embedded text")
    if not 0.5 <= args.minutes < math.inf:
        raise UserError(f"--minutes {args.minutes}: at least 0.5 is needed to train anything")
    for option, path in (("--old", args.old), ("--new", args.new)):
        if path and not Path(path).exists():
            raise UserError(f"{option} {path}: no such file or folder")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file, the demo needs a folder")
    result = run_demo(
        Demo(
            out=out,
            minutes=args.minutes,
            old=Path(args.old) if args.old else None,
            new=Path(args.new) if args.new else None,
            text_field=args.text_field,
            seed=args.seed,
            vocabulary_size=args.vocabulary_size,
        ),
        quiet=args.json,
    )
    if not result.complete:
        print("stopped; everything is saved. The same command goes on from here.")
        return 130
    comparison = compare(result.runs, labels=result.labels)
    write_report(comparison, out / "report.html")
    print(
        json.dumps(comparison.to_json(), indent=2)
        if args.json
        else f"\n{comparison.text_table()}\n\nreport: {out / 'report.html'}"
    )
    return 0
