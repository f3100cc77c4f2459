"""Checkpoints: a Hugging Face folder with Perennial's state beside it, whole or absent.

    checkpoints/<tokens>/config.json, model.safetensors, tokenizer files, generation_config.json
                         README.md and licence files, carried on from the parent
                         perennial/state.json, optimizer.safetensors, lineage.json, manifest.json (hashes, written last)
                         perennial/workers/, communication.safetensors of workers that train apart (see `apart`)

Everything is written and synced under a temporary name, then renamed; a kill at any instant leaves the checkpoints that
were there and perhaps a temporary folder, which the next start removes.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from perennial.core import files
from perennial.core.errors import UserError
from perennial.core.lineage import LINEAGE_FILE, STATE_FOLDER, Lineage, checkpoints_of
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.model.card import Companions, write_companions
from perennial.model.huggingface import FolderContent, folder_content, load_model, reload_weights
from perennial.model.inspection import weights_id
from perennial.model.placement import is_spread
from perennial.model.storage import MAX_SHARD_BYTES
from perennial.model.through_transformers import AnyModel
from perennial.train.apart import FOLDER as WORKERS
from perennial.train.apart import SHARED, Own, Replicas, workers_of
from perennial.train.full_weights import FOLDER, full_content, load_full_weights
from perennial.train.saving import Crew
from perennial.train.state import Progress
from perennial.train.tensor_files import load_tensors, save_tensors, stored_parts

MOMENTS = "optimizer"
"""Name of the files that hold the optimizer's state."""
MANIFEST = f"{STATE_FOLDER}/{files.MANIFEST}"
_TEMPORARY = ".saving-"


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at one moment, as far as this process holds it."""

    model: FolderContent
    full: FolderContent | None
    """The fp32 weights, where the folder stores shorter ones."""
    moments: Mapping[str, Tensor]
    """The optimizer's state, as `export_state` gives it; of tensors that are spread, this process's part."""
    progress: Progress
    lineage: Mapping[str, Any]
    """Everything of it but the checkpoint's id."""
    recipe_hash: str
    tokenizer: TokenizerFolder
    companions: Companions
    own: Own | None = None
    """What this process's worker has of its own, where workers train apart."""


def snapshot(model: AnyModel, moments: Mapping[str, Tensor], *, crew: Crew, copies: bool, **known: Any) -> Snapshot:
    """Takes one; `known` are the fields beside the tensors. Every process has to call it.

    `copies`: in memory of its own, so that training may go on while it is written.
    """
    separator = known["tokenizer"].separator_id
    content = folder_content(model, extra_config={"eos_token_id": separator, "bos_token_id": separator})
    full = full_content(model, model.stored_dtypes.values())
    if copies or crew.processes > 1:
        share: dict[str, Any] = {"process": crew.process, "processes": crew.processes, "copies": copies}
        content = content.held(max_shard_bytes=MAX_SHARD_BYTES, **share)
        full = full and full.held(max_shard_bytes=MAX_SHARD_BYTES, **share)
    if copies:
        known["own"] = own.copied() if (own := known.get("own")) else None
        moments = {name: tensor.detach().clone() for name, tensor in moments.items()}
    return Snapshot(content, full, moments, **known)


def save(checkpoints: Path, taken: Snapshot, crew: Crew) -> Path:
    """Writes a checkpoint and returns its folder; every process writes its share. Raises UserError when a disk is full.

    The folder appears under its name when everything is in it.
    """
    final = checkpoints / str(taken.progress.tokens)
    temporary = checkpoints / f"{_TEMPORARY}{taken.progress.tokens}"
    if crew.main(lambda: _is_there(final)):
        return final
    state = temporary / STATE_FOLDER
    try:
        crew.main(lambda: _made_anew(state, temporary))
        crew.all(lambda: _write_weights(temporary, taken, crew))
        save_tensors(state, MOMENTS, taken.moments, group=crew.group)
        if taken.own is not None:
            taken.own.save(temporary, crew.all, crew.group)
        crew.main(lambda: _complete(temporary, final, taken))
    except BaseException as error:
        if crew.process == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        explained = _explained(error, final)
        if explained is error:
            raise
        raise explained from error
    return final


def _is_there(final: Path) -> bool:
    if not final.exists():
        return False
    files.verify_manifest(final, MANIFEST, "checkpoint")  # a resumed run has come here again; it would be the same
    return True


