"""Training speed and memory on this machine's CPU against Hugging Face Trainer, LitGPT and a plain nanoGPT-style loop.

    python benchmarks/train_speed.py --json FILE [--litgpt-python PYTHON] [--sizes 2m 10m 50m] [--lengths 256 1024]
        [--repeats 3] [--compile] [--quick]

All train the same Llama from the same weights on the same rows with the same optimizer settings; the script stops when
the loss of a first update differs. A contender as it ships has its own defaults; 'best' adds the fastest of its own
settings in our precision (`train_contenders.py` says which). Every measurement is a process of its own; contenders take
turns, so that noise of the machine meets all of them, and all are asked to wait without spinning. LitGPT belongs in an
environment of its own: PYTHON is its interpreter; where it is not given or has no LitGPT, those rows are left out.

Tokens per second are medians over the updates after the first four; the time of those, beyond that of four more, is
'start' (LitGPT compiles then). CPU seconds are those of the whole process per update: beside other work they say more
than the clock does. Memory is the highest resident set from before the model is built on, less what the process then
held. The floor of an update is its products at the measured rate of matrix products plus the bytes that weights,
gradients and optimizer state have to move at the measured rate of memory; what stands in the table is the share of the
measured time that this is. FILE gets every measurement as it comes; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROWS = {("2m", 256): 8, ("2m", 1024): 4, ("10m", 256): 8, ("10m", 1024): 4, ("50m", 256): 4, ("50m", 1024): 2}
"""Rows per update."""
UPDATES = {("2m", 256): 24, ("2m", 1024): 14, ("10m", 256): 12, ("10m", 1024): 8, ("50m", 256): 8, ("50m", 1024): 7}
"""Updates per measurement; the first four are not timed."""
SHIPPED = ("perennial", "perennial fp32", "trainer", "litgpt", "nanogpt")
BEST = ("trainer best", "litgpt best", "nanogpt best")
COMPILED = ("perennial compile", "trainer compile", "nanogpt compile")
TIMEOUT = 900
"""Seconds after which a measurement is given up."""
Cell = tuple[str, int]
Record = dict[str, Any]


def main() -> None:
    arguments = _arguments()
    path = Path(arguments.json)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    contenders = [*SHIPPED, *BEST, *(COMPILED if arguments.compile else ())]
    if not _has_litgpt(arguments.litgpt_python):
        print("LitGPT is not there (--litgpt-python): its rows are left out", file=sys.stderr)
        contenders = [contender for contender in contenders if not contender.startswith("litgpt")]
    cells = [(size, length) for size in arguments.sizes for length in arguments.lengths]
    with tempfile.TemporaryDirectory() as folder, open(path, "a", encoding="utf-8") as file:
        if not any(record["kind"] == "machine" for record in records):
            _write(file, records, {"kind": "machine", **_machine()})
        corpus = make_corpus(Path(folder))
        for cell in cells:
            todo = list(_left(cell, contenders, arguments.repeats, records))
            if not todo:
                continue
            updates = 6 if arguments.quick else UPDATES[cell]
            task = prepare(cell, updates, corpus, Path(folder) / f"{cell[0]}-{cell[1]}")
            if not any(record["kind"] == "floor" and _cell(record) == cell for record in records):
                _write(file, records, {"kind": "floor", "size": cell[0], "length": cell[1], **measure_floor(task)})
            for repeat, contender in todo:
                result = measure(contender, task, arguments.litgpt_python, Path(folder))
                named = {"kind": "speed", "size": cell[0], "length": cell[1], "contender": contender}
                _write(file, records, {**named, "repeat": repeat, "load": os.getloadavg()[0], **result})
                _check_first_losses(cell, records)
    print(table(records, cells))
    if arguments.compile:
        print(compile_table(records, cells))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", required=True, help="records, one a line; goes on where it stopped")
    parser.add_argument("--litgpt-python", metavar="PYTHON", default=sys.executable, help="LitGPT's interpreter")
    parser.add_argument("--sizes", nargs="+", choices=["2m", "10m", "50m"], default=["2m", "10m", "50m"])
    parser.add_argument("--lengths", nargs="+", type=int, choices=[256, 1024], default=[256, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, and from when on it pays")
    parser.add_argument("--quick", action="store_true", help="six updates a measurement: to try the script")
    return parser.parse_args()


def _write(file: Any, records: list[Record], record: Record) -> None:
    """Adds a record to the file and to the list; says what it was."""
    records.append(record)
    file.write(json.dumps(record) + "\n")
    file.flush()
    print({k: v for k, v in record.items() if k not in ("losses", "environment")}, file=sys.stderr)


def _cell(record: Record) -> Cell:
    return record["size"], record["length"]


def _left(cell: Cell, contenders: list[str], repeats: int, records: list[Record]) -> Iterator[tuple[int, str]]:
    """Measurements of a cell that are not yet in the records, all contenders of one repeat before the next."""
    done = {(r["repeat"], r["contender"]) for r in records if r["kind"] == "speed" and _cell(r) == cell}
    return (one for one in itertools.product(range(repeats), contenders) if one not in done)


# Preparing


def make_corpus(folder: Path) -> Path:
    """A prepared corpus of this Python's standard library, 4096-token vocabulary."""
    from perennial.data.prepare import PrepareSettings, prepare
    from perennial.data.tokenizers.train import train_tokenizer

    library = Path(os.__file__).parent
    text = folder / "text"
    text.mkdir()
    for path in sorted(library.glob("*.py")):
        (text / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    train_tokenizer([text], folder / "tokenizer", vocabulary_size=4096)
    settings = PrepareSettings.model_validate(
        {"name": "library", "inputs": [str(text)], "tokenizer": str(folder / "tokenizer"), "validation": "3%"}
    )
    prepare(settings, folder / "corpus")
    return folder / "corpus"


def prepare(cell: Cell, updates: int, corpus: Path, folder: Path) -> dict[str, Any]:
    """Writes recipe, first weights and rows of a cell; returns the task that every contender gets.

    Rows and weights are those that the recipe gives, so that Perennial itself is run as it is.
    """
    import numpy as np

    from perennial.core.seeds import derive
    from perennial.data.corpus import Corpus
    from perennial.data.loader import Loader
    from perennial.model.config import ModelConfig
    from perennial.model.huggingface import save_model
    from perennial.model.transformer import Transformer, initialise
    from perennial.train.recipe import parse_recipe
    from perennial.train.run import make_run, read_resolved
    from perennial.train.stage_sources import stage_order

    (size, length), rows = cell, ROWS[cell]
    recipe = _recipe(size, rows, length, updates, corpus)
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    make_run(parse_recipe(recipe), folder / "planned", base=folder)
    resolved = read_resolved(folder / "planned")
    stage, opened = resolved.stages[0], Corpus.open(corpus)
    found = {opened.fingerprint: opened}
    order = stage_order(stage.sources, found, resolved.seed, length, stage.name, {})
    with Loader(order, found, sequence_length=length, document_mask=False, separator_id=0) as loader:
        batch = loader.at(0, rows * updates)
    np.save(folder / "windows.npy", np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1).astype(np.int32))
    config = ModelConfig(**resolved.model)
    save_model(initialise(Transformer(config), derive(resolved.seed, "model")), folder / "weights")
    shutil.move(folder / "weights" / "model.safetensors", folder / "model.safetensors")
    shape = {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_theta": config.rope_theta,
    }
    return {"shape": shape, "folder": str(folder), "rows": rows, "length": length, "updates": updates}


