"""The demo: the main job, raw text to compared runs, at the scale of a laptop. Behind `perennial demo`.

A tokenizer and a small base model on the old text; then, at equal tokens, plain continued training at the final
learning rate, re-warming without replay, and Perennial's default; and retraining from scratch on both at twice the
tokens. Each is a recipe and a run folder; all are resumable, and running the demo again goes on where it stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perennial.core.amounts import human, human_seconds
from perennial.core.errors import UserError
from perennial.core.files import read_json, write_json
from perennial.core.progress import Progress
from perennial.evals.shift import Shift, shift_between

PEAK = 1e-2
"""Learning rate of the base and of retraining; chosen by benchmarks/demo_rate.py at the demo's scale (see LOG.md)."""

PRESET = "1m"
"""1.5 M parameters with the demo's vocabulary."""

OPTIMIZER = "muon"
"""Far ahead of AdamW in so few updates (see LOG.md); the continuations inherit it from the base's lineage."""

BATCH = {"sequences": 16, "sequence_length": 128}


@dataclass(frozen=True)
class Demo:
    """What the demo is asked to do."""

    out: Path
    minutes: float = 5.0
    old: Path | None = None
    new: Path | None = None
    text_field: str = "text"
    seed: int = 0
    preset: str = PRESET
    vocabulary_size: int = 4096


@dataclass(frozen=True)
class DemoResult:
    """The runs that the demo made, in the order of its table."""

    runs: list[Path]
    labels: list[str]
    complete: bool


def run_demo(demo: Demo, *, quiet: bool = False) -> DemoResult:
    """Runs the demo, or goes on with it. Raises UserError for bad input."""
    begun = time.monotonic()

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    _same_demo(demo)
    corpora = _corpora(demo, say, quiet)
    tokens = _planned_tokens(demo, corpora, time.monotonic() - begun, say)
    result = compare_continuations(
        demo.out, corpora, tokens=tokens, preset=demo.preset, seed=demo.seed, say=say, quiet=quiet
    )
    say(f"\nall runs done after {human_seconds(time.monotonic() - begun)}")
    return result


def compare_continuations(
    out: Path,
    corpora: dict[str, Path],
    *,
    tokens: int,
    preset: str = PRESET,
    seed: int = 0,
    replay: str | None = None,
    peak: float = PEAK,
    batch: dict[str, int] | None = None,
    further: Mapping[str, dict[str, Any]] | None = None,
    evaluation_tokens: int = 24576,
    say: Callable[[str], None] = print,
    quiet: bool = False,
) -> DemoResult:
    """Base, three continuations of `tokens` tokens each, and scratch on both at twice the tokens.

    corpora: prepared 'old' and 'new'; further: more continuations, folder name -> choices of `derive`. Finished runs
    are not repeated; a run that is stopped ends the comparison early.
    """
    out.mkdir(parents=True, exist_ok=True)
    update_tokens = math.prod((batch or BATCH).values())
    tokens = math.ceil(tokens / update_tokens) * update_tokens  # so that twice as many is exactly twice
    rest: dict[str, dict[str, Any]] = {
        "evaluation": {"tokens": f"{evaluation_tokens} tokens", "every": "25%"},
        "checkpoints": {"every": "50%", "keep": 1},
    }
    pretrain = {"seed": seed, "model": {"preset": preset}, "batch": batch or BATCH, **rest}
    old, new = str(corpora["old"].resolve()), str(corpora["new"].resolve())
    base_only: dict[str, Any] = {**rest["evaluation"], "corpora": {"new": new}}

    def base() -> tuple[dict[str, Any], str]:
        stage = _pretrain_stage({"old": "100%"}, tokens, peak)
        recipe = {"name": "base", "corpora": {"old": old}, "stages": [stage], **pretrain, "evaluation": base_only}
        return recipe, "# The parent: a small model trained on the old corpus alone.\n\n"

    def scratch() -> tuple[dict[str, Any], str]:
        stage = _pretrain_stage({"old": "50%", "new": "50%"}, 2 * tokens, peak)
        recipe = {"name": "d-scratch", "corpora": {"old": old, "new": new}, "stages": [stage], **pretrain}
        return recipe, "# Retraining: the same model from random weights on both corpora, at twice the tokens.\n\n"

    def update(name: str, **choices: Any) -> Callable[[], tuple[dict[str, Any], str]]:
        return lambda: _update_recipe(out, corpora["new"], tokens, name, seed, rest, choices)

    plans: list[tuple[str, str, Callable[[], tuple[dict[str, Any], str]]]] = [
        ("base (old data only)", "base", base),
        (
            "(a) plain: final rate, no replay",
            "a-plain",
            update("a-plain", replay="0%", schedule="constant", optimizer_state="keep"),
        ),
        ("(b) re-warmed, no replay", "b-rewarmed", update("b-rewarmed", replay="0%")),
        ("(c) default: re-warmed, re-decayed, replay", "c-default", update("c-default", replay=replay)),
        *((f"({name})", name, update(name, **choices)) for name, choices in (further or {}).items()),
        ("(d) from scratch on both, twice the tokens", "d-scratch", scratch),
    ]
    return _run_all(out, plans, say, quiet)


