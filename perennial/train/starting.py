"""What a run starts from: the folder of a parent, or the configuration of a new model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perennial.core import lineage as lineages
from perennial.core.errors import UserError
from perennial.core.settings import check, raise_problems
from perennial.model.config import ModelConfig
from perennial.model.foreign import AnyConfig, check_vocabulary
from perennial.train.origin import lineage_of
from perennial.train.recipe import ModelSettings, ParentFacts


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a run starts from, as far as files tell."""

    path: Path
    lineage: lineages.Lineage
    config: AnyConfig
    tokenizer: str


def read_parent(path: Path, facts: ParentFacts | None = None) -> Parent:
    """A parent's lineage, configuration and tokenizer, from its folder: a checkpoint, or any model's. Raises UserError.

    `facts`: what the user knows of the past of a model that Perennial did not train.
    """
    from perennial.data.tokenizers.folder import TokenizerFolder
    from perennial.model.folder_config import load_config

    path = lineages.newest_checkpoint(path)
    known = lineages.read(path) if lineages.has_lineage(path) else None
    if known is not None and not known.stages and known.origin is None:
        raise UserError(f"{path}: nothing was trained yet in this checkpoint; take a later one")
    config, tokenizer = load_config(path), TokenizerFolder.open(path)
    check_vocabulary(config, tokenizer.vocabulary_size, "the same folder", str(path))
    return Parent(path, lineage_of(path, config, known, facts or ParentFacts()), config, tokenizer.fingerprint)


def earlier_tokenizers(lineage: lineages.Lineage) -> set[str]:
    """Fingerprints of the tokenizers before the vocabulary was extended: what they cut still means the same."""
    was_extended = any(change.get("operation") == "vocab extend" for change in lineage.changes)
    return {facts["tokenizer"] for facts in lineage.corpora.values()} if was_extended else set()


def new_model(asked: ModelSettings, vocabulary_size: int | None, where: str) -> ModelConfig:
    """The configuration of a new model, its vocabulary that of the data unless the recipe gives another.

    where: whose vocabulary_size it is, for errors. Raises UserError.
    """
    settings = {**({} if vocabulary_size is None else {"vocabulary_size": vocabulary_size}), **asked.options}
    if asked.preset is not None:
        config = ModelConfig.from_preset(asked.preset, **settings)
    else:
        found, problems = check(ModelConfig, settings, ("model", "options"))
        raise_problems(problems, "recipe")
        assert found is not None
        config = found
    if vocabulary_size is not None:
        check_vocabulary(config, vocabulary_size, where, "model.options")
    return config
