"""The ledger: one line for each finished run and domain, gathered from run folders, that `laws fit` reads as a table.

Lines are only ever added. A run is known by its folder's recipe hash, seed and last position; one that is there already
is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perennial.core import records
from perennial.core.errors import UserError
from perennial.core.files import read_json, write_text

NAME = "ledger.jsonl"
_KEYS = ("run", "recipe_hash", "domain", "tokens")


def add(ledger: Path, runs: Sequence[Path]) -> tuple[int, int]:
    """Adds the rows of finished runs, all or (UserError) none; returns (rows added, rows that were there)."""
    text = ledger.read_text(encoding="utf-8") if ledger.exists() else ""
    try:
        known = {_key(json.loads(line)) for line in text.splitlines() if line.strip()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{ledger}: not a ledger: {error}") from None
    rows = [row for run in runs for row in rows_of(run)]
    new = {_key(row): row for row in rows if _key(row) not in known}
    if new:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new.values())
        write_text(ledger, text + ("\n" if text and not text.endswith("\n") else "") + lines)
    return len(new), len(rows) - len(new)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """One row per evaluated domain of a finished run. Raises UserError for what is no run, or not finished."""
    path = run / "events.jsonl"
    if not path.is_file():
        raise UserError(f"{run}: no run folder: there is no events.jsonl in it")
    events = records.read(path)
    if not any(event["event"] == "done" for event in events):
        raise UserError(f"{run}: the run is not finished; `perennial train {run}` takes it up again")
    resolved = read_json(run / "resolved.json", "resolved recipe")
    start = next((event for event in events if event["event"] == "run"), {})
    evaluations = [event for event in events if event["event"] == "evaluation"]
    if not evaluations:
        raise UserError(f"{run}: no evaluation was recorded, so that there is no loss to learn from")
    first, last = evaluations[0]["corpora"], evaluations[-1]["corpora"]
    common = {**_settings(resolved), **_consumed(events), "parent": bool(start.get("parent"))}
    rows = []
    for domain, measured in last.items():
        row = {
            "run": str(resolved["name"]),
            "recipe_hash": str(resolved["recipe_hash"]),
            "domain": domain,
            "role": resolved["corpora"].get(domain, {}).get("role", ""),
            "parameters": int(resolved["parameters"]),
            **common,
            "flops": float(resolved["flops"]),
            "loss": measured["nats_per_token"],
            "loss_before": first.get(domain, {}).get("nats_per_token"),
        }
        rows.append(row)
    return rows


def _settings(resolved: dict[str, Any]) -> dict[str, Any]:
    """Learning rate, schedule, weight decay, batch in tokens, replay share and seed; of the longest stage."""
    stage = max(resolved["stages"], key=lambda s: s["tokens"])
    weights = {source["name"]: (source["weight"], source.get("role")) for source in stage["sources"]}
    total = sum(weight for weight, _ in weights.values()) or 1.0
    decay = stage["optimizer"].get("weight_decay", 0.0)
    return {
        "learning_rate": stage["rate_peak"],
        "schedule": stage["schedule"]["name"],
        "weight_decay": decay.get("matrix", 0.0) if isinstance(decay, dict) else decay,
        "batch": resolved["batch"]["sequences"] * resolved["batch"]["sequence_length"],
        "replay": sum(weight for weight, role in weights.values() if role == "replay") / total,
        "seed": resolved["seed"],
    }


def _consumed(events: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens trained on, and how many different ones there were among them.

    `consumed` counts from the start of its stage; the last of each stage is its whole.
    """
    per_stage = {event["stage"]: event["sources"] for event in events if event["event"] == "consumed"}
    tokens: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for sources in per_stage.values():
        for name, facts in sources.items():
            tokens[name] = tokens.get(name, 0.0) + facts["tokens"]
            if facts["epochs"] > 0:
                sizes[name] = facts["tokens"] / facts["epochs"]
    unique = sum(min(count, sizes.get(name, count)) for name, count in tokens.items())
    return {"tokens": sum(tokens.values()), "unique_tokens": unique}


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in (*_KEYS, "seed"))
