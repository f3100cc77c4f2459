"""Training nothing but the rows that `vocab extend` added: the optimizer sees them as small parameters of their own.

The rows share their memory with the embedding (and with the head, where that has weights of its own), so a step on them
is a step on the model, and nothing else can change: the other rows have no optimizer state, no update and no weight
decay. Their moments, and those of all other parameters, are held as they were for the stage that trains them next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
"""The parameters with a row for each id, as far as a model has them."""


class NewRows:
    """Some rows of a model's tables, as parameters; everything else of the model is frozen."""

    def __init__(self, model: nn.Module, first: int, stop: int) -> None:
        """The rows of the ids from `first` to `stop` (exclusive)."""
        self._first, self._stop = first, stop
        self._tables = {name: p for name, p in model.named_parameters() if name in TABLES}
        self._rows = {name: nn.Parameter(table.detach()[first:stop]) for name, table in self._tables.items()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._tables)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The rows under the names of the tables that they are in."""
        yield from self._rows.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The rows."""
        yield from self._rows.values()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of the rows and of the tables."""
        for parameter in (*self._rows.values(), *self._tables.values()):
            parameter.grad = None

    def take_gradients(self) -> None:
        """Makes the rows' parts of the tables' gradients their own."""
        for name, table in self._tables.items():
            gradient = table.grad
            self._rows[name].grad = None if gradient is None else gradient[self._first : self._stop]

    def narrowed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of an optimizer's exported state that of the rows; what belongs to a whole table (a count) stays whole."""
        return {key: self._part(key, tensor) for key, tensor in state.items() if self._table_of(key) is not None}

    def widened(self, held: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state `held` with the rows' exported state in its place; where none is held, the other rows' is zero."""
        result = dict(held)
        for key, tensor in rows.items():
            table = self._table_of(key)
            assert table is not None
            if not self._is_by_row(tensor, self._stop - self._first):
                result[key] = tensor
                continue
            shape = (len(table), *tensor.shape[1:])
            whole = result.get(key)
            if whole is None or whole.shape != shape:
                whole = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
            result[key] = whole.clone()
            result[key][self._first : self._stop] = tensor.to(whole.device)
        return result

    def _table_of(self, key: str) -> nn.Parameter | None:
        return self._tables.get(key.rpartition(".")[0])

    def _part(self, key: str, tensor: Tensor) -> Tensor:
        table = self._table_of(key)
        assert table is not None
        return tensor[self._first : self._stop] if self._is_by_row(tensor, len(table)) else tensor

    @staticmethod
    def _is_by_row(tensor: Tensor, rows: int) -> bool:
        return tensor.ndim > 0 and tensor.shape[0] == rows
