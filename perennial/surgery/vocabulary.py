"""Rows for new tokens: a model's tables (embedding, and head where it has weights of its own) grown and filled.

Every other weight, and every row of a token that was there, stays as it is to the bit. Rows that the tables have
beyond the tokenizer's ids (padding) are used first; the number of rows stays a multiple of what it was one of. What a
new row starts as:

mean        the mean of the rows of the token's pieces, in each table.
            Source: Gee et al. 2022, Fast Vocabulary Transfer for Language Model Compression (EMNLP, industry track).
position    pieces weighted by position: doubling towards the last one in the embedding, because what follows a token
            depends most on its end, and towards the first one in the head, because a token is predicted where its
            first piece would be. In a table that is both, the mean of the two.
            Source: Nakash et al. 2025, AdaptiVocab (arXiv 2503.19693), exponential initialisation, with the factor of
            two of the code published with it. Differs: the shared table, which they do not treat.
contexts    from the contexts in which the pieces occurred. The model, still with the old cut, reads text with the new
            token in it; its hidden states are pooled over pieces and contexts into one vector per token.
            Source: Pavlova and Makhlouf 2023, BIOptimus: Pre-training an Optimal Biomedical Language Model with
            Curriculum Learning for Named Entity Recognition (BioNLP, arXiv 2308.08625), contextualized weight
            distillation: a new row of BERT is the mean, over up to some tens of sentences, of the mean of the pieces'
            hidden states, as Bommasani et al. 2020 (ACL, section 3) make static vectors.
            Differs: written for BERT, whose one table is read by a bidirectional encoder. In a decoder, (a) a row of an
            embedding of its own is the pooled state of the pieces after half of the layers, scaled to the mean norm of
            the present rows, as hidden states are tens of times longer than rows; (b) a row of a head (or of a table
            that is both) has to score the states in which the token comes next, so the states before its first piece
            are pooled and mapped to a row by the linear map that does this best for the tokens that have rows (Khodak
            et al. 2018, A La Carte Embedding, arXiv 1805.05388, section 3); half of the row is this, half the mean of
            the pieces, which knows what contexts do not. The paper does not need (b), and the layer that it reads is
            not stated where we could read it. A token without a context gets the mean of its pieces.
zero_mean   normal numbers of mean zero with the standard deviation of the present rows: the control.

Padding rows that no token has are filled as zero_mean does.
Limits: native models only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perennial.core.errors import UserError, nearest
from perennial.core.seeds import derive
from perennial.data.tokenizers.extend import Extension, NewToken
from perennial.data.tokenizers.vocabulary import Cutter, Vocabulary, widths
from perennial.model.transformer import Transformer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INITS = ("mean", "position", "contexts", "zero_mean")

_MAX_PADDING = 512
"""No kernel asks for more; a table of 2^16 rows was not padded to that on purpose."""
_CONTEXTS_PER_TOKEN = 10
_CONTEXT_TOKENS = 256
"""Length of the rows that contexts are read in; the model's context where that is shorter."""
_ROWS_AT_ONCE = 16
_RIDGE = 0.3
"""Share of the mean variance that is added to each, so that few examples do not make a wild map."""
_COUNT_LIMIT = 50
"""Occurrences from which on the contexts of a present token count no more for the map."""


# Sizes


def padding_multiple(rows: int) -> int:
    """The largest power of two, up to 512, that divides the number of rows."""
    return min(rows & -rows, _MAX_PADDING)


