"""Is the planner right? Calibrates on small models, plans runs 4 to 8 times larger, runs them, and compares.

    python benchmarks/plan_check.py [--work runs/plan_check] [--records records/DATE_plan_check]
        [--corpora FOLDER] [--shifts novels_en:novels_de powershell:peps] [--preset 1m] [--tokens 802816] [--rows 16]
        [--replays 0 1 5 25 50] [--seeds 1] [--list]

For every shift: a base on the old text, `perennial plan --calibrate` on small copies of it, then for 0, 1, 5, 25 and
50% of old text `perennial plan` (prediction and recipe) and `perennial train` (measurement). Prints prediction beside
measured for both losses, time and memory, and whether the best share was named. Bars: losses within 2%, time and memory
within 10%, the best share within one step of the grid. `--seeds 3` trains each plan with two more seeds; the mean of
the losses is compared, time and memory are of the first. Everything is resumable: run it again. One thread throughout:
figures of time mean something on a machine that does nothing else. About 25 minutes per shift with the defaults.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CORPORA = ROOT.parent / "shared" / "corpora"
SHIFTS = ("novels_en:novels_de", "powershell:peps")
REPLAYS = (0, 1, 5, 25, 50)
PEAK = 1e-2
"""Of the base; near the best of a sweep with Muon at this size (records of `perennial bench continual`)."""
LOSS_BAR, COST_BAR = 0.02, 0.10


@dataclass(frozen=True)
class Check:
    """One shift: where its things lie."""

    name: str
    folder: Path
    old: tuple[str, Path]
    new: tuple[str, Path]

    @property
    def calibration(self) -> Path:
        """The calibration file."""
        return self.folder / "calibration.json"

    def run(self, replay: int, seed: int = 1) -> Path:
        """Folder of the run at a share of old text."""
        return self.folder / "runs" / (f"replay{replay}" + (f"-seed{seed}" if seed > 1 else ""))

    def plan(self, replay: int) -> Path:
        """File of its plan."""
        return self.folder / "plans" / f"replay{replay}.json"

    def recipe(self, replay: int, seed: int = 1) -> Path:
        """File of its recipe."""
        return self.plan(replay).with_name(f"{self.run(replay, seed).name}.yaml")


def main() -> int:
    """Works off what is left and prints the comparison; 0 when every bar holds, 1 when not, 130 when stopped."""
    options = _options()
    checks = _prepared(options)
    rows: list[dict[str, Any]] = []
    for check in checks:
        base = check.folder / "base"
        if not options.list:
            _train_base(check, base, options)
            _calibrate(check, base, options)
            for replay in options.replays:
                _plan(check, base, replay, options)
                for seed in range(1, options.seeds + 1):
                    _train(_with_seed(check, replay, seed), check.run(replay, seed))
        rows += [row for replay in options.replays if (row := _row(check, replay, options.seeds)) is not None]
    text, passed = _report(rows, checks)
    print(text)
    if options.records and not options.list:
        _keep(checks, Path(options.records), options.work, text, rows)
    return 0 if passed else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "plan_check")
    parser.add_argument("--records", help="folder to keep results in (default: none)")
    parser.add_argument("--corpora", type=Path, default=CORPORA)
    parser.add_argument("--shifts", nargs="+", default=list(SHIFTS), metavar="OLD:NEW")
    parser.add_argument("--preset", default="1m")
    parser.add_argument("--tokens", type=int, default=802816, help="of the base, and of every update")
    parser.add_argument("--rows", type=int, default=16, help="of 128 tokens in a batch")
    parser.add_argument("--replays", nargs="+", type=int, default=REPLAYS, choices=REPLAYS, help="percent of old text")
    parser.add_argument("--seeds", type=int, default=1, choices=range(1, 10), help="runs of every plan")
    parser.add_argument("--minutes", type=float, default=30.0, help="most that a calibration may take")
    parser.add_argument("--list", action="store_true", help="show what is known, run nothing")
    return parser.parse_args()


def _prepared(options: argparse.Namespace) -> list[Check]:
    """The shifts with their corpora tokenized, once per work folder."""
    from perennial.bench.continual_text import Reading, prepare_shift, standard_shifts

    found = []
    for shift in standard_shifts(options.corpora, options.shifts):
        text = prepare_shift(shift, options.work, Reading())
        (old, old_path), (new, new_path) = text.corpora.items()
        folder = options.work / f"{shift.name}-{options.preset}-{options.tokens}x{options.rows}"
        found.append(Check(shift.name, folder, (old, old_path.resolve()), (new, new_path.resolve())))
    return found


def _perennial(*words: object) -> str:
    """Runs a command of Perennial on one thread; its standard output. Ends this program when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "perennial", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def _is_finished(run: Path) -> bool:
    from perennial.bench.continual_grid import finished

    return finished(run) is not None


