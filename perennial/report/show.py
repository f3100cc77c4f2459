"""What a path holds, from its files alone: a prepared corpus, a checkpoint with its lineage tree, a model, or a run."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from perennial.core import lineage as lineages
from perennial.core import records
from perennial.core.amounts import human, human_bytes, human_seconds
from perennial.core.errors import UserError
from perennial.core.files import read_json, verify_manifest
from perennial.model.inspection import raw_config
from perennial.report.model_folder import estimated_past, examine, past_lines, to_lines


def show(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """The facts of a corpus, checkpoint, model or run folder; 'kind' says which. Raises UserError for anything else.

    A 'checkpoint' has a lineage, a 'model' is any other Hugging Face folder.
    verify: every file is also checked against the checksum in the manifest.
    """
    if (path / "resolved.json").is_file():
        return _run(path, verify)
    if (path / lineages.STATE_FOLDER).is_dir() or lineages.has_lineage(path):
        return _checkpoint(path, verify)
    if (path / "config.json").is_file():
        if verify:
            raise UserError(f"{path}: has no checksums to verify; only checkpoints that Perennial wrote have them")
        return _foreign(path)
    if (path / "manifest.json").is_file():
        return _corpus(path, verify)
    if path.suffix == ".partial" or path.with_name(f"{path.name}.partial").exists():
        return _corpus(path, verify)  # says that it was interrupted, and how to go on
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    raise UserError(
        f"{path}: neither a prepared corpus (manifest.json), a checkpoint (config.json) nor a run (resolved.json)"
    )


def _corpus(path: Path, verify: bool) -> dict[str, Any]:
    from perennial.data.corpus import Corpus

    corpus = Corpus.open(path, checksums=verify)
    keep = ("name", "fingerprint", "tokenizer", "counts", "splits", "inputs", "settings")
    return {
        "kind": "corpus",
        "path": str(path),
        "verified": verify,
        **{k: corpus.manifest[k] for k in keep if k in corpus.manifest},
    }


def _checkpoint(path: Path, verify: bool) -> dict[str, Any]:
    if verify:
        verify_manifest(path, f"{lineages.STATE_FOLDER}/manifest.json", "checkpoint")
    facts: dict[str, Any] = {"kind": "checkpoint", "path": str(path), "verified": verify}
    facts["config"] = raw_config(path)
    facts["model"] = examine(path)
    if lineages.has_lineage(path):
        lineage = lineages.read(path)
        facts["lineage"] = lineage.model_dump(mode="json")
        facts["totals"] = {"tokens": lineage.tokens, "flops": lineage.flops, "rate": lineage.rate, "peak": lineage.peak}
    return facts


def _foreign(path: Path) -> dict[str, Any]:
    """A Hugging Face folder that Perennial did not write: no lineage, so its past is estimated."""
    facts: dict[str, Any] = {"kind": "model", "path": str(path), "config": raw_config(path), "model": examine(path)}
    if parameters := facts["model"]["parameters"]:
        facts["past"] = estimated_past(parameters["total"])
    return facts


def _run(path: Path, verify: bool) -> dict[str, Any]:
    events = records.read(path / "events.jsonl")
    resolved = _mapping(path / "resolved.json", "resolved recipe", ("name", "recipe_hash", "tokens", "stages"))
    done = any(e["event"] == "done" for e in events)
    last = next((e for e in reversed(events) if e["event"] == "train"), None)
    evaluations = [e for e in events if e["event"] == "evaluation"]
    folder = path / "checkpoints"
    checkpoints = (
        sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)) if folder.is_dir() else []
    )
    return {
        "kind": "run",
        "path": str(path),
        "name": resolved["name"],
        "recipe_hash": resolved["recipe_hash"],
        "complete": done,
        "tokens": {"planned": resolved["tokens"], "trained": last["tokens"] if last else 0},
        "stages": [
            {k: s[k] for k in ("name", "tokens", "rate_start", "rate_peak", "rate_end")} for s in resolved["stages"]
        ],
        "evaluation": evaluations[-1]["corpora"] if evaluations else {},
        "checkpoints": [str(p) for p in checkpoints],
        "newest": _checkpoint(checkpoints[-1], verify) if checkpoints else None,
    }


def _mapping(path: Path, what: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError when it is another thing or lacks one of the keys."""
    data = read_json(path, what)
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a {what}: it must be a JSON object")
    if lacking := [key for key in keys if key not in data]:
        raise UserError(f"{path}: not a {what}: it lacks {', '.join(lacking)}")
    return data


def to_text(facts: dict[str, Any]) -> str:
    """The facts for a person."""
    texts = {"corpus": _corpus_text, "checkpoint": _checkpoint_text, "model": _foreign_text, "run": _run_text}
    return "\n".join(texts[facts["kind"]](facts))


