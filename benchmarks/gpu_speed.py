"""Training speed and memory on one GPU: 124 M, 1 B and 3 B Llama shapes, ours and the peers that are installed.

    python benchmarks/gpu_speed.py [--sizes 124m 1b 3b] [--lengths 2048 4096] [--contenders NAME ...]
                                   [--updates 16] [--records gpu_speed.jsonl] [--dry-run]

Every update is of the same number of tokens, in micro-batches as large as fit (halved when memory runs out). All train
in bf16 autocast over fp32 weights with fused AdamW and clipping. Every measurement is a process of its own; speed is
that of the updates after the first `--skip`, which pay for compiling. Utilisation counts the model's FLOPs (attention
in full, as PaLM's appendix B; nothing for what is computed again) against the bf16 products that this GPU was measured
to do, which is the first measurement. Peers that are not installed are skipped with a line.

Each measurement is added to `--records` as a line of JSON; started again with the same file, what is there is not
measured again. `--device cpu --sizes tiny` runs all of it in seconds, to try it out; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this working tree, installed or not

LLAMA_3 = {"vocabulary_size": 128256, "rope_theta": 500_000.0, "tied_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 128, "vocabulary_size": 4096},
    "124m": {"width": 768, "layers": 12, "heads": 12, "kv_heads": 12, "mlp_width": 2048, "vocabulary_size": 50304},
    "1b": {"width": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "mlp_width": 8192, **LLAMA_3},
    "3b": {"width": 3072, "layers": 28, "heads": 24, "kv_heads": 8, "mlp_width": 8192, **LLAMA_3},
}
"""1b and 3b are Llama 3.2's; 124m is of GPT-2's size with Llama's layers."""
TARGETS = {"1b": 0.50, "3b": 0.55}
"""Share of the measured bf16 products that the best of ours is to reach."""
PUBLISHED = {("1b", 2048): 414, ("1b", 4096): 398, ("3b", 2048): 433, ("3b", 4096): 419}
"""TFLOP/s per H100 (the H200's peak is the same) of MPT models, llm-foundry, scripts/train/benchmarking/README.md at
061f2c7, on 8 or 16 GPUs with FSDP. torchtitan's tables begin at 8 B."""
TITAN_SIZES = ("1b", "3b")
"""Those that torchtitan has too, in the same shape."""
TOKENS_PER_UPDATE = {"cuda": 1 << 16, "cpu": 1 << 9}


@dataclass(frozen=True)
class Contender:
    """One way to train, and what has to be installed for it."""

    name: str
    kind: str
    recipe: dict[str, Any] = field(default_factory=dict)
    """Settings of ours that differ from the default."""
    compiled: bool = False
    """For peers."""
    float8: bool = False
    package: str | None = None


COMPILED = {"compile": True}
CONTENDERS = (
    Contender("perennial", "perennial"),
    Contender("perennial compiled", "perennial", COMPILED),
    Contender("perennial compiled, selective", "perennial", {**COMPILED, "activation_checkpointing": "selective"}),
    Contender("perennial compiled, full", "perennial", {**COMPILED, "activation_checkpointing": "full"}),
    Contender("perennial compiled, documents", "perennial", {**COMPILED, "document_mask": True}),
    Contender("perennial compiled, float8", "perennial", COMPILED, float8=True, package="torchao"),
    Contender("plain loop", "loop", package="transformers"),
    Contender("plain loop compiled", "loop", compiled=True, package="transformers"),
    Contender("trainer", "trainer", package="transformers"),
    Contender("trainer compiled", "trainer", compiled=True, package="transformers"),
    Contender("torchtitan's model compiled", "torchtitan", compiled=True, package="torchtitan"),
)
CEILING = Contender("matrix products", "ceiling")


@dataclass(frozen=True)
class Job:
    """One measurement."""

    contender: str
    size: str
    length: int
    rows: int
    """Rows of a micro-batch to try first."""
    sequences: int
    """Rows per update."""
    updates: int
    skip: int
    device: str
    corpus: str = ""

    @property
    def key(self) -> str:
        """What makes two measurements the same."""
        return f"{self.contender} | {self.size} | {self.length} | {self.sequences} x {self.updates} | {self.device}"


