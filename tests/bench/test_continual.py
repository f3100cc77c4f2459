"""The continual-learning experiment: text, grid, checks and records, on synthetic corpora and hand-made numbers."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perennial.bench import continual_text
from perennial.bench.continual import Experiment, run_experiment
from perennial.bench.continual_checks import FAIL, NOT_JUDGED, NOT_RUN, PASS, Check, all_checks, judged
from perennial.bench.continual_grid import BUSY, EVENTS, FREE, WAITING, Grid, Node, lock, needed, nodes_of
from perennial.bench.continual_measures import Measured, Results
from perennial.bench.continual_plan import pair_runs, stream_runs
from perennial.bench.continual_runs import Scale, recipe
from perennial.bench.continual_summary import checks_text, summary_text
from perennial.bench.continual_text import Reading, fullest_years, half_of, own_shift, prepare_shift, standard_shifts
from perennial.cli.main import main
from perennial.core.errors import UserError
from perennial.core.statistics import mean_interval
from perennial.report.continual import render
from perennial.train.recipe import parse_recipe

WORDS = {"aa": "tree house river stone walks sees the a", "bb": "baum haus fluss geht sieht der ein"}
SCALE = Scale("1m", 4096, 1e-2, 0, evaluation_tokens=512)


def texts(folder: Path) -> Path:
    """Two small corpora of JSON lines with titles and years."""
    draw = random.Random(0)
    for name, words in WORDS.items():
        lines = []
        for number in range(120):
            text = " ".join(draw.choice(words.split()) + str(draw.randrange(30)) for _ in range(60))
            lines.append(json.dumps({"text": text, "title": f"title {number % 30}", "year": 2000 + number % 7}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def work(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


READING = Reading(vocabulary_size=280, validation="20%")


def experiment(corpora: Path, work: Path, **changes: Any) -> Experiment:
    """A base, a union run and two continuations of one update each, by default."""
    settings = {"checks": ("e",), "seeds": (0,), "tokens": 2048, "peak": 1e-2, "evaluation_tokens": 256}
    shifts = standard_shifts(corpora, ["aa:bb"])
    return Experiment(shifts=shifts, work=work, reading=READING, quiet=True, **{**settings, **changes})


# Text


def test_halves_and_years_cut_a_corpus_into_parts_without_common_titles(corpora: Path, tmp_path: Path) -> None:
    halves = prepare_shift(standard_shifts(corpora, ["aa:halves"])[0], tmp_path, READING, say=_quiet, quiet=True)
    stream = prepare_shift(standard_shifts(corpora, ["aa:years"])[0], tmp_path, READING, say=_quiet, quiet=True)
    titles = [
        {json.loads(line)["title"] for line in (tmp_path / "text" / f"aa_{part}.jsonl").read_text().splitlines()}
        for part in "ab"
    ]
    assert titles[0]
    assert titles[1]
    assert not titles[0] & titles[1]
    assert all(half_of(title) == 0 for title in titles[0])
    assert list(halves.corpora) == ["aa_a", "aa_b"]
    assert min(halves.train_tokens.values()) > 0
    assert list(stream.corpora) == [f"aa_{year}" for year in range(2000, 2006)]


def test_the_stream_takes_the_years_whose_leanest_holds_most() -> None:
    sizes = {2000: 9, 2001: 1, 2002: 5, 2003: 6, 2004: 5, 2005: 8, 2007: 100}
    assert fullest_years(sizes, 3) == [2003, 2004, 2005]
    with pytest.raises(UserError, match="4 years in a row"):
        fullest_years({2000: 1, 2001: 1, 2003: 1}, 4)


def test_what_is_wrong_with_a_shift_is_said(corpora: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no corpus 'cc'"):
        standard_shifts(corpora, ["aa:cc"])
    with pytest.raises(UserError, match="OLD:NEW"):
        standard_shifts(corpora, ["aa"])
    with pytest.raises(UserError, match="no such folder"):
        standard_shifts(tmp_path / "nothing")
    with pytest.raises(UserError, match="--new"):
        own_shift(corpora / "aa.jsonl", tmp_path / "nothing.txt")
    with pytest.raises(UserError, match="are both"):
        own_shift(corpora / "aa.jsonl", corpora / "aa.jsonl")
    (tmp_path / "plain.txt").write_text("one text\n" * 100)
    shift = continual_text.Shift("x", (continual_text.Piece("x", tmp_path / "plain.txt", "years"),), "stream")
    with pytest.raises(UserError, match="field 'year'"):
        prepare_shift(shift, tmp_path, READING, say=_quiet, quiet=True)


def _quiet(text: str) -> None:
    pass


# The grid


def fake_nodes(folder: Path, runs: list[Any], scale: Scale = SCALE) -> dict[str, Node]:
    """Nodes over corpora that are not there but for their fingerprints."""
    paths = {}
    for name in ("old", "new", "newer"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "manifest.json").write_text(json.dumps({"fingerprint": f"of {name}"}))
        paths[name] = folder / name
    return nodes_of(runs, scale, "old-new", paths, folder)


def test_every_run_is_a_valid_recipe_and_parents_come_first(tmp_path: Path) -> None:
    for runs in (pair_runs(["old", "new"], SCALE), stream_runs(["old", "new", "newer"], SCALE)):
        names: set[str] = set()
        for run in runs:
            assert run.name not in names
            assert run.parent is None or run.parent in names
            names.add(run.name)
            if run.choices is None:
                data = recipe(run, SCALE, {"old": "a", "new": "b", "newer": "c"}, "parent" if run.parent else None)
                parse_recipe(data)
        assert len({node.folder for node in fake_nodes(tmp_path, runs).values()}) == len(runs)


def test_both_sides_of_every_comparison_get_the_same_tokens() -> None:
    runs = {run.name: run for run in pair_runs(["old", "new"], Scale("1m", 400_000, 1e-2, 0))}
    assert runs["union"].tokens == 2 * runs["base"].tokens
    assert runs["cycles"].tokens + runs["base"].tokens == runs["infinite"].tokens
    assert {runs[f"replay-{r}"].tokens for r in (0, 1, 5, 25, 50)} == {runs["base"].tokens, runs["scratch"].tokens}
    stream = {run.name: run for run in stream_runs(["a", "b", "c"], Scale("1m", 400_000, 1e-2, 0))}
    assert stream["union"].tokens == 3 * stream["base"].tokens


def test_a_key_depends_on_what_decides_the_run_and_on_its_parents_key(tmp_path: Path) -> None:
    runs = pair_runs(["old", "new"], SCALE)
    first = fake_nodes(tmp_path, runs)
    assert first["replay-5"].key == fake_nodes(tmp_path, runs)["replay-5"].key
    other = replace(SCALE, peak=2e-2)
    changed = fake_nodes(tmp_path, pair_runs(["old", "new"], other), other)
    assert all(first[name].key != changed[name].key for name in first)


def test_a_check_needs_its_runs_and_their_ancestors(tmp_path: Path) -> None:
    nodes = list(fake_nodes(tmp_path, pair_runs(["old", "new"], SCALE)).values())
    assert {node.run.name for node in needed(nodes, ["d"])} == {"base", "replay-0", "scratch"}
    assert {node.run.name for node in needed(nodes, ["i"])} == {"base", "cycles", "infinite"}


def test_a_lock_keeps_a_second_process_out_and_goes_with_its_holder(tmp_path: Path) -> None:
    nodes = fake_nodes(tmp_path, pair_runs(["old", "new"], SCALE))
    grid = Grid(list(nodes.values()), tmp_path, quiet=True, say=_quiet)
    folder = nodes["base"].folder
    assert grid.state(nodes["base"]) == FREE
    assert grid.state(nodes["replay-0"]) == WAITING
    script = (
        "import sys, pathlib\nfrom perennial.bench.continual_grid import lock\n"
        "with lock(pathlib.Path(sys.argv[1])) as mine:\n    print(mine, flush=True)\n    sys.stdin.read()\n"
    )
    if os.name != "posix":
        pytest.skip("locks are those of POSIX")
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        assert grid.state(nodes["base"]) == BUSY
        with lock(folder) as mine:
            assert not mine
        other.kill()
        other.wait()
        assert grid.state(nodes["base"]) == FREE


def test_the_grid_is_worked_off_resumes_and_repeats_nothing(corpora: Path, work: Path, tmp_path: Path) -> None:
    known = run_experiment(experiment(corpora, work, minutes=0.0), say=_quiet)
    assert not known.complete
    assert known.manifest["done"] == 0
    outcome = run_experiment(experiment(corpora, work), say=_quiet)
    assert outcome.complete
    assert {node.run.name for node in outcome.nodes} == {"base", "union", "replay-5", "replay-25"}
    times = {node.folder: (node.folder / EVENTS).stat().st_mtime_ns for node in outcome.nodes}

    # As if it had been killed in the middle of its last run.
    killed = outcome.nodes[-1].folder / EVENTS
    killed.write_bytes(killed.read_bytes()[:-20])
    assert run_experiment(experiment(corpora, work, only_list=True), say=_quiet).manifest["done"] == 3
    again = run_experiment(experiment(corpora, work), say=_quiet)
    assert again.complete
    after = {node.folder: (node.folder / EVENTS).stat().st_mtime_ns for node in again.nodes}
    assert {folder for folder in times if times[folder] != after[folder]} == {killed.parent}

    (check,) = [c for c in again.checks if c.letter == "e"]
    assert check.verdict in (PASS, FAIL)
    assert check.effect is not None
    assert check.effect.count == 1
    again.keep(tmp_path)
    (record,) = (tmp_path / "aa-bb" / "1m" / "seed0").glob("union-*")
    events = gzip.decompress((record / f"{EVENTS}.gz").read_bytes()).decode()
    assert '"event": "done"' in events
    assert str(work) not in events + (record / "resolved.json").read_text()
    assert json.loads((tmp_path / "verdicts.json").read_text())["manifest"]["done"] == 4
    page = render(again.to_json())
    assert "retrained on everything" in page
    assert "<svg" in page
    assert "http" not in page.split("</style>")[1]


def test_the_peak_is_tuned_on_the_baseline_before_anything_else(corpora: Path, work: Path) -> None:
    settings = experiment(corpora, work, checks=("e",), peak=None, peaks=(1e-2, 1e-9))
    outcome = run_experiment(settings, say=_quiet)
    found = outcome.peaks["aa-bb, 1m"]
    assert found["peak"] == 1e-2
    assert set(found["tried"]) == {1e-2, 1e-9}
    assert outcome.complete
    assert outcome.manifest["done"] == 4


def test_a_run_that_is_refused_stops_only_its_children(corpora: Path, work: Path) -> None:
    outcome = run_experiment(experiment(corpora, work, tokens=40_000_000), say=_quiet)
    assert not outcome.complete
    assert {run["state"] for run in outcome.manifest["runs"]} == {"failed"}


def test_the_command_lists_and_refuses(corpora: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "bench",
        "continual",
        "--corpora",
        str(corpora),
        "--shifts",
        "aa:bb",
        "--work",
        str(work),
        "--peak",
        "1e-2",
    ]
    small = ["--vocabulary-size", "280", "--tokens", "4096 tokens", "--seeds", "1"]
    for wrong, word in (
        (["--checks", "z"], "--checks z"),
        (["--old", "x"], "--corpora FOLDER"),
        (["--tokens", "5"], "--tokens"),
        (["--seeds", "0"], "--seeds 0"),
        (["--sizes", "1x"], "1x"),
    ):
        assert main([*asked, *wrong]) == 2
        assert word in capsys.readouterr().err
    assert main([*asked, *small, "--work", str(work / "other"), "--list", "--checks", "d"]) == 0
    assert "0 of 3 done" in capsys.readouterr().out


# Checks, from numbers made by hand


def measured(name: str, old: float, new: float, seed: int = 0, **changes: Any) -> Measured:
    """A run that ended at these losses."""
    after = {"old": old, "new": new}
    settings: dict[str, Any] = {
        "before": {},
        "curve": [(0, {"old": 5.0, "new": 7.0}), (100, after)],
        "bits_per_byte": after,
        "tokens": 25_600,
        "flops": 100.0,
        "seconds": 1.0,
        "stage_ends": [after],
        **changes,
    }
    return Measured(name, seed, after=after, **settings)


LADDER = {"replay-0": (6.0, 3.0), "replay-1": (5.4, 3.0), "replay-5": (5.2, 3.01), "replay-25": (5.1, 3.1)}


def results(kind: str = "weak", seeds: int = 3, **runs: tuple[float, float]) -> Results:
    """Runs whose losses differ a little from seed to seed, together."""
    every = {"base": (5.0, 7.0), "replay-50": (5.0, 3.2), "union": (5.1, 3.1), "scratch": (8.0, 3.1), **LADDER, **runs}
    found = {
        name: {seed: measured(name, old + 0.001 * seed, new + 0.001 * seed, seed) for seed in range(seeds)}
        for name, (old, new) in every.items()
    }
    found["union"] = {seed: replace(run, flops=200.0) for seed, run in found["union"].items()}
    return Results("old-new", kind, "1m", ("old",), ("new",), found)


def of(checks: list[Check], letter: str, words: str = "") -> Check:
    """The check of that letter whose statement has the words."""
    (check,) = [c for c in checks if c.letter == letter and words in c.statement]
    return check


def test_verdicts_follow_the_numbers() -> None:
    checks = all_checks([results()])
    removed = of(checks, "a", "1 % replay")
    assert removed.effect is not None
    assert removed.effect.estimate == pytest.approx(0.6)
    assert (removed.verdict, removed.sure) == (PASS, True)
    assert of(checks, "a", "every step").verdict == PASS
    assert of(checks, "a", " 5 % replay").verdict == PASS
    cost = of(checks, "b", "50 % replay").effect
    assert cost is not None
    assert cost.estimate == pytest.approx(0.2)
    assert of(checks, "d").verdict == PASS
    assert of(checks, "e").effect is not None
    assert of(checks, "e").verdict == PASS
    assert of(checks, "g", "early").verdict == NOT_RUN
    assert of(all_checks([results(**{"replay-1": (5.9, 3.0)})]), "a", "1 % replay").verdict == FAIL


def test_without_a_shift_nothing_is_judged_that_presumes_one() -> None:
    letters = {check.letter for check in all_checks([results("none", **{"bar-default-50": (5.0, 3.1)})])}
    assert letters == {"d", "e", "g", "i", "bar"}
    assert letters | {"a", "b", "f", "h"} == {c.letter for c in all_checks([results(**{"bar-default-50": (5.0, 3.1)})])}


def test_shares_of_the_forgetting_are_not_judged_where_a_seed_forgot_nothing() -> None:
    """Else the quotient's denominator is noise, or negative: 'fail, 0.000' of a shift that costs nothing."""
    bar = {"bar-default-50": (4.8, 3.1)}
    calm = results(**{"replay-0": (4.9, 3.0), **bar})
    checks = all_checks([calm, replace(results("strong"), shift="old-other"), replace(results(), preset="4m")])
    calm_checks = [c for c in checks if c.shift.startswith("old-new, 1m")]
    shares = [of(calm_checks, "a", " 1 %"), of(calm_checks, "a", " 5 %"), of(calm_checks, "bar", "forgets")]
    for check in (*shares, of(checks, "c"), of(checks, "j")):
        assert (check.verdict, check.sure, check.effect) == (NOT_JUDGED, False, None)
        assert check.reason == "nothing was forgotten (the old loss fell by 0.100 nats at seed 0)"
    assert of(calm_checks, "bar", "average loss").verdict == PASS
    assert of(calm_checks, "a", "every step").verdict == FAIL

    little = replace(calm, runs={**calm.runs, "replay-0": {0: measured("replay-0", 5.004, 3.0)}})
    told = of(all_checks([little]), "a", " 5 %").reason
    assert told == "nothing was forgotten (the old loss rose by only 0.004 nats)"
    assert of(all_checks([results()]), "a", " 5 %").reason == ""


