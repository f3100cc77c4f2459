"""A model with new tokens: tokenizer, tables and lineage of a new folder. The Python face of `vocab extend`.

The folder is written under a temporary name and put in place when it is whole. With `train_rows` the new rows are
trained first, everything else frozen, by the one loop: in OUT.work, which stays (it holds the prepared text, which the
lineage of the result names, and the run's records); the finished checkpoint becomes OUT.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from perennial.core import files
from perennial.core import lineage as lineages
from perennial.core.amounts import Amount, human, parse
from perennial.core.environment import environment, tune_process
from perennial.core.errors import UserError
from perennial.core.progress import Progress
from perennial.data.corpus import Corpus
from perennial.data.tokenizers.extend import (
    Extension,
    TextReading,
    decoded,
    extend_tokenizer,
    measure_fertility,
    sampled_texts,
    some_texts,
)
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.model.card import read_companions, write_companions
from perennial.model.folder_config import load_config
from perennial.model.foreign import TransformersConfig, check_vocabulary
from perennial.model.huggingface import save_model
from perennial.model.inspection import weights_id
from perennial.model.transformer import Transformer
from perennial.surgery.vocabulary import (
    check_init,
    find_contexts,
    padded_rows,
    with_new_rows,
    with_new_rows_in_state,
)
from perennial.train import checkpoint as checkpoints
from perennial.train.continuing import derive
from perennial.train.full_weights import save_full_weights
from perennial.train.given_data import is_prepared, prepared
from perennial.train.origin import lineage_of
from perennial.train.recipe import ParentFacts, Recipe, parse_recipe
from perennial.train.run import start

OPERATION = "vocab extend"
ROWS_STAGE = "new-rows"
_CONTEXT_BYTES = 4 << 20
"""Text in which contexts of new tokens are looked for."""
_ASKED, _EXTENDED, _RUN = "asked.json", "extended", "run"


@dataclass(frozen=True)
class Asked:
    """How a vocabulary is to be extended."""

    add: int
    """Number of new tokens."""
    keep: Mapping[str, Path] = field(default_factory=dict)
    """Old texts that must be cut exactly as before."""
    init: str = "mean"
    """What new rows start as: mean, position, contexts or zero_mean."""
    pad_to: int | None = None
    """The tables have a multiple of this many rows; None: of what they have now."""
    seed: int = 0
    """For rows that are drawn."""
    reading: TextReading = field(default_factory=TextReading)


def extend_vocabulary(
    model: Path,
    data: Mapping[str, Path],
    out: Path,
    asked: Asked,
    *,
    train_rows: str | None = None,
    validation: str = "5%",
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes `out`, the model of a folder with tokens for the new text, and says what was done.

    train_rows: an amount of tokens ('1M tokens') to train the new rows on first; the same call goes on with that when
    it was stopped ('complete' is then False). Raises UserError.
    """
    tune_process()
    parent = lineages.newest_checkpoint(model)
    if out.exists():
        raise UserError(f"{out}: exists already; give another --out, or delete it")
    _check(parent, data, asked)
    if train_rows is None:
        return _extend(parent, data, out, asked, quiet)
    for name, path in data.items():
        if is_prepared(path):
            raise UserError(
                f"--data {name}={path}: this corpus is cut by the old tokenizer; --train-rows needs the raw text, to "
                "cut it by the new one"
            )
    return _extend_and_train(parent, data, out, asked, _tokens(train_rows), validation, quiet)


def _check(parent: Path, data: Mapping[str, Path], asked: Asked) -> None:
    """Raises UserError for all that can be told without reading text or weights."""
    if not data:
        raise UserError("--data: at least one NAME=PATH with text of the new language or domain is needed")
    check_init(asked.init)
    padded_rows(1, 1, asked.pad_to)
    checkpoints.verify(parent, checksums=False)
    config, tokenizer = load_config(parent), TokenizerFolder.open(parent)
    if isinstance(config, TransformersConfig):
        raise UserError(
            f"{parent}: {config.architecture} is run through transformers ({config.why}); the vocabulary can be "
            "extended for models with native code only"
        )
    check_vocabulary(config, tokenizer.vocabulary_size, "the same folder", str(parent))
    for option, paths in (("--data", data), ("--keep", asked.keep)):
        for name, path in paths.items():
            if not path.exists():
                raise UserError(f"{option} {name}={path}: no such file or folder")


def _tokens(text: str) -> Amount:
    bare = re.fullmatch(r"[\d_,.eE+-]+[KkMBGT]?", text)
    try:
        amount = parse(f"{text} tokens" if bare else text, ("tokens",))
    except ValueError as error:
        raise UserError(f"--train-rows: {error}") from None
    if amount.value == 0:
        raise UserError(f"--train-rows {text!r}: must be above 0; leave it out to train nothing")
    return amount


