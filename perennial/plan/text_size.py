"""How many tokens a text has: counted where it is prepared, else estimated from a sample."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import Tokenizer

from perennial.core.errors import UserError
from perennial.data.corpus import Corpus
from perennial.data.documents import Fields
from perennial.data.sources import AUTO, documents, survey
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.plan.parts import Text

SAMPLE_DOCUMENTS = 200
COMPRESSION = {".gz": 3.0, ".zst": 3.0, ".parquet": 2.5}
"""Bytes of text per byte of file. Assumption: English prose; JSON around it is not counted out."""


def is_prepared(path: Path) -> bool:
    """Whether a path is a finished prepared corpus."""
    return (path / "manifest.json").is_file()


def text_of(name: str, path: Path, *, is_old: bool, tokenizer: Path, text_field: str) -> Text:
    """A corpus with its unique training tokens. Raises UserError for what is no text."""
    if is_prepared(path):
        return Text(name, float(Corpus.open(path).train.num_tokens), is_old, "manifest of the prepared corpus")
    tokens, basis = estimated_tokens(path, tokenizer, text_field)
    return Text(name, tokens, is_old, basis, True)


def estimated_tokens(path: Path, tokenizer: Path, text_field: str) -> tuple[float, str]:
    """(tokens, how they were estimated) of a file or folder of text. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    content = TokenizerFolder.open(tokenizer).for_encoding()
    drawn = itertools.islice(documents(survey([path], AUTO), Fields(text_field, None, ())), SAMPLE_DOCUMENTS)
    texts = [document.text for document, _ in drawn if document.problem is None]
    if not texts:
        raise UserError(f"{path}: no document with a field '{text_field}' can be read")
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(len(cut.ids) + 1 for cut in Tokenizer.from_str(json.dumps(content)).encode_batch(texts))
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    whole = sum(p.stat().st_size * COMPRESSION.get(p.suffix, 1.0) for p in files)
    basis = f"{size / tokens:.2f} bytes per token in {len(texts)} documents, {whole:.3g} bytes of text"
    return whole * tokens / size, basis
