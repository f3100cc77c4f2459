"""One measurement of `train_speed.py`: trains one contender on a prepared task in this process and prints the figures.

    python benchmarks/train_contenders.py TASK.json

The task names the contender, the Llama shape and a folder with the initial weights (`model.safetensors`, names as in
transformers) and the windows of text (`windows.npy`, row by row in the order of the run, T + 1 tokens each). Only
`perennial` needs this package; LitGPT runs in an environment of its own.

Every peer is written the way its own documentation trains a model of this size; what `best` adds is said beside it.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RATE, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
"""The same for all: learning rate (constant), Adam's betas, weight decay, largest gradient norm."""


@dataclass(frozen=True)
class Task:
    """What to measure; written by `train_speed.py` as JSON."""

    contender: str
    shape: dict[str, Any]
    """A Llama configuration under the names of transformers."""
    folder: str
    """Holds model.safetensors, windows.npy and, for Perennial, recipe.json."""
    rows: int
    length: int
    updates: int
    out: str
    """A folder for what the run writes."""


def status_bytes(name: str) -> int:
    """VmRSS (resident now) or VmHWM (the most since it was last reset) of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Stopwatch:
    """Wall and CPU time after every step of the optimizer, and the highest resident set; the same for all.

    `start` it when all is imported and no model is built. The losses are the contender's own account of them.
    """

    def __init__(self) -> None:
        self.walls: list[float] = []
        self.cpus: list[float] = []
        self.losses: list[float] = []
        self.before = self.peak = 0
        self.started = 0.0

    def start(self) -> None:
        """The moment before the model is built."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        with contextlib.suppress(OSError):  # not on every kernel; then the peak of the imports counts too
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        self.before, self.started = status_bytes("VmRSS"), time.perf_counter()
        register_optimizer_step_post_hook(lambda *_: self._update_done())

    def _update_done(self) -> None:
        self.walls.append(time.perf_counter())
        self.cpus.append(time.process_time())
        self.peak = status_bytes("VmHWM")

    def result(self, tokens_per_update: int, skipped: int) -> dict[str, Any]:
        """Medians over the updates after the first `skipped`, whose time is `start_seconds` with all before them."""
        walls, cpus = (
            [b - a for a, b in zip(times[skipped - 1 :], times[skipped:], strict=False)]
            for times in (self.walls, self.cpus)
        )
        return {
            "tokens_per_second": tokens_per_update / statistics.median(walls),
            "cpu_seconds_per_update": statistics.median(cpus),
            "start_seconds": self.walls[skipped - 1] - self.started - skipped * statistics.median(walls),
            "memory_bytes": self.peak - self.before,
            "losses": self.losses,
        }


SKIPPED = 4
"""Updates before the timed ones: the first allocate, load kernels or compile."""


def perennial(task: Task, *, precision: str, compiled: bool = False) -> dict[str, Any]:
    """The whole of `perennial train` on a recipe: loader, events, progress and all; no evaluation inside."""
    import torch._dynamo  # noqa: F401  # the first optimizer imports it, on every side

    from perennial.core import records
    from perennial.core.environment import tune_process
    from perennial.train.recipe import parse_recipe
    from perennial.train.run import start

    tune_process()
    recipe = json.loads((Path(task.folder) / "recipe.json").read_text(encoding="utf-8"))
    recipe |= {"precision": precision, "compile": compiled}
    watch, out = Stopwatch(), Path(task.out) / "run"
    watch.start()
    start(parse_recipe(recipe), out, base=Path(task.folder), quiet=True)
    watch.losses = [event["loss"] for event in records.read(out / "events.jsonl", "train")]
    return watch.result(task.rows * task.length, SKIPPED)