def _train(recipe: Path, run: Path) -> None:
    if not _is_finished(run):
        print(f"train {run.parent.parent.name}/{run.name}", flush=True)
        if (run / "resolved.json").is_file():
            _perennial("train", run, "--json")
        else:
            _perennial("train", recipe, "--out", run, "--json")


def _train_base(check: Check, base: Path, options: argparse.Namespace) -> None:
    """The model to continue: from random weights on the old text, cosine to a tenth."""
    recipe = check.folder / "base.yaml"
    name, path = check.old
    data = {
        "name": "base",
        "model": {"preset": options.preset},
        "corpora": {name: str(path)},
        "stages": [
            {
                "name": "pretrain",
                "budget": f"{options.tokens} tokens",
                "mixture": {name: "100%"},
                "schedule": {"name": "cosine", "peak": PEAK, "final": "10%", "warmup": "5%"},
                "optimizer": "muon",
            }
        ],
        "batch": {"sequences": options.rows, "sequence_length": 128},
        "evaluation": {"corpora": {check.new[0]: str(check.new[1])}, "every": None},
        "checkpoints": {"every": None, "keep": 1},
    }
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    _train(recipe, base)


def _calibrate(check: Check, base: Path, options: argparse.Namespace) -> None:
    if not check.calibration.is_file():
        begun = time.monotonic()
        words = ["--data", f"{check.new[0]}={check.new[1]}", "--budget", f"{options.tokens} tokens"]
        _perennial("plan", base, "--calibrate", *words, "--out", check.calibration, "--minutes", options.minutes)
        print(f"calibrated in {time.monotonic() - begun:.0f} s", flush=True)


def _plan(check: Check, base: Path, replay: int, options: argparse.Namespace) -> None:
    """The prediction and the recipe of one share."""
    place = check.plan(replay)
    if place.is_file():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    recipe = check.recipe(replay)
    recipe.unlink(missing_ok=True)
    words = ["--data", f"{check.new[0]}={check.new[1]}", "--replay", f"{replay}%", "--budget"]
    words += [f"{options.tokens} tokens", "--calibration", str(check.calibration), "--out", str(recipe), "--json"]
    place.write_text(_perennial("plan", base, *words), encoding="utf-8")


def _with_seed(check: Check, replay: int, seed: int) -> Path:
    """The planned recipe with another seed."""
    place = check.recipe(replay, seed)
    if seed > 1:
        planned = check.recipe(replay).read_text(encoding="utf-8")
        text = re.sub(r"^seed: 1$", f"seed: {seed}", planned, count=1, flags=re.MULTILINE)
        assert text != planned, f"{check.recipe(replay)}: no line 'seed: 1'"
        place.write_text(text, encoding="utf-8")
    return place


def _row(check: Check, replay: int, seeds: int) -> dict[str, Any] | None:
    """Prediction and measurement of a share; losses are means over the seeds. None while a run is not finished."""
    found = [one for seed in range(1, seeds + 1) if (one := _row_of_run(check, replay, seed)) is not None]
    if len(found) < seeds:
        return None
    row = found[0]
    for side in ("old", "new"):
        row[side]["runs"] = [one[side]["measured"] for one in found]
        row[side]["measured"] = statistics.mean(row[side]["runs"])
    return row


def _row_of_run(check: Check, replay: int, seed: int) -> dict[str, Any] | None:
    """Prediction and measurement of one run, as its report shows them; None while it is not finished."""
    from perennial.bench.continual_grid import finished
    from perennial.report.foretold import outcome_of

    run = check.run(replay, seed)
    done = finished(run)
    found = outcome_of(run) if done is not None else None
    if done is None or found is None:
        return None
    numbers = {one.side or one.unit: one for one in found.numbers}
    if problems := [*found.notes, *(one.why_not for one in numbers.values() if one.why_not)]:
        sys.exit(f"{run}: {problems[0]}")
    calibration = json.loads(check.calibration.read_text(encoding="utf-8"))
    small = max(run["flops_per_token"] * run["tokens"] for run in calibration["runs"] if run["kind"] == "update")
    row: dict[str, Any] = {"shift": check.name, "replay": replay, "larger": done["flops"] / small}
    for name, key in (("old", "old"), ("new", "new"), ("seconds", "s"), ("bytes", "bytes")):
        predicted = numbers[key].predicted
        interval = {} if predicted.low is None else {"low": predicted.low, "high": predicted.high}
        row[name] = {"mean": predicted.value, **interval, "measured": numbers[key].measured}
    return row


