"""Text that a model writes by itself: resumable to the byte, with its own seed for each batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perennial.core.errors import UserError
from perennial.core.lineage import newest_checkpoint
from perennial.evals import self_text
from perennial.evals.generation import Writer
from perennial.evals.self_text import Sampling, number_of_tokens, write_text
from perennial.train.recipe import parse_recipe
from perennial.train.run import start
from tests.commands import answer


@pytest.fixture(scope="module")
def model(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few updates."""
    folder = tmp_path_factory.mktemp("writer") / "base"
    recipe = workspace.recipe(
        evaluation={"tokens": "256 tokens", "every": None}, checkpoints={"every": None, "keep": 1}
    )
    start(parse_recipe(recipe), folder, base=Path(), quiet=True)
    return newest_checkpoint(folder)


def test_a_stopped_job_goes_on_with_the_same_text(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, sampling = Writer(model), Sampling(tokens=600, prompts=("", "The "), batch=4, seed=3)
    whole = write_text(writer, tmp_path / "whole.jsonl", sampling, quiet=True)
    assert whole["tokens"] >= 600
    made = self_text._batch

    def breaks(*arguments: Any) -> Any:
        if arguments[-1] == 2:
            raise KeyboardInterrupt
        return made(*arguments)

    monkeypatch.setattr(self_text, "_batch", breaks)
    with pytest.raises(KeyboardInterrupt):
        write_text(writer, tmp_path / "parts.jsonl", sampling, quiet=True)
    monkeypatch.setattr(self_text, "_batch", made)
    assert not (tmp_path / "parts.jsonl").exists()
    with open(tmp_path / "parts.jsonl.partial", "ab") as file:
        file.write(b'{"id": "half')
    with pytest.raises(UserError, match="other settings"):
        write_text(writer, tmp_path / "parts.jsonl", Sampling(tokens=600, seed=4), quiet=True)
    assert write_text(writer, tmp_path / "parts.jsonl", sampling, quiet=True) == {
        **whole,
        "out": str(tmp_path / "parts.jsonl"),
    }
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.jsonl", "whole.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == whole["documents"] == len({row["id"] for row in rows})
    assert [row["text"].startswith("The ") for row in rows if row["id"].startswith("self-000001")] == [True] * 4


def test_no_document_is_longer_than_the_context(model: Path) -> None:
    writer = Writer(model)
    assert self_text._batch(writer, [0], Sampling(tokens=1, batch=3, top_p=0.9), 0)[1] <= 3 * 64
    assert self_text._batch(writer, [0], Sampling(tokens=1, batch=3, length=5), 0)[1] <= 3 * 5
    with pytest.raises(UserError, match="no room"):
        self_text._batch(writer, [0] * 64, Sampling(tokens=1), 0)


def test_numbers_of_tokens_and_mistakes(model: Path, tmp_path: Path) -> None:
    assert [number_of_tokens(text) for text in ("100", "2K", "1.5M tokens")] == [100, 2000, 1_500_000]
    with pytest.raises(UserError, match="--tokens"):
        number_of_tokens("many")
    for sampling, words in (
        (Sampling(tokens=0), "--tokens 0"),
        (Sampling(tokens=9, temperature=0.0), "--temperature"),
        (Sampling(tokens=9, top_p=2.0), "--top-p"),
    ):
        with pytest.raises(UserError, match=words):
            write_text(Writer(model), tmp_path / "t.jsonl", sampling)
    with pytest.raises(UserError, match=".jsonl"):
        write_text(Writer(model), tmp_path / "t.txt", Sampling(tokens=9))


def test_the_command_writes_replay_for_a_continuation(workspace: Any, model: Path, tmp_path: Path) -> None:
    written = answer("generate", model, "--tokens", "2K", "--out", tmp_path / "self.jsonl", "--json")
    assert written.returncode == 0, written.stderr
    assert json.loads(written.stdout)["tokens"] >= 2000
    planned = answer(
        "continue", model, "--data", f"new={workspace.new}", "--tokens", "1K", "--out", tmp_path / "run", "--dry-run",
        "--replay", "30%", "--replay", f"self={tmp_path / 'self.jsonl'}", "--validation", "10%", "--json",
    )  # fmt: skip
    assert planned.returncode == 0, planned.stderr
    resolved = json.loads(planned.stdout)["resolved"]
    assert {s["name"]: s["weight"] for s in resolved["stages"][0]["sources"]} == {"new": 0.7, "self": 0.3}
    assert resolved["corpora"]["self"]["role"] == "old"
