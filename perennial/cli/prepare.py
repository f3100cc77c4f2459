"""Turn raw text into a prepared corpus: read, deduplicate, split, tokenize. Run it again to resume."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "turn raw text into a prepared corpus of tokens; run again to resume"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files or folders (.txt .jsonl[.gz|.zst] .parquet)")
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="a checkpoint's, or one trained here")
    parser.add_argument("--out", required=True, metavar="CORPUS", help="folder of the prepared corpus")
    parser.add_argument("--name", help="what mixtures and reports call the corpus (default: the folder's name)")
    parser.add_argument("--text-field", default="text", help="field with the text (default: text)")
    parser.add_argument("--id-field", metavar="FIELD", help="field that identifies a document (default: file and line)")
    parser.add_argument(
        "--metadata-field", action="append", default=[], metavar="FIELD", help="field to keep; repeatable"
    )
    parser.add_argument(
        "--validation", default="1%", metavar="SHARE", help="share of documents held out (default: 1%%)"
    )
    parser.add_argument("--split-by", metavar="FIELD", help="documents with an equal value go to the same split")
    parser.add_argument(
        "--against", action="append", default=[], metavar="CORPUS", help="drop what this corpus has; repeatable"
    )
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="'NAME KEY=VALUE ...'",
        help="such as 'length min_bytes=200'; see: perennial list filters; repeatable",
    )
    parser.add_argument(
        "--max-document-bytes", type=int, metavar="N", help="longer documents are cut at paragraph ends"
    )
    parser.add_argument(
        "--reader",
        default="auto",
        metavar="'NAME KEY=VALUE ...'",
        help="how to read the inputs (default: by their suffix); 'text broken=drop' leaves out what cannot be read; "
        "see: perennial list readers",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads that tokenize (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def run(args: argparse.Namespace) -> int:
    """Prepares the corpus and says what was kept and dropped."""
    import json
    import os
    from pathlib import Path

    from perennial.cli._names import component
    from perennial.core.errors import UserError
    from perennial.core.progress import Progress
    from perennial.core.settings import check, raise_problems
    from perennial.data.prepare import PrepareSettings, prepare

    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"--threads {args.threads}: at least 1 is needed")
        os.environ["RAYON_NUM_THREADS"] = str(args.threads)  # read once, when the tokenizer's threads are made
    given = {
        "name": args.name or Path(args.out).resolve().name,
        "inputs": args.inputs,
        "tokenizer": args.tokenizer,
        "reader": component("--reader", args.reader),
        "text_field": args.text_field,
        "id_field": args.id_field,
        "metadata_fields": args.metadata_field,
        "validation": args.validation,
        "split_by": args.split_by,
        "against": args.against,
        "filters": [component("--filter", text) for text in args.filter],
        "max_document_bytes": args.max_document_bytes,
    }
    settings, problems = check(PrepareSettings, {key: value for key, value in given.items() if value is not None})
    raise_problems(problems, "prepare")
    assert settings is not None
    with Progress("prepare", unit="bytes", quiet=args.json) as progress:
        manifest = prepare(settings, Path(args.out), progress=progress)
    print(json.dumps(manifest, indent=2) if args.json else _text(manifest, args.out))
    return 0


def _text(manifest: dict[str, Any], out: str) -> str:
    counts, tokenizer = manifest["counts"], manifest["tokenizer"]
    dropped = ", ".join(f"{reason} {number:,}" for reason, number in counts["dropped"].items()) or "none"
    lines = [f"{out}: corpus '{manifest['name']}', fingerprint {manifest['fingerprint'][:16]}"]
    for name, split in manifest["splits"].items():
        lines.append(
            f"  {name:<11} {split['documents']:,} documents, {split['tokens']:,} tokens, {split['bytes']:,} bytes"
        )
    lines.append(f"  {'read':<11} {counts['read']:,} documents, kept {counts['kept']:,}, dropped: {dropped}")
    lines.append(
        f"  {'tokenizer':<11} {tokenizer['engine']} {tokenizer['engine_version']}: {tokenizer['engine_reason']}"
    )
    return "\n".join(lines)
