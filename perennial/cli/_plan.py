"""Facts and drafts for `perennial plan`, from files and from what `continue` decides (not a command itself)."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perennial.evals.shift import Shift
    from perennial.plan.budgets import Budget
    from perennial.plan.calibration import Calibration
    from perennial.plan.devices import Device
    from perennial.plan.parts import Choice, Draft, Facts, Plan, Text
    from perennial.train.continuing import Derived
    from perennial.train.starting import Parent

PEAK_FROM_RULE = ("rewarm", "data_bound", "one_epoch")
"""Continuations whose peak a measured response may move."""


@dataclass(frozen=True)
class Asked:
    """What the user named, with what was found of it."""

    checkpoint: Path
    parent: Parent
    data: dict[str, Path]
    stand_ins: dict[str, Path]
    moved: dict[str, Path]
    share: str | None
    args: argparse.Namespace
    calibration: Calibration | None
    shift: Shift | None = None
    """The checkpoint's losses on the old and the new text, where they were measured."""


def check_options(args: argparse.Namespace) -> None:
    """Raises UserError for options that are missing or do not go together."""
    from perennial.core.errors import UserError

    if args.overrides:
        raise UserError(f"{args.overrides[0]}: belongs to --memory; change the planned recipe with --set key=value")
    if args.model.endswith((".yaml", ".yml")):
        raise UserError(
            f"{args.model}: a recipe is planned with --memory; a plan for a budget begins with a checkpoint"
        )
    if not args.data:
        raise UserError("--data: at least one NAME=PATH with new text is needed")
    if args.budget is None and not args.calibrate:
        raise UserError("--budget: how much may be spent? '20B tokens', '3e20 FLOPs' or '8 h on 1 x H200'")
    wanted = (".json",) if args.calibrate else (".yaml", ".yml")
    if (args.out or args.calibrate) and not str(args.out or "").endswith(wanted):
        raise UserError(f"--out {args.out}: a {'calibration' if args.calibrate else 'recipe'} is a {wanted[0]} file")
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu:g}: must be above 0 and at most 1")
    if args.measure_shift and (args.model == "none" or args.calibrate):
        why = "a calibration does so by itself" if args.calibrate else "a new model knows no text"
        raise UserError(f"--measure-shift: belongs to the plan of a continuation; {why}")
    if args.sizes is not None and args.model != "none":
        raise UserError("--sizes: a checkpoint has its size; sizes are for a new model ('none')")


def asked_for(args: argparse.Namespace) -> Asked:
    """Reads the checkpoint and sorts what was named as old text. Raises UserError."""
    from perennial.cli._names import named_paths
    from perennial.plan.calibration import read
    from perennial.train.continuing import starting_checkpoint
    from perennial.train.origin import stated_facts
    from perennial.train.starting import read_parent

    checkpoint = starting_checkpoint(Path(args.model), args.recipe)
    parent = read_parent(checkpoint, stated_facts(args.parent))
    replay = args.replay or []
    shares = [r for r in replay if "=" not in r]
    known = {facts["fingerprint"]: name for name, facts in parent.lineage.corpora.items()}
    stand_ins: dict[str, Path] = {}
    moved: dict[str, Path] = {}
    for name, path in named_paths("--replay", [r for r in replay if "=" in r]).items():
        if (before := known.get(_fingerprint(path))) is not None:
            moved[before] = path
        else:
            stand_ins[name] = path
    return Asked(
        checkpoint=checkpoint,
        parent=parent,
        data=named_paths("--data", args.data),
        stand_ins=stand_ins,
        moved=moved,
        share=shares[-1] if shares else None,
        args=args,
        calibration=read(Path(args.calibration)) if args.calibration else None,
    )


def _fingerprint(path: Path) -> str:
    """Of a prepared corpus; '' for raw text."""
    from perennial.data.corpus import Corpus
    from perennial.plan.text_size import is_prepared

    return Corpus.open(path).fingerprint if is_prepared(path) else ""


def plan_for(args: argparse.Namespace) -> Plan:
    """The plan that continues a checkpoint. Raises UserError."""
    from perennial.core.amounts import parse
    from perennial.core.errors import UserError
    from perennial.plan.budgets import read_budget
    from perennial.plan.law_files import LawFile
    from perennial.plan.planner import make_plan
    from perennial.scaling.law_file import load
    from perennial.scaling.ledger import read

    asked = asked_for(args)
    budget = read_budget(args.budget, here=here(asked.calibration), mfu=args.mfu)
    asked = replace(asked, shift=_shift(asked, budget))
    facts = facts_of(asked, budget)
    try:
        share = None if asked.share is None else parse(asked.share, ("share",)).value
    except ValueError as error:
        raise UserError(f"--replay: {error}") from None
    return make_plan(
        facts,
        budget,
        lambda choice: draft(asked, choice, budget, facts),
        share=share,
        how=args.recipe,
        calibration=asked.calibration,
        ledger=read(Path(args.ledger)) if args.ledger else (),
        law=LawFile(Path(args.laws).name, load(Path(args.laws))) if args.laws else None,
        kind=asked.shift.kind if asked.shift else "unknown",
        with_energy=args.energy,
    )


