"""Continuing: from a checkpoint's lineage and new data to a recipe that updates the model without forgetting.

The default follows Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train LLMs" (arXiv
2403.08763): re-warm the learning rate, re-decay it, replay a share of what the parent consumed, at equal compute. Other
ways are in `continuations`, and `choosing` picks one. Every choice is written into the recipe with its reason. For a
parent without lineage see `origin`.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perennial.core import plugins
from perennial.core.amounts import Amount, human, parse
from perennial.core.errors import UserError
from perennial.core.files import relative_to
from perennial.core.lineage import STATE_FOLDER, Lineage, StageRecord, has_lineage, newest_checkpoint
from perennial.core.lineage import read as read_lineage
from perennial.core.progress import Progress
from perennial.core.settings import override
from perennial.data.corpus import Corpus
from perennial.evals.shift import Shift
from perennial.model import foreign
from perennial.model.foreign import TransformersConfig, num_parameters
from perennial.train import choosing, origin
from perennial.train.around_the_run import average_with_parent, best_part, in_order
from perennial.train.continuations.base import Continuation, Planned, Situation
from perennial.train.corpora import old_corpora
from perennial.train.given_data import check_given, is_prepared, prepared_data
from perennial.train.origin import ESTIMATE, WARNING, Manner
from perennial.train.recipe import REPLAY, ParentFacts, Recipe, fewest_rows, parse_recipe, read
from perennial.train.shift import known_already, measured_shift, replay_share
from perennial.train.starting import Parent, read_parent


@dataclass(frozen=True)
class Derived:
    """A derived recipe and why each value was chosen."""

    recipe: Recipe
    parent: Parent
    reasons: list[str] = field(default_factory=list)
    continuation: str = "rewarm"
    """Name of the way of continuing, which was asked for or chosen."""
    component: Continuation | None = None
    """That way itself; None for a recipe that is no continuation of new text."""
    kept_tokens: float | None = None
    """How much of the new text it keeps, where it keeps a part; None: all of it, or not known yet."""
    command: str = "continue"
    """The command that derived it."""

    def header(self, command: str = "") -> str:
        """The reasons as YAML comments for the top of recipe.yaml."""
        source = "lineage" if self.parent.lineage.stages else "folder, which has no lineage,"
        reasons = [line for reason in self.reasons for line in textwrap.wrap(reason, 116, subsequent_indent="  ")]
        lines = [
            f"Derived from the parent's {source} by `perennial {self.command}`.",
            *([command] if command else []),
            "",
            *reasons,
        ]
        return "".join(f"# {line}".rstrip() + "\n" for line in lines) + "\n"


def derive(
    checkpoint: Path,
    data: Mapping[str, Path],
    *,
    budget: str,
    base: Path,
    name: str,
    replay: str | None = None,
    stand_ins: Mapping[str, Path] | None = None,
    moved: Mapping[str, Path] | None = None,
    peak: float | None = None,
    how: str | Mapping[str, Any] | None = None,
    schedule: str | None = None,
    also_measured: Mapping[str, Path] | None = None,
    objective: Mapping[str, Any] | None = None,
    optimizer_state: str = "keep",
    seed: int | None = None,
    facts: ParentFacts | None = None,
    settings: Sequence[str] = (),
    micro_batch: int | None = None,
    shift: Callable[[], Shift | None] | None = None,
) -> Derived:
    """The recipe that continues `checkpoint` on prepared corpora `data` for `budget` ('2B tokens', '3 h', ...).

    replay: '25%', '0%' or None (chosen by the measured shift); stand_ins: corpora to mix in as old data instead of the
    lineage's; how: the way of continuing, one of `perennial list continuations` or a mapping with its name and settings
    (None: chosen by lineage, shift and budget); schedule: a synonym of `how`; also_measured: further corpora whose
    losses are followed; objective: of every stage, in the place of the way's own; facts: what is known of a parent that
    Perennial did not train; settings: 'key=value' texts that change the derived recipe; micro_batch: what was chosen
    before by the memory that was free then; shift: measures the parent's losses on old and new. Raises UserError.
    """
    facts, stand_ins = facts or ParentFacts(), stand_ins or {}
    _check_names(data, stand_ins)
    if peak is not None and not 0 < peak < math.inf:
        raise UserError(f"--peak {peak:g}: must be a learning rate above 0")
    if seed is not None and seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")
    amount = budget_of(budget)
    parent = read_parent(checkpoint, facts)
    lineage, last = parent.lineage, parent.lineage.stages[-1] if parent.lineage.stages else None
    reasons = [_parent_line(lineage), *(origin.notes(lineage.origin) if lineage.origin else [])]
    if isinstance(parent.config, TransformersConfig):
        reasons += [f"model: {note}" for note in foreign.notes(parent.config)]
    if last:
        manner, why = as_before(last, optimizer_state)
    else:
        assert lineage.origin is not None
        tokens = origin.budget_tokens(amount, lineage.origin.parameters, f"--tokens {budget!r}")
        manner, why = origin.first_manner(parent.config, tokens, origin.this_machine(), micro_batch=micro_batch)
    reasons += known_already(data, parent)
    sizes = _training_tokens(data)
    is_chosen = how is None and schedule is None
    measure = shift if is_chosen or replay is None else None  # what nothing depends on is not measured
    share, measured, replay_reason = replay_share(replay, parent, stand_ins, measure, reasons)
    situation = Situation(
        lineage=lineage,
        budget=amount,
        fresh=tuple(data),
        replay=share,
        stand_ins=tuple(stand_ins),
        shift=measured,
        peak=peak,
        parameters=num_parameters(parent.config),
        batch_tokens=math.prod(_batch(manner.batch, settings)),
        batch_rows=_batch(manner.batch, settings)[0],
        fresh_tokens=sum(sizes) if sizes else None,
        fresh_shares=tuple(size / sum(sizes) for size in sizes),
        optimizer=manner.optimizer,
        has_moments=manner.optimizer_state == "keep" and holds_moments(parent.path),
        option="--schedule" if how is None and schedule is not None else "--recipe",
    )
    name_of_way, continuation, planned = _planned(how if how is not None else schedule, situation, reasons)
    reasons += [replay_reason, *planned.reasons]
    own = {"objective": dict(objective)} if objective else {}
    reasons += [f"objective: {', '.join(f'{k} {v}' for k, v in objective.items())}"] if objective else []
    evaluation = dict(planned.evaluation)

    def place(path: Path) -> str:
        return relative_to(path.resolve(), base.resolve())

    if also_measured:
        evaluation["corpora"] = {n: place(p) for n, p in also_measured.items()}
    recipe: dict[str, Any] = {
        "name": name,
        "seed": manner.seed if seed is None else seed,
        "parent": place(checkpoint),
        **({"parent_facts": facts.model_dump(mode="json", exclude_none=True)} if facts.model_fields_set else {}),
        "corpora": {n: place(p) for n, p in {**data, **stand_ins}.items()},
        **({"stand_ins": list(stand_ins)} if stand_ins else {}),
        **({"moved": {n: place(p) for n, p in moved.items()}} if moved else {}),
        "stages": [with_manner({**stage, **own}, manner) for stage in planned.stages],
        **({"evaluation": evaluation} if evaluation else {}),
        "batch": manner.batch,
        "clip": manner.clip,
        "document_mask": manner.document_mask,
    }
    reasons += [*why, *(f"set by the user: {assignment}" for assignment in settings)]
    final = parse_recipe(override(recipe, list(settings)), source="derived recipe")
    foreign.check_rows(parent.config, final.batch.sequence_length, "batch.sequence_length", "; lower it")
    return Derived(final, parent, reasons, name_of_way, continuation, continuation.kept_tokens(situation))


def _planned(given: Any, situation: Situation, reasons: list[str]) -> tuple[str, Continuation, Planned]:
    """Name and stages of the continuation that was asked for, or that suits; says in `reasons` why."""
    if given is None:
        given, why = choosing.choose(situation)
        reasons.append(why)
    else:
        reasons.append(f"recipe {given if isinstance(given, str) else given.get('name')}: asked for")
    name, continuation = choosing.named(given, situation.option)
    if situation.peak is not None and not continuation.USES_PEAK:
        raise UserError(
            f"--peak {situation.peak:g}: has no use with {situation.option} {name}, which has no peak to choose"
        )
    return name, continuation, continuation.plan(situation)


def with_manner(stage: dict[str, Any], manner: Manner) -> dict[str, Any]:
    """A stage with the optimizer and objective of the parent where the continuation does not decide them."""
    usual = {"optimizer": manner.optimizer, "optimizer_state": manner.optimizer_state, "objective": manner.objective}
    order = ("name", "budget", "mixture", "schedule")
    return {**{key: stage[key] for key in order}, **usual, **{k: v for k, v in stage.items() if k not in order}}


def _batch(batch: Mapping[str, int | None], settings: Sequence[str]) -> tuple[int, ...]:
    """Rows of an update and tokens of a row, as the derived recipe will have them after the user's `settings`."""
    changed = override({"batch": dict(batch)}, [s for s in settings if s.startswith("batch.")])["batch"]
    sizes = [changed.get(key) for key in ("sequences", "sequence_length")]
    return tuple(size if isinstance(size, int) and size > 0 else 1 for size in sizes)  # what is wrong is said later


