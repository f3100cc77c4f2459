"""What a model folder holds, what Perennial can do with it, and what of its past is unknown: facts, and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perennial.core.amounts import human, human_bytes
from perennial.core.errors import UserError
from perennial.core.files import read_json
from perennial.model.card import license_of
from perennial.model.config import ModelConfig
from perennial.model.foreign import AnyConfig, notes, num_parameters
from perennial.model.inspection import raw_config, stored_tensors, values_by_dtype, weight_files
from perennial.train.origin import name_of, past
from perennial.train.recipe import ParentFacts

_BYTE_LEVEL, _BYTE_FALLBACK = "byte-level ", "with byte fallback"


def examine(folder: Path) -> dict[str, Any]:
    """The facts of a model folder, without reading its weights. Only a broken config.json raises UserError.

    What is wrong with weights or tokenizer, and why a model cannot be used, are facts like any other.
    """
    entries = raw_config(folder)
    config, support = _support(folder)
    return {
        "name": name_of(folder),
        "model_type": entries.get("model_type"),
        "architectures": entries.get("architectures"),
        "support": support,
        "shape": _shape(config),
        "parameters": _parameters(config),
        "weights": _weights(folder),
        "tokenizer": _tokenizer(folder, config),
        "license": license_of(folder),
    }


def estimated_past(parameters: int) -> dict[str, Any]:
    """What would be assumed of the past of a model without lineage: tokens, peak, rate and flops, each with its basis.

    Each is {'value', 'is_estimate', 'basis'}.
    """
    return {name: fact.model_dump(mode="json") for name, fact in past(parameters, ParentFacts()).items()}


def _support(folder: Path) -> tuple[AnyConfig | None, dict[str, Any]]:
    """The model's configuration, and {'through': 'native' | 'transformers' | None, 'reason', 'notes'}."""
    from perennial.model.folder_config import read_config

    try:
        found = read_config(folder)
    except UserError as error:
        return None, {"through": None, "reason": str(error), "notes": []}
    if isinstance(found.config, ModelConfig):
        return found.config, {"through": "native", "reason": None, "notes": list(found.notes)}
    known = {"through": "transformers", "reason": found.why_not_native, "notes": notes(found.config)[1:]}
    return found.config, known


def _shape(config: AnyConfig | None) -> dict[str, Any] | None:
    if config is None:
        return None
    names = ("vocabulary_size", "context", "layers", "width", "heads", "kv_heads", "mlp_width", "tied_embeddings")
    shape = config.model_dump(mode="json")
    return {name: shape[name] for name in names if name in shape}


def _parameters(config: AnyConfig | None) -> dict[str, int] | None:
    if config is None:
        return None
    if isinstance(config, ModelConfig):
        embedding = config.vocabulary_size * config.width
    else:
        embedding = config.parameters_by_role.get("embedding", 0)
    return {"total": num_parameters(config), "embedding": embedding}


def _weights(folder: Path) -> dict[str, Any]:
    """{'bytes', 'files', 'values_by_dtype'}, or {'problem'}."""
    try:
        files = weight_files(folder)
        dtypes = values_by_dtype(stored_tensors(files))
    except UserError as error:
        return {"problem": str(error)}
    size = sum(path.stat().st_size for path in files)
    return {"bytes": size, "files": [path.name for path in files], "values_by_dtype": dtypes}


def _tokenizer(folder: Path, config: AnyConfig | None) -> dict[str, Any]:
    """{'kind', 'ids', 'separator_id', 'missing_rows', 'fingerprint'}, or {'problem'}."""
    from perennial.data.tokenizers.folder import TOKENIZER, TokenizerFolder

    try:
        tokenizer = TokenizerFolder.open(folder)
    except UserError as error:
        return {"problem": str(error)}
    rows = config.vocabulary_size if config else tokenizer.vocabulary_size
    return {
        "kind": tokenizer_kind(read_json(folder / TOKENIZER, "tokenizer")),
        "ids": tokenizer.vocabulary_size,
        "separator_id": tokenizer.separator_id,
        "missing_rows": max(0, tokenizer.vocabulary_size - rows),
        "fingerprint": tokenizer.fingerprint,
    }


