"""Raw text to a prepared corpus: `prepare` runs the pipeline in OUT.partial and puts the finished corpus in place.

A commit makes the append-only files durable, then one SQLite transaction records the digests of what they hold, their
lengths and how far the inputs were read. Opened again, the files are cut to those lengths and reading goes on from
there, so the corpus is the same to the byte however often, and wherever, the work was interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perennial.core import files
from perennial.core.errors import UserError
from perennial.core.settings import stable_hash
from perennial.data.dedup import INDEX, DigestIndex, Journal
from perennial.data.pipeline import EnginesDiffer, Item, Pipeline, Progress, State, read_ahead, token_dtype
from perennial.data.pipeline import PrepareSettings as PrepareSettings
from perennial.data.shards import shard_names
from perennial.data.sources import BEGINNING, Input, survey
from perennial.data.splits import SPLITS, TRAIN, VALIDATION
from perennial.data.tokenizers.engine import Engine, ReferenceEngine, open_engine
from perennial.data.tokenizers.folder import TokenizerFolder

FORMAT = 1
_TOKENIZER = "tokenizer"
_JOURNAL = "journal.sqlite"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PATH_SETTINGS = ("inputs", "tokenizer", "against")
"""Settings that count by what the paths hold, not by how they are spelled."""


def prepare(settings: PrepareSettings, out: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Prepares the corpus `out` and returns its manifest; goes on where an interrupted preparation stopped.

    A finished corpus of the same settings and inputs is left as it is. Raises UserError for bad input, and when `out`
    holds anything else. KeyboardInterrupt and a full disk leave OUT.partial, from which the same call goes on.
    """
    out = Path(out)
    tokenizer = TokenizerFolder.open(settings.tokenizer)
    against = [_read_corpus_manifest(Path(path)) for path in settings.against]
    identity = _identity(settings, tokenizer, against)
    finished = _finished(settings, identity, out)
    if finished is not None:
        return finished
    inputs = survey(settings.inputs, settings.reader)
    _check_outside(out, inputs)
    identity["inputs"] = _listings(inputs)
    names = [str(manifest["name"]) for manifest in against]
    work = _Work(settings, inputs, tokenizer, names, identity, out)
    refusal = None
    while True:
        try:
            return work.run(refusal, progress)
        except EnginesDiffer as error:
            refusal = str(error)
            files.remove_tree(work.partial)


def _read_corpus_manifest(path: Path) -> dict[str, Any]:
    manifest = files.read_json(path / files.MANIFEST, "prepared corpus")
    if not isinstance(manifest, dict) or not {"name", "fingerprint"} <= manifest.keys():
        raise UserError(f"{path}: not a prepared corpus")
    return manifest


