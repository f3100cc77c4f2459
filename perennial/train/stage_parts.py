"""The parts of a stage that need to know its data or its parent: an objective that lays rows out, and a pull."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.core.seeds import derive
from perennial.core.settings import raise_problems
from perennial.data.corpus import Corpus
from perennial.data.replay import SourceSpec
from perennial.objectives.base import StageData
from perennial.train.recipe import REPLAY, StageSettings


def stage_data(
    sources: Sequence[SourceSpec],
    corpora: Mapping[str, Corpus],
    *,
    seed: int,
    stage: str,
    sequence_length: int,
    document_mask: bool,
    quiet: bool = True,
) -> StageData:
    """The rows of a stage as its objective sees them; corpora by fingerprint, seed that of the run."""
    return StageData(
        seed=derive(seed, "objective", stage),
        sequence_length=sequence_length,
        document_mask=document_mask,
        quiet=quiet,
        corpora=tuple(corpora[source.fingerprint] for source in sources),
        sources=tuple(sources),
    )


def pull_of(stage: StageSettings) -> Any:
    """The stage's pull, or None. Raises UserError where the stage trains only rows that the parent does not have."""
    if stage.pull is None:
        return None
    pull, problems = plugins.build("pulls", stage.pull)
    raise_problems(problems, f"stage '{stage.name}' pull")
    if stage.train == "new_rows":
        raise UserError(
            f"stage '{stage.name}': pull: under train 'new_rows' nothing changes that the parent has; leave one out"
        )
    return pull


def weighs_by_replay(stage: StageSettings) -> bool:
    """Whether the stage's pull measures on what the parent consumed."""
    pull = pull_of(stage)
    return pull is not None and REPLAY in pull.mixture
