"""The lineage tree: which run continues which, on what, at what learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from perennial.report.markup import amount, escape, flops, rate, run_label
from perennial.report.rows import Comparison, Row
from perennial.report.runs import Stage
from perennial.report.sections.base import Section

_Key = tuple[str, ...]


@dataclass
class _Node:
    """A run in the tree."""

    name: str
    stages: Sequence[Stage]
    checkpoint: str | None = None
    row: Row | None = None
    index: int = 0
    children: dict[_Key, _Node] = field(default_factory=dict)


class LineageTree(Section):
    """Random weights at the root, every run below the one it continues."""

    POSITION: ClassVar[int] = 100
    TITLE: ClassVar[str] = "Lineage"

    def render(self, comparison: Comparison) -> str:
        roots: dict[_Key, _Node] = {}
        for index, row, run in comparison.runs:
            children = roots
            for group in _by_run(run.ancestors):
                last = group[-1]
                node = children.setdefault((last.run, last.recipe_hash), _Node(last.run, group))
                children = node.children
                if group[-1] is run.ancestors[-1]:
                    node.checkpoint = run.parent
            # Two runs of one recipe are told apart by folder; what others continue is found by its recipe.
            own = (run.name, run.recipe_hash, *(() if row.is_base else (str(run.folder),)))
            node = children.setdefault(own, _Node(row.label, run.stages))
            node.name, node.stages, node.row, node.index = row.label, run.stages, row, index
            node.checkpoint = run.checkpoint
        for index, row in enumerate(comparison.rows):
            _name_unseen(roots, row, index)
        return f'<ul class="tree">{"".join(_item(node) for node in roots.values())}</ul>' if roots else ""


def _by_run(stages: Sequence[Stage]) -> list[list[Stage]]:
    groups: list[list[Stage]] = []
    for stage in stages:
        if groups and (groups[-1][0].run, groups[-1][0].recipe_hash) == (stage.run, stage.recipe_hash):
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def _name_unseen(nodes: dict[_Key, _Node], row: Row, index: int) -> None:
    """Gives the node of a parent whose folder was not given the label that the tables use."""
    for node in nodes.values():
        if row.run is None and node.row is None and node.checkpoint == row.checkpoint:
            node.row, node.index, node.name = row, index, row.label
        _name_unseen(node.children, row, index)


def _item(node: _Node) -> str:
    head = run_label(node.row, node.index) if node.row is not None else f"<b>{escape(node.name)}</b>"
    spent = [stage.flops for stage in node.stages if stage.flops is not None]
    facts = [f"{amount(sum(stage.tokens for stage in node.stages))} tokens"]
    facts += [f"{flops(sum(spent))} FLOPs"] if spent else []
    facts += [f'checkpoint <span class="mono">{escape(node.checkpoint[:16])}</span>'] if node.checkpoint else []
    meta = "".join(f'<div class="meta">{_stage(stage)}</div>' for stage in node.stages)
    inner = "".join(_item(child) for child in node.children.values())
    below = f"<ul>{inner}</ul>" if inner else ""
    head_line = f'<div class="head">{head}<span class="meta">{" &middot; ".join(facts)}</span></div>'
    return f'<li><div class="node">{head_line}{meta}</div>{below}</li>'


def _stage(stage: Stage) -> str:
    drawn = " + ".join(f"{amount(s.tokens)} {escape(s.name)}" for s in stage.sources)
    rates = " &rarr; ".join(rate(r) for r in (stage.rate_start, stage.rate_peak, stage.rate_end))
    parts = [f"{escape(stage.name)}: {drawn}", f"{escape(stage.schedule.get('name', ''))} rate {rates}"]
    parts += [escape(stage.optimizer["name"])] if stage.optimizer.get("name") else []
    return " &middot; ".join(parts)
