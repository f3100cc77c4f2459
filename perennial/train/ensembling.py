"""Several continuations of one parent, measured together and distilled back into one model: `continue --ensemble`.

    OUT-1 ... OUT-K   the members: ordinary run folders that differ in their seeds, so in the order of their data
    OUT               the distilled model: from the parent once more, on the same data, taught by all the members

Each of the K + 1 runs is trained for the whole budget; their FLOPs, with those of the teachers' forward passes, are
added up in the event `ensemble` at the end of OUT's records, beside the losses of the members together. The same call
resumes wherever it was stopped.
Formula: ensemble: p = mean over the members of their probabilities; taught: objective `distillation` with the
    members as teachers, weight x cross entropy to p + (1 - weight) x next-token loss.
Source: Kim, Kotha, Liang and Hashimoto 2025, "Pre-training under infinite compute", arXiv 2509.14786: on little text
    the loss of K models together falls towards its limit like 1 / K, and one model can be taught most of it; for
    continued pre-training they took 4 members.
Differs: the student learns on the text itself, they mix in text that the teachers generate (75 to 90% of it). It is
    taught on new text only: on replayed rows the members would teach it what they have forgotten.
Limits: the members are held in memory, whole, while the student is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from perennial.core import records
from perennial.core.errors import UserError
from perennial.core.files import relative_to
from perennial.core.lineage import newest_checkpoint
from perennial.core.lineage import read as read_lineage
from perennial.core.progress import Progress
from perennial.core.settings import Settings, check, raise_problems
from perennial.train import continuing
from perennial.train.continuing import Derived, derive, old_data, starting_checkpoint
from perennial.train.given_data import check_given, prepared_data

EVENT = "ensemble"


class Ensemble(Settings):
    """How many continuations, and how the model that learns from them is taught."""

    members: Annotated[int, Field(ge=2, le=64)]
    """Continuations that are trained; the gain of one more falls like 1 / members^2."""
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the members' predictions in the loss of the model that is taught, on rows of new text."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Above 1 the unlikely tokens count for more."""


