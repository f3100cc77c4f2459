"""Named ways of continuing: what each makes of a lineage, which is chosen, and that trunks, branches and stages fit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perennial.core import lineage as lineages
from perennial.core import plugins
from perennial.core.amounts import parse
from perennial.core.errors import UserError
from perennial.core.lineage import Lineage, StageRecord, newest_checkpoint
from perennial.evals.shift import Shift
from perennial.train.choosing import choose, named
from perennial.train.continuations.base import PEAK_EXPONENT, Situation, stands_on_trunk
from perennial.train.continuations.data_bound import strong_decay
from perennial.train.continuations.reuse import fallen_to
from perennial.train.continuations.wsd import decay_share
from perennial.train.continuing import continue_run, derive, starting_checkpoint
from perennial.train.recipe import parse_recipe
from perennial.train.resolve import resolve
from perennial.train.run import start

PEAK, LEFT = 1e-3, 1e-4
COSINE = {"name": "cosine", "peak": PEAK}


def record(schedule: dict[str, Any], *, rate_end: float = LEFT, tokens: int = 1_000_000, **changes: Any) -> StageRecord:
    """A stage that was trained."""
    facts: dict[str, Any] = {
        "run": "base",
        "stage": "pretrain",
        "recipe_hash": "0",
        "parent": None,
        "seed": 0,
        "tokens": tokens,
        "complete": True,
        "flops": 6.0 * tokens,
        "seconds": 60.0,
        "sequence_length": 32,
        "batch_tokens": 1000,
        "precision": "fp32",
        "schedule": schedule,
        "rate_start": 0.0,
        "rate_peak": PEAK,
        "rate_end": rate_end,
        "optimizer": {"name": "adamw"},
        "objective": {"name": "next_token"},
        "sources": [{"name": "old"}],
    }
    return StageRecord(**{**facts, **changes})


def situation(*stages: StageRecord, budget: str = "500K tokens", **changes: Any) -> Situation:
    """An update after these stages; after one cosine when there are none."""
    lineage = Lineage(checkpoint="0", stages=list(stages) or [record(COSINE)])
    facts: dict[str, Any] = {
        "lineage": lineage,
        "budget": parse(budget),
        "fresh": ("new",),
        "replay": 0.25,
        "shift": Shift(2.0, 4.0),
        "parameters": 1e6,
        "batch_tokens": 1000,
        "batch_rows": 8,
        "fresh_tokens": 1e6,
    }
    return Situation(**{**facts, **changes})


TRUNK = record({"name": "wsd", "peak": PEAK, "decay": "0%"}, rate_end=PEAK)
BRANCH = record({"name": "anneal", "start": PEAK}, rate_start=PEAK, rate_end=0.0, tokens=100_000)
CASES = [
    (name, i)
    for name in plugins.names("continuations")
    for i in range(len(plugins.load("continuations", name).EXAMPLES))
]


@pytest.mark.parametrize(("name", "index"), CASES)
@pytest.mark.parametrize("stages", [(), (TRUNK,), (TRUNK, BRANCH)], ids=["decayed", "trunk", "branch"])
def test_every_continuation_plans_a_valid_recipe_of_the_budget(
    name: str, index: int, stages: tuple[StageRecord, ...]
) -> None:
    if name in ("constant", "reuse", "denoise") and stages == (TRUNK, BRANCH):
        pytest.skip("a rate of 0 cannot be kept")
    at = situation(*stages, replay=0.2)
    _, continuation = named({"name": name, **plugins.load("continuations", name).EXAMPLES[index]}, "--recipe")
    planned = continuation.plan(at)
    assert planned.reasons
    tokens = sum(parse(stage["budget"]).value for stage in planned.stages)
    assert tokens == 500_000, "equal tokens, whatever the number of stages"
    recipe = {"name": "u", "parent": "p", "corpora": {"new": "n"}, "stages": planned.stages}
    for stage in parse_recipe(recipe).stages:
        assert sum(float(share) for share in stage.mixture.values()) == pytest.approx(1)


def test_all_names_are_listed_and_a_wrong_one_is_told() -> None:
    listed = plugins.describe("continuations")
    assert {"rewarm", "infinite", "wsd", "wsd_s", "constant", "reuse", "meta_schedule"} <= listed.keys()
    with pytest.raises(UserError, match=r"--recipe 'infinit': choose .*Did you mean 'infinite'"):
        named("infinit", "--recipe")
    with pytest.raises(UserError, match=r"--recipe wsd: decay"):
        named("{name: wsd, decay: 3 h}", "--recipe")
    assert named("{name: wsd, decay: 10%}", "--recipe")[1].model_dump()["decay"] == "10%"


def plan(name: Any, at: Situation) -> list[dict[str, Any]]:
    return named(name, "--recipe")[1].plan(at).stages


def test_rewarm_scales_its_peak_and_decays_when_there_is_nothing_to_raise() -> None:
    [stage] = plan("rewarm", situation())
    assert stage["schedule"]["peak"] == pytest.approx(PEAK * 0.5**PEAK_EXPONENT)
    assert stage["schedule"]["final"] == LEFT
    [small] = plan("rewarm", situation(budget="1000 tokens"))
    assert (small["schedule"]["peak"], small["schedule"]["final"]) == (LEFT, LEFT / 10)
    [on_trunk] = plan("rewarm", situation(TRUNK))
    assert on_trunk["schedule"]["final"] == PEAK / 10


def test_small_batches_at_first_share_one_schedule_with_whole_ones() -> None:
    small, whole = plan({"name": "rewarm", "batch_warmup": "40%"}, situation())
    [plain] = plan("rewarm", situation())
    assert (small["sequences"], whole.get("sequences")) == (4, None)
    assert [parse(stage["budget"]).value for stage in (small, whole)] == [200_000, 300_000]
    rates = [plugins.build("schedules", stage["schedule"])[0] for stage in (small, whole)]
    alone = plugins.build("schedules", {**plain["schedule"], "start": LEFT})[0]
    assert rates[0].rate(200_000, 200_000) == pytest.approx(rates[1].rate(0, 300_000))
    assert rates[1].rate(150_000, 300_000) == pytest.approx(alone.rate(350_000, 500_000))
    with pytest.raises(UserError, match="two rows or more"):
        plan({"name": "rewarm", "batch_warmup": "40%"}, situation(batch_rows=1))
    with pytest.raises(UserError, match="below 100%"):
        named("{name: rewarm, batch_warmup: 100%}", "--recipe")


def test_a_trunk_goes_on_and_its_branch_is_a_stage_of_its_own() -> None:
    for name, share in (("infinite", 0.14), ("wsd", 0.36)):  # of 500 steps
        trunk, branch = plan(name, situation(TRUNK))
        assert trunk["schedule"] == {"name": "constant", "peak": PEAK}
        assert branch["schedule"]["name"] == "anneal"
        assert parse(branch["budget"]).value == pytest.approx(share * 500_000)
        back, _ = plan(name, situation(TRUNK, BRANCH))
        assert (back["schedule"]["start"], back["schedule"]["peak"]) == ("parent", PEAK)
    trunk, _ = plan("infinite", situation())
    assert trunk["schedule"]["constant"] == pytest.approx(0.55 * PEAK * 0.5**PEAK_EXPONENT)
    assert parse(trunk["schedule"]["cooldown"]).value == pytest.approx(0.6 / 0.86)


def test_the_fewer_steps_an_update_has_the_longer_is_its_decay() -> None:
    assert [decay_share(steps) for steps in (1, 100, 400, 900, 1600, 1e6)] == [0.4, 0.4, 0.4, 0.27, 0.2, 0.2]
    assert decay_share(math.nan) == 0.2
    short = situation(TRUNK, batch_tokens=1250)  # 400 steps
    for how, share in (("wsd", 0.4), ({"name": "wsd", "decay": "10%"}, 0.1)):
        _, branch = plan(how, short)
        assert parse(branch["budget"]).value == pytest.approx(share * 500_000)


def test_wsd_s_jumps_straight_back_and_counts_cycles() -> None:
    stages = plan({"name": "wsd_s", "cycles": 2}, situation(TRUNK, BRANCH))
    assert [s["name"] for s in stages] == ["trunk-1", "anneal-1", "trunk-2", "anneal-2"]
    assert stages[0]["schedule"] == {"name": "constant", "peak": PEAK}


def test_reuse_switches_its_blend_at_a_fifth_of_the_rate() -> None:
    way = fallen_to(0.2, 0.01)
    assert 0.01 + 0.99 * (1 + math.cos(math.pi * way)) / 2 == pytest.approx(0.2)
    [one] = plan("reuse", situation())
    assert (one["schedule"]["peak"], one["schedule"]["final"]) == (LEFT, "1%")
    first, second = plan({"name": "reuse", "first_replay": "50%"}, situation())
    assert first["mixture"]["replay"] == 0.5
    assert second["mixture"]["replay"] == 0.25
    ends = [plugins.build("schedules", s["schedule"])[0] for s in (first, second)]
    assert ends[0].rate(3.0, 3.0) == pytest.approx(0.2 * LEFT, rel=1e-3)
    assert ends[0].rate(3.0, 3.0) == pytest.approx(ends[1].rate(0.0, 7.0), rel=1e-9)


def test_the_meta_schedule_falls_as_the_paper_s_does() -> None:
    shares = []
    for number in range(1, 4):
        [stage] = plan("meta_schedule", situation(*[record(COSINE)] * number, budget="1M tokens"))
        shares.append((stage["schedule"]["peak"] - LEFT) / (PEAK - LEFT))
    assert shares == pytest.approx([0.5, 0.25, 0.5 * (1 + math.cos(math.pi * 0.75))])


def test_data_bound_decays_by_its_law_and_one_epoch_stops() -> None:
    assert [strong_decay(n, 2e8) for n in (150e6, 300e6, 600e6, 1.4e9)] == pytest.approx([0.8, 1.6, 3.2, 3.2], rel=0.01)
    at = situation(budget="1M tokens", fresh_tokens=1e5, replay=0.2)
    [stage] = plan("data_bound", at)
    assert stage["optimizer"]["weight_decay"] == 3.2
    assert stage["max_epochs"] == 16
    with pytest.raises(UserError, match=r"80 passes over 'new', .* lower it to 200000 tokens, .* max_epochs: 80\}"):
        plan("data_bound", replace(at, fresh_tokens=1e4))
    [stage] = plan("one_epoch", at)
    assert parse(stage["budget"]).value == 125_000


def test_the_choice_follows_lineage_shift_and_budget_in_three_sentences() -> None:
    weak = Shift(2.0, 2.2)
    many = [record(COSINE, run=str(i)) for i in range(6)]
    cases = [
        (situation(), "rewarm"),
        (situation(TRUNK), "wsd"),
        (situation(TRUNK, BRANCH), "wsd_s"),
        (situation(TRUNK, BRANCH, has_moments=False), "rewarm"),
        (situation(TRUNK, peak=5e-4), "rewarm"),
        (situation(record({"name": "constant", "peak": LEFT})), "rewarm"),
        (situation(fresh_tokens=5e4), "data_bound"),
        (situation(fresh=("long", "short"), fresh_tokens=2e5, fresh_shares=(0.9, 0.1)), "data_bound"),
        (situation(*many), "meta_schedule"),
        (situation(budget="20K tokens", shift=weak), "reuse"),
        (situation(budget="20K tokens"), "rewarm"),
        (situation(budget="20K tokens", shift=None), "rewarm"),
    ]
    for at, wanted in cases:
        name, why = choose(at)
        assert name == wanted, why
        assert why.startswith(f"recipe {name}: ")
        assert why.count(". ") == 2, why
        named(name, "--recipe")[1].plan(at)


def test_passes_are_those_over_the_corpus_that_is_repeated_most() -> None:
    at = situation(budget="100K tokens", fresh=("long", "short"), fresh_tokens=1e5, fresh_shares=(0.8, 0.2), replay=0.2)
    assert at.mixture() == {"long": 0.4, "short": 0.4, "replay": 0.2}
    assert at.epochs == pytest.approx(100e3 * 0.4 / 20e3)
    assert "2 passes over the shortest new text" in choose(at)[1]
    kept = named("stability_gap", "--recipe")[1].kept_tokens(at)
    assert kept == pytest.approx(100e3 * 0.4 / 4), "of each corpus alike, as they are drawn"


def test_the_sentence_on_the_size_tells_what_will_be_trained() -> None:
    assert "The update is 1K tokens, 0.001 of what the parent saw" in choose(situation(budget="1 tokens"))[1]


def test_a_trunk_is_told_by_where_its_rate_stands() -> None:
    assert stands_on_trunk(Lineage(checkpoint="0", stages=[TRUNK]))
    assert not stands_on_trunk(Lineage(checkpoint="0", stages=[record(COSINE)]))
    decayed = record({"name": "wsd", "peak": PEAK}, rate_end=LEFT)
    assert not stands_on_trunk(Lineage(checkpoint="0", stages=[decayed]))
    infinite = record({"name": "infinite", "peak": PEAK, "constant": "55%", "anneal": "0%"}, rate_end=0.55 * PEAK)
    assert stands_on_trunk(Lineage(checkpoint="0", stages=[infinite]))
    both = Lineage(checkpoint="0", stages=[TRUNK, BRANCH])
    assert both.is_branch
    assert (both.rate, both.trunk_rate, both.branch_tokens) == (0.0, PEAK, 100_000)


@pytest.fixture(scope="module")
def trunk(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short trunk on the old corpus."""
    folder = tmp_path_factory.mktemp("trunk") / "trunk"
    recipe = workspace.recipe(
        checkpoints={"every": None, "keep": 1}, evaluation={"tokens": "512 tokens", "every": None}
    )
    recipe["stages"][0]["schedule"] = {"name": "wsd", "peak": 5e-3, "decay": "0%"}
    start(parse_recipe(recipe), folder, base=Path(), quiet=True)
    return folder