def tokenizer_kind(content: dict[str, Any]) -> str:
    """'byte-level BPE', 'Unigram', ...: by tokenizer.json."""
    model = content["model"]
    kind = str(model.get("type") or "BPE")
    steps = content.get("pre_tokenizer") or {}
    kinds = {step.get("type") for step in [steps, *(steps.get("pretokenizers") or [])]}
    if "ByteLevel" in kinds:
        return _BYTE_LEVEL + kind
    return f"{kind} {_BYTE_FALLBACK}" if model.get("byte_fallback") else kind


# As text


def to_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of `examine` for a person, one line each."""
    names = ", ".join(facts["architectures"] or []) or "no architecture named"
    lines = [f"architecture  {names} (model_type {facts['model_type']})"]
    if shape := facts["shape"]:
        lines += [*_shape_lines(shape, facts["parameters"])]
    lines += [*_weight_lines(facts["weights"]), *_tokenizer_lines(facts["tokenizer"])]
    lines.append(f"licence       {facts['license'] or 'unknown: neither the model card nor a file states it'}")
    return lines + _support_lines(facts)


def _shape_lines(shape: dict[str, Any], parameters: dict[str, int]) -> list[str]:
    tied = "tied to the output head" if shape["tied_embeddings"] else "the output head has its own"
    heads = f", {shape['heads']} heads" if shape["heads"] else ""
    shared = f" ({shape['kv_heads']} for keys and values)" if shape.get("kv_heads") else ""
    context = f"{shape['context']} tokens" if shape["context"] else "no limit"
    return [
        f"shape         {shape['layers']} layers, width {shape['width']}{heads}{shared}, context {context}",
        f"parameters    {parameters['total']:,} ({human(parameters['total'])}), of them {parameters['embedding']:,} in "
        f"the embedding ({shape['vocabulary_size']} rows, {tied})",
    ]


def _weight_lines(weights: dict[str, Any]) -> list[str]:
    if problem := weights.get("problem"):
        return [f"weights       {problem}"]
    total = sum(weights["values_by_dtype"].values())
    mixed = len(weights["values_by_dtype"]) > 1
    stored = ", ".join(
        f"{dtype} ({count / total:.2%})" if mixed else dtype for dtype, count in weights["values_by_dtype"].items()
    )
    files = weights["files"]
    count = files[0] if len(files) == 1 else f"{len(files)} files"
    return [f"weights       {human_bytes(weights['bytes'])} in {count}, {stored or 'pickled: types not read'}"]


def _tokenizer_lines(tokenizer: dict[str, Any]) -> list[str]:
    if problem := tokenizer.get("problem"):
        return [f"tokenizer     {problem}"]
    separator = tokenizer["separator_id"]
    line = f"tokenizer     {tokenizer['kind']}, {tokenizer['ids']} ids, a document ends with id {separator}"
    if missing := tokenizer["missing_rows"]:
        line += f"; the embedding lacks {missing} rows for it, so it cannot be trained as it is"
    return [line]


def _support_lines(facts: dict[str, Any]) -> list[str]:
    support = facts["support"]
    if problems := [part["problem"] for part in (facts["weights"], facts["tokenizer"]) if "problem" in part]:
        return ["can be used   no, not as it is: " + "; ".join(problems)]
    if support["through"] is None:
        return ["can be used   no: " + support["reason"]]
    if facts["tokenizer"]["missing_rows"]:
        return ["can be used   no, not as it is: the tokenizer has more ids than the embedding has rows"]
    if support["through"] == "native":
        lines = ["can be used   natively: train, continue, evaluate"]
    else:
        lines = [f"can be used   through transformers, not natively: {support['reason']}"]
    return lines + [f"              {note}" for note in support["notes"]]


def past_lines(facts: dict[str, Any]) -> list[str]:
    """A model's past for a person: every estimate marked, with its basis and how to state the fact instead."""
    numbers = {
        "tokens": ("trained on", human(facts["tokens"]["value"], "tokens"), "2T"),
        "flops": ("compute", f"{facts['flops']['value']:.3g} FLOPs", "1e22"),
        "peak": ("highest learning rate", f"{facts['peak']['value']:.3g}", "3e-4"),
        "rate": ("final learning rate", f"{facts['rate']['value']:.3g}", "3e-5"),
    }
    lines = []
    for name, (label, number, example) in numbers.items():
        estimated = facts[name]["is_estimate"]
        known = f" (estimate): {facts[name]['basis']}. Known? --parent {name}={example}" if estimated else " (stated)"
        lines.append(f"{label}: {number}{known}")
    return lines
