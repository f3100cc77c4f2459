"""Continuing: derived recipes, replay of what was seen, forgetting removed, lineage carried on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from perennial.core import lineage, records
from perennial.core.errors import UserError
from perennial.core.lineage import newest_checkpoint
from perennial.evals.shift import Shift
from perennial.train.continuations.base import PEAK_EXPONENT
from perennial.train.continuing import continue_run, derive
from perennial.train.measuring import evaluate_checkpoint
from perennial.train.recipe import parse_recipe
from perennial.train.resolve import resolve
from perennial.train.run import make_run, start, train
from tests.commands import answer


@pytest.fixture(scope="module")
def base(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent that has learned something of the old corpus: 120 updates of 512 tokens."""
    folder = tmp_path_factory.mktemp("parent") / "base"
    recipe = workspace.recipe(batch={"sequences": 16, "sequence_length": 32}, checkpoints={"every": None, "keep": 1})
    recipe["stages"][0]["budget"] = "61440 tokens"
    start(parse_recipe(recipe), folder, base=Path(), quiet=True)
    return folder


def test_replay_removes_forgetting_at_equal_tokens(workspace: Any, base: Path, tmp_path: Path) -> None:
    outcomes = {}
    for share in ("0%", "25%"):
        run = tmp_path / share.strip("%")
        result = continue_run(base, {"new": workspace.new}, budget="40960 tokens", out=run, replay=share, quiet=True)
        outcomes[share] = result["result"]["evaluation"]
        assert result["result"]["tokens"] == 40960
    before, plain, replayed = outcomes["0%"]["before"], outcomes["0%"]["after"], outcomes["25%"]["after"]
    forgetting = plain["old"]["nats_per_token"] - before["old"]["nats_per_token"]
    assert forgetting > 0.05
    assert replayed["old"]["nats_per_token"] - before["old"]["nats_per_token"] < 0.5 * forgetting
    assert replayed["new"]["nats_per_token"] < before["new"]["nats_per_token"] - 0.1


def test_the_derived_recipe_follows_the_lineage(workspace: Any, base: Path) -> None:
    checkpoint = newest_checkpoint(base)
    parent = lineage.read(checkpoint)
    derived = derive(
        checkpoint,
        {"new": workspace.new},
        budget="30720 tokens",
        base=Path(),
        name="update",
        shift=lambda: Shift(2.0, 4.0),
    )
    stage = derived.recipe.stages[0]
    assert stage.schedule["peak"] == pytest.approx(parent.peak * 0.5**PEAK_EXPONENT, rel=1e-5)
    assert stage.schedule["start"] == "parent"
    assert stage.schedule["final"] == pytest.approx(parent.rate)
    assert stage.mixture == {"new": 0.6, "replay": 0.4}
    weak = derive(
        checkpoint, {"new": workspace.new}, budget="1K tokens", base=Path(), name="u", shift=lambda: Shift(2.0, 2.2)
    )
    assert weak.recipe.stages[0].mixture == {"new": 0.95, "replay": 0.05}
    assert weak.recipe.stages[0].schedule["peak"] >= parent.rate


def test_a_budget_beyond_counting_is_one_error(workspace: Any, base: Path) -> None:
    for budget in ("1e30 tokens", "1e40 FLOPs"):
        derived = derive(
            newest_checkpoint(base), {"new": workspace.new}, budget=budget, base=Path(), name="u", how="rewarm"
        )
        with pytest.raises(UserError, match=r"a budget of .* tokens, more than the 9e\+15 that can be counted"):
            resolve(derived.recipe, base=Path(), precision="fp32")


def test_new_data_that_are_the_old_under_another_name_are_told(workspace: Any, base: Path) -> None:
    told: dict[str, Any] = {"budget": "10K tokens", "base": Path(), "name": "u", "replay": "0%"}
    [warning] = [r for r in derive(newest_checkpoint(base), {"fresh": workspace.old}, **told).reasons if "warning" in r]
    assert "'fresh' is what the parent was trained on as 'old'" in warning
    assert not any(
        "nothing in it is new" in r for r in derive(newest_checkpoint(base), {"old": workspace.old}, **told).reasons
    )


def test_the_child_remembers_both_runs(workspace: Any, base: Path, tmp_path: Path) -> None:
    continue_run(base, {"new": workspace.new}, budget="2048 tokens", out=tmp_path / "child", replay="50%", quiet=True)
    child = lineage.read(newest_checkpoint(tmp_path / "child"))
    parent = lineage.read(newest_checkpoint(base))
    assert [s.run for s in child.stages] == ["base", "child"]
    assert child.stages[1].parent == parent.checkpoint
    assert child.tokens == parent.tokens + 2048
    assert set(child.corpora) == {"old", "new"}
    assert {s["name"]: s["role"] for s in child.stages[1].sources} == {"new": "fresh", "replay/old": "replay"}
    assert child.stages[1].rate_start == parent.rate
    # a grandchild replays both, in the proportions of what was consumed
    continue_run(
        tmp_path / "child",
        {"more": workspace.old},
        budget="1024 tokens",
        out=tmp_path / "third",
        replay="50%",
        quiet=True,
    )
    third = lineage.read(newest_checkpoint(tmp_path / "third"))
    weights = {s["name"]: s["weight"] for s in third.stages[2].sources}
    assert weights["replay/new"] == pytest.approx(0.5 * 1024 / (61440 + 2048))


