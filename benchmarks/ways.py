"""Two of the ways of continuing against the plain one: the order of the new text, and ensembles of continuations.

    python benchmarks/ways.py [--demo demo] [--texts FOLDER] [--work runs/ways] [--seeds 3] [--records FOLDER]

For every seed the base of recipes/base.yaml; then with 25% replay `--recipe curriculum`, the new text in three parts
from easy to hard, from hard to easy and mixed; where --texts has novels_de.jsonl.gz and
powershell.jsonl.gz, German novels and then
PowerShell documentation, as named and mixed; and four continuations on the likeliest part of the new text, alone,
together, distilled into one (`--ensemble 4`, recipes/ensemble.yaml) and merged. Prints the tables of
docs/continuing.md: nats per token on at most 65,536 held-out tokens, means over seeds and their range. Needs the
corpora of a finished `make demo`. Resumable: run it again. About fifteen minutes of two cores a seed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

TOKENS = 98304
"""Of an update of the order of parts."""
DOMAIN_TOKENS = 196608
DOMAIN_BYTES = 1_500_000
"""Of text of each domain."""
DOCUMENT_CHARACTERS = 100_000
"""Taken of a document, so that the domain is not three novels."""
LONGEST_BYTES = 16384
PEAK = 0.002
SPIKE_TOKENS = 16384
"""Of each corpus in the evaluations during a run."""
MEMBERS = 4
Losses = dict[str, float]
Rows = dict[str, dict[str, Any]]


def perennial(*arguments: str | Path) -> str:
    """Runs a command of the tool; what it prints. Ends this program when it fails."""
    command = [sys.executable, "-m", "perennial", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1], check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[1:])}: failed ({done.returncode}); run this script again to go on")
    return done.stdout


def is_finished(run: Path) -> bool:
    """Whether a run has come to its end."""
    from perennial.core import records

    return (run / "events.jsonl").exists() and bool(records.read(run / "events.jsonl", "done"))


def losses(model: Path, corpora: Mapping[str, Path], *together: Path) -> Losses:
    """Nats per token by corpus, of a model, or of several by the mean of their probabilities; kept beside the model."""
    kept = model.parent / f"{model.name}{'-together' if together else ''}.losses.json"
    if not kept.exists():
        data = [part for name, path in corpora.items() for part in ("--data", f"{name}={path}")]
        others: list[str | Path] = ["--ensemble", *together] if together else []
        found = json.loads(perennial("eval", model, *data, "--json", *others))
        kept.write_text(json.dumps({name: found["corpora"][name]["nats_per_token"] for name in corpora}))
    return dict(json.loads(kept.read_text()))


def base(work: Path, demo: Path, seed: int) -> Path:
    """The parent: the run of recipes/base.yaml with this seed."""
    recipe = yaml.safe_load((Path(__file__).parents[1] / "recipes/base.yaml").read_text())
    recipe |= {"seed": 10 * seed, "corpora": {name: str(demo / "corpora" / name) for name in ("old", "new")}}
    run = work / "base"
    if not is_finished(run):
        work.mkdir(parents=True, exist_ok=True)
        (work / "base.yaml").write_text(yaml.safe_dump(recipe))
        perennial("train", work / "base.yaml", "--out", run)
    return run


def continued(
    run: Path, parent: Path, data: Mapping[str, Path], tokens: int, way: Mapping[str, Any], *further: str | Path,
    every: int | None = None, also: Mapping[str, Path] | None = None,
) -> Path:  # fmt: skip
    """An update of `parent` with 25% replay; `also` are further corpora to measure, `every` so many tokens."""
    if not is_finished(run):
        evaluation: dict[str, Any] = {"every": f"{every} tokens" if every else None, "tokens": f"{SPIKE_TOKENS} tokens"}
        evaluation["corpora"] = {name: str(path) for name, path in (also or {}).items()}
        named = [part for name, path in data.items() for part in ("--data", f"{name}={path}")]
        perennial(
            "continue", parent, *named, "--tokens", str(tokens), "--replay", "25%", "--peak", str(PEAK), "--recipe",
            json.dumps(way), "--set", f"evaluation={json.dumps(evaluation)}", *further, "--out", run,
        )  # fmt: skip
    return run


def spike(run: Path) -> float:
    """The highest that a loss rose at a switch of data, in nats per token; 0 where none did."""
    from perennial.report.runs import read_run
    from perennial.report.switches import switches

    return max([0.0, *(switch.spike for switch in switches(read_run(run), "nats_per_token"))])


def orders(work: Path, demo: Path, parent: Path) -> Rows:
    """The new text in three parts by the parent's loss."""
    new = demo / "corpora/new"
    corpora = {"new": new, "old": demo / "corpora/old"}
    every = TOKENS // 24
    rows: Rows = {}
    first = continued(
        work / "easy", parent, {"new": new}, TOKENS, {"name": "curriculum"}, every=every, also={"new": new}
    )
    parts = sorted((first / "corpora").iterdir(), reverse=True)  # the hardest first
    data = {part.name: part for part in parts}
    for label, folder, mixed in (("hard to easy", "hard", "0%"), ("mixed", "mixed", "100%")):
        way = {"name": "curriculum", "order": "given", "mixed": mixed}
        rows[label] = _row(continued(work / folder, parent, data, TOKENS, way, every=every, also={"new": new}), corpora)
    return {"easy to hard": _row(first, corpora), **rows}


