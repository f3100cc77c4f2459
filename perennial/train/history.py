"""What a run has consumed and done so far, as the lineage of its checkpoints tells it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perennial.core import lineage as lineages
from perennial.core import plugins
from perennial.core.settings import raise_problems
from perennial.data.corpus import Corpus
from perennial.data.mixture import StageOrder
from perennial.train.resolved import Resolved, ResolvedStage
from perennial.train.stage_sources import stage_order
from perennial.train.state import Progress

Corpora = Mapping[str, Corpus]
"""Corpora by fingerprint."""


def component(kind: str, data: dict[str, Any]) -> Any:
    """A component that resolved.json names, built. Raises UserError when the file was changed into nonsense."""
    built, problems = plugins.build(kind, data)
    raise_problems(problems, f"{kind} of resolved.json")
    return built


def order_of(resolved: Resolved, stage: ResolvedStage, progress: Progress, corpora: Corpora) -> StageOrder:
    """The order of a stage's rows, after what the stages before it have drawn."""
    drawn: dict[str, int] = {}
    for record in progress.finished:
        for source in record["sources"]:
            drawn[source["name"]] = drawn.get(source["name"], 0) + source["rows"]
    return stage_order(stage.sources, corpora, resolved.seed, resolved.batch.sequence_length, stage.name, drawn)


def stage_record(
    resolved: Resolved, stage: ResolvedStage, progress: Progress, order: StageOrder, *, complete: bool
) -> dict[str, Any]:
    """The lineage record of the current stage as far as it has gone."""
    batch = resolved.batch
    rows = order.consumed(progress.row)
    sources = []
    for spec in order.specs:
        drawn = rows[spec.name]
        epochs = drawn / max(1, order.available_rows(spec.name))
        skipped = [order.draws(first, stop)[spec.name] for first, stop in progress.skipped_rows]
        tokens = (drawn - sum(stop - first for first, stop in skipped)) * batch.sequence_length
        drawn_as = {"rows": drawn, "tokens": tokens, "epochs": round(epochs, 6), "skipped": skipped}
        sources.append({**spec.to_json(), **drawn_as})
    return lineages.StageRecord(
        run=resolved.name,
        stage=stage.name,
        recipe_hash=resolved.recipe_hash,
        parent=resolved.parent["checkpoint"] if resolved.parent else None,
        seed=resolved.seed,
        tokens=progress.stage_tokens,
        complete=complete,
        flops=progress.stage_flops,
        seconds=round(progress.stage_seconds, 3),
        sequence_length=batch.sequence_length,
        batch_tokens=resolved.batch_tokens_of(stage),
        micro_batch=batch.micro_batch,
        clip=resolved.clip,
        document_mask=resolved.document_mask,
        precision=resolved.precision,
        schedule=stage.schedule,
        rate_start=stage.rate_start,
        rate_peak=stage.rate_peak if complete else _peak_so_far(resolved, stage, progress),
        rate_end=progress.rate,
        optimizer=stage.optimizer,
        objective=stage.objective,
        pull=stage.pull,
        models=[model.model_dump(mode="json") for model in stage.models],
        new_rows=stage.new_rows,
        sources=sources,
        skipped_rows=[(a, b) for a, b in progress.skipped_rows],
    ).model_dump(mode="json")


def _peak_so_far(resolved: Resolved, stage: ResolvedStage, progress: Progress) -> float:
    schedule, batch = component("schedules", stage.schedule), resolved.batch_tokens_of(stage)
    done = progress.stage_tokens // batch
    step = max(1, done // 10_000)
    return max(schedule.rate(u * batch, stage.tokens) for u in [*range(0, done, step), done])


def stage_records(resolved: Resolved, progress: Progress, corpora: Corpora) -> list[dict[str, Any]]:
    """The lineage records of this run's stages: the finished ones, then the current one if it has begun."""
    records = list(progress.finished)
    if progress.stage_tokens > 0:
        stage = resolved.stages[progress.stage]
        order = order_of(resolved, stage, progress, corpora)
        records.append(stage_record(resolved, stage, progress, order, complete=False))
    return records


def consumed(records: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(stage, {source: rows, tokens and epochs drawn}) of every stage record."""
    return [
        (r["stage"], {s["name"]: {k: s[k] for k in ("rows", "tokens", "epochs")} for s in r["sources"]})
        for r in records
    ]


def lineage_of(
    resolved: Resolved,
    progress: Progress,
    records: list[dict[str, Any]],
    parent: lineages.Lineage | None,
    environment: dict[str, Any],
) -> dict[str, Any]:
    """Everything of a checkpoint's lineage but its id; `records` are those of this run's stages."""
    after = progress.latest.get("corpora", {}) if progress.latest.get("tokens") == progress.tokens else {}
    inherited = parent.corpora if parent else {}
    own = {n: {k: f[k] for k in ("path", "fingerprint", "tokenizer")} for n, f in resolved.corpora.items()}
    for name, facts in resolved.corpora.items():
        if facts.get("stands_in") or inherited.get(name, {}).get("stands_in"):
            own[name]["stands_in"] = True
    drawn = {s["fingerprint"] for r in records for s in r["sources"]}
    return {
        "stages": [*(s.model_dump(mode="json") for s in (parent.stages if parent else [])), *records],
        "evaluation": {"before": progress.before, "after": after},
        "corpora": {**inherited, **{n: f for n, f in own.items() if n in inherited or f["fingerprint"] in drawn}},
        "environment": environment,
        "origin": parent.origin if parent else None,
        "changes": parent.changes if parent else [],
    }
