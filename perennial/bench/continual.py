"""The reproduction of continual pre-training on real text: checks, all recipes in one table, and the bar to beat.

Text is prepared, the peak of the learning rate is tuned on the baseline (retraining on everything), and then the grid
of runs is worked off: for every shift, size and seed the runs that the chosen checks need. Behind
`perennial bench continual`. Running it again goes on where it stopped and shows what is known so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from perennial.bench.continual_checks import PRESUME_A_SHIFT, Check, all_checks
from perennial.bench.continual_grid import Grid, Node, alone, needed, nodes_of
from perennial.bench.continual_measures import Measured, Results, measure
from perennial.bench.continual_plan import PEAKS, pair_runs, stream_runs, sweep
from perennial.bench.continual_runs import EVALUATION_TOKENS, Scale
from perennial.bench.continual_summary import keep_records, summary_text, table_of
from perennial.bench.continual_text import Prepared, Reading, Shift, prepare_shift
from perennial.core.errors import UserError

CHECKS = (*"abcdefghij", "bar", "stream", "table")
"""What can be asked for: the checks by letter, the bar on pairs and on streams, and the table of all recipes."""
STRONG_RATIO = 2.2
"""The base's loss on the new text over that on the old, in bits per byte or nats per token, whichever is the higher
ratio, above which a shift of one's own counts as strong.