# Planning


def jobs(arguments: argparse.Namespace) -> list[Job]:
    """Everything to measure, the ceiling first; prints a line for what is left out."""
    chosen, device = [], arguments.device
    for contender in CONTENDERS:
        if arguments.contenders and contender.name not in arguments.contenders:
            continue
        if contender.package and importlib.util.find_spec(contender.package) is None:
            print(f"skipped: {contender.name}: the package {contender.package} is not installed", file=sys.stderr)
            continue
        if device == "cpu" and contender.kind == "torchtitan":
            print(f"skipped: {contender.name}: its attention has no backward pass on a CPU", file=sys.stderr)
            continue
        chosen.append(contender)
    found = [Job(CEILING.name, "-", 0, 0, 0, 0, 0, device)]
    for size in arguments.sizes:
        for length in arguments.lengths:
            sequences = TOKENS_PER_UPDATE[device] // length
            for contender in chosen:
                if contender.kind == "torchtitan" and size not in TITAN_SIZES:
                    continue
                rows = rows_that_fit(size, length, sequences, contender, device, arguments.memory)
                found.append(
                    Job(contender.name, size, length, rows, sequences, arguments.updates, arguments.skip, device)
                )
    return found


def estimated_bytes(size: str, length: int, rows: int, contender: Contender, device: str) -> int:
    """What an update takes by our estimator; for peers too, whose logits come on top."""
    from perennial.model.memory import estimate
    from perennial.model.memory_terms import Training

    training = Training(
        rows=rows,
        sequence_length=length,
        micro_batches=2,
        precision="bf16",
        device="cuda" if device == "cuda" else "cpu",
        chunk_tokens=4096,
        checkpointing=contender.recipe.get("activation_checkpointing", "none"),
    )
    return estimate(configuration(size, length), training).total


def rows_that_fit(size: str, length: int, sequences: int, contender: Contender, device: str, memory: float) -> int:
    """The largest power of two of rows that is estimated to fit in `memory` bytes, a tenth left free."""
    rows = sequences
    while rows > 1 and estimated_bytes(size, length, rows, contender, device) > 0.9 * memory:
        rows //= 2
    return rows


def configuration(size: str, length: int) -> Any:
    """The model of a size as our configuration."""
    from perennial.model.config import ModelConfig

    return ModelConfig.model_validate({"tied_embeddings": True, **SHAPES[size], "context": length})


def device_memory(device: str) -> float:
    """Bytes of the GPU (asked by a process of its own, so that nothing of it is taken here) or the machine; or 0."""
    if device == "cpu":
        from perennial.core.environment import memory_bytes

        return float(memory_bytes()["available"] or 4 << 30)
    code = "import torch; print(torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return float(done.stdout.strip() or 0)


# Measuring


def make_corpus(folder: Path, megabytes: float) -> Path:
    """A prepared corpus of this Python's standard library; ids below 4096, whatever the model's vocabulary."""
    from perennial.data.prepare import PrepareSettings, prepare
    from perennial.data.tokenizers.train import train_tokenizer

    text, taken = folder / "text", 0
    text.mkdir()
    for path in sorted(Path(os.__file__).parent.glob("*/*.py")):
        content = path.read_text(encoding="utf-8", errors="ignore")[:20_000]
        (text / f"{taken}_{path.name}").write_text(content, encoding="utf-8")
        taken += len(content)
        if taken > megabytes * 1e6:
            break
    train_tokenizer([text], folder / "tokenizer", vocabulary_size=4096 if megabytes > 1 else 400)
    settings = {"name": "library", "inputs": [str(text)], "tokenizer": str(folder / "tokenizer"), "validation": "10%"}
    prepare(PrepareSettings.model_validate(settings), folder / "corpus")
    return folder / "corpus"


