"""A checkpoint's validation losses on prepared corpora. The Python face of `perennial eval`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perennial.core import lineage as lineages
from perennial.core.environment import tune_process
from perennial.core.errors import UserError
from perennial.core.files import sha256
from perennial.data.corpus import Corpus
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.evals.loss import evaluate, transfer
from perennial.evals.parity import checked_parity
from perennial.model.foreign import check_document_mask, check_rows, check_vocabulary, row_limit
from perennial.model.huggingface import load_model
from perennial.model.through_transformers import AnyModel
from perennial.objectives.base import IGNORED
from perennial.objectives.next_token import target_nats
from perennial.train.checkpoint import verify
from perennial.train.feeding import TorchBatch
from perennial.train.origin import MAX_ROW_TOKENS
from perennial.train.precision import autocast, native_precision
from perennial.train.session import measure_with
from perennial.train.starting import earlier_tokenizers

if TYPE_CHECKING:
    from perennial.objectives.base import LanguageModel


def open_for(checkpoint: Path, data: Mapping[str, Path]) -> dict[str, Corpus]:
    """Prepared corpora that were cut by the checkpoint's tokenizer, or before it was extended. UserError for others."""
    tokenizer = TokenizerFolder.open(checkpoint)
    allowed = {tokenizer.fingerprint}
    if lineages.has_lineage(checkpoint):
        allowed |= earlier_tokenizers(lineages.read(checkpoint))
    corpora = {name: Corpus.open(path) for name, path in data.items()}
    for name, corpus in corpora.items():
        if corpus.tokenizer_fingerprint not in allowed:
            raise UserError(
                f"corpus '{name}' ({corpus.path}) was prepared with another tokenizer "
                f"({corpus.tokenizer_fingerprint[:12]}) than the checkpoint's ({tokenizer.fingerprint[:12]}). "
                f"Prepare it again with `--tokenizer {checkpoint}`."
            )
    return corpora


def _check_validation_files(corpus: Corpus) -> None:
    """Checks the sha256 of what is read of a corpus here. Raises UserError that names a changed file."""
    for name, facts in corpus.manifest["files"].items():
        if name.startswith("validation/") and sha256(corpus.path / name) != facts["sha256"]:
            raise UserError(
                f"{corpus.path}: the prepared corpus is damaged: {name} was changed after it was written (sha256 "
                "differs). Bring that file back from a copy, or prepare the text again."
            )


def evaluate_checkpoint(
    checkpoint: Path,
    data: Mapping[str, Path],
    *,
    max_tokens: int | None = 65536,
    sequence_length: int | None = None,
    precision: str = "auto",
    document_mask: bool | None = None,
    against: Path | None = None,
    ensemble: Sequence[Path] = (),
) -> dict[str, Any]:
    """Losses of a checkpoint: {'checkpoint', 'corpora': {name: measures}}, and 'against_parent' where that is known.

    sequence_length and document_mask: None takes what the checkpoint was last trained with; for a model from elsewhere
    its context, but no more than its continuation would take (1024, on a GPU 4096), and False.
    against: a checkpoint that is measured on the same text, such as the parent; without it forgetting and adaptation
    are stated for the corpora of which the lineage holds the parent's loss on exactly the same text.
    ensemble: further checkpoints; 'ensemble' in the result is the loss of all of them together, by the mean of their
    probabilities.
    """
    tune_process()
    if sequence_length is not None and sequence_length < 1:
        raise UserError(f"sequence_length {sequence_length}: at least 1 is needed")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens {max_tokens}: at least 1 is needed; all of them without it")
    verify(checkpoint)
    if not lineages.has_lineage(checkpoint):
        checked_parity(checkpoint)
    corpora = open_for(checkpoint, data)
    for corpus in corpora.values():
        _check_validation_files(corpus)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    model = load_model(checkpoint, device=device)
    check_vocabulary(model.config, TokenizerFolder.open(checkpoint).vocabulary_size, "the same folder", str(checkpoint))
    lineage = lineages.read(checkpoint) if lineages.has_lineage(checkpoint) else None
    last = lineage.stages[-1] if lineage and lineage.stages else None
    if document_mask is None:
        document_mask = last is not None and last.document_mask
    usual = last.sequence_length if last else min(row_limit(model.config), MAX_ROW_TOKENS[device.type])
    length = sequence_length or usual
    check_rows(model.config, length, "sequence_length")
    check_document_mask(model.config, document_mask)
    members = [_member(path, checkpoint, length, device) for path in ensemble]
    how: dict[str, Any] = {"sequence_length": length, "max_tokens": max_tokens, "document_mask": document_mask}
    with autocast(native_precision(device) if precision == "auto" else precision, device):
        measured = evaluate(model, corpora, measure_with(model), device=device, **how)
        together = (
            evaluate(model, corpora, measure_with_all([model, *members]), device=device, **how) if members else {}
        )
    result: dict[str, Any] = {"checkpoint": str(checkpoint), "sequence_length": length, "corpora": measured}
    if members:
        result["ensemble"] = {"checkpoints": [str(path) for path in (checkpoint, *ensemble)], "corpora": together}
    if lineage is not None:
        result["id"] = lineage.checkpoint
        if against is not None:
            same: dict[str, Any] = {"max_tokens": max_tokens, "sequence_length": length, "precision": precision}
            before = evaluate_checkpoint(against, data, document_mask=document_mask, **same)["corpora"]
        else:
            before = _known_before(lineage, corpora, measured)
        old, new = _old_and_new(lineage, corpora)
        if len(lineage.runs()) > (0 if lineage.origin else 1):
            result["against_parent"] = transfer(before, measured, old, new)
    return result


