"""How far new data lie from what a parent knows, and the share of old data that is replayed for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from perennial.core.amounts import parse
from perennial.core.errors import UserError
from perennial.train import origin
from perennial.train.starting import Parent

STRONG_SHIFT = 1.25
"""Ratio of the parent's bits per byte on the new data to those on its own above which a shift counts as strong.

Assumption: Ibrahim et al. call Pile -> SlimPajama weak, where a model of the Pile has 2.70 and 2.17 nats per token, a
ratio of 1.24; what shifts further than that gets the replay of a strong shift.
"""

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
    shift: Callable[[], tuple[float, float] | None] | None,
    reasons: list[str],
) -> tuple[float, tuple[float, float] | None, str]:
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
    old, new = measured
    strong = new / old > STRONG_SHIFT
    share = STRONG_REPLAY if strong else WEAK_REPLAY
    return (
        share,
        measured,
        f"replay {share:.0%}: the parent has {new:.3f} bits per byte on the new data and {old:.3f} on "
        f"{'the stand-in' if stand_ins and not parent.lineage.stages else 'its own'}, a "
        f"{'strong' if strong else 'weak'} shift (ratio {new / old:.2f}, strong above {STRONG_SHIFT})",
    )


def measured_shift(
    checkpoint: Path, old: Mapping[str, Path], new: Mapping[str, Path], length: int
) -> tuple[float, float] | None:
    """The parent's bits per byte on its own and on the new corpora (means), or None when its own cannot be read."""
    from perennial.train.measuring import evaluate_checkpoint

    if not old:
        return None
    corpora = evaluate_checkpoint(checkpoint, {**old, **new}, max_tokens=32768, sequence_length=length)["corpora"]
    means = [sum(corpora[n]["bits_per_byte"] for n in names) / len(names) for names in (old, new)]
    return means[0], means[1]
