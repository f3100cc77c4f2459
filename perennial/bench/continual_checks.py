"""The checks that a reproduction of continual pre-training must pass, worked out from finished runs.

Source: Ibrahim, Therien, Gupta et al. 2024, "Simple and Scalable Strategies to Continually Pre-train Large Language
    Models", arXiv 2403.08763, tables 2, 4 and 12, sections 6 and 7 (a to g, i, j); Gupta et al. 2023, "How to (re)warm
    your model?", arXiv 2308.04014 (h). Absolute sizes do not carry over to models a thousand times smaller: order,
    sign and ratio are checked.
Limits: a verdict is of the estimate; it is `sure` when the whole 95 % interval over seeds lies on the same side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from perennial.bench.continual_measures import Measured, Results, over
from perennial.bench.continual_plan import DEFAULT, TRUNK
from perennial.bench.continual_runs import BATCH
from perennial.core.statistics import Interval, mean_interval

PASS, FAIL, NOT_JUDGED, NOT_RUN = "pass", "fail", "not judged", "not run"
NOISE = 0.01
"""Nats below which a difference in the final loss does not matter: the smallest the papers report."""
LADDER = (0, 1, 5, 25, 50)


@dataclass(frozen=True)
class Check:
    """One expectation with its verdict."""

    letter: str
    shift: str
    """Shift and size that it was measured on."""
    statement: str
    verdict: str
    sure: bool
    effect: Interval | None
    wanted: str
    """The effect that passes."""
    paper: str
    """What the papers report for the same number."""
    reason: str = ""
    """Why the effect means nothing where its runs are there; empty where it was judged."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; infinite bounds become null."""
        interval = None
        if self.effect:
            bounds = (self.effect.low, self.effect.high)
            interval = [bound if math.isfinite(bound) else None for bound in bounds]
        return {
            "check": self.letter,
            "shift": self.shift,
            "statement": self.statement,
            "verdict": self.verdict,
            "sure": self.sure,
            "effect": self.effect.estimate if self.effect else None,
            "interval": interval,
            "seeds": self.effect.count if self.effect else 0,
            "wanted": self.wanted,
            "paper": self.paper,
            "reason": self.reason,
        }


def judged(
    letter: str,
    shift: str,
    statement: str,
    effect: Interval | None,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    paper: str,
    unless: str = "",
) -> Check:
    """A check that passes when the effect lies within the bounds; `unless`: why it is not to be judged, if so."""
    parts = [f"at least {at_least:g}"] * math.isfinite(at_least) + [f"at most {at_most:g}"] * math.isfinite(at_most)
    wanted = " and ".join(parts)
    if effect is None:
        return Check(letter, shift, statement, NOT_RUN, False, None, wanted, paper)
    if unless:
        return Check(letter, shift, statement, NOT_JUDGED, False, None, wanted, paper, unless)
    passed = at_least <= effect.estimate <= at_most
    inside = at_least <= effect.low and effect.high <= at_most
    outside = effect.high < at_least or effect.low > at_most
    verdict, sure = (PASS, inside) if passed else (FAIL, outside)
    return Check(letter, shift, statement, verdict, sure, effect, wanted, paper)


PRESUME_A_SHIFT = frozenset("abcfhj")
"""Checks that mean nothing where old and new text are of one kind: an update forgets nothing there."""


def _nothing_forgotten(r: Results, *names: str) -> str:
    """Why no share of the forgetting without replay can be told, over the seeds that finished these runs too."""
    runs = r.runs
    seeds = r.seeds("replay-0", "base", *names)
    rises = {seed: r.forgetting(runs["replay-0"][seed], runs["base"][seed]) for seed in seeds}
    return _too_small(rises, "nothing was forgotten")


def _no_early_rise(r: Results, *names: str) -> str:
    """Why no share of the early rise on new data can be told, over the seeds that finished these runs too."""
    rises = {seed: r.runs["replay-0"][seed].spike(r.old[0]) for seed in r.seeds("replay-0", *names)}
    return _too_small(rises, "there was no early rise")


