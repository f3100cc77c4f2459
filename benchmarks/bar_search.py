"""What brings an update near retraining at half its compute: one trial per idea, on a small model, paired by seed.

    python benchmarks/bar_search.py [--model small|1m] [--shift novels_en:novels_de] [--tokens 800K] [--seeds 1]
        [--optimizer muon] [--peak RATE] [--only NAME ...] [--work runs/bar_search] [--records records/DATE_bar_search]

T tokens of old text make a trunk (constant rate); retraining sees 2 T tokens of both texts; every trial is an
update from the trunk that costs no more FLOPs than T tokens of plain training, its teachers included. Both sides
use Muon; the peak is the best of retraining's (0.02 for small, 0.01 for 1m: records/2026-11-21_continual_bar).
Resumable: finished runs are kept in --work. Needs ../shared/corpora. Prints the average loss over that of
retraining.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CORPORA = Path(__file__).resolve().parents[2] / "shared" / "corpora"
LENGTH = 128
MODELS: dict[str, dict[str, Any]] = {
    "small": {
        "model": {"options": {"width": 64, "layers": 2, "heads": 2, "kv_heads": 2, "mlp_width": 176, "context": 256}},
        "vocabulary": 1024,
        "peak": 0.02,
        "tokens": 802_816,
    },
    "1m": {"model": {"preset": "1m"}, "vocabulary": 4096, "peak": 0.01, "tokens": 401_408},
}
"""Model, vocabulary, retraining's best peak, tokens of the base."""
TRUNK_SHARE = 0.5
"""The trunk's rate as a part of retraining's peak: a run that never decays wants a lower one."""


@dataclass(frozen=True)
class Trial:
    """An update from the trunk: shares, rows of a batch, peak as a part of the trunk's rate, and whoever teaches."""

    replay: float = 0.5
    rows: int = 8
    peak: float = 1.0
    objective: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    """'annealed': a run that was made for it from the trunk, whose cost is taken off the update's tokens."""
    shape: str = "linear"
    decay: str | None = None
    """The last part of the update, where only that is a decay: 'LENGTH SHAPE FINAL', the last two shares."""
    first_rows: int | None = None
    """Rows of a batch in the first half, where they are fewer."""
    later: float | None = None
    """Replay in the second half, where it is another."""
    unseen: bool = False
    """Whether the old text is such that the trunk has not read yet, instead of what it read."""
    trunk: float = TRUNK_SHARE
    """The trunk's rate as a part of retraining's peak."""
    final: float = 0.1
    """Of a re-warmed update: the last rate, as a part of its peak."""
    annealed: bool = False
    """Whether the parent is a decayed base and the update re-warms, as `perennial continue` does by itself."""


def rewarmed(share: float, rows: int, peak: float = 1.0, **rest: Any) -> Trial:
    """From a base whose rate fell to a tenth, back to a part of retraining's peak, and down to where it was."""
    return Trial(replay=share, rows=rows, peak=peak, annealed=True, **rest)


def distilled(share: float, weight: float, **rest: Any) -> Trial:
    """Replayed rows are taught by the annealed branch of the trunk."""
    return Trial(
        replay=share, objective={"name": "distillation", "weight": weight, "rows": "replay", **rest}, teacher="annealed"
    )


