"""What a stage plugs into the loop beyond its optimizer: objective with teachers, loader with its rows, pull."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from perennial.data.loader import Arrangement, Loader
from perennial.data.mixture import StageOrder
from perennial.data.replay import SourceSpec
from perennial.model.through_transformers import AnyModel
from perennial.objectives.base import StageData
from perennial.train.history import component
from perennial.train.other_models import PARENT, OtherModels
from perennial.train.pulling import Pulling, single_rows, squared_gradients
from perennial.train.resolved import ResolvedStage
from perennial.train.stage_parts import stage_data
from perennial.train.stage_sources import stage_order

if TYPE_CHECKING:
    from perennial.train.session import Session


class Opening:
    """Makes these parts for one stage after the other; further models stay loaded while a stage reads them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._models = OtherModels(session.world.device)

    def objective(self, stage: ResolvedStage) -> Any:
        """The stage's objective with the models that it learns from."""
        objective = component("objectives", stage.objective)
        models = self._models.open(stage.models)
        objective = objective.with_models([models[name] for name in objective.checkpoints()])
        return objective.on_stage(self._data(stage))

    @contextmanager
    def loader(self, stage: ResolvedStage, order: StageOrder, objective: Any) -> Iterator[Loader]:
        """The rows of the stage as its objective is trained on them."""
        with self._loader(order, objective.arrangement(self._data(stage))) as loader:
            yield loader

    def _data(self, stage: ResolvedStage) -> StageData:
        session, resolved = self._session, self._session.resolved
        return stage_data(
            [SourceSpec.from_json(source) for source in stage.sources],
            session.by_fingerprint,
            seed=resolved.seed,
            stage=stage.name,
            sequence_length=resolved.batch.sequence_length,
            document_mask=resolved.document_mask,
            quiet=session.is_quiet,
        )

    def pulling(self, stage: ResolvedStage) -> Pulling | None:
        """The stage's pull; the parent is read, and weighed, anew when a run is resumed, and never stored twice."""
        if stage.pull is None:
            return None
        session, parent = self._session, self._models.open(stage.models)[PARENT]
        pull = component("pulls", stage.pull)
        importance = pull.importance(lambda num_rows: self._squared_gradients(stage, parent, num_rows))
        return Pulling(session.state.model, parent, pull, importance)

    def _squared_gradients(self, stage: ResolvedStage, parent: AnyModel, num_rows: int) -> Mapping[str, torch.Tensor]:
        session = self._session
        resolved, length = session.resolved, session.resolved.batch.sequence_length
        order = stage_order(stage.pull_sources, session.by_fingerprint, resolved.seed, length, stage.name, {})
        with self._loader(order) as loader:
            rows = single_rows(loader, session.world.device)
            how: dict[str, Any] = {"quiet": session.is_quiet, "note": session.watchdog.go_on}
            return squared_gradients(parent, rows, num_rows=num_rows, **how)

    def _loader(self, order: StageOrder, arrangement: Arrangement | None = None) -> Loader:
        session = self._session
        return Loader(
            order,
            session.by_fingerprint,
            sequence_length=session.resolved.batch.sequence_length,
            document_mask=session.resolved.document_mask,
            separator_id=session.tokenizer.separator_id,
            arrangement=arrangement,
        )
