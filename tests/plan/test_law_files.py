"""A law file and a checkpoint: where its numbers are used, that its level is checked, and why it cannot be used."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from perennial.core import plugins
from perennial.plan.law_files import LawFile
from perennial.plan.parts import Plan
from perennial.plan.planner import make_plan
from perennial.scaling.fitting import Fit, fit

from .test_planner import budget, drafter, facts

SIZES = np.repeat([3e5, 6e5, 1.2e6], 4)
TOKENS = np.tile([2e5, 4e5, 8e5, 1.6e6], 3)


def fitted(name: str, columns: dict[str, Any], **settings: Any) -> LawFile:
    law, problems = plugins.build("laws", {"name": name, **settings})
    assert not problems
    found = fit(law, columns, bootstrap=20)
    return LawFile("law.json", found)


def of_size(level: float = 2.0) -> LawFile:
    loss = level + 60 * SIZES**-0.3 + 80 * TOKENS**-0.3
    return fitted("chinchilla", {"parameters": SIZES, "tokens": TOKENS, "loss": loss})


def of_forgetting() -> LawFile:
    share = np.tile([0.0, 0.01, 0.05, 0.25], 3)
    forgotten = 3.0 * TOKENS**0.2 / ((1 + 50 * share) * SIZES) ** 0.2
    columns = {"parameters": SIZES, "tokens": TOKENS, "replay_share": share, "start_loss": np.full(12, 4.5)}
    return fitted("forgetting", {**columns, "loss": 4.5 + forgotten})


def planned(law: LawFile, **changes: Any) -> Plan:
    known = facts(**changes)
    return make_plan(known, budget(), drafter(known, []), law=law)


def test_a_law_of_size_says_what_retraining_reaches() -> None:
    truth = 2 + 60 * 1.3e6**-0.3 + 80 * np.array([8e5, 0.95 * 8e5, 1.6e6]) ** -0.3
    plan = planned(of_size(), old_losses={"old": float(truth[0])})
    numbers = {number.name: number for number in plan.numbers}
    found = [numbers[f"loss of {what}"] for what in ("the parent", "a new model on the new text alone", "retraining")]
    for number, right in zip(found, truth, strict=True):
        assert number.value == pytest.approx(right, rel=0.01)
        assert number.kind == "own runs"
        assert "law file law.json: chinchilla through 12 runs" in number.source
    assert "by the law" in found[0].source
    assert plan.retraining_loss is not None
    assert any("law.json, retraining: parameters 1.3e+06" in line for line in plan.warnings)


def test_a_law_of_other_text_is_not_used_for_retraining() -> None:
    plan = planned(of_size(), old_losses={"old": 8.0})
    assert plan.retraining_loss is None
    assert any("law.json was not used for what retraining reaches" in line for line in plan.unknown)


def test_a_law_of_forgetting_says_the_old_loss() -> None:
    plan = planned(of_forgetting())
    number = {number.name: number for number in plan.numbers}["old loss"]
    assert number.kind == "own runs"
    assert number.source.startswith("law file law.json: forgetting")
    losses = [outlook.old.mean for outlook in plan.curve if outlook.old is not None]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == len(plan.curve)
    without = planned(of_forgetting(), old_losses={})
    assert any("needs the parent's loss on old text" in line for line in without.unknown)


def test_why_a_law_cannot_be_used_is_one_sentence() -> None:
    share = np.array([0.0, 0.1, 0.3, 0.5, 0.7])
    other = fitted("replay", {"share": share, "loss": 3 + np.exp(-3 * share)})
    assert any("its law reads share, and a plan can ask" in line for line in planned(other).unknown)
    one_size = {"parameters": np.full(4, 6e5), "tokens": TOKENS[:4], "loss": 2 + 80 * TOKENS[:4] ** -0.3}
    found = fitted("chinchilla", one_size)
    assert isinstance(found.fitted, Fit)
    assert not found.fitted.identifiable
    assert any("law.json cannot be used for retraining: not identifiable" in line for line in planned(found).unknown)