def _run_all(
    out: Path,
    plans: list[tuple[str, str, Callable[[], tuple[dict[str, Any], str]]]],
    say: Callable[[str], None],
    quiet: bool,
) -> DemoResult:
    from perennial.train.recipe import parse_recipe
    from perennial.train.run import start

    runs: list[Path] = []
    labels: list[str] = []
    for label, folder, make in plans:
        say(f"\n== {label}")
        recipe, header = make()
        result = start(parse_recipe(recipe, source=label), out / folder, base=out, header=header, quiet=quiet)
        if not result["complete"]:
            return DemoResult(runs, labels, False)
        runs.append(out / folder)
        labels.append(label)
    return DemoResult(runs, labels, True)


def _pretrain_stage(mixture: dict[str, str], tokens: int, peak: float) -> dict[str, Any]:
    schedule = {"name": "cosine", "peak": peak, "final": peak / 10, "warmup": "5%"}
    return {
        "name": "pretrain",
        "budget": f"{tokens} tokens",
        "mixture": mixture,
        "schedule": schedule,
        "optimizer": OPTIMIZER,
    }


def _update_recipe(
    out: Path, new: Path, tokens: int, name: str, seed: int, rest: dict[str, Any], choices: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """The recipe that `perennial continue` derives from the base's lineage, with the demo's evaluation settings."""
    from perennial.core.lineage import newest_checkpoint
    from perennial.train.continuing import derive

    derived = derive(
        newest_checkpoint(out / "base"),
        {"new": new},
        budget=f"{tokens} tokens",
        base=out,
        name=name,
        seed=seed + 1,
        shift=lambda: _shift(out / "base"),
        **choices,
    )
    return {**derived.recipe.model_dump(mode="json", exclude_unset=True), **rest}, derived.header()


def _shift(base: Path) -> Shift:
    """The base's losses on old and new, from its own records."""
    from perennial.core.records import read

    corpora = read(base / "events.jsonl", "evaluation")[-1]["corpora"]
    return shift_between(corpora, ["old"], ["new"])


def _same_demo(demo: Demo) -> None:
    """Refuses a folder that holds another demo, or something else."""
    asked = {
        "minutes": demo.minutes,
        "old": str(demo.old),
        "new": str(demo.new),
        "seed": demo.seed,
        "preset": demo.preset,
        "vocabulary_size": demo.vocabulary_size,
    }
    path = demo.out / "demo.json"
    if not path.exists():
        if demo.out.exists() and any(demo.out.iterdir()):
            raise UserError(f"{demo.out}: exists and is no demo folder; give another --out")
        write_json(path, asked)
    elif read_json(path, "demo") != asked:
        raise UserError(
            f"{demo.out}: holds a demo with other settings ({path}); give another --out or delete the folder"
        )


def _corpora(demo: Demo, say: Callable[[str], None], quiet: bool) -> dict[str, Path]:
    """The embedded (or the user's) text, a tokenizer trained on the old one, and both corpora prepared."""
    from perennial.bench.python_text import extract
    from perennial.data.tokenizers.train import train_tokenizer

    text_field = demo.text_field
    if demo.old and demo.new:
        texts = {"old": demo.old, "new": demo.new}
    else:
        say("== text: documentation (old) and source code (new) of this Python installation")
        texts, text_field = extract(demo.out / "text"), "text"
    tokenizer = demo.out / "tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        say(f"== tokenizer: byte-level BPE, {demo.vocabulary_size} tokens, trained on the old text")
        train_tokenizer([texts["old"]], tokenizer, vocabulary_size=demo.vocabulary_size, text_field=text_field)
    say("== corpora: read, deduplicate, split, tokenize")
    return {
        "old": _prepare(demo, "old", texts["old"], tokenizer, text_field, [], say, quiet),
        "new": _prepare(
            demo, "new", texts["new"], tokenizer, text_field, [str(demo.out / "corpora" / "old")], say, quiet
        ),
    }


def _prepare(
    demo: Demo,
    name: str,
    text: Path,
    tokenizer: Path,
    text_field: str,
    against: list[str],
    say: Callable[[str], None],
    quiet: bool,
) -> Path:
    from perennial.data.prepare import PrepareSettings, prepare

    settings = PrepareSettings.model_validate(
        {
            "name": name,
            "inputs": [str(text)],
            "tokenizer": str(tokenizer),
            "text_field": text_field,
            "validation": "4%",
            "max_document_bytes": 16384,
            "split_by": None if demo.old else "module",  # no module's text on both sides
            "against": against,
        }
    )
    folder = demo.out / "corpora" / name
    line = Progress(f"prepare {name}", unit="bytes", quiet=quiet)
    manifest = prepare(settings, folder, progress=line)
    line.close()
    split = manifest["splits"]["train"]
    say(f"   {name}: {split['documents']:,} training documents, {human(split['tokens'], 'tokens')}")
    return folder


def _planned_tokens(demo: Demo, corpora: dict[str, Path], spent: float, say: Callable[[str], None]) -> int:
    """Tokens per continuation so that all five runs (six such budgets) fit the time; kept in plan.json."""
    from perennial.data.corpus import Corpus
    from perennial.model.config import ModelConfig
    from perennial.train.recipe import parse_recipe
    from perennial.train.run import tokens_per_second

    path = demo.out / "plan.json"
    if not path.exists():
        opened = {n: Corpus.open(p) for n, p in corpora.items()}
        config = ModelConfig.from_preset(demo.preset, vocabulary_size=opened["old"].vocabulary_size)
        stage = _pretrain_stage({"old": "100%"}, 1, PEAK)
        recipe = {
            "name": "measure",
            "model": {"preset": demo.preset},
            "corpora": {"old": "."},
            "stages": [stage],
            "batch": BATCH,
        }
        speed = tokens_per_second(config, parse_recipe(recipe))
        # Five starts and the report take some 25 s, evaluation and saving about a tenth of the rest.
        seconds = max(10.0, (demo.minutes * 60 - 25 - spent) * 0.9)
        most = min(int(3.5 * c.train.num_tokens) for c in opened.values())
        wanted = int(speed * seconds / 6)
        write_json(
            path, {"tokens_per_second": round(speed), "tokens": min(wanted, most), "limited_by_data": wanted > most}
        )
    plan = read_json(path, "plan")
    say(
        f"== plan: {human(plan['tokens'], 'tokens')} a run (twice that from scratch), "
        f"at {human(plan['tokens_per_second'], 'tokens/s')}"
    )
    return int(plan["tokens"])
