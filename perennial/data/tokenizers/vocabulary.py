"""A tokenizer's vocabulary taken apart for extending: how each token is spelled, and which ones may be joined."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from perennial.core.errors import UserError
from perennial.data.tokenizers.folder import TOKENIZER, TokenizerFolder

BONUS = 1e-4
"""Nats by which a new Unigram piece beats its parts.

Above the resolution of 32-bit sums of a word's scores (8e-6), far below the differences between real cuts.
"""
_NEVER_SCORE = -1e4
"""Of a control token among Unigram pieces: below any cut of the same text into real pieces."""
_SPACE_MARK = "\u2581"
_BYTE_LEVEL_SPACE_MARK = "\u0120"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

_NEVER, _MARK, _LETTERS, _OTHERS = -1, 0, 1, 2
"""Kinds of tokens for joining: not at all; a bare mark for a space; letters; other characters."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer.json of a kind that can be extended, with its parts at hand."""

    content: dict[str, Any]
    """As it is used for encoding, with every added token also in the model's vocabulary, so that ids can follow."""
    is_unigram: bool
    ids: dict[str, int]
    """Every spelling in the model's vocabulary, control tokens included."""
    size: int
    """Largest id + 1."""
    never: frozenset[str]
    """Spellings that are never part of a new token: control tokens, bytes, the unknown token."""
    prefix: str
    """What a token inside a word begins with ('##'), and loses when it is joined."""
    mark: str | None
    """The mark for a space, where only it tells words apart."""
    has_byte_fallback: bool

    @classmethod
    def of(cls, folder: TokenizerFolder) -> Vocabulary:
        """Raises UserError for a tokenizer that cannot be extended, and says why."""
        where, content = folder.path / TOKENIZER, folder.for_encoding()
        model = content["model"]
        kind = model.get("type") or _kind_by_parts(model)
        if kind not in ("BPE", "Unigram"):
            raise UserError(f"{where}: a {kind} tokenizer cannot be extended; BPE and Unigram tokenizers can")
        if model.get("dropout"):
            advice = "so it cuts at random; set it to null first"
            raise UserError(f"{where}: its model has a dropout of {model['dropout']}, {advice}")
        added = {token["content"]: int(token["id"]) for token in content.get("added_tokens") or []}
        vocabulary, ids = _filled(model["vocab"], added, str(where))
        has_bytes = bool(model.get("byte_fallback"))
        never = {*added, *((spelling for spelling in ids if is_byte_token(spelling)) if has_bytes else ())}
        unknown = model.get("unk_token") if kind == "BPE" else _unknown_piece(model)
        found = cls(
            content={**content, "model": {**model, "vocab": vocabulary}},
            is_unigram=kind == "Unigram",
            ids=ids,
            size=folder.vocabulary_size,
            never=frozenset(never | ({unknown} if unknown else set())),
            prefix=model.get("continuing_subword_prefix") or "",
            mark=_mark(content),
            has_byte_fallback=has_bytes,
        )
        if len(vocabulary) > len(model["vocab"]) and found.has_orphans():
            why = "would change what unknown characters cost, and some of its pieces have characters of that kind"
            raise UserError(f"{where}: cannot be extended: pieces for its added tokens {why}")
        return found

    def spellings(self) -> list[str]:
        """Of each id; '' for an id that nothing has."""
        found = [""] * self.size
        for spelling, number in self.ids.items():
            found[number] = spelling
        return found

    def scores(self) -> list[float]:
        """Of each Unigram piece; [] for BPE."""
        return [score for _, score in self.content["model"]["vocab"]] if self.is_unigram else []

    def floor(self) -> float:
        """The lowest score of a Unigram piece that stands for text."""
        return min(
            (score for spelling, score in self.content["model"]["vocab"] if spelling not in self.never), default=0
        )

    def with_characters(self, characters: Sequence[str]) -> dict[str, Any]:
        """The tokenizer.json with ids from `size` on for these characters, so that they are not spelled in bytes."""
        model = dict(self.content["model"])
        if self.is_unigram:
            model["vocab"] = [*model["vocab"], *([character, self.floor()] for character in characters)]
        else:
            numbers = range(self.size, self.size + len(characters))
            model["vocab"] = {**model["vocab"], **dict(zip(characters, numbers, strict=True))}
        return {**self.content, "model": model}

    def has_orphans(self) -> bool:
        """Whether some character is in a Unigram piece but is none itself.

        What an unknown character costs hangs on the lowest score of all pieces. It decides between cuts only where a
        piece covers a character that could also be unknown; then no new piece may score lower than the old ones.
        """
        if not self.is_unigram:
            return False
        return not {c for spelling in self.ids if spelling not in self.never for c in spelling} <= self.ids.keys()


