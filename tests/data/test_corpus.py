"""Prepared corpora: what is stored is what is read, across shards, and a damaged corpus is refused with a reason."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.core.errors import Unreadable, UserError
from perennial.core.patience import Patience, may_come_back
from perennial.data.corpus import Corpus, evaluation_rows, evenly_spread
from perennial.data.packing import IGNORED, document_segments, pack
from tests.data.corpora import random_documents, utf8_bytes, write_corpus

documents_of_ids = st.lists(st.lists(st.integers(1, 90), max_size=12), min_size=1, max_size=12)


def stream_of(documents: list[list[int]], separator_id: int = 0) -> np.ndarray:
    return np.concatenate([np.append(np.asarray(d, np.int64), separator_id) for d in documents])


@settings(max_examples=40, deadline=None)
@given(documents=documents_of_ids, shard_tokens=st.integers(1, 40), length=st.integers(1, 9), wide=st.booleans())
def test_every_stored_token_is_a_target_once(
    documents: list[list[int]], shard_tokens: int, length: int, wide: bool
) -> None:
    size = 70_000 if wide else 91
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "c", documents, vocabulary_size=size, shard_tokens=shard_tokens)
        split, stream = corpus.train, stream_of(documents)
        assert np.array_equal(split.tokens(0, split.num_tokens), stream)
        middle = len(stream) // 2
        assert np.array_equal(split.tokens(middle // 2, middle), stream[middle // 2 : middle])
        num_rows = split.num_rows(length)
        inputs, targets = split.rows(np.arange(num_rows), length)
        assert inputs.dtype == targets.dtype == np.int64
        assert np.array_equal(targets.ravel(), stream[: num_rows * length])
        assert np.array_equal(inputs.ravel(), np.append(0, stream)[: num_rows * length])
        shuffled = np.random.default_rng(0).permutation(num_rows)
        assert np.array_equal(split.rows(shuffled, length)[1], targets[shuffled])


def test_documents_keep_their_ends_sizes_and_metadata(tmp_path: Path) -> None:
    documents = random_documents(500, vocabulary_size=100)
    split = write_corpus(tmp_path / "c", documents, vocabulary_size=100, shard_tokens=120).train
    lengths = [len(d) for d in documents]
    assert len(split._shards) > 3
    assert split.document_ends().tolist() == np.cumsum([n + 1 for n in lengths]).tolist()
    assert split.document_bytes().tolist() == [utf8_bytes(n) for n in lengths]
    assert split.num_bytes == sum(utf8_bytes(n) for n in lengths)
    assert [d["id"] for d in split.documents()] == [f"train-{i}" for i in range(len(documents))]


def test_a_corpus_travels_to_another_process_without_its_tokens(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", random_documents(200_000, vocabulary_size=100), vocabulary_size=100)
    before = corpus.train.rows(np.array([7]), 32)[0]
    parcel = pickle.dumps(corpus)
    assert len(parcel) < 10_000
    assert np.array_equal(pickle.loads(parcel).train.rows(np.array([7]), 32)[0], before)


def test_an_empty_split_has_no_rows(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", [[1, 2]], vocabulary_size=9)
    assert corpus.validation.num_rows(1) == corpus.validation.num_documents == 0
    assert len(corpus.validation.document_ends()) == 0
    with pytest.raises(UserError, match=r"no documents.*larger validation share"):
        evaluation_rows(corpus.validation, 8, None)


def edit_manifest(corpus: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text())
    change(manifest)
    (corpus / "manifest.json").write_text(json.dumps(manifest))


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


SHARD = "train/00000.ds"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda c: (c / SHARD).unlink(), "incomplete: train/00000.ds is missing"),
    "truncated shard": (
        lambda c: (c / SHARD).write_bytes((c / SHARD).read_bytes()[:-2]),
        "damaged: train/00000.ds has",
    ),
    "other format": (lambda c: edit_manifest(c, lambda m: m.update(format=2)), "format 2.*reads format 1"),
    "another manifest": (lambda c: (c / "manifest.json").write_text('{"files": {}}'), "not a prepared corpus"),
    "broken manifest": (lambda c: (c / "manifest.json").write_text('{"files": '), "not a readable corpus manifest"),
    "no shards listed": (lambda c: edit_manifest(c, lambda m: m["splits"]["train"].pop("shards")), "is broken"),
    "unknown type": (lambda c: edit_manifest(c, lambda m: m.update(dtype="int8")), "is broken"),
    "wrong count": (lambda c: edit_manifest(c, lambda m: m["splits"]["train"].update(tokens=5)), "manifest says 5"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "has no manifest.json|raw text"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_corpus_is_refused(tmp_path: Path, case: str) -> None:
    damage, message = DAMAGES[case]
    corpus = write_corpus(tmp_path / "c", [[1, 2, 3, 4], [5, 6]], vocabulary_size=9).path
    damage(corpus)
    with pytest.raises(UserError, match=message) as raised:
        Corpus.open(corpus)
    assert str(corpus) in str(raised.value)


def test_changed_bytes_are_found_when_checksums_are_asked_for(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", [[1, 2, 3, 4], [5, 6]], vocabulary_size=9).path
    Corpus.open(corpus, checksums=True)
    flip_byte(corpus / SHARD)
    Corpus.open(corpus)
    with pytest.raises(UserError, match=r"train/00000.ds was changed after it was written"):
        Corpus.open(corpus, checksums=True)


def test_what_is_no_corpus_is_named(tmp_path: Path) -> None:
    (tmp_path / "raw" / "books").mkdir(parents=True)
    (tmp_path / "raw" / "books" / "one.txt").write_text("text")
    (tmp_path / "half.partial").mkdir()
    (tmp_path / "empty").mkdir()
    for name, message in {
        "raw": "holds raw text .one.txt.*run `perennial prepare`",
        "raw/books/one.txt": "is raw text.*run `perennial prepare`",
        "half": "preparation of this corpus was interrupted.*again",
        "half.partial": "still being prepared, or its preparation was interrupted",
        "empty": "not a prepared corpus: it has no manifest.json",
        "nowhere": "no such prepared corpus folder",
    }.items():
        with pytest.raises(UserError, match=message):
            Corpus.open(tmp_path / name)


@settings(max_examples=40, deadline=None)
@given(documents=documents_of_ids, length=st.integers(1, 9), share=st.floats(0, 1.2))
def test_evaluation_has_whole_documents_every_token_once(documents: list[list[int]], length: int, share: float) -> None:
    total = sum(len(d) + 1 for d in documents)
    max_tokens = int(total * share)
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(
            Path(folder) / "c", [], validation=documents, vocabulary_size=91, separator_id=90, shard_tokens=30
        )
        inputs, targets, num_bytes = evaluation_rows(corpus.validation, length, max_tokens)
    chosen = evenly_spread(np.array([len(d) + 1 for d in documents]), max_tokens).tolist()
    stream = stream_of([documents[i] for i in chosen], 90)
    assert len(stream) <= max_tokens or len(chosen) == 1
    assert chosen == sorted(set(chosen))
    assert num_bytes == sum(utf8_bytes(len(documents[i])) for i in chosen)
    padding = targets.size - len(stream)
    assert 0 <= padding < length
    assert np.array_equal(targets.ravel()[: len(stream)], stream)
    assert (targets.ravel()[len(stream) :] == IGNORED).all()
    assert np.array_equal(inputs.ravel()[: len(stream)], np.append(90, stream[:-1]))


def test_evaluation_documents_are_spread_over_the_split() -> None:
    lengths = np.random.default_rng(0).integers(50, 150, 1000)
    chosen = evenly_spread(lengths, 20_000)
    assert 19_800 < lengths[chosen].sum() <= 20_000
    per_tenth = np.bincount(chosen // 100, minlength=10)
    assert per_tenth.min() >= 15
    assert per_tenth.max() <= 25
    assert np.array_equal(evenly_spread(lengths, 20_000), chosen)
    assert np.array_equal(evenly_spread(lengths, None), np.arange(1000))
    assert evenly_spread(np.array([9, 7, 8]), 3).tolist() == [1]


def test_segments_begin_at_separators_and_where_stretches_meet() -> None:
    inputs = np.array([[0, 5, 6, 0, 7, 8], [5, 6, 7, 8, 0, 9]])
    assert document_segments(inputs, 0).tolist() == [[1, 1, 1, 2, 2, 2], [0, 0, 0, 0, 1, 1]]
    with_joins = document_segments(inputs, 0, (np.array([0, 1]), np.array([3, 2])))
    assert with_joins.tolist() == [[1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 2, 2]]
    assert with_joins.dtype == np.int32


def test_packing_pads_only_the_last_row() -> None:
    inputs, targets = pack(np.array([1, 2, 0, 3, 0]), 3, 0)
    assert inputs.tolist() == [[0, 1, 2], [0, 3, 0]]
    assert targets.tolist() == [[1, 2, 0], [3, 0, IGNORED]]


# What comes back


def waiting(*repairs: Callable[[], object]) -> tuple[Patience, list[str]]:
    """Patience during whose pauses one repair after the other is made; and what it tells."""
    left, told = list(repairs), list[str]()
    return Patience(60.0, told.append, lambda seconds: left.pop(0)() and None), told


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_a_shard_that_is_gone_for_a_while_is_waited_for(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", [[1, 2, 3, 4], [5, 6]], vocabulary_size=9)
    shard, away = corpus.path / SHARD, tmp_path / "away"
    wanted = corpus.train.tokens(0, 8).tolist()
    for make, repair in (
        (lambda: os.replace(shard, away), lambda: os.replace(away, shard)),
        (lambda: (shutil.copy(shard, away), half(shard)), lambda: shard.write_bytes(away.read_bytes())),
        (lambda: (shutil.copy(shard, away), half(shard)), lambda: os.replace(away, shard)),  # another file by that name
    ):
        patience, told = waiting(lambda: None, repair)
        opened = Corpus.open(corpus.path, patience=patience)
        assert opened.train.tokens(0, 2).tolist() == wanted[:2]
        make()
        assert opened.train.tokens(0, 8).tolist() == wanted
        assert told[0].startswith(f"{shard}: ")
        assert told[-1] == "it works again after 3 s"
        make()
        patience, told = waiting(repair)
        opened.train._patience = patience
        assert opened.train.rows([0], 4)[1].tolist() == [wanted[:4]]
        assert len(told) == 2


def test_a_shard_that_does_not_come_back_is_named(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", [[1, 2, 3, 4], [5, 6]], vocabulary_size=9)
    opened = Corpus.open(corpus.path, patience=Patience(4.0, sleep=lambda seconds: None))
    opened.train.tokens(0, 2)
    (corpus.path / SHARD).unlink()
    with pytest.raises(Unreadable, match=r"00000.ds: cannot be read: No such file.*\n.*tried again for 4 s"):
        opened.train.tokens(0, 2)


@pytest.mark.parametrize("case", DAMAGES)
def test_what_may_come_back_is_told_from_what_does_not(tmp_path: Path, case: str) -> None:
    corpus = write_corpus(tmp_path / "c", [[1, 2, 3, 4], [5, 6]], vocabulary_size=9).path
    DAMAGES[case][0](corpus)
    with pytest.raises(UserError) as raised:
        Corpus.open(corpus)
    assert may_come_back(raised.value) == (case in ("missing shard", "truncated shard"))
