"""Validation loss of a model on prepared corpora, in nats per token and bits per byte.

Every token of whole validation documents is a target exactly once; bits per byte is the sum of nats / ln 2 / bytes of
the documents' UTF-8 text, so that models with different vocabularies can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from perennial.data.corpus import Corpus, evaluation_rows
from perennial.data.packing import IGNORED


def evaluate(
    model: torch.nn.Module,
    corpora: Mapping[str, Corpus],
    measure: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]],
    *,
    sequence_length: int,
    max_tokens: int | None,
    document_mask: bool,
    device: torch.device,
    batch_tokens: int = 8192,
    rank: int = 0,
    world_size: int = 1,
    combine: Callable[[list[float]], list[float]] = lambda values: values,
) -> dict[str, dict[str, Any]]:
    """Measures per corpus: nats_per_token, bits_per_byte, tokens, bytes.

    `measure(inputs, targets, segments)` returns (sum of nats, count); rank r of `world_size` takes every world_size-th
    batch and `combine` sums over ranks.
    """
    training = model.training
    model.eval()
    results = {}
    with torch.no_grad():
        for name, corpus in corpora.items():
            inputs, targets, num_bytes = evaluation_rows(corpus.validation, sequence_length, max_tokens)
            rows = max(1, batch_tokens // sequence_length)
            nats, count = 0.0, 0.0
            for first in range(0, len(inputs), rows * world_size):
                start = first + rank * rows
                x, y = inputs[start : start + rows], targets[start : start + rows]
                if start >= len(inputs):  # processes that share a model have to call it equally often
                    x, y = inputs[:1], np.full_like(targets[:1], IGNORED)
                segments = np.cumsum(x == corpus.separator_id, axis=1, dtype=np.int32) if document_mask else None
                part_nats, part_count = measure(
                    torch.from_numpy(x).to(device),
                    torch.from_numpy(y).to(device),
                    None if segments is None else torch.from_numpy(segments).to(device),
                )
                nats += float(part_nats)
                count += float(part_count)
            nats, count = combine([nats, count])
            results[name] = {
                "nats_per_token": nats / count,
                "bits_per_byte": nats / math.log(2) / num_bytes,
                "tokens": int(count),
                "bytes": int(num_bytes),
            }
    model.train(training)
    return results


def transfer(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]], old: list[str], new: list[str]
) -> dict[str, Any]:
    """Forgetting and adaptation against the parent, per corpus and on average, in nats per token and bits per byte.

    forgetting = old loss after - before (positive: worse); adaptation = new loss before - after (positive: better);
    backward transfer = - mean forgetting (Lopez-Paz and Ranzato 2017, Gradient Episodic Memory, arXiv 1706.08840, with
    loss in place of accuracy).
    """
    result: dict[str, Any] = {"forgetting": {}, "adaptation": {}}
    for kind, names, sign in (("forgetting", old, 1.0), ("adaptation", new, -1.0)):
        for name in names:
            if name in before and name in after:
                result[kind][name] = {
                    unit: sign * (after[name][unit] - before[name][unit])
                    for unit in ("nats_per_token", "bits_per_byte")
                }
    forgotten = list(result["forgetting"].values())
    if forgotten:
        result["backward_transfer"] = {
            unit: -sum(f[unit] for f in forgotten) / len(forgotten) for unit in ("nats_per_token", "bits_per_byte")
        }
    return result


def losses_to_text(result: Mapping[str, Any]) -> str:
    """What `train.measuring.evaluate_checkpoint` found, as a table for a person."""
    lines = [f"{'corpus':20} {'nats/token':>10} {'bits/byte':>10} {'tokens':>10}"]
    rows = list(result["corpora"].items())
    if together := result.get("ensemble"):
        rows += [(f"{name}, all {len(together['checkpoints'])}", v) for name, v in together["corpora"].items()]
    for name, values in rows:
        lines.append(
            f"{name:20} {values['nats_per_token']:10.4f} {values['bits_per_byte']:10.4f} {values['tokens']:10d}"
        )
    for kind in ("forgetting", "adaptation"):
        for name, values in result.get("against_parent", {}).get(kind, {}).items():
            nats, bits = values["nats_per_token"], values["bits_per_byte"]
            lines.append(f"{kind} on {name}: {nats:+.4f} nats/token, {bits:+.4f} bits/byte")
    if "against_parent" in result and not any(result["against_parent"].values()):
        lines.append("The parent was measured on other text; --against PARENT states forgetting and adaptation.")
    return "\n".join(lines)
