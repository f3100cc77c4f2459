"""Texts to ids by the fastest engine that is exact: fastokens if it agrees with Hugging Face, else Hugging Face.

An engine that is fast and sometimes wrong would spoil a corpus without a trace. So the fast one must load the
tokenizer, agree on difficult texts, and agree on a `Sample` of the corpus while that is encoded; on any difference the
corpus is encoded anew by Hugging Face `tokenizers`. The manifest records which engine it was and why.
In both, text that spells a control token is encoded as the text it is.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from perennial.core.errors import UserError
from perennial.data.tokenizers.folder import TokenizerFolder

Encoded = tuple[NDArray[np.uint32], NDArray[np.uint64]]
"""All ids one after the other, and for each text the end (exclusive) of its own."""

_DIFFICULT_TEXTS = (
    *("", " ", "\n", "\t", "   \n\n  \r\n\t ", "a", "  two  spaces ", "trailing \n", "\x00\x01\x7f", "it's we'LL I'm"),
    *("1234567890 3.14159 1,000,000 0x1F", "CamelCaseAndsnake_case(x->y)[0]+=1;", "https://example.org/a?b=c&d=%20"),
    *(
        "na\u00efve na\u0131ve nai\u0308ve \u1e9b\u0323",
        "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
        "\u3053\u3093\u306b\u3061\u306f",
    ),
    *(
        "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
        "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
        "\u0130\u00df\u01c5\ufb01 \u2460\u00bd\u0664",
    ),
    *(
        "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001d49c",
        "\u00a0\u2003\u3000\u200b\ufeff",
        "\ufffd\uffff\U0010ffff",
    ),
    *("a" * 3000, "\u00e9" * 500, " " * 700, "\n" * 300, "=-" * 400),
)
_MAX_CONTROL_TOKENS = 64
_SAMPLE_START_BYTES = 1 << 16
_SAMPLE_SHARE = 1 / 1024
"""Hugging Face needs some 40 times the time for a byte: 1/1024 of the text costs about 4 % on top."""
_SAMPLE_GROWTH = 1.25


class Engine(ABC):
    """Encodes texts without adding any token."""

    name: str
    version: str
    reason: str
    """Why it was chosen, for people."""
    reference: Engine | None = None
    """What its output has to be compared with; None for the reference itself."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """The ids of the texts, flat, and their ends; runs on all cores (RAYON_NUM_THREADS, where set, limits them)."""


class ReferenceEngine(Engine):
    """Hugging Face `tokenizers`: what every tokenizer folder is defined by."""

    name = "tokenizers"

    def __init__(self, content: dict[str, Any], reason: str) -> None:
        """`content` is `TokenizerFolder.for_encoding()`."""
        from tokenizers import Tokenizer

        self.version = metadata.version("tokenizers")
        self.reason = reason
        try:
            self._tokenizer = Tokenizer.from_str(orjson.dumps(content).decode())
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"the tokenizer.json cannot be loaded: {error}") from None
        self._tokenizer.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """See `Engine`."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        # One list of Python integers at a time: keeping them all would cost four times as long, in fresh memory.
        ids = [np.fromiter(encoding.ids, np.uint32) for encoding in encodings]
        return _flat(ids)


class FastEngine(Engine):
    """fastokens: the same ids, some ten times faster. Use `open_engine`, which checks that."""

    name = "fastokens"
    reason = "installed, loads this tokenizer and gives the same ids as tokenizers on every text compared"

    def __init__(self, content: dict[str, Any]) -> None:
        """`content` is `TokenizerFolder.for_encoding()`."""
        import fastokens

        self.reference = ReferenceEngine(content, "for comparison")
        self.version = metadata.version("fastokens")
        self._tokenizer = fastokens.Tokenizer.from_json_str(orjson.dumps(content).decode())

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """See `Engine`."""
        ids, offsets = self._tokenizer.encode_batch_flat(
            list(texts), add_special_tokens=False, split_special_tokens=True
        )
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64)[1:]


