"""Measure the product against what is published, on real text: checks with verdicts, tables and records."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perennial.bench.continual import Experiment

HELP = "reproduce continual pre-training on real text: checks, a table of recipes, the bar to beat"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.description = _DESCRIPTION
    parser.add_argument("what", choices=["continual"], help="old text, then new text: forgetting, replay, retraining")
    parser.add_argument("--corpora", metavar="FOLDER", help="one file per corpus; shifts name them")
    parser.add_argument("--shifts", nargs="+", default=[], metavar="OLD:NEW", help="also OLD:halves, OLD:years")
    parser.add_argument("--old", metavar="PATH", help="your own old text, with --new in the place of --corpora")
    parser.add_argument("--new", metavar="PATH", help="your own new text")
    parser.add_argument("--checks", nargs="+", default=[], metavar="X", help="a to j, bar, stream, table")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many (default: 3)")
    parser.add_argument("--sizes", nargs="+", default=["1m"], metavar="PRESET", help="models (default: 1m)")
    parser.add_argument("--tokens", default="400K tokens", help="of one update (default: 400K tokens)")
    parser.add_argument("--peak", type=float, help="learning rate of both sides (default: tuned on retraining)")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field with the text (default: text)")
    parser.add_argument("--vocabulary-size", type=int, default=4096, metavar="N", help="default: 4096")
    parser.add_argument("--split-by", metavar="NAME", help="field that keeps documents together (default: title)")
    parser.add_argument("--validation", metavar="SHARE", help="of the documents (default: 5%%, of a stream's 15%%)")
    parser.add_argument("--minutes", type=float, help="begin no run after so long; the same command goes on later")
    parser.add_argument("--list", action="store_true", help="say what is done and what is left, train nothing")
    parser.add_argument("--work", default="runs/continual", metavar="FOLDER", help="default: runs/continual")
    parser.add_argument("--records", metavar="FOLDER", help="also write recipes, events and verdicts there")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


_DESCRIPTION = (
    "Trains a base on old text, updates of it on new text, and retrains on everything, for every shift, size and seed; "
    "then says which of the published findings hold. Finished runs are not repeated; two of these commands may work "
    "on the same folder at the same time, each best with OMP_NUM_THREADS=1."
)


def run(args: argparse.Namespace) -> int:
    """Works on the grid and prints what is known."""
    import json
    import sys
    from pathlib import Path

    from perennial.bench.continual import run_experiment
    from perennial.report.continual import write_page

    experiment = _experiment(args)
    outcome = run_experiment(experiment, say=lambda text: print(text, file=sys.stderr, flush=True))
    page = write_page(outcome.to_json(), experiment.work / "continual.html")
    if args.records:
        outcome.keep(Path(args.records))
        write_page(outcome.to_json(), Path(args.records) / "continual.html")
    if args.json:
        print(json.dumps(outcome.to_json(), indent=2))
    else:
        print(outcome.listing if args.list else f"{outcome.text()}\n{outcome.listing}\npage: {page}")
    return 0 if outcome.complete or args.list or args.minutes else 130


def _experiment(args: argparse.Namespace) -> Experiment:
    """The arguments as an experiment. Raises UserError."""
    from pathlib import Path

    from perennial.bench.continual import CHECKS, Experiment
    from perennial.bench.continual_text import Reading, own_shift, standard_shifts
    from perennial.core.amounts import parse
    from perennial.core.errors import UserError, nearest
    from perennial.model.presets import shape

    if (args.old is None) != (args.new is None) or bool(args.old) == bool(args.corpora):
        raise UserError("give either --corpora FOLDER, or --old PATH and --new PATH")
    if args.old and args.shifts:
        raise UserError("--shifts belongs to --corpora; --old and --new are a shift by themselves")
    for check in args.checks:
        if check not in CHECKS:
            raise UserError(f"--checks {check}: choose from {' '.join(CHECKS)}.{nearest(check, CHECKS)}")
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: at least 1 is needed")
    if args.peak is not None and not 0 < args.peak < 1:
        raise UserError(f"--peak {args.peak:g}: must be a learning rate above 0 and below 1")
    try:
        tokens = int(parse(args.tokens, ("tokens",)).value)
    except ValueError as error:
        raise UserError(f"--tokens: {error}") from None
    if tokens < 1:
        raise UserError(f"--tokens {args.tokens}: must be above 0")
    for size in args.sizes:
        shape(size)  # raises for an unknown preset
    if args.old:
        shifts = [own_shift(Path(args.old), Path(args.new))]
    else:
        shifts = standard_shifts(Path(args.corpora), args.shifts)
    return Experiment(
        shifts=shifts,
        work=Path(args.work),
        checks=tuple(args.checks) or CHECKS,
        seeds=tuple(10 * i for i in range(args.seeds)),
        sizes=tuple(args.sizes),
        tokens=tokens,
        peak=args.peak,
        reading=Reading(args.text_field, args.split_by, args.vocabulary_size, args.validation),
        minutes=args.minutes,
        only_list=args.list,
        quiet=args.json,
    )
