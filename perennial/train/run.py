"""Runs by folder: make one from a recipe, start it, or go on with it. The Python face of `perennial train`."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from perennial.core import files, plugins, records
from perennial.core.environment import tune_process
from perennial.core.errors import UserError
from perennial.core.files import relative_to
from perennial.core.lineage import newest_checkpoint
from perennial.core.progress import Progress as ProgressLine
from perennial.core.settings import check, override, raise_problems, stable_hash
from perennial.evals.parity import checked_parity, in_words
from perennial.model.foreign import AnyConfig, TransformersConfig
from perennial.model.layerwise import checkpoint_layers, compile_layers
from perennial.model.through_transformers import AnyModel, from_config
from perennial.model.transformer import Transformer, initialise
from perennial.train import loop, memory_advice
from perennial.train.limits import check_memory, check_processes
from perennial.train.parallel import World, join_world, leave_world, wait_for_all
from perennial.train.precision import autocast, native_precision
from perennial.train.recipe import ParallelSettings, Recipe, fewest_rows, parse_recipe, read
from perennial.train.resolve import resolve
from perennial.train.resolved import Resolved, describe, recipe_hash
from perennial.train.session import Session
from perennial.train.workers import rank

RECIPE, RESOLVED, EVENTS = "recipe.yaml", "resolved.json", "events.jsonl"
"""The files of a run folder, beside its checkpoints and the corpora that were prepared for it."""


class RunIsBusy(UserError):
    """Another process trains the run; nothing of it may be touched."""


def plan(recipe: Recipe, *, base: Path, processes: int | None = None) -> Resolved:
    """Resolves a recipe for this machine; measures its training speed when a budget is a time.

    processes: how many will train, where that is not what torchrun says.
    """
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    measure = functools.partial(tokens_per_second, processes=processes)
    return resolve(recipe, base=base, precision=native_precision(device), measure=measure)


def make_run(recipe: Recipe, folder: Path, *, base: Path, header: str = "", processes: int | None = None) -> Resolved:
    """Writes recipe.yaml and resolved.json into a new run folder, or finds the same recipe there already.

    processes: as for `plan`. Raises UserError when the folder holds something else.
    """
    rebased = _rebased(recipe, base, folder)
    if (folder / RESOLVED).is_file():
        stored = read(folder / RECIPE)
        if _fingerprint(stored) != _fingerprint(rebased):
            raise UserError(
                f"{folder}: this run folder was made by another recipe (differs in: "
                f"{', '.join(_differences(stored, rebased))}). Give another --out, or resume it as it is with: "
                f"perennial train {folder}"
            )
        return read_resolved(folder)
    check_place(folder)
    resolved = _imported(plan(recipe, base=base, processes=processes))
    text = header + yaml.safe_dump(
        rebased.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True
    )
    _check_not_lost(folder / RECIPE, text)
    files.write_text(folder / RECIPE, text)
    files.write_json(folder / RESOLVED, resolved.model_dump(mode="json"))  # last: it makes the folder a run
    return resolved


def _imported(resolved: Resolved) -> Resolved:
    """The resolved recipe with the comparison of a foreign parent's logits in its origin. Raises UserError."""
    if resolved.origin is None or resolved.origin.parity is not None or resolved.parent is None:
        return resolved
    found = checked_parity(Path(resolved.parent["path"]))
    with ProgressLine("import") as line:
        line.note(f"import: {in_words(found)}")
    return resolved.model_copy(update={"origin": resolved.origin.model_copy(update={"parity": found})})


def check_place(folder: Path) -> None:
    """Raises UserError when `folder` holds something else than a run or the beginning of one."""
    if not folder.exists() or (folder / RESOLVED).is_file():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file, a run needs a folder; give another --out")
    others = (p.name for p in folder.iterdir() if not p.name.endswith(".tmp"))
    if set(others) - {RECIPE, "corpora"}:
        raise UserError(f"{folder}: exists and is no run folder (it has no {RESOLVED}); give another --out")


def _check_not_lost(path: Path, text: str) -> None:
    """Raises UserError when writing `text` would take the place of a recipe of the user's own."""
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace") != text:
        raise UserError(f"{path}: is in the way: the run would write its own recipe there; give another --out")


