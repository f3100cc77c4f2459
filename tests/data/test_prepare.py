"""Raw text to a prepared corpus: its content, its refusals, and the same bytes however often it is interrupted."""

from __future__ import annotations

import errno
import json
import os
import pydoc_data.topics
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perennial.core import files
from perennial.core.errors import UserError
from perennial.core.settings import check
from perennial.data import pipeline, sources
from perennial.data.corpus import Corpus
from perennial.data.documents import content_digest
from perennial.data.prepare import PrepareSettings, prepare
from perennial.data.shards import AppendFile
from perennial.data.splits import VALIDATION, split_of
from perennial.data.tokenizers.engine import FastEngine, ReferenceEngine
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.data.tokenizers.train import train_tokenizer

NUM_RECORDS = 400


def records() -> list[dict[str, Any]]:
    """Paragraphs of Python's own documentation; every tenth is a copy of another, but every fiftieth is blank."""
    topics = sorted(pydoc_data.topics.topics.items())
    paragraphs = list(dict.fromkeys(p.strip() for _, topic in topics for p in topic.split("\n\n") if len(p) > 80))
    found: list[dict[str, Any]] = []
    for number in range(NUM_RECORDS):
        text = paragraphs[number * 3]
        if number % 50 == 49:
            text = " \n"
        elif number % 10 == 9:
            text = str(found[number - 5]["text"]).replace("\n", "\r\n") + "\n\n"
        found.append({"id": f"id-{number}", "text": text, "book": f"book-{number // 20}", "n": number})
    return found


