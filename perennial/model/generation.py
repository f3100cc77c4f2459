"""Text from a model, one token at a time, each read once: greedy, or drawn at a temperature from the likeliest tokens.

With p_v the probabilities after division of the logits by the temperature, a token is drawn from the smallest set of
likeliest tokens whose probabilities add up to at least `top_p`.
Source: Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, arXiv 1904.09751, section 3.1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perennial.core.errors import UserError
from perennial.core.files import read_json
from perennial.core.seeds import derive
from perennial.model.cache import KeyValueCache
from perennial.model.folder_config import CONFIG, GENERATION_CONFIG
from perennial.model.transformer import Transformer

if TYPE_CHECKING:
    from perennial.model.through_transformers import TransformersModel


def generate(
    model: Transformer | TransformersModel,
    prompt: list[int],
    *,
    tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Up to `tokens` ids that follow `prompt`; ends early before an id in `stop` or at the context's end.

    temperature 0 always takes the likeliest token. The same seed draws the same tokens on a device, whatever else drew.
    Raises UserError for settings out of range and for a prompt that leaves no room.
    """
    _check(model, prompt, tokens, temperature, top_p)
    context = model.config.context
    room = tokens if context is None else min(tokens, context - len(prompt))
    device = model.head_weight.device if model.head_weight is not None else next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(derive(seed, "generate"))
    read = _Reader(model, len(prompt) + room)
    ids = torch.tensor([prompt], device=device)
    for _ in range(room):
        with torch.no_grad():
            logits = read(ids)
        chosen = _choose(logits.float(), temperature, top_p, generator)
        if chosen in stop:
            return
        yield chosen
        ids = torch.tensor([[chosen]], device=device)


class _Reader:
    """Reads tokens after those that it has read before; calling it gives the logits (V,) that follow the last."""

    def __init__(self, model: Transformer | TransformersModel, capacity: int) -> None:
        self.model = model
        self.seen: Tensor | None = None
        with torch.no_grad():
            layers = model.config.layers
            self.cache = KeyValueCache(layers, capacity) if isinstance(model, Transformer) else None

    def __call__(self, ids: Tensor) -> Tensor:
        if isinstance(self.model, Transformer):
            hidden = self.model(ids, cache=self.cache)
        else:  # every architecture caches in its own way, and some not at all; reading all again is right for each
            self.seen = ids if self.seen is None else torch.cat((self.seen, ids), dim=1)
            hidden = self.model(self.seen)
        logits: Tensor = self.model.logits(hidden[:, -1:])[0, 0]
        return logits


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    shares, order = torch.softmax(logits / temperature, dim=-1).sort(descending=True, stable=True)
    before = shares.cumsum(-1) - shares
    kept = shares * (before < top_p)  # the likeliest is always kept: nothing comes before it
    return int(order[torch.multinomial(kept, 1, generator=generator)])


def _check(
    model: Transformer | TransformersModel, prompt: list[int], tokens: int, temperature: float, top_p: float
) -> None:
    if tokens < 1:
        raise UserError(f"tokens {tokens}: at least 1 is needed")
    if not 0 <= temperature <= 100:
        raise UserError(f"temperature {temperature}: must be between 0 (always the likeliest token) and 100")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p}: must be above 0 and at most 1 (all tokens)")
    if not prompt:
        raise UserError("the prompt has no tokens; give at least the one that begins a document")
    context = model.config.context
    if context is not None and len(prompt) >= context:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model's context is {context}: no room for more")


def stop_ids(folder: Path) -> set[int]:
    """The ids that end a text, as generation_config.json says, or else config.json. Raises UserError."""
    for name in _CONFIGS:
        found = _content(folder / name).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if found is not None:
            if not all(isinstance(one, int) for one in ids):
                raise UserError(f"{folder / name}: eos_token_id {found!r} must be an id or a list of ids")
            return set(ids)
    return set()


def settings_not_applied(folder: Path) -> dict[str, Any]:
    """Settings of generation_config.json that change which tokens `transformers` takes and are not applied here."""
    content = _content(folder / _CONFIGS[0])
    return {key: content[key] for key, idle in _OTHER_SETTINGS.items() if content.get(key) not in (None, idle)}


def _content(path: Path) -> dict[str, Any]:
    content = read_json(path, "configuration") if path.is_file() else {}
    return content if isinstance(content, dict) else {}


_CONFIGS = (GENERATION_CONFIG, CONFIG)
_OTHER_SETTINGS: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id")),
    **dict.fromkeys(("min_length", "min_new_tokens"), 0),
}
"""Setting, and the value with which it does nothing."""
