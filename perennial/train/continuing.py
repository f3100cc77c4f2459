"""Continuing: from a checkpoint's lineage and new data to a recipe that updates the model without forgetting.

The defaults follow Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train LLMs" (arXiv
2403.08763): re-warm the learning rate, re-decay it, replay a share of what the parent consumed, at equal compute.
Every choice is written into the recipe with its reason.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perennial.core.amounts import Amount, human, parse
from perennial.core.errors import UserError, nearest
from perennial.core.lineage import Lineage
from perennial.core.settings import check, raise_problems
from perennial.data.corpus import Corpus
from perennial.train.recipe import REPLAY, Recipe, parse_recipe
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
        lines = [
            "Derived from the parent's lineage by `perennial continue`.",
            *([command] if command else []),
            "",
            *self.reasons,
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
    shift: Callable[[], tuple[float, float] | None] | None = None,
) -> Derived:
    """The recipe that continues `checkpoint` on prepared corpora `data` for `budget` ('2B tokens', '3 h', ...).

    replay: '25%', '0%' or None (chosen by the measured shift); stand_ins: corpora to mix in as old data instead of the
    lineage's; schedule: 'rewarm' (the default), 'constant' (stay at the final rate) or 'infinite'; shift: measures the
    parent's bits per byte on (old, new). Raises UserError.
    """
    parent = read_parent(checkpoint)
    _check_names(data, stand_ins or {})
    if peak is not None and not 0 < peak < math.inf:
        raise UserError(f"--peak {peak:g}: must be a learning rate above 0")
    if seed is not None and seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")
    amount = _budget(budget)
    last = parent.lineage.stages[-1]
    reasons: list[str] = [
        f"parent: {parent.lineage.checkpoint}, {human(parent.lineage.tokens, 'tokens')}, "
        f"{parent.lineage.flops:.3g} FLOPs, "
        f"learning rate left at {parent.lineage.rate:.3g} (peak {parent.lineage.peak:.3g})"
    ]
    share = _replay_share(replay, parent, stand_ins or {}, shift, reasons)
    mixture = _mixture(data, share, stand_ins or {})
    recipe = {
        "name": name,
        "seed": last.seed + 1 if seed is None else seed,
        "parent": relative_to(checkpoint.resolve(), base.resolve()),
        "corpora": {n: relative_to(p.resolve(), base.resolve()) for n, p in {**data, **(stand_ins or {})}.items()},
        **({"moved": {n: relative_to(p.resolve(), base.resolve()) for n, p in moved.items()}} if moved else {}),
        "stages": [
            {
                "name": "update",
                "budget": str(amount),
                "mixture": mixture,
                "schedule": _schedule(schedule, parent.lineage, amount, peak, reasons),
                "optimizer": last.optimizer,
                "optimizer_state": optimizer_state,
                "objective": last.objective,
            }
        ],
        "batch": {
            "sequences": last.batch_tokens // last.sequence_length,
            "sequence_length": last.sequence_length,
            "micro_batch": last.micro_batch,
        },
        "clip": last.clip,
        "document_mask": last.document_mask,
    }
    reasons.append(
        f"batch, clip, document mask, objective and optimizer: as in the parent's last stage '{last.stage}'; "
        f"the optimizer's state: {optimizer_state}"
    )
    return Derived(parse_recipe(recipe, source="derived recipe"), parent, reasons)


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
    try:
        amount = parse(text, ("tokens", "flops", "seconds"))
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
    if replay is not None:
        try:
            share = parse(replay, ("share",)).value
        except ValueError as error:
            raise UserError(f"--replay: {error}") from None
        if share >= 1:
            raise UserError(f"--replay {replay}: must be below 100%, something new has to be learned")
        reasons.append(f"replay {share:.4g}: asked for")
        return share
    if not stand_ins and not any(s.sources for s in parent.lineage.stages):
        reasons.append(
            "replay 0%: the parent's data are unknown; expect forgetting, or name a stand-in with --replay NAME=PATH"
        )
        return 0.0
    measured = shift() if shift else None
    if measured is None:
        reasons.append(f"replay {WEAK_REPLAY:.0%}: the shift was not measured; {WEAK_REPLAY:.0%} suits a weak one")
        return WEAK_REPLAY
    old, new = measured
    strong = new / old > STRONG_SHIFT
    share = STRONG_REPLAY if strong else WEAK_REPLAY
    reasons.append(
        f"replay {share:.0%}: the parent has {new:.3f} bits per byte on the new data and {old:.3f} on its own, a "
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
        reasons.append(
            f"re-warm from {left_at:.3g}, where the parent was left, to {peak:.3g}; then decay to {final:.3g}"
        )
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
    """The rate to re-warm to, by the size of the update; of a budget in FLOPs by its share of the FLOPs spent."""
    spent = {"tokens": lineage.tokens, "flops": lineage.flops, "seconds": sum(s.seconds for s in lineage.stages)}
    ratio = min(1.0, amount.value / spent[amount.unit])
    reasons.append(
        f"peak: the parent's {lineage.peak:.3g} x (update / parent)^{PEAK_EXPONENT}, "
        f"{human(amount.value)} / {human(spent[amount.unit], amount.unit)}, not below where it was left"
    )
    return max(lineage.rate, lineage.peak * ratio**PEAK_EXPONENT)


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
    **choices: Any,
) -> dict[str, Any]:
    """Prepares raw data, derives the recipe into `out` and (unless `dry_run`) runs it: `perennial continue`.

    `choices` are those of `derive`. Running the same call again resumes. Returns {'recipe', 'resolved', 'reasons',
    'result'}; a dry run leaves `out` without a run in it.
    """
    from perennial.core.lineage import newest_checkpoint
    from perennial.train.checkpoint import verify
    from perennial.train.run import check_place, plan, start, undone_on_error

    checkpoint, base, name = newest_checkpoint(checkpoint), Path.cwd(), out.resolve().name
    given = {**data, **(stand_ins or {})}
    check_place(out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (dry_run or not all(_is_prepared(p) for p in given.values())):
        raise UserError("torchrun trains on prepared corpora: run `perennial prepare` (or --dry-run) without it first")
    # Preparing text may take hours, so all that can be wrong with what is asked for is found before.
    verify(checkpoint, checksums=False)
    asked = derive(checkpoint, data, stand_ins=stand_ins, budget=budget, base=base, name=name, **choices)
    _check_inputs(checkpoint, given)
    old = {n: corpus.path for n, corpus in old_corpora(asked.recipe, base, asked.parent).items()}
    old |= {n: path for n, path in given.items() if n in asked.parent.lineage.corpora and _is_prepared(path)}
    with undone_on_error(out) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
        prepared = {
            n: _prepared(n, p, checkpoint, out, text_field, validation, list(old.values()), quiet)
            for n, p in given.items()
        }
        derived = derive(
            checkpoint,
            {n: prepared[n] for n in data},
            stand_ins={n: prepared[n] for n in stand_ins or {}},
            budget=budget,
            base=base,
            name=name,
            shift=lambda: _shift(checkpoint, old, {n: prepared[n] for n in data}),
            **choices,
        )
        result: dict[str, Any] = {
            "recipe": derived.recipe.model_dump(mode="json", exclude_unset=True),
            "reasons": derived.reasons,
        }
        if dry_run:
            result["resolved"] = plan(derived.recipe, base=base)
            return result
        result["result"] = start(derived.recipe, out, base=base, header=derived.header(command), quiet=quiet)
        return result


def _check_inputs(checkpoint: Path, data: Mapping[str, Path]) -> None:
    """Raises UserError for a damaged checkpoint, and for data that are neither text nor corpora of its tokenizer."""
    from perennial.train.checkpoint import verify
    from perennial.train.measuring import open_for

    verify(checkpoint)
    for name, path in data.items():
        if (path / "resolved.json").is_file() or (path / "model.safetensors").is_file():
            raise UserError(f"{name}={path}: this is a run or a checkpoint, not text or a prepared corpus")
        if not path.exists() and not _is_being_prepared(path):
            raise UserError(f"{name}={path}: no such file or folder")
    open_for(checkpoint, {n: p for n, p in data.items() if _is_prepared(p) or _is_being_prepared(p)})


def _is_prepared(path: Path) -> bool:
    return (path / "manifest.json").is_file()


def _is_being_prepared(path: Path) -> bool:
    return path.suffix == ".partial" or path.with_name(f"{path.name}.partial").exists()


def _prepared(
    name: str,
    path: Path,
    checkpoint: Path,
    out: Path,
    text_field: str,
    validation: str,
    against: list[Path],
    quiet: bool,
) -> Path:
    """`path` when it is a prepared corpus; else its text prepared into OUT/corpora/NAME with the parent's tokenizer."""
    from perennial.core.progress import Progress
    from perennial.data.prepare import PrepareSettings, prepare

    if _is_prepared(path):
        return path
    asked = {
        "name": name,
        "inputs": [str(path)],
        "tokenizer": str(checkpoint),
        "text_field": text_field,
        "validation": validation,
        "against": [str(p) for p in against],
        **_cut_like(against),
    }
    settings, problems = check(PrepareSettings, asked)
    raise_problems(problems, f"preparing {name}={path}")
    assert settings is not None
    folder = out / "corpora" / name
    with Progress(f"prepare {name}", unit="bytes", quiet=quiet) as line:
        prepare(settings, folder, progress=line)
    return folder


def _cut_like(corpora: list[Path]) -> dict[str, Any]:
    """The size at which the parent's documents were cut: duplicates are found part by part."""
    for path in corpora:
        settings = Corpus.open(path).manifest.get("settings", {})
        if "max_document_bytes" in settings:
            return {"max_document_bytes": settings["max_document_bytes"]}
    return {}


def _shift(checkpoint: Path, old: Mapping[str, Path], new: Mapping[str, Path]) -> tuple[float, float] | None:
    """The parent's bits per byte on its own and on the new corpora (means), or None when its own cannot be read."""
    from perennial.train.measuring import evaluate_checkpoint

    if not old:
        return None
    corpora = evaluate_checkpoint(checkpoint, {**old, **new}, max_tokens=32768)["corpora"]
    means = [sum(corpora[n]["bits_per_byte"] for n in names) / len(names) for names in (old, new)]
    return means[0], means[1]
