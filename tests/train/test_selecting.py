"""Sub-corpora by perplexity: each document's own loss, the share that was asked for, and who uses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perennial.core import lineage as lineages
from perennial.core.errors import UserError
from perennial.core.lineage import newest_checkpoint
from perennial.data.corpus import Corpus
from perennial.model.huggingface import load_model
from perennial.train import around_the_run, selecting
from perennial.train.continuing import continue_run
from perennial.train.document_loss import document_losses
from perennial.train.recipe import parse_recipe
from perennial.train.run import start
from perennial.train.selecting import choose, select
from tests.commands import answer


@pytest.fixture(scope="module")
def model(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few updates."""
    folder = tmp_path_factory.mktemp("judge") / "base"
    recipe = workspace.recipe(
        evaluation={"tokens": "256 tokens", "every": None}, checkpoints={"every": None, "keep": 1}
    )
    start(parse_recipe(recipe), folder, base=Path(), quiet=True)
    return folder


def test_a_documents_loss_is_its_own(model: Path) -> None:
    judge = load_model(newest_checkpoint(model)).eval()
    texts = [np.arange(1, n) % 500 for n in (5, 40, 90, 2)]
    found = list(document_losses(judge, texts, length=32, separator_id=0, device=torch.device("cpu"), batch_tokens=64))
    assert [count for _, count in found] == [4, 39, 89, 1]
    for ids, (nats, _) in zip(texts, found, strict=True):
        expected = 0.0
        for begin in range(0, len(ids), 32):
            part = torch.from_numpy(ids[begin : begin + 32])
            before = int(ids[begin - 1]) if begin else 0
            inputs = torch.cat([torch.tensor([before]), part[:-1]]).unsqueeze(0)
            with torch.no_grad():
                logits = judge.logits(judge(inputs))[0].double()
            expected += float(torch.nn.functional.cross_entropy(logits, part, reduction="sum"))
        assert nats == pytest.approx(expected, rel=1e-4)


def test_what_is_kept() -> None:
    means, sizes = np.array([3.0, 1.0, 2.0, 5.0, 4.0]), np.array([10, 10, 10, 10, 10])
    assert choose(means, sizes, 20).tolist() == [False, True, True, False, False]
    assert choose(means, sizes, 20, "highest").tolist() == [False, False, False, True, True]
    assert choose(means, sizes, 30, "middle").tolist() == [True, False, True, False, True]
    assert choose(means, sizes, 0.1).sum() == 1


def test_the_likeliest_documents_of_a_corpus_or_a_text(workspace: Any, model: Path, tmp_path: Path) -> None:
    result = select(workspace.new, model, tmp_path / "best.jsonl", keep="20%", quiet=True)
    assert result["kept_tokens"] == pytest.approx(0.2 * result["tokens"], rel=0.1)
    assert result["kept_nats_per_token"] < result["nats_per_token"]
    rows = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == result["kept"]
    assert max(row["nats_per_token"] for row in rows) == pytest.approx(result["highest"], abs=1e-4)
    texts = {json.loads(line)["text"] for line in workspace.new_text.read_text(encoding="utf-8").splitlines()}
    assert {row["text"] for row in rows} <= texts
    raw = select(workspace.new_text, model, tmp_path / "raw.jsonl", keep="5K tokens", which="middle", quiet=True)
    assert 0 < raw["kept_tokens"] < 10_000
    with pytest.raises(UserError, match="exists already"):
        select(workspace.new, model, tmp_path / "raw.jsonl", quiet=True)
    for keep in ("0%", "120%", "some"):
        with pytest.raises(UserError, match="--keep"):
            select(workspace.new, model, tmp_path / "x.jsonl", keep=keep, quiet=True)