def trainer(task: Task, *, bf16: bool, compiled: bool = False) -> dict[str, Any]:
    """Hugging Face Trainer with LlamaForCausalLM; fused AdamW and SDPA are its defaults.

    Best: bf16 autocast.
    """
    import numpy as np
    import torch
    import torch._dynamo
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    class InOrder(Trainer):
        """Rows in the order of the task."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def rows(batch: list[Any]) -> dict[str, Any]:
        windows = torch.from_numpy(np.stack(batch).astype(np.int64))
        return {"input_ids": windows[:, :-1], "shift_labels": windows[:, 1:].contiguous(), "labels": windows[:, 1:]}

    watch = Stopwatch()
    windows = np.load(Path(task.folder) / "windows.npy", mmap_mode="r")
    watch.start()
    with _weights_left_alone():
        model = LlamaForCausalLM(LlamaConfig(**task.shape))
    _load(model, task, tied="lm_head.weight")
    arguments = TrainingArguments(
        output_dir=task.out,
        per_device_train_batch_size=task.rows,
        max_steps=task.updates,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        bf16=bf16,
        torch_compile=compiled,
        use_cpu=True,
        remove_unused_columns=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    data = _Windows(windows)
    built = InOrder(model=model, args=arguments, train_dataset=data, data_collator=rows)
    built.train()
    watch.losses = [entry["loss"] for entry in built.state.log_history if "loss" in entry]
    return watch.result(task.rows * task.length, SKIPPED)


class _Windows:
    """The rows of a memory-mapped array as a map-style data set."""

    def __init__(self, windows: Any) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Any:
        return self._windows[index]


def nanogpt(task: Task, *, bf16: bool, compiled: bool = False) -> dict[str, Any]:
    """A plain loop as nanoGPT describes itself, around the same Llama in plain modules.

    As it ships, on a CPU: fp32, AdamW as torch makes it, batches cut from a memory map, the whole logits into
    `cross_entropy`, norm clipped, gradients set to None, loss read when it is logged. Best: bf16 autocast, fused AdamW.
    """
    import numpy as np
    import torch
    import torch._dynamo
    import torch.nn.functional as F

    model_class = _plain_llama()
    windows = np.load(Path(task.folder) / "windows.npy", mmap_mode="r")
    watch = Stopwatch()
    watch.start()
    with _weights_left_alone():
        model = model_class(task.shape)
    _load(model, task, tied="lm_head.weight")
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, **({"fused": True} if bf16 else {}))
    if compiled:
        model = torch.compile(model)

    def get_batch(update: int) -> tuple[torch.Tensor, torch.Tensor]:
        part = windows[update * task.rows : (update + 1) * task.rows].astype(np.int64)
        return torch.from_numpy(part[:, :-1]), torch.from_numpy(part[:, 1:])

    x, y = get_batch(0)
    for update in range(task.updates):
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
            logits = model(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.reshape(-1))
        x, y = get_batch((update + 1) % task.updates)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.losses.append(loss.item())
    return watch.result(task.rows * task.length, SKIPPED)


def litgpt(task: Task, *, best: bool, compiled: bool = True) -> dict[str, Any]:
    """LitGPT's own `pretrain.main`: Fabric in bf16-mixed, the whole model compiled, AdamW, as it ships.

    Best: fused AdamW. The peer's loop runs as it is, but for a logger and a last checkpoint.
    """
    import lightning
    import litgpt.pretrain
    import numpy as np
    import torch
    import torch._dynamo
    from litgpt import Config
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule

    shape = task.shape
    config = Config(
        name="speed",
        block_size=task.length,
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_embd=shape["hidden_size"],
        n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"],
        intermediate_size=shape["intermediate_size"],
        norm_class_name="RMSNorm",
        norm_eps=shape["rms_norm_eps"],
        rotary_percentage=1.0,
        rope_base=int(shape["rope_theta"]),
        parallel_residual=False,
        bias=False,
        mlp_class_name="LLaMAMLP",
    )
    windows = np.load(Path(task.folder) / "windows.npy", mmap_mode="r")

    class Rows(DataModule):
        """The windows of the task, in order."""

        def connect(self, *_: Any, **__: Any) -> None:
            """Nothing to connect."""

        def train_dataloader(self) -> Any:
            def collated(batch: list[Any]) -> Any:
                return torch.from_numpy(np.stack(batch).astype(np.int64))

            return torch.utils.data.DataLoader(_Windows(windows), batch_size=task.rows, collate_fn=collated)

        val_dataloader = train_dataloader

    watch = Stopwatch()
    initialise = litgpt.pretrain.initialize_weights

    def initialise_as_all(fabric: Any, model: Any, **sizes: Any) -> None:
        initialise(fabric, model, **sizes)
        _load_litgpt(model, task)

    litgpt.pretrain.initialize_weights = initialise_as_all
    litgpt.pretrain.save_checkpoint = lambda *_, **__: None
    if not compiled:
        torch.compile = lambda model: model  # type: ignore[assignment]
    fabric = lightning.Fabric(devices=1, accelerator="cpu", precision="bf16-mixed")
    fabric.log_dict = lambda metrics, step=None: watch.losses.append(metrics["loss"])
    settings = {"lr": RATE, "betas": list(BETAS), "weight_decay": DECAY, "fused": best}
    tokens = task.rows * task.length
    if best:
        litgpt.pretrain.instantiate_torch_optimizer = lambda _, parameters, **__: torch.optim.AdamW(
            parameters, **settings
        )
    watch.start()
    with contextlib.redirect_stdout(sys.stderr):
        litgpt.pretrain.main(
            fabric=fabric,
            devices=1,
            num_nodes=1,
            seed=1,
            initial_checkpoint_dir=None,
            resume=False,
            config=config,
            data=Rows(),
            out_dir=Path(task.out),
            tokenizer_dir=None,
            tokenizer=None,
            train=TrainArgs(
                save_interval=None,
                log_interval=1,
                global_batch_size=task.rows,
                micro_batch_size=task.rows,
                max_tokens=tokens * task.updates,
                max_norm=CLIP,
                min_lr=RATE,
                lr_warmup_steps=0,
                tie_embeddings=bool(shape["tie_word_embeddings"]),
                max_seq_length=task.length,
            ),
            eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False),
            optimizer={"class_path": "torch.optim.AdamW", "init_args": settings},
        )
    return watch.result(tokens, SKIPPED)


CONTENDERS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "perennial": lambda task: perennial(task, precision="auto"),
    "perennial fp32": lambda task: perennial(task, precision="fp32"),
    "perennial compile": lambda task: perennial(task, precision="auto", compiled=True),
    "trainer": lambda task: trainer(task, bf16=False),
    "trainer best": lambda task: trainer(task, bf16=True),
    "trainer compile": lambda task: trainer(task, bf16=True, compiled=True),
    "litgpt": lambda task: litgpt(task, best=False),
    "litgpt best": lambda task: litgpt(task, best=True),
    "litgpt eager": lambda task: litgpt(task, best=True, compiled=False),
    "nanogpt": lambda task: nanogpt(task, bf16=False),
    "nanogpt best": lambda task: nanogpt(task, bf16=True),
    "nanogpt compile": lambda task: nanogpt(task, bf16=True, compiled=True),
}


def _plain_llama() -> Any:
    """Llama in torch's own modules, under the names of transformers."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Norm(nn.Module):
        def __init__(self, width: int, epsilon: float) -> None:
            super().__init__()
            self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)

    def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    class Attention(nn.Module):
        def __init__(self, shape: dict[str, Any]) -> None:
            super().__init__()
            self.heads, self.kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
            width, size = shape["hidden_size"], shape["hidden_size"] // self.heads
            self.q_proj = nn.Linear(width, self.heads * size, bias=False)
            self.k_proj = nn.Linear(width, self.kv_heads * size, bias=False)
            self.v_proj = nn.Linear(width, self.kv_heads * size, bias=False)
            self.o_proj = nn.Linear(self.heads * size, width, bias=False)

        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            B, T, D = x.shape
            q, k, v = (
                project(x).view(B, T, heads, -1).transpose(1, 2)
                for project, heads in (
                    (self.q_proj, self.heads),
                    (self.k_proj, self.kv_heads),
                    (self.v_proj, self.kv_heads),
                )
            )
            q, k = turned(q, cos, sin).to(v.dtype), turned(k, cos, sin).to(v.dtype)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
            return self.o_proj(y.transpose(1, 2).reshape(B, T, D))

    class Block(nn.Module):
        def __init__(self, shape: dict[str, Any]) -> None:
            super().__init__()
            width, inner = shape["hidden_size"], shape["intermediate_size"]
            self.input_layernorm = Norm(width, shape["rms_norm_eps"])
            self.self_attn = Attention(shape)
            self.post_attention_layernorm = Norm(width, shape["rms_norm_eps"])
            self.mlp = nn.ModuleDict(
                {
                    "gate_proj": nn.Linear(width, inner, bias=False),
                    "up_proj": nn.Linear(width, inner, bias=False),
                    "down_proj": nn.Linear(inner, width, bias=False),
                }
            )

        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            x = x + self.self_attn(self.input_layernorm(x), cos, sin)
            h, mlp = self.post_attention_layernorm(x), self.mlp
            return x + mlp["down_proj"](F.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h))

    class PlainLlama(nn.Module):
        def __init__(self, shape: dict[str, Any]) -> None:
            super().__init__()
            width, vocabulary = shape["hidden_size"], shape["vocab_size"]
            self.model = nn.ModuleDict(
                {
                    "embed_tokens": nn.Embedding(vocabulary, width),
                    "layers": nn.ModuleList(Block(shape) for _ in range(shape["num_hidden_layers"])),
                    "norm": Norm(width, shape["rms_norm_eps"]),
                }
            )
            self.lm_head = nn.Linear(width, vocabulary, bias=False)
            if shape["tie_word_embeddings"]:
                self.lm_head.weight = self.model["embed_tokens"].weight
            size = width // shape["num_attention_heads"]
            angles = torch.arange(shape["max_position_embeddings"])[:, None] / shape["rope_theta"] ** (
                torch.arange(0, size, 2) / size
            )
            self.register_buffer("cos", torch.cat((angles.cos(), angles.cos()), -1), persistent=False)
            self.register_buffer("sin", torch.cat((angles.sin(), angles.sin()), -1), persistent=False)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            length = inputs.shape[1]
            x, cos, sin = self.model["embed_tokens"](inputs), self.cos[:length], self.sin[:length]
            for layer in self.model["layers"]:
                x = layer(x, cos, sin)
            return self.lm_head(self.model["norm"](x))

    return PlainLlama


