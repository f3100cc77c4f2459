"""A run as its files tell it: records, resolved recipe and lineage, read once, without torch or a device."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perennial.core import records
from perennial.core.amounts import human
from perennial.core.errors import UserError
from perennial.core.files import read_json, sha256
from perennial.core.lineage import LINEAGE_FILE, STATE_FOLDER

EVENTS = "events.jsonl"
RESOLVED = "resolved.json"
RECIPE = "recipe.yaml"
_MEASURED = (
    *("tokens", "loss", "rate", "flops", "gradient_norm", "tokens_per_second", "mfu", "memory_bytes"),
    *("straggler_seconds", "straggler", "sent_bytes"),
)
_INCIDENTS = ("spike", "rollback", "resume", "restart", "stop", "set_aside", "save_failed", "hang")


@dataclass(frozen=True)
class Loss:
    """A validation loss, or a difference of two, in both units; None where it was not measured."""

    nats_per_token: float | None
    bits_per_byte: float | None
    tokens: int = 0
    """Target tokens that it was measured on; 0 for averages and differences."""
    bytes: int = 0
    """UTF-8 bytes of the same text."""

    def in_unit(self, unit: str) -> float | None:
        """The value in 'nats_per_token' or 'bits_per_byte'."""
        return self.nats_per_token if unit == "nats_per_token" else self.bits_per_byte

    def minus(self, other: Loss) -> Loss:
        """This loss less the other, unit by unit."""
        return Loss(
            _minus(self.nats_per_token, other.nats_per_token),
            _minus(self.bits_per_byte, other.bits_per_byte),
        )

    def negated(self) -> Loss:
        """The value with its sign turned."""
        return Loss(0.0, 0.0).minus(self)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def mean(losses: Iterable[Loss]) -> Loss | None:
    """The macro average: every corpus counts the same. None for an empty list."""
    listed = list(losses)
    if not listed:
        return None
    return Loss(_mean([loss.nats_per_token for loss in listed]), _mean([loss.bits_per_byte for loss in listed]))


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(values) if len(known) == len(values) else None


@dataclass(frozen=True)
class Evaluation:
    """The validation losses at one position of a run."""

    tokens: int
    flops: float
    moment: str
    corpora: dict[str, Loss]


@dataclass(frozen=True)
class Source:
    """What a stage drew from one corpus."""

    name: str
    corpus: str
    fingerprint: str
    role: str
    """'fresh' or 'replay'."""
    weight: float
    """Share of the stage that was asked for."""
    tokens: int
    epochs: float | None


@dataclass(frozen=True)
class Stage:
    """One stage of training as it went."""

    run: str
    name: str
    recipe_hash: str
    parent: str | None
    tokens: int
    planned_tokens: int | None
    flops: float | None
    seconds: float | None
    sources: tuple[Source, ...]
    schedule: dict[str, Any]
    rate_before: float | None
    rate_start: float | None
    rate_peak: float | None
    rate_end: float | None
    optimizer: dict[str, Any]
    optimizer_state: str | None
    seed: int | None
    sequence_length: int | None
    batch_tokens: int | None


@dataclass(frozen=True)
class Run:
    """Everything that the report needs of one run folder."""

    folder: Path
    name: str
    recipe_hash: str
    parameters: int | None
    finished: bool
    stop_reason: str | None
    tokens: int
    planned_tokens: int | None
    flops: float
    seconds: dict[str, float]
    """Wall time by what it was spent on; the parts do not overlap."""
    parent: str | None
    """Id of the checkpoint that the run started from; None for random weights."""
    checkpoint: str | None
    """Id of the newest checkpoint."""
    checkpoint_folder: Path | None
    checkpoints: dict[str, int]
    """Id of every checkpoint that is still there -> tokens of this run."""
    ancestors: tuple[Stage, ...]
    stages: tuple[Stage, ...]
    evaluations: tuple[Evaluation, ...]
    before: dict[str, Loss]
    after: dict[str, Loss]
    training: dict[str, np.ndarray]
    """Columns of the `train` events, float64, NaN where a value is missing."""
    incidents: tuple[dict[str, Any], ...]
    corpora: dict[str, dict[str, Any]]
    """Evaluated or consumed corpora: name -> {path, fingerprint, tokenizer, role}."""
    environment: dict[str, Any]
    processes: int
    precision: str
    tasks: dict[int, dict[str, Any]]
    """Results on tasks, as they were last measured: tokens of the checkpoint -> task -> result."""
    recipe: str
    resolved: dict[str, Any]
    hashes: dict[str, str]
    """sha256 of the files that this was read from, and of the newest checkpoint's weights as its manifest has it."""

    @property
    def wall_seconds(self) -> float | None:
        """All recorded wall time of this run."""
        return sum(self.seconds.values()) if self.seconds else None


