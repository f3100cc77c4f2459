"""The report page: all sections in order, in one HTML file that needs nothing else, no network and no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perennial import __version__
from perennial.core import plugins
from perennial.core.amounts import human
from perennial.core.errors import UserError
from perennial.core.files import write_text
from perennial.report.markup import escape, listed
from perennial.report.rows import NEW, OLD, Comparison
from perennial.report.sections.base import Section
from perennial.report.style import SHEET


def write_report(comparison: Comparison, out: str | Path, *, sections: Sequence[str] = ()) -> Path:
    """Writes the page to the HTML file `out`, whole or not at all, and returns its path.

    sections: dotted names of further sections of one's own. Raises UserError when the file cannot be written.
    """
    target = Path(out)
    if target.is_dir():
        raise UserError(f"{target}: is a folder; give the name of the HTML file to write")
    write_text(target, render(comparison, sections=sections))
    return target


def render(comparison: Comparison, *, sections: Sequence[str] = ()) -> str:
    """The whole page as text; the same comparison gives the same bytes."""
    parts = [(name, section, section.render(comparison)) for name, section in _sections(sections)]
    head = "".join(html for _, section, html in parts if html and not section.TITLE)
    body = [(name, section.TITLE, html) for name, section, html in parts if html and section.TITLE]
    links = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in body)
    blocks = "\n".join(_block(name, escape(heading), html) for name, heading, html in body)
    title = _title(comparison)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} - Perennial report</title>\n<style>{SHEET}</style>\n</head>\n<body>\n"
        f'<div class="wrap">\n<header class="top"><span class="brand">Perennial report</span>{_THEMES}</header>\n'
        f"<main>\n<h1>{escape(title)}</h1>\n"
        f'<p class="facts">{_facts(comparison)}</p>\n{head}\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n{blocks}\n'
        f"</main>\n<footer>Made by Perennial {escape(__version__)} from the files of the runs alone.</footer>\n"
        "</div>\n</body>\n</html>\n"
    )


def _block(name: str, heading: str, html: str) -> str:
    title = f'<h2 id="{name}-title">{heading}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{title}{html}</section>'


_THEMES = (
    '<fieldset class="themes"><legend>Colours</legend>'
    + "".join(
        f'<label><input type="radio" name="theme" id="theme-{key}"{" checked" if key == "auto" else ""}>{word}</label>'
        for key, word in (("auto", "Auto"), ("light", "Light"), ("dark", "Dark"))
    )
    + "</fieldset>"
)


def _sections(extra: Sequence[str]) -> list[tuple[str, Section]]:
    names = [*plugins.names("sections"), *extra]
    found = [(name.replace(".", "-"), plugins.load("sections", name)()) for name in names]
    return sorted(found, key=lambda item: (item[1].POSITION, item[0]))


def _title(comparison: Comparison) -> str:
    """What is compared, in a few words."""
    runs = [row for _, row, _ in comparison.runs]
    continued = [row for row in runs if row.continued]
    parents = list(dict.fromkeys(row.parent_label for row in continued))
    if len(parents) == 1:
        ways = "" if len(continued) == 1 else f" in {len(continued)} ways"
        return f"{parents[0]}, continued{ways}"
    return runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared"


def _facts(comparison: Comparison) -> str:
    runs = [run for _, _, run in comparison.runs]
    sizes = sorted({run.parameters for run in runs if run.parameters})
    facts = [f"{' and '.join(human(size) for size in sizes)} parameters"] if sizes else []
    for role, word in ((OLD, "old"), (NEW, "new")):
        names = list(dict.fromkeys(name for row in comparison.rows for name in row.names(role)))
        facts += [f"{word}: {escape(listed(names))}"] if names and names != [role] else []
    facts.append(f"{len(runs)} run{'s' if len(runs) > 1 else ''}")
    return " &middot; ".join(facts)
