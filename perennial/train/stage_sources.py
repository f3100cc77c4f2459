"""The sources of a stage: which corpora, replay included, in which order, from where in it on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perennial.core.errors import UserError, nearest
from perennial.core.seeds import derive
from perennial.data.corpus import Corpus
from perennial.data.mixture import StageOrder
from perennial.data.replay import SourceSpec, replay_sources
from perennial.train.corpora import Opened
from perennial.train.recipe import REPLAY, Recipe, StageSettings, shares
from perennial.train.resolved import ResolvedStage
from perennial.train.starting import Parent


def stage_sources(
    recipe: Recipe, stage: StageSettings, parent: Parent | None, corpora: Mapping[str, Opened]
) -> list[SourceSpec]:
    """The sources of a stage's mixture. Raises UserError where nothing is known that could be replayed."""
    result: list[SourceSpec] = []
    for name, share in sorted(shares(stage.mixture).items()):  # how the file orders them changes nothing
        if name == REPLAY and name not in recipe.corpora:
            assert parent is not None
            if not parent.lineage.stages:
                raise UserError(
                    f"stage '{stage.name}': replay: the data that {parent.path} was trained on are not known; name a "
                    "corpus that stands in for them under 'corpora' and in the mixture"
                )
            stages = [s.model_dump(mode="json") for s in parent.lineage.stages]
            where = {
                n: str(o.corpus.path) for n, o in corpora.items() if o.role == "old" or n in parent.lineage.corpora
            }
            result += replay_sources(stages, share, recipe.seed, moved=where, max_epochs=stage.max_epochs)
        else:
            corpus = corpora[name].corpus
            seed, offset = _continued(name, corpus, parent, recipe)
            result.append(
                SourceSpec(
                    name=name,
                    corpus=str(corpus.path),
                    fingerprint=corpus.fingerprint,
                    weight=share,
                    role="fresh",
                    seed=seed,
                    offset_rows=offset,
                    max_epochs=stage.max_epochs,
                )
            )
    return result


def _continued(name: str, corpus: Corpus, parent: Parent | None, recipe: Recipe) -> tuple[int, int]:
    """Order seed and rows already drawn: a corpus that the parent was going through goes on where it stopped."""
    seed, offset = recipe.seed, 0
    for stage in parent.lineage.stages if parent else []:
        for source in stage.sources:
            if source["fingerprint"] == corpus.fingerprint and source["role"] == "fresh":
                if stage.sequence_length != recipe.batch.sequence_length:
                    raise UserError(
                        f"corpus '{name}': the parent went through it in rows of {stage.sequence_length} tokens; set "
                        "batch.sequence_length to that to go on without repeating, or use 'replay' for what was seen"
                    )
                seed, offset = source["seed"], source["offset_rows"] + source["rows"]
    return seed, offset


def pull_sources(
    recipe: Recipe, stage: StageSettings, pull: Any, parent: Parent | None, corpora: Mapping[str, Opened]
) -> list[SourceSpec]:
    """The sources of the data that a pull weighs by."""
    if pull is None or not pull.mixture:
        return []
    for name in pull.mixture:
        if name not in corpora and name != REPLAY:
            hint = nearest(name, [*corpora, REPLAY])
            raise UserError(f"stage '{stage.name}': pull: no corpus '{name}' under 'corpora'.{hint}")
    return stage_sources(recipe, stage.model_copy(update={"mixture": pull.mixture}), parent, corpora)


def check_repetition(recipe: Recipe, stages: list[ResolvedStage], corpora: Mapping[str, Opened]) -> None:
    """Raises UserError when a stage would go through a corpus more often than it allows."""
    by_fingerprint = {o.corpus.fingerprint: o.corpus for o in corpora.values()}
    drawn: dict[str, int] = {}
    for stage in stages:
        order = stage_order(stage.sources, by_fingerprint, recipe.seed, recipe.batch.sequence_length, stage.name, drawn)
        rows = stage.updates * (stage.sequences or recipe.batch.sequences)
        try:
            order.check_repetition(rows)
        except UserError as error:
            raise UserError(f"stage '{stage.name}': {error}") from None
        for name, count in order.consumed(rows).items():
            drawn[name] = drawn.get(name, 0) + count


def stage_order(
    sources: list[dict[str, Any]],
    corpora: Mapping[str, Corpus],
    seed: int,
    sequence_length: int,
    stage: str,
    drawn: Mapping[str, int],
) -> StageOrder:
    """The order of a stage's rows when `drawn` rows of each source were consumed by earlier stages of the run."""
    specs = [SourceSpec.from_json({**s, "offset_rows": s["offset_rows"] + drawn.get(s["name"], 0)}) for s in sources]
    return StageOrder(specs, corpora, seed=derive(seed, "mixture", stage), sequence_length=sequence_length)