TRIALS: dict[str, Trial] = {
    "replay 50%": Trial(),
    "replay 40%": Trial(replay=0.4),
    "replay 30%": Trial(replay=0.3),
    "replay 25%": Trial(replay=0.25),
    "replay 15%": Trial(replay=0.15),
    "replay 25%, taught 0.5": distilled(0.25, 0.5),
    "replay 25%, taught 1": distilled(0.25, 1.0),
    "replay 15%, taught 1": distilled(0.15, 1.0),
    "replay 40%, taught 0.5": distilled(0.4, 0.5),
    "replay 25%, taught 0.5 by the trunk": Trial(
        replay=0.25, objective={"name": "distillation", "weight": 0.5, "rows": "replay"}
    ),
    "replay 40%, then 60%": Trial(replay=0.4, later=0.6),
    "replay 30%, then 60%": Trial(replay=0.3, later=0.6),
    "replay 50%, peak x 1.5": Trial(peak=1.5),
    "replay 50%, peak x 0.7": Trial(peak=0.7),
    "replay 50%, lower trunk": Trial(trunk=0.25, peak=0.5 / 0.25),
    "replay 50%, lower trunk and peak": Trial(trunk=0.25, peak=0.375 / 0.25),
    "replay 50%, 4 rows, peak x 0.7": Trial(rows=4, peak=0.7),
    "replay 50%, cosine": Trial(shape="cosine"),
    "replay 50%, 4 rows, then 8": Trial(first_rows=4),
    "replay 50%, 4 rows, then 16": Trial(first_rows=4, rows=16),
    "replay 50%, 8 rows, then 16": Trial(first_rows=8, rows=16),
    "replay 50%, 16 rows": Trial(rows=16),
    "50% unseen old text": Trial(unseen=True),
    "40% unseen old text": Trial(replay=0.4, unseen=True),
    "30% unseen old text": Trial(replay=0.3, unseen=True),
    "40% unseen old text, peak x 1.5": Trial(replay=0.4, unseen=True, peak=1.5),
    "40% unseen old text, lower trunk": Trial(replay=0.4, unseen=True, trunk=0.25, peak=2.0),
    "50% unseen old text, 4 rows, peak x 0.7": Trial(rows=4, peak=0.7, unseen=True),
    "re-warmed, 25%, 16 rows": rewarmed(0.25, 16),
    "re-warmed, 25%, 8 rows": rewarmed(0.25, 8),
    "re-warmed, 25%, 8 rows, peak x 0.7": rewarmed(0.25, 8, 0.7),
    "re-warmed, 40%, 16 rows": rewarmed(0.4, 16),
    "re-warmed, 40%, 8 rows": rewarmed(0.4, 8),
    "re-warmed, 40%, 8 rows, peak x 0.7": rewarmed(0.4, 8, 0.7),
    "re-warmed, 50%, 8 rows": rewarmed(0.5, 8),
    "re-warmed, 40%, 4 rows, peak x 0.7": rewarmed(0.4, 4, 0.7),
    "re-warmed, 25%, 16 rows, peak x 0.5": rewarmed(0.25, 16, 0.5),
    "re-warmed, 25%, 16 rows, to 0": rewarmed(0.25, 16, final=0.0),
    "re-warmed, 40%, 16 rows, to 0": rewarmed(0.4, 16, final=0.0),
    "re-warmed, 40%, 16 rows, peak x 0.5": rewarmed(0.4, 16, 0.5),
    "re-warmed, 40%, 16 rows, peak x 0.5, to 0": rewarmed(0.4, 16, 0.5, final=0.0),
    "re-warmed, 40%, 8 rows, peak x 0.5, to 0": rewarmed(0.4, 8, 0.5, final=0.0),
    "replay 50%, 16 rows, peak x 2": Trial(rows=16, peak=2.0),
    "40%, 16 rows, last 14% exponential to 10%": Trial(replay=0.4, rows=16, decay="14% exponential 10%"),
    "40%, 16 rows, last 14% sqrt to 0": Trial(replay=0.4, rows=16, decay="14% sqrt 0%"),
    "40%, 16 rows, last 20% sqrt to 10%": Trial(replay=0.4, rows=16, decay="20% sqrt 10%"),
    "40%, 16 rows, last 20% sqrt to 0": Trial(replay=0.4, rows=16, decay="20% sqrt 0%"),
    "40%, 16 rows, last 40% sqrt to 0": Trial(replay=0.4, rows=16, decay="40% sqrt 0%"),
    "40%, 16 rows, last 60% sqrt to 0": Trial(replay=0.4, rows=16, decay="60% sqrt 0%"),
    "40%, 16 rows, last 60% linear to 0": Trial(replay=0.4, rows=16, decay="60% linear 0%"),
    "replay 25%, 16 rows": Trial(replay=0.25, rows=16),
    "replay 40%, 16 rows": Trial(replay=0.4, rows=16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--shift", default="novels_en:novels_de")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--optimizer", default="muon", help="of both sides; give its best --peak with it")
    parser.add_argument("--peak", type=float, help="of retraining (default: Muon's best)")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--work", type=Path, default=Path("runs/bar_search"))
    parser.add_argument("--records", type=Path)
    arguments = parser.parse_args()
    lines = ["| seed | update | old | new | average | over retraining |", "|---|---|---|---|---|---|"]
    for seed in range(0, 10 * arguments.seeds, 10):
        bench = Bench(arguments, seed)
        lines += bench.work_off(arguments.only or list(TRIALS))
        if arguments.records:
            target = arguments.records / arguments.model / bench.place.relative_to(bench.work)
            target.mkdir(parents=True, exist_ok=True)
            recipes = "".join(json.dumps(recipe) + "\n" for recipe in bench.recipes.values())
            (target / "recipes.jsonl").write_text(recipes.replace(str(bench.work), "WORK"), encoding="utf-8")
    if arguments.records:
        name = f"{arguments.model}_{arguments.shift.replace(':', '-')}.md"
        (arguments.records / name).write_text("\n".join([*lines, ""]), encoding="utf-8")


class Bench:
    """The runs of one model, shift and seed."""

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        from perennial.bench.continual_text import Reading, prepare_shift, standard_shifts

        self.size, self.seed, self.optimizer = dict(MODELS[arguments.model]), seed, arguments.optimizer
        self.size["peak"] = arguments.peak or self.size["peak"]
        self.tokens = arguments.tokens or self.size["tokens"]
        self.work = place = arguments.work.resolve() / arguments.model
        self.recipes: dict[str, Any] = {}
        shift = standard_shifts(CORPORA, [arguments.shift])[0]
        reading = Reading(vocabulary_size=self.size["vocabulary"])
        self.corpora = dict(prepare_shift(shift, place, reading, say=lambda _: None, quiet=True).corpora)
        self.old, self.new = self.corpora
        other = f"-{self.optimizer}-{self.size['peak']:g}" if arguments.peak or self.optimizer != "muon" else ""
        self.place = place / shift.name / f"{self.tokens}{other}" / f"seed{seed}"

    def work_off(self, names: list[str]) -> list[str]:
        """Trains what is not there yet; prints a line per trial and returns them as rows of a table."""
        both = {self.old: 0.5, self.new: 0.5}
        union = self.train("union", 2 * self.tokens, both, down(self.size["peak"], "5%"), rows=16)
        rows = []
        for name in ["retrained on both, twice the compute", *names]:
            found = self.update(name, TRIALS[name]) if name in TRIALS else union
            values = [found[self.old], found[self.new], average(found)]
            cells = [str(self.seed), name, *(f"{value:.4f}" for value in values)]
            rows.append("| " + " | ".join([*cells, f"{values[-1] / average(union) - 1:+.2%}"]) + " |")
            print(rows[-1], flush=True)
        return rows

    def update(self, name: str, trial: Trial) -> dict[str, float]:
        """The final losses of a trial, whose parent and teacher are trained first."""
        if trial.annealed:
            return self.rewarm(name, trial)
        rate = trial.trunk * self.size["peak"]
        trunk = "trunk" if trial.trunk == TRUNK_SHARE else f"trunk_{trial.trunk:g}"
        flat = {"name": "constant", "peak": rate, "warmup": "5%"}
        self.train(trunk, self.tokens, {self.old: 1.0}, flat, rows=16)
        tokens, objective = float(self.tokens), dict(trial.objective)
        if trial.teacher == "annealed":
            branch = self.tokens // 10
            self.train("annealed", branch, {self.old: 1.0}, down(rate), rows=16, parent=trunk)
            objective["teacher"] = [str(self.place / "annealed")]
            tokens -= branch
        if objective:
            tokens /= 1 + trial.replay / 3
        again = self.old if trial.unseen else "replay"
        mixture = {self.new: 1 - trial.replay, again: trial.replay}
        stage = {"objective": objective or "next_token"}
        schedule = {**down(trial.peak * rate), "name": trial.shape}
        if trial.decay:
            length, shape, final = trial.decay.split()
            schedule = {"name": "wsd", "peak": trial.peak * rate, "warmup": "0%", "final": final, "decay": length}
            schedule["decay_shape"] = shape
        if trial.later is None and trial.first_rows is None:
            return self.train(name, int(tokens), mixture, schedule, rows=trial.rows, parent=trunk, **stage)
        first = {**schedule, "final": schedule["peak"] / 2}
        last = {**schedule, "peak": first["final"]}
        later = trial.replay if trial.later is None else trial.later
        second = ({self.new: 1 - later, again: later}, last)
        rows: dict[str, Any] = {"rows": trial.rows, "first_rows": trial.first_rows}
        return self.train(name, int(tokens / 2), mixture, first, second=second, parent=trunk, **rows, **stage)

    def rewarm(self, name: str, trial: Trial) -> dict[str, float]:
        """The final losses of an update of a decayed base."""
        peak = self.size["peak"]
        fall = {"peak": peak, "final": peak / 10, "warmup": "5%"}
        self.train("base", self.tokens, {self.old: 1.0}, {"name": "cosine", **fall}, rows=16)
        top = trial.peak * peak
        schedule = {"name": "rewarm", "start": "parent", "peak": top, "final": trial.final * top, "warmup": "1%"}
        mixture = {self.new: 1 - trial.replay, "replay": trial.replay}
        return self.train(name, self.tokens, mixture, schedule, rows=trial.rows, parent="base")

    def train(
        self,
        name: str,
        tokens: int,
        mixture: dict[str, float],
        schedule: dict[str, Any],
        *,
        rows: int,
        parent: str | None = None,
        first_rows: int | None = None,
        second: tuple[dict[str, float], dict[str, Any]] | None = None,
        **stage: Any,
    ) -> dict[str, float]:
        """Final nats per token by corpus of a run, trained unless it is there; `second`: what follows as long again."""
        from perennial.core import records
        from perennial.train.recipe import parse_recipe
        from perennial.train.run import start

        out = self.place / name.replace(" ", "_").replace("%", "").replace(",", "")
        used = {corpus: str(self.corpora[corpus]) for corpus in mixture if corpus in self.corpora}
        others = {corpus: str(path) for corpus, path in self.corpora.items() if corpus not in used}
        if parent:
            others.pop(self.old, None)
        recipe = {
            "name": out.name,
            "seed": self.seed + (parent is not None),
            **({"parent": str(self.place / parent)} if parent else {"model": self.size["model"]}),
            "corpora": used,
            "stages": [
                {
                    "name": f"stage-{number}",
                    "budget": f"{math.floor(tokens / (rows * LENGTH)) * rows * LENGTH} tokens",
                    "mixture": mixture,
                    "schedule": schedule,
                    "optimizer": self.optimizer,
                    "optimizer_state": "keep",
                    "max_epochs": 8.0,
                    **({"sequences": first_rows} if first_rows and number == 1 else {}),
                    **stage,
                }
                for number, (mixture, schedule) in enumerate([(mixture, schedule), *([second] if second else [])], 1)
            ],
            "batch": {"sequences": rows, "sequence_length": LENGTH},
            "evaluation": {"every": None, "tokens": "131072 tokens", "corpora": others},
            "checkpoints": {"every": None, "keep": 1},
        }
        self.recipes[out.name] = recipe
        if not (out / "events.jsonl").exists() or not records.read(out / "events.jsonl", "done"):
            start(parse_recipe(recipe), out, base=Path.cwd(), quiet=True)
        done = records.read(out / "events.jsonl", "done")
        if not done:
            sys.exit(f"{out}: was stopped; run the same command again to go on")
        return {corpus: found["nats_per_token"] for corpus, found in done[-1]["evaluation"]["after"].items()}


def down(peak: float, warmup: str = "0%") -> dict[str, Any]:
    """A line to 0."""
    return {"name": "linear", "peak": peak, "final": 0.0, "warmup": warmup}


def average(losses: dict[str, float]) -> float:
    """Mean over the corpora."""
    return sum(losses.values()) / len(losses)


if __name__ == "__main__":
    main()
