"""lm-evaluation-harness inside this process: tasks opened, a model folder measured on them, every example's score kept.

Source: Gao et al., "A framework for few-shot language model evaluation" (EleutherAI), package lm-eval, extra `eval`.
Limits: one process and one device; text tasks; the harness's own standard errors are not used (see `tasks`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from perennial.core.environment import with_variables
from perennial.core.errors import UserError, nearest
from perennial.core.progress import Progress
from perennial.evals.task_files import FILE_FORMATS, TaskFile, data_files

PACKAGE = "lm-eval"
_SEED = 1234  # the harness's own default, for the choice of examples in a prompt and for sampled text
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_NOT_FOR_TASKS = {"include", "tag", "group", "task_list", "class"}
"""Keys of a task file that the harness reads before it makes the task."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric of one task: the value, and what every example contributed to it."""

    value: float | None
    """None where the harness gives no finite number."""
    higher_is_better: bool | None
    """None when the task does not say."""
    is_mean: bool
    aggregate: Callable[[list[Any]], float]
    """From the examples' contributions to the value."""
    examples: Mapping[int, Any]
    """Number of the example in the task's data -> its contribution; empty for groups."""
    weights: Mapping[str, float]
    """For groups: task -> its share of the value, which is their weighted mean."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What one model scored on one task or group of tasks."""

    task: str
    file: TaskFile | None
    """None for a task that the harness brings with it."""
    version: str | None
    num_fewshot: int | None
    examples: int
    available: int
    """Examples that the task has; more than `examples` under a limit."""
    examples_id: str
    """16 hex digits over every example and its prompt: equal where two models were asked the same."""
    metrics: Mapping[str, Metric]
    """'acc', or 'exact_match,strict-match' for a metric behind a named filter."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How tasks are run."""

    limit: int | None
    """Most examples per task; None for all."""
    num_fewshot: int | None
    """Solved examples in the prompt; None leaves it to the task."""
    batch_size: int
    precision: str
    """'auto', 'fp32' or 'bf16'; auto is fp32 on a CPU and as stored on a GPU."""
    allow_code: bool
    online: bool
    quiet: bool


def version() -> str:
    """The installed version of the harness. Raises UserError that says how to install it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness, the extra `eval`: pip install 'lm-eval[hf]>=0.4.12'")
    return metadata.version(PACKAGE)


def precision_of(options: Options) -> str:
    """'fp32', 'bf16' or 'as stored': the number format that models are measured in on this machine."""
    import torch

    if options.precision != "auto":
        return options.precision
    return "as stored" if torch.cuda.is_available() else "fp32"


# Surroundings


@contextlib.contextmanager
def surroundings(options: Options) -> Iterator[None]:
    """Puts the harness in its place: no network unless asked, no code in templates, nothing printed.

    The environment, and what the libraries read from it when they were imported, are put back at the end.
    """
    with contextlib.ExitStack() as stack:
        # the harness, `datasets` and `transformers` all draw bars and print; ours is drawn on the stream taken before
        silence = io.StringIO()
        stack.enter_context(contextlib.redirect_stdout(silence))
        stack.enter_context(contextlib.redirect_stderr(silence))
        import datasets.config
        import huggingface_hub.constants

        if not options.online:
            stack.enter_context(with_variables(dict.fromkeys(_OFFLINE, "1")))
            stack.enter_context(_replaced(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            for name in _OFFLINE:
                stack.enter_context(_replaced(datasets.config, name, True))
        import lm_eval.utils

        if not options.allow_code:
            stack.enter_context(_replaced(lm_eval.utils, "env", _sandbox(lm_eval.utils.env)))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _sandbox(environment: Any) -> Any:
    """The same template language without a way to Python: a plain Jinja template can reach any module."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    sandbox = ImmutableSandboxedEnvironment(
        undefined=environment.undefined, keep_trailing_newline=environment.keep_trailing_newline
    )
    sandbox.filters.update(environment.filters)
    return sandbox


