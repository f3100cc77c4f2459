"""A plan's predictions as the recipe carries them, each with its interval and where it is from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perennial.core.predictions import (
    VERSION,
    PredictedCosts,
    PredictedLoss,
    PredictedNumber,
    PredictedShare,
    Predictions,
    Side,
    fingerprints,
)
from perennial.plan.numbers import Number
from perennial.plan.parts import Facts, Outlook, Plan
from perennial.plan.transfer import Estimate

_DIGITS = 6


def predictions_of(plan: Plan, resolved: Mapping[str, Any]) -> Predictions:
    """What the plan predicts of the run that its recipe, resolved, describes; `resolved` as in resolved.json."""
    numbers = {number.name: number for number in plan.numbers}
    return Predictions(
        version=VERSION,
        fingerprints=fingerprints(resolved),
        losses=_losses(plan, numbers),
        costs=_costs(plan, numbers),
        curve=[_share(outlook) for outlook in plan.curve] if "new loss" in numbers else [],
        unknown=_unknown(plan),
    )


def _unknown(plan: Plan) -> list[str]:
    """Why a loss that is missing could not be told."""
    missing = [name for name, loss in (("new", plan.outlook.new), ("old", plan.outlook.old)) if loss is None]
    starts = tuple(f"{name} loss: " for name in missing) + (("loss: ",) if "new" in missing else ())
    return [line for line in plan.unknown if line.startswith(starts)] if starts else []


def _losses(plan: Plan, numbers: Mapping[str, Number]) -> dict[Side, PredictedLoss]:
    facts, outlook = plan.facts, plan.outlook
    names = [text.name for text in facts.texts if not text.is_old]
    new: Side = "new" if "new loss" in numbers else "all"
    found: dict[Side, PredictedLoss] = {}
    if outlook.new is not None:
        number = numbers["new loss" if new == "new" else "loss"]
        found[new] = _loss(outlook.new, number, dict.fromkeys(names))
    if outlook.old is not None:
        found["old"] = _loss(outlook.old, numbers["old loss"], _old_corpora(facts))
    return found


def _old_corpora(facts: Facts) -> dict[str, int | None]:
    """The corpora whose mean the old loss is, with what the parent was measured on."""
    if facts.old_losses:
        return {name: facts.old_measured_on.get(name) for name in facts.old_losses}
    return {text.name: None for text in facts.texts if text.is_old}


def _loss(estimate: Estimate, number: Number, corpora: dict[str, int | None]) -> PredictedLoss:
    value, low, high = _rounded(estimate)
    return PredictedLoss(value=value, low=low, high=high, basis=_basis(number), corpora=corpora)


def _costs(plan: Plan, numbers: Mapping[str, Number]) -> PredictedCosts:
    cost, budget, memory = plan.cost, plan.budget, plan.draft.memory_bytes
    energy = cost.energy_kwh
    return PredictedCosts(
        tokens=PredictedNumber(value=_round(cost.tokens), basis=_basis(numbers["tokens"])),
        flops=PredictedNumber(value=_round(cost.flops), basis=_basis(numbers["FLOPs"])),
        seconds=PredictedNumber(value=_round(3600 * cost.hours), basis=_basis(numbers["time"])),
        memory_bytes=None
        if memory is None
        else PredictedNumber(value=float(memory), basis=_basis(numbers["memory per device"])),
        energy_kwh=None if energy is None else PredictedNumber(value=_round(energy), basis=_basis(numbers["energy"])),
        device=budget.device.name,
        devices=budget.count,
    )


def _share(outlook: Outlook) -> PredictedShare:
    old, new = (None if e is None else _rounded(e) for e in (outlook.old, outlook.new))
    return PredictedShare(share=outlook.share, old=old, new=new)


def _basis(number: Number) -> str:
    return f"{number.kind}: {number.source}"


def _rounded(estimate: Estimate) -> tuple[float, float, float]:
    return _round(estimate.mean), _round(estimate.low), _round(estimate.high)


def _round(value: float) -> float:
    """With as many digits as a person may want to read; whole numbers stay."""
    return value if value == round(value) else float(f"{value:.{_DIGITS}g}")
