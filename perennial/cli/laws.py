"""Fit scaling laws to a table of runs, predict with them, plot them, and gather finished runs into a ledger.

A table is a CSV, JSON or JSONL file with one run a row: parameters, tokens (or FLOPs) and loss, and unique tokens where
data repeat; or whatever else the law reads (`perennial list laws`). Columns with usual names are found; others are
mapped: --column parameters=n_params:M (millions).
"""

from __future__ import annotations

import argparse

HELP = "fit, predict and plot scaling laws; gather finished runs (laws fit, predict, plot, ledger)"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _fit(actions.add_parser("fit", help="fit a law to a table of runs", description="Fit a law to a table of runs."))
    _predict(actions.add_parser("predict", help="loss of a run, or the best run for a budget", description="Predict."))
    plot = actions.add_parser("plot", help="a law and its intervals, such as loss against compute", description="Plot.")
    plot.add_argument("law", metavar="LAW", help="file that `laws fit --out` wrote")
    plot.add_argument("--out", required=True, metavar="FILE", help="picture to write: .png, .svg or .html")
    plot.add_argument("--table", metavar="FILE", help="runs to draw as points")
    _columns(plot)
    ledger = actions.add_parser("ledger", help="add finished runs to a ledger", description="Add finished runs.")
    ledger.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    ledger.add_argument("--out", default="ledger.jsonl", metavar="FILE", help="ledger (default: ledger.jsonl)")
    for action in (plot, ledger):
        action.add_argument("--json", action="store_true", help="print the result as JSON")


def _columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--column",
        dest="columns",
        action="append",
        default=[],
        metavar="NAME=COLUMN[:UNIT]",
        help="what a column holds, and its unit (K, M, B, T, a factor; bits for losses); may be repeated",
    )
    parser.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="only such rows; may be repeated"
    )


def _fit(parser: argparse.ArgumentParser) -> None:
    words = "CSV, JSON or JSONL file, or a ledger; several files are one table, such as one file a curve"
    parser.add_argument("tables", nargs="+", metavar="TABLE", help=words)
    _columns(parser)
    words = "law to fit, any of `perennial list laws` (default: auto, a blend of laws of size and tokens)"
    parser.add_argument("--form", default="auto", metavar="LAW", help=words)
    words = "setting of the law, such as domains=web,code of a mixture; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=words)
    parser.add_argument("--out", metavar="FILE", help="law file to write, such as law.json")
    parser.add_argument("--resamples", type=int, default=200, metavar="N", help="of the bootstrap (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    words = "leave out flagged rows: outliers, under-trained, or worse than the best of equal size and tokens"
    parser.add_argument("--drop", action="append", default=[], metavar="KIND", help=words)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("law", metavar="LAW", help="file that `laws fit --out` wrote")
    parser.add_argument("--params", metavar="N", help="size of the model, such as 1.4B")
    parser.add_argument("--tokens", metavar="N", help="tokens trained on, such as 900B")
    parser.add_argument("--unique", metavar="N", help="different tokens among them (default: all)")
    words = "any other input of the law, such as share=0.1; may be repeated"
    parser.add_argument("--at", action="append", default=[], metavar="NAME=VALUE", help=words)
    parser.add_argument("--table", metavar="FILE", help="predict each of its rows, and the error where it is measured")
    _columns(parser)
    parser.add_argument("--schedule", metavar="NAME", help="for a law of curves: one of `perennial list schedules`")
    parser.add_argument("--updates", type=int, metavar="N", help="with --schedule: updates of the run")
    words = "with --schedule: its setting, such as peak=3e-4; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=words)
    parser.add_argument("--flops", metavar="N", help="budget, such as 3e20: predicts the best size and tokens for it")
    parser.add_argument("--max-params", metavar="N", help="with --flops: largest size allowed")
    parser.add_argument("--inference-tokens", metavar="N", help="with --flops: tokens to be served out of the budget")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs one of the actions and prints its result."""
    import json

    from perennial.cli import _laws

    action = {"fit": _laws.fit, "predict": _laws.predict, "plot": _laws.plot, "ledger": _laws.ledger}[args.action]
    facts, text = action(args)
    print(json.dumps(facts, indent=2) if args.json else text)
    return 0
