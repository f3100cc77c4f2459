"""The fp32 weights of a checkpoint whose folder stores shorter numbers.

Training computes on fp32 weights; a folder that came in bf16 or fp16 is written back in that. Rounding the weights at
every save would lose most small updates, and a resumed run would not be the run that was stopped. So such a checkpoint
also holds the weights as training left them, in `perennial/weights/`, and going on starts from those.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from perennial.core.errors import UserError
from perennial.core.lineage import STATE_FOLDER
from perennial.model.huggingface import FolderContent
from perennial.model.placement import assign, gathered, is_spread
from perennial.model.storage import StoredTensors, some

FOLDER = "weights"


def full_content(model: nn.Module, stored: Iterable[torch.dtype]) -> FolderContent | None:
    """All parameters as they are, if one of the types `stored` beside them is shorter than theirs."""
    parameters = dict(model.named_parameters())
    full = next(iter(parameters.values())).dtype
    if not any(dtype.is_floating_point and dtype.itemsize < full.itemsize for dtype in stored):
        return None
    wanted = {name: (list(parameter.shape), parameter.dtype) for name, parameter in parameters.items()}
    return FolderContent(wanted, lambda name: gathered(parameters[name]), {})


def save_full_weights(model: nn.Module, stored: Iterable[torch.dtype], state: Path) -> None:
    """Writes them into `state`/weights, if there is need to."""
    content = full_content(model, stored)
    if content is not None:
        content.write(state / FOLDER)


def load_full_weights(model: nn.Module, checkpoint: Path) -> None:
    """Replaces the parameters by those that the checkpoint holds in full length, if it does. Raises UserError."""
    folder = checkpoint / STATE_FOLDER / FOLDER
    if not folder.is_dir():
        return
    stored, parameters = StoredTensors.open(folder), dict(model.named_parameters())
    if odd := set(stored.names) ^ parameters.keys():
        raise UserError(f"{folder}: is not of the model beside it: {some(odd)} is only in one of the two")
    for name in stored.names:
        parameter = parameters[name]
        if is_spread(parameter):
            assign(parameter, stored.read(name, shape=list(parameter.shape)))
        else:
            stored.read_into(name, parameter.data)
