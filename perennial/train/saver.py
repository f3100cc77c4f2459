"""When and how the checkpoints of a run are written: at once or behind training, tried again, recorded once whole."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perennial.core.amounts import human
from perennial.core.errors import UserError
from perennial.core.patience import Patience
from perennial.model.placement import local_part
from perennial.model.through_transformers import AnyModel
from perennial.train import checkpoint
from perennial.train.apart import Own
from perennial.train.history import consumed, lineage_of, stage_records
from perennial.train.parallel import any_of
from perennial.train.saving import Saving, pays

if TYPE_CHECKING:
    from perennial.train.session import Session


class Saver:
    """Writes the checkpoints of a session; never more than one at a time."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._saving: Saving | None = None
        self._may_fail = False
        self._failed = False
        self._periodic: int | None = None
        """Tokens at which the last save that may fail was begun."""
        self._consumed: list[tuple[str, dict[str, Any]]] = []
        """Of the checkpoint that is being written."""

    def may_try_again(self) -> bool:
        """Whether this is a quarter of the way from a save that may have failed to the next; equal on all processes."""
        every, batch = self._session.resolved.checkpoint_every_tokens, self._session.update_tokens
        if every is None or self._periodic is None:
            return False
        quarter = max(1, every // 4 // batch) * batch
        return (self._session.state.progress.tokens - self._periodic) % quarter == 0

    def has_to_try_again(self) -> bool:
        """Whether the last save failed on any process; asks all of them, and only where `may_try_again`."""
        return self.may_try_again() and any_of(self._failed, self._session.world)

    def save(self, *, while_training: bool = False) -> None:
        """Writes a checkpoint of the present state and prunes old ones; one that is still being written first.

        while_training: a large state is copied and written by a thread; when it fails, training goes on without it and
        it is tried again later. Otherwise it is tried again at once, for as long as patience lasts; then UserError.
        """
        self.finish()
        session = self._session
        session.watchdog.enter("save")
        progress = session.state.progress
        self._failed, self._may_fail = False, while_training
        self._periodic = progress.tokens if while_training else None
        with session.clock.section("save") as spent:
            if while_training:
                self._save(in_background=True)
            else:
                # What one process fails at, all fail at, and all wait equally long; one tells.
                tell = session.tell if session.world.is_main else lambda text: session.watchdog.go_on()
                save = functools.partial(self._save, in_background=False)
                Patience(session.patience.seconds, tell).attempt(save, passes=could_not_write)
        progress.seconds["save"] += spent.seconds

    def finish(self, *, wait: bool = True) -> None:
        """Records the checkpoint that was being written, once it is whole, or that this failed; see `save`."""
        if self._saving is None or not (wait or self._saving.is_done):
            return
        saving, self._saving = self._saving, None
        try:
            path = saving.finish()
        except (UserError, OSError) as error:
            self._note_failure(saving.tokens, error)
            return
        records = self._session.records
        for stage, sources in self._consumed:
            records.write("consumed", tokens=saving.tokens, stage=stage, sources=sources)
        records.write("checkpoint", tokens=saving.tokens, path=path.name, seconds=round(saving.seconds, 3))

    def _save(self, *, in_background: bool) -> None:
        session = self._session
        try:
            session.crew.main(session.records.settle)  # a checkpoint must not be ahead of its records
        except UserError as error:
            self._note_failure(session.state.progress.tokens, error)
            return
        self._saving = self._start(in_background)
        if not in_background:
            self.finish()

    def _note_failure(self, tokens: int, error: Exception) -> None:
        """Notes that saving failed; raises the error when training must not go on without."""
        if not self._may_fail:
            raise error
        self._failed = True
        reason = str(error).splitlines()[0]
        self._session.records.write("save_failed", tokens=tokens, reason=reason)
        self._session.console.note(
            f"saving at {human(tokens, 'tokens')} failed, training goes on and tries again later: {reason}"
        )

    def _start(self, while_training: bool) -> Saving:
        session = self._session
        resolved, progress, replicas = session.resolved, session.state.progress, session.replicas
        optimizer = session.state.optimizer or session.new_optimizer(resolved.stages[progress.stage])
        model, moments = session.state.model, session.moments(optimizer)
        in_background = while_training and not any_of(not pays(_state_size(model, moments)), session.world)
        ends = {sum(s.tokens for s in resolved.stages[: i + 1]) for i in range(len(resolved.stages))}
        records = stage_records(resolved, progress, session.by_fingerprint)
        self._consumed = consumed(records)

        def write(taken: checkpoint.Snapshot) -> Path:
            path = checkpoint.save(session.checkpoints, taken, session.crew)
            if session.world.is_main:
                checkpoint.prune(session.checkpoints, resolved.checkpoint_keep, ends)
            return path

        with session.rounds.common() as weights:
            own = None
            if session.communication.trains_apart:
                own = Own(replicas.own, replicas.group, weights, moments, session.rounds.shared_state())
                moments = replicas.mean(moments)
            taken = checkpoint.snapshot(
                model,
                moments,
                crew=session.crew,
                copies=in_background,
                progress=copy.deepcopy(progress),
                lineage=lineage_of(resolved, progress, records, session.parent, session.environment),
                recipe_hash=resolved.recipe_hash,
                tokenizer=session.tokenizer,
                companions=session.companions,
                own=own,
            )
            return Saving(lambda: write(taken), tokens=progress.tokens, in_background=in_background)


def could_not_write(error: Exception) -> bool:
    """Whether an error means that writing failed, which may pass."""
    return isinstance(error, (UserError, OSError))


def _state_size(model: AnyModel, moments: Mapping[str, torch.Tensor]) -> int:
    """Bytes of parameters and moments that this process holds."""
    tensors = [local_part(tensor) for tensor in (*model.parameters(), *moments.values())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
