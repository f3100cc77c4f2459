"""Checkpoints: a Hugging Face folder with Perennial's state beside it, whole or absent.

    checkpoints/<tokens>/config.json, model.safetensors, tokenizer files, generation_config.json
                         README.md and licence files, carried on from the parent
                         perennial/state.json, optimizer.safetensors, lineage.json, manifest.json (hashes, written last)

Everything is written and synced under a temporary name, then renamed; a kill at any instant leaves the checkpoints that
were there and perhaps a temporary folder, which the next start removes.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from perennial.core import files
from perennial.core.errors import UserError
from perennial.core.lineage import LINEAGE_FILE, STATE_FOLDER, Lineage, checkpoints_of
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.model.card import Companions, write_companions
from perennial.model.huggingface import load_model, save_model
from perennial.model.inspection import weights_id
from perennial.model.through_transformers import AnyModel
from perennial.train.full_weights import load_full_weights, save_full_weights
from perennial.train.state import Progress

MANIFEST = f"{STATE_FOLDER}/{files.MANIFEST}"
_TEMPORARY = ".saving-"


def save(
    checkpoints: Path,
    *,
    model: AnyModel,
    moments: dict[str, torch.Tensor],
    progress: Progress,
    lineage: dict[str, Any],
    recipe_hash: str,
    tokenizer: TokenizerFolder,
    companions: Companions,
) -> Path:
    """Writes the checkpoint for this progress and returns its folder. Raises UserError when the disk is full.

    `moments` are the optimizer's state, as `export_state` gives it.
    """
    final = checkpoints / str(progress.tokens)
    if final.exists():  # a resumed run has come here again; what is there is the same
        files.verify_manifest(final, MANIFEST, "checkpoint")
        return final
    temporary = checkpoints / f"{_TEMPORARY}{progress.tokens}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, model, moments, progress, lineage, recipe_hash, tokenizer, companions)
        files.publish(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        explained = _explained(error, final)
        if explained is error:
            raise
        raise explained from error
    return final


def _explained(error: BaseException, final: Path) -> BaseException:
    """A full disk or missing rights as a UserError that names the checkpoint; other errors as they are."""
    found = error.__cause__ if isinstance(error, UserError) else error  # it names a file that is gone by now
    number = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    if number:  # safetensors has an error type of its own
        found = OSError(int(number[1]), os.strerror(int(number[1])))
    return files.explain(found, final) if isinstance(found, OSError) else error


def _write(
    folder: Path,
    model: AnyModel,
    moments: dict[str, torch.Tensor],
    progress: Progress,
    lineage: dict[str, Any],
    recipe_hash: str,
    tokenizer: TokenizerFolder,
    companions: Companions,
) -> None:
    state = folder / STATE_FOLDER
    state.mkdir(parents=True)
    save_model(
        model, folder, extra_config={"eos_token_id": tokenizer.separator_id, "bos_token_id": tokenizer.separator_id}
    )
    tokenizer.copy_to(folder)
    save_full_weights(model, model.stored_dtypes.values(), state)
    save_file(moments, state / "optimizer.safetensors")
    (state / "optimizer.safetensors").chmod(0o644)
    files.write_json(state / "state.json", {"recipe_hash": recipe_hash, **progress.to_json()})
    complete = Lineage(checkpoint=weights_id(folder), **lineage)
    files.write_json(state / LINEAGE_FILE, complete.model_dump(mode="json"))
    write_companions(companions, folder, complete)
    files.write_manifest(folder, {"format": 1}, MANIFEST)


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


def load_weights(checkpoint: Path, device: torch.device) -> AnyModel:
    """The model of a verified checkpoint, in fp32. Raises UserError for a missing or altered file."""
    verify(checkpoint)
    return load_unverified(checkpoint, device)


def load_unverified(checkpoint: Path, device: torch.device) -> AnyModel:
    """The same of a checkpoint that was verified before."""
    model = load_model(checkpoint, device=device)
    load_full_weights(model, checkpoint)
    return model


def load_progress(checkpoint: Path, recipe_hash: str) -> Progress:
    """Where the run stood. Raises UserError when the checkpoint belongs to another recipe."""
    data = files.read_json(checkpoint / STATE_FOLDER / "state.json", "checkpoint state")
    if data.pop("recipe_hash") != recipe_hash:
        raise UserError(
            f"{checkpoint}: this checkpoint was written by another recipe than the run folder's resolved.json; bring "
            "it back to the run that it belongs to."
        )
    return Progress(**data)
