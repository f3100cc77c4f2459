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
from typing import Any

import torch

from perennial.core.errors import TrainingStopped
from perennial.core.lineage import checkpoints_of
from perennial.core.seeds import derive
from perennial.train.session import Session
from perennial.train.spikes import is_spike
from perennial.train.step import NonFinite, Update, make_update


def run(session: Session) -> None:
    """Trains from where the session stands to the end of its recipe, or to a stop that was asked for.

    Raises TrainingStopped when a loss or gradient is not finite, or spikes come back after every rollback.
    """
    progress = session.state.progress
    if progress.tokens == 0 and not progress.before:
        progress.before = session.evaluate("before")
    if session.resolved.spikes.action == "rollback" and not checkpoints_of(session.folder):
        session.save()  # so that there is something to return to
    while session.state.progress.stage < len(session.resolved.stages):
        _run_stage(session)
        if session.stopped:
            return
    session.finish(summary(session))


def _run_stage(session: Session) -> None:
    """Goes on with the current stage until it is done or the run is to stop."""
    resolved = session.resolved
    stage = resolved.stages[session.state.progress.stage]
    with session.open_stage() as running:
        while session.state.progress.stage_tokens < stage.tokens:
            progress = session.state.progress
            rows = resolved.batch.sequences
            started = time.perf_counter()
            batch = running.loader.at(progress.row, rows, rank=session.world.rank, world=session.world.size)
            loaded = time.perf_counter()
            after = progress.stage_tokens + resolved.batch.tokens
            rate = running.schedule.rate(after, stage.tokens)
            torch.manual_seed(derive(resolved.seed, "update", stage.name, progress.row))
            try:
                update = make_update(
                    session.state.model,
                    session.state.optimizer,
                    running.objective,
                    batch,
                    rate=rate,
                    clip=resolved.clip,
                    precision=resolved.precision,
                    micro_batch=resolved.batch.micro_batch,
                    world=session.world,
                    new_rows=session.new_rows,
                    stop=session.stop_requested,
                )
            except NonFinite as error:
                _non_finite(session, error, rows)
                continue
            _advance(session, update, rate, loaded - started, time.perf_counter() - loaded)
            if _spiked(session, update, rows):
                continue
            done = session.state.progress.stage_tokens >= stage.tokens
            if done:
                running.close_stage()
            session.after_update(update, stage_done=done)
            if session.stopped or done:
                return


def _advance(session: Session, update: Update, rate: float, data_seconds: float, train_seconds: float) -> None:
    progress, resolved = session.state.progress, session.resolved
    tokens = resolved.batch.tokens
    progress.row += resolved.batch.sequences
    progress.stage_tokens += tokens
    progress.tokens += tokens
    progress.updates += 1
    stage = resolved.stages[progress.stage]
    flops = tokens * (stage.flops / stage.tokens)
    progress.flops += flops
    progress.stage_flops += flops
    progress.seconds["data"] += data_seconds
    progress.seconds["train"] += train_seconds
    progress.stage_seconds += train_seconds
    progress.rate = rate
    session.record_update(update, rate, data_seconds, train_seconds)


def _spiked(session: Session, update: Update, rows: int) -> bool:
    """Notes a spike; True when the run was rolled back because of it."""
    progress, settings = session.state.progress, session.resolved.spikes
    recent = progress.recent_losses
    if not is_spike(update.loss, recent, settings):
        progress.recent_losses = [*recent[-(settings.window - 1) :], update.loss]
        return False
    session.records.write("spike", tokens=progress.tokens, loss=update.loss, expected=sorted(recent)[len(recent) // 2])
    session.console.note(f"loss spike at {progress.tokens} tokens: {update.loss:.3f}")
    if settings.action != "rollback":
        return False
    _roll_back(session, progress.row, f"loss {update.loss:.4g} at {progress.tokens} tokens")
    return True


def _non_finite(session: Session, error: NonFinite, rows: int) -> None:
    progress = session.state.progress
    stage = session.resolved.stages[progress.stage].name
    where = f"stage '{stage}', update {progress.updates + 1}, rows {progress.row} to {progress.row + rows - 1}"
    session.records.write("spike", tokens=progress.tokens, loss=str(error), expected=None)
    if session.resolved.spikes.action == "rollback":
        _roll_back(session, progress.row + rows, f"{error} ({where})")
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
    progress = session.state.progress
    if progress.stage != stage:
        raise TrainingStopped(f"{why}: the stage has no checkpoint of its own to return to")
    skipped = [progress.row, skip_to]
    progress.rollbacks = rollbacks
    # What was computed and thrown away was paid for all the same.
    progress.flops, progress.stage_flops = spent.flops, spent.stage_flops
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
