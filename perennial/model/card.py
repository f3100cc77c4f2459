"""What else belongs to a model folder and must not get lost: model card, licence files, generation defaults.

A checkpoint carries them on from its parent's folder. In the card (README.md) Perennial writes one section, between
markers, from the lineage; a later checkpoint replaces it, all else in the card stays as it is, byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from perennial.core.amounts import human
from perennial.core.lineage import Fact, Lineage, Origin, StageRecord
from perennial.model.folder_config import GENERATION_CONFIG

CARD = "README.md"
BEGIN, END = "<!-- perennial -->", "<!-- /perennial -->"

_TERMS = re.compile(
    r"(licen[cs]e|notice|(acceptable[_-])?use[_-]policy|acceptable[_-]use|terms([_-]of[_-]use)?|copying|copyright)"
    r"([._ -].*)?",
    re.IGNORECASE,
)
"""Names of files that state the terms under which a model may be used."""
_FRONT_MATTER = re.compile(r"\A(---[ \t]*\r?\n)(.*?)(^---[ \t]*\r?$\n?)", re.DOTALL | re.MULTILINE)
_SECTION = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)


@dataclass(frozen=True)
class Companions:
    """What a folder holds beside weights, configuration and tokenizer."""

    card: str | None = None
    """README.md; bytes that are not UTF-8 as surrogates, so that they are written as they were read."""
    terms: Mapping[str, bytes] = field(default_factory=dict)
    """Licence and notice files by name."""
    generation: bytes | None = None
    """generation_config.json: token ids and sampling defaults."""


def read_companions(folder: Path) -> Companions:
    """The companions of a model folder."""
    card, generation = folder / CARD, folder / GENERATION_CONFIG
    return Companions(
        card=card.read_bytes().decode("utf-8", "surrogateescape") if card.is_file() else None,
        terms={path.name: path.read_bytes() for path in _term_files(folder)},
        generation=generation.read_bytes() if generation.is_file() else None,
    )


def write_companions(companions: Companions, folder: Path, lineage: Lineage) -> None:
    """Writes the companions into a checkpoint's folder, with the card's section made anew from the lineage."""
    (folder / CARD).write_bytes(updated_card(companions.card, lineage).encode("utf-8", "surrogateescape"))
    for name, content in companions.terms.items():
        (folder / name).write_bytes(content)
    if companions.generation is not None:
        (folder / GENERATION_CONFIG).write_bytes(companions.generation)


def license_of(folder: Path) -> str | None:
    """The licence as the card's front matter states it, else the name of the licence file; None without either."""
    card = folder / CARD
    stated = front_matter(card.read_bytes().decode("utf-8", "replace")) if card.is_file() else {}
    if license := stated.get("license"):
        name = ", ".join(map(str, license)) if isinstance(license, list) else str(license)
        return f"{name} ({stated['license_name']})" if stated.get("license_name") else name
    return next((path.name for path in _term_files(folder) if path.name.lower().startswith("licen")), None)


def _term_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if _TERMS.fullmatch(path.name) and path.is_file()]


def front_matter(card: str) -> dict[str, Any]:
    """The YAML mapping at the head of a card; empty when there is none, or none that can be read."""
    match = _FRONT_MATTER.match(card)
    try:
        data = yaml.safe_load(match[2]) if match else None
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def updated_card(card: str | None, lineage: Lineage) -> str:
    """The card with `base_model` (where the model began elsewhere and the card names none) and the lineage's section.

    Without a card a small one is made; it states no licence, because nobody has.
    """
    if card is None:
        title = lineage.stages[-1].run if lineage.stages else "Checkpoint"
        card = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {title}\n"
    if lineage.origin is not None:
        card = _with_base_model(card, lineage.origin.name)
    newline = "\r\n" if "\r\n" in card else "\n"
    section = newline.join([BEGIN, *_section(lineage), END])
    if _SECTION.search(card):
        return _SECTION.sub(lambda match: section, card, count=1)
    gap = "" if card.endswith("\n") or not card else newline
    return f"{card}{gap}{newline}{section}{newline}"


def _with_base_model(card: str, name: str) -> str:
    entry = yaml.safe_dump({"base_model": name}, allow_unicode=True, width=1000).strip()
    match = _FRONT_MATTER.match(card)
    if match is None:
        return f"---\n{entry}\n---\n\n{card}"
    stated = front_matter(card)
    if "base_model" in stated or (match[2].strip() and not stated):  # there already, or YAML that cannot be read
        return card
    newline = "\r\n" if match[1].endswith("\r\n") else "\n"
    return f"{match[1]}{match[2]}{entry}{newline}{match[3]}{card[match.end() :]}"


def _section(lineage: Lineage) -> list[str]:
    """The section's lines, in Markdown. Nothing in it differs between a resumed and an uninterrupted run."""
    lines = ["## How this model was made", ""]
    if lineage.origin is not None:
        lines += [*_origin_lines(lineage.origin), ""]
    lines += [
        "Trained with Perennial; the whole record is in `perennial/lineage.json`. One line per stage, oldest first:",
        "",
        "| run | started from | tokens | data | learning rate: start, peak, end |",
        "|---|---|---|---|---|",
        *(_stage_row(stage) for stage in lineage.stages),
    ]
    lines += [f"- {_cell(', '.join(f'{k}: {v}' for k, v in change.items()))}" for change in lineage.changes]
    return [*lines, *_loss_lines(lineage)]


def _origin_lines(origin: Origin) -> list[str]:
    facts = {"tokens": origin.tokens, "peak learning rate": origin.peak, "final learning rate": origin.rate}
    past = ", ".join(f"{name} {_number(name, fact)}{_mark(fact)}" for name, fact in facts.items())
    return [
        f"Began as **{_cell(origin.name)}** ({origin.model_type}, {human(origin.parameters)} parameters, weights "
        f"`{origin.weights}`), which Perennial did not train. Of its past: {past}."
    ]


def _number(name: str, fact: Fact) -> str:
    return human(fact.value) if name == "tokens" else f"{fact.value:.3g}"


def _mark(fact: Fact) -> str:
    return " (estimate)" if fact.is_estimate else " (stated)"


def _stage_row(stage: StageRecord) -> str:
    start = "random weights" if stage.parent is None else f"`{stage.parent}`"
    total = sum(source["tokens"] for source in stage.sources) or 1
    data = ", ".join(f"{source['name']} {source['tokens'] / total:.1%}" for source in stage.sources)
    rates = ", ".join(f"{rate:.3g}" for rate in (stage.rate_start, stage.rate_peak, stage.rate_end))
    cells = (f"{stage.run}, {stage.stage}", start, human(stage.tokens), data, rates)
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _loss_lines(lineage: Lineage) -> list[str]:
    before, after = (lineage.evaluation.get(moment, {}) for moment in ("before", "after"))
    names = [*before, *(name for name in after if name not in before)]
    if not names:
        return []
    rows = [f"| {_cell(name)} | {_loss(before.get(name))} | {_loss(after.get(name))} |" for name in names]
    heading = "Validation loss of the last run, nats per token (bits per byte):"
    return ["", heading, "", "| text | before | after |", "|---|---|---|", *rows]


def _loss(measured: Mapping[str, float] | None) -> str:
    return "-" if measured is None else f"{measured['nats_per_token']:.4f} ({measured['bits_per_byte']:.4f})"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
