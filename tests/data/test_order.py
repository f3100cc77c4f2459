"""Order, mixture and replay: nothing is lost or repeated, shares hold, and only what was seen is replayed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.core.errors import UserError
from perennial.data.corpus import Corpus
from perennial.data.mixture import BLOCK_ROWS, StageOrder, apportion, interleave
from perennial.data.order import FreshOrder, permute
from perennial.data.replay import Seen, SourceSpec, replay_sources
from tests.data.corpora import random_documents, write_corpus

LENGTH = 16
TOKENS = {"a": 1000, "b": 333, "c": 40}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    """By name."""
    root = tmp_path_factory.mktemp("corpora")
    return {
        name: write_corpus(root / name, random_documents(n, vocabulary_size=99, seed=n), vocabulary_size=99)
        for name, n in TOKENS.items()
    }


def fresh(corpus: Corpus, weight: float = 1.0, **changes: Any) -> SourceSpec:
    spec = SourceSpec(corpus.name, str(corpus.path), corpus.fingerprint, weight, "fresh", seed=1, max_epochs=1e9)
    return replace(spec, **changes)


def replayed(corpus: Corpus, *seen: Seen, weight: float = 1.0, seed: int = 2, **changes: Any) -> SourceSpec:
    return fresh(corpus, weight, name=f"replay/{corpus.name}", role="replay", seed=seed, seen=seen, **changes)


def stage(corpora: Mapping[str, Corpus], *specs: SourceSpec, seed: int = 5, length: int = LENGTH) -> StageOrder:
    by_fingerprint = {corpus.fingerprint: corpus for corpus in corpora.values()}
    return StageOrder(specs, by_fingerprint, seed=seed, sequence_length=length)


def pairs(order: StageOrder, start: int, stop: int) -> list[list[int]]:
    """The target positions in the stream that each row holds, in order of their columns."""
    of = order.rows(start, stop).stretches
    rows: list[list[int]] = [[] for _ in range(stop - start)]
    for row, column, first, length in zip(*(x.tolist() for x in (of.row, of.column, of.start, of.length)), strict=True):
        assert len(rows[row]) == column
        rows[row] += range(first, first + length)
    return rows


def windows(order: StageOrder, start: int, stop: int) -> dict[str, list[int]]:
    """Windows drawn from each source, in order."""
    source, _ = order.sources(start, stop)
    first = [row[0] // order.sequence_length for row in pairs(order, start, stop)]
    return {
        spec.name: [w for w, s in zip(first, source.tolist(), strict=True) if s == i]
        for i, spec in enumerate(order.specs)
    }


# --- permutation


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 2000), key=st.integers(0, 2**63 - 1))
def test_permutation_is_one_to_one(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permutation_is_one_to_one_on_a_large_odd_size() -> None:
    assert np.array_equal(np.sort(permute(np.arange(100_003), 100_003, 9)), np.arange(100_003))


def test_permutation_takes_one_key_per_index() -> None:
    keys = np.array([3, 4, 3, 2**63 - 1], np.uint64)
    indices = np.array([0, 1, 2, 3])
    one_by_one = [permute([i], 1000, int(k))[0] for i, k in zip(indices, keys, strict=True)]
    assert permute(indices, 1000, keys).tolist() == one_by_one


@pytest.mark.parametrize("size", [2, 3, 7, 10, 33])
def test_permutation_sends_every_index_everywhere_equally_often(size: int) -> None:
    num_keys = 20_000
    keys = np.random.default_rng(0).integers(0, 2**63, num_keys).astype(np.uint64)
    for index in {0, size // 2, size - 1}:
        counts = np.bincount(permute(np.full(num_keys, index), size, keys), minlength=size)
        expected = num_keys / size
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < size - 1 + 5 * np.sqrt(2 * (size - 1)) + 5  # five standard deviations


def test_permutation_leaves_no_trace_of_the_order() -> None:
    size = 50_000
    once, other = permute(np.arange(size), size, 1), permute(np.arange(size), size, 2)
    for left, right in ((once, np.arange(size)), (once[1:], once[:-1]), (once, other)):
        assert abs(np.corrcoef(left, right)[0, 1]) < 5 / np.sqrt(size)
    assert np.mean(np.abs(np.diff(once)) == 1) < 5 / np.sqrt(size)


def test_order_stays_what_it_was() -> None:
    """Checkpoints store positions in this order: a change here makes every earlier one resume on other data."""
    assert permute(np.arange(5), 1000, 42).tolist() == [282, 494, 633, 444, 307]
    assert FreshOrder("f" * 64, 7, 1000, 8).windows(np.array([0, 1, 999, 1000])).tolist() == [756, 992, 70, 937]
    assert interleave(apportion([3, 1], 12), 42).tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0]


# --- mixture


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20), rows=st.integers(20, 10_000))
def test_apportioned_rows_add_up_and_are_close(weights: list[float], rows: int) -> None:
    counts = apportion(weights, rows)
    shares = np.array(weights) / sum(weights) * rows
    assert counts.sum() == rows
    assert counts.min() >= 1
    lifted = int((shares < 1).sum())  # rows given to sources that would have had none
    assert np.abs(counts - shares).max() < 1 + lifted


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=5), key=st.integers(0, 2**63 - 1))
def test_every_prefix_of_a_block_has_its_shares(weights: list[float], key: int) -> None:
    counts = apportion(weights, BLOCK_ROWS)
    source = interleave(counts, key)
    assert np.bincount(source).tolist() == counts.tolist()
    for index, count in enumerate(counts.tolist()):
        drawn = np.cumsum(source == index)
        assert np.abs(drawn - np.arange(1, BLOCK_ROWS + 1) * count / BLOCK_ROWS).max() <= 2 + len(weights) / 2


def test_order_is_the_same_however_it_is_asked_for(corpora: dict[str, Corpus]) -> None:
    specs = [fresh(corpora["a"], 5), fresh(corpora["b"], 3), replayed(corpora["a"], Seen(9, 30, 24))]
    order = stage(corpora, *specs)
    whole = pairs(order, BLOCK_ROWS - 60, BLOCK_ROWS + 60)
    for size in (1, 7, 50):
        other = stage(corpora, *specs)
        cuts = [*range(BLOCK_ROWS - 60, BLOCK_ROWS + 60, size), BLOCK_ROWS + 60]
        pieces = [pairs(other, first, last) for first, last in pairwise(cuts)]
        assert [row for piece in pieces for row in piece] == whole
    assert whole != pairs(stage(corpora, *specs, seed=6), BLOCK_ROWS - 60, BLOCK_ROWS + 60)


def test_consumed_is_what_was_drawn(corpora: dict[str, Corpus]) -> None:
    order = stage(corpora, fresh(corpora["a"], 1), fresh(corpora["b"], 2, offset_rows=11), fresh(corpora["c"], 1e-9))
    source, draw = order.sources(0, 2 * BLOCK_ROWS + 777)
    for row in (0, 1, 4321, BLOCK_ROWS, 2 * BLOCK_ROWS + 777):
        counts = np.bincount(source[:row], minlength=3).tolist()
        assert order.consumed(row) == dict(zip("abc", counts, strict=True))
    for index, offset in enumerate((0, 11, 0)):
        assert np.array_equal(draw[source == index], np.arange((source == index).sum()) + offset)
    assert order.consumed(BLOCK_ROWS)["c"] == 1
    own = order.draws(100, 200)["b"]
    assert draw[100:200][source[100:200] == 1].tolist() == list(range(*own))


def test_an_epoch_has_every_window_once_and_the_next_another_order(corpora: dict[str, Corpus]) -> None:
    order = stage(corpora, fresh(corpora["a"]))
    num_rows = order.available_rows("a")
    drawn = windows(order, 0, 3 * num_rows)["a"]
    epochs = [drawn[i * num_rows : (i + 1) * num_rows] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_rows))
    assert len({tuple(e) for e in [*epochs, tuple(range(num_rows))]}) == 4


@settings(max_examples=25, deadline=None)
@given(
    first=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)),
    second=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)),
    change=st.integers(1, 80),
    after=st.integers(1, 80),
)
def test_a_change_of_mixture_goes_on_in_each_source(
    corpora: dict[str, Corpus], first: tuple[float, float], second: tuple[float, float], change: int, after: int
) -> None:
    names = ("a", "b")
    before = stage(corpora, *(fresh(corpora[n], w) for n, w in zip(names, first, strict=True)))
    consumed = before.consumed(change)
    specs = [fresh(corpora[n], w, offset_rows=consumed[n]) for n, w in zip(names, second, strict=True)]
    then = stage(corpora, *specs, seed=77)
    for name in names:
        drawn = windows(before, 0, change)[name] + windows(then, 0, after)[name]
        uninterrupted = windows(stage(corpora, fresh(corpora[name])), 0, len(drawn))[name] if drawn else []
        assert drawn == uninterrupted
        num_rows = before.available_rows(name)
        for start in range(0, len(drawn), num_rows):
            epoch = drawn[start : start + num_rows]
            assert len(set(epoch)) == len(epoch)


# --- repetition and bad mixtures


def test_too_many_epochs_are_an_error_that_says_what_to_do(corpora: dict[str, Corpus]) -> None:
    order = stage(corpora, fresh(corpora["a"], 1, max_epochs=2.5), fresh(corpora["b"], 1, max_epochs=4, offset_rows=10))
    order.check_repetition(140)
    with pytest.raises(UserError) as raised:
        order.check_repetition(150)
    text = str(raised.value)
    assert "source 'b' has 20 rows of 16 tokens" in text
    assert ", after 10 that were drawn before: 4.2" in text
    assert "the cap is 4 (max_epochs)" in text
    assert "'a'" not in text
    most = int(text.split("at most ")[1].split(" tokens")[0].replace(",", ""))
    order.check_repetition(most // LENGTH)
    with pytest.raises(UserError):
        order.check_repetition(most // LENGTH + 1)
    epochs = float(text.split("raise max_epochs to ")[1].split(",")[0])
    stage(corpora, fresh(corpora["a"]), fresh(corpora["b"], max_epochs=epochs, offset_rows=10)).check_repetition(150)
    with pytest.raises(UserError, match=r"source 'a'.*\nsource 'b'"):
        order.check_repetition(5000)
    with pytest.raises(UserError, match="Nothing is left of it: leave it out"):
        stage(corpora, fresh(corpora["b"], max_epochs=1, offset_rows=20)).check_repetition(1)


def test_a_mixture_with_mistakes_is_refused(corpora: dict[str, Corpus]) -> None:
    a, b = corpora["a"], corpora["b"]
    for specs, message in (
        ([], "between 1 and"),
        ([fresh(a, 0)], "weight 0 must be above 0"),
        ([fresh(a), fresh(b, name="a")], "'a' is named twice"),
        ([fresh(a), fresh(a, name="z")], "'a' and 'z' are the same corpus"),
        ([fresh(a, role="new")], "role 'new'"),
        ([replayed(a)], "saw 0 tokens of it, which do not fill one row"),
    ):
        with pytest.raises(UserError, match=message):
            stage(corpora, *specs)
    with pytest.raises(
        UserError, match=r"'c': the corpus at .* has 40 training tokens, which do not fill one row of 64"
    ):
        stage(corpora, fresh(corpora["c"]), length=64)


def test_a_changed_corpus_is_refused(corpora: dict[str, Corpus], tmp_path: Path) -> None:
    a = corpora["a"]
    spec = fresh(a, fingerprint="0123456789abcdef" * 4)
    with pytest.raises(UserError) as raised:
        stage(corpora, spec)
    text = str(raised.value)
    for part in ("source 'a'", "0123456789ab", a.fingerprint[:12], str(a.path), "moved: {a: PATH}", "--moved a=PATH"):
        assert part in text
    with pytest.raises(UserError, match="was not opened"):
        stage({"b": corpora["b"]}, fresh(a))


# --- replay


def seen_windows(corpus: Corpus, seen: Seen) -> set[int]:
    """By brute force: the windows that the parent's own order of its first epoch went through."""
    rows = corpus.train.num_rows(seen.sequence_length)
    skipped = {k for first, stop in seen.skipped for k in range(first, stop)}
    order = StageOrder(
        [fresh(corpus, seed=seen.seed)], {corpus.fingerprint: corpus}, seed=0, sequence_length=seen.sequence_length
    )
    drawn = windows(order, 0, rows)[corpus.name][: seen.rows]
    return {w for k, w in enumerate(drawn) if k not in skipped}


