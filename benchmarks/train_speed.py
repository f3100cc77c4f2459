"""Training speed and memory on this machine against Hugging Face Trainer: same Llama, same batch, same data.

    python benchmarks/train_speed.py [--repeats 3] [--updates 24] [--json FILE]

Every measurement is a process of its own; contenders take turns, so that noise of the machine meets all of them. Tokens
per second is the median over updates after the first four; memory is the largest resident set after an update less what
the process held before the model was built, all imports done (torch's compiler, which both sides' optimizers load,
too). The table gives medians over the repeats and the ratio to `Trainer` as it
ships (fp32) and with bf16=True, its fastest setting here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = {"2m": (8, 256), "10m": (8, 256)}  # preset: rows per update, tokens per row
CONTENDERS = ("perennial", "perennial fp32", "trainer", "trainer bf16")


def rss_now() -> int:
    """Resident bytes of this process, now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


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


def measure_perennial(corpus: Path, preset: str, updates: int, precision: str, out: Path) -> dict[str, float]:
    """The loop as `perennial train` runs it, events and all; no evaluation or checkpoint inside the timed part."""
    from perennial.core import records
    from perennial.train.recipe import parse_recipe
    from perennial.train.run import start

    rows, length = SIZES[preset]
    recipe = {
        "name": "speed",
        "model": {"preset": preset},
        "corpora": {"library": str(corpus)},
        "batch": {"sequences": rows, "sequence_length": length},
        "precision": precision,
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
    import torch._dynamo  # noqa: F401  # the first optimizer imports it: 90 MB of code on either side

    before = rss_now()
    start(parse_recipe(recipe), out, base=Path(), quiet=True)
    events = records.read(out / "events.jsonl", "train")
    data = events[-1]["data_seconds"] / (events[-1]["seconds"] + events[-1]["data_seconds"])
    return {
        "tokens_per_second": statistics.median(e["tokens_per_second"] for e in events[4:]),
        "memory": max(e["memory_bytes"] for e in events) - before,
        "loss": events[-1]["loss"],
        "data_share": data,
    }


def measure_trainer(corpus: Path, preset: str, updates: int, bf16: bool, out: Path) -> dict[str, float]:
    """transformers.Trainer with LlamaForCausalLM of the same configuration on the same windows of the corpus."""
    import torch
    import torch._dynamo
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from perennial.data.corpus import Corpus
    from perennial.model.config import ModelConfig

    rows, length = SIZES[preset]
    opened = Corpus.open(corpus)
    shape = ModelConfig.from_preset(preset, vocabulary_size=opened.vocabulary_size)
    stream = opened.train.tokens(0, updates * rows * length)
    windows = [torch.from_numpy(stream[i : i + length].astype("int64")) for i in range(0, len(stream), length)]
    data = [{"input_ids": w, "labels": w} for w in windows]
    before = rss_now()
    config = LlamaConfig(
        vocab_size=shape.vocabulary_size,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied_embeddings,
    )
    times: list[float] = []
    memory: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())
            memory.append(rss_now())

    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=rows,
        max_steps=updates,
        learning_rate=1e-3,
        bf16=bf16,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=data, callbacks=[Clock()])
    trainer.train()
    steps = [b - a for a, b in itertools.pairwise(times)]
    return {
        "tokens_per_second": rows * length / statistics.median(steps),
        "memory": max(memory) - before,
        "loss": trainer.state.log_history[-2]["loss"],
        "data_share": float("nan"),
    }


def worker(arguments: argparse.Namespace) -> None:
    """One measurement; prints it as JSON on the last line."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, out = Path(arguments.corpus), Path(folder) / "out"
        name, preset, updates = arguments.worker, arguments.preset, arguments.updates
        if name.startswith("perennial"):
            result = measure_perennial(corpus, preset, updates, "fp32" if "fp32" in name else "auto", out)
        else:
            result = measure_trainer(corpus, preset, updates, "bf16" in name, out)
        print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--preset", help=argparse.SUPPRESS)
    parser.add_argument("--corpus", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    results: dict[str, dict[str, list[dict[str, float]]]] = {s: {c: [] for c in CONTENDERS} for s in SIZES}
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder))
        for preset in SIZES:
            for repeat in range(arguments.repeats):
                for contender in CONTENDERS:
                    command = [
                        sys.executable,
                        __file__,
                        "--worker",
                        contender,
                        "--preset",
                        preset,
                        "--corpus",
                        str(corpus),
                    ]
                    command += ["--updates", str(arguments.updates)]
                    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
                    if done.returncode:
                        sys.exit(f"{contender} failed:\n{done.stderr[-3000:]}")
                    results[preset][contender].append(json.loads(done.stdout.strip().splitlines()[-1]))
                    print(
                        f"{preset} {contender} {repeat + 1}/{arguments.repeats}: {results[preset][contender][-1]}",
                        file=sys.stderr,
                    )
    report(results, arguments.json)


def report(results: dict[str, dict[str, list[dict[str, float]]]], path: str | None) -> None:
    """Prints the table of medians, and writes all figures when asked."""
    from perennial.core.environment import environment

    print("| model | contender | tokens/s | x Trainer | x Trainer bf16 | memory MiB | data share of a step |")
    print("|---|---|---|---|---|---|---|")
    for preset, contenders in results.items():
        middle = {c: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for c, rs in contenders.items()}
        for contender, row in middle.items():
            speed = row["tokens_per_second"]
            plain, fast = (middle[c]["tokens_per_second"] for c in ("trainer", "trainer bf16"))
            share = f"{row['data_share']:.2%}" if row["data_share"] == row["data_share"] else "-"
            print(
                f"| {preset} | {contender} | {speed:,.0f} | {speed / plain:.2f} | {speed / fast:.2f} "
                f"| {row['memory'] / 2**20:,.0f} | {share} |"
            )
    if path:
        Path(path).write_text(
            json.dumps({"results": results, "environment": environment()}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
