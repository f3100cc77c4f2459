"""The part of a text that a model finds likeliest, or neither likely nor unlikely. Behind `perennial select`.

Formula: documents are put in order by their mean loss in nats per token under the checkpoint; the lowest, the middle or
    the highest are kept until they hold the share of tokens that was asked for.
Source: Guo et al. 2024, "Efficient Continual Pre-training by Mitigating the Stability Gap", arXiv 2406.14833, section
    4 (the part of lowest perplexity). Differs: they rank by a small n-gram model of reference text of the domain; here
    it is the model that will be trained, so that low means near to what it knows.
Limits: repetitive text is likely too; deduplicate before.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from perennial.core import files
from perennial.core import lineage as lineages
from perennial.core.amounts import Amount, human, parse
from perennial.core.environment import tune_process
from perennial.core.errors import UserError
from perennial.core.progress import Progress
from perennial.data.corpus import Corpus
from perennial.data.documents import Fields, is_blank
from perennial.data.sources import AUTO, AnyReader, documents, survey
from perennial.data.tokenizers.extend import decoded
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.data.tokenizers.vocabulary import Cutter
from perennial.model.foreign import check_vocabulary, row_limit
from perennial.train.checkpoint import load_weights
from perennial.train.document_loss import document_losses
from perennial.train.given_data import is_prepared
from perennial.train.measuring import open_for
from perennial.train.origin import MAX_ROW_TOKENS
from perennial.train.precision import autocast, native_precision

Which = Literal["lowest", "middle", "highest"]

_LEAST_DOCUMENTS = 8
"""Documents that a part has at least, so that some can be held out of it."""
_FEWEST_DRAWN = 256
"""Documents that are drawn at least (or all), however long they are, so that there is something to choose from."""


@dataclass(frozen=True)
class Kept:
    """A document, and what of it the model did not expect."""

    id: str
    text: str
    metadata: Mapping[str, Any]


def select(
    source: Path,
    by: Path,
    out: Path,
    *,
    keep: str = "20%",
    of: str | None = None,
    which: Which = "lowest",
    text_field: str = "text",
    reader: AnyReader = AUTO,
    sequence_length: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes the kept documents of a text or prepared corpus (its training part) to `out`, .jsonl with their losses.

    by: the checkpoint, or run folder, whose losses decide; keep: a share of the tokens, or '5M tokens'; of: how much of
    a prepared corpus to choose from, a share or tokens, whole documents drawn at random (None: all of it). Returns
    {'out', 'documents', 'kept', 'tokens', 'kept_tokens', 'nats_per_token', 'kept_nats_per_token', 'highest'}.
    """
    tune_process()
    amount = _amount(keep)
    if which not in ("lowest", "middle", "highest"):
        raise UserError(f"--which {which!r}: choose lowest, middle or highest")
    if out.exists() or out.suffix != ".jsonl":
        why = "exists already; give another name, or delete it" if out.exists() else "its name must end in .jsonl"
        raise UserError(f"--out {out}: {why}")
    if of is not None and source.exists() and not is_prepared(source):
        raise UserError(f"--of {of}: belongs to a prepared corpus, and {source} is raw text")
    drawn = None if of is None else _drawn(source, _amount(of, "--of"))
    text = _Text(source, text_field, reader, drawn)
    losses, sizes = _losses(text, lineages.newest_checkpoint(by), sequence_length, quiet)
    means = losses / np.maximum(1, sizes)
    chosen = choose(means, sizes, amount.of(float(sizes.sum())), which)
    _write(out, text.documents(), chosen, means, sizes)
    return {
        "out": str(out),
        "documents": len(sizes),
        "kept": int(chosen.sum()),
        "tokens": int(sizes.sum()),
        "kept_tokens": int(sizes[chosen].sum()),
        "nats_per_token": float(losses.sum() / sizes.sum()),
        "kept_nats_per_token": float(losses[chosen].sum() / sizes[chosen].sum()),
        "highest": float(means[chosen].max()),
    }


