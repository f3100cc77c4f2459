"""What of a recipe decides about the memory of its run, for `perennial plan` (not a command itself)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from perennial.model.foreign import AnyConfig
    from perennial.plan.memory import Run, Stage
    from perennial.train.recipe import Recipe, StageSettings


def run_of(recipe: Recipe, base: Path, args: argparse.Namespace) -> Run:
    """What of a recipe decides about memory, on the machine that the options describe."""
    from perennial.core import plugins
    from perennial.plan.memory import Run, gpu_bytes, limit_of_machine, parse_bytes, precision_of_machine

    device: Literal["cpu", "cuda"] = args.device or ("cuda" if gpu_bytes() else "cpu")
    limit = (
        parse_bytes(args.memory_limit)
        if args.memory_limit
        else limit_of_machine(device, args.per_machine or args.processes)
    )
    config = _config(recipe, base)
    return Run(
        config=config,
        stages=tuple(_stage(recipe, stage, base, config) for stage in recipe.stages),
        sequences=recipe.batch.sequences,
        sequence_length=recipe.batch.sequence_length,
        micro_batch=recipe.batch.micro_batch,
        precision=precision_of_machine(device) if recipe.precision == "auto" else recipe.precision,
        device=device,
        document_mask=recipe.document_mask,
        checkpointing=recipe.activation_checkpointing,
        shard=recipe.parallel.shard,
        shard_size=recipe.parallel.shard_size,
        tensor=recipe.parallel.tensor,
        communication_bytes=plugins.build("communications", recipe.communication)[0].state_bytes_per_parameter,
        processes=args.processes,
        per_machine=args.per_machine,
        limit_bytes=limit,
        saves_during=recipe.checkpoints.every is not None or len(recipe.stages) > 1,
    )


def _config(recipe: Recipe, base: Path) -> AnyConfig:
    """The model's configuration: the parent's, or the new model's for the vocabulary of the first corpus."""
    from perennial.core.errors import UserError
    from perennial.core.lineage import newest_checkpoint
    from perennial.data.corpus import Corpus
    from perennial.model.folder_config import load_config
    from perennial.model.foreign import check_document_mask, check_rows
    from perennial.train.starting import new_model

    if recipe.parent is not None:
        config: AnyConfig = load_config(newest_checkpoint((base / recipe.parent).resolve()))
    else:
        assert recipe.model is not None
        size = None
        if "vocabulary_size" not in recipe.model.options:
            if not recipe.corpora:
                raise UserError("the vocabulary is not known: name a corpus, or give model.options.vocabulary_size")
            size = Corpus.open(base / next(iter(recipe.corpora.values()))).vocabulary_size
        config = new_model(recipe.model, size, "the first corpus")
    check_rows(config, recipe.batch.sequence_length, "batch.sequence_length")
    check_document_mask(config, recipe.document_mask)
    return config


def _stage(recipe: Recipe, stage: StageSettings, base: Path, config: AnyConfig) -> Stage:
    """A stage's optimizer, the objective's chunk, the rows that are all it trains and the other models it reads."""
    from perennial.core import plugins
    from perennial.core.lineage import newest_checkpoint
    from perennial.model.folder_config import load_config
    from perennial.model.foreign import num_parameters
    from perennial.plan.memory import Stage

    objective = plugins.build("objectives", stage.objective)[0]
    pull = plugins.build("pulls", stage.pull)[0] if stage.pull is not None else None
    names = {*objective.checkpoints(), *(["parent"] if pull else [])}
    folders = [newest_checkpoint((base / name).resolve()) for name in names - {"parent"}]
    others = [*(load_config(folder) for folder in folders), *([config] if "parent" in names else [])]
    return Stage(
        name=stage.name,
        optimizer=plugins.build("optimizers", stage.optimizer)[0],
        chunk_tokens=getattr(objective, "chunk_tokens", None),
        new_rows=_new_rows(recipe, base) if stage.train == "new_rows" else None,
        other_parameters=sum(map(num_parameters, [*others, *([config] if pull and pull.mixture else [])])),
        teachers=len(objective.checkpoints()),
    )


def _new_rows(recipe: Recipe, base: Path) -> int:
    """How many ids the parent's vocabulary was last extended by. Raises UserError when it never was."""
    from perennial.core import lineage as lineages
    from perennial.core.errors import UserError

    path = lineages.newest_checkpoint((base / recipe.parent).resolve()) if recipe.parent else None
    changes = lineages.read(path).changes if path and lineages.has_lineage(path) else []
    ids = [change["ids"] for change in changes if change.get("operation") == "vocab extend"]
    if not ids:
        raise UserError("train 'new_rows' needs a parent made by `perennial vocab extend`")
    first, stop = ids[-1]
    return int(stop - first)