def is_byte_token(spelling: str) -> bool:
    """Whether this is how a vocabulary with byte fallback spells a byte."""
    return _BYTE_TOKEN.fullmatch(spelling) is not None


def byte_spellings(character: str) -> list[str]:
    """The byte tokens of a character."""
    return [f"<0x{byte:02X}>" for byte in character.encode()]


def widths(vocabulary: Vocabulary) -> NDArray[np.int64]:
    """How much of the text each id covers, in a measure in which every cut of a text adds up to the same.

    That is UTF-8 bytes of the spelling; a byte token is one.
    """
    lengths = [len(spelling.removeprefix(vocabulary.prefix).encode()) for spelling in vocabulary.spellings()]
    result = np.array(lengths, np.int64)
    if vocabulary.has_byte_fallback:
        result[[number for spelling, number in vocabulary.ids.items() if is_byte_token(spelling)]] = 1
    return result


def _kind_by_parts(model: Mapping[str, Any]) -> str:
    """The kind of a model in an old file that does not say it."""
    if "merges" in model:
        return "BPE"
    return "Unigram" if isinstance(model["vocab"], list) else "WordLevel or WordPiece"


def _unknown_piece(model: Mapping[str, Any]) -> str | None:
    number = model.get("unk_id")
    return None if number is None else str(model["vocab"][number][0])


def _filled(vocabulary: Any, added: Mapping[str, int], where: str) -> tuple[Any, dict[str, int]]:
    """The model's vocabulary with the added tokens that it lacks, and the ids in it.

    `tokenizers` numbers added tokens that the model does not know from the size of its vocabulary on, whatever ids the
    file gives them, so they must be known before others can follow them.
    """
    if isinstance(vocabulary, dict):
        ids = {**vocabulary, **{spelling: number for spelling, number in added.items() if spelling not in vocabulary}}
        return ids, ids
    pieces = [list(entry) for entry in vocabulary]
    known = {spelling for spelling, _ in pieces}
    for spelling, number in sorted(added.items(), key=lambda item: item[1]):
        if spelling in known:
            continue
        if number != len(pieces):
            gap = f"the ids from {len(pieces)} to {number - 1} belong to no token"
            raise UserError(f"{where}: {gap}, and a Unigram vocabulary can have no gap; it cannot be extended")
        pieces.append([spelling, _NEVER_SCORE])
    return pieces, {spelling: number for number, (spelling, _) in enumerate(pieces)}


def _mark(content: Mapping[str, Any]) -> str | None:
    """The mark for a space when it alone tells words apart; None where a pre-tokenizer's pattern does."""
    steps = content.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps]) if steps else []
    kinds = [part["type"] for part in parts if part["type"] != "ByteLevel" or part.get("use_regex", True)]
    # Some normalizers put the mark in the place of spaces before a pattern could see them.
    if "Metaspace" in kinds or _SPACE_MARK in json.dumps(content.get("normalizer"), ensure_ascii=False):
        return _SPACE_MARK
    if kinds:
        return None
    return _BYTE_LEVEL_SPACE_MARK if parts else _SPACE_MARK


