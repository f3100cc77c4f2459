"""Metadata and templates around documents: what counts, what the order stays, and what cannot be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.data.corpus import Corpus
from perennial.data.loader import Batch, Loader
from perennial.data.mixture import StageOrder
from perennial.data.prepare import PrepareSettings, prepare
from perennial.data.replay import Seen, SourceSpec
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.objectives.base import IGNORED, StageData
from tests.workspace import Workspace

LENGTH = 48
TITLES = ["Emma", "Der Proze\u00df", "Middlemarch"]


@pytest.fixture(scope="module")
def corpora(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    """One corpus with titles (some documents have none) and one without any metadata."""
    root = tmp_path_factory.mktemp("titled")
    documents = []
    for number, line in enumerate(workspace.new_text.read_text(encoding="utf-8").splitlines()):
        text = json.loads(line)["text"]
        for at in range(0, len(text), 150):
            title = {"title": TITLES[number % 3]} if number % 5 else {}
            documents.append({"text": text[at : at + 150], **title})
    (root / "new.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents), encoding="utf-8")
    settings = {"name": "titled", "inputs": [str(root / "new.jsonl")], "tokenizer": str(workspace.tokenizer)}
    prepare(PrepareSettings.model_validate({**settings, "metadata_fields": ["title"]}), root / "titled")
    return [Corpus.open(root / "titled"), Corpus.open(workspace.old)]


def build(name: str, **given: Any) -> Any:
    objective, problems = plugins.build("objectives", {"name": name, **given})
    assert not problems, problems
    return objective


def stage(corpora: list[Corpus], **changes: Any) -> StageData:
    given = {"seed": 5, "sequence_length": LENGTH, "document_mask": False, "quiet": True, "corpora": tuple(corpora)}
    return StageData(**{**given, **changes})


@contextmanager
def opened(corpora: list[Corpus], arrangement: Any, *, document_mask: bool = False) -> Iterator[Loader]:
    """A mixture of fresh rows, and of rows replayed at another length, which are made of several stretches."""
    seen = (Seen(3, 90, 20),)
    specs = [SourceSpec(c.name, str(c.path), c.fingerprint, 1, "fresh", seed=1) for c in corpora]
    specs.append(SourceSpec("again", str(corpora[0].path), corpora[0].fingerprint, 1, "replay", seed=4, seen=seen))
    of = {c.fingerprint: c for c in corpora}
    order = StageOrder(specs, of, seed=2, sequence_length=LENGTH)
    settings: dict[str, Any] = {"sequence_length": LENGTH, "separator_id": corpora[0].separator_id}
    with Loader(order, of, document_mask=document_mask, arrangement=arrangement, **settings) as loader:
        yield loader


def rows(corpora: list[Corpus], arrangement: Any, start: int = 0, count: int = 60, **how: Any) -> Batch:
    with opened(corpora, arrangement, **how) as loader:
        batch = loader.at(start, count)
        segments = None if batch.segments is None else batch.segments.copy()
        return Batch(batch.inputs.copy(), batch.targets.copy(), segments, batch.source, batch.windows)


def arrangement(objective: Any, corpora: list[Corpus], **changes: Any) -> Any:
    return objective.arrangement(stage([*corpora, corpora[0]], **changes))


def prefix_ids(corpora: list[Corpus], text: str) -> list[int]:
    return TokenizerFolder.open(corpora[0].path / "tokenizer").encoder().encode(text, add_special_tokens=False).ids


def test_without_text_to_add_rows_are_as_they_were(corpora: list[Corpus]) -> None:
    """The corpus without metadata, and both under document masks: the same arithmetic gives the rows that were read."""
    untitled = [corpora[1]]
    nothing = build("metadata", template="{missing}").arrangement(stage([untitled[0], untitled[0]]))
    for mask in (False, True):
        given = [rows(untitled, made, document_mask=mask) for made in (None, nothing)]
        for name in ("inputs", "targets"):
            assert np.array_equal(getattr(given[0], name), getattr(given[1], name))
    masked = build("metadata", template="{missing}").arrangement(stage([untitled[0]] * 2, document_mask=True))
    one, other = rows(untitled, None, document_mask=True), rows(untitled, masked, document_mask=True)
    assert one.segments is not None
    assert other.segments is not None
    assert np.array_equal(np.diff(one.segments), np.diff(other.segments))


@pytest.mark.parametrize("mask", [False, True])
def test_titles_are_read_and_not_counted(corpora: list[Corpus], mask: bool) -> None:
    made = arrangement(build("metadata", template="Title: {title}\n\n"), corpora, document_mask=mask)
    plain, titled = (rows(corpora, one, document_mask=mask) for one in (None, made))
    prefixes = [prefix_ids(corpora, f"Title: {title}\n\n") for title in TITLES]
    separator, found = corpora[0].separator_id, 0
    for row in range(60):
        inputs, targets = titled.inputs[row], titled.targets[row]
        counted = targets[targets != IGNORED].tolist()
        assert counted == plain.targets[row, : len(counted)].tolist()  # the text, from the row's beginning on
        if plain.source[row] == 1:
            assert np.array_equal(targets, plain.targets[row])
            assert np.array_equal(inputs, plain.inputs[row])
            continue
        kept = targets[:-1] != IGNORED
        if plain.source[row] == 0:  # within replayed rows stretches of the corpus meet
            assert np.array_equal(inputs[1:][kept], targets[:-1][kept])
        for at in np.flatnonzero(inputs == separator).tolist():
            after = inputs[at + 1 :].tolist()
            known = [p for p in prefixes if after[: len(p)] == p[: len(after)] and len(after) > len(p)]
            if known:
                found += 1
                assert (targets[at : at + len(known[0])] == IGNORED).all()
                assert targets[at + len(known[0])] != IGNORED
        if mask:
            assert titled.segments is not None
            assert (np.diff(titled.segments[row])[inputs[1:] == separator] == 1).all()
    assert found > 40


def test_a_template_goes_around_the_text_and_counts(corpora: list[Corpus]) -> None:
    objective = build("prompt_template", template="Code:\n{text}\nFrom {title}.")
    both = [
        rows(corpora, arrangement(build("prompt_template", template=objective.template, counted=how), corpora))
        for how in ("all", "text")
    ]
    plain = rows(corpora, None)
    before = prefix_ids(corpora, "Code:\n")
    endings = [prefix_ids(corpora, f"\nFrom {title}.") for title in TITLES]
    separator, ended = corpora[0].separator_id, 0
    for row in range(60):
        everything, text = (batch.targets[row] for batch in both)
        assert np.array_equal(both[0].inputs[row], both[1].inputs[row])
        counted = text[text != IGNORED].tolist()
        assert counted == plain.targets[row, : len(counted)].tolist()
        full = everything[everything != IGNORED].tolist()
        assert full == everything[: len(full)].tolist()
        assert len(full) >= len(counted)
        for at in [i for i, token in enumerate(full) if token == separator]:
            ended += any(full[max(0, at - len(e)) : at] == e for e in endings)
        if plain.source[row] == 0 and full[: len(before)] == before:
            assert (text[: len(before)] == IGNORED).all()
    assert ended > 10


def test_a_row_is_a_function_of_its_position(corpora: list[Corpus]) -> None:
    made = arrangement(build("metadata", template="{title}: "), corpora)
    together = rows(corpora, made, 0, 60)
    for start, count in ((0, 7), (13, 1), (30, 20)):
        part = rows(corpora, made, start, count)
        assert np.array_equal(part.inputs, together.inputs[start : start + count])
        assert np.array_equal(part.targets, together.targets[start : start + count])


def test_fields_that_no_corpus_has_are_named(corpora: list[Corpus]) -> None:
    with pytest.raises(UserError, match="metadata field 'tilte'.*they keep: title.*--metadata-field tilte.*'title'"):
        build("metadata", template="{tilte}").check(stage(corpora))
    with pytest.raises(UserError, match="they keep none"):
        build("metadata", template="{title}").check(stage([corpora[1]]))
    build("metadata", template="{title}").check(stage(corpora))  # one of them has it
    build("prompt_template", template="A text: {text}").check(stage([corpora[1]]))


@pytest.mark.parametrize(
    ("name", "template", "words"),
    [
        ("metadata", "no field", "names no metadata field"),
        ("metadata", "{a b}", "plain name"),
        ("metadata", "{", "braces"),
        ("prompt_template", "no text", "must hold '{text}' once"),
        ("prompt_template", "{text}", "something around it"),
        ("prompt_template", "{text} {text}", "once"),
    ],
)
def test_templates_that_cannot_be_filled_in_are_refused(name: str, template: str, words: str) -> None:
    _, problems = plugins.build("objectives", {"name": name, "template": template})
    assert any(words in problem.message for problem in problems), problems


def test_a_prefix_longer_than_the_row_leaves_nothing_to_count(corpora: list[Corpus], tmp_path: Path) -> None:
    made = arrangement(build("metadata", template="{title} " * 40), corpora)
    batch = rows(corpora, made)
    titled = batch.source == 0
    assert (batch.targets[titled] == IGNORED).any(axis=1).any()
    assert (batch.inputs >= 0).all()
