"""Finished runs in the folders beside a run that went on from the same checkpoint, found by their records alone.

Of each folder one line at the beginning of events.jsonl is read, which names the parent; of those with the same parent
also resolved.json and the end of the events. Checkpoints are not opened.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perennial.core.errors import UserError
from perennial.core.files import read_json
from perennial.report.runs import EVENTS, RESOLVED, Loss, number

MOST_FOLDERS = 500
"""Folders beside a run that are looked at, in the order of their names."""
_TAIL_BYTES = 1 << 18
"""What is read of the end of events.jsonl; the last events of a run are far shorter."""


@dataclass(frozen=True)
class Neighbour:
    """A finished run beside another one."""

    folder: Path
    name: str
    tokens: int
    flops: float
    before: dict[str, Loss]
    after: dict[str, Loss]
    """By the fingerprints of the corpora, as `before`."""
    schedules: tuple[str, ...]
    replay_share: float | None
    ensemble: dict[str, Any]
    """Its event `ensemble`; empty where it was not taught by one."""


@dataclass(frozen=True)
class Found:
    """What lies beside a run."""

    runs: list[Neighbour] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Name of a folder with the same parent: why it is not among the runs."""
    not_looked_at: int = 0


def neighbours_of(folder: Path, parent: str) -> Found:
    """The finished runs beside `folder` whose parent is the checkpoint of this id; `folder` itself is not one."""
    own = folder.resolve()
    beside = sorted(path for path in _folders(own.parent) if path != own and (path / EVENTS).is_file())
    found = Found(not_looked_at=max(0, len(beside) - MOST_FOLDERS))
    for path in beside[:MOST_FOLDERS]:
        head = _first_event(path / EVENTS)
        begun = head.get("parent")
        if (begun.get("checkpoint") if isinstance(begun, dict) else begun) != parent:
            continue
        ended = last_events(path / EVENTS, "done", "ensemble")
        if "done" not in ended:
            found.left_out[path.name] = "not finished"
            continue
        try:
            found.runs.append(_neighbour(path, head, ended))
        except (UserError, KeyError, TypeError, ValueError):
            found.left_out[path.name] = "its records cannot be read"
    return found


def _folders(place: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from (path for path in place.iterdir() if path.is_dir())


def _first_event(path: Path) -> dict[str, Any]:
    """The event at the head of the records; empty where that is not the beginning of a run."""
    try:
        with open(path, encoding="utf-8") as file:
            event = json.loads(file.readline(_TAIL_BYTES))
    except (OSError, ValueError):
        return {}
    return event if isinstance(event, dict) and event.get("event") == "run" else {}


def last_events(path: Path, *kinds: str) -> dict[str, dict[str, Any]]:
    """The last event of each of these kinds near the end of the records."""
    found: dict[str, dict[str, Any]] = {}
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    for line in lines:
        with contextlib.suppress(ValueError):  # the first may be a part of one
            event = json.loads(line)
            if isinstance(event, dict) and event.get("event") in kinds:
                found[event["event"]] = event
    return found


def _neighbour(path: Path, head: Mapping[str, Any], ended: Mapping[str, Mapping[str, Any]]) -> Neighbour:
    resolved, done = read_json(path / RESOLVED, "resolved recipe"), ended["done"]
    prints = {name: facts["fingerprint"] for name, facts in resolved["corpora"].items()}
    stages = resolved["stages"]
    total = sum(stage["tokens"] for stage in stages)
    replayed = sum(
        stage["tokens"] * source["weight"]
        for stage in stages
        for source in stage["sources"]
        if source["role"] == "replay"
    )
    return Neighbour(
        folder=path,
        name=str(head.get("name", path.name)),
        tokens=int(done["tokens"]),
        flops=number(done["flops"]),
        before=losses_by(prints, done["evaluation"].get("before")),
        after=losses_by(prints, done["evaluation"].get("after")),
        schedules=tuple(dict.fromkeys(str(stage["schedule"]["name"]) for stage in stages)),
        replay_share=replayed / total if total else None,
        ensemble=dict(ended.get("ensemble", {})),
    )


def losses_by(prints: Mapping[str, str], measured: Mapping[str, Any] | None) -> dict[str, Loss]:
    """Recorded losses by the fingerprints of their corpora; `prints`: fingerprint by the name in the records."""
    return {
        prints[name]: Loss(
            number(values["nats_per_token"]),
            number(values.get("bits_per_byte")),
            int(values.get("tokens", 0)),
            int(values.get("bytes", 0)),
        )
        for name, values in (measured or {}).items()
        if name in prints
    }
