"""Models that a stage reads beside the one it trains: teachers, and the parent that a pull draws to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from perennial.core import lineage as lineages
from perennial.core.errors import UserError
from perennial.core.settings import Settings
from perennial.model.foreign import AnyConfig, check_rows, flops_per_token, num_parameters

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from perennial.model.through_transformers import AnyModel

PARENT = "parent"
"""The name of the checkpoint that the run starts from."""


class OtherModel(Settings):
    """A checkpoint that a stage reads and does not train."""

    name: str
    """As the recipe names it: 'parent', or a folder."""
    path: str
    checkpoint: str
    """Its id."""
    parameters: int
    flops_per_token: int
    """Of a forward pass."""


def find_models(
    names: Iterable[str],
    *,
    read: Callable[[str], Any],
    config: AnyConfig,
    tokenizer: str,
    sequence_length: int,
    where: str,
) -> list[OtherModel]:
    """The checkpoints of these names, each once. Raises UserError for one that is not there or does not fit.

    read: a name to a `resolve.Parent`; config and tokenizer (its fingerprint): of the model that is trained.
    """
    found = {}
    for name in names:
        if name in found:
            continue
        model = read(name)
        check_rows(model.config, sequence_length, "batch.sequence_length", f" for {model.path}")
        if model.config.vocabulary_size != config.vocabulary_size or model.tokenizer != tokenizer:
            raise UserError(
                f"{where}: {model.path} has another vocabulary ({model.config.vocabulary_size:,} ids) than the model "
                f"that is trained ({config.vocabulary_size:,} ids), so that their predictions cannot be compared"
            )
        found[name] = OtherModel(
            name=name,
            path=str(model.path),
            checkpoint=model.lineage.checkpoint,
            parameters=num_parameters(model.config),
            flops_per_token=flops_per_token(model.config, sequence_length) // 3,
        )
    return list(found.values())


class OtherModels:
    """Loads such models, each once for all that reads it, and lets go of those that a stage has no use for.

    Every process holds them whole, however the model that is trained is spread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loaded: dict[str, AnyModel] = {}

    def open(self, models: Sequence[OtherModel]) -> dict[str, AnyModel]:
        """The models by the names that the recipe gives them, without gradients. Raises UserError for a changed one."""
        self._loaded = {m.path: self._loaded[m.path] for m in models if m.path in self._loaded}
        for model in models:
            if model.path not in self._loaded:
                self._loaded[model.path] = self._load(model)
        return {model.name: self._loaded[model.path] for model in models}

    def _load(self, model: OtherModel) -> AnyModel:
        from pathlib import Path

        from perennial.train.checkpoint import load_weights

        path = Path(model.path)
        if not path.is_dir():
            raise UserError(f"{path}: is no longer there, and this stage reads it ('{model.name}'); bring it back")
        _check_same(path, model)
        loaded = load_weights(path, self._device)
        loaded.requires_grad_(False)
        return loaded.eval()


def _check_same(path: Path, model: OtherModel) -> None:
    if lineages.has_lineage(path) and lineages.read(path).checkpoint != model.checkpoint:
        raise UserError(f"{path}: is no longer the checkpoint that this run was planned with ('{model.name}')")