# Tasks


class Tasks:
    """The tasks asked for. They are made anew for each model, because the harness keeps state in them."""

    def __init__(self, wanted: Sequence[TaskFile | str], options: Options, cache: Path) -> None:
        """Raises UserError for an unknown name or a key that no task has. cache: a folder for copies of local data."""
        from lm_eval.tasks import TaskManager

        names = [task for task in wanted if isinstance(task, str)]
        files = [task for task in wanted if not isinstance(task, str)]
        self._wanted, self._options, self._cache = wanted, options, cache
        for file in files:
            _check_file(file, options.allow_code)
            if remote := [name for name in file.data_files if "://" in name and not options.online]:
                raise UserError(f"{file.path}: {remote[0]} is not on this machine. {_NO_DATA}")
        with_defaults = bool(names) or any(file.names_others for file in files)
        groups = cache / "groups"  # the harness takes groups from a folder only
        groups.mkdir()
        for file in files:
            if file.is_group:
                text = yaml.safe_dump(_with_cache(file.config, str(cache)), sort_keys=False)
                (groups / f"{len(list(groups.iterdir()))}.yaml").write_text(text, encoding="utf-8")
        self._manager = TaskManager(include_path=groups, include_defaults=with_defaults)
        for name in names:
            if name not in self._manager.all_tasks:
                hint = nearest(name, self._manager.all_tasks)
                raise UserError(
                    f"--tasks {name}: there is no such task in {PACKAGE} {version()}.{hint} "
                    "A task file of your own ends in .yaml."
                )

    def make(self) -> tuple[dict[str, Any], dict[str, TaskFile | None]]:
        """Tasks and groups as the harness's `evaluate` takes them, and the file of each. Raises UserError."""
        made: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        sources: dict[str, TaskFile | None] = {}
        for task in self._wanted:
            what = task if isinstance(task, str) else str(task.path)
            try:
                loaded = self._manager.load([self._spec(task)])
            except UserError:
                raise
            except Exception as error:
                raise self._explained(what, error) from error
            for part in made:
                for name, item in loaded.get(part, {}).items():
                    if part != "group_map" and name in made[part]:
                        raise UserError(f"--tasks {what}: the task '{name}' is already among the others")
                    made[part][name] = item
            file = None if isinstance(task, str) else task
            sources.update(dict.fromkeys([*loaded["tasks"], *loaded.get("groups", {})], file))
        for task in made["tasks"].values():
            _set_fewshot(task, self._options.num_fewshot)
        return made, sources

    def _spec(self, task: TaskFile | str) -> Any:
        """What the harness's loader takes: a name, or a task's configuration."""
        if isinstance(task, str):
            return task
        return task.name if task.is_group else _with_cache(task.loaded(), str(self._cache))

    def _explained(self, what: str, error: Exception) -> UserError:
        if isinstance(error, ConnectionError) and not self._options.online:
            return UserError(f"--tasks {what}: its data are not on this machine ({_words(error)}). {_NO_DATA}")
        return UserError(f"--tasks {what}: lm-eval cannot make this task: {_words(error)}{_hint(error)}")


_NO_DATA = "Give --online to download them, or name local files in a task file."


def _hint(error: Exception) -> str:
    if type(error).__name__ == "SecurityError":
        return " A template reaches into Python; read it, and if you trust it give --allow-task-code"
    return ""