def read_run(folder: Path) -> Run:
    """Reads a run folder. Raises UserError when it is none, or names the file that is broken."""
    if not (folder / EVENTS).is_file():
        what = "no such folder" if not folder.exists() else f"no run folder ({EVENTS} is missing)"
        hint = " Give the run folder, not a checkpoint inside it." if (folder / STATE_FOLDER).is_dir() else ""
        raise UserError(f"{folder}: {what}.{hint}")
    events = _events(folder / EVENTS)
    resolved = read_json(folder / RESOLVED, "resolved recipe") if (folder / RESOLVED).is_file() else {}
    lineages = _lineages(folder / "checkpoints")
    newest = max(lineages) if lineages else None
    lineage = lineages[newest] if newest is not None else {}
    head: dict[str, Any] = next(iter(events.get("run", [])), {})
    recipe_hash = str(head.get("recipe_hash") or resolved.get("recipe_hash") or "")
    recorded = list(lineage.get("stages", []))
    own = [s for s in recorded if s.get("recipe_hash") == recipe_hash]
    parent = resolved.get("parent") or head.get("parent")
    parent_id = str(parent["checkpoint"]) if isinstance(parent, dict) else parent
    earlier = recorded[: len(recorded) - len(own)] or _parent_stages(parent)
    evaluations = tuple(_evaluation(e) for e in events.get("evaluation", []))
    done: dict[str, Any] = next(iter(events.get("done", [])), {})
    training = _columns(events.get("train", []))
    at = newest is not None and folder / "checkpoints" / str(newest)
    return Run(
        folder=folder,
        name=str(head.get("name") or resolved.get("name") or folder.name),
        recipe_hash=recipe_hash,
        parameters=head.get("parameters", resolved.get("parameters")),
        finished=bool(done),
        stop_reason=events["stop"][-1].get("reason") if not done and "stop" in events else None,
        tokens=int(done.get("tokens", _last(training["tokens"]))),
        planned_tokens=resolved.get("tokens"),
        flops=float(done.get("flops", _last(training["flops"]))),
        seconds=_seconds(done, events),
        parent=parent_id,
        checkpoint=lineage.get("checkpoint"),
        checkpoint_folder=at or None,
        checkpoints={str(line["checkpoint"]): tokens for tokens, line in sorted(lineages.items())},
        ancestors=tuple(_stage(s) for s in earlier),
        stages=_own_stages(own, events, resolved, str(head.get("name", "")), recipe_hash),
        evaluations=evaluations,
        before=_moment(done, "before", evaluations, lineage, parent_id),
        after=_moment(done, "after", evaluations, lineage, parent_id),
        training=training,
        incidents=tuple(_incidents(folder / EVENTS)),
        corpora={**lineage.get("corpora", {}), **resolved.get("corpora", {})},
        environment=head.get("environment") or lineage.get("environment") or {},
        processes=int(head.get("processes", 1)),
        precision=str(head.get("precision") or resolved.get("precision") or ""),
        tasks=_tasks(events.get("tasks", [])),
        recipe=(folder / RECIPE).read_text(encoding="utf-8") if (folder / RECIPE).is_file() else "",
        resolved=resolved,
        hashes=_hashes(folder, at or None),
    )


