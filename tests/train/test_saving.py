"""Checkpoints written while training goes on."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from perennial.core import records
from perennial.core.errors import UserError
from perennial.core.lineage import checkpoints_of
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.train import checkpoint, saving
from perennial.train.parallel import World
from perennial.train.recipe import parse_recipe
from perennial.train.run import start
from perennial.train.saving import Crew, Saving
from tests.model.models import tiny_model
from tests.workspace import Workspace


def run(workspace: Workspace, folder: Path) -> dict[str, Any]:
    return start(parse_recipe(workspace.recipe()), folder, base=Path(), quiet=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of every checkpoint but what holds wall times, and the hashes of that."""
    timed = ("state.json", "lineage.json", "manifest.json")
    paths = [path for path in (folder / "checkpoints").rglob("*") if path.is_file() and path.name not in timed]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_the_copy_is_written_while_training_goes_on(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(workspace, tmp_path / "plain")
    threads: list[str] = []
    write = checkpoint.save

    def slow(*args: Any, **kwargs: Any) -> Path:
        threads.append(threading.current_thread().name)
        time.sleep(0.3)  # several updates long
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(saving, "LARGE_BYTES", 0)
    run(workspace, tmp_path / "behind")
    assert threads[:-1] == ["saving"] * (len(threads) - 1)
    assert threads[-1] == "MainThread"  # the end of a stage is waited for
    assert contents(tmp_path / "plain") == contents(tmp_path / "behind")
    events = records.read(tmp_path / "behind" / "events.jsonl")
    saved = [e for e in events if e["event"] == "checkpoint"]
    assert [e["tokens"] for e in saved] == [1024, 2048, 3072]
    first = events.index(saved[0])
    assert [e for e in events[:first] if e["event"] == "train"][-1]["tokens"] > 1024
    consumed = [e for e in events if e["event"] == "consumed"]
    assert [e["sources"]["old"]["tokens"] for e in consumed] == [1024, 2048, 3072]


def test_a_failure_behind_training_is_not_lost(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Path:
        raise UserError("the disk is full")

    monkeypatch.setattr(checkpoint, "save", fail)
    monkeypatch.setattr(saving, "LARGE_BYTES", 0)
    with pytest.raises(UserError, match="the disk is full"):
        run(workspace, tmp_path / "run")
    assert checkpoints_of(tmp_path / "run") == []


def test_a_run_goes_on_from_what_was_saved_behind_it(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(workspace, tmp_path / "whole")
    monkeypatch.setattr(saving, "LARGE_BYTES", 0)
    from perennial.train import step

    update, made = step.make_update, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        if len(made) == 7:
            raise OSError(5, "pulled the plug")
        return update(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("perennial.train.loop.make_update", interrupted)
        with pytest.raises(OSError, match="plug"):
            run(workspace, tmp_path / "cut")
    assert [path.name for path in checkpoints_of(tmp_path / "cut")] == ["1024"]
    run(workspace, tmp_path / "cut")
    newest = [checkpoints_of(tmp_path / name)[-1] for name in ("whole", "cut")]
    assert (newest[0] / "model.safetensors").read_bytes() == (newest[1] / "model.safetensors").read_bytes()
    lineages = [json.loads((path / "perennial" / "lineage.json").read_text())["checkpoint"] for path in newest]
    assert lineages[0] == lineages[1]


def test_a_resumed_run_outlives_the_checkpoint_it_was_resumed_from(workspace: Workspace, tmp_path: Path) -> None:
    """What the next checkpoints need of it was read at the start: it is pruned on the way."""
    from perennial.train import loop

    recipe = workspace.recipe(checkpoints={"every": "256 tokens", "keep": 1})
    update, made = loop.make_update, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        if len(made) == 3:
            raise OSError(5, "pulled the plug")
        return update(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_update", interrupted)
        with pytest.raises(OSError, match="plug"):
            start(parse_recipe(recipe), tmp_path / "cut", base=Path(), quiet=True)
    start(parse_recipe(recipe), tmp_path / "cut", base=Path(), quiet=True)
    start(parse_recipe(recipe), tmp_path / "whole", base=Path(), quiet=True)
    names = [
        sorted(str(p.relative_to(tmp_path / run)) for p in (tmp_path / run).rglob("*")) for run in ("whole", "cut")
    ]
    assert names[0] == names[1]
    assert (checkpoints_of(tmp_path / "cut")[-1] / "tokenizer.json").is_file()


def test_a_snapshot_is_of_one_moment(tmp_path: Path, workspace: Workspace) -> None:
    """What it copied stays as it was, whatever training does to model and moments."""
    model, moments = tiny_model(), {"model.norm.weight.exp_avg": torch.zeros(16)}
    before = model.model.norm.weight.detach().clone()
    known: dict[str, Any] = dict.fromkeys(("progress", "lineage", "recipe_hash", "companions", "own"))
    known["tokenizer"] = TokenizerFolder.open(workspace.old / "tokenizer")
    taken = checkpoint.snapshot(model, moments, crew=Crew(World(0, 1, torch.device("cpu"))), copies=True, **known)
    with torch.no_grad():
        model.model.norm.weight.fill_(7.0)
    moments["model.norm.weight.exp_avg"] += 1
    assert torch.equal(taken.model.get("model.norm.weight"), before)
    assert float(taken.moments["model.norm.weight.exp_avg"].sum()) == 0


def test_what_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "memory_bytes", lambda: {"available": 10 << 30})
    assert not saving.pays(1 << 20)  # written at once sooner than copied
    assert saving.pays(1 << 30)
    assert not saving.pays(6 << 30)
    monkeypatch.setattr(saving, "memory_bytes", lambda: {"available": None})
    assert not saving.pays(1 << 30)


def test_the_error_is_raised_once_asked_for() -> None:
    def fail() -> Path:
        raise UserError("no")

    for in_background in (True, False):
        with pytest.raises(UserError, match="no"):
            Saving(fail, tokens=1, in_background=in_background).finish()
