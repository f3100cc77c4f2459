"""Measure a checkpoint's validation loss and bits per byte."""

from __future__ import annotations

import argparse

HELP = "measure a checkpoint's validation losses on prepared corpora"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or a run folder (its newest checkpoint)"
    )
    parser.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="prepared corpus; its validation split is used",
    )
    parser.add_argument(
        "--max-tokens",
        default="65536 tokens",
        metavar="N",
        help="most tokens per corpus; '100%%' for all (default: 65536 tokens)",
    )
    parser.add_argument(
        "--sequence-length", type=int, metavar="T", help="default: as in the checkpoint's last training"
    )
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16"], default="auto", help="default: what the machine does natively"
    )
    parser.add_argument(
        "--against", metavar="CHECKPOINT", help="measure this one too, such as the parent, and state the differences"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints one line per corpus, and forgetting and adaptation against the parent where the lineage knows it."""
    import json
    from pathlib import Path

    from perennial.cli._names import named_paths
    from perennial.core.amounts import parse
    from perennial.core.errors import UserError
    from perennial.core.lineage import newest_checkpoint
    from perennial.train.measuring import evaluate_checkpoint

    try:
        amount = parse(args.max_tokens, ("tokens", "share"))
    except ValueError as error:
        raise UserError(f"--max-tokens: {error}") from None
    if amount.value == 0 or (amount.unit == "share" and amount.value != 1):
        raise UserError(f"--max-tokens {args.max_tokens}: give tokens ('65536 tokens'), or '100%' for all")
    result = evaluate_checkpoint(
        newest_checkpoint(Path(args.checkpoint)),
        named_paths("--data", args.data),
        max_tokens=None if amount.unit == "share" else int(amount.value),
        sequence_length=args.sequence_length,
        precision=args.precision,
        against=newest_checkpoint(Path(args.against)) if args.against else None,
    )
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    print(f"{'corpus':20} {'nats/token':>10} {'bits/byte':>10} {'tokens':>10}")
    for name, values in result["corpora"].items():
        print(f"{name:20} {values['nats_per_token']:10.4f} {values['bits_per_byte']:10.4f} {values['tokens']:10d}")
    for kind in ("forgetting", "adaptation"):
        for name, values in result.get("against_parent", {}).get(kind, {}).items():
            nats, bits = values["nats_per_token"], values["bits_per_byte"]
            print(f"{kind} on {name}: {nats:+.4f} nats/token, {bits:+.4f} bits/byte")
    if "against_parent" in result and not any(result["against_parent"].values()):
        print("The parent was measured on other text; --against PARENT states forgetting and adaptation.")
    return 0