def _report(rows: list[dict[str, Any]], checks: list[Check]) -> tuple[str, bool]:
    """The comparison as Markdown, and whether every bar holds."""
    lines = ["# Plans beside what was then measured", ""]
    passed = bool(rows)
    for check in checks:
        mine = [row for row in rows if row["shift"] == check.name]
        if not mine:
            lines += [f"## {check.name}: nothing finished", ""]
            passed = False
            continue
        lines += [
            f"## {check.name}: runs of {mine[0]['larger']:.1f} times the compute of the largest calibration run",
            "",
            "| old text | old loss: planned | measured | off | new loss: planned | measured | off | time | memory |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in mine:
            cells = [f"{row['replay']}%"]
            for side in ("old", "new"):
                found = row[side]
                inside = "" if found["low"] <= found["measured"] <= found["high"] else " outside"
                off = found["mean"] / found["measured"] - 1
                passed &= abs(off) <= LOSS_BAR
                cells += [
                    f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]",
                    _measured(found["runs"]),
                    f"{off:+.2%}{inside}",
                ]
            for what in ("seconds", "bytes"):
                off = row[what]["mean"] / row[what]["measured"] - 1
                passed &= abs(off) <= COST_BAR
                scale, unit = (1.0, "s") if what == "seconds" else (2**-20, "MiB")
                cells.append(
                    f"{scale * row[what]['mean']:.0f} / {scale * row[what]['measured']:.0f} {unit}, {off:+.1%}"
                )
            lines.append("| " + " | ".join(cells) + " |")
        if len(mine) == len(REPLAYS):
            named, right = (_best(mine, which) for which in ("mean", "measured"))
            steps = abs(REPLAYS.index(named) - REPLAYS.index(right))
            passed &= steps <= 1
            verdict = "named correctly" if not steps else f"{steps} step{'s' if steps > 1 else ''} off"
            lines += ["", f"Best share by the mean of both losses: planned {named}%, measured {right}%: {verdict}."]
        else:
            passed = False
        lines.append("")
    words = f"losses within {LOSS_BAR:.0%}, time and memory within {COST_BAR:.0%}, best share within one step"
    return "\n".join([*lines, f"Bars ({words}): {'all hold' if passed else 'not all hold'}."]), passed


def _measured(runs: list[float]) -> str:
    """'3.550' or, of several seeds, '3.554 (3.546 to 3.565)'."""
    spread = f" ({min(runs):.3f} to {max(runs):.3f})" if len(runs) > 1 else ""
    return f"{statistics.mean(runs):.3f}{spread}"


def _best(rows: list[dict[str, Any]], which: str) -> int:
    """The share of the lowest mean of both losses."""
    return int(min(rows, key=lambda row: float(row["old"][which] + row["new"][which]))["replay"])


def _keep(checks: list[Check], folder: Path, work: Path, text: str, rows: list[dict[str, Any]]) -> None:
    """Summary, calibrations, plans, recipes and records of all runs, without weights and places."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.md").write_text(text + "\n", encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")

    def nameless(path: Path) -> str:
        content = path.read_text(encoding="utf-8")
        for place in (work.resolve(), work, os.path.relpath(work, ROOT), ROOT):
            content = content.replace(str(place), "WORK" if place != ROOT else "ROOT")
        return content

    for check in checks:
        target = folder / check.name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        files = [check.calibration, *sorted((check.folder / "plans").iterdir())]
        for path in files:
            if path.is_file():
                (target / path.name).write_text(nameless(path), encoding="utf-8")
        for run in sorted((check.folder / "runs").iterdir()):
            events = run / "events.jsonl"
            if events.is_file():
                with gzip.GzipFile(target / f"{run.name}.events.jsonl.gz", "wb", mtime=0) as file:
                    file.write(nameless(events).encode())


if __name__ == "__main__":
    sys.exit(main())
