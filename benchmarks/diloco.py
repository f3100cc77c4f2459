"""DiLoCo against summing gradients on every update: final loss at equal tokens, and bytes sent.

    python benchmarks/diloco.py [--work FOLDER] [--records FOLDER] [--workers 2] [--seeds 1]
        [--updates 1500] [--sequences 4] [--peak 1e-3] [--optimizer adamw] [--outer 0.7:0.5 1:0 ...]
        [--rates 1 2 ...] [--corpora FOLDER] [--options width=64 layers=2 ...]

On the demo's corpora (documentation and source code of this Python installation): a base from random weights on the
old corpus, and its continuation on the new one with replay as `perennial continue` derives it; each with every_update
and with diloco at H = 30 and the same batch, of which each worker reads its share. `--outer` compares outer rates and
momenta, `--rates` learning rates, as multiples of the recipe's, for both. The bar: within 1 % of every_update's best
loss on the corpus that is trained on. All continuations start from the base that every_update made at the rate 1.
Resumable: run it again; records (recipes, events, table) go to --records.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

LENGTH = 128
BAR = 0.01
USUAL_INNER = 30
"""Updates of a round, which names of runs leave out."""
MOST_EPOCHS = 16
"""Passes over the old corpus that the base may make; both sides make the same."""
SUMMED = "every_update"


def prepare_all(work: Path, given: Path | None) -> dict[str, Path]:
    """The demo's corpora, 'old' and 'new', prepared once, or those of a finished demo."""
    from perennial.bench.python_text import extract
    from perennial.core.progress import Progress
    from perennial.data.prepare import PrepareSettings, prepare
    from perennial.data.tokenizers.train import train_tokenizer

    if given is not None:
        return {name: (given / "corpora" / name).resolve() for name in ("old", "new")}
    texts = extract(work / "text")
    if not (work / "tokenizer/tokenizer.json").exists():
        train_tokenizer([texts["old"]], work / "tokenizer", vocabulary_size=4096, text_field="text")
    found: dict[str, Path] = {}
    for name in ("old", "new"):
        settings = PrepareSettings.model_validate(
            {
                "name": name,
                "inputs": [str(texts[name])],
                "tokenizer": str(work / "tokenizer"),
                "validation": "4%",
                "max_document_bytes": 16384,
                "split_by": "module",
                "against": [] if name == "old" else [str(found["old"])],
            }
        )
        line = Progress(f"prepare {name}", unit="bytes")
        found[name] = (work / "corpora" / name).resolve()
        prepare(settings, found[name], progress=line)
        line.close()
    return found


def communications(inner: int, outer: list[str]) -> dict[str, Any]:
    """Name of a run -> its communication; without `outer` diloco as it is by default."""
    found: dict[str, Any] = {SUMMED: SUMMED}
    for pair in outer or [""]:
        rate, _, momentum = pair.partition(":")
        chosen = {"outer_rate": float(rate), "outer_momentum": float(momentum)} if pair else {}
        name = " ".join(["diloco", *([pair] if pair else []), *([f"h{inner}"] if inner != USUAL_INNER else [])])
        found[name] = {"name": "diloco", "inner_updates": inner, **chosen}
    return found