def divide(source: Path, by: Path, outs: Sequence[Path], *, of: float | None = None, quiet: bool = False) -> None:
    """Writes a prepared corpus (its training part) to `outs` in parts equal in tokens, the likeliest documents first.

    by: the checkpoint whose losses decide; `outs` are .jsonl files as `select` writes them, and what is there is
    replaced; of: tokens of documents drawn at random that are divided instead of all. Raises UserError for a corpus
    with too few documents.
    """
    tune_process()
    text = _Text(source, "text", AUTO, None if of is None else _drawn(source, Amount(of, "tokens")))
    losses, sizes = _losses(text, by, None, quiet)
    means = losses / np.maximum(1, sizes)
    places = parts(means, sizes, len(outs))
    fewest = int(np.bincount(places, minlength=len(outs)).min())
    if fewest < _LEAST_DOCUMENTS:
        raise UserError(
            f"{source}: {len(sizes)} documents are too few for {len(outs)} parts equal in tokens: one has {fewest}, "
            f"and {_LEAST_DOCUMENTS} are needed; take fewer parts, or more text"
        )
    for number, out in enumerate(outs):
        _write(out, text.documents(), places == number, means, sizes)


def parts(means: NDArray[np.float64], sizes: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """The part that each document falls into, of `number` that are about equal in tokens: 0 has the lowest means."""
    order = np.argsort(means, kind="stable")
    middles = np.cumsum(sizes[order]) - sizes[order] / 2
    result = np.empty(len(sizes), np.int64)
    result[order] = np.minimum(number - 1, number * middles / max(1, sizes.sum())).astype(np.int64)
    return result


def _drawn(source: Path, amount: Amount) -> NDArray[np.bool_]:
    """Documents of a prepared corpus drawn at random, the same ones each time, that hold at least so many tokens."""
    ends = Corpus.open(source).train.document_ends().astype(np.int64)
    sizes = np.diff(ends, prepend=0)
    order = np.random.default_rng(0).permutation(len(sizes))
    before = np.cumsum(sizes[order]) - sizes[order]
    drawn = np.zeros(len(sizes), bool)
    drawn[order[before < amount.of(float(sizes.sum()))]] = True
    drawn[order[:_FEWEST_DRAWN]] = True
    return drawn


@dataclass(frozen=True)
class _Text:
    """What is chosen from: a prepared corpus (its training part), or raw text."""

    source: Path
    field: str
    reader: AnyReader
    drawn: NDArray[np.bool_] | None = None
    """The documents of a prepared corpus that count; None: all."""

    def documents(self) -> Iterator[tuple[Kept, float]]:
        """The documents, in order, each with the share that has been read."""
        if is_prepared(self.source):
            corpus = Corpus.open(self.source)
            found = zip(decoded(corpus, corpus.train), corpus.train.documents(), strict=True)
            for number, ((text, share), facts) in enumerate(found):
                if self.drawn is None or self.drawn[number]:
                    yield Kept(str(facts.get("id", "")), text, facts.get("metadata", {})), share
            return
        inputs = survey([self.source], self.reader)
        total = sum(one.num_bytes for one in inputs)
        for document, place in documents(inputs, Fields(self.field)):
            if not is_blank(document.text):
                share = (place.done_bytes + place.position.consumed) / max(1, total)
                yield Kept(document.id, document.text, document.metadata), min(1.0, share)

    def size(self) -> tuple[float, str]:
        """How much there is to read, and in what unit."""
        if not is_prepared(self.source):
            return float(sum(one.num_bytes for one in survey([self.source], self.reader))), "bytes"
        sizes = np.diff(Corpus.open(self.source).train.document_ends().astype(np.int64), prepend=0)
        return float(sizes.sum() if self.drawn is None else sizes[self.drawn].sum()), "tokens"


def _losses(
    text: _Text, checkpoint: Path, sequence_length: int | None, quiet: bool
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(nats, tokens) of every document under a checkpoint, in their order. Raises UserError when there is none."""
    if is_prepared(text.source):
        open_for(checkpoint, {"corpus": text.source})
    elif not text.source.exists():
        raise UserError(f"{text.source}: no such file or folder")
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    model = load_weights(checkpoint, device).eval()
    tokenizer = TokenizerFolder.open(checkpoint)
    check_vocabulary(model.config, tokenizer.vocabulary_size, "the same folder", str(checkpoint))
    length = sequence_length or _row_length(checkpoint, model.config, device)
    nats: list[float] = []
    counts: list[int] = []
    size, unit = text.size()
    with Progress("select", total=size, unit=unit, quiet=quiet) as line, autocast(native_precision(device), device):
        ids = _ids(text, checkpoint, line, size)
        for loss, count in document_losses(
            model, ids, length=length, separator_id=tokenizer.separator_id, device=device
        ):
            nats.append(loss)
            counts.append(count)
    if not counts:
        raise UserError(f"{text.source}: has no documents to choose from")
    return np.array(nats), np.array(counts)


def choose(
    means: NDArray[np.float64], sizes: NDArray[np.int64], tokens: float, which: Which = "lowest"
) -> NDArray[np.bool_]:
    """Which documents to keep for about so many tokens: by mean loss from one end, or outwards from the middle."""
    order = np.argsort(means, kind="stable")
    if which == "highest":
        order = order[::-1]
    elif which == "middle":
        places = (np.cumsum(sizes[order]) - sizes[order] / 2) / max(1, sizes.sum())
        order = order[np.argsort(np.abs(places - 0.5), kind="stable")]
    before = np.cumsum(sizes[order]) - sizes[order]
    kept = np.zeros(len(sizes), bool)
    kept[order[before + sizes[order] / 2 <= tokens]] = True
    kept[order[0]] = True
    return kept


def _amount(text: str, option: str = "--keep") -> Amount:
    try:
        amount = parse(text, ("share", "tokens"))
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None
    if amount.value == 0 or (amount.unit == "share" and amount.value > 1):
        raise UserError(f"{option} {text}: must be above 0 and at most 100%")
    return amount


def _row_length(checkpoint: Path, config: Any, device: torch.device) -> int:
    """The rows that the checkpoint was last trained with, or as long as its continuation would take."""
    stages = lineages.read(checkpoint).stages if lineages.has_lineage(checkpoint) else []
    return stages[-1].sequence_length if stages else min(row_limit(config), MAX_ROW_TOKENS[device.type])


def _ids(text: _Text, checkpoint: Path, line: Progress, size: float) -> Iterator[Any]:
    """The ids of each document."""
    cutter = Cutter.of(checkpoint)
    for document, share in text.documents():
        line.update(share * size)
        yield np.array(cutter.tokenizer.encode(document.text, add_special_tokens=False).ids, np.int64)


def _write(
    out: Path,
    found: Iterator[tuple[Kept, float]],
    chosen: NDArray[np.bool_],
    means: NDArray[np.float64],
    sizes: NDArray[np.int64],
) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            for number, (document, _) in enumerate(found):
                if chosen[number]:
                    row = {"id": document.id, "text": document.text, **document.metadata}
                    row |= {"nats_per_token": round(float(means[number]), 5)}
                    row |= {"bits_per_byte": _bits(means[number] * sizes[number], document.text)}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        files.sync(temporary)
        os.replace(temporary, out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise files.explain(error, out) from error


def _bits(nats: float, text: str) -> float:
    return round(float(nats) / math.log(2) / max(1, len(text.encode())), 5)


def to_text(result: Mapping[str, Any]) -> str:
    """What was kept, for a person."""
    return (
        f"{result['out']}: {result['kept']} of {result['documents']} documents, "
        f"{human(result['kept_tokens'], 'tokens')} of {human(result['tokens'])}\n"
        f"loss {result['kept_nats_per_token']:.4f} nats per token on what is kept, "
        f"{result['nats_per_token']:.4f} on all; the highest of a kept document is {result['highest']:.4f}"
    )
