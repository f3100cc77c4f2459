"""The ledger: one line for each finished run and domain, gathered from run folders, that `laws fit` reads as a table.

Lines are only ever added. A run is known by its folder's recipe hash, seed and last position; one that is there already
is passed over. Lines of earlier versions lack what the parent had seen and the losses by side; `runs_in` reads both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perennial.core import lineage as lineages
from perennial.core import records
from perennial.core.errors import UserError
from perennial.core.files import read_json, write_text

NAME = "ledger.jsonl"
_KEYS = ("run", "recipe_hash", "domain", "tokens")
OLD, NEW = "old", "new"


@dataclass(frozen=True)
class LedgerRun:
    """One finished run of a ledger: the rows of its domains together."""

    is_update: bool
    """Whether it continued a parent."""
    parameters: float
    flops: float
    tokens: float
    replay: float
    """Share of old text."""
    learning_rate: float
    schedule: str
    parent: str | None
    """Id of the checkpoint that it continued; None: not recorded."""
    parent_tokens: float | None
    """Tokens that the parent had seen; None: not recorded."""
    roles: Mapping[str, str]
    """Domain -> 'old', 'new' or 'other'."""
    losses: Mapping[str, float]
    """Domain -> loss at the end, nats per token."""
    losses_before: Mapping[str, float]
    """The same at the start, where it was measured."""
    trained_on: frozenset[str]
    """Domains that tokens were drawn from, where that is recorded."""

    def mean(self, role: str, losses: Mapping[str, float]) -> float | None:
        """Mean over the domains of a role; None where it has none, or one was not measured."""
        names = [name for name, its in self.roles.items() if its == role]
        known = [losses[name] for name in names if name in losses]
        return sum(known) / len(known) if known and len(known) == len(names) else None


def read(ledger: Path) -> list[LedgerRun]:
    """The runs of a ledger file of this or an earlier version, in its order. Raises UserError for what is none."""
    try:
        text = ledger.read_text(encoding="utf-8")
        return runs_in([json.loads(line) for line in text.splitlines() if line.strip()])
    except OSError as error:
        raise UserError(f"{ledger}: cannot be read: {error.strerror}") from None
    except KeyError as error:
        raise UserError(f"{ledger}: not a ledger: a row has no {error}; `perennial laws ledger` makes one") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{ledger}: not a ledger: {error}; `perennial laws ledger` makes one") from None


def runs_in(rows: Sequence[Mapping[str, Any]]) -> list[LedgerRun]:
    """Rows put together by run. KeyError, TypeError or ValueError for rows of something else."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[k]) for k in ("run", "recipe_hash", "tokens", "seed")), []).append(row)
    return [_run(group) for group in groups.values()]


def _run(rows: Sequence[Mapping[str, Any]]) -> LedgerRun:
    first = rows[0]
    before = {str(row["domain"]): row["loss_before"] for row in rows}
    seen = first.get("parent_tokens")
    return LedgerRun(
        is_update=bool(first["parent"]),
        parameters=float(first["parameters"]),
        flops=float(first["flops"]),
        tokens=float(first["tokens"]),
        replay=float(first["replay"]),
        learning_rate=float(first["learning_rate"]),
        schedule=str(first["schedule"]),
        parent=first.get("parent_checkpoint"),
        parent_tokens=None if seen is None else float(seen),
        roles={str(row["domain"]): str(row["role"]) for row in rows},
        losses={str(row["domain"]): float(row["loss"]) for row in rows},
        losses_before={name: float(loss) for name, loss in before.items() if loss is not None},
        trained_on=frozenset(str(row["domain"]) for row in rows if row.get("domain_tokens")),
    )


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
    roles = {domain: str(resolved["corpora"].get(domain, {}).get("role", "")) for domain in last}
    parent = start.get("parent")
    common = {
        **_settings(resolved),
        **_consumed(events),
        "parent": bool(parent),
        "parent_checkpoint": parent.get("checkpoint") if isinstance(parent, dict) else None,
        "parent_tokens": _parent_tokens(run, resolved) if parent else 0,
        **{
            f"{role}_{when}": _mean([losses.get(domain, {}) for domain, its in roles.items() if its == role])
            for role in (OLD, NEW)
            for when, losses in (("before", first), ("after", last))
        },
    }
    drawn = _drawn(events)
    rows = []
    for domain, measured in last.items():
        row = {
            "run": str(resolved["name"]),
            "recipe_hash": str(resolved["recipe_hash"]),
            "domain": domain,
            "role": roles[domain],
            "parameters": int(resolved["parameters"]),
            **common,
            "flops": float(resolved["flops"]),
            "domain_tokens": drawn.get(domain, 0.0),
            "loss": measured["nats_per_token"],
            "loss_before": first.get(domain, {}).get("nats_per_token"),
        }
        rows.append(row)
    return rows


