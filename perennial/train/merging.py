"""One model from several: their weights averaged, in a folder whose lineage names the parts. Behind `merge`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from perennial.core import files
from perennial.core import lineage as lineages
from perennial.core.environment import environment, tune_process
from perennial.core.errors import UserError, nearest
from perennial.core.progress import Progress
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.evals.loss import evaluate
from perennial.model.card import read_companions, write_companions
from perennial.model.folder_config import load_config
from perennial.model.huggingface import save_model
from perennial.model.inspection import weights_id
from perennial.model.through_transformers import AnyModel
from perennial.surgery.average import Weights, greedy_soup, line, normalised, weighted_mean
from perennial.train import checkpoint as checkpoints
from perennial.train.full_weights import save_full_weights
from perennial.train.measuring import open_for
from perennial.train.origin import lineage_of
from perennial.train.recipe import ParentFacts
from perennial.train.session import measure_with

OPERATION = "merge"
_DEFAULT_LENGTH = 256
"""Row length of the measurements when no part says in which rows it was trained."""


@dataclass(frozen=True)
class Search:
    """Validation losses by which the shares are chosen."""

    corpora: Mapping[str, Path] = field(default_factory=dict)
    """Prepared corpora by name, such as old and new."""
    prefer: Mapping[str, float] = field(default_factory=dict)
    """Importance of their losses; those that are not named share the rest of 1 equally."""
    points: int = 11
    """Places on the line between two models; more models make a greedy soup."""
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


def merge(
    models: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    search: Search | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes `out`, the average of the models, and says with which shares; equal ones without `weights` or `search`.

    Models are checkpoints, model folders or run folders (their newest checkpoint). Returns {'out', 'parts', 'table',
    'chosen', 'warnings'}. Raises UserError for models that do not fit together.
    """
    tune_process()
    if out.exists():
        raise UserError(f"{out}: exists already; give another --out, or delete it")
    if weights is not None and search is not None:
        raise UserError("--weights and --search: give one of them; a search finds the weights")
    folders = [lineages.newest_checkpoint(path) for path in models]
    _check_alike(folders)
    histories = [history_of(folder) for folder in folders]
    if search is not None:
        search.importance()
        line(search.points)
        open_for(folders[0], search.corpora)
    shares = normalised(weights, len(folders)) if weights is not None else [1 / len(folders)] * len(folders)
    with Progress("merge", quiet=quiet) as progress:
        model = checkpoints.load_weights(folders[0], torch.device("cpu"))
        parts = [_weights(model)]
        for folder in folders[1:]:
            parts.append(_weights(checkpoints.load_weights(folder, torch.device("cpu"))))
        table: list[dict[str, Any]] = []
        if search is not None:
            shares = _searched(model, parts, search, folders[0], histories, table, progress)
        _fill(model, weighted_mean(parts, shares))
    lineage = _lineage(histories, shares, folders, table)
    _write(folders[0], out, model, lineage)
    named = [{"path": str(f), "weight": share} for f, share in zip(folders, shares, strict=True)]
    return {"out": str(out), "parts": named, "table": table, "chosen": shares, "warnings": _warnings(histories)}


def history_of(folder: Path) -> lineages.Lineage:
    """A model's lineage, of one from elsewhere what can be said of it."""
    known = lineages.read(folder) if lineages.has_lineage(folder) else None
    return lineage_of(folder, load_config(folder), known, ParentFacts())


def _check_alike(folders: Sequence[Path]) -> None:
    """Raises UserError unless all are the same architecture with the same tokenizer."""
    if len(folders) < 2:
        raise UserError("merge: at least two models are needed")
    for folder in folders:
        checkpoints.verify(folder, checksums=False)
    first, tokenizer = load_config(folders[0]), TokenizerFolder.open(folders[0]).fingerprint
    for folder in folders[1:]:
        one, other = first.model_dump(mode="json"), load_config(folder).model_dump(mode="json")
        differing = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
        if differing:
            listed = ", ".join(f"{key} {one.get(key)} and {other.get(key)}" for key in differing[:4])
            raise UserError(f"{folders[0]} and {folder} cannot be averaged: they are other models ({listed})")
        if TokenizerFolder.open(folder).fingerprint != tokenizer:
            raise UserError(
                f"{folders[0]} and {folder} cannot be averaged: their tokenizers differ, so a row means another token"
            )


