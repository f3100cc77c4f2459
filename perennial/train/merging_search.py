"""Where on a line, or with which members of a soup, merged models have the lowest validation losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from perennial.core.errors import UserError, nearest
from perennial.core.lineage import Lineage
from perennial.core.progress import Progress
from perennial.evals.loss import evaluate
from perennial.model.through_transformers import AnyModel
from perennial.surgery.average import greedy_soup
from perennial.train.measuring import open_for
from perennial.train.session import measure_with

_DEFAULT_LENGTH = 256
"""Row length of the measurements when no part says in which rows it was trained."""


@dataclass(frozen=True)
class Search:
    """Validation losses by which the shares, or the scale of TIES, are chosen."""

    corpora: Mapping[str, Path] = field(default_factory=dict)
    """Prepared corpora by name, such as old and new."""
    prefer: Mapping[str, float] = field(default_factory=dict)
    """Importance of their losses; those that are not named share the rest of 1 equally."""
    points: int = 11
    """Places on the line between two models, or from the parent to TIES; more models make a greedy soup."""
    max_tokens: int = 65536
    """Validation tokens per corpus."""

    def importance(self) -> dict[str, float]:
        """Importance of each corpus, adding up to 1. Raises UserError for an unknown name or a wrong number."""
        for name, value in self.prefer.items():
            if name not in self.corpora:
                known = ", ".join(self.corpora)
                hint = nearest(name, self.corpora)
                raise UserError(f"--prefer {name}={value:g}: no such corpus under --search; there are: {known}.{hint}")
            if not 0 <= value <= 1:
                raise UserError(f"--prefer {name}={value:g}: must be between 0 and 1")
        rest = [name for name in self.corpora if name not in self.prefer]
        left = 1 - sum(self.prefer.values())
        if left < -1e-9 or (not rest and abs(left) > 1e-9):
            raise UserError(f"--prefer: the importances add up to {1 - left:g}, not to 1")
        return {name: self.prefer.get(name, left / max(1, len(rest))) for name in self.corpora}


def best_place(
    search: Search,
    model: AnyModel,
    places: Sequence[list[float]] | None,
    *,
    fill: Callable[[list[float]], None],
    name: str,
    folder: Path,
    histories: Sequence[Lineage],
    table: list[dict[str, Any]],
    progress: Progress,
) -> list[float]:
    """The best of the places by the losses; `places` None: of the soups of as many models as there are `histories`.

    fill: puts the weights of a place into `model`; name: of a place in `table`, where each that was measured becomes a
    row: 'weights', or 'scale' for a single number; folder: the checkpoint whose tokenizer the corpora must have.
    """
    corpora, importance = open_for(folder, search.corpora), search.importance()
    stages = [stage for history in histories for stage in history.stages]
    length = stages[-1].sequence_length if stages else _DEFAULT_LENGTH
    mask = bool(stages) and stages[-1].document_mask
    total = len(places) if places is not None else 2 * len(histories) - 1
    seen: dict[tuple[float, ...], float] = {}

    def score(place: list[float]) -> float:
        if (known := seen.get(tuple(place))) is not None:
            return known
        fill(place)
        measured = evaluate(
            model,
            corpora,
            measure_with(model),
            sequence_length=length,
            max_tokens=search.max_tokens,
            document_mask=mask,
            device=torch.device("cpu"),
        )
        losses = {corpus: measured[corpus]["nats_per_token"] for corpus in corpora}
        found = sum(importance[corpus] * loss for corpus, loss in losses.items())
        table.append({name: place[0] if name == "scale" else place, "losses": losses, "score": found})
        seen[tuple(place)] = found
        progress(len(table), total, f"score {found:.4f}")
        return found

    return min(places, key=score) if places is not None else greedy_soup(len(histories), score)
