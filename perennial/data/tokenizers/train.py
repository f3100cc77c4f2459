"""Trains a byte-level BPE tokenizer on a corpus and writes it as a Hugging Face tokenizer folder.

Any text round-trips to the byte. Words are cut by the pattern of Qwen2's tokenizer: contractions, letters with one
leading mark, single digits, marks, line ends, blanks; without its Unicode normalisation, which would change the text.

Source: Sennrich, Haddow, Birch 2016, Neural Machine Translation of Rare Words with Subword Units (arXiv 1508.07909),
    section 3.2, on bytes as in Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.2.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from perennial.core import files
from perennial.core.amounts import human_bytes
from perennial.core.errors import UserError
from perennial.data.documents import Fields, content_digest, cut
from perennial.data.sources import AUTO, AnyReader, Input, documents, survey
from perennial.data.splits import TRAIN, split_of
from perennial.data.tokenizers.folder import CONFIG, SPECIAL_TOKENS, TOKENIZER, TokenizerFolder

END_OF_TEXT = "<|endoftext|>"
_NUM_BYTE_VALUES = 256
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PIECE_BYTES = 1 << 16
"""Text goes to the trainer in pieces: it queues some hundreds of them."""
_COMPRESSED = (".gz", ".zst", ".parquet")
_COMPRESSED_GROWTH = 3
"""Assumption: these hold about three times their size in text. Only the size of the sample hangs on it."""


def train_tokenizer(
    inputs: Sequence[str | Path],
    out: Path,
    *,
    vocabulary_size: int,
    reader: AnyReader = AUTO,
    text_field: str = "text",
    sample_bytes: int = 256 << 20,
    progress: Callable[[int, int, str], None] | None = None,
) -> TokenizerFolder:
    """Trains on about `sample_bytes` of the inputs and writes the folder `out`. The same inputs give the same bytes.

    vocabulary_size counts all ids: 256 byte values, the merges, and <|endoftext|>, which has id 0.
    """
    out = Path(out)
    if vocabulary_size <= _NUM_BYTE_VALUES + 1:
        least = f"{_NUM_BYTE_VALUES + 1} (256 byte values and {END_OF_TEXT})"
        raise UserError(f"vocabulary_size {vocabulary_size}: must be above {least}")
    if sample_bytes <= 0:
        raise UserError(f"sample_bytes {sample_bytes}: must be above 0")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose another place, or delete it")
    texts = _sample(survey(inputs, reader), Fields(text_field), sample_bytes, progress)
    tokenizer = _train(texts, vocabulary_size)
    size = tokenizer.get_vocab_size()
    if size <= _NUM_BYTE_VALUES + 1:
        raise UserError(f"{', '.join(map(str, inputs))}: too little text to learn a single token from; give more")
    if size < vocabulary_size:
        advice = f"the text gives only {size} tokens; lower it to {size}, or give more text"
        raise UserError(f"vocabulary_size {vocabulary_size}: {advice}")
    _write(tokenizer, out)
    return TokenizerFolder.open(out)


def _train(texts: Iterator[str], vocabulary_size: int) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def _sample(
    inputs: Sequence[Input], fields: Fields, sample_bytes: int, progress: Callable[[int, int, str], None] | None
) -> Iterator[str]:
    """Documents picked by their digests, over the whole of the inputs, until there are `sample_bytes`."""
    total = sum(source.num_bytes for source in inputs)
    share = min(1.0, sample_bytes / text_bytes(inputs))
    taken = 0
    for document, place in documents(inputs, fields):
        utf8 = document.text.encode()
        # split_of spreads digests evenly over [0, 1); the documents below `share` are the sample.
        if share < 1.0 and split_of(b"tokenizer" + content_digest(utf8), share) == TRAIN:
            continue
        yield from cut(document.text, utf8, _PIECE_BYTES)
        taken += len(utf8)
        if progress:
            note = f"{human_bytes(taken)} sampled"
            progress(min(total, place.done_bytes + place.position.consumed), total, note)
        if taken >= sample_bytes:
            break
    if progress:
        progress(total, total, f"{human_bytes(taken)} sampled, merging")


def text_bytes(inputs: Sequence[Input]) -> int:
    """About how much text the inputs hold."""
    files_found = (file for source in inputs for file in source.files())
    return sum(f.size * (_COMPRESSED_GROWTH if f.path.suffix in _COMPRESSED else 1) for f in files_found)


def _write(tokenizer: Any, out: Path) -> None:
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        files.remove_tree(partial)
    roles = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # transformers' own word for 'no limit'; the model's context is in its config.json
    }
    try:
        files.write_text(partial / TOKENIZER, tokenizer.to_str(pretty=True))
        files.write_text(partial / CONFIG, json.dumps(config, indent=2) + "\n")
        files.write_text(partial / SPECIAL_TOKENS, json.dumps(roles, indent=2) + "\n")
        files.publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