def measure(job: Job, folder: Path) -> dict[str, Any]:
    """The measurement, in this process."""
    from perennial.core.environment import prepare_threads, tune_process

    prepare_threads()
    tune_process()
    contender = next(c for c in (CEILING, *CONTENDERS) if c.name == job.contender)
    kinds: dict[str, Callable[[Job, Contender, Path], dict[str, Any]]] = {
        "ceiling": measure_ceiling,
        "perennial": measure_perennial,
        "loop": measure_loop,
        "torchtitan": measure_loop,
        "trainer": measure_trainer,
    }
    return {**kinds[contender.kind](job, contender, folder), "device_name": device_name(job.device)}


def device_name(device: str) -> str:
    """The GPU's or the processor's name."""
    import torch

    from perennial.core.environment import cpu_model

    return torch.cuda.get_device_name() if device == "cuda" else cpu_model()


def peak_bytes(device: str) -> int:
    """The most that was allocated on the GPU, or resident."""
    import resource

    import torch

    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_ceiling(job: Job, contender: Contender, folder: Path) -> dict[str, Any]:
    """FLOPs per second of bf16 matrix products, the best of two seconds of attempts (a moment on a CPU)."""
    import torch

    from perennial.train.precision import matmul_rate

    seconds = 2.0 if job.device == "cuda" else 0.2
    return {"flops_per_second": matmul_rate("bf16", torch.device(job.device), seconds=seconds)}


def measure_perennial(job: Job, contender: Contender, folder: Path) -> dict[str, Any]:
    """The loop as `perennial train` runs it, events and all, but without writing a checkpoint of many gigabytes."""
    import torch

    from perennial.core import records
    from perennial.train import saver, session
    from perennial.train.recipe import parse_recipe
    from perennial.train.run import start

    if contender.float8:
        first = session.checkpoint_layers

        def with_float8(model: Any, policy: Any) -> None:
            make_float8(model.model.layers, emulated=job.device == "cpu")
            first(model, policy)

        session.checkpoint_layers = with_float8
    saver.Saver.save = lambda self, **how: None  # type: ignore[method-assign]
    batch = {"sequences": job.sequences, "sequence_length": job.length, "micro_batch": job.rows}
    stage = {
        "name": "speed",
        "budget": f"{job.updates * job.sequences * job.length} tokens",
        "mixture": {"library": 1},
        "schedule": {"name": "constant", "peak": 1e-4},
    }
    recipe = {
        "name": "speed",
        "model": {"options": {"tied_embeddings": True, **SHAPES[job.size], "context": job.length}},
        "corpora": {"library": job.corpus},
        "batch": batch,
        "precision": "bf16",
        "evaluation": {"every": None, "tokens": f"{job.length} tokens"},
        "checkpoints": {"every": None},
        "stages": [stage],
        **contender.recipe,
    }
    start(parse_recipe(recipe), folder / "run", base=Path(), quiet=True)
    events = records.read(folder / "run" / "events.jsonl", "train")
    begun, ended = (event["seconds"] + event["data_seconds"] for event in (events[job.skip - 1], events[-1]))
    return {
        "tokens_per_second": (events[-1]["tokens"] - events[job.skip - 1]["tokens"]) / (ended - begun),
        "first_update_seconds": events[0]["seconds"],
        "data_share": events[-1]["data_seconds"] / ended,
        "memory_bytes": peak_bytes(job.device),
        "loss": events[-1]["loss"],
        "torch": str(torch.__version__),
    }


def make_float8(layers: Any, *, emulated: bool) -> None:
    """Lets torchao multiply the layers' matrices in float8, scaled per tensor, where their sizes allow it."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def is_suitable(module: Any, name: str) -> bool:
        return bool(module.in_features % 16 == 0 and module.out_features % 16 == 0)

    convert_to_float8_training(layers, config=Float8LinearConfig(emulate=emulated), module_filter_fn=is_suitable)


def llama(job: Job) -> Any:
    """The same shape in transformers, fp32 weights, on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = configuration(job.size, job.length)
    config = LlamaConfig(
        vocab_size=shape.vocabulary_size,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied_embeddings,
        use_cache=False,
    )
    with torch.device(job.device):
        return LlamaForCausalLM(config).float()