def test_replay_draws_only_rows_that_the_parent_saw(workspace: Any, base: Path, tmp_path: Path) -> None:
    from perennial.data.corpus import Corpus
    from perennial.data.loader import Loader
    from perennial.train.stage_sources import stage_order
    from perennial.train.starting import read_parent

    recipe = workspace.recipe(batch={"sequences": 16, "sequence_length": 32})
    short = parse_recipe(recipe)
    start(short, tmp_path / "short", base=Path(), quiet=True)
    old = Corpus.open(workspace.old)
    consumed = lineage.read(newest_checkpoint(tmp_path / "short")).stages[0].sources[0]["rows"]
    assert consumed == 96 < old.train.num_rows(32)
    derived = derive(
        newest_checkpoint(tmp_path / "short"),
        {"new": workspace.new},
        budget="4096 tokens",
        base=Path(),
        name="u",
        replay="50%",
    )
    resolved = make_run(derived.recipe, tmp_path / "u", base=Path())
    corpora = {c.fingerprint: c for c in (old, Corpus.open(workspace.new))}

    def rows(sources: list[dict[str, Any]], seed: int, stage: str, count: int) -> list[bytes]:
        order = stage_order(sources, corpora, seed, 32, stage, {})
        with Loader(order, corpora, sequence_length=32, document_mask=False, separator_id=old.separator_id) as loader:
            batch = loader.at(0, count)
        replayed = [i for i, s in enumerate(sources) if s["role"] == "replay"] or [0]
        return [t.tobytes() for t, s in zip(batch.targets, batch.source, strict=True) if s in replayed]

    parent = read_parent(newest_checkpoint(tmp_path / "short")).lineage.stages[0]
    seen = rows(parent.sources, parent.seed, parent.stage, consumed)
    again = rows(resolved.stages[0].sources, resolved.seed, "update", 128)
    assert len(again) == 64
    assert set(again) <= set(seen)
    assert len(set(again)) == 64  # within one replay epoch nothing is repeated
    assert again != seen[:64]  # in fresh order


