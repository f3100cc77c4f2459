"""A recipe in numbers, for `perennial plan` (not a command itself)."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perennial.plan.budgets import Budget
    from perennial.plan.parts import Draft, Facts, Stage
    from perennial.train.recipe import Recipe


def place(args: argparse.Namespace) -> tuple[Path, str]:
    """Folder and name of the recipe."""
    out = Path(args.out) if args.out and not args.calibrate else None
    return (out.parent if out else Path()).resolve(), out.stem if out else "planned"


def draft_of(
    recipe: Recipe,
    budget: Budget,
    facts: Facts,
    reasons: list[str],
    rate: float,
    peak: float,
    args: argparse.Namespace,
) -> Draft:
    """A recipe in numbers. Raises UserError for one that `train` would refuse."""
    from perennial.plan.parts import Draft
    from perennial.train.resolve import resolve

    base, name = place(args)
    resolved: dict[str, Any] = {}
    if not any(text.is_estimate for text in facts.texts):
        resolved = resolve(recipe, base=base, precision="fp32").model_dump(mode="json")
    measured_on = _measured_on(resolved)
    stages = tuple(_with_draws(s, recipe, facts, i) for i, s in enumerate(stages_of(recipe, rate, peak)))
    memory, fits = _memory(recipe, base, budget)
    return Draft(
        recipe=recipe.model_dump(mode="json", exclude_unset=True),
        header="".join(f"# {reason}\n" for reason in reasons) + "\n",
        command=f"perennial train {args.out or f'{name}.yaml'} --out runs/{name}",
        reasons=tuple(reasons),
        continuation="new model",
        share=0.0,
        share_reason=next((r for r in reasons if r.startswith("replay")), "no old text"),
        peak_reason=next((r for r in reasons if r.startswith("peak")), ""),
        stages=stages,
        flops=sum(s.tokens for s in stages) * facts.flops_per_token,
        batch=f"{recipe.batch.sequences} x {recipe.batch.sequence_length} = {recipe.batch.tokens} tokens",
        evaluated_tokens=_evaluated_tokens(recipe, facts, measured_on),
        memory_bytes=memory,
        memory_fits=fits,
        measured_on=measured_on,
        resolved=resolved,
    )


def stages_of(recipe: Recipe, rate: float, peak: float) -> list[Stage]:
    """The stages in numbers, after a parent that was left at `rate` and had seen at most `peak`."""
    from perennial.core import plugins
    from perennial.core.settings import raise_problems
    from perennial.plan.parts import Stage

    found = []
    for stage in recipe.stages:
        updates = max(1, -(-int(stage.budget.value) // recipe.batch.tokens))
        tokens = updates * recipe.batch.tokens
        rates = {"start": rate, "peak": peak, "final": rate}
        named = stage.schedule if isinstance(stage.schedule, dict) else {"name": stage.schedule}
        data = {k: rates[k] if v == "parent" and k in rates else v for k, v in named.items()}
        schedule, problems = plugins.build("schedules", data)
        raise_problems(problems, f"stage '{stage.name}' schedule")
        optimizer = plugins.build("optimizers", stage.optimizer)[0]
        decay, warmup = getattr(optimizer, "weight_decay", None), getattr(schedule, "warmup", None)
        passed = [schedule.rate(u * recipe.batch.tokens, tokens) for u in range(0, updates + 1, 1 + updates // 1000)]
        rate, peak = schedule.rate(tokens, tokens), max(peak, *passed)
        found.append(
            Stage(
                name=stage.name,
                tokens=tokens,
                updates=updates,
                schedule=plugins.name_of(schedule),
                warmup_tokens=warmup.of(tokens) if warmup is not None else 0.0,
                rate_start=passed[0],
                rate_peak=max(passed),
                rate_end=rate,
                optimizer=plugins.name_of(optimizer),
                weight_decay=float(decay.matrix) if decay is not None else None,
                epochs={},
                drawn={},
            )
        )
    return found


def _with_draws(stage: Stage, recipe: Recipe, facts: Facts, index: int) -> Stage:
    """The stage with tokens and passes of each corpus."""
    from perennial.train.recipe import REPLAY, shares

    unique = {text.name: text.tokens for text in facts.texts}
    unique[REPLAY] = facts.replayable_tokens or 1.0
    drawn = {name: share * stage.tokens for name, share in shares(recipe.stages[index].mixture).items()}
    return replace(stage, drawn=drawn, epochs={name: tokens / unique[name] for name, tokens in drawn.items()})


def share_of(recipe: Recipe, data: dict[str, Path]) -> float:
    """Share of old text in the whole recipe."""
    from perennial.train.recipe import shares

    total = sum(stage.budget.value for stage in recipe.stages)
    old = 0.0
    for stage in recipe.stages:
        parts = shares(stage.mixture).items()
        old += stage.budget.value / total * sum(share for name, share in parts if name not in data)
    return round(old, 9)


def _evaluated_tokens(recipe: Recipe, facts: Facts, measured_on: dict[str, int]) -> float:
    """Tokens of all evaluations: before, at every stretch, at the ends of stages; held out is 5% where not known."""
    settings = recipe.evaluation
    most = settings.tokens.value if settings.tokens.unit == "tokens" else float("inf")
    times = 1 + (round(1 / settings.every.value) if settings.every and settings.every.unit == "share" else 1)
    guess = sum(min(most, 0.05 * text.tokens) for text in facts.texts)
    once = float(sum(measured_on.values())) or guess
    return (times + len(recipe.stages) - 1) * once


def _measured_on(resolved: dict[str, Any]) -> dict[str, int]:
    """Validation tokens of each corpus in one evaluation of a resolved recipe; empty for an empty one."""
    import numpy as np

    from perennial.data.corpus import Corpus, evenly_spread

    found = {}
    for name, facts in resolved.get("corpora", {}).items():
        ends = Corpus.open(Path(facts["path"])).validation.document_ends().astype(np.int64)
        lengths = ends - np.concatenate([[0], ends[:-1]])
        found[name] = int(lengths[evenly_spread(lengths, resolved["evaluation_tokens"])].sum()) if len(ends) else 0
    return found


def _memory(recipe: Recipe, base: Path, budget: Budget) -> tuple[int | None, bool | None]:
    """Bytes per device, and whether they are there; None where the devices do not divide the batch."""
    from perennial.cli._memory import run_of
    from perennial.core.errors import UserError
    from perennial.plan.memory import plan_memory

    device = budget.device
    limit = None if device.memory_bytes is None else f"{device.memory_bytes / 1e9:g}GB"
    options = {"device": device.kind, "memory_limit": limit, "per_machine": None, "processes": budget.count}
    try:
        found = plan_memory(run_of(recipe, base, argparse.Namespace(**options)))
    except UserError:
        return None, None
    return found.total, found.fits
