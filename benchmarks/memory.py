"""How well `perennial plan --memory` knows the memory that `perennial train` then takes.

    python benchmarks/memory.py [--quick] [--updates 4] [--json FILE] [--device cpu|cuda]

For every case a recipe is written, planned with `perennial plan --memory` and trained with `perennial train`, each in
processes of its own, as a person would. On a CPU the peak is the largest resident set of a process (wait4's ru_maxrss,
which is VmHWM); on a GPU `torch.cuda.max_memory_allocated`, which is compared with the estimate less CUDA's own part.
The error is (estimate - measured) / measured. Models are presets with a vocabulary of 4096, the corpus is this Python's
standard library. Speed plays no part: other work on the machine does no harm. With --json FILE results are kept there
after every case, and what the file already has is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TARGET = 0.10


@dataclass(frozen=True)
class Case:
    """One run."""

    preset: str
    length: int
    rows: int
    """Per update, over all processes."""
    micro_batch: int
    precision: str
    checkpointing: str = "none"
    optimizer: str = "adamw"
    processes: int = 1
    shard: str = "auto"

    def __str__(self) -> str:
        spread = "" if self.processes == 1 else f", {self.processes} x {self.shard}"
        again = "" if self.checkpointing == "none" else f", {self.checkpointing}"
        other = "" if self.optimizer == "adamw" else f", {self.optimizer}"
        shape = f"{self.rows} x {self.length} by {self.micro_batch}"
        return f"{self.preset}, {shape}, {self.precision}{again}{other}{spread}"


QUICK = (Case("2m", 256, 16, 16, "fp32"), Case("2m", 256, 16, 4, "bf16"))
CPU = (
    *QUICK,
    Case("2m", 256, 16, 16, "bf16"),
    Case("2m", 1024, 8, 8, "fp32"),
    Case("2m", 1024, 16, 4, "bf16", "selective"),
    Case("10m", 256, 16, 16, "fp32"),
    Case("10m", 256, 16, 16, "bf16"),
    Case("10m", 256, 16, 4, "fp32", optimizer="muon"),
    Case("10m", 1024, 4, 4, "fp32", "full"),
    Case("10m", 1024, 8, 2, "bf16"),
    Case("10m", 256, 8, 4, "fp32", processes=2, shard="none"),
    Case("10m", 256, 8, 4, "bf16", processes=2, shard="full"),
    Case("10m", 256, 16, 4, "bf16", processes=2, shard="none"),
    Case("2m", 1024, 8, 4, "fp32", processes=2, shard="none"),
    Case("10m", 256, 16, 4, "fp32", processes=2, shard="full"),
    Case("4m", 512, 12, 12, "bf16"),
    Case("25m", 512, 4, 2, "fp32"),
    Case("25m", 256, 8, 8, "bf16", "full"),
    Case("50m", 256, 4, 4, "fp32"),
    Case("50m", 256, 8, 8, "bf16"),
    Case("50m", 256, 2, 1, "bf16"),
    Case("50m", 1024, 2, 2, "bf16"),
    Case("50m", 1024, 1, 1, "fp32", "selective"),
)
GPU = tuple(
    Case(preset, length, 2 * rows, rows, "bf16", checkpointing)
    for preset, length, rows in (("124m", 2048, 16), ("1b", 2048, 8), ("1b", 4096, 4), ("3b", 4096, 2))
    for checkpointing in ("none", "selective", "full")
)


def make_corpus(folder: Path) -> Path:
    """A prepared corpus of this Python's standard library, 4096-token vocabulary."""
    from perennial.data.prepare import PrepareSettings, prepare
    from perennial.data.tokenizers.train import train_tokenizer

    text = folder / "text"
    text.mkdir()
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        (text / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    train_tokenizer([text], folder / "tokenizer", vocabulary_size=4096)
    settings = {"name": "library", "inputs": [str(text)], "tokenizer": str(folder / "tokenizer"), "validation": "3%"}
    prepare(PrepareSettings.model_validate(settings), folder / "corpus")
    return folder / "corpus"


def recipe_of(case: Case, corpus: Path, updates: int) -> dict[str, Any]:
    """The run as a recipe."""
    stage = {
        "name": "only",
        "budget": f"{updates * case.rows * case.length} tokens",
        "mixture": {"library": "100%"},
        "schedule": {"name": "constant", "peak": 1e-3},
        "optimizer": case.optimizer,
        "max_epochs": 1000,
    }
    return {
        "name": "memory",
        "model": {"preset": case.preset, "options": {"context": max(1024, case.length)}},
        "corpora": {"library": str(corpus)},
        "stages": [stage],
        "batch": {"sequences": case.rows, "sequence_length": case.length, "micro_batch": case.micro_batch},
        "precision": case.precision,
        "activation_checkpointing": case.checkpointing,
        "parallel": {"shard": case.shard},
        "evaluation": {"every": None, "tokens": "8192 tokens"},
        "checkpoints": {"every": None},
    }


def measured(case: Case, recipe: Path, folder: Path, device: str) -> int:
    """Bytes at the fullest moment of the fullest process of `perennial train`."""
    from perennial.core import records

    command = [sys.executable, "-m", "perennial", "train", str(recipe), "--out", str(folder)]
    command += ["--processes", str(case.processes)] if case.processes > 1 else []
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status):
            output.seek(0)
            sys.exit(f"{case}: failed:\n{output.read().decode(errors='replace')[-3000:]}")
    if device == "cuda":
        return max(event["memory_bytes"] for event in records.read(folder / "events.jsonl", "train"))
    return usage.ru_maxrss * 1024


