"""Task files are checked before anything runs; differences are paired; results are kept without touching weights."""

from __future__ import annotations

import fcntl
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from perennial.core import files, lineage, records
from perennial.core.errors import UserError
from perennial.evals import tasks
from perennial.evals.harness import Metric, Scores
from perennial.evals.task_files import Function, read_task_file, split_arguments

CHOICES = {
    "task": "colours",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data/questions.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
}
Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Writes a task file beside its data; changes with the value None leave a key out."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/questions.jsonl").write_text('{"question": "?", "choices": ["a", "b"], "answer": 0}\n')

    def write(name: str = "task.yaml", text: str = "", **changes: Any) -> Path:
        config = {key: value for key, value in {**CHOICES, **changes}.items() if value is not None}
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config, sort_keys=False) + text)
        return path

    return write


# Task files


def test_a_task_file_and_where_its_data_lie(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written()
    monkeypatch.chdir("/")
    task = read_task_file(path)
    assert (task.name, task.code, task.is_group, task.names_others) == ("colours", (), False, False)
    assert task.data_files == [str(tmp_path / "data/questions.jsonl")]
    assert task.sha256 == files.sha256(path)
    kept = {"dataset_path": "json", "dataset_kwargs": {"data_files": ["https://host/a.jsonl", "/b/*.jsonl"]}}
    there = read_task_file(written(**kept, test_split="train"))
    assert there.data_files == ["https://host/a.jsonl", "/b/*.jsonl"]


def test_included_files_lie_under_the_including_one(written: Written, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/part.yaml").write_text("dataset_kwargs: {data_files: {test: own.jsonl}}\ntest_split: other\n")
    (tmp_path / "inner/own.jsonl").write_text("{}\n")
    task = read_task_file(written(dataset_kwargs=None, text="include: inner/part.yaml\n"))
    assert task.data_files == [str(tmp_path / "inner/own.jsonl")]
    assert task.config["test_split"] == "test"
    assert task.sha256 not in (files.sha256(tmp_path / "task.yaml"), files.sha256(tmp_path / "inner/part.yaml"))
    with pytest.raises(UserError, match="includes itself"):
        read_task_file(written(text="include: task.yaml\n"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": "key: [a\n"}, ["task.yaml: not a readable task file", "line"]),
        ({"text": "key: !!python/object:os.system {}\n"}, ["not a readable task file", "os.system"]),
        ({"task": None, "test_split": None}, ["it lacks `task`", "it lacks `test_split`"]),
        ({"dataset_path": None}, ["it lacks `dataset_path`"]),
        ({"dataset_kwargs": None}, ["it lacks `dataset_kwargs"]),
        ({"doc_to_text": None, "doc_to_target": None}, ["it lacks `doc_to_text`", "it lacks `doc_to_target`"]),
        ({"doc_to_choice": None}, ["it lacks `doc_to_choice`"]),
        ({"output_type": "multiple_choise"}, ["'multiple_choise'", "Did you mean 'multiple_choice'?"]),
        ({"num_fewshot": "two"}, ["num_fewshot 'two'"]),
        ({"metric_list": ["acc"]}, ["metric_list: must be a list of mappings"]),
        ({"test_split": "tset"}, ["test_split 'tset'", "Did you mean 'test'?"]),
        ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, ["none.jsonl: no such file"]),
    ],
)
def test_what_is_wrong_with_a_task_file(written: Written, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_task_file(written(**changes))
    assert "task.yaml" in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_file_that_is_no_task_file(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UserError, match=r"list\.yaml: not a task file: it must be a mapping"):
        read_task_file(tmp_path / "list.yaml")
    with pytest.raises(UserError, match=r"none\.yaml: no such task file"):
        read_task_file(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text": "process_docs: !function helpers.clean\n"}, "process_docs: !function helpers.clean"),
        ({"text": "metric_list: [{metric: !function helpers.score}]\n"}, "metric: !function helpers.score"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "hf_evaluate: True"),
        (
            {"dataset_kwargs": {"data_files": {"test": "data/questions.jsonl"}, "trust_remote_code": True}},
            "trust_remote",
        ),
        ({"generation_kwargs": {"custom_generate": "folder"}}, "custom_generate: folder"),
        ({"unsafe_code": True}, "unsafe_code: True"),
        ({"task": [{**CHOICES, "unsafe_code": True}], "group": "several"}, "unsafe_code: True"),
    ],
)
def test_code_needs_leave(written: Written, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    (tmp_path / "helpers.py").write_text("raise SystemExit('imported')\n")
    path = written(**changes)
    with pytest.raises(UserError, match="runs Python code") as caught:
        read_task_file(path)
    assert reason in str(caught.value)
    assert "--allow-task-code" in str(caught.value)
    assert any(reason in one for one in read_task_file(path, allow_code=True).code)  # nothing is run by reading


def test_functions_are_imported_from_beside_the_file(written: Written, tmp_path: Path) -> None:
    (tmp_path / "helpers.py").write_text("def clean(documents):\n    return documents[:1]\n")
    task = read_task_file(written(text="process_docs: !function helpers.clean\n"), allow_code=True)
    assert isinstance(task.config["process_docs"], Function)
    assert task.loaded()["process_docs"]([1, 2]) == [1]
    with pytest.raises(UserError, match=r"!function helpers\.none: cannot be loaded"):
        Function("helpers.none", tmp_path).load()


def test_several_tasks_in_one_argument(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_arguments(["a, b", "c.yaml"]) == ["a", "b", "c.yaml"]
    written("with,comma.yaml")
    monkeypatch.chdir(tmp_path)
    assert split_arguments(["with,comma.yaml"]) == ["with,comma.yaml"]
    with pytest.raises(UserError, match="'a' is given twice"):
        split_arguments(["a,b", "a"])
    with pytest.raises(UserError, match="separated|with commas"):
        split_arguments(["a,,b"])


def test_without_the_harness(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="the extra `eval`"):
        tasks.read_tasks([str(written())])


# Results


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def ratio(values: list[tuple[float, int]]) -> float:
    """Bits per byte from (log-likelihood, bytes), as the harness has it."""
    return -sum(a for a, _ in values) / sum(b for _, b in values) / math.log(2)


def scores(task: str, **metrics: Metric) -> Scores:
    examples = max(len(m.examples) for m in metrics.values())
    return Scores(task, None, None, 0, examples, examples, "id", metrics)


def accuracy(values: list[float]) -> Metric:
    return Metric(mean(values), True, True, mean, dict(enumerate(values)), {})


def test_means_have_their_standard_error_and_are_compared_by_example() -> None:
    before, after = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    found = tasks.results(
        [scores("t", acc=accuracy(after))], [scores("t", acc=accuracy(before))], {"harness": "h"}, "b"
    )
    own, against = found["t"]["metrics"]["acc"], found["t"]["against"]["metrics"]["acc"]
    assert found["t"]["harness"] == "h"
    assert found["t"]["against"]["checkpoint"] == "b"
    assert own["stderr"] == pytest.approx(statistics.stdev(after) / math.sqrt(8))
    assert against["stderr"] == pytest.approx(statistics.stdev(before) / math.sqrt(8))
    changes = [b - a for a, b in zip(before, after, strict=True)]
    half = 2.3646 * statistics.stdev(changes) / math.sqrt(8)  # Student's t for 7 degrees of freedom
    assert against["difference"] == pytest.approx(0.5)
    assert (against["low"], against["high"]) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)
    assert against["verdict"] == tasks.BETTER


@pytest.mark.parametrize(
    ("change", "higher_is_better", "verdict"),
    [
        (-0.2, False, tasks.BETTER),
        (0.2, False, tasks.WORSE),
        (0.2, True, tasks.BETTER),
        (0.2, None, tasks.DIFFERENT),
        (0.0, True, tasks.NONE_SHOWN),
    ],
)
def test_ratios_are_resampled(change: float, higher_is_better: bool | None, verdict: str) -> None:
    first = [(-20.0 - i, 10 + i % 3) for i in range(30)]
    second = [(ll - change * length * math.log(2) + 0.01 * (-1) ** i, length) for i, (ll, length) in enumerate(first)]

    def measured(values: list[tuple[float, int]]) -> Scores:
        return scores("t", bits=Metric(ratio(values), higher_is_better, False, ratio, dict(enumerate(values)), {}))

    found = tasks.results([measured(second)], [measured(first)], {}, None)["t"]
    against = found["against"]["metrics"]["bits"]
    assert against["difference"] == pytest.approx(change, abs=1e-6)
    assert against["low"] <= against["difference"] <= against["high"]
    assert against["high"] - against["low"] < found["metrics"]["bits"]["stderr"]  # pairing takes the examples' own away
    assert against["verdict"] == verdict
    assert found == tasks.results([measured(second)], [measured(first)], {}, None)["t"]


def test_what_cannot_be_judged_is_not() -> None:
    one = scores("t", acc=accuracy([1.0]), odd=Metric(3.0, True, False, len, {0: "x", 1: None}, {}))
    unknown = scores("t", acc=accuracy([0.0]), odd=Metric(None, True, False, len, {0: "x", 1: None}, {}))
    found = tasks.results([one], [unknown], {}, None)["t"]
    assert found["metrics"]["acc"]["stderr"] is None
    nothing = {"low": None, "high": None, "verdict": None}
    assert found["against"]["metrics"]["acc"] == {"value": 0.0, "stderr": None, "difference": 1.0, **nothing}
    assert found["against"]["metrics"]["odd"] == {"value": None, "stderr": None, "difference": None, **nothing}
    json.dumps(found, allow_nan=False)


def test_groups_follow_from_their_tasks() -> None:
    values = {"a": [0.0, 1.0, 1.0, 0.0], "b": [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]}
    changed = {"a": [1.0, 1.0, 1.0, 0.0], "b": [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0]}

    def measured(found: dict[str, list[float]]) -> list[Scores]:
        group = Metric(mean([*found["a"], *found["b"]]), True, False, sum, {}, {"a": 4 / 12, "b": 8 / 12})
        return [
            Scores("all", None, None, None, 12, 12, "id", {"acc": group}),
            *(scores(task, acc=accuracy(one)) for task, one in found.items()),
        ]

    found = tasks.results(measured(changed), measured(values), {}, None)
    assert list(found) == ["all", "a", "b"]
    errors = {task: found[task]["metrics"]["acc"]["stderr"] for task in found}
    assert errors["all"] == pytest.approx(math.hypot(errors["a"] * 4 / 12, errors["b"] * 8 / 12), rel=1e-3)
    differences = {task: found[task]["against"]["metrics"]["acc"]["difference"] for task in found}
    assert differences["all"] == pytest.approx(differences["a"] * 4 / 12 + differences["b"] * 8 / 12)
    assert found["all"]["against"]["metrics"]["acc"]["verdict"] == tasks.NONE_SHOWN


# Keeping


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What a finished run's newest checkpoint is to this module: a folder with lineage and manifest, in a run."""
    folder = tmp_path / "run/checkpoints/512"
    (folder / "perennial").mkdir(parents=True)
    (folder / "config.json").write_text("{}\n")
    made = lineage.Lineage(checkpoint="0123456789abcdef", stages=[])
    files.write_json(folder / "perennial/lineage.json", made.model_dump(mode="json"))
    files.write_manifest(folder, {"format": 1}, "perennial/manifest.json")
    recorder = records.Recorder(tmp_path / "run/events.jsonl")
    recorder.write("done", tokens=512)
    recorder.close()
    return folder


def test_results_are_merged_and_the_checkpoint_stays_whole(checkpoint: Path) -> None:
    run = checkpoint.parent.parent
    kept, notes = tasks.keep(checkpoint, {"b": {"metrics": {}}, "a": {"metrics": {"acc": {"value": 0.5}}}})
    assert (kept, notes) == ([checkpoint / "perennial/tasks.json", run / "events.jsonl"], [])
    before = (checkpoint / "perennial/tasks.json").read_bytes()
    tasks.keep(checkpoint, {"a": {"metrics": {"acc": {"value": 0.5}}}})
    assert (checkpoint / "perennial/tasks.json").read_bytes() == before  # no date, no order of measuring
    tasks.keep(checkpoint, {"a": {"metrics": {}}})
    assert lineage.read(checkpoint).evaluation["tasks"] == {"a": {"metrics": {}}, "b": {"metrics": {}}}
    files.verify_manifest(checkpoint, "perennial/manifest.json", "checkpoint")
    events = records.read(run / "events.jsonl", "tasks")
    assert [(e["tokens"], e["checkpoint"], list(e["tasks"])) for e in events] == [
        (512, "0123456789abcdef", ["b", "a"]),
        *[(512, "0123456789abcdef", ["a"])] * 2,
    ]
    assert records.read(run / "events.jsonl", "done")


def test_a_run_in_training_gets_no_event(checkpoint: Path) -> None:
    run = checkpoint.parent.parent
    descriptor = os.open(run, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        kept, notes = tasks.keep(checkpoint, {"a": {"metrics": {}}})
    finally:
        os.close(descriptor)
    assert kept == [checkpoint / "perennial/tasks.json"]
    assert "being trained by another process" in notes[0]
    assert not records.read(run / "events.jsonl", "tasks")


def test_where_nothing_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    assert tasks.keep(plain, {"a": {}}) == ([], [f"{plain} has no perennial/ folder, so the results are printed only."])
    assert not list(plain.iterdir())
    (checkpoint / "perennial/tasks.json").write_text('{"format": 99, "tasks": {}}')
    with pytest.raises(UserError, match=r"tasks\.json: not a file of task results in format 1"):
        tasks.evaluate_tasks(checkpoint, ["some_task"])


def test_a_copy_of_a_checkpoint_belongs_to_no_run(checkpoint: Path, tmp_path: Path) -> None:
    copy = checkpoint.rename(tmp_path / "copy")
    assert tasks.keep(copy, {"a": {"metrics": {}}}) == ([copy / "perennial/tasks.json"], [])
