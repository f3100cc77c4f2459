"""A Hugging Face fast tokenizer folder: its fingerprint, its number of ids, the id that ends a document."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from perennial.core.errors import UserError
from perennial.core.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
_MODEL_CONFIGS = ("generation_config.json", "config.json")
_FILES = re.compile(
    r"(tokenizer|special_tokens_map|added_tokens|vocab|merges|spiece|sentencepiece|tekken|chat_template)"
    r"[\w.-]*\.(json|jsonl|txt|jinja|model|model\.\w+|bpe|vocab)|additional_chat_templates/[^/]+\.jinja"
)
"""Files of a tokenizer, by their path in the folder; no code."""


@dataclass(frozen=True)
class TokenizerFolder:
    """A folder with tokenizer.json, such as any checkpoint or the output of `perennial tokenizer train`."""

    path: Path
    fingerprint: str
    """sha256 of the parts of tokenizer.json that decide the ids, whatever its layout."""
    vocabulary_size: int
    """Largest id + 1."""
    separator_id: int
    """The id that follows every document: the end-of-text token, else the begin-of-text token."""
    contents: Mapping[str, bytes] | None = field(default=None, repr=False, compare=False)
    """The files' bytes, when they are held in memory."""

    @classmethod
    def open(cls, path: Path | str) -> TokenizerFolder:
        """Reads the folder. Raises UserError when it is none, is broken or names no token that can end a document."""
        path = Path(path)
        if not path.is_dir():
            what = "is a file; give the folder that it lies in" if path.exists() else "no such tokenizer folder"
            raise UserError(f"{path}: {what}")
        if not (path / TOKENIZER).is_file():
            raise UserError(f"{path}: no {TOKENIZER} in it; a Hugging Face fast tokenizer folder is needed")
        meaning = _meaning(_read_tokenizer(path))
        ids = _ids(path, meaning)
        return cls(path, _hash(meaning), max(ids.values()) + 1, _separator_id(path, ids))

    def for_encoding(self) -> dict[str, Any]:
        """tokenizer.json as corpora are encoded with it: nothing is cut or padded, control tokens are marked as such.

        The tokens that tokenizer_config.json gives a role (end of text and so on) count as control tokens also where
        tokenizer.json does not say so; otherwise a text that spells one would turn into it.
        """
        content = _read_tokenizer(self.path)
        roles = set(_roles(self.path).values())
        content["truncation"] = content["padding"] = None
        for token in content.get("added_tokens") or []:
            token["special"] = token["special"] or token["content"] in roles
        return content

    def held(self) -> TokenizerFolder:
        """The same with the files' bytes in memory, so that it outlives its folder."""
        return replace(self, contents=_contents(self.path))

    def copy_to(self, folder: Path) -> None:
        """Writes the tokenizer's files (nothing else that lies beside them) into `folder`. Raises UserError."""
        contents = _contents(self.path) if self.contents is None else self.contents
        if TOKENIZER not in contents:
            raise UserError(f"{self.path}: {TOKENIZER} is no longer there")
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def encoder(self) -> Tokenizer:
        """The tokenizer as text is encoded with it here (`for_encoding`). Raises UserError when it cannot be built."""
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_str(orjson.dumps(self.for_encoding()).decode())
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{self.path / TOKENIZER}: not a tokenizer that can be used: {error}") from None


def _contents(path: Path) -> dict[str, bytes]:
    found = {file.relative_to(path).as_posix(): file for file in [*path.glob("*"), *path.glob("*/*.jinja")]}
    return {
        name: file.read_bytes() for name, file in sorted(found.items()) if _FILES.fullmatch(name) and file.is_file()
    }


def _read_tokenizer(path: Path) -> dict[str, Any]:
    try:
        content = orjson.loads((path / TOKENIZER).read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise UserError(f"{path / TOKENIZER}: not a readable tokenizer: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict) or "vocab" not in content["model"]:
        raise UserError(f"{path / TOKENIZER}: not a tokenizer: it has no model with a vocabulary")
    return content


def _meaning(content: dict[str, Any]) -> dict[str, Any]:
    """What decides the ids of a text; merges in one of the two spellings in which they are found.

    Left out are the parts that cut, pad, decorate or decode: `transformers` rewrites some of them when it saves.
    """
    model = dict(content["model"])
    merges = model.get("merges")
    if merges and isinstance(merges[0], str):
        model["merges"] = [merge.split(" ", 1) for merge in merges]
    return {**{key: content.get(key) for key in ("normalizer", "pre_tokenizer", "added_tokens")}, "model": model}


def _hash(meaning: dict[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(meaning, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _ids(path: Path, content: dict[str, Any]) -> dict[str, int]:
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        ids = dict(vocabulary)
    else:  # Unigram: a list of [token, score], the place is the id
        ids = {entry[0]: index for index, entry in enumerate(vocabulary)}
    ids.update({token["content"]: token["id"] for token in content.get("added_tokens") or []})
    if not ids:
        raise UserError(f"{path / TOKENIZER}: its vocabulary is empty")
    return ids


def _roles(path: Path) -> dict[str, str]:
    """'eos_token' and the like with the token each names, from the files beside tokenizer.json."""
    roles: dict[str, str] = {}
    for name in (SPECIAL_TOKENS, CONFIG):
        content = read_json(path / name, "tokenizer configuration") if (path / name).is_file() else {}
        for key, value in content.items() if isinstance(content, dict) else ():
            token = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(token, str):
                roles[key] = token
    return roles


def _separator_id(path: Path, ids: dict[str, int]) -> int:
    roles = _roles(path)
    token = roles.get("eos_token", roles.get("bos_token"))
    if token is None:
        stated = _id_in_model_configs(path)
        if stated in ids.values():
            return stated
        raise UserError(
            f"{path}: neither eos_token nor bos_token is given in {CONFIG}, nor an eos_token_id in config.json; one is "
            "needed to end a document"
        )
    if token not in ids:
        raise UserError(
            f"{path}: {CONFIG} names {token!r} as the token that ends a document, but it is not in the vocabulary"
        )
    return ids[token]


def _id_in_model_configs(path: Path) -> int:
    """The end-of-text id that the model's configuration states (GPT-2's folder has it nowhere else), or -1."""
    for name in _MODEL_CONFIGS:
        content = read_json(path / name, "configuration") if (path / name).is_file() else {}
        for key in ("eos_token_id", "bos_token_id") if isinstance(content, dict) else ():
            found = content.get(key)
            found = found[0] if isinstance(found, list) and found else found
            if isinstance(found, int):
                return found
    return -1