def estimated(case: Case, recipe: Path, device: str) -> dict[str, Any]:
    """What `perennial plan --memory` says."""
    command = [sys.executable, "-m", "perennial", "plan", "--memory", str(recipe), "--json", "--device", device]
    command += ["--processes", str(case.processes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found: dict[str, Any] = json.loads(done.stdout)
    stage = found["stages"]["only"]
    total = found["total_bytes"] - (stage["parts_bytes"]["process"] if device == "cuda" else 0)
    return {"bytes": total, "moment": stage["moment"], "parts": stage["parts_bytes"]}


def report(results: dict[str, dict[str, Any]]) -> None:
    """Prints the table and the worst row."""
    print("| run (rows x tokens by micro-batch) | estimate MiB | measured MiB | error | fullest moment |")
    print("|---|---|---|---|---|")
    errors = {}
    for name, row in results.items():
        errors[name] = row["estimate"]["bytes"] / row["measured"] - 1
        sizes = f"{row['estimate']['bytes'] / 2**20:,.0f} | {row['measured'] / 2**20:,.0f}"
        print(f"| {name} | {sizes} | {errors[name]:+.1%} | {row['estimate']['moment']} |")
    worst = max(errors, key=lambda name: abs(errors[name]))
    within = sum(abs(error) <= TARGET for error in errors.values())
    print(f"\n{within} of {len(errors)} within {TARGET:.0%}; worst {errors[worst]:+.1%}: {worst}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small cases only")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    cases = QUICK if arguments.quick else {"cpu": CPU, "cuda": GPU}[arguments.device]
    results: dict[str, dict[str, Any]] = {}
    if arguments.json and arguments.json.is_file():
        results = json.loads(arguments.json.read_text(encoding="utf-8"))["results"]
    with tempfile.TemporaryDirectory() as root:
        corpus = make_corpus(Path(root))
        for number, case in enumerate(cases):
            recipe = Path(root) / f"{number}.yaml"
            recipe.write_text(json.dumps(recipe_of(case, corpus, arguments.updates)), encoding="utf-8")
            row = results.setdefault(str(case), {"case": asdict(case)})
            row["estimate"] = estimated(case, recipe, arguments.device)
            if "measured" not in row:
                row["measured"] = measured(case, recipe, Path(root) / f"run-{number}", arguments.device)
            sizes = [f"{size / 2**20:,.0f} MiB" for size in (row["estimate"]["bytes"], row["measured"])]
            print(f"{case}: estimate {sizes[0]}, measured {sizes[1]}", file=sys.stderr, flush=True)
            if arguments.json:
                temporary = arguments.json.with_suffix(".tmp")
                temporary.write_text(json.dumps({"results": results}, indent=1), encoding="utf-8")
                temporary.replace(arguments.json)
    report({name: results[name] for name in map(str, cases)})


if __name__ == "__main__":
    main()
