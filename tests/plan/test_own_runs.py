"""One's own finished runs in the place of published constants: what they tell, from how many on, and from which."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from perennial.core.errors import UserError
from perennial.plan.own_runs import LEAST_RUNS, own_laws, replay_cost
from perennial.plan.planner import make_plan
from perennial.plan.words import to_text
from perennial.scaling.continual import fit_replay_laws, replay_table
from perennial.scaling.ledger import LedgerRun, read, runs_in

from .test_planner import budget, drafter, facts, small_runs

PARENT: dict[str, Any] = {"parent_checkpoint": "p" * 16, "parent_tokens": 200_000}


def rows(
    share: float,
    *,
    name: str = "",
    new: float = 4.0,
    old: float = 5.0,
    domains: tuple[str, str] = ("new", "old"),
    tokens: float = 3e5,
    is_update: bool = True,
    **recorded: Any,
) -> list[dict[str, Any]]:
    """The ledger's rows of one run, of an earlier version where `recorded` is empty."""
    sides = ((domains[0], "new", new, 6.0), (domains[1], "old" if is_update else "new", old, 4.5))
    return [
        {
            "run": name or f"run{share}",
            "recipe_hash": "h",
            "seed": 0,
            "domain": domain,
            "role": role,
            "parameters": 1_000_000,
            "flops": 6e6 * tokens,
            "tokens": tokens,
            "replay": share,
            "learning_rate": 1e-2,
            "schedule": "rewarm",
            "parent": is_update,
            "loss": after,
            "loss_before": before,
            **recorded,
        }
        for domain, role, after, before in sides
    ]


def updates(shares: tuple[float, ...] = (0.0, 0.01, 0.05, 0.25, 0.5), **changes: Any) -> list[LedgerRun]:
    """Updates that forget by (share + 0.4%)^-0.1, and pay (1 - share)^-0.05 for it on the new text."""
    found = []
    for share in shares:
        old = 1.6 + 2.9 * 1.02 * ((share + 4e-4) / 1.0004) ** -0.1
        found += rows(share, new=3.8 * (1 - share) ** -0.05, old=old, **{**PARENT, **changes})
    return runs_in(found)


def test_a_ledger_file_of_this_and_an_earlier_version(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = [*rows(0.05), *rows(0.25, **PARENT, domain_tokens=1e5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    earlier, now = read(path)
    assert (earlier.parent_tokens, earlier.parent, len(earlier.trained_on)) == (None, None, 0)
    assert (now.parent_tokens, now.parent, sorted(now.trained_on)) == (200_000, "p" * 16, ["new", "old"])
    assert now.mean("old", now.losses_before) == 4.5
    assert now.mean("old", {}) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "not a ledger"),
        ('{"run": "a"}', "a row has no 'recipe_hash'"),
        ("[1]", "not a ledger"),
        (json.dumps({**rows(0.1)[0], "tokens": "many"}), "not a ledger"),
    ],
)
def test_what_is_no_ledger(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "ledger.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read(tmp_path / "ledger.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "none.jsonl")


def test_a_ledger_stands_in_for_a_calibration() -> None:
    found = own_laws(None, updates(), new=["new"], old=["old"])
    assert found.new is not None
    assert found.old is not None
    assert found.old.num_runs == found.new.num_runs == 5
    assert found.replay_cost is not None
    few = own_laws(None, updates((0.0, 0.05)), new=["new"], old=["old"])
    assert (few.new, few.old, few.replay_cost) == (None, None, None)
    assert few.reason == f"your ledger has 2 updates on this new text, {LEAST_RUNS} are the fewest"
    assert "1 update with this old text" in own_laws(None, updates((0.0,)), new=["new"], old=["old"]).old_reason
    assert own_laws(None).reason == "no calibration"


def test_laws_of_continuing_can_be_fitted_to_a_ledger() -> None:
    shares = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5)
    table = replay_table([*updates(shares), *runs_in(rows(0.0, is_update=False))])
    assert table["replay_share"].tolist() == list(shares)
    laws = fit_replay_laws(table, bootstrap=0)
    old, new = laws.losses([0.25])
    assert old[0] == pytest.approx(table["old_loss"][4], rel=0.02)
    assert new[0] == pytest.approx(table["new_loss"][4], rel=0.02)


def test_old_text_is_known_from_updates_on_other_new_text() -> None:
    """Every new text has a level of its own; how far the old loss rises is the same question."""
    found = own_laws(None, updates(domains=("last-year", "old")), new=["new"], old=["old"])
    assert found.new is None
    assert found.old is not None
    assert found.replay_cost is not None
    assert own_laws(None, updates(domains=("x", "y")), new=["new"], old=["old"]).old is None