def _events(path: Path) -> dict[str, list[dict[str, Any]]]:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for event in records.read(path):
        grouped.setdefault(event["event"], []).append(event)
    return grouped


def _incidents(path: Path) -> Iterable[dict[str, Any]]:
    """Every spike, rollback, resume and stop in file order, those included that a later resume supersedes."""
    marks = [f'"event": "{kind}"' for kind in _INCIDENTS]
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n") and any(mark in line for mark in marks):
                event = json.loads(line)
                if event["event"] in _INCIDENTS:
                    yield event


def _lineages(checkpoints: Path) -> dict[int, dict[str, Any]]:
    """Tokens -> lineage of every finished checkpoint that is there."""
    found: dict[int, dict[str, Any]] = {}
    for folder in checkpoints.iterdir() if checkpoints.is_dir() else []:
        path = folder / STATE_FOLDER / LINEAGE_FILE
        if folder.name.isdigit() and path.is_file():
            found[int(folder.name)] = read_json(path, "lineage")
    return found


def _parent_stages(parent: Any) -> list[dict[str, Any]]:
    """The parent's stages from its own folder, for a run that has not saved a checkpoint yet."""
    if not isinstance(parent, dict):
        return []
    path = Path(parent["path"]) / STATE_FOLDER / LINEAGE_FILE
    return list(read_json(path, "lineage")["stages"]) if path.is_file() else []