def _words(error: BaseException) -> str:
    """An error of a library in one line, with its cause."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return f"{text} ({_words(error.__cause__)})" if error.__cause__ else text


def _check_file(file: TaskFile, allow_code: bool) -> None:
    """Raises UserError for keys, metrics and aggregations that the harness does not know."""
    import lm_eval.api.metrics  # noqa: F401 - fills the registries
    from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY
    from lm_eval.config.task import TaskConfig

    if file.is_group and any(": !function" in reason for reason in file.code):
        raise UserError(f"{file.path}: a group with functions; give its members as task files of their own")
    known = {field.name for field in dataclasses.fields(TaskConfig)} | _NOT_FOR_TASKS
    for config in file.tasks:
        for key in config:
            if key not in known:
                raise UserError(f"{file.path}: '{key}' is no key of a task.{nearest(key, known)}")
        for entry in config.get("metric_list") or []:
            for key, registry in (("metric", METRIC_REGISTRY), ("aggregation", AGGREGATION_REGISTRY)):
                word = entry.get(key)
                if isinstance(word, str) and word not in registry and not allow_code:
                    raise UserError(f"{file.path}: {key} '{word}' is not known.{nearest(word, registry)}")


def _with_cache(config: dict[str, Any], cache: str) -> dict[str, Any]:
    """The task, or each task of the group, with its copies of local data in `cache`; `datasets` makes one of each."""
    if isinstance(config.get("task"), list):
        return {**config, "task": [_with_cache(m, cache) if isinstance(m, dict) else m for m in config["task"]]}
    if config.get("dataset_path") not in FILE_FORMATS or not data_files(config):
        return config
    return {**config, "dataset_kwargs": {"cache_dir": cache, **config["dataset_kwargs"]}}


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """As the harness does: a task that says 0 keeps it."""
    given = task.get_config("num_fewshot")
    if num_fewshot is not None and given != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif given is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)


# Measuring


def measure(folder: Path, tasks: Tasks, options: Options, label: str, stream: Any) -> tuple[list[Scores], list[str]]:
    """What the model of a folder scores, and what the harness warned of. Raises UserError when it stops.

    label, stream: how progress names this model, and where it is written.
    """
    import torch
    from lm_eval.evaluator import evaluate

    made, sources = tasks.make()
    model = _open(folder, options, label, stream)
    with _warnings() as warned, torch.random.fork_rng():
        torch.manual_seed(_SEED)
        try:
            results = evaluate(
                model,
                made,
                limit=options.limit,
                bootstrap_iters=0,
                log_samples=True,
                confirm_run_unsafe_code=options.allow_code,
            )
        except Exception as error:
            names = ", ".join(made["tasks"])
            raise UserError(
                f"{folder}: lm-eval stopped while running {names}: {_words(error)}{_hint(error)}"
            ) from error
    assert results is not None
    found = [_task_scores(name, made["tasks"][name], results, sources[name]) for name in made["tasks"]]
    return [*_group_scores(made["groups"], results, sources, found), *found], warned


def _open(folder: Path, options: Options, label: str, stream: Any) -> Any:
    """The folder's model as the harness runs it, with our line of progress."""
    import torch
    from lm_eval.models.huggingface import HFLM

    def line(kind: str, requests: Sequence[Any]) -> Progress:
        return Progress(f"{label}: {kind}", total=len(requests), unit="requests", quiet=options.quiet, stream=stream)

    class Measured(HFLM):
        """Counts requests as they are answered."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            with self._counted(line("answers", requests)):
                return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            with self._counted(line("generated texts", requests)):
                return super().generate_until(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            found: list[float] = []
            with line("texts", requests) as progress:
                for start in range(0, len(requests), options.batch_size):
                    progress.update(len(found))
                    part = requests[start : start + options.batch_size]
                    found += super().loglikelihood_rolling(part, disable_tqdm=True)
                progress.update(len(found))
            return found

        @contextlib.contextmanager
        def _counted(self, progress: Progress) -> Iterator[None]:
            before = self.cache_hook
            with progress:
                progress.update(0)
                self.set_cache_hook(_Counter(progress))
                try:
                    yield
                finally:
                    self.set_cache_hook(before)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"as stored": "auto", "fp32": "float32", "bf16": "bfloat16"}[precision_of(options)]
    Progress(label, quiet=options.quiet, stream=stream).note(f"{label}: opening {folder}")
    try:
        model = Measured(
            pretrained=str(folder), device=device, dtype=dtype, batch_size=options.batch_size, trust_remote_code=False
        )
    except Exception as error:
        raise UserError(f"{folder}: lm-eval cannot open this model: {_words(error)}") from error
    if model.prefix_token_id is None:
        raise UserError(
            f"{folder}: the tokenizer names neither a bos_token nor an eos_token; lm-eval needs one of them"
        )
    return model


class _Counter:
    """Stands in for the harness's cache of answers, which hears of every answer as it comes."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._done = progress, 0

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """One request more is answered."""
        self._done += 1
        self._progress.update(self._done)


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collects what the harness warns of meanwhile, the first of each kind."""
    found: dict[tuple[str, int], str] = {}

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())
            found.setdefault((record.pathname, record.lineno), text[:200] + ("..." if len(text) > 200 else ""))

    notes: list[str] = []
    logger, handler = logging.getLogger("lm_eval"), Handler(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield notes
    finally:
        logger.removeHandler(handler)
        notes += [f"lm-eval: {text}" for text in found.values()]


# From results to scores


def _task_scores(name: str, task: Any, results: Mapping[str, Any], file: TaskFile | None) -> Scores:
    from lm_eval.api.metrics import mean

    examples: dict[str, dict[int, Any]] = {}
    asked: dict[int, str] = {}
    for sample in results["samples"][name]:
        asked[sample["doc_id"]] = f"{sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}"
        for metric in sample["metrics"]:
            examples.setdefault(_key(metric, sample["filter"]), {})[sample["doc_id"]] = sample[metric]
    aggregations, directions = task.aggregation(), results["higher_is_better"].get(name, {})
    metrics = {}
    for key, value in _values(results["results"][name]).items():
        metric = key.partition(",")[0]
        aggregate = aggregations.get(metric) or mean
        metrics[key] = Metric(
            value, directions.get(metric), aggregate is mean, aggregate, dict(sorted(examples.get(key, {}).items())), {}
        )
    count = results["n-samples"][name]
    of_task = results["versions"].get(name)
    digest = hashlib.sha256("\n".join(text for _, text in sorted(asked.items())).encode()).hexdigest()[:16]
    return Scores(
        name,
        file,
        None if of_task in (None, "Yaml") else str(of_task),
        results["n-shot"].get(name),
        count["effective"],
        count["original"],
        digest,
        metrics,
    )


def _group_scores(
    groups: Mapping[str, Any], results: Mapping[str, Any], sources: Mapping[str, TaskFile | None], found: list[Scores]
) -> list[Scores]:
    """The groups that state a value of their own, which is a weighted mean over their tasks."""
    by_name = {scores.task: scores for scores in found}
    made = []
    for name, group in groups.items():
        if not group.has_aggregation:
            continue
        members = [by_name[task.task_name] for task in group.get_all_tasks()]
        by_size = {config.metric: config.weight_by_size for config in group.aggregate_metric_list}
        directions = results["higher_is_better"].get(name, {})
        metrics = {}
        for key, value in _values(results["results"][name]).items():
            metric = key.partition(",")[0]
            counted = {m.task: m.examples if by_size.get(metric) else 1 for m in members if key in m.metrics}
            weights = {task: size / sum(counted.values()) for task, size in counted.items()}
            metrics[key] = Metric(value, directions.get(metric), False, sum, {}, weights)
        digest = hashlib.sha256("\n".join(m.examples_id for m in members).encode()).hexdigest()[:16]
        of_group = results["versions"].get(name)
        made.append(
            Scores(
                name,
                sources.get(name),
                None if of_group in (None, "N/A") else str(of_group),
                results["n-shot"].get(name),
                sum(m.examples for m in members),
                sum(m.available for m in members),
                digest,
                metrics,
            )
        )
    return made


def _values(results: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics among a task's results: 'acc,none' is 'acc', and what is no finite number is None."""
    found: dict[str, float | None] = {}
    for key, value in results.items():
        metric, comma, name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            number = _number(value)
            found[_key(metric, name)] = number if number is not None and abs(number) < float("inf") else None
    return found


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _key(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"