def _made_anew(state: Path, temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    state.mkdir(parents=True)


def _write_weights(folder: Path, taken: Snapshot, crew: Crew) -> None:
    taken.model.write(folder, process=crew.process, processes=crew.processes)
    if taken.full is not None:
        taken.full.write(folder / STATE_FOLDER / FOLDER, process=crew.process, processes=crew.processes)


def _complete(folder: Path, final: Path, taken: Snapshot) -> None:
    """Writes what only one process has to, and publishes the folder."""
    state = folder / STATE_FOLDER
    taken.tokenizer.copy_to(folder)
    files.write_json(state / "state.json", {"recipe_hash": taken.recipe_hash, **taken.progress.to_json()})
    complete = Lineage(checkpoint=weights_id(folder), **taken.lineage)
    files.write_json(state / LINEAGE_FILE, complete.model_dump(mode="json"))
    write_companions(taken.companions, folder, complete)
    files.write_manifest(folder, {"format": 1}, MANIFEST)
    files.publish(folder, final)


def _explained(error: BaseException, final: Path) -> BaseException:
    """A full disk or missing rights as a UserError that names the checkpoint; other errors as they are."""
    found = error.__cause__ if isinstance(error, UserError) else error  # it names a file that is gone by now
    number = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    if number:  # safetensors has an error type of its own
        found = OSError(int(number[1]), os.strerror(int(number[1])))
    return files.explain(found, final) if isinstance(found, OSError) else error


def remove_leftovers(checkpoints: Path) -> None:
    """Deletes what a kill in the middle of saving or pruning left behind."""
    for path in checkpoints.glob(".*") if checkpoints.is_dir() else []:
        if path.name.startswith(_TEMPORARY) or path.name.endswith(".tmp"):
            shutil.rmtree(path, ignore_errors=True)


def prune(checkpoints: Path, keep: int, always: set[int]) -> None:
    """Deletes all but the newest `keep` checkpoints and those whose tokens are in `always`."""
    for path in checkpoints_of(checkpoints.parent)[:-keep]:
        if int(path.name) not in always:
            files.remove_tree(path)


def verify(checkpoint: Path, *, checksums: bool = True) -> None:
    """Checks a checkpoint against its manifest; one without (from elsewhere) is left to the loader's own checks."""
    if (checkpoint / MANIFEST).is_file():
        files.verify_manifest(checkpoint, MANIFEST, "checkpoint", checksums)
    elif (checkpoint / STATE_FOLDER).is_dir():
        raise UserError(
            f"{checkpoint}: the checkpoint is incomplete: {MANIFEST} is missing. Bring that file back from a copy, or "
            "take another checkpoint."
        )


def load_weights(
    checkpoint: Path, device: torch.device, *, prepare: Callable[[AnyModel], None] | None = None
) -> AnyModel:
    """The model of a checkpoint, in fp32; `prepare` as for `load_model`. Raises UserError for an altered file."""
    verify(checkpoint)
    return load_unverified(checkpoint, device, prepare=prepare)


def load_unverified(
    checkpoint: Path, device: torch.device, *, prepare: Callable[[AnyModel], None] | None = None
) -> AnyModel:
    """The same of a checkpoint that was verified before."""
    model = load_model(checkpoint, device=device, prepare=prepare)
    load_full_weights(model, checkpoint)
    return model


def put_back_weights(model: AnyModel, checkpoint: Path, device: torch.device) -> None:
    """Returns a model's weights to what a checkpoint of it holds."""
    reload_weights(model, checkpoint, device)
    load_full_weights(model, checkpoint)


def load_moments(checkpoint: Path, model: AnyModel, crew: Crew) -> dict[str, Tensor]:
    """The optimizer's state that a checkpoint holds, spread as the parameters are; empty when it holds none."""
    return _load_beside(model, checkpoint / STATE_FOLDER, MOMENTS, crew.group)


def load_own(checkpoint: Path, model: AnyModel, replicas: Replicas, crew: Crew) -> Own:
    """What a checkpoint holds of workers that train apart; of this one nothing when there were more or fewer then."""
    state, number, group = checkpoint / STATE_FOLDER, replicas.own, replicas.group
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    if workers_of(checkpoint) == replicas.number:
        weights = _load_beside(model, state / WORKERS, f"weights-{number}", group)
        moments = _load_beside(model, state / WORKERS, f"moments-{number}", group)
    return Own(number, group, weights, moments, _load_beside(model, state, SHARED, crew.group))


def _load_beside(model: AnyModel, folder: Path, name: str, group: Any) -> dict[str, Tensor]:
    """Stored tensors of which each has the name of a parameter, or '{parameter}.{key}', spread as that is."""
    parameters = dict(model.named_parameters())
    tensors = {}
    for part in stored_parts(folder, name):
        parameter = parameters.get(part.tensor, parameters.get(part.tensor.rpartition(".")[0]))
        if parameter is not None and is_spread(parameter) and parameter.shape == part.whole:
            tensors[part.tensor] = torch.empty_like(parameter, dtype=part.dtype, requires_grad=False)
        else:
            tensors[part.tensor] = torch.empty(part.whole, dtype=part.dtype)
    if tensors:
        load_tensors(folder, name, tensors, group=group)
    return tensors


def load_progress(checkpoint: Path, recipe_hash: str) -> Progress:
    """Where the run stood. Raises UserError when the checkpoint belongs to another recipe."""
    data = files.read_json(checkpoint / STATE_FOLDER / "state.json", "checkpoint state")
    if data.pop("recipe_hash") != recipe_hash:
        raise UserError(
            f"{checkpoint}: this checkpoint was written by another recipe than the run folder's resolved.json; bring "
            "it back to the run that it belongs to."
        )
    return Progress(**data)