def open_engine(folder: TokenizerFolder, sample_texts: Sequence[str] = (), *, refusal: str | None = None) -> Engine:
    """The fast engine when it can be had and agrees on difficult texts and on `sample_texts`, else the reference.

    `refusal` is a reason, known from before, not to use the fast one.
    """
    content = folder.for_encoding()
    if refusal is not None:
        return ReferenceEngine(content, refusal)
    try:
        fast = FastEngine(content)
    except ImportError:
        return ReferenceEngine(content, "fastokens is not installed")
    except UserError:
        raise
    except Exception as error:  # it refuses what it cannot do with exceptions of many kinds
        return ReferenceEngine(content, f"fastokens does not take this tokenizer: {error}")
    texts = [*_DIFFICULT_TEXTS, *_control_token_texts(content), *sample_texts]
    assert fast.reference is not None
    different = first_difference(fast.encode_batch(texts), fast.reference.encode_batch(texts))
    if different is not None:
        return ReferenceEngine(content, f"fastokens {fast.version} gives other ids for {texts[different][:40]!r}")
    return fast


def first_difference(one: Encoded, other: Encoded) -> int | None:
    """The first of the texts that two engines encode differently, or None."""
    for index, (ids, other_ids) in enumerate(zip(_per_text(one), _per_text(other), strict=True)):
        if not np.array_equal(ids, other_ids):
            return index
    return None


def pick(encoded: Encoded, indices: Sequence[int]) -> Encoded:
    """The ids of some of the texts."""
    every = _per_text(encoded)
    some = [every[index] for index in indices]
    return _flat(some)


def _flat(ids: list[NDArray[np.uint32]]) -> Encoded:
    return np.concatenate([np.empty(0, np.uint32), *ids]), np.cumsum([len(some) for some in ids], dtype=np.uint64)


def _per_text(encoded: Encoded) -> list[NDArray[np.uint32]]:
    ids, ends = encoded
    return np.split(ids, ends[:-1].astype(np.int64)) if len(ends) else []


def _control_token_texts(content: dict[str, Any]) -> list[str]:
    tokens = [token["content"] for token in (content.get("added_tokens") or [])[:_MAX_CONTROL_TOKENS]]
    return [text for token in tokens for text in (token, f"a{token}b", f" {token}\n{token} ")]


@dataclass
class Sample:
    """Which documents of a corpus are encoded by both engines, chosen batch by batch as the corpus streams by.

    Of each batch: its longest document and its most non-ASCII one, when they exceed by a quarter what was compared
    before; and documents picked by their digests as long as less than 64 KiB + 1/1024 of the text has been compared.
    So the sample depends on the corpus alone, covers all of it and its extremes, and needs no pass of its own.
    """

    documents: int = 0
    compared_bytes: int = 0
    seen_bytes: int = 0
    longest_bytes: int = 0
    most_foreign_bytes: int = 0
    """Most UTF-8 bytes beyond one per character in a document compared."""
    digest: str = ""
    """Chained hash of the digests of the documents compared."""

    def choose(self, texts: Sequence[str], sizes: Sequence[int], digests: Sequence[bytes]) -> list[int]:
        """The places of those of the texts (with their sizes in UTF-8 bytes) that are to be compared."""
        if not texts:
            return []
        chosen = set()
        foreign = [size - len(text) for text, size in zip(texts, sizes, strict=True)]
        longest, most_foreign = int(np.argmax(sizes)), int(np.argmax(foreign))
        if sizes[longest] > _SAMPLE_GROWTH * self.longest_bytes:
            chosen.add(longest)
        if foreign[most_foreign] > _SAMPLE_GROWTH * self.most_foreign_bytes:
            chosen.add(most_foreign)
        room = _SAMPLE_START_BYTES + _SAMPLE_SHARE * self.seen_bytes - self.compared_bytes
        for index, digest in enumerate(digests):
            if room > 0 and digest[0] < 32:  # one document in eight, so that the sample is spread out
                chosen.add(index)
                room -= sizes[index]
        self.seen_bytes += sum(sizes)
        for index in sorted(chosen):
            self._note(sizes[index], foreign[index], digests[index])
        return sorted(chosen)

    def _note(self, size: int, foreign: int, digest: bytes) -> None:
        self.documents += 1
        self.compared_bytes += size
        self.longest_bytes = max(self.longest_bytes, size)
        self.most_foreign_bytes = max(self.most_foreign_bytes, foreign)
        self.digest = hashlib.blake2b(bytes.fromhex(self.digest) + digest, digest_size=16).hexdigest()
