"""Small prepared corpora straight from token lists, for tests and benchmarks that need no text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from perennial.core.files import MANIFEST, sha256
from perennial.core.settings import stable_hash
from perennial.data.corpus import FORMAT, Corpus


def utf8_bytes(num_tokens: int) -> int:
    """The size that `write_corpus` gives the text of a document with so many tokens (its separator not counted)."""
    return 3 * num_tokens + 1


def write_corpus(
    folder: Path,
    documents: Sequence[ArrayLike],
    *,
    vocabulary_size: int,
    separator_id: int = 0,
    name: str | None = None,
    validation: Sequence[ArrayLike] = (),
    shard_tokens: int | None = None,
    tokenizer: Path | None = None,
) -> Corpus:
    """Writes a prepared corpus of `documents` (token ids without separators) and opens it.

    shard_tokens: a shard ends before the document that would take it over so many tokens; None: one shard.
    tokenizer: a folder to copy; without one the corpus has no tokenizer files.
    """
    dtype = "uint16" if vocabulary_size <= 1 << 16 else "uint32"
    folder.mkdir(parents=True)
    splits = {
        split: _write_split(folder, split, parts, np.dtype(dtype), separator_id, shard_tokens)
        for split, parts in (("train", documents), ("validation", validation))
    }
    fingerprint = stable_hash([vocabulary_size, separator_id])
    if tokenizer is not None:
        from perennial.data.tokenizers.folder import TokenizerFolder

        shutil.copytree(tokenizer, folder / "tokenizer")
        fingerprint = TokenizerFolder.open(tokenizer).fingerprint
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "format": FORMAT,
        "name": name or folder.name,
        "fingerprint": stable_hash([fingerprint, {k: f["sha256"] for k, f in files.items() if ".ds" in k}]),
        "tokenizer": {
            "fingerprint": fingerprint,
            "vocabulary_size": vocabulary_size,
            "separator_id": separator_id,
            "engine": "none",
            "engine_version": "0",
            "verified_sample": None,
        },
        "dtype": dtype,
        "settings": {},
        "inputs": [],
        "counts": {"read": len(documents) + len(validation), "kept": len(documents) + len(validation), "dropped": {}},
        "splits": splits,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return Corpus.open(folder)


def random_documents(
    num_tokens: int, *, vocabulary_size: int, seed: int = 0, mean_length: int = 50
) -> list[np.ndarray[Any, Any]]:
    """Documents of random ids from 1 up, of varying length, with `num_tokens` tokens in all once separators follow."""
    random = np.random.default_rng(seed)
    documents = []
    while num_tokens > 0:
        length = min(num_tokens, 1 + int(random.integers(0, 2 * mean_length)))
        documents.append(random.integers(1, vocabulary_size, length - 1))
        num_tokens -= length
    return documents


def _write_split(
    folder: Path,
    split: str,
    documents: Sequence[ArrayLike],
    dtype: np.dtype[Any],
    separator_id: int,
    shard_tokens: int | None,
) -> dict[str, Any]:
    (folder / split).mkdir()
    streams = [np.append(np.asarray(document, np.int64), separator_id) for document in documents]
    shards: list[list[int]] = []
    size = 0
    for index, stream in enumerate(streams):
        if not shards or (shard_tokens is not None and size + len(stream) > shard_tokens):
            shards.append([])
            size = 0
        shards[-1].append(index)
        size += len(stream)
    names = []
    for number, members in enumerate(shards):
        name = f"{split}/{number:05d}"
        lengths = [len(streams[i]) for i in members]
        np.concatenate([streams[i] for i in members]).astype(dtype.newbyteorder("<")).tofile(folder / f"{name}.ds")
        np.cumsum(lengths).astype("<u8").tofile(folder / f"{name}.ds.index")
        np.array([utf8_bytes(n - 1) for n in lengths]).astype("<u8").tofile(folder / f"{name}.bytes")
        lines = [json.dumps({"id": f"{split}-{i}"}) + "\n" for i in members]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        names.append(name)
    tokens = sum(len(stream) for stream in streams)
    size = sum(utf8_bytes(len(stream) - 1) for stream in streams)
    return {"documents": len(streams), "tokens": tokens, "bytes": size, "shards": names}