def test_a_share_of_an_early_rise_is_not_judged_where_there_was_none() -> None:
    curve = [(0, {"old": 5.0, "new": 7.0}), (20, {"old": 4.9, "new": 6.0}), (100, {"old": 5.5, "new": 4.0})]
    one = results(seeds=1, **{"same-data": (5.0, 7.0)})
    one.runs["replay-0"][0] = measured("replay-0", 6.0, 3.0, curve=curve)
    check = of(all_checks([one]), "h")
    assert (check.verdict, check.reason) == (
        NOT_JUDGED,
        "there was no early rise (the old loss rose by only 0.000 nats)",
    )


def test_replay_of_less_than_a_row_is_not_judged() -> None:
    """1% of 64 rows is no row: the run is the one without replay, to the last digit."""
    tiny = results(**{"replay-1": (6.0, 3.0)})
    tiny.runs["replay-1"] = {seed: replace(run, tokens=8192) for seed, run in tiny.runs["replay-1"].items()}
    checks = all_checks([tiny])
    for check in (of(checks, "a", " 1 %"), of(checks, "a", "every step"), of(checks, "b", "smallest step")):
        assert (check.verdict, check.reason) == (NOT_JUDGED, "1% of this update is less than one row")
    assert of(checks, "a", " 5 %").verdict == PASS