def domains(work: Path, demo: Path, parent: Path, texts: Path) -> Rows:
    """German novels and then PowerShell documentation, against both at once; 'new' is the mean of the two."""
    data = {name: _domain(work.parent, demo, texts, name) for name in ("novels_de", "powershell")}
    corpora = {**data, "old": demo / "corpora/old"}
    rows: Rows = {}
    for label, mixed in (("as named", "0%"), ("mixed", "100%")):
        way = {"name": "curriculum", "order": "given", "mixed": mixed}
        run = continued(work / f"domains-{label[:2]}", parent, data, DOMAIN_TOKENS, way, every=DOMAIN_TOKENS // 16)
        row = _row(run, corpora)
        row["new"] = sum(row.pop(name) for name in data) / len(data)
        rows[label] = row
    return rows


def _domain(work: Path, demo: Path, texts: Path, name: str) -> Path:
    """The beginnings of the documents of a corpus, held out by title, prepared once for all seeds."""
    corpus = work / "corpora" / name
    if not (corpus / "manifest.json").exists():
        raw, taken = work / f"{name}.jsonl", 0
        raw.parent.mkdir(parents=True, exist_ok=True)
        with (
            open(raw, "w", encoding="utf-8") as out,
            gzip.open(texts / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file,
        ):
            while taken < DOMAIN_BYTES and (line := file.readline()):
                record = json.loads(line)
                text = record["text"][:DOCUMENT_CHARACTERS]
                taken += len(text.encode())
                out.write(json.dumps({"title": record.get("title", str(taken)), "text": text}) + "\n")
        perennial(
            "prepare", raw, "--tokenizer", demo / "tokenizer", "--validation", "10%", "--split-by", "title",
            "--max-document-bytes", str(LONGEST_BYTES), "--out", corpus,
        )  # fmt: skip
    return corpus


def ensemble(work: Path, demo: Path, parent: Path) -> Rows:
    """Four continuations on the likeliest part of the new text, and what can be made of them."""
    best = work / "corpora/best"
    if not (best / "manifest.json").exists():
        perennial("select", demo / "corpora/new", "--by", parent, "--keep", "1.2%", "--out", work / "best.jsonl")
        perennial(
            "prepare", work / "best.jsonl", "--tokenizer", demo / "tokenizer", "--validation", "20%", "--out", best
        )
    new = demo / "corpora/new"
    corpora = {"best": best, "old": demo / "corpora/old", "new": new}
    number = ["--ensemble", str(MEMBERS)]
    taught = continued(
        work / "taught", parent, {"best": best}, 102400, {"name": "data_bound"}, *number, also={"new": new}
    )
    members = [taught.with_name(f"taught-{i}") for i in range(1, MEMBERS + 1)]
    alone = [losses(member, corpora) for member in members]
    rows: Rows = {"the parent": losses(parent, corpora)}
    rows["one member (mean of four)"] = {name: sum(loss[name] for loss in alone) / MEMBERS for name in corpora}
    rows["all four together"] = losses(members[0], corpora, *members[1:])
    rows["taught by them"] = losses(taught, corpora)
    for label, folder, options in (("plain average", "average", []), ("TIES, as published", "ties", ["--ties"])):
        merged = work / folder
        if not merged.exists():
            perennial("merge", *members, *options, "--out", merged)
        rows[f"{label} of the four"] = losses(merged, corpora)
    return rows


def _row(run: Path, corpora: Mapping[str, Path]) -> dict[str, Any]:
    return {**losses(run, corpora), "spike": spike(run)}


def table(by_seed: Sequence[Rows], columns: Sequence[str]) -> str:
    """Markdown: mean over seeds of every column, the range in brackets where there are several."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for label in by_seed[0]:
        cells = []
        for column in columns:
            values = [rows[label][column] for rows in by_seed]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.3f}{spread}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="a finished demo")
    parser.add_argument("--texts", type=Path, help="folder with novels_de.jsonl.gz and powershell.jsonl.gz")
    parser.add_argument("--work", type=Path, default=Path("runs/ways"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--records", type=Path, help="folder for the tables")
    arguments = parser.parse_args()
    demo, work = arguments.demo.resolve(), arguments.work.resolve()
    if not (demo / "corpora/new/manifest.json").exists():
        parser.error(f"--demo {arguments.demo}: no finished demo there; `make demo` makes one")
    found: dict[str, list[Rows]] = {}
    for seed in range(arguments.seeds):
        folder = work / f"seed{seed}"
        parent = base(folder, demo, seed)
        found.setdefault("the order of three parts", []).append(orders(folder, demo, parent))
        if arguments.texts is not None:
            rows = domains(folder, demo, parent, arguments.texts.resolve())
            found.setdefault("one domain after the other", []).append(rows)
        found.setdefault("ensembles", []).append(ensemble(folder, demo, parent))
        tables = [f"## {title}\n\n{table(rows, list(rows[0][next(iter(rows[0]))]))}\n" for title, rows in found.items()]
        text = f"# Order and ensembles, seeds: {seed + 1}\n\n" + "\n".join(tables)
        print(text, flush=True)
        if arguments.records:
            arguments.records.mkdir(parents=True, exist_ok=True)
            (arguments.records / "summary.md").write_text(text, encoding="utf-8")
            (arguments.records / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