def padded_rows(present: int, ids: int, pad_to: int | None = None) -> tuple[int, int]:
    """(rows, multiple) of a table for this many ids: not fewer than there are, a multiple of `pad_to` or as now."""
    if pad_to is not None and pad_to < 1:
        raise UserError(f"--pad-to {pad_to}: at least 1 is needed")
    multiple = pad_to or padding_multiple(present)
    return (present if ids <= present and pad_to is None else -(-max(present, ids) // multiple) * multiple), multiple


def check_init(name: str) -> None:
    """Raises UserError, with the nearest name, when there is no such way to fill new rows."""
    if name not in INITS:
        raise UserError(f"--init {name!r}: choose {', '.join(INITS)}.{nearest(name, INITS)}")


# The model


@torch.no_grad()
def with_new_rows(
    model: Transformer,
    tokens: Sequence[NewToken],
    *,
    rows: int,
    init: str,
    seed: int = 0,
    contexts: Sequence[Context] = (),
    progress: Callable[[float, float, str], None] | None = None,
) -> Transformer:
    """The model with `rows` rows in its tables, those of the new tokens filled by `init`; it shares all other weights.

    contexts: what `find_contexts` gives, for init 'contexts'.
    """
    check_init(init)
    tables = {name: parameter.detach() for name, parameter in model.named_parameters() if name in (EMBEDDING, HEAD)}
    first = tokens[0].id
    present = {name: table[:first] for name, table in tables.items()}
    filled = _fill(init, model, present, tokens, contexts, seed, progress)
    grown = {}
    for name, table in tables.items():
        whole = _drawn(present[name], rows, derive(seed, "vocabulary padding", name))
        whole[: len(table)] = table
        whole[first : first + len(tokens)] = filled[name]
        grown[name] = whole
    return _replaced(model, rows, grown)


def _replaced(model: Transformer, rows: int, tables: Mapping[str, Tensor]) -> Transformer:
    config = type(model.config).model_validate({**model.config.model_dump(), "vocabulary_size": rows})
    result = Transformer(config, device="meta", dtype=tables[EMBEDDING].dtype)
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        value = nn.Parameter(tables[name]) if name in tables else parameter
        setattr(result.get_submodule(module), leaf, value)
    result.source = model.source
    return result.train(model.training)


def _fill(
    init: str,
    model: Transformer,
    present: Mapping[str, Tensor],
    tokens: Sequence[NewToken],
    contexts: Sequence[Context],
    seed: int,
    progress: Callable[[float, float, str], None] | None,
) -> dict[str, Tensor]:
    """New rows of each table."""
    if init == "zero_mean":
        return {n: _drawn(t, len(tokens), derive(seed, "vocabulary rows", n)) for n, t in present.items()}
    means = {name: combined(table, tokens, even) for name, table in present.items()}
    if init == "position":
        if HEAD in present:
            return {
                EMBEDDING: combined(present[EMBEDDING], tokens, to_last),
                HEAD: combined(present[HEAD], tokens, to_first),
            }
        table = present[EMBEDDING]
        return {EMBEDDING: (combined(table, tokens, to_last) + combined(table, tokens, to_first)) / 2}
    if init == "contexts" and contexts:
        return _from_contexts(model, present, means, contexts, progress)
    return means


def _drawn(like: Tensor, rows: int, seed: int) -> Tensor:
    """Rows of normal numbers with mean zero and the standard deviation of the rows `like`, the same on all devices."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(rows, like.shape[1]).normal_(0.0, float(like.float().std()), generator=generator)
    return drawn.to(like.device, like.dtype)


# From the pieces


def even(count: int) -> list[float]:
    """The same weight for each piece."""
    return [1 / count] * count


def to_last(count: int) -> list[float]:
    """Weights that double from piece to piece."""
    return [2.0**place / (2**count - 1) for place in range(count)]


def to_first(count: int) -> list[float]:
    """Weights that halve from piece to piece."""
    return to_last(count)[::-1]


def combined(table: Tensor, tokens: Sequence[NewToken], weights: Callable[[int], list[float]]) -> Tensor:
    """The rows of each token's pieces, weighted and added up: (tokens, D)."""
    pieces = torch.tensor([piece for token in tokens for piece in token.pieces], device=table.device)
    factors = [weight for token in tokens for weight in weights(len(token.pieces))]
    owners = torch.tensor([number for number, token in enumerate(tokens) for _ in token.pieces], device=table.device)
    parts = table[pieces] * torch.tensor(factors, dtype=table.dtype, device=table.device).unsqueeze(1)
    return torch.zeros(len(tokens), table.shape[1], dtype=table.dtype, device=table.device).index_add_(0, owners, parts)


# From contexts


class Occurrence(NamedTuple):
    """A new token in a row of old ones."""

    token: int
    """Which of the new tokens, from 0."""
    first: int
    """Place of its first piece."""
    stop: int
    """Place behind its last piece."""


@dataclass(frozen=True)
class Context:
    """A row of text in the old cut, and where new tokens stand in it."""

    ids: NDArray[np.int64]
    found: tuple[Occurrence, ...]


def find_contexts(
    extension: Extension, texts: Iterable[str], *, length: int, per_token: int = _CONTEXTS_PER_TOKEN
) -> list[Context]:
    """Rows with up to `per_token` occurrences of each new token, none of them at the very beginning of its row."""
    length = min(length, _CONTEXT_TOKENS)
    old = Vocabulary.of(extension.source)
    first, num_tokens = extension.first_id, len(extension.tokens)
    new_content = {**old.content, "model": extension.content["model"]}
    cutters = (Cutter(old.content), Cutter(new_content))
    old_widths = widths(old)
    new_widths = np.concatenate([old_widths, [old_widths[list(token.pieces)].sum() for token in extension.tokens]])
    missing = np.full(num_tokens, per_token)
    contexts: list[Context] = []
    for text in texts:
        before, after = (cutter.ids([text])[0] for cutter in cutters)
        ends, new_ends = np.cumsum(old_widths[before]), np.cumsum(new_widths[after])
        if not len(ends) or ends[-1] != new_ends[-1]:
            continue  # the two cuts do not spell the same: no use to align them
        places = np.flatnonzero(after >= first)
        starts = np.searchsorted(ends, new_ends[places] - new_widths[after[places]], side="right")
        stops = np.searchsorted(ends, new_ends[places]) + 1
        found = np.stack([after[places] - first, starts, stops], axis=1)
        contexts += _rows(before, found, missing, length)
        if not missing.any():
            break
    return contexts


def _rows(
    ids: NDArray[np.int64], found: NDArray[np.int64], missing: NDArray[np.int64], length: int
) -> Iterable[Context]:
    """The text in rows, those of them that are needed; `missing` counts down."""
    for start in range(0, len(ids), length):
        inside = found[(found[:, 1] > start) & (found[:, 2] <= start + length)]
        kept = []
        for token, first, stop in inside.tolist():
            if missing[token]:
                missing[token] -= 1
                kept.append(Occurrence(token, first - start, stop - start))
        if kept:
            yield Context(ids[start : start + length], tuple(kept))


def _from_contexts(
    model: Transformer,
    present: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    contexts: Sequence[Context],
    progress: Callable[[float, float, str], None] | None,
) -> dict[str, Tensor]:
    pooled = _pool(model, contexts, len(means[EMBEDDING]), progress)
    met = (pooled.new_counts > 0).unsqueeze(1)
    output = HEAD if HEAD in present else EMBEDDING
    mapped = _mapped(pooled, present[output])
    rows = {output: torch.where(met, ((mapped + means[output]) / 2).to(means[output].dtype), means[output])}
    if output != EMBEDDING:
        states = pooled.pieces / pooled.pieces.norm(dim=1, keepdim=True).clamp_min(1e-12)
        scaled = states * present[EMBEDDING].float().norm(dim=1).mean()
        rows[EMBEDDING] = torch.where(met, scaled.to(means[EMBEDDING].dtype), means[EMBEDDING])
    return rows


@dataclass(frozen=True)
class _Pooled:
    """Mean hidden states by token, in fp32."""

    pieces: Tensor
    """(new tokens, D): after half of the layers, over a new token's pieces."""
    before_new: Tensor
    """(new tokens, D): after the last norm, where the new token comes next."""
    new_counts: Tensor
    """(new tokens,): contexts of each."""
    before_old: Tensor
    """(old tokens, D): the same where a token comes next that has a row."""
    old_counts: Tensor


def _pool(
    model: Transformer,
    contexts: Sequence[Context],
    num_new: int,
    progress: Callable[[float, float, str], None] | None,
) -> _Pooled:
    table = model.head_weight
    width, num_old = table.shape[1], len(table)
    sums = [torch.zeros(n, width, device=table.device) for n in (num_new, num_new, num_old)]
    counts = [torch.zeros(n, device=table.device) for n in (num_new, num_old)]
    layers = model.model.layers
    middle: list[Tensor] = []
    hook = layers[(len(layers) - 1) // 2].register_forward_hook(lambda module, given, out: middle.append(out))
    was_training = model.training
    model.eval()
    try:
        done = 0
        for some in _batches(contexts):
            _add(model, some, middle, sums, counts)
            done += len(some)
            if progress:
                progress(done, len(contexts), "contexts of new tokens")
    finally:
        hook.remove()
        model.train(was_training)
    pieces, before_new = (total / counts[0].clamp_min(1).unsqueeze(1) for total in sums[:2])
    before_old = sums[2] / counts[1].clamp_min(1).unsqueeze(1)
    return _Pooled(pieces, before_new, counts[0], before_old, counts[1])


def _batches(contexts: Sequence[Context]) -> Iterable[Sequence[Context]]:
    """The contexts a few at a time, those of one length together."""
    ordered = sorted(contexts, key=lambda context: len(context.ids))
    for _, group in itertools.groupby(ordered, key=lambda context: len(context.ids)):
        alike = list(group)
        for start in range(0, len(alike), _ROWS_AT_ONCE):
            yield alike[start : start + _ROWS_AT_ONCE]


def _add(
    model: Transformer, contexts: Sequence[Context], middle: list[Tensor], sums: list[Tensor], counts: list[Tensor]
) -> None:
    """Adds what the model makes of some rows of one length."""
    device = sums[0].device
    ids = torch.from_numpy(np.stack([context.ids for context in contexts])).to(device)
    middle.clear()
    last = model(ids).float()
    states = middle[0].float()
    sums[2].index_add_(0, ids[:, 1:].flatten(), last[:, :-1].flatten(0, 1))
    counts[1].index_add_(0, ids[:, 1:].flatten(), torch.ones(ids[:, 1:].numel(), device=device))
    found = [(row, one) for row, context in enumerate(contexts) for one in context.found]
    tokens = torch.tensor([one.token for _, one in found], device=device)
    pieces = torch.stack([states[row, one.first : one.stop].mean(0) for row, one in found])
    before = torch.stack([last[row, one.first - 1] for row, one in found])
    sums[0].index_add_(0, tokens, pieces)
    sums[1].index_add_(0, tokens, before)
    counts[0].index_add_(0, tokens, torch.ones(len(found), device=device))


def _mapped(pooled: _Pooled, table: Tensor) -> Tensor:
    """Rows for the new tokens by the linear map from contexts to rows that fits the present tokens best.

    Formula: row = b + A (c - m), c the mean state in front of the token, m that of all tokens, b the mean row; A
        minimises sum_t w_t |row_t - b - A (c_t - m)|^2 + ridge |A|^2 over the present tokens t; w_t is their count, at
        most 50.
    """
    counts = pooled.old_counts[: len(table)]
    states, rows = pooled.before_old[: len(table)], table.float()
    center = (states * counts.unsqueeze(1)).sum(0) / counts.sum().clamp_min(1)
    weights = counts.clamp_max(_COUNT_LIMIT).unsqueeze(1)
    mean_row = (rows * weights).sum(0) / weights.sum().clamp_min(1)
    inputs = states - center
    gram = inputs.T @ (inputs * weights)
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(1e-12)
    identity = torch.eye(len(gram), device=gram.device)
    solution = torch.linalg.solve(gram + ridge * identity, inputs.T @ ((rows - mean_row) * weights))
    return (pooled.before_new - center) @ solution + mean_row


# The optimizer's state


def with_new_rows_in_state(
    state: Mapping[str, Tensor], *, first: int, added: int, rows: tuple[int, int]
) -> dict[str, Tensor]:
    """An optimizer's exported state for the tables with new rows, whose own is zero; the rest is the same tensors.

    rows: of the tables before and after. What belongs to a whole table, such as a count of steps, stays.
    """
    before, after = rows
    result = dict(state)
    for key, tensor in state.items():
        if key.rpartition(".")[0] in (EMBEDDING, HEAD) and tensor.ndim > 0 and len(tensor) == before:
            result[key] = torch.zeros((after, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
            result[key][:before] = tensor
            result[key][first : first + added] = 0
    return result
