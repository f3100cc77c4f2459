"""Plans of new models for `perennial plan none` (not a command itself)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perennial.plan.budgets import Budget
    from perennial.plan.calibration import Calibration
    from perennial.plan.new_models import LossOf, Ranked
    from perennial.plan.numbers import Kind
    from perennial.plan.parts import Choice, Draft, Facts, NewModel, Plan, Text
    from perennial.plan.transfer import Estimate
    from perennial.train.recipe import Recipe

REASON = "peak: usual for this number of parameters (GPT-3's table 2.1, arXiv 2005.14165; below 125M Pythia's)"


def new_model_plan(args: argparse.Namespace) -> Plan:
    """The plan of a new model: the preset with the lowest predicted loss, trained on all text. Raises UserError."""
    from perennial.cli._names import named_paths
    from perennial.cli._plan import here
    from perennial.cli._plan_drafts import draft_of
    from perennial.core.errors import UserError
    from perennial.data.corpus import Corpus
    from perennial.plan import new_models
    from perennial.plan.budgets import read_budget
    from perennial.plan.calibration import best_peak, read
    from perennial.plan.planner import make_plan
    from perennial.scaling import law_file
    from perennial.train import origin
    from perennial.train.recipe import parse_recipe

    if args.recipe or args.parent or args.ledger:
        option = "--recipe" if args.recipe else "--parent" if args.parent else "--ledger"
        raise UserError(f"{option}: belongs to a checkpoint that is continued, not to a new model ('none')")
    paths = named_paths("--data", args.data) | named_paths("--replay", args.replay or [])
    vocabulary = Corpus.open(next(iter(paths.values()))).vocabulary_size  # a new model has no tokenizer of its own
    calibration = read(Path(args.calibration)) if args.calibration else None
    budget = read_budget(args.budget, here=here(calibration), mfu=args.mfu)
    texts = [_text(name, path) for name, path in paths.items()]
    unique = sum(text.tokens for text in texts)
    names = new_models.read_sizes(args.sizes)
    sizes = new_models.sizes_of(names, vocabulary, budget)
    loss_of, kind, source, unknown = _law(args, calibration, sizes[0], unique)
    order = new_models.ranked(sizes, unique, loss_of, budget, float(origin.MIN_ROW_TOKENS))
    best = order[0]
    if args.laws and kind == "own runs":
        law = law_file.load(Path(args.laws))
        unknown += [f"warning: {args.laws}: {line}" for line in new_models.law_warnings(law, best.size, unique)]

    def recipe_of(tokens: float, factor: float = 1.0) -> tuple[Recipe, list[str]]:
        data, reasons = _recipe(args, best, paths, texts, tokens, budget, factor)
        return parse_recipe(data, source="planned recipe"), reasons

    recipe, _ = recipe_of(best.size.tokens)
    facts = _facts(best, recipe, texts)

    def draft(choice: Choice) -> Draft:
        made, reasons = recipe_of(choice.tokens, choice.peak_factor)
        return draft_of(made, budget, facts, [*reasons, *unknown], 0.0, 0.0, args)

    advice = best_peak(calibration) if calibration else None
    new = _new_model(args, order, loss_of, kind, source, unique, advice.new_ratio if advice else 1.0)
    return make_plan(facts, budget, draft, calibration=calibration, with_energy=args.energy, new_model=new)


def _text(name: str, path: Path) -> Text:
    from perennial.plan.text_size import text_of

    return text_of(name, path, is_old=False, tokenizer=path, text_field="text")


def _law(
    args: argparse.Namespace, calibration: Calibration | None, size: Any, unique: float
) -> tuple[LossOf, Kind, str, list[str]]:
    """The law that orders sizes, where it is from, and why a better one could not be asked."""
    from perennial.core.errors import UserError
    from perennial.plan import new_models
    from perennial.plan.own_runs import own_laws
    from perennial.scaling import law_file

    published = (
        "Muennighoff et al. 2023, arXiv 2305.16264 (C4, GPT-2's tokenizer): orders sizes; its level is another's"
    )
    unknown = []
    if args.laws:
        loss_of = new_models.by_law_file(law_file.load(Path(args.laws)))
        try:
            loss_of(size, unique)
            return loss_of, "own runs", f"law file {Path(args.laws).name}", []
        except UserError as error:
            unknown.append(f"warning: loss: {args.laws} cannot know: {error}; a published law is asked instead")
    law = own_laws(calibration).new if calibration else None
    if law is not None and law.side == "scratch":
        return new_models.by_own_runs(law), "own runs", f"law through {law.num_runs} small runs on this text", []
    return new_models.by_published_law, "published", published, unknown


def _facts(best: Ranked, recipe: Recipe, texts: list[Text]) -> Facts:
    from perennial.model.cost import flops_per_token
    from perennial.plan.parts import Facts

    return Facts(
        model=f"new model of size {best.size.name}",
        parameters=best.size.parameters,
        flops_per_token=float(flops_per_token(best.size.config, recipe.batch.sequence_length)),
        texts=tuple(texts),
        parent_tokens=0.0,
        parent_flops=0.0,
        past_is_estimate=False,
        old_losses={},
        batch_tokens=recipe.batch.tokens,
    )


def _recipe(
    args: argparse.Namespace,
    best: Ranked,
    paths: dict[str, Path],
    texts: list[Text],
    tokens: float,
    budget: Budget,
    factor: float,
) -> tuple[dict[str, Any], list[str]]:
    """Recipe data of a new model, and why each value is so; batch and peak by the rules for models from elsewhere."""
    from perennial.cli._plan_drafts import place
    from perennial.core.settings import override
    from perennial.plan.memory import precision_of_machine
    from perennial.train import origin

    base, name = place(args)
    kind, config = budget.device.kind, best.size.config
    length = origin.row_tokens(config.context, tokens, kind)
    rows = origin.batch_rows(tokens, length)
    machine = origin.Machine(kind, precision_of_machine(kind), budget.device.memory_bytes)
    peak = origin.rounded(factor * origin.estimated_peak(best.size.parameters))
    total = sum(text.tokens for text in texts)
    shares = {text.name: round(text.tokens / total, 6) for text in texts}
    stage = {
        "name": "pretrain",
        "budget": f"{round(tokens)} tokens",
        "mixture": shares,
        "schedule": {"name": "wsd", "peak": peak, "warmup": "1%", "decay": "20%"},
        "optimizer": "adamw",
        **({"max_epochs": round(tokens / total + 1, 2)} if tokens > 4 * total else {}),
    }
    data = {
        "name": name,
        "model": {"preset": best.size.name},
        "corpora": {n: origin_path(p, base) for n, p in paths.items()},
        "stages": [stage],
        "batch": {
            "sequences": rows,
            "sequence_length": length,
            "micro_batch": origin.micro_batch_rows(config, rows, length, machine),
        },
    }
    reasons = [
        REASON,
        f"batch: the critical batch of {tokens:.3g} tokens (Zhang et al. 2024, arXiv 2410.21676), in rows of {length}",
        "schedule wsd: its trunk can be continued without raising the rate again (Hu et al. 2024, arXiv 2404.06395)",
    ]
    return override(data, args.set), reasons


def origin_path(path: Path, base: Path) -> str:
    """A path as a recipe in `base` names it."""
    from perennial.core.files import relative_to

    return relative_to(path.resolve(), base)


def _new_model(
    args: argparse.Namespace, order: list[Ranked], loss_of: LossOf, kind: Kind, source: str, unique: float, ratio: float
) -> NewModel:
    """The chosen size and up to two others, the nearest in size."""
    from dataclasses import replace

    from perennial.plan.new_models import reaches
    from perennial.plan.parts import NewModel

    best = order[0].size
    near = sorted(order[1:], key=lambda r: abs(r.size.parameters - best.parameters) / max(r.size.parameters, 1))[:2]
    others = tuple(
        (
            f"size {r.size.name}",
            "larger, fewer tokens" if r.size.parameters > best.parameters else "smaller, cheaper to run",
            r.loss if kind == "own runs" or reaches(r.size, r.size.tokens) else None,
            r.size.tokens,
            r.size.tokens * r.size.flops_per_token,
            f"the same with --sizes {r.size.name}",
        )
        for r in near
    )
    chosen = f"{best.name}: lowest predicted loss of {len(order)} sizes that the budget can train ({source})"
    if len(order) == 1:
        chosen = f"{best.name}: the only size"

    def loss_at(tokens: float) -> Estimate | None:
        if kind == "published" and not reaches(best, tokens):
            return None
        return loss_of(replace(best, tokens=tokens), unique).times(ratio)

    return NewModel(loss_at, kind, source, chosen, others)
