"""Which runs a continual-learning experiment consists of: ladders of replay and peaks, spikes, stages, bar, stream.

The old and the new corpus, or the slices of a stream, are named by the caller; parents come before children.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from perennial.bench.continual_runs import PlannedRun, Scale, Stage, cosine, flat, rewarm, straight
from perennial.core import plugins

PEAKS = (5e-3, 1e-2, 2e-2, 4e-2)
"""Peaks tried on the union run; the best is everyone's."""
REPLAYS = (0, 1, 5, 25, 50)
"""Percentages of the ladder of checks a, b and e."""
FACTORS = (0.1, 0.5, 2.0)
"""Peaks of the sweep of check f, as multiples of the base's; 1 is the ladder's own."""
STAGES = 3
"""Of check i: repeated cosine against an infinite schedule."""
TRUNK_RATE = 0.5
"""Rate of a trunk as a part of retraining's best peak: what never decays wants less (`benchmarks/bar_search.py`)."""
TRUNK_REPLAY = 0.5
"""Replay of the updates that go on from a base which was never annealed."""
HALF_ROWS = 8
"""Rows of an update where the batch is halved: twice the updates from the same tokens; the best of 4, 8, 16 and 32."""
NO_REPLAY, DEFAULT, TRUNK = "cycle", "default", "trunk"
_WAYS = {NO_REPLAY: "re-warmed, no replay", DEFAULT: "the default", TRUNK: "constant rate, down at the end"}
"""The ways to follow a stream; the name of a run is that of its way and the number of its slice."""
_ANNEAL = 0.14
"""Share of the last stage that an infinite schedule anneals in; of 1, 60, 25 and 14 % in Ibrahim et al. 2024."""


def sweep(corpora: Sequence[str], scale: Scale, peaks: Sequence[float] = PEAKS) -> list[tuple[float, PlannedRun]]:
    """The union run at each peak, to tune the baseline before anything is compared with it."""
    return [(peak, union(corpora, replace(scale, peak=peak))) for peak in peaks]


def union(corpora: Sequence[str], scale: Scale) -> PlannedRun:
    """Retraining on everything from random weights: as many tokens as all stages together."""
    tokens = scale.updates(1.0) * len(corpora)
    mixture = {name: 1 / len(corpora) for name in corpora}
    stage = Stage("pretrain", tokens, mixture, straight(scale.peak))
    return PlannedRun("union", "retrained on everything", frozenset({"sweep", "e", "bar", "stream", "table"}), (stage,))


def pair_runs(corpora: Sequence[str], scale: Scale) -> list[PlannedRun]:
    """All runs over an old and a new corpus, parents before children."""
    old, new = corpora
    whole = scale.updates(1.0)
    return [
        PlannedRun(
            "base",
            "base, annealed (old data only)",
            frozenset("abcdefghij") | {"bar", "table"},
            (Stage("pretrain", whole, {old: 1.0}, cosine(scale.peak)),),
        ),
        union(corpora, scale),
        *_ladder(new, scale),
        PlannedRun(
            "scratch",
            "new data only, from random weights",
            frozenset({"d", "table"}),
            (Stage("pretrain", whole, {new: 1.0}, cosine(scale.peak)),),
        ),
        *_peaks(new, scale),
        *_spikes(old, new, scale),
        *_stages(old, scale),
        _trunk(old, scale),
        *_bar(new, scale),
        *_ways(new, scale),
    ]


def _update(name: str, label: str, checks: str, stage: Stage, *, dense: bool = False) -> PlannedRun:
    return PlannedRun(name, label, frozenset(checks.split()), (stage,), "base", dense)


def _mixture(new: str, replay: float) -> dict[str, float]:
    """`replay` as a share."""
    return {new: 1 - replay, **({"replay": replay} if replay else {})}


def _ladder(new: str, scale: Scale) -> list[PlannedRun]:
    """Re-warmed and re-decayed at every replay share, as in Ibrahim et al. 2024, tables 2 and 3."""
    schedule = rewarm(scale.peak, scale.peak / 10)
    checks = {0: "a b c d f g h j bar table", 5: "a b e table", 25: "a b e table"}
    return [
        _update(
            f"replay-{percent}",
            f"re-warmed, {percent}% replay",
            checks.get(percent, "a b table"),
            Stage("update", scale.updates(1.0), _mixture(new, percent / 100), schedule),
            dense=percent == 0,
        )
        for percent in REPLAYS
    ]


def _peaks(new: str, scale: Scale) -> list[PlannedRun]:
    """Without replay at other peaks, and at the rate where the base was left; Ibrahim et al. 2024, table 12."""
    whole, left = scale.updates(1.0), scale.peak / 10
    swept = [
        _update(
            f"peak-{factor:g}",
            f"re-warmed to {factor:g} x the peak, no replay",
            "f table",
            # A peak of a tenth is where the base was left: the decay then goes on from there.
            Stage("update", whole, _mixture(new, 0), rewarm(factor * scale.peak, factor * left)),
        )
        for factor in FACTORS
    ]
    stays = Stage("update", whole, _mixture(new, 0), flat(left))
    return [*swept, _update("constant", "at the final rate, no replay", "f table", stays)]


def _spikes(old: str, new: str, scale: Scale) -> list[PlannedRun]:
    """Without warm-up, and on more of the same data: how high the loss on the old text jumps at first."""
    whole = scale.updates(1.0)
    at_once = Stage("update", whole, {new: 1.0}, rewarm(scale.peak, scale.peak / 10, warmup="0%"))
    again = Stage("update", whole, {old: 1.0}, rewarm(scale.peak, scale.peak / 10))
    return [
        _update("warmup-0", "re-warmed at once, no replay", "g", at_once, dense=True),
        _update("same-data", "re-warmed on more old data", "h", again, dense=True),
    ]