def test_a_part_is_drawn_at_random_and_only_that_is_read(
    workspace: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selecting, "_FEWEST_DRAWN", 5)
    whole = select(workspace.new, model, tmp_path / "all.jsonl", keep="100%", quiet=True)
    few = select(workspace.new, model, tmp_path / "few.jsonl", keep="100%", of="20%", quiet=True)
    again = select(workspace.new, model, tmp_path / "again.jsonl", keep="100%", of="20%", quiet=True)
    assert 0.2 * whole["tokens"] <= few["tokens"] < 0.4 * whole["tokens"]
    assert (tmp_path / "few.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    assert again["documents"] == few["documents"] < whole["documents"]
    rows = [json.loads(line) for line in (tmp_path / "few.jsonl").read_text(encoding="utf-8").splitlines()]
    known = {row["id"]: row for row in map(json.loads, (tmp_path / "all.jsonl").read_text("utf-8").splitlines())}
    for row in rows:  # the loss of a document does not depend on what is read beside it; bf16 sums differ by batch
        assert row["nats_per_token"] == pytest.approx(known[row["id"]]["nats_per_token"], rel=1e-2)
    monkeypatch.setattr(selecting, "_FEWEST_DRAWN", 9)
    assert select(workspace.new, model, tmp_path / "9.jsonl", of="1 tokens", quiet=True)["documents"] == 9
    with pytest.raises(UserError, match="--of 20%: belongs to a prepared corpus"):
        select(workspace.new_text, model, tmp_path / "raw.jsonl", of="20%", quiet=True)
    with pytest.raises(UserError, match="--of 0%"):
        select(workspace.new, model, tmp_path / "x.jsonl", of="0%", quiet=True)


def test_a_short_update_does_not_wait_for_a_long_corpus(
    workspace: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selecting, "_FEWEST_DRAWN", 30)
    monkeypatch.setattr(around_the_run, "CHOSEN_OF", 1.2)
    known = {row["id"] for row in Corpus.open(workspace.new).train.documents()}
    told: dict[str, Any] = {"replay": "0%", "validation": "10%", "dry_run": True, "quiet": True}
    data = {"new": workspace.new}
    continue_run(model, data, budget="1K tokens", out=tmp_path / "in parts", how="curriculum", **told)
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "in parts/corpora").glob("*.jsonl")]
    divided = {json.loads(line)["id"] for text in texts for line in text.splitlines()}
    assert len(texts) == 3
    assert len(divided) == 30
    assert divided < known
    told["settings"] = ["stages.0.max_epochs=99"]
    continue_run(model, data, budget="60K tokens", out=tmp_path / "best", how="stability_gap", **told)
    text = (tmp_path / "best/corpora/new-best.jsonl").read_text(encoding="utf-8")
    chosen = [json.loads(line)["nats_per_token"] for line in text.splitlines()]
    best = select(workspace.new, model, tmp_path / "best of all.jsonl", keep="15K tokens", quiet=True)
    assert max(chosen) > best["highest"]  # the likeliest of a sixth more text than is kept, not of all


def test_stability_gap_trains_on_the_likeliest_part(workspace: Any, model: Path, tmp_path: Path) -> None:
    run, choices = tmp_path / "run", {"how": "stability_gap", "replay": "25%"}
    choices["settings"] = ["evaluation.tokens=256 tokens", "stages.0.max_epochs=40"]
    result = continue_run(model, {"new": workspace.new}, budget="40K tokens", out=run, quiet=True, **choices)
    assert result["result"]["complete"]
    sources = {s["name"]: s for s in lineages.read(newest_checkpoint(run)).stages[-1].sources}
    assert set(sources) == {"new-best", "replay/old"}
    assert sources["new-best"]["epochs"] > 2
    assert "new" in result["recipe"]["evaluation"]["corpora"]


def test_the_command(workspace: Any, model: Path, tmp_path: Path) -> None:
    done = answer("select", workspace.new, "--by", model, "--keep", "10%", "--out", tmp_path / "b.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kept"] > 0
    wrong = answer("select", tmp_path / "nowhere", "--by", model, "--out", tmp_path / "c.jsonl")
    assert (wrong.returncode, "no such file" in wrong.stderr) == (2, True)