@pytest.mark.parametrize("rows", [1, 13, 62, 63, 500])
def test_replay_draws_what_was_seen_once_per_epoch_in_a_new_order_each_time(
    corpora: dict[str, Corpus], rows: int
) -> None:
    a, seen = corpora["a"], Seen(9, rows, LENGTH)
    allowed = seen_windows(a, seen)
    assert len(allowed) == min(rows, a.train.num_rows(LENGTH))
    orders = []
    for seed in (2, 3):
        order = stage(corpora, replayed(a, seen, seed=seed))
        size = order.available_rows("replay/a")
        assert size == len(allowed)
        drawn = windows(order, 0, 3 * size)["replay/a"]
        orders += [tuple(drawn[i * size : (i + 1) * size]) for i in range(3)]
        assert all(sorted(epoch) == sorted(allowed) for epoch in orders)
    parents_own = tuple(windows(stage(corpora, fresh(a, seed=9)), 0, size)["a"])
    if rows > 5:
        assert len({*orders, parents_own}) == 7


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 70),
    parents=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 50)), min_size=1, max_size=3),
    skip=st.tuples(st.integers(0, 20), st.integers(1, 5)),
)
def test_replay_at_another_length_has_only_seen_tokens(
    corpora: dict[str, Corpus], length: int, parents: list[tuple[int, int]], skip: tuple[int, int]
) -> None:
    a = corpora["a"]
    skipped = ((skip[0], skip[0] + skip[1]),)
    seen = [Seen(i, rows, T, skipped if i == 0 else ()) for i, (T, rows) in enumerate(parents)]
    allowed: Counter[int] = Counter()
    available = 0
    for one in seen:
        own = seen_windows(a, one)
        allowed.update(p for w in own for p in range(w * one.sequence_length, (w + 1) * one.sequence_length))
        available += len(own) * one.sequence_length // length
    if not available:
        with pytest.raises(UserError, match="do not fill one row"):
            stage(corpora, replayed(a, *seen), length=length)
        return
    order = stage(corpora, replayed(a, *seen), length=length)
    assert order.available_rows("replay/a") == available
    for start in (0, available):
        drawn: Counter[int] = Counter()
        for row in pairs(order, start, start + available):
            assert len(row) == length
            drawn.update(row)
        assert drawn <= allowed
        assert allowed.total() - drawn.total() < length * len(seen)


