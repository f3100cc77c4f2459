"""A run beside others of the same parent: which are found, which are left out and why, and what the page shows."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from perennial.core.records import Recorder
from perennial.report import neighbours, page
from perennial.report.comparison import compare
from perennial.report.frontier import Point, better_in_both, dot
from perennial.report.neighbours import neighbours_of
from perennial.report.sections.alternatives import Alternatives, _left_out

from .synthetic import BATCH, Draw, Plan, Written, write_run

TOKENS = 40 * BATCH
RATES = (1e-4, 1e-3, 1e-4)


def child(root: Path, parent: Written, name: str, old: float, new: float, **changes: object) -> Written:
    losses = {n: (parent.after[n], end) for n, end in (("old", old), ("new", new))}
    mixture = [Draw("new", 0.75), Draw("old", 0.25, "replay")]
    stop_at = float(changes.pop("stop_at", 1.0))  # type: ignore[arg-type]
    plan = Plan(name, {**losses, **changes.pop("losses", {})}, mixture, TOKENS, RATES, **changes)  # type: ignore
    return write_run(root, plan, parent=parent, stop_at=stop_at)


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """A parent, four children that can be compared, and what cannot be."""
    root = tmp_path_factory.mktemp("beside")
    start = {"old": (8.3, 4.5), "new": (8.3, 6.0)}
    runs = {
        name: write_run(root, Plan(name, start, [Draw("old", 1.0)], TOKENS, RATES, seed=seed))
        for name, seed in (("base", 0), ("stranger", 1))
    }
    base = runs["base"]
    runs |= {n: child(root, base, n, old, new) for n, old, new in (("a", 4.9, 4.0), ("b", 4.6, 4.1), ("c", 4.8, 4.2))}
    runs["half"] = child(root, base, "half", 4.7, 4.0, stop_at=0.5)
    runs["other"] = child(root, runs["stranger"], "other", 4.7, 4.0)
    plan = Plan("unmeasured", {"old": (4.5, 4.7), "third": (6.0, 4.0)}, [Draw("third", 1.0)], TOKENS, RATES)
    runs["unmeasured"] = write_run(root, plan, parent=base)
    plan = Plan("longer", {"old": (4.5, 4.7), "new": (6.0, 4.0)}, [Draw("new", 1.0)], TOKENS, RATES, bytes_per_token=2)
    runs["longer"] = write_run(root, plan, parent=base)
    (root / "notes").mkdir()
    (root / "broken").mkdir()
    (root / "broken/events.jsonl").write_text("not an event\n", encoding="utf-8")
    return runs


def test_children_of_the_same_checkpoint_are_found_by_their_records(beside: dict[str, Written]) -> None:
    found = neighbours_of(beside["a"].folder, beside["base"].checkpoint)
    assert [run.name for run in found.runs] == ["b", "c", "longer", "unmeasured"]
    assert found.left_out == {"half": "not finished"}
    b = found.runs[0]
    assert (b.tokens, b.schedules) == (TOKENS, ("cosine",))
    assert b.replay_share == pytest.approx(0.25)
    changes = sorted(b.after[at].nats_per_token - b.before[at].nats_per_token for at in b.after)
    assert changes == pytest.approx([4.1 - 6.0, 4.6 - 4.5])
    assert neighbours_of(beside["a"].folder, "0" * 16).runs == []


def test_only_so_many_folders_are_looked_at(beside: dict[str, Written], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "MOST_FOLDERS", 2)
    found = neighbours_of(beside["c"].folder, beside["base"].checkpoint)
    assert [run.name for run in found.runs] == ["a", "b"], "base has another parent than they have"
    assert found.not_looked_at > 0


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html)).replace(" ,", ",")


def test_the_page_shows_the_run_beside_them(beside: dict[str, Written]) -> None:
    html = Alternatives().render(compare([beside["a"].folder]))
    text = text_of(html)
    assert "2 runs of the same parent were found in the neighbouring folders" in text
    why = ("half (not finished)", "longer (measured on another part of old)", "unmeasured (not measured on new)")
    assert f"Left out: {'; '.join(why)}." in text
    assert re.search(r"a this report \+0\.400 \+2\.000 25% cosine", text), "from 4.5 to 4.9, and from 6.0 to 4.0"
    rows = {row[0]: row[1:] for row in re.findall(r'class="name">(\w).*?</th>(.*?)</tr>', html)}
    assert set(rows) == {"a", "b", "c"}
    assert ">b<" in rows["c"][0].replace('<td class="text wide">', ">").replace("</td>", "<"), "b beats c in both"
    assert all("none" in rows[name][0] for name in "ab")
    assert html.count("<svg viewBox") >= 1
    whole = page.render(compare([beside["a"].folder]))
    assert 'href="#alternatives"' in whole


def test_runs_that_are_given_are_not_found_again(beside: dict[str, Written]) -> None:
    text = text_of(Alternatives().render(compare([beside[name].folder for name in ("a", "b")])))
    assert "1 run of the same parent was found" in text
    assert text.count("this report") == 2


def test_nothing_is_shown_without_an_alternative(beside: dict[str, Written], tmp_path: Path) -> None:
    shutil.copytree(beside["a"].folder, tmp_path / "runs/a")
    assert Alternatives().render(compare([tmp_path / "runs/a"])) == ""
    assert Alternatives().render(compare([beside["base"].folder])) == "", "it continues nothing"
    (tmp_path / "runs/old").mkdir()
    assert Alternatives().render(compare([tmp_path / "runs/a"])) == ""


def test_an_ensemble_is_counted_with_its_members(beside: dict[str, Written], tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(beside[name].folder, tmp_path / name)
    lines = (tmp_path / "a/events.jsonl").read_text(encoding="utf-8").splitlines()
    done = next(event for event in map(json.loads, lines) if event["event"] == "done")
    together = {
        name: {**loss, "nats_per_token": loss["nats_per_token"] - 0.1}
        for name, loss in done["evaluation"]["after"].items()
    }
    recorder = Recorder(tmp_path / "a/events.jsonl")
    members = [{"run": f"a-{i}", "checkpoint": "0", "tokens": 1000, "flops": 2e12} for i in (1, 2)]
    recorder.write("ensemble", tokens=TOKENS, members=members, corpora=together, taught={}, flops=9e12)
    recorder.close()
    text = text_of(Alternatives().render(compare([tmp_path / "a"])))
    assert re.search(r"a this report \+0\.400 .*? 9\.00&thinsp;", text)
    assert re.search(r"a: all 2 members together \+0\.300 \+2\.100 25% mean of probabilities 2(\.0)?K 4\.00", text)
    beside_it = text_of(Alternatives().render(compare([tmp_path / "b"])))
    assert "9.00" in beside_it, "of a neighbour too"


def test_who_is_better_in_both() -> None:
    points = [Point("a", 0.1, 1.0, 0), Point("b", 0.1, 1.1, 1), Point("c", 0.3, 1.2, 2), Point("d", 0.1, 1.0, 3)]
    assert [[other.label for other in better_in_both(point, points)] for point in points] == [["b"], [], [], ["b"]]
    assert len({dot(index) for index in range(8)}) == 8


def test_many_that_are_left_out_are_counted() -> None:
    reasons = {**{f"run-{i}": "not finished" for i in range(6)}, "x": "not measured on <old>"}
    assert _left_out(reasons) == "run-0, run-1, run-2 and 3 more (not finished); x (not measured on &lt;old&gt;)"
