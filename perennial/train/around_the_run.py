"""What some continuations do around their run: choose or order the new text before, average with the parent after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perennial.core.amounts import parse
from perennial.core.errors import UserError
from perennial.data.corpus import Corpus
from perennial.train.continuations.base import Arrangement
from perennial.train.given_data import prepared
from perennial.train.workers import under_torchrun

_HELD_OUT = 4
"""Documents that are held out at least."""
CHOSEN_OF, DIVIDED_OF = 10.0, 2.0
"""Most tokens that the parent reads beforehand: of the part that is chosen, and of what the update will read.

Assumption: the likeliest tenth is far enough from the mean. Reading costs a third of training on the same text, and a
corpus may be thousands of times as long as its update.
"""


def best_part(
    checkpoint: Path, fresh: Mapping[str, Path], kept: float | None, how: Mapping[str, Any]
) -> dict[str, Path]:
    """The `kept` tokens of each new corpus that the parent finds likeliest, prepared in the run folder.

    They are chosen from `CHOSEN_OF` times as many, drawn at random; a corpus that has no more than `kept` tokens, or
    without that number, is taken whole. how: further arguments of `prepared`. What an earlier call has chosen is taken
    as it is.
    """
    from perennial.train.selecting import select

    parts = {}
    for name, path in fresh.items():
        size = Corpus.open(path).train.num_tokens
        if kept is None or kept >= size:
            parts[name] = path
            continue
        text = how["out"] / "corpora" / f"{name}-best.jsonl"
        if not text.exists():
            of = f"{min(1.0, CHOSEN_OF * kept / size):.6%}"
            select(path, checkpoint, text, keep=f"{max(1, round(kept))} tokens", of=of, quiet=how["quiet"])
        parts[f"{name}-best"] = _prepared_part(f"{name}-best", text, path, how)
    return parts


def in_order(
    checkpoint: Path, fresh: Mapping[str, Path], arrangement: Arrangement, read: float | None, how: Mapping[str, Any]
) -> dict[str, Path]:
    """The new corpora in the order in which the stages go through them; of a single one its parts.

    read: tokens of the update; `DIVIDED_OF` times as many are divided, drawn at random (None: all). how: further
    arguments of `prepared`. Parts that an earlier call has written and prepared are taken as they are.
    """
    if arrangement.order == "given":
        return dict(fresh)
    likeliest_first = (
        _parts(checkpoint, fresh, arrangement.parts, read, how) if len(fresh) == 1 else _by_loss(checkpoint, fresh)
    )
    return likeliest_first if arrangement.order == "easy" else dict(reversed(likeliest_first.items()))


def _by_loss(checkpoint: Path, fresh: Mapping[str, Path]) -> dict[str, Path]:
    """Corpora by the parent's mean loss on their held-out text, the lowest first."""
    from perennial.train.measuring import evaluate_checkpoint

    losses = evaluate_checkpoint(checkpoint, fresh, max_tokens=32768)["corpora"]
    return dict(sorted(fresh.items(), key=lambda item: float(losses[item[0]]["nats_per_token"])))


def _parts(
    checkpoint: Path, fresh: Mapping[str, Path], number: int, read: float | None, how: Mapping[str, Any]
) -> dict[str, Path]:
    """A corpus in so many parts equal in tokens, each prepared in the run folder, the likeliest first."""
    from perennial.train.selecting import divide

    [(name, path)] = fresh.items()
    texts = {
        f"{name}-{i}of{number}": how["out"] / "corpora" / f"{name}-{i}of{number}.jsonl" for i in range(1, number + 1)
    }
    if not all(text.exists() for text in texts.values()):
        if under_torchrun():
            raise UserError(
                f"{path}: is not cut into parts yet, which one process does: start with --processes N, or make "
                f"{how['out']} with --dry-run first"
            )
        of = None if read is None else DIVIDED_OF * read
        divide(path, checkpoint, list(texts.values()), of=of, quiet=how["quiet"])
    return {part: _prepared_part(part, text, path, how) for part, text in texts.items()}


def _prepared_part(name: str, text: Path, whole: Path, how: Mapping[str, Any]) -> Path:
    """The documents in `text`, chosen from the training part of a corpus, prepared in the run folder."""
    validation = _validation(text, whole, how["validation"])
    return prepared(name, text, **{**how, "text_field": "text", "validation": validation})


def _validation(text: Path, whole: Path, asked: str) -> str:
    """The share that holds out what was asked for, but of few documents enough to have some.

    A document's hash decides, and the training part of `whole` has none below its own share: that much is added.
    """
    with open(text, "rb") as lines:
        number = sum(1 for _ in lines)
    try:
        share = parse(asked, ("share",)).value
    except ValueError:
        return asked  # told when the text is prepared
    wanted = max(share, _HELD_OUT / max(1, number))
    settings = Corpus.open(whole).manifest.get("settings", {})
    below = 0.0 if settings.get("split_by") else parse(settings.get("validation", "0%"), ("share",)).value
    return f"{max(share, min(0.5, below + wanted * (1 - below))):.4%}"


def average_with_parent(
    out: Path, checkpoint: Path, old: Mapping[str, Path], new: Mapping[str, Path], *, quiet: bool = False
) -> dict[str, Any]:
    """Writes OUT/averaged, the average of a finished run and its parent with the lowest mean of old and new losses."""
    from perennial.train.merging import merge
    from perennial.train.merging_search import Search

    target = out / "averaged"
    if target.exists():
        return {"out": str(target)}
    old = {name: path for name, path in old.items() if name not in new}  # one that goes on counts as new
    if not old:
        return merge([checkpoint, out], target, quiet=quiet)
    importance = {**{n: 0.5 / len(old) for n in old}, **{n: 0.5 / len(new) for n in new}}
    return merge([checkpoint, out], target, search=Search({**old, **new}, importance), quiet=quiet)
