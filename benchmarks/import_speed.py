"""Time and memory to load a Hugging Face folder of 1 GB, against reading its files and against `safetensors`.

    python benchmarks/import_speed.py [--repeats 5] [--gigabytes 1] [--json FILE]

A Llama of random weights is written to a temporary folder, once in fp32 and once in bf16. Every measurement is a
process of its own; the contenders take turns and begin with another one in every round. What they are:

    reading         the files into one buffer, in pieces of 8 MiB: as fast as they can be had at all
    tensors         `StoredTensors.read` into the type that they are stored in, every value checked
    tensors, fp32   bf16 only: the same into fp32, which fills twice the memory
    model           `load_model`: the folder's configuration and weights, in fp32, to a model that can be trained
    safetensors     its `load_file`, and a copy in fp32, because what it gives is the mapped file, not memory; unchecked

Warm: the files are in the page cache. Cold: they were dropped from it (posix_fadvise), and that they are gone is
checked; what the disk or the host below a virtual machine keeps is out of reach. Just before each measurement another
process fills and frees the memory that will be needed: otherwise who comes first pays for the host to provide it.
Peak memory: growth of VmHWM over the size of what is loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTENDERS = ("reading", "tensors", "tensors, fp32", "model", "safetensors")
TYPES = ("float32", "bfloat16")
STATES = ("warm", "cold")
WIDTH, MLP_WIDTH, HEADS, VOCABULARY = 1024, 2816, 16, 50_304
LAYER = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (MLP_WIDTH, WIDTH),
    "mlp.up_proj": (MLP_WIDTH, WIDTH),
    "mlp.down_proj": (WIDTH, MLP_WIDTH),
    "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
}
BUFFER_BYTES = 8 << 20


def make_folder(folder: Path, dtype: str, num_bytes: float) -> None:
    """A Llama of about `num_bytes`, in shards of half of that."""
    import torch

    from perennial.model.storage import write_tensors

    itemsize = getattr(torch, dtype).itemsize
    outer = {"model.embed_tokens": (VOCABULARY, WIDTH), "lm_head": (VOCABULARY, WIDTH), "model.norm": (WIDTH,)}
    outer_size, layer_size = (sum(map(math.prod, shapes.values())) for shapes in (outer, LAYER))
    layers = round((num_bytes / itemsize - outer_size) / layer_size)
    inner = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in LAYER.items()}
    tensors = {f"{name}.weight": (list(shape), getattr(torch, dtype)) for name, shape in {**outer, **inner}.items()}
    write_tensors(
        folder, tensors, lambda name: torch.randn(tensors[name][0]) * 0.02, max_shard_bytes=num_bytes / 2 + 1e6
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": MLP_WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def files_of(folder: Path) -> list[Path]:
    """The weight files."""
    return sorted(folder.glob("*.safetensors"))


# One measurement, in a process of its own


def read_files(folder: Path) -> Any:
    """The contents of all files in one buffer."""
    import torch

    buffer = torch.empty(sum(path.stat().st_size for path in files_of(folder)), dtype=torch.uint8)
    memory, done = buffer.numpy().data, 0
    for path in files_of(folder):
        with open(path, "rb", buffering=0) as file:
            while number := file.readinto(memory[done : done + BUFFER_BYTES]):
                done += number
    assert done == len(buffer)
    return buffer


def read_tensors(folder: Path, dtype: str | None) -> Any:
    """Every tensor, through our own reader."""
    import torch

    from perennial.model.storage import StoredTensors

    stored = StoredTensors.open(folder)
    wanted = getattr(torch, dtype) if dtype else None
    return {name: stored.read(name, dtype=wanted) for name in stored.names}


def read_with_library(folder: Path) -> Any:
    """Every tensor, through safetensors, in memory of its own."""
    import torch
    from safetensors.torch import load_file

    model = {}
    for path in files_of(folder):
        model |= {name: tensor.to(torch.float32, copy=True) for name, tensor in load_file(path).items()}
    return model


def load(folder: Path) -> Any:
    """The model."""
    from perennial.model.huggingface import load_model

    return load_model(folder).state_dict()


def contender(name: str, folder: Path) -> Callable[[], Any]:
    """What a contender does."""
    return {
        "reading": lambda: read_files(folder),
        "tensors": lambda: read_tensors(folder, None),
        "tensors, fp32": lambda: read_tensors(folder, "float32"),
        "model": lambda: load(folder),
        "safetensors": lambda: read_with_library(folder),
    }[name]


def settle(num_bytes: int) -> None:
    """Fills and frees memory in a process of its own."""
    child = os.fork()
    if child == 0:
        memory = bytearray(num_bytes)
        memory[::4096] = b"\1" * len(range(0, num_bytes, 4096))
        os._exit(0)
    os.waitpid(child, 0)


def put_in_cache(path: Path) -> None:
    """Reads a file once."""
    buffer = bytearray(BUFFER_BYTES)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def drop_from_cache(path: Path) -> bool:
    """Drops a file from the page cache; returns whether that worked."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(descriptor).st_size
        return not any(_is_cached(descriptor, size * place // 50 & ~4095) for place in range(50))
    finally:
        os.close(descriptor)


def _is_cached(descriptor: int, offset: int) -> bool:
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    return True


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{key}:"))


def measure(name: str, state: str, folder: Path) -> dict[str, float]:
    """Seconds, bytes loaded and growth of memory."""
    import safetensors.torch  # noqa: F401  (imports are not what is measured)
    import torch

    import perennial.model.huggingface  # noqa: F401

    torch.ones(1 << 20).sum()  # what torch starts at first use is not either
    action = contender(name, folder)
    is_cold = True
    for path in files_of(folder):
        if state == "warm":
            put_in_cache(path)
        else:
            is_cold &= drop_from_cache(path)
    settle(round(2.5 * sum(path.stat().st_size for path in files_of(folder))))
    before = status("VmHWM")
    start = time.perf_counter()
    loaded = action()
    seconds = time.perf_counter() - start
    peak = status("VmHWM") - before
    size = sum(t.nbytes for t in loaded.values()) if isinstance(loaded, dict) else loaded.nbytes
    return {"seconds": seconds, "bytes": size, "peak": peak / size, "as_asked": float(is_cold)}


# All of them


def contenders_for(dtype: str) -> tuple[str, ...]:
    """Those that differ from one another for weights of this type."""
    return tuple(name for name in CONTENDERS if dtype != "float32" or name != "tensors, fp32")


def compare(repeats: int, num_bytes: float) -> dict[str, Any]:
    """Every measurement: stored type -> state of the page cache -> contender -> list."""
    results: dict[str, Any] = {t: {s: {c: [] for c in contenders_for(t)} for s in STATES} for t in TYPES}
    with tempfile.TemporaryDirectory() as root:
        for dtype in TYPES:
            make_folder(Path(root) / dtype, dtype, num_bytes)
            for path in files_of(Path(root) / dtype):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        for repeat in range(repeats):
            for dtype in TYPES:
                names = contenders_for(dtype)
                first = repeat % len(names)
                for state in STATES:
                    for name in names[first:] + names[:first]:
                        results[dtype][state][name].append(in_own_process(name, state, Path(root) / dtype))
            print(f"{repeat + 1}/{repeats}", file=sys.stderr)
    return results


def in_own_process(name: str, state: str, folder: Path) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", name, state, str(folder)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def report(results: dict[str, Any]) -> None:
    """Prints the table of medians."""
    print("| stored | page cache | contender | seconds (lowest to highest) | x reading | peak memory x weights |")
    print("|---|---|---|---|---|---|")
    for dtype, states in results.items():
        for state, contenders in states.items():
            if not all(run["as_asked"] for runs in contenders.values() for run in runs):
                print(f"skipped: {dtype} {state}: the system did not drop the files from its cache", file=sys.stderr)
                continue
            seconds = {name: [run["seconds"] for run in runs] for name, runs in contenders.items()}
            base = statistics.median(seconds["reading"])
            for name, times in seconds.items():
                middle = statistics.median(times)
                peak = max(run["peak"] for run in contenders[name])
                print(
                    f"| {dtype} | {state} | {name} | {middle:.2f} ({min(times):.2f} to {max(times):.2f}) "
                    f"| {middle / base:.2f} | {peak:.2f} |"
                )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, state, folder = args.measure
        print(json.dumps(measure(name, state, Path(folder))))
        return 0
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    results = compare(args.repeats, args.gigabytes * 1e9)
    report(results)
    if args.json:
        from perennial.core.environment import environment

        facts = {"results": results, "environment": environment()}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
