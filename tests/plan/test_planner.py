"""The planner without files: budgets, laws through small runs, sizes, and what is chosen from them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perennial.core.errors import UserError
from perennial.evals.shift import Shift
from perennial.model.config import ModelConfig
from perennial.model.cost import flops_per_token
from perennial.plan import published
from perennial.plan.budgets import Budget, read_budget
from perennial.plan.calibration import (
    Calibration,
    MeasuredRun,
    MeasuredSpeed,
    best_peak,
    mismatches,
    read,
    write,
)
from perennial.plan.devices import cpu, find, measured
from perennial.plan.new_models import by_published_law, ranked, read_sizes, sizes_of
from perennial.plan.parts import Choice, Draft, Drafter, Facts, Stage, Text
from perennial.plan.planner import make_plan, replace_option
from perennial.plan.small_copies import copies, runs
from perennial.plan.sources import growth
from perennial.plan.transfer import RunRow, fit_runs
from perennial.plan.words import header, to_text

# Budgets


@pytest.mark.parametrize(
    ("text", "flops", "device", "count"),
    [
        ("20B tokens", 20e9 * 6e9, "cpu", 1),
        ("3e20 FLOPs", 3e20, "cpu", 1),
        ("8 h on 1 x H200", 8 * 3600 * 0.4 * 989e12, "H200", 1),
        ("8 h on 4 x a100-40gb", 4 * 8 * 3600 * 0.4 * 312e12, "A100-40GB", 4),
        ("$500 at $2.5/h", 200 * 3600 * 0.4 * 989e12, "H100", 1),
        ("$500 at $2.5/h on 8 x H100", 200 * 3600 * 0.4 * 989e12, "H100", 8),
        ("$1k on NVIDIA H200 at $3/h", 1000 / 3 * 3600 * 0.4 * 989e12, "H200", 1),
    ],
)
def test_budgets(text: str, flops: float, device: str, count: int) -> None:
    found = read_budget(text, here=cpu())
    assert found.flops(6e9) == pytest.approx(flops)
    assert (found.device.name, found.count) == (device, count)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8 h on 4 x H20", "Did you mean 'H200'?"),
        ("$500", "what does one device cost per hour?"),
        ("500 USD on 8 x H100", "write '500 USD at $2.5/h'"),
        ("8 h at $3/h", "a price per hour belongs to money"),
        ("3 parsecs", "not understood; write it like"),
        ("5%", "not understood; write it like"),
        ("0 tokens", "must be above 0"),
        ("8 h on 0 x H100", "at least 1 device"),
    ],
)
def test_wrong_budgets(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("?", r"\?").replace("$", r"\$").replace("'", "'")):
        read_budget(text, here=cpu())


def test_a_device_says_where_its_numbers_are_from() -> None:
    for name in ("H200", "cpu", "RTX-4090"):
        assert find(name).source
    assert find("h200", 0.5).flops_per_second == pytest.approx(0.5 * 989e12)
    assert "measured" in measured(1e11, "measured here").mfu_source
    assert "MFU 0.4" in read_budget("1 h on H200", here=cpu()).notes()[0]


# Laws through small runs


def truth(side: str, row: RunRow) -> float:
    """Losses of a made-up world."""
    size, tokens = row.flops_per_token / 6e6, row.tokens / 3e5
    if side == "new":
        return 1.5 + 1.6 * size**-0.3 * (tokens * (1 - row.share)) ** -0.35
    kept = ((row.share + 4e-4) / (1 + 4e-4)) ** -0.1 * (row.tokens / row.parent_tokens) ** 0.1
    return 1.6 + (row.old_before - 1.6) * 1.02 * kept


def small_runs(side: str, *, noise: float = 0.003, seed: int = 0) -> list[RunRow]:
    generator = np.random.default_rng(seed)
    places = [(3e5, 1.8e5, share) for share in (0.0, 0.01, 0.05, 0.25, 0.5)]
    places += [(3e5, 3.6e5, 0.05), *((6e5, 3.6e5, share) for share in (0.0, 0.05, 0.5))]
    rows = []
    for size, tokens, share in places:
        past = 2e5 * size / 3e5
        row = RunRow(6 * size, tokens, share, past, 1.6 + 3.2 * (size / 1e6) ** -0.2 * (past / 3e5) ** -0.3)
        rows.append(replace(row, loss=truth(side, row) * (1 + noise * generator.standard_normal())))
    return rows


def larger(share: float, scale: float = 1.0) -> RunRow:
    return RunRow(6 * 1.3e6, 8e5 * scale, share, 8e5, 4.5)


@pytest.mark.parametrize("side", ["new", "old"])
@pytest.mark.parametrize("seed", range(5))
def test_small_runs_foretell_a_larger_one(side: Any, seed: int) -> None:
    law = fit_runs(side, small_runs(side, seed=seed))
    for share in (0.0, 0.01, 0.05, 0.25, 0.5):
        row = larger(share)
        off = {0.0: 0.05, 0.01: 0.03}.get(share, 0.02)  # where replay begins to tell is the hardest
        assert law.predict(row).mean == pytest.approx(truth(side, row), rel=off)
    assert law.times_outside(row) == pytest.approx(1.3e6 * 8e5 / (6e5 * 3.6e5))


@pytest.mark.parametrize("drift", [0, 1])
@pytest.mark.parametrize("onset", [2e-6, 4e-4, 4e-3])
def test_the_smallest_shares_are_told_wherever_replay_begins_to_tell(onset: float, drift: int) -> None:
    """Measured: in a line with the logarithm of the share from 1e-6 on; or from a number of replayed tokens on (drift
    1), a share that is smaller in a longer update. Runs that cannot tell which leave 2% at a share of 0.
    """

    def loss(row: RunRow) -> float:
        begins = onset * (2e5 / row.tokens) ** drift
        return 1.6 + (row.old_before - 1.6) * 1.13 * ((row.share + begins) / 0.05) ** -0.06

    rows = [replace(row, loss=loss(row)) for row in small_runs("old", noise=0.0)]
    law = fit_runs("old", rows)
    for share in (0.0, 0.01, 0.05, 0.25, 0.5):
        off = 0.015 if share else 0.025
        assert law.predict(larger(share)).mean == pytest.approx(loss(larger(share)), rel=off)


@pytest.mark.parametrize("side", ["new", "old"])
def test_intervals_hold_the_truth_and_grow_with_the_distance(side: Any) -> None:
    inside, widths = 0, []
    for seed in range(12):
        law = fit_runs(side, small_runs(side, seed=seed))
        row = larger(0.05)
        found = law.predict(row)
        inside += found.low <= truth(side, row) <= found.high
        far = law.predict(larger(0.05, 1e4))
        widths.append((found.high - found.low) / found.mean)
        assert far.high - far.low > found.high - found.low
    assert inside >= 9
    assert max(widths) < 0.1


def test_runs_move_the_prior() -> None:
    one = fit_runs("new", small_runs("new")[:1]).predict(larger(0.05))
    all_of_them = fit_runs("new", small_runs("new")).predict(larger(0.05))
    assert one.high - one.low > 2 * (all_of_them.high - all_of_them.low)


def test_the_order_of_runs_does_not_matter() -> None:
    rows = small_runs("old")
    first, second = (fit_runs("old", order).predict(larger(0.25)) for order in (rows, rows[::-1]))
    assert first.mean == pytest.approx(second.mean, rel=1e-5)


# Published priors


def test_published_curves_are_as_in_the_paper() -> None:
    assert published.forgetting(0.0, "strong").mean == pytest.approx(1.39 / 2.17, abs=1e-3)
    assert published.forgetting(0.05, "weak").mean == pytest.approx(0.06 / 2.17, abs=1e-3)
    unknown = published.forgetting(0.05, "unknown")
    assert (
        unknown.low < published.forgetting(0.05, "weak").mean < published.forgetting(0.05, "strong").mean < unknown.high
    )
    assert published.cost_of_replay(0.0, "strong").mean == 0
    values = [published.forgetting(share, "strong").mean for share in (0, 0.005, 0.02, 0.07, 0.3, 0.5, 0.9)]
    assert values == sorted(values, reverse=True)


def test_epochs_are_worth_less_and_less() -> None:
    assert published.value_of_epochs(0.5) == 0.5
    assert published.value_of_epochs(4) == pytest.approx(3.73, abs=0.01)
    assert published.value_of_epochs(44) == pytest.approx(15.4, abs=0.1)


# Small copies


def test_copies_keep_proportions_and_the_limit() -> None:
    config = ModelConfig.from_preset("1m", 4096)
    whole = float(flops_per_token(config, 128))
    small, large = copies(config, length=128, past=8e5, tokens=8e5, flops=1e18)
    assert small.flops_per_token / whole == pytest.approx(0.24, rel=0.2)
    assert large.flops_per_token / whole == pytest.approx(0.48, rel=0.2)
    assert (large.tokens, large.parent_tokens) == pytest.approx((0.48 * 8e5, 0.48 * 8e5))
    assert 4 < whole * 8e5 / (large.flops_per_token * large.tokens) < 8
    for flops in (1e12, 1e13):
        kept = copies(config, length=128, past=8e5, tokens=8e5, flops=flops)
        sizes = {0: kept[0], 1: kept[1]}
        spent = sum(c.flops_per_token * c.parent_tokens for c in kept)
        spent += sum(sizes[r.copy].flops_per_token * r.tokens * sizes[r.copy].tokens for r in runs())
        assert spent < 1.3 * flops


def test_copies_of_a_large_model_are_models_still() -> None:
    config = ModelConfig.from_preset("8b", 32000)
    small, large = copies(config, length=512, past=1e12, tokens=1e9, flops=5e13)
    assert small.config.width >= 48
    assert large.flops_per_token > 1.3 * small.flops_per_token
    assert small.parent_tokens == 4 * small.tokens


# Calibrations


def measured_run(row: RunRow, kind: Any, name: str, **losses: float) -> MeasuredRun:
    return MeasuredRun(
        name=name,
        kind=kind,
        parameters=round(row.flops_per_token / 6),
        flops_per_token=row.flops_per_token,
        tokens=row.tokens,
        share=row.share,
        parent_tokens=row.parent_tokens,
        old_before=row.old_before,
        seconds=10.0,
        tokens_per_second=1e4,
        **losses,
    )


def calibrated(noise: float = 0.0) -> Calibration:
    """A calibration of the made-up world, with a rate sweep that is best at 1.41 times the rule's peak."""
    runs = [
        measured_run(new, "update", f"run{i}", new=new.loss, old=old.loss)
        for i, (new, old) in enumerate(zip(small_runs("new", noise=noise), small_runs("old", noise=noise), strict=True))
    ]
    usual = runs[2]
    assert usual.new
    assert usual.old
    for factor in (0.5, 2.0):
        off = 0.02 * (math.log2(factor) ** 2 - math.log2(factor))
        changed = {"new": usual.new * (1 + off), "old": usual.old * (1 + off)}
        runs.append(usual.model_copy(update={"kind": "rate", "peak_factor": factor, "name": f"p{factor}", **changed}))
    speed = MeasuredSpeed(
        flops_per_second=8e10,
        parameters=1_300_000,
        threads=1,
        precision="fp32",
        memory_bytes=4e8,
        planned_memory_bytes=4e8,
    )
    return Calibration(
        checkpoint="c" * 16,
        corpora={"old": "a", "new": "b"},
        continuation="rewarm",
        shift=Shift(2.0, 4.5),
        old_before=4.5,
        runs=runs,
        speed=speed,
        noise_batch_tokens=1e3,
    )


