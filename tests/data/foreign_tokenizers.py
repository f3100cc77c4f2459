"""Small tokenizers of the kinds that models from elsewhere bring, trained on English, and text in another script."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

OLD_TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())][:18]
_GREEK = str.maketrans(
    "abcdefghijklmnopqrstuvwxyz",
    "\u03b1\u03b2\u03ba\u03b4\u03b5\u03c6\u03b3\u03b7\u03b9\u03be\u03c7\u03bb\u03bc"
    "\u03bd\u03bf\u03c0\u03c8\u03c1\u03c3\u03c4\u03c5\u03ce\u03c9\u03ac\u03ae\u03b6",
)
GREEK_TEXTS = [text.lower().translate(_GREEK) for text in OLD_TEXTS]
"""Greek letters in the place of Latin ones: a language that shares no letter with the old text."""
GERMAN_TEXTS = [
    "Die Stra\u00dfe f\u00fchrt \u00fcber die Br\u00fccke, und die Leute gehen \u00fcber die Stra\u00dfe in die Stadt. "
    "Zwischen den Br\u00fccken liegen M\u00fchlen; die M\u00fcller m\u00f6chten Stra\u00dfen f\u00fcr ihre Wagen.\n"
    * 3,
    "Wer \u00fcber die Br\u00fccke m\u00f6chte, f\u00fchrt den Wagen zwischen den M\u00fchlen zur Stadt.\n" * 5,
    "Stra\u00dfen, Br\u00fccken, M\u00fchlen: die Stadt m\u00f6chte mehr davon, die Leute m\u00f6chten weniger.\n" * 5,
]

_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SIZE = 700


def write(
    folder: Path, tokenizer: Tokenizer, *, kind: str, eos: str, change: Callable[[Any], None] | None = None
) -> Path:
    """Writes a tokenizer folder; `change` edits the content of tokenizer.json."""
    folder.mkdir(parents=True)
    content = json.loads(tokenizer.to_str())
    if change:
        change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    config = {"tokenizer_class": kind, "eos_token": eos, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def gpt2(folder: Path) -> Path:
    """Byte-level BPE as in GPT-2: the pattern is in the pre-tokenizer, the control token in the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train_bytes(tokenizer, ["<|endoftext|>"])
    write(folder, tokenizer, kind="GPT2Tokenizer", eos="<|endoftext|>")
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "".join(" ".join(merge) + "\n" for merge in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    return folder


def qwen2(folder: Path) -> Path:
    """Byte-level BPE as in Qwen2: NFC, a pattern, control tokens behind the vocabulary, merges as texts."""
    tokenizer = _with_pattern()
    tokenizer.normalizer = normalizers.NFC()
    _train_bytes(tokenizer, [])
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])

    def merges_as_texts(content: Any) -> None:
        content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]

    return write(folder, tokenizer, kind="Qwen2Tokenizer", eos="<|endoftext|>", change=merges_as_texts)


def llama3(folder: Path) -> Path:
    """Byte-level BPE as in Llama 3: whole words are looked up before merging (ignore_merges)."""
    tokenizer = _with_pattern()
    _train_bytes(tokenizer, [])
    tokenizer.add_special_tokens([f"<|reserved_{i}|>" for i in range(6)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])

    def look_up_words(content: Any) -> None:
        content["model"]["ignore_merges"] = True

    return write(folder, tokenizer, kind="PreTrainedTokenizerFast", eos="<|reserved_1|>", change=look_up_words)


def llama2(folder: Path) -> Path:
    """SentencePiece BPE as in Llama 2: a mark for spaces, no pre-tokenizer, bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZE + 259, special_tokens=["<unk>", "<s>", "</s>", *_BYTES], show_progress=False
    )
    tokenizer.train_from_iterator([_words_only(text) for text in OLD_TEXTS], trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return write(folder, tokenizer, kind="LlamaTokenizer", eos="</s>", change=_bytes_are_plain)


def gemma(folder: Path) -> Path:
    """SentencePiece BPE as in Gemma: the mark is put in before a pattern that looks for spaces can see any."""
    llama2(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    content["decoder"]["decoders"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def prefixed(folder: Path) -> Path:
    """BPE whose tokens inside a word begin with ##."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZE, special_tokens=["<unk>", "</s>"], continuing_subword_prefix="##", show_progress=False
    )
    tokenizer.train_from_iterator([*OLD_TEXTS, *GERMAN_TEXTS[:1]], trainer)
    return write(folder, tokenizer, kind="PreTrainedTokenizerFast", eos="</s>")


def unigram(folder: Path) -> Path:
    """SentencePiece Unigram as in XLM-R: a control token behind the pieces, unknown characters are lost."""
    return _unigram(folder, [])


def unigram_with_bytes(folder: Path) -> Path:
    """SentencePiece Unigram with bytes for unknown characters."""
    return _unigram(folder, _BYTES)


def _unigram(folder: Path, more: list[str]) -> Path:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always", split=True)]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=_SIZE + len(more),
        special_tokens=["<s>", "</s>", "<unk>", *more],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(OLD_TEXTS, trainer)

    def change(content: Any) -> None:
        vocabulary = content["model"]["vocab"]
        content["model"]["byte_fallback"] = bool(more)
        mask = {"id": len(vocabulary), "content": "<mask>", "special": True, "normalized": False}
        sides = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        _bytes_are_plain(content)
        content["added_tokens"].append({**mask, **sides})

    return write(folder, tokenizer, kind="PreTrainedTokenizerFast", eos="</s>", change=change)


def wordpiece(folder: Path) -> Path:
    """What cannot be extended."""
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    return write(folder, tokenizer, kind="PreTrainedTokenizerFast", eos="a")


KINDS: dict[str, Callable[[Path], Path]] = {
    maker.__name__: maker for maker in (gpt2, qwen2, llama3, llama2, gemma, prefixed, unigram, unigram_with_bytes)
}


def _with_pattern() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_GPT4), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train_bytes(tokenizer: Tokenizer, special_tokens: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZE,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(OLD_TEXTS, trainer)


def _bytes_are_plain(content: Any) -> None:
    """Bytes are tokens of the vocabulary, not added ones (the trainer knows only that way to have them)."""
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in _BYTES]


def _words_only(text: str) -> str:
    """Letters and spaces: SentencePiece's own trainer would not join letters with other characters."""
    return "".join(
        character if character.isalpha() else " " if character.isspace() else f" {character} " for character in text
    )
