"""Native models against the same models in transformers: training speed and memory on this machine.

    python benchmarks/native_speed.py [--repeats 5] [--updates 12] [--json FILE]

Both sides start from one Hugging Face folder, see the same random batch of 8 rows of 256 tokens, multiply in the same
dtype (fp32, or bf16 autocast over fp32 weights) and update with torch's fused AdamW after clipping the gradient's norm.
`transformers` is used as its documentation shows: the loss is its own (labels given to the model) and torch is as it
starts up. Native code goes through the next-token objective, with the process tuned as every command of Perennial does.
Every measurement is a process of its own and the contenders take turns. Tokens per second is the median over updates
after the first three; memory is the peak of the resident set (VmHWM) less what the process held before the model was
loaded, all imports done. The last column is the difference of the two losses after the last update.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS, LENGTH = 8, 256
WIDE = {"hidden_size": 320, "num_hidden_layers": 8, "num_attention_heads": 5, "intermediate_size": 864}
NARROW = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512}
TIED = {"vocab_size": 32000, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "Pythia 14M": {"model_type": "gpt_neox", "vocab_size": 50304, **NARROW},
    "GPT-2 23M": {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 320, "n_layer": 6, "n_head": 5},
    "Llama 20M": {"model_type": "llama", **TIED, **WIDE},
    "Qwen3 20M": {"model_type": "qwen3", **TIED, **WIDE, "num_key_value_heads": 5, "head_dim": 64},
}
CONTENDERS = ("native", "transformers")


def resident_bytes(kind: str) -> int:
    """Resident bytes of this process: 'VmRSS' now, 'VmHWM' at the fullest moment since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def forget_peak() -> None:
    """Starts the measurement of the peak anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def make_folder(name: str, folder: Path) -> None:
    """The model as transformers writes it, with weights drawn by transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(MODELS[name])
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0) if name.startswith("GPT-2") else {}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes, **dropout)).save_pretrained(folder)


def measure(contender: str, folder: Path, dtype: str, updates: int) -> dict[str, float]:
    """Trains on one batch again and again."""
    import torch
    import torch._dynamo  # the first optimizer imports it: 90 MB of code on either side
    from transformers import AutoModelForCausalLM

    from perennial.core.environment import tune_process
    from perennial.model.huggingface import load_model
    from perennial.objectives.next_token import NextToken
    from perennial.train.feeding import TorchBatch

    torch.manual_seed(0)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    rows = torch.randint(vocabulary, (ROWS, LENGTH + 1))
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    before = resident_bytes("VmRSS")
    forget_peak()
    if contender == "native":
        tune_process()  # as every command of Perennial does; a script with transformers does not
        model: Any = load_model(folder).train()
        objective, batch = NextToken(), TorchBatch(inputs, targets, None)

        def loss() -> torch.Tensor:
            return objective.loss(model, batch).total / targets.numel()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()

        def loss() -> torch.Tensor:
            # transformers shifts labels itself; given all 257 tokens it would read one more than we do
            found: torch.Tensor = model(input_ids=inputs, shift_labels=targets, labels=targets, use_cache=False).loss
            return found

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    times, value = [], torch.zeros(())
    for _ in range(updates):
        begun = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - begun)
    speed = ROWS * LENGTH / statistics.median(times[3:])
    return {"tokens_per_second": speed, "memory": resident_bytes("VmHWM") - before, "loss": float(value.detach())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", nargs=3, metavar=("CONTENDER", "FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        contender, folder, dtype = arguments.worker
        print(json.dumps(measure(contender, Path(folder), dtype, arguments.updates)))
        return
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as root:
        for name in MODELS:
            make_folder(name, Path(root) / name)
            for dtype in ("fp32", "bf16"):
                found = results.setdefault(f"{name} | {dtype}", {contender: [] for contender in CONTENDERS})
                for repeat in range(arguments.repeats):
                    for contender in CONTENDERS:
                        command = [sys.executable, __file__, "--updates", str(arguments.updates)]
                        command += ["--worker", contender, str(Path(root) / name), dtype]
                        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
                        if done.returncode:
                            sys.exit(f"{contender} failed:\n{done.stderr[-3000:]}")
                        found[contender].append(json.loads(done.stdout.strip().splitlines()[-1]))
                        latest = {key: round(value, 4) for key, value in found[contender][-1].items()}
                        print(f"{name} {dtype} {contender} {repeat + 1}/{arguments.repeats}: {latest}", file=sys.stderr)
    report(results, arguments.json)


def report(results: dict[str, dict[str, list[dict[str, float]]]], path: str | None) -> None:
    """Prints the table of medians, and writes all figures when asked."""
    from perennial.core.environment import environment

    print(
        "| model | dtype | native tokens/s | transformers tokens/s | ratio | native MiB | transformers MiB | losses |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for label, contenders in results.items():
        ours, theirs = (
            {key: statistics.median(one[key] for one in contenders[c]) for key in contenders[c][0]} for c in CONTENDERS
        )
        speeds = (ours["tokens_per_second"], theirs["tokens_per_second"])
        memory = [one["memory"] / 2**20 for one in (ours, theirs)]
        print(
            f"| {label} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {speeds[0] / speeds[1]:.2f} "
            f"| {memory[0]:,.0f} | {memory[1]:,.0f} | {ours['loss'] - theirs['loss']:+.1e} |"
        )
    if path:
        text = json.dumps({"results": results, "environment": environment()}, indent=1)
        Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