def holds_moments(checkpoint: Path) -> bool:
    """Whether an optimizer's state lies beside a checkpoint's weights; a merged model, for one, has none."""
    return any((checkpoint / STATE_FOLDER).glob("optimizer*"))


def _training_tokens(data: Mapping[str, Path]) -> tuple[float, ...]:
    """Training tokens of each of the new corpora; nothing while one of them is raw text."""
    if not all(is_prepared(path) for path in data.values()):
        return ()
    return tuple(float(Corpus.open(path).train.num_tokens) for path in data.values())


def _parent_line(lineage: Lineage) -> str:
    begun_as = lineage.origin
    if begun_as and not lineage.stages:
        size = f"{human(begun_as.parameters)} parameters, {begun_as.through}"
        return f"parent: {begun_as.name}, {size}, weights {lineage.checkpoint}; Perennial did not train it"
    return (
        f"parent: {lineage.checkpoint}, {human(lineage.tokens, 'tokens')}, {lineage.flops:.3g} FLOPs, "
        f"learning rate left at {lineage.rate:.3g} (peak {lineage.peak:.3g})"
        + (f", with what came before Perennial, as {begun_as.name}:" if begun_as else "")
    )


def as_before(last: StageRecord, optimizer_state: str) -> tuple[Manner, list[str]]:
    """The manner of the parent's last stage, and why."""
    reason = (
        f"batch, clip, document mask, objective and optimizer: as in the parent's last stage '{last.stage}'; "
        f"the optimizer's state: {optimizer_state}"
    )
    batch = {
        "sequences": last.batch_tokens // last.sequence_length,
        "sequence_length": last.sequence_length,
        "micro_batch": last.micro_batch,
    }
    built, _ = plugins.build("objectives", last.objective)
    objective: Any = last.objective
    if built is not None and built.checkpoints():
        objective = "next_token"
        reason += "; objective next_token, because the teacher of then is not the parent of now"
    how = (last.optimizer, optimizer_state, objective)
    return Manner(last.seed + 1, batch, last.clip, last.document_mask, *how), [reason]