def _corpus_text(facts: dict[str, Any]) -> list[str]:
    tokenizer, counts = facts["tokenizer"], facts["counts"]
    lines = [f"corpus {facts['name']} ({facts['path']})", f"  fingerprint  {facts['fingerprint'][:16]}"]
    lines.append(
        f"  tokenizer    {tokenizer['fingerprint'][:16]}, {tokenizer['vocabulary_size']} tokens, {tokenizer['engine']}"
    )
    for name, split in facts["splits"].items():
        lines.append(
            f"  {name:12} {split['documents']:,} documents, {human(split['tokens'], 'tokens')}, "
            f"{human_bytes(split['bytes'])}"
        )
    lines.append(f"  documents    {counts['read']:,} read, {counts['kept']:,} kept")
    lines += [f"    dropped    {number:,}: {reason}" for reason, number in counts.get("dropped", {}).items()]
    return lines + (["  every file matches its checksum"] if facts["verified"] else [])


def _checkpoint_text(facts: dict[str, Any]) -> list[str]:
    lines = [f"checkpoint {facts['path']}", *_indented(to_lines(facts["model"]))]
    if "lineage" not in facts:
        return [*lines, "  no lineage: its data, learning rate and compute are unknown"]
    totals, origin = facts["totals"], facts["lineage"]["origin"]
    is_estimate = origin is not None and (origin["tokens"]["is_estimate"] or origin["flops"]["is_estimate"])
    lines.append(
        f"  id {facts['lineage']['checkpoint']}, {human(totals['tokens'], 'tokens')}, {totals['flops']:.3g} FLOPs"
        f"{' (with estimates)' if is_estimate else ''}, learning rate left at {totals['rate']:.3g}"
    )
    for name, values in facts["lineage"]["evaluation"].get("after", {}).items():
        lines.append(f"  {name}: {values['nats_per_token']:.4f} nats/token, {values['bits_per_byte']:.4f} bits/byte")
    if origin:
        lines.append(f"  began as {origin['name']} (checkpoint {origin['weights']}), not trained by Perennial")
        lines += _indented(past_lines(origin), 4)
        if same := origin["parity"]:
            size, where = f"{same['max_difference']:.3g}", f"over {same['tokens']} tokens in {same['dtype']}"
            lines.append(f"    when imported, logits differed from transformers' by at most {size} {where}")
    lines += ["  lineage", *_tree(facts["lineage"]["stages"])]
    lines += [f"  {', '.join(f'{k}: {v}' for k, v in change.items())}" for change in facts["lineage"]["changes"]]
    return lines + (["  every file matches its checksum"] if facts["verified"] else [])


def _foreign_text(facts: dict[str, Any]) -> list[str]:
    lines = [f"model {facts['model']['name']} ({facts['path']})", *_indented(to_lines(facts["model"]))]
    lines.append("  no lineage: its data, learning rate and compute are unknown. `perennial continue` would assume:")
    return lines + _indented(past_lines(facts["past"]), 4) if "past" in facts else lines[:-1]


def _indented(lines: list[str], width: int = 2) -> list[str]:
    """The lines, and those inside them, moved to the right."""
    return [textwrap.indent(line, " " * width) for line in lines]


def _tree(stages: list[dict[str, Any]]) -> list[str]:
    """The stages as an indented tree, the first ancestor at the root."""
    lines, depth, run = [], 0, None
    for stage in stages:
        if (stage["run"], stage["recipe_hash"]) != run:
            run = (stage["run"], stage["recipe_hash"])
            start = "random weights" if stage["parent"] is None else f"checkpoint {stage['parent']}"
            lines.append(f"  {'   ' * depth}`- run {stage['run']} from {start}")
            depth += 1
        mixture = ", ".join(f"{s['name']} {human(s['tokens'])}" for s in stage["sources"])
        part = "" if stage["complete"] else " (unfinished)"
        lines.append(
            f"  {'   ' * depth}{stage['stage']}{part}: {human(stage['tokens'], 'tokens')} ({mixture}), "
            f"{stage['schedule']['name']} rate {stage['rate_start']:.3g} -> {stage['rate_peak']:.3g} -> "
            f"{stage['rate_end']:.3g}, {human_seconds(stage['seconds'])}"
        )
    return lines


def _run_text(facts: dict[str, Any]) -> list[str]:
    tokens = facts["tokens"]
    state = "complete" if facts["complete"] else f"at {tokens['trained'] / tokens['planned']:.0%}"
    lines = [f"run {facts['name']} ({facts['path']}), {state}, recipe {facts['recipe_hash'][:12]}"]
    lines.append(f"  {human(tokens['trained'], 'tokens')} of {human(tokens['planned'])} trained")
    for name, values in facts["evaluation"].items():
        lines.append(f"  {name}: {values['nats_per_token']:.4f} nats/token, {values['bits_per_byte']:.4f} bits/byte")
    return lines + (_checkpoint_text(facts["newest"]) if facts["newest"] else ["  no checkpoint yet"])
