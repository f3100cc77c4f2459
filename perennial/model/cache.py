"""Keys and values of the tokens read so far, so that generating one more reads only that one."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values, shape (B, T, G, K); room for all positions is taken at the first call."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values up to and with these new ones (B, T, G, K), which are kept."""
        if self._keys is None or self._values is None:
            shape = (keys.shape[0], self.capacity, *keys.shape[2:])
            self._keys, self._values = keys.new_empty(shape), values.new_empty(shape)
        stop = self.length + keys.shape[1]
        self._keys[:, self.length : stop] = keys
        self._values[:, self.length : stop] = values
        self.length = stop
        return self._keys[:, :stop], self._values[:, :stop]


class KeyValueCache:
    """The caches of all layers; only for inference, because it is written in place."""

    def __init__(self, layers: int, capacity: int) -> None:
        assert not torch.is_grad_enabled(), "a cache is for inference"
        self.layers = [LayerCache(capacity) for _ in range(layers)]

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[-1].length