class Cutter:
    """Cuts texts as a tokenizer.json says and tells where words begin."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_str(orjson.dumps(content).decode())
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"the {TOKENIZER} cannot be loaded: {error}") from None
        self.tokenizer.encode_special_tokens = True

    @classmethod
    def of(cls, folder: Path) -> Cutter:
        """The tokenizer of a folder. Raises UserError."""
        return cls(TokenizerFolder.open(folder).for_encoding())

    def ids(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The ids of all texts, flat, and for each whether it is the first of a word."""
        parts: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        starts: list[NDArray[np.bool_]] = [np.empty(0, np.bool_)]
        for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False):
            words = np.array(encoding.word_ids, np.int64)
            parts.append(np.array(encoding.ids, np.int64))
            starts.append(np.concatenate([words[:1] == words[:1], words[1:] != words[:-1]]))
        return np.concatenate(parts), np.concatenate(starts)

    def normalized(self, text: str) -> str:
        """The text as the model sees it, words not yet separated."""
        normalizer = self.tokenizer.normalizer
        return str(normalizer.normalize_str(text)) if normalizer else text


class Symbols:
    """What is known of every token, old and new, for joining: spelling, pieces, kind and (Unigram) score.

    Old tokens have their ids as numbers here; behind them come the characters that might become tokens, then what
    `add` makes.
    """

    def __init__(self, vocabulary: Vocabulary, characters: Sequence[str]) -> None:
        self._prefix, self._mark = vocabulary.prefix, vocabulary.mark
        self.spelling = [*vocabulary.spellings(), *characters]
        self.numbers = {**vocabulary.ids, **{c: vocabulary.size + i for i, c in enumerate(characters)}}
        self.pieces: list[tuple[int, ...]] = [(number,) for number in range(vocabulary.size)]
        self.pieces += [tuple(vocabulary.ids[byte] for byte in byte_spellings(c)) for c in characters]
        self.score = vocabulary.scores()
        if self.score:
            self.score += [vocabulary.floor()] * len(characters)
        self._kind = [_kind(s, s in vocabulary.never or not s, self._mark) for s in self.spelling]
        self._opens = [self._mark is not None and s.startswith(self._mark) for s in self.spelling]

    def starts_word(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """For each of these tokens but the first, whether it is never joined with the one before it."""
        kinds, opens = np.array(self._kind, np.int8), np.array(self._opens, np.bool_)
        left, right = kinds[tokens[:-1]], kinds[tokens[1:]]
        is_joined = (left >= 0) & (right > 0) & ((left == _MARK) | (left == right)) & ~opens[tokens[1:]]
        return ~is_joined

    def joined(self, left: int, right: int) -> str:
        """How the two are spelled as one token."""
        return self.spelling[left] + self.spelling[right][len(self._prefix) :]

    def add(self, left: int, right: int) -> int:
        """Makes one of the two; returns its number."""
        number, spelling = len(self.spelling), self.joined(left, right)
        self.spelling.append(spelling)
        self.numbers[spelling] = number
        self.pieces.append(self.pieces[left] + self.pieces[right])
        if self.score:
            self.score.append(self.score[left] + self.score[right] + BONUS)
        return number


def _kind(spelling: str, is_never: bool, mark: str | None) -> int:
    if is_never:
        return _NEVER
    if mark is None:
        return _LETTERS
    if spelling == mark:
        return _MARK
    text = spelling.removeprefix(mark)
    if mark == _BYTE_LEVEL_SPACE_MARK:
        text = _byte_level_text(text)
    groups = {unicodedata.category(character)[0] for character in text if character != "\ufffd"}
    if "N" in groups or mark in text:
        return _NEVER
    if groups <= {"L", "M"}:
        return _LETTERS
    return _NEVER if groups & {"L", "M"} else _OTHERS


def _byte_level_text(spelling: str) -> str:
    """The text that a byte-level token stands for; U+FFFD where its bytes are parts of a character."""
    return bytes(_BYTE_OF[character] for character in spelling if character in _BYTE_OF).decode("utf-8", "replace")


def _byte_level_alphabet() -> dict[str, int]:
    """Byte values by the characters that byte-level vocabularies spell them with.

    Printable Latin-1 stands for itself, the other bytes follow from U+0100 on.
    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.2, as in the code
        published with it.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()