def test_a_run_leaves_a_trunk_that_the_next_goes_on_from(workspace: Any, trunk: Path, tmp_path: Path) -> None:
    data, run = {"new": workspace.new}, tmp_path / "second"
    result = continue_run(trunk, data, budget="2560 tokens", out=run, replay="25%", quiet=True)
    assert result["result"]["complete"]
    assert any(reason.startswith("recipe wsd") for reason in result["reasons"])
    branch = lineages.read(newest_checkpoint(run))
    assert branch.is_branch
    before = starting_checkpoint(run)
    assert before != newest_checkpoint(run)
    assert starting_checkpoint(run, "wsd_s") == newest_checkpoint(run)
    stood = lineages.read(before)
    assert not stood.is_branch
    assert stood.rate == branch.trunk_rate == 5e-3
    third = derive(before, data, budget="2560 tokens", base=Path(), name="third")
    assert third.continuation == "wsd"
    resolved = resolve(third.recipe, base=Path(), precision="fp32")
    assert [(s.rate_before, s.rate_start) for s in resolved.stages] == [(5e-3, 5e-3), (5e-3, 5e-3)]
    fresh = [s for s in resolved.stages[0].sources if s["name"] == "new"]
    assert fresh[0]["offset_rows"] == sum(s["rows"] for t in stood.stages[1:] for s in t.sources if s["name"] == "new")