def number(value: Any) -> float:
    """A recorded number; NaN and infinity are stored as texts, a missing one is NaN."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _known(value: Any) -> float | None:
    found = number(value)
    return found if math.isfinite(found) else None


def _losses(corpora: Mapping[str, Any] | None) -> dict[str, Loss]:
    return {
        name: Loss(
            _known(values.get("nats_per_token")),
            _known(values.get("bits_per_byte")),
            int(values.get("tokens", 0)),
            int(values.get("bytes", 0)),
        )
        for name, values in (corpora or {}).items()
    }


def _evaluation(event: dict[str, Any]) -> Evaluation:
    return Evaluation(
        int(event["tokens"]),
        number(event.get("flops", 0)),
        str(event.get("moment", "during")),
        _losses(event["corpora"]),
    )


def _moment(
    done: dict[str, Any],
    moment: str,
    evaluations: tuple[Evaluation, ...],
    lineage: dict[str, Any],
    parent: str | None,
) -> dict[str, Loss]:
    """The losses before the run or at its end; for a run without a parent nothing comes before."""
    if moment == "before" and parent is None:
        return {}
    for corpora in (done.get("evaluation", {}).get(moment), lineage.get("evaluation", {}).get(moment)):
        if corpora and (done or moment == "before"):
            return _losses(corpora)
    if moment == "before":
        return next((e.corpora for e in evaluations if e.moment == "before"), {})
    return evaluations[-1].corpora if evaluations else {}


def _tasks(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        found.setdefault(int(event["tokens"]), {}).update(event["tasks"])
    return found


def _columns(train: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {key: np.array([number(e.get(key)) for e in train], dtype=np.float64) for key in _MEASURED}


def _last(values: np.ndarray) -> float:
    return float(values[-1]) if len(values) and math.isfinite(values[-1]) else 0.0


def _seconds(done: dict[str, Any], events: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    if isinstance(done.get("seconds"), dict):
        return {key: number(value) for key, value in done["seconds"].items()}
    if not events.get("train"):
        return {}
    last = events["train"][-1]
    saved = sum(number(e.get("seconds", 0)) for e in events.get("checkpoint", []))
    return {"train": number(last.get("seconds", 0)), "data": number(last.get("data_seconds", 0)), "save": saved}


def _source(data: dict[str, Any]) -> Source:
    return Source(
        name=str(data["name"]),
        corpus=str(data.get("corpus", "")),
        fingerprint=str(data.get("fingerprint", "")),
        role=str(data.get("role", "fresh")),
        weight=float(data.get("weight", 0.0)),
        tokens=int(data.get("tokens", 0)),
        epochs=_known(data.get("epochs")),
    )


def _stage(data: dict[str, Any], planned: dict[str, Any] | None = None) -> Stage:
    planned = planned or {}
    return Stage(
        run=str(data.get("run", "")),
        name=str(data.get("stage") or data.get("name") or ""),
        recipe_hash=str(data.get("recipe_hash", "")),
        parent=data.get("parent"),
        tokens=int(data.get("tokens", 0)),
        planned_tokens=planned.get("tokens"),
        flops=_known(data.get("flops")),
        seconds=_known(data.get("seconds")),
        sources=tuple(_source(s) for s in data.get("sources", [])),
        schedule=dict(data.get("schedule") or {}),
        rate_before=_known(planned.get("rate_before")),
        rate_start=_known(data.get("rate_start")),
        rate_peak=_known(data.get("rate_peak")),
        rate_end=_known(data.get("rate_end")),
        optimizer=dict(data.get("optimizer") or {}),
        optimizer_state=planned.get("optimizer_state"),
        seed=data.get("seed"),
        sequence_length=data.get("sequence_length"),
        batch_tokens=data.get("batch_tokens"),
    )


def _own_stages(
    own: list[dict[str, Any]],
    events: dict[str, list[dict[str, Any]]],
    resolved: dict[str, Any],
    run: str,
    recipe_hash: str,
) -> tuple[Stage, ...]:
    """The run's stages: as the lineage has them, and from the events what no checkpoint holds yet."""
    planned = {s["name"]: s for s in resolved.get("stages", [])}
    consumed: dict[str, dict[str, Any]] = {e["stage"]: e["sources"] for e in events.get("consumed", [])}
    stages = {s["stage"]: _stage(s, planned.get(s["stage"])) for s in own}
    for event in sorted(events.get("stage", []), key=lambda e: int(e.get("index", 0))):
        name = event["stage"]
        if name not in stages:
            sources = [{**s, **consumed.get(name, {}).get(s["name"], {})} for s in event.get("sources", [])]
            tokens = sum(int(s.get("tokens", 0)) for s in sources)
            plan = planned.get(name, {"tokens": event.get("stage_tokens")})
            known = {**event, "run": run, "recipe_hash": recipe_hash, "sources": _with_fingerprints(sources, plan)}
            stages[name] = _stage({**known, "tokens": tokens}, plan)
    return tuple(stages.values())


def _with_fingerprints(sources: list[dict[str, Any]], plan: dict[str, Any]) -> list[dict[str, Any]]:
    known = {s["name"]: s.get("fingerprint", "") for s in plan.get("sources", [])}
    return [{"fingerprint": known.get(s["name"], ""), **s} for s in sources]


def _hashes(folder: Path, checkpoint: Path | None) -> dict[str, str]:
    hashes = {name: sha256(folder / name) for name in (RECIPE, RESOLVED, EVENTS) if (folder / name).is_file()}
    manifest = checkpoint / STATE_FOLDER / "manifest.json" if checkpoint else None
    if manifest is not None and manifest.is_file():
        for name, facts in sorted(read_json(manifest, "checkpoint manifest").get("files", {}).items()):
            if name.endswith(".safetensors") and not name.startswith(f"{STATE_FOLDER}/"):
                hashes[name] = facts["sha256"]
    return hashes


def short_id(*parts: str) -> str:
    """Eight hex digits that stand for the parts; used for element ids in the page."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:8]


def progress_text(run: Run) -> str:
    """How far a run came: 'finished', or why and where it stands."""
    if run.finished:
        return "finished"
    of = f" of {human(run.planned_tokens)}" if run.planned_tokens else ""
    why = f"stopped ({run.stop_reason})" if run.stop_reason else "not finished"
    return f"{why} at {human(run.tokens)}{of} tokens"