def _too_small(rises: dict[int, float], what: str) -> str:
    """Why these rises of the old loss, one per seed, are nothing to divide by; empty where all are above noise."""
    # The least counts, not the mean: every seed's quotient has its own rise below it.
    seed = min(rises, key=lambda seed: rises[seed], default=None)
    if seed is None or rises[seed] >= NOISE:
        return ""
    way = "fell by" if rises[seed] < 0 else "rose by only"
    at = f" at seed {seed}" if len(rises) > 1 else ""
    return f"{what} (the old loss {way} {abs(rises[seed]):.3f} nats{at})"


def _less_than_a_row(r: Results, percent: int) -> str:
    """Why replay of so many percent is no other run than none at all; empty where it is."""
    row = BATCH["sequence_length"]
    short = any(run.tokens * percent < 100 * row for run in r.runs.get(f"replay-{percent}", {}).values())
    return f"{percent}% of this update is less than one row" if short else ""


def all_checks(results: Sequence[Results]) -> list[Check]:
    """Every check on every shift and size that it applies to, in the order of the letters."""
    pairs = [r for r in results if r.kind != "stream"]
    checks = [c for r in pairs for c in _of_pair(r) if r.kind != "none" or c.letter not in PRESUME_A_SHIFT]
    checks += [*_strong_against_weak(pairs), *_across_sizes([r for r in pairs if r.kind != "none"])]
    checks += [check for r in pairs for check in _bar(r)]
    checks += [check for r in results if r.kind == "stream" for check in _stream(r)]
    return sorted(checks, key=lambda check: (len(check.letter), check.letter))


def _of_pair(r: Results) -> Iterator[Check]:
    where = f"{r.shift}, {r.preset}"
    weak = r.kind != "strong"
    yield from _replay(r, where, weak)
    yield judged(
        "d",
        where,
        "new loss of the update without replay minus that of training on the new data alone",
        r.effect(lambda update, alone: update.loss(r.new) - alone.loss(r.new), "replay-0", "scratch"),
        at_most=0.0,
        paper="-0.03 (weak), -0.06 (strong)",
    )
    yield from _union(r, where, weak)
    yield from _peak(r, where)
    yield from _warmup(r, where)
    yield from _infinite(r, where)


def _replay(r: Results, where: str, weak: bool) -> Iterator[Check]:
    names = [f"replay-{percent}" for percent in LADDER]

    def smallest_drop(*runs: Measured) -> float:
        losses = [run.loss(r.old) for run in runs]
        return min(more - less for more, less in pairwise(losses))

    yield judged(
        "a",
        where,
        "old loss falls with every step of replay (0, 1, 5, 25, 50 %): the smallest fall",
        r.effect(smallest_drop, *names),
        at_least=0.0,
        paper="0.01 and more",
        unless=_less_than_a_row(r, LADDER[1]),
    )
    for percent, share, paper in ((1, 0.5, ("67 %", "53 %")), (5, 0.7, ("78 %", "71 %"))):

        def removed(none: Measured, some: Measured, base: Measured) -> float:
            return 1 - r.forgotten_share(some, none, base)

        yield judged(
            "a",
            where,
            f"share of the forgetting that {percent} % replay removes",
            r.effect(removed, "replay-0", f"replay-{percent}", "base"),
            at_least=share,
            paper=paper[not weak],
            unless=_less_than_a_row(r, percent) or _nothing_forgotten(r, f"replay-{percent}"),
        )

    def smallest_rise(*runs: Measured) -> float:
        losses = [run.loss(r.new) for run in runs]
        return min(more - less for less, more in pairwise(losses))

    yield judged(
        "b",
        where,
        "new loss does not fall with more replay: the smallest step",
        r.effect(smallest_rise, *names),
        at_least=-NOISE,
        paper="0.00",
        unless=_less_than_a_row(r, LADDER[1]),
    )
    for percent, paper in ((5, ("0.01", "0.01")), (50, ("0.04", "0.11"))):
        yield judged(
            "b",
            where,
            f"new loss that {percent} % replay costs",
            r.effect(lambda none, some: some.loss(r.new) - none.loss(r.new), "replay-0", f"replay-{percent}"),
            at_least=-NOISE,
            paper=paper[not weak],
            unless=_less_than_a_row(r, percent),
        )