def write_jsonl(path: Path, found: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two files of text and a tokenizer beside it."""
    root = tmp_path_factory.mktemp("raw")
    (root / "text").mkdir()
    write_jsonl(root / "text/a.jsonl", records()[:250])
    write_jsonl(root / "text/b.jsonl", records()[250:])
    train_tokenizer([root / "text"], root / "tokenizer", vocabulary_size=500)
    return root


def settings(raw: Path, **changes: Any) -> PrepareSettings:
    values = {
        "name": "topics",
        "inputs": [str(raw / "text")],
        "tokenizer": str(raw / "tokenizer"),
        "id_field": "id",
        "metadata_fields": ["book"],
        "validation": "10%",
    }
    return PrepareSettings.model_validate({**values, **changes})


def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, batches and commits, as a large corpus has."""
    monkeypatch.setattr(pipeline, "_BLOCK_BYTES", 3000)
    monkeypatch.setattr(pipeline, "_BATCH_BYTES", 12_000)
    monkeypatch.setattr(pipeline, "_COMMIT_SECONDS", 0.0)


def content(folder: Path) -> dict[str, str]:
    """Every file's sha256."""
    return {p.relative_to(folder).as_posix(): files.sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


# Content


def test_stored_tokens_are_the_documents(raw: Path, tmp_path: Path) -> None:
    manifest = prepare(settings(raw), tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out", checksums=True)
    engine = ReferenceEngine(TokenizerFolder.open(raw / "tokenizer").for_encoding(), "")
    texts = {record["id"]: record["text"] for record in records()}
    seen: set[str] = set()
    for split in (corpus.train, corpus.validation):
        ends = [0, *split.document_ends().tolist()]
        for index, document in enumerate(split.documents()):
            text = texts[document["id"]]
            ids = engine.encode_batch([text])[0].tolist()
            assert split.tokens(ends[index], ends[index + 1]).tolist() == [*ids, corpus.separator_id]
            assert split.document_bytes()[index] == len(text.encode())
            assert document["metadata"] == {"book": f"book-{int(document['id'][3:]) // 20}"}
            seen.add(document["id"])
    counts = manifest["counts"]
    assert counts["read"] == NUM_RECORDS
    assert counts["dropped"] == {"duplicate": 32, "empty": 8}
    assert counts["kept"] == len(seen) == NUM_RECORDS - 40
    assert manifest["splits"]["validation"]["documents"] == corpus.validation.num_documents > 10
    assert (manifest["format"], manifest["dtype"], manifest["tokenizer"]["vocabulary_size"]) == (1, "uint16", 500)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_dropped_documents_are_logged_with_file_and_line(raw: Path, tmp_path: Path) -> None:
    prepare(settings(raw), tmp_path / "out")
    logged = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in logged] == [f"id-{n}" for n in range(9, NUM_RECORDS, 10)]
    assert {entry["reason"] for entry in logged} == {"duplicate", "empty"}
    assert (logged[-1]["file"], logged[-1]["line"]) == (str(raw / "text/b.jsonl"), 150)


def test_batches_and_shards_change_nothing_in_the_stream(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(settings(raw), tmp_path / "whole")
    small_steps(monkeypatch)
    again = prepare(settings(raw), tmp_path / "again")
    assert again["fingerprint"] == whole["fingerprint"]
    sharded = prepare(settings(raw, shard_tokens=1000), tmp_path / "sharded")
    assert len(sharded["splits"]["train"]["shards"]) > 10
    one, other = Corpus.open(tmp_path / "whole"), Corpus.open(tmp_path / "sharded", checksums=True)
    for a, b in ((one.train, other.train), (one.validation, other.validation)):
        assert np.array_equal(a.tokens(0, a.num_tokens), b.tokens(0, b.num_tokens))
        assert np.array_equal(a.document_ends(), b.document_ends())
        assert list(a.documents()) == list(b.documents())
    sizes = [path.stat().st_size // 2 for path in (tmp_path / "sharded/train").glob("*.ds")]
    longest = int(np.diff(other.train.document_ends(), prepend=np.uint64(0)).max())
    assert max(sizes) <= max(1000, longest)


def test_document_longer_than_a_shard_has_one_for_itself(raw: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "few.jsonl", records()[:40])
    manifest = prepare(settings(raw, inputs=[str(path)], shard_tokens=1), tmp_path / "out")
    assert len(manifest["splits"]["train"]["shards"]) == manifest["splits"]["train"]["documents"] > 30
    assert Corpus.open(tmp_path / "out").train.num_documents == manifest["splits"]["train"]["documents"]


def test_fingerprint_is_of_the_tokens_not_of_name_or_place(raw: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((raw / "text/a.jsonl").read_bytes() + (raw / "text/b.jsonl").read_bytes())
    one = prepare(settings(raw), tmp_path / "one")
    other = prepare(settings(raw, name="other", inputs=[str(moved)], metadata_fields=[]), tmp_path / "other")
    assert one["fingerprint"] == other["fingerprint"]
    third = prepare(settings(raw, validation="20%"), tmp_path / "third")
    assert one["fingerprint"] != third["fingerprint"]


def test_split_stays_as_the_corpus_grows(raw: Path, tmp_path: Path) -> None:
    part = write_jsonl(tmp_path / "part.jsonl", records()[100:300])
    prepare(settings(raw, inputs=[str(part)]), tmp_path / "small")
    prepare(settings(raw), tmp_path / "large")
    small, large = Corpus.open(tmp_path / "small"), Corpus.open(tmp_path / "large")
    held_out = [document["id"] for document in large.validation.documents()]
    kept = {document["id"] for split in (large.train, large.validation) for document in split.documents()}
    assert {d["id"] for d in small.validation.documents()} & kept <= set(held_out)
    assert not {d["id"] for d in small.train.documents()} & set(held_out)


def test_split_by_keeps_groups_together(raw: Path, tmp_path: Path) -> None:
    prepare(settings(raw, split_by="book", metadata_fields=[], validation="20%"), tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out")
    books = {document["metadata"]["book"] for document in corpus.validation.documents()}
    assert books == {f"book-{n}" for n in range(20) if split_of(f"book-{n}".encode(), 0.2) == VALIDATION}
    assert not books & {document["metadata"]["book"] for document in corpus.train.documents()}
    nameless = write_jsonl(tmp_path / "nameless.jsonl", [*records()[:30], {"id": "x", "text": "no book here"}])
    with pytest.raises(UserError, match=r"nameless.jsonl:31: no value for 'book' \(split_by\)"):
        prepare(settings(raw, inputs=[str(nameless)], split_by="book"), tmp_path / "nameless")


def test_duplicates_of_another_corpus_are_dropped(raw: Path, tmp_path: Path) -> None:
    old = write_jsonl(tmp_path / "old.jsonl", records()[:100])
    prepare(settings(raw, name="old", inputs=[str(old)]), tmp_path / "old")
    manifest = prepare(settings(raw, against=[str(tmp_path / "old")]), tmp_path / "new")
    assert manifest["counts"]["dropped"]["duplicate of old"] == 90 + 8
    assert manifest["counts"]["kept"] == 360 - 90
    with pytest.raises(UserError, match="no document is left of the 100 read.*'duplicate of old'"):
        prepare(settings(raw, inputs=[str(old)], against=[str(tmp_path / "old")]), tmp_path / "none")
    with pytest.raises(UserError, match="no such prepared corpus"):
        prepare(settings(raw, against=[str(tmp_path)]), tmp_path / "none")
    assert not (tmp_path / "none.partial").exists()


def test_duplicates_across_batches_in_flight(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are found whether the first is in the same block, on its way through the tokenizer, or written."""
    monkeypatch.setattr(pipeline, "_BATCH_BYTES", 1000)
    some = [{"id": n, "text": f"text number {n % 37} " * 5} for n in range(800)]
    path = write_jsonl(tmp_path / "copies.jsonl", some)
    for block in (500, 10_000, 1 << 20):
        monkeypatch.setattr(pipeline, "_BLOCK_BYTES", block)
        manifest = prepare(settings(raw, inputs=[str(path)], metadata_fields=[]), tmp_path / f"out{block}")
        counts = manifest["counts"]
        assert counts == {"read": 800, "added_by_cutting": 0, "kept": 37, "dropped": {"duplicate": 763}}


def test_long_documents_are_cut(raw: Path, tmp_path: Path) -> None:
    long = "\n\n".join(record["text"].strip() for record in records()[:49])
    path = write_jsonl(tmp_path / "long.jsonl", [{"id": "long", "text": long}, *records()[50:80]])
    changes = {"inputs": [str(path)], "metadata_fields": [], "max_document_bytes": 800}
    manifest = prepare(settings(raw, **changes), tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out")
    parts = [d["id"] for split in (corpus.train, corpus.validation) for d in split.documents() if "long#" in d["id"]]
    assert sorted(parts, key=lambda part: int(part[5:])) == [f"long#{n}" for n in range(len(parts))]
    assert len(parts) > 10
    assert corpus.train.document_bytes().max() <= 800
    counts = manifest["counts"]
    assert counts["read"] == 31
    assert counts["read"] + counts["added_by_cutting"] == counts["kept"] + sum(counts["dropped"].values())


def test_filters_drop_with_their_reason(raw: Path, tmp_path: Path) -> None:
    manifest = prepare(settings(raw, filters=[{"name": "length", "min_bytes": 200}]), tmp_path / "out")
    short = sum(len(r["text"].encode()) < 200 for r in records() if r["text"].strip())
    assert manifest["counts"]["dropped"]["too short"] == short > 0
    assert manifest["settings"]["filters"] == [{"name": "length", "min_bytes": 200, "max_bytes": None}]


def test_control_token_in_the_text_stays_text(raw: Path, tmp_path: Path) -> None:
    spelled = [{"id": n, "text": f"{n} before<|endoftext|>after, <|endoftext|>"} for n in range(100)]
    path = write_jsonl(tmp_path / "spelled.jsonl", spelled)
    manifest = prepare(settings(raw, inputs=[str(path)], metadata_fields=[]), tmp_path / "out")
    train = Corpus.open(tmp_path / "out").train
    assert np.count_nonzero(train.tokens(0, train.num_tokens) == 0) == manifest["splits"]["train"]["documents"]


def test_progress_reaches_the_total(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_steps(monkeypatch)
    steps: list[tuple[int, int, str]] = []
    prepare(settings(raw), tmp_path / "out", progress=lambda *step: steps.append(step))
    total = sum(path.stat().st_size for path in (raw / "text").iterdir())
    assert {step[1] for step in steps} == {total}
    done = [step[0] for step in steps]
    assert done == sorted(done)
    assert done[-1] == total
    assert "360 documents" in steps[-1][2]


# Engines


def test_manifest_says_which_engine_and_why(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastokens")
    fast = prepare(settings(raw), tmp_path / "fast")
    assert fast["tokenizer"]["engine"] == "fastokens"
    assert fast["tokenizer"]["verified_sample"]["documents"] > 3
    monkeypatch.setitem(sys.modules, "fastokens", None)
    slow = prepare(settings(raw), tmp_path / "slow")
    assert slow["tokenizer"]["engine"] == "tokenizers"
    assert slow["tokenizer"]["engine_reason"] == "fastokens is not installed"
    assert slow["tokenizer"]["verified_sample"] is None
    assert slow["fingerprint"] == fast["fingerprint"]


def test_engine_that_differs_in_the_middle_is_replaced(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastokens")
    small_steps(monkeypatch)
    encode = FastEngine.encode_batch
    late = {record["text"] for record in records()[250:]}

    def wrong(self: FastEngine, texts: Sequence[str]) -> Any:
        ids, ends = encode(self, texts)
        return (np.where(ids > 300, 300, ids) if late.intersection(texts) else ids), ends

    right = prepare(settings(raw), tmp_path / "right")
    monkeypatch.setattr(FastEngine, "encode_batch", wrong)
    manifest = prepare(settings(raw), tmp_path / "out")
    assert manifest["tokenizer"]["engine"] == "tokenizers"
    assert "gives other ids for document 'id-" in manifest["tokenizer"]["engine_reason"]
    assert manifest["fingerprint"] == right["fingerprint"]


# Interruption


CHILD = """
import os, signal, sys
from pathlib import Path
from perennial.core import files
from perennial.data import pipeline, prepare as module, shards, dedup
from perennial.data.prepare import PrepareSettings, prepare
pipeline._BLOCK_BYTES, pipeline._BATCH_BYTES, pipeline._COMMIT_SECONDS = 3000, 12000, 0.0
where, count = sys.argv[3], int(sys.argv[4])
owners = {"write": shards.AppendFile, "sync": shards.AppendFile, "add": dedup.Journal, "commit": dedup.Journal,
          "export": dedup.Journal, "write_json": files, "replace": os, "publish": files, "nothing": None}
name = where.removeprefix("after ")
owner = owners[name]
def die():
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
if owner:
    original = getattr(owner, name)
    def patched(*args):
        if not where.startswith("after"):
            die()
        result = original(*args)
        if where.startswith("after"):
            die()
        return result
    setattr(owner, name, patched)
def progress(done, total, note):
    print(done, flush=True)
prepare(PrepareSettings.model_validate_json(sys.argv[1]), Path(sys.argv[2]), progress=progress)
"""


def start_child(wanted: PrepareSettings, out: Path, where: str, count: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, json.dumps(wanted.resolved()), str(out), where, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def run_child(wanted: PrepareSettings, out: Path, where: str, count: int) -> int:
    with start_child(wanted, out, where, count) as child:
        child.communicate(timeout=60)
        return int(child.returncode)


@pytest.mark.parametrize(
    "moments",
    [
        [("commit", 1), ("after commit", 1), ("write", 3), ("sync", 8), ("publish", 1)],
        [("after add", 4), ("commit", 3), ("after sync", 11), ("replace", 1), ("after write_json", 1)],
    ],
)
def test_kill_and_run_again_gives_the_same_bytes(
    raw: Path, tmp_path: Path, moments: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at exact moments of one preparation, one after the other; then it is run to its end."""
    small_steps(monkeypatch)
    wanted = settings(raw, shard_tokens=4000, max_document_bytes=400)
    prepare(wanted, tmp_path / "straight")
    for where, count in moments:
        assert run_child(wanted, tmp_path / "out", where, count) == -signal.SIGKILL, (where, count)
        assert not (tmp_path / "out").exists()
    prepare(wanted, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "straight")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "straight"]


def test_kill_from_outside_at_any_time(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_steps(monkeypatch)
    prepare(settings(raw), tmp_path / "straight")
    for num_lines in (2, 9):
        with start_child(settings(raw), tmp_path / "out", "nothing") as child:
            assert child.stdout is not None
            for _ in range(num_lines):
                child.stdout.readline()
            child.kill()
    manifest = prepare(settings(raw), tmp_path / "out")
    assert manifest["counts"]["kept"] == 360
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def interrupt_after(num_calls: int, error: BaseException) -> Callable[[int, int, str], None]:
    calls = iter(range(num_calls))

    def progress(done: int, total: int, note: str) -> None:
        if next(calls, None) is None:
            raise error

    return progress


def test_ctrl_c_can_be_gone_on_from(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_steps(monkeypatch)
    prepare(settings(raw), tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt, match="run the same command again to go on"):
        prepare(settings(raw), tmp_path / "out", progress=interrupt_after(25, KeyboardInterrupt()))
    assert not (tmp_path / "out").exists()
    first: list[int] = []
    prepare(settings(raw), tmp_path / "out", progress=lambda done, total, note: first.append(done))
    assert first[0] > 0, "it went on, and did not begin anew"
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_interrupted_metadata_check_is_not_lost(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_steps(monkeypatch)
    wanted = settings(raw, metadata_fields=["boook"])
    with pytest.raises(KeyboardInterrupt):
        prepare(wanted, tmp_path / "out", progress=interrupt_after(25, KeyboardInterrupt()))
    with pytest.raises(UserError, match=r"no field 'boook' \(metadata_fields\)"):
        prepare(wanted, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_other_settings_or_inputs_are_refused(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_steps(monkeypatch)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((raw / "text/a.jsonl").read_bytes())
    wanted = settings(raw, inputs=[str(copy)])
    with pytest.raises(KeyboardInterrupt):
        prepare(wanted, tmp_path / "out", progress=interrupt_after(25, KeyboardInterrupt()))
    before = content(tmp_path / "out.partial")
    with pytest.raises(UserError, match=r"interrupted preparation with other settings .*\(different: validation\)"):
        prepare(settings(raw, inputs=[str(copy)], validation="9%"), tmp_path / "out")
    assert content(tmp_path / "out.partial").keys() == before.keys()
    facts = copy.stat()
    os.utime(copy, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    with pytest.raises(UserError, match=r"\(different: inputs\); .*delete"):
        prepare(wanted, tmp_path / "out")
    os.utime(copy, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    prepare(wanted, tmp_path / "out")
    with pytest.raises(UserError, match=r"holds a corpus prepared with other settings .*\(different: name\)"):
        prepare(settings(raw, inputs=[str(copy)], name="other"), tmp_path / "out")


def test_a_copy_of_the_inputs_is_the_same_text(raw: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.jsonl", tmp_path / "elsewhere"
    copy.write_bytes((raw / "text/a.jsonl").read_bytes())
    manifest = prepare(settings(raw, inputs=[str(copy)]), tmp_path / "out")
    os.utime(copy, ns=(0, 0))
    assert prepare(settings(raw, inputs=[str(copy)]), tmp_path / "out") == manifest
    other.mkdir()
    moved = copy.rename(other / copy.name)
    assert prepare(settings(raw, inputs=[str(moved)]), tmp_path / "out") == manifest
    text = moved.read_bytes()
    moved.write_bytes(text[:-9] + bytes(reversed(text[-9:])))  # as long as before
    with pytest.raises(UserError, match=r"\(different: inputs\)"):
        prepare(settings(raw, inputs=[str(moved)]), tmp_path / "out")


def test_inputs_too_large_to_read_twice_are_known_by_their_times(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHECKSUM_BYTES", 100)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((raw / "text/a.jsonl").read_bytes())
    manifest = prepare(settings(raw, inputs=[str(copy)]), tmp_path / "out")
    assert manifest["inputs"][0]["contents"] is None
    os.utime(copy, ns=(0, 0))
    with pytest.raises(UserError, match=r"\(different: inputs\)"):
        prepare(settings(raw, inputs=[str(copy)]), tmp_path / "out")


def test_finished_corpus_is_returned_at_once(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((raw / "text/a.jsonl").read_bytes())
    wanted = settings(raw, inputs=[str(copy)])
    (tmp_path / "out").mkdir()
    manifest = prepare(wanted, tmp_path / "out")
    monkeypatch.setattr(sources, "documents", None)
    assert prepare(wanted, tmp_path / "out") == manifest
    copy.unlink()
    assert prepare(wanted, tmp_path / "out") == manifest


def test_two_preparations_at_once_are_refused(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_steps(monkeypatch)

    def second(done: int, total: int, note: str) -> None:
        with pytest.raises(UserError, match="another process is preparing this corpus"):
            prepare(settings(raw), tmp_path / "out")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(settings(raw), tmp_path / "out", progress=second)


# Bad input and full disks


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("", {}, "is empty"),
        ("\n\n", {}, "there is no document in it"),
        ('{"text": "x"', {"id_field": None}, r"input\.jsonl:1: broken JSON"),
        ('{"id": 1, "txt": "x"}', {}, r"input\.jsonl:1: no field 'text' \(text_field\)"),
        ('{"id": 1, "text": "  "}', {}, "no document is left of the 1 read; dropped: 1 'empty'"),
        (
            '{"id": 1, "text": "x"}',
            {"validation": "1%"},
            "none of the 1 documents falls into validation.*raise validation",
        ),
        ('{"id": 1, "text": "x"}', {"tokenizer": "nowhere"}, "no such tokenizer folder"),
        ('{"id": 1, "text": "x"}', {"against": ["nowhere"]}, "no such prepared corpus"),
    ],
)
def test_bad_input_leaves_nothing(raw: Path, tmp_path: Path, text: str, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "input.jsonl").write_text(text)
    wanted = settings(raw, **{"inputs": [str(tmp_path / "input.jsonl")], "metadata_fields": [], **changes})
    with pytest.raises(UserError, match=message):
        prepare(wanted, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["input.jsonl"]


def test_no_train_document(raw: Path, tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(99)]
    text = next(t for t in texts if split_of(content_digest(t.encode()), 0.5) == VALIDATION)
    path = write_jsonl(tmp_path / "input.jsonl", [{"id": 1, "text": text}])
    with pytest.raises(UserError, match="none of the 1 documents falls into train at a validation of 50%; lower"):
        prepare(settings(raw, inputs=[str(path)], metadata_fields=[], validation="50%"), tmp_path / "out")


def test_places_that_are_taken(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine").write_text("mine")
    (tmp_path / "way.partial").mkdir()
    (tmp_path / "way.partial/mine").write_text("mine")
    before = content(tmp_path)
    for name, message in (
        ("file", "not a prepared corpus"),
        ("folder", "not a prepared corpus"),
        ("way", "in the way"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(settings(raw), tmp_path / name)
    with pytest.raises(UserError, match="lies inside the input"):
        prepare(settings(raw), raw / "text/out")
    assert content(tmp_path) == before


def test_settings_name_all_that_is_wrong(raw: Path) -> None:
    _, problems = check(
        PrepareSettings,
        {
            "name": "x",
            "inputs": [],
            "tokenizer": "t",
            "validation": "60%",
            "reader": "jsonk",
            "filters": [{"name": "length", "min_byte": 3}],
            "max_document_bytes": 1,
            "validations": "1%",
        },
    )
    texts = "\n".join(problem.text({}) for problem in problems)
    for message in (
        "inputs: ",
        "60% must be above 0% and at most 50%",
        "no readers component 'jsonk'",
        "unknown setting 'min_byte'. Did you mean 'min_bytes'",
        "max_document_bytes: ",
        "unknown setting 'validations'. Did you mean 'validation'",
    ):
        assert message in texts


def test_input_that_changes_while_it_is_read(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((raw / "text/a.jsonl").read_bytes())

    def progress(done: int, total: int, note: str) -> None:
        if done == total:
            copy.write_text(copy.read_text() + "\n")

    with pytest.raises(UserError, match="changed while they were read"):
        prepare(settings(raw, inputs=[str(copy)]), tmp_path / "out", progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["copy.jsonl"]


def test_full_disk_is_one_clear_error_and_can_be_gone_on_from(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_steps(monkeypatch)
    prepare(settings(raw), tmp_path / "straight")
    write = AppendFile.write
    room = [30_000]

    def limited(self: AppendFile, data: bytes | memoryview) -> None:
        room[0] -= len(data)
        if room[0] < 0:
            write(self, bytes(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(AppendFile, "write", limited)
        with pytest.raises(UserError, match="the disk is full.*run the same command again to go on"):
            prepare(settings(raw), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prepare(settings(raw), tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "straight")


@pytest.mark.parametrize("limit", [0, 20_000, 60_000])
def test_file_size_limit_of_the_system(raw: Path, tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system itself refuses to write on, in the journal or in a shard; nothing is patched."""
    small_steps(monkeypatch)
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from perennial.core.errors import UserError\n"
        "from perennial.data import pipeline\n"
        "from perennial.data.prepare import PrepareSettings, prepare\n"
        "pipeline._BLOCK_BYTES, pipeline._BATCH_BYTES, pipeline._COMMIT_SECONDS = 3000, 12000, 0.0\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n"
        "    prepare(PrepareSettings.model_validate_json(sys.argv[1]), Path(sys.argv[2]))\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "    sys.exit(2)\n"
    )
    command = [sys.executable, "-c", code, json.dumps(settings(raw).resolved()), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 2, done.stderr
    assert "run the same command again to go on" in done.stdout
    assert not (tmp_path / "out").exists()
    prepare(settings(raw), tmp_path / "out")
    prepare(settings(raw), tmp_path / "straight")
    assert content(tmp_path / "out") == content(tmp_path / "straight")
