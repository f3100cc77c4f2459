"""What an objective is: sums over the counted tokens of a batch, divided once by the caller.

A model is called as `model(inputs, segments)` and returns its last hidden states (B, T, D); `model.head_weight` is the
(V, D) tensor that turns them into logits. Where logits are made in another way (capped, scaled, with a bias),
`head_weight` is None and the call returns the logits (B, T, V) themselves. A batch has `inputs` and `targets` (B, T)
int64 and `segments` (B, T) int32, or None.

An objective may ask for further models (`checkpoints`), which it is given as `with_models`; and it may lay out the rows
that it is trained on in its own way (`arrangement`), which the loader does beside training, so that the count of
targets is known before the loss is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from perennial.core.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from perennial.data.corpus import Corpus
    from perennial.data.loader import Arrangement
    from perennial.data.replay import SourceSpec
    from perennial.data.tokenizers.folder import TokenizerFolder

    class LanguageModel(Protocol):
        """The part of a model that an objective uses."""

        @property
        def head_weight(self) -> torch.Tensor | None:
            """(V, D): logits = hidden @ head_weight.T. None: the call returns logits."""

        def __call__(self, inputs: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
            """Token ids (B, T), and which document each belongs to, to hidden states (B, T, D) or logits (B, T, V)."""

    class TensorBatch(Protocol):
        """Token ids in and out; targets of IGNORED are not counted."""

        @property
        def inputs(self) -> torch.Tensor:
            """(B, T) int64."""

        @property
        def targets(self) -> torch.Tensor:
            """(B, T) int64."""

        @property
        def segments(self) -> torch.Tensor | None:
            """(B, T) document numbers, or None when attention may cross documents."""

        @property
        def source(self) -> NDArray[np.int64] | None:
            """(B,), on the host: index of each row's source in the stage's mixture; None where it is not known."""


IGNORED = -100
"""The target id of a position that is not trained on."""


@dataclass(frozen=True)
class LossSum:
    """Sums over a batch's counted tokens, each a scalar tensor, so that nothing waits for the device."""

    total: torch.Tensor
    """What to differentiate: nats plus whatever the objective adds."""
    nats: torch.Tensor
    """The loss to report, detached: -ln p(target), nothing added."""
    count: torch.Tensor
    """How many tokens were counted, int64."""


@dataclass(frozen=True)
class StageData:
    """The rows of a stage, as far as an objective that lays them out in its own way has to know them."""

    seed: int
    """Of this objective in this stage: whatever it draws depends on it and on the number of the row, nothing else."""
    sequence_length: int
    """Tokens of a row."""
    document_mask: bool
    """Whether attention stays within a document."""
    quiet: bool
    """Whether work that takes long says nothing of it."""
    corpora: tuple[Corpus, ...]
    """The corpus of each source of the mixture, in its order."""
    sources: tuple[SourceSpec, ...] = ()
    """The sources of the mixture."""

    def tokenizer(self) -> TokenizerFolder:
        """The tokenizer that the corpora were cut by; where it was extended in between, the newest."""
        from perennial.data.tokenizers.folder import TokenizerFolder

        newest = max(self.corpora, key=lambda corpus: corpus.vocabulary_size)
        return TokenizerFolder.open(newest.path / "tokenizer")


class Objective(Settings, ABC):
    """Settings of a loss, and its sums for a model and a batch."""

    EXAMPLES: ClassVar[list[dict[str, Any]]]
    FOLDERS: ClassVar[tuple[str, ...]] = ()
    """Settings that may hold lists of folders, which are moved with the recipe that names them."""

    @abstractmethod
    def loss(self, model: LanguageModel, batch: TensorBatch) -> LossSum:
        """The sums to train on; `total` has gradients."""

    @abstractmethod
    def evaluate(self, model: LanguageModel, batch: TensorBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of nats, count) without gradients."""

    def checkpoints(self) -> list[str]:
        """Further models that it needs: 'parent', or checkpoint folders as the recipe names them."""
        return []

    def with_models(self, models: Sequence[LanguageModel]) -> Self:
        """The same with the models of `checkpoints`, in that order; they are not trained."""
        assert not models
        return self

    def share_read(self, stage: StageData) -> float:
        """The share of the rows that the models of `checkpoints` read, for the FLOPs."""
        return 1.0

    def on_stage(self, stage: StageData) -> Self:
        """The same, knowing the rows that it will be given."""
        return self

    def check(self, stage: StageData) -> None:
        """Raises UserError when it cannot be used on such rows; cheap, and before anything runs."""

    def arrangement(self, stage: StageData) -> Arrangement | None:
        """What makes the rows that it is trained on of those that were read; None: they are taken as they are."""
        return None
