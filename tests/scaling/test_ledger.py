"""The ledger: rows of finished runs, added once, none of what is unfinished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perennial.core.errors import UserError
from perennial.core.records import Recorder
from perennial.scaling.ledger import add, read, rows_of
from perennial.scaling.table import RunTable

SIDES, WHEN = ("old", "new"), ("before", "after")
STAGE: dict[str, Any] = {
    "run": "base",
    "stage": "a",
    "recipe_hash": "another",
    "parent": None,
    "seed": 0,
    "complete": True,
    "flops": 1.0,
    "seconds": 1.0,
    "sequence_length": 256,
    "batch_tokens": 2048,
    "precision": "fp32",
    "schedule": {"name": "cosine"},
    "rate_start": 0.0,
    "rate_peak": 3e-3,
    "rate_end": 3e-4,
    "optimizer": {"name": "adamw"},
    "objective": {"name": "next_token"},
    "sources": [],
}


def write_lineage(checkpoint: Path, stages: list[dict[str, Any]]) -> None:
    """A checkpoint as far as the ledger reads it."""
    (checkpoint / "perennial").mkdir(parents=True)
    lineage = {"checkpoint": "d" * 16, "stages": stages}
    (checkpoint / "perennial" / "lineage.json").write_text(json.dumps({"format": 1, **lineage}), encoding="utf-8")


def run_folder(
    path: Path,
    *,
    size: int = 1_000_000,
    tokens: int = 20_000_000,
    is_done: bool = True,
    parent: dict[str, str] | None = None,
    role: str = "replay",
) -> Path:
    """A run folder as training leaves it, as far as the ledger reads it."""
    stage = {
        "name": "a",
        "tokens": tokens,
        "rate_peak": 3e-3,
        "schedule": {"name": "cosine"},
        "optimizer": {"weight_decay": {"matrix": 0.1}},
        "sources": [
            {"name": "new", "weight": 3.0, "role": "fresh"},
            {"name": "old", "weight": 1.0, "role": role},
        ],
    }
    resolved = {
        "name": path.name,
        "recipe_hash": f"hash of {size}",
        "seed": 1,
        "parent": parent,
        "parameters": size,
        "flops": 6.0 * size * tokens,
        "corpora": {"new": {"role": "new"}, "old": {"role": "old"}},
        "stages": [stage],
        "batch": {"sequences": 8, "sequence_length": 256},
    }
    path.mkdir()
    (path / "resolved.json").write_text(json.dumps(resolved))
    recorder = Recorder(path / "events.jsonl")
    recorder.write("run", tokens=0, parameters=size, parent=parent)
    for at, loss in ((0, 7.0), (tokens, 2 + 300 * size**-0.4 + 2000 * tokens**-0.5)):
        corpora = {name: {"nats_per_token": loss + extra} for name, extra in (("new", 0.0), ("old", 0.5))}
        recorder.write("evaluation", tokens=at, corpora=corpora)
    sources = {
        "new": {"rows": 1, "tokens": 0.75 * tokens, "epochs": 3.0},
        "old": {"rows": 1, "tokens": 0.25 * tokens, "epochs": 0.5},
    }
    recorder.write("consumed", tokens=tokens, stage="a", sources=sources)
    if is_done:
        recorder.write("done", tokens=tokens)
    recorder.close()
    return path


def test_a_row_per_domain(tmp_path: Path) -> None:
    new, old = rows_of(run_folder(tmp_path / "run"))
    assert (new["domain"], old["domain"]) == ("new", "old")
    assert old["loss"] == pytest.approx(new["loss"] + 0.5)
    assert new["unique_tokens"] == pytest.approx(0.25 * 20e6 + 0.25 * 20e6)
    wanted = {
        "tokens": 20e6,
        "batch": 2048,
        "replay": 0.25,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "loss_before": 7.0,
    }
    assert {name: new[name] for name in wanted} == wanted


def test_what_a_parent_had_seen_and_both_sides_before_and_after(tmp_path: Path) -> None:
    """So that laws of continuing can be fitted to one's own runs."""
    first = run_folder(tmp_path / "first")
    assert {name: rows_of(first)[0][name] for name in ("parent", "parent_tokens", "parent_checkpoint")} == {
        "parent": False,
        "parent_tokens": 0,
        "parent_checkpoint": None,
    }
    run = run_folder(tmp_path / "run", parent={"path": str(tmp_path / "gone"), "checkpoint": "c" * 16})
    assert rows_of(run)[0]["parent_tokens"] is None
    own = {**STAGE, "run": "run", "recipe_hash": "hash of 1000000", "tokens": 20_000_000}
    write_lineage(run / "checkpoints" / "20000000", [{**STAGE, "tokens": 5_000_000}, own])
    new, old = rows_of(run)
    for row in (new, old):
        assert (row["parent_checkpoint"], row["parent_tokens"], row["peak"]) == ("c" * 16, 5_000_000, 3e-3)
        assert (row["old_before"], row["new_before"]) == (7.5, 7.0)
        assert (row["old_after"], row["new_after"]) == (old["loss"], new["loss"])
    assert (new["domain_tokens"], old["domain_tokens"]) == (15e6, 5e6)