def test_a_calibration_comes_back_as_it_was(tmp_path: Path) -> None:
    found = calibrated()
    write(found, tmp_path / "c.json")
    assert read(tmp_path / "c.json") == found
    assert mismatches(found, "c" * 16, {"x": "b"}, "rewarm") == []
    assert len(mismatches(found, "d", {"x": "other"}, "wsd")) == 3


def test_wrong_calibration_files(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="not a calibration"):
        read(path)
    text = calibrated().model_dump_json().replace('"format":1', '"format":7')
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="format 7; this version of Perennial reads format 1"):
        read(path)


def test_the_best_peak_of_a_sweep() -> None:
    found = best_peak(calibrated())
    assert found is not None
    assert found.factor == pytest.approx(math.sqrt(2), rel=0.02)
    assert found.new_ratio < 1
    flat = calibrated()
    runs = [r.model_copy(update={"new": r.new, "old": r.old}) for r in flat.runs]
    usual = runs[2]
    same = [r.model_copy(update={"new": usual.new, "old": usual.old}) if r.kind == "rate" else r for r in runs]
    nothing = best_peak(flat.model_copy(update={"runs": same}))
    assert nothing is not None
    assert nothing.factor == 1.0


# Plans


def facts(**changes: Any) -> Facts:
    given: dict[str, Any] = {
        "model": "base",
        "parameters": 1_300_000,
        "flops_per_token": 6 * 1.3e6,
        "texts": (Text("new", 4e6, False, "manifest"), Text("old", 4e6, True, "manifest")),
        "parent_tokens": 8e5,
        "parent_flops": 8e5 * 6 * 1.3e6,
        "past_is_estimate": False,
        "old_losses": {"old": 4.5},
        "batch_tokens": 2048,
        "checkpoint": "c" * 16,
        "fingerprints": {"old": "a", "new": "b"},
    }
    return Facts(**{**given, **changes})