def _union(r: Results, where: str, weak: bool) -> Iterator[Check]:
    percent = 5 if weak else 25
    yield judged(
        "e",
        where,
        f"average loss with {percent} % replay over that of retraining at twice the compute, less 1",
        r.effect(lambda update, union: r.average(update) / r.average(union) - 1, f"replay-{percent}", "union"),
        at_most=0.01,
        paper="0.009 (weak, 5 %), 0.000 (strong, 25 %)",
    )


def _peak(r: Results, where: str) -> Iterator[Check]:
    names = ["peak-0.1", "peak-0.5", "replay-0", "peak-2"]
    yield judged(
        "f",
        where,
        "old loss rises with the peak (0.1, 0.5, 1, 2 x, no replay): the smallest rise",
        r.effect(lambda *runs: min(b.loss(r.old) - a.loss(r.old) for a, b in pairwise(runs)), *names),
        at_least=0.0,
        paper="0.01 (weak), 0.07 (strong)",
    )
    yield judged(
        "f",
        where,
        "new loss does not rise with the peak: the largest rise",
        r.effect(lambda *runs: max(b.loss(r.new) - a.loss(r.new) for a, b in pairwise(runs)), *names),
        at_most=NOISE,
        paper="0.00",
    )
    yield judged(
        "f",
        where,
        "staying at the final rate is the best on the old data: its old loss minus the best of the others",
        r.effect(lambda stays, *runs: stays.loss(r.old) - min(a.loss(r.old) for a in runs), "constant", *names),
        at_most=0.0,
        paper="-0.01 (weak), -0.25 (strong)",
    )
    yield judged(
        "f",
        where,
        "... and the worst on the new: its new loss minus the worst of the others",
        r.effect(lambda stays, *runs: stays.loss(r.new) - max(a.loss(r.new) for a in runs), "constant", *names),
        at_least=0.0,
        paper="0.04 (weak), 0.08 (strong)",
    )


def _warmup(r: Results, where: str) -> Iterator[Check]:
    old = r.old[0]
    yield judged(
        "g",
        where,
        "average loss at the end without warm-up minus with 1 %",
        r.effect(lambda none, some: r.average(none) - r.average(some), "warmup-0", "replay-0"),
        at_least=-NOISE,
        at_most=NOISE,
        paper="0.00",
    )
    yield judged(
        "g",
        where,
        "early rise of the old loss without warm-up minus with 1 %",
        r.effect(lambda none, some: none.spike(old) - some.spike(old), "warmup-0", "replay-0"),
        at_least=0.0,
        paper="above 0",
    )
    yield judged(
        "h",
        where,
        "early rise of the old loss when re-warming on more old data, as a share of that on new data",
        r.effect(lambda same, cross: over(same.spike(old), cross.spike(old)), "same-data", "replay-0"),
        at_least=0.01,
        at_most=0.6,
        paper="0.29 to 0.44",
        unless=_no_early_rise(r, "same-data"),
    )


def _infinite(r: Results, where: str) -> Iterator[Check]:
    yield judged(
        "i",
        where,
        "old loss of the infinite schedule before its anneal minus that of three cosines",
        r.effect(lambda inf, cos: _of(inf.stage_ends[-2], r.old) - cos.loss(r.old), "infinite", "cycles"),
        at_least=0.0,
        paper="above 0",
    )
    yield judged(
        "i",
        where,
        "... and after it",
        r.effect(lambda inf, cos: inf.loss(r.old) - cos.loss(r.old), "infinite", "cycles"),
        at_most=NOISE,
        paper="0.00",
    )


def _of(losses: dict[str, float], corpora: Sequence[str]) -> float:
    return sum(losses[name] for name in corpora) / len(corpora)


