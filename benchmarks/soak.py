"""Soak: real training with a fault every so often, against the same training left alone. Nothing may differ at the end.

    python benchmarks/soak.py [--minutes 10] [--together] [--processes 2] [--every 60] [--seed 0] [--json FILE]

Trains a small model on this Python's documentation under `torchrun --max-restarts`, once undisturbed and once while
faults strike, in rounds that hold each kind once, in random order:

    kill a rank         kill -9 of a random process
    stop a rank         SIGTERM to a random process: the run saves, ends, and is started again
    stop the launcher   SIGTERM to torchrun, as when a cluster takes a machine back
    full disk           everything that is free on the file system of the run is taken for a while
    damaged checkpoint  the newest checkpoint loses half of its largest file, then kill -9 of a random process
    missing shard       a shard of the corpus has another name for a while, or loses its second half

A fault waits until training goes on after the one before. The harness repairs nothing but what it did itself (it makes
room again, puts the shard back) and starts the command again when that has ended, as a cluster's queue does. With
`--together` both runs train at once: a soak of two hours takes two hours. Then it compares: weights and optimizer state
to the bit, every update's loss once and equal, the tokens drawn from the corpus, the checkpoints' own checksums, and
that nothing was left behind.

The run lies on a file system of its own in memory, in a private mount namespace that ends with this program; where
that is not permitted, a limit on the size of files (prlimit) stands in for a full disk. Needs Linux. Exit code 1: the
runs differ.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import json
import math
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from perennial.core import records
from perennial.core.amounts import human_bytes, human_seconds
from perennial.core.errors import UserError
from perennial.core.files import sha256, verify_manifest, write_json
from perennial.core.lineage import checkpoints_of
from perennial.core.lineage import read as read_lineage
from perennial.core.progress import Progress

KINDS = ("kill a rank", "stop a rank", "stop the launcher", "full disk", "damaged checkpoint", "missing shard")
LASTING = ("full disk", "missing shard")
"""Faults that the processes live through; all others need a new start."""
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "options": {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_width": 64, "context": 64},
        "sequences": 8,
        "sequence_length": 32,
        "disk": 32 << 20,
    },
    "small": {
        "options": {"width": 128, "layers": 4, "heads": 4, "kv_heads": 2, "mlp_width": 384, "context": 128},
        "sequences": 16,
        "sequence_length": 128,
        "disk": 1 << 30,
    },
}
SPARE_BYTES = 128 << 10
"""What a full disk sometimes has left."""
VOCABULARY = 512
SHARD_TOKENS = 100_000
RESTARTS = 100
"""What torchrun may start again before it gives up, and the harness starts torchrun again."""
STARTING_SECONDS = 6.0
"""What a restart costs, about: loading torch, checking corpus and checkpoint. It only decides how long the run is."""
_NAMESPACE = "PERENNIAL_SOAK_NAMESPACE"


@dataclass
class Fault:
    """One fault, and what it cost."""

    kind: str
    detail: str
    at_seconds: float
    """Since the disturbed run began."""
    time: float
    """Seconds since the epoch, as events have them."""
    held_seconds: float = 0.0
    """Until the harness took it back."""
    still_seconds: float = 0.0
    """The longest time without an update from then to the next fault."""
    redone: int = 0
    """Updates that were made again because they came after the last checkpoint."""


# The job


@dataclass
class Job:
    """The training command under torchrun, started again whenever it ends before the run is complete."""

    run: Path
    recipe: Path
    processes: int
    log: Path
    starts: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    ended: bool = False
    """The harness has to end: nothing is started any more."""
    codes: list[int] = field(default_factory=list)
    """Exit codes of torchrun."""

    def ensure(self) -> bool:
        """Starts the command when it is not running; False when the run is complete, or was ended."""
        if self.ended:
            return False
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return True
            self.codes.append(code)
            self.process = None
            if code == 0:
                return False
        self.starts += 1
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={self.processes}", f"--max-restarts={RESTARTS}"]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*launcher, "-m", "perennial", "train", str(self.recipe), "--out", str(self.run)],
                cwd=Path(__file__).parents[1],
                env={"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return True

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of the workers that are alive."""
        found = {}
        for child in children(self.process.pid) if self.process else []:
            with contextlib.suppress(OSError, ValueError):
                variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                rank = next((v.partition(b"=")[2] for v in variables if v.startswith(b"RANK=")), None)
                if rank is not None:
                    found[int(rank)] = child
        return found

    def end(self) -> None:
        """Kills everything, for when the harness itself has to end."""
        self.ended = True
        if self.process is not None and self.process.poll() is None:
            for pid in [*self.ranks().values(), self.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(30)


def children(pid: int) -> list[int]:
    """The processes that a process has started and that are alive."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


class Watched:
    """The updates and resumes of a run that is going on, read from its events as they come."""

    def __init__(self, run: Path) -> None:
        self._path = run / "events.jsonl"
        self._offset = 0
        self.seen: list[tuple[float, str, int]] = []
        """(seconds since the epoch, 'train' or 'resume' or 'restart', tokens), as they lie in the file."""

    def look(self) -> None:
        """Reads what has been added."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                event = json.loads(line)
                if event["event"] in ("train", "resume", "restart"):
                    self.seen.append((event["time"], event["event"], event["tokens"]))

    @property
    def updates(self) -> list[tuple[float, int]]:
        """(time, tokens) of every update that was ever made."""
        return [(moment, tokens) for moment, event, tokens in self.seen if event == "train"]

    @property
    def position(self) -> int:
        """Tokens that the run has trained on."""
        return self.seen[-1][2] if self.seen else 0


# Faults


class Faults:
    """Strikes, holds and takes back. `strike` returns what to call to take the fault back, after `hold` seconds."""

    def __init__(self, job: Job, corpus: Path, disk: Path | None, chance: random.Random) -> None:
        self._job, self._corpus, self._disk, self._chance = job, corpus, disk, chance

    def strike(self, kind: str) -> tuple[str, Callable[[], None] | None]:
        """Does it; returns its details, and how to take it back if it lasts. Raises LookupError: not possible now."""
        strikes: dict[str, Callable[[], tuple[str, Callable[[], None] | None]]] = {
            "kill a rank": lambda: (self._send(signal.SIGKILL), None),
            "stop a rank": lambda: (self._send(signal.SIGTERM), None),
            "stop the launcher": self._stop_launcher,
            "full disk": self._fill,
            "damaged checkpoint": self._damage,
            "missing shard": self._hide,
        }
        return strikes[kind]()

    def _send(self, number: signal.Signals) -> str:
        ranks = self._job.ranks()
        if len(ranks) < self._job.processes:
            raise LookupError("it is just starting")
        rank = self._chance.choice(sorted(ranks))
        os.kill(ranks[rank], number)
        return f"rank {rank}"

    def _stop_launcher(self) -> tuple[str, None]:
        assert self._job.process is not None
        if len(self._job.ranks()) < self._job.processes:
            raise LookupError("it is just starting")
        self._job.process.send_signal(signal.SIGTERM)
        return "torchrun", None

    def _fill(self) -> tuple[str, Callable[[], None]]:
        if self._disk is None:
            return self._limit_files()
        filler = self._disk / "filler"
        taken = 0
        with open(filler, "wb", buffering=0) as file:
            block = bytes(1 << 16)
            while block:
                try:
                    taken += file.write(block)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    block = block[: len(block) // 2]
        spare = self._chance.choice((0, SPARE_BYTES))  # with it events find room, and a checkpoint does not
        os.truncate(filler, max(0, taken - spare))
        return f"{human_bytes(spare)} left", filler.unlink

    def _limit_files(self) -> tuple[str, Callable[[], None]]:
        assert self._job.process is not None
        pids = [*self._job.ranks().values(), self._job.process.pid]  # those that are started now inherit it
        before = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
        for pid, (_, hard) in before.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, hard))

        def lift() -> None:
            now = [*self._job.ranks().values(), *([self._job.process.pid] if self._job.process else [])]
            for pid in now:
                with contextlib.suppress(ProcessLookupError):
                    hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))

        return "no file may grow beyond 1 KiB", lift

    def _damage(self) -> tuple[str, None]:
        saved = checkpoints_of(self._job.run)
        if not saved:
            raise LookupError("there is no checkpoint yet")
        rank = self._send(signal.SIGKILL)
        newest = checkpoints_of(self._job.run)[-1]
        largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
        return f"{newest.name}/{largest.relative_to(newest)}, {rank} killed", None

    def _hide(self) -> tuple[str, Callable[[], None]]:
        shard = self._chance.choice(sorted((self._corpus / "train").glob("*.ds")))
        if self._chance.random() < 0.5:
            hidden = shard.with_suffix(".hidden")
            os.replace(shard, hidden)
            return f"{shard.name} renamed", lambda: os.replace(hidden, shard)
        content = shard.read_bytes()
        os.truncate(shard, len(content) // 2)

        def restore() -> None:
            with open(shard, "r+b") as file:
                file.write(content)

        return f"{shard.name} cut to half", restore


def in_rounds(chance: random.Random, kinds: Sequence[str]) -> Iterator[str]:
    """Each kind once, in random order, again and again."""
    while True:
        yield from chance.sample(kinds, len(kinds))


# The two runs


def prepare(work: Path) -> Path:
    """Tokenizer and corpus from this Python's own documentation and library; returns the corpus."""
    import pydoc_data.topics

    from perennial.data.prepare import PrepareSettings
    from perennial.data.prepare import prepare as prepare_corpus
    from perennial.data.tokenizers.train import train_tokenizer

    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    for path in sorted(library.glob("a*.py")):
        source = path.read_text(encoding="utf-8")
        texts += [source[i : i + 4000] for i in range(0, len(source), 4000)]
    raw = work / "text.jsonl"
    raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    train_tokenizer([raw], work / "tokenizer", vocabulary_size=VOCABULARY)
    settings = PrepareSettings.model_validate(
        {
            "name": "text",
            "inputs": [str(raw)],
            "tokenizer": str(work / "tokenizer"),
            "validation": "5%",
            "shard_tokens": SHARD_TOKENS,
        }
    )
    prepare_corpus(settings, work / "corpus")
    return work / "corpus"


def write_recipe(path: Path, corpus: Path, size: dict[str, Any], *, updates: int, save_every: int) -> None:
    """The recipe of both runs."""
    tokens = size["sequences"] * size["sequence_length"]
    stages = [
        {
            "name": "train",
            "budget": f"{updates * tokens} tokens",
            "mixture": {"text": "100%"},
            "schedule": {"name": "wsd", "peak": 3e-3},
            "max_epochs": 1e9,
        }
    ]
    recipe = {
        "name": "soak",
        "model": {"options": size["options"]},
        "corpora": {"text": str(corpus)},
        "stages": stages,
        "batch": {key: size[key] for key in ("sequences", "sequence_length")},
        "precision": "fp32",
        "evaluation": {"tokens": "8192 tokens", "every": "20%"},
        "checkpoints": {"every": f"{save_every * tokens} tokens", "keep": 3},
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def undisturbed(job: Job, line: Progress | None, total_tokens: int) -> float:
    """Runs the job to its end; its updates per second."""
    watched = Watched(job.run)
    while job.ensure():
        time.sleep(0.2)
        watched.look()
        if watched.seen and line is not None:
            line(watched.position, total_tokens, "undisturbed")
        if job.starts > 1:
            raise SystemExit(f"the undisturbed run failed; see {job.log}:\n{tail(job.log)}")
    watched.look()
    first, last = watched.updates[0][0], watched.updates[-1][0]
    return (len(watched.updates) - 1) / max(1e-9, last - first)


@dataclass(frozen=True)
class Timetable:
    """When faults are due."""

    every: float
    """Seconds from one to the next."""
    until: float
    """Seconds after which there are no more, so that the run can come to its end."""
    strikes: int | None
    """So many in all instead, spread evenly over the run."""

    def is_due(self, *, now: float, last: float, struck: int, share: float) -> bool:
        """Whether the next one is, `now` seconds after the beginning, with this share of the run done."""
        if self.strikes is not None:
            return struck < self.strikes and share >= (struck + 1) / (self.strikes + 1)
        return last + self.every <= now < self.until


def disturbed(
    job: Job, faults: Faults, *, kinds: Iterator[str], timetable: Timetable, hold: float, line: Progress,
    total_tokens: int, note: Callable[[Fault], None],
) -> tuple[list[Fault], float]:  # fmt: skip
    """Runs the job to its end with faults on the way, each held for `hold` seconds; the faults, and its wall time."""
    watched, struck = Watched(job.run), []
    begun, last, kind = time.monotonic(), 0.0, next(kinds)
    lasting: tuple[float, Callable[[], None]] | None = None
    while job.ensure():
        time.sleep(0.05)
        now = time.monotonic() - begun
        watched.look()
        if watched.seen:
            line(watched.position, total_tokens, f"{len(struck)} faults, {job.starts} starts of torchrun")
        if lasting is not None and now >= lasting[0]:
            lasting[1]()
            struck[-1].held_seconds = round(now - struck[-1].at_seconds, 2)
            lasting = None
        share = watched.position / total_tokens
        due = timetable.is_due(now=now, last=last, struck=len(struck), share=share)
        if lasting is None and due and goes_on(watched, struck):
            try:
                detail, back = faults.strike(kind)
            except (LookupError, ProcessLookupError):
                continue  # a moment later
            fault = Fault(kind, detail, round(now, 2), time.time())
            struck.append(fault)
            note(fault)
            lasting = (now + hold, back) if back else None
            last, kind = now, next(kinds)
        if now > 2 * timetable.until + 120:
            raise SystemExit(f"the run did not come to its end; see {job.log}:\n{tail(job.log)}")
    if lasting is not None:
        lasting[1]()
    return struck, time.monotonic() - begun


def goes_on(watched: Watched, struck: list[Fault]) -> bool:
    """Whether updates are made (again) since the last fault, which may need a start first: else nothing would."""
    if not struck:
        return bool(watched.seen)
    since = [event for moment, event, _ in watched.seen if moment > struck[-1].time]
    if struck[-1].kind not in LASTING:
        since = since[next((i for i, event in enumerate(since) if event != "train"), len(since)) :]
    return "train" in since


def measure_costs(struck: list[Fault], watched: Watched, update_tokens: int) -> None:
    """Fills in what each fault cost, from the events."""
    ends = [*(fault.time for fault in struck[1:]), math.inf]
    moments = [moment for moment, _ in watched.updates]
    for fault, until in zip(struck, ends, strict=True):
        own = [m for m in moments if m <= fault.time][-1:] + [m for m in moments if fault.time < m <= until]
        fault.still_seconds = round(max((b - a for a, b in itertools.pairwise(own)), default=0.0), 2)
        for (_, _, before), (moment, event, tokens) in itertools.pairwise(watched.seen):
            if event != "train" and fault.time < moment <= until:
                fault.redone += (before - tokens) // update_tokens


# Comparison


def differences(run: Path, reference: Path, update_tokens: int) -> list[str]:
    """In what the disturbed run is not as the undisturbed one; empty when it is in everything that counts."""
    found = []
    ends = [checkpoints_of(folder)[-1] for folder in (run, reference)]
    if ends[0].name != ends[1].name:
        found.append(f"the last checkpoint is {ends[0].name}, not {ends[1].name}")
    tensors = [{p.relative_to(end): sha256(p) for p in end.rglob("*.safetensors")} for end in ends]
    found += [
        f"{n} differs" for n in sorted(tensors[0].keys() | tensors[1].keys()) if tensors[0].get(n) != tensors[1].get(n)
    ]
    losses = [
        [
            (e["tokens"], e["loss"], e["gradient_norm"], e["rate"])
            for e in records.read(folder / "events.jsonl", "train")
        ]
        for folder in (run, reference)
    ]
    if [row[0] for row in losses[0]] != [update_tokens * (i + 1) for i in range(len(losses[1]))]:
        found.append(f"events: not every update once: {len(losses[0])} for {len(losses[1])}")
    elif losses[0] != losses[1]:
        where = next(a[0] for a, b in zip(*losses, strict=True) if a != b)
        found.append(f"events: losses differ from {where} tokens on")
    drawn = [
        [
            (s.stage, s.tokens, s.complete, [(d["name"], d["rows"], d["tokens"]) for d in s.sources])
            for s in read_lineage(end).stages
        ]
        for end in ends
    ]
    if drawn[0] != drawn[1]:
        found.append(f"lineage: {drawn[0]}, not {drawn[1]}")
    for path in checkpoints_of(run):
        try:
            verify_manifest(path, "perennial/manifest.json", "checkpoint")
        except UserError as error:
            found.append(str(error))
    left = [p.name for p in (run / "checkpoints").iterdir() if not p.name.partition(".")[0].isdigit()]
    return found + [f"left behind: {name}" for name in left]


def table(struck: list[Fault]) -> str:
    """The faults and what they cost, as Markdown."""
    lines = ["| at, s | fault | detail | lasted, s | without an update, s | redone |", "|---:|---|---|---:|---:|---:|"]
    for f in struck:
        lasted = f"{f.held_seconds:.0f}" if f.held_seconds else ""
        lines.append(f"| {f.at_seconds:.0f} | {f.kind} | {f.detail} | {lasted} | {f.still_seconds:.1f} | {f.redone} |")
    return "\n".join(lines)


def tail(log: Path, lines: int = 40) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]) if log.exists() else ""


