"""Adds tokens for a new language or domain to an existing tokenizer; ids, and the cut of text without them, stay.

Byte-pair merging goes on from the cut that the tokenizer makes today, on the new text: the most frequent pair of
neighbouring tokens inside a word becomes a token, again and again, until enough are found. So every new token is a
concatenation of old ones, its pieces, and text that contains none of the new tokens is cut as before.

BPE: the merges found are appended, so they rank after all old ones. A word is cut by the old merges to the end first;
    no new merge makes a pair that an old one could join (it has a new token in it). Hence the new cut is the old cut
    with new tokens in the places of their pieces. A merge whose pair never occurs in the old cut of a text leaves that
    text as it is; with `keep` only such merges are taken.
Unigram: a new piece scores what its two parts score together, plus a bonus b = 1e-4 nats. The best cut of a text
    without the piece is untouched, because the piece has no place in it. Where the old best cut has the parts, the
    piece wins by b. Elsewhere it could win only where another cut was within b (times the merges in the piece) of the
    best one; and of cuts of a word that score the same, which rounding decides between, another may come out on top.
    With `keep` a piece is taken only if the kept text does not contain it.
A character that a tokenizer with byte fallback spells in bytes can become a token too; the bytes are its pieces.

Exceptions, stated and tested: old text that does contain a new token is cut into fewer tokens, unless it is kept; the
    share of its words for which that is so is measured. Kept documents above 1 MiB are kept in the parts that
    `perennial prepare` makes of them.
Limits: tokens are found inside words, as the tokenizer's pre-tokenizer or its mark for a space tells them; where only
    the mark does (SentencePiece), letters are not joined with other characters, nor digits with anything.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perennial.core.amounts import human_bytes
from perennial.core.errors import UserError
from perennial.core.files import write_text
from perennial.data.corpus import Corpus, Split
from perennial.data.documents import Fields, content_digest, cut, is_blank
from perennial.data.sources import AUTO, AnyReader, documents, survey
from perennial.data.splits import TRAIN, split_of
from perennial.data.tokenizers.folder import TOKENIZER, TokenizerFolder
from perennial.data.tokenizers.merging import Pairs, Queue, Words, pair_key, pair_keys, pair_of
from perennial.data.tokenizers.train import text_bytes
from perennial.data.tokenizers.vocabulary import BONUS, Cutter, Symbols, Vocabulary, byte_spellings, is_byte_token

ProgressCall = Callable[[float, float, str], None]
"""Called with (done, total, what is going on)."""

HELD_OUT_SHARE = 0.05
"""Of the new text, to measure fertility on; nothing is learned from it."""
_HELD_OUT_BYTES = 1 << 14
"""New text is held out in parts of at most this size, so that a single long document can be split too."""
_MEASURED_BYTES = 4 << 20
_MEASURED_AT_ONCE = 16
"""Texts measured at a time, on all cores; each takes some 200 times its size in memory."""
_CHECKED_TEXTS = 32
_PART_BYTES = 1 << 20
"""As `perennial prepare` cuts long documents unless told otherwise."""
_BATCH_BYTES = 1 << 20
"""Text cut at a time; takes some 200 times its size in memory."""
_MIN_COUNT = 2
"""A pair that occurs once is no pattern."""
_MAX_CHARACTERS = 64
_CONTRADICTING = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")
"""Other spellings of the vocabulary, which would be the old one; every reader of tokenizer.json can do without."""
_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class NewToken:
    """A token that was added."""

    spelling: str
    """As the vocabulary spells it."""
    id: int
    pieces: tuple[int, ...]
    """Ids that the old tokenizer cuts it into."""


@dataclass(frozen=True)
class Fertility:
    """How many tokens a text takes before and after; words are what white space separates."""

    num_bytes: int
    num_words: int
    before: int
    """Tokens by the old tokenizer."""
    after: int
    """Tokens by the new one."""
    recut_words: int
    """Words that the new tokenizer cuts otherwise."""

    def to_json(self) -> dict[str, float]:
        """Counts and the ratios made of them."""
        ratios = {
            "tokens_per_word_before": self.before / max(1, self.num_words),
            "tokens_per_word_after": self.after / max(1, self.num_words),
            "bytes_per_token_before": self.num_bytes / max(1, self.before),
            "bytes_per_token_after": self.num_bytes / max(1, self.after),
            "recut_share": self.recut_words / max(1, self.num_words),
        }
        return {**asdict(self), **{name: round(value, 6) for name, value in ratios.items()}}


@dataclass(frozen=True)
class Extension:
    """A tokenizer with new tokens, not yet written, and what it does to the texts."""

    source: TokenizerFolder
    content: dict[str, Any]
    """The new tokenizer.json."""
    tokens: list[NewToken]
    fertility: dict[str, Fertility] = field(default_factory=dict)
    """By text: '{name} (held out)' for new text, '{name} (kept)' for kept text."""

    @property
    def first_id(self) -> int:
        """Id of the first new token; the others follow."""
        return self.tokens[0].id

    def write(self, out: Path) -> list[str]:
        """Copies the tokenizer's files into `out` with the new vocabulary; returns the names of those left out."""
        self.source.copy_to(out)
        left_out = [name for name in _CONTRADICTING if (out / name).is_file()]
        for name in left_out:
            (out / name).unlink()
        (out / TOKENIZER).unlink()
        write_text(out / TOKENIZER, json.dumps(self.content, indent=2, ensure_ascii=False) + "\n")
        return left_out