def _weights(model: AnyModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def _fill(model: AnyModel, weights: Weights) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def _searched(
    model: AnyModel,
    parts: Sequence[Weights],
    search: Search,
    folder: Path,
    histories: Sequence[lineages.Lineage],
    table: list[dict[str, Any]],
    progress: Progress,
) -> list[float]:
    """The best shares by the losses; each place that was measured becomes a row of `table`."""
    corpora, importance = open_for(folder, search.corpora), search.importance()
    stages = [stage for history in histories for stage in history.stages]
    length = stages[-1].sequence_length if stages else _DEFAULT_LENGTH
    mask = bool(stages) and stages[-1].document_mask
    total = search.points if len(parts) == 2 else 2 * len(parts) - 1
    seen: dict[tuple[float, ...], float] = {}

    def score(shares: list[float]) -> float:
        if (known := seen.get(tuple(shares))) is not None:
            return known
        _fill(model, weighted_mean(parts, shares))
        measured = evaluate(
            model,
            corpora,
            measure_with(model),
            sequence_length=length,
            max_tokens=search.max_tokens,
            document_mask=mask,
            device=torch.device("cpu"),
        )
        losses = {name: measured[name]["nats_per_token"] for name in corpora}
        found = sum(importance[name] * loss for name, loss in losses.items())
        table.append({"weights": shares, "losses": losses, "score": found})
        seen[tuple(shares)] = found
        progress(len(table), total, f"score {found:.4f}")
        return found

    return _on_line(search.points, score) if len(parts) == 2 else greedy_soup(len(parts), score)


def _on_line(points: int, score: Callable[[list[float]], float]) -> list[float]:
    return min(line(points), key=score)


def _warnings(histories: Sequence[lineages.Lineage]) -> list[str]:
    begun = {
        (h.origin.weights if h.origin else "", h.stages[0].model_dump_json() if h.stages and not h.origin else "")
        for h in histories
    }
    if len(begun) == 1:
        return []
    return ["the lineages share no ancestor; weights of models that began apart are rarely worth averaging"]


def _lineage(
    histories: Sequence[lineages.Lineage],
    shares: Sequence[float],
    folders: Sequence[Path],
    table: Sequence[Mapping[str, Any]],
) -> lineages.Lineage:
    """The parts' stages in order, each once, their corpora, and the merge as a change; the id is filled in later."""
    stages: list[lineages.StageRecord] = []
    corpora: dict[str, dict[str, Any]] = {}
    changes: list[dict[str, Any]] = []
    for history in histories:
        stages += [stage for stage in history.stages if stage not in stages]
        changes += [change for change in history.changes if change not in changes]
        for name, facts in history.corpora.items():
            known = corpora.setdefault(name, facts)
            if known["fingerprint"] != facts["fingerprint"]:
                corpora[f"{name}@{facts['fingerprint'][:8]}"] = facts
    parts = [
        {"checkpoint": history.checkpoint, "name": folder.name, "weight": share}
        for history, folder, share in zip(histories, folders, shares, strict=True)
    ]
    change: dict[str, Any] = {"operation": OPERATION, "parts": parts, "optimizer_state": "not carried"}
    if table:
        change["search"] = {"corpora": list(table[0]["losses"]), "measured": len(table)}
        change["search"] |= min(table, key=lambda row: float(row["score"]))
    return lineages.Lineage(
        checkpoint="",
        stages=stages,
        corpora=corpora,
        environment=environment(),
        origin=next((history.origin for history in histories if history.origin), None),
        changes=[*changes, change],
    )


def _write(source: Path, out: Path, model: AnyModel, lineage: lineages.Lineage) -> None:
    """Writes the folder under a temporary name and puts it in place; tokenizer and card are those of `source`."""
    with files.new_folder(out) as partial:
        state = partial / lineages.STATE_FOLDER
        state.mkdir()
        save_model(model, partial)
        TokenizerFolder.open(source).copy_to(partial)
        save_full_weights(model, model.stored_dtypes.values(), state)
        complete = lineage.model_copy(update={"checkpoint": weights_id(partial)})
        files.write_json(state / lineages.LINEAGE_FILE, complete.model_dump(mode="json"))
        write_companions(read_companions(source), partial, complete)
        files.write_manifest(partial, {"format": 1}, checkpoints.MANIFEST)


def to_text(result: Mapping[str, Any]) -> str:
    """The table of the search and the parts, for a person."""
    lines = []
    if table := result["table"]:
        names = list(table[0]["losses"])
        lines.append("weights".ljust(24) + "".join(f"{name:>12}" for name in names) + f"{'score':>12}")
        for row in table:
            shares = ", ".join(f"{share:.3g}" for share in row["weights"])
            mark = "  <- chosen" if row["weights"] == result["chosen"] else ""
            losses = "".join(f"{row['losses'][name]:12.4f}" for name in names)
            lines.append(f"{shares:<24}{losses}{row['score']:12.4f}{mark}")
        lines.append("")
    lines += [f"warning: {warning}" for warning in result["warnings"]]
    lines.append(f"{result['out']}: the average of")
    lines += [f"  {part['weight']:7.2%}  {part['path']}" for part in result["parts"]]
    lines.append("It holds no optimizer state: moments of its parts would belong to other weights.")
    return "\n".join(lines)
