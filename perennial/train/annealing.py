"""A decay branch off a trunk: the model that a stable checkpoint would be if training ended now.

The branch is trained on the trunk's own mixture, which goes on where the trunk stopped, with the trunk's optimizer and
its state, from the learning rate where the trunk stands down to a floor. The trunk is left as it is: it can go on from
its own checkpoint (`perennial continue TRUNK --recipe infinite`, or `wsd`), or from the branch (`--recipe wsd_s`).
Lineage tells a branch by the schedule of its last stage.

Source: Hu et al. 2024, MiniCPM, arXiv 2404.06395, section 4; Haegele et al. 2024, arXiv 2405.18392, section 3; Ibrahim
et al. 2024, arXiv 2403.08763, section 7.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perennial.core.amounts import human
from perennial.core.errors import UserError
from perennial.core.files import relative_to
from perennial.core.lineage import Lineage, StageRecord
from perennial.core.settings import override
from perennial.data.replay import REPLAY as REPLAYED
from perennial.train.continuations.base import ANNEAL, stands_on_trunk
from perennial.train.continuing import Derived, as_before, budget_of, holds_moments, starting_checkpoint, with_manner
from perennial.train.recipe import REPLAY, parse_recipe
from perennial.train.starting import read_parent


def derive_anneal(
    checkpoint: Path,
    *,
    budget: str,
    base: Path,
    name: str,
    final: str = "0%",
    shape: str = "sqrt",
    moved: Mapping[str, Path] | None = None,
    seed: int | None = None,
    settings: Sequence[str] = (),
) -> Derived:
    """The recipe of the branch. Raises UserError for a checkpoint that nothing can be branched off.

    final: the learning rate at the end, '10%' of where the trunk stands or '3e-5'; shape: as in the schedule `anneal`;
    moved: where corpora of the trunk lie now.
    """
    amount, parent = budget_of(budget), read_parent(checkpoint)
    lineage = parent.lineage
    whole = [s for s in lineage.stages if s.new_rows is None]
    if not whole:
        raise UserError(
            f"{checkpoint}: was not trained by Perennial, so it is not known on what mixture and with what optimizer "
            "it would go on; `perennial continue` with --recipe reuse decays it on data that you name"
        )
    if lineage.rate == 0:
        raise UserError(f"{checkpoint}: was decayed to a learning rate of 0 already; anneal the checkpoint before that")
    last = whole[-1]
    manner, why = as_before(last, "keep")
    mixture, corpora, stand_ins = trunk_mixture(last, lineage)

    def place(path: Path) -> str:
        return relative_to(path.resolve(), base.resolve())

    elsewhere = dict(moved or {})
    stage = {
        "name": ANNEAL,
        "budget": str(amount),
        "mixture": mixture,
        "schedule": {"name": "anneal", "start": "parent", "final": _level(final), "shape": shape},
        "max_epochs": max([4.0, *(s["max_epochs"] for s in last.sources if s.get("max_epochs"))]),
    }
    recipe: dict[str, Any] = {
        "name": name,
        "seed": last.seed if seed is None else seed,
        "parent": place(checkpoint),
        "corpora": {n: place(elsewhere.pop(n, path)) for n, path in corpora.items()},
        **({"stand_ins": stand_ins} if stand_ins else {}),
        **({"moved": {n: place(p) for n, p in elsewhere.items()}} if elsewhere else {}),
        "stages": [with_manner(stage, manner)],
        "batch": manner.batch,
        "clip": manner.clip,
        "document_mask": manner.document_mask,
    }
    reasons = [
        f"anneal: a branch of {amount} off {lineage.checkpoint}, which has seen {human(lineage.tokens, 'tokens')}",
        f"learning rate: from {lineage.rate:.3g}, where it stands, to {final} ({shape})",
        f"mixture: as in the trunk's last stage '{last.stage}', going on where it stopped",
        *why,
        *_warnings(checkpoint, lineage),
        *(f"set by the user: {assignment}" for assignment in settings),
    ]
    final_recipe = parse_recipe(override(recipe, list(settings)), source="derived recipe")
    return Derived(final_recipe, parent, reasons, ANNEAL, command="anneal")


def trunk_mixture(last: StageRecord, lineage: Lineage) -> tuple[dict[str, float], dict[str, Path], list[str]]:
    """Shares of a stage's mixture, places of its corpora by the lineage, and those that stand in for old data."""
    shares: dict[str, float] = {}
    corpora: dict[str, Path] = {}
    for source in last.sources:
        if source["role"] == REPLAYED:
            shares[REPLAY] = shares.get(REPLAY, 0.0) + source["weight"]
        else:
            shares[source["name"]] = source["weight"]
            corpora[source["name"]] = Path(lineage.corpora.get(source["name"], {}).get("path", source["corpus"]))
    stand_ins = [name for name in corpora if lineage.corpora.get(name, {}).get("stands_in")]
    return shares, corpora, stand_ins


def _level(final: str) -> str | float:
    """A rate, or a share of one; what is neither is told by the schedule."""
    try:
        return float(final)
    except ValueError:
        return final


def _warnings(checkpoint: Path, lineage: Lineage) -> list[str]:
    found = []
    if not holds_moments(checkpoint):
        found.append("warning: the checkpoint holds no optimizer state, so the moments start anew")
    if not stands_on_trunk(lineage):
        found.append(
            f"warning: the checkpoint stands on no trunk (schedule {lineage.stages[-1].schedule.get('name')}, rate "
            f"{lineage.rate:.3g} of a peak of {lineage.peak:.3g}); what was decayed already has little to gain"
        )
    return found


def anneal_run(
    checkpoint: Path, *, out: Path, dry_run: bool = False, command: str = "", quiet: bool = False, **choices: Any
) -> dict[str, Any]:
    """Derives the branch into the run folder `out` and (unless `dry_run`) trains it: `perennial anneal`.

    checkpoint: or a run folder: its newest checkpoint that is no branch; `choices` are those of `derive_anneal`. The
    same call again resumes. Returns {'recipe', 'resolved', 'reasons', 'result'} as far as it went.
    """
    from perennial.train.checkpoint import verify
    from perennial.train.run import check_place, plan, start, undone_on_error

    checkpoint, base = starting_checkpoint(checkpoint, "wsd"), Path.cwd()
    check_place(out)
    verify(checkpoint, checksums=False)
    derived = derive_anneal(checkpoint, base=base, name=out.resolve().name, **choices)
    result: dict[str, Any] = {
        "recipe": derived.recipe.model_dump(mode="json", exclude_unset=True),
        "reasons": derived.reasons,
    }
    if dry_run:
        result["resolved"] = plan(derived.recipe, base=base)
        return result
    is_main = os.environ.get("RANK", "0") == "0"
    with undone_on_error(out) if is_main else contextlib.nullcontext():
        result["result"] = start(derived.recipe, out, base=base, header=derived.header(command), quiet=quiet)
    return result