@contextlib.contextmanager
def _weights_left_alone() -> Iterator[None]:
    """Makes modules without drawing torch's default weights, which are written over at once."""
    import torch

    drawing = torch.nn.init.kaiming_uniform_, torch.nn.init.normal_
    torch.nn.init.kaiming_uniform_ = torch.nn.init.normal_ = lambda tensor, *_, **__: tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.init.kaiming_uniform_, torch.nn.init.normal_ = drawing


def _load(model: Any, task: Task, *, tied: str) -> None:
    """Copies the initial weights into a model with transformers' names, one tensor at a time."""
    import torch
    from safetensors import safe_open

    own = dict(model.named_parameters())
    own.pop(tied if task.shape["tie_word_embeddings"] else "", None)
    with safe_open(Path(task.folder) / "model.safetensors", "pt") as file, torch.no_grad():
        assert set(own) == set(file.keys()), set(own) ^ set(file.keys())
        for name, parameter in own.items():
            parameter.copy_(file.get_tensor(name))


def _load_litgpt(model: Any, task: Task) -> None:
    """Copies the initial weights into LitGPT's model, which keeps queries, keys and values in one matrix."""
    import torch
    from safetensors import safe_open

    with safe_open(Path(task.folder) / "model.safetensors", "pt") as file, torch.no_grad():
        get = file.get_tensor
        model.transformer.wte.weight.copy_(get("model.embed_tokens.weight"))
        tied = task.shape["tie_word_embeddings"]
        model.lm_head.weight.copy_(get("model.embed_tokens.weight" if tied else "lm_head.weight"))
        model.transformer.ln_f.weight.copy_(get("model.norm.weight"))
        for number, block in enumerate(model.transformer.h):
            prefix = f"model.layers.{number}."
            parts = [get(f"{prefix}self_attn.{name}_proj.weight") for name in "qkv"]
            block.attn.qkv.weight.copy_(torch.cat(parts))
            block.attn.proj.weight.copy_(get(f"{prefix}self_attn.o_proj.weight"))
            block.norm_1.weight.copy_(get(f"{prefix}input_layernorm.weight"))
            block.norm_2.weight.copy_(get(f"{prefix}post_attention_layernorm.weight"))
            for own, name in (("fc_1", "gate"), ("fc_2", "up"), ("proj", "down")):
                getattr(block.mlp, own).weight.copy_(get(f"{prefix}mlp.{name}_proj.weight"))


def main() -> None:
    task = Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print(json.dumps(CONTENDERS[task.contender](task)))


if __name__ == "__main__":
    main()