# The folder


def _extend(parent: Path, data: Mapping[str, Path], out: Path, asked: Asked, quiet: bool) -> dict[str, Any]:
    folder = TokenizerFolder.open(parent)
    with Progress("vocabulary", quiet=quiet) as line:
        how: dict[str, Any] = {"keep": asked.keep, "reading": asked.reading, "progress": line}
        extension = extend_tokenizer(folder, data, add=asked.add, **how)
        old = measure_fertility(extension, _known_texts(parent), progress=line)
        extension = replace(extension, fertility={**extension.fertility, **old})
        model = checkpoints.load_weights(parent, torch.device("cpu"))
        assert isinstance(model, Transformer)
        before = model.config.vocabulary_size
        rows, multiple = padded_rows(before, extension.first_id + asked.add, asked.pad_to)
        contexts = []
        if asked.init == "contexts":
            texts = sampled_texts(data, asked.reading, _CONTEXT_BYTES)
            contexts = find_contexts(extension, texts, length=model.config.context)
        grown = with_new_rows(
            model, extension.tokens, rows=rows, init=asked.init, seed=asked.seed, contexts=contexts, progress=line
        )
    change = _change(parent, data, asked, extension, (before, rows))
    left_out = _write(parent, out, grown, extension, change)
    met = {occurrence.token for context in contexts for occurrence in context.found}
    result: dict[str, Any] = {
        "out": str(out),
        "added": asked.add,
        "ids": change["ids"],
        "rows": change["rows"],
        "rows_multiple_of": multiple,
        "init": asked.init,
        "fertility": {name: values.to_json() for name, values in extension.fertility.items()},
        "tokens": [token.spelling for token in extension.tokens],
        "left_out": left_out,
    }
    return {**result, **({"tokens_with_contexts": len(met)} if asked.init == "contexts" else {})}


def _known_texts(parent: Path) -> dict[str, list[str]]:
    """Validation text of the corpora that the lineage names, as far as they are still there and the same."""
    found = {}
    for name, facts in (lineages.read(parent).corpora if lineages.has_lineage(parent) else {}).items():
        with contextlib.suppress(UserError):  # it is only measured on, and that it is damaged is said when it is needed
            corpus = Corpus.open(facts["path"])
            if corpus.fingerprint == facts["fingerprint"]:
                found[f"{name} (old)"] = some_texts(text for text, _ in decoded(corpus, corpus.validation))
    return found


def _change(
    parent: Path, data: Mapping[str, Path], asked: Asked, extension: Extension, rows: tuple[int, int]
) -> dict[str, Any]:
    """The entry in the lineage."""
    first = extension.first_id
    known = lineages.read(parent).checkpoint if lineages.has_lineage(parent) else weights_id(parent)
    per_word = {
        n: (f.before / max(1, f.num_words), f.after / max(1, f.num_words)) for n, f in extension.fertility.items()
    }
    return {
        "operation": OPERATION,
        "parent": known,
        "added": asked.add,
        "ids": [first, first + asked.add],
        "rows": list(rows),
        "init": asked.init,
        "seed": asked.seed,
        "data": sorted(data),
        "keep": sorted(asked.keep),
        "tokens_per_word": {name: [round(value, 3) for value in pair] for name, pair in per_word.items()},
    }


def _write(parent: Path, out: Path, model: Transformer, extension: Extension, change: dict[str, Any]) -> list[str]:
    """Writes the folder; returns the tokenizer's files that were left out."""
    with files.new_folder(out) as partial:
        state, before = partial / lineages.STATE_FOLDER, parent / lineages.STATE_FOLDER
        state.mkdir()
        save_model(model, partial)
        left_out = extension.write(partial)
        if (before / "weights").is_dir():
            save_full_weights(model, model.stored_dtypes.values(), state)
        moments = before / "optimizer.safetensors"
        if moments.is_file():
            first, rows = extension.first_id, (change["rows"][0], change["rows"][1])
            kept = with_new_rows_in_state(load_file(moments), first=first, added=change["added"], rows=rows)
            save_file(kept, state / moments.name)
            (state / moments.name).chmod(0o644)
        lineage = _lineage(parent, partial, change)
        files.write_json(state / lineages.LINEAGE_FILE, lineage.model_dump(mode="json"))
        write_companions(read_companions(parent), partial, lineage)
        files.write_manifest(partial, {"format": 1}, checkpoints.MANIFEST)
    return left_out


def _lineage(parent: Path, folder: Path, change: dict[str, Any]) -> lineages.Lineage:
    """The parent's lineage with the change; losses per token are not carried on, a token is another one now."""
    known = lineages.read(parent) if lineages.has_lineage(parent) else None
    past = lineage_of(parent, load_config(parent), known, ParentFacts())
    return past.model_copy(
        update={
            "checkpoint": weights_id(folder),
            "changes": [*past.changes, change],
            "evaluation": {},
            "environment": environment(),
        }
    )


