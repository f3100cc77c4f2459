"""Loader speed: tokens per second from memory-mapped shards for 1, 2 and 8 readers, and that their order is the same.

    python benchmarks/loader_speed.py [--tokens 40000000] [--repeats 5] [--json FILE]

Three sources (weights 5, 3, 2) of uint16 shards generated in a temporary folder, read once through in global batches
of 262,144 tokens. A reader is a process with a loader of its own that takes its rank's part of every batch, as data-
parallel training does; readers start together, the rate is all tokens over the time of the slowest. The shards are in
the page cache, as after the first pass of a real run. In a separate pass every row is hashed: the hashes in row order
must be the same for any number of readers.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from perennial.core.files import write_json
from perennial.data.corpus import Corpus
from perennial.data.loader import Batch, Loader
from perennial.data.mixture import StageOrder
from perennial.data.replay import SourceSpec
from tests.data.corpora import random_documents, write_corpus

WEIGHTS = {"a": 5, "b": 3, "c": 2}
VOCABULARY = 32_000
BATCH_TOKENS = 1 << 18
READERS = (1, 2, 8)
LENGTHS = (1024, 256)


def generate(folder: Path, num_tokens: int) -> None:
    """Three corpora, each with its weight's part of the tokens, in shards of 2^22 tokens."""
    for seed, (name, weight) in enumerate(WEIGHTS.items()):
        size = num_tokens * weight // sum(WEIGHTS.values())
        documents = random_documents(size, vocabulary_size=VOCABULARY, seed=seed, mean_length=600)
        write_corpus(folder / name, documents, vocabulary_size=VOCABULARY, shard_tokens=1 << 22)


def batches(folder: Path, length: int, num_tokens: int, rank: int, world: int) -> Iterator[Batch]:
    """The rank's part of every batch of one pass."""
    corpora = [Corpus.open(folder / name) for name in WEIGHTS]
    by_fingerprint = {corpus.fingerprint: corpus for corpus in corpora}
    specs = [SourceSpec(c.name, str(c.path), c.fingerprint, WEIGHTS[c.name], role="fresh", seed=1) for c in corpora]
    order = StageOrder(specs, by_fingerprint, seed=2, sequence_length=length)
    rows = BATCH_TOKENS // length
    with Loader(order, by_fingerprint, sequence_length=length, document_mask=False, separator_id=0) as loader:
        for row in range(0, num_tokens // BATCH_TOKENS * rows, rows):
            yield loader.at(row, rows, rank=rank, world=world)


def read(folder: Path, length: int, num_tokens: int, rank: int, world: int, barrier: Any, results: Connection) -> None:
    """One reader: when it started and stopped, in seconds, and its tokens in between, without the first batches."""
    own = batches(folder, length, num_tokens, rank, world)
    for _ in range(4):
        next(own)  # opening files and the memory of the first batches happen once in a run of many hours
    barrier.wait()
    start = time.monotonic()
    tokens = sum(batch.targets.size for batch in own)
    results.send((start, time.monotonic(), tokens))


def hash_rows(
    folder: Path, length: int, num_tokens: int, rank: int, world: int, barrier: Any, results: Connection
) -> None:
    """One reader: a digest of every row's inputs, targets and source, batch by batch."""
    barrier.wait()
    digests = []
    for batch in batches(folder, length, num_tokens, rank, world):
        rows = zip(batch.inputs, batch.targets, batch.source, strict=True)
        digests.append([hashlib.blake2b(b"".join(part.tobytes() for part in row)).digest() for row in rows])
    results.send(digests)


def together(work: Any, world: int, *arguments: Any) -> list[Any]:
    """What `work` sends from each of `world` processes that start at once."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(world)
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    readers = [
        context.Process(target=work, args=(*arguments, rank, world, barrier, pipe[1]))
        for rank, pipe in enumerate(pipes)
    ]
    for reader in readers:
        reader.start()
    answers = [pipe[0].recv() for pipe in pipes]
    for reader in readers:
        reader.join()
    return answers


def rate(folder: Path, length: int, num_tokens: int, world: int) -> float:
    """Tokens per second of all readers together."""
    answers = together(read, world, folder, length, num_tokens)
    starts, stops, tokens = zip(*answers, strict=True)
    return sum(tokens) / (max(stops) - min(starts))


def order_hash(folder: Path, length: int, num_tokens: int, world: int) -> str:
    """One hash over all rows in their global order."""
    digest = hashlib.sha256()
    for parts in zip(*together(hash_rows, world, folder, length, num_tokens), strict=True):
        for part in parts:
            digest.update(b"".join(part))
    return digest.hexdigest()


def main() -> None:
    """Measures, prints the table and checks the order."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tokens", type=int, default=40_000_000, help="tokens generated, and read per pass")
    parser.add_argument("--repeats", type=int, default=5, help="passes per number of readers; the median is shown")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "numpy": np.__version__},
        "tokens": arguments.tokens,
        "batch_tokens": BATCH_TOKENS,
        "readers_are": "processes",
        "results": [],
    }
    print(f"{'tokens per row':>14}  {'readers':>7}  {'M tokens/s':>10}  {'lowest':>7}  {'highest':>7}  order")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        generate(folder, arguments.tokens)
        for length in LENGTHS:
            rates: dict[int, list[float]] = {world: [] for world in READERS}
            for _ in range(arguments.repeats):  # in turns, so that noise of the machine meets all of them
                for world in READERS:
                    rates[world].append(rate(folder, length, arguments.tokens, world))
            orders = {world: order_hash(folder, length, arguments.tokens, world) for world in READERS}
            for world in READERS:
                values = [value / 1e6 for value in rates[world]]
                median = statistics.median(values)
                print(
                    f"{length:>14}  {world:>7}  {median:>10.0f}  {min(values):>7.0f}  {max(values):>7.0f}  "
                    f"{orders[world][:12]}"
                )
                figures["results"].append(
                    {
                        "sequence_length": length,
                        "readers": world,
                        "tokens_per_second": statistics.median(rates[world]),
                        "all": rates[world],
                        "order": orders[world],
                    }
                )
            if len(set(orders.values())) != 1:
                sys.exit(f"the order of rows of {length} tokens depends on the number of readers")
    print("identical order for any number of readers: yes")
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
