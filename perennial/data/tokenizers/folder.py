"""A Hugging Face fast tokenizer folder: its fingerprint, its number of ids, the id that ends a document."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from perennial.core.errors import UserError
from perennial.core.files import read_json

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
_FILES = (
    *(TOKENIZER, CONFIG, SPECIAL_TOKENS, "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "chat_template.jinja", "chat_template.json"),
)


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

    def copy_to(self, folder: Path) -> None:
        """Copies the tokenizer's files (nothing else that lies beside them) into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, folder / name)


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
        raise UserError(
            f"{path}: neither eos_token nor bos_token is given in {CONFIG}; one is needed to end a document"
        )
    if token not in ids:
        raise UserError(
            f"{path}: {CONFIG} names {token!r} as the token that ends a document, but it is not in the vocabulary"
        )
    return ids[token]