# Text


@dataclass(frozen=True)
class TextReading:
    """How texts are read."""

    reader: AnyReader = AUTO
    text_field: str = "text"
    sample_bytes: int = 32 << 20
    """Most new text to learn from, spread over the whole; without word borders it takes 90 times that in memory."""


@dataclass
class _Collected:
    """Some of the texts that stream by, up to a number of bytes."""

    texts: list[str] = field(default_factory=list)
    num_bytes: int = 0

    @property
    def is_full(self) -> bool:
        return self.num_bytes >= _MEASURED_BYTES

    def add(self, text: str) -> None:
        if not self.is_full:
            self.texts.append(text)
            self.num_bytes += len(text.encode())


def read_parts(path: Path, reading: TextReading) -> Iterator[tuple[str, float]]:
    """The documents of files, or of a prepared corpus (its training part, decoded), and the share read with each."""
    if (path / "manifest.json").is_file():
        corpus = Corpus.open(path)
        yield from decoded(corpus, corpus.train)
        return
    inputs = survey([path], reading.reader)
    total = sum(source.num_bytes for source in inputs)
    for document, place in documents(inputs, Fields(reading.text_field)):
        share = min(1.0, (place.done_bytes + place.position.consumed) / max(1, total))
        if not is_blank(document.text):
            for part in cut(document.text, document.text.encode(), _PART_BYTES):
                yield part, share


def decoded(corpus: Corpus, split: Split) -> Iterator[tuple[str, float]]:
    """The documents of a part of a prepared corpus, from their tokens, and the share read with each."""
    cutter, start = Cutter.of(corpus.path / "tokenizer"), 0
    for end in split.document_ends().tolist():
        text = cutter.tokenizer.decode(split.tokens(start, end - 1).tolist(), skip_special_tokens=False)
        yield text, end / split.num_tokens
        start = end


def some_texts(texts: Iterable[str]) -> list[str]:
    """The first of the texts, as many as fertility is measured on."""
    collected = _Collected()
    for text in texts:
        collected.add(text)
        if collected.is_full:
            break
    return collected.texts


def sampled_texts(data: Mapping[str, Path], reading: TextReading, num_bytes: int) -> Iterator[str]:
    """About so many bytes of the texts, in parts picked by their digests over the whole of them."""
    share = min(1.0, num_bytes / max(1, sum(_num_bytes(path, reading) for path in data.values())))
    for path in data.values():
        for whole, _ in read_parts(path, reading):
            for text in cut(whole, whole.encode(), _HELD_OUT_BYTES):
                if share == 1.0 or split_of(b"vocabulary sample" + content_digest(text.encode()), share) != TRAIN:
                    yield text


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.encode())
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# Old text


