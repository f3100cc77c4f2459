"""Continuing: from a checkpoint's lineage and new data to a recipe that updates the model without forgetting.

The defaults follow Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train LLMs" (arXiv
2403.08763): re-warm the learning rate, re-decay it, replay a share of what the parent consumed, at equal compute.
Every choice is written into the recipe with its reason. For a parent without lineage see `origin`.
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

from perennial.core.amounts import Amount, human, parse
from perennial.core.errors import UserError, nearest
from perennial.core.lineage import Lineage, StageRecord
from perennial.core.progress import Progress
from perennial.core.settings import override
from perennial.model import foreign
from perennial.model.foreign import TransformersConfig
from perennial.train import origin
from perennial.train.given_data import check_given, is_prepared, prepared
from perennial.train.origin import ESTIMATE, WARNING, Manner
from perennial.train.recipe import REPLAY, ParentFacts, Recipe, parse_recipe, read
from perennial.train.resolve import Parent, old_corpora, read_parent, relative_to

STRONG_SHIFT = 1.25
"""Ratio of the parent's bits per byte on the new data to those on its own above which a shift counts as strong.

Assumption: Ibrahim et al. call Pile -> SlimPajama weak, where a model of the Pile has 2.70 and 2.17 nats per token, a
ratio of 1.24; what shifts further than that gets the replay of a strong shift.
"""

WEAK_REPLAY, STRONG_REPLAY = 0.05, 0.25
"""Replay shares that Ibrahim et al. (section 6.2, tables 2-3) recommend for a weak and a strong shift."""

PEAK_EXPONENT = 0.7
"""The peak of the update is the parent's peak x (update tokens / parent tokens)^0.7, at most the parent's.