def test_what_the_parents_had_seen_is_used_where_it_is_recorded() -> None:
    recorded = own_laws(None, updates(), new=["new"], old=["old"], parent_tokens=9e9).old
    earlier = own_laws(None, updates(parent_tokens=None), new=["new"], old=["old"], parent_tokens=9e9).old
    assert recorded is not None
    assert earlier is not None
    assert recorded.reference.parent_tokens == pytest.approx(2e5)
    assert earlier.reference.parent_tokens == pytest.approx(9e9)


def test_the_cost_of_replay_by_runs_that_differ_in_nothing_else() -> None:
    found = replay_cost(updates())
    assert found is not None
    assert found.exponent == pytest.approx(0.05, abs=0.003)
    assert found.num_runs == 5
    half = found.rise(0.5)
    assert half.mean == pytest.approx(0.5**-0.05 - 1, rel=0.1)
    assert half.low < half.mean < half.high
    assert found.rise(0.0).mean == found.rise(0.0).high == 0
    apart = [
        run
        for share, tokens in ((0.0, 1e5), (0.05, 2e5), (0.25, 3e5), (0.5, 4e5))
        for run in updates((share,), tokens=tokens)
    ]
    assert replay_cost(apart) is None


def test_a_plan_says_how_many_runs_took_the_place_of_published_numbers() -> None:
    known = facts()
    published = make_plan(known, budget(), drafter(known, []))
    own = make_plan(known, budget(), drafter(known, []), ledger=updates(domains=("last-year", "old")))
    name = "rise of the new loss by replay"
    before, after = ({n.name: n for n in plan.numbers} for plan in (published, own))
    assert (before[name].kind, after[name].kind) == ("published", "own runs")
    assert "of your own 5 runs" in after[name].source
    assert (before["old loss"].kind, after["old loss"].kind) == ("published", "own runs")
    assert "law through your own 5 runs" in after["old loss"].source
    assert own.outlook.new is None
    assert own.outlook.old is not None
    assert own.outlook.old.high - own.outlook.old.low < 1.0
    few = make_plan(known, budget(), drafter(known, []), ledger=updates((0.0, 0.5)))
    assert {n.name: n for n in few.numbers}["old loss"].kind == "published"
    assert any(f"2 updates with this old text, {LEAST_RUNS} are the fewest" in line for line in few.unknown)


def test_retraining_by_own_runs_on_everything() -> None:
    recorded: dict[str, Any] = {"parent_tokens": 0, "parent_checkpoint": None, "domain_tokens": 1e5}
    scratch = [
        row
        for row_ in small_runs("new")
        for row in rows(
            0.0,
            name=f"{row_.tokens}-{row_.share}-{row_.flops_per_token}",
            tokens=row_.tokens,
            new=2 + 300 * row_.tokens**-0.5,
            old=3 + 300 * row_.tokens**-0.5,
            is_update=False,
            **recorded,
        )
    ]
    known = facts()
    plan = make_plan(known, budget(), drafter(known, []), ledger=runs_in(scratch))
    assert plan.retraining_loss is not None
    truth = 2.5 + 300 * (8e5 + plan.draft.tokens) ** -0.5
    assert plan.retraining_loss.mean == pytest.approx(truth, rel=0.1)
    (number,) = (n for n in plan.numbers if n.name == "loss of retraining")
    assert number.kind == "own runs"
    assert "on all of this text" in number.source
    assert f"loss {plan.retraining_loss.mean:.3f}" in to_text(plan).replace("\n  ", " ")


def test_without_laws_retraining_cannot_be_known_and_why() -> None:
    known = facts()
    plan = make_plan(known, budget(), drafter(known, []))
    assert plan.retraining_loss is None
    (number,) = (n for n in plan.numbers if n.name == "loss of retraining")
    assert number.kind == "unknown"
    assert "none in a --ledger" in number.source
    assert "loss: cannot know" in " ".join(to_text(plan).split())
    large = facts(
        flops_per_token=6e9,
        parameters=1_000_000_000,
        parent_tokens=2e10,
        texts=tuple(type(t)(t.name, 4e10, t.is_old, "m") for t in known.texts),
    )
    by_law = make_plan(large, budget("1B tokens"), drafter(large, []))
    assert by_law.retraining_loss is not None
    assert by_law.retraining_loss.high / by_law.retraining_loss.mean == pytest.approx(1.25)
    assert math.isfinite(by_law.retraining_loss.mean)