def here(calibration: Calibration | None) -> Device:
    """This machine, at the speed that was measured, else assumed."""
    from perennial.core.amounts import human
    from perennial.plan.devices import cpu, measured

    if calibration is None:
        return cpu()
    speed = calibration.speed
    source = f"measured here: {human(speed.parameters)} parameters, {speed.threads} threads, {speed.precision}"
    return measured(speed.flops_per_second, source)


def _shift(asked: Asked, budget: Budget) -> Shift | None:
    """As the calibration has it, or measured now, as `continue` does, when that was asked for.

    Raises UserError where there is nothing to measure on.
    """
    from perennial.cli._plan_drafts import place
    from perennial.core.errors import UserError
    from perennial.plan.text_size import is_prepared
    from perennial.train.continuing import old_data
    from perennial.train.shift import measured_shift

    if not asked.args.measure_shift:
        return asked.calibration.shift if asked.calibration else None
    given = {**asked.data, **asked.stand_ins}
    made = derived(asked, f"{_tokens(asked, budget):.15g} tokens", None, None, None)
    if raw := [name for name, path in given.items() if not is_prepared(path)]:
        raise UserError(f"--measure-shift: corpus '{raw[0]}' is raw text; run `perennial prepare` on it first")
    old = old_data(made, given, place(asked.args)[0])
    found = measured_shift(asked.checkpoint, old, asked.stand_ins, asked.data, made.recipe.batch.sequence_length)
    if found is None:
        raise UserError(
            "--measure-shift: no old text was found where the lineage has it, nor named: --replay NAME=PATH names it"
        )
    return found


def _tokens(asked: Asked, budget: Budget) -> float:
    """What the budget pays for, by rows as long as the parent's (of a model from elsewhere at most 1024 tokens)."""
    from perennial.model.foreign import flops_per_token

    per_token = float(flops_per_token(asked.parent.config, _row_length(asked.parent)))
    return max(1.0, budget.flops(per_token) / per_token)


def _row_length(parent: Parent) -> int:
    """Tokens in a row of the parent's last stage; of a model from elsewhere at most 1024."""
    stages = parent.lineage.stages
    return stages[-1].sequence_length if stages else min(1024, parent.config.context or 1024)


def facts_of(asked: Asked, budget: Budget) -> Facts:
    """What is known of the model, its past and the text. Raises UserError."""
    from perennial.model.foreign import flops_per_token, num_parameters
    from perennial.plan.parts import Facts

    lineage, config = asked.parent.lineage, asked.parent.config
    batch = derived(asked, f"{_tokens(asked, budget):.15g} tokens", None, "rewarm", None).recipe.batch
    after = lineage.evaluation.get("after", {})
    measured = [name for name in lineage.corpora if name in after and name not in asked.data]
    texts = tuple(texts_of(asked))
    paths = {**asked.data, **asked.stand_ins, **asked.moved}
    return Facts(
        model=str(asked.checkpoint),
        parameters=num_parameters(config),
        flops_per_token=float(flops_per_token(config, batch.sequence_length)),
        texts=texts,
        parent_tokens=float(lineage.tokens),
        parent_flops=float(lineage.flops),
        past_is_estimate=bool(lineage.origin and lineage.origin.tokens.is_estimate and not lineage.stages),
        old_losses={name: after[name]["nats_per_token"] for name in measured},
        batch_tokens=batch.tokens,
        checkpoint=lineage.checkpoint,
        old_measured_on={name: int(after[name]["tokens"]) for name in measured if "tokens" in after[name]},
        fingerprints={name: found for name, path in paths.items() if (found := _fingerprint(path))},
    )


def texts_of(asked: Asked) -> list[Text]:
    """The corpora with their unique training tokens; without named old text those of the lineage that are found."""
    from perennial.plan.text_size import is_prepared, text_of

    old = {**asked.stand_ins, **asked.moved}
    if not asked.stand_ins:
        places = {name: Path(facts["path"]) for name, facts in asked.parent.lineage.corpora.items()}
        old = {name: path for name, path in places.items() if name not in asked.data and is_prepared(path)} | old
    how: dict[str, Any] = {"tokenizer": asked.checkpoint, "text_field": asked.args.text_field}
    found = [text_of(name, path, is_old=False, **how) for name, path in asked.data.items()]
    return found + [text_of(name, path, is_old=True, **how) for name, path in old.items()]