def windows(job: Job) -> Any:
    """Rows of the corpus, (number, T + 1) int64, as many as all updates need, from the beginning again if need be."""
    import torch

    from perennial.data.corpus import Corpus

    tokens = Corpus.open(Path(job.corpus)).train.tokens
    needed = job.sequences * (job.length + 1)
    stream = torch.from_numpy(tokens(0, needed).astype("int64"))
    repeats = -(-needed // len(stream))
    return stream.repeat(repeats)[:needed].view(job.sequences, job.length + 1)


def titan(job: Job) -> Callable[[Any], Any]:
    """torchtitan's model of the size, its blocks compiled: tokens to logits."""
    import torch
    from torchtitan.models import llama3

    with torch.device(job.device):
        model = getattr(llama3, f"_{job.size}")(attn_backend="flex").build()
        model.init_states()
    for layer in model.layers.values():
        layer.compile()
    positions = torch.arange(job.length, device=job.device).expand(job.rows, -1)
    masks = model.get_attention_masks(positions)
    forward: Any = lambda inputs: model(inputs, positions=positions, attention_masks=masks)  # noqa: E731
    forward.parameters = model.parameters
    return forward


def measure_loop(job: Job, contender: Contender, folder: Path) -> dict[str, Any]:
    """A loop of twenty lines around another model: autocast, cross entropy of all logits, clipping, fused AdamW."""
    import torch
    import torch.nn.functional as F

    device = torch.device(job.device)
    if contender.kind == "torchtitan":
        model: Any = titan(job)
        logits_of = model
    else:
        model = llama(job)
        run = torch.compile(model) if contender.compiled else model
        logits_of = lambda inputs: run(input_ids=inputs).logits  # noqa: E731
    rows = windows(job).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    clock = Clock(job)
    for update in range(job.updates):
        for start in range(0, job.sequences, job.rows):
            part = rows[start : start + job.rows]
            with torch.autocast(device.type, torch.bfloat16):
                logits = logits_of(part[:, :-1])
                loss = F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten())
            (loss * len(part) / job.sequences).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.update_done(update + 1)
    return {**clock.result(), "loss": float(loss.detach())}


def measure_trainer(job: Job, contender: Contender, folder: Path) -> dict[str, Any]:
    """transformers.Trainer as its documentation shows, with bf16 and, compiled, torch_compile."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    clock = Clock(job)

    class Stop(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **others: Any) -> None:
            clock.update_done(state.global_step)

    rows = windows(job)[:, :-1].contiguous()
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=job.rows,
        gradient_accumulation_steps=job.sequences // job.rows,
        max_steps=job.updates,
        learning_rate=1e-4,
        bf16=True,
        torch_compile=contender.compiled,
        use_cpu=job.device == "cpu",
        report_to=[],
        logging_steps=job.updates,
        save_strategy="no",
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=llama(job), args=arguments, train_dataset=data, callbacks=[Stop()])
    trainer.train()
    return {**clock.result(), "loss": trainer.state.log_history[0]["loss"]}


class Clock:
    """The time between the end of update `skip` and that of the last; the device is waited for at these two only."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.begun, self.marks = time.perf_counter(), {}

    def update_done(self, number: int) -> None:
        """Call it after each update, counted from 1."""
        import torch

        if number in (1, self.job.skip, self.job.updates):
            if self.job.device == "cuda":
                torch.cuda.synchronize()
            self.marks[number] = time.perf_counter()

    def result(self) -> dict[str, Any]:
        """Speed and memory."""
        import torch

        job = self.job
        tokens = (job.updates - job.skip) * job.sequences * job.length
        return {
            "tokens_per_second": tokens / (self.marks[job.updates] - self.marks[job.skip]),
            "first_update_seconds": self.marks[1] - self.begun,
            "memory_bytes": peak_bytes(job.device),
            "torch": str(torch.__version__),
        }


# Running