def test_what_was_not_judged_is_told_with_its_reason() -> None:
    checks = [c for c in all_checks([results(**{"replay-0": (4.9, 3.0)})]) if c.letter in ("a", "d")]
    reason = "not judged: nothing was forgotten (the old loss fell by 0.100 nats at seed 0)"
    text = summary_text({}, checks, {})
    assert text.count(f"| {reason} | - |") == 2
    assert "1 pass, 1 fail, 2 not judged, 0 not run." in text
    summary = {"checks": [c.to_json() for c in checks], "tables": {}, "peaks": {}, "manifest": {"done": 0, "runs": []}}
    assert render(json.loads(json.dumps(summary))).count(reason) == 2
    assert "not judged" not in checks_text(all_checks([results()]))


def test_checks_that_were_not_run_are_one_sentence() -> None:
    checks = [c for c in all_checks([results()]) if c.letter in ("a", "g", "h")]
    lines = checks_text(checks).splitlines()
    shift = checks[0].shift
    assert [line for line in lines if NOT_RUN in line.lower()][1:] == [f"Not run: g, h ({shift})."]
    assert sum(line.startswith("| a |") for line in lines) == 3
    assert not any(line.startswith(("| g |", "| h |")) for line in lines if "early" in line)


def test_a_bar_is_the_average_over_that_of_retraining_at_its_share_of_the_compute() -> None:
    checks = all_checks([results(**{"bar-default-50": (5.0, 3.1)})])
    average, forgets = of(checks, "bar", "average loss"), of(checks, "bar", "forgets")
    assert "at 50% of its compute" in average.statement
    assert average.effect is not None
    assert average.effect.estimate == pytest.approx(8.1 / 8.2 - 1, abs=1e-4)
    assert average.verdict == PASS
    assert forgets.verdict == PASS


