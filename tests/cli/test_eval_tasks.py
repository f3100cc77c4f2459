"""`perennial eval --tasks`: the harness itself, on checkpoints trained here, offline, with task files written here."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from perennial.cli import main
from perennial.core import files, lineage, records
from perennial.core.lineage import newest_checkpoint
from tests.workspace import Workspace

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (extra: eval)"
)

SCRIPT = """
import contextlib, io, json, pathlib, socket, sys
from perennial.cli.main import main

reached, said = [], {}

def connect(self, address):
    reached.append(str(address))
    raise OSError("no network here")

socket.socket.connect = connect
for name, arguments in json.loads(sys.argv[1]).items():
    if name == "unknown":  # stands in for the index of 14,000 tasks, which takes many seconds
        import lm_eval.tasks
        real, folder = lm_eval.tasks.TaskManager, pathlib.Path(lm_eval.tasks.__file__).parent / "hellaswag"
        lm_eval.tasks.TaskManager = lambda include_path, include_defaults: real(
            include_path=folder, include_defaults=False
        )
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main(arguments)
    said[name] = {"code": code, "out": out.getvalue(), "error": error.getvalue()}
print(json.dumps({"said": said, "reached": reached}))
"""
"""Runs command lines in one process, since importing the harness takes seconds; any reach for the network is noted."""

WORDS = ["return", "class", "for", "while", "try", "with", "lambda", "yield", "from", "raise", "assert", "pass"]
CHOICES = ["import", "the statement", "def", "a value"]
QUESTIONS = [{"question": f"What is {w}?", "choices": CHOICES, "answer": i % 4} for i, w in enumerate(WORDS)]
TEXTS = ["The import statement finds a module.", "A class is made.", "x = lambda: 0  # \u00e4\u00f6\u00fc", "yield"]
TASK = {
    "task": "words",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
}
ROLLING = {
    "task": "texts",
    "dataset_kwargs": {"data_files": {"test": "texts.jsonl"}},
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "doc_to_choice": None,
}
REACHES_FOR_PYTHON = "{{ cycler.__init__.__globals__.os.popen('touch reached').read() }}"


@dataclass(frozen=True)
class Measured:
    """Two runs, and what each command line printed."""

    folder: Path
    said: dict[str, dict[str, Any]]
    reached: list[str]

    def json(self, name: str) -> dict[str, Any]:
        assert self.said[name]["code"] == 0, self.said[name]["error"]
        found: dict[str, Any] = json.loads(self.said[name]["out"])
        return found

    def error(self, name: str) -> str:
        assert self.said[name]["code"] == 2, self.said[name]
        assert self.said[name]["out"] == ""
        return str(self.said[name]["error"])


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    for name, documents in (("questions", QUESTIONS), ("texts", [{"text": text} for text in TEXTS])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents), encoding="utf-8")
    (folder / "helpers.py").write_text("def fewer(documents):\n    return documents.select(range(5))\n")
    member = {**TASK, "task": "two", "doc_to_text": "{{question}}"}
    for name, changes, text in (
        ("words", {}, ""),
        ("texts", ROLLING, ""),
        ("function", {"task": "fewer"}, "process_docs: !function helpers.fewer\n"),
        ("several", {"group": "several", "task": [{**TASK, "task": "one"}, member]}, ""),
        ("template", {"doc_to_text": REACHES_FOR_PYTHON}, ""),
        ("key", {"doc_to_txt": ""}, ""),
        ("metric", {"metric_list": [{"metric": "acc_nrm"}]}, ""),
        ("address", {"dataset_kwargs": {"data_files": {"test": "https://host.invalid/questions.jsonl"}}}, ""),
        ("hub", {"dataset_path": "nobody/nothing", "dataset_kwargs": None}, ""),
        ("field", {"doc_to_text": "{{query}}"}, ""),
    ):
        config = {key: value for key, value in {**TASK, **changes}.items() if value is not None}
        if name == "several":
            config = {**changes, "aggregate_metric_list": [{"metric": "acc"}]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False) + text)


@pytest.fixture(scope="module")
def measured(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A base model, its continuation, and everything that is asked of the command, once."""
    from perennial.train import session

    folder = tmp_path_factory.mktemp("measured")
    base, child, plain, texts = (str(folder / name) for name in ("base", "child", "plain", "tasks"))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(workspace.recipe()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "matmul_rate", lambda precision, device: 1e11)
        assert main.main(["train", str(folder / "recipe.yaml"), "--out", base, "--json"]) == 0
        data = ["--data", f"new={workspace.new}", "--tokens", "2K tokens"]
        assert main.main(["continue", base, *data, "--out", child, "--json"]) == 0
    shutil.copytree(newest_checkpoint(Path(child)), plain, ignore=shutil.ignore_patterns("perennial"))
    write_tasks(Path(texts))
    commands = {
        "child": [child, "--tasks", f"{texts}/words.yaml,{texts}/texts.yaml", "--against", base, "--json"],
        "base": [base, "--tasks", f"{texts}/words.yaml", "--batch-size", "3", "--json"],
        "plain": [plain, "--tasks", f"{texts}/words.yaml", "--tasks", f"{texts}/texts.yaml", "--limit", "3"],
        "function": [plain, "--tasks", f"{texts}/function.yaml", "--allow-task-code", "--json"],
        "several": [plain, "--tasks", f"{texts}/several.yaml", "--json"],
        **{
            n: [plain, "--tasks", f"{texts}/{n}.yaml"] for n in ("template", "key", "metric", "address", "hub", "field")
        },
        "unknown": [plain, "--tasks", "helaswag"],
        "not here": [plain, "--tasks", "hellaswag"],
    }
    (folder / "home").mkdir()
    (folder / "here").mkdir()
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in offline}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps({name: ["eval", *line] for name, line in commands.items()})],
        cwd=folder / "here",
        env={**environment, "HOME": str(folder / "home"), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return Measured(folder, result["said"], result["reached"])


def by_hand(checkpoint: Path) -> dict[str, float]:
    """The metrics worked out from our own model's logits."""
    import torch
    from tokenizers import Tokenizer

    from perennial.model.huggingface import load_model

    model = load_model(checkpoint).eval()
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    start = json.loads((checkpoint / "config.json").read_text())["eos_token_id"]

    def log_likelihood(context: list[int], rest: list[int]) -> float:
        ids = torch.tensor([context + rest])
        with torch.no_grad():
            chances = model.logits(model(ids[:, :-1])).float().log_softmax(-1)[0]
        return sum(float(chances[len(context) - 1 + i, token]) for i, token in enumerate(rest))

    right, right_by_length, bits = [], [], 0.0
    for question in QUESTIONS:
        prompt = f"Q: {question['question']}\nA:"
        context = tokenizer.encode(prompt).ids
        whole = [tokenizer.encode(f"{prompt} {choice}").ids for choice in CHOICES]
        found = [log_likelihood(ids[: len(context)], ids[len(context) :]) for ids in whole]
        by_length = [value / len(choice) for value, choice in zip(found, CHOICES, strict=True)]
        right.append(found.index(max(found)) == question["answer"])
        right_by_length.append(by_length.index(max(by_length)) == question["answer"])
    for text in TEXTS:
        bits -= log_likelihood([start], tokenizer.encode(text).ids) / math.log(2)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    return {
        "acc": sum(right) / len(right),
        "acc_norm": sum(right_by_length) / len(right),
        "bits_per_byte": bits / num_bytes,
        "byte_perplexity": 2 ** (bits / num_bytes),
    }


def test_the_scores_are_those_worked_out_by_hand(measured: Measured) -> None:
    found = measured.json("child")["tasks"]
    for side, run in (("metrics", "child"), ("against", "base")):
        expected = by_hand(newest_checkpoint(measured.folder / run))
        for task, names in (("words", ("acc", "acc_norm")), ("texts", ("bits_per_byte", "byte_perplexity"))):
            metrics = found[task]["against"]["metrics"] if side == "against" else found[task]["metrics"]
            for name in names:
                assert metrics[name]["value"] == pytest.approx(expected[name], rel=1e-5), (run, name)
    again = measured.json("base")["tasks"]["words"]
    assert again["metrics"]["acc"]["value"] == found["words"]["against"]["metrics"]["acc"]["value"]
    assert again["examples_id"] == found["words"]["examples_id"]


def test_base_against_continued(measured: Measured) -> None:
    result = measured.json("child")
    assert result.keys() == {"checkpoint", "against", "harness", "precision", "tasks", "kept", "notes"}
    words, texts = result["tasks"]["words"], result["tasks"]["texts"]
    assert (words["examples"], words["of"], words["num_fewshot"], words["file"]) == (12, 12, 0, "words.yaml")
    assert words["sha256"] == files.sha256(measured.folder / "tasks/words.yaml")
    base = lineage.read(newest_checkpoint(measured.folder / "base"))
    assert words["against"]["checkpoint"] == texts["against"]["checkpoint"] == base.checkpoint
    accuracy, bits = words["metrics"]["acc"], texts["against"]["metrics"]["bits_per_byte"]
    share = accuracy["value"]
    assert accuracy["higher_is_better"] is True
    assert accuracy["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 11))
    assert bits["difference"] == pytest.approx(texts["metrics"]["bits_per_byte"]["value"] - bits["value"])
    assert bits["low"] <= bits["difference"] <= bits["high"]
    assert (bits["verdict"] == "no difference shown") == (bits["low"] <= 0 <= bits["high"])


def test_results_are_part_of_lineage_and_events(measured: Measured, capsys: pytest.CaptureFixture[str]) -> None:
    child = newest_checkpoint(measured.folder / "child")
    found = measured.json("child")["tasks"]
    assert lineage.read(child).evaluation["tasks"] == found
    (event,) = records.read(measured.folder / "child/events.jsonl", "tasks")
    assert (event["tokens"], event["checkpoint"]) == (int(child.name), lineage.read(child).checkpoint)
    assert event["tasks"] == found
    assert measured.json("child")["kept"] == [
        str(child / "perennial/tasks.json"),
        str(child.parents[1] / "events.jsonl"),
    ]
    capsys.readouterr()
    assert main.main(["show", str(measured.folder / "child"), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["complete"]
    assert main.main(["train", str(measured.folder / "child"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["complete"]


def test_the_report_has_them(measured: Measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(measured.folder / name) for name in ("base", "child")]
    assert main.main(["report", *runs, "--out", str(tmp_path / "page.html"), "--json"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert 'id="tasks"' in page
    assert page.count("bits_per_byte") >= 1


def test_a_model_from_elsewhere_is_left_as_it_is(measured: Measured) -> None:
    said = measured.said["plain"]
    assert said["code"] == 0
    lines = said["out"].splitlines()
    assert lines[0].split() == ["task", "metric", "value", "examples"]
    assert [line.split()[:2] for line in lines[1:6]] == [
        *(["words", metric] for metric in ("acc", "acc_norm")),
        *(["texts", metric] for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")),
    ]
    assert lines[1].endswith("3 of 12")
    assert "has no perennial/ folder, so the results are printed only" in lines[-1]
    assert not (measured.folder / "plain/perennial").exists()
    assert "answers 100% of 12 requests" in said["error"]
    assert "texts 100% of 3 requests" in said["error"]


def test_functions_and_groups(measured: Measured) -> None:
    assert measured.json("function")["tasks"]["fewer"]["examples"] == 5
    several = measured.json("several")["tasks"]
    assert list(several) == ["several", "several::one", "several::two"]
    members = [several[f"several::{name}"]["metrics"]["acc"] for name in ("one", "two")]
    assert several["several"]["metrics"]["acc"]["value"] == pytest.approx(sum(m["value"] for m in members) / 2)
    assert several["several"]["examples"] == 24


def test_what_is_refused(measured: Measured) -> None:
    for name, words in {
        "template": ["template.yaml", "SecurityError", "--allow-task-code"],
        "key": ["key.yaml", "'doc_to_txt' is no key of a task", "Did you mean 'doc_to_text'?"],
        "metric": ["metric 'acc_nrm' is not known", "Did you mean 'acc_norm'?"],
        "address": ["https://host.invalid/questions.jsonl is not on this machine", "--online"],
        "hub": ["hub.yaml: its data are not on this machine", "nobody/nothing", "--online"],
        "field": ["field.yaml", "'query' is undefined"],
        "unknown": ["helaswag: there is no such task", "Did you mean 'hellaswag'?"],
        "not here": ["hellaswag: its data are not on this machine", "--online"],
    }.items():
        error = measured.error(name)
        assert error.count("error: ") == 1
        assert all(word in error for word in words), error


def test_nothing_is_left_and_nobody_is_called(measured: Measured) -> None:
    assert measured.reached == []
    assert not list((measured.folder / "here").iterdir())
    assert not list((measured.folder / "home").rglob("*.arrow"))
    assert not list((measured.folder / "tasks").rglob("*.arrow"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give --data NAME=PATH for losses, --tasks NAME|FILE for scores, or both"),
        (["--limit", "3", "--data", "old=nowhere"], "--limit belongs to --tasks, which is not given"),
        (["--tasks", "words.yaml", "--max-tokens", "1K tokens"], "--max-tokens belongs to --data"),
        (["--tasks", "nowhere.yaml"], "nowhere.yaml: no such task file"),
        (["--tasks", "some_task", "--batch-size", "0"], "batch_size 0: at least 1"),
        (["--tasks", "some_task", "--num-fewshot=-1"], "num_fewshot -1: at least 0"),
        (["--tasks", "some_task", "--against", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main.main(["eval", str(tmp_path), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
