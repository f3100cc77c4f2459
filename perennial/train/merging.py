"""One model from several: averaged, or merged by TIES, in a folder whose lineage names the parts. Behind `merge`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perennial.core import files
from perennial.core import lineage as lineages
from perennial.core.environment import environment, tune_process
from perennial.core.errors import UserError
from perennial.core.progress import Progress
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.model.card import read_companions, write_companions
from perennial.model.folder_config import load_config
from perennial.model.huggingface import save_model
from perennial.model.inspection import weights_id
from perennial.model.through_transformers import AnyModel
from perennial.surgery.average import Weights, line, normalised, weighted_mean
from perennial.surgery.ties import DENSITY, SCALE, check_settings, edge_of, merged_change
from perennial.train import checkpoint as checkpoints
from perennial.train.full_weights import save_full_weights
from perennial.train.measuring import open_for
from perennial.train.merging_search import Search, best_place
from perennial.train.origin import lineage_of
from perennial.train.recipe import ParentFacts
from perennial.train.stored_weights import stored_weights

OPERATION = "merge"
_ValueAt = Callable[[str, Sequence[float]], torch.Tensor]
"""A parameter of the merged model: its name, and the shares of the models or the scale of TIES."""


@dataclass(frozen=True)
class Ties:
    """Merging by TIES instead of averaging (see `surgery.ties`)."""

    density: float = DENSITY
    """Share of each model's changes that stays."""
    scale: float = SCALE
    """What the merged change is multiplied by; of a search the largest that is tried."""
    parent: Path | None = None
    """What the models were trained from; None: as their lineage says."""


@dataclass(frozen=True)
class _Parts:
    """The models that are merged."""

    folders: Sequence[Path]
    histories: Sequence[lineages.Lineage]
    weights: Sequence[Weights]

    @classmethod
    def open(cls, folders: Sequence[Path]) -> _Parts:
        return cls(folders, [history_of(one) for one in folders], [stored_weights(one) for one in folders])


