"""Denoising: every row can be put together again, its cuts are those of its number, and nothing else is a target."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.data.corpus import Corpus
from perennial.data.loader import Batch, Loader
from perennial.data.mixture import StageOrder
from perennial.data.replay import SourceSpec
from perennial.objectives.base import IGNORED, StageData
from tests.workspace import Workspace

LENGTH = 64


def denoising(**given: Any) -> Any:
    objective, problems = plugins.build("objectives", {"name": "denoising", **given})
    assert not problems, problems
    return objective


def stage(corpus: Corpus, **changes: Any) -> StageData:
    given = {"seed": 5, "sequence_length": LENGTH, "document_mask": False, "quiet": True, "corpora": (corpus,)}
    return StageData(**{**given, **changes})


def loader(corpus: Corpus, arrangement: Any) -> Loader:
    spec = SourceSpec("old", str(corpus.path), corpus.fingerprint, 1, "fresh", seed=1)
    of = {corpus.fingerprint: corpus}
    order = StageOrder([spec], of, seed=2, sequence_length=LENGTH)
    separator = corpus.separator_id
    return Loader(
        order, of, sequence_length=LENGTH, document_mask=False, separator_id=separator, arrangement=arrangement
    )


def read(corpus: Corpus, objective: Any, start: int, count: int) -> tuple[Batch, Batch]:
    """The same rows as they are stored and as they are trained on."""
    batches = []
    for arrangement in (None, objective.arrangement(stage(corpus))):
        with loader(corpus, arrangement) as opened:
            batch = opened.at(start, count)
            batches.append(Batch(batch.inputs.copy(), batch.targets.copy(), None, batch.source, batch.windows))
    return batches[0], batches[1]


@pytest.fixture(scope="module")
def corpus(workspace: Workspace) -> Corpus:
    return Corpus.open(workspace.old)


def ids(corpus: Corpus, text: str) -> list[int]:
    from perennial.data.tokenizers.folder import TokenizerFolder

    return TokenizerFolder.open(corpus.path / "tokenizer").encoder().encode(text, add_special_tokens=False).ids


def whole(row_inputs: np.ndarray, row_targets: np.ndarray) -> tuple[list[int], list[bool]]:
    """A row as one sequence, and for each of its tokens whether it is a target that counts."""
    return [int(row_inputs[0]), *row_targets.tolist()], [False, *(row_targets != IGNORED).tolist()]


SPANS = {"denoisers": [{"mode": "[R]", "weight": 1, "corrupted": 0.3, "span": 2}]}


def test_spans_put_back_are_the_text(corpus: Corpus) -> None:
    plain, cut = read(corpus, denoising(**SPANS), 0, 40)
    mode, sentinels = ids(corpus, "[R]"), [ids(corpus, f"<{n}>") for n in range(40)]
    for row in range(40):
        counted = np.flatnonzero(cut.targets[row] != IGNORED)
        first, last = int(counted[0]), int(counted[-1])
        assert (np.diff(counted) == 1).all()
        given = [int(token) for token in cut.inputs[row, : first + 1]]
        filled = [int(token) for token in cut.targets[row, first : last + 1]]
        assert given[0] == corpus.separator_id
        assert given[1 : 1 + len(mode)] == mode
        assert filled[-1] == corpus.separator_id
        text = plain.targets[row].tolist()
        spans = next(
            n
            for n in range(39, 0, -1)
            if filled[:-1][-len(sentinels[n]) :] == sentinels[n] and filled[: len(sentinels[0])] == sentinels[0]
        )
        found = _put_back(given[1 + len(mode) :], filled[:-1], sentinels[: spans + 1], text)
        assert found == text[: len(found)]
        assert len(found) > 0.4 * LENGTH  # sentinels take three or four ids each here
        assert 0.2 < (len(filled) - 1 - sum(map(len, sentinels[: spans + 1]))) / len(found) < 0.4
        assert (cut.targets[row, last + 1 :] == IGNORED).all()
        after_first = cut.inputs[row, first + 1 : last + 1]
        assert np.array_equal(after_first, cut.targets[row, first:last])  # each input is the target before it


def _put_back(given: list[int], filled: list[int], sentinels: list[list[int]], text: list[int]) -> list[int]:
    """The text whose gaps are in `given` and whose spans are in `filled`, by walking along `text`."""
    place, result = 0, []
    at = 0
    for number, sentinel in enumerate(sentinels[:-1]):
        while given[at : at + len(sentinel)] != sentinel or text[place : place + len(sentinel)] == sentinel:
            result.append(given[at])
            at, place = at + 1, place + 1
        at += len(sentinel)
        assert filled[: len(sentinel)] == sentinel
        filled = filled[len(sentinel) :]
        closing = sentinels[number + 1]
        span = 0
        while filled[span : span + len(closing)] != closing:
            span += 1
        assert span > 0
        result += filled[:span]
        place += span
        filled = filled[span:]
    assert at == len(given)
    return result


def test_without_spans_the_end_is_to_be_continued(corpus: Corpus) -> None:
    objective = denoising(denoisers=[{"mode": "[S]", "weight": 1, "corrupted": 0.25}])
    plain, cut = read(corpus, objective, 3, 5)
    mode = ids(corpus, "[S]")
    taken = LENGTH - len(mode) - 1
    for row in range(5):
        sequence, counts = whole(cut.inputs[row], cut.targets[row])
        shown = cut.inputs[row, 1:].tolist()
        assert shown[: len(mode)] == mode
        assert shown[len(mode) : len(mode) + taken] == plain.targets[row, :taken].tolist()
        assert sum(counts) == round(0.25 * taken) + 1
        assert sequence[-1] == corpus.separator_id


def test_a_row_is_a_function_of_its_number_alone(corpus: Corpus) -> None:
    objective = denoising()
    _, together = read(corpus, objective, 0, 24)
    for start, count in ((0, 5), (7, 1), (11, 13)):
        _, part = read(corpus, objective, start, count)
        assert np.array_equal(part.inputs, together.inputs[start : start + count])
        assert np.array_equal(part.targets, together.targets[start : start + count])
    other = denoising().arrangement(stage(corpus, seed=6))
    with loader(corpus, other) as opened:
        assert not np.array_equal(opened.at(0, 24).inputs, together.inputs)


def test_kinds_come_by_their_weight_and_share_leaves_rows_alone(corpus: Corpus) -> None:
    plain, cut = read(corpus, denoising(share=0.75), 0, 2000)
    modes = {text: ids(corpus, text) for text in ("[S]", "[R]", "[X]")}
    found: Counter[str] = Counter()
    for row in range(2000):
        if np.array_equal(cut.targets[row], plain.targets[row]):
            found["plain"] += 1
            continue
        begins = cut.inputs[row, 1:].tolist()
        found[next(text for text, mode in modes.items() if begins[: len(mode)] == mode)] += 1
    shares = {kind: count / 2000 for kind, count in found.items()}
    assert shares == pytest.approx({"plain": 0.25, "[S]": 0.375, "[R]": 0.1875, "[X]": 0.1875}, abs=0.04)


def test_what_cannot_be_is_said_before_anything_runs(corpus: Corpus) -> None:
    with pytest.raises(UserError, match="document_mask: false"):
        denoising().check(stage(corpus, document_mask=True))
    with pytest.raises(UserError, match="rows of 8 tokens .* too short"):
        denoising().check(stage(corpus, sequence_length=8))
    denoising().check(stage(corpus))
    refused: list[dict[str, Any]] = [{"denoisers": []}, {"share": 0}, {"sentinel": "<extra>"}, {"denoisers": [{}]}]
    for wrong in refused:
        assert plugins.build("objectives", {"name": "denoising", **wrong})[1]


def test_every_denoiser_fits_the_row(corpus: Corpus) -> None:
    """The plan of a row is made once for each denoiser."""
    arrangement = denoising().arrangement(stage(corpus))
    assert len(arrangement._cuts) == 7
    assert all(0 < cut.cut_out < cut.taken <= LENGTH for cut in arrangement._cuts)