@dataclass
class _Kept:
    """What the old text holds: no merge may join any of it."""

    pairs: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Sorted keys of all neighbours within words, in the present cut."""
    characters: set[str] = field(default_factory=set)
    words: set[bytes] = field(default_factory=set)
    """Unigram only: the distinct words, as ids."""
    text: str = ""
    """Unigram only: their spellings, one after the other."""

    def has_pair(self, left: int, right: int) -> bool:
        key = pair_key(left, right)
        place = int(np.searchsorted(self.pairs, key))
        return place < len(self.pairs) and int(self.pairs[place]) == key


def _read_kept(
    vocabulary: Vocabulary, keep: Mapping[str, Path], reading: TextReading, progress: ProgressCall | None
) -> tuple[_Kept, dict[str, list[str]]]:
    kept, samples = _Kept(), {name: _Collected() for name in keep}
    cutter, spellings = Cutter(vocabulary.content), vocabulary.spellings()
    for name, path in keep.items():
        parts = _noted(path, reading, f"old text '{name}'", progress)
        for batch in _batches(_tapped(parts, samples[name])):
            tokens, starts = cutter.ids(batch)
            inside = ~starts[1:]
            kept.pairs = np.union1d(kept.pairs, pair_keys(tokens)[inside])
            if vocabulary.has_byte_fallback:
                kept.characters.update(*(cutter.normalized(text) for text in batch))
            if vocabulary.is_unigram:
                kept.words.update(_segments(tokens, starts, least=1))
        if not samples[name].texts:
            raise UserError(f"--keep {name}={path}: there is no text in it")
    kept.text = "\0".join("".join(spellings[i] for i in np.frombuffer(word, np.int32)) for word in sorted(kept.words))
    return kept, {f"{name} (kept)": sample.texts for name, sample in samples.items()}


def _tapped(texts: Iterator[str], sample: _Collected) -> Iterator[str]:
    for text in texts:
        sample.add(text)
        yield text


def _noted(path: Path, reading: TextReading, what: str, progress: ProgressCall | None) -> Iterator[str]:
    """The texts of `read_parts`, with progress."""
    read, total = 0, _num_bytes(path, reading)
    for text, share in read_parts(path, reading):
        read += len(text.encode())
        if progress:
            progress(share * total, total, f"{what}: {human_bytes(read)} read")
        yield text


def _segments(tokens: NDArray[np.int64], starts: NDArray[np.bool_], *, least: int) -> Iterator[bytes]:
    """The words of at least so many tokens, as int32 bytes; `starts` says where each begins."""
    borders = [*(np.flatnonzero(starts) * 4).tolist(), len(tokens) * 4]
    data = tokens.astype(np.int32).tobytes()
    return (data[a:b] for a, b in itertools.pairwise(borders) if b - a >= 4 * least)


# New text


@dataclass
class _NewText:
    """The new text as words in the present cut, and what was held out of it."""

    words: Words
    characters: dict[str, int]
    """How often each character occurs that is spelled in bytes so far; in `words` its id is behind the vocabulary."""
    samples: dict[str, list[str]]
    """By what they are: texts to measure fertility on."""
    learned_bytes: int


def _read_new(
    vocabulary: Vocabulary, data: Mapping[str, Path], reading: TextReading, progress: ProgressCall | None
) -> tuple[_NewText, Symbols]:
    share = min(1.0, reading.sample_bytes / max(1, sum(_num_bytes(path, reading) for path in data.values())))
    characters = _uncovered(vocabulary, data, reading, progress) if vocabulary.has_byte_fallback else []
    symbols = Symbols(vocabulary, characters)
    cutter = Cutter(vocabulary.with_characters(characters))
    counter: Counter[bytes] = Counter()
    occurrences = np.zeros(len(characters), np.int64)
    samples: dict[str, list[str]] = {}
    learned_bytes = 0
    for name, path in data.items():
        learned, held_out = _Collected(), _Collected()
        parts = _noted(path, reading, f"new text '{name}'", progress)
        for batch in _batches(_training_texts(parts, share, learned, held_out)):
            learned_bytes += sum(len(text.encode()) for text in batch)
            tokens, starts = cutter.ids(batch)
            occurrences += np.bincount(tokens[tokens >= vocabulary.size] - vocabulary.size, minlength=len(characters))
            starts[1:] |= symbols.starts_word(tokens)
            counter.update(_segments(tokens, starts, least=2))
        if not learned.texts:
            raise UserError(f"--data {name}={path}: there is no text in it")
        held = (f"{name} (held out)", held_out) if held_out.texts else (f"{name} (learned from)", learned)
        samples[held[0]] = held[1].texts
    found = dict(zip(characters, occurrences.tolist(), strict=True))
    return _NewText(Words.counted(counter), found, samples, learned_bytes), symbols


def _num_bytes(path: Path, reading: TextReading) -> int:
    if (path / "manifest.json").is_file():
        return Corpus.open(path).train.num_bytes
    return text_bytes(survey([path], reading.reader))


def _training_texts(parts: Iterator[str], share: float, learned: _Collected, held_out: _Collected) -> Iterator[str]:
    """A share of the text, in parts picked by their digests; one in twenty goes to `held_out` instead."""
    for whole in parts:
        for text in cut(whole, whole.encode(), _HELD_OUT_BYTES):
            digest = content_digest(text.encode())
            if split_of(b"vocabulary held out" + digest, HELD_OUT_SHARE) != TRAIN:
                held_out.add(text)
            elif share == 1.0 or split_of(b"vocabulary" + digest, share) != TRAIN:
                learned.add(text)
                yield text


def _uncovered(
    vocabulary: Vocabulary, data: Mapping[str, Path], reading: TextReading, progress: ProgressCall | None
) -> list[str]:
    """The characters of the new text that the tokenizer spells in several bytes."""
    cutter = Cutter(vocabulary.content)
    found: set[str] = set()
    for name, path in data.items():
        for text in _noted(path, reading, f"characters of '{name}'", progress):
            found.update(cutter.normalized(text))
    spelled = (character for character in sorted(found - vocabulary.ids.keys()) if len(character.encode()) > 1)
    return [c for c in spelled if all(byte in vocabulary.ids for byte in byte_spellings(c))]


# Learning


class _Learner:
    """Takes the pair, or the character spelled in bytes, that saves most tokens, as long as any is allowed."""

    def __init__(self, vocabulary: Vocabulary, symbols: Symbols, new: _NewText, kept: _Kept) -> None:
        self._vocabulary, self._symbols, self._kept = vocabulary, symbols, kept
        self._pairs = Pairs(new.words)
        self._queue = Queue()
        self._waiting: dict[int, list[int]] = {}
        self.taken: list[int] = []
        """Symbols that became tokens, in order."""
        self.merges: list[tuple[str, str]] = []
        self._floor = vocabulary.floor() if vocabulary.has_orphans() else -float("inf")
        for key, count in self._pairs.counts.items():
            self._offer(key, count)
        for number, (character, count) in enumerate(new.characters.items(), vocabulary.size):
            self._waiting[number] = []
            if count >= _MIN_COUNT and character not in kept.characters:
                # Below 0 a candidate is a character; it saves all of its bytes but one.
                self._queue.push(-number, count * (len(character.encode()) - 1))

    def run(self, add: int, progress: ProgressCall | None) -> None:
        """Takes up to `add` tokens."""
        for candidate, saving in self._queue:
            if len(self.taken) == add:
                break
            if candidate < 0:
                self._take_character(-candidate)
            elif (now := self._pairs.counts.get(candidate, 0)) != saving:
                self._offer(candidate, now)  # it was counted before other pairs took some of it
            else:
                self._take_pair(*pair_of(candidate))
            if progress:
                progress(len(self.taken), add, "merging")

    def _offer(self, key: int, count: int) -> None:
        if count >= _MIN_COUNT:
            self._queue.push(key, count)

    def _take_character(self, number: int) -> None:
        self.taken.append(number)
        for key in self._waiting.pop(number):
            self._offer(key, self._pairs.counts.get(key, 0))

    def _take_pair(self, left: int, right: int) -> None:
        for side in (left, right):
            if side in self._waiting:
                self._waiting[side].append(pair_key(left, right))
                return
        if not self._is_allowed(left, right):
            return
        if not self._vocabulary.is_unigram:
            self.merges.append((self._symbols.spelling[left], self._symbols.spelling[right]))
        product = self._symbols.add(left, right)
        self.taken.append(product)
        for key in self._pairs.join(left, right, product):
            self._offer(key, self._pairs.counts[key])

    def _is_allowed(self, left: int, right: int) -> bool:
        spelling = self._symbols.joined(left, right)
        if len(spelling) > _MAX_CHARACTERS or spelling in self._symbols.numbers or self._kept.has_pair(left, right):
            return False
        if self._vocabulary.has_byte_fallback and is_byte_token(spelling):
            return False
        if not self._vocabulary.is_unigram:
            return True
        score = self._symbols.score[left] + self._symbols.score[right] + BONUS
        return score >= self._floor and spelling not in self._kept.text


def extend_tokenizer(
    folder: TokenizerFolder,
    data: Mapping[str, Path],
    *,
    add: int,
    keep: Mapping[str, Path] | None = None,
    reading: TextReading | None = None,
    progress: ProgressCall | None = None,
) -> Extension:
    """Finds `add` new tokens in the texts `data` ({name: file, folder or prepared corpus}) and measures fertility.

    `keep`: old texts that must be cut exactly as before. Raises UserError for a tokenizer that cannot be extended,
    texts without content, and when fewer tokens than `add` can be found.
    """
    reading = reading or TextReading()
    if add < 1:
        raise UserError(f"--add {add}: at least 1 token must be added")
    vocabulary = Vocabulary.of(folder)
    kept, kept_samples = _read_kept(vocabulary, keep or {}, reading, progress)
    new, symbols = _read_new(vocabulary, data, reading, progress)
    learner = _Learner(vocabulary, symbols, new, kept)
    learner.run(add, progress)
    if len(learner.taken) < add:
        fewer = f"lower it to {len(learner.taken)}, or give more text" if learner.taken else "give more text"
        within = ", and do not occur in the text to keep" if keep else ""
        raise UserError(
            f"--add {add}: the new text ({human_bytes(new.learned_bytes)} without what is held out) gives only "
            f"{len(learner.taken)} tokens that occur at least {_MIN_COUNT} times{within}; {fewer}"
        )
    extension = _extended(folder, vocabulary, symbols, learner)
    samples = {**new.samples, **kept_samples}
    _check(vocabulary, extension, [text for texts in samples.values() for text in texts[:_CHECKED_TEXTS]])
    return replace(extension, fertility=measure_fertility(extension, samples, progress=progress))


def _extended(folder: TokenizerFolder, vocabulary: Vocabulary, symbols: Symbols, learner: _Learner) -> Extension:
    taken = learner.taken
    tokens = [
        NewToken(symbols.spelling[number], vocabulary.size + i, symbols.pieces[number])
        for i, number in enumerate(taken)
    ]
    content = json.loads((folder.path / TOKENIZER).read_text(encoding="utf-8"))
    model = content["model"]
    old = vocabulary.content["model"]["vocab"]
    if vocabulary.is_unigram:
        model["vocab"] = [*old, *([symbols.spelling[number], symbols.score[number]] for number in taken)]
    else:
        model["vocab"] = {**old, **{token.spelling: token.id for token in tokens}}
        model["merges"] = [*model["merges"], *_spelled_like(model["merges"], learner.merges)]
    return Extension(folder, content, tokens)


def _spelled_like(old: list[Any], merges: list[tuple[str, str]]) -> list[Any]:
    """The merges in the spelling of the file: pairs, or texts with a space between."""
    if old and isinstance(old[0], str):
        return [f"{left} {right}" for left, right in merges]
    return [list(merge) for merge in merges]


# What it does to text


def measure_fertility(
    extension: Extension, samples: Mapping[str, Sequence[str]], *, progress: ProgressCall | None = None
) -> dict[str, Fertility]:
    """Tokens of the texts before and after, by name."""
    before = Cutter(extension.source.for_encoding()).tokenizer
    after = Cutter({**extension.source.for_encoding(), "model": extension.content["model"]}).tokenizer
    measured = {}
    for name, texts in samples.items():
        total = Fertility(0, 0, 0, 0, 0)
        for start in range(0, len(texts), _MEASURED_AT_ONCE):
            some = list(texts[start : start + _MEASURED_AT_ONCE])
            cuts = (tokenizer.encode_batch(some, add_special_tokens=False) for tokenizer in (before, after))
            for text, one, other in zip(some, *cuts, strict=True):
                total = _sum(total, _fertility(text, one, other))
            if progress:
                progress(start + len(some), len(texts), f"measuring {name}")
        measured[name] = total
    return measured


def _sum(one: Fertility, other: Fertility) -> Fertility:
    return Fertility(*(a + b for a, b in zip(asdict(one).values(), asdict(other).values(), strict=True)))


def _fertility(text: str, before: Any, after: Any) -> Fertility:
    starts = np.array([match.start() for match in _WORD.finditer(text)], np.int64)
    counts, sums = zip(*(_by_word(starts, encoding) for encoding in (before, after)), strict=True)
    changed = (counts[0] != counts[1]) | (sums[0] != sums[1])
    totals = [int(count.sum()) for count in counts]
    return Fertility(len(text.encode()), len(starts), totals[0], totals[1], int(changed[1:].sum()))


def _by_word(starts: NDArray[np.int64], encoding: Any) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """How many tokens each word has, and the sum of their ids; place 0 is for what stands before the first word."""
    if not encoding.ids:
        return np.zeros(len(starts) + 1, np.int64), np.zeros(len(starts) + 1)
    ends = np.array(encoding.offsets, np.int64)[:, 1]
    word = np.searchsorted(starts, ends - 1, side="right")
    ids = np.array(encoding.ids, np.float64)
    counts = np.bincount(word, minlength=len(starts) + 1).astype(np.int64)
    return counts, np.bincount(word, ids, minlength=len(starts) + 1).astype(np.float64)


def _check(vocabulary: Vocabulary, extension: Extension, texts: Sequence[str]) -> None:
    """Raises UserError when the new tokenizer would not keep ids, round trips, or control tokens written as text."""
    where = extension.source.path / TOKENIZER
    before = Cutter(extension.source.for_encoding()).tokenizer
    after = Cutter({**extension.source.for_encoding(), "model": extension.content["model"]}).tokenizer
    for number in range(vocabulary.size):
        if before.id_to_token(number) not in (None, after.id_to_token(number)):
            raise UserError(f"{where}: cannot be extended: id {number} would become {after.id_to_token(number)!r}")
    for token in extension.tokens:
        if after.id_to_token(token.id) != token.spelling:
            raise UserError(f"{where}: cannot be extended: {token.spelling!r} would not have the id {token.id}")
    control = [token["content"] for token in extension.content.get("added_tokens") or []]
    for text in [*control, *texts]:
        old, new = before.encode(text, add_special_tokens=False), after.encode(text, add_special_tokens=False)
        if text in control and not any(i >= vocabulary.size for i in new.ids) and old.ids != new.ids:
            raise UserError(f"{where}: cannot be extended: the text {text!r} would be cut otherwise")
        decoded = (tokenizer.decode(e.ids, skip_special_tokens=False) for tokenizer, e in ((before, old), (after, new)))
        if next(decoded) == text != next(decoded):
            raise UserError(f"{where}: cannot be extended: the text {text[:40]!r} would not come back when decoded")
