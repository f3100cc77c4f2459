"""Task files of lm-evaluation-harness (YAML): read, checked, and looked through for code, before anything is run.

A task file is data from anybody. What in it would run Python is found here and refused unless it is allowed: functions
(`!function module.name`), metrics that are scripts, generation code. Paths of data start from the file's own folder.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from perennial.core.errors import UserError, nearest
from perennial.core.files import sha256

OUTPUT_TYPES = ("generate_until", "loglikelihood", "loglikelihood_rolling", "multiple_choice")
FILE_FORMATS = ("json", "csv", "parquet", "text", "arrow", "xml")
"""Values of `dataset_path` that mean: the files named in dataset_kwargs.data_files."""
_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")
_RUNS_CODE = ("class", "unsafe_code", "hf_evaluate", "trust_remote_code", "custom_generate")
_PROMPTS = "use_prompt"


@dataclass(frozen=True)
class Function:
    """`!function module.name`: a Python function beside the task file, not imported yet."""

    spec: str
    folder: Path

    def load(self) -> Any:
        """Imports the module, from the file's folder or else from the Python path, and takes the function out of it."""
        module_name, _, name = self.spec.rpartition(".")
        path = self.folder / f"{module_name.replace('.', '/')}.py"
        try:
            if path.is_file():
                found = importlib.util.spec_from_file_location(module_name.replace(".", "_"), path)
                assert found is not None
                assert found.loader is not None
                module = importlib.util.module_from_spec(found)
                found.loader.exec_module(module)
            else:
                module = importlib.import_module(module_name)
            return getattr(module, name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"!function {self.spec}: cannot be loaded from {self.folder}: {error}") from None


@dataclass(frozen=True)
class TaskFile:
    """One task, or one group of tasks, as its file has it: includes merged, paths of data absolute."""

    path: Path
    name: str
    config: dict[str, Any]
    sha256: str
    """Of the file; of all the files' sha256 in the order in which they were read, when it includes others."""
    code: tuple[str, ...]
    """What in it runs Python, in words; empty for a file that is data alone."""

    @property
    def is_group(self) -> bool:
        """True for several tasks under one name."""
        return _is_group(self.config)

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """The tasks that are written out in the file: itself, or members of a group."""
        members = self.config["task"] if self.is_group else [self.config]
        return [member for member in members if isinstance(member, dict) and "dataset_path" in member]

    @property
    def names_others(self) -> bool:
        """True for a group with members that are the names of tasks defined elsewhere."""
        return self.is_group and len(self.tasks) < len(self.config["task"])

    @property
    def data_files(self) -> list[str]:
        """Every data file, pattern or address that its tasks name."""
        return [name for task in self.tasks for name in data_files(task)]

    def loaded(self) -> dict[str, Any]:
        """The configuration with its functions imported: this runs the code that `code` speaks of."""
        found: dict[str, Any] = _mapped(
            self.config, lambda value: value.load() if isinstance(value, Function) else value
        )
        return found


def is_path(text: str) -> bool:
    """Whether an argument means a task file rather than the name of a task of the harness."""
    return text.endswith((".yaml", ".yml")) or "/" in text or Path(text).is_file()


def split_arguments(values: Sequence[str]) -> list[str]:
    """'a,b' 'c.yaml' as single names and paths, in order. Raises UserError for an empty or repeated one."""
    found = [part.strip() for value in values for part in ([value] if Path(value).is_file() else value.split(","))]
    for part in found:
        if not part:
            raise UserError(
                f"--tasks {','.join(values)!r}: names of tasks and paths of task files, separated by commas"
            )
        if found.count(part) > 1:
            raise UserError(f"--tasks: '{part}' is given twice")
    return found


def read_task_file(path: Path, *, allow_code: bool = False) -> TaskFile:
    """Reads and checks a task file. Raises UserError that names the file and all that is wrong with it.

    allow_code: what runs Python is not refused (and not run here either).
    """
    config, digests = _read(path, ())
    problems = _problems(config)
    if problems:
        raise UserError("\n  ".join([f"{path}: not a task file that can be run:", *problems]))
    code = tuple(_code(config))
    if code and not allow_code:
        raise UserError(
            f"{path}: runs Python code ({'; '.join(code)}). Read that code; if you trust it, give --allow-task-code"
        )
    name = str(config["group"] if _is_group(config) else config["task"])
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return TaskFile(path, name, config, digest, code)


def _read(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], list[str]]:
    """A file's mapping over those of the files that it includes, and the sha256 of each file read."""
    folder = path.resolve().parent
    if path.resolve() in above:
        raise UserError(f"{path}: includes itself")

    class Loader(yaml.SafeLoader):
        """Plain YAML, and `!function` as a mark that is not followed."""

    Loader.add_constructor("!function", lambda loader, node: Function(str(node.value), folder))
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)  # a SafeLoader, see above
    except FileNotFoundError:
        raise UserError(f"{path}: no such task file") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable task file: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a task file: it must be a mapping with `task`, `dataset_path` and so on")
    included = data.pop("include", None) or []
    merged: dict[str, Any] = {}
    digests = [sha256(path)]
    for name in included if isinstance(included, list) else [included]:
        config, more = _read(folder / str(name), (*above, path.resolve()))
        merged.update({k: v for k, v in config.items() if k != "task_list"})
        digests += more
    return {**merged, **_located(data, folder)}, digests


