"""The demo's table on larger real text, over seeds: old data, then new data that shift strongly or weakly.

    python benchmarks/continual.py [--tokens '400K tokens'] [--seeds 3] [--work FOLDER] [--records FOLDER]

For novels_en -> novels_de (another language) and novels_en -> peps (another domain), and each seed: a base on the
old corpus, then at equal tokens plain training at the final rate, re-warming without replay, and the default (re-warm,
re-decay, replay), and retraining from scratch on both at twice the tokens. Novels are split by title, so that no book
is on both sides. Resumable: run it again. Records (recipes, events, comparison, table) go to --records.
Needs ../shared/corpora; says so and stops where that is absent.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any

CORPORA = Path(__file__).resolve().parents[2] / "shared" / "corpora"
SHIFTS = {"novels_en-novels_de": ("novels_en", "novels_de", "title"), "novels_en-peps": ("novels_en", "peps", "id")}
FURTHER = {"c-reset": {"optimizer_state": "reset"}}
"""The default with one choice changed: the optimizer's state is dropped."""
MEASURES = ("old", "new", "average")


def prepare_all(work: Path) -> None:
    """Tokenizer on novels_en, and the three corpora, once."""
    from perennial.core.progress import Progress
    from perennial.data.prepare import PrepareSettings, prepare
    from perennial.data.tokenizers.train import train_tokenizer

    if not (work / "tokenizer/tokenizer.json").exists():
        train_tokenizer([CORPORA / "novels_en.jsonl.gz"], work / "tokenizer", vocabulary_size=4096)
    for name in ("novels_en", "novels_de", "peps"):
        settings = PrepareSettings.model_validate(
            {
                "name": name,
                "inputs": [str(CORPORA / f"{name}.jsonl.gz")],
                "tokenizer": str(work / "tokenizer"),
                "id_field": "id",
                "metadata_fields": ["title"],
                "split_by": None if name == "peps" else "title",
                "validation": "5%",
                "max_document_bytes": 32768,
                "against": [] if name == "novels_en" else [str(work / "corpora/novels_en")],
            }
        )
        line = Progress(f"prepare {name}", unit="bytes")
        prepare(settings, work / "corpora" / name, progress=line)
        line.close()


def keep_records(folder: Path, records: Path, work: Path) -> None:
    """Copies what proves a run (recipe, resolved recipe, events) without its weights; WORK stands for --work."""
    for run in sorted(folder.iterdir()):
        if (run / "events.jsonl").exists():
            target = records / run.name
            target.mkdir(parents=True, exist_ok=True)
            for name in ("recipe.yaml", "resolved.json"):
                (target / name).write_text(nameless((run / name).read_text(encoding="utf-8"), work), encoding="utf-8")
            with gzip.GzipFile(target / "events.jsonl.gz", "wb", mtime=0) as file:
                file.write(nameless((run / "events.jsonl").read_text(encoding="utf-8"), work).encode())


def nameless(text: str, work: Path) -> str:
    """The text without where this machine keeps the work folder."""
    return text.replace(str(work.resolve()), "WORK").replace(str(work), "WORK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="400K tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--preset", default="1m")
    parser.add_argument("--work", type=Path, default=Path("runs/continual"))
    parser.add_argument("--records", type=Path)
    arguments = parser.parse_args()
    if not CORPORA.is_dir():
        sys.exit(f"{CORPORA} is not here; this benchmark needs it and does nothing without")
    from perennial.bench.demo import compare_continuations
    from perennial.core.amounts import parse
    from perennial.report.comparison import compare

    tokens = int(parse(arguments.tokens, ("tokens",)).value)
    prepare_all(arguments.work)
    for shift, (old, new, _) in SHIFTS.items():
        tables = []
        for seed in range(arguments.seeds):
            folder = arguments.work / shift / f"seed{seed}"
            corpora = {"old": arguments.work / "corpora" / old, "new": arguments.work / "corpora" / new}
            result = compare_continuations(
                folder,
                corpora,
                tokens=tokens,
                preset=arguments.preset,
                seed=10 * seed,
                evaluation_tokens=65536,
                further=FURTHER,
            )
            if not result.complete:
                sys.exit("stopped; run the same command again to go on")
            comparison = compare(result.runs, labels=result.labels)
            tables.append(comparison)
            if arguments.records:
                keep_records(folder, arguments.records / shift / f"seed{seed}", arguments.work)
        text = summary(shift, tables)
        print(text)
        if arguments.records:
            (arguments.records / shift).mkdir(parents=True, exist_ok=True)
            (arguments.records / shift / "summary.md").write_text(text, encoding="utf-8")
            data = nameless(json.dumps([t.to_json() for t in tables], indent=1), arguments.work)
            (arguments.records / shift / "comparisons.json").write_text(data, encoding="utf-8")


def summary(shift: str, comparisons: list[Any]) -> str:
    """The mean over seeds of every measure with its 95 % Student-t interval, as Markdown."""
    from perennial.core.statistics import mean_interval, verdict

    def cell(values: list[float | None], form: str) -> str:
        known = [v for v in values if v is not None]
        if len(known) < len(values):
            return "-"
        interval = mean_interval(known)
        half = (interval.high - interval.low) / 2
        return format(interval.estimate, form) + (f" +- {format(half, form)}" if len(known) > 1 else "")

    lines = [
        f"## {shift}, {len(comparisons)} seeds, mean +- half of the 95 % interval",
        "",
        "| run | old nats | new nats | average nats | old bpb | new bpb "
        "| tokens | FLOPs | forgetting removed | compute saved |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for index, row in enumerate(comparisons[0].rows):
        rows = [c.rows[index] for c in comparisons]
        losses = [cell([getattr(r, m).nats_per_token for r in rows], ".3f") for m in MEASURES]
        bits = [cell([getattr(r, m).bits_per_byte for r in rows], ".3f") for m in MEASURES[:2]]
        removed = cell([r.forgetting_removed for r in rows], ".1%")
        saved = cell([r.compute_saved for r in rows], ".1%")
        cells = [row.label, *losses, *bits, f"{row.tokens:,}", f"{row.flops:.3g}", removed, saved]
        lines.append("| " + " | ".join(cells) + " |")
    averages = {
        row.label: [c.rows[i].average.nats_per_token for c in comparisons] for i, row in enumerate(comparisons[0].rows)
    }
    kept = next(values for label, values in averages.items() if label.startswith("(c) default"))
    for name in FURTHER:
        judged = verdict(averages[f"({name})"], kept, names=(name, "the default"), quantity="average loss in nats")
        lines += ["", f"{judged.text}."]
    return "\n".join([*lines, ""]) + "\n"


if __name__ == "__main__":
    main()