@contextlib.contextmanager
def undone_on_error(folder: Path) -> Iterator[None]:
    """Takes back what the body wrote into the run folder when it fails before anything of a run was recorded.

    Prepared corpora stay: they are whole, or the same command goes on with them.
    """
    ours = [path for path in (folder / EVENTS, folder / RESOLVED, folder / RECIPE) if not path.exists()]
    folders = [path for path in (folder / "corpora", folder, *folder.parents) if not path.exists()]
    try:
        yield
    except RunIsBusy:  # what lies there is the other process's
        raise
    except (UserError, OSError):
        if not (folder / EVENTS).is_file() or (folder / EVENTS).stat().st_size == 0:
            for path in [*ours, *folders]:
                with contextlib.suppress(OSError):  # not there, or a folder that something lies in
                    path.rmdir() if path in folders else path.unlink()
        raise


def read_resolved(folder: Path) -> Resolved:
    """The resolved recipe of a run folder. Raises UserError when the folder is none, or its recipe was changed."""
    path = folder / RESOLVED
    if not path.is_file():
        what = "no such folder" if not folder.exists() else f"no run folder ({RESOLVED} is missing)"
        hint = ". It is a checkpoint: give the run folder that it lies in, or start from it with `perennial continue`"
        raise UserError(f"{folder}: {what}{hint if (folder / 'config.json').is_file() else ''}")
    resolved, problems = check(Resolved, files.read_json(path, "resolved recipe"))
    raise_problems(problems, str(path))
    assert resolved is not None
    if recipe_hash(resolved) != resolved.recipe_hash:
        raise UserError(
            f"{path}: was changed by hand, or by another version of Perennial (its recipe_hash is that of other "
            f"settings). A run keeps its recipe: put it back; for other settings start another run from {RECIPE}."
        )
    return _found_again(folder, resolved)


def _found_again(folder: Path, resolved: Resolved) -> Resolved:
    """The resolved recipe with the places that moved together with the run folder, as recipe.yaml names them."""
    places = [facts["path"] for facts in (*resolved.corpora.values(), *([resolved.parent] if resolved.parent else []))]
    if all(Path(place).exists() for place in places) or not (folder / RECIPE).is_file():
        return resolved
    recipe = read(folder / RECIPE)
    named = {**recipe.evaluation.corpora, **recipe.moved, **recipe.corpora}
    corpora = {
        name: {**facts, "path": _moved(facts["path"], folder / named[name])} if name in named else facts
        for name, facts in resolved.corpora.items()
    }
    parent = resolved.parent
    if parent and recipe.parent and not Path(parent["path"]).exists() and (folder / recipe.parent).exists():
        parent = {**parent, "path": str(newest_checkpoint((folder / recipe.parent).resolve()))}
    return resolved.model_copy(update={"corpora": corpora, "parent": parent})


def _moved(place: str, now: Path) -> str:
    """`place` when it is there, else where it lies now, if it does."""
    return place if Path(place).exists() or not now.exists() else str(now.resolve())


def changed_parallel(resolved: Resolved, overrides: Sequence[str]) -> ParallelSettings:
    """How the run is spread over processes from here on: as resolved, with 'parallel.key=value' texts applied.

    Raises UserError for any other setting: what is computed belongs to the run.
    """
    for assignment in overrides:
        if not assignment.startswith("parallel."):
            raise UserError(
                f"{assignment}: a run folder is resumed as it is, though parallel.* may change; "
                "other overrides and --out belong to a recipe file"
            )
    asked = override({"parallel": resolved.parallel.model_dump(mode="json")}, list(overrides))
    parallel, problems = check(ParallelSettings, asked["parallel"], ("parallel",))
    raise_problems(problems, "overrides")
    assert parallel is not None
    return parallel


def train(folder: Path, *, parallel: Sequence[str] = (), quiet: bool = False) -> dict[str, Any]:
    """Starts the run in `folder`, or goes on where it stopped; returns its summary ('complete': False when stopped).

    'asked_to_stop' is also true of a run that was complete when the signal came. parallel: 'parallel.key=value' texts
    that spread it otherwise, this time. Raises UserError for bad input and TrainingStopped when training cannot go on.
    """
    try:
        return _train(folder, parallel, quiet=quiet)
    finally:
        gc.collect()  # a session's parts refer to each other; of many runs in one process each would stay in memory