def derived(asked: Asked, budget: str, share: float | None, how: Any, peak: float | None) -> Derived:
    """What `continue` would do."""
    from perennial.cli._plan_drafts import place
    from perennial.train.continuing import derive
    from perennial.train.origin import stated_facts

    base, name = place(asked.args)
    return derive(
        asked.checkpoint,
        asked.data,
        budget=budget,
        base=base,
        name=name,
        replay=asked.share if share is None else f"{100 * share:.10g}%",
        stand_ins=asked.stand_ins,
        moved=asked.moved,
        peak=peak,
        how=how,
        facts=stated_facts(asked.args.parent),
        settings=asked.args.set,
        shift=(lambda: asked.shift) if asked.shift is not None else None,
    )


def draft(asked: Asked, choice: Choice, budget: Budget, facts: Facts) -> Draft:
    """The recipe of a choice, worked out as `train` would. Raises UserError."""
    from perennial.cli._plan_drafts import draft_of, share_of, stages_of
    from perennial.core.amounts import Amount

    tokens = str(Amount(float(round(choice.tokens)), "tokens"))
    lineage = asked.parent.lineage
    made = derived(asked, tokens, choice.share, choice.how, None)
    stages = stages_of(made.recipe, lineage.rate, lineage.peak)
    peak = None
    if choice.peak_factor != 1.0 and made.continuation in PEAK_FROM_RULE:
        peak = float(f"{choice.peak_factor * max(s.rate_peak for s in stages):.3g}")
        made = derived(asked, tokens, choice.share, choice.how or made.continuation, peak)
    share = share_of(made.recipe, asked.data)
    words = _command(asked, made, tokens, share, peak)
    drafted = draft_of(made.recipe, budget, facts, made.reasons, lineage.rate, lineage.peak, asked.args)
    reason = next((r for r in made.reasons if r.startswith(("peak", "start at", made.continuation))), made.reasons[-1])
    return replace(
        drafted, command=words, header=made.header(), continuation=made.continuation, share=share, peak_reason=reason
    )


def _command(asked: Asked, made: Derived, tokens: str, share: float, peak: float | None) -> str:
    """The plan as `perennial continue`."""
    from perennial.cli._plan_drafts import place

    words = ["perennial", "continue", str(asked.args.model)]
    for option, paths in (("--data", asked.data), ("--replay", asked.stand_ins), ("--moved", asked.moved)):
        words += [word for name, path in paths.items() for word in (option, f"{name}={path}")]
    words += ["--tokens", tokens, "--replay", f"{100 * share:.6g}%", "--recipe", made.continuation]
    words += ["--peak", f"{peak:g}"] if peak is not None else []
    for option, values in (("--parent", asked.args.parent), ("--set", asked.args.set)):
        words += [word for value in values for word in (option, value)]
    return shlex.join([*words, "--out", f"runs/{place(asked.args)[1]}"])


def write_recipe(plan: Plan, args: argparse.Namespace) -> None:
    """The recipe with the plan's predictions, sources and reasons as comments. Raises UserError."""
    import yaml

    from perennial.core.errors import UserError
    from perennial.core.files import write_text
    from perennial.plan.predicting import predictions_of
    from perennial.plan.words import header

    out = Path(args.out)
    if any(text.is_estimate for text in plan.facts.texts):
        raise UserError(
            f"--out {out}: `perennial train` needs prepared corpora; run `perennial prepare` first, or this, which "
            f"prepares by itself: {plan.draft.command}"
        )
    if out.exists():
        raise UserError(f"--out {out}: is there already; give another file, or remove it")
    body = yaml.safe_dump(plan.draft.recipe, sort_keys=False, allow_unicode=True)
    foretold = {"predictions": predictions_of(plan, plan.draft.resolved).model_dump(mode="json", exclude_none=True)}
    body += yaml.safe_dump(foretold, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    write_text(out, header(plan) + plan.draft.header + body)


def calibrate(args: argparse.Namespace) -> int:
    """Measures, and writes the calibration. Raises UserError."""
    import json
    import sys

    from perennial.bench import calibration, calibration_runs
    from perennial.cli._names import named_paths
    from perennial.core.amounts import parse
    from perennial.core.errors import UserError
    from perennial.train.continuing import starting_checkpoint

    try:
        tokens = parse(args.budget, ("tokens",)).value if args.budget else None
    except ValueError as error:
        raise UserError(f"--budget: with --calibrate the tokens of the update that is planned; {error}") from None
    task = calibration_runs.Task(
        checkpoint=None if args.model == "none" else starting_checkpoint(Path(args.model), args.recipe),
        data=named_paths("--data", args.data),
        old=named_paths("--replay", [r for r in args.replay or [] if "=" in r]),
        out=Path(args.out),
        tokens=tokens,
        size=args.sizes,
        minutes=args.minutes,
    )
    found = calibration.calibrate(task, say=lambda text: print(text, file=sys.stderr))
    print(json.dumps(found.model_dump(mode="json"), indent=2) if args.json else calibration.summary(found))
    return 0