def _identity(
    settings: PrepareSettings, tokenizer: TokenizerFolder, against: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What makes two preparations the same; the caller adds what the inputs hold."""
    plain = {key: value for key, value in settings.resolved().items() if key not in _PATH_SETTINGS}
    return {**plain, "tokenizer": tokenizer.fingerprint, "against": [manifest["fingerprint"] for manifest in against]}


def _finished(settings: PrepareSettings, identity: dict[str, Any], out: Path) -> dict[str, Any] | None:
    """The manifest of the finished corpus in `out`; None when nothing is there. Raises UserError for anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    manifest = files.read_json(out / files.MANIFEST, "prepared corpus") if (out / files.MANIFEST).is_file() else None
    if not isinstance(manifest, dict) or "identity" not in manifest:
        raise UserError(f"{out}: holds something that is not a prepared corpus; choose another place")
    wanted = {**identity, "inputs": manifest["identity"]["inputs"]}
    if all(Path(path).exists() for path in settings.inputs):  # once prepared, the raw text may be put away
        found = survey(settings.inputs, settings.reader)
        if not _are_copies(found, manifest["inputs"]):
            wanted["inputs"] = _listings(found)
    _check_same(manifest["identity"], wanted, f"{out}: holds a corpus prepared", "delete it, or choose another place")
    return manifest


def _are_copies(inputs: Sequence[Input], prepared: Sequence[dict[str, Any]]) -> bool:
    """Whether inputs hold what was prepared, although they were perhaps copied, moved or fetched again since."""
    if [source.num_bytes for source in inputs] != [facts["bytes"] for facts in prepared]:
        return False
    return all(
        source.listing == facts["listing"] or (facts.get("contents") or "") == source.contents()
        for source, facts in zip(inputs, prepared, strict=True)
    )


def _check_same(found: dict[str, Any], wanted: dict[str, Any], what: str, advice: str) -> None:
    different = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if different:
        raise UserError(f"{what} with other settings or inputs (different: {', '.join(different)}); {advice}")


def _check_outside(out: Path, inputs: Sequence[Input]) -> None:
    for source in inputs:
        if source.path.is_dir() and out.resolve().is_relative_to(source.path.resolve()):
            raise UserError(f"{out}: lies inside the input {source.path}; choose a place outside it")


@contextlib.contextmanager
def _explained(partial: Path) -> Iterator[None]:
    """A full disk as a UserError; its cause marks that what was committed is whole and worth keeping."""
    resume = "what is done so far is kept; mend that and run the same command again to go on"
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise UserError(f"{partial}: the disk is full ({error.strerror}); {resume}") from error
        explained = files.explain(error, partial)
        if explained is error:
            raise
        raise explained from error
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN")):
            raise UserError(f"{partial}: cannot be written ({error}); {resume}") from error
        raise


@dataclass(frozen=True)
class _Work:
    """One corpus to prepare: everything that is known before the first document is read."""

    settings: PrepareSettings
    inputs: Sequence[Input]
    tokenizer: TokenizerFolder
    against: Sequence[str]
    """Names of the corpora in settings.against."""
    identity: dict[str, Any]
    out: Path

    @property
    def partial(self) -> Path:
        """Where the work happens."""
        return self.out.with_name(f"{self.out.name}.partial")

    def run(self, refusal: str | None, progress: Progress | None) -> dict[str, Any]:
        """Begins or goes on, to the end. `refusal` says why the fast engine must not be used."""
        self._check_ours()
        with _explained(self.partial):
            if self._is_written():
                return self._publish()
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.partial.mkdir(exist_ok=True)
            with contextlib.closing(Journal(self.partial / _JOURNAL)) as journal:
                found = journal.progress()
                state = State.from_json(found) if found else None
                if state:
                    self._check_same(state.identity)
                with self._removed_when_useless():
                    self._prepare(journal, state, refusal, progress)
            return self._publish()

    def _prepare(self, journal: Journal, state: State | None, refusal: str | None, progress: Progress | None) -> None:
        start = state.place if state else BEGINNING
        with contextlib.closing(read_ahead(self.inputs, self.settings, start)) as blocks:  # reads while engines load
            engine = self._engine(state, refusal)
            state = state or self._begin(journal, engine)
            self._run_pipeline(blocks, journal, engine, state, progress)
        self._write_rest(journal, engine, state)

    def _is_written(self) -> bool:
        """Whether all is done but the renaming: the journal is deleted after the manifest is written."""
        return (self.partial / files.MANIFEST).is_file() and not (self.partial / _JOURNAL).exists()

    def _check_ours(self) -> None:
        if not self.partial.exists() or (self.partial / _JOURNAL).is_file():
            return
        if self._is_written():
            self._check_same(files.read_json(self.partial / files.MANIFEST, "manifest").get("identity", {}))
        elif not self.partial.is_dir() or any(self.partial.iterdir()):
            raise UserError(
                f"{self.partial}: is in the way and is no interrupted preparation; move it, or choose another place"
            )

    def _check_same(self, found: dict[str, Any]) -> None:
        advice = f"finish it with those, delete {self.partial} to begin anew, or choose another place"
        _check_same(found, self.identity, f"{self.partial}: holds an interrupted preparation", advice)

    @contextlib.contextmanager
    def _removed_when_useless(self) -> Iterator[None]:
        """Bad input leaves nothing behind: what was made of it could not be gone on with once it is mended."""
        try:
            yield
        except UserError as error:
            if error.__cause__ is None:
                files.remove_tree(self.partial)
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{self.partial}: interrupted; run the same command again to go on") from None

    def _engine(self, state: State | None, refusal: str | None) -> Engine:
        if state and state.engine["name"] == ReferenceEngine.name:
            refusal = state.engine["reason"]
        engine = open_engine(self.tokenizer, refusal=refusal)
        if state and (engine.name, engine.version) != (state.engine["name"], state.engine["version"]):
            begun = f"{state.engine['name']} {state.engine['version']}"
            # The cause keeps the folder: nothing is wrong with what is in it.
            raise UserError(
                f"{self.partial}: was begun with {begun}, now there is {engine.name} {engine.version}; "
                f"install the former, or delete {self.partial} to begin anew"
            ) from RuntimeError(engine.reason)
        return engine

    def _begin(self, journal: Journal, engine: Engine) -> State:
        state = State(self.identity, {"name": engine.name, "version": engine.version, "reason": engine.reason})
        journal.commit(asdict(state))
        return state

    def _run_pipeline(
        self, blocks: Iterable[list[Item]], journal: Journal, engine: Engine, state: State, progress: Progress | None
    ) -> None:
        with contextlib.ExitStack() as stack:
            against = []
            for name, path in zip(self.against, self.settings.against, strict=True):
                against.append((name, stack.enter_context(contextlib.closing(DigestIndex(Path(path))))))
            pipeline = Pipeline(
                self.settings,
                total_bytes=sum(source.num_bytes for source in self.inputs),
                tokenizer=self.tokenizer,
                engine=engine,
                against=against,
                folder=self.partial,
                journal=journal,
                state=state,
            )
            with contextlib.closing(pipeline):
                pipeline.run(blocks, progress)

    def _write_rest(self, journal: Journal, engine: Engine, state: State) -> None:
        """Everything but the shards; the manifest, with the sizes and hashes of all files, last."""
        self._check_counts(state)
        if _listings(survey(self.settings.inputs, self.settings.reader)) != self.identity["inputs"]:
            raise UserError("inputs: files were changed while they were read; run the same command again")
        for stale in self.partial.glob(".*.tmp"):  # a manifest that a kill kept from getting its name
            stale.unlink()
        journal.export(self.partial / INDEX)
        self.tokenizer.copy_to(self.partial / _TOKENIZER)
        files.write_json(self.partial / files.MANIFEST, self._manifest(engine, state))

    def _publish(self) -> dict[str, Any]:
        for suffix in ("-wal", "-shm", ""):
            (self.partial / f"{_JOURNAL}{suffix}").unlink(missing_ok=True)
        manifest: dict[str, Any] = files.read_json(self.partial / files.MANIFEST, "manifest")
        files.publish(self.partial, self.out)
        return manifest

    def _check_counts(self, state: State) -> None:
        name, share, by = self.settings.name, self.settings.validation, self.settings.split_by
        documents = {split: state.splits[split].documents for split in SPLITS}
        total = sum(documents.values())
        if total == 0:
            why = ", ".join(f"{count} '{reason}'" for reason, count in sorted(state.dropped.items()))
            raise UserError(
                f"{name}: no document is left of the {state.num_read} read; dropped: {why}; nothing is written"
            )
        for split, change in ((VALIDATION, "raise"), (TRAIN, "lower")):
            if documents[split] == 0:
                rule = f" (split_by: {by!r})" if by else ""
                what = f"none of the {total} documents falls into {split} at a validation of {share}{rule}"
                raise UserError(f"{name}: {what}; {change} validation, or give more text; nothing is written")

    def _manifest(self, engine: Engine, state: State) -> dict[str, Any]:
        dtype = token_dtype(self.tokenizer.vocabulary_size)
        found = _file_facts(self.partial)
        splits = {}
        for split in SPLITS:
            done = state.splits[split]
            counts = {"documents": done.documents, "tokens": done.tokens, "bytes": done.bytes}
            splits[split] = {**counts, "shards": shard_names(split, done)}
        return {
            "format": FORMAT,
            "name": self.settings.name,
            "fingerprint": _fingerprint(self.tokenizer, dtype, splits, found),
            "tokenizer": self._tokenizer_facts(engine, state),
            "dtype": dtype,
            "settings": self.settings.resolved(),
            "inputs": [source.facts() for source in self.inputs],
            "identity": self.identity,
            "counts": _counts(state),
            "splits": splits,
            "files": found,
        }

    def _tokenizer_facts(self, engine: Engine, state: State) -> dict[str, Any]:
        sample = state.sample
        verified = {"documents": sample.documents, "bytes": sample.compared_bytes, "digest": sample.digest}
        return {
            "fingerprint": self.tokenizer.fingerprint,
            "vocabulary_size": self.tokenizer.vocabulary_size,
            "separator_id": self.tokenizer.separator_id,
            "engine": engine.name,
            "engine_version": engine.version,
            "engine_reason": engine.reason,
            "verified_sample": verified if engine.reference else None,
        }


def _listings(inputs: Sequence[Input]) -> list[str]:
    """What the inputs hold: name, size and modification time of every file, hashed."""
    return [source.listing for source in inputs]


def _counts(state: State) -> dict[str, Any]:
    """read + added_by_cutting = kept + all dropped."""
    kept = sum(split.documents for split in state.splits.values())
    dropped = dict(sorted(state.dropped.items()))
    return {"read": state.num_read, "added_by_cutting": state.num_added, "kept": kept, "dropped": dropped}


def _file_facts(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file of the corpus, made durable first."""
    facts = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != files.MANIFEST and not name.startswith(_JOURNAL):
            files.sync(path)
            facts[name] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
    return facts


def _fingerprint(
    tokenizer: TokenizerFolder, dtype: str, splits: dict[str, Any], found: dict[str, dict[str, Any]]
) -> str:
    """Equal for corpora with equal tokens in equal order, whatever their name and place."""
    shards = {
        split: [[found[f"{name}{suffix}"]["sha256"] for suffix in (".ds", ".ds.index")] for name in facts["shards"]]
        for split, facts in splits.items()
    }
    return stable_hash(
        {"tokenizer": tokenizer.fingerprint, "separator": tokenizer.separator_id, "dtype": dtype, "shards": shards}
    )
