"""The weights of a checkpoint by the names of its parameters, read from its files one at a time.

What is computed weight by weight from several models then holds one tensor of each, not all models at once.
Limits: models through `transformers`, and families whose files join or transpose parameters (GPT-2's, say), are held
whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from perennial.core import plugins
from perennial.core.lineage import STATE_FOLDER
from perennial.model.config import ModelConfig
from perennial.model.folder_config import load_config
from perennial.model.storage import StoredTensors
from perennial.surgery.average import Weights
from perennial.train.checkpoint import load_unverified, verify
from perennial.train.full_weights import FOLDER


@dataclass(frozen=True)
class _InFiles(Mapping[str, Tensor]):
    """Tensors that lie in files under these names, given in fp32."""

    stored: StoredTensors
    names: Mapping[str, str]
    """Parameter: its tensor in the files."""

    def __getitem__(self, name: str) -> Tensor:
        return self.stored.read(self.names[name], dtype=torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def stored_weights(checkpoint: Path) -> Weights:
    """The checkpoint's weights as training left them. Raises UserError for a damaged or altered file."""
    verify(checkpoint)
    full = checkpoint / STATE_FOLDER / FOLDER
    if full.is_dir():
        stored = StoredTensors.open(full)
        return _InFiles(stored, {name: name for name in stored.names})
    return _as_they_lie(checkpoint) or _loaded(checkpoint)


def _as_they_lie(checkpoint: Path) -> Weights | None:
    """None unless every parameter is a tensor of its own in the files."""
    config = load_config(checkpoint)
    if not isinstance(config, ModelConfig):
        return None
    family, stored = plugins.load("families", config.family)(), StoredTensors.open(checkpoint)
    spelled = {family.spelled(name): name for name in stored.names}
    wanted = family.tensors(config)
    if any(one.join != "none" or one.is_transposed or one.name not in spelled for one in wanted):
        return None
    return _InFiles(stored, {one.parts[0]: spelled[one.name] for one in wanted})


def _loaded(checkpoint: Path) -> Weights:
    model = load_unverified(checkpoint, torch.device("cpu"))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
