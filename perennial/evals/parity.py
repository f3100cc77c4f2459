"""Whether a folder's model is computed here as `transformers` computes it: the largest difference of their logits.

A mistake in a conversion (a transposed matrix, another pairing of rotary dimensions, a norm left out) changes logits by
as much as they are large; different orders of the same fp32 additions change them in the fifth or sixth digit. So the
limit is a share of the largest logit, between the two by orders of magnitude.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perennial.core.errors import UserError
from perennial.core.progress import Progress
from perennial.data.tokenizers.folder import TOKENIZER, TokenizerFolder
from perennial.model.config import ModelConfig
from perennial.model.folder_config import read_config
from perennial.model.foreign import AnyConfig, check_vocabulary, row_limit
from perennial.model.huggingface import load_model

LIMIT_SHARE = 1e-4
"""Largest accepted difference of two logits in fp32, as a share of the largest logit."""

MAX_TOKENS = 256
"""Length of the row that is compared; cost is that of one forward pass on each side."""

MAX_REACH = 1024
"""Windows up to this long are compared beyond their length; longer ones are only said not to be reached."""

SAMPLE = """\
The ferry left at 06:45, eleven minutes late, with 212 passengers and a crate of oranges nobody had ordered.
"Does it matter?" asked the harbour master's niece. It did: the price had risen by 3.5 % since Monday.
Die Br\u00fccke \u00fcber den Flu\u00df war l\u00e4ngst gesperrt; trotzdem fuhren t\u00e4glich Lastwagen \
hin\u00fcber.
L'\u00e9t\u00e9 dernier, on y r\u00e9coltait d\u00e9j\u00e0 des abricots. \u00bfQui\u00e9n lo habr\u00eda dicho? \
\u0415\u0449\u0451 \u043d\u0438\u043a\u0442\u043e \u043d\u0435 \u0437\u043d\u0430\u043b \
\u043e\u0442\u0432\u0435\u0442\u0430.
\u4eca\u65e5\u306f\u8239\u304c\u9045\u308c\u3066\u3044\u307e\u3059\u3002 \
\u0627\u0644\u0633\u0641\u064a\u0646\u0629 \u062a\u0623\u062e\u0631\u062a \u0627\u0644\u064a\u0648\u0645. \U0001f6a2

def delay(minutes: list[float], limit: float = 1e-3) -> float:
    return sum(m ** 2 for m in minutes if m > limit) / max(1, len(minutes))
"""
"""Text of several kinds and scripts, so that many rows of an embedding take part."""


def sample_ids(folder: Path, text: str = SAMPLE) -> Tensor:
    """The text as the folder's tokenizer cuts it, shape (1, T) int64; ids spread over the vocabulary without one.

    T is MAX_TOKENS, more where a window or dynamic positions begin to matter within MAX_REACH; the text is repeated to
    fill it. Raises UserError when the tokenizer has ids that the model has no row for.
    """
    config = read_config(folder).config
    length = min(
        max(MAX_TOKENS, *(reach + 32 for reach in reaches(config) if reach <= MAX_REACH), 0), row_limit(config)
    )
    if not (folder / TOKENIZER).is_file():
        return (torch.arange(length) * 7919 % config.vocabulary_size)[None]
    tokenizer = TokenizerFolder.open(folder)
    check_vocabulary(config, tokenizer.vocabulary_size, "the same folder", str(folder))
    ids = tokenizer.encoder().encode(text).ids
    if length > MAX_TOKENS:
        ids *= -(-length // len(ids))
    return torch.tensor([ids[:length]])


def reaches(config: AnyConfig) -> list[int]:
    """Row lengths up to which a part of a native model does nothing: its window, and dynamic positions' context."""
    if not isinstance(config, ModelConfig):
        return []
    scaling = config.rope_scaling
    dynamic = scaling.original_context if scaling and scaling.kind == "dynamic" else None
    return [reach for reach in (config.window, dynamic) if reach is not None]


def our_logits(folder: Path, ids: Tensor) -> Tensor:
    """Logits (T, V) in fp32 of the model as this program runs it; it is let go again."""
    model = load_model(folder).eval()
    with torch.no_grad():
        return model.logits(model(ids))[0].float()


def their_logits(folder: Path, ids: Tensor) -> Tensor:
    """Logits (T, V) in fp32 of the model as `transformers` runs it; it is let go again."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on a folder's settings are not this comparison's
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    except Exception as error:  # whatever it raises, it means that others cannot open this folder either
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: transformers cannot load this model: {reason}") from None
    with torch.no_grad():
        logits: Tensor = model(ids, use_cache=False).logits[0].float()
    del model
    gc.collect()
    return logits


def difference(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """{'max_difference', 'limit', 'tokens', 'dtype', 'same'} of two logits (T, V)."""
    found = float((ours - theirs).abs().max())
    limit = LIMIT_SHARE * max(1.0, float(theirs.abs().max()))
    # not `found > limit`, which is false for NaN
    return {"max_difference": found, "limit": limit, "tokens": len(ours), "dtype": "float32", "same": found <= limit}


def parity(folder: Path) -> dict[str, Any] | None:
    """`difference` between this program's and `transformers`' logits; None where there is nothing to compare.

    That is so for a model that runs through `transformers` anyway, and where that is not installed. The two models are
    loaded one after the other, so that memory holds one; ours first, because its errors say best what is wrong with a
    folder. Raises UserError for a folder that cannot be loaded.
    """
    ids = sample_ids(folder)
    ours = our_logits(folder, ids)
    if not isinstance(read_config(folder).config, ModelConfig) or importlib.util.find_spec("transformers") is None:
        return None
    found = difference(ours, their_logits(folder, ids))
    return {
        **found,
        "not_reached": [reach for reach in reaches(read_config(folder).config) if reach >= found["tokens"]],
    }


@functools.lru_cache(maxsize=64)
def _parity_of(folder: Path, state: tuple[tuple[str, int, int], ...]) -> dict[str, Any] | None:
    with Progress("check import", quiet=sum(size for _, size, _ in state) < 1 << 29):
        return parity(folder)


def checked_parity(folder: Path) -> dict[str, Any] | None:
    """`parity`, for the import of a model that Perennial did not write. Raises UserError where they differ.

    A folder that has not changed since is not compared again in the same process.
    """
    state = tuple(sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.glob("*.*")))
    found = _parity_of(folder.resolve(), state)
    if found is not None and not found["same"]:
        raise UserError(
            f"{folder}: the model read natively does not give the logits that transformers gives: they differ by up to "
            f"{found['max_difference']:.3g} over {found['tokens']} tokens (at most {found['limit']:.3g} is rounding). "
            "Nothing was trained. This is a mistake in Perennial's reading of this folder: please report it with the "
            "folder's config.json."
        )
    return found


def in_words(found: Mapping[str, Any] | None) -> str:
    """A `difference` for a person; None is what `parity` gives where there is nothing to compare."""
    if found is None:
        return "not compared with transformers: the model runs through it, or it is not installed"
    verdict = "within" if found["same"] else "ABOVE"
    size, tokens, limit = found["max_difference"], found["tokens"], found["limit"]
    where = f"over {tokens} tokens in {found['dtype']}"
    beyond = "".join(f"; positions beyond {reach} are not reached by this" for reach in found.get("not_reached", []))
    return f"logits differ by at most {size:.3g} {where}, {verdict} the {limit:.3g} of rounding{beyond}"