def _member(path: Path, checkpoint: Path, length: int, device: torch.device) -> AnyModel:
    """A further model of an ensemble. Raises UserError for one with another tokenizer than `checkpoint`."""
    verify(path)
    if TokenizerFolder.open(path).fingerprint != TokenizerFolder.open(checkpoint).fingerprint:
        raise UserError(f"{path}: has another tokenizer than {checkpoint}; the members of an ensemble share one")
    model = load_model(path, device=device)
    check_rows(model.config, length, "sequence_length", f" for {path}")
    return model.eval()


def measure_with_all(models: Sequence[LanguageModel]) -> Any:
    """A function (inputs, targets, segments) -> (sum of nats, count) of the mean of the models' probabilities.

    It is never worse than the mean of their losses, because -ln is convex. Source for ensembles of continuations: Kim
    et al. 2025, "Pre-training under infinite compute", arXiv 2509.14786.
    """

    def measure(inputs: torch.Tensor, targets: torch.Tensor, segments: torch.Tensor | None) -> Any:
        batch = TorchBatch(inputs, targets, segments)
        nats = torch.stack([target_nats(model, batch) for model in models])
        together = math.log(len(models)) - torch.logsumexp(-nats, dim=0)  # of targets that do not count, 0
        return together.sum(), (targets != IGNORED).sum()

    return measure


def _known_before(
    lineage: lineages.Lineage, corpora: Mapping[str, Corpus], measured: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The parent's losses in the lineage, of corpora that it was measured on with just the text of `measured`."""
    names = {facts["fingerprint"]: name for name, facts in lineage.corpora.items()}
    recorded = lineage.evaluation.get("before", {})
    found = {name: recorded.get(names.get(corpus.fingerprint, name), {}) for name, corpus in corpora.items()}
    same = ("tokens", "bytes")
    return {n: f for n, f in found.items() if f and all(f[key] == measured[n][key] for key in same)}


def _old_and_new(lineage: lineages.Lineage, corpora: Mapping[str, Corpus]) -> tuple[list[str], list[str]]:
    """The corpora that earlier runs consumed or that stand in for that; those that the last run was the first to."""
    runs = [{s["fingerprint"] for stage in run for s in stage.sources} for run in lineage.runs()]
    stand_ins = {facts["fingerprint"] for facts in lineage.corpora.values() if facts.get("stands_in")}
    seen, last = stand_ins.union(*runs[:-1]), set().union(*runs[-1:])
    old = [name for name, corpus in corpora.items() if corpus.fingerprint in seen]
    return old, [name for name, corpus in corpora.items() if corpus.fingerprint in last - seen]
