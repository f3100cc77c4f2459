"""Two model folders side by side: their weights, their tokenizers, and their logits on real text."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from perennial.core import plugins
from perennial.core.environment import tune_process
from perennial.core.progress import Progress
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.evals import parity
from perennial.model.config import ModelConfig
from perennial.model.folder_config import read_config
from perennial.model.storage import StoredTensors

_EXAMPLES = 5
"""How many names a list in the result shows; the counts say how many there are."""


def verify(
    first: Path, second: Path | None = None, *, text: str = parity.SAMPLE, quiet: bool = False
) -> dict[str, Any]:
    """Compares two folders, or one with itself: {'folders', 'weights', 'tokenizer', 'logits', 'native', 'same'}.

    weights: tensors by their stored names and bytes. tokenizer: the ids of `text`, and whether they decode to it.
    logits: of both models on the first tokens of `text`, run by `transformers` where it is installed. native: for each
    folder, native code against `transformers` on the built-in text. 'same' is whether all agree: weights and ids
    exactly, logits within rounding.
    """
    tune_process()
    folders = (first, second or first)
    result: dict[str, Any] = {"folders": [str(folder) for folder in folders]}
    with Progress("verify", unit="steps", total=4, quiet=quiet) as line:
        result["weights"] = compare_weights(*folders) if second else None
        line.update(1)
        result["tokenizer"] = compare_tokenizers(*folders, text)
        line.update(2)
        result["logits"] = _compare_logits(*folders, text) if second else None
        line.update(3)
        result["native"] = [parity.parity(folder) for folder in dict.fromkeys(folders)]
    parts = [result["weights"], result["tokenizer"], result["logits"], *result["native"]]
    result["same"] = all(part["same"] for part in parts if part is not None)
    return result


def compare_weights(first: Path, second: Path) -> dict[str, Any]:
    """Counts of tensors that are the same byte for byte, differ, or are only in one folder; and the largest difference.

    One tensor of each folder is held at a time. Raises UserError for weights that are missing, damaged or not finite.
    """
    one, other = StoredTensors.open(first), StoredTensors.open(second)
    common = [name for name in one.names if name in set(other.names)]
    differing: dict[str, float | None] = {}
    for name in common:
        a, b = one.read_unchecked(name), other.read_unchecked(name)
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            differing[name] = float((a.double() - b.double()).abs().max()) if a.shape == b.shape else None
    unmatched = (set(one.names) ^ set(other.names)) - _derived(first, one.names) - _derived(second, other.names)
    sizes = {name: math.inf if size is None else size for name, size in differing.items()}
    worst = sorted(sizes, key=lambda name: -sizes[name])
    return {
        "same": not differing and not unmatched,
        "identical": len(common) - len(differing),
        "different": len(differing),
        "only_in_first": sorted(unmatched & set(one.names))[:_EXAMPLES],
        "only_in_second": sorted(unmatched & set(other.names))[:_EXAMPLES],
        "unmatched": len(unmatched),
        "max_difference": max((size for size in sizes.values() if size < math.inf), default=0.0),
        "most_different": [
            {
                "name": name,
                "max_difference": differing[name],
                "shapes": [one.shape(name), other.shape(name)],
                "dtypes": [str(files.dtype(name)).removeprefix("torch.") for files in (one, other)],
            }
            for name in worst[:_EXAMPLES]
        ],
    }


def _derived(folder: Path, names: Iterable[str]) -> set[str]:
    """The tensors of a native model that follow from its configuration, as old folders store them."""
    config = read_config(folder).config
    if not isinstance(config, ModelConfig):
        return set()
    derived = plugins.load("families", config.family).derived
    return {name for name in names if re.fullmatch(derived, name)}


def compare_tokenizers(first: Path, second: Path, text: str) -> dict[str, Any]:
    """Whether both cut the text into the same ids, and whether each decodes its ids to the text again."""
    folders = [TokenizerFolder.open(folder) for folder in (first, second)]
    tokenizers = [folder.encoder() for folder in folders]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for tokenizer in tokenizers]
    back = [tokenizer.decode(cut) == text for tokenizer, cut in zip(tokenizers, ids, strict=True)]
    return {
        "same": ids[0] == ids[1],
        "same_definition": folders[0].fingerprint == folders[1].fingerprint,
        "tokens": [len(cut) for cut in ids],
        "vocabulary_size": [folder.vocabulary_size for folder in folders],
        "decodes_to_the_text": back,
    }


def _compare_logits(first: Path, second: Path, text: str) -> dict[str, Any]:
    """The logits of both on the first folder's ids; with vocabularies of two sizes, of the ids that both have."""
    run = parity.their_logits if importlib.util.find_spec("transformers") else parity.our_logits
    ids = parity.sample_ids(first, text)
    one = run(first, ids)
    other = run(second, ids)
    shared = min(one.shape[1], other.shape[1])
    found = parity.difference(one[:, :shared], other[:, :shared])
    return {**found, "by": "transformers" if run is parity.their_logits else "perennial", "vocabulary": shared}


def to_text(result: dict[str, Any]) -> str:
    """The result in lines for a person."""
    lines = []
    weights, tokenizer, logits = result["weights"], result["tokenizer"], result["logits"]
    if weights:
        lines.append(
            f"weights    {weights['identical']} tensors identical, {weights['different']} different, "
            f"{weights['unmatched']} only in one folder; largest difference {weights['max_difference']:.3g}"
        )
        for one in weights["most_different"]:
            size = "other shape" if one["max_difference"] is None else f"{one['max_difference']:.3g}"
            kinds = "" if len(set(one["dtypes"])) == 1 else f", {' and '.join(one['dtypes'])}"
            lines.append(f"           {one['name']}: {size}{kinds}")
        for place, names in (("first", weights["only_in_first"]), ("second", weights["only_in_second"])):
            lines += [f"           only in the {place}: {', '.join(names)}"] if names else []
    cut = " and ".join(str(count) for count in dict.fromkeys(tokenizer["tokens"]))
    agree = "the same ids" if tokenizer["same"] else "other ids"
    back = ["decodes" if is_back else "DOES NOT decode" for is_back in tokenizer["decodes_to_the_text"]]
    both = f"{agree}; " if weights else ""
    lines.append(f"tokenizer  {cut} tokens, {both}{' / '.join(dict.fromkeys(back))} to the text again")
    if logits:
        lines.append(f"logits     {parity.in_words(logits)}, run by {logits['by']}")
    for folder, found in zip(dict.fromkeys(result["folders"]), result["native"], strict=True):
        lines.append(f"native     {folder}: {parity.in_words(found)}")
    lines.append("same" if result["same"] else "DIFFERENT")
    return "\n".join(lines)