def _check_names(data: Mapping[str, Path], stand_ins: Mapping[str, Path]) -> None:
    if not data:
        raise UserError("--data: at least one NAME=PATH with new data is needed")
    for name in [*data, *stand_ins]:
        if name == REPLAY or "/" in name:
            raise UserError(
                f"'{name}' cannot be the name of a corpus: '{REPLAY}' and names with '/' stand for replayed data"
            )
    for name in stand_ins:
        if name in data:
            raise UserError(f"'{name}' is given both as new data and as replay")


def budget_of(text: str) -> Amount:
    """The budget in a text such as '2B tokens', '3 h' or '2B', which counts tokens. Raises UserError."""
    bare = re.fullmatch(r"[\d_,.]+[KkMBGT]?", text)  # the option's name says what it counts
    try:
        amount = parse(f"{text} tokens" if bare else text, ("tokens", "flops", "seconds"))
    except ValueError as error:
        raise UserError(f"--tokens: {error}") from None
    if amount.value == 0:
        raise UserError(f"--tokens {text!r}: must be above 0")
    return amount


def starting_checkpoint(path: Path, how: Any = None, option: str = "--recipe") -> Path:
    """The checkpoint to continue: the newest of a run folder, or the one before its decay where the trunk goes on.

    `how`: as for `derive`, given with `option`; a checkpoint that is named itself is taken as it is.
    """
    newest = newest_checkpoint(path)
    wants_trunk = how is None or choosing.named(how, option)[1].ON_TRUNK
    if newest == path or not wants_trunk or not has_lineage(newest):
        return newest
    lineage = read_lineage(newest)
    trunk = newest.with_name(str(int(newest.name) - lineage.branch_tokens))
    return trunk if lineage.is_branch and trunk.is_dir() else newest


