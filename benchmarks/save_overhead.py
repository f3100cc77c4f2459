"""What saving costs training: time lost for each checkpoint, written at once or from a copy while training goes on.

    python benchmarks/save_overhead.py [--repeats 3] [--width 384] [--json FILE]

One process trains the same model three ways in turn: never saving, saving at once, saving behind training. Time lost is
the wall time from the first update to the last, less that of the run that never saves (medians over the repeats),
divided by the number of checkpoints. The share is stated for a checkpoint every ten minutes, and so is how often one
may save before three percent are lost. Shares are what counts: a run's absolute speed varies on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BAR = 0.03
INTERVAL = 600.0
WAYS = ("never", "at once", "behind training")


def make_corpus(folder: Path) -> Path:
    """A prepared corpus of this Python's documentation."""
    import pydoc_data.topics

    from perennial.data.prepare import PrepareSettings, prepare
    from perennial.data.tokenizers.train import train_tokenizer

    text = folder / "text.jsonl"
    lines = (json.dumps({"text": value}) + "\n" for _, value in sorted(pydoc_data.topics.topics.items()))
    text.write_text("".join(lines), encoding="utf-8")
    train_tokenizer([text], folder / "tokenizer", vocabulary_size=4096)
    settings = {"name": "topics", "inputs": [str(text)], "tokenizer": str(folder / "tokenizer"), "validation": "5%"}
    prepare(PrepareSettings.model_validate(settings), folder / "corpus")
    return folder / "corpus"


def recipe(corpus: Path, width: int, updates: int, saves: int) -> dict[str, Any]:
    """A model of 6 layers; `saves` checkpoints on the way, and one at the end as every run has."""
    tokens = 8 * 64
    shape = {"width": width, "layers": 6, "heads": width // 64, "kv_heads": width // 64, "mlp_width": 3 * width}
    return {
        "name": "saving",
        "model": {"options": {**shape, "context": 64}},
        "corpora": {"topics": str(corpus)},
        "batch": {"sequences": 8, "sequence_length": 64},
        "evaluation": {"every": None, "tokens": "512 tokens"},
        "checkpoints": {"every": f"{updates // (saves + 1) * tokens} tokens" if saves else None},
        "stages": [
            {
                "name": "saving",
                "budget": f"{updates * tokens} tokens",
                "mixture": {"topics": 1},
                "max_epochs": 100,
                "schedule": {"name": "constant", "peak": 1e-4},
            }
        ],
    }


def measure(corpus: Path, width: int, way: str, updates: int, saves: int) -> dict[str, float]:
    """Wall seconds between the first and the last update, and what the run says of its checkpoints."""
    from perennial.core import records
    from perennial.train import loop, saving
    from perennial.train.recipe import parse_recipe
    from perennial.train.run import start

    saving.LARGE_BYTES = 0 if way == "behind training" else 1 << 62
    moments: list[float] = []
    make_update = loop.make_update

    def timed(*given: Any, **settings: Any) -> Any:
        moments.append(time.perf_counter())
        return make_update(*given, **settings)

    loop.make_update = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            asked = recipe(corpus, width, updates, 0 if way == "never" else saves)
            start(parse_recipe(asked), Path(folder) / "run", base=Path(), quiet=True)
            written = records.read(Path(folder) / "run/events.jsonl", "checkpoint")[:-1]
            size = sum(p.stat().st_size for p in next((Path(folder) / "run/checkpoints").iterdir()).rglob("*"))
    finally:
        loop.make_update = make_update
    return {
        "seconds": moments[-1] - moments[0],
        "written": float(len(written)),
        "writing_seconds": statistics.mean([e["seconds"] for e in written]) if written else 0.0,
        "bytes": float(size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=90)
    parser.add_argument("--saves", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--json", metavar="FILE")
    asked = parser.parse_args()
    from perennial.core.environment import environment, tune_process

    tune_process()
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder))
        for repeat in range(asked.repeats):
            for way in WAYS:
                found[way].append(measure(corpus, asked.width, way, asked.updates, asked.saves))
                print(f"{way} {repeat + 1}/{asked.repeats}: {found[way][-1]}", file=sys.stderr)
    middle = {way: {key: statistics.median(r[key] for r in rows) for key in rows[0]} for way, rows in found.items()}
    print("| saving | state MiB | seconds to write | seconds lost each | share, every 10 min | 3% at one every |")
    print("|---|---|---|---|---|---|")
    for way in WAYS[1:]:
        row = middle[way]
        lost = (row["seconds"] - middle["never"]["seconds"]) / row["written"]
        print(
            f"| {way} | {row['bytes'] / 2**20:,.0f} | {row['writing_seconds']:.2f} | {lost:.2f} "
            f"| {lost / INTERVAL:.2%} | {max(lost, 0) / BAR:.0f} s |"
        )
    if asked.json:
        Path(asked.json).write_text(json.dumps({"results": found, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
