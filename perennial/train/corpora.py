"""The corpora of a run: those that its recipe names, the parent's as far as they are found, those only evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perennial.core.errors import UserError, nearest
from perennial.data.corpus import Corpus
from perennial.train.recipe import REPLAY, Recipe
from perennial.train.stage_parts import weighs_by_replay
from perennial.train.starting import Parent, earlier_tokenizers


@dataclass(frozen=True)
class Opened:
    """A prepared corpus and its part in the run."""

    corpus: Corpus
    role: str
    """'new', 'old' or 'other', which is only evaluated."""
    stands_in: bool = False
    """For data of the parent that are not known."""

    @property
    def facts(self) -> dict[str, Any]:
        """The corpus in resolved.json."""
        return {
            "path": str(self.corpus.path),
            "fingerprint": self.corpus.fingerprint,
            "tokenizer": self.corpus.tokenizer_fingerprint,
            "role": self.role,
            **({"stands_in": True} if self.stands_in else {}),
        }


def open_corpora(recipe: Recipe, base: Path, parent: Parent | None) -> dict[str, Opened]:
    """The run's corpora, the parent's (as far as they can be found) and those only evaluated."""
    opened = {}
    for name, text in recipe.corpora.items():
        stands_in = name in recipe.stand_ins
        opened[name] = Opened(Corpus.open((base / text).resolve()), "old" if stands_in else "new", stands_in)
    known = parent.lineage.corpora if parent else {}
    for name in opened.keys() & known.keys():
        _same_corpus(name, opened[name].corpus, known[name]["fingerprint"])
    opened |= {name: Opened(corpus, "old") for name, corpus in old_corpora(recipe, base, parent).items()}
    for name, text in recipe.evaluation.corpora.items():
        opened.setdefault(name, Opened(Corpus.open((base / text).resolve()), "other"))
    _one_tokenizer(opened, parent)
    return opened


def old_corpora(recipe: Recipe, base: Path, parent: Parent | None) -> dict[str, Corpus]:
    """The parent's corpora that the recipe does not name itself: those that are found, or all when it replays them.

    Raises UserError for one that was changed, that is needed and missing, or that the parent does not have.
    """
    known = parent.lineage.corpora if parent else {}
    for name in recipe.moved.keys() - known.keys():
        there = ", ".join(known) or "none"
        raise UserError(f"moved: the parent has no corpus '{name}'; it has: {there}.{nearest(name, known)}")
    found = {}
    for name, facts in known.items():
        path = (base / recipe.moved[name]).resolve() if name in recipe.moved else Path(facts["path"])
        is_needed = name in recipe.moved or any(REPLAY in s.mixture or weighs_by_replay(s) for s in recipe.stages)
        if name not in recipe.corpora and (path.is_dir() or is_needed):
            found[name] = _unchanged(name, path, facts["fingerprint"])
    return found


def _same_corpus(name: str, corpus: Corpus, fingerprint: str) -> None:
    if corpus.fingerprint != fingerprint:
        raise UserError(
            f"corpora: '{name}' is also a corpus of the parent, with other content (fingerprint "
            f"{corpus.fingerprint[:12]}, the parent's {fingerprint[:12]}). Give the new one another name, such as "
            f"'{name}-2'."
        )


def _unchanged(name: str, path: Path, fingerprint: str) -> Corpus:
    try:
        corpus = Corpus.open(path)
    except UserError as error:
        raise UserError(
            f"the parent's corpus '{name}' cannot be read: {error}\nIf it lies elsewhere, say `moved: {{{name}: PATH}}`"
            f" in the recipe or `--moved {name}=PATH`."
        ) from None
    if corpus.fingerprint != fingerprint:
        raise UserError(
            f"{path}: this is not the corpus '{name}' that the parent consumed (fingerprint {corpus.fingerprint[:12]}, "
            f"the lineage says {fingerprint[:12]}). Point to the unchanged one with `moved`, or give it another name."
        )
    return corpus


def _one_tokenizer(opened: dict[str, Opened], parent: Parent | None) -> None:
    wanted = parent.tokenizer if parent else next((o.corpus.tokenizer_fingerprint for o in opened.values()), None)
    owner = f"the parent {parent.path}" if parent else f"corpus '{next(iter(opened), '')}'"
    hint = (
        f" Prepare it again with `--tokenizer {parent.path}`." if parent else " Prepare all corpora with one tokenizer."
    )
    allowed = {wanted, *(earlier_tokenizers(parent.lineage) if parent else ())}
    for name, one in opened.items():
        if one.corpus.tokenizer_fingerprint not in (allowed if one.role == "old" else {wanted}):
            raise UserError(
                f"corpus '{name}' ({one.corpus.path}) was prepared with another tokenizer "
                f"({one.corpus.tokenizer_fingerprint[:12]}) than {owner} ({str(wanted)[:12]}).{hint}"
            )
