"""The one loop.

for each stage:                              data, schedule, optimizer, objective; a boundary is state like any other
    while the stage has tokens left:
        batch    = loader.at(row)            pure function of position
        update   = make_update(...)          forward, backward over micro-batches, sum, clip, finite check, optimizer
        progress = progress after the batch  row, tokens, FLOPs
        records.write(update)                loss = sum / count over everything that was accumulated
        evaluate, save, stop                 when due
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from perennial.core.errors import TrainingStopped
from perennial.core.lineage import checkpoints_of
from perennial.core.seeds import derive
from perennial.train.resolved import ResolvedStage
from perennial.train.session import RunningStage, Session
from perennial.train.spikes import is_spike
from perennial.train.step import NonFinite, Queued, Update, make_update


def run(session: Session) -> None:
    """Trains from where the session stands to the end of its recipe, or to a stop that was asked for.

    Raises TrainingStopped when a loss or gradient is not finite, or spikes come back after every rollback.
    """
    progress = session.state.progress
    if progress.tokens == 0 and not progress.before:
        progress.before = session.evaluate("before")
    if session.resolved.spikes.action == "rollback" and not checkpoints_of(session.folder):
        session.saver.save()  # so that there is something to return to
    while session.state.progress.stage < len(session.resolved.stages):
        _run_stage(session)
        if session.stopped:
            return
    session.finish(summary(session))


@dataclass(frozen=True)
class Made:
    """An update that was queued, and where the run stood after it."""

    queued: Queued
    stage: ResolvedStage
    rate: float
    rows: tuple[int, int]
    """First row of its batch and the one after its last."""
    tokens: int
    number: int
    flops: float
    sent_bytes: int
    data_seconds: float
    started: float


def _run_stage(session: Session) -> None:
    """Goes on with the current stage until it is done or the run is to stop."""
    stage = session.resolved.stages[session.state.progress.stage]
    with session.open_stage() as running:
        # On a GPU the host is one update ahead: it queues the next before it reads what the last one measured.
        ahead = int(session.queues_ahead)
        waiting: deque[Made] = deque()
        stop = False
        while session.state.progress.stage_tokens < stage.tokens:
            waiting.append(_queue(session, running))
            done = session.state.progress.stage_tokens >= stage.tokens
            while waiting and (len(waiting) > ahead or done or stop or session.is_due()):
                update = _settle(session, waiting.popleft())
                if update is None:  # rolled back; what was queued since is void
                    waiting.clear()
                    done = False
                    break
                stop = stop or update.stop
            else:
                if waiting:
                    continue
                if done:
                    running.close_stage()
                session.after_update(stop=stop, stage_done=done)
                if session.stopped or done:
                    return


def _queue(session: Session, running: RunningStage) -> Made:
    """Starts the next update and moves the run's position past it."""
    progress, resolved, world = session.state.progress, session.resolved, session.world
    stage = running.stage
    rows, tokens = resolved.rows_of(stage), resolved.batch_tokens_of(stage)
    session.watchdog.enter("data", progress.updates + 1)
    begun = time.perf_counter()
    batch = running.loader.at(progress.row, rows, rank=world.data_rank, world=world.data_size)
    loaded = time.perf_counter()
    session.watchdog.enter("update")
    session.stopwatch.begin(loaded - begun)
    rate = running.schedule.rate(progress.stage_tokens + tokens, stage.tokens)
    torch.manual_seed(derive(resolved.seed, "update", stage.name, progress.row))
    queued = make_update(
        session.spread,
        session.state.optimizer,
        running.objective,
        batch,
        rate=rate,
        clip=resolved.clip,
        precision=resolved.precision,
        micro_batch=resolved.batch.micro_batch,
        rows=rows,
        new_rows=session.new_rows,
        pulling=session.pulling,
        stop=session.stop_requested,
    )
    first = progress.row
    progress.row += rows
    progress.stage_tokens += tokens
    progress.tokens += tokens
    progress.updates += 1
    flops = tokens * (stage.flops / stage.tokens)
    progress.flops += flops
    progress.stage_flops += flops
    progress.rate = rate
    session.communicate(stage)
    return Made(
        queued,
        stage,
        rate,
        (first, progress.row),
        progress.tokens,
        progress.updates,
        progress.flops,
        progress.sent_bytes,
        loaded - begun,
        loaded,
    )