def test_strong_and_weak_shifts_and_sizes_are_compared_by_seed() -> None:
    strong = replace(results("strong", **{"replay-0": (9.0, 3.0)}), shift="old-other")
    larger = replace(results(**{"replay-0": (5.9, 3.0)}), preset="4m")
    checks = all_checks([strong, results(), larger])
    multiple, sizes = of(checks, "c"), of(checks, "j")
    assert multiple.effect is not None
    assert multiple.effect.estimate == pytest.approx(4.0)
    assert sizes.effect is not None
    assert sizes.effect.estimate == pytest.approx(0.9)


def test_one_seed_is_never_sure_and_a_wide_interval_neither() -> None:
    one = judged("a", "x", "y", mean_interval([1.0]), at_least=0.0, paper="")
    wide = judged("a", "x", "y", mean_interval([1.0, -0.5, 1.0]), at_least=0.0, paper="")
    clear = judged("a", "x", "y", mean_interval([-1.0, -1.1, -1.05]), at_least=0.0, paper="")
    assert (one.verdict, one.sure) == (PASS, False)
    assert (wide.verdict, wide.sure) == (PASS, False)
    assert (clear.verdict, clear.sure) == (FAIL, True)
    assert one.to_json()["interval"] == [None, None]


def test_the_spike_is_the_early_rise_and_the_area_the_mean_height() -> None:
    curve = [(0, {"old": 5.0}), (20, {"old": 5.5}), (60, {"old": 6.0}), (100, {"old": 5.2})]
    run = measured("replay-0", 5.2, 3.0, curve=curve)
    assert run.spike("old") == pytest.approx(0.5)
    assert run.area(["old"]) == pytest.approx((20 * 5.25 + 40 * 5.75 + 40 * 5.6) / 100)
