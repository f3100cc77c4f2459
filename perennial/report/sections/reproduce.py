"""How to make the same runs and this page again, and the hashes that tell whether it succeeded."""

from __future__ import annotations

import shlex
from typing import ClassVar

from perennial.report.markup import Column, escape, table
from perennial.report.rows import Comparison
from perennial.report.runs import RECIPE
from perennial.report.sections.base import Section


class Reproduce(Section):
    """Commands and checksums."""

    POSITION: ClassVar[int] = 140
    TITLE: ClassVar[str] = "How to reproduce"

    def render(self, comparison: Comparison) -> str:
        folders = [run.folder for _, _, run in comparison.runs]
        trained = [f"perennial train {shlex.quote(str(f / RECIPE))} --out {shlex.quote(f'{f}-again')}" for f in folders]
        report = f"perennial report {' '.join(shlex.quote(str(f)) for f in folders)} --out report.html"
        commands = escape("\n".join([*trained, report]))
        words = (
            "The same recipe, seed, corpora and software on the same kind of machine give the same losses and the "
            "same weights; elsewhere they agree up to rounding. A recipe names its parent and its corpora by path: "
            "keep those in place, or change the paths; the fingerprints tell whether they are the same."
        )
        return f'<p>{words}</p><pre tabindex="0">{commands}</pre>{_hashes(comparison)}{_corpora(comparison)}'


def _hashes(comparison: Comparison) -> str:
    rows = [("recipe hash", run.recipe_hash, row.label) for _, row, run in comparison.runs if run.recipe_hash]
    rows += [("checkpoint", run.checkpoint, row.label) for _, row, run in comparison.runs if run.checkpoint]
    rows += [(name, digest, row.label) for _, row, run in comparison.runs for name, digest in run.hashes.items()]
    order = [row.label for row in comparison.rows]
    rows.sort(key=lambda item: order.index(item[2]))
    columns = [
        Column("What", [escape(name) for name, _, _ in rows], text=True),
        Column("sha256, or id", [_hash(digest) for _, digest, _ in rows], text=True, wrap=True),
    ]
    body = table(("Run", [escape(label) for _, _, label in rows]), columns, dense=True)
    return f"<details><summary>Hashes of recipes, records and weights</summary>{body}</details>"


def _corpora(comparison: Comparison) -> str:
    rows = {
        (name, str(facts.get("fingerprint", "")), str(facts.get("path", "")))
        for _, _, run in comparison.runs
        for name, facts in run.corpora.items()
    }
    if not rows:
        return ""
    listed = sorted(rows)
    columns = [
        Column("Fingerprint", [_hash(fingerprint) for _, fingerprint, _ in listed], text=True, wrap=True),
        Column("Path", [_hash(path) for _, _, path in listed], text=True, wrap=True),
    ]
    body = table(("Corpus", [escape(name) for name, _, _ in listed]), columns, dense=True)
    return f"<details><summary>Corpora</summary>{body}</details>"


def _hash(text: str | None) -> str:
    return f'<span class="hash">{escape(text or "")}</span>'