def _strong_against_weak(pairs: Sequence[Results]) -> Iterator[Check]:
    """Forgetting of the strong shift against that of every weak one from the same old corpus and size."""
    for weak in (r for r in pairs if r.kind == "weak"):
        for strong in (r for r in pairs if r.kind == "strong" and (r.preset, r.old) == (weak.preset, weak.old)):
            yield judged(
                "c",
                f"{strong.shift} against {weak.shift}, {weak.preset}",
                "forgetting without replay under the strong shift, as a multiple of that under the weak one",
                _forgetting_ratio(strong, weak, relative=False),
                at_least=2.0,
                paper="5.1",
                unless=_nothing_forgotten(weak),
            )


def _across_sizes(pairs: Sequence[Results]) -> Iterator[Check]:
    """Relative forgetting of each size against that of the first of the same shift."""
    for shift in dict.fromkeys(r.shift for r in pairs):
        first, *others = [r for r in pairs if r.shift == shift]
        for other in others:
            yield judged(
                "j",
                f"{shift}, {other.preset} against {first.preset}",
                "forgetting without replay as a share of the base's loss: the other size over the first",
                _forgetting_ratio(other, first, relative=True),
                at_least=0.75,
                at_most=1.33,
                paper="1.06 (12.4 % at 405M, 13.1 % at 10B)",
                unless=_nothing_forgotten(first),
            )


def _forgetting_ratio(one: Results, other: Results, *, relative: bool) -> Interval | None:
    """What the update without replay forgets in one experiment over the same in another, paired by seed."""

    def forgotten(r: Results, seed: int) -> float:
        base = r.runs["base"][seed]
        return r.forgetting(r.runs["replay-0"][seed], base) / (base.loss(r.old) if relative else 1.0)

    names = ("replay-0", "base")
    seeds = sorted(set(one.seeds(*names)) & set(other.seeds(*names)))
    return mean_interval([over(forgotten(one, seed), forgotten(other, seed)) for seed in seeds]) if seeds else None


def _bar(r: Results) -> Iterator[Check]:
    """The update against retraining, and what the default forgets."""
    where = f"{r.shift}, {r.preset}"
    for name in sorted(n for n in r.runs if n.startswith("bar-")):
        compute = r.effect(lambda update, union: update.flops / union.flops, name, "union")
        at = f" at {compute.estimate:.0%} of its compute" if compute else ""
        yield judged(
            "bar",
            where,
            f"average loss of {name} over that of retraining on everything, less 1{at}",
            r.effect(lambda update, union: r.average(update) / r.average(union) - 1, name, "union"),
            at_most=0.0,
            paper="0.000 at 50 % (weak, 50 % replay), 0.000 at 40 % (strong, 25 %)",
        )
        if r.kind == "weak":
            yield judged(
                "bar",
                where,
                f"what {name} forgets, as a share of what the same update forgets without replay",
                r.effect(r.forgotten_share, name, "replay-0", "base"),
                at_most=0.1,
                paper="0.15 (10 % replay), -0.04 (50 %)",
                unless=_nothing_forgotten(r, name),
            )


def _stream(r: Results) -> Iterator[Check]:
    """The last model of every way to follow a stream against retraining whenever a slice arrives."""
    slices = len(r.corpora)
    retrainings = sum(range(2, slices + 1)) / slices  # in units of the last one, which sees every slice

    def compute(*runs: Measured) -> float:
        *updates, union = runs
        return sum(run.flops for run in updates) / (retrainings * union.flops)

    for way in (DEFAULT, TRUNK):
        names = [f"{way}-{number}" for number in range(2, slices + 1)]
        spent = r.effect(compute, *names, "union")
        at = f" at {spent.estimate:.0%} of the compute" if spent else ""
        yield judged(
            "stream",
            f"{r.shift}, {r.preset}",
            f"average loss over all slices of '{way}' over that of retraining at every slice, less 1{at}",
            r.effect(lambda last, union: r.average(last) / r.average(union) - 1, names[-1], "union"),
            at_most=0.0,
            paper="TiC-LM: matched at 38 % of the compute",
        )
