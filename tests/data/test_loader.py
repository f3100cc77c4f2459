"""Loader: a batch depends on its rows alone, not on ranks, batch sizes, where reading began or what was prepared."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perennial.core.errors import UserError
from perennial.data.corpus import Corpus
from perennial.data.loader import Batch, Loader
from perennial.data.mixture import StageOrder
from perennial.data.replay import Seen, SourceSpec
from tests.data.corpora import random_documents, write_corpus

LENGTH = 24
FIELDS = ("inputs", "targets", "segments", "source", "windows")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    for index, size in enumerate((70, 70_000)):
        documents = random_documents(4000, vocabulary_size=size, seed=index)
        write_corpus(folder / str(index), documents, vocabulary_size=size, shard_tokens=700)
    return folder


@contextmanager
def opened(root: Path, length: int = LENGTH, document_mask: bool = True) -> Iterator[Loader]:
    """A loader over two corpora and a replay at another sequence length, from files opened anew."""
    corpora = [Corpus.open(root / str(index)) for index in range(2)]
    specs = [
        SourceSpec(c.name, str(c.path), c.fingerprint, weight, "fresh", seed=1)
        for c, weight in zip(corpora, (3, 2), strict=True)
    ]
    seen = (Seen(4, 50, 40, ((2, 5),)), Seen(5, 60, 7))
    specs.append(SourceSpec("replay/0", str(corpora[0].path), corpora[0].fingerprint, 2, "replay", seed=3, seen=seen))
    by_fingerprint = {c.fingerprint: c for c in corpora}
    order = StageOrder(specs, by_fingerprint, seed=6, sequence_length=length)
    with Loader(order, by_fingerprint, sequence_length=length, document_mask=document_mask, separator_id=0) as loader:
        yield loader


def joined(batches: list[Batch]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in FIELDS}


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    for name in FIELDS:
        assert np.array_equal(left[name], right[name]), name


START, COUNT = 9_952, 96  # across the border of two blocks of rows


def test_rows_are_what_the_corpus_holds(root: Path) -> None:
    with opened(root) as loader:
        batch, of = loader.at(START, COUNT), loader._order.rows(START, START + COUNT)
    streams = [split.tokens(0, split.num_tokens) for split in loader._splits]
    for source, row, column, start, length in zip(
        of.stretch_source, of.stretches.row, of.stretches.column, of.stretches.start, of.stretches.length, strict=True
    ):
        stream = streams[source]
        part = slice(column, column + length)
        assert np.array_equal(batch.targets[row, part], stream[start : start + length])
        assert np.array_equal(batch.inputs[row, part], np.append(0, stream)[start : start + length])
        assert batch.source[row] == source
    fresh = batch.source < 2
    assert np.array_equal(batch.inputs[fresh, 1:], batch.targets[fresh, :-1])
    assert len(of.stretches.row) > COUNT  # some rows were cut from several windows
    assert batch.segments is not None
    joins = of.stretches.column > 0
    starts = batch.inputs == 0
    starts[of.stretches.row[joins], of.stretches.column[joins]] = True
    assert np.array_equal(np.diff(batch.segments, axis=1), starts[:, 1:])
    assert batch.inputs.dtype == batch.targets.dtype == batch.windows.dtype == batch.source.dtype == np.int64
    assert batch.segments.dtype == np.int32
    assert batch.inputs.flags.c_contiguous
    assert batch.targets.flags.c_contiguous


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_batches_are_the_same_for_any_number_of_ranks(root: Path, world: int) -> None:
    with opened(root) as loader:
        whole = joined([loader.at(START, COUNT)])
    parts: list[list[Batch]] = []
    for rank in range(world):  # each rank opens its own files and goes on batch by batch
        with opened(root) as loader:
            parts.append([loader.at(row, 32, rank=rank, world=world) for row in range(START, START + COUNT, 32)])
    batches = [parts[rank][step] for step in range(COUNT // 32) for rank in range(world)]
    assert_equal(joined(batches), whole)


@pytest.mark.parametrize("count", [1, 5, 16, 96])
def test_batches_are_the_same_for_any_size_and_start(root: Path, count: int) -> None:
    with opened(root) as loader:
        whole = joined([loader.at(START, COUNT)])
    with opened(root) as loader:
        cuts = [*range(START, START + COUNT, count), START + COUNT]
        batches = [loader.at(a, b - a) for a, b in pairwise(cuts)]
    assert_equal(joined(batches), whole)


def test_uneven_ranks_share_every_row(root: Path) -> None:
    with opened(root) as loader:
        whole = joined([loader.at(10, 7)])
        parts = [loader.at(10, 7, rank=rank, world=3) for rank in range(3)]
    assert sorted(len(p.inputs) for p in parts) == [2, 2, 3]
    assert_equal(joined(parts), whole)


def test_what_was_prepared_ahead_changes_nothing(root: Path) -> None:
    rows = [0, 8, 16, 8, 8, 30, 38, 3, 0, 9_999, 46]
    with opened(root) as loader:
        batches = [loader.at(row, 8) for row in rows]
    for row, batch in zip(rows, batches, strict=True):
        with opened(root) as loader:
            assert_equal(joined([batch]), joined([loader.at(row, 8)]))


def test_a_batch_that_is_kept_is_never_written_over(root: Path) -> None:
    with opened(root) as loader:
        kept = loader.at(0, 8).inputs[2:4, 1:]  # only a view keeps the memory
        before = kept.copy()
        addresses = set()
        for row in range(8, 400, 8):
            addresses.add(loader.at(row, 8).inputs.ctypes.data)
        gc.collect()
        assert np.array_equal(kept, before)
        assert len(addresses) < 12  # while the others' memory went around


def test_without_a_document_mask_there_are_no_segments(root: Path) -> None:
    with opened(root, document_mask=False) as loader:
        assert loader.at(0, 4).segments is None


def test_closing_ends_the_thread(root: Path) -> None:
    def running() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("perennial-loader")]

    with opened(root) as loader:
        loader.at(0, 4)
        assert len(running()) == 1
    assert not running()
    loader.close()
    with opened(root) as loader, pytest.raises(AssertionError, match="row -1"):
        loader.at(-1, 4)
    assert not running()


def test_an_error_while_preparing_ahead_is_raised_by_who_asks_for_that_batch(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(root) as loader:
        read = loader._read

        def failing(start: int, stop: int) -> Batch:
            if start == 8:
                raise UserError("the file went away")
            return read(start, stop)

        monkeypatch.setattr(loader, "_read", failing)
        loader.at(0, 8)
        loader.at(100, 8)
        loader.at(0, 8)
        with pytest.raises(UserError, match="went away"):
            loader.at(8, 8)
        loader.at(16, 8)