def base_recipe(corpora: dict[str, Path], arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """A new model on the old corpus."""
    batch = {"sequences": arguments.sequences, "sequence_length": LENGTH}
    stage = {
        "name": "pretrain",
        "budget": f"{arguments.updates * arguments.sequences * LENGTH} tokens",
        "mixture": {"old": "100%"},
        "schedule": {"name": "cosine", "peak": arguments.peak, "final": arguments.peak / 10, "warmup": "5%"},
        "optimizer": arguments.optimizer,
        "max_epochs": MOST_EPOCHS,
    }
    return {
        "name": "base",
        "seed": seed,
        "model": {"preset": arguments.preset, **({"options": _options(arguments)} if arguments.options else {})},
        "corpora": {"old": str(corpora["old"])},
        "stages": [stage],
        "batch": batch,
    }


def continued_recipe(
    parent: Path, corpora: dict[str, Path], arguments: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """What `perennial continue` derives for the new corpus, at as many tokens as the base had."""
    from perennial.core.lineage import newest_checkpoint
    from perennial.train.continuing import derive

    tokens = arguments.updates * arguments.sequences * LENGTH
    new, place = {"new": corpora["new"]}, parent.parents[1] / "continued"  # where the recipe will lie
    found = derive(newest_checkpoint(parent), new, budget=f"{tokens} tokens", base=place, name="continued", seed=seed)
    return dict(found.recipe.model_dump(mode="json", exclude_unset=True))


def at_rate(recipe: dict[str, Any], rate: float) -> dict[str, Any]:
    """The recipe with this many times its learning rates."""
    stages = []
    for stage in recipe["stages"]:
        rates = {key: rate * value for key, value in stage["schedule"].items() if key in ("peak", "final")}
        stages.append({**stage, "schedule": {**stage["schedule"], **rates}})
    return {**recipe, "stages": stages}


def train(run: Path, recipe: dict[str, Any], communication: Any, workers: int) -> None:
    """One run by as many processes as workers; one that is complete is not repeated."""
    from perennial.core.files import write_json

    run.parent.mkdir(parents=True, exist_ok=True)
    file = run.parent / f"{run.name}.yaml"  # JSON is YAML
    saved = {"evaluation": {"tokens": "32768 tokens", "every": "50%"}, "checkpoints": {"every": "50%", "keep": 1}}
    write_json(file, {**recipe, **saved, "communication": communication})
    command = [sys.executable, "-m", "perennial", "train", str(file), "--out", str(run)]
    done = subprocess.run([*command, *(["--processes", str(workers)] if workers > 1 else [])], check=False)
    if done.returncode or not (run / "events.jsonl").exists():
        sys.exit(f"{run}: training failed ({done.returncode}); run the same command again to go on")


def result(run: Path) -> dict[str, Any]:
    """Final losses by corpus and bytes that each process sent."""
    from perennial.core import records

    done = records.read(run / "events.jsonl", "done")
    if not done:
        sys.exit(f"{run}: was stopped; run the same command again to go on")
    losses = {name: found["nats_per_token"] for name, found in done[-1]["evaluation"]["after"].items()}
    last = records.read(run / "events.jsonl", "train")[-1]
    return {"losses": losses, "sent_bytes": last["sent_bytes"], "updates": last["step"], "tokens": last["tokens"]}


def keep_records(run: Path, target: Path, work: Path) -> None:
    """Copies what proves a run, without its weights; WORK stands for --work."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("recipe.yaml", "resolved.json", "events.jsonl"):
        text = (run / name).read_text(encoding="utf-8").replace(str(work.resolve()), "WORK").replace(str(work), "WORK")
        if name.endswith(".jsonl"):
            with gzip.GzipFile(target / f"{name}.gz", "wb", mtime=0) as file:
                file.write(text.encode())
        else:
            (target / name).write_text(text, encoding="utf-8")


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: per task and communication the mean losses over seeds, the differences and the bytes."""
    lines = [
        "| training | communication | seeds | old nats | new nats | difference | worst seed | sent by each process |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, runs in found.items():
        own = "old" if task.startswith("base") else "new"
        for name, by_seed in runs.items():
            loss = {c: [r["losses"].get(c) for r in by_seed.values()] for c in ("old", "new")}
            plain = [found for other, found in runs.items() if other.startswith(SUMMED)]
            summed = [min(found[seed]["losses"][own] for found in plain) for seed in by_seed]
            changes = [mine / other - 1 for mine, other in zip(loss[own], summed, strict=True)]
            means = [f"{sum(v) / len(v):.4f}" if None not in v else "-" for v in (loss["old"], loss["new"])]
            change = [f"{sum(changes) / len(changes):+.2%}", f"{max(changes):+.2%}"]
            sent = next(iter(by_seed.values()))["sent_bytes"]
            cells = [task, name, str(len(by_seed)), *means, *change, f"{sent / 1e6:,.1f} MB"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/diloco"))
    parser.add_argument("--records", type=Path)
    parser.add_argument("--corpora", type=Path, help="a finished demo, whose corpora are taken")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--sequences", type=int, default=4, help="rows of 128 tokens in an update, over all workers")
    parser.add_argument("--peak", type=float, default=1e-3)
    parser.add_argument("--optimizer", default="adamw", help="of both sides; the continuation takes the base's")
    parser.add_argument("--inner", type=int, default=USUAL_INNER, help="updates of a round")
    parser.add_argument("--preset", default="1m")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=N", help="of the model, beside --preset")
    parser.add_argument("--outer", nargs="*", default=[], metavar="RATE:MOMENTUM")
    parser.add_argument("--rates", nargs="*", type=float, default=[1.0], metavar="FACTOR", help="1 must be among them")
    parser.add_argument("--tasks", nargs="*", default=["base", "continued"], choices=["base", "continued"])
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    corpora = prepare_all(arguments.work, arguments.corpora)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for seed in range(arguments.seeds):
        setting = f"{arguments.workers}-workers-{arguments.updates}x{arguments.sequences}-peak-{arguments.peak:g}"
        setting += "" if arguments.optimizer == "adamw" else f"-{arguments.optimizer}"
        setting += "".join(f"-{option.replace('=', '-')}" for option in sorted(arguments.options))
        folder = arguments.work / setting / f"seed{seed}"
        for task in arguments.tasks:
            base = folder / "base" / SUMMED
            tried = communications(arguments.inner, arguments.outer).items()
            for (kind, communication), rate in itertools.product(tried, sorted(arguments.rates, key=_from_one)):
                name = kind if rate == 1 else f"{kind} rate {rate:g}"
                run = folder / task / name.replace(" ", "-").replace(":", "-")
                make = base_recipe(corpora, arguments, seed) if task == "base" else None
                recipe = make or continued_recipe(base, corpora, arguments, seed + 1)
                train(run, at_rate(recipe, rate), communication, arguments.workers)
                one = result(run)
                found.setdefault(task, {}).setdefault(name, {})[f"seed{seed}"] = one
                print(json.dumps({"task": task, "communication": name, "seed": seed, **one}), flush=True)
                if arguments.records:
                    keep_records(run, arguments.records / run.relative_to(arguments.work), arguments.work)
    text = table(found)
    print(text)
    print(f"bar: a difference of at most {BAR:.0%} on the corpus that is trained on (base: old, continued: new)")
    if arguments.records:
        arguments.records.mkdir(parents=True, exist_ok=True)
        (arguments.records / "summary.md").write_text(text, encoding="utf-8")
        (arguments.records / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def _options(arguments: argparse.Namespace) -> dict[str, int]:
    """The model's options as numbers by name."""
    return {key: int(value) for key, _, value in (option.partition("=") for option in arguments.options)}


def _from_one(rate: float) -> float:
    """What sorts the rates by their distance from 1, whose base all continuations need."""
    return abs(math.log(rate))


if __name__ == "__main__":
    main()