# Where data lie


def _located(value: Any, folder: Path) -> Any:
    """The configuration with relative paths of data made absolute, from `folder`, in tasks and members of groups."""
    if isinstance(value, list):
        return [_located(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _located(item, folder) for key, item in value.items()}
    options = found.get("dataset_kwargs")
    if isinstance(options, dict):
        for key in ("data_files", "data_dir"):
            if key in options:
                options[key] = _mapped(options[key], lambda text: _absolute(text, folder))
    place = found.get("dataset_path")
    if isinstance(place, str) and place not in FILE_FORMATS and (folder / place).exists():
        found["dataset_path"] = str(folder / place)
    if isinstance(found.get(_PROMPTS), str) and ".yaml:" in found[_PROMPTS]:
        found[_PROMPTS] = _absolute(found[_PROMPTS], folder)
    return found


def _absolute(text: Any, folder: Path) -> Any:
    return str(folder / text) if isinstance(text, str) and "://" not in text else text


def _mapped(value: Any, change: Any) -> Any:
    """The nested value with `change` applied to all that is neither list nor mapping."""
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return change(value)


def data_files(config: dict[str, Any]) -> list[str]:
    """Every data file, pattern or address that a task names, in order."""
    options = config.get("dataset_kwargs")
    found: list[str] = []
    if isinstance(options, dict):
        _mapped(options.get("data_files", []), lambda text: found.append(str(text)))
    return found


# What may be wrong


def _is_group(config: dict[str, Any]) -> bool:
    return "group" in config and isinstance(config.get("task"), list)


def _problems(config: dict[str, Any]) -> list[str]:
    if _is_group(config):
        members = [m for m in config["task"] if isinstance(m, dict) and "dataset_path" in m]
        return [f"{member.get('task')}: {problem}" for member in members for problem in _problems(member)]
    return [*_lacking(config), *_wrong(config), *_wrong_data(config)]


def _lacking(config: dict[str, Any]) -> Iterator[str]:
    if not isinstance(config.get("task"), str):
        yield "it lacks `task`: the name that its results go by"
    if "class" in config or "custom_dataset" in config:
        return
    if not isinstance(config.get("dataset_path"), str):
        yield "it lacks `dataset_path`: json, csv, parquet or text for files of your own"
    elif config["dataset_path"] in FILE_FORMATS and not data_files(config):
        yield "it lacks `dataset_kwargs: {data_files: {test: FILE}}`"
    if not config.get("test_split") and not config.get("validation_split"):
        yield "it lacks `test_split` (or `validation_split`): which split to measure"
    if "doc_to_text" not in config and _PROMPTS not in config:
        yield "it lacks `doc_to_text`: the prompt as a template, '' for none"
    if "doc_to_target" not in config and _PROMPTS not in config and "process_results" not in config:
        yield "it lacks `doc_to_target`: the answer, or the text whose loss is measured"
    if config.get("output_type") == "multiple_choice" and "doc_to_choice" not in config:
        yield "it lacks `doc_to_choice`: the answers to choose from"


def _wrong(config: dict[str, Any]) -> Iterator[str]:
    kind = config.get("output_type", "generate_until")
    if kind not in OUTPUT_TYPES:
        yield f"output_type {kind!r}: there are {', '.join(OUTPUT_TYPES)}.{nearest(kind, OUTPUT_TYPES)}"
    shots = config.get("num_fewshot")
    if shots is not None and (not isinstance(shots, int) or shots < 0):
        yield f"num_fewshot {shots!r}: must be a number of examples"
    metrics = config.get("metric_list")
    if metrics is not None and not (isinstance(metrics, list) and all(_has_metric(m) for m in metrics)):
        yield "metric_list: must be a list of mappings with `metric`"


def _has_metric(entry: Any) -> bool:
    return isinstance(entry, dict) and "metric" in entry


def _wrong_data(config: dict[str, Any]) -> Iterator[str]:
    for name in data_files(config):
        if "://" not in name and not any(mark in name for mark in "*?[") and not Path(name).is_file():
            yield f"data file {name}: no such file"
    options = config.get("dataset_kwargs")
    files = options.get("data_files") if isinstance(options, dict) else None
    if config.get("dataset_path") in FILE_FORMATS and files:
        there = [str(name) for name in files] if isinstance(files, dict) else ["train"]
        for key in _SPLITS:
            split = str(config.get(key) or "").partition("[")[0]
            if split and split not in there:
                yield f"{key} '{split}': data_files has {', '.join(there)}.{nearest(split, there)}"


# What runs Python


def _code(value: Any, at: str = "") -> Iterator[str]:
    if isinstance(value, Function):
        yield f"{at}: !function {value.spec}"
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in _RUNS_CODE and item and not isinstance(item, Function):
                yield f"{key}: {item}"
            yield from _code(item, str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _code(item, at)