def _recipe(size: str, rows: int, length: int, updates: int, corpus: Path) -> dict[str, Any]:
    return {
        "name": "speed",
        "model": {"preset": size},
        "corpora": {"library": str(corpus)},
        "batch": {"sequences": rows, "sequence_length": length},
        "evaluation": {"every": None, "tokens": "512 tokens"},
        "checkpoints": {"every": None},
        "stages": [
            {
                "name": "speed",
                "budget": f"{updates * rows * length} tokens",
                "mixture": {"library": 1},
                "schedule": {"name": "constant", "peak": 1e-3},
            }
        ],
    }


# Measuring


def _has_litgpt(python: str) -> bool:
    try:
        return not subprocess.run([python, "-c", "import litgpt"], capture_output=True, check=False).returncode
    except OSError:
        return False


def measure(contender: str, task: dict[str, Any], litgpt_python: str, folder: Path) -> Record:
    """One measurement in a process of its own. Compiled code is kept for the repeats, as on a user's machine."""
    python = litgpt_python if contender.startswith("litgpt") else sys.executable
    cache = str(folder / "compiled")
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
    with tempfile.TemporaryDirectory(dir=folder) as out:
        (Path(out) / "task.json").write_text(json.dumps({**task, "contender": contender, "out": out}), "utf-8")
        command = [python, str(Path(__file__).with_name("train_contenders.py")), str(Path(out) / "task.json")]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=TIMEOUT, cwd=out, check=False
        )
    if done.returncode:
        sys.exit(f"{contender} failed:\n{done.stderr[-3000:]}")
    result: Record = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _check_first_losses(cell: Cell, records: list[Record]) -> None:
    """Stops when contenders do not compute the same: losses of the first update agree to bf16's rounding."""
    first = {r["contender"]: r["losses"][0] for r in records if r["kind"] == "speed" and _cell(r) == cell}
    if max(first.values()) - min(first.values()) > 0.01:
        sys.exit(f"{cell}: the first losses differ, this is not one model: {first}")


def _machine() -> Record:
    from perennial.core.environment import environment

    return {"environment": environment(), "date": time.strftime("%Y-%m-%d")}


