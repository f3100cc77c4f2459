"""What `perennial continue` and `train` print: a derived recipe, a result, what was foretold of it (not a command)."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def show_recipe(result: dict[str, Any], *, as_json: bool) -> None:
    """Prints what a dry run derived, with the reasons and what it would do."""
    import json

    import yaml

    from perennial.train.resolved import describe

    resolved = result.pop("resolved")
    if as_json:
        print(json.dumps({**result, "resolved": resolved.model_dump(mode="json")}, indent=2))
        return
    reasons = "".join(f"# {reason}\n" for reason in result["reasons"])
    print(reasons + yaml.safe_dump(result["recipe"], sort_keys=False))
    print(describe(resolved))


def show_result(result: dict[str, Any], out: Path, *, as_json: bool) -> None:
    """Prints the result of a run as JSON, or the highest spike at a switch of data and what looks wrong in it."""
    import json
    from dataclasses import asdict

    from perennial.report.doubts import doubts_about
    from perennial.report.switches import greatest

    found = doubts_about(out) if result["result"]["complete"] else []
    if as_json:
        print(json.dumps({**result, "doubts": [asdict(doubt) for doubt in found]}, indent=2))
        return
    spike = greatest(out) if result["result"]["complete"] else ""
    if spike:
        print(spike)
    for doubt in found:
        print(f"{doubt.sign}: {doubt.seen}. Next time: {doubt.advice}.")


def show_foretold(result: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    """Prints the result of a run as JSON, or one line about what its plan foretold, if a plan made it."""
    import json

    from perennial.report.foretold import outcome_of

    found = outcome_of(folder) if result["complete"] else None
    if as_json:
        told = {"foretold": [one.to_json() for one in found.numbers]} if found else {}
        print(json.dumps({**result, **told}, indent=2))
    elif found:
        print(f"foretold, and measured: {found.line()}")