def _mean(measured: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean loss of the domains of one side; None where there are none, or one was not measured."""
    known = [m["nats_per_token"] for m in measured if m.get("nats_per_token") is not None]
    return sum(known) / len(known) if known and len(known) == len(measured) else None


def _parent_tokens(run: Path, resolved: dict[str, Any]) -> int | None:
    """Tokens that the parent had seen, by the lineage of the run's checkpoint, or of the parent; None without both."""
    for folder in reversed(lineages.checkpoints_of(run)):
        if lineages.has_lineage(folder):
            lineage = lineages.read(folder)
            own = sum(s.tokens for s in lineage.stages if s.recipe_hash == resolved["recipe_hash"])
            return lineage.tokens - own
    parent = resolved.get("parent")
    if parent and lineages.has_lineage(Path(parent["path"])):
        return lineages.read(Path(parent["path"])).tokens
    return None


def _settings(resolved: dict[str, Any]) -> dict[str, Any]:
    """Learning rates, schedule, weight decay, batch in tokens, replay share and seed; of the longest stage.

    'peak' is the highest learning rate of all stages.
    """
    stage = max(resolved["stages"], key=lambda s: s["tokens"])
    total = sum(source["weight"] for source in stage["sources"]) or 1.0
    roles = {name: facts.get("role") for name, facts in resolved["corpora"].items()}
    old = [s["weight"] for s in stage["sources"] if s.get("role") == "replay" or roles.get(s["name"]) == OLD]
    decay = stage["optimizer"].get("weight_decay", 0.0)
    return {
        "learning_rate": stage["rate_peak"],
        "peak": max(s["rate_peak"] for s in resolved["stages"]),
        "schedule": stage["schedule"]["name"],
        "weight_decay": decay.get("matrix", 0.0) if isinstance(decay, dict) else decay,
        "batch": resolved["batch"]["sequences"] * resolved["batch"]["sequence_length"],
        "replay": sum(old) / total,
        "seed": resolved["seed"],
    }


def _consumed(events: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens trained on, and how many different ones there were among them.

    `consumed` counts from the start of its stage; the last of each stage is its whole.
    """
    per_stage = _sources(events)
    tokens: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for sources in per_stage.values():
        for name, facts in sources.items():
            tokens[name] = tokens.get(name, 0.0) + facts["tokens"]
            if facts["epochs"] > 0:
                sizes[name] = facts["tokens"] / facts["epochs"]
    unique = sum(min(count, sizes.get(name, count)) for name, count in tokens.items())
    return {"tokens": sum(tokens.values()), "unique_tokens": unique}


def _sources(events: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Stage -> source -> rows, tokens and epochs drawn in the whole stage."""
    return {event["stage"]: event["sources"] for event in events if event["event"] == "consumed"}


def _drawn(events: list[dict[str, Any]]) -> dict[str, float]:
    """Domain -> tokens drawn of it, anew or again: a source is called like its corpus, or 'replay/' and that."""
    drawn: dict[str, float] = {}
    for sources in _sources(events).values():
        for name, facts in sources.items():
            domain = name.removeprefix("replay/")
            drawn[domain] = drawn.get(domain, 0.0) + facts["tokens"]
    return drawn


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in (*_KEYS, "seed"))