def _stages(old: str, scale: Scale) -> list[PlannedRun]:
    """Three stages of the same data: the cosine repeated, and an infinite schedule that anneals at the very end."""
    whole = scale.updates(1.0)
    held = 0.55 * scale.peak  # midway between peak and a tenth of it, as in Ibrahim et al. 2024, section 7
    repeated = tuple(
        Stage(f"cycle-{i}", whole, {old: 1.0}, rewarm(scale.peak, scale.peak / 10)) for i in range(2, STAGES + 1)
    )
    begun = {"name": "infinite", "peak": scale.peak, "constant": held, "warmup": "5%", "anneal": "0%"}
    down = {"name": "wsd", "peak": held, "final": scale.peak / 10, "warmup": "0%", "decay": "100%"}
    down |= {"decay_shape": "exponential"}
    trunk = [
        Stage("stage-1", whole, {old: 1.0}, begun),
        Stage("stage-2", whole, {old: 1.0}, flat(held)),
        Stage("stage-3", whole - scale.updates(_ANNEAL), {old: 1.0}, flat(held)),
        Stage("anneal", scale.updates(_ANNEAL), {old: 1.0}, down),
    ]
    infinite = tuple(stage for stage in trunk if stage.tokens)
    return [
        PlannedRun("cycles", f"cosine, {STAGES} times", frozenset("i"), repeated, "base"),
        PlannedRun("infinite", "infinite schedule, annealed at the end", frozenset("i"), infinite),
    ]


def _trunk(old: str, scale: Scale) -> PlannedRun:
    """A base that was never annealed: what a publisher has who means to go on."""
    stage = Stage("pretrain", scale.updates(1.0), {old: 1.0}, flat(TRUNK_RATE * scale.peak, warmup="5%"))
    return PlannedRun("trunk", "base, not annealed", frozenset({"bar", "stream", "table"}), (stage,))


def _bar(new: str, scale: Scale) -> list[PlannedRun]:
    """What is measured against retraining, at half of its compute and at 35 %."""
    runs = []
    for percent, share in ((50, 1.0), (35, 0.7)):
        tokens = scale.updates(share)
        default = Stage("update", tokens, {new: 1.0}, {})
        falls = Stage("update", tokens, _mixture(new, TRUNK_REPLAY), straight(TRUNK_RATE * scale.peak, warmup="0%"))
        at = f"{percent}% of retraining"
        checks = frozenset({"bar", "table"})
        trunk = PlannedRun(f"bar-trunk-{percent}", f"trunk, straight down, {at}", checks, (falls,), "trunk")
        half = replace(trunk, name=f"bar-rows-{percent}", label=f"the same, half the rows, {at}", sequences=HALF_ROWS)
        default_way = PlannedRun(f"bar-default-{percent}", f"default, {at}", checks, (default,), "base", choices={})
        from_trunk = replace(
            default_way, name=f"bar-chosen-{percent}", label=f"default from the trunk, {at}", parent="trunk"
        )
        runs += [default_way, from_trunk, trunk, half]
    return runs


def _ways(new: str, scale: Scale) -> list[PlannedRun]:
    """Every way of continuing that `perennial continue --recipe` knows, by its own defaults; for the table.

    A way that averages with the parent after its run is left out: its result is another checkpoint than the run's.
    """
    update = Stage("update", scale.updates(1.0), {new: 1.0}, {})
    found = {name: plugins.load("continuations", name) for name in plugins.names("continuations")}
    return [
        PlannedRun(
            f"way-{name}",
            f"perennial continue --recipe {name}",
            frozenset({"table"}),
            (update,),
            "base",
            choices={"how": name},
        )
        for name, way in found.items()
        if not way.AVERAGES
    ]


def stream_runs(corpora: Sequence[str], scale: Scale) -> list[PlannedRun]:
    """One slice after another, T tokens each, in three ways, and retraining on all of them at the end.

    Retraining whenever a slice arrives costs 2 + 3 + ... + n times T after the base, the updates n - 1 times T: for six
    slices a quarter.
    """
    first, *later = corpora
    whole = scale.updates(1.0)
    annealed = Stage("pretrain", whole, {first: 1.0}, cosine(scale.peak))
    checks = frozenset({"stream"})
    again = rewarm(scale.peak, scale.peak / 10)
    runs = [
        PlannedRun("base", "base, annealed (first slice)", checks, (annealed,)),
        _trunk(first, scale),
        union(corpora, scale),
    ]
    parents = {NO_REPLAY: "base", DEFAULT: "base", TRUNK: "trunk"}
    for number, corpus in enumerate(later, 2):
        is_last = number == len(corpora)
        trunk_rate = TRUNK_RATE * scale.peak
        down = straight(trunk_rate, warmup="0%") if is_last else flat(trunk_rate)
        stages = {
            NO_REPLAY: Stage("update", whole, {corpus: 1.0}, again),
            DEFAULT: Stage("update", whole, {corpus: 1.0}, {}),
            TRUNK: Stage("update", whole, _mixture(corpus, TRUNK_REPLAY), down),
        }
        for way, stage in stages.items():
            name = f"{way}-{number}"
            choices: dict[str, Any] | None = {} if way == DEFAULT else None
            label = f"{_WAYS[way]}, slice {number}"
            runs.append(PlannedRun(name, label, checks, (stage,), parents[way], choices=choices))
            parents[way] = name
    return runs