def run(job: Job) -> dict[str, Any]:
    """Measures in a process of its own, with half the rows when memory runs out; {'failed': why} when it fails."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    rows = job.rows
    while True:
        task = json.dumps({**asdict(job), "rows": rows})
        done = subprocess.run(
            [sys.executable, __file__, "--worker", task], capture_output=True, text=True, env=environment, check=False
        )
        if done.returncode == 0:
            return {**json.loads(done.stdout.strip().splitlines()[-1]), "rows": rows}
        if "out of memory" not in done.stderr.lower() or rows <= 1:
            return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][-500:], "rows": rows}
        rows //= 2


def recorded(path: Path) -> dict[str, dict[str, Any]]:
    """Measurements that are there already, by key; a last line that was cut off is passed over."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "failed" not in entry["result"]:
            found[entry["key"]] = entry
    return found


def table(entries: list[dict[str, Any]]) -> Iterator[str]:
    """The results as a Markdown table."""
    ceilings = [e["result"]["flops_per_second"] for e in entries if e["job"]["contender"] == CEILING.name]
    ceiling = statistics.median(ceilings)
    measured = [entry for entry in entries if entry["job"]["contender"] != CEILING.name]
    yield f"bf16 products: {ceiling / 1e12:.0f} TFLOP/s on {entries[0]['result']['device_name']}"
    yield ""
    yield "| size | length | contender | rows | tokens/s | TFLOP/s | of products | target | published TFLOP/s | GiB |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    from perennial.model.cost import flops_per_token

    for entry in measured:
        job, result = entry["job"], entry["result"]
        head = f"| {job['size']} | {job['length']} | {job['contender']} | {result['rows']} "
        if "failed" in result:
            yield f"{head}| failed: {result['failed'][-80:]} | | | | | |"
            continue
        flops = result["tokens_per_second"] * flops_per_token(configuration(job["size"], job["length"]), job["length"])
        target = f"{TARGETS[job['size']]:.0%}" if job["size"] in TARGETS else "-"
        published = PUBLISHED.get((job["size"], job["length"]), "-")
        yield (
            f"{head}| {result['tokens_per_second']:,.0f} | {flops / 1e12:.3g} | {flops / ceiling:.1%} | {target} "
            f"| {published} | {result['memory_bytes'] / 2**30:.1f} |"
        )


def parse(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    names = [contender.name for contender in CONTENDERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=tuple(SHAPES), default=["124m", "1b", "3b"])
    parser.add_argument("--lengths", nargs="+", type=int, metavar="TOKENS")
    parser.add_argument("--contenders", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--skip", type=int, default=6, help="updates that pay for compiling and are not timed")
    parser.add_argument("--records", default="gpu_speed.jsonl", metavar="FILE")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured and stop")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    arguments.lengths = arguments.lengths or ([64] if arguments.device == "cpu" else [2048, 4096])
    if not 0 < arguments.skip < arguments.updates:
        parser.error("--skip must be above 0 and below --updates")
    return arguments


def main(given: list[str] | None = None) -> int:
    arguments = parse(given)
    if arguments.worker:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(Job(**json.loads(arguments.worker)), Path(folder))))
        return 0
    there = device_memory(arguments.device)
    if not there and not arguments.dry_run:
        print("gpu_speed: no GPU here, nothing is measured; --dry-run lists what would be, --device cpu tries it out")
        return 0
    arguments.memory = there or 141e9
    todo = jobs(arguments)
    if arguments.dry_run:
        for job in todo:
            print(f"{job.key} | micro-batches of {job.rows} rows" if job.length else job.key)
        return 0
    path = Path(arguments.records)
    entries = recorded(path)
    with tempfile.TemporaryDirectory() as folder:
        corpus = str(make_corpus(Path(folder), 0.3 if arguments.device == "cpu" else 12))
        for number, job in enumerate(todo, 1):
            if job.key not in entries:
                result = run(Job(**{**asdict(job), "corpus": corpus}))
                entries[job.key] = {"key": job.key, "job": asdict(job), "result": result}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entries[job.key]) + "\n")
            print(f"{number}/{len(todo)} {job.key}: {entries[job.key]['result']}", file=sys.stderr)
    print("\n".join(table([entries[job.key] for job in todo])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