def drafter(facts: Facts, seen: list[Choice]) -> Drafter:
    """Drafts that do what is asked for."""

    def draft(choice: Choice) -> Draft:
        seen.append(choice)
        updates = math.ceil(choice.tokens / facts.batch_tokens)
        tokens, share = updates * facts.batch_tokens, 0.05 if choice.share is None else choice.share
        drawn = {"new": tokens * (1 - share), "replay": tokens * share}
        stage = Stage(
            name="update",
            tokens=tokens,
            updates=updates,
            schedule="rewarm",
            warmup_tokens=0.01 * tokens,
            rate_start=1e-3,
            rate_peak=1e-2 * choice.peak_factor,
            rate_end=1e-3,
            optimizer="adamw",
            weight_decay=0.1,
            epochs={"new": drawn["new"] / 4e6, "replay": drawn["replay"] / 4e6},
            drawn=drawn,
        )
        return Draft(
            recipe={"name": "planned"},
            header="# why\n",
            command=f"perennial continue base --data new=n --tokens '{tokens} tokens' --replay {share:.0%}",
            reasons=("replay: chosen", "batch: as before"),
            continuation="rewarm",
            share=share,
            share_reason="replay: chosen",
            peak_reason="peak: by the budget",
            stages=(stage,),
            flops=tokens * facts.flops_per_token,
            batch="16 x 128 = 2048 tokens",
            evaluated_tokens=1e5,
            memory_bytes=1 << 28,
            memory_fits=True,
        )

    return draft