Assumption: between 2.1 (English novels to Python proposals) and 2.4 (to German novels), measured with 1.5 M parameters
and a tokenizer of the old text (records/2026-11-21_continual); only the expectations of checks c and e hang on it.
"""


@dataclass(frozen=True)
class Experiment:
    """What to measure, on what, and how much of it."""

    shifts: Sequence[Shift]
    work: Path
    checks: Sequence[str] = CHECKS
    seeds: Sequence[int] = (0, 10, 20)
    sizes: Sequence[str] = ("1m",)
    tokens: int = 401408
    peak: float | None = None
    """None: the best of `peaks` on the baseline."""
    peaks: Sequence[float] = PEAKS
    evaluation_tokens: int = EVALUATION_TOKENS
    """Most validation tokens per corpus."""
    reading: Reading = field(default_factory=Reading)
    minutes: float | None = None
    """No run is begun after so long; None: until all is done."""
    only_list: bool = False
    """Say what is done and what is left, and train nothing."""
    quiet: bool = False


@dataclass(frozen=True)
class Outcome:
    """What is known after working on the grid."""

    complete: bool
    tables: dict[str, list[dict[str, Any]]]
    """'novels_en-peps, 1m' -> rows."""
    checks: list[Check]
    peaks: dict[str, Any]
    nodes: list[Node]
    manifest: dict[str, Any]
    listing: str
    work: Path

    def text(self) -> str:
        """The summary as Markdown."""
        return summary_text(self.tables, self.checks, self.peaks)

    def to_json(self) -> dict[str, Any]:
        """Everything but the runs, as plain data."""
        return {
            "complete": self.complete,
            "peaks": self.peaks,
            "checks": [check.to_json() for check in self.checks],
            "tables": self.tables,
            "manifest": self.manifest,
        }

    def keep(self, folder: Path) -> None:
        """Writes summary, verdicts and the records of all finished runs into `folder`."""
        files: dict[str, Any] = {"summary.md": self.text(), "verdicts.json": self.to_json()}
        keep_records(self.nodes, folder, self.work, files)


def run_experiment(experiment: Experiment, *, say: Callable[[str], None] = print) -> Outcome:
    """Works on the experiment until it is done, stopped, or out of time. Raises UserError for bad input."""
    begun = time.monotonic()
    until = None if experiment.minutes is None else begun + 60 * experiment.minutes
    wanted = _wanted(experiment)
    with alone(experiment.work / "corpora"):
        prepared = [
            prepare_shift(shift, experiment.work, experiment.reading, say=say, quiet=experiment.quiet)
            for shift in wanted
        ]
    scales, peaks, swept, complete = _tuned(experiment, prepared, until, say)
    placed = [
        (text, size, seed, nodes_of(_runs(text, scale), scale, text.shift.name, text.corpora, experiment.work))
        for (text, size, seed, scale) in scales
    ]
    chosen = []
    for text, *_, nodes in placed:
        has_shift = text.shift.kind != "none"
        checks = [c for c in experiment.checks if has_shift or c not in PRESUME_A_SHIFT]
        chosen += needed(list(nodes.values()), checks)
    grid = Grid(chosen, experiment.work, experiment.quiet, say)
    if complete and not experiment.only_list:
        complete = grid.run(until=until)
    grid.write_manifest()
    results = _results(prepared, experiment.sizes, chosen)
    labels = {node.run.name: node.run.label for node in chosen}
    return Outcome(
        complete=complete and grid.is_complete,
        tables={f"{r.shift}, {r.preset}": table_of(r, labels) for r in results},
        checks=[c for c in all_checks(results) if c.letter in experiment.checks],
        peaks=peaks,
        nodes=list({node.folder: node for node in (*swept, *chosen)}.values()),
        manifest=grid.manifest(),
        listing=grid.text(),
        work=experiment.work,
    )


def _wanted(experiment: Experiment) -> list[Shift]:
    """The shifts that the checks are about: streams for 'stream', pairs for everything else."""
    pairs = set(experiment.checks) - {"stream"}
    found = [s for s in experiment.shifts if ("stream" in experiment.checks if s.kind == "stream" else pairs)]
    if not found:
        raise UserError(f"--checks {' '.join(experiment.checks)}: none of the shifts chosen has to do with these")
    return found


def _runs(text: Prepared, scale: Scale) -> list[Any]:
    names = list(text.corpora)
    return stream_runs(names, scale) if text.shift.is_stream else pair_runs(names, scale)


def _tokens(experiment: Experiment, text: Prepared) -> int:
    """Tokens of one stage: as asked for, for a stream at most one pass over its smallest slice."""
    return min(experiment.tokens, min(text.train_tokens.values())) if text.shift.is_stream else experiment.tokens


def _tuned(
    experiment: Experiment, prepared: Sequence[Prepared], until: float | None, say: Callable[[str], None]
) -> tuple[list[tuple[Prepared, str, int, Scale]], dict[str, Any], list[Node], bool]:
    """The scale of every grid, with the peak that is best for the baseline of its shift and size at the first seed.

    Also what was tried, the runs that tried it, and whether all of them are done.
    """
    swept: list[Node] = []
    scales: list[tuple[Prepared, str, int, Scale]] = []
    peaks: dict[str, Any] = {}
    complete = True
    for text in prepared:
        for size in experiment.sizes:
            peak = experiment.peak or experiment.peaks[0]
            first = Scale(size, _tokens(experiment, text), peak, experiment.seeds[0], experiment.evaluation_tokens)
            tried: dict[float, float] = {}
            if experiment.peak is None:
                nodes, done = _sweep(experiment, text, first, until, say)
                tried = {p: measure(node).loss(text.corpora) for p, node in nodes.items() if node.is_done}
                swept += nodes.values()
                complete &= done
            peak = experiment.peak or (min(tried, key=tried.__getitem__) if tried else sorted(experiment.peaks)[0])
            peaks[f"{text.shift.name}, {size}"] = {"peak": peak, "tried": tried}
            scales += [(text, size, seed, replace(first, peak=peak, seed=seed)) for seed in experiment.seeds]
    # Seed by seed: a grid that is stopped early has whole seeds, which is what verdicts need.
    scales.sort(key=lambda scale: (experiment.sizes.index(scale[1]), experiment.seeds.index(scale[2])))
    return scales, peaks, swept, complete


def _sweep(
    experiment: Experiment, text: Prepared, scale: Scale, until: float | None, say: Callable[[str], None]
) -> tuple[dict[float, Node], bool]:
    """The baseline at every peak, trained as far as time allows, and whether all are done."""
    nodes: dict[float, Node] = {}
    for peak, run in sweep(list(text.corpora), scale, experiment.peaks):
        placed = nodes_of([run], replace(scale, peak=peak), text.shift.name, text.corpora, experiment.work)
        nodes[peak] = placed[run.name]
    grid = Grid(list(nodes.values()), experiment.work, experiment.quiet, say)
    if not experiment.only_list:
        grid.run(until=until)
    return nodes, grid.is_complete


def _results(prepared: Sequence[Prepared], sizes: Sequence[str], nodes: Sequence[Node]) -> list[Results]:
    """The finished runs by shift and size."""
    found = []
    for text in prepared:
        for size in sizes:
            runs: dict[str, dict[int, Measured]] = {}
            for node in nodes:
                if node.shift == text.shift.name and node.scale.preset == size and node.is_done:
                    runs.setdefault(node.run.name, {})[node.scale.seed] = measure(node)
            names = tuple(text.corpora)
            old = names[:-1]
            found.append(Results(text.shift.name, _kind(text, runs), size, old, names[-1:], runs))
    return found


def _kind(text: Prepared, runs: dict[str, dict[int, Measured]]) -> str:
    """Strong or weak: as known beforehand, else by the base's loss on the new text over the old."""
    if text.shift.kind != "measured":
        return text.shift.kind
    old, new = list(text.corpora)
    ratios = [
        max(losses[new] / losses[old] for losses in (base.bits_per_byte, base.after))
        for base in runs.get("base", {}).values()
    ]
    return "strong" if ratios and sum(ratios) / len(ratios) > STRONG_RATIO else "weak"
