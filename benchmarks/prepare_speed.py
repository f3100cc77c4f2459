"""Speed and memory of `perennial prepare` against the bare batch encoding of Hugging Face `tokenizers`.

    python benchmarks/prepare_speed.py [--corpus FILE ...] [--repeats 3] [--json FILE]

Every measurement is a process of its own; the contenders take turns, so that noise of the machine meets all of them.
`hf` encodes texts that are already in memory, in batches of 4 MB with `encode_batch_fast`, and throws the result away.
`prepare` and `fallback` are everything from the compressed file to the synced, checksummed corpus, opening and checking
the tokenizer included, imports excluded; `fallback` is the same with fastokens blocked. `hf` and `fallback` take the
first 16 MiB of the text (of several files, equal parts), `prepare` all of it.
Needs ../shared/corpora; says so and stops where that is absent.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).resolve().parents[2] / "shared" / "corpora" / "novels_en.jsonl.gz"
CONTENDERS = ("hf", "prepare", "fallback")
SLOW_BYTES = 16 << 20
BATCH_BYTES = 4 << 20
VOCABULARY_SIZE = 16384


def cut_head(corpora: Sequence[Path], head: Path) -> None:
    """The first documents of each file, up to SLOW_BYTES of text in all."""
    with gzip.open(head, "wb", compresslevel=6) as target:
        for corpus in corpora:
            taken = 0
            with gzip.open(corpus) as source:
                for line in source:
                    if taken >= SLOW_BYTES / len(corpora):
                        break
                    target.write(line)
                    taken += len(json.loads(line)["text"].encode())


def measure_hf(head: Path, tokenizer: Path) -> dict[str, float]:
    """The bare encoding rate: no reading, no writing."""
    from tokenizers import Tokenizer

    with gzip.open(head) as file:
        texts = [json.loads(line)["text"] for line in file]
    engine = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    num_bytes, batch, size, seconds = 0, [], 0, 0.0
    for text in [*texts, None]:
        if text is not None:
            batch.append(text)
            size += len(text.encode())
        if text is None or size >= BATCH_BYTES:
            start = time.perf_counter()
            engine.encode_batch_fast(batch, add_special_tokens=False)
            seconds += time.perf_counter() - start
            num_bytes, batch, size = num_bytes + size, [], 0
    return {"seconds": seconds, "bytes": num_bytes}


def measure_prepare(corpora: Sequence[Path], tokenizer: Path, engine: str) -> dict[str, float]:
    """`prepare` from file to corpus; `engine` is the one that is expected to be used."""
    if engine == "tokenizers":
        sys.modules["fastokens"] = None  # type: ignore[assignment]  # importing it fails from here on
    import pyarrow.parquet  # noqa: F401  (imports are not what is measured)
    import tokenizers  # noqa: F401

    from perennial.data.prepare import PrepareSettings, prepare

    settings = PrepareSettings(name="corpus", inputs=[str(corpus) for corpus in corpora], tokenizer=str(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        manifest = prepare(settings, Path(folder) / "out")
        seconds = time.perf_counter() - start
    assert manifest["tokenizer"]["engine"] == engine, manifest["tokenizer"]["engine_reason"]
    return {"seconds": seconds, "bytes": sum(split["bytes"] for split in manifest["splits"].values())}


def measure(contender: str, tokenizer: Path, head: Path, *corpora: Path) -> dict[str, float]:
    """One measurement, in this process."""
    if contender == "hf":
        found = measure_hf(head, tokenizer)
    elif contender == "prepare":
        found = measure_prepare(corpora, tokenizer, "fastokens")
    else:
        found = measure_prepare([head], tokenizer, "tokenizers")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"megabytes_per_second": found["bytes"] / 1e6 / found["seconds"], "peak_bytes": peak, **found}


def in_own_process(contender: str, *paths: Path) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", contender, *map(str, paths)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, float] = json.loads(answer.stdout)
    return found


def compare(corpora: Sequence[Path], repeats: int) -> dict[str, Any]:
    """Medians over interleaved repeats, and their ratios to `hf`."""
    from perennial.data.tokenizers.train import train_tokenizer

    runs: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        head, tokenizer = Path(folder) / "head.jsonl.gz", Path(folder) / "tokenizer"
        cut_head(corpora, head)
        train_tokenizer([head], tokenizer, vocabulary_size=VOCABULARY_SIZE)
        for _ in range(repeats):
            for contender in CONTENDERS:
                runs[contender].append(in_own_process(contender, tokenizer, head, *corpora))
    medians = {
        contender: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for contender, found in runs.items()
    }
    base = medians["hf"]["megabytes_per_second"]
    ratios = {contender: medians[contender]["megabytes_per_second"] / base for contender in CONTENDERS}
    name = ", ".join(corpus.name.removesuffix(".jsonl.gz") for corpus in corpora)
    return {"corpus": name, "cores": os.cpu_count(), "medians": medians, "ratio_to_hf": ratios, "runs": runs}


def markdown(found: dict[str, Any]) -> str:
    """One row: rates in MB/s of text, ratios to bare Hugging Face, peak memory in MiB."""
    cells = [found["corpus"]]
    for contender in CONTENDERS:
        rate, peak = (found["medians"][contender][key] for key in ("megabytes_per_second", "peak_bytes"))
        cells.append(f"{rate:.1f} MB/s ({found['ratio_to_hf'][contender]:.2f}x), {peak / 2**20:.0f} MiB")
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus", type=Path, nargs="+", default=[CORPUS], metavar="FILE", help=".jsonl.gz files with a field 'text'"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        contender, *paths = args.measure
        print(json.dumps(measure(contender, *map(Path, paths))))
        return 0
    absent = [str(path) for path in args.corpus if not path.is_file()]
    if absent:
        print(f"skipped: {', '.join(absent)} is not there")
        return 0
    found = compare(args.corpus, args.repeats)
    print("| corpus | bare tokenizers | prepare | prepare without fastokens |\n|---|---|---|---|")
    print(markdown(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
