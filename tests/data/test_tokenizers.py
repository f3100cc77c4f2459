"""Tokenizer folders, training, and engines: exact or not used, and text that spells a control token stays text."""

from __future__ import annotations

import json
import pydoc_data.topics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perennial.core.errors import UserError
from perennial.data.tokenizers import engine as engines
from perennial.data.tokenizers.engine import Encoded, Engine, FastEngine, ReferenceEngine, Sample, open_engine
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.data.tokenizers.train import END_OF_TEXT, train_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog, and the dog's friend isn't amused; " * 3
TEXTS = [
    "a plain text",
    f"a{END_OF_TEXT}b",
    "",
    "na\u00efve \u4f60\u597d \U0001f600\x00",
    "  spaces\n\n\tand 1234 digits",
    TEXT,
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    topics = pydoc_data.topics.topics
    records = [{"text": f"{topic} na\u00efve"} for _, topic in sorted(topics.items())]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenizerFolder:
    return train_tokenizer([corpus], tmp_path_factory.mktemp("tokenizer") / "tokenizer", vocabulary_size=400)


def rewritten(folder: TokenizerFolder, target: Path, **changes: Any) -> Path:
    """A copy of the folder with changes to tokenizer.json (dict) or tokenizer_config.json (config=...)."""
    folder.copy_to(target)
    content = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))
    if "config" in changes:
        (target / "tokenizer_config.json").write_text(json.dumps(changes.pop("config")))
        (target / "special_tokens_map.json").unlink()
    content.update(changes)
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return target


def split(encoded: Encoded) -> list[list[int]]:
    ids, ends = encoded
    return [part.tolist() for part in np.split(ids, ends.astype(np.int64))[: len(ends)]]


# Training