def record(*sources: tuple[SourceSpec, int], length: int = LENGTH, **more: Any) -> dict[str, Any]:
    """A stage of a lineage that drew so many rows of each source, as read from JSON."""
    drawn = [{**spec.to_json(), "rows": n, "tokens": n * length, "epochs": 0.1, **more} for spec, n in sources]
    return json.loads(json.dumps({"run": "r", "sequence_length": length, "sources": drawn}))


def test_specs_survive_json(corpora: dict[str, Corpus]) -> None:
    spec = replayed(corpora["a"], Seen(2**62, 5, 16, ((1, 2), (3, 5))), Seen(1, 2, 3))
    assert SourceSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert SourceSpec.from_json(record((spec, 3))["sources"][0]) == spec


def test_replay_has_the_proportions_and_the_draws_of_all_ancestors(corpora: dict[str, Corpus]) -> None:
    a, b, c = (corpora[name] for name in "abc")
    child = replay_sources([record((fresh(a), 30), (fresh(b), 10))], 0.25, 3)
    assert [(s.name, s.role, s.weight) for s in child] == [
        ("replay/a", "replay", pytest.approx(0.25 * 0.75)),
        ("replay/b", "replay", pytest.approx(0.25 * 0.25)),
    ]
    assert [s.seen for s in child] == [(Seen(1, 30, LENGTH),), (Seen(1, 10, LENGTH),)]

    lineage = [
        record((fresh(a), 20), (fresh(b), 10)),
        record((fresh(a, offset_rows=20), 10)),  # a later stage goes on in the same order
        record((fresh(c), 10), (child[0], 5), (child[1], 5)),  # a continuation that replays
        record((fresh(a, seed=8), 4), length=32),
    ]
    grandchild = {s.name: s for s in replay_sources(lineage, 0.5, 3, moved={"b": "/elsewhere"}, max_epochs=2)}
    assert list(grandchild) == ["replay/a", "replay/b", "replay/c"]
    tokens = {"replay/a": 35 * 16 + 4 * 32, "replay/b": 15 * 16, "replay/c": 10 * 16}
    for name, count in tokens.items():
        assert grandchild[name].weight == pytest.approx(0.5 * count / sum(tokens.values()))
        assert grandchild[name].max_epochs == 2
    assert grandchild["replay/a"].seen == (Seen(1, 30, 16), Seen(8, 4, 32))
    assert grandchild["replay/b"].seen == (Seen(1, 10, 16),)
    assert grandchild["replay/b"].corpus == "/elsewhere"
    assert grandchild["replay/a"].corpus == str(a.path)
    assert grandchild["replay/a"].seed != child[0].seed  # the same seed twice does not replay the same rows first