def _train(folder: Path, parallel: Sequence[str], *, quiet: bool) -> dict[str, Any]:
    tune_process()
    resolved = read_resolved(folder)
    resolved = resolved.model_copy(update={"parallel": changed_parallel(resolved, parallel)})
    if finished := records.read(folder / EVENTS, "done"):
        line = ProgressLine("train", quiet=quiet or rank() > 0)
        line.note(f"{folder}: this run is complete, there is nothing to go on with")
        state = {"complete": True, "asked_to_stop": False}
        return {"run": str(folder), **state, **{k: finished[-1][k] for k in loop.SUMMARY}}
    world = join_world()
    try:
        with _only_here(folder, world), contextlib.closing(Session(folder, resolved, world, quiet=quiet)) as session:
            session.console.note(describe(resolved))
            with session.stopping_on_signals(), memory_advice.explained(folder, resolved, session.world):
                loop.run(session)
            # A run that is asked to stop in its last moments is complete; who has more of them to do must know.
            state = {"complete": not session.stopped, "asked_to_stop": session.stop_requested}
            return {"run": str(folder), **state, **loop.summary(session)}
    except OSError as error:
        explained = files.explain(error, folder)
        if explained is error:
            raise
        raise explained from error
    finally:
        leave_world(world)


@contextlib.contextmanager
def _only_here(folder: Path, world: World) -> Iterator[None]:
    """Keeps a second process from training the same run; the lock goes with the process, however that ends."""
    if not world.is_main or os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunIsBusy(f"{folder}: another process is training this run; wait until it ends, or stop it") from None
    except OSError:  # a file system that knows no locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def start(recipe: Recipe, folder: Path, *, base: Path, header: str = "", quiet: bool = False) -> dict[str, Any]:
    """Makes the run folder (on the main process) and trains."""
    world = join_world()
    check_processes(fewest_rows(recipe), world.size // recipe.parallel.tensor)
    with undone_on_error(folder) if world.is_main else contextlib.nullcontext():
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
    for stage in data["stages"]:
        objective = stage.get("objective")
        if isinstance(objective, dict):
            for key in plugins.load("objectives", objective["name"]).FOLDERS:
                if isinstance(objective.get(key), list):
                    objective[key] = [move(path) for path in objective[key]]
    return parse_recipe(data)


def _fingerprint(recipe: Recipe) -> str:
    return stable_hash(recipe.model_dump(mode="json"))


def _differences(one: Recipe, other: Recipe) -> list[str]:
    a, b = one.model_dump(mode="json"), other.model_dump(mode="json")
    return [key for key in a if a[key] != b[key]]


def tokens_per_second(
    config: AnyConfig, recipe: Recipe, *, seconds: float = 2.0, processes: int | None = None
) -> float:
    """Measured training speed of this model and batch on this machine, in tokens per second.

    Times whole updates on random tokens; 5% are taken off for evaluation and saving. Of many `processes` (default: as
    torchrun says) one times its own share of the rows; what exchanging gradients costs is not in it.
    """
    from perennial.core import plugins
    from perennial.train.feeding import TorchBatch

    tune_process()
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    precision = native_precision(device) if recipe.precision == "auto" else recipe.precision
    check_memory(config, World(0, 1, device))
    model = _with_random_weights(config, device)
    checkpoint_layers(model, recipe.activation_checkpointing)
    if recipe.compile:
        compile_layers(model)
    parameters = model.named_parameters()
    optimizer = plugins.build("optimizers", recipe.stages[0].optimizer)[0].build(parameters, model.role_of)
    objective = plugins.build("objectives", recipe.stages[0].objective)[0]
    objective = objective.with_models([model] * len(objective.checkpoints()))  # teachers are taken to be of its size
    share = math.ceil(recipe.batch.sequences / (processes or int(os.environ.get("WORLD_SIZE", "1"))))
    rows = min(recipe.batch.micro_batch or share, share)
    tokens = torch.randint(config.vocabulary_size, (rows, recipe.batch.sequence_length), device=device)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < until:
        begun = time.perf_counter()
        for _ in range(math.ceil(share / rows)):
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


def _with_random_weights(config: AnyConfig, device: torch.device) -> AnyModel:
    if isinstance(config, TransformersConfig):
        return from_config(config, device=device)
    return initialise(Transformer(config, device=device), 0)