def budget(text: str = "800K tokens") -> Budget:
    return read_budget(text, here=measured(8e10, "measured here"))


def test_a_plan_by_own_runs() -> None:
    seen: list[Choice] = []
    known = facts()
    plan = make_plan(known, budget(), drafter(known, seen), calibration=calibrated(), kind="strong", with_energy=True)
    right = {s: (truth("new", larger(s)) + truth("old", larger(s))) / 2 for s in published.SHARES}
    assert plan.best_share == seen[0].share == min(right, key=lambda s: right[s])
    assert seen[0].peak_factor == pytest.approx(1.41, abs=0.03)
    kinds = {number.name: number.kind for number in plan.numbers}
    assert (
        kinds["share of old text"]
        == kinds["new loss"]
        == kinds["old loss"]
        == kinds["peak learning rate"]
        == "own runs"
    )
    assert kinds["time"] == "own runs"
    assert all(number.source for number in plan.numbers)
    assert plan.cost.hours * 3600 == pytest.approx((plan.draft.tokens + 1e5 / 3) * 7.8e6 / 8e10)
    assert plan.cost.energy_kwh
    assert plan.retraining.tokens == pytest.approx(8e5 + plan.draft.tokens)
    assert len(plan.alternatives) >= 2
    assert not plan.unknown
    text = to_text(plan)
    for words in (
        "<- lowest mean",
        "Alternatives",
        "Retraining on everything",
        "own runs: law through your own 9 runs",
    ):
        assert words in text
    assert all(line.startswith("#") for line in header(plan).splitlines())
    assert plan.to_json()["curve"][0]["share"] == 0


def test_a_plan_without_own_runs_says_what_it_cannot_know() -> None:
    known = facts()
    plan = make_plan(known, budget(), drafter(known, []))
    assert plan.outlook.new is None
    assert plan.outlook.old is not None
    assert plan.outlook.old.high - plan.outlook.old.low > 0.3
    assert plan.best_share is None
    assert any("cannot know" in line and "no calibration" in line for line in plan.unknown)
    assert any("shift" in line for line in plan.unknown)
    kinds = {number.name: number.kind for number in plan.numbers}
    assert (kinds["new loss"], kinds["old loss"], kinds["share of old text"]) == ("unknown", "published", "published")
    bare = make_plan(facts(old_losses={}), budget(), drafter(known, []))
    assert bare.outlook.old is None
    assert bare.outlook.old_change is not None
    assert "parent +" in to_text(bare)


