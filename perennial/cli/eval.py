"""Measure a checkpoint: validation losses on prepared corpora, and scores on tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "measure a checkpoint: losses on prepared corpora, scores on tasks"
_FOR_DATA = {"max_tokens": "65536 tokens", "sequence_length": None, "ensemble": ()}
_FOR_TASKS = {"limit": None, "num_fewshot": None, "batch_size": 8, "online": False, "allow_task_code": False}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or a run folder (its newest checkpoint)"
    )
    parser.add_argument(
        "--against", metavar="CHECKPOINT", help="measure this one too, such as the parent, and state the differences"
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="default: what the machine does natively; for tasks fp32 on a CPU and as stored on a GPU",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    data = parser.add_argument_group("losses on prepared corpora")
    data.add_argument(
        "--data", action="append", metavar="NAME=PATH", help="prepared corpus; its validation split is used"
    )
    data.add_argument(
        "--max-tokens", metavar="N", help="most tokens per corpus; '100%%' for all (default: 65536 tokens)"
    )
    data.add_argument("--sequence-length", type=int, metavar="T", help="default: as in the checkpoint's last training")
    words = "measure it together with these, by the mean of their probabilities"
    data.add_argument("--ensemble", nargs="+", metavar="CHECKPOINT", help=words)
    tasks = parser.add_argument_group("scores on tasks (extra: eval)")
    words = "name of a task, or a task file (.yaml); several with commas or by repeating"
    tasks.add_argument("--tasks", action="append", metavar="NAME|FILE", help=words)
    tasks.add_argument("--limit", type=int, metavar="N", help="most examples per task (default: all)")
    tasks.add_argument(
        "--num-fewshot", type=int, metavar="N", help="solved examples in the prompt; default: the task's"
    )
    tasks.add_argument("--batch-size", type=int, metavar="N", help="requests at a time (default: 8)")
    tasks.add_argument("--online", action="store_true", default=None, help="let the harness download data")
    words = "run the Python code that task files name (read it first)"
    tasks.add_argument("--allow-task-code", action="store_true", default=None, help=words)


def run(args: argparse.Namespace) -> int:
    """Prints one line per corpus with forgetting and adaptation, and one per task and metric with its difference."""
    import json

    from perennial.core.errors import UserError
    from perennial.core.lineage import newest_checkpoint

    if not args.data and not args.tasks:
        raise UserError("eval: give --data NAME=PATH for losses, --tasks NAME|FILE for scores, or both")
    for_data, for_tasks = _settings(args, _FOR_DATA, "data"), _settings(args, _FOR_TASKS, "tasks")
    both = {"against": newest_checkpoint(Path(args.against)) if args.against else None, "precision": args.precision}
    checkpoint = newest_checkpoint(Path(args.checkpoint))
    losses: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    if args.tasks:
        from perennial.evals.tasks import evaluate_tasks, read_tasks, to_text

        for_tasks["allow_code"] = for_tasks.pop("allow_task_code")
        read_tasks(args.tasks, allow_code=for_tasks["allow_code"])  # their mistakes are told before anything runs
    if args.data:
        losses = _losses(checkpoint, args.data, **for_data, **both)
    if args.tasks:
        scores = evaluate_tasks(checkpoint, args.tasks, **for_tasks, **both, quiet=args.json)
    if args.json:
        print(json.dumps({**losses, **scores}, indent=2))
        return 0
    if losses:
        from perennial.evals.loss import losses_to_text

        print(losses_to_text(losses))
    if scores:
        print(to_text(scores))
    return 0


def _settings(args: argparse.Namespace, defaults: dict[str, Any], kind: str) -> dict[str, Any]:
    """The settings of one kind of measurement. Raises UserError when one is given and that kind is not asked for."""
    from perennial.core.errors import UserError

    given = {name: value for name in defaults if (value := vars(args)[name]) is not None}
    if given and not vars(args)[kind]:
        raise UserError(f"--{next(iter(given)).replace('_', '-')} belongs to --{kind}, which is not given")
    return {**defaults, **given}


def _losses(
    checkpoint: Path, data: list[str], *, max_tokens: str, ensemble: list[str], **settings: Any
) -> dict[str, Any]:
    from perennial.cli._names import named_paths
    from perennial.core.amounts import parse
    from perennial.core.errors import UserError
    from perennial.core.lineage import newest_checkpoint
    from perennial.train.measuring import evaluate_checkpoint

    try:
        amount = parse(max_tokens, ("tokens", "share"))
    except ValueError as error:
        raise UserError(f"--max-tokens: {error}") from None
    if amount.value == 0 or (amount.unit == "share" and amount.value != 1):
        raise UserError(f"--max-tokens {max_tokens}: give tokens ('65536 tokens'), or '100%' for all")
    limit = None if amount.unit == "share" else int(amount.value)
    members = [newest_checkpoint(Path(path)) for path in ensemble]
    return evaluate_checkpoint(checkpoint, named_paths("--data", data), max_tokens=limit, ensemble=members, **settings)