def ensemble_of(text: str) -> Ensemble:
    """The settings in '4', or in '{members: 4, weight: 0.9}'. Raises UserError."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--ensemble {text!r}: not a mapping in YAML: {error}") from None
    ensemble, problems = check(Ensemble, data if isinstance(data, dict) else {"members": data})
    raise_problems(problems, f"--ensemble {text}")
    assert ensemble is not None
    return ensemble


def continue_ensemble(
    checkpoint: Path,
    data: Mapping[str, Path],
    ensemble: Ensemble,
    *,
    out: Path,
    run: Callable[..., dict[str, Any]] = continuing.continue_run,
    dry_run: bool = False,
    stand_ins: Mapping[str, Path] | None = None,
    text_field: str = "text",
    validation: str = "1%",
    quiet: bool = False,
    command: str = "",
    **choices: Any,
) -> dict[str, Any]:
    """Trains the members, measures them together, and teaches the model in `out`; what is done already is kept.

    run: continues in one folder, as `continuing.continue_run` does; the rest is what that takes. Returns what it
    returns for the model that is taught, with 'ensemble' (see `EVENT`); for a member where one was stopped, and for the
    first member of a dry run.
    """
    from perennial.train.run import check_place, undone_on_error
    from perennial.train.workers import under_torchrun

    if under_torchrun():
        raise UserError(
            "--ensemble: makes many runs, one after the other; start it with --processes N, not in torchrun"
        )
    how = choices.get("how") or choices.get("schedule")
    checkpoint = starting_checkpoint(checkpoint, how, "--recipe" if choices.get("how") else "--schedule")
    base, given = Path.cwd(), {**data, **(stand_ins or {})}
    folders = [out.with_name(f"{out.name}-{number}") for number in range(1, ensemble.members + 1)]
    for folder in (*folders, out):
        check_place(folder)
    asked = derive(checkpoint, data, stand_ins=stand_ins, base=base, name=out.resolve().name, **choices)
    _check_way(asked)
    check_given(checkpoint, given)
    with undone_on_error(out):
        preparing = {"checkpoint": checkpoint, "out": out, "text_field": text_field, "validation": validation}
        replayed, fresh = prepared_data(
            data, stand_ins or {}, old_data(asked, given, base), {**preparing, "quiet": quiet}
        )
    choices |= {"stand_ins": replayed, "quiet": quiet, "command": command}
    seeds = [asked.recipe.seed + number for number in range(ensemble.members + 1)]
    for number, (folder, seed) in enumerate(zip(folders, seeds, strict=False), 1):
        _say(f"member {number} of {ensemble.members}: {folder}, seed {seed}", quiet=quiet or dry_run)
        result = run(checkpoint, fresh, out=folder, dry_run=dry_run, **{**choices, "seed": seed})
        if dry_run:
            return result | {"reasons": [*result["reasons"], _announced(result["resolved"], ensemble, out)]}
        if not result["result"]["complete"] or result["result"].get("asked_to_stop"):
            return result
    together = _measured(folders)
    _say(_in_words(together), quiet=quiet)
    teachers = [relative_to(folder.resolve(), base.resolve()) for folder in folders]
    objective = {"name": "distillation", "teacher": teachers, "rows": list(fresh)}
    objective |= ensemble.model_dump(exclude={"members"})
    _say(f"taught by all {ensemble.members}: {out}, seed {seeds[-1]}", quiet=quiet)
    result = run(checkpoint, fresh, out=out, **{**choices, "seed": seeds[-1], "objective": objective})
    if result["result"]["complete"]:
        result[EVENT] = _recorded(out, folders, together)
    return result


def _check_way(asked: Derived) -> None:
    """Raises UserError for a way of continuing that is more than one run on all of the new text."""
    way = asked.component
    if way is not None and (way.AVERAGES or way.SELECTS or way.arrangement()):
        what = "averages its run with the parent" if way.AVERAGES else "trains on a part of the new text at a time"
        raise UserError(f"--ensemble: does not go with --recipe {asked.continuation}, which {what}")


def _say(words: str, *, quiet: bool) -> None:
    with Progress(EVENT, quiet=quiet) as line:
        line.note(f"ensemble: {words}")


def _announced(resolved: Any, ensemble: Ensemble, out: Path) -> str:
    """What a dry run says of the whole."""
    read = sum(stage.tokens * s["weight"] for stage in resolved.stages for s in stage.sources if s["role"] == "fresh")
    taught = 1 + read / resolved.tokens * ensemble.members / 3  # a teacher's forward pass is a third of an update
    return (
        f"ensemble: this is the first of {ensemble.members} members ({out.name}-1 and so on), which differ in their "
        f"seeds; {out.name} then learns from all of them, {ensemble.weight:g} of its loss on new text being what they "
        f"predict; in all {(ensemble.members + taught) * resolved.flops:.3g} FLOPs"
    )


def _measured(folders: Sequence[Path]) -> dict[str, Any]:
    """The losses of the members together, on what and how each of them was validated."""
    from perennial.train.measuring import evaluate_checkpoint
    from perennial.train.run import read_resolved

    first = read_resolved(folders[0])
    names = _ended(folders[0])["evaluation"]["after"]
    checkpoints = [newest_checkpoint(folder) for folder in folders]
    found = evaluate_checkpoint(
        checkpoints[0],
        {name: Path(first.corpora[name]["path"]) for name in names},
        max_tokens=first.evaluation_tokens,
        sequence_length=first.batch.sequence_length,
        precision=first.precision,
        document_mask=first.document_mask,
        ensemble=checkpoints[1:],
    )
    members = [_ended(folder)["evaluation"]["after"] for folder in folders]
    return {"corpora": found[EVENT]["corpora"], "members": members}


def _ended(folder: Path) -> dict[str, Any]:
    """What the records of a finished run say at its end."""
    return records.read(folder / "events.jsonl", "done")[-1]


def _in_words(together: Mapping[str, Any]) -> str:
    told = []
    for name, losses in together["corpora"].items():
        alone = [member[name]["nats_per_token"] for member in together["members"]]
        told.append(f"{name} {losses['nats_per_token']:.3f} (the members {min(alone):.3f} to {max(alone):.3f})")
    return f"all together, nats per token: {', '.join(told)}"


def _recorded(out: Path, folders: Sequence[Path], together: Mapping[str, Any]) -> dict[str, Any]:
    """The event of the ensemble in the records of the model it has taught, which is written once."""
    events = out / "events.jsonl"
    if not records.read(events, EVENT):
        ended = [_ended(folder) for folder in folders]
        members = [
            {
                "run": folder.name,
                "checkpoint": read_lineage(newest_checkpoint(folder)).checkpoint,
                **{key: done[key] for key in ("tokens", "flops", "seconds")},
                "corpora": done["evaluation"]["after"],
            }
            for folder, done in zip(folders, ended, strict=True)
        ]
        taught = _ended(out)
        recorder = records.Recorder(events)
        recorder.write(
            EVENT,
            tokens=taught["tokens"],
            members=members,
            corpora=together["corpora"],
            taught=taught["evaluation"]["after"],
            flops=sum(done["flops"] for done in (*ended, taught)),
        )
        recorder.close()
    return records.read(events, EVENT)[-1]


def to_text(found: Mapping[str, Any]) -> str:
    """The losses of parent, members, ensemble and taught model, and what it all cost, for a person."""
    names = list(found["corpora"])
    rows = {member["run"]: member["corpora"] for member in found["members"]}
    rows |= {f"all {len(rows)} together": found["corpora"], "taught by them": found["taught"]}
    width = max(map(len, rows))
    lines = ["nats per token".ljust(width) + "".join(f"{name:>12}" for name in names)]
    lines += [
        label.ljust(width) + "".join(f"{losses[name]['nats_per_token']:12.4f}" for name in names)
        for label, losses in rows.items()
    ]
    return "\n".join([*lines, f"in all {found['flops']:.3g} FLOPs"])
