"""Runs by folder: make one from a recipe, start it, or go on with it. The Python face of `perennial train`."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from perennial.core import files, records
from perennial.core.environment import limit_threads
from perennial.core.errors import UserError
from perennial.core.settings import check, raise_problems, stable_hash
from perennial.model.config import ModelConfig
from perennial.model.roles import role_of
from perennial.model.transformer import Transformer, initialise
from perennial.train import loop
from perennial.train.parallel import join_world, leave_world, wait_for_all
from perennial.train.precision import autocast, native_precision
from perennial.train.recipe import Recipe, Resolved, describe, parse_recipe, read, relative_to, resolve
from perennial.train.session import Session


def plan(recipe: Recipe, *, base: Path) -> Resolved:
    """Resolves a recipe for this machine; measures its training speed when a budget is a time."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    return resolve(recipe, base=base, precision=native_precision(device), measure=tokens_per_second)


def make_run(recipe: Recipe, folder: Path, *, base: Path, header: str = "") -> Resolved:
    """Writes recipe.yaml and resolved.json into a new run folder, or finds the same recipe there already.

    Raises UserError when the folder holds something else.
    """
    rebased = _rebased(recipe, base, folder)
    if (folder / "resolved.json").is_file():
        stored = read(folder / "recipe.yaml")
        if _fingerprint(stored) != _fingerprint(rebased):
            raise UserError(
                f"{folder}: this run folder was made by another recipe (differs in: "
                f"{', '.join(_differences(stored, rebased))}). Give another --out, or resume it as it is with: "
                f"perennial train {folder}"
            )
        return read_resolved(folder)
    if folder.exists() and {p.name for p in folder.iterdir()} - {"recipe.yaml", "corpora"}:
        raise UserError(f"{folder}: exists and is no run folder (it has no resolved.json); give another --out")
    resolved = plan(recipe, base=base)
    text = yaml.safe_dump(rebased.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
    files.write_text(folder / "recipe.yaml", header + text)
    files.write_json(folder / "resolved.json", resolved.model_dump(mode="json"))  # last: it makes the folder a run
    return resolved


def read_resolved(folder: Path) -> Resolved:
    """The resolved recipe of a run folder. Raises UserError when the folder is none."""
    if not (folder / "resolved.json").is_file():
        raise UserError(f"{folder}: no run folder (resolved.json is missing)")
    resolved, problems = check(Resolved, files.read_json(folder / "resolved.json", "resolved recipe"))
    raise_problems(problems, str(folder / "resolved.json"))
    assert resolved is not None
    return resolved


def train(folder: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Starts the run in `folder`, or goes on where it stopped; returns its summary ('complete': False when stopped).

    Raises UserError for bad input and TrainingStopped when training cannot go on.
    """
    limit_threads()
    resolved = read_resolved(folder)
    if finished := records.read(folder / "events.jsonl", "done"):
        return {"run": str(folder), "complete": True, **{k: finished[-1][k] for k in loop.SUMMARY}}
    world = join_world()
    try:
        with contextlib.closing(Session(folder, resolved, world, quiet=quiet)) as session:
            session.console.note(describe(resolved))
            with session.stopping_on_signals():
                loop.run(session)
            return {"run": str(folder), "complete": not session.stopped, **loop.summary(session)}
    finally:
        leave_world(world)


def start(recipe: Recipe, folder: Path, *, base: Path, header: str = "", quiet: bool = False) -> dict[str, Any]:
    """Makes the run folder (on the main process) and trains."""
    world = join_world()
    if world.is_main:
        make_run(recipe, folder, base=base, header=header)
    wait_for_all(world)
    return train(folder, quiet=quiet)


def _rebased(recipe: Recipe, base: Path, folder: Path) -> Recipe:
    """The recipe with its relative paths rewritten to start from `folder`."""

    def move(path: str) -> str:
        return relative_to((base / path).resolve(), folder.resolve())

    data = recipe.model_dump(mode="json", exclude_unset=True)
    for key in ("corpora", "moved"):
        if key in data:
            data[key] = {n: move(p) for n, p in data[key].items()}
    if data.get("parent"):
        data["parent"] = move(data["parent"])
    if data.get("evaluation", {}).get("corpora"):
        data["evaluation"]["corpora"] = {n: move(p) for n, p in data["evaluation"]["corpora"].items()}
    return parse_recipe(data)


def _fingerprint(recipe: Recipe) -> str:
    return stable_hash(recipe.model_dump(mode="json"))


def _differences(one: Recipe, other: Recipe) -> list[str]:
    a, b = one.model_dump(mode="json"), other.model_dump(mode="json")
    return [key for key in a if a[key] != b[key]]


def tokens_per_second(config: ModelConfig, recipe: Recipe, *, seconds: float = 2.0) -> float:
    """Measured training speed of this model and batch on this machine, in tokens per second.

    Times whole updates on random tokens; 5% are taken off for evaluation and saving.
    """
    from perennial.core import plugins
    from perennial.train.step import TorchBatch

    limit_threads()
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    precision = native_precision(device) if recipe.precision == "auto" else recipe.precision
    model = Transformer(config).to(device)
    initialise(model, 0)
    optimizer = plugins.build("optimizers", recipe.stages[0].optimizer)[0].build(model.named_parameters(), role_of)
    objective = plugins.build("objectives", recipe.stages[0].objective)[0]
    rows = recipe.batch.micro_batch or recipe.batch.sequences
    tokens = torch.randint(config.vocabulary_size, (rows, recipe.batch.sequence_length), device=device)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < until:
        begun = time.perf_counter()
        for _ in range(recipe.batch.sequences // rows):
            with autocast(precision, device):
                loss = objective.loss(model, TorchBatch(tokens, tokens, None))
            (loss.total / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    middle = sorted(times[1:])[len(times[1:]) // 2]
    return 0.95 * recipe.batch.tokens / middle