def test_old_text_that_stands_in_counts_as_replay(tmp_path: Path) -> None:
    """It is drawn like new text, under its own name."""
    run = run_folder(tmp_path / "run", role="fresh")
    assert rows_of(run)[0]["replay"] == 0.25


def test_rows_of_an_earlier_version_stay_and_are_joined(tmp_path: Path) -> None:
    ledger = tmp_path / "all.jsonl"
    first, second = run_folder(tmp_path / "a"), run_folder(tmp_path / "b", size=2_000_000)
    added = ("peak", "parent_tokens", "parent_checkpoint", "domain_tokens", *(f"{r}_{w}" for r in SIDES for w in WHEN))
    earlier = [{k: v for k, v in row.items() if k not in added} for row in rows_of(first)]
    ledger.write_text("".join(json.dumps(row) + "\n" for row in earlier), encoding="utf-8")
    assert add(ledger, [first, second]) == (2, 2)
    assert [run.parent_tokens for run in read(ledger)] == [None, 0.0]


def test_runs_are_added_once(tmp_path: Path) -> None:
    first, second = (run_folder(tmp_path / f"run{size}", size=size) for size in (1_000_000, 2_000_000))
    ledger = tmp_path / "ledger.jsonl"
    assert add(ledger, [first]) == (2, 0)
    before = ledger.read_text()
    assert add(ledger, [first, second]) == (2, 2)
    assert ledger.read_text().startswith(before)


def test_the_ledger_is_a_table(tmp_path: Path) -> None:
    cases = [(size, tokens) for size in (1_000_000, 3_000_000, 9_000_000) for tokens in (90_000_000, 300_000_000)]
    folders = [run_folder(tmp_path / f"{n}-{d}", size=n, tokens=d) for n, d in cases]
    add(tmp_path / "ledger.jsonl", folders)
    table = RunTable.read(tmp_path / "ledger.jsonl", where=["domain=old"])
    assert len(table) == 6
    assert set(table.columns) >= {"parameters", "tokens", "unique_tokens", "loss", "replay", "learning_rate", "seed"}


def test_unfinished_and_foreign_folders_add_nothing(tmp_path: Path) -> None:
    done, going = run_folder(tmp_path / "done"), run_folder(tmp_path / "going", is_done=False)
    with pytest.raises(UserError, match="not finished"):
        add(tmp_path / "ledger.jsonl", [done, going])
    with pytest.raises(UserError, match="no run folder"):
        add(tmp_path / "ledger.jsonl", [tmp_path])
    assert not (tmp_path / "ledger.jsonl").exists()
    (tmp_path / "ledger.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match="not a ledger"):
        add(tmp_path / "ledger.jsonl", [done])