def _settle(session: Session, made: Made) -> Update | None:
    """Reads what an update measured and records it; None when the run was rolled back because of it."""
    progress = session.state.progress
    try:
        update = made.queued.finish()
    except NonFinite as error:
        _non_finite(session, made, error)
        return None
    now = time.perf_counter()
    seconds = now - max(made.started, session.settled)
    session.settled = now
    progress.seconds["data"] += made.data_seconds
    progress.seconds["train"] += seconds
    progress.stage_seconds += seconds
    session.record_update(made, update, seconds, session.stopwatch.settle())
    return None if _spiked(session, update, made) else update


def _spiked(session: Session, update: Update, made: Made) -> bool:
    """Notes a spike; True when the run was rolled back because of it."""
    progress, settings = session.state.progress, session.resolved.spikes
    recent = progress.recent_losses
    if not is_spike(update.loss, recent, settings):
        progress.recent_losses = [*recent[-(settings.window - 1) :], update.loss]
        return False
    session.records.write("spike", tokens=made.tokens, loss=update.loss, expected=sorted(recent)[len(recent) // 2])
    session.console.note(f"loss spike at {made.tokens} tokens: {update.loss:.3f}")
    if settings.action != "rollback":
        return False
    _roll_back(session, made.rows[1], f"loss {update.loss:.4g} at {made.tokens} tokens")
    return True


def _non_finite(session: Session, made: Made, error: NonFinite) -> None:
    rows = made.rows
    where = f"stage '{made.stage.name}', update {made.number}, rows {rows[0]} to {rows[1] - 1}"
    session.records.write("spike", tokens=made.tokens, loss=str(error), expected=None)
    if session.resolved.spikes.action == "rollback":
        _roll_back(session, rows[1], f"{error} ({where})")
        return
    raise TrainingStopped(
        f"{where}: {error}. The update was not made; the last checkpoint is untouched. Lower the peak rate, or set "
        "spikes.action=rollback to return to it and pass over these rows."
    )


def _roll_back(session: Session, skip_to: int, why: str) -> None:
    """Returns to the last checkpoint of this stage and passes over the rows up to `skip_to`."""
    spent = session.state.progress
    rollbacks = spent.rollbacks + 1
    if rollbacks > session.resolved.spikes.max_rollbacks:
        raise TrainingStopped(f"{why}: spikes came back after {rollbacks - 1} rollbacks (spikes.max_rollbacks)")
    stage = session.state.progress.stage
    session.reload()
    session.stopwatch.drop()
    progress = session.state.progress
    if progress.stage != stage:
        raise TrainingStopped(f"{why}: the stage has no checkpoint of its own to return to")
    skipped = [progress.row, skip_to]
    progress.rollbacks = rollbacks
    # What was computed and thrown away was paid for all the same.
    progress.flops, progress.stage_flops = spent.flops, spent.stage_flops
    progress.sent_bytes = spent.sent_bytes
    progress.seconds, progress.stage_seconds = spent.seconds, spent.stage_seconds
    progress.skipped_rows.append(skipped)
    progress.row = skip_to
    session.records.write("rollback", tokens=progress.tokens, skipped_rows=skipped)
    session.console.note(f"{why}: back to {progress.tokens} tokens, passing over rows {skipped[0]} to {skipped[1] - 1}")


SUMMARY = ("tokens", "flops", "seconds", "evaluation")
"""What a finished run's `done` event says."""


def summary(session: Session) -> dict[str, Any]:
    """The result of a run as the `done` event states it."""
    progress = session.state.progress
    return {
        "tokens": progress.tokens,
        "flops": progress.flops,
        "seconds": progress.seconds,
        "evaluation": {"before": progress.before, "after": progress.latest.get("corpora", {})},
    }