def test_raw_text_is_prepared_and_deduplicated_against_the_parent(workspace: Any, base: Path, tmp_path: Path) -> None:
    documents = [json.loads(line) for line in workspace.new_text.read_text().splitlines()]
    documents += [json.loads(line) for line in workspace.old_text.read_text().splitlines()][:20]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    out = tmp_path / "run"
    done = answer(
        "continue",
        base,
        "--data",
        f"mixed={tmp_path / 'mixed.jsonl'}",
        "--tokens",
        "1K tokens",
        "--validation",
        "10%",
        "--out",
        out,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["result"]["complete"]
    assert any("replay" in r for r in result["reasons"])
    manifest = json.loads((out / "corpora/mixed/manifest.json").read_text())
    assert (
        sum(manifest["counts"]["dropped"].values()) >= 18
    )  # (the parent's validation documents count as its own, too)
    assert yaml.safe_load((out / "recipe.yaml").read_text())["parent"].endswith("checkpoints/61440")
    assert (out / "recipe.yaml").read_text().startswith("# Derived from")


def test_a_dry_run_writes_no_run(workspace: Any, base: Path, tmp_path: Path) -> None:
    done = answer(
        "continue",
        base,
        "--data",
        f"new={workspace.new}",
        "--tokens",
        "1K tokens",
        "--out",
        tmp_path / "run",
        "--dry-run",
    )
    assert done.returncode == 0, done.stderr
    assert "learning rate: starts at" in done.stdout
    assert "replay" in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_not_the_parents_is_refused(workspace: Any, base: Path, tmp_path: Path) -> None:
    from perennial.data.prepare import PrepareSettings, prepare
    from perennial.data.tokenizers.train import train_tokenizer

    train_tokenizer([workspace.new_text], tmp_path / "tokenizer", vocabulary_size=400)
    settings = PrepareSettings(
        name="other", inputs=[str(workspace.new_text)], tokenizer=str(tmp_path / "tokenizer"), validation="10%"
    )
    prepare(settings, tmp_path / "other")
    with pytest.raises(UserError, match="another tokenizer"):
        continue_run(base, {"other": tmp_path / "other"}, budget="1K tokens", out=tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate_checkpoint(newest_checkpoint(base), {"other": tmp_path / "other"})


def test_evaluation_measures_the_same_as_the_run_did(workspace: Any, base: Path) -> None:
    measured = evaluate_checkpoint(newest_checkpoint(base), {"old": workspace.old}, max_tokens=2048, precision="fp32")
    recorded = records.read(base / "events.jsonl", "evaluation")[-1]["corpora"]["old"]
    assert measured["corpora"]["old"] == pytest.approx(recorded, rel=1e-6)


def test_wrong_input_exits_2_with_one_error(workspace: Any, base: Path, tmp_path: Path) -> None:
    data = f"new={workspace.new}"
    cases = [
        (
            ["continue", tmp_path / "nowhere", "--data", data, "--tokens", "1K tokens", "--out", tmp_path / "r"],
            "nowhere",
        ),
        (
            ["continue", base, "--data", str(workspace.new), "--tokens", "1K tokens", "--out", tmp_path / "r"],
            "NAME=PATH",
        ),
        (["continue", base, "--data", data, "--tokens", "1e9", "--out", tmp_path / "r"], "no unit"),
        (
            [
                "continue",
                base,
                "--data",
                data,
                "--tokens",
                "1K tokens",
                "--schedule",
                "rewram",
                "--out",
                tmp_path / "r",
            ],
            "'rewarm'",
        ),
        (["train", tmp_path / "missing.yaml"], "no such file"),
        (["show", tmp_path], "neither a prepared corpus"),
    ]
    for arguments, words in cases:
        done = answer(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert words in done.stderr
        assert not (tmp_path / "r").exists()


def test_a_child_goes_on_when_its_parent_is_gone(workspace: Any, base: Path, tmp_path: Path) -> None:
    """Its own checkpoints hold the lineage and the tokenizer."""
    parent = tmp_path / "parent"
    shutil.copytree(base, parent)
    whole = tmp_path / "whole"
    continue_run(parent, {"new": workspace.new}, budget="4096 tokens", out=whole, replay="25%", quiet=True)
    child = tmp_path / "child"
    shutil.copytree(whole, child)
    shutil.rmtree(child / "checkpoints/4096")
    lines = [line for line in (child / "events.jsonl").read_text().splitlines() if '"done"' not in line]
    (child / "events.jsonl").write_text("\n".join(lines) + "\n")
    shutil.rmtree(parent)
    assert train(child, quiet=True)["complete"]
    one, other = lineage.read(newest_checkpoint(whole)), lineage.read(newest_checkpoint(child))
    assert one.checkpoint == other.checkpoint
    assert [(s.run, s.tokens) for s in one.stages] == [(s.run, s.tokens) for s in other.stages]


def test_a_moved_workspace_is_found_again(workspace: Any, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(workspace.old, here / "corpora/old")
    recipe = workspace.recipe(corpora={"old": "corpora/old"})
    start(parse_recipe(recipe), here / "run", base=here, quiet=True)
    shutil.rmtree(here / "run/checkpoints/3072")
    lines = [line for line in (here / "run/events.jsonl").read_text().splitlines() if '"done"' not in line]
    (here / "run/events.jsonl").write_text("\n".join(lines) + "\n")
    here.rename(tmp_path / "there")
    assert train(tmp_path / "there/run", quiet=True)["tokens"] == 3072


def test_the_child_is_trained_as_the_parent_was(workspace: Any, tmp_path: Path) -> None:
    batch = {"sequences": 8, "sequence_length": 32, "micro_batch": 4}
    start(
        parse_recipe(workspace.recipe(batch=batch, clip=0.5, document_mask=True)),
        tmp_path / "p",
        base=Path(),
        quiet=True,
    )
    derived = derive(
        newest_checkpoint(tmp_path / "p"),
        {"new": workspace.new},
        budget="1K tokens",
        base=Path(),
        name="c",
        replay="0%",
    ).recipe
    assert (derived.batch.micro_batch, derived.clip, derived.document_mask) == (4, 0.5, True)


def test_peak_parent_is_the_highest_rate_so_far(workspace: Any) -> None:
    recipe = workspace.recipe()
    again = {
        **recipe["stages"][0],
        "name": "again",
        "schedule": {"name": "rewarm", "start": "parent", "peak": "parent"},
    }
    recipe["stages"].append(again)
    first, second = resolve(parse_recipe(recipe), base=Path(), precision="fp32").stages
    assert second.rate_peak == pytest.approx(first.rate_peak, rel=0.02)  # peaks are those of updates
    assert second.rate_start == first.rate_end < first.rate_peak


def test_forgetting_is_stated_only_on_the_same_text(workspace: Any, base: Path, tmp_path: Path) -> None:
    continue_run(base, {"new": workspace.new}, budget="1024 tokens", out=tmp_path / "c", replay="0%", quiet=True)
    child, data = newest_checkpoint(tmp_path / "c"), {"old": workspace.old, "new": workspace.new}
    other_text = evaluate_checkpoint(child, data, max_tokens=512)["against_parent"]
    assert not other_text["forgetting"]
    measured_too = evaluate_checkpoint(child, data, max_tokens=512, against=newest_checkpoint(base))["against_parent"]
    assert (set(measured_too["forgetting"]), set(measured_too["adaptation"])) == ({"old"}, {"new"})
