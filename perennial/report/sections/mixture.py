"""The data that was really consumed: every source of every stage, beside the share asked for."""

from __future__ import annotations

from typing import ClassVar

from perennial.report.markup import NONE, Column, Footnotes, amount, bar, escape, percent, run_label, table
from perennial.report.rows import Comparison, Row
from perennial.report.runs import Source, Stage
from perennial.report.sections.base import Section
from perennial.report.style import corpus_colour

_ASKED = (
    "<b>Asked</b>: share of the stage's rows in the recipe. <b>Drawn</b>: share of the tokens that were trained on."
)
_EPOCHS = (
    "<b>Passes</b>: tokens drawn in the stage / tokens that there were to draw from; for a replay source, from what "
    "the parent had seen."
)


class Mixture(Section):
    """One bar per stage, and every source in numbers."""

    POSITION: ClassVar[int] = 80
    TITLE: ClassVar[str] = "Data consumed"

    def render(self, comparison: Comparison) -> str:
        stages = [(i, row, stage) for i, row, run in comparison.runs for stage in run.stages if stage.sources]
        if not stages:
            return ""
        sources = [(i, row, stage, source) for i, row, stage in stages for source in stage.sources]
        colours = _colours([source for *_, source in sources])
        footnotes = Footnotes("mixture")
        bars = _bars(stages, colours)
        numbers = _numbers(sources, colours, footnotes)
        return f"{bars}{numbers}{footnotes.html()}"


def _bars(stages: list[tuple[int, Row, Stage]], colours: dict[str, str]) -> str:
    columns = [
        Column("Stage", [escape(stage.name) for *_, stage in stages], text=True),
        Column("Share of the tokens", [_bar(stage, colours) for *_, stage in stages], text=True),
        Column("Tokens", [amount(sum(s.tokens for s in stage.sources)) for *_, stage in stages]),
    ]
    seen = {source.name: _named(source, colours) for *_, stage in stages for source in stage.sources}
    keys = "".join(f"<li>{html}</li>" for html in seen.values())
    names = [run_label(row, index, tag=False) for index, row, _ in stages]
    return (
        f'<ul class="legend keys" aria-label="Sources; replay is hatched">{keys}</ul>'
        f'<div class="mix">{table(("Run", names), columns)}</div>'
    )


def _numbers(listed: list[tuple[int, Row, Stage, Source]], colours: dict[str, str], footnotes: Footnotes) -> str:
    asked, epochs = footnotes.mark(_ASKED), footnotes.mark(_EPOCHS)
    sources = [source for *_, source in listed]
    columns = [
        Column("Stage", [escape(stage.name) for _, _, stage, _ in listed], text=True),
        Column("Source", [_named(source, colours) for source in sources], text=True),
        Column("Kind", [escape(source.role) for source in sources], text=True),
        Column(f"Asked{asked}", [percent(source.weight) for source in sources]),
        Column(f"Drawn{asked}", [percent(_share(stage, source)) for _, _, stage, source in listed]),
        Column("Tokens", [amount(source.tokens) for source in sources]),
        Column(f"Passes{epochs}", [NONE if s.epochs is None else f"{s.epochs:.2f}" for s in sources]),
    ]
    return table(("Run", [run_label(row, i, tag=False) for i, row, _, _ in listed]), columns, dense=True)


def _corpus(source: Source) -> str:
    return source.fingerprint or source.name.removeprefix("replay/")


def _colours(sources: list[Source]) -> dict[str, str]:
    """One colour per corpus, the same whether it is drawn fresh or replayed."""
    corpora = list(dict.fromkeys(_corpus(source) for source in sources))
    return {corpus: corpus_colour(i) for i, corpus in enumerate(corpora)}


def _extra(source: Source) -> str:
    return "hatch" if source.role == "replay" else ""


def _named(source: Source, colours: dict[str, str]) -> str:
    key = f'<i class="key {_extra(source)}" style="background-color:{colours[_corpus(source)]}"></i>'
    return key + escape(source.name)


def _share(stage: Stage, source: Source) -> float | None:
    total = sum(s.tokens for s in stage.sources)
    return source.tokens / total if total else None


def _bar(stage: Stage, colours: dict[str, str]) -> str:
    shares = [(_share(stage, source) or 0.0, source) for source in stage.sources]
    words = ", ".join(f"{share:.1%} {source.name}" for share, source in shares)
    return bar([(share, colours[_corpus(source)], _extra(source)) for share, source in shares], words)
