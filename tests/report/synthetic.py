"""Run folders with made-up but plausible numbers, written without training: base, a, b, c and d of the demo.

`python -m tests.report.synthetic FOLDER` writes them, and the page that compares them, to look at in a browser.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perennial.core.records import Recorder

BYTES = {"old": 262_144, "new": 240_000, "third": 200_000}
BYTES_PER_TOKEN = 3.2
ROW = 256
BATCH = 16 * ROW
ENVIRONMENT = {
    "perennial": "0.1.0",
    "commit": None,
    "python": "3.11.9",
    "torch": "2.13.0",
    "system": "Linux x86_64",
    "cpu": "Example CPU @ 2.60GHz",
    "cores": 2,
    "memory_bytes": 16 * 2**30,
    "devices": [],
    "threads": {"torch": 2, "OMP_WAIT_POLICY": "PASSIVE"},
}


@dataclass(frozen=True)
class Draw:
    """One source of a stage: the corpus, its role and its share of the tokens."""

    corpus: str
    weight: float
    role: str = "fresh"

    @property
    def name(self) -> str:
        return f"replay/{self.corpus}" if self.role == "replay" else self.corpus


@dataclass(frozen=True)
class Written:
    """What a child needs to know of a run that was written."""

    folder: Path
    name: str
    checkpoint: str
    lineage: dict[str, Any]
    after: dict[str, float]

    @property
    def parent(self) -> dict[str, str]:
        newest = max((self.folder / "checkpoints").iterdir(), key=lambda p: int(p.name))
        return {"path": str(newest), "checkpoint": self.checkpoint}


@dataclass(frozen=True)
class Plan:
    """A run to be written. Losses are (at the start, at the end) per corpus, in nats per token."""

    name: str
    losses: Mapping[str, tuple[float, float]]
    mixture: Sequence[Draw]
    tokens: int
    rates: tuple[float, float, float]
    """Rate at the start, peak and end."""
    schedule: str = "cosine"
    bump: Mapping[str, float] = field(default_factory=dict)
    """How far above the straight way a loss rises in the first tenth of the run."""
    flops_per_token: float = 1.3e7
    parameters: int = 2_113_536
    bytes_per_token: float = BYTES_PER_TOKEN
    tokenizer: str = "tokenizer-one"
    evaluations: int = 12
    seed: int = 0


def fingerprint(corpus: str, tokenizer: str = "tokenizer-one") -> str:
    return hashlib.sha256(f"{corpus}/{tokenizer}".encode()).hexdigest()


def write_run(
    root: Path, plan: Plan, *, parent: Written | None = None, stop_at: float = 1.0, saved: bool = True
) -> Written:
    """Writes the folder of a run; `stop_at` below 1 leaves it unfinished, `saved=False` without a checkpoint."""
    folder = root / plan.name
    recipe_hash = hashlib.sha256(f"{plan.name}/{plan.tokens}/{plan.seed}".encode()).hexdigest()
    facts = {
        n: {
            "path": f"/data/{n}",
            "fingerprint": fingerprint(n, plan.tokenizer),
            "tokenizer": plan.tokenizer,
            "role": "new" if any(d.corpus == n and d.role == "fresh" for d in plan.mixture) else "old",
        }
        for n in plan.losses
    }
    _write_recipe(folder, plan, parent, recipe_hash, facts)
    clock = iter(1_700_000_000 + 0.5 * i for i in range(10_000_000))
    recorder = Recorder(folder / "events.jsonl", now=lambda: next(clock))
    recorder.write(
        "run",
        name=plan.name,
        recipe_hash=recipe_hash,
        parameters=plan.parameters,
        flops_per_token=plan.flops_per_token,
        parent=parent.parent if parent else None,
        processes=1,
        precision="fp32",
        environment=ENVIRONMENT,
    )
    recorder.write(
        "stage",
        tokens=0,
        stage="main",
        index=0,
        stage_tokens=plan.tokens,
        schedule=_schedule(plan),
        rate_before=1e-4 if parent else None,
        rate_start=plan.rates[0],
        optimizer={"name": "adamw", "betas": [0.9, 0.95]},
        optimizer_state="keep",
        objective={"name": "next_token"},
        sources=[
            {"name": d.name, "weight": d.weight, "role": d.role, "corpus": f"/data/{d.corpus}"} for d in plan.mixture
        ],
    )
    seconds = {"train": 0.0, "data": 0.0, "evaluate": 0.0, "save": 0.0}
    updates = int(plan.tokens * stop_at) // BATCH
    every = max(1, plan.tokens // BATCH // plan.evaluations)
    before = _evaluation(plan, 0.0)
    recorder.write("evaluation", tokens=0, flops=0.0, stage="main", moment="before", corpora=before)
    rng, after = random.Random(plan.seed), before
    for update in range(1, updates + 1):
        tokens, share = update * BATCH, update * BATCH / plan.tokens
        seconds["train"] += 0.11
        seconds["data"] += 0.0004
        recorder.write(
            "train",
            tokens=tokens,
            step=update,
            stage="main",
            loss=_training_loss(plan, share) + rng.gauss(0, 0.08),
            rate=_rate(plan, share),
            gradient_norm=0.4 + 3 * math.exp(-20 * share) + abs(rng.gauss(0, 0.05)),
            tokens_per_second=BATCH / 0.1104,
            flops=tokens * plan.flops_per_token,
            seconds=round(seconds["train"], 4),
            data_seconds=round(seconds["data"], 4),
            mfu=0.41,
            memory_bytes=612_000_000,
        )
        last = update == plan.tokens // BATCH
        if update % every == 0 or last:
            seconds["evaluate"] += 0.8
            after = _evaluation(plan, share)
            moment = "after" if last else "during"
            flops = tokens * plan.flops_per_token
            recorder.write("evaluation", tokens=tokens, flops=flops, stage="main", moment=moment, corpora=after)
    tokens = updates * BATCH
    stage = _stage_record(plan, parent, recipe_hash, tokens, seconds["train"])
    lineage = {
        "format": 1,
        "checkpoint": hashlib.sha256(f"{plan.name}/{tokens}/{plan.seed}".encode()).hexdigest()[:16],
        "stages": [*(parent.lineage["stages"] if parent else []), stage],
        "evaluation": {"before": before, "after": after},
        "corpora": facts,
        "environment": ENVIRONMENT,
    }
    if saved:
        seconds["save"] += 0.3
        _write_checkpoint(folder / "checkpoints" / str(tokens), lineage)
        sources = {s["name"]: {k: s[k] for k in ("rows", "tokens", "epochs")} for s in stage["sources"]}
        recorder.write("consumed", tokens=tokens, stage="main", sources=sources)
        recorder.write("checkpoint", tokens=tokens, path=str(tokens), seconds=0.3)
    if stop_at >= 1:
        total = plan.flops_per_token * tokens
        evaluation = {"before": before, "after": after}
        recorder.write("done", tokens=tokens, flops=total, seconds=seconds, evaluation=evaluation)
    recorder.close()
    ends = {name: values["nats_per_token"] for name, values in after.items()}
    return Written(folder, plan.name, lineage["checkpoint"], lineage, ends)


def demo(root: Path, tokens: int = 300 * BATCH) -> dict[str, Written]:
    """The five runs of the demo: base, then a, b, c from it, and d from random weights at twice the tokens."""
    fresh = [Draw("new", 1.0)]
    replay = [Draw("new", 0.75), Draw("old", 0.25, "replay")]
    start = {"old": 8.32, "new": 8.35}
    base = write_run(
        root, Plan("base", {"old": (8.32, 4.55), "new": (8.35, 6.10)}, [Draw("old", 1.0)], tokens, (0.0, 1e-3, 1e-4))
    )
    plans = {
        "a": Plan("a", _losses(base, old=5.21, new=4.62), fresh, tokens, (1e-4, 1e-4, 1e-4), schedule="constant"),
        "b": Plan("b", _losses(base, old=6.43, new=4.08), fresh, tokens, (1e-4, 1e-3, 1e-4), bump={"old": 0.9}),
        "c": Plan("c", _losses(base, old=4.69, new=4.11), replay, tokens, (1e-4, 1e-3, 1e-4), bump={"old": 0.35}),
    }
    runs = {"base": base, **{name: write_run(root, plan, parent=base) for name, plan in plans.items()}}
    both = [Draw("old", 0.5), Draw("new", 0.5)]
    ends = {"old": (start["old"], 4.66), "new": (start["new"], 4.16)}
    runs["d"] = write_run(root, Plan("d", ends, both, 2 * tokens, (0.0, 1e-3, 1e-4)))
    return runs


def _losses(parent: Written, **ends: float) -> dict[str, tuple[float, float]]:
    return {name: (parent.after[name], end) for name, end in ends.items()}


def _curve(start: float, end: float, bump: float, share: float) -> float:
    fall = (start - end) * math.exp(-7 * share) * (1 - share)
    return end + fall + bump * math.exp(-(((share - 0.1) / 0.09) ** 2)) * (share > 0)


def _evaluation(plan: Plan, share: float) -> dict[str, dict[str, Any]]:
    result = {}
    for name, (start, end) in plan.losses.items():
        nats = _curve(start, end, plan.bump.get(name, 0.0), share)
        tokens = round(BYTES[name] / plan.bytes_per_token)
        bits = nats * tokens / math.log(2) / BYTES[name]
        result[name] = {"nats_per_token": nats, "bits_per_byte": bits, "tokens": tokens, "bytes": BYTES[name]}
    return result


def _training_loss(plan: Plan, share: float) -> float:
    return sum(d.weight * _curve(*plan.losses[d.corpus], 0.0, share) for d in plan.mixture)


def _rate(plan: Plan, share: float) -> float:
    start, peak, end = plan.rates
    if share < 0.1:
        return start + (peak - start) * share / 0.1
    return end + (peak - end) / 2 * (1 + math.cos(math.pi * (share - 0.1) / 0.9))


def _schedule(plan: Plan) -> dict[str, Any]:
    return {"name": plan.schedule, "peak": plan.rates[1], "final": plan.rates[2]}


def _stage_record(plan: Plan, parent: Written | None, recipe_hash: str, tokens: int, seconds: float) -> dict[str, Any]:
    return {
        "run": plan.name,
        "stage": "main",
        "recipe_hash": recipe_hash,
        "parent": parent.checkpoint if parent else None,
        "seed": plan.seed,
        "tokens": tokens,
        "complete": tokens == plan.tokens,
        "flops": tokens * plan.flops_per_token,
        "seconds": round(seconds, 3),
        "sequence_length": ROW,
        "batch_tokens": BATCH,
        "precision": "fp32",
        "schedule": _schedule(plan),
        "rate_start": plan.rates[0],
        "rate_peak": plan.rates[1],
        "rate_end": _rate(plan, tokens / plan.tokens),
        "optimizer": {"name": "adamw", "betas": [0.9, 0.95]},
        "objective": {"name": "next_token"},
        "sources": list(_sources(plan, tokens)),
        "skipped_rows": [],
    }


def _sources(plan: Plan, tokens: int) -> Iterator[dict[str, Any]]:
    for draw in plan.mixture:
        rows = round(tokens * draw.weight / ROW)
        yield {
            "name": draw.name,
            "corpus": f"/data/{draw.corpus}",
            "fingerprint": fingerprint(draw.corpus, plan.tokenizer),
            "weight": draw.weight,
            "role": draw.role,
            "seed": plan.seed,
            "offset_rows": 0,
            "seen": [],
            "max_epochs": 4.0,
            "rows": rows,
            "tokens": rows * ROW,
            "epochs": round(rows / 6000, 6),
        }


def _write_recipe(
    folder: Path, plan: Plan, parent: Written | None, recipe_hash: str, facts: dict[str, dict[str, Any]]
) -> None:
    folder.mkdir(parents=True)
    mixture = ", ".join(f"{d.corpus if d.role == 'fresh' else 'replay'}: {d.weight:.0%}" for d in plan.mixture)
    start = f"parent: {parent.parent['path']}" if parent else "model: {preset: tiny}"
    text = (
        f"name: {plan.name}\nseed: {plan.seed}\n{start}\nstages:\n  - name: main\n    budget: {plan.tokens} tokens\n"
        f"    mixture: {{{mixture}}}\n    schedule: {{name: {plan.schedule}, peak: {plan.rates[1]}}}\n"
    )
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    resolved = {
        "name": plan.name,
        "recipe_hash": recipe_hash,
        "seed": plan.seed,
        "parent": parent.parent if parent else None,
        "model": {"vocabulary_size": 4096, "width": 128, "layers": 6, "heads": 4, "kv_heads": 2, "context": 256},
        "parameters": plan.parameters,
        "flops_per_token": plan.flops_per_token,
        "tokens": plan.tokens,
        "flops": plan.tokens * plan.flops_per_token,
        "corpora": facts,
        "stages": [
            {
                "name": "main",
                "tokens": plan.tokens,
                "updates": plan.tokens // BATCH,
                "sources": [
                    {k: s[k] for k in ("name", "corpus", "fingerprint", "weight", "role")} for s in _sources(plan, 0)
                ],
                "schedule": _schedule(plan),
                "rate_before": 1e-4 if parent else None,
                "rate_start": plan.rates[0],
                "rate_peak": plan.rates[1],
                "rate_end": plan.rates[2],
                "optimizer": {"name": "adamw"},
                "optimizer_state": "keep",
            }
        ],
        "precision": "fp32",
    }
    (folder / "resolved.json").write_text(json.dumps(resolved, indent=2), encoding="utf-8")


def _write_checkpoint(folder: Path, lineage: dict[str, Any]) -> None:
    state = folder / "perennial"
    state.mkdir(parents=True)
    (state / "lineage.json").write_text(json.dumps(lineage, indent=2), encoding="utf-8")
    digest = hashlib.sha256(lineage["checkpoint"].encode()).hexdigest()
    files = {"model.safetensors": {"bytes": 8_454_144, "sha256": digest}}
    (state / "manifest.json").write_text(json.dumps({"format": 1, "files": files}), encoding="utf-8")


if __name__ == "__main__":
    from perennial.report.comparison import compare
    from perennial.report.page import write_report

    target = Path(sys.argv[1])
    written = demo(target)
    print(write_report(compare([run.folder for run in written.values()]), target / "report.html"))
