"""A grid of runs that is worked off piece by piece: nothing twice, resumable after any end, by several processes.

Every run has a folder of its own, named after a key of everything that decides it, so a finished run is found again
whatever it was made for. A lock per run keeps two processes apart: each takes the next run that is free and whose
parent is there. The manifest says what is done and what is left; it is made from the folders and decides nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perennial.bench.continual_runs import PlannedRun, Scale, key_of, measuring, recipe
from perennial.core.amounts import human, human_seconds
from perennial.core.errors import UserError
from perennial.core.files import read_json, write_json

EVENTS = "events.jsonl"
MANIFEST = "manifest.json"
POLL_SECONDS = 2.0
"""How often a process looks again when all that is left is in the hands of another, or waits for it."""
TOKENS_PER_SECOND = {"1m": 8e3, "4m": 3e3, "8m": 1.5e3}
"""Assumption, until a run of that size is finished: one thread of a CPU of 2023."""
_LAST_BYTES = 1 << 16
"""The last event of a run is shorter than this."""
DONE, FREE, BUSY, WAITING, FAILED = "done", "to do", "running", "waits for its parent", "failed"


@dataclass(frozen=True)
class Node:
    """A run in its place: with its scale, its corpora, its parent and its folder."""

    run: PlannedRun
    scale: Scale
    shift: str
    corpora: Mapping[str, Path]
    key: str
    folder: Path
    parent: Node | None

    @property
    def title(self) -> str:
        """'novels_en-peps, 1m, seed 0: union'."""
        return f"{self.shift}, {self.scale.preset}, seed {self.scale.seed}: {self.run.name}"

    @property
    def seen(self) -> set[str]:
        """The corpora that this run and its ancestors train on."""
        own = {name for stage in self.run.stages for name in stage.mixture if name in self.corpora}
        return own | (self.parent.seen if self.parent else set())

    @property
    def is_done(self) -> bool:
        """Whether the run has finished."""
        return finished(self.folder) is not None


def finished(folder: Path) -> dict[str, Any] | None:
    """The `done` event of a run folder, which is its last, or None."""
    path = folder / EVENTS
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _LAST_BYTES))
        last = file.read().splitlines(keepends=True)[-1:]
    if not last or b'"event": "done"' not in last[0] or not last[0].endswith(b"\n"):
        return None
    return dict(json.loads(last[0]))


def nodes_of(
    runs: Sequence[PlannedRun], scale: Scale, shift: str, corpora: Mapping[str, Path], work: Path
) -> dict[str, Node]:
    """The runs, parents first, with keys and folders; name -> node."""
    fingerprints = {name: _fingerprint(path) for name, path in corpora.items()}
    place = work / "grid" / shift / scale.preset / f"seed{scale.seed}"
    nodes: dict[str, Node] = {}
    for run in runs:
        parent = nodes[run.parent] if run.parent else None
        key = key_of(run, scale, fingerprints, parent.key if parent else None, parent.seen if parent else ())
        nodes[run.name] = Node(run, scale, shift, corpora, key, place / f"{run.name}-{key}", parent)
    return nodes


def _fingerprint(corpus: Path) -> str:
    return str(read_json(corpus / "manifest.json", "prepared corpus")["fingerprint"])


def needed(nodes: Sequence[Node], checks: Sequence[str]) -> list[Node]:
    """The nodes that one of the checks needs, with their ancestors, in the order given."""
    wanted: set[Path] = set()
    for node in nodes:
        if node.run.checks & set(checks):
            step: Node | None = node
            while step is not None:
                wanted.add(step.folder)
                step = step.parent
    return list({node.folder: node for node in nodes if node.folder in wanted}.values())


@dataclass
class Grid:
    """The nodes of an experiment and what this process knows of them."""

    nodes: Sequence[Node]
    work: Path
    quiet: bool = False
    say: Callable[[str], None] = print
    failures: dict[Path, str] = field(default_factory=dict)
    """Folder -> why the run could not be made or trained."""

    def state(self, node: Node) -> str:
        """Where the run stands now."""
        if node.is_done:
            return DONE
        if node.folder in self.failures or (node.parent and node.parent.folder in self.failures):
            return FAILED
        if is_locked(node.folder):
            return BUSY
        return FREE if node.parent is None or node.parent.is_done else WAITING

    @property
    def is_complete(self) -> bool:
        """Whether every run is done."""
        return all(node.is_done for node in self.nodes)

    def left(self) -> list[Node]:
        """The runs that are neither done nor failed."""
        return [node for node in self.nodes if self.state(node) not in (DONE, FAILED)]

    def run(self, *, until: float | None = None, now: Callable[[], float] = time.monotonic) -> bool:
        """Works the grid off; False when it was stopped, or the clock `now` passed `until`, before all was done."""
        while left := self.left():
            if until is not None and now() >= until:
                return False
            free = next((node for node in left if self.state(node) == FREE), None)
            if free is None:
                if not any(self.state(node) == BUSY for node in left):
                    return True  # what is left waits for a run that failed
                time.sleep(POLL_SECONDS)
                continue
            with lock(free.folder) as mine:
                if not mine or free.is_done:
                    continue
                self.say(f"{free.title} ({self.progress_text()})")
                if not self._train(free):
                    return False
            self.write_manifest()
        return True

    def _train(self, node: Node) -> bool:
        """Trains one run, from where it stands; False when a signal stopped it. A refused run is noted as failed."""
        try:
            result = _trained(node, self.work, quiet=self.quiet)
        except UserError as error:
            self.failures[node.folder] = str(error)
            self.say(f"{node.title}: not possible: {error}")
            return True
        return result["complete"] and not result.get("asked_to_stop")

    def progress_text(self) -> str:
        """'12 of 40 runs done, 31 min left on one thread'."""
        done = sum(node.is_done for node in self.nodes)
        return f"{done} of {len(self.nodes)} runs done, {human_seconds(self.seconds_left())} left by one process"

    def seconds_left(self) -> float:
        """The time that the runs that are left will take one process, by the speed of those that are done."""
        speed = self._speed()
        return sum(node.run.tokens / speed[node.scale.preset] for node in self.left())

    def _speed(self) -> dict[str, float]:
        """Tokens per second by preset, everything included."""
        spent: dict[str, list[tuple[int, float]]] = {}
        for node in self.nodes:
            if done := finished(node.folder):
                spent.setdefault(node.scale.preset, []).append((done["tokens"], sum(done["seconds"].values())))
        measured = {
            preset: sum(tokens for tokens, _ in found) / max(1e-9, sum(seconds for _, seconds in found))
            for preset, found in spent.items()
        }
        presets = {node.scale.preset for node in self.nodes}
        return {preset: measured.get(preset, TOKENS_PER_SECOND.get(preset, 1e3)) for preset in presets}

    def manifest(self) -> dict[str, Any]:
        """What is done and what is left, as data."""
        speed = self._speed()
        runs = []
        for node in self.nodes:
            done = finished(node.folder)
            seconds = sum(done["seconds"].values()) if done else node.run.tokens / speed[node.scale.preset]
            runs.append(
                {
                    "shift": node.shift,
                    "preset": node.scale.preset,
                    "seed": node.scale.seed,
                    "run": node.run.name,
                    "key": node.key,
                    "state": self.state(node),
                    "tokens": node.run.tokens,
                    "seconds": round(seconds, 1),
                    "checks": sorted(node.run.checks),
                    **({"why": self.failures[node.folder]} if node.folder in self.failures else {}),
                }
            )
        left = self.seconds_left()
        return {"done": sum(run["state"] == DONE for run in runs), "seconds_left": round(left), "runs": runs}

    def write_manifest(self) -> None:
        """Puts the manifest into the work folder."""
        write_json(self.work / MANIFEST, self.manifest())

    def text(self) -> str:
        """The manifest for a terminal: one line per shift, size and seed."""
        groups: dict[tuple[str, str, int], list[Node]] = {}
        for node in self.nodes:
            groups.setdefault((node.shift, node.scale.preset, node.scale.seed), []).append(node)
        lines = []
        for (shift, preset, seed), nodes in groups.items():
            open_runs = [node for node in nodes if not node.is_done]
            tokens = human(sum(node.run.tokens for node in open_runs), "tokens")
            names = ", ".join(node.run.name for node in open_runs)
            left = f"; left {tokens}: {names}" if open_runs else ""
            lines.append(f"{shift}, {preset}, seed {seed}: {len(nodes) - len(open_runs)} of {len(nodes)} done{left}")
        return "\n".join([*lines, self.progress_text()])


def _trained(node: Node, work: Path, *, quiet: bool) -> dict[str, Any]:
    """Trains the run from where it stands: by its own recipe, or as `perennial continue` decides."""
    from perennial.core.lineage import newest_checkpoint
    from perennial.train.continuing import continue_run
    from perennial.train.recipe import parse_recipe
    from perennial.train.run import start

    corpora = {name: path.resolve() for name, path in node.corpora.items()}
    parent, run = node.parent, node.run
    seen: Collection[str] = parent.seen if parent else ()
    if run.choices is None or parent is None:
        checkpoint = str(newest_checkpoint(parent.folder).resolve()) if parent else None
        data = recipe(run, node.scale, {name: str(path) for name, path in corpora.items()}, checkpoint, seen)
        header = f"# {node.title}: {run.label}\n\n"
        return start(parse_recipe(data, source=node.title), node.folder, base=work, header=header, quiet=quiet)
    measured = measuring(run, node.scale, {})
    settings = [
        f"{group}.{key}={value}" for group, values in measured.items() for key, value in values.items() if value
    ]
    outcome = continue_run(
        newest_checkpoint(parent.folder),
        {name: corpora[name] for name in run.stages[0].mixture},
        budget=f"{run.tokens} tokens",
        out=node.folder,
        also_measured={name: path for name, path in corpora.items() if name not in {*seen, *run.stages[0].mixture}},
        seed=node.scale.seed + 1,
        settings=[*settings, "checkpoints.every=null"],
        quiet=quiet,
        **run.choices,
    )
    return dict(outcome["result"])


# Locks


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Whether this process now holds the run's lock; it goes with the process, however that ends.

    Without file locks (Windows) one process works at a time: it always gets the lock.
    """
    if os.name != "posix":
        yield True
        return
    import fcntl

    path = _lock_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until this process holds the lock of a folder; for work that every process would do first."""
    while True:
        with lock(folder) as mine:
            if mine:
                yield
                return
        time.sleep(POLL_SECONDS)


def is_locked(folder: Path) -> bool:
    """Whether a process holds the run's lock."""
    if not _lock_path(folder).exists():
        return False
    with lock(folder) as mine:
        return not mine