def continue_run(
    checkpoint: Path,
    data: Mapping[str, Path],
    *,
    budget: str,
    out: Path,
    dry_run: bool = False,
    text_field: str = "text",
    validation: str = "1%",
    stand_ins: Mapping[str, Path] | None = None,
    command: str = "",
    quiet: bool = False,
    processes: int | None = None,
    **choices: Any,
) -> dict[str, Any]:
    """Prepares raw data, derives the recipe into `out` and (unless `dry_run`) runs it: `perennial continue`.

    processes: how many will train; the run is then made and left to them (see `launch`). `choices` are those of
    `derive`. Running the same call again resumes. Returns {'recipe', 'resolved', 'reasons', 'result'} as far as it
    went; a dry run leaves `out` without a run in it.
    """
    from perennial.train.checkpoint import verify
    from perennial.train.run import check_place, make_run, plan, start, undone_on_error
    from perennial.train.workers import check_rows

    chosen = choices.get("how") or choices.get("schedule")
    checkpoint = starting_checkpoint(checkpoint, chosen, "--recipe" if choices.get("how") else "--schedule")
    base, name = Path.cwd(), out.resolve().name
    given = {**data, **(stand_ins or {})}
    check_place(out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (dry_run or not all(is_prepared(p) for p in given.values())):
        raise UserError("torchrun trains on prepared corpora: run `perennial prepare` (or --dry-run) without it first")
    # Preparing text may take hours, so all that can be wrong with what is asked for is found before.
    verify(checkpoint, checksums=False)
    choices["micro_batch"] = _chosen_before(out)
    asked = derive(checkpoint, data, stand_ins=stand_ins, budget=budget, base=base, name=name, **choices)
    way = asked.component
    averages, selects = way is not None and way.AVERAGES, way is not None and way.SELECTS
    arrangement = way.arrangement() if way else None
    if averages and (processes is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise UserError(
            f"--recipe {asked.continuation}: runs in one process; with several, average the finished run with "
            "`perennial merge PARENT RUN --out DIR`"
        )
    if processes is not None:
        check_rows(processes, sequences=fewest_rows(asked.recipe), tensor=asked.recipe.parallel.tensor)
    check_given(checkpoint, given)
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        _announce(asked.reasons, quiet=quiet or dry_run)
    old = old_data(asked, given, base)
    with undone_on_error(out) if is_main else contextlib.nullcontext():
        how: dict[str, Any] = {"checkpoint": checkpoint, "out": out, "text_field": text_field}
        how |= {"validation": validation, "quiet": quiet}
        replayed, fresh = prepared_data(data, stand_ins or {}, old, how)
        known = [*old.values(), *replayed.values()]
        if selects:
            whole = derive(checkpoint, fresh, stand_ins=replayed, budget=budget, base=base, name=name, **choices)
            choices["also_measured"] = fresh
            fresh = best_part(checkpoint, fresh, whole.kept_tokens, {**how, "against": known})
        elif arrangement:
            budgets = [stage.budget for stage in asked.recipe.stages]
            read = sum(b.value for b in budgets) if all(b.unit == "tokens" for b in budgets) else None
            whole_text, fresh = fresh, in_order(checkpoint, fresh, arrangement, read, {**how, "against": known})
            choices["also_measured"] = {n: p for n, p in whole_text.items() if n not in fresh}
        derived = derive(
            checkpoint,
            fresh,
            stand_ins=replayed,
            budget=budget,
            base=base,
            name=name,
            shift=lambda: measured_shift(checkpoint, old, replayed, fresh, asked.recipe.batch.sequence_length),
            **choices,
        )
        if is_main and not dry_run:
            _announce(derived.reasons, quiet=quiet, shown=("recipe ",))
        result: dict[str, Any] = {
            "recipe": derived.recipe.model_dump(mode="json", exclude_unset=True),
            "reasons": derived.reasons,
        }
        if dry_run:
            result["resolved"] = plan(derived.recipe, base=base, processes=processes)
            return result
        if processes is not None:
            make_run(derived.recipe, out, base=base, header=derived.header(command), processes=processes)
            return result
        result["result"] = start(derived.recipe, out, base=base, header=derived.header(command), quiet=quiet)
    if averages and result["result"]["complete"] and is_main:
        result["averaged"] = average_with_parent(out, checkpoint, old or replayed, fresh, quiet=quiet)
    return result


def old_data(asked: Derived, given: Mapping[str, Path], base: Path) -> dict[str, Path]:
    """Where the corpora lie that the parent consumed, those included that are given once more."""
    old = {n: corpus.path for n, corpus in old_corpora(asked.recipe, base, asked.parent).items()}
    return old | {n: path for n, path in given.items() if n in asked.parent.lineage.corpora and is_prepared(path)}


def _chosen_before(out: Path) -> int | None:
    """The micro-batch of the run that an earlier call made: the free memory that decided it is not the same now."""
    return read(out / "recipe.yaml").batch.micro_batch if (out / "resolved.json").is_file() else None


def _announce(reasons: list[str], *, quiet: bool, shown: tuple[str, ...] = (ESTIMATE,)) -> None:
    """Says on standard error what must not be missed: warnings always (once), what begins as `shown` unless `quiet`."""
    shown = (() if quiet else shown) + ((WARNING,) if ESTIMATE in shown else ())
    with Progress("continue") as line:
        for reason in reasons:
            if reason.startswith(shown):
                line.note(textwrap.fill(reason, 100, subsequent_indent="  "))