def test_training_gives_the_same_bytes_again(corpus: Path, folder: TokenizerFolder, tmp_path: Path) -> None:
    again = train_tokenizer([corpus], tmp_path / "again", vocabulary_size=400)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (again.path / name).read_bytes() == (folder.path / name).read_bytes()
    assert again.fingerprint == folder.fingerprint
    assert (folder.vocabulary_size, folder.separator_id) == (400, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again"]


def test_transformers_opens_it_and_any_text_comes_back(folder: TokenizerFolder, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    assert len(tokenizer) == 400
    assert tokenizer.eos_token == tokenizer.bos_token == END_OF_TEXT
    assert tokenizer.eos_token_id == 0
    engine = open_engine(folder)
    for text, ids in zip(TEXTS, split(engine.encode_batch(TEXTS)), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = TokenizerFolder.open(tmp_path / "saved")
    assert (saved.fingerprint, saved.separator_id) == (folder.fingerprint, folder.separator_id)


def test_training_refuses_what_it_cannot_do(corpus: Path, folder: TokenizerFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocabulary_size 257: must be above 257"):
        train_tokenizer([corpus], tmp_path / "out", vocabulary_size=257)
    with pytest.raises(UserError, match=r"vocabulary_size 50000: the text gives only \d+ tokens; lower it to"):
        train_tokenizer([corpus], tmp_path / "out", vocabulary_size=50_000)
    with pytest.raises(UserError, match="exists already"):
        train_tokenizer([corpus], folder.path, vocabulary_size=300)
    with pytest.raises(UserError, match="sample_bytes 0"):
        train_tokenizer([corpus], tmp_path / "out", vocabulary_size=300, sample_bytes=0)
    with pytest.raises(UserError, match="no field 'txt'"):
        train_tokenizer([corpus], tmp_path / "out", vocabulary_size=300, text_field="txt")
    assert not any(tmp_path.iterdir())


def test_training_samples_documents_over_the_whole_input(corpus: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    train_tokenizer(
        [corpus],
        tmp_path / "out",
        vocabulary_size=300,
        sample_bytes=200_000,
        progress=lambda *step: notes.append(step[2]),
    )
    assert notes[-1].endswith("merging")
    assert 5 < len(notes) < len(pydoc_data.topics.topics) - 5, "some of the documents"


# Folders


def test_fingerprint_is_of_the_meaning(folder: TokenizerFolder, tmp_path: Path) -> None:
    content = json.loads((folder.path / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    joined = {**model, "merges": [" ".join(merge) for merge in model["merges"]]}
    same = rewritten(folder, tmp_path / "same", model=joined, truncation={"max_length": 5}, padding=None)
    assert TokenizerFolder.open(same).fingerprint == folder.fingerprint
    fewer = rewritten(folder, tmp_path / "fewer", model={**model, "merges": model["merges"][:-1]})
    assert TokenizerFolder.open(fewer).fingerprint != folder.fingerprint


def test_separator_and_vocabulary(folder: TokenizerFolder, tmp_path: Path) -> None:
    added = json.loads((folder.path / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    high = [*added, {**added[0], "id": 999, "content": "<s>"}]
    only_bos = rewritten(folder, tmp_path / "bos", added_tokens=high, config={"bos_token": {"content": "<s>"}})
    opened = TokenizerFolder.open(only_bos)
    assert (opened.separator_id, opened.vocabulary_size) == (999, 1000)
    neither = rewritten(folder, tmp_path / "neither", config={"pad_token": "x", "eos_token": None})
    with pytest.raises(UserError, match="neither eos_token nor bos_token"):
        TokenizerFolder.open(neither)
    unknown = rewritten(folder, tmp_path / "unknown", config={"eos_token": "</s>"})
    with pytest.raises(UserError, match="'</s>'.*not in the vocabulary"):
        TokenizerFolder.open(unknown)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such tokenizer folder"):
        TokenizerFolder.open(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        TokenizerFolder.open(tmp_path)
    for content, message in (
        ("{", "not a readable tokenizer"),
        ("{}", "no model"),
        ('{"model": {"vocab": {}}}', "empty"),
    ):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=message):
            TokenizerFolder.open(tmp_path)


def test_copy_takes_the_tokenizer_only(folder: TokenizerFolder, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    folder.copy_to(source)
    (source / "model.safetensors").write_bytes(b"weights")
    TokenizerFolder.open(source).copy_to(tmp_path / "copy")
    found = sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert found == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]


# Engines


def both(folder: TokenizerFolder) -> list[Engine]:
    pytest.importorskip("fastokens")
    return [FastEngine(folder.for_encoding()), ReferenceEngine(folder.for_encoding(), "")]


def test_engines_agree_and_control_tokens_stay_text(folder: TokenizerFolder) -> None:
    fast, reference = (split(engine.encode_batch(TEXTS)) for engine in both(folder))
    assert fast == reference
    assert folder.separator_id not in fast[1]
    assert len(fast[1]) > 3
    assert fast[2] == []
    for engine in both(folder):
        ids, ends = engine.encode_batch([])
        assert (len(ids), len(ends)) == (0, 0)
        assert (ids.dtype, ends.dtype) == (np.uint32, np.uint64)


def test_separator_that_is_not_marked_special_stays_text_too(folder: TokenizerFolder, tmp_path: Path) -> None:
    added = json.loads((folder.path / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    unmarked = rewritten(folder, tmp_path / "unmarked", added_tokens=[{**added[0], "special": False}])
    for engine in both(TokenizerFolder.open(unmarked)):
        assert 0 not in engine.encode_batch([f"x{END_OF_TEXT}y"])[0]


def test_truncation_in_the_tokenizer_is_ignored(folder: TokenizerFolder, tmp_path: Path) -> None:
    limit = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    cutting = TokenizerFolder.open(rewritten(folder, tmp_path / "cutting", truncation=limit))
    for engine in both(cutting):
        assert len(engine.encode_batch([TEXT])[0]) > 4


def test_fast_engine_is_chosen_when_it_is_exact(folder: TokenizerFolder) -> None:
    pytest.importorskip("fastokens")
    engine = open_engine(folder, ["a sample text"])
    assert engine.name == "fastokens"
    assert engine.reference is not None
    assert "same ids" in engine.reason
    assert open_engine(folder, refusal="seen to be wrong").reason == "seen to be wrong"


def test_fallback_without_fastokens(folder: TokenizerFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    engine = open_engine(folder)
    assert (engine.name, engine.reason, engine.reference) == ("tokenizers", "fastokens is not installed", None)


def test_fallback_for_a_tokenizer_it_does_not_take(tmp_path: Path) -> None:
    pytest.importorskip("fastokens")
    from tokenizers import Tokenizer, models

    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    Tokenizer(models.Unigram([("</s>", 0.0), ("a", -1.0), ("b", -2.0)], 0)).save(str(tmp_path / "tokenizer.json"))
    folder = TokenizerFolder.open(tmp_path)
    assert (folder.vocabulary_size, folder.separator_id) == (3, 0)
    engine = open_engine(folder)
    assert engine.name == "tokenizers"
    assert "does not take this tokenizer" in engine.reason
    assert engine.encode_batch(["ab"])[0].tolist() == [1, 2]


def test_fallback_when_one_sample_text_differs(folder: TokenizerFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastokens")
    encode = FastEngine.encode_batch

    def wrong(self: FastEngine, texts: Sequence[str]) -> Encoded:
        ids, ends = encode(self, texts)
        return (np.where(np.arange(len(ids)) == len(ids) - 1, 7, ids) if "odd one" in texts else ids), ends

    monkeypatch.setattr(FastEngine, "encode_batch", wrong)
    assert open_engine(folder, ["usual"]).name == "fastokens"
    engine = open_engine(folder, ["usual", "odd one"])
    assert engine.name == "tokenizers"
    assert "other ids for 'odd one'" in engine.reason


def test_broken_tokenizer_is_an_error(folder: TokenizerFolder, tmp_path: Path) -> None:
    broken = rewritten(folder, tmp_path / "broken", pre_tokenizer={"type": "Unknown"})
    with pytest.raises(UserError, match="cannot be loaded"):
        open_engine(TokenizerFolder.open(broken))


# The sample that is compared


def test_sample_holds_the_extremes_and_stays_small() -> None:
    sample = Sample()
    digests = [bytes([n % 256, n // 256]) for n in range(4000)]
    chosen: list[int] = []
    sizes = [1000 + (50_000 if n == 1234 else 0) for n in range(4000)]
    texts = ["x" * (size - (300 if n == 3210 else 0)) for n, size in enumerate(sizes)]
    for start in range(0, 4000, 100):
        stop = start + 100
        chosen += [start + n for n in sample.choose(texts[start:stop], sizes[start:stop], digests[start:stop])]
    assert {0, 1234, 3210} <= set(chosen)
    limit = engines._SAMPLE_START_BYTES + sum(sizes) * engines._SAMPLE_SHARE + 2 * 51_000
    assert engines._SAMPLE_START_BYTES < sample.compared_bytes < limit
    assert sample.documents == len(chosen)
    assert sample.seen_bytes == sum(sizes)
    assert Sample().choose([], [], []) == []
