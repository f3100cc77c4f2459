"""Ensembles of continuations: members that differ in their seeds, measured together, taught into one, and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perennial.cli.main import main
from perennial.core import lineage, records
from perennial.core.errors import UserError
from perennial.core.lineage import newest_checkpoint
from perennial.report.comparison import compare
from perennial.report.sections.alternatives import Alternatives
from perennial.train.continuing import continue_run
from perennial.train.ensembling import Ensemble, continue_ensemble, ensemble_of, to_text
from perennial.train.measuring import evaluate_checkpoint
from perennial.train.recipe import parse_recipe, read
from perennial.train.run import start

TWO = Ensemble(members=2)
HOW: dict[str, Any] = {
    "budget": "1024 tokens",
    "replay": "25%",
    "how": "data_bound",
    "settings": ["evaluation.tokens=512 tokens"],
    "quiet": True,
}


@pytest.fixture(scope="module")
def base(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent: 12 updates on the old corpus."""
    folder = tmp_path_factory.mktemp("ensembles") / "base"
    few = {"checkpoints": {"every": None, "keep": 1}, "evaluation": {"tokens": "512 tokens", "every": None}}
    start(parse_recipe(workspace.recipe(**few)), folder, base=Path(), quiet=True)
    return folder


@pytest.fixture(scope="module")
def taught(workspace: Any, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An ensemble of two from raw text, and what it returned."""
    out = tmp_path_factory.mktemp("taught") / "update"
    return out, continue_ensemble(base, {"new": workspace.new_text}, TWO, out=out, **HOW)


def events_of(run: Path) -> bytes:
    return (run / "events.jsonl").read_bytes()


def test_members_are_runs_of_their_own_that_differ_in_their_order(taught: tuple[Path, Any], base: Path) -> None:
    out, _ = taught
    runs = [out.with_name("update-1"), out.with_name("update-2"), out]
    known = [lineage.read(newest_checkpoint(run)) for run in runs]
    parent = lineage.read(newest_checkpoint(base)).checkpoint
    assert all(one.stages[-1].parent == parent for one in known)
    assert [one.stages[-1].seed for one in known] == [1, 2, 3]
    assert len({one.checkpoint for one in known}) == 3
    assert len({one.stages[-1].sources[0]["fingerprint"] for one in known}) == 1, "the text is prepared once"
    assert (out / "corpora/new/manifest.json").is_file()
    assert not (runs[0] / "corpora").exists()
    assert all(one.stages[-1].optimizer == known[0].stages[-1].optimizer for one in known)


def test_the_last_run_is_taught_by_all_members(taught: tuple[Path, Any]) -> None:
    out, _ = taught
    last = lineage.read(newest_checkpoint(out)).stages[-1]
    members = [lineage.read(newest_checkpoint(out.with_name(f"update-{i}"))).checkpoint for i in (1, 2)]
    assert [model["checkpoint"] for model in last.models] == members
    assert {key: last.objective[key] for key in ("name", "weight", "rows")} == {
        "name": "distillation",
        "weight": 0.5,
        "rows": ["new"],
    }
    assert read(out / "recipe.yaml").stages[0].objective["teacher"][0].endswith("update-1")
    alone = lineage.read(newest_checkpoint(out.with_name("update-1"))).stages[-1]
    more = 0.75 * 2 / 3  # two more forward passes of the rows that are not replayed
    assert last.flops == pytest.approx((1 + more) * alone.flops, rel=0.01)


def test_what_it_cost_and_gave_is_recorded_once(taught: tuple[Path, dict[str, Any]], base: Path) -> None:
    out, result = taught
    [event] = records.read(out / "events.jsonl", "ensemble")
    assert result["ensemble"] == event
    spent = [records.read(run / "events.jsonl", "done")[-1]["flops"] for run in (out, *members_of(out))]
    assert event["flops"] == pytest.approx(sum(spent))
    assert [member["run"] for member in event["members"]] == ["update-1", "update-2"]
    new = {"new": out / "corpora/new"}
    how: dict[str, Any] = {"max_tokens": 512, "ensemble": [newest_checkpoint(out.with_name("update-2"))]}
    again = evaluate_checkpoint(newest_checkpoint(out.with_name("update-1")), new, **how)["ensemble"]["corpora"]
    assert event["corpora"]["new"]["nats_per_token"] == pytest.approx(again["new"]["nats_per_token"], abs=1e-5)
    alone = [member["corpora"]["new"]["nats_per_token"] for member in event["members"]]
    assert event["corpora"]["new"]["nats_per_token"] <= sum(alone) / 2
    assert "all 2 together" in to_text(event)
    section = Alternatives().render(compare([out]))
    assert "update: all 2 members together" in section
    assert all(f">update-{i}<" in section for i in (1, 2))


def members_of(out: Path) -> list[Path]:
    return [out.with_name(f"{out.name}-{i}") for i in (1, 2)]


def test_the_same_call_changes_nothing(workspace: Any, base: Path, taught: tuple[Path, dict[str, Any]]) -> None:
    out, result = taught
    before = [events_of(run) for run in (out, *members_of(out))]
    again = continue_ensemble(base, {"new": workspace.new_text}, TWO, out=out, **HOW)
    assert again["ensemble"] == result["ensemble"]
    assert [events_of(run) for run in (out, *members_of(out))] == before


def test_it_resumes_between_the_runs_and_ends_the_same(
    workspace: Any, base: Path, taught: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, calls = tmp_path / "update", []

    def stopping_before(number: int) -> Any:
        def run(*arguments: Any, **choices: Any) -> dict[str, Any]:
            calls.append(choices["out"].name)
            if len(calls) == number:
                return {"result": {"complete": False}}
            return continue_run(*arguments, **choices)

        return run

    data = {"new": workspace.new_text}
    for number in (2, 3):
        calls.clear()
        stopped = continue_ensemble(base, data, TWO, out=out, run=stopping_before(number), **HOW)
        assert stopped == {"result": {"complete": False}}
        assert calls == ["update-1", "update-2", "update"][:number]
    first = events_of(out.with_name("update-1"))
    assert not (out / "resolved.json").exists()
    done = continue_ensemble(base, data, TWO, out=out, **HOW)
    assert events_of(out.with_name("update-1")) == first
    whole = lineage.read(newest_checkpoint(taught[0])).checkpoint
    assert lineage.read(newest_checkpoint(out)).checkpoint == whole, "to the bit what one call gives"
    assert done["ensemble"]["corpora"] == taught[1]["ensemble"]["corpora"]


def test_settings_and_ways_that_do_not_fit_are_refused(workspace: Any, base: Path, tmp_path: Path) -> None:
    assert ensemble_of("{members: 3, weight: 0.5}") == Ensemble(members=3, weight=0.5)
    for text, words in (
        ("1", r"--ensemble 1: 1 problem\n.*members"),
        ("many", r"members"),
        ("{members: 2, wieght: 1}", r"wieght[^\n]*weight"),
        ("{members: 2", "not a mapping in YAML"),
    ):
        with pytest.raises(UserError, match=words):
            ensemble_of(text)
    ways = (("average", "averages its run"), ("stability_gap", "a part of"), ("curriculum", "a part of the new text"))
    for way, words in ways:
        with pytest.raises(UserError, match=f"--ensemble: does not go with --recipe {way}, which.*{words}"):
            continue_ensemble(base, {"new": workspace.new}, TWO, out=tmp_path / "no", **{**HOW, "how": way})
    assert not list(tmp_path.iterdir())


def test_a_dry_run_shows_a_member_and_says_what_comes_after(
    workspace: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["continue", str(base), "--data", f"new={workspace.new}", "--tokens", "1024", "--replay", "25%"]
    asked += ["--recipe", "rewarm", "--out", str(tmp_path / "update"), "--ensemble", "3", "--dry-run", "--json"]
    assert main(asked) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["recipe"]["name"] == "update-1"
    assert "the first of 3 members" in shown["reasons"][-1]
    cost = float(shown["reasons"][-1].rpartition("in all ")[2].split()[0])
    assert cost == pytest.approx((3 + 1 + 0.75 * 3 / 3) * shown["resolved"]["flops"], rel=0.01)
    assert not list(tmp_path.iterdir())
