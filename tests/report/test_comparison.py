"""The comparison: roles, differences, references and baselines, on run folders whose numbers are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from perennial.core.errors import UserError
from perennial.core.records import Recorder
from perennial.report.comparison import Comparison, compare
from perennial.report.page import render as page
from perennial.report.rows import Row, value
from perennial.report.runs import Loss, mean, read_run

from .synthetic import BATCH, Draw, Plan, Written, write_run

TOKENS = 40 * BATCH
RATES = (1e-4, 1e-3, 1e-4)
NATS = "nats_per_token"


def row_of(comparison: Comparison, label: str) -> Row:
    row = comparison.row(label)
    assert row is not None, label
    return row


def nats(loss: Loss | None) -> float:
    known = value(loss, NATS)
    assert known is not None
    return known


def base_run(root: Path, **losses: float) -> Written:
    start = {name: (8.0, end) for name, end in losses.items()}
    return write_run(root, Plan("base", start, [Draw("old", 1.0)], TOKENS, (0.0, 1e-3, 1e-4)))


def update(name: str, base: Written, mixture: list[Draw], **ends: float) -> Plan:
    return Plan(name, {n: (base.after[n], end) for n, end in ends.items()}, mixture, TOKENS, RATES)


FRESH = [Draw("new", 1.0)]
REPLAY = [Draw("new", 0.75), Draw("old", 0.25, "replay")]
BOTH = [Draw("old", 0.5), Draw("new", 0.5)]


# The demo's picture


def test_the_table_of_the_demo(comparison: Comparison) -> None:
    assert [row.label for row in comparison.rows] == ["base", "a", "b", "c", "d"]
    assert comparison.corpora == ("old", "new")
    assert comparison.unit == NATS
    assert comparison.same_roles
    assert comparison.notes == ()
    c = row_of(comparison, "c")
    assert c.roles == {"old": "old", "new": "new"}
    assert nats(c.old) == pytest.approx(4.69)
    assert nats(c.new) == pytest.approx(4.11)
    assert nats(c.average) == pytest.approx(4.40)
    assert nats(c.forgetting) == pytest.approx(4.69 - 4.55)
    assert nats(c.adaptation) == pytest.approx(6.10 - 4.11)
    assert nats(c.backward_transfer) == pytest.approx(-(4.69 - 4.55))
    assert c.replay_share == pytest.approx(0.25, abs=0.01)
    assert c.parent_label == "base"


def test_forgetting_removed_is_against_the_run_that_forgot_most(comparison: Comparison) -> None:
    a, b, c, d = (row_of(comparison, label) for label in "abcd")
    assert b.is_reference
    assert b.forgetting_removed is None
    assert c.forgetting_reference == "b"
    assert c.forgetting_removed == pytest.approx(1 - 0.14 / 1.88)
    assert a.forgetting_reference == "b"
    assert a.forgetting_removed == pytest.approx(1 - 0.66 / 1.88)
    assert d.forgetting is None
    assert d.forgetting_removed is None


def test_compute_saved_counts_the_update_and_separately_the_parent(comparison: Comparison) -> None:
    c, d = row_of(comparison, "c"), row_of(comparison, "d")
    assert d.is_baseline
    assert d.compute_saved is None
    assert c.baseline == "d"
    assert c.compute_saved == pytest.approx(0.5)
    assert c.compute_saved_with_parent == pytest.approx(0.0)
    assert c.flops is not None
    assert c.parent_flops == pytest.approx(c.flops)
    assert nats(c.average_above_baseline) == pytest.approx(4.40 - 4.41)
    assert nats(row_of(comparison, "a").average_above_baseline) > 0


def test_bits_per_byte_goes_along(comparison: Comparison) -> None:
    c = row_of(comparison, "c")
    assert c.old is not None
    assert c.old.bits_per_byte is not None
    assert c.old.bits_per_byte == pytest.approx(4.69 / math.log(2) / 3.2, rel=1e-4)
    assert c.forgetting is not None
    assert c.forgetting.bits_per_byte == pytest.approx(0.14 / math.log(2) / 3.2, rel=1e-3)


def test_best_values_leave_parents_out(comparison: Comparison) -> None:
    assert comparison.best("old") == {"d"}
    assert comparison.best("new") == {"b"}
    assert comparison.best("average") == {"c"}


def test_the_split_of_the_time(comparison: Comparison) -> None:
    c = row_of(comparison, "c")
    assert set(c.seconds) == {"train", "data", "evaluate", "save"}
    assert c.wall_seconds == pytest.approx(sum(c.seconds.values()))


def test_json_is_plain_and_without_curves(comparison: Comparison) -> None:
    data = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert [row["label"] for row in data["rows"]] == ["base", "a", "b", "c", "d"]
    assert data["rows"][3]["forgetting_removed"] == pytest.approx(1 - 0.14 / 1.88)
    assert "run" not in data["rows"][0]


def test_text_table_lines_up(comparison: Comparison) -> None:
    lines = comparison.text_table().splitlines()
    assert len(lines) == 2 + 5
    assert lines[0].split("  ")[0] == "run"
    assert {len(line) for line in lines[2:4]} <= {len(lines[1])}
    assert "reference" in lines[4]
    assert "baseline" in lines[6]
    assert comparison.text_table().isascii()


# Parents


def test_parent_known_only_through_its_children(runs: dict[str, Written], comparison: Comparison) -> None:
    without = compare([runs[name].folder for name in "abcd"])
    base, seen = row_of(without, "base"), row_of(comparison, "base")
    assert without.rows[0].label == "base"
    assert base.run is None
    assert base.is_base
    assert nats(base.old) == pytest.approx(nats(seen.old))
    assert nats(base.average) == pytest.approx(nats(seen.average))
    assert base.tokens == seen.tokens
    assert base.flops == pytest.approx(seen.flops)
    assert row_of(without, "c").forgetting_removed == row_of(comparison, "c").forgetting_removed


def test_what_the_parents_run_did_not_measure_its_child_did(tmp_path: Path) -> None:
    base = base_run(tmp_path, old=4.5)
    plan = Plan("c", {"old": (4.5, 4.7), "new": (6.0, 4.1)}, REPLAY, TOKENS, RATES)
    child = write_run(tmp_path, plan, parent=base)
    row = row_of(compare([base.folder, child.folder]), "base")
    assert nats(row.new) == pytest.approx(6.0)
    assert nats(row.average) == pytest.approx(5.25)


def test_a_deleted_parent_checkpoint_is_found_by_its_recipe(tmp_path: Path) -> None:
    base = base_run(tmp_path, old=4.5, new=6.0)
    child = write_run(tmp_path, update("c", base, REPLAY, old=4.7, new=4.1), parent=base)
    for path in (base.folder / "checkpoints").rglob("lineage.json"):
        path.unlink()
    comparison = compare([base.folder, child.folder])
    assert [row.label for row in comparison.rows] == ["base", "c"]
    assert row_of(comparison, "c").parent_label == "base"


def test_a_different_measurement_of_the_same_parent_is_told(tmp_path: Path) -> None:
    base = base_run(tmp_path, old=4.5, new=6.0)
    plan = Plan("c", {"old": (4.9, 4.7), "new": (6.0, 4.1)}, REPLAY, TOKENS, RATES)
    child = write_run(tmp_path, plan, parent=base)
    notes = compare([base.folder, child.folder]).notes
    assert any("measured 4.900 nats/token before its first update" in note for note in notes)


def test_generations(tmp_path: Path) -> None:
    """What was new to the first update is old to the second."""
    base = base_run(tmp_path, old=4.5, new=6.0, third=7.0)
    first = write_run(tmp_path, update("first", base, REPLAY, old=4.7, new=4.1, third=6.9), parent=base)
    mixture = [Draw("third", 0.6), Draw("old", 0.2, "replay"), Draw("new", 0.2, "replay")]
    second = write_run(tmp_path, update("second", first, mixture, old=4.8, new=4.3, third=4.0), parent=first)
    comparison = compare([base.folder, first.folder, second.folder])
    row = row_of(comparison, "second")
    assert row.roles == {"old": "old", "new": "old", "third": "new"}
    assert nats(row.forgetting) == pytest.approx(((4.8 - 4.7) + (4.3 - 4.1)) / 2)
    assert nats(row.average) == pytest.approx((4.8 + 4.3 + 4.0) / 3)
    assert row.parent_tokens == 2 * TOKENS
    assert row_of(comparison, "first").is_base
    assert row_of(comparison, "first").roles["third"] == "other"
    assert not comparison.same_roles
    assert any("from row to row" in note for note in comparison.notes)
    assert comparison.best("average") == set()


def test_a_base_is_compared_with_the_runs_that_continue_it_on_what_those_call_old(tmp_path: Path) -> None:
    """Not on what only later generations, which it is no parent of, call old: it never saw that."""
    base = base_run(tmp_path, old=4.5, new=6.0, third=7.0)
    first = write_run(tmp_path, update("first", base, REPLAY, old=4.7, new=4.1, third=6.9), parent=base)
    mixture = [Draw("third", 0.6), Draw("old", 0.2, "replay"), Draw("new", 0.2, "replay")]
    second = write_run(tmp_path, update("second", first, mixture, old=4.8, new=4.3, third=4.0), parent=first)
    comparison = compare([base.folder, first.folder, second.folder])
    row = row_of(comparison, "base")
    assert row.roles == row_of(comparison, "first").roles == {"old": "old", "new": "new", "third": "other"}
    assert nats(row.old) == pytest.approx(4.5)
    assert nats(row.average) == pytest.approx(5.25)
    assert nats(row_of(comparison, "second").old) == pytest.approx(4.55)
    assert any("from row to row" in note for note in comparison.notes)


# Old text that was not measured everywhere


def stand_in(run: Written, name: str) -> None:
    """Marks a corpus of the run as standing in for what its parent trained on."""
    path = run.folder / "resolved.json"
    resolved = json.loads(path.read_text(encoding="utf-8"))
    resolved["corpora"][name]["stands_in"] = True
    path.write_text(json.dumps(resolved), encoding="utf-8")


STANDING_IN = [Draw("new", 0.75), Draw("third", 0.25, "replay")]


def test_a_stand_in_is_the_old_text_of_all_rows_where_the_parents_own_is_gone(tmp_path: Path) -> None:
    base = base_run(tmp_path, old=4.5, new=6.0)
    child = write_run(
        tmp_path, Plan("g", {"third": (5.0, 5.2), "new": (6.0, 4.1)}, STANDING_IN, TOKENS, RATES), parent=base
    )
    stand_in(child, "third")
    alone, both = compare([child.folder]), compare([base.folder, child.folder])
    for comparison in (alone, both):
        assert comparison.same_roles
        assert nats(row_of(comparison, "base").old) == pytest.approx(5.0)
        assert nats(row_of(comparison, "g").old) == pytest.approx(5.2)
        assert nats(row_of(comparison, "g").average) == pytest.approx(4.65)
        assert nats(row_of(comparison, "g").forgetting) == pytest.approx(0.2)
    assert row_of(both, "base").roles == {"old": "old, not counted", "third": "old", "new": "new"}
    told = "g was not evaluated on old, which is old to it, so the old and average losses of all rows leave that out."
    assert [note for note in both.notes if "not evaluated" in note] == [told]
    assert "old, not counted" in page(both)


def test_where_updates_share_no_old_text_each_has_its_own_and_the_base_what_it_saw(tmp_path: Path) -> None:
    base = base_run(tmp_path, old=4.5, new=6.0)
    plan = Plan("g", {"third": (5.0, 5.2), "new": (6.0, 4.1)}, STANDING_IN, TOKENS, RATES)
    child = write_run(tmp_path, plan, parent=base)
    stand_in(child, "third")
    other = write_run(tmp_path, update("c", base, REPLAY, old=4.7, new=4.2), parent=base)
    comparison = compare([base.folder, child.folder, other.folder])
    assert not comparison.same_roles
    assert [nats(row_of(comparison, label).old) for label in ("base", "g", "c")] == pytest.approx([4.5, 5.2, 4.7])
    assert any("from row to row" in note for note in comparison.notes)
    assert any(note.startswith("g was not evaluated on old") and "this row" in note for note in comparison.notes)


def test_old_text_that_is_not_counted_is_still_replay(tmp_path: Path) -> None:
    losses = {"old": (8.0, 4.5), "third": (8.0, 4.0), "new": (8.0, 6.0)}
    mixture = [Draw("old", 0.5), Draw("third", 0.5)]
    base = write_run(tmp_path, Plan("base", losses, mixture, TOKENS, (0.0, 1e-3, 1e-4)))
    replays = write_run(tmp_path, update("replays", base, REPLAY, old=4.6, third=4.1, new=4.2), parent=base)
    plain = write_run(tmp_path, update("plain", base, FRESH, third=5.0, new=4.1), parent=base)
    only = Plan("only", {"third": (8.0, 4.1), "new": (8.0, 4.2)}, [Draw("third", 0.5), Draw("new", 0.5)], TOKENS, RATES)
    retrained = write_run(tmp_path, only)
    comparison = compare([run.folder for run in (base, replays, plain, retrained)])
    row = row_of(comparison, "replays")
    assert comparison.same_roles
    assert nats(row.old) == pytest.approx(4.1)
    assert (row.forgetting_reference, row.forgetting_removed) == ("plain", pytest.approx(0.9))
    assert row.baseline is None, "'only' never saw all of the old text"


# One run, no parents


def test_a_single_continuation_names_what_is_missing(runs: dict[str, Written]) -> None:
    comparison = compare([runs["c"].folder], labels=["mine"])
    assert [row.label for row in comparison.rows] == ["base", "mine"]
    row = row_of(comparison, "mine")
    assert row.forgetting_removed is None
    assert row.compute_saved is None
    assert any("without replay" in note for note in comparison.notes)
    assert any("random weights" in note for note in comparison.notes)


def test_runs_without_parents_have_one_average(runs: dict[str, Written]) -> None:
    comparison = compare([runs["base"].folder, runs["d"].folder])
    d = row_of(comparison, "d")
    assert set(d.roles.values()) == {"all"}
    assert d.old is None
    assert d.new is None
    assert nats(d.average) == pytest.approx(4.41)
    assert comparison.best("average") == {"d"}
    assert "forgetting" not in comparison.text_table()
    assert "old nats" not in comparison.text_table()


# Unfinished runs


def test_an_unfinished_run_is_marked_and_decides_nothing(tmp_path: Path) -> None:
    base = base_run(tmp_path, old=4.5, new=6.0)
    plain = write_run(tmp_path, update("plain", base, FRESH, old=9.0, new=4.0), parent=base, stop_at=0.5)
    replay = write_run(tmp_path, update("replay", base, REPLAY, old=4.7, new=4.1), parent=base)
    scratch = Plan("scratch", {"old": (8.0, 4.6), "new": (8.0, 4.2)}, BOTH, TOKENS, (0.0, 1e-3, 1e-4))
    stopped = write_run(tmp_path, scratch, stop_at=0.5)
    comparison = compare([w.folder for w in (base, plain, replay, stopped)])
    row = row_of(comparison, "plain")
    assert not row.finished
    assert row.state.startswith("not finished at 81.9K of 164K")
    assert row.forgetting is not None
    assert row.forgetting_removed is None
    assert row.compute_saved is None
    assert row_of(comparison, "replay").forgetting_removed is None
    assert row_of(comparison, "replay").baseline is None
    assert "plain" not in comparison.best("new")
    assert "plain (unfinished)" in comparison.text_table()


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    base = base_run(tmp_path, old=4.5, new=6.0)
    begun = write_run(tmp_path, update("begun", base, REPLAY, old=4.7, new=4.1), parent=base, stop_at=0.0, saved=False)
    row = row_of(compare([begun.folder]), "begun")
    assert row.tokens == 0
    assert not row.finished
    assert row.roles == {"old": "old", "new": "new"}, "from the parent's folder, the run has no lineage of its own yet"


def test_a_folder_with_no_events_yet(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("", encoding="utf-8")
    comparison = compare([tmp_path])
    assert comparison.rows[0].tokens == 0
    assert comparison.rows[0].average is None


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    base = base_run(tmp_path, old=4.5)
    recorder = Recorder(base.folder / "events.jsonl", now=lambda: 0.0)
    broken = {"old": {"nats_per_token": math.nan, "bits_per_byte": math.inf, "tokens": 1, "bytes": 1}}
    totals = {"tokens": TOKENS, "flops": 1.0, "seconds": {"train": 1.0}}
    recorder.write("done", **totals, evaluation={"before": {}, "after": broken})
    recorder.close()
    text = (base.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in text[:-1] if '"event": "done"' not in line]
    (base.folder / "events.jsonl").write_text("\n".join([*kept, text[-1]]) + "\n", encoding="utf-8")
    row = compare([base.folder]).rows[0]
    assert row.average == Loss(None, None)
    json.dumps(compare([base.folder]).to_json(), allow_nan=False)


# What cannot be compared


def test_different_tokenizers_are_compared_in_bits_per_byte(tmp_path: Path) -> None:
    losses = {"old": (8.0, 4.5), "new": (8.0, 4.4)}
    one = Plan("one", losses, BOTH, TOKENS, RATES)
    other = replace(
        one, name="other", losses={"old": (8.0, 3.0), "new": (8.0, 3.0)}, bytes_per_token=1.6, tokenizer="two"
    )
    comparison = compare([write_run(tmp_path, plan).folder for plan in (one, other)])
    assert comparison.unit == "bits_per_byte"
    assert comparison.best("average") == {"one"}, "fewer nats per token, but twice the tokens"
    assert comparison.best("average", NATS) == set()
    assert any("different tokenizers" in note for note in comparison.notes)


def test_corpora_are_recognised_by_fingerprint(tmp_path: Path) -> None:
    base = base_run(tmp_path, old=4.5, new=6.0)
    child = write_run(tmp_path, update("c", base, REPLAY, old=4.7, new=4.1), parent=base)
    for path in [child.folder / "resolved.json", *child.folder.rglob("lineage.json"), child.folder / "events.jsonl"]:
        path.write_text(path.read_text(encoding="utf-8").replace('"old": {"', '"prose": {"'), encoding="utf-8")
    resolved = json.loads((child.folder / "resolved.json").read_text(encoding="utf-8"))
    resolved["corpora"]["prose"] = resolved["corpora"].pop("old")
    (child.folder / "resolved.json").write_text(json.dumps(resolved), encoding="utf-8")
    comparison = compare([base.folder, child.folder])
    assert comparison.corpora == ("old", "new")
    assert nats(row_of(comparison, "c").old) == pytest.approx(4.7)


def test_of_several_baselines_the_best_one_counts(tmp_path: Path) -> None:
    base = base_run(tmp_path, old=4.5, new=6.0)
    child = write_run(tmp_path, update("c", base, REPLAY, old=4.7, new=4.1), parent=base)
    good = Plan("good", {"old": (8.0, 4.6), "new": (8.0, 4.2)}, BOTH, 2 * TOKENS, (0.0, 1e-3, 1e-4))
    weak = replace(good, name="weak", losses={"old": (8.0, 5.6), "new": (8.0, 5.2)}, tokens=8 * TOKENS)
    only = replace(good, name="only", losses={"old": (8.0, 4.0), "new": (8.0, 4.0)}, mixture=[Draw("new", 1.0)])
    folders = [base.folder, child.folder, *(write_run(tmp_path, plan).folder for plan in (weak, good, only))]
    row = row_of(compare(folders), "c")
    assert row.baseline == "good", "'weak' has a higher loss, 'only' never saw the old corpus"
    assert row.compute_saved == pytest.approx(0.5)


def test_an_update_that_costs_more_or_is_worse_says_so(tmp_path: Path) -> None:
    base = base_run(tmp_path, old=4.5, new=6.0)
    child = write_run(tmp_path, update("c", base, REPLAY, old=5.7, new=5.1), parent=base)
    cheap = Plan("cheap", {"old": (8.0, 4.6), "new": (8.0, 4.2)}, BOTH, TOKENS // 2, (0.0, 1e-3, 1e-4))
    row = row_of(compare([base.folder, child.folder, write_run(tmp_path, cheap).folder]), "c")
    assert row.compute_saved == pytest.approx(-1.0)
    assert row.compute_saved_with_parent == pytest.approx(-3.0)
    assert nats(row.average_above_baseline) == pytest.approx(1.0)


def test_a_corpus_that_nobody_measured_is_named(tmp_path: Path) -> None:
    base = write_run(tmp_path, Plan("base", {"old": (8.0, 4.5)}, [Draw("old", 1.0)], TOKENS, RATES))
    lineage = next(base.folder.rglob("lineage.json"))
    data = json.loads(lineage.read_text(encoding="utf-8"))
    data["stages"][0]["sources"].append({**data["stages"][0]["sources"][0], "name": "lost", "fingerprint": "f" * 64})
    lineage.write_text(json.dumps(data), encoding="utf-8")
    comparison = compare([base.folder])
    assert any("No run was evaluated on lost" in note for note in comparison.notes)


def test_the_mean_counts_every_corpus_the_same() -> None:
    assert mean([Loss(1.0, 2.0, 10, 10), Loss(3.0, None, 1000, 1000)]) == Loss(2.0, None)
    assert mean([]) is None


# Bad input


def test_bad_folders(tmp_path: Path, runs: dict[str, Written]) -> None:
    with pytest.raises(UserError, match="at least one"):
        compare([])
    with pytest.raises(UserError, match="no such folder"):
        compare([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"no run folder \(events.jsonl is missing\)"):
        compare([tmp_path])
    checkpoint = runs["c"].parent["path"]
    with pytest.raises(UserError, match="not a checkpoint inside it"):
        compare([checkpoint])
    with pytest.raises(UserError, match="given twice"):
        compare([runs["c"].folder, runs["c"].folder / "." / ".." / "c"])


def test_broken_files_are_named(tmp_path: Path) -> None:
    base = base_run(tmp_path, old=4.5)
    events = base.folder / "events.jsonl"
    whole = events.read_text(encoding="utf-8")
    events.write_text(whole.replace('"event": "stage"', '"event: "stage"', 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"events.jsonl: line 2:"):
        compare([base.folder])
    events.write_text(whole, encoding="utf-8")
    next(base.folder.rglob("lineage.json")).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"lineage.json: not a readable lineage"):
        compare([base.folder])


def test_labels(tmp_path: Path, runs: dict[str, Written]) -> None:
    folders = [runs["a"].folder, runs["b"].folder]
    with pytest.raises(UserError, match="1 labels for 2 run folders"):
        compare(folders, labels=["x"])
    with pytest.raises(UserError, match="must differ"):
        compare(folders, labels=["x", "x"])
    twin = base_run(tmp_path / "one", old=4.5), base_run(tmp_path / "two", old=4.6)
    assert [row.label for row in compare([t.folder for t in twin]).rows] == ["one/base", "two/base"]


# Interruptions


def test_a_resumed_run_counts_each_position_once(tmp_path: Path) -> None:
    base = base_run(tmp_path, old=4.5)
    path = base.folder / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    train = [line for line in lines if '"event": "train"' in line]
    spike = json.dumps({"event": "spike", "tokens": 30 * BATCH, "loss": "nan", "expected": 4.6})
    back = json.dumps({"event": "rollback", "tokens": 20 * BATCH, "skipped_rows": [320, 496]})
    middle = lines.index(train[29]) + 1
    again = [line for line in lines[:middle] if json.loads(line).get("tokens", 0) > 20 * BATCH]
    path.write_text("\n".join([*lines[:middle], spike, back, *again, *lines[middle:]]) + "\n", encoding="utf-8")
    run = read_run(base.folder)
    assert [event["event"] for event in run.incidents] == ["spike", "rollback"]
    assert len(run.training["tokens"]) == 40
    assert (run.training["tokens"][1:] > run.training["tokens"][:-1]).all()