Assumption: one line through three published recipes: Ibrahim et al. 300B after 300B at 1x; TiC-LM (Li et al. 2025,
arXiv 2504.02107) 1B after 112B at 1/30; Reuse, Don't Retrain (Parmar et al. 2024, arXiv 2407.07263) 300B after 8T
at 1/10.
"""


@dataclass(frozen=True)
class Derived:
    """A derived recipe and why each value was chosen."""

    recipe: Recipe
    parent: Parent
    reasons: list[str] = field(default_factory=list)

    def header(self, command: str = "") -> str:
        """The reasons as YAML comments for the top of recipe.yaml."""
        source = "lineage" if self.parent.lineage.stages else "folder, which has no lineage,"
        reasons = [line for reason in self.reasons for line in textwrap.wrap(reason, 116, subsequent_indent="  ")]
        lines = [
            f"Derived from the parent's {source} by `perennial continue`.",
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
    schedule: str = "rewarm",
    optimizer_state: str = "keep",
    seed: int | None = None,
    facts: ParentFacts | None = None,
    settings: Sequence[str] = (),
    micro_batch: int | None = None,
    shift: Callable[[], tuple[float, float] | None] | None = None,
) -> Derived:
    """The recipe that continues `checkpoint` on prepared corpora `data` for `budget` ('2B tokens', '3 h', ...).

    replay: '25%', '0%' or None (chosen by the measured shift); stand_ins: corpora to mix in as old data instead of the
    lineage's; schedule: 'rewarm' (the default), 'constant' (stay at the final rate) or 'infinite'; facts: what is known
    of a parent that Perennial did not train; settings: 'key=value' texts that change the derived recipe; micro_batch:
    what was chosen before by the memory that was free then; shift: measures the parent's bits per byte on (old, new).
    Raises UserError.
    """
    facts, stand_ins = facts or ParentFacts(), stand_ins or {}
    _check_names(data, stand_ins)
    if peak is not None and not 0 < peak < math.inf:
        raise UserError(f"--peak {peak:g}: must be a learning rate above 0")
    if seed is not None and seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")
    amount = _budget(budget)
    parent = read_parent(checkpoint, facts)
    lineage, last = parent.lineage, parent.lineage.stages[-1] if parent.lineage.stages else None
    reasons = [_parent_line(lineage), *(origin.notes(lineage.origin) if lineage.origin else [])]
    if isinstance(parent.config, TransformersConfig):
        reasons += [f"model: {note}" for note in foreign.notes(parent.config)]
    if last:
        manner, how = _as_before(last, optimizer_state)
    else:
        assert lineage.origin is not None
        tokens = origin.budget_tokens(amount, lineage.origin.parameters, f"--tokens {budget!r}")
        manner, how = origin.first_manner(parent.config, tokens, origin.this_machine(), micro_batch=micro_batch)
    share = _replay_share(replay, parent, stand_ins, shift, reasons)

    def place(path: Path) -> str:
        return relative_to(path.resolve(), base.resolve())

    recipe: dict[str, Any] = {
        "name": name,
        "seed": manner.seed if seed is None else seed,
        "parent": place(checkpoint),
        **({"parent_facts": facts.model_dump(mode="json", exclude_none=True)} if facts.model_fields_set else {}),
        "corpora": {n: place(p) for n, p in {**data, **stand_ins}.items()},
        **({"stand_ins": list(stand_ins)} if stand_ins else {}),
        **({"moved": {n: place(p) for n, p in moved.items()}} if moved else {}),
        "stages": [
            {
                "name": "update",
                "budget": str(amount),
                "mixture": _mixture(data, share, stand_ins),
                "schedule": _schedule(schedule, lineage, amount, peak, reasons),
                "optimizer": manner.optimizer,
                "optimizer_state": manner.optimizer_state,
                "objective": manner.objective,
            }
        ],
        "batch": manner.batch,
        "clip": manner.clip,
        "document_mask": manner.document_mask,
    }
    reasons += [*how, *(f"set by the user: {assignment}" for assignment in settings)]
    final = parse_recipe(override(recipe, list(settings)), source="derived recipe")
    foreign.check_rows(parent.config, final.batch.sequence_length, "batch.sequence_length", "; lower it")
    return Derived(final, parent, reasons)


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


def _as_before(last: StageRecord, optimizer_state: str) -> tuple[Manner, list[str]]:
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
    optimizer = (last.optimizer, optimizer_state, last.objective)
    return Manner(last.seed + 1, batch, last.clip, last.document_mask, *optimizer), [reason]


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


def _budget(text: str) -> Amount:
    bare = re.fullmatch(r"[\d_,.]+[KkMBGT]?", text)  # the option's name says what it counts
    try:
        amount = parse(f"{text} tokens" if bare else text, ("tokens", "flops", "seconds"))
    except ValueError as error:
        raise UserError(f"--tokens: {error}") from None
    if amount.value == 0:
        raise UserError(f"--tokens {text!r}: must be above 0")
    return amount


def _replay_share(
    replay: str | None,
    parent: Parent,
    stand_ins: Mapping[str, Path],
    shift: Callable[[], tuple[float, float] | None] | None,
    reasons: list[str],
) -> float:
    begun_as = parent.lineage.origin.name if parent.lineage.origin else None
    if begun_as and not stand_ins and not any(c.get("stands_in") for c in parent.lineage.corpora.values()):
        reasons.append(origin.forgetting_warning(begun_as))
    is_known = bool(stand_ins) or any(s.sources for s in parent.lineage.stages)
    if replay is not None:
        try:
            share = parse(replay, ("share",)).value
        except ValueError as error:
            raise UserError(f"--replay: {error}") from None
        if share >= 1:
            raise UserError(f"--replay {replay}: must be below 100%, something new has to be learned")
        if share > 0 and not is_known:
            raise UserError(
                f"--replay {replay}: what {parent.path} was trained on is not known, so there is nothing to replay. "
                f"{origin.HOW_TO_REPLAY}"
            )
        reasons.append(f"replay {share:.4g}: asked for")
        return share
    if not is_known:
        reasons.append("replay 0%: the parent's data are unknown, and no stand-in is named")
        return 0.0
    measured = shift() if shift else None
    if measured is None:
        reasons.append(f"replay {WEAK_REPLAY:.0%}: the shift was not measured; {WEAK_REPLAY:.0%} suits a weak one")
        return WEAK_REPLAY
    old, new = measured
    strong = new / old > STRONG_SHIFT
    share = STRONG_REPLAY if strong else WEAK_REPLAY
    reasons.append(
        f"replay {share:.0%}: the parent has {new:.3f} bits per byte on the new data and {old:.3f} on "
        f"{'the stand-in' if stand_ins and not parent.lineage.stages else 'its own'}, a "
        f"{'strong' if strong else 'weak'} shift (ratio {new / old:.2f}, strong above {STRONG_SHIFT})"
    )
    return share


def _mixture(data: Mapping[str, Path], share: float, stand_ins: Mapping[str, Path]) -> dict[str, Any]:
    fresh = {n: (1 - share) / len(data) for n in data}
    if share == 0:
        return fresh
    if stand_ins:
        return {**fresh, **{n: share / len(stand_ins) for n in stand_ins}}
    return {**fresh, REPLAY: share}


def _schedule(name: str, lineage: Lineage, amount: Amount, peak: float | None, reasons: list[str]) -> dict[str, Any]:
    allowed = ["rewarm", "constant", "infinite"]
    left_at = lineage.rate
    if name not in allowed:
        hint = nearest(name, allowed)
        raise UserError(f"--schedule {name!r}: choose {', '.join(allowed)}; for another one write a recipe.{hint}")
    if name == "rewarm":
        peak = _peak(lineage, amount, reasons) if peak is None else peak
        final = min(left_at, peak)
        left = f"{left_at:.3g}, where the parent was left{origin.mark_of_rate(lineage)}"
        if lineage.origin and final == peak:
            final = origin.rounded(origin.FINAL_SHARE * peak)
            reasons.append(
                f"start at {left}; no re-warming: {origin.WHY_NOT_REWARM}; decay from {peak:.3g} to {final:.3g}"
            )
        else:
            reasons.append(f"re-warm from {left}, to {peak:.3g}; then decay to {final:.3g}")
        return {"name": "rewarm", "start": "parent", "peak": peak, "final": final, "warmup": "1%"}
    if peak is not None:
        raise UserError(f"--peak {peak:g}: has no use with --schedule {name}, which stays at the parent's rate")
    if left_at == 0:
        raise UserError(f"--schedule {name}: the parent was decayed to a learning rate of 0; use rewarm")
    if name == "constant":
        reasons.append(f"constant learning rate {left_at:.3g}: where the parent was left")
        return {"name": "constant", "peak": left_at}
    reasons.append(f"infinite: stays at {left_at:.3g}, where the parent was left, and anneals to a tenth at the end")
    flat = {"warmup": "0%", "cooldown": "0%", "anneal": "14%"}
    return {"name": "infinite", "start": "parent", "peak": left_at, "constant": left_at, "final": left_at / 10, **flat}


def _peak(lineage: Lineage, amount: Amount, reasons: list[str]) -> float:
    """The rate to re-warm to, by the size of the update; of a budget in FLOPs by its share of the FLOPs spent.

    The seconds of a model that began elsewhere are those that its FLOPs would have taken in the stages that are known.
    """
    seconds = sum(s.seconds for s in lineage.stages)
    if amount.unit == "seconds" and lineage.origin:
        seconds *= lineage.flops / sum(s.flops for s in lineage.stages)
    spent = {"tokens": lineage.tokens, "flops": lineage.flops, "seconds": seconds}
    ratio = min(1.0, amount.value / spent[amount.unit])
    least = lineage.rate if lineage.origin is None else max(lineage.rate, lineage.origin.rate.value)
    reasons.append(
        f"peak: the parent's {lineage.peak:.3g} x (update / parent)^{PEAK_EXPONENT}, "
        f"{human(amount.value)} / {human(spent[amount.unit], amount.unit)}, not below where it was left"
        + (f" before Perennial ({least:.3g})" if lineage.origin else "")
    )
    return max(least, lineage.peak * ratio**PEAK_EXPONENT)


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
    from perennial.core.lineage import newest_checkpoint
    from perennial.train.checkpoint import verify
    from perennial.train.run import check_place, make_run, plan, start, undone_on_error
    from perennial.train.workers import check_rows

    checkpoint, base, name = newest_checkpoint(checkpoint), Path.cwd(), out.resolve().name
    given = {**data, **(stand_ins or {})}
    check_place(out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (dry_run or not all(is_prepared(p) for p in given.values())):
        raise UserError("torchrun trains on prepared corpora: run `perennial prepare` (or --dry-run) without it first")
    # Preparing text may take hours, so all that can be wrong with what is asked for is found before.
    verify(checkpoint, checksums=False)
    choices["micro_batch"] = _chosen_before(out)
    asked = derive(checkpoint, data, stand_ins=stand_ins, budget=budget, base=base, name=name, **choices)
    if processes is not None:
        check_rows(processes, sequences=asked.recipe.batch.sequences, tensor=asked.recipe.parallel.tensor)
    check_given(checkpoint, given)
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        _announce(asked.reasons, quiet=quiet or dry_run)
    old = {n: corpus.path for n, corpus in old_corpora(asked.recipe, base, asked.parent).items()}
    old |= {n: path for n, path in given.items() if n in asked.parent.lineage.corpora and is_prepared(path)}
    with undone_on_error(out) if is_main else contextlib.nullcontext():
        how: dict[str, Any] = {"checkpoint": checkpoint, "out": out, "text_field": text_field}
        how |= {"validation": validation, "quiet": quiet}
        replayed = {n: prepared(n, p, against=list(old.values()), **how) for n, p in (stand_ins or {}).items()}
        known = [*old.values(), *replayed.values()]
        fresh = {n: prepared(n, p, against=known, **how) for n, p in data.items()}
        derived = derive(
            checkpoint,
            fresh,
            stand_ins=replayed,
            budget=budget,
            base=base,
            name=name,
            shift=lambda: _shift(checkpoint, old or replayed, fresh, asked.recipe.batch.sequence_length),
            **choices,
        )
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
        return result


def _chosen_before(out: Path) -> int | None:
    """The micro-batch of the run that an earlier call made: the free memory that decided it is not the same now."""
    return read(out / "recipe.yaml").batch.micro_batch if (out / "resolved.json").is_file() else None


def _announce(reasons: list[str], *, quiet: bool) -> None:
    """Says on standard error what must not be missed: warnings always, estimates unless `quiet`."""
    shown = (WARNING,) if quiet else (WARNING, ESTIMATE)
    with Progress("continue") as line:
        for reason in reasons:
            if reason.startswith(shown):
                line.note(textwrap.fill(reason, 100, subsequent_indent="  "))


def _shift(
    checkpoint: Path, old: Mapping[str, Path], new: Mapping[str, Path], length: int
) -> tuple[float, float] | None:
    """The parent's bits per byte on its own and on the new corpora (means), or None when its own cannot be read."""
    from perennial.train.measuring import evaluate_checkpoint

    if not old:
        return None
    corpora = evaluate_checkpoint(checkpoint, {**old, **new}, max_tokens=32768, sequence_length=length)["corpora"]
    means = [sum(corpora[n]["bits_per_byte"] for n in names) / len(names) for names in (old, new)]
    return means[0], means[1]