def test_own_runs_far_too_small_are_not_asked() -> None:
    known = facts(flops_per_token=6e9, texts=(Text("new", 4e10, False, "m"), Text("old", 4e10, True, "m")))
    plan = make_plan(known, budget("1B tokens"), drafter(known, []), calibration=calibrated())
    assert plan.outlook.new is None
    assert any("times smaller" in line for line in plan.unknown)


def test_one_run_only() -> None:
    alone = calibrated().model_copy(update={"runs": calibrated().runs[:1]})
    plan = make_plan(facts(), budget(), drafter(facts(), []), calibration=alone)
    assert any("one run only" in line for line in plan.unknown)
    assert plan.draft.tokens > 0


def test_old_text_that_is_not_found_is_told() -> None:
    lost = facts(texts=(Text("new", 4e6, False, "manifest"),))
    assert any("no old text was found" in line for line in make_plan(lost, budget(), drafter(lost, [])).warnings)
    known = facts()
    assert not any("no old text" in line for line in make_plan(known, budget(), drafter(known, [])).warnings)


def test_too_many_passes_are_not_planned() -> None:
    known = facts(texts=(Text("new", 1e5, False, "manifest"), Text("old", 4e6, True, "manifest")))
    plan = make_plan(known, budget("800M tokens"), drafter(known, []), share=0.25)
    assert plan.draft.tokens == pytest.approx(16 * 1e5 / 0.75, rel=0.01)
    assert any("worth nothing" in line for line in plan.warnings)
    sources = {number.name: (number.kind, number.source) for number in plan.numbers}
    assert sources["tokens"][0] == "published"
    assert sources["tokens"][1].startswith("16 passes over the new text; '800M tokens' pays for more")
    few = make_plan(known, budget("800K tokens"), drafter(known, []), share=0.0)
    assert {number.name: number.kind for number in few.numbers}["tokens"] == "given"
    assert few.draft.tokens == pytest.approx(8e5, rel=0.01)
    assert any("8.0 passes over the new text" in line for line in few.warnings)


def test_a_share_that_the_old_text_bounds_is_not_called_asked_for() -> None:
    known = facts(texts=(Text("new", 4e6, False, "manifest"), Text("old", 3e3, True, "manifest")))
    plan = make_plan(known, budget(), drafter(known, []))
    (share,) = (number for number in plan.numbers if number.name == "share of old text")
    assert share.kind == "published"
    assert share.source.startswith("what the model has seen, read 4 times: more was not worth it")


@pytest.mark.parametrize(
    ("changes", "text", "words"),
    [
        ({}, "2000 tokens", "less than one update of 2048 tokens"),
        ({"texts": (Text("new", 1e3, False, "manifest"),)}, "1M tokens", "corpus 'new': 1K tokens"),
    ],
)
def test_too_little(changes: dict[str, Any], text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_plan(facts(**changes), budget(text), drafter(facts(), []))


def test_growth_is_said_and_explained() -> None:
    assert growth(facts(), 8e5).startswith("grow: no")
    assert growth(facts(parent_tokens=1e9), 8e5).startswith("grow: yes")


def test_an_option_of_a_command() -> None:
    command = "perennial continue c --replay old=p --replay 5% --tokens '1 tokens'"
    assert replace_option(command, "--replay", "0.25") == command.replace("5%", "25%")
    assert replace_option(command, "--tokens", "2 tokens").endswith("--tokens '2 tokens'")
    assert replace_option("a --replay x=y", "--replay", "0.01").endswith("--replay x=y --replay 1%")


# New models


def test_the_size_follows_from_the_budget() -> None:
    def best(text: str, unique: float = 1e12) -> str:
        spent = read_budget(text, here=cpu())
        sizes = sizes_of(read_sizes(None), 32000, spent)
        return ranked(sizes, unique, by_published_law, spent, 128.0)[0].size.name

    order = list(read_sizes(None))
    small, large = best("1e17 FLOPs"), best("1e21 FLOPs")
    assert order.index(small) < order.index(large)
    assert order.index(best("1e21 FLOPs", 1e9)) <= order.index(large) + 1
    assert best("2B tokens") in ("50m", "124m")


def test_wrong_sizes() -> None:
    spent = read_budget("1e8 FLOPs", here=cpu())
    with pytest.raises(UserError, match="a new model needs sizes"):
        read_sizes(" , ")
    with pytest.raises(UserError, match="Did you mean"):
        sizes_of(["11m"], 512, spent)
    with pytest.raises(UserError, match="less than one update"):
        ranked(sizes_of(["1m"], 512, spent), 1e6, by_published_law, spent, 128.0)