def measure_floor(task: dict[str, Any]) -> Record:
    """Least seconds of an update in fp32 and bf16: products of its shapes at their measured rates, bytes moved.

    Products: of every matrix forward and twice backward, timed at their own shapes; attention over the past only, at
    the rate of those. Bytes: AdamW reads weight, gradient and two moments and writes three of them, the gradient is
    written and read for its norm: 36 a parameter; under bf16 6 more each for the rounded copy and the gradient's.
    """
    import torch

    shape, tokens = task["shape"], task["rows"] * task["length"]
    width, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    matrices = [(4 * layers, width, width), (3 * layers, width, inner), (1, width, shape["vocab_size"])]
    parameters = sum(count * n * k for count, n, k in matrices)
    attention_flops = 6.0 * tokens * task["length"] * width * layers  # half of 12 N T D: the future is not needed
    rate = memory_bytes_per_second()
    found: Record = {"memory_bytes_per_second": rate}
    for name, dtype, copies in (("fp32", torch.float32, 0), ("bf16", torch.bfloat16, 12)):
        seconds = flops = 0.0
        for count, n, k in matrices:
            for a, b, c in ((tokens, k, n), (tokens, n, k), (n, tokens, k)):
                seconds += count * _product_seconds(a, b, c, dtype)
                flops += count * 2.0 * a * b * c
        moved = parameters * (36 + copies) / rate
        found[name] = {
            "flops_per_second": flops / seconds,
            "product_seconds": seconds + attention_flops * seconds / flops,
            "memory_seconds": moved,
            "seconds": seconds + attention_flops * seconds / flops + moved,
        }
    return found


def _product_seconds(rows: int, inner: int, columns: int, dtype: Any) -> float:
    """Best of several: seconds of a (rows, inner) by (inner, columns) product."""
    import torch

    left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype)
    return min(_seconds(lambda: torch.mm(left, right.t())) for _ in range(12))


def memory_bytes_per_second() -> float:
    """Best rate at which all threads copy 256 MB, reading and writing counted."""
    import torch

    source = torch.ones(1 << 25)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_seconds(lambda: target.copy_(source)) for _ in range(8))


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# Reporting


def _medians(records: list[Record], cell: Cell) -> dict[str, dict[str, float]]:
    """Medians over repeats of each contender's figures."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["kind"] == "speed" and _cell(record) == cell:
            found[record["contender"]].append(record)
    keys = ("tokens_per_second", "cpu_seconds_per_update", "memory_bytes", "start_seconds")
    return {name: {key: statistics.median(r[key] for r in rows) for key in keys} for name, rows in found.items()}


def table(records: list[Record], cells: list[Cell]) -> str:
    """Every contender of every cell; 'ours' is how many times its tokens per second Perennial makes.

    As many as it by the clock, and in brackets by CPU seconds. 'perennial fp32' is what peers in fp32 compare with when
    the question is the code and not the precision.
    """
    lines = [
        "| model | row | contender | tokens/s | ours x | ours fp32 x | memory MiB | CPU s/update | floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        middle = _medians(records, cell)
        floors = next((r for r in records if r["kind"] == "floor" and _cell(r) == cell), None)
        if not floors or "perennial" not in middle:
            continue
        tokens = ROWS[cell] * cell[1]
        for name, row in middle.items():
            precision = "fp32" if name in ("perennial fp32", "trainer", "nanogpt") else "bf16"
            share = floors[precision]["seconds"] / (tokens / row["tokens_per_second"])
            lines.append(
                f"| {cell[0]} | {ROWS[cell]} x {cell[1]} | {name} ({precision}) | {row['tokens_per_second']:,.0f} "
                f"| {_times(middle['perennial'], row)} | {_times(middle.get('perennial fp32'), row)} "
                f"| {row['memory_bytes'] / 2**20:,.0f} | {row['cpu_seconds_per_update']:.2f} | {share:.0%} |"
            )
    return "\n".join(lines)


def _times(ours: dict[str, float] | None, other: dict[str, float]) -> str:
    if ours is None:
        return "-"
    by_cpu = other["cpu_seconds_per_update"] / ours["cpu_seconds_per_update"]
    return f"{ours['tokens_per_second'] / other['tokens_per_second']:.2f} ({by_cpu:.2f})"


def compile_table(records: list[Record], cells: list[Cell]) -> str:
    """What `compile: true` costs at the start, gains afterwards, and after how many tokens it has paid."""
    lines = ["| model | row | first start s | gain | pays after |", "|---|---|---|---|---|"]
    for cell in cells:
        middle = _medians(records, cell)
        compiled = [r for r in records if r["kind"] == "speed" and _cell(r) == cell]
        starts = [r["start_seconds"] for r in compiled if r["contender"] == "perennial compile"]
        if not starts or "perennial" not in middle:
            continue
        plain, fast = (middle[name]["tokens_per_second"] for name in ("perennial", "perennial compile"))
        tokens = starts[0] / (1 / plain - 1 / fast) if fast > plain else None
        pays = f"{tokens / 1e6:,.1f} M tokens ({tokens / plain / 60:,.0f} min)" if tokens else "never"
        lines.append(f"| {cell[0]} | {ROWS[cell]} x {cell[1]} | {starts[0]:.0f} | {fast / plain:.2f} | {pays} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
