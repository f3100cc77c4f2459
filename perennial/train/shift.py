"""How far new data lie from what a parent knows, and the share of old data that is replayed for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from perennial.core.amounts import parse
from perennial.core.errors import UserError
from perennial.data.corpus import Corpus
from perennial.evals.shift import STRONG_SHIFT, Shift, shift_between
from perennial.train import origin
from perennial.train.given_data import is_prepared
from perennial.train.starting import Parent

WEAK_REPLAY, STRONG_REPLAY = 0.05, 0.4
"""Replay shares for a weak and a strong shift.

Source: weak, Ibrahim et al. (section 6.2, tables 2-3); strong, Therien et al. 2025, "Continual Pre-training of MoEs:
How robust is your router?", arXiv 2503.05029 (English to German). Differs: Ibrahim et al. take 25% for a strong shift;
40% ended 0.7 to 1.2% lower in the mean of old and new loss, 2 to 3% higher in the new one (`benchmarks/bar_search.py`).
"""


def replay_share(
    replay: str | None,
    parent: Parent,
    stand_ins: Mapping[str, Path],
    shift: Callable[[], Shift | None] | None,
    reasons: list[str],
) -> tuple[float, Shift | None, str]:
    """The share of old data, the measured shift, and why the share is what it is; warnings go to `reasons`."""
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
        return share, shift() if shift and is_known else None, f"replay {share:.4g}: asked for"
    if not is_known:
        return 0.0, None, "replay 0%: the parent's data are unknown, and no stand-in is named"
    measured = shift() if shift else None
    if measured is None:
        reason = f"replay {WEAK_REPLAY:.0%}: the shift was not measured; {WEAK_REPLAY:.0%} suits a weak one"
        return WEAK_REPLAY, None, reason
    share = STRONG_REPLAY if measured.kind == "strong" else WEAK_REPLAY
    own = "the stand-in" if measured.on_stand_in else "its own"
    return (
        share,
        measured,
        f"replay {share:.0%}: the parent has {measured.new:.3f} {measured.unit} on the new data and {measured.old:.3f} "
        f"on {own}, a {measured.kind} shift (ratio {measured.ratio:.2f}, strong above {STRONG_SHIFT})",
    )


def known_already(data: Mapping[str, Path], parent: Parent) -> list[str]:
    """Warnings for new corpora that the parent was trained on under another name: `data` are prepared, or raw text."""
    names = {facts["fingerprint"]: name for name, facts in parent.lineage.corpora.items()}
    found = {name: names.get(Corpus.open(path).fingerprint) for name, path in data.items() if is_prepared(path)}
    return [
        f"{origin.WARNING}'{name}' is what the parent was trained on as '{known}', so nothing in it is new; with "
        f"--data {known}={data[name]} the rows that it has not seen come first"
        for name, known in found.items()
        if known not in (None, name)
    ]


def measured_shift(
    checkpoint: Path, old: Mapping[str, Path], stand_ins: Mapping[str, Path], new: Mapping[str, Path], length: int
) -> Shift | None:
    """The parent's losses on its own corpora, or where none can be read on stand-ins, and on the new; None without."""
    from perennial.train.measuring import evaluate_checkpoint

    known = old or stand_ins
    if not known:
        return None
    corpora = evaluate_checkpoint(checkpoint, {**known, **new}, max_tokens=32768, sequence_length=length)["corpora"]
    return shift_between(corpora, known, new, on_stand_in=not old)