# New rows first


def _extend_and_train(
    parent: Path, data: Mapping[str, Path], out: Path, asked: Asked, amount: Amount, validation: str, quiet: bool
) -> dict[str, Any]:
    work = out.with_name(f"{out.name}.work")
    _resume_or_begin(work, _fingerprint(parent, data, asked, amount))
    extended, run = work / _EXTENDED, work / _RUN
    result = files.read_json(work / "result.json", "result") if extended.exists() else None
    if result is None:
        result = _extend(parent, data, extended, asked, quiet)
        files.write_json(work / "result.json", result)
    given: dict[str, Any] = {"checkpoint": extended, "out": run, "text_field": asked.reading.text_field}
    given |= {"validation": validation, "against": [], "quiet": quiet}
    corpora = {name: prepared(name, path, **given) for name, path in data.items()}
    trained = start(_recipe(extended, corpora, amount, out.name), run, base=Path.cwd(), quiet=quiet)
    result |= {"out": str(out), "work": str(work), "complete": trained["complete"], "training": trained}
    if trained["complete"]:
        partial = out.with_name(f"{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(lineages.newest_checkpoint(run), partial)
        files.publish(partial, out)
    return result


def _fingerprint(parent: Path, data: Mapping[str, Path], asked: Asked, amount: Amount) -> dict[str, Any]:
    """What has to be the same for a call to go on with the work of another."""
    return {
        "model": str(parent.resolve()),
        "data": {name: str(path.resolve()) for name, path in data.items()},
        "keep": {name: str(path.resolve()) for name, path in asked.keep.items()},
        "add": asked.add,
        "init": asked.init,
        "pad_to": asked.pad_to,
        "seed": asked.seed,
        "train_rows": str(amount),
    }


def _resume_or_begin(work: Path, asked: dict[str, Any]) -> None:
    if work.exists():
        found = files.read_json(work / _ASKED, "record of what was asked for") if (work / _ASKED).is_file() else {}
        differing = [key for key, value in asked.items() if found.get(key) != value]
        if differing:
            raise UserError(
                f"{work}: holds the work of another command (differs in: {', '.join(differing)}). Give another --out, "
                "or delete it"
            )
        return
    files.write_json(work / _ASKED, asked)


def _recipe(extended: Path, corpora: Mapping[str, Path], amount: Amount, name: str) -> Recipe:
    """One stage on the new text that trains the new rows, at the highest rate that the model ever saw."""
    lineage = lineages.read(extended)
    derived = derive(extended, corpora, budget=str(amount), base=Path.cwd(), name=name, replay="0%", peak=lineage.peak)
    recipe = derived.recipe.model_dump(mode="json", exclude_unset=True)
    [stage] = recipe["stages"]
    stage |= {"name": ROWS_STAGE, "train": "new_rows"}
    stage["schedule"] = {"name": "cosine", "peak": lineage.peak, "warmup": "5%"}
    if stage["optimizer"] != "adamw" and stage["optimizer"].get("name") != "adamw":
        stage["optimizer"] = "adamw"  # rows of tables are not what other optimizers are for
    return parse_recipe(recipe, source="recipe for the new rows")


def to_text(result: Mapping[str, Any]) -> str:
    """What was done, for a person."""
    first, stop = result["ids"]
    before, after = result["rows"]
    kept = f"multiple of {result['rows_multiple_of']} " + (
        "kept" if after != before else "kept: spare rows were enough"
    )
    lines = [
        f"{result['out']}: {result['added']} tokens with the ids {first} to {stop - 1}; tables of {before} rows have "
        f"{after} now ({kept}); new rows: {result['init']}",
        "",
        "fertility                         tokens per word        bytes per token        words cut otherwise",
        "                                  before     after       before     after",
    ]
    for name, f in result["fertility"].items():
        lines.append(
            f"  {name[:30]:<30}  {f['tokens_per_word_before']:8.3f}  {f['tokens_per_word_after']:8.3f}     "
            f"{f['bytes_per_token_before']:8.3f}  {f['bytes_per_token_after']:8.3f}     {f['recut_share']:8.2%}"
        )
    lines.append("")
    if not any(name.endswith("(kept)") for name in result["fertility"]):
        lines.append(
            "Old text that contains a new token is cut into fewer tokens; --keep NAME=PATH takes only tokens that "
            "leave a text as it is."
        )
    if result["left_out"]:
        lines.append(f"Left out, because they spell the old vocabulary: {', '.join(result['left_out'])}.")
    if "training" in result:
        tokens = human(result["training"]["tokens"], "tokens")
        lines.append(f"The new rows were trained on {tokens}; text and records of that are in {result['work']}.")
    return "\n".join(lines).rstrip()
