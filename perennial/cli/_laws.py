"""What `perennial laws` does: each action returns its result as JSON-ready data and as text (not a command itself)."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from perennial.core import plugins
from perennial.core.errors import UserError
from perennial.core.files import check_place
from perennial.core.progress import Progress
from perennial.core.settings import override
from perennial.scaling import asking, law_file, words
from perennial.scaling import fitting as single
from perennial.scaling import ledger as ledgers
from perennial.scaling.allocation import optimal
from perennial.scaling.choosing import Blend, describe_blend, fit_loss_law
from perennial.scaling.fitting import Fit
from perennial.scaling.law_table import LawTable, read_for
from perennial.scaling.table import is_of_runs

DROPPABLE = ("outliers", "under-trained", "worse")

Result = tuple[dict[str, Any], str]


def fit(args: argparse.Namespace) -> Result:
    """Reads the table, fits the law and writes it."""
    forms = ("auto", *plugins.names("laws"))
    for value, allowed, option in ((args.form, forms, "--form"), *((d, DROPPABLE, "--drop") for d in args.drop)):
        asking.check_choice(option, value, allowed)
    if args.resamples < 20:
        raise UserError(f"--resamples {args.resamples}: an interval takes 20 or more")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} must be 0 or more")
    paths = [Path(path) for path in args.tables]
    if args.out is not None:
        law_file.check_place(Path(args.out), paths)
    law = None if args.form == "auto" else asking.build(args.form, args.set)
    table = read_for(law, paths, args.columns, where=args.where, drop=args.drop)
    with Progress("fitting", quiet=args.json) as progress:
        options: dict[str, Any] = {"bootstrap": args.resamples, "seed": args.seed, "progress": progress}
        columns = table.columns
        fitted = fit_loss_law(columns, **options) if law is None else single.fit(law, columns, **options)
    facts = {
        **(describe_blend(fitted) if isinstance(fitted, Blend) else single.describe(fitted)),
        "form": args.form,
        "rows": len(table),
        "columns": table.mapped,
        "flags": [vars(f) for f in table.flags],
        "identifiable": fitted.identifiable,
        "reason": fitted.reason,
    }
    lines = [f"{table.source}: {table.summary}", words.column_line(table.mapped), *words.flag_lines(table.flags)]
    lines += ["", *words.law_lines(fitted)]
    if args.out is not None:
        law_file.save(Path(args.out), fitted, table={"source": Path(table.source).name, "rows": len(table)})
        lines += ["", f"written to {args.out}"]
    return facts, "\n".join(lines)


def predict(args: argparse.Namespace) -> Result:
    """What a run reaches, what each row of a table reaches, or the best run for a budget."""
    fitted = law_file.load(Path(args.law))
    shortcuts = {"parameters": ("--params", args.params), "tokens": ("--tokens", args.tokens)}
    shortcuts["unique_tokens"] = ("--unique", args.unique)
    if args.flops is not None:
        return _allocate(fitted, args)
    if args.table:
        return _predict_rows(fitted, args)
    inputs = asking.inputs(fitted, shortcuts, args.at, args.schedule, args.updates, override({}, args.set))
    prediction = fitted.predict(inputs)
    given = {name: float(values[0]) for name, values in inputs.items() if values.dtype != object}
    target = asking.law_of(fitted).TARGET
    facts = {"target": target.name, **given, **words.plain(prediction), "warnings": list(prediction.warnings)}
    return facts, words.prediction_text(prediction, target)


def _allocate(fitted: Fit | Blend, args: argparse.Namespace) -> Result:
    if args.params is not None or args.tokens is not None or args.at or args.table:
        raise UserError("say either --params and --tokens, or --table, or --flops, not two of them")
    if not is_of_runs(asking.law_of(fitted)):
        raise UserError(f"{args.law}: --flops needs a law of loss by size and tokens")
    if args.unique is not None:
        asking.check_read(asking.law_of(fitted), "unique_tokens", "--unique")
    budget = asking.count("--flops", args.flops)
    assert budget is not None, "asked for"
    found = optimal(
        fitted,
        budget,
        unique_tokens=asking.count("--unique", args.unique),
        max_parameters=asking.count("--max-params", args.max_params),
        inference_tokens=asking.count("--inference-tokens", args.inference_tokens) or 0.0,
    )
    return {**vars(found), "tokens_per_parameter": found.tokens_per_parameter}, words.allocation_text(found)


def _predict_rows(fitted: Fit | Blend, args: argparse.Namespace) -> Result:
    law = asking.law_of(fitted)
    table = LawTable.read(Path(args.table), law, args.columns, where=args.where, is_measured=False)
    prediction = fitted.predict({i.name: table.columns[i.name] for i in law.inputs if i.name in table.columns})
    measured = table.columns.get(law.TARGET.name)
    error = None if measured is None else 100 * float(np.nanmean(np.abs(prediction.mean / measured - 1)))
    rows = [{**table.cells(index), **words.plain(prediction, index)} for index in range(len(table))]
    facts = {"target": law.TARGET.name, "rows": rows, "mape": error, "warnings": list(prediction.warnings)}
    return facts, words.rows_text(rows, prediction, law.TARGET, error)


def plot(args: argparse.Namespace) -> Result:
    """Draws the law, with the rows of a table where one is given."""
    from perennial.scaling.plots import save_plot

    check_place(Path(args.out), [Path(path) for path in (args.law, args.table) if path])
    fitted = law_file.load(Path(args.law))
    read = partial(read_for, asking.law_of(fitted), mappings=args.columns, where=args.where)
    columns = read(Path(args.table)).columns if args.table else None
    save_plot(Path(args.out), fitted, columns)
    return {"plot": args.out}, f"written to {args.out}"


def ledger(args: argparse.Namespace) -> Result:
    """Adds finished runs to the ledger."""
    check_place(Path(args.out))
    added, known = ledgers.add(Path(args.out), [Path(run) for run in args.runs])
    facts = {"ledger": args.out, "added": added, "already_there": known}
    return facts, f"{args.out}: {added} rows added, {known} already there"
