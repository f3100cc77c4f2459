"""Continue the pre-training of a checkpoint, or of any Hugging Face model folder, on new data without forgetting."""

from __future__ import annotations

import argparse

from perennial.cli._launch import add_launch, launch_settings

HELP = "continue a model on new data, with the recipe derived from its lineage"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint or model folder, or a run folder (its newest checkpoint)"
    )
    parser.add_argument(
        "--data", action="append", required=True, metavar="NAME=PATH", help="new data: raw text or a prepared corpus"
    )
    parser.add_argument("--tokens", required=True, metavar="N", help="budget: '2B tokens', '1e18 FLOPs' or '3 h'")
    parser.add_argument("--out", required=True, metavar="RUN", help="run folder to make (or to resume)")
    parser.add_argument(
        "--replay",
        action="append",
        metavar="SHARE|NAME=PATH",
        help="share of replayed old data ('25%%'; default: by the measured shift), or a corpus in its place, such as "
        "a stand-in for what a model from elsewhere was trained on; both may be given",
    )
    parser.add_argument(
        "--parent",
        action="append",
        default=[],
        metavar="FACT=VALUE",
        help="what you know of the past of a model from elsewhere: tokens=2T, flops=1e22, peak=3e-4 (highest learning "
        "rate) or rate=3e-5 (final one); the rest is estimated",
    )
    words = "where a corpus of the parent lies now"
    parser.add_argument("--moved", action="append", default=[], metavar="NAME=PATH", help=words)
    words = "learning rate to re-warm to (default: from the budget)"
    parser.add_argument("--peak", type=float, metavar="RATE", help=words)
    words = (
        "one of `perennial list continuations`, or '{name: wsd, decay: 10%%}' (default: by lineage, shift and budget)"
    )
    parser.add_argument("--recipe", metavar="NAME", help=words)
    parser.add_argument("--schedule", metavar="NAME", help="the same as --recipe")
    words = "N continuations with other seeds in RUN-1 to RUN-N, then RUN taught by all, or '{members: N, weight: 0.9}'"
    parser.add_argument("--ensemble", metavar="N", help=words)
    parser.add_argument(
        "--optimizer-state",
        choices=["keep", "reset"],
        default="keep",
        help="moments of the parent (default: keep, where there are any)",
    )
    parser.add_argument("--seed", type=int, help="default: the parent's + 1, 0 for one from elsewhere")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of the derived recipe, as in batch.sequence_length=512",
    )
    parser.add_argument("--text-field", default="text", help="field with the text in raw .jsonl or .parquet data")
    parser.add_argument(
        "--validation", default="1%", metavar="SHARE", help="share of raw documents kept for validation"
    )
    add_launch(parser)
    parser.add_argument("--dry-run", action="store_true", help="derive and print the recipe and its effect, then stop")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Derives the recipe, writes it into the run folder, and runs it."""
    import functools
    import shlex
    import sys
    from pathlib import Path

    from perennial.cli._names import named_paths
    from perennial.cli._outcome import show_recipe, show_result
    from perennial.train import continuing, ensembling, launch
    from perennial.train.origin import stated_facts
    from perennial.train.workers import rank

    launched = launch_settings(args)
    replay = args.replay or []
    shares = [r for r in replay if "=" not in r]
    go_on = functools.partial((launch if launched else continuing).continue_run, **launched)
    if args.ensemble:
        ensemble = ensembling.ensemble_of(args.ensemble)
        go_on = functools.partial(ensembling.continue_ensemble, ensemble=ensemble, run=go_on)
    result = go_on(
        Path(args.checkpoint),
        named_paths("--data", args.data),
        budget=args.tokens,
        out=Path(args.out),
        dry_run=args.dry_run,
        text_field=args.text_field,
        validation=args.validation,
        stand_ins=named_paths("--replay", [r for r in replay if "=" in r]),
        command=shlex.join(["perennial", *sys.argv[1:]]),
        quiet=args.json,
        replay=shares[-1] if shares else None,
        moved=named_paths("--moved", args.moved),
        peak=args.peak,
        how=args.recipe,
        schedule=args.schedule,
        optimizer_state=args.optimizer_state,
        seed=args.seed,
        facts=stated_facts(args.parent),
        settings=args.set,
    )
    if args.dry_run:
        show_recipe(result, as_json=args.json)
        return 0
    if rank() == 0:
        print(ensembling.to_text(result["ensemble"]) + "\n" if "ensemble" in result and not args.json else "", end="")
        show_result(result, Path(args.out), as_json=args.json)
    return 0 if result["result"]["complete"] else 130