def merge(
    models: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    search: Search | None = None,
    ties: Ties | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes `out`, the average of the models, and says with which shares; equal ones without `weights` or `search`.

    With `ties` it is their parent with what TIES makes of their changes. Models are checkpoints, model folders or run
    folders (their newest checkpoint); of each one tensor is held at a time, but for those of `stored_weights`. Returns
    {'out', 'parts', 'table', 'chosen', 'warnings'}, with `ties` also 'parent', 'density' and 'scale'. Raises UserError
    for models that do not fit together.
    """
    tune_process()
    if out.exists():
        raise UserError(f"{out}: exists already; give another --out, or delete it")
    if weights is not None and (search is not None or ties is not None):
        raise UserError("--weights, --search and --ties: shares that are given leave nothing to find or to elect")
    folders = [lineages.newest_checkpoint(path) for path in models]
    if ties is not None:
        check_settings(ties.density, ties.scale)
        folders = [_common_parent(models, folders, ties.parent), *folders]
    _check_alike(folders, what="merged" if ties else "averaged")
    if search is not None:
        search.importance()
        line(search.points)
        open_for(folders[0], search.corpora)
    parts = _Parts.open(folders)
    with Progress("merge", quiet=quiet) as progress:
        model = checkpoints.load_unverified(folders[0], torch.device("cpu"))
        table: list[dict[str, Any]] = []
        if ties is None:
            value_at: _ValueAt = lambda name, shares: weighted_mean(parts.weights, shares, name)  # noqa: E731
            places = line(search.points) if search is not None and len(folders) == 2 else None
            chosen = normalised(weights, len(folders)) if weights is not None else [1 / len(folders)] * len(folders)
        else:
            value_at = _by_ties(parts.weights, ties.density, model, progress)
            places = [[ties.scale * share] for _, share in line(search.points)] if search is not None else None
            chosen = [ties.scale]
        if search is not None:
            chosen = best_place(
                search,
                model,
                places,
                fill=lambda place: _fill(model, value_at, place),
                name="scale" if ties else "weights",
                folder=folders[0],
                histories=parts.histories,
                table=table,
                progress=progress,
            )
        _fill(model, value_at, chosen)
    described = _average(parts, chosen) if ties is None else _ties(parts, ties.density, chosen[0])
    _write(folders[0], out, model, _lineage(parts.histories, described["change"], table))
    warnings = _warnings(parts.histories) if ties is None else _not_of_the_parent(parts)
    return {"out": str(out), **described["result"], "table": table, "warnings": warnings}


def history_of(folder: Path) -> lineages.Lineage:
    """A model's lineage, of one from elsewhere what can be said of it."""
    known = lineages.read(folder) if lineages.has_lineage(folder) else None
    return lineage_of(folder, load_config(folder), known, ParentFacts())


def _check_alike(folders: Sequence[Path], *, what: str) -> None:
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
            raise UserError(f"{folders[0]} and {folder} cannot be {what}: they are other models ({listed})")
        if TokenizerFolder.open(folder).fingerprint != tokenizer:
            raise UserError(
                f"{folders[0]} and {folder} cannot be {what}: their tokenizers differ, so a row means another token"
            )


def _common_parent(models: Sequence[Path], folders: Sequence[Path], named: Path | None) -> Path:
    """The checkpoint that all models were trained from. Raises UserError when it is not one, or not known where."""
    if named is not None:
        return lineages.newest_checkpoint(named)
    begun = {}
    for folder in folders:
        runs = history_of(folder).runs()
        if not runs or runs[-1][0].parent is None:
            raise UserError(f"--ties: by its lineage {folder} continues no model; name what it began as with --parent")
        begun[folder] = runs[-1][0].parent
    if len(set(begun.values())) > 1:
        listed = ", ".join(f"{folder} continues {parent}" for folder, parent in begun.items())
        raise UserError(f"--ties: the models have no parent in common ({listed}); name an ancestor with --parent")
    wanted = next(iter(begun.values()))
    for model, folder in zip(models, folders, strict=True):
        for run in (model, folder.parent.parent):
            found = _parent_of(run)
            if found is not None and history_of(found).checkpoint == wanted:
                return found
    raise UserError(f"--ties: the parent {wanted} is not where it was when the models were trained; give --parent DIR")


def _parent_of(run: Path) -> Path | None:
    """Where the parent of a run folder lies; None when it is gone, or `run` is no run folder."""
    from perennial.train.run import RESOLVED, read_resolved

    parent = read_resolved(run).parent if (run / RESOLVED).is_file() else None
    return Path(parent["path"]) if parent and Path(parent["path"]).is_dir() else None


@torch.no_grad()
def _fill(model: AnyModel, value_at: _ValueAt, place: Sequence[float]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(value_at(name, place))


@torch.no_grad()
def _by_ties(weights: Sequence[Weights], density: float, model: AnyModel, progress: Progress) -> _ValueAt:
    """The parameters of the parent (the first of `weights`) and TIES at a scale."""
    parent, *children = weights
    names = [name for name, _ in model.named_parameters()]

    def changes(child: Weights) -> Iterator[torch.Tensor]:
        return (child[name] - parent[name] for name in names)

    edges = []
    for number, child in enumerate(children):
        progress(number, len(children), "trimming")
        edges.append(edge_of(functools.partial(changes, child), density))

    def value_at(name: str, place: Sequence[float]) -> torch.Tensor:
        begun = parent[name]
        return begun + place[0] * merged_change([child[name] - begun for child in children], edges)

    return value_at


def _average(parts: _Parts, shares: Sequence[float]) -> dict[str, Any]:
    """What is said of an average, in the result and in its lineage."""
    named = [{"path": str(f), "weight": share} for f, share in zip(parts.folders, shares, strict=True)]
    recorded = [
        {"checkpoint": history.checkpoint, "name": folder.name, "weight": share}
        for history, folder, share in zip(parts.histories, parts.folders, shares, strict=True)
    ]
    return {"result": {"parts": named, "chosen": list(shares)}, "change": {"parts": recorded}}


def _ties(parts: _Parts, density: float, scale: float) -> dict[str, Any]:
    """What is said of a merge by TIES."""
    how = {"density": density, "scale": scale}
    parent, *recorded = (
        {"checkpoint": history.checkpoint, "name": folder.name}
        for history, folder in zip(parts.histories, parts.folders, strict=True)
    )
    paths = [str(folder) for folder in parts.folders]
    result = {"parent": paths[0], "parts": [{"path": path} for path in paths[1:]], "chosen": scale, **how}
    return {"result": result, "change": {"method": "ties", **how, "parent": parent, "parts": recorded}}


def _warnings(histories: Sequence[lineages.Lineage]) -> list[str]:
    begun = {
        (h.origin.weights if h.origin else "", h.stages[0].model_dump_json() if h.stages and not h.origin else "")
        for h in histories
    }
    if len(begun) == 1:
        return []
    return ["the lineages share no ancestor; weights of models that began apart are rarely worth averaging"]


def _not_of_the_parent(parts: _Parts) -> list[str]:
    """Warnings of children whose lineage does not name the parent."""
    parent, *children = parts.histories
    strangers = [
        str(folder)
        for folder, child in zip(parts.folders[1:], children, strict=True)
        if parent.checkpoint not in {stage.parent for stage in child.stages}
    ]
    words = "by its lineage did not begin as the parent, so that the difference is not what it has learned"
    return [f"{folder}: {words}" for folder in strangers]


def _lineage(
    histories: Sequence[lineages.Lineage], change: Mapping[str, Any], table: Sequence[Mapping[str, Any]]
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
    merged: dict[str, Any] = {"operation": OPERATION, **change, "optimizer_state": "not carried"}
    if table:
        merged["search"] = {"corpora": list(table[0]["losses"]), "measured": len(table)}
        merged["search"] |= min(table, key=lambda row: float(row["score"]))
    return lineages.Lineage(
        checkpoint="",
        stages=stages,
        corpora=corpora,
        environment=environment(),
        origin=next((history.origin for history in histories if history.origin), None),
        changes=[*changes, merged],
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
    key = "scale" if "scale" in result else "weights"
    if table := result["table"]:
        names = list(table[0]["losses"])
        lines.append(key.ljust(24) + "".join(f"{name:>12}" for name in names) + f"{'score':>12}")
        for row in table:
            place = row[key] if isinstance(row[key], list) else [row[key]]
            mark = "  <- chosen" if row[key] == result["chosen"] else ""
            losses = "".join(f"{row['losses'][name]:12.4f}" for name in names)
            lines.append(f"{', '.join(f'{n:.3g}' for n in place):<24}{losses}{row['score']:12.4f}{mark}")
        lines.append("")
    lines += [f"warning: {warning}" for warning in result["warnings"]]
    if key == "scale":
        how = f"{result['scale']:.3g} x the elected mean of {result['density']:.3g} of the changes"
        lines.append(f"{result['out']}: {result['parent']} and {how} of")
        lines += [f"  {part['path']}" for part in result["parts"]]
    else:
        lines.append(f"{result['out']}: the average of")
        lines += [f"  {part['weight']:7.2%}  {part['path']}" for part in result["parts"]]
    lines.append("It holds no optimizer state: moments of its parts would belong to other weights.")
    return "\n".join(lines)