def test_draws_that_were_not_trained_on_are_not_seen(corpora: dict[str, Corpus]) -> None:
    a = corpora["a"]
    lineage = [
        record((fresh(a, offset_rows=5), 10), skipped=[[8, 10]]),  # nothing in the lineage drew the first five
        record((fresh(a, offset_rows=15), 10), skipped=[[24, 25]]),
    ]
    assert replay_sources(lineage, 1, 0)[0].seen == (Seen(1, 24, LENGTH, ((0, 5), (8, 10))),)


def test_corpora_of_one_name_are_told_apart(corpora: dict[str, Corpus]) -> None:
    a, b = corpora["a"], corpora["b"]
    lineage = [record((fresh(a, name="new"), 10)), record((fresh(b, name="new"), 10))]
    specs = replay_sources(lineage, 1, 0, moved={f"new@{b.fingerprint[:8]}": "/b"})
    assert [s.name for s in specs] == [f"replay/new@{corpus.fingerprint[:8]}" for corpus in (a, b)]
    assert [s.corpus for s in specs] == [str(a.path), "/b"]
    again = replay_sources([*lineage, record(*((s, 5) for s in specs))], 1, 0)
    assert [s.name for s in again] == [s.name for s in specs]
    assert [s.seen for s in again] == [s.seen for s in specs]


def test_a_lineage_without_data_cannot_be_replayed() -> None:
    for lineage in ([], [{"sequence_length": 8, "sources": []}]):
        with pytest.raises(UserError, match="nothing to replay"):
            replay_sources(lineage, 0.1, 0)
