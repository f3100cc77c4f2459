"""New tokens for a new language: loss per byte right after extension and after 1 M tokens, for each way to fill rows.

    python benchmarks/vocab_extend.py [--tokens '1M tokens'] [--base-tokens '1M tokens'] [--seeds 3] [--add 4000]
                                      [--work FOLDER] [--records FOLDER]

A base model is trained on English novels with a tokenizer made for them; `perennial vocab extend` adds tokens for
German, and the model is trained on German novels. Losses are bits per byte of whole validation texts, so that models
with different tokenizers can be compared; old text is cut by each model's own tokenizer. Beside the four ways to fill
new rows: the mean with the new rows trained first, on a fifth of the tokens (their rate 1e-2, all else frozen); and
the model that is not extended, trained on the same number of bytes of the same text, which are more tokens.
Validation is by title, the first chapter of each. Resumable: run it again. Records (recipes, events, results, table)
go to --records.
Needs ../shared/corpora; says so and stops where that is absent.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

CORPORA = Path(__file__).resolve().parents[2] / "shared" / "corpora"
TEXTS = {"en": "novels_en", "de": "novels_de"}
VALIDATION = "5%"
CHAPTERS = 1
INITS = ("zero_mean", "mean", "position", "contexts")
PLAIN, ROWS_FIRST = "not-extended", "rows-first"
LEARNED_BYTES = 16 << 20
"""Of German, to find the tokens in."""
ROWS_SHARE, ROWS_RATE = 0.2, 1e-2
BATCH = {"sequences": 8, "sequence_length": 256}


def write_texts(work: Path) -> None:
    """The novels as .jsonl, those titles that validation will hold out with their first chapter only, once."""
    from perennial.core.amounts import parse
    from perennial.data.splits import VALIDATION as HELD_OUT
    from perennial.data.splits import split_of

    share = parse(VALIDATION, ("share",)).value
    for name, source in TEXTS.items():
        target = work / "texts" / f"{name}.jsonl"
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        chapters = Counter[str]()
        with (
            gzip.open(CORPORA / f"{source}.jsonl.gz", "rt", encoding="utf-8") as lines,
            open(partial := target.with_suffix(".partial"), "w", encoding="utf-8") as file,
        ):
            for line in lines:
                title = json.loads(line)["title"]
                chapters[title] += 1
                if chapters[title] <= CHAPTERS or split_of(str(title).encode(), share) != HELD_OUT:
                    file.write(line)
        partial.replace(target)


def prepare_corpus(work: Path, name: str, tokenizer: Path, out: Path) -> None:
    """One of the texts, cut by a tokenizer."""
    from perennial.core.progress import Progress
    from perennial.data.prepare import PrepareSettings, prepare

    settings = {
        "name": out.name,
        "inputs": [str(work / "texts" / f"{name}.jsonl")],
        "tokenizer": str(tokenizer),
        "id_field": "id",
        "metadata_fields": ["title"],
        "split_by": "title",
        "validation": VALIDATION,
        "max_document_bytes": 32768,
    }
    with Progress(f"prepare {out.name}", unit="bytes") as line:
        prepare(PrepareSettings.model_validate(settings), out, progress=line)


def run(folder: Path, recipe: dict[str, Any]) -> None:
    """Makes or resumes a run; stops the benchmark when it was stopped."""
    from perennial.train.recipe import parse_recipe
    from perennial.train.run import start

    common = {"name": folder.name, "batch": BATCH, "precision": "fp32", "checkpoints": {"every": None}}
    result = start(parse_recipe({**common, **recipe}), folder, base=Path.cwd())
    if not result["complete"]:
        sys.exit("stopped; run the same command again to go on")


def base(work: Path, seed: int, tokens: str) -> Path:
    """The model of English."""
    folder = work / f"seed{seed}" / "base"
    stage = {
        "name": "pretrain",
        "budget": tokens,
        "mixture": {"en": "100%"},
        "schedule": {"name": "cosine", "peak": 4e-3, "warmup": "5%"},
    }
    model = {"preset": "1m", "options": {"context": BATCH["sequence_length"]}}
    data = {"corpora": {"en": str((work / "corpora/en").resolve())}, "evaluation": {"tokens": "100%", "every": None}}
    run(folder, {"seed": seed, "model": model, "stages": [stage], **data})
    return folder


def update(tokens: float, **more: Any) -> dict[str, Any]:
    """A stage of training on German."""
    schedule = {"name": "rewarm", "start": "parent", "peak": 2e-3, "final": 2e-4, "warmup": "2%"}
    return {"name": "update", "budget": f"{tokens:.0f} tokens", "mixture": {"de": "100%"}, "schedule": schedule, **more}


def extend(work: Path, seed: int, init: str, add: int) -> Path:
    """The base with German tokens."""
    from perennial.data.tokenizers.extend import TextReading
    from perennial.train.extending import Asked, extend_vocabulary

    out = work / f"seed{seed}" / f"extended-{init}"
    if not out.exists():
        asked = Asked(add=add, init=init, seed=seed, reading=TextReading(sample_bytes=LEARNED_BYTES))
        result = extend_vocabulary(work / f"seed{seed}/base", {"de": work / "corpora/de"}, out, asked)
        (work / f"seed{seed}" / f"extended-{init}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return out


def continue_all(work: Path, seed: int, tokens: int, add: int) -> None:
    """All updates of one base."""
    parents = {init: extend(work, seed, init, add) for init in INITS}
    for name in TEXTS:
        prepare_corpus(work, name, parents["mean"], work / "corpora" / f"{name}-new")
    corpora = {name: str((work / "corpora" / name).resolve()) for name in ("de", "de-new", "en-new")}
    measure = {"tokens": "100%", "every": None}
    for init, parent in parents.items():
        extended = {
            "seed": seed + 1,
            "parent": str(parent.resolve()),
            "corpora": {"de": corpora["de-new"]},
            "evaluation": {**measure, "corpora": {"en-new": corpora["en-new"]}},
        }
        run(work / f"seed{seed}" / init, {**extended, "stages": [update(tokens)]})
        if init == "mean":
            rows = update(ROWS_SHARE * tokens, name="new-rows", train="new_rows")
            rows["schedule"] = {"name": "cosine", "peak": ROWS_RATE, "warmup": "5%"}
            stages = [rows, update((1 - ROWS_SHARE) * tokens)]
            run(work / f"seed{seed}" / ROWS_FIRST, {**extended, "stages": stages})
    same_bytes = tokens * bytes_per_token(work, "de-new") / bytes_per_token(work, "de")
    plain = {"seed": seed + 1, "parent": str((work / f"seed{seed}/base").resolve()), "evaluation": measure}
    run(work / f"seed{seed}" / PLAIN, {**plain, "corpora": {"de": corpora["de"]}, "stages": [update(same_bytes)]})


def bytes_per_token(work: Path, corpus: str) -> float:
    """Of the training text."""
    from perennial.data.corpus import Corpus

    split = Corpus.open(work / "corpora" / corpus).train
    return split.num_bytes / split.num_tokens


RUNS = {
    PLAIN: "not extended, same bytes",
    **{init: init for init in INITS},
    ROWS_FIRST: "mean, new rows first",
}
MEASURES = ("new, right after", "new, at the end", "old, right after", "old, at the end")


def measured(work: Path, seed: int, name: str) -> dict[str, float]:
    """Bits per byte of one run, its tokens and FLOPs, and the bytes of text that it was trained on."""
    from perennial.core import records

    events = work / f"seed{seed}" / name / "events.jsonl"
    done = records.read(events, "done")[-1]
    is_extended = name != PLAIN
    old = "en-new" if is_extended else "en"
    moments = [done["evaluation"][moment] for moment in ("before", "after")]
    values = [moment[corpus]["bits_per_byte"] for corpus in ("de", old) for moment in moments]
    num_bytes = done["tokens"] * bytes_per_token(work, "de-new" if is_extended else "de")
    return {
        **dict(zip(MEASURES, values, strict=True)),
        "tokens": done["tokens"],
        "bytes": num_bytes,
        "flops": done["flops"],
    }


def summary(results: dict[str, list[dict[str, float]]], fertility: dict[str, Any]) -> str:
    """Means over seeds with 95 % intervals, and verdicts, as Markdown."""
    from perennial.core.statistics import mean_interval, verdict

    seeds = len(next(iter(results.values())))
    lines = [
        f"## English model, {fertility['added']} German tokens; bits per byte, {seeds} seeds, mean +- half of the 95 % "
        "interval",
        "",
        f"| run | {' | '.join(MEASURES)} | tokens | text | FLOPs |",
        "|---|" + "---|" * (len(MEASURES) + 3),
    ]
    for name, values in results.items():
        cells = [RUNS[name]]
        for measure in MEASURES:
            interval = mean_interval([value[measure] for value in values])
            half = (interval.high - interval.low) / 2
            cells.append(f"{interval.estimate:.3f}" + (f" +- {half:.3f}" if seeds > 1 else ""))
        one = values[0]
        cells += [f"{one['tokens'] / 1e6:.2f}M", f"{one['bytes'] / 1e6:.2f} MB", f"{one['flops']:.3g}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for text, counts in fertility["fertility"].items():
        before, after = (counts[f"tokens_per_word_{moment}"] for moment in ("before", "after"))
        lines.append(
            f"Tokens per word, {text}: {before:.3f} before, {after:.3f} after; "
            f"{counts['recut_share']:.2%} of words cut otherwise."
        )
    lines.append("")
    for measure in ("new, right after", "new, at the end", "old, at the end"):
        for name in [init for init in INITS if init != "zero_mean"] + [ROWS_FIRST]:
            other = "mean" if name == ROWS_FIRST else "zero_mean"
            pair = [[value[measure] for value in results[key]] for key in (other, name)]
            quantity = f"bits per byte on {measure.replace(',', ' text')}"
            lines.append(f"{verdict(*pair, names=(RUNS[other], RUNS[name]), quantity=quantity).text}.")
    best = min(INITS, key=lambda init: sum(value["new, at the end"] for value in results[init]))
    pair = [[value["new, at the end"] for value in results[key]] for key in (PLAIN, best)]
    judged = verdict(*pair, names=(RUNS[PLAIN], best), quantity="bits per byte on new text at the end")
    return "\n".join([*lines, f"{judged.text}.", ""])


def keep_records(work: Path, records: Path, seed: int) -> None:
    """Copies what proves the runs, without weights; WORK stands for --work."""
    for name in ("base", *RUNS):
        source, target = work / f"seed{seed}" / name, records / f"seed{seed}" / name
        target.mkdir(parents=True, exist_ok=True)
        for file in ("recipe.yaml", "resolved.json"):
            (target / file).write_text(nameless((source / file).read_text(encoding="utf-8"), work), encoding="utf-8")
        with gzip.GzipFile(target / "events.jsonl.gz", "wb", mtime=0) as packed:
            packed.write(nameless((source / "events.jsonl").read_text(encoding="utf-8"), work).encode())
    for init in INITS:
        result = json.loads((work / f"seed{seed}" / f"extended-{init}.json").read_text(encoding="utf-8"))
        if (seed, init) != (0, "mean"):
            del result["tokens"]  # the same in all
        text = json.dumps(result, indent=1) + "\n"
        (records / f"seed{seed}" / f"extended-{init}.json").write_text(nameless(text, work), encoding="utf-8")


def nameless(text: str, work: Path) -> str:
    """The text without where this machine keeps the work folder."""
    return text.replace(str(work.resolve()), "WORK").replace(str(work), "WORK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1M tokens")
    parser.add_argument("--base-tokens", default="1M tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--add", type=int, default=4000)
    parser.add_argument("--work", type=Path, default=Path("runs/vocab_extend"))
    parser.add_argument("--records", type=Path)
    arguments = parser.parse_args()
    if not CORPORA.is_dir():
        sys.exit(f"{CORPORA} is not here; this benchmark needs it and does nothing without")
    from perennial.core.amounts import parse
    from perennial.data.tokenizers.train import train_tokenizer

    work = arguments.work
    tokens = int(parse(arguments.tokens, ("tokens",)).value)
    write_texts(work)
    if not (work / "tokenizer/tokenizer.json").exists():
        train_tokenizer([work / "texts/en.jsonl"], work / "tokenizer", vocabulary_size=4096, sample_bytes=16 << 20)
    for name in TEXTS:
        prepare_corpus(work, name, work / "tokenizer", work / "corpora" / name)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for number in range(arguments.seeds):
        seed = 10 * number
        base(work, seed, arguments.base_tokens)
        continue_all(work, seed, tokens, arguments.add)
        for name, values in results.items():
            values.append(measured(work, seed, name))
        text = summary(results, json.loads((work / f"seed{seed}/extended-mean.json").read_text(encoding="utf-8")))
        print(text, flush=True)
        if arguments.records:
            keep_records(work, arguments.records, seed)
            (arguments.records / "summary.md").write_text(text, encoding="utf-8")
            (arguments.records / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