# Privileges


def in_own_namespace() -> bool:
    """Starts this program again where it may mount file systems of its own; False when that is not permitted."""
    if os.environ.get(_NAMESPACE):
        return True
    for options in (["--mount"], ["--mount", "--map-root-user"]):
        command = ["unshare", *options, "--propagation", "private"]
        with contextlib.suppress(FileNotFoundError):
            probe = [*command, "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"]
            if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
                os.environ[_NAMESPACE] = "1"
                os.execvp("unshare", [*command, sys.executable, *sys.argv])
    return False


def mounted(folder: Path, size: int) -> Path:
    """A file system in memory of `size` bytes at `folder`."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    return folder


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the disturbed run, about (default: 10)")
    parser.add_argument("--together", action="store_true", help="train the undisturbed run at the same time")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--every", type=float, default=60.0, help="seconds from one fault to the next (default: 60)")
    parser.add_argument("--strikes", type=int, help="so many faults in all instead, spread evenly over the run")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model")
    parser.add_argument("--updates", type=int, help="length of the run; default: from a measured speed")
    parser.add_argument("--faults", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where records go, while it runs and at the end")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a copy of the disturbed run and of its log")
    return parser.parse_args()


def soak(args: argparse.Namespace, work: Path, disk: Path | None) -> dict[str, Any]:
    """Both runs and their comparison."""
    size = SIZES[args.size]
    tokens, seconds = size["sequences"] * size["sequence_length"], 60 * args.minutes
    line = Progress("soak")
    corpus = prepare(work)
    speed = None
    updates = args.updates
    if updates is None:
        recipe = work / "speed.yaml"
        write_recipe(recipe, corpus, size, updates=100, save_every=50)
        speed = undisturbed(Job(work / "speed", recipe, args.processes, work / "speed.log"), line, 100 * tokens)
        training_share = max(0.3, 1 - 0.7 * STARTING_SECONDS / args.every)
        updates = max(100, round(speed * seconds * training_share / (2 if args.together else 1)))
    parts = seconds / args.every if args.strikes is None else args.strikes + 1
    save_every = max(1, round(updates / max(4, 3 * parts)))
    hold = args.every / 3
    recipe = work / "recipe.yaml"
    write_recipe(recipe, corpus, size, updates=updates, save_every=save_every)
    line.note(f"{updates} updates of {tokens} tokens, saved every {save_every}, on {args.processes} processes")
    own = recipe
    if args.together:  # a shard that is missing is missing to one of the two
        own = work / "alone.yaml"
        write_recipe(own, shutil.copytree(corpus, work / "alone"), size, updates=updates, save_every=save_every)
    reference = Job(work / "reference", own, args.processes, work / "reference.log")
    job = Job((disk or work) / "run", recipe, args.processes, work / "run.log")
    record: dict[str, Any] = {"settings": {k: v for k, v in vars(args).items() if k not in ("json", "keep")}}
    record |= {"updates": updates, "save_every": save_every, "full_disk": "tmpfs" if disk else "RLIMIT_FSIZE"}
    record |= {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "faults": []}

    def note(fault: Fault) -> None:
        line.note(f"{human_seconds(fault.at_seconds)}: {fault.kind} ({fault.detail})")
        record["faults"].append(asdict(fault))
        if alone.done():
            alone.result()  # raises what went wrong there, now and not after hours
        if args.json:
            write_json(args.json, record)

    pool = ThreadPoolExecutor(1)
    try:
        alone = pool.submit(undisturbed, reference, None if args.together else line, updates * tokens)
        if not args.together:
            alone.result()
        chance = random.Random(args.seed)
        struck, wall = disturbed(
            job, Faults(job, corpus, disk, chance), kinds=in_rounds(chance, args.faults),
            timetable=Timetable(args.every, 2 * seconds, args.strikes), hold=hold, line=line,
            total_tokens=updates * tokens, note=note,
        )  # fmt: skip
        record["undisturbed_updates_per_second"] = round(alone.result(), 2)
    finally:
        line.close()
        job.end()
        reference.end()
        pool.shutdown()
        if args.keep and job.run.exists():
            shutil.copytree(job.run, args.keep / "run", dirs_exist_ok=True)
            shutil.copy(job.log, args.keep / "run.log")
    watched = Watched(job.run)
    watched.look()
    measure_costs(struck, watched, tokens)
    found = differences(job.run, reference.run, tokens)
    weights = checkpoints_of(job.run)[-1] / "model.safetensors"
    return record | {
        "faults": [asdict(fault) for fault in struck],
        "wall_seconds": round(wall, 1),
        "starts_of_torchrun": job.starts,
        "exit_codes": job.codes,
        "updates_made": len(watched.updates),
        "failed_saves": len(records.read(job.run / "events.jsonl", "save_failed")),
        "set_aside": sorted(p.name for p in (job.run / "checkpoints").iterdir() if ".damaged" in p.name),
        "weights_sha256": sha256(weights),
        "differences": found,
    }


def main() -> int:
    """Runs the soak; exit code 1 when the disturbed run is not as the other."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what was begun is ended
    own = in_own_namespace()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        work = Path(name)
        disk = mounted(work / "disk", SIZES[args.size]["disk"]) if own else None
        try:
            record = soak(args, work, disk)
        finally:
            if disk is not None:
                subprocess.run(["umount", str(disk)], check=False)
    if args.json:
        write_json(args.json, record)
    struck = [Fault(**fault) for fault in record["faults"]]
    print(table(struck))
    again = record["updates_made"] / record["updates"] - 1
    print(
        f"\n{len(struck)} faults in {human_seconds(record['wall_seconds'])}; {record['updates']} updates, {again:.1%} "
        f"of them made again; torchrun started {record['starts_of_torchrun']} times; {record['failed_saves']} saves "
        f"failed, {len(record['set_aside'])} damaged checkpoints set aside"
    )
    print("as the undisturbed run, to the bit" if not record["differences"] else "\n".join(record["differences"]))
    return 1 if record["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
