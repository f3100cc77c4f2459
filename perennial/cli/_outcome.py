"""What `perennial continue` prints: the derived recipe, or the result and what looks wrong with it (not a command)."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def show_recipe(result: dict[str, Any], *, as_json: bool) -> None:
    """Prints what a dry run derived, with the reasons and what it would do."""
    import json

    import yaml

    from perennial.train.resolve import describe

    resolved = result.pop("resolved")
    if as_json:
        print(json.dumps({**result, "resolved": resolved.model_dump(mode="json")}, indent=2))
        return
    reasons = "".join(f"# {reason}\n" for reason in result["reasons"])
    print(reasons + yaml.safe_dump(result["recipe"], sort_keys=False))
    print(describe(resolved))


def show_result(result: dict[str, Any], out: Path, *, as_json: bool) -> None:
    """Prints the result of a run as JSON, or what in its records looks wrong, a line each."""
    import json
    from dataclasses import asdict

    from perennial.report.doubts import doubts_about

    found = doubts_about(out) if result["result"]["complete"] else []
    if as_json:
        print(json.dumps({**result, "doubts": [asdict(doubt) for doubt in found]}, indent=2))
        return
    for doubt in found:
        print(f"{doubt.sign}: {doubt.seen}. Next time: {doubt.advice}.")
